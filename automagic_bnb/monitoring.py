"""Watches a training run, says what is wrong with it and what to do, and does it if asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from automagic_bnb import bnb, loss_curve
from automagic_bnb import state as st
from automagic_bnb.memory import quantized_share
from automagic_bnb.optimizer import Automagic
from automagic_bnb.run_log import as_number

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

MIN_WINDOW = 10
"""Losses below which medians of half a window say nothing."""
FREE_MEMORY_SHARE = 0.1
"""Least share of a GPU's memory that the driver should have to give. PyTorch keeps what it once took, so this is what
is left beyond the highest need so far."""
AT_BOUND_SHARE = 0.25
"""Of a group's elements: when a bound holds so many rates, it decides their mean. At lr = max_lr it holds about 0.4."""
SKIPPED_SHARE = 0.01
"""Of all elements' updates since the last look: one whole step in a hundred. Loss scaling that seeks its scale skips
steps without the optimizer's seeing them; a weight or two with NaN gradients stays far below."""
QUANTIZED_SHARE = 0.5
"""Least share of the elements, where 8 bits are asked for, that should be in 8 bits."""
LR_FACTOR = 2.0
"""By which rates and bounds are changed: the smallest step whose effect shows in one window."""

REASONS = {
    "divergence": "halve the learning rate; if the loss is NaN, take up an earlier checkpoint first",
    "memory_pressure": "quantize more: 8-bit states (optim_bits=8) or, where they are, factored=True",
    "skipped_gradients": "gradients are NaN or infinite: train in bfloat16 in place of float16, check the data and the "
    "loss for divisions and logarithms of 0, clip gradients; no option of the optimizer mends this",
    "convergence_stall": "quantize less: 32-bit states (optim_bits=32) or, where they are, double the learning rate",
    "learning_rate_at_bound": "double max_lr where rates are held down by it, halve min_lr where they are held up",
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

    Args:
        optimizer: an Automagic optimizer, or what a trainer wrapped around one.
        window_size: losses that are judged together, at least 10. More losses see through more noise: with 50, a rise
            by half the scatter of single losses is too little to tell, with 1000 it is plain.
        scheduler: the run's learning-rate scheduler. Most compute rates from a base of their own, which
            `apply_adjustment` must change too to change the rate for good.
        memory_probe: returns the free and total bytes of the device's memory, or None if it has no such bound; by
            default `torch.cuda.mem_get_info` of the parameters' device.

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
        if isinstance(window_size, bool) or not isinstance(window_size, int):
            raise TypeError(f"window_size={window_size!r}: must be a whole number >= {MIN_WINDOW}")
        if window_size < MIN_WINDOW:
            raise ValueError(f"window_size={window_size!r}: must be a whole number >= {MIN_WINDOW}")
        self.window_size = window_size
        self.scheduler = scheduler
        self._memory_probe = memory_probe or self._cuda_memory
        self._pending: list[float | Tensor] = []
        self._losses: deque[float] = deque(maxlen=window_size)
        self._seen = 0
        """Losses since the start, or since the last adjustment."""
        self._first: float | None = None
        self._best: np.ndarray | None = None
        """The complete window with the lowest median."""
        metrics = self.optimizer.get_metrics()
        self._last_look = metrics["step"], metrics["skipped_elements"]

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
        problems = self._problems(metrics, self._last_look)
        self._last_look = metrics["step"], metrics["skipped_elements"]
        return (True, problems[0]) if problems else (False, None)

    def get_adjustment_suggestion(self, reason: str | None) -> str:
        """What to do about it, in a sentence.

        Raises:
            ValueError: a reason that `should_adjust_config` does not give.
        """
        return "nothing to adjust" if reason is None else REASONS[checked_reason(reason)]

    def apply_adjustment(self, reason: str | None) -> dict[str, Any]:
        """Do what the suggestion says, and judge the run anew from here.

        Returns:
            The options changed and their new values, those of groups as "group0/lr" and so on; empty where the
            optimizer has nothing left to change.

        Raises:
            ValueError: a reason that `should_adjust_config` does not give.
        """
        if reason is None:
            return {}
        adjust = {
            "divergence": lambda: self._scale_rates(1 / LR_FACTOR),
            "memory_pressure": self._quantize_more,
            "skipped_gradients": dict,
            "convergence_stall": self._quantize_less,
            "learning_rate_at_bound": self._widen_bounds,
        }
        changed = adjust[checked_reason(reason)]()
        if changed:
            self._pending, self._seen, self._best = [], 0, None
            self._losses.clear()
        return changed

    # --- what is wrong ----------------------------------------------------------------------------------------------

    def _take_pending(self) -> None:
        for loss in loss_curve.read_losses(self._pending):
            self._losses.append(loss)
            self._seen += 1
            if self._first is None and self._seen == max(self.window_size // 5, 1):
                self._first = loss_curve.median(list(self._losses))
            if self._seen % self.window_size == 0:
                window = loss_curve.finite(self._losses)
                if window.size and (self._best is None or np.median(window) < np.median(self._best)):
                    self._best = window
        self._pending = []

    def _problems(self, metrics: dict[str, float], since: tuple[float, float]) -> list[str]:
        """All that is wrong, by urgency; of skipped elements those since this step and number of them."""
        self._take_pending()
        window = list(self._losses)
        full = len(window) == self.window_size
        best = self._best if self._seen >= 2 * self.window_size else None  # until then it is this window, or most of it
        found = {
            "divergence": loss_curve.is_lost(window, self.window_size)
            or (full and loss_curve.diverges(window, best, self._first)),
            "memory_pressure": is_scarce(self._memory_probe()),
            "skipped_gradients": self._skips(metrics, since),
            "convergence_stall": full and loss_curve.stalls(window, self._first),
            "learning_rate_at_bound": bool(self._groups_at_bound(metrics)),
        }
        return [reason for reason in REASONS if found[reason]]

    def _skips(self, metrics: dict[str, float], since: tuple[float, float]) -> bool:
        step, skipped = since
        elements = sum(st.local_tensor(p).numel() for group in self.optimizer.param_groups for p in group["params"])
        updates = elements * (metrics["step"] - step)
        return updates > 0 and (metrics["skipped_elements"] - skipped) / updates > SKIPPED_SHARE

    def _groups_at_bound(self, metrics: dict[str, float]) -> list[tuple[int, str]]:
        """Indices of the groups with many rates at a bound, and which."""
        return [
            (index, f"{end}_lr")
            for index in range(len(self.optimizer.param_groups))
            for end in ("max", "min")
            if metrics[f"group{index}/lr/share_at_{end}"] >= AT_BOUND_SHARE
        ]

    def _cuda_memory(self) -> tuple[int, int] | None:
        devices = {p.device for group in self.optimizer.param_groups for p in group["params"] if p.is_cuda}
        free = [torch.cuda.mem_get_info(device) for device in devices]
        return min(free, key=lambda x: x[0] / x[1], default=None)

    # --- what is done about it --------------------------------------------------------------------------------------

    def _quantize_more(self) -> dict[str, Any]:
        groups = [g for g in self.optimizer.param_groups if g["params"]]
        if not bnb.BITSANDBYTES_AVAILABLE:
            return {}
        if any(g["optim_bits"] == 32 for g in groups):
            return self._requantize(optim_bits=8)
        return {} if all(g["factored"] for g in groups) else self._requantize(factored=True)

    def _quantize_less(self) -> dict[str, Any]:
        if all(g["optim_bits"] == 32 for g in self.optimizer.param_groups):
            return self._scale_rates(LR_FACTOR)
        return self._requantize(optim_bits=32)

    def _requantize(self, **options: Any) -> dict[str, Any]:
        optimizer: Any = self.optimizer
        optimizer.requantize(**options)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # the driver counts what PyTorch keeps for later as taken
        return options

    def _scale_rates(self, factor: float) -> dict[str, Any]:
        """Scale each group's `lr`, which a rate that is being found is multiplied by, too, and its bounds follow."""
        changed = {}
        for index, group in enumerate(self.optimizer.param_groups):
            group["lr"] *= factor
            changed[f"group{index}/lr"] = group["lr"]
        scheduler: Any = getattr(self.scheduler, "scheduler", self.scheduler)  # accelerate's wraps one
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [base * factor for base in scheduler.base_lrs]
        return changed

    def _widen_bounds(self) -> dict[str, Any]:
        changed = {}
        for index, bound in self._groups_at_bound(self.optimizer.get_metrics(per_group=True)):
            group = self.optimizer.param_groups[index]
            group[bound] *= LR_FACTOR if bound == "max_lr" else 1 / LR_FACTOR
            changed[f"group{index}/{bound}"] = group[bound]
        return changed


def check_training_health(
    optimizer: Any, losses: Iterable[float | Tensor], threshold_ratio: float = 0.1
) -> dict[str, Any]:
    """A report on a run so far: what `AdaptiveTrainingMonitor` looks for, and progress, stability and quantization.

    Args:
        optimizer: an Automagic optimizer, or what a trainer wrapped around one.
        losses: of single steps, oldest first. Where the loss began belongs to it: of a run long at its floor, the last
            losses alone look like no progress.
        threshold_ratio: the share of its level by which the loss should have fallen from the first fifth of the losses
            to the last, 0 to 1. Judged from 20 losses on.

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
    return memory is not None and memory[0] < FREE_MEMORY_SHARE * memory[1]
