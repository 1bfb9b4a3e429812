"""A step of parameters whose rows several processes hold: as if one process held all, in two collectives or three.

What is stepped here of each, and what the processes tell each other, is said in `sharded`; the rule is `reference`'s.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from automagic_bnb import auto_lr, estimate, low_rank, reference, sharded
from automagic_bnb import quantization as q
from automagic_bnb import state as st
from automagic_bnb.groups import Facts, Group, ParameterGroups
from automagic_bnb.scalars import Scalars, adapts_mask, step_scalars
from automagic_bnb.sharded import Edge, Shard
from automagic_bnb.sharded_kernels import ShardLaunches
from automagic_bnb.stored import Weights, has_mask

SHARES = COUNT, FACTORS, NUMERATOR, DENOMINATOR, SKIPPED, FIRST_PLACE, LAST_PLACE = range(7)
"""What a process tells of each parameter after a step; the last two are the `probe_block` of the spans at its rows'
ends, where others have blocks of one, too."""
PARTS, PLACES = slice(COUNT, DENOMINATOR + 1), slice(FIRST_PLACE, LAST_PLACE + 1)
"""What the kernels leave, in their order; and the places."""


@dataclass
class Due:
    """One parameter that is being stepped."""

    p: Tensor
    local: Tensor
    """The own rows, as torch keeps them."""
    shard: Shard
    group: Group
    options: dict[str, Any]
    facts: Facts
    state: st.State
    t: int
    """The step, not yet in the state."""
    d: Tensor | None
    edge: Edge

    @property
    def scalars(self) -> Scalars:
        """For plain PyTorch; the kernels' tables work them out for many at once."""
        return step_scalars(self.options, self.t, self.is_lora, self.key)

    @property
    def moves_mask(self) -> bool:
        return adapts_mask(self.options, self.t) and has_mask(self.state)

    @property
    def is_lora(self) -> bool:
        return self.facts.counts_as_lora(self.options)

    @property
    def key(self) -> int:
        """Of its random bits."""
        return self.facts.random_key(self.options)

    @property
    def stride(self) -> int:
        """auto_lr watches one of so many blocks."""
        return self.facts.probe_stride

    @property
    def claims(self) -> list[tuple[int, list[tuple[int, int]]]]:
        return self.shard.claims(self.stride)

    @property
    def weights(self) -> Weights:
        """Of the own rows."""
        local, residual = self.local.detach(), self.state.get("master_residual")
        residual = None if residual is None else residual[self.shard.inside]
        return Weights(local, residual, st.rounds_stochastically(local, self.options))


def step(
    optimizer: ParameterGroups,
    parameters: Iterable[tuple[Group, Tensor]],
    grad_scale: Tensor | None,
    launches: ShardLaunches,
    takes: Callable[[Tensor, str | None], bool],
) -> list[low_rank.RankTask]:
    """Step parameters of which `sharded.shard_of` finds a shard; returns the low-rank steps that are due.

    Collective: all processes call it with the same parameters, in one order.

    Args:
        grad_scale: float32 with one element, over which the gradients are to be taken.
        launches: of the kernels, for the parameters of which `takes` says that these step them.
    """
    together: dict[Any, list[Due]] = {}
    effective: dict[Any, dict[str, Any]] = {}  # the launches have one row for each of these
    for group, p in parameters:
        source = optimizer.source_of(group, p)
        if source not in effective:
            effective[source] = optimizer.effective_options(group, p)
        due = _prepared(optimizer, group, p, effective[source], grad_scale)
        together.setdefault(due.shard.group, []).append(due)
    tasks = []
    for dues in together.values():
        sharded.exchange([due.edge for due in dues])
        chosen = [due for due in dues if due.shard.window and takes(due.local, optimizer.config.backend)]
        shares = {} if not chosen else _launched(chosen, launches)
        _settle(dues, torch.stack([shares[id(due.p)] if id(due.p) in shares else _update(due) for due in dues]))
        tasks += _rank_tasks([due for due in dues if low_rank.is_due(due.p, due.state, due.options, due.is_lora)])
    return tasks


def _prepared(
    optimizer: ParameterGroups, group: Group, p: Tensor, options: dict[str, Any], grad_scale: Tensor | None
) -> Due:
    shard, local, grad = sharded.shard_of(p), st.local_tensor(p), st.checked_gradient(p)
    assert shard is not None
    if grad_scale is not None:
        grad = grad.float() * grad_scale.to(grad.device).reciprocal()
    facts, state = optimizer.facts_of(p), optimizer.prepared_state(group, p, options)
    st.check_shape(state, local, shard.window_shape)
    # The Laplacian of a matrix needs the rows on either side. With more dimensions each row holds whole slices.
    beside = int(p.dim() == 2 and reference.is_spatial(p, options))
    norm = None
    if options["percentile_clipping"] < 100:
        norm = reference.usable(grad)[0].square().sum()
    return Due(
        p=p,
        local=local,
        shard=shard,
        group=group,
        options=options,
        facts=facts,
        state=state,
        t=state["step"] + 1,
        d=auto_lr.rate_tensor(group, grad.device).to(grad.device) if options["auto_lr"] else None,
        edge=Edge(shard, grad.contiguous(), beside, norm),
    )


def _launched(dues: list[Due], launches: ShardLaunches) -> dict[int, Tensor]:
    """The main update by the kernels; returns this process's `SHARES`, float64, by id of the parameter."""
    found = {}
    by_parameter = {id(due.p): due for due in dues}
    for sums in launches.step(dues):
        mine = [by_parameter[id(p)] for p in sums.parameters]
        shares = torch.zeros((len(mine), len(SHARES)), dtype=torch.float64, device=sums.skipped.device)
        shares[:, SKIPPED] = sums.skipped
        if sums.parts is not None:
            shares[:, PARTS] = sums.parts
        if mine[0].d is not None and any(due.claims for due in mine):
            ends = [due.state["probe_block"][end] for due in mine for end in (0, -1)]
            shares[:, PLACES] = torch.stack(ends).view(-1, 2)
        found |= {id(due.p): row for due, row in zip(mine, shares.unbind(), strict=True)}
    return found


def _update(due: Due) -> Tensor:
    """The main update in plain PyTorch; returns this process's `SHARES`, float64."""
    shard, state, options = due.shard, due.state, due.options
    st.set_uncounted(state, "step", due.t)
    local = due.local.detach()
    shares = torch.zeros(len(SHARES), dtype=torch.float64, device=local.device)
    norm = None if due.edge.norm is None else due.edge.norm.sqrt()
    if not shard.window:
        if norm is not None:
            reference.clip_scale(norm, state["gnorm_vec"], state["step"], options["percentile_clipping"])
        return shares
    theta = local.contiguous()
    if shard.shares_tiles:  # of others' rows nobody reads what becomes of the weights
        theta = theta.new_zeros(shard.like_window().shape)
        theta[shard.inside] = local
    needed, window = shard.layout.needed(shard.rank, due.edge.beside), shard.window
    part = reference.Part(
        whole=due.p,
        start=shard.start,
        rows=slice(window.start - needed.start, window.stop - needed.start),
        own=shard.mask_of_own(local.device),
        norm=norm,
    )
    watch = None
    if due.d is not None:
        watch = functools.partial(estimate.watch, state=state, watched_here=_watched(due, part.own))
    reference.update_parameter(theta, due.edge.gradient(), state, options, due.scalars, due.d, watch, part)
    if shard.shares_tiles:
        local.copy_(theta[shard.inside])
    elif theta is not local:
        local.copy_(theta)
    assert part.skipped is not None
    shares[SKIPPED] = part.skipped
    if part.factors is not None:
        shares[FACTORS], shares[COUNT] = part.factors
    if due.d is not None:
        shares[NUMERATOR] = state["tensor_stats"][st.LR_NUMERATOR]
        shares[DENOMINATOR] = state["tensor_stats"][st.LR_DENOMINATOR]
        if due.claims:
            shares[FIRST_PLACE], shares[LAST_PLACE] = state["probe_block"][0], state["probe_block"][-1]
    return shares


def _watched(due: Due, own: Tensor) -> estimate.Watched:
    shard, stride = due.shard, due.facts.probe_stride
    blocks, first = shard.blocks(), shard.start // q.BLOCK
    rows = slice(blocks.start - first, blocks.stop - first)
    return estimate.Watched(rows, blocks.start - shard.spans(stride).start * stride, stride, own[rows])


def _settle(dues: list[Due], shares: Tensor) -> None:
    """Put what all processes' shares come to into `tensor_stats`, and agree on what auto_lr watches.

    Args:
        shares: float64 [dues, SHARES], this process's.
    """
    by_rank = sharded.gathered(shares, dues[0].shard)
    sums = by_rank.sum(dim=0)
    held = [due.state["tensor_stats"] for due in dues]
    old = torch.stack(held)
    moves = _flags(tuple(due.moves_mask for due in dues), old.device)
    finds = _flags(tuple(due.d is not None for due in dues), old.device)
    new = old.clone()
    new[:, st.SKIPPED] += sums[:, SKIPPED]
    mean = (sums[:, FACTORS] / sums[:, COUNT].clamp_min(1)).to(old.dtype)
    new[:, st.MASK_MEAN] = torch.where(moves & (sums[:, COUNT] > 0), mean, old[:, st.MASK_MEAN])
    for column, share in ((st.LR_NUMERATOR, NUMERATOR), (st.LR_DENOMINATOR, DENOMINATOR)):
        new[:, column] = torch.where(finds, sums[:, share].to(old.dtype), old[:, column])
    torch._foreach_copy_(held, list(new.unbind()))  # type: ignore[attr-defined]
    _agree_on_places(dues, by_rank)


@functools.lru_cache(maxsize=64)
def _flags(values: tuple[bool, ...], device: torch.device) -> Tensor:
    """Uploaded once: they stay the same from step to step."""
    return torch.tensor(values).to(device)


@functools.lru_cache(maxsize=64)
def _indices(values: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    return torch.tensor(values).to(device)


def _agree_on_places(dues: list[Due], by_rank: Tensor) -> None:
    """Of a span in which several processes have blocks, the lowest claim counts, as in one process.

    Args:
        by_rank: [world, dues, SHARES].
    """
    places, told = [], []
    for row, due in enumerate(dues):
        for place, claims in due.claims if due.d is not None else ():
            places.append(due.state["probe_block"][place])
            told.append([(rank * len(dues) + row) * len(SHARES) + FIRST_PLACE + end for rank, end in claims])
    if places:
        most = max(map(len, told))
        filled = tuple(tuple(of_span + of_span[:1] * (most - len(of_span))) for of_span in told)
        lowest = by_rank.view(-1)[_indices(filled, by_rank.device)].amin(dim=1)
        torch._foreach_copy_(places, list(lowest.to(places[0].dtype).unbind()))  # type: ignore[attr-defined]


# --- step 9 -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GatheredWeights(Weights):
    """A matrix as all processes read it, of which each writes the own rows; `p` has its shape only."""

    values: Tensor
    """float32."""
    own: Weights
    first: int
    """The flat index of the first own element."""

    def read(self) -> Tensor:
        return self.values

    def write(self, values: Tensor, bits: Tensor | None, keep: Tensor | None = None) -> None:
        mine = slice(self.first, self.first + self.own.p.numel())
        bits = bits.reshape(-1)[mine] if bits is not None and self.own.stochastic else None
        self.own.write(values.reshape(-1)[mine], bits)


def _rank_tasks(dues: list[Due]) -> list[low_rank.RankTask]:
    """Collective, where any is due."""
    if not dues:
        return []
    sent = []
    for due in dues:
        mine, most = due.weights.read().reshape(-1), len(due.shard.layout.share(0)) * due.shard.layout.columns
        sent.append(torch.nn.functional.pad(mine, (0, most - mine.numel())))
    everyones = sharded.gathered(torch.cat(sent), dues[0].shard).split([len(x) for x in sent], dim=1)
    tasks = []
    for due, values in zip(dues, everyones, strict=True):
        layout, own = due.shard.layout, due.weights
        # Only the last shares are shorter: what fills them up comes behind the last row.
        whole = values.reshape(-1)[: due.p.numel()].view(layout.shape)
        stand_in = own.p.new_empty(1, 1).expand(layout.shape)
        weights = GatheredWeights(stand_in, None, own.stochastic, whole, own, due.shard.own.start * layout.columns)
        tasks.append(low_rank.rank_task(weights, due.state, due.options, due.facts.random_key(due.options), due.d))
    return tasks
