"""One step of the rule, formula by formula: the package in float32 beside `rule_in_float64`, and outside oracles."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from rule_in_float64 import RuleInFloat64
from torch import Tensor

from automagic_bnb import estimate, low_rank, optimizer, reference, scalars, stored
from automagic_bnb import quantization as q
from automagic_bnb import state as st
from automagic_bnb.optimizer import Automagic32bit

STEPS = 12
FINDING_STEPS = 40
"""Until a rate has been found: before the sixteenth, no agreement of signs stands out from a coin's."""
CLEAR = 1e-5
"""Gradients are redrawn until every threshold and sign is decided by more than this: some 80 float32 roundings."""


@dataclass(frozen=True)
class Tolerance:
    bound: float
    reason: str


TOLERANCES = {
    # Float32 rounding is 6e-8; a dozen steps of sums over 256 elements measured 0.1e-6 to 2.5e-6 on these scenarios.
    "theta": Tolerance(1e-5, "over the largest move: rounding of u, n and θ, accumulated over the steps"),
    "m": Tolerance(1e-5, "absolute, m being of order 1: rounding of g̃ where the Laplacian cancels"),
    "v": Tolerance(1e-5, "relative: the square doubles the relative error of g̃"),
    "r": Tolerance(1e-5, "over the largest: (u - m)² cancels"),
    "k": Tolerance(1e-5, "absolute, in 1/16 octaves, k being of order 10"),
    "s": Tolerance(1e-6, "absolute, |s| <= 1: three sums over a block"),
    "h": Tolerance(1e-5, "relative: a mean of |lap|, which cancels"),
    "sigma": Tolerance(2e-6, "absolute, σ being of order 1: mean(u²) - mean(u)² cancels"),
    "W": Tolerance(2e-6, "relative: a mean of 2^(k/16)"),
    "norms": Tolerance(2e-6, "relative: a sum of squares over the tensor"),
    "d": Tolerance(5e-5, "relative: 1 - z e / q cancels, to 0.013 on four elements: 3.5e-7 of q becomes 2.7e-5"),
    "sums": Tolerance(2e-5, "relative: Σ u (θ0 - θ) cancels, and θ0 - θ inherits the rounding of θ"),
    "watched": Tolerance(0.0, "which block of each span is watched, decided exactly"),
    "polarity": Tolerance(0.0, "a sign, decided exactly"),
    "skipped": Tolerance(0.0, "a count"),
}

Schedule = Callable[[int], float]


class Pair:
    """The same parameter in the package (`p`, `opt`) and in float64 (`oracle`), moved by the same gradients."""

    def __init__(
        self, shape: tuple[int, ...], factored: bool = False, wrong: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """`wrong`: options that only the package is given, to show that the comparison sees them."""
        self.shape, self.rng = shape, np.random.default_rng(0)
        # Where the rate starts at 1e-6 the moves must stand out of float32's rounding of θ.
        size = 1e-4 if options.get("auto_lr") else 0.1
        start = (size * self.rng.standard_normal(shape)).astype(np.float32)
        self.oracle = RuleInFloat64(start, factored, **options)
        self.start = start.astype(np.float64).reshape(-1)
        package_options = {k: v for k, v in self.oracle.options.items() if k not in ("lr", "base")} | (wrong or {})
        self.p = torch.nn.Parameter(torch.from_numpy(start.copy()))
        self.opt = Automagic32bit([self.p], lr=self.oracle.options["lr"], **package_options)
        if self.oracle.options["base"] != self.oracle.options["lr"]:
            self.opt.param_groups[0]["initial_lr"] = self.oracle.options["base"]
        if factored:
            self.opt.state[self.p] = factored_float32_state(self.p, self.opt.param_groups[0])
        # Blocks turn against their momentum, but not where a rate is to be found, which such a gradient forbids.
        self.noise, self.reversal = (1.0, 0.7) if options.get("auto_lr") else (1.0, -1.5)
        self.nothing: float | None = None
        self.drift = self.rng.standard_normal(shape)
        self.scales = 10 ** self.rng.uniform(-1, 1, -(-self.drift.size // 256))

    def set_lr(self, lr: float) -> None:
        self.oracle.options["lr"] = self.opt.param_groups[0]["lr"] = lr

    def draw(self, t: int, poison: float) -> np.ndarray:
        """A float32 gradient: drift, noise, outliers, zeros, blocks of different scale that fall silent in turn."""
        n = self.drift.size
        turned = np.where((np.arange(self.scales.size) + t) % 5 == 4, self.reversal, 0.7)
        g = np.repeat(turned, 256)[:n] * self.drift.reshape(-1) + self.noise * self.rng.standard_normal(n)
        g *= np.where(self.rng.random(n) < 0.01, 20, 1)
        g *= np.where(self.rng.random(n) < 0.05, 0, 1)
        quiet = np.where((np.arange(self.scales.size) + t) % 4 == 3, 0.02, 1)
        g *= np.repeat(self.scales * quiet, 256)[:n]
        if self.oracle.options["percentile_clipping"] < 100 and not g.any():
            g[0] = 1.0  # a norm of 0 is a question of its own
        if poison:
            where = self.rng.random(n) < poison
            where[256:512] |= t % 3 == 2  # a whole block at a time
            g[where] = self.rng.choice([np.nan, np.inf, -np.inf], n)[where]
        return g.astype(np.float32).reshape(self.shape)

    def draw_late(self, t: int, poison: float) -> np.ndarray:
        """As `draw`, but nothing is seen before step 4."""
        g = self.draw(t, poison)
        return np.full_like(g, self.nothing) if t <= 3 else g

    def step_oracle(self, t: int, poison: float) -> np.ndarray:
        """Step the oracle with a gradient that is clear of all thresholds; returns the gradient."""
        for _ in range(50):
            g = self.draw(t, poison) if self.nothing is None else self.draw_late(t, poison)
            trial = copy.deepcopy(self.oracle)
            trial.step(g)
            if trial.closest > CLEAR:
                self.oracle = trial
                return g
        raise AssertionError("no gradient is clear of all thresholds")

    def run(self, steps: int = STEPS, poison: float = 0.0, schedule: Schedule | None = None) -> Pair:
        for t in range(1, steps + 1):
            if schedule is not None:
                self.set_lr(schedule(t))
            self.p.grad = torch.from_numpy(self.step_oracle(t, poison))
            self.opt.step()
        return self

    def errors(self) -> dict[str, float]:
        """How far each quantity lies from its float64 value, in the units of TOLERANCES."""
        o, state = self.oracle, self.opt.state[self.p]
        stats = state["tensor_stats"]
        found = {
            "theta": apart(self.p.detach(), o.theta) / np.abs(o.theta - self.start).max(),
            "m": apart(state["state1"], o.m),
            "k": apart(state["lr_mask"], o.k),
            "s": apart(state["torque"], o.s),
            "h": relative(state["edge_history"], o.h),
            "sigma": apart(state["spatial_variance"], o.sigma),
            "W": abs(stats[st.MASK_MEAN].item() / o.mask_mean - 1),
            "polarity": apart(state["last_polarity"], np.choose(o.sign.astype(int) + 1, (0, 2, 1))),
            "skipped": abs(stats[st.SKIPPED].item() - o.skipped),
            **self._moment_errors(),
        }
        if "gnorm_vec" in state:
            found["norms"] = relative(state["gnorm_vec"][: o.t], np.array(o.norms))
        if o.options["auto_lr"]:
            group = self.opt.param_groups[0]
            sums, momentum = group["auto_lr_sums"], stats[st.LR_DENOMINATOR].item()
            # The estimate that a step begins with.
            self.opt._fused._rates.begin(self.opt.param_groups, self.opt.state, None, frozenset())
            found["d"] = abs(group["auto_lr_rate"].item() / o.d - 1)
            pairs = ((momentum, o.momentum), (sums[0].item(), o.num), (sums[1].item(), o.agreement))
            found["sums"] = max(abs(x / expected - 1) for x, expected in pairs)
            found["watched"] = float(state["probe_block"].tolist() != [b % 32 for b, _ in o.watched.values()])
        return found

    def _moment_errors(self) -> dict[str, float]:
        o, state = self.oracle, self.opt.state[self.p]
        if "exp_avg_sq_row" not in state:
            found = {"v": relative(state["state2"], o.v.held)}
            return {**found, "r": apart(state["state3"], o.r.held) / o.r.held.max()} if o.options["came"] else found
        found = {"v": relative(state["exp_avg_sq_row"], o.v.row) + relative(state["exp_avg_sq_col"], o.v.col)}
        if o.options["came"]:
            found["r"] = relative(state["exp_avg_res_row"], o.r.row) + relative(state["exp_avg_res_col"], o.r.col)
        return found


def factored_float32_state(p: Tensor, options: dict[str, Any]) -> st.State:
    """Factored moments beside a float32 m and k, so that only the rule is compared and no 8-bit rounding."""
    full, factored = st.complete({}, p, "32bit", options), st.complete({}, p, "factored", {**options, "mean_bits": 32})
    means = {k: x for k, x in factored.items() if k.endswith(("_row", "_col"))}
    return {**{k: x for k, x in full.items() if k not in ("state2", "state3")}, **means}


def apart(x: Tensor, expected: np.ndarray) -> float:
    """Largest absolute difference; infinite where x is not finite."""
    found = x.double().numpy().reshape(-1)
    return float(np.abs(found - expected).max()) if np.isfinite(found).all() else math.inf


def relative(x: Tensor, expected: np.ndarray) -> float:
    """Largest difference of two non-negative vectors over the expected value; zeros must be zeros."""
    found = x.double().numpy().reshape(-1)
    positive = expected > 0
    if not np.isfinite(found).all() or (found[~positive] != 0).any():
        return math.inf
    return float(np.abs(found[positive] / expected[positive] - 1).max(initial=0))


def violations(errors: dict[str, float]) -> dict[str, float]:
    return {name: e for name, e in errors.items() if not e <= TOLERANCES[name].bound}


SHAPES = [(7, 9), (300,), (1,), (5, 3, 3, 3), (40, 513), (16, 32), (2, 2)]
SCENARIOS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "mask frozen after step 6": {"warmup_steps": 6},
    "no mask": {"warmup_steps": 0, "weight_decay": 0.3},
    "non-finite gradients": {},
    "clamped to min_lr and max_lr": {"min_lr": 9.5e-3, "max_lr": 1.1e-2},
    "schedule over initial_lr": {"lr": 2e-3, "base": 8e-3, "min_lr": 7.8e-3, "max_lr": 8.4e-3},
    "bare": dict.fromkeys(
        ("edge_suppression", "background_regularization", "spatial_awareness", "torque", "came", "cautious"), False
    )
    | {"frequency_penalty": 0.0},
    "lora": {"lora": True, "rank_penalty_strength": 0.3, "low_rank_emphasis": 1.7},
    "lora with a mask": {"lora": True, "lora_mask": True, "low_rank_emphasis": 1.7},
    "lora, turned": {"lora": True, "lora_direction": "orthogonal", "rank_penalty_strength": 0.3},
    "percentile clipping": {"percentile_clipping": 40},
    "min_lr above the rate": {"min_lr": 1.1e-2, "max_lr": 1.2e-2},
    "max_lr not set": {"max_lr": None},
    "auto_lr": {"lr": 1e-6, "base": 1e-6, "auto_lr": True, "max_lr": None},
    "auto_lr, scheduled": {"lr": 1e-6, "base": 1e-6, "auto_lr": True, "max_lr": 1e-2, "lora": True},
    "auto_lr, turned": {
        "lr": 1e-6,
        "base": 1e-6,
        "auto_lr": True,
        "max_lr": None,
        "lora": True,
        "lora_direction": "orthogonal",
    },
    "strong edges": {"edge_penalty": 4.0, "edge_threshold": 0.2, "frequency_penalty": 0.0, "detail_preservation": 4.0},
    "strong frequency": {"edge_suppression": False, "frequency_penalty": 0.9, "detail_preservation": 0.1},
    "steady": {"betas": (0.5, 0.99, 0.5), "torque": False},
    "turning": {},
    "other constants": {
        "betas": (0.7, 0.95, 0.98),
        "eps": (1e-3, 1e-2),
        "clip_threshold": 0.6,
        "detail_preservation": 1.4,
        "weight_decay": 0.1,
    },
}

GRADIENTS = {"steady": (0.02, 0.7), "turning": (0.1, -0.7)}
"""Noise, and what the drift is multiplied by where a block turns: scenarios whose gradients are not the usual ones."""


def run_scenario(
    name: str, shape: tuple[int, ...], factored: bool = False, wrong: dict[str, Any] | None = None
) -> Pair:
    options = SCENARIOS[name]
    schedule = (lambda t: options["lr"] * (1 + math.cos(t / 4))) if "schedule" in name else None
    pair = Pair(shape, factored, wrong, **options)
    pair.noise, pair.reversal = GRADIENTS.get(name, (pair.noise, pair.reversal))
    steps = FINDING_STEPS if name.startswith("auto_lr") else STEPS
    return pair.run(steps, poison=0.03 if name.startswith("non-finite") else 0.0, schedule=schedule)


LARGE = (40, 513)
LARGE_SCENARIOS = ("defaults", "non-finite gradients", "lora")
COMBINATIONS = [
    pytest.param(name, shape, factored, id=f"{name}-{shape}-{'factored' if factored else 'elements'}")
    for factored in (False, True)
    for name in SCENARIOS
    for shape in SHAPES
    if (shape != LARGE or name in LARGE_SCENARIOS) and (len(shape) > 1 or not factored)
]


@pytest.mark.parametrize(("name", "shape", "factored"), COMBINATIONS)
def test_a_dozen_steps_or_forty_agree_with_float64(name: str, shape: tuple[int, ...], factored: bool) -> None:
    """θ and every state stay within float32 rounding of the formulas written out in float64."""
    errors = run_scenario(name, shape, factored).errors()
    assert not violations(errors), {x: (e, TOLERANCES[x]) for x, e in violations(errors).items()}


@pytest.mark.parametrize("nothing", [0.0, math.nan])
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("shape", [(16, 32), (7, 9)])
def test_gradients_that_come_late_agree_with_float64(shape: tuple[int, ...], factored: bool, nothing: float) -> None:
    """Zeros (as LoRA's A sees) or NaN for three steps, then gradients: lagged means that hold nothing yet included."""
    pair = Pair(shape, factored)
    pair.nothing = nothing
    errors = pair.run().errors()
    assert not violations(errors), violations(errors)


WRONG_OPTIONS: list[tuple[str, dict[str, Any], set[str]]] = [
    ("defaults", {"betas": (0.901, 0.99, 0.999)}, {"m", "theta"}),
    ("defaults", {"betas": (0.9, 0.9901, 0.999)}, {"v", "theta"}),
    ("defaults", {"betas": (0.9, 0.99, 0.9)}, {"r", "theta"}),
    ("other constants", {"eps": (1.02e-3, 1e-2)}, {"v", "theta"}),
    ("other constants", {"eps": (1e-3, 1.02e-2)}, {"r", "theta"}),
    ("other constants", {"clip_threshold": 0.601}, {"m", "r", "theta"}),
    ("other constants", {"detail_preservation": 1.401}, {"k", "W", "theta"}),
    ("defaults", {"weight_decay": 6e-4}, {"theta"}),
    ("defaults", {"edge_penalty": 0.101}, {"v", "m", "theta"}),
    ("defaults", {"edge_threshold": 0.61}, {"h", "v", "theta"}),
    ("defaults", {"frequency_penalty": 0.0501}, {"v", "m", "theta"}),
    ("lora", {"low_rank_emphasis": 1.71}, {"m", "theta"}),
    ("lora", {"rank_penalty_strength": 0.301}, {"theta"}),
    ("lora", {"lora_rank_penalty": False}, {"theta"}),
    ("lora", {"lora": False}, {"m", "theta", "k", "W"}),
    ("lora", {"lora_mask": True}, {"k", "W", "sigma", "theta"}),
    ("lora with a mask", {"lora_mask": False}, {"k", "W", "sigma", "theta"}),
    ("lora with a mask", {"lora": False}, {"m", "theta"}),
    ("lora, turned", {"lora_direction": None}, {"theta"}),
    ("auto_lr, turned", {"lora_direction": None}, {"theta", "d"}),
    ("clamped to min_lr and max_lr", {"min_lr": 9.51e-3}, {"theta"}),
    ("clamped to min_lr and max_lr", {"max_lr": 1.101e-2}, {"theta"}),
    ("schedule over initial_lr", {"max_lr": 8.41e-3}, {"theta"}),
    ("mask frozen after step 6", {"warmup_steps": 7}, {"k", "W", "sigma", "polarity", "theta"}),
    ("percentile clipping", {"percentile_clipping": 50}, {"v", "theta"}),
    ("auto_lr", {"max_lr": 2e-6}, {"d"}),
    *[("defaults", {name: False}, {"theta"}) for name in ("torque", "cautious", "background_regularization")],
    ("defaults", {"spatial_awareness": False}, {"k", "theta"}),
    ("defaults", {"edge_suppression": False}, {"v", "theta"}),
]


@pytest.mark.parametrize(("name", "wrong", "seen"), WRONG_OPTIONS, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_comparison_sees_an_option_that_is_slightly_off(name: str, wrong: dict[str, Any], seen: set[str]) -> None:
    """Negative control: an option that differs by a percent leaves the tolerances of exactly its own quantities."""
    assert seen <= violations(run_scenario(name, (16, 32), wrong=wrong).errors()).keys()


WRONG_CONSTANTS: list[tuple[str, str, float, str]] = [
    ("defaults", "STATISTIC_DECAY", 0.901, "s"),
    ("defaults", "STATISTIC_DECAY", 0.901, "sigma"),
    ("defaults", "STATISTIC_DECAY", 0.901, "h"),
    ("defaults", "BACKGROUND_ACTIVITY", 0.01, "theta"),
    ("steady", "MIN_RESIDUAL", 0.0101, "theta"),
    ("turning", "MIN_CAUTIOUS_SHARE", 0.26, "theta"),
    ("lora", "LOW_RANK_EVERY", 5, "theta"),
]


@pytest.mark.parametrize(("name", "constant", "value", "seen"), WRONG_CONSTANTS)
def test_comparison_sees_a_constant_that_is_slightly_off(
    name: str, constant: str, value: float, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: each constant of the rule is decisive in the scenario that is meant to test it."""
    monkeypatch.setattr(low_rank if constant.startswith("LOW_RANK") else reference, constant, value)
    assert seen in violations(run_scenario(name, (16, 32)).errors())


@pytest.mark.parametrize("field", ["correction1", "correction2", "correction3", "rate", "kappa", "low", "high"])
@pytest.mark.parametrize("factored", [False, True])
def test_comparison_sees_a_scalar_that_is_slightly_off(
    field: str, factored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: each number worked out per step reaches θ, in both storages."""
    right = scalars.step_scalars

    def wrong(*args: Any) -> scalars.Scalars:
        scalars = right(*args)
        return dataclasses.replace(scalars, **{field: getattr(scalars, field) * 1.001})

    monkeypatch.setattr(optimizer, "step_scalars", wrong)
    options = {"lora": True, "lora_mask": True, "min_lr": 9.5e-3, "max_lr": 1.1e-2}
    assert "theta" in violations(Pair((16, 32), factored, **options).run().errors())


def wrap_around(g: Tensor) -> Tensor:
    """The Laplacian of a torus: right everywhere but at the rim."""
    return sum(g.roll(s, d) for s in (1, -1) for d in (-1, -2)) - 4 * g


@pytest.mark.parametrize("shape", [(7, 9), (5, 3, 3, 3)])
def test_comparison_sees_a_wrong_boundary(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a Laplacian that wraps around is not taken for the right one."""
    monkeypatch.setattr(reference, "laplacian", wrap_around)
    assert {"v", "theta"} <= violations(run_scenario("defaults", shape).errors()).keys()


@pytest.mark.parametrize("shape", [(300,), (7, 9)])
def test_comparison_sees_a_short_block_taken_for_a_full_one(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: means of the last block run over its real elements."""
    monkeypatch.setattr(stored.Blocks, "mean", lambda self, x: x.sum(dim=1, keepdim=True) / q.BLOCK)
    assert {"sigma", "theta"} <= violations(run_scenario("defaults", shape).errors()).keys()


def test_scenarios_reach_what_they_are_for() -> None:
    """The scenarios do clip, skip, grow d, and meet quiet blocks: no formula is compared on idle inputs only."""
    assert run_scenario("non-finite gradients", (40, 513)).oracle.skipped > 1000
    automatic = run_scenario("auto_lr", (300,)).oracle
    assert 3 * automatic.d0 < automatic.d < 0.9 * automatic.d0 * estimate.GROWTH ** (FINDING_STEPS - 14)
    frozen = run_scenario("mask frozen after step 6", (300,)).oracle
    assert np.unique(frozen.k).size > 20
    assert max(run_scenario("strong edges", (16, 32)).oracle.h) > 0.2
