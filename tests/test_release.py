"""What is published: an sdist with everything in it, links that lead somewhere from a package index, one version."""

from __future__ import annotations

import email
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import automagic_bnb

ROOT = Path(__file__).parents[1]
URL = "https://example.org/owner/automagic-bnb"
needs_git = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="this is no checkout that git knows"
)


def release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sdist and wheel, as the script builds them, without a network."""
    pytest.importorskip("build")
    pytest.importorskip("twine", reason="twine is not installed: pip install twine")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, str(ROOT / ".ci" / "release.py"), URL, "--out", str(out), "--no-isolation"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=out)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stdout.count("PASSED") == 2
    return out


@needs_git
def test_the_description_has_absolute_links_only(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
        assert "automagic_bnb/py.typed" in archive.namelist()
    text = metadata.get_payload()
    assert isinstance(text, str)
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert len(targets) > 20
    assert [target for target in targets if not target.startswith(URL)] == []
    assert f"({URL}/raw/v{automagic_bnb.__version__}/docs/images/loss-by-rate.png)" in text
    addresses = dict(entry.split(", ") for entry in metadata.get_all("Project-URL", []))
    assert addresses["Issues"] == f"{URL}/issues"
    assert {"Typing :: Typed", "Programming Language :: Python :: 3.13"} <= set(metadata.get_all("Classifier", []))


@needs_git
def test_the_sdist_is_complete(built: Path) -> None:
    """All that git tracks, and nothing that it does not."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    tracked = {name for name in listed if (ROOT / name).is_file()} - {".gitignore"}
    assert tracked <= names
    added = {name for name in names - tracked if ".egg-info/" not in name}
    assert added <= {"PKG-INFO", "setup.cfg", ".gitignore"}


def test_relative_links_become_absolute_and_others_stay() -> None:
    text = "[a](docs/a.md#b) ![p](docs/p.png) [c](https://c.org/) [d](#use) `[e](f)`[0](g)"
    found = release().absolute(text, URL, "v1")
    assert found.startswith(
        f"[a]({URL}/blob/v1/docs/a.md#b) ![p]({URL}/raw/v1/docs/p.png) [c](https://c.org/) [d](#use)"
    )


def test_the_version_is_the_same_everywhere() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {automagic_bnb.__version__}\n" in citation
    assert release().version() == automagic_bnb.__version__


def test_reports_are_asked_for_doctors_output() -> None:
    for template in ("bug.yml", "result.yml"):
        text = (ROOT / ".github" / "ISSUE_TEMPLATE" / template).read_text(encoding="utf-8")
        assert "automagic-bnb doctor --json" in text


IMPORT_TIME = """
import time
import torch, bitsandbytes, numpy
start = time.perf_counter()
from automagic_bnb import *
print(time.perf_counter() - start)
"""


def test_importing_everything_is_quick(tmp_path: Path) -> None:
    """Beyond torch and bitsandbytes; the least of three, as others may use the machine."""
    pytest.importorskip("bitsandbytes")
    times = [
        float(subprocess.run([sys.executable, "-c", IMPORT_TIME], capture_output=True, text=True, cwd=tmp_path).stdout)
        for _ in range(3)
    ]
    assert min(times) < 0.3
