"""The demo: that it compares fairly, reports what the tensors say, and fails clearly."""

import importlib
import io
import runpy
import sys
from pathlib import Path
from types import ModuleType

import matplotlib.image
import pytest
import torch
from rich.console import Console

from automagic_bnb import Automagic8bit, bnb
from automagic_bnb.command import cli, demo, demo_model, demo_pictures
from automagic_bnb.watch import plots

CPU = torch.device("cpu")
PICTURES = ["effective_rank.png", "loss.png", "result.png", "samples.png"]
SHORT = ["demo", "--steps", "2", "--base-steps", "2", "--device", "cpu"]
needs_bitsandbytes = pytest.mark.skipif(not bnb.BITSANDBYTES_AVAILABLE, reason="bitsandbytes is not installed")


def short_comparison(seed: int = 0, **options) -> list[demo.Run]:
    settings = demo.DemoOptions(steps=2, seed=seed, **options)
    return demo.compare(demo.make_base(seed, CPU), settings)


@pytest.fixture(scope="module")
def runs() -> list[demo.Run]:
    return short_comparison()


@pytest.fixture(autouse=True)
def coarse_samples(monkeypatch):
    """Pictures of an untrained model need no fine integration."""
    monkeypatch.setattr(demo_model, "SAMPLING_STEPS", 4)


def assert_picture(path: Path) -> None:
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 300
    assert pixels[..., :3].std() > 0.02  # a blank page has 0


def interrupt_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Let Ctrl-C arrive in place of this training step, counted from 1 over the base and both LoRAs."""
    calls = 0
    real_step = demo.train_step

    def train_step(*args):
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        real_step(*args)

    monkeypatch.setattr(demo, "train_step", train_step)


# --- the command ------------------------------------------------------------------------------------------------


def test_command_prints_the_comparison_and_writes_the_pictures(tmp_path, capsys):
    folder = tmp_path / "new" / "pictures"
    assert cli.main([*SHORT, "--out", str(folder)]) == 0
    out = capsys.readouterr().out
    assert str(folder) in out
    for text in ("Automagic8bit", "tuned", "as usual", "loss", "bytes per", "parameter", "step, ms", "learning rate"):
        assert text in out
    assert sorted(p.name for p in folder.iterdir()) == PICTURES
    for picture in folder.iterdir():
        assert_picture(picture)


def test_one_thread_is_used_and_the_number_restored():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with demo.one_cpu_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_module_is_the_same_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["automagic_bnb", "demo", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("automagic_bnb", run_name="__main__")
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    options = "steps", "base-steps", "seed", "out", "profile", "lr", "adamw-lr", "rank", "batch", "device", "compare"
    for option in options:
        assert f"--{option} " in out


@pytest.mark.parametrize(
    "wrong",
    [
        ["--steps", "0"],
        ["--steps", "many"],
        ["--seed", "-1"],
        ["--lr", "-1e-3"],
        ["--adamw-lr", "nan"],
        ["--rank", "0"],
        ["--batch", "0"],
        ["--profile", "fastest"],
        ["--compare", "nothing"],
        ["--unknown"],
    ],
)
def test_wrong_options_are_usage_errors(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", *wrong])
    assert stopped.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_an_error_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "train", lambda *args, **kwargs: pytest.fail("training has begun"))
    file = tmp_path / "file"
    file.write_text("kept")
    for folder in (file, file / "below"):
        assert cli.main([*SHORT, "--out", str(folder)]) == 1
        assert str(folder) in capsys.readouterr().err
    assert file.read_text() == "kept"


@pytest.mark.parametrize("device", ["nonsense", "hpu", "maia", "cuda:77"])
def test_an_unusable_device_is_an_error_of_one_line(device, tmp_path, capsys):
    """It names the device and a way out; torch's own message for one that it was built without has 2,000 letters."""
    assert cli.main(["demo", "--out", str(tmp_path), "--device", device]) == 1
    error = capsys.readouterr().err
    assert repr(device) in error
    assert "leave --device out" in error
    assert error.count("\n") == 1
    assert len(error) < 400


@pytest.mark.parametrize("package", ["sklearn", "tqdm", "matplotlib", "rich"])
def test_a_missing_package_is_named_with_its_remedy(package, tmp_path, capsys, monkeypatch):
    real_import = importlib.import_module

    def import_module(name, *args):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(name)
        return real_import(name, *args)

    monkeypatch.setattr(importlib, "import_module", import_module)
    assert cli.main([*SHORT, "--out", str(tmp_path), "--device", "nonsense"]) == 1
    assert "nonsense" in capsys.readouterr().err  # what is wrong with arguments comes first
    assert cli.main([*SHORT, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert package in error
    assert 'pip install "automagic-bnb[demo]"' in error


@pytest.mark.parametrize("call", [2, 3])  # in the base training, and before the first LoRA has taken a step
def test_an_early_interrupt_leaves_nothing_to_compare(call, tmp_path, capsys, monkeypatch):
    interrupt_at(monkeypatch, call)
    assert cli.main([*SHORT, "--out", str(tmp_path)]) == cli.INTERRUPTED
    assert "nothing to compare" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("call", "labels"), [(5, ["Automagic"]), (8, ["Automagic", "AdamW"])])
def test_interrupted_comparison_shows_what_there_is(call, labels, tmp_path, capsys, monkeypatch):
    interrupt_at(monkeypatch, call)
    assert cli.main([*SHORT, "--out", str(tmp_path)]) == cli.INTERRUPTED
    rows = [line.split("│")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [name for name in ("Automagic", "AdamW") if any(name in row for row in rows)] == labels
    for name in PICTURES:
        assert_picture(tmp_path / name)


# --- fairness ---------------------------------------------------------------------------------------------------


def test_equal_optimizers_would_tie(monkeypatch):
    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1)

    same = demo.Contestant(sgd, "given")
    monkeypatch.setattr(demo, "contestants", lambda options: {"one": same, "other": same})
    one, other = short_comparison()
    assert one.history.train_loss == other.history.train_loss
    assert one.history.validation_loss == other.history.validation_loss
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_both_optimizers_start_as_the_base(runs):
    base = demo.make_base(0, CPU)
    first_losses = [run.history.validation_loss[0] for run in runs]
    _, held_out = demo.load_digits(demo.LORA_CLASSES, seed=0)
    batch = demo.validation_batch(held_out, seed=0, device=CPU)
    assert first_losses == [pytest.approx(demo.flow_matching_loss(base, batch).item(), rel=1e-6)] * 4
    # The batches are the same, so the first step's training losses are too; later ones part.
    assert runs[0].history.train_loss[0] == runs[1].history.train_loss[0]
    assert runs[0].history.train_loss[1] != runs[1].history.train_loss[1]


def test_only_the_lora_moves(runs):
    start = demo.with_lora(demo.make_base(0, CPU), rank=demo.DemoOptions().rank, seed=0)
    for run in runs:
        for (name, before), after in zip(start.named_parameters(), run.model.parameters(), strict=True):
            assert torch.equal(before, after) == ("lora_" not in name), name


def test_lora_matrices_are_marked_and_large_enough_for_8_bits(runs):
    parameters = demo.trainable(runs[0].model)
    assert len(parameters) == 14
    assert all(p._is_lora_layer and p.numel() == 32 * 512 for p in parameters)
    assert all(p.numel() >= 4096 for p in demo.trainable(demo.with_lora(demo.make_base(0, CPU), rank=8, seed=0)))


def test_the_seed_fixes_the_losses(runs):
    again, other = short_comparison(), short_comparison(seed=1)
    for run, same, different in zip(runs, again, other, strict=True):
        assert run.history.train_loss == same.history.train_loss
        assert run.history.validation_loss == same.history.validation_loss
        assert run.history.train_loss != different.history.train_loss


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    short_comparison()
    assert torch.equal(before, torch.get_rng_state())


def test_automagic_is_given_a_rate_only_on_request(runs):
    assert runs[0].optimizer.param_groups[0]["auto_lr"]
    assert [run.rate_origin for run in runs] == ["found", "found", "best of 6", "usual start"]
    assert [run.optimizer.param_groups[0]["lr"] for run in runs[2:]] == [7e-4, 1e-4]
    given = short_comparison(lr=2e-4, adamw_lr=5e-4)
    assert [run.optimizer.param_groups[0]["lr"] for run in given] == [2e-4, 2e-4, 5e-4, 1e-4]
    assert [run.rate_origin for run in given] == ["given", "given", "given", "usual start"]


def test_automagic_runs_by_default_and_lean_or_in_the_profile_asked_for(runs):
    assert [run.label for run in runs[:2]] == ["Automagic8bit", "Automagic8bit, lean"]
    assert [run.optimizer.param_groups[0]["mask_bits"] for run in runs[:2]] == [4, 0]
    one = demo.contestants(demo.DemoOptions(profile="memory_optimized"))
    assert list(one) == ["Automagic8bit, memory_optimized", "AdamW8bit, tuned", "AdamW8bit, as usual"]
    assert "Automagic8bit" in demo.contestants(demo.DemoOptions(profile="balanced"))


@needs_bitsandbytes
def test_automagic_holds_fewer_bytes(runs):
    """With the rate found, the probes among them."""
    default, lean, adamw, _ = map(demo.state_bytes_per_parameter, (run.optimizer for run in runs))
    assert lean < default < adamw
    assert (round(lean, 1), round(default, 2)) == (1.3, 1.33)


def test_the_lora_learns_from_small_batches_and_the_base_from_large_ones(monkeypatch):
    sizes = []
    real = demo.draw_batch

    def draw_batch(examples, size, *others):
        sizes.append(size)
        return real(examples, size, *others)

    monkeypatch.setattr(demo, "draw_batch", draw_batch)
    options = demo.DemoOptions(steps=1, base_steps=1)
    base = demo.make_base(0, CPU)
    demo.train_base(base, options)
    demo.compare(base, options)
    assert sizes == [64, 8, 8, 8, 8]
    sizes.clear()
    demo.compare(base, demo.DemoOptions(steps=1, batch=3))
    assert set(sizes) == {3}


# --- figures ----------------------------------------------------------------------------------------------------


def test_effective_ranks_are_those_of_what_is_added(runs):
    """Before the first step, when B is 0, and after the last, as means over the layers, by an SVD of B·A."""
    for run in runs:
        found = []
        layers = [module for module in run.model.modules() if hasattr(module, "lora_A")]
        for layer in layers:
            values = torch.linalg.svdvals((layer.lora_B.detach() @ layer.lora_A.detach()).double())
            shares = values[values > 0] / values.sum()
            found.append((-shares * shares.log()).sum().exp().item())
        assert len(found) == 7
        assert run.history.effective_rank[-1] == pytest.approx(sum(found) / len(found), rel=1e-5)
        assert run.history.effective_rank[0] == 0 < run.history.effective_rank[-1] <= 32
        assert len(run.history.effective_rank) == len(run.history.validation_step)


def test_the_picture_of_ranks_shows_what_is_added(runs, tmp_path, monkeypatch):
    """As many singular values as the rank, of which none is 0; and one line for each optimizer."""
    drawn = {}
    real = plots.plot_singular_values

    def plot(values, history, path, title):
        drawn.update(values=values, history=history)
        return real(values, history, path, title)

    monkeypatch.setattr(plots, "plot_singular_values", plot)
    demo.save_ranks(tmp_path / "ranks.png", runs)
    assert list(drawn["values"]) == list(drawn["history"]) == [run.label for run in runs]
    for values in drawn["values"].values():
        assert values.shape == (32,)
        assert (values > 0).all()
    assert_picture(tmp_path / "ranks.png")


def test_a_shared_storage_counts_once():
    first, second = torch.nn.Parameter(torch.zeros(6)), torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([first, second], lr=1.0)
    book = torch.zeros(5)
    optimizer.state[first] = {"codes": torch.zeros(6, dtype=torch.uint8), "book": book, "step": 3}
    optimizer.state[second] = {"codes": torch.zeros(4, dtype=torch.uint8), "book": book[:2]}
    assert demo.state_bytes_per_parameter(optimizer) == (6 + 4 + 20) / 10


@needs_bitsandbytes
def test_adamw8bit_takes_the_bytes_its_format_says(runs):
    size = 32 * 512
    codes_and_absmax = 14 * (2 * size + 2 * 4 * size // 256)
    assert demo.state_bytes_per_parameter(runs[2].optimizer) == (codes_and_absmax + 2 * 256 * 4) / (14 * size)


def test_table_shows_what_the_runs_hold(runs):
    text = io.StringIO()
    Console(file=text, width=80).print(demo.result_table(runs))
    cells = [[x.strip() for x in line.split("│")[1:-1]] for line in text.getvalue().splitlines() if line[:1] == "│"]
    assert [row[0] for row in cells] == [run.label for run in runs]
    for run, (_, rate, loss, size, _) in zip(runs, cells, strict=True):
        assert rate == f"{demo.learning_rate(run.optimizer):.2e} {run.rate_origin}"
        assert loss == f"{run.history.validation_loss[-1]:.4f}"
        assert size == f"{demo.state_bytes_per_parameter(run.optimizer):.2f}"
    assert f"{runs[0].history.validation_loss[0]:.4f} before" in text.getvalue()


def test_bar_table_and_pictures_show_one_rate(runs, tmp_path, monkeypatch):
    """The optimizer's mean rate."""
    shown = {}
    monkeypatch.setattr(demo_pictures, "save_curves", lambda path, histories: shown.update(histories))
    demo.save_pictures(tmp_path, demo.make_base(0, CPU), runs, 0)
    mean = float(runs[0].optimizer.get_avg_learning_rate())
    assert shown[runs[0].label].learning_rate[-1] == demo.learning_rate(runs[0].optimizer) == mean
    assert f"{mean:.1e}" in demo.rate_words(runs[0])


def test_prodigy_runs_where_it_is_installed(monkeypatch):
    """Its rate is d; where it is missing, that is an error before any training."""
    prodigyopt = ModuleType("prodigyopt")
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(demo.DemoError, match="pip install prodigyopt"):
        demo.contestants(demo.DemoOptions(compare="prodigy"))

    class Prodigy(torch.optim.SGD):
        def __init__(self, parameters, lr):
            super().__init__(parameters, lr=lr)
            self.param_groups[0]["d"] = 1e-3

    prodigyopt.Prodigy = Prodigy
    monkeypatch.setitem(sys.modules, "prodigyopt", prodigyopt)
    labels = list(demo.contestants(demo.DemoOptions(compare="prodigy")))
    assert labels[-1] == "Prodigy"
    assert len(labels) == 5
    run = short_comparison(compare="prodigy")[-1]
    assert demo.learning_rate(run.optimizer) == 1e-3
    assert run.rate_origin == "found"


@pytest.mark.filterwarnings("ignore:bitsandbytes could not be imported")
def test_without_bitsandbytes_both_run_in_32_bits_and_say_so(monkeypatch):
    monkeypatch.setattr(bnb, "BITSANDBYTES_AVAILABLE", False)
    ours, lean, peer, _ = short_comparison()
    assert lean.label == "Automagic, 32-bit state, lean"
    assert "32-bit" in ours.label
    assert "32-bit" in peer.label
    assert isinstance(ours.optimizer, Automagic8bit)
    assert isinstance(peer.optimizer, torch.optim.AdamW)
    assert ours.optimizer.state[demo.trainable(ours.model)[0]]["state1"].dtype == torch.float32


# --- flow matching ----------------------------------------------------------------------------------------------


class KnownVelocity(torch.nn.Module):
    """Predicts the same velocity [64] for everything."""

    def __init__(self, velocity: torch.Tensor) -> None:
        super().__init__()
        self.velocity, self.class_codes = velocity, torch.zeros(1)
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, noisy, times, labels):
        self.seen.append((noisy, times))
        return self.velocity.expand_as(noisy)


def test_loss_is_the_squared_error_of_the_velocity_on_the_straight_path():
    noise, velocity = torch.randn(3, 64), torch.randn(64)
    times = torch.tensor([0.0, 0.25, 1.0])
    batch = demo.FlowBatch(noise + velocity, noise, times, torch.zeros(3, dtype=torch.int64))
    exact = KnownVelocity(velocity)
    assert demo.flow_matching_loss(exact, batch).item() < 1e-12
    assert torch.allclose(exact.seen[0][0], noise + times[:, None] * velocity, atol=1e-6)
    assert demo.flow_matching_loss(KnownVelocity(velocity + 2), batch).item() == pytest.approx(4, rel=1e-5)


def test_sampling_follows_the_velocity_from_time_0_to_1():
    model = KnownVelocity(torch.full((64,), 3.0))
    labels = torch.zeros(2, dtype=torch.int64)
    still = demo.sample(KnownVelocity(torch.zeros(64)), labels, seed=5)
    assert torch.allclose(demo.sample(model, labels, seed=5), still + 3, atol=1e-4)
    times = [float(t[0]) for _, t in model.seen]
    assert times[0] == 0
    assert times == sorted(times)
    assert times[-1] < 1


def test_validation_is_held_out_and_fixed():
    kept, held_out = demo.load_digits(demo.LORA_CLASSES, seed=3)
    assert set(kept.labels.tolist()) == set(held_out.labels.tolist()) == set(demo.LORA_CLASSES)
    assert len(kept.labels) + len(held_out.labels) == 896
    assert len(held_out.labels) == 896 // 5
    one, same = (demo.validation_batch(held_out, seed=3, device=CPU) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert one.times.mean().item() == pytest.approx(0.5, abs=1e-5)
    assert not torch.equal(one.noise, demo.validation_batch(held_out, seed=4, device=CPU).noise)
