"""Checkpoints of other optimizers: the forms they come in, and those that do not fit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpoint_cases import STORAGES, parameters_of, through_file
from migration_cases import ADAMS, WRAPPED, Edit, build, checkpoint

from automagic_bnb import Automagic32bit

# ------------------------------------------------------------------------------------------------------ forms of a file


@pytest.mark.parametrize("kind", [*ADAMS, "ai-toolkit", "cameamp"])
def test_loaded_with_weights_only(kind: str, tools: Any) -> None:
    """Through a file that holds tensors and plain numbers only, the same comes out."""
    saved = checkpoint(tools, kind)
    direct, through = build(tools), build(tools)
    direct.load_state_dict(saved)
    through.load_state_dict(through_file(saved))
    assert not tools.differences(tools.snapshot(direct), tools.snapshot(through))


def test_codes_with_their_quant_state_need_a_full_load(tools: Any) -> None:
    """CameAMP's 8-bit form holds bitsandbytes' QuantState, which weights_only refuses."""
    saved = checkpoint(tools, "cameamp8")
    with pytest.raises(Exception, match="QuantState"):
        through_file(saved)
    direct, through = build(tools), build(tools)
    direct.load_state_dict(saved)
    through.load_state_dict(through_file(saved, weights_only=False))
    assert not tools.differences(tools.snapshot(direct), tools.snapshot(through))


class Auto8bitTensor:
    """The object in which ai-toolkit keeps its rates, and which its first versions saved."""

    def __init__(self, saved: dict[str, Any]) -> None:
        self.quantized, self.scale = saved["quantized"], saved["scale"]


@pytest.mark.parametrize("form", ["object", "scale as a tensor", "float", "bfloat16 signs"])
def test_other_forms_of_ai_toolkits_state(form: str, tools: Any) -> None:
    """Rates as the object itself or as plain numbers; signs in the dtype that torch's own loading gave them."""
    saved = checkpoint(tools, "ai-toolkit")
    other = copy.deepcopy(saved)
    for state in other["state"].values():
        mask = state["lr_mask"]
        if form == "object":
            state["lr_mask"] = Auto8bitTensor(mask)
        elif form == "scale as a tensor":
            mask["scale"] = torch.tensor(mask["scale"], dtype=torch.float64)
        elif form == "float":
            state["lr_mask"] = mask["quantized"].float() * mask["scale"]
        else:
            state["last_polarity"] = state["last_polarity"].bfloat16()
    first, second = build(tools), build(tools)
    first.load_state_dict(saved)
    second.load_state_dict(other)
    assert not tools.differences(tools.snapshot(first), tools.snapshot(second))


def test_moments_quantized_in_an_unknown_way_start_anew(tools: Any) -> None:
    """A variant keeps uint8 moments without their scale: that is said, and the rates are carried over all the same."""
    saved = checkpoint(tools, "cameamp")
    for state in saved["state"].values():
        state["exp_avg_sq"] = state["exp_avg_sq"].to(torch.uint8)
    opt = build(tools, optim_bits=32)
    with pytest.warns(UserWarning, match=r"exp_avg_sq is quantized \(torch.uint8\) in a form of its own"):
        opt.load_state_dict(saved)
    p = parameters_of(opt)[0]
    assert not opt.state[p]["state2"].any()
    assert opt.state[p]["lr_mask"].any()


# ---------------------------------------------------------------------------------------------------- wrong checkpoints


def inner(edit: Edit) -> Edit:
    return lambda state: edit(state[WRAPPED])


def put(**values: Any) -> Edit:
    return lambda state: state.update({k: v(state[k]) if callable(v) else v for k, v in values.items()})


def first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """The first element replaced."""

    def edit(x: torch.Tensor) -> torch.Tensor:
        x.view(-1)[0] = value
        return x

    return edit


WRONG: dict[str, tuple[str, Edit, str]] = {
    "another shape": (
        "adamw",
        inner(put(state1=lambda x: x[:-1])),
        r"parameter 0: the checkpoint's state1 has shape \(63, 64\), a parameter of shape \(64, 64\) needs \(64, 64\)",
    ),
    "not finite": (
        "adamw",
        inner(put(state2=first(float("nan")))),
        "parameter 0: the checkpoint's state2 .* not finite",
    ),
    "another dtype": ("adamw", inner(put(state1=lambda x: x.int())), "state1 is torch.int32"),
    "scales missing": ("adamw8", inner(lambda s: s.pop("absmax1")), "absmax1 has shape none"),
    "scales too few": ("adamw8", inner(put(absmax2=lambda x: x[:-1])), r"absmax2 has shape \(15,\).*needs \(16,\)"),
    "code book cut": ("adamw8", inner(put(qmap1=lambda x: x[:16])), r"qmap1 has shape \(16,\)"),
    "rates of another shape": (
        "ai-toolkit",
        lambda s: s["lr_mask"].update(quantized=s["lr_mask"]["quantized"].view(32, 128)),
        r"lr_mask has shape \(32, 128\)",
    ),
    "rates without a scale": ("ai-toolkit", lambda s: s["lr_mask"].pop("scale"), "lr_mask is a dict without"),
    "rates in a list": ("ai-toolkit", put(lr_mask=[1e-6]), "lr_mask is a list without"),
    "rates not finite": ("ai-toolkit", lambda s: s["lr_mask"].update(scale=float("inf")), "lr_mask .* not finite"),
    "rates negative": ("ai-toolkit", lambda s: s["lr_mask"].update(scale=-1.0), "holds negative rates"),
    "row means of another shape": ("ai-toolkit", put(exp_avg_sq_row=lambda x: x[:-1]), "exp_avg_sq_row has shape"),
    "column means missing": ("ai-toolkit", lambda s: s.pop("exp_avg_sq_col"), "exp_avg_sq_col has shape none"),
    "signs of another shape": ("ai-toolkit", put(last_polarity=lambda x: x[0]), "last_polarity has shape"),
    "second moment not finite": ("cameamp", put(exp_avg_sq=first(float("inf"))), "exp_avg_sq .* not finite"),
    "codes without their state": ("cameamp8", lambda s: s.pop("lr_mask_q_scale"), "lr_mask_q_scale is no QuantState"),
    "codes of another shape": ("cameamp8", put(exp_avg_q=lambda x: x[1:]), "exp_avg_q has shape"),
    "codes with too few scales": (
        "cameamp8",
        lambda s: setattr(s["exp_avg_q_scale"], "absmax", torch.ones(1)),
        r"exp_avg_q_scale.absmax has shape \(1,\)",
    ),
}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("case", WRONG)
def test_a_checkpoint_that_does_not_fit_changes_nothing(case: str, storage: str, tools: Any) -> None:
    """The message says what is wrong where; parameters, state and groups are the very bits of before."""
    kind, edit, message = WRONG[case]
    opt = build(tools, **STORAGES[storage])
    tools.train(opt, parameters_of(opt), range(3))
    saved = checkpoint(tools, kind, steps=3)
    edit(saved["state"][0])
    before = tools.snapshot(opt)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved)
    assert not tools.differences(before, tools.snapshot(opt))
    tools.train(opt, parameters_of(opt), range(3, 5))
    assert tools.differences(before, tools.snapshot(opt))  # the comparison can fail


def test_groups_that_do_not_fit(tools: Any) -> None:
    opt = build(tools)
    saved = checkpoint(tools, "ai-toolkit", steps=2)
    saved["param_groups"].pop()
    with pytest.raises(ValueError, match=r"groups of \[2\] parameters, this optimizer of \[2, 2\]"):
        opt.load_state_dict(saved)


def test_a_checkpoint_of_ones_own_is_none_of_theirs(tools: Any) -> None:
    """Also in 32 bits, where the keys are those of bitsandbytes: all of it comes back."""
    p = tools.parameters((64, 64))
    opt = Automagic32bit(p, lr=1e-3)
    tools.train(opt, p, range(3))
    again = Automagic32bit(tools.parameters((64, 64)), lr=1e-3)
    again.load_state_dict(through_file(opt.state_dict()))
    assert not tools.differences(tools.snapshot(opt)["state"], tools.snapshot(again)["state"])
