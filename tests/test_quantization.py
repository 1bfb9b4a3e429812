"""8-bit codes, stochastic rounding and random bits, against bitsandbytes and against their own definitions."""

from __future__ import annotations

import bitsandbytes.functional as bnb_functional
import pytest
import scipy.stats
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as some
from torch import Tensor

from automagic_bnb import bnb
from automagic_bnb import quantization as q
from automagic_bnb import state as st
from automagic_bnb.optimizer import Automagic8bit

CPU = torch.device("cpu")
BOOKS = {"signed": True, "unsigned": False}
SIGMAS = 5.5
"""How far, in standard errors, a mean of random draws may lie from its expectation: one in 25 million by chance."""
CHI_SQUARE_TAIL = 1e-6
"""The chance at which a chi-square test of the (fixed) random bits counts as failed."""
ULP = 2.0**-22
"""Four float32 roundings, over absmax: of the quotient, the product and the two differences."""
TABLE = 2.0**-15
"""bitsandbytes' CPU quantizer looks its code up in a table of this resolution, over absmax."""
LAST = q.LAST_CODE
WORD = 2.0**-17
"""Random fractions are odd multiples of this: the bias of a stochastic rounding, in gaps, is no more."""


def book_of(kind: str) -> Tensor:
    return bnb.code_book(BOOKS[kind], CPU)


def values_for(kind: str, blocks: int, seed: int, spread: float = 1.0) -> Tensor:
    """Blocks of normal values of every order of magnitude down to 1e-6 of the largest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(blocks, q.BLOCK, generator=generator)
    x *= 10 ** (-6 * torch.rand(blocks, q.BLOCK, generator=generator) * spread)
    return x if kind == "signed" else x.abs()


def uniform(shape: torch.Size, key: int) -> Tensor:
    return q.uniform(q.random_bits(key, shape, CPU))


def absmax_of(values: Tensor, book: Tensor) -> Tensor:
    return q.encode(values, book)[1]


def local_gap(values: Tensor, absmax: Tensor, book: Tensor) -> tuple[Tensor, Tensor]:
    """The code values below and above each value; the end value twice where a value lies beyond the end."""
    x = (values / absmax[:, None]).double()
    wide = book.double()
    lower = torch.searchsorted(wide, x, right=True) - 1
    upper = torch.searchsorted(wide, x, right=False)
    scale = absmax[:, None].double()
    return wide[lower.clamp(0, 255)] * scale, wide[upper.clamp(0, 255)] * scale


# --- nearest codes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOOKS)
@given(
    seed=some.integers(0, 2**32),
    scale=some.floats(-30, 30),
    spread=some.sampled_from([0.0, 0.3, 1.0]),
    blocks=some.integers(1, 4),
)
@settings(max_examples=40, deadline=None)
def test_nearest_code_is_off_by_half_a_gap_at_most(
    kind: str, seed: int, scale: float, spread: float, blocks: int
) -> None:
    """Decoding returns one of the two code values around a value, the nearer one, at every scale."""
    values, book = values_for(kind, blocks, seed, spread) * 10**scale, book_of(kind)
    codes, absmax = q.encode(values, book)
    low, high = local_gap(values, absmax, book)
    error = (q.decode(codes, absmax, book).double() - values).abs()
    half = torch.minimum((values - low).abs(), (high - values).abs())
    assert (error <= half + ULP * absmax[:, None]).all()
    torch.testing.assert_close(absmax * book[LAST], values.abs().amax(dim=1), rtol=2e-7, atol=0)


@pytest.mark.parametrize("kind", BOOKS)
def test_nearest_code_is_the_one_a_full_search_finds(kind: str) -> None:
    """No code value of all 256 lies nearer than the one chosen."""
    values, book = values_for(kind, 6, seed=3), book_of(kind)
    codes, absmax = q.encode(values, book)
    x = (values / absmax[:, None]).double()
    distances = (x[..., None] - book.double()).abs()
    chosen = distances.gather(-1, codes.long()[..., None])[..., 0]
    assert (chosen <= distances.amin(dim=-1) + ULP).all()
    assert (chosen < distances.sort(dim=-1).values[..., 1]).float().mean() > 0.99


@pytest.mark.parametrize("kind", BOOKS)
@pytest.mark.parametrize("n", [256, 2560, 1000, 255, 1])
def test_nearest_codes_are_bitsandbytes_within_its_table(kind: str, n: int) -> None:
    """bitsandbytes' own codes never decode nearer, and not farther than the resolution of its table.

    It divides by the largest magnitude. Cut off at the last value below 1, that gives the same absmax here.
    """
    book = book_of(kind)
    flat = values_for(kind, -(-n // 256), seed=n).view(-1)[:n]
    theirs, quant_state = bnb_functional.quantize_blockwise(flat, code=book, blocksize=256)
    last = (quant_state.absmax * book[LAST])[:, None]
    blocks = torch.nn.functional.pad(flat, (0, -n % 256)).view(-1, 256)
    codes, absmax = q.encode(blocks.clamp(-last, last), book)
    torch.testing.assert_close(absmax, quant_state.absmax, rtol=2e-7, atol=0)
    x = (flat / quant_state.absmax.repeat_interleave(256)[:n]).double()
    ours_off, theirs_off = ((book[c.view(-1)[:n].long()].double() - x).abs() for c in (codes, theirs))
    beyond = (x.abs() - book[LAST]).clamp_min(0)  # what was cut off
    assert (ours_off <= theirs_off + beyond + ULP).all()
    assert (theirs_off <= ours_off + TABLE).all()


# --- codes in general -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOOKS)
@pytest.mark.parametrize("exponent", [-119, -30, 0, 17, 126])
@pytest.mark.parametrize("stochastic", [False, True])
def test_every_code_comes_back(kind: str, exponent: int, stochastic: bool) -> None:
    """Values that are code values take their codes, whatever the random bits, and decode to themselves."""
    book = book_of(kind)
    values = (book[: LAST + 1] * 2.0**exponent)[None]
    u = uniform(values.shape, 5) if stochastic else None
    codes, absmax = q.encode(values, book, u)
    assert torch.equal(codes[0], torch.arange(LAST + 1, dtype=torch.uint8))
    torch.testing.assert_close(q.decode(codes, absmax, book), values, rtol=2e-7, atol=0)


@pytest.mark.parametrize("kind", BOOKS)
@pytest.mark.parametrize("stochastic", [False, True])
def test_codes_are_monotone(kind: str, stochastic: bool) -> None:
    """A larger value never takes a smaller code, given the same random bits."""
    values = values_for(kind, 8, seed=1).sort(dim=1).values
    u = torch.full_like(values, 0.37) if stochastic else None
    codes, _ = q.encode(values, book_of(kind), u)
    assert (codes[:, 1:] >= codes[:, :-1]).all()
    assert codes.unique().numel() > 100


@pytest.mark.parametrize("kind", BOOKS)
@pytest.mark.parametrize("stochastic", [False, True])
def test_blocks_without_size_decode_to_nothing(kind: str, stochastic: bool) -> None:
    """Zeros decode to zeros, denormals to less than the floor of absmax; nothing is NaN."""
    denormal = torch.full((1, 256), 1e-42)
    denormal[0, ::2] = 0
    values = torch.cat([torch.zeros(1, 256), denormal])
    codes, absmax = q.encode(values, book_of(kind), uniform(values.shape, 1) if stochastic else None)
    decoded = q.decode(codes, absmax, book_of(kind))
    assert (absmax == q.TINY_ABSMAX).all()
    assert (decoded[0] == 0).all()
    assert (decoded[1].abs() <= q.TINY_ABSMAX).all()


@pytest.mark.parametrize("kind", BOOKS)
@pytest.mark.parametrize("outlier", [1e6, 1e30, 3e38])
def test_outlier_keeps_its_value(kind: str, outlier: float) -> None:
    """One value far above its block comes back; the others shrink to the smallest codes, to nothing wilder."""
    values = values_for(kind, 1, seed=2, spread=0.0)
    values[0, 77] = outlier
    book = book_of(kind)
    decoded = q.decode(*q.encode(values, book, uniform(values.shape, 3)), book)
    rest = torch.arange(256) != 77
    assert float(decoded[0, 77]) == pytest.approx(outlier, rel=2e-7)
    step = float(book[128 if kind == "signed" else 1])
    assert (decoded[0, rest].abs() <= (step + 2 * values[0, rest].abs() / outlier) * 8 * outlier).all()


@pytest.mark.parametrize("kind", BOOKS)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_magnitude_comes_back(kind: str, sign: int) -> None:
    """On either side of the signed book: it begins at -0.993, as the last value below 1 is."""
    values, book = torch.full((1, 256), (sign if kind == "signed" else 1) * 3.0), book_of(kind)
    codes, absmax = q.encode(values, book, uniform(values.shape, 0))
    assert (codes == (0 if kind == "signed" and sign < 0 else LAST)).all()
    torch.testing.assert_close(q.decode(codes, absmax, book), values, rtol=2e-7, atol=0)
    assert float(book[0]) == (-float(book[LAST]) if kind == "signed" else 0)


def draws(values: Tensor, book: Tensor, stochastic: bool, count: int = 4000) -> Tensor:
    """[count, 256] decoded codes of one block, each row with random bits of its own."""
    many = values.expand(count, -1)
    u = uniform(many.shape, 11) if stochastic else None
    return q.decode(*q.encode(many, book, u), book).double()


def standard_errors_off(values: Tensor, book: Tensor, decoded: Tensor) -> Tensor:
    """How far each mean of draws lies from its value, in standard errors of a two-valued rounding."""
    low, high = local_gap(values, absmax_of(values, book), book)
    share = ((values - low) / (high - low).clamp_min(1e-300)).clamp(0, 1)
    spread = (high - low) * (share * (1 - share) / len(decoded)).sqrt() + WORD * (high - low) + ULP * 1e-3
    return ((decoded.mean(dim=0) - values) / spread)[low != high]


@pytest.mark.parametrize("kind", BOOKS)
def test_stochastic_codes_are_unbiased(kind: str) -> None:
    """The mean over many draws is the value, for every one of 256 values of all magnitudes; nearest is not."""
    values, book = values_for(kind, 1, seed=4), book_of(kind)
    off = standard_errors_off(values, book, draws(values, book, stochastic=True))
    assert off.numel() > 200
    assert off.abs().max() < SIGMAS
    nearest = standard_errors_off(values, book, draws(values, book, stochastic=False))
    assert (nearest.abs() > SIGMAS).float().mean() > 0.9


@pytest.mark.parametrize("kind", BOOKS)
def test_stochastic_code_is_one_of_the_two_neighbours(kind: str) -> None:
    """No draw leaves the gap around a value."""
    values, book = values_for(kind, 1, seed=6), book_of(kind)
    low, high = local_gap(values, absmax_of(values, book), book)
    decoded = draws(values, book, stochastic=True, count=200)
    slack = ULP * values.abs().max()
    assert ((decoded - low).abs() <= slack).logical_or((decoded - high).abs() <= slack).all()


# --- codes that a step writes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(37, 41), (300,), (7, 9), (16, 32)])
def test_bitsandbytes_decodes_what_a_step_wrote(shape: tuple[int, ...]) -> None:
    """m, v and r of an 8-bit run, decoded by bitsandbytes itself, lie within a gap of the 32-bit run's."""
    runs = {}
    for bits in (8, 32):
        p = torch.nn.Parameter(torch.zeros(shape))
        opt = Automagic8bit([p], lr=1e-3, optim_bits=bits, min_8bit_size=0)
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        opt.step()
        runs[bits] = opt.state[p]
    for number, kind in ((1, "signed"), (2, "unsigned"), (3, "unsigned")):
        codes, absmax = runs[8][f"state{number}"], runs[8][f"absmax{number}"]
        book = bnb_functional.create_dynamic_map(signed=BOOKS[kind])
        decoded = bnb_functional.dequantize_blockwise(codes, absmax=absmax, code=book, blocksize=256)
        assert decoded.shape == shape
        assert torch.equal(decoded.view(-1), ours_decoded(codes, absmax, book))
        exact = runs[32][f"state{number}"]
        padded = torch.nn.functional.pad(exact.view(-1), (0, -exact.numel() % 256)).view(-1, 256)
        low, high = (x.view(-1)[: exact.numel()].view(shape) for x in local_gap(padded, absmax, book))
        slack = ULP * exact.abs().max()
        # absmax itself is exact, so the largest value of each block has no gap but at the signed book's lower end.
        below = exact < -0.9929 * absmax.max() if number == 1 else torch.zeros(shape, dtype=torch.bool)
        assert ((decoded >= low - slack) & (decoded <= high + slack) | below).all()


def ours_decoded(codes: Tensor, absmax: Tensor, book: Tensor) -> Tensor:
    n = codes.numel()
    padded = torch.nn.functional.pad(codes.view(-1), (0, -n % 256)).view(-1, 256)
    return q.decode(padded, absmax, book).view(-1)[:n]


def test_code_books_are_bitsandbytes() -> None:
    """The state's code books are bitsandbytes' dynamic maps, shared by all parameters."""
    parameters = [torch.nn.Parameter(torch.zeros(16, 32)) for _ in range(2)]
    opt = Automagic8bit(parameters, lr=1e-3, min_8bit_size=0)
    for p in parameters:
        p.grad = torch.ones_like(p)
    opt.step()
    first, second = (opt.state[p] for p in parameters)
    for name, signed in (("qmap1", True), ("qmap2", False)):
        assert torch.equal(first[name], bnb_functional.create_dynamic_map(signed=signed))
        assert first[name].data_ptr() == second[name].data_ptr()
    assert st.storage_held(first) == "8bit"


# --- the mask's byte --------------------------------------------------------------------------------------------


def test_mask_byte_holds_every_k_and_polarity() -> None:
    """All 64 exponents with both polarities come back from their byte, each from a different one."""
    k = torch.arange(-32, 32).float().repeat_interleave(2)
    polarity = torch.tensor([False, True]).repeat(64)
    packed = q.pack_mask(k, polarity)
    assert packed.dtype == torch.uint8
    assert packed.unique().numel() == 128
    for found, expected in zip(q.unpack_mask(packed), (k, polarity), strict=True):
        assert torch.equal(found, expected)
    assert q.pack_mask(torch.zeros(1), torch.zeros(1, dtype=torch.bool)) == st.EMPTY_MASK


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
    return q.mix_in(q.parameter_key(seed, ordinal, stream), t)


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
