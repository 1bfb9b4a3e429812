"""How long an optimizer's step takes, on the user's own model, which is left as it was."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from automagic_bnb import config
from automagic_bnb.optimizer import Automagic
from automagic_bnb.state import local_tensor

Forward = Callable[[nn.Module, Any], Tensor]

DEFAULT_ROWS, DEFAULT_TOKENS = 32, 16
PASS_YOUR_OWN = (
    "pass batch=… (a tensor, an (inputs, target) pair, or a dict of keyword arguments), with loss_fn=… for a loss of "
    "your own, or forward=lambda model, batch: loss"
)


@dataclass(frozen=True, eq=False)
class BenchmarkResult(float):
    """What `benchmark_optimizer` measured. As a number it is the mean time of a step, in seconds."""

    optimizer: str
    """The name of the optimizer's class."""
    device: str
    forward_backward_times_ms: tuple[float, ...]
    """Of each step: zero_grad, forward and backward."""
    optimizer_times_ms: tuple[float, ...]
    """Of each step: `optimizer.step()`."""
    step_peak_bytes: int | None
    """Memory of a whole step at its peak, above what was held before it; None where it is not CUDA's."""
    optimizer_peak_bytes: int | None
    """The same for `optimizer.step()` alone."""

    def __new__(
        cls,
        optimizer: str,
        device: str,
        forward_backward_times_ms: tuple[float, ...],
        optimizer_times_ms: tuple[float, ...],
        step_peak_bytes: int | None,
        optimizer_peak_bytes: int | None,
    ) -> BenchmarkResult:
        mean_ms = np.mean(forward_backward_times_ms) + np.mean(optimizer_times_ms)
        return super().__new__(cls, mean_ms / 1000)

    def __getnewargs__(self) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return dataclasses.astuple(self)  # float would pickle its number alone

    @property
    def step_ms(self) -> float:
        """The mean time of a step."""
        return 1000 * float(self)

    @property
    def forward_backward_ms(self) -> float:
        """The median of `forward_backward_times_ms`."""
        return float(np.median(self.forward_backward_times_ms))

    @property
    def optimizer_ms(self) -> float:
        """The median of `optimizer_times_ms`."""
        return float(np.median(self.optimizer_times_ms))

    @property
    def optimizer_quartiles_ms(self) -> tuple[float, float]:
        """Between these lies the middle half of `optimizer_times_ms`."""
        low, high = np.percentile(self.optimizer_times_ms, [25, 75])
        return float(low), float(high)

    @property
    def optimizer_share(self) -> float:
        """The optimizer's part of all the time measured, from 0 to 1."""
        total = sum(self.forward_backward_times_ms) + sum(self.optimizer_times_ms)
        return sum(self.optimizer_times_ms) / total if total > 0 else 0.0

    def __str__(self) -> str:
        low, high = self.optimizer_quartiles_ms
        text = (
            f"{self.optimizer} on {self.device}: {self.step_ms:.2f} ms a step, mean of {len(self.optimizer_times_ms)}; "
            f"forward and backward {self.forward_backward_ms:.2f} ms, optimizer {self.optimizer_ms:.2f} ms "
            f"(medians; middle half {low:.2f} to {high:.2f}), {self.optimizer_share:.0%} of the time"
        )
        if self.step_peak_bytes is None or self.optimizer_peak_bytes is None:
            return text
        step, own = self.step_peak_bytes / 2**20, self.optimizer_peak_bytes / 2**20
        return f"{text}; at its peak a step takes {step:.1f} MB more than is held before it, its optimizer {own:.1f} MB"


def benchmark_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    num_steps: int = 10,
    *,
    warmup: int = 3,
    batch: Any = None,
    loss_fn: Callable[..., Tensor] | None = None,
    forward: Forward | None = None,
    verbose: bool = True,
) -> BenchmarkResult:
    """Time training steps of any torch optimizer on this model, and put everything back as it was.

    Put back bit for bit, also when your function raises: the optimizer's parameters, state, groups and plain
    attributes; the model's buffers, gradients and training modes; torch's random generators. Meanwhile the copies lie
    in CPU memory (the parameters that the optimizer updates, its state, the buffers); gradients that exist are kept
    where they are, so the run needs room for a second set. Not put back: other attributes that a module changes in its
    forward, what your own hooks do, and `torch.cuda.reset_peak_memory_stats`, which the measurement calls.

    The model runs in the mode it is in (`model.train()` is yours to call). On CUDA the times are the device's, between
    events, so they hold the waiting for Python where that is the slower one; elsewhere they are the wall clock's.

    Args:
        num_steps: steps that are timed.
        warmup: steps before them, in which state is made and kernels are compiled.
        batch: a tensor; an (inputs, target) pair; or a dict of keyword arguments for the model. It is used in each
            step as it is. None: random inputs for a model that begins with nn.Linear or nn.Embedding.
        loss_fn: called as loss_fn(output, target), without a target as loss_fn(output). None: the output's own `loss`;
            else cross entropy for a target of whole numbers, mean squared error for others, and the mean square of
            the output where there is no target.
        forward: called as forward(model, batch) in place of all that; returns the loss.
        verbose: print the result, as one line.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; a model for which no input can be guessed; a loss that
            reaches none of the optimizer's parameters; an optimizer that needs a closure.

    Example:
        >>> model = nn.Linear(512, 512)
        >>> result = benchmark_optimizer(model, Automagic8bit(model.parameters()), verbose=False)
        >>> result.optimizer_share < 1
        True
    """
    _check_arguments(model, optimizer, num_steps, warmup, loss_fn, forward)
    parameters = _parameters(optimizer)
    clock = _Clock(local_tensor(parameters[0]).device)
    if forward is None:
        guessed = batch is None
        batch = guess_inputs(model) if guessed else batch
        forward = _default_forward(loss_fn, guessed)
    with _left_as_it_was(model, optimizer, clock), torch.enable_grad():
        for number in range(warmup + num_steps):
            if number == warmup:
                clock.start()
            clock.mark()
            _forward_backward(model, optimizer, forward, batch)
            if number == 0:
                _check_gradients(parameters)
            clock.mark()
            optimizer.step()
            clock.mark()
        times = clock.read()
        peaks = clock.peaks(lambda: _forward_backward(model, optimizer, forward, batch), optimizer.step)
    result = BenchmarkResult(
        optimizer=type(optimizer).__name__,
        device=clock.name,
        forward_backward_times_ms=tuple(times[0::2]),
        optimizer_times_ms=tuple(times[1::2]),
        step_peak_bytes=peaks[0] if peaks else None,
        optimizer_peak_bytes=peaks[1] if peaks else None,
    )
    if verbose:
        sys.stdout.write(f"{result}\n")
    return result


def guess_inputs(model: nn.Module) -> Tensor:
    """Inputs for a model that begins with nn.Linear, randn [32, in_features], or nn.Embedding, indices [32, 16].

    Raises:
        ValueError: it begins with anything else.
    """
    generator = torch.Generator().manual_seed(0)
    # What comes first in the order of definition; containers and activations have no parameters of their own.
    first = next((m for m in model.modules() if next(m.parameters(recurse=False), None) is not None), None)
    if isinstance(first, nn.Linear):
        dtype = first.weight.dtype if first.weight.is_floating_point() else torch.float32
        return torch.randn(DEFAULT_ROWS, first.in_features, generator=generator).to(first.weight.device, dtype)
    if isinstance(first, nn.Embedding):
        shape = (DEFAULT_ROWS, DEFAULT_TOKENS)
        return torch.randint(first.num_embeddings, shape, generator=generator).to(first.weight.device)
    begins = "has no parameters" if first is None else f"begins with {type(first).__name__}"
    raise ValueError(f"no input can be guessed for a model that {begins}; {PASS_YOUR_OWN}")


def _check_arguments(model: Any, optimizer: Any, num_steps: Any, warmup: Any, loss_fn: Any, forward: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={type(model).__name__}: must be a torch.nn.Module")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer={type(optimizer).__name__}: must be a torch.optim.Optimizer")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("optimizer=LBFGS: needs a closure, which this benchmark does not give")
    for name, value, least in (("num_steps", num_steps, 1), ("warmup", warmup, 0)):
        config.check_whole(name, value, least)
    for name, value in (("loss_fn", loss_fn), ("forward", forward)):
        if value is not None and not callable(value):
            raise TypeError(f"{name}={value!r}: must be callable")
    if forward is not None and loss_fn is not None:
        raise ValueError("forward= returns the loss itself: leave loss_fn= out")


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not parameters:
        raise ValueError("the optimizer has no parameters: there is nothing to time")
    return parameters


def _check_gradients(parameters: list[Tensor]) -> None:
    if all(p.grad is None for p in parameters):
        raise ValueError(
            "after backward() none of the optimizer's parameters has a gradient, so its step has nothing to do; "
            "is it built over this model's parameters, and does the loss depend on them?"
        )


# --- one step ---------------------------------------------------------------------------------------------------------


def _forward_backward(model: nn.Module, optimizer: torch.optim.Optimizer, forward: Forward, batch: Any) -> None:
    optimizer.zero_grad()
    loss = forward(model, batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"the loss must be a tensor of one element, not {what}; {PASS_YOUR_OWN}")
    loss.backward()


def _default_forward(loss_fn: Callable[..., Tensor] | None, guessed: bool) -> Forward:
    def forward(model: nn.Module, batch: Any) -> Tensor:
        inputs, target = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
        try:
            output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        except Exception as e:
            if not guessed:
                raise
            raise ValueError(f"the model does not take the input guessed for it ({e}); {PASS_YOUR_OWN}") from e
        if loss_fn is not None:
            return loss_fn(output) if target is None else loss_fn(output, target)
        return _default_loss(output, target)

    return forward


def _default_loss(output: Any, target: Any) -> Tensor:
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    for name in ("logits", "sample", "last_hidden_state"):  # where transformers and diffusers put the tensor
        output = getattr(output, name, output)
    if not isinstance(output, Tensor):
        raise TypeError(f"no loss is known for a model that returns {type(output).__name__}; {PASS_YOUR_OWN}")
    if target is None:
        return output.float().square().mean()
    if target.is_floating_point():
        return nn.functional.mse_loss(output.float(), target.float())
    return nn.functional.cross_entropy(output.float(), target)


# --- the clock --------------------------------------------------------------------------------------------------------


class _Clock:
    """Marks points in time, on the device where there is one, and tells the times between them."""

    def __init__(self, device: torch.device) -> None:
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"the optimizer's parameters are on {device}; only CPU and CUDA devices can be timed")
        self.device, self.on_cuda = device, device.type == "cuda"
        self.name = torch.cuda.get_device_name(device) if self.on_cuda else "cpu"
        self.marks: list[Any] = []

    def start(self) -> None:
        """Forget the marks of the warm-up."""
        self.synchronize()
        self.marks = []

    def synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def mark(self) -> None:
        if not self.on_cuda:
            self.marks.append(time.perf_counter())
            return
        with torch.cuda.device(self.device):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self.marks.append(event)

    def read(self) -> list[float]:
        """Milliseconds, two a step: to its second mark and to its third."""
        self.synchronize()
        steps = [self.marks[i : i + 3] for i in range(0, len(self.marks), 3)]
        pairs = [pair for begin, middle, end in steps for pair in ((begin, middle), (middle, end))]
        return [a.elapsed_time(b) if self.on_cuda else (b - a) * 1000 for a, b in pairs]

    def peaks(self, first: Callable[[], Any], second: Callable[[], Any]) -> tuple[int, int] | None:
        """Bytes that both together, and the second alone, take at their peak above what was held; runs them."""
        if not self.on_cuda:
            return None
        held = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        first()
        whole = torch.cuda.max_memory_allocated(self.device)
        between = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        second()
        own = torch.cuda.max_memory_allocated(self.device)
        return max(whole, own) - held, own - between


# --- leaving no trace -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _left_as_it_was(model: nn.Module, optimizer: torch.optim.Optimizer, clock: _Clock) -> Iterator[None]:
    """Put model, optimizer and random generators back as they were, whatever happens inside."""
    snapshot = Snapshot()
    for inner in _unwrapped(optimizer):
        snapshot.keep(inner.state, copy_objects=True)
        snapshot.keep(inner.param_groups)
        snapshot.keep(vars(inner))
    parameters = _parameters(optimizer)
    buffers = [m._buffers for m in model.modules()]
    snapshot.keep(parameters)
    snapshot.keep(buffers)
    modes = [(m, m.training) for m in model.modules()]
    grads = [(p, p.grad) for p in {id(p): p for p in [*parameters, *model.parameters()]}.values()]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        for p, _ in grads:
            p.grad = None
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        clock.synchronize()
        snapshot.restore()
        for inner in _unwrapped(optimizer):
            if isinstance(inner, Automagic):
                inner._fused.forget()  # it may hold state that is no more
        for p, grad in grads:
            p.grad = grad
        for module, training in modes:
            module.training = training


def _unwrapped(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The optimizer, and what it wraps (accelerate's does)."""
    found = [optimizer]
    while isinstance(inner := vars(found[-1]).get("optimizer"), torch.optim.Optimizer):
        found.append(inner)
    return found


class Snapshot:
    """Nests of tensors and plain values as they were: the same containers and tensors get their contents back."""

    def __init__(self) -> None:
        self._restorers: list[Callable[[], Any]] = []
        self._seen: dict[int, Any] = {}
        """What was kept already, by its id; the objects are held, so that no id is used again."""

    def keep(self, nest: Any, copy_objects: bool = False) -> Any:
        """Note the contents; tensors are copied to the CPU. Returns what is to stand in its place when restored.

        Args:
            copy_objects: also deep-copy objects of other kinds, in place of keeping a reference.
        """
        if isinstance(nest, (Tensor, dict, list)):
            if id(nest) not in self._seen:
                self._seen[id(nest)] = nest
                self._keep_contents(nest, copy_objects)
            return nest
        if type(nest) is tuple:
            return tuple(self.keep(value, copy_objects) for value in nest)
        if copy_objects and not isinstance(nest, (int, float, str, bool, type(None), torch.dtype, torch.device)):
            return copy.deepcopy(nest)
        return nest

    def _keep_contents(self, nest: Any, copy_objects: bool) -> None:
        if isinstance(nest, Tensor):
            self._keep_tensor(local_tensor(nest))
        elif isinstance(nest, dict):
            items = {key: self.keep(value, copy_objects) for key, value in nest.items()}
            self._restorers.append(lambda: (nest.clear(), nest.update(items)))
        else:
            values = [self.keep(value, copy_objects) for value in nest]
            self._restorers.append(lambda: nest.__setitem__(slice(None), values))

    def _keep_tensor(self, tensor: Tensor) -> None:
        overlapping = any(n > 1 and step == 0 for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        if overlapping or tensor.is_meta:  # an expanded tensor cannot be written to, by anybody
            return
        memory = tensor.data  # who assigns to `.data` puts other memory under the tensor
        saved = memory.to("cpu", copy=True)
        self._restorers.append(lambda: setattr(tensor, "data", memory.copy_(saved)))

    def restore(self) -> None:
        for put_back in self._restorers:
            put_back()
