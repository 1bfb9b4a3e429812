"""`lora_direction`: directions against a full SVD, the kernels and the compiled CPU step against plain PyTorch."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import COMPILED, DEVICE, DTYPES, FORMS, NEEDS_GPU
from torch import Tensor, nn

from automagic_bnb import direction
from automagic_bnb.optimizer import Automagic, Automagic8bit

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy: 1 / 0 in masked lanes

Shape = tuple[int, int]
SHAPES: tuple[Shape, ...] = ((16, 40), (40, 16), (4, 300), (257, 3), (1, 9), (9, 1), (12, 12), (33, 70), (3, 2500))
LARGE_SHAPES: tuple[Shape, ...] = ((16, 3072), (18432, 16), (32, 1280), (64, 4096), (4099, 64), (128, 999))
UNEVEN = 0.02
"""How far a singular value that is not below 1e-3 of the norm is left from the others', over them: three steps of
Newton-Schulz from at worst 0.68."""
OTHER_SUMS = 3e-3
"""Of a direction, over its largest element: the kernels iterate on the Gram matrix, where float32 knows values 1e-2 of
the largest, as a square matrix of noise has, to 1e-3; and one code of m that rounds otherwise is in all of a matrix."""
OTHER_DECISIONS = 0.01
"""Share of elements whose sign against the gradient, code or random rounding falls otherwise where sums differ."""


def normal(shape: Shape, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factors(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(matrix.double(), full_matrices=False)


# ------------------------------------------------------------------------------------------------------- the direction


@pytest.mark.parametrize("shape", [*SHAPES, (16, 2000), (2000, 64)], ids=str)
def test_all_singular_values_become_one(shape: Shape) -> None:
    """U Vᵀ of a full SVD, within what the iteration leaves; as large as the matrix was."""
    matrix = normal(shape)
    left, values, right = factors(matrix)
    found = direction.orthogonal(matrix[None])[0]
    kept = left.mT @ found.double() @ right.mT
    known = values > 1e-2 * values.norm()
    spread = torch.diagonal(kept)[known]
    assert spread.min() / spread.max() > 1 - 2 * UNEVEN
    assert (kept - torch.diag(torch.diagonal(kept))).abs().max() < 1e-4 * spread.max()
    assert found.square().mean().sqrt().item() == pytest.approx(matrix.square().mean().sqrt().item(), rel=1e-5)


def test_a_pair_of_rank_one_keeps_its_only_direction() -> None:
    """What has one direction is orthogonal already; directions of size 0 are not made up."""
    matrix = torch.outer(normal((8, 1))[:, 0], normal((50, 1), 1)[:, 0])
    torch.testing.assert_close(direction.orthogonal(matrix[None])[0], matrix, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [0.0, 1e-25])
def test_a_momentum_that_died_away_stays(size: float) -> None:
    """Nothing is made large that is rounding, and nothing divided by 0."""
    matrix = normal((4, 30)) * size
    assert torch.equal(direction.orthogonal(matrix[None])[0], matrix)


def test_matrices_of_a_batch_know_nothing_of_each_other() -> None:
    batch = torch.stack([normal((6, 20), seed) * 10.0**seed for seed in range(3)])
    for one, found in zip(batch, direction.orthogonal(batch), strict=True):
        torch.testing.assert_close(found, direction.orthogonal(one[None])[0], rtol=1e-5, atol=1e-6 * float(one.norm()))


# ------------------------------------------------------------------------------------------------ backends side by side


def named(shapes: tuple[Shape, ...], dtype: torch.dtype, device: torch.device = DEVICE) -> list[tuple[str, Any]]:
    """LoRA matrices, and one that is none."""
    made = [(f"{i}.lora_A", normal(shape, i) * 0.1) for i, shape in enumerate(shapes)] + [("full", normal((24, 40)))]
    return [(name, nn.Parameter(x.to(device, dtype))) for name, x in made]


def train(pairs: list[tuple[str, Any]], steps: int = 4, poison: int = -1, **options: Any) -> Automagic:
    opt = Automagic8bit(pairs, **{"lr": 1e-3, "lora_direction": "orthogonal", **options})
    for step in range(steps):
        for i, (_, p) in enumerate(pairs):
            g = normal(p.shape, 100 * step + i)
            if p.dim() == 2:  # a direction that stands out
                g += 3 * normal((len(p), 1), i) * normal((1, p.shape[1]), i)
            if step == poison:
                g.view(-1)[::7] = math.nan
            p.grad = g.to(p.device, p.dtype)
        opt.step()
    return opt


def alike(shapes: tuple[Shape, ...], backend: str, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """A backend's run beside plain PyTorch's; every matrix turned, and the one that is none moved as without."""
    device = torch.device("cpu") if backend == "numba" else DEVICE
    runs = []
    for how in ({"backend": "torch"}, {"backend": backend}, {"backend": backend, "lora_direction": None}):
        pairs = named(shapes, dtype, device)
        train(pairs, **{**options, **how})
        runs.append([p.detach().float() for _, p in pairs])
    for start, (expected, found, straight) in zip(named(shapes, dtype, device), zip(*runs, strict=True), strict=True):
        way = (expected - start[1].detach().float()).abs().max()
        apart = (found - expected).abs() > max(
            OTHER_SUMS, 2 * torch.finfo(dtype).eps * float(expected.abs().max() / way)
        ) * way
        assert apart.float().mean() <= OTHER_DECISIONS
        if start[0] == "full" or min(start[1].shape) == 1:  # a vector has one direction
            assert ((found - straight).abs() <= 4 * OTHER_SUMS * way).float().mean() >= 1 - OTHER_DECISIONS
        else:
            assert (found - straight).abs().max() > 0.1 * way


@pytest.mark.kernels
@pytest.mark.parametrize("form", FORMS)
def test_the_kernels_turn_in_every_storage(form: str) -> None:
    alike(((16, 40), (300, 5), (20, 264)), "triton", **{"min_8bit_size": 0, "lora_mask": True, **FORMS[form]})


@pytest.mark.kernels
@pytest.mark.parametrize("shapes", [SHAPES, pytest.param(LARGE_SHAPES, marks=NEEDS_GPU)], ids=["small", "large"])
def test_the_kernels_turn_every_shape(shapes: tuple[Shape, ...]) -> None:
    """Both ways round, rows of multiples of 8 and not, and a short side that is plain PyTorch's to turn."""
    alike((*shapes, (66, 80)), "triton", steps=3, optim_bits=32)


OPTIONS: dict[str, dict[str, Any]] = {
    "found": {"lr": None},
    "not finite": {"poison": 2},
    "not cautious, not confident": {"cautious": False, "came": False, "torque": False},
    "mask at rest": {"lora_mask": True, "warmup_steps": 1},
    "bounded": {"lora_mask": True, "min_lr": 9e-4, "max_lr": 1.1e-3},
    "clipped": {"percentile_clipping": 30},
    "counted there": {"capturable": True},
}


@pytest.mark.kernels
@pytest.mark.filterwarnings("ignore:option capturable")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_the_kernels_turn_under_every_option(options: dict[str, Any]) -> None:
    alike(((8, 40), (70, 4)), "triton", min_8bit_size=0, **options)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("master", ["stochastic", "none", "ecc8"])
def test_the_kernels_turn_narrow_weights(dtype: str, master: str) -> None:
    alike(((8, 40), (70, 4)), "triton", DTYPES[dtype], master=master, lr=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_the_compiled_step_turns(form: str) -> None:
    pytest.importorskip("numba")
    alike(((16, 40), (300, 5), (20, 264)), "numba", **{"min_8bit_size": 0, "lora_mask": True, **FORMS[form]})


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.filterwarnings("ignore:option capturable")
def test_the_compiled_step_turns_under_every_option(options: dict[str, Any]) -> None:
    pytest.importorskip("numba")
    alike(((8, 40), (70, 4)), "numba", torch.bfloat16, min_8bit_size=0, **options)


# -------------------------------------------------------------------------------------------------- what users would do


@pytest.mark.parametrize("backend", ["torch", "triton", "numba"])
def test_it_may_be_switched_on_in_mid_run(backend: str) -> None:
    """By the group's option: from the next step on, and no state has to be made for it."""
    if backend == "numba":
        pytest.importorskip("numba")
        if COMPILED:
            pytest.skip("it steps on the CPU")
    pairs = named(((8, 40),), torch.float32)
    opt = train(pairs, backend=backend, lora_direction=None)
    other = copy.deepcopy(pairs[0][1].detach())
    twin = [(name, nn.Parameter(p.detach().clone())) for name, p in pairs]
    straight = Automagic8bit(twin, lr=1e-3, backend=backend)
    straight.load_state_dict(opt.state_dict())
    opt.param_groups[0]["lora_direction"] = "orthogonal"
    for (_, p), (_, q) in zip(pairs, twin, strict=True):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(p)
    opt.step()
    straight.step()
    assert (pairs[0][1].detach() - other).abs().max() > 0
    assert not torch.equal(pairs[0][1], twin[0][1])
    assert torch.equal(pairs[1][1], twin[1][1])
    assert opt.state[pairs[0][1]].keys() == straight.state[twin[0][1]].keys()


def test_a_transposed_matrix_is_turned_as_it_stands() -> None:
    straight, turned = nn.Parameter(normal((40, 8))), nn.Parameter(normal((40, 8)).t().contiguous().t())
    for p in (straight, turned):
        train([("lora_B", p)], backend="torch", optim_bits=32)
    torch.testing.assert_close(straight, turned, rtol=0, atol=1e-6)


def test_what_is_no_thin_matrix_of_lora_goes_straight(no_warnings: None) -> None:
    """A convolution's kernel, a vector, a full matrix: as without the option, beside LoRA that is turned."""
    generator = torch.Generator().manual_seed(0)
    shapes = (("conv.lora_A", (4, 3, 3, 3)), ("lora_A.bias", (40,)), ("w", (30, 30)), ("large.lora_A", (300, 300)))
    runs = []
    for value in (None, "orthogonal"):
        generator.manual_seed(0)
        pairs = [(name, nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in shapes]
        pairs.append(("lora_B", nn.Parameter(normal((40, 4)))))
        train(pairs, backend="torch", lora_direction=value)
        runs.append([p.detach() for _, p in pairs])
    for straight, turned in list(zip(*runs, strict=True))[:-1]:
        assert torch.equal(straight, turned)
    assert not torch.equal(runs[0][-1], runs[1][-1])


@pytest.mark.parametrize("value", ["muon", "", 1, True])
def test_another_direction_is_refused(value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"lora_direction.*'orthogonal'"):
        Automagic8bit([nn.Parameter(torch.zeros(4, 4))], lr=1e-3, lora_direction=value)


def test_a_matrix_that_is_not_here_as_a_whole_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard has other directions than the matrix: an error that says so, and nothing has moved."""
    pairs = named(((8, 40), (16, 40)), torch.float32)
    cut = pairs[1][1]
    monkeypatch.setattr(direction, "local_tensor", lambda p: p.detach()[:4] if p is cut else p.detach())
    before = [p.detach().clone() for _, p in pairs]
    with pytest.raises(ValueError, match=r"lora_direction='orthogonal'.*\(16, 40\) is sharded.*lora_direction=None"):
        train(pairs, steps=1)
    assert all(torch.equal(p.detach(), x) for (_, p), x in zip(pairs, before, strict=True))
    train(pairs, steps=1, lora_direction=None)


def test_where_a_rate_is_found_the_turned_step_is_as_long() -> None:
    """The rms of the first steps is that of the straight ones: one rate serves for both."""
    moves = []
    for value in (None, "orthogonal"):
        p = nn.Parameter(torch.zeros(8, 400))
        opt = Automagic8bit(
            [("lora_A", p)], lr=1e-3, lora_direction=value, optim_bits=32, cautious=False, backend="torch"
        )
        p.grad = normal((8, 400))
        opt.step()
        moves.append(np.sqrt(p.detach().square().mean().item()))
    assert moves[0] == pytest.approx(moves[1], rel=1e-4)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("lr", [1e-3, None], ids=["given", "found"])
def test_one_matrix_a_call_is_turned_as_all_at_once(backend: str, lr: float | None) -> None:
    """A backward pass that steps: to the bits, in the rate found too."""
    together, alone = (named(((8, 40), (70, 4)), torch.float32) for _ in range(2))
    options = {"lr": lr, "backend": backend, "lora_direction": "orthogonal", "min_8bit_size": 0, "seed": 0}
    opts = [Automagic8bit(pairs, **options) for pairs in (together, alone)]
    for step in range(4):
        for i, ((_, p), (_, q)) in enumerate(zip(together, alone, strict=True)):
            g = normal(tuple(p.shape), 100 * step + i) + 0.5
            p.grad, q.grad = g.to(p.device), g.to(q.device)
        opts[0].step()
        for _, q in alone:
            opts[1].step_parameter(q, opts[1].param_groups[0])
    for (_, p), (_, q) in zip(together, alone, strict=True):
        assert torch.equal(p, q)
