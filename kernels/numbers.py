"""The numbers of a step worked out on the device, where a replayed CUDA graph counts: `capturable=True`.

What the host says of a step that may be replayed is what stands in its groups: a row for each source of options. Step
count, bias corrections, random keys and what is due in a step follow from the count, which is kept here; equals
`scalars.step_scalars`. A gradient that torch's GradScaler found not to be finite leaves all as it is, the count too.
"""

from __future__ import annotations

import functools
from enum import IntEnum
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from automagic_bnb.kernels import codec
from automagic_bnb.kernels import low_rank as ranks
from automagic_bnb.kernels.launching import Compiled
from automagic_bnb.kernels.tables import Bucket, Number, upload
from torch import Tensor

from automagic_bnb import config, estimate, low_rank, reference, scalars
from automagic_bnb import state as st


class Fixed(IntEnum):
    """What is known of each tensor when its bucket is filled, int64."""

    SOURCE = 0
    IS_LORA = 1
    KEY = 2  # of the random bits, but for the step
    RANK_KEY = 3
    RANK_ENTRY = 4  # the address of its row in the table of step 9; 0 for none


class Source(IntEnum):
    """What the options say, int64: the bits of a float64 where nothing else is said."""

    LR = 0
    LR_AT = 1  # the address of a float32, which then counts in place of LR; 0 for none
    BASE = 2
    PEAK_AT = 3  # the address of a float32, the highest lr of a schedule under which a rate is found; 0 for none
    NAMED_PEAK = 4
    AUTO = 5  # a whole number, as the next two
    WARMUP = 6
    PERCENTILE = 7
    MIN_LR = 8
    MAX_LR = 9  # below 0: none
    WEIGHT_DECAY = 10
    EMPHASIS = 11
    BETA1 = 12
    BETA2 = 13
    BETA3 = 14
    STRENGTH = 15  # of the rank penalty; 0 where it is off


_F = {column.name: tl.constexpr(int(column)) for column in Fixed}
F_SOURCE, F_LORA, F_KEY, F_RANK_KEY, F_ENTRY = (_F[column.name] for column in Fixed)
_S = {column.name: tl.constexpr(int(column)) for column in Source}
S_LR, S_LR_AT, S_BASE, S_PEAK_AT, S_NAMED = _S["LR"], _S["LR_AT"], _S["BASE"], _S["PEAK_AT"], _S["NAMED_PEAK"]
S_AUTO, S_WARMUP, S_PERCENTILE, S_MIN, S_MAX = (
    _S["AUTO"], _S["WARMUP"], _S["PERCENTILE"], _S["MIN_LR"], _S["MAX_LR"]
)  # fmt: skip
S_DECAY, S_EMPHASIS, S_STRENGTH = _S["WEIGHT_DECAY"], _S["EMPHASIS"], _S["STRENGTH"]
S_BETA1, S_BETA2, S_BETA3 = _S["BETA1"], _S["BETA2"], _S["BETA3"]
_N = {number.name: tl.constexpr(int(number)) for number in Number}
N_RATE, N_LOW, N_HIGH, N_DECAY, N_KAPPA = _N["RATE"], _N["LOW"], _N["HIGH"], _N["WEIGHT_DECAY"], _N["KAPPA"]
N_CORRECTION1, N_CORRECTION2, N_CORRECTION3 = _N["CORRECTION1"], _N["CORRECTION2"], _N["CORRECTION3"]
N_ADAPT, N_LEARN, N_KEY, N_TURN = _N["ADAPT_MASK"], _N["LEARN_POLARITY"], _N["KEY"], _N["TURN"]
N_SLOT, N_PERCENTILE = _N["NORM_SLOT"], _N["PERCENTILE"]
_FIXED, _SOURCE, _NUMBERS = tl.constexpr(len(Fixed)), tl.constexpr(len(Source)), tl.constexpr(len(Number))
R_KEY, R_THRESHOLD = tl.constexpr(int(ranks.Column.KEY)), tl.constexpr(int(ranks.Column.THRESHOLD))
MAX_LR_RATIO, PEAK_RATIO = tl.constexpr(config.MAX_LR_RATIO), tl.constexpr(scalars.PEAK_RATIO)
MAX_GRADIENT = tl.constexpr(reference.MAX_GRADIENT)
NORM_WINDOW, LOW_RANK_EVERY = tl.constexpr(st.NORM_WINDOW), tl.constexpr(low_rank.LOW_RANK_EVERY)

ERRORS = 4096
"""Steps after which a search's error no longer changes: 0.99^(2t) is below half a unit of float32 from t = 830 on."""
_LAST_ERROR = tl.constexpr(ERRORS - 1)


@triton.jit
def _real(source_ptr, column: tl.constexpr):
    return tl.load(source_ptr + column).to(tl.float64, bitcast=True)


@triton.jit
def _power(base, exponent):
    """float64 base to an int64 exponent, by squaring: the same on every device."""
    result = base * 0 + 1
    while exponent > 0:
        result = tl.where((exponent & 1) != 0, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def _mix_in(key, word):
    """`quantization.mix_in`: a uint32 key with an int64 mixed in."""
    low, high = (word & 0xFFFFFFFF).to(tl.uint32), (word >> 32).to(tl.uint32)
    return codec.mix(codec.mix(key ^ low) + 0x9E3779B9 ^ high) + 0x9E3779B9


@triton.jit
def _rates(source_ptr):
    """lr and its share of the base rate, float64: see `scalars.base_rate`."""
    lr, at = _real(source_ptr, S_LR), tl.load(source_ptr + S_LR_AT)
    if at != 0:
        lr = tl.load(at.to(tl.pointer_type(tl.float32))).to(tl.float64)
    base, peak_at = _real(source_ptr, S_BASE), tl.load(source_ptr + S_PEAK_AT)
    if peak_at != 0:
        peak = tl.load(peak_at.to(tl.pointer_type(tl.float32))).to(tl.float64)
        highest = tl.maximum(tl.maximum(lr, peak), _real(source_ptr, S_NAMED))
        base = tl.where(highest > base * PEAK_RATIO, highest, base)
    return lr, tl.where(base > 0, lr / tl.where(base > 0, base, 1), 0)


@triton.jit
def numbers_kernel(
    fixed_ptr, sources_ptr, counts_ptr, grads_ptr, found_inf_ptr, grad_scale_ptr, stepped_ptr, numbers_ptr, clips_ptr,
    FOUND_INF: tl.constexpr, GRAD_SCALE: tl.constexpr,
):  # fmt: skip
    """Count the step of each tensor with a gradient, and write its row of numbers.

    Args:
        fixed_ptr: int64 [tensors, Fixed]; sources_ptr: int64 [sources, Source].
        counts_ptr: int64 [tensors], the steps taken, in place.
        grads_ptr: int64 [tensors], addresses of the gradients.
        found_inf_ptr, grad_scale_ptr: float32 [1], torch's GradScaler's, where FOUND_INF and GRAD_SCALE say so.
        stepped_ptr: int64 [tensors] out, the addresses, 0 where no step is taken.
        numbers_ptr: float32 [tensors, Number] out.
        clips_ptr: float32 [tensors, 2] out, by what gradients are multiplied, and above what they are skipped.
    """
    row = tl.program_id(0).to(tl.int64)
    fixed, numbers = fixed_ptr + row * _FIXED, numbers_ptr + row * _NUMBERS
    source_ptr = sources_ptr + tl.load(fixed + F_SOURCE) * _SOURCE
    address = tl.load(grads_ptr + row)
    if FOUND_INF:
        address = tl.where(tl.load(found_inf_ptr) != 0, 0, address)
    tl.store(stepped_ptr + row, address)
    t = tl.load(counts_ptr + row) + tl.where(address != 0, 1, 0)
    tl.store(counts_ptr + row, t)
    if GRAD_SCALE:
        scale = tl.load(grad_scale_ptr)
        tl.store(clips_ptr + 2 * row, 1.0 / scale)
        tl.store(clips_ptr + 2 * row + 1, scale * MAX_GRADIENT)

    lr, relative = _rates(source_ptr)
    rate = tl.where(tl.load(source_ptr + S_AUTO) != 0, relative, lr)
    high = _real(source_ptr, S_MAX)
    tl.store(numbers + N_RATE, rate.to(tl.float32))
    tl.store(numbers + N_LOW, (_real(source_ptr, S_MIN) * relative).to(tl.float32))
    tl.store(numbers + N_HIGH, tl.where(high < 0, -MAX_LR_RATIO, high * relative).to(tl.float32))
    tl.store(numbers + N_DECAY, _real(source_ptr, S_DECAY).to(tl.float32))
    emphasis = _real(source_ptr, S_EMPHASIS)
    tl.store(numbers + N_KAPPA, tl.where(tl.load(fixed + F_LORA) != 0, emphasis, 1).to(tl.float32))

    power = tl.maximum(t, 1)
    tl.store(numbers + N_CORRECTION1, (1 / (1 - _power(_real(source_ptr, S_BETA1), power))).to(tl.float32))
    tl.store(numbers + N_CORRECTION2, tl.sqrt(1 - _power(_real(source_ptr, S_BETA2), power)).to(tl.float32))
    tl.store(numbers + N_CORRECTION3, (1 - _power(_real(source_ptr, S_BETA3), power)).to(tl.float32))

    warm = power <= tl.load(source_ptr + S_WARMUP)
    tl.store(numbers + N_ADAPT, (warm & (t >= 2)).to(tl.float32))
    tl.store(numbers + N_LEARN, warm.to(tl.float32))
    tl.store(numbers + N_TURN, (t % 2).to(tl.float32))
    tl.store(numbers + N_SLOT, ((power - 1) % NORM_WINDOW).to(tl.float32))
    tl.store(numbers + N_PERCENTILE, tl.load(source_ptr + S_PERCENTILE).to(tl.float32))
    key = _mix_in(tl.load(fixed + F_KEY).to(tl.uint32), t)
    tl.store((numbers + N_KEY).to(tl.pointer_type(tl.uint32)), key)

    entry = tl.load(fixed + F_ENTRY)
    if entry != 0:
        entry_ptr = entry.to(tl.pointer_type(tl.int64))
        threshold = (rate * LOW_RANK_EVERY * _real(source_ptr, S_STRENGTH)).to(tl.float32)
        threshold = tl.where((address != 0) & (t % LOW_RANK_EVERY == 0), threshold, 0.0)
        tl.store(entry_ptr + R_THRESHOLD, threshold.to(tl.int32, bitcast=True).to(tl.int64))
        rank_key = _mix_in(tl.load(fixed + F_RANK_KEY).to(tl.uint32), t)
        tl.store(entry_ptr + R_KEY, rank_key.to(tl.int64))


@triton.jit(do_not_specialize=["last"])
def _search_kernel(count_ptr, errors_ptr, found_inf_ptr, error_ptr, last, FOUND_INF: tl.constexpr):
    """Count a step of a search, and write its error, or -1 where nothing is to be estimated."""
    t = tl.load(count_ptr) + 1
    stays = (t <= 0) | ((last >= 0) & (t > last))
    if FOUND_INF:
        found = tl.load(found_inf_ptr) != 0
        t -= tl.where(found, 1, 0)
        stays = stays | found
    tl.store(count_ptr, t)
    error = tl.load(errors_ptr + tl.minimum(tl.maximum(t, 0), _LAST_ERROR))
    tl.store(error_ptr, tl.where(stays, -1.0, error))


_compiled = Compiled()


@functools.cache
def _errors(device: torch.device) -> Tensor:
    return upload(np.array([estimate.sign_error(t) for t in range(ERRORS)], dtype=np.float32), device)


def count_search(count: Tensor, last: int | None, found_inf: Tensor | None) -> Tensor:
    """Count a step of a search on the device.

    Args:
        count: int64 0-d, in place.
        last: the step after which d stays; None: none.
        found_inf: float32 [1] or 0-d; where it is not 0, nothing is counted.

    Returns:
        float32 [1], the error of its estimate, below 0 where there is to be none.
    """
    error = torch.empty(1, dtype=torch.float32, device=count.device)
    checked = found_inf is not None
    arguments = {
        "count_ptr": count,
        "errors_ptr": _errors(count.device),
        "found_inf_ptr": found_inf if checked else error,
        "error_ptr": error,
        "last": -1 if last is None else last,
        "FOUND_INF": checked,
    }
    _compiled.launch(_search_kernel, 1, arguments, num_warps=1)
    return error


class Counts:
    """The steps of a bucket's tensors, counted on the device, and what follows from them.

    Raises:
        ValueError: step 9 of some matrix is not the kernel's; plain PyTorch would wait for it.
    """

    def __init__(self, bucket: Bucket, matrices: ranks.Matrices, sources: list[dict[str, Any]]) -> None:
        self.bucket, self.matrices = bucket, matrices
        device = bucket.spec.device
        fixed = np.zeros((len(bucket.members), len(Fixed)), dtype=np.int64)
        fixed[:, Fixed.SOURCE] = [m.source for m in bucket.members]
        fixed[:, Fixed.IS_LORA] = bucket.lora
        fixed[:, Fixed.KEY] = bucket.keys.astype(np.int64)
        self.tables = self._rank_tables(fixed, sources)
        self.fixed = upload(fixed, device)
        self.counts = upload(bucket.counted(), device)
        self.spare: Tensor | None = None
        """Pinned memory for the next capture, which must not ask for any."""
        self.captured: list[Tensor] = []
        """What the replays of captured graphs upload again."""
        self.upload_bytes = 8 * (len(fixed) + len(sources) * len(Source))

    def _rank_tables(self, fixed: np.ndarray, sources: list[dict[str, Any]]) -> dict[int, Tensor]:
        """By RANK, the table of step 9's matrices; `fixed` is told where each one's row lies."""
        matrices = self.matrices
        on = np.array([options["lora_rank_penalty"] for options in sources], dtype=bool)[matrices.sources]
        if (matrices.ranks[on] == 0).any():
            raise ValueError(
                "option capturable=True: the rank penalty of a LoRA matrix whose shorter side is above "
                f"{ranks.MAX_RANK}, or with master='ecc8', runs in plain PyTorch, which waits for the GPU; pass "
                "lora_rank_penalty=False"
            )
        tables = {}
        for rank in np.unique(matrices.ranks[on]):
            chosen = np.flatnonzero(on & (matrices.ranks == rank))
            table = tables[int(rank)] = upload(matrices.table[chosen], self.bucket.spec.device)
            rows = matrices.rows[chosen]
            fixed[rows, Fixed.RANK_KEY] = matrices.keys[chosen].astype(np.int64)
            fixed[rows, Fixed.RANK_ENTRY] = table.data_ptr() + 8 * table.shape[1] * np.arange(len(chosen))
        return tables

    def is_warm(self, sources: list[dict[str, Any]]) -> bool:
        """Whether some mask may move, now or in a replay."""
        return any(sources[i]["warmup_steps"] > 0 for i in self.bucket.sources)

    def begin(
        self, grads: np.ndarray, sources: list[dict[str, Any]], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Count the step that comes.

        Args:
            grads: int64, each member's gradient's address, 0 for none.
            sources: the effective options by `Member.source`.
            grad_scale, found_inf: torch's GradScaler's, float32 with one element, on the bucket's device; or None.

        Returns:
            On the device int64 [tensors] addresses, 0 where no step is taken; float32 [tensors, Number]; and, where
            `grad_scale` is given, float32 [tensors, 2], by what gradients are multiplied and above what skipped.
        """
        device, tensors = self.bucket.spec.device, len(grads)
        host = self._staging()
        host[:tensors] = torch.from_numpy(np.asarray(grads))
        rows = np.array([source_row(options, device) for options in sources], dtype=np.int64)
        host[tensors:] = torch.from_numpy(rows.reshape(-1))
        uploaded = host.to(device, non_blocking=True)
        numbers = torch.empty((tensors, len(Number)), dtype=torch.float32, device=device)
        clips = torch.empty((tensors, 2), dtype=torch.float32, device=device)
        stepped = torch.empty(tensors, dtype=torch.int64, device=device)
        scaled, checked = grad_scale is not None, found_inf is not None
        arguments = {
            "fixed_ptr": self.fixed,
            "sources_ptr": uploaded[tensors:],
            "counts_ptr": self.counts,
            "grads_ptr": uploaded,
            "found_inf_ptr": found_inf if checked else clips,
            "grad_scale_ptr": grad_scale if scaled else clips,
            "stepped_ptr": stepped,
            "numbers_ptr": numbers,
            "clips_ptr": clips,
            "FOUND_INF": checked,
            "GRAD_SCALE": scaled,
        }
        _compiled.launch(numbers_kernel, tensors, arguments, num_warps=1)
        return stepped, numbers, clips

    def _staging(self) -> Tensor:
        """int64, pinned on CUDA; what a graph under capture reads is its own."""
        if self.bucket.spec.device.type != "cuda":
            return torch.empty(self.upload_bytes // 8, dtype=torch.int64)
        if torch.cuda.is_current_stream_capturing():
            assert self.spare is not None, "a step outside of a capture comes before one inside"
            self.captured.append(self.spare)
            self.spare = None
            return self.captured[-1]
        if self.spare is None:
            self.spare = torch.empty(self.upload_bytes // 8, dtype=torch.int64, pin_memory=True)
        return torch.empty(self.upload_bytes // 8, dtype=torch.int64, pin_memory=True)

    def shrink(self) -> None:
        """Step 9: every matrix's threshold says by now whether it is due."""
        for rank, table in self.tables.items():
            self.matrices.start(rank, table, self.matrices.are_aligned(self.matrices.ranks == rank))

    def settle(self) -> None:
        """Bring the states' own counts up to date; waits for the device."""
        for state, step in zip(self.bucket.states, self.counts.tolist(), strict=True):
            st.set_uncounted(state, "step", step)


def source_row(options: dict[str, Any], device: torch.device) -> list[int]:
    """One row of `Source`; a 0-d float32 `lr` on this device is named by its address."""
    lr, row = options["lr"], [0] * len(Source)
    real = dict.fromkeys((Source.LR, Source.NAMED_PEAK), 0.0)
    if isinstance(lr, Tensor) and lr.device == device:
        row[Source.LR_AT] = lr.data_ptr()
        base = scalars.as_number(options.get("initial_lr", options["base_lr"]))
        if options["auto_lr"] and "initial_lr" in options:
            row[Source.PEAK_AT] = options["auto_lr_peak"].data_ptr()
            real[Source.NAMED_PEAK] = scalars.named_peak(options)
    else:
        real[Source.LR], base = float(lr), scalars.base_rate(options)
    row[Source.AUTO], row[Source.WARMUP] = int(options["auto_lr"]), options["warmup_steps"]
    row[Source.PERCENTILE] = options["percentile_clipping"]
    real |= {
        Source.BASE: base,
        Source.MIN_LR: options["min_lr"],
        Source.MAX_LR: -1.0 if options["max_lr"] is None else options["max_lr"],
        Source.WEIGHT_DECAY: options["weight_decay"],
        Source.EMPHASIS: options["low_rank_emphasis"],
        Source.STRENGTH: options["rank_penalty_strength"] if options["lora_rank_penalty"] else 0.0,
    }
    real |= dict(zip((Source.BETA1, Source.BETA2, Source.BETA3), options["betas"], strict=True))
    for column, value in real.items():
        row[column] = int(np.float64(value).view(np.int64))
    return row
