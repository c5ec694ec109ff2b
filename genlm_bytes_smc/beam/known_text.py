"""Reading known texts: a few forwards, and the same beam as byte by byte.

1. Ask for the rows along the tokenizer's own tokens of the text: one forward.
2. Run the beam over the text. Where it wants a row that is not there (another way to cut
   the text into tokens), note the context and go on with the row of another context that
   spells the same bytes (`steps_numba.run_texts`); at the end ask for everything noted in one
   forward.
3. Run again from the first byte at which something was missing, until nothing is. The further a
   pass got, the longer the next one trusts a guess.

Each pass settles at least the first byte that was open (or the next one is read the slow
way), and what is read in the end is read with every row there, so the result does not depend
on what was asked for early. `fetch_ahead` does the same for many lanes that will be stepped through
texts of their own: it only fetches the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.beam import steps_numba as sn
from genlm_bytes_smc.beam.deferred import DeferredLanes
from genlm_bytes_smc.beam.deferred_nodes import Held
from genlm_bytes_smc.beam.deferred_text import read_texts, rows_that_matter
from genlm_bytes_smc.beam.lanes import ByteLanes
from genlm_bytes_smc.beam.model import ByteModel
from genlm_bytes_smc.beam.state import NOTHING, BeamState, FloatArray, padded
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.contexts_numba import NO_ROOM
from genlm_bytes_smc.lm.rows import RowStore

HORIZON = 64  # bytes that a dry run goes on, at most, after the first missing row
REACH = 8, 32  # fewest and most bytes to go on with a row that is but a guess
STRETCH = 256, 1024  # bytes along which the tokenizer is followed at first, and at most at a time


class Texts(NamedTuple):
    """Texts that are known, a line each.

    Attributes:
        lines: uint8[N, L].
        lengths: int64[N].
        known: int64[N, L + 1], for each number of bytes a context that has read so many, -1 where
            none is known; filled in while they are read. An id may have been freed and be another
            context's by now: nothing but what is fetched early depends on it.
    """

    lines: npt.NDArray[np.uint8]
    lengths: IntArray
    known: IntArray

    @classmethod
    def of(cls, texts: Sequence[bytes]) -> Texts:
        """Return the texts, of which nothing is known."""
        lengths = np.array([len(t) for t in texts], dtype=np.int64)
        lines = padded(texts, 0).astype(np.uint8)
        return cls(lines, lengths, np.full((len(texts), lines.shape[1] + 1), -1, dtype=np.int64))


def _dry_run(
    lanes: ByteLanes,
    texts: Texts,
    at: int,
    read: int,
    *,
    by_steps: bool = False,
    likeliest: bool = False,
    sure: Held | None = None,
) -> tuple[ByteLanes, int, IntArray, bool]:
    """Read texts, one a lane, from byte `at` on with the rows at hand.

    Args:
        lanes, texts: as many lanes as texts.
        at: bytes that have been read.
        read: of them, by the last pass; how far guesses are trusted depends on it.
        by_steps, likeliest: see `steps_numba.run_texts`.
        sure: extensions that are not thinned; or None.

    Returns:
        The lanes after the last byte for which no row was missing, how many bytes they read,
        the contexts whose rows are to be fetched next, and whether the likeliest symbol is then
        the end of the text.
    """
    model, rules, state = lanes.model, lanes.rules, lanes.state
    trusted = 2 * read if model.engine.forwards_are_dear else read
    reach = min(max(trusted, REACH[0]), REACH[1])  # bytes to go on after the first guess
    horizon = HORIZON if model.engine.forwards_are_dear else reach
    keys, width = (NOTHING, 0) if sure is None else (sure.keys, int(sure.width))
    while True:
        model.store.cover()  # rows stand in for those of contexts made on the way
        packed, key, numbers, done, ends, missed_at, missed = sn.run_texts(
            *model.kernels.arrays(), state.packed, state.key, lanes.log_z, lanes.log_dropped,
            texts.lines, texts.lengths, at, texts.known, rules.cut, rules.k, rules.log_threshold,
            rules.random, by_steps, likeliest, keys, width, horizon, reach,
        )  # fmt: skip
        if len(missed) == 0 or missed[0] != NO_ROOM:
            break
        model.engine.tree.grow()
    if not likeliest:
        near = missed_at >= 0
        missed = _first_of(missed[near], missed_at[near], model.store)
    return lanes.replace(BeamState(packed, key), *numbers), done - at, missed, ends


async def follow_likeliest(lanes: ByteLanes, steps: int) -> tuple[ByteLanes, bytes, bool]:
    """Prune, take the likeliest symbol and read it, `steps` times: one lane.

    Returns:
        The lane after the last byte, not pruned; the bytes; whether the text ends then. They are
        fewer than `steps` where it does, and before a byte that only healing can read.
    """
    out, wanted = bytearray(), NOTHING
    with lanes.model.engine.tree.one_thread:
        while True:
            texts = Texts.of([bytes(steps - len(out))])
            lanes, read, missing, ends = _dry_run(lanes, texts, 0, 0, likeliest=True)
            if read:
                wanted = NOTHING
                out += texts.lines[0, :read].tobytes()
            if len(missing) == 0:
                return lanes, bytes(out), ends
            wanted = await lanes.provide(wanted, missing)


async def read_text(lanes: Any, text: bytes) -> Any:
    """Return one lane, of either class, after `text`.

    It is pruned before each byte, and not after the last.
    """
    if isinstance(lanes, DeferredLanes):
        return (await read_texts(lanes, [text]))[0]
    model, tree, store = lanes.model, lanes.model.engine.tree, lanes.model.store
    texts, at, read, wanted = Texts.of([text]), 0, 0, NOTHING
    guide = Guide(model, lanes.state, text, texts.known[0])
    with ExitStack() as pins:
        pins.enter_context(tree.one_thread)
        sure, thinned = None, lanes.params.unbiased and lanes.params.prune_threshold > 0
        if thinned and text and lanes.log_z[0] > -np.inf:
            # Nothing that is thinned need be judged by the next byte alone where all are known.
            sure = await rows_that_matter(lanes, text)
            pins.enter_context(tree.pinned(sure.ids))
        while at < len(text) and lanes.log_z[0] > -np.inf:
            # Only while it is a guide: what is asked for along it is not asked for elsewhere.
            if guide.falls_short(at) and (at == 0 or read >= HORIZON // 2):
                ahead = guide.further(lanes.state, at)[: store.table.limit // 2]
                pins.enter_context(tree.pinned(ahead))
                await store.ensure(ahead)
            # Together, so that a tight limit on rows cannot evict the one for the other.
            now = np.concatenate([lanes.state.ctx.ravel(), wanted])
            with tree.pinned(now):
                await store.ensure(now)
            again = len(wanted) > 0
            lanes, read, wanted, _ = _dry_run(lanes, texts, at, read, sure=sure)
            at += read
            if at < len(text) and (len(wanted) == 0 or (again and read == 0)):
                # A byte that only healing can read, or rows that do not fit together.
                lanes = await lanes.prune().read(text[at])
                at, wanted = at + 1, NOTHING
    return lanes


async def fetch_ahead(lanes: ByteLanes, texts: list[bytes]) -> IntArray:
    """Fetch the rows that stepping lane n through `texts[n]` asks for.

    What comes after a byte that only healing can read is not foreseen, nor more rows than half
    the store holds. Returns the ids of the contexts fetched, int64[m], for the caller to pin until
    it has stepped.
    """
    model, tree, store = lanes.model, lanes.model.engine.tree, lanes.model.store
    known = Texts.of(texts)
    guides = [Guide(model, lanes.state, t, known.known[n], n) for n, t in enumerate(texts)]
    fetched = [NOTHING]
    with ExitStack() as pins:
        pins.enter_context(tree.one_thread)
        at, read, wanted = 0, 0, NOTHING
        while True:
            if at == 0 or read >= HORIZON // 2:
                further = [g.further(lanes.state, at) for g in guides if g.falls_short(at)]
                wanted = np.unique(np.concatenate([wanted, *further]))
            now = lanes.state.ctx.ravel()
            room = store.table.limit // 2 - sum(map(len, fetched)) - len(now)
            wanted = wanted[: max(0, room)]  # more would evict what is stepped on first
            if len(wanted) == 0:
                break
            pins.enter_context(tree.pinned(wanted))
            await store.ensure(np.concatenate([now, wanted]))
            fetched.append(wanted)
            lanes, read, wanted, _ = _dry_run(lanes, known, at, read, by_steps=True)
            at += read
    return np.concatenate(fetched)


async def read_paths(lanes: Any, texts: Sequence[bytes]) -> tuple[Any, list[FloatArray]]:
    """Read each lane's own text; lanes are of either class, and lengths may differ.

    Returns:
        The lanes after their texts, and for each text its lane's `log_z` after each of its bytes,
        float64[bytes], nats; -inf from the first byte on that nothing could read.
    """
    if not any(texts):
        return lanes, [np.empty(0) for _ in texts]
    if isinstance(lanes, DeferredLanes):
        return await read_texts(lanes, texts)
    path = np.full((len(texts), max(map(len, texts))), -np.inf)
    # Byte by byte; a lane whose text is over is taken out.
    done, order = list[ByteLanes](), list[int]()
    going = np.arange(len(texts))
    lengths = np.array([len(text) for text in texts])
    ahead = await fetch_ahead(lanes, list(texts))
    with lanes.model.engine.tree.pinned(ahead):
        for at in range(path.shape[1] + 1):
            over, rest = np.flatnonzero(lengths[going] == at), np.flatnonzero(lengths[going] > at)
            if len(over):
                done.append(lanes.gather(over))
                order += going[over].tolist()
                lanes, going = lanes.gather(rest), going[rest]
            if len(going):
                lanes = await lanes.prune().read([texts[n][at] for n in going.tolist()])
                path[going, at] = lanes.log_z
    return ByteLanes.cat(done).gather(np.argsort(order)), [
        path[n, : len(text)] for n, text in enumerate(texts)
    ]


class Guide:
    """The contexts along the tokenizer's own tokens of a text, a stretch at a time.

    Args:
        model: the byte model.
        state: lanes of which lane `lane` will read `text`; begun from its best candidate.
        text: what is to be read.
        known: int64[L + 1], a line of `Texts.known`; filled in.
        lane: which lane.
    """

    def __init__(
        self, model: ByteModel, state: BeamState, text: bytes, known: IntArray, lane: int = 0
    ) -> None:
        self.ends = 0  # byte up to which the tokenizer has been followed, or was given up
        self._stretch = STRETCH[0]
        self._model, self._text, self._known, self._lane = model, text, known, lane
        self._begin(state, 0)

    def falls_short(self, at: int) -> bool:
        """Return whether the tokenizer is to be followed further to look ahead from byte `at`."""
        return self.ends < min(at + HORIZON, len(self._text))

    def further(self, state: BeamState, at: int) -> IntArray:
        """Follow the tokenizer another stretch, longer each time: contexts int64[m].

        Where it was not to be followed up to byte `at`, which the state has read, it is from
        their best candidate; nor there (no UTF-8, say): not for some bytes.
        """
        found = self._follow()
        if len(found) == 0 and at > self._at:
            self._begin(state, at)
            found = self._follow()
        self._stretch = min(2 * self._stretch, STRETCH[1])
        self.ends = max(self.ends, self._at if len(found) else at + HORIZON + REACH[0])
        return found

    def _begin(self, state: BeamState, at: int) -> None:
        """From the best candidate after `at` bytes, which may be inside a token."""
        model = self._model
        nodes = state.nodes[self._lane]  # best first; none if every lane is dead
        node = int(nodes[0]) if len(nodes) else -1
        self._context = int(state.ctx[self._lane, 0]) if node >= 0 else 0
        self._partial = model.trie.spell(max(node, 0))
        self._at = at - len(self._partial)

    def _follow(self) -> IntArray:
        if self._context == 0:
            return NOTHING
        stop = max(self._at, 0) + self._stretch
        rest = self._partial + self._text[self._at + len(self._partial) : stop]
        tokens = self._model.canonical(rest)
        if stop < len(self._text):
            tokens = tokens[:-1]  # the last one may be cut
        engine = self._model.engine
        if engine.window is not None:
            tokens = tokens[: max(0, engine.window - int(engine.tree.depth[self._context]))]
        contexts = engine.tree.along(self._context, tokens)
        for token, context in zip(tokens, contexts.tolist(), strict=True):
            length = len(self._model.vocab[token])
            self._at, self._partial = self._at + length, self._partial[length:]
            self._context = context
            if self._at >= 0:
                self._known[self._at] = context
        return contexts


def _first_of(missed: IntArray, at: IntArray, store: RowStore) -> IntArray:
    """Distinct contexts of those missed: all of the first byte, and of later ones as many as half
    the store holds, within the model's window (they may never be asked for).

    `at` int64[m], at which byte each was missed, is ascending.
    """
    if len(missed) == 0:
        return NOTHING
    engine = store.engine
    if engine.window is not None:
        inside = (at == at[0]) | (engine.tree.depth[missed] <= engine.window)
        missed, at = missed[inside], at[inside]
    needed = int(np.searchsorted(at, at[0], side="right"))
    return np.unique(missed[: max(needed, store.table.limit // 2)])
