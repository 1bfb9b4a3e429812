"""What is learned in a given number of steps: ours and bitsandbytes' AdamW8bit, each at several rates.

    python benchmarks/training.py

A small language model over bytes (byte_model.py) on Python's standard library; warm-up of 20 steps, then
linear decay to a tenth. Each optimizer is shown at every rate tried, so that its best is seen and how much lies beside
it. Ours is also given none: it then finds its own, within its default bounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import byte_model
import measure
import torch
from tqdm import tqdm

from automagic_bnb import Automagic8bit

Build = Callable[[Any, float, int], torch.optim.Optimizer]
FOUND = "none given"
WEIGHT_DECAY = 0.01
VALIDATIONS = 40
"""Batches of the validation loss."""

OPTIMIZERS: dict[str, Build] = {
    "Automagic8bit": lambda p, lr, steps: ours(p, lr, steps, factored=False),
    "Automagic8bit, factored": lambda p, lr, steps: ours(p, lr, steps, factored=True),
    "bitsandbytes AdamW8bit": lambda p, lr, steps: bnb.optim.AdamW8bit(p, lr=lr, weight_decay=WEIGHT_DECAY),
    "torch AdamW": lambda p, lr, steps: torch.optim.AdamW(p, lr=lr, weight_decay=WEIGHT_DECAY),
}


def ours(parameters: Any, lr: float | None, steps: int, **options: Any) -> Automagic8bit:
    """With half of the run for the weights' own rates to adapt in, and no tensor left in 32 bits."""
    fixed = {"warmup_steps": steps // 2, "min_8bit_size": 0, "weight_decay": WEIGHT_DECAY}
    return Automagic8bit(parameters, lr=lr, **fixed, **options)


def runs(rates: list[str]) -> list[tuple[str, str]]:
    return [(name, rate) for rate in rates for name in OPTIMIZERS] + [("Automagic8bit", FOUND)]


def validation_loss(name: str, rate: str, seed: int, args: argparse.Namespace, device: torch.device) -> float:
    torch.manual_seed(seed)
    model = byte_model.Bytes(args.width, args.layers).to(device)
    if rate == FOUND:
        optimizer: torch.optim.Optimizer = ours(model.parameters(), None, args.steps)
    else:
        optimizer = OPTIMIZERS[name](model.parameters(), float(rate), args.steps)
    return train(model, optimizer, seed, args, device)


def train(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int, args: argparse.Namespace, device: torch.device
) -> float:
    """The validation loss after the steps."""
    data, held_out = byte_model.sources(device)
    lr, generator = optimizer.param_groups[0]["lr"], torch.Generator().manual_seed(seed)
    for step in range(1, args.steps + 1):
        optimizer.param_groups[0]["lr"] = byte_model.scheduled(lr, step, args.steps)
        optimizer.zero_grad()
        byte_model.loss_of(model, data, generator, args.batch).backward()
        optimizer.step()
    return byte_model.validation_loss(model, held_out, args.batch, VALIDATIONS)


def report(results: dict[str, Any]) -> str:
    rates = results["losses"]["Automagic8bit"]
    rows = [
        [name, *(", ".join(f"{x:.3f}" for x in by_rate.get(rate, [])) or "–" for rate in rates)]
        for name, by_rate in results["losses"].items()
    ]
    return "\n\n".join(
        [
            "# What is learned in a number of steps",
            f"`{results['command']}`",
            f"Validation loss after {results['steps']} steps of a language model over bytes with "
            f"{results['parameters']:,} parameters, by learning rate; one number for each seed.",
            measure.markdown_table(["optimizer", *rates], rows),
            measure.describe(results["environment"]),
        ]
    )


def argument_parser(description: str, steps: int, width: int) -> argparse.ArgumentParser:
    """The options of what trains the byte model, with these defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=int, default=width)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    return parser


def head(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What the results begin with."""
    return {
        "command": measure.command(),
        "environment": measure.environment(device),
        "steps": args.steps,
        "parameters": sum(p.numel() for p in byte_model.Bytes(args.width, args.layers).parameters()),
    }


def main() -> int:
    parser = argument_parser("Validation losses of ours and AdamW8bit at several learning rates", steps=300, width=64)
    parser.add_argument("--rates", nargs="+", default=["1e-3", "3e-3", "1e-2"], help="default: 1e-3 3e-3 1e-2")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    losses: dict[str, dict[str, list[float]]] = {name: {} for name in OPTIMIZERS}
    results = {**head(args, device), "losses": losses}
    todo = [(seed, *run) for seed in range(args.seeds) for run in runs(args.rates)]
    for seed, name, rate in (bar := tqdm(todo)):
        bar.set_description(f"{name}, lr {rate}, seed {seed}", refresh=False)
        losses[name].setdefault(rate, []).append(validation_loss(name, rate, seed, args, device))
        measure.write_results(args.out, "training", results, report(results))
    print(report(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
