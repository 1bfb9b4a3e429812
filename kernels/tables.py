"""Pointer tables: many tensors, one launch.

Parameters that share dtypes, storage and switches form a bucket. A bucket keeps a table of addresses on the device,
written once, and uploads each step one small row a tensor: the gradient's address and the step's scalars.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from automagic_bnb.kernels.launching import Compiled, Repeated
from automagic_bnb.kernels.row import WORDS, Row, signed
from torch import Tensor

from automagic_bnb import config, direction, reference, scalars
from automagic_bnb import quantization as q
from automagic_bnb import state as st
from automagic_bnb.addresses import Places
from automagic_bnb.factored import Tiling, tile_height
from automagic_bnb.paged import is_paged
from automagic_bnb.sharded import Stretch
from automagic_bnb.state import KEYS

BLOCK_STATISTICS = [name for name, key in KEYS.items() if key.kind == "block"]
"""What is kept of each block. Their columns follow one another: the kernel loads these addresses together, and then
each thread of a warp holds one of them, by its place here."""
STATE_COLUMNS = [name for name, key in KEYS.items() if key.kind not in ("block", "book")] + BLOCK_STATISTICS
"""The tensors of a state of which the table has the addresses; the code books are the launch's."""
SIZES = ["RATE", "SKIPS", "SIZE", "ROWS", "COLS", "STRIPS", "FIRST_PROGRAM", "PROGRAMS", "PROBE_SHIFT", "DIRECTION"]
"""The last columns: where auto_lr's d is, where skipped elements are counted, and what is no address. auto_lr watches
one of 2^PROBE_SHIFT blocks; DIRECTION is where n is left, in elements, with `lora_direction`."""
STRETCH = ["START", "STOP", "OWN_START", "OWN_STOP"]
"""Of a tensor that others hold a part of: `sharded.Stretch`. Its addresses are where the whole would begin."""
Column: Any = IntEnum("Column", ["THETA", *map(str.upper, STATE_COLUMNS), *SIZES, *STRETCH], start=0)
"""What the table of a bucket holds of each tensor."""


class Number(IntEnum):
    """The scalars uploaded for each tensor at each step, float32 (KEY: the bits of a uint32)."""

    RATE = 0
    LOW = 1  # bounds of an element's rate
    HIGH = 2  # below 0: minus its ratio to the mean
    WEIGHT_DECAY = 3
    KAPPA = 4
    CORRECTION1 = 5  # 1 / (1 - β1^t)
    CORRECTION2 = 6  # the root of 1 - β2^t
    CORRECTION3 = 7  # 1 - β3^t
    ADAPT_MASK = 8
    LEARN_POLARITY = 9
    KEY = 10
    TURN = 11  # t modulo 2
    NORM_SLOT = 12  # percentile_clipping: where this step's norm goes,
    PERCENTILE = 13
    SPARE1 = 14  # rows of 64 bytes
    SPARE2 = 15


_KEY = int(Number.KEY)
assert len(Number) + 2 == WORDS, "a tensor's numbers and its gradient's address"

_GRAD, _DTYPE = operator.attrgetter("grad"), operator.attrgetter("dtype")

Gradients = list[Tensor | None]
"""Of the members of a bucket; None for those that have none."""
Addresses = Sequence[int] | np.ndarray
"""Of these gradients, int64; 0 for none."""
SHARED_NUMBERS = (
    "betas",
    "eps",
    "clip_threshold",
    "frequency_penalty",
    "edge_penalty",
    "edge_threshold",
    "detail_preservation",
)
"""Options that become arguments of a launch: tensors that differ in one go to different buckets."""


shared_numbers: Callable[[dict[str, Any]], tuple[Any, ...]] = operator.itemgetter(*SHARED_NUMBERS)
"""Their values, in this order."""

DTYPES = {
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.uint8: tl.uint8
}  # fmt: skip

BLOCKS_PER_PROGRAM = 16
"""What a program works through, or with factored moments a part of the tile that it does."""
PAGED_PART = 2**26
"""Bytes of paged states to a launch: one large parameter's, or those of many small ones."""
FETCHED_BYTES = 2**20
"""A smaller paged tensor comes when it is used: a call to the driver takes longer than that."""


class Switches(NamedTuple):
    """What a step kernel is compiled for: of a bucket, but for the last two, which are of a launch."""

    P: tl.dtype
    """θ's dtype."""
    G: tl.dtype
    """The gradient's."""
    M: tl.dtype
    """m's; uint8 are codes."""
    CODES: bool
    """v and r are codes; else float32 or, where WIDTH is not 0, means."""
    MASK: int
    """Bits of k and π: 8, 4, or 32 where k is float32 and π stands for itself; 0 where there are neither."""
    WIDTH: int
    """Columns of a tile of factored moments; 0 in other storage."""
    HEIGHT: int
    """Blocks of such a tile, at most."""
    MEANS: tl.dtype
    """Of its means."""
    SPATIAL: bool
    EVEN: bool
    """Matrices whose rows are multiples of 8 long."""
    EDGES: bool
    TORQUE: bool
    CAME: bool
    CAUTIOUS: bool
    BACKGROUND: bool
    AWARE: bool
    AUTO: bool
    SCALED: bool
    """percentile_clipping, or torch's GradScaler, multiplies the gradients."""
    ECC: bool
    """8 more bits of θ are in the state."""
    STOCHASTIC: bool
    DIRECTED: bool
    """`lora_direction` turns n before the weights move."""
    PART: bool
    """Of each tensor a stretch is stepped."""
    ALIGN: int
    """What addresses of θ and the gradient are multiples of, in bytes. 16 where sizes are multiples of 8, so that eight
    elements are one access; a launch whose tensors lie otherwise has 2."""
    WARM: bool
    """Some mask still moves; False where there is none."""


@dataclass(frozen=True)
class Variant:
    """Switches, the same as the kernel takes them (to make them takes 5 µs), and what was compiled for them."""

    switches: Switches
    constants: Switches
    compiled: Compiled


@functools.cache
def variant_of(switches: Switches) -> Variant:
    return Variant(switches, Switches._make(map(tl.constexpr, switches)), Compiled())


@dataclass(frozen=True)
class Spec:
    """What the tensors of a bucket have in common."""

    device: torch.device
    grad_dtype: torch.dtype
    switches: Switches
    paged: int
    """Which part of the paged states: each has a launch of its own, and is fetched while the one before is updated. -1
    for what is not paged."""
    counts: bool
    """Steps are counted on the device: `capturable`."""
    numbers: tuple[Any, ...]
    """What they were when the bucket was filled; each launch takes them as they are."""


def spec_of(member: Member, grad_dtype: torch.dtype, options: dict[str, Any], paged: int = -1) -> Spec:
    theta, state = member.whole, member.state
    spatial, storage = reference.is_spatial(theta, options), st.storage_held(state)
    width = Tiling.of(theta).width if storage in st.FACTORED else 0
    switches = Switches(
        P=DTYPES[theta.dtype],
        G=DTYPES[grad_dtype],
        M=DTYPES[state["state1"].dtype],
        CODES=storage == "8bit",
        MASK=32 if storage == "32bit" else st.as_held(state, options)["mask_bits"],
        WIDTH=width,
        HEIGHT=tile_height(width),
        MEANS=DTYPES[state["exp_avg_sq_row"].dtype] if width else tl.float32,
        SPATIAL=spatial,
        EVEN=spatial and theta.dim() == 2 and theta.shape[-1] % 8 == 0,
        EDGES=spatial and options["edge_suppression"],
        TORQUE=options["torque"],
        CAME=options["came"],
        CAUTIOUS=options["cautious"],
        BACKGROUND=options["background_regularization"],
        AWARE=options["spatial_awareness"],
        AUTO=options["auto_lr"],
        SCALED=options["percentile_clipping"] < 100,
        ECC=st.keeps_residual(theta, options),
        STOCHASTIC=st.rounds_stochastically(theta, options),
        DIRECTED=direction.is_directed(theta, options, member.is_lora),
        PART=member.stretch is not None,
        ALIGN=16 if theta.numel() % 8 == 0 else 2,
        WARM=False,
    )
    return Spec(member.theta.device, grad_dtype, switches, paged, options["capturable"], shared_numbers(options))


@dataclass
class Member:
    """One parameter of a plan."""

    p: Tensor
    state: st.State
    group: dict[str, Any]
    source: int
    key: int
    """Of its random bits."""
    is_lora: bool
    sharded: bool
    rate: Tensor | None
    """auto_lr's d, on the parameter's device."""
    stretch: Stretch | None = None
    """What is stepped of a parameter of which others hold rows."""

    @property
    def theta(self) -> Tensor:
        """The (local) parameter, taken anew each time: who moves its memory elsewhere wants the old to be freed."""
        return st.local_tensor(self.p).detach()

    @property
    def whole(self) -> Tensor:
        """What has the whole parameter's shape and dtype."""
        theta = self.theta
        return theta if self.stretch is None else theta.new_empty(self.stretch.shape, device="meta")

    @property
    def theta_address(self) -> int:
        """Where the whole would begin."""
        theta = self.theta
        before = 0 if self.stretch is None else self.stretch.own_start
        return theta.data_ptr() - before * theta.element_size()


class Bucket:
    """Tensors updated by one launch."""

    repeated: Repeated | None = None
    """Its launches, where what a step says of its tensors always lies in the same place on the device."""
    turns: Any = None
    """`kernels.direction.Turns`, once there are."""

    def __init__(self, spec: Spec, members: list[Member]) -> None:
        """Write the table."""
        self.spec, self.members = spec, members
        table = np.zeros((len(members), len(Column)), dtype=np.int64)
        programs = 0
        owners = []
        for row, member in enumerate(members):
            table[row] = self._addresses(member)
            count = self._programs(member)
            table[row, Column.FIRST_PROGRAM], table[row, Column.PROGRAMS] = programs, count
            programs += count
            owners.append(count)
        self.programs, self.elements = programs, sum(m.theta.numel() for m in members)
        self.direction_elements = 0
        if self.spec.switches.DIRECTED:  # whole blocks each
            sizes = np.array([st.block_count(m.theta) * q.BLOCK for m in members])
            table[:, Column.DIRECTION], self.direction_elements = np.cumsum(sizes) - sizes, int(sizes.sum())
        if self.spec.switches.PART:  # skipped elements are a share for others to add
            self.skips = torch.zeros(len(members), dtype=torch.float32, device=self.spec.device)
            table[:, Column.SKIPS] = self.skips.data_ptr() + 4 * np.arange(len(members))
        self.directions: list[int] = table[:, Column.DIRECTION].tolist()
        self.table = upload(table, self.spec.device)
        self.owners = upload(np.repeat(np.arange(len(members), dtype=np.int32), owners), self.spec.device)
        self.parameters = [m.p for m in members]
        self.states = [m.state for m in members]
        held = [name for name in STATE_COLUMNS if all(name in m.state for m in members)]
        self.tensors_of = operator.itemgetter(*held)
        self.tensors = list(map(self.tensors_of, self.states))
        states = [x for state in self.states for x in state.values() if is_paged(x)]
        self.fetched = [x for x in states if x.nbytes >= FETCHED_BYTES]
        """What is paged and worth a call to the driver."""
        self.sharded = any(m.sharded for m in members)
        self.thetas = [m.theta.data_ptr() for m in members]
        self.sizes = [m.theta.numel() for m in members]
        rates = {id(m.rate): (m.group, m.rate) for m in members if m.rate is not None}
        # Without the copies on other devices than their group's, which follow it.
        self.rates = {key: (g, rate) for key, (g, rate) in rates.items() if g.get("auto_lr_rate") is rate}
        # The state, the tuple above and the list hold each; and auto_lr's search what it reads.
        holders = [3 + (name == "tensor_stats" and self.spec.switches.AUTO) for name in held]
        self.places = st.StatePlaces(
            [*itertools.chain.from_iterable(self.tensors)], self.states, holders * len(members)
        )
        self.rate_places = Places([rate for _, rate in self.rates.values()])
        self.short = [row for row, m in enumerate(members) if m.theta.numel() <= q.BLOCK]
        self.aligned = self.spec.switches.ALIGN == 16 and all(m.theta_address % 16 == 0 for m in members)
        self._variants: dict[tuple[bool, bool, bool], Variant] = {}
        self.lora = np.array([m.is_lora for m in members])
        self.sources: dict[int, tuple[Any, np.ndarray]] = {}
        """Of each source of options the rows, and which of them are of LoRA matrices."""
        for source in {m.source for m in members}:
            rows = np.array([row for row, m in enumerate(members) if m.source == source])
            self.sources[source] = (slice(None) if len(rows) == len(members) else rows, rows[self.lora[rows]])
        self.keys = np.array([q.mix_in(m.key, q.STEP_STREAM) for m in members], np.uint64)
        self.rank_rows = [
            row for row, m in enumerate(members) if m.is_lora and m.theta.dim() == 2 and m.theta.shape == m.p.shape
        ]
        self.changes = st.WatchedState.changes
        """As many as when the tensors in the states were last seen to be those of the table."""
        self.numbers = np.zeros((len(members), len(Number)), dtype=np.float32)
        self.steps = np.zeros(len(members), dtype=np.int64)
        """t of what the last launch updated, 0 of the others."""
        self.step = 0
        """The same of all, where all are at the same step; else 0."""

    def variant(self, warm: bool, aligned: bool, scaled: bool) -> Variant:
        """What is launched where some mask moves, all is aligned and gradients are multiplied."""
        launch = warm, aligned, scaled
        if launch not in self._variants:
            switches = self.spec.switches
            self._variants[launch] = variant_of(
                switches._replace(
                    WARM=warm and switches.MASK > 0, ALIGN=16 if aligned else 2, SCALED=scaled or switches.SCALED
                )
            )
        return self._variants[launch]

    def _programs(self, member: Member) -> int:
        whole, stretch, switches = member.whole, member.stretch, self.spec.switches
        elements = whole.numel() if stretch is None else stretch.stop - stretch.start
        if not switches.WIDTH:
            return -(-elements // (q.BLOCK * BLOCKS_PER_PROGRAM))
        strips = Tiling.of(whole).strips
        return strips * -(-elements // (q.BLOCK * strips * switches.HEIGHT))

    @staticmethod
    def _addresses(member: Member) -> np.ndarray:
        row = np.zeros(len(Column), dtype=np.int64)
        theta, state, stretch = member.whole, member.state, member.stretch
        row[Column.THETA] = member.theta_address
        for name in STATE_COLUMNS:
            if name in state:
                if state[name].data_ptr() % 16:  # a view that someone put there; the kernels load 16 bytes at once
                    state[name] = state[name].clone()
                before = 0 if stretch is None else stretch.before(st.KEYS[name].kind)
                row[Column[name.upper()]] = state[name].data_ptr() - before * state[name].element_size()
        row[Column.SKIPS] = state["tensor_stats"].data_ptr() + 4 * st.SKIPPED
        row[Column.RATE] = 0 if member.rate is None else member.rate.data_ptr()
        row[Column.SIZE] = theta.numel()
        row[Column.ROWS] = theta.shape[-2] if theta.dim() >= 2 else 1
        row[Column.COLS] = theta.shape[-1] if theta.dim() >= 1 else 1
        row[Column.STRIPS] = Tiling.of(theta).strips
        if stretch is not None:
            row[Column.START], row[Column.STOP] = stretch.start, stretch.stop
            row[Column.OWN_START], row[Column.OWN_STOP] = stretch.own_start, stretch.own_stop
            row[Column.PROBE_SHIFT] = stretch.stride.bit_length() - 1
        elif "probe_block" in state:
            row[Column.PROBE_SHIFT] = st.stride_held(st.block_count(theta), len(state["probe_block"])).bit_length() - 1
        return row

    def fits(self, sources: list[dict[str, Any]]) -> bool:
        """Whether the parameters are still as large as the table says, and all have the launch's numbers in common."""
        return list(map(Tensor.numel, self._held_parameters())) == self.sizes and self._agree(sources)

    def _agree(self, sources: list[dict[str, Any]]) -> bool:
        if len(self.sources) == 1:
            return True
        first, *others = (shared_numbers(sources[i]) for i in self.sources)
        return all(numbers == first for numbers in others)

    def is_in_place(self) -> bool:
        """Whether parameters, the tensors in their states and the rates found still lie where the table says."""
        if list(map(Tensor.data_ptr, self._held_parameters())) != self.thetas:
            return False
        changes = st.WatchedState.changes
        if not self.places.watched or self.changes != changes:
            if not self._holds_same_tensors():
                return False
            self.changes = changes
        return self.places.are_current() and (not self.rates or self._has_rates())

    def _has_rates(self) -> bool:
        same = all(group.get("auto_lr_rate") is rate for group, rate in self.rates.values())
        return same and self.rate_places.are_current()

    def _held_parameters(self) -> list[Tensor]:
        return list(map(st.local_tensor, self.parameters)) if self.sharded else self.parameters

    def _holds_same_tensors(self) -> bool:
        try:  # identical tensors compare equal at once; of others == is no answer
            # One tuple at a time: a thousand at once would set off the garbage collector at each step.
            same = all(map(operator.eq, map(self.tensors_of, self.states), self.tensors))
        except (KeyError, RuntimeError):
            return False
        # Tensors of one element do have an answer, but a copy is not the same tensor.
        return same and all(
            all(map(operator.is_, self.tensors_of(self.states[row]), self.tensors[row])) for row in self.short
        )

    def counted(self) -> np.ndarray:
        """The steps taken so far, int64, as the states have them."""
        steps = map(st.get_uncounted, self.states, itertools.repeat("step"))
        return np.fromiter(steps, np.int64, len(self.states))

    def gradients(self) -> Gradients | None:
        """Each member's gradient, contiguous.

        None if a dtype has changed, or a parameter lies otherwise in its memory: then so does its gradient.
        """
        dtype = self.spec.grad_dtype
        # Some hundred nanoseconds a tensor count here: attributes are read in C, and one without gradient has none.
        grads = list(map(_GRAD, self.parameters))
        try:
            if set(map(_DTYPE, grads)) == {dtype} and all(map(Tensor.is_contiguous, grads)) and not self.sharded:
                return grads
        except (AttributeError, TypeError):
            pass  # some have none
        if not all(st.local_tensor(p).is_contiguous() for p in self.parameters):
            return None
        kept = [None if p.grad is None else st.checked_gradient(p).contiguous() for p in self.parameters]
        return kept if all(grad is None or grad.dtype is dtype for grad in kept) else None

    def addresses(self, grads: Gradients, stepped: set[int]) -> Addresses:
        """Of the members' gradients, int64; 0 for none, and for parameters of these ids."""
        try:
            found = np.fromiter(map(Tensor.data_ptr, grads), np.int64, len(grads))  # type: ignore[arg-type]
        except TypeError:
            found = np.array([0 if grad is None else grad.data_ptr() for grad in grads], dtype=np.int64)
        if stepped:
            found[[id(p) in stepped for p in self.parameters]] = 0
        return found

    def are_aligned(self, grads: Addresses) -> bool:
        """Whether θ and the gradients all lie at multiples of 16 bytes, in rows of such."""
        return self.aligned and not (np.asarray(grads) & 15).any()

    def upload_step(self, grads: Addresses, sources: list[dict[str, Any]]) -> tuple[Tensor, Tensor, bool]:
        """Upload each tensor's row of the step that comes.

        Args:
            grads: int64, each member's gradient's address, 0 for none.
            sources: the effective options by `Member.source`.

        Returns:
            int64 [tensors] addresses and float32 [tensors, Number] on the device, and whether any mask still moves.
        """
        grads = np.asarray(grads)
        stepped = grads != 0
        steps = self.counted() + stepped
        self.steps = np.where(stepped, steps, 0)
        self.step = int(steps[0]) if (steps == steps[0]).all() else 0
        warm = self._fill_numbers(steps, sources)
        rows, row_bytes = len(steps), 4 * len(Number)
        staged = torch.empty(rows * (8 + row_bytes), dtype=torch.uint8, pin_memory=self.spec.device.type == "cuda")
        host = staged.numpy()
        host[: rows * row_bytes] = self.numbers.reshape(-1).view(np.uint8)
        host[rows * row_bytes :] = grads.view(np.uint8)
        uploaded = staged.to(self.spec.device, non_blocking=True)
        numbers = uploaded[: rows * row_bytes].view(torch.float32)
        return uploaded[rows * row_bytes :].view(torch.int64), numbers, warm

    def count(self) -> None:
        """Note in the states that the step that was uploaded has been launched."""
        if self.steps.all():
            deque(map(st.set_uncounted, self.states, itertools.repeat("step"), self.steps.tolist()), maxlen=0)
            return
        for state, step in zip(self.states, self.steps.tolist(), strict=True):
            if step:
                st.set_uncounted(state, "step", step)

    def _fill_numbers(self, steps: np.ndarray, sources: list[dict[str, Any]]) -> bool:
        numbers, warm = self.numbers, False
        for source, (rows, lora_rows) in self.sources.items():
            options = sources[source]
            of_source = steps[rows]
            if (first := int(of_source[0])) == of_source.max() == of_source.min():
                taken = {first: rows}
            else:
                rows = np.arange(len(steps))[rows]
                taken = {t: rows[of_source == t] for t in {*of_source.tolist()}}
            for t, chosen in taken.items():
                row = number_row(options, t, False)
                numbers[chosen] = row.numbers
                warm |= row.is_warm
            numbers[lora_rows, Number.KAPPA] = options["low_rank_emphasis"]
        keys = q.mix_in(self.keys, steps.astype(np.uint64))
        numbers[:, Number.KEY] = keys.astype(np.uint32).view(np.float32)
        return warm


class Single(Bucket):
    """A bucket of one tensor, as parameters that are stepped one at a time have it: a thousand of them a step.

    Some twenty calls of numpy for a number each would take longer than all else, so this is plain Python. What a step
    says is written to where it was before, so that the launches behind it stay the same.
    """

    def __init__(self, spec: Spec, members: list[Member]) -> None:
        super().__init__(spec, members)
        (self._member,), (self._state,), (self._key,) = members, self.states, self.keys.tolist()
        self._row, self.repeated = Row(spec.device), Repeated()
        self._there = self._row.there[-2:].view(torch.int64), self._row.there[:-2].view(torch.float32)

    def fits(self, sources: list[dict[str, Any]]) -> bool:
        return super().fits(sources) if self.sharded else self._member.p.numel() == self.elements

    def gradients(self) -> Gradients | None:
        grad = self._member.p.grad
        if grad is None or grad.dtype is not self.spec.grad_dtype or self.sharded or not grad.is_contiguous():
            return super().gradients()
        return [grad]

    def addresses(self, grads: Gradients, stepped: set[int]) -> Addresses:
        (grad,) = grads
        return [0 if grad is None or id(self._member.p) in stepped else grad.data_ptr()]

    def are_aligned(self, grads: Addresses) -> bool:
        return self.aligned and grads[0] % 16 == 0

    def upload_step(self, grads: Addresses, sources: list[dict[str, Any]]) -> tuple[Tensor, Tensor, bool]:
        address = int(grads[0])
        self.step = t = st.get_uncounted(self._state, "step") + (address != 0)
        self.steps[0] = t if address else 0
        row = number_row(sources[self._member.source], t, self._member.is_lora)
        words = [*row.words, signed(address & 0xFFFFFFFF), address >> 32]
        words[_KEY] = signed(q.mix_in(self._key, t))
        self._row.write(words)
        return *self._there, row.is_warm

    def count(self) -> None:
        if self.steps[0]:
            st.set_uncounted(self._state, "step", self.step)


def upload(host: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device, for which nothing waits."""
    staged = torch.from_numpy(host)
    return (staged.pin_memory() if device.type == "cuda" else staged).to(device, non_blocking=True)


class NumberRow(NamedTuple):
    """A tensor's row of `Number`, but for its KEY."""

    numbers: tuple[float, ...]
    words: tuple[int, ...]
    """Their bits as float32."""
    is_warm: bool
    """Whether its mask still moves."""


_ABSENT = object()
_ROW_OPTIONS = (
    *("lr", "base_lr", "initial_lr", "auto_lr", "auto_lr_peak", "min_lr", "max_lr", "max_momentum", "betas"),
    *("warmup_steps", "low_rank_emphasis", "weight_decay", "percentile_clipping"),
)
"""What `scalars.step_scalars` reads, and `_row`."""
_PLAIN = {float, int, bool, tuple, type(None), object}


def number_row(options: dict[str, Any], t: int, is_lora: bool) -> NumberRow:
    """The row of step t, 0: none yet. Thousands of tensors have the same, so it is worked out once.

    Args:
        options: of the tensor, as for `scalars.step_scalars`.
    """
    values = tuple(map(options.get, _ROW_OPTIONS, itertools.repeat(_ABSENT)))
    if _PLAIN.issuperset(map(type, values)):
        return _known_row(values, t, is_lora)
    return _row(options, t, is_lora)  # a tensor changes where it is


@functools.lru_cache(maxsize=1024)
def _known_row(values: tuple[Any, ...], t: int, is_lora: bool) -> NumberRow:
    present = {name: value for name, value in zip(_ROW_OPTIONS, values, strict=True) if value is not _ABSENT}
    return _row(present, t, is_lora)


def _row(options: dict[str, Any], t: int, is_lora: bool) -> NumberRow:
    s = scalars.step_scalars(options, max(t, 1), is_lora, 0)
    row = [0.0] * len(Number)
    row[Number.RATE] = s.rate
    row[Number.LOW], row[Number.HIGH] = s.low, -config.MAX_LR_RATIO if s.high is None else s.high
    row[Number.WEIGHT_DECAY], row[Number.KAPPA] = options["weight_decay"], s.kappa
    row[Number.CORRECTION1], row[Number.CORRECTION2] = 1 / s.correction1, s.correction2**0.5
    row[Number.CORRECTION3] = s.correction3
    row[Number.ADAPT_MASK], row[Number.LEARN_POLARITY] = float(s.adapt_mask), float(s.learn_polarity)
    row[Number.TURN] = t % 2
    row[Number.NORM_SLOT] = (max(t, 1) - 1) % st.NORM_WINDOW
    row[Number.PERCENTILE] = options["percentile_clipping"]
    words = np.array(row, dtype=np.float32).view(np.int32)
    return NumberRow(tuple(row), tuple(words.tolist()), s.learn_polarity)


def fill_buckets(members: Iterable[tuple[Member, torch.dtype, dict[str, Any]]]) -> list[Bucket]:
    """Sort members (with their gradient's dtype and effective options) into buckets, tables written.

    The largest comes first: while the device works on it, the host prepares the others. Paged ones keep their order.
    """
    found: dict[Spec, list[Member]] = {}
    paged_bytes = 0
    for member, grad_dtype, options in members:
        size = sum(x.nbytes for x in member.state.values() if is_paged(x))
        spec = spec_of(member, grad_dtype, options, paged_bytes // PAGED_PART if size else -1)
        paged_bytes += size
        found.setdefault(spec, []).append(member)
    buckets = [(Bucket if len(alike) > 1 else Single)(spec, alike) for spec, alike in found.items()]
    return sorted(buckets, key=lambda bucket: (bucket.spec.paged, -bucket.elements))
