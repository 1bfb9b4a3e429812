"""The monitor on optimizers in every trouble that is not in the loss, and what it says of itself."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from monitoring_cases import needs_bitsandbytes, verdicts

from automagic_bnb import AdaptiveTrainingMonitor, Automagic8bit, Automagic32bit, check_training_health
from automagic_bnb.watch import loss_curve, monitoring
from automagic_bnb.watch.monitoring import REASONS


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
        ({"lr": 1.02e-7}, "min_lr", 5e-8),
        ({"lr": 1e-8}, None, None),  # a bound above the mean rate holds nothing
        ({"auto_lr": True, "lr": 1e-5, "max_lr": 1e-5}, None, None),  # where a rate that is found may well end
        ({"lr": 1e-3}, None, None),
        ({"lr": 0.0}, None, None),
        ({"lr": 1e-3, "max_lr": 1e-3, "lora": True}, None, None),  # of all weights alike, it holds none
        ({"auto_lr": True, "lr": 1e-5, "warmup_steps": 0}, None, None),
    ],
)
def test_a_rate_at_its_bound(options: dict[str, Any], bound: str | None, value: float | None, tools: Any) -> None:
    """Given and found rates; the group at the bound is the one that is changed, and then is no longer there."""
    parameters, others = tools.parameters((64, 64)), tools.parameters((32, 64), seed=1)
    opt = Automagic8bit([{"params": others, "lr": 2e-4}, {"params": parameters, **options}], mask_bits=8)
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
    opt = Automagic8bit([a, b], lora=True, max_lr=1e-4)
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
