"""Constraints whose state is the text that was read: a node of a prefix tree a distinct text.

Where states cannot be listed beforehand (parsers, weighted forward vectors, any Python
function), a state is the number of a node in a prefix tree of byte strings, so lanes that
have read the same bytes share it. A subclass may hold something at a node (a snapshot) up to a
limit; one that was dropped is made again from the bytes. Host bookkeeping only: the arithmetic
stays with the subclass.

    tree       ContextTree    a node is (parent, byte): some 200 bytes, until `keep` drops it
    snapshots  node -> value  at most `max_states` between calls, least recently used go first
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from genlm_bytes_smc.alphabet import N_BYTES, N_SYMBOLS, Context
from genlm_bytes_smc.checks import check_count
from genlm_bytes_smc.constraints.base import DEAD, BoolArray, ByteConstraint, IntArray
from genlm_bytes_smc.lm.contexts import ContextTree, OneThread

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


class TreeConstraint(ByteConstraint):
    """A constraint over prefix-tree states; subclasses say what a snapshot is, if they have any.

    Args:
        device: where weights are returned (None: the CPU).
        max_states: snapshots held between calls; of texts, where only contexts are asked about,
            four times as many.

    Attributes:
        reads: how many bytes were read into snapshots; one a distinct text as long as none
            had to be dropped.
    """

    _transient = ByteConstraint._transient | {"tree", "_kept", "_snapshots", "_one_thread"}

    def __init__(self, device: torch.device | str | None, max_states: int) -> None:
        super().__init__(device)
        check_count("max_states", max_states, 1)
        self.max_states = max_states

    @abstractmethod
    def _admitted(self, nodes: IntArray, symbols: IntArray) -> BoolArray:
        """Return which live nodes may read their bytes: int64[m], int64[m] -> bool[m]."""

    @abstractmethod
    def _rows(self, nodes: IntArray) -> torch.Tensor:
        """Return `block` for distinct live nodes: int64[m] -> float64[m, 257] on the device."""

    def _discard(self, snapshot: Any) -> None:
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
            self._kept.ids = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *kept]))
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
        while len(held) > self.max_states:
            node = next(iter(held))
            if node == 0:
                held.move_to_end(0)
            else:
                self._discard(held.pop(node))

    def _forget(self) -> None:
        super()._forget()
        self._one_thread = OneThread(_BUSY)
        self.tree = ContextTree()
        self._kept = _Kept()
        self.tree.track(self._kept)
        self._snapshots: OrderedDict[int, Any] = OrderedDict()
        self._lent = False
        self.reads = 0


def distinct(values: torch.Tensor) -> tuple[IntArray, torch.Tensor]:
    """Return distinct values on the host, and for each place the number of its value."""
    distinct, inverse = np.unique(values.cpu().numpy(), return_inverse=True)
    return distinct, torch.from_numpy(inverse.reshape(-1))
