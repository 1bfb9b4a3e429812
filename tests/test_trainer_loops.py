"""Trainers' own training loops, on a CPU with tiny models: started as their pages say, but for models, data and length.

The environment's AUTOMAGIC_TEST_CHECKOUTS names a folder with checkouts of the trainers, each called as on GitHub; a
trainer that is not there, or whose packages are not installed, is skipped.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import tiny_models
import torch

PAGES = Path(__file__).parents[1] / "docs/trainers"


def blocks(page: str, language: str) -> list[str]:
    found = re.findall(r"^```(\w+)\n(.*?)^```", (PAGES / f"{page}.md").read_text("utf-8"), re.M | re.S)
    return [text for kind, text in found if kind == language]


def checkout(name: str) -> Path:
    folder = Path(os.environ.get("AUTOMAGIC_TEST_CHECKOUTS", "/nowhere")) / name
    if not folder.is_dir():
        pytest.skip(f"AUTOMAGIC_TEST_CHECKOUTS has no {name}")
    return folder


def run_in(folder: Path, command: list[str], **environment: str) -> str:
    """What a process says; it fails where the process does, and is skipped where a package of its is missing."""
    quiet = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    quiet |= {"HF_HOME": str(folder / "home"), "ACCELERATE_CONFIG_FILE": "", "WANDB_MODE": "disabled"}
    everything = {k: v for k, v in {**os.environ, **quiet, **environment}.items() if v or k == "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=everything, timeout=900)
    said = done.stdout + done.stderr
    if done.returncode and (missing := re.search(r"(?:Module|Package)NotFoundError: (?!.*automagic)(.*)", said)):
        pytest.skip(f"the trainer wants more: {missing[1]}")
    assert done.returncode == 0, said
    return said


def replaced(command: str, changes: dict[str, str]) -> list[str]:
    """A page's command as words, each change being made once."""
    words = shlex.split(command.replace("\\\n", " "))
    for option, value in changes.items():
        assert words.count(option) == 1, option
        words[words.index(option) + 1] = value
    return words


def launched(words: list[str]) -> list[str]:
    """With this environment's accelerate."""
    assert words[:2] == ["accelerate", "launch"]
    return [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", *words[2:]]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (file,) = folder.glob("*.safetensors")
    return load_file(file)


# ----------------------------------------------------------------------------------------------------------- diffusers

DIFFUSERS = [
    ("sdxl", "text_to_image/train_text_to_image_lora_sdxl.py", "32"),
    ("flux", "dreambooth/train_dreambooth_lora_flux.py", "32"),
]


@pytest.mark.parametrize(("model", "script", "resolution"), DIFFUSERS)
def test_diffusers_scripts_train_and_resume(model: str, script: str, resolution: str, tmp_path: Path) -> None:
    """The page's two commands: four steps, and two from the checkpoint in the middle, end with the same bits."""
    folder = checkout("diffusers")
    for package in ("torchvision", "peft", "datasets", "accelerate", "diffusers", "transformers", "bitsandbytes"):
        pytest.importorskip(package)
    getattr(tiny_models, model)(tmp_path / "model")
    tiny_models.images(tmp_path / "images", captions=model == "sdxl", count=2)
    (command,) = [x for x in blocks("diffusers", "bash") if Path(script).name in x]
    changes = {"--pretrained_model_name_or_path": "model", "--resolution": resolution, "--max_train_steps": "4"}
    changes |= {"--checkpointing_steps": "2"}
    if model == "sdxl":
        command = command.replace("--pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix", "")
    words = launched(replaced(command.replace(Path(script).name, str(folder / "examples" / script)), changes))
    said = run_in(tmp_path, words, PYTHONPATH=str(folder / "src"))
    assert "AdamW8bit = Automagic8bit" in said
    assert "made none" not in said
    whole = adapter(tmp_path / "output")
    halfway = adapter(tmp_path / "output/checkpoint-2")
    assert any((whole[name] != halfway[name]).any() for name in whole)
    saved = torch.load(tmp_path / "output/checkpoint-2/optimizer.bin", map_location="cpu", weights_only=True)
    (group,) = saved["param_groups"]
    assert (group["lora"], group["auto_lr"]) == (True, True)
    assert {int(state["step"]) for state in saved["state"].values()} == {2}

    shutil.rmtree(tmp_path / "output/checkpoint-4")
    run_in(tmp_path, [*words, "--resume_from_checkpoint", "latest"], PYTHONPATH=str(folder / "src"))
    again = adapter(tmp_path / "output")
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []


# ------------------------------------------------------------------------------------------------------- LLaMA-Factory


LLAMA_FACTORY = {"model_name_or_path": "model", "cutoff_len": 128, "max_samples": 8, "max_steps": 4, "save_steps": 2}
LLAMA_FACTORY |= {"bf16": False, "use_cpu": True, "logging_steps": 1, "gradient_accumulation_steps": 1}
"""What differs from the page's file."""


def llama_factory(folder: Path, number: int, **options: Any) -> str:
    """What LLaMA-Factory says, started in a folder by the page's command of that number, with the page's file."""
    source = checkout("LLaMA-Factory")
    for package in ("transformers", "peft", "trl", "datasets", "bitsandbytes"):
        pytest.importorskip(package)
    yaml = pytest.importorskip("yaml")
    if not (folder / "model").is_dir():
        tiny_models.llama(folder / "model")
        (folder / "data").symlink_to(source / "data")
    (config,) = blocks("llama-factory", "yaml")
    (folder / "lora.yaml").write_text(yaml.safe_dump({**yaml.safe_load(config), **LLAMA_FACTORY, **options}))
    starter, *words = shlex.split(blocks("llama-factory", "bash")[number].replace("\\\n", " "))
    module = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}[starter]
    return run_in(folder, [sys.executable, *module, *words], PYTHONPATH=str(source / "src"))


def test_llama_factory_trains_and_resumes(tmp_path: Path) -> None:
    """With its own two data sets: four steps, and two from the checkpoint in the middle."""
    said = llama_factory(tmp_path, 0)
    assert "AdamW = Automagic" in said
    assert "made none" not in said
    output = tmp_path / "saves/my-lora"
    whole = adapter(output)
    assert all(whole[name].any() for name in whole if "lora_B" in name)
    saved = torch.load(output / "checkpoint-2/optimizer.pt", map_location="cpu", weights_only=True)
    group = saved["param_groups"][0]
    assert (group["lora"], group["auto_lr"], group["weight_decay"]) == (True, True, 0.01)

    llama_factory(tmp_path, 0, output_dir="saves/again", resume_from_checkpoint=str(output / "checkpoint-2"))
    resumed = adapter(tmp_path / "saves/again")
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_llama_factory_trains_in_two_processes(tmp_path: Path) -> None:
    said = llama_factory(tmp_path, 1, ddp_backend="gloo")
    assert said.count("automagic-bnb run: AdamW8bit = Automagic8bit") == 2
    assert "made none" not in said
    assert all(p.any() for name, p in adapter(tmp_path / "saves/my-lora").items() if "lora_B" in name)


# ------------------------------------------------------------------------------------------------------ diffusion-pipe

DIFFUSION_PIPE = """
import ast, inspect, json, sys, textwrap, types
assert sys.argv.pop(1) == "--local_rank=0"
folder, release, resume = sys.argv[1], sys.argv[2] == "release", sys.argv[3:]
sys.path.insert(0, folder)
import deepspeed, toml, torch
from utils.pipeline import ManualPipelineModule

text = open(f"{folder}/train.py").read()
(node,) = [x for x in ast.walk(ast.parse(text)) if isinstance(x, ast.FunctionDef) and x.name == "get_optimizer"]
config = toml.load("wan-lora.toml")
config["optimizer"]["gradient_release"] = release
ds_config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": config["gradient_accumulation_steps"],
             "gradient_clipping": 0.0 if release else config["gradient_clipping"], "steps_per_print": 100}

class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.base = torch.nn.Linear(64, 64).requires_grad_(False)
        self.lora_A, self.lora_B = torch.nn.Linear(64, 8, bias=False), torch.nn.Linear(8, 64, bias=False)
        torch.nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.base(x) + self.lora_B(self.lora_A(x))

deepspeed.init_distributed("gloo")
torch.manual_seed(0)
layers = [Layer() for _ in range(3)]
for i, layer in enumerate(layers):
    for name, p in layer.named_parameters():
        p.original_name = f"blocks.{i}.{name}"
pipeline = ManualPipelineModule(layers=layers, num_stages=1, partition_method=config["partition_method"],
                                loss_fn=lambda a, b: (a - b).square().mean())
trained = [p for p in pipeline.parameters() if p.requires_grad]
engine, *_ = deepspeed.initialize(model=pipeline, config=ds_config)
engine._support_torch_style_backward = True
model = types.SimpleNamespace(get_param_groups=lambda parameters: [{"params": parameters}])
if release:  # as its own hooks need the rate of each group
    model.get_param_groups = lambda parameters: [{"params": parameters, "lr": config["optimizer"]["lr"]}]
names = {"torch": torch, "deepspeed": deepspeed, "inspect": inspect, "config": config, "ds_config": ds_config,
         "model": model, "global_batch_size": 1, "pipeline_model": pipeline}
exec(textwrap.dedent(ast.get_source_segment(text, node, padded=True)), names)
engine._configure_optimizer(names["get_optimizer"], trained)
engine.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(engine.optimizer, factor=1.0)
generator = torch.Generator().manual_seed(1)
batches = [(torch.randn(1, 64, generator=generator), torch.randn(1, 64, generator=generator)) for _ in range(4)]
if resume:
    path, _ = engine.load_checkpoint("run", load_module_strict=False)
    assert path is not None
losses = []
for i, batch in enumerate(batches[2:] if resume else batches):
    losses.append(float(engine.train_batch(iter([batch]))))
    if i == 1 and not resume:
        engine.save_checkpoint("run")
inner = getattr(engine.optimizer, "optimizers", [engine.optimizer])
first = inner[0]
print(json.dumps({"class": type(first).__name__, "count": len(inner), "lora": all(o.facts_of(p).is_lora for o in inner
                  for g in o.param_groups for p in g["params"]),
                  "group": {k: first.param_groups[0][k] for k in ("auto_lr", "weight_decay", "betas")},
                  "moved": [bool(layer.lora_B.weight.any()) for layer in layers],
                  "weights": [p.double().sum().item() for p in trained],
                  "squares": [p.double().square().sum().item() for p in trained], "losses": losses}))
"""


@pytest.mark.parametrize(("kind", "release"), [("adamw8bit", False), ("Automagic8bit", False), ("adamw8bit", True)])
def test_diffusion_pipes_optimizer_trains_in_deepspeeds_pipeline(kind: str, release: bool, tmp_path: Path) -> None:
    """Its own get_optimizer, with the page's options, in DeepSpeed's engine and its own pipeline module; resumed.

    The rest of its train.py wants a GPU, and sources of others that its repository only points to.
    """
    folder = checkout("diffusion-pipe")
    for package in ("toml", "bitsandbytes", "deepspeed"):
        pytest.importorskip(package, exc_type=ImportError)
    if kind == "Automagic8bit":
        pytest.importorskip("pytorch_optimizer", exc_type=ImportError)
    config, _ = blocks("diffusion-pipe", "toml")
    (tmp_path / "wan-lora.toml").write_text(config.replace('type = "adamw8bit"', f'type = "{kind}"'))
    (tmp_path / "train.py").write_text(DIFFUSION_PIPE)
    (command,) = blocks("diffusion-pipe", "bash")
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:4] == ["deepspeed", "--num_gpus=1", "--module", "automagic_bnb.run"]
    # What the command starts on a machine with a GPU; it puts "--local_rank=0" after the module's name.
    world = base64.urlsafe_b64encode(json.dumps({"localhost": [0]}).encode()).decode()
    launch = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--master_addr=127.0.0.1"]
    started = ["--module", "automagic_bnb.run", *words[4 : words.index("train.py") + 1]]
    seen = []
    for resume in ([], ["resume"]):
        port = str(29600 + (os.getpid() + len(resume)) % 300)
        arguments = [str(folder), "release" if release else "step", *resume]
        said = run_in(tmp_path, [*launch, f"--master_port={port}", *started, *arguments], DS_ACCELERATOR="cpu")
        seen.append(json.loads([line for line in said.splitlines() if line.startswith('{"class"')][-1]))
    whole, again = seen
    assert whole["class"] == "Automagic8bit"
    assert whole["count"] == (6 if release else 1)
    assert whole["lora"]
    assert whole["moved"] == [True] * 3
    assert whole["group"] == {"auto_lr": True, "weight_decay": 0.01, "betas": [0.9, 0.99, 0.999]}
    assert (again["weights"], again["squares"]) == (whole["weights"], whole["squares"])
    assert again["losses"] == whole["losses"][2:]


# ------------------------------------------------------------------------------------------------------------- unsloth


GIVEN = 'optimizer_cls_and_kwargs=(Automagic8bit, {"lr": 1e-4, "auto_lr": True, "preset": "llm-lora"})'


def test_unsloth_trains_and_resumes(tmp_path: Path) -> None:
    """The page's script, on a CPU, with what the page says of one: four steps, and two from the middle."""
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("unsloth is not installed")  # and importing it here would change what other tests import
    tiny_models.llama(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows = [json.dumps({"text": f"{i} and {i + 1} are numbers, and so is {i + 2}."}) for i in range(32)]
    (tmp_path / "data/train.jsonl").write_text("\n".join(rows))
    (script,) = blocks("unsloth", "python")
    assert GIVEN in (PAGES / "unsloth.md").read_text("utf-8")
    changes = {'"unsloth/Qwen3-4B"': '"model"', "load_in_4bit=True": "load_in_4bit=False"}
    changes |= {'"mhenrichsen/alpaca_2k_test"': '"data"', "max_steps=500": "max_steps=4, save_steps=2"}
    changes |= {"from datasets": "from automagic_bnb import Automagic8bit\nfrom datasets"}
    changes |= {"    train_dataset=": f"    {GIVEN},\n    train_dataset="}
    for before, after in changes.items():
        assert script.count(before) == 1
        script = script.replace(before, after)
    (tmp_path / "lora.py").write_text(script)
    run_in(tmp_path, [sys.executable, "lora.py"])
    whole = adapter(tmp_path / "output")
    assert all(whole[name].any() for name in whole if "lora_B" in name)
    saved = torch.load(tmp_path / "output/checkpoint-2/optimizer.pt", map_location="cpu", weights_only=True)
    group = saved["param_groups"][0]
    assert (group["lora"], group["auto_lr"], group["weight_decay"]) == (True, True, 0.01)

    resumed = 'train(resume_from_checkpoint="output/checkpoint-2")'
    script = script.replace("trainer.train()", f"trainer.{resumed}").replace('"output"', '"again"')
    (tmp_path / "lora.py").write_text(script)
    run_in(tmp_path, [sys.executable, "lora.py"])
    again = adapter(tmp_path / "again")
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []


# --------------------------------------------------------------------------------------------------------- SimpleTuner


def test_simpletuner_trains_and_resumes(tmp_path: Path) -> None:
    """The page's files and command: four steps, and two from the checkpoint in the middle.

    SimpleTuner pins memory, for which torch wants a GPU; where there is none, pinning does nothing here.
    """
    folder = checkout("SimpleTuner")
    for package in ("diffusers", "peft", "accelerate", "bitsandbytes", "optimi"):
        pytest.importorskip(package)
    tiny_models.flux(tmp_path / "model")
    tiny_models.images(tmp_path / "images", captions=False, count=2)
    for i in range(2):
        (tmp_path / f"images/{i}.txt").write_text(f"a picture, number {i}")
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text("import torch\ntorch.Tensor.pin_memory = lambda self, *_: self\n")
    config, data = (json.loads(text) for text in blocks("simpletuner", "json"))
    config |= {"pretrained_model_name_or_path": str(tmp_path / "model"), "base_model_precision": "no_change"}
    config |= {"resolution": 32, "max_train_steps": 4, "checkpoint_step_interval": 2, "validation_disable": True}
    config = {k: v for k, v in config.items() if k not in ("validation_prompt", "validation_steps")}
    data[0] |= {"resolution": 32, "minimum_image_size": 16}
    (tmp_path / "config").mkdir()
    (tmp_path / "config/multidatabackend.json").write_text(json.dumps(data))
    (command,) = blocks("simpletuner", "bash")
    export, command = command.split("\n", 1)
    assert export == "export CONFIG_BACKEND=json"
    path = f"{tmp_path / 'site'}{os.pathsep}{folder}"

    def trained(**more: str) -> dict[str, torch.Tensor]:
        (tmp_path / "config/config.json").write_text(json.dumps({**config, **more}))
        said = run_in(tmp_path, launched(shlex.split(command)), PYTHONPATH=path, CONFIG_BACKEND="json")
        assert "AdamW8bit = Automagic8bit" in said
        assert "made none" not in said
        return adapter(tmp_path / "output/my-lora")

    whole = trained()
    assert any(p.any() for name, p in whole.items() if "lora_B" in name)
    saved = torch.load(tmp_path / "output/my-lora/checkpoint-2/optimizer.bin", map_location="cpu", weights_only=True)
    group = saved["param_groups"][0]
    assert (group["lora"], group["auto_lr"], group["weight_decay"]) == (True, True, 1e-4)
    shutil.rmtree(tmp_path / "output/my-lora/checkpoint-4")
    again = trained(resume_from_checkpoint="latest")
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []
