"""The only import of bitsandbytes, and what stands in when it is missing.

Everything else asks this module: for the base class, the override manager and the code books.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

import torch

try:
    import bitsandbytes.functional as _functional
    from bitsandbytes.optim.optimizer import GlobalOptimManager, Optimizer2State

    BITSANDBYTES_AVAILABLE = True
except Exception as e:  # a broken CUDA setup raises more than ImportError
    BITSANDBYTES_AVAILABLE = False
    IMPORT_ERROR: Exception | None = e
else:
    IMPORT_ERROR = None

if not BITSANDBYTES_AVAILABLE and not TYPE_CHECKING:
    GlobalOptimManager = None

    class Optimizer2State(torch.optim.Optimizer):
        """The part of bitsandbytes' base class that is used here, over plain torch, for 32-bit states."""

        def __init__(self, optimizer_name, params, lr, betas, eps, weight_decay, optim_bits, args=None, **_):
            self.is_paged = False
            self.optimizer_name = optimizer_name
            self.initialized = False
            self.name2qmap = {}
            self.non_castable_tensor_keys = set()
            super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})


SUPPORTED = ">=0.45.5,<0.52"
MISSING_WARNING = (
    "bitsandbytes could not be imported, so all optimizer state is kept in 32 bits. "
    f'For 8-bit states: pip install "bitsandbytes{SUPPORTED}"'
)


def overrides_of(p: torch.Tensor) -> dict[str, Any]:
    """What `GlobalOptimManager.override_config` says of this very parameter.

    bitsandbytes also keys overrides by (group, index), for every optimizer of the process alike; those are not read.
    """
    if not BITSANDBYTES_AVAILABLE:
        return {}
    found = GlobalOptimManager.get_instance().pid2config.get(id(p), {})
    if found:
        _watch(p)
    return found


def _bind_overrides() -> None:
    """Let bitsandbytes forget an override when its tensor goes, and give each tensor a dict of its own.

    It keeps what `override_config` says under the tensor's id, which a later tensor may get, and one and the same dict
    for all tensors that are given at once, so that what is said of one of them later is said of all.
    """
    plain = GlobalOptimManager.override_config

    @functools.wraps(plain)
    def override_config(
        self: Any, parameters: Any, key: Any = None, value: Any = None, key_value_dict: Any = None
    ) -> None:
        tensors = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        plain(self, tensors, key, value, key_value_dict)
        for p in tensors:
            if id(p) in self.pid2config:
                self.pid2config[id(p)] = dict(self.pid2config[id(p)])
                _watch(p)

    GlobalOptimManager.override_config = override_config


_watched: set[int] = set()
"""Ids of tensors whose override goes when they do."""


def _watch(p: torch.Tensor) -> None:
    """bitsandbytes never forgets an override, and a new tensor may get the id of one that is gone."""
    if id(p) not in _watched:
        _watched.add(id(p))
        weakref.finalize(p, _forget, id(p)).atexit = False


def _forget(key: int) -> None:
    _watched.discard(key)
    GlobalOptimManager.get_instance().pid2config.pop(key, None)


if BITSANDBYTES_AVAILABLE:
    _bind_overrides()


def override(p: torch.Tensor, options: dict[str, Any]) -> None:
    """Add to the override of this very parameter, in a dict of its own.

    `override_config` keeps one and the same dict for all parameters that it is given at once.
    """
    if options and BITSANDBYTES_AVAILABLE:
        held = GlobalOptimManager.get_instance().pid2config
        held[id(p)] = {**held.get(id(p), {}), **options}
        _watch(p)


def overridden_ids() -> tuple[int, ...]:
    """The ids of all tensors with an override: differs when one gets its first option."""
    if not BITSANDBYTES_AVAILABLE:
        return ()
    held = GlobalOptimManager.get_instance().pid2config
    return tuple([key for key, options in held.items() if options]) if held else ()


def adopt_module_overrides(parameters: set[int]) -> None:
    """Turn `register_module_override` entries (bnb.nn.StableEmbedding makes one) into overrides of our parameters.

    Args:
        parameters: the ids of the optimizer's parameters; entries of other modules are left alone.
    """
    if not BITSANDBYTES_AVAILABLE:
        return
    manager = GlobalOptimManager.get_instance()
    for module, name, config in manager.module_weight_config_triple:
        p = getattr(module, name, None)
        if id(p) in parameters:
            manager.pid2config[id(p)] = {**config, **manager.pid2config.get(id(p), {})}
            _watch(p)  # type: ignore[arg-type]


def restore_managers(optimizer: Any) -> None:
    """Give an unpickled or copied optimizer its references to bitsandbytes' process-wide managers again."""
    if BITSANDBYTES_AVAILABLE:
        optimizer.mng = GlobalOptimManager.get_instance()
        optimizer.page_mng = _functional.GlobalPageManager.get_instance()


@functools.cache
def code_book(signed: bool, device: torch.device) -> torch.Tensor:
    """bitsandbytes' dynamic map, float32 [256], ascending: `qmap1` (signed) or `qmap2` (unsigned).

    A tensor of this package's own, for all parameters on a device. Give bitsandbytes' `quantize_blockwise` a clone:
    before 0.46 it writes into entry 0 of the code book that it is given on the CPU.
    """
    if not BITSANDBYTES_AVAILABLE:
        raise RuntimeError(f"8-bit states need bitsandbytes' code books. {MISSING_WARNING}")
    return _functional.create_dynamic_map(signed=signed).to(device, copy=True)
