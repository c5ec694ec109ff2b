"""What users see of a beam: its candidates, and the probabilities of its next byte.

A beam is plain text, ANSI colours on a terminal, or an HTML table in a notebook.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.beam.state import N_BYTES
from genlm_bytes_smc.html import render

if TYPE_CHECKING:
    from genlm.bytes import Chart

EOS = 257  # its place in a 258-vector, as genlm-bytes numbers them

_PURPLE, _GREEN, _RED, _YELLOW, _GREY, _BOLD, _OFF = (
    "\x1b[35m", "\x1b[32m", "\x1b[31m", "\x1b[33m", "\x1b[90m", "\x1b[1m", "\x1b[0m",
)  # fmt: skip

_NOT_HERE = {  # of genlm-bytes' LazyTrieState
    "actions", "children", "extend_all", "get_all_EOT", "logp_next", "mass", "materialize", "mode",
    "node", "root", "trie", "with_mode",
}  # fmt: skip


@dataclass(frozen=True, repr=False)
class Candidate:
    """One candidate, ready to be shown; printed as in genlm-bytes.

    Attributes:
        logw: log weight, nats.
        share: its share of the beam's weight, in [0, 1].
        tokens: the tokens of its context, as bytes.
        partial: what has been read of the token in flight.
        kept: whether its share is above the pruning threshold.
        ended: whether it has read the end of the sequence.
        context: the tokens of its context, as ids.
    """

    logw: float
    share: float
    tokens: tuple[bytes, ...]
    partial: bytes
    kept: bool = True
    ended: bool = False
    context: tuple[int, ...] = ()

    @property
    def weight(self) -> float:
        """`logw`, by genlm-bytes' name."""
        return self.logw

    @property
    def terminated(self) -> bool:
        """`ended`, by genlm-bytes' name."""
        return self.ended

    @property
    def lm_state(self) -> Candidate:
        """The candidate itself: genlm-bytes has `context` there."""
        return self

    if not TYPE_CHECKING:  # a type checker shall still know which attributes there are

        def __getattr__(self, name: str) -> NoReturn:
            """Say where the rest of genlm-bytes' `LazyTrieState` is to be had."""
            told = f"{type(self).__name__!r} object has no attribute {name!r}"
            if name in _NOT_HERE:
                told = (
                    f"a candidate has no {name!r}: it is what is shown of one, and holds no trie "
                    "and no row of the model. The beam's next byte is beam.logp_next(), what "
                    "follows a byte beam << byte; the trie is beam.lanes.model.trie"
                )
            raise AttributeError(told)

    def line(self, *, colour: bool = False) -> str:
        """Return log weight, tokens and partial token."""
        weight = _paint(_GREY, f"{self.logw:.2f}", colour)
        context = _paint(_PURPLE, "|".join(map(escape, self.tokens)), colour)
        partial = _paint(_GREEN, "|" + escape(self.partial), colour)
        end = _paint(_YELLOW, "<EOS>", colour) if self.ended else ""
        return f"{weight}: {context}{partial}{end}"

    __repr__ = line


def escape(spelling: bytes) -> str:
    """Bytes as the reference prints them: escapes as in Python, spaces visible."""
    return repr(spelling)[2:-1].replace(" ", "␣")


def as_text(log_z: float, candidates: list[Candidate], *, colour: bool) -> str:
    """Return the printed form: Z, then probability, log weight, tokens and partial token."""
    lines = [_paint(_BOLD, f"Z: {log_z}", colour), _paint(_BOLD, "Candidates:", colour)]
    for c in candidates:
        share = _paint(_GREEN if c.kept else _RED, f"{c.share:.4f}", colour)
        lines.append(f"({share}) {c.line(colour=colour)}")
    return "\n".join(lines) + "\n"


def _paint(code: str, text: str, colour: bool) -> str:
    return f"{code}{text}{_OFF}" if colour else text


def as_html(log_z: float, candidates: list[Candidate]) -> str:
    """Return a table with the same content."""
    return render("beam", log_z=f"{log_z:.6f}", candidates=candidates, escape=escape)


class LazyByteProbs:
    """Log probabilities of the next byte.

    `row[b]` for a byte 0..255, `row[257]` for the end of the sequence, `row[None]` (or 256)
    for "end of token", which is no symbol here and always -inf; `.ps` is all 258 of them,
    float64; `.materialize()` a genlm-bytes `Chart` (a dictionary); `.pretty().top(5)` one with
    readable keys.

    Args:
        ps: the 258 numbers.
        log_space: whether they are logarithms, as those that a beam gives are.

    Raises:
        ValueError: another number of them.
    """

    def __init__(self, ps: npt.ArrayLike, log_space: bool = True) -> None:
        self.ps, self.log_space = np.asarray(ps), log_space
        if len(self.ps) != EOS + 1:
            raise ValueError(f"a row has {EOS + 1} entries, got {len(self.ps)}")

    @classmethod
    def from_row(cls, row: torch.Tensor) -> LazyByteProbs:
        """From float[257]: bytes and the end of the sequence, in nats."""
        ps = np.empty(EOS + 1)
        ps[:-1] = row.detach().cpu().numpy()
        ps[EOS], ps[N_BYTES] = ps[N_BYTES], -np.inf
        return cls(ps)

    def __getitem__(self, b: int | None) -> float:
        """Log probability of a byte, of the end (257) or of "end of token" (None, 256).

        Raises:
            ValueError: another number. TypeError: not a number.
        """
        if b is not None:
            if isinstance(b, bool) or not hasattr(b, "__index__"):
                raise TypeError(f"a byte is an integer in 0..255, got {b!r}")
            if not 0 <= b.__index__() <= EOS:
                raise ValueError(f"a byte is in 0..255, 257 the end of the sequence; got {b}")
        return float(self.ps[N_BYTES if b is None else b])

    def materialize(self) -> Chart:
        """All of them by byte, None and 257."""
        from genlm.bytes import Chart  # takes seconds to import, and many programs never ask

        keys = [*range(N_BYTES), None, EOS]
        return Chart(-np.inf if self.log_space else 0, zip(keys, self.ps, strict=True))

    def pretty(self) -> Chart:
        """All of them by readable keys: one-byte `bytes`, "EOT" and "EOS"."""
        names = {None: "EOT", EOS: "EOS"}
        return self.materialize().map_keys(lambda key: names.get(key) or bytes([key]))

    def top(self, k: int) -> Chart:
        """Return the k likeliest, with readable keys."""
        return self.pretty().top(k)

    def __repr__(self) -> str:
        shown = ", ".join(f"{key}: {value:.4f}" for key, value in self.top(5).items())
        return f"LazyByteProbs({shown}, …)"

    def _repr_html_(self) -> str:
        rows: Any = self.top(10)
        return str(rows._repr_html_())
