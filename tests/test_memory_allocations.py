"""Memory itself: planning takes none, making states takes no more than they hold, and some of it is paged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory_cases import VARIANTS, bytes_of, optimizer, outcome, stepped, tensors_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from automagic_bnb import Automagic8bit, PagedAutomagic8bit, bnb, paged
from automagic_bnb import state as st

CUDA = torch.cuda.is_available()


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
    assert 1.5 < report["bytes_per_parameter"] < 1.7


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
    monkeypatch.setattr(st, "empty_element_state", lambda p, dtype, *rest: made(p, torch.float32, *rest).to(dtype))
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
    parameters = [nn.Parameter(torch.zeros(shape, device="cuda")) for shape in PAGED_SHAPES]
    opt = PagedAutomagic8bit(parameters, lr=1e-3, factored=False, mask_bits=8)
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
    opt = PagedAutomagic8bit(parameters, lr=1e-3, factored=False, mask_bits=8)
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
