"""The kernels on gradients of every kind, held to the plain-PyTorch reference as in `test_kernels`."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from kernel_cases import (
    BITS,
    DEVICE,
    DTYPES,
    FEW_SHAPES,
    FEW_TILED_SHAPES,
    NEEDS_GPU,
    SOME_SHAPES,
    SWITCHES,
    TILED_SHAPES,
    Shapes,
    follow,
    give,
    gradient,
    optimizer,
    parameters,
    parameters_of,
)
from torch import Tensor

from automagic_bnb import state as st
from automagic_bnb.optimizer import Automagic

pytest.importorskip("automagic_bnb.kernels.step", reason="the kernels need Triton")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy: 1 / 0 in masked lanes

POISONED: Shapes = ((5, 52), (12, 24), (700,), (300,), (2,))


def poisoned(shape: tuple[int, ...], index: int, step: int) -> Tensor:
    """First single elements that are not usable, then a whole block, then whole tensors; then one beyond a border."""
    g = gradient(shape, index, step)
    flat = g.view(-1)
    if step == 1:
        flat[:: 7 + index] = float("nan")
    elif step == 2:
        # On both sides of the border between blocks, at both ends, and beyond what sums of squares hold.
        for place, value in ((0, torch.inf), (255, torch.nan), (256, -torch.inf), (258, 1e18), (-1, -1e38)):
            if place < len(flat):
                flat[place] = value
        flat[256:512] = torch.nan if index == 2 else flat[256:512]
    elif step == 3 and index % 2:
        flat[:] = (1e18, torch.inf)[index // 2]  # equal all over, so that no Laplacian shows it
    elif step == 4:
        flat[256:257] = 1e18
    return g


@pytest.mark.parametrize(
    ("storage", "dtype", "shapes"),
    [
        ("8bit", "float32", POISONED),
        ("32bit", "bfloat16", POISONED),
        ("factored", "float32", FEW_TILED_SHAPES),
        pytest.param("factored", "bfloat16", (*TILED_SHAPES, *FEW_TILED_SHAPES), marks=NEEDS_GPU),
    ],
)
@pytest.mark.parametrize("switch", ["defaults", pytest.param("percentile clipping", marks=NEEDS_GPU)])
def test_gradients_that_are_not_finite_are_skipped_alike(storage: str, dtype: str, shapes: Shapes, switch: str) -> None:
    """Also where they stand beside or between usable ones; everything stays finite, and the skipped are counted."""

    def build(backend: str) -> Automagic:
        return optimizer(parameters(shapes, DTYPES[dtype]), backend, storage, **SWITCHES[switch])

    run = follow(build, 4, poisoned)
    assert run.violations(storage) == []
    for index, p in enumerate(parameters_of(run.kernel)):
        values = [v for v in run.kernel.state[p].values() if isinstance(v, Tensor) and v.is_floating_point()]
        assert all(x.isfinite().all() for x in [p, *values])
        given = [poisoned(tuple(p.shape), index, n).to(p.dtype).float() for n in range(1, 5)]
        bad = sum(int((~(g.abs() <= 2.0**50)).sum()) for g in given)
        assert run.kernel.state[p]["tensor_stats"][st.SKIPPED] == bad > 0


@pytest.mark.parametrize("storage", BITS)
def test_what_is_skipped_keeps_its_bits(storage: str) -> None:
    """A tensor, a block, and (32-bit) an element without a usable gradient hold exactly what they held."""
    opt = optimizer(parameters(((300,), (520,)), torch.float32), "triton", storage)
    whole, partly = parameters_of(opt)
    for index, p in enumerate((whole, partly)):
        # The largest momentum is negative, for which the code book has no 1: coding it again would change it.
        give(p, -gradient(tuple(p.shape), index, 1).abs())
    opt.step()
    kept = ("state1", "state2", "state3", "lr_mask", "last_polarity", "absmax1", "absmax2", "absmax3")
    held = [{k: v.clone() for k, v in opt.state[p].items() if k in kept} for p in (whole, partly)]
    values = [whole.detach().clone(), partly.detach().clone()]
    give(whole, torch.full(whole.shape, torch.nan))
    mixed = gradient((520,), 1, 2)
    mixed[:256], mixed[300] = torch.inf, torch.nan
    give(partly, mixed)
    opt.step()
    assert torch.equal(whole, values[0])
    assert all(torch.equal(opt.state[whole][k], v) for k, v in held[0].items())
    skipped = ~mixed.isfinite().to(DEVICE)
    assert torch.equal(partly[skipped], values[1][skipped])
    assert not torch.equal(partly[~skipped], values[1][~skipped])
    for name, old in held[1].items():
        new = opt.state[partly][name]
        if name.startswith("absmax"):
            assert new[0] == old[0]
        elif storage == "32bit" or name == "lr_mask":
            assert torch.equal(new[skipped], old[skipped])
        else:
            assert torch.equal(new[:256], old[:256])


def test_rows_and_tiles_in_which_all_is_skipped_keep_their_means() -> None:
    """Factored: bit for bit, as does θ; rows beside them move."""
    opt = optimizer(parameters(((40, 16), (300, 16)), torch.float32), "triton", "factored")
    whole, partly = parameters_of(opt)
    for index, p in enumerate((whole, partly)):
        give(p, gradient(tuple(p.shape), index, 1))
    opt.step()
    held, values = copy.deepcopy([dict(opt.state[p]) for p in (whole, partly)]), partly.detach().clone()
    give(whole, torch.full(whole.shape, torch.nan))
    mixed = gradient((300, 16), 1, 2)
    mixed[5] = mixed[256:] = torch.nan  # a row of the first tile, and all of the second
    give(partly, mixed)
    opt.step()
    for name in ("exp_avg_sq", "exp_avg_res"):
        for part in ("row", "col"):
            assert torch.equal(opt.state[whole][f"{name}_{part}"], held[0][f"{name}_{part}"])
        row, old_row = opt.state[partly][f"{name}_row"], held[1][f"{name}_row"]
        col, old_col = opt.state[partly][f"{name}_col"], held[1][f"{name}_col"]
        skipped = mixed.isnan().all(dim=1).to(DEVICE)
        assert torch.equal(row[skipped], old_row[skipped])
        assert (row[~skipped] != old_row[~skipped]).all()
        assert torch.equal(col[1], old_col[1])
        assert (col[0] != old_col[0]).all()
    assert torch.equal(partly[skipped], values[skipped])


@pytest.mark.parametrize("storage", BITS)
@pytest.mark.parametrize("eps", [(1e-30, 1e-16), pytest.param((0.0, 0.0), marks=NEEDS_GPU)])
def test_zero_gradients_are_followed(storage: str, eps: tuple[float, float]) -> None:
    """From the first step on, or after others; in whole tensors, or in rows beside others."""

    def with_zeros(shape: tuple[int, ...], index: int, step: int) -> Tensor:
        g = gradient(shape, index, step)
        if (step + index) % 2:
            return g * 0
        g.view(-1)[:100] = 0
        return g

    run = follow(
        lambda backend: optimizer(parameters(POISONED[:4], torch.float32), backend, storage, eps=eps), 3, with_zeros
    )
    assert run.violations(storage) == []


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=NEEDS_GPU)])
def test_silent_block_beside_a_loud_one(dtype: str) -> None:
    """Its border is all edge, 1e9 times what it holds itself: bounded, as is the penalty, and nothing overflows."""

    def split(shape: tuple[int, ...], index: int, step: int) -> Tensor:
        g = gradient(shape, index, step)
        g.view(-1)[:256] *= 1e-9
        return g

    def build(backend: str) -> Automagic:
        return optimizer(parameters(((10, 52), (8, 64)), DTYPES[dtype]), backend, edge_penalty=20.0)

    run = follow(build, 2, split)
    assert run.violations("8bit") == []
    for p in parameters_of(run.kernel):
        quiet, loud = run.kernel.state[p]["edge_history"][:2]
        assert quiet > 1 > loud > 0, "no border of this kind was seen"


@pytest.mark.parametrize("storage", BITS)
def test_fewer_blocks_of_a_large_group_are_watched(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 8 blocks in place of one of 2, which is less work; tensors of less than that have one."""
    monkeypatch.setattr(st, "PROBE_STRIDE", 2)
    monkeypatch.setattr(st, "LEAST_STRIDE", 2)
    monkeypatch.setattr(st, "MAX_PROBED", 500)
    shapes = ((18, 128), (300,), (5, 256))
    run = follow(lambda backend: optimizer(parameters(shapes, torch.float32), backend, storage, lr=0.01, auto_lr=True))
    assert run.violations(storage) == []
    assert [run.kernel.state[p]["probe_block"].tolist() for p in parameters_of(run.kernel)] == [[0, 0], [0], [0]]


@pytest.mark.parametrize("nothing", [0.0, torch.nan])
@pytest.mark.parametrize("shape", [(33 * 256 + 4,), (67, 300)])
def test_both_watch_the_first_block_with_a_gradient(shape: tuple[int, ...], nothing: float) -> None:
    """Whichever has one first, in each span of 32; a later one does not take its place; one of zeros or NaN is none."""

    def sparse(shape: tuple[int, ...], index: int, step: int) -> Tensor:
        g = torch.full((math.prod(shape),), nothing)
        first = {1: (), 2: (7,), 3: (5, 7, 33), 4: (5, 32)}.get(step, (0, 7, 33))
        for block in first:
            g[block * 256 + 3 : block * 256 + 200] = gradient((g.numel(),), index, step)[block * 256 + 3 :][:197]
        return g.view(shape)

    def build(backend: str) -> Automagic:
        return optimizer(parameters((shape,), torch.float32), backend, "32bit", lr=1e-3, auto_lr=True)

    run = follow(build, 7, sparse)
    assert run.violations("32bit") == []
    state = run.kernel.state[parameters_of(run.kernel)[0]]
    assert state["probe_block"].tolist()[:2] == [7, 1]
    assert state["probe_start"].shape == (len(state["probe_block"]), 256)


@pytest.mark.parametrize("scale", [1e-12, 1e9])
def test_size_of_the_gradient_is_of_no_account(scale: float) -> None:
    """Far outside what training sees, nothing overflows, underflows or meets an eps."""

    def scaled(shape: tuple[int, ...], index: int, step: int) -> Tensor:
        return gradient(shape, index, step) * scale

    run = follow(lambda backend: optimizer(parameters(FEW_SHAPES, torch.float32), backend), 3, scaled)
    assert run.violations("8bit") == []


@pytest.mark.parametrize("storage", BITS)
def test_parameters_of_one_launch_may_be_at_different_steps(storage: str) -> None:
    """Some have no gradient at times: they stand still, and their mask freezes after steps of their own."""
    absent = {(1, 2), (1, 3), (3, 1), (3, 2), (2, 4)}

    def sometimes(shape: tuple[int, ...], index: int, step: int) -> Tensor | None:
        return None if (index, step) in absent else gradient(shape, index, step)

    shapes = ((5, 52), (7, 9), (40,), (3, 4))
    run = follow(
        lambda backend: optimizer(parameters(shapes, torch.float32), backend, storage, warmup_steps=2), 4, sometimes
    )
    assert run.violations(storage) == []
    assert [run.kernel.state[p]["step"] for p in parameters_of(run.kernel)] == [4, 2, 3, 2]


MASK_ENDS = {torch.uint8: [0, 1, 2, 125, 126, 127], torch.float32: [-32.0, -31.5, 30.25, 31.0]}


@pytest.mark.parametrize("storage", ["8bit", "32bit", "factored"])
def test_masks_at_their_ends_are_followed(storage: str) -> None:
    """k neither passes -32 and 31 nor comes out on the other side, whichever way the gradients push it."""

    def to_the_ends(opt: Automagic, step: int) -> None:
        for p in parameters_of(opt) if step > 1 else []:
            mask = opt.state[p]["lr_mask"].view(-1)
            ends = torch.tensor(MASK_ENDS[mask.dtype], dtype=mask.dtype, device=mask.device)
            mask.copy_(ends.repeat(-(-mask.numel() // len(ends)))[: mask.numel()])

    def build(backend: str) -> Automagic:
        return optimizer(parameters(SOME_SHAPES, torch.float32), backend, storage, min_lr=0.0, max_lr=1.0)

    run = follow(build, before=to_the_ends)
    assert run.violations(storage) == []
    masks = torch.cat([run.kernel.state[p]["lr_mask"].view(-1).float().cpu() for p in parameters_of(run.kernel)])
    assert masks.unique().numel() > len(MASK_ENDS[torch.float32])  # some have left the ends again


@pytest.mark.parametrize("stochastic", [True, False], ids=["stochastic", "nearest"])
def test_float16_saturates(stochastic: bool) -> None:
    """A parameter at the end of float16's range stays finite when it is pushed outwards."""

    def build(backend: str) -> Automagic:
        p = parameters(((40,),), torch.float16)[0]
        p.data.fill_(65_000.0)
        return optimizer([p], backend, lr=1000.0, weight_decay=0.0, stochastic_rounding=stochastic)

    run = follow(build, 3, lambda shape, index, step: -gradient(shape, index, step).abs())
    assert run.violations("8bit") == []
    assert all((p == 65_504.0).all() for p in parameters_of(run.kernel))


def test_no_gradient_at_all_does_nothing() -> None:
    """Neither a launch nor a state."""
    opt = optimizer(parameters(FEW_SHAPES, torch.float32), "triton")
    opt.step()
    assert not opt.state
