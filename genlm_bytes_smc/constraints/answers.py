"""What a matcher answered about texts, kept so that no question is asked twice."""

from __future__ import annotations

from genlm_bytes_smc.constraints.completions import Completions
from genlm_bytes_smc.constraints.probe import END_BIT, Probe, bytes_in

Key = tuple[int, ...]

_FEW = 0.002  # share of all calls that one state may take to look at each byte by itself


class Answers:
    """The keys of texts: equal for texts that count as one state.

    A key is what may follow (the mask) and how far each of the mask's endings is admitted.

    Args:
        probe: who is asked.
        completions: the endings, more of which may come between one question and another.

    Attributes:
        most: how many endings of a mask count; None: all. Fewer make fewer states.
    """

    most: int | None = None

    def __init__(self, probe: Probe, completions: Completions) -> None:
        self.probe = probe
        self.completions = completions
        self._known: dict[bytes, tuple[bytes, int, list[int]]] = {}
        self._first: dict[int, bytes] = {}

    def of(self, text: bytes) -> tuple[bytes, Key]:
        """(the bytes that are forced after a text, the key of the text with them).

        The first number of the key is the mask; 0 for a text that cannot be followed.
        """
        matcher = None
        known = self._known.get(text)
        if known is None:
            matcher = self.probe.read(self.probe.root, text)
            forced, bits = (b"", 0) if matcher is None else self.probe.forced(matcher)
            known = self._known[text] = forced, bits, []
        forced, bits, counts = known
        if not bits or bits == END_BIT:
            return forced, (bits,)
        if matcher is None and len(counts) < len(self.completions.of(bits)):
            matcher = self.probe.read(self.probe.root, text + forced)
        for ending in self.completions.of(bits, matcher)[len(counts) :]:
            counts.append(self.probe.admits(matcher, ending))
        return forced, (bits, *counts[: self.most])

    def ways(self, text: bytes, bits: int) -> list[tuple[int, ...]]:
        """The bytes that may follow a text, by what is taken to come of them.

        A few bytes are each a way of their own. Of many, those with one key are one way, as
        it is for the first text of this mask.
        """
        allowed = bytes_in(bits)
        price = len(allowed) * (2 + self.completions.tests)
        if len(allowed) < 3 or price <= _FEW * self.probe.most:
            return [(b,) for b in allowed]
        first = self._first.setdefault(bits, text)
        groups: dict[tuple[bytes, Key], list[int]] = {}
        for byte in allowed:
            groups.setdefault(self.of(first + bytes([byte])), []).append(byte)
        return [tuple(g) for g in groups.values()]
