"""Device functions: which gradients count, and the Laplacian of a gradient over its four neighbours."""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl
from automagic_bnb.kernels import codec

from automagic_bnb import quantization as q
from automagic_bnb import reference

BLOCK = tl.constexpr(q.BLOCK)
MAX_GRADIENT = tl.constexpr(reference.MAX_GRADIENT)
_USUAL = reference.MAX_GRADIENT / 16
USUAL_GRADIENT = tl.constexpr(_USUAL)
USUAL_GRADIENT_BITS = tl.constexpr(int(np.float32(_USUAL).view(np.int32)))
"""Where a block and its Laplacian are below, four times a usable gradient does not hide one that is to be skipped."""


@triton.jit
def usable(x):
    """Neither NaN nor infinite nor so large that sums of squares overflow: see `reference.MAX_GRADIENT`."""
    return tl.abs(x) <= MAX_GRADIENT


@triton.jit
def scaled(x, scale):
    """Gradients times the first of `scale`; not a number where above the second: no clipping makes them usable."""
    return tl.where(tl.abs(x) <= scale[1], x * scale[0], float("nan"))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_bits(x):
    """The bits, int32, of the largest magnitude in a block; NaN's, where one is among them."""
    of_thread = tl.reduce(tl.reshape(tl.abs(x), (BLOCK // 8, 8)), 1, _larger)
    # The bits of numbers >= 0 are in their order, NaN's above all; a warp compares whole numbers in one instruction.
    return tl.max(of_thread.to(tl.int32, bitcast=True), 0)


@triton.jit
def _sanitised(ptr, inside, centre, scale, SCALED: tl.constexpr):
    """A neighbour's gradient as the Laplacian takes it: 0 if not finite, the centre's own value if outside."""
    x = tl.load(ptr, mask=inside, other=0).to(tl.float32)
    if SCALED:
        x = scaled(x, scale)
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
def _beside(g_ptr, g, thread_column, cols, scale, SCALED: tl.constexpr):
    """The sum of the left and the right neighbour, each thread holding 8 elements of one row.

    The neighbours are in the thread's own registers, but for the two beyond its ends.
    """
    threads = tl.arange(0, BLOCK // 8) * 8
    before = tl.load(g_ptr + threads - 1, mask=thread_column > 0, other=0).to(tl.float32)
    after = tl.load(g_ptr + threads + 8, mask=thread_column + 8 < cols, other=0).to(tl.float32)
    if SCALED:
        before, after = scaled(before, scale), scaled(after, scale)
    even, odd = tl.split(tl.reshape(g, (BLOCK // 8, 4, 2)))
    even04, even26 = tl.split(tl.reshape(even, (BLOCK // 8, 2, 2)))
    odd15, odd37 = tl.split(tl.reshape(odd, (BLOCK // 8, 2, 2)))
    g0, g4 = tl.split(even04)
    g2, g6 = tl.split(even26)
    g1, g5 = tl.split(odd15)
    g3, g7 = tl.split(odd37)
    before, after = tl.where(thread_column > 0, before, g0), tl.where(thread_column + 8 < cols, after, g7)
    even = tl.join(tl.join(before + g1, g3 + g5), tl.join(g1 + g3, g5 + g7))
    odd = tl.join(tl.join(g0 + g2, g4 + g6), tl.join(g2 + g4, g6 + after))
    return tl.reshape(tl.join(tl.reshape(even, (BLOCK // 8, 4)), tl.reshape(odd, (BLOCK // 8, 4))), (BLOCK,))


@triton.jit
def laplacian_even(g_ptr, g, lanes, place, column, lead, tail, width, scale, SCALED: tl.constexpr):
    """The same of a whole block of a matrix whose rows are a multiple of 8 long.

    A gradient that is not finite makes the Laplacian beside it not finite: the caller looks.

    Args:
        place: int32 [256], where the elements lie from the program's first on.
        column: int32, where in its row of `width` elements the block begins.
        lead, tail: int32, the first place that has a row above it, and the first that has none below.
    """
    threads = tl.arange(0, BLOCK // 8) * 8
    columns = column + threads
    columns = tl.where(columns >= width, columns - width, columns) if width >= BLOCK else columns % width
    lap = _beside(g_ptr, g, columns, width, scale, SCALED)
    # Outside the matrix the element itself is read, which adds nothing; 8 neighbours share a row, and one load.
    above = codec.widen(tl.load(g_ptr + (lanes + tl.where(place >= lead, -width, 0))))
    below = codec.widen(tl.load(g_ptr + (lanes + tl.where(place < tail, width, 0))))
    if SCALED:
        above, below = scaled(above, scale), scaled(below, scale)
    return (lap + (above + below)) - 4.0 * g
