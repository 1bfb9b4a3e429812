"""No file of the project names a path or a registry of one machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from readme_texts import ROOT

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
        yield from (
            p
            for p in (ROOT / folder).rglob("*")
            if p.is_file() and p.parent.name != "__pycache__" and p.suffix != ".png"
        )


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
