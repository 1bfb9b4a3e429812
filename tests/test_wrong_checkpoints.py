"""Checkpoints that do not fit are refused, and change nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
from checkpoint_cases import build, train

from automagic_bnb import Automagic8bit
from automagic_bnb import state as st

Edit = Callable[[dict[str, Any]], Any]


def put(key: str, value: Callable[[torch.Tensor], Any]) -> Edit:
    """Replace a tensor of the first parameter's state."""

    def edit(saved: dict[str, Any]) -> None:
        saved["state"][0][key] = value(saved["state"][0][key])

    return edit


def drop(key: str) -> Edit:
    return lambda saved: saved["state"][3].pop(key)


WRONG: dict[str, tuple[Edit, str]] = {
    "another shape": (put("state1", lambda x: x[:-1]), r"parameter 0: .*state1 has shape \(63, 64\).*needs \(64, 64\)"),
    "another shape, as many elements": (put("lr_mask", lambda x: x.view(32, 128)), "lr_mask has shape"),
    "another number of blocks": (put("absmax2", lambda x: x[:-1]), "absmax2 has shape"),
    "statistics of another version": (put("tensor_stats", lambda x: x[:2]), "tensor_stats has shape"),
    "moments in another dtype": (put("state1", lambda x: x.to(torch.bfloat16)), "state1 is torch.bfloat16"),
    "codes beside numbers": (put("state2", lambda x: x.float()), "state2 is torch.float32; expected torch.uint8"),
    "numbers beside codes": (put("state1", lambda x: x.float()), "expected torch.float32"),
    "scales in another dtype": (put("absmax1", lambda x: x.bfloat16()), "absmax1 is torch.bfloat16"),
    "scales missing": (drop("absmax3"), "state3 is in 8 bits but absmax3 is missing"),
    "no tensor": (put("torque", lambda x: x.tolist()), r"parameter 0: .*torque has shape none \(list\)"),
    "nothing": (put("torque", lambda x: None), "torque has shape none"),
    "no moments": (drop("state1"), "another optimizer"),
    "no second moment": (drop("state2"), "another optimizer"),
    **{
        f"a step of {step!r}": (
            lambda saved, step=step: saved["state"][3].update(step=step),
            f"3: .*step is {shown}; expec",
        )
        for step, shown in [
            (-5, "-5"),
            (math.nan, "nan"),
            (math.inf, "inf"),
            (2.5, "2.5"),
            (2**63, "9223372036854775808"),
            (10**400, "1000.*"),
            ("7", "7"),
            (None, "None"),
            (True, "True"),
            (torch.zeros(2), "tensor.*"),
        ]
    },
    **{
        f"{value} in {key}": (
            put(key, lambda x, value=value: torch.full_like(x, value)),
            f"parameter 0: the checkpoint's {key} holds values",
        )
        for key, value in [
            ("absmax1", math.nan),
            ("absmax1", 3e38),
            ("absmax2", math.inf),
            ("absmax3", -1.0),
            ("torque", math.nan),
            ("torque", 2.0),
            ("edge_history", math.inf),
            ("spatial_variance", -0.5),
            ("tensor_stats", math.nan),
            ("gnorm_vec", math.nan),
            ("probe_start", math.inf),
            ("probe_block", -1),
        ]
    },
    "a tensor without values": (
        put("torque", lambda x: x.to("meta")),
        "0: .*torque is on the meta device, without val",
    ),
    "codes without values": (put("state1", lambda x: x.to("meta")), "0: the checkpoint's state1 is on the meta device"),
    "a sparse tensor": (put("absmax2", lambda x: x.to_sparse()), "0: .*absmax2 is a tensor of torch.sparse_coo"),
    "a wrapper's without values": (
        lambda saved: saved["state"][3].update(slow=torch.empty(2, device="meta")),
        "parameter 3: the checkpoint's slow is on the meta device",
    ),
    "a rate without a value": (
        lambda saved: saved["param_groups"][0].update(auto_lr_rate=torch.empty((), device="meta")),
        "auto_lr_rate in the checkpoint's group 0 is on the meta device",
    ),
    "a state that is a list": (lambda saved: saved["state"].update({1: [1, 2]}), "parameter 1: .*state is a list"),
    "states that are a list": (lambda saved: saved.update(state=[]), "state is a list and its param_groups a list"),
    "groups that are a dict": (lambda saved: saved.update(param_groups={}), "param_groups a dict; expected"),
    "a group that is a list": (lambda saved: saved.update(param_groups=[[], []]), "group 0 is no dict"),
    "a parameter twice": (lambda saved: saved["param_groups"][1].update(params=[2, 2]), "are each there once"),
    "a state of nobody": (lambda saved: saved["state"].update({9: {"step": 1}}), "parameter 9, which is in none"),
    **{
        f"a group's {name} of {value}": (
            lambda saved, name=name, value=value: saved["param_groups"][0].update({name: value}),
            f"{name}=.*{value}.* in the checkpoint's group 0: must be",
        )
        for name, value in [
            ("lr", None),
            ("auto_lr", None),
            ("weight_decay", None),
            ("lr", math.nan),
            ("base_lr", None),
            ("base_lr", math.inf),
            ("initial_lr", "high"),
            ("auto_lr_sums", None),
            ("auto_lr_peak", -1.0),
        ]
    },
    **{
        f"{name}={value!r}": (
            lambda saved, name=name, value=value: saved["param_groups"][0].update({name: value}),
            f"{name} in the checkpoint's group 0 is .*; expected a whole number",
        )
        for name, value in [
            ("auto_lr_count", 1.5),
            ("auto_lr_watched", None),
            ("auto_lr_watched", "x"),
            ("auto_lr_joined", math.nan),
            ("auto_lr_joined", [1]),
            ("own_seed", -1),
        ]
    },
    "a parameter that joined in the future": (
        lambda saved: saved["param_groups"][0].update(auto_lr_joined=2**31),
        "auto_lr_joined=2147483648 in the checkpoint's group 0: must not exceed auto_lr_count=2,",
    ),
    "bounds the wrong way round": (
        lambda saved: saved["param_groups"][1].update(min_lr=5.0, max_lr=0.01),
        r"min_lr=5.0 in the checkpoint's group 1: must not exceed max_lr=0.01",
    ),
    "no groups": (lambda saved: saved.pop("param_groups"), "no optimizer's checkpoint: it holds .'state'."),
    "a shard of a parameter": (lambda saved: saved["state"][3].update(shard=1), "holds shard 1, here is None"),
    "a group too few": (lambda saved: saved["param_groups"].pop(), r"groups of \[2\] parameters, this optimizer of"),
    "a parameter too many": (lambda saved: saved["param_groups"][1]["params"].append(9), r"\[2, 3\] .* of \[2, 2\]"),
    "an illegal option": (lambda saved: saved["param_groups"][1].update(lr=-1), "lr=-1 in the checkpoint's group 1"),
    "a mistyped option": (lambda saved: saved["param_groups"][1].update(betas="x"), "betas='x' in the checkpoint's"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_checkpoint_that_does_not_fit_changes_nothing(case: str, tools: Any) -> None:
    """The message says what is wrong where; parameters, state and groups are the very bits of before."""
    edit, message = WRONG[case]
    opt = build(tools, lr=None, percentile_clipping=50)
    train(tools, opt, 3)
    saved = copy.deepcopy(opt.state_dict())
    train(tools, opt, 3, 5)
    edit(saved)
    before = tools.snapshot(opt)
    with pytest.raises((ValueError, TypeError), match=message):
        opt.load_state_dict(saved)
    assert not tools.differences(before, tools.snapshot(opt))
    train(tools, opt, 5, 7)


@pytest.mark.parametrize(
    "other",
    [
        lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
        lambda p: torch.optim.RMSprop(p, lr=1e-3),
        lambda p: torch.optim.Adagrad(p, lr=1e-3),
        lambda p: bitsandbytes.optim.Lion8bit(p, lr=1e-3),
        lambda p: bitsandbytes.optim.AdEMAMix8bit(p, lr=1e-3),
    ],
)
def test_another_optimizers_checkpoint_is_refused(other: Any, tools: Any) -> None:
    """The message lists what it holds and what would load."""
    p = tools.parameters((64, 64))
    theirs = other(p)
    tools.train(theirs, p, range(2))
    opt = Automagic8bit(tools.parameters((64, 64)), lr=1e-3)
    before = tools.snapshot(opt)
    with pytest.raises(ValueError, match=r"parameter 0: (this is a checkpoint of another optimizer|the checkpoint's)"):
        opt.load_state_dict(theirs.state_dict())
    assert not tools.differences(before, tools.snapshot(opt))


@pytest.mark.parametrize("key", ["state1", "state2", "state3", "lr_mask", "last_polarity"])
def test_numbers_that_are_nonsense_are_refused_in_32_bits(key: str, tools: Any) -> None:
    """Moments, masks and signs; the parameter and the key are named, and nothing has changed."""
    opt = build(tools, optim_bits=32)
    train(tools, opt, 3)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][1][key].view(-1)[5] = 200 if key == "last_polarity" else math.nan
    before = tools.snapshot(opt)
    with pytest.raises(ValueError, match=f"parameter 1: the checkpoint's {key} holds values"):
        opt.load_state_dict(saved)
    assert not tools.differences(before, tools.snapshot(opt))


@pytest.mark.parametrize("key", ["exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col"])
def test_means_that_are_nonsense_are_refused(key: str, tools: Any) -> None:
    opt = build(tools, factored=True)
    train(tools, opt, 3)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0][key].view(-1)[-1] = math.inf
    with pytest.raises(ValueError, match=f"parameter 0: the checkpoint's {key} holds values"):
        opt.load_state_dict(saved)


def test_sums_that_overflowed_are_no_nonsense(tools: Any) -> None:
    """A step of a search with weights that are too large leaves them, and the next makes no estimate of them."""
    opt = build(tools, lr=None)
    train(tools, opt, 3)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["tensor_stats"][st.LR_NUMERATOR] = math.inf
    opt.load_state_dict(saved)
    train(tools, opt, 3, 6)
    assert all(torch.isfinite(group["auto_lr_rate"]) for group in opt.param_groups)


def test_numbers_in_other_forms_are_those_numbers(tools: Any) -> None:
    """A rate that some tool has made a plain number or float64 of, counts that it has made tensors of."""
    runs = []
    for other_forms in (False, True):
        opt = build(tools, lr=None)
        train(tools, opt, 3)
        saved = copy.deepcopy(opt.state_dict())
        if other_forms:
            group = saved["param_groups"][0]
            group["auto_lr_rate"] = float(group["auto_lr_rate"])
            group["auto_lr_sums"] = group["auto_lr_sums"].double()
            group |= {name: torch.tensor(group[name]) for name in ("auto_lr_count", "auto_lr_joined", "own_seed")}
        opt = build(tools, lr=None)
        opt.load_state_dict(saved)
        train(tools, opt, 3, 6)
        runs.append(tools.snapshot(opt))
    assert not tools.differences(*runs)


FOREIGN_NONSENSE: dict[str, tuple[Edit, str]] = {
    "step": (lambda saved: saved["state"][0].update(step=math.nan), "parameter 0: the checkpoint's step is nan"),
    "infinite step": (lambda saved: saved["state"][0].update(step=math.inf), "step is inf"),
    "moment": (
        put("state1", lambda x: x.fill_(math.nan)),
        "parameter 0: the checkpoint's state1 holds values that are not",
    ),
    "no values": (put("state2", lambda x: x.to("meta")), "parameter 0: the checkpoint's state2 is on the meta device"),
    "sparse": (
        put("state2", lambda x: x.to_sparse()),
        "parameter 0: the checkpoint's state2 is a tensor of torch.spar",
    ),
    "betas": (lambda saved: saved["param_groups"][0].update(betas=(0.9, 1.0)), "betas=1.0; expected"),
    "betas in a tensor": (
        lambda saved: saved["param_groups"][0].update(betas=torch.ones(2)),
        "betas=tensor.*two numbers",
    ),
    "a step without a value": (
        lambda saved: saved["state"][0].update(step=torch.empty((), device="meta")),
        "parameter 0: the checkpoint's step is on the meta device",
    ),
    "squares beyond float32": (
        put("state1", lambda x: x.fill_(3e38)),
        "parameter 0: the checkpoint's state1, state2 are finite, but not their squares",
    ),
    "wrapped state": (
        lambda saved: saved["state"][0].update(__bnb_optimizer_quant_state__=5),
        "parameter 0: the checkpoint's __bnb_optimizer_quant_state__ is a int",
    ),
    "no betas": (lambda saved: saved["param_groups"][0].update(betas=3), "betas=3; expected two"),
    "state": (lambda saved: saved["state"].update({0: 5}), "parameter 0: the checkpoint's state is a int"),
}


@pytest.mark.parametrize("case", FOREIGN_NONSENSE)
def test_nonsense_in_another_optimizers_file_changes_nothing(case: str, tools: Any) -> None:
    edit, message = FOREIGN_NONSENSE[case]
    p = tools.parameters((64, 64))
    theirs = bitsandbytes.optim.AdamW(p, lr=1e-3)
    saved = theirs.state_dict()
    saved["state"] = {0: {"step": 3, "state1": torch.zeros(64, 64), "state2": torch.ones(64, 64)}}
    opt = Automagic8bit(tools.parameters((64, 64)), lr=1e-3)
    opt.load_state_dict(copy.deepcopy(saved))  # as it is, it loads
    edit(saved)
    before = tools.snapshot(opt)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved)
    assert not tools.differences(before, tools.snapshot(opt))
