"""Resampling: which particles go on, and how often.

Every scheme takes normalised weights W and returns N ancestors such that particle i has
N W_i offspring in expectation. In order of the variance they add: multinomial (independent
draws), residual (the whole parts of N W_i for certain, multinomial for the rest; Liu & Chen
1998), stratified (one uniform a stratum of length 1/N) and systematic (one uniform for all
strata; both Kitagawa 1996). Douc, Cappé & Moulines (2005, ISPA) compare them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Resampler = Callable[[FloatArray, np.random.Generator], IntArray]


def systematic(weights: FloatArray, rng: np.random.Generator) -> IntArray:
    """Points (i + u) / N with one uniform u: floor or ceil of N W_i offspring each."""
    n = len(weights)
    return _invert(weights, (rng.random() + np.arange(n)) / n)


def stratified(weights: FloatArray, rng: np.random.Generator) -> IntArray:
    """Points (i + u_i) / N with a uniform u_i a stratum."""
    n = len(weights)
    return _invert(weights, (rng.random(n) + np.arange(n)) / n)


def residual(weights: FloatArray, rng: np.random.Generator) -> IntArray:
    """floor(N W_i) offspring for certain, the others by multinomial draws of what is left."""
    n = len(weights)
    whole = np.floor(n * weights)
    certain = np.repeat(np.arange(n), whole.astype(np.int64))
    left = n - len(certain)
    if left == 0:
        return certain
    drawn = _invert(n * weights - whole, np.sort(rng.random(left)))
    return np.sort(np.concatenate([certain, drawn]))


def multinomial(weights: FloatArray, rng: np.random.Generator) -> IntArray:
    """N independent draws, in ascending order."""
    return _invert(weights, np.sort(rng.random(len(weights))))


RESAMPLING: dict[str, Resampler] = {
    "systematic": systematic,
    "stratified": stratified,
    "residual": residual,
    "multinomial": multinomial,
}


def resampler(method: str) -> Resampler:
    """The scheme of that name.

    Every scheme takes weights float64[N] (non-negative, summing to one) and a generator, and
    returns ancestors int64[N], ascending.

    Raises:
        ValueError: an unknown name.
    """
    if method not in RESAMPLING:
        raise ValueError(
            f"unknown resampling method {method!r}; known: {', '.join(sorted(RESAMPLING))}"
        )
    return RESAMPLING[method]


def _invert(weights: FloatArray, points: FloatArray) -> IntArray:
    """Inverse of the cumulative weights at ascending points in [0, 1); never a zero weight."""
    total = np.cumsum(weights)
    drawn = np.searchsorted(total, points * total[-1], side="right")
    out: IntArray = np.minimum(drawn, np.flatnonzero(weights)[-1]).astype(np.int64)
    return out
