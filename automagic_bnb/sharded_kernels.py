"""The kernels over parameters whose rows several processes hold: each steps whole tiles, at their places in the whole.

A launch is told where the whole tensor would begin, so that random bits, neighbours and tiles are the whole's; what is
summed over the whole it leaves as this process's share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from automagic_bnb import reference
from automagic_bnb import state as st
from automagic_bnb.sharded import Edge, Shard
from automagic_bnb.structure import signature

if TYPE_CHECKING:
    from automagic_bnb.kernels.tables import Bucket, Member


class Due(Protocol):
    """What is asked of one parameter: see `sharded_step.Due`."""

    @property
    def p(self) -> Tensor: ...
    @property
    def shard(self) -> Shard: ...
    @property
    def group(self) -> dict[str, Any]: ...
    @property
    def options(self) -> dict[str, Any]: ...
    @property
    def state(self) -> st.State: ...
    @property
    def t(self) -> int: ...
    @property
    def d(self) -> Tensor | None: ...
    @property
    def edge(self) -> Edge: ...
    @property
    def key(self) -> int: ...
    @property
    def is_lora(self) -> bool: ...
    @property
    def stride(self) -> int: ...


@dataclass
class Sums:
    """What launches have left of some parameters, and whose it is."""

    parameters: list[Tensor]
    skipped: Tensor
    """float32 [parameters]."""
    parts: Tensor | None
    """float32 [parameters, 4]: the elements with a gradient, Σ 2^(k/16) over these, and auto_lr's two sums; None where
    nobody asks."""


class ShardLaunches:
    """The buckets that were launched last; made anew when what they rest on has changed."""

    def __init__(self) -> None:
        self._buckets: list[Bucket] = []
        self._key: list[Any] = []

    def forget(self) -> None:
        """Drop the buckets, and with them what they hold of states."""
        self._buckets, self._key = [], []

    def step(self, dues: Sequence[Due]) -> list[Sums]:
        """Launch the main update of these parameters, whose gradients have been exchanged."""
        from automagic_bnb.kernels import step

        options = {id(due.options): due.options for due in dues}
        sources = list(options.values())
        self._make_current(dues, {key: number for number, key in enumerate(options)}, sources)
        by_parameter = {id(due.p): due for due in dues}
        left = []
        for bucket in self._buckets:
            mine = [by_parameter[id(p)] for p in bucket.parameters]
            grads = [due.edge.gradient().contiguous() for due in mine]
            bucket.skips.zero_()
            with torch.cuda.device_of(grads[0]):  # Triton launches on the current device
                parts = step.launch(bucket, _addresses(mine, grads), sources, clips=_clips(mine))
            bucket.count()
            left.append(Sums([due.p for due in mine], bucket.skips, parts))
        return left

    def _make_current(self, dues: Sequence[Due], numbers: dict[int, int], sources: list[dict[str, Any]]) -> None:
        from automagic_bnb.kernels import tables

        signatures = list(map(signature, sources))
        places = [numbers[id(due.options)] for due in dues]
        key = [
            (id(due.p), id(due.state), due.edge.grad.dtype, place, signatures[place])
            for due, place in zip(dues, places, strict=True)
        ]
        fits = self._key == key and all(b.fits(sources) and b.is_in_place() for b in self._buckets)
        if not fits:
            members = [
                (_member(due, place), due.edge.grad.dtype, due.options) for due, place in zip(dues, places, strict=True)
            ]
            self._buckets, self._key = tables.fill_buckets(members), key


def _member(due: Due, source: int) -> Member:
    from automagic_bnb.kernels.tables import Member

    stretch = due.shard.stretch(due.stride)
    return Member(due.p, due.state, due.group, source, due.key, due.is_lora, True, due.d, stretch)


def _addresses(dues: list[Due], grads: list[Tensor]) -> np.ndarray:
    """int64, where the whole gradients would begin of which these are the rows needed."""
    found = []
    for due, grad in zip(dues, grads, strict=True):
        layout = due.shard.layout
        before = layout.needed(due.shard.rank, due.edge.beside).start * layout.columns
        found.append(grad.data_ptr() - before * grad.element_size())
    return np.array(found, dtype=np.int64)


def _clips(dues: list[Due]) -> Tensor | None:
    """percentile_clipping's factors, float32 [parameters, 2], from the norms of the whole gradients."""
    if dues[0].options["percentile_clipping"] == 100:
        return None
    factors = []
    for due in dues:
        assert due.edge.norm is not None
        norm, percentile = due.edge.norm.sqrt(), due.options["percentile_clipping"]
        factors.append(reference.clip_scale(norm, due.state["gnorm_vec"], due.t, percentile))
    scale = torch.stack(factors)
    return torch.stack([scale, torch.full_like(scale, reference.MAX_GRADIENT)], dim=1)
