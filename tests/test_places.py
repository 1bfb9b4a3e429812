"""Memory that is exchanged under a tensor between two steps: the kernels see it, whichever tensor it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import DEVICE
from plan_cases import build, give, parameter

from automagic_bnb import state as st
from automagic_bnb.addresses import Places
from automagic_bnb.optimizer import Automagic

pytest.importorskip("triton", reason="the kernels need Triton")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy: 1 / 0 in masked lanes

OPTIONS = {"lr": None, "percentile_clipping": 50, "master": "ecc8"}


def moved(opt: Automagic, parameters: list[Any], names: list[str], exchange: bool) -> int:
    """Give these tensors of the last parameter's state other values: in memory of their own, or where they are."""
    state, count = opt.state[parameters[-1]], 0
    for name in names:
        other = state[name].clone()
        other.view(-1)[: other.numel() // 2] = other.view(-1)[0] + (1 if name != "probe_block" else 0)
        if exchange:
            state[name].data = other
        else:
            state[name].copy_(other)
        count += 1
    return count


def trained(names: list[str], exchange: bool, tools: Any, **options: Any) -> dict[str, Any]:
    parameters = [parameter(32, 24).to(torch.bfloat16), parameter(40, 16, seed=1).to(torch.bfloat16)]
    parameters = [torch.nn.Parameter(p.detach()) for p in parameters]
    opt = build(parameters, "triton", **OPTIONS, **options)
    for step in range(4):
        give(*parameters, step=step)
        opt.step()
        if step == 1:
            assert moved(opt, parameters, names or sorted(tensors_of(opt, parameters)), exchange)
    return tools.snapshot(opt)


def tensors_of(opt: Automagic, parameters: list[Any]) -> set[str]:
    return {k for k, v in opt.state[parameters[-1]].items() if isinstance(v, torch.Tensor) and not k.startswith("qmap")}


@pytest.mark.parametrize("factored", [False, True], ids=["8bit", "factored"])
def test_every_tensor_of_a_state_may_be_given_other_memory(factored: bool, tools: Any) -> None:
    """All at once, none of them the first of its bucket: to the bits of other values in the same memory."""
    results = [trained([], exchange, tools, factored=factored) for exchange in (True, False)]
    assert tools.differences(*results) == []


@pytest.mark.parametrize("name", ["torque", "tensor_stats", "lr_mask", "probe_start"])
def test_one_tensor_of_a_state_may_be_given_other_memory(name: str, tools: Any) -> None:
    results = [trained([name], exchange, tools) for exchange in (True, False)]
    assert tools.differences(*results) == []
    assert tools.differences(results[0], trained(["absmax1"], False, tools)), "what was written made no difference"


def test_the_rate_found_may_be_given_other_memory(tools: Any) -> None:
    results = []
    for exchange in (True, False):
        p = parameter(32, 24)
        opt = build([p], "triton", lr=None)
        for step in range(3):
            give(p, step=step)
            opt.step()
            rate = opt.param_groups[0]["auto_lr_rate"]
            if exchange:
                rate.data = torch.full_like(rate, 3e-3)
            else:
                rate.fill_(3e-3)
        results.append(tools.snapshot(opt))
    assert tools.differences(*results) == []


def test_places_are_those_of_the_moment_they_were_seen() -> None:
    tensors = [torch.zeros(8, device=DEVICE) for _ in range(5)]
    places = Places(tensors)
    assert places.are_current()
    kept = tensors[3].data  # so that the new memory cannot be the old
    tensors[3].data = torch.zeros(8, device=DEVICE)
    assert not places.are_current()
    tensors[3].data = kept
    assert places.are_current()
    assert Places([]).are_current()


def test_places_are_looked_at_once_somebody_has_read_a_state(monkeypatch: pytest.MonkeyPatch, tools: Any) -> None:
    """To look at each of a thousand tensors takes as long as a tenth of a step, and nobody could have moved one."""
    looked = []
    whether = Places.are_current
    monkeypatch.setattr(Places, "are_current", lambda self: looked.append(len(self.tensors)) or whether(self))
    monkeypatch.setattr(st.WatchedState, "reads", 0)
    parameters = [parameter(32, 24), parameter(40, 16, seed=1)]
    opt = build(parameters, "triton", lr=None)
    for step in range(4):
        give(*parameters, step=step)
        opt.step()
        opt.get_metrics()
        opt.get_memory_efficiency_report()
    assert st.WatchedState.reads == 0
    assert max(looked, default=0) <= 1, "only the rate that is found lies in a group, where anybody sees it"
    assert isinstance(opt.state[parameters[0]]["state1"], torch.Tensor)
    assert st.WatchedState.reads == 1
    give(*parameters, step=4)
    opt.step()
    assert max(looked) > 10
    looked.clear()
    give(*parameters, step=5)
    opt.step()
    assert max(looked, default=0) <= 1, "nobody has kept one"
    kept = opt.state[parameters[0]]["state1"]
    for step in (6, 7):
        looked.clear()
        give(*parameters, step=step)
        opt.step()
        assert max(looked) > 10, "it may be moved at any time"
    kept.data = kept.clone()
    del kept
    for step in range(8, 12):  # made anew, looked at once, and trusted
        looked.clear()
        give(*parameters, step=step)
        opt.step()
    assert max(looked, default=0) <= 1


@pytest.mark.parametrize(
    "read", [dict, lambda s: s.copy(), lambda s: list(s.values()), lambda s: {**s}, lambda s: s.get("step")]
)
def test_every_way_to_a_tensor_counts(read: Any) -> None:
    state = st.WatchedState(step=1, state1=torch.zeros(1))
    before = st.WatchedState.reads
    read(state)
    assert st.WatchedState.reads > before
