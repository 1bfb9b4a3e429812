"""Options that a user sets and that come to nothing: each is told, once, with what to do; what has an effect is not."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from automagic_bnb import (
    Automagic,
    Automagic8bit,
    Automagic32bit,
    AutomagicConfig,
    OptimizationProfiles,
    PagedAutomagic8bit,
    PagedAutomagic32bit,
    bnb,
    config,
    idle,
    notices,
    paged,
)

CLASSES = [Automagic, Automagic8bit, Automagic32bit, PagedAutomagic8bit, PagedAutomagic32bit]


def made(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape, dtype=dtype))


PARAMETERS: dict[str, Callable[[], list[Any]]] = {
    "matrix": lambda: [made(128, 128)],
    "vector": lambda: [made(300)],
    "small matrix": lambda: [made(16, 16)],
    "bfloat16": lambda: [made(128, 128, dtype=torch.bfloat16)],
    "LoRA": lambda: [("lora_A", made(4, 64)), ("lora_B", made(64, 4))],
    "large LoRA": lambda: [("lora_A", made(300, 300))],
    "embedding": lambda: [("embed_tokens", made(128, 128))],
    "strided": lambda: [nn.Parameter(torch.zeros(64, 32).t())],
    "many elements": lambda: [made(400, 300)],
}


@dataclass(frozen=True)
class Case:
    """Settings under which an option comes to nothing, and what has to be changed for it to have an effect."""

    option: str
    reason: idle.Reason
    value: Any
    others: dict[str, Any] = field(default_factory=dict)
    parameters: str = "matrix"
    mended: dict[str, Any] | None = None
    """Options; None where only other parameters help."""
    mended_parameters: str | None = None

    def __str__(self) -> str:
        return f"{self.option}{self.reason.words[:40]}"


NO_RATES = {"mask_bits": 0, "lr": 1e-3, "optim_bits": 8}
GIVEN = {"lr": 1e-3, "optim_bits": 8}
WITH_MASK = {"lora_mask": True}
CASES = [
    Case("min_lr", idle.NOTHING_BOUND, 1e-5, NO_RATES, mended={"mask_bits": 8}),
    Case("min_lr", idle.NOTHING_BOUND_AT_REST, 1e-5, {"warmup_steps": 0, "lr": 1e-3}, mended={"warmup_steps": 9}),
    Case("max_lr", idle.NOTHING_BOUND, 1e-2, NO_RATES, mended={"lr": None}),
    Case("max_lr", idle.NOTHING_BOUND_AT_REST, 1e-2, {"warmup_steps": 0, "lr": 1e-3}, mended={"lr": None}),
    Case("min_lr", idle.NOTHING_BOUND_OF_LORA, 1e-5, GIVEN, "LoRA", WITH_MASK),
    Case("max_lr", idle.NOTHING_BOUND_OF_LORA, 1e-2, GIVEN, "LoRA", {"lr": None}),
    Case("auto_lr_steps", idle.RATE_GIVEN, 100, {"lr": 1e-3}, mended={"auto_lr": True}),
    Case("warmup_steps", idle.NO_MASK, 100, NO_RATES, mended={"mask_bits": 8}),
    Case("warmup_steps", idle.LORA_WITHOUT_MASK, 100, GIVEN, "LoRA", WITH_MASK),
    Case("optim_bits", idle.ALL_SMALL, 8, parameters="small matrix", mended={"min_8bit_size": 0}),
    Case("min_8bit_size", idle.IN_32_BITS, 100, {"optim_bits": 32}, mended={"optim_bits": 8}),
    Case("min_8bit_size", idle.FORCED, 100, {"force_8bit": True, "optim_bits": 8}, mended={"force_8bit": False}),
    Case("stable_emb", idle.FORCED, True, {"force_8bit": True, "optim_bits": 8}, "embedding", {"force_8bit": False}),
    Case("stable_emb", idle.NO_EMBEDDING, True, {"optim_bits": 8}, mended_parameters="embedding"),
    Case("factored", idle.IN_32_BITS, True, {"optim_bits": 32}, mended={"optim_bits": 8}),
    Case("factored", idle.NO_MATRIX, True, {"optim_bits": 8}, "vector", mended_parameters="matrix"),
    Case("mask_bits", idle.IN_32_BITS, 8, {"optim_bits": 32}, mended={"optim_bits": 8}),
    Case("mask_bits", idle.LORA_WITHOUT_MASK, 8, GIVEN, "LoRA", WITH_MASK),
    Case("mean_bits", idle.IN_32_BITS, 32, {"optim_bits": 32}, mended={"optim_bits": 8}),
    Case("mean_bits", idle.NOT_FACTORED, 32, {"factored": False, "optim_bits": 8}, mended={"factored": True}),
    Case("mean_bits", idle.NO_MATRIX, 32, {"optim_bits": 8}, "vector", mended_parameters="matrix"),
    Case("is_paged", idle.NOT_PAGED_THERE, True),
    Case("is_paged", idle.TOO_SMALL_TO_PAGE, True, mended_parameters="many elements"),
    Case("edge_suppression", idle.NO_EDGE_PENALTY, True, {"edge_penalty": 0.0}, mended={"edge_penalty": 0.2}),
    Case("edge_suppression", idle.NO_SURFACE, True, parameters="vector", mended_parameters="matrix"),
    Case("edge_penalty", idle.NO_EDGES, 0.3, {"edge_suppression": False}, mended={"edge_suppression": True}),
    Case("edge_penalty", idle.NO_SURFACE, 0.3, parameters="vector", mended_parameters="matrix"),
    Case("edge_threshold", idle.NO_EDGES, 0.3, {"edge_suppression": False}, mended={"edge_suppression": True}),
    Case("edge_threshold", idle.NO_EDGE_PENALTY, 0.3, {"edge_penalty": 0.0}, mended={"edge_penalty": 0.2}),
    Case("edge_threshold", idle.NO_SURFACE, 0.3, parameters="vector", mended_parameters="matrix"),
    Case("frequency_penalty", idle.NO_SURFACE, 0.3, parameters="vector", mended_parameters="matrix"),
    Case("spatial_awareness", idle.MASK_AT_REST, True, {"warmup_steps": 0}, mended={"warmup_steps": 9}),
    Case("spatial_awareness", idle.NO_MASK, True, NO_RATES, mended={"mask_bits": 8}),
    Case("spatial_awareness", idle.LORA_WITHOUT_MASK, True, GIVEN, "LoRA", WITH_MASK),
    Case("detail_preservation", idle.LORA_WITHOUT_MASK, 0.3, GIVEN, "LoRA", WITH_MASK),
    Case("detail_preservation", idle.NOT_AWARE, 0.3, {"spatial_awareness": False}, mended={"spatial_awareness": True}),
    Case("detail_preservation", idle.MASK_AT_REST, 0.3, {"warmup_steps": 0}, mended={"warmup_steps": 9}),
    Case("detail_preservation", idle.NO_MASK, 0.3, NO_RATES, mended={"mask_bits": 8}),
    Case(
        "lora", idle.NO_LORA_PARTS, True, {"lora_mask": True, "torque": False, "lora_rank_penalty": False},
        mended={"torque": True},
    ),
    Case("lora_mask", idle.NO_LORA, True, mended={"lora": True}),
    Case("lora_mask", idle.NO_MASK, True, NO_RATES, "LoRA", {"mask_bits": 4}),
    Case("lora_mask", idle.MASK_AT_REST, True, {"warmup_steps": 0}, "LoRA", {"warmup_steps": 9}),
    Case(
        "lora_rank_penalty", idle.NO_STRENGTH, True, {"rank_penalty_strength": 0}, "LoRA",
        mended={"rank_penalty_strength": 0.1},
    ),
    Case("lora_rank_penalty", idle.NO_LORA, True, mended={"lora": True}),
    Case("lora_rank_penalty", idle.NO_THIN_MATRIX, True, {}, "large LoRA", mended_parameters="LoRA"),
    Case(
        "rank_penalty_strength", idle.NO_RANK_PENALTY, 0.1, {"lora_rank_penalty": False}, "LoRA",
        mended={"lora_rank_penalty": True},
    ),
    Case("rank_penalty_strength", idle.NO_LORA, 0.1, mended_parameters="LoRA"),
    Case("rank_penalty_strength", idle.NO_THIN_MATRIX, 0.1, {}, "large LoRA", mended_parameters="LoRA"),
    Case("low_rank_emphasis", idle.NO_TORQUE, 2.0, {"torque": False}, "LoRA", mended={"torque": True}),
    Case("low_rank_emphasis", idle.NO_LORA, 2.0, mended={"lora": True}),
    Case("lora_direction", idle.NO_LORA, "orthogonal", mended_parameters="LoRA"),
    Case(
        "lora_direction", idle.NO_THIN_MATRIX, "orthogonal", {}, "large LoRA", mended_parameters="LoRA",
    ),
    Case("stochastic_rounding", idle.TO_NEAREST, True, {"master": "none"}, "bfloat16", {"master": "stochastic"}),
    Case("stochastic_rounding", idle.NOT_ROUNDED, True, mended_parameters="bfloat16"),
    Case("master", idle.NO_BFLOAT16, "ecc8", mended_parameters="bfloat16"),
    Case("seed", idle.NO_CHANCE, 3, {"optim_bits": 32}, mended={"optim_bits": 8}),
    Case("capturable", idle.NO_CUDA, True),
    Case("backend", idle.STRIDED, "triton", {}, "strided", mended_parameters="matrix"),
    Case("preset", idle.PRESET_OVERRULED, "full", {"weight_decay": 0.3}, mended={"weight_decay": 0.01}),
    Case("profile", idle.OVERRULED, "memory_optimized", {"mask_bits": 8}, mended={"mask_bits": 0}),
    Case("run_log_every", idle.NO_LOG, 3, mended={"run_log": "runs"}),
]  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def told(cls: type[Automagic], parameters: list[Any], **options: Any) -> list[str]:
    """What is said of an optimizer that is made, and when its first step begins."""
    notices.forget()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cls(parameters, **options).say_all_idle()
    return [str(x.message) for x in caught if "has no effect" in str(x.message)]


@pytest.fixture
def _paging(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, for what asks about the size."""
    if request.getfixturevalue("case").reason is idle.TOO_SMALL_TO_PAGE:
        monkeypatch.setattr(paged, "exists_on", lambda device: True)


@every_case
@pytest.mark.usefixtures("_paging")
def test_an_option_that_comes_to_nothing_is_told_with_what_to_do(case: Case) -> None:
    """By its name and value, and by nothing else."""
    said = told(Automagic, PARAMETERS[case.parameters](), **{case.option: case.value, **case.others})
    mine = [text for text in said if text.startswith(f"option {case.option}={case.value!r}: has no effect")]
    assert len(mine) == 1, said
    assert case.reason.remedy in mine[0]
    assert mine[0].endswith("leave it out")
    plain = {"optim_bits": 32, **vars(AutomagicConfig()), **case.others}
    assert mine[0].split("has no effect")[1].startswith(case.reason.words.format(**plain))


@every_case
@pytest.mark.usefixtures("_paging")
def test_what_has_an_effect_is_not_told(case: Case) -> None:
    """The negative controls: the option left out, and what the warning advises."""
    silent = [(case.parameters, case.others)]
    if case.mended is not None or case.mended_parameters is not None:
        mended = {case.option: case.value, **case.others, **(case.mended or {})}
        silent.append((case.mended_parameters or case.parameters, mended))
    for parameters, options in silent:
        said = told(Automagic, PARAMETERS[parameters](), **options)
        assert not [text for text in said if text.startswith(f"option {case.option}=")], said


def test_every_reason_of_every_option_has_its_case() -> None:
    wanted = {(name, reason.words) for name, line in idle.TABLE.items() for reason in line.reasons}
    assert {(case.option, case.reason.words) for case in CASES} == wanted


@pytest.mark.parametrize("cls", CLASSES)
def test_every_option_of_every_class_has_a_line(cls: type[Automagic]) -> None:
    """A new option has to say when it comes to nothing, or that it never does."""
    options = set(inspect.signature(cls).parameters) - {"params"}
    assert options == set(idle.TABLE) == set(config.RULES)


@pytest.mark.parametrize("parameters", sorted(PARAMETERS))
@pytest.mark.parametrize("cls", [Automagic, Automagic8bit, Automagic32bit])
def test_defaults_are_silent(cls: type[Automagic], parameters: str) -> None:
    """Left out, passed along by a form, or in a config as a whole."""
    bits = {"optim_bits": cls._class_options["optim_bits"]}
    numbers = {name: value for name, value in vars(AutomagicConfig()).items() if not isinstance(value, bool)}
    for options in ({}, {**numbers, **bits}, {**vars(AutomagicConfig()), **bits}):
        assert not told(cls, PARAMETERS[parameters](), **options)


@pytest.mark.parametrize("profile", ["lean", "memory_optimized", "balanced", "quality_optimized"])
def test_profiles_are_silent_where_they_have_an_effect(profile: str) -> None:
    assert not told(Automagic8bit, PARAMETERS["matrix"](), profile=profile)
    assert not told(Automagic8bit, PARAMETERS["LoRA"](), profile=profile)
    whole = vars(getattr(OptimizationProfiles, profile)())
    assert not told(Automagic8bit, PARAMETERS["LoRA"](), **whole)


def test_a_profile_of_which_all_is_overridden() -> None:
    said = told(Automagic8bit, PARAMETERS["matrix"](), profile="lean", mask_bits=8, came=True)
    assert [text for text in said if text.startswith("option profile='lean'")]
    assert not told(Automagic8bit, PARAMETERS["matrix"](), profile="lean", mask_bits=8)


# --- when and where -------------------------------------------------------------------------------------------------


def step(opt: Automagic) -> None:
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    opt.step()


def test_once_and_not_again(tools: Any) -> None:
    """Options that contradict each other at once; what rests on the parameters as the first step begins."""
    with pytest.warns(UserWarning, match="edge_penalty=0.3: has no effect with edge_suppression=False") as said:
        opt = Automagic8bit([made(64, 64)], edge_penalty=0.3, edge_suppression=False, rank_penalty_strength=0.1)
    assert len(said) == 1
    with pytest.warns(UserWarning, match="rank_penalty_strength=0.1: has no effect, as no parameter") as said:
        step(opt)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(opt)
        step(copy.deepcopy(opt))
        step(Automagic8bit([made(64, 64)], edge_penalty=0.3, edge_suppression=False, rank_penalty_strength=0.1))


def test_a_backward_pass_that_steps_says_it_too() -> None:
    p = made(300)
    opt = Automagic8bit([p], edge_penalty=0.3)
    p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="edge_penalty=0.3: has no effect, as no parameter has two sides"):
        opt.step_parameter(p, opt.param_groups[0])


def test_names_that_come_before_the_first_step_count(no_warnings: None) -> None:
    p = made(8, 64)
    opt = Automagic8bit([p], rank_penalty_strength=0.1)
    opt.name_parameters([("lora_A", p)])
    step(opt)


def test_one_parameter_for_which_it_has_an_effect_is_enough(no_warnings: None) -> None:
    step(Automagic8bit([made(300), made(64, 64)], edge_penalty=0.3))


def test_a_group_is_named() -> None:
    """Its own value counts for it alone, and the constructor's for the others."""
    groups = [{"params": [made(300)], "edge_penalty": 0.3}, {"params": [made(64, 64)]}]
    said = told(Automagic8bit, copy.deepcopy(groups), edge_penalty=0.2)
    assert [text.partition(": ")[0] for text in said] == ["option edge_penalty=0.3 in parameter group 0"]
    groups = [{"params": [made(300)]}, {"params": [made(64, 64)], "edge_penalty": 0.3}]
    said = told(Automagic8bit, groups, edge_penalty=0.2)
    assert [text.partition(": ")[0] for text in said] == ["option edge_penalty=0.2"]


def test_a_group_that_comes_later() -> None:
    opt = Automagic8bit([made(64, 64)])
    step(opt)
    opt.add_param_group({"params": [made(300)], "edge_penalty": 0.3})
    with pytest.warns(UserWarning, match="edge_penalty=0.3 in parameter group 1: has no effect"):
        step(opt)


@pytest.mark.skipif(not bnb.BITSANDBYTES_AVAILABLE, reason="bitsandbytes keeps the overrides")
def test_an_override() -> None:
    one, other = made(300), made(64, 64)
    bnb.GlobalOptimManager.get_instance().override_config([one, other], "edge_penalty", 0.3)
    with pytest.warns(UserWarning, match="edge_penalty=0.3 in a GlobalOptimManager override: has no effect") as said:
        step(Automagic8bit([one, other]))
    assert len(said) == 1


def test_requantize() -> None:
    opt = Automagic32bit([made(64, 64)])
    step(opt)
    with pytest.warns(UserWarning, match="mask_bits=8 of requantize: has no effect with optim_bits=32"):
        opt.requantize(mask_bits=8)


def test_a_new_option_without_a_line_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the table's completeness."""
    monkeypatch.setitem(config.RULES, "novelty", config.RULES["torque"])
    with pytest.raises(AssertionError):
        test_every_option_of_every_class_has_a_line(Automagic8bit)
