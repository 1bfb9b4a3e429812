"""How closely bfloat16 weights follow float32 ones, by what stands in for the float32 copy.

    python benchmarks/master_weights.py --steps 400 --seeds 3

A byte-level transformer of 3.3 M parameters learns Python's own sources. Its forward and backward pass are bfloat16 in
every run; the runs differ in where the weights live: a float32 master copy (4 more bytes a parameter), or bfloat16
alone under `master="none"`, `"stochastic"` or `"ecc8"` (0, 0 and 1 more bytes). All see the same batches.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import byte_model
import measure
import torch
from torch import Tensor, nn
from tqdm import tqdm

from automagic_bnb import Automagic32bit
from automagic_bnb.quantization import join_master

MASTERS = ("float32", "none", "stochastic", "ecc8")


def train(master: str, seed: int, args: argparse.Namespace, device: torch.device) -> Iterator[Tensor | float]:
    """The weights (float32, flat) at the start and after each quarter of the steps, then the validation loss."""
    torch.manual_seed(seed)
    model = byte_model.Bytes(args.width, args.layers).to(device, torch.bfloat16)
    weights = list(model.parameters())
    if master == "float32":
        weights = [nn.Parameter(p.detach().float()) for p in weights]
    options = {} if master == "float32" else {"master": master}
    optimizer = Automagic32bit(weights, lr=args.lr, weight_decay=0.01, **options)
    generator = torch.Generator().manual_seed(seed)
    data, held_out = byte_model.sources(device)
    yield held(optimizer, weights)
    for step in tqdm(range(1, args.steps + 1), desc=f"{master}, seed {seed}", leave=False):
        optimizer.param_groups[0]["lr"] = byte_model.scheduled(args.lr, step, args.steps)
        model.zero_grad()
        byte_model.loss_of(model, data, generator, args.batch).backward()
        if master == "float32":
            for p, wide in zip(model.parameters(), weights, strict=True):
                wide.grad = p.grad.float() if p.grad is not None else None
        optimizer.step()
        if master == "float32":
            with torch.no_grad():
                for p, wide in zip(model.parameters(), weights, strict=True):
                    p.copy_(wide)
        if step % (args.steps // 4) == 0:
            yield held(optimizer, weights)
    yield byte_model.validation_loss(model, held_out, args.batch, 20)


def held(optimizer: Automagic32bit, weights: list[nn.Parameter]) -> Tensor:
    """All that is known of the weights, the bits of ecc8 included, as one float32 vector."""
    parts = []
    for p in weights:
        residual = optimizer.state[p].get("master_residual")
        value = p.detach() if residual is None else join_master(p.detach(), residual)
        parts.append(value.float().flatten())
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "master_weights.md")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for seed in range(args.seeds):
        exact: list[Tensor] = []
        for master in MASTERS:
            *weights, loss = train(master, seed, args, device)
            exact = exact or weights  # type: ignore[assignment]
            moved = (exact[-1] - exact[0]).norm()
            apart = [float((x - y).norm() / moved) for x, y in zip(weights[1:], exact[1:], strict=True)]
            rows.append((master, seed, apart, loss))
            print(master, seed, [f"{x:.4f}" for x in apart], f"{loss:.4f}", flush=True)
    lines = [
        "# What stands in for float32 weights",
        "",
        f"`{measure.command()}`",
        "",
        "Distance of the weights from those of the run with a float32 copy, over how far that moved, after each",
        f"quarter of {args.steps} steps; validation loss at the end.",
        "",
    ]
    header = ["master", "seed", "1/4", "1/2", "3/4", "end", "validation loss"]
    cells = [[m, str(seed), *(f"{x:.4f}" for x in apart), f"{loss:.4f}"] for m, seed, apart, loss in rows]
    table = measure.markdown_table(header, cells)
    environment = measure.describe(measure.environment(device))
    args.out.write_text("\n".join([*lines, table, "", environment, ""]))
    print(args.out.read_text())


if __name__ == "__main__":
    main()
