"""`lora_direction`: the direction in which a LoRA matrix moves, its normalised momentum made orthogonal.

Of n = U S Vᵀ what is left is U Vᵀ, as large as n was: the weights go equally far along all directions that the momentum
knows, the steepest descent for a bounded spectral norm. It stands between steps 6 and 5 of the rule, so that caution,
the rate found and, where there is one, the mask work on what comes of it. Source: Muon (K. Jordan et al., 2024), whose
iteration it is; for pairs of LoRA, LoRA-Muon (arXiv 2606.12921).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from automagic_bnb.low_rank import LOW_RANK_MAX, gram, short_side_first
from automagic_bnb.state import local_tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Muon's: five of them bring singular values from 1e-3 of the norm on to between 0.7 and 1.2."""
CUBIC = (1.5, -0.5, 0.0)
"""Newton-Schulz: three bring these to 1 within 1 %."""
ITERATION = (QUINTIC,) * 5 + (CUBIC,) * 3
LEAST = 1e-30
"""Σ n² of a matrix whose momentum has died away: its directions are rounding, and it stays as it is."""


def is_directed(p: Tensor, options: dict[str, Any], is_lora: bool) -> bool:
    """Whether `lora_direction` has a say in a parameter: as in step 9, of LoRA's matrices with one short side."""
    return bool(options["lora_direction"]) and is_lora and p.dim() == 2 and 0 < min(p.shape) <= LOW_RANK_MAX


def check(p: Tensor, options: dict[str, Any], is_lora: bool) -> None:
    """Raise ValueError where a matrix is not here as a whole, of which alone there are directions."""
    if is_directed(p, options, is_lora) and local_tensor(p).shape != p.shape:
        raise ValueError(
            f"option lora_direction={options['lora_direction']!r}: a LoRA matrix of shape {tuple(p.shape)} is sharded "
            "over processes, and its direction is one of the whole matrix; leave the adapter unsharded (DDP, or out of "
            "fully_shard), or pass lora_direction=None"
        )


def orthogonal(matrices: Tensor) -> Tensor:
    """U Vᵀ of each of float32 [batch, a, b], times what keeps its root mean square; contiguous.

    Each step of the iteration multiplies the matrix by a polynomial of its Gram matrix, which is small, and all of
    these commute: so they are worked out on it, in double precision since it squares.
    """
    wide, tall = short_side_first(matrices)
    grams = gram(matrices)
    square = _trace(grams)
    grams = grams / square.clamp_min(LEAST)
    unit = torch.eye(len(grams[0]), dtype=grams.dtype, device=grams.device)
    turn = unit.expand_as(grams)
    for a, b, c in ITERATION:
        step = a * unit + b * grams + c * (grams @ grams)
        grams, turn = step @ grams @ step, step @ turn
    turn = turn * _trace(grams).clamp_min(LEAST).rsqrt()
    turned = turn.to(wide.dtype) @ wide
    return torch.where(square > LEAST, turned.mT if tall else turned, matrices).contiguous()


def _trace(grams: Tensor) -> Tensor:
    return grams.diagonal(dim1=1, dim2=2).sum(1).view(-1, 1, 1)
