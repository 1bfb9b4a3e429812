"""The optimizers that are compared: ours in its variants, and what people use instead.

Each is built with lr = 1e-4 and otherwise its own defaults. Packages are imported when an optimizer is built, so a
missing one costs only its own rows: whoever builds catches the error and reports it.
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
from workloads import DTYPES, WORKLOADS

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


WIDE: dict[str, Any] = {"mask_bits": 8, "mean_bits": 32}
BLOCKWISE: dict[str, Any] = {"factored": False, "mask_bits": 8}
LEAN: dict[str, Any] = {"mask_bits": 0, "came": False}
"""The options of the profile, which a benchmark may take one by one."""

_ALL = [
    _ours("automagic8bit"),
    _ours("automagic8bit-after-warmup", frozen_mask=True),
    _ours("automagic8bit-wide", **WIDE),
    _ours("automagic8bit-wide-after-warmup", frozen_mask=True, **WIDE),
    _ours("automagic8bit-blockwise", **BLOCKWISE),
    _ours("automagic8bit-blockwise-after-warmup", frozen_mask=True, **BLOCKWISE),
    _ours("automagic8bit-lean", **LEAN),
    _ours("automagic8bit-orthogonal", lora_direction="orthogonal"),
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
