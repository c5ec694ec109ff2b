"""`Kernels` on a CPU, for rows on the host: each step is one compiled call.

A call that lacks rows, or room in the context tree, has no effect, and is repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.beam import candidates_numba as cn
from genlm_bytes_smc.beam import pruning_numba as pn
from genlm_bytes_smc.beam import steps_numba as sn
from genlm_bytes_smc.beam import texts_numba as tn
from genlm_bytes_smc.beam.admission import GUESS
from genlm_bytes_smc.beam.handles import Handles
from genlm_bytes_smc.beam.kernels import (
    NOTHING,
    FloatArray,
    Followed,
    Look,
    Read,
    Run,
    Stepped,
    Texts,
)
from genlm_bytes_smc.beam.masses_numba import TrieArrays
from genlm_bytes_smc.beam.rng import KeyArray
from genlm_bytes_smc.beam.rules import Rules
from genlm_bytes_smc.beam.state import Extensions, HostState
from genlm_bytes_smc.beam.substitutes import HEAVY
from genlm_bytes_smc.lm.context_index import NO_ROOM
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.rows import RowStore

_NO_STATE: IntArray = np.empty((4, 0, 0), dtype=np.int64)
_LOG_GUESS = float(np.log(GUESS))


class NumbaKernels:
    """`Kernels` of compiled functions; rows must live on the CPU.

    Args:
        store: the rows and, through its engine, the context tree.
    """

    def __init__(self, store: RowStore) -> None:
        self.store = store
        trie = store.trie
        self._trie = TrieArrays(trie.lo, trie.hi, trie.ends, trie.first_child, trie.byte)
        self._handles = Handles(self._trie)

    def arrays(self) -> tuple[IntArray, npt.NDArray[Any]]:
        """Return what every compiled step takes first: `Handles` and the rows."""
        rows = self.store.host
        return self._handles.of(rows, self.store.engine.tree.arrays), rows.probs

    def _with_room(self, call: Callable[[], tuple[Any, ...]], at: int) -> tuple[Any, ...]:
        """Call until the tree has room for new contexts: item `at` says what is missing."""
        while True:
            found = call()
            missing = found[at]
            if missing.size == 0 or missing.flat[0] != NO_ROOM:
                return found
            self.store.engine.tree.grow()

    # -- whole steps -------------------------------------------------------------------

    def look(
        self,
        state: HostState,
        log_z: FloatArray,
        log_dropped: FloatArray,
        rules: Rules,
        known: Look | None,
        *,
        row: bool,
    ) -> Look:
        """See `Kernels`."""
        looked = known is not None and known.extended is not None
        packed = known.extended.packed if looked else _NO_STATE  # type: ignore[union-attr]
        dropped = known.dropped if looked else log_z  # type: ignore[union-attr]
        rescues = rules.rescues
        while True:
            extended, left_out, missing, rows, done = sn.look(
                *self.arrays(), state.packed, state.key, log_z, log_dropped, looked, packed,
                dropped, rules.cut, rules.log_threshold, rules.random, rescues.line_of,
                rescues.lines, rules.share, row,
            )  # fmt: skip
            if done:
                held = HostState(extended, state.key)
                return Look(held, left_out, torch.from_numpy(rows) if row else None)
            if len(missing) == 0:
                rescues.learn(state.node)
            elif missing[0] == NO_ROOM:
                self.store.engine.tree.grow()
            else:
                return (
                    known._replace(missing=missing) if known else Look(None, log_z, None, missing)
                )

    def step(self, state: HostState, look: Look, symbols: IntArray, rules: Rules) -> Stepped:
        """See `Kernels`. The candidates kept are extended, too."""
        packed = look.extended.packed  # type: ignore[union-attr]
        while True:
            kept, extended, key, numbers, missing = sn.step(
                *self.arrays(), packed, state.key, symbols, rules.cut, rules.k,
                rules.log_threshold, rules.random,
            )  # fmt: skip
            if len(missing) == 0:
                after = Look(HostState(extended, key), numbers[2])
                return Stepped(HostState(kept, key), numbers[0], numbers[1], after)
            if missing[0] != NO_ROOM:
                return Stepped(state, numbers[0], numbers[1], None, missing)
            self.store.engine.tree.grow()

    def read(
        self,
        state: HostState,
        log_z: FloatArray,
        log_dropped: FloatArray,
        byte: IntArray,
        rules: Rules,
        *,
        prune: bool = False,
    ) -> Read:
        """See `Kernels`."""
        k, log_prune = (rules.k, rules.log_threshold) if prune else (-1, -np.inf)
        while True:
            packed, key, numbers, missing = sn.read(
                *self.arrays(), state.packed, state.key, log_z, log_dropped, byte, rules.cut, k,
                log_prune, rules.log_threshold, rules.random,
            )  # fmt: skip
            if len(missing) == 0 or missing[0] != NO_ROOM:
                return Read(HostState(packed, key), numbers[0], numbers[1], missing)
            self.store.engine.tree.grow()

    def prune(
        self, state: HostState, log_dropped: FloatArray, rules: Rules
    ) -> tuple[HostState, FloatArray, FloatArray]:
        """See `Kernels`."""
        packed, numbers = sn.prune(
            state.packed, state.key, log_dropped, rules.k, rules.log_threshold, rules.random
        )
        return HostState(packed, state.key), numbers[0], numbers[1]

    def run_texts(
        self,
        state: HostState,
        log_z: FloatArray,
        log_dropped: FloatArray,
        texts: Texts,
        start: int,
        rules: Rules,
        limits: tuple[int, int],
        *,
        by_steps: bool,
        sure: Any = None,
    ) -> Run:
        """See `Kernels`."""
        keys, width = (NOTHING, 0) if sure is None else (sure.keys, int(sure.width))

        def call() -> tuple[Any, ...]:
            self.store.cover()  # rows stand in for those of contexts made on the way
            found: tuple[Any, ...] = tn.run_texts(
                *self.arrays(), state.packed, state.key, log_z, log_dropped, texts.bytes,
                texts.lengths, start, texts.known, rules.cut, rules.k, rules.log_threshold,
                rules.random, by_steps, keys, width, _LOG_GUESS, *limits, HEAVY,
            )  # fmt: skip
            return found

        packed, key, numbers, read, missed = self._with_room(call, 4)
        missed = missed[:, missed[1] >= 0]
        return Run(HostState(packed, key), numbers[0], numbers[1], read, missed[0], missed[1])

    def follow_likeliest(
        self, state: HostState, log_z: FloatArray, log_dropped: FloatArray, rules: Rules, steps: int
    ) -> Followed | None:
        """See `Kernels`."""
        packed, key, numbers, symbols, missing, ends = self._with_room(
            lambda: sn.follow_likeliest(
                *self.arrays(), state.packed, state.key, log_z, log_dropped, rules.cut, rules.k,
                rules.log_threshold, rules.random, steps,
            ),
            4,
        )  # fmt: skip
        state = HostState(packed, key)
        return Followed(state, numbers[0], numbers[1], symbols.tolist(), missing, ends)

    # -- states ------------------------------------------------------------------------

    def single(self, context: int, logw: float, key: KeyArray) -> HostState:
        """See `Kernels`."""
        shape = (len(key), 1)
        weight = np.full(shape, logw)
        return HostState.of(np.full(shape, context), np.zeros(shape), weight, weight, key)

    def contexts(self, state: HostState) -> IntArray:
        """See `Kernels`."""
        return state.packed[0]

    def nodes(self, state: HostState) -> IntArray:
        """See `Kernels`."""
        return np.where(state.logw > -np.inf, state.node, -1)

    def log_z(self, state: HostState) -> FloatArray:
        """See `Kernels`."""
        out: FloatArray = pn.logsumexp_rows(state.logw)
        return out

    def gather(self, state: HostState, lanes: IntArray) -> HostState:
        """See `Kernels`."""
        return HostState(state.packed.take(lanes, axis=1), state.key[lanes])

    def cat(self, states: list[HostState]) -> HostState:
        """See `Kernels`."""
        if len(states) == 1:
            return states[0]
        width = max(s.packed.shape[2] for s in states)
        key = np.concatenate([s.key for s in states])
        none = np.full((len(key), width), -np.inf)
        out = HostState.of(np.full(none.shape, -1), np.zeros(none.shape), none, none, key)
        at = 0
        for s in states:
            n, c = s.packed.shape[1:]
            out.packed[:, at : at + n, :c] = s.packed
            at += n
        return out

    # -- parts of steps ----------------------------------------------------------------

    def extensions(self, state: HostState, cut: IntArray) -> Extensions:
        """See `Kernels`."""
        found = cn.extensions(self._trie, self.store.host, *_arrays(state), cut)
        return Extensions._make((*found, np.full(len(state.key), -np.inf)))

    def extend(self, state: HostState, ext: Extensions, contexts: IntArray) -> HostState:
        """See `Kernels`."""
        if len(ext.lane) == 0:
            return state
        grown = cn.append_extensions(*_arrays(state), ext.lane, contexts, ext.logw)
        return HostState.of(*grown, state.key)

    def advance(self, state: HostState, byte: IntArray, cut: IntArray) -> HostState:
        """See `Kernels`."""
        moved, weight = cn.advance(self._trie, self.store.host, *_arrays(state), byte, cut)
        return HostState.of(state.ctx, moved, state.logu, weight, state.key)

    def reweigh(self, state: HostState, cut: IntArray) -> HostState:
        """See `Kernels`."""
        weight = cn.node_logw(self._trie, self.store.host, *_arrays(state), cut)
        return HostState.of(state.ctx, state.node, state.logu, weight, state.key)

    def select(
        self, state: HostState, k: int | None, log_threshold: float
    ) -> tuple[HostState, FloatArray]:
        """See `Kernels`."""
        nothing = np.full(len(state.key), -np.inf)
        most = -1 if k is None else k
        packed, numbers = sn.prune(state.packed, state.key, nothing, most, log_threshold, False)
        return HostState(packed, state.key), numbers[1]


def _arrays(state: HostState) -> tuple[IntArray, IntArray, FloatArray, FloatArray]:
    return state.ctx, state.node, state.logu, state.logw
