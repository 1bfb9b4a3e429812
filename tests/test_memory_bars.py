"""What the state of real models may take at most, in bytes a parameter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_cases import optimizer
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from workloads import WORKLOADS


def planned(workload: str, **options: Any) -> dict[str, Any]:
    """The plan for a model's shapes, bf16, on the meta device."""
    parameters = [
        nn.Parameter(torch.empty(shape, device="meta", dtype=torch.bfloat16))
        for count, shape in WORKLOADS[workload].shapes
        for _ in range(count)
    ]
    options.setdefault("lora", WORKLOADS[workload].lora)
    report = optimizer(parameters, **options).get_memory_efficiency_report()
    assert report["total_parameters"] == WORKLOADS[workload].elements
    assert ("probe_block" in report["states_breakdown"]) == (options["lr"] is None)
    return report


RATES = pytest.mark.parametrize("lr", [1e-4, None], ids=["given", "found"])


@RATES
@pytest.mark.parametrize("workload", [name for name in WORKLOADS if name != "rank-4-lora"])
def test_block_wise_takes_at_most_4_2_bytes_a_parameter(workload: str, lr: float | None) -> None:
    assert planned(workload, factored=False, lr=lr)["bytes_per_parameter"] <= 4.2


@RATES
@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_default_takes_less_than_adamw8bit(workload: str, lr: float | None) -> None:
    """Every feature on. Of rank 4 the matrices are small tensors, with m in 16 bits; AdamW8bit has 8 bytes there."""
    most = 3.0 if workload == "rank-4-lora" else 1.4 if WORKLOADS[workload].lora else 1.75
    assert planned(workload, lr=lr)["bytes_per_parameter"] <= most


@RATES
@pytest.mark.parametrize("workload", WORKLOADS)
def test_eight_bits_forced_on_small_matrices(workload: str, lr: float | None) -> None:
    assert planned(workload, lr=lr, force_8bit=True)["bytes_per_parameter"] <= 2.5


@RATES
@pytest.mark.parametrize("workload", [name for name in WORKLOADS if name != "rank-4-lora"])
def test_lean(workload: str, lr: float | None) -> None:
    most = 1.5 if WORKLOADS[workload].lora else 1.15
    assert planned(workload, lr=lr, profile="lean")["bytes_per_parameter"] <= most


@RATES
@pytest.mark.parametrize("workload", [name for name in WORKLOADS if name != "rank-4-lora"])
def test_wider_masks_and_means(workload: str, lr: float | None) -> None:
    most = 1.7 if WORKLOADS[workload].lora else 2.2
    assert planned(workload, mask_bits=8, mean_bits=32, lr=lr)["bytes_per_parameter"] <= most
