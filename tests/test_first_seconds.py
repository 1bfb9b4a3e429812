"""What answers at once: `--help`, `--version` and importing the package wait for neither torch nor bitsandbytes."""

from __future__ import annotations

import ast
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

import automagic_bnb
from automagic_bnb.command import cli, quiet
from automagic_bnb.command.progress import WatchedFile, progress

HEAVY = ("torch", "bitsandbytes", "triton", "numpy", "matplotlib", "sklearn")
COMMANDS = (["--help"], ["--version"], ["demo", "--help"], ["doctor", "--help"], ["inspect", "--help"])


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=folder)


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    """Which is what takes seconds; and nothing is written beside the help."""
    code = f"""
import json, sys
from automagic_bnb.command.cli import main
try:
    main({arguments})
except SystemExit as e:
    assert e.code == 0
sys.stderr.write(json.dumps(sorted(sys.modules)))
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "automagic-bnb" in done.stdout
    assert set(json.loads(done.stderr)).isdisjoint(HEAVY)


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"automagic-bnb {automagic_bnb.__version__}\n"


def test_a_command_does_not_open_with_another_packages_line(tmp_path: Path) -> None:
    """The control: bitsandbytes' logger writes it, where nobody holds it back."""
    say = f"import logging; logging.getLogger({quiet.LOGGER!r}).warning('Failed to load CPU gemm_4bit_forward from x')"
    hold = "from automagic_bnb.command import quiet; quiet.hold_import_warnings(); "
    assert "gemm_4bit_forward" in python(say, tmp_path).stderr
    assert python(f"{hold}{say}; assert len(quiet.held) == 1", tmp_path).stderr == ""


def test_other_messages_pass() -> None:
    record = logging.LogRecord(quiet.LOGGER, logging.WARNING, "", 0, "something else", None, None)
    assert quiet.Held().filter(record)


def test_every_public_name_is_there_and_the_lists_agree() -> None:
    """Those that type checkers see, those that are imported on use, and `__all__`."""
    source = Path(str(automagic_bnb.__file__)).read_text(encoding="utf-8")
    (block,) = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == {name: f"automagic_bnb.{module}" for name, module in automagic_bnb._MODULE_OF.items()}
    assert sorted(seen) == sorted(automagic_bnb.__all__)
    assert all(getattr(automagic_bnb, name) is not None for name in automagic_bnb.__all__)
    assert set(automagic_bnb.__all__) <= set(dir(automagic_bnb))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Automagic4bit'"):
        _ = automagic_bnb.Automagic4bit  # pyright: ignore[reportAttributeAccessIssue]


def test_progress_gives_every_item_and_draws_for_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("automagic_bnb.command.progress.INTERVAL", 0)
    assert list(progress("abc", "reading")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress("abc", "reading")) == ["a", "b", "c"]
    drawn = capsys.readouterr().err
    assert "reading [################........] 2/3" in drawn
    assert drawn.endswith("\r\x1b[K")
    assert list(progress(iter("ab"), "reading")) == ["a", "b"]
    assert "reading 1" in capsys.readouterr().err


def test_a_bar_is_drawn_ten_times_a_second_at_most(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("automagic_bnb.command.progress.INTERVAL", 1000)
    assert len(list(progress(range(10_000), "reading"))) == 10_000
    assert capsys.readouterr().err.count("reading") == 1


def test_reading_a_file_shows_how_much_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a terminal, in MB; what is read is what is there."""
    monkeypatch.setattr("automagic_bnb.command.progress.INTERVAL", 0)
    path = tmp_path / "x"
    path.write_bytes(bytes(range(250)) * 16_000)  # 4 MB
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with WatchedFile(path, "reading") as file:
            part = bytearray(1_000_000)
            assert file.readinto(part) == 1_000_000
            assert bytes(part) + file.read() == path.read_bytes()
        drawn = capsys.readouterr().err
        assert drawn.endswith("\r\x1b[K") == terminal
        assert ("reading [######..................] 1/4 MB" in drawn) == terminal
