"""Questions to a matcher of llguidance, counted.

What may follow a text is an int of 257 bits, one for each byte and bit 256 for the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from genlm_bytes_smc.alphabet import EOS_COLUMN

END_BIT = 1 << EOS_COLUMN
_ALL = (END_BIT << 1) - 1
LONGEST_FORCED = 4096  # a rule that derives nothing may force bytes for ever


@lru_cache(maxsize=4096)
def bytes_in(bits: int) -> tuple[int, ...]:
    """The bytes that a mask admits, in order."""
    return tuple(b for b in range(EOS_COLUMN) if bits >> b & 1)


class Probe:
    """Asks matchers what they admit, and counts how often.

    Args:
        root: a matcher that has read nothing.
        most: calls after which `spent` is true. Nothing is refused then; whoever asks stops.

    Attributes:
        calls: questions so far.
    """

    def __init__(self, root: Any, most: int) -> None:
        self.root = root
        self.most = most
        self.calls = 0

    @property
    def spent(self) -> bool:
        """Whether as many calls were made as are allowed."""
        return self.calls >= self.most

    def mask(self, matcher: Any) -> int:
        """What may follow; 0 where llguidance gives up."""
        self.calls += 1
        found = matcher.compute_bitmask()
        return 0 if matcher.is_error() else int.from_bytes(found, "little") & _ALL

    def grouped(self, matcher: Any, allowed: Sequence[int]) -> list[tuple[int, ...]]:
        """Admitted bytes by what may follow them."""
        groups: dict[int, list[int]] = {}
        for byte in allowed:
            one = matcher.deep_copy()
            one.try_consume_tokens([byte])
            groups.setdefault(self.mask(one), []).append(byte)
        return [tuple(g) for g in groups.values()]

    def admits(self, matcher: Any, symbols: Sequence[int]) -> int:
        """How many of these symbols (bytes, or 256 for the end) may follow one another."""
        self.calls += 1
        return int(matcher.validate_tokens(symbols))

    def read(self, matcher: Any, text: Sequence[int]) -> Any | None:
        """A copy that has read `text` as well; None where it is not admitted."""
        self.calls += 1
        new = matcher.deep_copy()
        done = new.try_consume_tokens(list(text)) == len(text)
        return new if done and not new.is_error() else None

    def forced(self, matcher: Any) -> tuple[bytes, int]:
        """Read on while there is but one way to go: (what was read, what may follow it).

        The mask is 0 where llguidance gives up or no end is in sight.
        """
        passed = bytearray()
        bits = self.mask(matcher)
        while bits and not bits & END_BIT and not bits & (bits - 1):
            if len(passed) == LONGEST_FORCED:
                return bytes(passed), 0
            byte = bits.bit_length() - 1
            passed.append(byte)
            matcher.try_consume_tokens([byte])
            bits = self.mask(matcher)
        return bytes(passed), bits
