"""Automagic8bit: a bitsandbytes plugin optimizer that finds its own learning rates."""

from automagic_bnb.bnb import BITSANDBYTES_AVAILABLE
from automagic_bnb.config import AutomagicConfig, OptimizationProfiles
from automagic_bnb.hardware import get_adaptive_config, get_hardware_optimized_config
from automagic_bnb.optimizer import (
    Automagic,
    Automagic8bit,
    Automagic32bit,
    Automagic_CameAMP_8Bit,
    Automagic_CameAMP_Improved_8Bit,
    PagedAutomagic8bit,
    PagedAutomagic32bit,
    create_improved_8bit_optimizer,
)
from automagic_bnb.timing import BenchmarkResult, benchmark_optimizer

__version__ = "0.1.0"

__all__ = [
    "BITSANDBYTES_AVAILABLE",
    "Automagic",
    "Automagic8bit",
    "Automagic32bit",
    "AutomagicConfig",
    "Automagic_CameAMP_8Bit",
    "Automagic_CameAMP_Improved_8Bit",
    "BenchmarkResult",
    "OptimizationProfiles",
    "PagedAutomagic8bit",
    "PagedAutomagic32bit",
    "benchmark_optimizer",
    "create_improved_8bit_optimizer",
    "get_adaptive_config",
    "get_hardware_optimized_config",
]
