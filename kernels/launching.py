"""Launches without Triton's bookkeeping.

Each call of a kernel binds its arguments, describes every one of them and looks for what was compiled for such: some
70 µs of Python, as often as there are launches in a step. Whoever launches with the same constants again has that done
once; and whoever launches with the very same tensors has the launches themselves repeated.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DIRECT = torch.version.hip is None
"""Whether what was compiled is launched by itself; AMD's way has not been tried."""


def is_direct(device: torch.device) -> bool:
    """Whether it is on this device; the interpreter compiles nothing."""
    return DIRECT and device.type == "cuda"


Again = tuple[Callable[..., Any], list[Any]]
"""What launches a kernel for the same constants on the same device, and the arguments that it was launched with: of
tensors, the addresses."""


class Compiled:
    """What was compiled of kernels for one set of compile-time constants, truth values apart."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Callable[..., None]] = {}
        self._kinds: dict[Any, tuple[list[int], list[int]]] = {}
        """By kernel, which of its arguments are tensors, and which truth values."""

    def launch(self, kernel: Any, programs: int, arguments: dict[str, Any], **options: Any) -> Again:
        """`kernel[(programs,)](**arguments, **options)` on the current device; returns what does it again.

        Args:
            arguments: all of the kernel's, in its order: tensors, always of the same dtypes; floats; whole numbers that
                it does not specialise on; truth values; and other constants, always the same.
            options: of the compiler, always of the same names.
        """
        again = self._launch(kernel, programs, arguments, options)
        if _noting.tape is not None:
            _noting.tape.append((again, arguments))
        return again

    def _launch(self, kernel: Any, programs: int, arguments: dict[str, Any], options: dict[str, Any]) -> Again:
        values, name = list(arguments.values()), kernel.fn  # of Triton's own objects the hash is slow
        if name not in self._kinds:
            tensors, told = ([i for i, x in enumerate(values) if isinstance(x, kind)] for kind in (Tensor, bool))
            self._kinds[name] = tensors, told
        tensors, told = self._kinds[name]
        device = values[tensors[0]].device
        if not is_direct(device):
            by_triton = functools.partial(kernel[(programs,)], **options)
            by_triton(*values)
            return by_triton, values
        for i in tensors:  # the launch then need not ask for it
            values[i] = values[i].data_ptr()
        # Of a tensor Triton's compiler knows, beside the dtype, whether its address is a multiple of 16.
        aligned = [values[i] % 16 == 0 for i in tensors]
        key = (name, programs, device, *options.values(), *[values[i] for i in told], *aligned)
        if key in self._known:
            self._known[key](*values)
            return self._known[key], values
        assert list(arguments) == kernel.arg_names, "arguments in the kernel's order"
        by_triton = functools.partial(kernel[(programs,)], **options)
        compiled = by_triton(**arguments)
        if compiled is None:  # some hook of Triton's kept it from compiling
            return by_triton, list(arguments.values())
        self._known[key] = compiled[(programs, 1, 1)]
        return self._known[key], values


class _Noting(threading.local):
    tape: list[tuple[Again, dict[str, Any]]] | None = None


_noting = _Noting()
"""Where this thread's launches are noted, each with what it works on."""


class Repeated:
    """Launches on the very same tensors, time after time."""

    def __init__(self) -> None:
        self._noted: tuple[Any, list[Any]] | None = None
        """The key, and the launches."""

    def do(self, key: Any, work: Callable[[], Any]) -> None:
        """Do what does nothing but `Compiled.launch`; as long as the key stays equal its launches alone are done again.

        They are of the tensors of the first time, which are kept: so is scratch memory that `work` asked for.
        """
        if self._noted is not None and self._noted[0] == key:
            for (launch, values), _ in self._noted[1]:
                launch(*values)
            return
        self._noted, _noting.tape = None, []
        try:
            work()
            self._noted = key, _noting.tape
        finally:
            _noting.tape = None
