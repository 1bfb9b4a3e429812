"""What the command line sets of the demo: a file of its own, as `--help` shows defaults and does not wait for torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ADAMW_LR = 2e-3
"""AdamW8bit's default rate: its best of 5e-4, 1e-3, 2e-3, 3e-3, 5e-3 and 1e-2 by validation loss after 400 steps at
seed 0, and of the four rates from 1e-3 to 5e-3 by the mean over the seeds 0, 1 and 2."""
USUAL_LR = 1e-4
"""The rate that people start AdamW8bit with."""
PEERS = ("prodigy",)
"""What may run besides."""


class DemoError(RuntimeError):
    """The demo cannot run here; the message says why and what to do."""


@dataclass(frozen=True)
class DemoOptions:
    """Rates are per step, `lr=None` lets `Automagic8bit` find its own; `compare` adds one of `PEERS`."""

    steps: int = 400
    base_steps: int = 400
    seed: int = 0
    out: Path = Path("automagic_demo")
    profile: str = "balanced"
    lr: float | None = None
    adamw_lr: float = ADAMW_LR
    rank: int = 8
    device: str | None = None
    compare: str | None = None
