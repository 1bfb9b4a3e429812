"""DeepSpeed's ZeRO: each process gives the optimizer its part of all weights, in a row, as one parameter."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_worker import OPTIONS, RATES, STEPS, WORLD, loss, network

from automagic_bnb import Automagic8bit

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes connected by gloo have seen: see `deepspeed_worker`."""
    out = tmp_path_factory.mktemp("deepspeed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(Path(__file__).with_name("deepspeed_worker.py"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    workers = [
        subprocess.Popen([*command, str(rank), port, str(out)], env=environment, stderr=subprocess.PIPE)
        for rank in range(WORLD)
    ]
    errors = [worker.communicate(timeout=300)[1].decode()[-3000:] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * WORLD, "\n".join(errors)
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def unsharded(lr: float | None) -> torch.Tensor:
    """The same without DeepSpeed: gradients averaged over the processes, each part stepped by itself."""
    model = network()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    parts = [torch.nn.Parameter(part.clone()) for part in weights.chunk(WORLD)]
    opts = [Automagic8bit([part], lr=lr, **OPTIONS) for part in parts]
    for step in range(STEPS):
        gradient = torch.zeros_like(weights)
        for rank in range(WORLD):
            torch.nn.utils.vector_to_parameters(torch.cat([x.detach() for x in parts]), model.parameters())
            model.zero_grad()
            loss(model, step, rank).backward()
            gradient += torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]) / WORLD
        for part, opt, grad in zip(parts, opts, gradient.chunk(WORLD), strict=True):
            part.grad = grad.clone()
            opt.step()
    return torch.cat([x.detach() for x in parts])


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("stage", [1, 2])
def test_zero_steps_each_part_as_the_optimizer_does(stage: int, rate: str, processes: list[dict[str, Any]]) -> None:
    first, second = (seen[f"{stage} {rate}"] for seen in processes)
    assert torch.equal(first, second)
    expected = unsharded(RATES[rate])
    start = torch.cat([p.detach().flatten() for p in network().parameters()])
    way = (expected - start).abs().max()
    assert way > 1e-4
    assert (first - expected).abs().max() <= 1e-5 * way  # but for the order in which gradients are added up
