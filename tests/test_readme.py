"""The manuals' tables are the code's, their commands are the ones CI runs, and the two languages agree.

Where a test says "the README" it is the English one with its pages (see `readme_texts`); what could differ between the
two languages is tested of both.
"""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from readme_texts import (
    CHANGELOG,
    CHINESE,
    CI,
    FILES,
    README,
    READMES,
    ROOT,
    TEXTS,
    both,
    code_blocks,
    section,
    without_code,
)

import automagic_bnb
from automagic_bnb import AutomagicConfig, hardware, metrics, state
from automagic_bnb.command import cli
from automagic_bnb.watch import monitoring

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


def bytes_per_parameter(label: str, shapes: tuple[tuple[int, int], ...]) -> float:
    """Counted after one step of the optimizer that a row of the table names, on bf16 weights."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    name, options = re.findall(r"`([\w.]+)`", label)[0], dict(re.findall(r'`(\w+)=("?\w+"?)`', label))
    cls = getattr(bitsandbytes.optim, name[len("bnb.optim.") :]) if name.startswith("bnb") else None
    weights = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in shapes]
    for p in weights:
        p.grad = torch.full_like(p, 1e-3)
    values = {k: ast.literal_eval(v) for k, v in options.items()}
    if cls is None:
        values["lora"] = all(min(shape) < 64 for shape in shapes)
    opt = (cls or getattr(automagic_bnb, name))(weights, lr=1e-4, **values)
    opt.step()
    return sum(state.state_bytes(opt.state[p]) for p in weights) / sum(p.numel() for p in weights)


COSTS = rows(section("What the state costs"), 4)
SHAPES = (((2048, 2048),), ((16, 3072),), ((4, 768), (768, 4)))


def test_both_say_the_same_of_costs() -> None:
    """And only words differ in the row of the probes."""
    chinese = rows(section("狀態要多少記憶體", CHINESE), 4)
    assert [row for row in chinese if row[0].endswith("`")] == [row for row in COSTS if row[0].endswith("`")]
    assert [figures for _, *figures in chinese] == [figures for _, *figures in COSTS]


@pytest.mark.parametrize(("label", *"abc"), [row for row in COSTS if "probes" not in row[0]])
def test_the_state_costs_what_the_table_says(label: str, a: str, b: str, c: str) -> None:
    """To the last digit shown."""
    assert [f"{bytes_per_parameter(label, shapes):.2f}" for shapes in SHAPES] == [a, b, c]


def test_the_probes_cost_what_the_table_says() -> None:
    """They come on top of any storage."""
    ((_, *written),) = [row for row in COSTS if "probes" in row[0]]
    for shape, shown in zip(SHAPES, written, strict=True):
        plain, extra = (bytes_per_parameter(f"`Automagic8bit`, `auto_lr={on}`", shape) for on in (False, True))
        assert extra - plain == pytest.approx(float(shown), abs=0.0051)


def test_every_state_tensor_is_in_the_changelog() -> None:
    """A new one changes the format, and the changelog marks that."""
    text = CHANGELOG.partition("### State format")[2]
    assert {key for key in state.KEYS if f"`{key}`" not in text} == set()
    version = "Unreleased" if "dev" in automagic_bnb.__version__ else automagic_bnb.__version__
    assert f"## [{version}]" in CHANGELOG


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
        assert all(TEXTS[readme].splitlines().count(command) == 1 for readme in READMES)
        assert CI.count(f"{extra}=$(readme_command {extra})\n") == CI.count(f'\neval "${extra}"\n') == 1
        (tmp_path / "README.md").write_text(TEXTS["README.md"].replace(command, ""), encoding="utf-8")
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
    assert commands == {"demo", "doctor", "dashboard", "inspect", "run"}
    for command in commands:
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--help"])
        assert stopped.value.code == 0
        assert command in capsys.readouterr().out


TRAINERS = tuple(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs" / "trainers").glob("*.md")))
MORE = ("docs/README.md", "docs/zh-TW/README.md", ".github/CONTRIBUTING.md", ".github/SECURITY.md", *TRAINERS)
LINKED = {**TEXTS, **{name: (ROOT / name).read_text(encoding="utf-8") for name in MORE}}


def anchors(text: str) -> list[str]:
    """Those of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_code(text), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("name", LINKED)
def test_links_lead_somewhere(name: str) -> None:
    """To files that exist, from where the page lies, and to headings that they have, each by one anchor."""
    text = without_code(LINKED[name])
    assert len(anchors(text)) == len(set(anchors(text)))
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    for target in targets:
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), target
        assert path.resolve().is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


@both
def test_scripts_that_the_readme_names_exist(text: str) -> None:
    scripts = re.findall(r"^python (\S+)", "\n".join(code for _, code in code_blocks("bash", text)), re.MULTILINE)
    assert "benchmarks/step_time.py" in scripts
    assert [name for name in scripts if not (ROOT / name).is_file()] == []


def test_there_are_links() -> None:
    """That the test above looks at."""
    assert sum(len(re.findall(r"\]\([^)]+\)", text)) for text in LINKED.values()) > 100


def test_every_page_is_linked_to_from_both_fronts() -> None:
    """From the README and from the list of pages; and each language's README links to the other at its top."""
    for readme, (_, *pages) in FILES.items():
        index = f"{Path(pages[0]).parent.as_posix()}/README.md"
        for front in (readme, index):
            targets = re.findall(r"\]\(([^)#]+)", LINKED[front])
            linked = {((ROOT / front).parent / target).resolve() for target in targets if "://" not in target}
            assert {(ROOT / page).resolve() for page in pages} <= linked
    assert "(README.zh-TW.md)" in README[:200]
    assert "(README.md)" in CHINESE[:200]


@both
def test_the_readme_is_short(text: str) -> None:
    """By itself, without its pages."""
    (readme,) = [name for name in READMES if READMES[name] == text]
    assert len(TEXTS[readme].splitlines()) <= 300


def test_both_have_the_same_sections() -> None:
    """As many, of the same levels."""
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
