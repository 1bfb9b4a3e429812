"""`automagic-bnb doctor` where bitsandbytes and Triton are absent or broken, started by `test_doctor`: HOW [options].

HOW is "missing" (neither is installed), "broken" (both are installed, neither can be imported) or "whole".
"""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Any

BLOCKED = ("bitsandbytes", "triton")


class Blocker:
    """Stands in front of every other finder."""

    def __init__(self, how: str) -> None:
        self.how = how

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name in BLOCKED and self.how == "missing":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name in BLOCKED:
            raise ImportError(f"{name} is broken: libcudart.so.13 not found", name=name)


def version_of(name: str, real: Any = metadata.version) -> str:
    if name in BLOCKED:
        raise metadata.PackageNotFoundError(name)
    return real(name)


how = sys.argv.pop(1)
if how != "whole":
    sys.meta_path.insert(0, Blocker(how))  # type: ignore[arg-type]
if how == "missing":
    metadata.version = version_of

from automagic_bnb.command.cli import main  # noqa: E402

sys.exit(main())
