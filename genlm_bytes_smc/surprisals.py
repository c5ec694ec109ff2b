"""`surprisal`: minus the log probability of each part of a text, given what comes before it."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import regex

from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.beam.prompt import Prompt
from genlm_bytes_smc.beam.state import FloatArray
from genlm_bytes_smc.calls import blocking
from genlm_bytes_smc.choosing import as_byte_llm, encoded
from genlm_bytes_smc.html import printable, probability, render
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.rows import RowTransform
from genlm_bytes_smc.scoring import Cut, bytewise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Per = Literal["byte", "character", "word"] | Sequence[tuple[int, int]]

LEVELS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # bits: the colour changes above each
LEGEND = list(enumerate([f"up to {LEVELS[0]:g}", *map("{:g}".format, LEVELS[1:]), "more"]))
IMPOSSIBLE = len(LEVELS) + 1  # the colour of what the model cannot read
MOST_COLUMNS = 2000  # bytes of a text up to which tokens are shown under it
_SIGNS = {"\n": "↵", "\t": "⇥", "\r": "␍"}
_WORD = regex.compile(rb"\s*\S+|\s+$")
_NO_SPANS = np.empty((0, 2), dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Surprisal:
    """Surprisal of the parts of one text under one model.

    Attributes:
        text: the text, as bytes.
        bytewise: float64[bytes], surprisal of each byte given those before it, nats; inf from
            the first byte on that the model cannot read.
        spans: int64[N, 2], begin and end of each part, in bytes.
        model: a name of the model.
        cuts: the likeliest ways to cut the text into tokens that the beam holds at its end, at
            most `CUTS`, likeliest first; none if the text was read in stretches, or not to
            its end.
    """

    text: bytes
    bytewise: FloatArray
    spans: IntArray
    model: str = ""
    cuts: tuple[Cut, ...] = ()

    def __len__(self) -> int:
        """Return the number of parts, N."""
        return len(self.spans)

    @cached_property
    def nats(self) -> FloatArray:
        """Return the surprisal of each part, float64[N], nats."""
        return np.array([self.bytewise[a:b].sum() for a, b in self.spans.tolist()])

    @property
    def bits(self) -> FloatArray:
        """Return the surprisal of each part, float64[N], bits."""
        return self.nats / math.log(2)

    @property
    def total(self) -> float:
        """Return minus the log probability of the text as a prefix, nats."""
        return float(self.bytewise.sum())

    @property
    def bits_per_byte(self) -> float:
        """Return `total` in bits, over the bytes; NaN for an empty text."""
        return self.total / math.log(2) / len(self.text) if self.text else math.nan

    @property
    def parts(self) -> list[bytes]:
        """Return the bytes of each part."""
        return [self.text[a:b] for a, b in self.spans.tolist()]

    def to_records(self) -> list[dict[str, Any]]:
        """Return a dictionary a part, of plain Python values; bytes that are no UTF-8 escaped."""
        texts = [part.decode("utf-8", errors="backslashreplace") for part in self.parts]
        columns = (*self.spans.T.tolist(), texts, self.nats.tolist(), self.bits.tolist())
        names = ("start", "end", "text", "nats", "bits")
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    def figure(self) -> Figure:
        """Return a picture: a bar a part, as high as its surprisal in bits."""
        from genlm_bytes_smc.surprisal_figure import draw  # matplotlib takes seconds to load

        return draw([self])

    def to_html(self) -> str:
        """Return a page with the text coloured by surprisal; it needs nothing from elsewhere."""
        return page([self])

    def _repr_html_(self) -> str:
        return render("surprisal", view=self.view())

    def view(self, most_columns: int = MOST_COLUMNS) -> dict[str, Any]:
        """Return what the template `surprisal` shows.

        Args:
            most_columns: bytes of the text up to which the tokens of its cuts are shown; they are
                if its parts are bytes or characters.
        """
        bits = self.total / math.log(2)
        cells, characters = self, spans_of(self.text, "character")
        if np.array_equal(self.spans, spans_of(self.text, "byte")):  # bytes are no signs
            cells = replace(self, spans=characters)
        in_columns = (
            bool(self.cuts)
            and len(self.text) <= most_columns
            and np.array_equal(cells.spans, characters)
        )
        tracks = [list(_track(cut, characters)) for cut in self.cuts] if in_columns else []
        return {
            "model": self.model,
            "told": f"{bits:.2f} bits, {self.bits_per_byte:.3f} a byte",
            "legend": LEGEND,
            "cuts": [probability(cut.share) for cut in self.cuts] if in_columns else [],
            "cells": [
                {
                    "text": _shown(part, columns=in_columns),
                    "level": level(unit),
                    "told": f"{abs(unit):.2f} bits",
                    "breaks": part == b"\n",
                    "marks": [track[i] for track in tracks],
                }
                for i, (part, unit) in enumerate(zip(cells.parts, cells.bits.tolist(), strict=True))
            ],
        }

    def __str__(self) -> str:
        parts = zip(self.bits, self.parts, strict=True)
        return "\n".join(["     bits  text", *(f"{b:9.3f}  {printable(p)}" for b, p in parts)])

    def __repr__(self) -> str:
        return (
            f"Surprisal({len(self)} parts of {len(self.text)} bytes, "
            f"{self.total:.3f} nats, {self.bits_per_byte:.3f} bits per byte)"
        )


@overload
async def surprisal(
    llm: Any, text: str | bytes, per: Per = ..., *, prompt: Prompt | str | bytes | None = ...,
    beam_params: BeamParams | None = ..., transform: RowTransform | None = ...,
    advance: Callable[[int], object] = ...,
) -> Surprisal: ...  # fmt: skip
@overload
async def surprisal(
    llm: Any, text: Sequence[str | bytes], per: Per = ..., *,
    prompt: Prompt | str | bytes | None = ..., beam_params: BeamParams | None = ...,
    transform: RowTransform | None = ..., advance: Callable[[int], object] = ...,
) -> list[Surprisal]: ...  # fmt: skip
async def surprisal(
    llm: Any,
    text: str | bytes | Sequence[str | bytes],
    per: Per = "byte",
    *,
    prompt: Prompt | str | bytes | None = None,
    beam_params: BeamParams | None = None,
    transform: RowTransform | None = None,
    advance: Callable[[int], object] = lambda n: None,
) -> Surprisal | list[Surprisal]:
    """Return minus the log probability of each part of a text, given all that comes before it.

    Probabilities are of bytes, summed over the ways to cut the text into tokens that the beam
    keeps. The surprisals of the parts therefore add up to that of the text, wherever the parts
    begin and end, and models of different tokenizers can be compared. Texts of a list are read
    side by side. One that may not fit the model's window is read in stretches, as by
    `scoring.score`.

    Args:
        llm: a `ByteLLM`, a model or engine that it can be made from, or a model's name.
        text: str (UTF-8) or bytes, which special tokens do not spell; or a list of them.
        per: the parts. "byte"; "character" (of Unicode; bytes that are no UTF-8 stand alone);
            "word" (what is between spaces, with the white space before it; white space at the
            end of the text is a part of its own); or pairs (begin, end) in bytes, which need
            neither cover the text nor be in order.
        prompt: what the text comes after, not counted; None: what the `ByteLLM` has.
        beam_params, transform: as for `choose`; None: as the `ByteLLM` does.
        advance: told how many bytes were read, as they are.

    Returns:
        A `Surprisal`; for a list of texts, one each.

    Raises:
        TypeError: a text of another type. ValueError: an unknown `per`, or a span outside the
            text.
        ScoreError: no candidate of the beam could read on in a text longer than the window.
    """
    many = not isinstance(text, str | bytes | bytearray)
    if many and not hasattr(text, "__iter__"):
        raise TypeError(f"text must be str, bytes or a list of them, got {text!r}")
    given: Sequence[Any] = text if many else [text]
    texts = [encoded(t, "a text") for t in given]
    spans = [spans_of(t, per) for t in texts]
    model = as_byte_llm(llm, prompt, beam_params, transform)
    name = llm if isinstance(llm, str) else ""
    read = await bytewise(model, texts, advance)
    found = [Surprisal(t, p, s, name, c) for t, s, (p, c) in zip(texts, spans, read, strict=True)]
    return found if many else found[0]


def page(results: Sequence[Surprisal], title: str = "Surprisal") -> str:
    """Return a page with texts coloured by surprisal; it needs nothing from elsewhere."""
    return render("surprisal_page", title=title, results=[r.view() for r in results])


surprisal_sync: Callable[..., Any] = blocking(surprisal)


async def compare_surprisal(
    llms: Sequence[Any], text: str | bytes, per: Per = "word", **options: Any
) -> list[Surprisal]:
    """Return the surprisal of the same parts of one text under each of several models.

    The models' tokenizers may differ, as probabilities are of bytes: `r.nats` of all results are
    aligned, and `surprisal_figure.draw(results)` shows them side by side.

    Args:
        llms: as `llm` of `surprisal`, each.
        text, per, options: as for `surprisal`.

    Raises:
        ValueError: no model. Else as `surprisal`.
    """
    if isinstance(llms, str) or not hasattr(llms, "__iter__") or not list(llms):
        raise ValueError(f"llms must be a list of one model or more, got {llms!r}")
    return [await surprisal(llm, text, per, **options) for llm in llms]


compare_surprisal_sync = blocking(compare_surprisal)


# -- parts of texts --------------------------------------------------------------------------


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
    try:
        if not len(per):
            return _NO_SPANS
        pairs = [(operator.index(begin), operator.index(end)) for begin, end in per]
        spans = np.array(pairs, dtype=np.int64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"spans must be pairs (begin, end) of bytes, got {per!r}") from None
    bad = (spans[:, 0] < 0) | (spans[:, 1] < spans[:, 0]) | (spans[:, 1] > len(text))
    if bad.any():
        begin, end = spans[bad][0].tolist()
        raise ValueError(f"the span ({begin}, {end}) is none of a text of {len(text)} bytes")
    return spans


def _characters(text: bytes) -> Iterator[int]:
    """Yield where characters end; each byte that is part of none is one."""
    escaped = text.decode("utf-8", errors="surrogateescape")
    sizes = (len(c.encode("utf-8", errors="surrogateescape")) for c in escaped)
    return itertools.accumulate(sizes)


_CUTS: dict[str, Callable[[bytes], Iterator[int]]] = {
    "byte": lambda text: iter(range(1, len(text) + 1)),
    "character": _characters,
    "word": lambda text: (m.end() for m in _WORD.finditer(text)),
}


# -- as templates show it --------------------------------------------------------------------


def level(bits: float) -> int:
    """Return the colour for a surprisal in bits: 0 to `IMPOSSIBLE`."""
    return IMPOSSIBLE if bits == math.inf else sum(bits > edge for edge in LEVELS)


def _shown(text: bytes, *, columns: bool) -> str:
    """Return bytes as they are shown; line ends and tabs have signs, other controls escapes."""
    decoded = text.decode("utf-8", errors="backslashreplace")
    signs = [_SIGNS.get(c, printable(c)) for c in decoded]
    if columns:
        return "".join(signs)
    return "".join(s + ("\n" if c == "\n" else "") for s, c in zip(signs, decoded, strict=True))


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
