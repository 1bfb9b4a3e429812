"""The command `run`: a trainer's script, in a process in which bitsandbytes' AdamW is our optimizer."""

from __future__ import annotations

import importlib
import os
import runpy
import sys
import traceback
from pathlib import Path

from automagic_bnb.trainers import replacing

ENVIRONMENT = "AUTOMAGIC_BNB_OPTIONS"
REFUSED = 2


def run(settings: list[str], program: list[str], trainer: str | None = None, local_rank: str | None = None) -> int:
    """Replace, say in one line what, and run the program as Python itself would; its exit status is its own.

    Args:
        settings: options as NAME=VALUE, over those of the environment's `AUTOMAGIC_BNB_OPTIONS`.
        trainer: a module of automagic_bnb.trainers, for one in which more has to be replaced.
        program: a script or "-m" and a module, and its arguments; a "--" before it is left out.
        local_rank: the first argument for the program, which a launcher put before its name since it did not know it.
    """
    program = program[1:] if program[:1] == ["--"] else program
    try:
        options = replacing.checked(parse(os.environ.get(ENVIRONMENT, "").split()) | parse(settings))
        check_program(program)
        replaced = replacing.replace(options)
        if trainer is not None:
            importlib.import_module(f"automagic_bnb.trainers.{trainer}").enter()
    except (ImportError, TypeError, ValueError) as e:
        return refuse(str(e))
    if local_rank is not None:
        at = 2 if program[0] == "-m" else 1
        program = [*program[:at], f"--local_rank={local_rank}", *program[at:]]
    said = ", ".join(f"{name}={value!r}" for name, value in options.items())
    say(f"{', '.join(replaced)}{'; with ' + said if said else ''}")
    try:
        execute(program)
    except Exception:  # the program's own, which it would show by itself
        traceback.print_exc()
        return 1
    finally:
        if not replacing.made:
            say("the program made none of these optimizers: was one of them chosen in its settings?")
    return 0


def parse(settings: list[str]) -> dict[str, str]:
    """NAME=VALUE each.

    Raises:
        ValueError: one has no "=".
    """
    for setting in settings:
        if "=" not in setting:
            raise ValueError(f"{setting!r}: must be NAME=VALUE")
    return dict(setting.split("=", 1) for setting in settings)


def check_program(program: list[str]) -> None:
    """Raise ValueError where there is nothing that could be run."""
    if not program or program == ["-m"]:
        raise ValueError("no program: automagic-bnb run [--set NAME=VALUE ...] -- SCRIPT.py [ARGUMENT ...]")
    if program[0] != "-m" and program[0].startswith("-"):
        raise ValueError(f"{program[0]!r} is no option of run; the program's own stand after its name")
    if program[0] != "-m" and not Path(program[0]).is_file():
        raise ValueError(f"there is no file {program[0]!r} to run")


def execute(program: list[str]) -> None:
    """Run a script, or a module after "-m", as `__main__` with its arguments."""
    if program[0] == "-m":
        sys.argv = program[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(program)
        sys.path.insert(0, str(Path(program[0]).resolve().parent))
        runpy.run_path(program[0], run_name="__main__")


def say(text: str) -> None:
    sys.stderr.write(f"automagic-bnb run: {text}\n")


def refuse(why: str) -> int:
    say(f"error: {why}")
    return REFUSED
