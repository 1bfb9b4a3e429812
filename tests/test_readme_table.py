"""The READMEs' table and plot are what the results give, and it is noticed where they are not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TASK = "gpt-lora-r4-b1"


def script(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "benchmarks" / "readme_table.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=root.parent, timeout=120)


def result(optimizer: str, lr: float | None, loss: float, **more: object) -> dict[str, object]:
    return {
        "task": TASK, "optimizer": optimizer, "lr": lr, "seed": 0, "error": None, "val_loss": loss, "diverged": False,
        "found": [], "state_bytes": 2.0, **more,
    }  # fmt: skip


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """READMEs and benchmarks, with results of one task that is easily reckoned."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "benchmarks", root / "benchmarks", ignore=shutil.ignore_patterns("cache", "__pycache__"))
    for name in ("README.md", "README.zh-TW.md"):
        shutil.copy(ROOT / name, root)
    folder = root / "benchmarks" / "quality" / "results"
    for path in folder.glob("*.jsonl"):
        path.unlink()
    runs = [result("adamw8bit", lr, loss) for lr, loss in ((1e-4, 3.0), (2.51e-4, 2.0), (6.31e-4, 2.5))]
    runs += [result("ours-found", None, 1.9, found=[[100, 5e-4]]), result("prodigy", None, 2.2, state_bytes=12.34)]
    (folder / "runs.jsonl").write_text("\n".join(map(json.dumps, runs)) + "\n")
    return root


def test_those_of_this_checkout_are_not_stale() -> None:
    done = script(ROOT, "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_table_is_reckoned_from_the_results(copy: Path) -> None:
    """1.9 is 5 % below 2.0; before it is written it is stale, after it no more; a word in it makes it stale again."""
    assert script(copy, "--check").returncode == 1
    done = script(copy)
    assert done.returncode == 0, done.stderr
    runs = json.loads((copy / "benchmarks" / "results" / "step_time_lora.json").read_text())["runs"]
    (flux,) = [run["optimizers"] for run in runs if run["workload"] == "flux-lora"]
    wall = flux["automagic8bit"]["wall_ms"]["median"]
    for name, words in (("README.md", "no rate given"), ("README.zh-TW.md", "不給學習率")):
        rows = [line for line in (copy / name).read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
        (ours,) = [row for row in rows if "Automagic8bit" in row and words in row]
        assert ours.split(" | ")[1:] == ["-5.0", "1.3", f"{wall:.1f} |"]
        (prodigy,) = [row for row in rows if row.startswith("| Prodigy")]
        assert prodigy.split(" | ")[1:] == ["+10.0", "12.3 (float32)", "– |"]
    assert script(copy, "--check").returncode == 0
    readme = copy / "README.md"
    readme.write_text(readme.read_text(encoding="utf-8").replace("| -5.0 |", "| -9.0 |"), encoding="utf-8")
    assert "stale: README.md\n" in script(copy, "--check").stdout


def test_other_results_make_the_plot_stale(copy: Path) -> None:
    script(copy)
    runs = copy / "benchmarks" / "quality" / "results" / "runs.jsonl"
    runs.write_text(runs.read_text().replace("3.0", "3.5"))
    assert "stale: docs/images/loss-by-rate.png\n" in script(copy, "--check").stdout
