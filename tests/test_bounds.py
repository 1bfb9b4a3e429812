"""What `.ci/bounds` said last, of the oldest and newest packages, is what the metadata claims."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = {path.stem.removeprefix("bounds-"): path.read_text("utf-8") for path in (ROOT / ".ci").glob("bounds-*.txt")}
METADATA = (ROOT / "pyproject.toml").read_text("utf-8")


@pytest.mark.parametrize("name", sorted(RESULTS))
def test_all_passed_on_the_python_that_its_name_says(name: str) -> None:
    which, python = name.split("-")
    *packages, summary = RESULTS[name].splitlines()
    assert packages[0].startswith(f"Python {python}.")
    assert re.fullmatch(r"\d{3,} passed(, \d+ skipped)? in .*", summary)
    if which == "oldest":
        versions = dict(line.split() for line in packages[1:])
        for name, least in re.findall(r'^    "(torch|numpy|bitsandbytes)>=([\d.]+)', METADATA, re.M):
            assert versions[name].startswith(least)


def test_the_classifiers_name_the_pythons_that_were_run() -> None:
    claimed = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', METADATA)
    assert claimed == sorted({name.split("-")[1] for name in RESULTS}, key=lambda x: int(x[2:]))
