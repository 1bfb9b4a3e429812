"""The rate that finds itself: where it ends, what bounds it, and what leaves it alone."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor

from automagic_bnb import state as st
from automagic_bnb.optimizer import Automagic, Automagic32bit

STORAGES: dict[str, dict[str, Any]] = {
    "32bit": {"optim_bits": 32},
    "8bit": {"optim_bits": 8, "min_8bit_size": 0},
    "factored": {"optim_bits": 8, "min_8bit_size": 0, "factored": True},
}
Schedule = Callable[[int], float]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rate(opt: Automagic, group: int = 0) -> float:
    return float(opt.get_learning_rates()[group])


def descend(
    scale: float,
    steps: int = 150,
    noise: float = 0.0,
    dtype: torch.dtype = torch.float32,
    schedule: Schedule | None = None,
    **options: Any,
) -> tuple[list[float], float]:
    """The rates found on a quadratic whose minimum lies `scale` away in each element, and the error left there."""
    target = normal(60, 64, seed=0) * scale
    p = torch.nn.Parameter(torch.zeros(60, 64, dtype=dtype))
    opt = Automagic([p], **{"max_lr": 0.1, "optim_bits": 32, **options})
    rates = []
    for t in range(steps):
        if schedule is not None:
            opt.param_groups[0]["lr"] = schedule(t) * opt.param_groups[0]["base_lr"]
        p.grad = (p.detach() - target + noise * scale * normal(60, 64, seed=1 + t)).to(dtype)
        opt.step()
        rates.append(rate(opt))
    return rates, ((p.detach() - target).square().mean() / target.square().mean()).item()


class Regression:
    """A two-layer network, its batches, and its held-out loss."""

    def __init__(self) -> None:
        self.truth = normal(24, 96, seed=1) / 24**0.5, normal(96, 8, seed=2) / 96**0.5
        self.first = torch.nn.Parameter(normal(64, 24, seed=3) / 24**0.5)
        self.second = torch.nn.Parameter(normal(8, 64, seed=4) / 64**0.5)
        self.parameters = [self.first, self.second]

    def loss(self, seed: int, batch: int = 64) -> Tensor:
        x = normal(batch, 24, seed=seed)
        y = torch.tanh(x @ self.truth[0]) @ self.truth[1]
        return (torch.tanh(x @ self.first.mT) @ self.second.mT - y).square().mean()

    def give_gradients(self, seed: int) -> None:
        for p in self.parameters:
            p.grad = None
        self.loss(seed).backward()

    @classmethod
    def trained(cls, steps: int = 200, **options: Any) -> float:
        """The held-out loss after training."""
        problem = cls()
        opt = Automagic32bit(problem.parameters, **options)
        for t in range(steps):
            problem.give_gradients(t)
            opt.step()
        with torch.no_grad():
            return problem.loss(9999, 2048).item()


# --- where it ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quadratic_is_solved_from_a_rate_of_1e_6(storage: str, dtype: torch.dtype) -> None:
    """The rate ends at a fair part of the distance to go, and the minimum is reached, in every storage."""
    rates, left = descend(0.1, dtype=dtype, **STORAGES[storage])
    assert rates[0] == pytest.approx(1e-6)
    assert 0.1 < rates[-1] / 0.1 < 1
    assert left < 1e-3


def test_a_fixed_rate_of_1e_6_would_not_get_there() -> None:
    """Negative control: without auto_lr nothing is reached from the same start."""
    rates, left = descend(0.1, auto_lr=False)
    assert set(rates) == {1e-6}
    assert left > 0.99


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_rate_follows_the_distance(noise: float) -> None:
    """A minimum ten times as far is approached at about ten times the rate, with and without noise."""
    near, far = (descend(scale, noise=noise)[0][-1] for scale in (0.01, 0.1))
    assert 6 < far / near < 15


def test_regression_is_learned_as_well_as_at_a_tuned_rate() -> None:
    """On a small network the loss ends within twice the best of a grid: measured 1.43, where 1e-4 ends at 5."""
    tuned = {lr: Regression.trained(lr=lr) for lr in (1e-4, 3e-3, 1e-2, 3e-2)}
    found = Regression.trained(max_lr=0.1)
    assert found < 2 * min(tuned.values())
    assert tuned[1e-4] > 3 * min(tuned.values()), "the grid must tell rates apart"


@pytest.mark.parametrize("seed", range(3))
def test_noise_alone_finds_no_rate(seed: int) -> None:
    """Gradients that point nowhere leave the rate within a factor of twenty of its start."""
    p = torch.nn.Parameter(torch.zeros(3000))
    opt = Automagic32bit([p], max_lr=0.1)
    for t in range(150):
        p.grad = normal(3000, seed=1000 * (seed + 1) + t)
        opt.step()
    assert rate(opt) < 2e-5


# --- bounds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_lr", [1e-5, 1e-3, None])
def test_rate_grows_to_max_lr_and_never_falls(max_lr: float | None) -> None:
    """d is monotone and bounded by max_lr, 1e-3 where none is given; no element's rate exceeds it either."""
    options = {} if max_lr is None else {"max_lr": max_lr}
    p = torch.nn.Parameter(torch.zeros(300))
    opt = Automagic32bit([p], **options)
    bound, rates = torch.tensor(max_lr or 1e-3), []
    for t in range(100):
        p.grad = p.detach() - 1 + 0.3 * normal(300, seed=t)
        opt.step()
        rates.append(rate(opt))
        assert opt.element_learning_rates(p).max() <= bound
    assert all(a <= b for a, b in itertools.pairwise(rates))
    assert rates[-1] == bound


def test_min_lr_lifts_the_start() -> None:
    """A min_lr above the start holds from the first step."""
    rates, _ = descend(0.1, steps=2, min_lr=1e-4)
    assert rates[0] == pytest.approx(1e-4)


@pytest.mark.parametrize("lr", [1e-5, 1e-3])
def test_given_rate_is_the_start_when_auto_lr_is_asked_for(lr: float) -> None:
    """auto_lr=True beside lr starts there, and grows from there."""
    rates, _ = descend(0.1, steps=60, lr=lr, auto_lr=True)
    assert rates[0] == pytest.approx(lr)
    assert rates[-1] > 2 * lr


# --- the estimate -----------------------------------------------------------------------------------------------


MAX_LR = 1.0


def by_hand(
    gradients: list[list[np.ndarray]],
    thetas: list[list[np.ndarray]],
    ratios: list[float],
    strides: tuple[int, ...] = (16, 16),
) -> list[float]:
    """d of each step from the definition, over the probes of all tensors together; d0 = 1e-6, β2 = 0.99."""
    probes = [np.arange(x.size) // 256 % stride == 0 for x, stride in zip(thetas[0], strides, strict=True)]
    d, num, z, found = 1e-6, 0.0, [np.zeros(mask.sum()) for mask in probes], []
    for g, theta, ratio in zip(gradients, thetas, ratios, strict=True):
        found.append(d)
        num *= math.sqrt(0.99)
        for i, mask in enumerate(probes):
            weight = d**2 * ratio / 1e-6 * strides[i] / 16
            num += weight * (g[i][mask] * (thetas[0][i][mask] - theta[i][mask])).sum()
            z[i] = math.sqrt(0.99) * z[i] + weight * g[i][mask]
        total = sum(np.abs(x).sum() for x in z)
        d = min(max(d, num / total), MAX_LR) if total > 0 else d
    return found


@pytest.mark.parametrize("ratios", [[1.0] * 25, [0.0, 0.0] + [0.1 * t for t in range(1, 24)], [3.0] * 25])
@pytest.mark.parametrize(("most", "strides"), [(2**20, (16, 16)), (300, (64, 16))], ids=["all", "thinned"])
def test_estimate_is_the_stated_one(
    most: int, strides: tuple[int, ...], ratios: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """d over two tensors and a schedule equals the definition; only every 16th block is looked at, or fewer."""
    monkeypatch.setattr(st, "MAX_PROBED", most)
    sizes = [5000, 300] if strides[0] == 16 else [256 * 69 + 7, 300]
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in sizes]
    opt = Automagic32bit(parameters, max_lr=MAX_LR, weight_decay=0.0)
    gradients, thetas, found = [], [], []
    for t, ratio in enumerate(ratios):
        opt.param_groups[0]["lr"] = ratio * 1e-6
        drawn = [normal(n, seed=50 * t + n) - 1 for n in sizes]
        gradients.append([g.double().numpy() for g in drawn])
        thetas.append([p.detach().double().numpy().copy() for p in parameters])
        for p, g in zip(parameters, drawn, strict=True):
            p.grad = g
        opt.step()
        found.append(float(opt.param_groups[0]["auto_lr_rate"]))
    expected = by_hand(gradients, thetas, ratios, strides)
    # Rounding of θ, a few float32 steps from 0, and of sums over 600 elements.
    assert found == pytest.approx(expected, rel=1e-5)
    assert expected[-1] > 3e-6
    others = [
        by_hand(gradients, [[x[::-1] for x in theta] for theta in thetas], ratios, strides),
        by_hand(gradients, thetas, ratios, tuple(2 * stride for stride in strides)),
    ]
    for other in others:
        assert found != pytest.approx(other, rel=1e-5), "negative control"


def test_skipped_gradients_leave_the_estimate_finite() -> None:
    """NaN in a probe counts as no gradient there; d goes on growing."""
    p = torch.nn.Parameter(torch.zeros(300))
    opt = Automagic32bit([p])
    for t in range(60):
        p.grad = p.detach() - 1
        p.grad[t % 300] = math.nan
        p.grad[(t + 7) % 300] = math.inf
        opt.step()
    assert 1e-4 < rate(opt) < 1.0001e-3


# --- schedules --------------------------------------------------------------------------------------------------


def twin_move(ratio: float) -> tuple[Tensor, float]:
    """The move of the fortieth step when a schedule stands at `ratio` there, and d."""
    p = torch.nn.Parameter(torch.zeros(300))
    opt = Automagic32bit([p])
    for t in range(40):
        before = p.detach().clone()
        opt.param_groups[0]["lr"] = 1e-6 * (ratio if t == 39 else 1.0)
        p.grad = p.detach() - 1 + normal(300, seed=t)
        opt.step()
    return p.detach() - before, float(opt.param_groups[0]["auto_lr_rate"])


@pytest.mark.parametrize("ratio", [0.0, 0.25, 2.0])
def test_schedule_scales_the_found_rate(ratio: float) -> None:
    """lr / base multiplies d: a quarter of lr makes a quarter of the move, 0 none."""
    (move, d), (plain, d2) = twin_move(ratio), twin_move(1.0)
    assert d == d2 > 1e-5
    # θ is about 0.03: rounding it costs 2e-9 a step, of moves of 1e-3.
    torch.testing.assert_close(move, ratio * plain, rtol=1e-3, atol=1e-8)


def test_scheduler_of_torch_is_obeyed() -> None:
    """LambdaLR writes lr and initial_lr; the mean rate shown is d times its factor."""
    p = torch.nn.Parameter(torch.zeros(300))
    opt = Automagic32bit([p])
    factors = [min(1.0, t / 10) * (0.5 if t > 30 else 1.0) for t in range(41)]
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: factors[t])
    for t in range(40):
        p.grad = p.detach() - 1
        opt.step()
        d = float(opt.param_groups[0]["auto_lr_rate"])
        assert rate(opt) == pytest.approx(d * factors[t], rel=1e-6)
        mean = opt.element_learning_rates(p).mean().item()
        assert mean == pytest.approx(max(d * factors[t], 1e-7 * factors[t]), rel=1e-3)
        scheduler.step()
    assert d > 1e-4


@pytest.mark.parametrize("storage", STORAGES)
def test_first_step_at_lr_0_is_harmless(storage: str) -> None:
    """A warm-up from 0 leaves θ and d as they were at the first step, and finds its rate all the same."""
    rates, left = descend(0.1, schedule=lambda t: min(1.0, t / 20), **STORAGES[storage])
    assert rates[0] == 0
    assert 0.005 < rates[-1] <= 0.1
    assert left < 1e-3


# --- groups and parameters --------------------------------------------------------------------------------------


def run_groups(groups: list[dict[str, Any]], steps: int = 40) -> Automagic:
    opt = Automagic32bit(groups)
    for t in range(steps):
        for index, group in enumerate(opt.param_groups):
            for p in group["params"]:
                p.grad = p.detach() - 1 + 0.5 * normal(*p.shape, seed=100 * t + index)
        opt.step()
    return opt


def test_group_with_its_own_rate_is_not_affected() -> None:
    """A group given lr keeps it and trains as if alone; the other group finds the rate it finds alone."""
    fixed, free = (torch.nn.Parameter(torch.zeros(300)) for _ in range(2))
    both = run_groups([{"params": [free]}, {"params": [fixed], "lr": 3e-4}])
    assert rate(both, 1) == 3e-4
    assert "probe_sum" not in both.state[fixed]

    alone = torch.nn.Parameter(torch.zeros(300))
    assert rate(run_groups([{"params": [alone]}])) == rate(both, 0)
    assert torch.equal(alone, free)

    first, second = (torch.nn.Parameter(torch.zeros(300)) for _ in range(2))
    run_groups([{"params": [first], "lr": 1e-3}, {"params": [second], "lr": 3e-4}])
    assert torch.equal(second, fixed)


def test_each_group_finds_its_own_rate() -> None:
    """Two groups with minima at different distances end at different rates."""
    near, far = (torch.nn.Parameter(torch.zeros(2000)) for _ in range(2))
    opt = Automagic32bit([{"params": [near]}, {"params": [far]}], max_lr=1.0)
    for _ in range(100):
        for p, target in ((near, 0.01), (far, 0.1)):
            p.grad = p.detach() - target
        opt.step()
    assert 5 < rate(opt, 1) / rate(opt, 0) < 20


def test_rate_found_late_starts_from_the_groups_lr() -> None:
    """auto_lr switched on in a group during training starts at its lr and grows."""
    p = torch.nn.Parameter(torch.zeros(300))
    opt = Automagic32bit([p], lr=1e-5)
    rates = []
    for t in range(60):
        if t == 20:
            opt.param_groups[0]["auto_lr"] = True
        p.grad = p.detach() - 1
        opt.step()
        rates.append(rate(opt))
    assert rates[:21] == pytest.approx([1e-5] * 21)
    assert rates[-1] > 3e-5


@pytest.mark.parametrize("reverse", [False, True])
def test_stepping_parameter_by_parameter_gives_the_same_numbers(reverse: bool) -> None:
    """`step_parameter`, in either order, moves θ, d and every state as `step` does."""
    together, one_by_one = Regression(), Regression()
    options = {"lora": True, "rank_penalty_strength": 0.5, "max_lr": 0.1}
    opt, opt2 = (Automagic32bit(problem.parameters, **options) for problem in (together, one_by_one))
    for t in range(45):
        together.give_gradients(t)
        opt.step()
        one_by_one.give_gradients(t)
        for p in sorted(one_by_one.parameters, key=lambda p: p.numel(), reverse=reverse):
            opt2.step_parameter(p, opt2.param_groups[0])
    assert rate(opt) == rate(opt2) > 1e-4
    for p, p2 in zip(together.parameters, one_by_one.parameters, strict=True):
        assert torch.equal(p, p2)
        for name, value in opt.state[p].items():
            other = opt2.state[p2][name]
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, name


def test_probes_are_every_sixteenth_block() -> None:
    """Two probes for 17 blocks and a bit; they keep θ's first values in θ's dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        p = torch.nn.Parameter(normal(256 * 17 - 100, seed=0).to(dtype))
        start = p.detach().clone()
        opt = Automagic32bit([p])
        for _ in range(3):
            p.grad = torch.ones_like(p)
            opt.step()
        held = opt.state[p]["probe_start"]
        assert held.dtype == dtype
        assert torch.equal(held[0], start[:256])
        assert torch.equal(held[1, :156], start[4096:])
        assert (held[1, 156:] == 0).all()
        assert opt.state[p]["probe_sum"].shape == (2, 256)


@pytest.mark.parametrize(("elements", "stride"), [(1, 16), (2**24, 16), (2**24 + 1, 32), (86e6, 128), (1.2e9, 2048)])
def test_about_a_million_weights_of_a_group_are_watched(elements: float, stride: int) -> None:
    assert st.probe_stride(int(elements)) == stride


def test_a_layer_without_shape_yet_may_be_given() -> None:
    layer = torch.nn.LazyLinear(4)
    opt = Automagic32bit(layer.parameters())
    layer(torch.ones(2, 3)).sum().backward()
    opt.step()
    assert all(len(opt.state[p]["probe_sum"]) == 1 for p in layer.parameters())


@given(blocks=some.integers(0, 2000), power=some.integers(4, 12))
def test_the_number_of_probes_tells_their_stride(blocks: int, power: int) -> None:
    """Or one of the same probes: the first block alone."""
    probes = -(-blocks // 2**power)
    held = st.stride_held(blocks, probes)
    assert list(range(0, blocks, held)) == list(range(0, blocks, 2**power))


PEAKS = {
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1e-3, total_steps=60, cycle_momentum=False),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 1e-5, 1e-3, step_size_up=20, cycle_momentum=False),
}


@pytest.mark.parametrize("way", ["step", "step_parameter"])
@pytest.mark.parametrize("schedule", PEAKS.values(), ids=PEAKS)
def test_a_schedule_that_begins_far_below_its_peak_is_told(schedule: Callable[[Any], Any], way: str) -> None:
    """It multiplies the rate found by up to 25 or 100; with a given rate it is what it is meant to be."""
    for lr in (None, 1e-4):
        p = torch.nn.Parameter(torch.zeros(60, 64))
        opt = Automagic32bit([p], lr=lr)
        scheduler = schedule(opt)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for t in range(20):
                p.grad = normal(60, 64, seed=t)
                opt.step() if way == "step" else opt.step_parameter(p, opt.param_groups[0], 0)
                scheduler.step()
        assert len([w for w in told if "a schedule has raised lr to more than 4 times" in str(w.message)]) == (
            lr is None
        )


def test_a_warm_up_and_a_doubling_by_hand_are_nothing_to_tell() -> None:
    p = torch.nn.Parameter(torch.zeros(8, 8))
    opt = Automagic32bit([p])
    warm_up = torch.optim.lr_scheduler.LinearLR(opt, 0.01, total_iters=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            p.grad = torch.ones_like(p)
            opt.step()
            warm_up.step()
        opt.param_groups[0]["lr"] *= 4
        opt.step()
