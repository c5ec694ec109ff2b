"""What reading a known text will ask for: contexts to fetch early, and rows that stand in.

A dry run of the beam over a text that is known finds out which rows reading it needs. Where one
is missing, the row of another context that spells the same bytes takes its place: what comes next
hardly depends on how they were cut into tokens. So the dry run goes on nearly as the beam will,
and what it notes can be fetched in one forward. What it did with rows that stood in counts for
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.beam.lanes import ByteLanes
from genlm_bytes_smc.beam.model import ByteModel
from genlm_bytes_smc.beam.state import BeamState, Extensions
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.engine import RowEngine
from genlm_bytes_smc.lm.rows import RowStore

HORIZON = 64  # bytes that a dry run goes on, at most, after the first missing row
HEAVY = 0.1  # share of the beam from which on a candidate goes on with a row that is but a guess
REACH = 8, 32  # fewest and most bytes to go on with it
STRETCH = 256, 1024  # bytes along which the tokenizer is followed at first, and at most at a time

FloatArray = npt.NDArray[np.float64]

NOTHING: IntArray = np.empty(0, dtype=np.int64)


def limits_after(read: int, engine: RowEngine) -> tuple[int, int]:
    """Return how far to go on after a pass that read so many bytes.

    Returns:
        Bytes to go on after the first missing row, and after the first guess.
    """
    trusted = 2 * read if engine.forwards_are_dear else read
    reach = min(max(trusted, REACH[0]), REACH[1])
    return HORIZON if engine.forwards_are_dear else reach, reach


class Guide:
    """The contexts along the tokenizer's own tokens of a text, a stretch at a time.

    Args:
        lanes: where lane `lane` will read `text`; begun from its best candidate.
        text: what is to be read.
        lane: which lane.

    Attributes:
        known: int64[len(text) + 1], for each number of bytes a context that has read so many,
            -1 where none is known. An id may have been freed and be another context's by now:
            nothing but what is fetched early depends on it.
        ends: byte up to which the tokenizer has been followed, or was given up.
    """

    def __init__(self, lanes: ByteLanes, text: bytes, lane: int = 0) -> None:
        self.known: IntArray = np.full(len(text) + 1, -1, dtype=np.int64)
        self.ends = 0
        self._stretch = STRETCH[0]
        self._model, self._lane = lanes.model, lane
        self._text = text
        self._begin(lanes, 0)

    def falls_short(self, at: int) -> bool:
        """Return whether the tokenizer is to be followed further to look ahead from byte `at`."""
        return self.ends < min(at + HORIZON, len(self._text))

    def further(self, lanes: ByteLanes, at: int) -> IntArray:
        """Follow the tokenizer another stretch, longer each time: contexts int64[m].

        Where it was not to be followed up to byte `at`, which `lanes` have read, it is from
        their best candidate; nor there (no UTF-8, say): not for some bytes.
        """
        found = self._follow()
        if len(found) == 0 and at > self._at:
            self._begin(lanes, at)
            found = self._follow()
        self._stretch = min(2 * self._stretch, STRETCH[1])
        self.ends = max(self.ends, self._at if len(found) else at + HORIZON + REACH[0])
        return found

    def know(self, at: int, context: int) -> None:
        """`context` has read `at` bytes and has its row."""
        if at < len(self.known):
            self.known[at] = context

    def known_at(self, at: int) -> int:
        """Return a context that has read `at` bytes; -1 if none is known."""
        return int(self.known[at]) if at < len(self.known) else -1

    def _begin(self, lanes: ByteLanes, at: int) -> None:
        """From the best candidate after `at` bytes, which may be inside a token."""
        kernels, model = self._model.kernels, self._model
        nodes = kernels.nodes(lanes.state)[self._lane]  # best first; none if every lane is dead
        node = int(nodes[0]) if len(nodes) else -1
        self._context = int(kernels.contexts(lanes.state)[self._lane, 0]) if node >= 0 else 0
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
                self.known[self._at] = context
        return contexts


class StandIns:
    """Rows lent to contexts that lack theirs during one dry run, and given back after it.

    Args:
        model: the byte model, whose store lends them.
        guides: of the N texts.
        horizon: bytes to go on after the first missing row.
        reach: bytes that a lane is foreseen after the first row in it that is but a guess.

    Attributes:
        missed: the contexts that lacked a row, by byte.
    """

    def __init__(self, model: ByteModel, guides: Sequence[Guide], horizon: int, reach: int) -> None:
        self.missed: list[IntArray] = []
        self._model, self._guides = model, guides
        self._horizon, self._reach = horizon, reach
        self._first = 0  # byte at which a row was missed first
        self._guessed: dict[int, int] = {}  # byte of the first guess, by lane
        self._lent: list[IntArray] = []

    def __enter__(self) -> StandIns:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for contexts in self._lent:
            self._model.store.slot_of[contexts] = -1

    def done(self, at: int) -> bool:
        """Return whether byte `at` is too far on to be foreseen."""
        guessed = self._guessed.values()
        everywhere = len(guessed) == len(self._guides) and at > max(guessed) + self._reach
        return bool(self.missed) and (at > self._first + self._horizon or everywhere)

    def lend(
        self, at: int, state: BeamState, ext: Extensions, log_z: FloatArray
    ) -> tuple[Extensions, IntArray]:
        """Note which extensions lack a row after `at` bytes, and have others stand in.

        Args:
            at: bytes read by every lane.
            state: the candidates.
            ext: their extensions.
            log_z: float64[N], what the candidates of a lane weigh, nats.

        Returns:
            The extensions that go on, and their contexts.
        """
        if len(ext.lane) == 0:
            return ext, NOTHING
        store = self._model.store
        above = self._model.kernels.contexts(state)[ext.lane, ext.cand]
        new = store.engine.tree.children(above, ext.token)
        missing = store.missing(new)
        here = store.slot_of[new] >= 0
        share = np.exp(ext.logw - log_z[ext.lane])
        for e in np.flatnonzero(here)[np.argsort(share[here])].tolist():  # the heaviest last
            self._guides[ext.lane[e]].know(at, int(new[e]))
        if len(missing) == 0:
            return ext, new
        self._first = self._first if self.missed else at
        slots = np.where(here, 0, -1)
        for e in np.flatnonzero(~here).tolist():
            slots[e] = self._stand_in(int(ext.lane[e]), at, int(above[e]), float(share[e]))
        near = [at <= self._guessed.get(n, at) + self._reach for n in ext.lane.tolist()]
        self.missed.append(np.unique(new[~here & np.array(near)]))
        lent = ~here & (slots >= 0)
        store.slot_of[new[lent]] = slots[lent]
        self._lent.append(new[lent])
        return ext.take(slots >= 0), new[slots >= 0]

    def _stand_in(self, lane: int, at: int, above: int, share: float) -> int:
        """Return the slot of the row that stands in for a candidate's; -1: it is left out."""
        slot_of = self._model.store.slot_of
        same = self._guides[lane].known_at(at)
        if same >= 0 and slot_of[same] >= 0:
            return int(slot_of[same])
        if share <= HEAVY:
            return -1
        self._guessed.setdefault(lane, at)
        return int(slot_of[above])

    def wanted(self) -> IntArray:
        """Return the contexts to fetch before the next run."""
        at = np.repeat(np.arange(len(self.missed)), [len(m) for m in self.missed])
        return first_of(np.concatenate([NOTHING, *self.missed]), at, self._model.store)


def first_of(missed: IntArray, at: IntArray, store: RowStore) -> IntArray:
    """Distinct contexts of those missed: all of the first byte, and of later ones as many as half
    the store holds, within the model's window (they may never be asked for).

    Args:
        missed: int64[m].
        at: int64[m], byte at which each was missed, ascending.
        store: where their rows go.
    """
    if len(missed) == 0:
        return NOTHING
    engine = store.engine
    if engine.window is not None:
        inside = (at == at[0]) | (engine.tree.depth[missed] <= engine.window)
        missed, at = missed[inside], at[inside]
    needed = int(np.searchsorted(at, at[0], side="right"))
    return np.unique(missed[: max(needed, store.table.limit // 2)])
