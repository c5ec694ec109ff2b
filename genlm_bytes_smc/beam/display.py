"""How a beam looks: plain text, ANSI colours on a terminal, an HTML table in a notebook."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from genlm_bytes_smc.html import render

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

    def __repr__(self) -> str:
        return _line(self, paint=_plain)


def escape(spelling: bytes) -> str:
    """Bytes as the reference prints them: escapes as in Python, spaces visible."""
    return repr(spelling)[2:-1].replace(" ", "␣")


def as_text(log_z: float, candidates: list[Candidate], *, colour: bool) -> str:
    """Return the printed form: Z, then probability, log weight, tokens and partial token."""

    paint = _coloured if colour else _plain
    lines = [paint(_BOLD, f"Z: {log_z}"), paint(_BOLD, "Candidates:")]
    for c in candidates:
        share = paint(_GREEN if c.kept else _RED, f"{c.share:.4f}")
        lines.append(f"({share}) {_line(c, paint)}")
    return "\n".join(lines) + "\n"


def _line(c: Candidate, paint: Callable[[str, str], str]) -> str:
    """Log weight, tokens and partial token of one candidate."""
    context = paint(_PURPLE, "|".join(map(escape, c.tokens)))
    partial = paint(_GREEN, "|" + escape(c.partial))
    end = paint(_YELLOW, "<EOS>") if c.ended else ""
    return f"{paint(_GREY, f'{c.logw:.2f}')}: {context}{partial}{end}"


def _coloured(code: str, text: str) -> str:
    return f"{code}{text}{_OFF}"


def _plain(code: str, text: str) -> str:
    return text


def as_html(log_z: float, candidates: list[Candidate]) -> str:
    """Return a table with the same content."""
    return render("beam", log_z=f"{log_z:.6f}", candidates=candidates, escape=escape)


def on_terminal() -> bool:
    """Return whether standard output shows colours."""
    return sys.stdout.isatty()
