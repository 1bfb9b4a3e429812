"""Automagic8bit: a bitsandbytes plugin optimizer that finds its own learning rates.

A name is imported when it is first used, so that what needs neither torch nor bitsandbytes, such as
`automagic-bnb --help`, does not wait for them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from automagic_bnb.bnb import BITSANDBYTES_AVAILABLE
    from automagic_bnb.config import AutomagicConfig, OptimizationProfiles
    from automagic_bnb.files import load_checkpoint, save_checkpoint
    from automagic_bnb.hardware import get_adaptive_config, get_hardware_optimized_config
    from automagic_bnb.migrated_options import migrate_options
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
    from automagic_bnb.progressive import ProgressiveQuantization
    from automagic_bnb.run_log import RunLog, read_run
    from automagic_bnb.watch.callbacks import TensorBoardLogger, lightning_callback, trainer_callback, training_metrics
    from automagic_bnb.watch.dashboard import write_dashboard
    from automagic_bnb.watch.memory_summary import analyze_memory_usage
    from automagic_bnb.watch.monitoring import AdaptiveTrainingMonitor, check_training_health
    from automagic_bnb.watch.plots import plot_singular_values, plot_spectrum, plot_training
    from automagic_bnb.watch.singular import effective_rank, singular_values, stable_rank
    from automagic_bnb.watch.spectrum import Spectrum, spectrum
    from automagic_bnb.watch.timing import BenchmarkResult, benchmark_optimizer

__version__ = "0.3.0.dev0"

__all__ = [
    "BITSANDBYTES_AVAILABLE",
    "AdaptiveTrainingMonitor",
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
    "ProgressiveQuantization",
    "RunLog",
    "Spectrum",
    "TensorBoardLogger",
    "analyze_memory_usage",
    "benchmark_optimizer",
    "check_training_health",
    "create_improved_8bit_optimizer",
    "effective_rank",
    "get_adaptive_config",
    "get_hardware_optimized_config",
    "lightning_callback",
    "load_checkpoint",
    "migrate_options",
    "plot_singular_values",
    "plot_spectrum",
    "plot_training",
    "read_run",
    "save_checkpoint",
    "singular_values",
    "spectrum",
    "stable_rank",
    "trainer_callback",
    "training_metrics",
    "write_dashboard",
]

_EXPORTS = {
    "bnb": ("BITSANDBYTES_AVAILABLE",),
    "config": (
        "AutomagicConfig",
        "OptimizationProfiles",
    ),
    "files": (
        "load_checkpoint",
        "save_checkpoint",
    ),
    "hardware": (
        "get_adaptive_config",
        "get_hardware_optimized_config",
    ),
    "migrated_options": ("migrate_options",),
    "optimizer": (
        "Automagic",
        "Automagic8bit",
        "Automagic32bit",
        "Automagic_CameAMP_8Bit",
        "Automagic_CameAMP_Improved_8Bit",
        "PagedAutomagic8bit",
        "PagedAutomagic32bit",
        "create_improved_8bit_optimizer",
    ),
    "progressive": ("ProgressiveQuantization",),
    "watch.callbacks": (
        "TensorBoardLogger",
        "lightning_callback",
        "trainer_callback",
        "training_metrics",
    ),
    "watch.dashboard": ("write_dashboard",),
    "watch.memory_summary": ("analyze_memory_usage",),
    "watch.monitoring": (
        "AdaptiveTrainingMonitor",
        "check_training_health",
    ),
    "watch.plots": (
        "plot_singular_values",
        "plot_spectrum",
        "plot_training",
    ),
    "run_log": (
        "RunLog",
        "read_run",
    ),
    "watch.singular": (
        "effective_rank",
        "singular_values",
        "stable_rank",
    ),
    "watch.spectrum": (
        "Spectrum",
        "spectrum",
    ),
    "watch.timing": (
        "BenchmarkResult",
        "benchmark_optimizer",
    ),
}
"""By module, the public names that it holds."""
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name's module, the first time that the name is asked for."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
