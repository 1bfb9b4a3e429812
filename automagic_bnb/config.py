"""Every option of the optimizer: its default, its legal range, its check, and the ready-made presets and profiles.

An option is written once, as a field of `AutomagicConfig` with the `Rule` that checks it. The constructor, parameter
groups, `GlobalOptimManager` overrides and profiles all go through `check_option`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import math
import operator
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from automagic_bnb import bnb
from automagic_bnb.notices import warn_once

MAX_LR_RATIO = 10.0
"""Where max_lr is not set, a single element's rate is at most so many times the mean."""
START_LR = 1e-4
"""Where the search starts when no rate is given."""
NOMINAL_LR = 1e-3
"""What a group's `lr` says, and a schedule is made for, until a rate has been found."""
LARGE_LR = 0.03
"""A given rate above it is said to be one, once."""
FACTOR_LR = 0.01
"""With auto_lr=True an lr from here on is a factor of the rate found (Prodigy's lr=1), a lower one where it starts."""
PRESETS: dict[str, dict[str, Any]] = {
    "sdxl-lora": {"lora": True, "weight_decay": 0.01},
    "flux-lora": {"lora": True, "weight_decay": 1e-4},
    "wan-lora": {"lora": True, "weight_decay": 0.01},
    "llm-lora": {"lora": True, "weight_decay": 0.01},
    "full": {"weight_decay": 0.01},
}
"""By what is trained, the options that a measurement or a publication speaks for: docs/presets.md has each one's."""


@dataclass(frozen=True)
class Rule:
    """How one option is read: `parse` turns what the user wrote into the stored value, or raises."""

    legal: str
    parse: Callable[[Any], Any]
    scope: str = "parameter"
    """"parameter": may differ by group and by parameter; "optimizer": one value for all."""


def is_number(value: Any) -> bool:
    """Whether it is an int or a float; Python counts True and False among the ints, which nobody means."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """Whether it stands for an int (numpy's and torch's do), and is not True or False."""
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def check_whole(name: str, value: Any, least: int, legal: str = "a whole number >= {}") -> int:
    """An argument that must be a whole number, at least `least`.

    Raises:
        TypeError, ValueError: another type, or less; both name the argument, the value and what is legal.
    """
    if not is_whole(value) or operator.index(value) < least:
        raise (ValueError if is_whole(value) else TypeError)(f"{name}={value!r}: must be {legal.format(least)}")
    return operator.index(value)


def _number(value: Any) -> float:
    """A real number, or a string that spells one (trainers hand options through as text)."""
    if not isinstance(value, (int, float, str)) and getattr(value, "ndim", None) == 0:
        value = value.item()  # 0-d tensors and numpy scalars convert; lists, None and the rest do not
    if isinstance(value, str):
        value = _spelled_number(value)
    if not is_number(value):
        raise TypeError("not a number")
    if not -sys.float_info.max <= value <= sys.float_info.max:  # NaN and integers beyond any float, too
        raise ValueError("not finite")
    return value


def _spelled_number(text: str) -> float:
    for kind in (int, float):  # a whole number keeps all its digits
        try:
            return kind(text)
        except ValueError:
            continue
    raise TypeError("not a number")


LEAST, MOST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""float32's normal numbers, in which a step computes."""
FLOAT32 = f"{LEAST:.3g} to {MOST:.3g}"


def _in_float32(number: float) -> bool:
    return number == 0 or LEAST <= abs(number) <= MOST


def _real_rule(legal: str, low: float, high: float = MOST, *, open_low: bool = False) -> Rule:
    """A number between these, and one that float32 holds: what `legal` says, and the rest of it."""

    def parse(value: Any) -> float:
        number = _number(value)
        if number < low or number > high or (open_low and number == low) or not _in_float32(number):
            raise ValueError("out of range")
        return float(number)

    return Rule(legal if high < MOST else f"{legal} that float32 holds ({FLOAT32})", parse)


def _integer_rule(legal: str, low: int, high: float = math.inf, step: int = 1, scope: str = "parameter") -> Rule:
    def parse(value: Any) -> int:
        number = _number(value)
        if number != int(number) or number < low or number > high or (number - low) % step:
            raise ValueError("out of range")
        return int(number)

    return Rule(legal, parse, scope)


def _parse_bool(value: Any) -> bool:
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if not isinstance(value, bool):
        raise TypeError("not a bool")
    return value


_BOOL = Rule("True or False", _parse_bool)
_BOOL_ONCE = Rule("True or False", _parse_bool, "optimizer")


def _or_none(rule: Rule) -> Rule:
    def parse(value: Any) -> Any:
        if value is None or (isinstance(value, str) and value.strip().lower() == "none"):
            return None
        return rule.parse(value)

    return Rule(rule.legal + ", or None", parse, rule.scope)


def _choice_rule(*names: str, scope: str = "optimizer") -> Rule:
    def parse(value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError("not a string")
        if value not in names:
            raise ValueError("not a choice")
        return value

    return Rule("one of " + ", ".join(map(repr, names)), parse, scope)


def _sequence(value: Any) -> list[float]:
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError) as e:
            raise TypeError("not a sequence of numbers") from e
    if isinstance(value, (int, float)) or not isinstance(value, Iterable):
        raise TypeError("not a sequence of numbers")
    return [float(_number(x)) for x in value]


def _parse_betas(value: Any) -> tuple[float, float, float]:
    betas = _sequence(value)
    if len(betas) == 2:  # Adam's pair: the confidence keeps its own decay
        betas.append(0.999)
    if len(betas) != 3 or not all(0 <= b < 1 for b in betas):
        raise ValueError("out of range")
    return betas[0], betas[1], betas[2]


MOST_EPS = 1e30
"""A v of that size is nearly float32's square of the largest gradient that is not skipped."""
MOST_FACTOR = 1e6
"""Of factors that multiply what may itself be large."""


def _parse_eps(value: Any) -> tuple[float, float]:
    if is_number(value) or isinstance(value, str):
        try:
            scalar = float(_number(value))
        except TypeError:
            pass
        else:  # Adam adds its eps beside sqrt(v); ours stands inside the root
            square = scalar * abs(scalar)
            value = (0.0 if 0 <= square < LEAST else square, 1e-16)
    eps = _sequence(value)
    if len(eps) != 2 or not all(0 <= e <= MOST_EPS and _in_float32(e) for e in eps):
        raise ValueError("out of range")
    return eps[0], eps[1]


def _parse_block_wise(value: Any) -> bool:
    if not _parse_bool(value):
        raise ValueError("bitsandbytes 0.50 removed non-block-wise 8-bit states; leave block_wise=True")
    return True


def _parse_mask_bits(value: Any) -> int:
    bits = _number(value)
    if bits not in (0, 4, 8):
        raise ValueError("out of range")
    return int(bits)


def _parse_folder(value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError("not a path")
    return os.fspath(value)


def _opt(default: Any, rule: Rule) -> Any:
    return field(default=default, metadata={"rule": rule})


_NON_NEGATIVE = _real_rule("a number >= 0", 0)
_FACTOR = _real_rule(f"a number from 0 to {MOST_FACTOR:g}", 0, MOST_FACTOR)
_UNIT = _real_rule("a number from 0 to 1", 0, 1)


@dataclass
class AutomagicConfig:
    """All options with their defaults; `opt.config` shows the ones in force.

    Attributes may be edited; they are checked when the config is handed to an optimizer, as `**config.__dict__`.
    """

    # Rates. `lr=None`: no rate given, so it is found. With auto_lr=True a given `lr` is where the search starts, from
    # FACTOR_LR on a factor of the rate found; groups with an `lr` keep their ratios. `min_lr` and `max_lr` bound single
    # elements and move no mean rate, but a found one stays below a `max_lr` that is set; `max_lr=None`: ten times the
    # mean. `auto_lr_steps`: the search ends after so many, None: never.
    lr: float | None = _opt(None, _or_none(_NON_NEGATIVE))
    min_lr: float = _opt(1e-7, _NON_NEGATIVE)
    max_lr: float | None = _opt(None, _or_none(_real_rule("a number > 0", 0, open_low=True)))
    auto_lr: bool | None = _opt(None, _or_none(_BOOL))
    auto_lr_steps: int | None = _opt(None, _or_none(_integer_rule("a whole number >= 1", 1)))
    weight_decay: float = _opt(5e-4, _FACTOR)
    warmup_steps: int = _opt(500, _integer_rule("a whole number >= 0", 0))
    # Moments.
    betas: tuple[float, float, float] = _opt(
        (0.9, 0.99, 0.999), Rule("two or three numbers, each >= 0 and < 1", _parse_betas)
    )
    eps: tuple[float, float] = _opt(
        (1e-30, 1e-16), Rule(f"two numbers from 0 to {MOST_EPS:g}, or Adam's single eps", _parse_eps)
    )
    clip_threshold: float = _opt(1.0, _real_rule("a number > 0", 0, open_low=True))
    percentile_clipping: int = _opt(100, _integer_rule("a whole number from 1 to 100", 1, 100))
    # Storage, in bitsandbytes' words.
    optim_bits: int = _opt(8, _integer_rule("8 or 32", 8, 32, step=24))
    min_8bit_size: int = _opt(4096, _integer_rule("a whole number >= 0", 0))
    block_wise: bool = _opt(True, Rule("True", _parse_block_wise))
    stable_emb: bool = _opt(False, _BOOL)
    force_8bit: bool = _opt(False, _BOOL)
    factored: bool = _opt(True, _BOOL)
    # Of each element's own rate and its last sign: 8 bits, 4, or none of it; of the means of factored moments 32 or 16.
    mask_bits: int = _opt(4, Rule("8, 4 or 0", _parse_mask_bits))
    mean_bits: int = _opt(16, _integer_rule("16 or 32", 16, 32, step=16))
    is_paged: bool = _opt(False, _BOOL_ONCE)
    # Spatial part of the rule.
    edge_suppression: bool = _opt(True, _BOOL)
    edge_penalty: float = _opt(0.1, _FACTOR)
    edge_threshold: float = _opt(0.6, _NON_NEGATIVE)
    frequency_penalty: float = _opt(0.05, _UNIT)
    background_regularization: bool = _opt(True, _BOOL)
    spatial_awareness: bool = _opt(True, _BOOL)
    detail_preservation: float = _opt(0.8, _FACTOR)
    # LoRA. `lora=None`: told by the parameter's mark or name.
    lora: bool | None = _opt(None, _or_none(_BOOL))
    # Whether its elements have rates of their own, too: they cost loss there (benchmarks/quality).
    lora_mask: bool = _opt(False, _BOOL)
    lora_rank_penalty: bool = _opt(True, _BOOL)
    rank_penalty_strength: float = _opt(0.01, _FACTOR)
    low_rank_emphasis: float = _opt(1.2, _FACTOR)
    # "orthogonal": LoRA's matrices move along their momentum made orthogonal; None: along the momentum.
    lora_direction: str | None = _opt(None, _or_none(_choice_rule("orthogonal", scope="parameter")))
    # Switches of the remaining parts.
    torque: bool = _opt(True, _BOOL)
    came: bool = _opt(True, _BOOL)
    cautious: bool = _opt(True, _BOOL)
    stochastic_rounding: bool = _opt(True, _BOOL)
    # What stands in for a float32 copy of bfloat16 weights: stochastic rounding, or 8 more bits of each ("none":
    # stochastic_rounding=False).
    master: str = _opt("stochastic", _choice_rule("none", "stochastic", "ecc8", scope="parameter"))
    # How it runs.
    # Of random bits; None: a parameter's name alone tells them, or where it has none the optimizer's number besides.
    seed: int | None = _opt(None, _or_none(_integer_rule("a whole number from 0 to 2**63 - 1", 0, 2**63 - 1)))
    # Steps are counted on the device, and CUDA graphs may capture one.
    capturable: bool = _opt(False, _BOOL)
    backend: str | None = _opt(None, _or_none(_choice_rule("triton", "numba", "torch")))
    # What is trained, and how it is kept: options that stand below those given, a preset's above a profile's.
    preset: str | None = _opt(None, _or_none(_choice_rule(*PRESETS)))
    profile: str | None = _opt(
        None, _or_none(_choice_rule("lean", "memory_optimized", "balanced", "quality_optimized"))
    )
    verbose: bool = _opt(False, _BOOL_ONCE)
    # A folder in which every step, or each of so many, leaves its metrics: options pass through trainers that have no
    # callbacks.
    run_log: str | None = _opt(None, _or_none(Rule("a folder", _parse_folder, "optimizer")))
    run_log_every: int = _opt(10, _integer_rule("a whole number >= 1", 1, scope="optimizer"))


RULES: dict[str, Rule] = {f.name: f.metadata["rule"] for f in dataclasses.fields(AutomagicConfig)}
GROUP_OPTIONS: tuple[str, ...] = tuple(name for name, rule in RULES.items() if rule.scope == "parameter")
"""The options that a parameter group, or an override of one parameter, may set."""


FOREIGN_OPTIONS: dict[str, str] = {
    "fused": "the Triton kernels are used wherever they can be; see backend",
    "foreach": "the Triton kernels take all parameters at once; see backend",
    "differentiable": "a step cannot be differentiated here",
    "maximize": "negate the loss instead",
    "amsgrad": "there is no AMSGrad here; leave it out",
    "decoupled_weight_decay": "weight decay is always decoupled here",
    "decouple": "weight decay is always decoupled here",
    "correct_bias": "averages are always corrected for their start; leave it out",
    "bias_correction": "averages are always corrected for their start; leave it out",
    "use_bias_correction": "averages are always corrected for their start; leave it out",
    "safeguard_warmup": "it is Prodigy's; the rate found here follows no warm-up of the schedule",
    "momentum": "the momentum is betas[0]",
    "nesterov": "there is no Nesterov momentum here; leave it out",
    "dampening": "it is SGD's; leave it out",
    "rho": "the decays are betas",
    "alpha": "the decay of the second moment is betas[1]",
    "beta3": "it is betas[2] here",
    "d0": "the search for the rate starts at lr, with auto_lr=True",
    "d_coef": "with auto_lr=True an lr from 0.01 on is a factor of the rate found, as d_coef is of Prodigy's",
    "growth_rate": "a rate that is found rises by at most a tenth a step; there is no option for it",
    "fsdp_in_use": "sharded parameters are told by themselves; leave it out",
    "slice_p": "it is Prodigy's; auto_lr watches one of 32 blocks as it is",
    "relative_step": "it is Adafactor's; leave lr out to have the rate found",
    "scale_parameter": "it is Adafactor's; the rate is no share of a weight's size here",
    "warmup_init": "it is Adafactor's; use a scheduler for a warm-up",
    "decay_rate": "it is Adafactor's; the decay of the second moment is betas[1]",
    "clip_lambda": "gradients are clipped by clip_threshold, each block of 256",
    "max_grad_norm": "gradients are clipped by the trainer, or by percentile_clipping and clip_threshold here",
    "fused_back_pass": "call step_parameter from the trainer's hook: nothing has to be switched on",
    "do_paramiter_swapping": "freeze what is not to be trained with requires_grad_(False)",
    "paramiter_swapping_factor": "freeze what is not to be trained with requires_grad_(False)",
    "lr_bump": "a weight's own rate moves by factors; migrate_options translates ai-toolkit's options",
    "agreement_threshold": "it is ai-toolkit's Automagic 2; leave it out",
    "polarity_history": "it is ai-toolkit's Automagic 3; leave it out",
    "args": "pass the options themselves",
    "max_unorm": "there is no bound by the weights' norm; see clip_threshold",
    "skip_zeros": "it is of bitsandbytes' older versions; leave it out",
    "optim_args": "pass the options themselves",
    "adanorm": "there is no such norm here; leave it out",
    "weight_decouple": "weight decay is always decoupled here",
    "fixed_decay": "weight decay is multiplied by the rate; leave it out",
    "rectify": "it is RAdam's; leave it out",
    "schedule_free": "there is no schedule-free averaging here: use a scheduler, or none",
    "use_stochastic_rounding": "it is stochastic_rounding here, and on by default",
    "stochastic_round": "it is stochastic_rounding here, and on by default",
    "bf16_stochastic_round": "it is stochastic_rounding here, and on by default",
    "use_cautious": "it is cautious here, and on by default",
    "cautious_mask": "it is cautious here, and on by default",
    "eps2": "eps is a pair here",
}
"""What trainers pass to other optimizers, and what to say of it; nobody means one of ours by these."""
SUGGESTED_FROM = 0.6
"""How like two names have to be for one to be taken for the other."""
OTHER_NAMES = {
    "learning_rate": "lr",
    "wd": "weight_decay",
    "bits": "optim_bits",
    "8bit": "force_8bit",
    "beta1": "betas",
    "beta2": "betas",
}
"""Other libraries' words, too far from ours to be found by their letters."""


def unknown_option(name: str, where: str = "Automagic") -> TypeError:
    """The error for an option nobody knows: what is known of other optimizers', else a name that is near."""
    if name in FOREIGN_OPTIONS:
        return TypeError(f"{where} has no option {name!r}: {FOREIGN_OPTIONS[name]}")
    near = OTHER_NAMES.get(name) or next(iter(difflib.get_close_matches(name, RULES, n=1, cutoff=SUGGESTED_FROM)), None)
    hint = f"did you mean {near!r}?" if near else "AutomagicConfig lists those there are"
    return TypeError(f"{where} has no option {name!r}; {hint}")


def check_option(name: str, value: Any, where: str = "") -> Any:
    """The value as it is stored.

    Raises:
        TypeError: an unknown option, or a value of the wrong type.
        ValueError: a value outside the legal range. Both name the option, the value and what is legal.
    """
    if name not in RULES:
        raise unknown_option(name)
    rule = RULES[name]
    try:
        return rule.parse(value)
    except (TypeError, ValueError) as e:
        note = f" ({e})" if name == "block_wise" and isinstance(e, ValueError) else ""
        raise type(e)(f"option {name}={value!r}{where}: must be {rule.legal}{note}") from None


def check_parameter_option(name: str, value: Any, where: str = "") -> Any:
    """`check_option` for what stands in a parameter group or in an override of one parameter."""
    if name in RULES and name not in GROUP_OPTIONS:
        raise TypeError(f"option {name}={value!r}{where}: holds for the whole optimizer; pass it to the constructor")
    return check_option(name, value, where)


def respelled(options: dict[str, Any]) -> dict[str, Any]:
    """Options with one spelling for each thing: master="none" is an older one of stochastic_rounding=False."""
    if options.get("master") != "none":
        return options
    return {**options, "master": "stochastic", "stochastic_rounding": False}


def near_miss(key: str) -> str | None:
    """The option that a key of a parameter group was probably meant to be; None where it is one, or is far from any."""
    near = difflib.get_close_matches(key, GROUP_OPTIONS, n=1, cutoff=0.85)
    return near[0] if near and near[0] != key else None


def make_config(**options: Any) -> AutomagicConfig:
    """A checked config: the profile, if one is named, under the preset's options, under those given.

    Raises:
        TypeError, ValueError: as `check_option`; and where min_lr exceeds max_lr, or lr lies above a max_lr that the
            user set.
    """
    for name in options:
        if name not in RULES:
            raise unknown_option(name)
    profile = check_option("profile", options.get("profile"))
    preset = check_option("preset", options.get("preset"))
    base = getattr(OptimizationProfiles, profile)() if profile else AutomagicConfig()
    given = respelled({k: check_option(k, v) for k, v in options.items()})
    config = dataclasses.replace(base, **{**PRESETS.get(preset, {}), **given})
    config.profile = profile
    check_rates(vars(config))
    warn_of_factor(vars(config))
    check_storage(vars(config))
    return config


def check_rates(options: dict[str, Any], where: str = "") -> None:
    """Raise ValueError where the bounds contradict each other or the rate (shared by constructor and groups)."""
    low, high, lr = options["min_lr"], options["max_lr"], options["lr"]
    if high is None:
        return
    if low > high:
        raise ValueError(f"option min_lr={low!r}{where}: must not exceed max_lr={high!r}")
    is_factor = lr is not None and lr >= FACTOR_LR and options["auto_lr"]
    if lr is not None and lr > high and not is_factor:
        raise ValueError(f"option lr={lr!r}{where}: lies above max_lr={high!r}; raise max_lr or leave it out")


def warn_of_factor(options: dict[str, Any]) -> None:
    """Say that an `lr` this large is no rate where one is being found."""
    if options["auto_lr"] and options["lr"] is not None and options["lr"] >= FACTOR_LR:
        warn_once(
            f"with auto_lr=True, lr={options['lr']!r} is taken as a factor of the rate that is found, as every lr from "
            f"{FACTOR_LR:g} on is; a lower one is where the search starts"
        )


def warn_of_large_rate(options: dict[str, Any], where: str = "") -> None:
    """Say that a given rate is far beyond those of weights."""
    if not options["auto_lr"] and options["lr"] is not None and options["lr"] > LARGE_LR:
        warn_once(
            f"option lr={options['lr']!r}{where}: is a rate here, and a large one; if it is to stand for a rate that "
            "is found, as Prodigy's users write it, leave lr out or pass auto_lr=True"
        )


def check_storage(options: dict[str, Any], where: str = "") -> None:
    """Raise ValueError where 8-bit state is forced that cannot be."""
    if options["force_8bit"] and options["optim_bits"] == 32:
        raise ValueError(f"option force_8bit=True{where}: contradicts optim_bits=32; leave one of them out")
    if options["force_8bit"] and not bnb.BITSANDBYTES_AVAILABLE:
        raise ValueError(
            f"option force_8bit=True{where}: needs bitsandbytes, which failed to import ({bnb.IMPORT_ERROR})"
        )


def complete_betas(group: dict[str, Any]) -> None:
    """Put betas that were written into a group by hand into the form that the constructor gives them.

    Raises:
        TypeError, ValueError: not two or three numbers from 0 to 1.
    """
    if type(group["betas"]) is not tuple or len(group["betas"]) != 3:
        group["betas"] = check_option("betas", group["betas"], " of a parameter group")


def resolve_rates(options: dict[str, Any]) -> None:
    """Fill in place what depends on whether a rate was given: `auto_lr`, `lr`; and what was, `auto_lr_given`.

    That is kept where no rate is being found, too, since a search may be switched on later.
    """
    if options["auto_lr"] is None:
        options["auto_lr"] = options["lr"] is None
    options["auto_lr_given"] = options["lr"]
    if options["lr"] is None:
        options["lr"] = NOMINAL_LR


class OptimizationProfiles:
    """Ready-made configs. Edit their attributes, then pass them on: `Automagic8bit(params, **config.__dict__)`."""

    @staticmethod
    def lean() -> AutomagicConfig:
        """m in 8 bits and factored v, no rates of single weights and no confidence: about 1.1 bytes a parameter."""
        return AutomagicConfig(mask_bits=0, came=False)

    @staticmethod
    def memory_optimized() -> AutomagicConfig:
        """Confidence kept, no rates of single weights: about 1.1 bytes a parameter."""
        return AutomagicConfig(mask_bits=0)

    @staticmethod
    def balanced() -> AutomagicConfig:
        """The defaults: factored v and, but for LoRA, rates of single weights in 4 bits; 1.3 to 1.6 bytes each."""
        return AutomagicConfig()

    @staticmethod
    def quality_optimized() -> AutomagicConfig:
        """Second moments of every element, about 4.1 bytes; stronger edge, frequency and rank penalties."""
        return AutomagicConfig(
            factored=False, mask_bits=8, edge_penalty=0.15, frequency_penalty=0.08, rank_penalty_strength=0.02
        )
