"""When a step begins, of parameters that are stepped one at a time (as gradients arrive, or layer by layer)."""

from __future__ import annotations

from typing import Any


class OneByOne:
    """Which parameters the step under way has taken: it ends when one of them comes for the second time.

    Any of them: the first may have stopped training. Told by the tensor itself, as `set` compares tensors.
    """

    def __init__(self) -> None:
        self._taken: set[Any] = set()

    def takes(self, p: Any) -> bool:
        """Note a parameter that is about to be stepped; whether a step begins with it."""
        begins = not self._taken or p in self._taken
        if begins:
            self._taken = {p}
        else:
            self._taken.add(p)
        return begins

    def end(self) -> None:
        """Whatever comes next begins a step."""
        self._taken.clear()
