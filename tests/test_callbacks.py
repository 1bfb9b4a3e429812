"""Metrics reach the run log, TensorBoard and the trainers' own loggers; with the real packages, where installed."""

from __future__ import annotations

import ast
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any of them is imported

import pytest
import torch
from torch import nn

from automagic_bnb import (
    Automagic8bit,
    TensorBoardLogger,
    lightning_callback,
    read_run,
    trainer_callback,
    training_metrics,
)
from automagic_bnb.metrics import METRICS
from automagic_bnb.watch.monitoring import automagic_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
OF_GRADIENTS = ("sign_agreement", "share_background", "clip_ratio")
"""Numbers only where the metrics were read while the gradients were there."""


def steps_of(series: Any) -> list[int]:
    return series.steps.tolist()


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All scalars that TensorBoard itself reads in a folder."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = module.EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


# --- the metrics -----------------------------------------------------------------------------------------------------


def test_bounds_follow_the_schedule(tools: Any) -> None:
    """The widest of all groups; and the rates themselves stay between them."""
    parameters = tools.parameters((32, 64), (16, 300), (0,))
    groups = [
        {"params": parameters[:1], "lr": 1e-3, "min_lr": 9e-4, "max_lr": 1.1e-3},
        {"params": parameters[1:2], "lr": 1e-2, "max_lr": 1e-2},
        {"params": [], "lr": 1.0},
    ]
    opt = Automagic8bit(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / 2**step)
    assert training_metrics(opt)["state_bytes"] == 0
    for step in range(4):
        tools.train(opt, parameters[:2], range(step, step + 1))
        found = training_metrics(opt)
        assert found["lr/bound_min"] == pytest.approx(1e-7 / 2**step)
        assert found["lr/bound_max"] == pytest.approx(1e-2 / 2**step)
        assert found["lr/bound_min"] <= found["lr/min"]
        assert found["lr/max"] <= found["lr/bound_max"] * (1 + 1e-6)
        scheduler.step()
    assert set(found) == {*METRICS, "lr/bound_min", "lr/bound_max", "state_bytes"}


def test_state_bytes_are_the_tensors(tools: Any) -> None:
    parameters = tools.parameters((64, 96), (300,))
    opt = Automagic8bit(parameters, lr=1e-3)
    tools.train(opt, parameters, range(2))
    own = {
        (id(p), name): x.numel() * x.element_size()
        for p, state in opt.state.items()
        for name, x in state.items()
        if isinstance(x, torch.Tensor) and not name.startswith("qmap")
    }
    assert training_metrics(opt)["state_bytes"] == sum(own.values())


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def test_tensorboard_gets_every_number(tmp_path: Path, tools: Any) -> None:
    """Loss under its name, the others under ours, at multiples of `every`; NaN left out."""
    pytest.importorskip("tensorboard")
    parameters = tools.parameters((64, 96))
    opt = Automagic8bit(parameters, lr=1e-3)
    written = {}
    with TensorBoardLogger(tmp_path, opt, every=3) as logger:
        for step in range(7):
            tools.give_gradients(parameters, step)
            opt.step()
            logger.log(step, loss=torch.tensor(1.0 / (step + 1)))
            written[step] = training_metrics(opt)
            opt.zero_grad()
    found = events(tmp_path)
    assert found.pop("loss") == [(0, 1.0), (3, 0.25), (6, pytest.approx(1 / 7))]
    finite = {name for name, value in written[6].items() if not math.isnan(value)}
    assert set(found) == {f"automagic/{name}" for name in finite}
    assert not {"automagic/auto_lr/d"} & set(found)
    for name in finite:
        assert found[f"automagic/{name}"] == [(s, pytest.approx(written[s][name], rel=1e-6)) for s in (0, 3, 6)]
    assert {f"automagic/{name}" for name in OF_GRADIENTS} <= set(found)


def test_a_writer_of_the_users_stays_open(tmp_path: Path, tools: Any) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    parameters = tools.parameters((64, 96))
    opt = Automagic8bit(parameters, lr=1e-3)
    tools.train(opt, parameters, range(1))
    writer = tensorboard.SummaryWriter(str(tmp_path))
    with TensorBoardLogger(writer, SimpleNamespace(optimizer=opt), every=1) as logger:
        logger.log(0)
    writer.add_scalar("mine", 2.0, 1)
    writer.close()
    found = events(tmp_path)
    assert found["mine"] == [(1, 2.0)]
    assert found["automagic/step"] == [(0, 1.0)]
    assert "loss" not in found


# --- Hugging Face ----------------------------------------------------------------------------------------------------


class Regression(nn.Module):
    """A model as Hugging Face's Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"loss": (self.linear(x) - x).square().mean()}


def vectors(count: int = 64) -> list[dict[str, torch.Tensor]]:
    rows = torch.randn(count, 64, generator=torch.Generator().manual_seed(1))
    return [{"x": row} for row in rows]


def hugging_face_trainer(folder: Path, steps: int, **more: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    options = {"report_to": [], "logging_steps": 2, "save_steps": 6, **more}
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    optimizer = (Automagic8bit, {"lr": 1e-3})
    return transformers.Trainer(
        model=Regression(), args=args, train_dataset=vectors(), optimizer_cls_and_kwargs=optimizer
    )


def test_hugging_face_to_everywhere(tmp_path: Path) -> None:
    """Run log, TensorBoard and the trainer's own log agree with each other, step for step."""
    pytest.importorskip("tensorboard")
    trainer = hugging_face_trainer(tmp_path / "out", 12)
    callback = trainer_callback(tmp_path / "run", tensorboard=tmp_path / "events", trainer=trainer, every=3)
    trainer.add_callback(callback)
    trainer.train()
    series = read_run(tmp_path / "run").series
    assert steps_of(series["lr/mean"]) == [3, 6, 9, 12]
    assert series["step"].values.tolist() == [3, 6, 9, 12]  # the optimizer's own count: no step is off by one
    assert not any(math.isnan(x) for name in OF_GRADIENTS for x in series[name].values)
    assert steps_of(series["loss"]) == [2, 4, 6, 8, 10, 12]
    assert {"grad_norm", "learning_rate", "train_loss"} <= set(series)
    assert not any(name.startswith("automagic/") for name in series)

    own = [entry for entry in trainer.state.log_history if "automagic/lr/mean" in entry]
    assert [entry["step"] for entry in own] == [3, 6, 9, 12]
    assert [entry["automagic/torque"] for entry in own] == series["torque"].values.tolist()
    assert not any(isinstance(x, float) and math.isnan(x) for entry in own for x in entry.values())

    found = events(tmp_path / "events")
    assert found["automagic/torque"] == [
        (step, pytest.approx(value, rel=1e-6))
        for step, value in zip(*map(list, (series["torque"].steps, series["torque"].values)), strict=True)
    ]
    assert [step for step, _ in found["loss"]] == [2, 4, 6, 8, 10, 12]


def test_hugging_face_is_told_of_its_weight_decay_and_of_lora(tmp_path: Path) -> None:
    """TrainingArguments' 0.0 stands over ours; the trainer passes no names, the callback brings the model's."""
    trainer = hugging_face_trainer(tmp_path, 2)
    trainer.model.lora_A = torch.nn.Linear(2, 2)
    trainer.add_callback(trainer_callback(tmp_path / "run"))
    with pytest.warns(UserWarning, match=r"weight_decay=0.0 stands over the optimizer's 0.0005"):
        trainer.train()
    optimizer = automagic_of(trainer.optimizer)
    assert optimizer.param_groups[0]["weight_decay"] == 0.0
    told = {optimizer.facts_of(p).name: optimizer.facts_of(p).is_lora for p in trainer.model.parameters()}
    assert told["lora_A.weight"]
    assert sum(told.values()) == 2


def test_hugging_face_resumes_into_the_same_log(tmp_path: Path) -> None:
    """What was logged after the checkpoint is superseded; the steps read as one run."""
    for steps, checkpoint in ((10, None), (12, str(tmp_path / "out" / "checkpoint-6"))):
        trainer = hugging_face_trainer(tmp_path / "out", steps)
        trainer.add_callback(trainer_callback(tmp_path / "run", every=1))
        trainer.train(resume_from_checkpoint=checkpoint)
    series = read_run(tmp_path / "run").series
    assert steps_of(series["lr/mean"]) == list(range(1, 13))
    assert series["step"].values.tolist() == list(range(1, 13))
    assert steps_of(series["loss"]) == [2, 4, 6, 8, 10, 12]


def test_hugging_face_reports_to_tensorboard_itself(tmp_path: Path) -> None:
    """With `trainer=` alone the metrics go wherever the trainer reports to."""
    pytest.importorskip("tensorboard")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(tmp_path / "events")
    try:
        trainer = hugging_face_trainer(tmp_path / "out", 4, report_to=["tensorboard"])
        trainer.add_callback(trainer_callback(trainer=trainer, every=2))
        trainer.train()
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
    found = events(tmp_path / "events")
    assert [step for step, _ in found["train/automagic/lr/mean"]] == [2, 4]


def test_hugging_face_logs_on_one_process_only(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    callback, opt = trainer_callback(tmp_path / "run", every=1), Automagic8bit([nn.Parameter(torch.ones(3))])
    state = SimpleNamespace(is_world_process_zero=False, global_step=0)
    callback.on_train_begin(None, state, None, optimizer=opt)
    callback.on_optimizer_step(None, state, None, optimizer=opt)
    callback.on_step_end(None, state, None)
    callback.on_log(None, state, None, logs={"loss": 1.0})
    callback.on_train_end(None, state, None)
    assert not (tmp_path / "run").exists()


def test_hugging_face_with_another_optimizer_stops_at_once(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    trainer = hugging_face_trainer(tmp_path / "out", 4)
    trainer.optimizer_cls_and_kwargs = (torch.optim.AdamW, {"lr": 1e-3})
    trainer.add_callback(trainer_callback(tmp_path / "run"))
    with pytest.raises(TypeError, match="must be an Automagic optimizer"):
        trainer.train()
    assert transformers.TrainerCallback in type(trainer_callback(tmp_path / "run")).__mro__


# --- Lightning -------------------------------------------------------------------------------------------------------


def lightning_fit(folder: Path, callback: Any, batches: int, accumulate: int = 1, **more: Any) -> Any:
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.loggers import CSVLogger

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Regression()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.model(batch[0])["loss"]

        def configure_optimizers(self) -> Any:
            return Automagic8bit(self.parameters(), lr=1e-3)

    data = torch.utils.data.TensorDataset(torch.stack([row["x"] for row in vectors(8 * batches)]))
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=CSVLogger(str(folder), name="", version="csv"),
        callbacks=[callback],
        accumulate_grad_batches=accumulate,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        **more,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=8))
    return trainer


def test_lightning_to_everywhere(tmp_path: Path) -> None:
    """Ten batches, two to a step: five steps, of which the second and the fourth are logged."""
    pytest.importorskip("lightning")
    pytest.importorskip("tensorboard")
    callback = lightning_callback(tmp_path / "run", tensorboard=tmp_path / "events", every=2)
    lightning_fit(tmp_path, callback, 10, accumulate=2)
    series = read_run(tmp_path / "run").series
    assert steps_of(series["lr/mean"]) == steps_of(series["loss"]) == [2, 4]
    assert series["step"].values.tolist() == [2, 4]
    assert not any(math.isnan(x) for name in OF_GRADIENTS for x in series[name].values)
    lines = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    columns = lines[0].split(",")
    rows = [dict(zip(columns, row.split(","), strict=True)) for row in lines[1:]]
    assert [(int(r["step"]), float(r["automagic/torque"])) for r in rows] == [
        (step, pytest.approx(value)) for step, value in zip([2, 4], series["torque"].values, strict=True)
    ]
    found = events(tmp_path / "events")
    assert [step for step, _ in found["loss"]] == [step for step, _ in found["automagic/torque"]] == [2, 4]


def test_lightning_without_loggers(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    lightning_fit(tmp_path, lightning_callback(tmp_path / "run", loggers=False, every=1), 3)
    assert steps_of(read_run(tmp_path / "run").series["loss"]) == [1, 2, 3]
    csv = tmp_path / "csv" / "metrics.csv"
    assert not csv.exists() or "automagic" not in csv.read_text()


@pytest.mark.parametrize("loggers", [[], ["one"]])
def test_lightning_with_nowhere_to_log_to_is_told(loggers: list[str], tools: Any) -> None:
    """The trainer's loggers are asked for by default, and it may have none."""
    pytest.importorskip("lightning")
    ours = Automagic8bit(tools.parameters((8, 8)), lr=1e-3)
    trainer = SimpleNamespace(optimizers=[ours], global_step=0, is_global_zero=True, loggers=loggers)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        lightning_callback().on_train_start(trainer, None)
    told = [str(x.message) for x in said if "has no effect, as the trainer has no loggers" in str(x.message)]
    assert len(told) == (0 if loggers else 1)


def test_lightning_with_other_optimizers(tmp_path: Path) -> None:
    """The first Automagic one is taken; without any it stops before the first step."""
    pytest.importorskip("lightning")
    ours, other = Automagic8bit([nn.Parameter(torch.ones(3))]), torch.optim.SGD([nn.Parameter(torch.ones(3))])
    callback = lightning_callback(tmp_path / "run")
    trainer = SimpleNamespace(optimizers=[other, ours], global_step=0, is_global_zero=False)
    callback.on_train_start(trainer, None)
    assert callback._optimizer is ours
    trainer.optimizers = [other]
    with pytest.raises(TypeError, match=r"none of \['SGD'\]"):
        callback.on_train_start(trainer, None)
    assert not (tmp_path / "run").exists()


# --- wrong use -------------------------------------------------------------------------------------------------------


def test_somewhere_to_log_to() -> None:
    with pytest.raises(ValueError, match="nowhere to log to"):
        trainer_callback()
    with pytest.raises(ValueError, match="nowhere to log to"):
        lightning_callback(loggers=False)


@pytest.mark.parametrize(("every", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_steps_that_are_none(every: Any, error: type, tmp_path: Path) -> None:
    opt = Automagic8bit([nn.Parameter(torch.ones(3))])
    for call in (
        lambda: TensorBoardLogger(tmp_path, opt, every=every),
        lambda: trainer_callback(tmp_path, every=every),
        lambda: lightning_callback(tmp_path, every=every),
    ):
        with pytest.raises(error, match=rf"every={every!r}: must be a whole number of steps >= 1"):
            call()
    assert list(tmp_path.iterdir()) == []


BARE = """
import sys
for name in ("tensorboard", "transformers", "lightning", "torch.utils.tensorboard.writer", "lightning.pytorch"):
    sys.modules[name] = None
import torch
from automagic_bnb import Automagic8bit, TensorBoardLogger, lightning_callback, trainer_callback
opt = Automagic8bit([torch.nn.Parameter(torch.ones(3))])
for every in (1, 0):
    for call in (
        lambda: TensorBoardLogger("x", opt, every=every),
        lambda: trainer_callback("x", every=every),
        lambda: lightning_callback("x", every=every),
    ):
        try:
            call()
        except (ImportError, ValueError) as e:
            print(e)
"""


def test_missing_packages_are_named_with_their_remedy(tmp_path: Path) -> None:
    """But wrong arguments first, which are wrong with the packages too."""
    done = subprocess.run(
        [sys.executable, "-c", BARE], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True
    )
    lines = done.stdout.splitlines()
    assert [line.rpartition(": ")[2] for line in lines[:3]] == [
        'pip install "automagic-bnb[tensorboard]"',
        "pip install transformers",
        "pip install lightning",
    ]
    assert lines[3:] == ["every=0: must be a whole number of steps >= 1"] * 3
    assert list(tmp_path.iterdir()) == []


def test_importing_the_package_imports_none_of_them() -> None:
    code = "import sys, automagic_bnb; print(sorted({m.partition('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    imported = set(ast.literal_eval(done.stdout))
    assert "automagic_bnb" in imported
    assert not imported & {"transformers", "lightning", "tensorboard", "plotly", "matplotlib"}
