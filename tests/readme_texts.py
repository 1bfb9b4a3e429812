"""The READMEs, in English and in Traditional Chinese, and their parts; the files that they are compared with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
