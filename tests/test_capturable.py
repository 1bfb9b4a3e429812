"""capturable=True: replays of a captured step equal steps that are called, and torch's GradScaler is not waited for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE

from automagic_bnb import Automagic8bit
from automagic_bnb import state as st
from automagic_bnb.optimizer import Automagic

pytest.importorskip("triton", reason="the kernels need Triton")

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's numpy: 1 / 0 in masked lanes
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, benchmarks/graph.py replays real graphs"),
]

STEPS = 13
"""Past a tenth step, at which the rank penalty is due, and past the end of the mask's warm-up."""
CASES: dict[str, dict[str, Any]] = {
    "given": {"lr": 1e-2},
    "found": {"lr": None},
    "found, scheduled": {"lr": 1.0, "auto_lr": True},
    "turned": {"lr": 1e-2, "lora_direction": "orthogonal"},
    "clipped, factored": {"lr": 1e-2, "percentile_clipping": 50, "factored": True},
}


def built(**options: Any) -> tuple[list[Any], Automagic]:
    generator = torch.Generator().manual_seed(0)
    named = []
    for name, shape in (("w", (16, 32)), ("x.lora_A", (8, 40)), ("bias", (32,))):
        named.append((name, torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.1).bfloat16().to(DEVICE))))
    options = {"backend": "triton", "min_8bit_size": 0, "warmup_steps": 8, "capturable": True, **options}
    for _, p in named:
        p.grad = torch.zeros_like(p)
    return [p for _, p in named], Automagic8bit(named, **options)


def give(parameters: list[Any], step: int, scale: float = 1.0) -> None:
    """Other gradients in the same memory, as a replayed backward pass leaves them."""
    for i, p in enumerate(parameters):
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
        p.grad.copy_(((noise * 0.01 + 0.004).bfloat16() * scale).to(p.device))


def with_tensor(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "lr": torch.tensor(options["lr"])} if options["lr"] is not None else dict(options)


def scheduled(opt: Automagic) -> Any:
    if not isinstance(opt.param_groups[0]["lr"], torch.Tensor):
        return None
    return torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.2 * (step + 1) if step < 8 else 0.7)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
def test_a_replay_is_the_step(options: dict[str, Any], tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a changing lr and a found rate: to the bits of steps that are called, in parameters, states and groups."""
    from graph_cases import capture

    results = []
    for replays in (False, True):
        parameters, opt = built(**with_tensor(options))
        schedule, graph = scheduled(opt), None
        for step in range(STEPS):
            give(parameters, step)
            if graph is not None:
                graph.replay()
            elif replays and step == 2:
                with capture(monkeypatch) as graph:
                    opt.step()
            else:
                opt.step()
            if schedule is not None:
                schedule.step()
        assert (graph is not None) == replays
        saved = opt.state_dict()
        results.append({**tools.snapshot(opt), "saved": copy.deepcopy(saved)})
        assert saved["state"][0]["step"] == STEPS
        assert options["lr"] == 1e-2 or saved["param_groups"][0]["auto_lr_count"] == STEPS - 1
    assert tools.differences(*results) == []


def test_what_the_host_counts_stands_still_in_replays(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control, without the error that is in its way."""
    from graph_cases import capture

    from automagic_bnb import fused

    monkeypatch.setattr(fused, "check_capture", lambda groups: None)
    results = []
    for replays in (False, True):
        parameters, opt = built(lr=1e-2, capturable=False)
        for step in range(2):
            give(parameters, step)
            opt.step()
        with capture(monkeypatch) as graph:
            opt.step()
        for _ in range(2):
            if replays:
                graph.replay()
            else:
                opt.step()
        results.append([p.detach().clone() for p in parameters])
    assert not torch.equal(results[0][0], results[1][0])


def test_counted_on_the_device_it_is_the_same_step(tools: Any) -> None:
    results = []
    for capturable in (False, True):
        parameters, opt = built(lr=None, capturable=capturable, percentile_clipping=60, warmup_steps=500)
        for step in range(11):
            give(parameters, step)
            opt.step()
        saved = tools.snapshot(opt) if opt.state_dict() else {}
        for name in ("lr", "base_lr", "capturable"):  # nothing is shown in `lr`
            del saved["groups"][0][name]
        results.append(saved)
    assert tools.differences(*results) == []


def test_a_capture_needs_a_step_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from graph_cases import capture

    parameters, opt = built(lr=1e-3)
    with capture(monkeypatch), pytest.raises(RuntimeError, match="take a step outside of the CUDA graph before"):
        opt.step()
    assert not opt.state
    assert torch.equal(parameters[2], built(lr=1e-3)[0][2])


def test_what_runs_in_plain_pytorch_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    from graph_cases import capture

    p = torch.nn.Parameter(torch.ones(8, 16).t())
    opt = Automagic8bit([p], lr=1e-3, backend="triton", capturable=True)
    p.grad = torch.ones_like(p)
    opt.step()
    with capture(monkeypatch), pytest.raises(RuntimeError, match="plain PyTorch"):
        opt.step()


def test_a_rank_penalty_that_would_wait_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(80, 96))
    opt = Automagic8bit([p], lr=1e-3, backend="triton", capturable=True, lora=True)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="pass lora_rank_penalty=False"):
        opt.step()


def test_a_tensor_for_a_rate_is_one_float32_number() -> None:
    p = torch.nn.Parameter(torch.ones(8))
    with pytest.raises(TypeError, match="0-d float32"):
        Automagic8bit([p], lr=torch.tensor(1e-3, dtype=torch.float64), capturable=True)
    rate = torch.tensor(1e-3)
    assert Automagic8bit([p], lr=rate, capturable=True).param_groups[0]["lr"] is rate
    assert isinstance(Automagic8bit([p], lr=rate).param_groups[0]["lr"], float)


def test_a_checkpoint_carries_on(tools: Any) -> None:
    """Counts of the device are saved, and loaded into the very lr tensor that a scheduler knows."""
    parameters, opt = built(lr=torch.tensor(1e-2))
    for step in range(3):
        give(parameters, step)
        opt.step()
    others, other = built(lr=torch.tensor(5e-3))
    rate = other.param_groups[0]["lr"]
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for p, q in zip(parameters, others, strict=True):
        q.data.copy_(p.data)
    for opt_, ps in ((opt, parameters), (other, others)):
        for step in range(3, 5):
            give(ps, step)
            opt_.step()
    assert other.param_groups[0]["lr"] is rate
    assert opt.state_dict()["state"][0]["step"] == 5
    assert tools.differences(*(tools.snapshot(o) for o in (opt, other) if o.state_dict())) == []


# --- torch's GradScaler -----------------------------------------------------------------------------------------------


def scaled_step(opt: Automagic, scale: float, found: float) -> None:
    """What GradScaler.step does with an optimizer that scales by itself."""
    assert opt._step_supports_amp_scaling
    opt.grad_scale = torch.tensor([scale]).to(DEVICE)  # type: ignore[attr-defined]
    opt.found_inf = torch.tensor([found]).to(DEVICE)  # type: ignore[attr-defined]
    opt.step()
    del opt.grad_scale, opt.found_inf


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("clipping", [100, 50])
def test_an_infinite_gradient_changes_nothing(backend: str, clipping: int, tools: Any) -> None:
    """Steps with scaled gradients, some of them with an infinity, are those without scale and without these."""
    results = []
    for scale in (1.0, 1024.0):
        parameters, opt = built(lr=None, backend=backend, percentile_clipping=clipping)
        for step in range(5):
            give(parameters, step, scale)
            if scale == 1.0:
                opt.step()
                continue
            for bad in range(step in (0, 3)):
                give(parameters, 50 + bad)
                parameters[0].grad[0, 0] = float("inf")
                before = [p.detach().clone() for p in parameters]
                scaled_step(opt, scale, 1.0)
                assert all(map(torch.equal, before, parameters))
                give(parameters, step, scale)
            scaled_step(opt, scale, 0.0)
        saved = opt.state_dict()
        assert saved["state"][0]["step"] == 5
        results.append(tools.snapshot(opt))
    assert tools.differences(*results) == []


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("clipping", [100, 50])
def test_what_is_skipped_is_settled_without_the_scale(backend: str, clipping: int, tools: Any) -> None:
    """And before clipping: a scale hides none of the gradients above 2^50, and makes none of the others one."""
    results = []
    for scale in (1.0, 1024.0, 1 / 1024):
        parameters, opt = built(lr=1e-2, backend=backend, percentile_clipping=clipping)
        for step in range(3):
            give(parameters, step, scale)
            if step == 2:
                parameters[0].grad[3, ::5], parameters[0].grad[3, 1::5] = scale * 2.0**55, scale * 2.0**49
            if scale == 1.0:
                opt.step()
            else:
                scaled_step(opt, scale, 0.0)
        assert opt.state_dict()["state"][0]["tensor_stats"][st.SKIPPED] == len(range(0, 32, 5))
        results.append(tools.snapshot(opt))
    assert tools.differences(results[0], results[1]) == []
    assert tools.differences(results[0], results[2]) == []


def test_torchs_own_scaler_takes_it() -> None:
    """On the CPU, which it can do since torch 2.3: the scale goes down, the weights stay."""
    parameters, opt = built(lr=1e-2, backend="torch")
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    loss = scaler.scale(parameters[2].float().square().sum())
    loss.backward()
    parameters[2].grad[0] = float("inf")
    before = parameters[2].detach().clone()
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 128.0
    assert torch.equal(before, parameters[2])


def test_without_capturable_the_scaler_unscales_as_ever() -> None:
    assert not Automagic8bit([torch.nn.Parameter(torch.ones(4))], lr=1e-3)._step_supports_amp_scaling
