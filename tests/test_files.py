"""Checkpoint files: whole or an error, whatever happens to the process or to the bytes."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import build, train

from automagic_bnb import files, load_checkpoint, save_checkpoint

KILLS = int(os.environ.get("AUTOMAGIC_KILLS", "60"))
"""How often a process is killed while it saves; 1,000 by hand."""
FLIPS = int(os.environ.get("AUTOMAGIC_FLIPS", "300"))
"""How many damaged files are loaded; 10,000 by hand."""


@pytest.fixture
def saved(tmp_path: Path, tools: Any) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of an optimizer, and what it holds."""
    opt = build(tools)
    train(tools, opt, 3)
    contents = {"optimizer": opt.state_dict(), "step": 3}
    return save_checkpoint(tmp_path / "checkpoint.pt", contents), contents


def test_what_was_saved_comes_back(saved: tuple[Path, dict[str, Any]], tools: Any) -> None:
    """To the bit; `torch.load` reads the file too, and no part is left beside it."""
    path, contents = saved
    assert not tools.differences(contents, load_checkpoint(path))
    assert not tools.differences(contents, torch.load(path, weights_only=True))
    assert not tools.differences(contents, torch.load(path, weights_only=True, mmap=True))
    assert os.listdir(path.parent) == [path.name]
    assert load_checkpoint(path, map_location="meta")["optimizer"]["state"][0]["state1"].is_meta


def test_damaged_bytes_are_an_error(saved: tuple[Path, dict[str, Any]]) -> None:
    """One bit anywhere, or any number of bytes missing at the end, or more of them: never another state, silently."""
    path, _ = saved
    whole, chance = path.read_bytes(), random.Random(0)
    damaged = path.with_name("damaged.pt")
    for number in range(FLIPS):
        data = bytearray(whole)
        if number % 3 == 0:
            del data[chance.randrange(len(whole)) :]
        elif number % 50 == 1:
            data += bytes([chance.randrange(256)])
        else:
            data[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        damaged.write_bytes(data)
        with pytest.raises(ValueError, match=r"cut short|is damaged"):
            load_checkpoint(damaged)


def test_a_file_of_torch_is_told_apart(tmp_path: Path) -> None:
    """It has no digest, and the error says what reads it."""
    torch.save({"step": 1}, tmp_path / "plain.pt")
    with pytest.raises(ValueError, match=r"torch.load\(path, weights_only=True\)"):
        load_checkpoint(tmp_path / "plain.pt")
    (tmp_path / "empty.pt").touch()
    with pytest.raises(ValueError, match="cut short"):
        load_checkpoint(tmp_path / "empty.pt")
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "missing.pt")


class Calls:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_loading_runs_nothing(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint.pt", {"call": Calls(tmp_path / "made")})
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "made").exists()
    torch.load(tmp_path / "checkpoint.pt", weights_only=False)  # the negative control
    assert (tmp_path / "made").exists()


def test_an_error_while_saving_leaves_the_old_file(saved: tuple[Path, dict[str, Any]], monkeypatch: Any) -> None:
    """What cannot be pickled, or a disk that is full: the old file is as it was, and no part is left."""
    path, _ = saved
    before = path.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        save_checkpoint(path, {"no pickle": lambda: None})

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, {"step": 4})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_link_stays_one(saved: tuple[Path, dict[str, Any]]) -> None:
    """What it points to is replaced."""
    path, _ = saved
    link = path.with_name("latest.pt")
    link.symlink_to(path)
    save_checkpoint(link, {"step": 5})
    assert link.is_symlink()
    assert load_checkpoint(path) == {"step": 5}


SAVING = """
import os, random, signal, sys, time, torch
from pathlib import Path
from automagic_bnb import load_checkpoint, save_checkpoint

torch.set_num_threads(1)
path, kills, chance, last, met = Path(sys.argv[1]), int(sys.argv[2]), random.Random(0), 0, 0
save_checkpoint(path, {"step": 0, "weights": torch.zeros(200_000)})
for _ in range(kills):
    child = os.fork()
    if not child:
        while True:
            last += 1
            save_checkpoint(path, {"step": last, "weights": torch.full((200_000,), float(last))})
    time.sleep(chance.random() * 0.03)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = load_checkpoint(path)
    assert found["step"] >= last, (found["step"], last)
    assert (found["weights"] == found["step"]).all()
    last = found["step"]
    parts = list(path.parent.glob(".*.part"))
    met += bool(parts)
    for part in parts:
        part.unlink()
print(met, last)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_process_killed_while_saving_leaves_a_whole_file(tmp_path: Path) -> None:
    """Killed at random moments, most of them while bytes are on their way: the last file that was whole loads."""
    command = [sys.executable, "-c", SAVING, str(tmp_path / "checkpoint.pt"), str(KILLS)]
    met, last = map(int, subprocess.run(command, capture_output=True, check=True, text=True).stdout.split())
    assert met > KILLS / 10, "no kill met a file on its way"
    assert last > KILLS / 10, "no file was ever finished"
