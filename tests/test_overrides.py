"""Options of single parameters: they go with a copy, and with nothing else."""

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
from bitsandbytes.optim import GlobalOptimManager

from automagic_bnb import Automagic8bit, Automagic32bit, bnb
from automagic_bnb import state as st

Carry = Callable[[Any], Any]
CARRIES: dict[str, Carry] = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


def override(p: Any, **options: Any) -> None:
    GlobalOptimManager.get_instance().override_config(p, key_value_dict=options)


def by_manager(opt: Any, p: Any) -> None:
    override(p, optim_bits=32, lr=1e-2)


def by_requantize(opt: Any, p: Any) -> None:
    opt.requantize(p, optim_bits=32)


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
    assert [st.storage_held(other.state[x]) for x in q] == ["32bit", "8bit"]
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
    assert st.storage_held(opt.state[p[0]]) == "8bit"
    assert bnb.overrides_of(p[0]) == {}


def test_requantize_stands_over_the_manager(tools: Any) -> None:
    p = tools.parameters((64, 64))
    override(p[0], optim_bits=32, lr=1e-2)
    opt = Automagic8bit(p, lr=1e-3)
    opt.requantize(p[0], optim_bits=8)
    tools.train(opt, p, range(1))
    options = opt.effective_options(opt.param_groups[0], p[0])
    assert (options["optim_bits"], options["lr"], st.storage_held(opt.state[p[0]])) == (8, 1e-2, "8bit")


def test_an_override_ends_with_its_parameter(tools: Any) -> None:
    """bitsandbytes keeps it under the tensor's id, which the next tensor may get."""
    manager = GlobalOptimManager.get_instance()
    p = tools.parameters((64, 64))
    override(p[0], optim_bits=32)
    opt = Automagic8bit(p, lr=1e-3)
    tools.train(opt, p, range(1))
    key = id(p[0])
    assert key in manager.pid2config
    del opt, p
    gc.collect()
    assert key not in manager.pid2config


@pytest.mark.parametrize("carry", CARRIES.values(), ids=CARRIES)
def test_an_override_of_a_copy_ends_with_it(carry: Carry, tools: Any) -> None:
    """Also of one that was never stepped, and of a module's."""
    embedding = bitsandbytes.nn.StableEmbedding(100, 64)
    p = tools.parameters((64, 64))
    override(p[0], lr=5e-4)
    other = carry((p, embedding, Automagic8bit([*p, *embedding.parameters()], lr=1e-3)))
    originals = {id(p[0]), id(embedding.weight)}
    assert originals < set(GlobalOptimManager.get_instance().pid2config)
    assert len(GlobalOptimManager.get_instance().pid2config) == 4
    del other
    gc.collect()
    assert set(GlobalOptimManager.get_instance().pid2config) == originals


def test_an_override_that_gets_its_options_later_is_seen(tools: Any) -> None:
    p = tools.parameters((8, 16))
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
    assert [st.storage_held(opt.state[x]) for x in p] == ["8bit", "32bit"]
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
    assert [st.storage_held(opt.state[x]) for x in p] == ["32bit", "8bit"]


def test_a_late_override_of_the_storage_says_what_is_missing(tools: Any) -> None:
    """States that exist keep their storage until `requantize()`, without options, is called."""
    p = tools.parameters((64, 64), (64, 64))
    opt = Automagic8bit(p, lr=1e-3)
    tools.train(opt, p, range(1))
    override(p[0], optim_bits=32)
    with pytest.warns(UserWarning, match=r"is kept in 8bit, its options say 32bit now; call optimizer.requantize\(\)"):
        tools.train(opt, p, range(1, 2))
    opt.requantize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tools.train(opt, p, range(2, 3))
    assert [st.storage_held(opt.state[x]) for x in p] == ["32bit", "8bit"]
