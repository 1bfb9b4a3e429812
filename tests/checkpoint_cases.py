"""An optimizer in the middle of a run and the way through a file, for the tests of checkpoints and copies."""

from __future__ import annotations

import io
from typing import Any

import torch

from automagic_bnb import Automagic8bit

STORAGES = {
    "32bit": {"optim_bits": 32},
    "8bit": {"factored": False, "mask_bits": 8},
    "factored": {"factored": True, "mask_bits": 8, "mean_bits": 32},
}
SHAPES = ((64, 64), (257,), (16, 256), (8, 4, 3, 3))
WARMUP = 8


def build(tools: Any, dtype: torch.dtype = torch.bfloat16, lr: float | None = 1e-3, **options: Any) -> Any:
    """An optimizer over four parameters, the third of them LoRA's; the mask adapts for the first 8 steps."""
    p = tools.parameters(*SHAPES, dtype=dtype)
    p[2]._is_lora_layer = True
    options = {
        "factored": False,
        "mask_bits": 8,
        "min_8bit_size": 0,
        "warmup_steps": WARMUP,
        "rank_penalty_strength": 0.05,
        **options,
    }
    return Automagic8bit([{"params": p[:2]}, {"params": p[2:], "weight_decay": 0.1}], lr=lr, **options)


def parameters_of(opt: Any) -> list[Any]:
    return [p for group in opt.param_groups for p in group["params"]]


def train(tools: Any, opt: Any, *steps: int) -> None:
    tools.train(opt, parameters_of(opt), range(*steps))


def through_file(x: Any, weights_only: bool = True) -> Any:
    """What `torch.save` and `torch.load` make of it."""
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def resumed(tools: Any, opt: Any, saved: Any = None, **options: Any) -> Any:
    """A fresh optimizer over copies of the parameters, which has loaded the checkpoint of `opt`."""
    fresh = build(tools, dtype=parameters_of(opt)[0].dtype, **options)
    for new, old in zip(parameters_of(fresh), parameters_of(opt), strict=True):
        new.data.copy_(old.data)
    fresh.load_state_dict(through_file(opt.state_dict()) if saved is None else saved)
    return fresh
