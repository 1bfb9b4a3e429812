"""A hook of mkdocs: anchors as the repository's host makes them, and links from pages to files beside docs/."""

from __future__ import annotations

import posixpath
import re
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")


def slug(text: str, separator: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w -]", "", text.lower()).replace(" ", separator)


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Links that leave docs/ lead to the repository, if the configuration has its `repo_url`; else only words stay."""
    folder = posixpath.dirname(page.file.src_uri)

    def link(match: re.Match[str]) -> str:
        words, target = match.groups()
        path = posixpath.normpath(posixpath.join("docs", folder, target))
        if "://" in target or target.startswith("#") or path.startswith("docs/"):
            return match[0]
        return f"[{words}]({config.repo_url.rstrip('/')}/blob/HEAD/{path})" if config.repo_url else words

    return LINK.sub(link, markdown)
