"""Parameters whose rows several processes hold (FSDP2's `fully_shard`): who steps what, and what they tell each other.

A process steps whole tiles, and with them whole blocks: those that its rows touch. The rows of others among them it
steps as well, all but their weights. What a state becomes follows from gradients and random bits alone, so it becomes
the same here as there, bit for bit, and a statistic of a block or a tile needs nobody else. Two collectives remain:

- before a step, the gradients of the others' rows, one row more on either side for the Laplacian, and the shares of the
  gradients' norms (percentile_clipping); left out where no parameter needs any of it;
- after it, the shares of what is summed over whole tensors: the mean of the mask, skipped elements, auto_lr's sums.

Each packs all parameters that are stepped together. Every 10th step a third gathers the LoRA matrices that are due.
Checkpoints hold whole tensors (as DTensors), which know nothing of tiles and processes: `Shard.saved`, `Shard.part_of`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from automagic_bnb import state as st
from automagic_bnb.factored import Tiling
from automagic_bnb.quantization import BLOCK


@dataclass(frozen=True)
class Layout:
    """Which rows of a parameter, along its first dimension, belong to which of `world` processes."""

    shape: tuple[int, ...]
    world: int

    @cached_property
    def columns(self) -> int:
        """Elements of a row."""
        return math.prod(self.shape[1:])

    @cached_property
    def tiling(self) -> Tiling:
        return Tiling.of(torch.empty(self.shape, device="meta"))

    @cached_property
    def period(self) -> int:
        """Rows after which rows and blocks begin together again."""
        return math.lcm(self.columns, BLOCK) // max(self.columns, 1)

    @cached_property
    def unit(self) -> int:
        """Rows after which tiles begin together, too."""
        return self.period * self.tiling.height

    def share(self, rank: int, length: int | None = None) -> range:
        """The rows that a process holds, as torch cuts a dimension of this length; by default the parameter's first."""
        length = self.shape[0] if length is None else length
        each = -(-length // self.world)
        return range(min(rank * each, length), min((rank + 1) * each, length))

    def window(self, rank: int) -> range:
        """The rows that a process steps: its own, filled up to whole tiles; none where it has none."""
        return self._windows[rank]

    @cached_property
    def _windows(self) -> list[range]:
        return [self._window(rank) for rank in range(self.world)]

    def _window(self, rank: int) -> range:
        own, rows = self.share(rank), self.shape[0]
        if not own or not self.columns:
            return range(0)
        first, last = own.start // self.unit, -(-own.stop // self.unit)
        # A rest shorter than a period has fewer strips, so its tiles would be numbered otherwise: it joins the part
        # before.
        if first and rows - first * self.unit < self.period:
            first -= 1
        stop = last * self.unit
        return range(first * self.unit, stop if rows - stop >= self.period else rows)

    def needed(self, rank: int, beside: int) -> range:
        """The rows whose gradients a process reads: its window, and so many rows on either side."""
        window = self.window(rank)
        if not window:
            return window
        return range(max(window.start - beside, 0), min(window.stop + beside, self.shape[0]))

    def is_closed(self, beside: int) -> bool:
        """Whether no process needs another's gradients."""
        return not any(self.wanted(rank, beside) for rank in range(self.world))

    def wanted(self, rank: int, beside: int) -> list[tuple[int, range]]:
        """Other processes whose gradients one reads, in their order, and which rows."""
        if (rank, beside) not in self._wanted:
            needed, others = self.needed(rank, beside), (other for other in range(self.world) if other != rank)
            rows = ((other, overlap(needed, self.share(other))) for other in others)
            self._wanted[rank, beside] = [(other, of_other) for other, of_other in rows if of_other]
        return self._wanted[rank, beside]

    @cached_property
    def _wanted(self) -> dict[tuple[int, int], list[tuple[int, range]]]:
        return {}

    def begun(self, rank: int, size: int) -> range:
        """Of the pieces of so many elements that the parameter is cut into, those that begin in this process's rows."""
        own = self.share(rank)
        return range(-(-own.start * self.columns // size), -(-own.stop * self.columns // size))

    def touched(self, rank: int, size: int) -> range:
        """Those that have an element in this process's rows."""
        own = self.share(rank)
        return range(own.start * self.columns // size, -(-own.stop * self.columns // size) if own else 0)


@functools.lru_cache(maxsize=4096)
def layout(shape: tuple[int, ...], world: int) -> Layout:
    return Layout(shape, world)


def overlap(one: range, other: range) -> range:
    return range(max(one.start, other.start), max(min(one.stop, other.stop), max(one.start, other.start)))


@dataclass(frozen=True)
class Shard:
    """One process's part of a DTensor that is cut along its first dimension."""

    p: Any
    """The DTensor."""
    mesh_dim: int
    """Of its mesh, along which it is cut."""
    layout: Layout
    rank: int

    @property
    def group(self) -> dist.ProcessGroup:
        return self.p.device_mesh.get_group(self.mesh_dim)

    @property
    def own(self) -> range:
        return self.layout.share(self.rank)

    @property
    def window(self) -> range:
        return self.layout.window(self.rank)

    @property
    def start(self) -> int:
        """The flat index of the first element that is stepped here."""
        return self.window.start * self.layout.columns

    def stretch(self, stride: int) -> Stretch:
        """For the kernels; `stride` is auto_lr's."""
        return Stretch(self, stride)

    @property
    def inside(self) -> slice:
        """The own rows within the window."""
        return slice(self.own.start - self.window.start, self.own.stop - self.window.start)

    @property
    def shares_tiles(self) -> bool:
        """Whether others' rows are stepped here, too."""
        return self.own != self.window

    @property
    def window_shape(self) -> torch.Size:
        return torch.Size((len(self.window), *self.layout.shape[1:]))

    def like_window(self) -> Tensor:
        """To make states by: of the window's shape and the parameter's dtype and device, without memory of its own."""
        local, shape = st.local_tensor(self.p).detach(), self.window_shape
        return local.new_empty((1,) * len(shape)).expand(shape)

    def mask_of_own(self, device: torch.device) -> Tensor:
        """bool [blocks, 256] of the window: which elements lie in the own rows."""
        columns, own = self.layout.columns, self.inside
        elements = torch.arange(-(-len(self.window) * columns // BLOCK) * BLOCK, device=device)
        return ((elements >= own.start * columns) & (elements < own.stop * columns)).view(-1, BLOCK)

    # --- the probes of auto_lr: of each span of `stride` blocks one; here are the spans that the own rows touch

    def blocks(self) -> range:
        """The blocks with an element in the own rows, counted in the whole."""
        return self.layout.touched(self.rank, BLOCK)

    def spans(self, stride: int, rank: int | None = None) -> range:
        return self.layout.touched(self.rank if rank is None else rank, BLOCK * stride)

    def claims(self, stride: int) -> list[tuple[int, list[tuple[int, int]]]]:
        """Of the spans here in which several processes have blocks: the place, and the claims for it, as pairs of a
        rank and which end of its spans it is, 0 for the first and 1 for the last."""
        return _claims(self.layout, self.rank, stride)

    def probes(self, stride: int) -> st.State:
        """Fresh ones."""
        spans, like = len(self.spans(stride)), self.like_window()
        return {
            "probe_start": torch.zeros((spans, BLOCK), dtype=like.dtype, device=like.device),
            "probe_block": torch.full((spans,), st.PROBE_FREE, dtype=torch.int32, device=like.device),
        }

    # --- whole tensors, as checkpoints hold them

    def saved(self, state: st.State, stride: int) -> st.State:
        """A state with whole tensors: DTensors, of which each process has a share. To be called by all processes."""
        from torch.distributed.tensor import DTensor

        cut = {name: value for name, value in state.items() if _is_cut(name)}
        # Not views, of which torch.save refuses DTensors.
        elements = {
            name: value[self.inside].clone() if self.shares_tiles else value
            for name, value in cut.items()
            if st.KEYS[name].kind == "element"
        }
        shapes = dict.fromkeys(elements, self.layout.shape)
        for name, whole in self._assembled({k: v for k, v in cut.items() if k not in elements}, stride).items():
            share = self.layout.share(self.rank, len(whole))
            elements[name], shapes[name] = whole[share.start : share.stop].clone(), tuple(whole.shape)
        made = {}
        for name, local in elements.items():
            shape = torch.Size(shapes[name])
            like = torch.empty(shape, device="meta")
            made[name] = DTensor.from_local(
                local, self.p.device_mesh, self.p.placements, run_check=False, shape=shape, stride=like.stride()
            )
        return {name: made.get(name, value) for name, value in state.items()}

    def _assembled(self, held: st.State, stride: int) -> st.State:
        """Whole tensors of what is not kept element by element: the processes' pieces, none of which overlap, added."""
        columns, wholes = self.layout.columns, {}
        for name, value in held.items():
            kind, like = st.KEYS[name].kind, torch.empty(self.layout.shape, device="meta")
            shape = st.SHAPES[kind](like, stride)
            whole = torch.zeros(shape, dtype=value.dtype, device=value.device)
            if kind in ("probe", "span"):
                spans, before = self.spans(stride), [self.spans(stride, rank).stop for rank in range(self.rank)]
                first = spans.start
                if kind == "probe":
                    value = self._own_elements(value, held["probe_block"], stride)
                else:  # one that several touch is the first's
                    first = min(max([first, *before]), spans.stop)
                whole[first : spans.stop] = value[first - spans.start :]
            else:
                size, each = self.piece(kind)
                begun, shift = self.layout.begun(self.rank, size), self.window.start * columns // size
                whole[begun.start * each : begun.stop * each] = value[
                    (begun.start - shift) * each : (begun.stop - shift) * each
                ]
            wholes[name] = whole
        if wholes:
            bytes_of = [whole.view(-1).view(torch.uint8) for whole in wholes.values()]
            packed = torch.cat(bytes_of).to(device_of(self.p))
            dist.all_reduce(packed, group=self.group)
            for into, got in zip(bytes_of, packed.split([len(x) for x in bytes_of]), strict=True):
                into.copy_(got)
        return wholes

    def _own_elements(self, starts: Tensor, places: Tensor, stride: int) -> Tensor:
        """θ0, [spans, 256], with 0 for what is not the process's own, or not watched."""
        spans, columns = self.spans(stride), self.layout.columns
        block = torch.arange(spans.start, spans.stop, device=starts.device) * stride + places
        element = block[:, None] * BLOCK + torch.arange(BLOCK, device=starts.device)
        own = (element >= self.own.start * columns) & (element < self.own.stop * columns) & (places < stride)[:, None]
        return torch.where(own, starts, torch.zeros_like(starts))

    def part_of(self, name: str, whole: Tensor, stride: int) -> Tensor:
        """What this process keeps of a whole tensor of a state: a view of it."""
        if not _is_cut(name):
            return whole
        kind = st.KEYS[name].kind
        if kind == "element":
            return whole[self.window.start : self.window.stop]
        if kind in ("probe", "span"):
            spans = self.spans(stride)
            return whole[spans.start : spans.stop]
        size, each = self.piece(kind)
        first, last = self.start // size, -(-self.window.stop * self.layout.columns // size)
        return whole[first * each : last * each]

    def piece(self, kind: str) -> tuple[int, int]:
        """Of how many elements a piece of such a tensor tells, and how many of its entries are one."""
        tiling = self.layout.tiling
        return {
            "pair": (2, 1),
            "block": (BLOCK, 1),
            "row": (tiling.width, 1),
            "col": (self.layout.unit * self.layout.columns, tiling.strips),
        }[kind]


@dataclass(frozen=True)
class Stretch:
    """Which elements of a parameter are stepped here, in flat indices of the whole; `stride` is auto_lr's."""

    shard: Shard
    stride: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return self.shard.layout.shape

    @property
    def start(self) -> int:
        """Of the window, a multiple of 256."""
        return self.shard.start

    @property
    def stop(self) -> int:
        return self.shard.window.stop * self.shard.layout.columns

    @property
    def own_start(self) -> int:
        return self.shard.own.start * self.shard.layout.columns

    @property
    def own_stop(self) -> int:
        return self.shard.own.stop * self.shard.layout.columns

    def before(self, kind: str) -> int:
        """How many entries of a tensor of this kind (`state.Key.kind`) come before those that are kept here."""
        if kind in WHOLE_KINDS:
            return 0
        if kind == "element":
            return self.start
        if kind in ("probe", "span"):
            return self.shard.spans(self.stride).start * (BLOCK if kind == "probe" else 1)
        size, each = self.shard.piece(kind)
        return self.start // size * each * (self.shard.layout.tiling.width if kind == "col" else 1)


WHOLE_KINDS = ("book", "stats", "norms")
"""Of what each process keeps all."""


def _is_cut(name: str) -> bool:
    return name in st.KEYS and st.KEYS[name].kind not in WHOLE_KINDS


def shard_of(p: Any) -> Shard | None:
    """The part that is here of a DTensor cut along its first dimension, over one dimension of its mesh.

    None for a parameter that is whole here, and for one that is cut in any other way (tensor parallel): of that each
    process steps what it holds as if it were a parameter of its own.
    """
    if not hasattr(p, "device_mesh"):
        return None
    cut = _cut(p.device_mesh, p.placements, p.shape)
    return None if cut is None else Shard(p, *cut)


@functools.lru_cache(maxsize=4096)
def _cut(mesh: Any, placements: tuple[Any, ...], shape: torch.Size) -> tuple[int, Layout, int] | None:
    """Along which dimension of its mesh a DTensor is cut by rows, how, and this process's place there."""
    cut = [dim for dim, placement in enumerate(placements) if mesh.size(dim) > 1 and not placement.is_replicate()]
    if len(cut) != 1 or type(placements[cut[0]]).__name__ != "Shard" or placements[cut[0]].dim != 0:
        return None
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    return cut[0], layout(tuple(shape), mesh.size(cut[0])), coordinate[cut[0]]


@functools.lru_cache(maxsize=4096)
def _claims(layout: Layout, rank: int, stride: int) -> list[tuple[int, list[tuple[int, int]]]]:
    found: dict[int, list[tuple[int, int]]] = {}
    for other in range(layout.world):
        if spans := layout.touched(other, BLOCK * stride):
            found.setdefault(spans[0], []).append((other, 0))
            if len(spans) > 1:
                found.setdefault(spans[-1], []).append((other, 1))
    mine = layout.touched(rank, BLOCK * stride)
    ends = sorted({mine[0], mine[-1]}) if mine else []
    return [(span - mine.start, found[span]) for span in ends if len(found[span]) > 1]


def stepped(p: Tensor) -> Tensor:
    """What of a parameter is stepped here: the (local) tensor, or what has the shape of a shard's window."""
    shard = shard_of(p)
    return st.local_tensor(p) if shard is None else shard.like_window()


def whole(value: Any) -> Any:
    """A DTensor as a whole tensor, for which all its processes have to call; anything else as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def device_of(p: Any) -> torch.device:
    """Where the collectives of a DTensor's mesh take place; its own memory may be elsewhere (CPU offload)."""
    kind, local = p.device_mesh.device_type, st.local_tensor(p).device
    return local if local.type == kind else torch.device(kind, getattr(torch, kind).current_device())


# --- collectives, each over all parameters that are stepped together --------------------------------------------------


@dataclass
class Edge:
    """A gradient, and what its process is to have of the others for it."""

    shard: Shard
    grad: Tensor
    """The own rows, contiguous."""
    beside: int
    """Rows wanted on either side of the window."""
    norm: Tensor | None
    """0-d float32: the own share of the sum of squares, which `exchange` makes that of the whole; None where nobody
    asks."""
    before: list[Tensor] = field(default_factory=list)
    """Elements of needed rows that have come from others, of rows before the own ones."""
    after: list[Tensor] = field(default_factory=list)

    @property
    def wanted(self) -> list[tuple[int, range]]:
        return self.shard.layout.wanted(self.shard.rank, self.beside)

    def sent_to(self, other: int) -> Tensor | None:
        """The own elements that another process needs, if any."""
        own = self.shard.own
        for rank, rows in self.shard.layout.wanted(other, self.beside):
            if rank == self.shard.rank:
                return self.grad[rows.start - own.start : rows.stop - own.start].reshape(-1)
        return None

    def gradient(self) -> Tensor:
        """That of all rows needed, contiguous; after `exchange`."""
        if not self.before and not self.after:
            return self.grad
        return torch.cat([*self.before, self.grad.view(-1), *self.after]).view(-1, *self.grad.shape[1:])


def exchange(edges: list[Edge]) -> None:
    """Put the gradients of others' rows and the norms of the whole in their places.

    A collective, unless no process needs anything of another.

    Args:
        edges: of parameters on one process group, the same in all its processes.
    """
    if all(edge.norm is None and edge.shard.layout.is_closed(edge.beside) for edge in edges):
        return
    first, device, home = edges[0].shard, device_of(edges[0].shard.p), edges[0].grad.device
    others = [rank for rank in range(first.layout.world) if rank != first.rank]
    asking = [edge for edge in edges if edge.norm is not None]
    norms = torch.stack([edge.norm for edge in asking if edge.norm is not None]) if asking else None
    sent = [_sent(edges, norms, other) for other in others]
    # Of each other process: whose elements come, and how many.
    coming = [[(edge, _elements(edge, other)) for edge in edges] for other in others]
    coming = [[(edge, size) for edge, size in of_other if size] for of_other in coming]
    sizes = [len(asking) + sum(size for _, size in of_other) for of_other in coming]
    received = torch.empty(sum(sizes), dtype=torch.float32, device=device)
    packed = _packed([piece for pieces in sent for piece in pieces], home).to(device)
    dist.all_to_all_single(
        received,
        packed,
        _with_own(sizes, first.rank),
        _with_own([sum(map(len, pieces)) for pieces in sent], first.rank),
        group=first.group,
    )
    received, dtypes = received.to(home), {edge.grad.dtype for edge in edges}
    if norms is not None:
        _add_norms(asking, norms, [x[: len(asking)] for x in received.split(sizes)])
    converted = received.to(edges[0].grad.dtype) if len(dtypes) == 1 else received  # at once, where all are alike
    pieces = iter(converted.split([size for of_other in coming for size in (len(asking), *(n for _, n in of_other))]))
    for other, of_other in zip(others, coming, strict=True):
        next(pieces)  # the norms
        for edge, _ in of_other:
            (edge.before if other < first.rank else edge.after).append(next(pieces).to(edge.grad.dtype))


def _sent(edges: list[Edge], norms: Tensor | None, other: int) -> list[Tensor]:
    pieces = [edge.sent_to(other) for edge in edges]
    return [*([] if norms is None else [norms]), *(piece for piece in pieces if piece is not None)]


def _elements(edge: Edge, other: int) -> int:
    """How many come from another process."""
    return sum(len(rows) for rank, rows in edge.wanted if rank == other) * edge.shard.layout.columns


def _packed(pieces: list[Tensor], device: torch.device) -> Tensor:
    """float32, one after the other."""
    if not pieces:
        return torch.empty(0, dtype=torch.float32, device=device)
    alike = len({piece.dtype for piece in pieces}) == 1
    return torch.cat(pieces).float() if alike else torch.cat([piece.float() for piece in pieces])


def _with_own(sizes: list[int], rank: int) -> list[int]:
    """Sizes by rank, from those of the others: nothing goes to oneself."""
    return [*sizes[:rank], 0, *sizes[rank:]]


def _add_norms(edges: list[Edge], own: Tensor, others: list[Tensor]) -> None:
    """Sums over the processes in the order of their ranks: the same bits in each."""
    rank = edges[0].shard.rank
    whole = torch.stack([*others[:rank], own, *others[rank:]]).sum(dim=0)
    for edge, norm in zip(edges, whole.unbind(), strict=True):
        edge.norm = norm


def gathered(values: Tensor, shard: Shard) -> Tensor:
    """[world, ...]: what each process has given here, by rank. Collective; all give tensors of one shape."""
    mine = values.to(device_of(shard.p)).reshape(-1)
    everyones = mine.new_empty(shard.layout.world * len(mine))
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name until torch 2.12
    all_gather(everyones, mine, group=shard.group)
    return everyones.to(values.device).view(shard.layout.world, *values.shape)
