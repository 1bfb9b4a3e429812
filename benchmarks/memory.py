"""Optimizer state in bytes per parameter, on the shapes of real models; of ours by state too.

    python benchmarks/memory.py --dtypes bf16

On a GPU every tensor of a model is stepped, and the memory that further steps need besides is measured. On a CPU one
tensor of each shape is stepped, and weighs as many times as the model has it; ours are planned for the whole model
(`get_memory_efficiency_report` before the first step, on the meta device), after a check that small tensors then hold
just what was planned.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import measure
import torch
from peers import BLOCKWISE, LEAN, PEERS, WIDE, Peer, argument_parser, automagic, select
from tqdm import tqdm
from workloads import DTYPES, WORKLOADS, Workload, fill

OURS: dict[str, dict[str, Any]] = {
    "automagic8bit": {},
    "automagic8bit-forced": {"force_8bit": True},
    "automagic8bit-found": {"lr": None},
    "automagic8bit-lean": LEAN,
    "automagic8bit-lean-found": {**LEAN, "lr": None},
    "automagic8bit-wide": WIDE,
    "automagic8bit-wide-found": {**WIDE, "lr": None},
    "automagic8bit-blockwise": BLOCKWISE,
    "automagic8bit-blockwise-found": {**BLOCKWISE, "lr": None},
    "automagic8bit-ecc8": {"master": "ecc8"},
    "automagic-32bit": {"optim_bits": 32},
}
LEFT_OUT = {"torch-adamw-foreach", "torchao-adamw8bit-sr"}
"""They hold the same states as another one in the table."""
OPTIMIZERS = {name: Peer(name, functools.partial(automagic, **options), ours=True) for name, options in OURS.items()}
OPTIMIZERS |= {name: peer for name, peer in PEERS.items() if not peer.ours and name not in LEFT_OUT}
VECTORS = Workload(
    "vectors", "SDXL UNet, norms and biases", False, tuple(x for x in WORKLOADS["sdxl-unet"].shapes if len(x[1]) == 1)
)
MEASURED = {**WORKLOADS, VECTORS.name: VECTORS}
CHECKED_ELEMENTS = 2**14
"""What tensors are cut to for the check of the plans."""
FURTHER_STEPS = 10
"""So many that the low-rank step is among them."""
COUNTED = {
    "cuda": f"Counted from the tensors held after a step of every tensor; peaks are the worst of {FURTHER_STEPS} more.",
    "cpu": "Ours: planned for the whole model. The others: one tensor of each shape stepped, weighted by its count.",
}


def figures(peer: Peer, params: list[torch.nn.Parameter], workload: Workload) -> dict[str, Any]:
    """Bytes a parameter, of ours also by state, and on a GPU the bytes that further steps need besides.

    Args:
        params: all tensors of the workload, or on a CPU one of each shape.
    """
    device = params[0].device
    measure.free(device)
    if peer.ours and device.type == "cpu":
        return from_report(planned(peer, workload, params[0].dtype))
    optimizer: Any = peer.build(params)
    plan = optimizer.get_memory_efficiency_report() if peer.ours else None
    optimizer.step()
    if device.type == "cpu":
        held = measure.weighted_state_bytes(optimizer, params, [count for count, _ in workload.shapes])
        return {"bytes_per_parameter": held / workload.elements}
    with measure.PeakMemory(device) as peak:
        for _ in range(FURTHER_STEPS):
            optimizer.step()
    held = measure.state_bytes(optimizer)
    found = {"bytes_per_parameter": held / workload.elements, "extra_peak_bytes": peak.extra}
    return {**from_report(checked(plan, held)), **found} if plan else found


def planned(peer: Peer, workload: Workload, dtype: torch.dtype) -> dict[str, Any]:
    """The report of one of ours on the whole workload, from its shapes alone."""
    sample = workload.shrunk(CHECKED_ELEMENTS).one_of_each().make(dtype, torch.device("cpu"))
    fill(sample)
    optimizer: Any = peer.build(sample)
    plan = optimizer.get_memory_efficiency_report()
    optimizer.step()
    checked(plan, measure.state_bytes(optimizer))
    whole: Any = peer.build(workload.make(dtype, torch.device("meta")))
    return whole.get_memory_efficiency_report()


def checked(plan: dict[str, Any], held: int) -> dict[str, Any]:
    """The plan, if its total is what was then held.

    Raises:
        RuntimeError: it is not.
    """
    if plan["total_bytes"] != held:
        raise RuntimeError(f"planned {plan['total_bytes']} bytes of state, and {held} are held")
    return plan


def from_report(report: dict[str, Any]) -> dict[str, Any]:
    n = report["total_parameters"]
    return {
        "bytes_per_parameter": report["bytes_per_parameter"],
        "compression_ratio": report["compression_ratio"],
        "memory_saved_mb": report["memory_saved_mb"],
        "by_state": {name: size / n for name, size in report["states_breakdown"].items()},
    }


def attempt(peer: Peer, params: list[torch.nn.Parameter], workload: Workload) -> dict[str, Any] | str:
    """The figures, or the reason why there are none."""
    try:
        return figures(peer, params, workload)
    except Exception as e:
        if peer.ours:
            raise
        return f"n/a ({measure.reason(e)})"


# --- what is written --------------------------------------------------------------------------------------------------


def report(results: dict[str, Any]) -> str:
    """The whole run as Markdown."""
    parts = [f"`{results['command']}`", measure.describe(results["environment"]), results["counted"]]
    for dtype, rows in results["figures"].items():
        parts.append(f"### {dtype} parameters: bytes of state for each")
        parts.append(overview(results["workloads"], rows, "bytes_per_parameter", "{:.3f}", 1))
        # One line for each optimizer and reason, not one for each workload.
        missing = {f"- {peer}: {c}": None for peer, cells in rows.items() for c in cells.values() if isinstance(c, str)}
        parts += ["\n".join(missing)] if missing else []
        if "extra_peak_bytes" in str(rows):
            parts.append(f"### {dtype} parameters: peak memory of a step beyond what is held, MB")
            parts.append(overview(results["workloads"], rows, "extra_peak_bytes", "{:.1f}", 1e-6))
        for name, text in results["workloads"].items():
            ours = {peer: rows[peer][name] for peer in OURS if name in rows.get(peer, {})}
            if ours:
                parts += [f"### {text}, {dtype}: bytes a parameter by state", by_state(ours)]
    parts.append("\n".join(f"- {name}: {text}" for name, text in results["workloads"].items()))
    return "\n\n".join(parts)


def overview(workloads: dict[str, str], rows: dict[str, Any], key: str, form: str, scale: float) -> str:
    """One figure: a row for each optimizer, a column for each workload."""

    def cell(found: Any) -> str:
        if found is None or isinstance(found, str):
            return "n/a" if found else ""
        return form.format(found[key] * scale)

    table = [[peer, *(cell(cells.get(name)) for name in workloads)] for peer, cells in rows.items()]
    return measure.markdown_table(["optimizer", *workloads], table)


def by_state(ours: dict[str, dict[str, Any]]) -> str:
    """Our variants side by side: a row for each state, the largest first, and what comes of it."""
    largest: dict[str, float] = {}
    for found in ours.values():
        for name, size in found["by_state"].items():
            largest[name] = max(size, largest.get(name, 0.0))
    names = sorted(largest, key=lambda name: -largest[name])
    table = [[name, *(_size(found["by_state"].get(name)) for found in ours.values())] for name in names]
    lines = {
        "total": ("bytes_per_parameter", "{:.3f}"),
        "share in 8 bits": ("compression_ratio", "{:.1%}"),
        "MB saved against 32-bit Adam": ("memory_saved_mb", "{:,.1f}"),
    }
    table += [[title, *(form.format(x[key]) for x in ours.values())] for title, (key, form) in lines.items()]
    return measure.markdown_table(["state", *ours], table)


def _size(size: float | None) -> str:
    if size is None:
        return "–"
    return f"{size:.3f}" if size >= 5e-4 else "<0.001"


def main() -> int:
    args = argument_parser(__doc__ or "", "memory").parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    whole = device.type == "cuda"
    workloads = [w.shrunk(args.limit, args.scale or 1.0) for w in select(args.workloads, MEASURED, "workload")]
    peers = select(args.optimizers, OPTIMIZERS, "optimizer")
    results: dict[str, Any] = {
        "command": measure.command(),
        "environment": measure.environment(device),
        "counted": COUNTED[device.type],
        "workloads": {w.name: w.describe() for w in workloads},
        "figures": {dtype: {peer.name: {} for peer in peers} for dtype in args.dtypes},
    }
    with tqdm(total=len(workloads) * len(args.dtypes) * len(peers), file=sys.stderr) as bar:
        for dtype, rows in results["figures"].items():
            for workload in workloads:
                params = (workload if whole else workload.one_of_each()).make(DTYPES[dtype], device)
                fill(params)
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
