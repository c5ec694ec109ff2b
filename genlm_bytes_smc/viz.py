"""A run of `smc` as one HTML page that needs nothing else.

Coordinates are computed here, markup is in `html/run.html.j2`. Charts are plain SVG: matplotlib's
would bring links and fixed colours into a page that has neither.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.alphabet import EOS_COLUMN
from genlm_bytes_smc.html import printable, render
from genlm_bytes_smc.smc import SMCResult, StepInfo

BoolArray = npt.NDArray[np.bool_]

_MOST_TEXTS = 50  # rows of the posterior table
_MOST_LETTERED = 64  # particles up to which the ancestry shows the bytes they read
_LEFT, _RIGHT, _TOP, _BASE = 48, 450, 10, 190  # of a chart's area, pixels


def run_page(
    result: SMCResult, about: Mapping[str, Any] | None = None, title: str = "SMC run"
) -> str:
    """Return the page, as HTML text.

    Args:
        result: of a run; with `record=True`, the page shows the particles of each step.
        about: what the run was asked for (prompt, model, constraint, ess_threshold), if known.
        title: of the page.

    Raises:
        ValueError: steps of another number of particles than the result has, as in a run that
            died inside a roll-out of several candidates.
    """
    about, history = about or {}, result.history
    _check_sizes(history, result.size)
    recorded = all(i.symbols is not None and i.log_weights is not None for i in history)
    names = [n for n in ("prompt", "constraint", "model", "resampling") if about.get(n)]
    texts = result.grouped()
    limit = about.get("ess_threshold")
    line = limit * result.size if isinstance(limit, int | float) else None
    return render(
        "run",
        title=printable(title),
        about=[(n, printable(str(about[n]))) for n in names],
        tiles=_tiles(result),
        texts=[(printable(text), *rest) for text, *rest in texts[:_MOST_TEXTS]],
        more=len(texts) - _MOST_TEXTS,
        recorded=recorded,
        ancestry=_ancestry(result, recorded) if history else None,
        ess=_chart(history, result.ess_path.tolist(), line, 0.0),
        log_ml=_chart(history, result.log_ml_path.tolist(), None, None),
        steps=[_step(info) for info in history] if recorded else [],
    )


def _check_sizes(history: Sequence[StepInfo], n: int) -> None:
    for info in history:
        arrays = [a for a in (info.symbols, info.log_weights, info.ancestors) if a is not None]
        if any(len(a) != n for a in arrays):
            raise ValueError(
                f"step {info.step} notes {' and '.join(str(len(a)) for a in arrays)} particles, "
                f"and the result has {n}: only steps of all its particles can be drawn"
            )


def _tiles(result: SMCResult) -> list[tuple[str, str, str]]:
    """Return (name, value, standard error or "") of what is said first."""
    error, dead = result.log_ml_error, int(result.state.particles.dead.sum())
    shown_error = "" if math.isnan(error) else f"{error:.3f}"
    steps = f"{len(result.history)}, {len(result.ancestry)} resampled"
    return [
        ("log marginal likelihood", f"{result.log_ml:.3f}", shown_error),
        ("effective sample size", f"{result.ess:.1f}", ""),
        ("particles", f"{result.size}" + (f", {dead} dead" if dead else ""), ""),
        ("steps", steps, ""),
        ("language model rows", f"{result.rows:,}", ""),
        ("seconds", f"{result.seconds:.2f}", ""),
    ]


def _step(info: StepInfo) -> dict[str, Any]:
    """Return symbols, log weights (None: dead) and ancestors of a recorded step, for run.js."""
    assert info.symbols is not None
    assert info.log_weights is not None
    weights = [round(w, 4) if math.isfinite(w) else None for w in info.log_weights.tolist()]
    ancestors = None if info.ancestors is None else info.ancestors.tolist()
    return {"s": info.symbols.tolist(), "w": weights, "a": ancestors}


def _chart(
    history: Sequence[StepInfo], values: Sequence[float], limit: float | None, bottom: float | None
) -> dict[str, Any] | None:
    """Return pixel coordinates of a line over steps; None where no value is finite.

    Args:
        history: T steps; a dot marks those after which the particles were resampled.
        values: T numbers.
        limit: height of a dashed line.
        bottom: value at the lower edge; None: the smallest.
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

    at = list(zip(x(steps[finite]).tolist(), y(ys[finite]).tolist(), strict=True))
    marked = [i.ancestors is not None for i, keep in zip(history, finite, strict=True) if keep]
    ticks = sorted({round(first + (last - first) * i / 4) for i in range(5)})
    return {
        "rows": [(y(v), f"{v:.4g}") for v in np.linspace(low, high, 5).tolist()],
        "columns": [(x(step), step) for step in ticks],
        "limit": None if limit is None else y(limit),
        "line": "M" + "L".join(f"{a} {b}" for a, b in at),
        "dots": [point for point, mark in zip(at, marked, strict=True) if mark],
    }


# -- ancestry ----------------------------------------------------------------------------------


def _ancestry(result: SMCResult, recorded: bool) -> dict[str, Any]:
    """Return lines from ancestors to descendants, and the bytes on them if there is room.

    Between two resamplings a particle is one horizontal line, which ends early where its text
    does or where it dies.
    """
    n, history = result.size, result.history
    lettered = recorded and n <= _MOST_LETTERED
    dx, dy = (14, 17) if lettered else (6, max(2, min(10, 900 // n)))
    ys = [(i + 0.5) * dy + 4 for i in range(n)]
    lost, kept, letters = list[str](), list[str](), list[tuple[float, float, str, bool]]()
    alive = np.ones(n, dtype=bool)

    def xs(step: float) -> float:
        return 10 + step * dx

    for begin, end, keeps in _stretches(result):
        ends_at, read = _until(history[begin:end], n, recorded)
        stops = np.where(ends_at >= 0, ends_at + 0.5, end - begin - 0.25)
        for i in np.flatnonzero(alive).tolist():
            line = f"M{xs(begin):g} {ys[i]:g}H{xs(begin + stops[i]):g}"
            (kept if keeps[i] else lost).append(line)
        if lettered:
            letters += [
                (xs(begin + t + 0.5), ys[i] + 4, _letter(read[t, i]), bool(keeps[i]))
                for t, i in np.argwhere((read >= 0) & alive).tolist()
            ]
        alive = alive & (ends_at < 0)
        ancestors = history[end - 1].ancestors
        if ancestors is not None:
            after = _kept(result, end)
            for i, a in enumerate(ancestors.tolist()):
                if alive[a]:
                    line = f"M{xs(end - 0.25):g} {ys[a]:g}L{xs(end + 0.1):g} {ys[i]:g}"
                    (kept if after[i] else lost).append(line)
            alive = alive[ancestors]
    width, height = f"{xs(len(history)) + 14:g}", f"{n * dy + 8:g}"
    lines = {"lost": "".join(lost), "kept": "".join(kept)}
    return {"width": width, "height": height, **lines, "letters": letters}


def _stretches(result: SMCResult) -> list[tuple[int, int, BoolArray]]:
    """Return (first step, last step + 1, kept particles) between one resampling and the next."""
    history = result.history
    ends = [t + 1 for t, info in enumerate(history) if info.ancestors is not None]
    if not ends or ends[-1] < len(history):
        ends.append(len(history))
    return [(b, e, _kept(result, b)) for b, e in zip([0, *ends], ends, strict=False)]


def _kept(result: SMCResult, step: int) -> BoolArray:
    """Return which particles at the beginning of a step have a descendant of weight, bool[N]."""
    kept: BoolArray = result.normalized_weights > 0
    for info in reversed(result.history[step:]):
        if info.ancestors is not None:
            before = np.zeros_like(kept)
            before[info.ancestors[kept]] = True
            kept = before
    return kept


def _until(
    steps: Sequence[StepInfo], n: int, recorded: bool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int16]]:
    """Return at which step each text ended or died (-1: at none), and the symbols read till then.

    Returns:
        int64[n]; int16[steps, n], -1 where nothing was read.
    """
    if not recorded:
        return np.full(n, -1), np.full((len(steps), n), -1, dtype=np.int16)
    symbols = np.stack([info.symbols for info in steps if info.symbols is not None])
    weights = np.stack([info.log_weights for info in steps if info.log_weights is not None])
    over = (symbols >= 0) & ((symbols == EOS_COLUMN) | (weights == -np.inf))
    ends_at = np.where(over.any(axis=0), over.argmax(axis=0), -1)
    past = (ends_at >= 0) & (np.arange(len(steps))[:, None] > ends_at)
    return ends_at, np.where(past, -1, symbols)


def _letter(symbol: int) -> str:
    """Return how a byte, or the end of the text, is written on a line."""
    if symbol == EOS_COLUMN:
        return "■"
    if symbol == 32:
        return "·"
    return chr(symbol) if 32 < symbol < 127 else f"{symbol:02x}"
