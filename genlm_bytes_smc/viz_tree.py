"""The ancestry of particles as lines: which are drawn, in which rows, and the letters on them.

Between two resamplings a particle is one horizontal line, which ends early where its text does or
where it dies. Rows are ordered by ancestor, so that lines never cross.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.alphabet import EOS_COLUMN
from genlm_bytes_smc.smc import SMCResult, StepInfo

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

MOST_CELLS = 16_000  # particles times steps that are drawn
MOST_STEPS = 500  # the last steps are drawn
MOST_ROWS = 128  # particles that are drawn
DX, DY = 14, 20  # width of a step and height of a row, pixels
LEFT, GAP = 10, 26  # left margin, and the room for lines between two stretches, pixels


class Stretch(NamedTuple):
    """The steps between one resampling and the next.

    Attributes:
        begin, end: first step and last step + 1, as indices of the steps that are drawn.
        particles: int64[R], the particles that are drawn, from the top.
        parents: int64[R], the row of each one's ancestor in the stretch before (-1: none).
        kept: bool[R], whether a final particle of weight descends from it.
        alive: bool[R], whether it reads anything here.
        stops: int64[R], the step, from `begin`, at which its text ended or it died; -1: at none.
        read: int16[steps, R], the symbols read till then; -1 where nothing was.
        log_shares: float64[steps, R], log of its share of all particles' weight after each step.
    """

    begin: int
    end: int
    particles: IntArray
    parents: IntArray
    kept: BoolArray
    alive: BoolArray
    stops: IntArray
    read: npt.NDArray[np.int16]
    log_shares: FloatArray


def is_recorded(result: SMCResult) -> bool:
    """Return whether every step of a run notes what the particles read and weighed."""
    return all(i.symbols is not None and i.log_weights is not None for i in result.history)


def rows_drawn(result: SMCResult) -> int:
    """Return how many particles are drawn: all, or what `MOST_ROWS` and `MOST_CELLS` allow."""
    steps = min(len(result.history), MOST_STEPS)
    return min(result.size, MOST_ROWS, MOST_CELLS // max(steps, 1))


def stretches(result: SMCResult) -> list[Stretch]:
    """Return what is drawn of a run, in time order.

    Of more particles than `rows_drawn` says, the final ones that weigh most and their ancestors;
    of more steps than `MOST_STEPS`, the last.
    """
    history = result.history[-MOST_STEPS:]
    ends = [t + 1 for t, info in enumerate(history) if info.ancestors is not None]
    if not ends or ends[-1] < len(history):
        ends.append(len(history))
    drawn, kept = _drawn(result, history), _kept(result, history)
    recorded = is_recorded(result)
    alive = np.ones(result.size, dtype=bool)
    out = list[Stretch]()
    for begin, end in zip([0, *ends], ends, strict=False):
        steps = history[begin:end]
        stops, read = _until(steps, result.size, recorded)
        above, parent = _rows_above(out, history[begin - 1] if begin else None, result.size)
        shown = sorted(
            np.flatnonzero(drawn[begin]).tolist(),
            key=lambda i: (above[i], *_sortable(read[:, i]), i),
        )
        rows = np.array(shown, dtype=np.int64)
        shares = _log_shares(steps, result.size, recorded)
        out.append(
            Stretch(
                begin, end, rows, parent[rows], kept[begin][rows], alive[rows], stops[rows],
                np.where(alive, read, -1)[:, rows], shares[:, rows],
            )
        )  # fmt: skip
        alive = alive & (stops < 0)
        ancestors = history[end - 1].ancestors
        if ancestors is not None:
            alive = alive[ancestors]
    return out


def _sortable(read: npt.NDArray[np.int16]) -> list[int]:
    return [int(s) for s in read]


def _rows_above(
    before: Sequence[Stretch], last: StepInfo | None, n: int
) -> tuple[IntArray, IntArray]:
    """Return each particle's place in the order by ancestors, and its ancestor's row (-1: none)."""
    if not before or last is None or last.ancestors is None:
        return np.zeros(n, dtype=np.int64), np.full(n, -1)
    row = np.full(n, -1)
    row[before[-1].particles] = np.arange(len(before[-1].particles))
    return row[last.ancestors], row[last.ancestors]


def _back(last: BoolArray, history: Sequence[StepInfo]) -> list[BoolArray]:
    """Return who at the beginning of each step has a descendant among `last`, bool[N] each."""
    out, now = list[BoolArray](), last
    for info in reversed(history):
        if info.ancestors is not None:
            before = np.zeros_like(now)
            before[info.ancestors[now]] = True
            now = before
        out.append(now)
    return out[::-1]


def _kept(result: SMCResult, history: Sequence[StepInfo]) -> list[BoolArray]:
    """Return which particles have a final descendant of weight, at the beginning of each step."""
    return _back(result.normalized_weights > 0, history)


def _drawn(result: SMCResult, history: Sequence[StepInfo]) -> list[BoolArray]:
    """Return which particles are drawn, at the beginning of each step."""
    n = rows_drawn(result)
    if n == result.size:
        return [np.ones(n, dtype=bool)] * len(history)
    last = np.zeros(result.size, dtype=bool)
    last[np.argsort(-result.normalized_weights, kind="stable")[:n]] = True
    return _back(last, history)


def _until(
    steps: Sequence[StepInfo], n: int, recorded: bool
) -> tuple[IntArray, npt.NDArray[np.int16]]:
    """Return at which step each text ended or died (-1: at none), and the symbols read till then.

    Returns:
        int64[n]; int16[steps, n], -1 where nothing was read.
    """
    if not recorded:
        return np.full(n, -1), np.full((len(steps), n), -1, dtype=np.int16)
    symbols = np.stack([info.symbols for info in steps if info.symbols is not None])
    weights = np.stack([info.log_weights for info in steps if info.log_weights is not None])
    over = (symbols >= 0) & ((symbols == EOS_COLUMN) | (weights == -np.inf))
    stops = np.where(over.any(axis=0), over.argmax(axis=0), -1)
    past = (stops >= 0) & (np.arange(len(steps))[:, None] > stops)
    return stops, np.where(past, -1, symbols)


def _log_shares(steps: Sequence[StepInfo], n: int, recorded: bool) -> FloatArray:
    """Return log of each particle's share of the weight after each step, float64[steps, n]."""
    if not recorded:
        return np.full((len(steps), n), -np.inf)
    weights = np.stack([info.log_weights for info in steps if info.log_weights is not None])
    top = weights.max(axis=1, keepdims=True)
    top = np.where(top == -np.inf, 0.0, top)
    with np.errstate(divide="ignore"):
        total = np.log(np.exp(weights - top).sum(axis=1, keepdims=True)) + top
    return np.where(weights == -np.inf, -np.inf, weights - np.where(total == -np.inf, 0.0, total))


# -- as templates show it ----------------------------------------------------------------------


def drawing(found: Sequence[Stretch], *, letters: bool) -> dict[str, Any]:
    """Return lines from ancestors to descendants, and what was read on them, row by row.

    Args:
        found: of `stretches`, at least one.
        letters: whether symbols were noted.
    """
    lost, kept = list[str](), list[str]()
    texts: dict[tuple[int, bool], tuple[list[str], list[str]]] = {}
    for k, s in enumerate(found):
        for row, (parent, keeps, lives) in enumerate(
            zip(s.parents.tolist(), s.kept.tolist(), s.alive.tolist(), strict=True)
        ):
            if not lives:
                continue
            y = _y(row)
            width = s.stops[row] + 0.9 if s.stops[row] >= 0 else s.end - s.begin
            join = f"M{_x(s.begin, k - 1)} {_y(parent)}L" if parent >= 0 else "M"
            line = f"{join}{_x(s.begin, k)} {y}H{_x(s.begin + width, k)}"
            (kept if keeps else lost).append(line)
            at = np.flatnonzero(s.read[:, row] >= 0) if letters else ()
            if len(at):
                xs, signs = texts.setdefault((y - 5, keeps), ([], []))
                xs += [_x(s.begin + int(t) + 0.5, k) for t in at]
                signs.append(letters_of(s.read[at, row].tolist()))
    rows = max(len(s.particles) for s in found)
    width, height = _x(found[-1].end + 1, len(found) - 1), f"{rows * DY + 8}"
    written = [
        (" ".join(xs), y, "".join(signs), keeps) for (y, keeps), (xs, signs) in texts.items()
    ]
    lines = {"lost": "".join(lost), "kept": "".join(kept)}
    return {"width": width, "height": height, **lines, "letters": written}


def _x(step: float, stretch: int) -> str:
    return f"{LEFT + step * DX + stretch * GAP:g}"


def _y(row: int) -> int:
    return row * DY + 18


def letters_of(symbols: Sequence[int]) -> str:
    """Return one sign for each symbol: a character at its first byte, "╌" at the bytes after it.

    "■" is the end of the text, "·" a space, "◆" what has no sign of its own: bytes that are no
    UTF-8, controls, and characters that would not keep their place.
    """
    out = list[str]()
    data = bytes(s for s in symbols if s != EOS_COLUMN)
    for c in data.decode("utf-8", errors="surrogateescape"):
        size = len(c.encode("utf-8", errors="surrogateescape"))
        out += [_sign(c), *["╌"] * (size - 1)]
    return "".join(out) + "■" * (len(symbols) - len(data))


def _sign(c: str) -> str:
    if c == " ":
        return "·"
    if c == "\n":
        return "↵"
    odd = unicodedata.category(c)[0] in "MCZ" or unicodedata.bidirectional(c) in ("R", "AL", "AN")
    return "◆" if odd or ord(c) > 0xFFFF else c


def stepping(found: Sequence[Stretch], first: int, *, recorded: bool) -> dict[str, Any]:
    """Return the same lines for the page's script, which steps through them.

    Args:
        found: of `stretches`.
        first: how many steps come before those that are drawn.
        recorded: whether symbols and weights were noted; if not, "s" and "w" are empty.

    Returns:
        "first", "recorded", sizes, and for each stretch: "b", "e" as `begin`, "end"; "i"
        particles, "p" parents; "k" kept, a digit a row; "s" what each row read, two digits a
        step ("--" nothing, "##" the end); "w" log shares of each row, one a step, None for a
        dead particle.
    """
    return {
        "first": first,
        "recorded": recorded,
        "dx": DX,
        "dy": DY,
        "left": LEFT,
        "gap": GAP,
        "parts": [
            {
                "b": s.begin,
                "e": s.end,
                "i": s.particles.tolist(),
                "p": s.parents.tolist(),
                "k": "".join("01"[k] for k in s.kept.tolist()),
                "s": ["".join(map(_digits, x)) for x in s.read.T.tolist()] if recorded else [],
                "w": [
                    [round(w, 3) if w > -np.inf else None for w in row]
                    for row in (s.log_shares.T.tolist() if recorded else ())
                ],
            }
            for s in found
        ],
    }


def _digits(symbol: int) -> str:
    return "##" if symbol == EOS_COLUMN else "--" if symbol < 0 else f"{symbol:02x}"
