"""What the tests of the kernels share: where they run, gradients, and the comparison of two optimizers.

The same tests run compiled where there is a CUDA device and in Triton's interpreter on the CPU elsewhere (conftest.py
switches it on).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from automagic_bnb import reference
from automagic_bnb import state as st
from automagic_bnb.optimizer import Automagic

COMPILED = torch.cuda.is_available()
DEVICE = torch.device("cuda" if COMPILED else "cpu")
NEEDS_GPU = (pytest.mark.gpu, pytest.mark.skipif(not COMPILED, reason="no CUDA device to compile the kernels for"))

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BITS = {"32bit": 32, "8bit": 8}

Shapes = tuple[tuple[int, ...], ...]
Gradients = Callable[[tuple[int, ...], int, int], Tensor]

ALL_SHAPES: Shapes = (
    (7, 9), (300,), (1,), (), (3, 5, 3, 3), (5, 513), (16, 40), (40, 16), (2, 2), (256,), (257,), (24, 264),
)  # fmt: skip
"""Short last blocks, rows of multiples of 8 and not, rows longer and shorter than a block, several programs."""
SOME_SHAPES: Shapes = ((7, 9), (300,), (), (3, 5, 3, 3), (3, 264), (16, 40), (2, 2))
"""Fewer blocks, of every kind: the interpreter takes some 20 ms for each."""
FEW_SHAPES: Shapes = ((5, 52), (3, 24), (300,), (2,))
"""For comparisons of kernel with kernel."""


# --- parameters and gradients -------------------------------------------------------------------------------------


def parameters(shapes: Shapes, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """The same values at every call."""
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter((torch.randn(s, generator=generator) * 0.1).to(dtype).to(DEVICE)) for s in shapes]


def gradient(shape: tuple[int, ...], index: int, step: int) -> Tensor:
    """float32 on the CPU, a function of its arguments alone: of many orders of magnitude, with a constant part.

    The second step's are three times as large, which the clipping answers, and the third's a twentieth, which makes
    every block background.
    """
    generator = torch.Generator().manual_seed(1000 * step + index)
    noise = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()
    return (noise + 0.4) * (1e-3 * (1, 3, 0.05)[(step - 1) % 3])


def give(p: Any, grad: Tensor | None, dtype: torch.dtype | None = None) -> None:
    """Make this the gradient of a parameter, in a dtype that may differ from the parameter's."""
    p.grad = None
    if grad is not None:
        p.grad = torch.zeros_like(p)
        p.grad.data = grad.to(p.device, dtype or p.dtype)


def optimizer(params: Iterable[Any], backend: str, storage: str = "8bit", **options: Any) -> Automagic:
    """Rates and decay so large that the update, not the parameter, makes most of what is compared."""
    defaults = {"lr": 0.02, "weight_decay": 0.1, "seed": 7, "optim_bits": BITS[storage], "min_8bit_size": 0}
    return Automagic(params, backend=backend, **{**defaults, **options})


def parameters_of(opt: Automagic) -> list[Any]:
    return [p for group in opt.param_groups for p in group["params"]]


def synchronise(source: Automagic, target: Automagic) -> None:
    """Give the target all that the source's next step depends on, bit for bit."""
    for p, q in zip(parameters_of(source), parameters_of(target), strict=True):
        q.data.copy_(p.data)
        for name, value in source.state[p].items():
            if isinstance(value, Tensor) and name in target.state[q]:
                target.state[q][name].copy_(value)
            else:
                target.state[q][name] = copy.deepcopy(value)
    for ours, theirs in zip(source.param_groups, target.param_groups, strict=True):
        for name in ("auto_lr_rate", "auto_lr_step", "effective_lr"):
            if name in ours:
                theirs[name] = copy.deepcopy(ours[name])


# --- comparison -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tolerance:
    """How far kernel and reference may be apart.

    Both are float32 throughout, in another order of additions and with other instructions for 1/x, 1/sqrt(x), 2^x: a
    few units of 2^-24 each.
    """

    floats: float
    """Of float32 tensors, over the largest magnitude within the block of 256."""
    theta: float
    """Of a float32 θ, likewise."""
    share: float
    """Of codes and of narrow θ, how many may differ: those whose exact value lies that close to a rounding threshold.
    Two of each kind may in any case."""
    distance: int
    """And by how many codes, or spacings of θ's dtype."""


ONE_STEP = Tolerance(floats=4e-6, theta=2e-6, share=2e-4, distance=1)
"""From equal states. Measured in the interpreter: see `test_kernels`."""
FREE_32 = replace(ONE_STEP, floats=1e-5, theta=1e-5)
"""Four steps without resynchronising, 32-bit states: nothing amplifies the rounding."""
FREE_8 = Tolerance(floats=0.03, theta=0.02, share=0.02, distance=3)
"""The same with codes: one that fell on the other side (up to 0.3 of its value, where values are small) moves its
block's statistics, and with them every rate of the block a little."""


@dataclass
class Differences:
    """What was seen, by name of the tensor: relative errors of blocks, and distances of codes."""

    floats: dict[str, list[Tensor]] = field(default_factory=dict)
    codes: dict[str, list[Tensor]] = field(default_factory=dict)
    exact: list[str] = field(default_factory=list)
    """Names of what must be equal and was not."""

    def take(self, kernel: Automagic, torch_: Automagic) -> None:
        """Add the differences between two optimizers over the same parameters."""
        for p, q in zip(parameters_of(kernel), parameters_of(torch_), strict=True):
            ours, theirs = kernel.state.get(p, {}), torch_.state.get(q, {})
            if ours.keys() != theirs.keys():
                self.exact.append(f"keys {sorted(ours.keys() ^ theirs.keys())}")
            self._take_theta(p.detach(), q.detach())
            for name in ours.keys() & theirs.keys():
                self._take_state(name, ours[name], theirs[name])
        for ours, theirs in zip(kernel.param_groups, torch_.param_groups, strict=True):
            if "auto_lr_rate" in ours or "auto_lr_rate" in theirs:
                self._take_floats("auto_lr_rate", ours["auto_lr_rate"], theirs["auto_lr_rate"])

    def _take_theta(self, p: Tensor, q: Tensor) -> None:
        if p.dtype == torch.float32:
            self._take_floats("theta", p, q)
        else:
            self.codes.setdefault("theta", []).append((_ordinals(p) - _ordinals(q)).abs().view(-1).cpu())

    def _take_state(self, name: str, ours: Any, theirs: Any) -> None:
        if not isinstance(ours, Tensor):
            if ours != theirs:
                self.exact.append(name)
        elif ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            self.exact.append(f"{name}: {ours.dtype} {tuple(ours.shape)} against {theirs.dtype} {tuple(theirs.shape)}")
        elif name == "last_polarity" or name.startswith("qmap") or name == "probe_start":
            if not torch.equal(ours, theirs):
                self.exact.append(name)
        elif ours.dtype == torch.uint8:
            ours, theirs = ours.int(), theirs.int()
            if name == "lr_mask":
                if not torch.equal(ours & 1, theirs & 1):
                    self.exact.append("polarity in lr_mask")
                ours, theirs = ours >> 1, theirs >> 1
            self.codes.setdefault(name, []).append((ours - theirs).abs().view(-1).cpu())
        elif name == "tensor_stats":
            if ours[st.SKIPPED] != theirs[st.SKIPPED]:
                self.exact.append("tensor_stats: number of skipped elements")
            for number in (st.MASK_MEAN, st.LR_NUMERATOR, st.LR_DENOMINATOR):
                self._take_floats(f"tensor_stats/{number}", ours[number], theirs[number])
        elif name == "torque":  # a mean of cosines: its own size may be anything
            self._take_floats(name, ours, theirs, scale=1.0)
        else:
            self._take_floats(name, ours, theirs)

    def _take_floats(self, name: str, ours: Tensor, theirs: Tensor, scale: float | None = None) -> None:
        blocks = reference.Blocks(ours)
        # NaN beside NaN is equal; NaN beside a number is as wrong as can be.
        equal = (ours == theirs) | (ours.isnan() & theirs.isnan())
        error = torch.where(equal, 0.0, (ours - theirs).abs().double().nan_to_num(math.inf))
        worst = blocks.cut(error).amax(dim=1)
        largest = blocks.cut(theirs.abs().double().nan_to_num(0.0, 0.0)).amax(dim=1).clamp_min(1e-37)
        self.floats.setdefault(name, []).append((worst / (largest if scale is None else scale)).cpu())

    def violations(self, tolerance: Tolerance) -> list[str]:
        """What exceeds the tolerance, in words; empty where all is well.

        Compiled, one block of each thousand, and one in any case, may be further off: a comparison of the rule (is e
        above the threshold, have n and g one sign) falls out differently where both sides are equal within rounding.
        The interpreter's runs are the same every time and meet no such case.
        """
        found = sorted({f"{name} differs" for name in self.exact})
        for name, errors in self.floats.items():
            worst = torch.cat(errors).sort(descending=True).values
            excused = 1 + worst.numel() // 1000 if COMPILED else 0
            limit = tolerance.theta if name == "theta" else tolerance.floats
            if worst.numel() > excused and worst[excused] > limit:
                count = (worst > limit).sum()
                found.append(f"{name}: off by {worst[0]:.2g} of its block's largest, {count} blocks above {limit:.2g}")
        for name, distances in self.codes.items():
            off = torch.cat(distances)
            allowed, count, most = max(2.0, tolerance.share * off.numel()), int((off > 0).sum()), int(off.max())
            if count > allowed or most > tolerance.distance:
                found.append(f"{name}: {count} of {off.numel()} codes differ, by up to {most}")
        return found

    def summary(self) -> dict[str, str]:
        """The worst of each: for choosing tolerances."""
        worst = {name: f"{torch.cat(errors).max():.1e}" for name, errors in self.floats.items()}
        for name, distances in self.codes.items():
            off = torch.cat(distances)
            worst[name] = f"{int((off > 0).sum())}/{off.numel()} by {int(off.max())}"
        return worst


def _ordinals(x: Tensor) -> Tensor:
    """int32 that count up through the numbers of a 16-bit floating dtype; both zeros are 0."""
    bits = x.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


@dataclass
class Followed:
    """A kernel's run beside the reference's."""

    kernel: Automagic
    torch: Automagic
    """Resynchronised with the kernel's before each step."""
    one_step: Differences
    free: Differences

    def violations(self, storage: str) -> list[str]:
        free = FREE_32 if storage == "32bit" else FREE_8
        return [f"one step: {x}" for x in self.one_step.violations(ONE_STEP)] + [
            f"free: {x}" for x in self.free.violations(free)
        ]


def follow(
    build: Callable[[str], Automagic],
    steps: int = 4,
    gradients: Callable[[tuple[int, ...], int, int], Tensor | None] = gradient,
    grad_dtype: torch.dtype | None = None,
    before: Callable[[Automagic, int], Any] | None = None,
) -> Followed:
    """Run the kernels, and beside them the reference twice: resynchronised before each step, and on its own.

    Args:
        build: an optimizer over new parameters, for a backend.
        gradients: by shape, index of the parameter and step (from 1); None for no gradient.
        before: what is done to each optimizer before a step, after it has its gradients.
    """
    kernel, resynchronised, free = build("triton"), build("torch"), build("torch")
    run = Followed(kernel, resynchronised, Differences(), Differences())
    for step in range(1, steps + 1):
        synchronise(kernel, resynchronised)
        for opt in (kernel, resynchronised, free):
            for index, p in enumerate(parameters_of(opt)):
                give(p, gradients(tuple(p.shape), index, step), grad_dtype)
            if before is not None:
                before(opt, step)
            opt.step()
        run.one_step.take(kernel, resynchronised)
    run.free.take(kernel, free)
    return run
