"""Soft-thresholding of singular values through the small Gram matrix.

The proximal step of the nuclear norm, σ_j ← max(σ_j - τ, 0), of matrices with one short side (LoRA factors): `lowered`
by the `shrinkage` of their `gram`. Equals the result of a full SVD, and leaves A exactly as it is for τ = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _short_side_first(matrices: Tensor) -> tuple[Tensor, bool]:
    tall = matrices.shape[-2] > matrices.shape[-1]
    return (matrices.mT if tall else matrices), tall


def gram(matrices: Tensor) -> Tensor:
    """A Aᵀ of the short side, float64 [batch, r, r], of matrices [batch, a, b] with r = min(a, b).

    Double precision: squaring halves the digits, and a float32 Gram matrix would lose singular values below 3e-4 of the
    largest.
    """
    wide, _ = _short_side_first(matrices)
    wide = wide.double()
    return wide @ wide.mT


def singular_values(matrices: Tensor) -> Tensor:
    """Singular values of [..., a, b], float64 [..., min(a, b)], descending."""
    return torch.linalg.eigvalsh(gram(matrices)).clamp_min(0).sqrt().flip(-1)


def shrinkage(grams: Tensor, thresholds: Tensor) -> Tensor:
    """S = Q diag(min(τ / σ, 1)) Qᵀ with the eigenvectors Q of each Gram matrix: A - S A has σ lowered by τ.

    Args:
        grams: float64 [batch, r, r]; S is 0 for those that are not finite, of which there are no eigenvectors.
        thresholds: τ, [batch].
    """
    finite = torch.isfinite(grams).all(dim=2).all(dim=1)
    values, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], grams, 0.0))
    sigma, tau = values.clamp_min(0).sqrt(), thresholds.double()[:, None]
    removed = torch.where(sigma > tau, tau / sigma.clamp_min(1e-300), 1.0)
    removed = torch.where((tau > 0) & finite[:, None], removed, 0.0)
    return (vectors * removed[:, None, :]) @ vectors.mT


def lowered(matrices: Tensor, shrink: Tensor) -> Tensor:
    """A - S A for matrices [batch, a, b] and S of `shrinkage`; same dtype, and exactly A where S is 0."""
    wide, tall = _short_side_first(matrices)
    changes = (shrink != 0).any(dim=2).any(dim=1)[:, None, None]
    result = torch.where(changes, wide - (shrink.to(wide.dtype) @ wide), wide)
    return result.mT if tall else result
