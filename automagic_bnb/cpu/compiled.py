"""What Numba compiles: the rule, steps 1 to 8 of `automagic_bnb.reference`, block by block.

All of it is in one file, and the rule's constants come as arguments: what Numba keeps on disk is made anew when this
file changes, and would not notice a change of another. Every argument has one type whatever the parameter, so that
there is one thing to compile.

A block's 256 elements lie in rows of `Work`, 0 behind the parameter's end. Sums are taken in one order on every CPU,
and float32 stays float32: a constant that Python calls a number would make it a float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np

BLOCK = 256  # `quantization.BLOCK`; a length known to the compiler makes vectors of loops
ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)
UNIFORM = np.float32(1 / 65536)
MOST_BFLOAT16, MOST_FLOAT16 = np.float32(3.3895313892515355e38), np.float32(65504)
NEAREST, BFLOAT16, FLOAT16, ECC, ECC_NEAREST = range(5)
"""How θ is rounded: where it is not at random, to what its dtype holds when it is copied there."""


INSIDE: dict[str, Any] = {"error_model": "numpy", "no_cfunc_wrapper": True, "no_cpython_wrapper": True}
OUTSIDE: dict[str, Any] = {"error_model": "numpy", "no_cfunc_wrapper": True, "nogil": True}
"""Without the checks of Python's arithmetic, and ways to be called that nobody takes: to make them takes its time."""


def compiled(function: Callable[..., Any]) -> Any:
    """Compiled together with what calls it."""
    return numba.njit(**INSIDE)(function)


def kept(function: Callable[..., Any]) -> Any:
    """Compiled when it is called from Python, and kept on disk, if there is a folder that can be written."""
    try:
        return numba.njit(cache=True, **OUTSIDE)(function)
    except RuntimeError:
        return numba.njit(**OUTSIDE)(function)


class Moment(NamedTuple):
    """m, v or r, flat, in one of three forms; the arrays of the others are empty."""

    values: Any  # float32 [n]
    codes: Any  # uint8 [n], and float32 [blocks] and [256]
    absmax: Any
    book: Any
    cells: Any  # uint8 [2^16], see `encode`
    row: Any  # float32 [rows] and [tiles * width], of `factored.Tiling`
    col: Any
    random: bool  # its codes are


class Held(NamedTuple):
    """A parameter, its gradient and its state, flat; what it does not have is empty."""

    theta: Any  # float32 [n], in place
    low: Any  # int8 [n], the bits below a bfloat16 θ
    grad: Any  # float32 [n]
    m: Any  # `Moment`, as v and r
    v: Any
    r: Any
    mask: Any  # uint8 [n], or [n / 2] in four bits
    exponents: Any  # float32 [n], k in 32 bits, and uint8 [n], π
    polarity: Any
    factors: Any  # float32 [64], 2^(k/16) of the whole k
    torque: Any  # float32 [blocks]: s, h, σ
    edge_history: Any
    spatial_variance: Any
    stats: Any  # float32, `state.STATS`
    probe_block: Any  # int32 [probes]
    probe_start: Any  # float32 [probes * 256]
    direction: Any  # float32 [n], n of a matrix for `lora_direction`; empty elsewhere


# --- numbers ----------------------------------------------------------------------------------------------------------


@compiled
def total(terms):
    """The sum of 256 terms by halves, which are overwritten."""
    half = BLOCK // 2
    while half > 0:
        for i in range(half):
            terms[i] += terms[half + i]
        half //= 2
    return terms[0]


@compiled
def total_of_products(x, y, terms):
    for i in range(BLOCK):
        terms[i] = x[i] * y[i]
    return total(terms)


@compiled
def usable(x, limit):
    return x if abs(x) <= limit else ZERO


@compiled
def clamp(x, low, high):
    """NaN stays NaN."""
    return low if x < low else high if x > high else x


@compiled
def mix(x):
    """`quantization._mix` of a uint32."""
    x ^= x >> np.uint32(16)
    x = np.uint32(x * np.uint32(0x7FEB352D))
    x ^= x >> np.uint32(15)
    x = np.uint32(x * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@compiled
def random_bits(key, start, bits):
    """`quantization.random_bits` of the elements from `start` on, an even number."""
    first = start // 2
    key = np.uint32(key ^ mix(np.uint32(first >> 32)))  # the same for a block: of 2^33 elements, whole ones
    for i in range(BLOCK // 2):
        word = mix(np.uint32(np.uint32(first + i) ^ key))
        bits[2 * i] = word & np.uint32(0xFFFF)
        bits[2 * i + 1] = word >> np.uint32(16)


@compiled
def uniform(bits):
    return (np.float32(bits) + HALF) * UNIFORM


@compiled
def as_bits(x):
    return np.float32(x).view(np.uint32)


@compiled
def as_float(bits):
    return np.uint32(bits).view(np.float32)


@compiled
def to_bfloat16(x, bits):
    """`quantization.round_to`, as a float32; the bits below bfloat16's are a fraction of its spacing."""
    rounded = as_float(np.uint32((as_bits(clamp(x, -MOST_BFLOAT16, MOST_BFLOAT16)) + bits) & np.uint32(0xFFFF0000)))
    return clamp(rounded, -MOST_BFLOAT16, MOST_BFLOAT16) if x == x else x


@compiled
def to_float16(x, bits):
    """`quantization.round_to`, as a float32."""
    exponent = max((as_bits(x) >> np.uint32(23)) & np.uint32(0xFF), np.uint32(113))  # evenly spaced below 2^-14
    spacing = as_float(np.uint32((exponent - np.uint32(10)) << np.uint32(23)))
    steps = abs(x) / spacing
    whole = np.floor(steps)
    if steps - whole + uniform(bits) >= ONE:
        whole += ONE
    return clamp(math.copysign(whole * spacing, x), -MOST_FLOAT16, MOST_FLOAT16)


@compiled
def part(x, start, count):
    """A view: no index into it is below 0, which costs a comparison elsewhere."""
    return x[start : start + count]


@compiled
def load(source, start, count, out):
    """A block's elements, 0 behind the end."""
    source = part(source, start, count)
    for i in range(count):
        out[i] = source[i]
    for i in range(count, BLOCK):
        out[i] = 0


@compiled
def store(x, target, start, count):
    target = part(target, start, count)
    for i in range(count):
        target[i] = x[i]


# --- moments ----------------------------------------------------------------------------------------------------------


@compiled
def read_moment(moment, block, count, width, share, out):
    """A block's elements, 0 behind the end; share: column means of its tile over their mean."""
    start = block * BLOCK
    if moment.row.size > 0:
        for line in range((count + width - 1) // width):
            mean, here = moment.row[start // width + line], part(out, line * width, width)
            for i in range(width):
                here[i] = mean * share[i]
        for i in range(count, BLOCK):
            out[i] = ZERO
    elif moment.codes.size > 0:
        codes, absmax, book = part(moment.codes, start, count), moment.absmax[block], moment.book
        for i in range(count):
            out[i] = book[codes[i]] * absmax
        for i in range(count, BLOCK):
            out[i] = ZERO
    else:
        load(moment.values, start, count, out)


@compiled
def encode(x, book, cells, last_code, least, random, bits, codes, count):
    """`quantization.encode` of a block: to nearest, or at random where it says so; returns absmax.

    cells: by the upper half of a float32's bits, the code below the least number that has them. No two values of a book
    are so near to each other that they have the same.
    """
    last = book[last_code]
    largest = least * last
    for i in range(BLOCK):
        largest = max(largest, abs(x[i]))
    for i in range(count):
        scaled = x[i] / largest * last
        below = np.int64(cells[as_bits(scaled) >> np.uint32(16)])
        below = min(below + (book[below + 1] <= scaled), last_code - 1)
        low, high = book[below], book[below + 1]
        rise = clamp((scaled - low) / (high - low), ZERO, ONE) + (uniform(bits[i]) if random else HALF)
        codes[i] = below + (rise >= ONE)
    return largest / last


@compiled
def write_moment(s, moment, block, count, x, bits, touched):
    """Store a block of a moment that is not factored. One in which every element was skipped keeps its very codes."""
    start = block * BLOCK
    if moment.codes.size == 0:
        store(x, moment.values, start, count)
    elif touched > 0:
        codes = part(moment.codes, start, count)
        moment.absmax[block] = encode(
            x, moment.book, moment.cells, s.LAST_CODE, s.TINY_ABSMAX, moment.random, bits, codes, count
        )  # fmt: skip


@compiled
def move_moment(s, moment, block, count, x, eps, beta, gain, old, keep, sums, seen, bits, touched):
    """v or r ← β old + (1 - β)(x² + eps), in the place of `old`; skipped elements keep what they have."""
    for i in range(BLOCK):
        square = x[i] * x[i] + eps
        seen[i] = square if keep[i] else old[i]
        old[i] = beta * old[i] + gain * square if keep[i] else old[i]
    if moment.row.size == 0:
        write_moment(s, moment, block, count, old, bits, touched)
        return
    for i in range(BLOCK):
        sums[i] += seen[i]
    width, start = s.width, block * BLOCK
    for line in range((count + width - 1) // width):
        first, used = line * width, 0
        length = min(width, count - first)
        for i in range(first, first + length):
            used += keep[i]
        if used > 0:  # a row in which all was skipped keeps its very mean
            mean = ZERO
            if width == BLOCK:
                mean = total(seen) / np.float32(length)
            else:
                for i in range(first, first + length):
                    mean += seen[i]
                mean /= np.float32(length)
            at = start // width + line
            moved = beta * moment.row[at] + gain * mean
            moment.row[at] = to_bfloat16(moved, bits[first]) if s.short_means else moved


@compiled
def column_counts(s, first, blocks, counts):
    """How many elements each column of a tile has, whose first block this is; returns how many in all."""
    last, every = min(s.n - (first + (blocks - 1) * s.strips) * BLOCK, BLOCK), 0
    for i in range(s.width):
        here = (blocks - 1) * (BLOCK // s.width) + max(last - i + s.width - 1, 0) // s.width
        counts[i] = here
        every += here
    return every


@compiled
def share_columns(s, col, tile, counts, elements, share, sums):
    """A tile's column means over their mean; they stay as they are until all of the tile is seen."""
    columns, weighted = part(col, tile * s.width, s.width), 0.0
    for i in range(s.width):
        weighted += columns[i] * counts[i]
    mean = max(np.float32(weighted / elements), s.TINY)
    for i in range(s.width):
        share[i] = columns[i] / mean
    for i in range(BLOCK):
        sums[i] = ZERO


@compiled
def move_columns(s, col, tile, counts, beta, gain, sums, bits):
    """A tile's column means, moved towards those of what it has seen: `sums` over its blocks."""
    columns = part(col, tile * s.width, s.width)
    for i in range(s.width):
        seen = ZERO
        for line in range(BLOCK // s.width):
            seen += sums[line * s.width + i]
        if counts[i] > ZERO:
            moved = beta * columns[i] + gain * (seen / counts[i])
            columns[i] = to_bfloat16(moved, bits[i]) if s.short_means else moved


# --- mask and weights -------------------------------------------------------------------------------------------------


@compiled
def read_mask(s, mask, exponents, polarity, start, count, k, sign):
    """k and π of a block; k is 0 where there is no mask."""
    least, spacing = s.K_MIN, s.spacing
    if s.mask_bits == 8:
        mask = part(mask, start, count)
        for i in range(count):
            k[i] = np.float32((mask[i] & 127) >> 1) + least
            sign[i] = (mask[i] & 1) | ((mask[i] >> 7) << 1)
    elif s.mask_bits == 4:
        mask = part(mask, start // 2, (count + 1) // 2)
        for i in range((count + 1) // 2):
            for j in range(2):
                half = (mask[i] >> (4 * j)) & 15
                k[2 * i + j] = np.float32(half >> 1) * spacing + least
                sign[2 * i + j] = half & 1
    elif s.mask_bits == 32:
        load(exponents, start, count, k)
        load(polarity, start, count, sign)


@compiled
def write_mask(s, mask, exponents, polarity, start, count, k, sign):
    least, per = s.K_MIN, ONE / max(s.spacing, ONE)
    if s.mask_bits == 8:
        mask = part(mask, start, count)
        for i in range(count):
            mask[i] = (np.int32(k[i] - least) << 1) | (sign[i] & 1) | ((sign[i] >> 1) << 7)
    elif s.mask_bits == 4:
        mask = part(mask, start // 2, (count + 1) // 2)
        for i in range((count + 1) // 2):
            byte = 0
            for j in range(2):
                byte |= ((np.int32((k[2 * i + j] - least) * per) << 1) | (sign[2 * i + j] & 1)) << (4 * j)
            mask[i] = byte
    else:
        store(k, exponents, start, count)
        store(sign, polarity, start, count)


@compiled
def read_theta(low, start, count, x):
    """x: θ as it was loaded; joined with the bits below it, if there are any."""
    if low.size > 0:
        low = part(low, start, count)
        for i in range(count):
            x[i] = as_float(np.uint32(np.int32(as_bits(x[i])) + (np.int32(low[i]) << 8)))


@compiled
def write_theta(rounding, limit, theta, low, start, count, x, keep, bits):
    """Round θ into what its dtype holds; what was skipped keeps its bits."""
    theta = part(theta, start, count)
    if rounding == NEAREST:
        for i in range(count):
            theta[i] = clamp(x[i], -limit, limit) if keep[i] else theta[i]
    elif rounding == BFLOAT16:
        for i in range(count):
            theta[i] = to_bfloat16(x[i], bits[i]) if keep[i] else theta[i]
    elif rounding == FLOAT16:
        for i in range(count):
            theta[i] = to_float16(x[i], bits[i]) if keep[i] else theta[i]
    else:
        low, nearest = part(low, start, count), rounding == ECC_NEAREST
        for i in range(count):
            if keep[i]:
                whole = np.int32(as_bits(clamp(x[i], -limit, limit)))
                whole = (whole + (128 if nearest else np.int32(bits[i] & np.uint32(0xFF)))) >> 8
                upper = (whole + 128) >> 8
                low[i] = whole - (upper << 8)
                theta[i] = as_float(np.uint32(upper << 16))


# --- the rule on one block ------------------------------------------------------------------------------------------


@compiled
def read_gradient(grad, start, count, limit, g, keep):
    """Step 0: g, with 0 for the elements that are skipped; returns how many are not."""
    load(grad, start, count, g)
    touched = 0
    for i in range(BLOCK):
        keep[i] = (abs(g[i]) <= limit) & (i < count)
        g[i] = usable(g[i], limit)
        touched += keep[i]
    return touched


@compiled
def laplacian(s, grad, start, count, lap, line):
    """Of a block, 0 behind the end: row by row. A neighbour outside is the element itself, which adds nothing.

    line: float32 [258], room for a row of the gradient with a neighbour at either end.
    """
    columns, limit, at = s.columns, s.MAX_GRADIENT, start
    while at < start + count:
        column = at % columns
        row = at // columns % s.rows
        length = min(columns - column, start + count - at)
        for i in range(length):
            line[i + 1] = usable(grad[at + i], limit)
        line[0] = usable(grad[at - 1], limit) if column > 0 else line[1]
        line[length + 1] = usable(grad[at + length], limit) if column + length < columns else line[length]
        upper = part(grad, at - (columns if row > 0 else 0), length)
        lower = part(grad, at + (columns if row < s.rows - 1 else 0), length)
        out = part(lap, at - start, length)
        for i in range(length):
            g = line[i + 1]
            vertical = (usable(upper[i], limit) - g) + (usable(lower[i], limit) - g)
            out[i] = vertical + ((line[i] - g) + (line[i + 2] - g))
        at += length
    for i in range(count, BLOCK):
        lap[i] = ZERO


@compiled
def spatial_filter(s, grad, edge_history, block, count, g, u, e, line, terms):
    """Step 1: g̃ of g, into `u`; e is room for the Laplacian and the edges."""
    laplacian(s, grad, block * BLOCK, count, e, line)
    frequency = s.frequency
    for i in range(BLOCK):
        e[i] = e[i] if g[i] != ZERO else ZERO  # where there is no gradient the filter makes none
        u[i] = g[i] + frequency * e[i]
    if s.edges:
        threshold, most, least = s.edge_threshold, s.MAX_EDGE, s.MIN_EDGE_FACTOR
        scale = s.LAPLACIAN_NOISE * math.sqrt(total_of_products(g, g, terms) / np.float32(count)) + s.SILENCE
        for i in range(BLOCK):
            edge = min(abs(e[i]) / scale, most)
            e[i] = edge if edge > threshold else ZERO
            terms[i] = e[i]
        edge_history[block] += s.STATISTIC_GAIN * (total(terms) / np.float32(count) - edge_history[block])
        penalty = s.edge_penalty * edge_history[block]
        for i in range(BLOCK):
            u[i] *= clamp(ONE - penalty * e[i], least, ONE)


@compiled
def clip(s, count, v, u, terms):
    """Step 2: u of g̃, clipped; returns the block's activity."""
    correction, tiny = s.correction2, s.TINY
    for i in range(BLOCK):
        u[i] /= math.sqrt(max(v[i] / correction, tiny))
    activity = total_of_products(u, u, terms) / np.float32(count)
    factor = min(s.clip_threshold / math.sqrt(max(activity, tiny)), ONE)
    for i in range(BLOCK):
        u[i] *= factor
    return activity


@compiled
def momentum(s, torque, block, u, m, keep, terms):
    """Step 3: m, in place."""
    damping = ONE
    if s.torque:
        norms = total_of_products(m, m, terms) * total_of_products(u, u, terms)
        aligned = total_of_products(m, u, terms) / math.sqrt(norms + s.SILENCE)
        torque[block] += s.STATISTIC_GAIN * (aligned - torque[block])
        damping += clamp(s.kappa * torque[block], -ONE, ONE)
    beta, gain = s.beta1, s.gain1 * damping
    for i in range(BLOCK):
        m[i] = beta * m[i] + gain * u[i] if keep[i] else m[i]


@compiled
def confident(s, activity, m, r, n):
    """Steps 4 and 6: n of m and r."""
    correction1, correction3, least = s.correction1, s.correction3, s.MIN_RESIDUAL
    if s.came:
        for i in range(BLOCK):
            n[i] = m[i] / correction1 / math.sqrt(max(r[i] / correction3, least))
    else:
        for i in range(BLOCK):
            n[i] = m[i] / correction1
    factor = s.BACKGROUND_FACTOR if s.background and activity < s.BACKGROUND_ACTIVITY else ONE
    for i in range(BLOCK):
        n[i] *= factor


@compiled
def cautious(s, active, g, n):
    """Step 5, of a block in which so many elements have a gradient."""
    if s.cautious:
        agreeing = 0
        for i in range(BLOCK):
            agrees = ((n[i] > ZERO) & (g[i] > ZERO)) | ((n[i] < ZERO) & (g[i] < ZERO))
            agreeing += agrees
            n[i] = n[i] if agrees else ZERO
        factor = ONE / max(np.float32(agreeing) / np.float32(max(active, 1)), s.MIN_CAUTIOUS_SHARE)
        for i in range(BLOCK):
            n[i] *= factor


@compiled
def count_of(g):
    """How many elements have a gradient."""
    active = 0
    for i in range(BLOCK):
        active += g[i] != ZERO
    return active


@compiled
def move_mask(s, spatial_variance, block, count, g, u, k, sign, bits, terms):
    """Step 7 while the mask learns: σ, k and π."""
    mean_square = total_of_products(u, u, terms) / np.float32(count)
    for i in range(BLOCK):
        terms[i] = u[i]
    mean = total(terms) / np.float32(count)
    variance = max(mean_square - mean * mean, ZERO)
    spatial_variance[block] += s.STATISTIC_GAIN * (variance - spatial_variance[block])
    f = clamp(s.detail * spatial_variance[block], s.MIN_CHANGE, s.MAX_CHANGE) if s.aware else ONE
    f = f if s.adapt else ZERO
    least, most, spacing, no_sign = s.K_MIN, s.k_max, s.spacing, np.uint8(s.NO_SIGN)
    per = ONE / spacing if spacing > ZERO else ZERO
    for i in range(BLOCK):
        positive = np.uint8(g[i] > ZERO)
        turned = ZERO if sign[i] == no_sign else f if positive == sign[i] else -f
        moved = clamp(k[i] + turned, least, most)
        steps = moved * per
        whole = np.floor(steps)
        whole += ONE if steps - whole + uniform(bits[i]) >= ONE else ZERO
        moved = whole * spacing if spacing > ZERO else moved
        # 0 has no sign: such an element, and one that is skipped, has learned nothing
        k[i] = moved if g[i] != ZERO else k[i]
        sign[i] = positive if g[i] != ZERO else sign[i]


@compiled
def watch(s, probe_block, probe_start, block, active, u, m, theta, terms):
    """auto_lr's two sums over the block, if it is watched: `estimate.watch`, which agrees in any order of blocks."""
    slot, offset = block // s.stride, block % s.stride
    place, claim = probe_block[slot], s.PROBE_CLAIM + s.turn * s.PROBE_TURN
    numerator, denominator = ZERO, ZERO
    if place == offset:
        start = part(probe_start, slot * BLOCK, len(theta))
        for i in range(BLOCK):
            terms[i] = u[i] * (start[i] - theta[i])
        numerator = total(terms)
        for i in range(BLOCK):
            terms[i] = abs(m[i])
        denominator = max(total(terms), s.LEAST_MOMENTUM * np.float32(active))
    elif place == s.PROBE_CLAIM + (1 - s.turn) * s.PROBE_TURN + offset:  # claimed in the step before
        store(theta, probe_start, slot * BLOCK, len(theta))
        probe_block[slot] = offset
    elif active > 0 and (place == s.PROBE_FREE or claim <= place < claim + s.PROBE_TURN):
        probe_block[slot] = min(place, claim + offset)
    return numerator, denominator


@compiled
def rates_of(s, mask_mean, factors, g, k, terms):
    """Each element's rate, in the place of k; returns Σ 2^(k/16) over those with a gradient."""
    if s.mask_bits == 32:
        for i in range(BLOCK):
            k[i] = np.exp2(k[i] / s.OCTAVE)
    else:
        least = s.K_MIN
        for i in range(BLOCK):
            k[i] = factors[np.int32(k[i] - least)]
    for i in range(BLOCK):
        terms[i] = k[i] if g[i] != ZERO else ZERO
    mean, low, high = s.mean, s.low, s.high
    for i in range(BLOCK):
        k[i] = clamp(mean * (k[i] / mask_mean), low, high)
    return total(terms)


@compiled
def subtract(decay, theta, rates, n):
    """Step 8."""
    for i in range(BLOCK):
        theta[i] -= rates[i] * (n[i] + decay * theta[i])


@compiled
def room():
    return np.zeros(BLOCK, dtype=np.float32)


@kept
def update(numbers, held):
    """One step of one parameter, in place; where there is room for its direction, all but its weights: see `move`.

    Args:
        numbers: `step.NUMBERS` [1].
        held: `Held`.

    Returns:
        W as it stood before.
    """
    s = numbers[0]
    g, u, e, m, v, r, n, k, x, terms, seen = (
        room(), room(), room(), room(), room(), room(), room(), room(), room(), room(), room()
    )  # fmt: skip
    counts, v_share, v_sums, r_share, r_sums = room(), room(), room(), room(), room()
    line = np.zeros(BLOCK + 2, dtype=np.float32)
    keep, sign = np.zeros(BLOCK, dtype=np.uint8), np.zeros(BLOCK, dtype=np.uint8)
    bits = np.zeros(BLOCK, dtype=np.uint32)
    blocks, factored, mask_mean = (s.n + BLOCK - 1) // BLOCK, held.v.row.size > 0, held.stats[s.MASK_MEAN]
    directed = held.direction.size > 0
    skipped, active, mask_sum, numerator, denominator = 0, 0, 0.0, 0.0, 0.0
    for tile in range(s.tiles):
        first = tile // s.strips * s.height * s.strips + tile % s.strips
        here = min((blocks - first + s.strips - 1) // s.strips, s.height)
        elements, skipped_before = 0, skipped
        if factored and here > 0:
            elements = column_counts(s, first, here, counts)
            share_columns(s, held.v.col, tile, counts, elements, v_share, v_sums)
            if s.came:
                share_columns(s, held.r.col, tile, counts, elements, r_share, r_sums)
        for block in range(first, first + here * s.strips, s.strips):
            start, count = block * BLOCK, min(s.n - block * BLOCK, BLOCK)
            touched = read_gradient(held.grad, start, count, s.MAX_GRADIENT, g, keep)
            random_bits(s.key, start, bits)
            skipped += count - touched

            # 1. Spatial filter, 2. second moment, activity, clipping.
            if s.spatial:
                spatial_filter(s, held.grad, held.edge_history, block, count, g, u, e, line, terms)
            else:
                for i in range(BLOCK):
                    u[i] = g[i]
            read_moment(held.v, block, count, s.width, v_share, v)
            move_moment(s, held.v, block, count, u, s.eps1, s.beta2, s.gain2, v, keep, v_sums, seen, bits, touched)
            activity = clip(s, count, v, u, terms)

            # 3. Torque, 4. confidence, 6. background; 5. cautious, which comes after `lora_direction`.
            read_moment(held.m, block, count, s.width, v_share, m)
            momentum(s, held.torque, block, u, m, keep, terms)
            if s.came:
                read_moment(held.r, block, count, s.width, r_share, r)
                for i in range(BLOCK):
                    e[i] = u[i] - m[i]
                move_moment(s, held.r, block, count, e, s.eps2, s.beta3, s.gain3, r, keep, r_sums, seen, bits, touched)
            confident(s, activity, m, r, n)
            with_gradient = count_of(g)
            active += with_gradient
            if directed:
                store(n, held.direction, start, count)
            else:
                cautious(s, with_gradient, g, n)

            # 7. Learning-rate mask.
            read_mask(s, held.mask, held.exponents, held.polarity, start, count, k, sign)
            if s.learn and s.mask_bits > 0:
                move_mask(s, held.spatial_variance, block, count, g, u, k, sign, bits, terms)
                write_mask(s, held.mask, held.exponents, held.polarity, start, count, k, sign)

            # 8. Update.
            load(held.theta, start, count, x)
            read_theta(held.low, start, count, x)
            if s.auto:
                sums = watch(s, held.probe_block, held.probe_start, block, with_gradient, u, m, x, terms)
                numerator += sums[0]
                denominator += sums[1]
            mask_sum += rates_of(s, mask_mean, held.factors, g, k, terms)
            if not directed:
                subtract(s.weight_decay, x, k, n)
                write_theta(s.rounding, s.most, held.theta, held.low, start, count, x, keep, bits)
            write_moment(s, held.m, block, count, m, bits, touched)
        if skipped - skipped_before < elements:  # a tile in which all was skipped keeps its very means
            random_bits(s.key, first * BLOCK, bits)
            move_columns(s, held.v.col, tile, counts, s.beta2, s.gain2, v_sums, bits)
            if s.came:
                move_columns(s, held.r.col, tile, counts, s.beta3, s.gain3, r_sums, bits)
    held.stats[s.SKIPPED] += np.float32(skipped)
    if s.auto:
        held.stats[s.LR_NUMERATOR], held.stats[s.LR_DENOMINATOR] = np.float32(numerator), np.float32(denominator)
    if s.adapt and s.mask_bits > 0 and active > 0:
        held.stats[s.MASK_MEAN] = np.float32(mask_sum / active)
    return mask_mean


@kept
def move(numbers, held, mask_mean):
    """The rest of a step in which `lora_direction` has a say, steps 5 and 8, once `held.direction` is turned.

    Args:
        numbers, held: as `update` had them.
        mask_mean: what `update` returned.
    """
    s = numbers[0]
    g, n, k, x, terms = room(), room(), room(), room(), room()
    keep, sign = np.zeros(BLOCK, dtype=np.uint8), np.zeros(BLOCK, dtype=np.uint8)
    bits = np.zeros(BLOCK, dtype=np.uint32)
    for block in range((s.n + BLOCK - 1) // BLOCK):
        start, count = block * BLOCK, min(s.n - block * BLOCK, BLOCK)
        read_gradient(held.grad, start, count, s.MAX_GRADIENT, g, keep)
        random_bits(s.key, start, bits)
        load(held.direction, start, count, n)
        cautious(s, count_of(g), g, n)
        read_mask(s, held.mask, held.exponents, held.polarity, start, count, k, sign)
        load(held.theta, start, count, x)
        read_theta(held.low, start, count, x)
        rates_of(s, mask_mean, held.factors, g, k, terms)
        subtract(s.weight_decay, x, k, n)
        write_theta(s.rounding, s.most, held.theta, held.low, start, count, x, keep, bits)
