"""Device functions: numbers of which each thread of a warp holds one.

A block's six statistics come with one load, and so do a tensor's numbers; an exchange between threads then gives one of
them to all. Fetched each for itself, every one would need its address, which the registers cannot hold.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

# Where PTX cannot be written (the interpreter, AMD) the general functions stand in for the fast instructions.
PTX = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") != "1" and torch.version.hip is None)


@triton.jit
def exchange(values, lane):
    """What another thread holds of float32 values, by its number modulo 32, int32 of their shape. PTX only."""
    return tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=f,f,r", [values, lane], tl.float32, True, 1
    )


@triton.jit
def of_lane(values, LANE: tl.constexpr):
    """float32 [32] of which each is what one thread holds; values: float32 [32], one a thread."""
    if PTX:
        return exchange(values, tl.full((32,), LANE, tl.int32))
    else:
        return tl.zeros((32,), tl.float32) + tl.sum(tl.where(tl.arange(0, 32) == LANE, values, 0.0), 0)


@triton.jit
def over_block(x):
    """[256] of [32]: the 8 elements of a thread are what the thread holds."""
    four = tl.join(tl.join(x, x), tl.join(x, x))
    return tl.reshape(tl.join(four, four), (256,))
