"""Whole steps of top-K beams on the host: `steps_numba` with the store, the tree, the trie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.beam import steps_numba as sn
from genlm_bytes_smc.beam.handles import Handles
from genlm_bytes_smc.beam.masses_numba import TrieArrays
from genlm_bytes_smc.beam.state import BeamState
from genlm_bytes_smc.lm.context_index import NO_ROOM
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.rows import RowStore

FloatArray = npt.NDArray[np.float64]


class Rescues:
    """Which bytes healing could read from each trie node, looked up as nodes occur.

    Args:
        nodes: number of trie nodes, M.
        find: the bytes of one node, bool[256].

    Attributes:
        line_of: int32[M], line of `lines` for a node, or -1.
        lines: bool[R, 256].
    """

    def __init__(self, nodes: int, find: Callable[[int], npt.NDArray[np.bool_]]) -> None:
        self._find = find
        self._known = 0
        self.line_of = np.full(nodes, -1, dtype=np.int32)
        self.lines = np.zeros((64, 256), dtype=bool)

    def learn(self, nodes: IntArray) -> None:
        """Look up the lines of these nodes (0 and negative ones are ignored)."""
        nodes = nodes[nodes > 0]
        for node in nodes[self.line_of[nodes] < 0].tolist():
            if self.line_of[node] < 0:
                if self._known == len(self.lines):
                    self.lines = np.concatenate([self.lines, np.zeros_like(self.lines)])
                self.lines[self._known] = self._find(node)
                self.line_of[node] = self._known
                self._known += 1


class Extended(NamedTuple):
    """Candidates with their extensions: int64[4, N, C] (see `steps_numba`), and what it cost.

    Attributes:
        packed: the candidates.
        dropped: float64[N], log mass of the extensions left out, nats.
        missing: contexts without rows, int64[m]; unless it is empty the rest says nothing.
    """

    packed: IntArray
    dropped: FloatArray
    missing: IntArray


class Stepped(NamedTuple):
    """One symbol read in every lane, pruned and extended again.

    Attributes:
        packed: the candidates kept, int64[4, N, K].
        extended: the same with their extensions, whose rows may be missing.
        log_z: float64[N], nats: each lane's weight; of a text that ended, its own.
        pruned: float64[N], log mass that pruning dropped, nats.
        left_out: float64[N], log mass of the new extensions left out, nats.
        missing: contexts of the extended candidates that lack rows, int64[m]; unless it is
            empty nothing was read.
    """

    packed: IntArray
    extended: IntArray
    log_z: FloatArray
    pruned: FloatArray
    left_out: FloatArray
    missing: IntArray


class Followed(NamedTuple):
    """What `follow_likeliest` read.

    Attributes:
        packed: the state after the last byte, not pruned.
        log_z: float64[1], its weight, nats.
        dropped: float64[1], log of all mass dropped so far, nats.
        symbols: the bytes.
        missing: contexts without rows that stopped it, int64[m].
        ends: whether the likeliest symbol is now the end of the text.
    """

    packed: IntArray
    log_z: FloatArray
    dropped: FloatArray
    symbols: list[int]
    missing: IntArray
    ends: bool


class Run(NamedTuple):
    """What `run_text` read.

    Attributes:
        state: after the last byte for which nothing was missing.
        dropped: float64[1], log of all mass dropped so far, nats.
        read: how many bytes that is.
        missed: contexts whose rows were missed, int64[m].
        at: at which byte each was missed, int64[m], ascending.
    """

    state: BeamState
    dropped: FloatArray
    read: int
    missed: IntArray
    at: IntArray


class WholeSteps:
    """Steps of top-K beams in one compiled call each, for rows on the host.

    Each method that may lack rows returns the contexts they belong to as its last item; the
    caller fetches those, and those of the state, and calls again.

    Args:
        store: the rows and, through its engine, the context tree.
        trie: arrays of its trie.
    """

    def __init__(self, store: RowStore, trie: TrieArrays) -> None:
        self.store = store
        self._handles = Handles(trie)

    def arrays(self) -> tuple[IntArray, npt.NDArray[Any]]:
        """Return what every compiled step takes first: `Handles` and the rows."""
        rows = self.store.host
        return self._handles.of(rows, self.store.engine.tree.arrays), rows.probs

    def prune(
        self, given: IntArray, log_dropped: FloatArray, k: int | None, log_threshold: float
    ) -> tuple[IntArray, FloatArray, FloatArray]:
        """`Kernels.select` of a packed state, with the log_z of what is kept, and the log mass
        dropped in all."""
        packed, numbers = sn.prune(given, log_dropped, -1 if k is None else k, log_threshold)
        return packed, numbers[0], numbers[1]

    def read(
        self,
        given: IntArray,
        log_dropped: FloatArray,
        byte: IntArray,
        cut: IntArray,
        log_threshold: float,
        prune: tuple[int, float] = (-1, -np.inf),
    ) -> tuple[IntArray, FloatArray, FloatArray, IntArray]:
        """`Kernels.open_read` and `close_read` of a packed state.

        Args:
            given: the candidates, packed.
            log_dropped: float64[N], log mass dropped before, nats.
            byte: int64[N].
            cut: positions that are no text.
            log_threshold: log share below which extensions are dropped.
            prune: most candidates kept (-1: all) and the log share below which they are
                dropped, before the byte is read.

        Returns:
            The state after `byte`, best first, packed; its log_z float64[N]; the log mass
            dropped in all, float64[N]; contexts without rows, int64[m]: unless it is empty
            the rest says nothing.
        """
        while True:
            packed, numbers, missing = sn.read(
                *self.arrays(), given, log_dropped, byte, cut, *prune, log_threshold
            )
            if len(missing) == 0 or missing[0] != NO_ROOM:
                return packed, numbers[0], numbers[1], missing
            self.store.engine.tree.grow()

    def step(
        self, extended: BeamState, symbols: IntArray, cut: IntArray, k: int | None,
        log_threshold: float,
    ) -> Stepped:  # fmt: skip
        """Read one symbol a lane, prune, and extend what is kept: one compiled call.

        Args:
            extended: the candidates with their extensions.
            symbols: int64[N], a byte, 256 for the end of the text, or -1.
            cut: positions that are no text.
            k: most candidates kept.
            log_threshold: log share below which candidates and extensions are dropped.
        """
        given, most = packed_of(extended), -1 if k is None else k
        while True:
            packed, grown, numbers, missing = sn.step(
                *self.arrays(), given, symbols, cut, most, log_threshold
            )
            if len(missing) == 0 or missing[0] != NO_ROOM:
                return Stepped(packed, grown, numbers[0], numbers[1], numbers[2], missing)
            self.store.engine.tree.grow()

    def extend(
        self, state: BeamState, log_z: FloatArray, cut: IntArray, log_threshold: float
    ) -> Extended:
        """`Kernels.extensions`, those that `keep_above` admits, and `extend`."""
        given = packed_of(state)
        while True:
            out = Extended._make(sn.extend(*self.arrays(), given, log_z, cut, log_threshold))
            if len(out.missing) == 0 or out.missing[0] != NO_ROOM:
                return out
            self.store.engine.tree.grow()

    def extend_rows(
        self,
        state: BeamState,
        log_z: FloatArray,
        log_dropped: FloatArray,
        cut: IntArray,
        log_threshold: float,
        rescues: Rescues,
        share: float,
    ) -> tuple[Extended, FloatArray | None]:
        """`extend` and `next_rows` (None where rows of the model are missing).

        Args:
            state: the candidates.
            log_z: float64[N], their weights, nats.
            log_dropped: float64[N], log mass dropped before; lanes that lost any set aside
                `share` for the bytes that healing would read.
            cut: positions that are no text.
            log_threshold: log share below which extensions are dropped.
            rescues: bytes that healing could read.
            share: of a row; 0: healing is off.
        """
        given = packed_of(state)
        while True:
            packed, dropped, missing, rows, known = sn.extend_rows(
                *self.arrays(), given, log_z, log_dropped, cut, log_threshold,
                rescues.line_of, rescues.lines, share,
            )  # fmt: skip
            if known:
                return Extended(packed, dropped, missing), rows
            if len(missing) == 0:
                rescues.learn(state.node)
            elif missing[0] == NO_ROOM:
                self.store.engine.tree.grow()
            else:
                return Extended(packed, dropped, missing), None

    def next_rows(
        self,
        state: BeamState,
        extended: BeamState,
        cut: IntArray,
        lossy: npt.NDArray[np.bool_],
        rescues: Rescues,
        share: float,
    ) -> FloatArray:
        """`Kernels.next_block` of `extended`, `normalise` and `reserve`: float64[N, 257].

        Args:
            state: the candidates before they were extended, whose rows are there too.
            extended: what they extend to.
            cut: positions that are no text.
            lossy: bool[N], lanes that set `share` aside for bytes that healing would read.
            rescues: which those are.
            share: of a row.
        """
        while True:
            rows: FloatArray
            rows, known = sn.next_rows(
                *self.arrays(), packed_of(state), packed_of(extended), lossy, cut,
                rescues.line_of, rescues.lines, share,
            )  # fmt: skip
            if known:
                return rows
            rescues.learn(state.node[lossy])

    def follow_likeliest(
        self,
        given: IntArray,
        log_dropped: float,
        cut: IntArray,
        k: int | None,
        log_threshold: float,
        steps: int,
    ) -> Followed:
        """Prune, take the likeliest byte and read it, up to `steps` times: one lane, packed."""
        while True:
            packed, numbers, symbols, missing, ends = sn.follow_likeliest(
                *self.arrays(), given, log_dropped, cut, -1 if k is None else k,
                log_threshold, steps,
            )  # fmt: skip
            if len(missing) == 0 or missing[0] != NO_ROOM:
                log_z, dropped = numbers
                return Followed(packed, log_z, dropped, symbols.tolist(), missing, ends)
            self.store.engine.tree.grow()

    def run_text(
        self,
        state: BeamState,
        log_dropped: float,
        text: bytes,
        known: IntArray,
        cut: IntArray,
        k: int | None,
        log_threshold: float,
        horizon: int,
        reach: int,
        heavy: float,
    ) -> Run:
        """Read a text as far as the rows at hand go, noting what is missing: one lane.

        Args:
            state: the candidates, whose rows are there.
            log_dropped: log mass dropped before, nats.
            text: what to read.
            known: `foresight.Guide.known` from there on; filled in.
            cut: positions that are no text.
            k: most candidates kept before each byte.
            log_threshold: log share below which candidates and extensions are dropped.
            horizon: bytes to look beyond the first missing row.
            reach: bytes to look beyond the first row that is but a guess.
            heavy: share of the weight from which on a candidate goes on by a guess.
        """
        read = np.frombuffer(text, dtype=np.uint8)
        given = packed_of(state)
        while True:
            self.store.cover()  # rows stand in for those of contexts made on the way
            packed, numbers, missed = sn.run_text(
                *self.arrays(), given, log_dropped, read, known, cut, -1 if k is None else k,
                log_threshold, horizon, reach, heavy,
            )  # fmt: skip
            if missed.shape[1] == 0 or missed[0, 0] != NO_ROOM:
                after = unpack(packed, state.key)
                return Run(after, numbers[:1], int(numbers[1]), missed[0], missed[1])
            self.store.engine.tree.grow()


class PackedState(BeamState):
    """A state whose arrays are views of one.

    Attributes:
        packed: int64[4, N, C] (see `steps_numba`). Only `unpack` gives it: what
            `_replace` makes has none.
    """

    packed: IntArray


def unpack(packed: IntArray, key: npt.NDArray[np.uint64]) -> BeamState:
    """Return the state in int64[4, N, C]: views."""
    weights = packed.view(np.float64)
    state = PackedState(packed[0], packed[1], weights[2], weights[3], key)
    state.packed = packed
    return state


def packed_of(state: BeamState) -> IntArray:
    """Return the state as int64[4, N, C]: what it was made of, or a copy."""
    packed: IntArray | None = getattr(state, "packed", None)
    if packed is None:
        packed = np.empty((4, *state.ctx.shape), dtype=np.int64)
        packed[0], packed[1] = state.ctx, state.node
        weights = packed[2:].view(np.float64)
        weights[0], weights[1] = state.logu, state.logw
    return packed
