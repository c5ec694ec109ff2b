"""How far distributions and estimates are from each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.smc.particles import Weights

FloatArray = npt.NDArray[np.float64]

LN2 = math.log(2.0)


def jensen_shannon(p: FloatArray, q: FloatArray) -> FloatArray:
    """Jensen-Shannon divergence of pairs of rows, in bits: between 0 and 1 (Lin 1991).

    Its root is the Jensen-Shannon distance, a metric.

    Args:
        p, q: float64[..., S] log weights, nats; normalised here.

    Returns:
        float64[...]; 1, the most, where just one of the two rows is empty.
    """
    a, b = _probabilities(p), _probabilities(q)
    middle = 0.5 * (a + b)
    out: FloatArray = 0.5 * (_relative(a, middle) + _relative(b, middle)) / LN2
    empty = (a.sum(-1) == 0) | (b.sum(-1) == 0)
    return np.where(empty, 1.0, np.clip(out, 0.0, 1.0))


def total_variation(p: Mapping[Any, float], q: Mapping[Any, float]) -> float:
    """Half the l1 distance of two normalised distributions, in [0, 1]."""
    return 0.5 * sum(abs(p.get(k, 0.0) - q.get(k, 0.0)) for k in set(p) | set(q))


def normalised(weights: Mapping[Any, float]) -> dict[Any, float]:
    """Weights that sum to one; all zero if none is positive."""
    total = sum(weights.values())
    return {k: (w / total if total > 0 else 0.0) for k, w in weights.items()}


def log_mean(values: Iterable[float]) -> float:
    """Log of the mean of exp(values), nats."""
    return Weights(np.asarray(list(values), dtype=np.float64)).log_mean


def estimate_quality(log_estimates: Sequence[float], log_truth: float) -> dict[str, float]:
    """What independent estimates of one number are worth.

    Args:
        log_estimates: logarithms, -inf for an estimate of zero.
        log_truth: of the true value, or the best there is.

    Returns:
        mean: of estimate over truth; mean_error: its standard error; relative_variance of
        the estimates; dead: share of zeros; log_sd and log_bias: standard deviation and bias of
        the logarithms of those that are not zero, nats; log_rmse: root mean square error
        of those.
    """
    logs = np.asarray(log_estimates, dtype=np.float64) - log_truth
    ratios, alive = np.exp(logs), logs[np.isfinite(logs)]
    n = len(ratios)
    variance = float(ratios.var(ddof=1)) if n > 1 else math.nan
    mean = float(ratios.mean())
    some = len(alive) > 0
    return {
        "runs": n,
        "mean": mean,
        "mean_error": math.sqrt(variance / n) if n > 1 else math.nan,
        "relative_variance": variance / mean**2 if mean > 0 else math.inf,
        "dead": 1.0 - len(alive) / n,
        "log_sd": float(alive.std(ddof=1)) if len(alive) > 1 else math.nan,
        "log_bias": float(alive.mean()) if some else -math.inf,
        "log_rmse": float(np.sqrt(np.square(alive).mean())) if some else math.inf,
    }


def _probabilities(logw: FloatArray) -> FloatArray:
    top = logw.max(axis=-1, keepdims=True)
    w = np.exp(logw - np.where(np.isfinite(top), top, 0.0))
    total = w.sum(axis=-1, keepdims=True)
    return np.asarray(w / np.where(total > 0, total, 1.0))


def _relative(a: FloatArray, b: FloatArray) -> FloatArray:
    """Kullback-Leibler divergence, nats."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(a > 0, a * np.log(a / np.where(b > 0, b, 1.0)), 0.0)
    return np.asarray(terms.sum(axis=-1))
