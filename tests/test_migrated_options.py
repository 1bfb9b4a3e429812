"""Coming from another optimizer: its options in our words."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import bitsandbytes
import pytest

from automagic_bnb import Automagic8bit, migrate_options

AI_TOOLKIT_DEFAULTS = {
    "lr": 1e-6,
    "min_lr": 1e-7,
    "max_lr": 1e-3,
    "lr_bump": 1e-6,
    "eps": (1e-30, 1e-3),
    "clip_threshold": 1.0,
    "beta2": 0.999,
    "weight_decay": 0.0,
    "do_paramiter_swapping": False,
    "paramiter_swapping_factor": 0.1,
}
SPATIAL = {
    "edge_suppression": True,
    "edge_threshold": 0.6,
    "edge_penalty": 0.1,
    "background_regularization": True,
    "spatial_awareness": True,
    "frequency_penalty": 0.05,
    "detail_preservation": 0.8,
    "lora_rank_penalty": True,
    "rank_penalty_strength": 0.01,
    "low_rank_emphasis": 1.2,
}
CAMEAMP_DEFAULTS = {
    "lr": 1e-6,
    "min_lr": 1e-7,
    "max_lr": 1e-3,
    "lr_bump": 3e-6,
    "eps": (1e-30, 1e-16, 1e-8),
    "clip_threshold": 1.0,
    "betas": (0.8, 0.99, 0.999),
    "eta": 2.0,
    "beta1_decay": 0.9995,
    "weight_decay": 5e-4,
    "warmup_steps": 500,
    "context_window": 30,
    "adaptation_rate": 0.25,
    "came": True,
    "full_finetune": False,
    "verbose": False,
    "optim_bits": 8,
    "percentile_clipping": 100,
    "block_wise": True,
    "min_8bit_size": 4096,
    "stable_emb": False,
    "fused_adam": False,
    "force_8bit": False,
    **SPATIAL,
}
"""Of the 8-bit variant with spatial penalties, which has the most."""
CAMEAMP_ELSEWHERE = {
    "came_enabled": True,
    "cautious": True,
    "la_layers": 3,
    "alphas": (0.6, 0.75, 0.85, 0.85),
    "ks": (5, 5, 3, 3),
    "tam_correlation_method": "auto",
    "tam_large_tensor_threshold": 1000,
    "tam_use_inplace_ops": True,
    "use_buffer_cache": True,
    "buffer_cache_size_limit": 10,
    "auto_clear_cache_steps": 1000,
    "enable_stage_optimization": True,
    "warmup_regularization_scale": 0.5,
    "stable_regularization_scale": 0.8,
    "mature_regularization_scale": 0.3,
    "disable_heavy_ops_after_steps": 1000,
    "progressive_feature_disable": True,
}
"""Options of the other variants."""


def migrated(options: dict[str, Any], source: str) -> tuple[dict[str, Any], set[str]]:
    """The options in our words, and the names of theirs that were warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = migrate_options(options, source)
    said = [str(w.message) for w in caught]
    assert all(f" of {source}: " in message for message in said)
    return result, {message.removeprefix("option ").split("=")[0] for message in said}


def test_every_option_of_ai_toolkit() -> None:
    """At their defaults: the rate starts where theirs does and is found; only what has no counterpart is warned of."""
    result, warned = migrated(AI_TOOLKIT_DEFAULTS, "ai-toolkit")
    assert result == {
        "lr": 1e-6,
        "auto_lr": True,
        "min_lr": 1e-7,
        "max_lr": 1e-3,
        "eps": (1e-30, 1e-16),
        "clip_threshold": 1.0,
        "betas": (0.9, 0.999, 0.999),
        "weight_decay": 0.0,
    }
    assert warned == {"lr_bump", "paramiter_swapping_factor"}


def test_every_option_of_cameamp() -> None:
    """Those that are ours too come through as they are; of the others each is warned of."""
    result, warned = migrated({**CAMEAMP_DEFAULTS, **CAMEAMP_ELSEWHERE}, "cameamp")
    same = [*("min_lr", "max_lr", "betas", "weight_decay", "warmup_steps", "came", "cautious", "verbose"), *SPATIAL]
    same += ["optim_bits", "percentile_clipping", "block_wise", "min_8bit_size", "stable_emb", "force_8bit"]
    theirs = {**CAMEAMP_DEFAULTS, **CAMEAMP_ELSEWHERE}
    rest = {"lr": 1e-6, "auto_lr": True, "eps": (1e-30, 1e-16), "clip_threshold": 1.0}
    assert result == {**{name: theirs[name] for name in same}, **rest}
    silent = {*same, "eps", "clip_threshold", "came_enabled", "fused_adam"}
    assert warned == theirs.keys() - silent


@pytest.mark.parametrize("name", ["Adam", "Adam8bit", "AdamW", "AdamW8bit", "AdamW32bit", "PagedAdamW8bit"])
def test_every_option_of_bitsandbytes(name: str) -> None:
    """As its signatures have them."""
    signature = inspect.signature(getattr(bitsandbytes.optim, name).__init__).parameters
    given = {k: p.default for k, p in signature.items() if k not in ("self", "params")}
    result, warned = migrated(given, "bitsandbytes")
    kept = {k: v for k, v in given.items() if k not in ("amsgrad", "args", "betas", "eps")}
    assert result == {**kept, "betas": (0.9, 0.999, 0.999), "eps": (1e-8 * 1e-8, 1e-16)}
    assert warned == {"optim_bits"}
    assert migrated({"percentile_clipping": 95, "block_wise": True}, "bitsandbytes")[0]["percentile_clipping"] == 95


@pytest.mark.parametrize(
    ("source", "given", "expected"),
    [
        ("ai-toolkit", {"lr": 0.5}, {"lr": 1e-6, "auto_lr": True}),
        ("ai-toolkit", {"lr": 1e-3}, {"lr": 1e-3, "auto_lr": True}),
        ("ai-toolkit", {"lr": "1e-5"}, {"lr": 1e-5, "auto_lr": True}),
        ("ai-toolkit", {"eps": 1e-20}, {"eps": (1e-20, 1e-16)}),
        ("ai-toolkit", {"eps": [1e-20, 1e-3]}, {"eps": (1e-20, 1e-16)}),
        ("ai-toolkit", {"weight_decay": 0.1}, {"weight_decay": 0.1}),
        ("cameamp", {"eps": (1e-30, 1e-15)}, {"eps": (1e-30, 1e-15)}),
        ("cameamp", {"came_enabled": False}, {"came": False}),
        ("cameamp", {"clip_threshold": 2}, {"clip_threshold": 2.0}),
        ("bitsandbytes", {"lr": 5e-5, "weight_decay": 0}, {"lr": 5e-5, "weight_decay": 0.0}),
    ],
)
def test_values_in_our_words(source: str, given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert migrated(given, source)[0] == {**migrated({}, source)[0], **expected}


def test_what_was_left_out() -> None:
    """Weight decay and rate are choices of the training: theirs are taken over. The rest takes our defaults."""
    assert migrate_options({}) == {"weight_decay": 0.0}
    assert migrate_options({}, "bitsandbytes") == {"lr": 1e-3, "weight_decay": 1e-2}
    assert migrate_options({}, "cameamp") == {}


@pytest.mark.parametrize(
    ("source", "quiet", "loud"),
    [
        ("ai-toolkit", {"clip_threshold": 1.0}, {"clip_threshold": 0.5}),
        ("ai-toolkit", {"lr": 1e-4}, {"lr": 1e-2}),
        ("ai-toolkit", {"do_paramiter_swapping": False}, {"do_paramiter_swapping": True}),
        ("cameamp", {"weight_decay": 5e-4}, {"weight_decay": 2.5}),
        ("cameamp", {"edge_threshold": 0.6}, {"edge_threshold": 0.9}),
        ("cameamp", {"full_finetune": True}, {"full_finetune": False}),
        ("bitsandbytes", {"amsgrad": False}, {"amsgrad": True}),
        ("bitsandbytes", {"args": None}, {"args": object()}),
        ("bitsandbytes", {"optim_bits": 8}, {"optim_bits": 32}),
    ],
)
def test_only_values_that_change_something_are_warned_of(
    source: str, quiet: dict[str, Any], loud: dict[str, Any]
) -> None:
    assert migrated(quiet, source)[1] == set()
    assert migrated(loud, source)[1] == loud.keys()
    assert migrated(loud, source)[1] == set()  # once in a process


@pytest.mark.parametrize(
    ("given", "source", "error", "message"),
    [
        ({"beta_2": 0.9}, "ai-toolkit", TypeError, "ai-toolkit has no option 'beta_2'; did you mean 'beta2'"),
        ({"wd": 0.9}, "ai-toolkit", TypeError, "did you mean 'weight_decay'"),
        ({"parameter_swapping_factor": 1}, "ai-toolkit", TypeError, "did you mean 'paramiter_swapping_factor'"),
        ({"factored": True}, "ai-toolkit", TypeError, "no option 'factored'"),
        ({"edge_treshold": 0.6}, "cameamp", TypeError, "cameamp has no option 'edge_treshold'.*'edge_threshold'"),
        ({"beta": (0.9, 0.99)}, "bitsandbytes", TypeError, "bitsandbytes has no option 'beta'.*'betas'"),
        ({"beta2": 1.5}, "ai-toolkit", ValueError, r"betas=\(0.9, 1.5, 0.999\) \(from beta2=1.5 of ai-toolkit\)"),
        ({"beta2": None}, "ai-toolkit", TypeError, "from beta2=None of ai-toolkit"),
        ({"eps": ()}, "ai-toolkit", ValueError, "eps="),
        ({"lr": "fast"}, "ai-toolkit", TypeError, "lr='fast'"),
        ({"lr": -1}, "cameamp", ValueError, "lr=-1"),
        ({"min_lr": 1e-2, "max_lr": 1e-3}, "ai-toolkit", ValueError, "min_lr=0.01: must not exceed max_lr=0.001"),
        ({"betas": (0.9, 2.0)}, "bitsandbytes", ValueError, "betas="),
        ({"block_wise": False}, "bitsandbytes", ValueError, "block_wise=False"),
        ({}, "adam", ValueError, "source='adam': must be one of 'ai-toolkit', 'cameamp', 'bitsandbytes'"),
        ([("lr", 1e-4)], "ai-toolkit", TypeError, "must be a dict"),
    ],
)
def test_wrong_options_are_errors(given: Any, source: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        migrate_options(given, source)


@pytest.mark.parametrize(
    ("given", "source"),
    [(AI_TOOLKIT_DEFAULTS, "ai-toolkit"), (CAMEAMP_DEFAULTS, "cameamp"), ({"is_paged": True}, "bitsandbytes")],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_migrated_options_build_an_optimizer(given: dict[str, Any], source: str, tools: Any) -> None:
    options = migrate_options(given, source)
    opt = Automagic8bit(tools.parameters((64, 64)), **options)
    tools.train(opt, opt.param_groups[0]["params"], range(2))
    assert {name: opt.param_groups[0].get(name, options[name]) for name in options} == options
