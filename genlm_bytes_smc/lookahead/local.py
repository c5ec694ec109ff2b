"""Rows of a byte model that knows where in the automaton it is, learned from a pilot run.

A pilot run visits texts; the target's language-model row after each is an observation of what
follows in its automaton state q and n-gram context h. Rows are averaged by state and by pair,
each mixed with the next coarser one down to the n-gram:

    p(b | q)    = (sum of rows seen in q      + smoothing * ngram(b | h)) / (visits + smoothing)
    p(b | q, h) = (sum of rows seen in (q, h) + smoothing * p(b | q))     / (visits + smoothing)
"""

from __future__ import annotations

import numpy as np

from genlm_bytes_smc.alphabet import N_SYMBOLS
from genlm_bytes_smc.lookahead.ngram import ByteNgram, Float
from genlm_bytes_smc.smc.resampling import IntArray


class LocalRows:
    """Sums of rows by automaton state and by pair of state and context.

    Args:
        model: the n-gram.
        n_states: states of the automaton.
        state, context: int64[V], where each visited text stands.
        rows: float64[V, 257], what follows it.
        visits: float64[V], how often it was visited.
        smoothing: visits that a coarser row counts as.
    """

    def __init__(
        self,
        model: ByteNgram,
        n_states: int,
        state: IntArray,
        context: IntArray,
        rows: Float,
        visits: Float,
        smoothing: float,
    ) -> None:
        self.model = model
        self.smoothing = smoothing
        weighed = rows * visits[:, None]
        self.by_state = np.zeros((n_states, N_SYMBOLS))
        np.add.at(self.by_state, state, weighed)
        self.state_visits = np.bincount(state, visits, minlength=n_states)
        self.codes, at = np.unique(state * len(model) + context, return_inverse=True)
        self.by_pair = np.zeros((len(self.codes) + 1, N_SYMBOLS))  # the last row: never seen
        np.add.at(self.by_pair, at, weighed)
        self.pair_visits = np.append(np.bincount(at, visits, minlength=len(self.codes)), 0.0)

    def log(self, state: IntArray, context: IntArray, symbol: IntArray | int) -> Float:
        """Log probability of symbols in pairs: int64[m] each (or one symbol) -> float64[m]."""
        code = state * len(self.model) + context
        place = np.searchsorted(self.codes, code).clip(max=len(self.codes) - 1)
        place = np.where(self.codes[place] == code, place, len(self.codes))
        k = self.smoothing
        p = k * self.model.rows[context, symbol]
        p = (self.by_state[state, symbol] + p) / (self.state_visits[state] + k)
        p = (self.by_pair[place, symbol] + k * p) / (self.pair_visits[place] + k)
        out: Float = np.log(p)
        return out
