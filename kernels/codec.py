"""Device functions: bitsandbytes' 8-bit codes without searching the code book, random bits, stochastic rounding.

bitsandbytes' dynamic maps cut (0, 1] into seven decades; decade d = 0..6 ends at 10^(d-6) and holds b = F·2^d evenly
spaced values, F = 1 in the signed map (of magnitudes) and F = 2 in the unsigned one. Numbering the magnitudes upwards,
those of decade d get the indices b .. 2b-1, so that within a decade the position of a magnitude a among them is linear,

    y = (a · 10^(6-d) + 0.8) · b / 0.9 - 1/2,

with y = j exactly at value j. Rounding to nearest is floor(y + 1/2) and stochastic rounding floor(y + U).

From one decade to the next the line becomes flatter, by 3 over the gap between them and by 5 behind it, and so it does
behind the first value. So y is the least of the lines that meet near a, and the exponent of a tells which these are:
between two powers of 2, scaled so that the first value is a power of 2, no more than one decade ends. There are 32 such
`cells`, of which each thread of a warp holds one. Only 1 itself lies on a steeper line: no quotient reaches it, see
`automagic_bnb.quantization`. (Rounding may lift the largest of a block there, by chance of 2^-15 at most.)
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton
import triton.language as tl
from automagic_bnb.kernels import lanes
from automagic_bnb.kernels.tables import upload

from automagic_bnb import quantization as q
from automagic_bnb import reference, stored

_TINY_ABSMAX = tl.constexpr(q.TINY_ABSMAX)
TINY = tl.constexpr(q.FLOAT_TINY)  # above the least normal float32: Triton makes a smaller literal a double

# 1.5 · 2^23: adding it leaves a float32's nearest whole number in the low bits, without a conversion instruction.
_MAGIC = tl.constexpr(12582912.0)
MAX_FLOAT16 = tl.constexpr(65504.0)

# k takes six bits, as k - K_MIN; as the fraction of a number from 1 to 2 it counts 1/64, of which octaves are these.
_SPAN = tl.constexpr((reference.K_MAX - reference.K_MIN + 1) / reference.OCTAVE)
_SHIFT = tl.constexpr(_SPAN.value - reference.K_MIN / reference.OCTAVE)
_HIGHEST = tl.constexpr(int(reference.K_MAX - reference.K_MIN) << 17)
# In four bits it takes three, as one of eight; again a fraction from 1 to 2, which counts 1/8.
_PAIR_SPAN = tl.constexpr(8 * q.PAIR_SPACING / reference.OCTAVE)
_PAIR_SHIFT = tl.constexpr(_PAIR_SPAN.value - reference.K_MIN / reference.OCTAVE)
_PAIR_HIGHEST = tl.constexpr(int((stored.highest_exponent(q.PAIR_SPACING) - reference.K_MIN) / q.PAIR_SPACING) << 17)
_PAIR_STEP = tl.constexpr(1 / q.PAIR_SPACING)


def _first(factor: int) -> float:
    """The first value of decade 0."""
    return (0.1 + 0.45 / factor) * 1e-6


def _last(factor: int) -> float:
    """The last value below 1."""
    return 1 - 0.45 / (factor * 64)


_LEAST = 2.0**-21  # what the first value is scaled to: as many octaves below 1 as the seven decades need
_SCALE_SIGNED, _SCALE_UNSIGNED = tl.constexpr(_LEAST / _first(1)), tl.constexpr(_LEAST / _first(2))
_PER_LAST_SIGNED, _PER_LAST_UNSIGNED = tl.constexpr(1 / _last(1)), tl.constexpr(1 / _last(2))
_RAISED = tl.constexpr(255.0)
"""By which y of the unsigned map is. Its codes begin at y = 1; between 256 and 512 a float32 is a whole number of
2^-15."""


@triton.jit
def log2(x):
    """One instruction, for normal x; tl.log2 would be some twenty."""
    if lanes.PTX:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.log2(x)


@triton.jit
def reciprocal(x):
    """1 / x for 2^-126 <= |x| <= 2^126, to 2 ulp, in one instruction."""
    if lanes.PTX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return 1 / x


@functools.cache
def cells(device: torch.device) -> torch.Tensor:
    """float32 [4, 32], by exponent of a scaled magnitude, from 2^-31 up: slope and b of each map, signed first.

    The slope is that of the decade before; b of the unsigned map is raised as its y is.
    """
    return upload(np.array([*_cells_of(1, 0.0), *_cells_of(2, _RAISED.value)], dtype=np.float32), device)


def _cells_of(factor: int, raised: float) -> tuple[list[float], list[float]]:
    first = _first(factor)
    scale = _LEAST / first
    slopes, bins = [], []
    for exponent in range(-31, 1):
        if 2.0**exponent < _LEAST:  # one of the lines is that from 0 to the first value: the steepest, or the second
            slope, b = (1 / first, 27 / 8) if factor == 2 else (3 / first, 45 / 44)
        else:
            end = min(2.0 ** (exponent + 1) / scale, _last(factor))
            d = next(d for d in range(7) if 10.0 ** (d - 6) * (1 - 0.45 / (factor * 2**d)) >= end * (1 - 1e-9))
            b = factor * 2.0**d
            slope = 5 * b * 10.0 ** (6 - d) / 0.9
        slopes.append(slope / scale)
        bins.append(b + raised)
    return slopes, bins


@triton.jit
def held_cells(ptr):
    """A row of `cells` as the encoding takes it: one in each thread, or a pointer to the row."""
    if lanes.PTX:
        return lanes.over_block(tl.load(ptr + tl.arange(0, 32)))
    else:
        return ptr


@triton.jit
def _cell(row, magnitude):
    """What a row of `held_cells` has of scaled magnitudes >= 2^-31."""
    exponent = magnitude.to(tl.int32, bitcast=True) >> 23
    if lanes.PTX:
        return lanes.exchange(row, exponent)
    else:
        return tl.load(row + (exponent & 31))


@triton.jit
def widen(x):
    """float32 of what is loaded of parameters or gradients; of two bfloat16, each is one instruction."""
    if lanes.PTX and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [x], tl.float32, True, 2
        )
    else:
        return x.to(tl.float32)


@triton.jit
def _upper_halves(words):
    """bfloat16 of the bits 16 to 31 of uint32 words."""
    if lanes.PTX:
        return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [words], tl.bfloat16, True, 2)
    else:
        return (words >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _third_bytes(words):
    """uint8 of the bits 16 to 23 of uint32 words."""
    if lanes.PTX:
        return tl.inline_asm_elementwise(
            "{.reg .b32 a, b; prmt.b32 a, $1, $2, 0x62; prmt.b32 b, $3, $4, 0x62; prmt.b32 $0, a, b, 0x5410;}",
            "=r,r,r,r,r", [words], tl.uint8, True, 4,
        )  # fmt: skip
    else:
        return (words >> 16).to(tl.uint8)


@triton.jit
def decode(codes, book_ptr):
    """float32 code-book values of uint8 codes; the book is 1 KB and stays in the first-level cache."""
    return tl.load(book_ptr + codes.to(tl.int32))


@triton.jit
def _position(scaled, magnitude, slopes, bins, RAISED: tl.constexpr):
    """y of scaled quotients, raised as the bins are: linear between any two neighbouring values.

    (But in the signed map near 0, where it goes to -0.04: what it rounds to is right.)
    magnitude: `scaled`, but at least 2^-31.
    """
    slope, b = _cell(slopes, magnitude), _cell(bins, magnitude)
    # From b on: in the decade before, between the two, and in this one.
    before = scaled * slope + (b * (-5 / 9) + (RAISED * (5 / 9) - 0.5))
    between, after = before * (1 / 3) - 2 / 3, before * 0.2 - 0.4
    return b + tl.minimum(tl.minimum(before, between), after)


@triton.jit
def absmax_of(x, SIGNED: tl.constexpr):
    """The absmax of a block, float32: its largest magnitude takes the last value below 1."""
    # The bits of numbers >= 0 are in their order, and whole numbers are compared over a warp in one instruction.
    largest = tl.max((tl.abs(x) if SIGNED else x).to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)
    return tl.maximum(largest * (_PER_LAST_SIGNED if SIGNED else _PER_LAST_UNSIGNED), _TINY_ABSMAX)


@triton.jit
def encode_signed(x, absmax, slopes, bins):
    """uint8 codes of float32 x in the signed map under its block's `absmax_of`, to nearest."""
    scaled = x * (reciprocal(absmax) * _SCALE_SIGNED)
    magnitude = tl.maximum(tl.abs(scaled), 2.0**-31)
    y = _position(magnitude, magnitude, slopes, bins, 0.0)
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    signed = (y.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return (signed + (_MAGIC + 127)).to(tl.int32, bitcast=True).to(tl.uint8)


@triton.jit
def encode_unsigned(x, absmax, random, slopes, bins):
    """uint8 codes of float32 x >= 0 in the unsigned map under its block's `absmax_of`, by 16 random bits."""
    scaled = x * (reciprocal(absmax) * _SCALE_UNSIGNED)
    y = _position(scaled, tl.maximum(scaled, 2.0**-31), slopes, bins, _RAISED)
    return _third_bytes((y.to(tl.uint32, bitcast=True) << 1) + random)


@triton.jit
def mask_exponent(byte, shift):
    """k / 16 + shift, float32, of the uint8 of k and π."""
    if lanes.PTX:
        fraction = tl.inline_asm_elementwise(
            "{.reg .b32 a; lop3.b32 a, $4, 0x7e7e7e7e, 0x80808080, 0xea; prmt.b32 $0, a, 0x3f000000, 0x7044;"
            " prmt.b32 $1, a, 0x3f000000, 0x7144; prmt.b32 $2, a, 0x3f000000, 0x7244;"
            " prmt.b32 $3, a, 0x3f000000, 0x7344;}",
            "=f,=f,=f,=f,r", [byte], tl.float32, True, 4,
        )  # fmt: skip
    else:
        fraction = (((byte.to(tl.uint32) & 0x7E) << 16) | 0x3F800000).to(tl.float32, bitcast=True)
    return fraction * _SPAN + (shift - _SHIFT)


@triton.jit
def unpack_pairs(pairs):
    """int32 [256] of uint8 [128]: each element's four bits of k and π."""
    pairs = pairs.to(tl.int32)
    return tl.reshape(tl.join(pairs & 15, pairs >> 4), (256,))


@triton.jit
def pack_pairs(halves):
    """uint8 [128] of `unpack_pairs`'s."""
    low, high = tl.split(tl.reshape(halves, (128, 2)))
    return (low | (high << 4)).to(tl.uint8)


@triton.jit
def pair_exponent(half, shift):
    """k / 16 + shift, float32, of the four bits of k and π."""
    fraction = (((half & 14) << 19) | 0x3F800000).to(tl.float32, bitcast=True)
    return fraction * _PAIR_SPAN + (shift - _PAIR_SHIFT)


@triton.jit
def mask_steps(change, MASK: tl.constexpr):
    """`change` of k, upwards and downwards, int32 in units of 2^-17 of its spacing, as the 16 random bits count it."""
    if MASK == 4:
        change = change * _PAIR_STEP
    return tl.floor(change * 65536 + 0.5).to(tl.int32) << 1, tl.floor(0.5 - change * 65536).to(tl.int32) << 1


@triton.jit
def move_mask(byte, positive, up, down, taken, random):
    """The uint8 of k and π after a step: k moves `up` or `down`, rounded by 16 random bits, and π is `positive`.

    taken: 0x810000; or 0 where, with up and down 0, nothing is to move.
    """
    placed = byte.to(tl.int32) << 16
    polarity = tl.where(positive, 0x10000, 0)
    moved = _moved_mask(placed, polarity, up, down, taken, random, _HIGHEST)
    return _third_bytes(moved.to(tl.uint32, bitcast=True))


@triton.jit
def move_half(half, positive, up, down, taken, random):
    """`move_mask` of the four bits of k and π, int32; that there was no sign yet is not among them."""
    polarity = tl.where(positive, 0x10000, 0)
    return _moved_mask(half << 16, polarity, up, down, taken, random, _PAIR_HIGHEST) >> 16


@triton.jit
def _moved_mask(placed, polarity, up, down, taken, random, HIGHEST: tl.constexpr):
    """What `placed` becomes: k over its spacing in units of 2^-17, with π below it.

    Bit 23 says that there was no sign yet: then k stays.
    """
    turned = tl.where(((placed ^ polarity) & 0x10000) == 0, up, down)
    moved = (placed & 0x7E0000) + tl.where((placed & 0x800000) == 0, turned, 0)
    moved = tl.minimum(tl.maximum(moved, 0), HIGHEST) + (random.to(tl.int32) << 1)
    return ((moved & 0x7E0000) | (polarity & taken)) | (placed & (0x810000 - taken))


@triton.jit
def mix(x):
    """A bijection of uint32 words; see `quantization._mix`."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_bits(key, start):
    """16 random bits, in uint32, for each flat index of the block at start (int64, a multiple of 256), uint32 [256].

    Two neighbouring elements share a word. Equals `quantization.random_bits`.
    """
    pair = (start >> 1) + tl.arange(0, 128)
    word = mix(pair.to(tl.uint32) ^ (key ^ mix((pair >> 32).to(tl.uint32))))
    return tl.reshape(tl.join(word & 0xFFFF, word >> 16), (256,))


@triton.jit
def random_at(key, index):
    """`random_bits` of single flat indices, int64."""
    pair = index >> 1
    word = mix(pair.to(tl.uint32) ^ (key ^ mix((pair >> 32).to(tl.uint32))))
    return tl.where((index & 1) == 0, word & 0xFFFF, word >> 16)


@triton.jit
def round_mean(x, key, index, DTYPE: tl.constexpr):
    """float32 x in DTYPE, float32 or bfloat16: there by the random bits of an element, its flat index."""
    if tl.bfloat16 == DTYPE:
        return (
            ((x.to(tl.uint32, bitcast=True) + random_at(key, index)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        )
    else:
        return x


@triton.jit
def centred(bits):
    """U - 1/2 of 16 random bits, through the mantissa of a number in [1, 2)."""
    return ((bits << 7) | 0x3F800000).to(tl.float32, bitcast=True) - (1.5 - 0.5 / 65536)


@triton.jit
def round_stochastic(x, random, DTYPE: tl.constexpr):
    """float32 x in DTYPE (bfloat16 or float16) by 16 random bits; equals `quantization.round_to`."""
    bits = x.to(tl.uint32, bitcast=True)
    if tl.bfloat16 == DTYPE:
        # The bits below bfloat16's are a fraction of its spacing; carrying over is rounding up.
        return _upper_halves(bits + random)
    else:
        exponent = tl.maximum((bits >> 23) & 0xFF, 113)  # 2^-14, below which float16 is evenly spaced
        spacing = ((exponent - 10) << 23).to(tl.float32, bitcast=True)
        inverse = ((264 - exponent) << 23).to(tl.float32, bitcast=True)
        steps = tl.abs(x) * inverse
        down = tl.floor(steps)
        magnitude = (down + tl.where(steps - down + centred(random) >= 0.5, 1.0, 0.0)) * spacing
        magnitude = tl.minimum(magnitude, MAX_FLOAT16)
        return tl.where(x < 0, -magnitude, magnitude).to(tl.float16)


@triton.jit
def join_master(narrow, residual):
    """float32 of bfloat16 values and the int8 bits below them; equals `quantization.join_master`."""
    upper = narrow.to(tl.int16, bitcast=True).to(tl.int32) << 16
    return (upper + (residual.to(tl.int32) << 8)).to(tl.float32, bitcast=True)


@triton.jit
def split_master(x, random, STOCHASTIC: tl.constexpr):
    """float32 x as bfloat16 and int8 residuals, by 16 random bits or to nearest; equals `quantization.split_master`."""
    most: tl.constexpr = 3.3895313892515355e38
    whole = tl.clamp(x, -most, most).to(tl.int32, bitcast=True)
    whole = (whole + ((random & 0xFF).to(tl.int32) if STOCHASTIC else 128)) >> 8
    upper = (whole + 128) >> 8
    return upper.to(tl.int16).to(tl.bfloat16, bitcast=True), (whole - (upper << 8)).to(tl.int8)
