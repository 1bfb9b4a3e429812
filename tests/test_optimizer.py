"""Building an optimizer, its groups and overrides, and stepping it. What a step computes is tested with the rule."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn

import automagic_bnb
from automagic_bnb import (
    Automagic,
    Automagic8bit,
    Automagic32bit,
    OptimizationProfiles,
    PagedAutomagic8bit,
    PagedAutomagic32bit,
    config,
)

BIG = (64, 64)
"""The smallest square that is kept in 8 bits by default."""
ANOTHER_VALUE = {
    "lr": 3e-4,
    "min_lr": 1e-6,
    "max_lr": 5e-3,
    "auto_lr": True,
    "weight_decay": 0.3,
    "warmup_steps": 3,
    "betas": (0.5, 0.6, 0.7),
    "eps": (1e-3, 1e-1),
    "clip_threshold": 0.3,
    "percentile_clipping": 50,
    "optim_bits": 32,
    "min_8bit_size": 8192,
    "block_wise": True,
    "stable_emb": True,
    "force_8bit": True,
    "factored": True,
    "edge_suppression": False,
    "edge_penalty": 0.9,
    "edge_threshold": 0.1,
    "background_regularization": False,
    "frequency_penalty": 0.9,
    "spatial_awareness": False,
    "detail_preservation": 1.5,
    "lora": True,
    "lora_rank_penalty": False,
    "rank_penalty_strength": 0.5,
    "low_rank_emphasis": 0.1,
    "torque": False,
    "came": False,
    "cautious": False,
    "stochastic_rounding": False,
    "master": "ecc8",
    "seed": 7,
}
"""A legal value other than the default for every option of a group."""


def manager() -> Any:
    return bitsandbytes.optim.GlobalOptimManager.get_instance()


def bits(opt: Any, p: Any) -> int:
    """How many bits the first moment of p is kept in."""
    return opt.state[p]["state1"].element_size() * 8


def test_every_group_option_has_another_value_here() -> None:
    """A new option must join these tests."""
    assert set(ANOTHER_VALUE) == set(config.GROUP_OPTIONS)


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


@pytest.mark.parametrize("name", ["memory_optimized", "balanced", "quality_optimized"])
def test_profiles_can_be_spread_into_the_constructor(name: str, tools: Any) -> None:
    """`**config.__dict__` with edited attributes, and `profile=`, build the same optimizer."""
    edited = getattr(OptimizationProfiles, name)()
    edited.lr, edited.min_8bit_size = 2e-4, 99999999
    a = Automagic8bit(tools.parameters(BIG), **edited.__dict__)
    b = Automagic8bit(tools.parameters(BIG), lr=2e-4, profile=name, min_8bit_size=99999999)
    for opt in (a, b):
        tools.train(opt, opt.param_groups[0]["params"], range(2))
    assert bits(a, a.param_groups[0]["params"][0]) == 32
    assert not tools.differences(tools.snapshot(a), tools.snapshot(b))
    assert a.config.min_8bit_size == b.config.min_8bit_size == 99999999
    assert (b.config.profile, a.config.factored) == (name, name == "memory_optimized")


def test_config_shows_the_options_in_force(tools: Any) -> None:
    """`opt.config` holds the stored form of what was given."""
    opt = Automagic8bit(tools.parameters((3,)), lr="1e-4", betas="0.8, 0.9", came="false")
    assert (opt.config.lr, opt.config.betas, opt.config.came) == (1e-4, (0.8, 0.9, 0.999), False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decays": 1}, "did you mean 'weight_decay'"),
        ({"weight_decay": -1}, r"weight_decay=-1: must be a number >= 0"),
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
    """Whatever holds the parameters, positional or by keyword, the training is the same."""
    results = []
    for chosen in (form, "list"):
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int32, torch.uint8, torch.bool])
def test_unsupported_dtypes_are_refused_with_the_supported_ones(dtype: torch.dtype, tools: Any) -> None:
    """The message names the shape, the dtype and what is supported; a later group leaves the optimizer as it was."""
    p = nn.Parameter(torch.zeros(3, 5, dtype=dtype), requires_grad=False)
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


# --------------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("name", ANOTHER_VALUE)
def test_every_option_may_differ_by_group(name: str, tools: Any) -> None:
    """A group's own value is checked, stored and leaves other groups alone."""
    first, second = tools.parameters((3,), (5,))
    value = ANOTHER_VALUE[name]
    given = str(value) if isinstance(value, (bool, int, float, tuple)) else value
    opt = Automagic8bit([{"params": [first]}, {"params": [second], name: given}], lr=2e-4)
    usual = {**vars(opt.config), "auto_lr": False, "max_lr": 10 * 2e-4}
    assert opt.param_groups[1][name] == value
    assert type(opt.param_groups[1][name]) is type(value)
    assert opt.param_groups[0][name] == usual[name]


@pytest.mark.parametrize("name", [n for n in ANOTHER_VALUE if n != "block_wise"])
def test_a_groups_wrong_value_is_named_with_the_group(name: str, tools: Any) -> None:
    """The message says which group."""
    first, second = tools.parameters((3,), (5,))
    groups = [{"params": [first]}, {"params": [second], name: "wrong"}]
    with pytest.raises((TypeError, ValueError), match=rf"option {name}='wrong' in parameter group 1: must be "):
        Automagic8bit(groups, lr=2e-4)


def test_betas_of_a_group_are_a_plain_tuple(tools: Any) -> None:
    """Schedulers and loggers index and rebuild them."""
    a, b = tools.parameters((3,), (5,))
    opt = Automagic8bit([{"params": [a]}, {"params": [b], "betas": [0.5, 0.6]}], betas="[0.8, 0.9]")
    assert [g["betas"] for g in opt.param_groups] == [(0.8, 0.9, 0.999), (0.5, 0.6, 0.999)]
    assert all(type(g["betas"]) is tuple for g in opt.param_groups)


def test_rates_and_bounds_are_resolved_group_by_group(tools: Any) -> None:
    """max_lr follows the group's own rate; a rate of its own ends the search for one in that group."""
    a, b, c, d = tools.parameters((3,), (4,), (5,), (6,))
    groups = [{"params": [a]}, {"params": [b], "lr": 0.01}, {"params": [c], "lr": 1e-4, "max_lr": 2e-4}]
    opt = Automagic8bit([*groups, {"params": [d], "lr": 1e-4, "auto_lr": True}])
    found = [(g["lr"], g["base_lr"], g["auto_lr"], g["max_lr"]) for g in opt.param_groups]
    assert found == [
        (1e-6, 1e-6, True, 1e-3),
        (0.01, 0.01, False, pytest.approx(0.1)),
        (1e-4, 1e-4, False, 2e-4),
        (1e-4, 1e-4, True, 1e-3),
    ]


@pytest.mark.parametrize("group", [{"lr": 0.01}, {"lr": 1e-4, "max_lr": 1e-5}, {"min_lr": 0.5}])
def test_a_groups_rate_must_fit_the_bounds_the_user_set(group: dict[str, Any], tools: Any) -> None:
    """A max_lr given to the constructor binds its groups."""
    (p,) = tools.parameters((3,))
    with pytest.raises(ValueError, match="in parameter group 0"):
        Automagic8bit([{"params": [p], **group}], lr=1e-4, max_lr=1e-3)


def test_unknown_keys_of_a_group_are_kept(tools: Any, no_warnings: None) -> None:
    """Trainers store things of their own there; they come back as the same objects."""
    (p,) = tools.parameters((3,))
    mine = {"anything": object()}
    opt = Automagic8bit([{"params": [p], "name": "unet", "lr_scale": 0.5, "swap": mine}], lr=1e-3)
    group = opt.param_groups[0]
    assert (group["name"], group["lr_scale"]) == ("unet", 0.5)
    assert group["swap"] is mine


def test_a_key_that_looks_like_a_typo_is_warned_of_once(tools: Any) -> None:
    """It stays legal, since it may be a trainer's own; it is never silent."""
    a, b = tools.parameters((3,), (5,))
    with pytest.warns(UserWarning, match=r"'weight_decays' in parameter group 0.*did you mean 'weight_decay'"):
        opt = Automagic8bit([{"params": [a], "weight_decays": 0.5}], lr=1e-3)
    assert opt.param_groups[0]["weight_decays"] == 0.5
    assert opt.param_groups[0]["weight_decay"] == 5e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Automagic8bit([{"params": [b], "weight_decays": 0.5}], lr=1e-3)


@pytest.mark.parametrize(
    ("key", "value"), [("is_paged", True), ("backend", "torch"), ("verbose", True), ("profile", "balanced")]
)
def test_an_option_of_the_whole_optimizer_is_refused_in_a_group(key: str, value: Any, tools: Any) -> None:
    """It would be ignored there."""
    (p,) = tools.parameters((3,))
    with pytest.raises(TypeError, match=f"option {key}={value!r} in parameter group 0: holds for the whole optimizer"):
        Automagic8bit([{"params": [p], key: value}], lr=1e-3)


def test_empty_groups_are_legal(tools: Any) -> None:
    """Trainers make a no-decay group that may hold nothing."""
    p = tools.parameters(BIG)
    opt = Automagic8bit([{"params": []}, {"params": p}, {"params": [], "weight_decay": 0.0}])
    tools.train(opt, p, range(3))
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    tools.train(opt, p, range(3, 5))
    assert len(opt.get_learning_rates()) == 3
    assert float(opt.get_avg_learning_rate()) == pytest.approx(float(opt.get_learning_rates()[1]))


def test_the_users_group_dicts_are_left_alone(tools: Any) -> None:
    """Two optimizers may be built from the same group dicts."""
    group = {"params": tools.parameters((3,)), "lr": 1e-4}
    Automagic8bit([group])
    assert set(group) == {"params", "lr"}


def test_a_group_added_later_steps_and_defaults_stay(tools: Any) -> None:
    """add_param_group in the middle of a run fills in the options; `defaults` still names them all."""
    a, b = tools.parameters(BIG, BIG)
    opt = Automagic8bit([a], lr=1e-3, weight_decay=0.1)
    assert set(opt.defaults) == set(config.GROUP_OPTIONS)
    tools.train(opt, [a], range(3))
    defaults = dict(opt.defaults)
    opt.add_param_group({"params": [b], "lr": 1e-4})
    assert opt.defaults == defaults
    assert (opt.param_groups[1]["lr"], opt.param_groups[1]["weight_decay"]) == (1e-4, 0.1)
    before = b.detach().clone()
    tools.train(opt, [a, b], range(3, 5))
    assert (opt.state[a]["step"], opt.state[b]["step"]) == (5, 2)
    assert not torch.equal(before, b)


def test_a_failed_add_param_group_changes_nothing(tools: Any) -> None:
    """Whatever is wrong with it: an option, a parameter that is there already, a parameter of another dtype."""
    a, b = tools.parameters(BIG, BIG)
    opt = Automagic8bit([a], lr=1e-3)
    before, defaults = tools.snapshot(opt), dict(opt.defaults)
    for group in ({"params": [b], "lr": -1}, {"params": [a]}, {"params": [b.detach().double()]}, {"params": ["x"]}):
        with pytest.raises((TypeError, ValueError)):
            opt.add_param_group(group)
    assert opt.defaults == defaults
    assert not tools.differences(before, tools.snapshot(opt))


@pytest.mark.parametrize("lr", [1e-3, None])
def test_a_run_with_a_later_group_can_be_repeated_and_resumed(lr: float | None, tools: Any) -> None:
    """Random bits hang on a parameter's place, so an optimizer built with both groups resumes bit for bit."""
    p = tools.parameters(BIG, (257,), BIG, dtype=torch.bfloat16)
    opt = Automagic8bit(p[:2], lr=lr)
    tools.train(opt, p[:2], range(4))
    opt.add_param_group({"params": p[2:], "weight_decay": 0.0})
    tools.train(opt, p, range(4, 7))
    copies = [nn.Parameter(x.detach().clone()) for x in p]
    resumed = Automagic8bit([{"params": copies[:2]}, {"params": copies[2:], "weight_decay": 0.0}], lr=lr)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    tools.train(opt, p, range(7, 12))
    tools.train(resumed, copies, range(7, 12))
    assert not tools.differences(tools.snapshot(opt), tools.snapshot(resumed))


def test_random_bits_hang_on_the_place_of_a_parameter(tools: Any) -> None:
    """The negative control of the last test: another order draws other bits."""
    results = []
    for order in ((0, 1), (1, 0)):
        p = tools.parameters(BIG, (257,), dtype=torch.bfloat16)
        opt = Automagic8bit([p[i] for i in order], lr=1e-3)
        tools.train(opt, p, range(4))
        results.append([x.detach().clone() for x in p])
    assert tools.differences(*results)


def test_a_parameter_given_twice_in_a_group_does_no_harm(tools: Any) -> None:
    """torch warns of it and goes on; copying such an optimizer works too."""
    (p,) = tools.parameters(BIG)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = Automagic8bit([p, p], lr=1e-3)
    tools.train(opt, [p], range(2))
    copy.deepcopy(opt).step()


# ------------------------------------------------------------------------------------------------------------ overrides


@pytest.mark.parametrize("spelling", ["key and value", "dict", "list of parameters"])
@pytest.mark.parametrize("when", ["before construction", "after construction"])
def test_an_override_of_optim_bits_reaches_its_parameter_only(when: str, spelling: str, tools: Any) -> None:
    """GlobalOptimManager gives one parameter 32-bit state; its neighbours keep 8 bits."""
    p = tools.parameters(BIG, BIG, BIG)
    opt = None if when.startswith("before") else Automagic8bit(p, lr=1e-3)
    if spelling == "key and value":
        manager().override_config(p[1], "optim_bits", 32)
    else:
        manager().override_config(p[1] if spelling == "dict" else [p[1]], key_value_dict={"optim_bits": 32})
    opt = opt or Automagic8bit(p, lr=1e-3)
    tools.train(opt, p, range(3))
    assert [bits(opt, x) for x in p] == [8, 32, 8]


def test_an_override_reaches_no_other_optimizer(tools: Any) -> None:
    """Not ours, nor bitsandbytes' own with a parameter at the same place, and theirs does not reach ours."""
    mine, other, theirs = (tools.parameters(BIG, BIG) for _ in range(3))
    manager().override_config(mine[0], "optim_bits", 32)
    opt = Automagic8bit(mine, lr=1e-3)
    tools.train(opt, mine, range(2))
    second = Automagic8bit(other, lr=1e-3)
    adam = bitsandbytes.optim.AdamW8bit(theirs, lr=1e-3)
    for each, parameters in ((second, other), (adam, theirs)):
        tools.train(each, parameters, range(2))
    assert [bits(opt, x) for x in mine] == [32, 8]
    assert [bits(second, x) for x in other] == [8, 8]
    assert [bits(adam, x) for x in theirs] == [8, 8]

    manager().register_parameters(theirs)  # bitsandbytes keys what it registers by place, for every optimizer
    manager().override_config(theirs[0], "optim_bits", 32)
    manager().register_parameters(theirs)
    assert (0, 0) in manager().index2config
    third = Automagic8bit(parameters := tools.parameters(BIG, BIG), lr=1e-3)
    tools.train(third, parameters, range(2))
    assert [bits(third, x) for x in parameters] == [8, 8]


@pytest.mark.parametrize("name", [n for n in ANOTHER_VALUE if n not in ("lr", "auto_lr", "block_wise", "stable_emb")])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_override_equals_a_group_of_its_own(name: str, when: str, tools: Any) -> None:
    """Any option, set for one parameter, acts as it would in a group that holds that parameter alone."""
    shapes, value = ((3, 300), BIG), ANOTHER_VALUE[name]
    options = {"lr": 1e-3, "warmup_steps": 5, "rank_penalty_strength": 0.3}
    low_rank = name in ("lora", "lora_rank_penalty", "rank_penalty_strength", "low_rank_emphasis")
    if low_rank and name != "lora":
        options["lora"] = True
    overridden, grouped, plain = (tools.parameters(*shapes, dtype=torch.bfloat16) for _ in range(3))
    opt = Automagic8bit(overridden, **options) if when == "after" else None
    manager().override_config(overridden[1], name, value if name != "betas" else list(value))
    opt = opt or Automagic8bit(overridden, **options)
    reference = Automagic8bit([{"params": grouped[:1]}, {"params": grouped[1:], name: value}], **options)
    without = Automagic8bit(plain, **options)
    for each, parameters in ((opt, overridden), (reference, grouped), (without, plain)):
        tools.train(each, parameters, range(11 if low_rank else 5))  # the rank penalty comes at the tenth step
    results = [{k: v for k, v in tools.snapshot(o).items() if k != "groups"} for o in (opt, reference, without)]
    assert not tools.differences(results[0], results[1])
    if name not in ("min_8bit_size", "force_8bit", "min_lr", "max_lr", "background_regularization"):
        assert tools.differences(results[0]["parameters"][1], results[2]["parameters"][1])  # the option does something
    if name == "min_8bit_size":
        assert tools.differences(results[0]["state"][1], results[2]["state"][1])


@pytest.mark.parametrize(
    ("rate", "bounds"), [(3e-4, {}), (0.05, {}), (3e-4, {"min_lr": 2.9e-4, "max_lr": 3.1e-4}), (0.0, {})]
)
def test_an_override_of_the_rate_is_that_rate(rate: float, bounds: dict[str, float], tools: Any) -> None:
    """Even far above the group's: the bounds follow it, or hold around it, as for the constructor's rate."""
    a, b = tools.parameters(BIG), tools.parameters(BIG)
    manager().override_config(a[0], "lr", rate)
    opt, expected = Automagic8bit(a, lr=1e-5, **bounds), Automagic8bit(b, lr=rate, **bounds)
    for each, parameters in ((opt, a), (expected, b)):
        tools.train(each, parameters, range(8))
    assert not tools.differences(tools.snapshot(opt)["parameters"], tools.snapshot(expected)["parameters"])


def test_an_override_of_the_rate_respects_a_max_lr_that_was_set(tools: Any) -> None:
    """Above it, it is the error that the constructor would raise."""
    a, b = tools.parameters(BIG, BIG)
    opt = Automagic8bit([a, b], lr=1e-5, max_lr=1e-3)
    manager().override_config(b, "lr", 0.05)
    tools.give_gradients([a, b], 0)
    with pytest.raises(ValueError, match=r"lr=0.05 in a GlobalOptimManager override: lies above max_lr"):
        opt.step()


def test_an_override_may_switch_the_search_for_a_rate_on(tools: Any) -> None:
    """One parameter looks for its rate while its group keeps one."""
    a, b = tools.parameters(BIG, BIG)
    manager().override_config(b, "auto_lr", True)
    opt = Automagic8bit([a, b], lr=1e-5)
    tools.train(opt, [a, b], range(5))
    assert "probe_sum" in opt.state[b]
    assert "probe_sum" not in opt.state[a]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("weight_decay", -1, "weight_decay=-1 in a GlobalOptimManager override"),
        ("weight_decays", 1, "did you mean 'weight_decay'"),
        ("is_paged", True, "whole optimizer"),
    ],
)
def test_a_wrong_override_is_refused(key: str, value: Any, message: str, tools: Any) -> None:
    """At the step that would use it, since bitsandbytes' manager takes anything."""
    p = tools.parameters(BIG)
    opt = Automagic8bit(p, lr=1e-3)
    manager().override_config(p[0], key, value)
    tools.give_gradients(p, 0)
    before = p[0].detach().clone()
    with pytest.raises((TypeError, ValueError), match=message):
        opt.step()
    assert torch.equal(before, p[0])


def test_overrides_meant_for_bitsandbytes_own_optimizers_are_passed_over(tools: Any) -> None:
    """Keys that only those read do not stop ours."""
    p = tools.parameters(BIG)
    manager().override_config(p[0], key_value_dict={"max_unorm": 1.0, "skip_zeros": True, "alpha": 5, "optim_bits": 32})
    opt = Automagic8bit(p, lr=1e-3)
    tools.train(opt, p, range(2))
    assert bits(opt, p[0]) == 32
    assert opt.get_config(0, 0, opt.param_groups[0])["optim_bits"] == 32


# ----------------------------------------------------------------------------------------------------------- embeddings


def embedding_bits(opt: Any, module: nn.Module, tools: Any) -> list[int]:
    tools.train(opt, list(module.parameters()), range(2))
    return [bits(opt, p) for p in module.parameters() if p.numel() >= 4096]


def test_bitsandbytes_stable_embedding_has_32bit_state(tools: Any) -> None:
    """Through the override it registers for itself; no option is needed."""
    model = nn.ModuleDict({"words": bitsandbytes.nn.StableEmbedding(64, 64), "head": nn.Linear(64, 64)})
    assert embedding_bits(Automagic8bit(model.parameters(), lr=1e-3), model, tools) == [32, 8]
    assert id(model["head"].weight) not in manager().pid2config


def test_a_stable_embedding_of_another_optimizer_is_let_be(tools: Any) -> None:
    """bitsandbytes lists every such module of the process; only those with our parameters are ours."""
    elsewhere, mine = bitsandbytes.nn.StableEmbedding(64, 64), nn.Linear(64, 64)
    assert embedding_bits(Automagic8bit(mine.parameters(), lr=1e-3), mine, tools) == [8]
    assert id(elsewhere.weight) not in manager().pid2config


def test_an_own_override_stands_above_the_modules(tools: Any) -> None:
    """The user's word for a StableEmbedding's weight wins."""
    model = bitsandbytes.nn.StableEmbedding(64, 64)
    manager().override_config(model.weight, "optim_bits", 8)
    assert embedding_bits(Automagic8bit(model.parameters(), lr=1e-3), model, tools) == [8]


@pytest.mark.parametrize("how", ["named parameters", "marked weights"])
def test_stable_emb_keeps_embeddings_in_32_bits(how: str, tools: Any, no_warnings: None) -> None:
    """Embeddings are known by their names, or by a mark on the weight."""
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(64, 64), "head": nn.Linear(64, 64)})
    if how == "marked weights":
        model["embed_tokens"].weight._is_embedding = True
    params = model.named_parameters() if how.startswith("named") else model.parameters()
    assert embedding_bits(Automagic8bit(params, lr=1e-3, stable_emb=True), model, tools) == [32, 8]


def test_without_stable_emb_embeddings_are_like_the_rest(tools: Any) -> None:
    """The negative control."""
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(64, 64), "head": nn.Linear(64, 64)})
    assert embedding_bits(Automagic8bit(model.named_parameters(), lr=1e-3), model, tools) == [8, 8]


def test_stable_emb_warns_where_nothing_can_be_recognised(tools: Any) -> None:
    """Plain parameters carry no names: the warning names both remedies."""
    with pytest.warns(UserWarning, match=r"stable_emb=True has no effect.*named_parameters\(\).*_is_embedding"):
        Automagic8bit(nn.Embedding(64, 64).parameters(), lr=1e-3, stable_emb=True)


def test_stable_emb_is_silent_where_it_is_served(no_warnings: None) -> None:
    """bitsandbytes' own embedding, 32-bit state, names without an embedding, and empty groups give no warning."""
    Automagic8bit(bitsandbytes.nn.StableEmbedding(64, 64).parameters(), lr=1e-3, stable_emb=True)
    Automagic32bit(nn.Linear(4, 4).parameters(), lr=1e-3, stable_emb=True)
    Automagic8bit(nn.Linear(4, 4).named_parameters(), lr=1e-3, stable_emb=True)
    Automagic8bit([{"params": []}], lr=1e-3, stable_emb=True)


# ------------------------------------------------------------------------------------------------------------- stepping

SHAPES = [(), (1,), (255,), (256,), (257,), (0,), (0, 5), (5, 0), (7, 1), (1, 7), (5, 3, 3, 3), (3, 300), (64, 65)]
STORAGES = {
    "32bit": {"optim_bits": 32},
    "8bit": {"optim_bits": 8, "force_8bit": True},
    "factored": {"optim_bits": 8, "force_8bit": True, "factored": True},
}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parameters_of_every_shape_move(shape: Any, dtype: torch.dtype, storage: str, tools: Any) -> None:
    """0-d, odd sizes around a block, empty, convolutions: each is stepped, stays finite and descends."""
    p = tools.parameters(shape, dtype=dtype)
    opt = Automagic(p, lr=1e-2, weight_decay=0.0, **STORAGES[storage])
    before = p[0].detach().clone()
    for _ in range(12):
        p[0].grad = torch.full_like(p[0], 0.01)
        opt.step()
    assert p[0].shape == shape
    assert p[0].dtype == dtype
    assert (p[0] < before).all()
    assert torch.isfinite(p[0]).all()
    if p[0].numel():
        assert opt.state[p[0]]["step"] == 12
        assert bits(opt, p[0]) == (32 if storage == "32bit" else 8)


def strided(kind: str, x: torch.Tensor) -> torch.Tensor:
    """The same values in another layout."""
    if kind == "channels last":
        return x.to(memory_format=torch.channels_last)
    if kind == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    return torch.stack([x, torch.full_like(x, 99)], dim=-1)[..., 0]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("what", ["parameter", "gradient", "both"])
@pytest.mark.parametrize("kind", ["channels last", "transposed", "every other element"])
def test_strides_do_not_matter(kind: str, what: str, storage: str, tools: Any) -> None:
    """A strided parameter or gradient is updated exactly as its contiguous copy, in its own memory."""
    plain, copied = (tools.parameters((16, 8, 3, 5), dtype=torch.bfloat16) for _ in range(2))
    if what != "gradient":
        copied[0].data = strided(kind, copied[0].data)
        assert not copied[0].is_contiguous()
    strides, address = copied[0].stride(), copied[0].data_ptr()
    optimizers = [Automagic(p, lr=1e-2, **STORAGES[storage]) for p in (plain, copied)]
    for step in range(12):
        for p, opt in zip((plain, copied), optimizers, strict=True):
            tools.give_gradients(p, step)
            if p is copied and what != "parameter":
                p[0].grad = strided(kind, p[0].grad)
            opt.step()
    a, b = (tools.snapshot(opt) for opt in optimizers)
    assert not tools.differences(a, b)
    assert (copied[0].stride(), copied[0].data_ptr()) == (strides, address)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_may_have_another_dtype_than_its_parameter(dtype: torch.dtype, tools: Any) -> None:
    """A float32 gradient of a half-precision parameter counts at its own precision."""
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch ties a gradient's dtype to its parameter's")
    same, wide, finer = (tools.parameters(BIG, dtype=dtype) for _ in range(3))
    for p in (wide[0], finer[0]):
        p.grad_dtype = torch.float32
    optimizers = [Automagic8bit(p, lr=1e-2) for p in (same, wide, finer)]
    for step in range(5):
        tools.give_gradients(same, step)
        wide[0].grad = same[0].grad.float()
        finer[0].grad = same[0].grad.float() * (1 + 2**-12)
        for opt in optimizers:
            opt.step()
    equal, close = tools.snapshot(optimizers[1]), tools.snapshot(optimizers[2])
    assert not tools.differences(tools.snapshot(optimizers[0]), equal)
    assert tools.differences(close["state"], equal["state"])


def test_parameters_without_a_gradient_are_left_alone(tools: Any) -> None:
    """No gradient: no state, no change, no step counted; whether one parameter has none or all."""
    a, b = tools.parameters(BIG, BIG)
    opt = Automagic8bit([a, b], lr=1e-3)
    before = tools.snapshot(opt)
    opt.step()
    assert not tools.differences(before, tools.snapshot(opt))
    tools.train(opt, [a], range(2))
    assert opt.state[a]["step"] == 2
    assert not opt.state.get(b)
    assert torch.equal(before["parameters"][1], b)


def test_a_parameter_may_be_frozen_for_a_while(tools: Any) -> None:
    """Its own step counter stands still meanwhile; afterwards it goes on where it stopped."""
    a, b = tools.parameters(BIG, BIG)
    c, d = tools.parameters(BIG, BIG)
    opt, reference = Automagic8bit([a, b], lr=1e-3), Automagic8bit([c, d], lr=1e-3)
    for step in (0, 1, 2, 3):
        frozen = step in (1, 2)
        b.requires_grad_(not frozen)
        tools.give_gradients([a, b], step)
        if frozen:
            b.grad = None
        opt.step()
        if not frozen:
            tools.give_gradients([c, d], step)
            reference.step()
    assert (opt.state[a]["step"], opt.state[b]["step"]) == (4, 2)
    assert not tools.differences([b.detach(), opt.state[b]], [d.detach(), reference.state[d]])


def test_a_sparse_gradient_is_an_error_with_a_remedy(tools: Any) -> None:
    """The message names the shape and what to do."""
    embedding = nn.Embedding(70, 64, sparse=True)
    opt = Automagic8bit(embedding.parameters(), lr=1e-3)
    embedding(torch.tensor([1, 2])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"\(70, 64\) is sparse.*sparse=False"):
        opt.step()
    assert torch.equal(before, embedding.weight)


def test_a_closure_is_called_once_with_gradients_enabled(tools: Any) -> None:
    """Its result is returned; inside `no_grad` too; without one, None is."""
    (p,) = tools.parameters(BIG)
    opt = Automagic8bit([p], lr=1e-3)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    before = p.square().sum().item()
    with torch.no_grad():
        assert opt.step(closure).item() == before
    assert calls == [True]
    assert p.square().sum().item() < before
    assert opt.step() is None


def test_step_is_a_bound_method(tools: Any) -> None:
    """Schedulers look for `step.__func__`, on the instance and on the class."""
    opt = Automagic8bit(tools.parameters(BIG), lr=1e-3)
    assert opt.step.__self__ is opt
    assert opt.step.__func__ is Automagic8bit.step
    schedulers = [torch.optim.lr_scheduler.LambdaLR(opt, lambda _: 1.0) for _ in range(2)]
    opt.step()
    schedulers[0].step()


def test_step_hooks_run_once_each(tools: Any) -> None:
    """torch's hooks around `step` work."""
    p = tools.parameters(BIG)
    opt = Automagic8bit(p, lr=1e-3)
    seen: list[str] = []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    tools.train(opt, p, range(2))
    assert seen == ["before", "after"] * 2


@pytest.mark.parametrize("lr", [1e-3, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_global_random_state_is_untouched(lr: float | None, dtype: torch.dtype, tools: Any) -> None:
    """Neither building nor stepping draws from or seeds torch's, numpy's or Python's generator."""
    import random

    import numpy as np

    p = tools.parameters(BIG, (16, 300), (300,), dtype=dtype)
    p[1]._is_lora_layer = True
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    opt = Automagic8bit(p, lr=lr, percentile_clipping=90)
    tools.train(opt, p, range(11))
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()


def test_the_seed_of_the_random_bits_is_an_option(tools: Any) -> None:
    """The same seed repeats a run bit for bit, whatever the global seed; another one does not."""
    results = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 5)):
        torch.manual_seed(global_seed)
        p = tools.parameters(BIG, dtype=torch.bfloat16)
        tools.train(Automagic8bit(p, lr=1e-3, seed=seed), p, range(5))
        results.append(p[0].detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_two_optimizers_take_turns(tools: Any) -> None:
    """Alternating with another optimizer changes nothing."""
    alone, first, second = (tools.parameters(BIG, (300,), dtype=torch.bfloat16) for _ in range(3))
    expected, a = Automagic8bit(alone, lr=1e-3), Automagic8bit(first, lr=1e-3)
    b = Automagic8bit(second, factored=True, force_8bit=True)
    tools.train(expected, alone, range(6))
    for step in range(6):
        tools.train(a, first, range(step, step + 1))
        tools.train(b, second, range(step, step + 1))
    assert not tools.differences(tools.snapshot(expected), tools.snapshot(a))
    assert tools.differences(tools.snapshot(a)["parameters"], tools.snapshot(b)["parameters"])


@pytest.mark.parametrize("method", ["step_parameter", "update_step"])
@pytest.mark.parametrize("lr", [1e-3, None])
@pytest.mark.parametrize("storage", STORAGES)
def test_stepping_one_parameter_at_a_time_equals_step(storage: str, lr: Any, method: str, tools: Any) -> None:
    """As a backward pass that updates while it runs does, in whatever order the gradients arrive."""
    together, alone = (tools.parameters(BIG, (300,), (16, 64), dtype=torch.bfloat16) for _ in range(2))
    for p in (together, alone):
        p[2]._is_lora_layer = True
    a, b = (Automagic(p, lr=lr, **STORAGES[storage]) for p in (together, alone))
    for step in range(12):
        tools.train(a, together, range(step, step + 1))
        tools.give_gradients(alone, step)
        group = b.param_groups[0]
        for i in (2, 0, 1):
            b.step_parameter(alone[i], group, i) if method == "step_parameter" else b.update_step(group, alone[i], 0, i)
    assert not tools.differences(tools.snapshot(a), tools.snapshot(b))
    assert b.supports_fused_back_pass() is True


def test_stepping_a_parameter_without_a_gradient_does_nothing(tools: Any) -> None:
    """The one-parameter step has the same rule as `step`."""
    p = tools.parameters(BIG)
    opt = Automagic8bit(p, lr=1e-3)
    opt.step_parameter(p[0], opt.param_groups[0], 0)
    assert not opt.state.get(p[0])


def test_the_schedulers_lr_is_read_and_never_written(tools: Any) -> None:
    """`lr` belongs to the schedule: at 0 nothing moves; what it holds, of any numeric type, stays as it is."""
    p = tools.parameters(BIG)
    opt = Automagic8bit(p, lr=1e-3)
    group = opt.param_groups[0]
    for value in (0.0, torch.tensor(0.0), 5e-4, torch.tensor(5e-4)):
        before = p[0].detach().clone()
        group["lr"] = value
        tools.train(opt, p, range(2))
        assert group["lr"] is value
        assert torch.equal(before, p[0]) == (float(value) == 0.0)


def test_a_wrapper_may_put_another_tensor_in_a_parameters_place(tools: Any) -> None:
    """As sharding does after construction: the new tensor takes the place of the old."""
    p, q, r = tools.parameters(BIG, BIG), tools.parameters(BIG, BIG), tools.parameters(BIG, BIG)
    opt, expected = Automagic8bit(p, lr=1e-3), Automagic8bit(r, lr=1e-3)
    opt.param_groups[0]["params"][1] = q[1]
    tools.train(opt, [p[0], q[1]], range(3))
    tools.train(expected, r, range(3))
    assert not tools.differences(tools.snapshot(expected), tools.snapshot(opt))
    copy.deepcopy(opt)


def test_rates_are_reported_without_synchronising(tools: Any) -> None:
    """Given rates are plain floats; rates being found are 0-d tensors that nothing has read."""
    p = tools.parameters(BIG, (300,))
    opt = Automagic8bit([{"params": p[:1], "lr": 1e-3}, {"params": p[1:], "lr": 2e-3}])
    assert opt.get_learning_rates() == [1e-3, 2e-3]
    assert opt.get_avg_learning_rate() == pytest.approx((4096 * 1e-3 + 300 * 2e-3) / 4396)
    found = Automagic8bit(p)
    assert found.get_learning_rates() == [1e-6]
    tools.train(found, p, range(3))
    (rate,) = found.get_learning_rates()
    assert isinstance(rate, torch.Tensor)
    assert rate.shape == ()
    assert float(rate) >= 0.999e-6


# -------------------------------------------------------------------------------------------------------------- logging


def test_verbose_says_where_state_is_kept(tools: Any, caplog: pytest.LogCaptureFixture) -> None:
    """One line for each group, through `logging`."""
    p = tools.parameters(BIG, (3,))
    with caplog.at_level(logging.INFO, logger="automagic_bnb"):
        Automagic8bit([{"params": p[:1]}, {"params": p[1:], "lr": 1e-3}], verbose=True)
    assert [r.message for r in caplog.records] == [
        "group 0: lr found during training; elements by storage: {'8bit': 4096}",
        "group 1: lr 0.001; elements by storage: {'32bit': 3}",
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


def test_betas_written_into_a_group_are_read_as_in_the_constructor(tools: Any) -> None:
    """A list, or Adam's pair, becomes the tuple that trainers read."""
    results = []
    for betas in ((0.8, 0.95, 0.999), [0.8, 0.95], "0.8, 0.95"):
        p = tools.parameters(BIG)
        opt = Automagic8bit(p, lr=1e-3)
        opt.param_groups[0]["betas"] = betas
        tools.train(opt, p, range(2))
        assert opt.param_groups[0]["betas"] == (0.8, 0.95, 0.999)
        results.append(p[0].detach())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    opt.param_groups[0]["betas"] = (0.9,)
    with pytest.raises(ValueError, match=r"option betas=.* of a parameter group: must be two or three numbers"):
        opt.step()


def test_rates_of_what_was_never_stepped_are_an_error(tools: Any) -> None:
    """A KeyError that says so, and no empty state left behind."""
    p = tools.parameters(BIG, (300,))
    opt = Automagic8bit(p[:1])
    for x in p:
        with pytest.raises(KeyError, match="has not been stepped by this optimizer"):
            opt.element_learning_rates(x)
    assert not opt.state
    opt = Automagic8bit(p[:1], lr=1e-3)
    tools.train(opt, p[:1], range(1))
    opt.param_groups[0]["auto_lr"] = True  # found from the next step on
    assert opt.element_learning_rates(p[0]).shape == p[0].shape


def test_a_rate_below_its_lower_bound_is_told(tools: Any) -> None:
    with pytest.warns(UserWarning, match=r"lr=1e-08 in parameter group 0: lies below min_lr=1e-07, which raises it"):
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


def test_many_groups_are_indexed_once_each(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adding a group looks at its own parameters, however many there are already."""
    made, real = [], automagic_bnb.optimizer.Facts
    monkeypatch.setattr(automagic_bnb.optimizer, "Facts", lambda *a: made.append(a) or real(*a))
    p = tools.parameters(*[(4,)] * 50)
    opt = Automagic8bit([{"params": [x]} for x in p], lr=1e-3)
    assert [a[0] for a in made] == list(range(50))
    assert [opt.facts_of(x).ordinal for x in p] == list(range(50))
