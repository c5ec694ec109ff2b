"""The observation table (Angluin 1987): which texts count as one state of the automaton.

Two texts lead to one state exactly if the same suffixes are admitted after both (Nerode). That
is approximated: their masks (what may stand next) must be equal, and some suffixes be admitted
equally far. A row is a text; the columns of a row are the suffixes of its mask; an entry is how
many symbols of the suffix are admitted. Merging texts by the beginnings of what may follow them
is the k-tails method (Biermann & Feldman 1972).

Suffixes that end somewhere are worth most: they hold what a text still owes, closing brackets
and required keys included. So they are taken from random walks to an end, and from known texts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from genlm_bytes_smc.constraints.learning.membership_oracle import (
    MembershipOracle,
    RandomWalks,
    Symbols,
    Walk,
    bytes_in,
    grouped,
    shortest_first,
)
from genlm_bytes_smc.constraints.matcher import END_BIT

_WALKS = 32
_FROM_HERE = 4  # walks from the first text that a mask is met at
_GROWN = 4  # times `tests` suffixes a mask has at most, with those that `add` was given
_FEW = 0.002  # share of all calls that one state may take to look at each byte by itself


class ObservationTable:
    """Rows of texts, filled by asking; no question is asked twice.

    Args:
        oracle: the membership oracle.
        texts: known texts, whole or not; what the constraint does not admit of them is cut.
        tests: most suffixes that a mask begins with.
        seed: of the random walks.

    Attributes:
        walks: the random walks, with the whole texts they found.
        most: how many suffixes of a mask count; None: all. Fewer make fewer states.
    """

    def __init__(
        self, oracle: MembershipOracle, texts: Iterable[bytes], tests: int, seed: int
    ) -> None:
        self.oracle = oracle
        self.walks = RandomWalks(oracle, seed)
        self.most: int | None = None
        self._tests = tests
        self._met: dict[int, dict[Symbols, None]] = {}  # suffixes that walks met, by mask
        self._suffixes: dict[int, list[Symbols]] = {}
        self._rows: dict[bytes, tuple[bytes, int, list[int]]] = {}
        self._first: dict[int, bytes] = {}
        for text in texts:
            self._learn(self.walks.spelled(text))
        for _ in range(_WALKS):
            self._learn(self.walks.from_root())

    def row(self, text: bytes) -> tuple[bytes, Symbols]:
        """Return the bytes that are forced after a text, and the row of the text with them.

        The first number of a row is the mask; 0 for a text that cannot be followed.
        """
        matcher = None
        if text not in self._rows:
            matcher = self.oracle.read(text)
            found = (b"", 0) if matcher is None else self.oracle.read_forced(matcher)
            self._rows[text] = *found, []
        forced, mask, entries = self._rows[text]
        if not mask or mask == END_BIT:
            return forced, (mask,)
        if mask not in self._suffixes:
            self._suffixes[mask] = self._chosen(mask, matcher)
        missing = self._suffixes[mask][len(entries) :]
        if missing and matcher is None:
            matcher = self.oracle.read(text + forced)
        entries += [self.oracle.admits(matcher, suffix) for suffix in missing]
        return forced, (mask, *entries[: self.most])

    def ways(self, text: bytes, mask: int) -> list[Symbols]:
        """Return the bytes that may follow a text, grouped by the rows they lead to.

        A few bytes are each a way of their own. Of many, those with one row are one way, as
        it is for the first text of this mask.
        """
        allowed = bytes_in(mask)
        price = len(allowed) * (2 + self._tests)
        if len(allowed) < 3 or price <= _FEW * self.oracle.max_calls:
            return [(b,) for b in allowed]
        first = self._first.setdefault(mask, text)
        return grouped(allowed, lambda byte: self.row(first + bytes([byte])))

    def add(self, mask: int, suffix: Symbols) -> bool:
        """Add a suffix to a mask; return whether it is new and there was room."""
        suffixes = self._suffixes.setdefault(mask, [])
        if suffix in suffixes or len(suffixes) >= _GROWN * self._tests:
            return False
        suffixes.append(suffix)
        return True

    def _chosen(self, mask: int, matcher: Any) -> list[Symbols]:
        """Choose the suffixes of a mask: at most `tests` of those met, evenly spread by length.

        Args:
            mask: the mask.
            matcher: one that has it, to walk from if few suffixes were met.
        """
        met = self._met.get(mask, {})
        for _ in range(_FROM_HERE if len(met) < self._tests else 0):
            met[tuple(symbol for symbol, _ in self.walks.draw(matcher))] = None
        items, most = sorted(met, key=shortest_first), self._tests
        if len(items) <= most or most == 1:
            return items[:most]
        return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]

    def _learn(self, walk: Walk) -> None:
        symbols = tuple(symbol for symbol, _ in walk)
        for at, (_, mask) in enumerate(walk):
            if mask & (mask - 1):
                self._met.setdefault(mask, {})[symbols[at:]] = None
