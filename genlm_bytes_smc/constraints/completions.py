"""Ways to go on from a text, drawn at random: the tests that tell residual languages apart.

Two texts lead to one state of an automaton exactly if the same endings are admitted after
both. A set of endings to try (the columns of Angluin's observation table, 1987) makes that an
approximation that can be computed. Endings that end somewhere are worth most: they hold what a
text still owes, closing brackets and required keys included. So they are taken from random
walks to the end, and from texts that are known.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from genlm_bytes_smc.alphabet import EOS_COLUMN
from genlm_bytes_smc.constraints.probe import END_BIT, Probe, bytes_in

_WALKS = 32
_FROM_HERE = 4  # walks from the first text that a mask is met at
_LONGEST = 300  # bytes of a walk before it looks for the nearest end
_CLOSINGS = 64
_EACH = 8  # up to so many admitted bytes, a walk takes each for a way of its own
_POOL = 512
_GROWN = 4  # times `tests` endings a mask has at most, with those that `add` was given

Ending = tuple[int, ...]


class Completions:
    """Endings by what may follow where they begin, and random walks that find them.

    Args:
        probe: see there.
        texts: known texts, whole or not; what the constraint does not admit of them is cut.
        tests: most endings that a mask has.
        seed: of the walks.

    Attributes:
        whole: texts that the constraint admits to the end, in the order they were found.
    """

    def __init__(self, probe: Probe, texts: Iterable[bytes], tests: int, seed: int) -> None:
        self.probe = probe
        self.tests = tests
        self.whole: dict[bytes, None] = {}
        self._rng = random.Random(seed)
        self._met: dict[int, dict[Ending, None]] = {}
        self._frozen: dict[int, list[Ending]] = {}
        self._ways: dict[int, list[tuple[int, ...]]] = {}
        self._pool: dict[Ending, None] = {}
        for text in texts:
            self._learn(self._spelled(text))
        for _ in range(_WALKS):
            self._learn(self.walk(probe.root))

    def of(self, bits: int, matcher: Any = None) -> list[Ending]:
        """The endings that texts with this mask are told apart by; they only become more.

        Args:
            bits: what may follow.
            matcher: one that has this mask, to walk from if few endings are known. Without
                one, and where none was given before, there are none.
        """
        found = self._frozen.get(bits)
        if found is None:
            if matcher is None:
                return []
            met = self._met.get(bits, {})
            for _ in range(_FROM_HERE if len(met) < self.tests else 0):
                met[tuple(symbol for symbol, _ in self.walk(matcher))] = None
            found = _spread(sorted(met, key=lambda e: (len(e), e)), self.tests)
            self._frozen[bits] = found
        return found

    def add(self, bits: int, ending: Ending) -> bool:
        """One more ending for a mask; says whether it is new and there was room."""
        found = self._frozen.setdefault(bits, [])
        if ending in found or len(found) >= _GROWN * self.tests:
            return False
        found.append(ending)
        return True

    def walk(self, matcher: Any) -> list[tuple[int, int]]:
        """A random way on: symbols, each with what might have stood in its place.

        The last symbol is 256 if the walk came to an end.
        """
        here = matcher.deep_copy()
        path: list[tuple[int, int]] = []
        bits = self.probe.mask(here)
        while bits and len(path) < _LONGEST and not self.probe.spent:
            symbol = self._choose(here, bits)
            path.append((symbol, bits))
            if symbol == EOS_COLUMN:
                return path
            here.try_consume_tokens([symbol])
            bits = self.probe.mask(here)
        return path + self._closed(here, bits)

    def _choose(self, matcher: Any, bits: int) -> int:
        """Each way to go on alike: bytes with one mask after them are one way."""
        if not bits & (bits - 1):
            return bits.bit_length() - 1
        ways = self._ways.get(bits)
        if ways is None:
            ways = self._ways[bits] = self._grouped(matcher, bits)
        return self._rng.choice(self._rng.choice(ways))

    def _grouped(self, matcher: Any, bits: int) -> list[tuple[int, ...]]:
        allowed = bytes_in(bits)
        ends: list[tuple[int, ...]] = [(EOS_COLUMN,)] if bits & END_BIT else []
        if len(allowed) <= _EACH:
            return ends + [(b,) for b in allowed]
        return ends + self.probe.grouped(matcher, allowed)

    def _closed(self, here: Any, bits: int) -> list[tuple[int, int]]:
        """On to the end by endings of other texts, the shortest that fits each time."""
        path: list[tuple[int, int]] = []
        for _ in range(_CLOSINGS):
            if bits & END_BIT:
                return [*path, (EOS_COLUMN, bits)]
            step = next((e for e in self._pool if self._fits(here, bits, e)), None)
            if step is None or self.probe.spent:
                break
            for symbol in step:
                path.append((symbol, bits))
                here.try_consume_tokens([symbol])
                bits = self.probe.mask(here)
        return path

    def _fits(self, here: Any, bits: int, ending: Ending) -> bool:
        return bool(bits >> ending[0] & 1) and self.probe.admits(here, ending) == len(ending)

    def _spelled(self, text: bytes) -> list[tuple[int, int]]:
        """A known text as a path, as far as it is admitted."""
        here = self.probe.root.deep_copy()
        path: list[tuple[int, int]] = []
        for byte in text:
            bits = self.probe.mask(here)
            if not bits >> byte & 1:
                return path
            path.append((byte, bits))
            here.try_consume_tokens([byte])
        bits = self.probe.mask(here)
        return [*path, (EOS_COLUMN, bits)] if bits & END_BIT else path

    def _learn(self, path: list[tuple[int, int]]) -> None:
        symbols = tuple(symbol for symbol, _ in path)
        ended = bool(symbols) and symbols[-1] == EOS_COLUMN
        if ended:
            self.whole[bytes(symbols[:-1])] = None
        for at, (_, bits) in enumerate(path):
            if bits & (bits - 1):
                self._met.setdefault(bits, {})[symbols[at:]] = None
                if ended and at < len(path) - 1:
                    self._pool[symbols[at:-1]] = None
        shortest = sorted(self._pool, key=lambda e: (len(e), e))[:_POOL]
        self._pool = dict.fromkeys(shortest)


def _spread(items: list[Ending], most: int) -> list[Ending]:
    """At most so many of them, evenly spread."""
    if len(items) <= most or most == 1:
        return items[:most]
    return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]
