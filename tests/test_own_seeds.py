"""Random bits where no seed is given: by name, or by the optimizer's own number, which a checkpoint keeps."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from automagic_bnb import Automagic8bit, groups
from automagic_bnb import quantization as q

SHAPE = (64, 64)


@pytest.fixture
def numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimizers of a process, as they count outside of tests."""
    monkeypatch.setattr(groups, "own_seeds", itertools.count(3))


def trained(tools: Any, steps: int = 4, **options: Any) -> tuple[Any, list[Any]]:
    """An optimizer of one bfloat16 parameter, always on the same weights and gradients, so that bits alone differ."""
    parameters = tools.parameters(SHAPE, dtype=torch.bfloat16)
    opt = Automagic8bit(parameters, lr=1e-3, **options)
    tools.train(opt, parameters, range(steps))
    return opt, parameters


@pytest.mark.usefixtures("numbered")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_optimizers_without_names_round_apart(backend: str, tools: Any) -> None:
    """Weights and codes; the same seed, given to both, is the negative control."""
    for options, equal in (({}, False), ({"seed": 0}, True)):
        (a, (p,)), (b, (r,)) = (
            trained(tools, backend=backend, factored=False, mask_bits=8, **options) for _ in range(2)
        )
        assert torch.equal(p, r) == equal
        assert torch.equal(a.state[p]["state2"], b.state[r]["state2"]) == equal
        # bits alone: rounding moves no weight by more than a few of its last places
        assert torch.allclose(p, r, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("own", [0, 5])
def test_both_backends_take_the_number(own: int, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(groups, "own_seeds", itertools.repeat(own))
    (_, (p,)), (_, (r,)) = trained(tools, backend="torch"), trained(tools, backend="triton")
    assert (p != r).float().mean() < 1e-3
    monkeypatch.setattr(groups, "own_seeds", itertools.repeat(own + 1))
    assert (p != trained(tools, backend="torch")[1][0]).float().mean() > 0.02


@pytest.mark.usefixtures("numbered")
def test_names_tell_parameters_whatever_the_number(tools: Any) -> None:
    """One optimizer for each parameter then rounds as one for all."""
    keys = set()
    for _ in range(2):
        opt = Automagic8bit([("block.0.weight", tools.parameters(SHAPE)[0])], lr=1e-3)
        (p,) = opt.param_groups[0]["params"]
        keys.add(opt.facts_of(p).random_key(opt.param_groups[0]))
    assert len(keys) == 1


@pytest.mark.usefixtures("numbered")
def test_a_resumed_run_rounds_as_the_one_that_was_saved(tools: Any) -> None:
    """Whatever the number of the new optimizer; a group that is added later has the checkpoint's, too."""
    _, (p,) = trained(tools, 6)
    first, (s,) = trained(tools, 3)
    fresh = tools.parameters(SHAPE, dtype=torch.bfloat16)
    again = Automagic8bit(fresh, lr=1e-3)
    number = again.param_groups[0]["own_seed"]
    with torch.no_grad():
        fresh[0].copy_(s)
    again.load_state_dict(first.state_dict())
    assert again.param_groups[0]["own_seed"] == first.param_groups[0]["own_seed"] != number
    again.add_param_group({"params": tools.parameters((8, 8))})
    assert again.param_groups[1]["own_seed"] == first.param_groups[0]["own_seed"]
    tools.train(first, [s], range(3, 6))
    tools.train(again, fresh, range(3, 6))
    assert torch.equal(s, fresh[0])
    assert not torch.equal(p, s)


@pytest.mark.usefixtures("numbered")
def test_a_checkpoint_from_before_there_were_such_numbers_goes_on_as_it_did(tools: Any) -> None:
    """It has a seed, and parameters are told by their places alone."""
    opt, (p,) = trained(tools, 1)
    saved = opt.state_dict()
    del saved["param_groups"][0]["own_seed"]
    saved["param_groups"][0]["seed"] = 0
    opt.load_state_dict(saved)
    assert opt.facts_of(p).random_key(opt.param_groups[0]) == q.parameter_key(0, 0)
    saved["param_groups"][0]["own_seed"] = -1
    with pytest.raises(ValueError, match="own_seed"):
        opt.load_state_dict(saved)


@pytest.mark.usefixtures("numbered")
def test_no_generator_is_asked(tools: Any) -> None:
    """Processes that train replicas have generators in different states, and number their optimizers alike."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    opts = [Automagic8bit(tools.parameters(SHAPE)) for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), before)
    assert [opt.param_groups[0]["own_seed"] for opt in opts] == [3, 4, 5]
