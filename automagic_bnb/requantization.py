"""Changing how states are stored while training runs: what has been learned is converted, nothing starts over.

From 32 to 8 bits everything goes to the nearest code; from 8 to 32 bits nothing is lost, and back again every code and
every mask byte is what it was. (Not so of a block that no gradient has reached, whose codes all mean 0, and of one with
the code of 1, which bitsandbytes and version 0.2.0 write: its values move by up to half a gap.) To factored storage v
and r become the row and column means of their tiles, which is a loss. What two storages hold in the same form does not
change: m and the mask between 8-bit and factored storage. A mask in four bits takes the nearest of its eight exponents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from automagic_bnb import bnb, config, sharded
from automagic_bnb import quantization as q
from automagic_bnb import state as st
from automagic_bnb.groups import ParameterGroups
from automagic_bnb.notices import warn_once
from automagic_bnb.stored import (
    FACTORED_NAMES,
    Blocks,
    has_mask,
    mask_spacing,
    moments_of,
    read_mask,
    to_spacing,
    write_mask,
)


@torch.no_grad()
def requantize(
    optimizer: ParameterGroups, parameters: Tensor | Iterable[Tensor] | None = None, **options: bool | int | None
) -> None:
    """`Automagic.requantize`, which says what the arguments mean."""
    changes = _checked(optimizer, options)
    owners = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    optimizer.adopt_overrides()
    if parameters is None:
        set_for_all(optimizer, changes)
    else:
        owners = _chosen(owners, parameters)
        _override(optimizer, [p for _, p in owners], changes)
    for group, p in owners:
        state = optimizer.state.get(p, {})
        if "state1" in state:
            effective, shard = optimizer.effective_options(group, p), sharded.shard_of(p)
            storage = st.storage_of(
                st.local_tensor(p) if shard is None else p, effective, optimizer.facts_of(p).is_embedding
            )
            # One assignment at the end: an error in between leaves the parameter all in its old storage.
            new = converted(state, sharded.stepped(p), storage, effective, optimizer.is_paged)
            if shard is not None and any(new.get(name) is not state.get(name) for name in ("lr_mask", "lr_mask4")):
                _agree_on_mask_mean(state, new, shard)
            optimizer.state[p] = st.WatchedState(new)
    optimizer.say_idle(changes, owners, " of requantize")


def _checked(optimizer: ParameterGroups, options: dict[str, Any]) -> dict[str, Any]:
    """The options given, as they are stored.

    Raises:
        TypeError, ValueError: an illegal value, or values that contradict each other.
    """
    given = {name: value for name, value in options.items() if value is not None}
    changes = {name: config.check_parameter_option(name, value, " of requantize") for name, value in given.items()}
    if changes.get("force_8bit"):
        for group in optimizer.param_groups:
            config.check_storage({**group, **changes}, " of requantize")
    if changes.get("optim_bits") == 8 and not bnb.BITSANDBYTES_AVAILABLE:
        warn_once(bnb.MISSING_WARNING)
    return changes


def _without_force(changes: dict[str, Any]) -> dict[str, Any]:
    """The changes, and with 32 bits the end of what stands against them."""
    return {**changes, "force_8bit": False} if changes.get("optim_bits") == 32 else changes


def set_for_all(optimizer: ParameterGroups, changes: dict[str, Any]) -> None:
    """Put the options where states made later, groups added later and checkpoints take them from."""
    changes = _without_force(changes)
    for name, value in changes.items():
        setattr(optimizer.config, name, value)
    optimizer.defaults.update(changes)
    for group in optimizer.param_groups:
        group.update(changes)


def _chosen(
    owners: list[tuple[dict[str, Any], Tensor]], parameters: Tensor | Iterable[Tensor]
) -> list[tuple[dict[str, Any], Tensor]]:
    """The given parameters with their groups.

    Raises:
        TypeError: something else than a tensor among them.
        ValueError: a tensor that is no parameter of this optimizer.
    """
    groups = {id(p): group for group, p in owners}
    several = isinstance(parameters, Iterable) and not isinstance(parameters, Tensor)
    chosen: list[Any] = list(parameters) if several else [parameters]
    for p in chosen:
        if not isinstance(p, Tensor):
            raise TypeError(
                f"requantize takes parameters of this optimizer, not {p!r} ({type(p).__name__}); "
                "options go by name, as in optim_bits=8"
            )
        if id(p) not in groups:
            raise ValueError(
                f"requantize was given a tensor of shape {tuple(p.shape)} that is no parameter of this optimizer; "
                "take it from optimizer.param_groups, or leave the argument out to convert all"
            )
    return [(groups[id(p)], p) for p in chosen]


def _override(optimizer: ParameterGroups, parameters: list[Tensor], changes: dict[str, Any]) -> None:
    if changes:
        for p in parameters:
            optimizer._overrides[p] = {**optimizer._overrides.get(p, {}), **_without_force(changes)}


# --- one parameter ----------------------------------------------------------------------------------------------------


def converted(state: st.State, p: Tensor, storage: str, options: dict[str, Any], paged: bool = False) -> st.State:
    """The state of a (local) parameter in another storage, as a new dict; what needs no conversion is not copied.

    Args:
        state: holds at least `state1`; it is not changed.
        storage: one of `state.STORAGES`.
        options: the parameter's effective options, with the form that mask and means shall have.
        paged: put the large new tensors into paged memory (CUDA only).
    """
    came = bool({"state3", "exp_avg_res_row"} & state.keys())
    options = {**options, "came": came}
    makers = {k: make for k, make in st.recipes(p, storage, options, paged).items() if k in st.CONVERTED_KEYS}
    alike = {k for k in makers.keys() & state.keys() if state[k].dtype == st.dtype_of(k, p, storage, options)}
    if st.storage_held(state) == storage and alike == makers.keys() == st.CONVERTED_KEYS & state.keys():
        return state
    # What both storages hold alike stays the same tensor.
    new = {k: v for k, v in state.items() if k not in st.CONVERTED_KEYS or k in alike}
    new |= {name: make() for name, make in makers.items() if name not in alike}
    made = makers.keys() - alike
    for name in made & state.keys() & st.keys_of("row", "col"):  # the same means in more bits, or in fewer
        new[name].copy_(state[name])
        made = made - {name}
    numbers = [number for number in (1, 2, 3) if _name(number, storage) in made]
    remasked = bool({"lr_mask", "lr_mask4"} & made)
    factored = bool({st.storage_held(state), storage} & st.FACTORED)
    rounded = [_convert(part, numbers, remasked) for part in _parts(p, state, new, factored)]
    if has_mask(state) and not has_mask(new):
        new["tensor_stats"] = _with_mask_mean(state, torch.ones((), device=p.device))
    elif remasked and mask_spacing(new) and rounded:
        changed, total = torch.stack(rounded).sum(dim=0)
        # W follows the rounded mask, so that the mean rate stays what it was. An unrounded mask keeps W to the bit.
        held = state["tensor_stats"][st.MASK_MEAN].double()
        new["tensor_stats"] = _with_mask_mean(state, torch.where(changed > 0, total / p.numel(), held))
    return new


def _agree_on_mask_mean(old: st.State, new: st.State, shard: sharded.Shard) -> None:
    """W of a shard whose mask has been converted, as in `converted`, but of all processes' rows. Collective."""
    held = old["tensor_stats"][st.MASK_MEAN].double()
    sums = torch.zeros(2, dtype=torch.float64, device=held.device)
    if shard.window:
        blocks, own = Blocks(new["state1"]), shard.mask_of_own(held.device)
        before, after = (read_mask(state, blocks)[0] for state in (old, new))
        sums[0] = (own & (before != after)).sum()
        sums[1] = torch.where(own, torch.exp2(after / 16), 0.0).double().sum()
    changed, total = sharded.gathered(sums, shard).sum(dim=0)
    if has_mask(new):
        mean = total / shard.p.numel()
        new["tensor_stats"] = _with_mask_mean(old, torch.where(changed > 0, mean, held) if mask_spacing(new) else held)


def _name(number: int, storage: str) -> str:
    """The key that holds a moment: 1 (m), 2 (v) or 3 (r)."""
    return f"{FACTORED_NAMES[number]}_row" if number > 1 and storage in st.FACTORED else f"state{number}"


def _with_mask_mean(state: st.State, value: Tensor) -> Tensor:
    """A copy of `tensor_stats` with another W."""
    stats = state["tensor_stats"].clone()
    stats[st.MASK_MEAN] = value
    return stats


@dataclass(frozen=True)
class Part:
    """The same stretch of the old and the new state."""

    old: st.State
    new: st.State
    blocks: Blocks


def _parts(p: Tensor, old: st.State, new: st.State, factored: bool) -> Iterator[Part]:
    """A parameter cut into parts, with what is converted of its old and its new state."""
    old, new = ({k: v for k, v in state.items() if k in st.CONVERTED_KEYS} for state in (old, new))
    for start, stop in st.stretches(p, factored):
        before, after = (st.between(state, p, start, stop) for state in (old, new))
        yield Part(before, after, Blocks(before["state1"]))


def _convert(part: Part, numbers: list[int], remasked: bool) -> Tensor:
    """Write these moments, and if it changes the mask; returns what `_convert_mask` does."""
    keep = torch.ones(part.blocks.blocks, q.BLOCK, dtype=torch.bool, device=part.old["state1"].device)
    source, target = moments_of(part.old, part.blocks, keep), moments_of(part.new, part.blocks, keep)
    for number in numbers:
        target.write(number, source.read(number))
    return _convert_mask(part) if remasked else keep.new_zeros(2, dtype=torch.float64)


def _convert_mask(part: Part) -> Tensor:
    """Write k and π; returns how many k were rounded and Σ 2^(k/16) of the rounded ones, float64 [2]."""
    k, polarity = read_mask(part.old, part.blocks)
    whole = to_spacing(k, mask_spacing(part.new))
    write_mask(part.new, part.blocks, whole, polarity)
    return torch.stack([(whole != k).sum().double(), part.blocks.join(torch.exp2(whole / 16)).double().sum()])
