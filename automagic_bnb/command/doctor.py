"""The command `doctor`: what is installed, what runs how, whether a step works here, and what to do about it if not."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import automagic_bnb
from automagic_bnb import backends, bnb
from automagic_bnb.command import quiet
from automagic_bnb.command.progress import progress
from automagic_bnb.cpu import step as cpu
from automagic_bnb.optimizer import Automagic

OLDEST_BITSANDBYTES, BEYOND_BITSANDBYTES = (0, 45, 5), (0, 52, 0)
INSTALL_BITSANDBYTES = f'pip install "bitsandbytes{bnb.SUPPORTED}"'
NEWER_TRITON = "install torch 2.7 or later, which brings a Triton that will do"
INSTALL_SELF = "pip install automagic-bnb, or pip install -e . in a checkout"

HARMLESS = "it looks for an optional package for 4-bit layers on CPUs, which no optimizer uses"

SHAPE, MIN_8BIT_SIZE = (32, 64), 1024
STEPS, LR = 10, 3e-2
COMPARED_STEPS = 2
MAX_DIFFERENCE = 0.02
"""Kernels against the plain rule, relative, in the norm of what a weight has moved: far above what codes that fall the
other way amount to, far below any wrong formula."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    status: Literal["ok", "note", "problem"]
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    versions: dict[str, str]
    gpus: list[dict[str, str]]
    findings: list[Finding]

    @property
    def problems(self) -> int:
        return sum(finding.status == "problem" for finding in self.findings)

    @property
    def verdict(self) -> str:
        """Whether all is well, in one line; what is wrong, and what to do about the first of it."""
        wrong = [finding for finding in self.findings if finding.status == "problem"]
        if not wrong:
            notes = sum(finding.status == "note" for finding in self.findings)
            return "All is well" + (f" ({notes} {'note' if notes == 1 else 'notes'} below)." if notes else ".")
        first = wrong[0]
        text = f"Not well: {first.name}: {first.detail}"
        text += f". What to do: {first.remedy}" if first.remedy else ""
        return text + (f" (and {len(wrong) - 1} more below)" if len(wrong) > 1 else "")

    def __str__(self) -> str:
        lines = [self.verdict, ""]
        lines += [f"{name:<14}{version}" for name, version in self.versions.items()]
        lines += [f"{gpu['device']:<14}{gpu['name']}, {gpu['capability']}, {gpu['memory']}" for gpu in self.gpus]
        lines.append("")
        for finding in self.findings:
            lines.append(f"[{finding.status}] {finding.name}: {finding.detail}")
            if finding.remedy:
                lines.append(f"    what to do: {finding.remedy}")
        return "\n".join(lines)


def run_doctor(as_json: bool = False) -> int:
    """Examine, print the report, and return the exit status: 1 where something is wrong, else 0."""
    if torch.cuda.is_available():
        sys.stderr.write("The self-test compiles the kernels first, which can take a minute.\n")
    report = examine()
    as_dict = {"verdict": report.verdict, **dataclasses.asdict(report)}
    text = json.dumps(as_dict, indent=2, ensure_ascii=False) if as_json else str(report)
    sys.stdout.write(f"{text}\n")
    return 1 if report.problems else 0


def examine() -> Report:
    """Look at everything and run the self-test on the CPU and on each CUDA device."""
    driver = nvidia_driver()
    indices = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
    findings = [check_bitsandbytes(), check_devices(driver), check_fused(), check_cpu_step(), check_kernels_package()]
    findings += [Finding("bitsandbytes' CPU kernels", "note", f"{quiet.OPENING}: {HARMLESS}")] if quiet.held else []
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in indices)]
    tests = [(device, bits) for device in devices for bits in (32, 8)]
    findings += [self_test(device, bits) for device, bits in progress(tests, "self-test")]
    return Report(versions(driver), [describe_gpu(i) for i in indices], findings)


# --- what is here -----------------------------------------------------------------------------------------------------


def versions(driver: str) -> dict[str, str]:
    """Of everything that takes part, in words."""
    build = torch.version.cuda or torch.version.hip
    return {
        "automagic_bnb": automagic_bnb.__version__,
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        "CUDA": f"torch is built for {build}" if build else "torch is a build without CUDA",
        "driver": driver or "no NVIDIA driver found",
        "Triton": installed_version("triton") or "not installed",
        "bitsandbytes": bitsandbytes_version() or "not installed",
    }


def installed_version(distribution: str) -> str:
    """The version pip knows, or the empty string."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def bitsandbytes_version() -> str:
    """Of the module in use, else of what is installed; the empty string for neither."""
    loaded = getattr(sys.modules.get("bitsandbytes"), "__version__", "") if bnb.BITSANDBYTES_AVAILABLE else ""
    return loaded or installed_version("bitsandbytes")


def nvidia_driver() -> str:
    """The NVIDIA driver's version; the empty string where there is none that answers."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return next(iter(done.stdout.split("\n")), "").strip()


def describe_gpu(index: int) -> dict[str, str]:
    found = torch.cuda.get_device_properties(index)
    return {
        "device": f"cuda:{index}",
        "name": found.name,
        "capability": f"compute capability {found.major}.{found.minor}",
        "memory": f"{found.total_memory / 2**30:.1f} GB of memory",
    }


# --- checks -----------------------------------------------------------------------------------------------------------


def check_bitsandbytes() -> Finding:
    """Whether it is there, of a supported version, and can be imported."""
    name, version = "bitsandbytes", bitsandbytes_version()
    if version and not OLDEST_BITSANDBYTES <= version_numbers(version) < BEYOND_BITSANDBYTES:
        return Finding(name, "problem", f"{version} is not supported ({bnb.SUPPORTED} is)", INSTALL_BITSANDBYTES)
    if bnb.BITSANDBYTES_AVAILABLE:
        return Finding(name, "ok", f"{version} is supported ({bnb.SUPPORTED})")
    lost = "so all optimizer state is kept in 32 bits"
    if not version:
        return Finding(name, "problem", f"is missing, {lost}", INSTALL_BITSANDBYTES)
    return Finding(
        name,
        "problem",
        f"{version} is installed but cannot be imported ({bnb.IMPORT_ERROR}), {lost}",
        "python -m bitsandbytes tells more about its setup; to install it anew: "
        + INSTALL_BITSANDBYTES.replace("install", "install --force-reinstall", 1),
    )


def version_numbers(version: str) -> tuple[int, int, int]:
    """Major, minor and micro number of a version; 0 for those it has not."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else (0, 0, 0)


def check_devices(driver: str) -> Finding:
    """Whether torch can use the GPU, where there is one."""
    name = "device"
    if torch.cuda.is_available():
        return Finding(name, "ok", f"torch sees {torch.cuda.device_count()} CUDA device(s)")
    plain = "the optimizer runs in plain PyTorch on the CPU, correct but many times slower"
    if not driver:
        return Finding(name, "note", f"no CUDA device; {plain}")
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return Finding(
            name, "note", f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} hides the GPU; {plain}"
        )
    if torch.version.cuda is None:
        remedy = "install a CUDA build of torch: https://pytorch.org/get-started/locally"
    else:
        remedy = f"update the NVIDIA driver to one that supports CUDA {torch.version.cuda}, or install an older torch"
    return Finding(name, "problem", f"there is an NVIDIA driver ({driver}), but torch finds no GPU; {plain}", remedy)


def check_fused() -> Finding:
    """Whether the kernels are in use; if not, why."""
    name = "fused step"
    if not torch.cuda.is_available():
        return Finding(name, "note", "not in use: torch sees no CUDA device")
    missing = backends.triton_missing()
    if missing:
        windows = platform.system() == "Windows"
        remedy = "pip install triton-windows (a community build, not tried here)" if windows else "pip install triton"
        if "too old" in missing:
            remedy = NEWER_TRITON
        return Finding(
            name, "problem", f"not in use: {missing}; plain PyTorch does the work, many times slower", remedy
        )
    if backends.interpreting():
        detail = "TRITON_INTERPRET=1 is set, so the kernels are interpreted: very slow, for debugging only"
        return Finding(name, "problem", detail, "unset TRITON_INTERPRET")
    return Finding(name, "ok", "in use on CUDA: the Triton kernels update contiguous parameters")


def check_cpu_step() -> Finding:
    """Whether the CPU's step is compiled; if not, why. The first time on a machine it is compiled here."""
    name, missing = "compiled CPU step", cpu.missing()
    if missing and torch.cuda.is_available():
        return Finding(name, "ok", "not installed, nor needed on a GPU")
    if missing:
        detail = f"not in use: {missing}; on the CPU plain PyTorch does the work, many times slower"
        return Finding(name, "note", detail, 'pip install "automagic-bnb[cpu]"')
    remedy = 'use backend="torch" for now, and report it with the output of `automagic-bnb doctor --json`'
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            complaint, agreement = compare(torch.device("cpu"), 8, "numba", "the compiled steps")
    except Exception as e:  # whatever breaks here is what the command is to report
        return Finding(name, "problem", f"failed with {type(e).__name__}: {e}", remedy)
    if complaint:
        return Finding(name, "problem", complaint, remedy)
    return Finding(name, "ok", f"in use once an optimizer has worked for a second: {agreement}")


def check_kernels_package() -> Finding:
    """Whether `kernels`, Hugging Face's package that bitsandbytes and transformers import, is what that name gives."""
    name = "name `kernels`"
    ours, found = package_folder("automagic_bnb.kernels"), package_folder("kernels")
    checkout = Path(__file__).resolve().parents[2] / "kernels"
    if found is not None and found in (ours, checkout):
        return Finding(
            name,
            "problem",
            f"`import kernels` finds this project's folder {found}, where bitsandbytes and transformers expect Hugging "
            "Face's package",
            "take the checkout off PYTHONPATH; run programs from another folder, or without python's -m and -c",
        )
    if ours is None:
        return Finding(name, "problem", "automagic_bnb.kernels is missing: the package is not installed", INSTALL_SELF)
    if found is None:
        return Finding(name, "ok", "nothing stands in the way of Hugging Face's package of that name")
    if installed_version("kernels"):
        return Finding(name, "ok", f"Hugging Face's package, {installed_version('kernels')}")
    detail = f"{found} would be imported where bitsandbytes and transformers look for Hugging Face's package"
    return Finding(name, "note", detail, "rename the folder, if it is yours, or take it off the import path")


def package_folder(name: str) -> Path | None:
    """Where a package lies that `import` would find."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    places = list(spec.submodule_search_locations or ()) or [str(Path(spec.origin or "").parent)]
    return Path(places[0]).resolve()


# --- self-test --------------------------------------------------------------------------------------------------------


def self_test(device: torch.device, bits: int) -> Finding:
    """A tiny problem on one device: finite weights, a falling loss, and kernels that agree with the plain rule."""
    name = f"self-test on {device}, {bits} bits"
    if bits == 8 and not bnb.BITSANDBYTES_AVAILABLE:
        return Finding(name, "note", "left out: needs bitsandbytes")
    kernels = not backends.triton_missing() and (device.type == "cuda" or backends.interpreting())
    remedy = "report it with the output of `automagic-bnb doctor --json`"
    if kernels:
        remedy = f'use backend="torch" for now, and {remedy}'
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the other findings say
            complaint, seen = exercise(device, bits)
            if kernels and not complaint:
                complaint, agreement = compare(device, bits, "triton", "the kernels")
                seen += f", {agreement}"
    except Exception as e:  # whatever breaks here is what the command is to report
        return Finding(name, "problem", f"failed with {type(e).__name__}: {e}", remedy)
    if complaint:
        return Finding(name, "problem", complaint, remedy)
    return Finding(name, "ok", seen)


def exercise(device: torch.device, bits: int) -> tuple[str, str]:
    """What is wrong with a short run as the user's would be, or the empty string; and what was seen."""
    start, target = problem(device)
    moved, losses = descend(start, target, bits, None, STEPS)
    seen = f"loss {losses[0]:.3g} to {losses[-1]:.3g} in {STEPS} steps"
    if not torch.isfinite(moved).all():
        return f"weights that are not finite ({seen})", seen
    if not losses[-1] < 0.95 * losses[0]:
        return f"the loss does not fall ({seen})", seen
    return "", seen


def compare(device: torch.device, bits: int, backend: str, what: str) -> tuple[str, str]:
    """What is wrong with a backend, held against the plain rule, or the empty string; and how well they agree."""
    # In four bits a rate that rounds the other way, for want of a last digit, is half an octave off.
    options = {"mask_bits": 8}
    moved, should = (descend(*problem(device), bits, one, COMPARED_STEPS, **options)[0] for one in (backend, "torch"))
    difference = float((moved - should).norm() / should.norm())
    if not difference <= MAX_DIFFERENCE:
        return f"{what} differ from the plain rule by {difference:.2g} (allowed {MAX_DIFFERENCE})", ""
    return "", f"{what.removeprefix('the ')} within {difference:.1e} of the plain rule"


def problem(device: torch.device) -> tuple[Tensor, Tensor]:
    """A weight and what it should become."""
    generator = torch.Generator().manual_seed(0)
    start, target = (torch.randn(SHAPE, generator=generator).to(device) for _ in range(2))
    return start, target


def descend(
    start: Tensor, target: Tensor, bits: int, backend: str | None, steps: int, **options: Any
) -> tuple[Tensor, list[float]]:
    """How far the weight moves; the losses before each step, and after the last."""
    p = torch.nn.Parameter(start.clone())
    optimizer = Automagic([p], lr=LR, optim_bits=bits, min_8bit_size=MIN_8BIT_SIZE, backend=backend, **options)
    losses = []
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (p - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    end = p.detach()
    return end - start, [*losses, (end - target).square().mean().item()]
