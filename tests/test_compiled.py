"""What the compiler makes of the step kernel: which accesses there are, and how a block lies in a warp's registers.

No GPU is needed: see `compiling_process`. Each variant has two loops over blocks, for the usual ones and the others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")
pytestmark = pytest.mark.skipif(torch.version.hip is not None, reason="Triton is there for AMD's devices only")

LOOPS = 2
ONE_TO_A_THREAD, EIGHT_TO_A_THREAD = (
    "sizePerThread = [1], threadsPerWarp = [32]",
    "sizePerThread = [8], threadsPerWarp = [32]",
)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What `compiling_process` has seen."""
    out = tmp_path_factory.mktemp("compiled") / "seen.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compiling_process.py")
    done = subprocess.run([sys.executable, str(script), str(out)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def variants(seen: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of the step kernel, by variant."""
    return seen["variants"]


def test_what_a_warp_exchanges_lies_one_or_eight_to_a_thread(variants: dict[str, dict[str, Any]]) -> None:
    """The exchanges between threads are written for this: thread i holds number i of 32, and elements 8i to 8i + 7."""
    for name, variant in variants.items():
        layouts = dict(variant["exchanged"])
        if name.startswith("small"):  # nothing of it is coded
            assert ONE_TO_A_THREAD in layouts["32"], name
            assert "256" not in layouts, name
            continue
        assert len(layouts) == len(variant["exchanged"]) == 2, name  # of each size there is but one
        assert ONE_TO_A_THREAD in layouts["32"], name
        assert EIGHT_TO_A_THREAD in layouts["256"], name


def test_after_warm_up_the_mask_is_only_read(variants: dict[str, dict[str, Any]]) -> None:
    """Bytes loaded: m, v, r and the mask; stored: the mask during warm-up alone."""
    frozen, warm = variants["mask frozen"], variants["warm-up"]
    assert frozen["loads"].count("256i8") == warm["loads"].count("256i8") == 4 * LOOPS
    assert frozen["stores"].count("256i8") == 3 * LOOPS
    assert warm["stores"].count("256i8") == 4 * LOOPS


def test_a_mask_in_four_bits_is_half_as_many_bytes(variants: dict[str, dict[str, Any]]) -> None:
    """Loaded, and during warm-up stored; m, v and r as before. Without a mask there are only those of m."""
    frozen, warm = variants["mask in four bits"], variants["mask in four bits, warm-up"]
    for variant, stored in ((frozen, 0), (warm, LOOPS)):
        assert variant["loads"].count("128i8") == LOOPS
        assert variant["stores"].count("128i8") == stored
        assert variant["loads"].count("256i8") == variant["stores"].count("256i8") == 3 * LOOPS
    lean = variants["lean"]
    assert not {"128i8", "128i32"} & {*lean["loads"], *lean["stores"]}
    assert lean["loads"].count("256i8") == lean["stores"].count("256i8") == LOOPS


def test_what_is_small_is_in_16_bits_and_means(variants: dict[str, dict[str, Any]]) -> None:
    """m in float16 beside a byte of k and π, v and r by rows; without tiles all three in float32."""
    tiled, whole = variants["small, narrow tiles"], variants["small, whole"]
    assert tiled["stores"].count("256f16") == tiled["stores"].count("256i8") == LOOPS
    assert "256f32" not in tiled["stores"]
    assert whole["stores"].count("256f32") == 3 * LOOPS
    assert variants["means in 16 bits, mask in four"]["stores"].count("256f32") == 0


def test_without_spatial_options_no_neighbour_is_loaded(variants: dict[str, dict[str, Any]]) -> None:
    """Of bfloat16, θ and the gradient itself; with them two rows beside it, or four neighbours one by one."""
    plain, spatial = variants["no spatial options"]["loads"], variants["mask frozen"]["loads"]
    assert plain.count("256bf16") == 2 * LOOPS
    assert plain.count("32bf16") == 0
    assert spatial.count("256bf16") == 2 * LOOPS + 2 + 4
    assert spatial.count("32bf16") == 2  # before and behind each thread's eight


def test_every_tensor_is_stored_once(variants: dict[str, dict[str, Any]]) -> None:
    """θ once in each loop, and what it is where a search begins to watch; factored, no element-wise v or r."""
    assert variants["mask frozen"]["stores"].count("256bf16") == LOOPS
    factored = variants["factored, odd rows, float16"]
    assert factored["stores"].count("256f16") == 2 * LOOPS
    assert factored["stores"].count("256i8") == 2 * LOOPS  # m and the mask


def test_turns_compile_for_every_rank(seen: dict[str, dict[str, Any]]) -> None:
    """The kernels of `lora_direction`, whose products of matrices the interpreter takes in any shape."""
    assert seen["turns"] == {rank: ["gram_kernel", "turn_kernel", "turned_kernel"] for rank in ("16", "32", "64")}
