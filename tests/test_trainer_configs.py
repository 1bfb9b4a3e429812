"""What a trainer's page has for pasting: run where the trainer is a package, else held against its source.

The environment's AUTOMAGIC_TEST_CHECKOUTS names a folder with checkouts of the trainers, each called as on GitHub.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from automagic_bnb import Automagic8bit
from automagic_bnb.command import runner
from automagic_bnb.trainers import replacing

ROOT = Path(__file__).parents[1]
PAGES, CHINESE = ROOT / "docs/trainers", ROOT / "docs/zh-TW/trainers"
NAMES = sorted(page.stem for page in PAGES.glob("*.md") if page.stem not in ("README", "runner"))


def blocks(page: str, language: str = "", folder: Path = PAGES) -> list[str]:
    """The page's blocks of code, in order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", (folder / f"{page}.md").read_text("utf-8"), re.M | re.S)
    return [text for kind, text in found if not language or kind == language]


def parsed(page: str, language: str) -> list[Any]:
    if language == "toml":
        module = "tomllib" if sys.version_info >= (3, 11) else "tomli"
        return [pytest.importorskip(module).loads(text) for text in blocks(page, "toml")]
    load = json.loads if language == "json" else pytest.importorskip("yaml").safe_load
    return [load(text) for text in blocks(page, language)]


def checkout(name: str) -> Path:
    folder = Path(os.environ.get("AUTOMAGIC_TEST_CHECKOUTS", "/nowhere")) / name
    if not folder.is_dir():
        pytest.skip(f"AUTOMAGIC_TEST_CHECKOUTS has no {name}")
    return folder


def source(folder: Path, *patterns: str) -> str:
    return "\n".join(file.read_text("utf-8") for pattern in patterns for file in sorted(folder.glob(pattern)))


def options_of(text: str) -> set[str]:
    """The options that argument parsers in a source know."""
    return set(re.findall(r"""["']--([\w-]+)["']""", text))


def keys(tree: Any) -> Iterator[str]:
    """Of nested dictionaries and lists."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        if isinstance(key, str):
            yield key
        yield from keys(value)


@pytest.mark.parametrize("page", NAMES)
def test_both_languages_have_the_same_blocks(page: str) -> None:
    assert blocks(page)
    assert blocks(page) == blocks(page, folder=CHINESE)


def test_both_languages_say_the_same_of_the_runner_and_of_versions() -> None:
    """The runner's commands and classes; each row's page and version in the table of what was tried."""
    assert blocks("runner") == blocks("runner", folder=CHINESE)
    classes, tried = [], []
    for folder in (PAGES, CHINESE):
        rows = re.findall(r"^\| .*", (folder / "runner.md").read_text("utf-8"), re.M)
        classes.append([re.findall(r"`(\w+)`", row) for row in rows])
        rows = re.findall(r"^\| .*", (folder / "README.md").read_text("utf-8"), re.M)[1:]
        tried.append([(re.findall(r"\]\((.*?\.md)\)", row), row.split("|")[3].strip()) for row in rows])
    assert classes[0] == classes[1]
    assert tried[0] == tried[1]
    assert {page for pages, _ in tried[0] for page in pages} == {f"{name}.md" for name in (*NAMES, "runner")}


# -------------------------------------------------------------------------------------------- options of the optimizer


def runner_options(page: str) -> list[dict[str, str]]:
    """What the commands of a page pass to the runner."""
    return [runner.parse(re.findall(r"--set (\S+)", text)) for text in blocks(page, "bash")]


@pytest.mark.parametrize(
    ("page", "decay"),
    [("onetrainer", 0.01), ("diffusion-pipe", 0.01), ("simpletuner", 1e-4), ("llama-factory", 0.01), ("unsloth", 0.01)],
)
def test_the_runner_takes_the_options_of_a_page(page: str, decay: float) -> None:
    for given in runner_options(page):
        options = replacing.checked(given)
        assert (options["lora"], options["auto_lr"], options["weight_decay"]) == (True, True, decay)


@pytest.mark.parametrize(("page", "decay"), [("kohya", 0.01), ("musubi-tuner", 0.01)])
def test_the_arguments_of_kohyas_scripts_make_the_optimizer(page: str, decay: float, tools: Any) -> None:
    """As both call it: the class by its dotted name, each argument cut at "=" and read as a literal."""
    config, _ = parsed(page, "toml")
    assert config["optimizer_type"] == "automagic_bnb.Automagic8bit"
    options = {}
    for argument in config["optimizer_args"]:
        name, value = argument.split("=")
        options[name] = ast.literal_eval(value)
    opt = Automagic8bit([{"params": tools.parameters((64, 64)), "lr": config["learning_rate"]}], lr=1.0, **options)
    (group,) = opt.param_groups
    assert (group["lora"], group["auto_lr"], group["auto_lr_given"]) == (True, True, 1.0)
    assert group["weight_decay"] == decay


def test_the_parameters_of_ai_toolkit_make_the_optimizer(tools: Any) -> None:
    (config,) = parsed("ai-toolkit", "yaml")
    train = config["config"]["process"][0]["train"]
    made = replacing.with_options(Automagic8bit, {})
    opt = made(tools.parameters((64, 64)), lr=float(train["lr"]), **train["optimizer_params"])
    (group,) = opt.param_groups
    assert (group["lora"], group["auto_lr"], group["weight_decay"]) == (True, True, 1e-4)


# ----------------------------------------------------------------------------------------------------- trainers' source


@pytest.mark.parametrize(
    ("page", "name", "files"),
    [
        ("kohya", "sd-scripts", ("library/*.py", "train_network.py", "sdxl_train_network.py")),
        ("musubi-tuner", "musubi-tuner", ("src/musubi_tuner/**/*.py",)),
    ],
)
def test_kohyas_scripts_know_every_key(page: str, name: str, files: tuple[str, ...]) -> None:
    """Of a file of arguments; one that a parser does not know would be taken without a word, and have no effect."""
    text = source(checkout(name), *files)
    arguments, data = parsed(page, "toml")
    assert set(arguments) <= options_of(text)
    assert {key for key in keys(data) if f'"{key}"' not in text} == set()


def test_diffusion_pipe_knows_every_key() -> None:
    text = source(checkout("diffusion-pipe"), "*.py", "utils/*.py", "models/*.py")
    for tree in parsed("diffusion-pipe", "toml"):
        assert {key for key in keys(tree) if not re.search(rf"""["']{key}["']""", text)} <= {"lr"}  # the optimizer's


def test_simpletuner_knows_every_key() -> None:
    folder = checkout("SimpleTuner")
    arguments, data = parsed("simpletuner", "json")
    known = options_of(source(folder, "simpletuner/**/*.py"))
    assert set(arguments) <= known | set(re.findall(r"--(\w+)", source(folder, "documentation/OPTIONS.md")))
    text = source(folder, "simpletuner/helpers/data_backend/**/*.py")
    assert {key for key in keys(data) if f'"{key}"' not in text} == set()


def test_ai_toolkit_knows_every_key() -> None:
    folder = checkout("ai-toolkit")
    text = source(folder, "toolkit/config_modules.py", "jobs/**/*.py", "extensions_built_in/sd_trainer/*.py")
    (config,) = parsed("ai-toolkit", "yaml")
    of_optimizer = set(config["config"]["process"][0]["train"].pop("optimizer_params"))
    assert of_optimizer == {"preset", "auto_lr"}
    assert {key for key in keys(config) if not re.search(rf"""["']{key}["']""", text)} <= {"job"}


def test_diffusers_scripts_know_every_option() -> None:
    folder = checkout("diffusers")
    for command, script in zip(
        blocks("diffusers", "bash"),
        ("text_to_image/train_text_to_image_lora_sdxl.py", "dreambooth/train_dreambooth_lora_flux.py"),
        strict=True,
    ):
        before, after = command.split(Path(script).name)
        assert replacing.checked(runner.parse(re.findall(r"--set (\S+)", before)))["lora"]
        assert set(re.findall(r"--(\w+)", after)) <= options_of(source(folder / "examples", script))


ONETRAINER = """
import json, sys
sys.path.insert(0, ".")
from modules.util.config.ConceptConfig import ConceptConfig
from modules.util.config.TrainConfig import TrainConfig
run, concepts = json.loads(sys.argv[1])
before = TrainConfig.default_values()
unknown = sorted(key for key in run if key not in before.types and key != "__version")
config = TrainConfig.default_values().from_dict(run)
(concept,) = [ConceptConfig.default_values().from_dict(concept) for concept in concepts]
print(json.dumps({"unknown": unknown, "optimizer": config.optimizer.optimizer.name, "beta2": config.optimizer.beta2,
                  "method": config.training_method.name, "te": config.text_encoder.train, "rank": config.lora_rank,
                  "version": config.config_version, "path": concept.path}))
"""


def test_onetrainer_reads_its_config() -> None:
    """Its own TrainConfig, which takes a file without a version for one of long ago, and then fails."""
    folder = checkout("OneTrainer")
    run, concepts = parsed("onetrainer", "json")
    done = subprocess.run(
        [sys.executable, "-c", ONETRAINER, json.dumps([run, concepts])], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert (seen["unknown"], seen["version"]) == ([], run["__version"])
    assert (seen["optimizer"], seen["beta2"], seen["method"]) == ("ADAMW_8BIT", 0.99, "LORA")
    assert (seen["te"], seen["rank"], seen["path"]) == (False, 16, "images")


def test_llama_factory_reads_its_config() -> None:
    """Its own parser, of an installed package or of a checkout; without bf16, which asks for a GPU."""
    folder = checkout("LLaMA-Factory")
    (config,) = parsed("llama-factory", "yaml")
    code = "import json, sys; from llamafactory.hparams import get_train_args; "
    code += "made = get_train_args(json.loads(sys.argv[1])); "
    code += "print(json.dumps([made[2].optim, made[2].weight_decay, made[3].finetuning_type, made[3].lora_rank]))"
    environment = {**os.environ, "DISABLE_VERSION_CHECK": "1", "PYTHONPATH": str(folder / "src")}
    environment["PYTHONPATH"] += os.pathsep + os.environ.get("PYTHONPATH", "")
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps({**config, "bf16": False})],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    if missing := re.search(r"No module named '(?!llamafactory)(\w+)'", done.stderr):
        pytest.skip(f"LLaMA-Factory wants {missing[1]}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["adamw_bnb_8bit", 0.01, "lora", 8]


# --------------------------------------------------------------------------------------------------------- trainers run


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """A folder with a Llama of two layers and a tokenizer of its own."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {str(i): i for i in range(94)} | {"<pad>": 94, "<end>": 95}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=96, num_key_value_heads=2, **shape))
    model.save_pretrained(tmp_path / "model")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    fast.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run_in(folder: Path, *arguments: str) -> str:
    """What a process says; it fails where the process does."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["HF_DATASETS_CACHE"] = str(folder / "cache")
    command = [sys.executable, "-W", "ignore", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_trls_script_trains(tiny_model: Path, tmp_path: Path) -> None:
    """The page's file, but for the model, the data and the number of steps; LoRA's matrices have moved."""
    for package in ("trl", "peft", "datasets", "accelerate"):
        pytest.importorskip(package)
    (script,) = blocks("hugging-face", "python")
    (tmp_path / "data").mkdir()
    rows = [json.dumps({"text": " ".join(str((i + j) % 94) for j in range(16))}) for i in range(16)]
    (tmp_path / "data/train.jsonl").write_text("\n".join(rows))
    names = '"HuggingFaceTB/SmolLM2-135M", "mhenrichsen/alpaca_2k_test"'
    assert names in script
    script = script.replace(names, f"{str(tiny_model)!r}, {str(tmp_path / 'data')!r}")
    script = script.replace("STEPS = 500", "STEPS = 3")
    script = script.replace('report_to="none"', 'report_to="none", use_cpu=True, bf16=False')  # this is no GPU
    script += "opt = getattr(trainer.optimizer, 'optimizer', trainer.optimizer)\n"
    script += "print([type(opt).__name__, opt.param_groups[0]['lora'], opt.param_groups[0]['auto_lr']])\n"
    script += "print([float(p.abs().max()) for n, p in trainer.model.named_parameters() if 'lora_B' in n])\n"
    (tmp_path / "sft.py").write_text(script)
    *_, made, moved = run_in(tmp_path, "sft.py").splitlines()
    assert ast.literal_eval(made) == ["Automagic8bit", True, True]
    assert min(ast.literal_eval(moved)) > 0
    assert (tmp_path / "output/adapter_model.safetensors").is_file()


def test_lightnings_cli_trains(tmp_path: Path) -> None:
    """The page's files, for fewer steps: the CLI reads the options from the signature; the preset's are in force."""
    pytest.importorskip("lightning")
    pytest.importorskip("jsonargparse")
    (script,), (config,) = blocks("lightning", "python"), blocks("lightning", "yaml")
    script = script.replace("    LightningCLI(Module, Data)", "    cli = LightningCLI(Module, Data)")
    script += "    (opt,) = cli.trainer.optimizers\n"
    script += "    group = opt.param_groups[0]\n"
    script += "    print([type(opt).__name__, group['weight_decay'], group['auto_lr'], cli.trainer.global_step])\n"
    (tmp_path / "train.py").write_text(script)
    (tmp_path / "config.yaml").write_text(config)
    fewer = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=4", "--trainer.enable_progress_bar=false"]
    said = run_in(tmp_path, "train.py", "fit", "--config", "config.yaml", *fewer).splitlines()[-1]
    assert ast.literal_eval(said) == ["Automagic8bit", 0.01, True, 4]


def test_transformers_own_way_to_bitsandbytes_takes_the_runner(tmp_path: Path) -> None:
    """What `optim: adamw_bnb_8bit` and unsloth's `adamw_8bit` come to."""
    for package in ("transformers", "accelerate", "bitsandbytes"):
        pytest.importorskip(package)
    (tmp_path / "train.py").write_text(
        "import sys, torch, transformers\n"
        "model = torch.nn.Linear(64, 64)\n"
        "args = transformers.TrainingArguments(output_dir='o', optim=sys.argv[1], learning_rate=1e-4, use_cpu=True,\n"
        "                                      weight_decay=0.01, report_to=[])\n"
        "opt = transformers.Trainer(model=model, args=args).create_optimizer()\n"
        "opt = getattr(opt, 'optimizer', opt)\n"
        "group = opt.param_groups[0]\n"
        "print([type(opt).__name__, opt.config.optim_bits, group['lora'], group['auto_lr'], group['weight_decay']])\n"
    )
    for optim in ("adamw_bnb_8bit", "adamw_8bit"):
        options = [x for name, value in runner_options("unsloth")[0].items() for x in ("--set", f"{name}={value}")]
        said = run_in(tmp_path, "-m", "automagic_bnb.run", *options, "--", "train.py", optim).splitlines()[-1]
        assert ast.literal_eval(said) == ["Automagic", 8, True, True, 0.01]
