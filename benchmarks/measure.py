"""How the benchmarks measure: time, memory, launches, traffic, environment; and how results are written.

Time is taken twice. *GPU*: CUDA events around each step of an uninterrupted run, so that it is the device's time where
the device is the bottleneck, and the host's pace where launching is. *Wall*: the host clock around one step with the
device idle before and finished after. The working sets exceed the L2 of today's GPUs (the smallest workload, 42 M
bf16 parameters, moves 340 MB a step against 50 to 60 MB of L2 on a Hopper), so no buffers are rotated.
"""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGES = (
    "automagic-bnb",
    "torch",
    "triton",
    "bitsandbytes",
    "flashoptim",
    "torch-optimi",
    "torchao",
    "pytorch-optimizer",
)
Step = Callable[[], Any]


@dataclass
class Spread:
    """Median and the 10th and 90th percentile of repeated measurements."""

    median: float
    p10: float
    p90: float
    mean: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]]
        return cls(statistics.median(values), deciles[0], deciles[-1], statistics.fmean(values), len(values))


@dataclass
class StepTimes:
    """Milliseconds of consecutive steps. `batch_ms`: host clock over the uninterrupted run, per step."""

    gpu_ms: list[float] = field(default_factory=list)
    wall_ms: list[float] = field(default_factory=list)
    batch_ms: float = 0.0


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Drop what nothing refers to any more, also from the allocator's cache."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _event(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def copy_rate(device: torch.device, repeats: int = 15) -> float:
    """Bytes read plus bytes written per second by a device-to-device copy of random data; the memory's ceiling."""
    size = 2**30 if device.type == "cuda" else 2**25
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = time_steps(functools.partial(target.copy_, source), device, repeats, warm_up=3)
    return 2 * size / (statistics.median(times.gpu_ms or times.wall_ms) / 1e3)


def time_steps(step: Step, device: torch.device, count: int, warm_up: int = 0, before: Step | None = None) -> StepTimes:
    """Run `step` `count` times uninterrupted (on a GPU only), then `count` times with the device idle in between.

    `before` runs ahead of each of the latter, outside the measured time.
    """
    for _ in range(warm_up):
        step()
    synchronize(device)
    times = StepTimes()
    if device.type == "cuda":
        start = time.perf_counter()
        marks = []
        for _ in range(count):
            begin = _event(device)
            step()
            marks.append((begin, _event(device)))
        synchronize(device)
        times.batch_ms = (time.perf_counter() - start) * 1e3 / count
        times.gpu_ms = [begin.elapsed_time(end) for begin, end in marks]
    for _ in range(count):
        if before is not None:
            before()
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        times.wall_ms.append((time.perf_counter() - start) * 1e3)
    return times


class PeakMemory:
    """Bytes that the allocator handed out inside the `with` block beyond what was held before it; None on a CPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.extra: int | None = None

    def __enter__(self) -> PeakMemory:
        synchronize(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = allocated(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        synchronize(self.device)
        if self.device.type == "cuda":
            self.extra = torch.cuda.max_memory_allocated(self.device) - self._before


def launches(step: Step, device: torch.device) -> dict[str, Any] | None:
    """What one step puts on the device: number of kernels, of copies and fills, and the sum of their times.

    None where there is no GPU or the profiler sees nothing.
    """
    if device.type != "cuda":
        return None
    synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        synchronize(device)
    kernels = copies = 0
    busy_us = 0.0
    for event in profiler.events():
        # Ranges that a program names, such as torch.optim's "Optimizer.step#…", show up on the device's timeline too.
        named_range = getattr(event, "is_user_annotation", False) or event.name.startswith(("Optimizer.", "Profiler"))
        if event.device_type != torch.autograd.DeviceType.CUDA or named_range:
            continue
        if event.name.startswith(("Memcpy", "Memset")):
            copies += 1
        else:
            kernels += 1
        busy_us += event.time_range.elapsed_us()
    return {"kernels": kernels, "copies": copies, "busy_ms": busy_us / 1e3} if kernels + copies else None


def named_tensors(value: Any, name: str = "", depth: int = 6) -> Iterator[tuple[str, Tensor]]:
    """Every plain tensor inside nested containers, wrapper objects and tensor subclasses, with a path of names."""
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        for part in names:
            yield from named_tensors(getattr(value, part), f"{name}.{part}", depth - 1)
    elif isinstance(value, Tensor):
        yield name, value
    elif depth == 0:
        return
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from named_tensors(item, f"{name}.{key}", depth - 1)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from named_tensors(item, f"{name}.{i}", depth - 1)
    elif hasattr(value, "__dict__") and not callable(value):
        yield from named_tensors(vars(value), name, depth - 1)


def _storage(tensor: Tensor) -> tuple[str, int]:
    return str(tensor.device), tensor.untyped_storage().data_ptr()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in `optimizer.state`, each distinct storage once."""
    storages = {_storage(t): t.untyped_storage().nbytes() for _, t in named_tensors(list(optimizer.state.values()))}
    return sum(storages.values())


def weighted_state_bytes(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], counts: Sequence[int]) -> int:
    """State bytes of a model with `counts[i]` tensors like `params[i]`; what parameters share counts once."""
    holders: dict[tuple[str, int], set[int]] = {}
    for i, p in enumerate(params):
        for _, t in named_tensors(optimizer.state[p]):
            holders.setdefault(_storage(t), set()).add(i)
    shared: dict[tuple[str, int], int] = {}
    total = 0
    for p, count in zip(params, counts, strict=True):
        own: dict[tuple[str, int], int] = {}
        for _, t in named_tensors(optimizer.state[p]):
            size = t.untyped_storage().nbytes()
            if len(holders[_storage(t)]) == 1:
                own[_storage(t)] = size
            elif t.nbytes == size:  # one table for all
                shared[_storage(t)] = size
            else:  # this parameter's slice of a common buffer
                own[(*_storage(t), t.storage_offset())] = t.nbytes  # type: ignore[index]
        total += count * sum(own.values())
    return total + sum(shared.values())


# A frozen learning-rate mask is still read, but nothing that only moves it is touched.
FROZEN_TOUCHES = {"lr_mask": 1, "last_polarity": 0, "spatial_variance": 0}


def bytes_moved(optimizer: torch.optim.Optimizer, params: Iterable[Tensor], frozen_mask: bool = False) -> int:
    """The least traffic of one step with this layout: g in, θ in and out, every state in and out.

    Code books are left out: they stay in cache. So is scratch memory, as a step without it would move no more.
    """
    total = 0
    for p in params:
        assert p.grad is not None
        total += 2 * p.nbytes + p.grad.nbytes
        for path, t in named_tensors(optimizer.state[p]):
            key = path.rsplit(".", 1)[-1]
            if t.device != p.device or key.startswith("qmap"):
                continue
            total += t.nbytes * (FROZEN_TOUCHES.get(key, 2) if frozen_mask else 2)
    return total


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    cuda = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if cuda else None
    return {
        "device": properties.name if properties else f"CPU ({platform.machine()})",
        "gpu_memory_bytes": properties.total_memory if properties else None,
        "driver": _driver() if cuda else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def describe(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in environment["packages"].items() if v)
    gpu = f", driver {environment['driver']}, CUDA {environment['cuda']}" if environment["driver"] else ""
    return f"{environment['device']}{gpu}; Python {environment['python']}, {versions}; {environment['date']}"


def command() -> str:
    """The command line that repeats this run; where the results went is left out."""
    words, skip = [], False
    for word in sys.argv[1:]:
        if not skip and not word.startswith("--out"):
            words.append(word if re.fullmatch(r"[\w.,=/+-]+", word) else f"'{word}'")
        skip = not skip and word == "--out"
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def reason(error: BaseException) -> str:
    """An error in a few words that fit a table: type and first line, file paths cut to their last part."""
    lines = str(error).strip().splitlines()
    text = re.sub(r"(?:/[\w.+-]+)+/([\w.+-]+)", r"\1", lines[0]) if lines else ""
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return (text if len(text) <= 90 else text[:87] + "…").replace("|", "/")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned, so that it reads as plain text too. The first column is left-aligned, the others right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return "\n".join([line(cells[0]), f"|{rule}|", *map(line, cells[1:])])


def write_results(folder: Path, name: str, results: dict[str, Any], markdown: str) -> None:
    """`name`.json and `name`.md; rewritten after every row, so that a run cut short leaves what it has."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    (folder / f"{name}.md").write_text(markdown.rstrip() + "\n")
