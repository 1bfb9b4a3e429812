"""For ai-toolkit: `optimizer: automagic` trains with Automagic8bit.

A file in ai-toolkit's `extensions/` brings it in, of one line:

    from automagic_bnb.trainers.ai_toolkit import AI_TOOLKIT_EXTENSIONS
"""

from __future__ import annotations

import importlib
from typing import Any

from automagic_bnb.optimizer import Automagic8bit
from automagic_bnb.trainers.replacing import with_options

MODULE = "toolkit.optimizers.automagic"
"""From which ai-toolkit imports `Automagic` whenever it makes one."""


def enter() -> None:
    """Put ours in the place of ai-toolkit's own Automagic; `optimizer_params` are then our options.

    Raises:
        ImportError: this is not ai-toolkit's process.
    """
    module: Any = importlib.import_module(MODULE)
    module.Automagic = with_options(Automagic8bit, {})


AI_TOOLKIT_EXTENSIONS: list[type] = []
"""What ai-toolkit looks for in a file of `extensions/`; ours adds no process."""

enter()
