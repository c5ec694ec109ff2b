"""Which contexts have key/value entries, where, and which of them a forward reads: on the host.

One entry a context, for its last token, in a *slot* of a buffer that is the same for every
layer. Nothing here touches a tensor. Layout of `TreeCache` (struct of arrays)::

    by context id   slot       int64[tree.capacity]   its slot, or -1
    by slot         node       int64[slots]           its context, or -1 if the entry is dead
                    last_used  int64[slots]           when a call last built on it

Two laws hold throughout. The contexts with entries are closed under taking ancestors, so
what a request lacks is the end of a path. A parent's slot is below its children's, since new
entries go to the end and compaction keeps the order.

The positions of a forward see their ancestors and themselves (`Paths`). Where keys are not read
as they lie (`lm.paged`) there are three ways to lay them out, and `attend` takes the cheapest:

``range``   one sequence of T positions against a stretch of the buffer as it lies, dead and
            foreign entries masked: nothing is copied.
``listed``  the same against the entries that some position needs, copied together: for a
            few contexts in a buffer full of others.
``rows``    each position a batch row with its own path, copied and padded: for many long
            contexts that share little, where a T x C mask would be nearly all `-inf`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.lm.contexts import ContextTree, IntArray
from genlm_bytes_smc.lm.contexts_numba import common_depth, fill_paths, mark
from genlm_bytes_smc.lm.devices import ON_CPU, AttentionCosts

MaskArray = npt.NDArray[np.float32]
Layout = Literal["range", "listed", "rows"]

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
        node = self._node[: self.used]
        depth = np.where(node >= 0, self.tree.depth[node], 0)
        by_depth = np.argsort(depth, kind="stable")
        ends = np.searchsorted(depth[by_depth], np.arange(2, int(depth.max(initial=0)) + 2))
        for first, stop in zip(ends[-2::-1], ends[:0:-1], strict=True):
            level = by_depth[first:stop]
            above = self._slot[self.tree.parent[node[level]]]
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


# -- keys laid out -----------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """What the T positions of one forward read.

    Attributes:
        layout: how the keys lie (see the module's text).
        low, first, high: the slots that are read lie in `[low, high)`; those of the positions
            themselves are the last, from `first` on.
        index: slots int64[C] (``listed``) or int64[T, C] (``rows``), else None.
        full: 0 where a position sees a key and `-inf` elsewhere, float32[T, C]; None if the
            plain causal rule says the same.
        sliding: the same for layers with a sliding window; None where `full` serves.
    """

    layout: Layout
    low: int
    first: int
    high: int
    index: IntArray | None = None
    full: MaskArray | None = None
    sliding: MaskArray | None = None

    @property
    def keys(self) -> int:
        """Number of keys each position is laid against (C)."""
        return self.high - self.low if self.index is None else int(self.index.shape[-1])


def attend(
    cache: TreeCache,
    nodes: IntArray,
    fresh: int,
    *,
    window: int | None = None,
    always_mask: bool = False,
    layout: Layout | None = None,
    most_copied: int | None = None,
    costs: AttentionCosts = ON_CPU,
) -> Attention:
    """Lay out the keys of one forward whose positions take the slots from `cache.used` on.

    Args:
        cache: where the ancestors' entries are.
        nodes: the contexts of the forward, int64[T], as in a `Work`.
        fresh: how many of them, the first, have no entry yet.
        window: in sliding layers a position sees this many tokens, itself included.
        always_mask: whether to spell out even the plain causal mask.
        layout: force one; None takes the cheapest.
        most_copied: the most entries that may be copied together.
        costs: of the device.
    """
    depth, first, high = cache.tree.depth[nodes], cache.used, cache.used + len(nodes)
    if window is not None and int(depth.max()) <= window:
        window = None
    plain = window is None and not always_mask
    if plain and layout in (None, "range") and cache.is_one_text(nodes, fresh):
        return Attention("range", first, first, high)  # if long, its paths would take much memory
    paths = cache.paths(nodes, fresh)
    assert paths is not None
    slots = np.concatenate([paths.common, paths.own]).astype(np.int64)
    low = int(slots.min())
    seen = np.zeros(high - low, dtype=bool)
    seen[slots - low] = True
    layout = layout or _cheapest(paths, seen, most_copied, costs)
    index, keys, place = None, high - low, np.arange(high - low)
    if layout == "listed":
        index, place = np.flatnonzero(seen) + low, np.cumsum(seen) - 1
        keys = len(index)
    elif layout == "rows":
        keys = int(depth.max())
    if plain and layout != "rows" and len(nodes) == 1 and keys == depth[0]:
        return Attention(layout, low, first, high, index)
    # Each position sees the first entries, `common`, and some of its own: one a place of `own`.
    common, own = slots[: len(paths.common)], slots[len(paths.common) :]
    row = np.repeat(np.arange(len(nodes)), paths.length)
    if window is not None or layout == "rows":
        stops = np.cumsum(paths.length)
        above = np.arange(len(own)) + np.repeat(len(common) - stops + paths.length, paths.length)
    if layout == "rows":
        index = np.repeat(np.arange(first, high)[:, None], keys, axis=1)
        at, common_at = above.copy(), np.arange(len(common))
        at[stops - 1] = keys - 1  # the position itself comes last
        index[:, common_at], index[row, at] = common, own
    else:
        at, common_at = place[own - low], place[common - low]
    full = np.full((len(nodes), keys), -np.inf, dtype=np.float32)
    full[:, common_at] = full[row, at] = 0.0
    if window is None:
        return Attention(layout, low, first, high, index, full)
    near = depth[row] - above <= window
    far = depth[:, None] - np.arange(len(common)) > window
    sliding = np.full_like(full, -np.inf)
    sliding[row[near], at[near]] = 0.0
    sliding[:, common_at] = np.where(far, np.float32(-np.inf), np.float32(0.0))
    return Attention(layout, low, first, high, index, full, sliding)


def _cheapest(
    paths: Paths, seen: npt.NDArray[np.bool_], most_copied: int | None, costs: AttentionCosts
) -> Layout:
    """Return the layout that costs least; `seen`, bool[C]: which slots are needed of a stretch."""
    positions, reach = len(paths.depth), len(seen)
    starts = np.cumsum(paths.length) - paths.length
    new = np.add.reduceat(paths.own >= paths.first, starts)  # entries of this forward, on each path
    known = paths.depth - new
    longest = int(known.max())
    most = np.inf if most_copied is None else most_copied
    key = max(costs.lone_key, costs.pair * positions)
    whole: dict[Layout, float] = {"range": reach * key}
    if reach > 2 * (longest + positions):
        listed = int(seen.sum())
        if ((new == 1) & (known > 0)).sum() != 1:  # of several paths positions count twice
            listed += positions
        if listed <= most:
            whole["listed"] = listed * (costs.copy + key)
    each = longest + 1
    # Each may be a batch row if no position is another's ancestor.
    if positions > 1 and (new == 1).all() and positions * each <= most:
        whole["rows"] = positions * each * costs.row_key
    return min(whole, key=lambda name: whole[name])
