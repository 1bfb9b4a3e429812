"""Watches a training run, says what is wrong with it and what to do, and does it if asked."""

from __future__ import annotations

import contextlib
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from automagic_bnb import bnb, config, scalars
from automagic_bnb import state as st
from automagic_bnb.memory import memory_by_parameter, planned, quantized_share
from automagic_bnb.optimizer import Automagic
from automagic_bnb.run_log import as_number
from automagic_bnb.watch import loss_curve, schedulers

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

MIN_WINDOW = 10
"""Losses below which medians of half a window say nothing."""
FREE_MEMORY_SHARE = 0.05
"""Share of a GPU's memory that should be left beyond the run's highest need so far. On 8 GB these are 400 MB: a longer
caption or a larger picture in a batch takes as much."""
AT_BOUND_SHARE = 0.25
"""Of a group's elements: when a bound holds so many rates, it decides their mean. At lr = max_lr it holds about 0.4,
where weights have rates of their own. A rate that is found may grow up to a max_lr that was set: of those only a run
that stalls is at its bound."""
SKIPPED_SHARE = 0.01
"""Of all elements' updates since the last look: one whole step in a hundred. Loss scaling that seeks its scale skips
steps without the optimizer's seeing them; a weight or two with NaN gradients stays far below."""
QUANTIZED_SHARE = 0.5
"""Least share of the elements, where 8 bits are asked for, that should be in 8 bits."""
LR_FACTOR = 2.0
"""By which rates and bounds are changed: the smallest step whose effect shows in one window."""
MOST_CHANGES = 2
"""How often in a run stalls may double the rates, and how often one bound may be moved. A factor of 4 that was no help
says that something else is wrong."""

REASONS = {
    "divergence": "halve the learning rate; if the loss is NaN, take up an earlier checkpoint first",
    "skipped_gradients": "gradients are NaN or infinite: train in bfloat16 in place of float16, check the data and the "
    "loss for divisions and logarithms of 0, clip gradients; no option of the optimizer mends this",
    "memory_pressure": "quantize more: 8-bit states (optim_bits=8) or, where they are, factored=True",
    "convergence_stall": "quantize less: 32-bit states (optim_bits=32) or, where they are or memory is short, double "
    "the learning rate, at most twice and not beyond max_lr",
    "learning_rate_at_bound": "double max_lr where rates are held down by it, halve min_lr where they are held up, at "
    "most twice",
}
"""What `should_adjust_config` can return, the most urgent first, and the suggestion for each."""
HEALTH_ISSUES = {
    "unstable_loss": "the loss jumps: lower the learning rate, or take larger batches",
    "slow_convergence": "the loss has hardly fallen: change the learning rate, or quantize less",
    "quantization_ineffective": "most states are kept in 32 bits although 8 are asked for: lower min_8bit_size, and "
    "see that bitsandbytes can be imported",
}
"""What `check_training_health` can report besides, and the suggestion for each."""

MemoryProbe = Callable[[], tuple[int, int] | None]


class AdaptiveTrainingMonitor:
    """Tells when a run goes wrong, says what to do, and does it if asked.

    The losses are compared by medians of windows, and every verdict holds beyond the error that their scatter leaves.
    The reasons, the most urgent first:

    - "divergence": the window's median lies above that of the best window before it by 20 % of its level, by 1 % of the
      way that the loss had come down, and by 6 standard errors (12 with less than 25 losses); in the first window, so
      its newer half above its older. Or the newest loss, or more than 10 % of the
      window, are NaN or infinite.
    - "skipped_gradients": since the last look more than 1 % of all elements' updates were skipped, their gradient being
      NaN or infinite.
    - "memory_pressure": 5 % or less of a GPU's memory is left beyond PyTorch's highest need so far.
    - "convergence_stall": within the window the loss changes by less than 0.002 % of its level a step, two standard
      errors included, and it has not fallen from its first losses by 2 % and 3 standard errors. After such a fall,
      standing still is the end of training. The first losses are a fifth of a window, 10 at least.
    - "learning_rate_at_bound": `max_lr` or `min_lr` holds 25 % of a group's elements. With `auto_lr` the rate found
      may grow up to a `max_lr` that was set: there that bound counts only while the loss also stalls. Where `max_lr` is
      not set, it follows the mean rate, and holds too few to count.

    A loss with a period is compared crest with trough, so a window should hold at least two of its periods.

    What `apply_adjustment` does is bounded. A stall doubles rates at most twice in a run, never beyond `max_lr` and
    never after a divergence has halved them; it goes to 32 bits only where that leaves 5 % of the memory free, and
    never after memory pressure has taken them back. Each bound is moved at most twice. A reason for which nothing is
    left to do is not given again, but for "skipped_gradients", which only you can mend.

    Args:
        optimizer: an Automagic optimizer, or what a trainer wrapped around one.
        window_size: losses that are judged together, at least 10. More losses see through more noise: with 50, a rise
            by half the scatter of single losses is too little to tell, with 1000 it is plain.
        scheduler: the run's learning-rate scheduler. Most compute rates from a base of their own, which
            `apply_adjustment` must change too to change the rate for good. All of torch's are known, sequences and
            chains of them, and what accelerate, transformers and diffusers make of them; others give a warning.
        memory_probe: returns the free and total bytes of the device's memory, or None if it has no such bound; by
            default what the driver and PyTorch's allocator say of the parameters' device. What PyTorch holds beyond
            its highest need so far counts as free.

    Raises:
        TypeError, ValueError: not an Automagic optimizer, or a window that is none.

    Example:
        >>> monitor = AdaptiveTrainingMonitor(optimizer)
        >>> for step, batch in enumerate(batches):
        ...     monitor.update(train_step(batch))
        ...     if step % 50 == 0:
        ...         should_adjust, reason = monitor.should_adjust_config()
        ...         if should_adjust:
        ...             print(reason, monitor.get_adjustment_suggestion(reason))
    """

    def __init__(
        self,
        optimizer: Any,
        window_size: int = 50,
        *,
        scheduler: LRScheduler | None = None,
        memory_probe: MemoryProbe | None = None,
    ) -> None:
        self.optimizer = automagic_of(optimizer)
        self.window_size = config.check_whole("window_size", window_size, MIN_WINDOW)
        self.scheduler = scheduler
        self._memory_probe = memory_probe or self._cuda_memory
        self._has_saved = False
        """Memory has run short: 32 bits are not tried again."""
        self._has_cut = False
        """The rates were too high: they are not doubled again."""
        self._doublings = 0
        self._rate_factors: dict[int, float] = {}
        """By group, the product of all changes of its rate."""
        self._moves: Counter[tuple[int, str]] = Counter()
        """How often each group's bounds were moved."""
        self._exhausted: set[str] = set()
        """Reasons for which nothing is left to do."""
        self._pending: list[float | Tensor] = []
        self._losses: deque[float] = deque(maxlen=window_size)
        self._seen = 0
        """Losses since the start, or since the last adjustment."""
        self._first: np.ndarray | None = None
        """The first losses of the run."""
        self._best: np.ndarray | None = None
        """The complete window with the lowest median."""
        self._last_look = self._counts(self.optimizer.get_metrics())

    @property
    def loss_history(self) -> list[float]:
        """The newest losses, at most `window_size`."""
        self._take_pending()
        return list(self._losses)

    def update(self, loss: float | Tensor) -> None:
        """Note the loss of a step, as it is: averaged or smoothed ones hide their noise.

        A tensor is read later, many at a time, so that a GPU is not waited for at every step.

        Raises:
            TypeError: the loss is no number and no tensor of one element.
        """
        self._pending.append(loss_curve.checked_loss(loss))
        if len(self._pending) >= self.window_size:
            self._take_pending()

    def should_adjust_config(self) -> tuple[bool, str | None]:
        """Whether something is wrong, and what: the most urgent of `REASONS`, or (False, None).

        Rises and stalls are judged once `window_size` losses are there. Reads the optimizer's metrics, which takes
        about as long as a step: call it every 50 steps or so, not at each one.
        """
        metrics = self.optimizer.get_metrics(per_group=True)
        problems = [x for x in self._problems(metrics, self._last_look) if x not in self._exhausted]
        self._last_look = self._counts(metrics)
        return (True, problems[0]) if problems else (False, None)

    def get_adjustment_suggestion(self, reason: str | None) -> str:
        """What to do about it, in a sentence.

        Raises:
            ValueError: a reason that `should_adjust_config` does not give.
        """
        return "nothing to adjust" if reason is None else REASONS[checked_reason(reason)]

    def apply_adjustment(self, reason: str | None) -> dict[str, Any]:
        """Do what the suggestion says, and judge the run anew from here.

        After a change of storage CUDA's peak statistics start anew, too: the highest need so far is no longer the
        run's. If a conversion runs out of memory, storage and options are put back (what was factored by then
        stays coarser).

        Returns:
            The options changed and their new values, those of groups as "group0/lr" and so on; empty where nothing is
            left to change. Then the reason is not given again.

        Raises:
            ValueError: a reason that `should_adjust_config` does not give.
        """
        if reason is None:
            return {}
        adjust = {
            "divergence": self._halve_rates,
            "skipped_gradients": dict,
            "memory_pressure": self._quantize_more,
            "convergence_stall": self._quantize_less,
            "learning_rate_at_bound": self._widen_bounds,
        }
        changed = adjust[checked_reason(reason)]()
        if changed:
            self._pending, self._seen, self._best = [], 0, None
            self._losses.clear()
        elif reason != "skipped_gradients":
            self._exhausted.add(reason)
        return changed

    # --- what is wrong ----------------------------------------------------------------------------------------------

    def _take_pending(self) -> None:
        for loss in loss_curve.read_losses(self._pending):
            self._losses.append(loss)
            self._seen += 1
            if self._first is None and self._seen == max(self.window_size // 5, MIN_WINDOW):
                self._first = loss_curve.finite(self._losses)
            if self._seen % self.window_size == 0:
                window = loss_curve.finite(self._losses)
                if window.size and (self._best is None or np.median(window) < np.median(self._best)):
                    self._best = window
        self._pending = []

    def _problems(self, metrics: dict[str, float], since: tuple[float, float]) -> list[str]:
        """All that is wrong, by urgency; of skipped elements those since these `_counts`."""
        self._take_pending()
        window = list(self._losses)
        full = len(window) == self.window_size
        best = self._best if self._seen >= 2 * self.window_size else None  # until then it is this window, or most of it
        found = {
            "divergence": loss_curve.is_lost(window, self.window_size)
            or (full and loss_curve.diverges(window, best, self._first)),
            "skipped_gradients": self._skips(metrics, since),
            "memory_pressure": is_scarce(self._memory_probe()),
            "convergence_stall": self._stalls(),
            "learning_rate_at_bound": bool(self._groups_at_bound(metrics)),
        }
        return [reason for reason in REASONS if found[reason]]

    def _stalls(self) -> bool:
        return len(self._losses) == self.window_size and loss_curve.stalls(list(self._losses), self._first)

    def _counts(self, metrics: dict[str, float]) -> tuple[float, float]:
        """Updates of single elements so far, and those skipped; a parameter that is not stepped has none."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        steps = [self.optimizer.state.get(p, {}).get("step", 0) for p in parameters]
        updates = sum(st.local_tensor(p).numel() * step for p, step in zip(parameters, steps, strict=True))
        return float(updates), metrics["skipped_elements"]

    def _skips(self, metrics: dict[str, float], since: tuple[float, float]) -> bool:
        now = self._counts(metrics)
        if now[0] < since[0] or now[1] < since[1]:  # an earlier checkpoint was loaded: its whole life is judged, once
            since = (0.0, 0.0)
        updates, skipped = now[0] - since[0], now[1] - since[1]
        return updates > 0 and skipped / updates > SKIPPED_SHARE

    def _groups_at_bound(self, metrics: dict[str, float]) -> list[tuple[int, str]]:
        """Indices of the groups with many rates at a bound, and which; a rate that is found may grow up to max_lr."""
        stalls = self._stalls()
        return [
            (index, f"{end}_lr")
            for index, group in enumerate(self.optimizer.param_groups)
            for end in ("max", "min")
            if group[f"{end}_lr"] is not None
            and metrics[f"group{index}/lr/share_at_{end}"] >= AT_BOUND_SHARE
            and (stalls or end == "min" or not group["auto_lr"])
        ]

    def _devices(self) -> set[torch.device]:
        return {p.device for group in self.optimizer.param_groups for p in group["params"] if p.is_cuda}

    def _cuda_memory(self) -> tuple[int, int] | None:
        """Of the scarcest device: what the driver has, and what PyTorch keeps beyond its highest need; and the total.

        The need of this moment would not do: between two steps nothing of activations is there.
        """
        found = []
        for device in self._devices():
            free, total = torch.cuda.mem_get_info(device)
            kept = torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
            found.append((free + kept, total))
        return min(found, key=lambda x: x[0] / x[1], default=None)

    # --- what is done about it --------------------------------------------------------------------------------------

    def _quantize_more(self) -> dict[str, Any]:
        self._has_saved = True
        groups = [g for g in self.optimizer.param_groups if g["params"]]
        if not bnb.BITSANDBYTES_AVAILABLE:
            return {}
        if any(g["optim_bits"] == 32 for g in groups):
            return self._requantize(optim_bits=8)
        return {} if all(g["factored"] for g in groups) else self._requantize(factored=True)

    def _quantize_less(self) -> dict[str, Any]:
        all_32 = all(g["optim_bits"] == 32 for g in self.optimizer.param_groups)
        if all_32 or self._has_saved or not self._has_room(optim_bits=32):
            return self._double_rates()
        return self._requantize(optim_bits=32) or self._double_rates()

    def _has_room(self, **options: Any) -> bool:
        """Whether states with these options leave memory free."""
        memory = self._memory_probe()
        if memory is None:
            return True
        growth = state_bytes(self.optimizer, **options) - state_bytes(self.optimizer)
        return not is_scarce((memory[0] - growth, memory[1]))

    def _requantize(self, **options: Any) -> dict[str, Any]:
        """The options, if they are in force now; {} if memory did not suffice, and all is as before."""
        optimizer: Any = self.optimizer
        places = [vars(optimizer.config), optimizer.defaults, *optimizer.param_groups]
        changing = {*options, "force_8bit"}  # which ends with 8 bits
        before = [{name: place[name] for name in changing} for place in places]
        failed = False
        try:
            optimizer.requantize(**options)
        except torch.cuda.OutOfMemoryError:
            failed = self._has_saved = True
        if failed:  # outside of the handler, whose traceback holds the tensors of the conversion
            for place, values in zip(places, before, strict=True):
                place.update(values)
            torch.cuda.empty_cache()
            with contextlib.suppress(torch.cuda.OutOfMemoryError):  # then some stay converted, which is as well
                optimizer.requantize()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # the driver counts what PyTorch keeps for later as taken
            for device in self._devices():
                torch.cuda.reset_peak_memory_stats(device)
        return {} if failed else options

    def _halve_rates(self) -> dict[str, Any]:
        self._has_cut = True
        return self._scale_rates([1 / LR_FACTOR] * len(self.optimizer.param_groups))

    def _double_rates(self) -> dict[str, Any]:
        """Of the groups whose highest rate stays within max_lr, if that is set."""
        if self._has_cut or self._doublings == MOST_CHANGES:
            return {}
        metrics = self.optimizer.get_metrics(per_group=True)
        highest = [self._highest_rate(index, metrics) for index in range(len(self.optimizer.param_groups))]
        within = [
            group["max_lr"] is None or rate * LR_FACTOR <= group["max_lr"]
            for rate, group in zip(highest, self.optimizer.param_groups, strict=True)
        ]
        self._doublings += 1
        return self._scale_rates([LR_FACTOR if x else 1.0 for x in within])

    def _highest_rate(self, index: int, metrics: dict[str, float]) -> float:
        """Of a group, over its schedule."""
        group, factor = self.optimizer.param_groups[index], self._rate_factors.get(index, 1.0)
        found = metrics[f"group{index}/auto_lr/d"]
        if group["auto_lr"] and not math.isnan(found):  # as it is before the first step
            return found * factor
        own = max(group["lr"], scalars.base_rate(group) * factor)
        return max(own, schedulers.highest(self.scheduler, index, group))

    def _scale_rates(self, factors: list[float]) -> dict[str, Any]:
        """Scale each group's `lr`, which a rate that is being found is multiplied by, too, and its bounds follow."""
        groups, changed = self.optimizer.param_groups, {}
        schedulers.scale(self.scheduler, groups, factors)
        for index, (group, factor) in enumerate(zip(groups, factors, strict=True)):
            group["lr"] *= factor
            self._rate_factors[index] = self._rate_factors.get(index, 1.0) * factor
            if factor != 1:
                changed[f"group{index}/lr"] = group["lr"]
        return changed

    def _widen_bounds(self) -> dict[str, Any]:
        changed = {}
        for index, bound in self._groups_at_bound(self.optimizer.get_metrics(per_group=True)):
            if self._moves[index, bound] < MOST_CHANGES:
                self._moves[index, bound] += 1
                group = self.optimizer.param_groups[index]
                group[bound] *= LR_FACTOR if bound == "max_lr" else 1 / LR_FACTOR
                changed[f"group{index}/{bound}"] = group[bound]
        return changed


def check_training_health(
    optimizer: Any, losses: Iterable[float | Tensor], threshold_ratio: float = 0.1
) -> dict[str, Any]:
    """A report on a run so far: what `AdaptiveTrainingMonitor` looks for, and progress, stability and quantization.

    The monitor's reasons are those of its class, in windows of 50 losses, at the end of the losses. Besides:

    - "slow_convergence": from the first fifth of the losses to the last, the median has fallen by less than
      `threshold_ratio` of its level, by 3 standard errors beyond doubt. Judged from 20 losses on, and not where
      "divergence" or "convergence_stall" says it. In a good run, the losses of fine-tunes and of diffusion
      at random noise levels often fall by a few percent only: ask for less there, such as 0.02.
    - "unstable_loss": the newest quarter of the losses, 20 at least, scatters by more than 3 times its level, or by
      more than 3 times the scatter before it and 10 % of its level. Judged from 40 losses on.
    - "quantization_ineffective": less than 50 % of the elements in groups with `optim_bits=8` are in 8 bits.

    "skipped_gradients" is judged over the optimizer's whole life, as it keeps nothing but the total: 3 lost steps among
    the last of 403 are less than 1 %. The monitor, which looks from time to time, sees them.

    Args:
        optimizer: an Automagic optimizer, or what a trainer wrapped around one.
        losses: of single steps, oldest first. Where the loss began belongs to it: of a run long at its floor, the last
            losses alone look like no progress.
        threshold_ratio: the share of its level by which the loss should have fallen, 0 to 1.

    Returns:
        "status": "healthy" or "warning"; "issues": keys of `REASONS` and `HEALTH_ISSUES`; "suggestions": a sentence for
        each, in the same order.

    Raises:
        TypeError, ValueError: not an Automagic optimizer, a loss that is no number, a ratio out of range.
    """
    if not 0 <= as_number("threshold_ratio", threshold_ratio) <= 1:
        raise ValueError(f"threshold_ratio={threshold_ratio!r}: must be from 0 to 1")
    monitor = AdaptiveTrainingMonitor(optimizer)
    values = loss_curve.read_losses([loss_curve.checked_loss(loss) for loss in losses])
    for loss in values:
        monitor.update(loss)
    issues = monitor._problems(monitor.optimizer.get_metrics(per_group=True), since=(0.0, 0.0))
    seen = loss_curve.finite(values)
    if seen.size >= loss_curve.LEAST_LOSSES:
        if not {"divergence", "convergence_stall"} & set(issues) and loss_curve.is_slow(seen, threshold_ratio):
            issues.append("slow_convergence")
        if loss_curve.is_unstable(seen):
            issues.append("unstable_loss")
    if quantized_share(monitor.optimizer) < QUANTIZED_SHARE:
        issues.append("quantization_ineffective")
    known = {**REASONS, **HEALTH_ISSUES}
    return {
        "status": "warning" if issues else "healthy",
        "issues": issues,
        "suggestions": [known[issue] for issue in issues],
    }


def automagic_of(optimizer: Any) -> Automagic:
    """The Automagic optimizer that this is, or that a trainer has wrapped.

    Raises:
        TypeError: there is none.
    """
    inner = optimizer
    while not isinstance(inner, Automagic):
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise TypeError(f"optimizer={type(optimizer).__name__}: must be an Automagic optimizer, or wrap one")
    return inner


def checked_reason(reason: str) -> str:
    if reason not in REASONS:
        raise ValueError(f"reason={reason!r}: must be one of {', '.join(map(repr, REASONS))}, or None")
    return reason


def is_scarce(memory: tuple[int, int] | None) -> bool:
    """Whether of (free, total) bytes too little is free."""
    return memory is not None and memory[0] <= FREE_MEMORY_SHARE * memory[1]


def state_bytes(optimizer: Automagic, **options: Any) -> int:
    """Of all states, as they are stored now or, where options are given, would be with these in force for all."""
    total = 0
    for m in memory_by_parameter(optimizer):
        asked = {**m.options, **options}
        storage = st.storage_of(m.sized, asked, m.is_embedding) if options else m.storage
        pieces = [] if m.is_frozen else planned({}, m.p, storage, asked, optimizer.is_paged, m.probe_stride)
        total += sum(piece.bytes for piece in pieces if not piece.key.startswith("qmap"))  # these are shared
    return total
