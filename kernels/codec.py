"""Device functions: bitsandbytes' 8-bit codes without searching the code book, random bits, stochastic rounding.

bitsandbytes' dynamic maps cut (0, 1] into seven decades; decade d = 0..6 ends at 10^(d-6) and holds b = F·2^d evenly
spaced values, F = 1 in the signed map (of magnitudes) and F = 2 in the unsigned one. Numbering the magnitudes upwards,
those of decade d get the indices b .. 2b-1, so that within a decade the position of a magnitude a among them is linear,

    y = (a · 10^(6-d) + 0.8) · b / 0.9 - 1/2 = a · (64 F / 0.9) · 5^(6-d) + (8/9) b - 1/2,

with y = j exactly at value j. Between decades (from 2b-1 to the next 2b), between 0 and the first value, and between
the last value and 1 it is linear with other slopes. Rounding to nearest is then floor(y + 1/2) and stochastic rounding
floor(y + U), both without a table.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

# Where PTX cannot be written (the interpreter, AMD) the general functions stand in for the fast instructions.
_PTX = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") != "1" and torch.version.hip is None)

TINY = tl.constexpr(1e-37)  # above the least normal float32: Triton makes a smaller literal a double

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# 1.5 · 2^23: adding it leaves a float32's nearest whole number in the low bits, without a conversion instruction.
MAGIC = tl.constexpr(12582912.0)
_TOP_SIGNED = tl.constexpr(0.45 / 64)  # 1 minus the last value below 1
_TOP_UNSIGNED = tl.constexpr(0.45 / 128)


@triton.jit
def log2(x):
    """One instruction, for normal x; tl.log2 would be some twenty."""
    if _PTX:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.log2(x)


@triton.jit
def reciprocal(x):
    """1 / x for 2^-126 <= |x| <= 2^126, to 2 ulp, in one instruction."""
    if _PTX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return 1 / x


@triton.jit
def decode(codes, book_ptr):
    """float32 code-book values of uint8 codes; the book is 1 KB and stays in the first-level cache."""
    return tl.load(book_ptr + codes.to(tl.int32))


@triton.jit
def low_byte(x, OFFSET: tl.constexpr):
    """uint8 of round(x) + OFFSET, modulo 256, for float32 |x| < 2^21; of two equally near, an even sum is taken."""
    return (x + (MAGIC + OFFSET)).to(tl.int32, bitcast=True).to(tl.uint8)


@triton.jit
def _position(scaled, F: tl.constexpr, EXACT: tl.constexpr):
    """y of magnitudes a <= 1 given as a · 64 F / 0.9, linear between any two neighbouring values below the last.

    Without EXACT what it rounds to is right, but not how far it is from there.
    """
    # floor(log10 a) + 7, at least 0. Within 1e-4 of a decade's end the neighbour may be taken: with EXACT the lower,
    # whose line is right on both sides; without, the upper, from which what lies below rounds down as it should.
    half = 6.5 + (-3.5e-5 if EXACT else 3.5e-5)
    shift = half - (1.8519374645 if F == 1 else 2.1529674602)  # log10 of 64 F / 0.9
    rounded = tl.maximum(log2(scaled) * 0.30102999566 + shift, 0.0) + MAGIC
    missing = (MAGIC + 6.0) - rounded  # 6 - d
    bins = ((rounded.to(tl.int32, bitcast=True) << 23) + (0x3F800000 if F == 1 else 0x40000000)).to(
        tl.float32, bitcast=True
    )
    y = scaled * tl.exp2(missing * 2.321928094887) + (bins * (8 / 9) - 0.5)
    # Below the first value of a decade: 3/5 of a step leads down to the decade before, or to 0 from the lowest.
    steep = tl.where(missing == 6.0, 0.9 / 0.55 if F == 1 else 0.9 / 0.65, 5 / 3)
    y = tl.minimum(y, (y - bins) * steep + bins)
    if EXACT:  # above its last value, three steps lead to the first of the next
        y = tl.minimum(y, y * (1 / 3) + (bins * (4 / 3) - 2 / 3))
    return y


@triton.jit
def encode_signed(x, absmax):
    """uint8 codes of float32 x in the signed map under absmax >= |x|, to nearest."""
    scaled = x * ((64 / 0.9) * reciprocal(absmax))
    # 1 has a code of its own, the 128th; -1 has none.
    y = tl.minimum(_position(tl.abs(scaled), 1, False), 127.0)
    y = tl.where(scaled >= (64 / 0.9) * (1 - 0.5 * _TOP_SIGNED), 128.0, y)
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    return low_byte((y.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True), 127)


@triton.jit
def encode_unsigned(x, absmax, centred):
    """uint8 codes of float32 0 <= x <= absmax in the unsigned map: stochastic by U - 1/2, to nearest by 0."""
    scaled = x * ((128 / 0.9) * reciprocal(absmax))
    y = _position(scaled, 2, True) + centred
    top = (128 / 0.9) * (1 - 0.5 * _TOP_UNSIGNED) - centred * (128 / 0.9 * _TOP_UNSIGNED)
    return low_byte(tl.where(scaled >= top, 256.0, y), -1)


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
def centred(bits):
    """U - 1/2 of 16 random bits, through the mantissa of a number in [1, 2)."""
    return ((bits << 7) | 0x3F800000).to(tl.float32, bitcast=True) - (1.5 - 0.5 / 65536)


@triton.jit
def round_stochastic(x, random, DTYPE: tl.constexpr):
    """float32 x in DTYPE (bfloat16 or float16) by 16 random bits; equals `quantization.round_to`."""
    bits = x.to(tl.uint32, bitcast=True)
    if tl.bfloat16 == DTYPE:
        # The bits below bfloat16's are a fraction of its spacing; carrying over is rounding up.
        return ((bits + random) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        exponent = tl.maximum((bits >> 23) & 0xFF, 113)  # 2^-14, below which float16 is evenly spaced
        spacing = ((exponent - 10) << 23).to(tl.float32, bitcast=True)
        inverse = ((264 - exponent) << 23).to(tl.float32, bitcast=True)
        steps = tl.abs(x) * inverse
        down = tl.floor(steps)
        magnitude = (down + tl.where(steps - down + centred(random) >= 0.5, 1.0, 0.0)) * spacing
        magnitude = tl.minimum(magnitude, 65504.0)
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
