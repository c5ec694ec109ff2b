"""Distances between distributions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

LN2 = math.log(2.0)


def jensen_shannon(p: FloatArray, q: FloatArray) -> FloatArray:
    """Return the Jensen-Shannon divergence of pairs of rows, in bits: between 0 and 1 (Lin 1991).

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
    """Return half the l1 distance of two normalised distributions, in [0, 1]."""
    return 0.5 * sum(abs(p.get(k, 0.0) - q.get(k, 0.0)) for k in {**p, **q})


def normalised(weights: Mapping[Any, float]) -> dict[Any, float]:
    """Return weights that sum to one; all zero if none is positive."""
    total = sum(weights.values())
    return {k: (w / total if total > 0 else 0.0) for k, w in weights.items()}


def _probabilities(logw: FloatArray) -> FloatArray:
    top = logw.max(axis=-1, keepdims=True)
    w = np.exp(logw - np.where(np.isfinite(top), top, 0.0))
    total = w.sum(axis=-1, keepdims=True)
    return np.asarray(w / np.where(total > 0, total, 1.0))


def _relative(a: FloatArray, b: FloatArray) -> FloatArray:
    """Return the Kullback-Leibler divergence, nats."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(a > 0, a * np.log(a / np.where(b > 0, b, 1.0)), 0.0)
    return np.asarray(terms.sum(axis=-1))
