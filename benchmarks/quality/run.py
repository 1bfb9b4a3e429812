"""Thousands of small trainings: every optimizer on every task, each at its own best rate.

    python benchmarks/quality/run.py prepare                        # data, and what the fine-tunes start from
    python benchmarks/quality/run.py sweep --workers 6              # on every GPU; goes on where it stopped
    python benchmarks/quality/report.py                             # tables and plots

Several processes share each GPU, since a run is bound by the host; they take runs of the same task as long as there are
any. On a CPU everything runs too, slowly; `--tiny` is for that.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import gc
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TextIO

import data
import peers
import tasks
import torch
from peers import Peer
from search import Job, Result, Results, wanted
from tasks import Task
from tqdm import tqdm
from training import Trainer, measure, prepare_base

HERE = Path(__file__).parent
Context = multiprocessing.get_context("spawn")


# --- one process -----------------------------------------------------------------------------------------------------


def work(connection: Connection, args: argparse.Namespace, device: str) -> None:
    """Make the runs that come, one after the other, until None comes; each answer is a result."""
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 wherever weights are float32
        torch.backends.cudnn.allow_tf32 = True
    torch.set_num_threads(1)
    table, trainer = peers.with_extra(args.extra), None
    while (job := connection.recv()) is not None:
        head = {**asdict(job), "error": None}
        try:
            if trainer is None or trainer.task.name != job.task:
                trainer = None  # its memory first
                gc.collect()
                if device == "cuda":
                    torch.cuda.empty_cache()
                trainer = Trainer(task_of(job.task, args), args.cache, torch.device(device), args.tiny)
            connection.send({**head, **trainer.run(table[job.optimizer], job.lr, job.seed)})
        except Exception as error:
            trainer = None
            text = "".join(traceback.format_exception(error)[-3:])[-800:]
            connection.send({**head, "error": f"{type(error).__name__}: {error}"[:300], "traceback": text})
            if "CUDA error" in str(error):
                return  # nothing works in this process any more


def task_of(name: str, args: argparse.Namespace) -> Task:
    task = tasks.TASKS[name]
    return replace(task, steps=args.steps, batch=min(task.batch, 4)) if args.steps else task


@dataclass
class Worker:
    connection: Connection
    process: Any
    gpu: int
    job: Job | None = None
    task: str | None = None


def start_worker(args: argparse.Namespace, gpu: int, device: str) -> Worker:
    ours, theirs = Context.Pipe()
    os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu) if device == "cuda" else ""
    process = Context.Process(target=work, args=(theirs, args, device), daemon=True)
    process.start()
    theirs.close()
    return Worker(ours, process, gpu)


@contextlib.contextmanager
def shared_gpus(wish: bool) -> Iterator[str]:
    """NVIDIA's multi-process service, where its daemon is there and works: kernels of all processes then run side by
    side, where they would take turns. Nothing of the device's settings is changed."""
    if "CUDA_MPS_PIPE_DIRECTORY" in os.environ:
        yield "GPUs shared through MPS, which was running"
        return
    daemon = shutil.which("nvidia-cuda-mps-control")
    if not wish or daemon is None:
        yield "GPUs shared by turns"
        return
    with tempfile.TemporaryDirectory() as folder:
        environment = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        os.environ.update(environment)
        probe = "import torch; torch.zeros(1, device='cuda').add_(1).item()"
        try:
            subprocess.run([daemon, "-d"], check=True, timeout=20)
            subprocess.run([sys.executable, "-c", probe], check=True, timeout=60)
            yield "GPUs shared through MPS"
        except (OSError, subprocess.SubprocessError) as error:
            for name in environment:
                os.environ.pop(name)
            yield f"GPUs shared by turns (MPS failed: {type(error).__name__})"
        finally:
            there = {**os.environ, **environment}
            subprocess.run([daemon], input="quit\n", text=True, timeout=20, check=False, env=there)


# --- the sweep -------------------------------------------------------------------------------------------------------


class Queue:
    """The runs that are wanted, by task; what comes next depends on what was found."""

    def __init__(self, pairs: Iterable[tuple[Task, Peer]], results: Results, args: argparse.Namespace) -> None:
        self.pairs = {(task.name, peer.name): (task, peer) for task, peer in pairs}
        self.results, self.args = results, args
        self.pending: dict[str, dict[Job, None]] = {task: {} for task, _ in self.pairs}
        self.running: set[Job] = set()
        for pair in self.pairs:
            self._want(pair)

    def _want(self, pair: tuple[str, str], first: bool = False) -> int:
        task, peer = self.pairs[pair]
        args = self.args
        decades = args.decades if any(fnmatch.fnmatch(peer.name, x) for x in args.wide) else 0.0
        jobs = wanted(task, peer, self.results, args.seeds, args.neighbours, decades)
        waiting = self.pending[task.name]
        new = [job for job in jobs if job not in self.running and job not in waiting]
        # What a result brought comes first: one optimizer's search ends before the next one's begins.
        self.pending[task.name] = {**dict.fromkeys(new), **waiting} if first else {**waiting, **dict.fromkeys(new)}
        return len(new)

    def __len__(self) -> int:
        return sum(map(len, self.pending.values()))

    def take(self, task: str | None, working: Counter[str]) -> Job | None:
        """A run of this task, or else of the one with most work left for each process that is at it."""
        if task is None or not self.pending[task]:
            steps = tasks.TASKS
            task = max(self.pending, key=lambda t: len(self.pending[t]) * steps[t].steps / (1 + working[t]))
        if not self.pending[task]:
            return None
        job = next(iter(self.pending[task]))
        del self.pending[task][job]
        self.running.add(job)
        return job

    def done(self, job: Job, result: Result) -> int:
        """Note it; returns how many more runs are wanted for it."""
        self.results.add(result)
        self.running.discard(job)
        return self._want((job.task, job.optimizer), first=True)


def sweep(args: argparse.Namespace) -> int:
    table = peers.with_extra(args.extra)
    chosen = [t for t in tasks.TASKS.values() if matches(t.name, args.tasks) and args.split in (t.split, "all")]
    optimizers = [p for p in table.values() if matches(p.name, args.optimizers)]
    # Long tasks first, so that none of them is left alone at the end.
    chosen.sort(key=lambda task: -task.steps)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    queue = Queue(itertools.product(chosen, optimizers), Results(args.out), args)
    gpus = torch.cuda.device_count() if args.device == "cuda" else 1
    with shared_gpus(args.mps and args.device == "cuda") as how, args.out.open("a") as file:
        print(f"{len(queue)} runs to begin with, {gpus} × {args.workers} processes, {how}", flush=True)
        run_all(queue, file, args, gpus)
        environment = measure.environment(torch.device(args.device))  # last: nothing of ours may hold a GPU before
        file.write(json.dumps({"environment": environment, "command": measure.command(), "sharing": how}) + "\n")
    return 0


def run_all(queue: Queue, file: TextIO, args: argparse.Namespace, gpus: int) -> None:
    workers = [start_worker(args, gpu, args.device) for _ in range(args.workers) for gpu in range(gpus)]
    end = time.monotonic() + 60 * args.minutes
    with tqdm(total=len(queue), mininterval=5, smoothing=0.05) as bar:

        def give(worker: Worker) -> None:
            working = Counter(w.task for w in workers if w.job is not None and w.task is not None)
            worker.job = queue.take(worker.task, working) if time.monotonic() < end else None
            if worker.job is not None:
                worker.task = worker.job.task
                worker.connection.send(worker.job)

        def note(worker: Worker, result: Result) -> None:
            assert worker.job is not None
            file.write(json.dumps(result) + "\n")
            file.flush()
            if result["error"]:
                bar.write(f"{worker.job}: {result['error']}")
            bar.total += queue.done(worker.job, result)
            bar.update()

        for worker in workers:
            give(worker)
        while busy := [worker for worker in workers if worker.job is not None]:
            for connection in wait([worker.connection for worker in busy]):
                i = next(i for i, worker in enumerate(workers) if worker.connection is connection)
                try:
                    note(workers[i], workers[i].connection.recv())
                except EOFError:  # killed, e.g. by the system for its memory
                    job = workers[i].job
                    assert job is not None
                    note(workers[i], {**asdict(job), "error": "the process ended"})
                if not workers[i].process.is_alive():
                    workers[i] = start_worker(args, workers[i].gpu, args.device)
                give(workers[i])
            for worker in workers:  # a result may have brought work for those that found none
                if worker.job is None and len(queue):
                    give(worker)
    for worker in workers:
        with contextlib.suppress(OSError):
            worker.connection.send(None)
    for worker in workers:
        worker.process.join(timeout=10)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """By shell patterns; one that begins with ! takes away."""
    patterns = list(patterns)
    refused = [x[1:] for x in patterns if x.startswith("!")]
    wished = [x for x in patterns if not x.startswith("!")] or ["*"]
    return any(fnmatch.fnmatch(name, x) for x in wished) and not any(fnmatch.fnmatch(name, x) for x in refused)


# --- the command -----------------------------------------------------------------------------------------------------


def prepare(args: argparse.Namespace) -> int:
    """Data, and the bases, unless they are there."""
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")
    args.cache.mkdir(parents=True, exist_ok=True)
    chosen = [task for task in tasks.TASKS.values() if matches(task.name, args.tasks)]
    for task in chosen:
        data.sources(task.family, task.source, args.cache, torch.device("cpu"))
    used = {task.family for task in chosen if task.kind != "scratch"}
    for family in tasks.BASES:
        if family in used:
            start = time.monotonic()
            loss = prepare_base(family, args.cache, device, args.tiny)
            said = "there" if loss is None else f"validation loss {loss:.4f}"
            print(f"base of {family}: {said}, {time.monotonic() - start:.1f} s", flush=True)
    return 0


def main() -> int:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--cache", type=Path, default=HERE / "cache", help="folder of data and bases")
    shared.add_argument("--device", choices=["cuda", "cpu"], default=default)
    names = ", ".join(tasks.TASKS)
    shared.add_argument("--tasks", nargs="+", default=["*"], help=f"names, patterns, !patterns of {names}")
    shared.add_argument("--tiny", action="store_true", help="tiny models: only whether everything runs")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("prepare", parents=[shared], help="make the data, train the bases")
    command.set_defaults(work=prepare)
    command = commands.add_parser("sweep", parents=[shared], help="make all runs that are missing")
    command.set_defaults(work=sweep)
    command.add_argument("--optimizers", nargs="+", default=["*"], help="names, patterns, !patterns of peers.PEERS")
    command.add_argument("--extra", type=Path, help="a Python file with more of them: OPTIMIZERS, a list of peers.Peer")
    command.add_argument("--split", choices=["choose", "judge", "more", "all"], default="all")
    command.add_argument("--seeds", type=int, default=3, help="default: 3")
    command.add_argument("--neighbours", type=int, default=1, help="rates beside the best that get all seeds")
    command.add_argument("--wide", nargs="+", default=[], help="optimizers that are tried over --decades")
    command.add_argument("--decades", type=float, default=4.0)
    command.add_argument("--workers", type=int, default=6, help="processes for each GPU; default: 6")
    command.add_argument("--minutes", type=float, default=1e9, help="begin no run later than this")
    command.add_argument("--steps", type=int, help="cut every task to so many steps and its batch to 4")
    command.add_argument("--no-mps", dest="mps", action="store_false", help="share GPUs without NVIDIA's service")
    command.add_argument("--out", type=Path, default=HERE / "results" / "runs.jsonl", help="appended to")
    args = parser.parse_args()
    return args.work(args)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    raise SystemExit(main())
