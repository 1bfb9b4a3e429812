"""`automagic-bnb inspect`: what a checkpoint holds is said right, of ours and others', and no code of a file runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch

from automagic_bnb import Automagic8bit
from automagic_bnb import state as st
from automagic_bnb.command import cli, inspection


def stepped(make: Any, steps: int = 4) -> tuple[torch.nn.Linear, Any]:
    torch.manual_seed(0)
    model = torch.nn.Linear(128, 64)
    optimizer = make(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 128)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def written(optimizer: Any, folder: Path, entry: str | None = None) -> Path:
    path = folder / "optimizer.pt"
    saved = optimizer.state_dict()
    torch.save({entry: saved, "model": {}} if entry else saved, path)
    return path


def inspected(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.main(["inspect", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_ours_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes, steps, storage, skipped elements and the rate are the optimizer's own."""
    model, optimizer = stepped(lambda p: Automagic8bit(p, weight_decay=0.25))
    optimizer.zero_grad()
    model.weight.grad = torch.ones_like(model.weight)
    model.weight.grad[0, :3] = torch.nan
    optimizer.step()
    found = inspected(written(optimizer, tmp_path), capsys)
    weight, bias = found["parameters"]
    assert weight["bytes"] == st.state_bytes(optimizer.state[model.weight])
    assert (weight["storage"], bias["storage"]) == ("factored", "32bit")
    assert (weight["step"], bias["step"]) == (5, 4)
    assert (weight["skipped"], bias["skipped"]) == (3, 0)
    assert (weight["shape"], weight["elements"]) == ([64, 128], 8192)
    assert found["written_by"].startswith("automagic-bnb")
    (group,) = found["groups"]
    assert group["options"]["weight_decay"] == 0.25
    assert group["rate_origin"] == "found"
    assert group["rate"] == pytest.approx(float(optimizer.get_avg_learning_rate()), rel=1e-6)
    assert sum(count for _, count in found["rates"]) == 8192 + 64


@pytest.mark.parametrize("mask_bits", [4, 8, 0])
def test_the_histogram_is_that_of_the_elements_rates(
    mask_bits: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bar by bar, as the optimizer says them."""
    model, optimizer = stepped(lambda p: Automagic8bit(p, lr=1e-3, max_lr=1.2e-3, mask_bits=mask_bits), steps=40)
    rates = torch.cat([optimizer.element_learning_rates(p).flatten() for p in model.parameters()])
    bars = torch.floor(torch.log2(rates.double()) * 4 + 1e-5).int()
    values, counts = bars.unique(return_counts=True)
    wanted = {int(value): int(count) for value, count in zip(values, counts, strict=True)}
    found = inspected(written(optimizer, tmp_path), capsys)["rates"]
    assert len(wanted) > 3 or mask_bits == 0
    assert {inspection.bar_of(edge): count for edge, count in found} == wanted


@pytest.mark.parametrize(
    ("name", "words", "storage", "size"),
    [
        ("adamw8bit", "bitsandbytes", "8bit", 2.03),
        ("torch", "torch's Adam", "float32", 8.0),
        ("sgd", "another optimizer", "float32", 4.0),
    ],
)
def test_other_optimizers_are_described(
    name: str, words: str, storage: str, size: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "adamw8bit":
        make: Any = pytest.importorskip("bitsandbytes").optim.AdamW8bit
    else:
        make = {"torch": torch.optim.AdamW, "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)}[name]
    _, optimizer = stepped(lambda p: make(p, lr=2e-3))
    found = inspected(written(optimizer, tmp_path), capsys)
    assert words in found["written_by"]
    assert found["parameters"][0]["storage"] == storage
    assert found["parameters"][0]["bytes"] / 8192 == pytest.approx(size, abs=0.01)
    assert found["parameters"][0]["shape"] == [64, 128]
    assert found["parameters"][0]["skipped"] is None
    assert [group["rate"] for group in found["groups"]] == [2e-3]


@pytest.mark.parametrize("entry", ["optimizer", "optimizer_state_dict"])
def test_it_is_found_within_a_trainers_file(entry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, optimizer = stepped(lambda p: Automagic8bit(p, lr=1e-3, factored=True))
    found = inspected(written(optimizer, tmp_path, entry), capsys)
    assert [p["storage"] for p in found["parameters"]] == ["factored", "32bit"]


def test_lightnings_list_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, optimizer = stepped(lambda p: Automagic8bit(p, lr=1e-3))
    torch.save({"optimizer_states": [optimizer.state_dict()]}, tmp_path / "x.ckpt")
    assert len(inspected(tmp_path / "x.ckpt", capsys)["parameters"]) == 2


def test_the_table_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, optimizer = stepped(lambda p: Automagic8bit(p, lr=1e-3))
    assert cli.main(["inspect", str(written(optimizer, tmp_path))]) == 0
    out = capsys.readouterr().out
    for words in (
        "mean rate 1.00e-03 (given)",
        "skipped elements 0",
        "steps            4",
        "warmup_steps",
        "[64, 128]",
    ):
        assert words in out
    assert max(map(len, out.replace(str(tmp_path), "").splitlines())) <= 80


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    _, optimizer = stepped(lambda p: Automagic8bit(p, lr=1e-3))
    picture = tmp_path / "picture.png"
    assert cli.main(["inspect", str(written(optimizer, tmp_path)), "--picture", str(picture)]) == 0
    assert matplotlib.image.imread(picture)[..., :3].std() > 0.05


class Trap:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_no_code_of_a_file_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The control: torch.load without its safeguard runs it."""
    sprung = tmp_path / "sprung"
    torch.save({"state": {}, "param_groups": [], "trap": Trap(sprung)}, tmp_path / "trap.pt")
    assert cli.main(["inspect", str(tmp_path / "trap.pt")]) == 1
    assert "could run code" in capsys.readouterr().err
    assert not sprung.exists()
    torch.load(tmp_path / "trap.pt", weights_only=False)
    assert sprung.exists()


def test_what_is_no_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "model.pt")
    (tmp_path / "text.pt").write_text("no checkpoint at all")
    (tmp_path / "empty.pt").write_text("")
    whole = tmp_path / "whole.pt"
    torch.save({"state": {0: {"exp_avg": torch.zeros(999)}}, "param_groups": []}, whole)
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:1500])
    (tmp_path / "noise.pt").write_bytes(b"a.")
    for name, words in (
        ("model.pt", "holds no optimizer's state"),
        ("text.pt", "no file of torch.save"),
        ("empty.pt", "no whole file of torch.save"),
        ("cut.pt", "no whole file of torch.save"),
        ("noise.pt", "no whole file of torch.save: "),
        ("absent.pt", "absent.pt"),
        (".", "name the optimizer's file in it"),
    ):
        assert cli.main(["inspect", str(tmp_path / name)]) == 1, name
        error = capsys.readouterr().err
        assert error.startswith("automagic-bnb inspect: error: ")
        assert words in error, name
