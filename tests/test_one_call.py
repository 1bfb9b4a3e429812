"""`step_parameter`, one tensor a call: the host does little for it, and what changes between two calls counts."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE
from plan_cases import build, give, parameter

from automagic_bnb.optimizer import Automagic

step = pytest.importorskip("automagic_bnb.kernels.step", reason="the kernels need Triton")
launching = pytest.importorskip("automagic_bnb.kernels.launching", reason="the kernels need Triton")
row = pytest.importorskip("automagic_bnb.kernels.row", reason="the kernels need Triton")
statistics = pytest.importorskip("automagic_bnb.kernels.statistics", reason="the kernels need Triton")
tables = pytest.importorskip("automagic_bnb.kernels.tables", reason="the kernels need Triton")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy: 1 / 0 in masked lanes

MOST_CALLS = 85
"""Of Python functions in one call, launches apart. Hooks of a backward pass make a thousand such calls, and functions
tell on any machine what each costs: there are 63, with a rate found 73, in 22 µs; there were 168, in 154 µs."""


# --- what it costs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of what is launched as on a GPU, past Triton's own call of a kernel, and not run."""
    found: list[tuple[Any, ...]] = []

    class Compiled:
        def __getitem__(self, programs: tuple[int, int, int]) -> Callable[..., None]:
            return lambda *values: found.append(values)

    monkeypatch.setattr(type(step.step_kernel), "run", lambda *_, **__: Compiled())
    monkeypatch.setattr(launching, "is_direct", lambda device: True)
    for module in (row, statistics):  # what is compiled here is for no other test
        monkeypatch.setattr(module, "_compiled", launching.Compiled())
    monkeypatch.setattr(tables, "variant_of", tables.variant_of.__wrapped__)
    return found


def python_calls(work: Callable[[], Any]) -> int:
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("lr", [1e-3, None], ids=["rate given", "rate found"])
@pytest.mark.parametrize("tensors", [3, 40])
def test_one_call_is_few_calls(tensors: int, lr: float | None, launches: list[tuple[Any, ...]]) -> None:
    """However many parameters there are; and launches of what is compiled: the numbers, the step, its statistics."""
    p = [parameter(8, 16, seed=i) for i in range(tensors)]
    opt = build(p, "triton", lr=lr)
    give(*p)
    for _ in range(3):
        for x in p:
            opt.step_parameter(x, opt.param_groups[0])
    opt.step_parameter(p[0], opt.param_groups[0])  # the numbers of the fourth step are worked out, and a rate is found
    launches.clear()
    with torch.no_grad():  # as in a backward pass
        calls = python_calls(lambda: opt.step_parameter(p[1], opt.param_groups[0]))
    assert calls <= MOST_CALLS
    assert len(launches) == 3
    numbers, *others = launches
    assert all(isinstance(value, int) for value in numbers)
    assert not any(isinstance(value, torch.Tensor) for values in others for value in values), "addresses are cheaper"


@pytest.mark.parametrize("lr", [1e-3, None], ids=["rate given", "rate found"])
def test_other_groups_cost_nothing(lr: float | None, launches: list[tuple[Any, ...]]) -> None:
    """Layerwise training may give each parameter a group of its own."""
    counts = []
    for groups in (3, 40):
        p = [parameter(8, 16, seed=i) for i in range(groups)]
        opt = build([{"params": [x]} for x in p], "triton", lr=lr)
        give(*p)
        calls = 0
        for _ in range(4):
            for x, group in zip(p, opt.param_groups, strict=True):
                with torch.no_grad():
                    calls = python_calls(functools.partial(opt.step_parameter, x, group))
        counts.append(calls)
    assert counts[0] == counts[1]


# --- what changes between two calls -----------------------------------------------------------------------------------

CHANGES: dict[str, dict[str, Any]] = {
    "lr": {"lr": 3e-3},
    "min_lr": {"min_lr": 9e-3},
    "max_lr": {"max_lr": 1.1e-2},
    "weight_decay": {"weight_decay": 0.7},
    "warmup_steps": {"warmup_steps": 1},
    "betas": {"betas": (0.5, 0.6, 0.7)},
    "eps": {"eps": (1e-3, 1e-2)},
    "clip_threshold": {"clip_threshold": 0.1},
    "edge_penalty": {"edge_penalty": 0.9},
    "edge_threshold": {"edge_threshold": 0.01},
    "detail_preservation": {"detail_preservation": 0.1},
    "frequency_penalty": {"frequency_penalty": 0.4},
    "percentile_clipping": {"percentile_clipping": 5},
    "low_rank_emphasis": {"low_rank_emphasis": 3.0},
    "a switch": {"torque": False},
    "a schedule": {"initial_lr": 1e-2, "lr": 5e-3},
    "an lr that is a tensor": {"lr": torch.tensor(3e-3)},
}


def trained(one_by_one: bool, change: dict[str, Any] | None) -> Automagic:
    """Five steps of two tensors alike, so that `step` has a bucket of two; the change comes before the fourth."""
    p = [parameter(16, 24), parameter(16, 24, seed=1)]
    options = {"lora_mask": True, "lora_rank_penalty": False, "edge_suppression": True, "frequency_penalty": 0.1}
    opt = build(p, "triton", lora=True, seed=0, **options)
    for number in range(5):
        if number == 3 and change is not None:
            opt.param_groups[0].update(change)
        if number == 4 and change is not None and isinstance(change.get("lr"), torch.Tensor):
            change["lr"].mul_(0.5)
        give(*p, step=number)
        for x in p if one_by_one else ():
            opt.step_parameter(x, opt.param_groups[0])
        if not one_by_one:
            opt.step()
    return opt


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_option_changed_between_two_calls_counts_at_once(change: dict[str, Any], tools: Any) -> None:
    """As it does for `step`, bit for bit."""
    alone = trained(True, {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in change.items()})
    together = trained(False, {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in change.items()})
    assert not tools.differences(tools.snapshot(together), tools.snapshot(alone))
    moved, still = ({k: v for k, v in tools.snapshot(x).items() if k != "groups"} for x in (alone, trained(True, None)))
    assert tools.differences(moved, still), "it changed nothing"


def test_a_rate_that_is_to_be_found_from_now_on_is(tools: Any) -> None:
    """In one of two groups, whichever is stepped first; the other keeps its own."""
    results = []
    for order in (1, -1):
        p = [parameter(16, 24), parameter(16, 24, seed=1)]
        opt = build([{"params": [x]} for x in p], "triton", seed=0)
        for number in range(6):
            if number == 2:
                opt.param_groups[1].update(auto_lr=True, auto_lr_given=None)
            give(*p, step=number)
            for i in (0, 1)[::order]:
                opt.step_parameter(p[i], opt.param_groups[i])
        assert opt.param_groups[1]["auto_lr_count"] == 3  # the first step that searches has nothing to estimate from
        assert "auto_lr_rate" not in opt.param_groups[0]
        results.append(tools.snapshot(opt))
    assert not tools.differences(*results)


def test_launches_are_repeated_until_something_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was begun in vain is not."""
    compiled, repeated, work = launching.Compiled(), launching.Repeated(), []
    there = row.Row(DEVICE)
    words = dict(zip(row._NAMES, range(row.WORDS), strict=True))

    def launch() -> None:
        work.append(True)
        compiled.launch(row.row_kernel, 1, {"row_ptr": there.there, **words}, num_warps=1)
        if len(work) == 1:
            raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        repeated.do("key", launch)
    for number in range(3):
        there.there.zero_()
        repeated.do("key", launch)
        assert there.there.tolist() == list(range(row.WORDS)), "the launch was not repeated"
        assert len(work) == 2, number
    words["w0"] = 7
    repeated.do("another key", launch)
    assert len(work) == 3
    assert there.there[0] == 7


# --- what is written --------------------------------------------------------------------------------------------------


def test_words_arrive_as_they_were() -> None:
    there, values = row.Row(DEVICE), [0, 1, -1, 16, 2**31 - 1, -(2**31), *range(row.WORDS - 6)]
    for words in (values, values[::-1]):
        there.write(words)
        assert there.there.tolist() == words


@pytest.mark.parametrize("word", [0, 1, 2**31 - 1, 2**31, 2**32 - 1])
def test_signed_has_the_same_bits(word: int) -> None:
    assert np.array([row.signed(word)], dtype=np.int32).view(np.uint32)[0] == word


@pytest.mark.parametrize("t", [0, 1, 2, 17])
def test_a_row_in_words_is_the_row_in_float32(t: int) -> None:
    """Beyond float32's range it is an infinity, as numpy has it."""
    opt = build([parameter(8, 16)], "triton", weight_decay=0.1)
    options = {**opt.param_groups[0], "lr": 1e300, "base_lr": 1e300}
    found = tables.number_row(options, t, True)
    assert np.array(found.words, dtype=np.int32).view(np.float32)[tables.Number.RATE] == math.inf
    with np.errstate(over="ignore"):
        assert np.array(found.numbers, dtype=np.float32).view(np.int32).tolist() == list(found.words)


# --- what is launched by itself ---------------------------------------------------------------------------------------


class OnCuda(torch.Tensor):
    """Says that it lies on a GPU, somewhere."""

    address = 2**40

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)

    def data_ptr(self) -> int:
        return self.address


class Kernel:
    """Stands for one of Triton's, and for what it is compiled to."""

    def __init__(self) -> None:
        self.arg_names = ["x_ptr", "size", "FLAG"]
        self.by_triton: list[dict[str, Any]] = []
        self.direct: list[tuple[Any, ...]] = []

    def fn(self) -> None: ...

    def __getitem__(self, programs: tuple[int, ...]) -> Callable[..., Any]:
        if len(programs) == 1:
            return lambda **arguments: self.by_triton.append(arguments) or self
        return lambda *values: self.direct.append((programs, *values))


def test_what_is_compiled_gets_addresses_and_is_compiled_for_their_alignment() -> None:
    kernel, compiled, x = Kernel(), launching.Compiled(), torch.zeros(4).as_subclass(OnCuda)
    arguments = {"x_ptr": x, "size": 3, "FLAG": True}
    for number in range(2):
        compiled.launch(kernel, 5, {**arguments, "size": number}, num_warps=4)
    assert [call["x_ptr"] is x and call["num_warps"] == 4 for call in kernel.by_triton] == [True]
    assert kernel.direct == [((5, 1, 1), 2**40, 1, True)]
    x.address = 2**40 + 4  # no multiple of 16
    compiled.launch(kernel, 5, arguments, num_warps=4)
    compiled.launch(kernel, 5, {**arguments, "FLAG": False}, num_warps=4)
    assert len(kernel.by_triton) == 3
    compiled.launch(kernel, 5, arguments, num_warps=4)
    assert len(kernel.by_triton) == 3
    assert kernel.direct[-1] == ((5, 1, 1), 2**40 + 4, 3, True)
