"""What is shipped, what importing it does, and life without bitsandbytes and Triton."""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import automagic_bnb
from automagic_bnb import Automagic8bit, Automagic32bit

ROOT = Path(__file__).parents[1]
ROOMS = ("automagic_bnb", "automagic_bnb/command", "automagic_bnb/cpu", "automagic_bnb/trainers", "automagic_bnb/watch")
"""The folders of Python code that pyproject.toml lists by name, beside `kernels`."""


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed; errors are shown."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


# --------------------------------------------------------------------------------------------------- wheel and sdist


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel built from it: offline, in a copy of the sources."""
    pytest.importorskip("build")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for name in ("automagic_bnb", "kernels", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source), cwd=out)
    return out


def modules_of(folder: str) -> set[str]:
    return {path.name for path in (ROOT / folder).glob("*.py")}


def package_files() -> set[str]:
    """Every module, where it must lie once installed."""
    package = {f"{room}/{name}" for room in ROOMS for name in modules_of(room)}
    return package | {f"automagic_bnb/kernels/{name}" for name in modules_of("kernels")} | {"automagic_bnb/py.typed"}


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    """`kernels` is Hugging Face's name at the top level: ours lies inside the package."""
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = f"automagic_bnb-{automagic_bnb.__version__}.dist-info"
    files = {name for name in names if not name.startswith(metadata)}
    assert files == package_files()
    assert {"automagic_bnb/kernels/__init__.py", "automagic_bnb/kernels/step.py"} <= files
    assert names - files >= {f"{metadata}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "top_level.txt")}
    assert zipfile.ZipFile(wheel).read(f"{metadata}/top_level.txt").decode().split() == ["automagic_bnb"]


def test_no_source_folder_has_other_subfolders() -> None:
    """The list of packages in pyproject.toml is complete as long as these are all."""
    for folder in (*ROOMS, "kernels"):
        held = {f"{folder}/{p.name}" for p in (ROOT / folder).iterdir() if p.is_dir() and p.name != "__pycache__"}
        assert held <= set(ROOMS)


def test_the_wheel_says_what_it_needs(built: Path) -> None:
    """Name, version, Python, the pinned bitsandbytes, the command."""
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        prefix = f"automagic_bnb-{automagic_bnb.__version__}.dist-info"
        metadata = email.message_from_bytes(archive.read(f"{prefix}/METADATA"))
        entries = archive.read(f"{prefix}/entry_points.txt").decode()
    needs = [line.replace(" ", "") for line in metadata.get_all("Requires-Dist", []) if "extra" not in line]
    assert metadata["Name"] == "automagic-bnb"
    assert metadata["Version"] == automagic_bnb.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert any(line.startswith("bitsandbytes") and ">=0.45.5" in line and "<0.52" in line for line in needs)
    assert any(line.startswith("torch>=2.4") for line in needs)
    assert not any(line.startswith("triton") for line in needs)  # torch brings it; another would exchange torch
    assert "automagic-bnb = automagic_bnb.command.start:main" in entries


def test_the_sdist_builds_without_the_checkout(built: Path) -> None:
    """It holds the sources in their own places (the wheel above was built from it)."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {f"{folder}/{name}" for folder in (*ROOMS, "kernels") for name in modules_of(folder)}
    assert expected | {"pyproject.toml"} <= names
    python = {name for name in names if name.endswith(".py") and not name.startswith("tests/")}
    assert python <= expected | {"setup.py"}


IMPORT_WHEEL = """
import importlib.util, sys
sys.path.insert(0, sys.argv[1])
sys.path[:] = [p for p in sys.path if p]
sys.modules["bitsandbytes"] = None
spec = importlib.util.find_spec("automagic_bnb.kernels.step")
print(spec.origin)
kernels = importlib.util.find_spec("kernels")
print(kernels and kernels.origin)
"""


def interpreter(minor: int) -> str | None:
    """Python 3.minor, where the machine has one: on the path, or of pyenv's."""
    of_pyenv = sorted((Path.home() / ".pyenv" / "versions").glob(f"3.{minor}.*/bin/python3"))
    for found in filter(None, [shutil.which(f"python3.{minor}"), *map(str, of_pyenv)]):
        said = subprocess.run([found, "-c", "import sys; print(sys.version_info[1])"], capture_output=True, text=True)
        if said.stdout.strip() == str(minor):  # what pyenv puts on the path may start nothing
            return found
    return None


@pytest.mark.parametrize("minor", range(10, 15))
def test_every_python_reads_it_and_answers(minor: int, built: Path, tmp_path: Path) -> None:
    """Without torch or anything else: no syntax that it lacks or warns of, and version and help of every command."""
    python = interpreter(minor)
    if python is None:
        pytest.skip(f"no Python 3.{minor} on this machine")
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    run(python, "-W", "error", "-m", "compileall", "-q", str(tmp_path / "site"), cwd=tmp_path)
    bare = {"PYTHONPATH": str(tmp_path / "site"), "PYTHONNOUSERSITE": "1"}
    assert automagic_bnb.__version__ in run(python, "-m", "automagic_bnb", "--version", cwd=tmp_path, **bare)
    for command in ("demo", "doctor", "dashboard", "run", "inspect"):
        assert "usage" in run(python, "-m", "automagic_bnb", command, "--help", cwd=tmp_path, **bare)


def test_uv_installs_it(built: Path, tmp_path: Path) -> None:
    """The wheel, into an empty environment, from which the command answers."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if uv is None:
        pytest.skip("uv is not installed: pip install uv")
    (wheel,) = built.glob("*.whl")
    run(uv, "venv", "--offline", "--python", sys.executable, str(tmp_path / "venv"), cwd=tmp_path)
    (scripts,) = (path for path in (tmp_path / "venv" / name for name in ("bin", "Scripts")) if path.exists())
    python = str(scripts / "python")
    run(uv, "pip", "install", "--offline", "--no-deps", "--python", python, str(wheel), cwd=tmp_path)
    assert automagic_bnb.__version__ in run(str(scripts / "automagic-bnb"), "--version", cwd=tmp_path)


def test_an_installed_wheel_exposes_no_kernels(built: Path, tmp_path: Path) -> None:
    """Its modules are found under the package's name only, outside any checkout."""
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    inside, outside = run(sys.executable, "-c", IMPORT_WHEEL, str(tmp_path), cwd=tmp_path).split()
    assert Path(inside) == tmp_path / "automagic_bnb" / "kernels" / "step.py"
    assert outside == "None" or not Path(outside).is_relative_to(ROOT)


# --------------------------------------------------------------------------------------------------------------- import

IMPORT_QUIETLY = """
import json, logging, sys, warnings
import torch, bitsandbytes
modules, state, handlers = set(sys.modules), torch.get_rng_state(), list(logging.getLogger().handlers)
threads, mode = torch.get_num_threads(), torch.is_grad_enabled()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from automagic_bnb import *
ours = [m for m in set(sys.modules) - modules if m.split(".")[0] not in sys.stdlib_module_names]
print(json.dumps({
    "modules": sorted(ours),
    "warnings": [str(w.message) for w in caught],
    "random state kept": torch.equal(state, torch.get_rng_state()),
    "cuda": torch.cuda.is_initialized(),
    "logging": list(logging.getLogger().handlers) == handlers and not logging.getLogger("automagic_bnb").handlers,
    "torch": (torch.get_num_threads(), torch.is_grad_enabled()) == (threads, mode),
    "kernels": sys.modules.get("kernels") is None,
}))
"""


def test_importing_has_no_side_effect(tmp_path: Path) -> None:
    """Beyond importing torch and bitsandbytes: no warning, no output, no CUDA, no Triton module of ours, no demo."""
    seen = json.loads(run(sys.executable, "-c", IMPORT_QUIETLY, cwd=tmp_path))
    modules = seen.pop("modules")
    assert seen == {
        "warnings": [],
        "random state kept": True,
        "cuda": False,
        "logging": True,
        "torch": True,
        "kernels": True,
    }
    assert {name.split(".")[0] for name in modules} <= {"automagic_bnb"} | {m for m in modules if "editable" in m}
    heavy = ("automagic_bnb.kernels", "automagic_bnb.command.demo", "automagic_bnb.command.cli")
    assert not [name for name in modules if name.startswith(heavy)]


# ------------------------------------------------------------------------------------- without bitsandbytes and Triton


@pytest.fixture(scope="module", params=["missing", "broken"])
def bare(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process without bitsandbytes and Triton has seen: see `bare_process`."""
    out = tmp_path_factory.mktemp("bare")
    model = nn.Linear(64, 64)
    opt = Automagic8bit(model.parameters(), lr=1e-3)
    model(torch.ones(64)).sum().backward()
    opt.step()
    torch.save(opt.state_dict(), out / "8bit.pt")
    script = Path(__file__).with_name("bare_process.py")
    run(sys.executable, str(script), request.param, str(out / "8bit.pt"), str(out / "seen.json"), cwd=out)
    return {"how": request.param, **json.loads((out / "seen.json").read_text(encoding="utf-8"))}


def test_the_import_works_and_is_silent(bare: dict[str, Any]) -> None:
    """Whether bitsandbytes is not installed or fails with another error than ImportError."""
    assert bare["available"] is False
    assert bare["import warnings"] == []
    assert bare["random state kept"]
    assert bare["modules"] == []
    assert bare["kernels"] == "None" or not Path(bare["kernels"]).is_relative_to(ROOT)


def test_one_warning_says_how_to_get_8_bits(bare: dict[str, Any]) -> None:
    """With the command that installs it; the second optimizer says nothing."""
    (warning,) = bare["first warnings"]
    assert "32 bits" in warning
    assert 'pip install "bitsandbytes>=0.45.5,<0.52"' in warning
    assert bare["later warnings"] == bare["training warnings"] == []


def test_32bit_training_is_the_same(bare: dict[str, Any]) -> None:
    """The numbers of `Automagic32bit` beside bitsandbytes, from every class."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    opt = Automagic32bit(model.parameters(), lr=3e-3)
    losses = []
    for step in range(20):
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
        opt.zero_grad()
        loss = (model(x) - x.flip(1)).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert bare["dtypes"] == ["torch.float32"]
    for name in ("losses", "Automagic", "Automagic32bit", "PagedAutomagic8bit", "PagedAutomagic32bit"):
        assert bare[name] == losses, name


def test_copies_pickles_and_checkpoints_work(bare: dict[str, Any]) -> None:
    """Each goes on with the very losses of the original."""
    assert all(losses == bare["copies"][0] for losses in bare["copies"])
    assert len(set(bare["copies"][0])) == 5


def test_what_needs_bitsandbytes_says_so(bare: dict[str, Any]) -> None:
    """force_8bit and an 8-bit checkpoint are errors; the optimizer goes on afterwards."""
    cause = "No module named 'bitsandbytes'" if bare["how"] == "missing" else "CUDA Setup failed"
    assert bare["forced"].startswith("ValueError: option force_8bit=True: needs bitsandbytes")
    assert cause in bare["forced"]
    assert bare["8-bit checkpoint"].startswith("ValueError: parameter 0: the checkpoint's state is in 8 bits")
    assert "pip install" in bare["8-bit checkpoint"]
    assert len(bare["after"]) == 2


def test_what_needs_triton_says_so(bare: dict[str, Any]) -> None:
    """backend="triton" names the cause and the way out; by default nothing needs Triton."""
    assert bare["triton"].startswith("RuntimeError: option backend='triton': Triton could not be imported")
    assert "backend='torch'" in bare["triton"]
