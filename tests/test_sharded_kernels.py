"""FSDP2 by the kernels: what two and four processes come to is what the kernels come to in one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sharded import CPU_ALONE, ROUNDING, distances, unequal

from automagic_bnb import state as st
from automagic_bnb.sharded import Shard, layout

pytestmark = pytest.mark.kernels
WORLDS = (2, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sharded_kernels")
    command = [sys.executable, str(Path(__file__).with_name("sharded_worker.py")), str(out), "triton"]
    environment = {**os.environ, **CPU_ALONE, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=1200)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return out


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "whole.pt", weights_only=True)


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[int, list[dict[str, Any]]]:
    return {
        world: [torch.load(folder / f"{world}_{r}.pt", weights_only=True) for r in range(world)] for world in WORLDS
    }


@pytest.mark.parametrize(("world", "options"), [(2, "32 bits"), (2, "bfloat16"), (2, "factored"), (4, "factored")])
def test_the_kernels_step_shards_to_the_bits_of_the_whole(options: str, world: int, seen: Any, whole: Any) -> None:
    """Of whole tiles and of shards that end within one, within a block, of three rows and of none; with gradients that
    are not finite on either side of an edge. In 32 bits one parameter at a time."""
    for process in seen[world]:
        assert not unequal(process[options], whole[options])


@pytest.mark.parametrize("world", WORLDS)
def test_sums_over_shards(world: int, seen: Any, whole: Any) -> None:
    """W, the gradients' norms and auto_lr's, added up in another order: equal to rounding, and to the bit in all
    processes."""
    first = seen[world][0]["sums"]
    assert max(distances(first, whole["sums"]).values()) < ROUNDING
    for process in seen[world]:
        assert not unequal(process["sums"], first)
        for name, state in whole["sums"]["state"].items():
            stats = process["sums"]["state"][name]["tensor_stats"]
            torch.testing.assert_close(stats, state["tensor_stats"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("world", "runs"), [(2, 4), (4, 2)])
def test_it_was_the_kernels(world: int, runs: int, seen: Any, whole: Any) -> None:
    """Each shard with rows, in each of four steps; two of the eight have none in the last of four processes. The
    negative control is that the runs compared are not all the same."""
    assert all(process["launched"] >= runs * 4 * 5 for process in seen[world])
    runs_of_one = whole["factored"]["weights"], whole["32 bits"]["weights"]
    assert not torch.equal(*(weights["aligned"] for weights in runs_of_one))


def test_what_is_summed_is_there(whole: Any) -> None:
    """Masks that have moved, elements that were skipped, and a rate that is being found."""
    for place in (st.SKIPPED, st.LR_DENOMINATOR):
        assert any(float(state["tensor_stats"][place]) > 0 for state in whole["sums"]["state"].values())
    assert any(float(state["tensor_stats"][st.MASK_MEAN]) != 1 for state in whole["sums"]["state"].values())


def test_where_the_whole_would_begin() -> None:
    """Entries before a window of 128 of 512 rows of 256 elements, of each kind of state."""
    stretch = Shard(None, 0, layout((512, 256), 4), 1).stretch(32)
    assert (stretch.start, stretch.stop) == (stretch.own_start, stretch.own_stop) == (128 * 256, 256 * 256)
    kinds = ("element", "pair", "block", "row", "col", "probe", "span", "stats", "norms", "book")
    before = (128 * 256, 128 * 128, 128, 128, 256, 4 * 256, 4, 0, 0, 0)
    assert tuple(map(stretch.before, kinds)) == before
