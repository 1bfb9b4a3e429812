"""Parameters, gradients and optimizers for the tests of the kernels' plan."""

from __future__ import annotations

from typing import Any

import torch
from kernel_cases import DEVICE

from automagic_bnb import Automagic8bit
from automagic_bnb.optimizer import Automagic

BACKENDS = ("torch", "triton")


def parameter(*shape: int, seed: int = 0) -> Any:
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE))


def give(*parameters: Any, step: int = 0) -> None:
    for i, p in enumerate(parameters):
        generator = torch.Generator().manual_seed(100 * step + i)
        p.grad = (torch.randn(p.shape, generator=generator) * 0.01).to(p.device, p.dtype)


def build(parameters: Any, backend: str, **options: Any) -> Automagic:
    return Automagic8bit(parameters, **{"lr": 1e-2, "backend": backend, "min_8bit_size": 0, "mask_bits": 8, **options})
