"""What a step of the kernels costs, launches, compilations and waiting; and by what it is chosen.

Interpreted on the CPU where there is no CUDA device, compiled where there is one: see `kernel_cases`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import (
    BITS,
    COMPILED,
    SOME_SHAPES,
    SWITCHES,
    give,
    gradient,
    optimizer,
    parameters,
    parameters_of,
    waiting_is_an_error,
)

from automagic_bnb import backends
from automagic_bnb.optimizer import Automagic8bit

step = pytest.importorskip("automagic_bnb.kernels.step", reason="the kernels need Triton")
launching = pytest.importorskip("automagic_bnb.kernels.launching", reason="the kernels need Triton")
statistics = pytest.importorskip("automagic_bnb.kernels.statistics", reason="the kernels need Triton")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy: 1 / 0 in masked lanes


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched from here on, which are not run."""
    names: list[str] = []

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names.append(kernel.fn.__name__)

    monkeypatch.setattr(type(step.step_kernel), "run", note)
    return names


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["step_kernel", "_finalise_kernel"]),
        ({"warmup_steps": 0}, ["step_kernel"]),
        ({"percentile_clipping": 50}, ["_square_sums_kernel", "_clip_kernel", "step_kernel", "_finalise_kernel"]),
        ({"auto_lr": True}, ["_find_rate_kernel", "step_kernel", "_finalise_kernel"]),
    ],
    ids=["defaults", "mask frozen", "percentile clipping", "rate found"],
)
def test_hundred_tensors_take_a_handful_of_launches(
    options: dict[str, Any], expected: list[str], launches: list[str]
) -> None:
    """However many tensors, one launch of each kernel that the options call for; the first step has no rate to find."""
    opt = optimizer(parameters(((3, 2),) * 60 + ((40,),) * 40, torch.float32), "triton", **options)
    for number in range(2):
        launches.clear()
        for p in parameters_of(opt):
            p.grad = torch.ones_like(p)
        opt.step()
        # 40 elements are eight at a time, 6 are not: two buckets, with the rate found once for both
        buckets = [name for name in launches if name != "_find_rate_kernel"]
        assert sorted(buckets) == sorted(2 * [name for name in expected if name != "_find_rate_kernel"])
        assert launches.count("_find_rate_kernel") == number * expected.count("_find_rate_kernel")


def compiled_variants() -> int:
    """How many compiled kernels are cached in this process."""
    kernels = [step.step_kernel, statistics._finalise_kernel, statistics._square_sums_kernel]
    kernels += [statistics._clip_kernel, statistics._find_rate_kernel]
    total = 0
    for kernel in kernels:
        caches = kernel.device_caches.values() if hasattr(kernel, "device_caches") else [kernel.cache]
        total += sum(len(cache[0] if isinstance(cache, tuple) else cache) for cache in caches)
    return total


@pytest.mark.gpu
@pytest.mark.skipif(not COMPILED, reason="the interpreter compiles nothing")
def test_numbers_never_recompile() -> None:
    """Rates, decay, betas, eps and thresholds are arguments; only the end of the warm-up is another kernel."""
    opt = optimizer(parameters(SOME_SHAPES, torch.bfloat16), "triton", percentile_clipping=50)

    def steps(count: int) -> int:
        for number in range(1, count + 1):
            for index, p in enumerate(parameters_of(opt)):
                give(p, gradient(tuple(p.shape), index, number))
            opt.step()
        return compiled_variants()

    known = steps(2)
    assert known > 0
    group = opt.param_groups[0]
    for changes in (
        {"lr": 0.0, "weight_decay": 0.0},
        {"lr": 1.0, "weight_decay": 1.0, "min_lr": 0.0, "max_lr": 1.0},
        {"betas": (0.0, 0.5, 0.25), "eps": (1e-8, 0.0)},
        {"clip_threshold": 2.0, "edge_penalty": 1.0, "edge_threshold": 0.0, "frequency_penalty": 1.0},
        {"detail_preservation": 0.0, "low_rank_emphasis": 2.0, "percentile_clipping": 1, "seed": 1},
    ):
        group.update(changes)
        assert steps(1) == known, changes
    group["warmup_steps"] = 0
    assert steps(1) > known, "negative control: another switch does compile"


@pytest.mark.gpu
@pytest.mark.skipif(not COMPILED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("switch", ["defaults", "rate found", "percentile clipping"])
def test_what_is_compiled_is_launched_without_triton_and_to_the_same_bits(
    switch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    run = type(step.step_kernel).run

    def note(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(kernel.fn.__name__)
        return run(kernel, *args, **kwargs)

    monkeypatch.setattr(type(step.step_kernel), "run", note)
    weights = []
    for direct in (True, False):
        monkeypatch.setattr(launching, "DIRECT", direct)
        opt = optimizer(parameters(SOME_SHAPES, torch.bfloat16), "triton", seed=0, **SWITCHES[switch])
        for number in range(1, 6):
            for index, p in enumerate(parameters_of(opt)):
                give(p, gradient(tuple(p.shape), index, number))
            called.clear()
            opt.step()
        assert bool(called) != direct, called
        weights.append([p.detach().clone() for p in parameters_of(opt)])
    assert all(map(torch.equal, *weights))


@pytest.mark.gpu
@pytest.mark.skipif(not COMPILED, reason="only a CUDA device can be waited for")
@pytest.mark.parametrize("switch", ["defaults", "rate found", "percentile clipping"])
@pytest.mark.parametrize("storage", BITS)
def test_a_step_does_not_wait_for_the_device(switch: str, storage: str) -> None:
    """No host synchronisation once the plan is made; of the low-rank step see test_low_rank_kernel.py."""
    opt = optimizer(parameters(SOME_SHAPES, torch.bfloat16), "triton", storage, **SWITCHES[switch])
    for number in range(1, 9):
        for index, p in enumerate(parameters_of(opt)):
            give(p, gradient(tuple(p.shape), index, number))
        with waiting_is_an_error(number > 2):
            opt.step()


@pytest.mark.gpu
@pytest.mark.skipif(not COMPILED, reason="only a CUDA device can be waited for")
def test_waiting_for_the_device_is_seen() -> None:
    """Negative control for the test above: reading a number off the device is an error there."""
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device="cuda").item()


# --- choosing a backend -----------------------------------------------------------------------------------------------


def test_kernels_on_the_cpu_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the option, its value and both ways out; nothing has been touched."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    p = torch.nn.Parameter(torch.ones(4))
    opt = Automagic8bit([p], lr=1e-3, backend="triton")
    p.grad = torch.ones(4)
    with pytest.raises(RuntimeError) as error:
        opt.step()
    assert all(
        part in str(error.value) for part in ("backend='triton'", "cpu", "TRITON_INTERPRET=1", "backend='torch'")
    )
    assert torch.equal(p, torch.ones(4))
    assert not opt.state.get(p)


@pytest.mark.parametrize("backend", ["torch", None])
def test_plain_pytorch_launches_nothing(
    backend: str | None, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for, or on the CPU without being asked for: Triton is not even looked for."""

    def look() -> str:
        raise AssertionError("Triton was looked for")

    if backend == "torch":
        monkeypatch.setattr(backends, "triton_missing", look)
    p = torch.nn.Parameter(torch.ones(4))
    opt = Automagic8bit([p], lr=1e-3, backend=backend)
    p.grad = torch.ones(4)
    opt.step()
    opt.step_parameter(p, opt.param_groups[0])
    assert opt.state[p]["step"] == 2
    assert not torch.equal(p, torch.ones(4))
    assert launches == []


@pytest.mark.parametrize("backend", ["cuda", "Triton", "", 1, True])
def test_unknown_backend_is_an_error(backend: Any) -> None:
    """The error names the option, the value and the choices."""
    with pytest.raises((TypeError, ValueError), match=r"option backend=.*'triton', 'numba', 'torch'") as error:
        Automagic8bit([torch.nn.Parameter(torch.ones(4))], backend=backend)
    assert repr(backend) in str(error.value)


@pytest.mark.gpu
@pytest.mark.skipif(not COMPILED, reason="the kernels are the default on a CUDA device only")
def test_kernels_are_the_default_on_cuda(launches: list[str]) -> None:
    """Without being asked for."""
    p = parameters(((40,),), torch.float32)[0]
    opt = Automagic8bit([p], lr=1e-3)
    p.grad = torch.ones_like(p)
    opt.step()
    assert "step_kernel" in launches
