"""What a step costs on the CPU: bitsandbytes' AdamW8bit, the plain rule, and the rule as Numba compiles it.

    python benchmarks/cpu_step.py > benchmarks/results/cpu_step.md

Two workloads: a LoRA of the model of `automagic-bnb demo` with its rate found, and a matrix of a million bfloat16
weights. The steps of all optimizers take turns in one process, on one core, and the least time of each counts, in
seconds of the processor: so it matters little what else the machine does. The first compiled step is timed in processes
of its own, without and with what Numba keeps on disk.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from torch.nn import Parameter

from automagic_bnb import Automagic8bit
from automagic_bnb.command import demo_model

FIRST_STEP = """
import time, torch
from automagic_bnb import Automagic8bit
p = torch.nn.Parameter(torch.randn(64, 64))
p.grad = torch.randn(64, 64)
Automagic8bit([p], lr=1e-3, backend="torch").step()  # torch's own imports are not to count
optimizer = Automagic8bit([p], lr=1e-3, backend="numba")
wall, cpu = time.perf_counter(), time.process_time()
optimizer.step()
print(time.perf_counter() - wall, time.process_time() - cpu)
"""
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "bitsandbytes AdamW8bit": lambda params, **options: bitsandbytes.optim.AdamW8bit(params, lr=1e-3),
    "plain PyTorch": lambda params, **options: Automagic8bit(params, backend="torch", **options),
    "compiled by Numba": lambda params, **options: Automagic8bit(params, backend="numba", **options),
}


def demo() -> list[Parameter]:
    """The matrices of its LoRA of rank 8, 14 of 4,096 float32 each."""
    model = demo_model.with_lora(demo_model.make_base(0, torch.device("cpu")), rank=8, seed=0)
    return demo_model.trainable(model)


def million() -> list[Parameter]:
    return [Parameter(torch.randn(1024, 1024, dtype=torch.bfloat16))]


def least_times(make: Callable[[], list[Parameter]], steps: int, options: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of a step by optimizer."""
    parameters = {name: make() for name in OPTIMIZERS}
    optimizers = {name: build(parameters[name], **options) for name, build in OPTIMIZERS.items()}
    least = dict.fromkeys(OPTIMIZERS, float("inf"))
    for done in range(steps):
        for name, optimizer in optimizers.items():
            for p in parameters[name]:
                p.grad = torch.randn_like(p) * 1e-3
            start = time.process_time()
            optimizer.step()
            if done:
                least[name] = min(least[name], 1e3 * (time.process_time() - start))
        print(f"\rstep {done + 1} of {steps}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return least


def first_steps() -> list[tuple[float, float]]:
    """Seconds, and seconds of the processor, of a process's first step: compiled, then loaded."""
    with tempfile.TemporaryDirectory() as folder:
        environment, found = {**os.environ, "NUMBA_CACHE_DIR": folder}, []
        for what in ("compiling", "loading"):
            print(what, file=sys.stderr, flush=True)
            done = subprocess.run([sys.executable, "-c", FIRST_STEP], env=environment, capture_output=True, check=True)
            wall, cpu = map(float, done.stdout.split())
            found.append((wall, cpu))
        return found


def processor() -> str:
    """What it is called, as far as the system says."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Times of a step on the CPU")
    parser.add_argument("--steps", type=int, default=60, help="of the demo; a quarter of the others")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = {
        "the demo's LoRA, 57,344 weights, fp32": least_times(demo, args.steps, {}),
        "1,048,576 weights, bf16": least_times(million, max(args.steps // 4, 3), {"lr": 1e-3}),
        "the same, `mask_bits=8, mean_bits=32`": least_times(
            million, max(args.steps // 4, 3), {"lr": 1e-3, "mask_bits": 8, "mean_bits": 32}
        ),
        "the same, `factored=False`": least_times(million, max(args.steps // 4, 3), {"lr": 1e-3, "factored": False}),
    }
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "bitsandbytes", "numba"))
    print("# A step on the CPU\n")
    print(f"`python benchmarks/cpu_step.py --steps {args.steps}`; Python {platform.python_version()}, {versions}, on")
    print(f"{processor()}. The least time of a step in ms of one core, all optimizers in turn in one process.\n")
    print("| workload | " + " | ".join(OPTIMIZERS) + " | compiled to AdamW8bit |")
    print("|---" * (len(OPTIMIZERS) + 2) + "|")
    for name, times in rows.items():
        adamw, *_, compiled = times.values()
        print(f"| {name} | " + " | ".join(f"{x:.2f}" for x in times.values()) + f" | {compiled / adamw:.2f}× |")
    (cold, cold_cpu), (warm, warm_cpu) = first_steps()
    print(f"\nThe first compiled step: {cold:.1f} s ({cold_cpu:.1f} s of the processor) where Numba compiles,")
    print(f"{warm:.2f} s ({warm_cpu:.2f} s) where it finds on disk what it compiled before.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
