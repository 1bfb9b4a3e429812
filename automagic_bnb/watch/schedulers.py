"""Scaling what a learning-rate scheduler of torch computes, from now to the end of its schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import lr_scheduler

from automagic_bnb.notices import warn_once

KNOWN = (
    *(lr_scheduler.LambdaLR, lr_scheduler.MultiplicativeLR, lr_scheduler.StepLR, lr_scheduler.MultiStepLR),
    *(lr_scheduler.ConstantLR, lr_scheduler.LinearLR, lr_scheduler.ExponentialLR, lr_scheduler.PolynomialLR),
    *(lr_scheduler.CosineAnnealingLR, lr_scheduler.CosineAnnealingWarmRestarts, lr_scheduler.ReduceLROnPlateau),
    *(lr_scheduler.CyclicLR, lr_scheduler.OneCycleLR),
)
"""They go on from the group's own `lr`, or compute it from what `scale` changes. The schedules of transformers and
diffusers are `LambdaLR`s."""


def parts(scheduler: Any) -> list[Any]:
    """The schedulers that one is made of: itself, what accelerate has wrapped, those in a sequence or a chain."""
    if scheduler is None:
        return []
    inner = getattr(scheduler, "scheduler", None)
    within = [inner] if inner is not None else getattr(scheduler, "_schedulers", None)
    return [scheduler] if within is None else [part for x in within for part in parts(x)]


def scale(scheduler: Any, groups: Sequence[dict[str, Any]], factors: Sequence[float]) -> None:
    """Multiply the rates that a scheduler will compute by a factor for each group; not the groups' `lr` of now.

    Warns once of a kind whose arithmetic is not known.
    """
    found = parts(scheduler)
    for part in found:
        for name in ("base_lrs", "max_lrs"):
            if hasattr(part, name):
                setattr(part, name, [rate * factor for rate, factor in zip(getattr(part, name), factors, strict=False)])
        if hasattr(part, "eta_min"):  # one for all groups
            part.eta_min *= min(factors)
        if not isinstance(part, KNOWN):
            warn_once(
                f"scheduler={type(part).__name__}: how it computes rates is not known here, so its next step may set "
                "the rate back; change the rate in the scheduler itself"
            )
    if any(isinstance(part, lr_scheduler.OneCycleLR) for part in found):  # it keeps its rates in the groups
        for group, factor in zip(groups, factors, strict=True):
            # A found rate is multiplied by lr / initial_lr, so there initial_lr must stay.
            for name in ("max_lr", "min_lr") if group["auto_lr"] else ("initial_lr", "max_lr", "min_lr"):
                group[name] *= factor


def highest(scheduler: Any, index: int, group: dict[str, Any]) -> float:
    """The highest rate of that group which a scheduler names itself; 0 where it names none."""
    named = [0.0]
    for part in parts(scheduler):
        if isinstance(part, lr_scheduler.OneCycleLR):
            named.append(group["max_lr"])
        elif hasattr(part, "max_lrs"):
            named.append(float(part.max_lrs[index]))
    return max(named)
