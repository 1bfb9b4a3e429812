"""The one-pass kernel: every tensor of a parameter is read once and written once; see `automagic_bnb.reference`.

A program walks a few consecutive blocks of one parameter, or with factored moments the blocks of one tile; what it does
to each is in `one_block`. Whether any gradient of a block, or one beside it, is not finite shows in the block's sum of
squares and its largest Laplacian; only then are elements looked at one by one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from automagic_bnb.kernels import codec, direction, one_block, statistics, stencil, tiles
from automagic_bnb.kernels.numbers import Counts
from automagic_bnb.kernels.one_block import address, row_ptr
from automagic_bnb.kernels.tables import (
    BLOCK_STATISTICS,
    BLOCKS_PER_PROGRAM,
    Addresses,
    Bucket,
    Column,
    Number,
    Switches,
    Variant,
    shared_numbers,
)
from torch import Tensor

from automagic_bnb import bnb, reference
from automagic_bnb import quantization as q

BLOCK = tl.constexpr(q.BLOCK)
_C = {column.name: tl.constexpr(int(column)) for column in Column}
_ROW = tl.constexpr(len(Column))

THETA, M, V, R = _C["THETA"], _C["STATE1"], _C["STATE2"], _C["STATE3"]
K, K_PAIRS = _C["LR_MASK"], _C["LR_MASK4"]
V_ROW, V_COL = _C["EXP_AVG_SQ_ROW"], _C["EXP_AVG_SQ_COL"]
R_ROW, R_COL = _C["EXP_AVG_RES_ROW"], _C["EXP_AVG_RES_COL"]
SIZE, ROWS, COLS, STRIPS, FIRST_PROGRAM = _C["SIZE"], _C["ROWS"], _C["COLS"], _C["STRIPS"], _C["FIRST_PROGRAM"]
RESIDUAL, SKIPS = _C["MASTER_RESIDUAL"], _C["SKIPS"]
START, STOP, OWN_START, OWN_STOP = _C["START"], _C["STOP"], _C["OWN_START"], _C["OWN_STOP"]
FIRST_STATISTIC, STATISTICS = _C[BLOCK_STATISTICS[0].upper()], tl.constexpr(len(BLOCK_STATISTICS))

_NUMBERS = tl.constexpr(len(Number))
N_KEY, N_TURN = tl.constexpr(int(Number.KEY)), tl.constexpr(int(Number.TURN))

BLOCKS = tl.constexpr(BLOCKS_PER_PROGRAM)
PARTS = statistics.PARTS
FAR = tl.constexpr(2**31 - 8)  # beyond every place in a program, and a multiple of 8


@triton.jit
def _blocks(
    entry_ptr, numbers, first, stride, blocks, unusual, tile, v_sums, r_sums, size, grad_address, clip, rule,
    S, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Up to 16 blocks, `stride` apart: the usual ones, or (CAREFUL) those whose bit is set in `unusual`.

    A block is unusual if a gradient of it, or one beside it, is not finite. Returns the sums of `one_block.update` and,
    of the usual ones, the bits of the unusual; of those, the number of elements skipped; and `v_sums`, `r_sums` with
    what factored moments have seen added.

    Args:
        tile: with factored moments where the column means of v and r begin, and 1 / mean of the tile, of v and r.
    """
    CODES: tl.constexpr = tl.uint8 if S.CODES else tl.float32
    EMPTY: tl.constexpr = 127 if S.M == tl.uint8 else 0
    EARLY: tl.constexpr = S.WIDTH > 0
    elements, pairs, threads = tl.arange(0, BLOCK), tl.arange(0, BLOCK // 2), tl.arange(0, 32)
    statistics_ptr = tl.load(entry_ptr + FIRST_STATISTIC + threads, mask=threads < STATISTICS, other=0)
    kept = statistics_ptr != 0
    statistics_ptr = statistics_ptr.to(tl.pointer_type(tl.float32))
    rows, cols = tl.load(entry_ptr + ROWS), tl.load(entry_ptr + COLS)
    first_element = first.to(tl.int64) * BLOCK
    m_ptr = address(entry_ptr, M, S.M) + first_element
    v_ptr = address(entry_ptr, V, CODES) + first_element
    r_ptr = v_ptr
    if S.CAME:
        r_ptr = address(entry_ptr, R, CODES) + first_element
    if S.MASK == 4:
        k_ptr = address(entry_ptr, K_PAIRS, tl.uint8) + first_element // 2
    else:
        k_ptr = address(entry_ptr, K, tl.float32 if S.MASK == 32 else tl.uint8) + first_element
    theta_ptr = address(entry_ptr, THETA, S.P, S.ALIGN) + first_element
    low_ptr = address(entry_ptr, RESIDUAL, tl.int8) + first_element
    grad_ptr = tl.multiple_of(grad_address.to(tl.pointer_type(S.G)), S.ALIGN) + first_element
    if S.EVEN:  # where in its row the block begins; a tile's blocks all begin there
        column = (first_element % cols).to(tl.int32)
        width = tl.multiple_of(cols.to(tl.int32), 8)
        lead = tl.multiple_of(tl.minimum(tl.maximum(cols - first_element, 0), FAR).to(tl.int32), 8)
        tail = tl.multiple_of(tl.minimum(tl.maximum(size - cols - first_element, 0), FAR).to(tl.int32), 8)
    own_start, own_stop = first_element, size
    if S.PART:
        own_start, own_stop = tl.load(entry_ptr + OWN_START), tl.load(entry_ptr + OWN_STOP)
    active, mask_sum, numerator, denominator = first * 0, 0.0, 0.0, 0.0
    bits, end = first * 0, blocks
    if not CAREFUL:  # the tensor's last block, if short, is left to the careful way
        end = tl.where((first.to(tl.int64) + (blocks - 1) * stride + 1) * BLOCK > size, blocks - 1, blocks)
        bits = tl.where(end < blocks, 1 << end, 0)
    i = first * 0
    while i < end:
        block = first + i * stride
        start = block.to(tl.int64) * BLOCK
        remaining = tl.minimum(size - start, BLOCK).to(tl.int32)
        valid = elements < (remaining if CAREFUL else BLOCK)
        owned, leads, touched = valid, True, True
        if S.PART:
            owned = valid & (start + elements >= own_start) & (start + elements < own_stop)
            leads, touched = (start >= own_start) & (start < own_stop), tl.max(owned.to(tl.int32), 0) > 0
        place = i * stride * BLOCK + elements
        g_ptr = grad_ptr + i * stride * BLOCK
        # Everything is asked for before anything is waited for; `volatile`, as ptxas would otherwise put off what only
        # the branch below needs. (With codes of v and r too that costs more registers than it is worth.)
        g_raw = codec.widen(tl.load(grad_ptr + place, mask=valid, other=0))
        m_raw = tl.load(m_ptr + place, mask=valid, other=EMPTY, volatile=EARLY)
        if S.WIDTH:
            v_raw = tiles.estimate(row_ptr(entry_ptr, V_ROW, block, S), tile[0], tile[2], remaining, S.WIDTH)
        else:
            v_raw = tl.load(v_ptr + place, mask=valid, other=0)
        r_raw = v_raw
        if S.CAME:
            if S.WIDTH:
                r_raw = tiles.estimate(row_ptr(entry_ptr, R_ROW, block, S), tile[1], tile[3], remaining, S.WIDTH)
            else:
                r_raw = tl.load(r_ptr + place, mask=valid, other=0)
        mask_ptr = k_ptr
        if S.MASK == 4:
            mask_ptr += i * stride * (BLOCK // 2)
            mask_raw = tl.load(mask_ptr + pairs, mask=2 * pairs < remaining, other=0, volatile=EARLY)
        elif S.MASK == 0:
            mask_raw = 0
        else:
            mask_raw = tl.load(k_ptr + place, mask=valid, other=0, volatile=EARLY)
        theta_raw = g_raw
        if S.AUTO or not S.DIRECTED:
            theta_raw = tl.load(theta_ptr + place, mask=owned, other=0, volatile=EARLY)
        low_raw = theta_raw
        if S.ECC:
            low_raw = tl.load(low_ptr + place, mask=valid, other=0, volatile=EARLY)
        held = tl.load(statistics_ptr + block, mask=kept, other=0.0, volatile=EARLY)
        if S.SCALED:
            g_raw = stencil.scaled(g_raw, clip)
        g = g_raw
        if CAREFUL:
            g = tl.where(stencil.usable(g_raw), g_raw, 0.0)
        lap = g
        if S.SPATIAL:
            if S.EVEN and not CAREFUL:
                lap = stencil.laplacian_even(g_ptr, g, elements, place, column, lead, tail, width, clip, S.SCALED)
            else:
                lap = stencil.laplacian(g_ptr, g, elements, start, size, rows, cols, valid, clip, S.SCALED)
        sum_squares = tl.sum(g * g, 0)
        if CAREFUL:
            mine = ((unusual >> i) & 1) != 0
        else:
            # The block and what lies beside it are finite if neither the sum of squares nor a Laplacian is near the
            # bound. The careful way is right in any case.
            mine = sum_squares < stencil.USUAL_GRADIENT * stencil.USUAL_GRADIENT
            mine = mine & (stencil.largest_bits(lap) < stencil.USUAL_GRADIENT_BITS)
        if mine:
            pointers = one_block.Elements(
                theta_ptr, low_ptr, m_ptr, v_ptr, r_ptr, mask_ptr, statistics_ptr + block
            )  # fmt: skip
            loaded = one_block.Elements(theta_raw, low_raw, m_raw, v_raw, r_raw, mask_raw, held)
            c, w, a, b, v_seen, r_seen = one_block.update(
                entry_ptr, numbers, rule, block, remaining, place, valid, owned, leads, touched, pointers, loaded,
                g_raw, g, lap, sum_squares, S, CAREFUL,
            )  # fmt: skip
            active += c
            mask_sum += w
            numerator += a
            denominator += b
            if S.WIDTH:
                v_sums += v_seen
                if S.CAME:
                    r_sums += r_seen
            if CAREFUL:
                lost = tl.where(stencil.usable(g_raw), 0, 1)
                bits += tl.sum(lost, 0)
                # Whole numbers: the order of the additions does not matter.
                own_lost = tl.sum(tl.where(owned, lost, 0), 0)
                tl.atomic_add(address(entry_ptr, SKIPS, tl.float32, 4), own_lost.to(tl.float32))
        elif not CAREFUL:
            bits |= 1 << i
        if S.EVEN and S.WIDTH == 0:
            column += BLOCK
            if width >= BLOCK:
                column = tl.where(column >= width, column - width, column)
            else:
                column = column % width
        i += 1
    return active, mask_sum, numerator, denominator, bits, v_sums, r_sums


@triton.jit
def _span(
    entry_ptr, numbers, first, stride, blocks, tile, v_sums, r_sums, size, grad_address, clip, rule, S
):  # fmt: skip
    """`_blocks`, first the usual ones and then the others; returns the same, but the elements skipped for the bits."""
    skipped = first * 0
    active, mask_sum, numerator, denominator, unusual, v_sums, r_sums = _blocks(
        entry_ptr, numbers, first, stride, blocks, 0, tile, v_sums, r_sums, size, grad_address, clip, rule, S, False
    )  # fmt: skip
    if unusual != 0:
        c, w, a, b, skipped, v_sums, r_sums = _blocks(
            entry_ptr, numbers, first, stride, blocks, unusual, tile, v_sums, r_sums, size, grad_address, clip,
            rule, S, True,
        )  # fmt: skip
        active += c
        mask_sum += w
        numerator += a
        denominator += b
    return active, mask_sum, numerator, denominator, skipped, v_sums, r_sums


@triton.jit
def _tile(entry_ptr, numbers, local, size, grad_address, clip, rule, S):
    """One tile of factored moments: see `factored.Tiling`. Its column means stay as they were until all is seen."""
    strips = tl.load(entry_ptr + STRIPS).to(tl.int32)
    first = local // strips * S.HEIGHT * strips + local % strips
    blocks = tl.minimum(tl.cdiv(tl.cdiv(size, BLOCK) - first, strips), S.HEIGHT).to(tl.int32)
    active, mask_sum, numerator, denominator, skipped = local * 0, 0.0, 0.0, 0.0, local * 0
    if blocks > 0:
        counts = tiles.counts_of(size, first, strips, blocks, S.WIDTH)
        v_col_ptr = address(entry_ptr, V_COL, S.MEANS) + local * S.WIDTH
        r_col_ptr = address(entry_ptr, R_COL, S.MEANS) + local * S.WIDTH
        v_scale = tiles.scale_of(v_col_ptr, counts, S.WIDTH)
        r_scale = v_scale
        if S.CAME:
            r_scale = tiles.scale_of(r_col_ptr, counts, S.WIDTH)
        tile = (v_col_ptr, r_col_ptr, v_scale, r_scale)
        v_sums, r_sums = tl.zeros((BLOCK,), dtype=tl.float32), tl.zeros((BLOCK,), dtype=tl.float32)
        done = local * 0
        while done < blocks:
            c, w, a, b, skips, v_sums, r_sums = _span(
                entry_ptr, numbers, first + done * strips, strips, tl.minimum(blocks - done, BLOCKS), tile, v_sums,
                r_sums, size, grad_address, clip, rule, S,
            )  # fmt: skip
            active += c
            mask_sum += w
            numerator += a
            denominator += b
            skipped += skips
            done += BLOCKS
        if skipped.to(tl.float32) < tl.sum(counts, 0):  # a tile in which all was skipped keeps its very means
            start = first.to(tl.int64) * BLOCK
            tiles.move_columns(v_col_ptr, v_sums, counts, rule.beta2, rule.gain2, rule.key, start, S.WIDTH, S.MEANS)
            if S.CAME:
                tiles.move_columns(r_col_ptr, r_sums, counts, rule.beta3, rule.gain3, rule.key, start, S.WIDTH, S.MEANS)
    return active, mask_sum, numerator, denominator


@triton.jit
def step_kernel(
    table_ptr, numbers_ptr, grads_ptr, owners_ptr, partials_ptr, book1_ptr, book2_ptr, cells_ptr, clips_ptr,
    beta1, beta2, beta3, gain1, gain2, gain3, eps1, eps2, clip_threshold, frequency, edge_penalty, edge_threshold,
    detail, directions_ptr, S,
):  # fmt: skip
    """Update every tensor of a bucket; with `lora_direction` all but its weights.

    Args:
        table_ptr: int64 [tensors, Column], addresses and sizes.
        numbers_ptr: float32 [tensors, Number], this step's scalars.
        grads_ptr: int64 [tensors], addresses of the gradients; 0 where a tensor has none this time.
        owners_ptr: int32 [programs], the tensor each program works on.
        clips_ptr: float32 [tensors, 2], by what gradients are multiplied, and above what they are skipped (SCALED).
        gain1: 1 - beta1, and so on; in float32 1 - 0.999 would be off by 1.3e-5 of it.
        partials_ptr: float32 [programs, PARTS] out: of the program's blocks the number of elements with a gradient,
            the sum of 2^(k/16) over these, and auto_lr's two sums.
        directions_ptr: float32 [`Bucket.direction_elements`] out, n of each element (DIRECTED).
        S: `tables.Switches`, a compile-time constant each.
    """
    program = tl.program_id(0)
    row = tl.load(owners_ptr + program)
    grad_address = tl.load(grads_ptr + row)
    if grad_address != 0:
        entry_ptr = table_ptr + row.to(tl.int64) * _ROW
        size = tl.load(entry_ptr + SIZE)
        local = program - tl.load(entry_ptr + FIRST_PROGRAM).to(tl.int32)
        first_block, last_block = 0, tl.cdiv(size, BLOCK)
        if S.PART:
            first_block, last_block = tl.load(entry_ptr + START) // BLOCK, tl.cdiv(tl.load(entry_ptr + STOP), BLOCK)
            if S.WIDTH:  # as many tiles come before as blocks in a row of them
                local += (first_block // S.HEIGHT).to(tl.int32)
        numbers_ptr += row * _NUMBERS
        clip = (1.0, 1.0)
        if S.SCALED:
            clip = (tl.load(clips_ptr + 2 * row), tl.load(clips_ptr + 2 * row + 1))
        cells = (
            codec.held_cells(cells_ptr), codec.held_cells(cells_ptr + 32), codec.held_cells(cells_ptr + 64),
            codec.held_cells(cells_ptr + 96),
        )  # fmt: skip
        numbers, bounded = one_block.numbers_of(entry_ptr, numbers_ptr, S)
        key = tl.load(numbers_ptr + N_KEY).to(tl.uint32, bitcast=True)
        turn = tl.load(numbers_ptr + N_TURN).to(tl.int32)
        rule = one_block.Rule(
            beta1, beta2, beta3, gain1, gain2, gain3, eps1, eps2, clip_threshold, frequency, edge_penalty,
            edge_threshold, detail, book1_ptr, book2_ptr, directions_ptr, cells, key, bounded, turn,
        )  # fmt: skip
        if S.WIDTH:
            active, mask_sum, numerator, denominator = _tile(
                entry_ptr, numbers, local, size, grad_address, clip, rule, S
            )
        else:
            first = local * BLOCKS
            if S.PART:
                first += first_block.to(tl.int32)
            blocks = tl.minimum(last_block - first, BLOCKS).to(tl.int32)
            active, mask_sum, numerator, denominator, _skipped, _v, _r = _span(
                entry_ptr, numbers, first, 1, blocks, (), 0.0, 0.0, size, grad_address, clip, rule, S
            )
        if S.WARM or S.AUTO:
            tl.store(partials_ptr + program * PARTS, active.to(tl.float32))
            tl.store(partials_ptr + program * PARTS + 1, mask_sum)
            tl.store(partials_ptr + program * PARTS + 2, numerator)
            tl.store(partials_ptr + program * PARTS + 3, denominator)


_MAX_REGISTERS = {
    ("8bit", False): 128, ("8bit", True): 96, ("factored", False): 128, ("factored", True): 128, ("32bit", False): 96,
    ("32bit", True): 128, ("lean", False): 96,
}  # fmt: skip
"""Per thread, on NVIDIA, by storage and whether the mask moves: more warps at once are worth some spilled registers.
Measured: benchmarks/NOTES.md."""


def _compiler_options(device: torch.device, switches: Switches) -> dict[str, Any]:
    if device.type != "cuda" or torch.version.hip is not None:
        return {}
    storage = "factored" if switches.WIDTH else "8bit" if switches.CODES else "32bit"
    if switches.WIDTH and not switches.MASK and not switches.CAME:
        storage = "lean"
    return {"maxnreg": _MAX_REGISTERS[storage, switches.WARM]}


def launch(
    bucket: Bucket,
    grads: Addresses,
    sources: list[dict[str, Any]],
    counts: Counts | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clips: Tensor | None = None,
) -> Tensor | None:
    """One step of a bucket: few launches and one upload, nothing waited for.

    Args:
        grads: the address of each member's gradient, 0 for none; contiguous, in the bucket's gradient dtype.
        sources: the effective options by `Member.source`.
        counts: where steps are counted on the device.
        grad_scale, found_inf: torch's GradScaler's, for which there must be `counts`.
        clips: float32 [tensors, 2], percentile_clipping's of parts of tensors.

    Returns:
        Of parts of tensors float32 [tensors, PARTS], what `step_kernel` leaves of each; else None.
    """
    scales = None
    if counts is None:
        addresses, numbers, warm = bucket.upload_step(grads, sources)
    else:
        addresses, numbers, factors = counts.begin(grads, sources, grad_scale, found_inf)
        warm, scales = counts.is_warm(sources), factors if grad_scale is not None else None
    shared = shared_numbers(sources[bucket.members[0].source])
    variant = bucket.variant(warm, bucket.are_aligned(grads), scales is not None)
    launch_all = functools.partial(_launch, bucket, addresses, numbers, shared, variant, scales, clips)
    # Where there are directions not all are launches, and room for them is not to be kept.
    repeats = not (variant.switches.PART or variant.switches.DIRECTED)
    if bucket.repeated is not None and counts is None and repeats:
        bucket.repeated.do((variant.switches, shared), launch_all)
        return None
    return launch_all()


def _launch(
    bucket: Bucket,
    addresses: Tensor,
    numbers: Tensor,
    shared: tuple[Any, ...],
    variant: Variant,
    scales: Tensor | None,
    clips: Tensor | None,
) -> Tensor | None:
    """The launches of one step, and nothing else that has to be done anew in the next: see `Repeated`."""
    device, switches = bucket.spec.device, variant.switches
    betas, eps, clip_threshold, frequency, edge_penalty, edge_threshold, detail = shared
    if clips is None and switches.SCALED:
        clips = scales
        if bucket.spec.switches.SCALED:
            clips = statistics.clip_factors(bucket, addresses, numbers, variant, scales)
    book1, book2 = bnb.code_book(True, device), bnb.code_book(False, device)
    summed = switches.WARM or switches.AUTO
    parts = statistics.PARTS.value * bucket.programs if summed else 0
    partials = torch.empty(parts, dtype=torch.float32, device=device)
    directions = partials  # not looked at
    if switches.DIRECTED:
        directions = torch.empty(bucket.direction_elements, dtype=torch.float32, device=device)
    arguments = {
        "table_ptr": bucket.table,
        "numbers_ptr": numbers,
        "grads_ptr": addresses,
        "owners_ptr": bucket.owners,
        "partials_ptr": partials,
        "book1_ptr": book1,
        "book2_ptr": book2,
        "cells_ptr": codec.cells(device),
        "clips_ptr": numbers if clips is None else clips,
        "beta1": float(betas[0]),
        "beta2": float(betas[1]),
        "beta3": float(betas[2]),
        "gain1": 1.0 - betas[0],
        "gain2": 1.0 - betas[1],
        "gain3": 1.0 - betas[2],
        "eps1": float(max(eps[0], reference.LEAST_EPS1)),
        "eps2": float(eps[1]),
        "clip_threshold": float(clip_threshold),
        "frequency": frequency / reference.LAPLACIAN_RANGE,
        "edge_penalty": float(edge_penalty),
        "edge_threshold": float(edge_threshold),
        "detail": float(detail),
        "directions_ptr": directions,
        "S": variant.constants,
    }
    options = _compiler_options(device, switches)
    variant.compiled.launch(step_kernel, bucket.programs, arguments, num_warps=1, **options)
    if switches.DIRECTED:
        direction.turns_of(bucket).move(addresses, numbers, directions, arguments["clips_ptr"], variant)
    if switches.PART:
        return statistics.shares(bucket, partials, variant) if summed else None
    if summed:
        statistics.finalise(bucket, addresses, numbers, partials, variant)
    return None
