"""Optimizers in every kind of storage, and the bytes of their tensors: what the memory report is held against."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from automagic_bnb import Automagic8bit

SHAPES = [(), (1,), (0,), (255,), (257,), (4099,), (33, 129), (64, 512), (16, 1031), (4096, 16), (7, 5, 3, 3), (8, 0)]
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "32bit": {"optim_bits": 32},
    "block-wise": {"factored": False},
    "force_8bit": {"force_8bit": True},
    "factored down to small ones": {"factored": True, "min_8bit_size": 64},
    "ecc8": {"master": "ecc8"},
    "rate found": {"lr": None},
    "without confidence": {"came": False, "factored": True},
    "small and factored": {"factored": True, "min_8bit_size": 10**6},
    "lean": {"profile": "lean"},
    "wide": {"factored": True, "mask_bits": 8, "mean_bits": 32},
    "percentile clipping": {"percentile_clipping": 50},
    "all at once": {"factored": True, "master": "ecc8", "lr": None, "percentile_clipping": 5, "min_8bit_size": 0},
}
UNFORESEEN = {"basis", "held_bytes", "planned_bytes"}
"""What a step may change of a report."""


def optimizer(parameters: Any, **options: Any) -> Automagic8bit:
    return Automagic8bit(parameters, **{"lr": 1e-3, "backend": "torch", **options})


def stepped(opt: Any, *parameters: Any) -> Any:
    """The optimizer after a step of these parameters, or of all."""
    for p in parameters or [p for group in opt.param_groups for p in group["params"]]:
        p.grad = torch.full_like(p, 0.01)
    opt.step()
    return opt


def tensors_of(opt: Any) -> dict[int, tuple[str, Tensor]]:
    """Every tensor in the optimizer's state, each once, with its key: what the report is held against."""
    return {id(v): (k, v) for state in opt.state.values() for k, v in state.items() if isinstance(v, Tensor)}


def bytes_of(opt: Any, *starts: str) -> int:
    """Bytes of the tensors whose keys start so."""
    return sum(math.prod(v.shape) * v.itemsize for k, v in tensors_of(opt).values() if k.startswith(starts or ""))


def outcome(report: dict[str, Any]) -> dict[str, Any]:
    """All that a plan has to foresee."""
    return {name: value for name, value in report.items() if name not in UNFORESEEN}
