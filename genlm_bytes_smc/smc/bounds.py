"""Bounds on a log marginal likelihood from both sides.

The estimate of a run of `smc` has the mean Z; that of a conditional run which is held to an exact
sample of the target has an inverse with the mean 1/Z, so one is too low and the other too high in
the mean of logarithms (bidirectional Monte Carlo: Grosse, Ghahramani & Adams 2015,
arXiv:1511.02543; for language models Zhao et al. 2024, arXiv:2404.17546).

How far off they are is not read off their spread: runs that all miss the same text agree. For
ratios r_i = estimate / Z with mean one, prod (1 + s (r_i - 1)) has the mean one for each share s in
[0, 1], and so does a mean of it over some shares. A Z under which that is as large as 1/a has a
probability of at most a, by Markov's inequality, whatever the law of the estimates and however few
there are (betting on a mean: Waudby-Smith & Ramdas 2024, arXiv:2010.09686). With s = 1 the bound is
the mean of logarithms less log(1/a) / n; with s < 1 an estimate of nearly zero does not ruin it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from genlm_bytes_smc.calls import blocking
from genlm_bytes_smc.checks import check_count
from genlm_bytes_smc.smc.conditional import conditional_runs
from genlm_bytes_smc.smc.exact import exact_sample
from genlm_bytes_smc.smc.factors import prunings
from genlm_bytes_smc.smc.many import smc_repeat
from genlm_bytes_smc.smc.resampling import FloatArray
from genlm_bytes_smc.smc.samples import LogMLBounds, TextSamples

GAPE = 1.0  # nats between the bounds from which on a warning says so
_ROUNDING = 1e-6  # nats
_SHARES = ((1.0, 0.9), (0.5, 0.1))  # s of the module's docstring, and how much each counts


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

    The interval covers the truth with the probability asked for, whatever the target and however
    few particles: both kinds of estimate only have to be independent and right on average. Its
    width is at least 2 log(2 / (1 - confidence)) / runs, for 8 runs and 95% about a nat, as so few
    exact samples say nothing of texts with a lesser share. If `exact` is None and all beams have
    `prune="topk"`, the interval is also cut at the certain bounds of the draws, which are narrower
    where the constraint leaves few texts.

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
        UserWarning: the bounds are more than a nat apart: more runs or particles are due.
    """
    check_count("runs", runs, 4)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence!r}")
    certain = LogMLBounds(-np.inf, np.inf, 1.0)
    if exact is None:
        drawn = await exact_sample(target, runs, max_rows, max_bytes, seed=seed)
        exact = drawn.texts
        if drawn.log_ml_bounds is not None and prunings([target]) == {"topk"}:
            certain = drawn.log_ml_bounds
    if len(exact) < 4:
        raise ValueError(f"at least four exact samples are due, got {len(exact)}")
    size = n_particles, ess_threshold, max_bytes
    below = (await smc_repeat(target, *size, seeds=range(seed, seed + runs))).log_mls
    seeds = range(seed, seed + len(exact))
    held = await conditional_runs(target, exact, *size, seeds)
    above = np.array([found.log_ml for found in held])
    bounds = interval(below, above, confidence)
    # What is certain is so up to the rounding of rows.
    low, high = max(bounds.low, certain.low - _ROUNDING), min(bounds.high, certain.high + _ROUNDING)
    bounds = LogMLBounds(low, high, confidence)
    if result is not None:
        result.log_ml_bounds = bounds
    if bounds.high - bounds.low > GAPE:
        warnings.warn(
            f"the log marginal likelihood is between {bounds.low:.2f} and {bounds.high:.2f}: "
            "more runs (runs=), more particles, or a look-ahead, are due",
            stacklevel=2,
        )
    return bounds


def interval(below: FloatArray, above: FloatArray, confidence: float) -> LogMLBounds:
    """Return bounds from log estimates (nats) of runs, and of runs held to exact samples."""
    return LogMLBounds(lower_bound(below, confidence), -lower_bound(-above, confidence), confidence)


def lower_bound(logs: FloatArray, confidence: float) -> float:
    """Return a bound that the log of the mean of a positive variable seldom falls below.

    Args:
        logs: float64[n], logs of independent draws of the variable, nats; -inf is zero.
        confidence: the bound is too high with probability (1 - confidence) / 2 at most.
    """
    least = np.log(2 / (1 - confidence))
    top = float(logs.max())
    if top == -np.inf:
        return top

    def capital(level: float) -> float:
        """Return the log of the mean over shares of prod (1 + s (exp(log - level) - 1))."""
        with np.errstate(divide="ignore"):
            terms = [
                np.log(count) + np.logaddexp(np.log1p(-share), np.log(share) + logs - level).sum()
                for share, count in _SHARES
            ]
        return float(np.logaddexp.reduce(terms))

    # At `low` the largest draw alone is enough, at `high` none is above one.
    share, count = _SHARES[-1]
    low = top + np.log(count * share) + (len(logs) - 1) * np.log1p(-share) - least
    high = top
    while high - low > 1e-9 * max(1.0, abs(high)):
        middle = (low + high) / 2
        low, high = (middle, high) if capital(middle) >= least else (low, middle)
    return float(low)


log_ml_bounds_sync = blocking(log_ml_bounds)
