"""Rows that runs have computed, kept by the text that they follow.

A run computes the rows of every text that a particle comes to. `Recorder` is a weigher that
changes no weight and notes them, so that a later run can look ahead along what this one saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from genlm_bytes_smc.alphabet import EOS_COLUMN, N_SYMBOLS
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc.factors import has_language_model
from genlm_bytes_smc.smc.particles import BoolArray, Particles
from genlm_bytes_smc.smc.plan import Plan
from genlm_bytes_smc.smc.resampling import FloatArray, IntArray
from genlm_bytes_smc.smc.weighers import Reads, Weigher


def weights_are_sums(leaves: Sequence[Any]) -> bool:
    """Return whether a whole text weighs what the rows along it sum up to, without a critic."""
    models = [leaf for leaf in leaves if has_language_model(leaf)]
    return all(isinstance(m, ByteLLM) and m.params.prune == "topk" for m in models)


class SeenRows(NamedTuple):
    """What is known of V texts; each comes after all that are shorter, its beginnings included.

    Attributes:
        texts: V distinct texts, by length.
        parent: int64[V], the text that is one byte shorter; -1 of the empty text.
        target: float64[V, 257], the target's log weight of each symbol after it, nats.
        visits: float64[V, 2], how many particles with even and with odd numbers came to it.
        final: texts that ended without a symbol for it (`terminate_when`).
    """

    texts: list[bytes]
    parent: IntArray
    target: FloatArray
    visits: FloatArray
    final: frozenset[bytes]

    def levels(self) -> list[IntArray]:
        """Return the places of the texts of 0, 1, 2, ... bytes."""
        length = np.array([len(text) for text in self.texts], dtype=np.int64)
        return [np.flatnonzero(length == k) for k in range(int(length.max(initial=-1)) + 1)]

    def whole(self) -> dict[bytes, float]:
        """Return the log weight of every whole text whose rows are all known, nats.

        It is the sum of the target's entries along the text and at its end.
        """
        logw = np.zeros(len(self.texts))
        byte = np.array([text[-1] if text else 0 for text in self.texts], dtype=np.int64)
        for nodes in self.levels()[1:]:
            above = self.parent[nodes]
            logw[nodes] = logw[above] + self.target[above, byte[nodes]]
        number = {text: i for i, text in enumerate(self.texts)}
        found = {
            text: float(logw[number[text[:-1]]] + self.target[number[text[:-1]], text[-1]])
            for text in self.final
        }
        ends = logw + self.target[:, EOS_COLUMN]
        for i in np.flatnonzero(np.isfinite(ends)):
            found.setdefault(self.texts[i], float(ends[i]))
        return found


class Seen:
    """A growing store of rows. Texts are found by their bytes; each is stored once."""

    def __init__(self) -> None:
        self._place: dict[bytes, int] = {}
        self._target: list[FloatArray] = []
        self._visits: list[FloatArray] = []
        self._final: set[bytes] = set()

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self._place)

    def add(self, texts: Sequence[bytes], target: FloatArray, visits: FloatArray) -> None:
        """Store the rows of texts, and count the visits of those that are known already.

        Args:
            texts: n of them.
            target, visits: see `SeenRows`.
        """
        for text, row, count in zip(texts, target, visits, strict=True):
            place = self._place.setdefault(text, len(self._place))
            if place == len(self._target):
                self._target.append(row)
                self._visits.append(count)
            else:
                self._visits[place] = self._visits[place] + count

    def end(self, texts: Sequence[bytes]) -> None:
        """Note texts that ended without a symbol for it."""
        self._final.update(texts)

    def rows(self) -> SeenRows:
        """Return what is stored."""
        texts = sorted(self._place, key=lambda text: (len(text), text))
        number = {text: i for i, text in enumerate(texts)}
        order = [self._place[text] for text in texts]
        parent = [number.get(text[:-1], -1) if text else -1 for text in texts]
        return SeenRows(
            texts,
            np.array(parent, dtype=np.int64),
            np.array([self._target[i] for i in order]).reshape(-1, N_SYMBOLS),
            np.array([self._visits[i] for i in order]).reshape(-1, 2),
            frozenset(self._final),
        )


class Recorder(Weigher):
    """A weigher that stores the rows that particles were drawn from, and weighs nothing.

    Args:
        seen: the store.
        plan: of the run.
    """

    def __init__(self, seen: Seen, plan: Plan) -> None:
        self._seen, self._max_bytes = seen, plan.max_bytes

    async def weigh(self, particles: Particles, reads: Reads) -> Particles:
        """See `Weigher`; the particles come back as they are."""
        at = np.flatnonzero(reads.lane_of >= 0)
        lanes, first = np.unique(reads.lane_of[at], return_index=True)
        if not len(lanes):
            return particles
        before = reads.count - 1
        texts = [row[:before].tobytes() for row in particles.text[at[first]]]
        target = reads.rows.target.double().cpu().numpy()[lanes]
        if before >= self._max_bytes:
            target[:, :EOS_COLUMN] = -np.inf
        visits = np.zeros((reads.rows.target.shape[0], 2))
        np.add.at(visits, (reads.lane_of[at], at % 2), 1.0)
        self._seen.add(texts, target, visits[lanes])
        self._seen.end(_stopped(particles, reads))
        return particles


def _stopped(particles: Particles, reads: Reads) -> list[bytes]:
    """Return the texts that ended with a byte that was read now."""
    here: BoolArray = particles.ended & (reads.lane_of >= 0) & (reads.symbols != EOS_COLUMN)
    rows, length = particles.text[here], particles.length[here].tolist()
    return list({row[:k].tobytes() for row, k in zip(rows, length, strict=True)})
