"""How many weights have to be watched for a found rate: the rate, and what is learned with it, by how many are.

    python benchmarks/found_rate.py

A small language model over bytes (byte_model.py) on Python's standard library, without a learning rate.
`max_lr` is high, so that it is not what decides. `state.probe_stride` rests on this: the fewer are watched the higher
the rate, since the highest of noisy estimates is kept, by up to twice with a hundred thousand weights.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import byte_model
import measure
import torch
import training
from tqdm import tqdm

from automagic_bnb import state

MAX_LR = 1e-2


def run(stride: int, seed: int, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Weights watched, the rate found, and the validation loss, with one of so many blocks watched."""
    torch.manual_seed(seed)
    model = byte_model.Bytes(args.width, args.layers).to(device)
    state.PROBE_STRIDE, state.MAX_PROBED = stride, 2**62
    state.LEAST_STRIDE = min(stride, 16)
    optimizer = training.ours(model.parameters(), None, args.steps, max_lr=MAX_LR)
    loss = training.train(model, optimizer, seed, args, device)
    watched = sum(held["probe_start"].numel() for held in optimizer.state.values())
    return {"watched": watched, "rate": float(optimizer.param_groups[0]["auto_lr_rate"]), "loss": loss}


def report(results: dict[str, Any]) -> str:
    def row(runs: list[dict[str, float]]) -> list[str]:
        rates, losses = ", ".join(f"{x['rate']:.2e}" for x in runs), ", ".join(f"{x['loss']:.3f}" for x in runs)
        mean = statistics.fmean(x["loss"] for x in runs)
        return [f"{runs[0]['watched'] / 1e3:,.0f} thousand", rates, losses, f"{mean:.3f}"]

    rows = [[f"every {stride}th block" if int(stride) > 1 else "all", *row(x)] for stride, x in results["runs"].items()]
    return "\n\n".join(
        [
            "# How many weights have to be watched for a found rate",
            f"`{results['command']}`",
            f"{results['parameters']:,} parameters, {results['steps']} steps; one number for each seed.",
            measure.markdown_table(["watched", "weights", "rate found", "validation loss", "mean"], rows),
            measure.describe(results["environment"]),
        ]
    )


def main() -> int:
    about = "The rate found, and the loss, by how many weights are watched"
    parser = training.argument_parser(about, steps=100, width=192)
    parser.add_argument("--strides", nargs="+", type=int, default=[1, 4, 16, 64], help="default: 1 4 16 64")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs: dict[str, list[dict[str, float]]] = {}
    results = {**training.head(args, device), "runs": runs}
    todo = [(stride, seed) for seed in range(args.seeds) for stride in args.strides]
    for stride, seed in (bar := tqdm(todo)):
        bar.set_description(f"one block of {stride}, seed {seed}", refresh=False)
        runs.setdefault(str(stride), []).append(run(stride, seed, args, device))
        measure.write_results(args.out, "found_rate", results, report(results))
    print(report(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
