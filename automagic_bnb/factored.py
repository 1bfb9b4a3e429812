"""Second moments in fewer numbers: within a tile of a matrix, row means times column means.

Adafactor's factoring (Shazeer and Stern, arXiv 1804.04235), V_ij = row_i · col_j / mean, over tiles in place of the
whole matrix: finer, and a tile is the work of one program, so that nothing has to be gathered from others.

A matrix is the view (shape[0], n / shape[0]) with C columns. Its blocks of 256 elements lie over the same columns
again after lcm(C, 256) elements; up to `height` blocks that lie so, one below the other, are a tile. Where C divides
256 a block holds whole rows, and tiles have C columns, or 8 where C is below: two rows of a rank-4 matrix share a mean.
Elsewhere a tile has 256 columns, and one block is a row of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from automagic_bnb.quantization import BLOCK, FLOAT_TINY

LEAST_WIDTH = 8
"""Of a tile: as many elements lie in one thread of the kernels."""


def tile_height(width: int) -> int:
    """Blocks in a tile, at most: column means then cost at most 1/128 float an element, or a row's share."""
    return max(16, width // 2)


@dataclass(frozen=True)
class Tiling:
    """The tiles of one parameter; a tile's blocks are `strips` apart, and tile q starts with strip q % strips."""

    size: int
    """n, elements of the parameter."""
    width: int
    """Columns of a tile; as many elements share one entry of `row`."""
    strips: int

    @classmethod
    def of(cls, p: Tensor) -> Tiling:
        columns = p.numel() // max(p.shape[0], 1) if p.dim() else 1
        whole_rows = columns > 0 and BLOCK % columns == 0
        strips = min(math.lcm(columns, BLOCK) // BLOCK, -(-p.numel() // BLOCK))
        return cls(p.numel(), max(columns, LEAST_WIDTH) if whole_rows else BLOCK, max(strips, 1))

    @cached_property
    def blocks(self) -> int:
        return -(-self.size // BLOCK)

    @cached_property
    def rows(self) -> int:
        """Entries of `row`."""
        return -(-self.size // self.width)

    @cached_property
    def height(self) -> int:
        """Blocks of the tallest tile."""
        return max(1, min(tile_height(self.width), -(-self.blocks // self.strips)))

    @cached_property
    def tiles(self) -> int:
        return self.strips * -(-self.blocks // (self.strips * self.height))

    def by_tile(self, values: Tensor) -> Tensor:
        """[chunks, height, strips, rows of a block, width] of [blocks, 256], zeros where there is no block."""
        missing = self.tiles * self.height - self.blocks
        if missing:
            values = torch.nn.functional.pad(values, (0, 0, 0, missing))
        return values.view(-1, self.height, self.strips, BLOCK // self.width, self.width)

    def rows_by_tile(self, row: Tensor) -> Tensor:
        """`row` as it lies beside `by_tile`, [chunks, height, strips, rows of a block, 1]."""
        per_block = BLOCK // self.width
        row = torch.nn.functional.pad(row, (0, self.tiles * self.height * per_block - self.rows))
        return row.view(-1, self.height, self.strips, per_block, 1)

    def first_of(self, values: Tensor) -> Tensor:
        """[tiles, width], of [blocks, 256] the first elements of each tile's first block."""
        return self.by_tile(values)[:, 0, :, 0].reshape(self.tiles, self.width)

    def counts(self, device: torch.device) -> Tensor:
        """How many elements each column of each tile has, float32 [tiles, width]; a step asks six times."""
        if device not in self._counts:
            real = torch.arange(self.blocks * BLOCK, device=device).view(self.blocks, BLOCK) < self.size
            self._counts[device] = self.by_tile(real.float()).sum(dim=(1, 3)).view(self.tiles, self.width)
        return self._counts[device]

    @cached_property
    def _counts(self) -> dict[torch.device, Tensor]:
        return {}

    def row_means(self, values: Tensor) -> Tensor:
        """float32 [rows] of [blocks, 256] that are 0 behind the end."""
        sums = values.reshape(-1, self.width).sum(dim=1)[: self.rows]
        result = sums / self.width
        if rest := self.size % self.width:
            result[-1] = sums[-1] / rest
        return result

    def column_means(self, values: Tensor) -> Tensor:
        """float32 [tiles, width] of [blocks, 256] that are 0 behind the end; 0 where a column has no element."""
        sums = self.by_tile(values).sum(dim=(1, 3)).view(self.tiles, self.width)
        return sums / self.counts(values.device).clamp_min(1)

    def expand(self, row: Tensor, col: Tensor) -> Tensor:
        """V, float32 [blocks, 256]; what lies behind the end means nothing."""
        counts = self.counts(col.device)
        mean = (col * counts).sum(dim=1, keepdim=True) / counts.sum(dim=1, keepdim=True).clamp_min(1)
        share = (col / mean.clamp_min(FLOAT_TINY)).view(-1, 1, self.strips, 1, self.width)
        return (self.rows_by_tile(row) * share).view(-1, BLOCK)[: self.blocks]
