"""How what a parameter's state holds is read and written block by block: moments, mask, weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from automagic_bnb import quantization as q
from automagic_bnb import state as st
from automagic_bnb.factored import Tiling
from automagic_bnb.scalars import Scalars


class Blocks:
    """A parameter cut into blocks: conversion, and sums over the real elements of each."""

    def __init__(self, p: Tensor) -> None:
        self.n = p.numel()
        self.blocks = st.block_count(p)
        self.padding = self.blocks * q.BLOCK - self.n
        counts = torch.full((self.blocks, 1), float(q.BLOCK), dtype=torch.float32, device=p.device)
        if self.padding:
            counts[-1] -= self.padding
        self.counts = counts

    def cut(self, x: Tensor) -> Tensor:
        """[blocks, 256] in x's dtype, zeros behind the end."""
        flat = x.reshape(-1)
        if self.padding:
            flat = torch.nn.functional.pad(flat, (0, self.padding))
        return flat.view(self.blocks, q.BLOCK)

    def join(self, x: Tensor) -> Tensor:
        """The flat [n] tensor of blocks."""
        return x.reshape(-1)[: self.n]

    def mean(self, x: Tensor) -> Tensor:
        """Per block, [blocks, 1]; x must be 0 behind the end."""
        return x.sum(dim=1, keepdim=True) / self.counts


# --- moments ----------------------------------------------------------------------------------------------------------

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


# --- mask and weights -------------------------------------------------------------------------------------------------


def read_mask(state: st.State, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """k float32 and π uint8 (see `quantization.pack_mask`), [blocks, 256]."""
    packed = blocks.cut(state["lr_mask"])
    if packed.dtype == torch.uint8:
        return q.unpack_mask(packed)
    return packed, blocks.cut(state["last_polarity"])


def write_mask(state: st.State, blocks: Blocks, k: Tensor, polarity: Tensor) -> None:
    """Store k, float32 and in 8-bit storage whole, and π, uint8; each [blocks, 256]."""
    if state["lr_mask"].dtype == torch.uint8:
        state["lr_mask"].view(-1).copy_(blocks.join(q.pack_mask(k, polarity)))
    else:
        state["lr_mask"].view(-1).copy_(blocks.join(k))
        state["last_polarity"].view(-1).copy_(blocks.join(polarity))


@dataclass(frozen=True)
class Weights:
    """θ of one parameter as it is stored: in its dtype, and with master="ecc8" 8 more bits in `residual`."""

    p: Tensor
    residual: Tensor | None
    stochastic: bool

    def read(self) -> Tensor:
        """float32, shaped like p."""
        p = self.p.detach()
        return p.float() if self.residual is None else q.join_master(p, self.residual)

    def write(self, values: Tensor, bits: Tensor | None, keep: Tensor | None = None) -> None:
        """Store float32 values, rounded by 16 random bits each; where not `keep`, all stays as it is.

        The arguments have as many elements as p, in its order.
        """
        bits = bits if self.stochastic else None
        if self.residual is None:
            rounded = [q.round_to(values, self.p.dtype, None if bits is None else q.uniform(bits))]
        else:
            rounded = list(q.split_master(values, bits))
        for tensor, new in zip((self.p.detach(), self.residual), rounded, strict=False):
            assert tensor is not None
            new = new.reshape(tensor.shape)  # whose elements may lie in any order: `p` may be a transposed view
            tensor.copy_(new if keep is None else torch.where(keep.reshape(tensor.shape), new, tensor))
