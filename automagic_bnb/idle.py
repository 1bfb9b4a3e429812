"""Options that a user sets and that come to nothing: one table of when that is, and the one warning that says so.

A default never warns, and neither does a value that asks for nothing (False, None, a penalty of 0). What rests on the
parameters (their sides, names, dtype and device) is looked at when the first step begins: until then they may get
names, move and be filled. A new option needs a line in `TABLE`, be it `ALWAYS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from automagic_bnb import config, low_rank, paged
from automagic_bnb import state as st
from automagic_bnb.notices import warn_once
from automagic_bnb.reference import has_surface

Options = dict[str, Any]
"""Those in force for a parameter, the whole optimizer's among them."""


class Subject(NamedTuple):
    """One parameter as a reason looks at it."""

    p: Tensor
    """The local tensor."""
    is_named: bool
    is_embedding: bool
    is_lora: bool

    def storage(self, options: Options) -> str:
        return st.storage_of(self.p, options, self.is_embedding)


@dataclass(frozen=True)
class Reason:
    """Why an option has no effect.

    Attributes:
        of_options: holds under these options, whatever the parameters are; or
        of_parameter: holds under these options for this parameter.
        words: of the reason, after "has no effect"; names in braces stand for the options' values.
        remedy: what to do about it; empty where only leaving the option out helps.
    """

    words: str
    remedy: str = ""
    of_options: Callable[[Options], bool] = lambda options: False
    of_parameter: Callable[[Options, Subject], bool] = lambda options, subject: False

    def holds(self, options: Options, subject: Subject | None) -> bool:
        """subject: None where the parameters are not looked at."""
        return self.of_options(options) or (subject is not None and self.of_parameter(options, subject))


# --- reasons ----------------------------------------------------------------------------------------------------------

IN_32_BITS = Reason(
    " with optim_bits=32", "pass optim_bits=8",
    of_options=lambda o: o["optim_bits"] == 32,
)  # fmt: skip
ALL_SMALL = Reason(
    ", as every parameter has fewer elements than min_8bit_size={min_8bit_size}",
    "pass a lower min_8bit_size, or force_8bit=True",
    of_parameter=lambda o, s: s.storage(o) not in st.CODED,
)
FORCED = Reason(
    " with force_8bit=True", "pass force_8bit=False",
    of_options=lambda o: o["force_8bit"],
)  # fmt: skip
NOT_FACTORED = Reason(
    " with factored=False", "pass factored=True",
    of_options=lambda o: not o["factored"],
)  # fmt: skip
NO_MATRIX = Reason(
    ", as no parameter is a matrix of which row and column means would be smaller than the moments themselves",
    of_parameter=lambda o, s: s.storage(o) not in st.FACTORED,
)
LORA_WITHOUT_MASK = Reason(
    ", as LoRA's matrices keep no rates of single weights", "set lora_mask=True in the constructor or the group",
    of_parameter=lambda o, s: s.is_lora and not o["lora_mask"],
)  # fmt: skip
NO_MASK = Reason(
    " with mask_bits=0, which keeps no rates of single weights", "pass mask_bits=8 or 4",
    of_options=lambda o: o["mask_bits"] == 0,
)  # fmt: skip
MASK_AT_REST = Reason(
    " with warmup_steps=0, which leaves all weights the same rate", "pass a higher warmup_steps",
    of_options=lambda o: o["warmup_steps"] == 0,
)  # fmt: skip
NOTHING_BOUND_OF_LORA = Reason(  # a rate that is found has bounds, too
    LORA_WITHOUT_MASK.words, LORA_WITHOUT_MASK.remedy,
    of_parameter=lambda o, s: not o["auto_lr"] and LORA_WITHOUT_MASK.of_parameter(o, s),
)  # fmt: skip
NOTHING_BOUND = Reason(
    NO_MASK.words, NO_MASK.remedy,
    of_options=lambda o: not o["auto_lr"] and NO_MASK.of_options(o),
)  # fmt: skip
NOTHING_BOUND_AT_REST = Reason(
    MASK_AT_REST.words, MASK_AT_REST.remedy,
    of_options=lambda o: not o["auto_lr"] and MASK_AT_REST.of_options(o),
)  # fmt: skip
NO_EMBEDDING = Reason(
    ", as no parameter can be told to be an embedding",
    "pass model.named_parameters() in place of model.parameters(), or set _is_embedding = True on the weights",
    of_parameter=lambda o, s: not (s.is_named or s.is_embedding or s.storage(o) == "32bit"),
)
RATE_GIVEN = Reason(
    ", as the rate is given", "leave lr out, or pass auto_lr=True",
    of_options=lambda o: not o["auto_lr"],
)  # fmt: skip
NO_EDGES = Reason(
    " with edge_suppression=False", "pass edge_suppression=True",
    of_options=lambda o: not o["edge_suppression"],
)  # fmt: skip
NO_EDGE_PENALTY = Reason(
    " with edge_penalty=0", "pass a higher edge_penalty",
    of_options=lambda o: o["edge_penalty"] == 0,
)  # fmt: skip
NO_SURFACE = Reason(
    ", as no parameter has two sides of more than 2 elements",
    of_parameter=lambda o, s: not has_surface(s.p),
)
NOT_AWARE = Reason(
    " with spatial_awareness=False", "pass spatial_awareness=True",
    of_options=lambda o: not o["spatial_awareness"],
)  # fmt: skip
NO_LORA_PARTS = Reason(
    " with lora_mask=True, torque=False, lora_rank_penalty=False and no lora_direction, with which LoRA is treated as "
    "all else is",
    "leave one of them out",
    of_options=lambda o: o["lora_mask"] and not (o["torque"] or o["lora_rank_penalty"] or o["lora_direction"]),
)
NO_LORA = Reason(
    ", as no parameter can be told to be LoRA's",
    "pass lora=True, or model.named_parameters() in place of model.parameters()",
    of_parameter=lambda o, s: not s.is_lora,
)
NO_RANK_PENALTY = Reason(
    " with lora_rank_penalty=False", "pass lora_rank_penalty=True",
    of_options=lambda o: not o["lora_rank_penalty"],
)  # fmt: skip
NO_STRENGTH = Reason(
    " with rank_penalty_strength=0", "pass a higher rank_penalty_strength",
    of_options=lambda o: o["rank_penalty_strength"] == 0,
)  # fmt: skip
NO_THIN_MATRIX = Reason(
    f", as no matrix of LoRA's has a side of at most {low_rank.LOW_RANK_MAX}",
    of_parameter=lambda o, s: s.p.dim() != 2 or min(s.p.shape) > low_rank.LOW_RANK_MAX,
)
NO_TORQUE = Reason(
    " with torque=False", "pass torque=True",
    of_options=lambda o: not o["torque"],
)  # fmt: skip
TO_NEAREST = Reason(
    " with master='none', which rounds to nearest", "pass master='stochastic'",
    of_options=lambda o: not o["stochastic_rounding"],
)  # fmt: skip
NOT_ROUNDED = Reason(
    ", as every parameter is float32, which is not rounded",
    of_parameter=lambda o, s: s.p.dtype == torch.float32,
)
NO_BFLOAT16 = Reason(
    ", as no parameter is bfloat16",
    of_parameter=lambda o, s: o["master"] == "ecc8" and not st.keeps_residual(s.p, o),
)
NO_CHANCE = Reason(
    ", as nothing is rounded at random",
    of_parameter=lambda o, s: s.storage(o) == "32bit" and not st.rounds_stochastically(s.p, o),
)
NO_CUDA = Reason(
    ", as no parameter is on a CUDA device",
    of_parameter=lambda o, s: s.p.device.type != "cuda",
)
NOT_PAGED_THERE = Reason(
    ": paged optimizer states exist on CUDA only; elsewhere they are ordinary memory",
    "use a class that is not paged",
    of_parameter=lambda o, s: not paged.exists_on(s.p.device),
)
TOO_SMALL_TO_PAGE = Reason(
    f", as only states of {st.PAGED_MIN_SIZE:,} elements and more are paged",
    "use a class that is not paged",
    of_parameter=lambda o, s: not st.pages(s.p, True),
)
STRIDED = Reason(
    ", as no parameter is contiguous, and plain PyTorch steps those that are not",
    of_parameter=lambda o, s: o["backend"] == "triton" and not s.p.is_contiguous(),
)
NO_LOG = Reason(
    " without run_log", "pass run_log, a folder",
    of_options=lambda o: o["run_log"] is None,
)  # fmt: skip


def _overruled(sets: Callable[[Options], Options]) -> Reason:
    """Of an option that stands for others; sets: those, by what is in force."""
    return Reason(
        ", as all that it sets is set otherwise, or comes to nothing itself",
        of_options=lambda o: _comes_to_nothing(sets(o), o, None),
        of_parameter=lambda o, s: _comes_to_nothing(sets(o), o, s),
    )


def _of_profile(options: Options) -> Options:
    """What the profile sets otherwise than the defaults."""
    profile, plain = vars(getattr(config.OptimizationProfiles, options["profile"])()), vars(config.AutomagicConfig())
    return {name: value for name, value in profile.items() if value != plain[name]}


def _comes_to_nothing(sets: Options, options: Options, subject: Subject | None) -> bool:
    """Whether none of what a profile or a preset sets has an effect."""
    return all(
        options[name] != value
        or (value not in TABLE[name].idle_values and any(x.holds(options, subject) for x in TABLE[name].reasons))
        for name, value in sets.items()
    )


OVERRULED = _overruled(_of_profile)
PRESET_OVERRULED = _overruled(lambda options: config.PRESETS[options["preset"]])


# --- the table --------------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """Of an option: when it has no effect, and the values besides its default that ask for nothing."""

    reasons: tuple[Reason, ...]
    idle_values: tuple[Any, ...] = ()


ALWAYS = Line(())
"""It has an effect under any settings."""

TABLE: dict[str, Line] = {
    "lr": ALWAYS,
    "min_lr": Line((NOTHING_BOUND_OF_LORA, NOTHING_BOUND, NOTHING_BOUND_AT_REST), (0,)),
    "max_lr": Line((NOTHING_BOUND_OF_LORA, NOTHING_BOUND, NOTHING_BOUND_AT_REST)),
    "auto_lr": ALWAYS,
    "auto_lr_steps": Line((RATE_GIVEN,)),
    "weight_decay": ALWAYS,
    "warmup_steps": Line((LORA_WITHOUT_MASK, NO_MASK), (0,)),
    "betas": ALWAYS,
    "eps": ALWAYS,
    "clip_threshold": ALWAYS,
    "percentile_clipping": ALWAYS,
    "optim_bits": Line((ALL_SMALL,), (32,)),
    "min_8bit_size": Line((IN_32_BITS, FORCED)),
    "block_wise": ALWAYS,
    "stable_emb": Line((FORCED, NO_EMBEDDING)),
    "force_8bit": ALWAYS,
    "factored": Line((IN_32_BITS, NO_MATRIX)),
    "mask_bits": Line((IN_32_BITS, LORA_WITHOUT_MASK), (0,)),
    "mean_bits": Line((IN_32_BITS, NOT_FACTORED, NO_MATRIX)),
    "is_paged": Line((NOT_PAGED_THERE, TOO_SMALL_TO_PAGE)),
    "edge_suppression": Line((NO_EDGE_PENALTY, NO_SURFACE)),
    "edge_penalty": Line((NO_EDGES, NO_SURFACE), (0,)),
    "edge_threshold": Line((NO_EDGES, NO_EDGE_PENALTY, NO_SURFACE)),
    "frequency_penalty": Line((NO_SURFACE,), (0,)),
    "background_regularization": ALWAYS,
    "spatial_awareness": Line((LORA_WITHOUT_MASK, NO_MASK, MASK_AT_REST)),
    "detail_preservation": Line((NOT_AWARE, LORA_WITHOUT_MASK, NO_MASK, MASK_AT_REST)),
    "lora": Line((NO_LORA_PARTS,)),
    "lora_mask": Line((NO_LORA, NO_MASK, MASK_AT_REST)),
    "lora_rank_penalty": Line((NO_STRENGTH, NO_LORA, NO_THIN_MATRIX)),
    "rank_penalty_strength": Line((NO_RANK_PENALTY, NO_LORA, NO_THIN_MATRIX), (0,)),
    "low_rank_emphasis": Line((NO_TORQUE, NO_LORA), (1,)),
    "lora_direction": Line((NO_LORA, NO_THIN_MATRIX)),
    "torque": ALWAYS,
    "came": ALWAYS,
    "cautious": ALWAYS,
    "stochastic_rounding": Line((TO_NEAREST, NOT_ROUNDED)),
    "master": Line((NO_BFLOAT16,), ("none", "stochastic")),
    "seed": Line((NO_CHANCE,)),
    "capturable": Line((NO_CUDA,)),
    "backend": Line((STRIDED,), ("torch",)),
    "preset": Line((PRESET_OVERRULED,)),
    "profile": Line((OVERRULED,), ("balanced",)),
    "verbose": ALWAYS,
    "run_log": ALWAYS,
    "run_log_every": Line((NO_LOG,)),
}  # fmt: skip


# --- what a user set --------------------------------------------------------------------------------------------------


def wished(given: Options, defaults: Options) -> Options:
    """What of the given options, checked, somebody must have set on purpose, and expects something from.

    A number at its default is what forms and trainers pass along. Where every option is given, as by a config or by a
    tool that reads the signature, neither do switches at their defaults count, nor a profile's storage of the mask.
    """
    is_whole = given.keys() >= set(config.GROUP_OPTIONS)
    return {
        name: value
        for name, value in given.items()
        if value is not None and value is not False and value not in TABLE[name].idle_values
        if value != defaults[name] or (value is True and not is_whole)
        if not (is_whole and name == "mask_bits")
    }


Case = tuple[Options, "Subject | None"]
"""The options in force for a parameter, and the parameter; None where it is not looked at."""


def say(name: str, value: Any, cases: Iterable[Case], where: str = "") -> None:
    """Warn of an option that was set and has an effect in none of these cases; the same words once.

    Args:
        where: what follows the value, if it stands elsewhere than in the constructor.
    """
    found = _reason(TABLE[name].reasons, cases)
    if found is not None:
        reason, options = found
        remedy = f"{reason.remedy}, or leave it out" if reason.remedy else "leave it out"
        warn_once(
            f"option {name}={value!r}{where}: has no effect{reason.words.format(**options)}; {remedy}", stacklevel=5
        )


def _reason(reasons: tuple[Reason, ...], cases: Iterable[Case]) -> tuple[Reason, Options] | None:
    """Why it has no effect in the first case, with its options; None where it has one in any, or there is no case."""
    first = None
    for options, subject in cases if reasons else ():
        reason = next((reason for reason in reasons if reason.holds(options, subject)), None)
        if reason is None:
            return None
        first = first or (reason, options)
    return first
