"""The numbers of one step of one parameter, worked out on the host in double precision; kernels take the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from automagic_bnb import quantization as q


@dataclass(frozen=True)
class Scalars:
    """What step t of one parameter multiplies, adds and decides by."""

    beta1: float
    beta2: float
    beta3: float
    correction1: float  # 1 - beta1**t
    correction2: float
    correction3: float
    rate: float  # lr, or ρ = lr / base where auto_lr supplies d
    low: float  # bounds of the per-element factor; where auto_lr supplies d, of d times that factor
    high: float
    kappa: float
    adapt_mask: bool  # k moves
    learn_polarity: bool  # σ moves and π is recorded
    rounding_key: int
    probe_weight: float  # ω of auto_lr over d²: ρ / d0


def base_rate(options: dict[str, Any]) -> float:
    """The rate a schedule starts from: its `initial_lr`, else the group's constructor lr."""
    return float(options.get("initial_lr", options["base_lr"]))


def relative_rate(options: dict[str, Any]) -> float:
    """ρ = lr / base."""
    base = base_rate(options)
    return float(options["lr"]) / base if base > 0 else 0.0


def step_scalars(options: dict[str, Any], t: int, is_lora: bool, ordinal: int) -> Scalars:
    """The scalars of step t (from 1) of the parameter with this ordinal.

    Args:
        options: the effective options of the parameter, with `lr`, `base_lr` (the group's constructor lr) and, where
            a scheduler set one, `initial_lr`.
    """
    beta1, beta2, beta3 = options["betas"]
    base, relative = base_rate(options), relative_rate(options)
    automatic = options["auto_lr"]
    warm = t <= options["warmup_steps"]
    # A constant rate is clamped relative to its base, so that a schedule scales every element alike.
    bounded = base > 0 and not automatic
    return Scalars(
        beta1=beta1,
        beta2=beta2,
        beta3=beta3,
        correction1=1 - beta1**t,
        correction2=1 - beta2**t,
        correction3=1 - beta3**t,
        rate=relative if automatic else float(options["lr"]),
        low=options["min_lr"] / base if bounded else options["min_lr"] if automatic else 0.0,
        high=options["max_lr"] / base if bounded else options["max_lr"] if automatic else math.inf,
        kappa=options["low_rank_emphasis"] if is_lora else 1.0,
        adapt_mask=warm and t >= 2,
        learn_polarity=warm,
        rounding_key=q.mix_in(q.parameter_key(options["seed"], ordinal, q.STEP_STREAM), t),
        probe_weight=relative / options["base_lr"] if automatic and options["base_lr"] > 0 else 0.0,
    )
