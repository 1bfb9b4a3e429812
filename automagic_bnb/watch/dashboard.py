"""A page that compares runs: one HTML file with everything in it, which opens without a network."""

from __future__ import annotations

import dataclasses
import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from automagic_bnb import files
from automagic_bnb.notices import warn_once
from automagic_bnb.watch.panels import Panel, panels_of
from automagic_bnb.watch.plots import MARKED, SMOOTHED, running_median
from automagic_bnb.watch.run_log import FILE_NAME as LOG_NAME
from automagic_bnb.watch.run_log import Run, Series, find_runs, read_run

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FILE_NAME = "dashboard.html"
MOST_POINTS = 2000
"""Of one curve, about as many as a screen has columns; of more, each stretch shows its least and its greatest."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#a6761d", "#666666", "#e6ab02", "#7570b3", "#1b1b1b")
ROW_HEIGHT = 380
"""Pixels of a row of panels."""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; \
style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>
body {{ font-family: sans-serif; margin: 1.5em; color: #222; }}
table {{ border-collapse: collapse; margin-bottom: 1em; }}
th, td {{ padding: 0.3em 0.9em; text-align: right; border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child {{ text-align: left; }}
</style>
</head>
<body>
<h1>{title}</h1>
{table}
{graphs}
</body>
</html>
"""


def write_dashboard(logdir: str | Path, out: str | Path | None = None) -> Path:
    """Write a page that compares the runs in a folder and below it, and return its path.

    A run that cannot be read is named in a warning and left out.

    The page holds its own plotly.js (about 5 MB) and forbids itself any request.

    Args:
        logdir: holds run logs, as `RunLog` and the callbacks write them.
        out: the file to write; None: `dashboard.html` in that folder.

    Raises:
        NotADirectoryError, FileNotFoundError: there is no such folder, or no run in it.
        ValueError: none of the runs can be read and has anything to draw; or `out` is a run's log, or a link.
        ImportError: plotly is not installed.

    Example:
        >>> write_dashboard("runs")
    """
    folder = Path(logdir)
    found = find_runs(folder)
    path = folder / FILE_NAME if out is None else Path(out)
    check_target(path, found)
    runs = readable_runs(found, folder)
    graphs = comparison(runs).to_html(full_html=False, include_plotlyjs=True, config={"displaylogo": False})
    title = html.escape(f"Training runs in {folder.resolve().name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as file:
        file.write(PAGE.format(title=title, table=summary_table(runs), graphs=graphs).encode("utf-8", "replace"))
    return path


def check_target(path: Path, runs: list[Path]) -> None:
    """Raise ValueError where a page written there would take the place of a run's log, or of what a link points to."""
    if path.is_symlink():
        raise ValueError(f"{path} is a link: the page would overwrite what it points to; choose another file")
    logs = (run / LOG_NAME for run in runs)
    if path.name == LOG_NAME or (path.exists() and any(path.samefile(log) for log in logs)):
        raise ValueError(f"{path} is a run's log, which the page would overwrite; choose another file")


def readable_runs(found: list[Path], folder: Path) -> list[Run]:
    """What was logged in these folders; one that cannot be read is named in a warning and left out.

    Raises:
        ValueError: none can be.
    """
    runs = []
    for path in found:
        try:
            runs.append(dataclasses.replace(read_run(path), name=run_name(path, folder)))
        except (OSError, ValueError) as e:
            warn_once(f"the run in {path} is left out, it cannot be read: {e}")
    if not runs:
        raise ValueError(f"none of the {len(found)} runs in {folder} can be read")
    return runs


def run_name(path: Path, folder: Path) -> str:
    """Its path within the folder; the folder's own name for the folder itself."""
    relative = path.relative_to(folder).as_posix()
    return folder.resolve().name if relative == "." else relative


# --- the table -------------------------------------------------------------------------------------------------------


def summary_table(runs: list[Run]) -> str:
    """A row for each run: how far it came, its loss, what it held and skipped."""
    head = ("run", "last step", "loss at the end", "lowest loss", "NaN losses", "state, MB", "skipped elements")
    rows = "".join(table_row("td", summary(run)) for run in runs)
    return f"<table>{table_row('th', head)}{rows}</table>"


def summary(run: Run) -> tuple[str, ...]:
    """The cells of a run's row. Losses are medians of the last, or of any, 21 of them."""
    empty = Series(np.zeros(0, dtype=np.int64), np.zeros(0))
    loss = run.series.get("loss", empty).values
    smooth = running_median(loss)
    end = loss[-SMOOTHED:][np.isfinite(loss[-SMOOTHED:])]
    state, skipped = (run.series.get(name, empty).values for name in ("state_bytes", "skipped_elements"))
    last_step = max((int(series.steps[-1]) for series in run.series.values()), default=None)
    return (
        run.name,
        "–" if last_step is None else f"{last_step}",
        number(np.median(end) if end.size else None),
        number(np.nanmin(smooth) if np.isfinite(smooth).any() else None),
        str(int((~np.isfinite(loss)).sum())),
        number(state[-1] * 1e-6 if state.size else None),
        number(skipped[-1] if skipped.size else None),
    )


def number(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}"


def table_row(tag: str, cells: tuple[str, ...]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"


# --- the graphs ------------------------------------------------------------------------------------------------------


def comparison(runs: list[Run]) -> Figure:
    """All panels of all runs, a colour for each run; a click in the legend hides a run everywhere.

    Raises:
        ValueError: there is nothing to draw.
        ImportError: plotly is not installed; names the extra that brings it.
    """
    panels = panels_of(runs)  # what is wrong with the runs shows without plotly too
    try:
        from plotly.subplots import make_subplots
    except ImportError as e:
        raise ImportError('the dashboard needs plotly: pip install "automagic-bnb[dashboard]"') from e
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    titles = [f"{panel.title}<br><sup>{key(panel, runs)}</sup>" for panel in panels]
    figure = make_subplots(rows, columns, subplot_titles=titles, vertical_spacing=0.32 / rows, horizontal_spacing=0.09)
    for place, panel in enumerate(panels):
        at: dict[str, Any] = {"row": place // columns + 1, "col": place % columns + 1}
        drawn = {name for run in runs for name in panel.drawn(run)}
        for index, run in enumerate(runs):
            add_run(figure, panel, run, drawn, COLOURS[index % len(COLOURS)], at)
        figure.update_xaxes(title_text="step", **at)
        figure.update_yaxes(title_text=panel.unit, **at)
        figure.update_yaxes(
            **({"type": "log", "exponentformat": "power"} if panel.logarithmic else {"rangemode": "tozero"}), **at
        )
    add_legend(figure, runs)
    figure.update_xaxes(matches="x", showticklabels=True)
    top = 120 + 25 * (len(runs) // 3)  # the buttons, and a legend of about three names a line
    figure.update_layout(
        template="plotly_white",
        height=ROW_HEIGHT * rows + top,
        hovermode="closest",
        legend={"orientation": "h", "yanchor": "bottom", "y": 1 + 0.16 / rows, "x": 0},
        margin={"t": top, "l": 70, "r": 30, "b": 60},
    )
    return figure


def key(panel: Panel, runs: list[Run]) -> str:
    """Which line is which, where a panel has several kinds."""
    drawn = {name for run in runs for name in panel.drawn(run)}
    words = {"solid": "line", "dash": "dashed", "dot": "dotted"}
    kinds: dict[str, list[str]] = {}
    for curve in panel.curves:
        if curve.metric in drawn:
            kinds.setdefault(words[panel.dash(curve, drawn)], []).append(curve.label)
    parts = [f"{kind}: {', '.join(labels)}" for kind, labels in kinds.items()]
    parts += ["×: NaN or infinite"] if any(len(lost_losses(panel, run)) for run in runs) else []
    parts += ["shaded: 10 % to 90 % of elements"] if panel.band and set(panel.band) <= drawn else []
    return "; ".join(parts) if len(parts) > 1 else ""


def lost_losses(panel: Panel, run: Run) -> np.ndarray:
    """The steps at which the loss, where this is its panel, was no number."""
    if "loss" not in panel.metrics() or "loss" not in run.series:
        return np.zeros(0, dtype=np.int64)
    steps, values = run.series["loss"]
    return steps[~np.isfinite(values)]


def add_run(figure: Figure, panel: Panel, run: Run, drawn: set[str], colour: str, at: dict[str, Any]) -> None:
    """One run's curves in one panel, in which these metrics are drawn of any run."""
    series = panel.drawn(run)
    common = {"legendgroup": run.name, "showlegend": False, "name": run.name}
    low, high = (series.get(name) for name in panel.band or ("", ""))
    if low is not None and high is not None and np.array_equal(low.steps, high.steps):
        keep = thinned(high)
        edge = {"width": 0, "color": colour}
        for (steps, values), fill in ((low, {}), (high, {"fill": "tonexty", "fillcolor": faint(colour)})):
            figure.add_scatter(
                x=steps[keep], y=values[keep], line=edge, mode="lines", hoverinfo="skip", **fill, **common, **at
            )
    for curve in panel.curves:
        if curve.metric not in series:
            continue
        steps, values = series[curve.metric]
        line = {
            "color": colour,
            "dash": panel.dash(curve, drawn),
            "width": 2,
            "shape": "hv" if panel.stepped else "linear",
        }
        hover = f"{html.escape(run.name)}<br>{curve.label} %{{y:.4g}}<br>step %{{x}}<extra></extra>"
        if curve.metric == "loss" and len(steps) >= 10 * SMOOTHED:
            keep, thin = thinned(series[curve.metric]), {**line, "width": 1}
            figure.add_scatter(
                x=steps[keep], y=values[keep], line=thin, mode="lines", opacity=0.3, hoverinfo="skip", **common, **at
            )
            values = running_median(values)
        keep = thinned(Series(steps, values))
        mode = "lines+markers" if len(steps) <= MARKED else "lines"
        figure.add_scatter(x=steps[keep], y=values[keep], line=line, hovertemplate=hover, mode=mode, **common, **at)
    lost = lost_losses(panel, run)
    if len(lost):  # at the bottom, where the curve has a gap; of very many some, evenly
        lost = lost[:: -(-len(lost) // MOST_POINTS)]
        bottom = min([0.0, *(values[np.isfinite(values)].min() for _, values in series.values())])
        hover = f"{html.escape(run.name)}<br>loss NaN or infinite<br>step %{{x}}<extra></extra>"
        cross = {"symbol": "x", "size": 7, "color": colour}
        figure.add_scatter(
            x=lost, y=np.full(len(lost), bottom), mode="markers", marker=cross, hovertemplate=hover, **common, **at
        )


def add_legend(figure: Figure, runs: list[Run]) -> None:
    """An entry for each run, whatever it has to draw."""
    for index, run in enumerate(runs):
        line = {"color": COLOURS[index % len(COLOURS)], "width": 3}
        figure.add_scatter(
            x=[None], y=[None], mode="lines", line=line, name=html.escape(run.name), legendgroup=run.name, row=1, col=1
        )


def faint(colour: str) -> str:
    """The colour, nearly transparent."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


def thinned(series: Series) -> np.ndarray:
    """Indices of at most `MOST_POINTS` points: all, or of equal stretches the least and the greatest."""
    values = series.values
    if len(values) <= MOST_POINTS:
        return np.arange(len(values))
    kept = []
    for stretch in np.array_split(np.arange(len(values)), MOST_POINTS // 2):
        finite = stretch[np.isfinite(values[stretch])]
        at = finite if finite.size else stretch
        kept += [at[np.argmin(values[at])], at[np.argmax(values[at])]]
    return np.unique(kept)
