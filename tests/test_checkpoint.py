"""Saving, loading, copying: everything comes back bit for bit, or a clear error leaves the optimizer as it was."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn

from automagic_bnb import Automagic8bit, Automagic32bit, config
from automagic_bnb import state as st
from automagic_bnb.moments import moments_of
from automagic_bnb.reference import Blocks

STORAGES = {"32bit": {"optim_bits": 32}, "8bit": {}, "factored": {"factored": True}}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = ((64, 64), (257,), (16, 256), (8, 4, 3, 3))
WARMUP = 8


def build(tools: Any, dtype: torch.dtype = torch.bfloat16, lr: float | None = 1e-3, **options: Any) -> Any:
    """An optimizer over four parameters, the third of them LoRA's; the mask adapts for the first 8 steps."""
    p = tools.parameters(*SHAPES, dtype=dtype)
    p[2]._is_lora_layer = True
    options = {"min_8bit_size": 0, "warmup_steps": WARMUP, "rank_penalty_strength": 0.05, **options}
    return Automagic8bit([{"params": p[:2]}, {"params": p[2:], "weight_decay": 0.1}], lr=lr, **options)


def parameters(opt: Any) -> list[Any]:
    return [p for group in opt.param_groups for p in group["params"]]


def train(tools: Any, opt: Any, *steps: int) -> None:
    tools.train(opt, parameters(opt), range(*steps))


def through_file(x: Any) -> Any:
    """What `torch.save` and a `weights_only` load make of it."""
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(tools: Any, opt: Any, saved: Any = None, **options: Any) -> Any:
    """A fresh optimizer over copies of the parameters, which has loaded the checkpoint of `opt`."""
    fresh = build(tools, dtype=parameters(opt)[0].dtype, **options)
    for new, old in zip(parameters(fresh), parameters(opt), strict=True):
        new.data.copy_(old.data)
    fresh.load_state_dict(through_file(opt.state_dict()) if saved is None else saved)
    return fresh


# --------------------------------------------------------------------------------------------------------- exact resume


@pytest.mark.parametrize(("lr", "percentile"), [(1e-3, 60), (None, 100)])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_resumed_run_repeats_the_uninterrupted_one(
    dtype: torch.dtype, storage: str, lr: float | None, percentile: int, tools: Any
) -> None:
    """Saved in the middle of warm-up, through a file: state, groups and 7 further steps are the same bits."""
    options = {"lr": lr, "percentile_clipping": percentile, **STORAGES[storage]}
    opt = build(tools, dtype, **options)
    train(tools, opt, 5)
    again = resumed(tools, opt, **options)
    assert not tools.differences(tools.snapshot(opt), tools.snapshot(again))
    train(tools, opt, 5, 12)
    train(tools, again, 5, 12)
    assert not tools.differences(tools.snapshot(opt), tools.snapshot(again))


@pytest.mark.parametrize("storage", STORAGES)
def test_the_comparison_can_fail(storage: str, tools: Any) -> None:
    """Negative controls: without the checkpoint, or with one step miscounted, the bits differ."""
    options = STORAGES[storage]
    opt = build(tools, **options)
    train(tools, opt, 5)
    saved = through_file(opt.state_dict())
    forgotten = resumed(tools, opt, {"state": {}, "param_groups": saved["param_groups"]}, **options)
    for state in saved["state"].values():
        state["step"] += 1
    miscounted = resumed(tools, opt, saved, **options)
    for each in (opt, forgotten, miscounted):
        train(tools, each, 5, 6)
    expected = tools.snapshot(opt)["parameters"]
    for wrong in (forgotten, miscounted):
        assert tools.differences(expected, tools.snapshot(wrong)["parameters"])


@pytest.mark.parametrize("storage", STORAGES)
def test_a_checkpoint_decides_the_storage(storage: str, tools: Any) -> None:
    """Loaded state stays in the storage it was saved in, whatever the new optimizer would have chosen."""
    opt = build(tools, **STORAGES[storage])
    train(tools, opt, 3)
    for other in STORAGES:
        again = resumed(tools, opt, **STORAGES[other])
        assert not tools.differences(tools.snapshot(opt)["state"], tools.snapshot(again)["state"])
        train(tools, again, 3, 5)


@pytest.mark.parametrize("lr", [1e-3, None])
def test_a_checkpoint_from_before_the_first_step_starts_over(lr: float | None, tools: Any) -> None:
    """Loaded in the middle of another run, nothing of that run is left: not even the rate it found."""
    opt = build(tools, lr=lr)
    saved, start = copy.deepcopy(opt.state_dict()), tools.snapshot(opt)
    train(tools, opt, 12)
    for p, before in zip(parameters(opt), start["parameters"], strict=True):
        p.data.copy_(before)
    opt.load_state_dict(saved)
    assert not tools.differences(start, tools.snapshot(opt))
    expected = build(tools, lr=lr)
    for each in (opt, expected):
        train(tools, each, 12)
    assert not tools.differences(tools.snapshot(expected), tools.snapshot(opt))


def test_parameters_without_state_stay_so(tools: Any) -> None:
    """One that never had a gradient has no state before and none after."""
    opt = build(tools)
    tools.train(opt, parameters(opt)[1:], range(3))
    again = resumed(tools, opt)
    assert [bool(again.state.get(p)) for p in parameters(again)] == [False, True, True, True]
    train(tools, opt, 3, 6)
    train(tools, again, 3, 6)
    assert not tools.differences(tools.snapshot(opt), tools.snapshot(again))


def test_probes_are_kept_as_they_were_chosen(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before fewer were watched of a large group, every 16th block was: such a run goes on as it would have."""

    def run() -> Any:
        return Automagic8bit(tools.parameters((100, 64), (33, 7)), min_8bit_size=0)

    opt = run()
    train(tools, opt, 3)
    saved, weights = through_file(opt.state_dict()), [p.detach().clone() for p in parameters(opt)]
    train(tools, opt, 3, 6)
    monkeypatch.setattr(st, "MAX_PROBED", 100)
    again = run()
    assert {again.facts_of(p).probe_stride for p in parameters(again)} == {128}
    again.load_state_dict(saved)
    for p, weight in zip(parameters(again), weights, strict=True):
        p.data.copy_(weight)
    train(tools, again, 3, 6)
    assert not tools.differences(tools.snapshot(opt), tools.snapshot(again))
    for held in saved["state"].values():
        held["probe_sum"] = held["probe_sum"][:1]
    with pytest.raises(ValueError, match="probe_start and probe_sum do not belong together"):
        again.load_state_dict(saved)
    for held in saved["state"].values():  # the other is made to fit, whatever the group's stride is
        held["probe_sum"] = held.pop("probe_start").float()
    again.load_state_dict(saved)
    assert [[len(again.state[p][name]) for p in parameters(again)] for name in ("probe_start", "probe_sum")] == [
        [2, 1]
    ] * 2


def test_parameters_may_have_another_dtype_by_now(tools: Any) -> None:
    """State is float32 and codes either way; what is kept in the parameter's dtype follows it."""
    opt = build(tools, torch.float32, lr=None)
    train(tools, opt, 3)
    again = build(tools, torch.bfloat16, lr=None)
    again.load_state_dict(through_file(opt.state_dict()))
    assert {again.state[p]["probe_start"].dtype for p in parameters(again)} == {torch.bfloat16}
    for old, new in zip(parameters(opt), parameters(again), strict=True):
        a, b = ({k: v for k, v in o.state[p].items() if k != "probe_start"} for o, p in ((opt, old), (again, new)))
        assert not tools.differences(a, b)
    train(tools, again, 3, 6)


# ------------------------------------------------------------------------------------------------------- what is saved


def leaves(x: Any) -> Any:
    if isinstance(x, dict):
        return itertools.chain.from_iterable(leaves(v) for v in [*x, *x.values()])
    if isinstance(x, (list, tuple)):
        return itertools.chain.from_iterable(map(leaves, x))
    return [x]


@pytest.mark.parametrize("lr", [1e-3, None])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_checkpoint_holds_plain_things_only(storage: str, lr: float | None, tools: Any) -> None:
    """Tensors that own their memory, numbers, strings; dicts, lists and tuples of them."""
    opt = build(tools, lr=lr, percentile_clipping=50, **STORAGES[storage])
    train(tools, opt, 2)
    saved = opt.state_dict()
    assert type(saved) is type(saved["state"]) is dict
    for state in saved["state"].values():
        assert type(state) is dict
        assert not any(isinstance(v, dict) for v in state.values())  # what torch.distributed.checkpoint can flatten
    for leaf in leaves(saved):
        assert type(leaf) in (torch.Tensor, int, float, bool, str, type(None)), leaf
        if isinstance(leaf, torch.Tensor):
            assert leaf.untyped_storage().nbytes() == leaf.nbytes
            assert not leaf.requires_grad
    assert {k for s in saved["state"].values() for k in s} <= st.TENSOR_KEYS | {"step"}


def test_a_checkpoint_does_not_alias_the_optimizer(tools: Any) -> None:
    """Its dicts may be edited, and what was loaded from it moves on alone; the code books are shared on purpose."""
    opt = build(tools, lr=None)
    train(tools, opt, 2)
    before = tools.snapshot(opt)
    edited = opt.state_dict()
    edited["state"][0].clear()
    edited["param_groups"][0].clear()
    assert not tools.differences(before, tools.snapshot(opt))

    saved = opt.state_dict()
    saved["param_groups"][0]["mine"] = ["a list"]
    again = build(tools, lr=None)
    again.load_state_dict(saved)
    train(tools, again, 2, 4)
    again.param_groups[0]["mine"].append("changed")
    assert saved["param_groups"][0]["mine"] == ["a list"]
    assert not tools.differences(before, tools.snapshot(opt))
    books = {id(again.state[p]["qmap1"]) for p in parameters(again)}
    assert len(books) == 1


def test_groups_stay_the_same_dicts(tools: Any) -> None:
    """Schedulers hold them: after a load they still drive the optimizer, and foreign keys come along."""
    opt = build(tools)
    scheduler = torch.optim.lr_scheduler.LinearLR(opt, 0.5, 1.0, total_iters=4)
    groups = [id(g) for g in opt.param_groups]
    lists = [id(g["params"]) for g in opt.param_groups]
    train(tools, opt, 1)
    scheduler.step()
    saved = through_file(opt.state_dict())
    saved["param_groups"][1]["trainer_key"] = "kept"
    opt.load_state_dict(saved)
    assert [id(g) for g in opt.param_groups] == groups
    assert [id(g["params"]) for g in opt.param_groups] == lists
    assert opt.param_groups[1]["trainer_key"] == "kept"
    assert opt.param_groups[0]["lr"] == pytest.approx(0.625e-3)
    scheduler.step()
    assert opt.param_groups[0]["lr"] == pytest.approx(0.75e-3)


def test_hyperparameters_come_from_the_checkpoint(tools: Any) -> None:
    """As in torch: what the groups said when it was saved."""
    opt = build(tools, lr=2e-4, betas=(0.8, 0.9, 0.95), cautious=False)
    train(tools, opt, 2)
    again = resumed(tools, opt, lr=1e-3)
    assert [g["lr"] for g in again.param_groups] == [2e-4, 2e-4]
    assert [g["betas"] for g in again.param_groups] == [(0.8, 0.9, 0.95)] * 2
    assert [g["cautious"] for g in again.param_groups] == [False, False]
    assert [g["weight_decay"] for g in again.param_groups] == [5e-4, 0.1]


def test_names_do_not_decide_what_loads(tools: Any) -> None:
    """With named parameters on either side, in both directions, as torch documents."""
    named = Automagic8bit([("layer.weight", tools.parameters((64, 64))[0])], lr=1e-3)
    plain = Automagic8bit(tools.parameters((64, 64)), lr=1e-3)
    for opt in (named, plain):
        train(tools, opt, 2)
    from_named, from_plain = through_file(named.state_dict()), through_file(plain.state_dict())
    plain.load_state_dict(from_named)
    named.load_state_dict(from_plain)
    assert named.param_groups[0]["param_names"] == plain.param_groups[0]["param_names"] == ["layer.weight"]


# --------------------------------------------------------------------------------------------------- older checkpoints


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
    assert {"lr_mask", "torque", "tensor_stats", "gnorm_vec", "probe_sum", "step"} <= keys
    for lacking in (RESIDUAL, *({key} for key in sorted(keys))):
        older = copy.deepcopy(saved)
        older["state"] = {i: {k: v for k, v in s.items() if k not in lacking} for i, s in older["state"].items()}
        again = resumed(tools, opt, older, lr=None, percentile_clipping=50, **STORAGES[storage])
        # The mean of the factored residual is one of the tensor_stats.
        compared = keys - lacking - ({"tensor_stats"} if lacking is RESIDUAL else set())
        for old, new in zip(parameters(opt), parameters(again), strict=True):
            assert again.state[new].keys() == opt.state[old].keys()
            kept = [{k: v for k, v in o.state[p].items() if k in compared} for o, p in ((opt, old), (again, new))]
            assert not tools.differences(*kept), lacking
        train(tools, again, 3, 6)
        assert all(torch.isfinite(p).all() for p in parameters(again)), lacking


def test_an_older_checkpoint_may_lack_any_group_key(tools: Any) -> None:
    """The key keeps the value the optimizer was built with."""
    opt, saved = saved_with(tools, "8bit")
    for key in [k for k in saved["param_groups"][0] if k != "params"]:
        older = copy.deepcopy(saved)
        for group in older["param_groups"]:
            del group[key]
        again = resumed(tools, opt, older, lr=None, percentile_clipping=50)
        if key in config.GROUP_OPTIONS:
            assert again.param_groups[0][key] == opt.param_groups[0][key]
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
    before = parameters(opt)[0].detach().clone()
    train(tools, opt, step, step + 1)
    return (parameters(opt)[0] - before).square().mean().sqrt().item()


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
    opt = Automagic8bit(mine, lr=1e-4, weight_decay=0.01)
    groups = tools.snapshot(opt)["groups"]
    opt.load_state_dict(through_file(adam.state_dict()))
    for old, new in zip(theirs, mine, strict=True):
        taken = opt.state[new]
        assert taken["step"] == adam.state[old]["step"] == 5
        assert all(taken[name].any() for name in ("state1", "state2", "state3"))  # test_migration says of what size
    assert not tools.differences(groups, tools.snapshot(opt)["groups"])
    tools.train(opt, mine, range(5, 8))
    assert all(torch.isfinite(p).all() for p in mine)


# ---------------------------------------------------------------------------------------------------- wrong checkpoints

Edit = Callable[[dict[str, Any]], Any]


def put(key: str, value: Callable[[torch.Tensor], Any]) -> Edit:
    """Replace a tensor of the first parameter's state."""

    def edit(saved: dict[str, Any]) -> None:
        saved["state"][0][key] = value(saved["state"][0][key])

    return edit


def drop(key: str) -> Edit:
    return lambda saved: saved["state"][3].pop(key)


WRONG: dict[str, tuple[Edit, str]] = {
    "another shape": (put("state1", lambda x: x[:-1]), r"parameter 0: .*state1 has shape \(63, 64\).*needs \(64, 64\)"),
    "another shape, as many elements": (put("lr_mask", lambda x: x.view(32, 128)), "lr_mask has shape"),
    "another number of blocks": (put("absmax2", lambda x: x[:-1]), "absmax2 has shape"),
    "statistics of another version": (put("tensor_stats", lambda x: x[:2]), "tensor_stats has shape"),
    "moments in another dtype": (put("state1", lambda x: x.to(torch.bfloat16)), "state1 is torch.bfloat16"),
    "codes beside numbers": (put("state2", lambda x: x.float()), "state2 is torch.float32; expected torch.uint8"),
    "numbers beside codes": (put("state1", lambda x: x.float()), "expected torch.float32"),
    "scales in another dtype": (put("absmax1", lambda x: x.bfloat16()), "absmax1 is torch.bfloat16"),
    "scales missing": (drop("absmax3"), "state3 is in 8 bits but absmax3 is missing"),
    "no tensor": (put("torque", lambda x: x.tolist()), r"parameter 0: .*torque has shape none \(list\)"),
    "nothing": (put("torque", lambda x: None), "torque has shape none"),
    "no moments": (drop("state1"), "another optimizer"),
    "no second moment": (drop("state2"), "another optimizer"),
    "a stranger's key": (lambda saved: saved["state"][3].update(exp_avg=torch.zeros(3)), "a later version.*exp_avg"),
    "a negative step": (lambda saved: saved["state"][3].update(step=-5), "step is -5; expected a number >= 0"),
    "bounds the wrong way round": (
        lambda saved: saved["param_groups"][1].update(min_lr=5.0, max_lr=0.01),
        r"min_lr=5.0 in the checkpoint's group 1: must not exceed max_lr=0.01",
    ),
    "no groups": (lambda saved: saved.pop("param_groups"), "no optimizer's checkpoint: it holds .'state'."),
    "a shard of a parameter": (lambda saved: saved["state"][3].update(shard=1), "holds shard 1, here is None"),
    "a group too few": (lambda saved: saved["param_groups"].pop(), r"groups of \[2\] parameters, this optimizer of"),
    "a parameter too many": (lambda saved: saved["param_groups"][1]["params"].append(9), r"\[2, 3\] .* of \[2, 2\]"),
    "an illegal option": (lambda saved: saved["param_groups"][1].update(lr=-1), "lr=-1 in the checkpoint's group 1"),
    "a mistyped option": (lambda saved: saved["param_groups"][1].update(betas="x"), "betas='x' in the checkpoint's"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_checkpoint_that_does_not_fit_changes_nothing(case: str, tools: Any) -> None:
    """The message says what is wrong where; parameters, state and groups are the very bits of before."""
    edit, message = WRONG[case]
    opt = build(tools, lr=None, percentile_clipping=50)
    train(tools, opt, 3)
    saved = copy.deepcopy(opt.state_dict())
    train(tools, opt, 3, 5)
    edit(saved)
    before = tools.snapshot(opt)
    with pytest.raises((ValueError, TypeError), match=message):
        opt.load_state_dict(saved)
    assert not tools.differences(before, tools.snapshot(opt))
    train(tools, opt, 5, 7)


@pytest.mark.parametrize(
    "other",
    [
        lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=1e-3),
        lambda p: torch.optim.Adafactor(p, lr=1e-3),
        lambda p: bitsandbytes.optim.Lion8bit(p, lr=1e-3),
        lambda p: bitsandbytes.optim.AdEMAMix8bit(p, lr=1e-3),
    ],
)
def test_another_optimizers_checkpoint_is_refused(other: Any, tools: Any) -> None:
    """The message lists what it holds and what would load."""
    p = tools.parameters((64, 64))
    theirs = other(p)
    tools.train(theirs, p, range(2))
    opt = Automagic8bit(tools.parameters((64, 64)), lr=1e-3)
    before = tools.snapshot(opt)
    with pytest.raises(ValueError, match=r"parameter 0: (this is a checkpoint of another optimizer|the checkpoint's)"):
        opt.load_state_dict(theirs.state_dict())
    assert not tools.differences(before, tools.snapshot(opt))


# --------------------------------------------------------------------------------------------------------------- hooks


def test_load_hooks_run(tools: Any) -> None:
    """A pre-hook may edit or replace the checkpoint, a post-hook sees the result; the caller's dict stays as it was."""
    opt = build(tools)
    train(tools, opt, 2)
    saved = copy.deepcopy(opt.state_dict())
    seen = []

    def replace(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        assert optimizer is opt
        groups = [{**g, "lr": 5e-4} for g in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    def edit(optimizer: Any, state_dict: dict[str, Any]) -> None:
        assert state_dict["param_groups"][0]["lr"] == 5e-4
        state_dict["edited"] = True

    handles = [
        opt.register_load_state_dict_pre_hook(replace),
        opt.register_load_state_dict_pre_hook(edit),
        opt.register_load_state_dict_pre_hook(lambda _, state_dict: state_dict.update(also=True)),
        opt.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["lr"])),
    ]
    opt.load_state_dict(saved)
    assert seen == [5e-4]
    assert "edited" not in saved
    assert "also" not in saved
    for handle in handles:
        handle.remove()
    opt.load_state_dict(saved)
    assert (seen, opt.param_groups[0]["lr"]) == ([5e-4], 1e-3)


def test_save_hooks_run(tools: Any) -> None:
    """A pre-hook is called, a post-hook may replace what is returned."""
    opt = build(tools)
    train(tools, opt, 1)
    seen = []
    opt.register_state_dict_pre_hook(lambda o: seen.append(o))
    opt.register_state_dict_post_hook(lambda o, d: {**d, "version": 2})
    assert opt.state_dict()["version"] == 2
    assert seen == [opt]


# --------------------------------------------------------------------------------------------------------------- copies


def through_pickle(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))


@pytest.mark.parametrize(("steps", "lr"), [(0, 1e-3), (5, None)])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("carry", [copy.deepcopy, through_pickle])
def test_a_copy_goes_on_as_the_original(carry: Any, steps: int, storage: str, lr: float | None, tools: Any) -> None:
    """Also over the tenth step, where LoRA parameters are shrunk: deepcopy takes the mark off a parameter."""
    opt = build(tools, lr=lr, **STORAGES[storage])
    train(tools, opt, steps)
    twin = carry(opt)
    assert hasattr(parameters(twin)[2], "_is_lora_layer") == (carry is not copy.deepcopy)
    assert not tools.differences(tools.snapshot(opt), tools.snapshot(twin))
    assert all(a is not b for a, b in zip(parameters(opt), parameters(twin), strict=True))
    train(tools, opt, steps, 12)
    train(tools, twin, steps, 12)
    assert not tools.differences(tools.snapshot(opt), tools.snapshot(twin))


def test_the_mark_of_a_lora_parameter_matters(tools: Any) -> None:
    """The negative control: without the mark, the tenth step differs."""
    marked, plain = (Automagic8bit(tools.parameters((16, 256)), lr=1e-3, lora=mark) for mark in (True, False))
    for opt in (marked, plain):
        train(tools, opt, 12)
    assert tools.differences(tools.snapshot(marked)["parameters"], tools.snapshot(plain)["parameters"])


@pytest.mark.parametrize("carry", [copy.deepcopy, through_pickle])
def test_a_copy_is_a_whole_optimizer(carry: Any, tools: Any) -> None:
    """Everything else works on it: groups, hooks, overrides, schedules, checkpoints, zero_grad."""
    opt = build(tools, verbose=False)
    train(tools, opt, 2)
    twin = carry(opt)
    assert type(twin) is type(opt)
    assert twin.config == opt.config
    assert twin.defaults.items() >= opt.defaults.items()
    (new,) = tools.parameters((64, 64))
    twin.add_param_group({"params": [new], "lr": 0.05})  # above 1e-3, which nobody set
    bitsandbytes.optim.GlobalOptimManager.get_instance().override_config(new, "optim_bits", 32)
    seen = []
    twin.register_step_post_hook(lambda *_: seen.append(1))
    scheduler = torch.optim.lr_scheduler.ConstantLR(twin, 0.5)
    train(tools, twin, 2, 4)
    scheduler.step()
    assert seen == [1, 1]
    assert twin.state[new]["state1"].dtype == torch.float32
    assert twin.state[parameters(twin)[0]]["state1"].dtype == torch.uint8
    twin.load_state_dict(through_file(twin.state_dict()))
    twin.zero_grad()
    assert all(p.grad is None for p in parameters(twin))


def test_a_model_and_its_optimizer_are_copied_together(tools: Any) -> None:
    """In one deepcopy the copied optimizer drives the copied model."""
    model = nn.Linear(64, 64)
    opt = Automagic32bit(model.parameters(), lr=1e-2)
    twin, twin_opt = copy.deepcopy((model, opt))
    assert twin_opt.param_groups[0]["params"][0] is twin.weight
    before = model.weight.detach().clone()
    twin(torch.ones(64)).sum().backward()
    twin_opt.step()
    assert torch.equal(before, model.weight)
    assert not torch.equal(before, twin.weight)
