"""What is lent to the weights of unfinished texts, and tempering.

A particle's log weight carries, until its next byte is read, the loan

    beta_t (critic(x) + s log psi(x)) + (beta_t - 1) soft(x)

with the critic's prefix weight, the look-ahead's psi to its strength s, and the log prefix
weight `soft` of the target's factors that are no language models. So with t bytes read
resampling sees the target gamma_t(x) = LM(x) (soft(x) critic(x) psi(x)^s)^beta_t, a bridge from
the language model to the whole target as beta_t rises to 1 (annealing as in Del Moral, Doucet &
Jasra 2006, along the text). The loan is taken back before the next byte is weighed and an ended
text has none, so weights telescope to those of the target. What is impossible (-inf) is so for
every beta > 0: only weights between can be graded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from genlm_bytes_smc.alphabet import BYTES
from genlm_bytes_smc.smc.ahead import AheadFactor
from genlm_bytes_smc.smc.critic import DistinctReads
from genlm_bytes_smc.smc.frontier import Frontier, Rows
from genlm_bytes_smc.smc.particles import Particles
from genlm_bytes_smc.smc.resampling import FloatArray, IntArray

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Loan:
    """What a plan lends.

    Attributes:
        ahead: which leaf is the look-ahead of the twist, or None.
        strength: power of its psi.
        schedule: beta after t bytes, or None (always 1).
        soft: the target's factors whose weights are graded.
        critic: whether a critic's loan is there to be graded.
    """

    ahead: int | None = None
    strength: float = 1.0
    schedule: Schedule | None = None
    soft: tuple[Any, ...] = ()

    @property
    def none(self) -> bool:
        """Whether nothing is lent but what a critic lends."""
        return self.ahead is None and self.schedule is None

    async def lend(
        self, particles: Particles, frontier: Frontier, rows: Rows, symbols: IntArray, read: int
    ) -> Particles:
        """Particles that have just read a symbol, with the loan in weights and `twist`.

        Args:
            particles: after the critic, whose own loan is in `twist`.
            frontier, rows: as they were before reading.
            symbols: int64[N], what was read.
            read: how many bytes active particles have read now.
        """
        going = np.flatnonzero(particles.active & (frontier.lane_of >= 0))
        if self.none or not len(going):
            return particles
        had = particles.twist[going]
        loan = had.copy()
        if self.ahead is not None:
            loan += self.strength * self._psi(frontier, rows, going, symbols)
        if self.schedule is not None:
            beta = self.beta(read)
            loan = beta * loan
            if self.soft and beta != 1:
                loan += (beta - 1) * await self._soft(particles, frontier.lane_of, symbols, going)
        log_weights, twist = particles.log_weights.copy(), particles.twist.copy()
        log_weights[going] += loan - had
        twist[going] = np.where(loan == -np.inf, 0.0, loan)
        return particles._replace(log_weights=log_weights, twist=twist)

    def beta(self, read: int) -> float:
        """The exponent after `read` bytes.

        Raises:
            ValueError: the schedule gave a number outside (0, 1].
        """
        assert self.schedule is not None
        beta = float(self.schedule(read))
        if not 0 < beta <= 1:
            raise ValueError(f"tempering must give numbers in (0, 1], got {beta} for {read} bytes")
        return beta

    def _psi(
        self, frontier: Frontier, rows: Rows, going: IntArray, symbols: IntArray
    ) -> FloatArray:
        """log psi of what the particles `going` have read now, nats."""
        assert self.ahead is not None
        factor = frontier.factors[self.ahead]
        assert isinstance(factor, AheadFactor)
        lanes = frontier.lane_of[going]
        now = factor.value.cpu().numpy()[lanes]
        block = rows.blocks[self.ahead].cpu().numpy()
        out: FloatArray = np.where(now == -np.inf, 0.0, now) + block[lanes, symbols[going]]
        return out

    async def _soft(
        self, particles: Particles, lanes: IntArray, symbols: IntArray, going: IntArray
    ) -> FloatArray:
        """Log prefix weight of the graded factors, once a distinct text, nats."""
        reads = DistinctReads(particles, np.where(particles.active, lanes, -1), symbols)
        score = np.zeros(len(reads.texts))
        contexts = [[BYTES[b] for b in text] for text in reads.texts]
        for factor in self.soft:
            score += np.asarray(await factor.batch_prefix(contexts), dtype=np.float64)
        mine = np.zeros(len(particles.length))
        mine[reads.particle] = score[reads.inverse]
        return mine[going]


def schedule_of(tempering: Any) -> Schedule | None:
    """The schedule that `smc(tempering=...)` names.

    Args:
        tempering: None; a number of bytes T, for beta_t = min(1, t / T); a sequence of
            exponents, one a byte read, beginning with that after the first; or a function of
            the number of bytes read (1 or more).

    Raises:
        TypeError, ValueError: none of these, or exponents outside (0, 1].
    """
    if tempering is None:
        return None
    if callable(tempering):
        given: Schedule = tempering
        return given
    if isinstance(tempering, Sequence) and not isinstance(tempering, str | bytes):
        betas = [float(b) for b in tempering]
        if not betas or not all(0 < b <= 1 for b in betas):
            raise ValueError(f"tempering must hold numbers in (0, 1], got {list(tempering)}")
        return lambda t: betas[t - 1] if t <= len(betas) else 1.0
    number = isinstance(tempering, int | float) and not isinstance(tempering, bool)
    if not number:
        raise TypeError(
            "tempering must be a number of bytes, a sequence of exponents or a function of the "
            f"number of bytes read, got {tempering!r}"
        )
    if not (math.isfinite(tempering) and tempering > 0):
        raise ValueError(f"tempering must be a positive number of bytes, got {tempering}")
    return lambda t: min(1.0, t / tempering)
