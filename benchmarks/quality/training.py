"""One task on one device: the model is built once, a step's forward and backward pass captured once in a CUDA graph.

A run copies the first weights in, then replays the graph and steps a fresh optimizer, so that it costs little more
than the optimizer does. Gradients are static tensors that every replay overwrites. On a CPU the same calls run eagerly.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import data
import tasks
import torch
from peers import Peer
from tasks import Task
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import measure

VALIDATION = (8, 64)
"""Batches and examples in each; the same for every run."""
CURVE = 24
"""Points of the training loss that are kept, each the mean over its part of the run."""
WATCHED = (0.1, 0.25, 0.5, 1.0)
"""Where in a run the rate found is read."""


def _no_wait(device: torch.device | None = None) -> None:
    pass


@contextlib.contextmanager
def unsynchronised() -> Iterator[None]:
    """bitsandbytes waits for the device after every parameter. The numbers are the same without, and where several
    processes share a GPU each wait would cost a turn."""
    with mock.patch.object(torch.cuda, "synchronize", _no_wait):
        yield


class Trainer:
    """A task, ready to run again and again."""

    def __init__(self, task: Task, cache: Path, device: torch.device, tiny: bool = False) -> None:
        self.task, self.cache, self.device, self.tiny = task, cache, device, tiny
        self.model = task.build(0, cache, tiny).to(device)
        self.named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.source, self.held_out = data.sources(task.family, task.source, cache, device)
        self.begun: dict[int, list[Tensor]] = {}
        batch, columns = task.batch, len(self.source.limits)
        self.drawn = torch.zeros(task.steps, batch, columns, dtype=torch.int64, device=device)
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.losses = torch.zeros(task.steps, device=device)
        self.questions = self.held_out.draw(*((1, 4) if tiny else VALIDATION), seed=1).to(device)
        self.validation_losses = torch.zeros(len(self.questions), device=device)
        self.learn, self.validate = self._captured(self._learn), self._captured(self._validate)

    def _learn(self) -> None:
        """Gradients of the batch that the counter points at; its loss is noted and the counter moved on."""
        for _, p in self.named:
            p.grad = None
        drawn = self.drawn.index_select(0, self.counter).squeeze(0)
        loss = self.source.loss(self.model, drawn)
        loss.backward()
        self.losses.index_copy_(0, self.counter, loss.detach().view(1))
        self.counter.add_(1)

    @torch.no_grad()
    def _validate(self) -> None:
        for i, drawn in enumerate(self.questions):
            self.validation_losses[i].copy_(self.held_out.loss(self.model, drawn))

    def _captured(self, work: Callable[[], None]) -> Callable[[], None]:
        """The same as a graph. Whatever tensors it reads or writes have to live as long as the trainer."""
        if self.device.type != "cuda":
            return work
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries choose their kernels and allocate before anything is recorded
                work()
                self.counter.zero_()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        self.graphs = [*getattr(self, "graphs", []), graph]
        return graph.replay

    def begin(self, seed: int) -> None:
        """The seed's first weights and batches."""
        if seed not in self.begun:
            model = self.task.build(seed, self.cache, self.tiny)
            self.begun[seed] = [p.detach().to(self.device) for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for (_, p), value in zip(self.named, self.begun[seed], strict=True):
                p.copy_(value)
        self.drawn.copy_(self.source.draw(self.task.steps, self.task.batch, 1000 + seed))
        self.counter.zero_()

    def validation_loss(self) -> float:
        self.validate()
        return self.validation_losses.mean().item()

    def run(self, peer: Peer, lr: float | None, seed: int) -> dict[str, Any]:
        """Train from the start with a fresh optimizer; what is written to the results."""
        start = time.perf_counter()
        self.begin(seed)
        first_loss = self.validation_loss()
        places = [p.data_ptr() for _, p in self.named]
        built = peer.build(self.named, lr, self.task)
        optimizers = [built] if isinstance(built, torch.optim.Optimizer) else list(built)
        with contextlib.nullcontext() if peer.tunes else unsynchronised():
            found = self._steps(peer, optimizers)
        loss = self.validation_loss()
        assert places == [p.data_ptr() for _, p in self.named], "the optimizer put other tensors in the weights' place"
        weights = sum(p.numel() for _, p in self.named)
        return {
            "val_loss": loss if math.isfinite(loss) else None,
            "first_loss": first_loss,
            "diverged": not (math.isfinite(loss) and loss <= 1.05 * first_loss),
            "curve": [round(x, 5) if math.isfinite(x) else None for x in curve(self.losses)],
            "found": found,
            "final_lr": [float(g["lr"]) for optimizer in optimizers for g in optimizer.param_groups],
            "state_bytes": sum(measure.state_bytes(optimizer) for optimizer in optimizers) / weights,
            "weights": weights,
            "seconds": round(time.perf_counter() - start, 3),
        }

    def _steps(self, peer: Peer, optimizers: Sequence[torch.optim.Optimizer]) -> list[list[float]]:
        """All steps; returns [[step, rate found], …] of those that find one."""
        found: list[list[float]] = []
        watched = {max(1, round(share * self.task.steps)) for share in WATCHED}
        _switch(optimizers, "train")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, that a schedule began before the first step
            relative = self.task.relative_rate if peer.scheduled else lambda step: 1.0
            schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, relative) for optimizer in optimizers]
            for step in range(1, self.task.steps + 1):
                self.learn()
                for optimizer, schedule in zip(optimizers, schedules, strict=True):
                    optimizer.step()
                    if step < self.task.steps:  # the last step's rates stay to be read
                        schedule.step()
                if step in watched and (rate := rate_found(optimizers[0])) is not None:
                    found.append([step, rate])
        _switch(optimizers, "eval")
        return found


def _switch(optimizers: Sequence[torch.optim.Optimizer], mode: str) -> None:
    """Schedule-free optimizers hold other weights for training than for validation."""
    for optimizer in optimizers:
        if callable(change := getattr(optimizer, mode, None)):
            change()


def rate_found(optimizer: torch.optim.Optimizer) -> float | None:
    """The rate that the optimizer found by itself, before a schedule's factor; None for one that finds none."""
    group = optimizer.param_groups[0]
    for key in ("auto_lr_rate", "d"):  # ours; Prodigy's
        if key in group:
            return float(group[key])
    if hasattr(optimizer, "get_avg_learning_rate") and not group.get("base_lr"):  # Automagic's other rules
        return float(optimizer.get_avg_learning_rate())
    return None


def curve(losses: Tensor) -> list[float]:
    """The means of at most CURVE equal parts."""
    return [part.mean().item() for part in losses.cpu().tensor_split(min(CURVE, len(losses)))]


def prepare_base(family: str, cache: Path, device: torch.device, tiny: bool = False) -> float | None:
    """Train what the family's fine-tunes start from, unless it is there; the validation loss. Kept in bfloat16."""
    path = cache / tasks.base_file(family, tiny)
    if path.exists():
        return None
    task = tasks.BASES[family]
    task = replace(task, steps=3, batch=2) if tiny else task
    trainer = Trainer(task, cache, device, tiny)
    adamw = Peer("base", lambda named, lr, task: torch.optim.AdamW([p for _, p in named], lr=lr or 0.0))
    result = trainer.run(adamw, tasks.BASE_RATE, seed=0)
    cache.mkdir(parents=True, exist_ok=True)
    torch.save({key: value.to("cpu", torch.bfloat16) for key, value in trainer.model.state_dict().items()}, path)
    return result["val_loss"]
