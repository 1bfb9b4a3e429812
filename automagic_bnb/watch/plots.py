"""Pictures of what the package measures, in the style that all pictures share.

Every function returns the `matplotlib.figure.Figure` and, where a path is given, writes it there too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from automagic_bnb.run_log import Run, Series, as_run
from automagic_bnb.watch.panels import Curve, Panel, panels_of
from automagic_bnb.watch.style import COLOURS, legend_below, new_figure, point_style, saved

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from automagic_bnb.watch.spectrum import Spectrum

SMOOTHED = 21
"""Losses in a running median, of fewer where there are few."""
SMOOTHED_FROM = 50
"""Losses from which on their running median is drawn."""

DASHES = {"solid": "-", "dash": "--", "dot": ":"}
MARKED = 30
"""Values up to which each gets a marker; a single one between gaps would not show otherwise."""


def plot_spectrum(spectrum: Spectrum, path: str | Path | None = None) -> Figure:
    """Power over radial frequency, before and after the optimizer's frequency filter, with the cut-off.

    Args:
        spectrum: what `spectrum()` returned.
        path: where to write the picture, too.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(f"Spatial spectrum of a tensor [{', '.join(map(str, spectrum.shape))}]", height=4.8)
    axes = figure.subplots()
    curves = (
        ("before the filter", spectrum.power_before, spectrum.high_share_before, "-"),
        ("after", spectrum.power_after, spectrum.high_share_after, "--"),
    )
    for place, (label, power, share, style) in enumerate(curves):
        seen = power > 0  # not in empty bins (NaN), nor where a logarithm has nothing to show
        label += f": {share:.2%} of the energy above the cut-off" if spectrum.energy_before > 0 else ""
        axes.plot(spectrum.radius[seen], power[seen], ls=style, lw=2, ms=4, label=label, **point_style(place))
    axes.axvline(spectrum.cutoff, color="black", ls=":", lw=1.5, label=f"cut-off {spectrum.cutoff:g}")
    axes.set_xlim(0, 1)
    if spectrum.energy_before > 0:
        axes.set_yscale("log")
    else:
        axes.set_title("all elements are 0", fontsize=12)
    axes.set_xlabel("spatial frequency (0: constant, 1: chequerboard)")
    axes.set_ylabel("mean power of a mode")
    axes.grid(alpha=0.3)
    legend_below(figure, axes, title=f"frequency_penalty {spectrum.frequency_penalty:g}")
    return saved(figure, path)


def plot_singular_values(
    values: Mapping[str, Tensor],
    history: Mapping[str, Mapping[int, float]] | None = None,
    path: str | Path | None = None,
    title: str = "Singular values",
) -> Figure:
    """Singular values by index, and below them the effective rank over the steps where a history is given.

    Args:
        values: by label, what `singular_values` returned, [n].
        history: by label, the effective rank by step. Ranks of 0, of matrices still all zero, are left out.
        path: where to write the picture, too.
        title: what stands above it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(title, height=7.5 if history else 4.5)
    panels = figure.subplots(2 if history else 1, 1, squeeze=False)[:, 0]
    for place, (label, sigma) in enumerate(values.items()):
        sigma = sigma.detach().cpu()
        panels[0].plot(range(1, len(sigma) + 1), sigma, ms=4, lw=2, label=label, **point_style(place))
    panels[0].set_xlabel("index")
    panels[0].set_ylabel("singular value")
    finish(panels[0])
    if history:
        for place, (label, by_step) in enumerate(history.items()):
            ranks = {step: rank for step, rank in by_step.items() if rank > 0}
            panels[1].plot(list(ranks), list(ranks.values()), ms=4, lw=2, label=label, **point_style(place))
        panels[1].set_xlabel("step")
        panels[1].set_ylabel("effective rank")
        finish(panels[1])
    legend_below(figure, panels[-1])
    return saved(figure, path)


def plot_training(
    run_or_history: Run | str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]],
    path: str | Path | None = None,
    title: str = "",
) -> Figure:
    """A run at a glance: loss, learning rates, state memory, torque, edges and skipped elements over the steps.

    One panel stands below the other. Of the rates, the mean, the range from the 10th to the 90th
    percentile, and the bounds are drawn. What was not logged is left out. A long loss is drawn with its running median.

    Args:
        run_or_history: a run, the folder of one (as `RunLog` and the callbacks write it), records with a "step" each
            (Hugging Face's `trainer.state.log_history`), or sequences by name. The names are those of `get_metrics`,
            and "loss", "eval_loss", "learning_rate", "state_bytes", "lr/bound_min" and "lr/bound_max".
        path: where to write the picture, too.
        title: what stands above it, in place of the run's name.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: nothing of this was logged.
        ImportError: matplotlib is not installed.
    """
    run = as_run(run_or_history)
    panels = panels_of([run])
    figure = new_figure(title or run.name, height=0.5 + 2.7 * len(panels))
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        draw_panel(axes, panel, run)
    return saved(figure, path)


def draw_panel(axes: Axes, panel: Panel, run: Run) -> None:
    """The curves of one panel over its band."""
    series = panel.drawn(run)
    low, high = (series.get(name) for name in panel.band or ("", ""))
    if low is not None and high is not None and np.array_equal(low.steps, high.steps):
        axes.fill_between(low.steps, low.values, high.values, color=COLOURS[0], alpha=0.25, lw=0, label="10 % to 90 %")
    for place, curve in enumerate(curve for curve in panel.curves if curve.metric in series):
        style = {"color": COLOURS[place], "ls": DASHES[panel.dash(curve, series)]}
        style["ds"] = "steps-post" if panel.stepped else "default"
        draw_curve(axes, curve, series[curve.metric], style)
    axes.set_title(panel.title, fontsize=12)
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    axes.locator_params(axis="x", integer=True)
    if panel.logarithmic:
        axes.set_yscale("log")
    else:
        set_range(axes, np.concatenate([values[np.isfinite(values)] for _, values in series.values()]))
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1] not in ([], [panel.curves[0].label]):
        axes.legend(fontsize=9)


def set_range(axes: Axes, values: np.ndarray) -> None:
    """From 0 where nothing is negative; and not up to a few values that would leave the others no room."""
    if (values < 0).any():
        return
    ordinary = np.percentile(values, 99)
    cut = values.max() > 5 * ordinary > 0
    axes.set_ylim(bottom=0, top=2 * ordinary if cut else None if values.any() else 1)


def draw_curve(axes: Axes, curve: Curve, series: Series, style: dict[str, Any]) -> None:
    """One metric; of a loss also where it is no number, and of a long one the running median."""
    steps, values = series
    label, is_loss = curve.label, curve.metric == "loss"
    if is_loss and len(steps) >= SMOOTHED_FROM:
        axes.plot(steps, values, color=style["color"], lw=0.8, alpha=0.35)
        label, values = f"{label}, running median", running_median(values, window_of(values))
    marker = "o" if len(steps) <= MARKED else ""
    axes.plot(steps, values, lw=1.8, marker=marker, ms=4, label=label, **style)
    lost = steps[~np.isfinite(series.values)]
    if is_loss and len(lost):
        at_the_bottom = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.plot(lost, np.full(len(lost), 0.02), "x", color="#c00000", label="NaN or infinite", **at_the_bottom)


def window_of(values: np.ndarray) -> int:
    """How many values a running median that is drawn covers: a fifth of them, `SMOOTHED` at most."""
    return min(SMOOTHED, 2 * (len(values) // 10) + 1)


def running_median(values: np.ndarray, window: int = SMOOTHED) -> np.ndarray:
    """The median of the finite ones among the values around each; NaN where the value itself is not finite."""
    half = window // 2
    if not len(values):
        return np.zeros(0)
    finite = np.where(np.isfinite(values), values, np.nan)
    stretches = np.lib.stride_tricks.sliding_window_view(np.pad(finite, half, constant_values=np.nan), 2 * half + 1)
    medians = np.full(len(values), np.nan)
    medians[~np.isnan(finite)] = np.nanmedian(stretches[~np.isnan(finite)], axis=1)
    return medians


def finish(axes: Axes) -> None:
    """What every panel over counts has: whole numbers below it, nothing below 0, and a faint grid."""
    axes.locator_params(axis="x", integer=True)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
