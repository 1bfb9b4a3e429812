"""Which runs are still wanted, told from the results so far; so a sweep can stop and go on at any time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers import Peer, grid_place, grid_rate
from tasks import Task

MAX_EXTENSIONS = 6
"""Rates beyond the first ones, at each end."""

Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One training; `lr` None: no rate is given."""

    task: str
    optimizer: str
    lr: float | None
    seed: int


class Results:
    """The lines of results files by job; an error counts as a result, so that it is not tried for ever."""

    def __init__(self, *paths: Path) -> None:
        self.by_job: dict[Job, Result] = {}
        self.environments: list[dict[str, Any]] = []
        for path in paths:
            for line in map(json.loads, path.read_text().splitlines() if path.exists() else []):
                if "environment" in line:
                    self.environments.append(line)
                else:
                    self.add(line)

    def add(self, result: Result) -> None:
        self.by_job[Job(result["task"], result["optimizer"], result["lr"], result["seed"])] = result

    def rates(self, task: str, optimizer: str) -> list[float | None]:
        """Every rate that was tried, ascending."""
        found = {job.lr for job in self.by_job if (job.task, job.optimizer) == (task, optimizer)}
        return sorted(found, key=lambda lr: lr or 0.0)

    def seeds(self, task: str, optimizer: str, lr: float | None) -> list[int]:
        """Every seed that this rate was tried with."""
        return sorted(job.seed for job in self.by_job if (job.task, job.optimizer, job.lr) == (task, optimizer, lr))

    def loss(self, task: str, optimizer: str, lr: float | None, seed: int) -> float:
        """The validation loss; infinite where the run diverged or failed, NaN where there is none yet."""
        result = self.by_job.get(Job(task, optimizer, lr, seed))
        if result is None:
            return math.nan
        return math.inf if result.get("error") or result["diverged"] else result["val_loss"]


def wanted(task: Task, peer: Peer, results: Results, seeds: int, neighbours: int, decades: float = 0.0) -> list[Job]:
    """The runs that are still to be made of one optimizer on one task.

    First seed 0 at all first rates; then on by one while the best is at an end; then the other seeds, at the best rate
    and so many neighbours on each side.

    Args:
        decades: at least so many decades of rates, around the peer's centre.
    """
    count = max(6, math.ceil(decades * 2.5) + 1)
    rates = peer.first_rates(task.kind, count)

    def missing(rates: Iterable[float | None], seeds: Iterable[int]) -> list[Job]:
        jobs = [Job(task.name, peer.name, lr, seed) for lr in rates for seed in seeds]
        return [job for job in jobs if job not in results.by_job]

    if not peer.searched:
        return missing(rates, range(seeds))
    if jobs := missing(rates, [0]):
        return jobs
    if all(results.by_job[Job(task.name, peer.name, lr, 0)].get("error") for lr in rates):
        return []  # it does not run here
    tried = sorted({*rates, *results.rates(task.name, peer.name)})  # type: ignore[type-var]
    best = min(tried, key=lambda lr: results.loss(task.name, peer.name, lr, 0))
    if not math.isfinite(results.loss(task.name, peer.name, best, 0)):
        best = tried[0]  # everything diverged: lower
    end, room = (-1, best == tried[0]), (1, best == tried[-1])
    for direction, at_end in (end, room):
        place = grid_place(best) + direction
        first = grid_place(rates[0] if direction < 0 else rates[-1])  # type: ignore[arg-type]
        if at_end and abs(place - first) <= MAX_EXTENSIONS:
            return missing([grid_rate(place)], [0])
    at = tried.index(best)
    return missing(tried[max(0, at - neighbours) : at + neighbours + 1], range(seeds))
