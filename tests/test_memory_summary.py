"""The memory report as text, and the warning where quantization saves little."""

from __future__ import annotations

import io
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from memory_cases import optimizer, stepped
from torch import nn

from automagic_bnb import Automagic32bit, analyze_memory_usage
from automagic_bnb.watch.memory_summary import in_units

# --- the text ---------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


TEXTS = {"plain": io.StringIO, "rich": Terminal}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.usefixtures("no_warnings")
def test_text_holds_the_figures(kind: str, tools: Any) -> None:
    if kind == "rich":
        pytest.importorskip("rich")
    opt, file = optimizer(tools.parameters((64, 512), (100,)), factored=True), TEXTS[kind]()
    report = analyze_memory_usage(opt, file=file)
    text = file.getvalue()
    assert report == opt.get_memory_efficiency_report()
    assert "planned" in text
    assert f"{report['bytes_per_parameter']:.2f} bytes for each of 32,868 parameters" in text
    for name, size in [*report["states_breakdown"].items(), ("total", report["total_bytes"])]:
        (line,) = [x for x in text.splitlines() if f" {name} " in x]
        assert in_units(size) in line
    assert text.isascii() == (kind == "plain")
    stepped(opt)
    analyze_memory_usage(opt, file=file)
    assert "(held)" in file.getvalue()


def test_terminal_without_rich_gets_plain_text(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opt, plain, terminal = optimizer(tools.parameters((64, 512))), io.StringIO(), Terminal()
    analyze_memory_usage(opt, file=plain)
    for name in ("rich", "rich.console", "rich.table"):
        monkeypatch.setitem(sys.modules, name, None)
    analyze_memory_usage(opt, file=terminal)
    assert terminal.getvalue() == plain.getvalue()


def test_text_goes_to_standard_output(tools: Any, capsys: pytest.CaptureFixture[str]) -> None:
    opt, file = optimizer(tools.parameters((64, 512))), io.StringIO()
    analyze_memory_usage(opt, file=file)
    analyze_memory_usage(opt)
    assert capsys.readouterr().out == file.getvalue()


def test_text_names_what_is_special(tools: Any) -> None:
    """Frozen parameters, states half there, and 32 bits, which take more than Adam."""
    first, second, frozen = tools.parameters((64, 512), (64, 512), (32, 32))
    opt = stepped(optimizer([first, second, frozen.requires_grad_(False)], optim_bits=32), first)
    file = io.StringIO()
    with pytest.warns(UserWarning, match="8-bit"):
        report = analyze_memory_usage(opt, file=file)
    text = file.getvalue()
    assert "Frozen, without state: 1,024 parameters" in text
    assert f"{in_units(report['held_bytes'])} are held" in text
    assert f"{in_units(round(-report['memory_saved_mb'] * 1e6))} more" in text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (352_400_000, "352.4 MB"), (5 * 10**12, "5,000.0 GB")],
)
def test_units(size: int, text: str) -> None:
    assert in_units(size) == text


def test_what_a_trainer_wrapped_is_found(tools: Any) -> None:
    opt = optimizer(tools.parameters((64, 512)))
    wrapper = SimpleNamespace(optimizer=SimpleNamespace(optimizer=opt))
    assert analyze_memory_usage(wrapper, file=io.StringIO()) == opt.get_memory_efficiency_report()


@pytest.mark.parametrize("other", [None, "optimizer", nn.Linear(2, 2), torch.optim.AdamW([torch.zeros(1)])])
def test_others_are_refused(other: Any) -> None:
    with pytest.raises(TypeError, match=f"optimizer={type(other).__name__}: must be an Automagic optimizer"):
        analyze_memory_usage(other, file=io.StringIO())


# --- the warning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("percent", "warned"), [(29, True), (30, False), (99, False)])
def test_warns_below_thirty_percent(percent: int, warned: bool) -> None:
    """At the caller's line."""
    eight, other = (nn.Parameter(torch.empty(n * 4096, device="meta")) for n in (percent, 100 - percent))
    opt = optimizer([{"params": [eight]}, {"params": [other], "optim_bits": 32}])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        report = analyze_memory_usage(opt, file=io.StringIO())
    assert report["compression_ratio"] == pytest.approx(percent / 100)
    assert [w.filename for w in seen] == ([__file__] if warned else [])


@pytest.mark.parametrize(
    "options", [{}, {"min_8bit_size": 0}, {"force_8bit": True}], ids=["8 bits", "small ones too", "embeddings too"]
)
def test_warning_says_what_each_option_brings(options: dict[str, Any], tools: Any) -> None:
    """And `requantize` then brings just that."""
    names = ["embed", "large", "small", "smaller"]
    parameters = zip(names, tools.parameters((64, 512), (8000,), (1000,), (500,)), strict=True)
    opt = stepped(optimizer(list(parameters), optim_bits=32, stable_emb=True))
    with pytest.warns(UserWarning, match=r"requantize\(") as seen:
        analyze_memory_usage(opt, file=io.StringIO())
    opt.requantize(optim_bits=8, **options)
    share = opt.get_memory_efficiency_report()["compression_ratio"]
    brings = " ".join(f"{name}={value}" for name, value in (options or {"optim_bits": 8}).items())
    assert f"{share:.1%} with {brings}" in str(seen[0].message)


def test_32bit_by_name_warns_too(tools: Any) -> None:
    opt = Automagic32bit(tools.parameters((64, 512)), lr=1e-3)
    with pytest.warns(UserWarning, match=r"100\.0% with optim_bits=8 \(which Automagic8bit has\)"):
        analyze_memory_usage(opt, file=io.StringIO())
