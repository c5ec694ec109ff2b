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
from genlm_bytes_smc.beam import masses_numba as nm
from genlm_bytes_smc.beam import pruning_numba as pn
from genlm_bytes_smc.beam import steps_numba as sn
from genlm_bytes_smc.beam import texts_numba as tn
from genlm_bytes_smc.beam.kernels import (
    NOTHING,
    Lanes,
    Limits,
    Look,
    Read,
    Run,
    Texts,
)
from genlm_bytes_smc.beam.rng import KeyArray
from genlm_bytes_smc.beam.state import Extensions, FloatArray, HostState
from genlm_bytes_smc.lm.contexts import NO_ROOM, IntArray
from genlm_bytes_smc.lm.rows import RowStore

_NO_STATE: IntArray = np.empty((4, 0, 0), dtype=np.int64)
_LOG_GUESS = float(np.log(tn.GUESS))


class NumbaKernels:
    """`Kernels` of compiled functions; rows must live on the CPU."""

    def __init__(self, store: RowStore) -> None:
        self.store = store
        trie = store.trie
        self._trie = nm.TrieArrays(trie.lo, trie.hi, trie.ends, trie.first_child, trie.byte)
        self._handles = nm.Handles(self._trie)

    def arrays(self) -> tuple[IntArray, npt.NDArray[Any]]:
        """Return what every compiled step takes first: `Handles` and the rows."""
        rows = self.store.host
        return self._handles.of(rows, self.store.engine.tree.arrays), rows.probs

    def _with_room(self, call: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """Call until the tree has room for new contexts; the last item says what is missing."""
        while True:
            found = call()
            missing = found[-1]
            if len(missing) == 0 or missing[0] != NO_ROOM:
                return found
            self.store.engine.tree.grow()

    # -- whole steps -------------------------------------------------------------------

    def look(self, lanes: Lanes, known: Look | None, *, row: bool) -> Look:
        """See `Kernels`."""
        state, rules, log_z = lanes.state, lanes.rules, lanes.log_z
        looked = known is not None and known.extended is not None
        packed = known.extended.packed if looked else _NO_STATE  # type: ignore[union-attr]
        dropped = known.dropped if looked else log_z  # type: ignore[union-attr]
        rescues = rules.rescues
        while True:
            extended, left_out, missing, rows, done = sn.look(
                *self.arrays(), state.packed, state.key, log_z, lanes.log_dropped, looked, packed,
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
                return (known or Look(None, log_z))._replace(missing=missing)

    def step(self, lanes: Lanes, look: Look, symbols: IntArray) -> Read:
        """See `Kernels`. The candidates kept are extended, too."""
        state, rules, extended = lanes.state, lanes.rules, look.extended
        assert extended is not None
        packed, grown, key, numbers, missing = self._with_room(
            lambda: sn.step(
                *self.arrays(), extended.packed, state.key, symbols, rules.cut, rules.k,
                rules.log_threshold, rules.random,
            )
        )  # fmt: skip
        after = Look(HostState(grown, key), numbers[2])
        log_dropped = np.logaddexp(np.logaddexp(lanes.log_dropped, look.dropped), numbers[1])
        return Read(HostState(packed, key), numbers[0], log_dropped, missing, after)

    def read(self, lanes: Lanes, byte: IntArray, *, prune: bool = False) -> Read:
        """See `Kernels`."""
        state, rules = lanes.state, lanes.rules
        k, log_prune = (rules.k, rules.log_threshold) if prune else (-1, -np.inf)
        packed, key, numbers, missing = self._with_room(
            lambda: sn.read(
                *self.arrays(), state.packed, state.key, lanes.log_z, lanes.log_dropped, byte,
                rules.cut, k, log_prune, rules.log_threshold, rules.random,
            )
        )  # fmt: skip
        return Read(HostState(packed, key), numbers[0], numbers[1], missing)

    def prune(self, lanes: Lanes) -> Read:
        """See `Kernels`."""
        state, rules = lanes.state, lanes.rules
        packed, numbers = sn.prune(
            state.packed, state.key, lanes.log_dropped, rules.k, rules.log_threshold, rules.random
        )
        return Read(HostState(packed, state.key), numbers[0], numbers[1])

    def run_texts(
        self, lanes: Lanes, texts: Texts, start: int, limits: Limits, *, by_steps: bool, sure: Any
    ) -> Run:
        """See `Kernels`."""
        return self._run(lanes, texts, start, limits, by_steps, False, sure)

    def _run(
        self, lanes: Lanes, texts: Texts, start: int, limits: Limits, by_steps: bool,
        likeliest: bool, sure: Any,
    ) -> Run:  # fmt: skip
        state, rules = lanes.state, lanes.rules
        keys, width = (NOTHING, 0) if sure is None else (sure.keys, int(sure.width))

        def call() -> tuple[Any, ...]:
            self.store.cover()  # rows stand in for those of contexts made on the way
            found: tuple[Any, ...] = tn.run_texts(
                *self.arrays(), state.packed, state.key, lanes.log_z, lanes.log_dropped,
                texts.lines, texts.lengths, start, texts.known, rules.cut, rules.k,
                rules.log_threshold, rules.random, by_steps, likeliest, keys, width, _LOG_GUESS,
                *limits,
            )  # fmt: skip
            return found

        packed, key, numbers, read, ends, at, missed = self._with_room(call)
        if not likeliest:
            near = at >= 0
            missed, at = missed[near], at[near]
        return Run(HostState(packed, key), numbers[0], numbers[1], read, missed, at, ends)

    def follow_likeliest(self, lanes: Lanes, steps: int) -> tuple[Run, bytes] | None:
        """See `Kernels`."""
        texts = Texts.of([bytes(steps)])
        run = self._run(lanes, texts, 0, (0, 0), False, True, None)
        return run, texts.lines[0, : run.read].tobytes()

    def next_rows(self, state: HostState, cut: IntArray) -> FloatArray:
        """Return log probabilities of the next symbol, float64[N, 257], without extensions."""
        block = nm.next_block(self._trie, self.store.host, *_arrays(state), cut)
        total = pn.logsumexp_rows(block)[:, None]
        with np.errstate(invalid="ignore"):
            return np.where(total > -np.inf, block - total, -np.inf)

    # -- states ------------------------------------------------------------------------

    def single(self, context: int, logw: float, key: KeyArray) -> HostState:
        """See `Kernels`."""
        shape = (len(key), 1)
        weight = np.full(shape, logw)
        return HostState.of(np.full(shape, context), np.zeros(shape), weight, weight, key)

    def contexts(self, state: HostState) -> IntArray:
        """See `Kernels`."""
        return state.ctx

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
        ctx, node, logu, logw = cn.append_extensions(*_arrays(state), ext.lane, contexts, ext.logw)
        return HostState.of(ctx, node, logu, logw, state.key)

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
