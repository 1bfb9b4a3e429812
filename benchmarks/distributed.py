"""Sharded against whole: how far a run over several processes is from one of a single process, and what a step takes.

    torchrun --nproc-per-node 4 benchmarks/distributed.py [--json FILE] [--rows 4096 --columns 4096 --matrices 8]

On GPUs over NCCL, one each; without any over gloo on the CPU. Every process also steps the whole parameters by itself,
on the same gradients: for each part of the rule, switched on alone, the first table shows the largest distance between
the two runs' weights, as a share of how far the weights went (rms of each tensor). The second has the time of a step of
a larger model, sharded, and of the same model whole on one process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from automagic_bnb import Automagic8bit

SHAPES = {
    "aligned": (256, 256),
    "embedding.weight": (37, 100),
    "bias": (300,),
    "conv": (6, 3, 5, 5),
    "few_rows": (3, 700),
    "block.lora_A": (8, 512),
    "block.lora_B": (512, 8),
}
"""With 2 and 4 processes: whole tiles to each, rows in the middle of a block, processes without rows, LoRA matrices."""

ALONE: dict[str, Any] = {
    "optim_bits": 32,
    "warmup_steps": 0,
    "edge_suppression": False,
    "frequency_penalty": 0.0,
    "torque": False,
    "came": False,
    "cautious": False,
    "background_regularization": False,
    "clip_threshold": 1e9,
    "lora": False,
}
"""None of the parts that look beyond an element."""
PARTS: dict[str, dict[str, Any]] = {
    "elements only": {},
    "block clipping": {"clip_threshold": 0.7},
    "background": {"background_regularization": True},
    "torque": {"torque": True},
    "confidence": {"came": True},
    "cautious": {"cautious": True},
    "mask, mean W": {"warmup_steps": 500, "spatial_awareness": False},
    "mask, spatial variance": {"warmup_steps": 500, "spatial_awareness": True, "detail_preservation": 1.5},
    "frequency filter": {"frequency_penalty": 0.05},
    "edges": {"edge_suppression": True},
    "8-bit codes": {"optim_bits": 8, "factored": False, "min_8bit_size": 0},
    "factored": {"optim_bits": 8, "factored": True, "min_8bit_size": 0},
    "factored, confidence": {"optim_bits": 8, "factored": True, "min_8bit_size": 0, "came": True},
    "bfloat16, rounded at random": {"dtype": torch.bfloat16},
    "percentile clipping": {"percentile_clipping": 20},
    "rate found": {"lr": None},
    "rank penalty": {"lora": None, "lora_rank_penalty": True, "rank_penalty_strength": 5.0},
    "all of the default": {"all": True},
    "all, rate found": {"all": True, "lr": None},
}
"""Each alone over `ALONE`; "all" stands for the class's own defaults."""


def parameters(dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: (torch.randn(shape, generator=generator) * 0.1).to(device, dtype) for name, shape in SHAPES.items()}


def sharded(p: Tensor, mesh: DeviceMesh) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(p, mesh, [Shard(0)]))


def run(start: dict[str, Tensor], options: dict[str, Any], steps: int, mesh: DeviceMesh | None) -> list[Tensor]:
    """The whole weights after some steps on gradients that are the same everywhere; sharded where there is a mesh."""
    named = {name: nn.Parameter(p.clone()) if mesh is None else sharded(p, mesh) for name, p in start.items()}
    optimizer = Automagic8bit(named.items(), **{"lr": 1e-3, **options})
    generator = torch.Generator().manual_seed(1)
    drift = {name: torch.randn(p.shape, generator=generator) for name, p in start.items()}
    for _ in range(steps):
        for name, p in named.items():
            grad = torch.randn(p.shape, generator=generator) * 0.01 + drift[name] * 0.01
            grad = grad.to(start[name])
            p.grad = grad if mesh is None else distribute_tensor(grad, mesh, [Shard(0)])
        optimizer.step()
    return [p.detach() if mesh is None else p.full_tensor().detach() for p in named.values()]


def distance(start: dict[str, Tensor], one: list[Tensor], other: list[Tensor]) -> tuple[float, bool]:
    """The largest rms distance of two runs over the way of the second, and whether all bits are equal."""
    shares = []
    for p, a, b in zip(start.values(), one, other, strict=True):
        way = (b.float() - p.float()).square().mean().sqrt()
        shares.append(float((a.float() - b.float()).square().mean().sqrt() / way))
    return max(shares), all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def exactness(mesh: DeviceMesh, device: torch.device, steps: int, names: list[str]) -> dict[str, dict[str, Any]]:
    found = {}
    for name in names:
        part = PARTS[name]
        options = {} if "all" in part else dict(ALONE)
        options |= {key: value for key, value in part.items() if key not in ("all", "dtype")}
        start = parameters(part.get("dtype", torch.float32), device)
        apart, equal = distance(start, run(start, options, steps, mesh), run(start, options, steps, None))
        found[name] = {"distance": apart, "equal": equal}
    return found


def step_time(mesh: DeviceMesh | None, device: torch.device, shape: tuple[int, int], count: int) -> float:
    """Median milliseconds of a step of so many bfloat16 matrices."""
    parameters = []
    for index in range(count):
        p = torch.randn(shape, generator=torch.Generator(device).manual_seed(index), device=device).bfloat16()
        parameters.append(nn.Parameter(p) if mesh is None else sharded(p, mesh))
        parameters[-1].grad = torch.ones_like(parameters[-1]) * 0.01
    optimizer, times = Automagic8bit(parameters), []
    for _ in range(13):
        if device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        begin = time.perf_counter()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS), help="of the rule (all)")
    parser.add_argument("--steps", type=int, default=22)
    parser.add_argument("--rows", type=int, default=4096 if torch.cuda.is_available() else 512)
    parser.add_argument("--columns", type=int, default=4096 if torch.cuda.is_available() else 512)
    parser.add_argument("--matrices", type=int, default=8)
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if cuda else "gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    shape = (arguments.rows, arguments.columns)
    report = {
        "processes": dist.get_world_size(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "steps": arguments.steps,
        "exactness": exactness(mesh, device, arguments.steps, arguments.parts),
        "matrices": [arguments.matrices, *shape],
        "sharded_ms": step_time(mesh, device, shape, arguments.matrices),
        "whole_ms": step_time(None, device, shape, arguments.matrices),
    }
    if dist.get_rank() == 0:
        print(f"{report['processes']} processes, {report['device']}, torch {report['torch']}")
        print(f"{'part':30} {'distance':>9}  bits")
        for name, row in report["exactness"].items():
            print(f"{name:30} {row['distance']:9.1e}  {'equal' if row['equal'] else ''}")
        print(
            f"a step of {arguments.matrices} x {shape}: {report['sharded_ms']:.2f} ms sharded, "
            f"{report['whole_ms']:.2f} ms whole"
        )
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
