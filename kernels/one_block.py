"""The rule on one block of 256 elements, steps 1 to 8 of `automagic_bnb.reference`: one warp's work, all in registers.

The block's elements lie 8 neighbouring ones to a thread, what is kept of the block one to a thread (see `lanes`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from automagic_bnb.kernels import codec, lanes, stencil, tiles
from automagic_bnb.kernels.tables import Column, Number

from automagic_bnb import quantization as q
from automagic_bnb import reference

BLOCK = tl.constexpr(q.BLOCK)
MAX_EDGE = tl.constexpr(reference.MAX_EDGE)

_C = {column.name: tl.constexpr(int(column)) for column in Column}
POLARITY, RATE, PROBE_SHIFT = _C["POLARITY"], _C["RATE"], _C["PROBE_SHIFT"]
PROBE_START, PROBE_SUM = _C["PROBE_START"], _C["PROBE_SUM"]
V_ROW, R_ROW = _C["V_ROW"], _C["R_ROW"]
ABSMAX1, ABSMAX2, ABSMAX3, TORQUE, EDGE, SIGMA = (
    tl.constexpr(Column[name] - Column.ABSMAX1) for name in ("ABSMAX1", "ABSMAX2", "ABSMAX3", "TORQUE", "EDGE", "SIGMA")
)
"""Which thread of a warp holds what is kept of a block."""

_N = {number.name: tl.constexpr(int(number)) for number in Number}
N_RATE, N_LOW, N_HIGH, N_DECAY, N_KAPPA = _N["RATE"], _N["LOW"], _N["HIGH"], _N["WEIGHT_DECAY"], _N["KAPPA"]
N_CORRECTION1, N_CORRECTION2, N_CORRECTION3 = _N["CORRECTION1"], _N["CORRECTION2"], _N["CORRECTION3"]
N_ADAPT, N_LEARN, N_PROBE = _N["ADAPT_MASK"], _N["LEARN_POLARITY"], _N["PROBE_WEIGHT"]


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
def row_ptr(entry_ptr, column: tl.constexpr, block, WIDTH: tl.constexpr):
    """Where the row means of a block begin."""
    return address(entry_ptr, column, tl.float32, 4) + block.to(tl.int64) * (BLOCK // WIDTH)


@triton.jit
def update(
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
            weakened = _weakened(statistics_ptr, held, lap, sum_squares, per, edge_penalty, edge_threshold)
            filtered = filtered * weakened

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
            row_ptr(entry_ptr, V_ROW, block, WIDTH), v_seen, used, remaining, per, beta2, gain2, WIDTH, CAREFUL
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
                row_ptr(entry_ptr, R_ROW, block, WIDTH), r_seen, used, remaining, per, beta3, gain3, WIDTH, CAREFUL
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
    unit, k = lanes.of_lane(numbers, N_RATE), mask_raw
    if WARM:
        mean = tl.sum(u, 0) * per
        variance = tl.maximum(energy * per - mean * mean, 0.0)
        k = _move_mask(
            entry_ptr, numbers, start, k_ptr, mask_raw, g, statistics_ptr, held, variance, bits, place, valid, usable,
            detail, EIGHT, AWARE, CAREFUL,
        )  # fmt: skip
    rates, mask_sum = _rates(numbers, unit, k, valid, bounded, EIGHT, WARM)

    # 8. Update.
    theta = codec.join_master(theta_raw, low_raw) if ECC else codec.widen(theta_raw)
    numerator, denominator = 0.0, 0.0
    if AUTO:
        shift = tl.load(entry_ptr + PROBE_SHIFT).to(tl.int32)
        if (block & ((1 << shift) - 1)) == 0:
            numerator, denominator = _probe(entry_ptr, numbers, block >> shift, valid, g, theta, tl.sqrt(beta2), P)
    decay = lanes.over_block(lanes.of_lane(numbers, N_DECAY))
    theta = theta - rates * (n * lanes.over_block(weight) + decay * theta)
    _write_weights(
        theta_ptr + place, low_ptr + place, theta, theta_raw, low_raw, bits, valid, usable, P, ECC, STOCHASTIC, CAREFUL
    )
    return mask_sum, numerator, denominator, v_seen, r_seen


@triton.jit
def _weakened(statistics_ptr, held, lap, sum_squares, per, edge_penalty, edge_threshold):
    """By what step 1 multiplies where edges are, [256], at most 1; h is updated in place."""
    # e in units of the Laplacian: `scale` brings it to units of the block's gradient
    noise = 4.472135955 * tl.sqrt(sum_squares * per) + 1e-30
    scale = codec.reciprocal(noise)
    e = tl.minimum(tl.abs(lap), noise * MAX_EDGE)
    e = tl.where(e > edge_threshold * noise, e, 0.0)
    history = 0.9 * lanes.of_lane(held, EDGE) + 0.1 * (tl.sum(e, 0) * (scale * per))
    _keep(statistics_ptr, EDGE, history, 1)
    return tl.maximum(1 - lanes.over_block(edge_penalty * history * scale) * e, 0.1)


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
def _rates(numbers, unit, k, valid, bounded, EIGHT: tl.constexpr, WARM: tl.constexpr):
    """Each element's rate, [256], and in warm-up Σ 2^(k/16), else 0; k is as `_move_mask` returns it.

    unit: float32 [32], the rate at k = 0.
    """
    mask_sum = 0.0
    if WARM:
        factor = tl.exp2(codec.mask_exponent(k, 0.0) if EIGHT else k * 0.0625)
        mask_sum = tl.sum(tl.where(valid, factor, 0.0), 0)
        rates = factor * lanes.over_block(unit)
    else:  # the scale goes into the exponent
        shift = lanes.over_block(codec.log2(unit))
        if EIGHT:
            rates = tl.exp2(codec.mask_exponent(k, shift))
        else:
            rates = tl.exp2(k * 0.0625 + shift)
    if bounded != 0:
        low, high = lanes.over_block(lanes.of_lane(numbers, N_LOW)), lanes.over_block(lanes.of_lane(numbers, N_HIGH))
        rates = tl.minimum(tl.maximum(rates, low), high)
    return rates, mask_sum


@triton.jit
def _write_weights(
    theta_ptr, low_ptr, theta, theta_raw, low_raw, bits, valid, usable, P: tl.constexpr, ECC: tl.constexpr,
    STOCHASTIC: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Round θ into its dtype and store it, with ECC 8 more bits beside it; what was skipped keeps its bits."""
    if ECC:
        rounded, low = codec.split_master(theta, bits, STOCHASTIC)
        if CAREFUL:
            low = tl.where(usable, low, low_raw)
        tl.store(low_ptr, low, mask=valid)
    elif STOCHASTIC:
        rounded = codec.round_stochastic(theta, bits, P)
    else:
        if P == tl.float16:
            theta = tl.clamp(theta, -65504.0, 65504.0)
        rounded = theta.to(P)
    if CAREFUL:
        rounded = tl.where(usable, rounded, theta_raw)
    tl.store(theta_ptr, rounded, mask=valid)


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
