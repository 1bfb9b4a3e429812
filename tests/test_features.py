"""Every switch changes its own part of the state and nothing else, and does what its name says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from automagic_bnb import state as st
from automagic_bnb import stored
from automagic_bnb.config import RULES, AutomagicConfig
from automagic_bnb.optimizer import Automagic, Automagic8bit, Automagic32bit

SHAPE = (20, 32)
STORAGES: dict[str, tuple[type[Automagic], dict[str, Any]]] = {
    "32bit": (Automagic32bit, {}),
    "8bit": (Automagic8bit, {"min_8bit_size": 0, "factored": False, "mask_bits": 8}),
    "factored": (Automagic8bit, {"min_8bit_size": 0, "factored": True, "mask_bits": 8, "mean_bits": 32}),
}
SYMBOLS = {
    "m": ("state1", "absmax1"),
    "v": ("state2", "absmax2", "exp_avg_sq_row", "exp_avg_sq_col"),
    "r": ("state3", "absmax3", "exp_avg_res_row", "exp_avg_res_col"),
    "s": ("torque",),
    "h": ("edge_history",),
    "σ": ("spatial_variance",),
}
Gradients = Callable[[int], Tensor]
Snapshot = dict[str, Tensor]


def noise(t: int) -> Tensor:
    """Step t's usual gradient: random, with a part that stays."""
    drift = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1000))
    return 0.3 * drift + torch.randn(SHAPE, generator=torch.Generator().manual_seed(t))


def steady(t: int) -> Tensor:
    """The same gradient at every step."""
    return noise(0)


def quiet_at_the_end(t: int) -> Tensor:
    """From step 4 on the second block's gradient is a hundredth of what it was."""
    g = noise(t)
    if t >= 4:
        g.view(-1)[256:512] *= 0.01
    return g


def doubling(t: int) -> Tensor:
    """The same gradient, twice as large at every step."""
    return noise(0) * 2.0**t


def train(
    steps: int,
    options: dict[str, Any],
    storage: str = "32bit",
    gradients: Gradients = noise,
    dtype: torch.dtype = torch.float32,
    start: Tensor | None = None,
) -> tuple[torch.nn.Parameter, Automagic]:
    if start is None:
        start = 0.1 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(77))
    p = torch.nn.Parameter(start.to(dtype, copy=True))
    kind, fixed = STORAGES[storage]
    opt = kind([p], **{"lr": 1e-3, **fixed, **options})
    for t in range(1, steps + 1):
        p.grad = gradients(t).to(dtype)
        opt.step()
    return p, opt


def snapshot(p: torch.nn.Parameter, opt: Automagic) -> Snapshot:
    """θ and all state under the rule's symbols; k and π unpacked."""
    state = opt.state[p]
    k, polarity = stored.read_mask(state, stored.Blocks(p))
    found = {"θ": p.detach(), "k": k, "π": polarity, "W": state["tensor_stats"][st.MASK_MEAN]}
    for symbol, names in SYMBOLS.items():
        held = [state[n].view(-1).double() for n in names if n in state]
        found[symbol] = torch.cat(held) if held else torch.empty(0)
    return found


def changed(a: Snapshot, b: Snapshot) -> str:
    """The symbols whose bits differ, in the order of SYMBOL_ORDER."""
    return "".join(x for x in SYMBOL_ORDER if not torch.equal(a[x], b[x]))


SYMBOL_ORDER = "θmvrshσkWπ"
ALL_BUT_SIGN = "θmvrshσkW"
AFTER_FILTER = "θmvrsσkW"
"""What g̃ reaches: h and π come from the raw gradient."""


@dataclass(frozen=True)
class Case:
    option: str
    value: Any
    expected: str
    """The symbols that must change; all others must keep their bits."""
    steps: int = 5
    base: dict[str, Any] = field(default_factory=dict)
    gradients: Gradients = noise
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.option}={self.value} {self.gradients.__name__} step {self.steps} {str(self.dtype)[6:]}"


LORA = {"lora": True, "rank_penalty_strength": 0.2}
CASES = [
    Case("cautious", False, "θ"),
    Case("background_regularization", False, "θ", gradients=quiet_at_the_end),
    Case("background_regularization", False, ""),
    Case("weight_decay", 0.1, "θ"),
    Case("lr", 2e-3, "θ"),
    Case("min_lr", 9.99e-4, "θ"),
    Case("max_lr", 1.001e-3, "θ"),
    Case("torque", False, "", steps=1),
    Case("torque", False, "θmrs"),
    Case("came", False, "θr"),
    Case("edge_suppression", False, ALL_BUT_SIGN),
    Case("edge_threshold", 0.9, ALL_BUT_SIGN),
    Case("edge_threshold", 0.9, "", base={"edge_suppression": False}),
    Case("edge_penalty", 0.5, AFTER_FILTER),
    Case("edge_penalty", 0.5, "", base={"edge_suppression": False}),
    Case("frequency_penalty", 0.0, AFTER_FILTER),
    Case("spatial_awareness", False, "", steps=1),
    Case("spatial_awareness", False, "θkW"),
    Case("detail_preservation", 1.2, "", steps=1),
    Case("detail_preservation", 1.2, "θkW"),
    Case("detail_preservation", 1.2, "", base={"spatial_awareness": False}),
    Case("warmup_steps", 3, "", steps=3),
    Case("warmup_steps", 3, "θσkWπ"),
    Case("clip_threshold", 0.4, "θmrsσkW"),
    Case("clip_threshold", 50.0, "θmrsσkW", gradients=doubling),
    Case("percentile_clipping", 20, "", steps=1, gradients=doubling),
    Case("percentile_clipping", 20, AFTER_FILTER, gradients=doubling),
    Case("low_rank_emphasis", 2.5, "θmrs", base=LORA),
    Case("low_rank_emphasis", 2.5, ""),
    Case("low_rank_emphasis", 2.5, "", base=LORA | {"torque": False}),
    Case("lora_rank_penalty", False, "", steps=9, base=LORA),
    Case("lora_rank_penalty", False, "θ", steps=10, base=LORA),
    Case("lora_rank_penalty", False, "", steps=10),
    Case("rank_penalty_strength", 0.3, "θ", steps=10, base=LORA),
    Case("lora", True, "θmrs", base={"lora_rank_penalty": False, "lora_mask": True}),
    Case("lora_mask", True, "θσkWπ", base={"lora": True}),
    Case("lora_mask", True, ""),
    Case("lora_direction", "orthogonal", "θ", base=LORA),
    Case("lora_direction", "orthogonal", ""),
    Case("stochastic_rounding", False, ""),
    Case("stochastic_rounding", False, "θ", dtype=torch.bfloat16),
    Case("stochastic_rounding", False, "θ", dtype=torch.float16),
    Case("master", "none", "θ", dtype=torch.bfloat16),
    Case("master", "ecc8", "θ", dtype=torch.bfloat16),
    Case("master", "ecc8", "", dtype=torch.float16),
    Case("auto_lr", True, "θ", steps=25, gradients=steady),
    Case("auto_lr_steps", 15, "θ", steps=25, base={"auto_lr": True}, gradients=steady),
    Case("auto_lr_steps", 15, "", steps=25, gradients=steady),
    Case("betas", (0.8, 0.99, 0.999), "θmrs"),
    Case("betas", (0.9, 0.9, 0.999), AFTER_FILTER),
    Case("betas", (0.9, 0.99, 0.9), "θr"),
    Case("eps", (1e-2, 1e-16), AFTER_FILTER),
    Case("eps", (1e-30, 1e-1), "θr"),
]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_option_changes_its_own_part_alone(case: Case, storage: str) -> None:
    """The symbols expected to change do, and every other keeps its bits."""
    options = case.base, case.base | {case.option: case.value}
    runs = [train(case.steps, o, storage, case.gradients, case.dtype) for o in options]
    found, expected = changed(*(snapshot(*run) for run in runs)), case.expected
    if storage != "32bit" and "σ" in expected and "k" not in found:
        expected = expected.replace("kW", "")  # k is whole there: a small change of σ need not turn one
    assert found == expected


RULE_OPTIONS = """
    lr min_lr max_lr auto_lr auto_lr_steps weight_decay warmup_steps betas eps clip_threshold percentile_clipping
    edge_suppression edge_penalty edge_threshold frequency_penalty background_regularization spatial_awareness
    detail_preservation lora lora_mask lora_rank_penalty rank_penalty_strength low_rank_emphasis lora_direction
    torque came cautious stochastic_rounding master
    seed
"""
HOW_IT_RUNS = """
    optim_bits min_8bit_size block_wise stable_emb force_8bit factored mask_bits mean_bits is_paged backend
    preset profile verbose capturable run_log run_log_every
"""


def test_every_option_of_the_rule_has_a_case() -> None:
    """Each option stands in the table with an input on which it matters, or says only how the optimizer runs."""
    assert set(RULE_OPTIONS.split()) - {case.option for case in CASES if case.expected} == {"seed"}
    assert set(RULES) == {*RULE_OPTIONS.split(), *HOW_IT_RUNS.split()}


@pytest.mark.parametrize("storage", STORAGES)
def test_comparison_of_runs_can_fail(storage: str) -> None:
    """Negative control: two runs of the same options agree in every bit, two gradients in none."""
    same = [snapshot(*train(5, {}, storage)) for _ in range(2)]
    assert changed(*same) == ""
    other = snapshot(*train(5, {}, storage, lambda t: noise(t + 100)))
    assert changed(same[0], other) == SYMBOL_ORDER


@pytest.mark.parametrize(
    ("storage", "dtype", "steps", "expected"),
    [
        ("32bit", torch.float32, 4, ""),
        ("32bit", torch.bfloat16, 4, "θ"),
        ("8bit", torch.float32, 1, "v"),  # u = ±1 at first, so r is the same everywhere: its top code
        ("8bit", torch.bfloat16, 1, "θv"),
        ("8bit", torch.float32, 2, "θmvrsσkW"),
        ("factored", torch.float32, 1, ""),
        ("factored", torch.float32, 2, "θkW"),
    ],
)
def test_seed_changes_what_is_rounded_stochastically(
    storage: str, dtype: torch.dtype, steps: int, expected: str
) -> None:
    """θ in narrow types and v, r, k in 8 bits follow the seed; m takes the nearest code; 32 bits round nothing."""
    assert changed(*(snapshot(*train(steps, {"seed": x}, storage, dtype=dtype)) for x in (0, 1))) == expected


# --- what each part does ----------------------------------------------------------------------------------------


def moves(options: dict[str, Any], gradients: Gradients, steps: int) -> Tensor:
    """The last step's move of every element."""
    before, _ = train(steps - 1, options, gradients=gradients)
    after, _ = train(steps, options, gradients=gradients)
    return (after - before).detach()


PLAIN = {"weight_decay": 0.0, "edge_suppression": False, "frequency_penalty": 0.0, "warmup_steps": 0}


def test_background_regularization_halves_quiet_blocks() -> None:
    """A block whose gradient fell to a hundredth moves half as far; the others as they did."""
    on, off = (moves({**PLAIN, "background_regularization": x}, quiet_at_the_end, 4) for x in (True, False))
    quiet = torch.zeros(SHAPE, dtype=torch.bool)
    quiet.view(-1)[256:512] = True
    assert off[quiet].abs().sum() > 0
    torch.testing.assert_close(on[quiet], off[quiet] / 2, rtol=1e-3, atol=1e-8)
    assert torch.equal(on[~quiet], off[~quiet])


def test_cautious_stops_elements_that_go_against_their_gradient() -> None:
    """An element moves only where momentum and gradient agree, and then further to make up for the others."""
    on, off = (moves({**PLAIN, "cautious": x}, noise, 6) for x in (True, False))
    against = off * noise(6) > 0  # the move is along the gradient, not down it
    assert 0.05 < against.float().mean() < 0.5
    assert (on[against] == 0).all()
    assert (on[~against].abs() > 1.01 * off[~against].abs()).all()


def test_weight_decay_is_decoupled() -> None:
    """θ shrinks by its rate times weight_decay on top of the same update."""
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    runs = [train(1, {**PLAIN, "weight_decay": w}, start=start)[0] for w in (0.0, 0.5)]
    torch.testing.assert_close(runs[0] - runs[1], 1e-3 * 0.5 * start, rtol=1e-3, atol=5e-7)


def test_torque_follows_the_alignment_of_gradient_and_momentum() -> None:
    """A steady gradient builds more momentum, an alternating one less, than without torque."""
    steady, alternating = (lambda t: noise(0)), (lambda t: noise(0) * (-1.0) ** t)
    for gradients, grows in ((steady, True), (alternating, False)):
        on, off = (train(6, {**PLAIN, "torque": x}, gradients=gradients)[1] for x in (True, False))
        sizes = [next(iter(opt.state.values()))["state1"].abs().mean() for opt in (on, off)]
        assert (sizes[0] > 1.02 * sizes[1]) == grows
        assert (sizes[0] < 0.98 * sizes[1]) != grows


def test_low_rank_emphasis_strengthens_torque_of_lora_parameters() -> None:
    """κ scales the alignment of a LoRA parameter: with a steady gradient its momentum grows faster still."""
    sizes = []
    for options in ({"lora": False}, {"lora": True}, {"lora": True, "low_rank_emphasis": 2.0}):
        _, opt = train(4, {**PLAIN, **options}, gradients=lambda t: noise(0))
        sizes.append(next(iter(opt.state.values()))["state1"].abs().mean().item())
    assert sizes[0] < 0.99 * sizes[1] < 0.98 * sizes[2]


def test_came_trusts_consistent_elements() -> None:
    """Where the update keeps near its momentum steps grow, against elements whose update scatters."""
    steady = torch.zeros(SHAPE, dtype=torch.bool)
    steady[:, ::2] = True

    def mixed(t: int) -> Tensor:
        return torch.where(steady, 1.0, noise(t))

    ratio = {}
    for came in (True, False):
        step = moves({**PLAIN, "came": came, "torque": False, "cautious": False}, mixed, 30).abs()
        ratio[came] = (step[steady].mean() / step[~steady].mean()).item()
    assert ratio[True] > 1.3 * ratio[False]


def test_edge_suppression_lowers_spikes() -> None:
    """A lone spike in a smooth gradient enters the second moment damped; smooth places enter as they are."""
    smooth = torch.ones(SHAPE)
    smooth[10, 16] = 30.0
    on, off = (
        snapshot(*train(1, {"frequency_penalty": 0.0, "edge_suppression": x}, gradients=lambda t: smooth))["v"].view(
            SHAPE
        )
        for x in (True, False)
    )
    assert on[10, 16] < 0.99 * off[10, 16]
    assert torch.equal(on[2:5], off[2:5])


def test_frequency_penalty_lowers_the_checkerboard() -> None:
    """The highest frequency loses its share: inside, a checkerboard is multiplied by 1 - frequency_penalty."""
    board = (-1.0) ** torch.arange(SHAPE[0])[:, None] * (-1.0) ** torch.arange(SHAPE[1])
    options = {"edge_suppression": False, "frequency_penalty": 0.3}
    for gradient, gain in ((board, 0.7), (torch.ones(SHAPE), 1.0)):
        v = snapshot(*train(1, options, gradients=lambda t, g=gradient: g))["v"].view(SHAPE)
        torch.testing.assert_close(v[1:-1, 1:-1] / 0.01, torch.full_like(v, gain**2)[1:-1, 1:-1], rtol=1e-5, atol=0)


def test_mask_raises_steady_elements_and_lowers_wavering_ones() -> None:
    """k climbs by f a step where the sign stays and falls where it turns; the rates follow."""
    wavering = torch.zeros(SHAPE, dtype=torch.bool)
    wavering[::2] = True
    p, opt = train(
        9, {"spatial_awareness": False}, gradients=lambda t: torch.where(wavering, (-1.0) ** t, 1.0) * noise(0).abs()
    )
    k, rates = opt.state[p]["lr_mask"], opt.element_learning_rates(p)
    assert (k[wavering] == -8).all()
    assert (k[~wavering] == 8).all()
    torch.testing.assert_close(rates[~wavering].mean() / rates[wavering].mean(), torch.tensor(2.0))


@pytest.mark.parametrize(("detail", "speed"), [(0.1, 0.5), (100.0, 1.5)])
def test_mask_speed_is_bounded(detail: float, speed: float) -> None:
    """f stays between 0.5 and 1.5 whatever detail_preservation says."""
    p, opt = train(5, {"detail_preservation": detail}, gradients=lambda t: noise(0))
    torch.testing.assert_close(opt.state[p]["lr_mask"], torch.full(SHAPE, 4 * speed))


def test_clip_threshold_bounds_each_blocks_update() -> None:
    """The rms of u over a block, seen in m of the first step, is at most clip_threshold."""
    for threshold in (0.2, 0.7):
        m = snapshot(*train(1, {"clip_threshold": threshold}))["m"][:512].view(2, 256)
        torch.testing.assert_close(m.square().mean(1).sqrt(), torch.full((2,), 0.1 * threshold).double())


@pytest.mark.parametrize("storage", STORAGES)
def test_stochastic_rounding_moves_weights_by_less_than_their_spacing(storage: str) -> None:
    """bf16 weights of 1 (spacing 1/128) follow rates of 1e-4 in the mean; rounded to nearest none ever moves."""
    start = torch.ones(SHAPE)
    options = {**PLAIN, "lr": 1e-4, "cautious": False, "came": False, "torque": False}
    moved = {
        x: train(20, {**options, "stochastic_rounding": x}, storage, lambda t: start, torch.bfloat16, start)[0]
        for x in (True, False)
    }
    assert torch.equal(moved[False].float(), start)
    # 20 steps of 1e-4 are a quarter of a spacing; 640 weights that moved whole spacings average to within 10 % of it.
    assert (1 - moved[True].float()).mean().item() == pytest.approx(20e-4, rel=0.15)


# --- switched on in the middle of training ----------------------------------------------------------------------


LATE = {
    "came": False,
    "torque": False,
    "cautious": False,
    "edge_suppression": False,
    "frequency_penalty": 0.0,
    "background_regularization": False,
    "spatial_awareness": False,
    "warmup_steps": 40,
}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("option", LATE)
def test_part_switched_on_late_does_not_jolt(option: str, storage: str) -> None:
    """A part that starts at step 40 leaves the mean step within a factor of two of what it was."""
    default = getattr(AutomagicConfig(), option)
    p, opt = train(0, {option: LATE[option], "weight_decay": 0.0}, storage)
    sizes = []
    for t in range(1, 61):
        if t == 41:
            opt.param_groups[0][option] = default
        before = p.detach().clone()
        p.grad = noise(t)
        opt.step()
        sizes.append((p - before).abs().mean().item())
    usual = sum(sizes[30:40]) / 10
    assert 0.5 * usual < min(sizes[40:]), min(sizes[40:]) / usual
    assert max(sizes[40:]) < 2 * usual, max(sizes[40:]) / usual
