"""FSDP2 over two and four processes: what they step, save and load is what one process would."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from automagic_bnb.sharded import Layout

CPU_ALONE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
"""The environment of processes that fork: autograd's threads for GPUs, once started, forbid it."""
ROUNDING = 2e-6
"""Of a run's way: sums of 22 steps in another order, and what comes of it."""

# ---------------------------------------------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `sharded_worker` has left what it has seen."""
    out = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, str(Path(__file__).with_name("sharded_worker.py")), str(out)]
    done = subprocess.run(command, env={**os.environ, **CPU_ALONE}, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return out


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """By number of processes, what each has seen."""
    return {
        world: [torch.load(folder / f"{world}_{r}.pt", weights_only=True) for r in range(world)] for world in (2, 4)
    }


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Any]:
    """What one process comes to."""
    return torch.load(folder / "whole.pt", weights_only=True)


def distances(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """By parameter, the rms distance of two runs' weights, over the rms of the weights, which are about 0.1."""
    pairs = {name: (one["weights"][name].double(), other["weights"][name].double()) for name in one["weights"]}
    return {name: float((a - b).square().mean().sqrt() / b.square().mean().sqrt()) for name, (a, b) in pairs.items()}


def unequal(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What is not the same bits, of weights and states."""
    found = [name for name, p in one["weights"].items() if not torch.equal(p, other["weights"][name])]
    for name, state in one["state"].items():
        there = other["state"][name]
        assert state.keys() == there.keys()
        found += [
            f"{name}.{key}"
            for key, value in state.items()
            if not (torch.equal(value, there[key]) if isinstance(value, Tensor) else value == there[key])
        ]
    return found


@pytest.mark.parametrize(
    ("world", "options"), [(2, "codes"), *itertools.product((2, 4), ("32 bits", "factored", "bfloat16"))]
)
def test_a_sharded_run_is_the_whole_run(options: str, world: int, seen: Any, whole: Any) -> None:
    """Every bit of weights and states, of shards with and without whole tiles, of one row and of none."""
    for process in seen[world]:
        assert not unequal(process[options], whole[options])


@pytest.mark.parametrize(("world", "options"), [(2, "mask"), *itertools.product((2, 4), ("norms", "found"))])
def test_sums_over_shards_are_the_whole_sums(options: str, world: int, seen: Any, whole: Any) -> None:
    """W, the gradients' norms and auto_lr's sums, each added up in another order: equal to rounding, here as there."""
    first = seen[world][0][options]
    assert max(distances(first, whole[options]).values()) < ROUNDING
    for process in seen[world]:
        assert not unequal(process[options], first)
        for name, state in whole[options]["state"].items():
            torch.testing.assert_close(
                process[options]["state"][name]["tensor_stats"], state["tensor_stats"], rtol=1e-4, atol=1e-5
            )


def test_the_found_rate_has_sums(whole: Any) -> None:
    """Of blocks that are not all the first of their span: rows without gradients at first are passed over."""
    state = whole["found"]["state"]
    assert all(float(values["tensor_stats"][1]) > 0 for values in state.values())
    assert state["probed"]["probe_block"].tolist()[0] > 0


def test_parameters_stepped_one_by_one(seen: Any, whole: Any) -> None:
    """As a backward pass steps that has no memory for all gradients."""
    for process in seen[2]:
        assert not unequal(process["one by one"], whole["32 bits"])


@pytest.mark.parametrize("world", [2, 4])
def test_a_sharded_network_learns_as_the_whole(world: int, seen: Any, whole: Any) -> None:
    """With the gradients of FSDP2's own backward pass, which are equal to rounding."""
    for process in seen[world]:
        torch.testing.assert_close(process["fitted"], whole["fitted"], rtol=1e-3, atol=1e-4)
        losses = process["fitted"][0]
        assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("world", [2, 4])
def test_shards_by_themselves_would_not(world: int, seen: Any, whole: Any) -> None:
    """The negative control: rows stepped as parameters of their own end elsewhere."""
    parts = [process["in parts"] for process in seen[world]]
    differs = {
        name: not torch.equal(torch.cat([of_rank[index] for of_rank in parts]), p)
        for index, (name, p) in enumerate(whole["32 bits"]["weights"].items())
    }
    assert differs["aligned"]
    assert differs["embed"]


def test_collectives_of_a_step(seen: Any) -> None:
    """One after the step, one before where edges are wanted, one more at every tenth of LoRA; none without shards."""
    for process in seen[2]:
        found = process["collectives"]
        assert found["apart"] == [1] * 10
        assert found["default"] == [2] * 10
        assert found["lora"] == [2] * 9 + [3]
        assert found["unsharded"] == [0]


def test_replicas_of_shards(seen: Any, whole: Any) -> None:
    """HSDP: sharded over one dimension of the mesh, replicated over the other."""
    for process in seen[4]:
        assert not unequal(process["hybrid"], whole["factored"])


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("way", ["full", "dcp", "own"])
def test_a_resumed_run_goes_straight_on(way: str, world: int, seen: Any) -> None:
    """Through a whole checkpoint, torch.distributed.checkpoint, and a file for each process."""
    for process in seen[world]:
        resumed = process["resumed"]
        assert all(map(torch.equal, resumed[way], resumed["straight on"]))
        assert not any(map(torch.equal, resumed["saved"], resumed["straight on"]))


@pytest.fixture(scope="module")
def resumed(folder: Path, seen: Any, whole: Any) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """By the numbers of processes that saved and that went on, what each of these has seen."""
    by_fewer = [torch.load(folder / f"fewer_{rank}.pt", weights_only=True) for rank in range(2)]
    found = {(1, world): [process["of 1"] for process in seen[world]] for world in (2, 4)}
    found |= {(world, 1): [whole[f"of {world}"]] for world in (2, 4)}
    return {**found, (2, 4): [process["of 2"] for process in seen[4]], (4, 2): [x["of 4"] for x in by_fewer]}


OTHER_NUMBERS = [(1, 2), (1, 4), (2, 1), (2, 4), (4, 1), (4, 2)]


@pytest.mark.parametrize(("saved", "loaded"), OTHER_NUMBERS)
def test_other_numbers_of_processes_resume(saved: int, loaded: int, resumed: Any, seen: Any, whole: Any) -> None:
    """The same bits of weights. Three steps on, sums show in the last digits."""
    expected = (whole if saved == 1 else seen[saved][0])["resumed"]
    for process in resumed[saved, loaded]:
        assert all(map(torch.equal, process["loaded"]["weights"].values(), expected["saved"]))
        assert not any(map(torch.equal, process["after"], expected["saved"]))
        for one, other in zip(process["after"], expected["straight on"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_other_numbers_of_processes_load_the_same_state(resumed: Any) -> None:
    """One checkpoint in one, two and four processes: every bit of every state, whatever they then keep of it."""
    for saved, *loaded in ((1, 2, 4), (2, 1, 4), (4, 1, 2)):
        one, other = (resumed[saved, number][0]["loaded"]["state"] for number in loaded)
        for name, state in one.items():
            for key, value in state.items():
                there = other[name][key]
                same = torch.equal(value, there) if isinstance(value, Tensor) else value == there
                assert same, (saved, name, key)


# -------------------------------------------------------------------------------------------------------------- reports


@pytest.mark.parametrize("world", [2, 4])
def test_rates_memory_and_conversion_of_shards(world: int, seen: Any, whole: Any) -> None:
    for process in seen[world]:
        report = process["reports"]
        assert report["planned"]["total_bytes"] == report["held"]["total_bytes"]
        assert report["metrics"]["step"] == 12
        assert 0 < report["metrics"]["lr/mean"] < 2e-3
        assert max(distances(report["requantized"], whole["reports"]["requantized"]).values()) < 1e-4
    for index, rates in enumerate(whole["reports"]["rates"]):
        rows = torch.cat([process["reports"]["rates"][index] for process in seen[world]])
        torch.testing.assert_close(rows, rates, rtol=1e-5, atol=0)


@pytest.mark.parametrize("world", [2, 4])
def test_other_ways_to_shard_are_stepped_apart(world: int, seen: Any) -> None:
    """By columns: with a warning, and a file for each process that only that one loads."""
    for rank, process in enumerate(seen[world]):
        found = process["columns"]
        assert any("sharded otherwise than by rows" in warning for warning in found["warnings"])
        assert any("one file for each process" in warning for warning in found["warnings"])
        assert f"holds shard {(rank + 1) % world}, here is {rank}" in found["error"]


# ------------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    "shape", [(256, 256), (37, 100), (300,), (3, 700), (8, 512), (512, 8), (1, 5), (1000, 24), (0, 4)]
)
def test_windows_hold_the_rows_and_whole_tiles(shape: tuple[int, ...], world: int) -> None:
    layout = Layout(shape, world)
    expected = [len(x) for x in torch.empty(shape).chunk(world)] + [0] * world
    for rank in range(world):
        own, window = layout.share(rank), layout.window(rank)
        assert len(own) == expected[rank]
        if own and layout.columns:
            assert window.start <= own.start
            assert own.stop <= window.stop
            assert window.start * layout.columns % 256 == 0
            assert window.stop == shape[0] or window.stop * layout.columns % 256 == 0
            assert window.start % layout.unit == 0 or window.start == 0
    for size in (2, 256, 8192):
        begun = [i for rank in range(world) for i in layout.begun(rank, size)]
        assert begun == list(range(-(-torch.empty(shape).numel() // size)))
