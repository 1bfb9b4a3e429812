"""The memory report: held figures against the tensors themselves, plans against what a step then allocates."""

from __future__ import annotations

import copy
import io
import json
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as some
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from automagic_bnb import Automagic8bit, Automagic32bit, PagedAutomagic8bit, analyze_memory_usage, bnb, memory, paged
from automagic_bnb import state as st
from automagic_bnb.memory_summary import in_units

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from workloads import WORKLOADS

CUDA = torch.cuda.is_available()
SHAPES = [(), (1,), (0,), (255,), (257,), (4099,), (33, 129), (64, 512), (16, 1031), (4096, 16), (7, 5, 3, 3), (8, 0)]
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "32bit": {"optim_bits": 32},
    "factored": {"factored": True},
    "force_8bit": {"force_8bit": True},
    "factored down to small ones": {"factored": True, "min_8bit_size": 64},
    "ecc8": {"master": "ecc8"},
    "rate found": {"lr": None},
    "without confidence": {"came": False, "factored": True},
    "percentile clipping": {"percentile_clipping": 50},
    "all at once": {"factored": True, "master": "ecc8", "lr": None, "percentile_clipping": 5, "min_8bit_size": 0},
}
UNFORESEEN = {"basis", "held_bytes", "planned_bytes"}
"""What a step may change of a report."""


def optimizer(parameters: Any, **options: Any) -> Automagic8bit:
    return Automagic8bit(parameters, **{"lr": 1e-3, "backend": "torch", **options})


def stepped(opt: Any, *parameters: Any) -> Any:
    """The optimizer after a step of these parameters, or of all."""
    for p in parameters or [p for group in opt.param_groups for p in group["params"]]:
        p.grad = torch.full_like(p, 0.01)
    opt.step()
    return opt


def tensors_of(opt: Any) -> dict[int, tuple[str, Tensor]]:
    """Every tensor in the optimizer's state, each once, with its key: what the report is held against."""
    return {id(v): (k, v) for state in opt.state.values() for k, v in state.items() if isinstance(v, Tensor)}


def bytes_of(opt: Any, *starts: str) -> int:
    """Bytes of the tensors whose keys start so."""
    return sum(math.prod(v.shape) * v.itemsize for k, v in tensors_of(opt).values() if k.startswith(starts or ""))


def outcome(report: dict[str, Any]) -> dict[str, Any]:
    """All that a plan has to foresee."""
    return {name: value for name, value in report.items() if name not in UNFORESEEN}


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
    in_8bit = sum(p.numel() for p, s in opt.state.items() if s["lr_mask"].dtype == torch.uint8)
    factored = sum(p.numel() for p, s in opt.state.items() if "exp_avg_sq_row" in s)
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
    }
    moments = ("state", "absmax", "exp_avg", "qmap")
    expected |= {key: bytes_of(opt, key) for key in keys if not key.startswith(moments)}
    assert breakdown == {name: size for name, size in expected.items() if size or name in breakdown}
    assert type(breakdown) is dict


def test_known_sizes() -> None:
    """One matrix worked out by hand: 4096 blocks, four bytes an element, three absmax and three statistics a block."""
    report = optimizer([nn.Parameter(torch.zeros(1024, 1024))]).get_memory_efficiency_report()
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
    numbered = {key for key in st.TENSOR_KEYS if key.startswith(("state", "absmax", "qmap")) or "exp_avg" in key}
    assert numbered == memory.FIELD_NAMES.keys()


def test_report_notices_a_tensor_more_and_a_tensor_less(tools: Any) -> None:
    """Control: the figures follow the tensors, not a formula."""
    opt = stepped(optimizer(tools.parameters((64, 512))))
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
    opt = optimizer([{"params": [a, b]}, {"params": [c], "factored": True}, {"params": [d], "optim_bits": 32}])
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
    whole = distribute_tensor(torch.zeros(128, 512), two_processes, [Shard(0)])
    (p,) = parameters = [nn.Parameter(whole)]
    opt = optimizer(parameters, factored=True)
    plan = opt.get_memory_efficiency_report()
    assert plan["total_parameters"] == 64 * 512
    assert plan == optimizer([nn.Parameter(torch.zeros(64, 512))], factored=True).get_memory_efficiency_report()
    p.grad = torch.zeros_like(p)
    opt.step()
    held = opt.get_memory_efficiency_report()
    assert outcome(held) == outcome(plan)
    assert held["held_bytes"] == bytes_of(opt)


# --- nothing is allocated ---------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Notes the storages of tensors that come into being inside the `with` block, but for those on the meta device."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.sizes: dict[int, int] = {}
        self.kept: list[Any] = []
        """Keeps addresses from being used again."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, Tensor) and x.device.type != "meta" and x.numel():
                storage = x.untyped_storage()
                self.kept.append(storage)
                if storage.data_ptr() not in self.known:
                    self.sizes[storage.data_ptr()] = storage.nbytes()
        return result


@pytest.mark.parametrize("variant", VARIANTS)
def test_report_allocates_nothing(variant: str, tools: Any) -> None:
    """Beyond the code books' 2 KB, which are made once, and what builds them."""
    opt = optimizer(tools.parameters((1024, 1024), dtype=torch.bfloat16), **VARIANTS[variant])
    opt.get_memory_efficiency_report()
    with Allocations() as seen:
        opt.get_memory_efficiency_report()
    assert sum(seen.sizes.values()) == 0
    with Allocations() as seen:  # control: what a step allocates is seen
        opt.init_state(opt.param_groups[0], opt.param_groups[0]["params"][0])
    assert sum(seen.sizes.values()) > 2**20


def test_plan_of_a_model_larger_than_any_memory() -> None:
    parameters = [nn.Parameter(torch.empty(2**20, 2**20, device="meta", dtype=torch.bfloat16)) for _ in range(3)]
    report = optimizer(parameters, factored=True).get_memory_efficiency_report()
    assert report["total_parameters"] == 3 * 2**40
    assert 2 < report["bytes_per_parameter"] < 2.2


@pytest.mark.parametrize("variant", VARIANTS)
def test_states_are_made_without_larger_copies(variant: str, tools: Any) -> None:
    """All that is allocated on the way to a state is the state: no float32 copy that is then converted."""
    (p,) = tools.parameters((1024, 1024), dtype=torch.bfloat16)
    opt = optimizer([p], **VARIANTS[variant])
    plan = opt.get_memory_efficiency_report()["total_bytes"]
    books = [bnb.code_book(signed, p.device) for signed in (True, False)]
    with Allocations(p, *books) as seen:
        opt.init_state(opt.param_groups[0], p)
    shared = sum(x.nbytes for x in books) if variant != "32bit" else 0
    assert sum(seen.sizes.values()) == plan - shared


def test_a_float32_copy_would_be_seen(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control for the test above."""
    (p,) = tools.parameters((1024, 1024), dtype=torch.bfloat16)
    opt = optimizer([p])
    plan = opt.get_memory_efficiency_report()["total_bytes"]
    made = st.empty_element_state
    monkeypatch.setattr(st, "empty_element_state", lambda p, dtype, paged: made(p, torch.float32, paged).to(dtype))
    with Allocations(p) as seen:
        opt.init_state(opt.param_groups[0], p)
    assert sum(seen.sizes.values()) > plan + 4 * 2**20


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="only CUDA's allocator tells its peak")
@pytest.mark.parametrize("variant", VARIANTS)
def test_peak_of_making_states_on_a_gpu(variant: str) -> None:
    """The plan holds on CUDA, and the allocator's peak is what stays, in its units of 512 bytes a tensor."""
    parameters = [nn.Parameter(torch.zeros(s, device="cuda", dtype=torch.bfloat16)) for s in [(2048, 2048), (32, 128)]]
    opt = Automagic8bit(parameters, **{"lr": 1e-3, **VARIANTS[variant]})
    for signed in (True, False):
        bnb.code_book(signed, parameters[0].device)  # made once in a process
    plan = opt.get_memory_efficiency_report()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for p in parameters:
        opt.init_state(opt.param_groups[0], p)
    peak = torch.cuda.max_memory_allocated() - before
    assert torch.cuda.memory_allocated() - before == peak <= plan["total_bytes"] + 512 * len(tensors_of(opt))
    stepped(opt)
    assert outcome(opt.get_memory_efficiency_report()) == outcome(plan)
    assert plan["total_bytes"] == bytes_of(opt)


# --- paged states -----------------------------------------------------------------------------------------------------

PAGED_SHAPES = [(500, 500), (300, 300)]
"""Above and below `state.PAGED_MIN_SIZE`."""


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="managed memory exists on CUDA only")
def test_paged_bytes_on_a_gpu() -> None:
    opt = PagedAutomagic8bit([nn.Parameter(torch.zeros(shape, device="cuda")) for shape in PAGED_SHAPES], lr=1e-3)
    plan = opt.get_memory_efficiency_report()
    assert outcome(stepped(opt).get_memory_efficiency_report()) == outcome(plan)
    assert plan["paged_bytes"] == 4 * 500 * 500


def test_paged_bytes_are_planned_as_they_are_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors that only claim to be CUDA's, with managed memory stood in for."""

    managed: set[int] = set()

    def empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        managed.add(id(tensor))
        return tensor

    monkeypatch.setattr(paged, "empty", empty)
    monkeypatch.setattr(paged, "is_paged", lambda x: id(x) in managed)
    monkeypatch.setattr(paged, "prefetch", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: None)
    with FakeTensorMode():
        books = {signed: torch.empty(256, device="cuda:0") for signed in (True, False)}
        monkeypatch.setattr(bnb, "code_book", lambda signed, device: books[signed])
        parameters = [nn.Parameter(torch.empty(shape, device="cuda:0")) for shape in PAGED_SHAPES]
    opt = PagedAutomagic8bit(parameters, lr=1e-3)
    with FakeTensorMode():
        plan = opt.get_memory_efficiency_report()
        (group,) = opt.param_groups
        for p in group["params"]:
            opt.init_state(group, p)
        assert outcome(opt.get_memory_efficiency_report()) == outcome(plan)
        assert plan["paged_bytes"] == sum(v.nbytes for key, (_, v) in tensors_of(opt).items() if key in managed)
    assert plan["paged_bytes"] == 4 * 500 * 500


def test_on_the_cpu_nothing_is_paged(tools: Any) -> None:
    opt = PagedAutomagic8bit(tools.parameters((500, 500)), lr=1e-3)
    assert opt.get_memory_efficiency_report()["paged_bytes"] == 0


# --- the bars ---------------------------------------------------------------------------------------------------------


def planned(workload: str, **options: Any) -> dict[str, Any]:
    """The plan for a model's shapes, bf16, on the meta device."""
    parameters = [
        nn.Parameter(torch.empty(shape, device="meta", dtype=torch.bfloat16))
        for count, shape in WORKLOADS[workload].shapes
        for _ in range(count)
    ]
    report = optimizer(parameters, **options).get_memory_efficiency_report()
    assert report["total_parameters"] == WORKLOADS[workload].elements
    assert ("probe_sum" in report["states_breakdown"]) == (options["lr"] is None)
    return report


RATES = pytest.mark.parametrize("lr", [1e-4, None], ids=["given", "found"])


@RATES
@pytest.mark.parametrize("workload", WORKLOADS)
def test_block_wise_takes_at_most_4_2_bytes_a_parameter(workload: str, lr: float | None) -> None:
    assert planned(workload, lr=lr)["bytes_per_parameter"] <= 4.2


@RATES
@pytest.mark.parametrize("workload", [name for name, w in WORKLOADS.items() if not w.lora])
def test_factored_full_fine_tunes_take_at_most_2_2(workload: str, lr: float | None) -> None:
    assert planned(workload, factored=True, lr=lr)["bytes_per_parameter"] <= 2.2


@RATES
@pytest.mark.parametrize("workload", [name for name, w in WORKLOADS.items() if w.lora])
def test_factored_loras_take_at_most_2_9(workload: str, lr: float | None) -> None:
    assert planned(workload, factored=True, lr=lr)["bytes_per_parameter"] <= 2.9


# --- the text ---------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


TEXTS = {"plain": io.StringIO, "rich": Terminal}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.usefixtures("no_warnings")
def test_text_holds_the_figures(kind: str, tools: Any) -> None:
    if kind == "rich":
        pytest.importorskip("rich")
    opt, file = optimizer(tools.parameters((64, 512), (100,)), factored=True), TEXTS[kind]()
    report = analyze_memory_usage(opt, file=file)
    text = file.getvalue()
    assert report == opt.get_memory_efficiency_report()
    assert "planned" in text
    assert f"{report['bytes_per_parameter']:.2f} bytes for each of 32,868 parameters" in text
    for name, size in [*report["states_breakdown"].items(), ("total", report["total_bytes"])]:
        (line,) = [x for x in text.splitlines() if f" {name} " in x]
        assert in_units(size) in line
    assert text.isascii() == (kind == "plain")
    stepped(opt)
    analyze_memory_usage(opt, file=file)
    assert "(held)" in file.getvalue()


def test_terminal_without_rich_gets_plain_text(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opt, plain, terminal = optimizer(tools.parameters((64, 512))), io.StringIO(), Terminal()
    analyze_memory_usage(opt, file=plain)
    for name in ("rich", "rich.console", "rich.table"):
        monkeypatch.setitem(sys.modules, name, None)
    analyze_memory_usage(opt, file=terminal)
    assert terminal.getvalue() == plain.getvalue()


def test_text_goes_to_standard_output(tools: Any, capsys: pytest.CaptureFixture[str]) -> None:
    opt, file = optimizer(tools.parameters((64, 512))), io.StringIO()
    analyze_memory_usage(opt, file=file)
    analyze_memory_usage(opt)
    assert capsys.readouterr().out == file.getvalue()


def test_text_names_what_is_special(tools: Any) -> None:
    """Frozen parameters, states half there, and 32 bits, which take more than Adam."""
    first, second, frozen = tools.parameters((64, 512), (64, 512), (32, 32))
    opt = stepped(optimizer([first, second, frozen.requires_grad_(False)], optim_bits=32), first)
    file = io.StringIO()
    with pytest.warns(UserWarning, match="8-bit"):
        report = analyze_memory_usage(opt, file=file)
    text = file.getvalue()
    assert "Frozen, without state: 1,024 parameters" in text
    assert f"{in_units(report['held_bytes'])} are held" in text
    assert f"{in_units(round(-report['memory_saved_mb'] * 1e6))} more" in text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (352_400_000, "352.4 MB"), (5 * 10**12, "5,000.0 GB")],
)
def test_units(size: int, text: str) -> None:
    assert in_units(size) == text


def test_what_a_trainer_wrapped_is_found(tools: Any) -> None:
    opt = optimizer(tools.parameters((64, 512)))
    wrapper = SimpleNamespace(optimizer=SimpleNamespace(optimizer=opt))
    assert analyze_memory_usage(wrapper, file=io.StringIO()) == opt.get_memory_efficiency_report()


@pytest.mark.parametrize("other", [None, "optimizer", nn.Linear(2, 2), torch.optim.AdamW([torch.zeros(1)])])
def test_others_are_refused(other: Any) -> None:
    with pytest.raises(TypeError, match=f"optimizer={type(other).__name__}: must be an Automagic optimizer"):
        analyze_memory_usage(other, file=io.StringIO())


# --- the warning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("percent", "warned"), [(29, True), (30, False), (99, False)])
def test_warns_below_thirty_percent(percent: int, warned: bool) -> None:
    """At the caller's line."""
    eight, other = (nn.Parameter(torch.empty(n * 4096, device="meta")) for n in (percent, 100 - percent))
    opt = optimizer([{"params": [eight]}, {"params": [other], "optim_bits": 32}])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        report = analyze_memory_usage(opt, file=io.StringIO())
    assert report["compression_ratio"] == pytest.approx(percent / 100)
    assert [w.filename for w in seen] == ([__file__] if warned else [])


@pytest.mark.parametrize(
    "options", [{}, {"min_8bit_size": 0}, {"force_8bit": True}], ids=["8 bits", "small ones too", "embeddings too"]
)
def test_warning_says_what_each_option_brings(options: dict[str, Any], tools: Any) -> None:
    """And `requantize` then brings just that."""
    names = ["embed", "large", "small", "smaller"]
    parameters = zip(names, tools.parameters((64, 512), (8000,), (1000,), (500,)), strict=True)
    opt = stepped(optimizer(list(parameters), optim_bits=32, stable_emb=True))
    with pytest.warns(UserWarning, match=r"requantize\(") as seen:
        analyze_memory_usage(opt, file=io.StringIO())
    opt.requantize(optim_bits=8, **options)
    share = opt.get_memory_efficiency_report()["compression_ratio"]
    brings = " ".join(f"{name}={value}" for name, value in (options or {"optim_bits": 8}).items())
    assert f"{share:.1%} with {brings}" in str(seen[0].message)


def test_32bit_by_name_warns_too(tools: Any) -> None:
    opt = Automagic32bit(tools.parameters((64, 512)), lr=1e-3)
    with pytest.warns(UserWarning, match=r"100\.0% with optim_bits=8 \(which Automagic8bit has\)"):
        analyze_memory_usage(opt, file=io.StringIO())
