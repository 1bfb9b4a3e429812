"""What the kernels' plan costs, what it keeps alive, and where it leaves a step to plain PyTorch."""

from __future__ import annotations

import gc
import importlib.util
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes.optim import GlobalOptimManager
from plan_cases import BACKENDS, build, give, parameter

from automagic_bnb import backends, fused
from automagic_bnb.fused import FusedStep
from automagic_bnb.optimizer import Automagic
from automagic_bnb.state import KEYS, STORAGES, Key

pytest.importorskip("triton", reason="the kernels need Triton")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy: 1 / 0 in masked lanes


# --- tables -----------------------------------------------------------------------------------------------------------


def test_a_new_block_statistic_gets_its_column_and_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the table of state keys alone; beside the others, whose addresses the kernel loads together."""
    from automagic_bnb.kernels import tables

    monkeypatch.setitem(KEYS, "calm", Key("calm", "block", dict.fromkeys(STORAGES, (torch.float32, 0.0))))
    spec = importlib.util.spec_from_file_location("tables_anew", tables.__file__)
    assert spec is not None
    assert spec.loader is not None
    anew = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tables_anew", anew)
    spec.loader.exec_module(anew)
    columns, kept = [column.name for column in anew.Column], list(anew.BLOCK_STATISTICS)
    assert [name for name in columns if name != "CALM"] == [column.name for column in tables.Column]
    assert kept == [*tables.BLOCK_STATISTICS, "calm"]
    for module in (tables, anew):
        statistics = [int(module.Column[name.upper()]) for name in module.BLOCK_STATISTICS]
        assert statistics == list(range(statistics[0], statistics[0] + len(statistics)))


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


@pytest.mark.parametrize("factored", [False, True])
def test_the_largest_bucket_is_launched_first(factored: bool) -> None:
    """The host prepares the others while the device works."""
    p = [parameter(8, 16), parameter(64, 128, seed=1).bfloat16().detach().requires_grad_()]
    opt = build(p, "triton", factored=factored)
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


@pytest.mark.parametrize("alike", [1, 2], ids=["tensors by themselves", "tensors together"])
def test_a_launch_that_fails_is_no_step(alike: int, monkeypatch: pytest.MonkeyPatch, tools: Any) -> None:
    """As where the device has no memory left for the launch's own needs."""
    from automagic_bnb.kernels import row, step

    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError

    p = [parameter(8, 16), parameter(300, seed=1)] * alike
    p = [parameter(*x.shape, seed=i) for i, x in enumerate(p)]
    opt = build(p, "triton")
    give(*p)
    opt.step()
    before = tools.snapshot(opt)
    with monkeypatch.context() as patched:
        patched.setattr(*((row.Row, "write") if alike == 1 else (step.bnb, "code_book")), out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            opt.step()
    assert not tools.differences(before, tools.snapshot(opt))
    opt.step()
    assert opt.state[p[0]]["step"] == opt.state[p[1]]["step"] == 2


# --- without Triton ---------------------------------------------------------------------------------------------------


def test_a_gpu_without_triton_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parameters are left to plain PyTorch; who asked for the kernels gets an error."""
    monkeypatch.setattr(backends, "triton_missing", lambda: "Triton could not be imported (No module named 'triton')")
    p: Any = types.SimpleNamespace(device=torch.device("cuda"), is_contiguous=lambda: True, numel=lambda: 1)
    with pytest.warns(UserWarning, match="could not be imported .*; the optimizer runs in plain PyTorch") as told:
        assert [backends.takes(p, None) for _ in range(2)] == [False, False]
    assert len(told) == 1
    assert not backends.takes(p, "torch")
    with pytest.raises(RuntimeError, match="backend='triton': Triton could not be imported"):
        backends.takes(p, "triton")
    monkeypatch.setattr(backends, "triton_missing", lambda: "")
    assert backends.takes(p, None)


@pytest.mark.parametrize(("version", "old"), [("3.2.0", True), ("2.3.1", True), ("3.3.0", False), ("4.0.0", False)])
def test_a_triton_too_old_for_the_kernels(version: str, old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.6 brings 3.2: plain PyTorch works, and the reason names the version."""
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=version))
    assert ("too old for the kernels (3.3" in backends.triton_missing()) == old
    assert (version in backends.triton_missing()) == old


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
