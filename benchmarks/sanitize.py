"""All kernels over odd shapes, for a checker of memory accesses: no access may fall outside, no weight may be lost.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/sanitize.py

Without caching each tensor is an allocation of its own, so that an access beyond its end is seen.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from automagic_bnb import Automagic

SHAPES = (
    (7, 9), (300,), (1,), (), (3, 5, 3, 3), (5, 513), (16, 40), (40, 16), (257,), (24, 264), (251, 24), (9, 256),
    (300, 16), (33, 15), (64, 70), (4, 300),
    (300, 4),
)  # fmt: skip
RUNS: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.bfloat16, {"optim_bits": 8}),
    (torch.bfloat16, {"optim_bits": 32}),
    (torch.bfloat16, {"optim_bits": 8, "factored": True}),
    (torch.bfloat16, {"optim_bits": 8, "master": "ecc8"}),
    (torch.float32, {"optim_bits": 8, "auto_lr": True, "percentile_clipping": 50}),
    (torch.float16, {"optim_bits": 8, "factored": True, "warmup_steps": 5}),
    (torch.bfloat16, {"optim_bits": 8, "mask_bits": 4}),
    (torch.bfloat16, {"optim_bits": 8, "factored": True, "mask_bits": 4, "mean_bits": 16, "warmup_steps": 5}),
    (torch.bfloat16, {"optim_bits": 8, "factored": True, "mask_bits": 0, "came": False, "auto_lr": True}),
    (torch.bfloat16, {"optim_bits": 8, "factored": True, "min_8bit_size": 10**9}),
    (torch.bfloat16, {"optim_bits": 8, "factored": True, "lora_direction": "orthogonal", "lora_mask": False}),
    (torch.bfloat16, {"optim_bits": 32, "lora_direction": "orthogonal", "master": "ecc8", "auto_lr": True}),
]
STEPS = 11
"""With the low-rank step, the tenth, and one after it."""


def run(dtype: torch.dtype, options: dict[str, Any], device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...], scale: float) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    p = [torch.nn.Parameter(draw(shape, 0.1)) for shape in SHAPES]
    options = {"lr": 1e-2, "min_8bit_size": 0, "lora_mask": True, **options}
    opt = Automagic(p, lora=True, backend="triton", **options)
    for step in range(STEPS):
        for x in p:
            x.grad = draw(tuple(x.shape), 1.0)
            if step == 3 and x.numel() > 2:
                x.grad.view(-1)[1] = float("nan")
        opt.step()
    assert all(torch.isfinite(x).all() for x in p)


def main() -> int:
    parser = argparse.ArgumentParser(description="All kernels over odd shapes, to be run under compute-sanitizer")
    parser.add_argument("--device", default="cuda", help="torch device (default: cuda)")
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="the I-th of N shares")
    args = parser.parse_args()
    for dtype, options in RUNS[args.share[0] :: args.share[1]]:
        run(dtype, options, torch.device(args.device))
        print(f"ran through: {dtype}, {options}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
