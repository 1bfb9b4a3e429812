"""Presets: options only, below those given, each with a source in the table of docs/presets.md."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from automagic_bnb import Automagic8bit, Automagic32bit, AutomagicConfig, config
from automagic_bnb.trainers import replacing

DOCS = Path(__file__).parents[1] / "docs"
DEFAULTS = vars(AutomagicConfig())
EXPECTED = {
    "sdxl-lora": {"lora": True, "weight_decay": 0.01},
    "flux-lora": {"lora": True, "weight_decay": 1e-4},
    "wan-lora": {"lora": True, "weight_decay": 0.01},
    "llm-lora": {"lora": True, "weight_decay": 0.01},
    "full": {"weight_decay": 0.01},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_preset_is_the_defaults_but_for_its_options(name: str, tools: Any) -> None:
    """They stand in the group, which a checkpoint keeps; the rate is still found."""
    opt = Automagic8bit(tools.parameters((64, 64)), preset=name)
    assert vars(opt.config) == {**DEFAULTS, **EXPECTED[name], "preset": name}
    (group,) = opt.state_dict()["param_groups"]
    assert {key: group[key] for key in EXPECTED[name]} == EXPECTED[name]
    assert "preset" not in group
    assert group["auto_lr"]


def test_what_is_given_stands_above_a_preset_and_that_above_a_profile() -> None:
    made = config.make_config(preset="sdxl-lora", profile="lean", weight_decay=5e-4)
    assert (made.weight_decay, made.lora, made.mask_bits, made.came) == (5e-4, True, 0, False)
    assert config.make_config(**made.__dict__) == made


def test_a_preset_leaves_what_a_class_promises(tools: Any) -> None:
    assert Automagic32bit(tools.parameters((64, 64)), preset="full").config.optim_bits == 32


def test_an_unknown_preset_is_an_error_that_lists_them(tools: Any) -> None:
    with pytest.raises(ValueError, match="'sdxl-lora', 'flux-lora', 'wan-lora', 'llm-lora', 'full'"):
        Automagic8bit(tools.parameters((4, 4)), preset="sd-lora")
    with pytest.raises(TypeError, match="whole optimizer"):
        Automagic8bit([{"params": tools.parameters((4, 4)), "preset": "full"}])


def test_a_signature_has_it() -> None:
    assert inspect.signature(Automagic8bit).parameters["preset"].default is None


def test_a_preset_of_the_runner_stands_over_what_a_trainer_passes() -> None:
    """As every option that the runner is given does; one given beside it stands over the preset."""
    assert replacing.checked({"preset": "flux-lora"}) == {"lora": True, "weight_decay": 1e-4, "preset": "flux-lora"}
    assert replacing.checked({"preset": "full", "weight_decay": "0.1"})["weight_decay"] == 0.1


@pytest.mark.parametrize("page", ["presets.md", "zh-TW/presets.md"])
def test_the_page_has_every_option_of_every_preset(page: str) -> None:
    """One line each: preset, option, and what speaks for it."""
    lines = re.findall(r"^\| `([\w-]+)` \| `(\w+)=([\w.e-]+)` \| (.+) \|$", (DOCS / page).read_text("utf-8"), re.M)
    found = {(preset, option): value for preset, option, value, _ in lines}
    assert found.keys() == {(preset, option) for preset, options in EXPECTED.items() for option in options}
    assert all(config.check_option(option, value) == EXPECTED[p][option] for (p, option), value in found.items())
    assert all(len(source) > 30 for *_, source in lines)
