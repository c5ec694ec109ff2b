"""Linear rows on the host, in the order of token ids, and what was summed of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.fast_path import warn_lost
from genlm_bytes_smc.lm import intake
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.trie import TokenTrie

FloatArray = npt.NDArray[np.float64]

ROUNDING = 1e-4  # how far from one a float32 row over a large vocabulary may sum
EXACT_WIDTH = 1 << 14  # tokens; rows up to this wide are always kept in float64
FAN = 257  # labels of a heavy node: one a byte, and one for tokens that end there
_HEAVY = 8  # a node is heavy if one in this many tokens is below it


class RowArrays(NamedTuple):
    """Arrays that the compiled kernels read (and `roots`, `summed`, which they fill).

    Attributes:
        probs: float32 or float64 [S, V], probabilities times a constant, by token id.
        scale: float64[S], what brings a slot's numbers to probabilities.
        roots: float64[S, H * 257], mass below each byte after each heavy node.
        summed: bool[S], whether `roots` holds a slot's masses.
        order: uint32[T], token id at each position of the trie.
        heavy: int64[H], nodes with much of the vocabulary below them, each before those below
            it, the root first.
        nest: int64[H, 3], for each: the index of the heavy node above it, the byte from there,
            and the index behind the last one below it.
        labels: uint16[V], for each token 257 h + b, where h is the index of the last heavy node
            on the way to it and b the byte after that (256: none); 257 H if it spells nothing.
        slot_of: int64[contexts + 1], slot of each context.
    """

    probs: npt.NDArray[Any]
    scale: FloatArray
    roots: FloatArray
    summed: npt.NDArray[np.bool_]
    order: npt.NDArray[np.uint32]
    heavy: IntArray
    nest: IntArray
    labels: npt.NDArray[np.uint16]
    slot_of: IntArray


class HostRows:
    """Storage of a `RowStore` whose rows live on the host.

    A row is kept as it came, exponentiated: sums over the trie gather what they need. Rows of
    up to EXACT_WIDTH tokens are kept in float64. Wider ones that come in float32 are kept in
    float32 (each probability to 1e-7 of itself, less than the rounding of the row it came
    from; sums are taken in float64), with a bias in the exponent that keeps tokens alive down
    to `intake.LOWEST` nats. The first row that comes in float64 turns the store to float64, and
    so does the first that goes lower, with a `FastPathWarning`.

    Args:
        trie: which tokens spell something, and where its nodes are.
        slots: number of rows to reserve; memory is taken as they are written.
        exact: begin in float64; None: if there are few tokens.
    """

    def __init__(self, trie: TokenTrie, slots: int, exact: bool | None = None) -> None:
        self.trie = trie
        self.width = len(trie.vocab)
        exact = starts_exact(trie) if exact is None else exact
        self._probs = np.empty((slots, self.width), dtype=np.float64 if exact else np.float32)
        self._scale: FloatArray = np.ones(slots)
        self._summed = np.zeros(slots, dtype=bool)
        self._order = trie.order.astype(np.uint32)
        self._spelled = trie.position >= 0
        self._all_spelled = bool(self._spelled.all())
        self._heavy, self._nest, self._labels = _heavy_nodes(trie)
        self._roots: FloatArray = np.empty((slots, FAN * len(self._heavy)))
        self._arrays: RowArrays | None = None
        self.used = 0  # the last slot written to; those beyond it never were

    def __len__(self) -> int:
        """Return the number of slots reserved."""
        return len(self._probs)

    @property
    def exact(self) -> bool:
        """Return whether rows are kept in float64."""
        return self._probs.dtype == np.float64

    def arrays(self, slot_of: IntArray) -> RowArrays:
        """Return what the kernels take."""
        if self._arrays is None or self._arrays.slot_of is not slot_of:
            self._arrays = RowArrays(
                self._probs, self._scale, self._roots, self._summed, self._order,
                self._heavy, self._nest, self._labels, slot_of,
            )  # fmt: skip
        return self._arrays

    def take(self, slots: IntArray, rows: torch.Tensor) -> FloatArray:
        """Keep rows of log-probabilities float[B, >= V]; what each summed to, float64[B].

        A row over just the tokens that spell something is a distribution as it comes, and
        is left as it is unless its sum is off by more than rounding. A sum that is NaN,
        infinite or zero says that the row is no distribution.
        """
        logp = rows.detach().numpy() if rows.requires_grad else rows.numpy()
        if not self.exact and logp.dtype != np.float32:
            self._make_exact()
        self.used = max(self.used, *slots.tolist())
        exact = self.exact
        take = intake.take_64 if exact else intake.take_32
        total: FloatArray
        total, low, odd = take(
            logp, slots, self._probs, self._scale, self._summed, ROUNDING
        )  # fmt: skip
        # Not normalised (their sum in float32 ends early), or a token out of range.
        if not exact and (low or (odd and not np.isfinite(total).all())):
            if low or not np.isnan(total).all():
                self._make_exact()
                total = self.take(slots, rows)
                if np.isfinite(total).all():
                    warn_lost(
                        f"a row gives a token less than {intake.LOWEST:g} nats, or is far from "
                        "normalised: rows are kept in float64 from here on, in twice the memory"
                    )
            return total
        if not self._all_spelled or logp.shape[1] > self.width:
            constant = self._scale[slots]
            total = constant * [intake.masked_total(self._probs[s], self._spelled) for s in slots]
            self._scale[slots] = _quotient(constant, total)
        elif odd:
            off = np.abs(total - 1.0) > ROUNDING
            self._scale[slots[off]] = _quotient(self._scale[slots[off]], total[off])
        return total

    def put(self, slots: IntArray, linear: torch.Tensor) -> FloatArray:
        """Keep rows of probabilities float64[B, T] in trie order; their sums, float64[B]."""
        self._make_exact()
        self.used = max(self.used, *slots.tolist())
        p = linear.numpy()
        self._probs[slots] = 0.0
        self._probs[np.ix_(slots, self.trie.order)] = p
        total: FloatArray = p.sum(axis=1)
        self._scale[slots] = _quotient(np.ones(len(slots)), total)
        self._summed[slots] = False
        return total

    def prob(self, slot: int, token: int) -> float:
        """Probability of one token."""
        return float(self._probs[slot, token] * self._scale[slot])

    def linear(self, slots: int) -> torch.Tensor:
        """Copy the first `slots` slots as probabilities float64[slots, T] in trie order."""
        rows = np.take(self._probs[:slots], self.trie.order, axis=1).astype(np.float64)
        return torch.from_numpy(rows * self._scale[:slots, None])

    def enlarge(self, slots: int) -> None:
        """Make room for `slots` slots; keep the rows where they were."""
        for name in ("_probs", "_scale", "_roots", "_summed"):
            old = getattr(self, name)
            new = np.zeros if name == "_summed" else np.empty
            grown = new((slots, *old.shape[1:]), dtype=old.dtype)
            grown[: len(old)] = old
            setattr(self, name, grown)
        self._arrays = None

    def row_bytes(self) -> int:
        """Memory of one slot, in bytes."""
        return self.width * self._probs.itemsize + 8 * FAN * len(self._heavy) + 1

    def _make_exact(self) -> None:
        if self.exact:
            return
        exact = np.empty(self._probs.shape)
        exact[: self.used + 1] = self._probs[: self.used + 1]
        self._probs = exact
        self._arrays = None


def starts_exact(trie: TokenTrie) -> bool:
    """Return whether rows over this trie are kept in float64 from the start."""
    return len(trie.vocab) <= EXACT_WIDTH


def _quotient(a: FloatArray, b: FloatArray) -> FloatArray:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return a / b


def _heavy_nodes(trie: TokenTrie) -> tuple[IntArray, IntArray, npt.NDArray[np.uint16]]:
    """Find the root and the nodes above an eighth of all tokens: `heavy`, `nest`, `labels`.

    What is above such a node is one too.
    """
    size = trie.hi - trie.lo
    big = (size * _HEAVY >= trie.n_tokens) & (size >= 512)
    big[0] = True
    found = np.flatnonzero(big)
    heavy = found[np.lexsort((found, trie.lo[found]))].astype(np.int64)  # depth first
    index = {node: i for i, node in enumerate(heavy.tolist())}
    nest = np.zeros((len(heavy), 3), dtype=np.int64)
    labels = np.full(len(trie.vocab), FAN * len(heavy), dtype=np.uint16)
    for i, node in enumerate(heavy.tolist()):
        below = (trie.lo[heavy] >= trie.lo[node]) & (trie.hi[heavy] <= trie.hi[node])
        nest[i] = index.get(int(trie.parent[node]), -1), trie.byte[node], i + below[i:].sum()
        labels[trie.order[trie.lo[node] : trie.lo[node] + trie.ends[node]]] = FAN * i + FAN - 1
        for child in range(int(trie.first_child[node]), int(trie.first_child[node + 1])):
            if child not in index:
                line = trie.order[trie.lo[child] : trie.hi[child]]
                labels[line] = FAN * i + int(trie.byte[child])
    return heavy, nest, labels
