"""The demo: a small image generator that knows the digits 0-4 learns 5-9 through a LoRA, with two optimizers.

The data are scikit-learn's bundled handwritten digits (8×8 pixels). A class-conditional flow-matching model is trained
once on 0-4 with `torch.optim.AdamW`. A LoRA then adapts it to 5-9: with `Automagic8bit` and with bitsandbytes'
`AdamW8bit`, from the same base weights, the same LoRA initialisation and the same batches. The validation loss is taken
on held-out images with noise and times drawn once, so its values are comparable.

`Automagic8bit` is given no learning rate unless the user passes one, and runs as it is by default and in the profile
`lean`. `AdamW8bit` needs a rate, and runs with two: its best of several (`ADAMW_LR`), which nobody knows beforehand,
and the one that people start with (`USUAL_LR`).
"""

from __future__ import annotations

import contextlib
import importlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from torch.optim.optimizer import Optimizer

from automagic_bnb import files
from automagic_bnb.command.demo_model import (
    PIXELS,
    FlowBatch,
    VelocityModel,
    flow_matching_loss,
    lora_matrices,
    make_base,
    random_stream,
    sample,
    trainable,
    with_lora,
)
from automagic_bnb.command.demo_options import ADAMW_LR, USUAL_LR, DemoError, DemoOptions
from automagic_bnb.watch import singular

BASE_CLASSES = range(5)
LORA_CLASSES = range(5, 10)
BASE_BATCH = 64
BASE_LR = 1e-3
VALIDATION_INTERVAL = 25
SAMPLES_PER_CLASS = 8


# ---------------------------------------------------------------------------------------------------------------- data


class Examples(NamedTuple):
    """Images, float32 [n, 64] with pixels from -1 (paper) to 1 (ink), and labels, int64 [n]."""

    images: Tensor
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


def draw_batch(examples: Examples, size: int, generator: torch.Generator, device: torch.device) -> FlowBatch:
    """A random training batch. It is drawn on the CPU, so that every device sees the same one."""
    chosen = torch.randint(len(examples.labels), (size,), generator=generator)
    noise = torch.randn(size, PIXELS, generator=generator)
    times = torch.rand(size, generator=generator)
    batch = FlowBatch(examples.images[chosen], noise, times, examples.labels[chosen])
    return FlowBatch(*(x.to(device) for x in batch))


def validation_batch(examples: Examples, seed: int, device: torch.device, draws: int = 4) -> FlowBatch:
    """Every held-out image `draws` times, with fixed noise and with times spread evenly over 0…1."""
    generator = random_stream(seed, "validation")
    images, labels = examples.images.repeat(draws, 1), examples.labels.repeat(draws)
    noise = torch.randn(images.shape, generator=generator)
    times = (torch.randperm(len(labels), generator=generator) + 0.5) / len(labels)
    return FlowBatch(*(x.to(device) for x in (images, noise, times, labels)))


# ------------------------------------------------------------------------------------------------------------ training


@dataclass
class History:
    """What a training run records: one entry a step, or one a validation, every `VALIDATION_INTERVAL` steps if any."""

    train_loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    validation_step: list[int] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    effective_rank: list[float] = field(default_factory=list)
    """Of what the LoRA adds to a weight, B·A, at each validation: the mean over the layers."""
    interrupted: bool = False

    def validate(self, model: VelocityModel, batch: FlowBatch | None) -> None:
        """Append loss and ranks, if there is a validation batch and this step has none yet."""
        taken = len(self.train_loss)
        if batch is not None and taken not in self.validation_step:
            with torch.no_grad():
                loss = flow_matching_loss(model, batch).item()
            self.validation_step.append(taken)
            self.validation_loss.append(loss)
            self.effective_rank.append(statistics.fmean(map(singular.effective_rank, lora_products(model))))


def train(
    model: VelocityModel,
    optimizer: Optimizer,
    examples: Examples,
    *,
    steps: int,
    batch: int,
    seed: int,
    title: str,
    validation: FlowBatch | None = None,
) -> History:
    """Train in place, behind a progress bar. Ctrl-C ends it early and is recorded."""
    device = model.class_codes.device
    generator = random_stream(seed, "batches")
    history = History()
    # disable=None: no bar in a pipe or a log
    with optional_import("tqdm").tqdm(total=steps, desc=title, mininterval=0.2, disable=None) as bar:
        try:
            for step in range(steps):
                if step % VALIDATION_INTERVAL == 0:
                    history.validate(model, validation)
                train_step(model, optimizer, draw_batch(examples, batch, generator, device), history)
                rate = f"{history.learning_rate[-1]:.2e}"
                bar.set_postfix(loss=f"{history.train_loss[-1]:.3f}", lr=rate, refresh=False)
                bar.update()
        except KeyboardInterrupt:
            history.interrupted = True
        history.validate(model, validation)
    return history


@torch.no_grad()
def lora_products(model: VelocityModel) -> list[Tensor]:
    """For each layer a matrix [rank, rank] with the singular values of what the LoRA adds to the weight, B·A.

    (A and B alone are known but for a factor between them.) With B = Q R and Aᵀ = Q' R', B·A is Q (R R'ᵀ) Q'ᵀ, and
    R R'ᵀ has its singular values, in far less time.
    """
    matrices = lora_matrices(model)
    pairs = zip(matrices["lora_A"], matrices["lora_B"], strict=True)
    return [torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T for a, b in pairs]


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
    """The mean rate in force, as bar, table and pictures show it: Automagic's and Prodigy's may have been found."""
    if hasattr(optimizer, "get_avg_learning_rate"):
        return float(optimizer.get_avg_learning_rate())
    group = optimizer.param_groups[0]
    return float(group["lr"] * group.get("d", 1.0))


# ---------------------------------------------------------------------------------------------------------- comparison


@dataclass
class Run:
    """One optimizer's LoRA training, finished or interrupted."""

    label: str
    model: VelocityModel
    optimizer: Optimizer
    history: History
    rate_origin: str
    """Where the learning rate is from, in a word or two: "found" by the optimizer, "given" by the user, …"""


class Contestant(NamedTuple):
    """An optimizer to run: how it is made of the parameters, and where its rate is from."""

    make: Callable[[list[Parameter]], Optimizer]
    rate_origin: str


def contestants(options: DemoOptions) -> dict[str, Contestant]:
    """The optimizers by label. Without bitsandbytes their state is in 32 bits, and the labels say so.

    Raises:
        DemoError: prodigyopt, where Prodigy is asked for, is not installed.
    """
    from automagic_bnb import Automagic8bit
    from automagic_bnb.bnb import BITSANDBYTES_AVAILABLE

    def automagic(profile: str) -> Callable[[list[Parameter]], Optimizer]:
        rate: dict[str, Any] = {} if options.lr is None else {"lr": options.lr}
        return lambda parameters: Automagic8bit(parameters, profile=profile, seed=options.seed, **rate)

    def adamw(lr: float) -> Callable[[list[Parameter]], Optimizer]:
        if not BITSANDBYTES_AVAILABLE:
            return lambda parameters: torch.optim.AdamW(parameters, lr=lr)
        return lambda parameters: optional_import("bitsandbytes").optim.AdamW8bit(parameters, lr=lr)

    ours, peer = ("Automagic8bit", "AdamW8bit")
    if not BITSANDBYTES_AVAILABLE:
        ours, peer = ("Automagic, 32-bit state", "torch AdamW, 32-bit state")
    chosen = "best of 6" if options.adamw_lr == ADAMW_LR else "given"
    origin = "found" if options.lr is None else "given"
    profiles = ("balanced", "lean") if options.profile is None else (options.profile,)
    names = {profile: ours if profile == "balanced" else f"{ours}, {profile}" for profile in profiles}
    found = {names[profile]: Contestant(automagic(profile), origin) for profile in profiles}
    found |= {
        f"{peer}, tuned": Contestant(adamw(options.adamw_lr), chosen),
        f"{peer}, as usual": Contestant(adamw(USUAL_LR), "usual start"),
    }
    if options.compare == "prodigy":
        prodigy = optional_import("prodigyopt", "prodigyopt").Prodigy
        found["Prodigy"] = Contestant(lambda parameters: prodigy(parameters, lr=1.0), "found")
    return found


def train_base(base: VelocityModel, options: DemoOptions) -> bool:
    """Teach the model the digits 0-4, in place. Returns whether it ran to the end."""
    examples, _ = load_digits(BASE_CLASSES, options.seed)
    adamw = torch.optim.AdamW(base.parameters(), lr=BASE_LR)
    title = "base model, digits 0-4"
    settings: dict[str, Any] = {"steps": options.base_steps, "batch": BASE_BATCH, "seed": options.seed}
    history = train(base, adamw, examples, title=title, **settings)
    return not history.interrupted


def compare(base: VelocityModel, options: DemoOptions) -> list[Run]:
    """Train one LoRA per optimizer from the same start on the same batches; stops after an interrupted one."""
    runs: list[Run] = []
    seed = options.seed
    settings: dict[str, Any] = {"steps": options.steps, "batch": options.batch, "seed": seed}
    examples, held_out = load_digits(LORA_CLASSES, seed)
    validation = validation_batch(held_out, seed, base.class_codes.device)
    for label, contestant in contestants(options).items():
        model = with_lora(base, options.rank, seed)
        optimizer = contestant.make(trainable(model))
        history = train(model, optimizer, examples, title=label, validation=validation, **settings)
        runs.append(Run(label, model, optimizer, history, contestant.rate_origin))
        if history.interrupted:
            break
    return runs


def state_bytes_per_parameter(optimizer: Optimizer) -> float:
    """Bytes of the optimizer's state tensors per element trained; a storage that several share counts once."""
    tensors = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    elements = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    return sum(storages.values()) / elements


def result_table(runs: list[Run]) -> Any:
    """The figures as a `rich.table.Table`: a row for each optimizer, every column for every row."""
    from automagic_bnb.cpu import step as cpu

    on_cpu = runs[0].model.class_codes.device.type == "cpu"
    steps = sorted({len(run.history.train_loss) for run in runs})
    caption = f"{steps[0] if len(steps) == 1 else f'{steps[0]} to {steps[-1]}'} steps"
    caption += f"; loss on held-out digits, {runs[0].history.validation_loss[0]:.4f} before: lower is better."
    if on_cpu and cpu.missing():
        caption += (
            ' On a CPU without Numba Automagic runs as plain PyTorch: pip install "automagic-bnb[cpu]" compiles it.'
        )
    table = optional_import("rich.table").Table(title="A LoRA learns the digits 5-9", caption=caption)
    table.add_column("optimizer")
    for title in ("learning rate", "loss", "bytes per\nparameter", "step, ms\n(median)"):
        table.add_column(title, justify="right")
    for run in runs:
        table.add_row(
            run.label,
            f"{learning_rate(run.optimizer):.2e} {run.rate_origin}",
            f"{run.history.validation_loss[-1]:.4f}",
            f"{state_bytes_per_parameter(run.optimizer):.2f}",
            f"{statistics.median(run.history.step_ms):.2f}",
        )
    return table


# ------------------------------------------------------------------------------------------------------------- command


def optional_import(name: str, to_install: str = '"automagic-bnb[demo]"') -> Any:
    """A module that only the demo needs, and what pip is to install for it.

    Raises:
        DemoError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise DemoError(f"the demo needs {name.split('.')[0]}: pip install {to_install}") from e


def choose_device(name: str | None) -> torch.device:
    """The device of that name; a GPU if there is one where no name is given.

    Raises:
        DemoError: torch does not know it, or it is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tried = torch.zeros(1, device=name)
        tried.item()  # which "meta" has not
        return tried.device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as e:  # as torch does where it has none
        reason = str(e).splitlines()[0].split(". ")[0]  # of some devices torch says it at great length
        raise DemoError(f"cannot use the device {name!r}: {reason}; leave --device out to use what is there") from e


PICTURES = ("result.png", "samples.png", "loss.png", "effective_rank.png")


def prepare_folder(folder: Path) -> Path:
    """The absolute path of the folder for the pictures, made and tried out before anything is computed.

    Raises:
        DemoError: it cannot be made or written to, or a picture there is a link to some other file.
    """
    try:
        for name in PICTURES:
            files.check_no_link(folder / name, "a picture")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise DemoError(f"cannot write to the folder {folder}: {e.strerror}; choose another with --out") from e
    except ValueError as e:
        raise DemoError(str(e)) from e
    return folder.resolve()


def save_pictures(folder: Path, base: VelocityModel, runs: list[Run], seed: int) -> None:
    """Write `PICTURES`."""
    from automagic_bnb.command import demo_pictures

    labels = torch.tensor(LORA_CLASSES).repeat_interleave(SAMPLES_PER_CLASS)
    _, held_out = load_digits(LORA_CLASSES, seed)
    real = [held_out.images[held_out.labels == digit][:SAMPLES_PER_CLASS] for digit in LORA_CLASSES]
    panels = {"real digits, held out": torch.cat(real), "samples before the LoRA": sample(base, labels, seed)}
    panels |= {f"samples, {run.label}": sample(run.model, labels, seed) for run in runs}
    images = {title: images.cpu().numpy() for title, images in panels.items()}
    curves = {f"{run.label}: {rate_words(run)}": run.history for run in runs}
    demo_pictures.save_result(folder / "result.png", list(images.values())[:3], curves, list(LORA_CLASSES))
    demo_pictures.save_samples(folder / "samples.png", images, list(LORA_CLASSES))

    demo_pictures.save_curves(folder / "loss.png", {run.label: run.history for run in runs})

    save_ranks(folder / "effective_rank.png", runs)


def rate_words(run: Run) -> str:
    """What is to be known of its rate, beside a curve."""
    rate = f"{learning_rate(run.optimizer):.1e}"
    return f"no rate given, found {rate}" if run.rate_origin == "found" else f"{rate}, {run.rate_origin}"


def save_ranks(path: Path, runs: list[Run]) -> None:
    """Write the singular values of what the LoRAs end by adding, and their effective rank on the way there."""
    from automagic_bnb.watch import plots

    values, ranks = {}, {}
    for run in runs:
        of_layers = list(map(singular.singular_values, lora_products(run.model)))
        values[run.label] = torch.stack(of_layers).mean(dim=0)
        ranks[run.label] = dict(zip(run.history.validation_step, run.history.effective_rank, strict=True))
    title = "What the LoRA adds, B·A: singular values at the end, and effective rank (means over the layers)"
    plots.plot_singular_values(values, ranks, path, title=title)


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
    device = choose_device(options.device)
    for name in ("sklearn.datasets", "tqdm", "matplotlib.figure", "rich.console"):
        optional_import(name)
    contestants(options)  # one that is asked for may be missing
    folder = prepare_folder(options.out)  # which makes it, so only when all else is there
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
    console.print(f"Pictures, result.png first: {folder}", soft_wrap=True, highlight=False)
    return runs


def is_complete(runs: list[Run], options: DemoOptions) -> bool:
    """Whether all optimizers ran to the end."""
    return len(runs) == len(contestants(options)) and not any(run.history.interrupted for run in runs)
