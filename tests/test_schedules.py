"""Learning-rate schedules of torch: the rate follows them, and resumes with them."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compatibility_cases import BIG, fit, network
from torch.optim import lr_scheduler as schedules

from automagic_bnb import Automagic8bit

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "constant": lambda o: schedules.ConstantLR(o, factor=1.0),
    "warm-up from 0": lambda o: schedules.LambdaLR(o, lambda step: min(1.0, step / 4)),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, T_max=10),
    "linear to 0": lambda o: schedules.LinearLR(o, 1.0, 0.0, total_iters=10),
    "one cycle": lambda o: schedules.OneCycleLR(o, max_lr=1e-2, total_steps=12),
    "cyclic": lambda o: schedules.CyclicLR(o, base_lr=1e-4, max_lr=1e-3, step_size_up=3),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "sequence": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, 1.0, total_iters=3), schedules.ExponentialLR(o, 0.5)], milestones=[3]
    ),
}


@pytest.mark.parametrize("lr", [1e-3, None])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_drive_the_rate(name: str, lr: float | None, tools: Any) -> None:
    """`lr` is at every step what the schedule makes of AdamW's; steps at rate 0 move nothing, others do."""
    p, q = tools.parameters(BIG), tools.parameters(BIG)
    opt, adam = Automagic8bit(p, lr=lr), torch.optim.AdamW(q, lr=lr or 1e-3)
    driving, expected = SCHEDULES[name](opt), SCHEDULES[name](adam)
    assert type(opt.defaults["lr"]) is float
    for step in range(11):
        group = opt.param_groups[0]
        # A plateau's factor is all that is known of its schedule, so beside it the group shows the rate that is found.
        shown = group["lr"] / group["base_lr"] * 1e-3 if (name, lr) == ("plateau", None) else group["lr"]
        assert shown == adam.param_groups[0]["lr"]
        before = p[0].detach().clone()
        tools.train(opt, p, range(step, step + 1))
        tools.train(adam, q, range(step, step + 1))
        assert torch.equal(before, p[0]) == (opt.param_groups[0]["lr"] == 0)
        for scheduler in (driving, expected):
            scheduler.step(*([1.0] if name == "plateau" else []))
    assert type(opt.param_groups[0]["betas"]) is tuple
    assert torch.isfinite(p[0]).all()


@pytest.mark.parametrize("lr", [1e-3, None])
def test_a_constant_schedule_changes_nothing(lr: float | None, tools: Any) -> None:
    """Against no schedule at all, bit for bit."""
    p, q = tools.parameters(BIG, dtype=torch.bfloat16), tools.parameters(BIG, dtype=torch.bfloat16)
    plain, scheduled = Automagic8bit(p, lr=lr), Automagic8bit(q, lr=lr)
    scheduler = SCHEDULES["constant"](scheduled)
    tools.train(plain, p, range(8))
    tools.train(scheduled, q, range(8), after=scheduler.step)
    assert not tools.differences(tools.snapshot(plain)["parameters"], tools.snapshot(scheduled)["parameters"])


def test_a_schedule_scales_every_step(tools: Any) -> None:
    """Half the rate moves half as far, the bounds of the rates moving along; a wrong factor would show."""
    moves = []
    for factor in (1.0, 0.5):
        p = tools.parameters(BIG)
        opt = Automagic8bit(p, lr=1e-3, min_lr=9e-4, max_lr=1.1e-3)
        scheduler = schedules.LambdaLR(opt, lambda step, f=factor: f if step == 5 else 1.0)
        tools.train(opt, p, range(5), after=scheduler.step)
        before = p[0].detach().clone()
        tools.train(opt, p, range(5, 6))
        moves.append(p[0].detach() - before)
    # θ is about 0.1 and moves by about 1e-4: float32 keeps 3 digits of that.
    assert (moves[1] - moves[0] / 2).norm() < 1e-3 * moves[1].norm()


def test_one_cycle_turns_the_first_beta(tools: Any) -> None:
    """Its momentum cycle finds `betas` in the defaults and writes a tuple that the step reads."""
    p = tools.parameters(BIG)
    opt = Automagic8bit(p, lr=1e-3)
    scheduler = schedules.OneCycleLR(opt, max_lr=1e-2, total_steps=10, base_momentum=0.5, max_momentum=0.9)
    seen = []
    tools.train(opt, p, range(9), after=lambda: (scheduler.step(), seen.append(opt.param_groups[0]["betas"])))
    assert min(b[0] for b in seen) == pytest.approx(0.5, abs=0.1)
    assert {b[1:] for b in seen} == {(0.99, 0.999)}


@pytest.mark.parametrize("lr", [1e-3, None])
def test_a_schedule_and_its_optimizer_resume_together(lr: float | None) -> None:
    """5 steps, save, load into fresh ones, 5 steps: the bits of 10 steps."""
    model = network(torch.bfloat16)
    opt = Automagic8bit(model.parameters(), lr=lr)
    scheduler = SCHEDULES["one cycle"](opt)
    for step in range(5):
        fit(model, opt, range(step, step + 1))
        scheduler.step()
    file = io.BytesIO()
    torch.save([model.state_dict(), opt.state_dict(), scheduler.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = network(torch.bfloat16)
    fresh_opt = Automagic8bit(fresh.parameters(), lr=lr)
    fresh_scheduler = SCHEDULES["one cycle"](fresh_opt)
    for each, part in zip((fresh, fresh_opt, fresh_scheduler), saved, strict=True):
        each.load_state_dict(part)
    for m, o, s in ((model, opt, scheduler), (fresh, fresh_opt, fresh_scheduler)):
        for step in range(5, 10):
            fit(m, o, range(step, step + 1))
            s.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
