"""What must not stop a training run, the dashboard of all others, or a command: bad logs, full disks, odd arguments."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from automagic_bnb import Automagic8bit, RunLog, read_run, write_dashboard
from automagic_bnb.command import cli
from automagic_bnb.run_log import FILE_NAME
from automagic_bnb.watch.callbacks import Sinks

BAD_LINES = {
    "a step of 2^63": b'{"step": 9223372036854775808, "metrics": {"loss": 1}}\n',
    "100,000 brackets": b"[" * 100_000 + b"\n",
    "a number beyond any float": b'{"step": 1, "metrics": {"loss": 1' + b"0" * 400 + b"}}\n",
    "bytes that are no text": b"\xff\xfe\x00\n",
    "metrics that are a list": b'{"step": 1, "metrics": [[1, 2]]}\n',
}


def log_losses(folder: Path, *losses: float) -> Path:
    with RunLog(folder) as log:
        for step, loss in enumerate(losses):
            log.log(step, {"loss": loss})
    return folder


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_costs_only_itself(line: bytes, tmp_path: Path) -> None:
    log_losses(tmp_path, 2.0, 1.0)
    with (tmp_path / FILE_NAME).open("ab") as file:
        file.write(line)
    log_losses(tmp_path / "more", 3.0)
    run = read_run(tmp_path)
    assert run.broken_lines == 1
    assert run.series["loss"].values.tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    ("step", "metrics", "error", "message"),
    [
        (2**63, {}, ValueError, r"step=9223372036854775808: must be a whole number from 0 to 2\*\*63 - 1"),
        (1, {"loss": 10**400}, ValueError, "metric 'loss' is a number beyond any float"),
        (1, {3: 1.0}, TypeError, "a metric's name is text, not 3"),
        (1, {None: 1.0}, TypeError, "is text, not None"),
    ],
)
def test_what_could_not_be_read_back_is_not_logged(
    step: Any, metrics: Any, error: type, message: str, tmp_path: Path
) -> None:
    with RunLog(tmp_path) as log:
        with pytest.raises(error, match=message):
            log.log(step, metrics)
        log.log(2**63 - 1, {"\ud800": np.inf})  # the largest step, and half a character
    run = read_run(tmp_path)
    assert run.series["\ud800"].steps.tolist() == [2**63 - 1]
    assert not run.broken_lines


class Disk:
    """A log's file on a disk that takes so many bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room, self.closed = file, room, False

    def write(self, data: bytes) -> int:
        taken = min(len(data), self.room)
        if data and not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= taken
        return self.file.write(data[:taken])

    def fileno(self) -> int:
        return self.file.fileno()

    def close(self) -> None:
        self.file.close()


def test_a_full_disk_does_not_end_training(tmp_path: Path) -> None:
    """It is said once; what was logged before and what is logged when there is room again is read."""
    sinks = Sinks(tmp_path, None)
    log = sinks._log
    assert log is not None
    sinks.write(0, {"loss": 0.0}, {})
    disk = log._file = Disk(log._file, 15)
    with pytest.warns(UserWarning, match=r"could not be written.*No space left"):
        sinks.write(1, {"loss": 1.0}, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(2, 5):
            sinks.write(step, {"loss": 1.0}, {})
    disk.room = 10_000
    sinks.write(5, {"loss": 5.0}, {})
    sinks.close()
    run = read_run(tmp_path)
    assert run.series["loss"].steps.tolist() == [0, 5]
    assert run.broken_lines == 1


def test_two_writers_lose_no_line(tmp_path: Path) -> None:
    """Each line goes to the file's end in one piece."""
    code = (
        "import sys; from automagic_bnb import RunLog\n"
        "with RunLog(sys.argv[1]) as log:\n"
        "    for step in range(200): log.log(step, {sys.argv[2]: 1.0})\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in ("one", "two")]
    assert [writer.wait() for writer in writers] == [0, 0]
    lines = (tmp_path / FILE_NAME).read_bytes().splitlines()
    assert sum(b'"one"' in line for line in lines) == sum(b'"two"' in line for line in lines) == 200
    assert not read_run(tmp_path).broken_lines


# --- the dashboard ----------------------------------------------------------------------------------------------------


def test_a_bad_run_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder for a log, a file that may not be read: named, left out, the rest is drawn."""
    pytest.importorskip("plotly")
    log_losses(tmp_path / "good", 2.0, 1.0)
    (tmp_path / "folder" / FILE_NAME).mkdir(parents=True)
    unreadable = log_losses(tmp_path / "unreadable", 1.0) / FILE_NAME
    plain = Path.open

    def refuse(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path == unreadable:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return plain(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.warns(UserWarning, match="left out, it cannot be read") as said:
        page = write_dashboard(tmp_path)
    assert {name for name in ("folder", "unreadable") for x in said if f"{name} is left out" in str(x.message)} == {
        "folder",
        "unreadable",
    }
    assert 'data-value="good"' in page.read_text(encoding="utf-8")


def test_the_page_takes_no_logs_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither by its name, nor by a link, hard or not, nor what else a link points to."""
    pytest.importorskip("plotly")
    log = log_losses(tmp_path / "run", 2.0, 1.0) / FILE_NAME
    other = tmp_path / "thesis.txt"
    other.write_text("years of work")
    os.link(log, tmp_path / "hard.html")
    (tmp_path / "soft.html").symlink_to(log)
    (tmp_path / "elsewhere.html").symlink_to(other)
    before = log.read_bytes()
    for name in (f"run/{FILE_NAME}", "hard.html", "soft.html", "elsewhere.html"):
        with pytest.raises(ValueError, match=r"is a run's log|is a link"):
            write_dashboard(tmp_path, tmp_path / name)
        assert cli.main(["dashboard", str(tmp_path), "--out", str(tmp_path / name)]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    assert log.read_bytes() == before
    assert other.read_text() == "years of work"


def test_pictures_take_nobodys_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the demo, before it computes anything, and of a checkpoint: no link's target, not the checkpoint itself."""
    pytest.importorskip("matplotlib")
    thesis, checkpoint = tmp_path / "thesis.txt", tmp_path / "checkpoint.png"
    thesis.write_text("years of work")
    torch.save(Automagic8bit([torch.nn.Parameter(torch.ones(8))]).state_dict(), checkpoint)
    (tmp_path / "loss.png").symlink_to(thesis)
    os.link(checkpoint, tmp_path / "same.png")
    before = checkpoint.read_bytes()
    for arguments, message in [
        (["demo", "--out", str(tmp_path)], "loss.png is a link"),
        (["inspect", str(checkpoint), "--picture", str(tmp_path / "loss.png")], "loss.png is a link"),
        (["inspect", str(checkpoint), "--picture", str(tmp_path / "same.png")], "same.png is the checkpoint"),
    ]:
        assert cli.main(arguments) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert thesis.read_text() == "years of work"
    assert checkpoint.read_bytes() == before


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["demo", "--seed", str(10**22)], 2, "must be from 0 to 2**63 - 1"),
        (["demo", "--device", "meta"], 1, "cannot use the device 'meta'"),
        (["dashboard", "nowhere"], 1, "nowhere is no folder"),
    ],
)
def test_a_command_that_fails_says_so_in_words(
    arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = cli.main(arguments)
    except SystemExit as e:
        found = e.code
    error = capsys.readouterr().err
    assert found == status
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error


def test_whatever_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: Any) -> int:
        raise RuntimeError("on two\nlines")

    monkeypatch.setattr(cli, "run_doctor", fail)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == "automagic-bnb: error: on two lines (RuntimeError)\n"


def test_output_that_is_not_utf_8(tmp_path: Path) -> None:
    """What the terminal does not know is a question mark, not a traceback."""
    pytest.importorskip("plotly")
    log_losses(tmp_path / "Übung" / "✓", 1.0)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "automagic_bnb", "dashboard", str(tmp_path / "Übung")]
    ran = subprocess.run(command, env=environment, capture_output=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith(b"?bung/dashboard.html\n")


# --- inference mode ---------------------------------------------------------------------------------------------------


def test_a_step_inside_inference_mode_is_a_step(tools: Any) -> None:
    """And can be followed by one outside; a model that was made inside is refused in words."""
    results = []
    for inside in (True, False):
        p = tools.parameters((64, 64))
        opt = Automagic8bit(p, lr=1e-3)
        for step in range(3):
            tools.give_gradients(p, step)
            with torch.inference_mode(inside and step == 0):
                opt.step()
        results.append(p[0].detach().clone())
    assert torch.equal(*results)
    with torch.inference_mode():
        q = torch.nn.Parameter(torch.zeros(8), requires_grad=False)
        q.grad = torch.ones(8)
    opt = Automagic8bit([q], lr=1e-3)
    with pytest.raises(ValueError, match=r"made inside torch.inference_mode\(\)"):
        opt.step()
