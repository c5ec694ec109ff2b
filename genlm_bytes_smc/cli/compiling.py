"""Says on a terminal that code is compiled, which on a machine's first run takes a minute."""

from __future__ import annotations

from functools import cache
from typing import Any

from numba.core import event
from rich.console import Console

NOTICE = "compiling for this machine: about a minute, the first time only"


class _Notice(event.Listener):  # type: ignore[misc]
    """Prints `NOTICE` when the first function is compiled that no earlier run kept."""

    def __init__(self) -> None:
        self._told = False

    def on_start(self, event: Any) -> None:
        err = Console(stderr=True)
        if err.is_terminal and not self._told:
            err.print(NOTICE, style="dim")
        self._told = True

    def on_end(self, event: Any) -> None:
        """Nothing: the results follow."""


@cache
def announce_compilation() -> None:
    """Have the notice shown in this process, once, if anything is compiled."""
    event.register("numba:compile", _Notice())
