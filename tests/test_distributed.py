"""Several processes: replicas, shards, and checkpoints of both."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from compatibility_cases import fit, network
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from automagic_bnb import Automagic8bit

# ----------------------------------------------------------------------------------------- torch.distributed.checkpoint


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("lr", [1e-3, None])
@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoint_round_trip(
    flat: bool, lr: float | None, on_disk: bool, tools: Any, tmp_path: Any
) -> None:
    """Into a fresh optimizer, whose state it makes by a step with zero gradients: weights stay, all else comes back."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, fresh = network(torch.bfloat16), network(torch.bfloat16)
    opt, fresh_opt = (Automagic8bit(m.parameters(), lr=lr) for m in (model, fresh))
    fit(model, opt, range(5))
    fresh.load_state_dict(model.state_dict())
    weights = [p.detach().clone() for p in fresh.parameters()]
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt, options=options))
    if on_disk:
        save({"optimizer": saved}, checkpoint_id=tmp_path)
        saved = get_optimizer_state_dict(fresh, fresh_opt, options=options)
        load({"optimizer": saved}, checkpoint_id=tmp_path)
    set_optimizer_state_dict(fresh, fresh_opt, saved, options=options)
    assert not tools.differences(weights, [p.detach() for p in fresh.parameters()])
    assert not tools.differences(tools.snapshot(opt), tools.snapshot(fresh_opt))
    assert fit(model, opt, range(5, 8)) == fit(fresh, fresh_opt, range(5, 8))


# ---------------------------------------------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes connected by gloo have seen: see `distributed_worker`."""
    out = tmp_path_factory.mktemp("distributed")
    script = Path(__file__).with_name("distributed_worker.py")
    command = [sys.executable, str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([*command, str(rank), str(out / "store"), str(out)], env=environment, stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]
    errors = [worker.communicate(timeout=300)[1].decode()[-3000:] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_replicas_stay_equal(two_processes: list[dict[str, Any]], tools: Any) -> None:
    """DDP with data and global seeds of their own: after 20 steps weights and states are the same bits."""
    first, second = (seen["replicas"] for seen in two_processes)
    assert not tools.differences(first, second)
    first, second = (seen["replicas of an optimizer for each parameter"] for seen in two_processes)
    assert not tools.differences(first, second)
    first, second = (seen["replicas with seeds of their own"] for seen in two_processes)
    assert tools.differences(first, second)  # the negative control: other random bits show


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[Any]:
    """A process group of this process alone, and its mesh."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"factored": True}, {"lr": None}, {"optim_bits": 32, "lora": True}], ids=str)
def test_a_world_of_one_is_unsharded(options: dict[str, Any], one_process: Any, tools: Any) -> None:
    """FSDP2 over one process: DTensors step, save, load and copy as plain parameters do, bit for bit."""
    options = {"lr": 1e-3, **options}
    plain, wrapped = network(torch.bfloat16), fully_shard(network(torch.bfloat16), mesh=one_process)
    a, b = (Automagic8bit(m.parameters(), **options) for m in (plain, wrapped))
    for step in range(12):
        tools.train(a, list(plain.parameters()), range(step, step + 1))
        for p, q in zip(plain.parameters(), wrapped.parameters(), strict=True):
            q.grad = distribute_tensor(p.grad, one_process, [Shard(0)])
        b.step()
        if step == 5:
            b.load_state_dict(copy.deepcopy(b.state_dict()))
    x, y = tools.snapshot(a), tools.snapshot(b)
    y["parameters"] = [p.full_tensor() for p in y["parameters"]]
    assert not tools.differences(x, y)


def test_a_sharded_model_learns(one_process: Any) -> None:
    """Forward, backward and step together."""
    model = fully_shard(network(), mesh=one_process)
    opt = Automagic8bit(model.parameters(), lr=3e-3)
    losses = fit(model, opt, range(30))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
