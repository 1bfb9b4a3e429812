"""What is changed between two steps, of parameters, groups and states: the kernels' plan follows."""

from __future__ import annotations

import copy
import operator
import pickle
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, ONE_STEP, Differences, synchronise
from plan_cases import BACKENDS, build, give, parameter

from automagic_bnb.optimizer import Automagic
from automagic_bnb.state import WatchedState, set_uncounted

pytest.importorskip("triton", reason="the kernels need Triton")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy: 1 / 0 in masked lanes


# --- parameters that change their shape -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ["step", "step_parameter"])
@pytest.mark.parametrize("shape", [(40, 24), (8, 16)], ids=["grown", "shrunk"])
def test_another_shape_is_an_error_that_touches_nothing(shape: tuple[int, int], way: str, backend: str) -> None:
    """Its state does not fit; with the state deleted, as the error says, it starts anew."""
    p, other = parameter(16, 16), parameter(4, 8, seed=1)
    opt = build([other, p], backend)
    give(other, p)
    opt.step()
    p.grad, whole = None, p.data
    p.data = torch.ones(shape, device=DEVICE) if shape[0] > 16 else whole[:8]
    give(other, p, step=1)
    before = [whole.clone(), other.detach().clone(), copy.deepcopy(dict(opt.state[p])), opt.state[other]["step"]]
    with pytest.raises(ValueError, match=r"now has shape .*, its optimizer state was made for \(16, 16\); delete it"):
        opt.step() if way == "step" else opt.step_parameter(p, opt.param_groups[0], 1)
    assert torch.equal(whole, before[0])
    assert torch.equal(other, before[1])
    assert (opt.state[p]["step"], opt.state[other]["step"]) == (1, before[3])
    del opt.state[p]
    opt.step()
    assert opt.state[p]["step"] == 1
    assert torch.equal(whole[8:], before[0][8:]), "written beyond the parameter's end"
    assert not torch.equal(whole[:8], before[0][:8]) or shape[0] > 16


def test_transposed_where_it_lies() -> None:
    """The same memory in another order, and so in its gradient: left to plain PyTorch, with its result."""
    results = []
    for backend in BACKENDS:
        p = parameter(16, 16)
        opt = build([p], backend)
        give(p)
        opt.step()
        p.grad, p.data = None, p.data.t()
        p.grad = torch.zeros_like(p).copy_(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))
        assert p.grad.stride() == (1, 16)
        opt.step()
        results.append(p.detach().clone())
    assert (results[0] - results[1]).abs().max() < 1e-6


# --- groups and parameters that are exchanged -------------------------------------------------------------------------


def another_tensor(opt: Automagic, p: list[Any]) -> None:
    p[0] = parameter(8, 16, seed=5)
    opt.param_groups[0]["params"][0] = p[0]


def another_group(opt: Automagic, p: list[Any]) -> None:
    opt.param_groups[0] = dict(opt.param_groups[0], lr=0.0, weight_decay=0.0)


def parameters_swapped(opt: Automagic, p: list[Any]) -> None:
    first, second = opt.param_groups
    first["params"], second["params"] = second["params"], first["params"]


def groups_built_anew(opt: Automagic, p: list[Any]) -> None:
    opt.param_groups.clear()
    opt.add_param_group({"params": p[::-1], "lr": 0.0, "weight_decay": 0.0})


def state_replaced(opt: Automagic, p: list[Any]) -> None:
    opt.state[p[0]] = dict(opt.state[p[0]])  # equal, and yet another one: its step is the one to count
    opt.state[p[1]]["lr_mask"] = torch.full_like(opt.state[p[1]]["lr_mask"], 90)


def one_group_has_other_numbers(opt: Automagic, p: list[Any]) -> None:
    opt.param_groups[1]["betas"] = (0.5, 0.6)  # with the third as it is by default


def all_groups_have_other_numbers(opt: Automagic, p: list[Any]) -> None:
    for group in opt.param_groups:
        group.update(
            betas=(0.5, 0.6, 0.7), clip_threshold=0.3, edge_penalty=0.9, frequency_penalty=0.4, eps=(1e-6, 1e-5)
        )


def a_filter_switched_on(opt: Automagic, p: list[Any]) -> None:
    opt.param_groups[0]["frequency_penalty"] = 0.4


CHANGES: list[Callable[[Automagic, list[Any]], None]] = [
    another_tensor, another_group, parameters_swapped, groups_built_anew, state_replaced, one_group_has_other_numbers,
    all_groups_have_other_numbers, a_filter_switched_on,
]  # fmt: skip


def runs(change: Callable[[Automagic, list[Any]], None] | None, **options: Any) -> dict[str, Automagic]:
    """Two steps and the change between them, in both backends; before the second their states are made equal."""
    parameters = {backend: [parameter(8, 16), parameter(8, 16, seed=1)] for backend in BACKENDS}
    done = {}
    for backend, p in parameters.items():
        groups = [{"params": p[:1]}, {"params": p[1:], "lr": 3e-2}]
        done[backend] = build(groups, backend, edge_suppression=False, **options)
    for step in range(2):
        if step:
            synchronise(done["triton"], done["torch"])
        for opt, p in zip(done.values(), parameters.values(), strict=True):
            if step and change is not None:
                change(opt, p)
            give(*p, step=step)
            opt.step()
    return done


def violations(done: dict[str, Automagic]) -> list[str]:
    differences = Differences()
    differences.take(done["triton"], done["torch"])
    return differences.violations(ONE_STEP)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changes_between_two_steps_are_followed(change: Callable[[Automagic, list[Any]], None]) -> None:
    options = {"frequency_penalty": 0.0} if change is a_filter_switched_on else {}
    changed, unchanged = runs(change, **options), runs(None, **options)
    assert violations(changed) == []
    groups = [opt["torch"].param_groups for opt in (changed, unchanged)]
    weights = [{float(p.detach().sum()) for group in each for p in group["params"]} for each in groups]
    assert weights[0] != weights[1], "the change made no difference"


def test_step_parameter_takes_the_group_it_is_given() -> None:
    p = parameter(8, 16)
    opt = build([p], "triton")
    give(p)
    opt.step_parameter(p, opt.param_groups[0], 0)
    before = p.detach().clone()
    opt.step_parameter(p, dict(opt.param_groups[0], lr=0.0), 0)
    assert torch.equal(p, before)


def test_step_parameter_takes_the_state_it_finds() -> None:
    p = parameter(8, 16)
    opt = build([p], "triton")
    give(p)
    opt.step_parameter(p, opt.param_groups[0], 0)
    old = opt.state[p]
    opt.state[p] = dict(old)
    opt.step_parameter(p, opt.param_groups[0], 0)
    assert (old["step"], opt.state[p]["step"]) == (1, 2)


# --- states that tell whether they have been changed ------------------------------------------------------------------

CHANGING: dict[str, Callable[[WatchedState, Any], Any]] = {
    "__setitem__": lambda state, x: state.__setitem__("lr_mask", x),
    "update": lambda state, x: state.update(lr_mask=x),
    "__ior__": lambda state, x: operator.ior(state, {"lr_mask": x}),
    "__delitem__": lambda state, x: (operator.delitem(state, "lr_mask"), set_uncounted(state, "lr_mask", x)),
    "pop": lambda state, x: (state.pop("lr_mask"), set_uncounted(state, "lr_mask", x)),
    "setdefault": lambda state, x: (dict.pop(state, "lr_mask"), state.setdefault("lr_mask", x)),
    "popitem": lambda state, x: (set_uncounted(state, *state.popitem()), set_uncounted(state, "lr_mask", x)),
    "clear": lambda state, x: (held := {**state, "lr_mask": x}, state.clear(), dict.update(state, held)),
}
READING = {
    "__class_getitem__", "__contains__", "__getitem__", "__iter__", "__len__", "__or__", "__reversed__", "__ror__",
    "copy", "fromkeys", "get", "items", "keys", "values",
}  # fmt: skip


def test_no_way_to_change_a_state_is_forgotten() -> None:
    """Nor one that a later Python adds."""
    assert set(dir(dict)) - set(dir(object)) == READING | CHANGING.keys()


@pytest.mark.parametrize("change", CHANGING.values(), ids=CHANGING)
def test_a_state_changed_in_any_way_is_followed(
    change: Callable[[WatchedState, Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And while nobody changes any, nobody looks."""
    from automagic_bnb.kernels.tables import Bucket

    looks = []
    look = Bucket._holds_same_tensors
    monkeypatch.setattr(Bucket, "_holds_same_tensors", lambda bucket: looks.append(bucket) or look(bucket))
    p = parameter(8, 16)
    opt = build([p], "triton")
    for step in range(3):
        give(p, step=step)
        opt.step()
    assert looks == []
    mask = torch.full_like(opt.state[p]["lr_mask"], 90)
    change(opt.state[p], mask)
    opt.step()
    assert len(looks) == 1
    assert not torch.equal(mask, torch.full_like(mask, 90)), "the step went by the mask that was there before"
    opt.step()
    assert len(looks) == 1


def test_a_plain_dictionary_in_its_place_is_looked_at_each_time() -> None:
    p = parameter(8, 16)
    opt = build([p], "triton")
    give(p)
    opt.step()
    opt.state[p] = dict(opt.state[p])
    opt.step()
    mask = torch.full_like(opt.state[p]["lr_mask"], 90)
    opt.state[p]["lr_mask"] = mask
    opt.step()
    assert not torch.equal(mask, torch.full_like(mask, 90)), "the step went by the mask that was there before"


def test_steps_counted_elsewhere_are_not_counted_again() -> None:
    """By `step_parameter`, which has a plan of its own, between two steps."""
    p = parameter(8, 16)
    opt = build([p], "triton")
    give(p)
    opt.step()
    opt.step_parameter(p, opt.param_groups[0], 0)
    opt.step()
    assert opt.state[p]["step"] == 3


def test_states_are_watched_wherever_they_come_from() -> None:
    """And plain dictionaries in a checkpoint, which other programs read."""
    p = parameter(8, 16)
    opt = build([p], "triton")
    give(p)
    opt.step()
    saved = opt.state_dict()
    assert {type(x) for x in saved["state"].values()} == {dict}
    others = [copy.deepcopy(opt), build([parameter(8, 16)], "triton"), pickle.loads(pickle.dumps(opt))]
    others[1].load_state_dict(saved)
    opt.state = defaultdict(dict, {p: dict(opt.state[p])})  # as in a pickle of an earlier version
    others.append(pickle.loads(pickle.dumps(opt)))
    opt.state = copy.copy(others[-1].state)
    opt.requantize(optim_bits=32)
    for other in [opt, *others]:
        assert {type(x) for x in other.state.values()} == {WatchedState}
        assert other.state.default_factory is WatchedState
