"""The tasks, and which of them choose and which judge.

The split was made before any result was looked at: options and defaults are chosen on the first, claims rest on the
second. They differ in text, photograph or package, in rank, scale, batch and schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import data
import models
import torch
from torch import nn

SIZES: dict[str, tuple[int, int]] = {"gpt": (192, 4), "dit": (160, 4), "unet": (32, 3)}
"""Width and layers: 1.9 M, 1.9 M and 0.9 M parameters."""
TINY: dict[str, tuple[int, int]] = {"gpt": (32, 1), "dit": (32, 1), "unet": (8, 2)}
"""For a look at whether everything runs."""
WARM_UP = 0.03
"""Share of a run over which every rate rises from 0."""


@dataclass(frozen=True)
class Task:
    """One training: what, on what, and how long.

    Args:
        split: "choose", "judge" or "more".
        family: "gpt", "dit", "unet" or "encoder".
        source: a text (data.TEXTS), "photos", "FILE:CROPS" or a package (data.CLASSES).
        kind: "scratch", "full" (all weights of the family's base) or "lora".
        size: width and layers; None: those of the family (SIZES).
    """

    name: str
    split: str
    family: str
    source: str
    kind: str
    batch: int
    schedule: str
    steps: int = 400
    rank: int = 0
    scale: float = 1.0
    dtype: torch.dtype = torch.float32
    size: tuple[int, int] | None = None

    @property
    def warm_up(self) -> int:
        """Steps over which the rate rises."""
        return max(1, round(WARM_UP * self.steps))

    def relative_rate(self, step: int) -> float:
        """What the rate is multiplied by in a step, counted from 0."""
        rise = min(1.0, (step + 1) / self.warm_up)
        done = max(0.0, (step - self.warm_up) / max(1, self.steps - self.warm_up))
        if self.schedule == "constant":
            return rise
        return rise * (1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))

    def build(self, seed: int, cache: Path, tiny: bool = False) -> nn.Module:
        """The model on the CPU as it is before the first step; what is not to be trained asks for no gradient."""
        torch.manual_seed(seed)
        if self.family == "encoder":
            model: nn.Module = models.encoder(data.encoder_folder(), len(data.CLASSES[self.source]))
        else:
            model = models.FAMILIES[self.family](*(self.size or (TINY if tiny else SIZES)[self.family]))
            if self.kind != "scratch":
                state = torch.load(cache / base_file(self.family, tiny))
                model.load_state_dict({key: value.float() for key, value in state.items()})
        if self.kind == "lora":
            models.add_lora(model, self.rank, self.scale, ["head"] if self.family == "encoder" else [])
        return model.to(self.dtype)


def base_file(family: str, tiny: bool) -> str:
    return f"base-{family}{'-tiny' if tiny else ''}.pt"


BF16 = torch.bfloat16
SMALL = (128, 2)

_CHOOSE = [
    Task("gpt-scratch", "choose", "gpt", "python", "scratch", 16, "cosine"),
    Task("gpt-scratch-long", "choose", "gpt", "python", "scratch", 8, "cosine", steps=5000, size=SMALL),
    Task("gpt-full-bf16", "choose", "gpt", "prose", "full", 8, "linear", steps=300, dtype=BF16),
    Task("gpt-lora-r16", "choose", "gpt", "prose", "lora", 4, "constant", steps=300, rank=16),
    Task("gpt-lora-r4-x8", "choose", "gpt", "prose", "lora", 32, "cosine", steps=300, rank=4, scale=8.0),
    Task("dit-scratch", "choose", "dit", "photos", "scratch", 32, "cosine"),
    Task("dit-lora-cat", "choose", "dit", "chelsea.png:16", "lora", 4, "constant", rank=16),
    Task("unet-full-cat", "choose", "unet", "chelsea.png:200", "full", 8, "linear"),
    Task("encoder-lora-r16", "choose", "encoder", "torch", "lora", 32, "linear", steps=300, rank=16),
]
_JUDGE = [
    Task("gpt-scratch-headers", "judge", "gpt", "headers", "scratch", 32, "linear"),
    Task("gpt-full-headers-bf16", "judge", "gpt", "headers", "full", 2, "cosine", dtype=BF16),
    Task("gpt-lora-r64-x0.1", "judge", "gpt", "headers", "lora", 8, "cosine", rank=64, scale=0.1),
    Task("gpt-lora-r4-b1", "judge", "gpt", "headers", "lora", 1, "linear", rank=4),
    Task("gpt-lora-r16-x8-bf16", "judge", "gpt", "headers", "lora", 16, "constant", steps=300, rank=16, scale=8.0,
         dtype=BF16),
    Task("gpt-lora-long", "judge", "gpt", "headers", "lora", 4, "cosine", steps=5000, rank=16),
    Task("unet-scratch", "judge", "unet", "photos", "scratch", 32, "cosine"),
    Task("dit-full-coffee", "judge", "dit", "coffee.png:400", "full", 4, "constant"),
    Task("unet-lora-rocket", "judge", "unet", "rocket.jpg:16", "lora", 2, "cosine", rank=16),
    Task("dit-lora-coffee", "judge", "dit", "coffee.png:50", "lora", 4, "linear", rank=4),
    Task("encoder-full", "judge", "encoder", "sympy", "full", 32, "linear", steps=300),
    Task("encoder-lora-r4-b4", "judge", "encoder", "sympy", "lora", 4, "cosine", steps=300, rank=4),
]  # fmt: skip
_MORE = [
    Task("encoder-lora-r4-torch", "more", "encoder", "torch", "lora", 4, "cosine", steps=300, rank=4),
    Task("gpt-lora-r8-b1", "more", "gpt", "prose", "lora", 1, "linear", rank=8),
    Task("gpt-lora-r16-b2", "more", "gpt", "prose", "lora", 2, "cosine", steps=900, rank=16),
    Task("unet-lora-cat", "more", "unet", "chelsea.png:16", "lora", 2, "cosine", rank=16),
]
"""LoRAs with small batches, made when the others were known, to see whether `lora_direction` holds; nothing was chosen
by them."""
TASKS: dict[str, Task] = {task.name: task for task in _CHOOSE + _JUDGE + _MORE}

BASES: dict[str, Task] = {
    "gpt": Task("base-gpt", "base", "gpt", "python", "scratch", 64, "cosine", steps=3000),
    "dit": Task("base-dit", "base", "dit", "photos", "scratch", 64, "cosine", steps=4000),
    "unet": Task("base-unet", "base", "unet", "photos", "scratch", 64, "cosine", steps=3000),
}
"""What the fine-tunes start from: trained once, by AdamW."""
BASE_RATE = 2e-3
