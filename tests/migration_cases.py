"""Other optimizers and their checkpoints, for the tests of what is carried over from them.

bitsandbytes' checkpoints are made by bitsandbytes; ai-toolkit's and CameAMP's by `Theirs`, which keeps and saves its
state under their names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes
import bitsandbytes.functional
import torch
from checkpoint_cases import SHAPES

from automagic_bnb import Automagic8bit

WRAPPED = "__bnb_optimizer_quant_state__"
"""Where bitsandbytes saves its block-wise tensors."""
CLIP = 0.3
"""Small enough to bound the momentum carried over in some blocks."""
Edit = Callable[[dict[str, Any]], Any]


class Theirs(torch.optim.Optimizer):
    """Rates that follow sign agreement, with the state that ai-toolkit's Automagic or CameAMP's keep and save.

    Args:
        kind: "ai-toolkit": row and column means, rates as int8 with one scale. "cameamp": everything in float32.
            "cameamp8": the same as codes of bitsandbytes' `quantize_blockwise` with their `QuantState`.
    """

    def __init__(self, parameters: list[Any], kind: str, lr: float = 1e-4, bump: float = 3e-6) -> None:
        self.kind, self.bump = kind, bump
        common = {"lr": lr, "clip_threshold": 1.0, "weight_decay": 0.0}
        toolkit = {**common, "eps": (1e-30, 1e-3), "beta2": 0.999}
        cameamp = {**common, "eps": (1e-30, 1e-16, 1e-8), "betas": (0.8, 0.99, 0.999), "warmup_steps": 500}
        super().__init__(parameters, toolkit if kind == "ai-toolkit" else cameamp)
        self.second_decay = 0.999 if kind == "ai-toolkit" else 0.99

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad.float(), self.state[p], group)

    def _update(self, p: Any, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state.update(step=0, lr_mask=torch.full(p.shape, group["lr"]))
            state["last_polarity"] = torch.zeros(p.shape, dtype=torch.bool)
            state.update(self._moments(p))
        state["step"] += 1
        u = g / self._second(state, g * g + 1e-30).sqrt()
        u /= (u.square().mean().sqrt() / group["clip_threshold"]).clamp_min(1)
        if self.kind != "ai-toolkit":
            state["exp_avg"].lerp_(u, 1 - group["betas"][0])
            u = state["exp_avg"]
        agrees = (state["last_polarity"] == (g > 0)) * 2 - 1
        state["last_polarity"] = g > 0
        if state["step"] > 1:
            state["lr_mask"] = (state["lr_mask"] + self.bump * agrees).clamp(1e-7, 1e-3)
        p.sub_(state["lr_mask"] * u)

    def _moments(self, p: Any) -> dict[str, torch.Tensor]:
        if self.kind != "ai-toolkit":
            return {name: torch.zeros(p.shape) for name in ("exp_avg", "s", "exp_avg_sq", "exp_avg_res")}
        if p.dim() < 2:
            return {"exp_avg_sq": torch.zeros(p.shape)}
        return {
            "exp_avg_sq_row": torch.zeros(p.shape[:-1]),
            "exp_avg_sq_col": torch.zeros(p.shape[:-2] + p.shape[-1:]),
        }

    def _second(self, state: dict[str, Any], squares: torch.Tensor) -> torch.Tensor:
        share = 1 - self.second_decay
        if "exp_avg_sq" in state:
            return state["exp_avg_sq"].lerp_(squares, share)
        row = state["exp_avg_sq_row"].lerp_(squares.mean(-1), share)
        col = state["exp_avg_sq_col"].lerp_(squares.mean(-2), share)
        return row.unsqueeze(-1) * col.unsqueeze(-2) / row.mean(-1, keepdim=True).unsqueeze(-1)

    def state_dict(self) -> dict[str, Any]:
        saved = copy.deepcopy(super().state_dict())
        saved["state"] = {key: self._saved(state) for key, state in saved["state"].items()}
        if self.kind != "ai-toolkit":
            saved["magic8_version" if self.kind == "cameamp8" else "magic_version"] = 1
        return saved

    def _saved(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state of one parameter as the original saves it."""
        rates = state.pop("lr_mask")
        state["avg_lr"] = rates.mean()
        if self.kind == "ai-toolkit":
            scale = rates.max().item() / 127
            state["lr_mask"] = {
                "quantized": (rates / scale).round().to(torch.int8),
                "scale": scale,
                "orig_dtype": torch.float32,
            }
            return {**state, "last_step": state["step"], "RMS": torch.tensor(0.1)}
        moments = {"lr_mask": rates, **{k: state.pop(k) for k in ("exp_avg", "s", "exp_avg_sq", "exp_avg_res")}}
        state.update(avg_lr=rates.mean().item(), lr_max=1e-6)
        if self.kind == "cameamp":
            return {**state, **moments}
        for name, x in moments.items():
            codes, quant_state = bitsandbytes.functional.quantize_blockwise(x, blocksize=1024)
            state.update({f"{name}_q": codes, f"{name}_q_scale": quant_state})
        return state


ADAMS = {"adamw8": bitsandbytes.optim.AdamW8bit, "adamw": bitsandbytes.optim.AdamW}
KINDS = [*ADAMS, "ai-toolkit", "cameamp", "cameamp8"]
WITH_RATES = KINDS[2:]


def theirs(kind: str, parameters: list[Any]) -> Any:
    return ADAMS[kind](parameters, lr=1e-3, min_8bit_size=0) if kind in ADAMS else Theirs(parameters, kind)


def checkpoint(tools: Any, kind: str, steps: int = 30, shapes: Any = SHAPES, dtype: Any = torch.float32) -> Any:
    """What another optimizer saved after some steps; two groups."""
    parameters = tools.parameters(*shapes, dtype=dtype)
    opt = theirs(kind, [{"params": parameters[:2]}, {"params": parameters[2:]}])
    tools.train(opt, parameters, range(steps))
    return opt.state_dict()


def build(tools: Any, lr: float | None = None, shapes: Any = SHAPES, dtype: Any = torch.float32, **options: Any) -> Any:
    p = tools.parameters(*shapes, dtype=dtype)
    options = {"min_8bit_size": 0, "clip_threshold": CLIP, **options}
    return Automagic8bit([{"params": p[:2]}, {"params": p[2:]}], lr=lr, **options)
