"""Device functions: which gradients count, and the Laplacian of a gradient over its four neighbours."""

from __future__ import annotations

import triton
import triton.language as tl

from automagic_bnb import quantization as q
from automagic_bnb import reference

BLOCK = tl.constexpr(q.BLOCK)
MAX_GRADIENT = tl.constexpr(reference.MAX_GRADIENT)


@triton.jit
def usable(x):
    """Neither NaN nor infinite nor so large that sums of squares overflow: see `reference.MAX_GRADIENT`."""
    return tl.abs(x) <= MAX_GRADIENT


@triton.jit
def _sanitised(ptr, inside, centre, scale, SCALED: tl.constexpr):
    """A neighbour's gradient as the Laplacian takes it: 0 if not finite, the centre's own value if outside."""
    x = tl.load(ptr, mask=inside, other=0).to(tl.float32)
    if SCALED:
        x = x * scale
    return tl.where(inside, tl.where(usable(x), x, 0.0), centre)


@triton.jit
def laplacian(g_ptr, g, lanes, start, size, rows, cols, valid, scale, SCALED: tl.constexpr):
    """Σ (g_j - g_i) over the four neighbours inside the same [rows, cols] slice: any shape, any values."""
    slice_size = rows * cols
    place = (lanes + start % slice_size) % slice_size
    column = place % cols
    lap = _sanitised(g_ptr + lanes - 1, valid & (column > 0), g, scale, SCALED) - g
    lap += _sanitised(g_ptr + lanes + 1, valid & (column < cols - 1), g, scale, SCALED) - g
    lap += _sanitised(g_ptr + lanes - cols, valid & (place >= cols), g, scale, SCALED) - g
    return lap + (_sanitised(g_ptr + lanes + cols, valid & (place < slice_size - cols), g, scale, SCALED) - g)


@triton.jit
def _row_differences(g_ptr, g, thread_column, cols, inside, scale, SCALED: tl.constexpr):
    """Σ (g_j - g_i) over the left and right neighbours, each thread holding 8 elements of one row.

    The neighbours are in the thread's own registers, but for the two beyond its ends.
    """
    threads = tl.arange(0, BLOCK // 8) * 8
    before = tl.load(g_ptr + threads - 1, mask=inside & (thread_column > 0), other=0).to(tl.float32)
    after = tl.load(g_ptr + threads + 8, mask=inside & (thread_column + 8 < cols), other=0).to(tl.float32)
    if SCALED:
        before, after = before * scale, after * scale
    even, odd = tl.split(tl.reshape(g, (BLOCK // 8, 4, 2)))
    even04, even26 = tl.split(tl.reshape(even, (BLOCK // 8, 2, 2)))
    odd15, odd37 = tl.split(tl.reshape(odd, (BLOCK // 8, 2, 2)))
    g0, g4 = tl.split(even04)
    g2, g6 = tl.split(even26)
    g1, g5 = tl.split(odd15)
    g3, g7 = tl.split(odd37)
    d01, d12, d23, d34, d45, d56, d67 = g1 - g0, g2 - g1, g3 - g2, g4 - g3, g5 - g4, g6 - g5, g7 - g6
    lap0 = d01 - tl.where(thread_column > 0, g0 - before, 0.0)
    lap7 = tl.where(thread_column + 8 < cols, after - g7, 0.0) - d67
    even = tl.join(tl.join(lap0, d45 - d34), tl.join(d23 - d12, d67 - d56))
    odd = tl.join(tl.join(d12 - d01, d56 - d45), tl.join(d34 - d23, lap7))
    return tl.reshape(tl.join(tl.reshape(even, (BLOCK // 8, 4)), tl.reshape(odd, (BLOCK // 8, 4))), (BLOCK,))


@triton.jit
def laplacian_even(g_ptr, g, lanes, column, start, size, width, valid, scale, SCALED: tl.constexpr):
    """The same in a matrix whose rows are a multiple of 8 long.

    A gradient that is not finite makes the Laplacian beside it not finite: the caller looks.

    Args:
        column: int32, where in its row of `width` elements the block begins.
    """
    threads = tl.arange(0, BLOCK // 8) * 8
    columns = column + threads
    columns = tl.where(columns >= width, columns - width, columns) if width >= BLOCK else columns % width
    lap = _row_differences(g_ptr, g, columns, width, threads < size - start, scale, SCALED)
    # Outside the matrix the element itself is read, which adds nothing; 8 neighbours share a row, and one load.
    first = tl.multiple_of(tl.minimum(tl.maximum(width - start, 0), BLOCK).to(tl.int32), 8)
    last = tl.multiple_of(tl.minimum(tl.maximum(size - width - start, 0), BLOCK).to(tl.int32), 8)
    above = tl.load(g_ptr + (lanes + tl.where(lanes >= first, -width, 0)), mask=valid, other=0).to(tl.float32)
    below = tl.load(g_ptr + (lanes + tl.where(lanes < last, width, 0)), mask=valid, other=0).to(tl.float32)
    if SCALED:
        above, below = above * scale, below * scale
    return (lap + (above + below)) - 2.0 * g
