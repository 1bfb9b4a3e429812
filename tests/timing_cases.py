"""The benchmark of a step, short and silent."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from automagic_bnb import BenchmarkResult, benchmark_optimizer

ROWS = torch.randn(8, 24, generator=torch.Generator().manual_seed(7))


def bench(model: nn.Module, opt: Any, **options: Any) -> BenchmarkResult:
    return benchmark_optimizer(model, opt, **{"num_steps": 2, "warmup": 1, "verbose": False, "batch": ROWS, **options})
