"""Five hundred steps with 8-bit states stay near the same steps with 32-bit states."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from automagic_bnb import bnb, stored
from automagic_bnb import quantization as q
from automagic_bnb import state as st
from automagic_bnb.optimizer import Automagic8bit
from automagic_bnb.stored import Moments, moments_of

STEPS = 500
STORAGES: dict[str, dict[str, Any]] = {
    "32bit": {"optim_bits": 32},
    "8bit": {"min_8bit_size": 0, "factored": False, "mask_bits": 8},
    "factored": {"min_8bit_size": 0, "factored": True, "mask_bits": 8, "mean_bits": 32},
}


@dataclass
class Problem:
    parameters: list[torch.nn.Parameter]
    loss: Callable[[int], Tensor]
    """The loss of step t's batch, or over held-out inputs for t = -1."""
    options: dict[str, Any]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def regression() -> Problem:
    """A two-layer network learns a wider one, from batches of 64 with noise."""
    truth = normal(24, 96, seed=1) / 24**0.5, normal(96, 8, seed=2) / 96**0.5
    first = torch.nn.Parameter(normal(64, 24, seed=3) / 24**0.5)
    bias = torch.nn.Parameter(torch.zeros(64))
    second = torch.nn.Parameter(normal(8, 64, seed=4) / 64**0.5)

    def loss(t: int) -> Tensor:
        x = normal(1024 if t < 0 else 64, 24, seed=100 + t)
        y = torch.tanh(x @ truth[0]) @ truth[1]
        if t >= 0:
            y = y + 0.1 * normal(64, 8, seed=10_000 + t)
        found = torch.tanh(x @ first.mT + bias) @ second.mT
        return (found - y).square().mean()

    return Problem([first, bias, second], loss, {"lr": 3e-3})


def lora() -> Problem:
    """Factors of rank 8 learn the difference, of rank 4, between two linear maps; B starts at 0."""
    change = normal(48, 4, seed=5) @ normal(4, 64, seed=6) / 16
    up = torch.nn.Parameter(torch.zeros(48, 8))
    down = torch.nn.Parameter(normal(8, 64, seed=7) / 8)

    def loss(t: int) -> Tensor:
        x = normal(1024 if t < 0 else 32, 64, seed=100 + t)
        return ((x @ down.mT) @ up.mT - x @ change.mT).square().mean()

    return Problem([up, down], loss, {"lr": 3e-3, "lora": True})


PROBLEMS = {"regression": regression, "lora": lora}


@dataclass
class Outcome:
    moved: Tensor
    """θ - θ0 after the last step, all parameters in one vector."""
    loss: float
    start: float


def train(problem: Problem, **options: Any) -> Outcome:
    opt = Automagic8bit(problem.parameters, **problem.options, **options)
    start = [p.detach().clone() for p in problem.parameters]
    with torch.no_grad():
        first = problem.loss(-1).item()
    for t in range(STEPS):
        opt.zero_grad()
        problem.loss(t).backward()
        opt.step()
    moved = torch.cat([(p.detach() - x).view(-1) for p, x in zip(problem.parameters, start, strict=True)])
    with torch.no_grad():
        return Outcome(moved, problem.loss(-1).item(), first)


@functools.cache
def outcome(problem: str, storage: str) -> Outcome:
    return train(PROBLEMS[problem](), **STORAGES[storage])


def distance(a: Outcome, exact: Outcome) -> float:
    """How far two runs ended apart, over how far the exact one moved."""
    return ((a.moved - exact.moved).norm() / exact.moved.norm()).item()


@dataclass(frozen=True)
class Bounds:
    distance: float
    loss: float
    """Of the held-out loss, over that of the 32-bit run."""


BOUNDS = {
    # Measured over three seeds: 0.18 to 0.19, losses 1.00 to 1.03. The regression's noise lets runs drift apart: 32-bit
    # runs whose clip_threshold differs by a percent end 0.05 apart.
    ("regression", "8bit"): Bounds(0.25, 1.06),
    # 0.22 to 0.23, 1.00 to 1.02: the estimate of rank one, a step late, comes on top.
    ("regression", "factored"): Bounds(0.30, 1.06),
    # 0.012 to 0.013, 0.97 to 1.08; codes of seven bits 0.115 to 0.118. Without noise the loss falls to 1e-7 of its
    # start, and its end is less certain.
    ("lora", "8bit"): Bounds(0.02, 1.25),
    # 0.087, 1.07.
    ("lora", "factored"): Bounds(0.12, 1.25),
}


@pytest.mark.parametrize(("problem", "storage"), BOUNDS)
def test_eight_bit_run_ends_near_the_32_bit_run(problem: str, storage: str) -> None:
    """θ after 500 steps and the held-out loss lie within the stated bounds, after real learning."""
    exact, found, bounds = outcome(problem, "32bit"), outcome(problem, storage), BOUNDS[problem, storage]
    assert exact.loss < 0.04 * exact.start
    assert distance(found, exact) < bounds.distance
    assert found.loss < bounds.loss * exact.loss


@pytest.mark.parametrize("problem", PROBLEMS)
def test_bounds_refuse_a_codec_of_seven_bits(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: codes whose last bit is lost leave the bounds."""
    encode = q.encode

    def coarse(*args: Any) -> tuple[Tensor, Tensor]:
        codes, absmax = encode(*args)
        return codes & 0xFE, absmax

    monkeypatch.setattr(q, "encode", coarse)
    found = train(PROBLEMS[problem](), **STORAGES["8bit"])
    assert distance(found, outcome(problem, "32bit")) > 1.5 * BOUNDS[problem, "8bit"].distance


def test_storages_are_the_ones_named() -> None:
    """The runs compared do keep their moments in 32 bits, in 8, and factored."""
    kinds = {}
    for name, options in STORAGES.items():
        problem = regression()
        opt = Automagic8bit(problem.parameters, **problem.options, **options)
        problem.loss(0).backward()
        opt.step()
        kinds[name] = st.storage_held(opt.state[problem.parameters[2]])
    assert kinds == {name: name for name in STORAGES}


# --- why second moments are rounded stochastically --------------------------------------------------------------

DROP, DECAY, AFTER = 0.03, 0.999, 2000
"""The variance falls to 3 %; the exact mean has come down to 16 % of its start after 2000 steps."""


def mean_after_a_drop(mode: str) -> Tensor:
    """v of one block, started at 1, after the drop; held exactly or as codes rounded in one of two ways."""
    book = bnb.code_book(False, torch.device("cpu"))
    v = torch.ones(1, q.BLOCK)
    for t in range(AFTER):
        v = DECAY * v + (1 - DECAY) * DROP * normal(1, q.BLOCK, seed=t).square()
        if mode != "exact":
            bits = q.random_bits(q.mix_in(0, t), v.shape, v.device)
            uniform = q.uniform(bits) if mode == "stochastic" else None
            v = q.decode(*q.encode(v, book, uniform), book)
    return v


def test_stochastic_codes_follow_a_falling_variance_and_nearest_codes_freeze() -> None:
    """An EMA whose step is below the code spacing moves on in the mean; rounded to nearest it stays too large."""
    exact = mean_after_a_drop("exact")
    stochastic, nearest = ((mean_after_a_drop(mode) / exact).mean().item() for mode in ("stochastic", "nearest"))
    assert stochastic == pytest.approx(1, abs=0.02)  # measured 0.995; 256 elements, each off by 3 %
    assert nearest > 2  # measured 2.36


def v_after_a_drop(storage: str) -> Tensor:
    """v of an optimizer's run in which the gradient falls to a tenth after 20 of 800 steps."""
    p = torch.nn.Parameter(torch.zeros(q.BLOCK))
    opt = Automagic8bit([p], lr=1e-4, betas=(0.9, DECAY, 0.999), warmup_steps=0, **STORAGES[storage])
    for t in range(800):
        p.grad = normal(q.BLOCK, seed=t) * (1.0 if t < 20 else 0.1)
        opt.step()
    keep = torch.ones(1, q.BLOCK, dtype=torch.bool)
    return moments_of(opt.state[p], stored.Blocks(p), keep).read(2)


def test_optimizer_follows_a_falling_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """v of an 8-bit run is that of a 32-bit run but for noise; the control, rounded to nearest, is not."""
    exact = v_after_a_drop("32bit")
    stochastic = (v_after_a_drop("8bit") / exact).log()
    assert stochastic.mean().abs() < 0.03  # measured 0.01
    assert stochastic.abs().mean() < 0.08  # measured 0.05: the random walk of codes 1.4 % apart
    write = Moments.write

    def to_nearest(self: Moments, number: int, values: Tensor) -> None:
        self.bits = None
        write(self, number, values)

    monkeypatch.setattr(Moments, "write", to_nearest)
    nearest = (v_after_a_drop("8bit") / exact).log()
    assert nearest.abs().mean() > 0.15  # measured 0.25
