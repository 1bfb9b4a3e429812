"""What one parameter stores: one table of all keys, and what follows from it: allocation, shapes, completeness.

`KEYS` has each key's symbol in the rule, kind, dtype and start by storage, and when it is needed. A block is 256
consecutive elements of the contiguous parameter; probes are every 16th of them, or fewer (`probe_stride`); the row and
column means are those of the tiles of `factored.Tiling`. `qmap1`, `qmap2` are bitsandbytes' code books, one tensor for
all parameters of a device; `step` is an int.
"""

from __future__ import annotations

import functools
import math
import operator
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from automagic_bnb import bnb
from automagic_bnb import paged as paged_memory
from automagic_bnb.addresses import Places
from automagic_bnb.factored import Tiling
from automagic_bnb.quantization import BLOCK, EMPTY_MASK, EMPTY_PAIR, NO_SIGN

State = dict[str, Any]


class WatchedState(State):
    """A state of which it is known whether it has been changed.

    A LoRA's states are a thousand dictionaries of a dozen tensors each, and to look at all of them before a step takes
    nearly as long as the step. While nobody has put anything into a state or taken it out, they hold what they held.
    Whoever keeps a plain dictionary in its place only makes the kernels' plan look again each time.

    Nor can anybody exchange a tensor's memory (`t.data = …`) who has never been handed the tensor: so it is counted,
    too, how often entries have been read from outside of what `unseen` marks.
    """

    __slots__ = ()
    changes: ClassVar[int] = 0
    """How often an entry of any of them has been set or taken out, but for `set_uncounted`."""
    reads: ClassVar[int] = 0
    """How often an entry of any of them has been read by others than this package."""


class _Inside(threading.local):
    depth = 0


_inside = _Inside()


def unseen(method: Callable[..., Any]) -> Callable[..., Any]:
    """Of a function that hands no tensor of a state to its caller: what it reads does not count."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        _inside.depth += 1
        try:
            return method(*args, **kwargs)
        finally:
            _inside.depth -= 1

    return call


def _counted(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def change(state: WatchedState, *args: Any, **kwargs: Any) -> Any:
        WatchedState.changes += 1
        return method(state, *args, **kwargs)

    return change


def _seen(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def read(state: WatchedState, *args: Any, **kwargs: Any) -> Any:
        if not _inside.depth:
            WatchedState.reads += 1
        return method(state, *args, **kwargs)

    return read


for _name in ("__getitem__", "__iter__", "get", "values", "items", "copy"):
    setattr(WatchedState, _name, _seen(getattr(dict, _name)))
for _name in ("__setitem__", "__delitem__", "__ior__", "update", "setdefault", "pop", "popitem", "clear"):
    setattr(WatchedState, _name, _counted(getattr(dict, _name)))


class StatePlaces(Places):
    """Tensors of these states: who has not read a state cannot have moved one, unless a state is a plain dictionary.

    Whoever has read some and kept none cannot move one later either. To look at each of a thousand takes 0.1 ms, and
    of ten thousand, which no cache holds, 3 ms.
    """

    def __init__(self, tensors: list[Tensor], states: Iterable[State], holders: Iterable[int]) -> None:
        """
        Args:
            holders: of each tensor, how many references this package holds to it, the list given among them.
        """
        super().__init__(tensors)
        self.watched = all(isinstance(state, WatchedState) for state in states)
        self._holders = [number + _LOOKING for number in holders]
        self._trusted = 0
        """As many reads as when the tensors were last seen to be held by nobody else."""

    def are_current(self) -> bool:
        reads = WatchedState.reads
        if self.watched and reads == self._trusted:
            return True
        if not super().are_current():
            return False
        if self.watched and all(map(operator.le, map(sys.getrefcount, self.tensors), self._holders)):
            self._trusted = reads
        return True


def _looking() -> int:
    (count,) = map(sys.getrefcount, [object()])
    return count - 1


_LOOKING = _looking()
"""References that a look at the number of references adds."""


def watched(states: Mapping[Any, Any]) -> dict[Any, Any]:
    """The states by parameter as watched ones; what a wrapper keeps beside them, under names of its own, as it is."""
    return {p: WatchedState(held) if isinstance(p, Tensor) else held for p, held in states.items()}


get_uncounted, set_uncounted = dict.__getitem__, dict.__setitem__
"""For `step`, which changes all the time: nothing that a plan would have to look for."""


MASK_MEAN, LR_NUMERATOR, LR_DENOMINATOR, SKIPPED = range(4)
STATS = (
    "W: mean of 2^(k/16) over the tensor",
    "auto_lr's s = Σ u (θ0 - θ) over the blocks watched, of the last step until the next begins",
    "auto_lr's M over them, likewise",
    "elements skipped so far because their gradient was not finite",
)
LEAST_STRIDE = 16
"""Of earlier versions, whose checkpoints have a probe for every 16th block."""
PROBE_STRIDE = 32
"""auto_lr watches one of 32 blocks, in a large group one of more."""
PROBE_FREE, PROBE_CLAIM, PROBE_TURN = 2**30, 2**28, 2**27
"""`probe_block`: no block of the span is watched yet; one is claimed by the block whose place in the span comes on top,
in a step with an even number, or with an odd one, by a turn more."""
MAX_PROBED = 2**20
"""About how many elements of a group it watches at most; a tenth of them found up to twice the rate and no higher
loss (benchmarks/NOTES.md)."""
NORM_WINDOW = 100
"""Gradient norms remembered by percentile_clipping, as in bitsandbytes."""
PAGED_MIN_SIZE = 100_000
"""Elements from which a paged optimizer pages a state, as in bitsandbytes."""


# --- the table --------------------------------------------------------------------------------------------------------

STORAGES = ("32bit", "small", "small_factored", "8bit", "factored")
"""How the moments of a parameter are kept. The small ones are what `min_8bit_size` keeps out of 8 bits: m, v and r in
float32, or m in float16 and v and r as row and column means; the mask is that of the 8-bit ones."""
CODED = frozenset(["8bit", "factored"])
"""m is 8-bit codes."""
FACTORED = frozenset(["small_factored", "factored"])
"""v and r are row and column means."""

Start = float | tuple[float, ...]
FLOAT_MAX = torch.finfo(torch.float32).max
_POSITIVE = (0.0, FLOAT_MAX)
_MOMENTUM_MAX = 2.0**100
"""Far above any momentum of normalised gradients, and far enough below `FLOAT_MAX` that its products stay finite."""


def _always(p: Tensor, options: dict[str, Any], storage: str) -> bool:
    return True


@dataclass(frozen=True)
class Key:
    """One tensor of a parameter's state."""

    symbol: str
    """In the rule."""
    kind: str
    """Its shape: one of `SHAPES`; "element" is the parameter's, and what a paged optimizer pages."""
    held: dict[str, tuple[torch.dtype | None, Start]]
    """By storage, the dtype (None: the parameter's) and the value that it starts at; not held in any other storage.
    A key that is not held alike in all of them is converted when the storage changes."""
    needed: Callable[[Tensor, dict[str, Any], str], bool] = _always
    """Of the (local) parameter, its effective options and its storage."""
    report: str = ""
    """Where its bytes count in the memory report; under its own name if empty."""
    legal: tuple[float, float] = (-FLOAT_MAX, FLOAT_MAX)
    """Between which its numbers lie (codes: any of their dtype); the check of a loaded checkpoint."""


def _in(dtype: torch.dtype | None, *storages: str, start: Start = 0.0) -> dict[str, tuple[torch.dtype | None, Start]]:
    return dict.fromkeys(storages or STORAGES, (dtype, start))


def _uses_confidence(p: Tensor, options: dict[str, Any], storage: str) -> bool:
    return options["came"]


def keeps_residual(p: Tensor, options: dict[str, Any], storage: str = "") -> bool:
    """Whether θ has 8 more bits in the state."""
    return options["master"] == "ecc8" and p.dtype == torch.bfloat16


def _finds_rate(p: Tensor, options: dict[str, Any], storage: str) -> bool:
    return options["auto_lr"]


def _clips_norms(p: Tensor, options: dict[str, Any], storage: str) -> bool:
    return options["percentile_clipping"] < 100


def _has_mask(p: Tensor, options: dict[str, Any], storage: str) -> bool:
    return storage == "32bit" or options["mask_bits"] > 0


def _has_whole_mask(p: Tensor, options: dict[str, Any], storage: str) -> bool:
    return storage == "32bit" or options["mask_bits"] == 8


def _has_packed_mask(p: Tensor, options: dict[str, Any], storage: str) -> bool:
    return options["mask_bits"] == 4


_F32, _U8 = torch.float32, torch.uint8
_FLOATS, _SHORT = _in(_F32, "32bit", "small"), _in(torch.float16, "small_factored")
_CODES, _MEANS = {**_FLOATS, **_in(_U8, "8bit")}, _in(_F32, *sorted(FACTORED))
_M, _V, _R = "exp_avg", "exp_avg_sq", "exp_avg_res"

KEYS: dict[str, Key] = {
    "state1": Key(
        "m, first moment", "element", {**_CODES, **_SHORT, **_in(_U8, "factored")}, report=_M,
        legal=(-_MOMENTUM_MAX, _MOMENTUM_MAX),
    ),
    "state2": Key("v, second moment", "element", _CODES, report=_V, legal=_POSITIVE),
    "state3": Key("r, confidence", "element", _CODES, _uses_confidence, _R, _POSITIVE),
    "lr_mask": Key(
        "k; in 8 bits with π in bits 0 and 7", "element",
        {**_in(_U8, start=EMPTY_MASK), **_in(_F32, "32bit")}, _has_whole_mask, legal=(-32.0, 255.0),
    ),
    "lr_mask4": Key(
        "k and π, which is 0 before the first gradient, in four bits, two elements a byte", "pair",
        _in(_U8, *STORAGES[1:], start=EMPTY_PAIR), _has_packed_mask, "lr_mask",
    ),
    "last_polarity": Key("π", "element", _in(_U8, "32bit", start=NO_SIGN), legal=(0.0, NO_SIGN)),
    "master_residual": Key("8 bits below a bfloat16 θ", "element", _in(torch.int8), keeps_residual),
    # The blocks' keys stand together: the kernels load their addresses with one access.
    "absmax1": Key("absmax of m", "block", _in(_F32, "8bit", "factored"), report=_M, legal=(0.0, _MOMENTUM_MAX)),
    "absmax2": Key("absmax of v", "block", _in(_F32, "8bit"), report=_V, legal=_POSITIVE),
    "absmax3": Key("absmax of r", "block", _in(_F32, "8bit"), _uses_confidence, _R, _POSITIVE),
    "torque": Key("s", "block", _in(_F32), legal=(-1.001, 1.001)),
    "edge_history": Key("h", "block", _in(_F32), legal=_POSITIVE),
    "spatial_variance": Key("σ", "block", _in(_F32, start=1.0), _has_mask, legal=_POSITIVE),
    "exp_avg_sq_row": Key("v's row means", "row", _MEANS, report=_V, legal=_POSITIVE),
    "exp_avg_sq_col": Key("v's column means", "col", _MEANS, report=_V, legal=_POSITIVE),
    "exp_avg_res_row": Key("r's row means", "row", _MEANS, _uses_confidence, _R, _POSITIVE),
    "exp_avg_res_col": Key("r's column means", "col", _MEANS, _uses_confidence, _R, _POSITIVE),
    "qmap1": Key("signed code book", "book", _in(_F32, "8bit", "factored"), report="code_books"),
    "qmap2": Key("unsigned code book", "book", _in(_F32, "8bit", "factored"), report="code_books"),
    "tensor_stats": Key("`STATS`", "stats", _in(_F32, start=(1.0, 0.0, 0.0, 0.0))),
    "gnorm_vec": Key("the last gradients' norms", "norms", _in(_F32), _clips_norms, legal=_POSITIVE),
    "probe_start": Key("θ0 of auto_lr", "probe", _in(None), _finds_rate),
    "probe_block": Key(
        "the place of each in its span", "span", _in(torch.int32, start=PROBE_FREE), _finds_rate,
        legal=(0.0, PROBE_FREE),
    ),
}  # fmt: skip
"""Every tensor that a parameter's state may hold."""

SHAPES: dict[str, Callable[[Tensor, int], tuple[int, ...]]] = {
    "element": lambda p, stride: tuple(p.shape),
    "pair": lambda p, stride: (-(-p.numel() // 2),),
    "block": lambda p, stride: (block_count(p),),
    "row": lambda p, stride: (Tiling.of(p).rows,),
    "col": lambda p, stride: (Tiling.of(p).tiles, Tiling.of(p).width),
    "book": lambda p, stride: (256,),
    "stats": lambda p, stride: (len(STATS),),
    "norms": lambda p, stride: (NORM_WINDOW,),
    "probe": lambda p, stride: (probe_count(block_count(p), stride), BLOCK),
    "span": lambda p, stride: (probe_count(block_count(p), stride),),
}
"""By kind, the shape of a tensor of parameter p, of which auto_lr watches one of `stride` blocks."""


def keys_of(*kinds: str) -> frozenset[str]:
    """The keys of these kinds."""
    return frozenset(name for name, key in KEYS.items() if key.kind in kinds)


ELEMENT_KEYS = keys_of("element", "pair")
"""The tensors that have something of each element: the ones that a paged optimizer pages."""
CONVERTED_KEYS = frozenset(
    name
    for name, key in KEYS.items()
    if len({key.held.get(storage) for storage in STORAGES}) > 1 or key.needed is _has_mask
)
"""What depends on the storage, or on the form of the mask or the means."""


def is_needed(name: str, p: Tensor, storage: str, options: dict[str, Any]) -> bool:
    """Whether a (local) parameter in this storage holds this key under these options."""
    return storage in KEYS[name].held and KEYS[name].needed(p, options, storage)


def dtype_of(name: str, p: Tensor, storage: str, options: dict[str, Any]) -> torch.dtype:
    """In which a (local) parameter in this storage holds this key."""
    if KEYS[name].kind in ("row", "col") and options["mean_bits"] == 16:
        return torch.bfloat16
    return KEYS[name].held[storage][0] or p.dtype


# --- of a parameter ---------------------------------------------------------------------------------------------------


def local_tensor(p: Tensor) -> Tensor:
    """The shard of a DTensor that lives here; any other tensor as it is."""
    return p.to_local() if hasattr(p, "to_local") else p  # type: ignore[attr-defined]


def shard_of(p: Any) -> int | None:
    """Which part of a sharded DTensor lives here, counted over its mesh; None for a whole parameter."""
    if not hasattr(p, "to_local"):
        return None
    number, parts, mesh = 0, 1, p.device_mesh
    for placement, place, size in zip(p.placements, mesh.get_coordinate(), mesh.shape, strict=True):
        if not placement.is_replicate():
            number, parts = number * size + place, parts * size
    return number if parts > 1 else None


PARAMETER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_dtype(p: Tensor) -> None:
    """Raise TypeError where the weights of a parameter are of a dtype that is not stepped."""
    if p.dtype not in PARAMETER_DTYPES:
        raise TypeError(
            f"a parameter of shape {tuple(p.shape)} has dtype {p.dtype}; "
            "supported are float32, bfloat16 and float16: convert it, or leave it out"
        )


def checked_gradient(p: Tensor) -> Tensor:
    """The (local) gradient of a parameter that has one.

    Raises:
        RuntimeError: it is sparse.
        TypeError: the parameter has been given another dtype.
    """
    assert p.grad is not None
    check_dtype(p)
    grad = local_tensor(p.grad)
    if grad.is_sparse:
        raise RuntimeError(
            f"the gradient of a parameter of shape {tuple(p.shape)} is sparse, which is not supported; "
            "build the embedding with sparse=False"
        )
    return grad


def check_shape(state: State, p: Tensor, shape: torch.Size | None = None) -> None:
    """Raise ValueError where a state was made for a (local) parameter of another shape, or none can be.

    Args:
        shape: what the state's should be; by default p's.
    """
    check_layout(p)
    shape = p.shape if shape is None else shape
    if p.is_inference():
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} was made inside torch.inference_mode(), where tensors stay as they "
            "are made; make the model outside of it"
        )
    if "state1" in state and state["state1"].shape != shape:
        raise ValueError(
            f"a parameter now has shape {tuple(shape)}, its optimizer state was made for "
            f"{tuple(state['state1'].shape)}; delete it with `del optimizer.state[p]` to start anew"
        )


def check_layout(p: Tensor) -> None:
    """Raise ValueError where several elements of a (local) parameter are one in memory, as in an expanded view."""
    if any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} is an expanded view, whose elements share memory (strides "
            f"{p.stride()}), so that a step cannot change each; make it a parameter of its own by .clone()"
        )


def matrix_shape(p: Tensor) -> tuple[int, int]:
    """The view as a matrix: (shape[0], n / shape[0])."""
    rows = p.shape[0] if p.dim() else 1
    return rows, p.numel() // max(rows, 1)


def block_count(p: Tensor) -> int:
    return -(-p.numel() // BLOCK)


def probe_stride(elements: int) -> int:
    """Of how many blocks auto_lr watches one, in a group of so many elements: 32, or a larger power of two."""
    stride = PROBE_STRIDE
    while elements > stride * MAX_PROBED:
        stride *= 2
    return stride


def probe_count(blocks: int, stride: int) -> int:
    return -(-blocks // stride)


def stride_held(blocks: int, probes: int) -> int:
    """The stride of a tensor's probes, told by their number: the smallest that gives no more."""
    stride = LEAST_STRIDE
    while probes and probe_count(blocks, stride) > probes:
        stride *= 2
    return stride


def factors_well(p: Tensor, element_bytes: int, mean_bytes: int) -> bool:
    """Whether the row and column means of the tiles cost less than what an element takes otherwise, with a margin.

    Against codes they do from about 8 rows of 8 columns on. Beyond 2^19 strips a tile's blocks would lie too far apart
    for 32-bit offsets.
    """
    tiling = Tiling.of(p)
    means = tiling.rows + tiling.tiles * tiling.width
    is_cheaper = mean_bytes * means <= 0.75 * element_bytes * p.numel()
    return min(matrix_shape(p)) >= 4 and is_cheaper and tiling.strips <= 2**19


def storage_of(p: Tensor, options: dict[str, Any], embedding: bool = False) -> str:
    """One of `STORAGES`: how this parameter's moments are kept under these options."""
    stable = options["stable_emb"] and embedding and not options["force_8bit"]
    if not bnb.BITSANDBYTES_AVAILABLE or options["optim_bits"] == 32 or stable:
        return "32bit"
    small = p.numel() < options["min_8bit_size"] and not options["force_8bit"]
    if options["factored"] and factors_well(p, 4 if small else 1, options["mean_bits"] // 8):
        return "small_factored" if small else "factored"
    return "small" if small else "8bit"


def storage_held(state: State) -> str:
    """The storage that existing tensors are in."""
    coded = state["state1"].dtype == torch.uint8
    if "exp_avg_sq_row" in state:
        return "factored" if coded else "small_factored"
    if coded:
        return "8bit"
    # In 32 bits there is always a mask of numbers.
    numbers = "last_polarity" in state or ("lr_mask" in state and state["lr_mask"].is_floating_point())
    return "32bit" if numbers else "small"


def as_held(state: State, options: dict[str, Any]) -> dict[str, Any]:
    """The options with mask and means in the form that an existing state has them in; only a conversion changes it."""
    if "state1" not in state:
        return options
    means = state.get("exp_avg_sq_row")
    forms = {} if means is None else {"mean_bits": 16 if means.dtype == torch.bfloat16 else 32}
    if "lr_mask4" in state or "lr_mask" in state:
        forms["mask_bits"] = 4 if "lr_mask4" in state else 8
    elif "spatial_variance" not in state:
        forms["mask_bits"] = 0
    return {**options, **forms}


def pages(p: Tensor, paged: bool) -> bool:
    """Whether a paged optimizer keeps this parameter's element-wise states in managed memory."""
    return paged and paged_memory.exists_on(p.device) and p.numel() >= PAGED_MIN_SIZE


def empty_element_state(p: Tensor, dtype: torch.dtype, paged: bool, shape: tuple[int, ...] | None = None) -> Tensor:
    """An uninitialised contiguous tensor, by default shaped like p; in managed memory if `paged` and p is large and on
    CUDA."""
    shape = tuple(p.shape) if shape is None else shape
    if pages(p, paged):
        return paged_memory.empty(torch.Size(shape), dtype, p.device)
    return torch.empty(shape, dtype=dtype, device=p.device)


Recipes = dict[str, Callable[[], Tensor]]


def recipes(
    p: Tensor, storage: str, options: dict[str, Any], paged: bool = False, stride: int = PROBE_STRIDE
) -> Recipes:
    """How to make each tensor this parameter needs, at its starting value. Nothing larger is made on the way.

    Args:
        stride: of how many blocks auto_lr watches one, `probe_stride` of the group.
    """
    names = [name for name in KEYS if is_needed(name, p, storage, options)]
    dtypes = {name: dtype_of(name, p, storage, options) for name in names}
    return {name: functools.partial(_made, name, p, storage, dtypes[name], paged, stride) for name in names}


def _made(name: str, p: Tensor, storage: str, dtype: torch.dtype, paged: bool, stride: int) -> Tensor:
    key = KEYS[name]
    start = key.held[storage][1]
    if key.kind == "book":
        return bnb.code_book(name == "qmap1", p.device)
    if isinstance(start, tuple):
        return torch.tensor(start, dtype=dtype, device=p.device)
    shape = SHAPES[key.kind](p, stride)
    if name not in ELEMENT_KEYS:
        return torch.full(shape, start, dtype=dtype, device=p.device)
    tensor = empty_element_state(p, dtype, paged, shape)
    if paged_memory.is_paged(tensor):
        paged_memory.prefetch([tensor], torch.cuda.current_stream(tensor.device))
    return tensor.fill_(start)


def complete(
    state: State, p: Tensor, storage: str, options: dict[str, Any], paged: bool = False, stride: int = PROBE_STRIDE
) -> State:
    """Add to a state what it lacks under these options, at its starting value; a new state starts from {}."""
    options = as_held(state, options)
    for held in (state[name] for name in keys_of("probe", "span") if name in state):
        stride = stride_held(block_count(p), len(held))  # if one is missing, it is made to fit the other
    for name, make in recipes(p, storage, options, paged, stride).items():
        if name not in state:
            state[name] = make()
    if not keeps_residual(p, options):
        state.pop("master_residual", None)
    state.setdefault("step", 0)
    return state


def rounds_stochastically(p: Tensor, options: dict[str, Any]) -> bool:
    """Whether what is stored of θ is rounded at random."""
    return options["stochastic_rounding"] and p.dtype != torch.float32


def is_complete(state: State, p: Tensor, options: dict[str, Any]) -> bool:
    """Whether a state once completed still has all it needs, options having changed since."""
    if "state1" not in state or keeps_residual(p, options) != ("master_residual" in state):
        return False
    storage, options = storage_held(state), as_held(state, options)
    return all(name in state or not is_needed(name, p, storage, options) for name in KEYS)


def link_code_books(state: State, device: torch.device) -> None:
    """Point `qmap1` and `qmap2` at the code books all parameters share."""
    if storage_held(state) in CODED:
        state["qmap1"] = bnb.code_book(True, device)
        state["qmap2"] = bnb.code_book(False, device)


def state_bytes(state: State) -> int:
    """Bytes held for one parameter, the shared code books not counted."""
    return sum(v.nbytes for k, v in state.items() if isinstance(v, Tensor) and not k.startswith("qmap"))


def expected_shape(name: str, p: Tensor, length: int) -> tuple[int, ...]:
    """The shape a tensor of this name has for parameter p; the check of a loaded checkpoint.

    Args:
        length: that of the tensor there, which for probes may be one of several.
    """
    kind = KEYS[name].kind
    return SHAPES[kind](p, stride_held(block_count(p), length) if kind in ("probe", "span") else PROBE_STRIDE)


def between(state: State, p: Tensor, start: int, stop: int) -> State:
    """Views of a state's tensors between two elements of p, where a row, a block and its tiles begin and end.

    Args:
        start, stop: as `stretches` gives them. What is kept of the whole tensor comes as it is.
    """
    columns, tiling = matrix_shape(p)[1], Tiling.of(p)
    chunk = tiling.strips * tiling.height * BLOCK  # as many elements have `strips` tiles
    cuts = {
        "element": lambda x: x.view(-1)[start:stop].view(-1, columns),
        "pair": lambda x: x[start // 2 : -(-stop // 2)],
        "block": lambda x: x[start // BLOCK : -(-stop // BLOCK)],
        "row": lambda x: x[start // tiling.width : -(-stop // tiling.width)],
        "col": lambda x: x[start // chunk * tiling.strips : -(-stop // chunk) * tiling.strips],
    }
    kinds = {name: KEYS[name].kind if name in KEYS else "" for name in state}
    return {name: cuts[kinds[name]](value) if kinds[name] in cuts else value for name, value in state.items()}


CHUNK = 2**20
"""Elements of a stretch; more where a period of the tiling holds more."""


def stretches(p: Tensor, factored: bool) -> list[tuple[int, int]]:
    """Where to cut a parameter, from which element to which: about `CHUNK` at once, at ends of rows and blocks.

    Args:
        factored: cut where tiles end, too.
    """
    n = p.numel()
    if n == 0:
        return []
    tiling, period = Tiling.of(p), math.lcm(matrix_shape(p)[1], BLOCK)
    unit = period * (tiling.height if factored else 1)
    stride = unit * max(1, CHUNK // unit)
    # A rest shorter than a period has fewer strips, so its tiles would be numbered otherwise: it joins the part before.
    starts = [start for start in range(0, n, stride) if not factored or start == 0 or n - start >= period]
    return list(zip(starts, [*starts[1:], n], strict=True))
