"""The metrics reach wandb and MLflow under the names that TensorBoard gets, by themselves and in a trainer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from automagic_bnb import Automagic8bit, TensorBoardLogger, trainer_callback, training_metrics


def stepped() -> Automagic8bit:
    model = torch.nn.Linear(64, 64)
    optimizer = Automagic8bit(model.parameters(), lr=1e-3)
    model(torch.ones(8, 64)).square().mean().backward()
    optimizer.step()
    return optimizer


class Writer:
    """Keeps what TensorBoard would be given."""

    def __init__(self) -> None:
        self.written: dict[str, float] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.written[name] = value

    def flush(self) -> None:
        pass


def test_a_prefix_gives_tensorboards_names_and_no_nan() -> None:
    optimizer = stepped()
    writer: Any = Writer()
    TensorBoardLogger(writer, optimizer, every=1).log(1)
    named = training_metrics(optimizer, prefix="automagic/")
    assert named == writer.written
    assert len(named) > 10
    plain = training_metrics(optimizer)
    assert any(map(math.isnan, plain.values()))  # auto_lr/d, where the rate is given
    assert {f"automagic/{name}" for name, value in plain.items() if not math.isnan(value)} == named.keys()


def test_wandb_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline; the run's file has each name."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb.init(mode="offline", dir=str(tmp_path), project="test") as run:
        metrics = training_metrics(stepped(), prefix="automagic/")
        run.log({"loss": 1.0, **metrics}, step=3)
    wandb.teardown()
    (file,) = tmp_path.rglob("*.wandb")
    held = file.read_bytes()
    assert [name for name in metrics if name.encode() not in held] == []


def test_mlflow_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into a folder; it reads each back under its name."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    metrics = training_metrics(stepped(), prefix="automagic/")
    with mlflow.start_run() as run:
        mlflow.log_metrics(metrics, step=3)
    assert mlflow.get_run(run.info.run_id).data.metrics == pytest.approx(metrics)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.layer(x) - x).square().mean()}


def test_what_the_trainer_reports_to_gets_them(tmp_path: Path) -> None:
    """`report_to` decides; the history is where all of its loggers are fed from."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    seen: list[dict[str, float]] = []

    class Reporter(transformers.TrainerCallback):
        """As wandb's and MLflow's callbacks are: called with what is logged."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    trainer = transformers.Trainer(
        Model(),
        transformers.TrainingArguments(str(tmp_path), max_steps=4, report_to="none", use_cpu=True, disable_tqdm=True),
        train_dataset=[{"x": torch.randn(64)} for _ in range(32)],
        optimizer_cls_and_kwargs=(Automagic8bit, {"lr": 1e-3}),
        callbacks=[Reporter()],
    )
    trainer.add_callback(trainer_callback(trainer=trainer, every=2))
    trainer.train()
    logged = [logs for logs in seen if any(name.startswith("automagic/") for name in logs)]
    assert len(logged) == 2
    assert {"automagic/lr/mean", "automagic/state_bytes"} <= logged[0].keys()
    assert json.dumps(logged)
