"""The membership oracle: a matcher of llguidance, its questions counted; and random walks by it."""

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

    Attributes:
        calls: questions so far.
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

    def mask_after(self, matcher: Any, byte: int) -> int:
        """Return the mask of what may follow one more byte, which is admitted."""
        after = matcher.deep_copy()
        after.try_consume_tokens([byte])
        return self.mask(after)

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

    Args:
        oracle: the oracle.
        seed: of the walks.

    Attributes:
        whole: texts that the constraint admits to the end, in the order they were found.
    """

    def __init__(self, oracle: MembershipOracle, seed: int) -> None:
        self.oracle = oracle
        self.whole: dict[bytes, None] = {}
        self._rng = random.Random(seed)
        self._ways: dict[int, list[Symbols]] = {}
        self._closings: list[Symbols] = []  # suffixes that lead to an end, shortest first

    def from_root(self) -> Walk:
        """Draw a walk from the empty text, and remember how it ended."""
        return self._remembered(self.draw(self.oracle.root))

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
        return self._remembered(walk)

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
            allowed = bytes_in(mask)
            many = len(allowed) > _FEW
            key = (lambda b: self.oracle.mask_after(matcher, b)) if many else int
            ends = [(EOS_COLUMN,)] if mask & END_BIT else []
            ways = self._ways[mask] = ends + grouped(allowed, key)
        return self._rng.choice(self._rng.choice(ways))

    def _closed(self, here: Any, mask: int) -> Walk:
        """Go on to an end by suffixes of other walks, the shortest that fits each time."""
        walk: Walk = []
        for _ in range(_CLOSINGS):
            if mask & END_BIT:
                return [*walk, (EOS_COLUMN, mask)]
            step = next((s for s in self._closings if self._fits(here, mask, s)), None)
            if step is None or self.oracle.spent:
                break
            for symbol in step:
                walk.append((symbol, mask))
                here.try_consume_tokens([symbol])
                mask = self.oracle.mask(here)
        return walk

    def _fits(self, here: Any, mask: int, suffix: Symbols) -> bool:
        return bool(mask >> suffix[0] & 1) and self.oracle.admits(here, suffix) == len(suffix)

    def _remembered(self, walk: Walk) -> Walk:
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
