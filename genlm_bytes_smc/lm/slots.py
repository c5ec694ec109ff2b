"""Which context's row is in which slot of a store, and which to give up (host only)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.lm.context_index import lacking
from genlm_bytes_smc.lm.contexts import IntArray

Live = Callable[[], npt.NDArray[np.bool_]]


class SlotTable:
    """Slots `0 .. open`, each free or holding one context.

    A full table first gives up contexts that nobody can reach any more, as memory that has
    been written to is cheaper than fresh memory; then opens more slots, up to `limit`; then
    gives up the least recently used. What a call needs at once is always held, beyond the
    limit if it must be.

    Args:
        first: slots to open first.
        limit: slots to open at most, but for what one call needs.

    Attributes:
        slot_of: int64[contexts + 1], slot of each context id or -1; the last entry is 0, so
            that the id -1 (no context) never reads as missing.
        evicted: contexts given up so far that something might still have asked for.
    """

    def __init__(self, first: int, limit: int) -> None:
        self.limit = max(1, limit)
        self.evicted = 0
        self._clock = 0
        self.slot_of: IntArray = np.zeros(1, dtype=np.int64)
        self._context: IntArray = np.empty(0, dtype=np.int64)
        self._used: IntArray = np.empty(0, dtype=np.int64)
        self._free: list[int] = []
        self._grow(min(first, self.limit))

    @property
    def open(self) -> int:
        """Number of slots opened."""
        return len(self._context)

    def __len__(self) -> int:
        """Return the number of contexts held."""
        return self.open - len(self._free)

    def cover(self, contexts: int) -> None:
        """Make ids below `contexts` known."""
        have = len(self.slot_of) - 1
        if have < contexts:
            more = np.full(contexts - have, -1, dtype=np.int64)
            self.slot_of = np.concatenate([self.slot_of[:-1], more, [0]])

    def missing(self, contexts: IntArray) -> IntArray:
        """Distinct ids >= 0 among `contexts` (any shape) without a slot, int64[m]."""
        out: IntArray = lacking(self.slot_of, contexts.ravel())
        return np.unique(out) if len(out) > 1 else out

    def touch(self, contexts: IntArray) -> None:
        """Count `contexts` (any shape, all held) as just used."""
        self._clock += 1
        self._used[self.slot_of[contexts]] = self._clock

    def place(self, contexts: IntArray, slots: IntArray) -> None:
        """Hold `contexts` in slots that `room` gave."""
        context_of, used, slot_of, now = self._context, self._used, self.slot_of, self._clock
        for context, slot in zip(contexts.tolist(), slots.tolist(), strict=True):  # mostly one
            context_of[slot] = context
            used[slot] = now
            slot_of[context] = slot

    def room(self, n: int, needed: IntArray, live: Live) -> IntArray:
        """`n` slots taken off the free list, int64[n].

        Args:
            n: how many.
            needed: contexts that must not be given up, any shape.
            live: gives the mask over ids of contexts that can still be reached.
        """
        if len(self._free) < n:
            self._make_room(n, needed, live)
        taken = self._free[-n:]
        del self._free[-n:]
        return np.array(taken, dtype=np.int64)

    def release(self, slots: IntArray) -> None:
        """Give slots back (taken, or holding a context)."""
        held = self._context[slots]
        self.slot_of[held[held >= 0]] = -1
        self._context[slots] = -1
        self._free.extend(slots.tolist())

    def forget(self, contexts: IntArray) -> None:
        """Give up the slots of contexts whose ids were freed."""
        slots = self.slot_of[contexts[contexts < len(self.slot_of) - 1]]
        self.release(slots[slots >= 0])

    def clear(self, needed: Sequence[IntArray] = ()) -> None:
        """Give up everything but the contexts `needed`."""
        spared = np.concatenate([self._context[:0], *needed])
        self.release(np.flatnonzero((self._context >= 0) & ~np.isin(self._context, spared)))

    def _make_room(self, n: int, needed: IntArray, live: Live) -> None:
        held = np.flatnonzero(self._context >= 0)
        must = np.zeros(self.open, dtype=bool)
        slots = self.slot_of[needed]
        must[slots[slots >= 0]] = True
        held = held[~must[held]]
        reachable = live()[self._context[held]]
        dead = held[~reachable]
        share = max(n, self.open // 4)
        if len(dead) + len(self._free) >= share:
            self.release(self._oldest(dead, share))
            return
        if self.open < self.limit:
            self._grow(min(self.limit, max(2 * self.open, len(self) + n)))
        if len(self._free) < n:
            order = np.concatenate([self._oldest(dead), self._oldest(held[reachable])])
            drop = order[: max(n - len(self._free), self.open // 4)]
            self.evicted += int(reachable.sum()) - max(0, len(order) - len(drop))
            self.release(drop)
        if len(self._free) < n:
            self._grow(self.open + n - len(self._free))

    def _oldest(self, slots: IntArray, n: int | None = None) -> IntArray:
        return slots[np.argsort(self._used[slots], kind="stable")][:n]

    def _grow(self, size: int) -> None:
        more = size - self.open
        self._free.extend(range(size - 1, self.open - 1, -1))
        self._context = np.concatenate([self._context, np.full(more, -1, dtype=np.int64)])
        self._used = np.concatenate([self._used, np.zeros(more, dtype=np.int64)])
