"""A step as those who call it see it: what moves, what is left alone, what is returned."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from optimizer_cases import BIG, bits
from torch import nn

from automagic_bnb import Automagic, Automagic8bit

SHAPES = [(), (1,), (255,), (256,), (257,), (0,), (0, 5), (5, 0), (7, 1), (1, 7), (5, 3, 3, 3), (3, 300), (64, 65)]
STORAGES = {
    "32bit": {"optim_bits": 32},
    "8bit": {"optim_bits": 8, "force_8bit": True, "mask_bits": 8, "mean_bits": 32},
    "factored": {"optim_bits": 8, "force_8bit": True, "factored": True, "mask_bits": 8, "mean_bits": 32},
}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parameters_of_every_shape_move(shape: Any, dtype: torch.dtype, storage: str, tools: Any) -> None:
    """0-d, odd sizes around a block, empty, convolutions: each is stepped, stays finite and descends."""
    p = tools.parameters(shape, dtype=dtype)
    opt = Automagic(p, lr=1e-2, weight_decay=0.0, **STORAGES[storage])
    before = p[0].detach().clone()
    for _ in range(12):
        p[0].grad = torch.full_like(p[0], 0.01)
        opt.step()
    assert p[0].shape == shape
    assert p[0].dtype == dtype
    assert (p[0] < before).all()
    assert torch.isfinite(p[0]).all()
    if p[0].numel():
        assert opt.state[p[0]]["step"] == 12
        assert bits(opt, p[0]) == (32 if storage == "32bit" else 8)


def strided(kind: str, x: torch.Tensor) -> torch.Tensor:
    """The same values in another layout."""
    if kind == "channels last":
        return x.to(memory_format=torch.channels_last)
    if kind == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    return torch.stack([x, torch.full_like(x, 99)], dim=-1)[..., 0]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("what", ["parameter", "gradient", "both"])
@pytest.mark.parametrize("kind", ["channels last", "transposed", "every other element"])
def test_strides_do_not_matter(kind: str, what: str, storage: str, tools: Any) -> None:
    """A strided parameter or gradient is updated exactly as its contiguous copy, in its own memory."""
    plain, copied = (tools.parameters((16, 8, 3, 5), dtype=torch.bfloat16) for _ in range(2))
    if what != "gradient":
        copied[0].data = strided(kind, copied[0].data)
        assert not copied[0].is_contiguous()
    strides, address = copied[0].stride(), copied[0].data_ptr()
    optimizers = [Automagic(p, lr=1e-2, **STORAGES[storage]) for p in (plain, copied)]
    for step in range(12):
        for p, opt in zip((plain, copied), optimizers, strict=True):
            tools.give_gradients(p, step)
            if p is copied and what != "parameter":
                p[0].grad = strided(kind, p[0].grad)
            opt.step()
    a, b = (tools.snapshot(opt) for opt in optimizers)
    assert not tools.differences(a, b)
    assert (copied[0].stride(), copied[0].data_ptr()) == (strides, address)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_may_have_another_dtype_than_its_parameter(dtype: torch.dtype, tools: Any) -> None:
    """A float32 gradient of a half-precision parameter counts at its own precision."""
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch ties a gradient's dtype to its parameter's")
    same, wide, finer = (tools.parameters(BIG, dtype=dtype) for _ in range(3))
    for p in (wide[0], finer[0]):
        p.grad_dtype = torch.float32
    optimizers = [Automagic8bit(p, lr=1e-2) for p in (same, wide, finer)]
    for step in range(5):
        tools.give_gradients(same, step)
        wide[0].grad = same[0].grad.float()
        finer[0].grad = same[0].grad.float() * (1 + 2**-12)
        for opt in optimizers:
            opt.step()
    equal, close = tools.snapshot(optimizers[1]), tools.snapshot(optimizers[2])
    assert not tools.differences(tools.snapshot(optimizers[0]), equal)
    assert tools.differences(close["state"], equal["state"])


def test_parameters_without_a_gradient_are_left_alone(tools: Any) -> None:
    """No gradient: no state, no change, no step counted; whether one parameter has none or all."""
    a, b = tools.parameters(BIG, BIG)
    opt = Automagic8bit([a, b], lr=1e-3)
    before = tools.snapshot(opt)
    opt.step()
    assert not tools.differences(before, tools.snapshot(opt))
    tools.train(opt, [a], range(2))
    assert opt.state[a]["step"] == 2
    assert not opt.state.get(b)
    assert torch.equal(before["parameters"][1], b)


def test_a_parameter_may_be_frozen_for_a_while(tools: Any) -> None:
    """Its own step counter stands still meanwhile; afterwards it goes on where it stopped."""
    a, b = tools.parameters(BIG, BIG)
    c, d = tools.parameters(BIG, BIG)
    opt, reference = Automagic8bit([a, b], lr=1e-3), Automagic8bit([c, d], lr=1e-3)
    for step in (0, 1, 2, 3):
        frozen = step in (1, 2)
        b.requires_grad_(not frozen)
        tools.give_gradients([a, b], step)
        if frozen:
            b.grad = None
        opt.step()
        if not frozen:
            tools.give_gradients([c, d], step)
            reference.step()
    assert (opt.state[a]["step"], opt.state[b]["step"]) == (4, 2)
    assert not tools.differences([b.detach(), opt.state[b]], [d.detach(), reference.state[d]])


def test_a_sparse_gradient_is_an_error_with_a_remedy(tools: Any) -> None:
    """The message names the shape and what to do."""
    embedding = nn.Embedding(70, 64, sparse=True)
    opt = Automagic8bit(embedding.parameters(), lr=1e-3)
    embedding(torch.tensor([1, 2])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"\(70, 64\) is sparse.*sparse=False"):
        opt.step()
    assert torch.equal(before, embedding.weight)


def test_a_closure_is_called_once_with_gradients_enabled(tools: Any) -> None:
    """Its result is returned; inside `no_grad` too; without one, None is."""
    (p,) = tools.parameters(BIG)
    opt = Automagic8bit([p], lr=1e-3)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    before = p.square().sum().item()
    with torch.no_grad():
        assert opt.step(closure).item() == before
    assert calls == [True]
    assert p.square().sum().item() < before
    assert opt.step() is None


def test_step_is_a_bound_method(tools: Any) -> None:
    """Schedulers look for `step.__func__`, on the instance and on the class."""
    opt = Automagic8bit(tools.parameters(BIG), lr=1e-3)
    assert opt.step.__self__ is opt
    assert opt.step.__func__ is Automagic8bit.step
    schedulers = [torch.optim.lr_scheduler.LambdaLR(opt, lambda _: 1.0) for _ in range(2)]
    opt.step()
    schedulers[0].step()


def test_step_hooks_run_once_each(tools: Any) -> None:
    """torch's hooks around `step` work."""
    p = tools.parameters(BIG)
    opt = Automagic8bit(p, lr=1e-3)
    seen: list[str] = []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    tools.train(opt, p, range(2))
    assert seen == ["before", "after"] * 2


@pytest.mark.parametrize("lr", [1e-3, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_global_random_state_is_untouched(lr: float | None, dtype: torch.dtype, tools: Any) -> None:
    """Neither building nor stepping draws from or seeds torch's, numpy's or Python's generator."""
    import random

    import numpy as np

    p = tools.parameters(BIG, (16, 300), (300,), dtype=dtype)
    p[1]._is_lora_layer = True
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    opt = Automagic8bit(p, lr=lr, percentile_clipping=90)
    tools.train(opt, p, range(11))
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()


def test_the_seed_of_the_random_bits_is_an_option(tools: Any) -> None:
    """The same seed repeats a run bit for bit, whatever the global seed; another one does not."""
    results = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 5)):
        torch.manual_seed(global_seed)
        p = tools.parameters(BIG, dtype=torch.bfloat16)
        tools.train(Automagic8bit(p, lr=1e-3, seed=seed), p, range(5))
        results.append(p[0].detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_two_optimizers_take_turns(tools: Any) -> None:
    """Alternating with another optimizer changes nothing."""
    alone, first, second = (tools.parameters(BIG, (300,), dtype=torch.bfloat16) for _ in range(3))
    expected, a = Automagic8bit(alone, lr=1e-3), Automagic8bit(first, lr=1e-3)
    b = Automagic8bit(second, factored=True, force_8bit=True)
    tools.train(expected, alone, range(6))
    for step in range(6):
        tools.train(a, first, range(step, step + 1))
        tools.train(b, second, range(step, step + 1))
    assert not tools.differences(tools.snapshot(expected), tools.snapshot(a))
    assert tools.differences(tools.snapshot(a)["parameters"], tools.snapshot(b)["parameters"])


@pytest.mark.parametrize("method", ["step_parameter", "update_step"])
@pytest.mark.parametrize("lr", [1e-3, None])
@pytest.mark.parametrize("storage", STORAGES)
def test_stepping_one_parameter_at_a_time_equals_step(storage: str, lr: Any, method: str, tools: Any) -> None:
    """As a backward pass that updates while it runs does, in whatever order the gradients arrive."""
    together, alone = (tools.parameters(BIG, (300,), (16, 64), dtype=torch.bfloat16) for _ in range(2))
    for p in (together, alone):
        p[2]._is_lora_layer = True
    a, b = (Automagic(p, lr=lr, **STORAGES[storage]) for p in (together, alone))
    for step in range(12):
        tools.train(a, together, range(step, step + 1))
        tools.give_gradients(alone, step)
        group = b.param_groups[0]
        for i in (2, 0, 1):
            b.step_parameter(alone[i], group, i) if method == "step_parameter" else b.update_step(group, alone[i], 0, i)
    assert not tools.differences(tools.snapshot(a), tools.snapshot(b))
    assert b.supports_fused_back_pass() is True


def test_stepping_a_parameter_without_a_gradient_does_nothing(tools: Any) -> None:
    """The one-parameter step has the same rule as `step`."""
    p = tools.parameters(BIG)
    opt = Automagic8bit(p, lr=1e-3)
    opt.step_parameter(p[0], opt.param_groups[0], 0)
    assert not opt.state.get(p[0])


def test_the_schedulers_lr_is_read_and_never_written(tools: Any) -> None:
    """`lr` belongs to the schedule: at 0 nothing moves; what it holds, of any numeric type, stays as it is."""
    p = tools.parameters(BIG)
    opt = Automagic8bit(p, lr=1e-3)
    group = opt.param_groups[0]
    for value in (0.0, torch.tensor(0.0), 5e-4, torch.tensor(5e-4)):
        before = p[0].detach().clone()
        group["lr"] = value
        tools.train(opt, p, range(2))
        assert group["lr"] is value
        assert torch.equal(before, p[0]) == (float(value) == 0.0)


def test_a_wrapper_may_put_another_tensor_in_a_parameters_place(tools: Any) -> None:
    """As sharding does after construction: the new tensor takes the place of the old."""
    p, q, r = tools.parameters(BIG, BIG), tools.parameters(BIG, BIG), tools.parameters(BIG, BIG)
    opt, expected = Automagic8bit(p, lr=1e-3), Automagic8bit(r, lr=1e-3)
    opt.param_groups[0]["params"][1] = q[1]
    tools.train(opt, [p[0], q[1]], range(3))
    tools.train(expected, r, range(3))
    assert not tools.differences(tools.snapshot(expected), tools.snapshot(opt))
    copy.deepcopy(opt)


def test_rates_are_reported_without_synchronising(tools: Any) -> None:
    """Given rates are plain floats; rates being found are 0-d tensors that nothing has read."""
    p = tools.parameters(BIG, (300,))
    opt = Automagic8bit([{"params": p[:1], "lr": 1e-3}, {"params": p[1:], "lr": 2e-3}])
    assert opt.get_learning_rates() == [1e-3, 2e-3]
    assert opt.get_avg_learning_rate() == pytest.approx((4096 * 1e-3 + 300 * 2e-3) / 4396)
    found = Automagic8bit(p)
    assert found.get_learning_rates() == [1e-4]
    tools.train(found, p, range(3))
    (rate,) = found.get_learning_rates()
    assert isinstance(rate, torch.Tensor)
    assert rate.shape == ()
    assert float(rate) >= 0.999 * 1e-4


def test_rates_of_what_was_never_stepped_are_an_error(tools: Any) -> None:
    """A KeyError that says so, and no empty state left behind."""
    p = tools.parameters(BIG, (300,))
    opt = Automagic8bit(p[:1])
    for x in p:
        with pytest.raises(KeyError, match="has not been stepped by this optimizer"):
            opt.element_learning_rates(x)
    assert not opt.state
    opt = Automagic8bit(p[:1], lr=1e-3)
    tools.train(opt, p[:1], range(1))
    opt.param_groups[0]["auto_lr"] = True  # found from the next step on
    assert opt.element_learning_rates(p[0]).shape == p[0].shape
