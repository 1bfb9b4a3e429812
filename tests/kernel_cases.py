"""What the tests of the kernels share: where they run, gradients, and the comparison of two optimizers.

The same tests run compiled where there is a CUDA device and in Triton's interpreter on the CPU elsewhere (conftest.py
switches it on).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from automagic_bnb import state as st
from automagic_bnb import stored
from automagic_bnb.optimizer import Automagic
from automagic_bnb.quantization import join_master

COMPILED = torch.cuda.is_available()
DEVICE = torch.device("cuda" if COMPILED else "cpu")
NEEDS_GPU = (pytest.mark.gpu, pytest.mark.skipif(not COMPILED, reason="no CUDA device to compile the kernels for"))

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BITS = {"32bit": 32, "8bit": 8}
FORMS: dict[str, dict[str, Any]] = {
    "8bit": {"factored": False, "mask_bits": 8},
    "32bit": {"optim_bits": 32},
    "factored": {"factored": True, "mask_bits": 8, "mean_bits": 32},
    "small": {"min_8bit_size": 10**9, "factored": False, "mask_bits": 8},
    "small_factored": {"min_8bit_size": 10**9, "factored": True, "mask_bits": 8, "mean_bits": 32},
    "small, packed": {"min_8bit_size": 10**9, "factored": True, "mask_bits": 4, "mean_bits": 16},
    "mask in four bits": {"factored": False, "mask_bits": 4},
    "packed": {"factored": True, "mask_bits": 4, "mean_bits": 16},
    "lean": {"factored": True, "mask_bits": 0, "mean_bits": 32, "came": False},
}
"""How states are kept: moments, mask and means."""

Shapes = tuple[tuple[int, ...], ...]

ALL_SHAPES: Shapes = (
    (7, 9), (300,), (1,), (), (3, 5, 3, 3), (5, 513), (16, 40), (40, 16), (2, 2), (256,), (257,), (24, 264),
)  # fmt: skip
"""Short last blocks, rows of multiples of 8 and not, rows longer and shorter than a block, several programs."""
SOME_SHAPES: Shapes = ((7, 9), (300,), (3, 5, 3, 3), (3, 256), (12, 24))
"""Fewer blocks, of every kind: the interpreter takes some 50 ms for each."""
FEW_SHAPES: Shapes = ((5, 52), (3,))
"""For comparisons of kernel with kernel."""
TILED_SHAPES: Shapes = ((300, 16), (251, 24), (9, 256))
"""Factored: two tiles of whole rows, three strips with a short last block, rows of exactly a block."""
FEW_TILED_SHAPES: Shapes = ((40, 16), (9, 256))


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


def steady(shape: tuple[int, ...], index: int, step: int) -> Tensor:
    """A gradient that hardly changes, along which a rate too small is seen to be so."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    return (1 + 0.3 * torch.randn(shape, generator=generator)) * 1e-3


def give(p: Any, grad: Tensor | None, dtype: torch.dtype | None = None) -> None:
    """Make this the gradient of a parameter, in a dtype that may differ from the parameter's."""
    p.grad = None
    if grad is not None:
        p.grad = torch.zeros_like(p)
        p.grad.data = grad.to(p.device, dtype or p.dtype)


SWITCHES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no edges": {"edge_suppression": False},
    "no frequency filter": {"frequency_penalty": 0.0},
    "no spatial filter": {"edge_suppression": False, "frequency_penalty": 0.0},
    "no spatial awareness": {"spatial_awareness": False},
    "no background": {"background_regularization": False},
    "no torque": {"torque": False},
    "no confidence": {"came": False},
    "not cautious": {"cautious": False},
    "rounding to nearest": {"stochastic_rounding": False},
    "percentile clipping": {"percentile_clipping": 50},
    "rate found": {"lr": 9e-3, "auto_lr": True},
    "mask freezes": {"warmup_steps": 2},
    "mask never moves": {"warmup_steps": 0},
    "LoRA": {"lora": True, "low_rank_emphasis": 1.3, "rank_penalty_strength": 0.1},
    "LoRA with a mask": {"lora": True, "lora_mask": True, "low_rank_emphasis": 1.3, "rank_penalty_strength": 0.1},
    "narrow bounds": {"min_lr": 0.0198, "max_lr": 0.0203},
    "betas of 0": {"betas": (0.5, 0.0, 0.0)},
    "betas near 1": {"betas": (0.8, 0.999, 0.9999)},  # 1 - β must not be taken in float32
    "24-bit weights": {"master": "ecc8"},
    "24-bit weights to nearest": {"master": "ecc8", "stochastic_rounding": False},
    "master none": {"master": "none"},
}


def optimizer(params: Iterable[Any], backend: str, storage: str = "8bit", **options: Any) -> Automagic:
    """Rates and decay so large that the update, not the parameter, makes most of what is compared.

    The betas are not the defaults: at 0.9, m of one element cancels to exactly 0 where its gradient changes sign.
    """
    defaults = {
        "lr": 0.02,
        "weight_decay": 0.1,
        "betas": (0.8, 0.97, 0.995),
        "seed": 7,
        "optim_bits": 8,
        "min_8bit_size": 0,
        **FORMS[storage],
    }
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
        for name in ("auto_lr_rate", "auto_lr_count", "effective_lr"):
            if name in ours:
                theirs[name] = copy.deepcopy(ours[name])


@contextlib.contextmanager
def waiting_is_an_error(on: bool = True) -> Iterator[None]:
    """PyTorch raises RuntimeError inside where the host would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error" if on else "default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- comparison -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tolerance:
    """How far kernel and reference may be apart.

    Both are float32 throughout, in another order of additions and with other instructions for 1/x, 1/sqrt(x) and 2^x:
    a few units of 2^-24 each.
    """

    floats: float
    """Of float32 tensors, over the largest magnitude within the block of 256."""
    share: float
    """Of codes and of the elements of a narrow θ, how many may differ: those whose exact value lies within float32
    rounding of a threshold of their own rounding. Two of each kind may in any case."""
    codes: int
    """And by how many codes."""
    spacings: float
    """And a narrow θ by how many spacings of its dtype at the block's largest."""


ONE_STEP = Tolerance(floats=5e-6, share=1e-3, codes=1, spacings=1)
"""From equal states. The interpreter's worst: 9e-7 and a share of 1.3e-4."""
FREE_32 = Tolerance(floats=5e-6, share=2e-3, codes=0, spacings=2)
"""Four steps without resynchronising, 32-bit states: nothing amplifies the rounding."""
FREE_8 = Tolerance(floats=0.03, share=0.02, codes=3, spacings=4)
"""The same with codes: one that falls on the other side is off by up to a third of its value, and moves the statistics
and all rates of its block a little."""


ONE_TO_A_BLOCK = frozenset(
    ["torque", "edge_history", "spatial_variance", "absmax1", "absmax2", "absmax3", "exp_avg_sq_row", "exp_avg_res_row"]
)


@dataclass
class Differences:
    """What was seen, by name of the tensor: relative errors, one to a block; distances [blocks, 256] of codes and θ."""

    floats: dict[str, list[Tensor]] = field(default_factory=dict)
    codes: dict[str, list[Tensor]] = field(default_factory=dict)
    narrow: list[Tensor] = field(default_factory=list)
    narrow_states: list[Tensor] = field(default_factory=list)
    """Distances of m in float16 and of means in bfloat16, in spacings at the largest of 256."""
    masters: list[Tensor] = field(default_factory=list)
    """Distances of weights kept in 24 bits, in spacings of these at the block's largest."""
    exact: list[str] = field(default_factory=list)
    """Names of what must be equal and was not."""

    def take(self, kernel: Automagic, torch_: Automagic) -> None:
        """Add the differences between two optimizers over the same parameters."""
        for p, q in zip(parameters_of(kernel), parameters_of(torch_), strict=True):
            ours, theirs = kernel.state.get(p, {}), torch_.state.get(q, {})
            if ours.keys() != theirs.keys():
                self.exact.append(f"keys {sorted(ours.keys() ^ theirs.keys())}")
            self._take_theta(p.detach(), q.detach())
            if "master_residual" in ours and "master_residual" in theirs:
                masters = (join_master(x.detach(), held["master_residual"]) for x, held in ((p, ours), (q, theirs)))
                self.masters.append(self._spacings(*masters, eps=2.0**-15))
            for name in ours.keys() & theirs.keys():
                self._take_state(name, ours[name], theirs[name])
        for ours, theirs in zip(kernel.param_groups, torch_.param_groups, strict=True):
            if "auto_lr_rate" in ours or "auto_lr_rate" in theirs:
                self._take_floats("auto_lr_rate", ours["auto_lr_rate"], theirs["auto_lr_rate"])

    def _take_theta(self, p: Tensor, q: Tensor) -> None:
        if p.dtype == torch.float32:
            self._take_floats("theta", p, q)
        else:
            self.narrow.append(self._spacings(p, q))

    def _take_state(self, name: str, ours: Any, theirs: Any) -> None:
        if name == "master_residual":
            return  # compared together with θ
        if not isinstance(ours, Tensor):
            if ours != theirs:
                self.exact.append(name)
        elif ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            self.exact.append(f"{name}: {ours.dtype} {tuple(ours.shape)} against {theirs.dtype} {tuple(theirs.shape)}")
        elif name == "last_polarity" or name.startswith("qmap") or name == "probe_block":
            if not torch.equal(ours, theirs):
                self.exact.append(name)
        elif ours.dtype in (torch.float16, torch.bfloat16) and name != "probe_start":
            self.narrow_states.append(self._spacings(ours, theirs))
        elif ours.dtype == torch.uint8:
            if name == "lr_mask4":
                ours, theirs = (torch.stack([x & 15, x >> 4], dim=-1).flatten() for x in (ours, theirs))
            if name.startswith("lr_mask"):
                if not torch.equal(ours & 1, theirs & 1):
                    self.exact.append("polarity in lr_mask")
                ours, theirs = ours >> 1, theirs >> 1
            self._take_codes(name, ours, theirs)
        elif name == "tensor_stats":
            if ours[st.SKIPPED] != theirs[st.SKIPPED]:
                self.exact.append("tensor_stats: number of skipped elements")
            self._take_floats("W", ours[st.MASK_MEAN], theirs[st.MASK_MEAN])
            self._take_floats("sum of |m|", ours[st.LR_DENOMINATOR], theirs[st.LR_DENOMINATOR])
            # A sum of either sign: what counts is its error beside Σ|m| times the distances, about the rate.
            scale = float(0.01 * theirs[st.LR_DENOMINATOR] + theirs[st.LR_NUMERATOR].abs())
            self._take_floats("auto_lr's numerator", ours[st.LR_NUMERATOR], theirs[st.LR_NUMERATOR], scale)
        elif name == "torque":  # a mean of cosines: its own size may be anything
            self._take_floats(name, ours, theirs, 1.0)
        else:
            self._take_floats(name, ours, theirs)

    def _take_floats(self, name: str, ours: Tensor, theirs: Tensor, scale: float = 0.0) -> None:
        blocks = stored.Blocks(ours)
        error = blocks.cut(_error(ours, theirs)) / (_largest(theirs, blocks)[:, None] if scale == 0 else scale)
        # Numbers of which a block of elements has one each count for themselves.
        error = blocks.join(error) if name in ONE_TO_A_BLOCK else error.amax(dim=1)
        self.floats.setdefault(name, []).append(error.cpu())

    @staticmethod
    def _spacings(p: Tensor, q: Tensor, eps: float | None = None) -> Tensor:
        blocks = stored.Blocks(p)
        spacing = (torch.finfo(p.dtype).eps if eps is None else eps) * _largest(q, blocks)
        return (blocks.cut(_error(p, q)) / spacing[:, None]).float().cpu()

    def _take_codes(self, name: str, ours: Tensor, theirs: Tensor) -> None:
        distance = (ours.int() - theirs.int()).abs()
        self.codes.setdefault(name, []).append(stored.Blocks(ours).cut(distance).float().cpu())

    def violations(self, tolerance: Tolerance) -> list[str]:
        """What exceeds the tolerance, in words; empty where all is well.

        Compiled, one block of each thousand, and one in any case, may be further off: a comparison of the rule (is e
        above the threshold, have n and g one sign) falls out differently where both sides are equal within rounding.
        The interpreter's runs are the same every time and meet no such case.
        """
        found = sorted({f"{name} differs" for name in self.exact})
        for name, errors in self.floats.items():
            # A column's mean of factored moments gathers up to 128 blocks, any of which may be such a one.
            off = _without_strays(torch.cat(errors)[:, None], 10 if name.endswith("_col") else 1000)
            if (off > tolerance.floats).any():
                found.append(f"{name}: {(off > tolerance.floats).sum()} blocks off, by up to {off.max():.2g}")
        limits = [(name, distances, tolerance.codes, tolerance.share) for name, distances in self.codes.items()]
        limits += [("theta", self.narrow, tolerance.spacings, tolerance.share)]
        limits += [("states in 16 bits", self.narrow_states, tolerance.spacings, tolerance.share)]
        # The last of 24 bits is 256 times float32's: of a hundred weights one or two lie near enough to a threshold.
        limits += [("24-bit theta", self.masters, 1, 0.05 if tolerance is ONE_STEP else 0.2)]
        for name, distances, limit, share in limits:
            off = _without_strays(torch.cat(distances)) if distances else torch.zeros(1)
            count = (off > 0).sum()
            if count > max(2, share * off.numel()) or (off > limit).any():
                found.append(f"{name}: {count} of {off.numel()} differ, by up to {off.max():.3g} steps of its rounding")
        return found


def _without_strays(errors: Tensor, one_in: int = 1000) -> Tensor:
    """Errors [blocks, any] without the blocks that may be off: see `Differences.violations`."""
    strays = 1 + len(errors) // one_in if COMPILED else 0
    worst_last = errors.double().sum(dim=1).argsort()
    return errors[worst_last[: len(errors) - strays]]


def _error(ours: Tensor, theirs: Tensor) -> Tensor:
    """|ours - theirs| in float64; NaN beside NaN is equal, beside a number it is as wrong as can be."""
    equal = (ours == theirs) | (ours.isnan() & theirs.isnan())
    return torch.where(equal, 0.0, (ours.double() - theirs.double()).abs().nan_to_num(math.inf, math.inf))


def _largest(x: Tensor, blocks: stored.Blocks) -> Tensor:
    """The largest finite magnitude of each block, float64 [blocks], not quite 0."""
    return blocks.cut(x.double().abs().nan_to_num(0.0, 0.0)).amax(dim=1).clamp_min(1e-37)


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
