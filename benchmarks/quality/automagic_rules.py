"""Two rules of ai-toolkit's Automagic, written anew from what they do; they bring their own rates, so no schedule.

Both normalise the gradient by a second moment that is kept as means of rows and columns (of each element for vectors),
without bias correction, and scale the update down to a root mean square of at most 1. bfloat16 weights are rounded
stochastically. They differ in the rate.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

EPS = 1e-30


def _normalised(grad: Tensor, state: dict[str, Any], beta2: float) -> Tensor:
    """The gradient over the root of its second moment, of root mean square at most 1."""
    square = grad.square() + EPS
    if grad.dim() < 2:
        v = state.setdefault("v", torch.zeros_like(grad))
        update = grad * v.lerp_(square, 1 - beta2).rsqrt()
    else:
        row = state.setdefault("row", torch.zeros_like(square[..., 0])).lerp_(square.mean(-1), 1 - beta2)
        column = state.setdefault("column", torch.zeros_like(square[..., 0, :])).lerp_(square.mean(-2), 1 - beta2)
        relative = row / row.mean(-1, keepdim=True)
        update = grad * relative.rsqrt().unsqueeze(-1) * column.rsqrt().unsqueeze(-2)
    return update / update.square().mean().sqrt().clamp(min=1.0)


def _subtract(p: Tensor, change: Tensor) -> None:
    """p − change; bfloat16 is rounded up with the probability of the bits that are lost."""
    if p.dtype == torch.float32:
        p.sub_(change)
        return
    bits = (p.float() - change).view(torch.int32)
    p.copy_(((bits + torch.randint_like(bits, 1 << 16)) & -(1 << 16)).view(torch.float32))


class AutomagicV1(torch.optim.Optimizer):
    """A rate for every weight: `bump` more while the update's sign stays, `bump` less when it turns; 8 bits."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        bump: float = 1e-6,
        min_lr: float = 1e-7,
        max_lr: float = 1e-3,
        beta2: float = 0.999,
        weight_decay: float = 0.0,
    ) -> None:
        options = {"bump": bump, "min_lr": min_lr, "max_lr": max_lr, "beta2": beta2, "weight_decay": weight_decay}
        super().__init__(params, {"lr": lr, **options})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        update = _normalised(p.grad.float(), state, group["beta2"])  # type: ignore[union-attr]
        positive = update > 0
        if "codes" in state:
            turned = torch.where(positive == state["positive"], 1.0, -1.0)
            rates = state["codes"] * state["scale"] + group["bump"] * turned
        else:
            rates = torch.full_like(update, group["lr"])
        rates.clamp_(group["min_lr"], group["max_lr"])
        state["positive"], state["scale"] = positive, rates.max() / 127
        state["codes"] = (rates / state["scale"]).round().to(torch.int8)
        _subtract(p, rates * (update + group["weight_decay"] * p.float()))

    def get_avg_learning_rate(self) -> float:
        """The mean over all weights."""
        rates = [s["codes"].float().mean() * s["scale"] for s in self.state.values()]
        return float(torch.stack(rates).mean()) if rates else self.param_groups[0]["lr"]


class AutomagicV3(torch.optim.Optimizer):
    """One rate for a group, multiplied by exp(vote) every step.

    Weights whose last `history` updates all had one sign vote up, those whose sign turned every time vote down, each
    with the size of its update; the vote is the difference of their sums over the sum of all sizes.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        beta2: float = 0.999,
        history: int = 8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "beta2": beta2, "history": history, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            rate = group.setdefault("rate", torch.tensor(float(group["lr"]), device=params[0].device))
            votes = torch.stack([self._update(p, group, rate) for p in params]).sum(0)
            rate.mul_(torch.exp(votes[0] / votes[1].clamp(min=EPS))).clamp_(1e-30, 1e3)

    def _update(self, p: Tensor, group: dict[str, Any], rate: Tensor) -> Tensor:
        """[votes up minus votes down, all]; zeros until the history is full."""
        state, history = self.state[p], group["history"]
        update = _normalised(p.grad.float().nan_to_num(0, 0, 0), state, group["beta2"]).clamp(-1, 1)  # type: ignore[union-attr]
        step = state["step"] = state.get("step", 0) + 1
        # The last signs, newest in bit 0; alternation is where a turned sign at every second place makes all alike.
        signs = state.get("signs", torch.zeros_like(update, dtype=torch.int32))
        state["signs"] = signs = ((signs << 1) | (update > 0)) & ((1 << history) - 1)
        _subtract(p, rate * (update + group["weight_decay"] * p.float()))
        if step < history:
            return torch.zeros(2, device=p.device)
        every_second = int("01" * 32, 2) & ((1 << history) - 1)
        size = update.abs()
        up = (signs == 0) | (signs == (1 << history) - 1)
        turns = signs ^ every_second
        down = (turns == 0) | (turns == (1 << history) - 1)
        return torch.stack([(size * up).sum() - (size * down).sum(), size.sum()])

    def get_avg_learning_rate(self) -> float:
        group = self.param_groups[0]
        return float(group.get("rate", group["lr"]))
