"""Tiles of a matrix as row and column means: what they keep, what they cost, and which parameters take them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from rule_in_float64 import TileMeans
from torch import Tensor

from automagic_bnb import AutomagicConfig, stored
from automagic_bnb import state as st
from automagic_bnb.factored import Tiling

SHAPES = some.one_of(
    some.tuples(some.integers(1, 400), some.integers(1, 700)),
    some.tuples(some.integers(1, 5000), some.sampled_from([1, 2, 4, 8, 16, 32, 64, 128, 256])),
    some.tuples(some.integers(1, 60), some.integers(1, 40), some.just(3), some.just(3)),
)
ROUNDING = 2e-6  # relative, of means of up to 2000 float32 terms of one sign


def values(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Positive, of a few orders of magnitude."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(2).exp()


def means_of(x: Tensor) -> tuple[Tiling, Tensor, Tensor]:
    tiling, blocks = Tiling.of(x), stored.Blocks(x)
    return tiling, tiling.row_means(blocks.cut(x)), tiling.column_means(blocks.cut(x))


@settings(deadline=None, max_examples=150)
@given(shape=SHAPES)
def test_means_and_estimate_agree_with_indices_of_every_element(shape: tuple[int, ...]) -> None:
    """Against an oracle that numbers rows, columns and tiles element by element."""
    x = values(shape)
    tiling, row, col = means_of(x)
    oracle = TileMeans(shape, beta=0, eps=0)
    oracle.estimate(slice(None), x.double().numpy().reshape(-1), np.ones(x.numel(), bool), 1)
    oracle.finish_step(np.ones(x.numel(), bool))
    assert (tiling.rows, tiling.tiles * tiling.width) == (oracle.row.size, oracle.col.size)
    np.testing.assert_allclose(row, oracle.row, ROUNDING)
    np.testing.assert_allclose(col.view(-1), oracle.col, ROUNDING)
    estimate = stored.Blocks(x).join(tiling.expand(row, col))
    np.testing.assert_allclose(estimate, oracle.held(), 4 * ROUNDING)


@pytest.mark.parametrize("shape", [(300, 768), (3072, 16), (512, 256), (640, 40)])
def test_a_product_of_rows_and_columns_comes_back(shape: tuple[int, int]) -> None:
    """What has rank one is kept; the control, which has not, is not."""
    x = torch.outer(values((shape[0],), 1), values((shape[1],), 2))
    blocks = stored.Blocks(x)
    if 256 % shape[1] and shape[1] % 256:
        x[:] = values((shape[1],), 2)  # blocks that span parts of two rows: of rank one only where all rows are alike
    back = blocks.join((lambda t, row, col: t.expand(row, col))(*means_of(x))).view(shape)
    torch.testing.assert_close(back, x, rtol=4 * ROUNDING, atol=0)
    other = values(shape)
    back = blocks.join((lambda t, row, col: t.expand(row, col))(*means_of(other))).view(shape)
    assert ((back / other).log().abs() > 0.5).float().mean() > 0.5


@pytest.mark.parametrize(
    ("shape", "factors", "bytes_per_element"),
    [
        ((2048, 8192), True, 4 * (1 / 256 + 1 / 128)),
        ((3072, 16), True, 4 * (1 / 16 + 1 / 256)),
        ((16, 3072), True, 4 * (1 / 256 + 1 / 16)),
        ((320, 320, 3, 3), True, 4 * (1 / 256 + 1 / 80)),
        ((3072, 4), True, 4 * (1 / 8 + 1 / 512)),
        ((4, 3072), False, None),
        ((7, 9), False, None),
        ((4096,), False, None),
        ((1, 4096), False, None),
        ((4096, 1), False, None),
        ((), False, None),
        ((0, 16), False, None),
    ],
)
def test_which_parameters_factor_and_what_it_costs(
    shape: tuple[int, ...], factors: bool, bytes_per_element: float | None
) -> None:
    """By the bytes of the means, which are those counted from the tensors."""
    p = torch.zeros(shape)
    assert st.factors_well(p, 1, 4) == factors
    if bytes_per_element is not None:
        options = {**vars(AutomagicConfig()), "auto_lr": False, "mean_bits": 32}
        state = st.complete({}, p, "factored", options)
        held = state["exp_avg_sq_row"].nbytes + state["exp_avg_sq_col"].nbytes
        assert held / p.numel() == pytest.approx(bytes_per_element, rel=0.03)


def test_what_is_not_in_codes_factors_sooner() -> None:
    """Against four bytes an element the means of four rows pay; against one byte, only where they take two each."""
    p, least = torch.zeros(4, 3072), torch.zeros(3, 3072)
    assert [st.factors_well(p, *cost) for cost in ((1, 4), (1, 2), (4, 4))] == [False, True, True]
    assert not st.factors_well(least, 4, 2)
