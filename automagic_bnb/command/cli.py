"""The command `automagic-bnb`.

A subcommand is one `add_…` function, which declares its options and sets `run`: parsed options in, exit status out.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from automagic_bnb import __version__
from automagic_bnb.command import quiet
from automagic_bnb.command.demo_options import PEERS, DemoError, DemoOptions
from automagic_bnb.command.start import INTERRUPTED

PROFILES = ("lean", "memory_optimized", "balanced", "quality_optimized")
Run = Callable[[argparse.Namespace], int]
UNREAD = 141
"""What shells report of a program that ends as nobody reads its output."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; wrong usage exits with status 2 and a message.

    Whatever fails is one line on standard error and a status of 1. Where nobody reads the output any more (`| head`),
    nothing is said.
    """
    try:
        try:
            return _run(argv)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # what fails here would be a traceback when Python ends
    except BrokenPipeError:
        _drop_output()
        return UNREAD
    except (Exception, KeyboardInterrupt) as e:
        if _is_interruption(e):
            sys.stderr.write("interrupted\n")
            return INTERRUPTED
        message = " ".join(str(e).split()) or "no message"
        sys.stderr.write(f"automagic-bnb: error: {message} ({type(e).__name__})\n")
        if isinstance(e, OSError):
            _drop_output()
        return 1


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="automagic-bnb", description="Tools around the Automagic optimizers.")
    parser.add_argument("--version", action="version", version=f"automagic-bnb {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_demo(commands)
    add_doctor(commands)
    add_dashboard(commands)
    add_run(commands)
    add_inspect(commands)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without UTF-8 shows what it cannot as question marks
            stream.reconfigure(errors="replace")
    args = parser.parse_args(argv)
    quiet.hold_import_warnings()
    return args.run(args)


def _is_interruption(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: a package that is being imported may make an ImportError of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _drop_output() -> None:
    """Let what standard output still holds go nowhere; Python would try once more to write it, and complain."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a stream without a file, or none at all
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def expecting(name: str, *errors: type[Exception]) -> Callable[[Run], Run]:
    """Of what a command runs: these errors are one line that names the command, and a status of 1."""

    def decorate(run: Run) -> Run:
        @functools.wraps(run)
        def reported(args: argparse.Namespace) -> int:
            try:
                return run(args)
            except errors as e:
                if isinstance(e, BrokenPipeError) or _is_interruption(e):
                    raise
                sys.stderr.write(f"automagic-bnb {name}: error: {e}\n")
                return 1

        return reported

    return decorate


def add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `demo`; its defaults are those of `DemoOptions`."""
    parser = commands.add_parser(
        "demo",
        help="train a small image generator with Automagic8bit and with AdamW8bit, and compare",
        description="Adapt a small generator of handwritten digits to new classes by a LoRA: with Automagic8bit, which "
        "is given no rate, and with AdamW8bit at the rate that people start with and at its best; print a comparison "
        "and write pictures. Takes about a minute on a CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=positive_int, help="LoRA steps for each optimizer")
    parser.add_argument("--base-steps", type=positive_int, help="training steps of the base model")
    parser.add_argument("--seed", type=natural_number, help="fixes the split, the weights, the batches and the noise")
    parser.add_argument("--out", type=Path, help="folder for the pictures")
    parser.add_argument("--profile", choices=PROFILES, help="profile of Automagic8bit (None: the default and lean)")
    parser.add_argument("--lr", type=positive_float, help="rate for Automagic8bit (None: it finds its own)")
    parser.add_argument("--adamw-lr", type=positive_float, help="best rate of AdamW8bit")
    parser.add_argument("--compare", choices=PEERS, help="one more optimizer to run")
    parser.add_argument("--rank", type=positive_int, help="rank of the LoRA; below 8 its states stay in 32 bits")
    parser.add_argument("--batch", type=positive_int, help="images in a step of the LoRA")
    parser.add_argument("--device", help="torch device (None: a GPU if there is one)")
    parser.set_defaults(run=run_demo, **vars(DemoOptions()))


@expecting("demo", DemoError)
def run_demo(args: argparse.Namespace) -> int:
    """`automagic-bnb demo`."""
    from automagic_bnb.command import demo

    options = DemoOptions(**{name: value for name, value in vars(args).items() if name != "run"})
    runs = demo.run_demo(options)
    return 0 if demo.is_complete(runs, options) else INTERRUPTED


def add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `doctor`."""
    parser = commands.add_parser(
        "doctor",
        help="check the installation, and test a step on every device",
        description="Print the versions of all that takes part, say how the optimizer runs here, and test a step on "
        "every device. Exits with status 1 where something is wrong, and says what to do.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for a bug report")
    parser.set_defaults(run=run_doctor)


def run_doctor(args: argparse.Namespace) -> int:
    """`automagic-bnb doctor`."""
    from automagic_bnb.command import doctor

    return doctor.run_doctor(args.json)


def add_dashboard(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `dashboard`."""
    parser = commands.add_parser(
        "dashboard",
        help="write a page that compares training runs",
        description="Write one HTML file that compares all runs logged in a folder and below it. It opens in a browser "
        "without a network.",
    )
    parser.add_argument("logdir", metavar="LOGDIR", type=Path, help="folder with run logs")
    parser.add_argument("--out", metavar="FILE", type=Path, help="file to write (default: LOGDIR/dashboard.html)")
    parser.set_defaults(run=run_dashboard)


@expecting("dashboard", ImportError, OSError, ValueError)
def run_dashboard(args: argparse.Namespace) -> int:
    """`automagic-bnb dashboard`."""
    from automagic_bnb.command.progress import progress
    from automagic_bnb.watch import dashboard

    sys.stdout.write(f"{dashboard.write_dashboard(args.logdir, args.out, progress=progress)}\n")
    return 0


def add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `run`."""
    parser = commands.add_parser(
        "run",
        help="run a trainer's script with our optimizer in the place of bitsandbytes' AdamW",
        usage="automagic-bnb run [--set NAME=VALUE ...] -- SCRIPT.py [ARGUMENT ...]\n"
        "       automagic-bnb run [--set NAME=VALUE ...] -- -m MODULE [ARGUMENT ...]",
        description="Run a script in which bitsandbytes' AdamW8bit, PagedAdamW8bit and AdamW are Automagic8bit, "
        "PagedAutomagic8bit and Automagic: for trainers with a list of optimizers of their own. Choose one of them "
        "there.",
    )
    parser.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="an option of the optimizer, which stands over what the trainer passes; may be repeated. "
        "AUTOMAGIC_BNB_OPTIONS in the environment takes the same, separated by spaces",
    )
    parser.add_argument(
        "--trainer", choices=["onetrainer"], help="a trainer in which more has to be replaced; start in its folder"
    )
    parser.add_argument("--local_rank", metavar="N", help="what DeepSpeed's launcher puts here; the program gets it")
    parser.add_argument("program", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(run=run_run)


def run_run(args: argparse.Namespace) -> int:
    """`automagic-bnb run`."""
    from automagic_bnb.command import runner

    return runner.run(args.set, args.program, args.trainer, args.local_rank)


def add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `inspect`."""
    parser = commands.add_parser(
        "inspect",
        help="show what an optimizer's checkpoint holds",
        description="Show version, groups, options, storage, bytes, rates and skipped elements of an optimizer's "
        "checkpoint: ours, bitsandbytes' or torch's, by itself or within a trainer's file. Runs no code from the file.",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="what torch.save wrote of optimizer.state_dict()")
    parser.add_argument("--json", action="store_true", help="print JSON, with every parameter")
    parser.add_argument("--picture", metavar="PNG", type=Path, help="draw bytes and rates into this file")
    parser.set_defaults(run=run_inspect)


@expecting("inspect", ImportError, OSError, ValueError)
def run_inspect(args: argparse.Namespace) -> int:
    """`automagic-bnb inspect`."""
    from automagic_bnb.command import inspection

    inspection.run_inspect(args.file, args.json, args.picture)
    return 0


def natural_number(text: str) -> int:
    """A whole number from 0 to 2^63 - 1, as argparse wants it: ValueError for anything else."""
    number = int(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2**63 - 1: {text[:40]}")
    return number


def positive_int(text: str) -> int:
    """A whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1: {text}")
    return number


def positive_float(text: str) -> float:
    """A finite number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number above 0: {text}")
    return number
