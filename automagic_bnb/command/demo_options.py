"""What the command line sets of the demo: a file of its own, as `--help` shows defaults and does not wait for torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ADAMW_LR = 7e-4
"""AdamW8bit's default rate: its best of 2.5e-4, 5e-4, 7e-4, 1e-3, 1.4e-3 and 2e-3 by validation loss after 400 steps at
seed 0, and of the three from 5e-4 to 1e-3 by the mean over the seeds 0 to 7, and at each of them."""
USUAL_LR = 1e-4
"""The rate that people start AdamW8bit with."""
PEERS = ("prodigy",)
"""What may run besides."""


class DemoError(RuntimeError):
    """The demo cannot run here; the message says why and what to do."""


@dataclass(frozen=True)
class DemoOptions:
    """Rates are per step, `lr=None` lets `Automagic8bit` find its own; `profile=None` runs it as it is by default and
    in the profile lean; `compare` adds one of `PEERS`."""

    steps: int = 400
    base_steps: int = 400
    seed: int = 0
    out: Path = Path("automagic_demo")
    profile: str | None = None
    lr: float | None = None
    adamw_lr: float = ADAMW_LR
    rank: int = 32
    batch: int = 8
    device: str | None = None
    compare: str | None = None
