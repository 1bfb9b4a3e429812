"""What other libraries ask of an optimizer by numbers: 8-bit states near 32-bit ones, and that it gets somewhere.

The tolerances are those of bitsandbytes' tests of its block-wise optimizers; the functions and kinds of small networks
those of timm's and pytorch_optimizer's tests, with a rate and without. Not taken over: a loss that has to fall within
10 steps without a rate (the search has not begun to move then), Adam's own numbers, sparse and complex parameters
(errors here), maximize and foreach (no options here). torch's own suite is in test_torch_suite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import FORMS
from torch import Tensor, nn

from automagic_bnb import Automagic8bit

MEAN_ERROR, MEAN_RELATIVE_ERROR = 6e-5, 6e-4
"""bitsandbytes': of weights of 0.1 in the mean square, after each step from equal weights at a rate of 1e-3."""


@pytest.mark.parametrize("form", ["8bit", "small"])
def test_eight_bit_states_keep_to_bitsandbytes_tolerances(form: str) -> None:
    """Of the forms that are 32-bit ones, rounded; factored ones are another second moment, and in four bits there are
    eight rates."""
    generator = torch.Generator().manual_seed(0)
    start = 0.1 * torch.randn(128, 256, generator=generator)
    exact, coded = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    common: dict[str, Any] = {"lr": 1e-3, "min_8bit_size": 0}
    reference = Automagic8bit([exact], **{**common, **FORMS["32bit"]})
    opt = Automagic8bit([coded], **{**common, **FORMS[form]})
    for _ in range(50):
        gradient = 0.01 * torch.randn(128, 256, generator=generator)
        exact.grad, coded.grad = gradient, gradient.clone()
        reference.step()
        opt.step()
        error = (exact - coded).detach().abs()
        assert error.mean() < MEAN_ERROR
        assert (error / (exact.detach().abs() + 1e-9)).median() < MEAN_RELATIVE_ERROR
        coded.data.copy_(exact.data)


def test_four_bits_would_not_keep_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: m with 16 codes in place of 256."""
    from automagic_bnb import quantization

    encode = quantization.encode

    def coarse(*args: Any, **kwargs: Any) -> Any:
        codes, *rest = encode(*args, **kwargs)
        return (codes & 0xF0, *rest)

    monkeypatch.setattr(quantization, "encode", coarse)
    with pytest.raises(AssertionError):
        test_eight_bit_states_keep_to_bitsandbytes_tolerances("8bit")


# --- functions --------------------------------------------------------------------------------------------------------


def rosenbrock(x: Tensor) -> Tensor:
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def himmelblau(x: Tensor) -> Tensor:
    return (x[0] ** 2 + x[1] - 11) ** 2 + (x[0] + x[1] ** 2 - 7) ** 2


def booth(x: Tensor) -> Tensor:
    return (x[0] + 2 * x[1] - 7) ** 2 + (2 * x[0] + x[1] - 5) ** 2


@pytest.mark.parametrize("lr", [3e-2, None], ids=["given", "found"])
@pytest.mark.parametrize(
    ("function", "start"), [(rosenbrock, (1.5, 1.5)), (himmelblau, (0.0, 0.0)), (booth, (-4.0, 4.0))]
)
def test_a_function_falls_to_a_thousandth(function: Callable[[Tensor], Tensor], start: Any, lr: float | None) -> None:
    x = nn.Parameter(torch.tensor(start))
    opt = Automagic8bit([x], lr=lr, weight_decay=0)
    first = function(x).item()
    for _ in range(1000):
        opt.zero_grad()
        function(x).backward()
        opt.step()
    assert function(x).item() < first / 1000


# --- small networks ---------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """One head over eight tokens, and a readout of their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.readout = nn.MultiheadAttention(16, 1, batch_first=True), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, 8, 16)
        return self.readout(self.inner(tokens, tokens, tokens, need_weights=False)[0].mean(1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "linear": (lambda: nn.Linear(128, 2), False),
    "layers with norms": (
        lambda: nn.Sequential(nn.Linear(128, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 2)), False
    ),
    "convolutions": (
        lambda: nn.Sequential(
            *(nn.Unflatten(1, (2, 8, 8)), nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)),
            *(nn.Flatten(), nn.Linear(128, 2)),
        ),
        False,
    ),
    "attention": (Attention, False),
    "embedding": (lambda: nn.Sequential(nn.Embedding(64, 16), nn.Flatten(), nn.Linear(128, 2)), True),
}  # fmt: skip
"""What makes each, and whether it takes eight words out of 64 in place of 128 numbers."""


@pytest.mark.parametrize("lr", [3e-3, None], ids=["given", "found"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_a_network_learns_its_examples(name: str, dtype: torch.dtype, lr: float | None) -> None:
    """64 of them, of two classes, by heart: to a fifth of the first loss in 200 steps."""
    torch.manual_seed(0)
    make, takes_words = NETWORKS[name]
    model = make().to(dtype)
    x = torch.randint(0, 64, (64, 8)) if takes_words else torch.randn(64, 128).to(dtype)
    y = torch.arange(64) % 2
    opt = Automagic8bit(model.parameters(), lr=lr)
    losses = []
    for _ in range(200):
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x).float(), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5
