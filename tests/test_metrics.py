"""`get_metrics` against numpy in float64 on the state as it lies; it only reads, waits once, and keeps its names."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from rule_in_float64 import TileMeans
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from automagic_bnb import Automagic8bit, Automagic32bit, metrics
from automagic_bnb import state as st

FLOAT32 = 2e-6
"""Relative: rates are worked out in float32 (a few roundings of 6e-8) and their powers of two to about 1e-7 each."""
BLOCK_MEANS = 1e-4
"""Of clip factors, which are of order 1: float32 over 256 elements gives 1e-6; an edge taken for none, in float32 or
in float64, moves one block of hundreds by 1e-3."""
BIN = 2 ** (1 / 512) * (1 + FLOAT32)
"""A 32-bit exponent is rounded to 1/16, half of that up or down: 1/512 octave."""
SHAPES = [(64, 96), (33, 130), (24, 5, 3, 3), (700,), (256,), (257,), (1,), (), (300, 3), (5, 1000)]
GRADIENT_NAMES = {"sign_agreement", "share_background", "clip_ratio"}


def bits_of(opt: Any) -> type:
    return Automagic8bit if opt.config.optim_bits == 8 else Automagic32bit


def moment(state: dict[str, Any], number: int) -> np.ndarray:
    """m or v, flat float64, decoded with the state's own code book."""
    if number == 2 and "exp_avg_sq_row" in state:
        means = TileMeans(tuple(state["state1"].shape), beta=0, eps=0)
        means.row, means.col = (state[f"exp_avg_sq_{x}"].float().numpy(force=True).reshape(-1) for x in ("row", "col"))
        return means.held()
    held = state[f"state{number}"].numpy(force=True).reshape(-1)
    if held.dtype != np.uint8:
        return held.astype(np.float64)
    book = state["qmap1" if number == 1 else "qmap2"].numpy(force=True).astype(np.float64)
    absmax = state[f"absmax{number}"].numpy(force=True).astype(np.float64)
    return book[held] * np.repeat(absmax, 256)[: held.size]


def block_means(x: np.ndarray) -> np.ndarray:
    return np.array([x[i : i + 256].mean() for i in range(0, x.size, 256)])


def gradient_figures(opt: Any, p: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By element whether g and m agree; by block activity and clip factor."""
    state, o = opt.state[p], opt.effective_options(opt.param_groups[0], p)
    g = p.grad.float().numpy(force=True).astype(np.float64)
    kept = np.abs(np.nan_to_num(g, nan=np.inf)) <= 2.0**50
    g = np.where(kept, g, 0.0)
    if o["percentile_clipping"] < 100:
        seen = state["gnorm_vec"].numpy(force=True)[: state["step"]]  # fewer than 100 steps
        norm = np.sqrt((g**2).sum())
        g = g * min(1.0, np.percentile(seen, o["percentile_clipping"], method="inverted_cdf") / norm)
    filtered = g.copy()
    if g.ndim >= 2 and min(g.shape[-2:]) > 2:
        planes = g.reshape(-1, *g.shape[-2:])
        lap = np.stack([scipy.ndimage.laplace(plane, mode="nearest") for plane in planes]).reshape(g.shape)
        lap = np.where(kept, lap, 0.0)
        filtered = g + o["frequency_penalty"] / 8 * lap
        if o["edge_suppression"]:
            rms = np.sqrt(block_means(g.reshape(-1) ** 2))
            e = np.abs(lap).reshape(-1) / (math.sqrt(20) * np.repeat(rms, 256)[: g.size] + 1e-30)
            e = np.where(e > o["edge_threshold"], np.minimum(e, 32), 0.0)
            h = 0.9 * state["edge_history"].numpy(force=True) + 0.1 * block_means(e)
            damped = np.clip(1 - o["edge_penalty"] * np.repeat(h, 256)[: g.size] * e, 0.1, 1)
            filtered = filtered * damped.reshape(g.shape)
    v_hat = moment(state, 2) / (1 - o["betas"][1] ** state["step"])
    activity = block_means(filtered.reshape(-1) ** 2 / np.maximum(v_hat, 1e-37))
    clip = np.minimum(1, o["clip_threshold"] / np.sqrt(np.maximum(activity, 1e-37)))
    return np.sign(g.reshape(-1)) * np.sign(moment(state, 1)) > 0, activity, clip


def expected(opt: Any, parameters: list[Any]) -> dict[str, float]:
    """Every figure over parameters of the first group."""
    rates = np.concatenate([opt.element_learning_rates(p).numpy(force=True).reshape(-1) for p in parameters])
    states = [opt.state[p] for p in parameters]
    o = opt.param_groups[0]
    d = float(o["auto_lr_rate"]) if o["auto_lr"] else math.nan
    scale = o["lr"] / o.get("initial_lr", o["base_lr"])
    mean = d * scale if o["auto_lr"] else o["lr"]
    low, high = o["min_lr"] * scale, 10 * mean if o["max_lr"] is None else o["max_lr"] * scale
    low, high = low if low <= mean else 0.0, high if high >= mean else math.inf
    vary = [o["auto_lr"] or s["tensor_stats"][st.MASK_MEAN].item() != 1 for s in states]
    own = np.repeat(vary, [p.numel() for p in parameters])
    torque = np.concatenate([s["torque"].numpy(force=True) for s in states])
    spatial = [p for p in parameters if p.dim() >= 2 and min(p.shape[-2:]) > 2]
    edges = np.concatenate([np.zeros(0)] + [opt.state[p]["edge_history"].numpy(force=True) for p in spatial])
    agree, activity, clip = (
        np.concatenate(x) for x in zip(*[gradient_figures(opt, p) for p in parameters], strict=True)
    )
    return {
        "lr/mean": rates.astype(np.float64).mean(),
        "lr/min": rates.min(),
        "lr/max": rates.max(),
        "lr/p10": np.quantile(rates, 0.1, method="inverted_cdf"),
        "lr/p90": np.quantile(rates, 0.9, method="inverted_cdf"),
        "lr/share_at_min": (own & (rates <= np.float32(low) * (1 + FLOAT32))).mean(),
        "lr/share_at_max": (own & (rates >= np.float32(high) * (1 - FLOAT32))).mean(),
        "auto_lr/d": d,
        "torque": torque.astype(np.float64).mean(),
        "share_damped": (torque < 0).mean(),
        "edge_strength": edges.astype(np.float64).mean() if spatial else math.nan,
        "sign_agreement": agree.mean(),
        "share_background": (activity < 0.1).mean(),
        "clip_ratio": clip.mean(),
        "skipped_elements": sum(float(s["tensor_stats"][st.SKIPPED]) for s in states),
        "step": max(s["step"] for s in states),
    }


def factored(opt: Any) -> bool:
    return any("exp_avg_sq_row" in state for state in opt.state.values())


def check(opt: Any, parameters: list[Any], found: dict[str, float]) -> None:
    wanted = expected(opt, parameters)
    for name, value in wanted.items():
        if name in ("lr/p10", "lr/p90") and opt.config.optim_bits == 32:
            assert value / BIN <= found[name] <= value * BIN, name
        else:
            error = {"abs": BLOCK_MEANS} if name == "clip_ratio" else {"rel": FLOAT32, "abs": 1e-12}
            assert found[name] == pytest.approx(value, nan_ok=True, **error), name


def trained(tools: Any, made: Any, shapes: list[tuple[int, ...]], steps: int = 5, **options: Any) -> tuple[Any, Any]:
    """An optimizer with some steps behind it, whose gradients have been left in place."""
    dtype = options.pop("dtype", torch.float32)
    parameters = tools.parameters(*shapes, dtype=dtype)
    opt = made(parameters, **options)
    for step in range(steps):
        tools.give_gradients(parameters, step)
        for p in parameters:
            p.grad *= 1.0 + step % 3  # norms and activities that vary
        opt.step()
    return opt, parameters


# --- the figures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [Automagic8bit, Automagic32bit])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_parameter(made: Any, shape: tuple[int, ...], tools: Any) -> None:
    """Odd shapes, in either storage."""
    force = {"force_8bit": True} if made is Automagic8bit else {}
    opt, parameters = trained(tools, made, [shape], lr=1e-3, **force)
    check(opt, parameters, opt.get_metrics())


@pytest.mark.parametrize("made", [Automagic8bit, Automagic32bit])
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1e-3},
        {"lr": 1e-3, "dtype": torch.bfloat16},
        {"auto_lr": True, "lr": 1e-4, "steps": 30},
        {"lr": 1e-3, "min_lr": 9.5e-4, "max_lr": 1.04e-3, "steps": 12},
        {"lr": 1e-3, "max_lr": 1e-3},
        {"lr": 1e-3, "percentile_clipping": 40, "steps": 7},
        {"lr": 1e-3, "edge_suppression": False},
        {"lr": 1e-3, "factored": False},
        {"lr": 1e-3, "clip_threshold": 0.5, "frequency_penalty": 0.9, "edge_penalty": 0.7},
    ],
)
def test_many_parameters(made: Any, options: dict[str, Any], tools: Any) -> None:
    """All together weigh by elements and by blocks, whatever the options."""
    opt, parameters = trained(tools, made, [*SHAPES, (128, 128)], **options)
    found, wanted = opt.get_metrics(), parameters
    assert factored(opt) == (options.get("factored", True) and made is Automagic8bit)
    if options.get("edge_suppression", True):
        check(opt, wanted, found)
    else:
        assert math.isnan(found["edge_strength"])
    assert found["lr/min"] <= found["lr/p10"] <= found["lr/mean"] <= found["lr/p90"] <= found["lr/max"]
    if "min_lr" in options:
        assert found["lr/share_at_min"] > 0.01  # or the case shows nothing
        assert found["lr/share_at_max"] > 0.01


def test_a_wrong_figure_would_be_seen(tools: Any) -> None:
    """Negative control: no figure but those that count events may be off by a thousandth, or by a count of one."""
    opt, parameters = trained(tools, Automagic8bit, [(64, 96), (33, 130)], lr=1e-3)
    found = opt.get_metrics()
    check(opt, parameters, found)
    for name, value in found.items():
        if not math.isnan(value):
            with pytest.raises(AssertionError):
                check(opt, parameters, {**found, name: value * 1.001 + 1e-3 * (value == 0)})


def test_a_schedule_scales_the_rates(tools: Any) -> None:
    """The next step's lr counts, not the last one's; at 0 nothing is said to be at a bound that was not."""
    opt, parameters = trained(tools, Automagic8bit, [(64, 96)], lr=1e-3)
    before = opt.get_metrics()
    opt.param_groups[0]["lr"] = 2.5e-4
    after = opt.get_metrics()
    check(opt, parameters, after)
    for name in ("lr/mean", "lr/min", "lr/max", "lr/p10", "lr/p90"):
        assert after[name] == pytest.approx(before[name] / 4, rel=FLOAT32)
    opt.param_groups[0]["lr"] = 0.0
    stopped = opt.get_metrics()
    assert stopped["lr/mean"] == stopped["lr/max"] == stopped["lr/p90"] == 0
    assert stopped["lr/share_at_min"] == before["lr/share_at_min"]


@given(
    bytes_=some.lists(some.lists(some.integers(0, 127), min_size=1, max_size=600), min_size=1, max_size=4),
    scales=some.lists(some.floats(0.1, 10), min_size=4, max_size=4),
)
@settings(max_examples=40, deadline=None)
def test_quantiles_are_those_of_all_elements(bytes_: list[list[int]], scales: list[float]) -> None:
    """Any exponents in tensors of any sizes with any means: numpy's quantiles of all rates joined."""
    parameters = [torch.nn.Parameter(torch.zeros(len(x))) for x in bytes_]
    opt = Automagic8bit(parameters, lr=1e-3, min_lr=0.0, max_lr=1.0, force_8bit=True, mask_bits=8)
    for p, values, scale in zip(parameters, bytes_, scales, strict=False):
        p.grad = torch.zeros_like(p)
        opt.step()
        opt.state[p]["lr_mask"].copy_(torch.tensor(values))
        opt.state[p]["tensor_stats"][st.MASK_MEAN] = scale
    found, wanted = opt.get_metrics(), expected(opt, parameters)
    for name in ("lr/mean", "lr/min", "lr/max", "lr/p10", "lr/p90"):
        assert found[name] == pytest.approx(wanted[name], rel=FLOAT32)


@pytest.mark.parametrize("made", [Automagic8bit, Automagic32bit])
def test_skipped_elements_are_counted_and_agree_with_nothing(made: Any, tools: Any) -> None:
    opt, (p,) = trained(tools, made, [(64, 96)], lr=1e-3)
    before = opt.get_metrics()
    p.grad[0, :7] = torch.tensor([math.nan, math.inf, -math.inf, 1e30, math.nan, math.nan, math.nan])
    waiting = opt.get_metrics()
    check(opt, [p], waiting)
    assert waiting["skipped_elements"] == 0
    assert waiting["sign_agreement"] < before["sign_agreement"]
    opt.step()
    after = opt.get_metrics()
    check(opt, [p], after)
    assert after["skipped_elements"] == 7
    assert all(math.isfinite(x) for name, x in after.items() if name != "auto_lr/d")


@pytest.mark.parametrize("made", [Automagic8bit, Automagic32bit])
@pytest.mark.parametrize("shape", [(300, 96), (96, 300), (270, 255), (40, 32, 3, 3), (6, 64, 30), (5000,), (300, 512)])
@pytest.mark.parametrize("options", [{}, {"percentile_clipping": 40}, {"factored": False}])
def test_the_parts_do_not_show(
    made: Any, shape: tuple[int, ...], options: dict[str, Any], tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut small, a parameter has the figures it has in one piece, across the parts' edges too."""
    opt, (p,) = trained(tools, made, [shape], lr=1e-3, **options)
    p.grad[1] = math.nan
    whole = opt.get_metrics()
    monkeypatch.setattr(st, "CHUNK", 512)
    subject = metrics.subject_of(opt, opt.param_groups[0], p)
    assert subject is not None
    in_one_piece = factored(opt) and shape != (300, 512)  # no more than one tile below the other
    assert in_one_piece or len(list(metrics.parts(subject))) > 1
    # Sums in another order differ in float64's last digits; the norm behind percentile_clipping in float32's.
    assert opt.get_metrics() == pytest.approx(
        whole, rel=1e-6 if "percentile_clipping" in options else 1e-12, nan_ok=True
    )


# --- the names -------------------------------------------------------------------------------------------------------


def test_names_do_not_change_over_time(tools: Any) -> None:
    """Before the first step, after it, without gradients: the same names in the same order, floats all."""
    parameters = tools.parameters((64, 96), (10,))
    opt = Automagic8bit(parameters, lr=1e-3)
    before = opt.get_metrics(per_group=True, per_parameter=True)
    tools.train(opt, parameters, range(2))
    during = opt.get_metrics(per_group=True, per_parameter=True)
    opt.zero_grad(set_to_none=True)
    after = opt.get_metrics(per_group=True, per_parameter=True)
    assert list(before) == list(during) == list(after)
    assert list(opt.get_metrics()) == list(metrics.METRICS)
    assert all(type(x) is float for found in (before, during, after) for x in found.values())
    values = {name: before[name] for name in metrics.METRICS}
    assert values.pop("step") == values.pop("skipped_elements") == 0
    assert all(math.isnan(x) for x in values.values())
    assert {name for name in metrics.METRICS if math.isnan(during[name])} == {"auto_lr/d"}
    assert {name for name in metrics.METRICS if math.isnan(after[name])} == {"auto_lr/d", *GRADIENT_NAMES}


def test_parts_that_are_off_are_nan(tools: Any) -> None:
    opt, _ = trained(tools, Automagic8bit, [(64, 96)], lr=1e-3, torque=False, edge_suppression=False)
    found = opt.get_metrics()
    assert {x for x in found if math.isnan(found[x])} == {"auto_lr/d", "torque", "share_damped", "edge_strength"}


def test_groups_and_parameters(tools: Any) -> None:
    """A group's figures are those of an optimizer of its own; so are a parameter's, under its name."""
    options = {"lr": 1e-3, "betas": (0.8, 0.9, 0.99)}
    parameters, own = (tools.parameters((64, 96), (128, 64), (50,)) for _ in range(2))
    names = ["body.weight", "head.weight", "head.bias"]
    named = list(zip(names, parameters, strict=True))
    opt = Automagic8bit([{"params": named[:1]}, {"params": named[1:], "lr": 2e-3}], **options)
    second = Automagic8bit(own[1:], **{**options, "lr": 2e-3})
    for _ in range(4):
        for mine, other in zip(parameters, own, strict=True):
            mine.grad = torch.randn(mine.shape, generator=torch.Generator().manual_seed(mine.numel())) * 0.01
            other.grad = mine.grad.clone()
        opt.step()
        second.step()
    found = opt.get_metrics(per_group=True, per_parameter=True)
    prefixes = ["", "group0/", "group1/", *(f"{name}/" for name in names)]
    assert list(found) == [prefix + name for prefix in ["", "group0/", "body.weight/"] for name in metrics.METRICS] + [
        prefix + name for prefix in ["group1/", "head.weight/", "head.bias/"] for name in metrics.METRICS
    ]
    assert set(opt.get_metrics(per_group=True)) == {p + x for p in prefixes[:3] for x in metrics.METRICS}
    assert set(opt.get_metrics(per_parameter=True)) == {p + x for p in ["", *prefixes[3:]] for x in metrics.METRICS}
    # Rounding bits depend on a parameter's place, so states differ a little between the two optimizers.
    for name in ("lr/mean", "step", "sign_agreement", "torque"):
        assert found[f"group1/{name}"] == pytest.approx(second.get_metrics()[name], rel=0.02)
    first, rest = 64 * 96, 128 * 64 + 50
    mean = (first * found["group0/lr/mean"] + rest * found["group1/lr/mean"]) / (first + rest)
    assert found["lr/mean"] == pytest.approx(mean, rel=1e-12)
    assert found["lr/min"] == min(found["group0/lr/min"], found["group1/lr/min"])
    assert found["body.weight/lr/p10"] == found["group0/lr/p10"]
    assert math.isnan(found["head.bias/edge_strength"])


def test_parameters_without_names_and_without_steps(tools: Any) -> None:
    parameters = tools.parameters((64, 96), (64, 96))
    opt = Automagic8bit(parameters, lr=1e-3)
    parameters[1].grad = torch.ones_like(parameters[1])
    opt.step()
    found = opt.get_metrics(per_parameter=True)
    assert math.isnan(found["group0/parameter0/lr/mean"])
    assert found["group0/parameter1/lr/mean"] == found["lr/mean"]


def test_two_groups_that_find_their_rates(tools: Any) -> None:
    """auto_lr/d is the elements' mean of the groups' rates."""
    parameters = tools.parameters((64, 96), (128, 96), (40, 40))
    groups = [{"params": parameters[:1]}, {"params": parameters[1:2]}, {"params": parameters[2:], "lr": 1e-3}]
    opt = Automagic8bit(groups)
    tools.train(opt, parameters, range(20))
    opt.param_groups[1]["auto_lr_rate"].mul_(1.5)
    first, second = (float(group["auto_lr_rate"]) for group in opt.param_groups[:2])
    found = opt.get_metrics(per_group=True)
    assert first != second
    assert found["auto_lr/d"] == pytest.approx((first + 2 * second) / 3, rel=1e-6)
    assert found["group0/auto_lr/d"] == first
    assert math.isnan(found["group2/auto_lr/d"])


def test_nothing_to_measure() -> None:
    """Empty parameters and groups without any give the names, with NaN."""
    p = torch.nn.Parameter(torch.zeros(0, 4))
    opt = Automagic8bit([{"params": [p]}, {"params": []}], lr=1e-3)
    p.grad = torch.zeros_like(p)
    opt.step()
    found = opt.get_metrics(per_group=True)
    assert math.isnan(found["lr/mean"])
    assert math.isnan(found["group1/lr/mean"])


# --- reading only ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [Automagic8bit, Automagic32bit])
@pytest.mark.parametrize("options", [{"lr": 1e-3, "percentile_clipping": 50}, {}])
def test_nothing_is_touched(made: Any, options: dict[str, Any], tools: Any) -> None:
    """State, gradients, random numbers and all later steps are the same, bit for bit."""
    runs = []
    for asks in (False, True):
        parameters = tools.parameters((64, 96), (33, 130), (20,), dtype=torch.bfloat16)
        opt = made(parameters, **options)
        for step in range(12):
            tools.give_gradients(parameters, step)
            opt.step()
            if asks:
                held = tools.snapshot(opt), [p.grad.clone() for p in parameters], torch.get_rng_state()
                held = copy.deepcopy(held)
                opt.get_metrics(per_group=True, per_parameter=True)
                now = tools.snapshot(opt), [p.grad for p in parameters], torch.get_rng_state()
                assert not tools.differences(held, now)
        runs.append(tools.snapshot(opt))
    assert not tools.differences(*runs)


class Watch(TorchDispatchMode):
    """Notes what is computed: operations that make the host wait, and the largest memory made."""

    WAITING = ("_local_scalar_dense", "nonzero", "unique", "bincount", "masked_select", "equal.default")

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.waits: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(name in str(func) for name in self.WAITING):
            self.waits.append(str(func))
        for x in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("made", [Automagic8bit, Automagic32bit])
def test_it_waits_for_nothing_on_the_way_and_stays_small(
    made: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No value is asked for before the one copy; no tensor made is near the parameter's size."""
    monkeypatch.setattr(st, "CHUNK", 4096)
    storage = {"factored": False}  # or a part is a row of tiles at least, an eighth of this parameter
    opt, (p,) = trained(tools, made, [(1024, 1024)], steps=1, lr=1e-3, percentile_clipping=50, **storage)
    held = [p, p.grad, *(x for x in opt.state[p].values() if isinstance(x, Tensor))]
    with Watch(held) as watch:
        opt.get_metrics(per_group=True, per_parameter=True)
    assert watch.waits == []
    assert 0 < watch.largest <= p.nbytes / 8
    with Watch(held) as control:
        p.detach().sum().item()
        p + 1
    assert control.waits
    assert control.largest == p.nbytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device to wait for")
@pytest.mark.parametrize("options", [{"lr": 1e-3}, {}, {"lr": 1e-3, "percentile_clipping": 50}])
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_one_synchronisation_on_a_gpu(options: dict[str, Any], tools: Any) -> None:
    """CUDA's own account of what makes the host wait; and the CPU's figures for the same state."""
    parameters = [torch.nn.Parameter(p.detach().cuda()) for p in tools.parameters((512, 512), (64, 16, 3, 3), (300,))]
    opt = Automagic8bit(parameters, **options)
    tools.train(opt, parameters, range(3))
    opt.get_metrics()
    try:
        torch.cuda.set_sync_debug_mode("warn")
        with pytest.warns(UserWarning, match="synchronizing") as warned:
            opt.get_metrics(per_group=True, per_parameter=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(warned) == 1
    check(opt, parameters, opt.get_metrics())
