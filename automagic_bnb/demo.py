"""The demo: a small image generator that knows the digits 0-4 learns 5-9 through a LoRA, with two optimizers.

The data are scikit-learn's bundled handwritten digits (8×8 pixels). A class-conditional flow-matching model is trained
once on 0-4 with `torch.optim.AdamW`. A LoRA then adapts it to 5-9: once with `Automagic8bit` and once with
bitsandbytes' `AdamW8bit`, from the same base weights, the same LoRA initialisation and the same batches. The
validation loss is taken on held-out images with noise and times drawn once, so its values are comparable.

`Automagic8bit` is given no learning rate unless the user passes one. `AdamW8bit` needs one: see `ADAMW_LR`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import Parameter
from torch.optim.optimizer import Optimizer

BASE_CLASSES = range(5)
LORA_CLASSES = range(5, 10)
PIXELS = 64
WIDTH = 512
"""Hidden width. At rank 8 every LoRA matrix then has 4096 elements, the size from which states are kept in 8 bits."""
BLOCKS = 3
BATCH = 128
BASE_LR = 1e-3
ADAMW_LR = 2e-3
"""AdamW8bit's default rate: its best of 5e-4, 1e-3, 2e-3, 3e-3, 5e-3 and 1e-2 by validation loss after 400 steps at
seed 0, and of the four rates from 1e-3 to 5e-3 by the mean over the seeds 0, 1 and 2."""
VALIDATION_INTERVAL = 25
SAMPLES_PER_CLASS = 8
SAMPLING_STEPS = 50


class DemoError(RuntimeError):
    """The demo cannot run here; the message says why and what to do."""


@dataclass(frozen=True)
class DemoOptions:
    """What the command line sets; rates are per step, `lr=None` lets `Automagic8bit` find its own."""

    steps: int = 400
    base_steps: int = 800
    seed: int = 0
    out: Path = Path("automagic_demo")
    profile: str = "balanced"
    lr: float | None = None
    adamw_lr: float = ADAMW_LR
    rank: int = 8
    device: str | None = None


RANDOM_STREAMS = ("split", "base weights", "LoRA weights", "batches", "validation", "samples")


def random_stream(seed: int, purpose: str) -> torch.Generator:
    """The CPU's random numbers for one of the `RANDOM_STREAMS`, independent of the others and of global state."""
    return torch.Generator().manual_seed(len(RANDOM_STREAMS) * seed + RANDOM_STREAMS.index(purpose))


# ---------------------------------------------------------------------------------------------------------------- data


class Examples(NamedTuple):
    """Images, float32 [n, 64] with pixels from -1 (paper) to 1 (ink), and labels, int64 [n]."""

    images: Tensor
    labels: Tensor


class FlowBatch(NamedTuple):
    """A flow-matching problem: images and noise, float32 [n, 64]; times in 0…1, float32 [n]; labels, int64 [n]."""

    images: Tensor
    noise: Tensor
    times: Tensor
    labels: Tensor


def load_digits(classes: range, seed: int) -> tuple[Examples, Examples]:
    """The digits of these classes, shuffled, as a training part (80 %) and a validation part (20 %)."""
    bundled = optional_import("sklearn.datasets").load_digits()
    images = torch.tensor(bundled.data, dtype=torch.float32) / 8 - 1  # pixels are stored as 0…16
    labels = torch.tensor(bundled.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=random_stream(seed, "split"))
    order = order[torch.isin(labels[order], torch.tensor(classes))]
    held_out, kept = order.tensor_split([len(order) // 5])
    return Examples(images[kept], labels[kept]), Examples(images[held_out], labels[held_out])


def draw_batch(examples: Examples, generator: torch.Generator, device: torch.device) -> FlowBatch:
    """A random training batch. It is drawn on the CPU, so that every device sees the same one."""
    chosen = torch.randint(len(examples.labels), (BATCH,), generator=generator)
    noise = torch.randn(BATCH, PIXELS, generator=generator)
    times = torch.rand(BATCH, generator=generator)
    batch = FlowBatch(examples.images[chosen], noise, times, examples.labels[chosen])
    return FlowBatch(*(x.to(device) for x in batch))


def validation_batch(examples: Examples, seed: int, device: torch.device, draws: int = 8) -> FlowBatch:
    """Every held-out image `draws` times, with fixed noise and with times spread evenly over 0…1."""
    generator = random_stream(seed, "validation")
    images, labels = examples.images.repeat(draws, 1), examples.labels.repeat(draws)
    noise = torch.randn(images.shape, generator=generator)
    times = (torch.randperm(len(labels), generator=generator) + 0.5) / len(labels)
    return FlowBatch(*(x.to(device) for x in (images, noise, times, labels)))


# --------------------------------------------------------------------------------------------------------------- model


class ResidualBlock(nn.Module):
    """h + down(silu(up(norm(h)) + condition(c))), with h and c of shape [n, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.condition = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        return hidden + self.down(F.silu(self.up(self.norm(hidden)) + self.condition(condition)))


class VelocityModel(nn.Module):
    """Predicts the velocity of a noisy image at a time, given its class: ([n, 64], [n], [n]) → [n, 64].

    Classes are fixed random codes. So a class that the base never saw has a code of its own from the start, and what
    the model makes of it is up to `class_projection`, which the LoRA adapts.
    """

    frequencies: Tensor
    class_codes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, math.log(1000), PIXELS // 2)))
        self.register_buffer("class_codes", torch.randn(10, WIDTH))
        self.time_projection = nn.Linear(PIXELS, WIDTH)
        self.class_projection = nn.Linear(WIDTH, WIDTH)
        self.image_in = nn.Linear(PIXELS, WIDTH)
        self.blocks = nn.ModuleList(ResidualBlock() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.velocity_out = nn.Linear(WIDTH, PIXELS)

    def forward(self, noisy: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        angles = times[:, None] * self.frequencies
        time_features = self.time_projection(torch.cat([angles.sin(), angles.cos()], dim=1))
        condition = F.silu(time_features + self.class_projection(self.class_codes[labels]))
        hidden = self.image_in(noisy)
        for block in self.blocks:
            hidden = block(hidden, condition)
        return self.velocity_out(self.norm(hidden))


def make_base(seed: int, device: torch.device) -> VelocityModel:
    """A freshly initialised model; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_stream(seed, "base weights").initial_seed())
        return VelocityModel().to(device)


def flow_matching_loss(model: nn.Module, batch: FlowBatch) -> Tensor:
    """Conditional flow matching on straight paths (arXiv 2210.02747, 2209.03003); a 0-d tensor, mean over pixels.

    x_t = (1 - t) x_0 + t x_1 runs from noise x_0 to the image x_1; the model predicts its velocity x_1 - x_0.
    """
    t = batch.times[:, None]
    predicted = model((1 - t) * batch.noise + t * batch.images, batch.times, batch.labels)
    return F.mse_loss(predicted, batch.images - batch.noise)


@torch.no_grad()
def sample(model: VelocityModel, labels: Tensor, seed: int) -> Tensor:
    """Images [n, 64] of the classes `labels` [n]: Euler's method along the velocity, from noise fixed by the seed."""
    device = model.class_codes.device
    noise = torch.randn(len(labels), PIXELS, generator=random_stream(seed, "samples"))
    images, labels = noise.to(device), labels.to(device)
    for i in range(SAMPLING_STEPS):
        times = torch.full((len(labels),), i / SAMPLING_STEPS, device=device)
        images = images + model(images, times, labels) / SAMPLING_STEPS
    return images


# ---------------------------------------------------------------------------------------------------------------- LoRA


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable product of two thin matrices: W x + b + B A x.

    A is [rank, in] and random, B is [out, rank] and zero, so the layer starts out as the frozen one.
    """

    def __init__(self, frozen: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.frozen = frozen
        lora_a = torch.randn(rank, frozen.in_features, generator=generator) / math.sqrt(frozen.in_features)
        self.lora_A = Parameter(lora_a.to(frozen.weight))
        self.lora_B = Parameter(frozen.weight.new_zeros(frozen.out_features, rank))
        for matrix in (self.lora_A, self.lora_B):
            matrix._is_lora_layer = True  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + F.linear(F.linear(x, self.lora_A), self.lora_B)


def with_lora(base: VelocityModel, rank: int, seed: int) -> VelocityModel:
    """A frozen copy of the base whose class projection and residual blocks carry a LoRA, the only trainable part."""
    model = copy.deepcopy(base).requires_grad_(False)
    generator = random_stream(seed, "LoRA weights")
    for parent, name in [(model, "class_projection")] + [(b, n) for b in model.blocks for n in ("up", "down")]:
        setattr(parent, name, LoRALinear(getattr(parent, name), rank, generator))
    return model


def trainable(model: nn.Module) -> list[Parameter]:
    """The parameters that an optimizer is to move."""
    return [p for p in model.parameters() if p.requires_grad]


# ------------------------------------------------------------------------------------------------------------ training


@dataclass
class History:
    """What a training run records: one entry a step, but validation, if any, every `VALIDATION_INTERVAL` steps."""

    train_loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    validation_step: list[int] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    interrupted: bool = False

    def validate(self, model: nn.Module, batch: FlowBatch | None) -> None:
        """Append the loss on the validation batch, if there is one, unless this step has it already."""
        taken = len(self.train_loss)
        if batch is not None and taken not in self.validation_step:
            with torch.no_grad():
                loss = flow_matching_loss(model, batch).item()
            self.validation_step.append(taken)
            self.validation_loss.append(loss)


def train(
    model: VelocityModel,
    optimizer: Optimizer,
    examples: Examples,
    *,
    steps: int,
    seed: int,
    title: str,
    validation: FlowBatch | None = None,
) -> History:
    """Train in place, behind a progress bar. Ctrl-C ends it early and is recorded."""
    device = model.class_codes.device
    generator = random_stream(seed, "batches")
    history = History()
    with optional_import("tqdm").tqdm(total=steps, desc=title, mininterval=0.2) as bar:
        try:
            for step in range(steps):
                if step % VALIDATION_INTERVAL == 0:
                    history.validate(model, validation)
                train_step(model, optimizer, draw_batch(examples, generator, device), history)
                rate = f"{history.learning_rate[-1]:.2e}"
                bar.set_postfix(loss=f"{history.train_loss[-1]:.3f}", lr=rate, refresh=False)
                bar.update()
        except KeyboardInterrupt:
            history.interrupted = True
        history.validate(model, validation)
    return history


def train_step(model: nn.Module, optimizer: Optimizer, batch: FlowBatch, history: History) -> None:
    """One gradient step; only the optimizer's own part is timed."""
    loss = flow_matching_loss(model, batch)
    optimizer.zero_grad()
    loss.backward()
    synchronize(batch.images.device)
    start = time.perf_counter()
    optimizer.step()
    synchronize(batch.images.device)
    history.step_ms.append(1000 * (time.perf_counter() - start))
    history.learning_rate.append(learning_rate(optimizer))
    history.train_loss.append(loss.item())


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, which works asynchronously; nothing to do on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def learning_rate(optimizer: Any) -> float:
    """The rate in force: Automagic's mean, which it may have found itself, or another optimizer's `lr`."""
    if hasattr(optimizer, "get_avg_learning_rate"):
        return float(optimizer.get_avg_learning_rate())
    return float(optimizer.param_groups[0]["lr"])


# ---------------------------------------------------------------------------------------------------------- comparison


@dataclass
class Run:
    """One optimizer's LoRA training, finished or interrupted."""

    label: str
    model: VelocityModel
    optimizer: Optimizer
    history: History
    rate_origin: str
    """Whether the learning rate was "found" by the optimizer or "given" to it."""


def contestants(options: DemoOptions) -> dict[str, Callable[[list[Parameter]], Optimizer]]:
    """The two optimizers by label. Without bitsandbytes both keep their state in 32 bits, and the labels say so."""
    from automagic_bnb import Automagic8bit
    from automagic_bnb.bnb import BITSANDBYTES_AVAILABLE

    def automagic(parameters: list[Parameter]) -> Optimizer:
        rate: dict[str, Any] = {} if options.lr is None else {"lr": options.lr}
        return Automagic8bit(parameters, profile=options.profile, seed=options.seed, **rate)

    def adamw(parameters: list[Parameter]) -> Optimizer:
        if not BITSANDBYTES_AVAILABLE:
            return torch.optim.AdamW(parameters, lr=options.adamw_lr)
        return optional_import("bitsandbytes").optim.AdamW8bit(parameters, lr=options.adamw_lr)

    if BITSANDBYTES_AVAILABLE:
        return {"Automagic8bit": automagic, "AdamW8bit": adamw}
    return {"Automagic, 32-bit state": automagic, "torch AdamW, 32-bit state": adamw}


def train_base(base: VelocityModel, options: DemoOptions) -> bool:
    """Teach the model the digits 0-4, in place. Returns whether it ran to the end."""
    examples, _ = load_digits(BASE_CLASSES, options.seed)
    adamw = torch.optim.AdamW(base.parameters(), lr=BASE_LR)
    title = "base model, digits 0-4"
    history = train(base, adamw, examples, steps=options.base_steps, seed=options.seed, title=title)
    return not history.interrupted


def compare(base: VelocityModel, options: DemoOptions) -> list[Run]:
    """Train one LoRA per optimizer from the same start on the same batches; stops after an interrupted one."""
    runs: list[Run] = []
    steps, seed = options.steps, options.seed
    examples, held_out = load_digits(LORA_CLASSES, seed)
    validation = validation_batch(held_out, seed, base.class_codes.device)
    for label, make_optimizer in contestants(options).items():
        model = with_lora(base, options.rank, seed)
        optimizer = make_optimizer(trainable(model))
        history = train(model, optimizer, examples, steps=steps, seed=seed, title=label, validation=validation)
        found = options.lr is None and hasattr(optimizer, "get_avg_learning_rate")
        runs.append(Run(label, model, optimizer, history, "found" if found else "given"))
        if history.interrupted:
            break
    return runs


def state_bytes_per_parameter(optimizer: Optimizer) -> float:
    """Bytes of the optimizer's state tensors per element trained; a storage that several share counts once."""
    tensors = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    elements = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    return sum(storages.values()) / elements


def learned_rates(run: Run) -> dict[str, Tensor]:
    """The rate of every single weight, float32 [n] on the CPU, by kind of LoRA matrix: empty for AdamW."""
    optimizer: Any = run.optimizer
    if not hasattr(optimizer, "element_learning_rates"):
        return {}
    rates: dict[str, list[Tensor]] = {"lora_A": [], "lora_B": []}
    for name, p in run.model.named_parameters():
        if p.requires_grad:
            rates[name.rpartition(".")[2]].append(optimizer.element_learning_rates(p).flatten().cpu())
    return {kind: torch.cat(parts) for kind, parts in rates.items()}


def mean_rate(run: Run) -> float:
    """The learning rate after the last step, as the mean over all weights where they differ."""
    rates = learned_rates(run)
    return torch.cat(list(rates.values())).mean().item() if rates else learning_rate(run.optimizer)


def result_table(runs: list[Run]) -> Any:
    """The figures as a `rich.table.Table`: a row per figure, a column per optimizer."""
    on_cpu = runs[0].model.class_codes.device.type == "cpu"
    caption = "On the CPU Automagic runs as plain PyTorch; its one-pass kernel needs a GPU." if on_cpu else None
    table = optional_import("rich.table").Table(title="LoRA onto the digits 5-9", caption=caption)
    table.add_column("")
    for run in runs:
        table.add_column(run.label, justify="right")

    def add_row(title: str, cell: Callable[[Run], str]) -> None:
        table.add_row(title, *map(cell, runs))

    add_row("validation loss before LoRA", lambda run: f"{run.history.validation_loss[0]:.4f}")
    add_row("validation loss after", lambda run: f"{run.history.validation_loss[-1]:.4f}")
    add_row("steps taken", lambda run: f"{len(run.history.train_loss)}")
    add_row("state, bytes per parameter", lambda run: f"{state_bytes_per_parameter(run.optimizer):.2f}")
    add_row("optimizer step, ms (median)", lambda run: f"{statistics.median(run.history.step_ms):.2f}")
    add_row("learning rate, mean", lambda run: f"{mean_rate(run):.2e} {run.rate_origin}")
    return table


# ------------------------------------------------------------------------------------------------------------- command


def optional_import(name: str) -> Any:
    """A module that only the demo needs.

    Raises:
        DemoError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise DemoError(f'the demo needs {name.split(".")[0]}: pip install "automagic-bnb[demo]"') from e


def choose_device(name: str | None) -> torch.device:
    """The device of that name; a GPU if there is one where no name is given.

    Raises:
        DemoError: torch does not know it, or it is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as e:  # what torch raises for unusable devices
        raise DemoError(f"cannot use the device {name!r}: {str(e).splitlines()[0]}") from e


def prepare_folder(folder: Path) -> Path:
    """The absolute path of the folder for the pictures, made and tried out before anything is computed.

    Raises:
        DemoError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise DemoError(f"cannot write to the folder {folder}: {e.strerror}; choose another with --out") from e
    return folder.resolve()


def save_pictures(folder: Path, base: VelocityModel, runs: list[Run], seed: int) -> None:
    """Write samples.png, loss.png and learning_rates.png."""
    from automagic_bnb import demo_pictures

    labels = torch.tensor(LORA_CLASSES).repeat_interleave(SAMPLES_PER_CLASS)
    _, held_out = load_digits(LORA_CLASSES, seed)
    real = [held_out.images[held_out.labels == digit][:SAMPLES_PER_CLASS] for digit in LORA_CLASSES]
    panels = {"real digits, held out": torch.cat(real), "samples before the LoRA": sample(base, labels, seed)}
    panels |= {f"samples, {run.label}": sample(run.model, labels, seed) for run in runs}
    images = {title: images.cpu().numpy() for title, images in panels.items()}
    demo_pictures.save_samples(folder / "samples.png", images, list(LORA_CLASSES))

    demo_pictures.save_curves(folder / "loss.png", {run.label: run.history for run in runs})

    learned = {f"{runs[0].label}, {kind}": rates.numpy() for kind, rates in learned_rates(runs[0]).items()}
    marks = {"mean": mean_rate(runs[0]), "upper bound (max_lr)": runs[0].optimizer.param_groups[0]["max_lr"]}
    marks |= {f"{run.label}, all weights": mean_rate(run) for run in runs[1:]}
    demo_pictures.save_learning_rates(folder / "learning_rates.png", learned, marks)


@contextlib.contextmanager
def one_cpu_thread() -> Iterator[None]:
    """Hold torch to one CPU thread.

    Matrices this small gain little from more, lose a lot where other programs keep the cores busy, and with one thread
    the sums, and so the losses, do not depend on the number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run_demo(options: DemoOptions) -> list[Run]:
    """Train, compare, print the table and write the pictures. After Ctrl-C, with the runs that took a step.

    Raises:
        DemoError: a package is missing, or the device or the folder cannot be used; before any training.
    """
    for name in ("sklearn.datasets", "tqdm", "matplotlib.figure", "rich.console"):
        optional_import(name)
    device, folder = choose_device(options.device), prepare_folder(options.out)
    console = optional_import("rich.console").Console()
    with one_cpu_thread():
        base = make_base(options.seed, device)
        runs = compare(base, options) if train_base(base, options) else []
        runs = [run for run in runs if run.history.step_ms]
        if not runs:
            console.print("Stopped before the first LoRA step: there is nothing to compare.")
            return []
        console.print(result_table(runs))
        save_pictures(folder, base, runs, options.seed)
    console.print(f"Pictures: {folder}", soft_wrap=True, highlight=False)
    return runs


def is_complete(runs: list[Run]) -> bool:
    """Whether both optimizers ran to the end."""
    return len(runs) == 2 and not any(run.history.interrupted for run in runs)
