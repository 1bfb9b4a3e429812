"""One of two processes that `test_deepspeed` starts: RANK PORT OUT. Writes what it has seen to OUT/RANK.pt."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from automagic_bnb import Automagic8bit

WORLD, STEPS = 2, 6
OPTIONS: dict[str, Any] = {"optim_bits": 32}
RATES = {"given": 1e-3, "found": None}


def network() -> nn.Module:
    """The same weights in every process; in one group 64 · 24 · 2 of them, which two processes halve."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 64, bias=False), nn.Tanh(), nn.Linear(64, 24, bias=False))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.1
    return model


def loss(model: nn.Module, step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return (model(torch.randn(8, 24, generator=generator)) - 1).square().mean()


def sharded(stage: int, rank: int, lr: float | None) -> torch.Tensor:
    """All weights in a row after some steps of `deepspeed.initialize`'s engine."""
    import deepspeed

    model = network()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=Automagic8bit(model.parameters(), lr=lr, **OPTIONS),
        config={
            "train_micro_batch_size_per_gpu": 8,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage},
        },
    )
    for step in range(STEPS):
        engine.backward(loss(engine, step, rank))
        engine.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def main(rank: int, port: str, out: Path) -> None:
    import deepspeed

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    deepspeed.init_distributed(dist_backend="gloo")
    seen = {f"{stage} {name}": sharded(stage, rank, lr) for stage in (1, 2) for name, lr in RATES.items()}
    torch.save(seen, out / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
