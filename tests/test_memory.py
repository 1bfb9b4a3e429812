"""The memory report: held figures against the tensors themselves, plans against what a step then allocates."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as some
from memory_cases import SHAPES, VARIANTS, bytes_of, optimizer, outcome, stepped, tensors_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from automagic_bnb import analyze_memory_usage, bnb
from automagic_bnb import state as st

# --- what is held -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_report_counts_the_tensors_that_are_there(variant: str, dtype: torch.dtype, tools: Any) -> None:
    """Totals, elements by storage and every state, against sums over the tensors in `optimizer.state`."""
    opt = stepped(optimizer(tools.parameters(*SHAPES, dtype=dtype), **VARIANTS[variant]))
    report = opt.get_memory_efficiency_report()
    total, elements = bytes_of(opt), sum(math.prod(shape) for shape in SHAPES)
    assert report["basis"] == "held"
    assert (report["total_bytes"], report["held_bytes"], report["planned_bytes"]) == (total, total, 0)
    in_8bit = sum(p.numel() for p, s in opt.state.items() if s["state1"].dtype == torch.uint8)
    factored = sum(p.numel() for p, s in opt.state.items() if "exp_avg_sq_row" in s and "absmax1" in s)
    assert report["total_parameters"] == elements
    assert report["8bit_parameters"] == in_8bit
    assert report["factored_parameters"] == factored
    assert report["32bit_parameters"] == elements - in_8bit
    assert report["compression_ratio"] == pytest.approx(in_8bit / elements)
    assert report["bytes_per_parameter"] == pytest.approx(total / elements)
    assert report["percent_of_32bit_adam"] == pytest.approx(100 * total / (8 * elements))
    assert report["memory_saved_mb"] == pytest.approx((8 * elements - total) / 1e6)
    assert report["bitsandbytes_available"] is True
    assert report["paged_bytes"] == report["frozen_parameters"] == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_breakdown_names_the_bytes_of_every_state(variant: str, tools: Any) -> None:
    opt = stepped(optimizer(tools.parameters(*SHAPES, dtype=torch.bfloat16), **VARIANTS[variant]))
    breakdown = opt.get_memory_efficiency_report()["states_breakdown"]
    keys = {k for k, _ in tensors_of(opt).values()}
    expected = {
        "exp_avg": bytes_of(opt, "state1", "absmax1"),
        "exp_avg_sq": bytes_of(opt, "state2", "absmax2", "exp_avg_sq"),
        "exp_avg_res": bytes_of(opt, "state3", "absmax3", "exp_avg_res"),
        "code_books": bytes_of(opt, "qmap"),
        "lr_mask": bytes_of(opt, "lr_mask"),
    }
    moments = ("state", "absmax", "exp_avg", "qmap", "lr_mask")
    expected |= {key: bytes_of(opt, key) for key in keys if not key.startswith(moments)}
    assert breakdown == {name: size for name, size in expected.items() if size or name in breakdown}
    assert type(breakdown) is dict


def test_known_sizes() -> None:
    """One matrix by hand, block-wise: 4096 blocks, four bytes an element, three absmax, three statistics a block."""
    report = optimizer(
        [nn.Parameter(torch.zeros(1024, 1024))], factored=False, mask_bits=8
    ).get_memory_efficiency_report()
    n, blocks = 2**20, 4096
    one = n + 4 * blocks
    assert report["states_breakdown"] == {
        **dict.fromkeys(("exp_avg", "exp_avg_sq", "exp_avg_res"), one),
        "lr_mask": n,
        **dict.fromkeys(("torque", "edge_history", "spatial_variance"), 4 * blocks),
        "tensor_stats": 16,
        "code_books": 2048,
    }
    assert report["memory_saved_mb"] == pytest.approx((8 * n - 4 * n - 24 * blocks - 16 - 2048) / 1e6)


def test_every_key_has_its_place_in_the_breakdown() -> None:
    """A tensor newly added to the state under bitsandbytes' kind of name has to be given one of the field's."""
    kinds = ("state", "absmax", "qmap", "lr_mask4")
    numbered = {key for key in st.KEYS if key.startswith(kinds) or "exp_avg" in key}
    assert numbered == {name for name, key in st.KEYS.items() if key.report}


def test_report_notices_a_tensor_more_and_a_tensor_less(tools: Any) -> None:
    """Control: the figures follow the tensors, not a formula."""
    opt = stepped(optimizer(tools.parameters((64, 512)), factored=False))
    before = opt.get_memory_efficiency_report()
    (state,) = opt.state.values()
    state["another"] = torch.zeros(1000)
    more = opt.get_memory_efficiency_report()
    assert more["total_bytes"] - before["total_bytes"] == more["states_breakdown"]["another"] == 4000
    lost = state.pop("absmax2").nbytes
    less = opt.get_memory_efficiency_report()
    assert more["held_bytes"] - less["held_bytes"] == lost == less["planned_bytes"]


def test_report_is_plain_data(tools: Any) -> None:
    report = stepped(optimizer(tools.parameters((64, 512), (9,)), lr=None)).get_memory_efficiency_report()
    assert json.loads(json.dumps(report)) == report


def test_copies_count_the_code_books_once(tools: Any) -> None:
    opt = stepped(optimizer(tools.parameters((64, 512), (64, 512), (4096,))))
    report = opt.get_memory_efficiency_report()
    assert report["states_breakdown"]["code_books"] == 2 * 256 * 4
    assert copy.deepcopy(opt).get_memory_efficiency_report() == report


# --- what is planned --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plan_is_what_the_first_step_allocates(variant: str, dtype: torch.dtype, tools: Any) -> None:
    opt = optimizer(tools.parameters(*SHAPES, dtype=dtype), **VARIANTS[variant])
    plan = opt.get_memory_efficiency_report()
    assert (plan["basis"], plan["held_bytes"], plan["planned_bytes"]) == ("planned", 0, plan["total_bytes"])
    assert not opt.state
    assert outcome(stepped(opt).get_memory_efficiency_report()) == outcome(plan)
    assert plan["total_bytes"] == bytes_of(opt)


SIDE = some.integers(0, 40) | some.sampled_from([64, 256, 257, 512])
OPTIONS = some.fixed_dictionaries(
    {
        "lr": some.sampled_from([1e-3, None]),
        "optim_bits": some.sampled_from([8, 8, 8, 32]),
        "min_8bit_size": some.sampled_from([0, 64, 4096]),
        "factored": some.booleans(),
        "came": some.booleans(),
        "master": some.sampled_from(["none", "stochastic", "ecc8"]),
        "percentile_clipping": some.sampled_from([5, 100]),
    }
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=some.lists(some.lists(SIDE, max_size=3).map(tuple), min_size=1, max_size=3),
    options=OPTIONS,
    bf16=some.booleans(),
)
@example(shapes=[(512, 257, 3)], options={"lr": None, "factored": True, "master": "ecc8"}, bf16=True)
def test_plan_of_any_shape_and_options(
    shapes: list[tuple[int, ...]], options: dict[str, Any], bf16: bool, tools: Any
) -> None:
    shapes = [shape for shape in shapes if math.prod(shape) <= 2**19]
    opt = optimizer(tools.parameters(*[*shapes, (1,)], dtype=torch.bfloat16 if bf16 else torch.float32), **options)
    plan = opt.get_memory_efficiency_report()
    for group in opt.param_groups:
        for p in group["params"]:
            opt.init_state(group, p)
    assert outcome(opt.get_memory_efficiency_report()) == outcome(plan)
    assert plan["total_bytes"] == bytes_of(opt) == sum(plan["states_breakdown"].values())


def test_plan_of_a_strided_parameter() -> None:
    opt = optimizer([nn.Parameter(torch.zeros(512, 64).t()), nn.Parameter(torch.zeros(1).expand(64, 512).clone())])
    plan = opt.get_memory_efficiency_report()
    assert outcome(stepped(opt).get_memory_efficiency_report()) == outcome(plan)


def test_plan_differs_where_options_differ(tools: Any) -> None:
    """Control for the comparisons above: no two of the variants have the same plan."""
    totals = {
        name: optimizer(tools.parameters(*SHAPES, dtype=torch.bfloat16), **options).get_memory_efficiency_report()
        for name, options in VARIANTS.items()
    }
    assert len({report["total_bytes"] for report in totals.values()}) == len(VARIANTS)


def test_some_held_and_some_planned(tools: Any) -> None:
    first, second = tools.parameters((64, 512), (128, 512))
    opt = optimizer([first, second], factored=True)
    plan = opt.get_memory_efficiency_report()
    mixed = stepped(opt, first).get_memory_efficiency_report()
    assert mixed["basis"] == "mixed"
    assert mixed["held_bytes"] == bytes_of(opt)
    assert outcome(mixed) == outcome(plan)
    held = stepped(opt).get_memory_efficiency_report()
    assert held["basis"] == "held"
    assert held["planned_bytes"] == 0
    assert outcome(held) == outcome(plan)


@pytest.mark.parametrize(
    "option", [{"master": "ecc8"}, {"auto_lr": True}, {"percentile_clipping": 10}], ids=lambda x: next(iter(x))
)
def test_options_switched_on_later_are_planned(option: dict[str, Any], tools: Any) -> None:
    opt = stepped(optimizer(tools.parameters((64, 512), (5000,), dtype=torch.bfloat16)))
    before = opt.get_memory_efficiency_report()
    opt.param_groups[0].update(option)
    plan = opt.get_memory_efficiency_report()
    assert plan["basis"] == "mixed"
    assert plan["held_bytes"] == before["total_bytes"] < plan["total_bytes"]
    assert outcome(stepped(opt).get_memory_efficiency_report()) == outcome(plan)


def test_held_storage_counts_until_it_is_converted(tools: Any) -> None:
    """An option alone converts nothing; `requantize` does."""
    opt = stepped(optimizer(tools.parameters((64, 512)), optim_bits=32))
    opt.param_groups[0]["optim_bits"] = 8
    assert opt.get_memory_efficiency_report()["32bit_parameters"] == 64 * 512
    opt.requantize()
    report = opt.get_memory_efficiency_report()
    assert report["8bit_parameters"] == 64 * 512
    assert report["total_bytes"] == bytes_of(opt)


def test_groups_and_overrides_of_single_parameters(tools: Any) -> None:
    a, b, c, d = tools.parameters((64, 512), (64, 512), (64, 512), (64, 512))
    groups = [{"params": [a, b]}, {"params": [c], "factored": True}, {"params": [d], "optim_bits": 32}]
    opt = optimizer(groups, factored=False)
    bnb.GlobalOptimManager.get_instance().override_config(b, "optim_bits", 32)
    plan = opt.get_memory_efficiency_report()
    assert (plan["8bit_parameters"], plan["32bit_parameters"], plan["factored_parameters"]) == (65536, 65536, 32768)
    assert outcome(stepped(opt).get_memory_efficiency_report()) == outcome(plan)


@pytest.mark.parametrize(("options", "in_32bit"), [({}, 64 * 512), ({"force_8bit": True}, 0)], ids=["stable", "forced"])
def test_embeddings(options: dict[str, Any], in_32bit: int, tools: Any) -> None:
    """stable_emb keeps them in 32 bits, unless 8 are forced."""
    embedding, head = tools.parameters((64, 512), (128, 512))
    opt = optimizer([("embed.weight", embedding), ("head.weight", head)], stable_emb=True, **options)
    plan = opt.get_memory_efficiency_report()
    assert plan["32bit_parameters"] == in_32bit
    assert outcome(stepped(opt).get_memory_efficiency_report()) == outcome(plan)


def test_module_overrides_count_before_the_first_step() -> None:
    import bitsandbytes

    layer = bitsandbytes.nn.StableEmbedding(64, 512)
    opt = optimizer(layer.parameters())
    plan = opt.get_memory_efficiency_report()
    assert plan["32bit_parameters"] == sum(p.numel() for p in layer.parameters())
    assert outcome(stepped(opt).get_memory_efficiency_report()) == outcome(plan)


def test_frozen_parameters_count_apart(tools: Any) -> None:
    frozen, trained, later = tools.parameters((64, 512), (64, 512), (64, 512))
    opt = optimizer([frozen.requires_grad_(False), trained, later])
    alone = optimizer([trained, later]).get_memory_efficiency_report()
    plan = opt.get_memory_efficiency_report()
    assert plan == {**alone, "frozen_parameters": 64 * 512}
    stepped(opt, trained, later)
    assert frozen not in opt.state
    held = opt.get_memory_efficiency_report()
    assert held["total_bytes"] == bytes_of(opt)
    later.requires_grad_(False).grad = None  # its state stays, and nothing is added to it
    assert opt.get_memory_efficiency_report() == held
    opt.param_groups[0]["percentile_clipping"] = 50
    assert opt.get_memory_efficiency_report()["planned_bytes"] == 4 * st.NORM_WINDOW


def test_without_parameters_that_train(tools: Any) -> None:
    report = optimizer([tools.parameters((4,))[0].requires_grad_(False)]).get_memory_efficiency_report()
    assert (report["total_parameters"], report["total_bytes"], report["frozen_parameters"]) == (0, 0, 4)
    assert report["compression_ratio"] == report["bytes_per_parameter"] == 0


def test_without_bitsandbytes_all_is_in_32_bits(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opt = optimizer(tools.parameters((64, 512)))
    monkeypatch.setattr(bnb, "BITSANDBYTES_AVAILABLE", False)
    report = opt.get_memory_efficiency_report()
    assert report["bitsandbytes_available"] is False
    assert (report["8bit_parameters"], report["32bit_parameters"]) == (0, 64 * 512)
    assert "code_books" not in report["states_breakdown"]
    with pytest.warns(UserWarning, match="pip install"):
        analyze_memory_usage(opt, file=io.StringIO())


def test_report_changes_nothing(tools: Any) -> None:
    """Not the state, and not what a step does; and module overrides made after the first step stay unheeded."""
    runs = []
    for look in (False, True):
        parameters = tools.parameters((64, 512), (9, 9), dtype=torch.bfloat16)
        opt = optimizer(parameters, lr=None)
        report = opt.get_memory_efficiency_report if look else dict
        report()
        tools.train(opt, parameters, range(3), after=report)
        runs.append(tools.snapshot(opt))
    assert not tools.differences(*runs)
    holder = SimpleNamespace(weight=parameters[0])
    bnb.GlobalOptimManager.get_instance().register_module_override(holder, "weight", {"optim_bits": 32})
    opt.get_memory_efficiency_report()
    assert not bnb.overrides_of(parameters[0])


@pytest.fixture
def two_processes() -> Iterator[Any]:
    """A mesh of two processes, of which only this one exists."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def test_of_a_sharded_parameter_the_part_here_counts(two_processes: Any) -> None:
    """Rows that fill whole tiles; of others, the state of what else is in their tiles lives here, too."""
    whole = distribute_tensor(torch.zeros(512, 512), two_processes, [Shard(0)])
    (p,) = parameters = [nn.Parameter(whole)]
    opt = optimizer(parameters, factored=True)
    plan = opt.get_memory_efficiency_report()
    assert plan["total_parameters"] == 256 * 512
    assert plan == optimizer([nn.Parameter(torch.zeros(256, 512))], factored=True).get_memory_efficiency_report()
    p.grad = torch.zeros_like(p)
    opt.step()
    held = opt.get_memory_efficiency_report()
    assert outcome(held) == outcome(plan)
    assert held["held_bytes"] == bytes_of(opt)
