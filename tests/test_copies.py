"""Copies of an optimizer, by deepcopy and by pickle, are whole optimizers and go on as the original."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import bitsandbytes
import pytest
import torch
from checkpoint_cases import STORAGES, build, parameters_of, through_file, train
from torch import nn

from automagic_bnb import Automagic8bit, Automagic32bit, groups


def through_pickle(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))


@pytest.mark.parametrize(("steps", "lr"), [(0, 1e-3), (5, None)])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("carry", [copy.deepcopy, through_pickle])
def test_a_copy_goes_on_as_the_original(carry: Any, steps: int, storage: str, lr: float | None, tools: Any) -> None:
    """Also over the tenth step, where LoRA parameters are shrunk: deepcopy takes the mark off a parameter."""
    opt = build(tools, lr=lr, **STORAGES[storage])
    train(tools, opt, steps)
    twin = carry(opt)
    assert hasattr(parameters_of(twin)[2], "_is_lora_layer") == (carry is not copy.deepcopy)
    assert not tools.differences(tools.snapshot(opt), tools.snapshot(twin))
    assert all(a is not b for a, b in zip(parameters_of(opt), parameters_of(twin), strict=True))
    train(tools, opt, steps, 12)
    train(tools, twin, steps, 12)
    assert not tools.differences(tools.snapshot(opt), tools.snapshot(twin))


def test_the_mark_of_a_lora_parameter_matters(tools: Any) -> None:
    """The negative control: without the mark, the tenth step differs."""
    marked, plain = (Automagic8bit(tools.parameters((16, 256)), lr=1e-3, lora=mark) for mark in (True, False))
    for opt in (marked, plain):
        train(tools, opt, 12)
    assert tools.differences(tools.snapshot(marked)["parameters"], tools.snapshot(plain)["parameters"])


@pytest.mark.parametrize("carry", [copy.deepcopy, through_pickle])
def test_a_copy_is_a_whole_optimizer(carry: Any, tools: Any) -> None:
    """Everything else works on it: groups, hooks, overrides, schedules, checkpoints, zero_grad."""
    opt = build(tools, verbose=False)
    train(tools, opt, 2)
    twin = carry(opt)
    assert type(twin) is type(opt)
    assert twin.config == opt.config
    assert twin.defaults.items() >= opt.defaults.items()
    (new,) = tools.parameters((64, 64))
    twin.add_param_group({"params": [new], "lr": 0.05})  # above 1e-3, which nobody set
    bitsandbytes.optim.GlobalOptimManager.get_instance().override_config(new, "optim_bits", 32)
    seen = []
    twin.register_step_post_hook(lambda *_: seen.append(1))
    scheduler = torch.optim.lr_scheduler.ConstantLR(twin, 0.5)
    train(tools, twin, 2, 4)
    scheduler.step()
    assert seen == [1, 1]
    assert twin.state[new]["state1"].dtype == torch.float32
    assert twin.state[parameters_of(twin)[0]]["state1"].dtype == torch.uint8
    twin.load_state_dict(through_file(twin.state_dict()))
    twin.zero_grad()
    assert all(p.grad is None for p in parameters_of(twin))


def test_a_model_and_its_optimizer_are_copied_together(tools: Any) -> None:
    """In one deepcopy the copied optimizer drives the copied model."""
    model = nn.Linear(64, 64)
    opt = Automagic32bit(model.parameters(), lr=1e-2)
    twin, twin_opt = copy.deepcopy((model, opt))
    assert twin_opt.param_groups[0]["params"][0] is twin.weight
    before = model.weight.detach().clone()
    twin(torch.ones(64)).sum().backward()
    twin_opt.step()
    assert torch.equal(before, model.weight)
    assert not torch.equal(before, twin.weight)


def test_a_pickle_of_an_earlier_version_loads(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 0.2.0 the facts of a parameter were a class of `automagic_bnb.optimizer`."""
    opt = build(tools, lr=1e-3)
    train(tools, opt, 3)
    monkeypatch.setattr(groups.Facts, "__module__", "automagic_bnb.optimizer")
    text = pickle.dumps(opt)
    assert b"automagic_bnb.optimizer" in text
    assert b"automagic_bnb.groups" not in text
    monkeypatch.undo()
    twin = pickle.loads(text)
    for each in (opt, twin):
        train(tools, each, 3)
    assert tools.differences(tools.snapshot(twin), tools.snapshot(opt)) == []
