"""LoRA's matrices keep no rates of single weights unless `lora_mask` says so; with `mask_bits=0` nothing does."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE
from optimizer_cases import manager
from torch import Tensor, nn

from automagic_bnb.optimizer import Automagic, Automagic8bit

SHAPES = {"0.lora_A": (16, 256), "0.lora_B": (300, 16), "head.weight": (24, 256), "1.lora_up.bias": (300,)}
LORA = tuple(name for name in SHAPES if "lora" in name)
MASK = {"lr_mask", "lr_mask4", "last_polarity", "spatial_variance"}
ROUNDING, OTHER_CODES = 1e-6, 0.02
"""Between backends, of weights that moved by 0.05: float32 sums in another order; and the share of weights whose codes
that rounds otherwise, which then move otherwise."""


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def named(device: torch.device = DEVICE) -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(0.1 * normal(shape, i).to(device))) for i, (name, shape) in enumerate(SHAPES.items())]


def build(pairs: list[tuple[str, nn.Parameter]], cls: type[Automagic] = Automagic8bit, **options: Any) -> Automagic:
    return cls(pairs, **{"lr": 1e-2, "min_8bit_size": 0, "seed": 0, "backend": "torch", **options})


def train(opt: Automagic, pairs: list[tuple[str, nn.Parameter]], steps: range = range(6)) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the interpreter's numpy, in masked lanes
        for step in steps:
            for i, (_, p) in enumerate(pairs):
                p.grad = (0.01 * normal(tuple(p.shape), 100 * step + i) + 0.003).to(p.device)
            opt.step()


def spread(opt: Automagic, p: Tensor) -> float:
    """Of the rates of single weights, over their mean."""
    rates = opt.element_learning_rates(p)
    return float(rates.std() / rates.mean())


@pytest.mark.parametrize("options", [{}, {"factored": False}, {"mask_bits": 8}, {"min_8bit_size": 10**6}], ids=str)
def test_matrices_of_lora_keep_none_and_others_do(options: dict[str, Any]) -> None:
    pairs = named()
    opt = build(pairs, **options)
    train(opt, pairs)
    held = {name: MASK & opt.state[p].keys() for name, p in pairs}
    assert not any(held[name] for name in LORA)
    assert held["head.weight"]
    assert spread(opt, dict(pairs)["head.weight"]) > 0.05


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("lora_mask", [False, True])
def test_one_rate_for_all_weights_of_a_matrix(bits: int, lora_mask: bool) -> None:
    """The negative control is lora_mask=True."""
    pairs = named()
    opt = build(pairs, Automagic, optim_bits=bits, lora_mask=lora_mask)
    train(opt, pairs)
    assert all((spread(opt, p) > 0.05) == (lora_mask or name not in LORA) for name, p in pairs)


def test_without_mask_bits_no_rate_is_a_weights_own_in_32_bits_neither() -> None:
    pairs = named()
    opt = build(pairs, Automagic, optim_bits=32, mask_bits=0)
    train(opt, pairs)
    assert all(spread(opt, p) < 1e-6 for _, p in pairs)


@pytest.mark.parametrize("options", [{}, {"lr": None}, {"lora_mask": True}, {"optim_bits": 32}], ids=str)
@pytest.mark.parametrize("backend", ["triton", "numba"])
def test_every_backend_tells_them_apart_in_one_group(backend: str, options: dict[str, Any]) -> None:
    device = torch.device("cpu") if backend == "numba" else DEVICE
    ends = {}
    for how, changed in (("torch", {}), (backend, {}), ("changed", {"lora_mask": not options.get("lora_mask")})):
        pairs = named(device)
        on = backend if how == "changed" else how
        opt = build(pairs, Automagic, **{"optim_bits": 8, **options, **changed}, backend=on)
        train(opt, pairs)
        ends[how] = {name: p.detach() for name, p in pairs}
    for name, x in ends["torch"].items():
        apart = {how: ((x - ends[how][name]).abs() > ROUNDING).float().mean() for how in (backend, "changed")}
        assert apart[backend] <= OTHER_CODES
        assert (apart["changed"] > 0.5) == (name in LORA), "the negative control"


def test_an_override_of_one_matrix() -> None:
    pairs = named()
    manager().override_config(pairs[0][1], "lora_mask", True)
    opt = build(pairs)
    train(opt, pairs)
    assert [bool(MASK & opt.state[p].keys()) for _, p in pairs] == [True, False, True, False]


@pytest.mark.parametrize("lora_mask", [False, True])
def test_a_checkpoint_from_before_goes_on_with_the_rates_it_has(lora_mask: bool) -> None:
    """They stay as they are, or adapt further with lora_mask=True; a conversion in 8 bits drops them."""
    pairs = named()
    opt = build(pairs, lora_mask=True)
    train(opt, pairs)
    saved = copy.deepcopy(opt.state_dict())
    for group in saved["param_groups"]:
        del group["lora_mask"]  # there was no such option
    resumed = build(pairs, lora_mask=lora_mask)
    resumed.load_state_dict(saved)
    p = pairs[0][1]
    before = resumed.element_learning_rates(p) / resumed.element_learning_rates(p).mean()
    mask = resumed.state[p]["lr_mask4"].clone()
    train(resumed, pairs, range(6, 9))
    after = resumed.element_learning_rates(p) / resumed.element_learning_rates(p).mean()
    assert torch.equal(resumed.state[p]["lr_mask4"], mask) != lora_mask
    assert torch.allclose(before, after) != lora_mask
    assert spread(resumed, p) > 0.05
    resumed.requantize()
    assert bool(MASK & resumed.state[p].keys()) == lora_mask


def test_a_pickle_from_before_the_option_goes_on() -> None:
    pairs = named()
    opt = build(pairs)
    train(opt, pairs)
    for group in opt.param_groups:
        del group["lora_mask"]
    older = copy.deepcopy(opt)
    copies = [(name, p) for (name, _), p in zip(pairs, older.param_groups[0]["params"], strict=True)]
    train(older, copies, range(6, 8))
    assert older.param_groups[0]["lora_mask"] is False


@pytest.mark.kernels
def test_options_that_change_count_for_others_of_the_group() -> None:
    """In kernels, too, where parameters that share their options are asked together."""
    spreads = []
    for backend in ("torch", "triton"):
        pairs = named()
        opt = build(pairs, Automagic, optim_bits=32, mask_bits=0, backend=backend)
        train(opt, pairs, range(3))
        opt.param_groups[0]["mask_bits"] = 4
        train(opt, pairs, range(3, 8))
        spreads.append([round(spread(opt, p), 3) for _, p in pairs])
    assert spreads[0] == spreads[1]
    assert [x > 0.02 for x in spreads[0]] == [name not in LORA for name in SHAPES]
