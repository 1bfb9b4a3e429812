"""The rate found where none is given: which groups search together, when, and where the rate is shown.

A `Search` is one d (see `estimate`), of one group or of several whose given rates have to keep their ratios. The sums
of a step wait in each parameter's `tensor_stats` and are taken from there when the next step begins, so nothing waits
for the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from automagic_bnb import config, estimate
from automagic_bnb import state as st
from automagic_bnb.scalars import relative_rate

Group = dict[str, Any]
States = Mapping[Tensor, st.State]

SPREAD_WARNING = (
    "a group whose rate is being found lies on several devices: it is stepped in plain PyTorch, which is many times "
    "slower; give it an lr, or make a group for each device"
)
GROUP_KEYS = ("auto_lr_rate", "auto_lr_sums", "auto_lr_count", "auto_lr_peak", "effective_lr")
"""What a search keeps in its groups: d of the group, (num, q) in the first of a search, the steps it has taken, the
highest `lr` seen, and the rate in use."""


@dataclass
class Search:
    """One rate that is found, and the groups that it is for; d is the first group's."""

    groups: list[Group]
    ratios: list[float]
    """Of each group's rate to the first's."""
    stepped: set[Tensor] = field(default_factory=set)
    """In the step under way, which of the parameters that are stepped one at a time have been."""
    places: tuple[Any, Any, Tensor] | None = None
    """Where the sums lie and what each counts, and what that rests on; None: not known."""
    shown: dict[int, tuple[Tensor, torch.cuda.Event]] = field(default_factory=dict)
    """By number of the group, its d on the way to the host."""

    @property
    def leader(self) -> Group:
        return self.groups[0]

    def numbers(self) -> estimate.Estimate:
        """Of the next estimate."""
        group = self.leader
        given = group.get("auto_lr_given")
        factor = estimate.DISTANCE_FACTOR * (given if given is not None and given >= config.FACTOR_LR else 1.0)
        error = estimate.sign_error(group.get("auto_lr_count", 1))
        return estimate.Estimate(group["betas"][0], factor, error, *found_bounds(group))

    def begins(self, p: Tensor | None) -> bool:
        """Whether a new step begins now; p: the one parameter that is stepped, None for all of them.

        One at a time, a step ends when a parameter comes for the second time.
        """
        begins = p is None or not self.stepped or p in self.stepped
        if begins:
            self.stepped.clear()
        if p is not None:
            self.stepped.add(p)
        return begins

    def has_started(self) -> bool:
        """Whether a step has been taken; if not, what the search keeps in its groups is made."""
        group = self.leader
        if {"auto_lr_rate", "auto_lr_sums"} <= group.keys():
            return True
        d = rate_tensor(group, st.local_tensor(group["params"][0]).device)
        group["auto_lr_sums"], group["auto_lr_count"] = torch.zeros(2, dtype=torch.float32, device=d.device), 0
        return False

    def count(self) -> bool:
        """Count a step that begins; whether its estimate moves d."""
        group = self.leader
        group["auto_lr_count"] = group.get("auto_lr_count", 0) + 1
        last = group["auto_lr_steps"]
        return last is None or group["auto_lr_count"] <= last

    def share(self) -> None:
        """Give d to the other groups, times their ratios, and show each group's rate."""
        d = self.leader["auto_lr_rate"]
        for number, (group, ratio) in enumerate(zip(self.groups, self.ratios, strict=True)):
            if number:
                rate_tensor(group, d.device).copy_(d * ratio)
            if group["auto_lr"]:
                self._show(group, number)

    def _show(self, group: Group, number: int) -> None:
        """Put the rate found where trainers look for it.

        `effective_lr` is the rate in use. `lr` itself shows it too (on CUDA that of a step before, for which nothing
        waits), as long as nobody else writes there: a scheduler leaves `initial_lr` behind, and what is set by hand
        counts as a share of what was shown.
        """
        rate = group["auto_lr_rate"]
        if "initial_lr" in group:
            group["auto_lr_peak"] = max(group.get("auto_lr_peak", 0.0), float(group["lr"]))
        elif group["lr"] == group["base_lr"] and (found := self._on_host(rate, number)):
            group["lr"] = group["base_lr"] = found
        group["effective_lr"] = rate * relative_rate(group)

    def _on_host(self, rate: Tensor, number: int) -> float | None:
        """The rate as a number of seven digits; of a CUDA tensor one that has arrived meanwhile, if any."""
        if rate.device.type != "cuda":
            return float(f"{rate.item():.7g}")
        value = None
        if number in self.shown:
            copy, event = self.shown[number]
            if not event.query():
                return None
            value = float(f"{copy.item():.7g}")
        else:
            copy, event = torch.empty((), dtype=torch.float32, pin_memory=True), torch.cuda.Event()
        copy.copy_(rate, non_blocking=True)
        event.record(torch.cuda.current_stream(rate.device))
        self.shown[number] = (copy, event)
        return value


def searches(groups: list[Group]) -> list[Search]:
    """The searches of these groups: those with a given `lr` share one and keep their ratios, each other has its own."""
    found: list[Search] = []
    tied: Search | None = None
    for group in groups:
        given = group.get("auto_lr_given")
        if not given:
            found.append(Search([group], [1.0]))
        elif tied is None:
            tied = Search([group], [1.0])
            found.append(tied)
        else:
            tied.groups.append(group)
            tied.ratios.append(given / tied.leader["auto_lr_given"])
    return found


def found_bounds(group: Group) -> tuple[float, float]:
    """Between which d stays; OneCycleLR puts a `max_lr` of its own into the group, which is none."""
    high = math.inf if group["max_lr"] is None or "max_momentum" in group else group["max_lr"]
    return min(group["min_lr"], high), high


def start_rate(group: Group) -> float:
    """Where the search for a group begins."""
    given = group.get("auto_lr_given")
    if given and given < config.FACTOR_LR:
        return given
    low, high = found_bounds(group)
    return min(max((given or 1.0) * config.START_LR, low), high)


def rate_tensor(group: Group, device: torch.device) -> Tensor:
    """d of a group, a 0-d float32 that lives in the group."""
    if "auto_lr_rate" not in group:
        group["auto_lr_rate"] = torch.tensor(start_rate(group), dtype=torch.float32, device=device)
    return group["auto_lr_rate"]


class RateFinder:
    """The searches of an optimizer, brought up to date whenever a step begins."""

    def __init__(self) -> None:
        self._known: list[tuple[int, bool, float | None]] = []
        self._searches: list[Search] = []

    def forget_places(self) -> None:
        """States have moved: look anew where the sums lie."""
        for search in self._searches:
            search.places = None

    def begin(self, groups: list[Group], states: States, one: tuple[Group, Tensor] | None, with_kernels: bool) -> None:
        """To be called before parameters are stepped: all that have gradients, or one alone, of this group.

        Args:
            groups, states: the optimizer's.
            with_kernels: let the device work on the sums in Triton, by their addresses, where all lie on one.
        """
        for search in self._of(groups):
            if one is not None and not any(one[0] is group for group in search.groups):
                continue
            if search.begins(None if one is None else one[1]):
                if search.has_started() and search.count():
                    self._estimate(search, states, with_kernels)
                search.share()

    def _of(self, groups: list[Group]) -> list[Search]:
        # A group may also search for the sake of single parameters, whose overrides say so.
        seeks = [(id(g), g["auto_lr"] or "auto_lr_rate" in g, g.get("auto_lr_given")) for g in groups if g["params"]]
        if seeks != self._known:
            self._known = seeks
            filled = [group for group in groups if group["params"]]
            self._searches = searches([group for group, seek in zip(filled, seeks, strict=True) if seek[1]])
        return self._searches

    @staticmethod
    def _estimate(search: Search, states: States, with_kernels: bool) -> None:
        d, sums = search.leader["auto_lr_rate"], search.leader["auto_lr_sums"]
        key = (st.WatchedState.changes, len(states), with_kernels)
        if search.places is None or search.places[0] != key:
            held = [
                (states[p]["tensor_stats"], 1 / ratio)
                for group, ratio in zip(search.groups, search.ratios, strict=True)
                for p in group["params"]
                if p in states and "probe_block" in states[p]
            ]
            weights = torch.tensor([weight for _, weight in held], dtype=torch.float32).to(d.device)
            stats: Any = [stats for stats, _ in held]
            if with_kernels and all(x.device == d.device for x in stats):
                stats = torch.tensor([x.data_ptr() for x in stats], dtype=torch.int64).to(d.device)
            search.places = (key, stats, weights)
        _, stats, weights = search.places
        if isinstance(stats, Tensor):
            from automagic_bnb.kernels import statistics

            with torch.cuda.device_of(d):  # Triton launches on the current device
                statistics.find_rate(d, sums, stats, weights, search.numbers())
        else:
            estimate.find_rate(d, sums, stats, weights, search.numbers())


def mean_rate(group: Group) -> float | Tensor:
    """The group's mean rate: its `lr`, or where it is being found a 0-d tensor (nothing synchronises)."""
    if not group["auto_lr"]:
        return group["lr"]
    return group.get("auto_lr_rate", start_rate(group)) * relative_rate(group)


def upper_bound(group: Group) -> float:
    """The most that a single element's rate may be at this point of the schedule; waits for a rate that is found."""
    if group["max_lr"] is None:
        return config.MAX_LR_RATIO * float(mean_rate(group))
    return group["max_lr"] * relative_rate(group)
