"""Warnings that say a thing once in a process."""

from __future__ import annotations

import warnings

_said: set[str] = set()


def warn_once(message: str, stacklevel: int = 3) -> None:
    """A UserWarning the first time this message comes up."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=stacklevel + 1)


def forget() -> None:
    """Say everything again from here on, as a new process would."""
    _said.clear()
