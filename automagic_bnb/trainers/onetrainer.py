"""For OneTrainer: its "AdamW 8 bit" is our optimizer, with a fused backward pass and the rate found in its log.

`automagic-bnb run --trainer onetrainer -- scripts/train.py …` calls `enter` before OneTrainer starts.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

MODULE = "modules.util.enum.Optimizer"
MEMBER = "ADAMW_8BIT"
"""The member of OneTrainer's enum that stands for bitsandbytes' AdamW8bit, which the runner replaces."""


def enter() -> None:
    """Count the member among those that step in the backward pass, and among those that find their rate.

    Raises:
        ImportError: the working directory is not OneTrainer's.
    """
    sys.path.insert(0, os.getcwd())
    try:
        optimizers: Any = importlib.import_module(MODULE).Optimizer
    except ImportError as e:
        raise ImportError(f"{MODULE} cannot be imported ({e}); start in OneTrainer's folder") from e
    ours = getattr(optimizers, MEMBER)
    supports, is_adaptive = optimizers.supports_fused_back_pass, optimizers.is_adaptive.fget
    optimizers.supports_fused_back_pass = lambda self: self is ours or supports(self)
    optimizers.is_adaptive = property(lambda self: self is ours or is_adaptive(self))
