"""Singular values against a full SVD, the ranks made of them against their formulas, and their picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from automagic_bnb import effective_rank, plot_singular_values, singular_values, stable_rank

GRAM = 1e-7
"""Over the largest value: the Gram matrix squares, so double precision's 1e-16 becomes 1e-8; with a margin."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_values(values: list[float]) -> Tensor:
    """A float64 [20, n] of these singular values."""
    left, _ = torch.linalg.qr(normal(20, len(values)).double())
    right, _ = torch.linalg.qr(normal(len(values), len(values), seed=1).double())
    return left * torch.tensor(values, dtype=torch.float64) @ right


@pytest.mark.parametrize("shape", [(64, 8), (8, 64), (16, 16), (1, 9), (9, 1), (1, 1), (24, 5, 3, 3), (4, 50, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equal_those_of_a_full_svd(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A convolution counts as (shape[0], n / shape[0])."""
    param = torch.nn.Parameter(normal(*shape).to(dtype))
    found, wanted = singular_values(param), torch.linalg.svdvals(param.detach().double().flatten(1))
    assert found.dtype == torch.float64
    assert found.shape == wanted.shape
    assert not found.requires_grad
    assert (found.diff() <= 0).all()
    assert (found - wanted).abs().max() <= GRAM * wanted[0]


def test_the_svd_check_can_fail() -> None:
    """Negative control: values of a matrix one part in a hundred thousand larger are told apart."""
    x = normal(12, 5).double()
    wanted = torch.linalg.svdvals(x * 1.00001)
    assert (singular_values(x) - wanted).abs().max() > GRAM * wanted[0]


@given(some.integers(1, 12), some.integers(1, 12), some.integers(-200, 200), some.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_at_any_scale(rows: int, columns: int, exponent: int, seed: int) -> None:
    """Squares that leave even float64's range do no harm, and the ranks do not depend on the scale."""
    x = normal(rows, columns, seed=seed).double()
    wanted = torch.linalg.svdvals(x)
    found = singular_values(x * 10.0**exponent) / 10.0**exponent
    assert (found - wanted).abs().max() <= GRAM * wanted[0]
    assert effective_rank(x * 10.0**exponent) == pytest.approx(effective_rank(x), rel=1e-6)
    assert 1 - 1e-9 <= effective_rank(x) <= min(rows, columns) + 1e-9
    assert 1 - 1e-9 <= stable_rank(x) <= min(rows, columns) + 1e-9


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0, 2.0], [5.0, 1.0], [1.0, 0.5, 0.25, 0.125], [7.0, 0.0, 0.0]])
def test_ranks_follow_their_formulas(values: list[float]) -> None:
    """exp(-Σ p ln p) with p = σ / Σσ; Σσ² / max σ²."""
    shares = [x / sum(values) for x in values if x]
    entropy = -sum(p * math.log(p) for p in shares)
    x = with_values(values)
    # A value of 0 comes out as 1e-8 of the largest, whose p ln p is 2e-7.
    assert effective_rank(x) == pytest.approx(math.exp(entropy), rel=1e-6)
    assert stable_rank(x) == pytest.approx(sum(v * v for v in values) / max(values) ** 2, rel=1e-9)


def test_ranks_tell_matrices_apart() -> None:
    """Equal values give their number; one large value counts for about one."""
    assert effective_rank(torch.eye(6)) == pytest.approx(6)
    assert stable_rank(torch.eye(6)) == pytest.approx(6)
    spiked = with_values([100.0, 1.0, 1.0, 1.0])
    assert 1 < stable_rank(spiked) < 1.001
    assert 1.1 < effective_rank(spiked) < 1.3


def test_zeros_have_rank_0() -> None:
    """LoRA's B at its start."""
    zeros = torch.nn.Parameter(torch.zeros(16, 4))
    assert singular_values(zeros).tolist() == [0.0] * 4
    assert effective_rank(zeros) == stable_rank(zeros) == 0.0


@pytest.mark.parametrize("measure", [singular_values, effective_rank, stable_rank])
@pytest.mark.parametrize(
    ("param", "error", "message"),
    [
        (None, TypeError, "NoneType"),
        (np.eye(3), TypeError, "ndarray"),
        (torch.zeros(3, 3, dtype=torch.complex64), TypeError, "complex64"),
        (torch.eye(3).to_sparse(), TypeError, "sparse"),
        (torch.zeros(7), ValueError, r"at least 2 dimensions.*\(7,\)"),
        (torch.zeros(0, 3), ValueError, r"\(0, 3\)"),
        (torch.tensor([[1.0, math.nan], [0.0, 1.0]]), ValueError, "1 of 4 are NaN or infinite"),
    ],
)
def test_what_has_none(measure: Any, param: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        measure(param)


# --- the picture -----------------------------------------------------------------------------------------------------


def test_picture_of_values(tmp_path: Path) -> None:
    a, b = singular_values(normal(8, 30)), singular_values(normal(30, 5))
    figure = plot_singular_values({"A": a, "B": b}, path=tmp_path / "values.png")
    (axes,) = figure.axes
    for line, values in zip(axes.lines, (a, b), strict=True):
        assert np.asarray(line.get_xdata()).tolist() == list(range(1, len(values) + 1))
        assert np.asarray(line.get_ydata()).tolist() == values.tolist()
    assert matplotlib.image.imread(tmp_path / "values.png")[..., :3].std() > 0.02  # a blank page has 0


def test_picture_of_values_and_history(tmp_path: Path) -> None:
    """The second panel has the ranks by step, without those of matrices still all zero."""
    history = {f"layer {i}": {0: 0.0, 25: 3.0 + i, 50: 2.5 + i} for i in range(6)}
    figure = plot_singular_values({"A": torch.tensor([2.0, 1.0])}, history, tmp_path / "both.svg")
    _, ranks = figure.axes
    assert [np.asarray(line.get_ydata()).tolist() for line in ranks.lines] == [[3.0 + i, 2.5 + i] for i in range(6)]
    assert np.asarray(ranks.lines[0].get_xdata()).tolist() == [25, 50]
    assert len({(line.get_color(), line.get_linestyle()) for line in ranks.lines}) == 6
    assert ranks.get_ylim()[0] == 0
    assert (tmp_path / "both.svg").read_text().startswith("<?xml")


def test_axes_of_indices_and_steps_count_in_whole_numbers() -> None:
    figure = plot_singular_values({"A": torch.tensor([2.0, 1.0])}, {"A": {1: 2.0, 2: 1.5}})
    for axes in figure.axes:
        assert all(tick == int(tick) for tick in axes.get_xticks())
