"""The README does what it says: its code runs, its tables are the code's, its commands are the ones CI runs."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import automagic_bnb
from automagic_bnb import AutomagicConfig, cli, state

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def code_blocks(language: str) -> list[tuple[int, str]]:
    """Line number and text of each fenced block of a language."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [(README.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


def section(title: str) -> str:
    """The text under a second-level heading, which there must be one of."""
    (text,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    return text


# ------------------------------------------------------------------------------------------------------------ examples

PYTHON = code_blocks("python")


def test_there_is_code() -> None:
    """Every opened fence is closed, and the examples are found."""
    assert len(re.findall(r"^```", README, re.MULTILINE)) % 2 == 0
    assert len(PYTHON) >= 5


@pytest.mark.parametrize(("line", "code"), PYTHON, ids=[f"line {line}" for line, _ in PYTHON])
def test_python_code_runs_as_written(
    line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_warnings: None
) -> None:
    """By itself, in an empty folder, on the CPU, with finite weights at its end and without a warning."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(line)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile("\n" * (line - 1) + code, "README.md", "exec"), names)
    tensors = [p for x in names.values() if isinstance(x, torch.nn.Module) for p in x.parameters()]
    tensors += [x for x in names.values() if isinstance(x, torch.Tensor)]
    assert tensors or "weights" in names
    assert all(torch.isfinite(x).all() for x in tensors)


def run(line_with: str) -> dict[str, Any]:
    """The names that the one example with this text leaves behind."""
    ((line, code),) = [(line, code) for line, code in PYTHON if line_with in code]
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


# -------------------------------------------------------------------------------------------------------------- tables


def rows(text: str, columns: int) -> list[list[str]]:
    """The cells of the tables with that many columns, headings and rules left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    heads = {i - 1 for i, line in enumerate(lines) if set(line) <= set("|-: ")}
    return [row for i, row in enumerate(cells) if len(row) == columns and i not in heads and i - 1 not in heads]


def test_the_options_are_those_of_the_config() -> None:
    """Every field once, in the config's order, with its default, and with a meaning."""
    written = rows(section("Options"), 3)
    assert all(re.fullmatch(r"`\w+`", name) and re.fullmatch(r"`[^`]+`", value) for name, value, _ in written)
    assert all(len(meaning) >= 10 for _, _, meaning in written)
    listed = [(name.strip("`"), ast.literal_eval(value.strip("`"))) for name, value, _ in written]
    fields = [(f.name, f.default) for f in dataclasses.fields(AutomagicConfig)]
    assert [name for name, _ in listed] == [name for name, _ in fields]
    assert listed == fields
    assert [type(value) for _, value in listed] == [type(value) for _, value in fields]


def test_the_options_that_hold_for_all_are_named() -> None:
    """All others may stand in a group."""
    (sentence,) = re.findall(r"All but (.*?) may also differ", section("Options"))
    named = set(re.findall(r"`(\w+)`", sentence))
    assert named == {f.name for f in dataclasses.fields(AutomagicConfig)} - set(automagic_bnb.config.GROUP_OPTIONS)


def bytes_per_parameter(label: str, shape: tuple[int, int]) -> float:
    """Counted after one step of the optimizer that a row of the table names, on a bf16 weight."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    name, options = re.findall(r"`([\w.]+)`", label)[0], dict(re.findall(r"`(\w+)=(\w+)`", label))
    cls = getattr(bitsandbytes.optim, name[len("bnb.optim.") :]) if name.startswith("bnb") else None
    p = torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
    p.grad = torch.full_like(p, 1e-3)
    opt = (cls or getattr(automagic_bnb, name))([p], lr=1e-4, **{k: v == "True" for k, v in options.items()})
    opt.step()
    return state.state_bytes(opt.state[p]) / p.numel()


COSTS = rows(section("What the state costs"), 3)
SHAPES = ((2048, 2048), (16, 3072))


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


def test_ci_runs_the_test_command_of_the_readme() -> None:
    """It is one line, the same in both."""
    (command,) = [line for line in shell_lines() if "pytest" in line]
    assert CI.splitlines().count(command) == 1
    assert re.fullmatch(r'pip install -e "\.\[test\]" && pytest\b[^;&|]*', command)


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
    extras = set(re.findall(r"\.\[(\w+)\]", README + CI))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert {"demo", "dev", "test"} <= extras
    assert [name for name in extras if not re.search(rf"^{name} = \[", project, re.MULTILINE)] == []


def test_the_demo_command_exists(capsys: pytest.CaptureFixture[str]) -> None:
    """With the words the README uses."""
    (command,) = [line for line in shell_lines() if "automagic-bnb" in line]
    words = command.rpartition("&& automagic-bnb ")[2].split()
    with pytest.raises(SystemExit) as stopped:
        cli.main([*words, "--help"])
    assert stopped.value.code == 0
    assert "demo" in capsys.readouterr().out


def test_files_that_the_readme_names_exist() -> None:
    """Links, and scripts to run."""
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    scripts = re.findall(r"^python (\S+)", "\n".join(shell_lines()), re.MULTILINE)
    assert {"CHANGELOG.md", "LICENSE", "benchmarks/step_time.py"} <= {*links, *scripts}
    assert [name for name in (*links, *scripts) if not (ROOT / name).is_file()] == []


def test_headings_that_the_readme_links_to_exist() -> None:
    """As GitHub turns headings into anchors."""
    headings = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


def test_the_measured_table_has_its_place() -> None:
    """Between two marks, in the section on speed."""
    marks = [f"<!-- step-time:{mark} -->" for mark in ("begin", "end")]
    assert [README.count(mark) for mark in marks] == [1, 1]
    assert re.search(f"{marks[0]}.*{marks[1]}", section("Speed"), re.DOTALL)


# --------------------------------------------------------------------------------------------------------- local names

SOURCES = ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", ".gitignore")
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
    """The files that belong to the project, wherever the checkout lies."""
    yield from (ROOT / name for name in SOURCES)
    for folder in FOLDERS:
        yield from (p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix != ".pyc")


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
