"""Groups: options that differ by group, groups that are added later."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from optimizer_cases import ANOTHER_VALUE, BIG
from torch import nn

import automagic_bnb
from automagic_bnb import Automagic8bit, config


def test_every_group_option_has_another_value_here() -> None:
    """A new option must join these tests."""
    assert set(ANOTHER_VALUE) == set(config.GROUP_OPTIONS)


@pytest.mark.parametrize("name", ANOTHER_VALUE)
def test_every_option_may_differ_by_group(name: str, tools: Any) -> None:
    """A group's own value is checked, stored and leaves other groups alone."""
    first, second = tools.parameters((3,), (5,))
    value = ANOTHER_VALUE[name]
    given = str(value) if isinstance(value, (bool, int, float, tuple)) else value
    opt = Automagic8bit([{"params": [first]}, {"params": [second], name: given}], lr=2e-4)
    usual = {**vars(opt.config), "auto_lr": False}
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
    """A rate of its own ends the search for one in that group; what was given is kept, and an unset max_lr is unset."""
    a, b, c, d = tools.parameters((3,), (4,), (5,), (6,))
    groups = [{"params": [a]}, {"params": [b], "lr": 0.01}, {"params": [c], "lr": 1e-4, "max_lr": 2e-4}]
    opt = Automagic8bit([*groups, {"params": [d], "lr": 1e-4, "auto_lr": True}])
    found = [(g["lr"], g["base_lr"], g["auto_lr"], g["auto_lr_given"], g["max_lr"]) for g in opt.param_groups]
    assert found == [
        (1e-3, 1e-3, True, None, None),
        (0.01, 0.01, False, 0.01, None),
        (1e-4, 1e-4, False, 1e-4, 2e-4),
        (1e-4, 1e-4, True, 1e-4, None),
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
    for group in (
        {"params": [b], "lr": -1},
        {"params": [a]},
        {"params": [b.detach().double().requires_grad_()]},
        {"params": ["x"]},
    ):
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


def test_many_groups_are_indexed_once_each(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adding a group looks at its own parameters, however many there are already."""
    made, real = [], automagic_bnb.groups.Facts
    monkeypatch.setattr(automagic_bnb.groups, "Facts", lambda *a: made.append(a) or real(*a))
    p = tools.parameters(*[(4,)] * 50)
    opt = Automagic8bit([{"params": [x]} for x in p], lr=1e-3)
    assert [a[0] for a in made] == list(range(50))
    assert [opt.facts_of(x).ordinal for x in p] == list(range(50))
