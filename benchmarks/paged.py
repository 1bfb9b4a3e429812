"""What paged states cost, and that more state than memory trains on.

    python benchmarks/paged.py

The states are measured in ordinary memory, paged and on the GPU, and paged with all of them on the host before each
step: the most that paging can cost. How fast the host gives them back is set by the bus between them. Bitsandbytes'
own paged AdamW8bit stands beside. Then PyTorch is allowed less memory than the states need: in ordinary memory they
fail, paged the run gives the same numbers as one that was never short. The GPU itself always has room for all.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import measure
import torch
from measure import Spread
from torch import Tensor

from automagic_bnb import Automagic, paged

SHAPE = (4096, 4096)
LR = 1e-4
LIMIT = 0.25
"""Share of the states that PyTorch may hold beside weights and gradients."""


def weights(count: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator("cuda").manual_seed(0)
    made = []
    for _ in range(count):
        p = torch.nn.Parameter(torch.randn(SHAPE, device="cuda", generator=generator).mul_(0.02).bfloat16())
        p.grad = torch.randn(SHAPE, device="cuda", generator=generator).mul_(1e-3).bfloat16()
        made.append(p)
    return made


def ours(parameters: list[torch.nn.Parameter], is_paged: bool) -> Automagic:
    return Automagic(parameters, lr=LR, optim_bits=8, is_paged=is_paged)


def states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [x for state in optimizer.state.values() for x in state.values() if paged.is_paged(x)]


def to_host(optimizer: torch.optim.Optimizer) -> None:
    paged.prefetch(states(optimizer), torch.cuda.current_stream(), to_host=True)
    torch.cuda.synchronize()


def time_one(count: int, steps: int, build: Callable[..., Any], on_host: bool = False, fetch: bool = True) -> Spread:
    """Wall milliseconds of a step."""
    device, p = torch.device("cuda"), weights(count)
    optimizer = build(p)
    before = functools.partial(to_host, optimizer) if on_host else None
    for _ in range(3):
        optimizer.step()
    prefetch = paged.prefetch
    if not fetch:  # to the host all the same
        paged.prefetch = lambda tensors, stream, to_host=False: prefetch(tensors, stream, True) if to_host else None
    try:
        times = [measure.time_steps(optimizer.step, device, 1, before=before).wall_ms[0] for _ in range(steps)]
    finally:
        paged.prefetch = prefetch
    return Spread.of(times)


def trains_on(count: int, is_paged: bool, limited: bool) -> list[Tensor] | str:
    """The weights after five steps, or what went wrong."""
    p = weights(count)
    total = torch.cuda.get_device_properties(0).total_memory
    room = torch.cuda.memory_allocated() + int(LIMIT * count * 4 * SHAPE[0] * SHAPE[1])
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(room / total if limited else 1.0)
    try:
        optimizer = ours(p, is_paged)
        for _ in range(5):
            optimizer.step()
        return [x.detach().clone() for x in p[:2]]
    except torch.cuda.OutOfMemoryError as e:
        return measure.reason(e)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def report(results: dict[str, Any]) -> str:
    rows = [[name, f"{s['median']:.2f}", f"{s['p10']:.2f}–{s['p90']:.2f}"] for name, s in results["times"].items()]
    limit = results["limit"]
    return "\n\n".join(
        [
            "# Paged states",
            f"`{results['command']}`",
            f"{results['count']} matrices of {SHAPE[0]} × {SHAPE[1]}, bf16: {results['parameters'] / 1e6:,.0f} M "
            f"parameters, of whose states {results['paged_bytes'] / 1e9:.2f} GB are paged. Wall time of a step.",
            measure.markdown_table(["state", "ms, median", "p10–p90"], rows),
            f"PyTorch allowed {LIMIT:.0%} of what the states need: in ordinary memory `{limit['ordinary']}`; "
            f"paged, five steps give {limit['paged']}.",
            measure.describe(results["environment"]),
        ]
    )


def room_for(count: int) -> int:
    """The bytes of state that are paged.

    Raises:
        SystemExit: the GPU has not twice as much to spare.
    """
    probe = ours(weights(1), is_paged=True)
    probe.step()
    needed = count * sum(x.nbytes for x in states(probe))
    if 2 * needed > torch.cuda.mem_get_info()[0]:
        raise SystemExit("the states would not fit this GPU's free memory twice; lower --count")
    return needed


def time_all(count: int, steps: int) -> dict[str, dict[str, float]]:
    timed: dict[str, tuple[Callable[..., Any], dict[str, bool]]] = {
        "ordinary memory": (functools.partial(ours, is_paged=False), {}),
        "paged, on the GPU": (functools.partial(ours, is_paged=True), {}),
        "paged, all on the host before the step": (functools.partial(ours, is_paged=True), {"on_host": True}),
        "the same, not fetched ahead": (functools.partial(ours, is_paged=True), {"on_host": True, "fetch": False}),
        "bitsandbytes AdamW8bit": (functools.partial(bnb.optim.AdamW8bit, lr=LR), {}),
        "bitsandbytes PagedAdamW8bit, on the GPU": (functools.partial(bnb.optim.PagedAdamW8bit, lr=LR), {}),
    }
    times = {}
    for name, (build, options) in timed.items():
        times[name] = dataclasses.asdict(time_one(count, steps, build, **options))
        measure.free(torch.device("cuda"))
        print(f"{name}: {times[name]['median']:.2f} ms", flush=True)
    return times


def short_of_memory(count: int) -> tuple[dict[str, str], bool]:
    """What becomes of a run in ordinary and in paged memory, and whether that is as it should be."""
    found = []
    for is_paged, limited in ((False, True), (True, True), (False, False)):
        found.append(trains_on(count, is_paged, limited))
        measure.free(torch.device("cuda"))
    ordinary, short, ample = found
    failed = isinstance(ordinary, str)
    same = not isinstance(short, str) and all(torch.equal(x, y) for x, y in zip(short, ample, strict=True))
    paged_run = "the bits of a run with ample memory" if same else f"something else: {short if failed else 'weights'}"
    return {"ordinary": str(ordinary) if failed else "no error: it had room", "paged": paged_run}, same and failed


def main() -> int:
    parser = argparse.ArgumentParser(description="Cost of paged optimizer states, and training on with too little room")
    parser.add_argument("--count", type=int, default=24, help="matrices (default: 24)")
    parser.add_argument("--steps", type=int, default=10, help="steps measured for each row (default: 10)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("managed memory needs a CUDA device")
    results: dict[str, Any] = {
        "command": measure.command(),
        "environment": measure.environment(torch.device("cuda")),
        "count": args.count,
        "parameters": args.count * SHAPE[0] * SHAPE[1],
        "paged_bytes": room_for(args.count),
        "times": time_all(args.count, args.steps),
    }
    results["limit"], as_expected = short_of_memory(args.count)
    measure.write_results(args.out, "paged", results, report(results))
    print(report(results))
    return 0 if as_expected else 1


if __name__ == "__main__":
    raise SystemExit(main())
