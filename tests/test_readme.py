"""The READMEs do what they say: their code runs, their tables are the code's, their commands are the ones CI runs.

There are two, in English and in Traditional Chinese, with the same code. Where a test says "the README" it is the
English one; what could differ between the two is tested of both.
"""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import automagic_bnb
from automagic_bnb import AutomagicConfig, cli, hardware, metrics, monitoring, state

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh-TW.md").read_text(encoding="utf-8")
READMES = {"README.md": README, "README.zh-TW.md": CHINESE}
both = pytest.mark.parametrize("text", READMES.values(), ids=READMES)
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def code_blocks(language: str, text: str = README) -> list[tuple[int, str]]:
    """Line number and text of each fenced block of a language."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


def section(title: str, text: str = README) -> str:
    """The text under a heading of the second or third level, which there must be one of, up to the next such."""
    (found,) = re.findall(rf"^###? {re.escape(title)}\n(.*?)(?=^###? |\Z)", text, re.MULTILINE | re.DOTALL)
    return found


def without_code(text: str) -> str:
    """The text without its fenced blocks, in which a line may begin as a heading or a table does."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


# ------------------------------------------------------------------------------------------------------------ examples

PYTHON = code_blocks("python")
EXAMPLES = [(name, line, code) for name, text in READMES.items() for line, code in code_blocks("python", text)]
NEEDED = {
    "transformers": "transformers",
    "Trainer(": "accelerate",
    "TensorBoardLogger": "tensorboard",
    "plot_": "matplotlib",
    "write_dashboard": "plotly",
    "bitsandbytes": "bitsandbytes",
}
"""What an example with this text needs besides the package's own requirements."""


@both
def test_there_is_code(text: str) -> None:
    """Every opened fence is closed, and the examples are found."""
    assert len(re.findall(r"^```", text, re.MULTILINE)) % 2 == 0
    assert len(code_blocks("python", text)) >= 15


def need_packages(code: str) -> None:
    """Skip where an example's optional packages are missing."""
    for words, package in NEEDED.items():
        if words in code:
            pytest.importorskip(package)


@pytest.mark.parametrize(("name", "line", "code"), EXAMPLES, ids=[f"{name} line {line}" for name, line, _ in EXAMPLES])
def test_python_code_runs_as_written(
    name: str, line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself, in an empty folder, on the CPU, with finite weights at its end and without a warning of ours."""
    need_packages(code)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(line)
    names: dict[str, Any] = {"__name__": "__main__"}
    with warnings.catch_warnings():
        # A trainer warns of what it pleases: here, of memory to be pinned for a GPU that is missing.
        warnings.simplefilter("ignore" if re.search("transformers|lightning.pytorch", code) else "error")
        exec(compile("\n" * (line - 1) + code, name, "exec"), names)
    tensors = [p for x in names.values() if isinstance(x, torch.nn.Module) for p in x.parameters()]
    tensors += [x for x in names.values() if isinstance(x, torch.Tensor)]
    assert tensors or "weights" in names
    assert all(torch.isfinite(x).all() for x in tensors)


def bare(language: str, code: str) -> str:
    """Code without its comments."""
    if language == "python":
        return ast.unparse(ast.parse(code))
    return code


def test_both_have_the_same_code() -> None:
    """Block by block, in the same order; comments are in the reader's language, the development part in English."""
    fence = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    english, chinese = (
        [(language, bare(language, code)) for language, code in fence.findall(text)]
        for text in (README.partition("\n## Development\n")[0], CHINESE)
    )
    assert [language for language, _ in english] == [language for language, _ in chinese]
    for one, other in zip(english, chinese, strict=True):
        assert one == other


def run(line_with: str) -> dict[str, Any]:
    """The names that the one example with this text leaves behind."""
    ((line, code),) = [(line, code) for line, code in PYTHON if line_with in code]
    need_packages(code)
    torch.manual_seed(line)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_the_first_example_learns() -> None:
    """Its LoRA leaves zero, and the rate printed is one that was found."""
    names = run("frozen")
    assert names["lora_B"].abs().max() > 0
    assert float(names["optimizer"].get_avg_learning_rate()) > 1e-6


def test_the_fused_backward_steps() -> None:
    """No gradient is left, and every weight has a state."""
    names = run("step_and_drop")
    assert all(p.grad is None for p in names["model"].parameters())
    assert all(names["optimizer"].state[p]["step"] == 1 for p in names["model"].parameters())


def test_the_overrides_hold() -> None:
    """The embedding's rate is the one given, the second group's options are its own."""
    names = run("override_config")
    optimizer, embedding = names["optimizer"], names["embedding"].weight
    options = optimizer.effective_options(optimizer.param_groups[0], embedding)
    assert (options["optim_bits"], options["lr"]) == (32, 1e-5)
    assert [group["cautious"] for group in optimizer.param_groups] == [True, False]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 3e-4]


def test_the_checkpoint_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both optimizers hold the same."""
    monkeypatch.chdir(tmp_path)
    names = run("checkpoint.pt")
    pairs = zip(names["model"].parameters(), names["resumed"].parameters(), strict=True)
    for old, new in pairs:
        a, b = names["optimizer"].state[old], names["resumed_optimizer"].state[new]
        assert torch.equal(old, new)
        assert torch.equal(a["state1"], b["state1"])
        assert a["step"] == b["step"] == 1


def test_the_storage_changes_as_the_schedule_says() -> None:
    """32 bits, then 8, then factored; and by hand back to 32, one parameter excepted."""
    names = run("ProgressiveQuantization")
    first, _, second = names["model"]
    held = [state.storage_held(names["optimizer"].state[p]) for p in (first.weight, second.weight)]
    assert held == ["factored", "32bit"]
    assert names["schedule"].options() == {"optim_bits": 8, "min_8bit_size": 0, "factored": True}


def test_the_memory_report_is_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    """Before the first step, and printed twice."""
    names = run("analyze_memory_usage")
    assert names["report"]["basis"] == "planned"
    assert names["report"]["factored_parameters"] == 1024 * 1024
    assert f"{names['report']['bytes_per_parameter']:.2f} bytes" in capsys.readouterr().out


def test_the_run_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times, in both places, and drawn."""
    monkeypatch.chdir(tmp_path)
    names = run("TensorBoardLogger")
    assert names["run"].series["loss"].steps.tolist() == list(range(0, 100, 10))
    assert {"lr/mean", "state_bytes"} <= names["run"].series.keys()
    assert (tmp_path / "training.png").stat().st_size > 10_000
    assert list((tmp_path / "tensorboard").iterdir())


def test_the_monitor_has_looked() -> None:
    """At every loss."""
    names = run("AdaptiveTrainingMonitor")
    assert len(names["losses"]) == 200
    assert names["report"]["status"] in ("healthy", "warning")


def test_the_other_optimizer_is_taken_over() -> None:
    """Its options, and its step."""
    names = run("migrate_options")
    optimizer, model = names["optimizer"], names["model"]
    assert optimizer.state[model.weight]["step"] == 2
    assert optimizer.param_groups[0]["lr"] == 2e-4
    assert optimizer.param_groups[0]["weight_decay"] == 0.01


# -------------------------------------------------------------------------------------------------------------- tables


def rows(text: str, columns: int) -> list[list[str]]:
    """The cells of the tables with that many columns, headings and rules left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    heads = {i - 1 for i, line in enumerate(lines) if set(line) <= set("|-: ")}
    return [row for i, row in enumerate(cells) if len(row) == columns and i not in heads and i - 1 not in heads]


OPTIONS = {README: "Options", CHINESE: "選項"}


@both
def test_the_options_are_those_of_the_config(text: str) -> None:
    """Every field once, in the config's order, with its default, and with a meaning."""
    written = rows(section(OPTIONS[text], text), 3)
    assert all(re.fullmatch(r"`\w+`", name) and re.fullmatch(r"`[^`]+`", value) for name, value, _ in written)
    assert all(len(meaning) >= 4 for _, _, meaning in written)
    listed = [(name.strip("`"), ast.literal_eval(value.strip("`"))) for name, value, _ in written]
    fields = [(f.name, f.default) for f in dataclasses.fields(AutomagicConfig)]
    assert [name for name, _ in listed] == [name for name, _ in fields]
    assert listed == fields
    assert [type(value) for _, value in listed] == [type(value) for _, value in fields]


@pytest.mark.parametrize(
    ("text", "words"), [(README, "All but (.*?) may also differ"), (CHINESE, r"除了((?:.|\n)*?)之外")]
)
def test_the_options_that_hold_for_all_are_named(text: str, words: str) -> None:
    """All others may stand in a group."""
    (sentence,) = re.findall(words, section(OPTIONS[text], text))
    named = set(re.findall(r"`(\w+)`", sentence))
    assert named == {f.name for f in dataclasses.fields(AutomagicConfig)} - set(automagic_bnb.config.GROUP_OPTIONS)


@both
def test_every_public_name_is_mentioned(text: str) -> None:
    """In the text or in an example."""
    assert [name for name in automagic_bnb.__all__ if not re.search(rf"\b{name}\b", text)] == []


@both
def test_every_metric_and_verdict_is_explained(text: str) -> None:
    """Under the names that the code has for them."""
    names = [*metrics.METRICS, *monitoring.REASONS, *monitoring.HEALTH_ISSUES]
    assert [name for name in names if f"`{name}`" not in text] == []


@both
def test_every_figure_of_the_memory_report_is_explained(text: str) -> None:
    """All its keys."""
    optimizer = automagic_bnb.Automagic8bit([torch.nn.Parameter(torch.zeros(8, 8))], lr=1e-3)
    assert [key for key in optimizer.get_memory_efficiency_report() if f"`{key}`" not in text] == []


HARDWARE = {README: "By hardware", CHINESE: "依硬體選設定"}
GPUS = [{"memory_gb": 80, "capability": 6.1}, *({"memory_gb": gb} for gb in (7.9, 11.9, 15.9, 24))]


@both
def test_the_hardware_gets_what_the_table_says(text: str) -> None:
    """A row for each range of memory; its upper end, and one old GPU."""
    written = [(adaptive, optimized) for _, adaptive, optimized in rows(section(HARDWARE[text], text), 3)][1:]
    assert len(written) == len(GPUS)
    for gpu, (adaptive, optimized) in zip(GPUS, written, strict=True):
        if "capability" not in gpu:
            assert profile_of(hardware.get_adaptive_config(**gpu)) == adaptive.strip("`")
        config = hardware.get_hardware_optimized_config(**gpu)
        found = re.findall(r"`(\w+)`\D+(\d+)", optimized)
        assert found == [(profile_of(config), str(config.min_8bit_size))]
    assert profile_of(hardware.get_adaptive_config(memory_gb=5.9)) == "memory_optimized"


def profile_of(config: AutomagicConfig) -> str:
    """The profile that a config has the options of, but for `min_8bit_size`."""
    names = [name for name in cli.PROFILES if _equal_but_for_size(config, name)]
    assert len(names) == 1
    return names[0]


def _equal_but_for_size(config: AutomagicConfig, name: str) -> bool:
    profile = getattr(automagic_bnb.OptimizationProfiles, name)()
    return dataclasses.replace(profile, min_8bit_size=config.min_8bit_size) == config


def bytes_per_parameter(label: str, shape: tuple[int, int]) -> float:
    """Counted after one step of the optimizer that a row of the table names, on a bf16 weight."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    name, options = re.findall(r"`([\w.]+)`", label)[0], dict(re.findall(r'`(\w+)=("?\w+"?)`', label))
    cls = getattr(bitsandbytes.optim, name[len("bnb.optim.") :]) if name.startswith("bnb") else None
    p = torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
    p.grad = torch.full_like(p, 1e-3)
    values = {k: ast.literal_eval(v) for k, v in options.items()}
    opt = (cls or getattr(automagic_bnb, name))([p], lr=1e-4, **values)
    opt.step()
    return state.state_bytes(opt.state[p]) / p.numel()


COSTS = rows(section("What the state costs"), 3)
SHAPES = ((2048, 2048), (16, 3072))


def test_both_say_the_same_of_costs() -> None:
    """And only words differ in the row of the probes."""
    chinese = rows(section("狀態要多少記憶體", CHINESE), 3)
    assert [row for row in chinese if row[0].endswith("`")] == [row for row in COSTS if row[0].endswith("`")]
    assert [figures for _, *figures in chinese] == [figures for _, *figures in COSTS]


@pytest.mark.parametrize(("label", "large", "lora"), [row for row in COSTS if "probes" not in row[0]])
def test_the_state_costs_what_the_table_says(label: str, large: str, lora: str) -> None:
    """To the last digit shown."""
    assert [f"{bytes_per_parameter(label, shape):.2f}" for shape in SHAPES] == [large, lora]


def test_the_probes_cost_what_the_table_says() -> None:
    """They come on top of any storage."""
    ((_, *written),) = [row for row in COSTS if "probes" in row[0]]
    for shape, shown in zip(SHAPES, written, strict=True):
        plain, extra = (bytes_per_parameter(f"`Automagic8bit`, `auto_lr={on}`", shape) for on in (False, True))
        assert extra - plain == pytest.approx(float(shown), abs=0.0051)


def test_every_state_tensor_is_in_the_changelog() -> None:
    """A new one changes the format, and the changelog marks that."""
    text = CHANGELOG.partition("### State format")[2]
    assert {key for key in state.TENSOR_KEYS if f"`{key}`" not in text} == set()
    assert f"## [{automagic_bnb.__version__}]" in CHANGELOG


# ------------------------------------------------------------------------------------------------------------ commands


def shell_lines() -> list[str]:
    return [line for _, block in code_blocks("bash") for line in block.splitlines()]


def test_ci_runs_the_two_commands_of_the_readme(tmp_path: Path) -> None:
    """It takes them out of the README, where each is one line, the same in both; and stops where one is not there."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    (function,) = re.findall(r"^readme_command\(\) \{\n.*?^\}\n", CI, re.MULTILINE | re.DOTALL)

    def taken(extra: str, folder: Path) -> str:
        command = [bash, "-c", f"set -euo pipefail\n{function}readme_command {extra}"]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout

    for extra, words in {"demo": "automagic-bnb demo", "test": "pytest"}.items():
        (command,) = [line for line in shell_lines() if words in line]
        assert taken(extra, ROOT) == command + "\n"
        assert command in CHINESE.splitlines()
        assert CI.count(f"{extra}=$(readme_command {extra})\n") == CI.count(f'\neval "${extra}"\n') == 1
        (tmp_path / "README.md").write_text(README.replace(command, ""), encoding="utf-8")
        with pytest.raises(subprocess.CalledProcessError):
            taken(extra, tmp_path)


def test_ci_is_a_script_that_bash_can_read() -> None:
    """It may be executed, stops at the first error, and parses."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "set -euo pipefail" in CI
    assert subprocess.run([bash, "-n", str(ROOT / ".ci" / "run")], check=False).returncode == 0


def test_the_extras_named_exist() -> None:
    """`pip` only warns about one that does not."""
    lists = re.findall(r"\.\[([\w,]+)\]", README + CHINESE + CI)
    extras = {name for names in lists for name in names.split(",")}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert {"demo", "dev", "test"} <= extras
    assert [name for name in extras if not re.search(rf"^{name} = \[", project, re.MULTILINE)] == []


def test_the_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """All those that the READMEs name, and no other is there."""
    commands = {command.split()[0] for line in shell_lines() for command in line.split("automagic-bnb ")[1:]}
    commands |= {name for text in READMES.values() for name in re.findall(r"`automagic-bnb (\w+)[^`]*`", text)}
    assert commands == {"demo", "doctor", "dashboard"}
    for command in commands:
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--help"])
        assert stopped.value.code == 0
        assert command in capsys.readouterr().out


@both
def test_files_that_the_readme_names_exist(text: str) -> None:
    """Links, and scripts to run."""
    links = [target for target in re.findall(r"\]\(([^)#]+)", text) if "://" not in target]
    scripts = re.findall(r"^python (\S+)", "\n".join(shell_lines()), re.MULTILINE)
    assert {"CHANGELOG.md", "LICENSE", "benchmarks/step_time.py"} <= {*links, *scripts}
    assert [name for name in (*links, *scripts) if not (ROOT / name).is_file()] == []


def test_each_readme_links_to_the_other() -> None:
    """At its top."""
    assert "(README.zh-TW.md)" in README[:200]
    assert "(README.md)" in CHINESE[:200]


def anchors(text: str) -> list[str]:
    """Those of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_code(text), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@both
def test_headings_that_the_readme_links_to_exist(text: str) -> None:
    """In itself and in the other, each by one anchor."""
    assert len(anchors(text)) == len(set(anchors(text)))
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= set(anchors(text))
    for name, anchor in re.findall(r"\]\((README[\w.-]*)#([^)]+)\)", text):
        assert anchor in anchors(READMES[name])


def test_both_have_the_same_sections() -> None:
    """As many, of the same levels, up to the part on development."""
    levels = [re.findall(r"^(#+) ", without_code(text), re.MULTILINE) for text in READMES.values()]
    assert levels[0] == levels[1]


def test_both_have_the_same_tables() -> None:
    """As many rows of as many columns, in the same order."""
    english, chinese = (
        [line.count("|") for line in without_code(text).splitlines() if line.startswith("|")]
        for text in READMES.values()
    )
    assert english == chinese


SPEED = (("Speed", README), ("速度", CHINESE))


@pytest.mark.parametrize(("title", "text"), SPEED)
def test_the_measured_table_has_its_place(title: str, text: str) -> None:
    """Between two marks, in the section on speed, with the same figures in both."""
    marks = [f"<!-- step-time:{mark} -->" for mark in ("begin", "end")]
    assert [text.count(mark) for mark in marks] == [1, 1]
    assert re.search(f"{marks[0]}.*{marks[1]}", section(title, text), re.DOTALL)
    measured = [re.findall(r"\d+(?:\.\d+)? ms(?: \(\d+\.\d+×\))?", section(*of)) for of in SPEED]
    assert measured[0] == measured[1]


# --------------------------------------------------------------------------------------------------------- local names

SOURCES = ("pyproject.toml", "README.md", "README.zh-TW.md", "CHANGELOG.md", "LICENSE", ".gitignore")
FOLDERS = (".ci", "automagic_bnb", "kernels", "tests", "benchmarks")
LOCAL_PATH = re.compile(
    r"(?<![\w.~*)\]}-])/(?:home|root|work|opt|tmp|mnt|srv|var|Users)(?:/[\w.]|\b(?![/\w]))"
    r"|\b[A-Z]:\\{1,2}\w|file:/{3}|~/[\w.]"
)
REGISTRY = re.compile(
    r"\b(?:pypi|pythonhosted|anaconda|npmjs|crates)\.(?:org|com|io)|download\.pytorch|/simple\b/"
    r"|index[-_]url|find[-_]links|trusted[-_]host",
    re.IGNORECASE,
)


def source_files() -> Iterator[Path]:
    """The project's files of text, wherever the checkout lies."""
    yield from (ROOT / name for name in SOURCES)
    for folder in FOLDERS:
        yield from (p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix not in (".pyc", ".png"))


def local_names(text: str) -> list[str]:
    return [match[0] for pattern in (LOCAL_PATH, REGISTRY) for match in pattern.finditer(text)]


def test_no_file_names_a_local_path_or_a_registry() -> None:
    """They mean nothing on another machine."""
    paths = list(source_files())
    assert len(paths) > 30
    found = {str(p.relative_to(ROOT)): local_names(p.read_text(encoding="utf-8", errors="replace")) for p in paths}
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "words",
    [
        ("", "home", "someone", "model"),
        ("cd ", "work", "main"),
        ("'", "tmp'"),
        ("C:\\", "Users"),
        ("file:/", "", "checkout"),
        ("~", "checkout"),
        ("https:/", "py" + "pi.org", "project"),
        ("--index" + "-url https:/", "mirror"),
    ],
)
def test_the_search_finds_such_names(words: tuple[str, ...]) -> None:
    """The negative control; put together here, so that this file does not contain them."""
    joined = "".join(words) if words[0].startswith("C:") else "/".join(words)
    assert local_names(joined)
    assert not local_names("benchmarks/results, a/opt/b, automagic_bnb.kernels, tmp_path / 'store', and/or")
