"""What a run carries from one byte to the next, and what it notes on the way."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.smc.particles import Particles
from genlm_bytes_smc.smc.resampling import FloatArray, IntArray

Int16Array = npt.NDArray[np.int16]

NO_SYMBOL = -1


class StepInfo(NamedTuple):
    """One step, for the record; nothing later depends on it.

    Attributes:
        step: how many bytes active particles had read before it (0 for the first step).
        ess: effective sample size of all N particles after reading and before resampling.
        log_ml: log of their mean weight, nats (it includes what the critic lends).
        active, ended, dead: how many particles are in each condition after reading; they
            sum to N (to N times the candidates inside a roll-out).
        lanes: for how many distinct texts rows were computed.
        forced: whether the length limit ended every particle in this step.
        deaths: for each factor that gave weight zero, how many particles it killed.
        ancestors: int64[N] if the particles were resampled after reading, else None.
        moved: how many particles `rejuvenate` gave another text, None if it was not due.
        uncovered: the largest share of a target row on symbols that the proposal excludes.
        rows, forwards: rows and forwards the language models computed during the step.
            Concurrent runs over one model share forwards, and each counts them.
        seconds: wall time.
        symbols: int16[N] with `record`, what each particle read (-1: nothing).
        log_weights: float64[N] with `record`, weights after reading, nats.
    """

    step: int
    ess: float
    log_ml: float
    active: int
    ended: int
    dead: int
    lanes: int
    forced: bool = False
    deaths: tuple[tuple[str, int], ...] = ()
    ancestors: IntArray | None = None
    moved: int | None = None
    uncovered: float = 0.0
    rows: int = 0
    forwards: int = 0
    seconds: float = 0.0
    symbols: Int16Array | None = None
    log_weights: FloatArray | None = None


class SMCState(NamedTuple):
    """Everything a run is at one byte; a value, from which it can be gone on with.

    What language models and constraints know about the texts is not part of it: it follows
    from the texts, and `resume` computes it again.

    Attributes:
        particles: the N particles; inside a roll-out all candidates of each, one after the
            other.
        step: how many bytes the active ones have read.
        seed: of the run's draws; those of a step are a function of (seed, step).
        beam_seed: of the beams' draws with `prune="unbiased"`; None: the beams' own.
        start: log weight of the empty text, nats.
        history: one entry a step so far.
        max_bytes: the length limit it was run with; None if that is not known.
    """

    particles: Particles
    step: int
    seed: int
    beam_seed: int | None
    start: float
    history: tuple[StepInfo, ...] = ()
    max_bytes: int | None = None

    def generator(self, *stream: int) -> np.random.Generator:
        """The random numbers of the next step: a function of the seed and the step.

        Args:
            stream: a number for another stream than the step's own.
        """
        return generator(self.seed, self.step, *stream)


def generator(seed: int, step: int, *stream: int) -> np.random.Generator:
    """Random numbers as a function of a run's seed, the step, and a stream besides its own."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(step, *stream)))
