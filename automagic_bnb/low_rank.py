"""Soft-thresholding of singular values through the small Gram matrix.

The proximal step of the nuclear norm, σ_j ← max(σ_j - τ, 0), of matrices with one short side (LoRA factors).
"""

from __future__ import annotations

import torch
from torch import Tensor


def _short_side_first(matrices: Tensor) -> tuple[Tensor, bool]:
    tall = matrices.shape[-2] > matrices.shape[-1]
    return (matrices.mT if tall else matrices), tall


def _gram_eigen(wide: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values (ascending, float64) and left singular vectors of [batch, r, c] with r <= c.

    Double precision: squaring halves the digits, and a float32 Gram matrix would lose singular values below
    3e-4 of the largest.
    """
    wide = wide.double()
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    return values.clamp_min(0).sqrt(), vectors


def singular_values(matrices: Tensor) -> Tensor:
    """Singular values of [..., a, b], float64 [..., min(a, b)], descending."""
    wide, _ = _short_side_first(matrices)
    return _gram_eigen(wide)[0].flip(-1)


def soft_threshold(matrices: Tensor, thresholds: Tensor) -> Tensor:
    """Matrices [batch, a, b] with each singular value lowered by thresholds [batch], not below 0; same dtype.

    Computed as A - Q diag(min(τ / σ, 1)) Qᵀ A with the eigenvectors Q of A Aᵀ (of the short side), which equals the
    result of a full SVD and leaves A exactly as it is for τ = 0.
    """
    wide, tall = _short_side_first(matrices)
    sigma, vectors = _gram_eigen(wide)
    tau = thresholds.double()[:, None]
    removed = torch.where(sigma > tau, tau / sigma.clamp_min(1e-300), 1.0)
    removed = torch.where(tau > 0, removed, 0.0)
    shrink = (vectors * removed[:, None, :]) @ vectors.mT
    result = wide - (shrink @ wide.double()).to(wide.dtype)
    return result.mT if tall else result
