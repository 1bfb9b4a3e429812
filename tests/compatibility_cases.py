"""A small network, its loss and its training, for the tests of the places an optimizer is put into."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

BIG = (64, 64)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same weights at every call."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.1
    return model.to(dtype)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    """A loss whose data hang on the step alone."""
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    x = torch.randn(16, 64, generator=generator).to(dtype)
    return (model(x) - x.flip(1)).float().square().mean()


def fit(model: nn.Module, opt: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        opt.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses
