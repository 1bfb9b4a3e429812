"""Coming from another optimizer: options in our words, and what its checkpoints carry over.

bitsandbytes' checkpoints are made by bitsandbytes; ai-toolkit's and CameAMP's by `Theirs`, which keeps and saves its
state under their names. What should be carried is stated in numpy float64 and shares nothing with the package.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import warnings
from collections.abc import Callable
from typing import Any

import bitsandbytes
import bitsandbytes.functional
import numpy as np
import pytest
import torch
from rule_in_float64 import TileMeans

from automagic_bnb import Automagic8bit, Automagic32bit, migrate_options

STORAGES = {"32bit": {"optim_bits": 32}, "8bit": {}, "factored": {"factored": True}}
SHAPES = ((64, 64), (257,), (16, 256), (8, 4, 3, 3))
BLOCK = 256
WRAPPED = "__bnb_optimizer_quant_state__"
"""Where bitsandbytes saves its block-wise tensors."""
CLIP = 0.3
"""Small enough to bound the momentum carried over in some blocks."""
RELATIVE_ERROR = 2e-5
"""Of a chain of float32 operations, powers and logarithms among them."""

# -------------------------------------------------------------------------------------------------------------- options

AI_TOOLKIT_DEFAULTS = {
    "lr": 1e-6,
    "min_lr": 1e-7,
    "max_lr": 1e-3,
    "lr_bump": 1e-6,
    "eps": (1e-30, 1e-3),
    "clip_threshold": 1.0,
    "beta2": 0.999,
    "weight_decay": 0.0,
    "do_paramiter_swapping": False,
    "paramiter_swapping_factor": 0.1,
}
SPATIAL = {
    "edge_suppression": True,
    "edge_threshold": 0.6,
    "edge_penalty": 0.1,
    "background_regularization": True,
    "spatial_awareness": True,
    "frequency_penalty": 0.05,
    "detail_preservation": 0.8,
    "lora_rank_penalty": True,
    "rank_penalty_strength": 0.01,
    "low_rank_emphasis": 1.2,
}
CAMEAMP_DEFAULTS = {
    "lr": 1e-6,
    "min_lr": 1e-7,
    "max_lr": 1e-3,
    "lr_bump": 3e-6,
    "eps": (1e-30, 1e-16, 1e-8),
    "clip_threshold": 1.0,
    "betas": (0.8, 0.99, 0.999),
    "eta": 2.0,
    "beta1_decay": 0.9995,
    "weight_decay": 5e-4,
    "warmup_steps": 500,
    "context_window": 30,
    "adaptation_rate": 0.25,
    "came": True,
    "full_finetune": False,
    "verbose": False,
    "optim_bits": 8,
    "percentile_clipping": 100,
    "block_wise": True,
    "min_8bit_size": 4096,
    "stable_emb": False,
    "fused_adam": False,
    "force_8bit": False,
    **SPATIAL,
}
"""Of the 8-bit variant with spatial penalties, which has the most."""
CAMEAMP_ELSEWHERE = {
    "came_enabled": True,
    "cautious": True,
    "la_layers": 3,
    "alphas": (0.6, 0.75, 0.85, 0.85),
    "ks": (5, 5, 3, 3),
    "tam_correlation_method": "auto",
    "tam_large_tensor_threshold": 1000,
    "tam_use_inplace_ops": True,
    "use_buffer_cache": True,
    "buffer_cache_size_limit": 10,
    "auto_clear_cache_steps": 1000,
    "enable_stage_optimization": True,
    "warmup_regularization_scale": 0.5,
    "stable_regularization_scale": 0.8,
    "mature_regularization_scale": 0.3,
    "disable_heavy_ops_after_steps": 1000,
    "progressive_feature_disable": True,
}
"""Options of the other variants."""


def migrated(options: dict[str, Any], source: str) -> tuple[dict[str, Any], set[str]]:
    """The options in our words, and the names of theirs that were warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = migrate_options(options, source)
    said = [str(w.message) for w in caught]
    assert all(f" of {source}: " in message for message in said)
    return result, {message.removeprefix("option ").split("=")[0] for message in said}


def test_every_option_of_ai_toolkit() -> None:
    """At their defaults: the rate starts where theirs does and is found; only what has no counterpart is warned of."""
    result, warned = migrated(AI_TOOLKIT_DEFAULTS, "ai-toolkit")
    assert result == {
        "lr": 1e-6,
        "auto_lr": True,
        "min_lr": 1e-7,
        "max_lr": 1e-3,
        "eps": (1e-30, 1e-16),
        "clip_threshold": 1.0,
        "betas": (0.9, 0.999, 0.999),
        "weight_decay": 0.0,
    }
    assert warned == {"lr_bump", "paramiter_swapping_factor"}


def test_every_option_of_cameamp() -> None:
    """Those that are ours too come through as they are; of the others each is warned of."""
    result, warned = migrated({**CAMEAMP_DEFAULTS, **CAMEAMP_ELSEWHERE}, "cameamp")
    same = [*("min_lr", "max_lr", "betas", "weight_decay", "warmup_steps", "came", "cautious", "verbose"), *SPATIAL]
    same += ["optim_bits", "percentile_clipping", "block_wise", "min_8bit_size", "stable_emb", "force_8bit"]
    theirs = {**CAMEAMP_DEFAULTS, **CAMEAMP_ELSEWHERE}
    rest = {"lr": 1e-6, "auto_lr": True, "eps": (1e-30, 1e-16), "clip_threshold": 1.0}
    assert result == {**{name: theirs[name] for name in same}, **rest}
    silent = {*same, "eps", "clip_threshold", "came_enabled", "fused_adam"}
    assert warned == theirs.keys() - silent


@pytest.mark.parametrize("name", ["Adam", "Adam8bit", "AdamW", "AdamW8bit", "AdamW32bit", "PagedAdamW8bit"])
def test_every_option_of_bitsandbytes(name: str) -> None:
    """As its signatures have them."""
    signature = inspect.signature(getattr(bitsandbytes.optim, name).__init__).parameters
    given = {k: p.default for k, p in signature.items() if k not in ("self", "params")}
    result, warned = migrated(given, "bitsandbytes")
    kept = {k: v for k, v in given.items() if k not in ("amsgrad", "args", "betas", "eps")}
    assert result == {**kept, "betas": (0.9, 0.999, 0.999), "eps": (1e-8 * 1e-8, 1e-16)}
    assert warned == {"optim_bits"}
    assert migrated({"percentile_clipping": 95, "block_wise": True}, "bitsandbytes")[0]["percentile_clipping"] == 95


@pytest.mark.parametrize(
    ("source", "given", "expected"),
    [
        ("ai-toolkit", {"lr": 0.5}, {"lr": 1e-6, "auto_lr": True}),
        ("ai-toolkit", {"lr": 1e-3}, {"lr": 1e-3, "auto_lr": True}),
        ("ai-toolkit", {"lr": "1e-5"}, {"lr": 1e-5, "auto_lr": True}),
        ("ai-toolkit", {"eps": 1e-20}, {"eps": (1e-20, 1e-16)}),
        ("ai-toolkit", {"eps": [1e-20, 1e-3]}, {"eps": (1e-20, 1e-16)}),
        ("ai-toolkit", {"weight_decay": 0.1}, {"weight_decay": 0.1}),
        ("cameamp", {"eps": (1e-30, 1e-15)}, {"eps": (1e-30, 1e-15)}),
        ("cameamp", {"came_enabled": False}, {"came": False}),
        ("cameamp", {"clip_threshold": 2}, {"clip_threshold": 2.0}),
        ("bitsandbytes", {"lr": 5e-5, "weight_decay": 0}, {"lr": 5e-5, "weight_decay": 0.0}),
    ],
)
def test_values_in_our_words(source: str, given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert migrated(given, source)[0] == {**migrated({}, source)[0], **expected}


def test_what_was_left_out() -> None:
    """Weight decay and rate are choices of the training: theirs are taken over. The rest takes our defaults."""
    assert migrate_options({}) == {"weight_decay": 0.0}
    assert migrate_options({}, "bitsandbytes") == {"lr": 1e-3, "weight_decay": 1e-2}
    assert migrate_options({}, "cameamp") == {}


@pytest.mark.parametrize(
    ("source", "quiet", "loud"),
    [
        ("ai-toolkit", {"clip_threshold": 1.0}, {"clip_threshold": 0.5}),
        ("ai-toolkit", {"lr": 1e-4}, {"lr": 1e-2}),
        ("ai-toolkit", {"do_paramiter_swapping": False}, {"do_paramiter_swapping": True}),
        ("cameamp", {"weight_decay": 5e-4}, {"weight_decay": 2.5}),
        ("cameamp", {"edge_threshold": 0.6}, {"edge_threshold": 0.9}),
        ("cameamp", {"full_finetune": True}, {"full_finetune": False}),
        ("bitsandbytes", {"amsgrad": False}, {"amsgrad": True}),
        ("bitsandbytes", {"args": None}, {"args": object()}),
        ("bitsandbytes", {"optim_bits": 8}, {"optim_bits": 32}),
    ],
)
def test_only_values_that_change_something_are_warned_of(
    source: str, quiet: dict[str, Any], loud: dict[str, Any]
) -> None:
    assert migrated(quiet, source)[1] == set()
    assert migrated(loud, source)[1] == loud.keys()
    assert migrated(loud, source)[1] == set()  # once in a process


@pytest.mark.parametrize(
    ("given", "source", "error", "message"),
    [
        ({"beta_2": 0.9}, "ai-toolkit", TypeError, "ai-toolkit has no option 'beta_2'; did you mean 'beta2'"),
        ({"wd": 0.9}, "ai-toolkit", TypeError, "did you mean 'weight_decay'"),
        ({"parameter_swapping_factor": 1}, "ai-toolkit", TypeError, "did you mean 'paramiter_swapping_factor'"),
        ({"factored": True}, "ai-toolkit", TypeError, "no option 'factored'"),
        ({"edge_treshold": 0.6}, "cameamp", TypeError, "cameamp has no option 'edge_treshold'.*'edge_threshold'"),
        ({"beta": (0.9, 0.99)}, "bitsandbytes", TypeError, "bitsandbytes has no option 'beta'.*'betas'"),
        ({"beta2": 1.5}, "ai-toolkit", ValueError, r"betas=\(0.9, 1.5, 0.999\) \(from beta2=1.5 of ai-toolkit\)"),
        ({"beta2": None}, "ai-toolkit", TypeError, "from beta2=None of ai-toolkit"),
        ({"eps": ()}, "ai-toolkit", ValueError, "eps="),
        ({"lr": "fast"}, "ai-toolkit", TypeError, "lr='fast'"),
        ({"lr": -1}, "cameamp", ValueError, "lr=-1"),
        ({"min_lr": 1e-2, "max_lr": 1e-3}, "ai-toolkit", ValueError, "min_lr=0.01: must not exceed max_lr=0.001"),
        ({"betas": (0.9, 2.0)}, "bitsandbytes", ValueError, "betas="),
        ({"block_wise": False}, "bitsandbytes", ValueError, "block_wise=False"),
        ({}, "adam", ValueError, "source='adam': must be one of 'ai-toolkit', 'cameamp', 'bitsandbytes'"),
        ([("lr", 1e-4)], "ai-toolkit", TypeError, "must be a dict"),
    ],
)
def test_wrong_options_are_errors(given: Any, source: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        migrate_options(given, source)


@pytest.mark.parametrize(
    ("given", "source"),
    [(AI_TOOLKIT_DEFAULTS, "ai-toolkit"), (CAMEAMP_DEFAULTS, "cameamp"), ({"is_paged": True}, "bitsandbytes")],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_migrated_options_build_an_optimizer(given: dict[str, Any], source: str, tools: Any) -> None:
    options = migrate_options(given, source)
    opt = Automagic8bit(tools.parameters((64, 64)), **options)
    tools.train(opt, opt.param_groups[0]["params"], range(2))
    assert {name: opt.param_groups[0].get(name, options[name]) for name in options} == options


# ---------------------------------------------------------------------------------------------- the others' checkpoints


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


def through_file(x: Any, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def build(tools: Any, lr: float | None = None, shapes: Any = SHAPES, dtype: Any = torch.float32, **options: Any) -> Any:
    p = tools.parameters(*shapes, dtype=dtype)
    options = {"min_8bit_size": 0, "clip_threshold": CLIP, **options}
    return Automagic8bit([{"params": p[:2]}, {"params": p[2:]}], lr=lr, **options)


def parameters_of(opt: Any) -> list[Any]:
    return [p for group in opt.param_groups for p in group["params"]]


# ------------------------------------------------------------------------------------------ what should be carried over


def blocks_of(x: np.ndarray) -> np.ndarray:
    """The block that each element belongs to."""
    return np.arange(x.size) // BLOCK


def decoded(codes: Any, book: Any, absmax: Any, size: int = BLOCK) -> np.ndarray:
    codes = codes.numpy().reshape(-1)
    return book.double().numpy()[codes] * absmax.double().numpy()[np.arange(codes.size) // size]


@dataclasses.dataclass
class Stated:
    """What a checkpoint says of one parameter, float64 [n]; the moments without the bias of their start."""

    second: np.ndarray
    momentum: np.ndarray | None
    """Of normalised gradients."""
    rates: np.ndarray | None
    polarity: np.ndarray | None


def stated(saved: dict[str, Any], group: dict[str, Any]) -> Stated:
    """Of any of `KINDS`."""
    saved = {**saved, **saved.get(WRAPPED, {})}
    t = saved["step"]
    if "state1" in saved:
        beta1, beta2 = group["betas"]
        m, v = adam_moment(saved, 1) / (1 - beta1**t), adam_moment(saved, 2) / (1 - beta2**t)
        v = np.maximum(v, m * m)
        ratio = m / np.sqrt(np.where(v > 0, v, 1))
        return Stated(v, bounded(ratio), None, None)
    polarity = saved["last_polarity"].numpy().reshape(-1)
    if "beta2" in group:
        codes, scale = saved["lr_mask"]["quantized"], saved["lr_mask"]["scale"]
        rates = codes.double().numpy().reshape(-1) * scale
        return Stated(toolkit_second(saved) / (1 - 0.999**t), None, rates, polarity)
    m, v, rates = (cameamp_values(saved, name) for name in ("exp_avg", "exp_avg_sq", "lr_mask"))
    rms = np.sqrt(np.bincount(blocks_of(m), m * m) / np.bincount(blocks_of(m)))
    direction = m / rms[blocks_of(m)] * np.sqrt((1 - 0.9) / (1 + 0.9))
    return Stated(np.maximum(v, 0) / (1 - 0.99**t), bounded(direction), rates, polarity)


def adam_moment(saved: dict[str, Any], number: int) -> np.ndarray:
    x = saved[f"state{number}"]
    if x.dtype == torch.uint8:
        return decoded(x, saved[f"qmap{number}"], saved[f"absmax{number}"])
    return x.double().numpy().reshape(-1)


def toolkit_second(saved: dict[str, Any]) -> np.ndarray:
    if "exp_avg_sq" in saved:
        return saved["exp_avg_sq"].double().numpy().reshape(-1)
    row, col = saved["exp_avg_sq_row"].double().numpy(), saved["exp_avg_sq_col"].double().numpy()
    return np.einsum("...i,...j->...ij", row / row.mean(-1, keepdims=True), col).reshape(-1)


def cameamp_values(saved: dict[str, Any], name: str) -> np.ndarray:
    if name in saved:
        return saved[name].double().numpy().reshape(-1)
    scale = saved[f"{name}_q_scale"]
    return decoded(saved[f"{name}_q"], scale.code, scale.absmax, scale.blocksize)


def bounded(m: np.ndarray) -> np.ndarray:
    """No block's root mean square beyond the clipping threshold."""
    rms = np.sqrt(np.bincount(blocks_of(m), m * m) / np.bincount(blocks_of(m)))
    return m * np.minimum(1, CLIP / np.maximum(rms, 1e-30))[blocks_of(m)]


def error_of(held: np.ndarray, expected: np.ndarray, bound: np.ndarray | float) -> float:
    """The largest error as a share of its bound."""
    return float((np.abs(held - expected) / bound).max())


def moment_error(state: dict[str, Any], p: Any, number: int, expected: np.ndarray) -> float:
    """Of m (1) or v (2) as it is stored, against the statement of it, in units of what its storage may err by."""
    if number == 2 and "exp_avg_sq_row" in state:
        tiles = TileMeans(tuple(p.shape), 0.0, 0.0)
        errors = []
        for name, of, size in (("row", tiles.row_of, tiles.row.size), ("col", tiles.col_of, tiles.col.size)):
            means = np.bincount(of, expected, size) / np.maximum(np.bincount(of, minlength=size), 1)
            held = state[f"exp_avg_sq_{name}"].double().numpy().reshape(-1)
            errors.append(error_of(held, means, RELATIVE_ERROR * means.max()))
        return max(errors)
    held = state[f"state{number}"]
    if held.dtype != torch.uint8:
        return error_of(held.double().numpy().reshape(-1), expected, RELATIVE_ERROR * np.abs(expected).max())
    absmax = np.zeros(blocks_of(expected)[-1] + 1)
    np.maximum.at(absmax, blocks_of(expected), np.abs(expected))
    book = state[f"qmap{number}"].double().numpy()
    scale = absmax[blocks_of(expected)] / book[-2]  # the largest takes the last value below 1
    above = np.clip(np.searchsorted(book, expected / scale), 1, 255)
    half_gap = (book[above] - book[above - 1]) / 2
    bound = scale * (half_gap + RELATIVE_ERROR)
    return error_of(decoded(held, state[f"qmap{number}"], state[f"absmax{number}"]), expected, bound)


def expected_rates(opt: Any, group: dict[str, Any], of_group: list[np.ndarray], mine: np.ndarray) -> np.ndarray:
    """A parameter's rates here: theirs over their mean, in steps where codes hold them, about the group's rate."""
    codes = opt.config.optim_bits == 8
    k = np.clip(16 * np.log2(np.maximum(mine, 1e-30) / mine.mean()), -32, 31)
    factor = 2 ** ((np.round(k) if codes else k) / 16)
    factor /= factor.mean()
    if not group["auto_lr"]:
        return group["lr"] * factor
    rate = np.clip(np.concatenate(of_group).mean(), group["min_lr"], group["max_lr"])
    return np.clip(rate * factor, group["min_lr"], group["max_lr"])


def errors(opt: Any, saved: dict[str, Any]) -> dict[str, float]:
    """The largest error of each thing carried over, in units of its bound: at most 1 where all is well."""
    worst: dict[str, float] = {}
    for group, saved_group in zip(opt.param_groups, saved["param_groups"], strict=True):
        said = [stated(saved["state"][key], saved_group) for key in saved_group["params"]]
        rates = [s.rates for s in said if s.rates is not None]
        for p, key, s in zip(group["params"], saved_group["params"], said, strict=True):
            state, t = opt.state[p], saved["state"][key]["step"]
            beta1, beta2, _ = group["betas"]
            found = {"second": moment_error(state, p, 2, s.second * (1 - beta2**t))}
            found["step"] = 2.0 * (state["step"] != t)
            if s.momentum is not None:
                found["momentum"] = moment_error(state, p, 1, s.momentum * (1 - beta1**t))
            if s.rates is not None and s.polarity is not None:
                held = opt.element_learning_rates(p).double().numpy().reshape(-1)
                expected = expected_rates(opt, group, rates, s.rates)
                found["rates"] = error_of(held, expected, RELATIVE_ERROR * expected)
                packed = state["lr_mask"].dtype == torch.uint8
                polarity = state["lr_mask"] & 1 if packed else state["last_polarity"]
                found["polarity"] = 2.0 * bool((polarity.numpy().reshape(-1) != s.polarity).any())
            for name, error in found.items():
                worst[name] = max(error, worst.get(name, 0.0))
    return worst


@pytest.mark.parametrize("lr", [None, 2e-4])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_carried_over(kind: str, storage: str, lr: float | None, tools: Any) -> None:
    """Moments, rates, signs and step are what float64 says, up to the rounding of the storage they go into."""
    saved = checkpoint(tools, kind)
    opt = build(tools, lr, **STORAGES[storage])
    opt.load_state_dict(copy.deepcopy(saved))
    worst = errors(opt, saved)
    expected = {"second", "step"} | ({"rates", "polarity"} if kind in WITH_RATES else set())
    assert worst.keys() - {"momentum"} == expected
    assert ("momentum" in worst) == (kind != "ai-toolkit")
    assert max(worst.values()) <= 1, worst
    held = {"32bit": torch.float32}.get(storage, torch.uint8)
    assert {opt.state[p]["state1"].dtype for p in parameters_of(opt)} == {held}
    assert ("exp_avg_sq_row" in opt.state[parameters_of(opt)[0]]) == (storage == "factored")


@pytest.mark.parametrize("storage", STORAGES)
def test_a_second_moment_is_never_below_the_square_of_the_first(storage: str, tools: Any) -> None:
    """Where 8-bit codes said 0, the update would otherwise be as large as clipping allows."""
    saved = checkpoint(tools, "adamw")
    for state in saved["state"].values():
        state[WRAPPED]["state2"].view(-1)[:9] = 0
    opt = build(tools, **STORAGES[storage])
    opt.load_state_dict(saved)
    assert max(errors(opt, saved).values()) <= 1
    if storage == "32bit":
        assert (opt.state[parameters_of(opt)[0]]["state2"].view(-1)[:9] > 0).all()


Edit = Callable[[dict[str, Any]], Any]


def scaled(name: str, factor: float) -> Edit:
    """Multiply a moment of a state; of codes their scale."""

    def edit(state: dict[str, Any]) -> None:
        holder = state.get(WRAPPED, state)
        absmax = name.replace("state", "absmax")
        if f"{name}_q_scale" in holder:
            holder[f"{name}_q_scale"].absmax.mul_(factor)
        else:
            holder[absmax if absmax in holder else name] *= factor

    return edit


def other_second(state: dict[str, Any]) -> None:
    scaled("exp_avg_sq_row" if "exp_avg_sq_row" in state else "exp_avg_sq", 2)(state)


def other_rates(state: dict[str, Any]) -> None:
    """Each weight has its neighbour's rate."""
    mask = state["lr_mask"]
    if isinstance(mask, dict):
        mask["quantized"] = mask["quantized"].roll(1)
    else:
        state["lr_mask"] = mask.roll(1)


def other_signs(state: dict[str, Any]) -> None:
    state["last_polarity"] = ~state["last_polarity"]


ALTERED: list[tuple[str, str, Edit]] = [
    ("adamw8", "second", scaled("state2", 1.2)),
    ("adamw8", "momentum", scaled("state1", -1)),
    ("adamw", "second", scaled("state2", 1.01)),
    ("adamw", "momentum", scaled("state1", -1)),
    ("adamw", "step", lambda state: state.update(step=31)),
    ("ai-toolkit", "second", other_second),
    ("ai-toolkit", "rates", other_rates),
    ("ai-toolkit", "polarity", other_signs),
    ("cameamp", "second", scaled("exp_avg_sq", 1.2)),
    ("cameamp", "momentum", scaled("exp_avg", -1)),
    ("cameamp", "rates", other_rates),
    ("cameamp8", "second", scaled("exp_avg_sq", 1.2)),
    ("cameamp8", "rates", lambda state: state.update(lr_mask_q=state["lr_mask_q"].roll(1))),
]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("case", range(len(ALTERED)))
def test_the_comparison_can_fail(case: int, storage: str, tools: Any) -> None:
    """Negative controls: what is loaded from an altered checkpoint differs from the original beyond the rounding."""
    kind, name, edit = ALTERED[case]
    saved = checkpoint(tools, kind)
    altered = copy.deepcopy(saved)
    for state in altered["state"].values():
        edit(state)
    opt = build(tools, **STORAGES[storage])
    opt.load_state_dict(altered)
    assert errors(opt, saved)[name] > 1


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", WITH_RATES)
def test_rates_go_on_where_theirs_were(kind: str, storage: str, tools: Any) -> None:
    """Of a single tensor the very rates: exact in 32 bits, within half a step of 2^(1/16) and its mean in codes."""
    p = tools.parameters((64, 64))
    opt = theirs(kind, p)
    tools.train(opt, p, range(30))
    rates = stated(opt.state_dict()["state"][0], opt.param_groups[0]).rates
    assert rates is not None
    assert rates.max() / rates.min() > 1.5  # there is something to carry
    mine = tools.parameters((64, 64))
    new = Automagic8bit(mine, **STORAGES[storage])
    new.load_state_dict(opt.state_dict())
    ratio = new.element_learning_rates(mine[0]).double().numpy().reshape(-1) / rates
    assert np.abs(np.log2(ratio)).max() <= (1e-5 if storage == "32bit" else 1 / 16)
    assert float(new.get_avg_learning_rate()) == pytest.approx(rates.mean(), rel=1e-5)
    assert np.abs(np.log2(ratio * 1.06)).max() > 1 / 16  # the bound can be missed


def test_rates_far_from_the_mean_come_to_the_end_of_the_range(tools: Any) -> None:
    """A weight's rate is at least 1/4 of its tensor's mean and at most 3.8 of it, before their mean is restored."""
    saved = checkpoint(tools, "cameamp", shapes=((64, 64), (257,)))
    saved["state"][0]["lr_mask"][0, :3] = torch.tensor([0.0, 1e-12, 1e-1])
    opt = build(tools, shapes=((64, 64), (257,)), optim_bits=32)
    opt.load_state_dict(saved)
    assert opt.state[parameters_of(opt)[0]]["lr_mask"][0, :3].tolist() == [-32, -32, 31]


def test_a_rate_of_its_own_keeps_the_mean(tools: Any) -> None:
    """With lr given, the rates' proportions are carried over and their mean is lr."""
    opt = build(tools, lr=2e-4)
    opt.load_state_dict(checkpoint(tools, "ai-toolkit"))
    for p in parameters_of(opt):
        assert opt.element_learning_rates(p).mean().item() == pytest.approx(2e-4, rel=1e-4)
    assert opt.get_learning_rates() == [2e-4, 2e-4]
    assert "auto_lr_rate" not in opt.param_groups[0]


def test_the_rate_found_stays_within_its_bounds(tools: Any) -> None:
    opt = build(tools, max_lr=2e-5)
    opt.load_state_dict(checkpoint(tools, "ai-toolkit"))
    assert [float(rate) for rate in opt.get_learning_rates()] == pytest.approx([2e-5, 2e-5])


# ----------------------------------------------------------------------------------------------------- training goes on


def losses(make: Callable[[list[Any]], Any], w: Any, steps: int) -> tuple[Any, list[float]]:
    """Fit a matrix to noisy targets from `w` on; the loss before each step."""
    generator = torch.Generator().manual_seed(3)
    x, target = torch.randn(256, 64, generator=generator), torch.randn(64, 64, generator=generator)
    opt, seen = make([w]), []
    for _ in range(steps):
        noise = torch.randn(256, 64, generator=generator) * 0.1
        loss = (x @ (w - target).T / 8 + noise).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        seen.append(loss.item())
    return opt, seen


def switched(kind: str, saved_by: Any, w: Any, **options: Any) -> list[float]:
    """The losses after the switch."""

    def make(parameters: list[Any]) -> Any:
        opt = Automagic8bit(parameters, **options)
        opt.load_state_dict(saved_by.state_dict())
        return opt

    return losses(make, w.detach().clone().requires_grad_(), 40)[1]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on(kind: str, storage: str) -> None:
    """The loss falls on from where it was; with a rate of 100 it jumps, so a jump would be seen."""
    w = torch.nn.Parameter(torch.zeros(64, 64))
    make = (lambda p: ADAMS[kind](p, lr=1e-2)) if kind in ADAMS else (lambda p: Theirs(p, kind, lr=1e-3))
    theirs_opt, before = losses(make, w, 60)
    lr = {"lr": 1e-2} if kind in ADAMS else {}
    after = switched(kind, theirs_opt, w, **lr, **STORAGES[storage])
    assert max(after) <= 1.02 * before[-1]
    assert after[-1] < 0.95 * before[-1]
    assert max(switched(kind, theirs_opt, w, lr=100.0, **STORAGES[storage])) > 1.02 * before[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_afterwards_it_is_an_ordinary_run(kind: str, dtype: torch.dtype, tools: Any) -> None:
    """What was migrated steps, saves, loads with weights_only and goes on bit for bit."""
    opt = build(tools, dtype=dtype)
    opt.load_state_dict(checkpoint(tools, kind, dtype=dtype))
    tools.train(opt, parameters_of(opt), range(30, 33))
    assert all(torch.isfinite(p).all() for p in parameters_of(opt))
    again = build(tools, dtype=dtype)
    for new, old in zip(parameters_of(again), parameters_of(opt), strict=True):
        new.data.copy_(old.data)
    again.load_state_dict(through_file(opt.state_dict()))
    assert not tools.differences(tools.snapshot(opt), tools.snapshot(again))
    for each in (opt, again):
        tools.train(each, parameters_of(each), range(33, 36))
    assert not tools.differences(tools.snapshot(opt), tools.snapshot(again))


def test_options_stay_those_of_the_new_optimizer(tools: Any) -> None:
    """Rates, decay and betas in the other's groups mean something else."""
    for kind in KINDS:
        opt = build(tools, lr=1e-4, weight_decay=0.01)
        groups = tools.snapshot(opt)["groups"]
        opt.load_state_dict(checkpoint(tools, kind, steps=2))
        assert not tools.differences(groups, tools.snapshot(opt)["groups"])


def test_a_long_run_is_told_that_its_rates_stay(tools: Any) -> None:
    """Beyond warmup_steps the weights' own rates do not adapt; the message says which value lets them."""
    saved = checkpoint(tools, "ai-toolkit", steps=5)
    for state in saved["state"].values():
        state["step"] = 3000
    opt = build(tools)
    with pytest.warns(UserWarning, match=r"at step 3000.*first warmup_steps=500.*pass warmup_steps=3500"):
        opt.load_state_dict(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(tools, warmup_steps=3500).load_state_dict(saved)


def test_parameters_without_state_start_anew(tools: Any) -> None:
    """One that never had a gradient there has no state here, and steps with the others."""
    saved = checkpoint(tools, "ai-toolkit")
    del saved["state"][1]
    opt = build(tools)
    opt.load_state_dict(saved)
    assert [bool(opt.state.get(p)) for p in parameters_of(opt)] == [True, False, True, True]
    tools.train(opt, parameters_of(opt), range(30, 32))
    assert opt.state[parameters_of(opt)[1]]["step"] == 2


# ------------------------------------------------------------------------------------------------------ forms of a file


@pytest.mark.parametrize("kind", [*ADAMS, "ai-toolkit", "cameamp"])
def test_loaded_with_weights_only(kind: str, tools: Any) -> None:
    """Through a file that holds tensors and plain numbers only, the same comes out."""
    saved = checkpoint(tools, kind)
    direct, through = build(tools), build(tools)
    direct.load_state_dict(saved)
    through.load_state_dict(through_file(saved))
    assert not tools.differences(tools.snapshot(direct), tools.snapshot(through))


def test_codes_with_their_quant_state_need_a_full_load(tools: Any) -> None:
    """CameAMP's 8-bit form holds bitsandbytes' QuantState, which weights_only refuses."""
    saved = checkpoint(tools, "cameamp8")
    with pytest.raises(Exception, match="QuantState"):
        through_file(saved)
    direct, through = build(tools), build(tools)
    direct.load_state_dict(saved)
    through.load_state_dict(through_file(saved, weights_only=False))
    assert not tools.differences(tools.snapshot(direct), tools.snapshot(through))


class Auto8bitTensor:
    """The object in which ai-toolkit keeps its rates, and which its first versions saved."""

    def __init__(self, saved: dict[str, Any]) -> None:
        self.quantized, self.scale = saved["quantized"], saved["scale"]


@pytest.mark.parametrize("form", ["object", "scale as a tensor", "float", "bfloat16 signs"])
def test_other_forms_of_ai_toolkits_state(form: str, tools: Any) -> None:
    """Rates as the object itself or as plain numbers; signs in the dtype that torch's own loading gave them."""
    saved = checkpoint(tools, "ai-toolkit")
    other = copy.deepcopy(saved)
    for state in other["state"].values():
        mask = state["lr_mask"]
        if form == "object":
            state["lr_mask"] = Auto8bitTensor(mask)
        elif form == "scale as a tensor":
            mask["scale"] = torch.tensor(mask["scale"], dtype=torch.float64)
        elif form == "float":
            state["lr_mask"] = mask["quantized"].float() * mask["scale"]
        else:
            state["last_polarity"] = state["last_polarity"].bfloat16()
    first, second = build(tools), build(tools)
    first.load_state_dict(saved)
    second.load_state_dict(other)
    assert not tools.differences(tools.snapshot(first), tools.snapshot(second))


def test_moments_quantized_in_an_unknown_way_start_anew(tools: Any) -> None:
    """A variant keeps uint8 moments without their scale: that is said, and the rates are carried over all the same."""
    saved = checkpoint(tools, "cameamp")
    for state in saved["state"].values():
        state["exp_avg_sq"] = state["exp_avg_sq"].to(torch.uint8)
    opt = build(tools, optim_bits=32)
    with pytest.warns(UserWarning, match=r"exp_avg_sq is quantized \(torch.uint8\) in a form of its own"):
        opt.load_state_dict(saved)
    p = parameters_of(opt)[0]
    assert not opt.state[p]["state2"].any()
    assert opt.state[p]["lr_mask"].any()


# ---------------------------------------------------------------------------------------------------- wrong checkpoints


def inner(edit: Edit) -> Edit:
    return lambda state: edit(state[WRAPPED])


def put(**values: Any) -> Edit:
    return lambda state: state.update({k: v(state[k]) if callable(v) else v for k, v in values.items()})


def first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """The first element replaced."""

    def edit(x: torch.Tensor) -> torch.Tensor:
        x.view(-1)[0] = value
        return x

    return edit


WRONG: dict[str, tuple[str, Edit, str]] = {
    "another shape": (
        "adamw",
        inner(put(state1=lambda x: x[:-1])),
        r"parameter 0: the checkpoint's state1 has shape \(63, 64\), a parameter of shape \(64, 64\) needs \(64, 64\)",
    ),
    "not finite": (
        "adamw",
        inner(put(state2=first(float("nan")))),
        "parameter 0: the checkpoint's state2 .* not finite",
    ),
    "another dtype": ("adamw", inner(put(state1=lambda x: x.int())), "state1 is torch.int32"),
    "scales missing": ("adamw8", inner(lambda s: s.pop("absmax1")), "absmax1 has shape none"),
    "scales too few": ("adamw8", inner(put(absmax2=lambda x: x[:-1])), r"absmax2 has shape \(15,\).*needs \(16,\)"),
    "code book cut": ("adamw8", inner(put(qmap1=lambda x: x[:16])), r"qmap1 has shape \(16,\)"),
    "rates of another shape": (
        "ai-toolkit",
        lambda s: s["lr_mask"].update(quantized=s["lr_mask"]["quantized"].view(32, 128)),
        r"lr_mask has shape \(32, 128\)",
    ),
    "rates without a scale": ("ai-toolkit", lambda s: s["lr_mask"].pop("scale"), "lr_mask is a dict without"),
    "rates in a list": ("ai-toolkit", put(lr_mask=[1e-6]), "lr_mask is a list without"),
    "rates not finite": ("ai-toolkit", lambda s: s["lr_mask"].update(scale=float("inf")), "lr_mask .* not finite"),
    "rates negative": ("ai-toolkit", lambda s: s["lr_mask"].update(scale=-1.0), "holds negative rates"),
    "row means of another shape": ("ai-toolkit", put(exp_avg_sq_row=lambda x: x[:-1]), "exp_avg_sq_row has shape"),
    "column means missing": ("ai-toolkit", lambda s: s.pop("exp_avg_sq_col"), "exp_avg_sq_col has shape none"),
    "signs of another shape": ("ai-toolkit", put(last_polarity=lambda x: x[0]), "last_polarity has shape"),
    "second moment not finite": ("cameamp", put(exp_avg_sq=first(float("inf"))), "exp_avg_sq .* not finite"),
    "codes without their state": ("cameamp8", lambda s: s.pop("lr_mask_q_scale"), "lr_mask_q_scale is no QuantState"),
    "codes of another shape": ("cameamp8", put(exp_avg_q=lambda x: x[1:]), "exp_avg_q has shape"),
    "codes with too few scales": (
        "cameamp8",
        lambda s: setattr(s["exp_avg_q_scale"], "absmax", torch.ones(1)),
        r"exp_avg_q_scale.absmax has shape \(1,\)",
    ),
}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("case", WRONG)
def test_a_checkpoint_that_does_not_fit_changes_nothing(case: str, storage: str, tools: Any) -> None:
    """The message says what is wrong where; parameters, state and groups are the very bits of before."""
    kind, edit, message = WRONG[case]
    opt = build(tools, **STORAGES[storage])
    tools.train(opt, parameters_of(opt), range(3))
    saved = checkpoint(tools, kind, steps=3)
    edit(saved["state"][0])
    before = tools.snapshot(opt)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved)
    assert not tools.differences(before, tools.snapshot(opt))
    tools.train(opt, parameters_of(opt), range(3, 5))
    assert tools.differences(before, tools.snapshot(opt))  # the comparison can fail


def test_groups_that_do_not_fit(tools: Any) -> None:
    opt = build(tools)
    saved = checkpoint(tools, "ai-toolkit", steps=2)
    saved["param_groups"].pop()
    with pytest.raises(ValueError, match=r"groups of \[2\] parameters, this optimizer of \[2, 2\]"):
        opt.load_state_dict(saved)


def test_a_checkpoint_of_ones_own_is_none_of_theirs(tools: Any) -> None:
    """Also in 32 bits, where the keys are those of bitsandbytes: all of it comes back."""
    p = tools.parameters((64, 64))
    opt = Automagic32bit(p, lr=1e-3)
    tools.train(opt, p, range(3))
    again = Automagic32bit(tools.parameters((64, 64)), lr=1e-3)
    again.load_state_dict(through_file(opt.state_dict()))
    assert not tools.differences(tools.snapshot(opt)["state"], tools.snapshot(again)["state"])
