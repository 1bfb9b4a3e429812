"""Optimizers in each form of storage, for the tests of changes from one to another."""

from __future__ import annotations

from typing import Any

import torch
from checkpoint_cases import parameters_of

from automagic_bnb import Automagic8bit
from automagic_bnb import state as st

OPTIONS = {
    "32bit": {"optim_bits": 32},
    "8bit": {"optim_bits": 8, "factored": False, "mask_bits": 8},
    "factored": {"optim_bits": 8, "factored": True, "mask_bits": 8, "mean_bits": 32},
}
SHAPES = ((64, 64), (257,), (256, 200), (16, 8, 4, 4), (), (5000, 3), (0, 8))
"""A matrix that factors by blocks and one by odd columns, vectors with an odd end, a scalar, an empty one."""


def build(tools: Any, storage: str, dtype: torch.dtype = torch.float32, lr: float | None = 1e-3, **options: Any) -> Any:
    """An optimizer in two groups, in this storage."""
    p = tools.parameters(*SHAPES, dtype=dtype)
    groups = [{"params": p[:2]}, {"params": p[2:], "weight_decay": 0.1}]
    return Automagic8bit(groups, lr=lr, **{"min_8bit_size": 0, "warmup_steps": 8, **OPTIONS[storage], **options})


def trained(tools: Any, storage: str, steps: int = 6, **options: Any) -> Any:
    opt = build(tools, storage, **options)
    tools.train(opt, parameters_of(opt), range(steps))
    return opt


def storages(opt: Any) -> list[str]:
    return [st.storage_held(opt.state[p]) for p in parameters_of(opt)]
