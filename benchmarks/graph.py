"""Captured steps on a GPU: that replays equal called steps, what they take, and what looking at addresses costs.

    python benchmarks/graph.py [--tensors 988]

A minute on one GPU. A LoRA of `--tensors` matrices of rank 16 in bfloat16 is stepped by calls and by replays of one
CUDA graph (backward pass and step), under a changing lr and with a found rate; all bits of parameters and states are
compared. Prints a line for each, and fails where they differ.
"""

from __future__ import annotations

import argparse
import time
import traceback
from typing import Any

import measure
import torch

from automagic_bnb import Automagic8bit
from automagic_bnb.addresses import Places

STEPS, WARM = 24, 3


def model(tensors: int, dtype: torch.dtype = torch.bfloat16) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 3072) if i % 2 else (3072, 16) for i in range(tensors)]
    made = [(torch.randn(s, generator=generator) * 0.02).to("cuda", dtype) for s in shapes]
    return [torch.nn.Parameter(x) for x in made]


def trained(replays: bool, tensors: int, options: dict[str, Any]) -> tuple[list[Any], Automagic8bit, Any]:
    """`STEPS` steps on gradients of a quadratic whose targets change from step to step."""
    options = {"seed": 0, **options}
    parameters, given = model(tensors), options.get("lr")
    rate = None if given is None else torch.tensor(given, device="cuda")
    opt = Automagic8bit(parameters, **{**options, "lr": rate}, lora=True, min_8bit_size=0, capturable=True)
    target = torch.zeros((), device="cuda")

    def work() -> None:
        opt.zero_grad(set_to_none=True)
        torch.stack([(p.float() * (p.float() - target)).sum() for p in parameters]).sum().backward()
        opt.step()

    graph = None
    side = torch.cuda.Stream()
    for step in range(STEPS):
        target.fill_(0.01 * ((step * 7) % 5 - 2))
        if rate is not None:
            rate.fill_(given * (1 - step / (2 * STEPS)))
        if graph is not None:
            graph.replay()
        elif replays and step == WARM:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                work()
            graph.replay()
        else:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                work()
            torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    return parameters, opt, graph


def differences(tensors: int, options: dict[str, Any]) -> list[str]:
    """The places where called and replayed steps differ."""
    called, replayed = (trained(replays, tensors, options) for replays in (False, True))
    states = [run[1].state_dict()["state"] for run in (called, replayed)]
    found = [f"parameter {i}" for i, (p, q) in enumerate(zip(called[0], replayed[0], strict=True)) if not same(p, q)]
    for i, state in states[0].items():
        found += [f"{name} of {i}" for name, value in state.items() if not same(value, states[1][i][name])]
    return found


def same(x: Any, y: Any) -> bool:
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def step_times(tensors: int) -> tuple[measure.Spread, measure.Spread]:
    """ms of a called step, wall, and of a replayed one; the step alone is in the graph."""
    parameters = model(tensors)
    for p in parameters:
        p.grad = torch.full_like(p, 1e-3)
    opt = Automagic8bit(parameters, lr=torch.tensor(1e-4, device="cuda"), lora=True, min_8bit_size=0, capturable=True)
    for _ in range(WARM):
        opt.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    times = []
    for work in (opt.step, graph.replay):
        taken = []
        for _ in range(60):
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            torch.cuda.synchronize()
            taken.append((time.perf_counter() - start) * 1e3)
        times.append(measure.Spread.of(taken[20:]))
    return times[0], times[1]


def call_time(tensors: int) -> measure.Spread:
    """µs that the host takes for `step_parameter` of one tensor, as hooks of a backward pass call it."""
    parameters = model(tensors)
    for p in parameters:
        p.grad = torch.full_like(p, 1e-3)
    opt = Automagic8bit(parameters, lr=1e-4, lora=True, min_8bit_size=0)
    group, taken = opt.param_groups[0], []
    for number in range(8):
        torch.cuda.synchronize()
        for p in parameters:
            start = time.perf_counter()
            opt.step_parameter(p, group)
            if number >= WARM:
                taken.append((time.perf_counter() - start) * 1e6)
    return measure.Spread.of(taken)


def scaler_waits() -> bool:
    """Whether a step under GradScaler waits for the GPU."""
    parameters = model(4, torch.float32)  # of bfloat16 gradients torch's scaler cannot tell
    opt = Automagic8bit(parameters, lr=1e-3, lora=True, min_8bit_size=0, capturable=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    for bad in (False, True):
        opt.zero_grad()
        scaler.scale(torch.stack([p.float().square().sum() for p in parameters]).sum()).backward()
        if bad:
            parameters[0].grad[0, 0] = float("inf")
        before = [p.detach().clone() for p in parameters]
        torch.cuda.set_sync_debug_mode("error" if bad else "default")
        try:
            scaler.step(opt)
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            traceback.print_exc()  # where it waits
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
        scaler.update()
        assert all(map(torch.equal, before, parameters)) == bad, "an infinity changes nothing, all else something"
    return False


def address_time(tensors: int) -> float:
    """µs to see that so many tensors lie where they did."""
    places = Places([torch.zeros(64, device="cuda") for _ in range(tensors)])
    taken = []
    for _ in range(200):
        start = time.perf_counter()
        assert places.are_current()
        taken.append((time.perf_counter() - start) * 1e6)
    return measure.Spread.of(taken).median


def main() -> int:
    parser = argparse.ArgumentParser(description="Replayed steps against called ones, on a GPU")
    parser.add_argument("--tensors", type=int, default=988)
    args = parser.parse_args()
    failed = False
    for options in ({"lr": 1e-3}, {"lr": None}, {"lr": 1e-3, "percentile_clipping": 50}):
        found = differences(min(args.tensors, 64), options)
        failed |= bool(found)
        print(f"{options}: {STEPS} steps, {'replays equal calls' if not found else f'DIFFERENT: {found[:5]}'}")
    waits = scaler_waits()
    failed |= waits
    print("GradScaler: " + ("WAITS" if waits else "nothing waits, an infinity changes nothing"))
    called, replayed = step_times(args.tensors)
    print(f"{args.tensors} tensors, called {called.median:.3f} ms ({called.p10:.3f}–{called.p90:.3f}) wall")
    print(f"{args.tensors} tensors, replayed {replayed.median:.3f} ms ({replayed.p10:.3f}–{replayed.p90:.3f}) wall")
    call = call_time(args.tensors)
    print(f"one tensor a call, {call.median:.0f} µs ({call.p10:.0f}–{call.p90:.0f}) of the host")
    print(f"addresses of 1,000 tensors: {address_time(1000):.1f} µs")
    print(measure.describe(measure.environment(torch.device("cuda"))))
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
