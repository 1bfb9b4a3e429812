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
@pytest.mark.parametrize("workload", [name for name, w in WORKLOADS.items() if not w.lora])
def test_factored_full_fine_tunes_take_at_most_2_2(workload: str, lr: float | None) -> None:
    assert planned(workload, factored=True, lr=lr)["bytes_per_parameter"] <= 2.2


@RATES
@pytest.mark.parametrize("workload", [name for name, w in WORKLOADS.items() if w.lora])
def test_factored_loras_take_at_most_2_9(workload: str, lr: float | None) -> None:
    # Of rank 4 the matrices are small tensors, with m in 16 bits.
    assert planned(workload, factored=True, lr=lr)["bytes_per_parameter"] <= (5 if workload == "rank-4-lora" else 2.9)
