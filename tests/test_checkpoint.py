"""Checkpoints: a resumed run repeats the uninterrupted one, and what is saved is plain."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from checkpoint_cases import STORAGES, build, parameters_of, resumed, through_file, train

from automagic_bnb import Automagic8bit
from automagic_bnb import state as st

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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
    for p, before in zip(parameters_of(opt), start["parameters"], strict=True):
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
    tools.train(opt, parameters_of(opt)[1:], range(3))
    again = resumed(tools, opt)
    assert [bool(again.state.get(p)) for p in parameters_of(again)] == [False, True, True, True]
    train(tools, opt, 3, 6)
    train(tools, again, 3, 6)
    assert not tools.differences(tools.snapshot(opt), tools.snapshot(again))


def test_probes_are_kept_as_they_were_chosen(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before fewer were watched of a large group, one of 32 blocks was: such a run goes on as it would have."""

    def run() -> Any:
        return Automagic8bit(tools.parameters((200, 64), (33, 7)), min_8bit_size=0)

    opt = run()
    train(tools, opt, 3)
    saved, weights = through_file(opt.state_dict()), [p.detach().clone() for p in parameters_of(opt)]
    train(tools, opt, 3, 6)
    monkeypatch.setattr(st, "MAX_PROBED", 100)
    again = run()
    assert {again.facts_of(p).probe_stride for p in parameters_of(again)} == {256}
    again.load_state_dict(saved)
    for p, weight in zip(parameters_of(again), weights, strict=True):
        p.data.copy_(weight)
    train(tools, again, 3, 6)
    assert not tools.differences(tools.snapshot(opt), tools.snapshot(again))
    for held in saved["state"].values():
        held["probe_block"] = held["probe_block"][:1]
    with pytest.raises(ValueError, match="probe_start and probe_block do not belong together"):
        again.load_state_dict(saved)
    for held in saved["state"].values():  # the other is made to fit, whatever the group's stride is
        held["probe_block"] = torch.zeros(len(held.pop("probe_start")), dtype=torch.int32)
    again.load_state_dict(saved)
    assert [[len(again.state[p][name]) for p in parameters_of(again)] for name in ("probe_start", "probe_block")] == [
        [2, 1]
    ] * 2


def test_parameters_may_have_another_dtype_by_now(tools: Any) -> None:
    """State is float32 and codes either way; what is kept in the parameter's dtype follows it."""
    opt = build(tools, torch.float32, lr=None)
    train(tools, opt, 3)
    again = build(tools, torch.bfloat16, lr=None)
    again.load_state_dict(through_file(opt.state_dict()))
    assert {again.state[p]["probe_start"].dtype for p in parameters_of(again)} == {torch.bfloat16}
    for old, new in zip(parameters_of(opt), parameters_of(again), strict=True):
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
    assert {k for s in saved["state"].values() for k in s} <= st.KEYS.keys() | {"step"}


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
    books = {id(again.state[p]["qmap1"]) for p in parameters_of(again)}
    assert len(books) == 1


def test_groups_are_new_dicts_as_in_torch(tools: Any) -> None:
    """A list kept from before stays as it was; schedulers go on to drive the optimizer, and foreign keys come along."""
    opt = build(tools)
    scheduler = torch.optim.lr_scheduler.LinearLR(opt, 0.5, 1.0, total_iters=4)
    lists = [id(g["params"]) for g in opt.param_groups]
    train(tools, opt, 1)
    scheduler.step()
    saved = through_file(opt.state_dict())
    kept = opt.param_groups
    kept[0]["lr"] = 0.125
    saved["param_groups"][1]["trainer_key"] = "kept"
    opt.load_state_dict(saved)
    assert kept[0]["lr"] == 0.125
    assert "trainer_key" not in kept[1]
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
