"""A plugin for axolotl: `plugins: [automagic_bnb.trainers.axolotl.AutomagicPlugin]` trains with Automagic8bit.

The optimizer's options stand under `automagic:` in axolotl's config. Needs axolotl.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin  # type: ignore[import-not-found]
from pydantic import BaseModel

from automagic_bnb import config
from automagic_bnb.optimizer import Automagic8bit
from automagic_bnb.trainers.replacing import mark_lora


class AutomagicArgs(BaseModel):
    """What the plugin adds to axolotl's config."""

    automagic: dict[str, Any] | None = None
    """Options of Automagic8bit. With `auto_lr: true` the rate is found, and `learning_rate` is not heeded."""


class AutomagicPlugin(BasePlugin):
    """Has axolotl's trainer make Automagic8bit, in place of what `optimizer` says; LoRA is told by names."""

    def get_input_args(self) -> str:
        return f"{__name__}.{AutomagicArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """The trainer makes its optimizer later, from this class and these options.

        Raises:
            TypeError, ValueError: an unknown option, or an illegal value.
        """
        options = dict(cfg.automagic or {})
        if "lr" not in options and not options.get("auto_lr"):
            options["lr"] = cfg.learning_rate
        config.make_config(**options)
        options.setdefault("lr", None)  # axolotl looks it up
        mark_lora(trainer.model.named_parameters())
        trainer.optimizer_cls_and_kwargs = (Automagic8bit, options)
