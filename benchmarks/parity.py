"""Our kernels held against the plain-torch rule: figures of kernels that fail this check mean nothing.

`check_parity` is what a benchmark asks before it times anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peers import Peer, automagic
from torch import Tensor
from workloads import GRADIENT_STD, WEIGHT_STD

STEPS = 3
SHAPES = [(1,), (255,), (257,), (4099,), (33, 129), (3, 1000), (65, 16), (16, 1031), (7, 5, 3, 3), (40, 9, 3, 3)]
LARGE = [(301, 515), (256, 320)]  # make the fractions below mean something; too slow for Triton's interpreter
LORA = {(65, 16), (16, 1031)}
OPTIONS = {"seed": 0, "lr": 1e-3, "weight_decay": 1.0, "min_8bit_size": 1024}
"""Enough decay to show in one step, and small odd tensors in 8 bits too."""

MAX_DIFFERING = 1e-3
"""Codes and 16-bit parameters: where a value lies on the line between two of them, the two may choose differently."""
MAX_JUMP = 1
"""Such codes are neighbours."""
TOLERANCE = 1e-4
"""Relative, for float32 quantities: far above rounding, far below any wrong formula."""
MAX_OUTLIERS = 2e-3
"""Elements beyond TOLERANCE: the rule has thresholds (cautious sign, edges), and rounding can tip a block over one."""
MAX_NORM = 0.02
"""‖ours − rule‖ / ‖rule‖ of any single tensor: none may be wrong, however small."""


@dataclass
class Tally:
    """Differences in one quantity over all tensors."""

    limit: float
    elements: int = 0
    differing: int = 0
    jump: int = 0
    norm: float = 0.0

    def add(self, differing: Tensor, jump: int = 0, norm: float = 0.0) -> None:
        self.elements += differing.numel()
        self.differing += int(differing.sum())
        self.jump = max(self.jump, jump)
        self.norm = norm if not norm <= self.norm else self.norm  # a NaN stays

    def complaint(self) -> str:
        if not self.norm <= MAX_NORM:
            return f"relative error {self.norm:.2g} in one tensor (allowed {MAX_NORM:g})"
        if self.jump > MAX_JUMP:
            return f"codes {self.jump} apart (allowed {MAX_JUMP})"
        if self.differing > self.limit * self.elements:
            return f"{self.differing} of {self.elements} elements differ (allowed {self.limit:.1%})"
        return ""


def _relative_error(a: Tensor, b: Tensor) -> float:
    error, norm = (torch.linalg.vector_norm(x.float()).item() for x in (a - b, b))
    return error / norm if norm > 0 else float(error != 0)


class Comparison:
    """Our tensors against the rule's after the same step: `add` each pair, then read `complaints`."""

    def __init__(self) -> None:
        self.tallies: dict[str, Tally] = {}
        self.failures: list[str] = []

    def add_parameter(self, ours: Tensor, rule: Tensor, start: Tensor) -> None:
        moved, should = ours.float() - start.float(), rule.float() - start.float()
        if ours.dtype == torch.float32:
            self._floats("update", moved, should)
        else:  # rounded stochastically, with the same random bits
            self._tally("parameter", MAX_DIFFERING).add(~(ours == rule), norm=_relative_error(moved, should))

    def add_state(self, ours: dict[str, Any], rule: dict[str, Any]) -> None:
        if ours.keys() != rule.keys():
            self.failures.append(f"states {sorted(ours)} against {sorted(rule)}")
            return
        for key, b in rule.items():
            a = ours[key]
            if not isinstance(b, Tensor):
                self.failures += [] if a == b else [f"{key}: {a} against {b}"]
            elif b.dtype == torch.uint8:
                self._codes(key, a.int(), b.int())
            else:
                self._floats(key, a, b)

    def complaints(self) -> list[str]:
        return self.failures + [f"{key}: {text}" for key, t in self.tallies.items() if (text := t.complaint())]

    def _tally(self, key: str, limit: float) -> Tally:
        return self.tallies.setdefault(key, Tally(limit))

    def _codes(self, key: str, a: Tensor, b: Tensor) -> None:
        tally = self._tally(key, MAX_DIFFERING)
        if key == "lr_mask4":  # two elements a byte
            a, b = (torch.stack([x & 15, x >> 4], dim=-1) for x in (a, b))
        if key.startswith("lr_mask"):  # the exponent, and in bit 0 the polarity of the gradient
            tally.add((a & 1) != (b & 1))
            a, b = a >> 1, b >> 1
        apart = (a - b).abs()
        tally.add(apart > 0, jump=int(apart.max()))

    def _floats(self, key: str, a: Tensor, b: Tensor) -> None:
        allowed = TOLERANCE * (b.abs() + b.square().mean().sqrt())
        self._tally(key, MAX_OUTLIERS).add(~((a - b).abs() <= allowed), norm=_relative_error(a, b))


def check_parity(peer: Peer, dtype: torch.dtype, device: torch.device) -> list[str]:
    """What is wrong with our kernels under this variant's options, over a few steps on odd shapes; empty if nothing.

    After each step ours goes on from the rule's tensors: a code that fell the other way would otherwise be decoded,
    updated and encoded again, and near zero the next one lies several codes away.
    """
    shapes = SHAPES + (LARGE if device.type == "cuda" else [])
    generator = torch.Generator(device).manual_seed(1)

    def draw(std: float) -> list[Tensor]:
        return [(torch.randn(s, generator=generator, device=device) * std).to(dtype) for s in shapes]

    starts = draw(WEIGHT_STD)

    def begin(backend: str) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        params = [torch.nn.Parameter(value.clone()) for value in starts]
        for p, shape in zip(params, shapes, strict=True):
            p._is_lora_layer = shape in LORA  # type: ignore[attr-defined]
        return params, automagic(params, **{**peer.options, **OPTIONS, "backend": backend})

    ours, rule = begin("triton"), begin("torch")
    found: list[str] = []
    for number in range(1, STEPS + 1):
        before = [p.detach().clone() for p in rule[0]]
        gradients = draw(GRADIENT_STD)
        _step(*ours, gradients)
        _step(*rule, gradients)
        found += [f"step {number}, {text}" for text in _compare(ours, rule, before)]
        if number == 1:  # the check must notice a wrong step
            altered = begin("torch")
            _step(*altered, [torch.where(torch.rand_like(g, dtype=torch.float32) < 0.02, -g, g) for g in gradients])
            found += [] if _compare(ours, altered, before) else ["the check does not notice negated gradients"]
        if found:
            break
        _continue_from(ours, rule)
    return found


def _step(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, gradients: list[Tensor]) -> None:
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()
    optimizer.step()


def _compare(ours: Any, rule: Any, before: list[Tensor]) -> list[str]:
    comparison = Comparison()
    for a, b, start in zip(ours[0], rule[0], before, strict=True):
        comparison.add_parameter(a.detach(), b.detach(), start)
        comparison.add_state(ours[1].state[a], rule[1].state[b])
    return comparison.complaints()


@torch.no_grad()
def _continue_from(ours: Any, rule: Any) -> None:
    for a, b in zip(ours[0], rule[0], strict=True):
        a.copy_(b)
        for key, value in rule[1].state[b].items():
            if isinstance(value, Tensor):
                ours[1].state[a][key].copy_(value)
