"""The report on a run: what it names, and that a healthy run is called healthy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from monitoring_cases import DIVERGING, FALLING, HEALTHY, STALLED, lognormal, needs_bitsandbytes, normal, steps

from automagic_bnb import Automagic8bit, Automagic32bit, check_training_health
from automagic_bnb.watch.monitoring import HEALTH_ISSUES, REASONS

FLAT = ("nothing but noise, for long", "nothing but even noise", "all zero", "a fine-tune at its plateau")
"""Of these a long look is right to say that the loss hardly fell."""


@pytest.mark.parametrize("name", [n for n in HEALTHY if n not in FLAT and n != "a clear fall, then constant"])
def test_a_healthy_run_gets_a_healthy_report(name: str, optimizer: Any) -> None:
    report = check_training_health(optimizer, HEALTHY[name].tolist())
    assert report == {"status": "healthy", "issues": [], "suggestions": []}


@pytest.mark.parametrize(("sigma", "fall"), [(0.5, 0.05), (0.9, 0.05), (0.9, 0.0), (1.0, 0.05)])
@pytest.mark.parametrize("count", [25, 100, 600, 2000])
def test_losses_of_diffusion_get_a_healthy_report(sigma: float, fall: float, count: int, optimizer: Any) -> None:
    """Batches of one, a fall far below their noise: of a hundred runs a few, at most, are called anything."""
    found = []
    for seed in range(100):
        curve = 0.12 * lognormal(count, sigma, seed) * (1 - fall * steps(count) / count)
        found += check_training_health(optimizer, curve.tolist())["issues"]
    assert set(found) <= {"slow_convergence", "unstable_loss"}
    assert len(found) <= 8


@pytest.mark.parametrize(("ratio", "issues"), [(0.1, ["slow_convergence"]), (0.02, [])])
def test_a_flat_loss_is_slow_once_its_noise_is_seen_through(ratio: float, issues: list[str], optimizer: Any) -> None:
    curve = lognormal(20_000, 0.5) * (1 - 0.05 * steps(20_000) / 20_000)
    assert check_training_health(optimizer, curve, ratio)["issues"] == issues


def oscillating(count: int) -> np.ndarray:
    return np.where(steps(count) % 2 == 0, 1.0, 10.0)


@pytest.mark.parametrize(
    ("losses", "issue"),
    [
        (DIVERGING["slowly, 5 % noise"], "divergence"),
        (DIVERGING["NaN just now"], "divergence"),
        (STALLED["constant"], "convergence_stall"),
        (HEALTHY["nothing but noise, for long"], "slow_convergence"),
        (1 - steps(100) * 5e-4, "slow_convergence"),
        (oscillating(101), "unstable_loss"),
        (np.concatenate([FALLING[:300], FALLING[300:400] * (1 + 0.3 * normal(100))]), "unstable_loss"),
    ],
)
def test_what_a_report_names(losses: np.ndarray, issue: str, optimizer: Any) -> None:
    report = check_training_health(optimizer, losses)
    assert report["status"] == "warning"
    assert issue in report["issues"]
    assert report["suggestions"] == [{**REASONS, **HEALTH_ISSUES}[x] for x in report["issues"]]


def test_the_threshold_is_the_fall_asked_for(optimizer: Any) -> None:
    """A loss that falls by 16 % from the first fifth to the last."""
    losses = 1 - 0.2 * steps(101) / 100
    for ratio, issues in ((0.1, []), (0.15, []), (0.18, ["slow_convergence"]), (0, []), (1, ["slow_convergence"])):
        assert check_training_health(optimizer, losses, ratio)["issues"] == issues


@pytest.mark.parametrize("count", [0, 1, 2, 19])
def test_few_losses_are_no_issue(count: int, optimizer: Any) -> None:
    assert check_training_health(optimizer, [0.7] * count)["status"] == "healthy"


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("made", "shapes", "issues"),
    [
        (Automagic8bit, [(32, 32)] * 3, ["quantization_ineffective"]),
        (Automagic8bit, [(64, 96), (32, 32)], []),
        (Automagic32bit, [(64, 96)], []),
    ],
)
def test_quantization_that_does_not_take_place(made: Any, shapes: Any, issues: list[str], tools: Any) -> None:
    parameters = tools.parameters(*shapes)
    opt = made(parameters, lr=1e-3)
    assert check_training_health(opt, [])["issues"] == []  # no state yet
    tools.train(opt, parameters, range(2))
    assert check_training_health(opt, [])["issues"] == issues


def test_a_report_counts_all_that_was_ever_skipped(tools: Any) -> None:
    parameters = tools.parameters((64, 96))
    opt = Automagic8bit(parameters, lr=1e-3)
    for step in range(3):
        tools.give_gradients(parameters, step)
        parameters[0].grad[: step * 10] = math.inf
        opt.step()
    assert check_training_health(opt, [])["issues"] == ["skipped_gradients"]


@pytest.mark.parametrize(
    ("losses", "ratio", "error"),
    [
        ([1.0], -0.1, ValueError),
        ([1.0], 1.1, ValueError),
        ([1.0], math.nan, ValueError),
        ([1.0], "a", TypeError),
        ([None], 0.1, TypeError),
        (["a"], 0.1, TypeError),
    ],
)
def test_reports_that_cannot_be_made(losses: Any, ratio: Any, error: type, optimizer: Any) -> None:
    with pytest.raises(error, match=r"threshold_ratio|metric 'loss'"):
        check_training_health(optimizer, losses, ratio)
