"""Changing the storage: what becomes of codes, moments and means from one form to another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoint_cases import parameters_of
from hypothesis import given, settings
from hypothesis import strategies as hs
from requantization_cases import OPTIONS, SHAPES, storages, trained

from automagic_bnb import Automagic8bit, bnb, requantization, stored
from automagic_bnb import quantization as q
from automagic_bnb import state as st
from automagic_bnb.factored import Tiling
from automagic_bnb.stored import moments_of

FACTORING = ((64, 64), (256, 200), (16, 8, 4, 4))

MEANS_RTOL = 1e-5
"""Row times column means over their mean has the same row and column means, but for float32's rounding."""
EPSILON = 2.0**-23
SIGNED = bnb.code_book(True, torch.device("cpu"))
UNSIGNED = bnb.code_book(False, torch.device("cpu"))
LARGEST_GAP = float((SIGNED[1:] - SIGNED[:-1]).max())
"""Of neighbouring codes, as a share of absmax: rounding to nearest errs by half of it."""


def moment(opt: Any, p: Any, number: int) -> torch.Tensor:
    """What the rule reads, float32 [n]."""
    blocks = stored.Blocks(p)
    keep = torch.ones(blocks.blocks, q.BLOCK, dtype=torch.bool)
    return blocks.join(moments_of(opt.state[p], blocks, keep).read(number))


def mask(opt: Any, p: Any) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = stored.Blocks(p)
    k, polarity = stored.read_mask(opt.state[p], blocks)
    return blocks.join(k), blocks.join(polarity)


# ------------------------------------------------------------------------------------------------------------ the codes


def twice(codes: torch.Tensor, absmax: torch.Tensor, signed: bool) -> torch.Tensor:
    """Codes after a way through 32 bits, as `converted` takes it."""
    book = SIGNED if signed else UNSIGNED
    values = q.decode(codes, absmax, book)
    return q.encode(values, book)[0]


LAST = q.LAST_CODE


@pytest.mark.parametrize("end", [0, LAST])
def test_every_signed_code_survives_32_bits(end: int) -> None:
    """Every code beside an end code, at sizes from the smallest absmax to the largest."""
    absmax = torch.logspace(-36, 37, 500)
    codes = torch.arange(LAST + 1).expand(len(absmax), -1).to(torch.uint8).clone()
    codes[codes == LAST - end] = 127  # one end only
    assert torch.equal(twice(codes, absmax, signed=True), codes)


def test_every_unsigned_code_survives_32_bits() -> None:
    absmax = torch.logspace(-36, 37, 500)
    codes = torch.arange(LAST + 1).expand(len(absmax), -1).to(torch.uint8)
    assert torch.equal(twice(codes, absmax, signed=False), codes)


@settings(max_examples=200, deadline=None)
@given(seed=hs.integers(0, 2**32), exponent=hs.floats(-35, 37), end=hs.sampled_from([0, LAST]), dense=hs.booleans())
def test_random_blocks_keep_their_codes(seed: int, exponent: float, end: int, dense: bool) -> None:
    """Any block that `encode` can make, also one of mostly the same code, whichever ends it has."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, LAST + 1, (4, 256), generator=generator).to(torch.uint8)
    if not dense:
        codes[:, 1:] = codes[:, :1]
    codes[:, 17] = end
    absmax = 10**exponent * (1 + torch.rand(4, generator=generator))
    assert torch.equal(twice(codes, absmax, signed=True), codes)
    codes[:, 17] = LAST
    assert torch.equal(twice(codes, absmax, signed=False), codes)


def test_bitsandbytes_largest_code_takes_another_scale() -> None:
    """Negative control: a block with the code of 1, as bitsandbytes writes it, keeps its values to half a gap only."""
    codes = torch.tensor([[255, *range(200, 255)] + [127] * 200], dtype=torch.uint8)
    values = q.decode(codes, torch.ones(1), SIGNED)
    changed, absmax = q.encode(values, SIGNED)
    error = (q.decode(changed, absmax, SIGNED) - values).abs()[0] / (SIGNED[-2] - SIGNED[-3])
    assert changed[0, 0] == LAST
    assert error[0] <= 1e-5
    assert 0.4 < error.max() <= 0.51


# ---------------------------------------------------------------------------------------------------------- conversions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lr", [1e-3, None])
def test_8_to_32_to_8_bits_gives_every_byte_back(dtype: torch.dtype, lr: float | None, tools: Any) -> None:
    """Every code and mask byte is the same; absmax by at most one rounding; all else is the same tensor."""
    opt = trained(tools, "8bit", dtype=dtype, lr=lr)
    before, held = tools.snapshot(opt), [dict(opt.state[p]) for p in parameters_of(opt)]
    opt.requantize(optim_bits=32)
    assert storages(opt) == ["32bit"] * len(SHAPES)
    opt.requantize(optim_bits=8)
    after = tools.snapshot(opt)
    for old, new in zip(before["state"], after["state"], strict=True):
        assert old.keys() == new.keys()
        for name in ("absmax1", "absmax2", "absmax3"):
            assert torch.allclose(new.pop(name), old.pop(name), rtol=2 * EPSILON, atol=0)
    assert not tools.differences(before, after)
    untouched = ("tensor_stats", "torque", "edge_history", "spatial_variance")
    for p, old in zip(parameters_of(opt), held, strict=True):
        assert all(torch.equal(opt.state[p][name], old[name]) for name in untouched)
        assert all(opt.state[p][name] is old[name] for name in untouched[1:])


def test_8_to_32_bits_changes_no_value(tools: Any) -> None:
    opt = trained(tools, "8bit")
    p = parameters_of(opt)
    before = [[moment(opt, x, i) for i in (1, 2, 3)] + list(mask(opt, x)) for x in p]
    opt.requantize(optim_bits=32)
    after = [[moment(opt, x, i) for i in (1, 2, 3)] + list(mask(opt, x)) for x in p]
    assert not tools.differences(before, after)


@pytest.mark.parametrize("warm", [True, False])
def test_32_to_8_bits_goes_to_the_nearest(warm: bool, tools: Any) -> None:
    """Each moment within half a gap of its codes, k within 1/2; W is the mean of the rounded mask."""
    opt = trained(tools, "32bit", steps=6 if warm else 12)
    p = parameters_of(opt)
    before = [[moment(opt, x, i) for i in (1, 2, 3)] for x in p]
    masks, stats = [mask(opt, x) for x in p], [opt.state[x]["tensor_stats"].clone() for x in p]
    opt.requantize(optim_bits=8, factored=False, mask_bits=8)
    assert storages(opt) == ["8bit"] * len(SHAPES)
    fractional = False
    for x, moments, (k, polarity), old_stats in zip(p, before, masks, stats, strict=True):
        if x.numel() == 0:
            continue
        for number, old in enumerate(moments, start=1):
            gap = 0.5 * LARGEST_GAP * stored.Blocks(x).cut(old).abs().amax(dim=1, keepdim=True) / 0.99
            error = stored.Blocks(x).cut(moment(opt, x, number) - old).abs()
            assert (error <= gap).all()
        new_k, new_polarity = mask(opt, x)
        assert torch.equal(new_k, k.round())
        assert torch.equal(new_polarity, polarity)
        new_stats = opt.state[x]["tensor_stats"]
        assert new_stats[st.MASK_MEAN].item() == pytest.approx(torch.exp2(new_k / 16).mean().item(), rel=1e-5)
        assert torch.equal(new_stats[1:], old_stats[1:])
        fractional |= not torch.equal(k, k.round())
    assert fractional  # the rounding of k was put to the test


@pytest.mark.parametrize("held", ["8bit", "32bit"])
def test_to_factored_keeps_the_means_of_each_tile(held: str, tools: Any) -> None:
    """v and r keep the row and column sums of every tile; where nothing factors, storage is 8-bit."""
    opt = trained(tools, held)
    p = parameters_of(opt)
    before = [[moment(opt, x, i) for i in (2, 3)] for x in p]
    codes = [opt.state[x]["state1"] for x in p], [opt.state[x]["lr_mask"] for x in p]
    opt.requantize(optim_bits=8, factored=True, mask_bits=8, mean_bits=32)
    assert storages(opt) == ["factored" if shape in FACTORING else "8bit" for shape in SHAPES]
    for i, (x, moments) in enumerate(zip(p, before, strict=True)):
        if held == "8bit":
            assert opt.state[x]["state1"] is codes[0][i]
            assert opt.state[x]["lr_mask"] is codes[1][i]
        if st.storage_held(opt.state[x]) != "factored":
            continue
        tiling, blocks = Tiling.of(x), stored.Blocks(x)
        for number, old in zip((2, 3), moments, strict=True):
            new = moment(opt, x, number)
            for means in (tiling.row_means, tiling.column_means):
                assert torch.allclose(means(blocks.cut(new)), means(blocks.cut(old)), rtol=MEANS_RTOL)
            assert new.sum().item() == pytest.approx(old.sum().item(), rel=1e-3)


@pytest.mark.parametrize("target", ["8bit", "32bit"])
def test_from_factored_takes_the_estimate_over(target: str, tools: Any) -> None:
    opt = trained(tools, "factored")
    p = [x for x in parameters_of(opt) if st.storage_held(opt.state[x]) == "factored"]
    before = [[moment(opt, x, i) for i in (2, 3)] for x in p]
    opt.requantize(**OPTIONS[target])
    assert storages(opt) == [target] * len(SHAPES)
    for x, moments in zip(p, before, strict=True):
        for number, old in zip((2, 3), moments, strict=True):
            gap = 0.0 if target == "32bit" else 0.5 * LARGEST_GAP * old.max().item()
            assert ((moment(opt, x, number) - old).abs() <= gap).all()


@pytest.mark.parametrize("shape", [(64, 64), (310, 100), (513, 24), (150, 1000), (70, 16, 3, 3), (5000,)])
@pytest.mark.parametrize(("first", "second"), [("8bit", "factored"), ("factored", "32bit"), ("32bit", "8bit")])
def test_parts_are_the_same_as_the_whole(
    shape: tuple[int, ...], first: str, second: str, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Converted in the smallest parts or at once: the same bits, with low tiles that are cut by the parameter's end."""
    monkeypatch.setattr("automagic_bnb.factored.tile_height", lambda width: 2)
    p = tools.parameters(shape)[0]
    opt = Automagic8bit([p], lr=1e-3, min_8bit_size=0, **OPTIONS[first])
    tools.train(opt, [p], range(3))
    whole = requantization.converted(opt.state[p], p, second, opt.param_groups[0])
    monkeypatch.setattr(st, "CHUNK", 1)
    parts = list(requantization._parts(p, opt.state[p], whole, "factored" in (first, second)))
    assert len(parts) > 1
    assert sum(part.blocks.n for part in parts) == p.numel()
    in_parts = requantization.converted(opt.state[p], p, second, opt.param_groups[0])
    differences = tools.differences(dict(whole), dict(in_parts))
    if "32bit" in (first, second) and second != "32bit":
        differences = [d for d in differences if "tensor_stats" not in d]  # a sum in another order
        assert torch.allclose(whole["tensor_stats"], in_parts["tensor_stats"], rtol=4 * EPSILON, atol=0)
    assert not differences


def test_factored_to_32_bits_and_back_keeps_the_means(tools: Any) -> None:
    """Where every tile is whole. The row that the parameter's end cuts has no estimate that keeps its mean."""
    opt = trained(tools, "factored")
    before = tools.snapshot(opt)["state"]
    opt.requantize(optim_bits=32)
    opt.requantize(optim_bits=8)
    for p, old in zip(parameters_of(opt), before, strict=True):
        assert opt.state[p].keys() == old.keys()
        for name in st.keys_of("row", "col") & old.keys():
            assert torch.allclose(opt.state[p][name], old[name], rtol=MEANS_RTOL, atol=0)


def test_blocks_without_a_gradient_so_far(tools: Any) -> None:
    """Skipped from the start: 0 before and after, by another code. All else of the parameter keeps its codes."""
    p = tools.parameters((3, 256))[0]
    opt = Automagic8bit([p], lr=1e-3, min_8bit_size=0)
    p.grad = torch.full((3, 256), 1e-3)
    p.grad[1] = torch.nan
    opt.step()
    before = {name: opt.state[p][name].clone() for name in ("state1", "state2", "state3")}
    opt.requantize(optim_bits=32)
    assert not opt.state[p]["state1"][1].any()
    opt.requantize(optim_bits=8)
    assert not moment(opt, p, 1)[256:512].any()
    for name, codes in before.items():
        assert torch.equal(opt.state[p][name][::2], codes[::2])
