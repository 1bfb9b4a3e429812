"""The optimizers that are compared, and the learning rates that each is tried at.

Rates stand on one grid for all, 10^(0.4 k): a factor of 2.5. Each peer begins with six around a centre that is its own
for each kind of task, and goes on by one as long as its best is at an end (`search.py`), so the centre decides only
how soon the best is found.

Equal for all: weight decay 0.01, decoupled (where the rule has it), and the task's schedule, except where a rule is
made to do without one. Tensors below 512 elements (norms and biases) stay in 32 bits and all matrices are in 8, as in
models of the usual size.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tasks import Task

WEIGHT_DECAY = 0.01
MIN_8BIT_SIZE = 512
STEPS_A_DECADE = 2.5

Named = list[tuple[str, torch.nn.Parameter]]
Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
Build = Callable[[Named, float | None, Task], Optimizers]

SCRATCH, FULL, LORA = 4e-3, 6e-4, 4e-3
"""Where AdamW is usually best, for models of a few million parameters."""


@dataclass(frozen=True)
class Peer:
    """One optimizer.

    Args:
        build: from named parameters, the rate (None where none is given) and the task.
        centre: of the first rates, as a multiple of AdamW's (SCRATCH, FULL, LORA); None: no rate is given.
        fixed: these values in place of a grid, e.g. of Prodigy's d_coef.
        scheduled: follows the task's schedule.
        tunes: times its kernels in its first steps, so that waiting for the device may not be left out.
    """

    name: str
    build: Build
    centre: float | None = 1.0
    fixed: tuple[float, ...] = ()
    scheduled: bool = True
    tunes: bool = False
    note: str = field(default="", compare=False)

    @property
    def searched(self) -> bool:
        return self.centre is not None and not self.fixed

    def first_rates(self, kind: str, count: int = 6) -> list[float | None]:
        """The rates to begin with, ascending."""
        if self.fixed:
            return list(self.fixed)
        if self.centre is None:
            return [None]
        middle = grid_place(self.centre * {"scratch": SCRATCH, "full": FULL, "lora": LORA}[kind])
        return [grid_rate(middle - count // 2 + i) for i in range(count)]


def grid_rate(place: int) -> float:
    """The rate at a place of the grid, in three digits, so that it reads back as the same number."""
    return float(f"{10 ** (place / STEPS_A_DECADE):.3g}")


def grid_place(rate: float) -> int:
    return round(math.log10(rate) * STEPS_A_DECADE)


def _weights(named: Named) -> list[torch.nn.Parameter]:
    return [p for _, p in named]


def _bnb(name: str, **options: Any) -> Build:
    def build(named: Named, lr: float | None, task: Task) -> Optimizers:
        import bitsandbytes as bnb

        fixed = {"weight_decay": WEIGHT_DECAY, "min_8bit_size": MIN_8BIT_SIZE}
        return getattr(bnb.optim, name)(_weights(named), lr=lr, **{**fixed, **options})

    return build


def _adamw(named: Named, lr: float | None, task: Task) -> Optimizers:
    fused = named[0][1].device.type == "cuda"
    return torch.optim.AdamW(_weights(named), lr=lr or 0.0, weight_decay=WEIGHT_DECAY, fused=fused)


def _came(named: Named, lr: float | None, task: Task) -> Optimizers:
    from pytorch_optimizer import CAME

    return CAME(_weights(named), lr=lr or 0.0, weight_decay=WEIGHT_DECAY)


def _adafactor(named: Named, lr: float | None, task: Task) -> Optimizers:
    from pytorch_optimizer import AdaFactor

    # With a rate of its own and without momentum: how trainers set it up to be tuned.
    options = {"scale_parameter": False, "relative_step": False, "betas": (None, 0.999)}
    return AdaFactor(_weights(named), lr=lr, weight_decay=WEIGHT_DECAY, **options)  # type: ignore[arg-type]


def _prodigy(named: Named, d_coef: float | None, task: Task) -> Optimizers:
    from prodigyopt import Prodigy

    options = {"use_bias_correction": True, "safeguard_warmup": True, "weight_decay": WEIGHT_DECAY}
    with contextlib.redirect_stdout(None):  # it prints what decoupled means
        return Prodigy(_weights(named), lr=1.0, d_coef=d_coef or 1.0, **options)


def _schedule_free(named: Named, lr: float | None, task: Task) -> Optimizers:
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree(_weights(named), lr=lr or 0.0, weight_decay=WEIGHT_DECAY, warmup_steps=task.warm_up)


def _flash_adamw(named: Named, lr: float | None, task: Task) -> Optimizers:
    from flashoptim import FlashAdamW

    # Its default for 16-bit weights, 24 bits of each; it refuses that for float32 ones.
    bits = None if named[0][1].dtype == torch.float32 else 24
    return FlashAdamW(_weights(named), lr=lr or 0.0, weight_decay=WEIGHT_DECAY, master_weight_bits=bits)


def _muon(named: Named, lr: float | None, task: Task) -> Optimizers:
    # Scaled to AdamW's root mean square, so that one rate serves the matrices and what is left to AdamW.
    matrices = [p for name, p in named if p.dim() == 2 and not any(x in name for x in ("embed", "position", "word"))]
    taken = {id(p) for p in matrices}
    rest = [(name, p) for name, p in named if id(p) not in taken]
    optimizers: list[Any] = [_adamw(rest, lr, task)] if rest else []
    if matrices:
        options = {"weight_decay": WEIGHT_DECAY, "adjust_lr_fn": "match_rms_adamw"}
        optimizers.append(torch.optim.Muon(matrices, lr=lr or 0.0, **options))
    return optimizers


def _automagic_v1(named: Named, lr: float | None, task: Task) -> Optimizers:
    from automagic_rules import AutomagicV1

    # Its four rates keep the proportions of their defaults.
    start = lr or 1e-6
    rates = {"lr": start, "bump": start, "min_lr": start / 10, "max_lr": start * 1000}
    return AutomagicV1(_weights(named), weight_decay=WEIGHT_DECAY, **rates)


def _automagic_v3(named: Named, lr: float | None, task: Task) -> Optimizers:
    from automagic_rules import AutomagicV3

    return AutomagicV3(_weights(named), lr=lr or 1e-6, weight_decay=WEIGHT_DECAY)


def automagic(name: str = "Automagic8bit", **options: Any) -> Build:
    """Ours with these options; their names tell LoRA's matrices."""

    def build(named: Named, lr: float | None, task: Task) -> Optimizers:
        import automagic_bnb

        fixed = {"weight_decay": WEIGHT_DECAY, "min_8bit_size": MIN_8BIT_SIZE}
        return getattr(automagic_bnb, name)(named, lr=lr, **{**fixed, **options})

    return build


VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "-wide": {"mask_bits": 8, "mean_bits": 32},
    "-blockwise": {"factored": False, "mask_bits": 8},
    "-32bit": {"optim_bits": 32},
    "-lean": {"profile": "lean"},
    "-orthogonal": {"lora_direction": "orthogonal"},
    "-lean-orthogonal": {"profile": "lean", "lora_direction": "orthogonal"},
    "-lora-mask": {"lora_mask": True},
    "-no-torque": {"torque": False},
    "-no-clipping": {"clip_threshold": 100.0},
    "-mask-frozen": {"warmup_steps": 0},
    "-mask-100": {"warmup_steps": 100},
    "-no-cautious": {"cautious": False},
    "-no-confidence": {"came": False},
    "-no-edges": {"edge_suppression": False},
    "-no-frequency": {"frequency_penalty": 0.0},
    "-no-background": {"background_regularization": False},
    "-no-rank-penalty": {"lora_rank_penalty": False},
    "-plain": {"torque": False, "edge_suppression": False, "frequency_penalty": 0.0, "background_regularization": False,
               "lora_rank_penalty": False},
}  # fmt: skip
"""Ours in other storage, and with each part of the rule off in turn."""
BASELINES = ("adamw8bit", "adamw8bit-b99")


def _ours(suffixes: Sequence[str]) -> list[Peer]:
    given = [Peer(f"ours{suffix}", automagic(**VARIANTS[suffix]), 0.5) for suffix in suffixes]
    return given + [Peer(f"ours-found{suffix}", automagic(**VARIANTS[suffix]), None) for suffix in suffixes]


_MAIN = ("", "-blockwise")
_ALL = [  # in the order in which they are run
    Peer("adamw8bit", _bnb("AdamW8bit")),
    Peer("adamw8bit-b99", _bnb("AdamW8bit", betas=(0.9, 0.99))),
    *_ours(_MAIN),
    Peer("prodigy", _prodigy, None),
    Peer("adamw", _adamw, note="states in the weights' dtype"),
    # Below 4,096 elements in 32 bits: its stacked 8-bit states are read wrongly unless a multiple of 256.
    Peer("ademamix8bit", _bnb("AdEMAMix8bit", min_8bit_size=4096), 0.4),
    Peer("lion8bit", _bnb("Lion8bit"), 0.1),
    Peer("came", _came, 0.5),
    Peer("adafactor", _adafactor, 0.5),
    Peer("prodigy-d_coef", _prodigy, None, fixed=(0.3, 1.0, 3.0)),
    Peer("schedule-free", _schedule_free, 2.0, scheduled=False),
    Peer("flash-adamw", _flash_adamw, tunes=True),
    Peer("muon", _muon),
    Peer("automagic-v1", _automagic_v1, 1e-3, scheduled=False),
    Peer("automagic-v1-untuned", _automagic_v1, None, scheduled=False),
    Peer("automagic-v3", _automagic_v3, 0.1, scheduled=False),
    Peer("automagic-v3-untuned", _automagic_v3, None, scheduled=False),
    *_ours([suffix for suffix in VARIANTS if suffix not in _MAIN]),
]
PEERS: dict[str, Peer] = {peer.name: peer for peer in _ALL}


def with_extra(path: Path | None) -> dict[str, Peer]:
    """All peers, and those of a Python file whose OPTIMIZERS is a list of `Peer`."""
    if path is None:
        return PEERS
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {**PEERS, **{peer.name: peer for peer in module.OPTIMIZERS}}
