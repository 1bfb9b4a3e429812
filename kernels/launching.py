"""Launches without Triton's bookkeeping.

Each call of a kernel binds its arguments, describes every one of them and looks for what was compiled for such: some
70 µs of Python, as often as there are launches in a step. Whoever launches with the same constants again has that done
once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DIRECT = torch.version.hip is None
"""Whether what was compiled is launched by itself; AMD's way has not been tried."""


class Compiled:
    """What was compiled of kernels for one set of compile-time constants, truth values apart."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Any] = {}

    def launch(self, kernel: Any, programs: int, arguments: dict[str, Any], **options: Any) -> None:
        """`kernel[(programs,)](**arguments, **options)` on the current device.

        Args:
            arguments: all of the kernel's, in its order: tensors, always of the same dtypes; floats; whole numbers that
                it does not specialise on; truth values; and other constants, always the same.
            options: of the compiler, always of the same names.
        """
        tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
        if not (DIRECT and tensors[0].is_cuda):
            kernel[(programs,)](**arguments, **options)
            return
        # Of a tensor Triton's compiler knows, beside the dtype, whether its address is a multiple of 16.
        told = [x for x in arguments.values() if isinstance(x, bool)]
        key = (kernel, tensors[0].device, *options.values(), *told, *[x.data_ptr() % 16 == 0 for x in tensors])
        if key in self._known:
            self._known[key][(programs, 1, 1)](*arguments.values())
            return
        assert list(arguments) == kernel.arg_names, "arguments in the kernel's order"
        compiled = kernel[(programs,)](**arguments, **options)
        if compiled is not None:  # some hook of Triton's kept it from compiling
            self._known[key] = compiled
