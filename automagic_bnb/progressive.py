"""A schedule of storage: from 32 bits to 8 as training settles."""

from __future__ import annotations

from typing import Any

from automagic_bnb import config
from automagic_bnb.notices import warn_once
from automagic_bnb.requantization import set_for_all

STAGES, END_SIZE = 4, 4096


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
        optimizer: Any,
        total_steps: int,
        *,
        warmup: float = 0.2,
        falling: float = 0.6,
        stages: int = STAGES,
        end_size: int = END_SIZE,
        factored: bool | None = None,
    ) -> None:
        if not hasattr(optimizer, "requantize"):
            raise TypeError(f"optimizer={type(optimizer).__name__}: must be an Automagic optimizer, and not wrapped")
        for name, number in (("total_steps", total_steps), ("stages", stages), ("end_size", end_size)):
            config.check_whole(name, number, 1)
        for name, share in (("warmup", warmup), ("falling", falling)):
            if not config.is_number(share):
                raise TypeError(f"{name}={share!r}: must be a share of the steps, a number from 0 to 1")
        if not (0 <= warmup <= 1 and 0 <= falling <= 1 and warmup + falling <= 1):
            raise ValueError(
                f"warmup={warmup!r}, falling={falling!r}: shares of the steps, each from 0 to 1 and at most 1 together"
            )
        if falling == 0 and (stages, end_size) != (STAGES, END_SIZE):
            warn_once(
                f"stages={stages!r}, end_size={end_size!r}: have no effect with falling=0, in which no threshold "
                "falls; pass a larger falling, or leave them out"
            )
        self.optimizer, self.total_steps = optimizer, total_steps
        self.warmup, self.falling, self.stages = warmup, falling, stages
        self.factored = None if factored is None else config.check_option("factored", factored)
        sizes = [p.numel() for group in optimizer.param_groups for p in group["params"]]
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
        set_for_all(self.optimizer, self.options())


def _falling(first: int, last: int, count: int) -> list[int]:
    """Whole numbers from first to last in equal ratios."""
    if count == 1:
        return [last]
    return [round(first * (last / first) ** (i / (count - 1))) for i in range(count)]
