"""Reading known texts: a few forwards, and the same beam as byte by byte.

1. Ask for the rows along the tokenizer's own tokens of the text: one forward.
2. Run the beam over the text. Where it wants a row that is not there (another way to cut
   the text into tokens), note the context and go on with the row of another context that
   spells the same bytes (`texts_numba`); at the end ask for everything noted in one forward.
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
from typing import Any

import numpy as np

from genlm_bytes_smc.beam.deferred import DeferredLanes
from genlm_bytes_smc.beam.deferred_nodes import Held
from genlm_bytes_smc.beam.deferred_text import read_weighed, rows_that_matter
from genlm_bytes_smc.beam.kernels import NOTHING, Texts
from genlm_bytes_smc.beam.lanes import ByteLanes
from genlm_bytes_smc.beam.model import ByteModel
from genlm_bytes_smc.beam.state import BeamState, FloatArray
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.rows import RowStore

HORIZON = 64  # bytes that a dry run goes on, at most, after the first missing row
REACH = 8, 32  # fewest and most bytes to go on with a row that is but a guess
STRETCH = 256, 1024  # bytes along which the tokenizer is followed at first, and at most at a time


async def read_text(lanes: ByteLanes, text: bytes) -> ByteLanes:
    """Read `text` in every lane, pruning before each byte and not after the last."""
    if len(lanes) != 1:
        parts = [await read_text(lanes.gather([n]), text) for n in range(len(lanes))]
        return ByteLanes.cat(parts)
    model, tree, store = lanes.model, lanes.model.engine.tree, lanes.model.store
    texts, at, read, wanted = Texts.of([text]), 0, 0, NOTHING
    guide = Guide(model, lanes.state, text, texts.known[0])
    with ExitStack() as pins:
        pins.enter_context(tree.one_thread)
        sure = None
        if _guided(lanes, text):
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
            lanes, read, wanted = _dry_run(lanes, texts, at, read, by_steps=False, sure=sure)
            at += read
            if at < len(text) and (len(wanted) == 0 or (again and read == 0)):
                # A byte that only healing can read, or rows that do not fit together.
                lanes = await lanes.prune().read(text[at])
                at, wanted = at + 1, NOTHING
    return lanes


def _dry_run(
    lanes: ByteLanes, texts: Texts, at: int, read: int, *, by_steps: bool, sure: Held | None
) -> tuple[ByteLanes, int, IntArray]:
    """Read texts from byte `at` on with the rows at hand, after a pass that read so many bytes.

    Returns:
        The lanes after the last byte for which no row was missing, how many bytes they read, and
        the contexts whose rows are to be fetched next.
    """
    engine = lanes.model.engine
    trusted = 2 * read if engine.forwards_are_dear else read
    reach = min(max(trusted, REACH[0]), REACH[1])  # bytes to go on after the first guess
    limits = HORIZON if engine.forwards_are_dear else reach, reach
    run = lanes.model.kernels.run_texts(lanes, texts, at, limits, by_steps=by_steps, sure=sure)
    lanes = lanes.replace(run.state, log_z=run.log_z, log_dropped=run.log_dropped)
    return lanes, run.read - at, _first_of(run.missed, run.at, lanes.model.store)


def _guided(lanes: ByteLanes, text: bytes) -> bool:
    """Return whether extensions that matter for what comes later are to be found first.

    What is thinned at random need not be judged by the next byte alone where all are known.
    """
    alive = len(text) > 0 and lanes.log_z[0] > -np.inf
    return alive and lanes.params.unbiased and lanes.params.prune_threshold > 0


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
            lanes, read, wanted = _dry_run(lanes, known, at, read, by_steps=True, sure=None)
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
        return await read_weighed(lanes, texts)
    return await _read_bytewise(lanes, texts)


async def _read_bytewise(lanes: Any, texts: Sequence[bytes]) -> tuple[Any, list[FloatArray]]:
    """Read byte by byte; a lane whose text is over is taken out."""
    path = np.full((len(texts), max(map(len, texts))), -np.inf)
    done, order = list[Any](), list[int]()
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
    return type(lanes).cat(done).gather(np.argsort(order)), [
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
    the store holds, within the model's window (they may never be asked for). See `Run`."""
    if len(missed) == 0:
        return NOTHING
    engine = store.engine
    if engine.window is not None:
        inside = (at == at[0]) | (engine.tree.depth[missed] <= engine.window)
        missed, at = missed[inside], at[inside]
    needed = int(np.searchsorted(at, at[0], side="right"))
    return np.unique(missed[: max(needed, store.table.limit // 2)])
