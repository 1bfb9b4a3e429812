"""One of two processes that `test_distributed` starts: RANK STORE OUT. Writes what it has seen to OUT/RANK.pt."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from automagic_bnb import Automagic8bit

WORLD = 2


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same weights in every process."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.Tanh(), nn.Linear(128, 64, bias=False))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.1
    return model.to(dtype)


def replicas(rank: int, seed: int) -> list[Tensor]:
    """Weights and codes after 20 steps of DistributedDataParallel on data and a global seed of this rank's own."""
    torch.manual_seed(17 * rank)
    model = nn.parallel.DistributedDataParallel(network(torch.bfloat16))
    opt = Automagic8bit(model.parameters(), lr=1e-3, seed=seed)
    for _ in range(20):
        opt.zero_grad()
        model(torch.randn(8, 64, dtype=torch.bfloat16)).square().mean().backward()
        opt.step()
    held = [v for p in model.parameters() for v in opt.state[p].values() if isinstance(v, Tensor)]
    return [*(p.detach() for p in model.parameters()), *held]


def replicas_apart(rank: int) -> list[Tensor]:
    """Weights after 10 steps with an optimizer for each parameter, made while the generators hold different things."""
    torch.manual_seed(17 * rank)
    model = nn.parallel.DistributedDataParallel(network(torch.bfloat16))
    opts = [Automagic8bit([p], lr=1e-3) for p in model.parameters()]
    for _ in range(10):
        model(torch.randn(8, 64, dtype=torch.bfloat16)).square().mean().backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
    return [p.detach() for p in model.parameters()]


def main(rank: int, store: str, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    seen = {
        "replicas": replicas(rank, seed=0),
        "replicas with seeds of their own": replicas(rank, seed=rank),
        "replicas of an optimizer for each parameter": replicas_apart(rank),
    }
    torch.save(seen, out / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
