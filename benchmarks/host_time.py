"""What a LoRA's step costs the host: the time of a step whose kernels are not launched.

    python benchmarks/host_time.py

Needs no GPU. The tensors are tiny, for their number is what counts: the parameters and states are looked over, the
gradients' addresses gathered, the numbers of the step put together. What Triton takes for a launch is not in it.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: its kernels then take CPU tensors

import measure
import torch
from workloads import WORKLOADS, fill

from automagic_bnb import Automagic8bit

LIMIT = 512
"""Elements to which every tensor is cut."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Host time of a step whose kernels are not launched")
    parser.add_argument("--workload", choices=[name for name, w in WORKLOADS.items() if w.lora], default="flux-lora")
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    from automagic_bnb.kernels import step

    torch.set_num_threads(1)
    workload, cpu = WORKLOADS[args.workload].shrunk(LIMIT), torch.device("cpu")
    params = workload.make(torch.bfloat16, cpu)
    fill(params)
    optimizer = Automagic8bit(params, lr=1e-4, lora_rank_penalty=False, min_8bit_size=0, backend="triton")
    type(step.step_kernel).run = lambda *_, **__: None
    times = []
    for _ in range(args.steps):
        for p in params:  # another tensor object, as zero_grad leaves them
            assert p.grad is not None
            p.grad = p.grad.detach()
        start = time.perf_counter()
        optimizer.step()
        times.append((time.perf_counter() - start) * 1e3)
    spread = measure.Spread.of(times[args.steps // 4 :])
    print(f"{spread.median:.3f} ms ({spread.p10:.3f}–{spread.p90:.3f}) for {workload.tensors} tensors")
    print(measure.describe(measure.environment(cpu)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
