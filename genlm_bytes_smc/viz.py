"""A run of `smc` as one HTML page that needs nothing else.

Coordinates are computed here, markup is in `html/run.html.j2`. Charts are plain SVG: matplotlib's
would bring links and fixed colours into a page that has neither.

In the ancestry, a particle between two resamplings is one horizontal line, which ends early where
its text does or where it dies. Rows are ordered by ancestor, so that lines never cross.

A page of 32 particles and 100 bytes takes some 110 kB. Greater runs are shown in part, and the
page says so: 50 texts, cut after 1,000 characters; the ancestry of the particles that weigh most,
as many as `MOST_CELLS` allows, over the last `MOST_STEPS` steps. No page is greater than
`MOST_BYTES`.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.alphabet import EOS_COLUMN
from genlm_bytes_smc.beam.state import BoolArray, FloatArray
from genlm_bytes_smc.html import printable, probability, render
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.smc import SMCResult, StepInfo

if TYPE_CHECKING:
    from genlm_bytes_smc.surprisals import Surprisal


MOST_BYTES = 1_000_000  # of a page
MOST_CELLS = 16_000  # particles times steps that are drawn
MOST_STEPS = 500  # the last steps are drawn
MOST_ROWS = 128  # particles that are drawn
DX, DY = 14, 20  # width of a step and height of a row of the ancestry, pixels
LEFT, GAP = 10, 26  # its left margin, and the room for lines between two stretches, pixels
_MOST_TEXTS = 50  # rows of the posterior table
_MOST_CHARACTERS = 1000  # of a text in that table
_MOST_READ = 4  # texts that are coloured
_MOST_COLUMNS = 500  # bytes of coloured texts, in all, under which tokens are shown
_MOST_COLOURED = 4000  # bytes of coloured texts in all
_MOST_POINTS = 400  # of a line in a chart
_DIGITS = [*(f"{b:02x}" for b in range(256)), "##", "--"]  # of bytes, the end, nothing (-1)
_DECADES = 6  # of the logarithmic bars
_LEFT, _RIGHT, _TOP, _BASE = 48, 450, 10, 190  # of a chart's area, pixels


def run_page(
    result: SMCResult,
    about: Mapping[str, Any] | None = None,
    title: str = "SMC run",
    surprisals: Sequence[Surprisal] = (),
) -> str:
    """Return the page, as HTML text.

    Args:
        result: of a run; with `record=True`, the page shows the particles of each step.
        about: what the run was asked for (prompt, model, constraint, ess_threshold), if known.
        title: of the page.
        surprisals: of texts of the run, byte by byte, under its language model; the first four
            are shown, coloured, with the tokens of the beam's candidates under the bytes.

    Raises:
        ValueError: steps of another number of particles than the result has, as in a run that
            died inside a roll-out of several candidates.
    """
    about, history = about or {}, result.history
    for info in history:
        arrays = [a for a in (info.symbols, info.log_weights, info.ancestors) if a is not None]
        if any(len(a) != result.size for a in arrays):
            raise ValueError(
                f"step {info.step} notes {' and '.join(str(len(a)) for a in arrays)} particles, "
                f"and the result has {result.size}: only steps of all its particles can be drawn"
            )
    names = [n for n in ("prompt", "constraint", "model", "resampling") if about.get(n)]
    texts = result.grouped()  # likeliest first
    limit = about.get("ess_threshold")
    line = limit * result.size if isinstance(limit, int | float) else None
    return render(
        "run",
        title=printable(title),
        about=[(n, _cut(printable(str(about[n])))) for n in names],
        tiles=_tiles(result),
        texts=[
            (_cut(printable(text)), probability(p), _widths(p, texts[0][1]), n, ended)
            for text, p, n, ended in texts[:_MOST_TEXTS]
        ],
        more=len(texts) - _MOST_TEXTS,
        coloured=_coloured(surprisals),
        ess=_chart(history, result.ess_path.tolist(), line, 0.0) if history else None,
        log_ml=_chart(history, result.log_ml_path.tolist(), None, None) if history else None,
        **_ancestry(result),
    )


def _ancestry(result: SMCResult) -> dict[str, Any]:
    """Return what the page shows of the particles by step."""
    history, total = result.history, len(result.history)
    if not total:
        return {"recorded": False, "ancestry": None, "steps": None, "left_out": ""}
    recorded = all(i.symbols is not None and i.log_weights is not None for i in history)
    steps = min(total, MOST_STEPS)
    rows = min(result.size, MOST_ROWS, MOST_CELLS // steps)
    found = _stretches(result, rows, recorded)
    left_out = list[str]()
    if rows < result.size:
        left_out.append(f"the {rows} of {result.size:,} particles that weigh most in the end")
    if steps < total:
        left_out.append(f"the last {steps} of {total:,} steps")
    return {
        "recorded": recorded,
        "ancestry": _drawing(found),
        "steps": _stepping(found, total - steps, recorded=recorded),
        "left_out": " and ".join(left_out),
    }


def _widths(p: float, most: float) -> str:
    """Return a bar's width on each scale, as CSS: to the greatest, to one, logarithmic."""
    log = 1 + math.log10(max(p / most, 1e-300)) / _DECADES
    shares = {"a": p / most, "p": p, "l": max(log, 0.0)}
    return ";".join(f"--{name}:{100 * share:.4g}%" for name, share in shares.items())


def _cut(text: str) -> str:
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"{text[:_MOST_CHARACTERS]}… ({len(text) - _MOST_CHARACTERS:,} more characters)"


def _coloured(surprisals: Sequence[Surprisal]) -> list[dict[str, Any]]:
    """Return what is shown of texts that were read again, as far as there is room."""
    out, room = list[dict[str, Any]](), _MOST_COLOURED
    for found in surprisals[:_MOST_READ]:
        if len(found.text) <= room:
            room -= len(found.text)
            out.append(found.view(_MOST_COLUMNS // min(len(surprisals), _MOST_READ)))
    return out


def _tiles(result: SMCResult) -> list[tuple[str, str, str]]:
    """Return (name, value, standard error or "") of what is said first."""
    error, dead = result.log_ml_error, int(result.state.particles.dead.sum())
    shown_error = "" if math.isnan(error) else f"{error:.3f}"
    return [
        ("log marginal likelihood", f"{result.log_ml:.3f}", shown_error),
        ("effective sample size", f"{result.ess:.1f}", ""),
        ("particles", f"{result.size}" + (f", {dead} dead" if dead else ""), ""),
        (f"steps, {len(result.ancestry)} of them resampled", f"{len(result.history)}", ""),
        ("language model rows", f"{result.rows:,}", ""),
        ("seconds", f"{result.seconds:.2f}", ""),
    ]


def _chart(
    history: Sequence[StepInfo], values: Sequence[float], limit: float | None, bottom: float | None
) -> dict[str, Any] | None:
    """Return pixel coordinates of a line of values over steps; None where none is finite.

    Dots mark steps after which the particles were resampled. At `limit` is a dashed line; at
    the lower edge `bottom`, or (None) the smallest value.
    """
    steps = np.array([info.step + 1 for info in history])
    ys = np.array(values, dtype=np.float64)
    finite = np.isfinite(ys)
    if not finite.any():
        return None
    span = [*ys[finite], *([] if limit is None else [limit])]
    low, high = min(span) if bottom is None else bottom, max(span)
    if high - low < 1e-9:
        low, high = low - 1, high + 1
    first, last = int(steps[0]), int(max(steps[-1], steps[0] + 1))

    def x(step: Any) -> Any:
        return np.round(_LEFT + (_RIGHT - _LEFT) * (step - first) / (last - first), 1)

    def y(value: Any) -> Any:
        return np.round(_BASE - (_BASE - _TOP) * (value - low) / (high - low), 1)

    thin = np.flatnonzero(finite)[:: 1 + len(ys) // _MOST_POINTS]
    at = list(zip(x(steps[thin]).tolist(), y(ys[thin]).tolist(), strict=True))
    marked = [history[t].ancestors is not None for t in thin.tolist()]
    digits = min(max(0, 2 - math.floor(math.log10(high - low))), 6)
    ticks = sorted({round(first + (last - first) * i / 4) for i in range(5)})
    return {
        "rows": [(y(v), f"{v:.{digits}f}") for v in np.linspace(low, high, 5).tolist()],
        "columns": [(x(step), step) for step in ticks],
        "limit": None if limit is None else y(limit),
        "line": "M" + "L".join(f"{a} {b}" for a, b in at),
        "dots": [point for point, mark in zip(at, marked, strict=True) if mark],
    }


# -- the ancestry of the particles -----------------------------------------------------------


class _Stretch(NamedTuple):
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


def _stretches(result: SMCResult, most: int, recorded: bool) -> list[_Stretch]:
    """Return what is drawn of a run, in time order.

    Args:
        result: of the run; of more steps than `MOST_STEPS`, the last are drawn.
        most: final particles that are drawn, with their ancestors: those that weigh most.
        recorded: whether every step notes what the particles read and weighed.
    """
    history, n = result.history[-MOST_STEPS:], result.size
    ends = [t + 1 for t, info in enumerate(history) if info.ancestors is not None]
    if not ends or ends[-1] < len(history):
        ends.append(len(history))
    final = result.normalized_weights
    kept, drawn = _back(final > 0, history), [np.ones(n, dtype=bool)] * len(history)
    if most < n:
        last = np.zeros(n, dtype=bool)
        last[np.argsort(-final, kind="stable")[:most]] = True
        drawn = _back(last, history)
    symbols = np.full((len(history), n), -1, np.int16)
    weights = np.full((len(history), n), -np.inf)
    if recorded:
        symbols = np.stack([info.symbols for info in history if info.symbols is not None])
        weights = np.stack([i.log_weights for i in history if i.log_weights is not None])
    total = np.logaddexp.reduce(weights, axis=1, keepdims=True)
    shares, alive = weights - np.where(total == -np.inf, 0.0, total), np.ones(n, dtype=bool)
    above = np.full(n, -1)  # the row of each one's ancestor in the stretch before
    out = list[_Stretch]()
    for begin, end in zip([0, *ends], ends, strict=False):
        read = symbols[begin:end]
        over = (read >= 0) & ((read == EOS_COLUMN) | (weights[begin:end] == -np.inf))
        stops = np.where(over.any(axis=0), over.argmax(axis=0), -1)
        past = (stops >= 0) & (np.arange(end - begin)[:, None] > stops)
        read = np.where(past, -1, read)
        shown = np.flatnonzero(drawn[begin]).tolist()
        shown.sort(key=lambda i: (above[i], read[:, i].tolist()))
        rows = np.array(shown, dtype=np.int64)
        out.append(
            _Stretch(
                begin, end, rows, above[rows], kept[begin][rows], alive[rows], stops[rows],
                np.where(alive, read, -1)[:, rows], shares[begin:end][:, rows],
            )
        )  # fmt: skip
        alive = alive & (stops < 0)
        ancestors = history[end - 1].ancestors
        if ancestors is not None:
            row = np.full(n, -1)
            row[rows] = np.arange(len(rows))
            alive, above = alive[ancestors], row[ancestors]
    return out


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


def _drawing(found: Sequence[_Stretch]) -> dict[str, Any]:
    """Return lines from ancestors to descendants, and what was read on them, row by row."""
    lost, kept = list[str](), list[str]()
    texts = dict[tuple[int, bool], tuple[list[str], list[str]]]()
    for k, s in enumerate(found):
        for row, (parent, keeps, lives) in enumerate(
            zip(s.parents.tolist(), s.kept.tolist(), s.alive.tolist(), strict=True)
        ):
            if not lives:
                continue
            y = row * DY + 18
            width = s.stops[row] + 0.9 if s.stops[row] >= 0 else s.end - s.begin
            join = f"M{_x(s.begin, k - 1)} {parent * DY + 18}L" if parent >= 0 else "M"
            line = f"{join}{_x(s.begin, k)} {y}H{_x(s.begin + width, k)}"
            (kept if keeps else lost).append(line)
            at = np.flatnonzero(s.read[:, row] >= 0)
            if len(at):
                xs, signs = texts.setdefault((y - 5, keeps), ([], []))
                xs += [_x(s.begin + int(t) + 0.5, k) for t in at]
                signs.append(letters_of(s.read[at, row].tolist()))
    rows = max(len(s.particles) for s in found)
    width = _x(found[-1].end + 1, len(found) - 1)
    written = [
        (" ".join(xs), y, "".join(signs), keeps) for (y, keeps), (xs, signs) in texts.items()
    ]
    lines = {"lost": "".join(lost), "kept": "".join(kept)}
    return {"width": width, "height": f"{rows * DY + 8}", **lines, "letters": written}


def _x(step: float, stretch: int) -> str:
    return f"{LEFT + step * DX + stretch * GAP:g}"


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
    if c in " \n":
        return "·" if c == " " else "↵"
    odd = unicodedata.category(c)[0] in "MCZ" or unicodedata.bidirectional(c) in ("R", "AL", "AN")
    return "◆" if odd or ord(c) > 0xFFFF else c


def _stepping(found: Sequence[_Stretch], first: int, *, recorded: bool) -> dict[str, Any]:
    """Return the same lines for the page's script, which steps through them.

    Returns:
        "first", how many steps come before; "recorded"; sizes; and for each stretch: "b", "e" as
        `begin`, "end"; "i" particles, "p" parents; "k" kept, a digit a row; and if symbols and
        weights were recorded, "s" what each row read, two digits a step ("--" nothing, "##" the
        end), and "w" log shares of each row, one a step, None for a dead particle.
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
                "s": ["".join(_DIGITS[x] for x in row) for row in s.read.T.tolist() if recorded],
                "w": [
                    [round(w, 3) if w > -np.inf else None for w in row]
                    for row in (s.log_shares.T.tolist() if recorded else ())
                ],
            }
            for s in found
        ],
    }
