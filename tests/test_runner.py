"""`automagic-bnb run`: a trainer's script with our optimizer in bitsandbytes' places."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bitsandbytes")

TRAIN = """
import json, sys
import torch
import bitsandbytes as bnb
from bitsandbytes.optim import AdamW

from beside import WIDTH

torch.manual_seed(0)
model = torch.nn.Module()
model.base = torch.nn.Linear(WIDTH, WIDTH)
model.lora_A = torch.nn.Linear(WIDTH, 8, bias=False)
model.lora_B = torch.nn.Linear(8, WIDTH, bias=False)
parameters = [model.lora_A.weight, model.lora_B.weight]
asked = sys.argv[1]
if asked == "AdamW":
    opt = AdamW(parameters, 1e-3, (0.9, 0.99), optim_bits=8, amsgrad=False, min_8bit_size=0)
elif asked == "none":
    opt = torch.optim.SGD(parameters, lr=0.1)
else:
    opt = getattr(bnb.optim, asked)(parameters, lr=1e-3, weight_decay=0.02)
before = [p.detach().clone() for p in parameters]
model.lora_B(model.lora_A(torch.randn(4, WIDTH))).square().mean().backward()
opt.step()
print(json.dumps({
    "class": type(opt).__name__, "module": type(opt).__mro__[1].__module__, "argv": sys.argv[1:], "name": __name__,
    "lora": [opt.facts_of(p).is_lora for p in parameters] if hasattr(opt, "facts_of") else None,
    "group": {k: opt.param_groups[0].get(k) for k in ("lr", "auto_lr", "weight_decay", "optim_bits", "lora", "betas")},
    "moved": [bool((p != q).any()) for p, q in zip(parameters, before)],
}))
"""


def run(tmp_path: Path, *arguments: str, module: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "beside.py").write_text("WIDTH = 64\n")
    start = ["-m", "automagic_bnb.run"] if module else ["-m", "automagic_bnb", "run"]
    inherited = {k: v for k, v in os.environ.items() if k != "AUTOMAGIC_BNB_OPTIONS"}
    return subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env={**inherited, **environment},
    )


def result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    import json

    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("module", [True, False])
def test_a_script_trains_with_ours(module: bool, tmp_path: Path) -> None:
    """With its arguments and the files beside it; one line says what was replaced; LoRA is told by names."""
    done = run(tmp_path, "--set", "lora_rank_penalty=false", "--", "train.py", "AdamW8bit", "--set", "x", module=module)
    found = result(done)
    assert (found["class"], found["module"]) == ("Automagic8bit", "automagic_bnb.optimizer")
    assert found["argv"] == ["AdamW8bit", "--set", "x"]
    assert found["name"] == "__main__"
    assert found["moved"] == [False, True] or found["moved"] == [True, True]
    assert found["lora"] == [True, True]
    assert (found["group"]["lr"], found["group"]["weight_decay"]) == (1e-3, 0.02)
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("automagic-bnb run:")]
    assert "AdamW8bit = Automagic8bit, PagedAdamW8bit = PagedAutomagic8bit, AdamW = Automagic" in line
    assert "with lora_rank_penalty=False" in line
    assert "LoRA parts" not in done.stderr


def test_adamw_takes_its_arguments_by_position_and_keeps_the_bits(tmp_path: Path) -> None:
    """As transformers' Trainer calls it; a module is run, too; the rate is found where auto_lr is set."""
    found = result(run(tmp_path, "--set", "auto_lr=true", "--", "-m", "train", "AdamW"))
    assert found["class"] == "Automagic"
    assert found["group"]["optim_bits"] == 8
    assert found["group"]["betas"] == [0.9, 0.99, 0.999]
    assert (found["group"]["auto_lr"], found["group"]["weight_decay"]) == (True, 0.01)


def test_options_from_the_environment_stand_below_those_given(tmp_path: Path) -> None:
    options = "lora=true weight_decay=0.5"
    found = result(
        run(tmp_path, "--set", "weight_decay=0.25", "train.py", "PagedAdamW8bit", AUTOMAGIC_BNB_OPTIONS=options)
    )
    assert found["class"] == "PagedAutomagic8bit"
    assert (found["group"]["lora"], found["group"]["weight_decay"]) == (True, 0.25)


@pytest.mark.parametrize("program", [["train.py"], ["-m", "train"]])
def test_what_deepspeeds_launcher_puts_in_goes_to_the_program(program: list[str], tmp_path: Path) -> None:
    """It takes the runner for the program, and its arguments begin with a rank."""
    done = run(tmp_path, "--local_rank=3", "--set", "seed=1", "--", *program, "AdamW8bit")
    assert done.returncode != 0  # of the script's: it takes the first argument for a class
    assert "'--local_rank=3'" in done.stderr


def test_a_program_that_chose_another_optimizer_is_told(tmp_path: Path) -> None:
    done = run(tmp_path, "--", "train.py", "none")
    assert result(done)["class"] == "SGD"
    assert "made none of these optimizers" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--set", "weight_decays=1", "--", "train.py"], "did you mean 'weight_decay'"),
        (["--set", "lora", "--", "train.py"], "'lora': must be NAME=VALUE"),
        (["--set", "betas=(2,3)", "--", "train.py"], "option betas"),
        (["--", "missing.py"], "there is no file 'missing.py'"),
        (["--set", "lora=true"], "no program"),
        (["--", "--lr", "1"], "'--lr' is no option of run"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments: list[str], why: str, tmp_path: Path) -> None:
    """Before anything runs, with status 2 and one line."""
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("automagic-bnb run: error:")]
    assert why in line
    assert done.stdout == ""


def test_under_accelerate_launch(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "beside.py").write_text("WIDTH = 64\n")
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "-m", "automagic_bnb.run"]
    done = subprocess.run(
        [sys.executable, *launch, "--set", "lora=true", "--", "train.py", "AdamW8bit"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    found = result(done)
    assert (found["class"], found["group"]["lora"]) == ("Automagic8bit", True)
