"""`analyze_memory_usage`: the memory report in a form to read, and what to do where it saves little."""

from __future__ import annotations

import sys
import warnings
from typing import Any, TextIO

from automagic_bnb import bnb, memory
from automagic_bnb.optimizer import Automagic
from automagic_bnb.watch.monitoring import automagic_of

LEAST_SHARE_IN_8BIT = 0.3
"""Below this share of the parameters in 8 bits, there is a warning."""


def analyze_memory_usage(optimizer: Any, file: TextIO | None = None) -> dict[str, Any]:
    """Print what an optimizer's state takes, in all and by state; before the first step, what it will take.

    On a terminal, where rich is installed, as one of its tables; elsewhere as plain text. Where less than 30 % of the
    parameters are in 8 bits there is a `UserWarning` with the options that change it.

    Args:
        optimizer: an Automagic optimizer, or what a trainer wrapped around one.
        file: where to; by default `sys.stdout`.

    Returns:
        `get_memory_efficiency_report()`.

    Raises:
        TypeError: not an Automagic optimizer.

    Example:
        >>> import io
        >>> optimizer = Automagic8bit(torch.nn.Linear(512, 512).parameters(), lr=1e-4)
        >>> text = io.StringIO()
        >>> analyze_memory_usage(optimizer, file=text)["basis"]
        'planned'
    """
    inner = automagic_of(optimizer)
    report = inner.get_memory_efficiency_report()
    out = sys.stdout if file is None else file
    console = _rich_console(out)
    if console is None:
        out.write(plain_text(report) + "\n")
    else:
        _print_richly(console, report)
    if report["total_parameters"] and report["compression_ratio"] < LEAST_SHARE_IN_8BIT:
        warnings.warn(remedy(inner, report["compression_ratio"]), stacklevel=2)
    return report


def plain_text(report: dict[str, Any]) -> str:
    """The report in ASCII: some lines, then a table of the states with their columns aligned."""
    rows = [("state", "size", "bytes a parameter"), *_rows(report)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    table = [f"  {name:<{widths[0]}}  {size:>{widths[1]}}  {each:>{widths[2]}}" for name, size, each in rows]
    return "\n".join([*summary_lines(report), "", *table])


def summary_lines(report: dict[str, Any]) -> list[str]:
    """What stands above the table."""
    total, saved = report["total_parameters"], round(report["memory_saved_mb"] * memory.MB)
    basis = {
        "held": "held",
        "planned": "planned: the first step allocates it",
        "mixed": f"of which {in_units(report['held_bytes'])} are held; the next step allocates the rest",
    }[report["basis"]]
    verdict = f"{in_units(abs(saved))} {'saved' if saved >= 0 else 'more'}"
    lines = [
        f"Optimizer state: {in_units(report['total_bytes'])} ({basis})",
        f"{report['bytes_per_parameter']:.2f} bytes for each of {total:,} parameters: "
        f"{report['percent_of_32bit_adam']:.1f}% of 32-bit Adam's {in_units(memory.ADAM_BYTES * total)}, {verdict}",
        f"In 8 bits: {report['8bit_parameters']:,} parameters ({report['compression_ratio']:.1%}), "
        f"{report['factored_parameters']:,} of them factored; not in 8 bits: {report['32bit_parameters']:,}",
    ]
    if report["frozen_parameters"]:
        lines.append(f"Frozen, without state: {report['frozen_parameters']:,} parameters")
    if report["paged_bytes"]:
        lines.append(f"In managed memory, which can move to the host: {in_units(report['paged_bytes'])}")
    if not report["bitsandbytes_available"]:
        lines.append("bitsandbytes could not be imported: everything is kept in 32 bits")
    return lines


def _rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """State, size and bytes a parameter, the largest state first, and the sum."""
    parts = sorted(report["states_breakdown"].items(), key=lambda item: -item[1])
    total = max(report["total_parameters"], 1)
    return [(name, in_units(size), f"{size / total:.3f}") for name, size in [*parts, ("total", report["total_bytes"])]]


def in_units(size: int) -> str:
    """Bytes in the largest decimal unit that leaves at least 1: "352.4 MB"."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size} B"


def remedy(optimizer: Automagic, share: float) -> str:
    """What to do about a small share in 8 bits: the options, and the share that each would bring."""
    text = f"only {share:.1%} of the parameters have 8-bit states, the others take about four times the memory. "
    if not bnb.BITSANDBYTES_AVAILABLE:
        return f"{text}{bnb.MISSING_WARNING}"
    plain, no_minimum, forced = (
        memory.share_with(optimizer, optim_bits=8, **further)
        for further in ({}, {"min_8bit_size": 0}, {"force_8bit": True})
    )
    return (
        f"{text}It would be {plain:.1%} with optim_bits=8 (which Automagic8bit has), {no_minimum:.1%} with "
        f"min_8bit_size=0 besides, {forced:.1%} with force_8bit=True, which holds for embeddings under stable_emb too. "
        "Pass these to the constructor, or to optimizer.requantize(...) in the middle of a run"
    )


def _rich_console(file: TextIO) -> Any:
    """A rich console on a terminal; None elsewhere, and without rich."""
    if not file.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(file=file)


def _print_richly(console: Any, report: dict[str, Any]) -> None:
    from rich.table import Table

    for line in summary_lines(report):
        console.print(line, soft_wrap=True, highlight=False)
    table = Table("state")
    table.add_column("size", justify="right")
    table.add_column("bytes a parameter", justify="right")
    *states, total = _rows(report)
    for row in states:
        table.add_row(*row)
    table.add_section()
    table.add_row(*total)
    console.print(table)
