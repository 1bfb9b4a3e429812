"""The quality benchmark: that its sweep runs end to end, searches as it says, and its report computes what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "quality"


def run(script, *arguments, code=""):
    """A script of the benchmark in a process of its own, by path, as users run it; `code` instead runs beside it."""
    command = [sys.executable, "-c", code] if code else [sys.executable, str(FOLDER / script)]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER), "OMP_NUM_THREADS": "1"}
    # From elsewhere: with -c the folder one stands in comes first, and ours holds one that is called `kernels`.
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=environment, cwd=FOLDER)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def result(optimizer, lr, seed, loss, task="gpt-lora-r4-b1", **more):
    return {
        "task": task,
        "optimizer": optimizer,
        "lr": lr,
        "seed": seed,
        "error": None,
        "val_loss": loss,
        "first_loss": 5.0,
        "diverged": loss is None,
        "found": [],
        "state_bytes": 2.0,
        **more,
    }


def write(path, results):
    path.write_text("".join(json.dumps(x) + "\n" for x in results))
    return path


def test_a_sweep_runs_every_pair_and_goes_on_where_it_stopped(tmp_path):
    pytest.importorskip("bitsandbytes")
    names = ["gpt-scratch", "gpt-lora-r16"]
    common = ["--cache", tmp_path, "--device", "cpu", "--tiny", "--tasks", *names]
    run("run.py", "prepare", *common)
    out = tmp_path / "runs.jsonl"
    sweep = ["sweep", *common, "--steps", "4", "--seeds", "2", "--workers", "1", "--out", out]
    run("run.py", *sweep, "--optimizers", "ours-found")
    run("run.py", *sweep, "--optimizers", "ours-found", "automagic-v3-untuned")  # the former are there
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    runs = [line for line in lines if "task" in line]
    assert [line["error"] for line in runs] == [None] * 8
    jobs = {(x["task"], x["optimizer"], x["seed"]) for x in runs}
    assert jobs == {(t, o, s) for t in names for o in ("ours-found", "automagic-v3-untuned") for s in (0, 1)}
    assert len([line for line in lines if "environment" in line]) == 2
    for x in runs:
        assert x["val_loss"] != x["first_loss"], "nothing was trained"
        assert 0 < x["val_loss"] < 6
        assert len(x["curve"]) == 4
        assert x["found"][-1][0] == 4
    assert all(x["weights"] < 10_000 for x in runs if "lora" in x["task"])
    first = {x["first_loss"] for x in runs if x["task"] == "gpt-scratch"}
    assert len(first) == 2, "each seed has its own first weights, the same for every optimizer"


def test_the_search_goes_on_from_an_end_and_then_repeats_the_best():
    out = run(
        "",
        code="""
import math, peers, search, tasks
task, peer = tasks.TASKS["gpt-lora-r16"], peers.PEERS["adamw8bit"]
best, results, order = 0.05, search.Results(), []
while jobs := search.wanted(task, peer, results, seeds=3, neighbours=1):
    order.append([(job.lr, job.seed) for job in jobs])
    for job in jobs:
        loss = abs(math.log(job.lr / best))
        results.add({**vars(job), "val_loss": loss, "diverged": False, "error": None})
print(order)
""",
    )
    first, *then = eval(out)
    assert first == [(lr, 0) for lr in (2.51e-4, 6.31e-4, 1.58e-3, 3.98e-3, 0.01, 0.0251)]
    assert then == [
        [(0.0631, 0)],
        [(0.158, 0)],  # 0.0631 is the best, and now inside
        [(0.0251, 1), (0.0251, 2), (0.0631, 1), (0.0631, 2), (0.158, 1), (0.158, 2)],
    ]


def test_the_report_takes_the_best_rate_and_compares_seeds_in_pairs(tmp_path):
    runs = [result("adamw8bit", lr, 0, loss) for lr, loss in ((1e-3, 3.0), (2.51e-3, 2.0), (6.31e-3, 2.5))]
    runs += [result("adamw8bit", 2.51e-3, 1, 4.0), result("adamw8bit-b99", 1e-3, 0, 2.9)]
    runs += [result("ours-found", None, 0, 1.9), result("ours-found", None, 1, 3.64)]  # −5 % and −9 %
    runs += [result("muon", 1e-3, 0, 2.2), result("muon", 2.51e-3, 0, 3.0)]  # the best at an end; +10 %
    runs += [result("came", 1e-3, 0, None)]
    path = write(tmp_path / "runs.jsonl", runs)
    text = run("report.py", "--runs", path, "--out", tmp_path)
    rows = {
        line.split("|")[1].strip(): [x.strip() for x in line.split("|")[2:]]
        for line in text.splitlines()
        if "|" in line
    }
    # Two values 2 from their mean: their deviation over √2 is 2, and Student's quantile 12.706.
    assert rows["ours-found"][:5] == ["2.7700 ± 11.0544", "-7.00 ± 25.41", "none given", "–", "2"]
    assert rows["adamw8bit"][:3] == ["3.0000 ± 12.7062", "+0.00 ± 0.00", "0.00251"]
    assert rows["muon"][:3] == ["2.2000", "+10.00", "0.001 (end)"]
    assert rows["came"][0] == "diverged"
    summary = next(line for line in text.splitlines() if line.startswith("| ours-found"))
    assert [x.strip() for x in summary.split("|")[2:4]] == ["-7.00 ± 25.41", "-7.00"]
    assert [x.strip() for x in summary.split("|")[4:7]] == ["-7.0 (gpt-lora-r4-b1)", "1 of 1", "2.00"]
    assert "muon on gpt-lora-r4-b1: the best rate, 0.001, is at an end of those tried" in text
    assert "came: 1 of 1 runs diverged: gpt-lora-r4-b1 at 0.001" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {"excess-judge.png", "rates-judge.png"}
