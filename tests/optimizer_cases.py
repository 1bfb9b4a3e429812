"""What the tests of the optimizer's building, groups, overrides and steps share."""

from __future__ import annotations

from typing import Any

import bitsandbytes

BIG = (64, 64)
"""The smallest square that is kept in 8 bits by default."""
ANOTHER_VALUE = {
    "lr": 3e-4,
    "min_lr": 1e-6,
    "max_lr": 5e-3,
    "auto_lr": True,
    "auto_lr_steps": 100,
    "weight_decay": 0.3,
    "warmup_steps": 3,
    "betas": (0.5, 0.6, 0.7),
    "eps": (1e-3, 1e-1),
    "clip_threshold": 0.3,
    "percentile_clipping": 50,
    "optim_bits": 32,
    "min_8bit_size": 8192,
    "block_wise": True,
    "stable_emb": True,
    "capturable": True,
    "force_8bit": True,
    "factored": False,
    "mask_bits": 8,
    "mean_bits": 32,
    "edge_suppression": False,
    "edge_penalty": 0.9,
    "edge_threshold": 0.1,
    "background_regularization": False,
    "frequency_penalty": 0.9,
    "spatial_awareness": False,
    "detail_preservation": 1.5,
    "lora": True,
    "lora_mask": True,
    "lora_rank_penalty": False,
    "rank_penalty_strength": 0.5,
    "low_rank_emphasis": 0.1,
    "lora_direction": "orthogonal",
    "torque": False,
    "came": False,
    "cautious": False,
    "stochastic_rounding": False,
    "master": "ecc8",
    "seed": 7,
}
"""A legal value other than the default for every option of a group."""


def manager() -> Any:
    return bitsandbytes.optim.GlobalOptimManager.get_instance()


def bits(opt: Any, p: Any) -> int:
    """How many bits the first moment of p is kept in."""
    return opt.state[p]["state1"].element_size() * 8
