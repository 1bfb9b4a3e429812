"""A progress bar for whoever waits at a terminal, and nothing in a log or a pipe."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
WIDTH = 24
INTERVAL = 0.1
"""Seconds between two looks of a bar: a terminal is slower than a loop."""


def progress(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """The items, one by one; a terminal's stderr shows how many are done.

    Args:
        total: how many there are, where `items` does not know.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    bar = Bar(title, total)
    for done, item in enumerate(items):
        bar.show(done)
        yield item
    bar.clear()


class Bar:
    """What a terminal's stderr shows of something that takes a while; elsewhere nothing."""

    def __init__(self, title: str, total: int | None, unit: str = "", scale: float = 1) -> None:
        """`scale` turns what is counted into the unit."""
        self._title, self._total, self._unit, self._scale = title, total, unit, scale
        self._shown, self._last = sys.stderr.isatty(), -INTERVAL

    def show(self, done: int) -> None:
        """So much is done now."""
        if not self._shown or time.monotonic() - self._last < INTERVAL:
            return
        self._last = time.monotonic()
        count = f"{done * self._scale:.0f}"
        bar = ""
        if self._total:
            full = WIDTH * min(done, self._total) // self._total
            bar = f"[{'#' * full}{'.' * (WIDTH - full)}] "
            count += f"/{self._total * self._scale:.0f}"
        sys.stderr.write(f"\r\x1b[K{self._title} {bar}{count}{self._unit}")
        sys.stderr.flush()

    def clear(self) -> None:
        """What follows takes the bar's line."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")


class WatchedFile(io.FileIO):
    """A file open for reading, of which a bar shows how much has been read."""

    def __init__(self, path: Path, title: str) -> None:
        super().__init__(path)
        self._done, self._bar = 0, Bar(title, os.fstat(self.fileno()).st_size, " MB", 1e-6)

    def readinto(self, buffer: Any) -> int:
        return self._count(super().readinto(buffer) or 0)

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(-1 if size is None else size) or b""
        self._count(len(data))
        return data

    def close(self) -> None:
        if not self.closed:
            self._bar.clear()
        super().close()

    def _count(self, read: int) -> int:
        self._done += read
        self._bar.show(self._done)
        return read
