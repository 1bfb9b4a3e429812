"""The places an optimizer is put into: schedules, scalers, checkpoint tools, several processes, trainers' conventions.

The trainers themselves are in `test_trainers`, which needs their packages.
"""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import io
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import lr_scheduler as schedules

from automagic_bnb import Automagic8bit

BIG = (64, 64)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same weights at every call."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.1
    return model.to(dtype)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    """A loss whose data hang on the step alone."""
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    x = torch.randn(16, 64, generator=generator).to(dtype)
    return (model(x) - x.flip(1)).float().square().mean()


def fit(model: nn.Module, opt: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        opt.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


# ------------------------------------------------------------------------------------------------------------ schedules

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "constant": lambda o: schedules.ConstantLR(o, factor=1.0),
    "warm-up from 0": lambda o: schedules.LambdaLR(o, lambda step: min(1.0, step / 4)),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, T_max=10),
    "linear to 0": lambda o: schedules.LinearLR(o, 1.0, 0.0, total_iters=10),
    "one cycle": lambda o: schedules.OneCycleLR(o, max_lr=1e-2, total_steps=12),
    "cyclic": lambda o: schedules.CyclicLR(o, base_lr=1e-4, max_lr=1e-3, step_size_up=3),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "sequence": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, 1.0, total_iters=3), schedules.ExponentialLR(o, 0.5)], milestones=[3]
    ),
}


@pytest.mark.parametrize("lr", [1e-3, None])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_drive_the_rate(name: str, lr: float | None, tools: Any) -> None:
    """`lr` is at every step what the schedule makes of AdamW's; steps at rate 0 move nothing, others do."""
    p, q = tools.parameters(BIG), tools.parameters(BIG)
    opt, adam = Automagic8bit(p, lr=lr), torch.optim.AdamW(q, lr=lr or 1e-6)
    driving, expected = SCHEDULES[name](opt), SCHEDULES[name](adam)
    for step in range(11):
        assert opt.param_groups[0]["lr"] == adam.param_groups[0]["lr"]
        before = p[0].detach().clone()
        tools.train(opt, p, range(step, step + 1))
        tools.train(adam, q, range(step, step + 1))
        assert torch.equal(before, p[0]) == (opt.param_groups[0]["lr"] == 0)
        for scheduler in (driving, expected):
            scheduler.step(*([1.0] if name == "plateau" else []))
    assert type(opt.param_groups[0]["betas"]) is tuple
    assert torch.isfinite(p[0]).all()


@pytest.mark.parametrize("lr", [1e-3, None])
def test_a_constant_schedule_changes_nothing(lr: float | None, tools: Any) -> None:
    """Against no schedule at all, bit for bit."""
    p, q = tools.parameters(BIG, dtype=torch.bfloat16), tools.parameters(BIG, dtype=torch.bfloat16)
    plain, scheduled = Automagic8bit(p, lr=lr), Automagic8bit(q, lr=lr)
    scheduler = SCHEDULES["constant"](scheduled)
    tools.train(plain, p, range(8))
    tools.train(scheduled, q, range(8), after=scheduler.step)
    assert not tools.differences(tools.snapshot(plain)["parameters"], tools.snapshot(scheduled)["parameters"])


def test_a_schedule_scales_every_step(tools: Any) -> None:
    """Half the rate moves half as far, the bounds of the rates moving along; a wrong factor would show."""
    moves = []
    for factor in (1.0, 0.5):
        p = tools.parameters(BIG)
        opt = Automagic8bit(p, lr=1e-3, min_lr=9e-4, max_lr=1.1e-3)
        scheduler = schedules.LambdaLR(opt, lambda step, f=factor: f if step == 5 else 1.0)
        tools.train(opt, p, range(5), after=scheduler.step)
        before = p[0].detach().clone()
        tools.train(opt, p, range(5, 6))
        moves.append(p[0].detach() - before)
    # θ is about 0.1 and moves by about 1e-4: float32 keeps 3 digits of that.
    assert (moves[1] - moves[0] / 2).norm() < 1e-3 * moves[1].norm()


def test_one_cycle_turns_the_first_beta(tools: Any) -> None:
    """Its momentum cycle finds `betas` in the defaults and writes a tuple that the step reads."""
    p = tools.parameters(BIG)
    opt = Automagic8bit(p, lr=1e-3)
    scheduler = schedules.OneCycleLR(opt, max_lr=1e-2, total_steps=10, base_momentum=0.5, max_momentum=0.9)
    seen = []
    tools.train(opt, p, range(9), after=lambda: (scheduler.step(), seen.append(opt.param_groups[0]["betas"])))
    assert min(b[0] for b in seen) == pytest.approx(0.5, abs=0.1)
    assert {b[1:] for b in seen} == {(0.99, 0.999)}


@pytest.mark.parametrize("lr", [1e-3, None])
def test_a_schedule_and_its_optimizer_resume_together(lr: float | None) -> None:
    """5 steps, save, load into fresh ones, 5 steps: the bits of 10 steps."""
    model = network(torch.bfloat16)
    opt = Automagic8bit(model.parameters(), lr=lr)
    scheduler = SCHEDULES["one cycle"](opt)
    for step in range(5):
        fit(model, opt, range(step, step + 1))
        scheduler.step()
    file = io.BytesIO()
    torch.save([model.state_dict(), opt.state_dict(), scheduler.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = network(torch.bfloat16)
    fresh_opt = Automagic8bit(fresh.parameters(), lr=lr)
    fresh_scheduler = SCHEDULES["one cycle"](fresh_opt)
    for each, part in zip((fresh, fresh_opt, fresh_scheduler), saved, strict=True):
        each.load_state_dict(part)
    for m, o, s in ((model, opt, scheduler), (fresh, fresh_opt, fresh_scheduler)):
        for step in range(5, 10):
            fit(m, o, range(step, step + 1))
            s.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


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


# ----------------------------------------------------------------------------------------- torch.distributed.checkpoint


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("lr", [1e-3, None])
@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoint_round_trip(
    flat: bool, lr: float | None, on_disk: bool, tools: Any, tmp_path: Any
) -> None:
    """Into a fresh optimizer, whose state it makes by a step with zero gradients: weights stay, all else comes back."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, fresh = network(torch.bfloat16), network(torch.bfloat16)
    opt, fresh_opt = (Automagic8bit(m.parameters(), lr=lr) for m in (model, fresh))
    fit(model, opt, range(5))
    fresh.load_state_dict(model.state_dict())
    weights = [p.detach().clone() for p in fresh.parameters()]
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt, options=options))
    if on_disk:
        save({"optimizer": saved}, checkpoint_id=tmp_path)
        saved = get_optimizer_state_dict(fresh, fresh_opt, options=options)
        load({"optimizer": saved}, checkpoint_id=tmp_path)
    set_optimizer_state_dict(fresh, fresh_opt, saved, options=options)
    assert not tools.differences(weights, [p.detach() for p in fresh.parameters()])
    assert not tools.differences(tools.snapshot(opt), tools.snapshot(fresh_opt))
    assert fit(model, opt, range(5, 8)) == fit(fresh, fresh_opt, range(5, 8))


# ---------------------------------------------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes connected by gloo have seen: see `distributed_worker`."""
    out = tmp_path_factory.mktemp("distributed")
    script = Path(__file__).with_name("distributed_worker.py")
    command = [sys.executable, str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([*command, str(rank), str(out / "store"), str(out)], env=environment, stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]
    errors = [worker.communicate(timeout=300)[1].decode()[-3000:] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_replicas_stay_equal(two_processes: list[dict[str, Any]], tools: Any) -> None:
    """DDP with data and global seeds of their own: after 20 steps weights and states are the same bits."""
    first, second = (seen["replicas"] for seen in two_processes)
    assert not tools.differences(first, second)
    first, second = (seen["replicas with seeds of their own"] for seen in two_processes)
    assert tools.differences(first, second)  # the negative control: other random bits show


def test_shards_step_as_the_whole(two_processes: list[dict[str, Any]], tools: Any) -> None:
    """FSDP2 on shards of whole blocks is bit-equal where a step looks at single blocks only."""
    seen = two_processes[0]["aligned"]
    assert not tools.differences(seen["sharded"], seen["whole"])
    assert tools.differences(seen["sharded"], seen["start"])


def test_shards_stay_close_to_the_whole_with_every_feature(two_processes: list[dict[str, Any]]) -> None:
    """Across a shard's edge the filter has no neighbours, W is the shard's mean, random bits count from its start."""
    for whole, shards, start in zip(
        *(two_processes[0]["default"][k] for k in ("whole", "sharded", "start")), strict=True
    ):
        assert (shards - whole).norm() < 0.1 * (whole - start).norm()


def test_shards_are_saved_by_each_process(two_processes: list[dict[str, Any]]) -> None:
    """The own file resumes bit for bit; another's is refused, and saving says how to save."""
    for rank, seen in enumerate(two_processes):
        assert seen["own files"]["equal"]
        assert f"holds shard {1 - rank}, here is {rank}" in seen["own files"]["error"]
        assert any("one file for each process" in warning for warning in seen["own files"]["warnings"])


def test_a_gathered_checkpoint_of_shards_is_refused(two_processes: list[dict[str, Any]]) -> None:
    """torch.distributed.checkpoint keeps one process's part: the other says so rather than train on it."""
    assert two_processes[0]["gathered file"] == ""
    assert "holds shard 0, here is 1" in two_processes[1]["gathered file"]


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[Any]:
    """A process group of this process alone, and its mesh."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"factored": True}, {"lr": None}, {"optim_bits": 32, "lora": True}], ids=str)
def test_a_world_of_one_is_unsharded(options: dict[str, Any], one_process: Any, tools: Any) -> None:
    """FSDP2 over one process: DTensors step, save, load and copy as plain parameters do, bit for bit."""
    options = {"lr": 1e-3, **options}
    plain, wrapped = network(torch.bfloat16), fully_shard(network(torch.bfloat16), mesh=one_process)
    a, b = (Automagic8bit(m.parameters(), **options) for m in (plain, wrapped))
    for step in range(12):
        tools.train(a, list(plain.parameters()), range(step, step + 1))
        for p, q in zip(plain.parameters(), wrapped.parameters(), strict=True):
            q.grad = distribute_tensor(p.grad, one_process, [Shard(0)])
        b.step()
        if step == 5:
            b.load_state_dict(copy.deepcopy(b.state_dict()))
    x, y = tools.snapshot(a), tools.snapshot(b)
    y["parameters"] = [p.full_tensor() for p in y["parameters"]]
    assert not tools.differences(x, y)


def test_a_sharded_model_learns(one_process: Any) -> None:
    """Forward, backward and step together."""
    model = fully_shard(network(), mesh=one_process)
    opt = Automagic8bit(model.parameters(), lr=3e-3)
    losses = fit(model, opt, range(30))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


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
        assert mean.item() == pytest.approx(lr or 1e-6, rel=1e-5)


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


def test_the_readme_tells_of_deepspeed() -> None:
    """DeepSpeed replaces unknown optimizers under CPU offload without a word; the README names the switch."""
    readme = Path(__file__).parents[1] / "README.md"
    if not readme.exists():
        pytest.skip("this checkout has no README.md")
    assert "zero_force_ds_cpu_optimizer" in readme.read_text(encoding="utf-8")
