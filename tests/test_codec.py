"""The kernels' device functions: 8-bit codes without a search, random bits, stochastic rounding.

Held to bitsandbytes' code books and to `quantization`. Interpreted where there is no CUDA device: see `kernel_cases`.
"""

from __future__ import annotations

import bitsandbytes.functional as bnb_functional
import pytest
import torch
from kernel_cases import DEVICE, DTYPES, FEW_SHAPES, give, gradient, optimizer, parameters, parameters_of
from torch import Tensor

from automagic_bnb import quantization as q

triton = pytest.importorskip("triton", reason="the kernels need Triton")
tl = pytest.importorskip("triton.language")
codec = pytest.importorskip("automagic_bnb.kernels.codec", reason="the kernels need Triton")
lanes = pytest.importorskip("automagic_bnb.kernels.lanes", reason="the kernels need Triton")

SIGNED = {"signed": True, "unsigned": False}
BESIDE = 1e-5
"""How far from a threshold, relatively, a quotient's code is certain: scaling is good to 4 units of 2^-24."""
FRACTION = {"signed": 0.0, "unsigned": 2.0**-14}
"""And in gaps: the unsigned map's positions are held in steps of 2^-15."""
NEAR_THRESHOLD = 1e-3
"""Share of random quotients that may lie nearer than that to a threshold, and go to its other side."""


# --- the device functions as functions of tensors -----------------------------------------------------------------


@triton.jit
def encode_kernel(x_ptr, absmax_ptr, bits_ptr, cells_ptr, codes_ptr, SIGNED_MAP: tl.constexpr):
    place = tl.program_id(0) * 256 + tl.arange(0, 256)
    x, absmax = tl.load(x_ptr + place), tl.load(absmax_ptr + tl.program_id(0))
    if SIGNED_MAP:
        slopes, bins = codec.held_cells(cells_ptr), codec.held_cells(cells_ptr + 32)
        codes = codec.encode_signed(x, absmax, slopes, bins)
    else:
        slopes, bins = codec.held_cells(cells_ptr + 64), codec.held_cells(cells_ptr + 96)
        codes = codec.encode_unsigned(x, absmax, tl.load(bits_ptr + place).to(tl.uint32), slopes, bins)
    tl.store(codes_ptr + place, codes)


@triton.jit
def decode_kernel(codes_ptr, book_ptr, values_ptr):
    place = tl.arange(0, 256)
    tl.store(values_ptr + place, codec.decode(tl.load(codes_ptr + place), book_ptr))


@triton.jit
def random_kernel(key_ptr, start_ptr, bits_ptr, uniform_ptr):
    program, lanes = tl.program_id(0), tl.arange(0, 256)
    key = tl.load(key_ptr).to(tl.uint32, bitcast=True)
    bits = codec.random_bits(key, tl.load(start_ptr + program))
    tl.store(bits_ptr + program * 256 + lanes, bits.to(tl.int32))
    tl.store(uniform_ptr + program * 256 + lanes, codec.centred(bits) + 0.5)


@triton.jit
def round_kernel(x_ptr, bits_ptr, out_ptr, DTYPE: tl.constexpr):
    place = tl.program_id(0) * 256 + tl.arange(0, 256)
    bits = tl.load(bits_ptr + place).to(tl.uint32)
    tl.store(out_ptr + place, codec.round_stochastic(tl.load(x_ptr + place), bits, DTYPE))


def blocks_of(x: Tensor, fill: float = 0.0) -> Tensor:
    """[blocks, 256] of any number of elements, on the device."""
    flat = x.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % 256), value=fill).view(-1, 256).to(DEVICE)


def encode(x: Tensor, kind: str, uniform: Tensor | None = None, absmax: Tensor | None = None) -> Tensor:
    """The kernels' codes of flat float32 x, int64 on the CPU; absmax is 1 where none is given."""
    padded = blocks_of(x.float())
    bits = torch.full_like(padded, 0.5) if uniform is None else blocks_of(uniform)
    bits = (bits * 65536).int()
    absmax = torch.ones(len(padded)) if absmax is None else absmax
    codes = torch.empty(padded.shape, dtype=torch.uint8, device=DEVICE)
    cells = codec.cells(torch.device(DEVICE))
    encode_kernel[(len(padded),)](padded, absmax.to(DEVICE), bits, cells, codes, SIGNED[kind], num_warps=1)
    return codes.view(-1)[: x.numel()].long().cpu()


def random_of(key: int, starts: list[int]) -> tuple[Tensor, Tensor]:
    """The kernels' bits and uniforms of the blocks that begin at these indices."""
    bits = torch.empty(len(starts), 256, dtype=torch.int32, device=DEVICE)
    uniform = torch.empty(len(starts), 256, device=DEVICE)
    signed_key = key - (1 << 32) if key >= 1 << 31 else key
    keys, begins = torch.tensor([signed_key], dtype=torch.int32), torch.tensor(starts, dtype=torch.int64)
    random_kernel[(len(starts),)](keys.to(DEVICE), begins.to(DEVICE), bits, uniform)
    return bits.cpu(), uniform.cpu()


def rounded(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The kernels' stochastic rounding of flat float32 x by 16 bits each."""
    padded, random = blocks_of(x), blocks_of(bits.int())
    out = torch.empty(padded.shape, dtype=dtype, device=DEVICE)
    round_kernel[(len(padded),)](padded, random, out, tl.bfloat16 if dtype == torch.bfloat16 else tl.float16)
    return out.view(-1)[: x.numel()].cpu()


LAST = q.LAST_CODE


def book_of(kind: str) -> Tensor:
    """bitsandbytes' own, made here and now."""
    return bnb_functional.create_dynamic_map(signed=SIGNED[kind])


def random_values(kind: str, blocks: int, seed: int = 0) -> Tensor:
    """Flat quotients of every decade of the map, ends included."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(blocks * 256, generator=generator) * 2 - 1
    x = x * 10 ** (-7.5 * torch.rand(blocks * 256, generator=generator))
    x[:3] = torch.tensor([1.0, -1.0, 0.0])
    x *= book_of(kind)[LAST]
    return x if kind == "signed" else x.abs()


# --- codes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SIGNED)
@pytest.mark.parametrize("exponent", [-100, -30, 0, 30, 100])
def test_every_code_comes_back(kind: str, exponent: int) -> None:
    """All 256 codes decode to their values exactly; those to 254 encode to theirs, whatever the size of the block."""
    book, codes = book_of(kind), torch.arange(256)
    values = torch.empty(256, device=DEVICE)
    decode_kernel[(1,)](codes.to(torch.uint8).to(DEVICE), book.to(DEVICE), values)
    assert torch.equal(values.cpu(), book)
    absmax = torch.tensor([2.0**exponent])
    assert torch.equal(encode(book[: LAST + 1] * absmax, kind, absmax=absmax), codes[: LAST + 1])


@pytest.mark.parametrize("draw", [2.0**-14, 0.25, 0.5, 0.75, 1 - 2.0**-14])
def test_code_values_do_not_move_by_chance(draw: float) -> None:
    """What is exactly a code's value keeps its code, but for random bits as small as the rounding of y (2^-15)."""
    book = book_of("unsigned")[: LAST + 1]
    assert torch.equal(encode(book, "unsigned", torch.full(book.shape, draw)), torch.arange(LAST + 1))


@pytest.mark.parametrize("kind", SIGNED)
@pytest.mark.parametrize("side", [-1, 1], ids=["below", "above"])
def test_thresholds_lie_halfway_between_codes(kind: str, side: int) -> None:
    """Just below the middle of two values the lower is taken, just above it the upper."""
    book = book_of(kind)[: LAST + 1].double()
    middles = (book[1:] + book[:-1]) / 2
    beside = torch.maximum(BESIDE * middles.abs(), FRACTION[kind] * (book[1:] - book[:-1]))
    codes = encode(middles + side * beside, kind)
    assert torch.equal(codes, torch.arange(LAST) + (side > 0))


def test_thresholds_of_chance_lie_where_they_should() -> None:
    """A quotient a share f of the way from one value to the next goes up just where U passes 1 - f."""
    book = book_of("unsigned")[: LAST + 1].double()
    for share in (0.125, 0.5, 0.75):
        between = book[:-1] + share * (book[1:] - book[:-1])
        for side in (-1, 1):
            uniform = torch.full((LAST,), 1 - share + side * 2.0**-12)
            codes = encode(between, "unsigned", uniform)
            assert torch.equal(codes, torch.arange(LAST) + (side > 0)), (share, side)


@pytest.mark.parametrize("kind", SIGNED)
def test_random_quotients_take_the_nearest_code(kind: str) -> None:
    """As a full search finds it; only quotients within rounding of a threshold may go to its other side."""
    x = random_values(kind, blocks=64)
    # Around the decades' ends, where another line begins, though no threshold lies.
    ends = (10.0 ** torch.arange(-6, 0) * (1 + 3e-5 * torch.linspace(-1, 1, 21))[:, None]).view(-1)
    x = torch.cat([x, ends, -ends] if kind == "signed" else [x, ends])
    middles = (book_of(kind).double()[1:] + book_of(kind).double()[:-1]) / 2
    nearest = torch.searchsorted(middles, x.double(), right=True)
    codes = encode(x, kind)
    off = codes != nearest
    distance = (middles[torch.minimum(codes, nearest)[off]] - x[off]).abs()
    assert (codes - nearest).abs().max() <= 1
    assert x[off][distance > BESIDE * x[off].abs()].tolist() == [], "not within rounding of a threshold"
    assert off.float().mean() <= NEAR_THRESHOLD


@pytest.mark.parametrize("kind", SIGNED)
def test_codes_are_quantizations(kind: str) -> None:
    """With blocks of any size and the same uniforms, `quantization.encode` gives the same codes."""
    blocks = 32
    x = random_values(kind, blocks, seed=1).view(blocks, 256)
    x = x * 10 ** torch.linspace(-30, 30, blocks)[:, None]
    uniform = q.uniform(q.random_bits(123, x.shape, torch.device("cpu"))) if kind == "unsigned" else None
    expected, absmax = q.encode(x, book_of(kind), uniform)
    codes = encode(x, kind, uniform.view(-1) if uniform is not None else None, absmax)
    off = codes - expected.view(-1).long()
    assert off.abs().max() <= 1
    assert (off != 0).float().mean() <= NEAR_THRESHOLD


def test_other_uniforms_give_other_codes() -> None:
    """Negative control for the test above."""
    x = random_values("unsigned", 4)
    draws = [q.uniform(q.random_bits(key, x.shape, torch.device("cpu"))) for key in (1, 2)]
    first, second = (encode(x, "unsigned", draw) for draw in draws)
    assert (first != second).float().mean() > 0.1


@pytest.mark.parametrize("kind", SIGNED)
def test_ends_of_the_map(kind: str) -> None:
    """The largest quotients, of either sign, and zeros, however U falls but for the rounding of y."""
    last = float(book_of(kind)[LAST])
    x = torch.tensor([last, -last, 0.0, -0.0] if kind == "signed" else [last, 0.0, 1e-38])
    expected = [LAST, 0, 127, 127] if kind == "signed" else [LAST, 0, 0]
    for draw in (2.0**-14, 1 - 2.0**-14):
        assert encode(x, kind, torch.full(x.shape, draw)).tolist() == expected


@pytest.mark.parametrize("kind", SIGNED)
@pytest.mark.parametrize("draw", [0.5 / 65536, 1 - 0.5 / 65536])
def test_blocks_without_size_decode_to_nothing(kind: str, draw: float) -> None:
    """Zeros, denormal numbers and all else below the least absmax: the codes are those of `quantization`."""
    book, blocks = book_of(kind), 4
    x = random_values(kind, blocks).view(blocks, 256) * torch.tensor([[0.0], [1e-44], [1e-39], [1e-37]])
    uniform = torch.full(x.shape, draw if kind == "unsigned" else 0.5)
    expected, absmax = q.encode(x, book, uniform if kind == "unsigned" else None)
    codes = encode(x, kind, uniform.view(-1), absmax)
    assert (absmax == q.TINY_ABSMAX).all()
    assert (codes[:256] == (127 if kind == "signed" else 0)).all()
    # The device may take denormal numbers for 0, which here is less than the least code's value.
    decoded, other = (q.decode(c.view(blocks, 256), absmax, book) for c in (codes, expected))
    assert (decoded - other).abs().max() <= 2e-7 * q.TINY_ABSMAX + 2.0**-126


# --- the mask's byte --------------------------------------------------------------------------------------------------


@triton.jit
def mask_kernel(byte_ptr, positive_ptr, change_ptr, learn_ptr, bits_ptr, moved_ptr, exponent_ptr):
    place = tl.program_id(0) * 256 + tl.arange(0, 256)
    zeros = tl.zeros((32,), tl.float32)
    up, down = codec.mask_steps(zeros + tl.load(change_ptr + tl.program_id(0)), 8)
    taken = tl.where(zeros + tl.load(learn_ptr + tl.program_id(0)) != 0, 0x810000, 0)
    up, down, taken = lanes.over_block(up), lanes.over_block(down), lanes.over_block(taken)
    byte, bits = tl.load(byte_ptr + place), tl.load(bits_ptr + place).to(tl.uint32)
    moved = codec.move_mask(byte, tl.load(positive_ptr + place) != 0, up, down, taken, bits)
    tl.store(moved_ptr + place, moved)
    tl.store(exponent_ptr + place, codec.mask_exponent(byte, 0.5))


EXTREME_BITS = (0, 1, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF)


def test_the_mask_moves_as_it_should_from_every_byte() -> None:
    """Every k with either sign or none, up and down, by chance and by the most extreme bits, against the rule in
    float64: k never leaves -32..31, at whose ends it would wrap."""
    generator = torch.Generator().manual_seed(0)
    changes = torch.tensor([0.0, 0.5, 1.0, 1.5, 0.75, 1.2345678, 0.0])
    learn = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0])  # the last is past its warm-up: nothing may move
    byte = torch.arange(256)
    byte = torch.where(byte < 128, byte, byte & 254).to(torch.uint8).repeat(len(changes) * 16, 1)
    positive = torch.tensor([0, 1], dtype=torch.uint8).repeat_interleave(8).repeat(len(changes))
    positive = positive[:, None].repeat(1, 256)
    bits = torch.randint(0, 65536, byte.shape, generator=generator)
    for row, extreme in enumerate(EXTREME_BITS):
        bits[row::8] = extreme
    changes, learn = changes.repeat_interleave(16), learn.repeat_interleave(16)
    moved, exponent = torch.empty_like(byte, device=DEVICE), torch.empty(byte.shape, device=DEVICE)
    inputs = (x.to(DEVICE) for x in (byte, positive, changes, learn, bits.int()))
    mask_kernel[(len(byte),)](*inputs, moved, exponent, num_warps=1)

    k, polarity = q.unpack_mask(byte)
    change = changes.double()[:, None]
    turned = torch.where(polarity == q.NO_SIGN, 0.0, torch.where(positive == polarity, change, -change))
    clamped = (k.double() + turned).clamp(-32, 31)
    rounded = clamped.floor() + (clamped - clamped.floor() + q.uniform(bits).double() >= 1)
    expected = q.pack_mask(rounded, torch.where(learn[:, None] != 0, positive, polarity))
    assert torch.equal(moved.cpu(), expected)
    assert torch.equal(moved.cpu()[learn == 0], byte[learn == 0])
    assert torch.equal(exponent.cpu(), k / 16 + 0.5)
    assert (clamped != k + turned).any()  # or the ends went untested


# --- random bits ------------------------------------------------------------------------------------------------------


def plain_bits(key: int, index: int) -> int:
    """The rule in plain integers: neighbours share a mixed word, the even one takes the lower half."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        return x ^ (x >> 16)

    pair = index // 2
    word = mix((pair & 0xFFFFFFFF) ^ key ^ mix(pair >> 32))
    return word >> 16 if index % 2 else word & 0xFFFF


@pytest.mark.parametrize("key", [0, 1, 0x7FFFFFFF, 0x80000000, 0xDEADBEEF, 0xFFFFFFFF])
def test_random_bits_are_quantizations(key: int) -> None:
    """The same bits and uniforms for each flat index, the uniforms exact."""
    bits, uniform = random_of(key, [0, 256, 512])
    expected = q.random_bits(key, torch.Size([768]), torch.device("cpu"))
    assert torch.equal(bits.view(-1).long(), expected)
    assert torch.equal(uniform.view(-1), q.uniform(expected))


@pytest.mark.parametrize("start", [2**20, 2**31 - 256, 2**31, 2**33 - 256, 2**33, 2**33 + 256, 2**40])
def test_random_bits_of_far_elements(start: int) -> None:
    """Beyond 32 bits of elements, and of pairs, every index still has bits of its own."""
    bits, _ = random_of(0x12345678, [start])
    assert bits.view(-1).tolist() == [plain_bits(0x12345678, start + i) for i in range(256)]
    assert bits.view(-1).tolist() != random_of(0x12345678, [start - 2**20])[0].view(-1).tolist()


# --- stochastic rounding of parameters --------------------------------------------------------------------------------

NARROW = {name: dtype for name, dtype in DTYPES.items() if dtype != torch.float32}


def values_to_round(dtype: torch.dtype) -> Tensor:
    """float32 of every magnitude the dtype holds, subnormal ones included, and exact ones among them."""
    info = torch.finfo(dtype)
    generator = torch.Generator().manual_seed(3)
    low, high = (-26.0, 15.9) if dtype == torch.float16 else (-126.0, 127.9)
    exponents = low + (high - low) * torch.rand(4000, generator=generator)
    x = torch.exp2(exponents) * torch.sign(torch.randn(4000, generator=generator))
    exact = torch.tensor([0.0, 1.0, -1.5, info.tiny, -info.tiny, info.max, -info.max, info.smallest_normal])
    between = torch.tensor([info.tiny * (1 + info.eps / 3), info.tiny * (1 - info.eps / 3)])
    return torch.cat([x, exact, between])


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("key", [5, 6])
def test_parameters_are_rounded_as_quantization_rounds(name: str, key: int) -> None:
    """The same number by the same bits, for all the dtype holds: normal, subnormal, exact."""
    dtype, x = NARROW[name], values_to_round(NARROW[name])
    bits = q.random_bits(key, x.shape, torch.device("cpu"))
    assert torch.equal(rounded(x, bits, dtype), q.round_to(x, dtype, q.uniform(bits)))


@pytest.mark.parametrize("name", NARROW)
def test_other_bits_round_to_the_other_neighbour(name: str) -> None:
    """Negative control for the test above: the lowest and the highest bits bracket the value, 0 aside."""
    dtype, x = NARROW[name], values_to_round(NARROW[name])[:4000]
    down, up = (rounded(x, torch.full(x.shape, bits), dtype).float() for bits in (0, 65535))
    assert (down.abs() <= x.abs()).all()
    assert (up.abs() >= x.abs()).all()
    assert (down != up).float().mean() > 0.9


@pytest.mark.parametrize("bits", [0, 32768, 65535])
def test_float16_saturates(bits: int) -> None:
    """Beyond the largest float16 lies nothing, not infinity."""
    x = torch.tensor([65504.0, 65519.0, 65535.0, 65536.0, 1e6, 3e38])
    x = torch.cat([x, -x])
    ours = rounded(x, torch.full(x.shape, bits), torch.float16)
    assert torch.equal(ours.float(), x.clamp(-65504, 65504))


@pytest.mark.parametrize("bits", [0, 32768, 65535])
@pytest.mark.parametrize("name", NARROW)
def test_exact_values_never_move(name: str, bits: int) -> None:
    """A number that the dtype holds is kept whatever the bits."""
    x = values_to_round(NARROW[name]).to(NARROW[name]).float()
    assert torch.equal(rounded(x, torch.full(x.shape, bits), NARROW[name]).float(), x)


# --- states that a step wrote -----------------------------------------------------------------------------------------


def test_bitsandbytes_decodes_what_the_kernels_wrote() -> None:
    """m, v and r of an 8-bit step, decoded by bitsandbytes itself, lie within a gap of the 32-bit step's."""
    opts = {s: optimizer(parameters(FEW_SHAPES, torch.float32), "triton", s) for s in ("8bit", "32bit")}
    for opt in opts.values():
        for index, p in enumerate(parameters_of(opt)):
            give(p, gradient(tuple(p.shape), index, 1))
        opt.step()
    for p, exact in zip(parameters_of(opts["8bit"]), parameters_of(opts["32bit"]), strict=True):
        state, wanted = opts["8bit"].state[p], opts["32bit"].state[exact]
        for number, kind in ((1, "signed"), (2, "unsigned"), (3, "unsigned")):
            codes, absmax = state[f"state{number}"].cpu(), state[f"absmax{number}"].cpu()
            book = book_of(kind)
            decoded = bnb_functional.dequantize_blockwise(codes, absmax=absmax, code=book, blocksize=256)
            value = wanted[f"state{number}"].cpu()
            scale = absmax.repeat_interleave(256)[: value.numel()].view(value.shape)
            # To nearest half a gap, stochastically a whole one, of those around the value.
            upper = torch.searchsorted(book, value / scale).clamp(1, 255)
            gap = (book[upper] - book[upper - 1]) * scale
            allowed = gap * (0.5 if kind == "signed" else 1.0) + 1e-6 * scale
            assert ((decoded - value).abs() <= allowed).all()
