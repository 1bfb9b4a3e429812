"""Every picture that the package and its benchmarks draw is readable on a phone and in any eye's colours."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from pictures import complaints, distance

from automagic_bnb import Automagic8bit, plot_singular_values, plot_spectrum, plot_training, singular_values, spectrum
from automagic_bnb.command import demo_pictures, inspection
from automagic_bnb.command.demo import History
from automagic_bnb.watch import style
from automagic_bnb.watch.panels import PANELS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LEAST_DISTANCE = 15.0
"""ΔE between any two colours of ours, in any eye; matplotlib's own red and green are 7 apart for some."""


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures saved in a test, by the name of their file."""
    figures: dict[str, Figure] = {}
    real = Figure.savefig

    def savefig(self: Figure, path: Any, **options: Any) -> None:
        figures[Path(path).name] = self
        real(self, path, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def all_complaints(drawn: dict[str, Figure]) -> list[str]:
    return [f"{name}: {complaint}" for name, figure in drawn.items() for complaint in complaints(figure)]


def test_pictures_of_runs_and_tensors(drawn: dict[str, Figure], tmp_path: Path) -> None:
    torch.manual_seed(0)
    history = {name: np.linspace(0.5, 0.25, 60) for panel in PANELS for name in panel.metrics()}
    plot_training(history, tmp_path / "training.png", title="a run with a name that is too long for a single line")
    plot_spectrum(spectrum(torch.randn(320, 64)), tmp_path / "spectrum.png")
    values = {f"a layer of the model, {i}": singular_values(torch.randn(16, 64)) for i in range(4)}
    ranks = {name: {step: 3.0 + step / 100 for step in range(0, 400, 25)} for name in values}
    plot_singular_values(values, ranks, tmp_path / "singular.png", title="Singular values of what the LoRA has added")
    assert sorted(drawn) == sorted(["training.png", "spectrum.png", "singular.png"])
    assert all_complaints(drawn) == []


def test_pictures_of_the_demo(drawn: dict[str, Figure], tmp_path: Path) -> None:
    """With five optimizers, as many as there can be."""
    labels = ("Automagic8bit", "Automagic8bit, lean", "AdamW8bit, tuned", "AdamW8bit, as usual", "Prodigy")
    steps = list(range(0, 401, 25))
    falling = [0.9 - step / 1000 for step in steps]
    history = History([0.5] * 400, [1e-3 + step * 1e-6 for step in range(400)], [1.0] * 400, steps, falling)
    panels = ("real digits, held out", "samples before the LoRA", *(f"samples, {label}" for label in labels))
    images = {panel: np.random.default_rng(0).normal(size=(40, 64)) for panel in panels}
    words = {f"{label}: no rate given, found 2.6e-03": history for label in labels}
    digits = range(5, 10)
    demo_pictures.save_result(tmp_path / "result.png", list(images.values())[:3], words, digits)
    demo_pictures.save_samples(tmp_path / "samples.png", images, digits)
    demo_pictures.save_curves(tmp_path / "loss.png", dict.fromkeys(labels, history))
    assert sorted(drawn) == sorted(["result.png", "samples.png", "loss.png"])
    assert all_complaints(drawn) == []


def test_pictures_of_inspect(drawn: dict[str, Figure], tmp_path: Path) -> None:
    """Of factored states whose rates lie close together, and of a peer that has none of single weights."""
    torch.manual_seed(0)
    for name, make in (("ours", Automagic8bit), ("peer", torch.optim.AdamW)):
        weights = [torch.nn.Parameter(torch.randn(256, 64)) for _ in range(2)]
        optimizer = make([{"params": [p], "lr": lr} for p, lr in zip(weights, (3e-4, 1e-3), strict=True)])
        for _ in range(3):
            for p in weights:
                p.grad = torch.randn_like(p)
            optimizer.step()
        torch.save(optimizer.state_dict(), tmp_path / f"{name}.pt")
        inspection.draw(inspection.examine(tmp_path / f"{name}.pt"), tmp_path / f"{name}.png")
    assert sorted(drawn) == ["ours.png", "peer.png"]
    assert all_complaints(drawn) == []


def test_pictures_of_the_benchmarks(drawn: dict[str, Figure], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README's two, from the results that are there."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["readme_table.py"])
    import readme_table

    comparison = readme_table.report.Comparison(
        readme_table.Results(*sorted((BENCHMARKS / "quality" / "results").glob("*.jsonl")))
    )
    readme_table.draw(readme_table.plotted(comparison), tmp_path / "rate.png")
    shown = readme_table.SHOWN
    readme_table.report.plot_regret(comparison, "judge", shown, tmp_path / "task.png")
    readme_table.report.plot_rates(comparison, "judge", ["ours", "adamw8bit"], "ours-found", tmp_path / "rates.png")
    assert sorted(drawn) == sorted(["rate.png", "task.png", "rates.png"])
    assert all_complaints(drawn) == []


def test_what_is_unreadable_would_be_seen() -> None:
    """Negative control: small letters, texts over each other, one beyond the rim, numbers without a word."""
    figure = Figure(figsize=(5, 5))
    axes = figure.subplots()
    axes.plot([1, 2])
    figure.suptitle("small", fontsize=4)
    figure.text(0.5, 0.5, "one")
    figure.text(0.5, 0.5, "other")
    figure.text(0.95, 0.2, "beyond the rim")
    found = complaints(figure)
    assert [x for x in found if "pixels high" in x] == ["'small' is 4.3 pixels high"]
    assert "'one' lies over 'other'" in found
    assert "'beyond the rim' leaves the picture" in found
    assert len([x for x in found if "no label" in x]) == 2


def test_colours_are_told_apart_by_any_eye() -> None:
    close = {pair: distance(*pair) for pair in combinations(style.COLOURS, 2)}
    assert {pair: x for pair, x in close.items() if x < LEAST_DISTANCE} == {}
    assert distance("#d62728", "#2ca02c") < LEAST_DISTANCE  # a red and a green
    assert distance("#000000", "#ffffff") == pytest.approx(100, abs=0.1)


def test_lines_differ_without_colours() -> None:
    assert len({style.line_style(place)["ls"] for place in range(3)}) == 3
    assert len({style.point_style(place)["marker"] for place in range(7)}) == 7
    assert len({tuple(style.line_style(place).values()) for place in range(30)}) == 30
