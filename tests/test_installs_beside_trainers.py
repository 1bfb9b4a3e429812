"""What is resolved for a trainer stays as it is when ours is asked for, too: its torch, Triton and bitsandbytes.

A dry run by uv, which needs the metadata of packages only: nothing is downloaded or installed. Skipped without uv or
without an index.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KEPT = ("torch", "triton", "bitsandbytes")
TRAINERS = {
    "sd-scripts": ["torch==2.6.0", "accelerate==1.6.0", "transformers==4.54.1", "diffusers==0.32.1", "bitsandbytes"],
    "musubi-tuner": ["torch>=2.7.1", "accelerate==1.6.0", "diffusers==0.32.1", "transformers==4.57.6", "bitsandbytes"],
    "OneTrainer": ["torch==2.12.0", "bitsandbytes==0.49.1", "accelerate==1.12.0", "transformers==5.5.4"],
    "diffusion-pipe": ["deepspeed==0.18.4", "pytorch-optimizer", "torch-optimi", "bitsandbytes", "peft", "datasets"],
    "axolotl": ["axolotl==0.19.0"],
    "LLaMA-Factory": ["llamafactory==0.9.5", "bitsandbytes"],
    "SimpleTuner": ["simpletuner==3.1.6", "bitsandbytes>=0.45.0", "triton>=3.3.0"],
    "unsloth": ["unsloth==2026.10.9"],
    "diffusers": ["diffusers==0.42.1", "accelerate", "peft", "bitsandbytes"],
    "TRL": ["trl==1.16.0", "peft", "bitsandbytes"],
    "Lightning": ["lightning==2.6.6", "bitsandbytes"],
}
"""By trainer what has to be with it: its package, or what its requirement files of 2026-08 pin."""
SECONDS = 120
"""For one resolution; most take a few."""


def resolved(requirements: list[str], folder: Path) -> dict[str, str]:
    """The versions that an install would have, by name; skips where there is no index."""
    if importlib.util.find_spec("uv") is None:
        pytest.skip("needs uv")
    (folder / "requirements.in").write_text("\n".join(requirements))
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
    command += ["--python-version", "3.11", "requirements.in"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode and "No solution found" not in done.stderr:
        pytest.skip(f"no index: {done.stderr.splitlines()[-1:]}")
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ")[0].split("==") for line in done.stdout.splitlines() if "==" in line)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_what_a_trainer_has_stays(trainer: str, tmp_path: Path) -> None:
    alone = resolved(TRAINERS[trainer], tmp_path)
    together = resolved([*TRAINERS[trainer], str(ROOT)], tmp_path)
    assert "torch" in alone
    assert {name: together.get(name) for name in KEPT} == {name: alone.get(name) for name in KEPT}
    assert {name for name in alone if together.get(name) != alone[name]} == set()


def test_a_resolution_can_fail(tmp_path: Path) -> None:
    """Negative control: what our metadata excludes is said to be impossible."""
    resolved(["torch==2.6.0"], tmp_path)  # skips where the next line would
    with pytest.raises(AssertionError, match="No solution found"):
        resolved(["bitsandbytes==0.43.0", str(ROOT)], tmp_path)
