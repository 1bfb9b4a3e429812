"""Keeping torch.compile out of a step: its tables of tensors and their addresses are nothing that can be traced."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def uncompiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A method that runs as it is written, also when what calls it has been compiled; with `fullgraph=True` an error.

    torch's compiler is imported by the first call: it takes seconds, which an import of this package is not to cost.
    """
    method: Callable[..., Any] | None = None

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal method
        if method is None:
            import torch._dynamo

            method = torch._dynamo.disable(fn)
        return method(*args, **kwargs)

    return call
