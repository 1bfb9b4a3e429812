"""The distance that the momentum says: the estimate that a rate is found by, in plain PyTorch.

Prodigy's (Mishchenko and Defazio, arXiv 2306.06101) of how far the weights have to go, with the momentum as its memory:
u is the normalised gradient of step 2 and m its momentum, θ0 the weights at first, over the blocks that are watched.

    s = Σ u (θ0 - θ)                               a number a step
    num ← β1 num + (1 - β1) s
    q ← 0.99 q + 0.01 sign(s)
    d̂ = c max(num, 0) max(1 - z e / q, 0) / M       0 where q <= 0; M is Σ|m|, and of a block 0.1 an element at least;
                                                    c = 8 / sqrt(1 + t / 100), t the steps since the search began
    d ← min(max(d, d̂), 1.1 d)

d is the mean rate, used from the next step on. Where the gradients are noise, the signs of s are those of a fair coin,
however the noise is shared among elements and however its size varies, since u does not depend on what θ has become;
q then has the standard deviation e = sqrt((1 - 0.99^2t) 0.01 / 1.99), and what does not stand out from it by z times
finds no rate. c falls as 1/√t, for d̂ is how far the weights have come, which goes on growing, and a rate is a distance
over the square root of the steps that lead there (Defazio and Mishchenko, arXiv 2301.07733).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from automagic_bnb import state as st
from automagic_bnb.quantization import FLOAT_TINY

DISTANCE_FACTOR = 8.0
"""c of the first step."""
DISTANCE_STEPS = 100
"""Steps after which c has fallen by √2."""
SIGN_DECAY = 0.99
ERRORS = 3.5
"""z."""
LEAST_MOMENTUM = 0.1
"""Of an element's |m|, in M. Of noise it is 0.18 in the mean; where it is less, the gradients have become small beside
their own past: what has converged is not to be sent on its way again by a distance that was right before."""
TURNED_SHARE = 0.5
"""What s counts of a matrix that `lora_direction` turns: it goes as far along every direction that the momentum knows,
of which u has most along a few, and its best rates are no higher. Chosen on the tasks that choose (benchmarks/quality).
"""
SUMS = slice(st.LR_NUMERATOR, st.LR_DENOMINATOR + 1)
"""Of a `tensor_stats`: s and M."""
GROWTH = 1.1
"""d grows by at most this in a step: one noisy estimate cannot overshoot."""


@dataclass(frozen=True)
class Estimate:
    """The numbers of an estimate."""

    beta: float
    factor: float  # c
    error: float  # z e
    low: float  # bounds of d
    high: float


def distance_factor(t: int) -> float:
    """c of the t-th step of a search, or since a parameter joined it."""
    return DISTANCE_FACTOR / math.sqrt(1 + t / DISTANCE_STEPS)


def sign_error(t: int) -> float:
    """z e of the t-th step of a search."""
    return ERRORS * math.sqrt((1 - SIGN_DECAY ** (2 * t)) * (1 - SIGN_DECAY) / (1 + SIGN_DECAY))


@dataclass(frozen=True)
class Watched:
    """Which blocks one process watches of a parameter of which several hold rows: those that touch its own."""

    rows: slice
    """The blocks, among those given."""
    first: int
    """The first one's place, counted from the start of the first span that is kept here."""
    stride: int
    own: Tensor
    """bool [blocks, 256], of these blocks: the elements whose weights are here."""


def watch(
    theta: Tensor, u: Tensor, m: Tensor, g: Tensor, *, state: st.State, watched_here: Watched | None = None
) -> None:
    """Leave this step's sums of one parameter, s and M, in its `tensor_stats`.

    Of every `stride` blocks one is watched: the first with a gradient. It is claimed in one step and taken in the next,
    so that programs which work on the blocks at once agree, in whatever order.

    Args:
        theta: θ before the update, float32 [blocks, 256]; u, m and g alike.
        state: `step` already counts this step.
        watched_here: where the arguments are a part of a parameter that others hold, too; the sums are then this
            process's shares.
    """
    places, starts, t = state["probe_block"], state["probe_start"], state["step"]
    here, first = watched_here, 0
    if here is None:
        stride = st.stride_held(len(theta), len(places))
    else:
        theta, u, m, g = (x[here.rows] for x in (theta, u, m, g))
        first, stride = here.first, here.stride
    number = torch.arange(first, first + len(theta), device=theta.device)
    slot, offset = number // stride, (number % stride).int()
    held = places[slot]
    claimed = held == st.PROBE_CLAIM + (t - 1) % 2 * st.PROBE_TURN + offset
    active = (g != 0).any(dim=1) & (held == st.PROBE_FREE)
    claims = torch.where(active, st.PROBE_CLAIM + t % 2 * st.PROBE_TURN + offset, st.PROBE_FREE)
    places.scatter_reduce_(0, slot, claims, "amin")
    places[slot[claimed]] = offset[claimed]
    starts[slot[claimed]] = theta[claimed].to(starts.dtype)
    watched = held == offset
    moved = starts[slot[watched]].float() - theta[watched]
    if here is not None:
        moved = torch.where(here.own[watched], moved, 0.0)
    state["tensor_stats"][st.LR_NUMERATOR] = (u[watched] * moved).sum()
    if here is not None:  # a block that several processes have is the one's who has its first element
        watched = watched & here.own[:, 0]
    least = LEAST_MOMENTUM * (g[watched] != 0).sum(dim=1)
    state["tensor_stats"][st.LR_DENOMINATOR] = torch.maximum(m[watched].abs().sum(dim=1), least).sum()


def take_sums(stats: list[Tensor], weights: Tensor) -> Tensor:
    """What a step has left in these `tensor_stats`, of one device, is taken out: float32 [2], Σ s and Σ M.

    Args:
        weights: float32, what s of each counts.
    """
    together = torch.stack(stats)[:, SUMS]
    torch._foreach_zero_([one[SUMS] for one in stats])  # type: ignore[attr-defined]
    return torch.stack([(together[:, 0] * weights).sum(), together[:, 1].sum()])


def find_rate(d: Tensor, sums: Tensor, stats: list[Tensor], weights: Tensor, numbers: Estimate) -> None:
    """In place: d and `sums`, (num, q), moved by what a step has left in `tensor_stats`, which is taken out.

    Args:
        d: 0-d float32.
        stats: those of all parameters of the search, on d's device; `weights`, float32: what s of each counts.
    """
    if not stats:
        return
    s, momentum = take_sums(stats, weights)
    num = numbers.beta * sums[0] + (1 - numbers.beta) * s
    q = SIGN_DECAY * sums[1] + (1 - SIGN_DECAY) * s.sign()
    # Weights beyond float32's squares: a step without an estimate.
    usable = torch.isfinite(num) & torch.isfinite(momentum) & (momentum > 0)
    trust = torch.where(q > numbers.error, 1 - numbers.error / q.clamp_min(numbers.error), q.new_zeros(()))
    distance = numbers.factor * num.clamp_min(0) * trust / momentum.clamp_min(FLOAT_TINY)
    found = torch.minimum(torch.maximum(d, distance), GROWTH * d).clamp(numbers.low, numbers.high)
    sums.copy_(torch.where(usable, torch.stack([num, q]), sums))
    d.copy_(torch.where(usable, found, d))
