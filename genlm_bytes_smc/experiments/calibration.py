"""The cheapest beam that is near enough to a wide one, with a margin for texts to come."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from genlm_bytes_smc.beam.model import byte_model
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.beam.state import FloatArray
from genlm_bytes_smc.calls import blocking
from genlm_bytes_smc.experiments.models import ending, read_texts

REFERENCE = BeamParams(K=128)
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 32)
LEAST_TEXTS = 3
MARGIN = 2.0
"""Prediction for m new texts from n takes sqrt(1 + n / m) errors. Twice the error is that for a
third as many; for as many it leaves room for how skewed such differences are."""
THRESHOLDS = (0.05, 0.01, 0.001, 0.0)


class CalibrationError(ValueError):
    """No setting that was tried meets the tolerance.

    Attributes:
        curve: what was measured.
    """

    def __init__(self, message: str, curve: list[Point]) -> None:
        super().__init__(message)
        self.curve = curve


@dataclass(frozen=True)
class Point:
    """One setting, measured.

    Attributes:
        params: the setting.
        excess: mean of |log-probability under the reference - that under the setting| per
            byte, each text's difference taken whole, nats a byte; inf if a beam died.
        bound: `excess` with the margin, nats a byte: what texts of the same sort are
            expected to stay under.
        signed: the same without the absolute value: above 0, the setting holds the texts to be
            less likely than they are.
        rows: LM rows a byte, all texts side by side (a shared beginning counts once).
        seconds: wall time a byte, all texts side by side.
    """

    params: BeamParams
    excess: float
    bound: float
    signed: float
    rows: float
    seconds: float


@dataclass(frozen=True)
class Calibration:
    """A setting chosen by `calibrate`, and all that was measured.

    Attributes:
        params: the cheapest setting that meets the tolerance.
        tolerance: nats a byte.
        confidence: of the margin.
        curve: every setting tried, cheapest first.
        reference: what was compared with, and `reference_rows`, its LM rows a byte.
        texts, bytes: how many were read.
    """

    params: BeamParams
    tolerance: float
    confidence: float
    curve: list[Point]
    reference: BeamParams
    reference_rows: float
    texts: int
    bytes: int

    @property
    def chosen(self) -> Point:
        """The measurements of the chosen parameters."""
        return next(p for p in self.curve if p.params is self.params)

    def __rich__(self) -> Table:
        """Return the curve as a table."""
        shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for head in ("K", "threshold", "prune", "LM rows a byte", "excess", "with margin", ""):
            shown.add_column(head, justify="left" if head in ("prune", "") else "right")
        for p in self.curve:
            told = "chosen" if p.params is self.params else "meets it" * (p.bound <= self.tolerance)
            cells = (f"{p.params.K}", f"{p.params.prune_threshold:g}", p.params.prune)
            numbers = (f"{p.rows:.2f}", f"{p.excess:.2e}", f"{p.bound:.2e}")
            shown.add_row(*cells, *numbers, told, style="bold" if told == "chosen" else None)
        return shown

    def __repr__(self) -> str:
        params, point = self.params, self.chosen
        return (
            f"Calibration(K={params.K}, prune_threshold={params.prune_threshold:g}, "
            f"prune={params.prune!r}: {point.excess:.2e} nats a byte, {point.bound:.2e} with "
            f"margin, tolerance {self.tolerance:g}; {point.rows:.2f} LM rows a byte)"
        )


async def calibrate(
    llm: Any,
    texts: Iterable[bytes | str],
    tolerance: float,
    *,
    widths: Sequence[int] = WIDTHS,
    thresholds: Sequence[float] = THRESHOLDS,
    prune: Sequence[str] = ("topk",),
    reference: BeamParams = REFERENCE,
    confidence: float = 0.95,
    max_bytes: int = 256,
    seed: int = 0,
) -> Calibration:
    """Find the cheapest beam parameters whose text probabilities are near the reference's.

    Each setting reads each text from the model's start. What counts is the absolute
    difference of a text's log-probability from the reference's, per byte: a narrow top-K beam
    serves normalised rows, so it can be off in either direction, and differences of opposite
    sign must not make up for each other.

    The margin is that of a prediction: with n texts of which the excess per byte is a
    weighted mean with standard error e (jackknife), the mean over as many new texts of the
    same sort stays below `excess + 2 t e` with at least about the given confidence, t being
    the quantile of Student's distribution with n - 1 degrees of freedom (see `MARGIN`).
    Texts of another sort are not covered: calibrate on what you will use the model for.

    Args:
        llm: a genlm-backend AsyncLM, or an engine from `load_model`.
        texts: three or more, of the sort that the settings are for; cut to `max_bytes`.
        tolerance: most excess with margin, nats a byte (0.01 is 0.014 bits a byte).
        widths, thresholds, prune: what to try, every combination.
        reference: a beam good enough to be compared with; K=None is exact, and only for texts
            of a few bytes.
        confidence: of the margin, in (0.5, 1).
        max_bytes: of a text.
        seed: of the beams that are pruned at random.

    Returns:
        The parameters, and the measured curve.

    Raises:
        TypeError, ValueError: bad arguments, before any work.
        CalibrationError: no setting meets the tolerance; it says which comes closest.
    """
    spelled = _check(texts, tolerance, confidence, max_bytes, reference)
    tried = _grid(widths, thresholds, prune, seed)
    model = byte_model(llm)
    good = await read_texts(model, ending(model, reference), spelled)
    if not all(np.isfinite(line).all() for line in good.logp):
        raise ValueError(f"the reference beam cannot read every text: {reference}; widen it")
    lengths = np.array([len(text) for text in spelled], dtype=np.float64)
    n, curve = int(lengths.sum()), []
    for params in tried:
        found = await read_texts(model, ending(model, params), spelled)
        apart = np.array([g.sum() - f.sum() for g, f in zip(good.logp, found.logp, strict=True)])
        excess, bound = margin(np.abs(apart), lengths, confidence)
        rows, seconds = found.lm_rows / n, found.seconds / n
        curve.append(Point(params, excess, bound, float(apart.sum() / n), rows, seconds))
    curve.sort(key=lambda p: (p.rows, p.bound))
    fit = next((p for p in curve if p.bound <= tolerance), None)
    if fit is None:
        best = min(curve, key=lambda p: p.bound)
        raise CalibrationError(
            f"none of {len(curve)} settings meets a tolerance of {tolerance:g} nats a byte; the "
            f"closest is K={best.params.K} with threshold {best.params.prune_threshold:g}: "
            f"{best.excess:.2g}, {best.bound:.2g} with the margin for {len(spelled)} texts "
            "(wider beams, or more texts, may do)",
            curve,
        )
    rows = good.lm_rows / n
    return Calibration(fit.params, tolerance, confidence, curve, reference, rows, len(spelled), n)


calibrate_sync = blocking(calibrate)


def margin(differences: FloatArray, lengths: FloatArray, confidence: float) -> tuple[float, float]:
    """Return the mean per byte, and a bound that as many new texts stay under.

    Args:
        differences: float64[T], of each text, nats.
        lengths: float64[T], bytes.
        confidence: one-sided.
    """
    mean = float(differences.sum() / lengths.sum())
    if not math.isfinite(mean):
        return math.inf, math.inf
    n = len(lengths)
    # Residuals of a ratio of means, each as if its text had not been there (jackknife).
    residuals = (differences - mean * lengths) / (1 - lengths / lengths.sum())
    error = math.sqrt(float(np.square(residuals).sum())) / float(lengths.sum())
    return mean, mean + MARGIN * student_quantile(confidence, n - 1) * error


def student_quantile(p: float, degrees: int) -> float:
    """Compute a quantile of Student's distribution, to 1% from two degrees of freedom on.

    The expansion of Abramowitz & Stegun 1964, 26.7.5.
    """
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(z + sum(term / degrees**k for k, term in enumerate(terms, 1)))


def _grid(
    widths: Sequence[int], thresholds: Sequence[float], prune: Sequence[str], seed: int
) -> list[BeamParams]:
    for name, values in (("widths", widths), ("thresholds", thresholds), ("prune", prune)):
        if isinstance(values, str) or not hasattr(values, "__iter__") or len(values) == 0:
            raise ValueError(f"{name} must be a list of one or more values, got {values!r}")
    return [
        BeamParams(K=width, prune_threshold=threshold, prune=how, seed=seed)  # type: ignore[arg-type]
        for how, threshold, width in itertools.product(prune, thresholds, widths)
    ]


def _check(
    texts: Iterable[bytes | str],
    tolerance: float,
    confidence: float,
    max_bytes: int,
    reference: BeamParams,
) -> list[bytes]:
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float):
        raise TypeError(f"tolerance must be a number of nats a byte, got {tolerance!r}")
    if not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance must be above 0 nats a byte, got {tolerance!r}")
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence must be in (0.5, 1), got {confidence!r}")
    if not isinstance(reference, BeamParams):
        raise TypeError(f"reference must be a BeamParams, got {type(reference).__name__}")
    if isinstance(texts, bytes | str):
        raise TypeError(f"texts must be a list of texts, got one: {texts[:40]!r}")
    if max_bytes < 1:
        raise ValueError(f"max_bytes must be at least 1, got {max_bytes!r}")
    spelled = [t.encode() if isinstance(t, str) else t for t in texts]
    for text in spelled:
        if not isinstance(text, bytes):
            raise TypeError(f"texts must be str or bytes, got {type(text).__name__}")
    spelled = [t[:max_bytes] for t in spelled if t]
    if len(spelled) < LEAST_TEXTS:
        raise ValueError(
            f"calibration needs at least {LEAST_TEXTS} texts that are not empty, got {len(spelled)}"
        )
    return spelled
