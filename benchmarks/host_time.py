"""What a LoRA's step costs the host: with its kernels launched on a GPU, or without a GPU not launched at all.

    python benchmarks/host_time.py

Without a GPU the tensors are tiny, for their number is what counts: the parameters and states are looked over, the
gradients' addresses gathered, the numbers of the step put together; in the place of what Triton has compiled stands a
function that does nothing. On a GPU: wall and host time of a whole step, launched by Triton's own call and directly, of
ours with a rate given and found and with `capturable=True`, and of torch's fused AdamW. And in both what one call of
`step_parameter` takes, as hooks of a backward pass make it.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: its kernels then take CPU tensors

import measure
from workloads import WORKLOADS, fill

from automagic_bnb import Automagic8bit

LIMIT = 512
"""Elements to which every tensor is cut without a GPU."""
FORMS: dict[str, dict[str, Any]] = {
    "a rate given": {"lr": 1e-4},
    "a rate found": {},
    "capturable=True": {"lr": 1e-4, "capturable": True},
}


def milliseconds(step: Any, params: list[torch.nn.Parameter], count: int) -> tuple[measure.Spread, measure.Spread]:
    """Wall and host time of a step, the device idle before; the first quarter and tenth steps are left out."""
    walls, hosts = [], []
    for number in range(count):
        for p in params:  # another tensor object, as zero_grad leaves them
            assert p.grad is not None
            p.grad = p.grad.detach()
        measure.synchronize(params[0].device)
        start = time.perf_counter()
        step()
        host = time.perf_counter()
        measure.synchronize(params[0].device)
        if number > count // 4 and (number + 1) % 10:
            hosts.append((host - start) * 1e3)
            walls.append((time.perf_counter() - start) * 1e3)
    return measure.Spread.of(walls), measure.Spread.of(hosts)


@torch.no_grad()  # as in a backward pass
def microseconds(opt: Automagic8bit, params: list[torch.nn.Parameter], rounds: int) -> measure.Spread:
    """Host time of `step_parameter`, one call for each tensor in each round; the first rounds are left out."""
    (group,), taken = opt.param_groups, []
    for number in range(rounds):
        for p in params:
            assert p.grad is not None
            p.grad = p.grad.detach()
        measure.synchronize(params[0].device)
        for p in params:
            start = time.perf_counter()
            opt.step_parameter(p, group)
            if number > rounds // 4 and (number + 1) % 10:
                taken.append((time.perf_counter() - start) * 1e6)
    return measure.Spread.of(taken)


def one_by_one(params: list[torch.nn.Parameter], rounds: int, **options: Any) -> Iterator[str]:
    for name, own in FORMS.items():
        if not own.get("capturable"):
            spread = microseconds(Automagic8bit(params, lora=True, **options, **own), params, rounds)
            yield f"one tensor a call, {name}: host {spread.median:.1f} µs ({spread.p10:.1f}–{spread.p90:.1f})"


def launch_nothing() -> None:
    """Let the host do all that it does for a launch on a GPU, up to Triton's own part, and launch nothing."""
    from automagic_bnb.kernels import launching, step

    class Nothing:
        def __getitem__(self, programs: Any) -> Callable[..., None]:
            return lambda *_: None

    type(step.step_kernel).run = lambda *_, **__: Nothing()
    launching.is_direct = lambda device: True


def on_gpu(params: list[torch.nn.Parameter], count: int) -> Iterator[tuple[str, Any]]:
    from automagic_bnb.kernels import launching

    yield "torch AdamW, fused", milliseconds(torch.optim.AdamW(params, lr=1e-4, fused=True).step, params, count)
    for direct in (False, True):
        launching.DIRECT = direct
        for name, options in FORMS.items():
            opt = Automagic8bit(params, lora=True, **options)
            how = "launched directly" if direct else "launched by Triton"
            yield f"{name}, {how}", milliseconds(opt.step, params, count)


def main() -> int:
    parser = argparse.ArgumentParser(description="Host time of a LoRA's step")
    parser.add_argument("--workload", choices=[name for name, w in WORKLOADS.items() if w.lora], default="flux-lora")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=20, help="calls of step_parameter for each tensor")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workload = WORKLOADS[args.workload]
    workload = workload if device.type == "cuda" else workload.shrunk(LIMIT)
    params = workload.make(torch.bfloat16, device)
    fill(params)
    if device.type == "cuda":
        for name, (wall, host) in on_gpu(params, args.steps):
            print(f"{name}: wall {wall.median:.3f} ms ({wall.p10:.3f}–{wall.p90:.3f}), host {host.median:.3f} ms")
        lines = one_by_one(params, args.rounds)
    else:
        launch_nothing()
        options: dict[str, Any] = {"lora_rank_penalty": False, "min_8bit_size": 0, "backend": "triton"}
        wall, _ = milliseconds(Automagic8bit(params, lr=1e-4, **options).step, params, args.steps)
        print(f"{wall.median:.3f} ms ({wall.p10:.3f}–{wall.p90:.3f}) for {workload.tensors} tensors")
        lines = one_by_one(params, args.rounds, **options)
    for line in lines:
        print(line)
    print(measure.describe(measure.environment(device)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
