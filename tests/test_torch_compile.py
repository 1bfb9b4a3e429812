"""A step inside torch.compile, and inside a CUDA graph that is captured: the same bits, or an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from automagic_bnb import Automagic8bit

SHAPES = ((64, 96), (32,), (16, 80))


def trained(tools: Any, compiled: bool, **options: Any) -> dict[str, Any]:
    """Six steps under a falling rate."""
    parameters = tools.parameters(*SHAPES)
    opt = Automagic8bit(parameters, backend="torch", **options)
    step = torch.compile(opt.step, backend="eager") if compiled else opt.step
    for number in range(6):
        tools.give_gradients(parameters, number)
        step()
        opt.param_groups[0]["lr"] *= 0.9
    return tools.snapshot(opt)


@pytest.mark.parametrize("lr", [1e-3, None], ids=["given", "found"])
def test_compiled_it_is_the_same_step(lr: float | None, tools: Any) -> None:
    """Tensors of several shapes, numbers that change: equal bits, and nothing is compiled a second time."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = trained(tools, True, lr=lr)
    assert tools.differences(trained(tools, False, lr=lr), compiled) == []


def test_a_compiled_training_step_is_the_same(tools: Any) -> None:
    """Forward, backward and step in one compiled function, with a closure too."""
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        parameters = tools.parameters((24, 32), (24,))
        opt = Automagic8bit(parameters, lr=1e-3, backend="torch")
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(5))

        def train(opt: Any = opt, parameters: Any = parameters, x: Any = x) -> None:
            opt.zero_grad()
            torch.nn.functional.linear(x, *parameters).square().sum().backward()
            opt.step()

        run = torch.compile(train, backend="eager") if compiled else train
        for _ in range(4):
            run()
        results.append(tools.snapshot(opt))
    assert tools.differences(*results) == []


def test_as_one_graph_it_is_refused(optimizer: Automagic8bit, tools: Any) -> None:
    torch._dynamo.reset()
    tools.give_gradients(optimizer.param_groups[0]["params"], 0)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()
    assert not optimizer.state


@pytest.mark.parametrize("way", ["step", "step_parameter"])
def test_a_capture_is_an_error(way: str, optimizer: Automagic8bit, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its replays would take the same numbered step with the same random bits for ever."""
    group = optimizer.param_groups[0]
    tools.give_gradients(group["params"], 0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="option capturable=False"):
        optimizer.step() if way == "step" else optimizer.step_parameter(group["params"][0], group)
    assert not optimizer.state
