"""The kernels and memory: where tensors lie is of no account, and nothing is written that is not theirs.

Interpreted on the CPU where there is no CUDA device, compiled where there is one: see `kernel_cases`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from kernel_cases import (
    BITS,
    FEW_SHAPES,
    NEEDS_GPU,
    follow,
    give,
    gradient,
    optimizer,
    parameters,
    parameters_of,
    steady,
)
from torch import Tensor

from automagic_bnb.optimizer import Automagic

pytest.importorskip("automagic_bnb.kernels.step", reason="the kernels need Triton")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy: 1 / 0 in masked lanes

Gradients = Callable[[tuple[int, ...], int, int], Tensor]


def run_kernels(
    storage: str = "8bit",
    before: Callable[[Automagic, int], Automagic | None] | None = None,
    steps: int = 3,
    step_with: Callable[[Automagic], Any] = Automagic.step,
    gradients: Gradients = gradient,
    **options: Any,
) -> Automagic:
    """Some steps of the kernels over bfloat16.

    Args:
        before: done to the optimizer before each step, after it has its gradients; may give another in its place.
    """
    opt = optimizer(parameters(FEW_SHAPES, torch.bfloat16), "triton", storage, **options)
    for number in range(1, steps + 1):
        for index, p in enumerate(parameters_of(opt)):
            give(p, gradients(tuple(p.shape), index, number))
        if before is not None:
            opt = before(opt, number) or opt
        step_with(opt)
    return opt


def differing_bits(tools: Any, a: Automagic, b: Automagic) -> list[str]:
    """Where parameters, states or groups of two optimizers differ."""
    return tools.differences(tools.snapshot(a), tools.snapshot(b))


@pytest.fixture(scope="module")
def undisturbed() -> Callable[[str], Automagic]:
    """The run that the others are compared with bit for bit, by storage."""
    made: dict[str, Automagic] = {}

    def of(storage: str) -> Automagic:
        if storage not in made:
            made[storage] = run_kernels(storage)
        return made[storage]

    return of


REPLACED: list[Any] = []
"""What was replaced is kept: a kernel that missed it then fails the test, and spoils no one else's memory."""


def nothing(opt: Automagic, number: int) -> None:
    """The same again."""


def gradients_move(opt: Automagic, number: int) -> None:
    """Gradients of the same values elsewhere in memory, transposed, or at an odd address."""
    for p in parameters_of(opt):
        if number == 1 and p.dim() == 2:
            p.grad = p.grad.t().contiguous().t()
        elif number == 2:
            padded = torch.zeros(p.numel() + 1, dtype=p.dtype, device=p.device)
            padded[1:] = p.grad.view(-1)
            p.grad = padded[1:].view(p.shape)


def parameters_move(opt: Automagic, number: int) -> None:
    """`.data` replaced: by a copy, then by a view at an odd address."""
    for p in parameters_of(opt):
        REPLACED.append(p.data)
        if number == 2:
            p.data = p.data.clone()
        elif number == 3:
            padded = torch.zeros(p.numel() + 1, dtype=p.dtype, device=p.device)
            padded[1:] = p.data.view(-1)
            p.data = padded[1:].view(p.shape)


def states_are_replaced(opt: Automagic, number: int) -> None:
    """Every tensor of the state by a copy, as offloading to the host and back does."""
    for state in opt.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and number > 1:
                REPLACED.append(value)
                state[name] = value.clone()


def states_move(opt: Automagic, number: int) -> None:
    """The memory under every tensor of the state, the tensors staying."""
    for state in opt.state.values():
        for value in state.values():
            if isinstance(value, Tensor) and number > 1:
                REPLACED.append(value.data)
                value.data = value.data.clone()


def state_dicts_are_replaced(opt: Automagic, number: int) -> None:
    """Each parameter's dict, and all tensors in it, by copies."""
    for p, state in list(opt.state.items()):
        REPLACED.append(state)
        opt.state[p] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}


def replace_one(opt: Automagic, number: int, name: str) -> None:
    """One tensor of the second parameter's state by a copy, before the third step."""
    if number == 3:
        state = opt.state[parameters_of(opt)[1]]
        REPLACED.append(state[name])
        state[name] = state[name].clone()


def second_moment_is_replaced(opt: Automagic, number: int) -> None:
    """Codes of three elements."""
    replace_one(opt, number, "state2")


def absmax_is_replaced(opt: Automagic, number: int) -> None:
    """A tensor of one element."""
    replace_one(opt, number, "absmax2" if "absmax2" in opt.state[parameters_of(opt)[1]] else "torque")


def state_dict_is_loaded(opt: Automagic, number: int) -> None:
    """Its own, in the middle, over states that have been spoilt."""
    if number == 3:
        saved = copy.deepcopy(opt.state_dict())
        for state in opt.state.values():
            for name in ("state1", "state2", "torque"):
                state[name].zero_()
        opt.load_state_dict(saved)


def run_is_resumed(opt: Automagic, number: int) -> Automagic | None:
    """By a new optimizer over copies of the parameters."""
    if number != 3:
        return None
    fresh = [torch.nn.Parameter(p.detach().clone()) for p in parameters_of(opt)]
    for p, q in zip(parameters_of(opt), fresh, strict=True):
        give(q, p.grad)
    resumed = optimizer(fresh, "triton", "32bit" if opt.config.optim_bits == 32 else "8bit")
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    return resumed


def optimizer_is_copied(opt: Automagic, number: int) -> Automagic | None:
    """Deeply, parameters and all; the original is stepped once more and must not matter."""
    if number != 2:
        return None
    copied = copy.deepcopy(opt)
    for p, q in zip(parameters_of(opt), parameters_of(copied), strict=True):
        give(q, p.grad)
    opt.step()
    return copied


DISTURBANCES = [
    nothing,
    gradients_move,
    parameters_move,
    states_are_replaced,
    states_move,
    state_dicts_are_replaced,
    second_moment_is_replaced,
    absmax_is_replaced,
    state_dict_is_loaded,
    run_is_resumed,
    optimizer_is_copied,
]


@pytest.mark.parametrize("disturbance", DISTURBANCES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("storage", ["8bit", pytest.param("32bit", marks=NEEDS_GPU)])
def test_bits_do_not_depend_on_memory(
    disturbance: Any, storage: str, undisturbed: Callable[[str], Automagic], tools: Any
) -> None:
    """Whatever moves, is replaced or is resumed between steps: the run ends in the very bits of the undisturbed one."""
    opt = run_kernels(storage, disturbance)
    assert differing_bits(tools, undisturbed(storage), opt) == []


def test_a_disturbance_is_seen(undisturbed: Callable[[str], Automagic], tools: Any) -> None:
    """Negative control: one gradient off by one spacing of bfloat16 changes the bits."""

    def nudge(opt: Automagic, number: int) -> None:
        grad = parameters_of(opt)[0].grad
        grad.view(-1)[7] = torch.nextafter(grad.view(-1)[7], torch.tensor(1.0, dtype=grad.dtype, device=grad.device))

    assert differing_bits(tools, undisturbed("8bit"), run_kernels("8bit", nudge)) != []


@pytest.mark.parametrize("options", [{}, {"lr": 9e-3, "auto_lr": True, "percentile_clipping": 50}], ids=str)
def test_stepping_parameter_by_parameter_gives_the_same_bits(options: dict[str, Any], tools: Any) -> None:
    """`step_parameter` over all parameters, in any order, equals `step`; a rate found is found from all of them."""

    def one_by_one(opt: Automagic) -> None:
        for group in opt.param_groups:
            for p in reversed(group["params"]):
                opt.step_parameter(p, group)

    steps = 20 if options else 4  # until a rate has been found
    together = run_kernels(**options, steps=steps, gradients=steady)
    separate = run_kernels(**options, steps=steps, gradients=steady, step_with=one_by_one)
    assert differing_bits(tools, together, separate) == []
    if options:
        assert together.param_groups[0]["auto_lr_rate"] > 1.1 * 9e-3


def test_ways_of_stepping_may_alternate(undisturbed: Callable[[str], Automagic], tools: Any) -> None:
    """`step` after `step_parameter` and the other way round go on from where the other left off."""
    calls = itertools.count()

    def either(opt: Automagic) -> None:
        if next(calls) % 2:
            for p in opt.param_groups[0]["params"]:
                opt.step_parameter(p, opt.param_groups[0])
        else:
            opt.step()

    opt = run_kernels(step_with=either)
    assert differing_bits(tools, undisturbed("8bit"), opt) == []


@dataclass
class Guarded:
    """A tensor's copy between two margins that must stay as they are."""

    MARGIN = 64
    whole: Tensor
    size: int
    first: int = field(default=MARGIN)

    @classmethod
    def around(cls, x: Tensor, odd: int = 0) -> Guarded:
        """The copy begins at an aligned address, plus so many elements."""
        made = cls(torch.full((x.numel() + 2 * cls.MARGIN,), 77, dtype=x.dtype, device=x.device), x.numel())
        made.first += odd
        made.inside().copy_(x.view(-1))
        return made

    def inside(self) -> Tensor:
        return self.whole[self.first : self.first + self.size]

    def is_intact(self) -> bool:
        return bool((self.whole[: self.first] == 77).all() and (self.whole[self.first + self.size :] == 77).all())


@pytest.mark.parametrize("storage", BITS)
@pytest.mark.parametrize("odd", [0, 1], ids=["aligned", "odd address"])
def test_nothing_is_written_beyond_the_ends(storage: str, odd: int) -> None:
    """Neither of parameters (at an odd address too) nor of states, and gradients are not written at all."""
    options = {"lr": 9e-3, "auto_lr": True, "percentile_clipping": 50}
    opt = optimizer(parameters(((300,), (3, 5)), torch.bfloat16), "triton", storage, **options)
    guards = []
    for index, p in enumerate(parameters_of(opt)):
        opt.init_state(opt.param_groups[0], p)
        guards.append(Guarded.around(p.data, odd))
        p.data = guards[-1].inside().view(p.shape)
        state = opt.state[p]
        for name in [k for k, v in state.items() if isinstance(v, Tensor) and not k.startswith("qmap")]:
            guards.append(Guarded.around(state[name]))
            state[name] = guards[-1].inside().view(state[name].shape)
        guard = Guarded.around(gradient(tuple(p.shape), index, 1).to(p), odd)
        guards.append(guard)
        p.grad = guard.inside().view(p.shape)
    old = [p.detach().clone() for p in parameters_of(opt)]
    grads = [p.grad.clone() for p in parameters_of(opt)]
    for _ in range(2):
        opt.step()
    assert all(guard.is_intact() for guard in guards)
    for p, before, grad in zip(parameters_of(opt), old, grads, strict=True):
        assert not torch.equal(p, before)
        assert torch.equal(p.grad, grad)


def test_strided_and_empty_parameters_are_left_to_the_reference() -> None:
    """A transposed parameter is updated in place by plain PyTorch, beside one that the kernels take."""

    def build(backend: str) -> Automagic:
        straight, strided, empty = parameters(((5, 52), (7, 9), (0, 4)), torch.float32)
        strided.data = strided.data.t().contiguous().t()
        return optimizer([straight, strided, empty], backend)

    run = follow(build, 2)
    assert run.violations("8bit") == []
    assert parameters_of(run.kernel)[1].stride() == (1, 7)
