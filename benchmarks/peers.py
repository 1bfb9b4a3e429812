"""The optimizers that are compared: ours in its variants, and what people use instead.

Each is built with lr = 1e-4 and otherwise its own defaults. Packages are imported when an optimizer is built, so a
missing one costs only its own rows: whoever builds catches the error and reports it.

`check_parity` holds our kernels against the plain-torch rule; figures of kernels that fail it mean nothing.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from workloads import DTYPES, GRADIENT_STD, WEIGHT_STD, WORKLOADS

LR = 1e-4
FOREVER = 10**9

Params = Iterable[torch.nn.Parameter]


@dataclass(frozen=True)
class Peer:
    """One row of a table. For ours, `options` are what it is built with and `frozen_mask` says that the learning-rate
    mask no longer moves after the first step."""

    name: str
    build: Callable[[Params], torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    ours: bool = False
    frozen_mask: bool = False


BASELINE = "bnb-adamw8bit"


def _torch_adamw(**kw: Any) -> Callable[[Params], torch.optim.Optimizer]:
    return lambda params: torch.optim.AdamW(params, lr=LR, **kw)


def _bnb(name: str) -> Callable[[Params], torch.optim.Optimizer]:
    def build(params: Params) -> torch.optim.Optimizer:
        import bitsandbytes as bnb

        return getattr(bnb.optim, name)(params, lr=LR)

    return build


def _optimi_adamw(params: Params) -> torch.optim.Optimizer:
    import optimi

    # Kahan summation is its own default for 16-bit parameters, and off for 32-bit ones.
    return optimi.AdamW(params, lr=LR, triton=True)


def _flash_adamw(master_weight_bits: int | None) -> Callable[[Params], torch.optim.Optimizer]:
    def build(params: Params) -> torch.optim.Optimizer:
        import flashoptim

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it advises against 16-bit parameters without a master copy
            return flashoptim.FlashAdamW(params, lr=LR, master_weight_bits=master_weight_bits)

    return build


def _torchao_adamw8bit(**kw: Any) -> Callable[[Params], torch.optim.Optimizer]:
    def build(params: Params) -> torch.optim.Optimizer:
        from torchao.optim import AdamW8bit

        return AdamW8bit(params, lr=LR, **kw)

    return build


def _came(params: Params) -> torch.optim.Optimizer:
    from pytorch_optimizer import CAME

    return CAME(params, lr=LR)


def automagic(params: Params, **options: Any) -> torch.optim.Optimizer:
    """Ours. The kernels run on a GPU, or on a CPU in Triton's interpreter; elsewhere the plain-torch rule does."""
    from automagic_bnb import Automagic8bit

    return Automagic8bit(params, **{"lr": LR, **options})


def kernels_run(device: torch.device) -> bool:
    """Whether ours can be asked for its kernels here."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def _ours(name: str, frozen_mask: bool = False, **options: Any) -> Peer:
    options = {"warmup_steps": 1 if frozen_mask else FOREVER, **options}

    def build(params: Params) -> torch.optim.Optimizer:
        params = list(params)
        backend = "triton" if kernels_run(params[0].device) else None
        return automagic(params, **{"backend": backend, **options})

    return Peer(name, build, options, ours=True, frozen_mask=frozen_mask)


_ALL = [
    _ours("automagic8bit"),
    _ours("automagic8bit-after-warmup", frozen_mask=True),
    _ours("automagic8bit-factored", factored=True),
    _ours("automagic8bit-factored-after-warmup", frozen_mask=True, factored=True),
    _ours("automagic-32bit", optim_bits=32),
    _ours("automagic8bit-torch-backend", backend="torch"),
    Peer(BASELINE, _bnb("AdamW8bit")),
    Peer("bnb-adamw32bit", _bnb("AdamW")),
    Peer("bnb-ademamix8bit", _bnb("AdEMAMix8bit")),
    Peer("bnb-lion8bit", _bnb("Lion8bit")),
    Peer("torch-adamw-fused", _torch_adamw(fused=True)),
    Peer("torch-adamw-foreach", _torch_adamw(foreach=True)),
    Peer("optimi-adamw-triton", _optimi_adamw),
    Peer("flash-adamw", _flash_adamw(None)),
    Peer("flash-adamw-master24", _flash_adamw(24)),
    Peer("came", _came),
    Peer("torchao-adamw8bit", _torchao_adamw8bit()),
    Peer("torchao-adamw8bit-sr", _torchao_adamw8bit(bf16_stochastic_round=True)),
]
PEERS: dict[str, Peer] = {peer.name: peer for peer in _ALL}


def select(names: Iterable[str], table: dict[str, Any], what: str) -> list[Any]:
    """The entries of `table` that match any of the names or shell patterns, in the table's order.

    Raises:
        SystemExit: a name that matches nothing.
    """
    wanted: Sequence[str] = list(names)
    for name in wanted:
        if not fnmatch.filter(table, name):
            raise SystemExit(f"no {what} matches {name!r}; there are: {', '.join(table)}")
    return [entry for key, entry in table.items() if any(fnmatch.fnmatch(key, name) for name in wanted)]


def argument_parser(description: str, name: str) -> argparse.ArgumentParser:
    """The options that the benchmarks share; `name` is what their result files are called."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=["*"], help=f"names or patterns of {', '.join(WORKLOADS)}")
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=list(DTYPES))
    parser.add_argument("--optimizers", nargs="+", default=["*"], help=f"names or patterns of {', '.join(PEERS)}")
    parser.add_argument("--limit", type=int, help="cut tensors down to this many elements")
    parser.add_argument("--scale", type=float, help="cut the number of tensors down to this fraction")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the results")
    parser.add_argument("--name", default=name, help="name of the result files")
    return parser


# --- parity of our kernels with the rule -----------------------------------------------------------------------------

PARITY_STEPS = 3
PARITY_SHAPES = [(1,), (255,), (257,), (4099,), (33, 129), (3, 1000), (65, 16), (16, 1031), (7, 5, 3, 3), (40, 9, 3, 3)]
PARITY_LARGE = [(301, 515), (256, 320)]  # make the fractions below mean something; too slow for Triton's interpreter
PARITY_LORA = {(65, 16), (16, 1031)}
PARITY_OPTIONS = {"lr": 1e-3, "weight_decay": 1.0, "min_8bit_size": 1024}
"""Enough decay to show in one step, and small odd tensors in 8 bits too."""

MAX_DIFFERING = 1e-3
"""Codes and 16-bit parameters: where a value lies on the line between two of them, the two may choose differently."""
MAX_JUMP = 1
"""Such codes are neighbours."""
TOLERANCE = 1e-4
"""Relative, for float32 quantities: far above rounding, far below any wrong formula."""
MAX_OUTLIERS = 2e-3
"""Elements beyond TOLERANCE: the rule has thresholds (cautious sign, edges), and rounding can tip a block over one."""
MAX_NORM = 0.02
"""‖ours − rule‖ / ‖rule‖ of any single tensor: none may be wrong, however small."""


@dataclass
class Tally:
    """Differences in one quantity over all tensors."""

    limit: float
    elements: int = 0
    differing: int = 0
    jump: int = 0
    norm: float = 0.0

    def add(self, differing: Tensor, jump: int = 0, norm: float = 0.0) -> None:
        self.elements += differing.numel()
        self.differing += int(differing.sum())
        self.jump = max(self.jump, jump)
        self.norm = norm if not norm <= self.norm else self.norm  # a NaN stays

    def complaint(self) -> str:
        if not self.norm <= MAX_NORM:
            return f"relative error {self.norm:.2g} in one tensor (allowed {MAX_NORM:g})"
        if self.jump > MAX_JUMP:
            return f"codes {self.jump} apart (allowed {MAX_JUMP})"
        if self.differing > self.limit * self.elements:
            return f"{self.differing} of {self.elements} elements differ (allowed {self.limit:.1%})"
        return ""


def _relative_error(a: Tensor, b: Tensor) -> float:
    error, norm = (torch.linalg.vector_norm(x.float()).item() for x in (a - b, b))
    return error / norm if norm > 0 else float(error != 0)


class Comparison:
    """Our tensors against the rule's after the same step: `add` each pair, then read `complaints`."""

    def __init__(self) -> None:
        self.tallies: dict[str, Tally] = {}
        self.failures: list[str] = []

    def add_parameter(self, ours: Tensor, rule: Tensor, start: Tensor) -> None:
        moved, should = ours.float() - start.float(), rule.float() - start.float()
        if ours.dtype == torch.float32:
            self._floats("update", moved, should)
        else:  # rounded stochastically, with the same random bits
            self._tally("parameter", MAX_DIFFERING).add(~(ours == rule), norm=_relative_error(moved, should))

    def add_state(self, ours: dict[str, Any], rule: dict[str, Any]) -> None:
        if ours.keys() != rule.keys():
            self.failures.append(f"states {sorted(ours)} against {sorted(rule)}")
            return
        for key, b in rule.items():
            a = ours[key]
            if not isinstance(b, Tensor):
                self.failures += [] if a == b else [f"{key}: {a} against {b}"]
            elif b.dtype == torch.uint8:
                self._codes(key, a.int(), b.int())
            else:
                self._floats(key, a, b)

    def complaints(self) -> list[str]:
        return self.failures + [f"{key}: {text}" for key, t in self.tallies.items() if (text := t.complaint())]

    def _tally(self, key: str, limit: float) -> Tally:
        return self.tallies.setdefault(key, Tally(limit))

    def _codes(self, key: str, a: Tensor, b: Tensor) -> None:
        tally = self._tally(key, MAX_DIFFERING)
        if key == "lr_mask":  # the exponent, and in bit 0 the polarity of the gradient
            tally.add((a & 1) != (b & 1))
            a, b = a >> 1, b >> 1
        apart = (a - b).abs()
        tally.add(apart > 0, jump=int(apart.max()))

    def _floats(self, key: str, a: Tensor, b: Tensor) -> None:
        allowed = TOLERANCE * (b.abs() + b.square().mean().sqrt())
        self._tally(key, MAX_OUTLIERS).add(~((a - b).abs() <= allowed), norm=_relative_error(a, b))


def check_parity(peer: Peer, dtype: torch.dtype, device: torch.device) -> list[str]:
    """What is wrong with our kernels under this variant's options, over a few steps on odd shapes; empty if nothing.

    After each step ours goes on from the rule's tensors: a code that fell the other way would otherwise be decoded,
    updated and encoded again, and near zero the next one lies several codes away.
    """
    shapes = PARITY_SHAPES + (PARITY_LARGE if device.type == "cuda" else [])
    generator = torch.Generator(device).manual_seed(1)

    def draw(std: float) -> list[Tensor]:
        return [(torch.randn(s, generator=generator, device=device) * std).to(dtype) for s in shapes]

    starts = draw(WEIGHT_STD)

    def begin(backend: str) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        params = [torch.nn.Parameter(value.clone()) for value in starts]
        for p, shape in zip(params, shapes, strict=True):
            p._is_lora_layer = shape in PARITY_LORA  # type: ignore[attr-defined]
        return params, automagic(params, **{**peer.options, **PARITY_OPTIONS, "backend": backend})

    ours, rule = begin("triton"), begin("torch")
    found: list[str] = []
    for number in range(1, PARITY_STEPS + 1):
        before = [p.detach().clone() for p in rule[0]]
        gradients = draw(GRADIENT_STD)
        _step(*ours, gradients)
        _step(*rule, gradients)
        found += [f"step {number}, {text}" for text in _compare(ours, rule, before)]
        if number == 1:  # the check must notice a wrong step
            altered = begin("torch")
            _step(*altered, [torch.where(torch.rand_like(g, dtype=torch.float32) < 0.02, -g, g) for g in gradients])
            found += [] if _compare(ours, altered, before) else ["the check does not notice negated gradients"]
        if found:
            break
        _continue_from(ours, rule)
    return found


def _step(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, gradients: list[Tensor]) -> None:
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()
    optimizer.step()


def _compare(ours: Any, rule: Any, before: list[Tensor]) -> list[str]:
    comparison = Comparison()
    for a, b, start in zip(ours[0], rule[0], before, strict=True):
        comparison.add_parameter(a.detach(), b.detach(), start)
        comparison.add_state(ours[1].state[a], rule[1].state[b])
    return comparison.complaints()


@torch.no_grad()
def _continue_from(ours: Any, rule: Any) -> None:
    for a, b in zip(ours[0], rule[0], strict=True):
        a.copy_(b)
        for key, value in rule[1].state[b].items():
            if isinstance(value, Tensor):
                ours[1].state[a][key].copy_(value)
