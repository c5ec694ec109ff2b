"""How a partial token can be spelled with other tokens: what the trie alone says of healing.

A partial token `partial`, of L bytes, is cut into whole tokens and a rest that some token
begins with. Dynamic programming over the positions of the cuts, from left to right, finds
the fewest tokens that end at each (and, among those, the longest last token).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.trie import TokenTrie

IntArray = npt.NDArray[np.int64]
_FAR = 1 << 40


@dataclass(frozen=True)
class Respellings:
    """The ways to spell one partial token anew.

    Attributes:
        trie: of the tokens.
        partial: the L bytes.
        splits: int64[L + 1], how many tokens after the first end before or at each position in
            the spelling with fewest; a large number where no spelling has an end there.
        begin: int64[L + 1], where the token that ends at a position begins.
        rest: int64[L + 1], trie node of the bytes from a position to the end, -1 if no token
            begins with them.
        most: the most tokens that may end after the first.
    """

    trie: TokenTrie
    partial: bytes
    splits: IntArray
    begin: IntArray
    rest: IntArray
    most: int

    @classmethod
    def of(
        cls,
        trie: TokenTrie,
        partial: bytes,
        ends: Callable[[int], bool],
        max_backoff: int | None,
        max_splits: int | None,
    ) -> Respellings:
        """Args as in `BeamParams`; `ends` says whether a token that is text ends at a node."""
        length = len(partial)
        splits = np.full(length + 1, _FAR, dtype=np.int64)
        begin, rest = np.zeros_like(splits), np.full_like(splits, -1)
        rest[length] = 0
        earliest = max(1, 0 if max_backoff is None else length - max_backoff)
        for i in range(length):
            if i > 0 and splits[i] == _FAR:
                continue
            node, cost = 0, int(splits[i]) + 1 if i else 0
            for j in range(i + 1, length + 1):
                node = trie.child(node, partial[j - 1])
                if node < 0:
                    break
                if cost < splits[j] and (i > 0 or j >= earliest) and ends(node):
                    splits[j], begin[j] = cost, i
            rest[i] = node
        most = _FAR - 1 if max_splits is None else max_splits
        return cls(trie, partial, splits, begin, rest, most)

    def tails(self) -> list[int]:
        """Trie nodes of the rests that can be read after at least one token."""
        return [int(self.rest[i]) for i in self._reached()]

    def shortest(self, reads: Callable[[int], bool]) -> list[bytes] | None:
        """Tokens, as their bytes, after which the rest and then one more byte can be read.

        Args:
            reads: whether that byte can be read at a trie node.

        Returns:
            As few tokens as can be; None if there is no such spelling.
        """
        ways = [i for i in self._reached() if reads(int(self.rest[i]))]
        if not ways:
            return None
        best = min(ways, key=lambda i: int(self.splits[i]))
        tokens, at = list[bytes](), best
        while at > 0:
            tokens.append(self.partial[self.begin[at] : at])
            at = int(self.begin[at])
        return tokens[::-1]

    def _reached(self) -> list[int]:
        reached = (self.splits <= self.most) & (self.rest >= 0)
        return list(np.flatnonzero(reached)[::-1].tolist())
