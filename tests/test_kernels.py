"""The Triton kernels, held to the plain-PyTorch reference: equal seeds must give equal runs.

Interpreted on the CPU where there is no CUDA device, compiled where there is one; what the interpreter has no time for
is marked `gpu`. Tolerances, and how they are applied, are in `kernel_cases`. Gradients of every kind are in
`test_kernel_gradients`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kernel_cases import (
    ALL_SHAPES,
    BITS,
    DTYPES,
    FEW_SHAPES,
    FEW_TILED_SHAPES,
    NEEDS_GPU,
    ONE_STEP,
    SOME_SHAPES,
    SWITCHES,
    TILED_SHAPES,
    Differences,
    Shapes,
    follow,
    give,
    gradient,
    optimizer,
    parameters,
    parameters_of,
    steady,
    synchronise,
)

from automagic_bnb import bnb
from automagic_bnb import state as st
from automagic_bnb.factored import Tiling
from automagic_bnb.optimizer import Automagic

pytest.importorskip("automagic_bnb.kernels.step", reason="the kernels need Triton")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy: 1 / 0 in masked lanes


# --- the rule, switch by switch -------------------------------------------------------------------------------------


def start_at(opt: Automagic, number: int) -> None:
    """Let the next step be this one for every parameter."""
    for group in opt.param_groups:
        for p in group["params"]:
            opt.init_state(group, p)
            opt.state[p]["step"] = number - 1


@dataclass(frozen=True)
class Case:
    """One run of kernels and reference."""

    storage: str
    dtype: str
    switch: str = "defaults"
    grad_dtype: str | None = None
    shapes: Shapes = SOME_SHAPES
    steps: int = 3

    def __str__(self) -> str:
        grads = f", {self.grad_dtype} gradients" if self.grad_dtype else ""
        return f"{self.storage}, {self.dtype}{grads}: {self.switch}, {len(self.shapes)} shapes"


COVERING = [
    Case("8bit", "bfloat16", shapes=ALL_SHAPES, steps=2),
    Case("32bit", "float32", shapes=ALL_SHAPES, steps=2),
    Case("8bit", "float32"),
    Case("8bit", "float16", grad_dtype="float32"),
    Case("32bit", "bfloat16", grad_dtype="float32"),
    Case("32bit", "float16", grad_dtype="bfloat16"),
    Case("8bit", "bfloat16", "no edges"),
    Case("32bit", "float32", "no frequency filter"),
    Case("8bit", "float16", "no spatial filter"),
    Case("32bit", "float32", "no spatial awareness"),
    Case("8bit", "float32", "no background"),
    Case("8bit", "float32", "no torque"),
    Case("8bit", "bfloat16", "no confidence"),
    Case("32bit", "bfloat16", "not cautious"),
    Case("32bit", "float16", "rounding to nearest"),
    Case("32bit", "bfloat16", "rounding to nearest"),
    Case("8bit", "float16", "percentile clipping"),
    Case("8bit", "bfloat16", "rate found", steps=4),
    Case("32bit", "bfloat16", "mask freezes"),
    Case("8bit", "float32", "mask freezes"),
    Case("8bit", "float16", "mask never moves", steps=2),
    Case("8bit", "bfloat16", "LoRA"),
    Case("32bit", "float32", "narrow bounds"),
    Case("8bit", "float32", "betas of 0"),
    Case("8bit", "bfloat16", "betas near 1"),
    Case("8bit", "bfloat16", "24-bit weights", "float32"),
    Case("32bit", "bfloat16", "24-bit weights to nearest"),
    Case("factored", "bfloat16", shapes=TILED_SHAPES, steps=2),
    Case("factored", "float32", "no confidence", shapes=FEW_TILED_SHAPES),
    Case("factored", "float16", "percentile clipping", "float32", shapes=FEW_TILED_SHAPES),
    Case("factored", "float32", "rate found", shapes=FEW_TILED_SHAPES, steps=4),
    Case("factored", "float16", "mask freezes", shapes=FEW_TILED_SHAPES),
    Case("factored", "float32", "betas near 1", shapes=FEW_TILED_SHAPES),
]
"""Every switch, storage and dtype at least once."""
PRODUCT = [
    Case(storage, dtype, switch, shapes=ALL_SHAPES, steps=4)
    for storage, dtype, switch in itertools.product(BITS, DTYPES, SWITCHES)
] + [
    Case("factored", dtype, switch, shapes=(*TILED_SHAPES, *FEW_TILED_SHAPES), steps=4)
    for dtype, switch in zip(itertools.cycle(DTYPES), SWITCHES, strict=False)
]
LARGE_SHAPES: Shapes = ((1000, 1000), (64, 4096), (5, 7, 129, 257), (1 << 20 | 3,), (4096, 8), (3, 100_000))
LARGE_TILED_SHAPES: Shapes = ((1000, 1000), (300, 4096), (2048, 7, 9, 9), (4099, 8), (300, 10_000), (40_000, 32))
LARGE = [Case(storage, dtype, shapes=LARGE_SHAPES, steps=4) for storage, dtype in itertools.product(BITS, DTYPES)] + [
    Case("factored", dtype, shapes=LARGE_TILED_SHAPES, steps=4) for dtype in DTYPES
]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=str(case)) for case in COVERING]
    + [pytest.param(case, id=f"product: {case}", marks=NEEDS_GPU) for case in PRODUCT]
    + [pytest.param(case, id=f"large: {case}", marks=NEEDS_GPU) for case in LARGE],
)
def test_kernels_follow_the_reference(case: Case) -> None:
    """After every step from equal states, and after some steps on their own, both hold the same numbers."""
    options = SWITCHES[case.switch]
    finds, lora = case.switch == "rate found", case.switch.startswith("LoRA")

    def build(backend: str) -> Automagic:
        opt = optimizer(parameters(case.shapes, DTYPES[case.dtype]), backend, case.storage, **options)
        if lora:  # the second step is the 10th, which lowers the singular values
            start_at(opt, 9)
        return opt

    grad_dtype = DTYPES[case.grad_dtype] if case.grad_dtype else None
    run = follow(build, case.steps, steady if finds else gradient, grad_dtype)
    assert run.violations(case.storage) == []
    if case.storage == "factored":
        assert {st.storage_held(state) for state in run.kernel.state.values()} == {"factored"}
    if finds:
        seen = [state["tensor_stats"][st.LR_DENOMINATOR] for state in run.kernel.state.values()]
        assert all(x > 0 for x in seen), "no block was watched: nothing was seen"


CHANGES: dict[str, dict[str, Any]] = {
    "lr": {"lr": 0.0201},
    "weight decay": {"weight_decay": 0.101},
    "beta1": {"betas": (0.801, 0.97, 0.995)},
    "beta2": {"betas": (0.8, 0.971, 0.995)},
    "beta3": {"betas": (0.8, 0.97, 0.996)},
    "eps2": {"eps": (1e-30, 1e-3)},
    "clip_threshold": {"clip_threshold": 0.99},
    "edge_penalty": {"edge_penalty": 0.101},
    "edge_threshold": {"edge_threshold": 0.61},
    "frequency_penalty": {"frequency_penalty": 0.0501},
    "detail_preservation": {"detail_preservation": 0.801},
    "low_rank_emphasis": {"low_rank_emphasis": 1.01},
    "max_lr": {"max_lr": 0.0201},
    "warmup_steps": {"warmup_steps": 2},
    **{name: options for name, options in SWITCHES.items() if name.startswith(("no ", "not "))},
}


LORA = {"lora": True, "lora_mask": True, "low_rank_emphasis": 1.0}


@pytest.fixture(scope="module")
def kernel_run() -> Iterator[list[tuple[Automagic, Automagic]]]:
    """Copies of one 32-bit LoRA run of the kernels, from before and from after each of three steps."""
    kernel = optimizer(parameters(SOME_SHAPES, torch.float32), "triton", "32bit", **LORA)
    moments = []
    for number in range(1, 4):
        before = copy.deepcopy(kernel)
        for index, p in enumerate(parameters_of(kernel)):
            give(p, gradient(tuple(p.shape), index, number))
        kernel.step()
        moments.append((before, copy.deepcopy(kernel)))
    return moments


def differences_to(kernel_run: list[tuple[Automagic, Automagic]], **options: Any) -> Differences:
    """What the reference, under other options, does differently from these steps of the kernels."""
    other = optimizer(parameters(SOME_SHAPES, torch.float32), "torch", "32bit", **{**LORA, **options})
    seen = Differences()
    for number, (before, after) in enumerate(kernel_run, start=1):
        synchronise(before, other)
        for index, p in enumerate(parameters_of(other)):
            give(p, gradient(tuple(p.shape), index, number))
        other.step()
        seen.take(after, other)
    return seen


def test_the_run_that_others_are_told_from_is_the_references(kernel_run: list[tuple[Automagic, Automagic]]) -> None:
    """With the options equal nothing is found: what the next test finds is the change."""
    assert differences_to(kernel_run).violations(ONE_STEP) == []


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_option_is_told_apart(change: str, kernel_run: list[tuple[Automagic, Automagic]]) -> None:
    """Negative control: any number of the rule off by one percent, or any part left out, exceeds the tolerance."""
    assert differences_to(kernel_run, **CHANGES[change]).violations(ONE_STEP) != []


def test_another_seed_is_told_apart() -> None:
    """Negative control for stochastic rounding: other random bits change codes and a bfloat16 θ."""

    def build(backend: str) -> Automagic:
        return optimizer(parameters(SOME_SHAPES, torch.bfloat16), backend, seed=7 if backend == "torch" else 8)

    found = " ".join(follow(build, steps=2).one_step.violations(ONE_STEP))
    assert all(f"{name}: " in found for name in ("theta", "state2", "state3"))


# --- options by group, by parameter, over time ------------------------------------------------------------------------


def test_groups_schedules_and_overrides_are_followed() -> None:
    """Two groups with options of their own, a parameter overridden to 32 bits, a rate and options that change."""

    def build(backend: str) -> Automagic:
        first, second, overridden, quiet = parameters(((5, 52), (300,), (7, 9), (40,)), torch.float32)
        bnb.GlobalOptimManager.get_instance().override_config(
            overridden, key_value_dict={"optim_bits": 32, "weight_decay": 0.3, "lr": 0.05}
        )
        groups = [
            {"params": [first, overridden]},
            {"params": [second, quiet], "lr": 0.004, "betas": (0.7, 0.9), "weight_decay": 0.0, "came": False},
        ]
        return optimizer(groups, backend)

    def change(opt: Automagic, number: int) -> None:
        first, second = opt.param_groups
        first["lr"] = 0.02 / number
        if number == 2:
            second["weight_decay"], second["warmup_steps"] = 0.2, 2
        elif number == 3:
            second["betas"], second["torque"], second["came"] = (0.75, 0.95, 0.99), False, True
            bnb.GlobalOptimManager.get_instance().override_config(second["params"][1], "weight_decay", 0.4)
        elif number == 4:
            first["lr"], first["clip_threshold"], first["lora"] = 0.0, 0.7, True

    run = follow(build, 4, before=change)
    assert run.violations("8bit") == []
    held = {st.storage_held(run.kernel.state[p]) for p in parameters_of(run.kernel)}
    assert held == {"8bit", "32bit"}


def test_schedule_under_a_found_rate_is_followed() -> None:
    """`lr` over the base rate scales what auto_lr finds, which each group finds for itself."""

    def build(backend: str) -> Automagic:
        first, second, third = parameters(((5, 52), (300,), (7, 9)), torch.float32)
        groups = [{"params": [first]}, {"params": [second]}, {"params": [third], "lr": 0.01}]
        return optimizer(groups, backend, "32bit", lr=None, min_lr=1e-3, max_lr=0.1)

    def schedule(opt: Automagic, number: int) -> None:
        for group in opt.param_groups:
            group["initial_lr"] = group["base_lr"]
            group["lr"] = group["base_lr"] / (1 + number % 3)

    run = follow(build, 4, steady, before=schedule)
    assert run.violations("32bit") == []
    assert [group["auto_lr"] for group in run.kernel.param_groups] == [True, True, False]


def test_group_added_later_is_followed() -> None:
    """A plan made for fewer parameters is not kept."""

    def add(opt: Automagic, number: int) -> None:
        if number == 2:
            p = parameters(((7, 9),), torch.float32)[0]
            give(p, gradient((7, 9), 9, 2))
            opt.add_param_group({"params": [p], "lr": 0.03})

    run = follow(lambda backend: optimizer(parameters(FEW_SHAPES, torch.float32), backend), 3, before=add)
    assert run.violations("8bit") == []
    assert run.kernel.state[parameters_of(run.kernel)[-1]]["step"] == 2


def test_a_tile_whose_mean_is_taken_wrong_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control for factored moments: a reference that weighs the last, short block's columns as full ones."""
    monkeypatch.setattr(
        Tiling, "counts", lambda self, device: self.by_tile(torch.ones(self.blocks, 256, device=device)).sum((1, 3))
        .view(self.tiles, self.width)
    )  # fmt: skip
    run = follow(lambda backend: optimizer(parameters(((251, 24),), torch.float32), backend, "factored"), 2)
    assert any("exp_avg_sq" in x for x in run.one_step.violations(ONE_STEP))
