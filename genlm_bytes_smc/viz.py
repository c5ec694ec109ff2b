"""A run of `smc` as one HTML page that needs nothing else.

Coordinates are computed here and in `viz_tree.py`, markup is in `html/run.html.j2`. Charts are
plain SVG: matplotlib's would bring links and fixed colours into a page that has neither.

A page of 32 particles and 100 bytes takes some 110 kB. Greater runs are shown in part, and the
page says so: 50 texts, cut after 1,000 characters; the ancestry of the particles that weigh most,
as many as `viz_tree.MOST_CELLS` allows, over the last `viz_tree.MOST_STEPS` steps. No page is
greater than `MOST_BYTES`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from genlm_bytes_smc import viz_tree
from genlm_bytes_smc.html import printable, probability, render
from genlm_bytes_smc.smc import SMCResult, StepInfo
from genlm_bytes_smc.surprisal_view import Read, view

MOST_BYTES = 1_000_000  # of a page
_MOST_TEXTS = 50  # rows of the posterior table
_MOST_CHARACTERS = 1000  # of a text in that table
_MOST_READ = 4  # texts that are coloured
_MOST_COLUMNS = 500  # bytes of coloured texts, in all, under which tokens are shown
_MOST_COLOURED = 4000  # bytes of coloured texts in all
_MOST_POINTS = 400  # of a line in a chart
_DECADES = 6  # of the logarithmic bars
_LEFT, _RIGHT, _TOP, _BASE = 48, 450, 10, 190  # of a chart's area, pixels


def run_page(
    result: SMCResult,
    about: Mapping[str, Any] | None = None,
    title: str = "SMC run",
    surprisals: Sequence[Read] = (),
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
    _check_sizes(history, result.size)
    names = [n for n in ("prompt", "constraint", "model", "resampling") if about.get(n)]
    texts = result.grouped()
    limit = about.get("ess_threshold")
    line = limit * result.size if isinstance(limit, int | float) else None
    return render(
        "run",
        title=printable(title),
        about=[(n, _cut(printable(str(about[n])))) for n in names],
        tiles=_tiles(result),
        texts=_texts(texts[:_MOST_TEXTS]),
        more=len(texts) - _MOST_TEXTS,
        coloured=_coloured(surprisals),
        ess=_chart(history, result.ess_path.tolist(), line, 0.0) if history else None,
        log_ml=_chart(history, result.log_ml_path.tolist(), None, None) if history else None,
        **_ancestry(result),
    )


def _ancestry(result: SMCResult) -> dict[str, Any]:
    """Return what the page shows of the particles by step."""
    recorded, total = viz_tree.is_recorded(result), len(result.history)
    if not total:
        return {"recorded": False, "ancestry": None, "steps": None, "left_out": ""}
    found = viz_tree.stretches(result)
    rows, steps = viz_tree.rows_drawn(result), min(total, viz_tree.MOST_STEPS)
    left_out = list[str]()
    if rows < result.size:
        left_out.append(f"the {rows} of {result.size:,} particles that weigh most in the end")
    if steps < total:
        left_out.append(f"the last {steps} of {total:,} steps")
    return {
        "recorded": recorded,
        "ancestry": viz_tree.drawing(found, letters=recorded),
        "steps": viz_tree.stepping(found, total - steps, recorded=recorded),
        "left_out": " and ".join(left_out),
    }


def _texts(
    found: Sequence[tuple[bytes, float, int, bool]],
) -> list[tuple[str, str, str, int, bool]]:
    """Return (text, probability, widths of its bar, particles, ended) of each row."""
    most = max((p for _, p, _, _ in found), default=1.0)
    return [
        (_cut(printable(text)), probability(p), _widths(p, most), n, ended)
        for text, p, n, ended in found
    ]


def _widths(p: float, most: float) -> str:
    """Return a bar's width on each scale, as CSS: to the greatest, to one, logarithmic."""
    log = 1 + math.log10(max(p / most, 1e-300)) / _DECADES
    shares = {"a": p / most, "p": p, "l": max(log, 0.0)}
    return ";".join(f"--{name}:{100 * share:.4g}%" for name, share in shares.items())


def _cut(text: str) -> str:
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"{text[:_MOST_CHARACTERS]}… ({len(text) - _MOST_CHARACTERS:,} more characters)"


def _coloured(surprisals: Sequence[Read]) -> list[dict[str, Any]]:
    """Return what is shown of texts that were read again, as far as there is room."""
    out, room = list[dict[str, Any]](), _MOST_COLOURED
    for found in surprisals[:_MOST_READ]:
        if len(found.text) <= room:
            room -= len(found.text)
            out.append(view(found, _MOST_COLUMNS // min(len(surprisals), _MOST_READ)))
    return out


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
