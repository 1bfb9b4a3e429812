"""`lora_direction` on the device: what `step_kernel` leaves of LoRA matrices is turned, and then moves them.

Where it has a say, `step_kernel` moves the states and leaves n of each matrix in memory. `gram_kernel` multiplies it
with itself, a program to a chunk of its long side; `turn_kernel` finds by what n becomes orthogonal, a program to a
matrix; `turned_kernel` multiplies by that, chunk by chunk; and `move_kernel` does the rest of the rule, block by block.
No sum depends on the order of programs. See `automagic_bnb.direction`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
import triton
import triton.language as tl
from automagic_bnb.kernels import codec, lanes, low_rank, one_block, stencil
from automagic_bnb.kernels.launching import Compiled
from automagic_bnb.kernels.low_rank import places
from automagic_bnb.kernels.tables import BLOCKS_PER_PROGRAM, Bucket, Column, Number, Variant, upload
from torch import Tensor

from automagic_bnb import direction
from automagic_bnb import quantization as q

BLOCK = tl.constexpr(q.BLOCK)
BLOCKS = tl.constexpr(BLOCKS_PER_PROGRAM)
_C = {column.name: tl.constexpr(int(column)) for column in Column}
_ROW, _NUMBERS = tl.constexpr(len(Column)), tl.constexpr(len(Number))
THETA, RESIDUAL, DIRECTION = _C["THETA"], _C["MASTER_RESIDUAL"], _C["DIRECTION"]
K, K_PAIRS = _C["LR_MASK"], _C["LR_MASK4"]
SIZE, STRIPS, FIRST_PROGRAM = _C["SIZE"], _C["STRIPS"], _C["FIRST_PROGRAM"]
N_RATE, N_DECAY, N_KEY = (tl.constexpr(int(number)) for number in (Number.RATE, Number.WEIGHT_DECAY, Number.KEY))
LEAST = tl.constexpr(direction.LEAST)
_QUINTICS, _CUBICS = (direction.ITERATION.count(kind) for kind in (direction.QUINTIC, direction.CUBIC))
assert direction.ITERATION == (direction.QUINTIC,) * _QUINTICS + (direction.CUBIC,) * _CUBICS
QUINTICS, ITERATIONS = tl.constexpr(_QUINTICS), tl.constexpr(len(direction.ITERATION))
A1, B1, C1 = map(tl.constexpr, direction.QUINTIC)
A2, B2, C2 = map(tl.constexpr, direction.CUBIC)


class Matrix(IntEnum):
    """What is known of each matrix, int64."""

    ROW = 0  # in the bucket
    OFFSET = 1  # of its n, in elements
    ROWS = 2
    COLS = 3
    FIRST = 4  # of its chunks
    CHUNKS = 5


class Chunk(IntEnum):
    """What is known of each chunk, int64."""

    MATRIX = 0
    START = 1  # along the long side


CHUNK = 2048
"""Places along the long side: thousands of programs of a LoRA's some hundred matrices, and sums of a few of them."""
GRAM_TILES = {16: (64, 1, 1), 32: (64, 2, 1), 64: (64, 8, 2)}
TURNED_TILES = {16: (64, 4, 3), 32: (64, 4, 3), 64: (64, 8, 2)}
"""By RANK: SPAN, warps and stages; the best that were tried (benchmarks/NOTES.md), at 64 not measured."""
PRECISION = tl.constexpr("tf32x3" if torch.version.hip is None else "ieee")
"""Of products with n: by tensor cores, with nearly the digits of float32; AMD's have no such products."""
M_ROW, M_OFFSET, M_ROWS, M_COLS, M_FIRST, M_CHUNKS = (tl.constexpr(int(column)) for column in Matrix)
C_MATRIX, C_START = (tl.constexpr(int(column)) for column in Chunk)
_MATRIX, _CHUNK, _PLACES = tl.constexpr(len(Matrix)), tl.constexpr(len(Chunk)), tl.constexpr(CHUNK)


@triton.jit
def _square(RANK: tl.constexpr):
    return tl.arange(0, RANK)[:, None] * RANK + tl.arange(0, RANK)[None, :]


@triton.jit
def _chunk(chunk_ptr, entry_ptr):
    """Where a chunk begins and ends along the long side, both sides' lengths, and whether the long one is first."""
    rows, cols = tl.load(entry_ptr + M_ROWS).to(tl.int32), tl.load(entry_ptr + M_COLS).to(tl.int32)
    long, start = tl.maximum(rows, cols), tl.load(chunk_ptr + C_START).to(tl.int32)
    return start, tl.minimum(start + _PLACES, long), tl.minimum(rows, cols), long, rows > cols


@triton.jit
def _gram(n_ptr, start, end, short, long, TALL: tl.constexpr, RANK: tl.constexpr, SPAN: tl.constexpr):
    """N Nᵀ of the short side over a chunk, float32 [RANK, RANK], zeros behind the end."""
    gram = tl.zeros((RANK, RANK), dtype=tl.float32)
    for at in tl.range(start, end, SPAN):
        place, inside = places(at, short, long, TALL, RANK, SPAN)
        n = tl.load(n_ptr + place, mask=inside, other=0.0)
        if TALL:
            gram = tl.dot(tl.trans(n), n, gram, input_precision=PRECISION)
        else:
            gram = tl.dot(n, tl.trans(n), gram, input_precision=PRECISION)
    return gram


@triton.jit
def gram_kernel(chunks_ptr, table_ptr, grads_ptr, directions_ptr, grams_ptr, RANK: tl.constexpr, SPAN: tl.constexpr):
    """The Gram matrices of all chunks.

    Args:
        chunks_ptr: int64 [chunks, Chunk].
        table_ptr: int64 [matrices, Matrix], all with a short side of at most RANK.
        grads_ptr: int64 [tensors of the bucket], 0 for those that are not stepped.
        directions_ptr: float32, where n of all of them lies.
        grams_ptr: float32 [chunks, RANK, RANK] out.
    """
    chunk_ptr = chunks_ptr + tl.program_id(0) * _CHUNK
    entry_ptr = table_ptr + tl.load(chunk_ptr + C_MATRIX) * _MATRIX
    if tl.load(grads_ptr + tl.load(entry_ptr + M_ROW)) != 0:
        n_ptr = directions_ptr + tl.load(entry_ptr + M_OFFSET)
        start, end, short, long, tall = _chunk(chunk_ptr, entry_ptr)
        if tall:
            gram = _gram(n_ptr, start, end, short, long, True, RANK, SPAN)
        else:
            gram = _gram(n_ptr, start, end, short, long, False, RANK, SPAN)
        tl.store(grams_ptr + tl.program_id(0) * (RANK * RANK) + _square(RANK), gram)


@triton.jit
def turn_kernel(table_ptr, grads_ptr, grams_ptr, turns_ptr, RANK: tl.constexpr):
    """T of each matrix, symmetric: T N is N made orthogonal, as large as N.

    The iteration of `direction.orthogonal`, in float32: what rounding leaves of a singular value below 1e-3 of the
    largest is far from 1, but it stays small, which is what counts in a step.

    Args:
        turns_ptr: float32 [matrices, RANK, RANK] out; the others as `gram_kernel` has them.
    """
    entry_ptr = table_ptr + tl.program_id(0) * _MATRIX
    if tl.load(grads_ptr + tl.load(entry_ptr + M_ROW)) != 0:
        own = tl.arange(0, RANK)[:, None] == tl.arange(0, RANK)[None, :]
        unit = tl.where(own, 1.0, 0.0)
        gram, chunk = unit * 0, tl.load(entry_ptr + M_FIRST)
        end = chunk + tl.load(entry_ptr + M_CHUNKS)
        while chunk < end:
            gram += tl.load(grams_ptr + chunk * (RANK * RANK) + _square(RANK))
            chunk += 1
        size = tl.sum(tl.sum(tl.where(own, gram, 0.0), 1), 0)
        gram = gram * (1 / tl.maximum(size, LEAST))
        turn, i = unit, 0
        while i < ITERATIONS:
            a, b, c = tl.where(i < QUINTICS, A1, A2), tl.where(i < QUINTICS, B1, B2), tl.where(i < QUINTICS, C1, C2)
            step = unit * a + gram * b + tl.dot(gram, gram, input_precision="ieee") * c
            gram = tl.dot(step, tl.dot(gram, step, input_precision="ieee"), input_precision="ieee")
            turn = tl.dot(step, turn, input_precision="ieee")
            i += 1
        left = tl.sum(tl.sum(tl.where(own, gram, 0.0), 1), 0)
        turn = tl.where(size > LEAST, turn * tl.rsqrt(tl.maximum(left, LEAST)), unit)
        tl.store(turns_ptr + tl.program_id(0) * (RANK * RANK) + _square(RANK), turn)


@triton.jit
def _turned(n_ptr, turn, start, end, short, long, TALL: tl.constexpr, RANK: tl.constexpr, SPAN: tl.constexpr):
    """N ← T N over a chunk."""
    for at in tl.range(start, end, SPAN):
        place, inside = places(at, short, long, TALL, RANK, SPAN)
        n = tl.load(n_ptr + place, mask=inside, other=0.0)
        if TALL:
            n = tl.dot(n, turn, input_precision=PRECISION)
        else:
            n = tl.dot(turn, n, input_precision=PRECISION)
        tl.store(n_ptr + place, n, mask=inside)


@triton.jit
def turned_kernel(chunks_ptr, table_ptr, grads_ptr, directions_ptr, turns_ptr, RANK: tl.constexpr, SPAN: tl.constexpr):
    """Turn all chunks in place; the arguments as `gram_kernel` and `turn_kernel` have them."""
    chunk_ptr = chunks_ptr + tl.program_id(0) * _CHUNK
    matrix = tl.load(chunk_ptr + C_MATRIX)
    entry_ptr = table_ptr + matrix * _MATRIX
    if tl.load(grads_ptr + tl.load(entry_ptr + M_ROW)) != 0:
        n_ptr = directions_ptr + tl.load(entry_ptr + M_OFFSET)
        start, end, short, long, tall = _chunk(chunk_ptr, entry_ptr)
        turn = tl.load(turns_ptr + matrix * (RANK * RANK) + _square(RANK))
        if tall:
            _turned(n_ptr, turn, start, end, short, long, True, RANK, SPAN)
        else:
            _turned(n_ptr, turn, start, end, short, long, False, RANK, SPAN)


@triton.jit
def _move_block(entry_ptr, numbers, bounded, key, block, size, n_ptr, grad_ptr, clip, S):
    """Steps 5 and 8 of one block, with the rates of step 7; skipped elements keep what they have."""
    elements, pairs = tl.arange(0, BLOCK), tl.arange(0, BLOCK // 2)
    start = block.to(tl.int64) * BLOCK
    remaining = tl.minimum(size - start, BLOCK).to(tl.int32)
    valid = elements < remaining
    g = codec.widen(tl.load(grad_ptr + start + elements, mask=valid, other=0))
    if S.SCALED:
        g = stencil.scaled(g, clip)
    usable = stencil.usable(g)
    g = tl.where(usable, g, 0.0)
    n = tl.load(n_ptr + start + elements, mask=valid, other=0.0)
    if S.MASK == 4:
        k_ptr = one_block.address(entry_ptr, K_PAIRS, tl.uint8) + start // 2
        k = codec.unpack_pairs(tl.load(k_ptr + pairs, mask=2 * pairs < remaining, other=0))
    elif S.MASK == 0:
        k = n
    else:
        k_ptr = one_block.address(entry_ptr, K, tl.float32 if S.MASK == 32 else tl.uint8) + start
        k = tl.load(k_ptr + elements, mask=valid, other=0)
    theta_ptr = one_block.address(entry_ptr, THETA, S.P, S.ALIGN) + start
    low_ptr = one_block.address(entry_ptr, RESIDUAL, tl.int8) + start
    theta_raw = tl.load(theta_ptr + elements, mask=valid, other=0)
    low_raw = theta_raw
    if S.ECC:
        low_raw = tl.load(low_ptr + elements, mask=valid, other=0)
    theta = codec.join_master(theta_raw, low_raw) if S.ECC else codec.widen(theta_raw)

    if S.CAUTIOUS:
        n, share = one_block.cautious(n, g, one_block.count(g != 0))
        n = n * lanes.over_block(tl.zeros((32,), tl.float32) + codec.reciprocal(share))
    rates, _ = one_block.rates(numbers, lanes.of_lane(numbers, N_RATE), k, g, bounded, S.MASK, S.WARM)
    theta = theta - rates * (n + lanes.over_block(lanes.of_lane(numbers, N_DECAY)) * theta)
    at = one_block.Place(block, remaining, 0.0, elements, valid, usable, valid, True, True)
    pointers = one_block.Elements(theta_ptr, low_ptr, 0, 0, 0, 0, 0)
    loaded = one_block.Elements(theta_raw, low_raw, 0, 0, 0, 0, 0)
    one_block.write_weights(theta, pointers, loaded, at, codec.random_bits(key, start), S, True)


@triton.jit
def move_kernel(table_ptr, numbers_ptr, grads_ptr, owners_ptr, directions_ptr, clips_ptr, S):
    """Move the weights of a bucket by what `turn_kernel` left; the arguments are `step_kernel`'s."""
    program = tl.program_id(0)
    row = tl.load(owners_ptr + program)
    grad_address = tl.load(grads_ptr + row)
    if grad_address != 0:
        entry_ptr = table_ptr + row.to(tl.int64) * _ROW
        size = tl.load(entry_ptr + SIZE)
        local = program - tl.load(entry_ptr + FIRST_PROGRAM).to(tl.int32)
        numbers, bounded = one_block.numbers_of(entry_ptr, numbers_ptr + row * _NUMBERS, S)
        key = tl.load(numbers_ptr + row * _NUMBERS + N_KEY).to(tl.uint32, bitcast=True)
        clip = (1.0, 1.0)
        if S.SCALED:
            clip = (tl.load(clips_ptr + 2 * row), tl.load(clips_ptr + 2 * row + 1))
        n_ptr = directions_ptr + tl.load(entry_ptr + DIRECTION)
        grad_ptr = tl.multiple_of(grad_address.to(tl.pointer_type(S.G)), S.ALIGN)
        every = tl.cdiv(size, BLOCK)
        first, stride, most = local * BLOCKS, 1, BLOCKS
        if S.WIDTH:
            stride = tl.load(entry_ptr + STRIPS).to(tl.int32)
            first, most = local // stride * S.HEIGHT * stride + local % stride, S.HEIGHT
        blocks = tl.minimum(tl.cdiv(every - first, stride), most).to(tl.int32)
        i = first * 0
        while i < blocks:
            _move_block(entry_ptr, numbers, bounded, key, first + i * stride, size, n_ptr, grad_ptr, clip, S)
            i += 1


@dataclass
class Alike:
    """The matrices of a bucket that are turned together, of one RANK."""

    rank: int
    table: Tensor
    """int64 [matrices, Matrix] on the device."""
    chunks: Tensor
    """int64 [chunks, Chunk] there."""

    @classmethod
    def of(cls, rank: int, matrices: np.ndarray, device: torch.device) -> Alike:
        """matrices: int64 [matrices, Matrix], its last two columns still empty."""
        matrices = matrices.copy()
        counts = -(-matrices[:, [Matrix.ROWS, Matrix.COLS]].max(axis=1) // CHUNK)
        matrices[:, Matrix.FIRST], matrices[:, Matrix.CHUNKS] = np.cumsum(counts) - counts, counts
        owners = np.repeat(np.arange(len(matrices)), counts)
        starts = (np.arange(len(owners)) - matrices[owners, Matrix.FIRST]) * CHUNK
        return cls(rank, upload(matrices, device), upload(np.stack([owners, starts], axis=1), device))

    def turn(self, grads: Tensor, directions: Tensor) -> None:
        """Launch the three kernels."""
        rank, compiled = self.rank, _compiled(self.rank)
        squares = torch.empty(
            (len(self.chunks) + len(self.table), rank, rank), dtype=torch.float32, device=grads.device
        )
        grams, turns = squares[: len(self.chunks)], squares[len(self.chunks) :]
        known = {"chunks_ptr": self.chunks, "table_ptr": self.table, "grads_ptr": grads, "directions_ptr": directions}
        span, warps, stages = GRAM_TILES[rank]
        of_chunks = {**known, "grams_ptr": grams, "RANK": rank, "SPAN": span}
        compiled.launch(gram_kernel, len(self.chunks), of_chunks, num_warps=warps, num_stages=stages)
        of_matrix = {"table_ptr": self.table, "grads_ptr": grads, "grams_ptr": grams, "turns_ptr": turns, "RANK": rank}
        compiled.launch(turn_kernel, len(self.table), of_matrix, num_warps=4)
        span, warps, stages = TURNED_TILES[rank]
        of_chunks = {**known, "turns_ptr": turns, "RANK": rank, "SPAN": span}
        compiled.launch(turned_kernel, len(self.chunks), of_chunks, num_warps=warps, num_stages=stages)


class Turns:
    """The matrices of a bucket in which `lora_direction` has a say."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        shapes = [member.theta.shape for member in bucket.members]
        known = [[row, bucket.directions[row], *shape, 0, 0] for row, shape in enumerate(shapes)]
        table = np.array(known, dtype=np.int64)
        ranks = np.array([low_rank.rank_class(m.theta) for m in bucket.members])
        taken = np.unique(ranks[ranks <= low_rank.MAX_RANK]).tolist()
        self.alike = [Alike.of(rank, table[ranks == rank], bucket.spec.device) for rank in taken]
        self.left: dict[tuple[int, ...], list[int]] = {}
        """Of matrices with a longer short side the offsets, by their shapes."""
        for _, offset, *shape, _, _ in table[ranks > low_rank.MAX_RANK].tolist():
            self.left.setdefault(tuple(shape), []).append(offset)

    def move(self, grads: Tensor, numbers: Tensor, directions: Tensor, clips: Tensor, variant: Variant) -> None:
        """Turn what `step_kernel` left in `directions`, float32 [`Bucket.direction_elements`], and move the weights."""
        for matrices in self.alike:
            matrices.turn(grads, directions)
        for shape, offsets in self.left.items():
            found = [directions[offset : offset + shape[0] * shape[1]].view(shape) for offset in offsets]
            torch._foreach_copy_(found, list(direction.orthogonal(torch.stack(found)).unbind()))
        arguments = {
            "table_ptr": self.bucket.table,
            "numbers_ptr": numbers,
            "grads_ptr": grads,
            "owners_ptr": self.bucket.owners,
            "directions_ptr": directions,
            "clips_ptr": clips,
            "S": variant.constants,
        }
        variant.compiled.launch(move_kernel, self.bucket.programs, arguments, num_warps=1)


@functools.cache
def _compiled(rank: int) -> Compiled:
    """All matrices of a RANK have the same."""
    return Compiled()


def turns_of(bucket: Bucket) -> Turns:
    if bucket.turns is None:
        bucket.turns = Turns(bucket)
    return bucket.turns
