"""The moments m, v and r of one parameter, whichever way they are kept: what the rule reads, updates and writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from automagic_bnb import quantization as q
from automagic_bnb import state as st
from automagic_bnb.factored import Tiling

if TYPE_CHECKING:
    from automagic_bnb.reference import Blocks, Scalars

FACTORED_NAMES = {2: "exp_avg_sq", 3: "exp_avg_res"}
"""v and r, whose row and column means are kept under these names with `_row` and `_col` behind."""


class Moments:
    """Moments kept element by element, as float32 or as 8-bit codes.

    Args:
        keep: bool [blocks, 256], the elements that are not skipped.
    """

    def __init__(self, state: st.State, blocks: Blocks, keep: Tensor) -> None:
        self.state, self.blocks, self.keep = state, blocks, keep
        self.new: dict[int, Tensor] = {}

    def read(self, number: int) -> Tensor:
        """Moment 1 (m), 2 (v) or 3 (r), float32 [blocks, 256], 0 behind the end."""
        values = self.blocks.cut(self.state[f"state{number}"])
        if values.dtype != torch.uint8:
            return values
        book = self.state["qmap1" if number == 1 else "qmap2"]
        return self.blocks.cut(self.blocks.join(q.decode(values, self.state[f"absmax{number}"], book)))

    def write(self, number: int, values: Tensor, uniform: Tensor | None) -> None:
        """Store a moment, [blocks, 256]: codes to nearest, or stochastically where `uniform` is given."""
        target = self.state[f"state{number}"]
        if target.dtype != torch.uint8:
            target.view(-1).copy_(self.blocks.join(values))
            return
        codes, absmax = q.encode(values, self.state["qmap1" if number == 1 else "qmap2"], uniform)
        # A block in which every gradient was skipped keeps its very codes.
        changed = self.keep.any(dim=1, keepdim=True)
        codes = torch.where(changed, codes, self.blocks.cut(target))
        target.view(-1).copy_(self.blocks.join(codes))
        held = self.state[f"absmax{number}"]
        held.copy_(torch.where(changed[:, 0], absmax, held))

    def second(self, x: Tensor, s: Scalars, eps: float) -> Tensor:
        """v ← β2 v + (1 - β2)(x + eps1) and its bias-corrected value, [blocks, 256]; x = g̃²."""
        return self._ema(2, x + eps, s.beta2) / s.correction2

    def residual(self, x: Tensor, s: Scalars, eps: float) -> Tensor:
        """r ← β3 r + (1 - β3)(x + eps2) and its bias-corrected value; x = (u - m)²."""
        return self._ema(3, x + eps, s.beta3) / s.correction3

    def _ema(self, number: int, x: Tensor, beta: float) -> Tensor:
        old = self.read(number)
        new = torch.where(self.keep, beta * old + (1 - beta) * x, old)
        self.new[number] = new
        return new

    def store(self, m: Tensor, uniform: Tensor) -> None:
        """m to nearest, v and r stochastically where they are codes."""
        self.write(1, m, None)
        for number, values in self.new.items():
            self.write(number, values, uniform)


class FactoredMoments(Moments):
    """v and r as row and column means of tiles; m as codes.

    An element's v is the tile's estimate, moved by the element's own square; what is kept is the means of that. The
    means move by the squares' means directly, which is the same where a tile is whole, and holds them between old and
    new where the parameter's end cuts a tile.
    """

    def __init__(self, state: st.State, blocks: Blocks, keep: Tensor) -> None:
        super().__init__(state, blocks, keep)
        self.tiling = Tiling.of(state["state1"])

    def _kept(self, number: int) -> tuple[Tensor, Tensor] | None:
        """Row and column means, where this moment is factored."""
        name = FACTORED_NAMES.get(number, "")
        return (self.state[f"{name}_row"], self.state[f"{name}_col"]) if f"{name}_row" in self.state else None

    def read(self, number: int) -> Tensor:
        kept = self._kept(number)
        return super().read(number) if kept is None else self._inside(self.tiling.expand(*kept))

    def write(self, number: int, values: Tensor, uniform: Tensor | None) -> None:
        """Factored moments have been written by `_ema`, unless this is a conversion from another storage."""
        kept = self._kept(number)
        if kept is None:
            super().write(number, values, uniform)
        else:
            kept[0].copy_(self.tiling.row_means(values))
            kept[1].copy_(self.tiling.column_means(values))

    def _ema(self, number: int, x: Tensor, beta: float) -> Tensor:
        kept = self._kept(number)
        assert kept is not None, "v and r of factored storage"
        row, col = kept
        old, tiling = self.read(number), self.tiling
        # A skipped element stands in with its own estimate, which leaves the means where they are.
        seen = self._inside(torch.where(self.keep, x, old))
        touched_rows = tiling.row_means(self.keep.float()) > 0
        touched_tiles = (tiling.column_means(self.keep.float()) > 0).any(dim=1, keepdim=True)
        row.copy_(torch.where(touched_rows, beta * row + (1 - beta) * tiling.row_means(seen), row))
        col.copy_(torch.where(touched_tiles, beta * col + (1 - beta) * tiling.column_means(seen), col))
        return torch.where(self.keep, beta * old + (1 - beta) * x, old)

    def _inside(self, x: Tensor) -> Tensor:
        """0 behind the end."""
        return self.blocks.cut(self.blocks.join(x))


def moments_of(state: st.State, blocks: Blocks, keep: Tensor) -> Moments:
    """The moments of a parameter as its state keeps them."""
    kind = FactoredMoments if st.storage_held(state) == "factored" else Moments
    return kind(state, blocks, keep)
