"""The benchmark of a step leaves no trace."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
from timing_cases import ROWS, bench
from torch import Tensor, nn

from automagic_bnb import Automagic8bit, Automagic32bit, PagedAutomagic8bit
from automagic_bnb.watch.timing import Snapshot


class Net(nn.Module):
    """What a benchmark could disturb: BatchNorm's statistics, dropout's generator, frozen and foreign weights."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.frozen = nn.Linear(24, 64).requires_grad_(False)
        self.norm = nn.BatchNorm1d(64)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(64, 128)
        self.own = nn.Linear(128, 4)  # trained by somebody else
        self.register_buffer("calls", torch.zeros(1), persistent=False)
        self.register_buffer("replaced", torch.zeros(2))
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.replaced = self.replaced + 1
        return self.own(self.head(self.dropout(self.norm(self.frozen(x)))))


def optimized(model: Net) -> list[nn.Parameter]:
    return [*model.norm.parameters(), *model.head.parameters()]


def trained(make: Any, steps: int = 3) -> tuple[Net, Any]:
    """A model and its optimizer in the middle of a run, with gradients."""
    model = Net()
    opt = make(optimized(model))
    torch.manual_seed(0)  # of the dropout
    for step in range(steps):
        opt.zero_grad()
        model(torch.randn(8, 24, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        opt.step()
    return model, opt


def everything(model: nn.Module, opt: Any) -> dict[str, Any]:
    """A copy of all that the benchmark promises to leave alone."""
    parameters = [p for g in opt.param_groups for p in g["params"]]
    return {
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "modes": [m.training for m in model.modules()],
        "state": [copy.deepcopy(dict(opt.state[p])) if p in opt.state else None for p in parameters],
        "groups": [copy.deepcopy({k: v for k, v in g.items() if k != "params"}) for g in opt.param_groups],
        "random": torch.get_rng_state(),
    }


OPTIMIZERS: dict[str, Any] = {
    "8 bits, rate found": lambda p: Automagic8bit(p, min_8bit_size=1024),
    "factored": lambda p: Automagic8bit(p, lr=1e-3, profile="memory_optimized"),
    "32 bits": lambda p: Automagic32bit(p, lr=1e-3),
    "paged": lambda p: PagedAutomagic8bit(p, lr=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "AdamW, tensor rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3), foreach=False),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "AdamW8bit": lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-3, min_8bit_size=1024),
}


# ---------------------------------------------------------------------------------------------------- leaving no trace


@pytest.mark.filterwarnings("ignore:paged optimizer states")
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_everything_is_as_it_was(name: str, steps: int, tools: Any) -> None:
    """Bit for bit, in the same objects; and training goes on as if nothing had been."""
    (model, opt), (control, control_opt) = (trained(OPTIMIZERS[name], steps) for _ in range(2))
    before = everything(model, opt)
    assert not tools.differences(before, everything(control, control_opt))
    objects = [id(t) for p in optimized(model) for t in opt.state.get(p, {}).values() if isinstance(t, Tensor)]
    gradients = [p.grad for p in model.parameters()]
    bench(model, opt)
    assert not tools.differences(before, everything(model, opt))
    assert objects == [id(t) for p in optimized(model) for t in opt.state.get(p, {}).values() if isinstance(t, Tensor)]
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    for m, o in ((model, opt), (control, control_opt)):
        for step in range(12):
            o.zero_grad()
            torch.manual_seed(step)
            m(ROWS).square().mean().backward()
            o.step()
    assert not tools.differences(everything(control, control_opt), everything(model, opt))


def test_the_steps_are_real(tools: Any) -> None:
    """The negative control: inside, parameters, buffers, state, gradients and generator do move."""
    model, opt = trained(OPTIMIZERS["8 bits, rate found"])
    before, seen = everything(model, opt), []

    def forward(model: nn.Module, batch: Any) -> Tensor:
        seen.append(tools.differences(before, everything(model, opt)))
        return model(batch).square().mean()

    bench(model, opt, forward=forward)
    moved = " ".join(seen[-1])
    for place in ("head.weight", "norm.running_mean", "calls", "replaced", "/state/", "/groups/", "/random"):
        assert place in moved, place
    assert "/gradients/" in moved
    assert "/parameters/frozen" not in moved
    assert len(seen) == 3


class Broken(Exception):
    pass


@pytest.mark.parametrize("call", range(4))
@pytest.mark.parametrize("name", ["8 bits, rate found", "AdamW"])
def test_everything_is_as_it_was_after_an_error(name: str, call: int, tools: Any) -> None:
    """In the first call, in the warm-up, among the timed steps: the error comes through, the state is put back."""
    model, opt = trained(OPTIMIZERS[name])
    model.dropout.eval()
    before, calls = everything(model, opt), []

    def forward(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        model.train()
        loss = model(batch).square().mean()
        if len(calls) > call:
            with torch.no_grad():
                model.head.weight.zero_()
            raise Broken
        return loss

    with pytest.raises(Broken):
        bench(model, opt, forward=forward, warmup=2)
    assert not tools.differences(before, everything(model, opt))


def test_special_bits_come_back(tools: Any) -> None:
    """NaN of any payload, negative zero, bfloat16, empty and 0-d tensors, strided memory."""
    quiet = torch.tensor([0x7FC00001, 0x7F800001, -0x80000000, 1], dtype=torch.int32).view(torch.float32)
    holder = [quiet, torch.zeros(()), torch.zeros(0), torch.arange(12.0).view(3, 4).t(), quiet.bfloat16()]
    nest = {"a": holder, "b": (quiet, {"c": 3}), "d": None}
    expected = copy.deepcopy(nest)
    snapshot = Snapshot()
    snapshot.keep(nest)
    for tensor in holder:
        tensor.fill_(5)
    assert tools.differences(expected, nest)
    nest["b"] = "else"
    holder.append(torch.ones(1))
    nest["e"] = 1
    snapshot.restore()
    assert not tools.differences(expected, nest)
    assert nest["a"] is holder
    assert nest["b"][0] is quiet


def test_expanded_buffers_and_shared_tensors(tools: Any) -> None:
    """An expanded buffer cannot be written to; a tied weight is copied once."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    model.register_buffer("positions", torch.arange(4.0).expand(3, 4))
    opt = torch.optim.AdamW(model.parameters())
    before = everything(model, opt)
    bench(model, opt, batch=None)
    assert not tools.differences(before, everything(model, opt))
    snapshot = Snapshot()
    snapshot.keep([model[0].weight, [model[1].weight]])
    assert len(snapshot._restorers) == 3  # two lists, one tensor


def test_swapped_memory_comes_back(tools: Any) -> None:
    """Who assigns to `.data` puts other memory under the parameter."""
    model, opt = trained(OPTIMIZERS["AdamW"])
    before, address = everything(model, opt), model.head.weight.data_ptr()

    def forward(model: nn.Module, batch: Any) -> Tensor:
        model.head.weight.data = torch.zeros(128, 64)
        return model(batch).square().mean()

    bench(model, opt, forward=forward)
    assert not tools.differences(before, everything(model, opt))
    assert model.head.weight.data_ptr() == address


def test_objects_in_the_state_and_attributes_of_the_optimizer() -> None:
    """Optimizers outside torch keep counters in attributes and objects of their own in the state."""

    class Counting(torch.optim.SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.1)
            self.count, self.history = 5, [1, 2]

        def step(self, closure: Any = None) -> None:
            self.count += 1
            self.history.append(self.count)
            self.late = True
            for p in self.param_groups[0]["params"]:
                self.state[p].setdefault("own", SimpleNamespace(n=0)).n += 1
            super().step()

    model = nn.Linear(4, 4)
    opt = Counting(model.parameters())
    history = opt.history
    bench(model, opt, batch=None)
    assert (opt.count, opt.history, hasattr(opt, "late"), len(opt.state)) == (5, [1, 2], False, 0)
    assert opt.history is history
    opt.state[model.weight]["own"] = SimpleNamespace(n=3)
    bench(model, opt, batch=None)
    assert opt.state[model.weight]["own"].n == 3
    assert model.bias not in opt.state


def test_schedulers_and_hooks_stay(tools: Any) -> None:
    """A scheduler patches `step` and counts its calls; what it would warn of stays as it was."""
    model, opt = trained(OPTIMIZERS["AdamW"])
    scheduler = torch.optim.lr_scheduler.ConstantLR(opt, 0.5)
    seen = []
    opt.register_step_post_hook(lambda *_: seen.append(1))
    before = everything(model, opt)
    bench(model, opt)
    assert not tools.differences(before, everything(model, opt))
    assert len(seen) == 3
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step\(\)"):
        scheduler.step()  # no step of the user's has been made


def test_a_wrapped_optimizer() -> None:
    """accelerate hands out a wrapper around the optimizer."""
    accelerate = pytest.importorskip("accelerate")
    model = nn.Linear(64, 128)
    wrapped = accelerate.Accelerator(cpu=True).prepare(Automagic8bit(model.parameters()))
    before = copy.deepcopy(model.state_dict())
    bench(model, wrapped, batch=None)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert not wrapped.optimizer.state
    assert "auto_lr_rate" not in wrapped.param_groups[0]


def test_inside_no_grad_and_evaluation(tools: Any) -> None:
    """Gradients are switched on for the steps; the model runs in the mode it is in."""
    model, opt = trained(OPTIMIZERS["AdamW"])
    model.eval()
    seen = []

    def forward(model: nn.Module, batch: Any) -> Tensor:
        seen.append((model.training, torch.is_grad_enabled()))
        return model(batch).sum()

    with torch.no_grad():
        bench(model, opt, forward=forward)
        assert not torch.is_grad_enabled()
    assert seen == [(False, True)] * 3


# ------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tools: Any) -> None:
    """The device's clock, its memory and its generator."""
    model = Net().cuda()
    opt = Automagic8bit(optimized(model))
    before, generator = everything(model, opt), torch.cuda.get_rng_state()
    result = bench(model, opt, batch=ROWS.cuda(), num_steps=5)
    assert not tools.differences(before, everything(model, opt))
    assert torch.equal(generator, torch.cuda.get_rng_state())
    assert result.device == torch.cuda.get_device_name()
    assert result.step_peak_bytes is not None
    assert result.optimizer_peak_bytes is not None
    assert result.step_peak_bytes >= result.optimizer_peak_bytes >= 0
    assert result.step_peak_bytes > 0
    assert result > 0
