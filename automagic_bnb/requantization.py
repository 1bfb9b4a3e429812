"""Changing how states are stored while training runs: what has been learned is converted, nothing starts over.

From 32 to 8 bits everything goes to the nearest code; from 8 to 32 bits nothing is lost, and back again every code and
every mask byte is what it was. (Not so of a block that no gradient has reached, whose codes all mean 0, and of one with
the code of 1, which bitsandbytes and version 0.2.0 write: its values move by up to half a gap.) To factored storage v
and r become the row and column means of their tiles, which is a loss; m and the mask do not change between 8-bit and
factored storage.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from automagic_bnb import bnb, config, reference
from automagic_bnb import quantization as q
from automagic_bnb import state as st
from automagic_bnb.factored import Tiling
from automagic_bnb.moments import FACTORED_NAMES, moments_of
from automagic_bnb.notices import warn_once

if TYPE_CHECKING:
    from automagic_bnb.optimizer import Automagic

CODED_KEYS = frozenset(["state1", "absmax1", "qmap1", "qmap2", "lr_mask"])
"""What 8-bit and factored storage hold alike."""
MEANS = frozenset(f"{name}_{side}" for name in FACTORED_NAMES.values() for side in ("row", "col"))
CONVERTED_KEYS = CODED_KEYS | MEANS | {"state2", "state3", "absmax2", "absmax3", "last_polarity"}
"""What depends on the storage; all else of a state stays the same tensor."""
CHUNK = 2**20
"""Elements converted at once; more where a period of the tiling holds more."""


@torch.no_grad()
def requantize(
    optimizer: Automagic, parameters: Tensor | Iterable[Tensor] | None = None, **options: bool | int | None
) -> None:
    """`Automagic.requantize`, which says what the arguments mean."""
    changes = _checked(optimizer, options)
    owners = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    optimizer._adopt_overrides()
    if parameters is None:
        _set_for_all(optimizer, changes)
    else:
        owners = _chosen(owners, parameters)
        _override(optimizer, [p for _, p in owners], changes)
    # Now, not at the end: the plan of the fused step holds on to every tensor that is about to be replaced.
    optimizer._fused.forget()
    for group, p in owners:
        state = optimizer.state.get(p, {})
        if "state1" in state:
            effective, local = optimizer.effective_options(group, p), st.local_tensor(p)
            storage = st.storage_of(local, effective, optimizer.facts_of(p).is_embedding)
            # One assignment at the end: an error in between leaves the parameter all in its old storage.
            new = converted(state, local, storage, effective, optimizer.is_paged)
            optimizer.state[p] = st.WatchedState(new)
    if changes.get("stable_emb"):
        optimizer._check_embeddings()


def _checked(optimizer: Automagic, options: dict[str, Any]) -> dict[str, Any]:
    """The options given, as they are stored.

    Raises:
        TypeError, ValueError: an illegal value, or values that contradict each other.
    """
    given = {name: value for name, value in options.items() if value is not None}
    changes = {name: config.check_parameter_option(name, value, " of requantize") for name, value in given.items()}
    if changes.get("force_8bit"):
        for group in optimizer.param_groups:
            config.check_storage({**group, **changes}, " of requantize")
    if changes.get("optim_bits") == 8 and not bnb.BITSANDBYTES_AVAILABLE:
        warn_once(bnb.MISSING_WARNING)
    return changes


def _without_force(changes: dict[str, Any]) -> dict[str, Any]:
    """The changes, and with 32 bits the end of what stands against them."""
    return {**changes, "force_8bit": False} if changes.get("optim_bits") == 32 else changes


def _set_for_all(optimizer: Automagic, changes: dict[str, Any]) -> None:
    """Put the options where states made later, groups added later and checkpoints take them from."""
    changes = _without_force(changes)
    for name, value in changes.items():
        setattr(optimizer.config, name, value)
    optimizer.defaults.update(changes)
    for group in optimizer.param_groups:
        group.update(changes)


def _chosen(
    owners: list[tuple[dict[str, Any], Tensor]], parameters: Tensor | Iterable[Tensor]
) -> list[tuple[dict[str, Any], Tensor]]:
    """The given parameters with their groups.

    Raises:
        TypeError: something else than a tensor among them.
        ValueError: a tensor that is no parameter of this optimizer.
    """
    groups = {id(p): group for group, p in owners}
    several = isinstance(parameters, Iterable) and not isinstance(parameters, Tensor)
    chosen: list[Any] = list(parameters) if several else [parameters]
    for p in chosen:
        if not isinstance(p, Tensor):
            raise TypeError(
                f"requantize takes parameters of this optimizer, not {p!r} ({type(p).__name__}); "
                "options go by name, as in optim_bits=8"
            )
        if id(p) not in groups:
            raise ValueError(
                f"requantize was given a tensor of shape {tuple(p.shape)} that is no parameter of this optimizer; "
                "take it from optimizer.param_groups, or leave the argument out to convert all"
            )
    return [(groups[id(p)], p) for p in chosen]


def _override(optimizer: Automagic, parameters: list[Tensor], changes: dict[str, Any]) -> None:
    if changes:
        for p in parameters:
            optimizer._overrides[p] = {**optimizer._overrides.get(p, {}), **_without_force(changes)}


# --- one parameter ----------------------------------------------------------------------------------------------------


def converted(state: st.State, p: Tensor, storage: str, options: dict[str, Any], paged: bool = False) -> st.State:
    """The state of a (local) parameter in another storage, as a new dict; what needs no conversion is not copied.

    Args:
        state: holds at least `state1`; it is not changed.
        storage: "32bit", "8bit" or "factored".
        options: the parameter's effective options.
        paged: put the large new tensors into paged memory (CUDA only).
    """
    held = st.storage_held(state)
    if held == storage:
        return state
    came = bool({"state3", "exp_avg_res_row"} & state.keys())
    numbers = [1, 2, 3] if came else [1, 2]
    same = CODED_KEYS if "32bit" not in (held, storage) else frozenset()
    new = {name: value for name, value in state.items() if name not in CONVERTED_KEYS or name in same}
    for name, make in st.recipes(p, storage, {**options, "came": came}, paged).items():
        if name in CONVERTED_KEYS and name not in new:
            new[name] = make()
    rounded = [_convert(part, numbers, bool(same)) for part in _parts(p, state, new, "factored" in (held, storage))]
    if storage != "32bit" and not same and rounded:
        changed, total = torch.stack(rounded).sum(dim=0)
        stats = state["tensor_stats"].clone()
        # W follows the rounded mask, so that the mean rate stays what it was. An unrounded mask keeps W to the bit.
        stats[st.MASK_MEAN] = torch.where(changed > 0, total / p.numel(), stats[st.MASK_MEAN].double())
        new["tensor_stats"] = stats
    return new


@dataclass(frozen=True)
class Part:
    """The same stretch of the old and the new state."""

    old: st.State
    new: st.State
    blocks: reference.Blocks


def _parts(p: Tensor, old: st.State, new: st.State, factored: bool) -> Iterator[Part]:
    """A parameter cut into parts of about `CHUNK` elements that end with a row and a block, and with their tiles."""
    n, (_, columns) = p.numel(), st.matrix_shape(p)
    if n == 0:
        return
    tiling, period = Tiling.of(p), math.lcm(columns, q.BLOCK)
    unit = period * (tiling.height if factored else 1)
    stride = unit * max(1, CHUNK // unit)
    # A rest shorter than a period has fewer strips, so its tiles would be numbered otherwise: it joins the part before.
    starts = [start for start in range(0, n, stride) if start == 0 or n - start >= period]
    for start, stop in zip(starts, [*starts[1:], n], strict=True):
        before, after = (_stretch(state, start, stop, columns, tiling) for state in (old, new))
        yield Part(before, after, reference.Blocks(before["lr_mask"]))


def _stretch(state: st.State, start: int, stop: int, columns: int, tiling: Tiling) -> st.State:
    """Views of the converted tensors between two elements."""
    cut: st.State = {}
    for name in CONVERTED_KEYS & state.keys():
        value = state[name]
        if name in st.ELEMENT_KEYS:
            cut[name] = value.view(-1)[start:stop].view(-1, columns)
        elif name.startswith("absmax"):
            cut[name] = value[start // q.BLOCK : -(-stop // q.BLOCK)]
        elif name.endswith("_row"):
            cut[name] = value[start // tiling.width : -(-stop // tiling.width)]
        elif name.endswith("_col"):
            per_tile = tiling.strips * tiling.height * q.BLOCK
            cut[name] = value[start // per_tile * tiling.strips : -(-stop // per_tile) * tiling.strips]
        else:
            cut[name] = value
    return cut


def _convert(part: Part, numbers: list[int], coded: bool) -> Tensor:
    """Write the moments, and unless both storages are `coded` the mask; returns what `_convert_mask` does."""
    keep = torch.ones(part.blocks.blocks, q.BLOCK, dtype=torch.bool, device=part.old["lr_mask"].device)
    source, target = moments_of(part.old, part.blocks, keep), moments_of(part.new, part.blocks, keep)
    for number in numbers:
        if number > 1 or not coded:
            target.write(number, source.read(number), None)
    return keep.new_zeros(2, dtype=torch.float64) if coded else _convert_mask(part)


def _convert_mask(part: Part) -> Tensor:
    """Write k and π; returns how many k were rounded and Σ 2^(k/16) of the rounded ones, float64 [2]."""
    k, polarity = reference.read_mask(part.old, part.blocks)
    if part.new["lr_mask"].dtype == torch.uint8:
        whole = k.round()
        part.new["lr_mask"].view(-1).copy_(part.blocks.join(q.pack_mask(whole, polarity)))
        return torch.stack([(whole != k).sum().double(), part.blocks.join(torch.exp2(whole / 16)).double().sum()])
    part.new["lr_mask"].view(-1).copy_(part.blocks.join(k))
    part.new["last_polarity"].view(-1).copy_(part.blocks.join(polarity))
    return torch.zeros(2, dtype=torch.float64, device=k.device)


# --- a schedule -------------------------------------------------------------------------------------------------------


class ProgressiveQuantization:
    """Storage that shrinks as training settles: 32 bits first, then 8 for ever smaller parameters, then 8 for all.

    The threshold (`min_8bit_size`) falls in equal ratios from the size of the largest parameter to `end_size`.

    Args:
        optimizer: its storage is the schedule's from here on; overrides of single parameters stay in force.
        total_steps: steps of the whole run.
        warmup: share of the steps before anything is quantized.
        falling: share of the steps in which the threshold falls.
        stages: how many thresholds there are on the way.
        end_size: the last of them.
        factored: whether second moments are factored in the last phase, and not before; None leaves the option as it
            is.

    Raises:
        TypeError, ValueError: a share outside 0 to 1 or both together above 1, or a number below 1.

    Example:
        >>> model = torch.nn.Linear(512, 512)
        >>> optimizer = Automagic8bit(model.parameters())
        >>> schedule = ProgressiveQuantization(optimizer, total_steps=1000)
        >>> schedule.step()  # after each optimizer.step()
        {}
    """

    def __init__(
        self,
        optimizer: Automagic,
        total_steps: int,
        *,
        warmup: float = 0.2,
        falling: float = 0.6,
        stages: int = 4,
        end_size: int = 4096,
        factored: bool | None = None,
    ) -> None:
        if not hasattr(optimizer, "requantize"):
            raise TypeError(f"optimizer={type(optimizer).__name__}: must be an Automagic optimizer, and not wrapped")
        for name, number in (("total_steps", total_steps), ("stages", stages), ("end_size", end_size)):
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"{name}={number!r}: must be a whole number >= 1")
            if number < 1:
                raise ValueError(f"{name}={number!r}: must be a whole number >= 1")
        for name, share in (("warmup", warmup), ("falling", falling)):
            if isinstance(share, bool) or not isinstance(share, (int, float)):
                raise TypeError(f"{name}={share!r}: must be a share of the steps, a number from 0 to 1")
        if not (0 <= warmup <= 1 and 0 <= falling <= 1 and warmup + falling <= 1):
            raise ValueError(
                f"warmup={warmup!r}, falling={falling!r}: shares of the steps, each from 0 to 1 and at most 1 together"
            )
        self.optimizer, self.total_steps = optimizer, total_steps
        self.warmup, self.falling, self.stages = warmup, falling, stages
        self.factored = None if factored is None else config.check_option("factored", factored)
        sizes = [st.local_tensor(p).numel() for group in optimizer.param_groups for p in group["params"]]
        self.thresholds = _falling(max([end_size, *sizes]), end_size, stages)
        self.load_state_dict({"steps": 0})

    def options(self, steps: int | None = None) -> dict[str, Any]:
        """The storage options in force after so many steps; by default, after those taken so far."""
        done = (self.steps if steps is None else steps) / self.total_steps
        last = done >= self.warmup + self.falling
        options: dict[str, Any] = {"optim_bits": 32 if done < self.warmup else 8}
        if last:
            options["min_8bit_size"] = 0
        elif done >= self.warmup:
            stage = int((done - self.warmup) / self.falling * self.stages)
            options["min_8bit_size"] = self.thresholds[min(stage, self.stages - 1)]
        if self.factored is not None:
            options["factored"] = last and self.factored
        return options

    def step(self) -> dict[str, Any]:
        """Count one step and convert what is due; call it after each `optimizer.step()`.

        Returns:
            The options that changed with this step; {} for most steps.
        """
        before = self.options()
        self.steps += 1
        after = self.options()
        if after != before or not self._in_force:
            self._in_force = False  # an error in the middle leaves the rest to the next step
            self.optimizer.requantize(**after)
            self._in_force = True
        return {name: value for name, value in after.items() if before.get(name) != value}

    def state_dict(self) -> dict[str, int]:
        """The steps taken; the storage itself is in the optimizer's checkpoint."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from a checkpoint; before or after the optimizer's own `load_state_dict`, which is needed too.

        States that are in another storage wait for the next `step`: the optimizer may be about to load others.
        """
        self.steps = int(state_dict["steps"])
        self._in_force = False
        _set_for_all(self.optimizer, self.options())


def _falling(first: int, last: int, count: int) -> list[int]:
    """Whole numbers from first to last in equal ratios."""
    if count == 1:
        return [last]
    return [round(first * (last / first) ** (i / (count - 1))) for i in range(count)]
