"""Block-wise 8-bit codes on bitsandbytes' code books, in torch: the definition that the kernels are held to.

A tensor of n elements is cut into blocks of 256; each block is divided by its `absmax` (float32) and each quotient
becomes the index of a value of the code book. Dettmers et al., arXiv 2110.02861.

absmax is such that the block's largest magnitude takes the last code below 1, not 1 as bitsandbytes' own: 1 has no
counterpart of the other sign (the signed book begins at -0.993), and stands apart from the even spacing of the others.
Decoding is bitsandbytes', of its codes too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 256
LAST_CODE = 254
"""Of the last value below 1, which the largest magnitude of a block takes."""

FLOAT_TINY = 1e-37
"""What stands in for 0 where something is divided by it."""
NO_SIGN = 2
"""π of an element that has not had a gradient yet: neither sign agrees with it."""
EMPTY_MASK = 128 + 64
"""The byte of k = 0 and no sign: see `pack_mask`."""
EMPTY_PAIR = 0x88
"""The byte of two elements of k = 0 and π = 0 in four bits each: see `pack_pairs`."""
LEAST_EXPONENT, HIGHEST_EXPONENT = -32, 31
"""Of k."""
PAIR_SPACING = 8
"""k in four bits is one of eight: -32, -24, ... 24."""
STEP_STREAM, RANK_STREAM = 0, 1
"""The streams of random bits of the main update and of the low-rank step."""
# Blocks below it share this absmax, so that quotients stay exact where float32 runs out of normal numbers.
TINY_ABSMAX = 2.0**-120


def decode(codes: Tensor, absmax: Tensor, code_book: Tensor) -> Tensor:
    """float32 values [blocks, 256] of uint8 codes [blocks, 256] under absmax float32 [blocks]."""
    return code_book[codes.long()] * absmax[:, None]


def encode(values: Tensor, code_book: Tensor, uniform: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes uint8 [blocks, 256] and absmax float32 [blocks] of float32 values [blocks, 256].

    Args:
        values: finite; for the unsigned code book, not negative.
        code_book: float32 [256], ascending.
        uniform: float32 [blocks, 256] in (0, 1). With it a quotient between two code values goes to the upper one
            with the probability that makes the result unbiased; without it, to the nearer one.
    """
    last = code_book[LAST_CODE]
    largest = values.abs().amax(dim=1).clamp_min(TINY_ABSMAX * last)
    x = values / largest[:, None] * last
    below = (torch.searchsorted(code_book, x, right=True) - 1).clamp_(0, LAST_CODE - 1)
    low, high = code_book[below], code_book[below + 1]
    # Of two values equally near, the upper: what floor(y + 1/2) gives in the kernels.
    rise = ((x - low) / (high - low)).clamp_(0, 1) + (0.5 if uniform is None else uniform)
    return (below + (rise >= 1)).to(torch.uint8), largest / last


def pack_mask(k: Tensor, polarity: Tensor) -> Tensor:
    """One uint8 of the learning-rate exponent k (whole, -32..31) and π, the last gradient's sign (uint8).

    From bit 0 up: whether it was positive, six bits of k + 32, whether there was none yet (`NO_SIGN`).
    """
    return ((k + 32) * 2 + (polarity & 1) + (polarity >> 1) * 128).to(torch.uint8)


def unpack_mask(packed: Tensor) -> tuple[Tensor, Tensor]:
    """k as float32 and π as uint8: 0, 1 or `NO_SIGN`."""
    return ((packed & 127) >> 1).float() - 32, (packed & 1) | ((packed >> 7) << 1)


def pack_pairs(k: Tensor, polarity: Tensor) -> Tensor:
    """uint8 [..., 128] of k and π (uint8) [..., 256], two neighbours a byte, the first in its lower half.

    Each half is the place of k, one of `PAIR_SPACING`'s eight, times two, plus whether the last gradient was positive:
    there is no room for `NO_SIGN`, in whose place is 0, so that a first gradient agrees with it where it is negative.
    """
    halves = ((k - LEAST_EXPONENT) / PAIR_SPACING * 2 + (polarity & 1)).to(torch.uint8).unflatten(-1, (-1, 2))
    return halves[..., 0] | (halves[..., 1] << 4)


def unpack_pairs(packed: Tensor) -> tuple[Tensor, Tensor]:
    """k as float32 and π as uint8, 0 or 1, each [..., 256] of [..., 128]."""
    halves = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return (halves >> 1).float() * PAIR_SPACING + LEAST_EXPONENT, halves & 1


_M32 = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words (held in int64) whose outputs look independent of each other."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _M32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _M32
    return x ^ (x >> 16)


def mix_in(key: Any, word: Any) -> Any:
    """A 32-bit key with one more integer below 2**64 mixed in; either may be an array of uint64."""
    for part in (word & _M32, (word >> 32) & _M32):
        x = (key ^ part) & _M32
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & _M32
        x = ((x ^ (x >> 15)) * 0x846CA68B) & _M32
        key = ((x ^ (x >> 16)) + 0x9E3779B9) & _M32
    return key


def parameter_key(seed: int, own: int) -> int:
    """The key of a parameter's random bits, of a seed and what tells it from others; `mix_in` for which purpose and the
    step, then `random_bits`."""
    return mix_in(mix_in(0x9E3779B9, seed), own)


def random_bits(key: int | Tensor, shape: torch.Size, device: torch.device, start: int = 0) -> Tensor:
    """16 random bits (in int64) for each flat index of `shape`: a pure function of key and index.

    The first index is `start`, which is even. Indices 2j and 2j + 1 take the halves of one 32-bit word. No generator is
    touched: replicas draw the same bits, and so does a resumed run. Keys [batch, 1] give [batch, n] for a shape (n,).
    """
    pairs = torch.arange(start // 2, start // 2 + (shape.numel() + 1) // 2, device=device)
    # Beyond 2**33 elements the upper half of the pair's index enters through the key; _mix(0) is 0.
    words = _mix(((pairs & _M32) ^ key) ^ _mix(pairs >> 32))
    bits = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten(-2)[..., : shape.numel()]
    return bits if isinstance(key, Tensor) else bits.view(shape)


def uniform(bits: Tensor) -> Tensor:
    """float32 in (0, 1) of 16 random bits."""
    return (bits.float() + 0.5) / 65536


def round_to(values: Tensor, dtype: torch.dtype, uniform: Tensor | None) -> Tensor:
    """float32 values in a narrower dtype: to nearest, or stochastically (unbiased) where `uniform` is given.

    bfloat16 and float16 round between their two neighbouring numbers and saturate; float32 passes through.
    """
    if uniform is None or dtype not in (torch.bfloat16, torch.float16):
        return values.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    bits, least = (8, -126) if dtype == torch.bfloat16 else (11, -14)
    _, exponent = torch.frexp(values)  # |values| = f · 2^exponent with 1/2 <= f < 1
    spacing = torch.ldexp(torch.ones_like(values), (exponent - 1).clamp_min(least) - (bits - 1))
    steps = values.abs() / spacing
    whole = steps.floor()
    magnitude = (whole + (steps - whole + uniform >= 1)) * spacing
    return torch.copysign(magnitude, values).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)


def join_master(narrow: Tensor, residual: Tensor) -> Tensor:
    """float32 of bfloat16 values and the int8 bits below them (`split_master`)."""
    bits = (narrow.view(torch.int16).int() << 16) + (residual.int() << 8)
    return bits.view(torch.float32)


def split_master(values: Tensor, bits: Tensor | None) -> tuple[Tensor, Tensor]:
    """float32 values as the nearest bfloat16 and int8 residuals: 24 bits in all, 16 of them of the significand.

    Args:
        bits: 16 random bits each, of which the low 8 round stochastically to 24 bits; None rounds to nearest.
    """
    most = torch.finfo(torch.bfloat16).max
    whole = values.clamp(-most, most).view(torch.int32)
    whole = (whole + (128 if bits is None else (bits & 0xFF).int())) >> 8
    upper = (whole + 128) >> 8
    return upper.to(torch.int16).view(torch.bfloat16), (whole - (upper << 8)).to(torch.int8)
