"""Reading a checkpoint: everything is checked before anything is replaced."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from automagic_bnb import auto_lr, bnb, config, migration, sharded
from automagic_bnb import quantization as q
from automagic_bnb import state as st
from automagic_bnb.factored import Tiling
from automagic_bnb.groups import ParameterGroups
from automagic_bnb.migration import WRAPPED
from automagic_bnb.notices import warn_once
from automagic_bnb.stored import FACTORED_NAMES, Blocks

IGNORED = frozenset(["unorm_vec", "max1", "max2", "new_max1", "new_max2"])
"""Keys of bitsandbytes' checkpoints that have no counterpart here."""
STATS_OF_0_1_0 = 6
"""Version 0.1.0 kept the means of the row means too, second and third; what stood behind them has moved up."""
OWN_GROUP_KEYS = ("base_lr", "warmup_steps")
"""A saved group with neither is another optimizer's."""


SHARDED_WARNING = (
    "the state of a parameter that is sharded otherwise than by rows is this process's own part: save and load one "
    "file for each process. torch.distributed.checkpoint would keep the part of one process only"
)
PART_OF_0_2_0 = (
    "an earlier version saved each process's own part of it, with blocks of its own; go on with that version, or "
    "without the optimizer's state"
)


WRAPPERS = frozenset(["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
"""Parts of a parameter's name that say how a model is wrapped, not which parameter it is."""

_OR_NONE = {name for name in config.GROUP_OPTIONS if config.RULES[name].legal.endswith(", or None")}
NONE_ALLOWED = frozenset(_OR_NONE - {"lr", "auto_lr"})
"""Options that a group may have as None; of these two it has what None stood for."""
RATES = frozenset(["lr", "base_lr", "initial_lr", "auto_lr_rate", "auto_lr_given", "auto_lr_peak", "effective_lr"])
"""Numbers of a group that a schedule or a search has left there, each >= 0."""
COUNTS = frozenset(["auto_lr_count", "auto_lr_watched", "auto_lr_joined", "own_seed"])
SEARCHED: dict[str, tuple[int, ...]] = {"auto_lr_rate": (), "auto_lr_sums": (2,)}
"""What a search reads on its device, float32, with the shapes."""


def checked_form(state_dict: Any) -> dict[str, Any]:
    """A shallow copy of a checkpoint that has the form of one, whatever stands in it.

    Raises:
        ValueError: it has not.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        holds = sorted(map(str, state_dict))[:8] if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise ValueError(
            f"this is no optimizer's checkpoint: it holds {holds}, "
            "not state and param_groups; pass what optimizer.state_dict() returned"
        )
    states, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(states, Mapping) or not isinstance(groups, (list, tuple)):
        raise ValueError(
            f"the checkpoint's state is a {type(states).__name__} and its param_groups a {type(groups).__name__}; "
            "expected a dict by parameter and a list of dicts"
        )
    keys: list[Any] = []
    for index, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            raise ValueError(f"the checkpoint's group {index} is no dict with a list of params")
        keys += group["params"]
    if not all(isinstance(key, (int, str)) for key in keys) or len(set(keys)) != len(keys):
        raise ValueError("the params of the checkpoint's groups are no numbers or names that are each there once")
    for key, saved in states.items():
        for what, held in (("state", saved), (WRAPPED, saved.get(WRAPPED, {}) if isinstance(saved, Mapping) else {})):
            if key in keys and not isinstance(held, Mapping):
                raise ValueError(
                    f"parameter {key}: the checkpoint's {what} is a {type(held).__name__}; expected a dict"
                )
    return dict(state_dict)


def parse(
    optimizer: ParameterGroups, state_dict: dict[str, Any], move_to_device: bool = True
) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
    """The new state by parameter and the new group entries, as copies on the parameters' devices.

    Args:
        move_to_device: False leaves the tensors of a state where the checkpoint has them; those of another optimizer's
            checkpoint are converted, and so moved, in any case.

    Raises:
        ValueError: the checkpoint does not fit this optimizer.
    """
    state_dict = checked_form(state_dict)  # a hook may have made another one of it
    saved_groups = state_dict["param_groups"]
    groups = optimizer.param_groups
    sizes, saved_sizes = [len(g["params"]) for g in groups], [len(g["params"]) for g in saved_groups]
    if sizes != saved_sizes:
        raise ValueError(
            f"the checkpoint has parameter groups of {saved_sizes} parameters, this optimizer of {sizes}; "
            "build it over the same parameters in the same groups"
        )
    keys = [_keys_in_order(saved_groups[i], group, i) for i, group in enumerate(groups)]
    state = _beside_states(state_dict["state"], {key for of_group in keys for key in of_group})
    if (source := migration.source_of(state_dict)) is not None:
        foreign, new_groups = _parse_foreign(optimizer, state_dict, keys, source)
        return state | foreign, new_groups
    new_groups = [_parse_group(saved_groups[i], group, i) for i, group in enumerate(groups)]
    for group, of_group in zip(groups, keys, strict=True):
        for p, key in zip(group["params"], of_group, strict=True):
            if saved := state_dict["state"].get(key):
                state[p] = _parse_parameter(optimizer, p, group, saved, f"parameter {key}", move_to_device)
    return state, new_groups


def _keys_in_order(saved: Mapping[str, Any], group: dict[str, Any], index: int) -> list[Any]:
    """The keys of a saved group's parameters in the order of this group's: by name where both have names.

    Raises:
        ValueError: they are of other names.
    """
    keys, theirs, ours = list(saved["params"]), saved.get("param_names"), group.get("param_names")
    if not isinstance(theirs, (list, tuple)) or not ours or list(theirs) == list(ours):
        return keys
    theirs, ours = ([_bare_name(name) for name in names] for names in (theirs, ours))
    if sorted(theirs) != sorted(ours) or len(theirs) != len(keys):
        there, here = ([name for name in one if name not in other] for one, other in ((theirs, ours), (ours, theirs)))
        raise ValueError(
            f"the checkpoint's group {index} is of other parameters: only there are {there[:4]}, only here {here[:4]}; "
            "rename them in its param_names, or delete param_names from its groups to go by their order"
        )
    by_name = dict(zip(theirs, keys, strict=True))
    return [by_name[name] for name in ours] if len(by_name) == len(keys) else keys


def _bare_name(name: str) -> str:
    return ".".join(part for part in str(name).split(".") if part not in WRAPPERS)


def _beside_states(saved: Mapping[Any, Any], keys: set[Any]) -> dict[Any, Any]:
    """What is no parameter's state: plain values that a wrapper keeps beside these, as copies.

    Raises:
        ValueError: a state of a parameter that is in none of the groups.
    """
    beside = {key: value for key, value in saved.items() if key not in keys}
    for key, value in beside.items():
        if isinstance(value, Mapping) and {"step", "state1", "exp_avg"} & value.keys():
            raise ValueError(f"the checkpoint has a state of parameter {key}, which is in none of its groups")
    return copy.deepcopy(beside)


def _parse_foreign(
    optimizer: ParameterGroups, state_dict: dict[str, Any], keys: list[list[Any]], source: str
) -> tuple[dict[Tensor, st.State], list[dict[str, Any]]]:
    """`parse` of another optimizer's checkpoint. Its options stay behind: rates and decay there mean something else."""
    state: dict[Tensor, st.State] = {}
    new_groups: list[dict[str, Any]] = []
    for group, saved_group, of_group in zip(optimizer.param_groups, state_dict["param_groups"], keys, strict=True):
        found: list[tuple[Tensor, int]] = []
        for p, key in zip(group["params"], of_group, strict=True):
            if saved := state_dict["state"].get(key):
                options, local = optimizer.effective_options(group, p), st.local_tensor(p)
                if sharded.shard_of(p) is not None:
                    raise ValueError(
                        f"parameter {key}: a checkpoint of {source} cannot be taken over by a sharded parameter; "
                        "load it into an optimizer over the model without fully_shard, and that one's checkpoint here"
                    )
                carried = migration.read(source, saved, saved_group, options, local, f"parameter {key}")
                storage = st.storage_of(local, options, optimizer.facts_of(p).is_embedding)
                state[p] = optimizer.completed(p, {"step": carried.step}, storage, options)
                migration.fill(state[p], carried, local, options)
                if (shard := st.shard_of(p)) is not None:
                    state[p]["shard"] = shard
                migration.warn_of_freeze(carried.step, options["warmup_steps"])
                if carried.rates is not None:  # and no more: of a large model, tensors of all would not fit
                    found.append((carried.rates.double().sum(), carried.rates.numel()))
        new_groups.append(migration.group_entries(group, found))
    return state, new_groups


def _parse_group(saved: dict[str, Any], group: dict[str, Any], index: int) -> dict[str, Any]:
    """The entries to take over: none of another optimizer's, whose rate and decay mean something else."""
    entries: dict[str, Any] = {}
    if not any(name in saved for name in OWN_GROUP_KEYS):
        return entries
    device = group["params"][0].device if group["params"] else None
    where = f" in the checkpoint's group {index}"
    for name, value in saved.items():
        if name == "params" or (name == "param_names" and "param_names" in group):
            continue
        _check_group_entry(name, value, where)
        if name in COUNTS:
            entries[name] = migration.checked_step(value, f"{name}{where}")
        elif name in SEARCHED:
            value = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))
            entries[name] = value.reshape(SEARCHED[name]).to(device, torch.float32, copy=True)
        elif name == "lr":  # as a schedule left it, which may be less than an option can be
            entries[name] = float(value)
        elif name in config.GROUP_OPTIONS:
            entries[name] = config.check_option(name, value, where)
        elif isinstance(value, Tensor):
            entries[name] = value.detach().to(device, copy=True)
        else:
            entries[name] = copy.deepcopy(value)
    if entries.get("auto_lr_joined", 0) > entries.get("auto_lr_count", 0):
        raise ValueError(
            f"auto_lr_joined={entries['auto_lr_joined']}{where}: must not exceed "
            f"auto_lr_count={entries.get('auto_lr_count', 0)}, the steps of the search"
        )
    entries = config.respelled(entries)
    entries.pop("auto_lr_step", None)  # of version 0.2.0, as the next lines
    if group["max_lr"] is None and "auto_lr_given" not in saved and "base_lr" in saved:
        # Up to version 0.2.0 a bound that was not set was saved as what it came to.
        entries |= {"max_lr": None} if entries.get("max_lr") == max(1e-3, 10 * saved["base_lr"]) else {}
    entries = _with_the_constructors_word(entries, group, index)
    bounds = {name: entries.get(name, group[name]) for name in ("min_lr", "max_lr")}
    # The rates themselves are history: OneCycleLR has its own bounds in the group, below the rate it was built with.
    config.check_rates({**bounds, "lr": None}, where)
    return entries


def _with_the_constructors_word(entries: dict[str, Any], group: dict[str, Any], index: int) -> dict[str, Any]:
    """The entries, without the checkpoint's rate where one of the two was given and the other found.

    Whether a rate is given or found is what the constructor was told last; a rate that was found is none to be held,
    and one that was given is none to go on searching from.
    """
    if "auto_lr" not in entries or bool(entries["auto_lr"]) == bool(group["auto_lr"]):
        return entries
    was, now = ("found", f"lr={group['lr']:g}") if entries["auto_lr"] else ("given", "auto_lr")
    warn_once(
        f"the checkpoint's rate of group {index} was {was}; this optimizer was made with {now}, which stands. A "
        "scheduler that resumes from a checkpoint of its own may set the old rate again"
    )
    dropped = {"auto_lr", "auto_lr_given", "lr", "base_lr", "initial_lr", *auto_lr.GROUP_KEYS}
    kept = {name: value for name, value in entries.items() if name not in dropped}
    if "initial_lr" in entries:  # schedulers that resume want it
        kept["initial_lr"] = group.get("initial_lr", group["lr"])
    return kept


def _check_group_entry(name: str, value: Any, where: str) -> None:
    """Raise ValueError where one of a group's numbers is nonsense; options have a check of their own, but for None."""
    migration.check_has_values(value, f"{name}{where}")
    if value is None and name in config.GROUP_OPTIONS and name not in NONE_ALLOWED:
        raise ValueError(f"option {name}=None{where}: must be {config.RULES[name].legal.removesuffix(', or None')}")
    if name in RATES and not (value is None and name == "auto_lr_given"):
        number: Any = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if not config.is_number(number) or not 0 <= number <= st.FLOAT_MAX:
            raise ValueError(f"{name}={number!r}{where}: must be a finite number >= 0")
    elif name == "auto_lr_sums" and not (
        isinstance(value, Tensor) and tuple(value.shape) == (2,) and bool(torch.isfinite(value).all())
    ):
        raise ValueError(f"{name}={value!r}{where}: must be two finite numbers")


def _parse_parameter(
    optimizer: ParameterGroups, p: Tensor, group: dict[str, Any], saved: dict[str, Any], where: str, move: bool
) -> st.State:
    saved = {**saved, **saved.get(WRAPPED, {})}
    saved.pop(WRAPPED, None)
    rows = sharded.shard_of(p)
    # What is sharded by rows is saved as whole tensors: they are checked as such before this process takes its part.
    local, shard = (st.local_tensor(p), st.shard_of(p)) if rows is None else (p.detach(), None)
    saved = {name: sharded.whole(value) for name, value in saved.items()}
    saved = _from_0_2_0(_from_0_1_0(saved, local))
    saved_shard = saved.pop("shard", shard)
    if saved_shard != shard:
        why = SHARDED_WARNING if rows is None else PART_OF_0_2_0
        raise ValueError(f"{where}: the checkpoint holds shard {saved_shard}, here is {shard}; {why}")
    if rows is not None:
        saved = _with_probes_of(saved, local, optimizer.facts_of(p).probe_stride)
    for name, value in saved.items():
        if name in st.KEYS or (isinstance(value, Tensor) and value.is_meta):  # wrappers may keep sparse ones
            migration.check_has_values(value, f"{where}: the checkpoint's {name}", move and not local.is_meta)
    unknown = sorted(str(k) for k in saved if k not in st.KEYS and k != "step" and k not in IGNORED)
    foreign = bool(unknown) and "tensor_stats" not in saved
    if foreign or "state1" not in saved or not {"state2", "exp_avg_sq_row"} & saved.keys():
        raise ValueError(
            f"{where}: this is a checkpoint of another optimizer (its state holds {sorted(saved)}); "
            "start without it, or load one of this optimizer, Adam, Prodigy, Adafactor, any Automagic or CameAMP"
        )
    state: st.State = {"step": migration.checked_step(saved.get("step", 0), f"{where}: the checkpoint's step")}
    if unknown:
        warn_once(
            f"the checkpoint's states hold {unknown}, which are not this package's: they are kept as they are, for the "
            "wrapper that put them there; if a later version of the package wrote the checkpoint, update the package"
        )
        state |= {k: _copied(v, local) for k, v in saved.items() if str(k) in unknown}
    if shard is not None:
        state["shard"] = shard
    for name, value in saved.items():
        if name not in st.KEYS or name.startswith("qmap"):
            continue
        shape = tuple(value.shape) if isinstance(value, Tensor) else f"none ({type(value).__name__})"
        expected = st.expected_shape(name, local, len(value) if isinstance(value, Tensor) and value.dim() else 0)
        if shape != expected:
            raise ValueError(
                f"{where}: the checkpoint's {name} has shape {shape}, "
                f"a parameter of shape {tuple(local.shape)} needs {expected}"
            )
        _check_values(name, value, where)
        if rows is not None:
            value = rows.part_of(name, value, optimizer.facts_of(p).probe_stride)
        state[name] = _restored(name, value, sharded.stepped(p), optimizer.is_paged, move)
    _check_storage(state, local, optimizer.effective_options(group, p), where)
    return optimizer.completed(p, state, st.storage_held(state), optimizer.effective_options(group, p))


def _with_probes_of(saved: st.State, p: Tensor, stride: int) -> st.State:
    """A saved state without probes of another stride than a shard's, which has its spans by it: they begin anew."""
    lengths = {len(saved[name]) for name in ("probe_start", "probe_block") if isinstance(saved.get(name), Tensor)}
    if lengths <= {st.probe_count(st.block_count(p), stride)}:
        return saved
    return {name: value for name, value in saved.items() if name not in ("probe_start", "probe_block")}


def _from_0_1_0(saved: dict[str, Any], p: Tensor) -> dict[str, Any]:
    """A parameter's state as version 0.1.0 saved it, in today's form; any other as it is.

    Its row and column means were those of the whole matrix, V_ij = row_i · col_j / mean(row): the means of each tile
    are taken of that V.
    """
    stats = saved.get("tensor_stats")
    if not isinstance(stats, Tensor) or tuple(stats.shape) != (STATS_OF_0_1_0,):
        return saved
    saved = {**saved, "tensor_stats": stats[[0, 3, 4, 5]]}
    tiling, (rows, columns) = Tiling.of(p), st.matrix_shape(p)
    for name in FACTORED_NAMES.values():
        row, col = (saved.get(f"{name}_{side}") for side in ("row", "col"))
        # What has other shapes does not fit, and the check of shapes says so.
        if isinstance(row, Tensor) and isinstance(col, Tensor) and (row.numel(), col.numel()) == (rows, columns):
            row, col = row.to(p.device), col.to(p.device)
            v = Blocks(p).cut(row[:, None] * (col / row.mean().clamp_min(q.FLOAT_TINY)))
            saved[f"{name}_row"], saved[f"{name}_col"] = tiling.row_means(v), tiling.column_means(v)
    return saved


def _from_0_2_0(saved: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state as version 0.2.0 saved it, whose probes watched the first block of each span."""
    if "probe_sum" not in saved:
        return saved
    saved = {**saved, "probe_block": torch.zeros(len(saved["probe_sum"]), dtype=torch.int32)}
    del saved["probe_sum"]
    if isinstance(saved.get("tensor_stats"), Tensor) and saved["tensor_stats"].numel() == len(st.STATS):
        stats = saved["tensor_stats"].clone()
        stats[[st.LR_NUMERATOR, st.LR_DENOMINATOR]] = 0
        saved["tensor_stats"] = stats
    return saved


def _check_values(name: str, value: Tensor, where: str) -> None:
    """Raise ValueError where a tensor of our own holds what no step leaves there."""
    low, high = st.KEYS[name].legal
    if value.numel() == 0 or value.is_meta or (value.dtype == torch.uint8 and name != "last_polarity"):
        return  # codes: any of them may be; and what lies on no device has no values yet
    if name == "tensor_stats":
        # The sums of a step may have overflowed: then it has no estimate.
        value, low, high = value[[st.MASK_MEAN, st.SKIPPED]], 0.0, st.FLOAT_MAX
    least, most = (float(x) for x in value.detach().float().aminmax())
    if not (low <= least and most <= high):  # NaN is neither
        raise ValueError(
            f"{where}: the checkpoint's {name} holds values from {least:g} to {most:g}, where a step leaves some from "
            f"{low:g} to {high:g}; use an earlier checkpoint"
        )


def _copied(value: Any, p: Tensor) -> Any:
    return value.detach().to(p.device, copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)


def _restored(name: str, value: Tensor, p: Tensor, paged: bool, move: bool) -> Tensor:
    if name in st.ELEMENT_KEYS and move:
        return st.empty_element_state(p, value.dtype, paged, tuple(value.shape)).copy_(value)
    dtype = p.dtype if name == "probe_start" else value.dtype  # the parameter may be kept in another dtype by now
    return value.detach().to(p.device if move else value.device, dtype, copy=True)


def _check_storage(state: st.State, p: Tensor, options: dict[str, Any], where: str) -> None:
    held = state["state1"].dtype
    if held not in (torch.uint8, torch.float32) and not (held == torch.float16 and "exp_avg_sq_row" in state):
        raise ValueError(f"{where}: the checkpoint's state1 is {held}; expected uint8 or float32")
    if held == torch.uint8 and not bnb.BITSANDBYTES_AVAILABLE:
        raise ValueError(f"{where}: the checkpoint's state is in 8 bits. {bnb.MISSING_WARNING}")
    storage, options = st.storage_held(state), st.as_held(state, options)
    for name, value in state.items():
        expected = None
        if name in st.KEYS and st.KEYS[name].held.get(storage, (None,))[0] is not None:
            expected = st.dtype_of(name, p, storage, options)
        if isinstance(value, Tensor) and expected is not None and value.dtype != expected:
            raise ValueError(f"{where}: the checkpoint's {name} is {value.dtype}; expected {expected}")
    if {"probe_start", "probe_block"} <= state.keys() and len(state["probe_start"]) != len(state["probe_block"]):
        raise ValueError(f"{where}: the checkpoint's probe_start and probe_block do not belong together")
    for number in (1, 2, 3):
        if held == torch.uint8 and f"state{number}" in state and f"absmax{number}" not in state:
            raise ValueError(f"{where}: the checkpoint's state{number} is in 8 bits but absmax{number} is missing")
