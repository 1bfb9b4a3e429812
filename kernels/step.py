"""The one-pass kernel: every tensor of a parameter is read once and written once; see `automagic_bnb.reference`.

A program walks a few consecutive blocks of one parameter, or with factored moments the blocks of one tile. A block of
256 elements is one warp's work, 8 neighbouring elements a thread; its statistics are reductions inside the warp.
Whether any gradient of a block, or one beside it, is not finite shows in the block's sum of squares and its largest
Laplacian; only then are elements looked at one by one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from automagic_bnb.kernels import codec, lanes, statistics, stencil, tiles
from automagic_bnb.kernels.tables import BLOCKS_PER_PROGRAM, Bucket, Column, Number, Spec, shared_numbers

from automagic_bnb import bnb, reference
from automagic_bnb import quantization as q
from automagic_bnb import state as st
from automagic_bnb.factored import tile_height

BLOCK = tl.constexpr(q.BLOCK)
_C = {column.name: tl.constexpr(int(column)) for column in Column}
_ROW = tl.constexpr(len(Column))

THETA, M, V, R, K = _C["THETA"], _C["M"], _C["V"], _C["R"], _C["K"]
POLARITY, STATS = _C["POLARITY"], _C["STATS"]
FIRST_STATISTIC, STATISTICS = _C["ABSMAX1"], tl.constexpr(Column.SIGMA - Column.ABSMAX1 + 1)
ABSMAX1, ABSMAX2, ABSMAX3, TORQUE, EDGE, SIGMA = (
    tl.constexpr(Column[name] - Column.ABSMAX1) for name in ("ABSMAX1", "ABSMAX2", "ABSMAX3", "TORQUE", "EDGE", "SIGMA")
)
"""Which thread of a warp holds what is kept of a block."""
N_SKIPPED = tl.constexpr(st.SKIPPED)
PROBE_START, PROBE_SUM, RATE = _C["PROBE_START"], _C["PROBE_SUM"], _C["RATE"]
V_ROW, V_COL, R_ROW, R_COL = _C["V_ROW"], _C["V_COL"], _C["R_ROW"], _C["R_COL"]
RESIDUAL = _C["RESIDUAL"]
SIZE, ROWS, COLS, STRIPS, FIRST_PROGRAM = _C["SIZE"], _C["ROWS"], _C["COLS"], _C["STRIPS"], _C["FIRST_PROGRAM"]
PROBE_SHIFT = _C["PROBE_SHIFT"]

_N = {number.name: tl.constexpr(int(number)) for number in Number}
_NUMBERS = tl.constexpr(len(Number))
N_RATE, N_LOW, N_HIGH, N_DECAY, N_KAPPA = _N["RATE"], _N["LOW"], _N["HIGH"], _N["WEIGHT_DECAY"], _N["KAPPA"]
N_CORRECTION1, N_CORRECTION2, N_CORRECTION3 = _N["CORRECTION1"], _N["CORRECTION2"], _N["CORRECTION3"]
N_ADAPT, N_LEARN, N_KEY, N_PROBE = _N["ADAPT_MASK"], _N["LEARN_POLARITY"], _N["KEY"], _N["PROBE_WEIGHT"]

FAR = tl.constexpr(2**31 - 8)  # beyond every place in a program, and a multiple of 8
MAX_EDGE = tl.constexpr(reference.MAX_EDGE)


@triton.jit
def address(entry_ptr, column: tl.constexpr, DTYPE: tl.constexpr, ALIGN: tl.constexpr = 16):
    """The pointer in one column of a tensor's entry in the table."""
    pointer = tl.load(entry_ptr + column).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, ALIGN)


@triton.jit
def _keep(statistics_ptr, STATISTIC: tl.constexpr, value, touched):
    """Store one of a block's statistics; not if touched, how many elements were not skipped, is 0."""
    tl.store(statistics_ptr, value, mask=tl.where(tl.arange(0, 32) == STATISTIC, touched, 0) > 0)


@triton.jit
def _write_moment(
    ptr, statistics_ptr, ABSMAX: tl.constexpr, place, x, random, cells, valid, touched, EIGHT: tl.constexpr,
    SIGNED: tl.constexpr,
):  # fmt: skip
    """Store m to nearest, or v or r stochastically. A block in which all was skipped keeps its very codes.

    Args:
        touched: int32, how many elements were not skipped.
    """
    if EIGHT:
        absmax = codec.absmax_of(x, SIGNED)
        if SIGNED:
            codes = codec.encode_signed(x, absmax, cells[0], cells[1])
        else:
            codes = codec.encode_unsigned(x, absmax, random, cells[2], cells[3])
        tl.store(ptr + place, codes, mask=tl.where(valid, touched, 0) > 0)
        _keep(statistics_ptr, ABSMAX, absmax, touched)
    else:
        tl.store(ptr + place, x, mask=valid)


@triton.jit
def _row_ptr(entry_ptr, column: tl.constexpr, block, WIDTH: tl.constexpr):
    """Where the row means of a block begin."""
    return address(entry_ptr, column, tl.float32, 4) + block.to(tl.int64) * (BLOCK // WIDTH)


@triton.jit
def _block(
    entry_ptr, numbers, block, remaining, place, valid, statistics_ptr, held, g_raw, g, lap, sum_squares, m_raw, v_raw,
    r_raw, mask_raw, theta_raw, low_raw, theta_ptr, low_ptr, m_ptr, v_ptr, r_ptr, k_ptr, rule,
    P: tl.constexpr, EIGHT: tl.constexpr, WIDTH: tl.constexpr, SPATIAL: tl.constexpr, EDGES: tl.constexpr,
    TORQUE_ON: tl.constexpr, CAME: tl.constexpr, CAUTIOUS: tl.constexpr, BACKGROUND: tl.constexpr, AWARE: tl.constexpr,
    WARM: tl.constexpr, AUTO: tl.constexpr, ECC: tl.constexpr, STOCHASTIC: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """One block; returns Σ 2^(k/16) and auto_lr's two sums over it, and what factored v and r have seen.

    Elements behind the end are held at g = m = v = r = 0, which leaves every sum alone. CAREFUL: some gradient of the
    block (g_raw) is not finite, and those elements keep what they have.

    Args:
        place: int32 [256], where the elements lie from the program's first on; the pointers point there.
        numbers: float32 [32], `Number` of the tensor, one a thread; its RATE over W, and times d.
        statistics_ptr: [32], where what is kept of the block lies, one a thread.
        held: float32 [32], what lies there.
        v_raw, r_raw: codes, float32 values, or the tile's estimates.
        rule: the run-time numbers of the rule, as `step_kernel` puts them together.
    """
    (
        beta1, beta2, beta3, gain1, gain2, gain3, eps1, eps2, clip_threshold, frequency, edge_penalty, edge_threshold,
        detail, book1_ptr, book2_ptr, cells, key, bounded,
    ) = rule  # fmt: skip
    per = codec.reciprocal(remaining.to(tl.float32)) if CAREFUL else 1 / 256
    usable = stencil.usable(g_raw)
    CODES: tl.constexpr = EIGHT and WIDTH == 0
    absmax1, absmax2, absmax3 = 1.0, 1.0, 1.0
    # The moments over their absmax: that is multiplied in together with the decay.
    m_old, v_old, r_old = m_raw, v_raw, r_raw
    if CODES:
        v_old, absmax2 = codec.decode(v_raw, book2_ptr), lanes.of_lane(held, ABSMAX2)
    if EIGHT:
        m_old, absmax1 = codec.decode(m_raw, book1_ptr), lanes.of_lane(held, ABSMAX1)
    if CODES and CAME:
        r_old, absmax3 = codec.decode(r_raw, book2_ptr), lanes.of_lane(held, ABSMAX3)

    # 1. Spatial filter.
    filtered = g
    if SPATIAL:
        filtered = g + frequency * lap
        if EDGES:
            # e in units of the Laplacian: `scale` brings it to units of the block's gradient
            noise = 4.472135955 * tl.sqrt(sum_squares * per) + 1e-30
            scale = codec.reciprocal(noise)
            e = tl.minimum(tl.abs(lap), MAX_EDGE * noise)
            e = tl.where(e > edge_threshold * noise, e, 0.0)
            history = 0.9 * lanes.of_lane(held, EDGE) + 0.1 * (tl.sum(e, 0) * (scale * per))
            _keep(statistics_ptr, EDGE, history, 1)
            # e >= 0: the factor is never above 1
            filtered = filtered * tl.maximum(1 - lanes.over_block(edge_penalty * history * scale) * e, 0.1)

    # 2. Second moment, activity, clipping.
    v_seen = filtered * filtered + eps1
    v = _decayed(v_old, beta2, absmax2, CODES) + gain2 * v_seen
    if CAREFUL:
        v = tl.where(usable, v, _decayed(v_old, 1.0, absmax2, CODES))
        v_seen = tl.where(valid, tl.where(usable, v_seen, v_old), 0.0)
    # The bias correction, 1 / sqrt(correction), is a factor of the block too.
    # eps1 keeps v above 0 (see `launch`), but where an element was skipped from the start
    u = filtered * tl.rsqrt(tl.maximum(v, codec.TINY) if CAREFUL else v)
    correction = lanes.of_lane(numbers, N_CORRECTION2)  # the root of 1 - β2^t
    # Both sums are taken before the factors of the block are known: neither then waits for the other.
    energy = tl.sum(u * u, 0) * (correction * correction)
    if TORQUE_ON:
        aligned = absmax1 * tl.sum(m_old * u, 0)
    activity = energy * per
    shrink = tl.minimum(clip_threshold * tl.rsqrt(tl.maximum(activity, codec.TINY)), 1.0)
    u = u * lanes.over_block(shrink * correction)
    energy = energy * shrink * shrink

    # 3. Torque.
    damping = gain1 + tl.zeros((32,), tl.float32)
    if TORQUE_ON:
        norms = (absmax1 * absmax1) * tl.sum(m_old * m_old, 0) * energy
        torque = 0.9 * lanes.of_lane(held, TORQUE) + 0.1 * (aligned * (shrink * correction) * tl.rsqrt(norms + 1e-30))
        _keep(statistics_ptr, TORQUE, torque, 1)
        damping = damping * (1 + tl.clamp(lanes.of_lane(numbers, N_KAPPA) * torque, -1.0, 1.0))
    m = _decayed(m_old, beta1, absmax1, EIGHT) + lanes.over_block(damping) * u
    used = (usable & valid).to(tl.int32)
    touched = 1
    if CAREFUL:
        m = tl.where(usable, m, _decayed(m_old, 1.0, absmax1, EIGHT))
        touched = tl.sum(used, 0)

    start = block.to(tl.int64) * BLOCK
    bits = codec.random_bits(key, start)
    if WIDTH:
        tiles.move_rows(
            _row_ptr(entry_ptr, V_ROW, block, WIDTH), v_seen, used, remaining, per, beta2, gain2, WIDTH, CAREFUL
        )
    else:
        _write_moment(v_ptr, statistics_ptr, ABSMAX2, place, v, bits, cells, valid, touched, EIGHT, False)
    _write_moment(m_ptr, statistics_ptr, ABSMAX1, place, m, bits, cells, valid, touched, EIGHT, True)

    # 4. Confidence.
    n = m
    weight = lanes.of_lane(numbers, N_CORRECTION1)
    r_seen = v_seen
    if CAME:
        off = u - m
        r_seen = off * off + eps2
        r = _decayed(r_old, beta3, absmax3, CODES) + gain3 * r_seen
        if CAREFUL:
            r = tl.where(usable, r, _decayed(r_old, 1.0, absmax3, CODES))
            r_seen = tl.where(valid, tl.where(usable, r_seen, r_old), 0.0)
        correction3 = lanes.of_lane(numbers, N_CORRECTION3)  # 1 - β3^t: r / correction3 >= 0.01
        n = m * tl.rsqrt(tl.maximum(r, lanes.over_block(0.01 * correction3)))
        weight = weight * tl.sqrt(correction3)
        if WIDTH:
            tiles.move_rows(
                _row_ptr(entry_ptr, R_ROW, block, WIDTH), r_seen, used, remaining, per, beta3, gain3, WIDTH, CAREFUL
            )
        else:
            _write_moment(r_ptr, statistics_ptr, ABSMAX3, place, r, bits, cells, valid, touched, EIGHT, False)

    # 5. Cautious, 6. background: both end in a factor of the block.
    if CAUTIOUS:
        agrees = (n * g > 0).to(tl.float32)
        n = n * agrees
        # Whole numbers are summed over a warp in one instruction.
        count = tl.sum(tl.sum(tl.reshape(agrees, (BLOCK // 8, 8)), 1).to(tl.int32), 0)
        weight = weight * codec.reciprocal(tl.maximum(count.to(tl.float32) * per, 0.25))
    if BACKGROUND:
        weight = tl.where(activity < 0.1, 0.5 * weight, weight)

    # 7. Learning-rate mask.
    unit = lanes.of_lane(numbers, N_RATE)
    mask_sum = 0.0
    if WARM:
        mean = tl.sum(u, 0) * per
        variance = tl.maximum(energy * per - mean * mean, 0.0)
        k = _move_mask(
            entry_ptr, numbers, start, k_ptr, mask_raw, g, statistics_ptr, held, variance, bits, place, valid, usable,
            detail, EIGHT, AWARE, CAREFUL,
        )  # fmt: skip
        factor = tl.exp2(codec.mask_exponent(k, 0.0) if EIGHT else k * 0.0625)
        mask_sum = tl.sum(tl.where(valid, factor, 0.0), 0)
        rates = factor * lanes.over_block(unit)
    else:  # the scale goes into the exponent
        shift = lanes.over_block(codec.log2(unit))
        if EIGHT:
            rates = tl.exp2(codec.mask_exponent(mask_raw, shift))
        else:
            rates = tl.exp2(mask_raw * 0.0625 + shift)
    if bounded != 0:
        low, high = lanes.over_block(lanes.of_lane(numbers, N_LOW)), lanes.over_block(lanes.of_lane(numbers, N_HIGH))
        rates = tl.minimum(tl.maximum(rates, low), high)

    # 8. Update.
    theta = codec.join_master(theta_raw, low_raw) if ECC else codec.widen(theta_raw)
    numerator, denominator = 0.0, 0.0
    if AUTO:
        shift = tl.load(entry_ptr + PROBE_SHIFT).to(tl.int32)
        if (block & ((1 << shift) - 1)) == 0:
            numerator, denominator = _probe(entry_ptr, numbers, block >> shift, valid, g, theta, tl.sqrt(beta2), P)
    decay = lanes.over_block(lanes.of_lane(numbers, N_DECAY))
    theta = theta - rates * (n * lanes.over_block(weight) + decay * theta)
    if ECC:
        rounded, low = codec.split_master(theta, bits, STOCHASTIC)
        if CAREFUL:
            low = tl.where(usable, low, low_raw)
        tl.store(low_ptr + place, low, mask=valid)
    elif STOCHASTIC:
        rounded = codec.round_stochastic(theta, bits, P)
    else:
        if P == tl.float16:
            theta = tl.clamp(theta, -65504.0, 65504.0)
        rounded = theta.to(P)
    if CAREFUL:
        rounded = tl.where(usable, rounded, theta_raw)
    tl.store(theta_ptr + place, rounded, mask=valid)
    return mask_sum, numerator, denominator, v_seen, r_seen


@triton.jit
def _decayed(old, beta, absmax, CODED: tl.constexpr):
    """beta times a moment, of which `old` is over absmax where it is coded."""
    if CODED:
        return lanes.over_block(beta * absmax) * old
    else:
        return beta * old


@triton.jit
def _move_mask(
    entry_ptr, numbers, start, k_ptr, mask_raw, g, statistics_ptr, held, variance, random, place, valid, usable,
    detail, EIGHT: tl.constexpr, AWARE: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Step 7 during warm-up: σ, k and π are updated in place. Tensors past theirs leave all as it is.

    Returns k, or the byte of k and π where that is what is kept.
    """
    learn, change = lanes.of_lane(numbers, N_LEARN) != 0, lanes.of_lane(numbers, N_ADAPT)
    before = lanes.of_lane(held, SIGMA)
    sigma = 0.9 * before + 0.1 * variance
    _keep(statistics_ptr, SIGMA, tl.where(learn, sigma, before), 1)
    if AWARE:
        change = change * tl.clamp(detail * sigma, 0.5, 1.5)
    if EIGHT:
        up, down = codec.mask_steps(change)
        taken = lanes.over_block(tl.where(learn, 0x10000, 0))
        moved = codec.move_mask(mask_raw, g > 0, lanes.over_block(up), lanes.over_block(down), taken, random)
    else:
        learn, change = lanes.over_block(learn), lanes.over_block(change)
        polarity_ptr = address(entry_ptr, POLARITY, tl.uint8) + start + tl.arange(0, BLOCK)
        polarity = tl.load(polarity_ptr, mask=valid, other=0)
        positive = (g > 0).to(tl.uint8)
        moved = tl.clamp(mask_raw + tl.where(positive == polarity, change, -change), -32.0, 31.0)
        positive = tl.where(learn, positive, polarity)
        if CAREFUL:
            positive = tl.where(usable, positive, polarity)
        tl.store(polarity_ptr, positive, mask=valid)
    if CAREFUL:
        moved = tl.where(usable, moved, mask_raw)
    tl.store(k_ptr + place, moved, mask=valid)
    return moved


@triton.jit
def _probe(entry_ptr, numbers, number, valid, g, theta, decay, P: tl.constexpr):
    """auto_lr's watch over the block that is probe `number`: ω Σ g (θ0 - θ), and Σ|z| with z updated."""
    place = number.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(address(entry_ptr, RATE, tl.float32, 4))
    omega = lanes.over_block(d * d * lanes.of_lane(numbers, N_PROBE))
    moved = tl.where(valid, tl.load(address(entry_ptr, PROBE_START, P) + place).to(tl.float32) - theta, 0.0)
    sum_ptr = address(entry_ptr, PROBE_SUM, tl.float32) + place
    z = decay * tl.load(sum_ptr) + omega * g
    tl.store(sum_ptr, z)
    return tl.sum(omega * g * moved, 0), tl.sum(tl.abs(z), 0)


@triton.jit
def _blocks(
    entry_ptr, numbers, first, stride, blocks, unusual, tile, v_sums, r_sums, size, grad_address, clip, rule,
    P: tl.constexpr, G: tl.constexpr, WIDE: tl.constexpr, EIGHT: tl.constexpr, WIDTH: tl.constexpr,
    SPATIAL: tl.constexpr, EVEN: tl.constexpr, EDGES: tl.constexpr, TORQUE_ON: tl.constexpr, CAME: tl.constexpr,
    CAUTIOUS: tl.constexpr, BACKGROUND: tl.constexpr, AWARE: tl.constexpr, WARM: tl.constexpr,
    AUTO: tl.constexpr, SCALED: tl.constexpr, ECC: tl.constexpr, STOCHASTIC: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Up to 16 blocks, `stride` apart: the usual ones, or (CAREFUL) those whose bit is set in `unusual`.

    A block is unusual if a gradient of it, or one beside it, is not finite. Returns the sums of `_block` and, of the
    usual ones, the bits of the unusual; of those, the number of elements skipped; and `v_sums`, `r_sums` with what
    factored moments have seen added.

    Args:
        tile: with factored moments where the column means of v and r begin, and 1 / mean of the tile, of v and r.
    """
    STATE: tl.constexpr = tl.uint8 if EIGHT else tl.float32
    EMPTY: tl.constexpr = 127 if EIGHT else 0
    EARLY: tl.constexpr = WIDTH > 0
    elements, threads = tl.arange(0, BLOCK), tl.arange(0, 32)
    statistics_ptr = tl.load(entry_ptr + FIRST_STATISTIC + threads, mask=threads < STATISTICS, other=0)
    kept = statistics_ptr != 0
    statistics_ptr = statistics_ptr.to(tl.pointer_type(tl.float32))
    rows, cols = tl.load(entry_ptr + ROWS), tl.load(entry_ptr + COLS)
    first_element = first.to(tl.int64) * BLOCK
    m_ptr = address(entry_ptr, M, STATE) + first_element
    v_ptr = address(entry_ptr, V, STATE) + first_element
    r_ptr = v_ptr
    if CAME:
        r_ptr = address(entry_ptr, R, STATE) + first_element
    k_ptr = address(entry_ptr, K, STATE) + first_element
    theta_ptr = address(entry_ptr, THETA, P, WIDE) + first_element
    low_ptr = address(entry_ptr, RESIDUAL, tl.int8) + first_element
    grad_ptr = tl.multiple_of(grad_address.to(tl.pointer_type(G)), WIDE) + first_element
    if EVEN:  # where in its row the block begins; a tile's blocks all begin there
        column = (first_element % cols).to(tl.int32)
        width = tl.multiple_of(cols.to(tl.int32), 8)
        lead = tl.multiple_of(tl.minimum(tl.maximum(cols - first_element, 0), FAR).to(tl.int32), 8)
        tail = tl.multiple_of(tl.minimum(tl.maximum(size - cols - first_element, 0), FAR).to(tl.int32), 8)
    mask_sum, numerator, denominator = 0.0, 0.0, 0.0
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
        place = i * stride * BLOCK + elements
        g_ptr = grad_ptr + i * stride * BLOCK
        # Everything is asked for before anything is waited for; `volatile`, as ptxas would otherwise put off what only
        # the branch below needs. (With codes of v and r too that costs more registers than it is worth.)
        g_raw = codec.widen(tl.load(grad_ptr + place, mask=valid, other=0))
        m_raw = tl.load(m_ptr + place, mask=valid, other=EMPTY, volatile=EARLY)
        if WIDTH:
            v_raw = tiles.estimate(_row_ptr(entry_ptr, V_ROW, block, WIDTH), tile[0], tile[2], remaining, WIDTH)
        else:
            v_raw = tl.load(v_ptr + place, mask=valid, other=0)
        r_raw = v_raw
        if CAME:
            if WIDTH:
                r_raw = tiles.estimate(_row_ptr(entry_ptr, R_ROW, block, WIDTH), tile[1], tile[3], remaining, WIDTH)
            else:
                r_raw = tl.load(r_ptr + place, mask=valid, other=0)
        mask_raw = tl.load(k_ptr + place, mask=valid, other=0, volatile=EARLY)
        theta_raw = tl.load(theta_ptr + place, mask=valid, other=0, volatile=EARLY)
        low_raw = theta_raw
        if ECC:
            low_raw = tl.load(low_ptr + place, mask=valid, other=0, volatile=EARLY)
        held = tl.load(statistics_ptr + block, mask=kept, other=0.0, volatile=EARLY)
        if SCALED:
            g_raw = g_raw * clip
        g = g_raw
        if CAREFUL:
            g = tl.where(stencil.usable(g_raw), g_raw, 0.0)
        lap = g
        if SPATIAL:
            if EVEN and not CAREFUL:
                lap = stencil.laplacian_even(g_ptr, g, elements, place, column, lead, tail, width, clip, SCALED)
            else:
                lap = stencil.laplacian(g_ptr, g, elements, start, size, rows, cols, valid, clip, SCALED)
                lap = tl.where(valid, lap, 0.0)
        if CAREFUL:
            lap = tl.where(stencil.usable(g_raw), lap, 0.0)
            sum_squares = tl.sum(g * g, 0)
            mine = ((unusual >> i) & 1) != 0
        else:
            # The block and what lies beside it are finite if the sum of squares is below the bound's square and no
            # Laplacian reaches the bound. The careful way is right in any case.
            sum_squares = tl.sum(g * g, 0)
            mine = sum_squares < stencil.MAX_GRADIENT * stencil.MAX_GRADIENT
            if SPATIAL:
                mine = mine & (stencil.largest_bits(lap) < stencil.MAX_GRADIENT_BITS)
        if mine:
            w, a, b, v_seen, r_seen = _block(
                entry_ptr, numbers, block, remaining, place, valid, statistics_ptr + block, held, g_raw, g, lap,
                sum_squares, m_raw, v_raw, r_raw, mask_raw, theta_raw, low_raw, theta_ptr, low_ptr, m_ptr, v_ptr, r_ptr,
                k_ptr, rule, P, EIGHT, WIDTH, SPATIAL, EDGES, TORQUE_ON, CAME, CAUTIOUS, BACKGROUND, AWARE, WARM, AUTO,
                ECC, STOCHASTIC, CAREFUL,
            )  # fmt: skip
            mask_sum += w
            numerator += a
            denominator += b
            if WIDTH:
                v_sums += v_seen
                if CAME:
                    r_sums += r_seen
            if CAREFUL:
                bits += tl.sum(tl.where(stencil.usable(g_raw), 0, 1), 0)
        elif not CAREFUL:
            bits |= 1 << i
        if EVEN and WIDTH == 0:
            column += BLOCK
            if width >= BLOCK:
                column = tl.where(column >= width, column - width, column)
            else:
                column = column % width
        i += 1
    return mask_sum, numerator, denominator, bits, v_sums, r_sums


@triton.jit
def _span(
    entry_ptr, numbers, first, stride, blocks, tile, v_sums, r_sums, size, grad_address, clip, rule,
    P: tl.constexpr, G: tl.constexpr, WIDE: tl.constexpr, EIGHT: tl.constexpr, WIDTH: tl.constexpr,
    SPATIAL: tl.constexpr, EVEN: tl.constexpr, EDGES: tl.constexpr, TORQUE_ON: tl.constexpr, CAME: tl.constexpr,
    CAUTIOUS: tl.constexpr, BACKGROUND: tl.constexpr, AWARE: tl.constexpr, WARM: tl.constexpr,
    AUTO: tl.constexpr, SCALED: tl.constexpr, ECC: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """`_blocks`, first the usual ones and then the others; returns the same, but the elements skipped for the bits."""
    skipped = first * 0
    mask_sum, numerator, denominator, unusual, v_sums, r_sums = _blocks(
        entry_ptr, numbers, first, stride, blocks, 0, tile, v_sums, r_sums, size, grad_address, clip, rule, P, G,
        WIDE, EIGHT, WIDTH, SPATIAL, EVEN, EDGES, TORQUE_ON, CAME, CAUTIOUS, BACKGROUND, AWARE, WARM, AUTO, SCALED,
        ECC, STOCHASTIC, False,
    )  # fmt: skip
    if unusual != 0:
        w, a, b, skipped, v_sums, r_sums = _blocks(
            entry_ptr, numbers, first, stride, blocks, unusual, tile, v_sums, r_sums, size, grad_address, clip,
            rule, P, G, WIDE, EIGHT, WIDTH, SPATIAL, EVEN, EDGES, TORQUE_ON, CAME, CAUTIOUS, BACKGROUND, AWARE, WARM,
            AUTO, SCALED, ECC, STOCHASTIC, True,
        )  # fmt: skip
        mask_sum += w
        numerator += a
        denominator += b
        # Whole numbers: the order of the additions does not matter.
        tl.atomic_add(address(entry_ptr, STATS, tl.float32, 4) + N_SKIPPED, skipped.to(tl.float32))
    return mask_sum, numerator, denominator, skipped, v_sums, r_sums


@triton.jit
def _tile(
    entry_ptr, numbers, local, size, grad_address, clip, rule,
    P: tl.constexpr, G: tl.constexpr, WIDE: tl.constexpr, BLOCKS: tl.constexpr, EIGHT: tl.constexpr,
    WIDTH: tl.constexpr, HEIGHT: tl.constexpr, SPATIAL: tl.constexpr, EVEN: tl.constexpr, EDGES: tl.constexpr,
    TORQUE_ON: tl.constexpr, CAME: tl.constexpr, CAUTIOUS: tl.constexpr, BACKGROUND: tl.constexpr, AWARE: tl.constexpr,
    WARM: tl.constexpr, AUTO: tl.constexpr, SCALED: tl.constexpr, ECC: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """One tile of factored moments: see `factored.Tiling`. Its column means stay as they were until all is seen."""
    strips = tl.load(entry_ptr + STRIPS).to(tl.int32)
    first = local // strips * HEIGHT * strips + local % strips
    blocks = tl.minimum(tl.cdiv(tl.cdiv(size, BLOCK) - first, strips), HEIGHT).to(tl.int32)
    mask_sum, numerator, denominator, skipped = 0.0, 0.0, 0.0, local * 0
    if blocks > 0:
        counts = tiles.counts_of(size, first, strips, blocks, WIDTH)
        v_col_ptr = address(entry_ptr, V_COL, tl.float32) + local * WIDTH
        r_col_ptr = address(entry_ptr, R_COL, tl.float32) + local * WIDTH
        v_scale = tiles.scale_of(v_col_ptr, counts, WIDTH)
        r_scale = v_scale
        if CAME:
            r_scale = tiles.scale_of(r_col_ptr, counts, WIDTH)
        tile = (v_col_ptr, r_col_ptr, v_scale, r_scale)
        v_sums, r_sums = tl.zeros((BLOCK,), dtype=tl.float32), tl.zeros((BLOCK,), dtype=tl.float32)
        done = local * 0
        while done < blocks:
            w, a, b, skips, v_sums, r_sums = _span(
                entry_ptr, numbers, first + done * strips, strips, tl.minimum(blocks - done, BLOCKS), tile, v_sums,
                r_sums, size, grad_address, clip, rule, P, G, WIDE, EIGHT, WIDTH, SPATIAL, EVEN, EDGES, TORQUE_ON, CAME,
                CAUTIOUS, BACKGROUND, AWARE, WARM, AUTO, SCALED, ECC, STOCHASTIC,
            )  # fmt: skip
            mask_sum += w
            numerator += a
            denominator += b
            skipped += skips
            done += BLOCKS
        if skipped.to(tl.float32) < tl.sum(counts, 0):  # a tile in which all was skipped keeps its very means
            tiles.move_columns(v_col_ptr, v_sums, counts, rule[1], rule[4], WIDTH)  # β2, 1 - β2
            if CAME:
                tiles.move_columns(r_col_ptr, r_sums, counts, rule[2], rule[5], WIDTH)  # β3, 1 - β3
    return mask_sum, numerator, denominator


@triton.jit
def step_kernel(
    table_ptr, numbers_ptr, grads_ptr, owners_ptr, partials_ptr, book1_ptr, book2_ptr, cells_ptr, clips_ptr,
    beta1, beta2, beta3, gain1, gain2, gain3, eps1, eps2, clip_threshold, frequency, edge_penalty, edge_threshold,
    detail,
    P: tl.constexpr, G: tl.constexpr, WIDE: tl.constexpr, BLOCKS: tl.constexpr, EIGHT: tl.constexpr,
    WIDTH: tl.constexpr, HEIGHT: tl.constexpr, SPATIAL: tl.constexpr, EVEN: tl.constexpr, EDGES: tl.constexpr,
    TORQUE_ON: tl.constexpr, CAME: tl.constexpr, CAUTIOUS: tl.constexpr, BACKGROUND: tl.constexpr, AWARE: tl.constexpr,
    WARM: tl.constexpr, AUTO: tl.constexpr, SCALED: tl.constexpr, ECC: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Update every tensor of a bucket.

    Args:
        table_ptr: int64 [tensors, Column], addresses and sizes.
        numbers_ptr: float32 [tensors, Number], this step's scalars.
        grads_ptr: int64 [tensors], addresses of the gradients; 0 where a tensor has none this time.
        owners_ptr: int32 [programs], the tensor each program works on.
        gain1: 1 - beta1, and so on; in float32 1 - 0.999 would be off by 1.3e-5 of it.
        partials_ptr: float32 [programs, 3] out: sums of 2^(k/16) and of auto_lr over the program's blocks.
    """
    program = tl.program_id(0)
    row = tl.load(owners_ptr + program)
    grad_address = tl.load(grads_ptr + row)
    if grad_address != 0:
        entry_ptr = table_ptr + row.to(tl.int64) * _ROW
        size = tl.load(entry_ptr + SIZE)
        local = program - tl.load(entry_ptr + FIRST_PROGRAM).to(tl.int32)
        numbers_ptr += row * _NUMBERS
        clip = 1.0
        if SCALED:
            clip = tl.load(clips_ptr + row)
        threads = tl.arange(0, 32)
        cells = (
            codec.held_cells(cells_ptr), codec.held_cells(cells_ptr + 32), codec.held_cells(cells_ptr + 64),
            codec.held_cells(cells_ptr + 96),
        )  # fmt: skip
        unit = tl.load(numbers_ptr + N_RATE) * codec.reciprocal(tl.load(address(entry_ptr, STATS, tl.float32, 4)))
        if AUTO:
            unit = unit * tl.load(address(entry_ptr, RATE, tl.float32, 4))
        # -32 <= k < 32: else the bounds are out of reach
        bounded = (0.25 * unit < tl.load(numbers_ptr + N_LOW)) | (4.0 * unit > tl.load(numbers_ptr + N_HIGH))
        key = tl.load(numbers_ptr + N_KEY).to(tl.uint32, bitcast=True)
        numbers = tl.load(numbers_ptr + threads, mask=threads < _NUMBERS, other=0.0)
        numbers = tl.where(threads == N_RATE, unit, numbers)
        rule = (
            beta1, beta2, beta3, gain1, gain2, gain3, eps1, eps2, clip_threshold, frequency, edge_penalty,
            edge_threshold, detail, book1_ptr, book2_ptr, cells, key, bounded.to(tl.int32),
        )  # fmt: skip
        if WIDTH:
            mask_sum, numerator, denominator = _tile(
                entry_ptr, numbers, local, size, grad_address, clip, rule, P, G, WIDE, BLOCKS, EIGHT, WIDTH, HEIGHT,
                SPATIAL, EVEN, EDGES, TORQUE_ON, CAME, CAUTIOUS, BACKGROUND, AWARE, WARM, AUTO, SCALED, ECC, STOCHASTIC,
            )  # fmt: skip
        else:
            first = local * BLOCKS
            blocks = tl.minimum(tl.cdiv(size, BLOCK) - first, BLOCKS).to(tl.int32)
            mask_sum, numerator, denominator, _skipped, _v, _r = _span(
                entry_ptr, numbers, first, 1, blocks, (), 0.0, 0.0, size, grad_address, clip, rule, P, G, WIDE,
                EIGHT, WIDTH, SPATIAL, EVEN, EDGES, TORQUE_ON, CAME, CAUTIOUS, BACKGROUND, AWARE, WARM, AUTO, SCALED,
                ECC, STOCHASTIC,
            )  # fmt: skip
        if WARM or AUTO:
            tl.store(partials_ptr + program * 3, mask_sum)
            tl.store(partials_ptr + program * 3 + 1, numerator)
            tl.store(partials_ptr + program * 3 + 2, denominator)


_MAX_REGISTERS = {
    ("8bit", False): 128, ("8bit", True): 96, ("factored", False): 128, ("factored", True): 128, ("32bit", False): 96,
    ("32bit", True): 128,
}  # fmt: skip
"""Per thread, on NVIDIA, by storage and whether the mask moves: more warps at once are worth some spilled registers.
Measured: benchmarks/NOTES.md."""


def _compiler_options(spec: Spec, warm: bool) -> dict[str, Any]:
    on_nvidia = spec.device.type == "cuda" and torch.version.hip is None
    return {"maxnreg": _MAX_REGISTERS[spec.storage, warm]} if on_nvidia else {}


def launch(bucket: Bucket, grads: np.ndarray, sources: list[dict[str, Any]]) -> None:
    """One step of a bucket: at most four launches and one upload, nothing waited for.

    Args:
        grads: int64, the address of each member's gradient, 0 for none; contiguous, in the bucket's gradient dtype.
        sources: the effective options by `Member.source`.
    """
    spec = bucket.spec
    addresses, numbers, warm = bucket.upload_step(grads, sources)
    shared = shared_numbers(sources[bucket.members[0].source])
    betas, eps, clip_threshold, frequency, edge_penalty, edge_threshold, detail = shared
    aligned = bucket.aligned and not (grads & 15).any()
    clips = numbers
    if spec.scaled:
        clips = statistics.clip_factors(bucket, addresses, numbers, codec.DTYPES[spec.grad_dtype], aligned)
    book1, book2 = bnb.code_book(True, spec.device), bnb.code_book(False, spec.device)
    partials = torch.empty(3 * bucket.programs if warm or spec.auto else 0, device=spec.device)
    step_kernel[(bucket.programs,)](
        table_ptr=bucket.table,
        numbers_ptr=numbers,
        grads_ptr=addresses,
        owners_ptr=bucket.owners,
        partials_ptr=partials,
        book1_ptr=book1,
        book2_ptr=book2,
        cells_ptr=codec.cells(spec.device),
        clips_ptr=clips,
        beta1=betas[0],
        beta2=betas[1],
        beta3=betas[2],
        gain1=1 - betas[0],
        gain2=1 - betas[1],
        gain3=1 - betas[2],
        eps1=max(eps[0], reference.LEAST_EPS1),
        eps2=eps[1],
        clip_threshold=clip_threshold,
        frequency=frequency / 8,
        edge_penalty=edge_penalty,
        edge_threshold=edge_threshold,
        detail=detail,
        P=codec.DTYPES[spec.theta_dtype],
        G=codec.DTYPES[spec.grad_dtype],
        WIDE=16 if aligned else 2,
        BLOCKS=BLOCKS_PER_PROGRAM,
        EIGHT=spec.storage != "32bit",
        WIDTH=spec.width,
        HEIGHT=tile_height(spec.width),
        SPATIAL=spec.spatial,
        EVEN=spec.even,
        EDGES=spec.edges,
        TORQUE_ON=spec.torque,
        CAME=spec.came,
        CAUTIOUS=spec.cautious,
        BACKGROUND=spec.background,
        AWARE=spec.aware,
        WARM=warm,
        AUTO=spec.auto,
        SCALED=spec.scaled,
        ECC=spec.residual,
        STOCHASTIC=spec.stochastic,
        num_warps=1,
        **_compiler_options(spec, warm),
    )
    if warm or spec.auto:
        statistics.finalise(bucket, addresses, numbers, partials, betas[1], warm)
    bucket.count()  # while the device works
