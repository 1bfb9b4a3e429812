"""The models: a byte GPT, a diffusion transformer, a convolutional UNet, a published encoder; and LoRA."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import data
import torch
from torch import Tensor, nn
from torch.nn import functional

HEADS = 4


def attention(qkv: Tensor, heads: int, causal: bool) -> Tensor:
    """[batch, length, 3 width] to [batch, length, width]."""
    batch, length, _ = qkv.shape
    q, k, v = qkv.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    return functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """A transformer's layer. With a condition (adaptive layer norm), its shifts, scales and gates follow from it."""

    def __init__(self, width: int, causal: bool, conditioned: bool) -> None:
        super().__init__()
        self.causal = causal
        self.norm1 = nn.LayerNorm(width, elementwise_affine=not conditioned)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=not conditioned)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.modulation = nn.Linear(width, 6 * width) if conditioned else None

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.modulation is None:
            x = x + self.out(attention(self.qkv(self.norm1(x)), HEADS, self.causal))
            return x + self.down(functional.gelu(self.up(self.norm2(x))))
        parts = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        x = x + gate1 * self.out(attention(self.qkv(self.norm1(x) * (1 + scale1) + shift1), HEADS, self.causal))
        return x + gate2 * self.down(functional.gelu(self.up(self.norm2(x) * (1 + scale2) + shift2)))


def _normal(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


class GPT(nn.Module):
    """A language model over bytes: int64 [batch, length] to logits [batch, length, 256]."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(256, width), nn.Embedding(data.CONTEXT, width)
        self.blocks = nn.ModuleList([Block(width, causal=True, conditioned=False) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        _normal(self)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Time(nn.Module):
    """A point of time in 0 … 1, [batch], as a vector [batch, width]: waves, then two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        frequencies = torch.exp(torch.linspace(0, math.log(1000), 32))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.first, self.second = nn.Linear(64, width), nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies.float()
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.first.weight.dtype)
        return self.second(functional.silu(self.first(waves)))


class DiT(nn.Module):
    """A diffusion transformer over patches of 4 × 4 pixels; images [batch, 3, 32, 32] and times [batch] to images."""

    PATCH = 4

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        tokens, inner = (data.CROP // self.PATCH) ** 2, 3 * self.PATCH**2
        self.time, self.embed, self.position = Time(width), nn.Linear(inner, width), nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList([Block(width, causal=False, conditioned=True) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, inner)
        _normal(self)
        for module in [self.head, *(block.modulation for block in self.blocks)]:
            nn.init.zeros_(module.weight)  # begins as the identity, which is what adaptive layer norm is built for

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        condition = functional.silu(self.time(t))
        patches = functional.pixel_unshuffle(x, self.PATCH).flatten(2).transpose(1, 2)
        h = self.embed(patches.to(self.embed.weight.dtype)) + self.position.weight
        for block in self.blocks:
            h = block(h, condition)
        side = data.CROP // self.PATCH
        return functional.pixel_shuffle(self.head(self.norm(h)).transpose(1, 2).unflatten(2, (side, side)), self.PATCH)


class Residual(nn.Module):
    def __init__(self, inner: int, outer: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inner), nn.GroupNorm(8, outer)
        self.conv1, self.conv2 = nn.Conv2d(inner, outer, 3, padding=1), nn.Conv2d(outer, outer, 3, padding=1)
        self.time = nn.Linear(width, outer)
        self.skip = nn.Conv2d(inner, outer, 1, bias=False) if inner != outer else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x))) + self.time(condition)[:, :, None, None]
        return self.skip(x) + self.conv2(functional.silu(self.norm2(h)))


class UNet(nn.Module):
    """Convolutions at three sizes, with a bridge at each; images [batch, 3, 32, 32] and times [batch] to images."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(layers)]
        self.time, self.first = Time(64), nn.Conv2d(3, width, 3, padding=1)
        before = [width, *widths[:-1]]
        self.down = nn.ModuleList([Residual(a, b, 64) for a, b in zip(before, widths, strict=True)])
        self.middle = Residual(widths[-1], widths[-1], 64)
        self.up = nn.ModuleList([Residual(2 * b, a, 64) for a, b in zip(before[::-1], widths[::-1], strict=True)])
        self.norm, self.last = nn.GroupNorm(8, width), nn.Conv2d(width, 3, 3, padding=1)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        condition, bridges = functional.silu(self.time(t)), []
        h = self.first(x.to(self.first.weight.dtype))
        for i, block in enumerate(self.down):
            h = block(functional.avg_pool2d(h, 2) if i else h, condition)
            bridges.append(h)
        h = self.middle(h, condition)
        for i, block in enumerate(self.up):
            h = block(torch.cat([h, bridges.pop()], dim=1), condition)
            h = functional.interpolate(h, scale_factor=2.0) if i < len(self.up) - 1 else h
        return self.last(functional.silu(self.norm(h)))


class EncoderLayer(nn.Module):
    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out, self.norm1 = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-12)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        qkv = torch.cat([self.query(x), self.key(x), self.value(x)], dim=-1)
        x = self.norm1(x + self.out(attention(qkv, self.heads, causal=False)))
        return self.norm2(x + self.down(functional.gelu(self.up(x))))


class Encoder(nn.Module):
    """The published encoder (BERT's architecture) with a new linear head over its mean: tokens to logits."""

    def __init__(self, classes: int, config: dict[str, int]) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.word = nn.Embedding(config["vocab_size"], width)
        self.position = nn.Embedding(config["max_position_embeddings"], width)
        self.kind, self.norm = nn.Embedding(2, width), nn.LayerNorm(width, eps=1e-12)
        heads, inner = config["num_attention_heads"], config["intermediate_size"]
        self.layers = nn.ModuleList([EncoderLayer(width, inner, heads) for _ in range(config["num_hidden_layers"])])
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.word(tokens) + self.position.weight[: tokens.shape[1]] + self.kind.weight[0])
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(dim=1))


_PUBLISHED = {
    "attention.self.query": "query", "attention.self.key": "key", "attention.self.value": "value",
    "attention.output.dense": "out", "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "up", "output.dense": "down", "output.LayerNorm": "norm2",
    "embeddings.word_embeddings": "word", "embeddings.position_embeddings": "position",
    "embeddings.token_type_embeddings": "kind", "embeddings.LayerNorm": "norm", "encoder.layer": "layers",
}  # fmt: skip


def _our_name(name: str) -> str:
    for theirs, ours in _PUBLISHED.items():  # the longer names stand first
        name = name.replace(theirs, ours)
    return name


def encoder(folder: Path, classes: int) -> Encoder:
    """The encoder with its published weights, in float32."""
    from safetensors.torch import load_file

    model = Encoder(classes, json.loads((folder / "config.json").read_text()))
    weights = {_our_name(k): v.float() for k, v in load_file(str(folder / "model.safetensors")).items()}
    known = {k: v for k, v in weights.items() if k in model.state_dict()}  # not the pooler, nor index buffers
    missing, _ = model.load_state_dict(known, strict=False)
    assert set(missing) == {"head.weight", "head.bias"}, missing
    return model


# --- LoRA ------------------------------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """A frozen layer plus scale · B A, with A and B layers of rank r; B begins at 0."""

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), scale
        if isinstance(base, nn.Linear):
            self.lora_A: nn.Module = nn.Linear(base.in_features, rank, bias=False)
            self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        else:
            size, step, pad = base.kernel_size, base.stride, base.padding
            self.lora_A = nn.Conv2d(base.in_channels, rank, size, step, pad, bias=False)
            self.lora_B = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.lora_B(self.lora_A(x))


def add_lora(model: nn.Module, rank: int, scale: float, trained: Iterable[str]) -> None:
    """Freeze the model but for the parts named in `trained`, and put LoRA beside each layer of its blocks."""
    model.requires_grad_(False)
    for name in trained:
        model.get_submodule(name).requires_grad_(True)
    for parent in list(model.modules()):
        if isinstance(parent, (Block, Residual, EncoderLayer)):
            for name, child in list(parent.named_children()):
                if isinstance(child, (nn.Linear, nn.Conv2d)):
                    setattr(parent, name, LoRA(child, rank, scale))


FAMILIES: dict[str, Callable[[int, int], nn.Module]] = {"gpt": GPT, "dit": DiT, "unet": UNet}
