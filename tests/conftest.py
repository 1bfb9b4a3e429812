"""What every test starts from, and the tools that several test files share."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

# `python -m pytest` puts the checkout on the path, in which the package is not whole: kernels/ lies beside it.
if str(Path(__file__).parents[1]) in sys.path:
    sys.path.remove(str(Path(__file__).parents[1]))

if not torch.cuda.is_available():
    # Triton reads it when it is imported, which bitsandbytes does: the kernels then run, interpreted, on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"

from automagic_bnb import Automagic8bit, backends, bnb, groups, notices

groups.own_seeds = itertools.repeat(0)  # tests hold two optimizers beside each other, of which both are to round alike

sys.path.append(str(Path(__file__).parent))  # importlib mode does not: for `import rule_in_float64`


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without Triton, what is marked `kernels` or has "triton" among its parameters is skipped, and says so."""
    missing = backends.triton_missing()
    for item in items if missing else ():
        given = item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
        if item.get_closest_marker("kernels") or any(isinstance(x, str) and x == "triton" for x in given):
            item.add_marker(pytest.mark.skip(reason=f"the kernels need Triton: {missing}"))


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """Small tensors and workers that share the cores: one thread each is fastest, and its sums are reproducible."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def numbers_as_compiled() -> Iterator[None]:
    """The interpreter leaves numbers that a kernel is given as Python's float64, which compiled are float32; cuts off
    what does not fit into bfloat16, which compiled is rounded to nearest; and takes bfloat16's denormals for 0."""
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    def convert(x: Any) -> Any:
        if isinstance(x, float):
            return tl.tensor(interpreter.TensorHandle(np.array([x], dtype=np.float32), tl.float32), tl.float32)
        return real(x)

    def cast(x: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.bfloat16, tl.float32):
            return x.view(np.uint16).astype(np.uint32) << 16
        if (source, target) == (tl.float32, tl.bfloat16) and rounding is None:
            bits = x.view(np.uint32)
            rounded = bits + 0x7FFF + (bits >> 16 & 1)
            return (np.where(np.isnan(x), bits | 0x400000, rounded) >> 16).astype(np.uint16)
        return real_cast(x, source, target, rounding)

    real, interpreter._implicit_cvt = interpreter._implicit_cvt, convert
    real_cast, interpreter._convert_float = interpreter._convert_float, cast
    yield
    interpreter._implicit_cvt, interpreter._convert_float = real, real_cast


@pytest.fixture(scope="session", autouse=True)
def language_patched_once_a_launch() -> Iterator[None]:
    """The interpreter puts its own functions into Triton's modules at each call of a device function, though they stay
    there until the launch ends: half of its time."""
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # earlier versions never take them out
        yield
        return
    patched: set[int] = set()

    class Launch(interpreter._LangPatchScope):
        def restore(self) -> None:
            patched.clear()
            super().restore()

    def patch(fn: Any) -> Any:
        modules = {id(x) for x in fn.__globals__.values() if x is interpreter.tl or x is interpreter.tl.core}
        if patched and modules <= patched:
            return None
        patched.update(modules)
        return real(fn)

    real, scope = interpreter._patch_lang, interpreter._LangPatchScope
    interpreter._patch_lang, interpreter._LangPatchScope = patch, Launch
    yield
    interpreter._patch_lang, interpreter._LangPatchScope = real, scope


@pytest.fixture(autouse=True)
def clean_process() -> Iterator[None]:
    """An override manager of bitsandbytes that knows nothing, and warnings that were never given."""

    def clean() -> None:
        notices.forget()
        if bnb.BITSANDBYTES_AVAILABLE:
            bnb.GlobalOptimManager.get_instance().initialize()

    clean()
    yield
    clean()


class Tools:
    """Deterministic parameters and gradients, and comparison of whole optimizers bit for bit."""

    @staticmethod
    def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Any]:
        """One parameter of each shape, the same at every call."""
        generator = torch.Generator().manual_seed(seed)
        made = [torch.randn(shape, generator=generator) * 0.1 for shape in shapes]
        return [torch.nn.Parameter(x.to(dtype)) for x in made]

    @staticmethod
    def give_gradients(parameters: list[Any], step: int) -> None:
        """Gradients that depend on the step and the parameter's place alone, with a constant part."""
        for index, p in enumerate(parameters):
            generator = torch.Generator().manual_seed(1000 * step + index)
            noise = torch.randn(p.shape, generator=generator)
            p.grad = ((noise + 0.3) * 0.01).to(p.dtype).to(p.device)

    @classmethod
    def train(cls, opt: Any, parameters: list[Any], steps: range, after: Callable[[], Any] | None = None) -> None:
        """Give gradients and step, once for each number in `steps`."""
        for step in steps:
            cls.give_gradients(parameters, step)
            opt.step()
            if after is not None:
                after()

    @staticmethod
    def snapshot(opt: Any) -> dict[str, Any]:
        """A copy of all that a step depends on: parameters, state, groups."""
        parameters = [p for group in opt.param_groups for p in group["params"]]
        return {
            "parameters": [p.detach().clone() for p in parameters],
            "state": [copy.deepcopy(dict(opt.state.get(p, {}))) for p in parameters],
            "groups": [copy.deepcopy({k: v for k, v in g.items() if k != "params"}) for g in opt.param_groups],
        }

    @classmethod
    def differences(cls, a: Any, b: Any, path: str = "") -> list[str]:
        """The places where two nests of tensors and plain values differ, in a bit or in a dtype."""
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.dtype != b.dtype or a.shape != b.shape:
                return [f"{path}: {a.dtype} {tuple(a.shape)} against {b.dtype} {tuple(b.shape)}"]
            same = torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
            return [] if same else [f"{path}: the tensors' bits differ"]
        if type(a) is not type(b):
            return [f"{path}: {type(a).__name__} against {type(b).__name__}"]
        if isinstance(a, dict):
            if a.keys() != b.keys():
                return [f"{path}: keys {sorted(map(str, a.keys() ^ b.keys()))} are on one side only"]
            return [d for k in a for d in cls.differences(a[k], b[k], f"{path}/{k}")]
        if isinstance(a, (list, tuple)):
            if len(a) != len(b):
                return [f"{path}: lengths {len(a)} and {len(b)}"]
            return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in cls.differences(x, y, f"{path}/{i}")]
        return [] if a == b else [f"{path}: {a!r} against {b!r}"]


@pytest.fixture(scope="session")
def tools() -> type[Tools]:
    """The class `Tools`."""
    return Tools


@pytest.fixture
def optimizer(tools: type[Tools]) -> Automagic8bit:
    """An optimizer of a matrix and a vector that has not been stepped."""
    return Automagic8bit(tools.parameters((64, 96), (32,)), lr=1e-3)


@pytest.fixture
def no_warnings() -> Iterator[None]:
    """Any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
