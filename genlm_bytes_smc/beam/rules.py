"""How lanes prune and heal, and which bytes healing could read, as far as the trie decides it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.beam.state import N_BYTES, BoolArray
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.trie import TokenTrie

HEAL_RESERVE = 5e-5
"""Share of a row set aside for bytes that only healing can read.

What such bytes weigh exactly would cost LM rows for bytes that are mostly never read. So they
share this much of the row, in proportion to how likely the best candidate's row holds a token to
begin with them (see `ByteLanes.logp_next`).
"""

NEVER = 1 << 60  # more splits than there can be


class Span(NamedTuple):
    """What the trie knows from one position of the partial token on.

    Attributes:
        ends: positions at which a token that begins here may end, ascending.
        node: where the rest of the partial token leads, -1 if no token begins like it.
    """

    ends: list[int]
    node: int


class Rescues:
    """The ways to spell a token in flight anew, and the bytes that healing could read then.

    Healing ends a token after the first k bytes of the partial one, and has to spell the rest
    from tokens, the last of which stays in flight and reads the next byte. Position p means that
    a token ends after p bytes of the partial one; a *split* is a token that ends after the first.

    Attributes:
        max_backoff, max_splits: as in `BeamParams`.
        line_of: int32[nodes], line of `lines` for a node whose bytes have been looked up, or -1.
        lines: bool[R, 256].
    """

    def __init__(
        self,
        trie: TokenTrie,
        cut: tuple[int, ...],
        max_backoff: int | None,
        max_splits: int | None,
    ) -> None:
        self.max_backoff, self.max_splits = max_backoff, max_splits
        self._trie, self._cut = trie, cut
        self._edges = lru_cache(maxsize=1024)(self._edges_of)
        self._known = 0
        self.line_of = np.full(len(trie), -1, dtype=np.int32)
        self.lines = np.zeros((64, N_BYTES), dtype=bool)

    def of(self, nodes: IntArray) -> BoolArray:
        """Return the bytes that healing could read in each lane, bool[N, 256].

        Args:
            nodes: int64[N, C]; at the root (0) and in empty places (-1) nothing is in flight.
        """
        self.learn(nodes)
        out = np.zeros((len(nodes), N_BYTES), dtype=bool)
        lane, place = np.nonzero(nodes > 0)
        np.logical_or.at(out, lane, self.lines[self.line_of[nodes[lane, place]]])
        return out

    def learn(self, nodes: IntArray) -> None:
        """Look up the lines of these nodes (0 and negative ones are ignored)."""
        nodes = nodes[nodes > 0]
        for node in nodes[self.line_of[nodes] < 0].tolist():
            if self.line_of[node] < 0:
                if self._known == len(self.lines):
                    self.lines = np.concatenate([self.lines, np.zeros_like(self.lines)])
                self.lines[self._known] = self._rescuable(node)
                self.line_of[node] = self._known
                self._known += 1

    def _rescuable(self, node: int) -> BoolArray:
        """Return which bytes healing could read from a node, bool[256]."""
        partial = self._trie.spell(node)
        out = np.zeros(N_BYTES, dtype=bool)
        if self.max_splits is None and self._single_bytes:  # any rest can be spelled then
            out[:] = bool(self.first_ends(self.spans(partial, 1), len(partial)))
            return out
        found = self.spans(partial)
        firsts = self.first_ends(found, len(partial))
        fewest = [0 if p in firsts else NEVER for p in range(len(found))]  # splits before p
        for p, span in enumerate(found):
            for q in span.ends if fewest[p] < NEVER else ():
                fewest[q] = min(fewest[q], fewest[p] + 1)
        most = NEVER - 1 if self.max_splits is None else self.max_splits
        for span, splits in zip(found, fewest, strict=True):
            if splits <= most and span.node >= 0:
                out[self._edges(span.node)] = True
        return out

    def spans(self, partial: bytes, count: int | None = None) -> list[Span]:
        """Return the span of each position 0..len(partial), or of the first `count`."""
        out = []
        for start in range(len(partial) + 1 if count is None else count):
            node, found = 0, []
            for at in range(start, len(partial)):
                node = self._trie.child(node, partial[at])
                if node < 0:
                    break
                if self._ends(node):
                    found.append(at + 1)
            out.append(Span(found, node))
        return out

    def first_ends(self, found: list[Span], length: int) -> list[int]:
        """Return where the first token of `length` bytes in flight may end, the longest first."""
        least = 1 if self.max_backoff is None else max(1, length - self.max_backoff)
        return [k for k in reversed(found[0].ends) if k >= least]

    def splits_after(self, found: list[Span], byte: int) -> list[int]:
        """Count the fewest splits with which the rest from each position, and `byte`, are read."""
        fewest = [NEVER] * len(found)
        for p in range(len(found) - 1, -1, -1):
            if found[p].node >= 0 and byte in self._edges(found[p].node):
                fewest[p] = 0
            else:
                fewest[p] = min([NEVER, *(fewest[q] + 1 for q in found[p].ends)])
        return fewest

    @cached_property
    def _single_bytes(self) -> bool:
        """Whether each byte is a token that is text, as in most vocabularies."""
        nodes = [self._trie.child(0, byte) for byte in range(N_BYTES)]
        return all(node >= 0 and self._ends(node) for node in nodes)

    def _ends(self, node: int) -> bool:
        """Return whether a token that is text ends at `node`."""
        first = int(self._trie.lo[node])
        last = first + int(self._trie.ends[node])
        return last - first > sum(first <= c < last for c in self._cut)

    def _edges_of(self, node: int) -> npt.NDArray[np.uint8]:
        """Bytes on the edges below `node` under which a token that is text ends."""
        trie = self._trie
        below = slice(int(trie.first_child[node]), int(trie.first_child[node + 1]))
        lo, hi = trie.lo[below], trie.hi[below]
        inside = sum(((lo <= c) & (c < hi)).astype(np.int64) for c in self._cut)
        return trie.byte[below][hi - lo > inside]


@dataclass(frozen=True, eq=False)
class Rules:
    """How lanes of one model prune and heal, as kernels take it.

    Attributes:
        in_prompt: whether end-of-sequence tokens are ordinary tokens (prompt) or ends.
        literal: in a prompt, whether special tokens are left out, so that text which looks
            like one is spelled from ordinary tokens.
        cut: sorted int64[c], trie positions of the tokens that are no text.
        k: most candidates kept, -1 for all.
        log_threshold: log share below which candidates and extensions are dropped or thinned.
        random: whether pruning is unbiased.
        heals: whether dead lanes are healed.
        rescues: bytes that healing could read, and its limits.
    """

    in_prompt: bool
    literal: bool
    cut: IntArray
    k: int
    log_threshold: float
    random: bool
    heals: bool
    rescues: Rescues

    @property
    def share(self) -> float:
        """Share set aside for rescues of each row of a lane that dropped mass; 0: no healing."""
        return HEAL_RESERVE if self.heals else 0.0
