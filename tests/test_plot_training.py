"""The picture of a run holds what was logged, with whatever is missing, lost or far off."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from automagic_bnb import Automagic8bit, RunLog, plot_training, read_run, training_metrics
from automagic_bnb.watch.panels import PANELS
from automagic_bnb.watch.plots import running_median

TITLES = [panel.title for panel in PANELS]


def shown(figure: Any) -> dict[str, Any]:
    """The visible axes by title."""
    return {axes.get_title(): axes for axes in figure.axes if axes.get_visible()}


def line(axes: Any, label: str) -> tuple[list[float], list[float]]:
    (found,) = [x for x in axes.lines if x.get_label() == label]
    return np.asarray(found.get_xdata()).tolist(), np.asarray(found.get_ydata()).tolist()


@pytest.fixture
def logged(tmp_path: Path, tools: Any) -> Path:
    """A real run of 12 steps, metrics at every second."""
    parameters = tools.parameters((40, 60), (16, 300))
    opt = Automagic8bit(parameters, lr=1e-3)
    folder = tmp_path / "logged"
    with RunLog(folder) as log:
        for step in range(12):
            tools.give_gradients(parameters, step)
            if step == 6:
                parameters[0].grad[0] = math.nan
            opt.step()
            log.log(step, {"loss": 2 / (1 + step), **(training_metrics(opt) if step % 2 == 0 else {})})
    return folder


def test_every_panel_of_a_real_run(logged: Path, tmp_path: Path) -> None:
    figure = plot_training(logged, tmp_path / "run.png")
    axes, series = shown(figure), read_run(logged).series
    assert list(axes) == TITLES
    assert line(axes["Loss"], "training") == (list(range(12)), [2 / (1 + step) for step in range(12)])
    for title, label, name, scale in (
        ("Learning rate", "mean of the elements", "lr/mean", 1),
        ("Learning rate", "min_lr", "lr/bound_min", 1),
        ("Learning rate", "max_lr", "lr/bound_max", 1),
        ("Optimizer state", "state", "state_bytes", 1e-6),
        ("Torque", "mean cosine", "torque", 1),
        ("Torque", "share damped", "share_damped", 1),
        ("Edge strength", "edge strength", "edge_strength", 1),
        ("Skipped elements", "not finite", "skipped_elements", 1),
    ):
        assert line(axes[title], label) == (series[name].steps.tolist(), (series[name].values * scale).tolist())
    assert line(axes["Learning rate"], "max_lr")[1] == [1e-2] * 6
    assert line(axes["Skipped elements"], "not finite")[1] == [0, 0, 0, 60, 60, 60]
    (band,) = axes["Learning rate"].collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (series["lr/p10"].values.min(), series["lr/p90"].values.max())
    assert axes["Learning rate"].get_yscale() == "log"
    assert figure.get_suptitle() == "logged"
    pixels = matplotlib.image.imread(tmp_path / "run.png")
    assert pixels[..., :3].std() > 0.02  # a blank page has 0


@pytest.mark.parametrize(
    ("history", "titles"),
    [
        ({"loss": [3, 2, 1]}, ["Loss"]),
        ({"torque": [0.1, -0.2]}, ["Torque"]),
        ({"lr/p10": [1e-5] * 2, "lr/p90": [1e-4] * 2}, ["Learning rate"]),
        ({"lr/p10": [1e-5] * 2, "loss": [1, 2]}, ["Loss", "Learning rate"]),
        ({"loss": [1.0], "torque": [math.nan], "unknown": [3]}, ["Loss"]),
        ({"eval_loss": [1.0], "learning_rate": [0.0]}, ["Loss"]),  # no logarithm of 0
        ([{"step": 10, "loss": 2.0}, {"step": 20, "learning_rate": 1e-4}, {"step": 20, "x": 1}], TITLES[:2]),
        ({name: [0.5, 0.25] for panel in PANELS for name in panel.metrics()}, TITLES),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_what_is_missing_is_left_out(history: Any, titles: list[str], suffix: str, tmp_path: Path) -> None:
    figure = plot_training(history, tmp_path / f"run.{suffix}", title="some")
    assert list(shown(figure)) == titles
    assert (tmp_path / f"run.{suffix}").stat().st_size > 1000


@pytest.mark.parametrize("history", [{}, [], {"unknown": [1, 2]}, {"loss": [math.nan, math.inf]}])
def test_nothing_to_draw_is_an_error(history: Any) -> None:
    with pytest.raises(ValueError, match=r"nothing to draw of 'history'.*loss"):
        plot_training(history)


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no run"):
        plot_training(tmp_path)


def test_where_the_loss_was_lost_is_marked() -> None:
    axes = shown(plot_training({"loss": [3.0, math.nan, 2.0, math.inf]}))["Loss"]
    assert line(axes, "NaN or infinite")[0] == [1, 3]
    assert "NaN or infinite" not in [x.get_label() for x in shown(plot_training({"loss": [3.0, 2.0]}))["Loss"].lines]


def test_a_long_loss_has_its_running_median() -> None:
    """Against a loop over the stretches, with a gap in it; and a spike of 1000 leaves the rest its room."""
    loss = np.random.default_rng(0).lognormal(0, 0.3, 500)
    loss[200:230] = math.nan
    loss[100] = 1000.0
    axes = shown(plot_training({"loss": loss}))["Loss"]
    _, median = line(axes, "training, running median")
    for i in range(500):
        around = loss[max(i - 10, 0) : i + 11]
        expected = np.median(around[np.isfinite(around)]) if np.isfinite(loss[i]) else math.nan
        assert median[i] == pytest.approx(expected, nan_ok=True)
    assert axes.get_ylim()[1] < 10
    assert axes.get_ylim()[0] == 0


def test_running_median_of_little() -> None:
    assert running_median(np.zeros(0)).tolist() == []
    assert running_median(np.array([3.0])).tolist() == [3.0]
    assert running_median(np.array([1.0, 2.0, 6.0])).tolist() == [2.0] * 3


def test_negative_values_and_zeros_have_their_ranges() -> None:
    axes = shown(plot_training({"torque": [-0.5, 0.5], "skipped_elements": [0, 0]}))
    assert axes["Torque"].get_ylim()[0] < -0.5
    assert axes["Skipped elements"].get_ylim() == (0, 1)


def test_what_stays_until_it_changes_is_drawn_in_steps() -> None:
    """Bytes and counts; other figures move between two looks."""
    axes = shown(plot_training({name: [0.5, 0.25] for panel in PANELS for name in panel.metrics()}))
    found = {title: {x.get_drawstyle() for x in axes[title].lines} for title in TITLES}
    stepped = {"Optimizer state", "Skipped elements"}
    assert found == {title: {"steps-post" if title in stepped else "default"} for title in TITLES}


def test_lines_of_one_panel_differ_without_colours() -> None:
    """A cosine and a share on one axis; a schedule is dotted beside the mean, and solid alone."""
    axes = shown(plot_training({name: [0.5, 0.25] for panel in PANELS for name in panel.metrics()}))
    styles = {x.get_label(): x.get_linestyle() for title in ("Torque", "Learning rate") for x in axes[title].lines}
    assert styles == {
        "mean cosine": "-",
        "share damped": ":",
        "mean of the elements": "-",
        "schedule": ":",
        "min_lr": "--",
        "max_lr": "--",
    }
    alone = shown(plot_training([{"step": 10, "learning_rate": 1e-4}, {"step": 20, "learning_rate": 1e-5}]))
    assert [x.get_linestyle() for x in alone["Learning rate"].lines] == ["-"]
    assert "element" not in alone["Learning rate"].get_ylabel()
