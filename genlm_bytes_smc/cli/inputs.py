"""From options to a loaded model, beam parameters and a prompt.

While code is compiled, which a first run has to wait for, a terminal shows a notice of it.
"""

from __future__ import annotations

import gc
import os
import secrets
import sys
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numba.core import event
from numba.core.caching import FunctionCache
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType

from genlm_bytes_smc import BeamParams, ByteBeamState, Prompt, RowTransform, load_model
from genlm_bytes_smc.beam.params import Pruning, default_params
from genlm_bytes_smc.beam.prompt import Spelled
from genlm_bytes_smc.cli.options import BeamOptions, ModelOptions
from genlm_bytes_smc.cli.output import CliError, UsageError, busy
from genlm_bytes_smc.lm.engine import RowEngine

if TYPE_CHECKING:
    from genlm_bytes_smc.constraints import ByteConstraint
    from genlm_bytes_smc.potential import ByteLLM

NOTICE = "compiling for this machine, the first time only"
UNKEPT = "compiling, as no cache directory can be written (NUMBA_CACHE_DIR names another)"


def open_model(options: ModelOptions) -> RowEngine:
    """Load the model that the options name.

    Raises:
        UsageError: a beam option out of range; said before the model is loaded.
    """
    if isinstance(options, BeamOptions):
        parameters(options, None, seed_of(options))
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
    params, transform = parameters(options, engine, seed_of(options))
    return ByteLLM(engine, params, transform=transform, model_eos=bool(params.eos))


def seed_of(options: BeamOptions) -> int:
    """Return the seed given, or a new one that can be given next time."""
    return secrets.randbelow(1 << 32) if options.seed is None else options.seed


def eos_spellings(llm: RowEngine) -> set[bytes]:
    """Return what the tokens that end a text spell: the tokenizer's, and those for generation."""
    return {llm.vocab[i] for i in llm.eos_ids}


def pruning_of(options: BeamOptions) -> Pruning:
    """Return how beams are pruned: as asked for, or as suits the command."""
    if options.prune is not None:
        return options.prune
    return "topk" if options.width is not None else options.usual_pruning


def parameters(
    options: BeamOptions, llm: RowEngine | None, seed: int
) -> tuple[BeamParams, RowTransform]:
    """Return beam parameters, with the model's ends of text if it is loaded, and row transform.

    Raises:
        UsageError: a value out of range.
    """
    prune = pruning_of(options)
    usual = default_params().prune_threshold if prune == "deferred" else 0.001
    try:
        params = BeamParams(
            K=5 if options.width is None else options.width,
            prune_threshold=usual if options.threshold is None else options.threshold,
            prune=prune,
            eos_byte_strings=set() if options.no_eos or llm is None else eos_spellings(llm),
            seed=seed,
        )
        return params, RowTransform(temperature=options.temperature)
    except ValueError as error:
        raise UsageError(f"--{error}".replace("prune_threshold", "threshold")) from None


async def new_beam(options: BeamOptions, llm: RowEngine, seed: int) -> ByteBeamState:
    """Return a beam that has read nothing."""
    params, transform = parameters(options, llm, seed)
    return await ByteBeamState.initial(llm, params, transform=transform)


def read_argument(text: str) -> bytes:
    """Return the bytes of an argument as they were typed; of stdin for `-`."""
    return sys.stdin.buffer.read() if text == "-" else os.fsencode(text)


def read_file(name: str) -> bytes:
    """Return the bytes of a file; of stdin for `-`.

    Raises:
        OSError: it cannot be read.
    """
    if name == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise OSError(f"cannot read {name}: {error.strerror or error}") from None


def as_prompt(options: BeamOptions, text: bytes, llm: Any) -> Prompt:
    """Return the prompt that the options make of some bytes.

    Raises:
        UsageError: special tokens are asked for in bytes that are no text.
    """
    if not options.special_tokens:
        return Prompt((Spelled(text, literal=True),) if text else ())
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
