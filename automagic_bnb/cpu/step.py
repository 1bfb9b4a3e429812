"""One parameter's step by Numba: what is handed to it, and for which parameters that is worth the compilation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

import numpy as np
import torch
from torch import Tensor

from automagic_bnb import bnb, direction, estimate, reference
from automagic_bnb import quantization as q
from automagic_bnb import state as st
from automagic_bnb.factored import Tiling
from automagic_bnb.scalars import Scalars
from automagic_bnb.stored import FACTORED_NAMES, highest_exponent, mask_spacing

if TYPE_CHECKING:
    from automagic_bnb.cpu import compiled

CONSTANTS: dict[str, Any] = {
    **{name: getattr(reference, name) for name in (
        "MAX_GRADIENT", "MAX_EDGE", "MIN_RESIDUAL", "MIN_CAUTIOUS_SHARE", "K_MIN", "OCTAVE", "MIN_CHANGE", "MAX_CHANGE",
        "LAPLACIAN_NOISE", "MIN_EDGE_FACTOR", "SILENCE", "BACKGROUND_ACTIVITY", "BACKGROUND_FACTOR",
    )},
    **{name: getattr(q, name) for name in ("LAST_CODE", "TINY_ABSMAX", "NO_SIGN")},
    **{name: getattr(st, name) for name in (
        "MASK_MEAN", "LR_NUMERATOR", "LR_DENOMINATOR", "SKIPPED", "PROBE_FREE", "PROBE_CLAIM", "PROBE_TURN",
    )},
    "STATISTIC_GAIN": 1 - reference.STATISTIC_DECAY,
    "LEAST_MOMENTUM": estimate.LEAST_MOMENTUM,
    "TINY": q.FLOAT_TINY,
}  # fmt: skip
"""The rule's."""


class Numbers(NamedTuple):
    """What a step is told besides arrays and the rule's constants."""

    beta1: float
    beta2: float
    beta3: float
    gain1: float  # 1 - beta1, and so on
    gain2: float
    gain3: float
    correction1: float
    correction2: float
    correction3: float
    eps1: float
    eps2: float
    clip_threshold: float
    frequency: float  # by which the Laplacian is added
    edge_penalty: float
    edge_threshold: float
    detail: float
    kappa: float
    mean: float  # the rate of an element whose factor is 1, and the bounds of an element's
    low: float
    high: float
    weight_decay: float
    k_max: float
    spacing: float  # of k
    most: float  # the largest number of θ's dtype
    n: int
    rows: int  # of a slice
    columns: int
    width: int  # of a tile, and so on: see `factored.Tiling`
    strips: int
    height: int
    tiles: int
    stride: int  # of how many blocks one is watched
    turn: int  # t modulo 2
    mask_bits: int
    rounding: int
    spatial: bool
    edges: bool
    torque: bool
    came: bool
    cautious: bool
    background: bool
    aware: bool
    learn: bool
    adapt: bool
    auto: bool
    short_means: bool
    key: np.uint32


_KINDS = {**{name: type(value) for name, value in CONSTANTS.items()}, **get_type_hints(Numbers)}
NUMBERS = np.dtype([(name, np.float32 if kind is float else kind) for name, kind in _KINDS.items()], align=True)
"""Of what the compiled step takes as one record."""
_CONSTANTS = tuple(CONSTANTS.values())


LEAST_WORK = 2**20
"""Elements that plain PyTorch steps in about a second: as long as it takes to import Numba and what it keeps on disk.
Before an optimizer has stepped so many, in all of its steps, nothing is compiled for it."""


@functools.cache
def missing() -> str:
    """Why Numba cannot be used here, or the empty string; imports it, which takes half a second."""
    try:
        import numba  # noqa: F401
    except Exception as e:  # of another version than its own numpy's or Python's it raises what it likes
        return f"Numba could not be imported ({e})"
    return ""


def takes(p: Tensor, backend: str | None, t: int, elements: Callable[[], int]) -> bool:
    """Whether the compiled step updates this (local) parameter; a resumed run chooses as the uninterrupted one does.

    Args:
        t: which of this parameter's steps it is.
        elements: called for the number of elements of all of the optimizer's parameters.

    Raises:
        RuntimeError: backend="numba" was asked for and cannot run here.
    """
    if backend == "numba":
        if p.device.type != "cpu":
            raise RuntimeError(f"option backend='numba': a parameter is on {p.device}; it steps those on the CPU")
        if reason := missing():
            raise RuntimeError(f"option backend='numba': {reason}; `pip install automagic-bnb[cpu]` brings it")
        return True
    return backend is None and p.device.type == "cpu" and t * elements() >= LEAST_WORK and not missing()


def update_parameter(
    p: Tensor,
    grad: Tensor,
    state: st.State,
    options: dict[str, Any],
    s: Scalars,
    d: Tensor | None = None,
    watch: Callable[..., None] | None = None,
) -> None:
    """`reference.update_parameter` of a parameter on the CPU."""
    from automagic_bnb.cpu import compiled

    grad = clipped(grad, state, options)
    arrays, directed = Arrays(state), direction.is_directed(p, options, s.is_lora)
    n = torch.empty(p.numel() if directed else 0, dtype=torch.float32)
    numbers = numbers_of(p, arrays.state, options, s, d, compiled)
    held = held_of(arrays, p, grad, n, compiled)
    mask_mean = compiled.update(numbers, held)
    if directed:
        n.copy_(direction.orthogonal(n.view(1, *p.shape)).view(-1))
        compiled.move(numbers, held, np.float32(mask_mean))
    arrays.write_back()


def clipped(grad: Tensor, state: st.State, options: dict[str, Any]) -> Tensor:
    """The gradient in float32, under percentile_clipping scaled; what is to be skipped stays unusable."""
    if options["percentile_clipping"] >= 100:
        return grad.float()
    g, keep = reference.usable(grad)
    scale = reference.clip_scale(g, state["gnorm_vec"], state["step"], options["percentile_clipping"])
    return torch.where(keep, g * scale, torch.nan)


# --- arrays -----------------------------------------------------------------------------------------------------------

EMPTY = {dtype: np.empty(0, dtype) for dtype in (np.float32, np.uint8, np.int8, np.int32)}
FACTORS = np.exp2(np.arange(q.LEAST_EXPONENT, q.HIGHEST_EXPONENT + 1, dtype=np.float32) / np.float32(reference.OCTAVE))
"""2^(k/16) of the whole k."""
NARROW = frozenset([torch.bfloat16, torch.float16])
MOMENTS = {
    number: (
        f"state{number}",
        f"absmax{number}",
        book,
        *(f"{FACTORED_NAMES.get(number)}_{kind}" for kind in ("row", "col")),
    )
    for number, book in ((1, "qmap1"), (2, "qmap2"), (3, "qmap2"))
}
"""Where moments are kept in a state."""


@functools.cache
def cells_of(signed: bool) -> np.ndarray:
    """uint8 [2^16]: the codes to begin with where numbers are encoded, see `compiled.encode`."""
    book = bnb.code_book(signed, torch.device("cpu")).numpy()
    halves = np.arange(2**16, dtype=np.uint32) << 16
    least = np.stack([halves, halves | 0xFFFF]).view(np.float32).min(axis=0)
    return np.clip(np.searchsorted(book, least, side="right") - 1, 0, q.LAST_CODE - 1).astype(np.uint8)


class Arrays:
    """The tensors of a state as flat arrays."""

    def __init__(self, state: st.State) -> None:
        self.state = state
        self.copies: list[tuple[Tensor, Tensor]] = []

    def of(self, tensor: Tensor) -> np.ndarray:
        """A tensor's memory; of narrow floats a copy in float32, which `write_back` brings there."""
        if tensor.dtype in NARROW:
            copy = tensor.float()
            self.copies.append((tensor, copy))
            tensor = copy
        return tensor.view(-1).numpy()

    def held(self, name: str, dtype: type = np.float32) -> np.ndarray:
        """A key of the state, in the dtype that it has there unless it is a narrow float; empty where it has none."""
        tensor = dict.get(self.state, name)
        return EMPTY[dtype] if tensor is None else self.of(tensor)

    def moment(self, number: int, compiled: Any) -> compiled.Moment:
        name, absmax, book, row, col = MOMENTS[number]
        values = self.held(name)
        coded = values.dtype == np.uint8
        return compiled.Moment(
            values=EMPTY[np.float32] if coded else values,
            codes=values if coded else EMPTY[np.uint8],
            absmax=self.held(absmax),
            book=self.held(book),
            cells=cells_of(number == 1) if coded else EMPTY[np.uint8],
            row=self.held(row),
            col=self.held(col),
            random=number > 1,
        )

    def write_back(self) -> None:
        for tensor, copy in self.copies:
            most = torch.finfo(tensor.dtype).max
            tensor.copy_(copy.clamp_(-most, most))


def held_of(arrays: Arrays, p: Tensor, grad: Tensor, n: Tensor, compiled: Any) -> compiled.Held:
    whole = mask_bits(arrays.state) == 32
    return compiled.Held(
        theta=arrays.of(p.detach()),
        low=arrays.held("master_residual", np.int8),
        grad=grad.view(-1).numpy(),
        m=arrays.moment(1, compiled),
        v=arrays.moment(2, compiled),
        r=arrays.moment(3, compiled),
        mask=EMPTY[np.uint8] if whole else arrays.held(mask_name(arrays.state), np.uint8),
        exponents=arrays.held("lr_mask") if whole else EMPTY[np.float32],
        polarity=arrays.held("last_polarity", np.uint8),
        factors=FACTORS,
        torque=arrays.held("torque"),
        edge_history=arrays.held("edge_history"),
        spatial_variance=arrays.held("spatial_variance"),
        stats=arrays.held("tensor_stats"),
        probe_block=arrays.held("probe_block", np.int32),
        probe_start=arrays.held("probe_start"),
        direction=n.numpy(),
    )


def mask_name(state: st.State) -> str:
    return "lr_mask4" if "lr_mask4" in state else "lr_mask"


def mask_bits(state: st.State) -> int:
    """Of an element's exponent and sign: 0 where elements have no rates of their own."""
    mask = state.get(mask_name(state))
    return 0 if mask is None else 32 if mask.dtype == torch.float32 else 4 if "lr_mask4" in state else 8


# --- numbers ----------------------------------------------------------------------------------------------------------


def numbers_of(p: Tensor, state: st.State, options: dict[str, Any], s: Scalars, d: Tensor | None, compiled: Any) -> Any:
    """`NUMBERS` [1] of a step."""
    mean, low, high = rates(s, d)
    spacing = mask_spacing(state)
    blocks, tiling = st.block_count(p), None
    if st.storage_held(state) in st.FACTORED:
        tiling = Tiling.of(p)
    numbers = Numbers(
        beta1=s.beta1,
        beta2=s.beta2,
        beta3=s.beta3,
        gain1=1 - s.beta1,
        gain2=1 - s.beta2,
        gain3=1 - s.beta3,
        correction1=s.correction1,
        correction2=s.correction2,
        correction3=s.correction3,
        eps1=max(options["eps"][0], reference.LEAST_EPS1),
        eps2=options["eps"][1],
        clip_threshold=options["clip_threshold"],
        frequency=options["frequency_penalty"] / reference.LAPLACIAN_RANGE,
        edge_penalty=options["edge_penalty"],
        edge_threshold=options["edge_threshold"],
        detail=options["detail_preservation"],
        kappa=s.kappa,
        mean=mean,
        low=low,
        high=high,
        weight_decay=options["weight_decay"],
        k_max=highest_exponent(spacing),
        spacing=spacing,
        most=torch.finfo(p.dtype).max,
        n=p.numel(),
        rows=p.shape[-2] if p.dim() > 1 else 1,
        columns=p.shape[-1] if p.dim() else 1,
        # In other storages blocks come one after the other.
        width=q.BLOCK if tiling is None else tiling.width,
        strips=1 if tiling is None else tiling.strips,
        height=blocks if tiling is None else tiling.height,
        tiles=1 if tiling is None else tiling.tiles,
        stride=st.stride_held(blocks, len(state["probe_block"])) if d is not None else 1,
        turn=state["step"] % 2,
        mask_bits=mask_bits(state),
        rounding=rounding(p, state, options, compiled),
        spatial=reference.is_spatial(p, options),
        edges=options["edge_suppression"],
        torque=options["torque"],
        came=options["came"],
        cautious=options["cautious"],
        background=options["background_regularization"],
        aware=options["spatial_awareness"],
        learn=s.learn_polarity,
        adapt=s.adapt_mask,
        auto=d is not None,
        short_means=tiling is not None and state["exp_avg_sq_row"].dtype == torch.bfloat16,
        key=np.uint32(s.rounding_key),
    )
    return np.array([_CONSTANTS + numbers], dtype=NUMBERS)


_rates: dict[tuple[Any, ...], tuple[float, ...]] = {}
"""The last of `rates`, which most parameters of a step share."""


def rates(s: Scalars, d: Tensor | None) -> tuple[float, ...]:
    """The rate of an element whose factor is 1, and between which an element's stays."""
    key = s.rate, s.low, s.high, None if d is None else d.item()
    if key not in _rates:
        mean = reference.mean_rate(s, d, torch.device("cpu"))
        _rates.clear()
        _rates[key] = tuple(x.item() for x in (mean, *reference.rate_bounds(mean, s)))
    return _rates[key]


def rounding(p: Tensor, state: st.State, options: dict[str, Any], compiled: Any) -> int:
    stochastic = st.rounds_stochastically(p, options)
    if "master_residual" in state:
        return compiled.ECC if stochastic else compiled.ECC_NEAREST
    if not stochastic:
        return compiled.NEAREST
    return compiled.BFLOAT16 if p.dtype == torch.bfloat16 else compiled.FLOAT16
