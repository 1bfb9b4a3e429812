"""`inspect.signature` of the classes: every option, with its default and type."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from automagic_bnb import Automagic, Automagic8bit, Automagic32bit, AutomagicConfig, PagedAutomagic8bit


@pytest.mark.parametrize(
    ("cls", "own"),
    [
        (Automagic, {"optim_bits": 32}),
        (Automagic8bit, {"optim_bits": 8}),
        (Automagic32bit, {"optim_bits": 32}),
        (PagedAutomagic8bit, {"optim_bits": 8, "is_paged": True}),
    ],
)
def test_every_option_is_listed(cls: type, own: dict[str, Any]) -> None:
    """With the default that an optimizer of this class has."""
    parameters = inspect.signature(cls).parameters
    assert list(parameters)[:2] == ["params", "lr"]
    assert set(parameters) == {"params", *vars(AutomagicConfig())}
    assert {name: p.default for name, p in list(parameters.items())[1:]} == {**vars(AutomagicConfig()), **own}
    assert parameters["warmup_steps"].annotation is int
    assert parameters["lr"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


def test_the_function_lists_them_too() -> None:
    """What LightningCLI's parser reads, which then passes every default."""
    for cls in (Automagic, Automagic8bit, Automagic32bit, PagedAutomagic8bit):
        parameters = inspect.signature(cls.__init__).parameters
        assert set(parameters) == {"self", "params", *vars(AutomagicConfig())}
        defaults = {name: p.default for name, p in list(parameters.items())[2:]}
        opt = cls([torch.nn.Parameter(torch.zeros(4))], **defaults)
        assert vars(opt.config) == vars(cls([torch.nn.Parameter(torch.zeros(4))]).config)


def test_a_subclass_with_arguments_of_its_own_has_its_own_signature() -> None:
    class Mine(Automagic8bit):
        def __init__(self, params: Any, mine: int = 3) -> None:
            super().__init__(params, lr=mine * 1e-3)

    assert list(inspect.signature(Mine).parameters) == ["params", "mine"]
    assert Mine([torch.nn.Parameter(torch.zeros(4))]).param_groups[0]["lr"] == 3e-3
