"""Trainers as they are: axolotl's package, and checkouts of OneTrainer and ai-toolkit, which no index carries.

The environment names the checkouts: AUTOMAGIC_TEST_ONETRAINER and AUTOMAGIC_TEST_AI_TOOLKIT are their folders.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn


def checkout(variable: str) -> Path:
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} names no checkout")
    return Path(folder)


def result_of(code: str, folder: Path, *before: str) -> Any:
    """What a program in this folder prints last, as JSON."""
    done = subprocess.run([sys.executable, *before, code], cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------- OneTrainer

ONETRAINER = """
import json, sys, types
sys.path.insert(0, ".")
import torch, bitsandbytes as bnb
from modules.util.enum.Optimizer import Optimizer
a, b = (torch.nn.Parameter(torch.randn(64, 64)) for _ in range(2))
groups = [{"params": [a], "lr": 1e-3}, {"params": [b], "lr": 1e-3}]
opt = bnb.optim.AdamW8bit(params=groups, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01, eps=1e-8, min_8bit_size=4096,
                          percentile_clipping=100, block_wise=True, is_paged=False)
for p in (a, b):
    p.grad = torch.ones_like(p)
    opt.step_parameter(p, opt.param_groups[-1], 0)
lrs = Optimizer.ADAMW_8BIT.maybe_adjust_lrs({"unet": 1e-3, "te": 1e-3}, opt)
others = [x.name for x in Optimizer if x.supports_fused_back_pass()]
print(json.dumps({"fused": Optimizer.ADAMW_8BIT.supports_fused_back_pass(), "others": others,
                  "class": type(opt).__name__,
                  "lrs": {k: float(v) for k, v in lrs.items()},
                  "adaptive": [x.name for x in Optimizer if x.is_adaptive]}))
"""


@pytest.mark.parametrize("found", [False, True])
def test_onetrainer(found: bool, tmp_path: Path) -> None:
    """With the very call of its create_optimizer, its hook's last group, and its enum."""
    folder = checkout("AUTOMAGIC_TEST_ONETRAINER")
    script = tmp_path / "train.py"
    script.write_text(ONETRAINER)
    options = ["--set", "auto_lr=true"] if found else []
    arguments = ["-m", "automagic_bnb.run", "--trainer", "onetrainer", *options, "--"]
    seen = result_of(str(script), folder, *arguments)
    assert seen["class"] == "Automagic8bit"
    assert seen["fused"]
    assert "ADAMW_8BIT" in seen["adaptive"]
    assert {"ADAFACTOR", "PRODIGY_PLUS_SCHEDULE_FREE"} <= set(seen["others"])
    assert "SGD" not in seen["others"]
    assert seen["lrs"]["te"] == pytest.approx(1e-4 if found else 1e-3, rel=0.11)


def test_the_entry_of_onetrainer_is_refused_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    command = [sys.executable, "-m", "automagic_bnb.run", "--trainer", "onetrainer", "--", "train.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "start in OneTrainer's folder" in done.stderr


# ---------------------------------------------------------------------------------------------------------- ai-toolkit

AI_TOOLKIT = """
import json, sys
sys.path.insert(0, ".")
import torch
sys.path.insert(0, sys.argv[1])
import automagic_extension
from toolkit.optimizer import get_optimizer
down, up = torch.nn.Linear(64, 8, bias=False), torch.nn.Linear(8, 64, bias=False)
model = torch.nn.ModuleDict({"lora_A": down, "lora_B": up})
parameters = list(model.parameters())
opt = get_optimizer(parameters, "automagic", learning_rate=1e-4, optimizer_params={"weight_decay": 0.02, "seed": 7})
model["lora_B"](model["lora_A"](torch.randn(4, 64))).square().mean().backward()
opt.step()
print(json.dumps({"class": type(opt).__mro__[1].__module__ + "." + type(opt).__name__,
                  "lr": float(opt.get_avg_learning_rate()),
                  "lora": [opt.facts_of(p).is_lora for p in parameters], "decay": opt.param_groups[0]["weight_decay"],
                  "extensions": automagic_extension.AI_TOOLKIT_EXTENSIONS}))
"""


def test_ai_toolkit(tmp_path: Path) -> None:
    """Its own get_optimizer makes ours of `optimizer: automagic`, once the file of one line has been imported."""
    folder = checkout("AUTOMAGIC_TEST_AI_TOOLKIT")
    line = "from automagic_bnb.trainers.ai_toolkit import AI_TOOLKIT_EXTENSIONS\n"
    (tmp_path / "automagic_extension.py").write_text(line)
    done = subprocess.run(
        [sys.executable, "-c", AI_TOOLKIT, str(tmp_path)], cwd=folder, capture_output=True, text=True, timeout=240
    )
    if done.returncode and (missing := re.search(r"ModuleNotFoundError: (?!.*automagic)(.*)", done.stderr)):
        pytest.skip(f"ai-toolkit wants more: {missing[1]}")
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["class"] == "automagic_bnb.optimizer.Automagic8bit"
    assert (seen["lr"], seen["decay"], seen["lora"], seen["extensions"]) == (1e-4, 0.02, [True, True], [])


# ------------------------------------------------------------------------------------------------------------- axolotl


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Linear(64, 8, bias=False), nn.Linear(8, 64, bias=False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"loss": (self.lora_B(self.lora_A(x)) - x).square().mean()}


@pytest.mark.parametrize(
    ("automagic", "rate"),
    [({"weight_decay": 0.02}, 2e-4), ({"auto_lr": True}, None), (None, 2e-4), ("page", 2e-4)],
)
def test_axolotl(automagic: Any, rate: float | None, tmp_path: Path) -> None:
    """Its plugin manager loads ours by its name, and its trainer's own create_optimizer makes Automagic8bit."""
    base = pytest.importorskip("axolotl.integrations.base", exc_type=ImportError)
    mixin = pytest.importorskip("axolotl.core.trainers.mixins.optimizer", exc_type=ImportError)
    transformers = pytest.importorskip("transformers")
    dicts = pytest.importorskip("axolotl.utils.dict")

    class Trainer(mixin.OptimizerMixin, transformers.Trainer):
        pass

    if automagic == "page":  # what a user pastes
        page = (Path(__file__).parents[1] / "docs/trainers/axolotl.md").read_text("utf-8")
        pasted = pytest.importorskip("yaml").safe_load(page.split("```yaml\n")[1].split("```")[0])
        assert pasted["plugins"] == ["automagic_bnb.trainers.axolotl.AutomagicPlugin"]
        assert pasted["learning_rate"] == 2e-4
        automagic = pasted["automagic"]
    manager = base.PluginManager.get_instance()
    manager.plugins.clear()
    manager.register("automagic_bnb.trainers.axolotl.AutomagicPlugin")
    assert manager.get_input_args() == ["automagic_bnb.trainers.axolotl.AutomagicArgs"]
    cfg = dicts.DictDefault({"learning_rate": 2e-4, **({"automagic": automagic} if automagic else {})})
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        lr_scheduler_type="constant",
    )
    for name in ("loraplus_lr_ratio", "embedding_lr_scale", "embedding_lr", "lr_groups"):
        setattr(args, name, None)
    model = Tiny()
    before = model.lora_B.weight.detach().clone()
    trainer = Trainer(model=model, args=args, train_dataset=[{"x": torch.randn(64)} for _ in range(32)])
    manager.post_trainer_create(cfg, trainer)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer).__name__ == "Automagic8bit"
    assert all(optimizer.facts_of(p).is_lora for p in model.parameters())
    assert (model.lora_B.weight != before).any()
    found = float(optimizer.get_avg_learning_rate())
    assert found == pytest.approx(2e-4) if rate else 5e-5 < found < 2e-4
