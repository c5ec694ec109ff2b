"""Pilot runs: which texts particles visit, and the language model's rows averaged there.

The target's language-model row after a text is an observation of what follows in its automaton
state q and n-gram context h. Rows are averaged by state and by pair, each mixed with the next
coarser one down to the n-gram:

    p(b | q)    = (sum of rows seen in q      + smoothing * ngram(b | h)) / (visits + smoothing)
    p(b | q, h) = (sum of rows seen in (q, h) + smoothing * p(b | q))     / (visits + smoothing)
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from genlm_bytes_smc.alphabet import N_SYMBOLS
from genlm_bytes_smc.lookahead.automata import language_models_of
from genlm_bytes_smc.lookahead.ngram import ByteNgram, Float, rows_after
from genlm_bytes_smc.smc.loop import smc_steps
from genlm_bytes_smc.smc.resampling import IntArray
from genlm_bytes_smc.smc.runs import AllParticlesDeadError


class PilotSamples(NamedTuple):
    """Texts that pilot particles visited, and rows of what follows.

    Attributes:
        texts: the V distinct texts.
        counts: float64[V], how many particles were at each.
        rows: float64[V, 257], mass of the next byte and of the end under the language models.
    """

    texts: list[bytes]
    counts: Float
    rows: Float

    def __add__(self, other: PilotSamples) -> PilotSamples:  # type: ignore[override]
        return PilotSamples(
            self.texts + other.texts,
            np.concatenate([self.counts, other.counts]),
            np.concatenate([self.rows, other.rows]),
        )


async def pilot_samples(
    target: Any, n_particles: int, max_bytes: int, **options: Any
) -> PilotSamples:
    """Run `smc` and gather the texts its particles visited (those that died, until they did)."""
    count: Counter[bytes] = Counter()
    try:
        async for state in smc_steps(target, n_particles, max_bytes=max_bytes, **options):
            texts = state.particles.texts()
            count.update(texts[i] for i in np.flatnonzero(state.particles.active))
    except AllParticlesDeadError:
        pass  # what was seen before is still worth knowing
    texts = sorted(count, key=len)
    llm = reduce(operator.mul, language_models_of(target))
    rows = (await rows_after(llm, texts)).exp().numpy()
    return PilotSamples(texts, np.array([float(count[t]) for t in texts]), rows)


def longest(texts: Sequence[bytes], most: int) -> list[bytes]:
    """Return at most so many of the texts that no other one goes on from, of all lengths."""
    begun = {text[:-1] for text in texts}
    found = sorted({t for t in texts if t not in begun}, key=lambda t: (len(t), t))
    return found[:: max(-(-len(found) // most), 1)]


class LocalRows:
    """Rows of a byte model that knows where in the automaton it is.

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
        """Return log probabilities in pairs: int64[m] each (or one symbol) -> float64[m], nats."""
        code = state * len(self.model) + context
        place = np.searchsorted(self.codes, code).clip(max=len(self.codes) - 1)
        place = np.where(self.codes[place] == code, place, len(self.codes))
        k = self.smoothing
        p = k * self.model.rows[context, symbol]
        p = (self.by_state[state, symbol] + p) / (self.state_visits[state] + k)
        p = (self.by_pair[place, symbol] + k * p) / (self.pair_visits[place] + k)
        out: Float = np.log(p)
        return out
