"""The constructors' signatures with every option in them, for help, IDEs and tools that read them (LightningCLI)."""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import Any, get_type_hints

from automagic_bnb.config import AutomagicConfig


def with_options(signature: inspect.Signature, defaults: dict[str, Any]) -> inspect.Signature:
    """A signature whose `**options` is replaced by the fields of `AutomagicConfig`.

    Args:
        defaults: those of a class, where they differ from the config's.
    """
    named = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    taken, hints = {p.name for p in named}, get_type_hints(AutomagicConfig)
    kind = inspect.Parameter.KEYWORD_ONLY
    options = [
        inspect.Parameter(name, kind, default=defaults.get(name, default), annotation=hints[name])
        for name, default in vars(AutomagicConfig()).items()
        if name not in taken
    ]
    return signature.replace(parameters=[*named, *options])


def explicit(init: Any, defaults: dict[str, Any]) -> Any:
    """The same function again, for one class, with a signature that lists the options."""
    bare = FunctionType(init.__code__, init.__globals__, init.__name__, init.__defaults__, init.__closure__)
    bare.__annotations__, bare.__doc__, bare.__qualname__ = init.__annotations__, init.__doc__, init.__qualname__
    bare.__signature__ = with_options(inspect.signature(bare), defaults)  # type: ignore[attr-defined]
    return bare
