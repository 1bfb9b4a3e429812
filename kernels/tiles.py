"""Device functions: second moments as row means times column means of a tile, see `automagic_bnb.factored`."""

from __future__ import annotations

import triton
import triton.language as tl
from automagic_bnb.kernels import codec

from automagic_bnb import factored
from automagic_bnb import quantization as q

BLOCK, LEAST_WIDTH = tl.constexpr(q.BLOCK), tl.constexpr(factored.LEAST_WIDTH)


@triton.jit
def counts_of(size, first, strips, blocks, WIDTH: tl.constexpr):
    """How many elements each column of a tile has, float32 [WIDTH]; the tile's blocks are `strips` apart."""
    last = (first + (blocks - 1) * strips).to(tl.int64) * BLOCK
    remaining = tl.minimum(size - last, BLOCK).to(tl.int32)
    below = tl.maximum(remaining - tl.arange(0, WIDTH) + (WIDTH - 1), 0) // WIDTH
    return ((blocks - 1) * (BLOCK // WIDTH) + below).to(tl.float32)


@triton.jit
def scale_of(col_ptr, counts, WIDTH: tl.constexpr):
    """1 / mean of a tile, from its columns' means."""
    mean = tl.sum(tl.load(col_ptr + tl.arange(0, WIDTH)).to(tl.float32) * counts, 0) / tl.sum(counts, 0)
    return codec.reciprocal(tl.maximum(mean, codec.TINY))


@triton.jit
def estimate(row_ptr, col_ptr, scale, remaining, WIDTH: tl.constexpr):
    """row · col / mean of a block's elements, float32 [256].

    Args:
        row_ptr, col_ptr: where the block's row means, and its tile's column means, begin.
        scale: 1 / mean.
    """
    lanes = tl.arange(0, BLOCK)
    if WIDTH == BLOCK:
        return tl.load(col_ptr + lanes).to(tl.float32) * (tl.load(row_ptr, volatile=True).to(tl.float32) * scale)
    else:  # the 8 elements of a thread lie in one row
        threads = tl.arange(0, BLOCK // 8) * 8
        rows = tl.load(row_ptr + threads // WIDTH, mask=threads < remaining, other=0.0, volatile=True)
        rows = rows.to(tl.float32) * scale
        rows = tl.reshape(tl.broadcast_to(rows[:, None], (BLOCK // 8, 8)), (BLOCK,))
        return tl.load(col_ptr + lanes % WIDTH).to(tl.float32) * rows


@triton.jit
def move_rows(
    row_ptr, seen, used, remaining, per, beta, gain, key, start, WIDTH: tl.constexpr, MEANS: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """Move a block's row means towards those of `seen`, float32 [256], 0 behind the end.

    Args:
        gain: 1 - beta.
        used: int32 [256], 1 for what was not skipped. A row in which all was skipped keeps its very mean.
        key, start: of the random bits, and the flat index of the block's first element; MEANS is the means' dtype.
    """
    if WIDTH == BLOCK:
        moved = beta * tl.load(row_ptr).to(tl.float32) + gain * (tl.sum(seen, 0) * per)
        moved = codec.round_mean(moved, key, start, MEANS)
        if CAREFUL:
            tl.store(row_ptr, moved, mask=tl.sum(used, 0) > 0)
        else:
            tl.store(row_ptr, moved)
    else:
        rows = tl.arange(0, BLOCK // WIDTH)
        inside = rows * WIDTH < remaining
        means = tl.sum(tl.reshape(seen, (BLOCK // WIDTH, WIDTH)), 1)
        if WIDTH > LEAST_WIDTH:
            means = means * (1 / WIDTH)
        else:  # several rows of a narrower matrix: the end may cut them
            length = tl.minimum(tl.maximum(remaining - rows * WIDTH, 1), WIDTH)
            means = means * codec.reciprocal(length.to(tl.float32))
        held = tl.load(row_ptr + rows, mask=inside, other=0.0).to(tl.float32)
        moved = codec.round_mean(beta * held + gain * means, key, start + rows * WIDTH, MEANS)
        if CAREFUL:
            inside = inside & (tl.sum(tl.reshape(used, (BLOCK // WIDTH, WIDTH)), 1) > 0)
        tl.store(row_ptr + rows, moved, mask=inside)


@triton.jit
def move_columns(
    col_ptr, sums, counts, beta, gain, key, start, WIDTH: tl.constexpr, MEANS: tl.constexpr
):  # fmt: skip
    """Move a tile's column means towards those of what its program has seen: sums float32 [256] over its blocks.

    key, start: as for `move_rows`, of the tile's first block.
    """
    if WIDTH < BLOCK:
        sums = tl.sum(tl.reshape(sums, (BLOCK // WIDTH, WIDTH)), 0)
    columns = tl.arange(0, WIDTH)
    held = tl.load(col_ptr + columns).to(tl.float32)
    moved = beta * held + gain * (sums / tl.maximum(counts, 1.0))
    tl.store(col_ptr + columns, codec.round_mean(moved, key, start + columns, MEANS), mask=counts > 0)
