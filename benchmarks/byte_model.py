"""A small language model over bytes, and Python's standard library to train it on.

The model that benchmarks train where the choice of model is of no account: it is quick, and its text is on every
machine that has Python.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

CONTEXT, HEADS = 256, 4


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Bytes(nn.Module):
    """A language model over bytes."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(tokens) + self.position.weight)))


def sources(device: torch.device) -> tuple[Tensor, Tensor]:
    """Python's standard library as bytes, for training and for validation."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b"".join(path.read_bytes() for path in files)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    return data[: -len(data) // 10], data[-len(data) // 10 :]


def loss_of(model: nn.Module, data: Tensor, generator: torch.Generator, batch: int) -> Tensor:
    """The mean cross-entropy of the next byte, over so many windows that the generator chooses."""
    start = torch.randint(0, len(data) - CONTEXT - 1, (batch, 1), generator=generator)
    window = data[(start + torch.arange(CONTEXT + 1)).to(data.device)].long()
    return functional.cross_entropy(model(window[:, :-1]).float().flatten(0, 1), window[:, 1:].flatten())


def scheduled(lr: float, step: int, steps: int) -> float:
    """A warm-up of 20 steps, then a linear decay to a tenth."""
    return lr * min(1.0, step / 20) * (1 - 0.9 * step / steps)


@torch.no_grad()
def validation_loss(model: nn.Module, held_out: Tensor, batch: int, batches: int) -> float:
    """The mean over batches that are the same for every model."""
    generator = torch.Generator().manual_seed(1)
    return sum(loss_of(model, held_out, generator, batch).item() for _ in range(batches)) / batches
