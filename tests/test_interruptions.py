"""What ends a command from outside (Ctrl-C, a reader that goes away, a full disk) is a line at most and a status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from automagic_bnb import Automagic8bit

BY_CTRL_C = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
INTO_AN_IMPORT_ERROR = """
try:
    raise KeyboardInterrupt
except KeyboardInterrupt as e:
    raise ImportError("this extension is broken") from e
"""
needs_posix = pytest.mark.skipif(os.name != "posix", reason="signals and pipes are POSIX's here")


def command(
    *arguments: str, module: str = "automagic_bnb", path: Path | None = None, **options: object
) -> list[object]:
    """Exit status, standard output and error of a command in a process of its own.

    path: a folder with modules that stand before all others.
    """
    environment = {**os.environ, "PYTHONPATH": str(path)} if path is not None else dict(os.environ)
    environment["PYTHONWARNINGS"] = "ignore"
    environment.pop("PYTHONUNBUFFERED", None)  # argparse takes no notice of what fails in printing its texts
    words = [sys.executable, "-m", module, *arguments]
    ran: Any = subprocess.run(words, env=environment, stderr=subprocess.PIPE, text=True, cwd=path, **options)  # type: ignore
    return [ran.returncode, ran.stdout, ran.stderr]


@needs_posix
@pytest.mark.parametrize("text", [BY_CTRL_C, INTO_AN_IMPORT_ERROR], ids=["signal", "as an ImportError"])
@pytest.mark.parametrize(
    ("imported", "module", "arguments"),
    [
        ("argparse", "automagic_bnb", ["doctor"]),
        ("torch", "automagic_bnb", ["doctor"]),
        ("torch", "automagic_bnb", ["inspect", "file.pt"]),
        ("torch", "automagic_bnb", ["dashboard", "."]),
        ("torch", "automagic_bnb.run", ["--", "script.py"]),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, list) else x,
)
def test_ctrl_c_while_something_is_imported(
    imported: str, module: str, arguments: list[str], text: str, tmp_path: Path
) -> None:
    """Before the command line is read, and while torch is loaded, which takes seconds."""
    if imported == "argparse" and text == INTO_AN_IMPORT_ERROR:
        pytest.skip("nothing of ours has begun then, and argparse makes no such error")
    (tmp_path / "script.py").write_text("")
    (tmp_path / f"{imported}.py").write_text(text)
    assert command(*arguments, module=module, path=tmp_path) == [130, None, "interrupted\n"]


def test_an_error_that_is_none_of_ctrl_c_is_not_taken_for_it(tmp_path: Path) -> None:
    """The negative control."""
    (tmp_path / "torch.py").write_text("raise ImportError('this extension is broken')")
    status, _, error = command("doctor", path=tmp_path)
    assert status == 1
    assert "this extension is broken" in error


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    p = torch.nn.Parameter(torch.zeros(64, 64))
    opt = Automagic8bit([p], lr=1e-3)
    p.grad = torch.ones_like(p)
    opt.step()
    path = tmp_path_factory.mktemp("checkpoint") / "optimizer.pt"
    torch.save(opt.state_dict(), path)
    return path


@needs_posix
@pytest.mark.parametrize(
    "arguments", [["inspect"], ["inspect", "--json"], ["--version"], ["demo", "--help"]], ids="-".join
)
def test_a_reader_that_goes_away_is_no_error(arguments: list[str], checkpoint: Path) -> None:
    """As with `| head`; a shell reports 141 of a program that ends so."""
    if arguments[0] == "inspect":
        arguments = [*arguments, str(checkpoint)]
    read, write = os.pipe()
    os.close(read)
    try:
        assert command(*arguments, stdout=write) == [141, None, ""]
    finally:
        os.close(write)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["inspect"], ["--version"]])
def test_a_full_disk_behind_the_output_is_one_line(arguments: list[str], checkpoint: Path) -> None:
    if arguments[0] == "inspect":
        arguments = [*arguments, str(checkpoint)]
    with open("/dev/full", "w") as full:
        status, _, error = command(*arguments, stdout=full)
    assert status == 1
    assert error.count("\n") == 1
    assert "No space left on device" in error


def test_a_program_that_fails_shows_its_own_traceback(tmp_path: Path) -> None:
    """Under `run` what fails is the user's, who needs the line of it."""
    (tmp_path / "script.py").write_text("def train():\n    return 1 / 0\ntrain()\n")
    status, _, error = command("run", "--", str(tmp_path / "script.py"), path=tmp_path)
    assert status == 1
    assert "return 1 / 0" in error
    assert "ZeroDivisionError" in error
