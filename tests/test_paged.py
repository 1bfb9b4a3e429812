"""Paged states: in managed memory, fetched ahead, given back, and the same numbers as in ordinary memory."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from automagic_bnb import Automagic, Automagic8bit, PagedAutomagic8bit, fused, paged
from automagic_bnb import state as st

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="managed memory needs a CUDA device"),
]

SHAPES = ((512, 256), (16, 64), (300, 400), (100_000,), (1024, 512))
"""All but the second are large enough to be paged."""
STORAGES = {
    "8bit": {"factored": False, "mask_bits": 8},
    "factored": {"factored": True, "mask_bits": 8, "mean_bits": 32},
    "32bit": {"optim_bits": 32},
}


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    """All managed memory of a test is given back by its end."""
    gc.collect()
    yield
    gc.collect()
    assert not paged._held


def parameters(dtype: torch.dtype = torch.bfloat16) -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter((torch.randn(s, generator=generator) * 0.1).to("cuda", dtype)) for s in SHAPES]


def build(is_paged: bool, storage: str = "8bit", **options: Any) -> tuple[list[Any], Automagic]:
    p = parameters()
    return p, Automagic(p, **{"lr": 1e-3, "optim_bits": 8, "is_paged": is_paged, **STORAGES[storage], **options})


def to_host(opt: Automagic) -> None:
    """What memory pressure would do to the paged states, all of it."""
    tensors = [x for state in opt.state.values() for x in state.values() if paged.is_paged(x)]
    assert tensors
    paged.prefetch(tensors, torch.cuda.current_stream(), to_host=True)
    torch.cuda.synchronize()


def paged_keys(opt: Automagic, p: Any) -> set[str]:
    return {name for name, value in opt.state[p].items() if paged.is_paged(value)}


@pytest.mark.parametrize("options", [{}, {"lr": None, "percentile_clipping": 50}, {"master": "ecc8"}], ids=str)
@pytest.mark.parametrize("storage", STORAGES)
def test_same_bits_as_in_ordinary_memory(storage: str, options: dict[str, Any], tools: Any) -> None:
    """Twelve steps, with the states on the host before some of them."""
    (ours, opt), (theirs, ordinary) = build(True, storage, **options), build(False, storage, **options)
    for step in range(12):
        for p, o in ((ours, opt), (theirs, ordinary)):
            tools.give_gradients(p, step)
            if o is opt and step in (3, 4, 10):
                to_host(opt)
            o.step()
    assert not tools.differences(tools.snapshot(opt), tools.snapshot(ordinary))


def test_a_difference_is_seen(tools: Any) -> None:
    """Negative control: one byte of a paged state, changed on the way, shows in the weights."""
    (ours, opt), (theirs, ordinary) = build(True), build(False)
    for step in range(2):
        tools.train(opt, ours, range(step, step + 1))
        tools.train(ordinary, theirs, range(step, step + 1))
        opt.state[ours[0]]["state1"][0, 0] ^= 64
    assert any("parameters/0" in d for d in tools.differences(tools.snapshot(opt), tools.snapshot(ordinary)))


@pytest.mark.parametrize("storage", STORAGES)
def test_every_large_element_wise_state_is_paged(storage: str, tools: Any) -> None:
    p, opt = build(True, storage, master="ecc8")
    tools.train(opt, p, range(1))
    for x in p:
        large = x.numel() >= st.PAGED_MIN_SIZE
        assert paged_keys(opt, x) == (st.ELEMENT_KEYS & opt.state[x].keys() if large else set())
        assert all(value.is_cuda for value in opt.state[x].values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("way", ["load", "requantize", "deepcopy"])
def test_paged_again_after(way: str, tools: Any) -> None:
    """And the run goes on as an unpaged one does."""
    (ours, opt), (theirs, ordinary) = build(True), build(False)
    results = []
    for p, o in ((ours, opt), (theirs, ordinary)):
        tools.train(o, p, range(3))
        if way == "load":
            file = io.BytesIO()
            torch.save(o.state_dict(), file)
            file.seek(0)
            o.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        elif way == "requantize":
            o.requantize(optim_bits=32)
        else:
            p, o = copy.deepcopy((p, o))
        tools.train(o, p, range(3, 6))
        results.append((p, o))
    (p, new), (_, expected) = results
    for x in p:
        large = x.numel() >= st.PAGED_MIN_SIZE
        assert paged_keys(new, x) == (st.ELEMENT_KEYS & new.state[x].keys() if large else set())
    assert not tools.differences(tools.snapshot(new), tools.snapshot(expected))


def test_memory_is_given_back_with_the_optimizer(tools: Any) -> None:
    p, opt = build(True)
    tools.train(opt, p, range(1))
    assert len(paged._held) == 4 * 4  # m, v, r, mask of four large parameters
    opt.state.pop(p[0])
    opt._fused.forget()
    gc.collect()
    assert len(paged._held) == 3 * 4
    del opt
    gc.collect()
    assert not paged._held


def test_fetched_in_order_one_parameter_ahead(monkeypatch: pytest.MonkeyPatch, tools: Any) -> None:
    """The first two at once, then each while the one before it is updated."""
    from automagic_bnb.kernels import step, tables

    monkeypatch.setattr(tables, "PAGED_PART", 1)  # each parameter by itself
    monkeypatch.setattr(tables, "FETCHED_BYTES", 0)
    p, opt = build(True)
    tools.train(opt, p, range(1))
    large = [x for x in p if x.numel() >= st.PAGED_MIN_SIZE]
    place = {opt.state[x]["state1"].data_ptr(): i for i, x in enumerate(large)}
    events: list[tuple[str, int]] = []

    def prefetch(tensors: list[torch.Tensor], stream: torch.cuda.Stream) -> None:
        events.extend(("fetch", place[x.data_ptr()]) for x in tensors if x.data_ptr() in place)

    def launch(bucket: Any, *_: Any) -> None:
        events.extend(("step", place[s["state1"].data_ptr()]) for s in bucket.states if bucket.fetched)

    tools.give_gradients(p, 1)
    monkeypatch.setattr(fused.paged, "prefetch", prefetch)
    monkeypatch.setattr(step, "launch", launch)
    opt.step()
    fetched = [i for kind, i in events if kind == "fetch"]
    assert fetched == [0, 1, 2, 3]
    for i in range(4):
        assert events.index(("fetch", min(i + 1, 3))) < events.index(("step", i)) or i == 3
        assert i + 2 > 3 or events.index(("step", i)) < events.index(("fetch", i + 2))


def test_more_state_than_memory_trains_on(tools: Any) -> None:
    """PyTorch may take too little for the states: in ordinary memory they fail, paged they give the same numbers."""

    def run(is_paged: bool) -> Any:
        p = [torch.nn.Parameter(torch.ones(2048, 2048, device="cuda") * 0.1) for _ in range(8)]
        for x in p:
            x.grad = torch.full_like(x, 1e-3)
        maker = PagedAutomagic8bit if is_paged else Automagic8bit
        opt = maker(p, lr=1e-3, factored=False)
        room = torch.cuda.memory_allocated() + 70 * 2**20  # the states take 8 · 16.4 MiB
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
        try:
            for _ in range(3):
                opt.step()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return [x.detach().clone() for x in p]

    with pytest.raises(torch.cuda.OutOfMemoryError):
        run(is_paged=False)
    gc.collect()
    found = run(is_paged=True)
    p = [torch.nn.Parameter(torch.ones(2048, 2048, device="cuda") * 0.1) for _ in range(8)]
    opt = Automagic8bit(p, lr=1e-3, factored=False)
    for x in p:
        x.grad = torch.full_like(x, 1e-3)
    for _ in range(3):
        opt.step()
    assert all(torch.equal(x, y) for x, y in zip(found, p, strict=True))
