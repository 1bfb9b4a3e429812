"""Options: defaults, legal and illegal values, messages, profiles. No optimizer is built here."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as some

from automagic_bnb import AutomagicConfig, OptimizationProfiles, config
from automagic_bnb.config import check_option, make_config

DEFAULTS = {
    "lr": None,
    "min_lr": 1e-7,
    "max_lr": None,
    "auto_lr": None,
    "auto_lr_steps": None,
    "weight_decay": 5e-4,
    "warmup_steps": 500,
    "betas": (0.9, 0.99, 0.999),
    "eps": (1e-30, 1e-16),
    "clip_threshold": 1.0,
    "percentile_clipping": 100,
    "optim_bits": 8,
    "min_8bit_size": 4096,
    "block_wise": True,
    "stable_emb": False,
    "force_8bit": False,
    "factored": True,
    "mask_bits": 4,
    "mean_bits": 16,
    "is_paged": False,
    "capturable": False,
    "edge_suppression": True,
    "edge_penalty": 0.1,
    "edge_threshold": 0.6,
    "frequency_penalty": 0.05,
    "background_regularization": True,
    "spatial_awareness": True,
    "detail_preservation": 0.8,
    "lora": None,
    "lora_mask": False,
    "lora_rank_penalty": True,
    "rank_penalty_strength": 0.01,
    "low_rank_emphasis": 1.2,
    "lora_direction": None,
    "torque": True,
    "came": True,
    "cautious": True,
    "stochastic_rounding": True,
    "master": "stochastic",
    "seed": None,
    "backend": None,
    "preset": None,
    "profile": None,
    "verbose": False,
    "run_log": None,
    "run_log_every": 10,
}


class LikeListConfig(Sequence):  # type: ignore[type-arg]
    """What omegaconf hands over: a sequence that is neither a list nor a tuple."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __getitem__(self, index: Any) -> Any:
        return self.values[index]

    def __len__(self) -> int:
        return len(self.values)


Values = tuple[list[Any], list[Any]]
"""Legal values, each as (given, stored), and illegal ones."""

NO_NUMBERS = ["x", "", None, True, [1.0], float("nan"), float("inf"), "nan", 10**400, 1j, object(), torch.tensor(True)]
SOME_NUMBERS = [(0.25, 0.25), (2, 2.0), ("1e-4", 1e-4), (" 2 ", 2.0), (np.float32(0.5), 0.5), (torch.tensor(0.5), 0.5)]
NON_NEGATIVE: Values = ([(0, 0.0), *SOME_NUMBERS], [-1e-9, "-1", *NO_NUMBERS])
POSITIVE: Values = (SOME_NUMBERS, [-1e-9, "-1", 0, "0", 0.0, *NO_NUMBERS])
UNIT: Values = ([(0, 0.0), (1, 1.0), ("0.5", 0.5)], [-1e-9, 1.0000001, "2", *NO_NUMBERS])
SWITCH: Values = (
    [(True, True), (False, False), ("true", True), (" False ", False), ("TRUE", True)],
    [0, 1, 1.0, "yes", "0", "", None, []],
)


def or_none(values: Values) -> Values:
    legal, illegal = values
    return [*legal, (None, None), ("None", None)], [x for x in illegal if x is not None]


def whole(*numbers: int, beyond: list[Any]) -> Values:
    spelled = [(spell(n), n) for n in numbers for spell in (int, str)]
    return [*spelled, (float(numbers[0]), numbers[0])], [*beyond, numbers[0] + 0.5, *NO_NUMBERS]


def one_of(*names: str) -> Values:
    """Names, of which one may be "none" without meaning None."""
    return [(name, name) for name in names], ["", names[0].upper(), 1, True, None, [names[0]]]


def choice(*names: str) -> Values:
    return [*((name, name) for name in names), (None, None), ("none", None)], [
        "",
        names[0].upper(),
        1,
        True,
        [names[0]],
    ]


THREE = (0.8, 0.9, 0.95)
LEGAL_BETAS = [
    *((given, THREE) for given in (THREE, list(THREE), LikeListConfig(*THREE), ["0.8", "0.9", "0.95"])),
    *((given, THREE) for given in ("(0.8, 0.9, 0.95)", "[0.8, 0.9, 0.95]", "0.8,0.9,0.95")),
    *(
        (given, (0.5, 0.25, 0.999))
        for given in ((0.5, 0.25), "0.5, 0.25", np.array([0.5, 0.25]), torch.tensor([0.5, 0.25]))
    ),
    ((0, 0, 0), (0.0, 0.0, 0.0)),
]
LEGAL_EPS = [
    *((given, (1e-30, 1e-8)) for given in ((1e-30, 1e-8), "(1e-30, 1e-8)", LikeListConfig(1e-30, "1e-8"))),
    *((given, (0.25, 1e-16)) for given in (0.5, "0.5")),
    *((given, (0.0, 1e-16)) for given in (0, 0.0, 1e-30)),
    ([0, 0], (0.0, 0.0)),
]
BEYOND_FLOAT32 = [1e-46, 1e39, "1e-40"]
NON_NEGATIVE[1].extend(BEYOND_FLOAT32)
POSITIVE[1].extend(BEYOND_FLOAT32)
FACTOR: Values = (NON_NEGATIVE[0], [*NON_NEGATIVE[1], 1.1e6])
VALUES: dict[str, Values] = {
    "master": one_of("none", "stochastic", "ecc8"),
    "lr": or_none(NON_NEGATIVE),
    "auto_lr": or_none(SWITCH),
    "lora": or_none(SWITCH),
    "lora_direction": choice("orthogonal"),
    "lora_mask": SWITCH,
    "max_lr": or_none(POSITIVE),
    "auto_lr_steps": or_none(whole(1, 1000, beyond=[0, -1])),
    "clip_threshold": POSITIVE,
    "frequency_penalty": UNIT,
    "warmup_steps": whole(0, 500, 10**12, beyond=[-1, "-1"]),
    "min_8bit_size": whole(0, 99999999, beyond=[-1]),
    "percentile_clipping": whole(100, 1, 95, beyond=[0, 101]),
    "optim_bits": whole(8, 32, beyond=[0, 4, 9, 16, 31, 33, 56, -8]),
    "mask_bits": whole(4, 8, 0, beyond=[1, 2, 5, 16, 32, -4]),
    "mean_bits": whole(16, 32, beyond=[0, 8, 24, 48]),
    "seed": or_none(whole(0, 2**63 - 1, 1234567890123456789, beyond=[-1, 2**63, "1e400"])),
    "run_log": (
        [("runs/a", "runs/a"), (Path("runs/a"), "runs/a"), (None, None), ("none", None)],
        [1, True, b"runs", ["a"]],
    ),
    "run_log_every": whole(10, 1, 1000, beyond=[0, -1]),
    "block_wise": ([(True, True), ("true", True)], [False, "False", 1, None]),
    "backend": choice("triton", "numba", "torch"),
    "preset": choice("sdxl-lora", "flux-lora", "wan-lora", "llm-lora", "full"),
    "profile": choice("lean", "memory_optimized", "balanced", "quality_optimized"),
    "betas": (
        LEGAL_BETAS,
        [(0.9,), (*THREE, 0.5), (0.9, 1.0), (0.9, -0.1), (0.9, "x"), 0.9, "0.9", "rm -rf", None, ()],
    ),
    "eps": (
        LEGAL_EPS,
        [
            -1e-8,
            "-1e-8",
            (-1e-8, 1e-8),
            (1e-8,),
            (0, 0, 0),
            True,
            None,
            "x",
            float("nan"),
            "inf",
            (1e-46, 0),
            (1e31, 0),
        ],
    ),
}
for _name in ("min_lr", "edge_threshold"):
    VALUES[_name] = NON_NEGATIVE
for _name in ("weight_decay", "edge_penalty", "detail_preservation", "rank_penalty_strength", "low_rank_emphasis"):
    VALUES[_name] = FACTOR
for _name, _default in DEFAULTS.items():
    if isinstance(_default, bool) and _name != "block_wise":
        VALUES[_name] = SWITCH

LEGAL = [(name, given, stored) for name, (legal, _) in VALUES.items() for given, stored in legal]
ILLEGAL = [(name, given) for name, (_, illegal) in VALUES.items() for given in illegal]


def short(value: Any) -> str:
    return repr(value)[:20]


# ------------------------------------------------------------------------------------------------------ single options


def test_every_option_has_its_documented_default() -> None:
    """The defaults are part of the interface; so is the list of options."""
    assert vars(AutomagicConfig()) == DEFAULTS
    assert set(config.RULES) == set(DEFAULTS) == set(VALUES)


def test_every_default_is_legal() -> None:
    """Handing the defaults back changes nothing."""
    for name, value in DEFAULTS.items():
        assert check_option(name, value) == value, name


@pytest.mark.parametrize(("name", "value", "stored"), LEGAL, ids=short)
def test_a_legal_value_is_stored(name: str, value: Any, stored: Any) -> None:
    """Numbers, bools and sequences arrive in every spelling that trainers use, and are stored plainly."""
    result = check_option(name, value)
    assert result == stored
    assert type(result) is type(stored)


@pytest.mark.parametrize(("name", "value"), ILLEGAL, ids=short)
def test_an_illegal_value_is_named(name: str, value: Any) -> None:
    """The message names the option, the value and what is legal."""
    with pytest.raises((TypeError, ValueError)) as caught:
        check_option(name, value, " in parameter group 3")
    message = str(caught.value)
    assert f"option {name}={value!r} in parameter group 3: must be {config.RULES[name].legal}" in message


@pytest.mark.parametrize(("name", "legal"), [(name, config.RULES[name].legal) for name in DEFAULTS])
def test_every_rule_says_what_is_legal(name: str, legal: str) -> None:
    """No rule leaves its range unsaid."""
    assert len(legal) > 3
    if isinstance(DEFAULTS[name], bool):
        assert "True" in legal


def test_a_wrong_type_and_a_wrong_range_are_told_apart() -> None:
    """TypeError for what is no number at all, ValueError for a number outside the range."""
    with pytest.raises(TypeError, match="weight_decay"):
        check_option("weight_decay", "many")
    with pytest.raises(ValueError, match="weight_decay"):
        check_option("weight_decay", -1)


def test_block_wise_false_says_why() -> None:
    """The one option that other code may still set to what no longer exists."""
    with pytest.raises(ValueError, match=r"bitsandbytes 0\.50 removed non-block-wise"):
        make_config(block_wise=False)


anything = some.one_of(
    some.none(),
    some.booleans(),
    some.integers(),
    some.floats(),
    some.text(max_size=12),
    some.binary(max_size=4),
    some.lists(some.one_of(some.floats(), some.integers(), some.text(max_size=4)), max_size=4),
    some.dictionaries(some.text(max_size=3), some.integers(), max_size=2),
    some.complex_numbers(),
)


@settings(max_examples=300, deadline=None)
@given(name=some.sampled_from(sorted(DEFAULTS)), value=anything)
@example(name="seed", value="9" * 5000)
def test_any_value_is_stored_or_refused_by_name(name: str, value: Any) -> None:
    """No input escapes with another kind of error, and what is stored is legal itself."""
    try:
        stored = check_option(name, value)
    except (TypeError, ValueError) as e:
        stored, message = DEFAULTS[name], str(e)
    else:
        message = f"option {name}="
    assert f"option {name}=" in message
    assert check_option(name, stored) == stored


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("weight_decays", "weight_decay"),
        ("beta", "betas"),
        ("8bit", "force_8bit"),
        ("edge_supression", "edge_suppression"),
        ("warmup", "warmup_steps"),
        ("learning_rate", "lr"),
        ("wd", "weight_decay"),
    ],
)
def test_an_unknown_option_names_the_nearest(wrong: str, meant: str) -> None:
    """A typo never passes silently."""
    message = f"no option '{wrong}'; did you mean '{meant}'"
    with pytest.raises(TypeError, match=message):
        make_config(**{wrong: 1})
    with pytest.raises(TypeError, match=message):
        check_option(wrong, 1)


def test_an_option_of_another_optimizer_is_refused() -> None:
    """However far it is from any of ours."""
    with pytest.raises(TypeError, match="no option 'amsgrad'"):
        make_config(lr=1e-3, amsgrad=False)


# ----------------------------------------------------------------------------------------------------- options together


@pytest.mark.parametrize(
    ("options", "legal"),
    [
        ({"lr": 1e-3}, True),
        ({"lr": 0.5}, True),  # no max_lr was set, so the bound follows
        ({"lr": 0.5, "max_lr": 1.0}, True),
        ({"lr": 0.0011, "max_lr": 1e-3}, False),
        ({"lr": "0.0011", "max_lr": "1e-3"}, False),
        ({"lr": 0.0011, "max_lr": None}, True),  # **config.__dict__ hands the unset one on
        ({"lr": 1e-3, "max_lr": 1e-4, "auto_lr": True}, False),  # no search starts above its bound,
        ({"lr": 1.0, "max_lr": 1e-4, "auto_lr": True}, True),  # and a factor is none
        ({"min_lr": 1e-2}, True),
        ({"min_lr": 1e-2, "max_lr": 1e-2}, True),
        ({"min_lr": 1e-4, "max_lr": 1e-5}, False),
    ],
)
def test_rates_and_bounds_must_agree(options: dict[str, Any], legal: bool) -> None:
    """max_lr binds where the user set it; unset it follows the rate."""
    if legal:
        make_config(**options)
        return
    with pytest.raises(ValueError, match=r"(?s)option (lr|min_lr)=.*max_lr="):
        make_config(**options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"lr": 1e-3, "auto_lr": True, "auto_lr_given": None, "max_lr": None}),
        ({"lr": 1e-5}, {"lr": 1e-5, "auto_lr": False, "auto_lr_given": 1e-5, "max_lr": None}),
        ({"lr": 1e-2, "max_lr": 2e-2}, {"lr": 1e-2, "auto_lr": False, "auto_lr_given": 1e-2, "max_lr": 2e-2}),
        ({"lr": 1e-4, "auto_lr": True}, {"lr": 1e-4, "auto_lr": True, "auto_lr_given": 1e-4, "max_lr": None}),
        ({"auto_lr": False}, {"lr": 1e-3, "auto_lr": False, "auto_lr_given": None, "max_lr": None}),
        ({"lr": 0.0}, {"lr": 0.0, "auto_lr": False, "auto_lr_given": 0.0, "max_lr": None}),
    ],
)
def test_rates_are_resolved(options: dict[str, Any], expected: dict[str, Any]) -> None:
    """No rate means that it is found, which a schedule is told to be 1e-3; an unset max_lr stays unset."""
    resolved = dict(vars(make_config(**options)))
    config.resolve_rates(resolved)
    assert {name: resolved[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    "carry", [copy.copy, copy.deepcopy, dataclasses.replace, lambda c: pickle.loads(pickle.dumps(c))]
)
@pytest.mark.parametrize(("options", "bound"), [({}, False), ({"max_lr": 1e-3}, True), ({"max_lr": 2e-3}, True)])
def test_whether_max_lr_was_set_survives_copying(carry: Any, options: dict[str, Any], bound: bool) -> None:
    """Copies and pickles of a config still tell a bound the user set from the default."""
    carried = carry(make_config(lr=1e-4, **options))
    assert vars(carried) == vars(make_config(lr=1e-4, **options))
    carried.lr = 0.05
    if bound:
        with pytest.raises(ValueError, match="max_lr"):
            make_config(**carried.__dict__)
    else:
        make_config(**carried.__dict__)


# ------------------------------------------------------------------------------------------------------------- profiles

PROFILES = {
    "lean": {"mask_bits": 0, "came": False},
    "memory_optimized": {"mask_bits": 0},
    "balanced": {},
    "quality_optimized": {
        "factored": False,
        "mask_bits": 8,
        "edge_penalty": 0.15,
        "frequency_penalty": 0.08,
        "rank_penalty_strength": 0.02,
    },
}


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_differs_from_the_defaults_as_documented(name: str) -> None:
    """Each profile is the defaults with a few options changed."""
    made = getattr(OptimizationProfiles, name)()
    assert vars(made) == {**DEFAULTS, **PROFILES[name]}
    assert vars(make_config(**made.__dict__)) == vars(made)
    assert vars(make_config(profile=name)) == {**vars(made), "profile": name}


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_is_made_anew_each_time(name: str) -> None:
    """Editing one profile's attributes does not reach the next user's."""
    profile = getattr(OptimizationProfiles, name)
    first = profile()
    first.min_8bit_size = 99999999
    assert profile().min_8bit_size == 4096


def test_an_edited_profile_is_checked_when_used() -> None:
    """Attributes may be edited freely; what is wrong shows where the config is used."""
    edited = OptimizationProfiles.memory_optimized()
    edited.min_8bit_size = "2048"  # type: ignore[assignment]
    edited.betas = [0.8, 0.9]  # type: ignore[assignment]
    made = make_config(**edited.__dict__)
    assert (made.min_8bit_size, made.betas, made.factored) == (2048, (0.8, 0.9, 0.999), True)
    edited.edge_penalty = -1
    with pytest.raises(ValueError, match="edge_penalty=-1"):
        make_config(**edited.__dict__)
    edited = OptimizationProfiles.balanced()
    edited.min_8bit_sizes = 1  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="did you mean 'min_8bit_size'"):
        make_config(**edited.__dict__)


def test_options_stand_above_their_profile() -> None:
    """`profile=` gives the base, everything else named overrides it, a default's value included."""
    made = make_config(profile="quality_optimized", edge_penalty=0.1, lr=1e-4)
    assert (made.edge_penalty, made.frequency_penalty, made.lr) == (0.1, 0.08, 1e-4)


# ------------------------------------------------------------------------------------------------ groups and overrides


WHOLE_OPTIMIZER = ("backend", "is_paged", "preset", "profile", "run_log", "run_log_every", "verbose")


def test_seven_options_hold_for_the_whole_optimizer() -> None:
    """All others may stand in a group or an override."""
    assert set(config.GROUP_OPTIONS) == set(DEFAULTS) - set(WHOLE_OPTIMIZER)


@pytest.mark.parametrize("name", WHOLE_OPTIMIZER)
def test_an_option_of_the_whole_optimizer_is_refused_for_a_parameter(name: str) -> None:
    """It would have no effect there, so it is an error rather than a silence."""
    with pytest.raises(TypeError, match=f"{name}=.*whole optimizer"):
        config.check_parameter_option(name, DEFAULTS[name], " in parameter group 0")


@pytest.mark.parametrize("key", ["weight_decays", "warmup_step", "beta", "min_8bit_sizes", "loras"])
def test_a_key_close_to_an_option_is_a_near_miss(key: str) -> None:
    """Such a key in a group is probably a typo."""
    assert config.near_miss(key) in config.GROUP_OPTIONS


TRAINER_KEYS = ("params", "param_names", "name", "initial_lr", "base_lr", "lr_scale", "lr_mult", "layer_decay")
TRAINER_KEYS += ("foreach", "fused", "capturable", "maximize", "amsgrad", "max_momentum", "base_momentum", "is_lora")
TRAINER_KEYS += ("swanlab_id", "weight_decay_mult", "lr_multiplier", "correct_bias", "d", "use_muon")
OWN_KEYS = ("auto_lr_rate", "auto_lr_sums", "auto_lr_count", "auto_lr_peak", "auto_lr_given", "effective_lr")


@pytest.mark.parametrize("key", [*TRAINER_KEYS, *OWN_KEYS, *DEFAULTS])
def test_keys_that_trainers_and_schedulers_use_are_no_near_miss(key: str) -> None:
    """Groups carry other tools' keys too; those, and the options themselves, are left in peace."""
    assert config.near_miss(key) is None
