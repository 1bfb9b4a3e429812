"""docs/changing-the-rule.md is true: of a toy statistic, one line of `state.KEYS`, everything else follows."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from automagic_bnb import Automagic8bit
from automagic_bnb import state as st

ROOT = Path(__file__).parents[1]
START = 0.25
TOY = st.Key("ζ, a toy", "block", dict.fromkeys(st.STORAGES, (torch.float32, START)))


@pytest.fixture
def toy() -> Iterator[str]:
    st.KEYS["toy_statistic"] = TOY
    yield "toy_statistic"
    del st.KEYS["toy_statistic"]


def stepped(tools: Any, **options: Any) -> tuple[Any, torch.Tensor]:
    parameters = tools.parameters((40, 300))
    opt = Automagic8bit(parameters, lr=1e-3, **options)
    tools.train(opt, parameters, range(2))
    return opt, parameters[0]


@pytest.mark.parametrize("options", [{}, {"factored": True}, {"optim_bits": 32}])
def test_a_toy_statistic_is_allocated_saved_and_loaded(toy: str, options: dict[str, Any], tools: Any) -> None:
    opt, p = stepped(tools, **options)
    assert torch.equal(opt.state[p][toy], torch.full((47,), START))
    opt.state[p][toy].copy_(torch.arange(47.0))
    saved = copy.deepcopy(opt.state_dict())
    other, q = stepped(tools, **options)
    other.load_state_dict(saved)
    assert torch.equal(other.state[q][toy], torch.arange(47.0))
    assert torch.equal(copy.deepcopy(opt).state_dict()["state"][0][toy], torch.arange(47.0))
    saved["state"][0][toy] = torch.zeros(46)
    with pytest.raises(ValueError, match=f"{toy} has shape"):
        other.load_state_dict(saved)
    del saved["state"][0][toy]  # an older checkpoint
    other.load_state_dict(saved)
    assert torch.equal(other.state[q][toy], torch.full((47,), START))


def test_a_toy_statistic_is_kept_through_conversions(toy: str, tools: Any) -> None:
    opt, p = stepped(tools)
    opt.state[p][toy].copy_(torch.arange(47.0))
    for options in ({"optim_bits": 32}, {"optim_bits": 8, "factored": True}, {"factored": False}):
        opt.requantize(**options)
        assert torch.equal(opt.state[p][toy], torch.arange(47.0))


def test_a_toy_statistic_is_counted_and_shown(toy: str, tools: Any) -> None:
    planned = Automagic8bit(tools.parameters((40, 300))).get_memory_efficiency_report()
    opt, p = stepped(tools)
    held = opt.get_memory_efficiency_report()
    assert planned["states_breakdown"][toy] == held["states_breakdown"][toy] == 47 * 4
    assert st.between(opt.state[p], p, 0, 300 * 64)[toy].shape == (47,)
    del st.KEYS[toy]  # control: without the line there is none
    other, q = stepped(tools)
    assert toy not in other.state[q]
    st.KEYS[toy] = TOY


@pytest.mark.kernels
def test_a_toy_statistic_has_a_column_in_the_kernels_tables() -> None:
    """In a process of its own, as columns are laid out at import; a step of the kernels follows the plain one."""
    program = """
import torch
from automagic_bnb import state as st, Automagic8bit
st.KEYS["toy_statistic"] = st.Key("ζ", "block", dict.fromkeys(st.STORAGES, (torch.float32, 0.25)))
from automagic_bnb.kernels.tables import Column
assert Column.TOY_STATISTIC
held = []
for backend in ("torch", "triton"):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(40, 300))
    opt = Automagic8bit([p], lr=1e-3, backend=backend, seed=0)
    for _ in range(2):
        p.grad = torch.randn(40, 300)
        opt.step()
    held.append(p.detach().clone())
    assert torch.equal(opt.state[p]["toy_statistic"], torch.full((47,), 0.25))
    torch.testing.assert_close(held[0], held[-1], rtol=1e-4, atol=1e-6)
print("as it should be")
"""
    if not torch.cuda.is_available():
        program = 'import os; os.environ["TRITON_INTERPRET"] = "1"\n' + program
    else:
        program = program.replace("torch.randn(40, 300)", 'torch.randn(40, 300, device="cuda")').replace(
            "torch.full((47,), 0.25)", 'torch.full((47,), 0.25, device="cuda")'
        )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT / "docs")
    assert done.stdout.strip() == "as it should be", done.stderr[-2000:]


def test_the_page_names_what_is_there() -> None:
    """Every file and name in backticks of the page exists."""
    text = (ROOT / "docs" / "changing-the-rule.md").read_text(encoding="utf-8")
    source = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in ("automagic_bnb", "kernels", "tests")
        for path in (ROOT / folder).rglob("*.py")
    )
    for name in re.findall(r"`([\w/.]+\.(?:py|md|toml))`", text):
        places = (ROOT / name, ROOT / "automagic_bnb" / name)
        assert any(place.exists() for place in places), name
    for name in re.findall(r"`(?:\w+\.)?([A-Za-z_]{4,})`", text):
        assert re.search(rf"\b{name}\b", source), name
