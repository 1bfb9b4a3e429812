"""The demo's own pictures; what they share with others is in `style`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from automagic_bnb.watch.style import legend_below, new_figure, point_style, saved

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from automagic_bnb.command.demo import History

SMOOTHING = 25
"""Steps of the trailing mean over the training loss, whose batches are far noisier than the differences shown."""
CELL = 10
"""Side of a picture with its rim, in pixels."""


def save_result(path: Path, images: Sequence[np.ndarray], curves: Mapping[str, History], digits: Sequence[int]) -> None:
    """The picture to begin with, as wide as a phone: what was to be learned, before, after; and how fast it went.

    Args:
        path: the PNG to write.
        images: real digits, drawn before the training and after it, each float [n, 64] as in `save_samples`.
        curves: by the words for its legend, a history.
        digits: that the pictures show, in rows.
    """
    figure = new_figure("A model that draws 0-4 learns to draw 5-9", height=5.8)
    above, below = np.asarray(figure.subfigures(2, 1, height_ratios=(2, 5))).flat
    titles = ("to be learned", "before training", "after, Automagic8bit")
    for axes, title, pictures in zip(above.subplots(1, 3), titles, images, strict=True):
        show(axes, title, pictures, len(digits))
    axes = below.subplots()
    for place, (words, history) in enumerate(curves.items()):
        loss = history.validation_loss
        label = f"{words} → {loss[-1]:.3f}"
        axes.plot(history.validation_step, loss, lw=2, ms=5, label=label, **point_style(place))
    axes.set_xlabel("training steps")
    axes.set_ylabel("error on digits it has not seen\n(lower is better)")
    axes.grid(alpha=0.3)
    legend_below(below, axes, title="optimizer, its learning rate → error at the end")
    saved(figure, path)


def show(axes: Axes, title: str, pictures: np.ndarray, rows: int) -> None:
    """Pictures as `tile` lays them out, dark on paper, in a faint frame."""
    axes.imshow(tile(pictures, rows), cmap="gray_r", vmin=-1, vmax=1, interpolation="bicubic")
    axes.set_title(title, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color("lightgrey")


def save_samples(path: Path, images: Mapping[str, np.ndarray], digits: Sequence[int]) -> None:
    """Panels, two in a row: in each a row per digit.

    Args:
        path: the PNG to write.
        images: by title of the panel, float [len(digits) * columns, 64], digit by digit; -1 is paper, 1 is ink.
        digits: the classes of the rows.
    """
    rows = -(-len(images) // 2)
    figure = new_figure("Digits 5-9 before and after: 8×8 pixels, smoothed; all from the same noise", 0.7 + 1.7 * rows)
    for axes, (title, pictures) in zip(figure.subplots(rows, 2).flat, images.items(), strict=False):
        show(axes, title, pictures, len(digits))
        axes.set_yticks([CELL * (row + 0.5) - 0.5 for row in range(len(digits))], [str(digit) for digit in digits])
        axes.tick_params(length=0)
    for axes in list(figure.axes)[len(images) :]:
        axes.remove()
    saved(figure, path)


def tile(pictures: np.ndarray, rows: int) -> np.ndarray:
    """8×8 pictures [n, 64] as one image of `rows` rows, each picture amid a blank rim one pixel wide."""
    columns = len(pictures) // rows
    cells = np.full((rows, columns, CELL, CELL), -1.0)
    cells[:, :, 1:-1, 1:-1] = pictures.reshape(rows, columns, CELL - 2, CELL - 2)
    return cells.clip(-1, 1).transpose(0, 2, 1, 3).reshape(rows * CELL, columns * CELL)


def save_curves(path: Path, histories: Mapping[str, History]) -> None:
    """Losses over steps, and below them the mean learning rate, by label of the optimizer."""
    figure = new_figure("A LoRA learns the digits 5-9", height=7)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(5, 3))
    for place, (label, history) in enumerate(histories.items()):
        steps = np.arange(1, len(history.train_loss) + 1)
        style = point_style(place)
        losses.plot(steps, trailing_mean(history.train_loss, SMOOTHING), color=style["color"], alpha=0.4, lw=1.5)
        losses.plot(history.validation_step, history.validation_loss, lw=2, ms=4, label=label, **style)
        rates.plot(steps, history.learning_rate, lw=2, ms=4, markevery=0.1, **style)
    losses.set_ylabel("flow-matching loss\n(mean squared error per pixel)")
    rates.set_yscale("log")
    rates.set_ylabel("mean learning rate")
    rates.set_xlabel("step")
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
    title = f"with marks: held-out digits\npale: training, mean of the last {SMOOTHING} steps"
    legend_below(figure, losses, title=title)
    saved(figure, path)


def trailing_mean(values: Sequence[float], window: int) -> np.ndarray:
    """Mean of the last `window` values at each position, of fewer at the start; float64 [len(values)]."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
