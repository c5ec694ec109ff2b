"""Which particles go on, and how often: resampling, roll-outs, and the setting of moves.

Every resampling scheme takes normalised weights W and returns N ancestors such that particle i has
N W_i offspring in expectation. In order of the variance they add: multinomial (independent
draws), residual (the whole parts of N W_i for certain, multinomial for the rest; Liu & Chen
1998), stratified (one uniform a stratum of length 1/N) and systematic (one uniform for all
strata; both Kitagawa 1996). Douc, Cappé & Moulines (2005, ISPA) compare them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.checks import check_count

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Resampler = Callable[[FloatArray, np.random.Generator], IntArray]


def systematic(weights: FloatArray, rng: np.random.Generator) -> IntArray:
    """Take points (i + u) / N with one uniform u: floor or ceil of N W_i offspring each."""
    n = len(weights)
    return _invert(weights, (rng.random() + np.arange(n)) / n)


def stratified(weights: FloatArray, rng: np.random.Generator) -> IntArray:
    """Take points (i + u_i) / N with one uniform u_i a stratum."""
    n = len(weights)
    return _invert(weights, (rng.random(n) + np.arange(n)) / n)


def residual(weights: FloatArray, rng: np.random.Generator) -> IntArray:
    """Give floor(N W_i) offspring for certain, the others by multinomial draws of the rest."""
    n = len(weights)
    whole = np.floor(n * weights)
    certain = np.repeat(np.arange(n), whole.astype(np.int64))
    left = n - len(certain)
    if left == 0:
        return certain
    drawn = _invert(n * weights - whole, np.sort(rng.random(left)))
    return np.sort(np.concatenate([certain, drawn]))


def multinomial(weights: FloatArray, rng: np.random.Generator) -> IntArray:
    """Make N independent draws, in ascending order."""
    return _invert(weights, np.sort(rng.random(len(weights))))


RESAMPLING: dict[str, Resampler] = {
    "systematic": systematic,
    "stratified": stratified,
    "residual": residual,
    "multinomial": multinomial,
}


def resampler(method: str) -> Resampler:
    """Return the scheme of that name: from weights float64[N] to ancestors int64[N], ascending.

    Raises:
        ValueError: an unknown name.
    """
    if method not in RESAMPLING:
        raise ValueError(
            f"unknown resampling method {method!r}; known: {', '.join(sorted(RESAMPLING))}"
        )
    return RESAMPLING[method]


def _invert(weights: FloatArray, points: FloatArray) -> IntArray:
    """Invert the cumulative weights at ascending points in [0, 1); never at a zero weight."""
    total = np.cumsum(weights)
    drawn = np.searchsorted(total, points * total[-1], side="right")
    out: IntArray = np.minimum(drawn, np.flatnonzero(weights)[-1]).astype(np.int64)
    return out


@dataclass(frozen=True)
class Rollout:
    """A roll-out: several bytes are sampled before particles are weighed and resampled.

    With one candidate a roll-out of m bytes only says that resampling waits for the m-th byte.
    With M candidates each particle is continued M times by m bytes, and keeps one of the
    continuations, drawn in proportion to their weights w_1..w_M; its own weight is their mean.
    Then

        E[mean(w) f(x_picked)] = E[sum_j w_j / M * f(x_j)] = E[w_1 f(x_1)]   for every f,

    so it is properly weighted for what a lone continuation is properly weighted for (one step
    of importance resampling inside each particle: Naesseth, Lindsten & Schön 2015, ICML,
    "Nested sequential Monte Carlo methods", section 2).

    Attributes:
        n_bytes: bytes between two resamplings, m.
        candidates: continuations of each particle, M, of which one is kept.

    Raises:
        TypeError: no integers. ValueError: integers below one.
    """

    n_bytes: int
    candidates: int = 1

    def __post_init__(self) -> None:
        check_count("n_bytes of a roll-out", self.n_bytes, 1)
        check_count("candidates of a roll-out", self.candidates, 1)

    @classmethod
    def of(cls, rollout: Any) -> Rollout:
        """Return the roll-out that an option names: None, a number of bytes, or itself.

        Raises:
            TypeError, ValueError: none of them.
        """
        if rollout is None:
            return cls(1)
        return rollout if isinstance(rollout, Rollout) else cls(rollout)

    def ends(self, step: int, active: int) -> bool:
        """Return whether the byte just read after `step` others is the last of a roll-out.

        So it is if no particle is `active`: there is nothing to wait for.
        """
        return (step + 1) % self.n_bytes == 0 or active == 0

    def pick(
        self, log_weights: FloatArray, rng: np.random.Generator
    ) -> tuple[IntArray, FloatArray]:
        """Draw one candidate of each particle, by weight.

        Args:
            log_weights: float64[N M], candidates of a particle side by side, nats.
            rng: gives one number a particle.

        Returns:
            Which were picked, int64[N], and log of the mean weight of each particle's
            candidates, float64[N], nats: -inf where all are dead.
        """
        rows = log_weights.reshape(-1, self.candidates)
        top = rows.max(axis=1)
        shift = np.where(np.isneginf(top), 0.0, top)
        run = np.exp(rows - shift[:, None]).cumsum(axis=1)
        point = rng.random(len(rows)) * run[:, -1]
        column = np.minimum((run <= point[:, None]).sum(axis=1), self.candidates - 1)
        with np.errstate(divide="ignore"):
            mean = shift + np.log(run[:, -1] / self.candidates)
        picked: IntArray = np.arange(len(rows)) * self.candidates + column
        return picked, mean


def strings_of(resample_at: Any) -> tuple[bytes, ...]:
    """Return the strings that `smc(resample_at=...)` names; none for None.

    Raises:
        TypeError: no string or strings. ValueError: none of them, or an empty one.
    """
    if resample_at is None:
        return ()
    several = isinstance(resample_at, Iterable) and not isinstance(resample_at, str | bytes)
    strings = list(resample_at) if several else [resample_at]
    odd = next((s for s in strings if not isinstance(s, str | bytes)), None)
    if odd is not None:
        raise TypeError(f"resample_at must be bytes, str or several of them, got {odd!r}")
    found = tuple(s.encode() if isinstance(s, str) else s for s in strings)
    if not found or not all(found):
        raise ValueError(f"resample_at needs strings of at least a byte, got {resample_at!r}")
    return found


@dataclass(frozen=True)
class Suffix:
    """A move that re-proposes the end of each text, accepted by Metropolis-Hastings.

    A move reads the texts again from their beginning (equal texts once; rows of the language
    model that are still kept cost nothing) and draws at most `longest` bytes anew.

    Attributes:
        longest: most symbols that are proposed anew, w; None: the whole text may be.
        sweeps: moves after each resampling.

    Raises:
        TypeError: no integers. ValueError: integers below one.
    """

    longest: int | None = 16
    sweeps: int = 1

    def __post_init__(self) -> None:
        if self.longest is not None:
            check_count("longest of a Suffix", self.longest, 1)
        check_count("sweeps of a Suffix", self.sweeps, 1)
