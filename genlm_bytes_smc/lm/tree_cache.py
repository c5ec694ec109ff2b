"""Which contexts have key/value entries, and where: host bookkeeping of the tree cache.

One entry a context, for its last token, in a *slot* of a buffer that is the same for every
layer. Nothing here touches a tensor. Layout (struct of arrays)::

    by context id   slot       int64[tree.capacity]   its slot, or -1
    by slot         node       int64[slots]           its context, or -1 if the entry is dead
                    last_used  int64[slots]           when a call last built on it

Two laws hold throughout. The contexts with entries are closed under taking ancestors, so
what a request lacks is the end of a path. A parent's slot is below its children's, since new
entries go to the end and compaction keeps the order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.lm.contexts import ContextTree, IntArray
from genlm_bytes_smc.lm.contexts_numba import common_depth, fill_paths, mark

MOST_POSITIONS = 1024
"""Of a forward that reads keys where they lie (`lm.paged`)."""

MOST_ENTRIES = 1 << 20
"""Entries, common ones once, that the positions of one such forward may have in all."""

_DEAD_TOLERATED = 512  # compaction copies the whole buffer: not for less than this
_EVICT_SHARE = 4  # evict a quarter more than needed, so that it does not happen every call


@dataclass(frozen=True)
class Work:
    """What a call has to compute.

    Attributes:
        nodes: contexts whose last token is run through the model, parents before children
            and each branch in one stretch.
        fresh: so many of them, the first, get an entry; the others have one already and are run
            again for their row alone.
    """

    nodes: list[int]
    fresh: int


class Paths(NamedTuple):
    """The entries that each of T positions of a forward sees.

    Attributes:
        token, depth: int64[T], of each position's context.
        first: the slot of the first position; the others follow.
        common: int32[m], slots of the first tokens of all of them.
        own: int32[...], slots of each one's further tokens, its own last, one position's after the
            other's.
        length: int64[T], how many each has there.
    """

    token: IntArray
    depth: IntArray
    first: int
    common: npt.NDArray[np.int32]
    own: npt.NDArray[np.int32]
    length: IntArray


class TreeCache:
    """Slots of contexts, and the plans that follow from them.

    Args:
        tree: the contexts; entries of freed ids die with them.
    """

    def __init__(self, tree: ContextTree) -> None:
        self.tree = tree
        self.used = 0
        self.dead = 0
        self._clock = 0
        self._slot: IntArray = np.full(tree.capacity, -1, dtype=np.int64)
        self._node: IntArray = np.full(64, -1, dtype=np.int64)
        self._last_used: IntArray = np.zeros(64, dtype=np.int64)
        self._seen = np.zeros(tree.capacity, dtype=bool)
        tree.on_free(self._forget)

    def __len__(self) -> int:
        """Return the number of contexts that have an entry."""
        return self.used - self.dead

    # -- reading -----------------------------------------------------------------------

    def depths(self, slots: IntArray | slice) -> IntArray:
        """Return the tokens of the contexts in these slots (any number for a dead entry)."""
        return self.tree.depth[self._node[slots]]

    # -- planning ----------------------------------------------------------------------

    def work(self, nodes: IntArray) -> Work:
        """List the positions that rows of `nodes` (distinct, not empty) require."""
        self._fit_tree()
        parent, slot = self.tree.parent, self._slot
        above = parent[nodes]
        if (slot[nodes] < 0).all() and ((above == 0) | (slot[above] >= 0)).all():
            return Work(nodes.tolist(), len(nodes))  # one token each, as in most steps
        fresh, again, seen = list[int](), list[int](), set[int]()
        for node in nodes.tolist():
            if slot[node] >= 0:
                again.append(node)
                continue
            branch: list[int] = []
            at = node
            while at > 0 and slot[at] < 0 and at not in seen:
                branch.append(at)
                at = int(parent[at])
            branch.reverse()
            fresh += branch
            seen.update(branch)
        return Work(fresh + again, len(fresh))

    def is_one_text(self, nodes: IntArray, fresh: int) -> bool:
        """Return whether one forward computes a text of which nothing is kept, and nothing else."""
        whole = fresh == len(nodes) == self.tree.depth[nodes[-1]]
        return whole and bool((self.tree.parent[nodes[1:]] == nodes[:-1]).all())

    def paths(self, nodes: IntArray, fresh: int, most: float = np.inf) -> Paths | None:
        """Find the entries that the positions of one forward see; None: more than `most` in all.

        Args:
            nodes: as in a `Work` (or a stretch of one), int64[T].
            fresh: how many of them, the first, have no entry yet.
            most: entries, common ones counted once.
        """
        tree, slot = self.tree, self._slot
        depth = tree.depth[nodes]
        shared = int(common_depth(tree.parent, tree.depth, nodes, self._seen))
        length = depth - shared
        total = int(length.sum())
        if shared + total > most:
            return None
        common, own = np.empty(shared, dtype=np.int32), np.empty(total, dtype=np.int32)
        slot[nodes[:fresh]] = np.arange(self.used, self.used + fresh)
        fill_paths(tree.parent, tree.depth, slot, nodes, self.used, common, own)
        slot[nodes[:fresh]] = -1
        return Paths(tree.token[nodes], depth, self.used, common, own, length)

    # -- changing ----------------------------------------------------------------------

    def append(self, nodes: IntArray) -> None:
        """Give contexts the slots `used`, `used + 1`, ...; parents come before children."""
        n = len(nodes)
        new = slice(self.used, self.used + n)
        self._fit_slots(self.used + n)
        self._node[new] = nodes
        self._last_used[new] = self._clock
        self._slot[nodes] = np.arange(self.used, self.used + n)
        self.used += n

    def touch(self, nodes: IntArray) -> None:
        """Note that a call needs these contexts (those without an entry are ignored)."""
        self._clock += 1
        slots = self._slot[nodes]
        self._last_used[slots[slots >= 0]] = self._clock

    def room(self, wanted: IntArray, more: int, limit: int) -> IntArray | None:
        """Return which slots to keep so that `more` entries fit below `limit`.

        Args:
            wanted: the contexts of the call; they and their ancestors stay.
            more: entries to come.
            limit: the most slots the buffer may have.

        Returns:
            None if there is room and little is dead. Otherwise the slots that stay,
            int64[m], ascending; pass them to `compact` (and the buffer's).

        Raises:
            MemoryError: what the call itself needs does not fit.
        """
        if self.used + more <= limit:
            wasteful = self.dead > max(_DEAD_TOLERATED, self.used // 2)
            return np.flatnonzero(self._node[: self.used] >= 0) if wasteful else None
        alive = np.flatnonzero(self._node[: self.used] >= 0)
        if len(alive) + more <= limit - limit // _EVICT_SHARE:
            return alive
        needed = np.zeros(self.tree.capacity, dtype=bool)
        mark(self.tree.parent, wanted, needed)
        need = needed[self._node[alive]]
        if int(need.sum()) + more > limit:
            raise MemoryError(f"{int(need.sum()) + more} entries do not fit in {limit}")
        live = self.tree.live()[self._node[alive]]
        # Ancestors are needed, live and used at least as late as their descendants, and
        # have lower slots, so that taking the best always takes ancestors first.
        best = np.lexsort((alive, -self._last_use()[alive], ~live, ~need))
        reachable = min(int((need | live).sum()), limit - more)
        stay = max(int(need.sum()), reachable, limit - limit // _EVICT_SHARE - more)
        return np.sort(alive[best[:stay]])

    def compact(self, keep: IntArray) -> int:
        """Move the entries in slots `keep` (ascending) to the front and drop the others.

        Returns:
            How many entries were alive and dropped.
        """
        dropped = self._node[: self.used].copy()
        dropped[keep] = -1
        gone = dropped[dropped >= 0]
        self._slot[gone] = -1
        n = len(keep)
        for column in (self._node, self._last_used):
            column[:n] = column[keep]
        self._node[n:] = -1
        self._slot[self._node[:n]] = np.arange(n)
        self.used, self.dead = n, 0
        return len(gone)

    def clear(self) -> None:
        """Forget every entry."""
        self._slot[:] = -1
        self._node[:] = -1
        self.used = self.dead = 0

    # -- inside ------------------------------------------------------------------------

    def _last_use(self) -> IntArray:
        """When each slot or anything below it was last used, int64[used]."""
        last = self._last_used[: self.used].copy()
        depth = np.where(self._node[: self.used] >= 0, self.depths(slice(self.used)), 0)
        by_depth = np.argsort(depth, kind="stable")
        ends = np.searchsorted(depth[by_depth], np.arange(2, int(depth.max(initial=0)) + 2))
        for first, stop in zip(ends[-2::-1], ends[:0:-1], strict=True):
            level = by_depth[first:stop]
            above = self._slot[self.tree.parent[self._node[level]]]
            np.maximum.at(last, above, last[level])
        return last

    def _forget(self, freed: IntArray) -> None:
        self._fit_tree()
        slots = self._slot[freed]
        slots = slots[slots >= 0]
        self._node[slots] = -1
        self._slot[freed] = -1
        self.dead += len(slots)

    def _fit_tree(self) -> None:
        lack = self.tree.capacity - len(self._slot)
        if lack > 0:
            self._slot = np.concatenate([self._slot, np.full(lack, -1, dtype=np.int64)])
            self._seen = np.zeros(self.tree.capacity, dtype=bool)

    def _fit_slots(self, slots: int) -> None:
        if slots > len(self._node):
            lack = max(slots - len(self._node), len(self._node))
            self._node = np.concatenate([self._node, np.full(lack, -1, dtype=np.int64)])
            self._last_used = np.concatenate([self._last_used, np.zeros(lack, dtype=np.int64)])
