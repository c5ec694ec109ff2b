"""Constraints whose state is the text that was read: a node of a prefix tree a distinct text.

Where states cannot be listed beforehand (parsers, weighted forward vectors, any Python
function), a state is the number of a node in a prefix tree of byte strings, so lanes that
have read the same bytes share it. What a constraint computes at a node (its snapshot) is
made when first asked for and held up to a limit; one that was dropped is made again from the
bytes. Host bookkeeping only: the arithmetic stays with the subclass.

    tree       ContextTree    a node is (parent, byte): some 200 bytes, until `keep` drops it
    snapshots  node -> value  at most `max_states` between calls, least recently used go first
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch

from genlm_bytes_smc.alphabet import N_BYTES, N_SYMBOLS, Context
from genlm_bytes_smc.checks import check_count
from genlm_bytes_smc.constraints.base import DEAD, BoolArray, ByteConstraint, IntArray
from genlm_bytes_smc.lm.contexts import ContextTree, OneThread

S = TypeVar("S")

MAX_SNAPSHOTS = 10_000


class _Kept:
    """The states that the last `keep` was given: roots of the tree's garbage collection."""

    def __init__(self) -> None:
        self.ids = np.zeros(0, dtype=np.int64)

    def context_ids(self) -> IntArray:
        return self.ids


_BUSY = (
    "a constraint that remembers texts answers one thread at a time, and another is being "
    "answered: give each thread its own (`spawn` makes one)"
)


class TreeConstraint(ByteConstraint, Generic[S]):
    """A constraint over prefix-tree states; subclasses say what a snapshot is.

    Args:
        device: where weights are returned (None: the CPU).
        max_states: snapshots held between calls.

    Attributes:
        reads: how many bytes were read into snapshots; one a distinct text as long as none
            had to be dropped.
    """

    def __init__(self, device: torch.device | str | None, max_states: int) -> None:
        super().__init__(device)
        check_count("max_states", max_states, 1)
        self.max_states = max_states
        self._forget()

    @abstractmethod
    def _at(self, nodes: IntArray) -> list[S]:
        """Return the snapshots of distinct live nodes, which are then held."""

    @abstractmethod
    def _admitted(self, nodes: IntArray, symbols: IntArray) -> BoolArray:
        """Return which live nodes may read their bytes: int64[m], int64[m] -> bool[m]."""

    @abstractmethod
    def _rows(self, nodes: IntArray) -> torch.Tensor:
        """Return `block` for distinct live nodes: int64[m] -> float64[m, 257] on the device."""

    def _discard(self, snapshot: S) -> None:
        """Free what a snapshot that is no longer held takes."""

    def _freed(self, nodes: IntArray) -> None:
        """Forget nodes that are gone; their numbers may come again for other texts."""

    # -- the vectorised interface --------------------------------------------------------

    def initial(self, n: int) -> torch.Tensor:
        """Return the state of the empty text for `n` lanes, int64[n]."""
        self._lent = True
        return super().initial(n)

    def block(self, state: torch.Tensor) -> torch.Tensor:
        """Log weights of next byte and EOS: int64[n] -> float64[n, 257]; equal states once."""
        with self._one_thread:
            return self._by_node(state, self._rows, N_SYMBOLS)

    def step(self, state: torch.Tensor, symbols: torch.Tensor) -> torch.Tensor:
        """Read one byte a lane: int64[n], int64[n] -> int64[n]."""
        with self._one_thread:
            pairs, lane = distinct(torch.where(state < 0, DEAD, state * N_BYTES + symbols))
            nodes, read = pairs // N_BYTES, pairs % N_BYTES
            out = np.full(len(pairs), DEAD, dtype=np.int64)
            live = np.flatnonzero(pairs >= 0)
            if len(live):
                live = live[self._admitted(nodes[live], read[live])]
                out[live] = self.tree.children(nodes[live], read[live])
                self._drop_snapshots()
            return torch.from_numpy(out)[lane].to(self.device)

    def _by_node(
        self, state: torch.Tensor, values: Callable[[IntArray], torch.Tensor], *shape: int
    ) -> torch.Tensor:
        """Return values of states, computed once a distinct live node; -inf for a dead one.

        Args:
            state: int64[n].
            values: distinct live nodes int64[m] -> float64[m, *shape] on the device.
            shape: of a value.
        """
        nodes, lane = distinct(state)
        live = nodes[nodes >= 0]
        dead = (len(nodes) - len(live), *shape)  # the dead state is -1: it sorts first
        out = torch.full(dead, float("-inf"), dtype=torch.float64, device=self.device)
        if len(live):
            out = torch.cat([out, values(live)])
            self._drop_snapshots()
        return out[lane.to(self.device)]

    def keep(self, states: Iterable[torch.Tensor]) -> None:
        """Drop every state that is neither in these tensors nor a prefix of one that is."""
        with self._one_thread:
            kept = [s.detach().cpu().numpy().ravel() for s in states]
            self._kept.ids = (
                np.unique(np.concatenate(kept)) if kept else np.zeros(0, dtype=np.int64)
            )
            freed = self.tree.collect()
            for node in freed.tolist():
                if node in self._snapshots:
                    self._discard(self._snapshots.pop(node))
            self._freed(freed)
            self._known.clear()

    def release(self) -> None:
        """Forget every state but that of the empty text."""
        super().release()
        self._lent = False

    @property
    def n_texts(self) -> int:
        """Number of distinct texts remembered as states, the empty one included."""
        return len(self.tree)

    @property
    def n_snapshots(self) -> int:
        """Number of snapshots held."""
        return len(self._snapshots)

    def text(self, state: int) -> bytes:
        """Return the bytes that a live state has read."""
        return bytes(self.tree.tokens(state))

    # -- the Potential side --------------------------------------------------------------

    def states(self, contexts: Sequence[Context]) -> torch.Tensor:
        """Return the states of whole contexts, int64[n].

        Where only contexts are used (`initial` was never called), nobody but this object
        holds states, and it drops old ones by itself.
        """
        with self._one_thread:
            if not self._lent and self.n_texts > 4 * self.max_states:
                while len(self._known) > self.max_states // 2:
                    self._known.popitem(last=False)
                known = self._known.copy()
                self.keep([torch.tensor(list(known.values()), dtype=torch.int64)])
                self._known.update(known)
            return super().states(contexts)

    # -- memory ------------------------------------------------------------------------

    def _drop_snapshots(self) -> None:
        """Drop snapshots beyond the limit; the empty text's stays."""
        held = self._snapshots
        while len(held) > max(self.max_states, 1):
            node = next(iter(held))
            if node == 0:
                held.move_to_end(0)
                continue
            self._discard(held.pop(node))

    def _forget(self) -> None:
        self._one_thread = OneThread(_BUSY)
        self.tree = ContextTree()
        self._kept = _Kept()
        self.tree.track(self._kept)
        self._snapshots: OrderedDict[int, S] = OrderedDict()
        self._lent = False
        self.reads = 0

    def _copy(self, device: torch.device) -> Self:
        new = super()._copy(device)
        new._forget()
        return new

    def __getstate__(self) -> dict[str, Any]:
        memory = ("tree", "_kept", "_snapshots", "_one_thread")
        return {k: v for k, v in super().__getstate__().items() if k not in memory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()


class SnapshotConstraint(TreeConstraint[S]):
    """Snapshots that are values: a text's is made from its parent's, which stays."""

    @abstractmethod
    def _root(self) -> S:
        """Return the snapshot of the empty text."""

    @abstractmethod
    def _extend(self, snapshots: Sequence[S], symbols: Sequence[int]) -> list[S]:
        """Return the snapshots after one admitted byte each."""

    def _at(self, nodes: IntArray) -> list[S]:
        """Return the snapshots of nodes, made from their nearest ancestors that are held."""
        held, tree = self._snapshots, self.tree
        if 0 not in held:
            held[0] = self._root()
        wanted = nodes.tolist()
        wanted_set = set(wanted)
        missing: dict[int, set[int]] = {}  # depth -> nodes, with the ancestors it takes
        for node in wanted:
            depth = int(tree.depth[node])
            while node not in held and node not in missing.setdefault(depth, set()):
                missing[depth].add(node)
                node, depth = int(tree.parent[node]), depth - 1
        passing: dict[int, S] = {}  # made on the way to a wanted node
        for _, level in sorted(missing.items()):
            fresh = sorted(level)
            above = tree.parent[fresh].tolist()
            before = [passing[p] if p in passing else held[p] for p in above]
            after = self._extend(before, tree.token[fresh].tolist())
            self.reads += len(fresh)
            for snapshot in passing.values():
                self._discard(snapshot)
            passing = {}
            for node, snapshot in zip(fresh, after, strict=True):
                (held if node in wanted_set else passing)[node] = snapshot
        for node in wanted:
            held.move_to_end(node)
        return [held[node] for node in wanted]


def distinct(values: torch.Tensor) -> tuple[IntArray, torch.Tensor]:
    """Return distinct values on the host, and for each place the number of its value."""
    distinct, inverse = np.unique(values.cpu().numpy(), return_inverse=True)
    return distinct, torch.from_numpy(inverse.reshape(-1))
