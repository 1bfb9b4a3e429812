"""Step 9 in its kernel, against a full SVD and against the plain-PyTorch form of it.

A gradient of zeros without weight decay leaves a weight alone, so that an optimizer at its tenth step does nothing but
lower singular values.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import COMPILED, DEVICE, NEEDS_GPU, waiting_is_an_error
from torch import Tensor

from automagic_bnb.optimizer import Automagic, Automagic8bit

low_rank = pytest.importorskip("automagic_bnb.kernels.low_rank", reason="the kernels need Triton")
launching = pytest.importorskip("automagic_bnb.kernels.launching", reason="the kernels need Triton")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy: 1 / 0 in masked lanes

FLOAT32_ERROR = 1e-6
"""Over the largest singular value: see test_low_rank.py, whose bound this is."""
OTHER_ROUNDING = 2e-3
"""Share of narrow elements whose exact value lies within float32 rounding of a threshold of their own rounding."""
Shape = tuple[int, int]
SHAPES: tuple[Shape, ...] = ((16, 40), (40, 16), (8, 264), (1, 9), (9, 1), (1, 1), (5, 7), (12, 12), (33, 15))
LARGE_SHAPES: tuple[Shape, ...] = ((16, 3072), (18432, 16), (32, 1280), (10240, 32), (64, 4096), (4099, 64), (31, 999))


def normal(shape: Shape, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lowered(
    matrices: list[Tensor],
    threshold: float,
    backend: str = "triton",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> list[Tensor]:
    """What step 10 makes of these matrices, on the CPU; the threshold is 10 · lr · strength."""
    p = [torch.nn.Parameter(m.detach().clone().to(DEVICE, dtype)) for m in matrices]
    opt = at_tenth(p, **{"lr": threshold / 10, "backend": backend, **options})
    opt.step()
    return [x.detach().cpu() for x in p]


def at_tenth(parameters: list[Any], **options: Any) -> Automagic:
    """An optimizer whose next step is the tenth, with gradients of zeros."""
    fixed = {"lora": True, "weight_decay": 0.0, "rank_penalty_strength": 1.0, "min_8bit_size": 0, "min_lr": 0.0}
    opt = Automagic8bit(parameters, **{**fixed, **options})
    for p in parameters:
        p.grad = torch.zeros_like(p)
        opt.init_state(opt.param_groups[0], p)
        opt.state[p]["step"] = 9
    return opt


def by_svd(matrix: Tensor, threshold: float) -> Tensor:
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (left * (values - threshold).clamp_min(0)) @ right


def error(found: Tensor, matrix: Tensor, threshold: float) -> float:
    """Distance from the SVD's result over the largest singular value."""
    largest = torch.linalg.matrix_norm(matrix.double(), 2).clamp_min(1e-30)
    return ((found.double() - by_svd(matrix, torch.tensor(threshold).item())).abs().max() / largest).item()


def of_rank(shape: Shape, values: list[float]) -> Tensor:
    """A float32 matrix of these singular values; those it lacks are 0."""
    left, _ = torch.linalg.qr(normal((shape[0], len(values))).double())
    right, _ = torch.linalg.qr(normal((shape[1], len(values)), seed=1).double())
    return (left * torch.tensor(values, dtype=torch.float64) @ right.mT).float()


@pytest.mark.parametrize("shapes", [SHAPES, pytest.param(LARGE_SHAPES, marks=NEEDS_GPU)], ids=["small", "large"])
@pytest.mark.parametrize("threshold", [1e-3, 2.0, 9.0, 1e4])
def test_equals_a_full_svd(shapes: tuple[Shape, ...], threshold: float) -> None:
    """Tall, wide, square and vectors, sides of eights and not, thresholds from below to above all singular values."""
    matrices = [normal(shape, seed=i) for i, shape in enumerate(shapes)]
    found = lowered(matrices, threshold)
    errors = [error(x, m, threshold) for x, m in zip(found, matrices, strict=True)]
    assert max(errors) < FLOAT32_ERROR, dict(zip(shapes, errors, strict=True))


def test_the_check_can_fail() -> None:
    """Negative control: a threshold one percent off is told apart."""
    matrices = [normal(shape) for shape in SHAPES[:4]]
    found = lowered(matrices, 0.505)
    assert all(error(x, m, 0.5) > 10 * FLOAT32_ERROR for x, m in zip(found, matrices, strict=True))


@pytest.mark.parametrize("values", [[3.0, 1.0], [5.0, 5.0, 5.0], [1.0, 1e-3, 1e-6], [1e4, 1.0, 1e-4], [1e-12]])
@pytest.mark.parametrize("threshold", [1e-7, 5e-4, 0.5])
def test_deficient_and_repeated_values(values: list[float], threshold: float) -> None:
    """Rank-deficient matrices, equal singular values and wide spectra converge and equal the SVD too."""
    shapes: tuple[Shape, ...] = ((40, 8), (8, 40), (9, 9))
    matrices = [of_rank(shape, values) for shape in shapes]
    found = lowered(matrices, threshold)
    assert max(error(x, m, threshold) for x, m in zip(found, matrices, strict=True)) < FLOAT32_ERROR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stochastic", [True, False], ids=["stochastic", "nearest"])
@pytest.mark.parametrize("shapes", [SHAPES, pytest.param(LARGE_SHAPES, marks=NEEDS_GPU)], ids=["small", "large"])
def test_rounds_as_the_reference_does(dtype: torch.dtype, stochastic: bool, shapes: tuple[Shape, ...]) -> None:
    """The same random bits: all but a few elements are equal, and those are neighbours."""
    if not COMPILED and dtype == torch.bfloat16 and not stochastic:
        pytest.skip("the interpreter cuts the low bits off instead of rounding to the nearest bfloat16")
    matrices = [normal(shape, seed=i) for i, shape in enumerate(shapes)]
    ours, theirs = (lowered(matrices, 0.7, b, dtype, stochastic_rounding=stochastic) for b in ("triton", "torch"))
    errors = [(x.double() - y.double()).abs() / m.abs().max() for x, y, m in zip(ours, theirs, matrices, strict=True)]
    off = torch.cat([x.flatten() for x in errors])
    assert off.max() <= max(torch.finfo(dtype).eps, FLOAT32_ERROR)
    if dtype != torch.float32:
        assert (off > 0).sum() <= max(2, OTHER_ROUNDING * off.numel())


def test_other_random_bits_are_told_apart() -> None:
    """Negative control: another seed rounds many elements the other way."""
    matrices = [normal((16, 40))]
    ours, theirs = (lowered(matrices, 0.7, dtype=torch.bfloat16, seed=seed)[0] for seed in (0, 1))
    assert (ours != theirs).float().mean() > 0.1


def test_zero_and_not_finite_matrices_stay_as_they_are() -> None:
    """LoRA's B at its start; matrices with a NaN; and one whose threshold is 0. Others are lowered."""
    bad = [torch.zeros(5, 12), normal((12, 5)), normal((5, 12))]
    bad[1][2, 3] = bad[2][0, 0] = float("nan")
    good = normal((5, 12), seed=9)
    found = lowered([*bad, good], 0.5)
    for x, m in zip(found, bad, strict=False):
        assert torch.equal(x.nan_to_num(7.0), m.nan_to_num(7.0))
    assert error(found[-1], good, 0.5) < FLOAT32_ERROR
    assert torch.equal(lowered([good], 0.5, rank_penalty_strength=0.0)[0], good)


def test_two_runs_give_the_same_bits() -> None:
    matrices = [normal(shape) for shape in SHAPES[:4]]
    first, second = (lowered(matrices, 0.7, dtype=torch.bfloat16) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_odd_addresses() -> None:
    """Matrices that begin in the middle of a tensor."""
    whole = torch.cat([torch.zeros(1), normal((16, 40)).flatten()]).to(DEVICE)
    p = torch.nn.Parameter(whole[1:].view(16, 40))
    opt = at_tenth([p], lr=0.05, backend="triton")
    opt.step()
    assert p.data_ptr() % 16 != 0
    assert error(p.detach().cpu(), normal((16, 40)), 0.5) < FLOAT32_ERROR
    assert whole[0] == 0


def test_found_rate_sets_the_threshold() -> None:
    """With auto_lr it is d · ρ · 10 · strength, with d on the device."""
    options = {"auto_lr": True, "min_lr": 0.05, "max_lr": 0.05}
    found = lowered([normal((6, 20))], 0.5, **options)[0]
    assert error(found, normal((6, 20)), 0.5) < FLOAT32_ERROR


def test_groups_and_schedules() -> None:
    """Each has its group's threshold as it is now, and is lowered at its own tenth step, never without a gradient."""
    p = [torch.nn.Parameter(normal((4, 12), seed=i).to(DEVICE)) for i in range(4)]
    opt = at_tenth(p[:3], lr=1.0, backend="triton")
    opt.add_param_group({"params": p[3:], "lr": 1.0, "lora_rank_penalty": False})
    opt.param_groups[0]["lr"] = 0.03
    p[3].grad = torch.zeros_like(p[3])
    opt.init_state(opt.param_groups[1], p[3])
    opt.state[p[3]]["step"], opt.state[p[1]]["step"], p[2].grad = 9, 4, None
    opt.step()
    assert error(p[0].detach().cpu(), normal((4, 12)), 0.3) < FLOAT32_ERROR
    assert all(torch.equal(p[i].detach().cpu(), normal((4, 12), seed=i)) for i in (1, 2, 3))
    opt.step()  # the 11th of the first: nothing is done twice
    assert error(p[0].detach().cpu(), normal((4, 12)), 0.3) < FLOAT32_ERROR


@pytest.mark.parametrize(("shape", "options"), [((66, 70), {}), ((8, 12), {"master": "ecc8"})], ids=["rank", "24 bits"])
def test_what_the_kernel_does_not_take_is_lowered_too(shape: Shape, options: dict[str, Any]) -> None:
    """Short sides above 64, and weights of 24 bits, by the plain-PyTorch form."""
    dtype = torch.bfloat16 if options else torch.float32
    ours, theirs = (lowered([normal(shape)], 2.0, backend, dtype, **options)[0] for backend in ("triton", "torch"))
    assert torch.equal(ours, theirs)
    assert error(ours, normal(shape).to(dtype), 2.0) < (0.01 if options else FLOAT32_ERROR)


def test_what_has_no_gradient_is_not_lowered_again() -> None:
    """Of a matrix that the kernel does not take, too, when another is stepped while its count stays at the tenth."""
    p = [torch.nn.Parameter(normal((66, 70), seed=i).to(DEVICE)) for i in range(2)]
    opt = at_tenth(p, backend="triton")
    opt.step()
    once, p[1].grad = p[1].detach().clone(), None
    opt.step()
    assert torch.equal(p[1].detach(), once)
    assert not torch.equal(p[1].detach().cpu(), normal((66, 70), seed=1)), "negative control: it was lowered"


def test_one_launch_for_all_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred matrices of ranks up to 16, and one of 20, are two launches; at other steps there is none."""
    opt = at_tenth([torch.nn.Parameter(normal(s).to(DEVICE)) for s in ((4, 8),) * 100 + ((20, 24),)], backend="triton")
    launched: list[int] = []

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if kernel.fn.__name__ == "low_rank_kernel":
            launched.append(grid[0])

    monkeypatch.setattr(type(low_rank.low_rank_kernel), "run", note)
    monkeypatch.setattr(launching, "DIRECT", False)  # else what an earlier test has compiled is launched past it
    opt.step()
    assert sorted(launched) == [1, 100]
    opt.step()
    assert len(launched) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not COMPILED, reason="only a CUDA device can be waited for")
@pytest.mark.parametrize("options", [{}, {"lr": 1e-3, "auto_lr": True}], ids=["rate given", "rate found"])
def test_the_tenth_step_does_not_wait_for_the_device(options: dict[str, Any]) -> None:
    """And takes no memory to speak of: a table of 48 bytes a matrix."""
    p = [torch.nn.Parameter(normal((16, 3072)).to(DEVICE, torch.bfloat16)) for _ in range(50)]
    opt = Automagic8bit(p, **{"lr": 1e-3, "lora": True, **options})
    for number in range(1, 31):
        for x in p:
            x.grad = torch.ones_like(x)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with waiting_is_an_error(number > 10):
            opt.step()
        if number > 10:
            assert torch.cuda.max_memory_allocated() - held < 0.01 * sum(x.nbytes for x in p)
