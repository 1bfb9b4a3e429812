"""Coming from another optimizer: what its checkpoint says of a parameter. Its options: see `migrated_options`.

| from | what is carried over |
|---|---|
| bitsandbytes' Adam, AdamW (8 or 32 bits, paged), torch's | second moment; first moment in units of its root; step |
| Prodigy | the same |
| Adafactor (transformers', torch's) | second moment (row and column means), step; a first moment as from Adam |
| ai-toolkit's Automagic | rates and last signs where kept, second moment (row and column means), step |
| ai-toolkit's Automagic 2 and 3 | the same, with one rate for each parameter; 3 has no last signs |
| Automagic_CameAMP and its variants | the same, and the direction of the momentum |

It goes into the storage that the new optimizer's options ask for; everything else starts anew. Where auto_lr is on, the
group's rate starts at the mean of the rates carried over; a weight's own rate is kept relative to its tensor's mean,
from 1/4 to 3.8 of it, and in 8-bit storage in steps of 2^(1/16).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from automagic_bnb import auto_lr, bnb, config
from automagic_bnb import quantization as q
from automagic_bnb import state as st
from automagic_bnb.notices import warn_once
from automagic_bnb.quantization import FLOAT_TINY
from automagic_bnb.reference import K_MAX, K_MIN
from automagic_bnb.stored import Blocks, has_mask, mask_spacing, moments_of, to_spacing, write_mask

WRAPPED = "__bnb_optimizer_quant_state__"
"""bitsandbytes moves block-wise tensors under this key, so that FSDP does not gather them."""
OWN_KEYS = frozenset(["tensor_stats", "torque"])
"""A state with neither is another optimizer's, unless its group is one of ours."""
ADAM_KEYS = frozenset(["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
SECOND_OF_ADAFACTOR = frozenset(["exp_avg_sq_row", "exp_avg_sq", "row_var", "variance"])
ADAFACTOR_KEYS = SECOND_OF_ADAFACTOR | {"step", "exp_avg", "exp_avg_sq_col", "col_var", "RMS"}
ADAM_BETAS = (0.9, 0.999)
SECOND_DECAY = 0.999
"""beta2 of ai-toolkit's Automagic, where its group has none."""

Options = dict[str, Any]


@dataclass(frozen=True)
class Carried:
    """What another optimizer's state says of one parameter; tensors are float32, shaped like it, on its device."""

    step: int
    momentum: Tensor | None = None
    """m of the normalised gradient u, bias-corrected."""
    second: Tensor | None = None
    """v of the gradient, bias-corrected."""
    rates: Tensor | None = None
    """Each weight's learning rate."""
    polarity: Tensor | None = None
    """uint8: whether its last gradient was positive."""


def source_of(state_dict: dict[str, Any]) -> str | None:
    """Whose a checkpoint is, by the keys of its states; None for one of ours and for any other.

    "bitsandbytes" (an Adam), "adam" (torch's), "prodigy", "adafactor" or "automagic" (ai-toolkit's three, CameAMP).
    """
    groups = state_dict["param_groups"]
    states = [saved for saved in state_dict["state"].values() if isinstance(saved, Mapping)]
    keys = {key for saved in states for key in (*saved, *saved.get(WRAPPED, {}))}
    if keys & OWN_KEYS or any("base_lr" in group for group in groups):
        return None
    if {"state1", "state2"} <= keys:
        return None if any("warmup_steps" in group for group in groups) else "bitsandbytes"
    if "state1" in keys:
        return None
    if keys & {"lr_mask", "lr_mask_q"} or ("lr" in keys and keys & {"last_polarity", "sign_history"}):
        return "automagic"
    if {"exp_avg", "exp_avg_sq"} <= keys <= ADAM_KEYS:
        return "adam"
    if {"exp_avg", "exp_avg_sq", "s", "p0"} <= keys:
        return "prodigy"
    return "adafactor" if keys <= ADAFACTOR_KEYS and keys & SECOND_OF_ADAFACTOR else None


def read(source: str, saved: dict[str, Any], group: dict[str, Any], options: Options, p: Tensor, where: str) -> Carried:
    """What the state of one parameter carries over.

    Args:
        source: as `source_of` says.
        saved: the parameter's state, `group` its group, in the other optimizer's checkpoint.
        options: the options in force here.
        p: the local parameter.
        where: which parameter it is, for messages.

    Raises:
        ValueError: sizes or kinds of the tensors do not fit the parameter, or values are not finite.
    """
    reader = Reader({**saved, **saved.get(WRAPPED, {})}, p, where)
    carried = _read(source, reader, group, options)
    for moment in (carried.momentum, carried.second):
        if moment is not None and not torch.isfinite(moment).all():
            names = ", ".join(sorted(k for k, x in reader.saved.items() if isinstance(x, Tensor) and k != "step"))
            raise ValueError(
                f"{where}: the checkpoint's {names} are finite, but not their squares or without their bias; use an "
                "earlier checkpoint"
            )
    return carried


def _read(source: str, reader: Reader, group: dict[str, Any], options: Options) -> Carried:
    if source == "automagic":
        return _read_automagic(reader, group, options)
    if source == "adafactor":
        return _read_adafactor(reader, group)
    if source == "prodigy":
        return _read_prodigy(reader, group)
    if source == "adam":
        return _from_adam(reader.where, reader.step, reader.floats("exp_avg"), reader.floats("exp_avg_sq"), group)
    return _from_adam(reader.where, reader.step, reader.adam_moment(1), reader.adam_moment(2), group)


def fill(state: st.State, carried: Carried, p: Tensor, options: Options) -> None:
    """Put what is carried into a complete state of p, in the storage it has."""
    blocks = Blocks(p)
    moments = moments_of(state, blocks, torch.ones(blocks.blocks, q.BLOCK, dtype=torch.bool, device=p.device))
    beta1, beta2, _ = options["betas"]
    if carried.momentum is not None:
        m = blocks.cut(carried.momentum)
        bound = options["clip_threshold"] / blocks.mean(m.square()).sqrt().clamp_min(FLOAT_TINY)
        moments.write(1, m * bound.clamp_max(1) * (1 - beta1**carried.step))
    if carried.second is not None:
        moments.write(2, blocks.cut(carried.second) * (1 - beta2**carried.step))
    if carried.rates is None:
        return
    if options["mask_bits"] and has_mask(state):
        _fill_mask(state, carried.rates, carried.polarity)
    elif carried.rates.numel() and bool((carried.rates != carried.rates.flatten()[0]).any()):
        warn_once(
            "the checkpoint's rates of single weights stay behind where none are kept, which is so for LoRA's matrices "
            "unless lora_mask=True, and with mask_bits=0"
        )


def _fill_mask(state: st.State, rates: Tensor, polarity: Tensor | None) -> None:
    """k = 16 log2(rate / mean rate), W as it is stored, and π."""
    mean = rates.double().mean()
    ratio = torch.where(mean > 0, rates / mean, 1.0)
    k = (16 * ratio.log2()).clamp(K_MIN, K_MAX).float()  # a rate of 0 is at the lower end
    signs = torch.full_like(k, q.NO_SIGN, dtype=torch.uint8) if polarity is None else polarity
    k = to_spacing(k, mask_spacing(state))
    blocks = Blocks(k)
    write_mask(state, blocks, blocks.cut(k), blocks.cut(signs))
    state["tensor_stats"][st.MASK_MEAN] = torch.exp2(k / 16).mean()


def group_entries(group: dict[str, Any], sums: list[tuple[Tensor, int]]) -> dict[str, Any]:
    """What a group takes over: where its rate is being found, that starts at the mean of the weights' rates.

    Args:
        sums: of each parameter whose rates are carried over, their sum and number.
    """
    count = sum(n for _, n in sums)
    if not group["auto_lr"] or not count:
        return {}
    mean = sum(float(x) for x, _ in sums) / count
    low, high = auto_lr.found_bounds(group)
    found = min(max(mean, low), high)
    return {"auto_lr_rate": torch.tensor(found, dtype=torch.float32, device=sums[0][0].device)}


def warn_of_freeze(step: int, warmup_steps: int) -> None:
    """Say that the weights' own rates do not move any more, where the step carried over is beyond the warm-up."""
    if 0 < warmup_steps <= step:
        warn_once(
            f"the checkpoint is at step {step}, and the weights' own rates adapt in the first warmup_steps="
            f"{warmup_steps} only: they stay as they are now. To let them adapt, pass warmup_steps={step + 500}"
        )


def checked_step(value: Any, what: str) -> int:
    """A number of steps as it was saved: an int, or a float or a tensor that stands for one.

    Raises:
        ValueError: anything else, or less than 0, or 2^63 and more.
    """
    check_has_values(value, what)
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if not config.is_number(number) or not 0 <= number < 2**63 or number != int(number):
        shown = f"{number:.4g}" if isinstance(number, float) else f"{str(number)[:40]}"
        raise ValueError(f"{what} is {shown}; expected a whole number >= 0")
    return int(number)


def check_has_values(value: Any, what: str, needed: bool = True) -> None:
    """Raise ValueError where a saved tensor has no values to copy (`map_location="meta"`), or not one for each place.

    Args:
        needed: whether it is copied to another device than the meta device.
    """
    if isinstance(value, Tensor) and (value.layout != torch.strided or (value.is_meta and needed)):
        form = "on the meta device, without values" if value.is_meta else f"a tensor of {value.layout}"
        raise ValueError(f"{what} is {form}; load the file with map_location='cpu', and as it was saved")


def checked_decay(value: Any, name: str, where: str) -> float:
    """The decay of a moment as another optimizer's group has it.

    Raises:
        ValueError: no number from 0 to 1.
    """
    if not config.is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{where}: the checkpoint's group has {name}={value!r}; expected a number >= 0 and < 1")
    return float(value)


class Reader:
    """Tensors of one parameter's foreign state, checked."""

    def __init__(self, saved: dict[str, Any], p: Tensor, where: str) -> None:
        self.saved, self.p, self.where = saved, p, where

    @property
    def step(self) -> int:
        return checked_step(self.saved.get("step", 0), f"{self.where}: the checkpoint's step")

    def tensor(self, name: str, shape: tuple[int, ...], value: Any = None) -> Tensor:
        """`value`, or what the state has under this name, on the parameter's device; its dtype is kept."""
        value = self.saved.get(name) if value is None else value
        found = tuple(value.shape) if isinstance(value, Tensor) else f"none ({type(value).__name__})"
        if found != shape:
            raise ValueError(
                f"{self.where}: the checkpoint's {name} has shape {found}, "
                f"a parameter of shape {tuple(self.p.shape)} needs {shape}"
            )
        check_has_values(value, f"{self.where}: the checkpoint's {name}", not self.p.is_meta)
        return value.detach().to(self.p.device)

    def floats(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """`tensor` as float32: of a floating dtype, finite."""
        value = self.tensor(name, tuple(self.p.shape) if shape is None else shape)
        if not value.is_floating_point():
            raise ValueError(f"{self.where}: the checkpoint's {name} is {value.dtype}; expected a floating dtype")
        return self.finite(name, value.float())

    def finite(self, name: str, value: Tensor) -> Tensor:
        if not torch.isfinite(value).all():
            raise ValueError(
                f"{self.where}: the checkpoint's {name} holds values that are not finite; use an earlier checkpoint"
            )
        return value

    def adam_moment(self, number: int) -> Tensor:
        """bitsandbytes' state1 or state2: float32, or codes with `absmax` and `qmap`."""
        name, shape = f"state{number}", tuple(self.p.shape)
        value = self.tensor(name, shape)
        if value.dtype != torch.uint8:
            return self.floats(name)
        blocks = Blocks(self.p)
        absmax = self.floats(f"absmax{number}", (blocks.blocks,))
        if f"qmap{number}" in self.saved:
            book = self.floats(f"qmap{number}", (256,))
        elif bnb.BITSANDBYTES_AVAILABLE:
            book = bnb.code_book(number == 1, self.p.device)
        else:
            raise ValueError(f"{self.where}: the checkpoint's state is in 8 bits. {bnb.MISSING_WARNING}")
        return blocks.join(q.decode(blocks.cut(value), absmax, book)).view(shape)

    def rates(self) -> Tensor | None:
        """`lr_mask`: float numbers, or int8 with one scale, as a dict or as an object of ai-toolkit's class.

        Or `lr`, one for all weights.
        """
        if "lr" in self.saved:
            return self.floats("lr", ()).expand(self.p.shape)
        value = self.saved.get("lr_mask")
        if value is None or isinstance(value, Tensor):
            found = self.optional("lr_mask")
        else:
            parts = value if isinstance(value, dict) else getattr(value, "__dict__", {})
            if not {"quantized", "scale"} <= parts.keys():
                raise ValueError(
                    f"{self.where}: the checkpoint's lr_mask is a {type(value).__name__} without quantized and scale; "
                    "expected the mask of ai-toolkit's Automagic"
                )
            codes = self.tensor("lr_mask", tuple(self.p.shape), parts["quantized"])
            found = self.finite("lr_mask", codes.float() * float(parts["scale"]))
        if found is not None and (found < 0).any():
            raise ValueError(f"{self.where}: the checkpoint's lr_mask holds negative rates")
        return found

    def second(self) -> Tensor | None:
        """`exp_avg_sq`, or row means times column means over their mean (Adafactor's, over the last two dimensions)."""
        shape = tuple(self.p.shape)
        if "row_var" in self.saved:  # torch's Adafactor keeps the dimensions
            row = self.floats("row_var", (*shape[:-1], 1))
            col = self.floats("col_var", (*shape[:-2], 1, shape[-1]))
            return row * col / row.mean(dim=-2, keepdim=True).clamp_min(FLOAT_TINY)
        if "variance" in self.saved:
            return self.floats("variance")
        if "exp_avg_sq_row" in self.saved:
            row = self.floats("exp_avg_sq_row", shape[:-1])
            col = self.floats("exp_avg_sq_col", (*shape[:-2], *shape[-1:]))
            mean = row.mean(dim=-1, keepdim=True).clamp_min(FLOAT_TINY)
            return (row / mean).unsqueeze(-1) * col.unsqueeze(-2)
        return self.optional("exp_avg_sq")

    def optional(self, name: str) -> Tensor | None:
        """Float numbers shaped like the parameter; None where the state has none, or has codes of its own making."""
        if f"{name}_q" in self.saved:
            return self.blockwise(f"{name}_q")
        value = self.saved.get(name)
        if value is None:
            return None
        if isinstance(value, Tensor) and not value.is_floating_point():
            warn_once(f"the checkpoint's {name} is quantized ({value.dtype}) in a form of its own: it starts anew here")
            return None
        return self.floats(name)

    def blockwise(self, name: str) -> Tensor:
        """Codes of bitsandbytes' `quantize_blockwise`, whose `QuantState` lies under `{name}_scale`."""
        scale: Any = self.saved.get(f"{name}_scale")
        shape, n = tuple(self.p.shape), self.p.numel()
        codes = self.tensor(name, shape).reshape(-1).long()
        if not all(hasattr(scale, part) for part in ("absmax", "code", "blocksize")):
            raise ValueError(f"{self.where}: the checkpoint's {name}_scale is no QuantState of bitsandbytes")
        if not config.is_whole(scale.blocksize) or scale.blocksize < 1:
            raise ValueError(f"{self.where}: the checkpoint's {name}_scale has blocks of {scale.blocksize!r} elements")
        absmax = self.tensor(f"{name}_scale.absmax", (-(-n // scale.blocksize),), scale.absmax)
        book = self.tensor(f"{name}_scale.code", (256,), scale.code)
        values = book.float()[codes] * absmax.float().repeat_interleave(scale.blocksize)[:n]
        return self.finite(name, values.view(shape))


def _from_adam(where: str, step: int, m: Tensor, v: Tensor, group: dict[str, Any]) -> Carried:
    """Adam's m and v. Ours is the momentum of u = g / √v, of which Adam's m / √v is the nearest thing."""
    betas = ADAM_BETAS if group.get("betas") is None else group["betas"]
    if not isinstance(betas, (list, tuple)) or len(betas) < 2:
        raise ValueError(f"{where}: the checkpoint's group has betas={betas!r}; expected two numbers")
    beta1, beta2 = (checked_decay(beta, "betas", where) for beta in betas[:2])
    m = _unbiased(m, beta1, step)
    # A mean of squares is no less than the square of the mean; 8-bit codes can say 0 where it is small.
    v = torch.maximum(_unbiased(v, beta2, step), m.square())
    return Carried(step, momentum=(m / v.sqrt().clamp_min(FLOAT_TINY)).clamp(-1, 1), second=v)


def _read_prodigy(reader: Reader, group: dict[str, Any]) -> Carried:
    """Its averages are Adam's of d·g and (d·g)², with the distance d of the group, which counts the steps, too.

    That is the last d: while it grows, the averages count as smaller than they are.
    """
    d, step = group.get("d") or 1.0, checked_step(group.get("k", 0), f"{reader.where}: the checkpoint's k")
    if not config.is_number(d) or not 0 < d < math.inf:
        raise ValueError(f"{reader.where}: the checkpoint's group has d={d!r}; expected a number > 0")
    return _from_adam(reader.where, step, reader.floats("exp_avg") / d, reader.floats("exp_avg_sq") / d**2, group)


def _read_adafactor(reader: Reader, group: dict[str, Any]) -> Carried:
    """Its second moment needs no correction: the decay 1 - t^-0.8 is 0 in the first step."""
    second = reader.second()
    if second is None or (momentum := reader.optional("exp_avg")) is None:
        return Carried(reader.step, second=second)
    return Carried(reader.step, _direction(momentum, group.get("beta1") or ADAM_BETAS[0]), second)


def _read_automagic(reader: Reader, group: dict[str, Any], options: Options) -> Carried:
    second, polarity, momentum = reader.second(), None, reader.optional("exp_avg")
    if second is not None:
        betas = group.get("betas")
        theirs = betas[1] if isinstance(betas, (list, tuple)) and len(betas) > 1 else SECOND_DECAY
        beta2 = checked_decay(group.get("beta2", theirs), "beta2", reader.where)
        second = _unbiased(second.clamp_min(0), beta2, reader.step)
    if momentum is not None:
        momentum = _direction(momentum, options["betas"][0])
    if "last_polarity" in reader.saved:
        polarity = reader.tensor("last_polarity", tuple(reader.p.shape)).bool().to(torch.uint8)
    return Carried(reader.step, momentum, second, reader.rates(), polarity)


def _unbiased(average: Tensor, beta: float, step: int) -> Tensor:
    """A running average from 0, corrected for its start."""
    return average / (1 - beta**step) if step > 0 else average


def _direction(momentum: Tensor, beta1: float) -> Tensor:
    """The momentum with each block's root mean square set to that of noise.

    The versions of CameAMP average raw, normalised or damped gradients: its size means nothing across them.
    """
    blocks = Blocks(momentum)
    m = blocks.cut(momentum)
    rms = blocks.mean(m.square()).sqrt().clamp_min(FLOAT_TINY)
    return blocks.join(m / rms * math.sqrt((1 - beta1) / (1 + beta1))).view(momentum.shape)
