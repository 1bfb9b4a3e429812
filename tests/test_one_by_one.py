"""Parameters that are stepped one at a time: when a step begins is told alike for the run log and for a found rate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from automagic_bnb import Automagic8bit
from automagic_bnb.run_log import read_run
from automagic_bnb.stepping import OneByOne


@pytest.mark.parametrize(
    ("order", "begins"),
    [
        ("abc abc", "a__ a__"),
        ("abc cba", "a__ c__"),  # the backward pass of another branch
        ("abc bc bc", "a__ b_ b_"),  # the first has stopped training
        ("ab abc bc", "a_ a__ b_"),  # one joins, one leaves
        ("a a a", "a a a"),
    ],
)
def test_a_step_ends_when_any_parameter_comes_again(order: str, begins: str) -> None:
    letters = {name: nn.Parameter(torch.zeros(2)) for name in "abc"}  # equal values: told by the tensor itself
    one_by_one = OneByOne()
    said = "".join(" " if name == " " else name if one_by_one.takes(letters[name]) else "_" for name in order)
    assert said == begins


def test_after_an_end_the_next_begins() -> None:
    one_by_one = OneByOne()
    assert one_by_one.takes("a")
    assert not one_by_one.takes("b")
    one_by_one.end()
    assert one_by_one.takes("c")


@pytest.mark.parametrize("lr", [1e-3, None], ids=["given", "found"])
def test_log_and_search_go_on_when_the_first_parameter_stops(lr: float | None, tmp_path: Path) -> None:
    """Frozen after five steps, as progressive unfreezing in reverse does."""
    parameters = [nn.Parameter(torch.ones(16, 16)) for _ in range(3)]
    opt = Automagic8bit(parameters, lr=lr, run_log=tmp_path, run_log_every=1)
    for step in range(12):
        for p in parameters[1 if step >= 5 else 0 :]:
            p.grad = p.detach().clone()
            opt.step_parameter(p, opt.param_groups[0])
    assert read_run(tmp_path).series["lr/mean"].steps.tolist() == list(range(1, 12))
    if lr is None:
        assert opt.param_groups[0]["auto_lr_count"] == 11  # the first step has nothing to estimate from
