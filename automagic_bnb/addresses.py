"""Whether tensors still lie where they were seen: `t.data = …` moves one without a trace in the tensor."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_equal: Callable[[list[Any], list[int], list[int]], bool] | None = getattr(
    torch._C, "_tensors_data_ptrs_at_indices_equal", None
)
"""torch's comparison of many addresses in one call, which builds without CUDA lack."""


class Places:
    """Tensors, and the addresses at which they are expected.

    Attributes:
        tensors: as they were given.
        addresses: of each, an int.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.addresses = list(map(Tensor.data_ptr, tensors))
        self._indices = list(range(len(tensors)))

    def are_current(self) -> bool:
        """Whether each still lies at its address, seen in one pass in C."""
        if _equal is not None:
            return _equal(self.tensors, self.addresses, self._indices)
        return all(map(operator.eq, map(Tensor.data_ptr, self.tensors), self.addresses))
