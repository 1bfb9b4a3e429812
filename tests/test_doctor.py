"""`automagic-bnb doctor`: each fault is found, named and given a remedy; a sound installation passes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from automagic_bnb import backends, bnb, reference
from automagic_bnb.command import cli, doctor

HERE = Path(__file__).parent
TRITON_MISSING = backends.triton_missing


def doctor_process(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, without a GPU and outside the checkout."""
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, str(HERE / "doctor_process.py"), *arguments],
        cwd=cwd,
        env={**kept, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def findings(output: str) -> dict[str, dict[str, str]]:
    return {finding["name"]: finding for finding in json.loads(output)["findings"]}


@pytest.fixture
def no_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "self_test", lambda device, bits: doctor.Finding(f"{device} {bits}", "ok", ""))


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch, no_self_test: None) -> None:
    """One CUDA device, as far as the checks see."""
    card = SimpleNamespace(name="NVIDIA L4", total_memory=22 * 2**30, major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(backends, "triton_missing", lambda: "")
    monkeypatch.setattr(backends, "interpreting", lambda: False)


# ------------------------------------------------------------------------------------------------------ whole processes


def own_errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What it wrote to stderr: not even what bitsandbytes writes when it is imported on some CPUs."""
    return done.stderr.splitlines()


def test_a_sound_installation_without_a_gpu(tmp_path: Path) -> None:
    """No GPU is no error: status 0, and it says what runs."""
    done = doctor_process("whole", "doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[ok] bitsandbytes:" in done.stdout
    assert "[note] device: no CUDA device; the optimizer runs in plain PyTorch" in done.stdout
    assert "[note] fused step: not in use: torch sees no CUDA device" in done.stdout
    assert "[ok] self-test on cpu, 32 bits: loss " in done.stdout
    assert "[ok] self-test on cpu, 8 bits: loss " in done.stdout
    assert re.match(r"All is well \(\d notes below\)\.\n", done.stdout)
    for name in ("automagic_bnb", "Python", "torch", "CUDA", "driver", "Triton", "bitsandbytes"):
        assert re.search(rf"^{name} +\S", done.stdout, re.M), name
    assert own_errors(done) == []


@pytest.mark.parametrize(
    ("how", "detail", "remedy"),
    [
        (
            "missing",
            "is missing, so all optimizer state is kept in 32 bits",
            'pip install "bitsandbytes>=0.45.5,<0.52"',
        ),
        (
            "broken",
            "installed but cannot be imported (bitsandbytes is broken: lib",
            "python -m bitsandbytes tells more",
        ),
    ],
)
def test_without_bitsandbytes_and_triton(how: str, detail: str, remedy: str, tmp_path: Path) -> None:
    """Status 1 and the pip command; the rest still works and is tested. Triton is not needed without a GPU."""
    done = doctor_process(how, "doctor", "--json", cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    found = findings(done.stdout)
    assert found["bitsandbytes"]["status"] == "problem"
    assert detail in found["bitsandbytes"]["detail"]
    assert remedy in found["bitsandbytes"]["remedy"]
    assert 'bitsandbytes>=0.45.5,<0.52"' in found["bitsandbytes"]["remedy"]
    assert found["self-test on cpu, 32 bits"]["status"] == "ok"
    assert found["self-test on cpu, 8 bits"]["detail"] == "left out: needs bitsandbytes"
    assert [name for name, finding in found.items() if finding["status"] == "problem"] == ["bitsandbytes"]
    if how == "missing":
        assert json.loads(done.stdout)["versions"]["Triton"] == "not installed"
    assert own_errors(done) == []


def test_a_checkout_in_the_place_of_kernels(tmp_path: Path) -> None:
    """The checkout on the import path is a fault."""
    done = doctor_process("whole", "doctor", "--json", cwd=tmp_path, PYTHONPATH=str(HERE.parent))
    finding = findings(done.stdout)["name `kernels`"]
    assert (finding["status"], done.returncode) == ("problem", 1)
    assert str(HERE.parent / "kernels") in finding["detail"]
    assert "PYTHONPATH" in finding["remedy"]


# -------------------------------------------------------------------------------------------------------- single checks


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("0.50.0", "ok"),
        ("0.50.2", "ok"),
        ("0.50.1.dev0", "ok"),
        ("0.45.5", "ok"),
        ("0.49.1", "ok"),
        ("0.45.4", "problem"),
        ("0.52.0", "problem"),
        ("0.5.0", "problem"),
        ("1.50.0", "problem"),
        ("unknown", "problem"),
    ],
)
def test_the_supported_range_of_bitsandbytes(version: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class that ours extends moves between minor versions: those that were tried, and what lies between."""
    monkeypatch.setattr(sys.modules["bitsandbytes"], "__version__", version)
    finding = doctor.check_bitsandbytes()
    assert (finding.status, bool(finding.remedy)) == (status, status == "problem")
    assert version in finding.detail


def test_the_range_is_the_one_the_package_requires() -> None:
    """pyproject.toml and the message of the library say the same."""
    assert f'"bitsandbytes{bnb.SUPPORTED}"' in (HERE.parent / "pyproject.toml").read_text("utf-8")
    assert doctor.INSTALL_BITSANDBYTES in bnb.MISSING_WARNING
    oldest, beyond = (doctor.version_numbers(bound.lstrip("<>=")) for bound in bnb.SUPPORTED.split(","))
    assert (oldest, beyond) == (doctor.OLDEST_BITSANDBYTES, doctor.BEYOND_BITSANDBYTES)


def test_an_old_bitsandbytes_that_fails_to_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """The version is the cause, so it is named."""
    monkeypatch.setattr(bnb, "BITSANDBYTES_AVAILABLE", False)
    monkeypatch.setattr(doctor, "installed_version", lambda name: "0.41.1")
    finding = doctor.check_bitsandbytes()
    assert (finding.status, finding.remedy) == ("problem", 'pip install "bitsandbytes>=0.45.5,<0.52"')
    assert "0.41.1 is not supported" in finding.detail


def test_a_gpu_with_triton(a_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything in order: both devices are tested, and the GPU is described. Compiling is announced."""
    assert cli.main(["doctor"]) == 0
    seen = capsys.readouterr()
    assert "NVIDIA L4, compute capability 8.9, 22.0 GB of memory" in seen.out
    assert "[ok] fused step: in use on CUDA" in seen.out
    for test in ("cpu 32", "cpu 8", "cuda:0 32", "cuda:0 8"):
        assert f"[ok] {test}" in seen.out
    assert "compiles the kernels" in seen.err


def test_a_gpu_without_triton(a_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A fault on CUDA, with the command that mends it."""
    monkeypatch.setattr(backends, "triton_missing", lambda: "Triton could not be imported (No module named 'triton')")
    assert cli.main(["doctor", "--json"]) == 1
    finding = findings(capsys.readouterr().out)["fused step"]
    assert (finding["status"], finding["remedy"]) == ("problem", "pip install triton")
    assert "No module named 'triton'" in finding["detail"]
    monkeypatch.setattr(doctor.platform, "system", lambda: "Windows")
    assert "triton-windows" in doctor.check_fused().remedy


def test_a_gpu_with_a_triton_too_old(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its version, and the torch that brings a newer one: another Triton beside that torch would exchange it."""
    monkeypatch.setattr(backends, "triton_missing", TRITON_MISSING)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.0.0"))
    finding = doctor.check_fused()
    assert finding.status == "problem"
    assert finding.remedy == "install torch 2.7 or later, which brings a Triton that will do"
    assert "Triton 3.0.0 is too old" in finding.detail


def test_a_gpu_in_the_interpreter(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable left over from debugging makes every step crawl."""
    monkeypatch.setattr(backends, "interpreting", lambda: True)
    finding = doctor.check_fused()
    assert (finding.status, finding.remedy) == ("problem", "unset TRITON_INTERPRET")


@pytest.mark.parametrize(
    ("cuda", "hidden", "status", "remedy"),
    [
        (None, None, "problem", "install a CUDA build of torch"),
        ("13.0", None, "problem", "update the NVIDIA driver to one that supports CUDA 13.0"),
        ("13.0", "", "note", ""),
    ],
)
def test_a_gpu_that_torch_cannot_use(
    cuda: str | None, hidden: str | None, status: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver answers, torch finds nothing: a CPU build, or a driver too old, or a GPU hidden on purpose."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    finding = doctor.check_devices("550.54.15")
    assert finding.status == status
    assert finding.remedy.startswith(remedy)
    assert doctor.check_devices("").status == "note"


def test_the_driver_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi says it; one that fails or is not there gives nothing."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 550.54.15\necho 550.54.15\n")
    command.chmod(0o755)
    assert doctor.nvidia_driver() == "550.54.15"
    command.write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    assert doctor.nvidia_driver() == ""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert doctor.nvidia_driver() == ""


def test_huggingfaces_kernels_are_welcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package that the name belongs to; another folder is worth a note, an uninstalled checkout is a fault."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.check_kernels_package().status == "note"
    monkeypatch.setattr(doctor, "installed_version", lambda name: "0.10.0")
    assert doctor.check_kernels_package() == doctor.Finding("name `kernels`", "ok", "Hugging Face's package, 0.10.0")
    monkeypatch.setattr(doctor, "package_folder", lambda name: None)
    finding = doctor.check_kernels_package()
    assert (finding.status, "pip install" in finding.remedy) == ("problem", True)


# ------------------------------------------------------------------------------------------------------------ self-test

CPU = torch.device("cpu")


@pytest.mark.kernels
@pytest.mark.parametrize("bits", [8, 32])
def test_the_kernels_are_held_against_the_rule(bits: int) -> None:
    """In Triton's interpreter, where there is no GPU."""
    device = torch.device("cuda") if torch.cuda.is_available() else CPU
    finding = doctor.self_test(device, bits)
    assert finding.status == "ok", finding
    losses = re.search(r"loss (\S+) to (\S+) in 10 steps", finding.detail)
    assert losses
    assert float(losses[2]) < 0.95 * float(losses[1])
    assert "kernels within" in finding.detail


@pytest.mark.parametrize("bits", [8, 32])
def test_eight_bits_are_eight_bits(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight is large enough for the storage that is tested."""
    made = []
    init_state = doctor.Automagic.init_state

    def spy(self: Any, group: Any, p: Any, *args: Any) -> None:
        init_state(self, group, p, *args)
        made.append(self.state[p]["state1"].dtype)

    monkeypatch.setattr(doctor.Automagic, "init_state", spy)
    assert doctor.exercise(CPU, bits)[0] == ""
    assert made == [torch.uint8 if bits == 8 else torch.float32]


def breaking(how: str) -> Any:
    """An update of a parameter with a fault."""
    real = reference.update_parameter

    def update(p: torch.Tensor, grad: torch.Tensor, *args: Any) -> None:
        if how == "raises":
            raise RuntimeError("no kernel image is available")
        before = p.clone()
        real(p, grad, *args)
        if how == "uphill":
            p.copy_(2 * before - p)
        elif how == "nan":
            p[0, 0] = float("nan")
        elif how == "large":
            p.add_(p - before, alpha=0.05)

    return update


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ("raises", "failed with RuntimeError: no kernel image is available"),
        ("uphill", "the loss does not fall"),
        ("nan", "weights that are not finite"),
    ],
)
def test_a_broken_step_is_found(
    how: str, complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each kind of fault, with status 1 and a remedy."""
    monkeypatch.setattr(backends, "triton_missing", lambda: "Triton is left out here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(reference, "update_parameter", breaking(how))
    assert cli.main(["doctor", "--json"]) == 1
    found = findings(capsys.readouterr().out)
    for bits in (32, 8):
        finding = found[f"self-test on cpu, {bits} bits"]
        assert finding["status"] == "problem"
        assert complaint in finding["detail"]
        assert "automagic-bnb doctor --json" in finding["remedy"]


@pytest.mark.kernels
def test_kernels_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five per cent between the two is noticed; here the rule is altered, not the kernels."""
    device = torch.device("cuda") if torch.cuda.is_available() else CPU
    monkeypatch.setattr(reference, "update_parameter", breaking("large"))
    finding = doctor.self_test(device, 32)
    assert finding.status == "problem"
    assert "the kernels differ from the plain rule by 0.05" in finding.detail
    assert 'use backend="torch" for now' in finding.remedy


def test_nothing_global_is_touched(no_warnings: None, tools: Any) -> None:
    """No generator, no grad mode, no warnings."""
    state = torch.get_rng_state()
    with torch.no_grad():
        assert doctor.exercise(CPU, 8)[0] == ""
        assert not torch.is_grad_enabled()
    assert torch.equal(state, torch.get_rng_state())


def test_the_text_names_problems_and_remedies() -> None:
    """The first line has the verdict and the first remedy; below, one line each."""
    findings = [doctor.Finding("a", "ok", "fine"), doctor.Finding("b", "problem", "is missing", "pip install b")]
    report = doctor.Report({"torch": "2.13.0"}, [], findings)
    assert str(report).splitlines() == [
        "Not well: b: is missing. What to do: pip install b",
        "",
        "torch         2.13.0",
        "",
        "[ok] a: fine",
        "[problem] b: is missing",
        "    what to do: pip install b",
    ]
    assert doctor.Report({}, [], findings[:1]).verdict == "All is well."
    assert doctor.Report({}, [], [*findings, findings[1]]).verdict.endswith(" (and 1 more below)")


def test_what_bitsandbytes_says_at_its_import_is_said_here(monkeypatch: pytest.MonkeyPatch, no_self_test: None) -> None:
    """Where it was held back; otherwise there is nothing to say."""
    for held in ([], ["Failed to load CPU gemm_4bit_forward from …"]):
        monkeypatch.setattr(doctor.quiet, "held", held)
        said = [finding for finding in doctor.examine().findings if "gemm_4bit_forward" in finding.detail]
        assert [finding.status for finding in said] == ["note"] * len(held)
