"""One of two processes that `test_distributed` starts: RANK STORE OUT. Writes what it has seen to OUT/RANK.pt."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from automagic_bnb import Automagic8bit

WORLD = 2
ALIGNED = {"optim_bits": 32, "warmup_steps": 0, "edge_suppression": False, "frequency_penalty": 0}
"""Without the parts that look beyond a block; the shards of the model are whole blocks."""


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


def move(parameters: list[Any], opt: Any, steps: int, place: Callable[[Tensor], Tensor]) -> None:
    """Step on gradients that every process draws alike; `place` lays one out as its parameter is."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in parameters:
            p.grad = place(torch.randn(p.shape, generator=generator) * 0.01)
        opt.step()


def sharded(mesh: DeviceMesh, options: dict[str, Any], steps: int = 12) -> tuple[nn.Module, Any]:
    """A sharded model and its optimizer, stepped."""
    model = fully_shard(network(), mesh=mesh)
    opt = Automagic8bit(model.parameters(), lr=1e-3, **options)
    move(list(model.parameters()), opt, steps, lambda g: distribute_tensor(g, mesh, [Shard(0)]))
    return model, opt


def beside_whole(mesh: DeviceMesh, options: dict[str, Any]) -> dict[str, list[Tensor]]:
    """Weights at the start, after the sharded run and after the same run of the whole model."""
    model, _ = sharded(mesh, options)
    whole = network()
    move(list(whole.parameters()), Automagic8bit(whole.parameters(), lr=1e-3, **options), 12, lambda g: g)
    return {
        "start": [p.detach() for p in network().parameters()],
        "sharded": [p.full_tensor().detach() for p in model.parameters()],
        "whole": [p.detach() for p in whole.parameters()],
    }


def own_files(mesh: DeviceMesh, out: Path, rank: int) -> dict[str, Any]:
    """Checkpoints of one file for each process: resumed from the own file, and from the other's."""
    model, opt = sharded(mesh, {})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.save(opt.state_dict(), out / f"own{rank}.pt")
    dist.barrier()
    fresh, fresh_opt = sharded(mesh, {}, steps=0)
    for new, old in zip(fresh.parameters(), model.parameters(), strict=True):
        new.data.copy_(old.data)
    fresh_opt.load_state_dict(torch.load(out / f"own{rank}.pt", weights_only=True))
    for m, o in ((model, opt), (fresh, fresh_opt)):
        move(list(m.parameters()), o, 3, lambda g: distribute_tensor(g, mesh, [Shard(0)]))
    pairs = zip(model.parameters(), fresh.parameters(), strict=True)
    return {
        "equal": all(torch.equal(a.to_local(), b.to_local()) for a, b in pairs),
        "warnings": [str(w.message) for w in caught],
        "error": error_of(lambda: fresh_opt.load_state_dict(torch.load(out / f"own{1 - rank}.pt", weights_only=True))),
    }


def gathered_file(mesh: DeviceMesh, out: Path) -> str:
    """torch.distributed.checkpoint, which keeps one process's part of the state: what loading it says."""
    model, opt = sharded(mesh, {})
    save({"optimizer": get_optimizer_state_dict(model, opt)}, checkpoint_id=out / "dcp")
    fresh, fresh_opt = sharded(mesh, {}, steps=0)
    target = get_optimizer_state_dict(fresh, fresh_opt)
    load({"optimizer": target}, checkpoint_id=out / "dcp")
    return error_of(lambda: set_optimizer_state_dict(fresh, fresh_opt, target))


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as e:
        return str(e)
    return ""


def main(rank: int, store: str, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    seen = {
        "replicas": replicas(rank, seed=0),
        "replicas with seeds of their own": replicas(rank, seed=rank),
        "replicas of an optimizer for each parameter": replicas_apart(rank),
        "aligned": beside_whole(mesh, ALIGNED),
        "default": beside_whole(mesh, {}),
        "own files": own_files(mesh, out, rank),
        "gathered file": gathered_file(mesh, out),
    }
    torch.save(seen, out / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
