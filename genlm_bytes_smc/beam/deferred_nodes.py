"""The contexts of N lanes with deferred pruning as arrays, and which of them get rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.beam import deferred_numba as dn
from genlm_bytes_smc.beam.deferred_ahead_numba import foresee
from genlm_bytes_smc.beam.deferred_numba import (
    ABOVE,
    CTX,
    FLIGHT,
    NODE,
    NOT_NOW,
    OWN,
    PARENT,
    POS,
    TEXT,
    TOKEN,
    WEIGHT,
)
from genlm_bytes_smc.beam.model import ByteModel
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.beam.state import BeamState, BoolArray, FloatArray, NumbaKernels
from genlm_bytes_smc.lm.contexts import ContextTree, IntArray

AT_ONCE = 4  # rows that a lane asks for in one request
NEAR = 0.5  # share of a limit from which on a row is fetched early


@dataclass(eq=False)
class Nodes:
    """The nodes of N lanes, see `deferred_numba`; `Judge` and `make_room` change them in place.

    Attributes:
        ints, floats: int64[N, C, 6] and float64[N, C, 4].
        count, length: int64[N], nodes and bytes of each lane.
        text: uint8[N, TEXT], byte i of a lane at i % TEXT.
    """

    ints: IntArray
    floats: FloatArray
    count: IntArray
    length: IntArray
    text: npt.NDArray[np.uint8]

    @classmethod
    def first(cls, n: int, context: int) -> Nodes:
        """Return the nodes of n lanes that have read nothing after `context`."""
        ints = np.full((n, 16, 6), -1, dtype=np.int64)
        ints[:, 0] = [context, -1, -1, 0, -1, 0]
        floats = np.zeros((n, 16, 4))
        floats[:, 0] = 1.0
        one = np.ones(n, dtype=np.int64)
        return cls(ints, floats, one, one - 1, np.zeros((n, TEXT), dtype=np.uint8))

    @classmethod
    def of_ends(
        cls, n: int, lanes: IntArray, contexts: IntArray, token: int, own: FloatArray
    ) -> Nodes:
        """Return the nodes of n lanes in which `token` has just ended after each of m contexts.

        The contexts int64[m] belong to `lanes` int64[m], ascending; `own` float64[m] are their
        weights over the scale of their lane.
        """
        nodes = cls.first(n, 0)
        nodes.count[:] = 0
        nodes.make_room(int(np.bincount(lanes, minlength=1).max(initial=0)))
        at = np.arange(len(lanes)) - np.searchsorted(lanes, lanes)
        nodes.ints[lanes, at] = [-1, -1, token, 0, -1, -1]
        nodes.ints[lanes, at, ABOVE] = contexts
        nodes.floats[lanes, at] = [1.0, 0.0, 0.0, 0.0]
        nodes.floats[lanes, at, OWN] = own
        nodes.count += np.bincount(lanes, minlength=n)
        return nodes

    @property
    def used(self) -> BoolArray:
        """Places that hold a node, bool[N, C]."""
        used: BoolArray = np.arange(self.ints.shape[1]) < self.count[:, None]
        return used

    @property
    def live(self) -> BoolArray:
        """Nodes with a row and a token in flight, bool[N, C]."""
        live: BoolArray = self.used & (self.ints[:, :, NODE] >= 0)
        return live

    @property
    def at_end(self) -> BoolArray:
        """Nodes that end with the text, bool[N, C]."""
        at_end: BoolArray = self.used & (self.ints[:, :, POS] == self.length[:, None])
        return at_end

    def contexts(self) -> IntArray:
        """Return the ids of all contexts that the nodes name, int64[m]."""
        named = self.ints[self.used][:, [CTX, ABOVE]].ravel()
        return named[named >= 0]

    def candidates(
        self, tree: ContextTree, log_scale: FloatArray, *, merged: bool = False
    ) -> BeamState:
        """Return the tokens in flight and the contexts that end with the text as a beam's state.

        Args:
            tree: of the contexts; new ones may be made.
            log_scale: float64[N], see `DeferredLanes`.
            merged: whether a context that ends with the text is part of the token in flight that
                ends there, as other prunings take it.
        """
        ints, floats = self.ints.copy(), self.floats
        alone, live = self.at_end, self.live
        with np.errstate(divide="ignore"):
            if merged:
                flying = live & ~alone
                parent = np.maximum(ints[:, :, PARENT], 0)
                part = alone & (ints[:, :, PARENT] >= 0)
                part &= np.take_along_axis(flying, parent, axis=1)
                weight = np.where(flying, floats[:, :, WEIGHT] * floats[:, :, FLIGHT], 0.0)
                lanes, places = np.nonzero(part)
                np.add.at(weight, (lanes, parent[lanes, places]), floats[lanes, places, OWN])
                alone &= ~part
                weight = np.where(alone, floats[:, :, OWN], weight)
                shown = weight > 0
            else:
                flight = np.log(np.where(alone, 1.0, floats[:, :, FLIGHT]))
                shown = alone | live
            logu = np.log(np.where(alone, floats[:, :, OWN], floats[:, :, WEIGHT]))
            logu = np.where(shown, logu, -np.inf) + log_scale[:, None]
            logw = np.log(weight) + log_scale[:, None] if merged else logu + flight
        new = alone & (ints[:, :, CTX] < 0)
        with tree.one_thread:
            ints[new, CTX] = tree.children(ints[new, ABOVE], ints[new, TOKEN])
        ctx = np.where(shown, ints[:, :, CTX], -1)
        node = np.where(shown, np.where(alone, 0, ints[:, :, NODE]), -1)
        return BeamState.of(ctx, node, logu, logw)

    def copy(self) -> Nodes:
        """Return a copy of all lanes."""
        return self.take(np.arange(len(self.count)))

    def take(self, lanes: IntArray) -> Nodes:
        """Return a copy of some lanes."""
        most = int(self.count[lanes].max(initial=1))
        return Nodes(
            self.ints[lanes, :most],
            self.floats[lanes, :most],
            self.count[lanes],
            self.length[lanes],
            self.text[lanes],
        )

    def put(self, lanes: IntArray, new: Nodes) -> Nodes:
        """Return a copy with the lanes `lanes` replaced by those of `new`."""
        if len(lanes) == len(self.count):
            return new
        out = self.copy()
        out.make_room(new.ints.shape[1] - int(out.count.max(initial=0)))
        out.ints[lanes, : new.ints.shape[1]] = new.ints
        out.floats[lanes, : new.floats.shape[1]] = new.floats
        out.count[lanes], out.length[lanes], out.text[lanes] = new.count, new.length, new.text
        return out

    @classmethod
    def cat(cls, parts: list[Nodes]) -> Nodes:
        """Return the lanes of several."""
        room = max(x.ints.shape[1] for x in parts)
        wide = [((0, 0), (0, room - x.ints.shape[1]), (0, 0)) for x in parts]
        pairs = list(zip(parts, wide, strict=True))
        return cls(
            np.concatenate([np.pad(x.ints, w, constant_values=-1) for x, w in pairs]),
            np.concatenate([np.pad(x.floats, w) for x, w in pairs]),
            *(np.concatenate([getattr(x, f) for x in parts]) for f in ("count", "length", "text")),
        )

    def make_room(self, more: int) -> None:
        """Make places for `more` further nodes a lane."""
        lacking = int(self.count.max(initial=0)) + more - self.ints.shape[1]
        if lacking > 0:
            wide = ((0, 0), (0, lacking + 16), (0, 0))
            self.ints = np.pad(self.ints, wide, constant_values=-1)
            self.floats = np.pad(self.floats, wide)


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
        noted: contexts that were wanted and are not held, int64[k], and the shares of its lane's
            mass that each was estimated to hold, float64[k]; one pair a request.
    """

    def __init__(self, model: ByteModel, ids: IntArray) -> None:
        self.noted: list[tuple[IntArray, FloatArray]] = []
        self.ids = np.unique(ids)
        tree = model.engine.tree
        self.width = np.int64(model.trie.order.max() + 1)
        self.keys = np.sort(tree.parent[self.ids] * self.width + tree.token[self.ids])

    def among(self, ids: IntArray, shares: FloatArray) -> BoolArray:
        """Return which contexts int64[m] have their rows, bool[m]; note the others."""
        there = np.isin(ids, self.ids)
        if not there.all():
            self.noted.append((ids[~there], shares[~there]))
        return there

    def has(self, above: IntArray, tokens: IntArray) -> BoolArray:
        """Return whether the row of a context `above` and one more token is held, elementwise."""
        keys = above * self.width + tokens
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        there: BoolArray = self.keys[at] == keys
        return there


@dataclass(frozen=True)
class Judge:
    """What judges the contexts of lanes after a byte, and fetches the rows that may matter.

    Rows come from `held` where it is given. Otherwise they are fetched as soon as they are wanted,
    and what else happens to be there changes no weight. `cut` are trie positions of
    the tokens that are no text.
    """

    model: ByteModel
    params: BeamParams
    cut: IntArray

    @property
    def kernels(self) -> NumbaKernels:
        """The arithmetic."""
        return self.model.kernels

    async def read(
        self, nodes: Nodes, symbols: IntArray, held: Held | None
    ) -> tuple[FloatArray, FloatArray]:
        """Read a byte in every lane of `nodes`, and fetch the rows that may matter after it.

        Returns:
            Each lane's mass float64[N], and float64[N, 2] of what no row stands for.
        """
        lanes, places = np.nonzero(nodes.live)
        before = nodes.length.copy()
        nodes.text[np.arange(len(before)), before % TEXT] = symbols
        nodes.length += 1
        await self.model.store.ensure(nodes.ints[lanes, places, CTX])
        self.follow(nodes, lanes, places, before[lanes])
        if held is not None:
            ints = nodes.ints
            lanes, places = np.nonzero(
                nodes.used & (ints[:, :, CTX] < 0) & held.has(ints[:, :, ABOVE], ints[:, :, TOKEN])
            )
            if len(lanes):
                above, token = ints[lanes, places, ABOVE], ints[lanes, places, TOKEN]
                ints[lanes, places, CTX] = self.model.engine.tree.children(above, token)
                self.follow(nodes, lanes, places, ints[lanes, places, POS])
        params = self.params
        return await self.have_rows(nodes, params.deferred_share, params.deferred_merge, held)

    async def have_rows(
        self,
        nodes: Nodes,
        share: float | FloatArray,
        merge: float | FloatArray,
        held: Held | None = None,
        *,
        at_end: bool = False,
    ) -> tuple[FloatArray, FloatArray]:
        """Fetch rows until no deferred node's estimated share is above its limit.

        Args:
            nodes: judged by `deferred_numba.judge`; changed in place.
            share, merge, at_end: see there.
            held: what it lacks is not asked for again.

        Returns:
            As `read`.
        """
        tree = self.model.engine.tree
        wanted = np.empty((len(nodes.count), AT_ONCE), dtype=np.int64)
        shares = np.empty(wanted.shape)
        rest = np.empty((len(nodes.count), 2))
        share, merge = (np.full(len(nodes.count), limit) for limit in (share, merge))
        requests = -(-self.params.deferred_rows // AT_ONCE)
        for turn in range(requests + 1):
            masses: FloatArray = dn.judge(
                nodes.ints, nodes.floats, nodes.count, nodes.length,
                share, merge, self.params.deferred_guess, at_end, wanted, shares, rest,
            )  # fmt: skip
            lanes, at = np.nonzero(wanted >= 0)
            if len(lanes) == 0 or turn == requests:
                break
            places = wanted[lanes, at]
            chosen = nodes.ints[lanes, places]
            ids = tree.children(chosen[:, ABOVE], chosen[:, TOKEN])
            if held is None:
                needed = np.concatenate([ids, nodes.ints[:, :, CTX][nodes.live]])
                if self.model.engine.rows_are_cheap and len(self.model.store.missing(needed)):
                    more = self._foreseen(nodes, masses, share, merge, at_end=at_end)
                    needed = np.concatenate([needed, more])
                with tree.pinned(nodes.contexts()):
                    await self.model.store.ensure(needed)
                there = np.ones(len(ids), dtype=bool)
            else:
                there = held.among(ids, shares[lanes, at])
            nodes.ints[lanes, places, NODE] = np.where(there, -1, NOT_NOW)
            lanes, places = lanes[there], places[there]
            nodes.ints[lanes, places, CTX] = ids[there]
            self.follow(nodes, lanes, places, chosen[there, POS])
        return masses, rest

    def _foreseen(
        self,
        nodes: Nodes,
        masses: FloatArray,
        share: FloatArray,
        merge: FloatArray,
        *,
        at_end: bool,
    ) -> IntArray:
        """Return contexts whose rows later requests will most likely ask for, int64[m].

        A request is a forward of the model, whose cost hardly depends on its rows where those
        are cheap. Fetched early, rows that would come in a forward of their own come for little.
        """
        engine, store = self.model.engine, self.model.store
        asked = merge if at_end else np.full(len(share), self.params.prune_threshold)
        handles, probs = self.kernels.arrays()
        room = 4 * len(share) + 64
        while True:
            contexts, least_p = np.empty((room, 3), dtype=np.int64), np.empty(room)
            found = foresee(
                handles, probs, self.cut, nodes.ints, nodes.floats, nodes.count, nodes.length,
                nodes.text, masses, share, merge, NEAR * asked, self.params.deferred_guess, at_end,
                contexts, least_p,
            )  # fmt: skip
            if found <= room:
                break
            room = found
        above, token, further = contexts[:found].T.copy()
        ids = engine.tree.children(above, token)
        store.cover()
        slots, rows = store.slot_of[ids], store.host
        with_more = np.flatnonzero(further >= 0)
        known = slots[with_more]
        p = rows.probs[known, further[with_more]] * rows.scale[known]
        likely = with_more[(known < 0) | (p > least_p[with_more])]
        ids = np.concatenate([ids, engine.tree.children(ids[likely], further[likely])])
        return ids if engine.window is None else ids[engine.tree.depth[ids] <= engine.window]

    def follow(self, nodes: Nodes, lanes: IntArray, places: IntArray, first: IntArray) -> None:
        """Move live nodes along the text, and defer what ends on the way."""
        handles, probs = self.kernels.arrays()
        ends = np.empty((8 * len(lanes) + 64, 5))
        while True:
            found = dn.follow(
                handles, probs, self.cut, nodes.ints, nodes.floats, nodes.length, nodes.text,
                lanes, places, first, ends,
            )  # fmt: skip
            if found <= len(ends):
                break
            ends = np.empty((found, 5))
        ends = ends[:found]
        if found:
            nodes.make_room(int(np.bincount(ends[:, 0].astype(np.int64)).max()))
            dn.defer(nodes.ints, nodes.floats, nodes.count, ends)
