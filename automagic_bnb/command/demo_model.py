"""The demo's model: a small class-conditional flow-matching generator of 8×8 images, and its LoRA."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import Parameter

PIXELS = 64
WIDTH = 512
"""Hidden width. From rank 8 on every LoRA matrix then has 4096 elements, from which states are kept in 8 bits."""
BLOCKS = 3
SAMPLING_STEPS = 50


RANDOM_STREAMS = ("split", "base weights", "LoRA weights", "batches", "validation", "samples")


def random_stream(seed: int, purpose: str) -> torch.Generator:
    """The CPU's random numbers for one of the `RANDOM_STREAMS`, independent of the others and of global state."""
    return torch.Generator().manual_seed(len(RANDOM_STREAMS) * seed + RANDOM_STREAMS.index(purpose))


class FlowBatch(NamedTuple):
    """A flow-matching problem: images and noise, float32 [n, 64]; times in 0…1, float32 [n]; labels, int64 [n]."""

    images: Tensor
    noise: Tensor
    times: Tensor
    labels: Tensor


class ResidualBlock(nn.Module):
    """h + down(silu(up(norm(h)) + condition(c))), with h and c of shape [n, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.condition = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        return hidden + self.down(F.silu(self.up(self.norm(hidden)) + self.condition(condition)))


class VelocityModel(nn.Module):
    """Predicts the velocity of a noisy image at a time, given its class: ([n, 64], [n], [n]) → [n, 64].

    Classes are fixed random codes. So a class that the base never saw has a code of its own from the start, and what
    the model makes of it is up to `class_projection`, which the LoRA adapts.
    """

    frequencies: Tensor
    class_codes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, math.log(1000), PIXELS // 2)))
        self.register_buffer("class_codes", torch.randn(10, WIDTH))
        self.time_projection = nn.Linear(PIXELS, WIDTH)
        self.class_projection = nn.Linear(WIDTH, WIDTH)
        self.image_in = nn.Linear(PIXELS, WIDTH)
        self.blocks = nn.ModuleList(ResidualBlock() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.velocity_out = nn.Linear(WIDTH, PIXELS)

    def forward(self, noisy: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        angles = times[:, None] * self.frequencies
        time_features = self.time_projection(torch.cat([angles.sin(), angles.cos()], dim=1))
        condition = F.silu(time_features + self.class_projection(self.class_codes[labels]))
        hidden = self.image_in(noisy)
        for block in self.blocks:
            hidden = block(hidden, condition)
        return self.velocity_out(self.norm(hidden))


def make_base(seed: int, device: torch.device) -> VelocityModel:
    """A freshly initialised model; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_stream(seed, "base weights").initial_seed())
        return VelocityModel().to(device)


def flow_matching_loss(model: nn.Module, batch: FlowBatch) -> Tensor:
    """Conditional flow matching on straight paths (arXiv 2210.02747, 2209.03003); a 0-d tensor, mean over pixels.

    x_t = (1 - t) x_0 + t x_1 runs from noise x_0 to the image x_1; the model predicts its velocity x_1 - x_0.
    """
    t = batch.times[:, None]
    predicted = model((1 - t) * batch.noise + t * batch.images, batch.times, batch.labels)
    return F.mse_loss(predicted, batch.images - batch.noise)


@torch.no_grad()
def sample(model: VelocityModel, labels: Tensor, seed: int) -> Tensor:
    """Images [n, 64] of the classes `labels` [n]: Euler's method along the velocity, from noise fixed by the seed."""
    device = model.class_codes.device
    noise = torch.randn(len(labels), PIXELS, generator=random_stream(seed, "samples"))
    images, labels = noise.to(device), labels.to(device)
    for i in range(SAMPLING_STEPS):
        times = torch.full((len(labels),), i / SAMPLING_STEPS, device=device)
        images = images + model(images, times, labels) / SAMPLING_STEPS
    return images


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable product of two thin matrices: W x + b + B A x.

    A is [rank, in] and random, B is [out, rank] and zero, so the layer starts out as the frozen one.
    """

    def __init__(self, frozen: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.frozen = frozen
        lora_a = torch.randn(rank, frozen.in_features, generator=generator) / math.sqrt(frozen.in_features)
        self.lora_A = Parameter(lora_a.to(frozen.weight))
        self.lora_B = Parameter(frozen.weight.new_zeros(frozen.out_features, rank))
        for matrix in (self.lora_A, self.lora_B):
            matrix._is_lora_layer = True  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + F.linear(F.linear(x, self.lora_A), self.lora_B)


def with_lora(base: VelocityModel, rank: int, seed: int) -> VelocityModel:
    """A frozen copy of the base whose class projection and residual blocks carry a LoRA, the only trainable part."""
    model = copy.deepcopy(base).requires_grad_(False)
    generator = random_stream(seed, "LoRA weights")
    for parent, name in [(model, "class_projection")] + [(b, n) for b in model.blocks for n in ("up", "down")]:
        setattr(parent, name, LoRALinear(getattr(parent, name), rank, generator))
    return model


def trainable(model: nn.Module) -> list[Parameter]:
    """The parameters that an optimizer is to move."""
    return [p for p in model.parameters() if p.requires_grad]


def lora_matrices(model: VelocityModel) -> dict[str, list[Parameter]]:
    """The LoRA's matrices by kind, "lora_A" and "lora_B", in the order of the layers."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoRALinear)]
    return {"lora_A": [layer.lora_A for layer in layers], "lora_B": [layer.lora_B for layer in layers]}
