"""The rows that reading a known text will probably ask for, along the tokenizer's own tokens."""

from __future__ import annotations

import numpy as np

from genlm_bytes_smc.beam.kernels import NOTHING
from genlm_bytes_smc.beam.model import ByteModel
from genlm_bytes_smc.beam.state import State
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.engine import RowEngine
from genlm_bytes_smc.lm.rows import RowStore

HORIZON = 64  # bytes that a dry run goes on, at most, after the first missing row
REACH = 8, 32  # fewest and most bytes to go on with a row that is but a guess
STRETCH = 256, 1024  # bytes along which the tokenizer is followed at first, and at most at a time


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
        model: the byte model.
        state: lanes of which lane `lane` will read `text`; begun from its best candidate.
        text: what is to be read.
        known: int64[L + 1], a line of `Texts.known`; filled in.
        lane: which lane.

    Attributes:
        ends: byte up to which the tokenizer has been followed, or was given up.
    """

    def __init__(
        self, model: ByteModel, state: State, text: bytes, known: IntArray, lane: int = 0
    ) -> None:
        self.ends = 0
        self._stretch = STRETCH[0]
        self._model, self._text, self._known, self._lane = model, text, known, lane
        self._begin(state, 0)

    def falls_short(self, at: int) -> bool:
        """Return whether the tokenizer is to be followed further to look ahead from byte `at`."""
        return self.ends < min(at + HORIZON, len(self._text))

    def further(self, state: State, at: int) -> IntArray:
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

    def _begin(self, state: State, at: int) -> None:
        """From the best candidate after `at` bytes, which may be inside a token."""
        kernels, model = self._model.kernels, self._model
        nodes = kernels.nodes(state)[self._lane]  # best first; none if every lane is dead
        node = int(nodes[0]) if len(nodes) else -1
        self._context = int(kernels.contexts(state)[self._lane, 0]) if node >= 0 else 0
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
