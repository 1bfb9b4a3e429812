"""The update rule in plain PyTorch: the definition the kernels are held to, and the path for CPU tensors.

One call updates one parameter. Everything is float32 over blocks, [blocks, 256] with the last block padded; θ, g, m, v,
u, r, n, k, π, s, h, σ, W are the symbols of the rule as the docstrings use them. Sources: CAME (arXiv 2307.02047),
Torque-Aware Momentum (2412.18790), Cautious Optimizers (2411.16085), the distance estimate of Prodigy (2306.06101), and
Automagic's sign-agreement learning rates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from automagic_bnb import low_rank
from automagic_bnb import quantization as q
from automagic_bnb import state as st
from automagic_bnb.moments import moments_of

FLOAT_TINY = 1e-37
STATISTIC_DECAY = 0.9
"""Decay of the block statistics s, h and σ."""
BACKGROUND_ACTIVITY = 0.1
"""A block whose gradient energy is below this share of its own second moment counts as background."""
MAX_GRADIENT = 2.0**50
"""An element beyond it, NaN and infinities included, is skipped: its square would leave float32's range in sums."""
MAX_EDGE = 32.0
"""Bound of e. Within one block e cannot reach it; a silent block beside a loud one has no scale of its own."""
LEAST_EPS1 = 1e-34
"""What stands in for eps1 = 0, so that v is never 0 and (1 - β2) eps1 is a normal number."""
MIN_RESIDUAL = 0.01
MIN_CAUTIOUS_SHARE = 0.25
K_MIN, K_MAX = -32.0, 31.0
LOW_RANK_EVERY = 10
LOW_RANK_MAX = 256
LOW_RANK_ELEMENTS = 2**21
"""Elements that step 9 works on at once: bounds its memory."""
STEP_STREAM, RANK_STREAM = 0, 1
"""The streams of random bits of the main update and of the low-rank step."""


@dataclass(frozen=True)
class Scalars:
    """The numbers of one step of one parameter, worked out once in double precision; kernels take the same."""

    beta1: float
    beta2: float
    beta3: float
    correction1: float  # 1 - beta1**t
    correction2: float
    correction3: float
    rate: float  # lr, or ρ = lr / base where auto_lr supplies d
    low: float  # bounds of the per-element factor; where auto_lr supplies d, of d times that factor
    high: float
    kappa: float
    adapt_variance: bool  # σ moves
    adapt_mask: bool  # k moves
    learn_polarity: bool  # π is recorded
    rounding_key: int
    probe_weight: float  # ω of auto_lr over d²: ρ / d0


def base_rate(options: dict[str, Any]) -> float:
    """The rate a schedule starts from: its `initial_lr`, else the group's constructor lr."""
    return float(options.get("initial_lr", options["base_lr"]))


def relative_rate(options: dict[str, Any]) -> float:
    """ρ = lr / base."""
    base = base_rate(options)
    return float(options["lr"]) / base if base > 0 else 0.0


def step_scalars(options: dict[str, Any], t: int, is_lora: bool, ordinal: int) -> Scalars:
    """The scalars of step t (from 1) of the parameter with this ordinal.

    Args:
        options: the effective options of the parameter, with `lr`, `base_lr` (the group's constructor lr) and, where
            a scheduler set one, `initial_lr`.
    """
    beta1, beta2, beta3 = options["betas"]
    base, relative = base_rate(options), relative_rate(options)
    automatic = options["auto_lr"]
    warm = t <= options["warmup_steps"]
    # A constant rate is clamped relative to its base, so that a schedule scales every element alike.
    bounded = base > 0 and not automatic
    return Scalars(
        beta1=beta1,
        beta2=beta2,
        beta3=beta3,
        correction1=1 - beta1**t,
        correction2=1 - beta2**t,
        correction3=1 - beta3**t,
        rate=relative if automatic else float(options["lr"]),
        low=options["min_lr"] / base if bounded else options["min_lr"] if automatic else 0.0,
        high=options["max_lr"] / base if bounded else options["max_lr"] if automatic else math.inf,
        kappa=options["low_rank_emphasis"] if is_lora else 1.0,
        adapt_variance=warm,
        adapt_mask=warm and t >= 2,
        learn_polarity=warm,
        rounding_key=q.mix_in(q.parameter_key(options["seed"], ordinal, STEP_STREAM), t),
        probe_weight=relative / options["base_lr"] if automatic and options["base_lr"] > 0 else 0.0,
    )


class Blocks:
    """A parameter cut into blocks: conversion, and sums over the real elements of each."""

    def __init__(self, p: Tensor) -> None:
        self.n = p.numel()
        self.blocks = st.block_count(p)
        self.padding = self.blocks * q.BLOCK - self.n
        counts = torch.full((self.blocks, 1), float(q.BLOCK), device=p.device)
        if self.padding:
            counts[-1] -= self.padding
        self.counts = counts

    def cut(self, x: Tensor) -> Tensor:
        """[blocks, 256] in x's dtype, zeros behind the end."""
        flat = x.reshape(-1)
        if self.padding:
            flat = torch.nn.functional.pad(flat, (0, self.padding))
        return flat.view(self.blocks, q.BLOCK)

    def join(self, x: Tensor) -> Tensor:
        """The flat [n] tensor of blocks."""
        return x.reshape(-1)[: self.n]

    def mean(self, x: Tensor) -> Tensor:
        """Per block, [blocks, 1]; x must be 0 behind the end."""
        return x.sum(dim=1, keepdim=True) / self.counts


def clip_scale(g: Tensor, gnorm_vec: Tensor, t: int, percentile: int) -> Tensor:
    """percentile_clipping: the 0-d factor that brings this gradient's norm down to the percentile of the last ones.

    Args:
        g: the gradient with non-finite elements zeroed.
        gnorm_vec: float32 [100], the last norms; this step's is written into it.
        percentile: 1..99, by nearest rank (numpy's "inverted_cdf").
    """
    norm = g.square().sum().sqrt()
    gnorm_vec[(t - 1) % st.NORM_WINDOW] = norm
    # Norms of zero say nothing (no gradient yet, or percentile_clipping switched on late): they sort to the front.
    seen = (gnorm_vec > 0).sum().clamp_min(1)
    rank = st.NORM_WINDOW - seen + (percentile * seen + 99) // 100 - 1
    limit = gnorm_vec.sort().values.gather(0, rank.view(1))[0]
    return torch.where(norm > limit, limit / norm, torch.ones_like(norm))


def laplacian(g: Tensor) -> Tensor:
    """Five-point Laplacian of each [R, C] slice, shaped like g; neighbours outside contribute nothing.

    Equals `scipy.ndimage.laplace(g, mode="nearest")` slice by slice.
    """
    x = g.reshape(-1, g.shape[-2], g.shape[-1])
    lap = torch.zeros_like(x)
    down = x[:, 1:] - x[:, :-1]
    lap[:, :-1] += down
    lap[:, 1:] -= down
    right = x[:, :, 1:] - x[:, :, :-1]
    lap[:, :, :-1] += right
    lap[:, :, 1:] -= right
    return lap.view_as(g)


def is_spatial(p: Tensor, options: dict[str, Any]) -> bool:
    """Whether the spatial filter applies to this parameter under these options."""
    wanted = options["edge_suppression"] or options["frequency_penalty"] > 0
    return wanted and p.dim() >= 2 and p.shape[-2] > 2 and p.shape[-1] > 2


def spatial_filter(g: Tensor, lap: Tensor, edge_history: Tensor, blocks: Blocks, options: dict[str, Any]) -> Tensor:
    """Step 1, g̃ of g: the frequency filter, then the edge penalty.

    Args:
        g, lap: [blocks, 256], 0 where the gradient is skipped or padding.
        edge_history: h, [blocks, 1], updated in place where edge_suppression is on.
    """
    filtered = g + (options["frequency_penalty"] / 8) * lap
    if options["edge_suppression"]:
        rms = blocks.mean(g.square()).sqrt()
        e = (lap.abs() / (math.sqrt(20) * rms + 1e-30)).clamp_max(MAX_EDGE)
        e = torch.where(e > options["edge_threshold"], e, 0.0)
        edge_history.lerp_(blocks.mean(e), 1 - STATISTIC_DECAY)
        filtered = filtered * (1 - options["edge_penalty"] * edge_history * e).clamp(0.1, 1)
    return filtered


def update_parameter(
    p: Tensor,
    grad: Tensor,
    state: st.State,
    options: dict[str, Any],
    s: Scalars,
    d: Tensor | None = None,
) -> None:
    """One step of one parameter, in place: p and its state. `state["step"]` already counts this step.

    Args:
        p: floating point, contiguous, any shape.
        grad: shaped like p, any floating dtype; NaN, infinite and absurdly large (2^50) elements are skipped.
        d: with auto_lr, the 0-d float32 rate found so far.
    """
    blocks = Blocks(p)
    stats = state["tensor_stats"]
    g_shaped = grad.float()
    keep_flat = g_shaped.abs() <= MAX_GRADIENT
    g_shaped = torch.where(keep_flat, g_shaped, 0.0)
    if options["percentile_clipping"] < 100:
        g_shaped = g_shaped * clip_scale(g_shaped, state["gnorm_vec"], state["step"], options["percentile_clipping"])
    keep = blocks.cut(keep_flat)
    stats[st.SKIPPED] += blocks.n - keep.sum()
    g = blocks.cut(g_shaped)
    moments = moments_of(state, blocks, keep)
    # θ, v, r and k round by the same bits: each is unbiased for itself, which is what matters.
    bits = q.random_bits(s.rounding_key, keep.shape, p.device)
    uniform = q.uniform(bits)

    # 1. Spatial filter.
    filtered = g
    if is_spatial(p, options):
        lap = torch.where(keep, blocks.cut(laplacian(g_shaped)), 0.0)
        filtered = spatial_filter(g, lap, state["edge_history"].view(-1, 1), blocks, options)

    # 2. Second moment, activity, clipping.
    v_hat = moments.second(filtered.square(), s, max(options["eps"][0], LEAST_EPS1))
    u = filtered / v_hat.clamp_min(FLOAT_TINY).sqrt()
    activity = blocks.mean(u.square())
    u = u * (options["clip_threshold"] / activity.clamp_min(FLOAT_TINY).sqrt()).clamp_max(1)

    # 3. Torque.
    old_m = moments.read(1)
    damping = torque_factor(old_m, u, state["torque"].view(-1, 1), s.kappa) if options["torque"] else 1.0
    m = torch.where(keep, s.beta1 * old_m + (1 - s.beta1) * damping * u, old_m)

    # 4. Confidence.
    n = m / s.correction1
    if options["came"]:
        r_hat = moments.residual((u - m).square(), s, options["eps"][1])
        n = n / r_hat.clamp_min(MIN_RESIDUAL).sqrt()

    # 5. Cautious.
    if options["cautious"]:
        agrees = ((n > 0) & (g > 0)) | ((n < 0) & (g < 0))
        n = n * agrees / blocks.mean(agrees.float()).clamp_min(MIN_CAUTIOUS_SHARE)

    # 6. Background.
    if options["background_regularization"]:
        n = torch.where(activity < BACKGROUND_ACTIVITY, n / 2, n)

    # 7. Learning-rate mask.
    k = update_mask(g, u, keep, state, blocks, options, s, uniform)
    lr_i = element_rates(k, stats[st.MASK_MEAN], s, d)

    # 8. Update.
    weights = Weights(p, state.get("master_residual"), st.rounds_stochastically(p, options))
    theta = blocks.cut(weights.read())
    if d is not None:
        update_probes(theta, grad=g, state=state, s=s, d=d)
    new_theta = theta - lr_i * (n + options["weight_decay"] * theta)
    weights.write(blocks.join(torch.where(keep, new_theta, theta)), blocks.join(bits), blocks.join(keep))
    moments.store(m, uniform)
    if s.adapt_mask:
        stats[st.MASK_MEAN] = torch.exp2(blocks.join(read_mask(state, blocks)[0]) / 16).mean()


@dataclass(frozen=True)
class Weights:
    """θ of one parameter as it is stored: in its dtype, and with master="ecc8" 8 more bits in `residual`."""

    p: Tensor
    residual: Tensor | None
    stochastic: bool

    def read(self) -> Tensor:
        """float32, shaped like p."""
        p = self.p.detach()
        return p.float() if self.residual is None else q.join_master(p, self.residual)

    def write(self, values: Tensor, bits: Tensor | None, keep: Tensor | None = None) -> None:
        """Store float32 values, rounded by 16 random bits each; where not `keep`, all stays as it is.

        The arguments have as many elements as p, in its order.
        """
        bits = bits if self.stochastic else None
        if self.residual is None:
            rounded = [q.round_to(values, self.p.dtype, None if bits is None else q.uniform(bits))]
        else:
            rounded = list(q.split_master(values, bits))
        for tensor, new in zip((self.p.detach(), self.residual), rounded, strict=False):
            assert tensor is not None
            old = tensor.view(-1)
            old.copy_(new.view(-1) if keep is None else torch.where(keep.view(-1), new.view(-1), old))


def torque_factor(m: Tensor, u: Tensor, torque: Tensor, kappa: float) -> Tensor:
    """Step 3: d, [blocks, 1]; the running alignment s ([blocks, 1]) of momentum and update moves in place."""
    norms = (m.square().sum(1, keepdim=True) * u.square().sum(1, keepdim=True) + 1e-30).sqrt()
    torque.lerp_((m * u).sum(1, keepdim=True) / norms, 1 - STATISTIC_DECAY)
    return 1 + (kappa * torque).clamp(-1, 1)


def read_mask(state: st.State, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """k float32 and π bool, [blocks, 256]."""
    packed = blocks.cut(state["lr_mask"])
    if packed.dtype == torch.uint8:
        return q.unpack_mask(packed)
    return packed, blocks.cut(state["last_polarity"]).bool()


def update_mask(
    g: Tensor,
    u: Tensor,
    keep: Tensor,
    state: st.State,
    blocks: Blocks,
    options: dict[str, Any],
    s: Scalars,
    uniform: Tensor,
) -> Tensor:
    """Step 7: k as this step uses it, [blocks, 256]; σ, k and π move during warm-up and are only read after."""
    k, polarity = read_mask(state, blocks)
    if not s.learn_polarity:
        return k
    variance = state["spatial_variance"].view(-1, 1)
    # var(u) = mean(u²) - mean(u)², exact enough at |u| ~ 1 and never below 0 by more than rounding
    variance.lerp_((blocks.mean(u.square()) - blocks.mean(u).square()).clamp_min(0), 1 - STATISTIC_DECAY)
    positive = g > 0
    if s.adapt_mask:
        f = (options["detail_preservation"] * variance).clamp(0.5, 1.5) if options["spatial_awareness"] else 1.0
        moved = (k + torch.where(positive == polarity, f, -1.0 * f)).clamp(K_MIN, K_MAX)
        if state["lr_mask"].dtype == torch.uint8:
            # (k + U ≥ ⌊k⌋ + 1) rounds up with the probability of k's fraction.
            whole = moved.floor()
            moved = whole + (moved - whole + uniform >= 1)
        k = torch.where(keep, moved, k)
    polarity = torch.where(keep, positive, polarity)
    if state["lr_mask"].dtype == torch.uint8:
        state["lr_mask"].view(-1).copy_(blocks.join(q.pack_mask(k, polarity)))
    else:
        state["lr_mask"].view(-1).copy_(blocks.join(k))
        state["last_polarity"].view(-1).copy_(blocks.join(polarity))
    return k


def element_rates(k: Tensor, mask_mean: Tensor, s: Scalars, d: Tensor | None) -> Tensor:
    """lr_i of exponents k, given the mask's mean W of the previous step."""
    factor = torch.exp2(k / 16) / mask_mean
    if d is None:
        return s.rate * factor.clamp(s.low, s.high)
    return s.rate * (d * factor).clamp(s.low, s.high)


def update_probes(theta: Tensor, grad: Tensor, state: st.State, s: Scalars, d: Tensor) -> None:
    """auto_lr's sums of this parameter: num ← √β2 num + ω Σ g (θ0 - θ), z ← √β2 z + ω g with ω = d² ρ / d0.

    Where probes are further apart than 16 blocks each stands for as many more, and ω is larger by that.

    Args:
        theta: θ before the update, float32 [blocks, 256].
        grad: g as [blocks, 256], skipped elements 0.
    """
    stats, z = state["tensor_stats"], state["probe_sum"]
    stride = st.stride_held(len(theta), len(z))
    decay = math.sqrt(s.beta2)
    weight = d.square() * (s.probe_weight * stride / st.PROBE_STRIDE)
    g = grad[::stride]
    moved = state["probe_start"].float() - theta[::stride]
    stats[st.LR_NUMERATOR] = decay * stats[st.LR_NUMERATOR] + weight * (g * moved).sum()
    z.mul_(decay).add_(weight * g)
    stats[st.LR_DENOMINATOR] = z.abs().sum()


def find_rate(d: Tensor, stats: list[Tensor], low: float, high: float) -> None:
    """auto_lr, in place: d ← clamp(max(d, Σ num / Σ|z|), low, high) over the `tensor_stats` of a group."""
    if not stats:
        return
    sums = torch.stack(stats).sum(dim=0)
    estimate = sums[st.LR_NUMERATOR] / sums[st.LR_DENOMINATOR].clamp_min(FLOAT_TINY)
    d.copy_(torch.maximum(d, estimate).clamp(low, high))


@dataclass(frozen=True)
class RankTask:
    """One 2-D parameter whose singular values are to be lowered by `threshold`."""

    weights: Weights
    threshold: float | Tensor
    key: int

    @property
    def theta(self) -> Tensor:
        return self.weights.p


def rank_tasks(
    theta: Tensor, state: st.State, options: dict[str, Any], ordinal: int, is_lora: bool, d: Tensor | None
) -> list[RankTask]:
    """Step 9 of one parameter, where it is due: every 10th step, for LoRA matrices with a short side."""
    t = state["step"]
    wanted = is_lora and options["lora_rank_penalty"] and t % LOW_RANK_EVERY == 0
    if not wanted or theta.dim() != 2 or min(theta.shape) > LOW_RANK_MAX:
        return []
    threshold = rank_threshold(options) if d is None else d * rank_threshold(options)
    key = q.mix_in(q.parameter_key(options["seed"], ordinal, RANK_STREAM), t)
    weights = Weights(theta, state.get("master_residual"), st.rounds_stochastically(theta, options))
    return [RankTask(weights, threshold, key)]


def rank_threshold(options: dict[str, Any]) -> float:
    """10 · lr · rank_penalty_strength; where auto_lr supplies d, over d."""
    rate = relative_rate(options) if options["auto_lr"] else float(options["lr"])
    return rate * LOW_RANK_EVERY * options["rank_penalty_strength"]


def shrink_ranks(tasks: list[RankTask]) -> None:
    """Step 9, in place: σ_j ← max(σ_j - threshold, 0).

    Matrices of one shape are worked on together, a bounded number of elements at a time; the eigenvalues of all with
    the same short side are found at once.
    """
    by_rank: dict[Any, list[list[RankTask]]] = {}
    for chunk in _rank_chunks(tasks):
        theta = chunk[0].theta
        by_rank.setdefault((min(theta.shape), theta.device), []).append(chunk)
    for (_, device), chunks in by_rank.items():
        grams = torch.cat([low_rank.gram(_stacked(chunk)) for chunk in chunks])
        shrinks = low_rank.shrinkage(grams, _thresholds([t for chunk in chunks for t in chunk], device))
        for chunk, shrink in zip(chunks, shrinks.split([len(c) for c in chunks]), strict=True):
            _write_back(chunk, low_rank.lowered(_stacked(chunk), shrink))


def _thresholds(tasks: list[RankTask], device: torch.device) -> Tensor:
    """float32 [tasks]: one upload where they are numbers, gathered on the device where auto_lr supplies tensors."""
    if not any(isinstance(task.threshold, Tensor) for task in tasks):
        return torch.tensor([task.threshold for task in tasks], dtype=torch.float32, device=device)
    return torch.stack([torch.as_tensor(task.threshold, dtype=torch.float32, device=device) for task in tasks])


def _rank_chunks(tasks: list[RankTask]) -> list[list[RankTask]]:
    """Tasks of one shape, dtype and device, at most LOW_RANK_ELEMENTS elements together."""
    groups: dict[Any, list[RankTask]] = {}
    for task in tasks:
        theta = task.theta
        groups.setdefault((theta.shape, theta.dtype, theta.device, task.weights.stochastic), []).append(task)
    chunks = []
    for group in groups.values():
        size = max(1, LOW_RANK_ELEMENTS // group[0].theta.numel())
        chunks += [group[i : i + size] for i in range(0, len(group), size)]
    return chunks


def _stacked(chunk: list[RankTask]) -> Tensor:
    return torch.stack([task.weights.read() for task in chunk])


def _write_back(chunk: list[RankTask], values: Tensor) -> None:
    """Store float32 values [batch, a, b] into the parameters, rounded as the main update rounds."""
    keys = torch.tensor([task.key for task in chunk], device=values.device).view(-1, 1)
    bits = q.random_bits(keys, values[0].shape, values.device) if chunk[0].weights.stochastic else keys
    for task, value, own_bits in zip(chunk, values, bits, strict=True):
        task.weights.write(value.reshape(-1), own_bits)
