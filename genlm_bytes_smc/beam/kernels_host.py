"""What is done for N byte beams between two forwards of the language model.

Each step is one compiled call on the host, over rows that are kept there (`RowStore`), wherever the
model runs: the work is little and irregular, and on a GPU, whose kernels take longer to start than
to run here, it was measured to take several times as long. Nothing here waits for the model: a call
for which rows are missing has no effect, says which, and is repeated when they are there.
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
from genlm_bytes_smc.beam.state import BeamState, Extensions, FloatArray
from genlm_bytes_smc.lm.contexts_numba import NO_ROOM, IntArray
from genlm_bytes_smc.lm.rows import RowStore

_NO_STATE: IntArray = np.empty((4, 0, 0), dtype=np.int64)
_LOG_GUESS = float(np.log(tn.GUESS))


class NumbaKernels:
    """Arithmetic of the beams over one `RowStore`.

    `cut` is a sorted int64 array of trie positions that are no text (end-of-sequence tokens).
    Every context of a state must have its row when a part of a step is called; whole steps say
    which rows are missing.
    """

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
        """Extend the candidates, unless `known` has them, and find their rows if asked to."""
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
                held = BeamState(extended, state.key)
                return Look(held, left_out, torch.from_numpy(rows) if row else None)
            if len(missing) == 0:
                rescues.learn(state.node)
            elif missing[0] == NO_ROOM:
                self.store.engine.tree.grow()
            else:
                return (known or Look(None, log_z))._replace(missing=missing)

    def step(self, lanes: Lanes, look: Look, symbols: IntArray) -> Read:
        """Read one symbol int64[N] a lane in the candidates that `look` has extended, and prune.

        256 ends a text, -1 reads nothing: both empty the lane. The candidates kept are extended,
        too.
        """
        state, rules, extended = lanes.state, lanes.rules, look.extended
        assert extended is not None
        packed, grown, key, numbers, missing = self._with_room(
            lambda: sn.step(
                *self.arrays(), extended.packed, state.key, symbols, rules.cut, rules.k,
                rules.log_threshold, rules.random,
            )
        )  # fmt: skip
        after = Look(BeamState(grown, key), numbers[2])
        log_dropped = np.logaddexp(np.logaddexp(lanes.log_dropped, look.dropped), numbers[1])
        return Read(BeamState(packed, key), numbers[0], log_dropped, missing, after)

    def read(self, lanes: Lanes, byte: IntArray, *, prune: bool = False) -> Read:
        """Read one byte int64[N] a lane (-1 empties it), after pruning if told so; prune no more.

        With top-K pruning the threshold on extensions is taken against the candidates that can
        read the byte.
        """
        state, rules = lanes.state, lanes.rules
        k, log_prune = (rules.k, rules.log_threshold) if prune else (-1, -np.inf)
        packed, key, numbers, missing = self._with_room(
            lambda: sn.read(
                *self.arrays(), state.packed, state.key, lanes.log_z, lanes.log_dropped, byte,
                rules.cut, k, log_prune, rules.log_threshold, rules.random,
            )
        )  # fmt: skip
        return Read(BeamState(packed, key), numbers[0], numbers[1], missing)

    def prune(self, lanes: Lanes) -> Read:
        """Keep at most `rules.k` candidates a lane, best first; read nothing."""
        state, rules = lanes.state, lanes.rules
        packed, numbers = sn.prune(
            state.packed, state.key, lanes.log_dropped, rules.k, rules.log_threshold, rules.random
        )
        return Read(BeamState(packed, state.key), numbers[0], numbers[1])

    def run_texts(
        self, lanes: Lanes, texts: Texts, start: int, limits: Limits, *, by_steps: bool, sure: Any
    ) -> Run:
        """Read texts, one a lane, from byte `start` on with the rows at hand; see `texts_numba`.

        Args:
            lanes: as many as texts.
            texts: what is read, and what is known of them.
            start: bytes that have been read.
            limits: bytes to go on after the first missing row, and after the first guess.
            by_steps: whether to extend and prune as `step` does, or as `read` after pruning.
            sure: `deferred_nodes.Held`, extensions that are not thinned; or None.
        """
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
        return Run(BeamState(packed, key), numbers[0], numbers[1], read, missed, at, ends)

    def follow_likeliest(self, lanes: Lanes, steps: int) -> tuple[Run, bytes]:
        """Prune, take the likeliest byte and read it, up to `steps` times, in one lane.

        Returns how far that went until a row was missing, and the bytes.
        """
        texts = Texts.of([bytes(steps)])
        run = self._run(lanes, texts, 0, (0, 0), False, True, None)
        return run, texts.lines[0, : run.read].tobytes()

    def next_rows(self, state: BeamState, cut: IntArray) -> FloatArray:
        """Return log probabilities of the next symbol, float64[N, 257], without extensions."""
        block = nm.next_block(self._trie, self.store.host, *_arrays(state), cut)
        total = pn.logsumexp_rows(block)[:, None]
        with np.errstate(invalid="ignore"):
            return np.where(total > -np.inf, block - total, -np.inf)

    def log_z(self, state: BeamState) -> FloatArray:
        """Return the log of each lane's total weight, float64[N]."""
        out: FloatArray = pn.logsumexp_rows(state.logw)
        return out

    # -- parts of steps ----------------------------------------------------------------

    def extensions(self, state: BeamState, cut: IntArray) -> Extensions:
        """Return every token-ending extension, none left out."""
        return Extensions._make(cn.extensions(self._trie, self.store.host, *_arrays(state), cut))

    def extend(self, state: BeamState, ext: Extensions, contexts: IntArray) -> BeamState:
        """Append extensions, whose new contexts are given, as further candidates."""
        if len(ext.lane) == 0:
            return state
        ctx, node, logu, logw = cn.append_extensions(*_arrays(state), ext.lane, contexts, ext.logw)
        return BeamState.of(ctx, node, logu, logw, state.key)

    def advance(self, state: BeamState, byte: IntArray, cut: IntArray) -> BeamState:
        """Read one byte int64[N] a lane; -1 empties the lane. Keys stay as they are."""
        moved, weight = cn.advance(self._trie, self.store.host, *_arrays(state), byte, cut)
        return BeamState.of(state.ctx, moved, state.logu, weight, state.key)

    def reweigh(self, state: BeamState, cut: IntArray) -> BeamState:
        """Return the same candidates with their weights under another `cut`."""
        weight = cn.node_logw(self._trie, self.store.host, *_arrays(state), cut)
        return BeamState.of(state.ctx, state.node, state.logu, weight, state.key)

    def ranked(self, state: BeamState) -> BeamState:
        """Return the same candidates, best first."""
        nothing = np.full(len(state.key), -np.inf)
        packed, _ = sn.prune(state.packed, state.key, nothing, -1, -np.inf, False)
        return BeamState(packed, state.key)


def _arrays(state: BeamState) -> tuple[IntArray, IntArray, FloatArray, FloatArray]:
    return state.ctx, state.node, state.logu, state.logw
