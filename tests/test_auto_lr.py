"""The rate that finds itself: where it ends, what bounds it, and what leaves it alone."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor
from torch.optim import lr_scheduler as schedules

from automagic_bnb import Automagic8bit, auto_lr, config, estimate
from automagic_bnb import state as st
from automagic_bnb.optimizer import Automagic, Automagic32bit

STORAGES: dict[str, dict[str, Any]] = {
    "32bit": {"optim_bits": 32},
    "8bit": {"optim_bits": 8, "min_8bit_size": 0, "mask_bits": 8, "mean_bits": 32},
    "factored": {"optim_bits": 8, "min_8bit_size": 0, "factored": True, "mask_bits": 8, "mean_bits": 32},
}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where the kernels run: compiled, or in the interpreter."""


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(shape, dtype=dtype))


def rate(opt: Automagic, group: int = 0) -> float:
    return float(opt.get_learning_rates()[group])


def approach(opt: Automagic, steps: int, target: float = 1.0, after: Callable[[], Any] | None = None) -> list[float]:
    """Steps towards a minimum at `target` in every element; the first group's rate at each."""
    rates = []
    for _ in range(steps):
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = (p.detach() - target).to(p.dtype)
        opt.step()
        rates.append(rate(opt))
        if after is not None:
            after()
    return rates


# --- where it ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quadratic_is_solved_without_a_rate(storage: str, dtype: torch.dtype) -> None:
    """The rate ends at a fair part of the distance to go, and the minimum is reached, in every storage."""
    target = normal(60, 64, seed=0) * 0.1
    p = zeros(60, 64, dtype=dtype)
    opt = Automagic([p], **STORAGES[storage])
    rates = []
    for _ in range(250):
        p.grad = (p.detach() - target).to(dtype)
        opt.step()
        rates.append(rate(opt))
    assert rates[0] == pytest.approx(config.START_LR)
    assert 1e-3 < rates[-1] < 0.1
    assert (p.detach() - target).square().mean() < 0.02 * target.square().mean()


def test_where_it_starts_is_not_enough() -> None:
    """Negative control: at a fixed rate of the start the way is not gone."""
    p = zeros(60, 64)
    approach(Automagic32bit([p], lr=config.START_LR), 250, 0.1)
    assert p.detach().mean() < 0.06


def test_rate_follows_the_distance() -> None:
    """A minimum ten times as far is approached at ten times the rate, within a factor of 3."""
    near, far = (approach(Automagic32bit([zeros(3000)]), 250, target)[-1] for target in (0.02, 0.2))
    assert 10 / 3 < far / near < 30


def one_row(rows: int, **options: Any) -> float:
    """The rate that the last row of a tensor has at the end, the only one with gradients."""
    p = zeros(rows, 64)
    opt = Automagic8bit([p], **options)
    for step in range(300):
        p.grad = torch.zeros(rows, 64)
        p.grad[-1] = p.detach()[-1] - 1 + 2 * normal(64, seed=step)
        opt.step()
    return opt.element_learning_rates(p)[-1].mean().item()


def test_a_row_among_many_finds_what_it_finds_alone() -> None:
    alone = one_row(1)
    assert alone > 10 * config.START_LR
    assert 0.5 < one_row(1000) / alone < 2


def test_a_row_among_many_has_the_rate_that_is_given() -> None:
    assert one_row(1000, lr=1e-2) == pytest.approx(1e-2, rel=0.25)


def test_a_parameter_that_begins_late_finds_its_rate() -> None:
    """A second adapter of the same group, after 200 steps of the first, gets as far as it would have from the start."""
    reached = []
    for before in (0, 200):
        first, second = zeros(32, 256), zeros(32, 256)
        opt = Automagic8bit([first, second])
        for step in range(before):
            first.grad = normal(32, 256, seed=step)
            opt.step()
        first.grad = None
        for _ in range(200):
            second.grad = second.detach() - 1
            opt.step()
        reached.append(second.detach().mean().item())
    assert reached[1] > 0.5 * reached[0] > 0.1


def test_the_way_counts_from_where_the_last_joined() -> None:
    """So that what begins late finds as large a step as what began with the search."""
    first, second = zeros(8, 256), zeros(8, 256)
    opt = Automagic8bit([first, second])
    factors = []
    for step in range(60):
        first.grad = normal(8, 256, seed=step)
        second.grad = normal(8, 256, seed=100 + step) if step >= 50 else None
        opt.step()
        (search,) = auto_lr.searches(opt.param_groups)
        factors.append(search.numbers().factor)
    # What a step leaves counts in the next, which is the 51st when the second's is there for the first time.
    assert opt.param_groups[0]["auto_lr_joined"] in (50, 51)
    assert factors[49] == pytest.approx(8 / 1.5**0.5, rel=0.01)
    assert factors[59] > 0.95 * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "steps"), [((64,), 1000), ((64, 64), 1000), ((256, 512), 100)])
def test_noise_alone_finds_no_rate(shape: tuple[int, ...], steps: int, dtype: torch.dtype) -> None:
    p = zeros(*shape, dtype=dtype)
    p.data.copy_(normal(*shape, seed=1))
    opt = Automagic8bit([p], weight_decay=0.0)
    for step in range(steps):
        p.grad = normal(*shape, seed=2 + step).to(dtype)
        opt.step()
    assert rate(opt) < 3 * config.START_LR


def test_without_its_error_noise_would_find_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    monkeypatch.setattr(estimate, "ERRORS", 0.0)
    p = zeros(64)
    opt = Automagic8bit([p], weight_decay=0.0)
    for step in range(1000):
        p.grad = normal(64, seed=2 + step)
        opt.step()
    assert rate(opt) > 3 * config.START_LR


def test_weights_that_are_rounded_to_nearest_move() -> None:
    """master="none": the updates of the start round to nothing, and a rate is found all the same."""
    p = zeros(64, 64, dtype=torch.bfloat16)
    p.data.copy_(normal(64, 64, seed=0))
    start = p.detach().clone()
    opt = Automagic8bit([p], master="none")
    for _ in range(400):
        p.grad = p.detach().clone()
        opt.step()
    assert bool((p != start).any())


def test_weights_beyond_float32s_squares_leave_the_estimate_out() -> None:
    p = zeros(300)
    opt = Automagic32bit([p], weight_decay=0.0)
    approach(opt, 3)
    p.data.fill_(1e30)
    opt.state[p]["probe_start"].fill_(-3e38)
    for _ in range(30):
        p.grad = torch.ones_like(p)
        opt.step()
    assert all(math.isfinite(float(x)) for x in opt.param_groups[0]["auto_lr_sums"])
    assert rate(opt) == pytest.approx(config.START_LR)


# --- bounds, factors and ratios -----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_lr", [1e-5, 1e-3])
def test_rate_grows_to_max_lr_and_never_falls(max_lr: float) -> None:
    """d is monotone, grows by at most a tenth, and is bounded from the first step; no element's rate exceeds it."""
    p = zeros(300)
    opt = Automagic32bit([p], max_lr=max_lr)
    highest: list[float] = []
    rates = approach(opt, 100, after=lambda: highest.append(opt.element_learning_rates(p).max().item()))
    assert all(a <= b <= 1.1001 * a for a, b in itertools.pairwise(rates))
    assert rates[-1] == max(highest) == pytest.approx(max_lr)


def test_an_unset_max_lr_is_saved_as_unset_and_bounds_nothing() -> None:
    p = zeros(300)
    opt = Automagic32bit([p])
    assert approach(opt, 150)[-1] > 1e-3
    assert opt.state_dict()["param_groups"][0]["max_lr"] is None


def test_min_lr_lifts_the_start() -> None:
    assert approach(Automagic32bit([zeros(300)], min_lr=1e-4), 1) == [pytest.approx(1e-4)]


def test_a_learning_rate_finder_gets_the_rates_it_asks_for() -> None:
    """Who writes lr and initial_lr far below what the optimizer was built with is held up by no min_lr."""
    p = zeros(64, 64)
    opt = Automagic8bit([p], lr=1e-3)
    group = opt.param_groups[0]
    group["lr"] = group["initial_lr"] = 1e-8
    for lr in (1e-8, 1e-5, 1e-3):
        group["lr"] = lr
        p.grad = normal(64, 64, seed=0)
        opt.step()
        assert opt.element_learning_rates(p).mean().item() == pytest.approx(lr, rel=0.1)


def test_a_factor_multiplies_what_is_found() -> None:
    """lr=1.0, as Prodigy's users write it, finds what no lr finds; lr=0.5 about half; both are told."""
    with pytest.warns(UserWarning, match=r"lr=0\.5 is taken as a factor"):
        half = Automagic32bit([zeros(3000)], lr=0.5, auto_lr=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        one = Automagic32bit([zeros(3000)], lr=1.0, auto_lr=True)
        Automagic32bit([zeros(3000)], lr=1.0, auto_lr=True)
        Automagic32bit([zeros(3000)], lr=9e-3, auto_lr=True)
    assert len(told) == 1
    plain = Automagic32bit([zeros(3000)])
    found = [approach(opt, 300)[-1] for opt in (plain, one, half)]
    assert found[1] == found[0]
    assert 0.3 < found[2] / found[0] < 0.9


@pytest.mark.parametrize("lr", [1e-5, 1e-3])
def test_a_lower_lr_is_where_the_search_starts(lr: float) -> None:
    rates = approach(Automagic32bit([zeros(300)], lr=lr, auto_lr=True), 60)
    assert rates[0] == pytest.approx(lr)
    assert rates[-1] > 2 * lr


def test_given_rates_keep_their_ratios_and_groups_without_find_their_own() -> None:
    a, b, c = zeros(64, 64), zeros(64, 64), zeros(64, 64)
    opt = Automagic32bit([{"params": [a]}, {"params": [b], "lr": 16e-6}], lr=1e-6, auto_lr=True)
    approach(opt, 150)
    assert rate(opt, 1) / rate(opt, 0) == pytest.approx(16, rel=1e-5)
    assert rate(opt) > 3e-6
    a, b = zeros(64, 64), zeros(64, 64)
    opt = Automagic32bit([{"params": [a]}, {"params": [b]}, {"params": [c], "lr": 3e-4}])
    for _ in range(150):
        a.grad, b.grad, c.grad = a.detach() - 0.02, b.detach() - 2, c.detach() - 1
        opt.step()
    assert rate(opt, 1) > 3 * rate(opt, 0)
    assert rate(opt, 2) == 3e-4
    assert "probe_block" not in opt.state[c]


def test_a_group_added_in_mid_run_has_its_ratio_and_is_told() -> None:
    a, b = zeros(64, 64), zeros(64, 64)
    opt = Automagic32bit([a], lr=1e-5, auto_lr=True)
    approach(opt, 60)
    with pytest.warns(UserWarning, match=r"its ratio to the first group's lr=1e-05 .* 4 times") as told:
        opt.add_param_group({"params": [b], "lr": 4e-5})
    assert len(told) == 1
    approach(opt, 2)
    assert rate(opt, 1) == pytest.approx(4 * rate(opt), rel=1e-5)
    late = Automagic32bit([a])
    approach(late, 60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        late.add_param_group({"params": [b]})
    b.data.zero_()
    approach(late, 100)
    assert rate(late, 1) > 10 * config.START_LR


def test_a_search_ends_where_it_is_told_to() -> None:
    rates = approach(Automagic32bit([zeros(300)], auto_lr_steps=40), 80)
    assert rates[-1] == rates[45] > config.START_LR
    assert approach(Automagic32bit([zeros(300)]), 80)[-1] > rates[-1], "negative control"


# --- schedules and what is shown ----------------------------------------------------------------------------------


def test_defaults_are_numbers_and_the_group_shows_what_is_found() -> None:
    opt = Automagic32bit([zeros(300)])
    assert opt.defaults["lr"] == opt.param_groups[0]["lr"] == config.NOMINAL_LR
    shown: list[float] = []
    found = approach(opt, 60, after=lambda: shown.append(opt.param_groups[0]["lr"]))
    assert found[1:] == pytest.approx(shown[1:], rel=1e-6)
    assert opt.param_groups[0]["lr"] > config.START_LR
    scheduled = Automagic32bit([zeros(300)])
    schedules.ConstantLR(scheduled, 1.0)
    approach(scheduled, 60)
    assert scheduled.param_groups[0]["lr"] == config.NOMINAL_LR
    assert rate(scheduled) == pytest.approx(rate(opt), rel=1e-6)


def test_an_absolute_floor_lets_a_cosine_decay() -> None:
    opt = Automagic8bit([zeros(64, 64)])
    rates = approach(opt, 200, after=schedules.CosineAnnealingLR(opt, 200, eta_min=1e-6).step)
    assert rates[-1] < 0.01 * max(rates)


PEAKS: dict[str, Callable[[Any], Any]] = {
    "one cycle": lambda o: schedules.OneCycleLR(o, max_lr=1e-2, total_steps=120, pct_start=0.5),
    "one cycle, no momentum": lambda o: schedules.OneCycleLR(
        o, max_lr=1e-2, total_steps=120, pct_start=0.5, cycle_momentum=False
    ),
    "cyclic": lambda o: schedules.CyclicLR(o, 1e-5, 1e-3, step_size_up=60, cycle_momentum=False),
}


@pytest.mark.parametrize("name", PEAKS)
def test_a_schedule_that_begins_below_its_peak_reaches_the_rate_there(name: str) -> None:
    opt = Automagic32bit([zeros(300)])
    rates, found = [], []
    scheduler = PEAKS[name](opt)

    def after() -> None:
        rates.append(rate(opt))
        found.append(float(opt.param_groups[0]["auto_lr_rate"]))
        scheduler.step()

    approach(opt, 61, after=after)
    assert rates[-1] == pytest.approx(found[-1], rel=0.05)
    assert found[-1] > config.START_LR
    assert max(r / d for r, d in zip(rates, found, strict=True)) < 4.01


# --- stepping, saving, what is watched ----------------------------------------------------------------------------


def build(backend: str, shapes: tuple[tuple[int, ...], ...] = ((24, 96), (300,))) -> tuple[list[Any], Automagic]:
    p = [torch.nn.Parameter((normal(*shape, seed=i) * 0.01).to(DEVICE)) for i, shape in enumerate(shapes)]
    return p, Automagic8bit(p, lr=1e-3, auto_lr=True, backend=backend, min_8bit_size=0)


def give(p: list[Any], step: int) -> None:
    for i, x in enumerate(p):
        x.grad = x.detach() - 1 + 0.1 * normal(*x.shape, seed=100 * step + i).to(DEVICE)


def same(a: Automagic, b: Automagic, tools: Any) -> None:
    assert not tools.differences(tools.snapshot(a), tools.snapshot(b))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("reverse", [False, True])
def test_stepping_one_by_one_is_the_same_step(backend: str, reverse: bool, tools: Any) -> None:
    """`step_parameter` for all, in either order, moves θ, d and every state as `step` does, bit for bit."""
    (p, together), (q, single) = build(backend), build(backend)
    for step in range(24):
        give(p, step)
        together.step()
        give(q, step)
        for x in reversed(q) if reverse else q:
            single.step_parameter(x, single.param_groups[0])
    same(together, single, tools)
    assert together.param_groups[0]["auto_lr_rate"] > 1.05e-3


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_search_resumes_bit_for_bit(backend: str, tools: Any) -> None:
    p, opt = build(backend)
    for step in range(19):
        give(p, step)
        opt.step()
    q, again = build(backend)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for x, y in zip(p, q, strict=True):
        y.data.copy_(x.detach())
    found = float(opt.param_groups[0]["auto_lr_rate"])
    for params, o in ((p, opt), (q, again)):
        for step in range(19, 24):
            give(params, step)
            o.step()
    same(opt, again, tools)
    assert opt.param_groups[0]["auto_lr_rate"] > found


@pytest.mark.kernels
def test_both_backends_find_the_same_rate() -> None:
    found = []
    for backend in ("torch", "triton"):
        p, opt = build(backend)
        for step in range(24):
            give(p, step)
            opt.step()
        found.append([float(opt.param_groups[0]["auto_lr_rate"]), *opt.param_groups[0]["auto_lr_sums"].tolist()])
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0][0] > 1.05e-3


def test_a_checkpoint_of_0_2_0_goes_on() -> None:
    """Its sums of gradients are dropped, the blocks it watched are kept, and its unset bound is unset."""
    p = zeros(40, 512)
    opt = Automagic8bit([p])
    approach(opt, 3)
    saved = copy.deepcopy(opt.state_dict())
    held, group = saved["state"][0], saved["param_groups"][0]
    del held["probe_block"]
    held["probe_start"] = torch.zeros(5, 256)
    held["probe_sum"] = torch.full((5, 256), 7.0)
    held["tensor_stats"][[st.LR_NUMERATOR, st.LR_DENOMINATOR]] = 1e9
    for name in ("auto_lr_given", "auto_lr_steps", "auto_lr_sums", "auto_lr_count"):
        group.pop(name, None)
    group |= {"max_lr": 1e-3, "lr": 1e-6, "base_lr": 1e-6, "auto_lr_rate": torch.tensor(2e-4), "auto_lr_step": 3}
    opt.load_state_dict(saved)
    assert opt.state[p]["probe_block"].tolist() == [0] * 5
    assert "probe_sum" not in opt.state[p]
    assert (opt.param_groups[0]["max_lr"], "auto_lr_step" in opt.param_groups[0]) == (None, False)
    rates = approach(opt, 60)
    assert rates[0] == pytest.approx(2e-4)
    assert rates[-1] > 1e-3


def test_the_first_block_with_a_gradient_is_watched_from_the_third_step() -> None:
    """θ as it is a step after, in θ's dtype; zeros beyond the end."""
    for dtype in (torch.float32, torch.bfloat16):
        p = torch.nn.Parameter(normal(256 * 33 - 100, seed=0).to(dtype))
        opt = Automagic32bit([p])
        seen = []
        for _ in range(4):
            p.grad = torch.zeros_like(p)
            p.grad[700:] = 1.0
            seen.append(p.detach().clone())
            opt.step()
        state = opt.state[p]
        assert state["probe_block"].tolist() == [2, 0]
        assert state["probe_start"].dtype == dtype
        assert torch.equal(state["probe_start"][0], seen[1][512:768])
        assert torch.equal(state["probe_start"][1, :156], seen[1][8192:])
        assert (state["probe_start"][1, 156:] == 0).all()


@pytest.mark.parametrize(("elements", "stride"), [(1, 32), (2**25, 32), (2**25 + 1, 64), (86e6, 128), (1.2e9, 2048)])
def test_about_a_million_weights_of_a_group_are_watched(elements: float, stride: int) -> None:
    assert st.probe_stride(int(elements)) == stride


@given(blocks=some.integers(0, 2000), power=some.integers(4, 12))
def test_the_number_of_probes_tells_their_stride(blocks: int, power: int) -> None:
    """Or one of the same spans: all in one."""
    held = st.stride_held(blocks, -(-blocks // 2**power))
    assert [b // held for b in range(blocks)] == [b // 2**power for b in range(blocks)]
