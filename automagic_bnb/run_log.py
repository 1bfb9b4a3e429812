"""The metrics of a training run as lines of JSON in a folder: written a line at a time, read back as series.

A line is `{"step": 10, "metrics": {"loss": 0.5, "lr/mean": 1e-4}}`, or `{"resumed": true}` where a run was taken up
again. NaN and infinities are written as Python's json module spells them.
"""

from __future__ import annotations

import json
import numbers
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import torch.distributed as dist

from automagic_bnb import config
from automagic_bnb.notices import warn_once
from automagic_bnb.stepping import OneByOne

FILE_NAME = "metrics.jsonl"
MAX_STEP = 2**63 - 1


class RunLog:
    """Writes a run's metrics to `directory/metrics.jsonl`; a run that is there already is continued.

    When `log` returns, the line is on the disk: a process that dies later loses nothing, and one that dies while
    writing leaves half a line, which readers leave out. Let one process write, as trainers do with their own logs.

    Args:
        directory: made where it is missing.

    Raises:
        NotADirectoryError: there is a file of that name.

    Example:
        >>> with RunLog("runs/first") as log:
        ...     log.log(10, {"loss": loss, **optimizer.get_metrics()})
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if self.directory.exists() and not self.directory.is_dir():
            raise NotADirectoryError(f"directory={str(directory)!r}: is a file; a run log needs a folder of its own")
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / FILE_NAME
        last = _last_byte(path)
        self._file = path.open("ab", buffering=0)  # what a full disk does not take is not kept for later
        self._torn = False
        if last:
            # What is there may end in half a line; and what follows may begin at an earlier step, a checkpoint's.
            self._write((b"" if last == b"\n" else b"\n") + b'{"resumed": true}\n')

    def log(self, step: SupportsIndex, metrics: Mapping[str, Any]) -> None:
        """Add the metrics of a step. Several calls for one step add up; a name given twice keeps its last value.

        Args:
            step: a whole number from 0 to 2^63 - 1. After a resume, what had been logged from the first new step on is
                superseded.
            metrics: numbers by name; tensors and numpy values of no dimensions count as numbers.

        Raises:
            TypeError: a value is no number, a name no text, or the step not whole.
            ValueError: the step is out of range, a value beyond any float, or the log closed.
            OSError: the disk is full, or the like. Half a line may be there; the next one begins anew.
        """
        record = {"step": _checked_step(step), "metrics": _floats(metrics)}
        self._write(json.dumps(record).encode() + b"\n")

    def _write(self, line: bytes) -> None:
        if self._file.closed:
            raise ValueError(f"the run log in {self.directory} is closed; open a new RunLog to continue the run")
        rest, self._torn = (b"\n" if self._torn else b"") + line, True
        while rest:
            rest = rest[self._file.write(rest) :]
        os.fsync(self._file.fileno())
        self._torn = False

    def close(self) -> None:
        """Close the file; what was logged is safe without it."""
        self._file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StepLog:
    """What the option `run_log` writes: an optimizer's metrics, each time that so many steps have been taken.

    Of several processes the first writes. A step that cannot be written (a full disk) is a warning, once.

    Args:
        directory: the run log's.
        every: steps from one line to the next.
    """

    def __init__(self, directory: str, every: int) -> None:
        self._directory, self._every = directory, every
        self._log: RunLog | None = None
        self._one_by_one: OneByOne | None = None
        """None: no parameter has been stepped by itself yet."""
        self._steps: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_log": None, "_one_by_one": None}  # a file that is open goes into no copy

    def begin_again(self) -> None:
        """States have been loaded: their steps count."""
        self._steps = self._one_by_one = None

    def stepped(self, steps: Callable[[], int], metrics: Callable[[], Mapping[str, float]]) -> None:
        """A step has been taken. steps: what states count, asked for once; metrics: asked for when it is their turn."""
        self._steps = steps() if self._steps is None else self._steps + 1
        if self._steps % self._every or not _is_first_process():
            return
        try:
            if self._log is None:
                self._log = RunLog(self._directory)
            self._log.log(self._steps, metrics())
        except OSError as error:
            warn_once(
                f"option run_log={self._directory!r}: {error}; training goes on, and what could not be written is lost"
            )

    def stepped_one(self, p: Any, steps: Callable[[], int], metrics: Callable[[], Mapping[str, float]]) -> None:
        """Called before a parameter is stepped alone: where a step begins anew, one has been taken."""
        is_first, self._one_by_one = self._one_by_one is None, self._one_by_one or OneByOne()
        if self._one_by_one.takes(p) and not is_first:
            self.stepped(steps, metrics)


def _is_first_process() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


class Series(NamedTuple):
    """One metric over the steps at which it was logged, in ascending order."""

    steps: np.ndarray
    """int64 [n]."""
    values: np.ndarray
    """float64 [n]; NaN and infinities as they were logged."""


@dataclass(frozen=True, eq=False)
class Run:
    """What was logged of a run."""

    name: str
    series: dict[str, Series]
    """By the metric's name; only metrics that were logged at all."""
    broken_lines: int = 0
    """Lines that could not be read, as an interrupted write leaves them."""


def read_run(directory: str | Path) -> Run:
    """What `RunLog` wrote to this folder, also while the run goes on.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
    folder = Path(directory)
    path = folder / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no run: there is no {FILE_NAME} in it; RunLog({str(folder)!r}) makes one"
        )
    rows: dict[int, dict[str, float]] = {}
    broken, resumed = 0, False
    for record in _records(path):
        if record is None:
            broken += 1
        elif "resumed" in record:
            resumed = True
        else:
            step, metrics = record["step"], record["metrics"]
            if resumed:
                rows = {at: row for at, row in rows.items() if at < step}
                resumed = False
            rows.setdefault(step, {}).update(metrics)
    return Run(folder.resolve().name, _series(rows), broken)


def find_runs(directory: str | Path) -> list[Path]:
    """The folders that hold a run: this one and all below it, by name; run 2 comes before run 10.

    Raises:
        NotADirectoryError: there is no such folder.
        FileNotFoundError: no run is in it.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder")
    found = sorted((path.parent for path in folder.rglob(FILE_NAME)), key=_by_name)
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no run: no {FILE_NAME} is in it or in a folder below. "
            "Log one by RunLog, or by trainer_callback or lightning_callback with directory=…"
        )
    return found


def _by_name(folder: Path) -> list[list[str | int]]:
    """Its place among others, each number in a name counting as one: what stands between numbers and they in turn."""
    pieces = (enumerate(re.split(r"([0-9]+)", part)) for part in folder.parts)
    return [[int(piece) if i % 2 else piece for i, piece in part] for part in pieces]


def as_run(source: Run | str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Run:
    """A run from whatever holds one.

    Args:
        source: a run; the folder of one; records with a "step" each, as Hugging Face's `trainer.state.log_history`; or
            sequences by name, over the steps under "step", or else counted from 0.

    Raises:
        FileNotFoundError: the folder holds no run.
        TypeError, ValueError: a value that is no number, a record without a step, sequences of different lengths.
    """
    if isinstance(source, Run):
        return source
    if isinstance(source, (str, Path)):
        return read_run(source)
    if isinstance(source, Mapping):
        source = _as_records(source)
    rows: dict[int, dict[str, float]] = {}
    for record in source:
        if not isinstance(record, Mapping) or "step" not in record:
            raise ValueError(f"a record of a history is a mapping with a 'step', not {record!r}")
        row = rows.setdefault(_checked_step(record["step"]), {})
        row.update({name: as_number(name, value) for name, value in record.items() if name != "step"})
    return Run("history", _series(rows))


def as_number(name: str, value: Any) -> float:
    """The value of a metric as a float.

    Raises:
        TypeError: it is no real number, or the name no text.
        ValueError: it is beyond any float.
    """
    if not isinstance(name, str):
        raise TypeError(f"a metric's name is text, not {name!r}")
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if not isinstance(value, numbers.Real):
        shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else f" {value!r}"
        raise TypeError(f"metric {name!r} is a {type(value).__name__}{shape}: must be a number, or a tensor of one")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"metric {name!r} is a number beyond any float") from None


def _checked_step(step: Any) -> int:
    number = config.check_whole("step", step, 0)
    if number > MAX_STEP:
        raise ValueError(f"step={str(number)[:40]}: must be a whole number from 0 to 2**63 - 1")
    return number


def _as_records(history: Mapping[str, Any]) -> list[dict[str, Any]]:
    lengths = {name: len(values) for name, values in history.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the sequences of a history must be of one length, not {lengths}")
    columns = {"step": range(next(iter(lengths.values()), 0)), **history}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _records(path: Path) -> Iterator[dict[str, Any] | None]:
    """Each line as it was written; None for one that is broken."""
    with path.open("rb") as lines:
        for line in lines:
            try:
                record = json.loads(line)
                if record != {"resumed": True}:
                    record = {"step": _checked_step(record["step"]), "metrics": _floats(record["metrics"])}
            except (ValueError, TypeError, KeyError, RecursionError):
                yield None
            else:
                yield record


def _floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: as_number(name, value) for name, value in dict(metrics).items()}


def _series(rows: dict[int, dict[str, float]]) -> dict[str, Series]:
    collected: dict[str, tuple[list[int], list[float]]] = {}
    for step in sorted(rows):
        for name, value in rows[step].items():
            steps, values = collected.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
    return {
        name: Series(np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64))
        for name, (steps, values) in collected.items()
    }


def _last_byte(path: Path) -> bytes:
    """b"" where there is nothing."""
    if not path.exists() or path.stat().st_size == 0:
        return b""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)
