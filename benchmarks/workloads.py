"""The parameter sets that the benchmarks step: shapes and counts of models people fine-tune.

A LoRA workload holds the A and B matrices of every adapted linear layer; a full one the weights themselves. Only shapes
matter to an optimizer, so parameters and gradients are random: θ ~ 0.02 N(0, 1), g ~ 1e-3 N(0, 1).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WEIGHT_STD, GRADIENT_STD = 0.02, 1e-3
CPU_LIMIT, CPU_SCALE = 4_096, 1e-3
"""What a workload is cut to on a machine without a GPU, where only the program itself can be tried."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """`shapes` pairs a count with a shape; `cut` says how a workload was made smaller, and is empty for a whole one."""

    name: str
    title: str
    lora: bool
    shapes: tuple[tuple[int, Shape], ...]
    cut: str = ""

    @property
    def tensors(self) -> int:
        return sum(count for count, _ in self.shapes)

    @property
    def elements(self) -> int:
        return sum(count * math.prod(shape) for count, shape in self.shapes)

    def describe(self) -> str:
        text = f"{self.title}: {self.tensors} tensors, {self.elements / 1e6:,.2f} M parameters"
        return f"{text} (CUT DOWN: {self.cut})" if self.cut else text

    def shrunk(self, limit: int | None = None, scale: float = 1.0) -> Workload:
        """The same mixture with fewer tensors (`scale` times each count, at least one) of at most `limit` elements.

        A tensor over the limit loses in its largest dimension, so that a LoRA matrix keeps its rank while it can.
        """
        shapes = tuple((max(1, math.ceil(count * scale)), _fit(shape, limit)) for count, shape in self.shapes)
        if shapes == self.shapes:
            return self
        cut = f"{scale:g} × the tensors" + (f", at most {limit} elements each" if limit else "")
        return dataclasses.replace(self, shapes=shapes, cut=cut)

    def one_of_each(self) -> Workload:
        """One tensor of each shape, for figures that are then weighted by the counts."""
        return dataclasses.replace(self, shapes=tuple((1, shape) for _, shape in self.shapes))

    def make(self, dtype: torch.dtype, device: torch.device) -> list[torch.nn.Parameter]:
        """Parameters with gradients, uninitialised: `fill` gives both their values."""
        params = []
        for count, shape in self.shapes:
            for _ in range(count):
                p = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
                p.grad = torch.empty_like(p)
                if self.lora:
                    p._is_lora_layer = True  # type: ignore[attr-defined]
                params.append(p)
        return params


@torch.no_grad()
def fill(params: Iterable[torch.nn.Parameter], seed: int = 0) -> None:
    """Draw parameters and gradients anew in place; one seed gives the same values every time."""
    generator = None
    for p in params:
        if generator is None:
            generator = torch.Generator(p.device).manual_seed(seed)
        assert p.grad is not None
        p.normal_(0.0, WEIGHT_STD, generator=generator)
        p.grad.normal_(0.0, GRADIENT_STD, generator=generator)


def _fit(shape: Shape, limit: int | None) -> Shape:
    sizes = list(shape)
    while limit and math.prod(sizes) > limit:
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        others = math.prod(sizes) // sizes[largest]
        fitting = max(limit // others, sizes[largest] // 8)  # by no more than 8 at a time: the others may have to give
        sizes[largest] = max(1, min(fitting, sizes[largest] - 1))
    return tuple(sizes)


def _workload(
    name: str, title: str, *, lora: bool, tensors: int, millions: float, shapes: list[tuple[int, Shape]]
) -> Workload:
    """A workload whose sums must come out at the model's own numbers of tensors and (millions of) parameters."""
    workload = Workload(name, title, lora, tuple(shapes))
    assert workload.tensors == tensors, (name, workload.tensors)
    assert abs(workload.elements / 1e6 - millions) < 0.05, (name, workload.elements)
    return workload


_ALL = [
    _workload(
        "llama-1b",
        "Llama-3.2-1B, full",
        lora=False,
        tensors=146,
        millions=1235.8,
        shapes=[
            (33, (2048,)),
            (32, (512, 2048)),
            (32, (2048, 2048)),
            (32, (8192, 2048)),
            (16, (2048, 8192)),
            (1, (128256, 2048)),
        ],
    ),
    _workload(
        "flux-lora",
        "Flux LoRA r = 16, all linear layers of the blocks",
        lora=True,
        tensors=988,
        millions=85.92,
        shapes=[
            (418, (16, 3072)),
            (342, (3072, 16)),
            (76, (12288, 16)),
            (38, (16, 12288)),
            (38, (16, 15360)),
            (38, (9216, 16)),
            (38, (18432, 16)),
        ],
    ),
    _workload(
        "sdxl-lora",
        "SDXL LoRA r = 32",
        lora=True,
        tensors=1444,
        millions=85.11,
        shapes=[
            (552, (1280, 32)),
            (432, (32, 1280)),
            (140, (32, 2048)),
            (100, (640, 32)),
            (80, (32, 640)),
            (60, (32, 5120)),
            (60, (10240, 32)),
            (10, (32, 2560)),
            (10, (5120, 32)),
        ],
    ),
    _workload(
        "llama-8b-lora",
        "Llama-3-8B LoRA r = 16",
        lora=True,
        tensors=448,
        millions=41.94,
        shapes=[
            (192, (16, 4096)),
            (96, (4096, 16)),
            (64, (1024, 16)),
            (64, (14336, 16)),
            (32, (16, 14336)),
        ],
    ),
    _workload(
        "wan-lora",
        "Wan2.1-14B LoRA r = 32",
        lora=True,
        tensors=800,
        millions=153.35,
        shapes=[
            (360, (32, 5120)),
            (360, (5120, 32)),
            (40, (32, 13824)),
            (40, (13824, 32)),
        ],
    ),
    _workload(
        "rank-4-lora",
        "LoRA r = 4 of 264 layers 768 wide",
        lora=True,
        tensors=528,
        millions=1.62,
        shapes=[(264, (4, 768)), (264, (768, 4))],
    ),
    _workload(
        "sdxl-unet",
        "SDXL UNet, full, main shapes",
        lora=False,
        tensors=1631,
        millions=2423.12,  # of the model's 2567: the shapes that occur only a few times are left out
        shapes=[
            (616, (1280,)),
            (381, (1280, 1280)),
            (149, (640,)),
            (120, (1280, 2048)),
            (70, (640, 640)),
            (60, (1280, 5120)),
            (60, (10240, 1280)),
            (60, (10240,)),
            (38, (320,)),
            (20, (640, 2048)),
            (11, (1280, 1280, 3, 3)),
            (10, (5120, 640)),
            (10, (640, 2560)),
            (10, (5120,)),
            (8, (640, 640, 3, 3)),
            (8, (320, 320, 3, 3)),
        ],
    ),
]
WORKLOADS: dict[str, Workload] = {w.name: w for w in _ALL}
