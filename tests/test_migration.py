"""Coming from another optimizer: what its checkpoints carry over, and that training goes on.

What should be carried is stated in numpy float64 and shares nothing with the package.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_cases import STORAGES, parameters_of, through_file
from migration_cases import ADAMS, CLIP, KINDS, WITH_RATES, WRAPPED, Edit, Theirs, build, checkpoint, theirs
from rule_in_float64 import TileMeans

from automagic_bnb import Automagic8bit

BLOCK = 256
RELATIVE_ERROR = 2e-5
"""Of a chain of float32 operations, powers and logarithms among them."""


# ------------------------------------------------------------------------------------------ what should be carried over


def blocks_of(x: np.ndarray) -> np.ndarray:
    """The block that each element belongs to."""
    return np.arange(x.size) // BLOCK


def decoded(codes: Any, book: Any, absmax: Any, size: int = BLOCK) -> np.ndarray:
    codes = codes.numpy().reshape(-1)
    return book.double().numpy()[codes] * absmax.double().numpy()[np.arange(codes.size) // size]


@dataclasses.dataclass
class Stated:
    """What a checkpoint says of one parameter, float64 [n]; the moments without the bias of their start."""

    second: np.ndarray
    momentum: np.ndarray | None
    """Of normalised gradients."""
    rates: np.ndarray | None
    polarity: np.ndarray | None


def stated(saved: dict[str, Any], group: dict[str, Any]) -> Stated:
    """Of any of `KINDS`."""
    saved = {**saved, **saved.get(WRAPPED, {})}
    t = saved["step"]
    if "state1" in saved:
        beta1, beta2 = group["betas"]
        m, v = adam_moment(saved, 1) / (1 - beta1**t), adam_moment(saved, 2) / (1 - beta2**t)
        v = np.maximum(v, m * m)
        ratio = m / np.sqrt(np.where(v > 0, v, 1))
        return Stated(v, bounded(ratio), None, None)
    polarity = saved["last_polarity"].numpy().reshape(-1)
    if "beta2" in group:
        codes, scale = saved["lr_mask"]["quantized"], saved["lr_mask"]["scale"]
        rates = codes.double().numpy().reshape(-1) * scale
        return Stated(toolkit_second(saved) / (1 - 0.999**t), None, rates, polarity)
    m, v, rates = (cameamp_values(saved, name) for name in ("exp_avg", "exp_avg_sq", "lr_mask"))
    rms = np.sqrt(np.bincount(blocks_of(m), m * m) / np.bincount(blocks_of(m)))
    direction = m / rms[blocks_of(m)] * np.sqrt((1 - 0.9) / (1 + 0.9))
    return Stated(np.maximum(v, 0) / (1 - 0.99**t), bounded(direction), rates, polarity)


def adam_moment(saved: dict[str, Any], number: int) -> np.ndarray:
    x = saved[f"state{number}"]
    if x.dtype == torch.uint8:
        return decoded(x, saved[f"qmap{number}"], saved[f"absmax{number}"])
    return x.double().numpy().reshape(-1)


def toolkit_second(saved: dict[str, Any]) -> np.ndarray:
    if "exp_avg_sq" in saved:
        return saved["exp_avg_sq"].double().numpy().reshape(-1)
    row, col = saved["exp_avg_sq_row"].double().numpy(), saved["exp_avg_sq_col"].double().numpy()
    return np.einsum("...i,...j->...ij", row / row.mean(-1, keepdims=True), col).reshape(-1)


def cameamp_values(saved: dict[str, Any], name: str) -> np.ndarray:
    if name in saved:
        return saved[name].double().numpy().reshape(-1)
    scale = saved[f"{name}_q_scale"]
    return decoded(saved[f"{name}_q"], scale.code, scale.absmax, scale.blocksize)


def bounded(m: np.ndarray) -> np.ndarray:
    """No block's root mean square beyond the clipping threshold."""
    rms = np.sqrt(np.bincount(blocks_of(m), m * m) / np.bincount(blocks_of(m)))
    return m * np.minimum(1, CLIP / np.maximum(rms, 1e-30))[blocks_of(m)]


def error_of(held: np.ndarray, expected: np.ndarray, bound: np.ndarray | float) -> float:
    """The largest error as a share of its bound."""
    return float((np.abs(held - expected) / bound).max())


def moment_error(state: dict[str, Any], p: Any, number: int, expected: np.ndarray) -> float:
    """Of m (1) or v (2) as it is stored, against the statement of it, in units of what its storage may err by."""
    if number == 2 and "exp_avg_sq_row" in state:
        tiles = TileMeans(tuple(p.shape), 0.0, 0.0)
        errors = []
        for name, of, size in (("row", tiles.row_of, tiles.row.size), ("col", tiles.col_of, tiles.col.size)):
            means = np.bincount(of, expected, size) / np.maximum(np.bincount(of, minlength=size), 1)
            held = state[f"exp_avg_sq_{name}"].double().numpy().reshape(-1)
            errors.append(error_of(held, means, RELATIVE_ERROR * means.max()))
        return max(errors)
    held = state[f"state{number}"]
    if held.dtype != torch.uint8:
        return error_of(held.double().numpy().reshape(-1), expected, RELATIVE_ERROR * np.abs(expected).max())
    absmax = np.zeros(blocks_of(expected)[-1] + 1)
    np.maximum.at(absmax, blocks_of(expected), np.abs(expected))
    book = state[f"qmap{number}"].double().numpy()
    scale = absmax[blocks_of(expected)] / book[-2]  # the largest takes the last value below 1
    above = np.clip(np.searchsorted(book, expected / scale), 1, 255)
    half_gap = (book[above] - book[above - 1]) / 2
    bound = scale * (half_gap + RELATIVE_ERROR)
    return error_of(decoded(held, state[f"qmap{number}"], state[f"absmax{number}"]), expected, bound)


def expected_rates(opt: Any, group: dict[str, Any], of_group: list[np.ndarray], mine: np.ndarray) -> np.ndarray:
    """A parameter's rates here: theirs over their mean, in steps where codes hold them, about the group's rate."""
    codes = opt.config.optim_bits == 8
    k = np.clip(16 * np.log2(np.maximum(mine, 1e-30) / mine.mean()), -32, 31)
    factor = 2 ** ((np.round(k) if codes else k) / 16)
    factor /= factor.mean()
    if not group["auto_lr"]:
        return group["lr"] * factor
    rate = np.clip(np.concatenate(of_group).mean(), group["min_lr"], group["max_lr"])
    return np.clip(rate * factor, group["min_lr"], group["max_lr"])


def errors(opt: Any, saved: dict[str, Any]) -> dict[str, float]:
    """The largest error of each thing carried over, in units of its bound: at most 1 where all is well."""
    worst: dict[str, float] = {}
    for group, saved_group in zip(opt.param_groups, saved["param_groups"], strict=True):
        said = [stated(saved["state"][key], saved_group) for key in saved_group["params"]]
        rates = [s.rates for s in said if s.rates is not None]
        for p, key, s in zip(group["params"], saved_group["params"], said, strict=True):
            state, t = opt.state[p], saved["state"][key]["step"]
            beta1, beta2, _ = group["betas"]
            found = {"second": moment_error(state, p, 2, s.second * (1 - beta2**t))}
            found["step"] = 2.0 * (state["step"] != t)
            if s.momentum is not None:
                found["momentum"] = moment_error(state, p, 1, s.momentum * (1 - beta1**t))
            if s.rates is not None and s.polarity is not None:
                held = opt.element_learning_rates(p).double().numpy().reshape(-1)
                expected = expected_rates(opt, group, rates, s.rates)
                found["rates"] = error_of(held, expected, RELATIVE_ERROR * expected)
                packed = state["lr_mask"].dtype == torch.uint8
                polarity = state["lr_mask"] & 1 if packed else state["last_polarity"]
                found["polarity"] = 2.0 * bool((polarity.numpy().reshape(-1) != s.polarity).any())
            for name, error in found.items():
                worst[name] = max(error, worst.get(name, 0.0))
    return worst


@pytest.mark.parametrize("lr", [None, 2e-4])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_carried_over(kind: str, storage: str, lr: float | None, tools: Any) -> None:
    """Moments, rates, signs and step are what float64 says, up to the rounding of the storage they go into."""
    saved = checkpoint(tools, kind)
    opt = build(tools, lr, **STORAGES[storage])
    opt.load_state_dict(copy.deepcopy(saved))
    worst = errors(opt, saved)
    expected = {"second", "step"} | ({"rates", "polarity"} if kind in WITH_RATES else set())
    assert worst.keys() - {"momentum"} == expected
    assert ("momentum" in worst) == (kind != "ai-toolkit")
    assert max(worst.values()) <= 1, worst
    held = {"32bit": torch.float32}.get(storage, torch.uint8)
    assert {opt.state[p]["state1"].dtype for p in parameters_of(opt)} == {held}
    assert ("exp_avg_sq_row" in opt.state[parameters_of(opt)[0]]) == (storage == "factored")


@pytest.mark.parametrize("storage", STORAGES)
def test_a_second_moment_is_never_below_the_square_of_the_first(storage: str, tools: Any) -> None:
    """Where 8-bit codes said 0, the update would otherwise be as large as clipping allows."""
    saved = checkpoint(tools, "adamw")
    for state in saved["state"].values():
        state[WRAPPED]["state2"].view(-1)[:9] = 0
    opt = build(tools, **STORAGES[storage])
    opt.load_state_dict(saved)
    assert max(errors(opt, saved).values()) <= 1
    if storage == "32bit":
        assert (opt.state[parameters_of(opt)[0]]["state2"].view(-1)[:9] > 0).all()


def scaled(name: str, factor: float) -> Edit:
    """Multiply a moment of a state; of codes their scale."""

    def edit(state: dict[str, Any]) -> None:
        holder = state.get(WRAPPED, state)
        absmax = name.replace("state", "absmax")
        if f"{name}_q_scale" in holder:
            holder[f"{name}_q_scale"].absmax.mul_(factor)
        else:
            holder[absmax if absmax in holder else name] *= factor

    return edit


def other_second(state: dict[str, Any]) -> None:
    scaled("exp_avg_sq_row" if "exp_avg_sq_row" in state else "exp_avg_sq", 2)(state)


def other_rates(state: dict[str, Any]) -> None:
    """Each weight has its neighbour's rate."""
    mask = state["lr_mask"]
    if isinstance(mask, dict):
        mask["quantized"] = mask["quantized"].roll(1)
    else:
        state["lr_mask"] = mask.roll(1)


def other_signs(state: dict[str, Any]) -> None:
    state["last_polarity"] = ~state["last_polarity"]


ALTERED: list[tuple[str, str, Edit]] = [
    ("adamw8", "second", scaled("state2", 1.2)),
    ("adamw8", "momentum", scaled("state1", -1)),
    ("adamw", "second", scaled("state2", 1.01)),
    ("adamw", "momentum", scaled("state1", -1)),
    ("adamw", "step", lambda state: state.update(step=31)),
    ("ai-toolkit", "second", other_second),
    ("ai-toolkit", "rates", other_rates),
    ("ai-toolkit", "polarity", other_signs),
    ("cameamp", "second", scaled("exp_avg_sq", 1.2)),
    ("cameamp", "momentum", scaled("exp_avg", -1)),
    ("cameamp", "rates", other_rates),
    ("cameamp8", "second", scaled("exp_avg_sq", 1.2)),
    ("cameamp8", "rates", lambda state: state.update(lr_mask_q=state["lr_mask_q"].roll(1))),
]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("case", range(len(ALTERED)))
def test_the_comparison_can_fail(case: int, storage: str, tools: Any) -> None:
    """Negative controls: what is loaded from an altered checkpoint differs from the original beyond the rounding."""
    kind, name, edit = ALTERED[case]
    saved = checkpoint(tools, kind)
    altered = copy.deepcopy(saved)
    for state in altered["state"].values():
        edit(state)
    opt = build(tools, **STORAGES[storage])
    opt.load_state_dict(altered)
    assert errors(opt, saved)[name] > 1


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", WITH_RATES)
def test_rates_go_on_where_theirs_were(kind: str, storage: str, tools: Any) -> None:
    """Of a single tensor the very rates: exact in 32 bits, within half a step of 2^(1/16) and its mean in codes."""
    p = tools.parameters((64, 64))
    opt = theirs(kind, p)
    tools.train(opt, p, range(30))
    rates = stated(opt.state_dict()["state"][0], opt.param_groups[0]).rates
    assert rates is not None
    assert rates.max() / rates.min() > 1.5  # there is something to carry
    mine = tools.parameters((64, 64))
    new = Automagic8bit(mine, **STORAGES[storage])
    new.load_state_dict(opt.state_dict())
    ratio = new.element_learning_rates(mine[0]).double().numpy().reshape(-1) / rates
    assert np.abs(np.log2(ratio)).max() <= (1e-5 if storage == "32bit" else 1 / 16)
    assert float(new.get_avg_learning_rate()) == pytest.approx(rates.mean(), rel=1e-5)
    assert np.abs(np.log2(ratio * 1.06)).max() > 1 / 16  # the bound can be missed


def test_rates_far_from_the_mean_come_to_the_end_of_the_range(tools: Any) -> None:
    """A weight's rate is at least 1/4 of its tensor's mean and at most 3.8 of it, before their mean is restored."""
    saved = checkpoint(tools, "cameamp", shapes=((64, 64), (257,)))
    saved["state"][0]["lr_mask"][0, :3] = torch.tensor([0.0, 1e-12, 1e-1])
    opt = build(tools, shapes=((64, 64), (257,)), optim_bits=32)
    opt.load_state_dict(saved)
    assert opt.state[parameters_of(opt)[0]]["lr_mask"][0, :3].tolist() == [-32, -32, 31]


def test_a_rate_of_its_own_keeps_the_mean(tools: Any) -> None:
    """With lr given, the rates' proportions are carried over and their mean is lr."""
    opt = build(tools, lr=2e-4)
    opt.load_state_dict(checkpoint(tools, "ai-toolkit"))
    for p in parameters_of(opt):
        assert opt.element_learning_rates(p).mean().item() == pytest.approx(2e-4, rel=1e-4)
    assert opt.get_learning_rates() == [2e-4, 2e-4]
    assert "auto_lr_rate" not in opt.param_groups[0]


def test_the_rate_found_stays_within_its_bounds(tools: Any) -> None:
    opt = build(tools, max_lr=2e-5)
    opt.load_state_dict(checkpoint(tools, "ai-toolkit"))
    assert [float(rate) for rate in opt.get_learning_rates()] == pytest.approx([2e-5, 2e-5])


# ----------------------------------------------------------------------------------------------------- training goes on


def losses(make: Callable[[list[Any]], Any], w: Any, steps: int) -> tuple[Any, list[float]]:
    """Fit a matrix to noisy targets from `w` on; the loss before each step."""
    generator = torch.Generator().manual_seed(3)
    x, target = torch.randn(256, 64, generator=generator), torch.randn(64, 64, generator=generator)
    opt, seen = make([w]), []
    for _ in range(steps):
        noise = torch.randn(256, 64, generator=generator) * 0.1
        loss = (x @ (w - target).T / 8 + noise).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        seen.append(loss.item())
    return opt, seen


def switched(kind: str, saved_by: Any, w: Any, **options: Any) -> list[float]:
    """The losses after the switch."""

    def make(parameters: list[Any]) -> Any:
        opt = Automagic8bit(parameters, **options)
        opt.load_state_dict(saved_by.state_dict())
        return opt

    return losses(make, w.detach().clone().requires_grad_(), 40)[1]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on(kind: str, storage: str) -> None:
    """The loss falls on from where it was; with a rate of 100 it jumps, so a jump would be seen."""
    w = torch.nn.Parameter(torch.zeros(64, 64))
    make = (lambda p: ADAMS[kind](p, lr=1e-2)) if kind in ADAMS else (lambda p: Theirs(p, kind, lr=1e-3))
    theirs_opt, before = losses(make, w, 60)
    lr = {"lr": 1e-2} if kind in ADAMS else {}
    after = switched(kind, theirs_opt, w, **lr, **STORAGES[storage])
    assert max(after) <= 1.02 * before[-1]
    assert after[-1] < 0.95 * before[-1]
    assert max(switched(kind, theirs_opt, w, lr=100.0, **STORAGES[storage])) > 1.02 * before[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_afterwards_it_is_an_ordinary_run(kind: str, dtype: torch.dtype, tools: Any) -> None:
    """What was migrated steps, saves, loads with weights_only and goes on bit for bit."""
    opt = build(tools, dtype=dtype)
    opt.load_state_dict(checkpoint(tools, kind, dtype=dtype))
    tools.train(opt, parameters_of(opt), range(30, 33))
    assert all(torch.isfinite(p).all() for p in parameters_of(opt))
    again = build(tools, dtype=dtype)
    for new, old in zip(parameters_of(again), parameters_of(opt), strict=True):
        new.data.copy_(old.data)
    again.load_state_dict(through_file(opt.state_dict()))
    assert not tools.differences(tools.snapshot(opt), tools.snapshot(again))
    for each in (opt, again):
        tools.train(each, parameters_of(each), range(33, 36))
    assert not tools.differences(tools.snapshot(opt), tools.snapshot(again))


def test_options_stay_those_of_the_new_optimizer(tools: Any) -> None:
    """Rates, decay and betas in the other's groups mean something else."""
    for kind in KINDS:
        opt = build(tools, lr=1e-4, weight_decay=0.01)
        groups = tools.snapshot(opt)["groups"]
        opt.load_state_dict(checkpoint(tools, kind, steps=2))
        assert not tools.differences(groups, tools.snapshot(opt)["groups"])


def test_a_long_run_is_told_that_its_rates_stay(tools: Any) -> None:
    """Beyond warmup_steps the weights' own rates do not adapt; the message says which value lets them."""
    saved = checkpoint(tools, "ai-toolkit", steps=5)
    for state in saved["state"].values():
        state["step"] = 3000
    opt = build(tools)
    with pytest.warns(UserWarning, match=r"at step 3000.*first warmup_steps=500.*pass warmup_steps=3500"):
        opt.load_state_dict(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(tools, warmup_steps=3500).load_state_dict(saved)


def test_parameters_without_state_start_anew(tools: Any) -> None:
    """One that never had a gradient there has no state here, and steps with the others."""
    saved = checkpoint(tools, "ai-toolkit")
    del saved["state"][1]
    opt = build(tools)
    opt.load_state_dict(saved)
    assert [bool(opt.state.get(p)) for p in parameters_of(opt)] == [True, False, True, True]
    tools.train(opt, parameters_of(opt), range(30, 32))
    assert opt.state[parameters_of(opt)[1]]["step"] == 2
