"""Driving the Triton kernels: which parameters they take, and the plan that is kept from step to step.

A plan holds the buckets of pointer tables. It is made anew when anything it rests on has moved: a parameter's or a
state's memory, a gradient's dtype, an option, an override.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from operator import is_
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from automagic_bnb import auto_lr, bnb, config, low_rank, paged
from automagic_bnb import state as st
from automagic_bnb.groups import ParameterGroups
from automagic_bnb.notices import warn_once

if TYPE_CHECKING:
    from automagic_bnb.kernels.low_rank import Matrices
    from automagic_bnb.kernels.tables import Bucket, Member

READ_ANEW = (
    *("lr", "min_lr", "max_lr", "weight_decay", "warmup_steps", "low_rank_emphasis", "rank_penalty_strength"),
    *("percentile_clipping", "betas", "eps", "clip_threshold", "frequency_penalty", "edge_penalty", "edge_threshold"),
    "detail_preservation",
)
"""Numbers that are arguments of a launch or stand in its tables: schedulers change them, and no plan rests on them."""
STRUCTURAL = tuple(name for name in config.GROUP_OPTIONS if name not in READ_ANEW)


def triton_missing() -> str:
    """Why Triton cannot be used here, or the empty string."""
    try:
        import triton  # noqa: F401
    except ImportError as e:
        return f"Triton could not be imported ({e})"
    return ""


def interpreting() -> bool:
    """Whether Triton's interpreter is on, in which the kernels run on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def takes(p: Tensor, backend: str | None) -> bool:
    """Whether the kernels update this (local) parameter.

    Raises:
        RuntimeError: backend="triton" was asked for and cannot run here.
    """
    if backend == "torch":
        return False
    missing = triton_missing()
    if backend is None:
        if p.device.type != "cuda":
            return False
        if missing:
            warn_once(f"{missing}; the optimizer runs in plain PyTorch, which is many times slower on a GPU")
            return False
    elif missing:
        raise RuntimeError(f"option backend='triton': {missing}; install it, or use backend='torch'")
    elif p.device.type != "cuda" and not interpreting():
        raise RuntimeError(
            f"option backend='triton': a parameter is on {p.device}, where the kernels run only in Triton's "
            "interpreter; set TRITON_INTERPRET=1 before Triton is imported, or use backend='torch'"
        )
    # A strided parameter is updated through a contiguous copy, in plain PyTorch.
    return p.is_contiguous() and p.numel() > 0


@dataclass
class Source:
    """Where a member's options come from: its group, or the group under the parameter's own override."""

    group: dict[str, Any]
    p: Tensor | None
    """The parameter with an override; None where the group's options apply as they are."""
    signature: tuple[Any, ...]


@dataclass
class Plan:
    buckets: list[Bucket] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    matrices: list[Matrices] = field(default_factory=list)
    """Of each bucket, what step 9 works on."""
    idle: list[Tensor] = field(default_factory=list)
    """Parameters that had no gradient when the plan was made."""
    rest: list[tuple[dict[str, Any], Tensor]] = field(default_factory=list)
    """Parameters that the kernels do not take."""
    spread: frozenset[int] = frozenset()
    """The ids of groups on several devices: the kernels of each could not read one rate that is found for all."""
    overrides: tuple[int, ...] = ()
    groups: list[tuple[dict[str, Any], list[Tensor]]] | None = None
    """Each group, and the parameters in it, which wrappers may exchange; None in the plan of a single parameter."""
    states: dict[Tensor, st.State] | None = None
    """All that the optimizer held after the step for which the plan was made; None until then."""

    def is_current(self, optimizer: ParameterGroups, options: list[dict[str, Any]]) -> bool:
        return (
            self._has_groups(optimizer.param_groups)
            and self._has_states(optimizer.state)
            and self.overrides == bnb.overridden_ids()
            and all(s.signature == signature(o) for s, o in zip(self.sources, options, strict=True))
            and not any(p.grad is not None for p in self.idle)
            and not any(self._would_take(group, p, optimizer.config.backend) for group, p in self.rest)
            and all(bucket.agrees(options) and bucket.is_current() for bucket in self.buckets)
        )

    def _would_take(self, group: dict[str, Any], p: Tensor, backend: str | None) -> bool:
        return id(group) not in self.spread and takes(st.local_tensor(p), backend)

    def _has_groups(self, groups: list[dict[str, Any]]) -> bool:
        if self.groups is None:
            return True
        return len(groups) == len(self.groups) and all(
            group is known and len(group["params"]) == len(parameters) and all(map(is_, group["params"], parameters))
            for group, (known, parameters) in zip(groups, self.groups, strict=True)
        )

    def _has_states(self, held: Mapping[Tensor, st.State]) -> bool:
        """Whether each parameter's state is still the same dictionary; what is in it is for the buckets to see."""
        if self.groups is None:
            buckets = self.buckets
            return all(held.get(p) is state for b in buckets for p, state in zip(b.parameters, b.states, strict=True))
        # Not one by one: a tensor's hash is a call of Python code.
        return (
            self.states is not None
            and len(held) == len(self.states)
            and all(map(is_, held, self.states))
            and (all(map(is_, held.values(), self.states.values())) or self._has_same_dicts(held))
        )

    def _has_same_dicts(self, held: Mapping[Tensor, st.State]) -> bool:
        """The same, but for plain values that a wrapper keeps there and changes in every step."""
        assert self.states is not None
        pairs = zip(held.values(), self.states.values(), strict=True)
        return all(one is other or not (isinstance(one, dict) or isinstance(other, dict)) for one, other in pairs)


def signature(options: dict[str, Any]) -> tuple[Any, ...]:
    """What a plan rests on of the options: the switches, and of two numbers whether they switch something on."""
    switches = tuple(options[name] for name in STRUCTURAL)
    return *switches, options["frequency_penalty"] > 0, options["percentile_clipping"] < 100


class FusedStep:
    """The kernels' side of `Automagic.step`."""

    def __init__(self, optimizer: ParameterGroups) -> None:
        self.optimizer: ParameterGroups = weakref.proxy(optimizer)
        """No owner of it: an optimizer that is dropped frees its states at once."""
        self._rates = auto_lr.RateFinder()
        self._plan: Plan | None = None
        self._plans_of_one: dict[Tensor, Plan] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        """On which paged states are fetched, by device."""

    def forget(self) -> None:
        """Drop what is known of where states lie; they have been replaced."""
        self._plan = None
        self._plans_of_one.clear()
        self._rates.forget_places()

    def run(self) -> list[tuple[dict[str, Any], Tensor]]:
        """Step every parameter the kernels take; the others, with their groups, are returned."""
        if self.optimizer.config.backend == "torch":
            parameters = self._everything()
            self._check(parameters)
            if any(p.grad is not None for _, p in parameters):
                self._rates.begin(self.optimizer.param_groups, self.optimizer.state, None, with_kernels=False)
            return parameters
        self._plan, rest = self._run(self._plan, None)
        if self._plan.groups is None:
            self._plan.groups = [(group, list(group["params"])) for group in self.optimizer.param_groups]
        return rest

    def note_states(self) -> None:
        """After all parameters have been stepped: those that the kernels do not take have states by now, too."""
        if self._plan is not None and self._plan.states is None:
            self._plan.states = dict(self.optimizer.state)

    def _check(self, parameters: list[tuple[dict[str, Any], Tensor]]) -> None:
        """Let what cannot be stepped fail before anything has moved: overrides, gradients, states that do not fit."""
        for group, p in parameters:
            if p.grad is not None:
                self.optimizer.effective_options(group, p)
                st.checked_gradient(p)
                st.check_shape(self.optimizer.state.get(p, {}), st.local_tensor(p))

    def run_one(self, group: dict[str, Any], p: Tensor) -> bool:
        """Step one parameter, if the kernels take it."""
        if self.optimizer.config.backend == "torch":
            self._check([(group, p)])
            self._rates.begin(self.optimizer.param_groups, self.optimizer.state, (group, p), with_kernels=False)
            return False
        if p not in self._plans_of_one and len(self._plans_of_one) >= len(self.optimizer._facts):
            self._plans_of_one.clear()  # some are of parameters that are no longer here
        plan = self._plans_of_one.get(p)
        if plan is not None and any(source.group is not group for source in plan.sources):
            plan = None
        self._plans_of_one[p], rest = self._run(plan, (group, p))
        return not rest

    def _everything(self) -> list[tuple[dict[str, Any], Tensor]]:
        return [(group, p) for group in self.optimizer.param_groups for p in group["params"]]

    def _run(
        self, plan: Plan | None, one: tuple[dict[str, Any], Tensor] | None
    ) -> tuple[Plan, list[tuple[dict[str, Any], Tensor]]]:
        """Step one parameter, or all; returns the plan for it, and what the kernels do not take."""
        options: list[dict[str, Any]] = []
        grads = None
        if plan is not None:
            options = self._options(plan)
            if plan.is_current(self.optimizer, options):
                grads = self._gradients(plan)
        if plan is None or grads is None:
            plan = self._make_plan(self._everything() if one is None else [one])
            self._rates.forget_places()
            options = self._options(plan)
            grads = self._gradients(plan)
            assert grads is not None, "a plan just made fits its gradients"
        self._check(plan.rest)
        # A step without gradients is none: trainers whose backward pass steps call it all the same.
        if any(addresses.any() for addresses, _ in grads) or any(p.grad is not None for _, p in plan.rest):
            self._rates.begin(self.optimizer.param_groups, self.optimizer.state, one, with_kernels=bool(plan.buckets))
        if plan.buckets:
            self._launch(plan, options, grads)
        return plan, plan.rest

    def _launch(
        self, plan: Plan, options: list[dict[str, Any]], grads: list[tuple[np.ndarray, list[Tensor | None]]]
    ) -> None:
        from automagic_bnb.kernels import step

        updates = zip(plan.buckets, plan.matrices, grads, strict=True)
        due = [(bucket, matrices, addresses) for bucket, matrices, (addresses, _) in updates if addresses.any()]
        tasks: list[low_rank.RankTask] = []
        ahead = iter([bucket for bucket, *_ in due if bucket.fetched])
        self._prefetch(next(ahead, None))
        for bucket, matrices, addresses in due:
            if bucket.fetched:
                self._prefetch(next(ahead, None))
            with on_device(bucket.spec.device):
                step.launch(bucket, addresses, options)
                tasks += matrices.shrink(options)
        low_rank.shrink_ranks(tasks)

    def _prefetch(self, bucket: Bucket | None) -> None:
        """Start moving the paged states of a bucket to the GPU, beside what runs there."""
        if bucket is not None:
            device = bucket.spec.device
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            # Not before the device has come so far: what is fetched too early drives out what is needed first.
            self._streams[device].wait_stream(torch.cuda.current_stream(device))
            paged.prefetch(bucket.fetched, self._streams[device])

    def _options(self, plan: Plan) -> list[dict[str, Any]]:
        """The effective options of each source, as they are now."""
        for source in plan.sources:
            config.complete_betas(source.group)
        effective = self.optimizer.effective_options
        return [s.group if s.p is None else effective(s.group, s.p) for s in plan.sources]

    def _make_plan(self, parameters: list[tuple[dict[str, Any], Tensor]]) -> Plan:
        optimizer = self.optimizer
        groups = {id(group): group for group, _ in parameters}
        spread = frozenset(key for key, group in groups.items() if len({p.device for p in group["params"]}) > 1)
        plan = Plan(overrides=bnb.overridden_ids(), spread=spread)
        members, own_sources = [], {}
        for group, p in parameters:
            if p.grad is None:
                plan.idle.append(p)
            elif not takes(st.local_tensor(p), optimizer.config.backend):
                plan.rest.append((group, p))
            elif (options := optimizer.effective_options(group, p))["auto_lr"] and id(group) in spread:
                warn_once(auto_lr.SPREAD_WARNING)
                plan.rest.append((group, p))
            else:
                overriding = None if options is group else p
                key = id(group) if overriding is None else id(p)
                if key not in own_sources:
                    own_sources[key] = len(plan.sources)
                    plan.sources.append(Source(group, overriding, signature(options)))
                member = self._member(group, p, own_sources[key], options)
                members.append((member, st.checked_gradient(p).dtype, options))
        if members:
            from automagic_bnb.kernels import tables
            from automagic_bnb.kernels.low_rank import Matrices

            plan.buckets = tables.fill_buckets(members)
            plan.matrices = [Matrices(bucket) for bucket in plan.buckets]
        return plan

    def _member(self, group: dict[str, Any], p: Tensor, source: int, options: dict[str, Any]) -> Member:
        from automagic_bnb.kernels.tables import Member

        theta = st.local_tensor(p).detach()
        st.check_shape(self.optimizer.state.get(p, {}), theta)
        state, facts = self.optimizer.prepared_state(group, p, options), self.optimizer.facts_of(p)
        return Member(
            p=p,
            state=state,
            group=group,
            source=source,
            seed=options["seed"],
            ordinal=facts.ordinal,
            is_lora=facts.counts_as_lora(options),
            sharded=st.local_tensor(p) is not p,
            rate=auto_lr.rate_tensor(group, theta.device) if options["auto_lr"] else None,
        )

    @staticmethod
    def _gradients(plan: Plan) -> list[tuple[np.ndarray, list[Tensor | None]]] | None:
        """`Bucket.gradients` of each bucket; None where the plan no longer fits."""
        found = []
        for bucket in plan.buckets:
            gradients = bucket.gradients()
            if gradients is None:
                return None
            found.append(gradients)
        return found


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current CUDA device, whatever its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
