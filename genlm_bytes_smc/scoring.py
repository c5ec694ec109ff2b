"""Log probability of texts of any length, also of one that is longer than the model's window."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from genlm_bytes_smc.beam.known_text import read_paths, read_text
from genlm_bytes_smc.beam.lanes import ByteLanes
from genlm_bytes_smc.beam.prompt import Prompt, Spelled
from genlm_bytes_smc.beam.single import ByteBeamState, lanes_for
from genlm_bytes_smc.beam.state import FloatArray

if TYPE_CHECKING:  # the score of one text needs nothing of genlm-control
    from genlm_bytes_smc.potential import ByteLLM


CHUNK = 256  # bytes read at a time; with more, `read_text` guesses too far ahead
DEFERRED_CHUNK = 4096  # the same with `prune="deferred"`, which reads a text as a whole
LANES = 32  # texts that are read side by side
CUTS = 4  # ways to cut a text into tokens that are kept


class ScoreError(ValueError):
    """A text cannot be read to its end."""


@dataclass
class Score:
    """Log probability of a text, and the work that it took.

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
        """Minus log2 of the probability, divided by the bytes."""
        return -self.log_p / math.log(2) / self.n_bytes


async def score(
    beam: ByteBeamState,
    text: Prompt | bytes,
    advance: Callable[[int], object] = lambda n: None,
) -> Score:
    """Return the log prefix probability of a text: what follows it does not count.

    A text longer than the model's window is read in stretches: when the window is nearly full,
    a new beam begins at the model's start tokens with the last half window of text, which it
    reads without counting it, and goes on from there.

    Args:
        beam: one that has read nothing, as of `ByteBeamState.initial`.
        text: special tokens only where a `Prompt` names them.
        advance: told how many bytes were read, as they are.

    Raises:
        ScoreError: no candidate of the beam could read on, or the window is too short.
    """
    reader = Reader(beam.lanes, advance)
    for segment in Prompt.of(text).segments:
        if isinstance(segment, Spelled):
            await reader.read(segment.spelling)
        else:
            await reader.feed(segment.ids)
    return reader.score()


class Reader:
    """A reader of texts of any length with one lane, which begins anew when the window is full.

    The rule: a stretch of text is read only if it fits the window even if each of its bytes
    were a token. If not, a new lane begins after the start tokens and reads, uncounted, what
    the last half window of tokens of the best candidate spelled (less, should that not fit).

    Args:
        begin: one lane that has read nothing.
        advance: told how many bytes were read, as they are.
        first: a lane to begin with, after a prompt that is not counted; None: `begin`.
        steps: a list to which the log probability of each byte that `read` counts is appended,
            given those before it, nats.
    """

    def __init__(
        self,
        begin: ByteLanes,
        advance: Callable[[int], object] = lambda n: None,
        first: ByteLanes | None = None,
        steps: list[float] | None = None,
    ) -> None:
        self._begin = begin
        self._advance = advance
        self._lanes: ByteLanes | None = first
        self._steps = steps
        self._score = Score(log_p=0.0 if first is None else -float(first.log_z[0]))
        window = begin.model.engine.window
        most = DEFERRED_CHUNK if begin.params.prune == "deferred" else CHUNK
        room = 4 * most if window is None else window - len(begin.model.engine.start)
        if room < 1:
            raise ScoreError(f"the model's window of {window} tokens has no room for a text")
        self._window = window
        self._chunk = min(most, max(1, room // 4))

    async def read(self, text: bytes) -> None:
        """Read and count bytes, spelled by tokens that are not special."""
        at = 0
        while at < len(text):
            chunk = text[at : at + _cut(text[at : at + self._chunk + 1], self._chunk)]
            lanes = await self._room_for(len(chunk))
            if self._steps is None:
                self._count(await read_text(lanes, chunk), len(chunk))
            else:
                after, (path,) = await read_paths(lanes, [chunk])
                self._steps += np.diff(path, prepend=lanes.log_z[0]).tolist()
                self._count(after, len(chunk))
            at += len(chunk)
            await asyncio.sleep(0)  # an interrupt is heard here

    async def feed(self, tokens: tuple[int, ...]) -> None:
        """Read and count exactly these tokens."""
        lanes = await self._room_for(len(tokens))
        vocab = lanes.model.vocab
        vocab.check(tokens)
        self._count(await lanes.feed(tokens), sum(len(vocab[t]) for t in tokens))

    def score(self) -> Score:
        """Return what was found."""
        if self._lanes is not None:
            self._settle(self._lanes)
            self._lanes = None
        return self._score

    async def _room_for(self, n: int) -> ByteLanes:
        """Return the lane, or a new one if `n` more tokens might not fit."""
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
            raise ScoreError(
                f"no candidate could read past some byte between {first} and {first + n}; try a "
                "wider beam or a lower threshold"
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
    """Return where to end a stretch of at most `most` bytes: before a late space, if any."""
    if len(text) <= most:
        return len(text)
    space = max(text.rfind(b" ", most // 2, most), text.rfind(b"\n", most // 2, most))
    if space > 0:
        return space
    end = most
    while end > max(1, most - 3) and 0x80 <= text[end] < 0xC0:  # inside a UTF-8 character
        end -= 1
    return end


def _best(lanes: ByteLanes) -> list[bytes]:
    """Return what the best candidate's tokens spell: no start tokens, the partial one last."""
    model = lanes.model
    best = int(np.argmax(np.asarray(lanes.state.logw[0].tolist())))
    node = int(lanes.state.nodes[0, best])
    context = int(lanes.state.ctx[0, best])
    tokens = model.engine.tree.tokens(context)[len(model.engine.start) :]
    return [*(model.vocab[t] for t in tokens), model.trie.spell(max(node, 0))]


def _depth(lanes: ByteLanes) -> int:
    """Return the tokens of the longest context."""
    contexts = lanes.state.ctx
    return int(lanes.model.engine.tree.depth[contexts[contexts >= 0]].max(initial=0))


# -- many texts, byte by byte ----------------------------------------------------------------


class Cut(NamedTuple):
    """A way to cut a text into tokens, which a candidate of the beam used.

    Attributes:
        share: of the beam's weight after the text, in [0, 1].
        ends: where tokens end inside the text, in bytes, increasing; 0 if one ends where the text
            begins. The last token goes on beyond the text or ends with it.
    """

    share: float
    ends: tuple[int, ...]


async def bytewise(
    llm: ByteLLM, texts: Sequence[bytes], advance: Callable[[int], object]
) -> list[tuple[FloatArray, tuple[Cut, ...]]]:
    """Return the surprisal of each byte of each text, nats, and how each may be cut."""
    root = await (await llm.lanes(1)).as_prompt(literal=True)
    engine = llm.model.engine
    depth = len(engine.start) + len(llm.prompt_bytes)
    room = DEFERRED_CHUNK if engine.window is None else engine.window - depth
    out: list[tuple[FloatArray, tuple[Cut, ...]]] = [(np.empty(0), ())] * len(texts)
    fits = sorted((i for i, t in enumerate(texts) if len(t) <= room), key=lambda i: len(texts[i]))
    for at in range(0, len(fits), LANES):
        batch = fits[at : at + LANES]
        lanes = root.gather([0] * len(batch))
        after, paths = await read_paths(lanes, [texts[i] for i in batch])
        for lane, (i, path) in enumerate(zip(batch, paths, strict=True)):
            out[i] = _steps(path, float(root.log_z[0])), cuts_of(after.gather([lane]), texts[i])
            advance(len(texts[i]))
    begin = await lanes_for(llm.params).start(llm.model, llm.params)
    for i in set(range(len(texts))) - set(fits):
        steps = list[float]()
        reader = Reader(begin, advance, root, steps)  # type: ignore[arg-type]
        await reader.read(texts[i])
        out[i] = -np.array(steps), ()
    return out


def cuts_of(lanes: Any, text: bytes) -> tuple[Cut, ...]:
    """Return the likeliest ways to cut the last bytes that a lane has read into tokens."""
    shares: dict[tuple[int, ...], float] = {}
    for candidate in ByteBeamState(lanes).candidates if text else ():
        at, ends = len(text) - len(candidate.partial), list[int]()
        for token in reversed(candidate.tokens):
            if at < 0:
                break
            ends.append(at)
            at -= len(token)
        key = tuple(sorted({e for e in ends if e < len(text)}))
        shares[key] = shares.get(key, 0.0) + candidate.share
    best = sorted(shares.items(), key=lambda item: -item[1])[:CUTS]
    return tuple(Cut(min(share, 1.0), ends) for ends, share in best if share > 0)


def _steps(path: FloatArray, first: float) -> FloatArray:
    """Return minus the differences of a path that begins at `first`; inf where it is dead."""
    before = np.concatenate([[first], path[:-1]])[: len(path)]
    with np.errstate(invalid="ignore"):
        return np.where(path == -np.inf, np.inf, before - path)
