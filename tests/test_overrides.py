"""Options of single parameters: what they reach, and that they go with a copy and with nothing else."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
from optimizer_cases import ANOTHER_VALUE, BIG, bits, manager

from automagic_bnb import Automagic8bit, Automagic32bit, bnb
from automagic_bnb import state as st

Carry = Callable[[Any], Any]
CARRIES: dict[str, Carry] = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


def override(p: Any, **options: Any) -> None:
    manager().override_config(p, key_value_dict=options)


def by_manager(opt: Any, p: Any) -> None:
    override(p, optim_bits=32, lr=1e-2)


def by_requantize(opt: Any, p: Any) -> None:
    opt.requantize(p, optim_bits=32)


# --- what an override reaches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["key and value", "dict", "list of parameters"])
@pytest.mark.parametrize("when", ["before construction", "after construction"])
def test_an_override_of_optim_bits_reaches_its_parameter_only(when: str, spelling: str, tools: Any) -> None:
    """GlobalOptimManager gives one parameter 32-bit state; its neighbours keep 8 bits."""
    p = tools.parameters(BIG, BIG, BIG)
    opt = None if when.startswith("before") else Automagic8bit(p, lr=1e-3)
    if spelling == "key and value":
        manager().override_config(p[1], "optim_bits", 32)
    else:
        manager().override_config(p[1] if spelling == "dict" else [p[1]], key_value_dict={"optim_bits": 32})
    opt = opt or Automagic8bit(p, lr=1e-3)
    tools.train(opt, p, range(3))
    assert [bits(opt, x) for x in p] == [8, 32, 8]


def steps_on_cpu() -> bool:
    """bitsandbytes' own 8-bit optimizers do from 0.50 on."""
    return tuple(int(x) for x in bitsandbytes.__version__.split(".")[:2]) >= (0, 50)


def test_an_override_reaches_no_other_optimizer(tools: Any) -> None:
    """Not ours, nor bitsandbytes' own with a parameter at the same place, and theirs does not reach ours."""
    mine, other, theirs = (tools.parameters(BIG, BIG) for _ in range(3))
    manager().override_config(mine[0], "optim_bits", 32)
    opt = Automagic8bit(mine, lr=1e-3)
    tools.train(opt, mine, range(2))
    second = Automagic8bit(other, lr=1e-3)
    if not steps_on_cpu():
        pytest.skip("this bitsandbytes does not step on a CPU")
    adam = bitsandbytes.optim.AdamW8bit(theirs, lr=1e-3)
    for each, parameters in ((second, other), (adam, theirs)):
        tools.train(each, parameters, range(2))
    assert [bits(opt, x) for x in mine] == [32, 8]
    assert [bits(second, x) for x in other] == [8, 8]
    assert [bits(adam, x) for x in theirs] == [8, 8]

    manager().register_parameters(theirs)  # bitsandbytes keys what it registers by place, for every optimizer
    manager().override_config(theirs[0], "optim_bits", 32)
    manager().register_parameters(theirs)
    assert (0, 0) in manager().index2config
    third = Automagic8bit(parameters := tools.parameters(BIG, BIG), lr=1e-3)
    tools.train(third, parameters, range(2))
    assert [bits(third, x) for x in parameters] == [8, 8]


@pytest.mark.parametrize("name", [n for n in ANOTHER_VALUE if n not in ("lr", "auto_lr", "block_wise", "stable_emb")])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_override_equals_a_group_of_its_own(name: str, when: str, tools: Any) -> None:
    """Any option, set for one parameter, acts as it would in a group that holds that parameter alone."""
    shapes, value = ((3, 300), BIG), ANOTHER_VALUE[name]
    options = {"lr": 1e-3, "warmup_steps": 5, "rank_penalty_strength": 0.3}
    low_rank = name.startswith("lora") or name in ("rank_penalty_strength", "low_rank_emphasis")
    if low_rank and name != "lora":
        options["lora"] = True
    overridden, grouped, plain = (tools.parameters(*shapes, dtype=torch.bfloat16) for _ in range(3))
    opt = Automagic8bit(overridden, **options) if when == "after" else None
    manager().override_config(overridden[1], name, value if name != "betas" else list(value))
    opt = opt or Automagic8bit(overridden, **options)
    reference = Automagic8bit([{"params": grouped[:1]}, {"params": grouped[1:], name: value}], **options)
    without = Automagic8bit(plain, **options)
    for each, parameters in ((opt, overridden), (reference, grouped), (without, plain)):
        tools.train(each, parameters, range(11 if low_rank else 5))  # the rank penalty comes at the tenth step
    results = [{k: v for k, v in tools.snapshot(o).items() if k != "groups"} for o in (opt, reference, without)]
    assert not tools.differences(results[0], results[1])
    idle = (
        "min_8bit_size",
        "force_8bit",
        "min_lr",
        "max_lr",
        "auto_lr_steps",
        "background_regularization",
        "capturable",
    )
    if name not in idle:
        assert tools.differences(results[0]["parameters"][1], results[2]["parameters"][1])  # the option does something
    if name == "min_8bit_size":
        assert tools.differences(results[0]["state"][1], results[2]["state"][1])


@pytest.mark.parametrize(
    ("rate", "bounds"), [(3e-4, {}), (0.05, {}), (3e-4, {"min_lr": 2.9e-4, "max_lr": 3.1e-4}), (0.0, {})]
)
def test_an_override_of_the_rate_is_that_rate(rate: float, bounds: dict[str, float], tools: Any) -> None:
    """Even far above the group's: the bounds follow it, or hold around it, as for the constructor's rate."""
    a, b = tools.parameters(BIG), tools.parameters(BIG)
    manager().override_config(a[0], "lr", rate)
    opt, expected = Automagic8bit(a, lr=1e-5, **bounds), Automagic8bit(b, lr=rate, **bounds)
    for each, parameters in ((opt, a), (expected, b)):
        tools.train(each, parameters, range(8))
    assert not tools.differences(tools.snapshot(opt)["parameters"], tools.snapshot(expected)["parameters"])


def test_an_override_of_the_rate_respects_a_max_lr_that_was_set(tools: Any) -> None:
    """Above it, it is the error that the constructor would raise."""
    a, b = tools.parameters(BIG, BIG)
    opt = Automagic8bit([a, b], lr=1e-5, max_lr=1e-3)
    manager().override_config(b, "lr", 0.05)
    tools.give_gradients([a, b], 0)
    with pytest.raises(ValueError, match=r"lr=0.05 in a GlobalOptimManager override: lies above max_lr"):
        opt.step()


def test_an_override_may_switch_the_search_for_a_rate_on(tools: Any) -> None:
    """One parameter looks for its rate while its group keeps one."""
    a, b = tools.parameters(BIG, BIG)
    manager().override_config(b, "auto_lr", True)
    opt = Automagic8bit([a, b], lr=1e-5)
    tools.train(opt, [a, b], range(5))
    assert "probe_block" in opt.state[b]
    assert "probe_block" not in opt.state[a]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("weight_decay", -1, "weight_decay=-1 in a GlobalOptimManager override"),
        ("torque", torch.tensor([1.0, 2.0]), r"torque=tensor\(\[1., 2.\]\) in a GlobalOptimManager override"),
        ("weight_decays", 1, "did you mean 'weight_decay'"),
        ("is_paged", True, "whole optimizer"),
    ],
)
def test_a_wrong_override_is_refused(key: str, value: Any, message: str, tools: Any) -> None:
    """At the step that would use it, since bitsandbytes' manager takes anything."""
    p = tools.parameters(BIG)
    opt = Automagic8bit(p, lr=1e-3)
    manager().override_config(p[0], key, value)
    tools.give_gradients(p, 0)
    before = p[0].detach().clone()
    with pytest.raises((TypeError, ValueError), match=message):
        opt.step()
    assert torch.equal(before, p[0])


def test_overrides_meant_for_bitsandbytes_own_optimizers_are_passed_over(tools: Any) -> None:
    """Keys that only those read do not stop ours."""
    p = tools.parameters(BIG)
    manager().override_config(p[0], key_value_dict={"max_unorm": 1.0, "skip_zeros": True, "alpha": 5, "optim_bits": 32})
    opt = Automagic8bit(p, lr=1e-3)
    tools.train(opt, p, range(2))
    assert bits(opt, p[0]) == 32
    assert opt.get_config(0, 0, opt.param_groups[0])["optim_bits"] == 32


# --- copies, and the end of parameters --------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 3], ids=["before the first step", "after some"])
@pytest.mark.parametrize("how", [by_manager, by_requantize], ids=lambda f: f.__name__)
@pytest.mark.parametrize("carry", CARRIES.values(), ids=CARRIES)
def test_a_copy_has_the_overrides_too(carry: Carry, how: Callable[[Any, Any], None], steps: int, tools: Any) -> None:
    p = tools.parameters((64, 64), (64, 64))
    opt = Automagic8bit(p, lr=1e-3)
    how(opt, p[0])
    tools.train(opt, p, range(steps))
    q, other = carry((p, opt))
    for parameters, x in ((p, opt), (q, other)):
        tools.train(x, parameters, range(steps, steps + 2))
    assert [st.storage_held(other.state[x]) for x in q] == ["32bit", "factored"]
    assert not tools.differences(tools.snapshot(opt), tools.snapshot(other))


def test_a_copied_embedding_stays_stable(tools: Any) -> None:
    """bitsandbytes' StableEmbedding asks for 32 bits by its module, of which a copy knows nothing."""
    embedding = bitsandbytes.nn.StableEmbedding(100, 64)
    module, opt = copy.deepcopy((embedding, Automagic8bit(embedding.parameters(), lr=1e-3)))
    tools.train(opt, list(module.parameters()), range(1))
    assert opt.state[module.weight]["state1"].dtype == torch.float32


def test_an_override_of_a_copy_is_its_own(tools: Any) -> None:
    """Of several parameters that were overridden at once, too."""
    p = tools.parameters((64, 64), (64, 64))
    override(p, lr=1e-2)
    q, _ = copy.deepcopy((p, Automagic8bit(p, lr=1e-3)))
    override(q[0], lr=5e-2)
    assert [bnb.overrides_of(x)["lr"] for x in (*p, *q)] == [1e-2, 1e-2, 5e-2, 1e-2]


def test_what_requantize_was_told_ends_with_the_optimizer(tools: Any) -> None:
    p = tools.parameters((64, 64))
    Automagic8bit(p, lr=1e-3).requantize(p[0], optim_bits=32)
    opt = Automagic8bit(p, lr=1e-3)
    tools.train(opt, p, range(1))
    assert st.storage_held(opt.state[p[0]]) == "factored"
    assert bnb.overrides_of(p[0]) == {}


def test_requantize_stands_over_the_manager(tools: Any) -> None:
    p = tools.parameters((64, 64))
    override(p[0], optim_bits=32, lr=1e-2)
    opt = Automagic8bit(p, lr=1e-3)
    opt.requantize(p[0], optim_bits=8)
    tools.train(opt, p, range(1))
    options = opt.effective_options(opt.param_groups[0], p[0])
    assert (options["optim_bits"], options["lr"], st.storage_held(opt.state[p[0]])) == (8, 1e-2, "factored")


def test_an_override_ends_with_its_parameter(tools: Any) -> None:
    """bitsandbytes keeps it under the tensor's id, which the next tensor may get."""
    p = tools.parameters((64, 64))
    override(p[0], optim_bits=32)
    opt = Automagic8bit(p, lr=1e-3)
    tools.train(opt, p, range(1))
    key = id(p[0])
    assert key in manager().pid2config
    del opt, p
    gc.collect()
    assert key not in manager().pid2config


@pytest.mark.parametrize("carry", CARRIES.values(), ids=CARRIES)
def test_an_override_of_a_copy_ends_with_it(carry: Carry, tools: Any) -> None:
    """Also of one that was never stepped, and of a module's."""
    embedding = bitsandbytes.nn.StableEmbedding(100, 64)
    p = tools.parameters((64, 64))
    override(p[0], lr=5e-4)
    other = carry((p, embedding, Automagic8bit([*p, *embedding.parameters()], lr=1e-3)))
    originals = {id(p[0]), id(embedding.weight)}
    assert originals < set(manager().pid2config)
    assert len(manager().pid2config) == 4
    del other
    gc.collect()
    assert set(manager().pid2config) == originals


def test_no_weight_takes_the_override_of_a_dead_one() -> None:
    """Of a tensor that was overridden and died before any optimizer had seen it, though its id is used again."""
    dead = set()
    for _ in range(20):
        p = torch.nn.Parameter(torch.zeros(BIG))
        override(p, optim_bits=32)
        dead.add(id(p))
        del p
    later = [torch.nn.Parameter(torch.zeros(BIG)) for _ in range(100)]
    reused = sum(id(p) in dead for p in later)
    opt = Automagic8bit(later, lr=1e-3)
    for p in later:
        p.grad = torch.ones(BIG)
    opt.step()
    assert reused, "no id was used again"
    assert {bits(opt, p) for p in later} == {8}


def test_an_override_of_several_is_each_ones_own(tools: Any) -> None:
    """bitsandbytes keeps one dict for all that are given at once, a generator too: what is said of one later is its."""
    p = tools.parameters(BIG, BIG, BIG)
    manager().override_config((x for x in p[:2]), "weight_decay", 0.5)
    manager().override_config(p[0], "optim_bits", 32)
    opt = Automagic8bit(p, lr=1e-3)
    tools.train(opt, p, range(1))
    group = opt.param_groups[0]
    assert [bits(opt, x) for x in p] == [32, 8, 8]
    assert [opt.effective_options(group, x)["weight_decay"] for x in p] == [0.5, 0.5, 5e-4]


@pytest.mark.kernels
def test_an_override_that_gets_its_options_later_is_seen(tools: Any) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"  # where the kernels are not interpreted they need a GPU
    p = [torch.nn.Parameter(x.detach().to(device)) for x in tools.parameters((8, 16))]
    options: dict[str, Any] = {}
    override(p[0], **options)
    opt = Automagic8bit(p, lr=1e-3, backend="triton", min_8bit_size=0, weight_decay=0.0)
    tools.train(opt, p, range(1))
    before = p[0].detach().clone()
    override(p[0], lr=0.0)
    tools.train(opt, p, range(1, 2))
    assert torch.equal(before, p[0])


def test_a_pickle_without_overrides_loads(tools: Any) -> None:
    """As written before they were carried along."""
    p = tools.parameters((64, 64))
    opt = Automagic8bit(p, lr=1e-3)
    tools.train(opt, p, range(1))
    state = opt.__getstate__()
    del state["overrides"]
    other = Automagic8bit.__new__(Automagic8bit)
    other.__setstate__(state)
    tools.train(other, p, range(1, 2))


def test_a_parameter_whose_state_was_deleted_is_copied(tools: Any) -> None:
    p = tools.parameters((64, 64), (64, 64))
    opt = Automagic8bit(p, lr=1e-3)
    tools.train(opt, p, range(1))
    opt.state[p[0]].clear()
    q, other = copy.deepcopy((p, opt))
    tools.train(other, q, range(1, 2))
    assert [other.state[x]["step"] for x in q] == [1, 2]


def test_another_optimizers_override_stays(tools: Any) -> None:
    """The optimizer goes, the parameter stays: so does what was said of it."""
    p = tools.parameters((64, 64))
    override(p[0], optim_bits=32)
    opt = Automagic8bit(p, lr=1e-3)
    tools.train(opt, p, range(1))
    del opt
    gc.collect()
    assert bnb.overrides_of(p[0]) == {"optim_bits": 32}


# --- 8 bits by force --------------------------------------------------------------------------------------------------


def test_8_bits_cannot_be_forced_beside_32(tools: Any) -> None:
    """In a group and in an override as in the constructor; an exception from it is legal."""
    p = tools.parameters((16, 16), (16, 16))
    with pytest.raises(ValueError, match=r"force_8bit=True in parameter group 0: contradicts optim_bits=32"):
        Automagic32bit([{"params": p, "force_8bit": True}], lr=1e-3)
    opt = Automagic8bit([{"params": p[:1]}, {"params": p[1:], "optim_bits": 32}], lr=1e-3, force_8bit=True)
    tools.train(opt, p, range(1))
    assert [st.storage_held(opt.state[x]) for x in p] == ["factored", "32bit"]
    override(p[1], force_8bit=True)
    with pytest.raises(ValueError, match=r"force_8bit=True in a GlobalOptimManager override: contradicts"):
        opt.step()
    with pytest.raises(ValueError, match=r"force_8bit=True of requantize: contradicts optim_bits=32"):
        Automagic32bit(p, lr=1e-3).requantize(force_8bit=True)


def test_an_override_of_32_bits_beats_force(tools: Any) -> None:
    p = tools.parameters((16, 16), (16, 16))
    override(p[0], optim_bits=32)
    opt = Automagic8bit(p, lr=1e-3, force_8bit=True)
    tools.train(opt, p, range(1))
    assert [st.storage_held(opt.state[x]) for x in p] == ["32bit", "factored"]


def test_a_late_override_of_the_storage_says_what_is_missing(tools: Any) -> None:
    """States that exist keep their storage until `requantize()`, without options, is called."""
    p = tools.parameters((64, 64), (64, 64))
    opt = Automagic8bit(p, lr=1e-3)
    tools.train(opt, p, range(1))
    override(p[0], optim_bits=32)
    with pytest.warns(
        UserWarning, match=r"is kept in factored, its options say 32bit now; call optimizer.requantize\(\)"
    ):
        tools.train(opt, p, range(1, 2))
    opt.requantize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tools.train(opt, p, range(2, 3))
    assert [st.storage_held(opt.state[x]) for x in p] == ["32bit", "factored"]
