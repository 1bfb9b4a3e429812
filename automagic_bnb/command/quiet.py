"""Holds back what bitsandbytes says of an optional package at its import, so that no command opens with it."""

from __future__ import annotations

import logging

LOGGER = "bitsandbytes.backends.cpu.ops"
OPENING = "Failed to load CPU gemm_4bit_forward"

held: list[str] = []
"""What was held back; `doctor` says it."""


class Held(logging.Filter):
    """Takes the one message, and lets all others pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if not text.startswith(OPENING):
            return True
        held.append(text)
        return False


_FILTER = Held()


def hold_import_warnings() -> None:
    """To be called before bitsandbytes is imported."""
    logging.getLogger(LOGGER).addFilter(_FILTER)
