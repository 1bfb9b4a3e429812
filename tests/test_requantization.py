"""Changing the storage mid-run: whom it concerns, what is refused, and that training goes on undisturbed."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from typing import Any

import kernel_cases
import pytest
import torch
from checkpoint_cases import parameters_of
from requantization_cases import OPTIONS, SHAPES, build, storages, trained

from automagic_bnb import Automagic8bit, bnb
from automagic_bnb import state as st

# ----------------------------------------------------------------------------------------------------- whom it concerns


def test_one_parameter_alone(tools: Any) -> None:
    """Its storage becomes an override that a call for all leaves in force; of the others every bit stays."""
    opt = trained(tools, "8bit")
    p = parameters_of(opt)
    before = tools.snapshot(opt)
    opt.requantize(p[2], optim_bits=32)
    assert storages(opt) == ["32bit" if i == 2 else "8bit" for i in range(len(SHAPES))]
    after = tools.snapshot(opt)
    for side in (before, after):
        del side["state"][2]
    assert not tools.differences(before, after)
    opt.requantize(factored=True)
    assert storages(opt)[2] == "32bit"
    opt.requantize((x for x in p[2:4]), optim_bits=8)
    assert storages(opt)[2:4] == ["factored", "factored"]


def test_an_override_given_to_several_parameters_stays_with_the_others(tools: Any) -> None:
    """bitsandbytes' manager keeps one dict for all of them."""
    opt = build(tools, "8bit")
    p = parameters_of(opt)
    bnb.GlobalOptimManager.get_instance().override_config(p[:3], "optim_bits", 32)
    opt.requantize(p[0], optim_bits=8)
    tools.train(opt, p, range(1))
    assert storages(opt)[:3] == ["8bit", "32bit", "32bit"]


def test_overrides_hold_against_a_call_for_all(tools: Any) -> None:
    opt = trained(tools, "8bit")
    p = parameters_of(opt)
    bnb.GlobalOptimManager.get_instance().override_config(p[0], "optim_bits", 32)
    opt.requantize()  # no option: states follow the options as they are
    assert storages(opt) == ["32bit"] + ["8bit"] * (len(SHAPES) - 1)
    opt.requantize(optim_bits=8, factored=True)
    assert storages(opt)[0] == "32bit"
    assert storages(opt)[2] == "factored"


@pytest.mark.parametrize("alone", [True, False])
def test_states_made_later_follow(alone: bool, tools: Any) -> None:
    """Before any step, and for a parameter that has had no gradient yet."""
    opt = build(tools, "8bit")
    p = parameters_of(opt)
    opt.requantize(p[:2] if alone else None, optim_bits=32)
    assert not opt.state
    tools.train(opt, p[1:], range(2))
    opt.requantize()
    assert not opt.state.get(p[0])
    tools.train(opt, p, range(2, 3))
    assert storages(opt) == (["32bit"] * 2 + ["8bit"] * (len(SHAPES) - 2) if alone else ["32bit"] * len(SHAPES))


def test_for_all_reaches_groups_config_and_groups_added_later(tools: Any) -> None:
    """The options named replace what a group says of them, and leave what it says of others."""
    p = tools.parameters((64, 64), (32, 32), (48, 48))
    opt = Automagic8bit([{"params": p[:1], "optim_bits": 32}, {"params": p[1:2], "factored": True}], lr=1e-3)
    tools.train(opt, p[:2], range(3))
    opt.requantize(min_8bit_size=100)
    assert [st.storage_held(opt.state[x]) for x in p[:2]] == ["32bit", "factored"]
    opt.requantize(optim_bits=8, factored=False)
    opt.add_param_group({"params": p[2:]})
    tools.train(opt, p, range(3, 4))
    assert [st.storage_held(opt.state[x]) for x in p] == ["8bit"] * 3
    for options in (*opt.param_groups, vars(opt.config), opt.defaults):
        assert (options["optim_bits"], options["factored"], options["min_8bit_size"]) == (8, False, 100)


def test_embeddings_and_small_parameters(tools: Any) -> None:
    """stable_emb, min_8bit_size and force_8bit decide as they do in the constructor."""
    embedding, weight, bias = tools.parameters((64, 64), (64, 64), (64,))
    named = [("embed.weight", embedding), ("body.weight", weight), ("body.bias", bias)]
    opt = Automagic8bit(named, lr=1e-3, factored=False)
    tools.train(opt, parameters_of(opt), range(2))
    assert storages(opt) == ["8bit", "8bit", "small"]
    opt.requantize(stable_emb=True, min_8bit_size=0)
    assert storages(opt) == ["32bit", "8bit", "8bit"]
    opt.requantize(force_8bit=True, min_8bit_size=10**6)
    assert storages(opt) == ["8bit"] * 3


def test_two_optimizers_do_not_mix(tools: Any) -> None:
    first, second = trained(tools, "8bit"), trained(tools, "8bit")
    before = tools.snapshot(second)
    first.requantize(optim_bits=32)
    first.requantize(parameters_of(first)[0], optim_bits=8)
    second.requantize()
    assert not tools.differences(before, tools.snapshot(second))


# --------------------------------------------------------------------------------------------------------------- errors

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"optim_bits": 16}, ValueError, "optim_bits=16 of requantize: must be 8 or 32"),
    ({"optim_bits": "a"}, TypeError, "optim_bits='a' of requantize: must be 8 or 32"),
    ({"min_8bit_size": -1}, ValueError, "min_8bit_size=-1 of requantize: must be a whole number >= 0"),
    ({"min_8bit_size": []}, TypeError, r"min_8bit_size=\[\] of requantize: must be a whole number"),
    ({"factored": 1}, TypeError, "factored=1 of requantize: must be True or False"),
    ({"optim_bits": 32, "stable_emb": "no"}, TypeError, "stable_emb='no' of requantize: must be True or False"),
    ({"force_8bit": True, "optim_bits": 32}, ValueError, "force_8bit=True .*contradicts optim_bits=32; leave one"),
    ({"parameters": 8}, TypeError, "not 8 .int.; options go by name"),
    ({"parameters": ["weight"], "optim_bits": 32}, TypeError, "not 'weight' .str."),
    ({"parameters": torch.zeros(3, 4), "optim_bits": 32}, ValueError, r"shape \(3, 4\).*take it from optimizer"),
    ({"lr": 1.0}, TypeError, "unexpected keyword argument 'lr'"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), WRONG, ids=lambda x: "-".join(x) if type(x) is dict else "")
def test_what_is_wrong_is_named_and_changes_nothing(
    arguments: dict[str, Any], kind: type[Exception], message: str, tools: Any
) -> None:
    opt = trained(tools, "8bit")
    before, config = tools.snapshot(opt), dict(vars(opt.config))
    with pytest.raises(kind, match=message):
        opt.requantize(**arguments)
    assert not tools.differences(before, tools.snapshot(opt))
    assert vars(opt.config) == config
    assert bnb.overridden_ids() == ()


@pytest.mark.parametrize("allocations", [0, 7, 13, 24])
@pytest.mark.parametrize("alone", [True, False])
def test_after_an_error_a_second_call_goes_on(
    allocations: int, alone: bool, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that runs out at any parameter: each is in one storage, old or new, and steps on in it."""
    opt, whole = trained(tools, "8bit"), trained(tools, "8bit")
    old = tools.snapshot(opt)["state"]
    whole.requantize(optim_bits=32)
    new, allocate, left = tools.snapshot(whole)["state"], st.empty_element_state, allocations

    def runs_out(*args: Any) -> torch.Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise MemoryError
        return allocate(*args)

    monkeypatch.setattr(st, "empty_element_state", runs_out)
    with pytest.raises(MemoryError):
        opt.requantize(parameters_of(opt) if alone else None, optim_bits=32)
    monkeypatch.undo()
    done = allocations // 5  # a 32-bit state has five such tensors
    assert storages(opt) == ["32bit"] * done + ["8bit"] * (len(SHAPES) - done)
    assert not tools.differences(tools.snapshot(opt)["state"], new[:done] + old[done:])
    half = copy.deepcopy(opt)
    tools.train(half, parameters_of(half), range(6, 7))
    assert all(torch.isfinite(p).all() for p in parameters_of(half))
    opt.requantize()
    assert not tools.differences(tools.snapshot(opt)["state"], new)


# ----------------------------------------------------------------------------------------------------------- afterwards

EXTRAS: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {"percentile_clipping": 60}),
    (torch.float16, {"lr": None}),
    (torch.bfloat16, {"master": "ecc8", "percentile_clipping": 60}),
    (torch.bfloat16, {"came": False, "lr": None}),
]


@pytest.mark.parametrize("second", OPTIONS)
@pytest.mark.parametrize("first", OPTIONS)
@pytest.mark.parametrize(("dtype", "options"), EXTRAS)
def test_a_checkpoint_of_a_converted_run_resumes_bit_for_bit(
    dtype: torch.dtype, options: dict[str, Any], first: str, second: str, tools: Any
) -> None:
    """In the middle of warm-up, through a file, a pickle and a deep copy; the state is one that this storage makes."""
    opt, made = trained(tools, first, 4, dtype=dtype, **options), trained(tools, second, 1, dtype=dtype, **options)
    opt.requantize(**OPTIONS[second])
    assert [set(opt.state[p]) for p in parameters_of(opt)] == [set(made.state[p]) for p in parameters_of(made)]
    tools.train(opt, parameters_of(opt), range(4, 5))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    loaded = build(tools, first, dtype=dtype, **options)
    for p, q_ in zip(parameters_of(loaded), parameters_of(opt), strict=True):
        p.data.copy_(q_.data)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    runs = [opt, loaded, pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt)]
    for run in runs:
        before = [p.detach().clone() for p in parameters_of(run)]
        tools.train(run, parameters_of(run), range(5, 12))
        assert not any(torch.equal(p, x) for p, x in zip(parameters_of(run), before, strict=True) if p.numel() > 1)
        assert all(torch.isfinite(p).all() for p in parameters_of(run))
    for run in runs[1:]:
        assert not tools.differences(tools.snapshot(opt), tools.snapshot(run))


@pytest.mark.parametrize("held", ["8bit", "factored"])
def test_the_next_step_of_32_bits_is_the_one_it_would_have_been(held: str, tools: Any) -> None:
    """Nothing was lost, so no bit of the weights differs: the storages part with what this step writes."""
    opt = trained(tools, held, warmup_steps=0)
    kept = copy.deepcopy(opt)
    opt.requantize(optim_bits=32)
    for run in (opt, kept):
        tools.train(run, parameters_of(run), range(6, 7))
    assert not tools.differences(tools.snapshot(opt)["parameters"], tools.snapshot(kept)["parameters"])
    for state in kept.state.values():  # negative control
        state["absmax1"].mul_(1.01)
    for run in (opt, kept):
        tools.train(run, parameters_of(run), range(7, 8))
    assert tools.differences(tools.snapshot(opt)["parameters"], tools.snapshot(kept)["parameters"])


@pytest.mark.kernels
@pytest.mark.parametrize("options", [{}, {"lr": None, "auto_lr": True}], ids=["lr", "auto_lr"])
@pytest.mark.parametrize("singly", [False, True])
def test_kernels_and_reference_agree_across_conversions(options: dict[str, Any], singly: bool) -> None:
    """Every storage in turn: the kernels find the new states, not those their plan knew."""
    turns = {2: "32bit", 3: "factored", 4: "8bit", 5: "factored", 6: "32bit"}

    def convert(opt: Any, step: int) -> None:
        if step in turns:
            opt.requantize(**OPTIONS[turns[step]])
        if singly:
            for group in opt.param_groups:
                for p in group["params"]:
                    opt.step_parameter(p, group)
                    p.grad = None

    def make(backend: str) -> Any:
        return kernel_cases.optimizer(
            kernel_cases.parameters(kernel_cases.FEW_TILED_SHAPES, torch.float32), backend, **options
        )

    run = kernel_cases.follow(make, steps=6, before=convert)
    assert set(storages(run.kernel)) == {"32bit"}
    assert all(state["step"] == 6 for state in run.kernel.state.values())
    assert not run.one_step.violations(kernel_cases.ONE_STEP)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_was_replaced_is_freed(backend: str, tools: Any) -> None:
    """At once: the plan of the fused step holds none of it."""
    p = [torch.nn.Parameter(x.detach().to(kernel_cases.DEVICE)) for x in tools.parameters((9, 24), (30,))]
    opt = Automagic8bit(p, lr=1e-3, min_8bit_size=0, mask_bits=8, backend=backend)
    tools.train(opt, p, range(1))
    old = [weakref.ref(opt.state[x][name]) for x in p for name in ("state1", "state2", "absmax3", "lr_mask")]
    opt.requantize(optim_bits=32)
    assert [ref() for ref in old] == [None] * len(old)
