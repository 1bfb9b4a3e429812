"""Tables and plots of a sweep's results.

    python benchmarks/quality/report.py --runs benchmarks/quality/results/runs.jsonl

An optimizer's loss on a task is the mean over seeds at its best rate. Its excess is over AdamW8bit's, the better of
both β2 at their best rates, in percent. Seeds are compared in pairs: they share first weights and batches. Intervals
are Student's, of 95 %.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
import tasks
from run import matches
from scipy import stats
from search import Results
from tasks import Task
from training import measure

from automagic_bnb.watch import style

HERE = Path(__file__).parent
NAMES = {
    "ours": "Automagic8bit, best rate",
    "ours-found": "Automagic8bit, no rate given",
    "adamw8bit": "AdamW8bit",
    "prodigy": "Prodigy, no rate given",
    "schedule-free": "Schedule-Free, best rate",
    "muon": "Muon, best rate",
}
"""Of optimizers, for pictures; others stand under their names in the tables."""


@dataclass(frozen=True)
class Estimate:
    """A mean and the half width of its interval (NaN for a single value)."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        if len(values) < 2 or not all(map(math.isfinite, values)):
            return cls(statistics.fmean(values), math.nan)
        quantile = float(stats.t.ppf(0.975, len(values) - 1))
        return cls(statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values)))

    def text(self, digits: int, sign: str = "") -> str:
        if not math.isfinite(self.mean):
            return "diverged"
        half = f" ± {self.half:.{digits}f}" if math.isfinite(self.half) else ""
        return f"{self.mean:{sign}.{digits}f}{half}"


@dataclass(frozen=True)
class Best:
    """An optimizer on a task at its best rate."""

    lr: float | None
    losses: dict[int, float]  # by seed
    inside: bool  # neither end of the rates that were tried
    found: float | None
    state_bytes: float

    @property
    def loss(self) -> Estimate:
        return Estimate.of(list(self.losses.values()))


def best(results: Results, task: str, optimizer: str) -> Best | None:
    """At the rate with the lowest mean, of those with most seeds; None where there is no run that worked."""
    tried = results.rates(task, optimizer)
    by_rate = {
        lr: {s: results.loss(task, optimizer, lr, s) for s in results.seeds(task, optimizer, lr)} for lr in tried
    }
    most = max(map(len, by_rate.values()), default=0)
    finalists = {lr: losses for lr, losses in by_rate.items() if len(losses) == most}
    if not finalists:
        return None
    lr = min(finalists, key=lambda lr: statistics.fmean(finalists[lr].values()))
    runs = [
        result for job, result in results.by_job.items() if (job.task, job.optimizer, job.lr) == (task, optimizer, lr)
    ]
    ran = [run for run in runs if not run.get("error")]
    if not ran:
        return None
    found = [run["found"][-1][1] for run in ran if run["found"]]
    return Best(
        lr,
        finalists[lr],
        inside=lr is None or tried[0] != lr != tried[-1],
        found=statistics.geometric_mean(found) if found and min(found) > 0 else None,
        state_bytes=statistics.fmean(run["state_bytes"] for run in ran),
    )


class Comparison:
    """Every optimizer's best on every task, and its excess over the baseline's."""

    def __init__(self, results: Results, optimizers: Iterable[str] = ("*",)) -> None:
        self.results = results
        used = {(job.task, job.optimizer) for job in results.by_job}
        self.tasks = [task for task in tasks.TASKS.values() if any(t == task.name for t, _ in used)]
        names = sorted({name for _, name in used}, key=_place)
        self.optimizers = [name for name in names if name in peers.BASELINES or matches(name, optimizers)]
        found = {(task.name, name): best(results, task.name, name) for task in self.tasks for name in self.optimizers}
        self.best = {pair: value for pair, value in found.items() if value is not None}

    def baseline(self, task: str) -> Best | None:
        rivals = [self.best[task, name] for name in peers.BASELINES if (task, name) in self.best]
        # A mean over fewer seeds is another quantity.
        return min(rivals, key=lambda x: (-len(x.losses), x.loss.mean), default=None)

    def excesses(self, task: str, optimizer: str) -> dict[int, float]:
        """In percent, by seed; empty where one of the two has no run."""
        base, own = self.baseline(task), self.best.get((task, optimizer))
        if base is None or own is None:
            return {}
        return {s: 100 * (own.losses[s] / base.losses[s] - 1) for s in own.losses if s in base.losses}

    def excess(self, task: str, optimizer: str) -> Estimate | None:
        values = list(self.excesses(task, optimizer).values())
        return Estimate.of(values) if values else None

    def mean_excess(self, tasks: Iterable[Task], optimizer: str) -> Estimate | None:
        """Over these tasks; its interval is over seeds, each the mean over the tasks."""
        by_task = [self.excesses(task.name, optimizer) for task in tasks]
        by_task = [values for values in by_task if values]
        if not by_task:
            return None
        shared = set.intersection(*map(set, by_task))
        return Estimate.of([statistics.fmean(values[s] for values in by_task) for s in sorted(shared)])

    def of(self, split: str) -> list[Task]:
        return [task for task in self.tasks if task.split == split]


def _place(name: str) -> tuple[int, str]:
    """The order of the peers' table; others last."""
    return list(peers.PEERS).index(name) if name in peers.PEERS else len(peers.PEERS), name


# --- tables ----------------------------------------------------------------------------------------------------------


MAY_LACK = 1
"""Tasks that an optimizer in a table of means may not have run on."""


def summary(comparison: Comparison, tasks: Sequence[Task]) -> str:
    """One line for each optimizer that ran on all of these tasks, or all but one; the best first."""
    rows = []
    for name in comparison.optimizers:
        mean = comparison.mean_excess(tasks, name)
        each = {t.name: e.mean for t in tasks if (e := comparison.excess(t.name, name)) is not None}
        if mean is None or len(each) < len(tasks) - MAY_LACK:
            continue
        worst = max(each, key=lambda task: each[task])
        bytes_kept = [comparison.best[task, name].state_bytes for task in each]
        rows.append(
            (
                mean.mean,
                [
                    name,
                    mean.text(2, "+"),
                    f"{statistics.median(each.values()):+.2f}",
                    f"{Estimate(each[worst], math.nan).text(1, '+')} ({worst})",
                    f"{sum(x <= 0 for x in each.values())} of {len(each)}",
                    f"{statistics.median(bytes_kept):.2f}",
                ],
            )
        )
    header = ["optimizer", "mean, %", "median, %", "worst, %", "at or below", "bytes a parameter"]
    return measure.markdown_table(header, [row for _, row in sorted(rows, key=lambda x: x[0])])


def by_task(comparison: Comparison, task: Task) -> str:
    """Every optimizer on one task; its rate, and where it is the rate found."""
    rows = []
    for name in comparison.optimizers:
        own, excess = comparison.best.get((task.name, name)), comparison.excess(task.name, name)
        if own is None or excess is None:
            continue
        rate = "none given" if own.lr is None else f"{own.lr:.3g}{'' if own.inside else ' (end)'}"
        found = f"{own.found:.2e}" if own.found is not None else "–"
        rows.append((own.loss.mean, [name, own.loss.text(4), excess.text(2, "+"), rate, found, str(len(own.losses))]))
    header = ["optimizer", "loss", "excess, %", "rate", "found", "seeds"]
    return measure.markdown_table(header, [row for _, row in sorted(rows, key=lambda x: x[0])])


def complaints(comparison: Comparison) -> list[str]:
    """What has to be known beside the tables: bests at an end of their rates, divergences, errors."""
    lines = []
    for (task, name), own in comparison.best.items():
        peer = peers.PEERS.get(name)
        if not own.inside and (peer is None or peer.searched):
            lines.append(f"{name} on {task}: the best rate, {own.lr:.3g}, is at an end of those tried")
    for name in comparison.optimizers:
        runs = [(job, run) for job, run in comparison.results.by_job.items() if job.optimizer == name]
        errors = [(job, run["error"]) for job, run in runs if run.get("error")]
        diverged = [job for job, run in runs if not run.get("error") and run["diverged"]]
        if errors:
            lines.append(
                f"{name}: {len(errors)} of {len(runs)} runs failed, e.g. on {errors[0][0].task}: {errors[0][1]}"
            )
        if diverged:
            where = sorted({f"{job.task} at {'none' if job.lr is None else f'{job.lr:.3g}'}" for job in diverged})
            lines.append(f"{name}: {len(diverged)} of {len(runs)} runs diverged: {', '.join(where)}")
    return lines


def describe(task: Task) -> str:
    rank = f", rank {task.rank}, scale {task.scale:g}" if task.kind == "lora" else ""
    how = f"{task.steps} steps of {task.batch}, {task.schedule}, {str(task.dtype).removeprefix('torch.')}"
    return f"{task.family} {task.kind} on {task.source}{rank}: {how}"


def markdown(comparison: Comparison) -> str:
    parts = ["# What is learned: every optimizer at its own best rate", (__doc__ or "").split("\n\n")[-1].strip()]
    for split, meaning in (("judge", "judge"), ("choose", "choose defaults"), ("more", "came later")):
        chosen = comparison.of(split)
        if chosen:
            parts += [f"## The tasks that {meaning}", summary(comparison, chosen)]
        loras = [task for task in chosen if task.kind == "lora"]
        if loras and loras != chosen:
            parts += ["LoRA's alone:", summary(comparison, loras)]
    for task in comparison.tasks:
        parts += [f"### {task.name} ({task.split})", describe(task), by_task(comparison, task)]
    if lines := complaints(comparison):
        parts += ["## Ends, divergences, errors", "\n".join(f"- {line}" for line in lines)]
    if environments := comparison.results.environments:
        last = environments[-1]
        parts += [
            f"{len(comparison.results.by_job):,} runs. `{last['command']}`",
            measure.describe(last["environment"]),
        ]
    return "\n\n".join(parts)


# --- plots -----------------------------------------------------------------------------------------------------------


def _figure(rows: int, columns: int, height: float) -> Any:
    """An empty figure of that height in inches, in the style that all pictures share, and its axes."""
    figure = style.new_figure("", height)
    return figure, figure.subplots(rows, columns, squeeze=False)


def plot_regret(
    comparison: Comparison, split: str, shown: Sequence[str], path: Path, description: str = "", limit: float = 20.0
) -> None:
    """The excess of some optimizers by task; what lies beyond the limit stands at it, with its value beside it.

    Args:
        description: to be kept in the PNG.
    """
    chosen = comparison.of(split)
    figure, ((axis,),) = _figure(1, 1, 1.5 + 0.14 * len(shown) * len(chosen))
    for i, name in enumerate(shown):
        for row, task in enumerate(chosen):
            if (excess := comparison.excess(task.name, name)) is None:
                continue
            at = max(-limit, min(excess.mean, limit)) if math.isfinite(excess.mean) else limit
            half = excess.half if math.isfinite(excess.half) and abs(at) < limit else 0.0
            look = style.point_style(i)
            height = row + 0.8 / len(shown) * (i - (len(shown) - 1) / 2)
            axis.errorbar(at, height, xerr=half, ms=5, ls="", label=NAMES.get(name, name) if row == 0 else None, **look)
            if at == limit:
                beyond = f"{excess.mean:+.0f}" if math.isfinite(excess.mean) else "diverged"
                axis.annotate(f"  {beyond} →", (at, height), va="center", fontsize=8, color=look["color"])
            if at == -limit:
                axis.annotate(f"← {excess.mean:+.0f}", (at, height), (8, 0), textcoords="offset points",
                              va="center", fontsize=8, color=look["color"])  # fmt: skip
    axis.axvline(0, color="0.4", linewidth=1)
    axis.set_yticks(range(len(chosen)), [task.name for task in chosen])
    axis.invert_yaxis()
    axis.grid(axis="y", color="0.92")
    axis.set_xlim(-1.05 * limit, 1.25 * limit)
    axis.set_xlabel("loss over AdamW8bit at its best rate, %\n(left of 0 is better)")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    style.saved(figure, path, description)


def plot_rates(comparison: Comparison, split: str, shown: Sequence[str], found: str, path: Path) -> None:
    """Loss against rate, seed 0, one panel for each task; a star where no rate was given: at the rate found."""
    chosen = comparison.of(split)
    rows = math.ceil(len(chosen) / 2)
    figure, axes = _figure(rows, 2, 0.5 + 1.5 * rows)
    for axis, task in zip(axes.flat, chosen, strict=False):
        base = comparison.baseline(task.name)
        if base is None:
            continue
        excess = {
            name: [
                (lr, 100 * (loss / base.losses[0] - 1))
                for lr in comparison.results.rates(task.name, name)
                if lr is not None and not math.isnan(loss := comparison.results.loss(task.name, name, lr, 0))
            ]
            for name in shown
        }
        for i, (name, points) in enumerate(excess.items()):
            xs, ys = zip(*points, strict=True) if points else ((), ())
            axis.plot(xs, ys, ms=3, lw=1.2, label=NAMES.get(name, name), **style.point_style(i))
        own = comparison.best.get((task.name, found))
        if own is not None and own.found is not None:
            at = comparison.excess(task.name, found)
            star = {
                "marker": "*",
                "ms": 11,
                "markeredgecolor": "white",
                "color": "black",
                "label": NAMES.get(found, found),
            }
            axis.plot([own.found], [at.mean if at else math.nan], ls="", zorder=3, **star)
        lowest = min((y for points in excess.values() for _, y in points), default=0.0)
        lowest = min(lowest, at.mean if own is not None and own.found is not None and at else 0.0)
        axis.set(xscale="log", xlim=(1e-5, 0.1), ylim=(min(-10.0, 1.15 * lowest), 60), title=task.name)
        axis.set_xticks([1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
        axis.minorticks_off()
        axis.title.set_fontsize(9)
        axis.axhline(0, color="0.7", linewidth=0.8)
    for axis in list(axes.flat)[len(chosen) :]:
        axis.set_visible(False)
    figure.supxlabel("learning rate")
    figure.supylabel("loss over AdamW8bit at its best rate, %")
    handles, labels = next(iter(axes.flat)).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    style.saved(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs = [HERE / "results" / "runs.jsonl", HERE / "results" / "found_0_2.jsonl"]
    parser.add_argument("--runs", nargs="+", type=Path, default=runs, help="what run.py wrote; later files win")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the tables and plots")
    parser.add_argument("--optimizers", nargs="+", default=["*"], help="names, patterns, !patterns of those in tables")
    shown = ["ours-found", "ours", "prodigy", "schedule-free", "muon"]
    parser.add_argument("--shown", nargs="+", default=shown, help="those in the plot of excess by task")
    parser.add_argument("--curves", nargs="+", default=["ours", "adamw8bit"], help="those in the plot of rates")
    parser.add_argument("--found", default="ours-found", help="whose found rate is marked there")
    parser.add_argument("--no-plots", action="store_true")
    args = parser.parse_args()
    comparison = Comparison(Results(*args.runs), args.optimizers)
    text = markdown(comparison)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "quality.md").write_text(text + "\n")
    print(text)
    for split in ("choose", "judge"):
        if comparison.of(split) and not args.no_plots:
            plot_regret(comparison, split, args.shown, args.out / f"excess-{split}.png")
            plot_rates(comparison, split, args.curves, args.found, args.out / f"rates-{split}.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
