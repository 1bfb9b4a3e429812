"""Our classes under the names of bitsandbytes' AdamW, so that a trainer with a fixed list of optimizers makes ours."""

from __future__ import annotations

import gc
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from automagic_bnb import bnb, config
from automagic_bnb.groups import is_lora_name
from automagic_bnb.migrated_options import migrate_options
from automagic_bnb.optimizer import Automagic, Automagic8bit, Automagic32bit, PagedAutomagic8bit, PagedAutomagic32bit

PLACES: dict[str, tuple[type[Automagic], dict[str, Any]]] = {
    "AdamW8bit": (Automagic8bit, {}),
    "PagedAdamW8bit": (PagedAutomagic8bit, {}),
    "AdamW": (Automagic, {}),
    "AdamW32bit": (Automagic32bit, {}),
    "PagedAdamW": (Automagic, {"is_paged": True}),
    "PagedAdamW32bit": (PagedAutomagic32bit, {}),
}
"""bitsandbytes' classes, ours in their places, and what their names say besides."""
TAKE_BITS = ("AdamW", "PagedAdamW")
"""Those that heed optim_bits; the others have it in their names, and take it without effect."""
BY_NAME = "pytorch_optimizer"
"""A package of optimizers in which some trainers look a name up (diffusion-pipe)."""


made: list[str] = []
"""The names under which an optimizer of ours was asked for, in order."""


def stand_in(name: str, theirs: type, options: dict[str, Any]) -> type[Automagic]:
    """A subclass of ours that is called as bitsandbytes' class of this name is.

    Args:
        theirs: that class, whose arguments it takes, by position too, and whose `lr` and `weight_decay` hold where the
            trainer passes none.
        options: ours, which stand over what the trainer passes.
    """
    names = list(inspect.signature(theirs.__init__).parameters)[1:]
    ours, said = PLACES[name]

    def __init__(self: Any, *args: Any, **given: Any) -> None:
        # By name, what any version of bitsandbytes knows: trainers pass what 0.50 does not take any more.
        passed = {**dict(zip(names, args, strict=False)), **given}
        params, bits = passed.pop("params"), passed.pop("optim_bits", None)
        translated = {**migrate_options(passed, "bitsandbytes"), **said}
        if bits is not None and name in TAKE_BITS:
            translated["optim_bits"] = bits
        make(self, ours, name, params, translated, options)

    return subclass(ours, __init__)


def with_options(ours: type[Automagic], options: dict[str, Any]) -> type[Automagic]:
    """A subclass of ours with options that stand over what the trainer passes."""

    def __init__(self: Any, params: Any, lr: float | None = None, **given: Any) -> None:
        make(self, ours, ours.__name__, params, {"lr": lr, **given}, options)

    return subclass(ours, __init__)


def subclass(ours: type[Automagic], init: Callable[..., None]) -> type[Automagic]:
    return type(ours.__name__, (ours,), {"__init__": init, "__doc__": ours.__doc__, "__module__": __name__})


def without_rate(params: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Parameters and options without the rate that trainers always pass; where groups differ, it says their ratios."""
    params = list(params)
    groups = [group for group in params if isinstance(group, dict)]
    if len({group.get("lr", given.get("lr")) for group in groups}) > 1:
        return params, given
    bare = [{k: v for k, v in x.items() if k != "lr"} if isinstance(x, dict) else x for x in params]
    return bare, {name: value for name, value in given.items() if name != "lr"}


def make(self: Any, ours: type[Automagic], name: str, params: Any, given: dict[str, Any], over: dict[str, Any]) -> None:
    """Construct one, and name its parameters by the models of this process, by which LoRA is told."""
    if over.get("auto_lr") and "lr" not in over:
        params, given = without_rate(params, given)
    made.append(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the LoRA parts of the rule are off")  # until the names are known
        ours.__init__(self, params, **{**given, **over})
    self.name_parameters(names_of(p for group in self.param_groups for p in group["params"]))


def names_of(parameters: Iterable[Tensor]) -> list[tuple[str, Tensor]]:
    """What the modules of this process call these parameters, by the longest path to each.

    A trainer that passes parameters without their names has the model they are of; Python knows all objects.
    """
    wanted = set(parameters)
    # `type`, not isinstance: proxies among all objects would import what they stand for.
    modules = [x for x in gc.get_objects() if issubclass(type(x), nn.Module) and "_modules" in vars(x)]
    inner = {id(child) for module in modules for child in module._modules.values()}
    names: dict[Tensor, str] = {}
    for module in modules:
        if id(module) in inner:
            continue
        for name, p in module.named_parameters():
            if p in wanted and len(name) > len(names.get(p, "")):
                names[p] = name
    return [(name, p) for p, name in names.items()]


def mark_lora(named: Iterable[tuple[str, Tensor]]) -> int:
    """Mark what is LoRA's by its name, for an optimizer that will get it without; the number of marked parameters."""
    found = [p for name, p in named if is_lora_name(name)]
    for p in found:
        p._is_lora_layer = True  # type: ignore[attr-defined]
    return len(found)


def checked(options: dict[str, str]) -> dict[str, Any]:
    """Options given as text, as the optimizer takes them; a preset as the options in it, which stand over a trainer's.

    Raises:
        TypeError, ValueError: an unknown option, or an illegal value.
    """
    read = {name: config.check_option(name, value) for name, value in options.items()}
    config.make_config(**read)
    return {**config.PRESETS.get(read.get("preset") or "", {}), **read}


def replace(options: dict[str, Any]) -> list[str]:
    """Put our classes in the places of bitsandbytes', and under their own names into pytorch_optimizer.

    Returns:
        What was replaced or added, as "AdamW8bit = Automagic8bit".

    Raises:
        ImportError: bitsandbytes cannot be imported.
    """
    if not bnb.BITSANDBYTES_AVAILABLE:
        raise ImportError(f"bitsandbytes cannot be imported ({bnb.IMPORT_ERROR})")
    optim: Any = importlib.import_module("bitsandbytes.optim")
    done = []
    for name, (ours, _) in PLACES.items():
        theirs = getattr(optim, name, None)
        if theirs is None or issubclass(theirs, Automagic):
            continue
        replacement = stand_in(name, theirs, options)
        for module in (optim, sys.modules[theirs.__module__]):
            setattr(module, name, replacement)
        done.append(f"{name} = {ours.__name__}")
    return done + add_names(options)


def add_names(options: dict[str, Any]) -> list[str]:
    """Our classes under their own names in pytorch_optimizer, where it is installed."""
    try:
        package = importlib.import_module(BY_NAME)
    except ImportError:
        return []
    added = []
    for ours in (Automagic8bit, Automagic32bit, PagedAutomagic8bit):
        setattr(package, ours.__name__, with_options(ours, options))
        added.append(f"{BY_NAME}.{ours.__name__}")
    return added
