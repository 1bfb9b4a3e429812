"""The monitor on loss curves of every kind, on optimizers in every trouble, and what its adjustments change."""

from __future__ import annotations

import copy
import math
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch.utils._python_dispatch import TorchDispatchMode

from automagic_bnb import (
    AdaptiveTrainingMonitor,
    Automagic8bit,
    Automagic32bit,
    bnb,
    check_training_health,
    loss_curve,
    monitoring,
    requantization,
)
from automagic_bnb.loss_curve import rise
from automagic_bnb.monitoring import HEALTH_ISSUES, REASONS, state_bytes

needs_bitsandbytes = pytest.mark.skipif(not bnb.BITSANDBYTES_AVAILABLE, reason="bitsandbytes is not installed")


def normal(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count)


def lognormal(count: int, sigma: float, seed: int = 0) -> np.ndarray:
    """Noise of diffusion losses: skewed, with a coefficient of variation of about sigma."""
    return np.random.default_rng(seed).lognormal(0, sigma, count)


def spiked(curve: np.ndarray, at: int, width: int, height: float) -> np.ndarray:
    curve = curve.copy()
    curve[at : at + width] *= height
    return curve


def steps(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.float64)


FALLING = 0.3 + 2 * np.exp(-steps(1000) / 200)
FLOOR = 0.05 + 2.45 * np.exp(-steps(1500) / 100)

HEALTHY = {
    "falling": FALLING,
    "falling, 30 % noise": FALLING * (1 + 0.3 * normal(1000)),
    "falling, noise of diffusion": FALLING * lognormal(1000, 0.7),
    "falling slowly, 5 % noise": (2 - steps(3000) / 6000) * (1 + 0.05 * normal(3000)),
    "nothing but noise, for long": lognormal(20_000, 0.5),
    "nothing but even noise": 1 + 0.2 * normal(20_000),
    "at the floor after convergence": FLOOR,
    "at the floor with noise": FLOOR * (1 + 0.1 * normal(1500)),
    "rippling at a floor of nothing": 2 * np.exp(-steps(1500) / 20) + 1e-5 * (2 + np.sin(steps(1500) / 60)),
    "exactly 0 in the end": np.maximum(1 - steps(500) / 100, 0.0),
    "spikes that recover": spiked(spiked(FALLING * (1 + 0.05 * normal(1000)), 480, 15, 50), 800, 20, 4),
    "a spike right at the end": spiked(FALLING, 990, 10, 100),
    "one infinite loss that recovered": spiked(FALLING, 970, 1, math.inf),
    "negative, falling": -5 - 2 * steps(1000) / 1000 + 0.1 * normal(1000),
    "through zero, falling": 1 - steps(1000) / 500 + 0.05 * normal(1000),
    "all zero": np.zeros(200),
    "a fine-tune at its plateau": 1.25 + 0.05 * np.exp(-steps(3000) / 300) + 1e-5 * normal(3000),
    "a clear fall, then constant": np.concatenate([2.4 - steps(100) / 500, np.full(200, 2.2)]),
}
DIVERGING = {
    "exploding": np.concatenate([FALLING[:300], 0.6 * np.exp(steps(200) / 30)]),
    "exploding from the start": np.exp(steps(60) / 20) * (1 + 0.02 * normal(60)),
    "slowly": np.concatenate([FALLING[:800], 0.34 * (1 + steps(1000) * 5e-4)]),
    "slowly, 5 % noise": (1 + steps(2000) * 2e-4) * (1 + 0.05 * normal(2000)),
    "slowly, noise of diffusion": (1 + steps(4000) * 5e-4) * lognormal(4000, 0.5),
    "a jump that stays": np.concatenate([FALLING[:600], np.full(200, 1.4)]) * (1 + 0.05 * normal(800)),
    "negative, rising": -5 + 2 * steps(1000) / 1000 + 0.1 * normal(1000),
    "NaN from some step on": np.concatenate([FALLING[:400], np.full(60, math.nan)]),
    "NaN just now": np.concatenate([FALLING[:400], [math.nan]]),
    "infinite just now, at the very start": np.array([math.inf]),
    "NaN now and then": np.where(steps(1000) % 7 == 3, math.nan, FALLING),
}
STALLED = {
    "constant": np.full(100, 0.7),
    "constant but for the last digits": 0.7 + 1e-6 * normal(100),
    "constant after hardly a fall": np.concatenate([2.4 - steps(100) / 2500, np.full(200, 2.36)]),
    "constant and negative": np.full(100, -3.0),
    "falling by a millionth a step": 1 - steps(300) * 1e-6,
    "constant with spikes": spiked(np.full(200, 0.7), 190, 5, 3),
}


@pytest.fixture
def optimizer(tools: Any) -> Automagic8bit:
    return Automagic8bit(tools.parameters((64, 96), (32,)), lr=1e-3)


def verdicts(monitor: AdaptiveTrainingMonitor, curve: np.ndarray, every: int = 50) -> list[str | None]:
    """What is said at each look, every 50 losses and at the end."""
    found = []
    for start in range(0, len(curve), every):
        for loss in curve[start : start + every].tolist():
            monitor.update(loss)
        should, reason = monitor.should_adjust_config()
        assert should == (reason is not None)
        found.append(reason)
    return found


# --- loss curves -----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("window", "error"), [(9, ValueError), (-1, ValueError), (50.0, TypeError), ("50", TypeError), (True, TypeError)]
)
def test_windows_that_are_none(window: Any, error: type, optimizer: Any) -> None:
    with pytest.raises(error, match=rf"window_size={window!r}: must be a whole number >= 10"):
        AdaptiveTrainingMonitor(optimizer, window_size=window)


def test_other_optimizers_are_refused_and_wrapped_ones_found(optimizer: Any) -> None:
    with pytest.raises(TypeError, match="AdamW: must be an Automagic"):
        AdaptiveTrainingMonitor(torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]))
    wrapped = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))
    assert AdaptiveTrainingMonitor(wrapped).optimizer is optimizer


# --- the other reasons -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "scarce"), [((0, 100), True), ((5, 100), True), ((5.1, 100), False), ((80, 100), False), (None, False)]
)
def test_memory_pressure(free: Any, scarce: bool, optimizer: Any) -> None:
    monitor = AdaptiveTrainingMonitor(optimizer, memory_probe=lambda: free)
    assert monitor.should_adjust_config() == ((True, "memory_pressure") if scarce else (False, None))


def test_a_gpu_is_asked_through_torch(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scarcest of the parameters' devices counts; what PyTorch keeps beyond its peak is free. On a CPU: nothing."""
    asked = []
    free = {"cuda:0": (50, 100), "cuda:1": (5, 100), "cuda:2": (1, 100)}
    reserved, peak = {"cuda:0": 40, "cuda:1": 90, "cuda:2": 90}, {"cuda:0": 40, "cuda:1": 83, "cuda:2": 30}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(str(device)) or free[str(device)])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved[str(device)])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[str(device)])
    monitor = AdaptiveTrainingMonitor(optimizer)
    assert monitor.should_adjust_config() == (False, None)
    assert asked == []
    on_gpus = [SimpleNamespace(is_cuda=True, device=name) for name in free]
    monitor.optimizer = SimpleNamespace(param_groups=[{"params": on_gpus}])  # type: ignore[assignment]
    assert monitor._cuda_memory() == (12, 100)
    assert sorted(asked) == ["cuda:0", "cuda:1", "cuda:2"]


@pytest.mark.parametrize(("share", "found"), [(0.5, True), (0.02, True), (0.005, False), (0.0, False)])
def test_skipped_gradients_since_the_last_look(share: float, found: bool, tools: Any) -> None:
    parameters = tools.parameters((100, 100))
    opt = Automagic8bit(parameters, lr=1e-3)
    tools.give_gradients(parameters, 0)
    parameters[0].grad[:] = math.nan  # from before the monitor was there
    opt.step()
    monitor = AdaptiveTrainingMonitor(opt)
    for step in range(4):
        tools.give_gradients(parameters, step)
        parameters[0].grad.view(-1)[: int(share * 10_000)] = math.nan
        opt.step()
    assert monitor.should_adjust_config() == ((True, "skipped_gradients") if found else (False, None))
    assert monitor.should_adjust_config() == (False, None)  # none since
    tools.train(opt, parameters, range(4, 6))
    assert monitor.should_adjust_config() == (False, None)
    assert monitor.apply_adjustment("skipped_gradients") == {}
    assert monitor.should_adjust_config() == (False, None)


def broken_steps(opt: Any, parameters: list[Any], count: int) -> None:
    """Steps with nothing but NaN gradients."""
    for _ in range(count):
        for p in parameters:
            p.grad = torch.full_like(p, math.nan)
        opt.step()


def test_parameters_that_take_no_steps_do_not_dilute_what_is_skipped(tools: Any) -> None:
    """Half of the trained one's steps are lost, beside frozen ones and one that has not been trained since."""
    parameters, resting, frozen = tools.parameters((64, 64)), tools.parameters((500, 500)), tools.parameters((999, 999))
    frozen[0].requires_grad_(False)
    opt = Automagic8bit(parameters + resting + frozen, lr=1e-3)
    tools.train(opt, parameters + resting, range(3))
    resting[0].grad = None
    monitor = AdaptiveTrainingMonitor(opt)
    tools.train(opt, parameters, range(3, 6))
    assert monitor.should_adjust_config() == (False, None)
    broken_steps(opt, parameters, 3)
    assert monitor.should_adjust_config() == (True, "skipped_gradients")


def test_after_a_rollback_what_is_skipped_counts_at_once(tools: Any) -> None:
    parameters = tools.parameters((64, 64))
    opt = Automagic8bit(parameters, lr=1e-3)
    tools.train(opt, parameters, range(2))
    early = copy.deepcopy(opt.state_dict())
    tools.train(opt, parameters, range(2, 60))
    monitor = AdaptiveTrainingMonitor(opt)
    opt.load_state_dict(early)
    broken_steps(opt, parameters, 20)
    assert monitor.should_adjust_config() == (True, "skipped_gradients")
    opt.load_state_dict(early)
    tools.train(opt, parameters, range(2, 10))
    assert monitor.should_adjust_config() == (False, None)


@pytest.mark.parametrize(
    ("options", "bound", "value"),
    [
        ({"lr": 1e-3, "max_lr": 1e-3}, "max_lr", 2e-3),
        ({"lr": 1e-8}, "min_lr", 5e-8),
        ({"auto_lr": True, "lr": 1e-5, "max_lr": 1e-5}, None, None),  # where a rate that is found may well end
        ({"lr": 1e-3}, None, None),
        ({"lr": 0.0}, None, None),
        ({"auto_lr": True, "lr": 1e-5, "warmup_steps": 0}, None, None),
    ],
)
def test_a_rate_at_its_bound(options: dict[str, Any], bound: str | None, value: float | None, tools: Any) -> None:
    """Given and found rates; the group at the bound is the one that is changed, and then is no longer there."""
    parameters, others = tools.parameters((64, 64)), tools.parameters((32, 64), seed=1)
    opt = Automagic8bit([{"params": others, "lr": 2e-4}, {"params": parameters, **options}])
    monitor = AdaptiveTrainingMonitor(opt)
    assert monitor.should_adjust_config() == (False, None)  # not before the first step
    tools.train(opt, parameters + others, range(6))
    reason = "learning_rate_at_bound" if bound else None
    assert monitor.should_adjust_config() == (bound is not None, reason)
    changed = monitor.apply_adjustment(reason)
    assert changed == (pytest.approx({f"group1/{bound}": value}) if bound else {})
    if bound:
        assert opt.param_groups[1][bound] == pytest.approx(value)


def test_a_found_rate_at_max_lr_is_named_once_nothing_else_helps_a_stall(tools: Any) -> None:
    """In 32 bits and at its bound the rate cannot be doubled; then its bound is doubled, twice."""
    parameters = tools.parameters((64, 64))
    opt = Automagic32bit(parameters, auto_lr=True, lr=1e-5, max_lr=1e-5)
    monitor = AdaptiveTrainingMonitor(opt)
    tools.train(opt, parameters, range(6))
    assert verdicts(monitor, np.full(50, 0.7)) == ["convergence_stall"]
    assert monitor.apply_adjustment("convergence_stall") == {}
    assert monitor.should_adjust_config() == (True, "learning_rate_at_bound")
    for bound in (2e-5, 4e-5):
        opt.param_groups[0]["auto_lr_rate"].fill_(opt.param_groups[0]["max_lr"])
        assert verdicts(monitor, np.full(50, 0.7)) == ["learning_rate_at_bound"]
        assert monitor.apply_adjustment("learning_rate_at_bound") == {"group0/max_lr": pytest.approx(bound)}
    opt.param_groups[0]["auto_lr_rate"].fill_(opt.param_groups[0]["max_lr"])
    assert verdicts(monitor, np.full(50, 0.7)) == ["learning_rate_at_bound"]
    assert monitor.apply_adjustment("learning_rate_at_bound") == {}
    assert monitor.should_adjust_config() == (False, None)
    assert opt.param_groups[0]["max_lr"] == pytest.approx(4e-5)


def test_the_default_optimizer_at_its_bound_is_healthy(tools: Any) -> None:
    """A LoRA learns a low-rank map with a rate that is found, which reaches max_lr and stays there."""
    generator = torch.Generator().manual_seed(0)
    goal = torch.randn(128, 4, generator=generator) @ torch.randn(4, 128, generator=generator) / 16
    a, b = tools.parameters((32, 128))[0], torch.nn.Parameter(torch.zeros(128, 32))
    opt = Automagic8bit([a, b], lora=True, warmup_steps=20, max_lr=1e-4)
    monitor, losses, held = AdaptiveTrainingMonitor(opt), [], 0
    for step in range(400):
        x = torch.randn(32, 128, generator=generator)
        loss = (x @ a.T @ b.T - x @ goal + 0.3 * torch.randn(32, 128, generator=generator)).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        monitor.update(loss)
        losses.append(loss.detach())
        if step % 50 == 49:
            assert monitor.should_adjust_config() == (False, None)
            held += opt.get_metrics()["lr/share_at_max"] > monitoring.AT_BOUND_SHARE
    assert held >= 3
    assert check_training_health(opt, losses)["status"] == "healthy"


def test_the_most_urgent_reason_comes_first(tools: Any) -> None:
    parameters = tools.parameters((64, 96))
    opt = Automagic8bit(parameters, lr=1e-3)
    monitor = AdaptiveTrainingMonitor(opt, memory_probe=lambda: (0, 100))
    broken_steps(opt, parameters, 5)
    assert verdicts(monitor, np.full(50, 0.7)) == ["skipped_gradients"]
    assert monitor.should_adjust_config() == (True, "memory_pressure")
    monitor.update(math.nan)
    assert monitor.should_adjust_config() == (True, "divergence")


@needs_bitsandbytes
def test_a_reason_without_a_remedy_left_hides_no_other(tools: Any) -> None:
    opt = Automagic8bit(tools.parameters((64, 96)), lr=1e-3, factored=True)
    monitor = AdaptiveTrainingMonitor(opt, memory_probe=lambda: (0, 100))
    assert verdicts(monitor, np.full(50, 0.7)) == ["memory_pressure"]
    assert monitor.apply_adjustment("memory_pressure") == {}
    assert monitor.should_adjust_config() == (True, "convergence_stall")


def test_every_reason_has_a_suggestion(optimizer: Any) -> None:
    monitor = AdaptiveTrainingMonitor(optimizer)
    assert {monitor.get_adjustment_suggestion(reason) for reason in REASONS} == set(REASONS.values())
    assert monitor.get_adjustment_suggestion(None) == "nothing to adjust"
    assert monitor.apply_adjustment(None) == {}
    for method in (monitor.get_adjustment_suggestion, monitor.apply_adjustment):
        with pytest.raises(ValueError, match=r"reason='stall': must be one of 'divergence'.*or None"):
            method("stall")


def test_looking_changes_nothing(tools: Any) -> None:
    """Parameters, state, options, gradients and the global generator are as before, and so is the next step."""
    runs = []
    for monitored in (False, True):
        parameters = tools.parameters((64, 96))
        opt = Automagic8bit(parameters)
        monitor = AdaptiveTrainingMonitor(opt)
        torch.manual_seed(3)
        for step in range(6):
            tools.train(opt, parameters, range(step, step + 1))
            if monitored:
                monitor.update(parameters[0].square().mean())
                monitor.should_adjust_config()
                check_training_health(opt, [1.0, 0.5])
        runs.append((tools.snapshot(opt), torch.rand(3)))
    assert not tools.differences(*runs)


# --- adjustments -----------------------------------------------------------------------------------------------------


class Requantized(Automagic8bit):
    """Records the calls, and does to the groups what the real one does."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.calls: list[dict[str, Any]] = []
        super().__init__(*args, **options)

    def requantize(self, parameters: Any = None, **options: Any) -> None:
        assert parameters is None
        self.calls.append(options)
        for group in self.param_groups:
            group.update(options)


@needs_bitsandbytes
def test_memory_pressure_quantizes_step_by_step(tools: Any) -> None:
    opt = Requantized(tools.parameters((64, 96)), lr=1e-3, optim_bits=32)
    monitor = AdaptiveTrainingMonitor(opt)
    changes = [monitor.apply_adjustment("memory_pressure") for _ in range(3)]
    assert changes == [{"optim_bits": 8}, {"factored": True}, {}]
    assert opt.calls == changes[:2]


def test_without_bitsandbytes_there_is_nothing_to_quantize_by(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opt = Requantized(tools.parameters((64, 96)), lr=1e-3, optim_bits=32)
    monkeypatch.setattr(bnb, "BITSANDBYTES_AVAILABLE", False)
    assert AdaptiveTrainingMonitor(opt).apply_adjustment("memory_pressure") == {}
    assert opt.calls == []


def test_a_stall_gets_precision_and_then_a_higher_rate(tools: Any) -> None:
    opt = Requantized(tools.parameters((64, 96)), lr=1e-3, factored=True)
    monitor = AdaptiveTrainingMonitor(opt)
    assert monitor.apply_adjustment("convergence_stall") == {"optim_bits": 32}
    assert opt.calls == [{"optim_bits": 32}]
    assert monitor.apply_adjustment("convergence_stall") == {"group0/lr": 2e-3}
    assert len(opt.calls) == 1


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({"lr": 1e-4}, [2e-4, 4e-4]),
        ({"lr": 1e-4, "max_lr": 3e-4}, [2e-4]),
        ({"lr": 1e-4, "max_lr": 1e-4}, []),
        ({"auto_lr": True, "lr": 1e-5, "max_lr": 2e-5}, [2e-5]),  # ×2 of what is found, which is 1e-5 here
    ],
)
def test_stalls_double_the_rate_twice_and_not_beyond_max_lr(options: dict[str, Any], rates: list[float]) -> None:
    parameters = [torch.nn.Parameter(torch.ones(8, 8))]
    opt = Automagic32bit(parameters, **options)
    parameters[0].grad = torch.ones(8, 8)
    opt.step()
    if options.get("auto_lr"):
        opt.param_groups[0]["auto_lr_rate"].fill_(1e-5)
    monitor = AdaptiveTrainingMonitor(opt)
    for rate in rates:
        assert verdicts(monitor, np.full(50, 2.0)) == ["convergence_stall"]
        assert monitor.apply_adjustment("convergence_stall") == {"group0/lr": pytest.approx(rate)}
    assert verdicts(monitor, np.full(50, 2.0)) == ["convergence_stall"]
    assert monitor.apply_adjustment("convergence_stall") == {}
    assert verdicts(monitor, np.full(50, 2.0)) in ([None], ["learning_rate_at_bound"])


def test_of_several_groups_those_with_room_are_doubled(tools: Any) -> None:
    groups = [{"params": tools.parameters((8, 8)), "lr": 1e-4}, {"params": tools.parameters((8, 9)), "lr": 8e-4}]
    opt = Automagic32bit(groups, max_lr=1e-3)
    assert AdaptiveTrainingMonitor(opt).apply_adjustment("convergence_stall") == {"group0/lr": pytest.approx(2e-4)}
    assert opt.param_groups[1]["lr"] == 8e-4


def test_the_highest_rate_of_a_schedule_counts(tools: Any) -> None:
    """In warm-up the rate of the moment is small; doubled, its peak would pass max_lr."""
    made = torch.optim.lr_scheduler
    for kind in (
        lambda opt: made.LambdaLR(opt, lambda step: min((1 + step) / 100, 1)),
        lambda opt: made.OneCycleLR(opt, 6e-4, total_steps=100),
        lambda opt: made.CyclicLR(opt, 1e-5, 6e-4, cycle_momentum=False),
    ):
        opt = Automagic32bit(tools.parameters((8, 8)), lr=6e-4, max_lr=1e-3)
        scheduler = kind(opt)
        assert opt.param_groups[0]["lr"] < 1e-4
        assert AdaptiveTrainingMonitor(opt, scheduler=scheduler).apply_adjustment("convergence_stall") == {}


def test_a_rate_that_diverged_is_not_doubled_again(tools: Any) -> None:
    opt = Automagic32bit(tools.parameters((8, 8)), lr=1e-4)
    monitor = AdaptiveTrainingMonitor(opt)
    assert monitor.apply_adjustment("convergence_stall") == {"group0/lr": pytest.approx(2e-4)}
    assert monitor.apply_adjustment("divergence") == {"group0/lr": pytest.approx(1e-4)}
    assert monitor.apply_adjustment("convergence_stall") == {}


@needs_bitsandbytes
def test_stalls_and_memory_pressure_do_not_undo_each_other(tools: Any) -> None:
    """Memory that suffices for 8 bits and not for 32, whatever the plan says of it."""
    opt = Requantized(tools.parameters((64, 96)), lr=1e-4)
    is_small = lambda: opt.param_groups[0]["optim_bits"] == 8  # noqa: E731
    monitor = AdaptiveTrainingMonitor(opt, memory_probe=lambda: (10**9 if is_small() else 0, 10**9))
    said = []
    for _ in range(20):
        said += [
            reason for reason in verdicts(monitor, np.full(50, 2.0)) if reason and monitor.apply_adjustment(reason)
        ]
    assert said == ["convergence_stall", "memory_pressure", "convergence_stall", "convergence_stall"]
    assert opt.calls == [{"optim_bits": 32}, {"optim_bits": 8}]
    assert opt.param_groups[0]["lr"] == pytest.approx(4e-4)


@needs_bitsandbytes
@pytest.mark.parametrize("left", [-1, 1])
def test_a_stall_takes_32_bits_only_where_they_fit(left: int, tools: Any) -> None:
    """What the plan says that they take is what they take, and 5 % must be free beyond."""
    parameters = tools.parameters((64, 96), (32,))
    opt = Automagic8bit(parameters, lr=1e-4)
    tools.train(opt, parameters, range(2))
    held = opt.get_memory_efficiency_report()
    growth = state_bytes(opt, optim_bits=32) - state_bytes(opt)
    total = 20 * growth
    monitor = AdaptiveTrainingMonitor(opt, memory_probe=lambda: (2 * growth + left, total))
    changed = monitor.apply_adjustment("convergence_stall")
    assert changed == ({"optim_bits": 32} if left > 0 else {"group0/lr": pytest.approx(2e-4)})
    after, books = opt.get_memory_efficiency_report(), held["states_breakdown"]["code_books"]
    assert after["total_bytes"] == held["total_bytes"] + (growth - books if left > 0 else 0)


@needs_bitsandbytes
@pytest.mark.parametrize("reason", ["convergence_stall", "memory_pressure"])
def test_a_conversion_that_runs_out_of_memory_is_put_back(
    reason: str, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the second parameter: all storage and options are as before, 32 bits are not tried again."""
    parameters = tools.parameters((64, 96), (96, 64))
    opt = Automagic8bit(parameters, lr=1e-4)
    tools.train(opt, parameters, range(2))
    before, options = tools.snapshot(opt), copy.deepcopy(opt.config)
    real, calls = requantization.converted, []

    def converted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    monkeypatch.setattr(requantization, "converted", converted)
    monitor = AdaptiveTrainingMonitor(opt)
    changed = monitor.apply_adjustment(reason)
    assert changed == ({"group0/lr": pytest.approx(2e-4)} if reason == "convergence_stall" else {})
    assert len(calls) == 4
    assert {opt.state[p]["state1"].dtype for p in parameters} == {torch.uint8}
    assert (opt.config, opt.defaults["optim_bits"]) == (options, 8)
    assert [(g["optim_bits"], g["factored"]) for g in opt.param_groups] == [(8, False)]
    if reason == "memory_pressure":
        coarser = r"/state/0/(state|absmax)[23]:"  # of the first parameter, which had been factored
        assert not [x for x in tools.differences(before, tools.snapshot(opt)) if not re.match(coarser, x)]
    monitor.apply_adjustment("convergence_stall")
    assert len(calls) == 4
    tools.train(opt, parameters, range(2, 4))


@pytest.mark.skipif(not hasattr(Automagic8bit, "requantize"), reason="this version's optimizer has no requantize")
@needs_bitsandbytes
def test_adjusted_optimizers_train_on(tools: Any) -> None:
    """With the real `requantize`: storage follows, and the next steps move the weights."""
    parameters = tools.parameters((64, 96))
    opt = Automagic8bit(parameters, lr=1e-3)
    monitor = AdaptiveTrainingMonitor(opt)
    for step, (reason, dtype) in enumerate(
        [("convergence_stall", torch.float32), ("memory_pressure", torch.uint8), ("memory_pressure", torch.uint8)]
    ):
        tools.train(opt, parameters, range(step, step + 1))
        assert monitor.apply_adjustment(reason)
        before = parameters[0].detach().clone()
        tools.train(opt, parameters, range(step + 10, step + 11))
        assert opt.state[parameters[0]]["state1"].dtype == dtype
        assert torch.isfinite(parameters[0]).all()
        assert not torch.equal(before, parameters[0])
    assert "exp_avg_sq_row" in opt.state[parameters[0]]


@pytest.mark.parametrize("options", [{"lr": 1e-3}, {"auto_lr": True, "lr": 1e-3}])
def test_divergence_halves_every_elements_rate(options: dict[str, Any], tools: Any) -> None:
    parameters = tools.parameters((64, 96))
    opt = Automagic8bit([{"params": parameters, **options}])
    tools.train(opt, parameters, range(5))
    before = opt.element_learning_rates(parameters[0])
    assert AdaptiveTrainingMonitor(opt).apply_adjustment("divergence") == {"group0/lr": 5e-4}
    assert torch.allclose(opt.element_learning_rates(parameters[0]), before / 2, rtol=1e-6)


made = torch.optim.lr_scheduler
SCHEDULERS: dict[str, Any] = {
    "lambda": lambda opt: made.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "cosine": lambda opt: made.CosineAnnealingLR(opt, T_max=20),
    "cosine to a floor": lambda opt: made.CosineAnnealingLR(opt, T_max=20, eta_min=4e-4),
    "warm restarts": lambda opt: made.CosineAnnealingWarmRestarts(opt, T_0=4, eta_min=1e-4),
    "exponential": lambda opt: made.ExponentialLR(opt, 0.9),
    "linear": lambda opt: made.LinearLR(opt, 0.1, 1, 10),
    "plateau": lambda opt: made.ReduceLROnPlateau(opt),
    "cyclic": lambda opt: made.CyclicLR(opt, 1e-4, 1e-3, step_size_up=4, cycle_momentum=False),
    "one cycle": lambda opt: made.OneCycleLR(opt, 1e-3, total_steps=20),
    "one cycle of three phases": lambda opt: made.OneCycleLR(opt, 1e-3, total_steps=20, three_phase=True),
    "sequence": lambda opt: made.SequentialLR(
        opt, [made.LinearLR(opt, 0.1, 1, 4), made.CosineAnnealingLR(opt, 16)], [4]
    ),
    "chain": lambda opt: made.ChainedScheduler([made.LinearLR(opt, 0.1, 1, 4), made.ExponentialLR(opt, 0.9)]),
    "accelerate's": lambda opt: Wrapped(made.LambdaLR(opt, lambda step: 1 / (1 + step))),
}


class Wrapped:
    """A scheduler as accelerate wraps it."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def step(self) -> None:
        self.scheduler.step()


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_halved_rate_stays_halved_under_its_scheduler(kind: str, tools: Any) -> None:
    """Each later rate is half of the one without the adjustment; a scheduler kept from the monitor may undo it."""
    rates: dict[str, list[float]] = {}
    elements: dict[str, list[float]] = {}
    for told in ("not at all", "yes", "no"):
        parameters = tools.parameters((8, 8))
        opt = Automagic8bit(parameters, lr=1e-3)
        scheduler = SCHEDULERS[kind](opt)
        monitor = AdaptiveTrainingMonitor(opt, scheduler=scheduler if told == "yes" else None)
        rates[told], elements[told] = [], []
        for step in range(16):
            tools.train(opt, parameters, range(step, step + 1))
            scheduler.step(*([1.0] if kind == "plateau" else []))
            if step == 2 and told != "not at all":
                monitor.apply_adjustment("divergence")
            rates[told].append(opt.param_groups[0]["lr"])
            elements[told].append(float(opt.get_avg_learning_rate()))
    assert rates["yes"][2:] == pytest.approx([x / 2 for x in rates["not at all"][2:]])
    assert elements["yes"][2:] == pytest.approx([x / 2 for x in elements["not at all"][2:]], rel=1e-4)
    if kind in ("lambda", "cyclic", "one cycle"):
        assert rates["no"][3:] == pytest.approx(rates["not at all"][3:])


def test_a_scheduler_of_unknown_kind_gives_a_warning_once(tools: Any, recwarn: pytest.WarningsRecorder) -> None:
    class Own(made.LRScheduler):
        def get_lr(self) -> Any:
            return [1e-3 for _ in self.optimizer.param_groups]

    opt = Automagic8bit(tools.parameters((8, 8)), lr=1e-3)
    monitor = AdaptiveTrainingMonitor(opt, scheduler=Own(opt))
    recwarn.clear()
    for _ in range(2):
        monitor.apply_adjustment("divergence")
    (warning,) = [x for x in recwarn if "scheduler=Own" in str(x.message)]
    assert "may set the rate back" in str(warning.message)


def test_an_adjusted_run_is_judged_anew(optimizer: Any) -> None:
    """A window's time to recover; then its new level counts, not the one that was lost."""
    monitor = AdaptiveTrainingMonitor(optimizer)
    assert (
        verdicts(monitor, np.concatenate([np.full(50, 0.5) + 0.01 * normal(50), np.full(50, 2.0)]))[-1] == "divergence"
    )
    monitor.apply_adjustment("divergence")
    assert monitor.loss_history == []
    assert set(verdicts(monitor, 2.0 - steps(300) / 400 + 0.01 * normal(300))) == {None}
    assert verdicts(monitor, np.full(50, 3.0) + 0.1 * normal(50)) == ["divergence"]


# --- the report ------------------------------------------------------------------------------------------------------


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


# --- the documentation -----------------------------------------------------------------------------------------------


def test_the_docstrings_name_the_thresholds() -> None:
    """Each number as it is in the code."""
    of_monitor, of_report = (
        " ".join((x.__doc__ or "").split()) for x in (AdaptiveTrainingMonitor, check_training_health)
    )
    for text in (
        f"by {loss_curve.DIVERGENCE_RISE:.0%} of".replace("%", " %"),
        f"by {loss_curve.LOST_PROGRESS:.0%} of the way".replace("%", " %"),
        f"{loss_curve.STANDARD_ERRORS:g} standard errors",
        f"more than {100 * loss_curve.NON_FINITE_SHARE:g} % of the window",
        f"more than {100 * monitoring.SKIPPED_SHARE:g} % of all elements' updates",
        f"{100 * monitoring.FREE_MEMORY_SHARE:g} % or less of a GPU's memory",
        f"less than {100 * loss_curve.STALL_RATE:g} % of its level a step",
        f"by {100 * loss_curve.CONVERGED_SHARE:g} % and {loss_curve.CERTAIN_ERRORS:g} standard errors",
        f"{100 * monitoring.AT_BOUND_SHARE:g} % of a group's elements",
        f"{monitoring.MIN_WINDOW} at least",
    ):
        assert text in of_monitor, text
    for text in (
        f"by {loss_curve.CERTAIN_ERRORS:g} standard errors",
        f"from {loss_curve.LEAST_LOSSES} losses on",
        f"{loss_curve.LEAST_LOSSES} at least",
        f"from {2 * loss_curve.LEAST_LOSSES} losses on",
        f"more than {loss_curve.WILD_SCATTER:g} times its level",
        f"more than {loss_curve.SCATTER_GROWTH:g} times the scatter before it",
        f"{100 * loss_curve.LEAST_SCATTER:g} % of its level",
        f"less than {100 * monitoring.QUANTIZED_SHARE:g} % of the elements",
    ):
        assert text in of_report, text
    assert monitoring.MOST_CHANGES == 2
    assert monitoring.LR_FACTOR == 2
