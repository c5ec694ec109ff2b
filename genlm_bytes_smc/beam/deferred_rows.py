"""Where deferred lanes get the rows that they want: at once, or together after a dry run."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.beam.deferred_nodes import Nodes
from genlm_bytes_smc.beam.deferred_numba import ABOVE, CTX, TOKEN
from genlm_bytes_smc.beam.model import ByteModel
from genlm_bytes_smc.lm.contexts import IntArray

FloatArray = npt.NDArray[np.float64]


class Wanted(NamedTuple):
    """Deferred nodes whose rows may matter, the most wanted of each lane first.

    Attributes:
        ids: int64[m], their contexts.
        shares: float64[m], the share of its lane's mass that each is estimated to hold.
    """

    ids: IntArray
    shares: FloatArray


class RowSource(Protocol):
    """The answer to deferred nodes whose rows may matter."""

    async def bring(self, nodes: Nodes, wanted: Wanted) -> npt.NDArray[np.bool_]:
        """Return which of the wanted contexts have their rows now, bool[m].

        Args:
            nodes: of all lanes; the rows of its live ones must be held on return.
            wanted: m of them.
        """

    def adopt(self, nodes: Nodes) -> tuple[IntArray, IntArray]:
        """Return the deferred nodes (lanes and places, int64[m]) whose rows cost nothing."""


class Fetched:
    """Rows that are fetched as soon as they are wanted."""

    def __init__(self, model: ByteModel) -> None:
        self._model = model

    async def bring(self, nodes: Nodes, wanted: Wanted) -> npt.NDArray[np.bool_]:
        """See `RowSource`."""
        alive = nodes.ints[:, :, CTX][nodes.live]
        with self._model.engine.tree.pinned(nodes.contexts()):
            await self._model.store.ensure(np.concatenate([wanted.ids, alive]))
        return np.ones(len(wanted.ids), dtype=bool)

    def adopt(self, nodes: Nodes) -> tuple[IntArray, IntArray]:
        """See `RowSource`: what happens to be held must not change a weight."""
        none: IntArray = np.empty(0, dtype=np.int64)
        return none, none


class Held:
    """The rows that are held while known texts are read; what else is wanted is noted.

    Args:
        model: the byte model.
        ids: contexts whose rows are held.

    Attributes:
        ids: the contexts, sorted, each once.
        keys: int64[m], sorted: for each the context before its last token, times `width`, plus
            that token.
        width: more than any token id.
        noted: what was wanted and is not held.
    """

    def __init__(self, model: ByteModel, ids: IntArray) -> None:
        self.noted: list[Wanted] = []
        self.ids = np.unique(ids)
        tree = model.engine.tree
        self.width = np.int64(model.trie.order.max() + 1)
        self.keys = np.sort(tree.parent[self.ids] * self.width + tree.token[self.ids])

    async def bring(self, nodes: Nodes, wanted: Wanted) -> npt.NDArray[np.bool_]:
        """See `RowSource`."""
        there = np.isin(wanted.ids, self.ids)
        if not there.all():
            self.noted.append(Wanted(wanted.ids[~there], wanted.shares[~there]))
        return there

    def adopt(self, nodes: Nodes) -> tuple[IntArray, IntArray]:
        """See `RowSource`."""
        deferred = nodes.used & (nodes.ints[:, :, CTX] < 0)
        held = self.has(nodes.ints[:, :, ABOVE], nodes.ints[:, :, TOKEN])
        lanes, places = np.nonzero(deferred & held)
        return lanes, places

    def has(self, above: IntArray, tokens: IntArray) -> npt.NDArray[np.bool_]:
        """Return whether the row of a context `above` and one more token is held.

        Args:
            above, tokens: int64 of one shape.
        """
        keys = above * self.width + tokens
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        there: npt.NDArray[np.bool_] = self.keys[at] == keys
        return there
