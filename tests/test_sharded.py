"""FSDP2 over two and four processes: what they step, save and load is what one process would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from automagic_bnb.sharded import Layout

ROUNDING = 2e-6
"""Of a run's way: sums of 22 steps in another order, and what comes of it."""

# ---------------------------------------------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """By number of processes, what each has seen: see `sharded_worker`."""
    out = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, str(Path(__file__).with_name("sharded_worker.py")), str(out)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return {
        world: [torch.load(out / f"{world}_{r}.pt", weights_only=False) for r in range(world)] for world in (1, 2, 4)
    }


def distances(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """By parameter, the rms distance of two runs' weights, over the rms of the weights, which are about 0.1."""
    pairs = {name: (one["weights"][name].double(), other["weights"][name].double()) for name in one["weights"]}
    return {name: float((a - b).square().mean().sqrt() / b.square().mean().sqrt()) for name, (a, b) in pairs.items()}


def unequal(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What is not the same bits, of weights and states."""
    found = [name for name, p in one["weights"].items() if not torch.equal(p, other["weights"][name])]
    for name, state in one["state"].items():
        assert state.keys() == other["state"][name].keys()
        for key, value in state.items():
            same = (
                torch.equal(value, other["state"][name][key])
                if isinstance(value, Tensor)
                else value == other["state"][name][key]
            )
            found += [] if same else [f"{name}.{key}"]
    return found


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("options", ["32 bits", "codes", "factored", "bfloat16", "one by one"])
def test_a_sharded_run_is_the_whole_run(options: str, world: int, seen: Any) -> None:
    """Every bit of weights and states, of shards with and without whole tiles, of one row and of none."""
    for process in seen[world]:
        assert not unequal(process[options]["sharded"], process[options]["whole"])


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("options", ["mask", "norms", "found"])
def test_sums_over_shards_are_the_whole_sums(options: str, world: int, seen: Any) -> None:
    """W, the gradients' norms and auto_lr's sums, each added up in another order: equal to rounding, here as there."""
    first = seen[world][0][options]
    assert max(distances(first["sharded"], first["whole"]).values()) < ROUNDING
    for process in seen[world][1:]:
        assert not unequal(process[options]["sharded"], first["sharded"])


def test_the_found_rate_moves(seen: Any) -> None:
    """Else its sums would have had no say."""
    state = seen[2][0]["found"]["whole"]["state"]
    assert any(float(values["tensor_stats"][1]) for values in state.values())
    places = {name: values["probe_block"] for name, values in state.items()}
    assert places["probed"].tolist() != [0] * len(places["probed"])  # blocks without a gradient at first


@pytest.mark.parametrize("world", [2, 4])
def test_shards_by_themselves_would_not(world: int, seen: Any) -> None:
    """The negative control: rows stepped as parameters of their own end elsewhere."""
    whole = seen[world][0]["32 bits"]["whole"]["weights"]
    parts = [process["in parts"]["weights"] for process in seen[world]]
    differs = {
        name: not torch.equal(torch.cat([of_rank[index] for of_rank in parts]), p)
        for index, (name, p) in enumerate(whole.items())
    }
    assert differs["aligned"]
    assert differs["embed"]


@pytest.mark.parametrize("world", [2, 4])
def test_collectives_of_a_step(world: int, seen: Any) -> None:
    """One after the step, one before where edges are wanted, one more at every tenth of LoRA; none without shards."""
    for process in seen[world]:
        found = process["collectives"]
        assert found["apart"] == [1] * 10
        assert found["default"] == [2] * 10
        assert found["lora"] == [2] * 9 + [3]
        assert found["unsharded"] == [0]


def test_replicas_of_shards(seen: Any) -> None:
    """HSDP: sharded over one dimension of the mesh, replicated over the other."""
    for process in seen[4]:
        assert not unequal(process["hybrid"]["sharded"], process["hybrid"]["whole"])


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("way", ["full", "dcp", "own"])
def test_a_resumed_run_goes_straight_on(way: str, world: int, seen: Any) -> None:
    """Through a whole checkpoint, torch.distributed.checkpoint, and a file for each process."""
    for process in seen[world]:
        resumed = process["resumed"]
        assert all(map(torch.equal, resumed[way], resumed["straight on"]))
        assert not any(map(torch.equal, resumed["saved"], resumed["straight on"]))


@pytest.mark.parametrize(("saved", "loaded", "name"), [(2, 4, "of two"), (4, 1, "of four")])
def test_other_numbers_of_processes_resume(saved: int, loaded: int, name: str, seen: Any) -> None:
    """What is loaded are the same bits; three steps on, what is summed in another order shows in the last digits."""
    expected = seen[saved][0]["resumed"]
    for process in seen[loaded]:
        assert all(map(torch.equal, process[name]["loaded"]["weights"].values(), expected["saved"]))
        for one, other in zip(process[name]["after"], expected["straight on"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_other_numbers_of_processes_load_the_same_state(seen: Any) -> None:
    """Of two, four and one, after two and four had saved it: every number of the state."""
    one, four = seen[1][0]["of four"]["loaded"], seen[4][0]["of two"]["loaded"]
    for name, state in one["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                torch.testing.assert_close(value, four["state"][name][key], rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- reports


@pytest.mark.parametrize("world", [2, 4])
def test_rates_memory_and_conversion_of_shards(world: int, seen: Any) -> None:
    for process in seen[world]:
        report = process["reports"]
        assert report["planned"]["total_bytes"] == report["held"]["total_bytes"]
        assert report["metrics"]["step"] == 22
        assert 0 < report["metrics"]["lr/mean"] < 2e-3
        assert max(distances(report["requantized"], report["whole requantized"]).values()) < 1e-4
    for index, whole in enumerate(seen[world][0]["reports"]["whole rates"]):
        rows = torch.cat([process["reports"]["rates"][index] for process in seen[world]])
        torch.testing.assert_close(rows, whole, rtol=1e-5, atol=0)


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
