"""The choice of a profile by hardware: thresholds, spellings, devices that are not here, and the use of the result."""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from automagic_bnb import (
    Automagic8bit,
    AutomagicConfig,
    OptimizationProfiles,
    get_adaptive_config,
    get_hardware_optimized_config,
)

CHOICES = [get_adaptive_config, get_hardware_optimized_config]
GIB = 1024**3


def profile_of(config: AutomagicConfig) -> str:
    """The one profile that differs from this config in no more than `min_8bit_size`."""
    values = {**vars(config), "min_8bit_size": 4096}
    names = ("memory_optimized", "balanced", "quality_optimized")
    (name,) = [name for name in names if vars(getattr(OptimizationProfiles, name)()) == values]
    return name


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card sold as 8 GB and one sold as 24 GB, of which the second is current; figures that real ones report."""
    cards = [
        SimpleNamespace(name="GeForce RTX 2070", total_memory=int(7.79 * GIB), major=7, minor=5),
        SimpleNamespace(name="GeForce RTX 4090", total_memory=int(23.64 * GIB), major=8, minor=9),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.__getitem__)


# ---------------------------------------------------------------------------------------------------------- thresholds


@pytest.mark.parametrize(
    ("memory_gb", "profile"),
    [
        (1e-3, "memory_optimized"),
        (7.6, "memory_optimized"),  # what a card sold as 8 GB reports
        (math.nextafter(8, 0), "memory_optimized"),
        (8, "balanced"),
        (15.99, "balanced"),
        (16, "quality_optimized"),
        (1000, "quality_optimized"),
    ],
)
def test_the_profile_by_memory(memory_gb: float, profile: str) -> None:
    """A bound belongs to the larger profile; `min_8bit_size` stays the profile's."""
    config = get_adaptive_config(memory_gb=memory_gb)
    assert (profile_of(config), config.min_8bit_size) == (profile, 4096)


@pytest.mark.parametrize(
    ("memory_gb", "capability", "expected"),
    [
        (80, 6.1, ("memory_optimized", 2048)),
        (5.99, 9.0, ("memory_optimized", 2048)),
        (6, 7.0, ("balanced", 4096)),
        (11.99, 8.6, ("balanced", 4096)),
        (12, 7.0, ("quality_optimized", 8192)),
        (12, 6.9, ("memory_optimized", 2048)),
        (80, 10.0, ("quality_optimized", 8192)),  # as text "10.0" sorts before "7.0"
        (80, None, ("quality_optimized", 8192)),
    ],
)
def test_the_profile_by_memory_and_capability(memory_gb: float, capability: Any, expected: tuple[str, int]) -> None:
    """Old and small cards save memory; thresholds of size follow."""
    config = get_hardware_optimized_config(memory_gb=memory_gb, capability=capability)
    assert (profile_of(config), config.min_8bit_size) == expected


@given(a=some.floats(1e-3, 1e4), b=some.floats(1e-3, 1e4))
def test_more_memory_never_chooses_a_smaller_profile(a: float, b: float) -> None:
    """Over all sizes, for both choices."""
    rank = ["memory_optimized", "balanced", "quality_optimized"].index
    low, high = sorted((a, b))
    for choose in CHOICES:
        assert rank(profile_of(choose(memory_gb=low))) <= rank(profile_of(choose(memory_gb=high)))


def test_the_choice_is_that_of_the_guide() -> None:
    """Written out once more, literally."""

    def adaptive(gpu_memory: float) -> str:
        if gpu_memory < 8:
            return "memory_optimized"
        return "balanced" if gpu_memory < 16 else "quality_optimized"

    def by_hardware(gpu_memory: float, major: int) -> tuple[str, int]:
        if gpu_memory < 6 or major < 7:
            return "memory_optimized", 2048
        return ("balanced", 4096) if gpu_memory < 12 else ("quality_optimized", 8192)

    for tenths in range(1, 300):
        memory = tenths / 10
        assert profile_of(get_adaptive_config(memory_gb=memory)) == adaptive(memory)
        for major in range(3, 13):
            config = get_hardware_optimized_config(memory_gb=memory, capability=(major, 0))
            assert (profile_of(config), config.min_8bit_size) == by_hardware(memory, major)


@pytest.mark.parametrize("spelled", [7.5, "7.5", (7, 5), [7, 5], " 7.5 "])
def test_spellings_of_a_capability(spelled: Any) -> None:
    """A number, text, or a pair as torch.cuda.get_device_capability returns it."""
    for choose in CHOICES:
        assert choose(memory_gb=8, capability=spelled) == choose(memory_gb=8, capability=(7, 5))


def test_whole_capabilities_and_two_digits() -> None:
    """7 is 7.0; 12.0 is above 7.0 however it is written."""
    for spelled in (7, "7", 7.0, "12.0", 12, (12, 0)):
        assert get_hardware_optimized_config(memory_gb=80, capability=spelled).min_8bit_size == 8192
    for spelled in (6, "6.2", (6, 2), (3, 5)):
        assert get_hardware_optimized_config(memory_gb=80, capability=spelled).min_8bit_size == 2048


# ------------------------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize("choose", CHOICES)
@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu"), "mps"])
def test_without_a_gpu_no_moment_is_in_codes(choose: Any, device: Any, no_gpu: None, tools: Any) -> None:
    """The guide's number; what it means shows in the state."""
    config = choose(device)
    assert vars(config) == {**vars(OptimizationProfiles.memory_optimized()), "min_8bit_size": 99999999}
    p = tools.parameters((64, 128))
    opt = Automagic8bit(p, **config.__dict__)
    tools.train(opt, p, range(1))
    assert opt.state[p[0]]["state1"].dtype == torch.float16
    # The negative control: the profile as it is has codes.
    coded = Automagic8bit(p, **OptimizationProfiles.memory_optimized().__dict__)
    tools.train(coded, p, range(1))
    assert coded.state[p[0]]["state1"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("device", "profile"),
    [
        (0, "memory_optimized"),
        ("cuda:0", "memory_optimized"),
        (torch.device("cuda", 0), "memory_optimized"),
        (None, "quality_optimized"),
        ("cuda", "quality_optimized"),  # the current one
        (1, "quality_optimized"),
    ],
)
def test_a_device_is_asked(device: Any, profile: str, two_gpus: None) -> None:
    """By index or name; the current one by default. "8 GB" on the box is less than 8."""
    assert profile_of(get_adaptive_config(device)) == profile


def test_each_choice_has_bounds_of_its_own(two_gpus: None) -> None:
    """A card sold as 8 GB is below 8, but not below 6."""
    assert profile_of(get_adaptive_config(0)) == "memory_optimized"
    assert profile_of(get_hardware_optimized_config(0)) == "balanced"
    assert get_hardware_optimized_config("cuda:1").min_8bit_size == 8192


def test_numbers_stand_above_the_device(two_gpus: None) -> None:
    """For a GPU shared with others: the device supplies what was not given."""
    assert profile_of(get_adaptive_config(1, memory_gb=10)) == "balanced"
    assert get_hardware_optimized_config(1, capability=6.1).min_8bit_size == 2048
    assert get_hardware_optimized_config(capability=6.1).min_8bit_size == 2048


def test_a_plan_does_not_depend_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `memory_gb` and no device, nothing here is asked."""

    def fail(*_: Any) -> None:
        raise AssertionError("the machine was asked")

    for name in ("is_available", "current_device", "device_count", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, fail)
    for choose in CHOICES:
        assert profile_of(choose(memory_gb=10)) == "balanced"
    with pytest.raises(AssertionError):
        get_adaptive_config()


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("choose", CHOICES)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"memory_gb": -8}, ValueError, r"memory_gb=-8: must be a finite number above 0"),
        ({"memory_gb": 0}, ValueError, r"memory_gb=0:"),
        ({"memory_gb": float("nan")}, ValueError, r"memory_gb=nan:"),
        ({"memory_gb": float("inf")}, ValueError, r"memory_gb=inf:"),
        ({"memory_gb": "8 GB"}, TypeError, r"memory_gb='8 GB':"),
        ({"memory_gb": True}, TypeError, r"memory_gb=True:"),
        ({"memory_gb": [8]}, TypeError, r"memory_gb=\[8\]:"),
        ({"memory_gb": 8, "capability": -7.5}, ValueError, r"capability=-7\.5: must be a compute capability"),
        ({"memory_gb": 8, "capability": 7.55}, ValueError, r"capability=7\.55:"),
        ({"memory_gb": 8, "capability": "sm_75"}, ValueError, r"capability='sm_75':"),
        ({"memory_gb": 8, "capability": 86}, ValueError, r"capability=86: .*; for sm_86 write 8\.6"),
        ({"memory_gb": 8, "capability": (7,)}, ValueError, r"capability=\(7,\):"),
        ({"memory_gb": 8, "capability": (7, 5, 0)}, ValueError, r"capability=\(7, 5, 0\):"),
        ({"memory_gb": 8, "capability": float("nan")}, ValueError, r"capability=nan:"),
        ({"memory_gb": 8, "capability": True}, TypeError, r"capability=True:"),
        ({"memory_gb": 8, "capability": {}}, TypeError, r"capability=\{\}:"),
        ({"device": "gpu"}, ValueError, r"device='gpu': torch knows no such device"),
        ({"device": ""}, ValueError, r"device='':"),
        ({"device": True}, TypeError, r"device=True:"),
        ({"device": 0.0}, TypeError, r"device=0\.0:"),
        ({"device": 2}, ValueError, r"device=2: there are 2 CUDA devices"),
        ({"device": -1}, ValueError, r"device=-1: there are 2 CUDA devices"),
        ({"device": "cuda:7"}, ValueError, r"there are 2 CUDA devices"),
        ({"device": "cpu", "memory_gb": 8}, ValueError, r"device='cpu' is not one"),
    ],
)
def test_a_wrong_argument_is_named(choose: Any, options: Any, error: Any, message: str, two_gpus: None) -> None:
    """By name, value and what is legal."""
    with pytest.raises(error, match=message):
        choose(**options)


@pytest.mark.parametrize("choose", CHOICES)
def test_a_gpu_that_is_not_here(choose: Any, no_gpu: None) -> None:
    """The message says how to plan for one."""
    for device in ("cuda", "cuda:0", 0):
        with pytest.raises(ValueError, match="no CUDA device here; to plan for one, pass memory_gb alone"):
            choose(device)
    with pytest.raises(ValueError, match="there is none here; pass memory_gb too"):
        choose(capability=8.0)


# ----------------------------------------------------------------------------------------------------- use of a result


@pytest.mark.parametrize("choose", CHOICES)
@pytest.mark.parametrize("memory_gb", [4, 10, 24])
def test_a_config_may_be_edited_and_used(choose: Any, memory_gb: float, tools: Any) -> None:
    """`**config.__dict__`, as for any profile; a second call does not see the edit."""
    config = choose(memory_gb=memory_gb)
    config.force_8bit = True
    config.min_8bit_size = 1024
    config.lr = 1e-3
    p = tools.parameters((16, 16), (64, 64))
    opt = Automagic8bit(p, **config.__dict__)
    before = p[0].detach().clone()
    tools.train(opt, p, range(2))
    assert opt.config.min_8bit_size == 1024
    assert opt.state[p[0]]["state1"].dtype == torch.uint8
    assert not torch.equal(before, p[0])
    assert not choose(memory_gb=memory_gb).force_8bit


def test_the_quality_profile_is_block_wise_and_stricter() -> None:
    """The guide's numbers."""
    config = OptimizationProfiles.quality_optimized()
    assert (config.edge_penalty, config.frequency_penalty, config.rank_penalty_strength) == (0.15, 0.08, 0.02)
    assert config.block_wise
    assert not config.factored


@pytest.mark.parametrize("choose", CHOICES)
def test_the_guides_call_has_no_arguments(choose: Any) -> None:
    """Everything is optional; a typo is not swallowed."""
    inspect.signature(choose).bind()
    with pytest.raises(TypeError):
        choose(memory=8)
    assert isinstance(choose(), AutomagicConfig)
