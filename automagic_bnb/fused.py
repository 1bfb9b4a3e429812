"""Driving the Triton kernels by a plan that is kept from step to step.

It holds the buckets of pointer tables, and is made anew when anything it rests on has moved: a parameter's or a state's
memory, a gradient's dtype, an option, an override.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from automagic_bnb import auto_lr, bnb, config, direction, estimate, low_rank, paged, sharded
from automagic_bnb import state as st
from automagic_bnb.backends import NOT_OURS, runs_on
from automagic_bnb.groups import ParameterGroups
from automagic_bnb.notices import warn_once
from automagic_bnb.plan import Plan, Source
from automagic_bnb.sharded_kernels import ShardLaunches
from automagic_bnb.structure import signature
from automagic_bnb.uncompiled import capturing

if TYPE_CHECKING:
    from automagic_bnb.kernels.tables import Bucket, Gradients, Member

NOT_YET_CAPTURED = (
    "capturable=True: take a step outside of the CUDA graph before each capture, with the same parameters having "
    "gradients; it makes the states and tables that the graph's replays use"
)
NOT_IN_A_CAPTURE = (
    "a CUDA graph cannot capture this step: some of it runs in plain PyTorch (strided parameters, backend='torch'), "
    "or its states are paged"
)
STALE_GRAPH = (
    "what a captured CUDA graph rests on has been replaced (by a checkpoint, or as an option or a parameter changed); "
    "its replays no longer move this optimizer; capture it again"
)


def check_capture(groups: list[dict[str, Any]]) -> None:
    """Raise RuntimeError where a graph is captured that would replay one step's number and random bits for ever."""
    if capturing() and not all(group["capturable"] for group in groups):
        raise RuntimeError(
            "option capturable=False: a CUDA graph is being captured, in whose replays what the host counts would "
            "stand still; pass capturable=True, or call step() outside of the graph"
        )


@dataclass(frozen=True)
class Scaler:
    """What torch's GradScaler leaves for a step that scales by itself: float32 tensors of one element, or None."""

    grad_scale: Tensor | None
    found_inf: Tensor | None

    @classmethod
    def of(cls, optimizer: Any) -> Scaler:
        return cls(getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None))

    def on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Both on a device; nothing waits."""
        scale, found = self.grad_scale, self.found_inf
        return (
            None if scale is None else scale.to(device, non_blocking=True),
            None if found is None else found.to(device, non_blocking=True),
        )

    def found(self) -> bool:
        """Whether a gradient is not finite; waits for the device."""
        return self.found_inf is not None and bool(self.found_inf)


NO_SCALER = Scaler(None, None)


class FusedStep:
    """The kernels' side of `Automagic.step`."""

    def __init__(self, optimizer: ParameterGroups) -> None:
        self.optimizer: ParameterGroups = weakref.proxy(optimizer)
        """No owner of it: an optimizer that is dropped frees its states at once."""
        self._rates = auto_lr.RateFinder(partial(_distance_share, self.optimizer))
        self._kernels: Any = None
        """The module `kernels.step`, once there are buckets; to import it in each step takes a microsecond."""
        self._plan: Plan | None = None
        self._plans_of_one: dict[Tensor, Plan] = {}
        self.shards = ShardLaunches()
        self._captured: list[Plan] = []
        """Those that replays of captured graphs rest on."""
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        """On which paged states are fetched, by device."""

    def forget(self) -> None:
        """Drop what is known of where states lie; they have been replaced, or are about to be."""
        self.settle()
        if self._captured:
            warn_once(STALE_GRAPH)
        self._plan = None
        self._plans_of_one.clear()
        self.shards.forget()
        self._rates.forget_places()

    def settle(self) -> None:
        """Bring up to date what the host keeps of what is counted on the device; only then it is waited for."""
        for plan in (self._plan, *self._plans_of_one.values()):
            for counts in plan.counts if plan is not None else ():
                if counts is not None:
                    counts.settle()
        self._rates.settle()

    def run(self, scaler: Scaler) -> list[tuple[dict[str, Any], Tensor]]:
        """Step every parameter the kernels take; the others, with their groups, are returned."""
        if self.optimizer.config.backend in NOT_OURS:
            if capturing():
                raise RuntimeError(NOT_IN_A_CAPTURE)
            parameters = self._everything()
            self._check(parameters)
            if scaler.found():
                return []
            if any(p.grad is not None for _, p in parameters):
                self._rates.begin(self.optimizer.param_groups, self.optimizer.state, None, frozenset())
            return parameters
        if any(counts for plan in self._plans_of_one.values() for counts in plan.counts):
            self.forget()  # two counts of one tensor would go apart
        self._plan, rest = self._run(self._plan, None, scaler)
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
                options = self.optimizer.effective_options(group, p)
                direction.check(p, options, self.optimizer.facts_of(p).counts_as_lora(options))
                st.checked_gradient(p)
                shard = sharded.shard_of(p)
                shape = None if shard is None else shard.window_shape
                st.check_shape(self.optimizer.state.get(p, {}), st.local_tensor(p), shape)

    def run_one(self, group: dict[str, Any], p: Tensor) -> bool:
        """Step one parameter, if the kernels take it."""
        if self.optimizer.config.backend in NOT_OURS:
            self._check([(group, p)])
            self._rates.begin(self.optimizer.param_groups, self.optimizer.state, (group, p), frozenset())
            return False
        if self._plan is not None and any(self._plan.counts):
            self.forget()
        known = self._plans_of_one.get(p)
        if known is None and len(self._plans_of_one) >= len(self.optimizer._facts):
            self.settle()
            self._plans_of_one.clear()  # some are of parameters that are no longer here
        plan = known
        if plan is not None and plan.sources and plan.sources[0].group is not group:
            self._retire(plan)
            plan = None
        plan, rest = self._run(plan, (group, p), NO_SCALER)
        if plan is not known:
            self._plans_of_one[p] = plan
        return not rest

    def _everything(self) -> list[tuple[dict[str, Any], Tensor]]:
        return [(group, p) for group in self.optimizer.param_groups for p in group["params"]]

    def _run(
        self, plan: Plan | None, one: tuple[dict[str, Any], Tensor] | None, scaler: Scaler
    ) -> tuple[Plan, list[tuple[dict[str, Any], Tensor]]]:
        """Step one parameter, or all; returns the plan for it, and what the kernels do not take."""
        options: list[dict[str, Any]] = []
        grads = None
        if plan is not None:
            options = self._options(plan)
            if plan.is_current(self.optimizer, options):
                grads = self._gradients(plan)
        if plan is None or grads is None:
            plan, options, grads = self._made_anew(plan, one)
        left = False
        if plan.rest:
            self._check(plan.rest)
            left = any(p.grad is not None for _, p in plan.rest)
        if capturing():
            self._check_captured(plan, left)
        if left and scaler.found():
            return plan, []
        # A step without gradients is none: trainers whose backward pass steps call it all the same.
        if left or any(map(_has_some, grads)):
            found_inf = None if left else scaler.found_inf
            groups, held = self.optimizer.param_groups, self.optimizer.state
            self._rates.begin(groups, held, one, plan.kernels_on, found_inf=found_inf)
            if any([own["auto_lr"] for own in options]):  # noqa: C419 (as in `Plan.is_current`)
                options = self._options(plan)  # with what that has written into the groups
        stepped: set[int] = set()
        while plan.buckets and not self._launch(plan, options, grads, scaler, stepped):
            plan, options, grads = self._made_anew(plan, one)
        return plan, plan.rest

    def _made_anew(
        self, plan: Plan | None, one: tuple[dict[str, Any], Tensor] | None
    ) -> tuple[Plan, list[dict[str, Any]], list[Gradients]]:
        """A plan in place of one that no longer fits, with its sources' options and its buckets' gradients."""
        if capturing():
            raise RuntimeError(NOT_YET_CAPTURED)
        self._retire(plan)
        plan = self._make_plan(self._everything() if one is None else [one])
        self._rates.forget_places()
        grads = self._gradients(plan)
        assert grads is not None, "a plan just made fits its gradients"
        return plan, self._options(plan), grads

    def _retire(self, plan: Plan | None) -> None:
        """A plan is about to be replaced: the states say all that it counted."""
        for counts in plan.counts if plan is not None else ():
            if counts is not None:
                counts.settle()
        if any(plan is captured for captured in self._captured):
            warn_once(STALE_GRAPH)

    def _check_captured(self, plan: Plan, left: bool) -> None:
        """Raise RuntimeError where the plan's launches cannot stand in a graph; else it lives as long as the graph."""
        tensors = [group["lr"] for group in self.optimizer.param_groups if isinstance(group["lr"], Tensor)]
        if left or any(bucket.fetched for bucket in plan.buckets):
            raise RuntimeError(NOT_IN_A_CAPTURE)
        if any(lr.device != bucket.spec.device for lr in tensors for bucket in plan.buckets):
            raise RuntimeError("lr is a tensor on another device than the parameters, which a CUDA graph cannot read")
        if not any(plan is captured for captured in self._captured):
            self._captured.append(plan)
        self._rates.hold()

    def _launch(
        self,
        plan: Plan,
        options: list[dict[str, Any]],
        grads: list[Gradients],
        scaler: Scaler,
        stepped: set[int],
    ) -> bool:
        """Launch bucket after bucket, each as soon as its addresses are known: the device works on one while the host
        prepares the next.

        Args:
            stepped: ids of parameters that are left out; where memory of a bucket has been exchanged, those of the
                buckets before it are added.

        Returns:
            False where that is so; a plan made anew then takes the rest.
        """
        updates = zip(plan.buckets, plan.matrices, plan.counts, grads, strict=True)
        due, done = [update for update in updates if _has_some(update[-1])], 0
        ahead = iter([bucket for bucket, *_ in due if bucket.fetched] if plan.is_paged else ())
        self._prefetch(next(ahead, None))
        try:
            for bucket, matrices, counts, of_bucket in due:
                if not bucket.is_in_place():
                    break
                if bucket.fetched:
                    self._prefetch(next(ahead, None))
                addresses = bucket.addresses(of_bucket, stepped)
                with on_device(bucket.spec.device):
                    if counts is None:
                        self._kernels.launch(bucket, addresses, options)
                        done += 1
                        matrices.shrink(options)
                    else:
                        self._kernels.launch(bucket, addresses, options, counts, *scaler.on(bucket.spec.device))
                        done += 1
                        counts.shrink()
        finally:
            for bucket, _, counts, _ in due[:done]:  # while the device works
                if counts is None:
                    bucket.count()
        if plan.is_left:
            called = [matrices for _, matrices, counts, _ in due[:done] if counts is None]
            low_rank.shrink_ranks([task for matrices in called for task in matrices.tasks(options)])
        if done == len(due):
            return True
        stepped.update(id(p) for bucket, *_ in due[:done] for p in bucket.parameters)
        return False

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
        options = []
        for source in plan.sources:
            group, p = source.group, source.p
            config.complete_betas(group)
            options.append(group if p is None else self.optimizer.effective_options(group, p))
        return options

    def _make_plan(self, parameters: list[tuple[dict[str, Any], Tensor]]) -> Plan:
        optimizer = self.optimizer
        plan = Plan(overrides=bnb.overridden_ids())
        members, own_sources, kernels_on = [], {}, set()
        for group, p in parameters:
            if p.grad is None:
                plan.idle.append(p)
            elif not plan.would_take(p, optimizer.config.backend):
                plan.rest.append((group, p))
                device = st.local_tensor(p).device
                # Asked of the device alone: a process without rows is to find the rate as the others do.
                if sharded.shard_of(p) is not None and runs_on(device, optimizer.config.backend):
                    kernels_on.add(device.type)
            else:
                options = optimizer.effective_options(group, p)
                key = optimizer.source_of(group, p)
                if key not in own_sources:
                    own_sources[key] = len(plan.sources)
                    plan.sources.append(Source(group, None if options is group else p, signature(options)))
                member = self._member(group, p, own_sources[key], options)
                members.append((member, st.checked_gradient(p).dtype, options))
                kernels_on.add(member.theta.device.type)
        plan.kernels_on = frozenset(kernels_on)
        if members:
            from automagic_bnb.kernels import step, tables
            from automagic_bnb.kernels.low_rank import Matrices
            from automagic_bnb.kernels.numbers import Counts

            self._kernels = step
            plan.buckets = tables.fill_buckets(members)
            plan.is_paged = any(bucket.fetched for bucket in plan.buckets)
            plan.matrices = [Matrices(bucket) for bucket in plan.buckets]
            plan.is_left = any(matrices.left for matrices in plan.matrices)
            sources = self._options(plan)
            plan.counts = [
                Counts(bucket, matrices, sources) if bucket.spec.counts else None
                for bucket, matrices in zip(plan.buckets, plan.matrices, strict=True)
            ]
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
            key=facts.random_key(options),
            is_lora=facts.counts_as_lora(options),
            sharded=st.local_tensor(p) is not p,
            rate=self._rates.rate_on(group, theta.device) if options["auto_lr"] else None,
        )

    @staticmethod
    def _gradients(plan: Plan) -> list[Gradients] | None:
        """`Bucket.gradients` of each bucket; None where the plan no longer fits."""
        found = []
        for bucket in plan.buckets:
            gradients = bucket.gradients()
            if gradients is None:
                return None
            found.append(gradients)
        return found


def _distance_share(optimizer: ParameterGroups, group: dict[str, Any], p: Tensor) -> float:
    options = optimizer.effective_options(group, p)
    turned = direction.is_directed(p, options, optimizer.facts_of(p).counts_as_lora(options))
    return estimate.TURNED_SHARE if turned else 1.0


def _has_some(grads: Gradients) -> bool:
    return grads[0] is not None or any(grad is not None for grad in grads)


_HERE = nullcontext()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current CUDA device, whatever its arguments are on."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return _HERE
