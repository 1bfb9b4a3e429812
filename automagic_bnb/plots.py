"""Pictures of what the package measures, drawn with matplotlib's object interface: no window, no global state.

Every function returns the `matplotlib.figure.Figure` and, where a path is given, writes it there too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from automagic_bnb.spectrum import Spectrum

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
"""Blue, vermilion, green and purple, told apart with any colour vision."""
DPI = 150


def new_figure(title: str, width: float = 9, height: float = 5) -> Figure:
    """An empty figure of that size in inches.

    Raises:
        ImportError: matplotlib is not installed; names the extra that brings it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError('pictures need matplotlib: pip install "automagic-bnb[demo]"') from e
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=14)
    return figure


def saved(figure: Figure, path: str | Path | None) -> Figure:
    """The figure, written to the path if there is one; the suffix (.png, .svg, .pdf) is the format."""
    if path is not None:
        figure.savefig(path, dpi=DPI)
    return figure


def plot_spectrum(spectrum: Spectrum, path: str | Path | None = None) -> Figure:
    """Power over radial frequency, before and after the optimizer's frequency filter, with the cut-off.

    Args:
        spectrum: what `spectrum()` returned.
        path: where to write the picture, too.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(f"Spatial spectrum of a tensor [{', '.join(map(str, spectrum.shape))}]")
    axes = figure.subplots()
    curves = (
        ("before the filter", spectrum.power_before, spectrum.high_share_before, "-"),
        (
            f"after, frequency_penalty {spectrum.frequency_penalty:g}",
            spectrum.power_after,
            spectrum.high_share_after,
            "--",
        ),
    )
    for colour, (label, power, share, style) in zip(COLOURS, curves, strict=False):
        seen = power > 0  # not in empty bins (NaN), nor where a logarithm has nothing to show
        label += f"; {share:.2%} of the energy above the cut-off" if spectrum.energy_before > 0 else ""
        axes.plot(spectrum.radius[seen], power[seen], style, color=colour, lw=2, marker="o", ms=4, label=label)
    axes.axvline(spectrum.cutoff, color="black", ls=":", lw=1.5, label=f"cut-off {spectrum.cutoff:g}")
    axes.set_xlim(0, 1)
    if spectrum.energy_before > 0:
        axes.set_yscale("log")
    else:
        axes.set_title("all elements are 0", fontsize=12)
    axes.set_xlabel("spatial frequency (0: constant, 1: chequerboard)")
    axes.set_ylabel("mean power of a mode")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center")
    return saved(figure, path)


def plot_singular_values(
    values: Mapping[str, Tensor],
    history: Mapping[str, Mapping[int, float]] | None = None,
    path: str | Path | None = None,
    title: str = "Singular values",
) -> Figure:
    """Singular values by index, and beside them the effective rank over the steps where a history is given.

    Args:
        values: by label, what `singular_values` returned, [n].
        history: by label, the effective rank by step. Ranks of 0, of matrices still all zero, are left out.
        path: where to write the picture, too.
        title: what stands above it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(title, width=13 if history else 9)
    panels = figure.subplots(1, 2 if history else 1, squeeze=False)[0]
    for place, (label, sigma) in enumerate(values.items()):
        sigma = sigma.detach().cpu()
        index = range(1, len(sigma) + 1)
        panels[0].plot(index, sigma, marker="o", ms=4, lw=2, label=label, **line_style(place))
    panels[0].set_xlabel("index")
    panels[0].set_ylabel("singular value")
    panels[0].set_ylim(bottom=0)
    finish(panels[0])
    if history:
        for place, (label, by_step) in enumerate(history.items()):
            ranks = {step: rank for step, rank in by_step.items() if rank > 0}
            panels[1].plot(list(ranks), list(ranks.values()), marker="o", ms=4, lw=2, label=label, **line_style(place))
        panels[1].set_xlabel("step")
        panels[1].set_ylabel("effective rank")
        finish(panels[1])
    return saved(figure, path)


def line_style(place: int) -> dict[str, str]:
    """Colour and dashes of the line at this place, no two alike among the first eight."""
    return {"color": COLOURS[place % len(COLOURS)], "ls": ("-", "--")[place // len(COLOURS) % 2]}


def finish(axes: Axes) -> None:
    """What every panel of lines has: a legend and a faint grid."""
    axes.legend()
    axes.grid(alpha=0.3)
