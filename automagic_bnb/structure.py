"""Which options a plan of launches rests on, and which are numbers that each launch takes as they are."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from automagic_bnb import config

READ_ANEW = (
    *("lr", "min_lr", "max_lr", "weight_decay", "warmup_steps", "low_rank_emphasis", "rank_penalty_strength"),
    *("percentile_clipping", "betas", "eps", "clip_threshold", "frequency_penalty", "edge_penalty", "edge_threshold"),
    "detail_preservation",
)
"""Numbers that are arguments of a launch or stand in its tables: schedulers change them, and no plan rests on them."""
STRUCTURAL = tuple(name for name in config.GROUP_OPTIONS if name not in READ_ANEW)
_switches: Callable[[dict[str, Any]], tuple[Any, ...]] = operator.itemgetter(*STRUCTURAL)


def signature(options: dict[str, Any]) -> tuple[Any, ...]:
    """What a plan rests on of the options: the switches, and of two numbers whether they switch something on."""
    return *_switches(options), options["frequency_penalty"] > 0, options["percentile_clipping"] < 100
