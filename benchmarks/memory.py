"""Optimizer state in bytes per parameter, on the shapes of real models, counted from the tensors held after one step.

    python benchmarks/memory.py --dtypes bf16

On a GPU every tensor of a model is stepped. On a CPU one tensor of each shape is, and weighs as many times as the model
has it; of a shape above --limit elements a shorter one stands in, which the table says.
"""

from __future__ import annotations

import sys
from typing import Any

import measure
import torch
from peers import PEERS, Peer, argument_parser, select
from tqdm import tqdm
from workloads import DTYPES, WORKLOADS, Workload, fill

CPU_LIMIT = 2**20
LEFT_OUT = {
    "automagic8bit-after-warmup",
    "automagic8bit-factored-after-warmup",
    "automagic8bit-torch-backend",
    "torch-adamw-foreach",
    "torchao-adamw8bit-sr",
}
"""They hold the same states as another one in the table."""


def state_per_parameter(peer: Peer, params: list[torch.nn.Parameter], workload: Workload) -> float:
    """Bytes of state for each parameter of the workload; `params` are all its tensors or one of each shape."""
    fill(params)
    measure.free(params[0].device)
    optimizer = peer.build(params)
    optimizer.step()
    if len(params) == workload.tensors:
        return measure.state_bytes(optimizer) / workload.elements
    counts = [count for count, _ in workload.shapes]
    return measure.weighted_state_bytes(optimizer, params, counts) / workload.elements


def attempt(peer: Peer, params: list[torch.nn.Parameter], workload: Workload) -> float | str:
    """The figure, or the reason why there is none."""
    try:
        return state_per_parameter(peer, params, workload)
    except Exception as e:
        return f"n/a ({measure.reason(e)})"


def report(results: dict[str, Any]) -> str:
    """The whole run as Markdown."""
    parts = [
        f"`{results['command']}`",
        measure.describe(results["environment"]),
        f"Bytes of optimizer state per parameter, {results['counted']}.",
    ]
    for dtype, rows in results["bytes_per_parameter"].items():
        names = list(results["workloads"])
        table = [
            [peer, *[f"{c:.3f}" if isinstance(c, float) else "n/a" if c else "" for c in map(cells.get, names)]]
            for peer, cells in rows.items()
        ]
        parts += [f"### {dtype} parameters", measure.markdown_table(["optimizer", *names], table)]
        # One line for each optimizer and reason, not one for each workload.
        missing = {f"- {peer}: {c}": None for peer, cells in rows.items() for c in cells.values() if isinstance(c, str)}
        parts += ["\n".join(missing)] if missing else []
    parts.append("\n".join(f"- {name}: {text}" for name, text in results["workloads"].items()))
    return "\n\n".join(parts)


def main() -> int:
    args = argument_parser(__doc__ or "", "memory").parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    whole = device.type == "cuda"
    limit = args.limit if whole else args.limit or CPU_LIMIT
    workloads = [w.shrunk(limit, args.scale or 1.0) for w in select(args.workloads, WORKLOADS, "workload")]
    peers = [peer for peer in select(args.optimizers, PEERS, "optimizer") if peer.name not in LEFT_OUT]
    results: dict[str, Any] = {
        "command": measure.command(),
        "environment": measure.environment(device),
        "counted": "every tensor stepped" if whole else "one tensor of each shape stepped, weighted by its count",
        "workloads": {w.name: w.describe() for w in workloads},
        "bytes_per_parameter": {dtype: {peer.name: {} for peer in peers} for dtype in args.dtypes},
    }
    with tqdm(total=len(workloads) * len(args.dtypes) * len(peers), file=sys.stderr) as bar:
        for dtype, rows in results["bytes_per_parameter"].items():
            for workload in workloads:
                params = (workload if whole else workload.one_of_each()).make(DTYPES[dtype], device)
                for peer in peers:
                    bar.set_description(f"{workload.name} {dtype} {peer.name}", refresh=False)
                    rows[peer.name][workload.name] = attempt(peer, params, workload)
                    bar.update()
                measure.write_results(args.out, args.name, results, report(results))
                del params
                measure.free(device)
    print(report(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
