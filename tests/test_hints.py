"""What is said of options that are other optimizers', and of rates that are none of weights."""

from __future__ import annotations

import warnings

import pytest
import torch

from automagic_bnb import Automagic8bit
from automagic_bnb.config import FOREIGN_OPTIONS, RULES


def one() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(8, 8))]


@pytest.mark.parametrize("name", FOREIGN_OPTIONS)
def test_an_option_of_other_optimizers_is_known_by_name(name: str) -> None:
    """One sentence, and no guess at what was meant."""
    assert name not in RULES
    with pytest.raises(TypeError, match=rf"no option '{name}': \w") as said:
        Automagic8bit(one(), **{name: True})
    assert "did you mean" not in str(said.value)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("name", ["zzz", "frobnicate", "gpu"])
def test_nothing_is_suggested_where_no_name_is_near(name: str) -> None:
    with pytest.raises(TypeError, match=rf"no option '{name}'; AutomagicConfig lists"):
        Automagic8bit(one(), **{name: True})


@pytest.mark.parametrize(("name", "meant"), [("weight_decays", "weight_decay"), ("warmup", "warmup_steps")])
def test_a_near_name_is_suggested(name: str, meant: str) -> None:
    with pytest.raises(TypeError, match=f"did you mean '{meant}'"):
        Automagic8bit(one(), **{name: 1})


def test_a_large_rate_is_said_once_to_be_one() -> None:
    """Prodigy's lr=1; not where the rate is found, nor at 0.03."""
    with pytest.warns(UserWarning, match=r"lr=1.0: is a rate here.*auto_lr=True") as said:
        assert [Automagic8bit(one(), lr=1.0), Automagic8bit(one(), lr=1.0)]
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Automagic8bit(one(), lr=0.03)
    with pytest.warns(UserWarning, match="factor of the rate") as said:
        Automagic8bit(one(), lr=1.0, auto_lr=True)
    assert not any("is a rate here" in str(w.message) for w in said)
