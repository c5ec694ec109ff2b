"""Bounds on a log marginal likelihood from both sides.

The logarithm of an unbiased estimate is too low on average (Jensen), so the mean of `log_ml`
over runs of `smc` bounds the truth from below. A conditional run that is held to an exact
sample of the target gives an estimate whose inverse is unbiased for the inverse of the truth,
so its logarithm is too high on average (bidirectional Monte Carlo: Grosse, Ghahramani & Adams
2015, arXiv:1511.02543; for language models Zhao et al. 2024, arXiv:2404.17546).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from genlm_bytes_smc.blocking import blocking
from genlm_bytes_smc.checks import check_count
from genlm_bytes_smc.smc.conditional import conditional_smc
from genlm_bytes_smc.smc.exact import exact_sample
from genlm_bytes_smc.smc.many import smc_repeat
from genlm_bytes_smc.smc.resampling import FloatArray
from genlm_bytes_smc.smc.samples import LogMLBounds, TextSamples

GAPE = 1.0  # nats between the bounds from which on a warning says so


async def log_ml_bounds(
    target: Any,
    n_particles: int,
    ess_threshold: float = 0.5,
    max_bytes: int = 100,
    *,
    result: TextSamples | None = None,
    exact: Sequence[bytes] | None = None,
    runs: int = 8,
    confidence: float = 0.95,
    max_rows: int | None = None,
    seed: int = 0,
) -> LogMLBounds:
    """Bound the log marginal likelihood by runs of `smc` and by runs held to exact samples.

    Args:
        target, n_particles, ess_threshold, max_bytes: as for `smc`.
        result: a run to which the bounds are attached, as `result.log_ml_bounds`.
        exact: whole texts drawn from the target itself, at least four; None: drawn by
            `exact_sample`.
        runs: how many of each kind, at least four; as many as there are exact texts.
        confidence: of the interval, in (0, 1): each side has half of the rest.
        max_rows: of `exact_sample`.
        seed: of all runs.

    Raises:
        ValueError: a number out of range, or fewer than four exact samples.

    Warns:
        UserWarning: the bounds are more than a nat apart: more particles are due.
    """
    check_count("runs", runs, 4)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence!r}")
    if exact is None:
        exact = (await exact_sample(target, runs, max_rows, max_bytes, seed=seed)).texts
    if len(exact) < 4:
        raise ValueError(f"at least four exact samples are due, got {len(exact)}")
    size = n_particles, ess_threshold, max_bytes
    below = (await smc_repeat(target, *size, seeds=range(seed, seed + runs))).log_mls
    held = [
        await conditional_smc(target, text, *size, seed=seed + i) for i, text in enumerate(exact)
    ]
    above = np.array([run.result.log_ml for run in held])
    share = (1 + confidence) / 2
    bounds = LogMLBounds(
        _mean(below) - _half(below, share), _mean(above) + _half(above, share), confidence
    )
    if result is not None:
        result.log_ml_bounds = bounds
    if bounds.high - bounds.low > GAPE:
        warnings.warn(
            f"the log marginal likelihood is between {bounds.low:.2f} and {bounds.high:.2f}: "
            "more particles, or a look-ahead, are due",
            stacklevel=2,
        )
    return bounds


def _mean(values: FloatArray) -> float:
    return float(np.mean(values))


def _half(values: FloatArray, share: float) -> float:
    """Return the half width of a one-sided interval of Student's t for the mean."""
    n = len(values)
    if not np.isfinite(values).all():
        return np.inf
    return float(_student(share, n - 1) * np.std(values, ddof=1) / np.sqrt(n))


def _student(share: float, freedom: int) -> float:
    """Return a quantile of Student's t, by its expansion about the normal one (to 1% from 3 on).

    Abramowitz & Stegun 1964, 26.7.5.
    """
    z: float = NormalDist().inv_cdf(share)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return float(z + sum(term / freedom ** (k + 1) for k, term in enumerate(terms)))


log_ml_bounds_sync = blocking(log_ml_bounds)
