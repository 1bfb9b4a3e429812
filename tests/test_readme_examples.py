"""The code of the READMEs and of the pages beside them runs as it is written, and does what they say."""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from readme_texts import CHINESE, README, TEXTS, both, code_blocks

from automagic_bnb import state

PYTHON = code_blocks("python")
EXAMPLES = [(name, line, code) for name, text in TEXTS.items() for line, code in code_blocks("python", text)]
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
    """Block by block, in the same order; comments are in the reader's language."""
    fence = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    english, chinese = (
        [(language, bare(language, code)) for language, code in fence.findall(text)] for text in (README, CHINESE)
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
