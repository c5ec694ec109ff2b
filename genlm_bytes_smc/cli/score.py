"""What `score` does: the log probability of a whole file, read in stretches."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from genlm_bytes_smc import ByteLanes
from genlm_bytes_smc.beam.prefill import read_text
from genlm_bytes_smc.beam.prompt import Spelled
from genlm_bytes_smc.cli.inputs import as_prompt, new_beam, open_model, read_file, seed_of
from genlm_bytes_smc.cli.options import BeamOptions
from genlm_bytes_smc.cli.output import CliError, say, table, write_json

CHUNK = 256  # bytes read at a time; with more, `read_text` guesses too far ahead


@dataclass
class Score:
    """What reading a text found.

    Attributes:
        n_bytes: bytes counted.
        log_p: log of the text's prefix probability, nats.
        log_dropped: log of the mass that pruning dropped, nats, summed over stretches.
        heals: how often a beam was healed.
        stretches: beams used, one and one more each time the window was full.
        reread: bytes read again as context of a new stretch.
    """

    n_bytes: int = 0
    log_p: float = 0.0
    log_dropped: float = -math.inf
    heals: int = 0
    stretches: int = 1
    reread: int = 0

    @property
    def bits_per_byte(self) -> float:
        """Minus log2 of the probability, by the bytes."""
        return -self.log_p / math.log(2) / self.n_bytes


async def show_score(options: BeamOptions, file: str) -> None:
    """The command `score`."""
    text = read_file(file)
    if not text:
        raise CliError(f"nothing to score: {file} is empty")
    llm = open_model(options)
    begin = (await new_beam(options, llm, seed_of(options))).lanes
    prompt = as_prompt(options, text, begin.model)
    forwards, start = llm.counts.forwards, time.perf_counter()
    with _progress() as progress:
        task = progress.add_task("reading", total=len(text))
        reader = Reader(begin, lambda n: progress.advance(task, n))
        for segment in prompt.segments:
            if isinstance(segment, Spelled):
                await reader.read(segment.spelling)
            else:
                await reader.feed(segment.ids)
    score, seconds = reader.score(), time.perf_counter() - start
    facts = {
        "file": file,
        "bytes": score.n_bytes,
        "bits_per_byte": score.bits_per_byte,
        "log_p": score.log_p,
        "log_dropped": score.log_dropped,
        "heals": score.heals,
        "stretches": score.stretches,
        "bytes_reread": score.reread,
        "seconds": seconds,
        "bytes_per_second": score.n_bytes / seconds,
        "lm_forwards": llm.counts.forwards - forwards,
    }
    if options.json:
        write_json(facts)
        return
    say((f"{score.bits_per_byte:.4f} bits per byte", "bold"))
    table(
        [
            ("bytes", f"{score.n_bytes:,}"),
            ("log probability", f"{score.log_p:.3f} nats"),
            ("log dropped mass", f"{score.log_dropped:.3f} nats"),
            ("heals", f"{score.heals}"),
            ("stretches", f"{score.stretches} ({score.reread:,} bytes read again as context)"),
            ("time", f"{seconds:.2f} s, {score.n_bytes / seconds:,.0f} bytes/s"),
            ("forwards", f"{facts['lm_forwards']:,}"),
        ]
    )


def _progress() -> Progress:
    err = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("bytes"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)


class Reader:
    """Reads a text of any length with one lane, beginning anew when the window is full.

    The rule: a stretch of text is read only if it fits the window even if each of its bytes
    were a token. If not, a new lane begins after the start tokens and reads, uncounted, what
    the last half window of tokens of the best candidate spelled (less, should that not fit).

    Args:
        begin: one lane that has read nothing.
        advance: told how many bytes were read, as they are.
    """

    def __init__(self, begin: ByteLanes, advance: Callable[[int], object]) -> None:
        self._begin = begin
        self._advance = advance
        self._lanes: ByteLanes | None = None
        self._score = Score()
        window = begin.model.engine.window
        room = CHUNK if window is None else window - len(begin.model.engine.start)
        if room < 1:
            raise CliError(f"the model's window of {window} tokens has no room for a text")
        self._window = window
        self._chunk = min(CHUNK, max(1, room // 4))

    async def read(self, text: bytes) -> None:
        """Read and count bytes, spelled by tokens that are not special."""
        at = 0
        while at < len(text):
            chunk = text[at : at + _cut(text[at : at + self._chunk + 1], self._chunk)]
            lanes = await self._room_for(len(chunk))
            self._count(await read_text(lanes, chunk), len(chunk))
            at += len(chunk)
            await asyncio.sleep(0)  # an interrupt is heard here

    async def feed(self, tokens: tuple[int, ...]) -> None:
        """Read and count exactly these tokens."""
        lanes = await self._room_for(len(tokens))
        spelled = sum(len(lanes.model.vocab[t]) for t in tokens)
        self._count(await lanes.feed(tokens), spelled)

    def score(self) -> Score:
        """What was found."""
        if self._lanes is not None:
            self._settle(self._lanes)
            self._lanes = None
        return self._score

    async def _room_for(self, n: int) -> ByteLanes:
        """The lane, or a new one if `n` more tokens might not fit."""
        if self._lanes is None:
            self._lanes = await self._begin.as_prompt(literal=True)
        elif self._window is not None and _depth(self._lanes) + n > self._window:
            self._settle(self._lanes)
            self._score.stretches += 1
            self._lanes = await self._restart(self._lanes, n)
        return self._lanes

    async def _restart(self, full: ByteLanes, n: int) -> ByteLanes:
        tokens = _best(full)
        assert self._window is not None
        keep = self._window // 2
        while True:
            lanes = await self._begin.as_prompt(literal=True)
            context = b"".join(tokens[len(tokens) - keep :] if keep else [])
            for at in range(0, len(context), self._chunk):
                chunk = context[at : at + self._chunk]
                if _depth(lanes) + len(chunk) > self._window:
                    break
                lanes = await read_text(lanes, chunk)
            else:
                if _depth(lanes) + n <= self._window and lanes.log_z[0] > -np.inf:
                    self._score.reread += len(context)
                    # What it read so far does not count, nor what was dropped on the way.
                    self._score.log_p -= float(lanes.log_z[0])
                    return lanes
            keep //= 2

    def _count(self, lanes: ByteLanes, n: int) -> None:
        if lanes.log_z[0] == -np.inf:
            first = self._score.n_bytes
            raise CliError(
                f"no candidate could read past some byte between {first} and {first + n}; try a "
                "wider beam or a lower --threshold"
            )
        self._lanes = lanes
        self._score.n_bytes += n
        self._advance(n)

    def _settle(self, lanes: ByteLanes) -> None:
        score = self._score
        score.log_p += float(lanes.log_z[0])
        score.log_dropped = float(np.logaddexp(score.log_dropped, lanes.log_dropped[0]))
        score.heals += int(lanes.heals[0])


def _cut(text: bytes, most: int) -> int:
    """Where to end a stretch of at most `most` bytes: before a space if there is one late."""
    if len(text) <= most:
        return len(text)
    space = max(text.rfind(b" ", most // 2, most), text.rfind(b"\n", most // 2, most))
    if space > 0:
        return space
    end = most
    while end > max(1, most - 3) and 0x80 <= text[end] < 0xC0:  # inside a UTF-8 character
        end -= 1
    return end


def _first(lanes: ByteLanes) -> tuple[int, bytes]:
    """Context and partial token of the best candidate."""
    kernels = lanes.model.kernels
    best = int(np.argmax(np.asarray(lanes.state.logw[0].tolist())))
    node = int(kernels.nodes(lanes.state)[0, best])
    return int(kernels.contexts(lanes.state)[0, best]), lanes.model.trie.spell(max(node, 0))


def _best(lanes: ByteLanes) -> list[bytes]:
    """What the best candidate's tokens spell, the start tokens left out, the partial one last."""
    context, partial = _first(lanes)
    tokens = lanes.model.engine.tree.tokens(context)[len(lanes.model.engine.start) :]
    return [*(lanes.model.vocab[t] for t in tokens), partial]


def _depth(lanes: ByteLanes) -> int:
    """Tokens of the longest context."""
    contexts = lanes.model.kernels.contexts(lanes.state)
    return int(lanes.model.engine.tree.depth[contexts[contexts >= 0]].max(initial=0))
