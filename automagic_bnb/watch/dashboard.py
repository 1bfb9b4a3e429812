"""A page that compares runs: one HTML file with everything in it, which opens without a network."""

from __future__ import annotations

import dataclasses
import html
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from automagic_bnb import files
from automagic_bnb.notices import warn_once
from automagic_bnb.run_log import FILE_NAME as LOG_NAME
from automagic_bnb.run_log import Run, Series, find_runs, read_run
from automagic_bnb.watch.panels import Panel, panels_of
from automagic_bnb.watch.plots import MARKED, SMOOTHED, SMOOTHED_FROM, running_median, window_of
from automagic_bnb.watch.style import COLOURS

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
FILE_NAME = "dashboard.html"
MOST_POINTS = 2000
"""Of one curve, about as many as a screen has columns; of more, each stretch shows its least and its greatest."""
FEW_RUNS = 5
"""Runs up to which what lies behind the curves is drawn, too: every single loss, and the range of rates."""
ROW_HEIGHT = 380
"""Pixels of a row of panels."""
NARROW = 900
"""Pixels of the page's width below which panels stand one below the other."""
KEY_WIDTH = 46
"""Letters of a line below a panel's title: what a phone shows."""
GRAPHS = "graphs"
"""The id of the element with the panels."""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; \
style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<h1>{title}</h1>
<p>A head of the table sorts by its column; a run's name hides and shows its curves.</p>
<div class="wide" tabindex="0" role="region" aria-label="runs">{table}</div>
{graphs}
<script>
{script}
</script>
</body>
</html>
"""
STYLE = """
body { font-family: sans-serif; margin: 1em; color: #222; background: #fff; }
h1 { font-size: 1.4em; overflow-wrap: anywhere; }
.wide { overflow-x: auto; max-height: 60vh; margin-bottom: 1em; }
@media (min-width: 700px) { .wide { max-height: 80vh; } }
table { border-collapse: collapse; font-size: 0.9em; }
th, td { padding: 0.25em 0.6em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { position: sticky; top: 0; background: #fff; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; max-width: 45vw; }
button { font: inherit; color: inherit; background: none; border: 0; padding: 0.2em 0; cursor: pointer; }
td button { display: flex; align-items: center; text-align: left; white-space: normal; overflow-wrap: anywhere;
  width: max-content; max-width: 40vw; }
button:focus-visible, .wide:focus-visible { outline: 2px solid #0072b2; }
button[aria-pressed="false"] { opacity: 0.35; }
th[aria-sort="ascending"] button::after { content: " \\25b2"; }
th[aria-sort="descending"] button::after { content: " \\25bc"; }
.swatch { flex: none; width: 1.4em; height: 0.5em; margin-right: 0.5em; }
"""
SCRIPT = """
const graphs = document.getElementById("graphs"), table = document.querySelector("table");
// Panels two abreast where there is room, else one below the other: domains of the axes, and their titles with them.
function arrange() {
  const {panels, row, top, narrow} = graphs.layout.meta;
  const columns = Math.min(panels, document.documentElement.clientWidth < narrow ? 1 : 2);
  const rows = Math.ceil(panels / columns), height = row * rows + top, gap = 150 / height, change = {height};
  if (graphs.dataset.columns === String(columns)) return;
  graphs.dataset.columns = columns;
  for (let i = 0; i < panels; i++) {
    const n = i ? i + 1 : "", at = i % columns, down = Math.floor(i / columns);
    const x = columns === 1 ? [0, 1] : at ? [0.545, 1] : [0, 0.455];
    const each = (1 - gap * (rows - 1)) / rows, high = 1 - down * (each + gap);
    change[`xaxis${n}.domain`] = x;
    change[`yaxis${n}.domain`] = [Math.max(0, high - each), high];
    change[`annotations[${i}].x`] = (x[0] + x[1]) / 2;
    change[`annotations[${i}].y`] = high;
  }
  Plotly.relayout(graphs, change);
}
function toggle(button) {
  const shown = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", shown);
  const own = graphs.data.flatMap((trace, i) => trace.legendgroup === button.dataset.run ? [i] : []);
  if (own.length) Plotly.restyle(graphs, {visible: shown}, own);
}
function sort(head) {
  const column = [...head.parentNode.children].indexOf(head), up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => row.children[column].dataset.value, number = text => text === "" ? Infinity : Number(text);
  const byName = (a, b) => a.localeCompare(b, undefined, {numeric: true});
  const body = table.tBodies[0], order = column ? (a, b) => number(a) - number(b) || 0 : byName;
  [...body.rows].sort((a, b) => (up ? 1 : -1) * order(key(a), key(b))).forEach(row => body.append(row));
}
table.addEventListener("click", event => {
  const button = event.target.closest("button");
  if (button) button.dataset.run === undefined ? sort(button.parentNode) : toggle(button);
});
window.addEventListener("resize", arrange);
arrange();
"""


def write_dashboard(
    logdir: str | Path, out: str | Path | None = None, *, progress: Progress = lambda items, title: items
) -> Path:
    """Write a page that compares the runs in a folder and below it, and return its path.

    A run that cannot be read is named in a warning and left out.

    The page holds its own plotly.js (about 5 MB) and forbids itself any request.

    Args:
        logdir: holds run logs, as `RunLog` and the callbacks write them.
        out: the file to write; None: `dashboard.html` in that folder.
        progress: takes what is to be done and a word for it, and gives it back one by one; the command's draws a bar.

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
    runs = readable_runs(progress(found, "reading"), folder)
    config = {"displaylogo": False, "responsive": True}
    graphs = comparison(runs, progress).to_html(full_html=False, include_plotlyjs=True, config=config, div_id=GRAPHS)
    title = html.escape(f"Training runs in {folder.resolve().name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = {"style": STYLE, "script": SCRIPT, "table": summary_table(runs), "graphs": graphs}
    with files.replacing(path) as file:
        file.write(PAGE.format(title=title, **parts).encode("utf-8", "replace"))
    return path


def check_target(path: Path, runs: list[Path]) -> None:
    """Raise ValueError where a page written there would take the place of a run's log, or of what a link points to."""
    files.check_no_link(path, "the page")
    logs = (run / LOG_NAME for run in runs)
    if path.name == LOG_NAME or (path.exists() and any(path.samefile(log) for log in logs)):
        raise ValueError(f"{path} is a run's log, which the page would overwrite; choose another file")


def readable_runs(found: Iterable[Path], folder: Path) -> list[Run]:
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
        raise ValueError(f"none of the runs in {folder} can be read")
    return runs


def run_name(path: Path, folder: Path) -> str:
    """Its path within the folder; the folder's own name for the folder itself."""
    relative = path.relative_to(folder).as_posix()
    return folder.resolve().name if relative == "." else relative


# --- the table -------------------------------------------------------------------------------------------------------


def summary_table(runs: list[Run]) -> str:
    """A row for each run: its curves' colour, how far it came, its loss, what it held and skipped."""
    names = ("run", "loss at the end", "lowest loss", "last step", "NaN losses", "state, MB", "skipped elements")
    head = "".join(f'<th scope="col"><button type="button">{name}</button></th>' for name in names)
    rows = "".join(table_row(run, colour_of(index)) for index, run in enumerate(runs))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def table_row(run: Run, colour: str) -> str:
    """Its cells, with the value that each is sorted by; the first hides and shows the run."""
    name, *cells = summary(run)
    escaped = html.escape(name)
    swatch = f'<span class="swatch" style="background:{colour}"></span>'
    button = (
        f'<button type="button" aria-pressed="true" data-run="{escaped}" title="{escaped}">{swatch}{escaped}</button>'
    )
    values = "".join(f'<td data-value="{cell.replace("–", "")}">{cell}</td>' for cell in cells)
    return f'<tr><td data-value="{escaped}">{button}</td>{values}</tr>\n'


def colour_of(index: int) -> str:
    """Of the run at this place: twenty of them, the second ten being paler."""
    hue, pale = COLOURS[index % len(COLOURS)], index // len(COLOURS) % 2
    if not pale:
        return hue
    return "#" + "".join(f"{(int(hue[i : i + 2], 16) + 255) // 2:02x}" for i in (1, 3, 5))


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
        number(np.median(end) if end.size else None),
        number(np.nanmin(smooth) if np.isfinite(smooth).any() else None),
        "–" if last_step is None else f"{last_step}",
        str(int((~np.isfinite(loss)).sum())),
        number(state[-1] * 1e-6 if state.size else None),
        number(skipped[-1] if skipped.size else None),
    )


def number(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}"


# --- the graphs ------------------------------------------------------------------------------------------------------


def comparison(runs: list[Run], progress: Progress = lambda items, title: items) -> Figure:
    """All panels of all runs, a colour for each run; the table of the page is their legend.

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
    titles = [f"<b>{panel.title}</b><br><span style='font-size:11px'>{key(panel, runs)}</span>" for panel in panels]
    figure = make_subplots(rows, columns, subplot_titles=titles, vertical_spacing=0.32 / rows, horizontal_spacing=0.09)
    for place, panel in enumerate(progress(panels, "drawing")):
        at: dict[str, Any] = {"row": place // columns + 1, "col": place % columns + 1}
        drawn = {name for run in runs for name in panel.drawn(run)}
        for index, run in enumerate(runs):
            if len(runs) <= FEW_RUNS:
                add_background(figure, panel, run, colour_of(index), at)
            add_run(figure, panel, run, drawn, colour_of(index), at)
        figure.update_xaxes(title_text="step", **at)
        scale = {"type": "log", "exponentformat": "e", "dtick": 1} if panel.logarithmic else {"rangemode": "tozero"}
        figure.update_yaxes(title_text=panel.unit, **scale, **at)
    figure.update_xaxes(matches="x", showticklabels=True)
    figure.update_yaxes(automargin=True)
    figure.update_annotations(yanchor="bottom", font_size=14)
    top = 110  # the buttons, and the first row's titles
    figure.update_layout(
        template="plotly_white",
        autosize=True,
        height=ROW_HEIGHT * rows + top,
        hovermode="closest",
        showlegend=False,
        margin={"t": top, "l": 10, "r": 10, "b": 60},
        meta={"panels": len(panels), "row": ROW_HEIGHT, "top": top, "narrow": NARROW},  # for the script
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
    shaded = panel.band and set(panel.band) <= drawn and len(runs) <= FEW_RUNS
    parts += ["shaded: 10 % to 90 % of elements"] if shaded else []
    return "<br>".join(textwrap.wrap("; ".join(parts), KEY_WIDTH)) if len(parts) > 1 else ""


def lost_losses(panel: Panel, run: Run) -> np.ndarray:
    """The steps at which the loss, where this is its panel, was no number."""
    if "loss" not in panel.metrics() or "loss" not in run.series:
        return np.zeros(0, dtype=np.int64)
    steps, values = run.series["loss"]
    return steps[~np.isfinite(values)]


def add_background(figure: Figure, panel: Panel, run: Run, colour: str, at: dict[str, Any]) -> None:
    """What lies behind one run's curves: its panel's band, and every loss where the curve is a running median."""
    series = panel.drawn(run)
    common = {"mode": "lines", "hoverinfo": "skip", **of_run(run)}
    low, high = (series.get(name) for name in panel.band or ("", ""))
    if low is not None and high is not None and np.array_equal(low.steps, high.steps):
        keep = thinned(high)
        edge = {"width": 0, "color": colour}
        for (steps, values), fill in ((low, {}), (high, {"fill": "tonexty", "fillcolor": faint(colour)})):
            figure.add_scatter(x=steps[keep], y=values[keep], line=edge, **fill, **common, **at)
    if "loss" in series and is_smoothed("loss", series["loss"]):
        steps, values = series["loss"]
        keep, thin = thinned(series["loss"]), {"color": colour, "width": 1}
        figure.add_scatter(x=steps[keep], y=values[keep], line=thin, opacity=0.3, **common, **at)


def of_run(run: Run) -> dict[str, Any]:
    """What all traces of a run have, by which the page's script finds them."""
    return {"legendgroup": run.name, "showlegend": False, "name": run.name}


def is_smoothed(metric: str, series: Series) -> bool:
    """Whether its curve is a running median."""
    return metric == "loss" and len(series.steps) >= SMOOTHED_FROM


def add_run(figure: Figure, panel: Panel, run: Run, drawn: set[str], colour: str, at: dict[str, Any]) -> None:
    """One run's curves in one panel, in which these metrics are drawn of any run."""
    series = panel.drawn(run)
    common = of_run(run)
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
        if is_smoothed(curve.metric, series[curve.metric]):
            values = running_median(values, window_of(values))
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
