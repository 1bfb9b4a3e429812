"""What the host asks of the device around the kernels' launches over shards: little, and it waits for nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from automagic_bnb import Automagic8bit, auto_lr

pytestmark = pytest.mark.kernels
fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")

VIEWS = {"view", "slice", "select", "detach", "unbind", "split", "split_with_sizes", "expand", "alias", "view_as"}
"""Of these the device hears nothing."""
WAITS = {"_local_scalar_dense", "item", "nonzero", "index_put_", "lift_fresh", "equal"}
"""What waits for the device, or (`torch.tensor`, a list for an index) uploads from memory that is not pinned."""


class Counted(TorchDispatchMode):
    """How often each operation has been called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._opname] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def estimates() -> list[Any]:
    """Of a found rate, made by a kernel."""
    return []


@pytest.fixture
def calls(estimates: list[Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Of a later step of so many matrices, of which the second of two processes, the other one imagined, has half."""
    from automagic_bnb.kernels import statistics, step

    def launch(bucket: Any, grads: Any, sources: Any, **rest: Any) -> torch.Tensor:
        bucket.upload_step(grads, sources)
        return torch.zeros(len(bucket.members), statistics.PARTS.value)

    monkeypatch.setattr(step, "launch", launch)
    monkeypatch.setattr(statistics, "find_rate", lambda *args: estimates.append(args))
    monkeypatch.setattr(auto_lr.Search, "_on_host", lambda *args: None)  # on a GPU nothing waits for it
    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=1, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def of(count: int, shape: tuple[int, int]) -> Counter[str]:
        parameters = []
        for _ in range(count):
            whole = torch.ones(shape, dtype=torch.bfloat16)
            local = whole.chunk(2)[1].clone()
            own = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
            parameters.append(nn.Parameter(own))
            parameters[-1].grad = torch.ones_like(parameters[-1])
        opt = Automagic8bit(parameters, backend="triton")
        for _ in range(3):
            opt.step()
        with Counted() as counted:
            opt.step()
        return Counter({name: number for name, number in counted.calls.items() if name not in VIEWS})

    yield of
    dist.destroy_process_group()


@pytest.mark.parametrize("shape", [(256, 256), (250, 40)], ids=["of whole tiles", "that share a tile"])
def test_another_matrix_costs_one_copy_of_its_gradient(shape: tuple[int, int], calls: Any) -> None:
    """With the others' rows beside its own. All else is done for all matrices at once."""
    few, many = calls(4, shape), calls(8, shape)
    assert many - few == Counter(cat=4)
    assert not few - many


def test_a_rate_is_found_in_one_launch(estimates: list[Any], calls: Any) -> None:
    """Of the four steps each but the first begins with one: a dozen small operations in plain PyTorch."""
    calls(4, (256, 256))
    assert len(estimates) == 3


def test_nothing_waits_for_the_device(calls: Any) -> None:
    """Nor is anything uploaded but the launch's numbers. The negative control is what a list for an index comes to."""
    assert not WAITS & calls(4, (250, 40)).keys()
    with Counted() as counted:
        torch.zeros(3)[[0, 2]] = 0
    assert WAITS & counted.calls.keys()
