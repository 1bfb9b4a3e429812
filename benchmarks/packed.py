"""What packing costs in loss: the default, with wider masks and means, and the profile lean, from equal starts.

    python benchmarks/packed.py

Two small trainings that need no GPU: a LoRA of the demo's model, which makes images, and a language model over bytes
from scratch (byte_model.py). The LoRA has rates of single weights, which it has not by default. Each form trains on the
same batches from the same weights as the widest one, at one rate and at the rate it finds itself, so that only the form
differs.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import byte_model
import measure
import torch
from tqdm import tqdm

from automagic_bnb import Automagic8bit
from automagic_bnb.command import demo, demo_model
from automagic_bnb.command.demo_options import DemoOptions

FORMS: dict[str, dict[str, Any]] = {
    "mask_bits=8, mean_bits=32": {"mask_bits": 8, "mean_bits": 32},
    "mask_bits=8, mean_bits=16": {"mask_bits": 8, "mean_bits": 16},
    "the default": {},
    'profile="lean"': {"profile": "lean"},
}
WIDEST = next(iter(FORMS))
CPU = torch.device("cpu")
LORA_RANK, LORA_STEPS, LORA_BATCH = 8, 400, 64
BYTES_STEPS, BYTES_BATCH = 300, 8


@functools.cache
def base(seed: int) -> demo_model.VelocityModel:
    """What the demo's LoRAs start from."""
    model = demo_model.make_base(seed, CPU)
    demo.train_base(model, DemoOptions(seed=seed))
    return model


def lora(lr: float | None, seed: int, **options: Any) -> float:
    """The loss on the demo's held-out digits at the end."""
    examples, held_out = demo.load_digits(demo.LORA_CLASSES, seed)
    model = demo_model.with_lora(base(seed), LORA_RANK, seed)
    options = {"lora_mask": "profile" not in options, **options}
    optimizer = Automagic8bit(demo_model.trainable(model), lr=lr, **options)
    demo.train(model, optimizer, examples, steps=LORA_STEPS, batch=LORA_BATCH, seed=seed, title="LoRA")
    with torch.no_grad():
        return demo_model.flow_matching_loss(model, demo.validation_batch(held_out, seed, CPU, draws=16)).item()


def language_model(lr: float | None, seed: int, **options: Any) -> float:
    """The loss on held-out bytes; a given rate decays, a found one stays."""
    torch.manual_seed(seed)
    model = byte_model.Bytes(64, 2)
    optimizer = Automagic8bit(model.parameters(), lr=lr, min_8bit_size=0, **options)
    data, held_out = byte_model.sources(CPU)
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, BYTES_STEPS + 1):
        if lr is not None:
            optimizer.param_groups[0]["lr"] = byte_model.scheduled(lr, step, BYTES_STEPS)
        optimizer.zero_grad()
        byte_model.loss_of(model, data, generator, BYTES_BATCH).backward()
        optimizer.step()
    return byte_model.validation_loss(model, held_out, 32, 20)


TASKS: dict[str, tuple[Callable[..., float], float]] = {"LoRA": (lora, 2.6e-3), "bytes": (language_model, 3e-3)}
"""And a rate near the best of each."""


def difference(losses: dict[str, dict[str, list[float]]], column: str, form: str) -> str:
    """The mean of a form's losses over the widest form's, in percent, with its standard error."""
    pairs = zip(losses[form].get(column, []), losses[WIDEST].get(column, []), strict=False)
    excess = [100 * (own / widest - 1) for own, widest in pairs]
    if len(excess) < 2 or form == WIDEST:
        return "–"
    return f"{statistics.fmean(excess):+.2f} ± {statistics.stdev(excess) / math.sqrt(len(excess)):.2f}"


def report(results: dict[str, Any]) -> str:
    losses, columns = results["losses"], results["columns"]
    rows = [[form, *(difference(losses, column, form) for column in columns)] for form in losses]
    means = [
        [form, *(f"{statistics.fmean(losses[form][c]):.4f}" for c in columns if c in losses[form])] for form in losses
    ]
    return "\n\n".join(
        [
            "# What packing costs in loss",
            f"`{results['command']}`",
            f"Validation loss over that of `{WIDEST}` in percent, mean and standard error over {results['seeds']} "
            "seeds, each pair from equal weights on equal batches. Below 0 is better. The LoRA has `lora_mask=True`, "
            "but for lean.",
            measure.markdown_table(["form", *columns], rows),
            "The losses themselves, means:",
            measure.markdown_table(["form", *columns], [row for row in means if len(row) > len(columns)]),
            measure.describe(results["environment"]),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Losses of the default beside wider and leaner forms")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    columns = [f"{task}, {rate}" for task in args.tasks for rate in ("rate given", "rate found")]
    losses: dict[str, dict[str, list[float]]] = {form: {} for form in FORMS}
    head = {"command": measure.command(), "environment": measure.environment(CPU)}
    results: dict[str, Any] = {**head, "seeds": args.seeds, "columns": columns, "losses": losses}
    todo = [(seed, column, form) for seed in range(args.seeds) for column in columns for form in FORMS]
    for seed, column, form in (bar := tqdm(todo)):
        task, _, rate = column.partition(", ")
        bar.set_description(f"{column}, {form}, seed {seed}", refresh=False)
        train, lr = TASKS[task]
        loss = train(lr if rate == "rate given" else None, seed, **FORMS[form])
        losses[form].setdefault(column, []).append(loss)
        measure.write_results(args.out, "packed", results, report(results))
    print(report(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
