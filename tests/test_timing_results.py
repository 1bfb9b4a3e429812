"""The benchmark of a step: what it reports, and what it takes."""

from __future__ import annotations

import copy
import pickle
import random
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timing_cases import bench
from torch import Tensor, nn

from automagic_bnb import Automagic8bit, BenchmarkResult, benchmark_optimizer
from automagic_bnb.watch.timing import guess_inputs

# ---------------------------------------------------------------------------------------------------------- the result


class Sleeper(torch.optim.SGD):
    """Takes 20 ms a step, and 200 in the first two."""

    def step(self, closure: Any = None) -> None:
        self.calls = getattr(self, "calls", 0) + 1
        time.sleep(0.2 if self.calls <= 2 else 0.02)
        super().step()


def test_times_are_those_of_the_parts() -> None:
    """Sleeping is a clock that needs no trust: 20 ms in the optimizer, 60 in the forward, the warm-up left out."""
    model = nn.Linear(4, 4)

    def forward(model: nn.Module, batch: Any) -> Tensor:
        time.sleep(0.06)
        return model(torch.ones(1, 4)).sum()

    result = bench(model, Sleeper(model.parameters(), lr=0.1), forward=forward, batch=None, num_steps=4, warmup=2)
    assert len(result.optimizer_times_ms) == len(result.forward_backward_times_ms) == 4
    # A sleep is never shorter; on a loaded machine it may be much longer, hence the loose upper bounds.
    assert 20 <= result.optimizer_ms < 100
    assert 60 <= result.forward_backward_ms < 200
    assert 0.08 <= float(result) < 0.3
    assert 0.1 < result.optimizer_share < 0.5
    low, high = result.optimizer_quartiles_ms
    assert low <= result.optimizer_ms <= high
    assert (result.step_peak_bytes, result.optimizer_peak_bytes) == (None, None)


RESULT = BenchmarkResult("Adam", "cpu", (1.0, 2.0, 9.0), (1.0, 3.0, 2.0), None, None)


def test_a_result_is_a_number_of_seconds() -> None:
    """As the guide's function returned one: arithmetic, comparison, formats, copies."""
    assert float(RESULT) == pytest.approx(0.006)
    assert pytest.approx(RESULT.step_ms) == RESULT * 1000
    assert f"{RESULT * 1000:.2f} {RESULT:.4f}" == "6.00 0.0060"
    assert RESULT.forward_backward_ms == 2
    assert RESULT.optimizer_ms == 2
    assert RESULT.optimizer_quartiles_ms == (1.5, 2.5)
    assert RESULT.optimizer_share == pytest.approx(6 / 18)
    assert min(RESULT, 1.0) is RESULT
    for twin in (pickle.loads(pickle.dumps(RESULT)), copy.deepcopy(RESULT), copy.copy(RESULT)):
        assert (twin, str(twin), vars(twin)) == (RESULT, str(RESULT), vars(RESULT))


def test_a_result_reads_as_a_line() -> None:
    """The parts by name; memory only where it was measured."""
    assert str(RESULT) == (
        "Adam on cpu: 6.00 ms a step, mean of 3; forward and backward 2.00 ms, optimizer 2.00 ms "
        "(medians; middle half 1.50 to 2.50), 33% of the time"
    )
    on_gpu = BenchmarkResult("Adam", "H100", (1.0,), (1.0,), 3 * 2**20, 2**19)
    assert str(on_gpu).endswith("; at its peak a step takes 3.0 MB more than is held before it, its optimizer 0.5 MB")


def test_the_line_is_printed_once_or_not_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    """By default, as the guide's function does."""
    model = nn.Linear(4, 4)
    result = benchmark_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
    assert capsys.readouterr().out == f"{result}\n"
    bench(model, torch.optim.SGD(model.parameters(), lr=0.1), batch=None)
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------------------ inputs and loss


def test_the_guides_model_and_call() -> None:
    """`benchmark_optimizer(model, optimizer)` on its LoRA model, which begins with a frozen nn.Linear(512, …)."""

    class LoRALayer(nn.Module):
        def __init__(self, in_features: int, out_features: int, rank: int) -> None:
            super().__init__()
            self.linear = nn.Linear(in_features, out_features, bias=False).requires_grad_(False)
            self.lora_A = nn.Linear(in_features, rank, bias=False)
            self.lora_B = nn.Linear(rank, out_features, bias=False)
            self.lora_A.weight._is_lora_layer = self.lora_B.weight._is_lora_layer = True  # type: ignore[assignment]

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.lora_B(self.lora_A(x)) * 0.1

    model = nn.Sequential(LoRALayer(512, 256, 32), nn.ReLU(), LoRALayer(256, 10, 16))
    assert guess_inputs(model).shape == (32, 512)
    optimizer = Automagic8bit([p for p in model.parameters() if p.requires_grad])
    assert benchmark_optimizer(model, optimizer, num_steps=1, warmup=0) > 0


def test_guessed_inputs_fit_the_first_layer() -> None:
    """Dtype and shape of a linear layer, indices of an embedding; the same ones each time."""
    inputs = guess_inputs(nn.Sequential(nn.ReLU(), nn.Linear(7, 3, dtype=torch.bfloat16)))
    assert (inputs.shape, inputs.dtype) == ((32, 7), torch.bfloat16)
    tokens = guess_inputs(nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 3)))
    assert (tokens.shape, tokens.dtype) == ((32, 16), torch.int64)
    assert 0 <= tokens.min() <= tokens.max() <= 10
    assert torch.equal(tokens, guess_inputs(nn.Embedding(11, 4)))


class LikeTransformers(nn.Module):
    """Takes keywords and returns an object with `loss` and `logits`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.embedding(input_ids)
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(loss=loss, logits=logits)


IDS = torch.arange(6).view(2, 3)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (nn.Linear(4, 3), {}),
        (nn.Linear(4, 3), {"batch": torch.ones(2, 4)}),
        (nn.Linear(4, 3), {"batch": (torch.ones(2, 4), torch.tensor([0, 2]))}),
        (nn.Linear(4, 3), {"batch": [torch.ones(2, 4), torch.ones(2, 3)]}),
        (nn.Linear(4, 3), {"batch": (torch.ones(2, 4), torch.ones(2, 3)), "loss_fn": nn.L1Loss()}),
        (nn.Linear(4, 3), {"batch": torch.ones(2, 4), "loss_fn": torch.sum}),
        (nn.Conv2d(3, 4, 3), {"batch": torch.ones(1, 3, 8, 8)}),
        (nn.Conv2d(3, 4, 3), {"forward": lambda model, batch: model(torch.ones(1, 3, 8, 8)).sum()}),
        (LikeTransformers(), {}),
        (LikeTransformers(), {"batch": {"input_ids": IDS}}),
        (LikeTransformers(), {"batch": {"input_ids": IDS, "labels": IDS}}),
    ],
)
def test_batches_and_losses(model: nn.Module, options: Any) -> None:
    """Each form of a batch, with a loss given or the usual one."""
    assert bench(model, torch.optim.SGD(model.parameters(), lr=0.1), **{"batch": None, **options}) > 0


def test_the_default_losses_are_the_usual_ones() -> None:
    """Seen through the gradient that the step gets."""
    model = nn.Linear(4, 3)
    x, whole, real = torch.ones(2, 4), torch.tensor([0, 2]), torch.ones(2, 3)
    expected = {
        "whole": ((x, whole), lambda: nn.functional.cross_entropy(model(x), whole)),
        "real": ((x, real), lambda: nn.functional.mse_loss(model(x), real)),
        "none": (x, lambda: model(x).square().mean()),
    }
    for batch, loss in expected.values():
        (gradient,) = torch.autograd.grad(loss(), model.weight)
        opt, seen = torch.optim.SGD(model.parameters(), lr=0.1), []
        opt.register_step_pre_hook(lambda *_, seen=seen: seen.append(model.weight.grad.clone()))
        bench(model, opt, batch=batch)
        assert torch.allclose(seen[0], gradient)


LINEAR = nn.Linear(4, 3)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (nn.Conv2d(3, 4, 3), {}, ValueError, r"begins with Conv2d; pass batch=.*forward="),
        (nn.MultiheadAttention(8, 2), {}, ValueError, r"begins with MultiheadAttention"),
        (nn.ReLU(), {}, ValueError, r"has no parameters"),
        (nn.Sequential(nn.Linear(4, 3), nn.Linear(5, 3)), {}, ValueError, r"does not take the input guessed.*batch="),
        (nn.LSTM(4, 3), {"batch": torch.ones(2, 4)}, TypeError, r"no loss is known for a model that returns tuple"),
        (
            LINEAR,
            {"forward": lambda m, b: m(torch.ones(2, 4))},
            TypeError,
            r"one element, not a tensor of shape \(2, 3\)",
        ),
        (LINEAR, {"forward": lambda m, b: 1.0}, TypeError, r"one element, not float"),
        (LINEAR, {"forward": lambda m, b: torch.ones((), requires_grad=True)}, ValueError, r"none of the optimizer's"),
        (LINEAR, {"num_steps": 0}, ValueError, r"num_steps=0: must be a whole number >= 1"),
        (LINEAR, {"num_steps": 2.0}, TypeError, r"num_steps=2\.0"),
        (LINEAR, {"num_steps": True}, TypeError, r"num_steps=True"),
        (LINEAR, {"warmup": -1}, ValueError, r"warmup=-1: must be a whole number >= 0"),
        (LINEAR, {"loss_fn": 3}, TypeError, r"loss_fn=3: must be callable"),
        (LINEAR, {"forward": "x"}, TypeError, r"forward='x': must be callable"),
        (LINEAR, {"forward": torch.sum, "loss_fn": torch.sum}, ValueError, r"leave loss_fn= out"),
        (LINEAR, {"steps": 3}, TypeError, r"steps"),
    ],
)
def test_a_wrong_argument_is_named(model: nn.Module, options: Any, error: Any, message: str) -> None:
    """And the model that was given stays trainable."""
    weights = list(model.parameters()) or [nn.Parameter(torch.ones(1))]
    with pytest.raises(error, match=message):
        bench(model, torch.optim.SGD(weights, lr=0.1), **{"batch": None, **options})


def test_what_cannot_be_timed() -> None:
    """No module, no optimizer, a closure needed, nothing to optimize, a device without a clock."""
    opt = torch.optim.SGD(LINEAR.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"model=function: must be a torch\.nn\.Module"):
        bench(lambda x: x, opt)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer=int"):
        bench(LINEAR, 3)
    with pytest.raises(ValueError, match="needs a closure"):
        bench(LINEAR, torch.optim.LBFGS(LINEAR.parameters()))
    with pytest.raises(ValueError, match="no parameters"):
        bench(LINEAR, torch.optim.SGD([{"params": []}], lr=0.1))
    meta = nn.Linear(4, 3, device="meta")
    with pytest.raises(ValueError, match="parameters are on meta; only CPU and CUDA"):
        bench(meta, torch.optim.SGD(meta.parameters(), lr=0.1))


def test_no_random_generator_is_used(tools: Any) -> None:
    """Neither Python's nor torch's, also where inputs are guessed."""
    python, torchs = random.getstate(), torch.get_rng_state()
    bench(LINEAR, torch.optim.SGD(LINEAR.parameters(), lr=0.1), batch=None)
    assert random.getstate() == python
    assert torch.equal(torchs, torch.get_rng_state())
