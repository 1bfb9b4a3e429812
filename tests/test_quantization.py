"""8-bit codes, against bitsandbytes and against their own definitions."""

from __future__ import annotations

import bitsandbytes.functional as bnb_functional
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from quantization_cases import CPU, WORD, uniform, values_for
from torch import Tensor

from automagic_bnb import bnb
from automagic_bnb import quantization as q
from automagic_bnb import state as st
from automagic_bnb.optimizer import Automagic8bit

BOOKS = {"signed": True, "unsigned": False}
SIGMAS = 5.5
"""How far, in standard errors, a mean of random draws may lie from its expectation: one in 25 million by chance."""
ULP = 2.0**-22
"""Four float32 roundings, over absmax: of the quotient, the product and the two differences."""
TABLE = 2.0**-15
"""bitsandbytes' CPU quantizer looks its code up in a table of this resolution, over absmax."""
LAST = q.LAST_CODE


def book_of(kind: str) -> Tensor:
    return bnb.code_book(BOOKS[kind], CPU).clone()  # below 0.46, bitsandbytes writes into what it is given


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
        opt = Automagic8bit([p], lr=1e-3, optim_bits=bits, min_8bit_size=0, factored=False)
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
    opt = Automagic8bit(parameters, lr=1e-3, min_8bit_size=0, factored=False)
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
    """All 64 exponents with either sign and with none come back from their byte, each from a different one."""
    k = torch.arange(-32, 32).float().repeat_interleave(3)
    polarity = torch.tensor([0, 1, q.NO_SIGN], dtype=torch.uint8).repeat(64)
    packed = q.pack_mask(k, polarity)
    assert packed.dtype == torch.uint8
    assert packed.unique().numel() == 192
    for found, expected in zip(q.unpack_mask(packed), (k, polarity), strict=True):
        assert torch.equal(found, expected)
    assert q.pack_mask(torch.zeros(1), torch.tensor([q.NO_SIGN])) == q.EMPTY_MASK
