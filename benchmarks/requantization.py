"""What a change of storage in the middle of a run does to the loss, and what it saves.

    python benchmarks/requantization.py --steps 400

A byte-level transformer of 149,000 parameters learns Python's own sources, over the same batches in every run: in 8
bits or 32 bits throughout, under `ProgressiveQuantization`, and with abrupt switches at each quarter. In the last run
the state is thrown away at the first switch: what a jump looks like where there is one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import byte_model
import measure
import numpy as np
import torch
from tqdm import tqdm

from automagic_bnb import Automagic8bit, ProgressiveQuantization
from automagic_bnb import state as st
from automagic_bnb.watch import plots, style

WINDOW = 20
"""Losses averaged on either side of a switch."""
Change = Callable[[int, Automagic8bit], Any]


@dataclass
class Run:
    name: str
    losses: list[float] = field(default_factory=list)
    bytes_held: list[float] = field(default_factory=list)
    """State bytes a parameter after each step."""
    switches: dict[int, str] = field(default_factory=dict)
    """What was changed after so many steps."""

    def mean_loss(self, start: int, stop: int) -> float:
        return float(np.mean(self.losses[start:stop]))


def runs(steps: int) -> Iterator[tuple[str, dict[str, Any], Callable[[Automagic8bit], Change]]]:
    """Name, options at the start, and what makes the function that is called after each step."""

    def at_quarters(*changes: dict[str, Any], thrown_away: bool = False) -> Callable[[Automagic8bit], Change]:
        due = {steps * (i + 1) // 4: change for i, change in enumerate(changes)}

        def change(done: int, optimizer: Automagic8bit) -> dict[str, Any]:
            if done in due:
                optimizer.requantize(**due[done])
                if thrown_away:
                    optimizer.state.clear()
            return due.get(done, {})

        return lambda _: change

    def progressive(optimizer: Automagic8bit) -> Change:
        schedule = ProgressiveQuantization(optimizer, steps, factored=True)
        return lambda *_: schedule.step()

    yield "32 bits throughout", {"optim_bits": 32}, at_quarters()
    yield "8 bits throughout", {"min_8bit_size": 0}, at_quarters()
    yield "ProgressiveQuantization", {}, progressive
    abrupt = {"optim_bits": 8, "min_8bit_size": 0}, {"factored": True}, {"optim_bits": 32}
    yield "32 → 8 → factored → 32", {"optim_bits": 32}, at_quarters(*abrupt)
    yield "state thrown away", {"optim_bits": 32}, at_quarters(abrupt[0], thrown_away=True)


def train(run: Run, options: dict[str, Any], make: Callable[[Automagic8bit], Change], args: argparse.Namespace) -> Run:
    torch.manual_seed(0)
    model = byte_model.Bytes(args.width, args.layers)
    warmup = args.steps // 2  # some switches fall within it, some after it
    options = {"lr": args.lr, "weight_decay": 0.01, "warmup_steps": warmup, "factored": False, **options}
    optimizer = Automagic8bit(model.parameters(), **options)
    change, generator = make(optimizer), torch.Generator().manual_seed(0)
    data, _ = byte_model.sources(torch.device("cpu"))
    elements = sum(p.numel() for p in model.parameters())
    for done in tqdm(range(1, args.steps + 1), desc=run.name, leave=False):
        optimizer.zero_grad()
        loss = byte_model.loss_of(model, data, generator, args.batch)
        loss.backward()
        optimizer.step()
        run.losses.append(loss.item())
        run.bytes_held.append(sum(map(st.state_bytes, optimizer.state.values())) / elements)
        if changed := change(done, optimizer):
            run.switches[done] = ", ".join(f"{name}={value}" for name, value in changed.items())
    return run


def excess(run: Run, unchanged: Run, done: int) -> float:
    """How far the loss rose from before this step to after it, beyond what it did on the same batches unchanged."""
    rises = [x.mean_loss(done, done + WINDOW) - x.mean_loss(done - WINDOW, done) for x in (run, unchanged)]
    return rises[0] - rises[1]


def noise(first: Run, second: Run) -> float:
    """The standard deviation of `excess` where neither run changes its storage."""
    places = range(WINDOW, len(first.losses) - WINDOW, WINDOW)
    return float(np.std([excess(first, second, done) for done in places]))


def table(done: list[Run]) -> str:
    """One row for each switch and for each end."""
    unchanged, steps = done[0], len(done[0].losses)
    rows = []
    for run in done:
        for at, what in run.switches.items():
            before, after = run.mean_loss(at - WINDOW, at), run.mean_loss(at, at + WINDOW)
            figures = [f"{before:.3f}", f"{after:.3f}", f"{excess(run, unchanged, at):+.4f}"]
            rows.append([run.name, str(at), what, *figures, held(run, at)])
        last = f"{run.mean_loss(steps - WINDOW, steps):.3f}"
        rows.append([run.name, str(steps), "the end", last, "", "", held(run, steps)])
    header = ["run", "step", "change", "loss before", "after", "excess", "bytes a parameter"]
    return measure.markdown_table(header, rows)


def held(run: Run, at: int) -> str:
    """State bytes a parameter after the step that follows."""
    return f"{run.bytes_held[min(at, len(run.bytes_held) - 1)]:.2f}"


def draw(done: list[Run], path: Path) -> None:
    """Loss, its distance from the run in 32 bits, and state bytes, over the steps; triangles mark the switches."""
    figure = style.new_figure("Changing optimizer states' storage in mid-run", height=8)
    panels = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 2])
    reference, steps = np.array(done[0].losses), np.arange(1, len(done[0].losses) + 1)
    for place, run in enumerate(done):
        look: dict[str, Any] = {**style.line_style(place), "lw": 1.5, "marker": "v" if run.switches else "", "ms": 6}
        losses = np.array(run.losses)
        curves = plots.running_median(losses), plots.running_median(losses - reference), run.bytes_held
        for axes, curve in zip(panels, curves, strict=True):
            axes.plot(steps, curve, label=run.name, markevery=[at - 1 for at in run.switches], **look)
    labels = "loss", "loss minus that\nof 32 bits throughout", "state bytes\na parameter"
    for axes, label in zip(panels, labels, strict=True):
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_title(f"medians of {plots.SMOOTHED} training losses; the first steps lie above", fontsize=10)
    panels[0].set_ylim(0.95 * plots.running_median(reference).min(), 1.25 * np.median(reference))
    panels[2].set_ylim(bottom=0)
    panels[2].set_xlabel("step; triangles mark switches")
    style.legend_below(figure, panels[0])
    style.saved(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "requantization.md")
    args = parser.parse_args()
    done = [train(Run(name), options, make, args) for name, options, make in runs(args.steps)]
    lines = [
        "# Changing the storage in mid-run",
        "",
        f"`{measure.command()}`",
        "",
        f"Losses are means of the {WINDOW} before a switch and the {WINDOW} after it. *Excess*: how much more the loss",
        "rose there than that of the run in 32 bits throughout did over the same batches. Between that run and the one",
        f"in 8 bits throughout, which switch nowhere, its standard deviation is {noise(done[1], done[0]):.4f}. Over",
        "hundreds of steps, runs that differ at all drift apart; a jump is there within the next few.",
        "",
        table(done),
        "",
        f"![Loss and state bytes over the steps]({args.out.stem}.png)",
        "",
        measure.describe(measure.environment(torch.device("cpu"))),
        "",
    ]
    args.out.write_text("\n".join(lines))
    draw(done, args.out.with_suffix(".png"))
    print(args.out.read_text())


if __name__ == "__main__":
    main()
