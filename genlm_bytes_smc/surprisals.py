"""`surprisal`: minus the log probability of each part of a text, given what comes before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.beam.known_text import read_paths
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.beam.prompt import Prompt
from genlm_bytes_smc.beam.single import ByteBeamState, lanes_for
from genlm_bytes_smc.blocking import blocking
from genlm_bytes_smc.choosing import as_byte_llm, encoded
from genlm_bytes_smc.html import printable, render
from genlm_bytes_smc.lm.rows import RowTransform
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.scoring import DEFERRED_CHUNK, Reader, ScoreError
from genlm_bytes_smc.surprisal_view import view
from genlm_bytes_smc.text_parts import Cut, Per, spans_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
LANES = 32  # texts that are read side by side
CUTS = 4  # ways to cut a text into tokens that are kept


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
        """Return minus the log probability of the text as a prefix, nats: the sum over bytes."""
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
        columns = zip(self.spans.tolist(), self.nats.tolist(), self.bits.tolist(), strict=True)
        return [
            {
                "start": a,
                "end": b,
                "text": self.text[a:b].decode("utf-8", errors="backslashreplace"),
                "nats": nats,
                "bits": bits,
            }
            for (a, b), nats, bits in columns
        ]

    def figure(self) -> Figure:
        """Return a picture: a bar a part, as high as its surprisal in bits."""
        from genlm_bytes_smc.surprisal_figure import draw  # matplotlib takes seconds to load

        return draw([self])

    def to_html(self) -> str:
        """Return a page with the text coloured by surprisal; it needs nothing from elsewhere."""
        return page([self])

    def _repr_html_(self) -> str:
        return render("surprisal", view=self.view())

    def view(self) -> dict[str, Any]:
        """Return what templates show."""
        return view(self)

    def __str__(self) -> str:
        lines = [
            f"{bits:9.3f}  {printable(part)}"
            for bits, part in zip(self.bits, self.parts, strict=True)
        ]
        return "\n".join(["     bits  text", *lines])

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
    read = await _bytewise(model, texts, advance)
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


# -- reading -----------------------------------------------------------------------------


async def _bytewise(
    llm: ByteLLM, texts: Sequence[bytes], advance: Callable[[int], object]
) -> list[tuple[FloatArray, tuple[Cut, ...]]]:
    """Return the surprisal of each byte of each text, nats, and how each may be cut."""
    root = await (await llm.lanes(1)).as_prompt(literal=True)
    engine = llm.model.engine
    depth = len(engine.start) + len(llm.prompt_bytes)
    room = DEFERRED_CHUNK if engine.window is None else engine.window - depth
    out: list[tuple[FloatArray, tuple[Cut, ...]]] = [(np.empty(0), ())] * len(texts)
    fits = sorted((i for i, t in enumerate(texts) if len(t) <= room), key=lambda i: len(texts[i]))
    for at in range(0, len(fits), LANES):
        batch = fits[at : at + LANES]
        lanes = root.gather([0] * len(batch))
        after, paths = await read_paths(lanes, [texts[i] for i in batch])
        for lane, (i, path) in enumerate(zip(batch, paths, strict=True)):
            out[i] = _steps(path, float(root.log_z[0])), cuts_of(after.gather([lane]), texts[i])
            advance(len(texts[i]))
    begin = await lanes_for(llm.params).start(llm.model, llm.params)
    for i in set(range(len(texts))) - set(fits):
        steps = list[float]()
        reader = Reader(begin, advance, root, steps)  # type: ignore[arg-type]
        await reader.read(texts[i])
        out[i] = -np.array(steps), ()
    return out


def cuts_of(lanes: Any, text: bytes) -> tuple[Cut, ...]:
    """Return the likeliest ways to cut a text into tokens in the beam that has read it.

    Args:
        lanes: one lane, of either class.
        text: the last bytes that it read.
    """
    shares: dict[tuple[int, ...], float] = {}
    for candidate in ByteBeamState(lanes).candidates if text else ():
        at, ends = len(text) - len(candidate.partial), list[int]()
        for token in reversed(candidate.tokens):
            if at < 0:
                break
            ends.append(at)
            at -= len(token)
        key = tuple(sorted({e for e in ends if e < len(text)}))
        shares[key] = shares.get(key, 0.0) + candidate.share
    best = sorted(shares.items(), key=lambda item: -item[1])[:CUTS]
    return tuple(Cut(min(share, 1.0), ends) for ends, share in best if share > 0)


def _steps(path: FloatArray, first: float) -> FloatArray:
    """Return minus the differences of a path that begins at `first`; inf where it is dead."""
    before = np.concatenate([[first], path[:-1]])[: len(path)]
    with np.errstate(invalid="ignore"):
        return np.where(path == -np.inf, np.inf, before - path)


__all__ = [
    "Cut",
    "ScoreError",
    "Surprisal",
    "compare_surprisal",
    "compare_surprisal_sync",
    "spans_of",
    "surprisal",
    "surprisal_sync",
]  # fmt: skip
