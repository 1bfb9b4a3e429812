"""What a series of losses says: whether it diverges, stands still or jumps, or is only noisy.

Losses are compared by medians, with the error that their scatter leaves: spikes count for nothing, and no verdict is
given where the noise allows another one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from automagic_bnb.run_log import as_number

DIVERGENCE_RISE = 0.2
"""Share of its best level by which the loss must have risen. Moving averages, harder data and restarts of a schedule
wander by some percent; a run that diverges soon passes any bound."""
LOST_PROGRESS = 0.01
"""Share of the way from the first level to the best that must be lost, too: at the floor, where the loss is nearly 0,
any ripple is large beside the level."""
STANDARD_ERRORS = 6.0
"""The least rise, in standard errors of a difference of medians. The best of a thousand windows lies 3 to 4 errors too
low by chance, and a run is looked at a thousand times."""
SMALL_SAMPLE = 25
"""Losses below which errors are doubled: scatter estimated from ten losses is at times far too small, and the best
window is likely to be one of those. With it, none of 60 noisy runs of 3000 losses is a false alarm in windows of 10;
without, 18 are."""
NON_FINITE_SHARE = 0.1
"""Of the window, from which NaN and infinite losses count as divergence although the newest is finite: single ones,
from a bad batch, pass."""
STALL_RATE = 2e-5
"""A fall of the loss slower than this share of its level a step is none: 2 % in a thousand steps. The best the noise
allows is compared, so a small window tells a stall only where there is hardly any noise."""
CONVERGED_SHARE = 0.02
"""Once the loss has fallen by this share of its first level, beyond doubt, standing still is the end of training and
no stall. A fine-tune begins near its goal: 5 % is much for many."""
CERTAIN_ERRORS = 3.0
"""Standard errors beyond which a fall, or the lack of one, is no chance: one judgement a run, not a thousand."""
LEAST_LOSSES = 20
"""Losses from which their progress is judged."""
SCATTER_GROWTH = 3.0
"""Recent scatter over earlier scatter from which a loss is unstable. Estimates from 25 losses differ by a factor of 2
in one case of twenty."""
LEAST_SCATTER = 0.1
"""Share of the loss's level that scatter must reach to matter; at the floor it may grow from nothing to hardly
anything."""
WILD_SCATTER = 3.0
"""Times the level at which scatter is too large however it began. Single losses at random noise levels of diffusion
reach 1, and estimates of that from 25 losses 2."""


def checked_loss(loss: Any) -> float | Tensor:
    """A number, or a copy of a tensor, which nobody waits for.

    Raises:
        TypeError: neither a number nor a tensor of one element.
    """
    if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex():
        return loss.detach().reshape(()).clone()
    return as_number("loss", loss)


def read_losses(losses: Sequence[float | Tensor]) -> list[float]:
    """As floats; tensors of one device leave it together."""
    values: list[Any] = list(losses)
    places: dict[torch.device, list[int]] = {}
    for i, loss in enumerate(values):
        if isinstance(loss, Tensor):
            places.setdefault(loss.device, []).append(i)
    for of_device in places.values():
        together = torch.stack([values[i].double() for i in of_device]).tolist()
        for i, value in zip(of_device, together, strict=True):
            values[i] = value
    return values


def finite(losses: Iterable[float]) -> np.ndarray:
    """float64 [n], without NaN and infinities."""
    values = np.array(list(losses), dtype=np.float64)
    return values[np.isfinite(values)]


def is_lost(window: Sequence[float], window_size: int) -> bool:
    """Whether the newest loss, or too many of the window, are NaN or infinite."""
    if not window:
        return False
    return not math.isfinite(window[-1]) or len(window) - finite(window).size > NON_FINITE_SHARE * window_size


def rise(older: np.ndarray, newer: np.ndarray) -> tuple[float, float]:
    """Difference of two samples' medians, and its standard error.

    The error of a median of n values of normal noise σ is 1.25 σ / √n; σ is 1.48 times the median distance from the
    median, which spikes do not touch.
    """
    errors = [1.2533 * 1.4826 * np.median(np.abs(x - np.median(x))) / math.sqrt(x.size) for x in (older, newer)]
    return float(np.median(newer) - np.median(older)), math.hypot(*errors)


def diverges(window: Sequence[float], best: np.ndarray | None, first: np.ndarray | None) -> bool:
    """Whether the window lies above the best one before it; where there is none, its newer half above its older."""
    values = finite(window)
    half = values.size // 2
    older, newer = (values[:half], values[half:]) if best is None else (best, values)
    return older.size > 0 and newer.size > 0 and _has_risen(older, newer, first)


def _has_risen(older: np.ndarray, newer: np.ndarray, first: np.ndarray | None) -> bool:
    difference, error = rise(older, newer)
    level = float(np.median(older))
    progress = float(np.median(first)) - level if first is not None and first.size else 0.0
    error *= 2 if min(older.size, newer.size) < SMALL_SAMPLE else 1
    least = max(DIVERGENCE_RISE * abs(level), LOST_PROGRESS * progress, STANDARD_ERRORS * error)
    return difference > least


def stalls(window: Sequence[float], first: np.ndarray | None) -> bool:
    """Whether the loss stands still, beyond doubt, without having fallen from its first losses."""
    values = finite(window)
    half = values.size // 2
    if not half or (first is not None and first.size and has_fallen(first, values)):
        return False
    difference, error = rise(values[:half], values[half:])
    # The halves' middles lie half a window apart. With two errors on either side, one stall in twenty is none.
    return abs(difference) + 2 * error <= STALL_RATE * abs(float(np.median(values))) * values.size / 2


def has_fallen(older: np.ndarray, newer: np.ndarray) -> bool:
    """Whether the loss is lower than it was, beyond doubt and by more than nothing."""
    difference, error = rise(older, newer)
    return -difference >= max(CONVERGED_SHARE * abs(float(np.median(older))), CERTAIN_ERRORS * error)


def is_slow(losses: np.ndarray, threshold_ratio: float) -> bool:
    """Whether the loss has, beyond doubt, fallen by less than this share of its level, from first fifth to last.

    The error is that of `rise`, but by the scatter of neighbours, which a steady fall leaves alone.
    """
    fifth = losses.size // 5
    first, last = losses[:fifth], losses[-fifth:]
    error = 1.2533 * math.hypot(scatter(first), scatter(last)) / math.sqrt(fifth)
    fall, level = float(np.median(first) - np.median(last)), abs(float(np.median(first)))
    return fall + CERTAIN_ERRORS * error < threshold_ratio * level


def is_unstable(losses: np.ndarray) -> bool:
    """Whether the newest quarter scatters more widely than its level, or far more widely than what came before.

    Scatter is taken from neighbours' differences, so that a steep fall is none.
    """
    quarter = max(losses.size // 4, LEAST_LOSSES)
    if losses.size < 2 * quarter:
        return False
    recent, level = scatter(losses[-quarter:]), abs(float(np.median(losses[-quarter:])))
    grown = recent > SCATTER_GROWTH * scatter(losses[:-quarter]) and recent > LEAST_SCATTER * level
    return bool(grown or recent > WILD_SCATTER * level)


def scatter(losses: np.ndarray) -> float:
    """The standard deviation of a series' noise, by the median of its steps, which few spikes do not touch."""
    return float(1.4826 * np.median(np.abs(np.diff(losses))) / math.sqrt(2))
