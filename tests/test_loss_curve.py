"""The monitor on loss curves of every kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from monitoring_cases import DIVERGING, HEALTHY, STALLED, normal, steps, verdicts
from torch.utils._python_dispatch import TorchDispatchMode

from automagic_bnb import AdaptiveTrainingMonitor, Automagic8bit
from automagic_bnb.watch.loss_curve import rise


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_loss_is_never_found_fault_with(name: str, optimizer: Any) -> None:
    assert set(verdicts(AdaptiveTrainingMonitor(optimizer), HEALTHY[name])) == {None}


@pytest.mark.parametrize("name", DIVERGING)
def test_divergence_is_found_and_stays_found(name: str, optimizer: Any) -> None:
    found = verdicts(AdaptiveTrainingMonitor(optimizer), DIVERGING[name])
    assert found[-1] == "divergence"
    assert set(found) <= {None, "divergence"}


@pytest.mark.parametrize("name", STALLED)
def test_a_stall_is_found(name: str, optimizer: Any) -> None:
    found = verdicts(AdaptiveTrainingMonitor(optimizer), STALLED[name])
    assert found[-1] == "convergence_stall"
    assert set(found) <= {None, "convergence_stall"}


def test_a_longer_window_sees_a_stall_through_noise(optimizer: Any) -> None:
    """2 % of noise: fifty losses leave it open, a thousand do not; and a run that falls is no stall."""
    noise = 1 + 0.02 * normal(4000)
    for window, flat in ((50, None), (1000, "convergence_stall")):
        monitor = AdaptiveTrainingMonitor(optimizer, window_size=window)
        assert verdicts(monitor, noise)[-1] == flat
        monitor = AdaptiveTrainingMonitor(optimizer, window_size=window)
        assert verdicts(monitor, noise * (1 - steps(4000) * 1e-4))[-1] is None


@pytest.mark.parametrize("window", [100, 500])
def test_a_fine_tune_at_its_plateau_does_not_stall(window: int, optimizer: Any) -> None:
    """Losses fall by 4 % beyond their noise and stay: the end of training. Those that never fell still stall."""
    noise = 0.002 * normal(6000)
    monitor = AdaptiveTrainingMonitor(optimizer, window_size=window)
    assert set(verdicts(monitor, 1.25 + 0.05 * np.exp(-steps(6000) / 600) + noise, every=window)) == {None}
    monitor = AdaptiveTrainingMonitor(optimizer, window_size=500)
    assert verdicts(monitor, 1.25 + noise, every=500)[-1] == "convergence_stall"


@pytest.mark.parametrize("window", [10, 20])
def test_small_windows_raise_no_false_alarms(window: int, optimizer: Any) -> None:
    """60 noisy healthy runs; and a loss that triples is still seen."""
    for seed in range(60):
        curve = 1 + 0.3 * np.exp(-steps(600) / 200) + 0.2 * normal(600, seed)
        monitor = AdaptiveTrainingMonitor(optimizer, window_size=window)
        assert set(verdicts(monitor, curve, every=window)) == {None}, seed
        assert verdicts(monitor, 3 + 0.2 * normal(window, seed), every=window) == ["divergence"]


@pytest.mark.parametrize(("window", "found"), [(50, {None, "divergence"}), (250, {None})])
def test_a_window_should_hold_the_period_of_a_loss(window: int, found: set[str | None], optimizer: Any) -> None:
    """What the docstring says: crest and trough of a period of 125 lie in different windows of 50."""
    curve = 0.5 + 0.1 * np.sin(steps(3000) * 2 * np.pi / 125) + 0.01 * normal(3000)
    assert set(verdicts(AdaptiveTrainingMonitor(optimizer, window_size=window), curve)) == found


def test_no_verdict_before_the_window_is_full(optimizer: Any) -> None:
    monitor = AdaptiveTrainingMonitor(optimizer, window_size=50)
    assert monitor.should_adjust_config() == (False, None)
    assert verdicts(monitor, np.full(49, 0.7), every=49) == [None]
    monitor.update(0.7)
    assert monitor.should_adjust_config() == (True, "convergence_stall")


@given(some.floats(1e-6, 1e6), some.integers(0, 10_000), some.sampled_from(["falling", "constant", "rising"]))
@settings(max_examples=25, deadline=None)
def test_the_unit_of_the_loss_does_not_matter(scale: float, seed: int, kind: str) -> None:
    slope = {"falling": -4e-3, "constant": 0.0, "rising": 8e-3}[kind]
    noise = 0.0 if kind == "constant" else 0.05
    curve = scale * (1 + slope * steps(200)) * (1 + noise * normal(200, seed))
    monitor = AdaptiveTrainingMonitor(Automagic8bit([torch.nn.Parameter(torch.ones(3))], lr=1e-3))
    wanted = {"falling": None, "constant": "convergence_stall", "rising": "divergence"}[kind]
    assert verdicts(monitor, curve)[-1] == wanted


def test_the_standard_error_of_medians() -> None:
    """Against the scatter of ten thousand differences, which 2 % of spikes of 1000 do not change much."""
    x = np.random.default_rng(1).normal(3.0, 2.0, size=(10_000, 2, 50))
    differences = np.median(x[:, 1], axis=1) - np.median(x[:, 0], axis=1)
    spikes = x.copy()
    spikes[:, :, 7] = 1000
    for samples in (x, spikes):
        found = np.array([rise(older, newer) for older, newer in samples[:1000]])
        assert found[:, 1].mean() == pytest.approx(differences.std(), rel=0.1)
        assert abs(found[:, 0].mean()) < 0.1


def test_losses_may_be_tensors(optimizer: Any) -> None:
    """0-d or of one element, of any dtype, with their graph, changed afterwards by who owns them."""
    monitor, owned = AdaptiveTrainingMonitor(optimizer, window_size=10), torch.tensor(3.0)
    weight = torch.ones(1, requires_grad=True)
    for loss in (owned, torch.tensor([2.5], dtype=torch.bfloat16), weight.sum() * 2, np.float64(1.5), 1, weight.sum()):
        monitor.update(loss)
    owned.fill_(99)
    assert monitor.loss_history == [3.0, 2.5, 2.0, 1.5, 1.0, 1.0]
    for _ in range(30):
        monitor.update(torch.tensor(0.25))
    assert monitor.loss_history == [0.25] * 10


class Operations(TorchDispatchMode):
    """Notes the names of all operations on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


def test_a_loss_on_a_gpu_is_not_waited_for(optimizer: Any) -> None:
    """An update only copies on the device; the numbers come over together, once a window."""
    monitor, losses = AdaptiveTrainingMonitor(optimizer, window_size=10), torch.rand(10, dtype=torch.float64).unbind()
    with Operations() as seen:
        for loss in losses[:9]:
            monitor.update(loss)
    assert set(seen.names) <= {"detach", "clone", "view", "alias", "_reshape_alias"}
    with Operations() as seen:
        monitor.update(losses[9])
    assert seen.names.count("stack") == 1
    with Operations() as seen:  # control: this is what waiting looks like
        losses[0].item()
    assert seen.names == ["_local_scalar_dense"]


@pytest.mark.parametrize("loss", [None, "0.5", torch.zeros(2), torch.zeros(0), torch.tensor(1j), [1.0]])
def test_what_is_no_loss(loss: Any, optimizer: Any) -> None:
    with pytest.raises(TypeError, match=r"metric 'loss'|complex"):
        AdaptiveTrainingMonitor(optimizer).update(loss)
