"""Checkpoints of earlier versions, in bitsandbytes' form and of its Adam."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes
import pytest
import torch
from checkpoint_cases import STORAGES, build, parameters_of, resumed, through_file, train

from automagic_bnb import Automagic8bit, config
from automagic_bnb.stored import Blocks, moments_of


def saved_with(tools: Any, storage: str) -> tuple[Any, Any]:
    opt = build(tools, lr=None, percentile_clipping=50, **STORAGES[storage])
    train(tools, opt, 3)
    return opt, through_file(opt.state_dict())


ESSENTIAL = {"state1", "absmax1", "state2", "absmax2", "exp_avg_sq_row", "exp_avg_sq_col"}
"""Without these a state says nothing, or says what cannot be read."""
RESIDUAL = {"state3", "absmax3", "exp_avg_res_row", "exp_avg_res_col"}


@pytest.mark.parametrize("storage", STORAGES)
def test_an_older_checkpoint_may_lack_any_state_that_came_later(storage: str, tools: Any) -> None:
    """The missing tensor starts at its first value, everything else is kept, and the next steps are finite."""
    opt, saved = saved_with(tools, storage)
    keys = set().union(*saved["state"].values()) - ESSENTIAL - RESIDUAL
    assert {"lr_mask", "torque", "tensor_stats", "gnorm_vec", "probe_block", "step"} <= keys
    for lacking in (RESIDUAL, *({key} for key in sorted(keys))):
        older = copy.deepcopy(saved)
        older["state"] = {i: {k: v for k, v in s.items() if k not in lacking} for i, s in older["state"].items()}
        again = resumed(tools, opt, older, lr=None, percentile_clipping=50, **STORAGES[storage])
        # The mean of the factored residual is one of the tensor_stats.
        compared = keys - lacking - ({"tensor_stats"} if lacking is RESIDUAL else set())
        for old, new in zip(parameters_of(opt), parameters_of(again), strict=True):
            assert again.state[new].keys() == opt.state[old].keys()
            kept = [{k: v for k, v in o.state[p].items() if k in compared} for o, p in ((opt, old), (again, new))]
            assert not tools.differences(*kept), lacking
        train(tools, again, 3, 6)
        assert all(torch.isfinite(p).all() for p in parameters_of(again)), lacking


def test_an_older_checkpoint_may_lack_any_group_key(tools: Any) -> None:
    """The key keeps the value the optimizer was built with."""
    built = build(tools, lr=None, percentile_clipping=50).param_groups[0]
    opt, saved = saved_with(tools, "8bit")
    for key in [k for k in saved["param_groups"][0] if k != "params"]:
        older = copy.deepcopy(saved)
        for group in older["param_groups"]:
            del group[key]
        again = resumed(tools, opt, older, lr=None, percentile_clipping=50)
        if key in config.GROUP_OPTIONS:
            assert again.param_groups[0][key] == built[key]
        train(tools, again, 3, 5)


@pytest.mark.parametrize("how", ["an older checkpoint", "came switched on"])
@pytest.mark.parametrize("storage", STORAGES)
def test_confidence_that_starts_late_leaves_the_step_size_alone(storage: str, how: str, tools: Any) -> None:
    """Without a residual yet, the next updates are about as large as those before, not ten times as large."""
    (p,) = tools.parameters((64, 64))
    switched = how == "came switched on"
    options = {"lr": 1e-3, "warmup_steps": 0, "betas": (0.9, 0.99, 0.99), "came": not switched, **STORAGES[storage]}
    opt = Automagic8bit([p], **options)
    tools.train(opt, [p], range(60))
    usual = movement(tools, opt, 60)
    if switched:
        opt.param_groups[0]["came"] = True
    else:
        saved = opt.state_dict()
        for key in ("state3", "absmax3", "exp_avg_res_row", "exp_avg_res_col"):
            saved["state"][0].pop(key, None)
        opt.load_state_dict(saved)
    for step in range(61, 66):
        assert movement(tools, opt, step) < 1.7 * usual


def movement(tools: Any, opt: Any, step: int) -> float:
    """The root mean square by which the first parameter moves in a step."""
    before = parameters_of(opt)[0].detach().clone()
    train(tools, opt, step, step + 1)
    return (parameters_of(opt)[0] - before).square().mean().sqrt().item()


def test_the_nested_form_of_bitsandbytes_loads(tools: Any) -> None:
    """bitsandbytes keeps quantized tensors one level down, for FSDP; that is the same checkpoint."""
    opt = build(tools)
    train(tools, opt, 3)
    nested = through_file(opt.state_dict())
    for state in nested["state"].values():
        inner = {k: state.pop(k) for k in list(state) if k != "step"}
        state["__bnb_optimizer_quant_state__"] = inner
    again = resumed(tools, opt, nested)
    assert not tools.differences(tools.snapshot(opt), tools.snapshot(again))


def test_a_checkpoint_written_under_a_one_cycle_schedule_loads(tools: Any) -> None:
    """Which has put bounds of its own into the groups, here below the rate that the optimizer was built with."""
    opt = build(tools, lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=5e-4, total_steps=20, cycle_momentum=False)
    for step in range(3):
        train(tools, opt, step, step + 1)
        schedule.step()
    other = resumed(tools, opt)
    for x in (opt, other):
        train(tools, x, 3, 5)
    assert not tools.differences(tools.snapshot(opt), tools.snapshot(other))


def as_in_0_1_0(state_dict: Any) -> Any:
    """The checkpoint with `tensor_stats` as that version kept them: two more figures behind the first."""
    state_dict = through_file(state_dict)
    for state in state_dict["state"].values():
        stats = state["tensor_stats"]
        state["tensor_stats"] = torch.cat([stats[:1], torch.tensor([0.3, 0.7]), stats[1:]])
    return state_dict


@pytest.mark.parametrize("lr", [1e-3, None])
@pytest.mark.parametrize("storage", ["32bit", "8bit"])
def test_a_checkpoint_of_0_1_0_goes_on_bit_for_bit(storage: str, lr: float | None, tools: Any) -> None:
    opt = build(tools, lr=lr, **STORAGES[storage])
    train(tools, opt, 4)
    other = resumed(tools, opt, as_in_0_1_0(opt.state_dict()), lr=lr, **STORAGES[storage])
    for x in (opt, other):
        train(tools, x, 4, 8)
    assert not tools.differences(tools.snapshot(opt), tools.snapshot(other))


@pytest.mark.parametrize("shape", [(64, 64), (300, 16), (40, 256), (9, 512)])
def test_factored_moments_of_0_1_0_are_carried_over(shape: tuple[int, int], tools: Any) -> None:
    """Row and column means of the whole matrix become those of its tiles: of the same V, which has rank one."""
    p = tools.parameters(shape)[0]
    opt = Automagic8bit([p], lr=1e-3, factored=True, min_8bit_size=0)
    tools.train(opt, [p], range(3))
    saved = as_in_0_1_0(opt.state_dict())
    row, col = torch.rand(shape[0], dtype=torch.float64) + 0.1, torch.rand(shape[1], dtype=torch.float64) + 0.1
    col *= row.mean() / col.mean()
    for name in ("exp_avg_sq", "exp_avg_res"):
        saved["state"][0].update({f"{name}_row": row.float(), f"{name}_col": col.float()})
    opt.load_state_dict(saved)
    blocks = Blocks(p)
    moments = moments_of(opt.state[p], blocks, torch.ones(blocks.blocks, 256, dtype=torch.bool))
    v = torch.outer(row, col) / row.mean()
    for number in (2, 3):
        torch.testing.assert_close(blocks.join(moments.read(number)).view(shape).double(), v, rtol=1e-5, atol=0)
    tools.train(opt, [p], range(3, 5))
    saved["state"][0]["exp_avg_sq_col"] = col.float()[1:]
    with pytest.raises(ValueError, match=r"exp_avg_sq_(row|col) has shape"):
        opt.load_state_dict(saved)


@pytest.mark.parametrize("cls", [bitsandbytes.optim.AdamW8bit, bitsandbytes.optim.AdamW])
def test_a_bitsandbytes_adam_checkpoint_seeds_the_moments(cls: Any, tools: Any) -> None:
    """Its moments are taken over into the new storage, in our units; the options stay those of this optimizer."""
    theirs = tools.parameters((64, 64), (257,))
    adam = cls(theirs, lr=1e-2, weight_decay=0.5)
    tools.train(adam, theirs, range(5))
    mine = tools.parameters((64, 64), (257,))
    opt = Automagic8bit(mine, lr=1e-4, weight_decay=0.01, factored=False)
    groups = tools.snapshot(opt)["groups"]
    opt.load_state_dict(through_file(adam.state_dict()))
    for old, new in zip(theirs, mine, strict=True):
        taken = opt.state[new]
        assert taken["step"] == adam.state[old]["step"] == 5
        assert all(taken[name].any() for name in ("state1", "state2", "state3"))  # test_migration says of what size
    assert not tools.differences(groups, tools.snapshot(opt)["groups"])
    tools.train(opt, mine, range(5, 8))
    assert all(torch.isfinite(p).all() for p in mine)
