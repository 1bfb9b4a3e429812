"""The rate found where none is given: which groups search together, when, and where the rate is shown.

A `Search` is one d (see `estimate`), of one group or of several whose given rates have to keep their ratios. The sums
of a step wait in each parameter's `tensor_stats` and are taken from there when the next step begins, so nothing waits
for the device. Where parameters lie on several devices, what each has is added up there, d is found where the first
parameter is, and copies of it go to the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from automagic_bnb import config, estimate
from automagic_bnb import state as st
from automagic_bnb.scalars import PEAK_RATIO, as_number, named_peak, relative_rate
from automagic_bnb.stepping import OneByOne
from automagic_bnb.uncompiled import capturing

Group = dict[str, Any]
States = Mapping[Tensor, st.State]

NOT_IN_A_CAPTURE = (
    "a CUDA graph cannot capture this step: a rate is being found for parameters on several devices; give an lr, or "
    "make an optimizer for each device"
)
GROUP_KEYS = (
    "auto_lr_rate",
    "auto_lr_sums",
    "auto_lr_count",
    "auto_lr_watched",
    "auto_lr_joined",
    "auto_lr_peak",
    "effective_lr",
)
"""What a search keeps in its groups: d of the group; in the first of a search (num, q), the steps it has taken, how
many parameters it watches and after how many steps the last one joined; the highest `lr` seen, and the rate in use."""


@dataclass
class Sums:
    """What a search has on one device."""

    stats: list[Tensor] | Tensor
    """The `tensor_stats` of its parameters there, or for the kernels their addresses, int64."""
    weights: Tensor
    """float32, what s of each counts."""
    arrived: Tensor
    """Like a `tensor_stats` of the device where d is: what has come from here and has not been taken yet."""

    def move(self) -> None:
        """Take the sums out here, and add them to what has arrived there."""
        if isinstance(self.stats, Tensor):
            from automagic_bnb.kernels import statistics

            with torch.cuda.device_of(self.stats):  # Triton launches on the current device
                taken = statistics.take_sums(self.stats, self.weights)
        else:
            taken = estimate.take_sums(self.stats, self.weights)
        there = self.arrived.device
        self.arrived[estimate.SUMS].add_(taken.to(there, non_blocking=there.type == "cuda"))


@dataclass
class Places:
    """Where the sums of a search lie, and what that rests on."""

    key: Any
    known: st.StatePlaces
    here: Sums
    """On d's device; what has arrived from others is among its `stats`."""
    others: list[Sums]


@dataclass
class Search:
    """One rate that is found, and the groups that it is for; d is the first group's."""

    groups: list[Group]
    ratios: list[float]
    """Of each group's rate to the first's."""
    one_by_one: OneByOne = field(default_factory=OneByOne)
    places: Places | None = None
    """None: not known."""
    counter: Tensor | None = None
    """`auto_lr_count`, int64 0-d on the device, where it is counted there."""
    shown: dict[int, tuple[Tensor, torch.cuda.Event]] = field(default_factory=dict)
    """By number of the group, its d on the way to the host."""

    @property
    def leader(self) -> Group:
        return self.groups[0]

    def numbers(self) -> estimate.Estimate:
        """Of the next estimate."""
        group = self.leader
        given = group.get("auto_lr_given")
        t = group.get("auto_lr_count", 1)
        factor = estimate.distance_factor(t - group.get("auto_lr_joined", 0))
        if given is not None and given >= config.FACTOR_LR:
            factor *= given
        return estimate.Estimate(group["betas"][0], factor, estimate.sign_error(t), *found_bounds(group))

    def watches(self, parameters: int) -> None:
        """Note how many there are; for one that begins to train later the distance is counted from then on."""
        group = self.leader
        if parameters > group.get("auto_lr_watched", 0):
            group["auto_lr_joined"] = group["auto_lr_count"] if group.get("auto_lr_watched") else 0
            group["auto_lr_watched"] = parameters

    def begins(self, p: Tensor | None) -> bool:
        """Whether a new step begins now; p: the one parameter that is stepped, None for all of them."""
        if p is not None:
            return self.one_by_one.takes(p)
        self.one_by_one.end()
        return True

    def has_started(self) -> bool:
        """Whether a step has been taken; if not, what the search keeps in its groups is made."""
        self.follow()
        group = self.leader
        if {"auto_lr_rate", "auto_lr_sums"} <= group.keys():
            return True
        d = rate_tensor(group, st.local_tensor(group["params"][0]).device)
        group["auto_lr_sums"], group["auto_lr_count"] = torch.zeros(2, dtype=torch.float32, device=d.device), 0
        group["auto_lr_watched"] = group["auto_lr_joined"] = 0
        return False

    def follow(self) -> None:
        """Take what the search keeps on a device to where its first parameter is: a trainer that moves models and
        states by hand leaves it behind."""
        device = st.local_tensor(self.leader["params"][0]).device
        rate = self.leader.get("auto_lr_rate")
        if rate is None or rate.device == device:
            return
        self.settle()
        self.counter = self.places = None
        self.shown.clear()
        for group in self.groups:
            for name in ("auto_lr_rate", "auto_lr_sums", "effective_lr"):
                if isinstance(group.get(name), Tensor):
                    group[name] = group[name].to(device)

    def count(self) -> bool:
        """Count a step that begins; whether its estimate moves d."""
        group = self.leader
        group["auto_lr_count"] = group.get("auto_lr_count", 0) + 1
        last = group["auto_lr_steps"]
        return last is None or group["auto_lr_count"] <= last

    def count_there(self, started: bool, found_inf: Tensor | None) -> Tensor:
        """`count` on the device; returns the error of the estimate there, below 0 where it moves nothing.

        started: whether a step was called for before, which may have come to nothing.
        """
        from automagic_bnb.kernels import numbers

        group = self.leader
        if self.counter is None:
            count, device = group.get("auto_lr_count", 0) if started else -1, group["auto_lr_rate"].device
            self.counter = torch.full((), count, dtype=torch.int64, device=device)
        return numbers.count_search(self.counter, group["auto_lr_steps"], found_inf)

    def settle(self) -> None:
        """Bring `auto_lr_count` up to date; waits for the device if it was counted there."""
        if self.counter is not None:
            self.leader["auto_lr_count"] = max(int(self.counter), 0)

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
        if isinstance(group["lr"], Tensor):
            group["effective_lr"] = rate * _relative_rate_there(group)
            return
        if "initial_lr" in group:
            group["auto_lr_peak"] = max(float(group.get("auto_lr_peak", 0.0)), float(group["lr"]))
        elif group["lr"] == group["base_lr"] and (found := self._on_host(rate, number)):
            group["lr"] = group["base_lr"] = found
        group["effective_lr"] = rate * relative_rate(group)

    def _on_host(self, rate: Tensor, number: int) -> float | None:
        """The rate as a number of seven digits; of a CUDA tensor one that has arrived meanwhile, if any."""
        if self.leader["capturable"]:
            return None  # a replay shows nothing
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


def _relative_rate_there(group: Group) -> Tensor:
    """ρ of a group whose `lr` is a tensor, on its device; the highest rate of a schedule is noted there, too."""
    lr, base = group["lr"], as_number(group.get("initial_lr", group["base_lr"]))
    if "initial_lr" not in group:
        return lr / base
    if not isinstance(group.get("auto_lr_peak"), Tensor):
        group["auto_lr_peak"] = torch.full_like(lr, group.get("auto_lr_peak", 0.0))
    torch.maximum(group["auto_lr_peak"], lr, out=group["auto_lr_peak"])
    highest = group["auto_lr_peak"].clamp_min(named_peak(group))
    return lr / torch.where(highest > PEAK_RATIO * base, highest, base)


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


Seek = tuple[Any, ...]


def _seek(group: Group) -> Seek:
    """What searches follow from: which group it is, whether a rate is found in it (or for a parameter whose override
    says so), the rate given, and what distances in it count."""
    finds = group["auto_lr"] or "auto_lr_rate" in group
    return id(group), finds, group.get("auto_lr_given"), group["lora_direction"]


class RateFinder:
    """The searches of an optimizer, brought up to date whenever a step begins."""

    def __init__(self, share: Callable[[Group, Tensor], float]) -> None:
        """share: what the distance of a parameter of this group counts."""
        self._share = share
        self._held: list[Any] = []
        """What replays of captured graphs rest on."""
        self._known: list[Seek] = []
        self._searches: list[Search] = []
        self._by_group: dict[int, tuple[list[Group], list[Seek], Search | None]] = {}
        """By a group's id: its search, if any, the groups of it, or the group alone, and what these were seeking."""
        self._count = 0
        """Of all groups, when they were last asked."""
        self._copies: dict[tuple[int, torch.device], tuple[Group, Tensor]] = {}
        """By a group's id and a device: the group, and its d there, where it does not live there."""

    def rate_on(self, group: Group, device: torch.device) -> Tensor:
        """d of a group as kernels on a device read it, 0-d float32: the group's own, or a copy that follows it."""
        d = rate_tensor(group, st.local_tensor(group["params"][0]).device)
        if d.device == device:
            return d
        if (id(group), device) not in self._copies:
            self._copies[id(group), device] = group, d.to(device)
        return self._copies[id(group), device][1]

    def forget_places(self) -> None:
        """States have moved: look anew where the sums lie."""
        for search in self._searches:
            search.places = None

    def settle(self) -> None:
        """Bring up to date what the groups hold of what is counted on the device."""
        for search in self._searches:
            search.settle()

    def hold(self) -> None:
        """A graph is being captured: keep what it will read for as long as this lives.

        Raises:
            RuntimeError: a rate is found over several devices, which one graph does not have.
        """
        apart = any(copy.device != group["auto_lr_rate"].device for group, copy in self._copies.values())
        if apart or any(search.places is not None and search.places.others for search in self._searches):
            raise RuntimeError(NOT_IN_A_CAPTURE)
        self._held += [(search.places, search.counter) for search in self._searches]

    def begin(
        self,
        groups: list[Group],
        states: States,
        one: tuple[Group, Tensor] | None,
        kernels_on: frozenset[str],
        found_inf: Tensor | None = None,
    ) -> None:
        """To be called before parameters are stepped: all that have gradients, or one alone, of this group.

        Args:
            groups, states: the optimizer's.
            kernels_on: the types of devices that work on the sums in Triton, by their addresses.
            found_inf: on the device, with `capturable`; where it is not 0, no step begins after all.
        """
        for search in self._of(groups) if one is None else self._of_one(groups, one[0]):
            if search.begins(None if one is None else one[1]):
                started = search.has_started()
                if started or search.leader["capturable"]:
                    self._estimate(search, states, kernels_on, started, found_inf)
                search.share()
                for group, copy in self._copies.values():
                    if any(group is one for one in search.groups):
                        copy.copy_(group["auto_lr_rate"], non_blocking=copy.device.type == "cuda")

    def _of_one(self, groups: list[Group], group: Group) -> list[Search]:
        """The search that a group takes part in, if any. The others are not asked: each parameter may have a group."""
        for _ in range(2):
            together, seeks, search = self._by_group.get(id(group), ([group], [], None))
            if len(groups) == self._count and [_seek(g) for g in together] == seeks:
                break
            self._of(groups)
        return [] if search is None else [search]

    def _of(self, groups: list[Group]) -> list[Search]:
        seeks = [_seek(group) for group in groups if group["params"]]
        if seeks != self._known:
            self._known = seeks
            self.settle()
            filled = [group for group in groups if group["params"]]
            held = {id(group) for group in filled}
            self._copies = {key: copy for key, copy in self._copies.items() if key[0] in held}
            self._searches = searches([group for group, seek in zip(filled, seeks, strict=True) if seek[1]])
            self._by_group = {id(group): ([group], [_seek(group)], None) for group in filled}
            for search in self._searches:
                known = search.groups, [_seek(group) for group in search.groups], search
                self._by_group |= {id(group): known for group in search.groups}
        self._count = len(groups)
        return self._searches

    def _estimate(
        self, search: Search, states: States, kernels_on: frozenset[str], started: bool, found_inf: Tensor | None
    ) -> None:
        """Count the step that begins, and move d."""
        d, sums = search.leader["auto_lr_rate"], search.leader["auto_lr_sums"]
        key = (st.WatchedState.changes, len(states), kernels_on)
        if search.places is None or search.places.key != key or not search.places.known.are_current():
            if capturing():
                raise RuntimeError("capturable=True: take a step outside of the CUDA graph before each capture")
            search.places = self._find_places(search, states, key)
        here = search.places.here
        counts_there = isinstance(here.stats, Tensor) and search.leader["capturable"]
        if not counts_there:
            search.settle()
            search.counter = None
            if not started or not search.count():
                return
        for other in search.places.others:
            other.move()
        if isinstance(here.stats, Tensor):
            from automagic_bnb.kernels import statistics

            with torch.cuda.device_of(d):  # Triton launches on the current device
                found_inf = None if found_inf is None else found_inf.to(d.device, non_blocking=True)
                error = search.count_there(started, found_inf) if counts_there else None
                statistics.find_rate(d, sums, here.stats, here.weights, search.numbers(), error)
        else:
            estimate.find_rate(d, sums, here.stats, here.weights, search.numbers())

    def _find_places(self, search: Search, states: States, key: Any) -> Places:
        home, kernels_on = search.leader["auto_lr_rate"].device, key[-1]
        held = [
            (states[p]["tensor_stats"], self._share(group, p) / ratio)
            for group, ratio in zip(search.groups, search.ratios, strict=True)
            for p in group["params"]
            if p in states and "probe_block" in states[p]
        ]
        search.watches(len(held))
        known = st.StatePlaces(
            [stats for stats, _ in held],
            (states[p] for g in search.groups for p in g["params"] if p in states),
            [4] * len(held),  # the state, a bucket twice, and this
        )
        parts = by_device(held, home)
        arrivals = [torch.zeros(len(st.STATS), dtype=torch.float32, device=home) for _ in parts[1:]]
        parts[0] += [(arrived, 1.0) for arrived in arrivals]
        found = []
        for part, arrived in zip(parts, [torch.empty(0), *arrivals], strict=True):
            stats: Any = [stats for stats, _ in part]
            device = stats[0].device if stats else home
            weights = torch.tensor([weight for _, weight in part], dtype=torch.float32).to(device)
            if device.type in kernels_on:
                stats = torch.tensor([x.data_ptr() for x in stats], dtype=torch.int64).to(device)
            found.append(Sums(stats, weights, arrived))
        return Places(key, known, found[0], found[1:])


def by_device(held: list[tuple[Tensor, float]], home: torch.device) -> list[list[tuple[Tensor, float]]]:
    """`tensor_stats`, each with its weight, of this device first (there may be none), then of each other."""
    parts: dict[torch.device, list[tuple[Tensor, float]]] = {home: []}
    for stats, weight in held:
        parts.setdefault(stats.device, []).append((stats, weight))
    return list(parts.values())


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
