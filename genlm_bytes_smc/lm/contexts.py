"""Token contexts as nodes of a prefix tree, kept on the host.

A context (a string of token ids) is named by one integer, the id of its node. Forking a
lane, sharing a prompt between a thousand particles or asking whether two hypotheses have
the same context is then integer work, and no list of tokens is ever copied.

Layout (struct of arrays, one entry a node; node 0 is the empty context)::

    parent  int64[n]   id of the context without its last token   (root: -1)
    token   int64[n]   the last token                             (root: -1)
    depth   int64[n]   number of tokens

Nodes that nobody can reach any more are found by tracing (`collect`): the roots are the
objects given to `track` that are still alive, the pinned ids, and their ancestors. Freed ids
are used again; whoever keeps something per node hears of it through `on_free`.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

_TOKEN_BITS = 32
_MEMO = 1024


class HoldsContexts(Protocol):
    """Anything alive that refers to contexts by id."""

    def context_ids(self) -> IntArray:
        """The ids that must stay valid, any shape, int64; negative ids are ignored."""
        ...


class ContextTree:
    """All token contexts in use with one model.

    `child`, `children` and `insert` find or make nodes; `tokens` spells one out;
    `collect` frees what no tracked object refers to.
    """

    def __init__(self, capacity: int = 1024) -> None:
        self.parent = np.full(capacity, -1, dtype=np.int64)
        self.token = np.full(capacity, -1, dtype=np.int64)
        self.depth = np.zeros(capacity, dtype=np.int64)
        self._alive = np.zeros(capacity, dtype=bool)
        self._alive[0] = True
        self._size = 1
        self._free: list[int] = []
        self._index: dict[int, int] = {}
        self._holders: weakref.WeakSet[HoldsContexts] = weakref.WeakSet()
        self._pins: Counter[int] = Counter()
        self._on_free: list[weakref.WeakMethod[Callable[[IntArray], None]]] = []
        self._after_last_collect = 0
        self._spelled: dict[int, list[int]] = {}  # recent answers of `tokens`

    def __len__(self) -> int:
        """Number of contexts alive, the empty one included."""
        return self._size - len(self._free)

    @property
    def capacity(self) -> int:
        """Length of the per-node arrays; every id is below it."""
        return len(self.parent)

    # -- finding and making nodes ------------------------------------------------------

    def child(self, node: int, token: int) -> int:
        """The context `node` followed by `token`, made if it is new."""
        key = (node << _TOKEN_BITS) | token
        found = self._index.get(key)
        return self._add(node, token, key) if found is None else found

    def children(self, nodes: IntArray, tokens: IntArray) -> IntArray:
        """`child` for each pair of two int64 arrays of equal shape [m]."""
        child = self.child
        pairs = zip(nodes.tolist(), tokens.tolist(), strict=True)
        return np.fromiter((child(n, t) for n, t in pairs), dtype=np.int64, count=len(nodes))

    def insert(self, tokens: Iterable[int]) -> int:
        """The node of a whole token string, made with its ancestors if new."""
        node = 0
        for token in tokens:
            node = self.child(node, token)
        return node

    def path(self, node: int) -> list[int]:
        """Ids from the first token's node to `node` itself (empty for the root)."""
        out = []
        while node > 0:
            out.append(node)
            node = int(self.parent[node])
        out.reverse()
        return out

    def tokens(self, node: int) -> list[int]:
        """The token ids that `node` stands for (a list of the caller's own)."""
        if node == 0:
            return []
        above = self._spelled.get(int(self.parent[node]))
        if above is None:
            spelled = [int(self.token[n]) for n in self.path(node)]
        else:
            spelled = [*above, int(self.token[node])]
        if len(self._spelled) > _MEMO:
            self._spelled.clear()
        self._spelled[node] = spelled
        return list(spelled)

    def alive(self, nodes: Sequence[int] | IntArray) -> npt.NDArray[np.bool_]:
        """Whether each id is in use, bool[m]."""
        return self._alive[np.asarray(nodes, dtype=np.int64)]

    def _add(self, node: int, token: int, key: int) -> int:
        if not 0 <= token < 1 << _TOKEN_BITS:
            raise ValueError(f"token ids must be integers in [0, 2**{_TOKEN_BITS}), got {token!r}")
        if self._free:
            new = self._free.pop()
        else:
            new = self._size
            if new == self.capacity:
                self._grow()
            self._size += 1
        self.parent[new] = node
        self.token[new] = token
        self.depth[new] = self.depth[node] + 1
        self._alive[new] = True
        self._index[key] = new
        return new

    def _grow(self) -> None:
        n = self.capacity
        self.parent = np.concatenate([self.parent, np.full(n, -1, dtype=np.int64)])
        self.token = np.concatenate([self.token, np.full(n, -1, dtype=np.int64)])
        self.depth = np.concatenate([self.depth, np.zeros(n, dtype=np.int64)])
        self._alive = np.concatenate([self._alive, np.zeros(n, dtype=bool)])

    # -- who needs what ----------------------------------------------------------------

    def track(self, holder: HoldsContexts) -> None:
        """Keep what `holder.context_ids()` names for as long as `holder` is alive."""
        self._holders.add(holder)

    def on_free(self, listener: Callable[[IntArray], None]) -> None:
        """Call the bound method `listener(ids)` whenever `collect` frees ids."""
        self._on_free.append(weakref.WeakMethod(listener))

    @contextmanager
    def pinned(self, nodes: IntArray) -> Iterator[None]:
        """Keep `nodes` alive inside the block (around an await, say)."""
        ids = nodes.ravel().tolist()
        self._pins.update(ids)
        try:
            yield
        finally:
            self._pins.subtract(ids)
            for i in ids:
                if self._pins[i] <= 0:
                    del self._pins[i]

    def live(self) -> npt.NDArray[np.bool_]:
        """Mask over ids, bool[capacity]: reachable from tracked objects and pins."""
        mask = np.zeros(self.capacity, dtype=bool)
        mask[0] = True
        roots = [np.asarray(h.context_ids(), dtype=np.int64).ravel() for h in self._holders]
        roots.append(np.fromiter(self._pins, dtype=np.int64, count=len(self._pins)))
        frontier = np.unique(np.concatenate(roots))
        frontier = frontier[frontier >= 0]
        while len(frontier):
            frontier = frontier[~mask[frontier]]
            mask[frontier] = True
            frontier = np.unique(self.parent[frontier])
            frontier = frontier[frontier >= 0]
        return mask

    def due(self, slack: int = 8192) -> bool:
        """Whether enough nodes have come since the last `collect` for another to pay."""
        return len(self) > 2 * self._after_last_collect + slack

    def collect(self) -> IntArray:
        """Free every node that is not `live` and return the freed ids, int64[m]."""
        mask = self.live()
        freed = np.flatnonzero(self._alive & ~mask)
        for node in freed.tolist():
            del self._index[(int(self.parent[node]) << _TOKEN_BITS) | int(self.token[node])]
        self._alive[freed] = False
        self._spelled.clear()  # ids are used again
        self._free.extend(freed.tolist())
        self._after_last_collect = len(self)
        if len(freed):
            listeners = [ref() for ref in self._on_free]
            self._on_free = [r for r, f in zip(self._on_free, listeners, strict=True) if f]
            for listener in listeners:
                if listener is not None:
                    listener(freed)
        return freed
