"""Step 9, soft-thresholding of singular values, in one launch for many matrices: see `automagic_bnb.low_rank`.

A program works on one matrix: the Gram matrix of its short side in double precision, the eigenvectors by Jacobi's
method, and A - S A written back. Rotations of a round act on disjoint pairs of rows, so they are done together.
"""

from __future__ import annotations

import functools
from enum import IntEnum
from typing import Any

import numpy as np
import triton
import triton.language as tl
from automagic_bnb.kernels import codec
from automagic_bnb.kernels.launching import Compiled
from automagic_bnb.kernels.tables import Bucket, Member, Spec, upload
from torch import Tensor

from automagic_bnb import low_rank
from automagic_bnb import quantization as q

MAX_RANK = 64
"""Beyond it two square matrices of float64 no longer fit the registers."""
MAX_ELEMENTS = 2**31
"""Places in a matrix are int32."""


class Column(IntEnum):
    """What the table holds of each matrix."""

    THETA = 0
    ROWS = 1
    COLS = 2
    KEY = 3
    RATE = 4  # the address of auto_lr's d, which the threshold is a multiple of; 0 for none
    THRESHOLD = 5  # the bits of a float32


_C = {column.name: tl.constexpr(int(column)) for column in Column}
_ROW = tl.constexpr(len(Column))
THETA, ROWS, COLS, KEY, RATE, THRESHOLD = (_C[column.name] for column in Column)

_CONVERGED = tl.constexpr(1e-14)
"""Of the trace: what is left beside the diagonal moves the eigenvalues by its square, and float64 no further."""
_MAX_SWEEPS = tl.constexpr(40)
"""Never reached: 7 to 10 sweeps are usual, 20 the most seen (rank 64, values over eight decades)."""


@triton.jit
def places(start, short, long, TALL: tl.constexpr, RANK: tl.constexpr, SPAN: tl.constexpr):
    """Flat indices of SPAN places along the long side, and which are inside: [SPAN, RANK] if tall, [RANK, SPAN] if not.

    Either way neighbours in the last dimension are neighbours in memory.
    """
    across, along = tl.arange(0, RANK), start + tl.arange(0, SPAN)
    if TALL:
        place = along[:, None] * short + across[None, :]
        inside = (along[:, None] < long) & (across[None, :] < short)
    else:
        place = across[:, None] * long + along[None, :]
        inside = (across[:, None] < short) & (along[None, :] < long)
    return place, inside


@triton.jit
def _load(theta_ptr, start, short, long, TALL: tl.constexpr, RANK: tl.constexpr, SPAN: tl.constexpr):
    """SPAN places along the long side, float64, zeros behind the end."""
    place, inside = places(start, short, long, TALL, RANK, SPAN)
    return tl.load(theta_ptr + place, mask=inside, other=0.0).to(tl.float64)


@triton.jit
def _gram(theta_ptr, short, long, TALL: tl.constexpr, RANK: tl.constexpr, SPAN: tl.constexpr):
    """A Aᵀ of the short side, float64 [RANK, RANK], zeros behind the end."""
    gram = tl.zeros((RANK, RANK), dtype=tl.float64)
    start = short - short  # a loop over a run-time range, in a form that the interpreter takes too
    # The next part is under way while one is worked on. It is carried in float64: in Triton 3.6 a product of values
    # that were narrower in the same turn of the loop does not compile.
    following = _load(theta_ptr, start, short, long, TALL, RANK, SPAN)
    while start < long:
        a = following
        start += SPAN
        following = _load(theta_ptr, start, short, long, TALL, RANK, SPAN)
        if TALL:
            gram = tl.dot(tl.trans(a), a, gram, out_dtype=tl.float64)
        else:
            gram = tl.dot(a, tl.trans(a), gram, out_dtype=tl.float64)
    return gram


@triton.jit
def _eigen(gram, short, RANK: tl.constexpr):
    """Eigenvalues float64 [RANK] and eigenvectors, the rows of float64 [RANK, RANK], of a positive semidefinite matrix.

    Cyclic Jacobi in the order of a round-robin tournament: in round k of m = n - 1 (n even), rows i and j meet where
    i + j ≡ k modulo m; the last row meets the one that would meet itself. Golub and Van Loan, Matrix Computations, 8.5.
    """
    rows, columns = tl.arange(0, RANK)[:, None], tl.arange(0, RANK)[None, :]
    lanes = tl.arange(0, RANK)
    own = rows == columns
    vectors = tl.where(own, 1.0, 0.0).to(tl.float64)
    last = short - 1 + short % 2
    limit = tl.sum(tl.sum(tl.where(own, gram, 0.0), 1), 0) * _CONVERGED
    worst, sweep = limit + 1, 0
    while (worst > limit) & (sweep < _MAX_SWEEPS):
        largest = tl.zeros((RANK,), dtype=tl.float64)
        k = last - last
        while k < last:
            met = (k - lanes + last) % last
            met = tl.where(met == lanes, last, met)
            # 2 i ≡ k has the solution k (last + 1) / 2, as last is odd
            met = tl.where(lanes == last, k * ((last + 1) // 2) % last, met)
            partner = tl.where(lanes > last, lanes, met)
            other = tl.expand_dims(partner, 1) == columns
            to_rows = tl.broadcast_to(tl.expand_dims(partner, 1), (RANK, RANK))
            to_columns = tl.broadcast_to(tl.expand_dims(partner, 0), (RANK, RANK))
            met_rows = tl.gather(gram, to_rows, 0)
            # g_jj - g_ii and 2 g_ij: two terms each, so that i and j find the same angle, with opposite signs.
            apart = tl.sum(tl.where(own, -gram, tl.where(other, met_rows, 0.0)), 1)
            shared = tl.sum(tl.where(own, met_rows, tl.where(other, gram, 0.0)), 1)
            largest = tl.maximum(largest, tl.abs(shared))
            length = tl.abs(apart) + tl.sqrt(apart * apart + shared * shared)
            positive = (apart > 0) | ((apart == 0) & (lanes < partner))
            tangent = tl.where(positive, shared, -shared) / tl.where(length > 0, length, 1.0)
            cosine = 1 / tl.sqrt(1 + tangent * tangent)
            sine = cosine * tangent
            c, s = tl.expand_dims(cosine, 1), tl.expand_dims(sine, 1)
            gram = c * gram - s * met_rows
            vectors = c * vectors - s * tl.gather(vectors, to_rows, 0)
            gram = tl.expand_dims(cosine, 0) * gram - tl.expand_dims(sine, 0) * tl.gather(gram, to_columns, 1)
            k += 1
        worst = tl.max(largest, 0)
        sweep += 1
    return tl.sum(tl.where(own, gram, 0.0), 1), vectors


@triton.jit
def _random_bits(key, place):
    """16 random bits for each flat index below 2^31; equals `quantization.random_bits`."""
    word = codec.mix((place >> 1).to(tl.uint32) ^ key)
    return tl.where((place & 1) == 0, word & 0xFFFF, word >> 16)


@triton.jit
def _subtract(
    theta_ptr, shrink, key, short, long,
    P: tl.constexpr, TALL: tl.constexpr, RANK: tl.constexpr, SPAN: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """A ← A - S A, S float32 [RANK, RANK] and symmetric."""
    start = short - short
    while start < long:
        place, inside = places(start, short, long, TALL, RANK, SPAN)
        a = tl.load(theta_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if TALL:
            removed = tl.dot(a, shrink, input_precision="ieee")
        else:
            removed = tl.dot(shrink, a, input_precision="ieee")
        a -= removed
        if STOCHASTIC:
            rounded = codec.round_stochastic(a, _random_bits(key, place), P)
        else:
            if P == tl.float16:
                a = tl.clamp(a, -codec.MAX_FLOAT16, codec.MAX_FLOAT16)
            rounded = a.to(P)
        tl.store(theta_ptr + place, rounded, mask=inside)
        start += SPAN


@triton.jit
def low_rank_kernel(
    table_ptr,
    P: tl.constexpr, UNIT: tl.constexpr, RANK: tl.constexpr, SPAN: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """σ_j ← max(σ_j - τ, 0) of each matrix of the table, int64 [matrices, Column]; where τ is 0, nothing is touched.

    Both sides of each matrix are multiples of UNIT, and so are the addresses in elements.
    """
    entry_ptr = table_ptr + tl.program_id(0) * _ROW
    threshold = tl.load(entry_ptr + THRESHOLD).to(tl.int32).to(tl.float32, bitcast=True)
    rate = tl.load(entry_ptr + RATE)
    if rate != 0:
        threshold = tl.load(rate.to(tl.pointer_type(tl.float32))) * threshold
    if threshold > 0:
        tau = threshold.to(tl.float64)
        theta_ptr = tl.multiple_of(
            tl.load(entry_ptr + THETA).to(tl.pointer_type(P)), UNIT * (P.primitive_bitwidth // 8)
        )
        rows, cols = tl.load(entry_ptr + ROWS).to(tl.int32), tl.load(entry_ptr + COLS).to(tl.int32)
        key = tl.load(entry_ptr + KEY).to(tl.uint32)
        short = tl.multiple_of(tl.minimum(rows, cols), UNIT)
        long = tl.multiple_of(tl.maximum(rows, cols), UNIT)
        if rows > cols:
            gram = _gram(theta_ptr, short, long, True, RANK, SPAN)
        else:
            gram = _gram(theta_ptr, short, long, False, RANK, SPAN)
        values, vectors = _eigen(gram, short, RANK)
        sigma = tl.sqrt(tl.maximum(values, 0.0))
        removed = tl.where(sigma > tau, tau / tl.where(sigma > tau, sigma, 1.0), 1.0)
        shrink = tl.dot(tl.trans(vectors * tl.expand_dims(removed, 1)), vectors, out_dtype=tl.float64).to(tl.float32)
        # A matrix with a NaN or an infinity has no singular values, and stays as it is.
        if tl.sum(tl.abs(values), 0) < float("inf"):
            if rows > cols:
                _subtract(theta_ptr, shrink, key, short, long, P, True, RANK, SPAN, STOCHASTIC)
            else:
                _subtract(theta_ptr, shrink, key, short, long, P, False, RANK, SPAN, STOCHASTIC)


TILES = {16: (64, 4), 32: (64, 4), 64: (32, 8)}
"""By RANK: SPAN and the number of warps. Others differ by 10 % at most (benchmarks/NOTES.md); 64 is not measured."""


def takes(member: Member, spec: Spec) -> bool:
    """Whether the kernel works on this matrix of a bucket; the others are left to `low_rank.shrink_ranks`."""
    theta = member.theta
    return not spec.switches.ECC and 0 < min(theta.shape) <= MAX_RANK and theta.numel() < MAX_ELEMENTS


class Matrices:
    """The LoRA matrices of a bucket: what a launch of step 9 says of them, but for what each step brings."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.rows = np.array(bucket.rank_rows, dtype=np.int64)
        """Of these matrices in the bucket."""
        members = [bucket.members[row] for row in bucket.rank_rows]
        self.table = np.array([_entry(m) for m in members], dtype=np.int64).reshape(-1, len(Column))
        self.keys = np.array([q.mix_in(m.key, q.RANK_STREAM) for m in members], np.uint64)
        self.sources = np.array([m.source for m in members], dtype=np.int64)
        ranks = [rank_class(m.theta) if takes(m, bucket.spec) else 0 for m in members]
        self.ranks = np.array(ranks, dtype=np.int64)
        """The RANK that each needs; 0 for those that are not the kernel's."""
        self.left = bool((self.ranks == 0).any())
        """Whether there are such."""
        self.unit = 128 // bucket.spec.switches.P.primitive_bitwidth

    def shrink(self, sources: list[dict[str, Any]]) -> None:
        """Step 9 of the matrices that are due, without waiting: an upload and a launch for each RANK.

        Args:
            sources: the effective options by `Member.source`.
        """
        if self.bucket.step % low_rank.LOW_RANK_EVERY:
            return
        steps = self.bucket.steps[self.rows]
        due = (steps > 0) & (steps % low_rank.LOW_RANK_EVERY == 0)
        if due.any():
            due &= np.array([options["lora_rank_penalty"] for options in sources])[self.sources]
            for rank in np.unique(self.ranks[due & (self.ranks > 0)]):
                self._launch(int(rank), due & (self.ranks == rank), steps, sources)

    def tasks(self, sources: list[dict[str, Any]]) -> list[low_rank.RankTask]:
        """What is left to `low_rank.shrink_ranks`, once the states count the step."""
        if not self.left:
            return []
        stepped = (self.ranks == 0) & (self.bucket.steps[self.rows] > 0)
        left = [self.bucket.members[row] for row in self.rows[stepped]]
        found = (low_rank.rank_tasks(m.theta, m.state, sources[m.source], m.key, m.is_lora, m.rate) for m in left)
        return [task for tasks in found for task in tasks]

    def _launch(self, rank: int, chosen: np.ndarray, steps: np.ndarray, sources: list[dict[str, Any]]) -> None:
        host = self.table[chosen]
        # in float32, as the reference rounds it
        thresholds = np.array([low_rank.rank_threshold(options) for options in sources], dtype=np.float32)
        host[:, Column.THRESHOLD] = thresholds[self.sources[chosen]].view(np.int32)
        host[:, Column.KEY] = q.mix_in(self.keys[chosen], steps[chosen].astype(np.uint64))
        self.start(rank, upload(host, self.bucket.spec.device), self.are_aligned(chosen))

    def are_aligned(self, chosen: np.ndarray) -> bool:
        """Whether these matrices begin, and their rows, at multiples of 16 bytes."""
        table = self.table[chosen]
        return not (table[:, [Column.ROWS, Column.COLS]] % self.unit).any() and not (table[:, Column.THETA] % 16).any()

    def start(self, rank: int, table: Tensor, aligned: bool) -> None:
        """Launch step 9 over a table on the device, int64 [matrices, Column], all of the same RANK."""
        spec = self.bucket.spec
        span, warps = TILES[rank]
        arguments = {
            "table_ptr": table,
            "P": spec.switches.P,
            "UNIT": self.unit if aligned else 1,
            "RANK": rank,
            "SPAN": span,
            "STOCHASTIC": spec.switches.STOCHASTIC,
        }
        compiled = _compiled(*list(arguments.values())[1:])
        compiled.launch(low_rank_kernel, len(table), arguments, num_warps=warps)


@functools.cache
def _compiled(*constants: Any) -> Compiled:
    """Of these; all matrices with the same have it."""
    return Compiled()


def rank_class(theta: Tensor) -> int:
    return max(16, triton.next_power_of_2(min(theta.shape)))


def _entry(member: Member) -> list[int]:
    theta, row = member.theta, [0] * len(Column)
    row[Column.THETA], row[Column.ROWS], row[Column.COLS] = theta.data_ptr(), *theta.shape
    row[Column.RATE] = 0 if member.rate is None else member.rate.data_ptr()
    return row
