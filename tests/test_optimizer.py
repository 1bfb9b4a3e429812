"""Building an optimizer: its classes, parameters and options. What a step computes is tested with the rule."""

from __future__ import annotations

import logging
from typing import Any

import bitsandbytes
import pytest
import torch
from optimizer_cases import BIG, bits
from torch import nn

import automagic_bnb
from automagic_bnb import (
    Automagic,
    Automagic8bit,
    Automagic32bit,
    OptimizationProfiles,
    PagedAutomagic8bit,
    PagedAutomagic32bit,
)

# -------------------------------------------------------------------------------------------------------------- classes


@pytest.mark.parametrize(
    ("name", "optim_bits", "paged"),
    [
        ("Automagic", 32, False),
        ("Automagic8bit", 8, False),
        ("Automagic32bit", 32, False),
        ("PagedAutomagic8bit", 8, True),
        ("PagedAutomagic32bit", 32, True),
        ("Automagic_CameAMP_Improved_8Bit", 8, False),
        ("Automagic_CameAMP_8Bit", 8, False),
        ("create_improved_8bit_optimizer", 8, False),
    ],
)
def test_a_class_keeps_what_its_name_says(name: str, optim_bits: int, paged: bool, tools: Any) -> None:
    """Each public name builds an optimizer that torch and bitsandbytes know as theirs, and trains."""
    p = tools.parameters(BIG)
    opt = getattr(automagic_bnb, name)(p, lr=1e-3)
    assert isinstance(opt, torch.optim.Optimizer)
    assert isinstance(opt, bitsandbytes.optim.optimizer.Optimizer2State)
    assert (opt.config.optim_bits, opt.config.is_paged, opt.is_paged) == (optim_bits, paged, paged)
    before = p[0].detach().clone()
    tools.train(opt, p, range(3))
    assert bits(opt, p[0]) == optim_bits
    assert not torch.equal(before, p[0])


def test_public_names_are_exported() -> None:
    """`from automagic_bnb import *` brings every documented name."""
    for name in automagic_bnb.__all__:
        assert hasattr(automagic_bnb, name)
    assert automagic_bnb.BITSANDBYTES_AVAILABLE is True
    assert automagic_bnb.Automagic_CameAMP_8Bit is automagic_bnb.Automagic_CameAMP_Improved_8Bit is Automagic8bit


@pytest.mark.parametrize(
    ("cls", "options", "named"),
    [
        (Automagic32bit, {"optim_bits": 8}, "optim_bits"),
        (PagedAutomagic8bit, {"is_paged": False}, "is_paged"),
        (PagedAutomagic8bit, {"optim_bits": 32}, "optim_bits"),
        (PagedAutomagic32bit, {"optim_bits": 8}, "optim_bits"),
        (Automagic32bit, OptimizationProfiles.balanced().__dict__, "optim_bits"),
        (PagedAutomagic8bit, OptimizationProfiles.balanced().__dict__, "is_paged"),
    ],
)
def test_an_option_against_the_class_name_is_an_error(cls: Any, options: Any, named: str, tools: Any) -> None:
    """A class never keeps its state in another way than it promises; a profile's options count too."""
    with pytest.raises(ValueError, match=f"option {named}=.*{cls.__name__}"):
        cls(tools.parameters((3,)), **options)


def test_the_plain_class_and_the_8bit_class_take_optim_bits(tools: Any) -> None:
    """`optim_bits` is an option of both, as of bitsandbytes' optimizers."""
    assert Automagic(tools.parameters((3,)), optim_bits=8).param_groups[0]["optim_bits"] == 8
    assert Automagic8bit(tools.parameters((3,)), optim_bits="32").param_groups[0]["optim_bits"] == 32


@pytest.mark.parametrize("name", ["lean", "memory_optimized", "balanced", "quality_optimized"])
def test_profiles_can_be_spread_into_the_constructor(name: str, tools: Any) -> None:
    """`**config.__dict__` with edited attributes, and `profile=`, build the same optimizer."""
    edited = getattr(OptimizationProfiles, name)()
    edited.lr, edited.min_8bit_size = 2e-4, 99999999
    a = Automagic8bit(tools.parameters(BIG), **edited.__dict__)
    b = Automagic8bit(tools.parameters(BIG), lr=2e-4, profile=name, min_8bit_size=99999999)
    for opt in (a, b):
        tools.train(opt, opt.param_groups[0]["params"], range(2))
    assert bits(a, a.param_groups[0]["params"][0]) == (16 if a.config.factored else 32)
    assert not tools.differences(tools.snapshot(a), tools.snapshot(b))
    assert a.config.min_8bit_size == b.config.min_8bit_size == 99999999
    assert (b.config.profile, a.config.factored) == (name, name != "quality_optimized")


def test_config_shows_the_options_in_force(tools: Any) -> None:
    """`opt.config` holds the stored form of what was given."""
    opt = Automagic8bit(tools.parameters((3,)), lr="1e-4", betas="0.8, 0.9", came="false")
    assert (opt.config.lr, opt.config.betas, opt.config.came) == (1e-4, (0.8, 0.9, 0.999), False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decays": 1}, "did you mean 'weight_decay'"),
        ({"weight_decay": -1}, r"weight_decay=-1: must be a number from 0 to 1e\+06"),
        ({"block_wise": False}, "removed"),
        ({"lr": 2e-3, "max_lr": 1e-3}, "above max_lr"),
        ({"lr": "fast"}, "lr='fast'"),
    ],
)
def test_wrong_options_are_refused_by_the_constructor(options: Any, message: str, tools: Any) -> None:
    """The checks of the config are those of the constructor."""
    with pytest.raises((TypeError, ValueError), match=message):
        Automagic8bit(tools.parameters((3,)), **options)


# ----------------------------------------------------------------------------------------------------------- parameters


def forms(module: nn.Module) -> dict[str, Any]:
    return {
        "list": list(module.parameters()),
        "tuple": tuple(module.parameters()),
        "generator": module.parameters(),
        "dict_values": dict(module.named_parameters()).values(),
        "named": module.named_parameters(),
        "named list": list(module.named_parameters()),
        "group": [{"params": module.parameters()}],
        "group of named": [{"params": module.named_parameters(), "lr": 1e-3}],
    }


def small_model() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    return model


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("form", forms(small_model()))
def test_parameters_may_come_in_any_form(form: str, keyword: bool, tools: Any) -> None:
    """Whatever holds the parameters, positional or by keyword, the training is the same; names make random bits."""
    results = []
    for chosen in (form, "named list" if "named" in form else "list"):
        model = small_model()
        params = forms(model)[chosen]
        opt = Automagic8bit(params=params, lr=1e-3) if keyword else Automagic8bit(params, 1e-3)
        tools.train(opt, list(model.parameters()), range(3))
        results.append([p.detach().clone() for p in model.parameters()])
    assert not tools.differences(*results)


@pytest.mark.parametrize(
    ("params", "error"),
    [
        (list, ValueError),
        (lambda: nn.Parameter(torch.zeros(3)), TypeError),
        (lambda: ["weight"], TypeError),
        (lambda: [{"params": {nn.Parameter(torch.zeros(3))}}], TypeError),
        (lambda: [nn.Parameter(torch.zeros(3)) * 2], ValueError),
        (lambda: [("a", nn.Parameter(torch.zeros(3))), nn.Parameter(torch.zeros(3))], ValueError),
    ],
)
def test_torchs_own_checks_of_parameters_hold(params: Any, error: Any) -> None:
    """What torch refuses is refused in torch's words."""
    with pytest.raises(error):
        Automagic8bit(params(), lr=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_unsupported_dtypes_are_refused_with_the_supported_ones(dtype: torch.dtype, tools: Any) -> None:
    """The message names the shape, the dtype and what is supported; a later group leaves the optimizer as it was."""
    p = nn.Parameter(torch.zeros(3, 5, dtype=dtype))
    with pytest.raises(TypeError, match=rf"\(3, 5\).*{dtype}.*float32, bfloat16 and float16"):
        Automagic8bit([p], lr=1e-3)
    good = tools.parameters(BIG)
    opt = Automagic8bit(good, lr=1e-3)
    tools.train(opt, good, range(2))
    before = tools.snapshot(opt)
    with pytest.raises(TypeError, match="float16"):
        opt.add_param_group({"params": [p]})
    assert not tools.differences(before, tools.snapshot(opt))
    tools.train(opt, good, range(2, 3))


# -------------------------------------------------------------------------------------------------------------- logging


def test_verbose_says_where_state_is_kept(tools: Any, caplog: pytest.LogCaptureFixture) -> None:
    """One line for each group, through `logging`."""
    p = tools.parameters(BIG, (3,))
    with caplog.at_level(logging.INFO, logger="automagic_bnb"):
        Automagic8bit([{"params": p[:1]}, {"params": p[1:], "lr": 1e-3}], verbose=True)
    assert [r.message for r in caplog.records] == [
        "group 0: lr found during training; elements by storage: {'factored': 4096}",
        "group 1: lr 0.001; elements by storage: {'small': 3}",
    ]


def test_without_verbose_nothing_is_printed(tools: Any, capfd: Any, caplog: Any, no_warnings: None) -> None:
    """Building and stepping are silent."""
    p = tools.parameters(BIG)
    opt = Automagic8bit(p)
    tools.train(opt, p, range(11))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_paged_state_on_the_cpu_is_ordinary_memory_and_says_so(tools: Any) -> None:
    """Once."""
    p = tools.parameters((400, 300), (400, 300))
    opt = PagedAutomagic8bit(p, lr=1e-3)
    with pytest.warns(UserWarning, match="paged optimizer states exist on CUDA only; elsewhere") as caught:
        tools.train(opt, p, range(2))
    assert len(caught) == 1


# --- mistakes and corner cases ----------------------------------------------------------------------------------------


def test_a_rate_below_its_lower_bound_is_told(tools: Any) -> None:
    with pytest.warns(
        UserWarning, match=r"lr=1e-08 in parameter group 0: lies below min_lr=1e-07, which has no effect"
    ):
        Automagic8bit(tools.parameters(BIG), lr=1e-8)


@pytest.mark.parametrize("cls", [Automagic, Automagic32bit])
def test_factored_beside_32_bits_is_told(cls: Any, tools: Any) -> None:
    with pytest.warns(UserWarning, match="factored=True: has no effect with optim_bits=32"):
        cls(tools.parameters(BIG), lr=1e-3, factored=True)


def test_a_profile_decides_the_bits_where_the_class_does_not(tools: Any) -> None:
    """As the profile's config passed on does."""
    p = tools.parameters(BIG)
    assert Automagic(p, lr=1e-3, profile="memory_optimized").config.optim_bits == 8
    assert Automagic(p, lr=1e-3, profile="memory_optimized", optim_bits=32, factored=False).config.optim_bits == 32
    assert Automagic(p, lr=1e-3).config.optim_bits == 32
    assert Automagic32bit(p, lr=1e-3, profile="balanced").config.optim_bits == 32
