"""Time of the kernels under other choices of their launch: registers a thread, and the rank penalty's warps and spans.

    python benchmarks/kernel_variants.py registers
    python benchmarks/kernel_variants.py rank-penalty

What benchmarks/NOTES.md says of these choices comes from here. GPU time of consecutive steps, median. Without a GPU the
workloads are cut down and run in Triton's interpreter (TRITON_INTERPRET=1): that tries the program out and measures
nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterator
from typing import Any

import measure
import torch
from peers import BLOCKWISE, FOREVER, LEAN
from tqdm import tqdm
from workloads import WORKLOADS, Workload, fill

from automagic_bnb import Automagic8bit

REGISTERS = (64, 72, 80, 88, 96, 104, 112, 120, 128, 144, 168)
STORAGES: dict[str, dict[str, Any]] = {"default": {}, "lean": LEAN, "block-wise": BLOCKWISE}
TILES = [(span, warps) for warps in (1, 2, 4, 8) for span in (32, 64, 128, 256)]
TINY_ELEMENTS, TINY_SHARE = 1024, 0.005
"""What is left of a workload in the interpreter."""


def optimizer(workload: Workload, device: torch.device, warm: bool, options: dict[str, Any]) -> Automagic8bit:
    params = workload.make(torch.bfloat16, device)
    fill(params)
    steps = FOREVER if warm else 1
    return Automagic8bit(params, lr=1e-4, warmup_steps=steps, lora=workload.lora, backend="triton", **options)


def median_ms(step: measure.Step, device: torch.device, count: int) -> float:
    times = measure.time_steps(step, device, count, warm_up=2)
    return statistics.median(times.gpu_ms or times.wall_ms)


def registers(workload: Workload, device: torch.device, count: int, numbers: list[int]) -> Iterator[list[str]]:
    """A row for each storage and phase: milliseconds by registers a thread."""
    from automagic_bnb.kernels import step

    for name, options in STORAGES.items():
        for warm in (True, False) if options.get("mask_bits", 4) else (False,):
            key, row = ({"default": "factored", "lean": "lean", "block-wise": "8bit"}[name], warm), []
            chosen = step._MAX_REGISTERS[key]
            opt = optimizer(workload, device, warm, options)
            opt.step()  # frozen from the second on
            for number in tqdm(numbers, desc=f"{name}, warm={warm}"):
                step._MAX_REGISTERS[key] = number
                row.append(f"{median_ms(opt.step, device, count):.2f}{' *' if number == chosen else ''}")
            step._MAX_REGISTERS[key] = chosen
            found = [f"{name}, {'warm-up' if warm else 'mask frozen'}", *row]
            tqdm.write(" | ".join(found))
            yield found
            del opt
            measure.free(device)


def rank_penalty(workload: Workload, device: torch.device, count: int) -> Iterator[list[str]]:
    """A row for each choice: milliseconds of the low-rank step of all matrices."""
    from automagic_bnb.kernels import low_rank

    opt = optimizer(workload, device, warm=True, options=BLOCKWISE)
    opt.step()
    assert opt._fused._plan is not None
    due = [m for m in opt._fused._plan.matrices if len(m.rows)]
    rank = int(max(m.ranks.max() for m in due))
    chosen = low_rank.TILES[rank]

    def shrink() -> None:
        for matrices in due:
            matrices.bucket.steps[:] = 10
            matrices.shrink(opt.param_groups)

    for span, warps in tqdm(TILES, desc=workload.name):
        low_rank.TILES[rank] = (span, warps)
        try:
            ms = f"{median_ms(shrink, device, count):.2f}"
        except Exception as e:  # more registers or shared memory than there are
            ms = measure.reason(e)
        yield [f"span {span}, {warps} warps{' *' if (span, warps) == chosen else ''}", ms]
    low_rank.TILES[rank] = chosen


def main() -> int:
    parser = argparse.ArgumentParser(description="Time of the kernels under other choices of their launch")
    parser.add_argument("what", choices=["registers", "rank-penalty"])
    parser.add_argument("--workload", choices=list(WORKLOADS), help="default: llama-1b or flux-lora")
    parser.add_argument("--steps", type=int, default=10, help="steps timed for each choice (default: 10)")
    parser.add_argument("--registers", type=int, nargs="+", default=REGISTERS, help="a thread; what to try")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("the kernels need a CUDA device, or TRITON_INTERPRET=1 to try this program out")
    workload = WORKLOADS[args.workload or ("llama-1b" if args.what == "registers" else "flux-lora")]
    if device.type == "cpu":
        workload = workload.shrunk(TINY_ELEMENTS, TINY_SHARE)
    if args.what == "registers":
        table = measure.markdown_table(
            ["ms by registers; * chosen", *map(str, args.registers)],
            registers(workload, device, args.steps, args.registers),
        )
    else:
        table = measure.markdown_table(["* chosen", "ms"], rank_penalty(workload, device, args.steps))
    print(
        f"`{measure.command()}`\n\n{workload.describe()}\n\n{table}\n\n{measure.describe(measure.environment(device))}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
