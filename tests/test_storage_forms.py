"""Storage below 8 bits and between 8 and 32: packed masks, no mask, 16-bit means, and what is kept of small tensors.

Each form beside the plain reference, its rounding beside float64, its bytes counted from the tensors, and the way from
one to another.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_cases import parameters_of, through_file, train
from hypothesis import given, settings
from hypothesis import strategies as some
from kernel_cases import FORMS
from rule_in_float64 import RuleInFloat64
from torch import Tensor, nn

from automagic_bnb import Automagic8bit, stored
from automagic_bnb import quantization as q
from automagic_bnb import state as st

HELD = {
    "small": {"small"},
    "small_factored": {"small", "small_factored"},
    "small, packed": {"small", "small_factored"},
    "mask in four bits": {"8bit"},
    "packed": {"8bit", "factored"},
    "lean": {"8bit", "factored"},
}
"""Of the shapes that the kernels are compared on."""
NEW = tuple(HELD)
SHAPES = ((64, 64), (257,), (4, 300), (300, 4), (), (0, 8))


def build(tools: Any, form: str, **options: Any) -> Automagic8bit:
    return Automagic8bit(tools.parameters(*SHAPES), **{"lr": 1e-3, "min_8bit_size": 0, **FORMS[form], **options})


def trained(tools: Any, form: str, steps: int = 4, **options: Any) -> Automagic8bit:
    opt = build(tools, form, **options)
    tools.train(opt, parameters_of(opt), range(steps))
    return opt


def exponents(opt: Any, p: Tensor) -> Tensor:
    """k of every element."""
    blocks = stored.Blocks(p)
    return blocks.join(stored.read_mask(opt.state[p], blocks)[0])


# --- what is held -----------------------------------------------------------------------------------------------------


def test_what_a_form_holds(tools: Any) -> None:
    """Dtypes of the first matrix's tensors, and no tensor that the form does without."""
    held = {}
    for form in NEW:
        opt = trained(tools, form, 2)
        state = opt.state[parameters_of(opt)[0]]
        names = ("state1", "lr_mask", "lr_mask4", "state2", "exp_avg_sq_row", "exp_avg_res_row", "spatial_variance")
        held[form] = {name: str(state[name].dtype)[6:] for name in names if name in state}
    sigma, means = {"spatial_variance": "float32"}, {"exp_avg_sq_row": "float32", "exp_avg_res_row": "float32"}
    short = dict.fromkeys(means, "bfloat16")
    assert held == {
        "small": {"state1": "float32", "lr_mask": "uint8", "state2": "float32", **sigma},
        "small_factored": {"state1": "float16", "lr_mask": "uint8", **means, **sigma},
        "small, packed": {"state1": "float16", "lr_mask4": "uint8", **short, **sigma},
        "mask in four bits": {"state1": "uint8", "lr_mask4": "uint8", "state2": "uint8", **sigma},
        "packed": {"state1": "uint8", "lr_mask4": "uint8", **short, **sigma},
        "lean": {"state1": "uint8", "exp_avg_sq_row": "float32"},
    }


RANK_4, VECTORS = ((4, 768), (768, 4)), ((768,), (3072,), (320,))
FULL, RANK_16 = ((2048, 2048), (8192, 2048), (2048,)), ((3072, 16), (16, 3072))
PACKED = {"factored": True, "mask_bits": 4, "mean_bits": 16}


@pytest.mark.parametrize(
    ("shapes", "options", "most"),
    [
        (RANK_4, {"factored": True}, 5.0),
        (RANK_4, {"force_8bit": True, **PACKED}, 2.5),
        (VECTORS, {}, 14.0),
        (FULL, {"factored": True, "mask_bits": 4}, 1.75),
        (RANK_16, PACKED, 2.03),
        (FULL, {"profile": "lean"}, 1.15),
        (RANK_16, {"profile": "lean"}, 1.5),
    ],
)
def test_bytes_a_parameter(shapes: tuple[tuple[int, ...], ...], options: dict[str, Any], most: float) -> None:
    """By the report, which counts tensors; without the option that saves most of it there are more."""
    p = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    found = Automagic8bit(p, lr=1e-3, **options).get_memory_efficiency_report()
    books = found["states_breakdown"].get("code_books", 0) / found["total_parameters"]
    assert found["bytes_per_parameter"] - books <= most
    wide: dict[str, Any] = {"factored": False} if options == {"factored": True} else {"mask_bits": 8, "mean_bits": 32}
    plain = Automagic8bit(p, lr=1e-3, **(wide if options else {"optim_bits": 32}))
    assert plain.get_memory_efficiency_report()["bytes_per_parameter"] - books > most


@settings(deadline=None)
@given(seed=some.integers(0, 2**31), blocks=some.integers(1, 3))
def test_pairs_come_back(seed: int, blocks: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    k = torch.randint(0, 8, (blocks, 256), generator=rng).float() * q.PAIR_SPACING + q.LEAST_EXPONENT
    polarity = torch.randint(0, 2, (blocks, 256), generator=rng, dtype=torch.uint8)
    packed = q.pack_pairs(k, polarity)
    assert packed.shape == (blocks, 128)
    back = q.unpack_pairs(packed)
    assert torch.equal(back[0], k)
    assert torch.equal(back[1], polarity)


def test_an_empty_pair_is_the_mean_rate() -> None:
    k, polarity = q.unpack_pairs(torch.tensor([q.EMPTY_PAIR], dtype=torch.uint8))
    assert k.tolist() == [0, 0]
    assert polarity.tolist() == [0, 0]


# --- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", NEW)
def test_kernels_follow_the_reference(form: str) -> None:
    """Odd sizes, tiles narrower than a block, elements without a gradient, elements that are skipped."""
    pytest.importorskip("automagic_bnb.kernels.step", reason="the kernels need Triton")
    from kernel_cases import follow, gradient, optimizer, parameters

    shapes = ((7, 9), (4, 96), (96, 4), (40, 16), (9, 256))

    def spoiled(shape: tuple[int, ...], index: int, step: int) -> Tensor:
        g = gradient(shape, index, step)
        g.view(-1)[::7] = 0.0
        if step == 2:
            g.view(-1)[3::11] = float("nan")
        return g

    with np.errstate(all="ignore"):
        run = follow(lambda backend: optimizer(parameters(shapes, torch.bfloat16), backend, form), 3, spoiled)
    assert run.violations("8bit") == []
    assert {st.storage_held(state) for state in run.kernel.state.values()} == HELD[form]


@pytest.mark.parametrize(
    ("form", "options"), [("lean", {"lr": 9e-3, "auto_lr": True}), ("packed", {"warmup_steps": 2})]
)
def test_kernels_follow_where_a_rate_is_found_and_a_mask_freezes(form: str, options: dict[str, Any]) -> None:
    """Without a mask there are no sums of it, but those of the found rate; after warm-up four bits are only read."""
    pytest.importorskip("automagic_bnb.kernels.step", reason="the kernels need Triton")
    from kernel_cases import follow, optimizer, parameters, steady

    def build(backend: str) -> Any:
        return optimizer(parameters(((40, 16), (257,)), torch.float32), backend, form, **options)

    with np.errstate(all="ignore"):
        run = follow(build, 4, steady)
    assert run.violations("8bit") == []
    stats = [state["tensor_stats"] for state in run.kernel.state.values()]
    assert all((x[st.LR_DENOMINATOR] > 0) == (form == "lean") for x in stats)
    assert all((x[st.MASK_MEAN] == 1) == (form == "lean") for x in stats)


@pytest.mark.parametrize("name", ["lr_mask4", "states in 16 bits"])
def test_other_random_bits_are_told_apart(name: str) -> None:
    """Negative control: mask and means do round by the bits that the reference takes."""
    pytest.importorskip("automagic_bnb.kernels.step", reason="the kernels need Triton")
    from kernel_cases import ONE_STEP, follow, optimizer, parameters

    def build(backend: str) -> Any:
        seed = 7 if backend == "torch" else 8
        return optimizer(parameters(((40, 16), (9, 256)), torch.bfloat16), backend, "packed", seed=seed)

    found = follow(build, 2).one_step.violations(ONE_STEP)
    assert any(x.startswith(f"{name}: ") for x in found), found


def after_steps(shape: tuple[int, int], steps: int, **options: Any) -> tuple[Any, Tensor, RuleInFloat64]:
    """One parameter, stepped by the package and in float64 by the same gradients."""
    rng = np.random.default_rng(3)
    start = (0.1 * rng.standard_normal(shape)).astype(np.float32)
    p = nn.Parameter(torch.from_numpy(start.copy()))
    opt = Automagic8bit([p], lr=1e-2, min_8bit_size=0, backend="torch", **options)
    oracle = RuleInFloat64(start, factored=options.get("factored", False))
    for _ in range(steps):
        g = (rng.standard_normal(shape) + 0.3).astype(np.float32)
        p.grad = torch.from_numpy(g)
        opt.step()
        oracle.step(g)
    return opt, p, oracle


def test_the_mask_in_four_bits_is_unbiased() -> None:
    """After the first move k is on average what it is in float64, where it rose and where it fell; the nearest of its
    eight values would still be 0."""
    opt, p, oracle = after_steps((256, 256), 2, mask_bits=4)
    k = exponents(opt, p).double().numpy()
    assert set(np.unique(k)) == {-8.0, 0.0, 8.0}
    for moved in (oracle.k > 0, oracle.k < 0):
        error = (k - oracle.k)[moved]
        # k is 0 or ±8, the latter with probability f / 8.
        sigma = np.sqrt((np.abs(oracle.k) * (8 - np.abs(oracle.k)))[moved].mean() / moved.sum())
        assert np.abs(error.mean()) < 4 * sigma < 0.1
        assert np.abs(oracle.k[moved].mean()) > 0.3


def test_means_in_16_bits_are_unbiased() -> None:
    """Row and column means after a step lie beside those in float64, on average on them."""
    opt, p, oracle = after_steps((512, 256), 1, factored=True, mean_bits=16)
    for name, exact in (("exp_avg_sq_row", oracle.v.row), ("exp_avg_sq_col", oracle.v.col)):
        held = opt.state[p][name]
        assert held.dtype == torch.bfloat16
        error = held.double().numpy().reshape(-1) / exact - 1
        assert np.abs(error).max() < 2.0**-7
        assert np.abs(error).max() > 2.0**-10  # control: they are rounded
        assert np.abs(error.mean()) < 4 * error.std() / np.sqrt(error.size)


@pytest.mark.parametrize("stochastic", [True, False])
def test_means_in_16_bits_follow_where_nearest_ones_freeze(stochastic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient falls to a tenth: within 3 / (1 - β2) steps v falls by 95 %, unless each step is rounded away."""
    if not stochastic:
        original = q.round_to
        monkeypatch.setattr(
            q, "round_to", lambda x, dtype, uniform: original(x, dtype, None if dtype == torch.bfloat16 else uniform)
        )
    p = nn.Parameter(torch.zeros(16, 256))
    opt = Automagic8bit(
        [p],
        lr=1e-4,
        min_8bit_size=0,
        factored=True,
        mean_bits=16,
        betas=(0.9, 0.999, 0.999),
        came=False,
        backend="torch",
    )
    p.grad = torch.ones_like(p)
    opt.step()
    state = opt.state[p]
    state["exp_avg_sq_row"].fill_(1.0)
    state["exp_avg_sq_col"].fill_(1.0)
    p.grad = torch.full_like(p, 0.9)  # v falls from 1 to 0.81, by 1.9e-4 in a step: a twentieth of bfloat16's spacing
    for _ in range(1000):
        opt.step()
    expected = 0.81 + 0.19 * 0.999**1000
    found = state["exp_avg_sq_row"].float().mean().item()
    assert (found == 1.0) is not stochastic
    if stochastic:
        assert found == pytest.approx(expected, abs=0.02)


def test_without_a_mask_every_rate_is_the_same() -> None:
    """lean beside float64, the moments in float32, so that only the rule is compared."""
    rng = np.random.default_rng(1)
    start = (0.1 * rng.standard_normal((64, 64))).astype(np.float32)
    p = nn.Parameter(torch.from_numpy(start.copy()))
    opt = Automagic8bit([p], lr=1e-2, min_8bit_size=0, mean_bits=32, profile="lean", backend="torch")
    state = st.complete({}, p, "factored", opt.param_groups[0])
    state["state1"] = torch.zeros(64, 64)
    opt.state[p] = {k: v for k, v in state.items() if not k.startswith(("absmax", "qmap"))}
    with_mask, without = (RuleInFloat64(start, factored=True, mask=mask, came=False) for mask in (True, False))
    for _ in range(6):
        g = (rng.standard_normal((64, 64)) + 0.5).astype(np.float32)
        p.grad = torch.from_numpy(g)
        opt.step()
        with_mask.step(g)
        without.step(g)
    moved = np.abs(without.theta - start.reshape(-1)).max()
    found = p.detach().double().numpy().reshape(-1)
    assert np.abs(found - without.theta).max() < 1e-5 * moved
    assert np.abs(found - with_mask.theta).max() > 1e-2 * moved  # control
    assert opt.state[p]["tensor_stats"][st.MASK_MEAN] == 1
    assert torch.equal(opt.element_learning_rates(p), torch.full((64, 64), 1e-2))


def test_a_found_rate_needs_no_mask(tools: Any) -> None:
    opt = build(tools, "lean", lr=None)
    first = parameters_of(opt)[0]
    for _ in range(30):  # a direction that stays the same
        first.grad = torch.ones_like(first)
        opt.step()
    assert float(opt.param_groups[0]["auto_lr_rate"]) > 1.1e-4


# --- from one form to another -----------------------------------------------------------------------------------------


def test_to_four_bits_k_takes_the_nearest_and_w_follows(tools: Any) -> None:
    opt = trained(tools, "8bit", 8)
    p = parameters_of(opt)[0]
    opt.state[p]["lr_mask"].view(-1)[:64] = torch.arange(64, dtype=torch.uint8) * 2 + 1  # every k there is
    opt.state[p]["lr_mask"].view(-1)[64:128] = torch.arange(64, dtype=torch.uint8) * 2 + 128  # and without a sign
    before = exponents(opt, p)
    polarity = opt.state[p]["lr_mask"].view(-1) & 1  # in four bits none is negative
    moments = {name: opt.state[p][name] for name in ("state1", "state2", "absmax3")}
    opt.requantize(mask_bits=4)
    state, after = opt.state[p], exponents(opt, p)
    assert "lr_mask" not in state
    assert (after - before).abs()[before <= 24].max() == 4
    assert (after[before > 24] == 24).all()
    assert torch.equal(after[64:128], after[:64])
    assert torch.equal(stored.read_mask(state, stored.Blocks(p))[1].view(-1), polarity)
    assert state["tensor_stats"][st.MASK_MEAN] == torch.exp2(after / 16).double().mean().float()
    assert all(state[name] is held for name, held in moments.items())


@pytest.mark.parametrize("form", ["8bit", "32bit"])
def test_from_four_bits_nothing_is_lost(form: str, tools: Any) -> None:
    opt = trained(tools, "mask in four bits", 8)
    p = parameters_of(opt)[0]
    before, packed, mean = exponents(opt, p), opt.state[p]["lr_mask4"], opt.state[p]["tensor_stats"].clone()
    opt.requantize(mask_bits=8, **({"optim_bits": 32} if form == "32bit" else {}))
    assert torch.equal(exponents(opt, p), before)
    assert torch.equal(opt.state[p]["tensor_stats"], mean)
    opt.requantize(mask_bits=4, optim_bits=8)
    assert torch.equal(opt.state[p]["lr_mask4"], packed)


def test_without_and_again_with_a_mask(tools: Any) -> None:
    """What is given up starts anew: every rate the mean, W = 1."""
    opt = trained(tools, "factored", 8)
    p = parameters_of(opt)[0]
    assert opt.state[p]["tensor_stats"][st.MASK_MEAN] != 1
    opt.requantize(mask_bits=0)
    assert not {"lr_mask", "spatial_variance"} & opt.state[p].keys()
    assert opt.state[p]["tensor_stats"][st.MASK_MEAN] == 1
    tools.train(opt, parameters_of(opt), range(8, 10))
    opt.requantize(mask_bits=8)
    assert (opt.state[p]["lr_mask"] == q.EMPTY_MASK).all()
    assert (opt.state[p]["spatial_variance"] == 1).all()
    tools.train(opt, parameters_of(opt), range(10, 12))
    assert (exponents(opt, p) != 0).any()


def test_means_between_16_and_32_bits(tools: Any) -> None:
    opt = trained(tools, "factored")
    p = parameters_of(opt)[0]
    exact, m = opt.state[p]["exp_avg_sq_col"], opt.state[p]["state1"]
    opt.requantize(mean_bits=16)
    short = opt.state[p]["exp_avg_sq_col"]
    assert torch.equal(short, exact.bfloat16())
    opt.requantize(mean_bits=32)
    assert torch.equal(opt.state[p]["exp_avg_sq_col"], short.float())
    assert opt.state[p]["state1"] is m


@pytest.mark.parametrize("source", FORMS)
@pytest.mark.parametrize("target", FORMS)
def test_every_form_becomes_every_other(source: str, target: str, tools: Any) -> None:
    """The state then holds what a new one would, in shape and dtype, and steps."""
    opt, other = trained(tools, source), trained(tools, target, came=True)
    opt.requantize(**{"optim_bits": 8, "min_8bit_size": 0, "factored": False, "mask_bits": 8, "mean_bits": 32} | {
        k: v for k, v in FORMS[target].items() if k != "came"
    })  # fmt: skip
    tools.train(opt, parameters_of(opt), range(4, 6))
    confidence = ("state3", "absmax3", "exp_avg_res_row", "exp_avg_res_col")
    for x, y in zip(parameters_of(opt), parameters_of(other), strict=True):
        assert torch.isfinite(x).all()
        held, wanted = (
            {k: (v.dtype, v.shape) for k, v in o.state[z].items() if isinstance(v, Tensor) and k not in confidence}
            for o, z in ((opt, x), (other, y))
        )
        assert held == wanted


@pytest.mark.parametrize("form", NEW)
def test_a_resumed_run_is_the_uninterrupted_one(form: str, tools: Any) -> None:
    opt = trained(tools, form)
    again = build(tools, form)
    again.load_state_dict(through_file(opt.state_dict()))
    for x, y in zip(parameters_of(opt), parameters_of(again), strict=True):
        y.data.copy_(x.data)
    for o in (opt, again):
        train(tools, o, 4, 7)
    assert not tools.differences(tools.snapshot(opt), tools.snapshot(again))


@pytest.mark.parametrize("form", NEW)
def test_a_checkpoint_in_another_form_keeps_it_until_asked(form: str, tools: Any) -> None:
    """As with 8 and 32 bits; an older checkpoint, small tensors in 32 bits, is one."""
    opt = trained(tools, "32bit" if form.startswith("small") else "8bit")
    p = parameters_of(opt)
    again = build(tools, form)
    saved = copy.deepcopy(opt.state_dict())
    for group in saved["param_groups"]:
        for name in ("mask_bits", "mean_bits", *FORMS[form], "optim_bits"):
            group.pop(name, None)
    again.load_state_dict(saved)
    new = parameters_of(again)
    assert [again.state[x].keys() for x in new] == [opt.state[x].keys() for x in p]
    train(tools, again, 4, 5)
    again.requantize()
    train(tools, again, 5, 6)
    held, wanted = (
        [{k: v.dtype for k, v in o.state[x].items() if isinstance(v, Tensor)} for x in parameters_of(o)]
        for o in (again, trained(tools, form, came=True))
    )
    assert held == wanted


def test_a_packed_mask_of_another_length_is_refused(tools: Any) -> None:
    opt = trained(tools, "packed")
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["lr_mask4"] = saved["state"][0]["lr_mask4"][:-1]
    with pytest.raises(ValueError, match=r"lr_mask4 has shape \(2047,\)"):
        build(tools, "packed").load_state_dict(saved)
