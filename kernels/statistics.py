"""What is known of a whole tensor only after its blocks: a small launch for all tensors of a bucket together.

Sums run over fixed partial sums in a fixed order, so that two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from automagic_bnb.kernels import codec
from automagic_bnb.kernels.launching import Compiled
from automagic_bnb.kernels.tables import BLOCKS_PER_PROGRAM, Bucket, Column, Number, Variant
from torch import Tensor

from automagic_bnb import estimate, reference
from automagic_bnb import state as st

_ROW, _NUMBERS = tl.constexpr(len(Column)), tl.constexpr(len(Number))
STATS, NORMS = tl.constexpr(int(Column.TENSOR_STATS)), tl.constexpr(int(Column.GNORM_VEC))
SIZE = tl.constexpr(int(Column.SIZE))
FIRST_PROGRAM, PROGRAMS = tl.constexpr(int(Column.FIRST_PROGRAM)), tl.constexpr(int(Column.PROGRAMS))
N_ADAPT, N_SLOT = tl.constexpr(int(Number.ADAPT_MASK)), tl.constexpr(int(Number.NORM_SLOT))
N_PERCENTILE = tl.constexpr(int(Number.PERCENTILE))
MAX_GRADIENT = tl.constexpr(reference.MAX_GRADIENT)
NORM_WINDOW = tl.constexpr(st.NORM_WINDOW)
MASK_MEAN = tl.constexpr(st.MASK_MEAN)
LR_NUMERATOR, LR_DENOMINATOR = tl.constexpr(st.LR_NUMERATOR), tl.constexpr(st.LR_DENOMINATOR)
PARTS = tl.constexpr(4)
"""What a program of the step kernel leaves of its blocks."""
SIGN_DECAY, SIGN_GAIN = tl.constexpr(estimate.SIGN_DECAY), tl.constexpr(1 - estimate.SIGN_DECAY)
GROWTH = tl.constexpr(estimate.GROWTH)
_CHUNK = tl.constexpr(1024)
_compiled = Compiled()
"""Of what belongs to no bucket."""


@triton.jit
def _sum_partials(partials_ptr, first, programs, STRIDE: tl.constexpr, PART: tl.constexpr):
    """The sum of one part over a tensor's programs."""
    lanes = tl.arange(0, _CHUNK)
    total = tl.zeros((_CHUNK,), dtype=tl.float32)
    offset = programs - programs  # a loop over a run-time range, in a form that the interpreter takes too
    while offset < programs:
        inside = offset + lanes < programs
        total += tl.load(partials_ptr + (first + offset + lanes) * STRIDE + PART, mask=inside, other=0.0)
        offset += _CHUNK
    return tl.sum(total, 0)


@triton.jit
def _finalise_kernel(table_ptr, grads_ptr, numbers_ptr, partials_ptr, WARM: tl.constexpr, AUTO: tl.constexpr):
    """W, and auto_lr's sums, of each tensor that was updated."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(grads_ptr + row) != 0:
        entry = table_ptr + row * _ROW
        stats_ptr = tl.load(entry + STATS).to(tl.pointer_type(tl.float32))
        first, programs = tl.load(entry + FIRST_PROGRAM), tl.load(entry + PROGRAMS)
        if WARM:
            active = _sum_partials(partials_ptr, first, programs, PARTS, 0)
            if (tl.load(numbers_ptr + row * _NUMBERS + N_ADAPT) != 0) & (active > 0):
                tl.store(stats_ptr + MASK_MEAN, _sum_partials(partials_ptr, first, programs, PARTS, 1) / active)
        if AUTO:
            tl.store(stats_ptr + LR_NUMERATOR, _sum_partials(partials_ptr, first, programs, PARTS, 2))
            tl.store(stats_ptr + LR_DENOMINATOR, _sum_partials(partials_ptr, first, programs, PARTS, 3))


def finalise(bucket: Bucket, addresses: Tensor, numbers: Tensor, partials: Tensor, variant: Variant) -> None:
    """Turn the step's partial sums, float32 [programs, PARTS], into each tensor's `tensor_stats`."""
    arguments = {
        "table_ptr": bucket.table,
        "grads_ptr": addresses,
        "numbers_ptr": numbers,
        "partials_ptr": partials,
        "WARM": variant.switches.WARM,
        "AUTO": variant.switches.AUTO,
    }
    variant.compiled.launch(_finalise_kernel, len(bucket.members), arguments, num_warps=4)


@triton.jit
def _shares_kernel(table_ptr, partials_ptr, sums_ptr):
    """float32 [tensors, PARTS] out: each part's sum over a tensor's programs."""
    row = tl.program_id(0).to(tl.int64)
    entry = table_ptr + row * _ROW
    first, programs = tl.load(entry + FIRST_PROGRAM), tl.load(entry + PROGRAMS)
    tl.store(sums_ptr + row * PARTS, _sum_partials(partials_ptr, first, programs, PARTS, 0))
    tl.store(sums_ptr + row * PARTS + 1, _sum_partials(partials_ptr, first, programs, PARTS, 1))
    tl.store(sums_ptr + row * PARTS + 2, _sum_partials(partials_ptr, first, programs, PARTS, 2))
    tl.store(sums_ptr + row * PARTS + 3, _sum_partials(partials_ptr, first, programs, PARTS, 3))


def shares(bucket: Bucket, partials: Tensor, variant: Variant) -> Tensor:
    """The step's partial sums over each tensor, float32 [tensors, PARTS]: of parts of tensors, for others to add."""
    sums = torch.empty((len(bucket.members), PARTS.value), dtype=torch.float32, device=bucket.spec.device)
    arguments = {"table_ptr": bucket.table, "partials_ptr": partials, "sums_ptr": sums}
    variant.compiled.launch(_shares_kernel, len(bucket.members), arguments, num_warps=4)
    return sums


@triton.jit
def _square_sums_kernel(
    table_ptr, grads_ptr, owners_ptr, partials_ptr, clips_ptr,
    G: tl.constexpr, ALIGN: tl.constexpr, SPAN: tl.constexpr, AMP: tl.constexpr,
):  # fmt: skip
    """Σ g² over a program's share of its gradient, elements that are not finite left out.

    A tensor's programs take turns, `SPAN` elements each.
    """
    program = tl.program_id(0)
    row = tl.load(owners_ptr + program).to(tl.int64)
    address = tl.load(grads_ptr + row)
    if address != 0:
        entry = table_ptr + row * _ROW
        size = tl.load(entry + SIZE)
        start = (program - tl.load(entry + FIRST_PROGRAM)) * SPAN
        stride = tl.load(entry + PROGRAMS) * SPAN
        lanes = tl.arange(0, SPAN)
        total, scale = 0.0, 1.0
        if AMP:
            scale = tl.load(clips_ptr + 2 * row)
        while start < size:
            grad_ptr = tl.multiple_of(address.to(tl.pointer_type(G)), ALIGN) + start
            g = tl.load(grad_ptr + lanes, mask=lanes < size - start, other=0).to(tl.float32) * scale
            g = tl.where(tl.abs(g) <= MAX_GRADIENT, g, 0.0)
            total += tl.sum(g * g, 0)
            start += stride
        tl.store(partials_ptr + program, total)


@triton.jit
def _clip_kernel(table_ptr, grads_ptr, numbers_ptr, partials_ptr, clips_ptr, WINDOW: tl.constexpr, AMP: tl.constexpr):
    """percentile_clipping: remember each gradient's norm, and find the factor that brings it to the percentile.

    AMP: that comes on top of what `clips_ptr` holds.
    """
    row = tl.program_id(0).to(tl.int64)
    if tl.load(grads_ptr + row) != 0:
        entry, numbers = table_ptr + row * _ROW, numbers_ptr + row * _NUMBERS
        norm = tl.sqrt(_sum_partials(partials_ptr, tl.load(entry + FIRST_PROGRAM), tl.load(entry + PROGRAMS), 1, 0))
        norms_ptr = tl.load(entry + NORMS).to(tl.pointer_type(tl.float32))
        slot = tl.load(numbers + N_SLOT).to(tl.int32)
        lanes = tl.arange(0, WINDOW)
        norms = tl.load(norms_ptr + lanes, mask=lanes < NORM_WINDOW, other=0.0)
        norms = tl.where(lanes == slot, norm, norms)
        tl.store(norms_ptr + slot, norm)
        # The place of each norm in their order, by counting; norms of zero stand in front and say nothing.
        first, second = norms[None, :], norms[:, None]
        before = (first < second) | ((first == second) & (lanes[None, :] < lanes[:, None]))
        place = tl.sum(before.to(tl.int32), 1)
        seen = tl.maximum(tl.sum((norms > 0).to(tl.int32), 0), 1)
        rank = WINDOW - seen + (tl.load(numbers + N_PERCENTILE).to(tl.int32) * seen + 99) // 100 - 1
        limit = tl.sum(tl.where(place == rank, norms, 0.0), 0)
        factor = tl.where(norm > limit, limit / norm, 1.0)
        if AMP:
            factor = factor * tl.load(clips_ptr + 2 * row)
        else:
            tl.store(clips_ptr + 2 * row + 1, MAX_GRADIENT)
        tl.store(clips_ptr + 2 * row, factor)


def clip_factors(
    bucket: Bucket, addresses: Tensor, numbers: Tensor, variant: Variant, scales: Tensor | None = None
) -> Tensor:
    """percentile_clipping's factor of each gradient and, above what it is skipped, float32 [tensors, 2].

    The norms are remembered on the way.

    Args:
        scales: the same of torch's GradScaler, which multiplies before; in place for the whole factor.
    """
    device = bucket.spec.device
    partials = torch.empty(bucket.programs, dtype=torch.float32, device=device)
    clips = scales
    if clips is None:
        clips = torch.empty((len(bucket.members), 2), dtype=torch.float32, device=device)
    sums = {
        "table_ptr": bucket.table,
        "grads_ptr": addresses,
        "owners_ptr": bucket.owners,
        "partials_ptr": partials,
        "clips_ptr": clips,
        "G": variant.switches.G,
        "ALIGN": variant.switches.ALIGN,
        "SPAN": BLOCKS_PER_PROGRAM * 256,
        "AMP": scales is not None,
    }
    variant.compiled.launch(_square_sums_kernel, bucket.programs, sums, num_warps=4)
    factors = {
        "table_ptr": bucket.table,
        "grads_ptr": addresses,
        "numbers_ptr": numbers,
        "partials_ptr": partials,
        "clips_ptr": clips,
        "WINDOW": triton.next_power_of_2(st.NORM_WINDOW),
        "AMP": scales is not None,
    }
    variant.compiled.launch(_clip_kernel, len(bucket.members), factors, num_warps=4)
    return clips


@triton.jit
def _taken(pointers_ptr, weights_ptr, tensors):
    """Σ s and Σ M over the `tensor_stats` at these addresses, whose sums are taken out."""
    lanes = tl.arange(0, _CHUNK)
    s = tl.zeros((_CHUNK,), dtype=tl.float32)
    momentum = tl.zeros((_CHUNK,), dtype=tl.float32)
    offset = tensors - tensors
    while offset < tensors:
        inside = offset + lanes < tensors
        stats_ptr = tl.load(pointers_ptr + offset + lanes, mask=inside, other=0).to(tl.pointer_type(tl.float32))
        weights = tl.load(weights_ptr + offset + lanes, mask=inside, other=0.0)
        s += weights * tl.load(stats_ptr + LR_NUMERATOR, mask=inside, other=0.0)
        momentum += tl.load(stats_ptr + LR_DENOMINATOR, mask=inside, other=0.0)
        tl.store(stats_ptr + LR_NUMERATOR, 0.0, mask=inside)
        tl.store(stats_ptr + LR_DENOMINATOR, 0.0, mask=inside)
        offset += _CHUNK
    return tl.sum(s, 0), tl.sum(momentum, 0)


@triton.jit(do_not_specialize=["tensors"])
def _take_sums_kernel(pointers_ptr, weights_ptr, tensors, taken_ptr):
    s, momentum = _taken(pointers_ptr, weights_ptr, tensors)
    tl.store(taken_ptr, s)
    tl.store(taken_ptr + 1, momentum)


def take_sums(pointers: Tensor, weights: Tensor) -> Tensor:
    """`estimate.take_sums` over int64 addresses of `tensor_stats`; nothing waits."""
    taken = torch.empty(2, dtype=torch.float32, device=pointers.device)
    arguments = {
        "pointers_ptr": pointers,
        "weights_ptr": weights,
        "tensors": pointers.numel(),
        "taken_ptr": taken,
    }
    _compiled.launch(_take_sums_kernel, 1, arguments, num_warps=4)
    return taken


@triton.jit(do_not_specialize=["tensors"])
def _find_rate_kernel(
    pointers_ptr, weights_ptr, tensors, d_ptr, sums_ptr, error_ptr, beta, gain, factor, error, low, high,
    COUNTED: tl.constexpr,
):  # fmt: skip
    """`estimate.find_rate` over the `tensor_stats` at these addresses, whose sums are taken out.

    COUNTED: the error is at `error_ptr`; below 0, nothing is done.
    """
    if COUNTED:
        error = tl.load(error_ptr)
        tensors = tl.where(error < 0, 0, tensors)
    all_s, all_momentum = _taken(pointers_ptr, weights_ptr, tensors)
    num = beta * tl.load(sums_ptr) + gain * all_s
    if (tl.abs(num) < float("inf")) & (all_momentum < float("inf")) & (all_momentum > 0):
        sign = tl.where(all_s > 0, 1.0, tl.where(all_s < 0, -1.0, 0.0))
        q = tl.load(sums_ptr + 1) * SIGN_DECAY + sign * SIGN_GAIN
        trust = tl.where(q > error, 1 - error / tl.maximum(q, error), 0.0)
        d = tl.load(d_ptr)
        distance = factor * tl.maximum(num, 0.0) * trust / tl.maximum(all_momentum, codec.TINY)
        found = tl.minimum(tl.maximum(d, distance), d * GROWTH)
        tl.store(d_ptr, tl.minimum(tl.maximum(found, low), high))
        tl.store(sums_ptr, num)
        tl.store(sums_ptr + 1, q)


def find_rate(
    d: Tensor,
    sums: Tensor,
    pointers: Tensor,
    weights: Tensor,
    numbers: estimate.Estimate,
    error: Tensor | None = None,
) -> None:
    """`estimate.find_rate` over int64 addresses of `tensor_stats`; nothing waits.

    Args:
        error: in place of that in `numbers`, of `numbers.count_search`.
    """
    counted = error is not None
    arguments = {
        "pointers_ptr": pointers,
        "weights_ptr": weights,
        "tensors": pointers.numel(),
        "d_ptr": d,
        "sums_ptr": sums,
        "error_ptr": error if counted else d,
        "beta": numbers.beta,
        "gain": 1 - numbers.beta,
        "factor": float(numbers.factor),
        "error": float(numbers.error),
        "low": float(numbers.low),
        "high": float(numbers.high),
        "COUNTED": counted,
    }
    _compiled.launch(_find_rate_kernel, 1, arguments, num_warps=4)
