"""The update rule in plain PyTorch: the definition the kernels are held to, and the path for CPU tensors.

One call updates one parameter. Everything is float32 over blocks, [blocks, 256] with the last block padded; θ, g, m, v,
u, r, n, k, π, s, h, σ, W are the symbols of the rule as the docstrings use them. Sources: CAME (arXiv 2307.02047),
Torque-Aware Momentum (2412.18790), Cautious Optimizers (2411.16085), the distance estimate of Prodigy (2306.06101), and
Automagic's sign-agreement learning rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from automagic_bnb import config, direction
from automagic_bnb import quantization as q
from automagic_bnb import state as st
from automagic_bnb.scalars import Scalars
from automagic_bnb.stored import Blocks, Weights, has_mask, mask_spacing, moments_of, read_mask, to_spacing, write_mask

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
K_MIN, K_MAX = float(q.LEAST_EXPONENT), float(q.HIGHEST_EXPONENT)
OCTAVE = 16.0
"""Steps of k by which an element's rate doubles."""
MIN_CHANGE, MAX_CHANGE = 0.5, 1.5
"""Bounds of f, by which k moves where the block's variance has its say."""
LAPLACIAN_RANGE = 8.0
"""Minus the Laplacian's eigenvalues lie between 0 and this: frequency_penalty = 1 silences the highest frequency."""
LAPLACIAN_NOISE = math.sqrt(20)
"""The Laplacian's rms over that of white noise: four neighbours, and minus four times the centre."""
MIN_EDGE_FACTOR = 0.1
"""What the edge penalty leaves of an element at least."""
SILENCE = 1e-30
"""Stands beside the rms of e and under the root of the torque's norms, which may be 0."""
BACKGROUND_FACTOR = 0.5


def usable(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Step 0: the gradient in float32 with 0 for the elements that are skipped, and which are kept (bool)."""
    values = grad.float()
    keep = values.abs() <= MAX_GRADIENT
    return torch.where(keep, values, 0.0), keep


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
    return (options["edge_suppression"] or options["frequency_penalty"] > 0) and has_surface(p)


def has_surface(p: Tensor) -> bool:
    """Whether elements have neighbours on two sides."""
    return p.dim() >= 2 and p.shape[-2] > 2 and p.shape[-1] > 2


def spatial_filter(g: Tensor, lap: Tensor, edge_history: Tensor, blocks: Blocks, options: dict[str, Any]) -> Tensor:
    """Step 1, g̃ of g: the frequency filter, then the edge penalty.

    Args:
        g, lap: [blocks, 256], 0 where there is no gradient, or it is skipped, or padding.
        edge_history: h, [blocks, 1], updated in place where edge_suppression is on.
    """
    filtered = g + (options["frequency_penalty"] / LAPLACIAN_RANGE) * lap
    if options["edge_suppression"]:
        rms = blocks.mean(g.square()).sqrt()
        e = (lap.abs() / (LAPLACIAN_NOISE * rms + SILENCE)).clamp_max(MAX_EDGE)
        e = torch.where(e > options["edge_threshold"], e, 0.0)
        edge_history.lerp_(blocks.mean(e), 1 - STATISTIC_DECAY)
        filtered = filtered * (1 - options["edge_penalty"] * edge_history * e).clamp(MIN_EDGE_FACTOR, 1)
    return filtered


@dataclass
class Part:
    """What one process steps of a parameter of which several hold rows: whole tiles, with rows of others among them.

    The blocks are those of this part. A state moves as in a step of the whole parameter; what is summed over the whole
    is left here as this process's share of it, and put into `tensor_stats` by whoever adds the shares up.
    """

    whole: Tensor
    """The parameter, of whose shape the rule depends."""
    start: int
    """The flat index in it of the part's first element; a multiple of 256."""
    rows: slice
    """Which rows of the gradient given are the part's: one more may lie on either side, for the Laplacian."""
    own: Tensor
    """bool [blocks, 256]: the elements that count in this process's shares."""
    norm: Tensor | None
    """0-d, of the whole gradient with non-finite elements zeroed; None without percentile_clipping."""
    skipped: Tensor | None = None
    """0-d: elements skipped."""
    factors: Tensor | None = None
    """float64 [2]: Σ 2^(k/16) over the elements with a gradient, and their number; None where W stays."""


def update_parameter(
    p: Tensor,
    grad: Tensor,
    state: st.State,
    options: dict[str, Any],
    s: Scalars,
    d: Tensor | None = None,
    watch: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None,
    part: Part | None = None,
) -> None:
    """One step of one parameter, in place: p and its state. `state["step"]` already counts this step.

    Args:
        p: floating point, contiguous, any shape.
        grad: shaped like p, any floating dtype; NaN, infinite and absurdly large (2^50) elements are skipped.
        d: with auto_lr, the 0-d float32 rate found so far.
        watch: called with θ before the update, u, m and g, each float32 [blocks, 256].
        part: of a parameter of which several processes hold rows, what p, the state and these rows of `grad` are.
    """
    blocks = Blocks(p)
    stats = state["tensor_stats"]
    g_shaped, keep_flat = usable(grad)
    if options["percentile_clipping"] < 100:
        measured = g_shaped if part is None or part.norm is None else part.norm
        g_shaped = g_shaped * clip_scale(measured, state["gnorm_vec"], state["step"], options["percentile_clipping"])
    spatial = is_spatial(p if part is None else part.whole, options)
    lap = laplacian(g_shaped) if spatial else g_shaped
    if part is not None:
        g_shaped, keep_flat, lap = g_shaped[part.rows], keep_flat[part.rows], lap[part.rows]
    keep = blocks.cut(keep_flat)
    if part is None:
        stats[st.SKIPPED] += blocks.n - keep.sum()
    else:
        part.skipped = (part.own & ~keep).sum()
    g = blocks.cut(g_shaped)
    # θ, v, r and k round by the same bits: each is unbiased for itself, which is what matters.
    bits = q.random_bits(s.rounding_key, keep.shape, p.device, 0 if part is None else part.start)
    moments = moments_of(state, blocks, keep, bits)

    # 1. Spatial filter.
    filtered = g
    if spatial:
        # Where there is no gradient the filter makes none: rows beside those in use would move, and more than these.
        lap = torch.where(g != 0, blocks.cut(lap), 0.0)
        filtered = spatial_filter(g, lap, state["edge_history"].view(-1, 1), blocks, options)

    # 2. Second moment, activity, clipping.
    v_hat = moments.second(filtered.square(), s, max(options["eps"][0], LEAST_EPS1))
    u = filtered / v_hat.clamp_min(q.FLOAT_TINY).sqrt()
    activity = blocks.mean(u.square())
    u = u * (options["clip_threshold"] / activity.clamp_min(q.FLOAT_TINY).sqrt()).clamp_max(1)

    # 3. Torque.
    old_m = moments.read(1)
    damping = torque_factor(old_m, u, state["torque"].view(-1, 1), s.kappa) if options["torque"] else 1.0
    m = torch.where(keep, s.beta1 * old_m + (1 - s.beta1) * damping * u, old_m)

    # 4. Confidence.
    n = m / s.correction1
    if options["came"]:
        r_hat = moments.residual((u - m).square(), s, options["eps"][1])
        n = n / r_hat.clamp_min(MIN_RESIDUAL).sqrt()

    # 6. Background, before 5 for the sake of what comes between them: both end in a factor of the block.
    if options["background_regularization"]:
        n = torch.where(activity < BACKGROUND_ACTIVITY, n * BACKGROUND_FACTOR, n)
    if direction.is_directed(p, options, s.is_lora):
        n = blocks.cut(direction.orthogonal(blocks.join(n).view(1, *p.shape)))

    # 5. Cautious.
    if options["cautious"]:
        agrees = ((n > 0) & (g > 0)) | ((n < 0) & (g < 0))
        # Of the elements that have a gradient: in a block of which one row is in use, the others say nothing.
        share = agrees.float().sum(1, keepdim=True) / (g != 0).sum(1, keepdim=True).clamp_min(1)
        n = n * agrees / share.clamp_min(MIN_CAUTIOUS_SHARE)

    # 7. Learning-rate mask.
    k = update_mask(g, u, keep, state, blocks, options, s, q.uniform(bits))
    lr_i = element_rates(k, stats[st.MASK_MEAN], s, d)

    # 8. Update.
    weights = Weights(p, state.get("master_residual"), st.rounds_stochastically(p, options))
    theta = blocks.cut(weights.read())
    if watch is not None:
        watch(theta, u, m, g)
    new_theta = theta - lr_i * (n + options["weight_decay"] * theta)
    weights.write(blocks.join(torch.where(keep, new_theta, theta)), blocks.join(bits), blocks.join(keep))
    moments.store(m)
    if s.adapt_mask and has_mask(state):
        used, factor = g != 0, torch.exp2(read_mask(state, blocks)[0] / OCTAVE)
        if part is None:
            mean = torch.where(used, factor, 0.0).sum() / used.sum().clamp_min(1)
            stats[st.MASK_MEAN] = torch.where(used.any(), mean, stats[st.MASK_MEAN])
        else:
            used &= part.own
            part.factors = torch.stack([torch.where(used, factor, 0.0).sum().double(), used.sum().double()])


def torque_factor(m: Tensor, u: Tensor, torque: Tensor, kappa: float) -> Tensor:
    """Step 3: d, [blocks, 1]; the running alignment s ([blocks, 1]) of momentum and update moves in place."""
    norms = (m.square().sum(1, keepdim=True) * u.square().sum(1, keepdim=True) + SILENCE).sqrt()
    torque.lerp_((m * u).sum(1, keepdim=True) / norms, 1 - STATISTIC_DECAY)
    return 1 + (kappa * torque).clamp(-1, 1)


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
    if not s.learn_polarity or not has_mask(state):
        return k
    variance = state["spatial_variance"].view(-1, 1)
    # var(u) = mean(u²) - mean(u)², exact enough at |u| ~ 1 and never below 0 by more than rounding
    variance.lerp_((blocks.mean(u.square()) - blocks.mean(u).square()).clamp_min(0), 1 - STATISTIC_DECAY)
    positive = (g > 0).to(torch.uint8)
    keep = keep & (g != 0)  # 0 has no sign: an element without a gradient has learned nothing
    if s.adapt_mask:
        f = torch.ones_like(variance)
        if options["spatial_awareness"]:
            f = (options["detail_preservation"] * variance).clamp(MIN_CHANGE, MAX_CHANGE)
        turned = torch.where(positive == polarity, f, -1.0 * f)
        turned = torch.where(polarity == q.NO_SIGN, 0.0, turned)  # a first gradient agrees with nothing
        moved = to_spacing(k + turned, mask_spacing(state), uniform)
        k = torch.where(keep, moved, k)
    polarity = torch.where(keep, positive, polarity)
    write_mask(state, blocks, k, polarity)
    return k


def mean_rate(s: Scalars, d: Tensor | None, device: torch.device) -> Tensor:
    """The rate of an element whose factor is 1, 0-d float32."""
    return torch.full((), s.rate, dtype=torch.float32, device=device) * (1.0 if d is None else d)


def rate_bounds(mean: Tensor, s: Scalars) -> tuple[Tensor, Tensor]:
    """Between which an element's rate stays, 0-d float32; 0 and ∞ where there is no bound.

    A bound is for single elements: where the mean rate itself lies beyond it, as a user or a schedule asked for or as
    it was found, it does not hold.
    """
    low = torch.full_like(mean, s.low)
    high = config.MAX_LR_RATIO * mean if s.high is None else torch.full_like(mean, s.high)
    # Beside a tensor of no dimensions a number would count in the default dtype.
    unbounded = torch.zeros_like(mean), torch.full_like(mean, math.inf)
    return torch.where(low <= mean, low, unbounded[0]), torch.where(high >= mean, high, unbounded[1])


def element_rates(k: Tensor, mask_mean: Tensor, s: Scalars, d: Tensor | None) -> Tensor:
    """lr_i of exponents k, given the mask's mean W of the previous step."""
    mean = mean_rate(s, d, k.device)
    return (mean * (torch.exp2(k / OCTAVE) / mask_mean)).clamp(*rate_bounds(mean, s))
