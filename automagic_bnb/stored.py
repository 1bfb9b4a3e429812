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
    """Moments kept element by element, as floats or as 8-bit codes.

    Args:
        keep: bool [blocks, 256], the elements that are not skipped.
        bits: int64 [blocks, 256], 16 random bits each, by which v and r are rounded; None: to nearest.
    """

    def __init__(self, state: st.State, blocks: Blocks, keep: Tensor, bits: Tensor | None) -> None:
        self.state, self.blocks, self.keep, self.bits = state, blocks, keep, bits
        self.new: dict[int, Tensor] = {}

    def read(self, number: int) -> Tensor:
        """Moment 1 (m), 2 (v) or 3 (r), float32 [blocks, 256], 0 behind the end."""
        values = self.blocks.cut(self.state[f"state{number}"])
        if values.dtype != torch.uint8:
            return values.float()
        book = self.state["qmap1" if number == 1 else "qmap2"]
        return self.blocks.cut(self.blocks.join(q.decode(values, self.state[f"absmax{number}"], book)))

    def write(self, number: int, values: Tensor) -> None:
        """Store a moment, [blocks, 256]: m to nearest, v and r stochastically where they are codes."""
        target = self.state[f"state{number}"]
        if target.dtype == torch.float16:
            values = q.round_to(values, target.dtype, None)
        if target.dtype != torch.uint8:
            target.view(-1).copy_(self.blocks.join(values))
            return
        uniform = None if number == 1 or self.bits is None else q.uniform(self.bits)
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

    def store(self, m: Tensor) -> None:
        """Store m, and what v and r have become."""
        self.write(1, m)
        for number, values in self.new.items():
            self.write(number, values)


class FactoredMoments(Moments):
    """v and r as row and column means of tiles; m as codes, or as float16.

    An element's v is the tile's estimate, moved by the element's own square; what is kept is the means of that. The
    means move by the squares' means directly, which is the same where a tile is whole, and holds them between old and
    new where the parameter's end cuts a tile. In 16 bits they are rounded stochastically, a row's by the bits of its
    first element, a column's by those of the tile's first block.
    """

    def __init__(self, state: st.State, blocks: Blocks, keep: Tensor, bits: Tensor | None) -> None:
        super().__init__(state, blocks, keep, bits)
        self.tiling = Tiling.of(state["state1"])

    def _kept(self, number: int) -> tuple[Tensor, Tensor] | None:
        """Row and column means, where this moment is factored."""
        name = FACTORED_NAMES.get(number, "")
        return (self.state[f"{name}_row"], self.state[f"{name}_col"]) if f"{name}_row" in self.state else None

    def read(self, number: int) -> Tensor:
        kept = self._kept(number)
        return super().read(number) if kept is None else self._inside(self.tiling.expand(*kept))

    def write(self, number: int, values: Tensor) -> None:
        """Store any moment; of v and r the means."""
        kept = self._kept(number)
        if kept is None:
            super().write(number, values)
        else:
            self._write_means(kept, self.tiling.row_means(values), self.tiling.column_means(values))

    def _write_means(self, kept: tuple[Tensor, Tensor], row: Tensor, col: Tensor) -> None:
        of_row = of_col = None
        if self.bits is not None:
            of_row = q.uniform(self.bits.reshape(-1, self.tiling.width)[: self.tiling.rows, 0])
            of_col = q.uniform(self.tiling.first_of(self.bits))
        kept[0].copy_(q.round_to(row, kept[0].dtype, of_row))
        kept[1].copy_(q.round_to(col, kept[1].dtype, of_col))

    def store(self, m: Tensor) -> None:
        """The means have been written by `_ema`."""
        self.write(1, m)

    def _ema(self, number: int, x: Tensor, beta: float) -> Tensor:
        kept = self._kept(number)
        assert kept is not None, "v and r of factored storage"
        (row, col), tiling, old = (x.float() for x in kept), self.tiling, self.read(number)
        # A skipped element stands in with its own estimate, which leaves the means where they are.
        seen = self._inside(torch.where(self.keep, x, old))
        touched_rows = tiling.row_means(self.keep.float()) > 0
        touched_tiles = (tiling.column_means(self.keep.float()) > 0).any(dim=1, keepdim=True)
        moved_row = torch.where(touched_rows, beta * row + (1 - beta) * tiling.row_means(seen), row)
        moved_col = torch.where(touched_tiles, beta * col + (1 - beta) * tiling.column_means(seen), col)
        self._write_means(kept, moved_row, moved_col)
        return torch.where(self.keep, beta * old + (1 - beta) * x, old)

    def _inside(self, x: Tensor) -> Tensor:
        """0 behind the end."""
        return self.blocks.cut(self.blocks.join(x))


def moments_of(state: st.State, blocks: Blocks, keep: Tensor, bits: Tensor | None = None) -> Moments:
    """The moments of a parameter as its state keeps them; arguments as of `Moments`."""
    kind = FactoredMoments if st.storage_held(state) in st.FACTORED else Moments
    return kind(state, blocks, keep, bits)


# --- mask and weights -------------------------------------------------------------------------------------------------


def mask_spacing(state: st.State) -> int:
    """What the exponents k of a mask are multiples of; 0 where they are any number, or there is no mask."""
    if "lr_mask4" in state:
        return q.PAIR_SPACING
    return int("lr_mask" in state and state["lr_mask"].dtype == torch.uint8)


def has_mask(state: st.State) -> bool:
    """Whether elements have rates of their own."""
    return "lr_mask" in state or "lr_mask4" in state


def highest_exponent(spacing: int) -> float:
    """The largest k of a mask of this `mask_spacing`."""
    return q.LEAST_EXPONENT + 7.0 * spacing if spacing == q.PAIR_SPACING else float(q.HIGHEST_EXPONENT)


def to_spacing(k: Tensor, spacing: int, uniform: Tensor | float = 0.5) -> Tensor:
    """k as a mask of this `mask_spacing` has it: by random numbers in (0, 1) without bias, or (0.5) to nearest."""
    k = k.clamp(q.LEAST_EXPONENT, highest_exponent(spacing))
    if not spacing:
        return k
    scaled = k / spacing
    whole = scaled.floor()
    return (whole + (scaled - whole + uniform >= 1)) * spacing


def read_mask(state: st.State, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """k float32 and π uint8 (see `quantization.pack_mask`), [blocks, 256]; where there is no mask, 0 and no sign."""
    if not has_mask(state):
        shape, device = (blocks.blocks, q.BLOCK), state["state1"].device
        no_sign = torch.full(shape, q.NO_SIGN, dtype=torch.uint8, device=device)
        return torch.zeros(shape, dtype=torch.float32, device=device), no_sign
    if "lr_mask4" in state:
        missing = blocks.blocks * q.BLOCK // 2 - len(state["lr_mask4"])
        return q.unpack_pairs(torch.nn.functional.pad(state["lr_mask4"], (0, missing)).view(-1, q.BLOCK // 2))
    packed = blocks.cut(state["lr_mask"])
    if packed.dtype == torch.uint8:
        return q.unpack_mask(packed)
    return packed, blocks.cut(state["last_polarity"])


def write_mask(state: st.State, blocks: Blocks, k: Tensor, polarity: Tensor) -> None:
    """Store k, float32 and as `to_spacing` leaves it, and π, uint8; each [blocks, 256]."""
    if "lr_mask4" in state:
        state["lr_mask4"].copy_(q.pack_pairs(k, polarity).view(-1)[: len(state["lr_mask4"])])
    elif state["lr_mask"].dtype == torch.uint8:
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
