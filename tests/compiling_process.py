"""A process that compiles kernels for a GPU that need not be there, started by `test_compiled`: OUT.

What is seen of each variant is written to OUT as JSON. Triton's interpreter, in which the other tests run where there
is no GPU, knows nothing of how a tensor lies in a warp's registers; TRITON_INTERPRET must not be set here.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from automagic_bnb.kernels import direction, low_rank, step, tables
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from automagic_bnb.factored import tile_height

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {"table_ptr": "*i64", "grads_ptr": "*i64", "owners_ptr": "*i32"}
SWITCHES = tables.Switches(
    P=tl.bfloat16,
    G=tl.bfloat16,
    M=tl.uint8,
    CODES=True,
    MASK=8,
    WIDTH=0,
    HEIGHT=0,
    MEANS=tl.float32,
    SPATIAL=True,
    EVEN=True,
    EDGES=True,
    TORQUE=True,
    CAME=True,
    CAUTIOUS=True,
    BACKGROUND=True,
    AWARE=True,
    AUTO=False,
    SCALED=False,
    ECC=False,
    STOCHASTIC=True,
    DIRECTED=False,
    PART=False,
    ALIGN=16,
    WARM=False,
)
FACTORED = {"CODES": False, "WIDTH": 256, "HEIGHT": tile_height(256)}
VARIANTS: dict[str, dict[str, Any]] = {
    "mask frozen": {},
    "warm-up": {"WARM": True},
    "no spatial options": {"SPATIAL": False, "EVEN": False, "EDGES": False},
    "factored, odd rows, float16": {
        **FACTORED, "P": tl.float16, "EVEN": False, "WARM": True, "AUTO": True,
    },
    "mask in four bits": {"MASK": 4},
    "mask in four bits, warm-up": {"MASK": 4, "WARM": True},
    "means in 16 bits, mask in four": {**FACTORED, "MEANS": tl.bfloat16, "MASK": 4, "WARM": True},
    "small, narrow tiles": {
        **FACTORED, "M": tl.float16, "WIDTH": 8, "HEIGHT": tile_height(8), "EVEN": False, "WARM": True,
    },
    "small, whole": {"M": tl.float32, "CODES": False, "WARM": True},
    "lean": {**FACTORED, "MASK": 0, "CAME": False},
    "a LoRA's": {**FACTORED, "MEANS": tl.bfloat16, "MASK": 0},
    "a LoRA's, directed": {**FACTORED, "MEANS": tl.bfloat16, "MASK": 0, "DIRECTED": True, "AUTO": True},
    "directed": {"DIRECTED": True, "WARM": True, "AUTO": True},
    "part": {"PART": True, "WARM": True, "AUTO": True},
    "part, factored": {**FACTORED, "PART": True, "MASK": 4, "SCALED": True, "ECC": True},
}  # fmt: skip


def compiled(changes: dict[str, Any]) -> dict[str, str]:
    switches = SWITCHES._replace(**changes)
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(step.step_kernel.arg_names):
        if name == "S":
            signature[name] = tables.Switches(*["constexpr"] * len(switches))
            constants = {(index, i): switch for i, switch in enumerate(switches)}
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, "*fp32")
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source = ASTSource(step.step_kernel, signature, constants, attributes)
    return triton.compile(source, target=HOPPER, options={"num_warps": 1}).asm


def compiled_turns(rank: int) -> list[str]:
    """The kernels of `lora_direction` for matrices of this RANK; which of them compiled."""
    span, warps = low_rank.TILES[rank]
    found = []
    for kernel in (direction.gram_kernel, direction.turn_kernel, direction.turned_kernel):
        names = list(enumerate(kernel.arg_names))
        floats = ("directions_ptr", "grams_ptr", "turns_ptr")
        signature = {x: "constexpr" if x.isupper() else "*fp32" if x in floats else "*i64" for _, x in names}
        constants = {(i,): {"RANK": rank, "SPAN": span}[x] for i, x in names if x.isupper()}
        attributes = {(i,): [["tt.divisibility", 16]] for i, x in names if not x.isupper()}
        source = ASTSource(kernel, signature, constants, attributes)
        if triton.compile(source, target=HOPPER, options={"num_warps": warps}).asm["cubin"]:
            found.append(kernel.fn.__name__)
    return found


def seen(asm: dict[str, str]) -> dict[str, Any]:
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", asm["ttgir"], re.MULTILINE))
    exchanged = re.findall(r"shfl\.sync\.idx.*-> tensor<(\d+)xf32, (#\w+)>", asm["ttgir"])
    loads = re.findall(r"tt\.load .* : tensor<(\d+)x!tt\.ptr<(\w+)>>", asm["ttir"])
    stores = re.findall(r"tt\.store .* : tensor<(\d+)x!tt\.ptr<(\w+)>>", asm["ttir"])
    return {
        "exchanged": sorted({(size, layouts[name]) for size, name in exchanged}),
        "loads": sorted(size + dtype for size, dtype in loads),
        "stores": sorted(size + dtype for size, dtype in stores),
    }


if __name__ == "__main__":
    variants = {name: seen(compiled(changes)) for name, changes in VARIANTS.items()}
    turns = {rank: compiled_turns(rank) for rank in low_rank.TILES}
    Path(sys.argv[1]).write_text(json.dumps({"variants": variants, "turns": turns}))
