"""The READMEs' plots and table, from the results of the quality and step-time benchmarks.

    python benchmarks/readme_table.py           # writes two pictures into docs/images and both READMEs' tables
    python benchmarks/readme_table.py --check   # exits with status 1 where they are not what the results give

Results are all benchmarks/quality/results/*.jsonl, of which later names win, and benchmarks/results/step_time*.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "quality"))

import report  # noqa: E402
from search import Results  # noqa: E402

from automagic_bnb.watch import style  # noqa: E402

PICTURE = ROOT / "docs" / "images" / "loss-by-rate.png"
BY_TASK = ROOT / "docs" / "images" / "loss-by-task.png"
SHOWN = ("ours-found", "ours", "prodigy")
"""Optimizers in the picture by task."""
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
SPLIT = "judge"
WORKLOAD, DTYPE = "flux-lora", "bf16"
LIMIT = 60.0
"""Percent at which a diverged or far worse run counts in the plot's median."""


@dataclass(frozen=True)
class Row:
    """One optimizer of the table: its names in the benchmarks of loss and time, where it was measured there.

    `memory`: its name in the benchmark of memory, where a rate that is found takes a few bytes more.
    """

    english: str
    chinese: str
    quality: str
    step_time: str | None
    memory: str | None = None


ROWS = (
    Row(
        "`Automagic8bit`, no rate given", "`Automagic8bit`，不給學習率", "ours-found", "automagic8bit",
        "automagic8bit-found",
    ),
    Row("`Automagic8bit`, best rate", "`Automagic8bit`，最佳學習率", "ours", "automagic8bit"),
    Row(
        '`profile="lean"`, no rate given', '`profile="lean"`，不給學習率', "ours-found-lean", "automagic8bit-lean",
        "automagic8bit-lean-found",
    ),
    Row("bitsandbytes `AdamW8bit`, best rate", "bitsandbytes `AdamW8bit`，最佳學習率", "adamw8bit", "bnb-adamw8bit"),
    Row("Prodigy, no rate given", "Prodigy，不給學習率", "prodigy", None),
    Row("FlashAdamW, best rate", "FlashAdamW，最佳學習率", "flash-adamw", "flash-adamw"),
    Row("torch `AdamW`, fused, best rate", "torch `AdamW`（fused），最佳學習率", "adamw", "torch-adamw-fused"),
)  # fmt: skip
TEXTS = {
    "README.md": {
        "header": ["optimizer", "loss, %", "bytes a parameter", "step, ms"],
        "picture": "Loss against learning rate: AdamW8bit has a valley, Automagic8bit finds its rate by itself",
        "by task": "Loss over AdamW8bit at its best rate, task by task",
        "notes": "Loss: validation loss over `AdamW8bit`'s at its best rate and β2 for each task, mean over {tasks}\n"
        "small tasks, lower is better ([all tasks and peers](benchmarks/quality/results/quality.md)). Bytes of state\n"
        "and time of a step: {workload}, bf16, {device}. –: not measured there yet.",
    },
    "README.zh-TW.md": {
        "header": ["最佳化器", "損失，%", "每個參數的位元組", "一步，ms"],
        "picture": "損失與學習率：AdamW8bit 有一個谷底，Automagic8bit 自行找出學習率",
        "by task": "各任務中，損失相對於 AdamW8bit 最佳學習率時的差距",
        "notes": "損失：驗證損失相對於 `AdamW8bit` 在各任務最佳學習率與 β2 下的差距，\n"
        "取 {tasks} 個小任務的平均，越低越好（[所有任務與對照](benchmarks/quality/results/quality.md)）。\n"
        "狀態的位元組與一步的時間：{workload}，bf16，{device}。–：尚未在該處測量。",
    },
}


# --- the table --------------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """What benchmarks/results has of the one workload."""

    device: str
    times: dict[str, dict[str, Any]]
    """By optimizer, on the device."""
    sizes: dict[str, float]
    """Bytes a parameter of each form of ours, as planned."""

    @classmethod
    def of(cls, folder: Path) -> Measured:
        times: dict[str, dict[str, Any]] = {}
        device = "–"
        for path in sorted(folder.glob("step_time*.json")):
            measured = json.loads(path.read_text(encoding="utf-8"))
            for run in measured["runs"]:
                if (run["workload"], run["dtype"]) == (WORKLOAD, DTYPE):
                    times |= run["optimizers"]
                    device = measured["environment"]["device"]
        memory = json.loads((folder / "memory.json").read_text(encoding="utf-8"))["figures"][DTYPE]
        return cls(
            device, times, {name: by_workload[WORKLOAD]["bytes_per_parameter"] for name, by_workload in memory.items()}
        )


def cells(row: Row, comparison: report.Comparison, measured: Measured) -> list[str] | None:
    """Loss, bytes and time; None where nothing was measured."""
    excess = comparison.mean_excess(comparison.of(SPLIT), row.quality) if row.quality in comparison.optimizers else None
    time = measured.times.get(row.step_time or "")
    if excess is None and time is None:
        return None
    if row.memory is not None:
        size = f"{measured.sizes[row.memory]:.1f}"
    elif time:
        size = f"{time['state_bytes_per_parameter']:.1f}"
    else:
        kept = [own.state_bytes for (_, name), own in comparison.best.items() if name == row.quality]
        size = f"{statistics.median(kept):.1f} (float32)" if kept else "–"
    return [
        "–" if excess is None else excess.text(1, "+"),
        size,
        f"{time['wall_ms']['median']:.1f}" if time else "–",
    ]


def block(readme: str, comparison: report.Comparison, measured: Measured) -> str:
    """What stands between the marks of one README."""
    texts = TEXTS[readme]
    lines = [image(texts["picture"], PICTURE), ""]
    lines += [f"| {' | '.join(texts['header'])} |", "|---|" + "---:|" * (len(texts["header"]) - 1)]
    for row in ROWS:
        if (found := cells(row, comparison, measured)) is not None:
            label = row.english if readme == "README.md" else row.chinese
            lines.append(f"| {label} | {' | '.join(found)} |")
    tasks = len(comparison.of(SPLIT))
    notes = texts["notes"].format(tasks=tasks, workload="Flux LoRA r = 16", device=measured.device)
    return "\n".join([*lines, "", notes, "", image(texts["by task"], BY_TASK)])


def image(words: str, path: Path) -> str:
    return f"![{words}]({path.relative_to(ROOT).as_posix()})"


def replaced(text: str, new: str) -> str:
    """The text with what stands between the marks exchanged.

    Raises:
        ValueError: it has not each mark once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"a README needs {BEGIN} and {END}, once each")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{new}\n{END}{rest.partition(END)[2]}"


# --- the plots --------------------------------------------------------------------------------------------------------

Points = list[tuple[float, float]]


def curve(comparison: report.Comparison, optimizer: str) -> Points:
    """The median excess over tasks in percent, of seed 0, by rate as a multiple of AdamW8bit's best on each task."""
    by_multiple: dict[float, list[float]] = {}
    for task in comparison.of(SPLIT):
        base = comparison.baseline(task.name)
        if base is None or base.lr is None or 0 not in base.losses:
            continue
        for lr in comparison.results.rates(task.name, optimizer):
            loss = math.nan if lr is None else comparison.results.loss(task.name, optimizer, lr, 0)
            if lr is not None and not math.isnan(loss):
                multiple = round(math.log10(lr / base.lr), 1)
                by_multiple.setdefault(multiple, []).append(min(100 * (loss / base.losses[0] - 1), LIMIT))
    enough = max(map(len, by_multiple.values()), default=0) / 2
    return [(10**x, statistics.median(ys)) for x, ys in sorted(by_multiple.items()) if len(ys) >= enough]


def marks(comparison: report.Comparison, optimizer: str) -> Points:
    """Where a rate was found: for each task, as a multiple likewise, and the excess there."""
    found = []
    for task in comparison.of(SPLIT):
        own, base = comparison.best.get((task.name, optimizer)), comparison.baseline(task.name)
        excess = comparison.excess(task.name, optimizer)
        if own is not None and own.found and base is not None and base.lr and excess is not None:
            found.append((own.found / base.lr, min(excess.mean, LIMIT)))
    return sorted(found)


def plotted(comparison: report.Comparison) -> dict[str, Points]:
    return {
        "AdamW8bit": curve(comparison, "adamw8bit"),
        "Automagic8bit, rate given": curve(comparison, "ours"),
        "found": marks(comparison, "ours-found"),
    }


def by_task(comparison: report.Comparison) -> dict[str, Points]:
    """The excess of those shown in each task, with the half width of its interval."""
    found = {name: [comparison.excess(task.name, name) for task in comparison.of(SPLIT)] for name in SHOWN}
    return {name: [(x.mean, x.half) if x else (math.nan, math.nan) for x in values] for name, values in found.items()}


def digest(points: dict[str, Points]) -> str:
    """Of what is plotted, to three digits; it stands in the picture's metadata."""
    rounded = {name: [[f"{x:.3g}", f"{y:.3g}"] for x, y in values] for name, values in points.items()}
    return hashlib.sha256(json.dumps(rounded, sort_keys=True).encode()).hexdigest()


def draw(points: dict[str, Points], path: Path) -> None:
    """The two curves; a line where no rate was given, with a star at the rate found."""
    figure = style.new_figure("", height=4.2)
    axes = figure.subplots()
    for place, name in enumerate(name for name in points if name != "found" and points[name]):
        axes.plot(*zip(*points[name], strict=True), ms=5, label=name, **style.point_style(place))
    if found := points["found"]:
        level = statistics.median(y for _, y in found)
        axes.axhline(level, ls="--", lw=2, color=style.COLOURS[2], label="Automagic8bit, no rate given")
        at = statistics.geometric_mean(x for x, _ in found)
        star = {"marker": "*", "ms": 15, "markeredgecolor": "white", "color": "black", "ls": ""}
        axes.plot([at], [level], zorder=3, label="the rate that it finds (mean)", **star)
    axes.set(xscale="log", ylim=(-10, LIMIT), xlabel="learning rate, as a multiple of AdamW8bit's best")
    axes.set_ylabel("loss over AdamW8bit's best, %\n(median of tasks, lower is better)")
    axes.grid(alpha=0.3)
    style.legend_below(figure, axes)
    style.saved(figure, path, digest(points))


def drawn_digest(path: Path) -> str:
    """The digest in a picture's metadata, the empty string where there is none."""
    from PIL import Image

    if not path.exists():
        return ""
    with Image.open(path) as picture:
        return str(picture.info.get("Description", ""))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where something is stale")
    args = parser.parse_args(arguments)
    runs = sorted((ROOT / "benchmarks" / "quality" / "results").glob("*.jsonl"))
    comparison = report.Comparison(Results(*runs))
    measured = Measured.of(ROOT / "benchmarks" / "results")
    points, tasks = plotted(comparison), by_task(comparison)
    drawings = {
        PICTURE: (digest(points), lambda: draw(points, PICTURE)),
        BY_TASK: (digest(tasks), lambda: report.plot_regret(comparison, SPLIT, SHOWN, BY_TASK, digest(tasks))),
    }
    stale = []
    for name in TEXTS:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        new = replaced(text, block(name, comparison, measured))
        if new != text:
            stale.append(name)
            if not args.check:
                path.write_text(new, encoding="utf-8")
    for path, (wanted, drawing) in drawings.items():
        if drawn_digest(path) != wanted:
            stale.append(path.relative_to(ROOT).as_posix())
            if not args.check:
                path.parent.mkdir(parents=True, exist_ok=True)
                drawing()
    if stale:
        print(f"{'stale' if args.check else 'written'}: {', '.join(stale)}")
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    raise SystemExit(main())
