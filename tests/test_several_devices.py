"""A rate that is found for parameters on several devices: all step in the kernels, at one rate.

With one device at hand every second parameter counts as lying on another, to whose kernels d goes as a copy.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from kernel_cases import COMPILED, DEVICE
from torch import Tensor

from automagic_bnb import Automagic8bit, auto_lr
from automagic_bnb.auto_lr import RateFinder

STEPS = 20
"""After some 13 the sums stand out from chance, and the rate grows."""
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")


@pytest.fixture
def second_device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Every second `tensor_stats` and rate is taken to be on it."""
    there, rates = torch.device("meta"), []

    def apart(held: list[tuple[Tensor, float]], home: torch.device) -> list[list[tuple[Tensor, float]]]:
        return [held[::2], held[1::2]]

    def rate_on(self: RateFinder, group: Any, device: torch.device) -> Tensor:
        rates.append(group)
        d = auto_lr.rate_tensor(group, device)
        return self._copies.setdefault((id(group), there), (group, d.clone()))[1] if len(rates) % 2 == 0 else d

    monkeypatch.setattr(auto_lr, "by_device", apart)
    monkeypatch.setattr(RateFinder, "rate_on", rate_on)
    return there


def parameters(*devices: Any) -> list[Any]:
    """Four, by turns on these devices."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(4, 40, generator=generator) * 0.1 for _ in range(4)]
    return [torch.nn.Parameter(x.to(devices[i % len(devices)])) for i, x in enumerate(made)]


def train(opt: Automagic8bit, p: list[Any], steps: range, one_by_one: bool = False) -> list[float]:
    """Towards 1 in every element; d, and num that it is estimated of, after each step."""
    found = []
    for _ in steps:
        for x in p:
            x.grad = x.detach() - 1
            if one_by_one:
                opt.step_parameter(x, opt.group_of(x))
        if not one_by_one:
            opt.step()
        found += [float(opt.param_groups[0]["auto_lr_rate"]), float(opt.param_groups[0]["auto_lr_sums"][0])]
    return found


def groups_of(p: list[Any], tied: bool) -> dict[str, Any]:
    """A group of all, or two that share a search and keep their rates' ratio."""
    if not tied:
        return {"params": p, "lr": None}
    return {"params": [{"params": p[:2], "lr": 3e-5}, {"params": p[2:], "lr": 6e-5}], "auto_lr": True}


def run(p: list[Any], backend: str | None, tied: bool = False, **how: Any) -> tuple[list[float], list[Tensor]]:
    """What was found, and the weights, of a run in which there is no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        opt = Automagic8bit(backend=backend, min_8bit_size=0, lora=False, **groups_of(p, tied))
        found = train(opt, p, range(STEPS), **how)
    if backend != "torch":
        plans = opt._fused._plans_of_one.values() if how.get("one_by_one") else [opt._fused._plan]
        assert not any(plan.rest for plan in plans if plan is not None)
    return found, [x.detach().cpu() for x in p]


def assert_same_run(one: tuple[list[float], list[Tensor]], other: tuple[list[float], list[Tensor]]) -> None:
    """But for the order in which sums are added up."""
    rates = one[0][::2]
    assert rates[-1] > rates[0] * 1.3
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    for x, y in zip(one[1], other[1], strict=True):
        assert (x - y).abs().max() <= 1e-4 * sum(rates)  # of the way


@pytest.mark.parametrize("tied", [False, True], ids=["a group", "two tied groups"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sums_from_another_device_find_the_same_rate(backend: str, tied: bool, request: pytest.FixtureRequest) -> None:
    alone = run(parameters(DEVICE), backend, tied)
    request.getfixturevalue("second_device")
    assert_same_run(alone, run(parameters(DEVICE), backend, tied))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_another_device_has_counts(
    backend: str, second_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: sums that stay there."""
    expected = run(parameters(DEVICE), backend)
    monkeypatch.setattr(auto_lr.Sums, "move", lambda self: None)
    assert run(parameters(DEVICE), backend)[0] != pytest.approx(expected[0], rel=1e-5)


@pytest.mark.kernels
def test_a_copy_of_the_rate_is_brought_up_to_date(second_device: torch.device) -> None:
    """In every step, also after a checkpoint has replaced groups and rates; copies for groups that are gone go."""
    p = parameters(DEVICE)
    opt = Automagic8bit(backend="triton", min_8bit_size=0, **groups_of(p, True))
    for t in range(3):
        if t == 2:
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        train(opt, p, range(8))
        copies = opt._fused._rates._copies
        assert {key for key, _ in copies} == set(map(id, opt.param_groups))
        for group, there in copies.values():
            assert there is not group["auto_lr_rate"]
            assert there.equal(group["auto_lr_rate"])
    assert float(opt.param_groups[0]["auto_lr_rate"]) > 3.5e-5


@pytest.mark.kernels
def test_a_rate_of_another_device_is_not_captured(second_device: torch.device) -> None:
    p = parameters(DEVICE)
    opt = Automagic8bit(p, backend="triton", min_8bit_size=0)
    train(opt, p, range(2))
    with pytest.raises(RuntimeError, match="on several devices"):
        opt._fused._rates.hold()


@pytest.mark.gpu
@needs_two
@pytest.mark.parametrize("one_by_one", [False, True], ids=["at once", "one by one"])
@pytest.mark.parametrize("tied", [False, True], ids=["a group", "two tied groups"])
@pytest.mark.parametrize("devices", [("cuda:0", "cuda:1"), ("cuda:1", "cuda:0")], ids=" ".join)
def test_two_gpus_step_as_one(devices: tuple[str, str], tied: bool, one_by_one: bool) -> None:
    """Whichever is current, and whichever d is on."""
    alone = run(parameters("cuda:0"), None, tied, one_by_one=one_by_one)
    assert_same_run(alone, run(parameters(*devices), None, tied, one_by_one=one_by_one))


@pytest.mark.gpu
@needs_two
def test_two_gpus_wait_for_no_one() -> None:
    """Sums and rates go from one to the other without the host."""
    p = parameters("cuda:0", "cuda:1")
    opt = Automagic8bit(p, min_8bit_size=0)
    train(opt, p, range(3))
    for x in p:
        x.grad = x.detach() - 1
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_two
def test_groups_on_two_gpus_have_a_mean_rate() -> None:
    """Each finds its own, where it is."""
    p = parameters("cuda:0", "cuda:1")
    opt = Automagic8bit([{"params": p[::2]}, {"params": p[1::2]}], min_8bit_size=0)
    train(opt, p, range(STEPS))
    assert [x.device.index for x in opt.get_learning_rates()] == [0, 1]
    assert float(opt.get_avg_learning_rate()) == pytest.approx(sum(map(float, opt.get_learning_rates())) / 2, rel=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not COMPILED, reason="needs a CUDA device")
def test_a_gpu_and_the_cpu_share_a_rate() -> None:
    """What lies on the CPU is stepped by plain PyTorch, the rest by the kernels."""
    alone = run(parameters("cpu"), "torch")
    for devices in (("cuda", "cpu"), ("cpu", "cuda")):
        p = parameters(*devices)
        opt = Automagic8bit(p, min_8bit_size=0, lora=False)
        found = train(opt, p, range(STEPS))
        assert sum(len(bucket.members) for bucket in opt._fused._plan.buckets) == 2
        assert_same_run(alone, (found, [x.detach().cpu() for x in p]))
