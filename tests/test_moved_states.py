"""States that a trainer moves between devices by hand: what the search keeps in the groups goes along."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from automagic_bnb import Automagic8bit, auto_lr
from automagic_bnb.auto_lr import Search


def moved_by_hand(opt: Any, parameters: list[Any], device: str) -> None:
    """As trainers do it: the parameters' memory and every tensor of their states, and nothing of the groups."""
    for p in parameters:
        p.data = p.data.to(device)
        state = opt.state[p]
        for name, value in list(state.items()):
            if isinstance(value, torch.Tensor):
                state[name] = value.to(device)


def test_the_rate_found_follows_its_parameters(tools: Any) -> None:
    """To the meta device, which is the one that every machine has beside the CPU; both groups of a search."""
    groups = [{"params": tools.parameters((64, 64)), "lr": rate} for rate in (1e-4, 2e-4)]
    opt = Automagic8bit(groups, auto_lr=True)
    parameters = [p for group in opt.param_groups for p in group["params"]]
    tools.train(opt, parameters, range(3))
    (search,) = auto_lr.searches(opt.param_groups)
    before = [(g["auto_lr_rate"], g["effective_lr"]) for g in opt.param_groups]
    assert search.has_started()
    assert [(g["auto_lr_rate"], g["effective_lr"]) for g in opt.param_groups] == before  # nothing has moved
    assert all(one["auto_lr_rate"] is rate for one, (rate, _) in zip(opt.param_groups, before, strict=True))
    for group in opt.param_groups:
        group["params"] = [torch.nn.Parameter(p.to("meta")) for p in group["params"]]
    assert Search(opt.param_groups, [1.0, 2.0]).has_started()
    for group in opt.param_groups:
        assert {group["auto_lr_rate"].device.type, group["effective_lr"].device.type} == {"meta"}
    assert opt.param_groups[0]["auto_lr_sums"].device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_run_goes_on_elsewhere(backend: str, tools: Any) -> None:
    """Begun on the CPU, moved to the GPU by hand: it steps there, and the rate that it had is where it goes on."""
    parameters = tools.parameters((64, 64), (8, 128))
    opt = Automagic8bit(parameters, backend=backend if backend == "torch" else None)
    tools.train(opt, parameters, range(20))
    found = float(opt.param_groups[0]["auto_lr_rate"])
    moved_by_hand(opt, parameters, "cuda")
    tools.train(opt, parameters, range(20, 22))
    rate = opt.param_groups[0]["auto_lr_rate"]
    assert rate.device.type == "cuda"
    assert found <= float(rate) <= found * 1.1**3
