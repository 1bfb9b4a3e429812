"""Tensors in CUDA's managed memory, which the driver moves between the GPU and the host as room requires.

bitsandbytes has such tensors too, but hands them out as CPU tensors and never gives their memory back; here they are
CUDA tensors, freed like any other.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_HOST, _ATTACH_GLOBAL, _CONCURRENT_ACCESS, _OUT_OF_MEMORY = -1, 1, 89, 2
"""CU_DEVICE_CPU, CU_MEM_ATTACH_GLOBAL, CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS and CUDA_ERROR_OUT_OF_MEMORY of
the driver's interface."""
_held: set[int] = set()
"""The addresses of all that is held. A mark on the tensor would be copied along to tensors in ordinary memory."""


class _Managed:
    """Owner of managed memory; torch reads `__cuda_array_interface__` and keeps the owner alive."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


def empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous CUDA tensor in managed memory.

    Raises:
        torch.cuda.OutOfMemoryError: neither the GPU nor the host has room.
    """
    size = math.prod(shape) * dtype.itemsize
    pointer = ctypes.c_uint64()
    with torch.cuda.device(device):
        torch.cuda.mem_get_info(device)  # makes the device's context this thread's, on which the driver's calls rest
        status = _driver().cuMemAllocManaged(
            ctypes.byref(pointer), ctypes.c_size_t(size), ctypes.c_uint(_ATTACH_GLOBAL)
        )
        if status == _OUT_OF_MEMORY:
            raise torch.cuda.OutOfMemoryError(f"no managed memory left for {size:,} bytes of paged optimizer state")
        _check(status)
        address = pointer.value
        owner = _Managed(address, size)
        _held.add(address)
        weakref.finalize(owner, _free, address, device).atexit = False  # at the end the driver takes everything back
        tensor = torch.as_tensor(owner, device=device)
        assert tensor.data_ptr() == address, "torch has copied what it was to take as it is"
    return tensor.view(dtype).view(shape)


def exists_on(device: torch.device) -> bool:
    """Whether a device has managed memory that is had in this way: NVIDIA's."""
    return device.type == "cuda" and torch.version.hip is None


def is_paged(tensor: Any) -> bool:
    """Whether a tensor came from `empty`; one copied from such a tensor lies in ordinary memory."""
    return isinstance(tensor, Tensor) and tensor.is_cuda and tensor.data_ptr() in _held


def prefetch(tensors: Iterable[Tensor], stream: torch.cuda.Stream, to_host: bool = False) -> None:
    """Start moving paged tensors to their device, or (to see what that costs) to the host; nothing waits for it.

    Where the driver cannot (Windows, GPUs before Pascal), they come when they are first used.

    Args:
        stream: of the tensors' device.
    """
    for tensor in tensors:
        if not _moves_on_request(tensor.device.index):
            continue
        with torch.cuda.device(tensor.device):  # the default stream's number is that of the current device's
            _check(_driver().cuMemPrefetchAsync(
                ctypes.c_uint64(tensor.data_ptr()),
                ctypes.c_size_t(tensor.nbytes),
                ctypes.c_int(_HOST if to_host else tensor.device.index),
                ctypes.c_void_p(stream.cuda_stream),
            ))  # fmt: skip


def _free(address: int, device: torch.device) -> None:
    _held.discard(address)
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # kernels may still be at work on it
        _check(_driver().cuMemFree_v2(ctypes.c_uint64(address)))


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


@functools.cache
def _moves_on_request(device: int) -> bool:
    value = ctypes.c_int()
    _check(_driver().cuDeviceGetAttribute(ctypes.byref(value), ctypes.c_int(_CONCURRENT_ACCESS), ctypes.c_int(device)))
    return bool(value.value)


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"the CUDA driver reports error {status} for paged optimizer state")
