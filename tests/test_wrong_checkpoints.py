"""Checkpoints that do not fit are refused, and change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
from checkpoint_cases import build, train

from automagic_bnb import Automagic8bit

Edit = Callable[[dict[str, Any]], Any]


def put(key: str, value: Callable[[torch.Tensor], Any]) -> Edit:
    """Replace a tensor of the first parameter's state."""

    def edit(saved: dict[str, Any]) -> None:
        saved["state"][0][key] = value(saved["state"][0][key])

    return edit


def drop(key: str) -> Edit:
    return lambda saved: saved["state"][3].pop(key)


WRONG: dict[str, tuple[Edit, str]] = {
    "another shape": (put("state1", lambda x: x[:-1]), r"parameter 0: .*state1 has shape \(63, 64\).*needs \(64, 64\)"),
    "another shape, as many elements": (put("lr_mask", lambda x: x.view(32, 128)), "lr_mask has shape"),
    "another number of blocks": (put("absmax2", lambda x: x[:-1]), "absmax2 has shape"),
    "statistics of another version": (put("tensor_stats", lambda x: x[:2]), "tensor_stats has shape"),
    "moments in another dtype": (put("state1", lambda x: x.to(torch.bfloat16)), "state1 is torch.bfloat16"),
    "codes beside numbers": (put("state2", lambda x: x.float()), "state2 is torch.float32; expected torch.uint8"),
    "numbers beside codes": (put("state1", lambda x: x.float()), "expected torch.float32"),
    "scales in another dtype": (put("absmax1", lambda x: x.bfloat16()), "absmax1 is torch.bfloat16"),
    "scales missing": (drop("absmax3"), "state3 is in 8 bits but absmax3 is missing"),
    "no tensor": (put("torque", lambda x: x.tolist()), r"parameter 0: .*torque has shape none \(list\)"),
    "nothing": (put("torque", lambda x: None), "torque has shape none"),
    "no moments": (drop("state1"), "another optimizer"),
    "no second moment": (drop("state2"), "another optimizer"),
    "a stranger's key": (lambda saved: saved["state"][3].update(exp_avg=torch.zeros(3)), "a later version.*exp_avg"),
    "a negative step": (lambda saved: saved["state"][3].update(step=-5), "step is -5; expected a number >= 0"),
    "bounds the wrong way round": (
        lambda saved: saved["param_groups"][1].update(min_lr=5.0, max_lr=0.01),
        r"min_lr=5.0 in the checkpoint's group 1: must not exceed max_lr=0.01",
    ),
    "no groups": (lambda saved: saved.pop("param_groups"), "no optimizer's checkpoint: it holds .'state'."),
    "a shard of a parameter": (lambda saved: saved["state"][3].update(shard=1), "holds shard 1, here is None"),
    "a group too few": (lambda saved: saved["param_groups"].pop(), r"groups of \[2\] parameters, this optimizer of"),
    "a parameter too many": (lambda saved: saved["param_groups"][1]["params"].append(9), r"\[2, 3\] .* of \[2, 2\]"),
    "an illegal option": (lambda saved: saved["param_groups"][1].update(lr=-1), "lr=-1 in the checkpoint's group 1"),
    "a mistyped option": (lambda saved: saved["param_groups"][1].update(betas="x"), "betas='x' in the checkpoint's"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_checkpoint_that_does_not_fit_changes_nothing(case: str, tools: Any) -> None:
    """The message says what is wrong where; parameters, state and groups are the very bits of before."""
    edit, message = WRONG[case]
    opt = build(tools, lr=None, percentile_clipping=50)
    train(tools, opt, 3)
    saved = copy.deepcopy(opt.state_dict())
    train(tools, opt, 3, 5)
    edit(saved)
    before = tools.snapshot(opt)
    with pytest.raises((ValueError, TypeError), match=message):
        opt.load_state_dict(saved)
    assert not tools.differences(before, tools.snapshot(opt))
    train(tools, opt, 5, 7)


@pytest.mark.parametrize(
    "other",
    [
        lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
        lambda p: torch.optim.RMSprop(p, lr=1e-3),
        lambda p: torch.optim.Adagrad(p, lr=1e-3),
        lambda p: bitsandbytes.optim.Lion8bit(p, lr=1e-3),
        lambda p: bitsandbytes.optim.AdEMAMix8bit(p, lr=1e-3),
    ],
)
def test_another_optimizers_checkpoint_is_refused(other: Any, tools: Any) -> None:
    """The message lists what it holds and what would load."""
    p = tools.parameters((64, 64))
    theirs = other(p)
    tools.train(theirs, p, range(2))
    opt = Automagic8bit(tools.parameters((64, 64)), lr=1e-3)
    before = tools.snapshot(opt)
    with pytest.raises(ValueError, match=r"parameter 0: (this is a checkpoint of another optimizer|the checkpoint's)"):
        opt.load_state_dict(theirs.state_dict())
    assert not tools.differences(before, tools.snapshot(opt))
