"""Guesses of what symbols weigh after texts whose rows are not known.

Every known row tells what the target gives to each symbol that the automaton admits there. Let r
be the entry of symbol b at a text in automaton state q whose last two bytes are h. Averages go
from coarse to fine, each counted as if the coarser one had been seen `SMOOTHING` times:

    g(q)         the mean mass that is admitted, over texts where as many symbols are (one, or
                 several), spread evenly over those that q admits
    g(h, b)      the mean of r over texts that end in h
    g(q, b)      the mean of r over texts in state q

A byte that the language model did not expect where it was not admitted counts for nothing. So a
beginning that nobody has come to is not ruled out, as it is by an n-gram of whole rows, which
gives bytes that it never saw next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from genlm_bytes_smc.alphabet import N_SYMBOLS
from genlm_bytes_smc.constraints import ByteDFA
from genlm_bytes_smc.lookahead.ngram import ByteNgram, Float
from genlm_bytes_smc.smc.resampling import IntArray

ORDER = 3  # of the contexts: two bytes
SMOOTHING = 0.5
_PRIOR = np.array([0.8, 0.15])  # mass admitted where one symbol is, and where several are
_TIMES = 2.0  # texts that the prior counts as


class EdgeMeans:
    """Averaged entries of rows, by automaton state and by context.

    Args:
        dfa: the automaton.
        contexts: an n-gram, for the contexts of which it is made.
        state, context: int64[V], where the texts stand; no state is negative.
        target: float64[V, 257], their rows, nats.
    """

    def __init__(
        self, dfa: ByteDFA, contexts: ByteNgram, state: IntArray, context: IntArray, target: Float
    ) -> None:
        table, rows = dfa.host_table(), np.exp(target)
        admitted = (table.next >= 0).sum(axis=1) + table.accept
        kind = np.minimum(np.maximum(admitted, 1), 2) - 1
        count = np.bincount(kind[state], minlength=2) + _TIMES
        mass = np.bincount(kind[state], rows.sum(axis=1), minlength=2) + _TIMES * _PRIOR
        self._even = (mass / count)[kind] / np.maximum(admitted, 1)
        self._by_context = _sums(context, rows, len(contexts))
        self._by_state = _sums(state, rows, dfa.n_states)

    def log(self, state: IntArray, context: IntArray, symbol: IntArray | int) -> Float:
        """Return guessed log entries: int64[m] each (or one symbol) -> float64[m], nats."""
        guess = self._even[state]
        for (total, count), at in ((self._by_context, context), (self._by_state, state)):
            guess = (total[at, symbol] + SMOOTHING * guess) / (count[at, symbol] + SMOOTHING)
        with np.errstate(divide="ignore"):
            out: Float = np.log(guess)
        return out


def _sums(at: IntArray, rows: Float, size: int) -> tuple[Float, Float]:
    """Return the sum of the entries of each row, and how many are not zero: float64[size, 257]."""
    total, count = np.zeros((size, N_SYMBOLS)), np.zeros((size, N_SYMBOLS))
    np.add.at(total, at, rows)
    np.add.at(count, at, rows > 0)
    return total, count


def contexts_of(texts: Sequence[bytes], rows: Float) -> ByteNgram:
    """Return an n-gram whose contexts are those of texts, from float64[V, 257] rows after them."""
    counted = ((text, len(text), row) for text, row in zip(texts, rows, strict=True))
    return ByteNgram.from_rows(counted, ORDER)
