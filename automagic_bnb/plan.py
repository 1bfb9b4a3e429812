"""What the kernels' launches rest on, kept from step to step, and how it is told that something of it has moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import is_
from typing import TYPE_CHECKING, Any

from torch import Tensor

from automagic_bnb import bnb, sharded
from automagic_bnb import state as st
from automagic_bnb.backends import takes
from automagic_bnb.groups import ParameterGroups
from automagic_bnb.structure import signature

if TYPE_CHECKING:
    from automagic_bnb.kernels.low_rank import Matrices
    from automagic_bnb.kernels.numbers import Counts
    from automagic_bnb.kernels.tables import Bucket


@dataclass
class Source:
    """Where a member's options come from: `ParameterGroups.source_of`."""

    group: dict[str, Any]
    p: Tensor | None
    """Whose options they are: of the parameter with an override, or of any of those that share a copy; None where the
    group's options apply as they are."""
    signature: tuple[Any, ...]


@dataclass
class Plan:
    """The buckets of pointer tables, and all that they rest on."""

    buckets: list[Bucket] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    matrices: list[Matrices] = field(default_factory=list)
    """Of each bucket, what step 9 works on."""
    counts: list[Counts | None] = field(default_factory=list)
    """Of each bucket, its steps where they are counted on the device."""
    kernels_on: frozenset[str] = frozenset()
    """The types of devices that buckets are on, and shards that the kernels step."""
    is_paged: bool = False
    """Whether some bucket's states have to be fetched."""
    is_left: bool = False
    """Whether step 9 of some matrix is not the kernel's."""
    idle: list[Tensor] = field(default_factory=list)
    """Parameters that had no gradient when the plan was made."""
    rest: list[tuple[dict[str, Any], Tensor]] = field(default_factory=list)
    """Parameters that the plan's launches leave: to plain PyTorch, or to those of shards."""
    overrides: tuple[int, ...] = ()
    groups: list[tuple[dict[str, Any], list[Tensor]]] | None = None
    """Each group, and the parameters in it, which wrappers may exchange; None in the plan of a single parameter."""
    states: dict[Tensor, st.State] | None = None
    """All that the optimizer held after the step for which the plan was made; None until then."""

    def is_current(self, optimizer: ParameterGroups, options: list[dict[str, Any]]) -> bool:
        """Whether all still stands that the plan rests on, but for addresses: `Bucket.is_in_place`."""
        return (
            (self.groups is None or self._has_groups(self.groups, optimizer.param_groups))
            and self._has_states(optimizer.state)
            and self.overrides == bnb.overridden_ids()
            and [source.signature for source in self.sources] == list(map(signature, options))
            and not (self.idle and any(p.grad is not None for p in self.idle))
            and not (self.rest and any(self.would_take(p, optimizer.config.backend) for _, p in self.rest))
            and all([bucket.fits(options) for bucket in self.buckets])  # noqa: C419 (a generator takes longer)
        )

    @staticmethod
    def would_take(p: Tensor, backend: str | None) -> bool:
        """Whether a plan's launches move this parameter."""
        return sharded.shard_of(p) is None and takes(st.local_tensor(p), backend)

    @staticmethod
    def _has_groups(held: list[tuple[dict[str, Any], list[Tensor]]], groups: list[dict[str, Any]]) -> bool:
        return len(groups) == len(held) and all(
            group is known and len(group["params"]) == len(parameters) and all(map(is_, group["params"], parameters))
            for group, (known, parameters) in zip(groups, held, strict=True)
        )

    def _has_states(self, held: Mapping[Tensor, st.State]) -> bool:
        """Whether each parameter's state is still the same dictionary; what is in it is for the buckets to see."""
        if self.groups is None:
            same = [all(map(is_, map(held.get, bucket.parameters), bucket.states)) for bucket in self.buckets]
            return all(same)
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
