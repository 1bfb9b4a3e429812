"""Changing the storage mid-run: what converts, what stays, what is refused, and that training goes on undisturbed."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from typing import Any

import kernel_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as hs

from automagic_bnb import Automagic8bit, bnb, reference, requantization
from automagic_bnb import quantization as q
from automagic_bnb import state as st
from automagic_bnb.factored import Tiling
from automagic_bnb.moments import moments_of

OPTIONS = {
    "32bit": {"optim_bits": 32},
    "8bit": {"optim_bits": 8, "factored": False},
    "factored": {"optim_bits": 8, "factored": True},
}
SHAPES = ((64, 64), (257,), (256, 200), (16, 8, 4, 4), (), (5000, 3), (0, 8))
"""A matrix that factors by blocks and one by odd columns, vectors with an odd end, a scalar, an empty one."""
FACTORING = ((64, 64), (256, 200), (16, 8, 4, 4))

MEANS_RTOL = 1e-5
"""Row times column means over their mean has the same row and column means, but for float32's rounding."""
EPSILON = 2.0**-23
SIGNED = bnb.code_book(True, torch.device("cpu"))
UNSIGNED = bnb.code_book(False, torch.device("cpu"))
LARGEST_GAP = float((SIGNED[1:] - SIGNED[:-1]).max())
"""Of neighbouring codes, as a share of absmax: rounding to nearest errs by half of it."""


def build(tools: Any, storage: str, dtype: torch.dtype = torch.float32, lr: float | None = 1e-3, **options: Any) -> Any:
    """An optimizer in two groups, in this storage."""
    p = tools.parameters(*SHAPES, dtype=dtype)
    groups = [{"params": p[:2]}, {"params": p[2:], "weight_decay": 0.1}]
    return Automagic8bit(groups, lr=lr, **{"min_8bit_size": 0, "warmup_steps": 8, **OPTIONS[storage], **options})


def parameters(opt: Any) -> list[Any]:
    return [p for group in opt.param_groups for p in group["params"]]


def trained(tools: Any, storage: str, steps: int = 6, **options: Any) -> Any:
    opt = build(tools, storage, **options)
    tools.train(opt, parameters(opt), range(steps))
    return opt


def storages(opt: Any) -> list[str]:
    return [st.storage_held(opt.state[p]) for p in parameters(opt)]


def moment(opt: Any, p: Any, number: int) -> torch.Tensor:
    """What the rule reads, float32 [n]."""
    blocks = reference.Blocks(p)
    keep = torch.ones(blocks.blocks, q.BLOCK, dtype=torch.bool)
    return blocks.join(moments_of(opt.state[p], blocks, keep).read(number))


def mask(opt: Any, p: Any) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = reference.Blocks(p)
    k, polarity = reference.read_mask(opt.state[p], blocks)
    return blocks.join(k), blocks.join(polarity)


# ------------------------------------------------------------------------------------------------------------ the codes


def twice(codes: torch.Tensor, absmax: torch.Tensor, signed: bool) -> torch.Tensor:
    """Codes after a way through 32 bits, as `converted` takes it."""
    book = SIGNED if signed else UNSIGNED
    values = q.decode(codes, absmax, book)
    return q.encode(values, book)[0]


LAST = q.LAST_CODE


@pytest.mark.parametrize("end", [0, LAST])
def test_every_signed_code_survives_32_bits(end: int) -> None:
    """Every code beside an end code, at sizes from the smallest absmax to the largest."""
    absmax = torch.logspace(-36, 37, 500)
    codes = torch.arange(LAST + 1).expand(len(absmax), -1).to(torch.uint8).clone()
    codes[codes == LAST - end] = 127  # one end only
    assert torch.equal(twice(codes, absmax, signed=True), codes)


def test_every_unsigned_code_survives_32_bits() -> None:
    absmax = torch.logspace(-36, 37, 500)
    codes = torch.arange(LAST + 1).expand(len(absmax), -1).to(torch.uint8)
    assert torch.equal(twice(codes, absmax, signed=False), codes)


@settings(max_examples=200, deadline=None)
@given(seed=hs.integers(0, 2**32), exponent=hs.floats(-35, 37), end=hs.sampled_from([0, LAST]), dense=hs.booleans())
def test_random_blocks_keep_their_codes(seed: int, exponent: float, end: int, dense: bool) -> None:
    """Any block that `encode` can make, also one of mostly the same code, whichever ends it has."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, LAST + 1, (4, 256), generator=generator).to(torch.uint8)
    if not dense:
        codes[:, 1:] = codes[:, :1]
    codes[:, 17] = end
    absmax = 10**exponent * (1 + torch.rand(4, generator=generator))
    assert torch.equal(twice(codes, absmax, signed=True), codes)
    codes[:, 17] = LAST
    assert torch.equal(twice(codes, absmax, signed=False), codes)


def test_bitsandbytes_largest_code_takes_another_scale() -> None:
    """Negative control: a block with the code of 1, as bitsandbytes writes it, keeps its values to half a gap only."""
    codes = torch.tensor([[255, *range(200, 255)] + [127] * 200], dtype=torch.uint8)
    values = q.decode(codes, torch.ones(1), SIGNED)
    changed, absmax = q.encode(values, SIGNED)
    error = (q.decode(changed, absmax, SIGNED) - values).abs()[0] / (SIGNED[-2] - SIGNED[-3])
    assert changed[0, 0] == LAST
    assert error[0] <= 1e-5
    assert 0.4 < error.max() <= 0.51


# ---------------------------------------------------------------------------------------------------------- conversions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lr", [1e-3, None])
def test_8_to_32_to_8_bits_gives_every_byte_back(dtype: torch.dtype, lr: float | None, tools: Any) -> None:
    """Every code and mask byte is the same; absmax by at most one rounding; all else is the same tensor."""
    opt = trained(tools, "8bit", dtype=dtype, lr=lr)
    before, held = tools.snapshot(opt), [dict(opt.state[p]) for p in parameters(opt)]
    opt.requantize(optim_bits=32)
    assert storages(opt) == ["32bit"] * len(SHAPES)
    opt.requantize(optim_bits=8)
    after = tools.snapshot(opt)
    for old, new in zip(before["state"], after["state"], strict=True):
        assert old.keys() == new.keys()
        for name in ("absmax1", "absmax2", "absmax3"):
            assert torch.allclose(new.pop(name), old.pop(name), rtol=2 * EPSILON, atol=0)
    assert not tools.differences(before, after)
    untouched = ("tensor_stats", "torque", "edge_history", "spatial_variance")
    for p, old in zip(parameters(opt), held, strict=True):
        assert all(torch.equal(opt.state[p][name], old[name]) for name in untouched)
        assert all(opt.state[p][name] is old[name] for name in untouched[1:])


def test_8_to_32_bits_changes_no_value(tools: Any) -> None:
    opt = trained(tools, "8bit")
    p = parameters(opt)
    before = [[moment(opt, x, i) for i in (1, 2, 3)] + list(mask(opt, x)) for x in p]
    opt.requantize(optim_bits=32)
    after = [[moment(opt, x, i) for i in (1, 2, 3)] + list(mask(opt, x)) for x in p]
    assert not tools.differences(before, after)


@pytest.mark.parametrize("warm", [True, False])
def test_32_to_8_bits_goes_to_the_nearest(warm: bool, tools: Any) -> None:
    """Each moment within half a gap of its codes, k within 1/2; W is the mean of the rounded mask."""
    opt = trained(tools, "32bit", steps=6 if warm else 12)
    p = parameters(opt)
    before = [[moment(opt, x, i) for i in (1, 2, 3)] for x in p]
    masks, stats = [mask(opt, x) for x in p], [opt.state[x]["tensor_stats"].clone() for x in p]
    opt.requantize(optim_bits=8)
    assert storages(opt) == ["8bit"] * len(SHAPES)
    fractional = False
    for x, moments, (k, polarity), old_stats in zip(p, before, masks, stats, strict=True):
        if x.numel() == 0:
            continue
        for number, old in enumerate(moments, start=1):
            gap = 0.5 * LARGEST_GAP * reference.Blocks(x).cut(old).abs().amax(dim=1, keepdim=True) / 0.99
            error = reference.Blocks(x).cut(moment(opt, x, number) - old).abs()
            assert (error <= gap).all()
        new_k, new_polarity = mask(opt, x)
        assert torch.equal(new_k, k.round())
        assert torch.equal(new_polarity, polarity)
        new_stats = opt.state[x]["tensor_stats"]
        assert new_stats[st.MASK_MEAN].item() == pytest.approx(torch.exp2(new_k / 16).mean().item(), rel=1e-5)
        assert torch.equal(new_stats[1:], old_stats[1:])
        fractional |= not torch.equal(k, k.round())
    assert fractional  # the rounding of k was put to the test


@pytest.mark.parametrize("held", ["8bit", "32bit"])
def test_to_factored_keeps_the_means_of_each_tile(held: str, tools: Any) -> None:
    """v and r keep the row and column sums of every tile; where nothing factors, storage is 8-bit."""
    opt = trained(tools, held)
    p = parameters(opt)
    before = [[moment(opt, x, i) for i in (2, 3)] for x in p]
    codes = [opt.state[x]["state1"] for x in p], [opt.state[x]["lr_mask"] for x in p]
    opt.requantize(optim_bits=8, factored=True)
    assert storages(opt) == ["factored" if shape in FACTORING else "8bit" for shape in SHAPES]
    for i, (x, moments) in enumerate(zip(p, before, strict=True)):
        if held == "8bit":
            assert opt.state[x]["state1"] is codes[0][i]
            assert opt.state[x]["lr_mask"] is codes[1][i]
        if st.storage_held(opt.state[x]) != "factored":
            continue
        tiling, blocks = Tiling.of(x), reference.Blocks(x)
        for number, old in zip((2, 3), moments, strict=True):
            new = moment(opt, x, number)
            for means in (tiling.row_means, tiling.column_means):
                assert torch.allclose(means(blocks.cut(new)), means(blocks.cut(old)), rtol=MEANS_RTOL)
            assert new.sum().item() == pytest.approx(old.sum().item(), rel=1e-3)


@pytest.mark.parametrize("target", ["8bit", "32bit"])
def test_from_factored_takes_the_estimate_over(target: str, tools: Any) -> None:
    opt = trained(tools, "factored")
    p = [x for x in parameters(opt) if st.storage_held(opt.state[x]) == "factored"]
    before = [[moment(opt, x, i) for i in (2, 3)] for x in p]
    opt.requantize(**OPTIONS[target])
    assert storages(opt) == [target] * len(SHAPES)
    for x, moments in zip(p, before, strict=True):
        for number, old in zip((2, 3), moments, strict=True):
            gap = 0.0 if target == "32bit" else 0.5 * LARGEST_GAP * old.max().item()
            assert ((moment(opt, x, number) - old).abs() <= gap).all()


@pytest.mark.parametrize("shape", [(64, 64), (310, 100), (513, 24), (150, 1000), (70, 16, 3, 3), (5000,)])
@pytest.mark.parametrize(("first", "second"), [("8bit", "factored"), ("factored", "32bit"), ("32bit", "8bit")])
def test_parts_are_the_same_as_the_whole(
    shape: tuple[int, ...], first: str, second: str, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Converted in the smallest parts or at once: the same bits, with low tiles that are cut by the parameter's end."""
    monkeypatch.setattr("automagic_bnb.factored.tile_height", lambda width: 2)
    p = tools.parameters(shape)[0]
    opt = Automagic8bit([p], lr=1e-3, min_8bit_size=0, **OPTIONS[first])
    tools.train(opt, [p], range(3))
    whole = requantization.converted(opt.state[p], p, second, opt.param_groups[0])
    monkeypatch.setattr(requantization, "CHUNK", 1)
    parts = list(requantization._parts(p, opt.state[p], whole, "factored" in (first, second)))
    assert len(parts) > 1
    assert sum(part.blocks.n for part in parts) == p.numel()
    in_parts = requantization.converted(opt.state[p], p, second, opt.param_groups[0])
    differences = tools.differences(dict(whole), dict(in_parts))
    if "32bit" in (first, second) and second != "32bit":
        differences = [d for d in differences if "tensor_stats" not in d]  # a sum in another order
        assert torch.allclose(whole["tensor_stats"], in_parts["tensor_stats"], rtol=4 * EPSILON, atol=0)
    assert not differences


def test_factored_to_32_bits_and_back_keeps_the_means(tools: Any) -> None:
    """Where every tile is whole. The row that the parameter's end cuts has no estimate that keeps its mean."""
    opt = trained(tools, "factored")
    before = tools.snapshot(opt)["state"]
    opt.requantize(optim_bits=32)
    opt.requantize(optim_bits=8)
    for p, old in zip(parameters(opt), before, strict=True):
        assert opt.state[p].keys() == old.keys()
        for name in requantization.MEANS & old.keys():
            assert torch.allclose(opt.state[p][name], old[name], rtol=MEANS_RTOL, atol=0)


def test_blocks_without_a_gradient_so_far(tools: Any) -> None:
    """Skipped from the start: 0 before and after, by another code. All else of the parameter keeps its codes."""
    p = tools.parameters((3, 256))[0]
    opt = Automagic8bit([p], lr=1e-3, min_8bit_size=0)
    p.grad = torch.full((3, 256), 1e-3)
    p.grad[1] = torch.nan
    opt.step()
    before = {name: opt.state[p][name].clone() for name in ("state1", "state2", "state3")}
    opt.requantize(optim_bits=32)
    assert not opt.state[p]["state1"][1].any()
    opt.requantize(optim_bits=8)
    assert not moment(opt, p, 1)[256:512].any()
    for name, codes in before.items():
        assert torch.equal(opt.state[p][name][::2], codes[::2])


# ----------------------------------------------------------------------------------------------------- whom it concerns


def test_one_parameter_alone(tools: Any) -> None:
    """Its storage becomes an override that a call for all leaves in force; of the others every bit stays."""
    opt = trained(tools, "8bit")
    p = parameters(opt)
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
    p = parameters(opt)
    bnb.GlobalOptimManager.get_instance().override_config(p[:3], "optim_bits", 32)
    opt.requantize(p[0], optim_bits=8)
    tools.train(opt, p, range(1))
    assert storages(opt)[:3] == ["8bit", "32bit", "32bit"]


def test_overrides_hold_against_a_call_for_all(tools: Any) -> None:
    opt = trained(tools, "8bit")
    p = parameters(opt)
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
    p = parameters(opt)
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
    opt = Automagic8bit([("embed.weight", embedding), ("body.weight", weight), ("body.bias", bias)], lr=1e-3)
    tools.train(opt, parameters(opt), range(2))
    assert storages(opt) == ["8bit", "8bit", "32bit"]
    opt.requantize(stable_emb=True, min_8bit_size=0)
    assert storages(opt) == ["32bit", "8bit", "8bit"]
    opt.requantize(force_8bit=True, min_8bit_size=10**6)
    assert storages(opt) == ["8bit"] * 3


def test_two_optimizers_do_not_mix(tools: Any) -> None:
    first, second = trained(tools, "8bit"), trained(tools, "8bit")
    before = tools.snapshot(second)
    first.requantize(optim_bits=32)
    first.requantize(parameters(first)[0], optim_bits=8)
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
        opt.requantize(parameters(opt) if alone else None, optim_bits=32)
    monkeypatch.undo()
    done = allocations // 5  # a 32-bit state has five such tensors
    assert storages(opt) == ["32bit"] * done + ["8bit"] * (len(SHAPES) - done)
    assert not tools.differences(tools.snapshot(opt)["state"], new[:done] + old[done:])
    half = copy.deepcopy(opt)
    tools.train(half, parameters(half), range(6, 7))
    assert all(torch.isfinite(p).all() for p in parameters(half))
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
    assert [set(opt.state[p]) for p in parameters(opt)] == [set(made.state[p]) for p in parameters(made)]
    tools.train(opt, parameters(opt), range(4, 5))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    loaded = build(tools, first, dtype=dtype, **options)
    for p, q_ in zip(parameters(loaded), parameters(opt), strict=True):
        p.data.copy_(q_.data)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    runs = [opt, loaded, pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt)]
    for run in runs:
        before = [p.detach().clone() for p in parameters(run)]
        tools.train(run, parameters(run), range(5, 12))
        assert not any(torch.equal(p, x) for p, x in zip(parameters(run), before, strict=True) if p.numel() > 1)
        assert all(torch.isfinite(p).all() for p in parameters(run))
    for run in runs[1:]:
        assert not tools.differences(tools.snapshot(opt), tools.snapshot(run))


@pytest.mark.parametrize("held", ["8bit", "factored"])
def test_the_next_step_of_32_bits_is_the_one_it_would_have_been(held: str, tools: Any) -> None:
    """Nothing was lost, so no bit of the weights differs: the storages part with what this step writes."""
    opt = trained(tools, held, warmup_steps=0)
    kept = copy.deepcopy(opt)
    opt.requantize(optim_bits=32)
    for run in (opt, kept):
        tools.train(run, parameters(run), range(6, 7))
    assert not tools.differences(tools.snapshot(opt)["parameters"], tools.snapshot(kept)["parameters"])
    for state in kept.state.values():  # negative control
        state["absmax1"].mul_(1.01)
    for run in (opt, kept):
        tools.train(run, parameters(run), range(7, 8))
    assert tools.differences(tools.snapshot(opt)["parameters"], tools.snapshot(kept)["parameters"])


@pytest.mark.parametrize("options", [{}, {"lr": None, "auto_lr": True}], ids=["lr", "auto_lr"])
@pytest.mark.parametrize("singly", [False, True])
def test_kernels_and_reference_agree_across_conversions(options: dict[str, Any], singly: bool) -> None:
    """Every storage in turn: the kernels find the new states, not those their plan knew."""
    pytest.importorskip("triton")
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
    pytest.importorskip("triton")
    p = [torch.nn.Parameter(x.detach().to(kernel_cases.DEVICE)) for x in tools.parameters((9, 24), (30,))]
    opt = Automagic8bit(p, lr=1e-3, min_8bit_size=0, backend=backend)
    tools.train(opt, p, range(1))
    old = [weakref.ref(opt.state[x][name]) for x in p for name in ("state1", "state2", "absmax3", "lr_mask")]
    opt.requantize(optim_bits=32)
    assert [ref() for ref in old] == [None] * len(old)
