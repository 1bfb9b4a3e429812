"""The command `inspect`: what an optimizer's checkpoint holds, as a table, as JSON and as a picture.

Files are read with `weights_only=True`, so none of their code runs. Understood are the checkpoints of this package, of
bitsandbytes' and of torch's optimizers, by themselves or as an entry of a trainer's file.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pickle
import struct
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from automagic_bnb import auto_lr, config, files
from automagic_bnb import quantization as q
from automagic_bnb import state as st
from automagic_bnb.command.progress import WatchedFile, progress
from automagic_bnb.migration import WRAPPED

ENTRIES = ("optimizer", "optimizer_state_dict", "optimizer_state", "optimizer_states", "optim")
"""Where trainers keep it within a larger checkpoint."""
OCTAVE_PARTS = 4
"""Bars of the rates' histogram for a factor of two."""
MOST_NAMED = 6
"""Groups whose mean rates the picture names."""
LARGEST = 10
"""Parameters that the table shows, those with most bytes."""


@dataclass(frozen=True)
class Parameter:
    """One parameter's state."""

    number: int
    group: int
    shape: list[int] | None
    """None where no tensor of the state has the parameter's shape, as with a paged or factored peer's."""
    elements: int | None
    storage: str
    bytes: int
    step: int | None
    skipped: int | None
    """Elements left out so far because their gradient was NaN or infinite; None where it is not recorded."""
    tensors: dict[str, str]
    """dtype and shape of each tensor."""


@dataclass(frozen=True)
class Group:
    parameters: int
    options: dict[str, Any]
    rate: float | None
    """The mean rate in force."""
    rate_origin: str


@dataclass(frozen=True)
class Report:
    file: str
    written_by: str
    groups: list[Group]
    parameters: list[Parameter]
    rates: list[tuple[float, int]]
    """Histogram of single weights' rates: the lower edge of each bar, a quarter of an octave wide, and its weights."""

    @property
    def bytes(self) -> int:
        return sum(parameter.bytes for parameter in self.parameters)


UNREADABLE = (
    *(RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError, AssertionError, OverflowError),
    struct.error,
)
"""What bytes that are not a whole file of torch's make its reader raise."""

# --- reading ----------------------------------------------------------------------------------------------------------


def load(path: Path) -> dict[str, Any]:
    """The optimizer's part of a file: "state" and "param_groups".

    Raises:
        OSError: it cannot be read.
        ValueError: it is no checkpoint of an optimizer, or holds more than tensors and plain values.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name the optimizer's file in it, such as optimizer.pt")
    try:
        with WatchedFile(path, "reading") as file:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        reason = str(e).splitlines()[0] if str(e) else "cannot be unpickled"
        raise ValueError(
            f"{path} is no file of torch.save, or holds more than tensors and plain values, which is not read, since "
            f"that could run code ({reason})"
        ) from e
    except UNREADABLE as e:
        raise ValueError(f"{path} is no whole file of torch.save: {str(e).splitlines()[0] if str(e) else e!r}") from e
    candidates = [found, *(found[name] for name in ENTRIES if name in found)] if isinstance(found, Mapping) else [found]
    for candidate in candidates:
        inner = candidate[0] if isinstance(candidate, list) and len(candidate) else candidate  # Lightning keeps a list
        if isinstance(inner, Mapping) and {"state", "param_groups"} <= inner.keys():
            return dict(inner)
    held = sorted(map(str, found))[:8] if isinstance(found, Mapping) else type(found).__name__
    raise ValueError(f"{path} holds no optimizer's state: neither state and param_groups nor one of {ENTRIES}: {held}")


def examine(path: Path) -> Report:
    """Read a file and describe it; raises what `load` does."""
    saved = load(path)
    saved["state"] = {key: {**state, **state.get(WRAPPED, {})} for key, state in saved["state"].items()}
    groups = [group_of(group) for group in saved["param_groups"]]
    owners = {key: i for i, group in enumerate(saved["param_groups"]) for key in group["params"]}
    parameters, histogram = [], Counter[int]()
    for number, state in progress(saved["state"].items(), "examining"):
        parameters.append(parameter_of(number, owners.get(number, 0), state))
        for bar, count in bars(state, groups[parameters[-1].group]):
            histogram[bar] += count
    rates = [(2 ** (bar / OCTAVE_PARTS), count) for bar, count in sorted(histogram.items())]
    return Report(str(path), written_by(saved), groups, parameters, rates)


def written_by(saved: dict[str, Any]) -> str:
    """Which optimizer, as far as its keys and options tell, and of ours the versions that write such."""
    groups = saved["param_groups"]
    keys = {key for state in saved["state"].values() for key in state}
    options = {key for group in groups for key in group}
    if {"base_lr", "warmup_steps"} & options or {"tensor_stats", "torque"} <= keys:
        if "auto_lr_given" in options:
            return "automagic-bnb, from 0.3.0 on"
        return "automagic-bnb 0.2.0 or earlier"
    if "lr_mask" in keys or "lr_mask_q" in keys:
        return "ai-toolkit's Automagic, or a CameAMP variant"
    if {"state1", "state2"} & keys:
        return "bitsandbytes, an Adam or another optimizer with its states"
    if "d" in options and {"p0", "s"} & keys:
        return "Prodigy"
    if {"exp_avg", "exp_avg_sq"} <= keys:
        return "torch's Adam or AdamW, or one that keeps the same states"
    return "another optimizer" if keys else "an optimizer that has kept no state yet"


def group_of(saved: dict[str, Any]) -> Group:
    """Options as plain values; the mean rate, and where it comes from."""
    options = {name: plain(value) for name, value in saved.items() if name != "params"}
    rate, origin = saved.get("lr"), "given"
    if {"auto_lr", "base_lr"} <= saved.keys() and saved["auto_lr"]:
        rate, origin = auto_lr.mean_rate(saved), "found"
    elif isinstance(saved.get("d"), float) and rate is not None:
        rate, origin = rate * saved["d"], "found"
    return Group(len(saved["params"]), options, None if rate is None else float(rate), origin)


def plain(value: Any) -> Any:
    """What JSON can say of an option."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def flat(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of a state, those within nested dictionaries too."""
    for name, value in state.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping) and name != WRAPPED:
            yield from flat(value, f"{prefix}{name}.")


def parameter_of(number: int, group: int, state: Mapping[str, Any]) -> Parameter:
    """Bytes are those of the tensors, without code books, which all parameters share."""
    tensors = dict(flat(state))
    own = {name: x for name, x in tensors.items() if not name.split(".")[-1].startswith("qmap")}
    sizes = [x for name, x in own.items() if name in st.ELEMENT_KEYS or name.split(".")[-1] in ("exp_avg", "momentum")]
    shaped = sizes[0] if sizes else max(own.values(), key=Tensor.numel, default=None)
    shape = list(shaped.shape) if shaped is not None and shaped.dim() else None
    step = state.get("step")
    stats = state.get("tensor_stats")
    return Parameter(
        number,
        group,
        shape,
        None if shape is None else math.prod(shape),
        storage_of(own),
        sum(x.nbytes for x in own.values()),
        None if step is None else int(step),
        None if stats is None or len(stats) != len(st.STATS) else int(stats[st.SKIPPED]),
        {name: f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for name, x in own.items()},
    )


def storage_of(tensors: Mapping[str, Tensor]) -> str:
    """ "factored", "8bit" or "32bit" of ours and bitsandbytes'; else the dtypes of the larger tensors."""
    if "exp_avg_sq_row" in tensors:
        return "factored"
    if "state1" in tensors:
        return "8bit" if tensors["state1"].dtype == torch.uint8 else "32bit"
    names = {str(x.dtype).removeprefix("torch.") for x in tensors.values() if x.dim()}
    return ", ".join(sorted(names)) or "none"


def bars(state: Mapping[str, Any], group: Group) -> Iterator[tuple[int, int]]:
    """The bars that a parameter's weights fall into, by the rates that they would take next, and how many."""
    if group.rate is None or not group.rate > 0:
        return
    k = exponents_of(state)
    if k is None:
        shaped = [x for name, x in flat(state) if x.dim() and not name.startswith("qmap")]
        if shaped:
            yield bar_of(group.rate), max(x.numel() for x in shaped)
        return
    exponents, counts = torch.unique(k, return_counts=True)
    mean = float(state["tensor_stats"][st.MASK_MEAN])
    low, high = group.options.get("min_lr") or 0.0, group.options.get("max_lr")
    high = config.MAX_LR_RATIO * group.rate if high is None else high
    for exponent, count in zip(exponents.tolist(), counts.tolist(), strict=True):
        rate = group.rate * 2 ** (exponent / 16) / mean
        yield bar_of(min(max(rate, min(low, group.rate)), max(high, group.rate))), count


def exponents_of(state: Mapping[str, Any]) -> Tensor | None:
    """k of every weight, float32 and flat; None where it has no rates of single weights, or is not ours."""
    mask, pairs = state.get("lr_mask"), state.get("lr_mask4")
    if "tensor_stats" not in state:
        return None
    if isinstance(pairs, Tensor) and isinstance(state.get("state1"), Tensor):
        return q.unpack_pairs(pairs)[0][: state["state1"].numel()]
    if not isinstance(mask, Tensor):
        return None
    return (q.unpack_mask(mask)[0] if mask.dtype == torch.uint8 else mask.float()).flatten()


def bar_of(rate: float) -> int:
    return math.floor(math.log2(rate) * OCTAVE_PARTS + 1e-9)


# --- showing ----------------------------------------------------------------------------------------------------------


def run_inspect(path: Path, as_json: bool, picture: Path | None) -> None:
    """Examine a file, print what it holds, and draw it where a picture is asked for.

    Raises:
        ValueError: it is no checkpoint, or the picture would take its place, or that of what a link points to.
    """
    if picture is not None:
        files.check_no_link(picture, "the picture")
        if picture.exists() and path.exists() and picture.samefile(path):
            raise ValueError(f"{picture} is the checkpoint, which the picture would overwrite; choose another file")
    report = examine(path)
    text = json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False) if as_json else table(report)
    sys.stdout.write(f"{text}\n")
    if picture is not None:
        draw(report, picture)
        sys.stderr.write(f"Picture: {picture.resolve()}\n")


def table(report: Report) -> str:
    """For a terminal of 80 columns."""
    elements = sum(p.elements or 0 for p in report.parameters)
    each = f", {report.bytes / elements:.2f} bytes a parameter" if elements else ""
    steps = sorted({p.step for p in report.parameters if p.step is not None})
    skipped = [p.skipped for p in report.parameters if p.skipped is not None]
    lines = [
        f"file             {report.file}",
        f"written by       {report.written_by}",
        f"steps            {span(steps)}",
        f"state            {megabytes(report.bytes)} of {len(report.parameters)} parameters{each}",
        f"skipped elements {sum(skipped) if skipped else 'not recorded'}",
    ]
    for storage, held in itertools.groupby(sorted(report.parameters, key=storage_name), storage_name):
        members = list(held)
        lines.append(f"  {storage:<14} {len(members)} parameters, {megabytes(sum(p.bytes for p in members))}")
    for index, group in enumerate(report.groups):
        rate = "" if group.rate is None else f", mean rate {group.rate:.2e} ({group.rate_origin})"
        lines += ["", f"group {index}: {group.parameters} parameters{rate}"]
        lines += [f"  {name:<26} {shortened(value)}" for name, value in sorted(group.options.items())]
    if len(report.rates) > 1:
        lines += ["", "rates of single weights", *histogram_lines(report.rates)]
    largest = sorted(report.parameters, key=lambda p: -p.bytes)[:LARGEST]
    if largest:
        lines += ["", f"the {len(largest)} largest states", "  number         bytes      step  storage, shape"]
        lines += [f"  {p.number:<6} {p.bytes:>13,} {show(p.step):>9}  {p.storage}, {show(p.shape)}" for p in largest]
    return "\n".join(lines)


def storage_name(parameter: Parameter) -> str:
    return parameter.storage


def span(values: list[int]) -> str:
    if not values:
        return "not recorded"
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


def show(value: Any) -> str:
    return "–" if value is None else str(value)


def shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 48 else f"{text[:47]}…"


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB" if size >= 10_000 else f"{size:,} bytes"


def histogram_lines(rates: list[tuple[float, int]], width: int = 40) -> list[str]:
    """A bar for each factor of 2^(1/4), as long as its share of the largest."""
    most = max(count for _, count in rates)
    return [f"  {rate:.2e}  {'#' * max(1, round(width * count / most)):<{width}} {count:,}" for rate, count in rates]


def draw(report: Report, path: Path) -> None:
    """Bytes by tensor, and the rates of single weights."""
    from automagic_bnb.watch.style import COLOURS, legend_below, line_style, new_figure, saved, scale_of_rates

    sizes = Counter[str]()
    for parameter in report.parameters:
        for name, text in parameter.tensors.items():
            dtype, _, shape = text.partition(" ")
            sizes[name] += math.prod(json.loads(shape)) * getattr(torch, dtype).itemsize
    title = f"{Path(report.file).name}: {megabytes(report.bytes)} of optimizer state"
    figure = new_figure(title, height=4.5 + 0.22 * len(sizes))
    held, rates = figure.subplots(2, 1, height_ratios=(0.8 + 0.22 * len(sizes), 2.5))
    names = [name for name, _ in sizes.most_common()][::-1]
    held.barh(names, [sizes[name] / 1e6 for name in names], color=COLOURS[0])
    held.set_xlabel("MB, by tensor of the state")
    edges = np.array([rate for rate, _ in report.rates])
    rates.set_xlabel("learning rate of single weights")
    rates.set_ylabel("weights")
    if len(edges):
        step = 2 ** (1 / OCTAVE_PARTS)
        counts = [count for _, count in report.rates]
        rates.bar(edges, counts, width=edges * (step - 1), align="edge", color=COLOURS[0])
        scale_of_rates(rates)
        known = [(index, group) for index, group in enumerate(report.groups) if group.rate]
        for place, (index, group) in enumerate(known):
            label = f"mean of group {index}: {group.rate:.2e}, {group.rate_origin}"
            rates.axvline(group.rate, lw=2, label=label, **line_style(place + 1))
        if 0 < len(known) <= MOST_NAMED:
            legend_below(figure, rates)
    else:
        rates.text(0.5, 0.5, "not recorded", ha="center", transform=rates.transAxes)
    saved(figure, path)
