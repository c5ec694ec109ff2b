"""Any Python function of the text as a constraint."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Self

import numpy as np
import torch

from genlm_bytes_smc.alphabet import EOS_COLUMN, N_BYTES
from genlm_bytes_smc.constraints.base import BoolArray, ConstraintError, FloatArray, IntArray
from genlm_bytes_smc.constraints.tree import (
    MAX_SNAPSHOTS,
    SnapshotConstraint,
)

Weight = bool | float


class BytePredicate(SnapshotConstraint[bytes]):
    """A whole text is weighed by a function; a prefix by another, or not at all.

    A function returns a bool (True is log weight 0, False is -inf) or a log weight in nats.
    Each is called once for a text it is asked about, for as long as the text is remembered.

    Args:
        fn: weighs whole texts.
        prefix_fn: weighs prefixes, the empty one included. A prefix of weight zero ends
            everything that begins with it. Without it every prefix has log weight 0; with it
            a row of next-byte weights takes 256 calls.
        device: where weights are returned (None: the CPU).
        max_states: texts held as `bytes` between calls.

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
        self.fn = fn
        self.prefix_fn = prefix_fn
        self._complete: dict[int, float] = {}
        self._prefix: dict[int, float] = {}
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

    def _root(self) -> bytes:
        return b""

    def _extend(self, snapshots: Sequence[bytes], symbols: Sequence[int]) -> list[bytes]:
        return [text + bytes([byte]) for text, byte in zip(snapshots, symbols, strict=True)]

    def _admitted(self, nodes: IntArray, symbols: IntArray) -> BoolArray:
        if self.prefix_fn is None:
            return np.ones(len(nodes), dtype=np.bool_)
        children = self.tree.children(nodes, symbols)
        admitted: BoolArray = self._prefixes(children) > -math.inf
        return admitted

    def _rows(self, nodes: IntArray) -> torch.Tensor:
        rows = np.zeros((len(nodes), N_BYTES + 1))
        texts = self._at(nodes)
        for row, node, text in zip(rows, nodes.tolist(), texts, strict=True):
            if node not in self._complete:
                self._complete[node] = _weigh(self.fn, text, "fn")
            row[EOS_COLUMN] = self._complete[node]
            if self.prefix_fn is not None:
                longer = [text + bytes([b]) for b in range(N_BYTES)]
                row[:N_BYTES] = [_weigh(self.prefix_fn, t, "prefix_fn") for t in longer]
        return torch.from_numpy(rows - self._prefixes(nodes)[:, None]).to(self.device)

    def _prefixes(self, nodes: IntArray) -> FloatArray:
        """Return the prefix weight of each live node."""
        if self.prefix_fn is None:
            return np.zeros(len(nodes))
        unknown = np.unique(nodes[[n not in self._prefix for n in nodes.tolist()]])
        for node, text in zip(unknown.tolist(), self._at(unknown), strict=True):
            self._prefix[node] = _weigh(self.prefix_fn, text, "prefix_fn")
        return np.array([self._prefix[n] for n in nodes.tolist()])

    def _freed(self, nodes: IntArray) -> None:
        for node in nodes.tolist():
            self._complete.pop(node, None)
            self._prefix.pop(node, None)

    def _copy(self, device: torch.device) -> Self:
        new = super()._copy(device)
        new._complete, new._prefix = {}, {}
        return new

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
