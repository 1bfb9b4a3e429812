"""torch's own list of what an optimizer is given, and what its suite holds of every optimizer, held of ours.

The inputs and the errors come from torch.testing, which needs expecttest; the properties are those of its test_optim.
What does not apply says why (`NOT_OURS`). Convergence is that of functions that other libraries test by.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from automagic_bnb import Automagic8bit, Automagic32bit

pytest.importorskip("expecttest", reason="torch.testing needs it: pip install expecttest")

from torch.testing._internal import common_optimizers as torchs

NOT_OURS = {
    "amsgrad": "a variant of Adam's second moment",
    "maximize": "the loss is negated by its writer",
    "foreach": "the kernels take all tensors at once",
    "fused": "they are fused in any case",
    "differentiable": "a step is taken in place",
    "decoupled_weight_decay": "decay is decoupled in any case",
}
CLASSES = [Automagic8bit, Automagic32bit]


def inputs() -> list[Any]:
    found = torchs.optim_inputs_func_adamw("cpu")
    assert len(found) >= 5
    return found


APPLYING = [x for x in inputs() if not x.kwargs.keys() & NOT_OURS.keys()]
OTHERS = [x for x in inputs() if x.kwargs.keys() & NOT_OURS.keys()]
each_input = pytest.mark.parametrize("options", [x.kwargs for x in APPLYING], ids=[x.desc for x in APPLYING])
each_class = pytest.mark.parametrize("kind", CLASSES)


class Regression:
    """A small least-squares problem over a weight and a bias; `step` takes a step of an optimizer."""

    def __init__(self, strided: bool = False, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        weight = (
            torch.randn(10, 5, 2, generator=generator)[..., 0] if strided else torch.randn(10, 5, generator=generator)
        )
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(torch.randn(10, generator=generator))
        self.x = torch.randn(5, generator=generator)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.weight, self.bias]

    def loss(self) -> Tensor:
        return (self.weight @ self.x + self.bias).square().sum()

    def step(self, opt: Any, steps: int = 1) -> float:
        for _ in range(steps):
            opt.zero_grad()
            loss = self.loss()
            loss.backward()
            opt.step()
        return loss.item()

    def bits(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


# --- torch's inputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", OTHERS, ids=lambda x: x.desc)
def test_what_does_not_apply_is_an_error(x: Any) -> None:
    """An option of torch's that is none here is named, not swallowed."""
    foreign = next(name for name in x.kwargs if name in NOT_OURS)
    with pytest.raises((TypeError, ValueError), match=f"no option '|{foreign}"):
        Automagic8bit(Regression().parameters, **x.kwargs)


@pytest.mark.parametrize(
    "x", torchs.get_error_inputs_for_all_optims("cpu", torch.float32), ids=lambda x: x.optimizer_error_input.desc
)
def test_torchs_error_inputs_are_errors(x: Any) -> None:
    given = x.optimizer_error_input
    warns = given.desc == "a param group cannot have duplicate parameters"  # torch's base class leaves it at that
    with pytest.warns(UserWarning, match="duplicate") if warns else pytest.raises((TypeError, ValueError)):
        Automagic8bit(given.params or Regression().parameters, **given.kwargs)


@each_class
@each_input
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_goes_in_the_right_direction(options: dict[str, Any], kind: type, strided: bool) -> None:
    problem = Regression(strided)
    assert problem.weight.is_contiguous() != strided
    opt = kind(problem.parameters, **options)
    first = problem.loss().item()
    assert problem.step(opt, 40) < first or options.get("lr") == 0


@each_class
@each_input
def test_a_state_dict_goes_on(options: dict[str, Any], kind: type) -> None:
    """A copy of the parameters under a new optimizer, with the state dict of the old, as it is and through a file."""
    problem, file = Regression(), io.BytesIO()
    opt = kind(problem.parameters, **options)
    problem.step(opt, 5)
    torch.save(opt.state_dict(), file)
    others = []
    for saved in (opt.state_dict(), torch.load(io.BytesIO(file.getvalue()), weights_only=True)):
        other = copy.deepcopy(problem)
        opt2 = kind(other.parameters, **options)
        opt2.load_state_dict(copy.deepcopy(saved))
        others.append((other, opt2))
    problem.step(opt, 5)
    for other, opt2 in others:
        other.step(opt2, 5)
        assert equal(problem.bits(), other.bits())


@each_class
@each_input
def test_copies_go_on(options: dict[str, Any], kind: type) -> None:
    """deepcopy and pickle, together with what they optimize."""
    problem = Regression()
    opt = kind(problem.parameters, **options)
    problem.step(opt, 3)
    copies = [copy.deepcopy((problem, opt)), pickle.loads(pickle.dumps((problem, opt)))]
    problem.step(opt, 3)
    for other, opt2 in copies:
        other.step(opt2, 3)
        assert equal(problem.bits(), other.bits())
        assert repr(opt2) == repr(opt)


# --- the properties ---------------------------------------------------------------------------------------------------


@each_class
def test_a_tensor_lr_is_its_number(kind: type) -> None:
    results = []
    for lr in (1e-2, torch.tensor(1e-2, dtype=torch.float64)):
        problem = Regression()
        opt = kind(problem.parameters, lr=lr)
        problem.step(opt, 5)
        results.append(problem.bits())
    assert equal(*results)


@each_class
def test_groups_have_options_of_their_own(kind: type) -> None:
    """A bias without decay and with another rate, next to a weight with the defaults."""
    problem, alone = Regression(), Regression()
    opt = kind([{"params": [problem.weight]}, {"params": [problem.bias], "lr": 1e-3, "weight_decay": 0}], lr=1e-2)
    weights = kind([alone.weight], lr=1e-2)
    problem.step(opt)
    alone.loss().backward()
    weights.step()
    assert torch.equal(problem.weight, alone.weight)
    assert 0 < (problem.bias - alone.bias).abs().max() <= 1.5e-3  # a tenth of what the weight's rate would give
    assert [group["weight_decay"] for group in opt.param_groups] == [5e-4, 0]


@each_class
def test_a_closure_is_called_once_with_gradients_on(kind: type) -> None:
    problem, calls = Regression(), []
    opt = kind(problem.parameters, lr=1e-2)

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss

    with torch.no_grad():
        expected = problem.loss()
        assert torch.equal(opt.step(closure), expected)
    assert calls == [True]
    assert opt.step() is None


@each_class
def test_every_hook_is_called(kind: type) -> None:
    """Of a step, of state dicts saved and loaded, of all optimizers; and none after it has been taken away."""
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    problem, said = Regression(), []
    opt = kind(problem.parameters, lr=1e-2)

    def note(name: str) -> Callable[..., None]:
        return lambda *_: said.append(name)

    handles = [
        opt.register_step_pre_hook(note("before a step")),
        opt.register_step_post_hook(note("after a step")),
        register_optimizer_step_pre_hook(note("before any")),
        register_optimizer_step_post_hook(note("after any")),
        opt.register_state_dict_pre_hook(note("before saving")),
        opt.register_state_dict_post_hook(note("after saving")),
        opt.register_load_state_dict_pre_hook(note("before loading")),
        opt.register_load_state_dict_post_hook(note("after loading")),
    ]
    for _ in range(2):
        problem.step(opt)
        opt.load_state_dict(opt.state_dict())
        for handle in handles:
            handle.remove()
    assert sorted(said) == sorted(
        f"{when} {what}" for when in ("before", "after") for what in ("a step", "any", "saving", "loading")
    )


@each_class
def test_hooks_may_change_what_is_saved_and_loaded(kind: type) -> None:
    problem = Regression()
    opt = kind(problem.parameters, lr=1e-2)
    problem.step(opt)
    opt.register_state_dict_post_hook(lambda _, saved: {**saved, "note": 1})
    opt.register_load_state_dict_pre_hook(lambda _, saved: {k: v for k, v in saved.items() if k != "note"})
    saved = opt.state_dict()
    assert saved["note"] == 1
    opt.load_state_dict(saved)
    assert saved["note"] == 1


@each_class
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(kind: type, set_to_none: bool) -> None:
    problem = Regression()
    opt = kind(problem.parameters, lr=1e-2)
    problem.loss().backward()
    opt.zero_grad(set_to_none=set_to_none)
    assert all((p.grad is None) if set_to_none else not p.grad.any() for p in problem.parameters)


@each_class
def test_without_gradients_nothing_moves(kind: type) -> None:
    """None at all; gradients of 0, decay aside; and one parameter of two."""
    problem = Regression()
    opt = kind(problem.parameters, lr=1e-2, weight_decay=0)
    before = problem.bits()
    opt.step()
    for p in problem.parameters:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert equal(before, problem.bits())
    problem.bias.grad = None
    problem.weight.grad = torch.ones_like(problem.weight)
    opt.step()
    assert torch.equal(before[1], problem.bias)
    assert not torch.equal(before[0], problem.weight)


@each_class
def test_empty_parameters_and_empty_groups(kind: type) -> None:
    """A tensor of no elements, a group of no parameters; no group at all is torch's error."""
    empty, problem = nn.Parameter(torch.zeros(0, 3)), Regression()
    opt = kind([{"params": [empty]}, {"params": []}, {"params": problem.parameters}], lr=1e-2)
    empty.grad = torch.zeros(0, 3)
    before = problem.bits()
    problem.step(opt, 2)
    empty.grad = torch.zeros(0, 3)
    opt.step()
    opt.load_state_dict(opt.state_dict())
    assert not equal(before, problem.bits())
    with pytest.raises(ValueError, match="empty parameter list"):
        kind([])


@each_class
def test_a_step_saved_as_a_tensor_loads(kind: type) -> None:
    """As torch's own optimizers keep it."""
    problem = Regression()
    opt = kind(problem.parameters, lr=1e-2)
    problem.step(opt, 3)
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        state["step"] = torch.tensor(float(state["step"]))
    opt.load_state_dict(saved)
    assert [opt.state[p]["step"] for p in problem.parameters] == [3, 3]


@each_class
def test_loading_shares_nothing(kind: type) -> None:
    """A step after loading leaves the state dict as it was."""
    problem = Regression()
    opt = kind(problem.parameters, lr=1e-2)
    problem.step(opt, 2)
    saved = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(saved)
    kept = copy.deepcopy(saved)
    problem.step(opt)
    for key, state in kept["state"].items():
        for name, value in state.items():
            same = torch.equal(value, saved["state"][key][name]) if isinstance(value, Tensor) else True
            assert same, name


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 0.95**step),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda step: 0.95),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 10, 0.9),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [5, 15], 0.5),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.95),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 30),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 30),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 10),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 1e-3, 1e-2, cycle_momentum=False),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 1e-2, 30, cycle_momentum=False),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=2),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt), lr_scheduler.ExponentialLR(opt, 0.95)]
    ),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt), lr_scheduler.ExponentialLR(opt, 0.95)], [10]
    ),
}


@pytest.mark.parametrize("lr", [1e-2, None], ids=["given", "found"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_under_every_scheduler(name: str, lr: float | None) -> None:
    """The loss falls, and with a given rate the group's is torch's own under AdamW."""
    problem, theirs = Regression(), Regression()
    opt = Automagic8bit(problem.parameters, lr=lr)
    adamw = torch.optim.AdamW(theirs.parameters, lr=1e-2)
    schedule, other = SCHEDULERS[name](opt), SCHEDULERS[name](adamw)
    first = problem.loss().item()
    for _ in range(30):
        last = problem.step(opt)
        theirs.step(adamw)
        metric = (1.0,) if name == "ReduceLROnPlateau" else ()
        schedule.step(*metric)
        other.step(*metric)
        if lr is not None:
            assert opt.param_groups[0]["lr"] == pytest.approx(adamw.param_groups[0]["lr"], rel=1e-12)
    assert last < first


# --- convergence ------------------------------------------------------------------------------------------------------


def rosenbrock(x: Tensor) -> Tensor:
    return (1 - x[0]) ** 2 + (x[1] - x[0] ** 2) ** 2


def beale(x: Tensor) -> Tensor:
    return sum((c - x[0] + x[0] * x[1] ** power) ** 2 for power, c in enumerate((1.5, 2.25, 2.625), 1))  # type: ignore


FUNCTIONS = [(rosenbrock, (-2.0, 2.0), (1.0, 1.0)), (beale, (1.5, 1.5), (3.0, 0.5))]


@pytest.mark.parametrize("lr", [1e-1, 3e-2, None])
@pytest.mark.parametrize(("function", "start", "best"), FUNCTIONS, ids=["rosenbrock", "beale"])
def test_finds_the_minimum(function: Any, start: Any, best: Any, lr: float | None) -> None:
    """To a hundredth in 600 steps, with a rate and without."""
    x = nn.Parameter(torch.tensor(start))
    opt = Automagic8bit([x], lr=lr, weight_decay=0)
    for _ in range(600):
        opt.zero_grad()
        function(x).backward()
        opt.step()
    assert (x.detach() - torch.tensor(best)).norm() < 0.01


@pytest.mark.parametrize("lr", [1e-2, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_small_network_learns(lr: float | None, dtype: torch.dtype) -> None:
    """Two moons' worth of a logistic regression with a hidden layer: 0.1 of the loss at first, in 300 steps."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    x = torch.randn(256, 2, generator=generator)
    y = ((x[:, 0] * x[:, 1]) > 0).float()  # no line parts these
    model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)).to(dtype)
    opt = Automagic8bit(model.parameters(), lr=lr)
    losses = []
    for _ in range(300):
        opt.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(x.to(dtype))[:, 0].float(), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[0] > 0.6
    assert losses[-1] < 0.15
