"""Takes the metrics of a training run to where they are looked at: a run log, TensorBoard, a trainer's own logger."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from automagic_bnb import auto_lr, config, scalars
from automagic_bnb import state as st
from automagic_bnb.notices import warn_once
from automagic_bnb.run_log import RunLog, as_number
from automagic_bnb.watch.monitoring import automagic_of

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

PREFIX = "automagic/"
"""What the optimizer's metrics are called by beside those of others."""


def training_metrics(optimizer: Any, prefix: str = "") -> dict[str, float]:
    """`get_metrics`, the state's bytes ("state_bytes"), and the bounds of the rates at this point of the schedule.

    "lr/bound_min" and "lr/bound_max" are the lowest `min_lr` and the highest `max_lr` of all groups, multiplied by how
    far the schedule has come down; where `max_lr` is not set, ten times the mean rate stands for it.

    Args:
        optimizer: an Automagic optimizer, or what a trainer wrapped around one.
        prefix: put before every name, and NaN is left out, as loggers want it; "automagic/" gives the names that
            `TensorBoardLogger` and the trainers' callbacks log.

    Raises:
        TypeError: another optimizer.

    Example:
        >>> wandb.log({"loss": loss, **training_metrics(optimizer, prefix="automagic/")}, step=step)
        >>> mlflow.log_metrics(training_metrics(optimizer, prefix="automagic/"), step=step)
    """
    inner = automagic_of(optimizer)
    groups = [(group, scalars.relative_rate(group)) for group in inner.param_groups if group["params"]]
    found = {
        **inner.get_metrics(),
        "lr/bound_min": min((group["min_lr"] * relative for group, relative in groups), default=math.nan),
        "lr/bound_max": max((auto_lr.upper_bound(group) for group, _ in groups), default=math.nan),
        "state_bytes": float(sum(st.state_bytes(state) for state in inner.state.values() if isinstance(state, dict))),
    }
    return prefixed(found, prefix) if prefix else found


class TensorBoardLogger:
    """Writes the optimizer's metrics to TensorBoard, in a training loop of your own.

    Args:
        logdir_or_writer: the folder for a writer of its own, or a `SummaryWriter`, which stays yours to close.
        optimizer: an Automagic optimizer, or what a trainer wrapped around one.
        every: steps from one writing to the next, 1 or more. Metrics take about as long as a step.

    Raises:
        ImportError: tensorboard is not installed.
        TypeError, ValueError: another optimizer, or a number of steps that is none.

    Example:
        >>> with TensorBoardLogger("runs/first", optimizer, every=10) as logger:
        ...     for step, batch in enumerate(batches):
        ...         loss = backward(batch)
        ...         optimizer.step()
        ...         logger.log(step, loss)
        ...         optimizer.zero_grad()
    """

    def __init__(self, logdir_or_writer: str | Path | SummaryWriter, optimizer: Any, every: int = 10) -> None:
        self.optimizer = automagic_of(optimizer)
        self.every = checked_every(every)
        self._sinks = Sinks(None, logdir_or_writer)

    def log(self, step: int, loss: Any = None) -> None:
        """Write this step's loss and metrics, if the step is a multiple of `every`.

        Call it between `step()` and `zero_grad()`: some metrics need gradients. NaN is left out.
        """
        if step % self.every == 0:
            self._sinks.write(step, {} if loss is None else {"loss": loss}, training_metrics(self.optimizer))

    def close(self) -> None:
        """Write what is left, and close a writer of its own."""
        self._sinks.close()

    def __enter__(self) -> TensorBoardLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def trainer_callback(
    directory: str | Path | None = None,
    *,
    tensorboard: str | Path | SummaryWriter | None = None,
    trainer: Any = None,
    every: int = 10,
) -> Any:
    """A callback for Hugging Face's Trainer, which logs the optimizer's metrics.

    Args:
        directory: folder for a `RunLog`, which also gets all that the trainer logs.
        tensorboard: folder for a writer of its own, or a `SummaryWriter`.
        trainer: the trainer itself, to log through it: to all it reports to, and to `trainer.state.log_history`.
        every: optimizer steps from one logging to the next, 1 or more.

    Raises:
        ImportError: transformers, or where it is asked for tensorboard, is not installed.
        TypeError, ValueError: nowhere to log to, or a number of steps that is none.

    Example:
        >>> trainer.add_callback(trainer_callback("runs/first", trainer=trainer))
    """
    needs_a_sink(directory, tensorboard, trainer)
    every = checked_every(every)  # what is wrong with arguments shows without transformers too
    return _trainer_callback_class()(directory, tensorboard, trainer, every)


def lightning_callback(
    directory: str | Path | None = None,
    *,
    tensorboard: str | Path | SummaryWriter | None = None,
    loggers: bool = True,
    every: int = 10,
) -> Any:
    """A callback for Lightning's Trainer, which logs the optimizer's metrics.

    Of several optimizers, it takes the first Automagic one.

    Args:
        directory: folder for a `RunLog`, which also gets the loss.
        tensorboard: folder for a writer of its own, or a `SummaryWriter`.
        loggers: log to the trainer's loggers.
        every: optimizer steps from one logging to the next, 1 or more.

    Raises:
        ImportError: lightning, or where it is asked for tensorboard, is not installed.
        TypeError, ValueError: nowhere to log to, or a number of steps that is none.

    Example:
        >>> lightning.Trainer(callbacks=[lightning_callback("runs/first")])
    """
    needs_a_sink(directory, tensorboard, loggers or None)
    every = checked_every(every)  # what is wrong with arguments shows without Lightning too
    return _lightning_callback_class()(directory, tensorboard, loggers, every)


# --- where metrics go ------------------------------------------------------------------------------------------------


class Sinks:
    """A run log and a TensorBoard writer, either of which may be missing."""

    def __init__(self, directory: str | Path | None, tensorboard: str | Path | SummaryWriter | None) -> None:
        self._log = None if directory is None else RunLog(directory)
        self._owns_writer = isinstance(tensorboard, (str, Path))
        self._writer = new_writer(tensorboard) if isinstance(tensorboard, (str, Path)) else tensorboard

    def write(self, step: int, others: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Log the optimizer's metrics, and others' under the names they have; a full disk is a warning, once."""
        try:
            self._write(step, others, metrics)
        except OSError as e:
            warn_once(f"metrics of the training run could not be written ({e}); it goes on, and its log has gaps")

    def _write(self, step: int, others: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        if self._log is not None:
            self._log.log(step, {**others, **metrics})
        if self._writer is not None:
            for name, value in {**others, **prefixed(metrics)}.items():
                if not math.isnan(number := as_number(name, value)):
                    self._writer.add_scalar(name, number, step)

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
        if self._writer is not None:
            self._writer.flush()
            if self._owns_writer:
                self._writer.close()


def new_writer(logdir: str | Path) -> SummaryWriter:
    """A TensorBoard writer to this folder.

    Raises:
        ImportError: tensorboard is not installed; names the extra that brings it.
    """
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as e:
        raise ImportError('TensorBoard is not installed: pip install "automagic-bnb[tensorboard]"') from e
    return SummaryWriter(str(logdir))


def prefixed(metrics: Mapping[str, float], prefix: str = PREFIX) -> dict[str, float]:
    """Under names that say whose they are, without NaN, which loggers do not expect."""
    return {prefix + name: value for name, value in metrics.items() if not math.isnan(value)}


def checked_every(every: int) -> int:
    return config.check_whole("every", every, 1, "a whole number of steps >= {}")


def needs_a_sink(*sinks: Any) -> None:
    if all(sink is None for sink in sinks):
        raise ValueError(
            "nowhere to log to: pass directory=… or tensorboard=…, or let the trainer's own loggers have it"
        )


# --- trainers --------------------------------------------------------------------------------------------------------


@functools.cache
def _trainer_callback_class() -> type:
    """Made when it is first needed: its base is transformers'."""
    try:
        from transformers import TrainerCallback
    except ImportError as e:
        raise ImportError("trainer_callback needs Hugging Face's transformers: pip install transformers") from e

    class AutomagicTrainerCallback(TrainerCallback):
        def __init__(self, directory: Any, tensorboard: Any, trainer: Any, every: int) -> None:
            self._where, self._trainer, self._every = (directory, tensorboard), trainer, every
            self._sinks: Sinks | None = None
            self._metrics: dict[str, float] = {}

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer = automagic_of(kwargs["optimizer"])  # an unfitting one is an error before the first step
            if kwargs.get("model") is not None:  # the trainer passes its parameters without names
                optimizer.name_parameters(kwargs["model"].named_parameters())
                warn_of_decay(optimizer, args.weight_decay)
            if state.is_world_process_zero:
                self._sinks = Sinks(*self._where)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """The only event with gradients; the trainer counts the step, and may log it, after this."""
            step = state.global_step + 1
            if self._sinks is not None and step % self._every == 0:
                self._metrics = training_metrics(kwargs["optimizer"])
                self._sinks.write(step, {}, self._metrics)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self._metrics and self._trainer is not None:
                wanted = control.should_log
                self._trainer.log(prefixed(self._metrics))
                control.should_log = wanted  # logging clears it, and the loss of this step would not be logged
            self._metrics = {}

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if self._sinks is not None and logs and not any(name.startswith(PREFIX) for name in logs):
                numeric = {name: value for name, value in logs.items() if isinstance(value, numbers.Real)}
                self._sinks.write(state.global_step, numeric, {})

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self._sinks is not None:
                self._sinks.close()
                self._sinks = None

    return AutomagicTrainerCallback


@functools.cache
def _lightning_callback_class() -> type:
    """Made when it is first needed: its base is Lightning's."""
    try:
        from lightning.pytorch import Callback
    except ImportError as e:
        raise ImportError("lightning_callback needs Lightning: pip install lightning") from e

    class AutomagicLightningCallback(Callback):
        def __init__(self, directory: Any, tensorboard: Any, loggers: bool, every: int) -> None:
            self._where, self._to_loggers, self._every = (directory, tensorboard), loggers, every
            self._sinks: Sinks | None = None
            self._last = 0

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self._optimizer = first_automagic(trainer.optimizers)
            if pl_module is not None:
                automagic_of(self._optimizer).name_parameters(pl_module.named_parameters())
            self._last = trainer.global_step
            if trainer.is_global_zero:
                self._sinks = Sinks(*self._where)
                if self._where == (None, None) and not trainer.loggers:
                    warn_once(
                        "lightning_callback(loggers=True): has no effect, as the trainer has no loggers, and nothing "
                        "is logged; pass directory=… or tensorboard=…, or Trainer(logger=…)"
                    )

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            step, last = trainer.global_step, self._last
            self._last = step
            # While gradients accumulate the step stands still; in manual optimization it may take several at once.
            if self._sinks is None or step // self._every == last // self._every:
                return
            metrics = training_metrics(self._optimizer)
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            self._sinks.write(step, {} if loss is None else {"loss": loss}, metrics)
            if self._to_loggers:
                for logger in trainer.loggers:
                    logger.log_metrics(prefixed(metrics), step=step)

        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            """Comes after an error, too."""
            if self._sinks is not None:
                self._sinks.close()
                self._sinks = None

    return AutomagicLightningCallback


def warn_of_decay(optimizer: Any, stated: float) -> None:
    """Say that TrainingArguments' decay, which the trainer writes into the groups, stands over the optimizer's."""
    wanted = optimizer.config.weight_decay
    if stated != wanted and any(group["weight_decay"] == stated for group in optimizer.param_groups):
        warn_once(
            f"TrainingArguments' weight_decay={stated!r} stands over the optimizer's {wanted!r}: Hugging Face's "
            "Trainer writes it into the groups. Set the one that you want there"
        )


def first_automagic(optimizers: list[Any]) -> Any:
    """The first of these that is an Automagic optimizer or wraps one.

    Raises:
        TypeError: none does.
    """
    for optimizer in optimizers:
        try:
            return automagic_of(optimizer)
        except TypeError:
            continue
    raise TypeError(f"none of {[type(x).__name__ for x in optimizers]} is an Automagic optimizer")
