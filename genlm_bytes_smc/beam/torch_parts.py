"""Parts of `kernels_torch`: sums over ranges of rows, pruning, and what the host knows of states.

The host says how long every range is (`on_host`, `count`), so that nothing has to wait for the
device to size an array. Ranges are laid end to end: one gather, and one segmented sum (on CUDA
one block a segment, in a fixed order). Ranges and rows are taken `flat_limit` probabilities at a
time, at some 60 bytes of scratch each.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.weak import WeakIdKeyDictionary

from genlm_bytes_smc.beam.state import N_BYTES, BeamState
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


class ChildPlan(NamedTuple):
    """Whose children `next_block` sums: all on the host.

    Masses stand one after the other: those of the root's children in each distinct row that a
    candidate at the root has, then those of the children of each candidate inside a token.

    Attributes:
        at_root: int64[r], flat places of the candidates at the root.
        rows: int64[R], slots of their distinct rows.
        row_of: int64[r], which of them each has.
        inner, node, begin: int64[m], flat places and nodes of the candidates inside a token that
            have children, and where the masses of these begin.
        skip: int64[N, C], what to add to a child's node to find its mass.
    """

    at_root: IntArray
    rows: IntArray
    row_of: IntArray
    inner: IntArray
    node: IntArray
    begin: IntArray
    skip: IntArray


class ChildMasses(NamedTuple):
    """What `next_block` summed up for a state, for the `advance` that mostly follows.

    Kept for the last two states; some 20 MB for 1,024 lanes of ten candidates.

    Attributes:
        logw: of the state, which names it.
        cut: the cut it was summed under, as bytes.
        masses: float64[G], of all children of all candidates, see `ChildPlan`.
        skip: int64[N, C], as there, on the device.
    """

    logw: weakref.ref[torch.Tensor]
    cut: bytes
    masses: torch.Tensor
    skip: torch.Tensor


class RangeSums:
    """The trie of a store, on the host for plans and on the device for sums over its rows.

    Attributes:
        lo, ends, length, first, fan, below, longest: int64[M] on the host: per node its first
            position, how many tokens end there and go through it, its first child (one more),
            its number of children, the tokens below it, the longest range among its children.
        root_length: int64[256] on the host, tokens that begin with each byte.
        order: int64[T] on the host, token ids by position.
        d_lo, d_length, d_first, d_byte: the same on the device, and the byte into each node.
        d_edges: int64[M - 1] on the device, parent and byte of each node as one number.
        d_root_length, d_root_byte: of the root's children, on the device.
    """

    def __init__(self, store: RowStore, flat_limit: int) -> None:
        self.store, self.device, self.flat_limit = store, store.engine.device, flat_limit
        self._cut = lru_cache(maxsize=16)(self._make_cut)
        trie = store.trie
        lo, hi, ends, parent, byte, first = (
            a.astype(np.int64)
            for a in (trie.lo, trie.hi, trie.ends, trie.parent, trie.byte, trie.first_child)
        )
        length = hi - lo
        fan = np.diff(first)
        root = slice(1, 1 + fan[0])  # children of node 0
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
        self.d_root_length, self.d_root_byte = self.d_length[root], self.d_byte[root]

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
        sums = []
        for i in chunks(on_host, self.flat_limit):
            total = int(on_host[i].sum())
            values = self.values(slot[i], start[i], bound[i], total, cut, length=length[i])
            sums.append(segment_sums(values, bound[i]))
        return sums[0] if len(sums) == 1 else torch.cat(sums)

    def children(self, node: torch.Tensor, byte: torch.Tensor) -> torch.Tensor:
        """Return the child of each node along each byte; 0 if there is none."""
        edge = node * N_BYTES + byte
        found = torch.searchsorted(self.d_edges, edge).clamp(max=len(self.d_edges) - 1)
        return torch.where(self.d_edges[found] == edge, found + 1, 0)

    def plan(self, nodes: IntArray, slots: IntArray) -> ChildPlan:
        """Plan for candidates at `nodes` int64[N, C], -1 for none, with `slots` int64[N * C]."""
        flat = nodes.ravel()
        at_root = np.flatnonzero(flat == 0)
        rows, row_of = _distinct(slots[at_root])
        inner = np.flatnonzero(flat > 0)
        inner = inner[self.fan[flat[inner]] > 0]
        node = flat[inner]
        fan = self.fan[node]
        begin = len(rows) * self.fan[0] + fan.cumsum() - fan
        skip = np.zeros(nodes.shape, dtype=np.int64)
        skip.reshape(-1)[at_root] = row_of * self.fan[0] - self.first[0]
        skip.reshape(-1)[inner] = begin - self.first[node]
        return ChildPlan(at_root, rows, row_of, inner, node, begin, skip)

    def root_masses(
        self, slots: torch.Tensor, cut: Cut | None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Sum rows `slots` [m] by first byte: float64[m + 1, 257], with the mass of the cut and a
        row of zeros last; and the masses of the root's children, row after row, in parts."""
        parts = []
        mass = torch.zeros((len(slots) + 1, N_BYTES + 1), dtype=torch.float64, device=self.device)
        tokens = self.store.trie.n_tokens
        for i in chunks(np.full(len(slots), tokens), self.flat_limit):
            rows = self.store.probs[slots[i]]
            if cut is not None:
                mass[:-1][i, N_BYTES] = rows[:, cut.positions].sum(dim=1)
                rows.mul_(cut.text)
            sums = segment_sums(rows.view(-1), self.d_root_length.repeat(len(rows)))
            mass[:-1][i].index_copy_(1, self.d_root_byte, sums.view(len(rows), -1))
            parts.append(sums)
        return mass, parts

    def add_inner(
        self,
        out: torch.Tensor,
        plan: torch.Tensor,
        below: IntArray,
        fan: IntArray,
        scale: torch.Tensor,
        cut: Cut | None,
    ) -> list[torch.Tensor]:
        """Add to `out` [N, 257] what candidates inside a token give to each next byte.

        Args:
            out: added to.
            plan: int64[5, m]: flat places, nodes, slots, and the next two.
            below, fan: int64[m], tokens below each node, and its number of children.
            scale: float64[N, C], what each candidate's probabilities are times.
            cut: positions that read 0.

        Returns:
            The masses of all their children, one after the other, in parts.
        """
        masses = []
        for i in chunks(below, self.flat_limit):
            where, node, slot, d_below, d_fan = plan[:, i]
            children = int(fan[i].sum())
            owner = torch.repeat_interleave(d_fan, output_size=children)
            first = self.d_first[node]
            skip = first - (d_fan.cumsum(0) - d_fan)
            child = torch.arange(children, device=self.device) + skip[owner]
            # The children's ranges follow each other, from the first child's on.
            values = self.values(slot, self.d_lo[first], d_below, int(below[i].sum()), cut)
            mass = segment_sums(values, self.d_length[child])
            column = (where // scale.shape[1] * (N_BYTES + 1))[owner] + self.d_byte[child]
            # Accumulating `index_put_` sorts: unlike `scatter_add_`, it adds in a fixed order.
            share = scale.reshape(-1)[where][owner] * mass
            out.view(-1).index_put_((column,), share, accumulate=True)
            masses.append(mass)
        return masses


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


def _distinct(slots: IntArray) -> tuple[IntArray, IntArray]:
    """Return the distinct values and each one's place among them; small integers, not sorted."""
    seen = np.zeros(int(slots.max(initial=-1)) + 1, dtype=bool)
    seen[slots] = True
    return np.flatnonzero(seen), (np.cumsum(seen) - 1)[slots]


# -- pruning ------------------------------------------------------------------------------


def most_of(state: BeamState, k: int | None) -> int:
    """Return how many candidates a lane can keep."""
    width = int(state.logw.shape[1])
    return width if k is None else min(k, width)


class Kept(NamedTuple):
    """What a pruning keeps, best first.

    Attributes:
        pick: int64[N, K], which candidates.
        logw: float64[N, K], their weights, nats; -inf for none.
        dropped: float64[N], log of the mass that is gone, nats.
    """

    pick: torch.Tensor
    logw: torch.Tensor
    dropped: torch.Tensor


def keep_largest(logw: torch.Tensor, most: int, log_threshold: float) -> Kept:
    """Keep the `most` largest weights float64[N, C] above the threshold's share of their lane; the
    largest in any case."""
    ranked, order = torch.sort(logw, dim=1, descending=True, stable=True)
    total = torch.logsumexp(ranked, dim=1, keepdim=True)
    share = ranked - total  # NaN in an empty lane, where nothing compares with it
    keep = share > log_threshold
    keep[:, :1] = True
    keep[:, most:] = False
    lost = torch.where(keep, 0.0, share.exp()).sum(dim=1)
    dropped = torch.where(lost > 0, total[:, 0] + lost.log(), -torch.inf)
    weight = torch.where(keep, ranked, -torch.inf)
    return Kept(order[:, :most], weight[:, :most], dropped)


def keep_unbiased(logw: torch.Tensor, most: int, u: torch.Tensor, device: torch.device) -> Kept:
    """`most` of weights float64[N, C] on `device`, by optimal resampling with uniforms `u` [N].

    (Fearnhead & Clifford 2003, section 3.)
    """
    width = logw.shape[1]
    nothing = torch.full((len(logw),), -torch.inf, dtype=torch.float64, device=device)
    ranked, order = torch.sort(logw, dim=1, descending=True, stable=True)
    if most == width:
        return Kept(order, ranked, nothing)
    count = (ranked > -torch.inf).sum(dim=1, keepdim=True)
    top = torch.where(count > 0, ranked[:, :1], 0.0)
    logp = ranked - top
    # With the `big` largest kept, c = (sum of the others) / (K - big); raise `big` until
    # the next one is below c. In logs, so that no sum of small weights comes out as zero.
    place = torch.arange(most, device=device)
    log_left = (most - place).double().log()
    rest = logp.flip(1).logcumsumexp(1).flip(1)[:, :most] - log_left
    above = logp[:, : most - 1] >= rest[:, : most - 1]
    big = above.long().cumprod(1).sum(dim=1, keepdim=True)
    log_c = rest.gather(1, big)
    # K - big survivors of the others: the ones in which the running sum of p / c passes
    # u, u + 1, u + 2 and so on.
    small = torch.arange(width, device=device) >= big
    run = torch.where(small, (logp - log_c).exp(), 0.0).cumsum(1)
    drawn = torch.searchsorted(run, u[:, None] + (place - big), right=True)
    drawn = torch.minimum(drawn, (count - 1).clamp(min=0))
    as_is = (count <= most) | (place < big)
    pick = torch.where(as_is, place, drawn)
    weight = torch.where(as_is, ranked[:, :most], top + log_c)
    return Kept(order.gather(1, pick), weight, nothing)


# -- what the host knows ------------------------------------------------------------------


class HostSide:
    """What the host knows of states' tensors; forgotten when a tensor dies.

    States are values: nobody writes into their tensors, and a state's `logw` is never
    combined with another one's `node`. That makes the tensors themselves the keys.

    Attributes:
        contexts: of `ctx` tensors, int64[N, C].
        nodes: of `logw` tensors, int64[N, C], -1 where the weight is -inf.
        log_z: of `logw` tensors, float64[N].
    """

    def __init__(self) -> None:
        self.contexts, self.nodes, self.log_z = (WeakIdKeyDictionary() for _ in range(3))

    def pairs(self, old: BeamState, new: BeamState) -> list[tuple[WeakIdKeyDictionary, Any, Any]]:
        """Return what is known on the host, and under which tensors of the two states."""
        return [
            (self.contexts, old.ctx, new.ctx),
            (self.nodes, old.logw, new.logw),
            (self.log_z, old.logw, new.logw),
        ]
