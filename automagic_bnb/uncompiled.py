"""What would make a graph of a step: torch.compile, which is kept out, and CUDA graphs, which are told.

A step's tables of tensors and their addresses are nothing that can be traced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def capturing() -> bool:
    """Whether the current stream's work goes into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


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
