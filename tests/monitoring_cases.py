"""Loss curves of every kind, healthy and not, and what the monitor says of one at each look."""

from __future__ import annotations

import math

import numpy as np
import pytest

from automagic_bnb import AdaptiveTrainingMonitor, bnb

needs_bitsandbytes = pytest.mark.skipif(not bnb.BITSANDBYTES_AVAILABLE, reason="bitsandbytes is not installed")


def normal(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count)


def lognormal(count: int, sigma: float, seed: int = 0) -> np.ndarray:
    """Noise of diffusion losses: skewed, with a coefficient of variation of about sigma."""
    return np.random.default_rng(seed).lognormal(0, sigma, count)


def spiked(curve: np.ndarray, at: int, width: int, height: float) -> np.ndarray:
    curve = curve.copy()
    curve[at : at + width] *= height
    return curve


def steps(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.float64)


FALLING = 0.3 + 2 * np.exp(-steps(1000) / 200)
FLOOR = 0.05 + 2.45 * np.exp(-steps(1500) / 100)

HEALTHY = {
    "falling": FALLING,
    "falling, 30 % noise": FALLING * (1 + 0.3 * normal(1000)),
    "falling, noise of diffusion": FALLING * lognormal(1000, 0.7),
    "falling slowly, 5 % noise": (2 - steps(3000) / 6000) * (1 + 0.05 * normal(3000)),
    "nothing but noise, for long": lognormal(20_000, 0.5),
    "nothing but even noise": 1 + 0.2 * normal(20_000),
    "at the floor after convergence": FLOOR,
    "at the floor with noise": FLOOR * (1 + 0.1 * normal(1500)),
    "rippling at a floor of nothing": 2 * np.exp(-steps(1500) / 20) + 1e-5 * (2 + np.sin(steps(1500) / 60)),
    "exactly 0 in the end": np.maximum(1 - steps(500) / 100, 0.0),
    "spikes that recover": spiked(spiked(FALLING * (1 + 0.05 * normal(1000)), 480, 15, 50), 800, 20, 4),
    "a spike right at the end": spiked(FALLING, 990, 10, 100),
    "one infinite loss that recovered": spiked(FALLING, 970, 1, math.inf),
    "negative, falling": -5 - 2 * steps(1000) / 1000 + 0.1 * normal(1000),
    "through zero, falling": 1 - steps(1000) / 500 + 0.05 * normal(1000),
    "all zero": np.zeros(200),
    "a fine-tune at its plateau": 1.25 + 0.05 * np.exp(-steps(3000) / 300) + 1e-5 * normal(3000),
    "a clear fall, then constant": np.concatenate([2.4 - steps(100) / 500, np.full(200, 2.2)]),
}
DIVERGING = {
    "exploding": np.concatenate([FALLING[:300], 0.6 * np.exp(steps(200) / 30)]),
    "exploding from the start": np.exp(steps(60) / 20) * (1 + 0.02 * normal(60)),
    "slowly": np.concatenate([FALLING[:800], 0.34 * (1 + steps(1000) * 5e-4)]),
    "slowly, 5 % noise": (1 + steps(2000) * 2e-4) * (1 + 0.05 * normal(2000)),
    "slowly, noise of diffusion": (1 + steps(4000) * 5e-4) * lognormal(4000, 0.5),
    "a jump that stays": np.concatenate([FALLING[:600], np.full(200, 1.4)]) * (1 + 0.05 * normal(800)),
    "negative, rising": -5 + 2 * steps(1000) / 1000 + 0.1 * normal(1000),
    "NaN from some step on": np.concatenate([FALLING[:400], np.full(60, math.nan)]),
    "NaN just now": np.concatenate([FALLING[:400], [math.nan]]),
    "infinite just now, at the very start": np.array([math.inf]),
    "NaN now and then": np.where(steps(1000) % 7 == 3, math.nan, FALLING),
}
STALLED = {
    "constant": np.full(100, 0.7),
    "constant but for the last digits": 0.7 + 1e-6 * normal(100),
    "constant after hardly a fall": np.concatenate([2.4 - steps(100) / 2500, np.full(200, 2.36)]),
    "constant and negative": np.full(100, -3.0),
    "falling by a millionth a step": 1 - steps(300) * 1e-6,
    "constant with spikes": spiked(np.full(200, 0.7), 190, 5, 3),
}


def verdicts(monitor: AdaptiveTrainingMonitor, curve: np.ndarray, every: int = 50) -> list[str | None]:
    """What is said at each look, every 50 losses and at the end."""
    found = []
    for start in range(0, len(curve), every):
        for loss in curve[start : start + every].tolist():
            monitor.update(loss)
        should, reason = monitor.should_adjust_config()
        assert should == (reason is not None)
        found.append(reason)
    return found
