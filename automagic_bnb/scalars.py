"""The numbers of one step of one parameter, worked out on the host in double precision; kernels take the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

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
    low: float  # bounds of an element's rate; they hold where the mean rate lies between them
    high: float | None  # None: MAX_LR_RATIO times the mean rate
    is_lora: bool
    kappa: float
    adapt_mask: bool  # k moves
    learn_polarity: bool  # σ moves and π is recorded
    rounding_key: int


PEAK_RATIO = 4.0
"""A found rate may be doubled by hand, twice. A schedule that rises further began below its peak, which counts then."""


def base_rate(options: dict[str, Any]) -> float:
    """The rate that a schedule's rates are shares of: its `initial_lr`, else the group's constructor lr.

    Where the rate is found, of a schedule that began far below its peak (OneCycleLR, CyclicLR) it is the peak: the one
    that OneCycleLR names in the group, or the highest that has been seen.
    """
    base = as_number(options.get("initial_lr", options["base_lr"]))
    if not options["auto_lr"]:
        return base
    highest = max(float(options["lr"]), float(options.get("auto_lr_peak", 0.0)), named_peak(options))
    return highest if highest > PEAK_RATIO * base else base


def named_peak(options: dict[str, Any]) -> float:
    """The peak that OneCycleLR names in its group, else 0."""
    return float(options["max_lr"] or 0.0) if "initial_lr" in options and "max_momentum" in options else 0.0


_read: Any = WeakIdKeyDictionary()
"""The numbers in tensors that were read before, each with the tensor's version then."""


def as_number(value: Any) -> float:
    """A number, or what a 0-d tensor that seldom changes holds: it is waited for once."""
    if not isinstance(value, Tensor):
        return float(value)
    if value not in _read or _read[value][0] != value._version:
        _read[value] = (value._version, float(value))
    return _read[value][1]


def relative_rate(options: dict[str, Any]) -> float:
    """ρ = lr / base."""
    base = base_rate(options)
    return float(options["lr"]) / base if base > 0 else 0.0


def adapts_mask(options: dict[str, Any], t: int) -> bool:
    """Whether the mask moves in step t: a first gradient has no past to agree with."""
    return 2 <= t <= options["warmup_steps"]


def step_scalars(options: dict[str, Any], t: int, is_lora: bool, key: int) -> Scalars:
    """The scalars of step t (from 1) of the parameter whose random bits have this key (`quantization.parameter_key`).

    Args:
        options: the effective options of the parameter, with `lr`, `base_lr` (the group's constructor lr) and, where
            a scheduler set one, `initial_lr`.
    """
    beta1, beta2, beta3 = options["betas"]
    relative, automatic = relative_rate(options), options["auto_lr"]
    warm = t <= options["warmup_steps"]
    return Scalars(
        beta1=beta1,
        beta2=beta2,
        beta3=beta3,
        correction1=1 - beta1**t,
        correction2=1 - beta2**t,
        correction3=1 - beta3**t,
        rate=relative if automatic else float(options["lr"]),
        # The schedule scales the bounds, too: so it scales every element alike.
        low=options["min_lr"] * relative,
        high=None if options["max_lr"] is None else options["max_lr"] * relative,
        is_lora=is_lora,
        kappa=options["low_rank_emphasis"] if is_lora else 1.0,
        adapt_mask=adapts_mask(options, t),
        learn_polarity=warm,
        rounding_key=q.mix_in(q.mix_in(key, q.STEP_STREAM), t),
    )
