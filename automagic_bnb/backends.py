"""What a parameter is stepped by: the Triton kernels, where they run, or what is not theirs."""

from __future__ import annotations

import os
import re

import torch
from torch import Tensor

from automagic_bnb.notices import warn_once

OLDEST_TRITON = (3, 3)
NOT_OURS = ("torch", "numba")
"""The backends of which the kernels have nothing: every parameter is stepped by itself."""


def triton_missing() -> str:
    """Why Triton cannot be used here, or the empty string."""
    try:
        import triton
    except ImportError as e:
        return f"Triton could not be imported ({e})"
    found = re.match(r"(\d+)\.(\d+)", triton.__version__)
    if found and (int(found[1]), int(found[2])) < OLDEST_TRITON:
        return f"Triton {triton.__version__} is too old for the kernels (3.3 is the oldest that compiles them)"
    return ""


def interpreting() -> bool:
    """Whether Triton's interpreter is on, in which the kernels run on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def runs_on(device: torch.device, backend: str | None) -> bool:
    """Whether the kernels update what lies on this device.

    Raises:
        RuntimeError: backend="triton" was asked for and cannot run here.
    """
    if backend in NOT_OURS:
        return False
    missing = triton_missing()
    if backend is None:
        if device.type != "cuda":
            return False
        if missing:
            warn_once(
                f"{missing}; the optimizer runs in plain PyTorch, which is many times slower on a GPU. torch 2.7 and "
                "later bring a Triton that will do; `automagic-bnb doctor` says more"
            )
            return False
    elif missing:
        raise RuntimeError(f"option backend='triton': {missing}; install it, or use backend='torch'")
    elif device.type != "cuda" and not interpreting():
        raise RuntimeError(
            f"option backend='triton': a parameter is on {device}, where the kernels run only in Triton's "
            "interpreter; set TRITON_INTERPRET=1 before Triton is imported, or use backend='torch'"
        )
    return True


def takes(p: Tensor, backend: str | None) -> bool:
    """Whether the kernels update this (local) parameter; raises as `runs_on`."""
    # A strided parameter is updated through a contiguous copy, in plain PyTorch.
    return runs_on(p.device, backend) and p.is_contiguous() and p.numel() > 0
