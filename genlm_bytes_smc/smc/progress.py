"""A bar on stderr while particles run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from rich import progress as bars
from rich.console import Console
from rich.errors import LiveError

from genlm_bytes_smc.smc.state import StepInfo

Show = Callable[[StepInfo], object]
Progress = bool | Show | None

_EVERY = 0.1  # seconds between two drawings


@contextmanager
def open_progress(progress: Progress, max_bytes: int) -> Iterator[Show]:
    """What to call after each step, while the block lasts.

    Args:
        progress: True for a bar on stderr, False for none, None for one if stderr is a
            terminal; or the function to call.
        max_bytes: length of the bar.

    Raises:
        TypeError: anything else.
    """
    if progress is None:
        progress = sys.stderr.isatty()
    if not isinstance(progress, bool):
        if not callable(progress):
            raise TypeError(f"progress must be None, a bool or a function, got {progress!r}")
        yield progress
    elif progress:
        with _bar(max_bytes) as show:
            yield show
    else:
        yield lambda info: None


@contextmanager
def _bar(max_bytes: int) -> Iterator[Show]:
    console = Console(stderr=True)
    if console.is_jupyter and find_spec("ipywidgets") is None:
        # in a notebook rich draws by ipywidgets or not at all: let it write to stderr, then
        console = Console(stderr=True, force_jupyter=False)
    bar = bars.Progress(
        bars.TextColumn("byte"),
        bars.MofNCompleteColumn(),
        bars.BarColumn(bar_width=20),
        bars.TextColumn("{task.description}"),
        bars.TimeElapsedColumn(),
        console=console,
        auto_refresh=False,  # no thread: drawn from `show`
        transient=console.is_terminal,  # where it cannot be redrawn, its last line stays
    )
    task = bar.add_task("", total=max_bytes)
    began, drawn, read = time.perf_counter(), 0.0, 0

    def show(info: StepInfo) -> None:
        nonlocal drawn, read
        read += info.active
        now = time.perf_counter()
        if now - drawn < _EVERY and info.active:
            return
        drawn = now
        bar.update(
            task,
            completed=min(info.step + 1, max_bytes),
            description=f"{info.active} reading, {info.ended} ended, {info.dead} dead · "
            f"ESS {info.ess:.1f} · log ML {info.log_ml:.2f} · "
            f"{read / max(now - began, 1e-9):,.0f} bytes/s",
            refresh=True,
        )

    try:
        bar.start()
    except LiveError:  # another bar has the terminal
        yield lambda info: None
        return
    try:
        yield show
    finally:
        bar.stop()
