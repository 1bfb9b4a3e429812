"""Which metrics of a run are drawn together, for the picture of a run and for the dashboard of several."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from automagic_bnb.run_log import Run, Series


@dataclass(frozen=True)
class Curve:
    """One metric in a panel."""

    metric: str
    label: str
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Metrics with one axis."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    band: tuple[str, str] | None = None
    """Metrics between which is filled, behind the curves."""
    logarithmic: bool = False
    scale: float = 1.0
    """What a metric is multiplied by to be in the unit."""
    stepped: bool = False
    """A value stays until the next one: what lies between two was never there."""

    def metrics(self) -> list[str]:
        return [curve.metric for curve in self.curves] + list(self.band or ())

    def drawn(self, run: Run) -> dict[str, Series]:
        """The series that this panel has of a run, in its unit; those without a finite value are left out."""
        found = {name: run.series[name] for name in self.metrics() if name in run.series}
        return {
            name: Series(steps, values * self.scale)
            for name, (steps, values) in found.items()
            if self._drawable(values).any()
        }

    def dash(self, curve: Curve, drawn: Collection[str]) -> str:
        """Bounds and the like are dashed, of the others the first that is drawn is solid, and the rest are dotted."""
        if curve.dashed:
            return "dash"
        first = next(x for x in self.curves if not x.dashed and x.metric in drawn)
        return "solid" if curve == first else "dot"

    def _drawable(self, values: np.ndarray) -> np.ndarray:
        return np.isfinite(values) & ((values > 0) | (not self.logarithmic))


PANELS = (
    Panel("Loss", "loss", (Curve("loss", "training"), Curve("eval_loss", "validation", dashed=True))),
    Panel(
        "Learning rate",
        "rate",
        (
            Curve("lr/mean", "mean of the elements"),
            Curve("learning_rate", "schedule"),
            Curve("lr/bound_min", "min_lr", dashed=True),
            Curve("lr/bound_max", "max_lr", dashed=True),
        ),
        band=("lr/p10", "lr/p90"),
        logarithmic=True,
    ),
    Panel("Optimizer state", "MB", (Curve("state_bytes", "state"),), scale=1e-6, stepped=True),
    Panel("Torque", "cosine; share of blocks", (Curve("torque", "mean cosine"), Curve("share_damped", "share damped"))),
    Panel("Edge strength", "mean over blocks", (Curve("edge_strength", "edge strength"),)),
    Panel("Skipped elements", "elements so far", (Curve("skipped_elements", "not finite"),), stepped=True),
)


def panels_of(runs: list[Run]) -> list[Panel]:
    """Those that have something to draw.

    Raises:
        ValueError: none has.
    """
    found = [panel for panel in PANELS if any(panel.drawn(run) for run in runs)]
    if not found:
        known = ", ".join(name for panel in PANELS for name in panel.metrics())
        names = ", ".join(repr(run.name) for run in runs)
        raise ValueError(f"nothing to draw of {names}: no finite value was logged of any of {known}")
    return found
