"""Rows that stand in for missing ones while a known text is read.

A dry run of the beam over a text that is known finds out which rows reading it needs. Where one
is missing, the row of another context that spells the same bytes takes its place: what comes next
hardly depends on how they were cut into tokens. So the dry run goes on nearly as the beam will,
and what it notes can be fetched in one forward. What it did with rows that stood in counts for
nothing. Compiled steps do the same in `texts_numba`.

Where nothing spells the same bytes and has its row, a candidate that holds little is left out,
and for another one the row before its last token stands in, a guess that is trusted for some
bytes.
"""

from __future__ import annotations

from types import TracebackType

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.beam.state import Extensions
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.rows import RowStore

HEAVY = 0.1  # share of the beam from which on a candidate goes on with a row that is but a guess

FloatArray = npt.NDArray[np.float64]


class Substitutes:
    """Rows lent to contexts that lack theirs during one dry run, and given back after it.

    Args:
        store: where they come from.
        known: int64[N, L + 1], see `kernels.Texts`; filled in.
        horizon: bytes to go on after the first missing row.
        reach: bytes that a lane is foreseen after the first row in it that is but a guess.

    Attributes:
        missed: the contexts that lacked a row, by byte.
    """

    def __init__(self, store: RowStore, known: IntArray, horizon: int, reach: int) -> None:
        self.missed: list[IntArray] = []
        self._store, self._known = store, known
        self._horizon, self._reach = horizon, reach
        self._first = 0  # byte at which a row was missed first
        self._guessed: dict[int, int] = {}  # byte of the first guess, by lane
        self._lent: list[IntArray] = []
        self._at: list[int] = []  # byte of each of `missed`

    def __enter__(self) -> Substitutes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for contexts in self._lent:
            self._store.slot_of[contexts] = -1

    def done(self, at: int) -> bool:
        """Return whether byte `at` is too far on to be foreseen."""
        guessed = self._guessed.values()
        everywhere = len(guessed) == len(self._known) and at > max(guessed) + self._reach
        return bool(self.missed) and (at > self._first + self._horizon or everywhere)

    def lend(
        self, at: int, contexts: IntArray, ext: Extensions, log_z: FloatArray
    ) -> tuple[Extensions, IntArray]:
        """Note which extensions lack a row after `at` bytes, and have others stand in.

        Args:
            at: bytes read by every lane.
            contexts: int64[N, C], of the candidates.
            ext: their extensions.
            log_z: float64[N], what the candidates of a lane weigh, nats.

        Returns:
            The extensions that go on, and their contexts.
        """
        if len(ext.lane) == 0:
            return ext, np.empty(0, dtype=np.int64)
        store = self._store
        above = contexts[ext.lane, ext.cand]
        new = store.engine.tree.children(above, ext.token)
        missing = store.missing(new)
        here = store.slot_of[new] >= 0
        share = np.exp(ext.logw - log_z[ext.lane])
        for e in np.flatnonzero(here)[np.argsort(share[here])].tolist():  # the heaviest last
            self._known[ext.lane[e], at] = new[e]
        if len(missing) == 0:
            return ext, new
        self._first = self._first if self.missed else at
        slots = np.where(here, 0, -1)
        for e in np.flatnonzero(~here).tolist():
            slots[e] = self._stand_in(int(ext.lane[e]), at, int(above[e]), float(share[e]))
        near = [at <= self._guessed.get(n, at) + self._reach for n in ext.lane.tolist()]
        self._at.append(at)
        self.missed.append(np.unique(new[~here & np.array(near)]))
        lent = ~here & (slots >= 0)
        store.slot_of[new[lent]] = slots[lent]
        self._lent.append(new[lent])
        return ext.take(slots >= 0), new[slots >= 0]

    def _stand_in(self, lane: int, at: int, above: int, share: float) -> int:
        """Return the slot of the row that stands in for a candidate's; -1: it is left out."""
        slot_of = self._store.slot_of
        same = int(self._known[lane, at])
        if same >= 0 and slot_of[same] >= 0:
            return int(slot_of[same])
        if share <= HEAVY:
            return -1
        self._guessed.setdefault(lane, at)
        return int(slot_of[above])

    def all_missed(self) -> tuple[IntArray, IntArray]:
        """Return the contexts missed, int64[m], and the byte at which each was."""
        at = np.repeat(np.array(sorted(self._at), dtype=np.int64), [len(m) for m in self.missed])
        return np.concatenate([np.empty(0, dtype=np.int64), *self.missed]), at
