"""Stochastic rounding, its random bits, and weights of 24 bits."""

from __future__ import annotations

import pytest
import scipy.stats
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as some
from quantization_cases import CPU, WORD, uniform, values_for
from torch import Tensor

from automagic_bnb import quantization as q

CHI_SQUARE_TAIL = 1e-6
"""The chance at which a chi-square test of the (fixed) random bits counts as failed."""


# --- rounding of parameters -------------------------------------------------------------------------------------

NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def neighbours(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The narrow numbers next to x towards 0 and away from it, found through the bit patterns of x rounded."""
    nearest = x.to(dtype)
    beyond = (nearest.double().abs() > x.double().abs()).to(torch.int16)
    inner = nearest.view(torch.int16) - beyond
    return inner.view(dtype), (inner + 1).view(dtype)


@pytest.mark.parametrize("name", NARROW)
@given(seed=some.integers(0, 2**32), exponent=some.integers(-45, 38), key=some.integers(0, 2**32 - 1))
@example(seed=0, exponent=-7, key=0)
@example(seed=0, exponent=-40, key=0)
@example(seed=0, exponent=4, key=0)
@settings(max_examples=60, deadline=None)
def test_rounding_lands_on_a_neighbour(name: str, seed: int, exponent: int, key: int) -> None:
    """Each value goes to one of the two numbers around it, subnormal ones included; a narrow number stays."""
    dtype = NARROW[name]
    x = torch.randn(512, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3).double() * 10.0**exponent
    x = x.float()
    x = x[x.abs() <= torch.finfo(dtype).max]
    u = uniform(x.shape, key)
    rounded = q.round_to(x, dtype, u)
    inner, outer = neighbours(x, dtype)
    assert rounded.dtype == dtype
    assert ((rounded == inner) | (rounded == outer)).all()
    assert torch.equal(q.round_to(-x, dtype, u), -rounded)
    assert torch.equal(q.round_to(rounded.float(), dtype, u), rounded)


@pytest.mark.parametrize("name", NARROW)
@given(
    x=some.floats(-(2.0**14), 2.0**14, width=32)
    | some.floats(-(2.0**-13), 2.0**-13, width=32)
    | some.floats(-(2.0**-126), 2.0**-126, width=32)
)
@example(x=1 + 2**-20)
@example(x=-(2.0**-24) * 1.3)
@example(x=2.0**-133 * 1.7)
@example(x=0.0)
@settings(max_examples=60, deadline=None)
def test_rounding_is_unbiased(name: str, x: float) -> None:
    """Over all 65536 random fractions the mean is the value, to within half a fraction of the gap."""
    dtype = NARROW[name]
    u = (torch.arange(65536) + 0.5) / 65536
    rounded = q.round_to(torch.full_like(u, x), dtype, u).double()
    inner, outer = (n.double().item() for n in neighbours(torch.tensor([x]), dtype))
    assert abs(rounded.mean().item() - x) <= WORD * abs(outer - inner)


@pytest.mark.parametrize("name", NARROW)
def test_rounding_check_tells_nearest_from_unbiased(name: str) -> None:
    """Negative control: rounding to nearest fails the test of bias by far."""
    dtype = NARROW[name]
    x = torch.tensor([1 + 2.0**-13])
    inner, outer = (n.double() for n in neighbours(x, dtype))
    assert (q.round_to(x, dtype, None).double() - x).abs() > 1000 * WORD * (outer - inner)


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("stochastic", [False, True])
def test_rounding_saturates(name: str, stochastic: bool) -> None:
    """A value beyond the largest number becomes that number, never infinite."""
    dtype = NARROW[name]
    largest = torch.finfo(dtype).max
    x = torch.tensor([largest * 1.002, -largest * 1.002, 3.4e38, largest])
    rounded = q.round_to(x, dtype, uniform(x.shape, 0) if stochastic else None)
    assert torch.equal(rounded.float(), torch.tensor([largest, -largest, largest, largest]))


def test_float32_is_not_rounded() -> None:
    """A float32 parameter takes the very value; without random bits the narrow types take torch's nearest."""
    x = values_for("signed", 4, seed=0)
    assert torch.equal(q.round_to(x, torch.float32, uniform(x.shape, 0)), x)
    for dtype in NARROW.values():
        assert torch.equal(q.round_to(x, dtype, None), x.to(dtype))


# --- random bits ------------------------------------------------------------------------------------------------


def key_of(seed: int, ordinal: int, t: int, stream: int) -> int:
    return q.mix_in(q.mix_in(q.parameter_key(seed, ordinal), stream), t)


def keys() -> list[int]:
    """Keys of neighbouring steps and ordinals, as an optimizer makes them, and the two simplest words."""
    return [key_of(0, ordinal, t, 0) for ordinal in (0, 1) for t in (1, 2, 3)] + [0, 1]


def halves(key: int, n: int = 1 << 16) -> list[Tensor]:
    """The uniforms of even and of odd indices: the two halves of each word."""
    u = uniform(torch.Size([2 * n]), key)
    return [u[::2], u[1::2]]


def chance(cells: Tensor, count: int) -> float:
    """The chance of so uneven counts over `count` equally likely cells."""
    return float(scipy.stats.chisquare(torch.bincount(cells, minlength=count).numpy()).pvalue)


@pytest.mark.parametrize("key", keys())
def test_random_fractions_are_uniform(key: int) -> None:
    """Both halves fill 256 equal cells evenly, and stay inside (0, 1)."""
    for u in halves(key):
        assert chance((u * 256).long(), 256) > CHI_SQUARE_TAIL
        assert u.min() > 0
        assert u.max() < 1


def pairs_to_test(key: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of fractions that must not tell anything of each other."""
    mine, other = halves(key), halves(key + 1)
    found = {f"halves {i} and {j}": (mine[i], mine[j]) for i in range(2) for j in range(i)}
    found |= {f"neighbours of half {i}": (mine[i][:-1], mine[i][1:]) for i in range(2)}
    found |= {f"a row apart in half {i}": (mine[i][:-256], mine[i][256:]) for i in range(2)}
    return found | {f"key and the next, half {i}": (mine[i], other[i]) for i in range(2)}


@pytest.mark.parametrize("key", keys())
def test_random_fractions_are_independent(key: int) -> None:
    """Fractions of one index, of neighbouring indices and of neighbouring keys fill 16 × 16 cells evenly."""
    for what, (a, b) in pairs_to_test(key).items():
        assert chance((a * 16).long() * 16 + (b * 16).long(), 256) > CHI_SQUARE_TAIL, what


def test_chi_square_can_fail() -> None:
    """Negative control: a counter, and a fraction beside itself, are not taken for random."""
    counter = (torch.arange(1 << 16) * 3) % 100
    assert chance((counter / 100 * 256).long(), 256) < CHI_SQUARE_TAIL
    u = halves(0)[0]
    assert chance((u * 16).long() * 16 + (u * 16).long(), 256) < CHI_SQUARE_TAIL


def test_random_bits_depend_on_key_and_index_alone() -> None:
    """The shape does not matter, nor torch's generator, and the generator is left alone."""
    flat = q.random_bits(99, torch.Size([600]), CPU)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    square = q.random_bits(99, torch.Size([20, 30]), CPU)
    longer = q.random_bits(99, torch.Size([1001]), CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(flat, square.view(-1))
    assert torch.equal(flat, longer[:600])
    assert flat.min() >= 0
    assert flat.max() < 2**16
    assert (flat != q.random_bits(100, torch.Size([600]), CPU)).float().mean() > 0.99


def test_keys_differ_by_every_word() -> None:
    """Seed (up to 63 bits), ordinal, step and stream each make another key; their order matters."""
    base = (3, 1, 4, 0)
    others = [(4, 1, 4, 0), (3 + 2**40, 1, 4, 0), (3, 2, 4, 0), (3, 1, 5, 0), (3, 1, 4, 1), (1, 3, 4, 0)]
    assert len({key_of(*words) for words in [base, *others]}) == 7
    many = {key_of(0, ordinal, t, 0) for ordinal in range(100) for t in range(100)}
    # Among 10,000 random 32-bit words 0.01 pairs are expected to agree.
    assert len(many) >= 9998
    assert all(0 <= key < 2**32 for key in many)


# --- 24-bit weights ---------------------------------------------------------------------------------------------------


def finite_floats(n: int = 4096) -> Tensor:
    """float32 of every exponent and both signs, zeros and denormals among them."""
    bits = torch.randint(-(2**31), 2**31, (n,), generator=torch.Generator().manual_seed(3)).int()
    values = bits.view(torch.float32)
    values = torch.where(values.abs() < 3.3e38, values, 1.0)
    values[:6] = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1.0, -1.0])
    return values


def test_bfloat16_with_residual_holds_24_bits() -> None:
    """The upper part is the nearest bfloat16, and both together are within half a unit of the 17th bit."""
    values = finite_floats()
    upper, residual = q.split_master(values, None)
    back = q.join_master(upper, residual)
    spacing = torch.ldexp(torch.ones(()), values.abs().clamp_min(2.0**-126).log2().floor().int() - 15)
    assert ((back - values).abs() <= 0.5 * spacing).all()
    assert ((upper.float() - values).abs() <= (values.bfloat16().float() - values).abs() * (1 + 2**-7)).all()
    # The control, without the residual, is not.
    assert ((upper.float() - values).abs() > 0.5 * spacing).float().mean() > 0.9


def test_what_has_been_split_splits_the_same_again() -> None:
    """With any random bits: a weight that nothing moves does not wander."""
    values = q.join_master(*q.split_master(finite_floats(), None))
    for bits in (None, torch.full(values.shape, 0xFFFF), torch.zeros(values.shape, dtype=torch.long)):
        assert torch.equal(q.join_master(*q.split_master(values, bits)), values)


def test_24_bit_rounding_is_unbiased() -> None:
    """Over many random bits the mean is the value, to a hundredth of the spacing."""
    values = torch.tensor([1.0 + 2**-18, -3.0 - 2**-15 / 3, 0.7]).repeat(100_000, 1)
    bits = q.random_bits(5, values.shape, values.device)
    mean = q.join_master(*q.split_master(values, bits)).double().mean(dim=0)
    spacing = torch.tensor([2.0**-15, 2.0**-14, 2.0**-16])
    assert ((mean - values[0].double()) / spacing).abs().max() < 0.01
