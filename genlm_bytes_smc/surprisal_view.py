"""A text coloured by surprisal, as templates show it: characters, colours, tokens under them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.html import printable, probability
from genlm_bytes_smc.text_parts import Cut, IntArray, spans_of

FloatArray = npt.NDArray[np.float64]

LEVELS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # bits: the colour changes above each
IMPOSSIBLE = len(LEVELS) + 1  # the colour of what the model cannot read
MOST_COLUMNS = 2000  # bytes of a text up to which tokens are shown under it
_SHOWN = {"\n": "↵", "\t": "⇥", "\r": "␍"}


class Read(Protocol):
    """A text with the surprisal of its parts; a `surprisals.Surprisal` is one."""

    @property
    def text(self) -> bytes:
        """Return the text."""

    @property
    def bytewise(self) -> FloatArray:
        """Return the surprisal of each byte, nats."""

    @property
    def spans(self) -> IntArray:
        """Return begin and end of each part."""

    @property
    def model(self) -> str:
        """Return the name of the model."""

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """Return how the text may be cut into tokens."""

    @property
    def bits(self) -> FloatArray:
        """Return the surprisal of each part."""

    @property
    def total(self) -> float:
        """Return the surprisal of the text, nats."""

    @property
    def bits_per_byte(self) -> float:
        """Return it in bits, over the bytes."""


def view(result: Read, most_columns: int = MOST_COLUMNS) -> dict[str, Any]:
    """Return what the template `surprisal` shows.

    Args:
        result: of one text.
        most_columns: bytes of the text up to which the tokens of its cuts are shown; they are
            if its parts are bytes or characters.
    """
    bits = result.total / math.log(2)
    spans, units = _units(result)
    in_columns = (
        bool(result.cuts)
        and len(result.text) <= most_columns
        and np.array_equal(spans, spans_of(result.text, "character"))
    )
    tracks = [list(_track(cut, spans)) for cut in result.cuts] if in_columns else []
    return {
        "model": result.model,
        "told": f"{bits:.2f} bits, {result.bits_per_byte:.3f} a byte",
        "legend": _legend(),
        "cuts": [probability(cut.share) for cut in result.cuts] if in_columns else [],
        "cells": [
            {
                "text": shown(result.text[a:b], columns=in_columns),
                "level": level(unit),
                "told": f"{abs(unit):.2f} bits",
                "breaks": result.text[a:b] == b"\n",
                "marks": [track[i] for track in tracks],
            }
            for i, ((a, b), unit) in enumerate(zip(spans.tolist(), units.tolist(), strict=True))
        ],
    }


def level(bits: float) -> int:
    """Return the colour for a surprisal in bits: 0 to `IMPOSSIBLE`."""
    return IMPOSSIBLE if bits == math.inf else sum(bits > edge for edge in LEVELS)


def shown(text: bytes, *, columns: bool = False) -> str:
    """Return bytes as they are shown; line ends and tabs have signs, other controls escapes."""
    decoded = text.decode("utf-8", errors="backslashreplace")
    signs = [_SHOWN.get(c, printable(c)) for c in decoded]
    if columns:
        return "".join(signs)
    return "".join(s + ("\n" if c == "\n" else "") for s, c in zip(signs, decoded, strict=True))


def _units(result: Read) -> tuple[IntArray, FloatArray]:
    """Return what is coloured, and its bits: the parts, but characters where those are bytes."""
    if not np.array_equal(result.spans, spans_of(result.text, "byte")):
        return result.spans, result.bits
    spans = spans_of(result.text, "character")
    sums = [result.bytewise[a:b].sum() for a, b in spans.tolist()]
    return spans, np.array(sums, dtype=np.float64) / math.log(2)


def _track(cut: Cut, spans: IntArray) -> Iterator[str]:
    """Yield for each character which token of a cut it is in.

    "i" and "b" in turn, a token each; "u" where a token ends inside the character: the elements
    that show it.
    """
    ends = np.array(cut.ends, dtype=np.int64)
    for a, b in spans.tolist():
        if ((ends > a) & (ends < b)).any():
            yield "u"
        else:
            yield "ib"[int((ends <= a).sum()) % 2]


def _legend() -> list[tuple[int, str]]:
    """Return (colour, what it stands for), from the least to the most surprising."""
    edges = [f"{edge:g}" for edge in LEVELS]
    names = [f"up to {edges[0]}", *edges[1:], "more"]
    return list(enumerate(names))
