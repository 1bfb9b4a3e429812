"""Pictures of what the package measures, drawn with matplotlib's object interface: no window, no global state.

Every function returns the `matplotlib.figure.Figure` and, where a path is given, writes it there too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
