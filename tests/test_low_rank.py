"""Soft-thresholding of singular values, against a full SVD, and when the optimizer does it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from automagic_bnb.low_rank import gram, lowered, shrinkage, singular_values
from automagic_bnb.optimizer import Automagic, Automagic8bit, Automagic32bit

FLOAT32_ERROR = 1e-6
"""Over the largest singular value. The removed part is worked out in float64, rounded to float32 (6e-8) and subtracted
(6e-8); a matrix's norm gathers a few of these."""
VALUE_ERROR = 1e-7
"""Over the largest singular value: the square root of float64's rounding (1e-8), which squaring in the Gram matrix
costs the smallest values, with a margin."""
SHAPES = [(64, 8), (8, 64), (16, 16), (1, 9), (9, 1), (1, 1), (5, 7), (33, 4)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def soft_threshold(matrices: Tensor, thresholds: Tensor) -> Tensor:
    """As the optimizer does it."""
    return lowered(matrices, shrinkage(gram(matrices), thresholds))


def with_values(shape: tuple[int, int], values: list[float], seed: int = 0) -> Tensor:
    """A float32 matrix of these singular values; those it lacks are 0."""
    left, _ = torch.linalg.qr(normal(shape[0], len(values), seed=seed).double())
    right, _ = torch.linalg.qr(normal(shape[1], len(values), seed=seed + 1).double())
    return (left * torch.tensor(values, dtype=torch.float64) @ right.mT).float()


def by_svd(matrix: Tensor, threshold: float) -> Tensor:
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (left * (values - threshold).clamp_min(0)) @ right


def error(matrix: Tensor, threshold: float) -> float:
    """Distance from the SVD's result over the largest singular value."""
    found = soft_threshold(matrix[None], torch.tensor([threshold]))[0]
    assert found.shape == matrix.shape
    assert found.dtype == matrix.dtype
    largest = torch.linalg.matrix_norm(matrix.double(), 2)
    return ((found - by_svd(matrix, torch.tensor(threshold).item())).abs().max() / largest).item()


# --- the operation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [1e-6, 1e-3, 0.3, 0.9, 0.999, 1.5])
def test_equals_a_full_svd(shape: tuple[int, int], share: float) -> None:
    """Tall, wide, square and vectors, thresholds from far below to above every singular value."""
    matrix = normal(*shape)
    assert error(matrix, share * torch.linalg.matrix_norm(matrix, 2).item()) < FLOAT32_ERROR


def test_svd_check_can_fail() -> None:
    """Negative control: a threshold one part in a thousand off is seen."""
    matrix = normal(12, 5)
    found = soft_threshold(matrix[None], torch.tensor([0.5005]))[0]
    largest = torch.linalg.matrix_norm(matrix, 2)
    assert (found - by_svd(matrix, 0.5)).abs().max() / largest > 10 * FLOAT32_ERROR


@given(
    rows=some.integers(1, 20),
    columns=some.integers(1, 20),
    exponent=some.integers(-12, 12),
    threshold=some.floats(0, 2),
    seed=some.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_equals_a_full_svd_at_any_scale(rows: int, columns: int, exponent: int, threshold: float, seed: int) -> None:
    """The error follows the matrix's own size."""
    matrix = normal(rows, columns, seed=seed) * 10.0**exponent
    assert error(matrix, threshold * 10.0**exponent) < FLOAT32_ERROR


@pytest.mark.parametrize("shape", [(40, 8), (8, 40), (8, 8)])
@pytest.mark.parametrize("values", [[3.0, 1.0], [5.0, 5.0, 5.0], [1.0, 1e-3, 1e-6], [1e4, 1.0, 1e-4]])
@pytest.mark.parametrize("threshold", [1e-7, 5e-4, 0.5, 2.0])
def test_deficient_and_repeated_values(shape: tuple[int, int], values: list[float], threshold: float) -> None:
    """Rank-deficient matrices, equal singular values and wide spectra equal the SVD too."""
    assert error(with_values(shape, values), threshold) < FLOAT32_ERROR


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_threshold_0_leaves_every_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """τ = 0 is the identity, signs of zeros included."""
    matrix = normal(*shape).to(dtype)
    matrix[0, 0] = -0.0
    found = soft_threshold(matrix[None], torch.zeros(1))[0]
    assert torch.equal(found, matrix)
    assert torch.equal(found.signbit(), matrix.signbit())


@pytest.mark.parametrize("shape", SHAPES)
def test_threshold_above_all_leaves_nothing(shape: tuple[int, int]) -> None:
    """Where τ exceeds every singular value the matrix vanishes, to rounding."""
    matrix = normal(*shape)
    found = soft_threshold(matrix[None], torch.tensor([1e3]))[0]
    assert found.abs().max() <= FLOAT32_ERROR * torch.linalg.matrix_norm(matrix, 2)


def test_zero_matrix_stays_zero() -> None:
    """LoRA's B at its start: nothing to lower, no division by 0."""
    assert (soft_threshold(torch.zeros(1, 20, 4), torch.tensor([0.1])) == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_stays_as_it_is(bad: float) -> None:
    """It has no singular values; the others of its batch are lowered."""
    batch = normal(2, 6, 3)
    batch[0, 1, 1] = bad
    found = soft_threshold(batch, torch.full((2,), 0.3))
    assert torch.equal(found[0].nan_to_num(7.0), batch[0].nan_to_num(7.0))
    assert (found[1] - by_svd(batch[1], 0.3)).abs().max() < 1e-5


def test_each_matrix_of_a_batch_has_its_own_threshold() -> None:
    """A batch gives what its members give alone; a threshold of 0 among others is still the identity."""
    batch, thresholds = normal(4, 12, 5), torch.tensor([0.0, 0.2, 1.0, 50.0])
    found = soft_threshold(batch, thresholds)
    assert torch.equal(found[0], batch[0])
    for matrix, threshold, result in zip(batch, thresholds, found, strict=True):
        largest = torch.linalg.matrix_norm(matrix, 2)
        assert (result - by_svd(matrix, threshold.item())).abs().max() <= FLOAT32_ERROR * largest


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_are_the_svds(shape: tuple[int, int]) -> None:
    """Descending, min(shape) of them, also for a batch."""
    batch = torch.stack([normal(*shape, seed=i) for i in range(3)])
    expected = torch.linalg.svdvals(batch.double())
    found = singular_values(batch)
    assert found.shape == expected.shape
    assert ((found - expected).abs() <= VALUE_ERROR * expected[:, :1]).all()


def test_small_singular_values_survive_the_gram_matrix() -> None:
    """A value of 1e-5 of the largest, lost in a float32 Gram matrix, is found and lowered."""
    matrix = with_values((30, 6), [1.0, 1e-5])
    assert singular_values(matrix)[1].item() == pytest.approx(1e-5, rel=0.02)
    after = soft_threshold(matrix[None], torch.tensor([4e-6]))[0]
    assert singular_values(after)[1].item() == pytest.approx(6e-6, rel=0.05)


# --- in the optimizer -------------------------------------------------------------------------------------------


def trained(
    p: torch.nn.Parameter, steps: int, kind: type[Automagic] = Automagic32bit, **options: Any
) -> tuple[Tensor, Tensor]:
    """θ after the steps, with the low-rank step of the last and without it."""
    results = []
    for penalty in (True, False):
        copy = torch.nn.Parameter(p.detach().clone())
        settings = {"lr": 1e-2, "lora": True, "rank_penalty_strength": 0.5, **options}
        opt = kind([copy], **settings)
        for t in range(1, steps + 1):
            opt.param_groups[0]["lora_rank_penalty"] = penalty or t < steps
            copy.grad = normal(*p.shape, seed=t).to(p.dtype)
            opt.step()
        results.append(copy.detach())
    return results[0], results[1]


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (8, 8)])
@pytest.mark.parametrize("lr", [1e-2, 3e-3])
def test_tenth_step_lowers_by_ten_times_the_rate_and_strength(shape: tuple[int, int], lr: float) -> None:
    """Step 10 is the ordinary step followed by soft-thresholding with 10 · lr · rank_penalty_strength."""
    p = torch.nn.Parameter(normal(*shape))
    after, plain = trained(p, 10, lr=lr)
    expected = by_svd(plain, 10 * lr * 0.5)
    assert (after - expected).abs().max() < FLOAT32_ERROR * torch.linalg.matrix_norm(plain, 2)
    assert (after - plain).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [1, 9, 11, 19, 20, 30])
def test_only_every_tenth_step_lowers(steps: int) -> None:
    """Steps that are no multiple of ten leave the singular values alone."""
    after, plain = trained(torch.nn.Parameter(normal(12, 5)), steps)
    assert torch.equal(after, plain) == (steps % 10 != 0)


@pytest.mark.parametrize(
    ("shape", "options", "lowers"),
    [
        ((257, 256), {}, True),
        ((257, 258), {}, False),
        ((12, 5), {"lora": False}, False),
        ((12, 5), {"lora": None}, False),
        ((12,), {}, False),
        ((4, 3, 3, 3), {}, False),
        ((12, 5), {"rank_penalty_strength": 0.0}, False),
    ],
)
def test_only_narrow_lora_matrices_are_lowered(shape: tuple[int, ...], options: dict[str, Any], lowers: bool) -> None:
    """Two dimensions, a side of at most 256, and LoRA; a strength of 0 leaves every bit."""
    after, plain = trained(torch.nn.Parameter(normal(*shape)), 10, **options)
    assert torch.equal(after, plain) != lowers


def test_found_rate_sets_the_threshold() -> None:
    """With auto_lr the threshold follows the rate found, d · ρ, not the group's lr."""
    p = torch.nn.Parameter(normal(12, 5))
    rates = {"lr": 1e-3, "auto_lr": True, "max_lr": 1e-3, "min_lr": 1e-3}
    after, plain = trained(p, 10, **rates)
    expected = by_svd(plain, 10 * 1e-3 * 0.5)
    assert (after - expected).abs().max() < FLOAT32_ERROR * torch.linalg.matrix_norm(plain, 2)


ROUNDING_NOISE = 0.2
"""Share of the drop that the noise of stochastic rounding, which raises singular values, may take back: measured 0.06
to 0.15 at these thresholds."""


@pytest.mark.parametrize(("dtype", "strength"), [(torch.bfloat16, 0.02), (torch.float16, 0.002)])
def test_narrow_parameters_are_lowered_by_less_than_their_spacing(dtype: torch.dtype, strength: float) -> None:
    """Stochastic rounding lets small thresholds through; rounding to nearest, the control, loses them."""
    drops = {}
    for stochastic in (True, False):
        p = torch.nn.Parameter((normal(64, 16) * 0.5).to(dtype))
        options = {"rank_penalty_strength": strength, "stochastic_rounding": stochastic, "min_8bit_size": 0}
        after, plain = trained(p, 10, kind=Automagic8bit, **options)
        drop = (singular_values(plain.float()) - singular_values(after.float())).mean().item()
        drops[stochastic] = drop / (10 * 1e-2 * strength)
    assert abs(drops[True] - 1) < ROUNDING_NOISE
    assert drops[False] < 0.1
