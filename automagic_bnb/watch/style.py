"""How every picture looks: as wide as a phone, in colours that any eye tells apart.

Drawn with matplotlib's object interface: no window, no global state.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1b1b1b"),
    *("#b66dff", "#882255", "#606c38"),
)
"""Okabe and Ito's, without the yellow that white paper swallows, and three more that keep away from them with any
colour vision."""
MARKERS = "osD^vPX"
LINES = ("-", "--", "-.")
WIDTH = 5.0
"""Inches of every picture: on a phone, 390 pixels wide, letters of 10 points are 11 pixels high."""
DPI = 200
SHORT_SCALE = 40.0
"""Of a logarithmic scale's end over its beginning, from which powers of ten are numbers enough."""
TITLE_WIDTH = 46
"""Letters of a line of a title."""


def new_figure(title: str, height: float) -> Figure:
    """An empty figure of that height in inches.

    Raises:
        ImportError: matplotlib is not installed; names the extra that brings it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError('pictures need matplotlib: pip install "automagic-bnb[plots]"') from e
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    if title:
        figure.suptitle("\n".join(textwrap.wrap(title, TITLE_WIDTH)), fontsize=12)
    return figure


def saved(figure: Figure, path: str | Path | None, description: str = "") -> Figure:
    """The figure, written to the path if there is one; the suffix (.png, .svg, .pdf) is the format.

    Args:
        description: to be kept in the file, which must be a .png.
    """
    if path is not None:
        figure.savefig(path, dpi=DPI, metadata={"Description": description} if description else None)
    return figure


def line_style(place: int) -> dict[str, Any]:
    """Colour and dashes of the line at this place, no two alike among the first thirty."""
    return {"color": COLOURS[place % len(COLOURS)], "ls": LINES[place % len(LINES)]}


def point_style(place: int) -> dict[str, Any]:
    """Colour and marker at this place, no two alike among the first seventy."""
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}


def legend_below(figure: Figure | SubFigure, axes: Axes, title: str | None = None) -> None:
    """A picture's one legend, where it covers nothing: that of these axes, under all of them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, title=title)


def scale_of_rates(axes: Axes) -> None:
    """A logarithmic scale of rates below these axes, numbered at 1, 2 and 5 where it is short, else at 1 alone."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < SHORT_SCALE * low else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.0e}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
