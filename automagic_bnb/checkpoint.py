"""Reading a checkpoint: everything is checked before anything is replaced."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from automagic_bnb import config
from automagic_bnb import state as st

if TYPE_CHECKING:
    from automagic_bnb.optimizer import Automagic

WRAPPED = "__bnb_optimizer_quant_state__"
"""bitsandbytes moves block-wise tensors under this key, so that FSDP does not gather them."""
IGNORED = frozenset(["unorm_vec", "max1", "max2", "new_max1", "new_max2"])
"""Keys of bitsandbytes' checkpoints that have no counterpart here."""


def parse(optimizer: Automagic, state_dict: dict[str, Any]) -> tuple[dict[Tensor, st.State], list[dict[str, Any]]]:
    """The new state by parameter and the new group entries, as copies on the parameters' devices.

    Raises:
        ValueError: the checkpoint does not fit this optimizer.
    """
    saved_groups = state_dict["param_groups"]
    groups = optimizer.param_groups
    sizes, saved_sizes = [len(g["params"]) for g in groups], [len(g["params"]) for g in saved_groups]
    if sizes != saved_sizes:
        raise ValueError(
            f"the checkpoint has parameter groups of {saved_sizes} parameters, this optimizer of {sizes}; "
            "build it over the same parameters in the same groups"
        )
    old_ids = chain.from_iterable(g["params"] for g in saved_groups)
    owners = [(p, g) for g in groups for p in g["params"]]
    by_id = dict(zip(old_ids, owners, strict=True))
    new_groups = [_parse_group(g, i) for i, g in enumerate(saved_groups)]
    state: dict[Tensor, st.State] = {}
    for key, saved in state_dict["state"].items():
        if key in by_id and saved:
            p, group = by_id[key]
            state[p] = _parse_parameter(optimizer, p, group, saved, f"parameter {key}")
    return state, new_groups


def _parse_group(saved: dict[str, Any], index: int) -> dict[str, Any]:
    entries = {}
    for name, value in saved.items():
        if name == "params":
            continue
        if name in config.GROUP_OPTIONS and not (name == "eps" and not isinstance(value, (tuple, list))):
            value = config.check_option(name, value, f" in the checkpoint's group {index}")
        elif isinstance(value, Tensor):
            value = value.detach().clone()
        entries[name] = value
    return entries


def _parse_parameter(
    optimizer: Automagic, p: Tensor, group: dict[str, Any], saved: dict[str, Any], where: str
) -> st.State:
    from automagic_bnb.optimizer import local_tensor

    saved = {**saved, **saved.get(WRAPPED, {})}
    saved.pop(WRAPPED, None)
    local = local_tensor(p)
    unknown = sorted(k for k in saved if k not in st.TENSOR_KEYS and k != "step" and k not in IGNORED)
    if unknown or "state1" not in saved:
        raise ValueError(
            f"{where}: this is a checkpoint of another optimizer (its state holds {sorted(saved)}); "
            "start without it, or load one that this optimizer or a bitsandbytes Adam wrote"
        )
    state: st.State = {"step": int(saved.get("step", 0))}
    for name, value in saved.items():
        if name not in st.TENSOR_KEYS or name.startswith("qmap"):
            continue
        expected = st.expected_shape(name, local)
        if tuple(value.shape) != expected:
            raise ValueError(
                f"{where}: the checkpoint's {name} has shape {tuple(value.shape)}, "
                f"a parameter of shape {tuple(local.shape)} needs {expected}"
            )
        state[name] = _restored(name, value, local, optimizer.is_paged)
    _check_storage(state, where)
    return st.complete(state, local, st.storage_held(state), optimizer.effective_options(group, p), optimizer.is_paged)


def _restored(name: str, value: Tensor, p: Tensor, paged: bool) -> Tensor:
    if name in st.ELEMENT_KEYS:
        return st.empty_element_state(p, value.dtype, paged).copy_(value)
    return value.detach().to(p.device, copy=True)


def _check_storage(state: st.State, where: str) -> None:
    for number in (1, 2, 3):
        held = state.get(f"state{number}")
        if held is None:
            continue
        if held.dtype not in (torch.uint8, torch.float32):
            raise ValueError(f"{where}: the checkpoint's state{number} is {held.dtype}; expected uint8 or float32")
        if held.dtype == torch.uint8 and f"absmax{number}" not in state:
            raise ValueError(f"{where}: the checkpoint's state{number} is in 8 bits but absmax{number} is missing")
