"""What is not the optimizer's own: keys that wrappers keep in its state, and names that say which one is which."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from checkpoint_cases import through_file

from automagic_bnb import Automagic8bit


def stepped(tools: Any, **options: Any) -> Any:
    p = tools.parameters((64, 64), (7,))
    opt = Automagic8bit(p, lr=1e-3, **options)
    tools.train(opt, p, range(3))
    return opt


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["copy", "pickle"])
def test_what_a_wrapper_keeps_comes_back(copied: Any, tools: Any) -> None:
    """Tensors of its own in a parameter's state, in their dtype, and plain values beside the states, as with AdamW."""
    opt = stepped(tools)
    p = opt.param_groups[0]["params"][0]
    opt.state[p]["slow_buffer"] = p.detach().double()
    opt.state[p]["note"] = "kept"
    opt.state["global_step"] = 3
    fresh = stepped(tools)
    with pytest.warns(UserWarning, match=r"\['note', 'slow_buffer'\], which are not this package's: they are kept"):
        fresh.load_state_dict(through_file(opt.state_dict()))
    for other in (fresh, copied(opt)):
        q = other.param_groups[0]["params"][0]
        assert torch.equal(other.state[q]["slow_buffer"], p.detach().double())
        assert other.state[q]["note"] == "kept"
        assert other.state["global_step"] == 3
        tools.train(other, other.param_groups[0]["params"], range(3, 5))
        other.get_metrics(per_parameter=True)
        other.get_memory_efficiency_report()
        other.requantize(optim_bits=32)
        assert torch.equal(other.state[q]["slow_buffer"], p.detach().double())


@pytest.mark.kernels
def test_a_plain_value_costs_no_new_plan(tools: Any) -> None:
    """A wrapper that counts its steps in the state does not make the kernels' plan look anew each time."""
    p = tools.parameters((16, 16))
    opt = Automagic8bit(p, lr=1e-3, backend="triton")
    opt.state["global_step"] = 1000
    tools.train(opt, p, range(2))
    plan = opt._fused._plan
    opt.state["global_step"] = 2000
    tools.train(opt, p, range(2, 3))
    assert opt._fused._plan is plan
    opt.state[p[0]] = copy.deepcopy(opt.state[p[0]])  # the negative control: another state is another plan
    tools.train(opt, p, range(3, 4))
    assert opt._fused._plan is not plan


def named(tools: Any, names: list[str]) -> Any:
    """An optimizer over parameters of one shape, whose values follow from their names."""
    made = []
    for name in names:
        p = torch.nn.Parameter(torch.full((8, 8), float(len(name))))
        p.grad = torch.full((8, 8), float(sum(map(ord, name[-1]))))
        made.append((name, p))
    return Automagic8bit(made, lr=1e-3, optim_bits=32)


def states_by_name(opt: Any) -> dict[str, Any]:
    group = opt.param_groups[0]
    return {
        name: opt.state[p]["state2"][0, 0].item() for name, p in zip(group["param_names"], group["params"], strict=True)
    }


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_states_go_to_the_parameter_of_their_name(prefix: str, tools: Any) -> None:
    """Same-shaped parameters in another order, from a model that was wrapped or not."""
    opt, other = named(tools, ["a", "b", "c"]), named(tools, [prefix + "c", prefix + "a", prefix + "b"])
    opt.step()
    expected = states_by_name(opt)
    assert len(set(expected.values())) == 3
    other.load_state_dict(through_file(opt.state_dict()))
    assert states_by_name(other) == {prefix + name: value for name, value in expected.items()}


def test_states_of_other_names_are_refused(tools: Any) -> None:
    """The error says which; without names in the file the order counts, as ever."""
    opt, other = named(tools, ["a", "b"]), named(tools, ["a", "x"])
    opt.step()
    saved = opt.state_dict()
    with pytest.raises(ValueError, match=r"group 0 is of other parameters: only there are \['b'\], only here \['x'\]"):
        other.load_state_dict(saved)
    assert not other.state
    del saved["param_groups"][0]["param_names"]
    other.load_state_dict(saved)
    assert list(states_by_name(other).values()) == list(states_by_name(opt).values())
