"""The observation table (Angluin 1987): which texts count as one state of the automaton.

Two texts lead to one state exactly if the same suffixes are admitted after both (Nerode). That
is approximated: their masks (what may stand next) must be equal, and some suffixes be admitted
equally far. A row is a text; the columns of a row are the suffixes of its mask; an entry is how
many symbols of the suffix are admitted. Merging texts by the beginnings of what may follow them
is the k-tails method (Biermann & Feldman 1972).

Suffixes that end somewhere are worth most: they hold what a text still owes, closing brackets
and required keys included. So they are taken from random walks to an end, and from known texts.

The matcher of llguidance is the membership oracle; its questions are counted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

from genlm_bytes_smc.alphabet import EOS_COLUMN
from genlm_bytes_smc.constraints.matcher import END_BIT, mask_of, read_forced

Symbols = tuple[int, ...]  # bytes, and 256 for the end
Walk = list[tuple[int, int]]  # each symbol read, and the mask of what may have stood in its place

_LONGEST = 300  # bytes of a walk before it looks for the nearest end
_FEW = 8  # up to so many admitted bytes, a walk takes each for a way of its own
_CLOSINGS = 64  # suffixes that may be put together to end a walk
_KNOWN_CLOSINGS = 512
_WALKS = 32
_FROM_HERE = 4  # walks from the first text that a mask is met at
_GROWN = 4  # times `tests` suffixes a mask has at most, with those that `add` was given
_FEW_CALLS = 0.002  # share of all calls that one state may take to look at each byte by itself


@lru_cache(maxsize=4096)
def bytes_in(mask: int) -> Symbols:
    """Return the bytes that a mask admits, in order."""
    return tuple(b for b in range(EOS_COLUMN) if mask >> b & 1)


def grouped(symbols: Iterable[int], key: Callable[[int], Any]) -> list[Symbols]:
    """Group symbols by a key, in the order they come."""
    groups: dict[Any, list[int]] = {}
    for symbol in symbols:
        groups.setdefault(key(symbol), []).append(symbol)
    return [tuple(g) for g in groups.values()]


class MembershipOracle:
    """A matcher that is asked what it admits. Masks are those of `matcher.mask_of`.

    Args:
        root: a matcher that has read nothing.
        max_calls: questions after which `spent` is true. None is refused: the caller stops.
    """

    def __init__(self, root: Any, max_calls: int) -> None:
        self.root = root
        self.max_calls = max_calls
        self.calls = 0

    @property
    def spent(self) -> bool:
        """True once as many questions were asked as are allowed."""
        return self.calls >= self.max_calls

    def mask(self, matcher: Any) -> int:
        """Return the mask of what may follow."""
        self.calls += 1
        return mask_of(matcher)

    def admits(self, matcher: Any, symbols: Symbols) -> int:
        """Return how many of these symbols may follow one another."""
        self.calls += 1
        return int(matcher.validate_tokens(symbols))

    def read(self, text: bytes) -> Any | None:
        """Return a matcher that has read `text`; None where it is not admitted."""
        self.calls += 1
        matcher = self.root.deep_copy()
        done = matcher.try_consume_tokens(list(text)) == len(text)
        return matcher if done and not matcher.is_error() else None

    def read_forced(self, matcher: Any) -> tuple[bytes, int]:
        """Read on while there is but one way to go; see `matcher.read_forced`."""
        forced, mask = read_forced(matcher)
        self.calls += len(forced) + 1
        return forced, mask


class RandomWalks:
    """Texts that the constraint admits: known ones, and random walks to an end.

    Attributes:
        whole: texts that the constraint admits to the end, in the order they were found.
    """

    def __init__(self, oracle: MembershipOracle, seed: int) -> None:
        self.oracle = oracle
        self.whole: dict[bytes, None] = {}
        self._rng = random.Random(seed)
        self._ways: dict[int, list[Symbols]] = {}
        self._closings: list[Symbols] = []  # suffixes that lead to an end, shortest first

    def spelled(self, text: bytes) -> Walk:
        """Return a known text as a walk, as far as it is admitted, and remember how it ended."""
        here = self.oracle.root.deep_copy()
        walk: Walk = []
        for symbol in (*text, EOS_COLUMN):
            mask = self.oracle.mask(here)
            if not mask >> symbol & 1:
                break
            walk.append((symbol, mask))
            if symbol != EOS_COLUMN:
                here.try_consume_tokens([symbol])
        return self.remembered(walk)

    def draw(self, matcher: Any) -> Walk:
        """Draw a walk from where a matcher stands; its last symbol is 256 if it found an end."""
        here = matcher.deep_copy()
        walk: Walk = []
        mask = self.oracle.mask(here)
        while mask and len(walk) < _LONGEST and not self.oracle.spent:
            symbol = self._choose(here, mask)
            walk.append((symbol, mask))
            if symbol == EOS_COLUMN:
                return walk
            here.try_consume_tokens([symbol])
            mask = self.oracle.mask(here)
        return walk + self._closed(here, mask)

    def _choose(self, matcher: Any, mask: int) -> int:
        """Draw a way on, each as likely; many bytes with one mask after them are one way."""
        if not mask & (mask - 1):
            return mask.bit_length() - 1
        ways = self._ways.get(mask)
        if ways is None:

            def mask_after(byte: int) -> int:
                after = matcher.deep_copy()
                after.try_consume_tokens([byte])
                return self.oracle.mask(after)

            allowed = bytes_in(mask)
            key = mask_after if len(allowed) > _FEW else int
            ends = [(EOS_COLUMN,)] if mask & END_BIT else []
            ways = self._ways[mask] = ends + grouped(allowed, key)
        return self._rng.choice(self._rng.choice(ways))

    def _closed(self, here: Any, mask: int) -> Walk:
        """Go on to an end by suffixes of other walks, the shortest that fits each time."""
        walk: Walk = []
        for _ in range(_CLOSINGS):
            if mask & END_BIT:
                return [*walk, (EOS_COLUMN, mask)]
            likely = (suffix for suffix in self._closings if mask >> suffix[0] & 1)
            step = next((s for s in likely if self.oracle.admits(here, s) == len(s)), None)
            if step is None or self.oracle.spent:
                break
            for symbol in step:
                walk.append((symbol, mask))
                here.try_consume_tokens([symbol])
                mask = self.oracle.mask(here)
        return walk

    def remembered(self, walk: Walk) -> Walk:
        """Return a walk from the empty text, and remember how it ended."""
        symbols = tuple(symbol for symbol, _ in walk)
        if symbols and symbols[-1] == EOS_COLUMN:
            self.whole[bytes(symbols[:-1])] = None
            choices = [i for i, (_, mask) in enumerate(walk[:-1]) if mask & (mask - 1)]
            known = {*self._closings, *(symbols[i:-1] for i in choices)}
            self._closings = sorted(known, key=shortest_first)[:_KNOWN_CLOSINGS]
        return walk


def shortest_first(symbols: Sequence[int]) -> tuple[int, Sequence[int]]:
    """Return a key that sorts by length."""
    return len(symbols), symbols


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
            self._learn(self.walks.remembered(self.walks.draw(oracle.root)))

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
        if len(allowed) < 3 or price <= _FEW_CALLS * self.oracle.max_calls:
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

        If few were met, walks go on from `matcher`, which has the mask.
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
