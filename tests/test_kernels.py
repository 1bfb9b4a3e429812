"""The Triton kernels, held to the plain-PyTorch reference: equal seeds must give equal runs.

Interpreted on the CPU where there is no CUDA device, compiled where there is one; what the interpreter has no time for
is marked `gpu`. Tolerances, and how they are applied, are in `kernel_cases`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kernel_cases import (
    ALL_SHAPES,
    BITS,
    DEVICE,
    DTYPES,
    FEW_SHAPES,
    FEW_TILED_SHAPES,
    NEEDS_GPU,
    ONE_STEP,
    SOME_SHAPES,
    SWITCHES,
    TILED_SHAPES,
    Differences,
    Shapes,
    follow,
    give,
    gradient,
    optimizer,
    parameters,
    parameters_of,
    steady,
    synchronise,
)
from torch import Tensor

from automagic_bnb import bnb
from automagic_bnb import state as st
from automagic_bnb.factored import Tiling
from automagic_bnb.optimizer import Automagic

pytest.importorskip("automagic_bnb.kernels.step", reason="the kernels need Triton")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy: 1 / 0 in masked lanes


# --- the rule, switch by switch -------------------------------------------------------------------------------------


def start_at(opt: Automagic, number: int) -> None:
    """Let the next step be this one for every parameter."""
    for group in opt.param_groups:
        for p in group["params"]:
            opt.init_state(group, p)
            opt.state[p]["step"] = number - 1


@dataclass(frozen=True)
class Case:
    """One run of kernels and reference."""

    storage: str
    dtype: str
    switch: str = "defaults"
    grad_dtype: str | None = None
    shapes: Shapes = SOME_SHAPES
    steps: int = 3

    def __str__(self) -> str:
        grads = f", {self.grad_dtype} gradients" if self.grad_dtype else ""
        return f"{self.storage}, {self.dtype}{grads}: {self.switch}, {len(self.shapes)} shapes"


COVERING = [
    Case("8bit", "bfloat16", shapes=ALL_SHAPES, steps=2),
    Case("32bit", "float32", shapes=ALL_SHAPES, steps=2),
    Case("8bit", "float32"),
    Case("8bit", "float16", grad_dtype="float32"),
    Case("32bit", "bfloat16", grad_dtype="float32"),
    Case("32bit", "float16", grad_dtype="bfloat16"),
    Case("8bit", "bfloat16", "no edges"),
    Case("32bit", "float32", "no frequency filter"),
    Case("8bit", "float16", "no spatial filter"),
    Case("32bit", "float32", "no spatial awareness"),
    Case("8bit", "float32", "no background"),
    Case("8bit", "float32", "no torque"),
    Case("8bit", "bfloat16", "no confidence"),
    Case("32bit", "bfloat16", "not cautious"),
    Case("32bit", "float16", "rounding to nearest"),
    Case("8bit", "float16", "percentile clipping"),
    Case("8bit", "bfloat16", "rate found", steps=4),
    Case("32bit", "bfloat16", "mask freezes"),
    Case("8bit", "float32", "mask freezes"),
    Case("8bit", "float16", "mask never moves", steps=2),
    Case("8bit", "bfloat16", "LoRA"),
    Case("32bit", "float32", "narrow bounds"),
    Case("8bit", "float32", "betas of 0"),
    Case("8bit", "bfloat16", "betas near 1"),
    Case("8bit", "bfloat16", "24-bit weights", "float32"),
    Case("32bit", "bfloat16", "24-bit weights to nearest"),
    Case("factored", "bfloat16", shapes=TILED_SHAPES, steps=2),
    Case("factored", "float32", "no confidence", shapes=FEW_TILED_SHAPES),
    Case("factored", "float16", "percentile clipping", "float32", shapes=FEW_TILED_SHAPES),
    Case("factored", "float32", "rate found", shapes=FEW_TILED_SHAPES, steps=4),
    Case("factored", "float16", "mask freezes", shapes=FEW_TILED_SHAPES),
    Case("factored", "float32", "betas near 1", shapes=FEW_TILED_SHAPES),
]
"""Every switch, storage and dtype at least once. Rounding to the nearest bfloat16 is left to the product: the
interpreter cuts the low bits off instead."""
PRODUCT = [
    Case(storage, dtype, switch, shapes=ALL_SHAPES, steps=4)
    for storage, dtype, switch in itertools.product(BITS, DTYPES, SWITCHES)
] + [
    Case("factored", dtype, switch, shapes=(*TILED_SHAPES, *FEW_TILED_SHAPES), steps=4)
    for dtype, switch in zip(itertools.cycle(DTYPES), SWITCHES, strict=False)
]
LARGE_SHAPES: Shapes = ((1000, 1000), (64, 4096), (5, 7, 129, 257), (1 << 20 | 3,), (4096, 8), (3, 100_000))
LARGE_TILED_SHAPES: Shapes = ((1000, 1000), (300, 4096), (2048, 7, 9, 9), (4099, 8), (300, 10_000), (40_000, 32))
LARGE = [Case(storage, dtype, shapes=LARGE_SHAPES, steps=4) for storage, dtype in itertools.product(BITS, DTYPES)] + [
    Case("factored", dtype, shapes=LARGE_TILED_SHAPES, steps=4) for dtype in DTYPES
]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=str(case)) for case in COVERING]
    + [pytest.param(case, id=f"product: {case}", marks=NEEDS_GPU) for case in PRODUCT]
    + [pytest.param(case, id=f"large: {case}", marks=NEEDS_GPU) for case in LARGE],
)
def test_kernels_follow_the_reference(case: Case) -> None:
    """After every step from equal states, and after some steps on their own, both hold the same numbers."""
    options = SWITCHES[case.switch]
    finds, lora = case.switch == "rate found", case.switch == "LoRA"

    def build(backend: str) -> Automagic:
        opt = optimizer(parameters(case.shapes, DTYPES[case.dtype]), backend, case.storage, **options)
        if lora:  # the second step is the 10th, which lowers the singular values
            start_at(opt, 9)
        return opt

    grad_dtype = DTYPES[case.grad_dtype] if case.grad_dtype else None
    run = follow(build, case.steps, steady if finds else gradient, grad_dtype)
    assert run.violations(case.storage) == []
    if case.storage == "factored":
        assert {st.storage_held(state) for state in run.kernel.state.values()} == {"factored"}
    if finds:
        assert run.kernel.param_groups[0]["auto_lr_rate"] > 1.1 * 0.01, "the rate found did not move: nothing was seen"


CHANGES: dict[str, dict[str, Any]] = {
    "lr": {"lr": 0.0201},
    "weight decay": {"weight_decay": 0.101},
    "beta1": {"betas": (0.801, 0.97, 0.995)},
    "beta2": {"betas": (0.8, 0.971, 0.995)},
    "beta3": {"betas": (0.8, 0.97, 0.996)},
    "eps2": {"eps": (1e-30, 1e-3)},
    "clip_threshold": {"clip_threshold": 0.99},
    "edge_penalty": {"edge_penalty": 0.101},
    "edge_threshold": {"edge_threshold": 0.61},
    "frequency_penalty": {"frequency_penalty": 0.0501},
    "detail_preservation": {"detail_preservation": 0.801},
    "low_rank_emphasis": {"low_rank_emphasis": 1.01},
    "max_lr": {"max_lr": 0.0201},
    "warmup_steps": {"warmup_steps": 2},
    **{name: options for name, options in SWITCHES.items() if name.startswith(("no ", "not "))},
}


@pytest.fixture(scope="module")
def kernel_run() -> Iterator[list[tuple[Automagic, Automagic]]]:
    """Copies of one 32-bit LoRA run of the kernels, from before and from after each of three steps."""
    kernel = optimizer(parameters(SOME_SHAPES, torch.float32), "triton", "32bit", lora=True, low_rank_emphasis=1.0)
    moments = []
    for number in range(1, 4):
        before = copy.deepcopy(kernel)
        for index, p in enumerate(parameters_of(kernel)):
            give(p, gradient(tuple(p.shape), index, number))
        kernel.step()
        moments.append((before, copy.deepcopy(kernel)))
    return moments


def differences_to(kernel_run: list[tuple[Automagic, Automagic]], **options: Any) -> Differences:
    """What the reference, under other options, does differently from these steps of the kernels."""
    defaults = {"lora": True, "low_rank_emphasis": 1.0}
    other = optimizer(parameters(SOME_SHAPES, torch.float32), "torch", "32bit", **{**defaults, **options})
    seen = Differences()
    for number, (before, after) in enumerate(kernel_run, start=1):
        synchronise(before, other)
        for index, p in enumerate(parameters_of(other)):
            give(p, gradient(tuple(p.shape), index, number))
        other.step()
        seen.take(after, other)
    return seen


def test_the_run_that_others_are_told_from_is_the_references(kernel_run: list[tuple[Automagic, Automagic]]) -> None:
    """With the options equal nothing is found: what the next test finds is the change."""
    assert differences_to(kernel_run).violations(ONE_STEP) == []


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_option_is_told_apart(change: str, kernel_run: list[tuple[Automagic, Automagic]]) -> None:
    """Negative control: any number of the rule off by one percent, or any part left out, exceeds the tolerance."""
    assert differences_to(kernel_run, **CHANGES[change]).violations(ONE_STEP) != []


def test_another_seed_is_told_apart() -> None:
    """Negative control for stochastic rounding: other random bits change codes and a bfloat16 θ."""

    def build(backend: str) -> Automagic:
        return optimizer(parameters(SOME_SHAPES, torch.bfloat16), backend, seed=7 if backend == "torch" else 8)

    found = " ".join(follow(build, steps=2).one_step.violations(ONE_STEP))
    assert all(f"{name}: " in found for name in ("theta", "state2", "state3"))


# --- gradients of every kind ----------------------------------------------------------------------------------------

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
    """Each for more, at a stride of 8 blocks in place of 2, which are less work; tensors of less than that have one."""
    monkeypatch.setattr(st, "PROBE_STRIDE", 2)
    monkeypatch.setattr(st, "MAX_PROBED", 500)
    shapes = ((18, 128), (300,), (5, 256))
    run = follow(lambda backend: optimizer(parameters(shapes, torch.float32), backend, storage, lr=0.01, auto_lr=True))
    assert run.violations(storage) == []
    assert [len(run.kernel.state[p]["probe_sum"]) for p in parameters_of(run.kernel)] == [2, 1, 1]
    assert run.kernel._fused._plan is not None
    scales = [x for bucket in run.kernel._fused._plan.buckets for x in bucket.probe_scale]
    assert sorted(scales) == [1, 4, 4]


def test_every_sixteenth_block_is_watched() -> None:
    """The 17th block is a probe, and a short one; the 2nd is none."""
    options = {"lr": 0.01, "auto_lr": True, "came": False, "torque": False}
    run = follow(lambda backend: optimizer(parameters(((4100,),), torch.float32), backend, "32bit", **options), 1)
    assert run.violations("32bit") == []
    z = run.kernel.state[parameters_of(run.kernel)[0]]["probe_sum"]
    assert z.shape == (2, 256)
    assert (z[0] != 0).all()
    assert (z[1] != 0).sum() == 4


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


# --- options by group, by parameter, over time ------------------------------------------------------------------------


def test_groups_schedules_and_overrides_are_followed() -> None:
    """Two groups with options of their own, a parameter overridden to 32 bits, a rate and options that change."""

    def build(backend: str) -> Automagic:
        first, second, overridden, quiet = parameters(((5, 52), (300,), (7, 9), (40,)), torch.float32)
        bnb.GlobalOptimManager.get_instance().override_config(
            overridden, key_value_dict={"optim_bits": 32, "weight_decay": 0.3, "lr": 0.05}
        )
        groups = [
            {"params": [first, overridden]},
            {"params": [second, quiet], "lr": 0.004, "betas": (0.7, 0.9), "weight_decay": 0.0, "came": False},
        ]
        return optimizer(groups, backend)

    def change(opt: Automagic, number: int) -> None:
        first, second = opt.param_groups
        first["lr"] = 0.02 / number
        if number == 2:
            second["weight_decay"], second["warmup_steps"] = 0.2, 2
        elif number == 3:
            second["betas"], second["torque"], second["came"] = (0.75, 0.95, 0.99), False, True
            bnb.GlobalOptimManager.get_instance().override_config(second["params"][1], "weight_decay", 0.4)
        elif number == 4:
            first["lr"], first["clip_threshold"], first["lora"] = 0.0, 0.7, True

    run = follow(build, 4, before=change)
    assert run.violations("8bit") == []
    held = {st.storage_held(run.kernel.state[p]) for p in parameters_of(run.kernel)}
    assert held == {"8bit", "32bit"}


def test_schedule_under_a_found_rate_is_followed() -> None:
    """`lr` over the base rate scales what auto_lr finds, which each group finds for itself."""

    def build(backend: str) -> Automagic:
        first, second, third = parameters(((5, 52), (300,), (7, 9)), torch.float32)
        groups = [{"params": [first]}, {"params": [second]}, {"params": [third], "lr": 0.01}]
        return optimizer(groups, backend, "32bit", lr=None, min_lr=1e-3, max_lr=0.1)

    def schedule(opt: Automagic, number: int) -> None:
        for group in opt.param_groups:
            group["lr"] = group["base_lr"] / number

    run = follow(build, 4, steady, before=schedule)
    assert run.violations("32bit") == []
    assert [group["auto_lr"] for group in run.kernel.param_groups] == [True, True, False]


def test_group_added_later_is_followed() -> None:
    """A plan made for fewer parameters is not kept."""

    def add(opt: Automagic, number: int) -> None:
        if number == 2:
            p = parameters(((7, 9),), torch.float32)[0]
            give(p, gradient((7, 9), 9, 2))
            opt.add_param_group({"params": [p], "lr": 0.03})

    run = follow(lambda backend: optimizer(parameters(FEW_SHAPES, torch.float32), backend), 3, before=add)
    assert run.violations("8bit") == []
    assert run.kernel.state[parameters_of(run.kernel)[-1]]["step"] == 2


def test_a_tile_whose_mean_is_taken_wrong_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control for factored moments: a reference that weighs the last, short block's columns as full ones."""
    monkeypatch.setattr(
        Tiling, "counts", lambda self, device: self.by_tile(torch.ones(self.blocks, 256, device=device)).sum((1, 3))
        .view(self.tiles, self.width)
    )  # fmt: skip
    run = follow(lambda backend: optimizer(parameters(((251, 24),), torch.float32), backend, "factored"), 2)
    assert any("exp_avg_sq" in x for x in run.one_step.violations(ONE_STEP))
