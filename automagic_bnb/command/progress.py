"""A progress bar for whoever waits at a terminal, and nothing in a log or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")
WIDTH = 24


def progress(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """The items, one by one; a terminal's stderr shows how many are done.

    Args:
        total: how many there are, where `items` does not know.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    shown = sys.stderr.isatty()
    for done, item in enumerate(items):
        if shown:
            _draw(title, done, total)
        yield item
    if shown:
        sys.stderr.write("\r\x1b[K")  # what follows takes the bar's line


def _draw(title: str, done: int, total: int | None) -> None:
    if total:
        full = WIDTH * done // total
        sys.stderr.write(f"\r\x1b[K{title} [{'#' * full}{'.' * (WIDTH - full)}] {done}/{total}")
    else:
        sys.stderr.write(f"\r\x1b[K{title} {done}")
    sys.stderr.flush()
