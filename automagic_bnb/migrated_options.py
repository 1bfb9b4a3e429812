"""Coming from another optimizer: its constructor options in our words. Its checkpoints: see `migration`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from typing import Any

from automagic_bnb import config
from automagic_bnb.notices import warn_once

Options = dict[str, Any]
Translated = tuple[Options, str]
"""Our options in place of one of theirs, and what the user should know; the empty string for nothing."""
Table = dict[str, Callable[[str, Any], Translated]]


def migrate_options(options: Options, source: str = "ai-toolkit") -> Options:
    """Another optimizer's constructor options as ours; what has no equivalent or another meaning is warned of once.

    Args:
        options: the keywords given to the other optimizer.
        source: "ai-toolkit" (its `automagic`), "cameamp" (Automagic_CameAMP and its variants) or "bitsandbytes"
            (AdamW in its 8-bit, 32-bit and paged forms; Adam, if its `weight_decay` is among the options). What a run
            is trained with is taken over even where it was left out: `weight_decay` of ai-toolkit (0), `weight_decay`
            and `lr` of bitsandbytes (0.01, 1e-3). Other options left out take our defaults.

    Returns:
        Options for `Automagic8bit` and the other classes, checked.

    Raises:
        TypeError: `options` is no dict, or holds an option that the other optimizer does not know (naming the
            nearest), or a value of the wrong type.
        ValueError: an unknown source, or a value outside the range legal here.

    Example:
        >>> migrate_options({"lr": 1e-6, "beta2": 0.99, "weight_decay": 0.1, "min_lr": 1e-6})
        {'lr': 1e-06, 'auto_lr': True, 'betas': (0.9, 0.99, 0.999), 'weight_decay': 0.1, 'min_lr': 1e-06}
    """
    if source not in SOURCES:
        raise ValueError(f"source={source!r}: must be one of {', '.join(map(repr, SOURCES))}")
    if not isinstance(options, dict):
        raise TypeError(f"options={options!r}: must be a dict of the other optimizer's keywords")
    table, defaults = SOURCES[source]
    result: Options = {}
    for name, value in {**options, **{k: v for k, v in defaults.items() if k not in options}}.items():
        if name not in table:
            near = difflib.get_close_matches(config.OTHER_NAMES.get(name, name), table, n=1, cutoff=0.0)[0]
            raise TypeError(f"{source} has no option {name!r}; did you mean {near!r}?")
        ours, note = table[name](name, value)
        for key, translated in ours.items():
            where = "" if key == name else f" (from {name}={value!r} of {source})"
            result[key] = config.check_option(key, translated, where)
        if note:
            warn_once(f"option {name}={value!r} of {source}: {note}")
    config.make_config(**result)
    return result


def _same(name: str, value: Any) -> Translated:
    return {name: value}, ""


def _changed(note: str, *harmless: Any) -> Callable[[str, Any], Translated]:
    """An option whose meaning is not quite the same; nothing is said of its usual values."""

    def translate(name: str, value: Any) -> Translated:
        return {name: value}, "" if value in harmless else note

    return translate


def _dropped(note: str, *harmless: Any) -> Callable[[str, Any], Translated]:
    """An option without equivalent; nothing is said of the values that switch it off."""

    def translate(_: str, value: Any) -> Translated:
        return {}, "" if value in harmless else f"has no equivalent here; {note}"

    return translate


LOW_START = 1e-6
"""Of ai-toolkit: where the rates start when a higher one than 1e-3 was asked for."""


def _start_rate(name: str, value: Any) -> Translated:
    """Where the weights' rates start: so it does here too, with auto_lr."""
    return {name: value, "auto_lr": True}, ""


def _low_start_rate(name: str, value: Any) -> Translated:
    """ai-toolkit starts at `LOW_START` in place of a rate above 1e-3."""
    if config.check_option("lr", value) is not None and float(value) > 1e-3:
        return _start_rate(name, LOW_START)[0], f"the rate starts at {LOW_START}, as it does there"
    return _start_rate(name, value)


def _noted_start_rate(name: str, value: Any) -> Translated:
    if (start := config.check_option(name, value)) is not None and start >= config.FACTOR_LR:
        return {"auto_lr": True}, f"is left out: the rate is found here, and no search starts at {config.FACTOR_LR:g}"
    note = "is where the rates start, there and here (auto_lr=True); for a fixed mean rate remove auto_lr"
    return _start_rate(name, value)[0], note


def _second_decay(_: str, value: Any) -> Translated:
    beta1, _beta2, beta3 = config.AutomagicConfig().betas
    return {"betas": (beta1, value, beta3)}, ""


def _first_eps(name: str, value: Any) -> Translated:
    """A number added to the squares, as our first; of a sequence ai-toolkit reads the first alone."""
    if isinstance(value, (tuple, list)):
        value = value[0] if value else math.nan
    return {name: (value, config.AutomagicConfig().eps[1])}, ""


def _first_two_eps(name: str, value: Any) -> Translated:
    return {name: value[:2] if isinstance(value, (tuple, list)) else value}, ""


def _came_enabled(_: str, value: Any) -> Translated:
    return {"came": value}, ""


CLIPPING = _changed("bounds each block of 256 here, where it bounded a whole tensor's root-mean-square update", 1.0)
NO_BUMP = _dropped("a weight's own rate moves by factors of about 2^(1/16)")
NO_CONTEXT = _dropped("nothing follows the loss: use a scheduler")
NO_LOOKAHEAD = _dropped("there is no lookahead")
NO_PHASES = _dropped("the penalties stay as they are during training")

AI_TOOLKIT: Table = {
    "lr": _low_start_rate,
    "min_lr": _same,
    "max_lr": _same,
    "lr_bump": NO_BUMP,
    "eps": _first_eps,
    "clip_threshold": CLIPPING,
    "beta2": _second_decay,
    "weight_decay": _same,
    "do_paramiter_swapping": _dropped("freeze what is not to be trained with requires_grad_(False)", False, None),
    "paramiter_swapping_factor": _dropped("freeze what is not to be trained with requires_grad_(False)"),
}
CAMEAMP_SAME = (
    *("min_lr", "max_lr", "betas", "warmup_steps", "came", "cautious", "verbose"),
    *("edge_suppression", "edge_penalty", "background_regularization", "spatial_awareness"),
    *("frequency_penalty", "detail_preservation", "lora_rank_penalty", "rank_penalty_strength", "low_rank_emphasis"),
    *("optim_bits", "percentile_clipping", "block_wise", "min_8bit_size", "stable_emb", "force_8bit"),
)
CAMEAMP: Table = {
    **dict.fromkeys(CAMEAMP_SAME, _same),
    "lr": _noted_start_rate,
    "lr_bump": NO_BUMP,
    "eps": _first_two_eps,
    "clip_threshold": CLIPPING,
    "weight_decay": _changed("acts throughout, where it ended with half of the warm-up; 5e-4 suits", 5e-4, 0),
    "edge_threshold": _changed("is in units of its block's gradients here; 0.6 suits", 0.6),
    "came_enabled": _came_enabled,
    "eta": _dropped("rows are not scaled by their norm (ALLoRA)"),
    "full_finetune": _dropped("rows are never scaled by their norm (ALLoRA); say what is LoRA's by `lora`", True),
    "beta1_decay": _dropped("the momentum's decay is constant: set betas[0]"),
    "fused_adam": _dropped("the fused step is used wherever it can be: see `backend`", False),
    "context_window": NO_CONTEXT,
    "adaptation_rate": NO_CONTEXT,
    **dict.fromkeys(("la_layers", "alphas", "ks"), NO_LOOKAHEAD),
    **dict.fromkeys(
        (
            *("enable_stage_optimization", "warmup_regularization_scale", "stable_regularization_scale"),
            *("mature_regularization_scale", "disable_heavy_ops_after_steps", "progressive_feature_disable"),
        ),
        NO_PHASES,
    ),
    **dict.fromkeys(
        (
            *("tam_correlation_method", "tam_large_tensor_threshold", "tam_use_inplace_ops"),
            *("use_buffer_cache", "buffer_cache_size_limit", "auto_clear_cache_steps"),
        ),
        _dropped("it concerned how things were computed, not what"),
    ),
}
BITSANDBYTES_SAME = ("lr", "betas", "eps", "weight_decay", "min_8bit_size", "is_paged", "percentile_clipping")
BITSANDBYTES: Table = {
    **dict.fromkeys((*BITSANDBYTES_SAME, "block_wise"), _same),
    "optim_bits": _changed("keeps 32-bit state here; AdamW8bit takes no heed of it: leave it out to have 8 bits", 8),
    "amsgrad": _dropped("there is no AMSGrad", False),
    "args": _dropped("pass the options themselves", None),
}
SOURCES: dict[str, tuple[Table, Options]] = {
    "ai-toolkit": (AI_TOOLKIT, {"weight_decay": 0.0}),
    "cameamp": (CAMEAMP, {}),
    "bitsandbytes": (BITSANDBYTES, {"lr": 1e-3, "weight_decay": 1e-2}),
}
"""By source: its options, and those of its defaults that are taken over."""
