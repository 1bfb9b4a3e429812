"""What the kernels' plan rests on: whatever is changed between two steps, they do what plain PyTorch does."""

from __future__ import annotations

import copy
import gc
import operator
import pickle
import types
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes.optim import GlobalOptimManager
from kernel_cases import DEVICE, ONE_STEP, Differences, synchronise

from automagic_bnb import Automagic8bit, fused
from automagic_bnb.fused import FusedStep
from automagic_bnb.optimizer import Automagic
from automagic_bnb.state import WatchedState, set_uncounted

pytest.importorskip("triton", reason="the kernels need Triton")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy: 1 / 0 in masked lanes

BACKENDS = ("torch", "triton")


def parameter(*shape: int, seed: int = 0) -> Any:
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE))


def give(*parameters: Any, step: int = 0) -> None:
    for i, p in enumerate(parameters):
        generator = torch.Generator().manual_seed(100 * step + i)
        p.grad = (torch.randn(p.shape, generator=generator) * 0.01).to(p.device, p.dtype)


def build(parameters: Any, backend: str, **options: Any) -> Automagic:
    return Automagic8bit(parameters, **{"lr": 1e-2, "backend": backend, "min_8bit_size": 0, **options})


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


# --- what costs no new plan -------------------------------------------------------------------------------------------


def test_a_schedule_of_rates_and_betas_keeps_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """OneCycleLR moves betas too, at every step: as followed by plain PyTorch."""
    made = []
    real = FusedStep._make_plan
    monkeypatch.setattr(FusedStep, "_make_plan", lambda *args: made.append(1) or real(*args))
    done = {}
    for backend in BACKENDS:
        p = [parameter(8, 16), parameter(300, seed=1)]
        done[backend] = opt = build(p, backend)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.05, total_steps=10)
        for step in range(4):
            give(*p, step=step)
            opt.step()
            schedule.step()
    assert len(made) == 1
    for p, q in zip(*(opt.param_groups[0]["params"] for opt in done.values()), strict=True):
        assert (p - q).abs().max() < 1e-4


def test_parameters_left_to_plain_pytorch_cost_no_second_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their states come after the plan has been made."""
    made = []
    real = FusedStep._make_plan
    monkeypatch.setattr(FusedStep, "_make_plan", lambda *args: made.append(1) or real(*args))
    p = [parameter(8, 16), parameter(8, 16, seed=1), parameter(0, 4), parameter(300)]
    p[1].data = p[1].data.t()
    opt = build(p, "triton")
    for step in range(3):
        give(*p, step=step)
        opt.step()
    assert len(made) == 1
    assert {opt.state[x]["step"] for x in (p[0], p[1], p[3])} == {3}


def test_a_parameter_that_has_become_contiguous_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    p = parameter(8, 16)
    p.data = p.data.t()
    opt = build([p], "triton")
    give(p)
    opt.step()
    assert opt._fused._plan is not None
    assert opt._fused._plan.buckets == []
    p.grad, p.data = None, p.data.contiguous()
    give(p)
    opt.step()
    assert len(opt._fused._plan.buckets) == 1


def test_the_largest_bucket_is_launched_first() -> None:
    """The host prepares the others while the device works."""
    p = [parameter(8, 16), parameter(64, 128, seed=1).bfloat16().detach().requires_grad_()]
    opt = build(p, "triton")
    give(*p)
    opt.step()
    assert opt._fused._plan is not None
    assert [bucket.parameters[0] is p[1] for bucket in opt._fused._plan.buckets] == [True, False]


# --- what is kept alive -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["step", "step_parameter"])
def test_an_optimizer_that_is_dropped_frees_its_states_at_once(way: str) -> None:
    """Without waiting for Python's collector of cycles: out of memory is no time for that."""
    p = parameter(8, 16)
    opt = build([p], "triton")
    give(p)
    opt.step() if way == "step" else opt.step_parameter(p, opt.param_groups[0], 0)
    state = weakref.ref(opt.state[p]["state1"])
    gc.disable()
    try:
        del opt
        assert state() is None
    finally:
        gc.enable()


def test_a_model_that_is_moved_away_frees_its_memory() -> None:
    """Between two steps, as offloading does; the plan of the step before must not hold on to it."""
    p = parameter(8, 16)
    opt = build([p], "triton")
    give(p)
    opt.step()
    memory = weakref.ref(p.data.untyped_storage())
    kept = weakref.WeakSet([p.data])
    p.data = p.data.clone()
    p.grad = None
    gc.collect()
    assert memory() is None
    assert len(kept) == 0


def test_plans_of_parameters_that_are_gone_are_dropped() -> None:
    p = [parameter(4, 8, seed=i) for i in range(2)]
    opt = build(p, "triton")
    for round_ in range(3):
        for i in range(2):
            opt.param_groups[0]["params"][i] = q = parameter(4, 8, seed=10 * round_ + i)
            give(q)
            opt.step_parameter(q, opt.param_groups[0], i)
    assert len(opt._fused._plans_of_one) <= 2 + 2


# --- several devices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [None, 1e-3])
def test_a_found_rate_on_several_devices_is_left_to_plain_pytorch(lr: float | None) -> None:
    """Told once; a given rate needs nothing from another device."""
    p = [parameter(8, 16), parameter(8, 16, seed=1)]
    opt = build(p, "triton", lr=lr)
    give(*p)
    groups = opt.param_groups
    far: Any = types.SimpleNamespace(device=torch.device("meta"))
    shown = {**groups[0], "params": [p[0], far]}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        plan = opt._fused._make_plan([(shown, p[0])])
    assert [x for _, x in plan.rest] == ([p[0]] if lr is None else [])
    assert len([w for w in told if "lies on several devices" in str(w.message)]) == (lr is None)
    assert not plan._would_take(shown, p[0], "triton")


# --- errors before anything has moved ---------------------------------------------------------------------------------


def sparse_gradient(opt: Automagic, p: list[Any]) -> None:
    p[-1].grad = p[-1].grad.to_sparse()


def misspelt_override(opt: Automagic, p: list[Any]) -> None:
    GlobalOptimManager.get_instance().override_config(p[-1], "weight_decai", 0.1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("fault", [sparse_gradient, misspelt_override], ids=lambda f: f.__name__)
def test_a_step_that_fails_moves_nothing(
    fault: Callable[..., None], contiguous: bool, backend: str, tools: Any
) -> None:
    """Also where the fault is with a parameter that the kernels leave to plain PyTorch."""
    p = [parameter(8, 16), parameter(8, 16, seed=1)]
    if not contiguous:
        p[1].data = p[1].data.t()
    opt = build(p, backend)
    give(*p)
    opt.step()
    give(*p, step=1)
    fault(opt, p)
    before = tools.snapshot(opt)
    with pytest.raises((RuntimeError, TypeError), match=r"is sparse|weight_decai"):
        opt.step()
    assert not tools.differences(before, tools.snapshot(opt))


def test_a_launch_that_fails_is_no_step(monkeypatch: pytest.MonkeyPatch, tools: Any) -> None:
    """As where the device has no memory left for the launch's own needs."""
    from automagic_bnb.kernels import step

    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError

    p = [parameter(8, 16), parameter(300, seed=1)]
    opt = build(p, "triton")
    give(*p)
    opt.step()
    before = tools.snapshot(opt)
    with monkeypatch.context() as patched:
        patched.setattr(step.bnb, "code_book", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            opt.step()
    assert not tools.differences(before, tools.snapshot(opt))
    opt.step()
    assert opt.state[p[0]]["step"] == opt.state[p[1]]["step"] == 2


# --- without Triton ---------------------------------------------------------------------------------------------------


def test_a_gpu_without_triton_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parameters are left to plain PyTorch; who asked for the kernels gets an error."""
    monkeypatch.setattr(fused, "triton_missing", lambda: "Triton could not be imported (No module named 'triton')")
    p: Any = types.SimpleNamespace(device=torch.device("cuda"), is_contiguous=lambda: True, numel=lambda: 1)
    with pytest.warns(UserWarning, match="could not be imported .*; the optimizer runs in plain PyTorch") as told:
        assert [fused.takes(p, None) for _ in range(2)] == [False, False]
    assert len(told) == 1
    assert not fused.takes(p, "torch")
    with pytest.raises(RuntimeError, match="backend='triton': Triton could not be imported"):
        fused.takes(p, "triton")
    monkeypatch.setattr(fused, "triton_missing", lambda: "")
    assert fused.takes(p, None)


# --- paged states, with a stand-in for managed memory -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (1, ["fetch 0", "step small", "fetch 1", "step 0", "fetch 2", "step 1", "step 2"]),
        (2**26, ["fetch 0", "fetch 1", "fetch 2", "step small", "step 0 1 2"]),
    ],
    ids=["one at a time", "all of them small"],
)
def test_paged_states_are_fetched_one_part_ahead(
    part: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part is one large parameter, or many small ones."""
    from automagic_bnb.kernels import step, tables

    large = [parameter(16, 16, seed=i) for i in range(3)]
    opt = build([large[0], parameter(8, 8), *large[1:]], "triton")
    give(*opt.param_groups[0]["params"])
    monkeypatch.setattr(tables, "is_paged", lambda x: getattr(x, "dtype", None) == torch.uint8 and x.numel() == 256)
    monkeypatch.setattr(tables, "PAGED_PART", part)
    monkeypatch.setattr(tables, "FETCHED_BYTES", 0)
    waits: list[str] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: types.SimpleNamespace(wait_stream=waits.append))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the kernels' stream")
    events: list[str] = []

    def place(state: Any) -> str:
        return next((str(i) for i, p in enumerate(large) if opt.state[p] is state), "small")

    def prefetch(tensors: list[Any], stream: Any) -> None:
        owners = [place(s) for x in tensors for s in opt.state.values() if any(x is y for y in s.values())]
        events.extend(f"fetch {owner}" for owner in dict.fromkeys(owners))

    monkeypatch.setattr(fused.paged, "prefetch", prefetch)
    monkeypatch.setattr(step, "launch", lambda bucket, *_: events.append(f"step {' '.join(map(place, bucket.states))}"))
    opt.step()
    assert events == expected
    assert len(waits) == len([x for x in expected if x.startswith("fetch")]) or part > 1
