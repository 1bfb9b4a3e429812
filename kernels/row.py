"""What a step says of a single tensor, on its way to the device as a launch's arguments.

The driver copies them when it launches. Pinned memory for an upload has to be asked for anew each time, as nobody knows
how far the device has come with what was there before; for a thousand tensors that are stepped one by one, a thousand
times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from automagic_bnb.kernels.launching import Compiled

WORDS = 18
_NAMES = [f"w{i}" for i in range(WORDS)]


@triton.jit(do_not_specialize=_NAMES)
def row_kernel(row_ptr, w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15, w16, w17):
    """int32 [WORDS] out."""
    tl.store(row_ptr, w0)
    tl.store(row_ptr + 1, w1)
    tl.store(row_ptr + 2, w2)
    tl.store(row_ptr + 3, w3)
    tl.store(row_ptr + 4, w4)
    tl.store(row_ptr + 5, w5)
    tl.store(row_ptr + 6, w6)
    tl.store(row_ptr + 7, w7)
    tl.store(row_ptr + 8, w8)
    tl.store(row_ptr + 9, w9)
    tl.store(row_ptr + 10, w10)
    tl.store(row_ptr + 11, w11)
    tl.store(row_ptr + 12, w12)
    tl.store(row_ptr + 13, w13)
    tl.store(row_ptr + 14, w14)
    tl.store(row_ptr + 15, w15)
    tl.store(row_ptr + 16, w16)
    tl.store(row_ptr + 17, w17)


_compiled = Compiled()


class Row:
    """Memory on a device for `WORDS` words, `there`, int32."""

    def __init__(self, device: torch.device) -> None:
        self.there = torch.empty(WORDS, dtype=torch.int32, device=device)
        self._again: Callable[..., Any] | None = None

    def write(self, words: Sequence[int]) -> None:
        """Put these signed words there, by a launch on the current device; nothing waits."""
        if self._again is None:
            arguments = {"row_ptr": self.there, **dict(zip(_NAMES, words, strict=True))}
            self._again, (self._place, *_) = _compiled.launch(row_kernel, 1, arguments, num_warps=1)
        else:
            self._again(self._place, *words)


def signed(word: int) -> int:
    """The int32 with the bits of this uint32."""
    return (word ^ 0x80000000) - 0x80000000
