"""The one-pass kernel: every tensor of a parameter is read once and written once; see `automagic_bnb.reference`.

A program walks a few consecutive blocks of one parameter. A block of 256 elements is one warp's work, 8 neighbouring
elements a thread; its statistics are reductions inside the warp. Two bodies are compiled: full blocks whose gradient is
finite take the one without masks, the last short block and blocks with skipped elements the other.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from automagic_bnb.kernels import codec, statistics
from automagic_bnb.kernels.tables import BLOCKS_PER_PROGRAM, Bucket, Column, Number

from automagic_bnb import bnb

BLOCK = tl.constexpr(256)
_C = {column.name: tl.constexpr(int(column)) for column in Column}
_ROW = tl.constexpr(len(Column))

THETA, M, V, R, K = _C["THETA"], _C["M"], _C["V"], _C["R"], _C["K"]
POLARITY, ABSMAX1, ABSMAX2, ABSMAX3 = _C["POLARITY"], _C["ABSMAX1"], _C["ABSMAX2"], _C["ABSMAX3"]
TORQUE, EDGE, SIGMA, STATS = _C["TORQUE"], _C["EDGE"], _C["SIGMA"], _C["STATS"]
PROBE_START, PROBE_SUM, RATE = _C["PROBE_START"], _C["PROBE_SUM"], _C["RATE"]
SIZE, ROWS, COLS, FIRST_PROGRAM = _C["SIZE"], _C["ROWS"], _C["COLS"], _C["FIRST_PROGRAM"]

_N = {number.name: tl.constexpr(int(number)) for number in Number}
_NUMBERS = tl.constexpr(len(Number))
N_RATE, N_LOW, N_HIGH, N_DECAY, N_KAPPA = _N["RATE"], _N["LOW"], _N["HIGH"], _N["WEIGHT_DECAY"], _N["KAPPA"]
N_CORRECTION1, N_CORRECTION2, N_CORRECTION3 = _N["CORRECTION1"], _N["CORRECTION2"], _N["CORRECTION3"]
N_ADAPT, N_LEARN, N_KEY, N_PROBE = _N["ADAPT_MASK"], _N["LEARN_POLARITY"], _N["KEY"], _N["PROBE_WEIGHT"]

_TINY = tl.constexpr(1e-37)  # above the least normal float32: Triton makes a smaller literal a double
_TINY_ABSMAX = tl.constexpr(2.0**-120)
_PROBE_STRIDE = tl.constexpr(16)


@triton.jit
def address(table_ptr, row, column: tl.constexpr, DTYPE: tl.constexpr, ALIGN: tl.constexpr = 16):
    """The pointer that a table of addresses holds for one tensor."""
    pointer = tl.load(table_ptr + row * _ROW + column).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, ALIGN)


@triton.jit
def _load(ptr, lanes, valid, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(ptr + lanes, mask=valid, other=0)
    else:
        return tl.load(ptr + lanes)


@triton.jit
def _store(ptr, lanes, values, keep, MASKED: tl.constexpr):
    if MASKED:
        tl.store(ptr + lanes, values, mask=keep)
    else:
        tl.store(ptr + lanes, values)


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _neighbour(g_ptr, lanes, offset, inside, centre, scale, MASKED: tl.constexpr, SCALED: tl.constexpr):
    """The gradient at an offset, as it enters the Laplacian: the centre's own value where it lies outside."""
    x = tl.load(g_ptr + offset + lanes, mask=inside, other=0).to(tl.float32)
    if SCALED:
        x = x * scale
    if MASKED:
        x = tl.where(_finite(x), x, 0.0)
    return tl.where(inside, x, centre)


@triton.jit
def _laplacian(g_ptr, g, lanes, start, size, rows, cols, valid, scale, MASKED: tl.constexpr, SCALED: tl.constexpr):
    """Σ (g_j - g_i) over the four neighbours inside the same [rows, cols] slice."""
    slice_size = rows * cols
    column = (start % cols).to(tl.int32) + lanes
    narrow = cols.to(tl.int32)
    if cols >= BLOCK:
        column = tl.where(column >= narrow, column - narrow, column)
    else:
        column = column % narrow
    left, right = column > 0, column < narrow - 1
    if slice_size == size:
        above = lanes >= tl.minimum(tl.maximum(cols - start, 0), BLOCK).to(tl.int32)
        below = lanes < tl.minimum(tl.maximum(size - cols - start, 0), BLOCK).to(tl.int32)
    else:  # many slices: a block may run into the next one, or over several
        place = (lanes + start % slice_size) % slice_size
        above, below = place >= cols, place < slice_size - cols
    if MASKED:
        left, right, above, below = left & valid, right & valid, above & valid, below & valid
    lap = _neighbour(g_ptr, lanes, -1, left, g, scale, MASKED, SCALED) - g
    lap += _neighbour(g_ptr, lanes, 1, right, g, scale, MASKED, SCALED) - g
    lap += _neighbour(g_ptr, lanes, -cols, above, g, scale, MASKED, SCALED) - g
    return lap + (_neighbour(g_ptr, lanes, cols, below, g, scale, MASKED, SCALED) - g)


@triton.jit
def _read_moment(ptr, lanes, valid, absmax, book_ptr, EIGHT: tl.constexpr, MASKED: tl.constexpr):
    x = _load(ptr, lanes, valid, MASKED)
    if EIGHT:
        x = codec.decode(x, book_ptr) * absmax
        if MASKED:
            x = tl.where(valid, x, 0.0)
    return x


@triton.jit
def _write_unsigned(ptr, absmax_ptr, lanes, x, uniform, touched, valid, EIGHT: tl.constexpr, MASKED: tl.constexpr):
    if EIGHT:
        absmax = tl.maximum(tl.max(x, 0), _TINY_ABSMAX)
        codes = codec.encode_unsigned(x * (1 / absmax), uniform)
        _store(ptr, lanes, codes, valid & touched, MASKED)
        tl.store(absmax_ptr, absmax, mask=touched)
    else:
        _store(ptr, lanes, x, valid, MASKED)


@triton.jit
def _block(
    table_ptr, numbers_ptr, row, block, size, g_raw, sum_squares, book1_ptr, book2_ptr, g_ptr, clip,
    theta_ptr, m_ptr, v_ptr, r_ptr, k_ptr,
    beta1, beta2, beta3, eps1, eps2, clip_threshold, frequency, edge_penalty, edge_threshold, detail,
    P: tl.constexpr, EIGHT: tl.constexpr, SPATIAL: tl.constexpr, EVEN: tl.constexpr, EDGES: tl.constexpr, TORQUE_ON: tl.constexpr,
    CAME: tl.constexpr, CAUTIOUS: tl.constexpr, BACKGROUND: tl.constexpr, AWARE: tl.constexpr, WARM: tl.constexpr,
    AUTO: tl.constexpr, SCALED: tl.constexpr, STOCHASTIC: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block; returns Σ 2^(k/16), the number of skipped elements, and auto_lr's two sums over the block."""
    numbers_ptr = numbers_ptr + row * _NUMBERS
    start = block.to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    valid = lanes < size - start
    count = tl.minimum(size - start, BLOCK).to(tl.float32) if MASKED else 256.0
    per = 1 / count
    if MASKED:
        keep = valid & _finite(g_raw)
        g = tl.where(keep, g_raw, 0.0)
        sum_squares = tl.sum(g * g, 0)
        touched = tl.sum(keep.to(tl.int32), 0) > 0
    else:
        keep = valid
        g = g_raw
        touched = True

    # 1. Spatial filter.
    filtered = g
    if SPATIAL:
        rows, cols = tl.load(table_ptr + row * _ROW + ROWS), tl.load(table_ptr + row * _ROW + COLS)
        if EVEN:
            cols = tl.multiple_of(cols, 8)
        lap = _laplacian(g_ptr, g, lanes, start, size, rows, cols, valid, clip, MASKED, SCALED)
        if MASKED:
            lap = tl.where(keep, lap, 0.0)
        filtered = g + frequency * lap
        if EDGES:
            edge_ptr = address(table_ptr, row, EDGE, tl.float32, 4) + block
            e = tl.abs(lap) * (1 / (4.472135955 * tl.sqrt(sum_squares * per) + 1e-30))
            e = tl.where(e > edge_threshold, e, 0.0)
            history = 0.9 * tl.load(edge_ptr) + 0.1 * (tl.sum(e, 0) * per)
            tl.store(edge_ptr, history)
            filtered = filtered * tl.clamp(1 - (edge_penalty * history) * e, 0.1, 1.0)

    # 2. Second moment, activity, clipping.
    absmax2_ptr = address(table_ptr, row, ABSMAX2, tl.float32, 4) + block
    absmax2 = tl.load(absmax2_ptr) if EIGHT else 1.0
    v_old = _read_moment(v_ptr, lanes, valid, absmax2, book2_ptr, EIGHT, MASKED)
    v = beta2 * v_old + (1 - beta2) * (filtered * filtered + eps1)
    if MASKED:
        v = tl.where(keep, v, v_old)
    u = filtered * tl.rsqrt(tl.maximum(v * tl.load(numbers_ptr + N_CORRECTION2), _TINY))
    energy = tl.sum(u * u, 0)
    activity = energy * per
    shrink = tl.minimum(clip_threshold * tl.rsqrt(tl.maximum(activity, _TINY)), 1.0)
    u = u * shrink
    energy = energy * shrink * shrink

    # 3. Torque.
    absmax1_ptr = address(table_ptr, row, ABSMAX1, tl.float32, 4) + block
    absmax1 = tl.load(absmax1_ptr) if EIGHT else 1.0
    m_old = _read_moment(m_ptr, lanes, valid, absmax1, book1_ptr, EIGHT, MASKED)
    damping = 1 - beta1
    if TORQUE_ON:
        torque_ptr = address(table_ptr, row, TORQUE, tl.float32, 4) + block
        aligned = tl.sum(m_old * u, 0) * tl.rsqrt(tl.sum(m_old * m_old, 0) * energy + 1e-30)
        torque = 0.9 * tl.load(torque_ptr) + 0.1 * aligned
        tl.store(torque_ptr, torque)
        damping = damping * (1 + tl.clamp(tl.load(numbers_ptr + N_KAPPA) * torque, -1.0, 1.0))
    m = beta1 * m_old + damping * u
    if MASKED:
        m = tl.where(keep, m, m_old)

    key = tl.load(numbers_ptr + N_KEY).to(tl.uint32, bitcast=True)
    word1, word2 = codec.random_words(key, start + lanes)

    # 4. Confidence.
    n = m
    weight = tl.load(numbers_ptr + N_CORRECTION1)
    if CAME:
        absmax3_ptr = address(table_ptr, row, ABSMAX3, tl.float32, 4) + block
        absmax3 = tl.load(absmax3_ptr) if EIGHT else 1.0
        r_old = _read_moment(r_ptr, lanes, valid, absmax3, book2_ptr, EIGHT, MASKED)
        off = u - m
        r = beta3 * r_old + (1 - beta3) * (off * off + eps2)
        if MASKED:
            r = tl.where(keep, r, r_old)
        n = m * tl.rsqrt(tl.maximum(r * tl.load(numbers_ptr + N_CORRECTION3), 0.01))
        _write_unsigned(r_ptr, absmax3_ptr, lanes, r, codec.uniform_low(word2), touched, valid, EIGHT, MASKED)
    _write_unsigned(v_ptr, absmax2_ptr, lanes, v, codec.uniform_high(word1), touched, valid, EIGHT, MASKED)

    # 5. Cautious, 6. background: both end in a factor of the block.
    if CAUTIOUS:
        agrees = ((n > 0) & (g > 0)) | ((n < 0) & (g < 0))
        share = tl.sum(agrees.to(tl.float32), 0) * per
        n = tl.where(agrees, n, 0.0)
        weight = weight / tl.maximum(share, 0.25)
    if BACKGROUND:
        weight = tl.where(activity < 0.1, 0.5 * weight, weight)

    # 7. Learning-rate mask.
    if EIGHT:
        packed = _load(k_ptr, lanes, valid, MASKED).to(tl.int32)
        k = ((packed >> 1) - 32).to(tl.float32)
    else:
        k = _load(k_ptr, lanes, valid, MASKED)
    mask_sum = 0.0
    if WARM:
        if EIGHT:
            polarity = (packed & 1) != 0
        else:
            polarity_ptr = address(table_ptr, row, POLARITY, tl.uint8) + start
            polarity = _load(polarity_ptr, lanes, valid, MASKED) != 0
        sigma_ptr = address(table_ptr, row, SIGMA, tl.float32, 4) + block
        mean = tl.sum(u, 0) * per
        learn = tl.load(numbers_ptr + N_LEARN)
        sigma_old = tl.load(sigma_ptr)
        sigma = 0.9 * sigma_old + 0.1 * tl.maximum(energy * per - mean * mean, 0.0)
        tl.store(sigma_ptr, tl.where(learn != 0, sigma, sigma_old))
        change = tl.load(numbers_ptr + N_ADAPT)
        if AWARE:
            change = change * tl.clamp(detail * sigma, 0.5, 1.5)
        positive = g > 0
        moved = tl.clamp(k + tl.where(positive == polarity, change, -change), -32.0, 31.0)
        if EIGHT:
            # Shifted by 33, so that no whole number may come out one lower: U > 0.
            moved = (codec.whole(moved + 33.0 + codec.uniform_high(word2)) - 33).to(tl.float32)
        if MASKED:
            moved = tl.where(keep, moved, k)
        k = moved
        positive = tl.where(learn != 0, positive, polarity)
        if MASKED:
            positive = tl.where(keep, positive, polarity)
        if EIGHT:
            byte = (k.to(tl.int32) + 32) * 2 + positive.to(tl.int32)
            _store(k_ptr, lanes, byte.to(tl.uint8), valid, MASKED)
        else:
            _store(k_ptr, lanes, k, valid, MASKED)
            _store(polarity_ptr, lanes, positive.to(tl.uint8), valid, MASKED)
    factor = tl.exp2(k * 0.0625)
    if WARM:
        if MASKED:
            mask_sum = tl.sum(tl.where(valid, factor, 0.0), 0)
        else:
            mask_sum = tl.sum(factor, 0)

    # 8. Update.
    stats_ptr = address(table_ptr, row, STATS, tl.float32, 4)
    rate, low, high = tl.load(numbers_ptr + N_RATE), tl.load(numbers_ptr + N_LOW), tl.load(numbers_ptr + N_HIGH)
    unit = 1 / tl.load(stats_ptr)
    theta_raw = _load(theta_ptr, lanes, valid, MASKED)
    theta = theta_raw.to(tl.float32)
    numerator, denominator = 0.0, 0.0
    if AUTO:
        d = tl.load(address(table_ptr, row, RATE, tl.float32, 4))
        unit = unit * d
        if block % _PROBE_STRIDE == 0:
            numerator, denominator = _probe(
                table_ptr,
                row,
                block,
                lanes,
                valid,
                g,
                theta,
                d * d * tl.load(numbers_ptr + N_PROBE),
                tl.sqrt(beta2),
                P,
                MASKED,
            )
    rates = rate * tl.minimum(tl.maximum(factor * unit, low), high)
    theta = theta - rates * (n * weight + tl.load(numbers_ptr + N_DECAY) * theta)
    if STOCHASTIC and tl.float32 != P:
        rounded = codec.round_stochastic(theta, word1, P)
    else:
        rounded = theta.to(P)
    _store(theta_ptr, lanes, rounded, keep, MASKED)

    # m, to nearest.
    if EIGHT:
        absmax = tl.maximum(tl.max(tl.abs(m), 0), _TINY_ABSMAX)
        _store(m_ptr, lanes, codec.encode_signed(m * (1 / absmax)), valid & touched, MASKED)
        tl.store(absmax1_ptr, absmax, mask=touched)
    else:
        _store(m_ptr, lanes, m, valid, MASKED)
    skipped = 0.0
    if MASKED:
        skipped = count - tl.sum(keep.to(tl.float32), 0)
    return mask_sum, skipped, numerator, denominator


@triton.jit
def _probe(table_ptr, row, block, lanes, valid, g, theta, weight, decay, P: tl.constexpr, MASKED: tl.constexpr):
    """auto_lr's watch over a probe block: Σ weight g (θ0 - θ) and Σ|z|, z being updated."""
    offset = (block // _PROBE_STRIDE).to(tl.int64) * BLOCK
    start_ptr = address(table_ptr, row, PROBE_START, P) + offset
    sum_ptr = address(table_ptr, row, PROBE_SUM, tl.float32) + offset
    origin = tl.load(start_ptr + lanes).to(tl.float32)
    z = decay * tl.load(sum_ptr + lanes) + weight * g
    tl.store(sum_ptr + lanes, z)
    moved = origin - theta
    if MASKED:
        moved = tl.where(valid, moved, 0.0)
    return weight * tl.sum(g * moved, 0), tl.sum(tl.abs(z), 0)


@triton.jit
def step_kernel(
    table_ptr, numbers_ptr, grads_ptr, owners_ptr, partials_ptr, book1_ptr, book2_ptr, clips_ptr,
    beta1, beta2, beta3, eps1, eps2, clip_threshold, frequency, edge_penalty, edge_threshold, detail,
    P: tl.constexpr, G: tl.constexpr, ALIGN: tl.constexpr, BLOCKS: tl.constexpr, EIGHT: tl.constexpr,
    SPATIAL: tl.constexpr, EVEN: tl.constexpr, EDGES: tl.constexpr, TORQUE_ON: tl.constexpr, CAME: tl.constexpr,
    CAUTIOUS: tl.constexpr, BACKGROUND: tl.constexpr, AWARE: tl.constexpr, WARM: tl.constexpr,
    AUTO: tl.constexpr, SCALED: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Update every tensor of a bucket.

    Args:
        table_ptr: int64 [tensors, Column], addresses and sizes.
        numbers_ptr: float32 [tensors, Number], this step's scalars.
        grads_ptr: int64 [tensors], addresses of the gradients; 0 where a tensor has none this time.
        owners_ptr: int32 [programs], the tensor each program works on.
        partials_ptr: float32 [programs, 3] out: sums of 2^(k/16) and of auto_lr over the program's blocks.
    """
    program = tl.program_id(0)
    row = tl.load(owners_ptr + program).to(tl.int64)
    grad_address = tl.load(grads_ptr + row)
    if grad_address != 0:
        size = tl.load(table_ptr + row * _ROW + SIZE)
        first = (program - tl.load(table_ptr + row * _ROW + FIRST_PROGRAM)) * BLOCKS
        grad_ptr = tl.multiple_of(grad_address.to(tl.pointer_type(G)), ALIGN)
        theta_base = address(table_ptr, row, THETA, P, ALIGN)
        STATE: tl.constexpr = tl.uint8 if EIGHT else tl.float32
        m_base, v_base = address(table_ptr, row, M, STATE), address(table_ptr, row, V, STATE)
        r_base, k_base = address(table_ptr, row, R, STATE), address(table_ptr, row, K, STATE)
        clip = 1.0
        if SCALED:
            clip = tl.load(clips_ptr + row)
        lanes = tl.arange(0, BLOCK)
        mask_sum, skipped, numerator, denominator = 0.0, 0.0, 0.0, 0.0
        blocks = tl.cdiv(size, BLOCK)
        for i in range(BLOCKS):
            block = first + i
            if block < blocks:
                start = block.to(tl.int64) * BLOCK
                g_ptr = grad_ptr + start
                full = start + BLOCK <= size
                if full:
                    g = tl.load(g_ptr + lanes).to(tl.float32)
                else:
                    g = tl.load(g_ptr + lanes, mask=lanes < size - start, other=0).to(tl.float32)
                if SCALED:
                    g = g * clip
                sum_squares = tl.sum(g * g, 0)
                theta_ptr, m_ptr, v_ptr, r_ptr, k_ptr = (
                    theta_base + start, m_base + start, v_base + start, r_base + start, k_base + start,
                )  # fmt: skip
                # A sum beyond float32's range takes the careful body too, which is right in any case.
                if full & (sum_squares < float("inf")):
                    w, s, a, b = _block(
                        table_ptr, numbers_ptr, row, block, size, g, sum_squares, book1_ptr, book2_ptr, g_ptr, clip,
                        theta_ptr, m_ptr, v_ptr, r_ptr, k_ptr,
                        beta1, beta2, beta3, eps1, eps2, clip_threshold, frequency, edge_penalty, edge_threshold, detail,
                        P, EIGHT, SPATIAL, EVEN, EDGES, TORQUE_ON, CAME, CAUTIOUS, BACKGROUND, AWARE, WARM, AUTO, SCALED,
                        STOCHASTIC, False,
                    )  # fmt: skip
                else:
                    w, s, a, b = _block(
                        table_ptr, numbers_ptr, row, block, size, g, sum_squares, book1_ptr, book2_ptr, g_ptr, clip,
                        theta_ptr, m_ptr, v_ptr, r_ptr, k_ptr,
                        beta1, beta2, beta3, eps1, eps2, clip_threshold, frequency, edge_penalty, edge_threshold, detail,
                        P, EIGHT, SPATIAL, EVEN, EDGES, TORQUE_ON, CAME, CAUTIOUS, BACKGROUND, AWARE, WARM, AUTO, SCALED,
                        STOCHASTIC, True,
                    )  # fmt: skip
                mask_sum += w
                skipped += s
                numerator += a
                denominator += b
        if WARM or AUTO:
            tl.store(partials_ptr + program * 3, mask_sum)
            tl.store(partials_ptr + program * 3 + 1, numerator)
            tl.store(partials_ptr + program * 3 + 2, denominator)
        if skipped > 0:
            # Whole numbers: the order of the additions does not matter.
            tl.atomic_add(address(table_ptr, row, STATS, tl.float32, 4) + 5, skipped)


DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def launch(bucket: Bucket, grads: list[int], sources: list[dict[str, Any]]) -> None:
    """One step of a bucket: at most four launches and one upload, nothing waited for.

    Args:
        grads: the address of each member's gradient, 0 for none; contiguous, in the bucket's gradient dtype.
        sources: the effective options by `Member.source`.
    """
    spec = bucket.spec
    addresses, numbers, warm = bucket.advance(grads, sources)
    betas, eps, clip_threshold, frequency, edge_penalty, edge_threshold, detail = spec.numbers
    aligned = bucket.aligned and all(x % 16 == 0 for x in grads)
    clips = numbers
    if spec.scaled:
        clips = statistics.clip_factors(bucket, addresses, numbers, DTYPES[spec.grad_dtype], aligned)
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
        clips_ptr=clips,
        beta1=betas[0],
        beta2=betas[1],
        beta3=betas[2],
        eps1=eps[0],
        eps2=eps[1],
        clip_threshold=clip_threshold,
        frequency=frequency / 8,
        edge_penalty=edge_penalty,
        edge_threshold=edge_threshold,
        detail=detail,
        P=DTYPES[spec.theta_dtype],
        G=DTYPES[spec.grad_dtype],
        ALIGN=16 if aligned else 2,
        BLOCKS=BLOCKS_PER_PROGRAM,
        EIGHT=spec.storage == "8bit",
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
        STOCHASTIC=spec.stochastic,
        num_warps=1,
    )
    if warm or spec.auto:
        statistics.finalise(bucket, addresses, numbers, partials, betas[1], warm)
