"""Time, memory and launches of one optimizer step: ours beside other people's, on the shapes of real models.

    python benchmarks/step_time.py --workloads flux-lora llama-1b --dtypes bf16 --optimizers 'automagic*' 'bnb*'

Before anything is timed, our kernels are held against the plain-torch rule on odd shapes; if they differ, nothing is
reported and the exit code is 1. An optimizer that cannot run is a row that says why. Gradients are there beforehand
and hold the same values at every step. Without a GPU the workloads are cut down and only the host clock is read: that
tries the program out and measures nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
import traceback
from typing import Any

import measure
import torch
from measure import PeakMemory, Spread
from parity import check_parity
from peers import BASELINE, PEERS, Peer, argument_parser, kernels_run, select
from tqdm import tqdm
from workloads import CPU_LIMIT, CPU_SCALE, DTYPES, WORKLOADS, Workload, fill

CYCLE = 10
"""Ours thresholds the singular values of LoRA matrices at every 10th step; such steps are kept apart."""
WARM_UP = 3
PASS_SECONDS = 6.0
"""A slow optimizer gets fewer steps (down to MIN_STEPS, or one cycle), so that a pass stays near this time."""
MIN_STEPS = 3
STEADY_SECONDS = 0.5
"""A fast one gets more, and a warm-up as long: a host's pace swings over tenths of a second, most at the start."""

Row = dict[str, Any]


def parity_report(peers: list[Peer], dtypes: list[str], device: torch.device) -> tuple[str, bool]:
    """A line for the report, and whether to go on."""
    under_test = [peer for peer in peers if peer.ours and peer.options.get("backend") != "torch"]
    if not under_test:
        return "Parity: none of our kernels is timed.", True
    if not kernels_run(device):
        return "Parity: not checked; without a GPU ours runs the plain-torch rule, not its kernels.", True
    failures = []
    for peer in under_test:
        for dtype in dtypes:
            try:
                failures += [f"{peer.name}, {dtype}: {text}" for text in check_parity(peer, DTYPES[dtype], device)]
            except ImportError as e:  # its rows will say so
                return f"Parity: not checked ({measure.reason(e)}).", True
            except Exception as e:
                traceback.print_exc()
                failures.append(f"{peer.name}, {dtype}: {measure.reason(e)}")
    if failures:
        return "\n  ".join(["PARITY FAILED: the kernels do not compute the rule; nothing is timed.", *failures]), False
    names = ", ".join(peer.name for peer in under_test)
    return f"Parity with the plain-torch rule ({', '.join(dtypes)}): {names}.", True


def measure_peer(peer: Peer, params: list[torch.nn.Parameter], workload: Workload, steps: int, steady: float) -> Row:
    """All figures of one optimizer on parameters that are drawn anew first."""
    device = params[0].device
    fill(params)
    measure.free(device)
    before = measure.allocated(device)
    optimizer = peer.build(params)
    first, cycle = (CYCLE, CYCLE) if workload.lora else (WARM_UP, 1)  # all is loaded and compiled by the first cycle
    for _ in range(first):
        optimizer.step()
    measure.synchronize(device)
    start = time.perf_counter()
    for _ in range(cycle):
        optimizer.step()
    measure.synchronize(device)
    seconds, done = (time.perf_counter() - start) / cycle, first + cycle
    count = affordable(max(steps, int(steady / seconds)), seconds, workload.lora)
    warm_up = affordable(int(steady / seconds), seconds, workload.lora) if steady else 0
    held = measure.allocated(device) - before
    gradients = [p.grad for p in params]

    def renew_gradients() -> None:  # other tensor objects at each step, as zero_grad(set_to_none=True) leaves them
        for p, g in zip(params, gradients, strict=True):
            assert g is not None
            p.grad = g.detach()

    with PeakMemory(device) as peak:
        times = measure.time_steps(optimizer.step, device, count, warm_up, before=renew_gradients)
    parameters = sum(p.numel() for p in params)
    state = measure.state_bytes(optimizer)
    row: Row = {
        "steps": count,
        "batch_wall_ms": times.batch_ms or None,
        "state_bytes": state,
        "state_bytes_per_parameter": state / parameters,
        "held_bytes": held if device.type == "cuda" else None,
        "extra_peak_bytes": peak.extra,
        "parameter_bytes": sum(p.nbytes for p in params),
        "bytes_moved": measure.bytes_moved(optimizer, params, peer.frozen_mask),
        "launches": measure.launches(optimizer.step, device),
    }
    for kind, ms in (("gpu", times.gpu_ms), ("wall", times.wall_ms)):
        if ms:
            ordinary = [x for i, x in enumerate(ms, done + 1) if i % CYCLE] if workload.lora else ms
            row[f"{kind}_ms"] = dataclasses.asdict(Spread.of(ordinary))
            row[f"{kind}_ms_cycle_mean"] = sum(ms) / len(ms) if workload.lora else None
    return row


def affordable(steps: int, seconds: float, lora: bool) -> int:
    """As many steps as asked for, or as fit PASS_SECONDS at `seconds` each; whole cycles for LoRA."""
    count = max(MIN_STEPS, min(steps, int(PASS_SECONDS / seconds)))
    return -(-count // CYCLE) * CYCLE if lora else count


COLUMNS = [
    "optimizer",
    "GPU ms",
    "wall ms (p10–p90)",
    "speed vs bnb AdamW8bit",
    "state B/param",
    "extra peak MB (% of θ)",
    "launches",
    "GB moved",
    "of copy rate",
]
CYCLE_COLUMN = f"wall ms, mean of {CYCLE} steps"


def table(rows: dict[str, Row], rate: float, lora: bool) -> str:
    """The rows of one workload and dtype as Markdown."""
    baseline = rows.get(BASELINE, {}).get("wall_ms", {}).get("median")
    header = [*COLUMNS[:3], CYCLE_COLUMN, *COLUMNS[3:]] if lora else COLUMNS
    lines = []
    for name, row in rows.items():
        if "error" in row:
            lines.append([name, "n/a", *[""] * (len(header) - 2)])
            continue
        wall, gpu, extra, launches = row["wall_ms"], row.get("gpu_ms"), row["extra_peak_bytes"], row["launches"]
        seconds = (gpu or wall)["median"] / 1e3
        cells = [
            name,
            f"{gpu['median']:.2f}" if gpu else "–",
            f"{wall['median']:.2f} ({wall['p10']:.2f}–{wall['p90']:.2f})",
            *([f"{row['wall_ms_cycle_mean']:.2f}"] if lora else []),
            f"{baseline / wall['median']:.2f}×" if baseline else "–",
            f"{row['state_bytes_per_parameter']:.2f}",
            f"{extra / 1e6:.1f} ({extra / row['parameter_bytes']:.1%})" if extra is not None else "–",
            str(launches["kernels"] + launches["copies"]) if launches else "–",
            f"{row['bytes_moved'] / 1e9:.3f}",
            f"{row['bytes_moved'] / seconds / rate:.1%}",
        ]
        lines.append(cells)
    missing = [f"- {name}: n/a ({row['error']})" for name, row in rows.items() if "error" in row]
    return "\n\n".join([measure.markdown_table(header, lines), *(["\n".join(missing)] if missing else [])])


LEGEND = (
    "GPU: CUDA events around each step of an uninterrupted run; wall: host clock around one step, device idle before "
    "and after; medians. State: tensors held. Extra: the step's peak memory beyond what is held, worst of all timed "
    "steps. Launches: kernels, copies and fills. GB moved: g in, θ and every state in and out, counted from the layout "
    "(after warm-up the learning-rate mask is only read); its last column is that over GPU time, against a "
    "device-to-device copy."
)


def report(results: dict[str, Any]) -> str:
    """The whole run as Markdown."""
    rate = results["copy_bytes_per_second"]
    parts = [
        f"`{results['command']}`",
        measure.describe(results["environment"]),
        f"Copy rate {rate / 1e9:,.0f} GB/s. {results['parity']}",
        LEGEND,
    ]
    for run in results["runs"]:
        parts += [f"### {run['description']}, {run['dtype']}", table(run["optimizers"], rate, run["lora"])]
    return "\n\n".join(parts)


def arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__ or "", "step_time")
    parser.add_argument(
        "--steps", type=int, default=15, help="timed steps; more where they are short (LoRA: rounded up to whole tens)"
    )
    parser.add_argument("--quick", action="store_true", help="5 timed steps, however short, and next to no warm-up")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no measurement later than this")
    args = parser.parse_args()
    if args.steps < MIN_STEPS:
        parser.error(f"--steps must be at least {MIN_STEPS}")
    args.steps, args.steady = (5, 0.0) if args.quick else (args.steps, STEADY_SECONDS)
    return args


def main() -> int:
    args = arguments()
    deadline = time.monotonic() + 60 * args.minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":  # a whole model would take hours
        args.limit, args.scale = args.limit or CPU_LIMIT, args.scale or CPU_SCALE
    workloads = [w.shrunk(args.limit, args.scale or 1.0) for w in select(args.workloads, WORKLOADS, "workload")]
    peers = select(args.optimizers, PEERS, "optimizer")
    parity, agreed = parity_report(peers, args.dtypes, device)
    print(parity, flush=True)
    if not agreed:
        return 1
    results: dict[str, Any] = {
        "command": measure.command(),
        "environment": measure.environment(device),
        "copy_bytes_per_second": measure.copy_rate(device),
        "parity": parity,
        "runs": [],
    }
    with tqdm(total=len(workloads) * len(args.dtypes) * len(peers), file=sys.stderr) as bar:
        for workload in workloads:
            for dtype in args.dtypes:
                run: dict[str, Any] = {
                    "workload": workload.name,
                    "description": workload.describe(),
                    "lora": workload.lora,
                    "dtype": dtype,
                    "optimizers": {},
                }
                results["runs"].append(run)
                params = workload.make(DTYPES[dtype], device)
                for peer in peers:
                    bar.set_description(f"{workload.name} {dtype} {peer.name}", refresh=False)
                    if time.monotonic() > deadline:
                        run["optimizers"][peer.name] = {"error": f"not started within {args.minutes:g} minutes"}
                    else:
                        run["optimizers"][peer.name] = attempt(peer, params, workload, args.steps, args.steady)
                    measure.write_results(args.out, args.name, results, report(results))
                    bar.update()
                del params
                measure.free(device)
    print(report(results))
    return 0


def attempt(peer: Peer, params: list[torch.nn.Parameter], workload: Workload, steps: int, steady: float) -> Row:
    """The figures, or the reason why there are none."""
    try:
        return measure_peer(peer, params, workload, steps, steady)
    except Exception as e:
        if peer.ours and not isinstance(e, ImportError):
            traceback.print_exc()
        return {"error": measure.reason(e)}


if __name__ == "__main__":
    sys.exit(main())
