"""A process in which bitsandbytes and Triton cannot be imported, started by `test_packaging`: HOW CHECKPOINT OUT.

HOW is "missing" or "broken"; CHECKPOINT is an 8-bit checkpoint; what was seen is written to OUT as JSON.
"""

from __future__ import annotations

import sys
from typing import Any


class Blocker:
    """Stands in front of every other finder."""

    def __init__(self, how: str) -> None:
        self.how = how

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "triton" or (name == "bitsandbytes" and self.how == "missing"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name == "bitsandbytes":
            raise RuntimeError("CUDA Setup failed despite GPU being available")


sys.meta_path.insert(0, Blocker(sys.argv[1]))  # type: ignore[arg-type]

import copy  # noqa: E402
import importlib.util  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import pickle  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable  # noqa: E402

import torch  # noqa: E402


def caught(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """A call's result and its warnings."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        return call(), [str(w.message) for w in record]


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except (TypeError, ValueError, RuntimeError) as e:
        return f"{type(e).__name__}: {e}"
    return ""


def fit(opt: Any, model: torch.nn.Module, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
        opt.zero_grad()
        loss = (model(x) - x.flip(1)).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


def whole_package() -> Any:
    """Imported, with every public name."""
    package = __import__("automagic_bnb")
    for name in package.__all__:
        getattr(package, name)
    return package


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(64, 64)


def copies(opt: Any, model: torch.nn.Module) -> list[list[float]]:
    """The losses of five more steps: of the original, of a copy, of a pickle, of a checkpoint."""
    pairs = [copy.deepcopy((opt, model)), pickle.loads(pickle.dumps((opt, model)))]
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    resumed = copy.deepcopy(model)
    fresh = type(opt)(resumed.parameters(), lr=3e-3)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return [fit(o, m, range(20, 25)) for o, m in ((opt, model), *pairs, (fresh, resumed))]


def main(checkpoint: str, out: str) -> None:
    torch.set_num_threads(1)
    random_state = torch.get_rng_state()
    automagic_bnb, import_warnings = caught(whole_package)
    seen: dict[str, Any] = {
        "import warnings": import_warnings,
        "random state kept": torch.equal(random_state, torch.get_rng_state()),
        "available": automagic_bnb.BITSANDBYTES_AVAILABLE,
        "modules": [name for name in sys.modules if name.split(".")[0] in ("triton", "kernels", "bitsandbytes")],
        "kernels": str(getattr(importlib.util.find_spec("kernels"), "origin", None)),
    }
    model = network()
    cls = automagic_bnb.Automagic8bit
    opt, seen["first warnings"] = caught(lambda: cls(model.parameters(), lr=3e-3))
    _, seen["later warnings"] = caught(lambda: cls(model.parameters(), lr=3e-3))
    seen["losses"], seen["training warnings"] = caught(lambda: fit(opt, model, range(20)))
    seen["dtypes"] = sorted({str(opt.state[p]["state1"].dtype) for p in model.parameters()})
    seen["copies"] = copies(opt, model)
    seen["forced"] = error_of(lambda: cls(model.parameters(), force_8bit=True))
    seen["8-bit checkpoint"] = error_of(lambda: opt.load_state_dict(torch.load(checkpoint, weights_only=True)))
    seen["after"] = fit(opt, model, range(25, 27))
    triton = cls(model.parameters(), lr=1e-3, backend="triton")
    seen["triton"] = error_of(lambda: fit(triton, model, range(1)))
    for name in ("Automagic", "Automagic32bit", "PagedAutomagic8bit", "PagedAutomagic32bit"):
        other = network()
        seen[name] = fit(getattr(automagic_bnb, name)(other.parameters(), lr=3e-3), other, range(20))
    with open(out, "w", encoding="utf-8") as file:
        json.dump(seen, file)


if __name__ == "__main__":
    main(*sys.argv[2:])
