"""What the monitor's adjustments change, and what they leave alone."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from monitoring_cases import needs_bitsandbytes, normal, steps, verdicts

from automagic_bnb import AdaptiveTrainingMonitor, Automagic8bit, Automagic32bit, bnb, requantization
from automagic_bnb.watch.monitoring import state_bytes


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
    opt = Requantized(tools.parameters((64, 96)), lr=1e-3, optim_bits=32, factored=False)
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
    opt = Automagic8bit(parameters, lr=1e-4, factored=False)
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
    opt = Automagic8bit(parameters, lr=1e-3, factored=False)
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
