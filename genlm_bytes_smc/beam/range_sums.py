"""Masses of ranges of rows, on a torch device: the trie's arrays there, gathers and sums.

The host says how long every range is (`on_host`, `count`), so that nothing has to wait for the
device to size an array. Ranges are laid end to end: one gather, and one segmented sum (on CUDA
one block a segment, in a fixed order). Ranges and rows are taken `flat_limit` probabilities at a
time, at some 60 bytes of scratch each.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.beam.symbols import N_BYTES
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.devices import send
from genlm_bytes_smc.lm.rows import RowStore

FLAT_LIMIT = 1 << 22
"""Probabilities that one gather reads at most (unless one range alone has more)."""


class Cut(NamedTuple):
    """Positions that are no text: the others as a mask, on both sides; and themselves."""

    on_host: npt.NDArray[np.bool_]  # bool[T]
    text: torch.Tensor  # bool[T]
    positions: torch.Tensor  # int64[number cut]


class ChildMasses(NamedTuple):
    """What `next_block` summed up for a state, for the `advance` that mostly follows.

    Kept for the last two states; some 20 MB for 1,024 lanes of ten candidates.

    Attributes:
        logw: of the state, which names it.
        cut: the cut it was summed under, as bytes.
        root: float64[rows + 1, 257], mass of each first byte, and of the cut last, in each
            distinct row that a candidate at the root has; then a row of zeros.
        row: int64[N, C], a root candidate's row of `root`; the last for the others.
        inner: float64[G], masses of all children of the candidates inside a token.
        skip: int64[N, C], what to add to such a child's node to find it in `inner`.
    """

    logw: weakref.ref[torch.Tensor]
    cut: bytes
    root: torch.Tensor
    row: torch.Tensor
    inner: torch.Tensor
    skip: torch.Tensor


class RangeSums:
    """The trie of a store, on the host for plans and on the device for sums over its rows.

    Args:
        store: the rows.
        flat_limit: how many probabilities to gather at once.

    Attributes:
        lo, ends, length, first, fan, below, longest: int64[M] on the host: a node's first
            position, how many tokens end there, how many go through it, its first child (and
            one more), its number of children, the tokens below it, its longest child's.
        root_length: int64[256] on the host, tokens that begin with each byte.
        order: int64[T] on the host, token ids by position.
        d_lo, d_length, d_first, d_byte: the same on the device, and the byte into each node.
        d_edges: int64[M - 1] on the device, parent and byte of each node as one number.
        d_root_length, d_root_byte: of the root's children, on the device.
    """

    def __init__(self, store: RowStore, flat_limit: int) -> None:
        self.store = store
        self.device = store.engine.device
        self.flat_limit = flat_limit
        self._cut = lru_cache(maxsize=16)(self._make_cut)
        trie = store.trie
        lo, hi, ends, parent, byte, first = (
            a.astype(np.int64)
            for a in (trie.lo, trie.hi, trie.ends, trie.parent, trie.byte, trie.first_child)
        )
        length = hi - lo
        fan = np.diff(first)
        root = slice(1, 1 + fan[0])  # children of node 0
        # For plans: per node, its first position, how many tokens end there and below it,
        # its number of children, and the longest range among them.
        self.lo, self.ends, self.length, self.first, self.fan = lo, ends, length, first, fan
        self.below = length - ends
        self.longest = np.zeros(len(trie), dtype=np.int64)
        np.maximum.at(self.longest, parent[1:], length[1:])
        self.root_length = np.zeros(N_BYTES, dtype=np.int64)
        self.root_length[byte[root]] = length[root]
        self.order = trie.order.astype(np.int64)
        # On the device. Nodes are in order of (parent, byte), so `edges` is sorted.
        self.d_lo, self.d_length, self.d_first, self.d_byte, self.d_edges = (
            torch.from_numpy(a).to(self.device)
            for a in (lo, length, first, byte, parent[1:] * N_BYTES + byte[1:])
        )
        self.d_root_length = self.d_length[root]
        self.d_root_byte = self.d_byte[root]

    def mask(self, cut: IntArray) -> Cut | None:
        """Positions that are no text as masks; None if there are none."""
        return self._cut(cut.tobytes()) if len(cut) else None

    def _make_cut(self, cut: bytes) -> Cut:
        positions = np.frombuffer(cut, dtype=np.int64).copy()
        text = np.ones(self.store.trie.n_tokens, dtype=bool)
        text[positions] = False
        return Cut(text, send(text, self.device), send(positions, self.device))

    def values(
        self,
        slot: torch.Tensor,
        start: torch.Tensor,
        count: torch.Tensor,
        total: int,
        cut: Cut | None,
        length: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Probabilities at positions start .. start + count of rows `slot`, end to end.

        Args:
            slot, start, count: int64[m].
            total: sum of `count`.
            cut: positions that read 0.
            length: int64[m], if given, how many of the `count` are meant; the rest read 0.

        Returns:
            float64[total].
        """
        tokens = self.store.trie.n_tokens
        owner = torch.repeat_interleave(count, output_size=total)
        first = count.cumsum(0) - count
        place = torch.arange(total, device=self.device)
        index = (slot * tokens + start - first)[owner].add_(place)  # into all rows, flat
        keep = None
        if length is not None:
            keep = place < (first + length)[owner]
            index = torch.where(keep, index, 0)  # what is not meant may be beyond the rows
        if cut is not None:
            text = cut.text[index % tokens]
            keep = text if keep is None else text.logical_and_(keep)
        values = self.store.probs.view(-1)[index]
        return values if keep is None else torch.where(keep, values, 0.0)

    def range_sums(
        self,
        slot: torch.Tensor,
        start: torch.Tensor,
        length: torch.Tensor,
        bound: torch.Tensor,
        on_host: IntArray,
        cut: Cut | None,
    ) -> torch.Tensor:
        """Masses of ranges start .. start + length of rows `slot`: float64[m].

        `bound` int64[m], on both sides, is at least `length`: what the host knows of it.
        """
        sums = [
            segment_sums(
                self.values(
                    slot[i], start[i], bound[i], int(on_host[i].sum()), cut, length=length[i]
                ),
                bound[i],
            )
            for i in chunks(on_host, self.flat_limit)
        ]
        return sums[0] if len(sums) == 1 else torch.cat(sums)

    def children(self, node: torch.Tensor, byte: torch.Tensor) -> torch.Tensor:
        """Return the child of each node along each byte; 0 if there is none."""
        edge = node * N_BYTES + byte
        found = torch.searchsorted(self.d_edges, edge).clamp(max=len(self.d_edges) - 1)
        return torch.where(self.d_edges[found] == edge, found + 1, 0)

    def root_masses(self, slots: torch.Tensor, cut: Cut | None) -> torch.Tensor:
        """Mass of each first byte, and of the cut, in rows `slots` [m]; and a row of zeros.

        Returns:
            float64[m + 1, 257].
        """
        mass = torch.zeros((len(slots) + 1, N_BYTES + 1), dtype=torch.float64, device=self.device)
        tokens = self.store.trie.n_tokens
        for i in chunks(np.full(len(slots), tokens), self.flat_limit):
            rows = self.store.probs[slots[i]]
            if cut is not None:
                mass[:-1][i, N_BYTES] = rows[:, cut.positions].sum(dim=1)
                rows.mul_(cut.text)
            sums = segment_sums(rows.view(-1), self.d_root_length.repeat(len(rows)))
            mass[:-1][i].index_copy_(1, self.d_root_byte, sums.view(len(rows), -1))
        return mass


def segment_sums(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return sums of consecutive segments: float64[m] of float64[sum of lengths]."""
    # unsafe: do not look at the lengths, which would be a sync.
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True, initial=0.0)


def chunks(sizes: IntArray, limit: int) -> Iterator[slice]:
    """Consecutive slices of `sizes` that sum to at most `limit` each, or hold one entry."""
    ends = sizes.cumsum()
    start = 0
    while start < len(sizes):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + limit, side="right")))
        yield slice(start, stop)
        start = stop
