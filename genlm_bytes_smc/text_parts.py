"""Parts of texts: bytes, characters, words, spans; and ways to cut a text into tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import regex

IntArray = npt.NDArray[np.int64]
Spans = Sequence[tuple[int, int]]
Per = Literal["byte", "character", "word"] | Spans

_WORD = regex.compile(rb"\s*\S+|\s+$")


class Cut(NamedTuple):
    """A way to cut a text into tokens, which a candidate of the beam used.

    Attributes:
        share: of the beam's weight after the text, in [0, 1].
        ends: where tokens end inside the text, in bytes, increasing; 0 if one ends where the text
            begins. The last token goes on beyond the text or ends with it.
    """

    share: float
    ends: tuple[int, ...]


def spans_of(text: bytes, per: Per) -> IntArray:
    """Return begin and end of each part of a text, int64[N, 2]; see `surprisal`.

    Raises:
        ValueError: an unknown `per`, or a span outside the text.
    """
    if isinstance(per, str):
        if per not in _CUTS:
            raise ValueError(f"per must be one of {sorted(_CUTS)} or a list of spans, got {per!r}")
        ends = list(_CUTS[per](text))
        return np.array([[0, *ends[:-1]], ends], dtype=np.int64).T if ends else _NO_SPANS
    spans = np.asarray(per, dtype=np.int64) if len(per) else _NO_SPANS
    if spans.ndim != 2 or spans.shape[1] != 2:
        raise ValueError(f"spans must be pairs (begin, end) of bytes, got {per!r}")
    bad = (spans[:, 0] < 0) | (spans[:, 1] < spans[:, 0]) | (spans[:, 1] > len(text))
    if bad.any():
        begin, end = spans[bad][0].tolist()
        raise ValueError(f"the span ({begin}, {end}) is none of a text of {len(text)} bytes")
    return spans


_NO_SPANS = np.empty((0, 2), dtype=np.int64)


def _characters(text: bytes) -> Iterator[int]:
    """Yield where characters end; each byte that is part of none is one."""
    escaped = text.decode("utf-8", errors="surrogateescape")
    sizes = (len(c.encode("utf-8", errors="surrogateescape")) for c in escaped)
    return itertools.accumulate(sizes)


def _words(text: bytes) -> Iterator[int]:
    return (m.end() for m in _WORD.finditer(text))


_CUTS: dict[str, Callable[[bytes], Iterator[int]]] = {
    "byte": lambda text: iter(range(1, len(text) + 1)),
    "character": _characters,
    "word": _words,
}
