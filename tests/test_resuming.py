"""Resuming with other options than those of the checkpoint, and the arguments of `load_state_dict`."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from automagic_bnb import Automagic8bit

SHAPE = (64, 64)


def trained(lr: float | None, steps: int = 3) -> tuple[nn.Parameter, Automagic8bit]:
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(SHAPE, generator=generator))
    opt = Automagic8bit([p], lr=lr)
    for _ in range(steps):
        step(opt, p)
    return p, opt


def step(opt: Automagic8bit, p: nn.Parameter) -> None:
    p.grad = p.detach().clone()
    opt.step()


def resumed(saved: dict[str, Any], p: nn.Parameter, **options: Any) -> Automagic8bit:
    opt = Automagic8bit([p], **options)
    opt.load_state_dict(copy.deepcopy(saved))
    return opt


def test_a_given_rate_stands_over_one_that_was_found() -> None:
    """It is used, shown and told, and a warning says that the checkpoint has another word."""
    p, first = trained(None)
    with pytest.warns(UserWarning, match=r"rate of group 0 was found.*lr=0.0003, which stands"):
        opt = resumed(first.state_dict(), p, lr=3e-4)
    assert opt.param_groups[0]["lr"] == 3e-4
    step(opt, p)
    assert opt.get_avg_learning_rate() == 3e-4
    assert float(opt.element_learning_rates(p).mean()) == pytest.approx(3e-4, rel=0.2)
    assert opt.state[p]["step"] == 4  # and the rest is the checkpoint's


def test_a_rate_is_found_again_after_one_that_was_given() -> None:
    """The search starts as in a new run, not at the rate of the checkpoint."""
    p, first = trained(1e-6)
    with pytest.warns(UserWarning, match=r"rate of group 0 was given.*auto_lr, which stands"):
        opt = resumed(first.state_dict(), p)
    step(opt, p)
    assert float(opt.get_avg_learning_rate()) == pytest.approx(1e-4, rel=0.11)


@pytest.mark.parametrize("lr", [None, 1e-3])
def test_where_both_say_the_same_the_checkpoint_counts(lr: float | None) -> None:
    """As in torch, and nothing is said."""
    p, first = trained(lr)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = resumed(first.state_dict(), p, lr=lr if lr is None else 5e-4)
    assert float(opt.get_avg_learning_rate()) == float(first.get_avg_learning_rate())


def test_a_schedule_may_resume_with_a_given_rate() -> None:
    """torch's schedulers want `initial_lr` when they start in the middle: it is the constructor's rate."""
    p, first = trained(None, steps=0)
    torch.optim.lr_scheduler.LinearLR(first, 0.5, 1.0, total_iters=4)
    step(first, p)
    with pytest.warns(UserWarning, match="was found"):
        opt = resumed(first.state_dict(), p, lr=3e-4)
    assert opt.param_groups[0]["initial_lr"] == 3e-4
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda _: 0.5, last_epoch=1)
    schedule.step()
    assert opt.param_groups[0]["lr"] == 1.5e-4


def test_a_raised_rate_is_not_held_at_a_bound_that_nobody_set() -> None:
    """What trainers do after loading: `lr` and `initial_lr` are set again."""
    p, first = trained(1e-5)
    opt = resumed(first.state_dict(), p, lr=1e-5)
    for group in opt.param_groups:
        group["lr"] = group["initial_lr"] = 5e-3
    step(opt, p)
    assert opt.get_avg_learning_rate() == 5e-3
    assert float(opt.element_learning_rates(p).mean()) == pytest.approx(5e-3, rel=0.2)


def test_states_stay_where_the_checkpoint_has_them() -> None:
    """With move_to_device=False; with True, the default, they come to the parameter."""
    p, first = trained(1e-3)
    saved = first.state_dict()
    tensors = {k: v.to("meta") for k, v in saved["state"][0].items() if k == "absmax1"}
    saved["state"][0] = {**saved["state"][0], **tensors}
    opt = Automagic8bit([p], lr=1e-3)
    opt.load_state_dict(saved, move_to_device=False)
    assert opt.state[p]["absmax1"].device.type == "meta"
    assert opt.state[p]["state1"].data_ptr() != first.state[p]["state1"].data_ptr()
    opt.load_state_dict(first.state_dict())
    assert opt.state[p]["absmax1"].device == p.device
