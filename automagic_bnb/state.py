"""What one parameter stores: names, shapes, dtypes, the choice of storage, allocation.

| key | symbol | 32-bit | 8-bit | factored |
|---|---|---|---|---|
| `state1` | m, first moment | float32 [shape] | uint8 [shape] + `absmax1` | as 8-bit |
| `state2` | v, second moment | float32 [shape] | uint8 [shape] + `absmax2` | `exp_avg_sq_row`, `exp_avg_sq_col` |
| `state3` | r, confidence | float32 [shape] | uint8 [shape] + `absmax3` | `exp_avg_res_row`, `exp_avg_res_col` |
| `lr_mask` | k (and π) | float32 [shape] | uint8 [shape], π in bit 0 | as 8-bit |
| `last_polarity` | π | uint8 [shape] | – | – |
| `torque`, `edge_history`, `spatial_variance` | s, h, σ | float32 [blocks] | same | same |
| `tensor_stats` | see `STATS` | float32 [4] | same | same |
| `master_residual` | 8 bits below a bfloat16 θ | int8 [shape], with master="ecc8" | same | same |
| `gnorm_vec` | last 100 gradient norms | float32 [100], with percentile_clipping < 100 | same | same |
| `probe_start`, `probe_sum` | θ0, z of auto_lr | [probes, 256], θ's dtype and float32 | same | same |

`qmap1`, `qmap2` are bitsandbytes' code books, one tensor for all parameters of a device; `step` is an int. A block is
256 consecutive elements of the contiguous parameter; probes are every 16th of them, or fewer (`probe_stride`); the row
and column means are those of the tiles of `factored.Tiling`, float32 [rows] and [tiles, width].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from automagic_bnb import bnb
from automagic_bnb import paged as paged_memory
from automagic_bnb.factored import Tiling
from automagic_bnb.quantization import BLOCK

State = dict[str, Any]


class WatchedState(State):
    """A state of which it is known whether it has been changed.

    A LoRA's states are a thousand dictionaries of a dozen tensors each, and to look at all of them before a step takes
    nearly as long as the step. While nobody has put anything into a state or taken it out, they hold what they held.
    Whoever keeps a plain dictionary in its place only makes the kernels' plan look again each time.
    """

    __slots__ = ()
    changes: ClassVar[int] = 0
    """How often an entry of any of them has been set or taken out, but for `set_uncounted`."""


def _counted(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def change(state: WatchedState, *args: Any, **kwargs: Any) -> Any:
        WatchedState.changes += 1
        return method(state, *args, **kwargs)

    return change


for _name in ("__setitem__", "__delitem__", "__ior__", "update", "setdefault", "pop", "popitem", "clear"):
    setattr(WatchedState, _name, _counted(getattr(dict, _name)))


set_uncounted = dict.__setitem__
"""For `step`, which changes all the time: nothing that a plan would have to look for."""


MASK_MEAN, LR_NUMERATOR, LR_DENOMINATOR, SKIPPED = range(4)
STATS = (
    "W: mean of 2^(k/16) over the tensor",
    "auto_lr's numerator",
    "auto_lr's Σ|z|",
    "elements skipped so far because their gradient was not finite",
)
EMPTY_MASK = 64
"""The byte of k = 0 and π = 0: see `quantization.pack_mask`."""
PROBE_STRIDE = 16
"""auto_lr watches every 16th block; in a large group each of the watched stands for more."""
MAX_PROBED = 2**20
"""About how many elements of a group it watches at most; a tenth of them found no other rate (benchmarks/NOTES.md)."""
NORM_WINDOW = 100
"""Gradient norms remembered by percentile_clipping, as in bitsandbytes."""
PAGED_MIN_SIZE = 100_000
"""Elements from which a paged optimizer pages a state, as in bitsandbytes."""


def local_tensor(p: Tensor) -> Tensor:
    """The shard of a DTensor that lives here; any other tensor as it is."""
    return p.to_local() if hasattr(p, "to_local") else p  # type: ignore[attr-defined]


def checked_gradient(p: Tensor) -> Tensor:
    """The (local) gradient of a parameter that has one.

    Raises:
        RuntimeError: it is sparse.
    """
    assert p.grad is not None
    grad = local_tensor(p.grad)
    if grad.is_sparse:
        raise RuntimeError(
            f"the gradient of a parameter of shape {tuple(p.shape)} is sparse, which is not supported; "
            "build the embedding with sparse=False"
        )
    return grad


def check_shape(state: State, p: Tensor) -> None:
    """Raise ValueError where a state was made for a (local) parameter of another shape."""
    if "state1" in state and state["state1"].shape != p.shape:
        raise ValueError(
            f"a parameter now has shape {tuple(p.shape)}, its optimizer state was made for "
            f"{tuple(state['state1'].shape)}; delete it with `del optimizer.state[p]` to start anew"
        )


def matrix_shape(p: Tensor) -> tuple[int, int]:
    """The view as a matrix: (shape[0], n / shape[0])."""
    rows = p.shape[0] if p.dim() else 1
    return rows, p.numel() // max(rows, 1)


def block_count(p: Tensor) -> int:
    return -(-p.numel() // BLOCK)


def probe_stride(elements: int) -> int:
    """Of how many blocks auto_lr watches one, in a group of so many elements: 16, or a larger power of two."""
    stride = PROBE_STRIDE
    while elements > stride * MAX_PROBED:
        stride *= 2
    return stride


def probe_count(blocks: int, stride: int) -> int:
    return -(-blocks // stride)


def stride_held(blocks: int, probes: int) -> int:
    """The stride of a tensor's probes, told by their number: the smallest that gives no more."""
    stride = PROBE_STRIDE
    while probes and probe_count(blocks, stride) > probes:
        stride *= 2
    return stride


def factors_well(p: Tensor) -> bool:
    """Whether the row and column means of the tiles cost less than the byte an element that codes take, with a margin.

    They do from about 8 rows of 8 columns on. Beyond 2^19 strips a tile's blocks would lie too far apart for 32-bit
    offsets.
    """
    tiling = Tiling.of(p)
    means = tiling.rows + tiling.tiles * tiling.width
    return min(matrix_shape(p)) >= 8 and 4 * means <= 0.75 * p.numel() and tiling.strips <= 2**19


def storage_of(p: Tensor, options: dict[str, Any], embedding: bool = False) -> str:
    """ "32bit", "8bit" or "factored": how this parameter's moments are kept under these options."""
    small = p.numel() < options["min_8bit_size"]
    stable = options["stable_emb"] and embedding
    if not bnb.BITSANDBYTES_AVAILABLE or options["optim_bits"] == 32:
        return "32bit"
    if (small or stable) and not options["force_8bit"]:
        return "32bit"
    return "factored" if options["factored"] and factors_well(p) else "8bit"


def storage_held(state: State) -> str:
    """The storage that existing tensors are in."""
    if "exp_avg_sq_row" in state:
        return "factored"
    return "8bit" if state["state1"].dtype == torch.uint8 else "32bit"


def pages(p: Tensor, paged: bool) -> bool:
    """Whether a paged optimizer keeps this parameter's element-wise states in managed memory."""
    return paged and paged_memory.exists_on(p.device) and p.numel() >= PAGED_MIN_SIZE


def empty_element_state(p: Tensor, dtype: torch.dtype, paged: bool) -> Tensor:
    """An uninitialised contiguous tensor shaped like p; in managed memory if `paged` and large and on CUDA."""
    if pages(p, paged):
        return paged_memory.empty(p.shape, dtype, p.device)
    return torch.empty(p.shape, dtype=dtype, device=p.device)


def _element_state(p: Tensor, dtype: torch.dtype, fill: int, paged: bool) -> Tensor:
    tensor = empty_element_state(p, dtype, paged)
    if paged_memory.is_paged(tensor):
        paged_memory.prefetch([tensor], torch.cuda.current_stream(tensor.device))
    return tensor.fill_(fill)


Recipes = dict[str, Callable[[], Tensor]]


def recipes(
    p: Tensor, storage: str, options: dict[str, Any], paged: bool = False, stride: int = PROBE_STRIDE
) -> Recipes:
    """How to make each tensor this parameter needs, at its starting value. Nothing larger is made on the way.

    Args:
        stride: of how many blocks auto_lr watches one, `probe_stride` of the group.
    """
    blocks, device = block_count(p), p.device
    made = _moment_recipes(p, storage, options, paged)
    if storage == "32bit":
        made["lr_mask"] = lambda: _element_state(p, torch.float32, 0, paged)
        made["last_polarity"] = lambda: _element_state(p, torch.uint8, 0, paged)
    else:
        made["lr_mask"] = lambda: _element_state(p, torch.uint8, EMPTY_MASK, paged)
    if keeps_residual(p, options):
        made["master_residual"] = lambda: _element_state(p, torch.int8, 0, paged)
    for name, start in (("torque", 0.0), ("edge_history", 0.0), ("spatial_variance", 1.0)):
        made[name] = lambda start=start: torch.full((blocks,), start, device=device)
    made["tensor_stats"] = lambda: torch.tensor([1.0] + [0.0] * (len(STATS) - 1), device=device)
    if options["percentile_clipping"] < 100:
        made["gnorm_vec"] = lambda: torch.zeros(NORM_WINDOW, device=device)
    if options["auto_lr"]:
        made["probe_start"] = lambda: probe_blocks(p.detach().reshape(-1), stride).clone()
        made["probe_sum"] = lambda: torch.zeros(probe_count(blocks, stride), BLOCK, device=device)
    return made


def _moment_recipes(p: Tensor, storage: str, options: dict[str, Any], paged: bool) -> Recipes:
    blocks, device, tiling = block_count(p), p.device, Tiling.of(p)
    numbers = [1, 2, 3] if options["came"] else [1, 2]
    if storage == "32bit":
        return {f"state{i}": lambda: _element_state(p, torch.float32, 0, paged) for i in numbers}
    made: Recipes = {}
    if storage == "factored":
        for name in ("exp_avg_sq", "exp_avg_res")[: len(numbers) - 1]:
            made[f"{name}_row"] = lambda: torch.zeros(tiling.rows, device=device)
            made[f"{name}_col"] = lambda: torch.zeros(tiling.tiles, tiling.width, device=device)
        numbers = [1]
    for i in numbers:
        made[f"state{i}"] = lambda: _element_state(p, torch.uint8, 0, paged)
        made[f"absmax{i}"] = lambda: torch.zeros(blocks, device=device)
    made["qmap1"] = lambda: bnb.code_book(True, device)
    made["qmap2"] = lambda: bnb.code_book(False, device)
    return made


def complete(
    state: State, p: Tensor, storage: str, options: dict[str, Any], paged: bool = False, stride: int = PROBE_STRIDE
) -> State:
    """Add to a state what it lacks under these options, at its starting value; a new state starts from {}."""
    for held in (state[name] for name in ("probe_start", "probe_sum") if name in state):
        stride = stride_held(block_count(p), len(held))  # if one is missing, it is made to fit the other
    for name, make in recipes(p, storage, options, paged, stride).items():
        if name not in state:
            state[name] = make()
    if not keeps_residual(p, options):
        state.pop("master_residual", None)
    state.setdefault("step", 0)
    return state


def keeps_residual(p: Tensor, options: dict[str, Any]) -> bool:
    """Whether θ has 8 more bits in the state."""
    return options["master"] == "ecc8" and p.dtype == torch.bfloat16


def rounds_stochastically(p: Tensor, options: dict[str, Any]) -> bool:
    """Whether what is stored of θ is rounded at random."""
    if p.dtype == torch.bfloat16 and options["master"] == "none":
        return False
    return options["stochastic_rounding"] and p.dtype != torch.float32


def is_complete(state: State, p: Tensor, options: dict[str, Any]) -> bool:
    """Whether a state once completed still has all it needs, options having changed since."""
    return (
        "tensor_stats" in state
        and keeps_residual(p, options) == ("master_residual" in state)
        and (not options["came"] or "state3" in state or "exp_avg_res_row" in state)
        and (options["percentile_clipping"] == 100 or "gnorm_vec" in state)
        and (not options["auto_lr"] or "probe_sum" in state)
    )


def link_code_books(state: State, device: torch.device) -> None:
    """Point `qmap1` and `qmap2` at the code books all parameters share."""
    if storage_held(state) != "32bit":
        state["qmap1"] = bnb.code_book(True, device)
        state["qmap2"] = bnb.code_book(False, device)


def probe_blocks(flat: Tensor, stride: int) -> Tensor:
    """Every `stride`-th block of a flat tensor, [probes, 256], zeros beyond its end."""
    n = flat.numel()
    span = BLOCK * stride
    whole = n // span
    blocks = flat[: whole * span].view(whole, span)[:, :BLOCK]
    rest = flat[whole * span :][:BLOCK]
    if rest.numel():
        rest = torch.nn.functional.pad(rest, (0, BLOCK - rest.numel()))
        blocks = torch.cat([blocks, rest[None]])
    return blocks


def state_bytes(state: State) -> int:
    """Bytes held for one parameter, the shared code books not counted."""
    return sum(v.nbytes for k, v in state.items() if isinstance(v, Tensor) and not k.startswith("qmap"))


def expected_shape(name: str, p: Tensor, length: int) -> tuple[int, ...]:
    """The shape a tensor of this name has for parameter p; the check of a loaded checkpoint.

    Args:
        length: that of the tensor there, which for probes may be one of several.
    """
    if name in ELEMENT_KEYS:
        return tuple(p.shape)
    if name.endswith("_row"):
        return (Tiling.of(p).rows,)
    if name.endswith("_col"):
        return (Tiling.of(p).tiles, Tiling.of(p).width)
    fixed = {"tensor_stats": len(STATS), "gnorm_vec": NORM_WINDOW, "qmap1": 256, "qmap2": 256}
    if name in fixed:
        return (fixed[name],)
    if name.startswith("probe_"):
        return (probe_count(block_count(p), stride_held(block_count(p), length)), BLOCK)
    return (block_count(p),)


ELEMENT_KEYS = frozenset(["state1", "state2", "state3", "lr_mask", "last_polarity", "master_residual"])
"""The tensors shaped like the parameter: the ones that a paged optimizer pages."""
TENSOR_KEYS = ELEMENT_KEYS | frozenset(
    [
        "absmax1",
        "absmax2",
        "absmax3",
        "qmap1",
        "qmap2",
        "exp_avg_sq_row",
        "exp_avg_sq_col",
        "exp_avg_res_row",
        "exp_avg_res_col",
        "torque",
        "edge_history",
        "spatial_variance",
        "tensor_stats",
        "gnorm_vec",
        "probe_start",
        "probe_sum",
    ]
)
"""Every tensor that a parameter's state may hold."""
