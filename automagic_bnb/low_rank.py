"""Step 9, the rank penalty: soft-thresholding of singular values through the small Gram matrix.

The proximal step of the nuclear norm, σ_j ← max(σ_j - τ, 0), of matrices with one short side (LoRA factors): `lowered`
by the `shrinkage` of their `gram`. Equals the result of a full SVD, and leaves A exactly as it is for τ = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from automagic_bnb import quantization as q
from automagic_bnb import state as st
from automagic_bnb.scalars import relative_rate
from automagic_bnb.stored import Weights

LOW_RANK_EVERY = 10
LOW_RANK_MAX = 256
LOW_RANK_ELEMENTS = 2**21
"""Elements that step 9 works on at once: bounds its memory."""


def short_side_first(matrices: Tensor) -> tuple[Tensor, bool]:
    tall = matrices.shape[-2] > matrices.shape[-1]
    return (matrices.mT if tall else matrices), tall


def gram(matrices: Tensor) -> Tensor:
    """A Aᵀ of the short side, float64 [batch, r, r], of matrices [batch, a, b] with r = min(a, b).

    Double precision: squaring halves the digits, and a float32 Gram matrix would lose singular values below 3e-4 of the
    largest.
    """
    wide, _ = short_side_first(matrices)
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
    wide, tall = short_side_first(matrices)
    changes = (shrink != 0).any(dim=2).any(dim=1)[:, None, None]
    result = torch.where(changes, wide - (shrink.to(wide.dtype) @ wide), wide)
    return result.mT if tall else result


# --- of the parameters that are due -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankTask:
    """One 2-D parameter whose singular values are to be lowered by `threshold`."""

    weights: Weights
    threshold: float | Tensor
    key: int

    @property
    def theta(self) -> Tensor:
        return self.weights.p


def rank_tasks(
    theta: Tensor, state: st.State, options: dict[str, Any], key: int, is_lora: bool, d: Tensor | None
) -> list[RankTask]:
    """Step 9 of one parameter, where it is due."""
    if not is_due(theta, state, options, is_lora):
        return []
    weights = Weights(theta, state.get("master_residual"), st.rounds_stochastically(theta, options))
    return [rank_task(weights, state, options, key, d)]


def is_due(theta: Tensor, state: st.State, options: dict[str, Any], is_lora: bool) -> bool:
    """Every 10th step, for LoRA matrices with a short side."""
    wanted = is_lora and options["lora_rank_penalty"] and state["step"] % LOW_RANK_EVERY == 0
    return wanted and theta.dim() == 2 and min(theta.shape) <= LOW_RANK_MAX


def rank_task(weights: Weights, state: st.State, options: dict[str, Any], key: int, d: Tensor | None) -> RankTask:
    """Step 9 of one parameter, at its current step."""
    threshold = rank_threshold(options) if d is None else d * rank_threshold(options)
    return RankTask(weights, threshold, q.mix_in(q.mix_in(key, q.RANK_STREAM), state["step"]))


def rank_threshold(options: dict[str, Any]) -> float:
    """10 · lr · rank_penalty_strength; where auto_lr supplies d, over d."""
    rate = relative_rate(options) if options["auto_lr"] else float(options["lr"])
    return rate * LOW_RANK_EVERY * options["rank_penalty_strength"]


def shrink_ranks(tasks: list[RankTask]) -> None:
    """Step 9, in place: σ_j ← max(σ_j - threshold, 0).

    Matrices of one shape are worked on together, a bounded number of elements at a time; the eigenvalues of all with
    the same short side are found at once.
    """
    by_rank: dict[Any, list[list[RankTask]]] = {}
    for chunk in _rank_chunks(tasks):
        theta = chunk[0].theta
        by_rank.setdefault((min(theta.shape), theta.device), []).append(chunk)
    for (_, device), chunks in by_rank.items():
        grams = torch.cat([gram(_stacked(chunk)) for chunk in chunks])
        shrinks = shrinkage(grams, _thresholds([t for chunk in chunks for t in chunk], device))
        for chunk, shrink in zip(chunks, shrinks.split([len(c) for c in chunks]), strict=True):
            _write_back(chunk, lowered(_stacked(chunk), shrink))


def _thresholds(tasks: list[RankTask], device: torch.device) -> Tensor:
    """float32 [tasks]: one upload where they are numbers, gathered on the device where auto_lr supplies tensors."""
    if not any(isinstance(task.threshold, Tensor) for task in tasks):
        return torch.tensor([task.threshold for task in tasks], dtype=torch.float32, device=device)
    return torch.stack([torch.as_tensor(task.threshold, dtype=torch.float32, device=device) for task in tasks])


def _rank_chunks(tasks: list[RankTask]) -> list[list[RankTask]]:
    """Tasks of one shape, dtype and device, at most LOW_RANK_ELEMENTS elements together."""
    groups: dict[Any, list[RankTask]] = {}
    for task in tasks:
        theta = task.theta
        groups.setdefault((theta.shape, theta.dtype, theta.device, task.weights.stochastic), []).append(task)
    chunks = []
    for group in groups.values():
        size = max(1, LOW_RANK_ELEMENTS // group[0].theta.numel())
        chunks += [group[i : i + size] for i in range(0, len(group), size)]
    return chunks


def _stacked(chunk: list[RankTask]) -> Tensor:
    return torch.stack([task.weights.read() for task in chunk])


def _write_back(chunk: list[RankTask], values: Tensor) -> None:
    """Store float32 values [batch, a, b] into the parameters, rounded as the main update rounds."""
    keys = torch.tensor([task.key for task in chunk], device=values.device).view(-1, 1)
    bits = q.random_bits(keys, values[0].shape, values.device) if chunk[0].weights.stochastic else keys
    for task, value, own_bits in zip(chunk, values, bits, strict=True):
        task.weights.write(value.reshape(-1), own_bits)
