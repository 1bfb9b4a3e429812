"""Checkpoints of Adam, Adafactor and Prodigy as their packages write them, and of ai-toolkit's Automagic 2 and 3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from automagic_bnb import Automagic32bit

SHAPES = ((64, 32), (40,))
STEPS = 40


def train(opt: Any, parameters: list[Any], steps: int = STEPS) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in parameters:
            p.grad = (torch.randn(p.shape, generator=generator) + 1) * torch.linspace(0.5, 2, p.shape[-1])
        opt.step()


def loaded(make: Callable[[list[Any]], Any]) -> tuple[Any, list[Any], Any]:
    """One that was trained, and ours with its checkpoint."""
    parameters = [nn.Parameter(torch.full(shape, 0.1)) for shape in SHAPES]
    theirs = make(parameters)
    train(theirs, parameters)
    ours = Automagic32bit(parameters, lr=1e-3)
    ours.load_state_dict(theirs.state_dict())
    return theirs, parameters, ours


def expected_second(p: Any) -> torch.Tensor:
    """The mean square of the gradients that `train` gives: of 1 + a normal number it is 2."""
    return (2 * torch.linspace(0.5, 2, p.shape[-1]) ** 2).expand(p.shape)


def adafactor_of_transformers(parameters: list[Any]) -> Any:
    optimization = pytest.importorskip("transformers.optimization")
    return optimization.Adafactor(parameters, lr=1e-3, relative_step=False, scale_parameter=False)


def prodigy(parameters: list[Any]) -> Any:
    return pytest.importorskip("prodigyopt").Prodigy(parameters, lr=1.0, d0=1e-4, growth_rate=1.0)


MAKERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "adafactor of torch": lambda p: torch.optim.Adafactor(p, lr=1e-3),
    "adafactor of transformers": adafactor_of_transformers,
    "prodigy": prodigy,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_the_second_moment_and_the_step_are_carried_over(kind: str) -> None:
    """In the gradients' units, whatever units the other one counts in; training goes on."""
    _, parameters, ours = loaded(MAKERS[kind])
    for p in parameters:
        state = ours.state[p]
        assert state["step"] == STEPS
        v = state["state2"] / (1 - ours.param_groups[0]["betas"][1] ** STEPS)
        assert float((v / expected_second(p)).log().mean().abs()) < 0.15
        assert float((v / expected_second(p)).min()) > 0.3
    before = [p.detach().clone() for p in parameters]
    train(ours, parameters, 1)
    assert all((p != q).all() for p, q in zip(parameters, before, strict=True))


@pytest.mark.parametrize("kind", ["adamw", "prodigy"])
def test_the_momentum_points_where_theirs_does(kind: str) -> None:
    """m / √v of Adam's, whose gradients have a mean of 1/√2 of their size here."""
    _, parameters, ours = loaded(MAKERS[kind])
    m = ours.state[parameters[0]]["state1"] / (1 - 0.9**STEPS)
    assert float(m.mean()) == pytest.approx(0.7, abs=0.1)


@pytest.mark.parametrize("version", [2, 3])
def test_automagic_2_and_3_bring_their_rates(version: int) -> None:
    """One rate for each parameter: the search starts at their mean; a layout as ai-toolkit's files have it."""
    parameters = [nn.Parameter(torch.full(shape, 0.1)) for shape in SHAPES]
    saved = torch.optim.SGD(parameters, lr=1e-6).state_dict()
    saved["param_groups"][0].update(beta2=0.999, eps=1e-30, clip_threshold=1.0)
    for i, (p, rate) in enumerate(zip(parameters, (2e-5, 4e-5), strict=True)):
        state: dict[str, Any] = {"step": STEPS, "lr": torch.tensor(rate)}
        grown = 1 - 0.999**STEPS
        if p.dim() == 2:
            v = expected_second(p) * grown
            state |= {"exp_avg_sq_row": v.mean(-1), "exp_avg_sq_col": v.mean(-2)}
        else:
            state["exp_avg_sq"] = expected_second(p) * grown
        if version == 2:
            state["last_polarity"] = torch.ones(p.shape, dtype=torch.bool)
        else:
            packed = torch.zeros((8, (p.numel() + 7) // 8), dtype=torch.uint8)
            state |= {"sign_history": packed, "hist_idx": 1, "hist_fill": 8}
        saved["state"][i] = state
    ours = Automagic32bit(parameters)
    ours.load_state_dict(saved)
    count = [p.numel() for p in parameters]
    mean = (2e-5 * count[0] + 4e-5 * count[1]) / sum(count)
    assert float(ours.get_avg_learning_rate()) == pytest.approx(mean)
    state = ours.state[parameters[0]]
    assert state["step"] == STEPS
    torch.testing.assert_close(state["state2"] / (1 - 0.99**STEPS), expected_second(parameters[0]).contiguous())
    train(ours, parameters, 1)


def test_what_cannot_be_read_is_refused_in_one_line() -> None:
    parameters = [nn.Parameter(torch.zeros(8, 8))]
    theirs = torch.optim.RMSprop(parameters, lr=1e-3)
    train(theirs, parameters, 1)
    with pytest.raises(ValueError, match=r"another optimizer.*holds.*Adam, Prodigy, Adafactor") as refused:
        Automagic32bit(parameters).load_state_dict(theirs.state_dict())
    assert "\n" not in str(refused.value)
