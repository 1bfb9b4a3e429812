"""The rule on one block of 256 elements, steps 1 to 8 of `automagic_bnb.reference`: one warp's work, all in registers.

The block's elements lie 8 neighbouring ones to a thread, what is kept of the block one to a thread (see `lanes`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from automagic_bnb.kernels import codec, lanes, stencil, tiles
from automagic_bnb.kernels.tables import BLOCK_STATISTICS, Column, Number

from automagic_bnb import estimate, reference
from automagic_bnb import quantization as q
from automagic_bnb import state as st

BLOCK = tl.constexpr(q.BLOCK)
# In products these stand on the right: to the interpreter a constant times a tensor is a constant.
MAX_EDGE, MIN_EDGE_FACTOR = tl.constexpr(reference.MAX_EDGE), tl.constexpr(reference.MIN_EDGE_FACTOR)
LAPLACIAN_NOISE, SILENCE = tl.constexpr(reference.LAPLACIAN_NOISE), tl.constexpr(reference.SILENCE)
STATISTIC_DECAY, STATISTIC_GAIN = tl.constexpr(reference.STATISTIC_DECAY), tl.constexpr(1 - reference.STATISTIC_DECAY)
MIN_RESIDUAL, MIN_CAUTIOUS_SHARE = tl.constexpr(reference.MIN_RESIDUAL), tl.constexpr(reference.MIN_CAUTIOUS_SHARE)
BACKGROUND_ACTIVITY = tl.constexpr(reference.BACKGROUND_ACTIVITY)
BACKGROUND_FACTOR = tl.constexpr(reference.BACKGROUND_FACTOR)
MIN_CHANGE, MAX_CHANGE = tl.constexpr(reference.MIN_CHANGE), tl.constexpr(reference.MAX_CHANGE)
NO_SIGN = tl.constexpr(q.NO_SIGN)
K_MIN, K_MAX = tl.constexpr(reference.K_MIN), tl.constexpr(reference.K_MAX)
OCTAVES = tl.constexpr(1 / reference.OCTAVE)
LEAST_MOMENTUM = tl.constexpr(estimate.LEAST_MOMENTUM)

_C = {column.name: tl.constexpr(int(column)) for column in Column}
POLARITY, PROBE_SHIFT = _C["LAST_POLARITY"], _C["PROBE_SHIFT"]
PROBE_START, PROBE_BLOCK = _C["PROBE_START"], _C["PROBE_BLOCK"]
PROBE_FREE, PROBE_CLAIM = tl.constexpr(st.PROBE_FREE), tl.constexpr(st.PROBE_CLAIM)
PROBE_TURN = tl.constexpr(st.PROBE_TURN)
V_ROW, R_ROW = _C["EXP_AVG_SQ_ROW"], _C["EXP_AVG_RES_ROW"]
STATS, RATE, DIRECTION = _C["TENSOR_STATS"], _C["RATE"], _C["DIRECTION"]
_LANES = {name: tl.constexpr(lane) for lane, name in enumerate(BLOCK_STATISTICS)}
ABSMAX1, ABSMAX2, ABSMAX3 = _LANES["absmax1"], _LANES["absmax2"], _LANES["absmax3"]
TORQUE, EDGE_HISTORY, SPATIAL_VARIANCE = _LANES["torque"], _LANES["edge_history"], _LANES["spatial_variance"]
"""Which thread of a warp holds what is kept of a block."""

_N = {number.name: tl.constexpr(int(number)) for number in Number}
N_RATE, N_LOW, N_HIGH, N_DECAY, N_KAPPA = _N["RATE"], _N["LOW"], _N["HIGH"], _N["WEIGHT_DECAY"], _N["KAPPA"]
N_CORRECTION1, N_CORRECTION2, N_CORRECTION3 = _N["CORRECTION1"], _N["CORRECTION2"], _N["CORRECTION3"]
N_ADAPT, N_LEARN = _N["ADAPT_MASK"], _N["LEARN_POLARITY"]
_NUMBERS = tl.constexpr(len(Number))

LEAST_FACTOR = tl.constexpr(2 ** (reference.K_MIN / reference.OCTAVE))
BEYOND_FACTOR = tl.constexpr(2 ** ((reference.K_MAX + 1) / reference.OCTAVE))
"""An element's rate over that at k = 0 is at least the one and below the other."""


class Rule(NamedTuple):
    """The run-time numbers of the rule."""

    # What `step_kernel` is given.
    beta1: Any
    beta2: Any
    beta3: Any
    gain1: Any  # 1 - beta1, and so on
    gain2: Any
    gain3: Any
    eps1: Any
    eps2: Any
    clip_threshold: Any
    frequency: Any  # by which the Laplacian is added
    edge_penalty: Any
    edge_threshold: Any
    detail: Any
    book1_ptr: Any
    book2_ptr: Any
    directions_ptr: Any  # where n is left, with `lora_direction`
    # What it makes of that, for each tensor.
    cells: Any  # four rows of `codec.held_cells`
    key: Any  # uint32, of the random bits
    bounded: Any  # int32: whether min_lr or max_lr may be reached
    turn: Any  # int32: t modulo 2


class Elements(NamedTuple):
    """What is kept of a block: pointers to it, or what was loaded, codes or float32 values."""

    theta: Any  # [256], as the next five
    low: Any  # the bits below θ's
    m: Any
    v: Any  # loaded, of factored moments the tile's estimate
    r: Any
    k: Any  # with two elements a byte [128], and the pointer to the block's own
    statistics: Any  # [32], one a thread


class Place(NamedTuple):
    """Which block this is, and which elements it has."""

    block: Any
    remaining: Any  # int32, how many
    per: Any  # 1 / that
    place: Any  # int32 [256], where they lie from the program's first on; `Elements`' pointers point there
    valid: Any  # bool [256], not behind the end
    usable: Any  # bool [256], their gradient is finite
    # Of a part of a tensor; elsewhere all that is valid is owned:
    owned: Any  # bool [256], whose weights and sums are this process's,
    leads: Any  # whether the block's first element is one of them,
    touched: Any  # whether any is


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
def row_ptr(entry_ptr, column: tl.constexpr, block, S):
    """Where the row means of a block begin."""
    return address(entry_ptr, column, S.MEANS, 2) + block.to(tl.int64) * (BLOCK // S.WIDTH)


@triton.jit
def numbers_of(entry_ptr, numbers_ptr, S):
    """A tensor's numbers, float32 [32], one a thread, its RATE over W and times d, its bounds as they hold; and whether
    min_lr or max_lr may be reached, int32."""
    threads = tl.arange(0, 32)
    mean = tl.load(numbers_ptr + N_RATE)
    if S.AUTO:
        mean = mean * tl.load(address(entry_ptr, RATE, tl.float32, 4))
    unit = mean * codec.reciprocal(tl.load(address(entry_ptr, STATS, tl.float32, 4)))
    low, high = tl.load(numbers_ptr + N_LOW), tl.load(numbers_ptr + N_HIGH)
    low = tl.where(low <= mean, low, 0.0)  # a bound is for single elements, and never moves the mean
    high = tl.where(high < 0, -high * mean, high)
    high = tl.where(high >= mean, high, float("inf"))
    # else they are out of reach
    bounded = (unit * LEAST_FACTOR < low) | (unit * BEYOND_FACTOR > high)
    numbers = tl.load(numbers_ptr + threads, mask=threads < _NUMBERS, other=0.0)
    numbers = tl.where(threads == N_RATE, unit, numbers)
    numbers = tl.where(threads == N_LOW, low, tl.where(threads == N_HIGH, high, numbers))
    return numbers, bounded.to(tl.int32)


@triton.jit
def update(
    entry_ptr, numbers, rule, block, remaining, place, valid, owned, leads, touched, pointers, loaded, g_raw, g, lap,
    sum_squares, S, CAREFUL: tl.constexpr,
):  # fmt: skip
    """One block; returns the number of its elements with a gradient and Σ 2^(k/16) over these, auto_lr's two sums over
    it, and what factored v and r have seen.

    Elements behind the end are held at g = m = v = r = 0, which leaves every sum alone. CAREFUL: some gradient of the
    block (g_raw) is not finite, and those elements keep what they have.

    Args:
        numbers: float32 [32], `Number` of the tensor, one a thread; its RATE over W, and times d.
        rule: `Rule`.
        place, valid, owned, leads, touched: see `Place`.
        pointers, loaded: `Elements`.
        S: `tables.Switches`, a compile-time constant each.
    """
    V: tl.constexpr = tl.uint8 if S.CODES else tl.float32
    per = codec.reciprocal(remaining.to(tl.float32)) if CAREFUL else 1 / BLOCK
    at = Place(block, remaining, per, place, valid, stencil.usable(g_raw), owned, leads, touched)
    statistics_ptr, held = pointers.statistics, loaded.statistics
    m_old, absmax1, v_old, absmax2, r_old, absmax3 = _moments(loaded, rule, S)

    # 1. Spatial filter.
    filtered = g
    if S.SPATIAL:
        lap = tl.where(g != 0, lap, 0.0)  # where there is no gradient the filter makes none
        filtered = g + rule.frequency * lap
        if S.EDGES:
            filtered = filtered * _edge_factor(statistics_ptr, held, lap, sum_squares, per, rule)

    # 2. Second moment, activity, clipping.
    v, v_seen = _moved(v_old, absmax2, filtered * filtered + rule.eps1, rule.beta2, rule.gain2, at, S, CAREFUL)
    # eps1 keeps v above 0 (see `launch`), but where an element was skipped from the start
    u = filtered * tl.rsqrt(tl.maximum(v, codec.TINY) if CAREFUL else v)
    # The bias correction, 1 / sqrt(correction), is a factor of the block too.
    correction = lanes.of_lane(numbers, N_CORRECTION2)  # the root of 1 - β2^t
    # Both sums are taken before the factors of the block are known: neither then waits for the other.
    energy = tl.sum(u * u, 0) * (correction * correction)
    aligned = energy
    if S.TORQUE:
        aligned = absmax1 * tl.sum(m_old * u, 0)
    activity = energy * per
    shrink = tl.minimum(rule.clip_threshold * tl.rsqrt(tl.maximum(activity, codec.TINY)), 1.0)
    u = u * lanes.over_block(shrink * correction)
    energy = energy * shrink * shrink

    # 3. Torque.
    damping = rule.gain1 + tl.zeros((32,), tl.float32)
    if S.TORQUE:
        damping = damping * _torque_factor(
            statistics_ptr, held, numbers, m_old, absmax1, energy, aligned, shrink * correction
        )
    m = _decayed(m_old, rule.beta1, absmax1, S.M == tl.uint8) + lanes.over_block(damping) * u
    used = (at.usable & valid).to(tl.int32)
    touched = 1
    if CAREFUL:
        m = tl.where(at.usable, m, _decayed(m_old, 1.0, absmax1, S.M == tl.uint8))
        touched = tl.sum(used, 0)

    start = block.to(tl.int64) * BLOCK
    bits = codec.random_bits(rule.key, start)
    if S.WIDTH:
        _move_rows(entry_ptr, V_ROW, v_seen, used, at, rule.beta2, rule.gain2, rule.key, S, CAREFUL)
    else:
        _write_moment(pointers.v, statistics_ptr, ABSMAX2, v, at, bits, rule.cells, touched, V, False)
    _write_moment(pointers.m, statistics_ptr, ABSMAX1, m, at, bits, rule.cells, touched, S.M, True)

    # 4. Confidence.
    n = m
    weight = lanes.of_lane(numbers, N_CORRECTION1)
    r_seen = v_seen
    if S.CAME:
        off = u - m
        r, r_seen = _moved(r_old, absmax3, off * off + rule.eps2, rule.beta3, rule.gain3, at, S, CAREFUL)
        correction3 = lanes.of_lane(numbers, N_CORRECTION3)  # 1 - β3^t: r / correction3 >= MIN_RESIDUAL
        n = m * tl.rsqrt(tl.maximum(r, lanes.over_block(correction3 * MIN_RESIDUAL)))
        weight = weight * tl.sqrt(correction3)
        if S.WIDTH:
            _move_rows(entry_ptr, R_ROW, r_seen, used, at, rule.beta3, rule.gain3, rule.key, S, CAREFUL)
        else:
            _write_moment(pointers.r, statistics_ptr, ABSMAX3, r, at, bits, rule.cells, touched, V, False)

    # 5. Cautious, 6. background: both end in a factor of the block.
    active = count(g != 0)
    if S.CAUTIOUS and not S.DIRECTED:
        n, share = cautious(n, g, active)
        weight = weight * codec.reciprocal(share)
    if S.BACKGROUND:
        weight = tl.where(activity < BACKGROUND_ACTIVITY, weight * BACKGROUND_FACTOR, weight)

    # 7. Learning-rate mask.
    unit, k = lanes.of_lane(numbers, N_RATE), loaded.k
    if S.MASK == 4:
        k = codec.unpack_pairs(k)
    if S.WARM:
        k = _move_mask(entry_ptr, numbers, rule, at, pointers, loaded, k, g, u, energy, bits, S)
    g_own, counted = g, active
    if S.PART:
        g_own = tl.where(at.owned, g, 0.0)
        counted = count(g_own != 0)
    each_rate, mask_sum = rates(numbers, unit, k, g_own, rule.bounded, S.MASK, S.WARM)

    # 8. Update.
    theta = u
    if S.AUTO or not S.DIRECTED:
        theta = codec.join_master(loaded.theta, loaded.low) if S.ECC else codec.widen(loaded.theta)
    numerator, denominator = 0.0, 0.0
    if S.AUTO:
        numerator, denominator = _watch(entry_ptr, rule, at, active, g, u, m, theta, S)
    if S.DIRECTED:  # `direction.move_kernel` does the rest
        n_ptr = rule.directions_ptr + tl.load(entry_ptr + DIRECTION) + start
        tl.store(n_ptr + tl.arange(0, BLOCK), n * lanes.over_block(weight), mask=at.valid)
    else:
        decay = lanes.over_block(lanes.of_lane(numbers, N_DECAY))
        theta = theta - each_rate * (n * lanes.over_block(weight) + decay * theta)
        write_weights(theta, pointers, loaded, at, bits, S, CAREFUL)
    return counted, mask_sum, numerator, denominator, v_seen, r_seen


@triton.jit
def _moments(loaded, rule, S):
    """m, v and r over their absmax, and these, which are multiplied in together with the decay; float32."""
    absmax1, absmax2, absmax3 = 1.0, 1.0, 1.0
    m, v, r = loaded.m, loaded.v, loaded.r
    if S.CODES:
        v, absmax2 = codec.decode(loaded.v, rule.book2_ptr), lanes.of_lane(loaded.statistics, ABSMAX2)
    if S.M == tl.uint8:
        m, absmax1 = codec.decode(loaded.m, rule.book1_ptr), lanes.of_lane(loaded.statistics, ABSMAX1)
    else:
        m = m.to(tl.float32)
    if S.CODES and S.CAME:
        r, absmax3 = codec.decode(loaded.r, rule.book2_ptr), lanes.of_lane(loaded.statistics, ABSMAX3)
    return m, absmax1, v, absmax2, r, absmax3


@triton.jit
def _edge_factor(statistics_ptr, held, lap, sum_squares, per, rule):
    """By what step 1 multiplies where edges are, [256], at most 1; h is updated in place."""
    # e in units of the Laplacian: `scale` brings it to units of the block's gradient
    noise = tl.sqrt(sum_squares * per) * LAPLACIAN_NOISE + SILENCE
    scale = codec.reciprocal(noise)
    e = tl.minimum(tl.abs(lap), noise * MAX_EDGE)
    e = tl.where(e > rule.edge_threshold * noise, e, 0.0)
    history = lanes.of_lane(held, EDGE_HISTORY) * STATISTIC_DECAY + tl.sum(e, 0) * (scale * per) * STATISTIC_GAIN
    _keep(statistics_ptr, EDGE_HISTORY, history, 1)
    return tl.maximum(1 - lanes.over_block(rule.edge_penalty * history * scale) * e, MIN_EDGE_FACTOR)


@triton.jit
def _decayed(old, beta, absmax, CODED: tl.constexpr):
    """beta times a moment, of which `old` is over absmax where it is coded."""
    if CODED:
        return lanes.over_block(beta * absmax) * old
    else:
        return beta * old


@triton.jit
def _moved(old, absmax, seen, beta, gain, at, S, CAREFUL: tl.constexpr):
    """v or r after the step, and what it has seen: skipped elements what they have, those behind the end 0."""
    new = _decayed(old, beta, absmax, S.CODES) + gain * seen
    if CAREFUL:
        new = tl.where(at.usable, new, _decayed(old, 1.0, absmax, S.CODES))
        seen = tl.where(at.valid, tl.where(at.usable, seen, old), 0.0)
    return new, seen


@triton.jit
def _torque_factor(statistics_ptr, held, numbers, m, absmax, energy, aligned, factor):
    """Step 3: d, [32]; s is updated in place.

    Args:
        m: the old one, over absmax.
        energy: Σ u².
        aligned: Σ m u, u still to be multiplied by `factor`.
    """
    norms = (absmax * absmax) * tl.sum(m * m, 0) * energy
    torque = lanes.of_lane(held, TORQUE) * STATISTIC_DECAY
    torque += aligned * factor * tl.rsqrt(norms + SILENCE) * STATISTIC_GAIN
    _keep(statistics_ptr, TORQUE, torque, 1)
    return 1 + tl.clamp(lanes.of_lane(numbers, N_KAPPA) * torque, -1.0, 1.0)


@triton.jit
def _write_moment(
    ptr, statistics_ptr, ABSMAX: tl.constexpr, x, at, random, cells, touched, DTYPE: tl.constexpr, SIGNED: tl.constexpr
):
    """Store m to nearest, or v or r stochastically. A block in which all was skipped keeps its very codes.

    Args:
        touched: int32, how many elements were not skipped.
        DTYPE: uint8 for codes, float32, or of m float16.
    """
    if DTYPE == tl.uint8:
        absmax = codec.absmax_of(x, SIGNED)
        if SIGNED:
            codes = codec.encode_signed(x, absmax, cells[0], cells[1])
        else:
            codes = codec.encode_unsigned(x, absmax, random, cells[2], cells[3])
        tl.store(ptr + at.place, codes, mask=tl.where(at.valid, touched, 0) > 0)
        _keep(statistics_ptr, ABSMAX, absmax, touched)
    else:
        if DTYPE == tl.float16:
            x = tl.clamp(x, -codec.MAX_FLOAT16, codec.MAX_FLOAT16)
        tl.store(ptr + at.place, x.to(DTYPE), mask=at.valid)


@triton.jit
def _move_rows(entry_ptr, COLUMN: tl.constexpr, seen, used, at, beta, gain, key, S, CAREFUL: tl.constexpr):
    """Move the row means of factored v or r; used: int32 [256], 1 for what was not skipped."""
    rows_ptr = row_ptr(entry_ptr, COLUMN, at.block, S)
    start = at.block.to(tl.int64) * BLOCK
    tiles.move_rows(rows_ptr, seen, used, at.remaining, at.per, beta, gain, key, start, S.WIDTH, S.MEANS, CAREFUL)


@triton.jit
def count(which):
    """How many of bool [256] are true, int32; whole numbers are summed over a warp in one instruction."""
    return tl.sum(tl.sum(tl.reshape(which.to(tl.float32), (BLOCK // 8, 8)), 1).to(tl.int32), 0)


@triton.jit
def cautious(n, g, active):
    """Step 5: n where it and the gradient agree, 0 elsewhere; and by what that is to be divided, its share of `active`,
    the number of elements with a gradient."""
    # Signs, not the product: that of n with a denormal gradient is 0.
    same = (n.to(tl.int32, bitcast=True) ^ g.to(tl.int32, bitcast=True)) >= 0
    agrees = same & (n != 0) & (g != 0)
    share = count(agrees).to(tl.float32) * codec.reciprocal(tl.maximum(active, 1).to(tl.float32))
    return tl.where(agrees, n, 0.0), tl.maximum(share, MIN_CAUTIOUS_SHARE)


@triton.jit
def _move_mask(entry_ptr, numbers, rule, at, pointers, loaded, k, g, u, energy, random, S):
    """Step 7 during warm-up: σ, k and π are updated in place. Tensors past theirs leave all as it is.

    Takes and returns k, [256]: as numbers, or as the byte or the four bits of k and π.
    """
    mean = tl.sum(u, 0) * at.per
    variance = tl.maximum(energy * at.per - mean * mean, 0.0)
    learn, change = lanes.of_lane(numbers, N_LEARN) != 0, lanes.of_lane(numbers, N_ADAPT)
    before = lanes.of_lane(loaded.statistics, SPATIAL_VARIANCE)
    sigma = before * STATISTIC_DECAY + variance * STATISTIC_GAIN
    _keep(pointers.statistics, SPATIAL_VARIANCE, tl.where(learn, sigma, before), 1)
    if S.AWARE:
        change = change * tl.clamp(rule.detail * sigma, MIN_CHANGE, MAX_CHANGE)
    if S.MASK < 32:
        up, down = codec.mask_steps(change, S.MASK)
        up, down = lanes.over_block(up), lanes.over_block(down)
        taken = lanes.over_block(tl.where(learn, 0x810000, 0))
        if S.MASK == 4:
            moved = codec.move_half(k, g > 0, up, down, taken, random)
        else:
            moved = codec.move_mask(k, g > 0, up, down, taken, random)
    else:
        learn, change = lanes.over_block(learn), lanes.over_block(change)
        start = at.block.to(tl.int64) * BLOCK
        polarity_ptr = address(entry_ptr, POLARITY, tl.uint8) + start + tl.arange(0, BLOCK)
        polarity = tl.load(polarity_ptr, mask=at.valid, other=0)
        positive = (g > 0).to(tl.uint8)
        turned = tl.where(polarity == NO_SIGN, 0.0, tl.where(positive == polarity, change, -change))
        moved = tl.clamp(k + turned, K_MIN, K_MAX)
        positive = tl.where(learn, positive, polarity)
        tl.store(polarity_ptr, tl.where(g != 0, positive, polarity), mask=at.valid)
    moved = tl.where(g != 0, moved, k)  # 0 has no sign: such an element, and one that is skipped, learns nothing
    if S.MASK == 4:
        pairs = tl.arange(0, BLOCK // 2)
        tl.store(pointers.k + pairs, codec.pack_pairs(moved), mask=2 * pairs < at.remaining)
    else:
        tl.store(pointers.k + at.place, moved, mask=at.valid)
    return moved


@triton.jit
def rates(numbers, unit, k, g, bounded, MASK: tl.constexpr, WARM: tl.constexpr):
    """Each element's rate, [256], and in warm-up Σ 2^(k/16) over those with a gradient, else 0; k is as `_move_mask`
    returns it.

    unit: float32 [32], the rate at k = 0.
    """
    mask_sum = 0.0
    if MASK == 0:
        rates = lanes.over_block(unit)
    elif WARM:
        factor = tl.exp2(_octaves(k, 0.0, MASK))
        mask_sum = tl.sum(tl.where(g != 0, factor, 0.0), 0)
        rates = factor * lanes.over_block(unit)
    else:  # the scale goes into the exponent
        rates = tl.exp2(_octaves(k, lanes.over_block(codec.log2(unit)), MASK))
    if bounded != 0:
        low, high = lanes.over_block(lanes.of_lane(numbers, N_LOW)), lanes.over_block(lanes.of_lane(numbers, N_HIGH))
        rates = tl.minimum(tl.maximum(rates, low), high)
    return rates, mask_sum


@triton.jit
def _octaves(k, shift, MASK: tl.constexpr):
    """k / 16 + shift; k is as `_move_mask` returns it."""
    if MASK == 8:
        return codec.mask_exponent(k, shift)
    elif MASK == 4:
        return codec.pair_exponent(k, shift)
    else:
        return k * OCTAVES + shift


@triton.jit
def write_weights(theta, pointers, loaded, at, bits, S, CAREFUL: tl.constexpr):
    """Round θ into its dtype and store it, with ECC 8 more bits beside it; what was skipped keeps its bits."""
    if S.ECC:
        rounded, low = codec.split_master(theta, bits, S.STOCHASTIC)
        if CAREFUL:
            low = tl.where(at.usable, low, loaded.low)
        tl.store(pointers.low + at.place, low, mask=at.owned)
    elif S.STOCHASTIC:
        rounded = codec.round_stochastic(theta, bits, S.P)
    else:
        if S.P == tl.float16:
            theta = tl.clamp(theta, -codec.MAX_FLOAT16, codec.MAX_FLOAT16)
        rounded = theta.to(S.P)
    if CAREFUL:
        rounded = tl.where(at.usable, rounded, loaded.theta)
    tl.store(pointers.theta + at.place, rounded, mask=at.owned)


@triton.jit
def _watch(entry_ptr, rule, at, active, g, u, m, theta, S):
    """auto_lr's sums over the block, Σ u (θ0 - θ) and M, if it is watched; 0 if not. See `estimate.watch`."""
    P: tl.constexpr = S.P
    block = at.block
    shift = tl.load(entry_ptr + PROBE_SHIFT).to(tl.int32)
    slot, offset = block >> shift, block & ((1 << shift) - 1)
    place_ptr = address(entry_ptr, PROBE_BLOCK, tl.int32, 4) + slot
    start_ptr = address(entry_ptr, PROBE_START, P) + slot.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    claim = rule.turn * PROBE_TURN + PROBE_CLAIM
    if S.PART:  # of a span that no row of this process touches nothing is kept
        held = tl.load(place_ptr, mask=at.touched, other=-1)
    else:
        held = tl.load(place_ptr)
    numerator, denominator = 0.0, 0.0
    if held == offset:
        moved = tl.where(at.owned, tl.load(start_ptr).to(tl.float32) - theta, 0.0)
        numerator = tl.sum(u * moved, 0)
        denominator = tl.maximum(tl.sum(tl.abs(m), 0), active.to(tl.float32) * LEAST_MOMENTUM)
        if S.PART:  # a block that several have is the one's who has its first element
            denominator = tl.where(at.leads, denominator, 0.0)
    elif held == (1 - rule.turn) * PROBE_TURN + PROBE_CLAIM + offset:  # claimed in the step before
        tl.store(start_ptr, theta.to(P))
        tl.store(place_ptr, offset)
    elif (held == PROBE_FREE) | ((held >= claim) & (held < claim + PROBE_TURN)):
        if tl.max(tl.abs(g), 0) > 0:
            tl.atomic_min(place_ptr, claim + offset)
    return numerator, denominator
