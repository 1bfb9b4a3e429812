"""What must not show up late: numbers that creep away, memory that grows, counters that end, optimizers that share.

Short in the ordinary run; AUTOMAGIC_LONG=10000 takes so many steps.
"""

from __future__ import annotations

import gc
import os
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import FORMS
from torch import Tensor, nn

from automagic_bnb import Automagic8bit
from automagic_bnb import state as st

STEPS = int(os.environ.get("AUTOMAGIC_LONG", "300"))


def steady(noise: Tensor, step: int) -> Tensor:
    return 0.01 * noise + 0.003


def adverse(noise: Tensor, step: int) -> Tensor:
    """Of another kind in each step: zeros, denormals, up to 2^50 and beyond, one-hot, alternating, NaN, infinities."""
    kinds: list[Callable[[], Tensor]] = [
        lambda: noise * 0,
        lambda: noise * 1e-40,
        lambda: noise * 1e14,
        lambda: noise * 1e38,
        lambda: torch.where(torch.arange(noise.numel()).view_as(noise) == step % noise.numel(), 1.0, 0.0),
        lambda: (torch.arange(noise.numel()).view_as(noise) + step) % 2 * 2.0 - 1,
        lambda: torch.where(noise > 1, torch.nan, noise),
        lambda: torch.where(noise.abs() > 1.5, noise * torch.inf, noise),
        lambda: noise,
    ]
    return kinds[step % len(kinds)]()


def not_finite(opt: Automagic8bit) -> list[str]:
    """Names of what holds NaN or an infinity."""
    found = []
    for group in opt.param_groups:
        for p in group["params"]:
            held = {"weights": p.detach(), **opt.state[p]}
            found += [k for k, v in held.items() if isinstance(v, Tensor) and not torch.isfinite(v.float()).all()]
    return found


@pytest.mark.parametrize("gradients", [steady, adverse])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", sorted(FORMS))
def test_every_storage_stays_finite(form: str, dtype: torch.dtype, gradients: Any) -> None:
    """And a given rate keeps weights within what the rate and the decay allow: 1.1 a step at the very most."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(24, 32, generator=generator).to(dtype))
    opt = Automagic8bit([p], lr=1e-3, **{"min_8bit_size": 0, **FORMS[form]})
    for step in range(STEPS):
        p.grad = gradients(torch.randn(24, 32, generator=generator), step).to(dtype)
        opt.step()
        if step % 100 == 99:
            assert not not_finite(opt), step
    assert p.detach().abs().max() < 5 + STEPS * 1e-2 * 1.1  # single rates reach ten times the mean


def test_a_found_rate_stays_finite() -> None:
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(64, 64, generator=generator))
    opt = Automagic8bit([p])
    for step in range(STEPS):
        p.grad = adverse(torch.randn(64, 64, generator=generator), step)
        opt.step()
    assert not not_finite(opt)
    assert 0 < float(opt.get_avg_learning_rate()) < 1


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's account of a process")
@pytest.mark.parametrize("one_by_one", [False, True], ids=["at once", "one by one"])
def test_memory_stays_flat(one_by_one: bool) -> None:
    """Python's objects to within 64 kB, as it keeps free ones; the process to within 8 MB; and not a tensor more."""
    steps, parameters = min(STEPS, 2000), [nn.Parameter(torch.zeros(64, 64)) for _ in range(4)]
    opt = Automagic8bit(parameters, percentile_clipping=90)

    def run(count: int) -> tuple[int, int, int]:
        for _ in range(count):
            for p in parameters:
                p.grad = torch.ones_like(p)
                if one_by_one:
                    opt.step_parameter(p, opt.param_groups[0])
            if not one_by_one:
                opt.step()
        opt.zero_grad()
        gc.collect()
        tensors = sum(issubclass(type(x), Tensor) for x in gc.get_objects())
        return tracemalloc.get_traced_memory()[0], resident(), tensors

    tracemalloc.start()
    try:
        before = run(100)
        after = run(steps)
    finally:
        tracemalloc.stop()
    assert after[0] - before[0] < 2**16
    assert after[1] - before[1] < 2**23
    assert after[2] == before[2]


def trained(seed: int, opt: Automagic8bit, p: Any, steps: int, wait: Callable[[], Any] = lambda: None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        p.grad = torch.randn(p.shape, generator=generator)
        wait()
        opt.step()
    return p.detach().clone()


def test_optimizers_in_threads_are_as_if_alone() -> None:
    """Sixteen, in step with each other, of every form of storage; some find their rates."""
    count, steps = 16, 20

    def make(i: int) -> tuple[Automagic8bit, Any]:
        torch.manual_seed(i)
        p = nn.Parameter(torch.randn(32, 48))
        rate = {"lr": 1e-3} if i % 2 else {}
        return Automagic8bit([p], **rate, **{"min_8bit_size": 0, **sorted(FORMS.items())[i % len(FORMS)][1]}), p

    alone = [trained(i, *make(i), steps) for i in range(count)]
    together: dict[int, Tensor] = {}
    barrier = threading.Barrier(count)
    made = [make(i) for i in range(count)]
    threads = [
        threading.Thread(target=lambda i=i: together.update({i: trained(i, *made[i], steps, barrier.wait)}))
        for i in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(together) == count
    assert all(torch.equal(alone[i], together[i]) for i in range(count))


@pytest.mark.parametrize("form", ["32bit", "factored", "lean"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("count", [2**31 - 2, 2**32 - 2, 2**53 - 2, 2**63 - 4])
def test_counters_go_on_to_the_end(count: int, backend: str, form: str, tools: Any) -> None:
    """Where a 32-bit counter, a double and a 64-bit one end: exact, finite, and back from a checkpoint."""
    p = nn.Parameter(torch.randn(9, 16, generator=torch.Generator().manual_seed(0)))
    opt = Automagic8bit([p], lr=1e-3, backend=backend, warmup_steps=2**62, **{"min_8bit_size": 0, **FORMS[form]})
    tools.train(opt, [p], range(1))
    st.set_uncounted(opt.state[p], "step", count)
    tools.train(opt, [p], range(1, 3))
    before = p.detach().clone()
    opt.load_state_dict(opt.state_dict())
    tools.train(opt, [p], range(3, 4))
    assert opt.state[p]["step"] == count + 3
    assert not not_finite(opt)
    assert 1e-6 < (p.detach() - before).abs().max() < 1e-2
