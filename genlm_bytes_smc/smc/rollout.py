"""Roll-outs: sample several bytes, then weigh, then resample.

With one candidate a roll-out of m bytes only says that resampling waits for the m-th byte.
With M candidates each particle is continued M times by m bytes, and keeps one of the
continuations, drawn in proportion to their weights w_1..w_M; its own weight is their mean. Then

    E[mean(w) f(x_picked)] = E[sum_j w_j / M * f(x_j)] = E[w_1 f(x_1)]   for every f,

so it is properly weighted for what a lone continuation is properly weighted for (one step of
importance resampling inside each particle: Naesseth, Lindsten & Schön 2015, ICML, "Nested
sequential Monte Carlo methods", section 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from genlm_bytes_smc.smc.checks import check_count
from genlm_bytes_smc.smc.resampling import FloatArray, IntArray


@dataclass(frozen=True)
class Rollout:
    """How far particles are continued before they are resampled, and how often.

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
        """What the option `rollout` of `smc` names: None, a number of bytes, or itself.

        Raises:
            TypeError, ValueError: none of them.
        """
        if rollout is None:
            return cls(1)
        return rollout if isinstance(rollout, Rollout) else cls(rollout)

    def begins(self, step: int, size: int, n_particles: int) -> bool:
        """Whether particles are to be continued several times from here on.

        Args:
            step: bytes read.
            size: of the particles now: `n_particles` unless inside a roll-out.
            n_particles: N.
        """
        return self.candidates > 1 and size == n_particles

    def ends(self, step: int, active: int) -> bool:
        """Whether the byte just read after `step` others is the last of a roll-out.

        Args:
            step: bytes read before.
            active: how many particles read on: without any there is nothing to wait for.
        """
        return (step + 1) % self.n_bytes == 0 or active == 0

    def pick(
        self, log_weights: FloatArray, rng: np.random.Generator
    ) -> tuple[IntArray, FloatArray]:
        """One candidate of each particle, by weight.

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
