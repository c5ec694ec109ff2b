"""Constraints whose state is the text that was read: a node of a prefix tree a distinct text.

`BytePredicate` is one by itself; grammars, schemas and weighted automata are others.

Where states cannot be listed beforehand (parsers, weighted forward vectors, any Python
function), a state is the number of a node in a prefix tree of byte strings, so lanes that
have read the same bytes share it. A subclass may hold something at a node (a snapshot) up to a
limit; one that was dropped is made again from the bytes. Host bookkeeping only: the arithmetic
stays with the subclass.

    tree       ContextTree    a node is (parent, byte): some 200 bytes, until `keep` drops it
    snapshots  node -> value  at most `max_states` between calls, least recently used go first
    noted      node -> value  small things, under a name each, as long as the node is there
"""

from __future__ import annotations

import math
import numbers
from abc import abstractmethod
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from genlm_bytes_smc.alphabet import EOS_COLUMN, N_BYTES, N_SYMBOLS, Context
from genlm_bytes_smc.checks import check_count
from genlm_bytes_smc.constraints.base import (
    DEAD,
    BoolArray,
    ByteConstraint,
    ConstraintError,
    FloatArray,
    IntArray,
)
from genlm_bytes_smc.lm.contexts import ContextTree, OneThread

Weight = bool | float
MAX_SNAPSHOTS = 10_000

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

    _transient = ByteConstraint._transient | {"tree", "_snapshots", "_noted", "_one_thread"}

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
            with self.tree.pinned(np.concatenate([np.zeros(0, dtype=np.int64), *kept])):
                freed = self.tree.collect()
            for node in freed.tolist():
                if node in self._snapshots:
                    self._discard(self._snapshots.pop(node))
                for known in self._noted.values():
                    known.pop(node, None)
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
        self._snapshots: OrderedDict[int, Any] = OrderedDict()
        self._noted: defaultdict[str, dict[int, Any]] = defaultdict(dict)
        self._lent = False
        self.reads = 0


def distinct(values: torch.Tensor) -> tuple[IntArray, torch.Tensor]:
    """Return distinct values on the host, and for each place the number of its value."""
    distinct, inverse = np.unique(values.cpu().numpy(), return_inverse=True)
    return distinct, torch.from_numpy(inverse.reshape(-1))


class BytePredicate(TreeConstraint):
    """A whole text is weighed by a function; a prefix by another, or not at all.

    A function returns a bool (True is log weight 0, False is -inf) or a log weight in nats.
    Each is called once for a text it is asked about, for as long as the text is remembered.

    Args:
        fn: weighs whole texts.
        prefix_fn: weighs prefixes, the empty one included. A prefix of weight zero ends
            everything that begins with it. Without it every prefix has log weight 0; with it
            a row of next-byte weights takes 256 calls.
        device: where weights are returned (None: the CPU).
        max_states: where only contexts are asked about, a quarter of the texts remembered.

    Raises:
        ConstraintError: fn or prefix_fn is not callable, or the empty text, a prefix of every
            other, has weight zero as one.
        ValueError, TypeError: later, when a function returns NaN, +inf or no weight at all.
    """

    def __init__(
        self,
        fn: Callable[[bytes], Weight],
        prefix_fn: Callable[[bytes], Weight] | None = None,
        *,
        device: torch.device | str | None = None,
        max_states: int = MAX_SNAPSHOTS,
    ) -> None:
        for name, value in (("fn", fn), ("prefix_fn", prefix_fn)):
            if not callable(value) and (name == "fn" or value is not None):
                raise ConstraintError(f"{name} must be a function of bytes, got {value!r}")
        super().__init__(device, max_states)
        self.fn, self.prefix_fn = fn, prefix_fn
        if prefix_fn is not None and _weigh(prefix_fn, b"", "prefix_fn") == -math.inf:
            raise ConstraintError("prefix_fn gives the empty text weight zero: no text is left")

    def is_terminal_only(self) -> bool:
        """Return whether only whole texts are weighed."""
        return self.prefix_fn is None

    def log_prefix(self, state: torch.Tensor) -> torch.Tensor:
        """Log weight of each state as a prefix: int64[n] -> float64[n]."""
        if self.prefix_fn is None:
            return super().log_prefix(state)
        return self._by_node(state, lambda n: torch.from_numpy(self._prefixes(n)).to(self.device))

    def _admitted(self, nodes: IntArray, symbols: IntArray) -> BoolArray:
        if self.prefix_fn is None:
            return np.ones(len(nodes), dtype=np.bool_)
        children = self.tree.children(nodes, symbols)
        return self._prefixes(children) > -math.inf

    def _rows(self, nodes: IntArray) -> torch.Tensor:
        rows = np.zeros((len(nodes), N_SYMBOLS))
        rows[:, EOS_COLUMN] = self._weights(self.fn, "fn", nodes)
        if self.prefix_fn is not None:
            for row, node in zip(rows, nodes.tolist(), strict=True):
                longer = [self.text(node) + bytes([b]) for b in range(N_BYTES)]
                row[:N_BYTES] = [_weigh(self.prefix_fn, t, "prefix_fn") for t in longer]
        return torch.from_numpy(rows - self._prefixes(nodes)[:, None]).to(self.device)

    def _prefixes(self, nodes: IntArray) -> FloatArray:
        """Return the prefix weight of each live node."""
        if self.prefix_fn is None:
            return np.zeros(len(nodes))
        return self._weights(self.prefix_fn, "prefix_fn", nodes)

    def _weights(self, fn: Callable[[bytes], Weight], name: str, nodes: IntArray) -> FloatArray:
        """Return what a function gives the text of each live node, which is noted."""
        known = self._noted[name]
        for node in nodes.tolist():
            if node not in known:
                known[node] = _weigh(fn, self.text(node), name)
        return np.array([known[node] for node in nodes.tolist()])

    def _facts(self) -> dict[str, str]:
        named = {"fn": self.fn, "prefix_fn": self.prefix_fn}
        shown = {k: getattr(f, "__qualname__", repr(f)) for k, f in named.items() if f}
        return {**shown, "texts": str(self.n_texts)}


def _weigh(fn: Callable[[bytes], Weight], text: bytes, name: str) -> float:
    """Return the log weight that `fn` gives `text`, checked."""
    value = fn(text)
    if isinstance(value, bool | np.bool_):
        return 0.0 if value else -math.inf
    if not isinstance(value, numbers.Real):
        raise TypeError(
            f"{name}({text!r}) must return a bool or a log weight (float), got {value!r} "
            f"of type {type(value).__name__}"
        )
    weight = float(value)
    if math.isnan(weight) or weight == math.inf:
        raise ValueError(
            f"{name}({text!r}) returned {weight}; a log weight is a number of nats below +inf"
        )
    return weight
