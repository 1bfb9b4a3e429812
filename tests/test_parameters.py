"""What may stand among the parameters: frozen weights of any kind, LoRA matrices without names, several optimizers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from automagic_bnb import Automagic, Automagic8bit

A, B = (8, 64), (96, 8)
"""A LoRA of rank 8 for a layer of 64 inputs and 96 outputs."""
SAYS_OFF = "LoRA parts of the rule are off"


def test_frozen_weights_of_other_dtypes_are_skipped(tools: Any) -> None:
    """As QLoRA's uint8 in the list of a whole model: nothing is kept for them, the others move."""
    (p,) = tools.parameters((64, 64))
    codes = nn.Parameter(torch.zeros(64, 1, dtype=torch.uint8), requires_grad=False)
    wide = nn.Parameter(torch.zeros(3, dtype=torch.float64), requires_grad=False)
    opt = Automagic8bit([codes, p, wide], lr=1e-3)
    before = p.detach().clone()
    tools.train(opt, [p], range(2))
    assert set(opt.state) == {p}
    assert (p != before).all()
    opt.add_param_group({"params": [nn.Parameter(codes.detach().clone(), requires_grad=False)]})
    opt.load_state_dict(opt.state_dict())
    opt.get_memory_efficiency_report()
    opt.get_metrics()


def test_a_model_made_double_after_construction_is_a_clear_error(tools: Any) -> None:
    """It says which dtypes are stepped, and nothing has moved."""
    model = nn.Linear(64, 64)
    opt = Automagic8bit(model.parameters(), lr=1e-3)
    tools.train(opt, list(model.parameters()), range(1))
    model.double()
    before = model.weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match=r"\(64, 64\) has dtype torch.float64.*float32, bfloat16 and float16"):
        opt.step()
    assert torch.equal(model.weight, before)


def lora(named: bool = False) -> list[Any]:
    made = [nn.Parameter(torch.zeros(shape)) for shape in (A, B, A, B)]
    return [(f"layer{i // 2}.{'lora_A' if i % 2 == 0 else 'lora_B'}", p) for i, p in enumerate(made)] if named else made


def test_lora_without_names_is_said_once() -> None:
    """With how to switch it on."""
    with pytest.warns(UserWarning, match=rf"{SAYS_OFF}.*lora=True.*named_parameters") as said:
        assert [Automagic8bit(lora(), lr=1e-3), Automagic8bit(lora(), lr=1e-3)]
    assert len([w for w in said if SAYS_OFF in str(w.message)]) == 1


@pytest.mark.parametrize(
    ("parameters", "options"),
    [
        (lora(named=True), {}),
        (lora(), {"lora": True}),
        (lora(), {"lora": False}),
        ([{"params": lora(), "lora": False}], {}),
        ([nn.Parameter(torch.zeros(64, 64)), nn.Parameter(torch.zeros(64, 64))], {}),
        (list(nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64)).parameters()), {}),
        ([nn.Parameter(torch.zeros(64))], {}),
    ],
)
def test_nothing_is_said_of_lora_where_it_is_known_or_is_none(parameters: Any, options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Automagic8bit(parameters, lr=1e-3, **options)


def test_names_are_read_from_the_parameters_and_may_come_later() -> None:
    """`original_name` is what diffusion-pipe leaves; `name_parameters` takes a model's names before the first step."""
    first, second = lora()[:2], lora()[:2]
    for p, name in zip(first, ("x.lora_A.weight", "x.lora_B.weight"), strict=True):
        p.original_name = name
    opt = Automagic8bit(first, lr=1e-3)
    assert [opt.facts_of(p).is_lora for p in first] == [True, True]
    later = Automagic8bit(second, lr=1e-3)
    later.name_parameters([("x.lora_A.weight", second[0]), ("elsewhere", first[1]), ("x.lora_B.weight", second[1])])
    assert [later.facts_of(p) for p in second] == [opt.facts_of(p) for p in first]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_for_each_parameter_steps_as_one_for_all(dtype: torch.dtype, tools: Any) -> None:
    """8-bit states and weights bit for bit, where the parameters have names; random bits are no parameter's twice."""
    shapes, names = ((64, 64), (64, 64), (128, 64)), ("a", "b", "c")
    together, apart = (tools.parameters(*shapes, dtype=dtype) for _ in range(2))
    one = Automagic8bit(zip(names, together, strict=True), lr=1e-3)
    many = [Automagic8bit([(name, p)], lr=1e-3) for name, p in zip(names, apart, strict=True)]
    for t in range(3):
        tools.give_gradients(together, t)
        one.step()
        for p, q, opt in zip(together, apart, many, strict=True):
            q.grad = p.grad.clone()
            opt.step()
    for p, q, opt in zip(together, apart, many, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(one.state[p]["state1"], opt.state[q]["state1"])
    keys = {one.facts_of(p).random_key(one.param_groups[0]) for p in together}
    assert len(keys) == 3


def test_a_parameter_stepped_with_another_group_has_its_own_options(tools: Any) -> None:
    """A hook that passes the last group for every parameter; a copy of its own group is heeded."""
    a, b = tools.parameters((64, 64), (64, 64))
    c, d = tools.parameters((64, 64), (64, 64))
    groups = [[{"params": [x], "lr": 1e-2}, {"params": [y], "lr": 1e-4}] for x, y in ((a, b), (c, d))]
    wrong, right = Automagic(groups[0]), Automagic(groups[1])
    tools.give_gradients([a, b], 0)
    c.grad, d.grad = a.grad.clone(), b.grad.clone()
    for p in (a, b):
        wrong.step_parameter(p, wrong.param_groups[-1])
    right.step()
    assert torch.equal(a, c)
    assert torch.equal(b, d)
    with pytest.raises(KeyError, match="no parameter of this optimizer"):
        wrong.step_parameter(c, wrong.param_groups[-1])
