"""A run's log comes back as it was written, whatever interrupted it."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from automagic_bnb import Automagic8bit, RunLog, read_run
from automagic_bnb.run_log import FILE_NAME, Run, as_run, find_runs


def as_dict(run: Run) -> dict[str, dict[int, float]]:
    """Values by step by name."""
    return {
        name: dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))
        for name, series in run.series.items()
    }


def test_what_is_logged_comes_back(tmp_path: Path) -> None:
    """Several metrics, some not at every step, calls for one step adding up, steps in any order."""
    with RunLog(tmp_path / "a" / "run") as log:
        log.log(10, {"loss": 1.5})
        log.log(5, {"loss": 2})
        log.log(10, {"lr/mean": 1e-4})
        log.log(10, {"loss": 1.25})
        log.log(12, {})
    run = read_run(tmp_path / "a" / "run")
    assert as_dict(run) == {"loss": {5: 2.0, 10: 1.25}, "lr/mean": {10: 1e-4}}
    assert run.name == "run"
    assert run.broken_lines == 0
    assert run.series["loss"].steps.dtype == np.int64
    assert run.series["loss"].values.dtype == np.float64


numbers_of_any_kind = some.floats(width=64) | some.integers(-(2**60), 2**60) | some.booleans()
some_metrics = some.dictionaries(some.text(max_size=8), numbers_of_any_kind, max_size=4)


@given(some.lists(some.tuples(some.integers(0, 10**12), some_metrics), max_size=12))
@settings(max_examples=30, deadline=None)
def test_any_numbers_under_any_names(tmp_path_factory: pytest.TempPathFactory, records: Any) -> None:
    """NaN, infinities, the largest floats, names with newlines: bit for bit, against a dict built by hand."""
    folder, wanted = tmp_path_factory.mktemp("run"), {}
    with RunLog(folder) as log:
        for step, metrics in records:
            log.log(step, metrics)
            for name, value in metrics.items():
                wanted.setdefault(name, {})[step] = float(value)
    found = as_dict(read_run(folder))
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert sorted(values) == list(found[name])
        assert [struct(values[s]) for s in sorted(values)] == [struct(x) for x in found[name].values()]


def struct(x: float) -> str:
    return "nan" if math.isnan(x) else x.hex()


def test_tensors_and_numpy_values_are_numbers(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        values = {"a": torch.tensor(0.5), "b": np.float32(0.25), "c": torch.tensor(3), "d": np.bool_(True)}
        log.log(np.int64(3), values)
    assert as_dict(read_run(tmp_path)) == {"a": {3: 0.5}, "b": {3: 0.25}, "c": {3: 3.0}, "d": {3: 1.0}}


def test_metrics_of_an_optimizer(tmp_path: Path, tools: Any) -> None:
    """All of them, the one named "step" included."""
    parameters = tools.parameters((40, 30))
    opt = Automagic8bit(parameters, lr=1e-3)
    tools.train(opt, parameters, range(3))
    metrics = opt.get_metrics()
    with RunLog(tmp_path) as log:
        log.log(7, metrics)
    found = {name: values[7] for name, values in as_dict(read_run(tmp_path)).items()}
    assert found == pytest.approx(metrics, nan_ok=True, rel=0, abs=0)
    assert found["step"] == 3


# --- interruptions ---------------------------------------------------------------------------------------------------


def test_a_resumed_run_supersedes_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    """Steps 0 to 90, taken up again after 50 with other numbers at other steps."""
    with RunLog(tmp_path) as log:
        for step in range(0, 100, 10):
            log.log(step, {"loss": step, "first": 1})
    RunLog(tmp_path).close()  # opened, and nothing logged
    with RunLog(tmp_path) as log:
        for step in (55, 66, 77):
            log.log(step, {"loss": -step})
    found = as_dict(read_run(tmp_path))
    assert found["loss"] == {**{s: s for s in range(0, 51, 10)}, 55: -55, 66: -66, 77: -77}
    assert list(found["first"]) == [0, 10, 20, 30, 40, 50]


@pytest.mark.parametrize("lost", range(1, 46))
def test_a_torn_last_line_costs_only_itself(lost: int, tmp_path: Path) -> None:
    """Cut at every byte, read as it lies and after the run goes on."""
    with RunLog(tmp_path) as log:
        log.log(1, {"loss": 0.5})
        log.log(2, {"loss": math.nan, "größe": 3})
    path = tmp_path / FILE_NAME
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - lost])
    torn = lost > 1 and lost < len(whole.splitlines()[-1]) + 1  # by 1 byte only the newline is lost
    kept = [1, 2] if lost == 1 else [1]
    run = read_run(tmp_path)
    assert list(as_dict(run)["loss"]) == kept
    assert run.broken_lines == int(torn)
    with RunLog(tmp_path) as log:
        log.log(3, {"loss": 0.25})
    run = read_run(tmp_path)
    assert list(as_dict(run)["loss"]) == [*kept, 3]
    assert run.broken_lines == int(torn)


@pytest.mark.parametrize("line", [b"\xff\xfe", b"[1]", b"3", b'{"step": -1, "metrics": {}}', b'{"step": 1}', b"null"])
def test_foreign_lines_are_counted_and_left_out(line: bytes, tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.log(1, {"loss": 0.5})
    path = tmp_path / FILE_NAME
    path.write_bytes(line + b"\n" + path.read_bytes())
    run = read_run(tmp_path)
    assert run.broken_lines == 1
    assert as_dict(run) == {"loss": {1: 0.5}}


KILLED = """
import os, signal, sys
from automagic_bnb.run_log import RunLog
log = RunLog(sys.argv[1])
for step in range(20):
    log.log(step, {"loss": step / 2})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_killed_process_loses_nothing(tmp_path: Path) -> None:
    """No close, no exit handler, no collector."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert as_dict(read_run(tmp_path))["loss"] == {step: step / 2 for step in range(20)}


def test_every_line_is_forced_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    path = tmp_path / FILE_NAME
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.read_bytes()))
    with RunLog(tmp_path) as log:
        log.log(1, {"loss": 1})
        log.log(2, {"loss": 2})
    assert [text.count(b"\n") for text in synced] == [1, 2]
    assert [json.loads(line)["step"] for line in synced[-1].splitlines()] == [1, 2]


# --- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "metrics", "error", "message"),
    [
        (1.5, {}, TypeError, "step=1.5: must be a whole number"),
        ("3", {}, TypeError, "step='3'"),
        (True, {}, TypeError, "step=True"),
        (-1, {}, ValueError, "step=-1"),
        (1, {"loss": "0.5"}, TypeError, "metric 'loss' is a str '0.5'"),
        (1, {"loss": None}, TypeError, "metric 'loss' is a NoneType"),
        (1, {"loss": torch.zeros(3)}, TypeError, r"metric 'loss' is a Tensor of shape \(3,\)"),
        (1, {"loss": 1j}, TypeError, "metric 'loss' is a complex"),
    ],
)
def test_what_cannot_be_logged(step: Any, metrics: Any, error: type, message: str, tmp_path: Path) -> None:
    with RunLog(tmp_path) as log, pytest.raises(error, match=message):
        log.log(step, metrics)
    assert (tmp_path / FILE_NAME).read_bytes() == b""


def test_folders_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        RunLog(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match=r"holds no run.*metrics\.jsonl"):
        read_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        find_runs(tmp_path)
    with pytest.raises(NotADirectoryError, match="nowhere is no folder"):
        find_runs(tmp_path / "nowhere")


def test_a_closed_log_says_so(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.close()
    with pytest.raises(ValueError, match="is closed"):
        log.log(1, {})


# --- other sources ---------------------------------------------------------------------------------------------------


def test_runs_are_found_at_any_depth(tmp_path: Path) -> None:
    for name in ("b", "a/deep", "a"):
        RunLog(tmp_path / name).close()
    assert find_runs(tmp_path) == [tmp_path / "a", tmp_path / "a" / "deep", tmp_path / "b"]
    assert find_runs(tmp_path / "b") == [tmp_path / "b"]


def test_runs_are_in_the_order_of_the_numbers_in_their_names(tmp_path: Path) -> None:
    for name in ("run 10", "run 9", "run", "1", "run 9b", "x²", "٣"):
        RunLog(tmp_path / name).close()
    assert [run.name for run in find_runs(tmp_path)] == ["1", "run", "run 9", "run 9b", "run 10", "x²", "٣"]


def test_histories_are_runs(tmp_path: Path) -> None:
    """Hugging Face's records, sequences with and without steps, a folder, and a run itself."""
    wanted = {"loss": {0: 3.0, 1: 2.0}}
    with RunLog(tmp_path) as log:
        log.log(0, {"loss": 3})
        log.log(1, {"loss": 2})
    records = [{"step": 1, "loss": 2.0}, {"step": 0, "loss": 3.0}]
    for source in (records, {"loss": [3, 2]}, {"loss": torch.tensor([2, 3]), "step": [1, 0]}, tmp_path, str(tmp_path)):
        assert as_dict(as_run(source)) == wanted
    run = read_run(tmp_path)
    assert as_run(run) is run
    assert as_run({}).series == as_run([]).series == {}


@pytest.mark.parametrize(
    ("history", "error", "message"),
    [
        ([{"loss": 1.0}], ValueError, "'step'"),
        ([1.0, 2.0], ValueError, "a mapping with a 'step', not 1.0"),
        ({"loss": [1, 2], "lr": [1]}, ValueError, "of one length, not"),
        ({"loss": ["a"]}, TypeError, "metric 'loss'"),
    ],
)
def test_histories_that_are_none(history: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        as_run(history)
