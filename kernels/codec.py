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

import triton
import triton.language as tl

# 1.5 · 2^23: adding it leaves a float32's nearest whole number in the low bits, without a conversion instruction.
_MAGIC = tl.constexpr(12582912.0)
_TOP_SIGNED = tl.constexpr(0.45 / 64)  # 1 minus the last value below 1
_TOP_UNSIGNED = tl.constexpr(0.45 / 128)


@triton.jit
def whole(x):
    """int32 floor(x) for 0 <= x < 2^21 that is not a whole number (a whole one may come out one lower)."""
    return ((x - 0.5) + _MAGIC).to(tl.int32, bitcast=True) & 0x3FFFFF


@triton.jit
def decode(codes, book_ptr):
    """float32 code-book values of uint8 codes; the book is 1 KB and stays in the first-level cache."""
    return tl.load(book_ptr + codes.to(tl.int32))


@triton.jit
def _position(a, F: tl.constexpr):
    """y of magnitudes 0 <= a <= 1, linear between any two neighbouring values below the last one."""
    # Just under a decade's end the lower decade's line is taken: beyond its last value it is right on both sides.
    rounded = tl.maximum(tl.log2(a) * 0.30102999566 + 6.499999, 0.0) + _MAGIC
    missing = (_MAGIC + 6.0) - rounded  # 6 - d
    bins = ((rounded.to(tl.int32, bitcast=True) << 23) + (0x3F800000 if F == 1 else 0x40000000)).to(
        tl.float32, bitcast=True
    )
    y = a * (64 * F / 0.9) * tl.exp2(missing * 2.321928094887) + (bins * (8 / 9) - 0.5)
    # Below the first value of a decade: 3/5 of a step leads down to the decade before, or to 0 from the lowest.
    steep = tl.where(missing == 6.0, 0.9 / 0.55 if F == 1 else 0.9 / 0.65, 5 / 3)
    y = tl.minimum(y, (y - bins) * steep + bins)
    # Above its last value: three steps lead to the first of the next.
    return tl.minimum(y, y * (1 / 3) + (bins * (4 / 3) - 2 / 3))


@triton.jit
def encode_signed(x):
    """uint8 codes of -1 <= x <= 1 in the signed map, to nearest."""
    a = tl.abs(x)
    j = whole(_position(a, 1) + 0.5)
    # 1 has a code of its own, -1 has none.
    j = tl.where(a >= 1 - 0.5 * _TOP_SIGNED, tl.where(x > 0, 128, 127), j)
    return tl.where(x < 0, 127 - j, 127 + j).to(tl.uint8)


@triton.jit
def encode_unsigned(x, uniform):
    """uint8 codes of 0 <= x <= 1 in the unsigned map, stochastic by uniform in (0, 1); 1/2 rounds to nearest."""
    j = whole(_position(x, 2) + uniform)
    return tl.where(x >= 1 - uniform * _TOP_UNSIGNED, 255, j - 1).to(tl.uint8)


@triton.jit
def mix(x):
    """A bijection of uint32 words; see `quantization._mix`."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_words(key, index):
    """Two uint32 words of int64 flat indices under a uint32 key; equals `quantization.random_words`."""
    high = (index >> 32).to(tl.uint32)
    first = mix((index & 0xFFFFFFFF).to(tl.uint32) ^ key ^ mix(high))
    second = first * 0x9E3779B1 + 0x7F4A7C15
    second = (second ^ (second >> 15)) * 0x2C1B3C6D
    return first, second ^ (second >> 16)


@triton.jit
def uniform_low(word):
    """float32 in (0, 1) from the low 16 bits of uint32 words, through the mantissa of a number in [1, 2)."""
    return (((word & 0xFFFF) << 7) | 0x3F800000).to(tl.float32, bitcast=True) - (1 - 0.5 / 65536)


@triton.jit
def uniform_high(word):
    """float32 in (0, 1) from the high 16 bits of uint32 words."""
    return (((word >> 16) << 7) | 0x3F800000).to(tl.float32, bitcast=True) - (1 - 0.5 / 65536)


@triton.jit
def round_stochastic(x, word, DTYPE: tl.constexpr):
    """float32 x in DTYPE (bfloat16 or float16) by the low 16 bits of uint32 words; equals `quantization.round_to`."""
    bits = x.to(tl.uint32, bitcast=True)
    if tl.bfloat16 == DTYPE:
        # The bits below bfloat16's are a fraction of its spacing; carrying over is rounding up.
        return (((bits + (word & 0xFFFF)) >> 16) << 16).to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        exponent = tl.maximum((bits >> 23) & 0xFF, 113)  # 2^-14, below which float16 is evenly spaced
        spacing = ((exponent - 10) << 23).to(tl.float32, bitcast=True)
        inverse = ((264 - exponent) << 23).to(tl.float32, bitcast=True)
        steps = tl.abs(x) * inverse
        down = tl.floor(steps)
        magnitude = (down + tl.where(steps - down + uniform_low(word) >= 1, 1.0, 0.0)) * spacing
        magnitude = tl.minimum(magnitude, 65504.0)
        return tl.where(x < 0, -magnitude, magnitude).to(tl.float16)
