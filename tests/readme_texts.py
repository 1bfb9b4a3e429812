"""The manuals, in English and in Traditional Chinese, and their parts; the files that they are compared with.

A manual is a README and the pages beside it, one after the other, with the pages' headings one level down: then a page
is a section of the manual.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = (
    "install",
    "trainers",
    "options",
    "presets",
    "learning-rate",
    "memory",
    "watching",
    "hardware",
    "migration",
    "troubleshooting",
    "checkpoints",
    "rule",
    "limits",
)
"""The pages that are in both languages."""
FILES = {
    "README.md": ["README.md", *(f"docs/{name}.md" for name in NAMES)],
    "README.zh-TW.md": ["README.zh-TW.md", *(f"docs/zh-TW/{name}.md" for name in NAMES)],
}
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for names in FILES.values() for name in names}


def lowered(text: str) -> str:
    """With every heading one level down; a line of code may begin as a heading does."""
    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else re.sub(r"^#", "##", part, flags=re.MULTILINE) for part in parts)


def manual(readme: str) -> str:
    first, *pages = FILES[readme]
    return "\n".join([TEXTS[first], *(lowered(TEXTS[page]) for page in pages)])


README = manual("README.md")
CHINESE = manual("README.zh-TW.md")
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
