"""Choice of a profile by the GPU's memory and compute capability."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from automagic_bnb import config
from automagic_bnb.config import AutomagicConfig, OptimizationProfiles

EIGHT_BITS_OFF = 99_999_999
"""A `min_8bit_size` that only a parameter of a hundred million elements reaches."""
MAX_CAPABILITY = 20
"""A larger major number is one written without its point."""
ASSUMED_CAPABILITY = (7, 0)
"""Of a GPU of which only the memory is told."""


@dataclass(frozen=True)
class Gpu:
    """What the choice goes by."""

    memory_gb: float
    """In units of 1024³ bytes, as the driver reports it: a little less than the number on the box."""
    capability: tuple[int, int]


def get_adaptive_config(
    device: int | str | torch.device | None = None, *, memory_gb: float | None = None, capability: Any = None
) -> AutomagicConfig:
    """A profile by the GPU's memory: below 8 GB `memory_optimized`, below 16 `balanced`, else `quality_optimized`.

    GB here are 1024³ bytes as the driver reports them, which is a little less than the number a card is sold by: an
    "8 GB" card reports 7.6 to 8.0 and gets `memory_optimized`, a "16 GB" card gets `balanced`. To plan for such a card,
    pass what it reports (`memory_gb=7.7`); `memory_gb=8` means 8 in full.

    Without a GPU: `memory_optimized` with 8-bit storage off (`min_8bit_size=99999999`), so that no moment is in codes.

    Args:
        device: index, name or torch.device; the current CUDA device if there is one, else the CPU. Any device other
            than CUDA's counts as no GPU.
        memory_gb: plan for a GPU with this memory. Without `device` the machine at hand plays no part.
        capability: compute capability, as 7.5, "7.5" or (7, 5). Checked; this choice goes by memory alone.

    Returns:
        A new config, free to be edited: `Automagic8bit(params, **config.__dict__)`.

    Raises:
        TypeError, ValueError: a device that is not here, or a number that is none or out of range.
    """
    gpu = find_gpu(device, memory_gb, capability)
    if gpu is None:
        return without_gpu()
    if gpu.memory_gb < 8:
        return OptimizationProfiles.memory_optimized()
    return OptimizationProfiles.balanced() if gpu.memory_gb < 16 else OptimizationProfiles.quality_optimized()


def get_hardware_optimized_config(
    device: int | str | torch.device | None = None, *, memory_gb: float | None = None, capability: Any = None
) -> AutomagicConfig:
    """A profile and a `min_8bit_size` by the GPU's memory and compute capability.

    | GPU | profile | `min_8bit_size` |
    |---|---|---|
    | capability below 7.0, or below 6 GB | `memory_optimized` | 2048 |
    | below 12 GB | `balanced` | 4096 |
    | else | `quality_optimized` | 8192 |
    | none | `memory_optimized` | 99999999: 8-bit storage is off |

    GB, arguments, result and errors are those of `get_adaptive_config`: a "6 GB" card reports less than 6, a "12 GB"
    card less than 12. Where only `memory_gb` is given, the capability counts as 7.0 or above.
    """
    gpu = find_gpu(device, memory_gb, capability)
    if gpu is None:
        return without_gpu()
    if gpu.capability < (7, 0) or gpu.memory_gb < 6:
        config, smallest = OptimizationProfiles.memory_optimized(), 2048
    elif gpu.memory_gb < 12:
        config, smallest = OptimizationProfiles.balanced(), 4096
    else:
        config, smallest = OptimizationProfiles.quality_optimized(), 8192
    config.min_8bit_size = smallest
    return config


def without_gpu() -> AutomagicConfig:
    """`memory_optimized` with 8-bit storage off."""
    config = OptimizationProfiles.memory_optimized()
    config.min_8bit_size = EIGHT_BITS_OFF
    return config


def find_gpu(device: Any, memory_gb: Any, capability: Any) -> Gpu | None:
    """The GPU that the arguments of `get_adaptive_config` describe; None for no GPU.

    Raises:
        TypeError, ValueError: as there.
    """
    memory = None if memory_gb is None else _checked_memory(memory_gb)
    version = None if capability is None else _checked_capability(capability)
    if device is None and memory is not None:
        return Gpu(memory, version or ASSUMED_CAPABILITY)
    index = _cuda_index(device)
    if index is None:
        if memory is not None or version is not None:
            raise ValueError(
                f"memory_gb={memory_gb!r}, capability={capability!r} describe a GPU, but "
                + ("there is none here; pass memory_gb too" if device is None else f"device={device!r} is not one")
            )
        return None
    found = torch.cuda.get_device_properties(index)
    return Gpu(memory or found.total_memory / 2**30, version or (found.major, found.minor))


def _checked_memory(value: Any) -> float:
    legal = "must be a finite number above 0, in units of 1024³ bytes, such as 8 or 7.7"
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"memory_gb={value!r}: {legal}") from None
    if isinstance(value, bool):
        raise TypeError(f"memory_gb={value!r}: {legal}")
    if not 0 < number < math.inf:
        raise ValueError(f"memory_gb={value!r}: {legal}")
    return number


def _checked_capability(value: Any) -> tuple[int, int]:
    legal = 'must be a compute capability such as 7.5, "7.5" or (7, 5)'
    if not (config.is_number(value) or isinstance(value, (str, tuple, list))):
        raise TypeError(f"capability={value!r}: {legal}")
    text = ".".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value).strip()
    found = re.fullmatch(r"(\d{1,2})(?:\.(\d))?", text, re.ASCII)
    if found is None or (isinstance(value, (tuple, list)) and len(value) != 2):
        raise ValueError(f"capability={value!r}: {legal}")
    if int(found[1]) > MAX_CAPABILITY:  # sm_86 is 8.6
        raise ValueError(f"capability={value!r}: {legal}; for sm_{found[1]} write {found[1][0]}.{found[1][1:]}")
    return int(found[1]), int(found[2] or 0)


def _cuda_index(device: Any) -> int | None:
    """The index of the CUDA device meant, None for any other device; `device` may be None."""
    available = torch.cuda.is_available()
    if device is None:
        return torch.cuda.current_device() if available else None
    if not (config.is_whole(device) or isinstance(device, (str, torch.device))):
        raise TypeError(f"device={device!r}: must be an index, a name such as 'cuda:0' or 'cpu', or a torch.device")
    if not isinstance(device, int):
        try:
            found = torch.device(device)
        except RuntimeError:
            raise ValueError(f"device={device!r}: torch knows no such device; use 'cuda', 'cuda:0' or 'cpu'") from None
        if found.type != "cuda":
            return None
        device = found.index
    if not available:
        raise ValueError("device is CUDA's, and torch finds no CUDA device here; to plan for one, pass memory_gb alone")
    index = torch.cuda.current_device() if device is None else device
    if not 0 <= index < torch.cuda.device_count():
        raise ValueError(f"device={device!r}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return index
