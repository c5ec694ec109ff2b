"""The contexts of N lanes with deferred pruning as arrays, and which of them get rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.beam import deferred_reading_numba as rd
from genlm_bytes_smc.beam.deferred_numba import (
    ABOVE,
    CTX,
    FLIGHT,
    NODE,
    OWN,
    PARENT,
    POS,
    TEXT,
    TOKEN,
    WEIGHT,
    foresee,
)
from genlm_bytes_smc.beam.model import ByteModel
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.beam.state import BeamState, BoolArray, FloatArray, NumbaKernels
from genlm_bytes_smc.lm.contexts import ContextTree, IntArray

NOTED = 64  # contexts that there is room to note at once, besides `AT_ONCE` a lane
NEAR = 0.5  # share of a limit from which on a row is fetched early
_SPARE = 16  # places for further nodes that a lane of a new array has


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
        ints = np.full((n, _SPARE, 6), -1, dtype=np.int64)
        ints[:, 0] = [context, -1, -1, 0, -1, 0]
        floats = np.zeros((n, _SPARE, 4))
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
        return np.arange(self.ints.shape[1]) < self.count[:, None]

    @property
    def live(self) -> BoolArray:
        """Nodes with a row and a token in flight, bool[N, C]."""
        return self.used & (self.ints[:, :, NODE] >= 0)

    @property
    def at_end(self) -> BoolArray:
        """Nodes that end with the text, bool[N, C]."""
        at_end: BoolArray = self.used & (self.ints[:, :, POS] == self.length[:, None])
        return at_end

    def contexts(self) -> IntArray:
        """Return the ids of all contexts that the nodes name, int64[m]."""
        used = self.used
        named = np.concatenate([self.ints[:, :, field][used] for field in (CTX, ABOVE)])
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
        """Return a copy of some lanes, with some of the places that are free."""
        most = int(self.count[lanes].max(initial=1)) + _SPARE
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
        n, room = self.ints.shape[:2]
        lacking = int(self.count.max(initial=0)) + more - room
        if lacking > 0:
            ints = np.full((n, room + lacking + _SPARE, 6), -1, dtype=np.int64)
            floats = np.zeros((n, room + lacking + _SPARE, 4))
            ints[:, :room], floats[:, :room] = self.ints, self.floats
            self.ints, self.floats = ints, floats


class Held:
    """The rows that are held while known texts are read.

    Args:
        model: the byte model.
        ids: contexts whose rows are held.

    Attributes:
        ids: the contexts, sorted, each once.
        keyed: int64[2, m], sorted by its first line: for each context the context before its last
            token, times `width`, plus that token; and its id.
        width: more than any token id.
    """

    def __init__(self, model: ByteModel, ids: IntArray) -> None:
        self.ids = np.unique(ids)
        tree = model.engine.tree
        self.width = np.int64(model.trie.order.max() + 1)
        keys = tree.parent[self.ids] * self.width + tree.token[self.ids]
        order = np.argsort(keys)
        self.keyed = np.stack([keys[order], self.ids[order]])

    @property
    def keys(self) -> IntArray:
        """Return the first line of `keyed`, int64[m]."""
        keys: IntArray = self.keyed[0]
        return keys


_ANY = np.empty((2, 0), dtype=np.int64)


@dataclass(frozen=True)
class Judge:
    """What judges the contexts of lanes after a byte, and fetches the rows that may matter.

    Rows are fetched as soon as they are wanted, and what else happens to be there changes no
    weight. `cut` are trie positions of the tokens that are no text.
    """

    model: ByteModel
    params: BeamParams
    cut: IntArray

    @property
    def kernels(self) -> NumbaKernels:
        """The arithmetic."""
        return self.model.kernels

    async def judge(
        self,
        nodes: Nodes,
        share: float | FloatArray,
        merge: float | FloatArray,
        *,
        at_end: bool = False,
    ) -> tuple[FloatArray, FloatArray]:
        """Fetch rows until no deferred node's estimated share is above its limit.

        Args:
            nodes: changed in place.
            share, merge, at_end: see `deferred_numba.judge_lane`.

        Returns:
            Each lane's mass float64[N], and float64[N, 2] of what no row stands for.
        """
        call = _Call(self, nodes, np.zeros((len(nodes.count), 1), dtype=np.int64), share, merge)
        call.at_end, call.turn[:] = at_end, 1
        await self._finish(call)
        return call.masses, call.rest

    async def step(self, nodes: Nodes, symbols: IntArray, z: FloatArray) -> None:
        """Read a byte in each lane, fetch rows as `judge` does, and settle the lanes.

        Args:
            nodes: changed in place.
            symbols: int64[N], the bytes.
            z: float64[N, 4], log weights, see `deferred_reading_numba.SCALE`; changed in place.
        """
        await self.ensure(nodes)
        await self._finish(self._reading(nodes, symbols[:, None], z))

    def _reading(self, nodes: Nodes, symbols: IntArray, z: FloatArray) -> _Call:
        """Return the call that reads and settles; arguments as for `read`."""
        params = self.params
        call = _Call(self, nodes, symbols, params.deferred_share, params.deferred_merge)
        call.limit, call.z = params.deferred_limit, z
        return call

    async def _finish(self, call: _Call) -> None:
        """Go on with a call until all is done, and fetch the rows that it lacks on the way."""
        engine, nodes = self.model.engine, call.nodes
        while len(wanted := call.go_on()[0]):
            ids = engine.tree.children(*wanted.T.copy())
            needed = np.concatenate([ids, nodes.ints[:, :, CTX][nodes.live]])
            if engine.rows_are_cheap:
                needed = np.concatenate([needed, self._foreseen(call)])
            with engine.tree.pinned(nodes.contexts()):
                await self.model.store.ensure(needed)

    async def ensure(self, nodes: Nodes) -> None:
        """Fetch the rows of all live nodes."""
        await self.model.store.ensure(nodes.ints[:, :, CTX][nodes.live])

    def read(
        self, nodes: Nodes, symbols: IntArray, held: Held, z: FloatArray
    ) -> tuple[FloatArray, IntArray, FloatArray]:
        """Read known texts with the rows that are held, and settle after each byte.

        Args:
            nodes: changed in place; the rows of live ones are held.
            symbols: int64[N, L], a text a lane, -1 behind it.
            held: the rows.
            z: float64[N, 4], log weights, see `deferred_reading_numba.SCALE`; changed in place.

        Returns:
            The weight of each lane after each byte, float64[L, N], nats, -inf from the byte on
            that nothing could read; the contexts that were wanted and are not held, int64[k]; and
            the shares of its lane's mass that each was estimated to hold, float64[k].
        """
        call = self._reading(nodes, symbols, z)
        call.held = held
        wanted, shares = call.go_on()
        return call.log_z, self.model.engine.tree.children(*wanted.T.copy()), shares

    def _foreseen(self, call: _Call) -> IntArray:
        """Return contexts whose rows later requests will most likely ask for, int64[m].

        A request is a forward of the model, whose cost hardly depends on its rows where those
        are cheap. Fetched early, rows that would come in a forward of their own come for little.
        """
        engine, store = self.model.engine, self.model.store
        nodes, (share, merge) = call.nodes, call.limits.T.copy()
        asked = merge if call.at_end else np.full(len(share), self.params.prune_threshold)
        handles, probs = self.kernels.arrays()
        room = 4 * len(share) + 64
        while True:
            contexts, least_p = np.empty((room, 3), dtype=np.int64), np.empty(room)
            found = foresee(
                handles, probs, self.cut, nodes.ints, nodes.floats, nodes.count, nodes.length,
                nodes.text, call.masses, share, merge, NEAR * asked, self.params.deferred_guess,
                call.at_end, contexts, least_p,
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

    async def weigh_flights(self, nodes: Nodes) -> None:
        """Weigh the tokens in flight anew, under this `cut`."""
        # Where nothing of a token is read, none can turn out to be excluded.
        lanes, places = np.nonzero(nodes.live & (nodes.ints[:, :, NODE] > 0))
        if len(lanes):
            await self.model.store.ensure(nodes.ints[lanes, places, CTX])
            arrays = self.kernels.arrays()
            rd.weigh_flights(*arrays, self.cut, nodes.ints, nodes.floats, lanes, places)


class _Call:
    """Arguments and results of `deferred_reading_numba.judge`, which is called until all is done.

    See there for what the attributes are; `held` None is `free`.
    """

    def __init__(
        self,
        judge: Judge,
        nodes: Nodes,
        symbols: IntArray,
        share: float | FloatArray,
        merge: float | FloatArray,
    ) -> None:
        n = len(nodes.count)
        self.judge, self.nodes, self.symbols = judge, nodes, symbols
        self.held: Held | None = None
        self.at_end, self.limit = False, 0
        self.limits = np.empty((n, 2))
        self.limits[:, 0], self.limits[:, 1] = share, merge
        self.at, self.turn = np.zeros(n, dtype=np.int64), np.full(n, rd.READ)
        self.masses, self.rest, self.z = np.zeros(n), np.zeros((n, 2)), np.zeros((n, 4))
        self.log_z = np.full(symbols.shape[::-1], -np.inf)

    def go_on(self) -> tuple[IntArray, FloatArray]:
        """Go on as far as rows are there; return contexts noted int64[k, 2] and their shares."""
        judge, nodes, held = self.judge, self.nodes, self.held
        params = judge.params
        room, width = rd.AT_ONCE * len(nodes.count) + NOTED, 0 if held is None else held.width
        noted, shares = list[IntArray](), list[FloatArray]()
        state = np.ones(3, dtype=np.int64)
        while state[1:].any():
            contexts, worth = np.empty((room, 2), dtype=np.int64), np.empty(room)
            rd.judge(
                *judge.kernels.arrays(), judge.cut, nodes.ints, nodes.floats, nodes.count,
                nodes.length, nodes.text, self.symbols, self.at, self.turn,
                _ANY if held is None else held.keyed, width, held is None, self.limits,
                params.deferred_guess, self.at_end, -(-params.deferred_rows // rd.AT_ONCE),
                self.limit, self.z, self.masses, self.rest, contexts, worth, self.log_z, state,
            )  # fmt: skip
            noted.append(contexts[: state[0]])
            shares.append(worth[: state[0]])
            nodes.make_room(int(state[1]))
        return np.concatenate(noted), np.concatenate(shares)
