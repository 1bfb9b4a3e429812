"""The places an optimizer is put into: scalers, averaged models, and what trainers take for granted.

The trainers themselves are in `test_trainers`, which needs their packages.
"""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from compatibility_cases import BIG, fit, loss_of, network

from automagic_bnb import Automagic8bit

# --------------------------------------------------------------------------------------------------------- loss scaling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_grad_scaler_skips_an_infinite_gradient(dtype: torch.dtype, tools: Any) -> None:
    """The step never happens: parameters and state are the very bits of before; then training goes on."""
    model = network(dtype)
    opt = Automagic8bit(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def scaled(step: int, spoil: bool) -> None:
        opt.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if spoil:
            model[2].weight.grad[3, 5] = float("inf")
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(opt, None)  # accelerate passes the closure on, positionally
        scaler.update()

    scaled(0, spoil=False)
    for spoil in (True, False):
        before = tools.snapshot(opt)
        scaled(1, spoil)
        assert bool(tools.differences(before, tools.snapshot(opt))) == (not spoil)
    assert scaler.get_scale() == 2.0**9


def test_a_first_gradient_that_is_infinite_leaves_no_state() -> None:
    """Skipped before the state exists."""
    model = network()
    opt = Automagic8bit(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0) * float("inf")).backward()
    scaler.step(opt)
    assert not any(opt.state.values())


@pytest.mark.parametrize("storage", [{"optim_bits": 32}, {"force_8bit": True}, {"factored": True}])
def test_float16_parameters_and_gradients(storage: dict[str, Any], tools: Any) -> None:
    """They train; elements whose float16 gradient overflowed are skipped, the others move."""
    (p,) = tools.parameters(BIG, dtype=torch.float16)
    opt = Automagic8bit([p], lr=1e-2, weight_decay=0.0, **storage)
    tools.train(opt, [p], range(3))
    before = p.detach().clone()
    tools.give_gradients([p], 3)
    p.grad[0, :8] = float("inf")
    p.grad[1, :8] = float("nan")
    opt.step()
    assert torch.isfinite(p).all()
    assert torch.equal(p[:2, :8], before[:2, :8])
    assert (p != before).float().mean() > 0.5


# ------------------------------------------------------------------------------------------------ trainers' conventions


def kohya_optimizer(name: str, args: list[str], params: Any, lr: float) -> Any:
    """As sd-scripts does it: a dotted name to import, `key=value` arguments read as Python literals."""
    kwargs = {}
    for arg in args:
        key, value = arg.split("=")
        kwargs[key] = ast.literal_eval(value)
    module, _, cls = name.rpartition(".")
    return getattr(importlib.import_module(module), cls)(params, lr=lr, **kwargs)


def test_kohya_style_arguments(tools: Any) -> None:
    """Every kind of value that its command line can express."""
    args = [
        "betas=(0.8,0.9)",
        "weight_decay=0.1",
        "came=False",
        "warmup_steps=10",
        "profile='memory_optimized'",
        "seed=3",
    ]
    p = tools.parameters(BIG)
    opt = kohya_optimizer("automagic_bnb.Automagic8bit", args, [{"params": p, "lr": 1e-4}], 1e-4)
    tools.train(opt, p, range(2))
    c = opt.config
    assert (c.betas, c.weight_decay, c.came, c.warmup_steps, c.factored) == ((0.8, 0.9, 0.999), 0.1, False, 10, True)
    with pytest.raises(TypeError, match="did you mean 'warmup_steps'"):
        kohya_optimizer("automagic_bnb.Automagic8bit", ["warmup_step=10"], p, 1e-4)


def test_raw_text_arguments(tools: Any) -> None:
    """As axolotl and LLaMA-Factory hand `optim_args` over: every value a string."""
    text = "lr=1e-4 weight_decay=0.1 betas=0.8,0.9 cautious=False warmup_steps=10 optim_bits=32 lora=None eps=1e-8"
    kwargs: dict[str, Any] = dict(pair.split("=") for pair in text.split())
    c = Automagic8bit(tools.parameters(BIG), **kwargs).config
    assert (c.lr, c.betas, c.cautious, c.optim_bits, c.lora) == (1e-4, (0.8, 0.9, 0.999), False, 32, None)
    assert c.eps == (pytest.approx(1e-16), 1e-16)


def test_a_state_dict_loaded_into_its_own_optimizer_changes_nothing(tools: Any) -> None:
    """accelerate's `prepare` does that, before the first step or later."""
    opt = Automagic8bit(tools.parameters(BIG, (300,), dtype=torch.bfloat16))
    for steps in (range(0), range(3)):
        tools.train(opt, opt.param_groups[0]["params"], steps)
        before = tools.snapshot(opt)
        opt.load_state_dict(opt.state_dict())
        assert not tools.differences(before, tools.snapshot(opt))


def test_signatures_that_trainers_look_at() -> None:
    """`zero_grad(set_to_none)` is inspected by accelerate, a `grad_scaler` of `step` by torch's GradScaler."""
    assert "set_to_none" in inspect.signature(Automagic8bit.zero_grad).parameters
    assert list(inspect.signature(Automagic8bit.step).parameters)[:2] == ["self", "closure"]
    assert "grad_scaler" not in inspect.signature(Automagic8bit.step).parameters
    assert list(inspect.signature(Automagic8bit).parameters)[:2] == ["params", "lr"]
    assert inspect.isclass(Automagic8bit)


def test_a_closure_by_keyword_trains() -> None:
    """Lightning always steps through `step(closure=…)`."""
    model = network()
    opt = Automagic8bit(model.parameters(), lr=3e-3)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = loss_of(model, len(calls) % 4)
        loss.backward()
        return loss

    losses = [opt.step(closure=closure).item() for _ in range(24)]
    assert calls == [True] * 24
    assert sum(losses[-4:]) < sum(losses[:4])


@pytest.mark.parametrize("lr", [1e-3, None])
def test_a_backward_pass_that_steps(lr: float | None, tools: Any) -> None:
    """OneTrainer's fused backward: each gradient is used and dropped as it arrives; the result is that of `step()`."""
    model, fused = network(torch.bfloat16), network(torch.bfloat16)
    opt, fused_opt = (Automagic8bit(m.parameters(), lr=lr) for m in (model, fused))
    assert fused_opt.supports_fused_back_pass()
    group = fused_opt.param_groups[0]
    for i, p in enumerate(group["params"]):

        def step_and_drop(tensor: torch.Tensor, i: int = i) -> None:
            fused_opt.step_parameter(tensor, group, i)
            tensor.grad = None

        p.register_post_accumulate_grad_hook(step_and_drop)
    for step in range(6):
        fit(model, opt, range(step, step + 1))
        loss_of(fused, step).backward()
        fused_opt.step()  # nothing is left to do
    assert not tools.differences(tools.snapshot(opt), tools.snapshot(fused_opt))


def test_the_rate_found_is_logged_as_effective_lr(tools: Any) -> None:
    """OneTrainer reads it from the group in place of `lr`; where the rate is given there is none."""
    p, q = tools.parameters(BIG), tools.parameters(BIG)
    found, given = Automagic8bit(p), Automagic8bit(q, lr=1e-3)
    tools.train(found, p, range(10))
    tools.train(given, q, range(10))
    group = found.param_groups[0]
    assert float(group["effective_lr"]) == float(group["auto_lr_rate"])
    group["lr"] *= 0.5  # a schedule
    tools.train(found, p, range(10, 11))
    assert float(group["effective_lr"]) == pytest.approx(0.5 * float(group["auto_lr_rate"]))
    assert "effective_lr" not in given.param_groups[0]


def test_a_rate_reset_after_resuming_is_the_rate(tools: Any) -> None:
    """ai-toolkit loads a checkpoint, then writes both rates: the steps of one built with that rate."""
    options = {"min_lr": 1.9e-4, "max_lr": 1e-3, "weight_decay": 0.0, "optim_bits": 32}
    p, q, r = (tools.parameters(BIG) for _ in range(3))
    opt, expected, unchanged = (Automagic8bit(x, lr=lr, **options) for x, lr in ((p, 1e-3), (q, 2e-4), (r, 1e-3)))
    moves = []
    for o, (x,) in ((opt, p), (expected, q), (unchanged, r)):
        tools.train(o, [x], range(6))
        file = io.BytesIO()
        torch.save(o.state_dict(), file)
        file.seek(0)
        o.load_state_dict(torch.load(file, weights_only=True))
        if o is opt:
            o.param_groups[0]["lr"] = o.param_groups[0]["initial_lr"] = 2e-4
        before = x.detach().clone()
        tools.train(o, [x], range(6, 9))
        moves.append(x.detach() - before)
    assert opt.get_avg_learning_rate() == 2e-4
    # θ is about 0.1 and moves by about 1e-3: float32 keeps 4 digits of that.
    assert (moves[0] - moves[1]).norm() < 1e-3 * moves[1].norm()
    assert (moves[0] - moves[2]).norm() > moves[1].norm()


@pytest.mark.parametrize("lr", [1e-3, None])
def test_the_rate_is_there_as_a_tensor(lr: float | None, tools: Any) -> None:
    """diffusion-pipe averages `_get_lr(group, state)` over parameters: 0-d, on their device, for an empty state too."""
    p = tools.parameters(BIG, (3,))
    opt = Automagic8bit(p, lr=lr)
    for steps in (range(0), range(2)):
        tools.train(opt, p, steps)
        rates = [opt._get_lr(opt.param_groups[0], opt.state[x]) for x in p] + [opt._get_lr(opt.param_groups[0], {})]
        mean = torch.stack(rates).mean()
        assert all(r.shape == () and r.dtype == torch.float32 and r.device == p[0].device for r in rates)
        assert mean.item() == pytest.approx(lr or 1e-4, rel=1e-5)


def test_one_optimizer_for_each_tensor(tools: Any) -> None:
    """diffusion-pipe's gradient release builds one per parameter; each trains and saves alone."""
    model = network(torch.bfloat16)
    optimizers = {p: Automagic8bit([p], lr=1e-3) for p in model.parameters()}

    def step_and_release(p: torch.Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step_and_release)
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(3):
        loss_of(model, step).backward()
    for p, start in zip(model.parameters(), before, strict=True):
        assert p.grad is None
        assert not torch.equal(p, start)
        optimizers[p].load_state_dict(copy.deepcopy(optimizers[p].state_dict()))


def test_an_averaged_model_and_gradient_accumulation() -> None:
    """torch's own companions of an optimizer: EMA of the weights, clipping, several backward passes a step."""
    model = network()
    opt = Automagic8bit(model.parameters(), lr=3e-3)
    average = torch.optim.swa_utils.AveragedModel(model)
    first = last = math.nan
    for step in range(20):
        opt.zero_grad()
        last = sum((loss_of(model, step + i) / 2).item() for i in range(2))
        first = last if step == 0 else first
        for i in range(2):
            (loss_of(model, step + i) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        average.update_parameters(model)
    assert last < first


def test_the_pages_tell_of_deepspeed() -> None:
    """DeepSpeed replaces unknown optimizers under CPU offload without a word; the page of trainers names the switch."""
    readme = Path(__file__).parents[1] / "docs" / "trainers.md"
    if not readme.exists():
        pytest.skip("this checkout has no docs")
    assert "zero_force_ds_cpu_optimizer" in readme.read_text(encoding="utf-8")
