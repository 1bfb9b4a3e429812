"""What `Automagic.get_memory_efficiency_report` returns: the bytes of optimizer state, held or still to be allocated.

Tensors that exist are counted as they are. Those still to come are made by `state.recipes`, which makes them for a
step too, but on torch's meta device, where tensors have shapes and dtypes and no memory. So a plan cannot differ from
what a step then holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from automagic_bnb import bnb, paged, sharded
from automagic_bnb import state as st
from automagic_bnb.groups import ParameterGroups

MB = 10**6
ADAM_BYTES = 8
"""What 32-bit Adam holds for a parameter: two float32 moments. Savings are counted against it."""


def efficiency_report(optimizer: ParameterGroups) -> dict[str, Any]:
    """The memory of an optimizer's state, as plain numbers; nothing is allocated and no device is waited for.

    A parameter that has been stepped counts with the tensors it holds, and those that options switched on since then
    will add. Any other counts with what its first step will allocate, unless it is frozen (`requires_grad=False`, no
    gradient, no state): then with nothing. Of a sharded parameter (DTensor) what lives here counts, with the state of
    others' rows that share a tile with the rows here.

    MB are 10^6 bytes. Not counted are the kernels' tables (about 0.3 KB a tensor) and a step's temporary memory.

    Returns:
        "bitsandbytes_available": whether it could be imported; without it everything is kept in 32 bits.
        "basis": "held", "planned", or "mixed" where some of the tensors exist and others do not yet.
        "total_parameters": elements of the parameters counted.
        "8bit_parameters", "32bit_parameters": how many of them have m in 8 bits, and how many have not.
        "factored_parameters": those among the 8-bit ones whose second moments are factored.
        "frozen_parameters": elements of the parameters not counted.
        "compression_ratio": share of the parameters in 8 bits, 0 to 1; 0 where there are no parameters.
        "total_bytes": of state, held and planned.
        "held_bytes", "planned_bytes": its two parts.
        "paged_bytes": how much of `total_bytes` is managed memory, which the driver may move to the host.
        "bytes_per_parameter": `total_bytes` over `total_parameters`; 0 where there are none.
        "percent_of_32bit_adam": the same in percent of Adam's 8 bytes.
        "memory_saved_mb": against 32-bit Adam; below 0 where this takes more.
        "states_breakdown": bytes by state, `total_bytes` in sum: "exp_avg" (m), "exp_avg_sq" (v) and "exp_avg_res" (r),
            each with its absmax or as row and column means; "lr_mask" and the other keys of `state`; "code_books", the
            two of them that all parameters of a device share, counted once.
    """
    parameters = memory_by_parameter(optimizer)
    counted = [m for m in parameters if not m.is_frozen]
    pieces = [piece for m in counted for piece in m.pieces] + code_books(counted)
    elements = {storage: elements_in(counted, storage) for storage in st.STORAGES}
    total = sum(elements.values())
    held, planned = (sum(x.bytes for x in pieces if x.exists is there) for there in (True, False))
    per_parameter = (held + planned) / total if total else 0.0
    return {
        "bitsandbytes_available": bnb.BITSANDBYTES_AVAILABLE,
        "basis": "mixed" if held and planned else "held" if held else "planned",
        "total_parameters": total,
        "8bit_parameters": elements["8bit"] + elements["factored"],
        "32bit_parameters": total - elements["8bit"] - elements["factored"],
        "factored_parameters": elements["factored"],
        "frozen_parameters": sum(m.elements for m in parameters if m.is_frozen),
        "compression_ratio": share_in_8bit(counted),
        "total_bytes": held + planned,
        "held_bytes": held,
        "planned_bytes": planned,
        "paged_bytes": sum(x.bytes for x in pieces if x.paged),
        "bytes_per_parameter": per_parameter,
        "percent_of_32bit_adam": 100 * per_parameter / ADAM_BYTES,
        "memory_saved_mb": (ADAM_BYTES * total - held - planned) / MB,
        "states_breakdown": bytes_by_state(pieces),
    }


@dataclass(frozen=True)
class Piece:
    """One tensor of the state."""

    key: str
    bytes: int
    exists: bool
    """False: the next step will make it."""
    paged: bool = False
    identity: int = 0
    """Equal for tensors that are one and the same; 0 for one that does not exist."""


@dataclass(frozen=True)
class ParameterMemory:
    """The state of one parameter, held and planned."""

    p: Tensor
    """Of a sharded parameter, what lives here."""
    sized: Tensor
    """By whose size its storage is chosen: the whole parameter, or p."""
    group: dict[str, Any]
    options: dict[str, Any]
    """In force for it: the group's, under its override."""
    is_embedding: bool
    probe_stride: int
    storage: str
    """One of `state.STORAGES`: as it is held, else as it will be."""
    is_frozen: bool
    """It has no state and will get none."""
    pieces: list[Piece]
    """All but the code books."""
    books: list[Piece]

    @property
    def elements(self) -> int:
        return self.p.numel()

    @property
    def has_state(self) -> bool:
        return any(piece.exists for piece in self.pieces)


def memory_by_parameter(optimizer: ParameterGroups) -> list[ParameterMemory]:
    """All parameters of the optimizer, group by group."""
    owners = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    if not optimizer.initialized:  # the first step, too, begins with it
        bnb.adopt_module_overrides({id(p) for _, p in owners})
    return [_memory_of(optimizer, group, p) for group, p in owners]


def _memory_of(optimizer: ParameterGroups, group: dict[str, Any], p: Tensor) -> ParameterMemory:
    options, local = optimizer.effective_options(group, p), st.local_tensor(p)
    sized = local if sharded.shard_of(p) is None else p
    state = {key: value for key, value in optimizer.state.get(p, {}).items() if isinstance(value, Tensor)}
    facts = optimizer.facts_of(p)
    storage = st.storage_held(state) if "state1" in state else st.storage_of(sized, options, facts.is_embedding)
    pieces = [Piece(key, x.nbytes, True, paged.is_paged(x), id(x)) for key, x in state.items()]
    gets_steps = p.requires_grad or p.grad is not None
    if gets_steps:
        pieces += planned(state, sharded.stepped(p), storage, options, optimizer.is_paged, facts.probe_stride)
    return ParameterMemory(
        p=local,
        sized=sized,
        group=group,
        options=options,
        is_embedding=facts.is_embedding,
        probe_stride=facts.probe_stride,
        storage=storage,
        is_frozen=not (gets_steps or state),
        pieces=[piece for piece in pieces if not piece.key.startswith("qmap")],
        books=[piece for piece in pieces if piece.key.startswith("qmap")],
    )


def planned(
    state: st.State, p: Tensor, storage: str, options: dict[str, Any], is_paged: bool, stride: int
) -> list[Piece]:
    """What `state.complete` would add; nothing is allocated for it."""
    shape_only = torch.empty(p.shape, dtype=p.dtype, device="meta")
    large = st.pages(p, is_paged)
    return [
        Piece(key, make().nbytes, exists=False, paged=large and key in st.ELEMENT_KEYS)
        for key, make in st.recipes(shape_only, storage, st.as_held(state, options), stride=stride).items()
        if key not in state
    ]


def bytes_by_state(pieces: Iterable[Piece]) -> dict[str, int]:
    """Under the names that `state.KEYS` has for the report; what is not in it under its own."""
    sizes: dict[str, int] = {}
    for piece in pieces:
        name = (st.KEYS[piece.key].report if piece.key in st.KEYS else "") or piece.key
        sizes[name] = sizes.get(name, 0) + piece.bytes
    return sizes


def code_books(parameters: Iterable[ParameterMemory]) -> list[Piece]:
    """Each tensor once: those that exist, and those of devices where none does yet."""
    books = [(m.p.device, piece) for m in parameters for piece in m.books]
    held = {piece.identity: piece for _, piece in books if piece.exists}
    there = {(device, piece.key) for device, piece in books if piece.exists}
    planned = {(device, piece.key): piece for device, piece in books if (device, piece.key) not in there}
    return [*held.values(), *planned.values()]


def elements_in(parameters: Iterable[ParameterMemory], *storages: str) -> int:
    return sum(m.elements for m in parameters if m.storage in storages)


def share_in_8bit(parameters: list[ParameterMemory]) -> float:
    """The share of elements in 8-bit or factored states; 0 where there are none."""
    total = sum(m.elements for m in parameters)
    return elements_in(parameters, *st.CODED) / total if total else 0.0


def share_with(optimizer: ParameterGroups, **options: Any) -> float:
    """`share_in_8bit` as it would be with these options in force for every parameter."""
    counted = [m for m in memory_by_parameter(optimizer) if not m.is_frozen]
    storages = [st.storage_of(m.sized, {**m.options, **options}, m.is_embedding) for m in counted]
    return share_in_8bit([replace(m, storage=storage) for m, storage in zip(counted, storages, strict=True)])


def quantized_share(optimizer: ParameterGroups) -> float:
    """The share of elements in 8-bit states, among those of groups that ask for 8 bits; 1 where there are none."""
    asked = [m for m in memory_by_parameter(optimizer) if m.group["optim_bits"] == 8 and m.has_state]
    return share_in_8bit(asked) if any(m.elements for m in asked) else 1.0
