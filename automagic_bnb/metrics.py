"""What `Automagic.get_metrics` returns: the inner figures of a training run, as floats under a fixed set of names.

State and gradients are read where they lie, a bounded part at a time, and brought down to a histogram of k and some
sums for each parameter. These leave the device together, in one copy; the rest is numpy in float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from automagic_bnb import auto_lr, reference, sharded
from automagic_bnb import quantization as q
from automagic_bnb import state as st
from automagic_bnb.groups import ParameterGroups
from automagic_bnb.scalars import Scalars, step_scalars
from automagic_bnb.stored import Blocks, has_mask, mask_spacing, moments_of, read_mask

METRICS: dict[str, str] = {
    "lr/mean": "mean of the elements' learning rates, as the next step would use them",
    "lr/min": "the smallest of them",
    "lr/max": "the largest",
    "lr/p10": "the 10th percentile of them",
    "lr/p90": "the 90th percentile",
    "lr/share_at_min": "share of elements whose rate min_lr holds up",
    "lr/share_at_max": "share of elements whose rate max_lr holds down",
    "auto_lr/d": "the rate found, without the schedule; NaN where every rate is given",
    "torque": "mean over blocks of the running cosine of update and momentum; NaN with torque=False",
    "share_damped": "share of blocks whose torque is below 0; NaN with torque=False",
    "edge_strength": "mean over blocks of edge_history; NaN where no edges are looked for",
    "sign_agreement": "share of elements whose gradient has the sign of their momentum; NaN without gradients",
    "share_background": "share of blocks with activity below 0.1; NaN without gradients",
    "clip_ratio": "mean over blocks of min(1, clip_threshold / √activity); NaN without gradients",
    "skipped_elements": "elements skipped so far because their gradient was not finite",
    "step": "steps taken, by the parameter that took most",
}
"""Every name, in the order returned. Those of the rates are NaN before the first step, too."""

BINS = 16
"""Bins of the histogram per unit of k where that is any number; one where it is whole."""
SUMS = (
    *("rate", "at_min", "at_max", "torque", "damped", "edges", "agreeing", "background", "clip"),
    *("smallest", "largest", "mask_mean", "d", "mean", "low", "high", "skipped"),
)
"""What stands behind the histogram; up to "clip" these add up over the parts of a parameter."""
LANES = 32
"""Copies of the histogram, added up at the end: on a GPU, elements in one bin would wait for each other."""


@dataclass(frozen=True)
class Subject:
    """One parameter that has been stepped, and all that its figures depend on; of a sharded one, what is stepped here.

    There `p` has only the shape of it; and where some of the rows are others', there is no gradient.
    """

    p: Tensor
    grad: Tensor | None
    state: st.State
    options: dict[str, Any]
    scalars: Scalars
    """Of the next step."""
    d: Tensor | None

    @property
    def bins(self) -> int:
        """Bins of the histogram per unit of k."""
        return 1 if mask_spacing(self.state) or not has_mask(self.state) else BINS

    @property
    def has_edges(self) -> bool:
        return self.options["edge_suppression"] and reference.is_spatial(self.p, self.options)


@dataclass
class Row:
    """The figures of one parameter."""

    subject: Subject
    on_device: Tensor
    """float64: the histogram, then `SUMS`."""
    counts: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0))
    sums: dict[str, float] = dataclasses.field(default_factory=dict)

    def take(self, values: np.ndarray) -> None:
        """Note the values of `on_device`."""
        self.counts = values[: -len(SUMS)]
        self.sums = dict(zip(SUMS, values[-len(SUMS) :].tolist(), strict=True))

    @property
    def elements(self) -> int:
        return self.subject.p.numel()

    @property
    def blocks(self) -> int:
        return st.block_count(self.subject.p)

    def rates(self) -> np.ndarray:
        """The learning rate of each bin of the histogram, ascending."""
        sums = self.sums
        k = reference.K_MIN + np.arange(len(self.counts)) / self.subject.bins
        rates = np.clip(sums["mean"] * np.exp2(k / 16) / sums["mask_mean"], sums["low"], sums["high"])
        return np.clip(rates, sums["smallest"], sums["largest"])  # rounding leads to no rate beyond those there are


@torch.no_grad()
def collect(optimizer: ParameterGroups, per_group: bool, per_parameter: bool) -> dict[str, float]:
    """The figures of `METRICS` over all parameters, and where asked for by group and by parameter."""
    rows: list[Row] = []
    scopes: list[tuple[str, list[Row]]] = [("", rows)]
    for index, group in enumerate(optimizer.param_groups):
        of_group: list[Row] = []
        scopes += [(f"group{index}/", of_group)] if per_group else []
        for place, p in enumerate(group["params"]):
            subject = subject_of(optimizer, group, p)
            own = [Row(subject, figures(subject))] if subject else []
            of_group += own
            if per_parameter:
                name = optimizer.facts_of(p).name or f"group{index}/parameter{place}"
                scopes.append((f"{name}/", own))
        rows += of_group
    if rows:
        device = rows[0].on_device.device
        together = torch.cat([row.on_device.to(device) for row in rows]).cpu().numpy()  # the one synchronisation
        ends = np.cumsum([len(row.on_device) for row in rows])
        for row, values in zip(rows, np.split(together, ends[:-1]), strict=True):
            row.take(values)
    return {prefix + name: value for prefix, scope in scopes for name, value in summary(scope).items()}


def summary(rows: list[Row]) -> dict[str, float]:
    """The figures of `METRICS` over some parameters."""

    def mean(name: str, over: str, chosen: list[Row]) -> float:
        total = sum(getattr(row, over) for row in chosen)
        return sum(row.sums[name] for row in chosen) / total if total else math.nan

    turned = [row for row in rows if row.subject.options["torque"]]
    edged = [row for row in rows if row.subject.has_edges]
    moved = [row for row in rows if row.subject.grad is not None]
    found = [row for row in rows if row.subject.d is not None]
    elements = sum(row.elements for row in found)
    low, high = quantiles(rows)
    values = {
        "lr/mean": mean("rate", "elements", rows),
        "lr/min": min((row.sums["smallest"] for row in rows), default=math.nan),
        "lr/max": max((row.sums["largest"] for row in rows), default=math.nan),
        "lr/p10": low,
        "lr/p90": high,
        "lr/share_at_min": mean("at_min", "elements", rows),
        "lr/share_at_max": mean("at_max", "elements", rows),
        "auto_lr/d": sum(row.sums["d"] * row.elements for row in found) / elements if found else math.nan,
        "torque": mean("torque", "blocks", turned),
        "share_damped": mean("damped", "blocks", turned),
        "edge_strength": mean("edges", "blocks", edged),
        "sign_agreement": mean("agreeing", "elements", moved),
        "share_background": mean("background", "blocks", moved),
        "clip_ratio": mean("clip", "blocks", moved),
        "skipped_elements": float(sum(row.sums["skipped"] for row in rows)),
        "step": float(max((row.subject.state["step"] for row in rows), default=0)),
    }
    return {name: values[name] for name in METRICS}


def quantiles(rows: list[Row]) -> tuple[float, float]:
    """The 10th and 90th percentile of the rates of all elements: the least rate that so many do not exceed."""
    if not rows:
        return math.nan, math.nan
    rates = np.concatenate([row.rates() for row in rows])
    counts = np.concatenate([row.counts for row in rows])
    order = np.argsort(rates, kind="stable")
    reached = np.cumsum(counts[order])
    low, high = np.searchsorted(10 * reached, [reached[-1], 9 * reached[-1]])  # in whole numbers: no rounding
    return float(rates[order[low]]), float(rates[order[high]])


# ------------------------------------------------------------------------------------------------------ on the device


def subject_of(optimizer: ParameterGroups, group: dict[str, Any], p: Tensor) -> Subject | None:
    """What the figures of one parameter depend on; None where it has not been stepped."""
    state, local, shard = optimizer.state.get(p, {}), sharded.stepped(p).detach(), sharded.shard_of(p)
    if not state.get("step") or "tensor_stats" not in state or local.numel() == 0:
        return None
    options, facts = optimizer.effective_options(group, p), optimizer.facts_of(p)
    d = None
    if options["auto_lr"]:  # perhaps only since the last step
        start = auto_lr.start_rate(group)
        d = group.get("auto_lr_rate", torch.full((), start, dtype=torch.float32, device=local.device)).to(local.device)
    return Subject(
        p=local,
        grad=None if p.grad is None or (shard and shard.shares_tiles) else st.checked_gradient(p),
        state=state,
        options=options,
        scalars=step_scalars(options, state["step"] + 1, facts.is_lora, facts.random_key(options)),
        d=d,
    )


def figures(subject: Subject) -> Tensor:
    """float64: the histogram of k, then `SUMS`."""
    device, stats, bins = subject.p.device, subject.state["tensor_stats"], subject.bins
    histogram = torch.zeros(int(reference.K_MAX - reference.K_MIN) * bins + 1, LANES, dtype=torch.int64, device=device)
    scale = percentile_scale(subject)
    sums, extremes = [], []
    for part in parts(subject):
        k = part.blocks.join(read_mask(part.state, part.blocks)[0])
        count(k, bins, histogram)
        rates, least_and_most = summed_rates(k, subject)
        added = rates + summed_statistics(part.state) + summed_gradient(part, subject, scale)
        sums.append(torch.stack([x.double() for x in added]))
        extremes.append(least_and_most)
    least, most = torch.stack(extremes).amax(dim=0).unbind()
    d = torch.zeros((), dtype=torch.float32, device=device) if subject.d is None else subject.d
    mean = reference.mean_rate(subject.scalars, subject.d, device)
    bounds = reference.rate_bounds(mean, subject.scalars)
    rest = torch.stack([-least, most, stats[st.MASK_MEAN], d, mean, *bounds, stats[st.SKIPPED]]).double()
    return torch.cat([histogram.sum(dim=1).double(), torch.stack(sums).sum(dim=0), rest])


@dataclass(frozen=True)
class Part:
    """Whole rows of a parameter (slices along its first dimension) from the start of a block on, and their state."""

    rows: slice
    blocks: Blocks
    state: st.State


def parts(subject: Subject) -> Iterator[Part]:
    """A parameter cut into parts; each but the last ends with a block, and with its tiles."""
    columns = st.matrix_shape(subject.p)[1]
    for start, stop in st.stretches(subject.p, st.storage_held(subject.state) in st.FACTORED):
        held = st.between(subject.state, subject.p, start, stop)
        yield Part(slice(start // columns, stop // columns), Blocks(held["state1"]), held)


def count(k: Tensor, bins: int, histogram: Tensor) -> None:
    """Add exponents k [n] to the histogram [bins, LANES], neighbours in different lanes."""
    lane = torch.arange(len(k), device=k.device) % LANES
    index = ((k - reference.K_MIN) * bins).round().long() * LANES + lane
    histogram.view(-1).scatter_add_(0, index, torch.ones_like(index))


def summed_rates(k: Tensor, subject: Subject) -> tuple[list[Tensor], Tensor]:
    """Σ rate and the numbers at either bound; and [-least rate, greatest rate]."""
    s, mask_mean = subject.scalars, subject.state["tensor_stats"][st.MASK_MEAN]
    rates = reference.element_rates(k, mask_mean, s, subject.d)
    low, high = reference.rate_bounds(reference.mean_rate(s, subject.d, k.device), s)
    # Where a schedule stands at 0 no bound holds anything; nor where a given rate is all weights' (W is 1 then).
    moves = (rates > 0) & ((mask_mean != 1) if subject.d is None else True)
    sums = [rates.sum(dtype=torch.float64), (moves & (rates <= low)).sum(), (moves & (rates >= high)).sum()]
    return sums, torch.stack([-rates.min(), rates.max()])


def summed_statistics(state: st.State) -> list[Tensor]:
    """Σ torque, the number of blocks with torque below 0, Σ edge_history."""
    torque, edges = state["torque"], state["edge_history"]
    return [torque.sum(dtype=torch.float64), (torque < 0).sum(), edges.sum(dtype=torch.float64)]


def percentile_scale(subject: Subject) -> Tensor | float:
    """percentile_clipping's factor for the gradient, by the norms of the last steps."""
    grad, state, percentile = subject.grad, subject.state, subject.options["percentile_clipping"]
    if grad is None or percentile == 100 or "gnorm_vec" not in state:
        return 1.0
    rows, columns = st.matrix_shape(grad)
    pieces = grad.reshape(rows, columns).split(max(1, st.CHUNK // columns))
    norm = torch.stack([reference.usable(piece)[0].square().sum() for piece in pieces]).sum().sqrt()
    return reference.clip_scale(norm, state["gnorm_vec"].clone(), state["step"], percentile)


def summed_gradient(part: Part, subject: Subject, scale: Tensor | float) -> list[Tensor]:
    """The numbers of elements whose gradient agrees with m and of background blocks, and Σ clip factor; 0 without one.

    As in a step, but with v as it is held, not moved on: after a step that is what the step itself divided by.
    """
    grad, options, blocks, rows = subject.grad, subject.options, part.blocks, part.rows
    if grad is None:
        return [torch.zeros((), dtype=torch.float32, device=subject.p.device)] * 3
    # The Laplacian of a matrix needs the rows on either side. With more dimensions each row holds whole slices.
    beside = int(grad.dim() == 2)
    first = max(rows.start - beside, 0)
    shaped, keep = reference.usable(grad.reshape(grad.shape or (1,))[first : rows.stop + beside])
    shaped, own = shaped * scale, slice(rows.start - first, rows.stop - first)
    g, keep = blocks.cut(shaped[own]), blocks.cut(keep[own])
    filtered = g
    if reference.is_spatial(grad, options):
        lap = torch.where(g != 0, blocks.cut(reference.laplacian(shaped)[own]), 0.0)
        filtered = reference.spatial_filter(g, lap, part.state["edge_history"].view(-1, 1).clone(), blocks, options)
    moments = moments_of(part.state, blocks, keep)
    v_hat = moments.read(2) / (1 - options["betas"][1] ** part.state["step"])
    activity = blocks.mean((filtered / v_hat.clamp_min(q.FLOAT_TINY).sqrt()).square())
    clip = (options["clip_threshold"] / activity.clamp_min(q.FLOAT_TINY).sqrt()).clamp_max(1)
    m = moments.read(1)
    agreeing = ((g > 0) & (m > 0)) | ((g < 0) & (m < 0))
    return [agreeing.sum(), (activity < reference.BACKGROUND_ACTIVITY).sum(), clip.sum(dtype=torch.float64)]
