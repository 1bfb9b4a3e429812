"""What makes a picture readable on a phone, asked of matplotlib's figures."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.category import StrCategoryLocator
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator
from matplotlib.transforms import Bbox

PHONE = 390
"""Pixels of a phone's width."""
LEAST_LETTERS = 8.5
"""Pixels of the smallest letters there, from their lowest to their highest."""
# From linear RGB as everybody sees it to what is seen without one kind of cones (Machado, Oliveira and Fernandes 2009).
VISION = {
    "all": np.eye(3),
    "no long": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no medium": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no short": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
WHITE = np.array([0.95047, 1.0, 1.08883])


def texts(figure: Any) -> list[Text]:
    """What is written in it; of the axes' numbers those that are drawn."""
    drawn = [x for x in figure.findobj(Text) if x.get_visible() and x.get_text().strip()]
    hidden = set()
    for axes in figure.findobj(Axes):
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                away = not low <= tick.get_loc() <= high
                hidden |= {id(x) for x in (tick.label1, tick.label2) if away or not x.get_visible()}
    return [x for x in drawn if id(x) not in hidden]


def complaints(figure: Any) -> list[str]:
    """Letters too small on a phone, texts over each other or beyond the rim, axes without a word."""
    FigureCanvasAgg(figure).draw()
    found, boxes = [], {}
    scale = PHONE / figure.get_size_inches()[0] / 72
    for text in texts(figure):
        if text.get_fontsize() * scale < LEAST_LETTERS:
            found.append(f"{text.get_text()!r} is {text.get_fontsize() * scale:.1f} pixels high")
        box = text.get_window_extent()
        if box.x0 < -1 or box.y0 < -1 or box.x1 > figure.bbox.width + 1 or box.y1 > figure.bbox.height + 1:
            found.append(f"{text.get_text()!r} leaves the picture")
        boxes[text] = box
    for (one, a), (other, b) in combinations(boxes.items(), 2):
        if (common := Bbox.intersection(a, b)) is not None and min(common.width, common.height) > 1:
            found.append(f"{one.get_text()!r} lies over {other.get_text()!r}")
    if not (figure.get_supxlabel() and figure.get_supylabel()):
        axes_of_numbers = [axis for axes in figure.findobj(Axes) for axis in (axes.xaxis, axes.yaxis)]
        found += [f"an axis of {x.axes.get_title()!r} has no label" for x in axes_of_numbers if lacks_a_label(x)]
    return found


def lacks_a_label(axis: Any) -> bool:
    """Whether numbers stand at it, not names, and no word says of what."""
    named = isinstance(axis.get_major_locator(), (FixedLocator, StrCategoryLocator))
    shown = any(x.get_text() for x in axis.get_majorticklabels() if x.get_visible())
    return shown and not named and not axis.get_label_text()


def lab(colour: str, vision: Any) -> np.ndarray:
    """CIE L*a*b* of "#rrggbb"."""
    srgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    x = np.array(TO_XYZ) @ np.clip(np.array(vision) @ linear, 0, 1) / WHITE
    x = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
    return np.array([116 * x[1] - 16, 500 * (x[0] - x[1]), 200 * (x[1] - x[2])])


def distance(one: str, other: str) -> float:
    """ΔE (1976) of two colours, for the eye that tells them apart worst; 2.3 is just seen."""
    return min(float(np.linalg.norm(lab(one, eye) - lab(other, eye))) for eye in VISION.values())
