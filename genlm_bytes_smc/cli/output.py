"""Output of commands: lines, colours and bars on stdout, notices on stderr."""

from __future__ import annotations

import base64
import codecs
import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.text import Text

BAR_WIDTH = 30
_EIGHTHS = " ▏▎▍▌▋▊▉█"


class CliError(Exception):
    """Something the user is told in one line."""


class UsageError(CliError):
    """The same, about an option."""


def console() -> Console:
    """Return standard output: colours on a terminal, plain text in a pipe, no line broken."""
    return Console(soft_wrap=True, highlight=False)


def say(*parts: str | tuple[str, str] | Text) -> None:
    """Print one line of parts, each a string or a (string, style) pair."""
    console().print(Text.assemble(*parts))


def write_json(value: Any) -> None:
    """Print one JSON document; infinities and NaN become null."""
    sys.stdout.write(json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def bar(share: float) -> str:
    """Return a bar of `BAR_WIDTH` characters for 1."""
    eighths = round(8 * BAR_WIDTH * min(max(share, 0.0), 1.0))
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (_EIGHTHS[rest] if rest else "")


def as_text(spelling: bytes) -> str:
    """Return bytes as text, with a mark for what is no UTF-8."""
    return spelling.decode("utf-8", errors="replace")


def both_ways(name: str, spelling: bytes) -> dict[str, str]:
    """Return bytes as JSON has them: as text under a name, and exactly, in base64."""
    return {name: as_text(spelling), f"{name}_base64": base64.b64encode(spelling).decode()}


def visible(text: str) -> str:
    """Return text whose control characters, but for newline and tab, stand as escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def write_file(path: str | Path, text: str) -> None:
    """Write a file, whole or not at all.

    Raises:
        CliError: it cannot be written.
    """
    from genlm_bytes_smc.smc import files  # not needed for a help page

    try:
        files.write(path, text)
    except OSError as error:
        raise CliError(f"cannot write {path}: {error.strerror or error}") from None


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Show on a terminal's stderr that something takes its time, and what the library tells."""
    err = Console(stderr=True, soft_wrap=True, highlight=False)
    status = err.status(what) if err.is_terminal else None
    notes, library = _Notes(err, status), logging.getLogger("genlm_bytes_smc")
    level = library.level
    library.addHandler(notes)
    library.setLevel(logging.INFO)
    try:
        with status or nullcontext():
            yield
    finally:
        library.removeHandler(notes)
        library.setLevel(level)


class _Notes(logging.Handler):
    """Prints a line for each thing told, in place of the spinner: a bar may come next."""

    def __init__(self, err: Console, status: Status | None) -> None:
        super().__init__()
        self._err, self._status = err, status

    def emit(self, record: logging.LogRecord) -> None:
        """Print it."""
        if self._status:
            self._status.stop()
        self._err.print(record.getMessage(), style="dim", markup=False)


def table(rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        say((f"{name:<{width}}", "dim"), "  ", value)


class ByteStream:
    """Writes bytes to stdout as they come.

    In a pipe they go out as they are. On a terminal a character is written when it is whole,
    so that half of one never reaches the screen.
    """

    def __init__(self) -> None:
        self._console = console()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def write(self, data: bytes, style: str = "") -> None:
        """Write what can be written of `data` and what is still held back."""
        if self._console.is_terminal:
            self._show(self._decoder.decode(data), style)
        else:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()

    def finish(self) -> None:
        """Write what was held back, and on a terminal end the line."""
        if self._console.is_terminal:
            self._show(self._decoder.decode(b"", final=True) + "\n", "")

    def _show(self, text: str, style: str) -> None:
        if text:
            self._console.print(Text(visible(text), style), end="")
            sys.stdout.flush()
