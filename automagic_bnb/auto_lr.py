"""The rate found where none is given: what is watched, the estimate, and where the rate is shown; for both backends.

Prodigy's estimate (Mishchenko and Defazio, arXiv 2306.06101) on the gradients of some blocks, for each group: d, the
mean rate, is a 0-d tensor that lives in the group as `auto_lr_rate`. It is brought up to date when a step begins, from
the sums that the last step left in each parameter's `tensor_stats`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from automagic_bnb import state as st
from automagic_bnb.notices import warn_once
from automagic_bnb.quantization import FLOAT_TINY
from automagic_bnb.scalars import Scalars, relative_rate

if TYPE_CHECKING:
    from automagic_bnb.kernels.tables import Bucket

Group = dict[str, Any]

PEAK_TOLD = 4.0
"""A found rate may be doubled by hand, twice; beyond that the schedule was made for a given rate."""
GROUP_KEYS = ("auto_lr_rate", "auto_lr_step", "effective_lr")
"""What a search keeps in its group."""
SPREAD_WARNING = (
    "a group whose rate is being found lies on several devices: it is stepped in plain PyTorch, which is many times "
    "slower; give it an lr, or make a group for each device"
)


# --- what is watched --------------------------------------------------------------------------------------------------


def update_probes(theta: Tensor, grad: Tensor, state: st.State, s: Scalars, d: Tensor) -> None:
    """The sums of one parameter: num ← √β2 num + ω Σ g (θ0 - θ), z ← √β2 z + ω g with ω = d² ρ / d0.

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


# --- the estimate -----------------------------------------------------------------------------------------------------


def find_rate(d: Tensor, stats: list[Tensor], low: float, high: float) -> None:
    """In place: d ← clamp(max(d, Σ num / Σ|z|), low, high) over the `tensor_stats` of a group."""
    if not stats:
        return
    sums = torch.stack(stats).sum(dim=0)
    estimate = sums[st.LR_NUMERATOR] / sums[st.LR_DENOMINATOR].clamp_min(FLOAT_TINY)
    d.copy_(torch.maximum(d, estimate).clamp(low, high))


def rate_tensor(group: Group, device: torch.device) -> Tensor:
    """d of a group, a 0-d float32 that lives in the group."""
    if "auto_lr_rate" not in group:
        group["auto_lr_rate"] = torch.tensor(group["base_lr"], dtype=torch.float32, device=device)
    return group["auto_lr_rate"]


def begins_step(group: Group, t: int) -> bool:
    """Whether t is a step of the group that no parameter has reached before; notes it."""
    if t <= group.get("auto_lr_step", 0):  # missing where only an override switches auto_lr on
        return False
    group["auto_lr_step"] = t
    return True


def found_rate(group: Group, states: Iterable[st.State], t: int, device: torch.device) -> Tensor:
    """d for step t of this group in plain PyTorch, brought up to date when a new step begins.

    Args:
        states: those of the group's parameters.
    """
    d = rate_tensor(group, device)
    if begins_step(group, t):
        sums = [state["tensor_stats"] for state in states if "probe_sum" in state]
        find_rate(d, [x.to(d.device) for x in sums], group["min_lr"], group["max_lr"])
        publish_rate(group)
    return d.to(device)


@dataclass
class FoundRate:
    """A group whose rate the kernels find, and where the `tensor_stats` of all its parameters lie."""

    group: Group
    rows: list[tuple[int, np.ndarray]]
    """By number of the bucket, which of its members are the group's."""
    is_whole: bool
    """Whether all of the group's parameters are in the plan, which sees to it that their states stay where they are."""
    addresses: list[int] = field(default_factory=list)
    on_device: Tensor | None = None

    def update(self, buckets: list[Bucket], grads: list[np.ndarray], states: Callable[[], list[st.State]]) -> None:
        """Bring d up to date if a new step of the group begins; nothing waits.

        Args:
            grads: of each bucket, the addresses of its members' gradients, 0 for none.
            states: gives those of the group's parameters, which takes as long as a step where they are many.
        """
        from automagic_bnb.kernels import statistics

        step = max(buckets[i].next_step(rows, grads[i]) for i, rows in self.rows)
        if step and begins_step(self.group, step):
            addresses = self._stats_addresses(states)
            statistics.find_rate(self.group["auto_lr_rate"], addresses, self.group["min_lr"], self.group["max_lr"])
            publish_rate(self.group)

    def _stats_addresses(self, states: Callable[[], list[st.State]]) -> Tensor:
        """Where the sums of all the group's parameters lie, those outside the plan too, as int64 on the device."""
        if self.on_device is not None and self.is_whole:
            return self.on_device
        addresses = [state["tensor_stats"].data_ptr() for state in states() if "probe_sum" in state]
        if self.on_device is None or addresses != self.addresses:
            self.addresses = addresses
            self.on_device = torch.tensor(addresses, dtype=torch.int64, device=self.group["auto_lr_rate"].device)
        return self.on_device


def found_rates(buckets: list[Bucket]) -> list[FoundRate]:
    """The groups among the members of these buckets whose rate is being found."""
    groups = {id(m.group): m.group for bucket in buckets for m in bucket.members if m.rate is not None}
    found = []
    for group in groups.values():
        rows = [np.array([i for i, m in enumerate(b.members) if m.group is group], dtype=np.int64) for b in buckets]
        whole = sum(map(len, rows)) == len(group["params"])
        found.append(FoundRate(group, [(i, x) for i, x in enumerate(rows) if len(x)], whole))
    return found


# --- where it is shown ------------------------------------------------------------------------------------------------


def publish_rate(group: Group) -> None:
    """Put the rate found where some trainers look for it, in place of `lr`; say if a schedule drives it far up."""
    relative = relative_rate(group)
    group["effective_lr"] = group["auto_lr_rate"] * relative
    if relative > PEAK_TOLD:
        warn_once(
            f"a schedule has raised lr to more than {PEAK_TOLD:g} times its initial_lr, and with it the rate that "
            "is being found, above max_lr. OneCycleLR and CyclicLR begin far below their peak: give the optimizer "
            "an lr with them, or choose a schedule that begins at its peak"
        )


def mean_rate(group: Group) -> float | Tensor:
    """The group's mean rate: its `lr`, or where it is being found a 0-d tensor (nothing synchronises)."""
    if not group["auto_lr"] or "auto_lr_rate" not in group:
        return group["lr"]
    return group["auto_lr_rate"] * relative_rate(group)
