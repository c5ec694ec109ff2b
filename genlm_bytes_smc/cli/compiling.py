"""A notice on a terminal that code is being compiled, which a first run has to wait for."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

from numba.core import event
from numba.core.caching import FunctionCache
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType

NOTICE = "compiling for this machine, the first time only"
UNKEPT = "compiling, as no cache directory can be written (NUMBA_CACHE_DIR names another)"


class _Notice(event.Listener):  # type: ignore[misc]
    """A line that counts functions and seconds while numba compiles, and then goes away.

    Args:
        out: the terminal; nothing is written if it is none.
    """

    def __init__(self, out: Console) -> None:
        self._out = out
        self._functions = self._depth = 0
        self._seconds = self._began = 0.0
        self._notice = NOTICE
        self.hushed = False  # whether the line belongs to something else by now

    def on_start(self, event: Any) -> None:
        """Count a function; those that it calls come while it is compiled."""
        if self._depth == 0:
            self._began = time.perf_counter()
            kept = isinstance(event.data["dispatcher"]._cache, FunctionCache)
            self._notice = NOTICE if kept else UNKEPT
        self._depth += 1
        self._functions += 1
        seconds = self._seconds + time.perf_counter() - self._began
        self._show(f"{self._notice}: {self._functions} functions, {seconds:.0f} s")

    def on_end(self, event: Any) -> None:
        """Take the line away when nothing is compiled any more."""
        self._depth -= 1
        if self._depth == 0:
            self._seconds += time.perf_counter() - self._began
            self._show("")

    def _show(self, text: str) -> None:
        if self._out.is_terminal and not self.hushed:
            self._out.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))
            self._out.print(text[: self._out.width - 1], style="dim", end="")


@cache
def announce_compilation() -> _Notice:
    """Show the notice in this process if anything is compiled."""
    notice = _Notice(Console(stderr=True, soft_wrap=True, highlight=False))
    event.register("numba:compile", notice)
    return notice
