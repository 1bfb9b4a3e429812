"""Values and random fractions for the tests of codes and of rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from automagic_bnb import quantization as q

CPU = torch.device("cpu")
WORD = 2.0**-17
"""Random fractions are odd multiples of this: the bias of a stochastic rounding, in gaps, is no more."""


def values_for(kind: str, blocks: int, seed: int, spread: float = 1.0) -> Tensor:
    """Blocks of normal values of every order of magnitude down to 1e-6 of the largest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(blocks, q.BLOCK, generator=generator)
    x *= 10 ** (-6 * torch.rand(blocks, q.BLOCK, generator=generator) * spread)
    return x if kind == "signed" else x.abs()


def uniform(shape: torch.Size, key: int) -> Tensor:
    return q.uniform(q.random_bits(key, shape, CPU))
