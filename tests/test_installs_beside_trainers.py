"""A dry run of pip over what trainers pin: an install of ours replaces no torch and no bitsandbytes of theirs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PINS = {
    "kohya's scripts": ["torch==2.6.0"],
    "OneTrainer": ["torch==2.12.0", "bitsandbytes==0.49.1"],
    "axolotl": ["torch==2.11.0", "bitsandbytes==0.50.2"],
}
"""What is installed where a trainer runs; of OneTrainer by requirements-default.txt of 2026-08, of axolotl 0.19.0."""


def dry_run(*requirements: str) -> dict[str, str]:
    """The versions that pip would install, by name; skips where there is no index.

    Asked for by AUTOMAGIC_DRY_RUNS=1 only: where an index has no metadata of its own pip fetches wheels of gigabytes.
    """
    if "AUTOMAGIC_DRY_RUNS" not in os.environ:
        pytest.skip("takes minutes; set AUTOMAGIC_DRY_RUNS=1")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    done = subprocess.run([*command, *requirements], cwd=ROOT, capture_output=True, text=True, timeout=300)
    if done.returncode and "ResolutionImpossible" not in done.stderr + done.stdout:
        pytest.skip(f"no index: {done.stderr.splitlines()[-1:]}")
    assert done.returncode == 0, done.stderr
    report: Any = json.loads(done.stdout[done.stdout.index("{") :])
    return {x["metadata"]["name"].lower(): x["metadata"]["version"] for x in report["install"]}


@pytest.mark.parametrize("trainer", PINS)
def test_what_a_trainer_pins_stays(trainer: str) -> None:
    """pip resolves both together, and with Triton's version as torch brings it."""
    found = dry_run(".", *PINS[trainer])
    for pin in PINS[trainer]:
        name, version = pin.split("==")
        assert found[name].split("+")[0] == version
    alone = dry_run(PINS[trainer][0])
    assert found.get("triton") == alone.get("triton")
