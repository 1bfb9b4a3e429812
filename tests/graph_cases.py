"""A CUDA graph where there is no GPU: what a step launches is recorded, and done again without the optimizer.

As in a real one, only launches and torch's own operations are repeated, on the very tensors that they were given; what
the host worked out stands still. Unlike a real one, recording is also the first run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

HOST_ONLY = ("item", "_local_scalar_dense", "is_pinned")


class _Recorder(TorchDispatchMode):
    def __init__(self, tape: list[Callable[[], Any]]) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if name in HOST_ONLY:
            raise RuntimeError(f"a capture cannot wait for the device: {name}")
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        if writes:
            self.tape.append(lambda: func(*args, **kwargs))
        elif isinstance(out, torch.Tensor) and not name.startswith(("empty", "detach")) and not _is_view(func):
            self.tape.append(lambda: out.copy_(func(*args, **kwargs)))
        return out


def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


class Graph:
    """What was recorded."""

    def __init__(self) -> None:
        self.tape: list[Callable[[], Any]] = []

    def replay(self) -> None:
        for work in self.tape:
            work()


@contextmanager
def capture(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graph]:
    """Record what is launched inside; meanwhile torch says that a graph is being captured."""
    graph, launch, running = Graph(), interpreter.GridExecutor.__call__, []

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not running:
            graph.tape.append(lambda: launch(self, *args, **kwargs))
        running.append(True)
        with torch._C._DisableTorchDispatch():  # the interpreter's own copies are no part of the graph
            result = launch(self, *args, **kwargs)
        running.pop()
        return result

    with monkeypatch.context() as patch, _Recorder(graph.tape):
        patch.setattr(interpreter.GridExecutor, "__call__", record)
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        yield graph
