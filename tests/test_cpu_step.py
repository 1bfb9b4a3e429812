"""The step that Numba compiles for the CPU does what the rule says, and is chosen where it pays."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import kernel_cases
import pytest
import torch
from kernel_cases import DTYPES, FORMS, SOME_SHAPES, SWITCHES, TILED_SHAPES, Followed, gradient, optimizer, parameters

from automagic_bnb import reference
from automagic_bnb.command import doctor
from automagic_bnb.cpu import step
from automagic_bnb.optimizer import Automagic

needs_numba = pytest.mark.skipif(bool(step.missing()), reason=step.missing() or "Numba is here")
SHAPES = (*SOME_SHAPES, *TILED_SHAPES, (1,), ())


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cases, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(kernel_cases, "COMPILED", False)  # no block may be off


def follow(dtype: str, storage: str, shapes: Any = SHAPES, gradients: Any = gradient, **options: Any) -> Followed:
    """The compiled step beside the reference, as `kernel_cases.follow` does it with the kernels."""

    def build(backend: str) -> Automagic:
        backend = "numba" if backend == "triton" else backend
        return optimizer(parameters(shapes, DTYPES[dtype]), backend, storage, **options)

    return kernel_cases.follow(build, gradients=gradients)


# --- the rule ---------------------------------------------------------------------------------------------------------


@needs_numba
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage", FORMS)
def test_every_storage_is_stepped_as_the_reference_steps_it(storage: str, dtype: str) -> None:
    assert follow(dtype, storage).violations(storage) == []


@needs_numba
@pytest.mark.parametrize("storage", ["factored", "8bit"])
@pytest.mark.parametrize("switch", [name for name in SWITCHES if name != "defaults"])
def test_every_option_is_followed(switch: str, storage: str) -> None:
    dtype = "bfloat16" if "weights" in switch or "round" in switch else "float32"
    assert follow(dtype, storage, **SWITCHES[switch]).violations(storage) == []


def broken(shape: tuple[int, ...], index: int, step: int) -> torch.Tensor:
    """NaN, infinities and zeros, by element, by row, in a whole block and in a whole tensor."""
    grad = gradient(shape, index, step).flatten()
    grad[step::7] = math.nan
    grad[step + 1 :: 11] = 0
    grad[step + 2 :: 13] = (-1) ** step * 2.0**60
    grad[256:512] = math.inf if step % 2 else 0
    if index == step:
        grad[:] = math.nan
    return grad.view(shape)


@needs_numba
@pytest.mark.parametrize("storage", ["factored", "packed", "8bit", "32bit", "lean"])
def test_gradients_that_are_not_finite_or_zero_are_passed_over(storage: str) -> None:
    options = {"lr": 9e-3, "auto_lr": True, "percentile_clipping": 50}
    assert follow("bfloat16", storage, gradients=broken, **options).violations(storage) == []


@needs_numba
@pytest.mark.parametrize("name", ["BACKGROUND_FACTOR", "STATISTIC_GAIN", "MAX_CHANGE", "LAPLACIAN_NOISE", "OCTAVE"])
def test_a_constant_that_is_a_little_off_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    off = {**step.CONSTANTS, name: step.CONSTANTS[name] * 1.01}
    monkeypatch.setattr(step, "_CONSTANTS", tuple(off.values()))
    storage = "32bit" if name == "OCTAVE" else "factored"
    assert follow("float32", storage, detail_preservation=9.0).violations(storage)


# --- runs -------------------------------------------------------------------------------------------------------------


def train(opt: Automagic, steps: range) -> None:
    for t in steps:
        for index, p in enumerate(kernel_cases.parameters_of(opt)):
            kernel_cases.give(p, gradient(tuple(p.shape), index, t))
        opt.step()


@needs_numba
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit() -> None:
    options = {"storage": "packed", "auto_lr": True, "lr": 9e-3}
    whole = optimizer(parameters(SHAPES, torch.bfloat16), "numba", **options)
    train(whole, range(1, 4))
    saved = copy.deepcopy(whole.state_dict())
    resumed = optimizer(
        [p.detach().clone().requires_grad_() for p in kernel_cases.parameters_of(whole)], "numba", **options
    )
    resumed.load_state_dict(saved)
    for opt in (whole, resumed):
        train(opt, range(4, 7))
    for p, q in zip(*map(kernel_cases.parameters_of, (whole, resumed)), strict=True):
        assert torch.equal(p, q)
        for name, value in whole.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(resumed.state[q][name])), name


@needs_numba
def test_the_gradient_and_the_strides_of_a_parameter_stay() -> None:
    base = torch.randn(24, 40)
    p, q = torch.nn.Parameter(base.t().contiguous().t()), torch.nn.Parameter(base.clone())
    grad = torch.randn(24, 40)
    for x in (p, q):
        x.grad = grad.clone()
        Automagic([x], lr=0.02, backend="numba").step()
        assert torch.equal(x.grad, grad)
    assert p.stride() == (1, 24)
    assert torch.equal(p, q)
    assert not torch.equal(p, base)


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """By which code each parameter was stepped."""
    seen: list[str] = []
    monkeypatch.setattr(step, "update_parameter", lambda *args: seen.append("numba"))
    monkeypatch.setattr(reference, "update_parameter", lambda *args: seen.append("torch"))
    return seen


def test_it_is_chosen_after_a_second_of_plain_steps(used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "missing", lambda: "")
    monkeypatch.setattr(step, "LEAST_WORK", 3 * (40 + 60))
    params = [torch.nn.Parameter(torch.zeros(40)), torch.nn.Parameter(torch.zeros(60))]
    opt = Automagic(params, lr=1e-3)
    for _ in range(4):
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
    assert used == ["torch"] * 4 + ["numba"] * 4


def test_without_numba_the_step_is_the_plain_one(used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "missing", lambda: "Numba could not be imported")
    monkeypatch.setattr(step, "LEAST_WORK", 0)
    p = torch.nn.Parameter(torch.zeros(40))
    p.grad = torch.ones_like(p)
    Automagic([p], lr=1e-3).step()
    assert used == ["torch"]
    with pytest.raises(RuntimeError, match=r"backend='numba'.*automagic-bnb\[cpu\]"):
        Automagic([p], lr=1e-3, backend="numba").step()


def test_plain_pytorch_can_be_asked_for(used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "LEAST_WORK", 0)
    p = torch.nn.Parameter(torch.zeros(40))
    p.grad = torch.ones_like(p)
    Automagic([p], lr=1e-3, backend="torch").step()
    assert used == ["torch"]


def test_parameters_elsewhere_are_an_error_where_it_is_asked_for() -> None:
    with pytest.raises(RuntimeError, match="backend='numba': a parameter is on meta"):
        step.takes(torch.empty(4, device="meta"), "numba", 1, lambda: 4)
    assert not step.takes(torch.empty(4, device="meta"), None, 10**9, lambda: 4)


def test_an_import_does_not_bring_numba() -> None:
    code = "import sys, automagic_bnb.cpu.step; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300, check=False).returncode == 0


@needs_numba
def test_what_is_compiled_is_kept_on_disk() -> None:
    from automagic_bnb.cpu import compiled

    follow("float32", "factored", shapes=((8, 32),))
    assert list(Path(compiled.update.stats.cache_path).glob("compiled.update-*.nbc"))


# --- the doctor -------------------------------------------------------------------------------------------------------


def test_the_doctor_says_that_numba_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "missing", lambda: "Numba could not be imported (No module named 'numba')")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    finding = doctor.check_cpu_step()
    assert (finding.status, finding.remedy) == ("note", 'pip install "automagic-bnb[cpu]"')
    assert "No module named 'numba'" in finding.detail
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert doctor.check_cpu_step().status == "ok"


@needs_numba
def test_the_doctor_holds_it_against_the_plain_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = doctor.check_cpu_step()
    assert finding.status == "ok", finding.detail
    assert "compiled steps within" in finding.detail
    monkeypatch.setattr(step, "_CONSTANTS", tuple({**step.CONSTANTS, "STATISTIC_GAIN": 0.9}.values()))
    finding = doctor.check_cpu_step()
    assert finding.status == "problem"
    assert "the compiled steps differ from the plain rule by" in finding.detail
