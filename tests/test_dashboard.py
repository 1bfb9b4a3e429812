"""The dashboard: what is in the page, that a browser draws it and asks nobody for anything, and clear errors."""

from __future__ import annotations

import html.parser
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from browser import BROWSER, Browser

from automagic_bnb import Automagic8bit, RunLog, training_metrics, write_dashboard
from automagic_bnb.command import cli
from automagic_bnb.run_log import Run, Series, read_run
from automagic_bnb.watch.dashboard import FEW_RUNS, MOST_POINTS, colour_of, comparison, run_name, summary, thinned
from automagic_bnb.watch.panels import PANELS
from automagic_bnb.watch.style import COLOURS

pytest.importorskip("plotly", reason="plotly is not installed: pip install 'automagic-bnb[dashboard]'")

needs_a_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
HOSTILE = '<img src=x onerror="document.title=1"> & co'


def log_run(folder: Path, tools: Any, steps: int = 12, **options: Any) -> Path:
    """A real run, with its metrics at every second step."""
    parameters = tools.parameters((40, 60), (16, 300))
    opt = Automagic8bit(parameters, **options)
    with RunLog(folder) as log:
        for step in range(steps):
            tools.train(opt, parameters, range(step, step + 1))
            log.log(step, {"loss": 2 / (1 + step), **(training_metrics(opt) if step % 2 == 0 else {})})
    return folder


def log_losses(folder: Path, losses: Any) -> Path:
    with RunLog(folder) as log:
        for step, loss in enumerate(losses):
            log.log(step, {"loss": loss})
    return folder


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text outside of scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("script", "style") and data.strip():
            self.text.append(data.strip())


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory, tools: Any) -> Path:
    """Three runs, one of them two folders down."""
    folder = tmp_path_factory.mktemp("runs")
    log_run(folder / "given", tools, lr=1e-3)
    log_run(folder / "deep" / "found", tools)
    log_losses(folder / HOSTILE, [3.0, math.nan, 1.0])
    return folder


@pytest.fixture(scope="module")
def page(logdir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dashboard(logdir, tmp_path_factory.mktemp("page") / "new" / "page.html")


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_refers_to_nothing_outside(page: Path) -> None:
    """No tag loads anything; the scripts are inside; and the page forbids itself any request."""
    tags = Page(page).tags
    loading = [(tag, attrs) for tag, attrs in tags if tag == "link" or {"src", "href"} & set(attrs)]
    assert loading == []
    assert "script" in [tag for tag, _ in tags]
    (policy,) = [attrs["content"] for tag, attrs in tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert "*" not in policy


def test_the_table_has_a_row_for_each_run(page: Path) -> None:
    """Names are text, whatever they look like."""
    text = Page(page).text
    assert [name for name in text if name in ("given", "deep/found", HOSTILE)] == sorted(
        ["given", "deep/found", HOSTILE]
    )
    at = text.index(HOSTILE)
    assert text[at : at + 7] == [HOSTILE, "2", "2", "2", "1", "–", "–"]  # both losses, the step, how many NaN


def test_the_curves_are_what_was_logged(logdir: Path) -> None:
    """Every series of every run, in its panel's unit, as plotly is given it."""
    runs = [read_run(logdir / name) for name in ("given", "deep/found")]
    figure: Any = comparison(runs)
    drawn = [
        (t.legendgroup, list(t.x), np.asarray(t.y, dtype=float).tolist()) for t in figure.data if t.x[0] is not None
    ]
    count = 0
    for run in runs:
        for panel in PANELS:
            for name, (steps, values) in panel.drawn(run).items():
                count += 1
                assert (run.name, steps.tolist(), values.tolist()) in drawn, name
    assert count == len(drawn) > 20
    assert {t.line.color for t in figure.data} == set(COLOURS[:2])
    assert not figure.layout.showlegend  # the table is the legend


def test_lost_losses_are_marked() -> None:
    """Where and whose, at the bottom of the panel; a run without any has no mark, and few marks stand for very many."""
    lossy = np.array([3.0, math.nan, 2.0, math.inf])
    runs = [
        Run("whole", {"loss": Series(np.arange(4), np.ones(4))}),
        Run("lossy", {"loss": Series(np.arange(4), lossy)}),
        Run("all", {"loss": Series(np.arange(9000), np.full(9000, math.nan))}),
        Run("below 0", {"loss": Series(np.arange(3), np.array([-1.0, -5.0, math.nan]))}),
    ]
    figure: Any = comparison(runs)
    marks = {t.legendgroup: t for t in figure.data if t.mode == "markers"}
    assert set(marks) == {"lossy", "all", "below 0"}
    assert (list(marks["lossy"].x), list(marks["lossy"].y)) == ([1, 3], [0, 0])
    assert marks["lossy"].marker.color == COLOURS[1]
    assert list(marks["below 0"].y) == [-5]
    assert 1000 < len(marks["all"].x) <= MOST_POINTS
    assert "×: NaN or infinite" in figure.layout.annotations[0].text
    assert "×" not in str(comparison(runs[:1]).layout)  # pyright: ignore[reportAttributeAccessIssue]


def test_what_stays_until_it_changes_is_drawn_in_steps() -> None:
    names = ("state_bytes", "skipped_elements", "torque", "loss")
    figure: Any = comparison([Run("a", {name: Series(np.arange(2), np.array([0.5, 0.25])) for name in names})])
    shapes = [t.line.shape for t in figure.data if t.x[0] is not None]
    assert sorted(shapes) == ["hv", "hv", "linear", "linear"]


def test_summary() -> None:
    """By hand: medians of the last 21 losses and of any 21 neighbours, the last state and count."""
    steps = np.arange(100)
    loss = np.where((steps >= 40) & (steps < 70), 6.5, 7.0)
    loss[20], loss[95], loss[96] = 0.1, math.nan, 1e9
    series = {
        "loss": Series(steps, loss),
        "state_bytes": Series(steps[:2], np.array([1e6, 2.5e6])),
        "skipped_elements": Series(np.array([70]), np.array([12.0])),
    }
    assert summary(Run("a", series)) == ("a", "7", "6.5", "99", "1", "2.5", "12")
    assert summary(Run("b", {})) == ("b", "–", "–", "–", "0", "–", "–")


def test_long_runs_are_thinned_without_losing_extremes(tmp_path: Path) -> None:
    """A spike and a trough of one step among 100 000 are still there, and the page does not grow."""
    losses = np.random.default_rng(0).normal(5, 0.1, 100_000)
    losses[31_415], losses[92_653], losses[50_000] = 1000.0, -7.0, math.nan
    kept = thinned(Series(np.arange(100_000), losses))
    assert len(kept) <= MOST_POINTS
    assert {31_415, 92_653} <= set(kept.tolist())
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert thinned(Series(np.arange(5), losses[:5])).tolist() == [0, 1, 2, 3, 4]
    assert len(thinned(Series(np.arange(3000), np.full(3000, np.nan)))) <= MOST_POINTS
    sizes = [
        len(str(comparison([Run("x", {"loss": Series(np.arange(n), losses[:n])})]).to_json())) for n in (2000, 10**5)
    ]
    assert sizes[1] < 1.5 * sizes[0]


def test_runs_are_named_by_their_place(tmp_path: Path) -> None:
    assert run_name(tmp_path / "a" / "b", tmp_path) == "a/b"
    assert run_name(tmp_path, tmp_path) == tmp_path.name


@pytest.mark.parametrize("count", [1, 25])
def test_any_number_of_runs(count: int, tmp_path: Path) -> None:
    """More than there are colours; runs of one step; a run without a line among them."""
    for index in range(count):
        log_losses(tmp_path / f"run{index:02}", [index + 1.0])
    RunLog(tmp_path / "empty").close()
    path = write_dashboard(tmp_path)
    assert path == tmp_path / "dashboard.html"
    assert {f"run{index:02}" for index in range(count)} | {"empty"} <= set(Page(path).text)


# --- in a browser ----------------------------------------------------------------------------------------------------


def browse(page: Path, folder: Path) -> tuple[str, Path]:
    """The page's DOM once its scripts have run, and a picture of it."""
    assert BROWSER is not None
    picture = folder / f"{page.stem}.png"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1500", "--virtual-time-budget=10000"]
    command += [f"--screenshot={picture}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, picture


WATCH = """<script>
document.addEventListener("securitypolicyviolation", e => document.documentElement.setAttribute(
  "data-blocked", (document.documentElement.getAttribute("data-blocked") || "") + " " + e.blockedURI));
window.addEventListener("error", e => document.documentElement.setAttribute("data-error", e.message));
</script>"""


@needs_a_browser
def test_a_browser_draws_every_curve_and_asks_nobody(page: Path, logdir: Path, tmp_path: Path) -> None:
    """Lines with points in all panels, each run's colour on the screen, no request even tried, no script error."""
    watched = tmp_path / "watched.html"
    watched.write_text(page.read_text(encoding="utf-8").replace("<title>", WATCH + "<title>", 1), encoding="utf-8")
    dom, picture = browse(watched, tmp_path)
    root = re.findall(r"<html[^>]*>", dom)[0]
    assert "data-blocked" not in root
    assert "data-error" not in root
    names = ("deep/found", "given", HOSTILE)
    runs = [Run(name, read_run(logdir / name).series) for name in names]
    drawn = [points for points in re.findall(r'<path class="js-line" d="([^"]*)"', dom) if re.search("[LHV]", points)]
    wanted = sum(len(panel.drawn(run)) for panel in PANELS for run in runs[:2])
    assert len(drawn) == wanted  # all but the third run's, of whose three losses the middle one is lost
    assert len(set(re.findall(r'<g class="subplot (x\d*y\d*)"', dom))) == len(PANELS)
    for panel in PANELS:
        assert panel.title in dom
    assert "<title>1</title>" not in dom  # what the third run's name would do
    pixels = matplotlib.image.imread(picture)[..., :3]
    seen = [(np.abs(pixels - rgb(colour)).max(axis=-1) < 0.02).sum() for colour in COLOURS]
    assert min(seen[1:3]) > 300
    assert seen[0] > 80  # two points, and its row of the table
    assert max(seen[3:5]) == 0


def rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255


@needs_a_browser
def test_a_request_would_be_seen(page: Path, tmp_path: Path) -> None:
    """Negative control: the same page with a script from elsewhere, a broken script, and no graphs."""
    text = page.read_text(encoding="utf-8")
    bare = text[: text.index('<div class="wide"')] + '<script src="https://example.org/x.js"></script>'
    bad = tmp_path / "bad.html"
    bad.write_text(bare.replace("<title>", WATCH + "<title>", 1) + "<script>nothing()</script>", encoding="utf-8")
    dom, picture = browse(bad, tmp_path)
    root = re.findall(r"<html[^>]*>", dom)[0]
    assert 'data-blocked=" https://example.org/x.js"' in root
    assert "data-error" in root
    assert 'class="js-line"' not in dom
    pixels = matplotlib.image.imread(picture)[..., :3]
    assert (np.abs(pixels - rgb(COLOURS[0])).max(axis=-1) < 0.02).sum() == 0


@pytest.fixture(scope="module")
def twenty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of twenty runs of 60 losses, the later the lower, with rates."""
    folder = tmp_path_factory.mktemp("twenty")
    for index in range(20):
        with RunLog(folder / f"a-run-with-quite-a-long-name-{index}") as log:
            for step in range(60):
                log.log(step, {"loss": 30.0 - index + step % 2, "lr/mean": 1e-3, "lr/p10": 1e-4, "lr/p90": 1e-2})
    return write_dashboard(folder)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


TITLES = "[...document.querySelectorAll('.annotation-text')].map(e => e.getBoundingClientRect())"
NAMES = "[...document.querySelectorAll('td button')]"
NUMBER = "match(/[0-9]+$/)[0]"
FIRST_NAMES = f"[...document.querySelectorAll('tbody tr')].slice(0, 2).map(r => r.cells[0].textContent.{NUMBER})"
HIDDEN = f"graphs.data.filter(t => t.visible === false).map(t => t.legendgroup.{NUMBER})"


@needs_a_browser
@pytest.mark.parametrize(("width", "columns"), [(390, 1), (1600, 2)])
def test_it_fits_the_screen(browser: Any, twenty: Path, page: Path, width: int, columns: int) -> None:
    """A phone's and a desk's: nothing wider than the screen but the table in its frame, no title over another."""
    for shown in (twenty, page):
        browser.open(shown, width)
        assert browser.run("graphs.dataset.columns") == str(columns)
        assert browser.run("document.documentElement.scrollWidth") <= width
        browser.wait_for("document.querySelectorAll('.js-line').length > 3")
        rows = "[...document.querySelectorAll('tbody tr')].map(row => row.offsetHeight)"
        assert width == 390 or browser.run("document.querySelector('.wide').scrollHeight") <= 0.8 * 900
        assert max(browser.run(rows)) < 90  # long names take two lines or three, and are whole
        assert browser.run(f"{NAMES}.every(e => e.scrollWidth <= e.clientWidth)")
        titles = browser.run(f"{TITLES}.map(b => [b.left, b.right, b.top, b.bottom])")
        assert len(titles) >= 2
        for i, (left, right, top, bottom) in enumerate(titles):
            assert left >= 0
            assert right <= width
            for other in titles[:i]:
                assert right <= other[0] or left >= other[1] or bottom <= other[2] or top >= other[3]


@needs_a_browser
def test_it_follows_the_screen(browser: Any, twenty: Path) -> None:
    """A phone that is turned."""
    browser.open(twenty, 1600)
    browser.resize(390)
    browser.wait_for("graphs.dataset.columns === '1'")
    browser.wait_for("graphs.layout.xaxis2.domain[0] === 0")
    assert browser.run("graphs.layout.yaxis2.domain[1] < graphs.layout.yaxis.domain[0]")


@needs_a_browser
@pytest.mark.parametrize("width", [390, 1600])
def test_a_click_on_a_head_sorts(browser: Any, twenty: Path, width: int) -> None:
    """By number where there are numbers, in names too: 9 before 10; again, the other way round."""
    browser.open(twenty, width)
    browser.click("th:nth-child(2) button")
    assert browser.run(FIRST_NAMES) == ["19", "18"]
    assert browser.run("document.querySelector('th:nth-child(2)').ariaSort") == "ascending"
    browser.click("th:nth-child(2) button")
    assert browser.run(FIRST_NAMES) == ["0", "1"]
    browser.click("th:nth-child(1) button")
    browser.click("th:nth-child(1) button")
    assert browser.run(FIRST_NAMES) == ["19", "18"]
    assert browser.run("document.querySelectorAll('th[aria-sort]').length") == 1


@needs_a_browser
def test_a_click_on_a_run_hides_its_curves(browser: Any, twenty: Path) -> None:
    """In all panels, and shows them again; its colour is that of its row."""
    browser.open(twenty, 390)
    colour = browser.run("getComputedStyle(document.querySelector('tbody tr:nth-child(4) .swatch')).backgroundColor")
    assert [int(part) for part in re.findall(r"\d+", colour)] == [round(255 * part) for part in rgb(COLOURS[3])]
    browser.click("tbody tr:nth-child(4) button")
    hidden = browser.run(HIDDEN)
    assert set(hidden) == {"3"}
    assert len(hidden) == 2  # the losses' median and the rate
    assert browser.run("document.querySelector('tbody tr:nth-child(4) button').ariaPressed") == "false"
    browser.click("tbody tr:nth-child(4) button")
    assert browser.run(HIDDEN) == []


@needs_a_browser
def test_the_keyboard_does_all_of_it(browser: Any, twenty: Path) -> None:
    """Tab to the table, its heads and its rows; Enter sorts and hides."""
    browser.open(twenty, 1600)
    browser.press("Tab", 9)  # the table's frame, which arrows scroll
    assert browser.run("document.activeElement.className") == "wide"
    browser.press("Tab", 9)
    browser.press("Enter", 13)
    browser.press("Enter", 13)
    assert browser.run(FIRST_NAMES) == ["19", "18"]
    for _ in range(7):
        browser.press("Tab", 9)
    browser.press("Enter", 13)
    assert set(browser.run(HIDDEN)) == {"19"}


def test_losses_are_smoothed_from_50_on(tmp_path: Path) -> None:
    for count, curves in ((49, 1), (50, 2)):
        figure: Any = comparison([Run("a", {"loss": Series(np.arange(count), np.arange(count) % 2 + 1.0)})])
        assert len(figure.data) == curves


def test_many_runs_do_not_bury_each_other() -> None:
    """Of a few runs every loss and the range of the rates are drawn behind the curves, of many the curves alone."""
    names = ("loss", "lr/mean", "lr/p10", "lr/p90")
    for count, traces in ((FEW_RUNS, 5), (FEW_RUNS + 1, 2)):
        runs = [Run(str(i), {name: Series(np.arange(60), np.ones(60)) for name in names}) for i in range(count)]
        figure: Any = comparison(runs)
        assert len(figure.data) == traces * count
        assert ("shaded" in figure.layout.annotations[1].text) == (count <= FEW_RUNS)


def test_twenty_runs_have_twenty_colours() -> None:
    assert len({colour_of(index) for index in range(20)}) == 20


# --- the command -----------------------------------------------------------------------------------------------------


def test_command_writes_the_page_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log_losses(tmp_path / "run", [3.0, 2.0])
    assert cli.main(["dashboard", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'dashboard.html'}\n"
    assert cli.main(["dashboard", str(tmp_path / "run"), "--out", str(tmp_path / "x.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'x.html'}\n"
    assert (tmp_path / "x.html").stat().st_size > 1e6


def test_command_shows_a_terminal_how_far_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing to a pipe."""
    monkeypatch.setattr("automagic_bnb.command.progress.INTERVAL", 0)
    log_losses(tmp_path / "run", [3.0, 2.0])
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        assert cli.main(["dashboard", str(tmp_path)]) == 0
        drawn = capsys.readouterr().err
        assert ("reading [" in drawn, "drawing [" in drawn, drawn == "") == (terminal, terminal, not terminal)


def test_command_explains_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    log_losses(tmp_path / "lost", [math.nan])
    log_losses(tmp_path / "good", [1.0])
    for arguments, message in (
        (["nowhere"], "is no folder"),
        (["file"], "is no folder"),
        (["empty"], "holds no run"),
        (["lost"], "nothing to draw of 'lost'"),
        (["good", "--out", str(tmp_path / "empty")], "empty"),
        (["good", "--out", str(tmp_path / "file" / "x.html")], "file"),
    ):
        assert cli.main(["dashboard", str(tmp_path / arguments[0]), *arguments[1:]]) == 1
        error = capsys.readouterr().err
        assert error.startswith("automagic-bnb dashboard: error: ")
        assert message in error


def test_without_plotly_the_remedy_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all else is in order: a wrong folder is told of without plotly, too."""
    for name in ("plotly", "plotly.subplots"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(NotADirectoryError):
        write_dashboard(tmp_path / "nowhere")
    log_losses(tmp_path, [1.0])
    assert cli.main(["dashboard", str(tmp_path)]) == 1
    assert 'pip install "automagic-bnb[dashboard]"' in capsys.readouterr().err
