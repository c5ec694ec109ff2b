"""What commands share: from options to a model, a beam and a prompt; output on stdout and stderr.

While code is compiled, which a first run has to wait for, a terminal shows a notice of it.
"""

from __future__ import annotations

import base64
import codecs
import gc
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numba.core import event
from numba.core.caching import FunctionCache
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.status import Status
from rich.text import Text

from genlm_bytes_smc import BeamParams, ByteBeamState, Prompt, RowTransform, load_model
from genlm_bytes_smc.beam.params import default_params
from genlm_bytes_smc.cli.options import (
    BeamOptions,
    CliError,
    ModelOptions,
    UsageError,
)
from genlm_bytes_smc.html import printable
from genlm_bytes_smc.lm.engine import RowEngine

if TYPE_CHECKING:
    from genlm_bytes_smc.constraints import ByteConstraint
    from genlm_bytes_smc.potential import ByteLLM

NOTICE = "compiling for this machine, the first time only"
UNKEPT = "compiling, as no cache directory can be written (NUMBA_CACHE_DIR names another)"
BAR_WIDTH = 30
_EIGHTHS = " ▏▎▍▌▋▊▉█"


# -- from options to a model, a beam and a prompt ---------------------------------------------


def open_model(options: ModelOptions) -> RowEngine:
    """Load the model that the options name.

    Raises:
        UsageError: a beam option out of range; said before the model is loaded.
    """
    if isinstance(options, BeamOptions):
        parameters(options, None)
    announce_compilation()
    with busy(f"loading {options.model}"):
        opts = {"trust_remote_code": True} if options.trust_remote_code else None
        llm = load_model(options.model, options.backend, device=options.device, engine_opts=opts)
    gc.enable()
    return llm


def open_llm(options: BeamOptions) -> ByteLLM:
    """Load the model and return it as a potential over bytes, without a prompt."""
    from genlm_bytes_smc.potential import ByteLLM  # not needed for a beam

    engine = open_model(options)
    params, transform = parameters(options, engine)
    return ByteLLM(engine, params, transform=transform, model_eos=bool(params.eos))


def eos_spellings(llm: RowEngine) -> set[bytes]:
    """Return what the tokens that end a text spell: the tokenizer's, and those for generation."""
    return {llm.vocab[i] for i in llm.eos_ids}


def parameters(options: BeamOptions, llm: RowEngine | None) -> tuple[BeamParams, RowTransform]:
    """Return beam parameters, with the model's ends of text if it is loaded, and row transform.

    Raises:
        UsageError: a value out of range.
    """
    usual = default_params().prune_threshold if options.pruning == "deferred" else 0.001
    try:
        params = BeamParams(
            K=5 if options.width is None else options.width,
            prune_threshold=usual if options.threshold is None else options.threshold,
            prune=options.pruning,
            eos_byte_strings=set() if options.no_eos or llm is None else eos_spellings(llm),
            seed=options.seed,
        )
        return params, RowTransform(temperature=options.temperature)
    except ValueError as error:
        raise UsageError(f"--{error}".replace("prune_threshold", "threshold")) from None


async def new_beam(options: BeamOptions, llm: RowEngine) -> ByteBeamState:
    """Return a beam that has read nothing."""
    params, transform = parameters(options, llm)
    return await ByteBeamState.initial(llm, params, transform=transform)


def read_argument(text: str) -> bytes:
    """Return the bytes of an argument as they were typed; of stdin for `-`."""
    return sys.stdin.buffer.read() if text == "-" else os.fsencode(text)


def read_file(name: str) -> bytes:
    """Return the bytes of a file; of stdin for `-`.

    Raises:
        OSError: it cannot be read.
    """
    try:
        return sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise OSError(f"cannot read {name}: {error.strerror or error}") from None


def as_prompt(options: BeamOptions, text: bytes, llm: Any) -> Prompt:
    """Return the prompt that the options make of some bytes.

    Raises:
        UsageError: special tokens are asked for in bytes that are no text.
    """
    if not options.special_tokens:
        return Prompt.from_bytes(text, literal=True)
    try:
        return Prompt.text(text.decode("utf-8"), special_tokens=True, model=llm)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--special-tokens needs UTF-8 text; the byte at {error.start} is not"
        ) from None


def source_text(option: str, source: str) -> str:
    """Return the text of a constraint: the expression itself, or what its file holds.

    Raises:
        CliError: the file is no UTF-8.
    """
    if option == "--regex":
        return source
    try:
        return read_file(source).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CliError(f"{option} {source}: {error}") from None


def constraint_of(option: str, source: str) -> ByteConstraint:
    """Return the constraint of --regex, --grammar or --json-schema.

    Raises:
        UsageError: the expression is none, or one that is not supported.
        CliError: the file is no grammar or schema, or one that is not supported.
    """
    from genlm_bytes_smc import constraints  # not needed for a beam

    kinds = {"--regex": constraints.ByteRegex, "--grammar": constraints.ByteGrammar}
    try:
        kind: Any = kinds.get(option, constraints.ByteJsonSchema)
        made: ByteConstraint = kind(source_text(option, source))
        return made
    except constraints.ConstraintError as error:
        if option == "--regex":
            raise UsageError(f"{option} {source!r}: {error}") from None
        raise CliError(f"{option} {source}: {error}") from None


# -- output -----------------------------------------------------------------------------------


def console() -> Console:
    """Return standard output: colours on a terminal, plain text in a pipe, no line broken."""
    return Console(soft_wrap=True, highlight=False)


def say(*parts: str | tuple[str, str] | Text) -> None:
    """Print one line of parts, each a string or a (string, style) pair."""
    console().print(Text.assemble(*parts))


def table(rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        say((f"{name:<{width}}", "dim"), "  ", value)


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
    whole, rest = divmod(round(8 * BAR_WIDTH * min(max(share, 0.0), 1.0)), 8)
    return "█" * whole + (_EIGHTHS[rest] if rest else "")


def as_text(spelling: bytes) -> str:
    """Return bytes as text, with a mark for what is no UTF-8."""
    return spelling.decode("utf-8", errors="replace")


def both_ways(name: str, spelling: bytes) -> dict[str, str]:
    """Return bytes as JSON has them: as text under a name, and exactly, in base64."""
    return {name: as_text(spelling), f"{name}_base64": base64.b64encode(spelling).decode()}


def visible(text: str) -> str:
    """Return text whose control characters, but for newline and tab, stand as escapes."""
    return "".join(c if c in "\n\t" else printable(c) for c in text)


def write_file(path: str | Path, text: str) -> None:
    """Write a file, whole or not at all.

    Raises:
        CliError: it cannot be written.
    """
    from genlm_bytes_smc.smc import files  # not needed for a beam

    try:
        files.write(path, text)
    except OSError as error:
        raise CliError(f"cannot write {path}: {error.strerror or error}") from None


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


# -- notices ----------------------------------------------------------------------------------


def _stderr() -> Console:
    return Console(stderr=True, soft_wrap=True, highlight=False)


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Show on a terminal's stderr that something takes its time, and what the library tells."""
    err = _stderr()
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
    notice = _Notice(_stderr())
    event.register("numba:compile", notice)
    return notice
