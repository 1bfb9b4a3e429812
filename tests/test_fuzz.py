"""Any shape, dtype, option and content of gradients: nothing finite becomes NaN, and both backends do the same.

A few examples in the ordinary run. So many in chunks of a thousand, each with a seed of its own, about a quarter of a
second each on one core in Triton's interpreter:

    for seed in $(seq 10); do AUTOMAGIC_FUZZ=1000 pytest tests/test_fuzz.py -k no_gradient --hypothesis-seed=$seed; done
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as some
from kernel_cases import DEVICE, FORMS, ONE_STEP, Differences, optimizer, synchronise
from torch import Tensor

EXAMPLES = int(os.environ.get("AUTOMAGIC_FUZZ", "0"))
# The interpreter takes 50 ms for each block of 256: one or two of them as a rule, three in rows longer than a block.
SHAPES = some.one_of(
    some.tuples(some.integers(1, 400)),
    some.tuples(some.integers(1, 18), some.integers(1, 18)),
    some.tuples(some.integers(1, 3), some.integers(1, 4), some.integers(1, 5), some.integers(1, 5)),
    some.tuples(some.integers(1, 3), some.integers(250, 264)),
)
OPTIONS = some.fixed_dictionaries(
    {},
    optional={
        "cautious": some.booleans(),
        "came": some.booleans(),
        "torque": some.booleans(),
        "edge_suppression": some.booleans(),
        "spatial_awareness": some.booleans(),
        "background_regularization": some.booleans(),
        "stochastic_rounding": some.booleans(),
        "frequency_penalty": some.sampled_from([0.0, 0.05, 1.0]),
        "edge_penalty": some.sampled_from([0.0, 0.1, 1e6]),
        "edge_threshold": some.sampled_from([0.0, 0.6, 3e38]),
        "clip_threshold": some.sampled_from([1e-6, 1.0, 3e38]),
        "percentile_clipping": some.sampled_from([1, 50, 100]),
        "weight_decay": some.sampled_from([0.0, 0.1]),
        "warmup_steps": some.sampled_from([0, 1, 2, 500]),
        "eps": some.sampled_from([(1e-30, 1e-16), (0.0, 0.0), (1e-3, 1e-3)]),
        "detail_preservation": some.sampled_from([0.0, 1e6]),
        "low_rank_emphasis": some.sampled_from([0.0, 1e6]),
        "lora": some.booleans(),
        "lora_mask": some.booleans(),
        "master": some.sampled_from(["none", "ecc8"]),
        "mask_bits": some.sampled_from([0, 4, 8]),
        "mean_bits": some.sampled_from([16, 32]),
    },
)
CONTENTS = {
    "noise": lambda x: x,
    "zeros": lambda x: x * 0,
    "denormal": lambda x: x * 1e-40,
    "tiny": lambda x: x * 1e-30,
    "large": lambda x: x * 1e14,
    "beyond": lambda x: x * 1e38,
    "constant": lambda x: torch.full_like(x, 0.3),
    "one-hot": lambda x: torch.zeros_like(x).view(-1).index_fill(0, torch.tensor([x.numel() // 2]), 1.0).view_as(x),
    "alternating": lambda x: (torch.arange(x.numel()) % 2 * 2.0 - 1).view_as(x),
    "around 2^50": lambda x: x.sign() * 2.0**50 * (1 + (x * 2).round() * 2.0**-20),
    "NaN among noise": lambda x: torch.where(x > 1, torch.nan, x),
    "infinite among noise": lambda x: torch.where(x.abs() > 1, x * torch.inf, x),
    "half zeros": lambda x: x.clamp_min(0),
}


def follows(
    shape: tuple[int, ...], dtype: torch.dtype, storage: str, contents: list[str], options: dict[str, Any], found: bool
) -> list[str]:
    """Step both backends, from equal states each time; returns where they differ, in words.

    Asserts that no weight and no state becomes NaN or infinite, whatever the gradients are.
    """
    rate: dict[str, Any] = {"lr": None, "auto_lr": True} if found else {}
    generator = torch.Generator().manual_seed(len(contents))
    start = torch.randn(shape, generator=generator).to(dtype)
    both = []
    for backend in ("triton", "torch"):
        p = torch.nn.Parameter(start.clone().to(DEVICE))
        both.append((p, optimizer([p], backend, storage, **{**options, **rate})))
    (_, kernel), (_, reference) = both
    differences = Differences()
    for content in contents:
        gradient: Tensor = CONTENTS[content](torch.randn(shape, generator=generator)).to(dtype).to(DEVICE)
        used = (gradient.abs() > 0) & (gradient.abs() <= 2.0**50)
        if 10 * used.sum() == gradient.numel():
            continue  # its activity is just what counts as background below: within rounding either answer is right
        synchronise(kernel, reference)
        for x, opt in both:
            x.grad = gradient.clone()
            opt.step()
        for x, opt in both:
            held = {"θ": x.detach(), **opt.state[x]}
            bad = [k for k, v in held.items() if isinstance(v, Tensor) and not torch.isfinite(v.float()).all()]
            assert not bad, (content, bad)
        differences.take(kernel, reference)
    return differences.violations(ONE_STEP)


@pytest.mark.kernels
@given(
    shape=SHAPES,
    dtype=some.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    storage=some.sampled_from(sorted(FORMS)),
    contents=some.lists(some.sampled_from(sorted(CONTENTS)), min_size=1, max_size=2),
    options=OPTIONS,
    found=some.booleans(),
)
@example((20, 32), torch.float32, "32bit", ["noise", "around 2^50"], {"percentile_clipping": 50}, False)
@example((20, 32), torch.float32, "8bit", ["half zeros", "noise"], {"cautious": False}, True)
@example((1, 250), torch.float32, "32bit", ["NaN among noise", "denormal"], {}, False)
@example((9, 4), torch.float32, "packed", ["noise"], {}, False)
@settings(
    max_examples=EXAMPLES or 12,
    deadline=None,
    derandomize=not EXAMPLES,
    suppress_health_check=list(HealthCheck),
)
def test_no_gradient_breaks_a_step(
    shape: tuple[int, ...], dtype: torch.dtype, storage: str, contents: list[str], options: dict[str, Any], found: bool
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of the interpreter
        assert not follows(shape, dtype, storage, contents, options, found)


@pytest.mark.kernels
def test_a_difference_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the reference with another constant."""
    from automagic_bnb import reference

    monkeypatch.setattr(reference, "MIN_CAUTIOUS_SHARE", 0.9)
    assert follows((20, 32), torch.float32, "32bit", ["noise"] * 3, {}, False)
