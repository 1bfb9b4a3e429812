"""What zeros, layouts and numbers at the edge mean to every step of the rule, for the reference and for the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from kernel_cases import DEVICE, follow, optimizer, parameters_of
from torch import Tensor

from automagic_bnb import Automagic8bit, reference, stored
from automagic_bnb.cpu.step import missing

BACKENDS = ["torch", "triton"]
ALL_BACKENDS = [*BACKENDS, pytest.param("numba", marks=pytest.mark.skipif(bool(missing()), reason="no Numba"))]
STORAGES = ["32bit", "8bit", "factored"]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- zeros ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["32bit", "8bit", "small"])
def test_mirrored_gradients_give_mirrored_weights(backend: str, form: str) -> None:
    """Zeros among them too: the first gradient after these agrees with neither sign. (A mask in four bits has no room
    for that.)"""
    p = torch.nn.Parameter(torch.zeros(2, device=DEVICE))
    # With whole changes k in 8 bits is not rounded, by random bits of its own for each element.
    opt = optimizer([p], backend, form, weight_decay=0, spatial_awareness=False)
    for t in range(12):
        p.grad = torch.tensor([1.0, -1.0], device=DEVICE) * (t % 2)
        opt.step()
    assert p[0] == -p[1] != 0
    k, sign = stored.read_mask(opt.state[p], stored.Blocks(p))
    assert k[0, 0] == k[0, 1]
    assert sign[0, 0] != sign[0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("storage", STORAGES)
def test_a_first_gradient_has_no_past_to_agree_with(backend: str, storage: str) -> None:
    """Elements whose gradient comes late, of either sign, have the exponent 0 after it; those on time do not."""
    p = torch.nn.Parameter(torch.zeros(16, 16, device=DEVICE))
    opt = optimizer([p], backend, storage)
    late = torch.ones(16, 16, device=DEVICE)
    late[:, 8:] = -1
    for t in range(3):
        p.grad = late.clone()
        p.grad[8:] *= t == 2
        opt.step()
    k = opt.state[p]["lr_mask"] if storage == "32bit" else ((opt.state[p]["lr_mask"] & 127) >> 1).float() - 32
    assert (k[8:] == 0).all()
    assert (k[:8] >= 0).all()  # by half a step twice, rounded at random
    assert k[:8].mean() > 0.5


def test_a_byte_of_earlier_versions_means_what_it_meant() -> None:
    """Bit 7 was 0 in them: k = 0 with the last sign negative is 64, and agrees with a negative gradient."""
    p = torch.nn.Parameter(torch.zeros(256))
    opt = optimizer([p], "torch", "8bit", spatial_awareness=False)
    opt.init_state(opt.param_groups[0], p)
    opt.state[p]["lr_mask"].fill_(64)
    opt.state[p]["step"] = 1
    p.grad = torch.ones(256)
    p.grad[:128] = -1
    opt.step()
    assert opt.state[p]["lr_mask"].tolist() == [66] * 128 + [63] * 128


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("storage", STORAGES)
def test_what_has_no_gradient_does_not_move(backend: str, storage: str) -> None:
    """Rows beside a trained row: the spatial filter gives them nothing, so that momentum and weight stay 0."""
    p = torch.nn.Parameter(torch.zeros(16, 32, device=DEVICE))
    opt = optimizer([p], backend, storage, cautious=False, frequency_penalty=0.5)
    for t in range(4):
        p.grad = torch.zeros(16, 32, device=DEVICE)
        p.grad[5] = noise(32, seed=t).to(DEVICE)
        opt.step()
    moved = p.detach() != 0
    assert moved[5].all()
    assert not moved[torch.arange(16) != 5].any()


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("storage", [*STORAGES, "packed"])
def test_a_gradient_too_small_for_products_has_a_sign(backend: str, storage: str) -> None:
    """1e-40 times its momentum is 0 in float32, and yet both are positive: all of the block agrees, and moves by lr.
    (Were half of it against its gradient, the other half would make up for it, by 2 lr.)"""
    device = "cpu" if backend == "numba" else DEVICE
    p = torch.nn.Parameter(torch.zeros(256, device=device))
    opt = optimizer([p], backend, storage, lr=0.01, weight_decay=0, came=False)
    p.grad = torch.full((256,), 1e-40, device=device)
    p.grad[::2] = 1
    opt.step()
    assert p[::2].allclose(torch.tensor(-0.01, device=device), rtol=1e-5)


# --- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("rows", [66, 67], ids=["whole", "cut"])
def test_a_mean_over_rows_that_the_end_cuts_is_a_mean(backend: str, rows: int) -> None:
    """Two rows of four columns share one: of a row that is left over it is its own, and all weights move alike."""
    device = "cpu" if backend == "numba" else DEVICE
    p = torch.nn.Parameter(torch.zeros(rows, 4, device=device))
    opt = optimizer([p], backend, "factored", lr=0.01, weight_decay=0, warmup_steps=0)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        opt.step()
    row = opt.state[p]["exp_avg_sq_row"]
    assert row.numel() == (rows + 1) // 2
    assert row.allclose(row[0], rtol=1e-5)
    assert p.allclose(p[0, 0], rtol=1e-5)


# --- layouts ----------------------------------------------------------------------------------------------------------


def transposed(dtype: torch.dtype = torch.float32) -> Tensor:
    return noise(24, 8).to(dtype).t()


def of_svd(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linalg.svd(noise(24, 8), full_matrices=False)[2].to(dtype).mT[:, :4]


def of_qr(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linalg.qr(noise(24, 8)).Q.to(dtype)


def strided(dtype: torch.dtype = torch.float32) -> Tensor:
    return noise(24, 16).to(dtype)[:, ::2]


def channels_last(dtype: torch.dtype = torch.float32) -> Tensor:
    return noise(4, 3, 5, 5).to(dtype).to(memory_format=torch.channels_last)


LAYOUTS: list[Callable[..., Tensor]] = [transposed, of_svd, of_qr, strided, channels_last]


@pytest.mark.parametrize("make", LAYOUTS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("master", ["stochastic", "ecc8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layout_changes_nothing(make: Callable[..., Tensor], master: str, dtype: torch.dtype) -> None:
    """The tenth step too, which works on singular values: bits are those of the contiguous copy."""
    strange = torch.nn.Parameter(make(dtype).to(DEVICE))
    plain = torch.nn.Parameter(strange.detach().contiguous())
    strange._is_lora_layer = plain._is_lora_layer = True
    assert not strange.is_contiguous()
    for t in range(11):
        for p in (strange, plain):
            if t == 0:
                p.opt = optimizer([p], "torch", "8bit", rank_penalty_strength=0.1, master=master)
            gradient = noise(*p.shape, seed=t).to(dtype).to(DEVICE)
            p.grad = gradient if t % 2 else torch.empty_like(p).copy_(gradient)  # contiguous, and as the weight is
            p.opt.step()
    assert torch.equal(strange, plain)


@pytest.mark.kernels
def test_the_kernels_leave_other_layouts_to_torch() -> None:
    """Beside contiguous parameters, in one optimizer."""
    p = torch.nn.Parameter(transposed().to(DEVICE))
    q = torch.nn.Parameter(noise(8, 24).to(DEVICE))
    p._is_lora_layer = q._is_lora_layer = True
    opt = optimizer([p, q], "triton")
    before = [x.detach().clone() for x in (p, q)]
    for t in range(10):
        p.grad, q.grad = noise(8, 24, seed=t).to(DEVICE), noise(8, 24, seed=t).to(DEVICE)
        opt.step()
    assert not any(torch.equal(x, y) for x, y in zip((p, q), before, strict=True))


def test_an_expanded_view_is_refused_in_words() -> None:
    """Its elements are one in memory: an error when the optimizer is made, or when the view comes later."""
    with pytest.raises(ValueError, match=r"shape \(4, 8\) is an expanded view.*\.clone\(\)"):
        Automagic8bit([torch.nn.Parameter(torch.zeros(8).expand(4, 8))], lr=1e-3)
    p = torch.nn.Parameter(torch.zeros(4, 8))
    opt = Automagic8bit([p], lr=1e-3)
    p.data = torch.zeros(8).expand(4, 8)
    p.grad = torch.ones(4, 8)
    with pytest.raises(ValueError, match="expanded view"):
        opt.step()
    assert not opt.state


# --- numbers at the edge ----------------------------------------------------------------------------------------------


@pytest.mark.kernels
@pytest.mark.parametrize("storage", ["32bit", "8bit"])
@pytest.mark.parametrize("options", [{"percentile_clipping": 50}, {}], ids=["clipped", "not clipped"])
def test_what_is_skipped_is_settled_before_clipping(storage: str, options: dict[str, int]) -> None:
    """Elements on either side of 2^50, whose clipped value is far below: both backends skip the same ones."""

    def around(shape: tuple[int, ...], index: int, step: int) -> Tensor:
        g = noise(*shape, seed=step) * (2.0**49 if step > 1 else 1e10)
        g.view(-1)[3::50] = 2.0**50 * (1.5 if step > 1 else 0)
        g.view(-1)[4::50] = 2.0**50
        return g

    def build(backend: str):
        return optimizer([torch.nn.Parameter(noise(20, 32).to(DEVICE))], backend, storage, **options)

    run = follow(build, steps=3, gradients=around)
    assert not run.violations(storage)
    skipped = run.kernel.state[parameters_of(run.kernel)[0]]["tensor_stats"][3]
    assert skipped >= 2 * 13
    assert reference.MAX_GRADIENT == 2.0**50


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Another default dtype than float32, for the time of a test."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("storage", STORAGES)
def test_the_default_dtype_has_no_say(default_dtype: torch.dtype, backend: str, storage: str) -> None:
    """Steps, checkpoints, metrics and conversions are those of float32, to the bit."""
    found = []
    for dtype in (default_dtype, torch.float32):
        torch.set_default_dtype(dtype)
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(16, 50, generator=generator, dtype=torch.float32).to(DEVICE))
        p._is_lora_layer = True
        opt = optimizer([p], backend, storage, lr=None, auto_lr=True, percentile_clipping=50)
        for _ in range(10 if backend == "torch" else 2):
            p.grad = torch.randn(16, 50, generator=generator, dtype=torch.float32).to(DEVICE)
            opt.step()
        opt.load_state_dict(opt.state_dict())
        metrics = opt.get_metrics(per_parameter=True)
        opt.requantize(optim_bits=32)
        opt.step()
        found.append((p.detach(), opt.state[p]["state1"], opt.state[p]["tensor_stats"], metrics))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == pytest.approx(other, nan_ok=True)
    assert all(x.dtype == torch.float32 for x in found[0][:3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e25, 3e38])
def test_sums_that_overflow_skip_the_estimate(backend: str, size: float) -> None:
    """Weights beyond what float32 sums: the rate stays a number, and so do the weights."""
    p = torch.nn.Parameter((noise(32, 32) * size).clamp(-3.3e38, 3.3e38).to(DEVICE))
    opt = optimizer([p], backend, lr=None, auto_lr=True, weight_decay=0.0)
    for t in range(5):
        p.grad = noise(32, 32, seed=t).to(DEVICE)
        opt.step()
        p.data.mul_(-1)  # θ0 - θ is then beyond float32 for 3e38
    assert torch.isfinite(p).all()
    assert torch.isfinite(opt.param_groups[0]["auto_lr_rate"])
    assert torch.isfinite(opt.param_groups[0]["auto_lr_sums"]).all()
