"""R runs of one target side by side, as one set of R N particles.

Each run has its own random numbers, weights and resampling, and comes out as `smc` would give
it; rows are computed for all of them together, and once where texts and beams are equal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from genlm_bytes_smc.smc.errors import RunFailedError
from genlm_bytes_smc.smc.frontier import Advance, Frontier, Rows, uncovered
from genlm_bytes_smc.smc.loop import (
    SALT_STREAM,
    advance,
    kept,
    resampling_due,
    start_state,
    warn_uncovered,
)
from genlm_bytes_smc.smc.notes import Clock, all_dead, causes, kills
from genlm_bytes_smc.smc.particles import BoolArray, Particles, SaltArray, Weights
from genlm_bytes_smc.smc.plan import Plan
from genlm_bytes_smc.smc.resampling import IntArray
from genlm_bytes_smc.smc.result import SMCResult
from genlm_bytes_smc.smc.state import SMCState, StepInfo, generator


class Pins(Protocol):
    """What is prescribed to the first particle of each run (conditional SMC)."""

    def symbols(self, step: int) -> IntArray:
        """What it reads after `step` bytes, int64[R]."""
        ...

    def salts(self, step: int) -> SaltArray:
        """The salts of its beams after `step` symbols, uint64[R]."""
        ...

    async def ancestors(self, batch: Batch, particles: Particles, due: Sequence[int]) -> IntArray:
        """Whom it descends from, int64[len(due)], in the runs that are resampled."""
        ...


def can_batch(plan: Plan) -> bool:
    """Whether `run_batch` can run it."""
    return plan.rejuvenate is None and plan.rollout.candidates == 1 and plan.resume is None


async def run_batch(plans: Sequence[Plan], pins: Pins | None = None) -> list[SMCResult]:
    """Results of R plans that differ in their seeds alone; those of a dead run are its last.

    Args:
        plans: what to run.
        pins: what the first particle of each run has to read, and how it is resampled.
    """
    batch = Batch(plans, pins)
    try:
        with kept(None):
            await batch.start()
        while not batch.done:
            with kept(batch.state):
                await batch.step()
    except RunFailedError as error:
        error.states = batch.states()
        raise
    results = [run.result for run in batch.runs]
    warn_uncovered(max(result.uncovered for result in results))
    return results


class _Run:
    """One run of a batch: its plan, what was noted, and in the end its result."""

    result: SMCResult

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.history: list[StepInfo] = []
        self.going = True

    def state(self, particles: Particles, step: int, start: float) -> SMCState:
        plan = self.plan
        return SMCState(
            particles, step, plan.seed, plan.beam_seed, start, tuple(self.history), plan.max_bytes
        )


class Batch:
    """R runs of N particles on their way.

    Attributes:
        plan: what they have in common.
        size: N.
        runs: the runs; run r has the particles r N .. (r + 1) N - 1.
        state: all particles, after `state.step` bytes.
        frontier: at their texts.
    """

    state: SMCState
    frontier: Frontier

    def __init__(self, plans: Sequence[Plan], pins: Pins | None) -> None:
        self.plan = dataclasses.replace(plans[0], n_particles=len(plans) * plans[0].n_particles)
        self.size = plans[0].n_particles
        self.runs = [_Run(plan) for plan in plans]
        self.pins = pins

    @property
    def done(self) -> bool:
        """Whether every run is."""
        return not any(run.going for run in self.runs)

    def states(self) -> list[SMCState | None]:
        """How far each run has come; None for all of them before the first byte."""
        if not hasattr(self, "state"):
            return [None] * len(self.runs)
        state, out = self.state, list[SMCState | None]()
        for r, run in enumerate(self.runs):
            if run.going:
                mine = run.state(_some(state.particles, self.of(r)), state.step, state.start)
                out.append(mine._replace(history=mine.history[: state.step]))  # whole steps
            else:
                out.append(run.result.state)
        return out

    def of(self, r: int) -> slice:
        """The particles of run r."""
        return slice(r * self.size, (r + 1) * self.size)

    async def start(self) -> None:
        """All particles at the empty text."""
        plan, n = self.plan, self.size
        state = await start_state(dataclasses.replace(plan, share_beams=True))
        particles = state.particles._replace(eve=np.tile(np.arange(n), len(self.runs)))
        if not plan.share_beams:
            rngs = [generator(run.plan.seed, 0, SALT_STREAM) for run in self.runs]
            particles = self._salted(particles, rngs, 0)
        self.state = state._replace(particles=particles)
        self.frontier = await Frontier.start(
            plan.leaves, plan.target, plan.proposal, particles, self.beam_seeds()
        )

    def beam_seeds(self, runs: Sequence[int] | None = None) -> list[int | None]:
        """Beam seeds of some runs, or all."""
        chosen = range(len(self.runs)) if runs is None else runs
        return [self.runs[r].plan.beam_seed for r in chosen]

    async def step(self) -> None:
        """One byte in every run."""
        clock, step = Clock(self.frontier), self.state.step
        rngs = [generator(run.plan.seed, step) if run.going else None for run in self.runs]
        none = np.zeros(self.size)
        uniform = [none if rng is None else rng.random(self.size) for rng in rngs]
        moved = await advance(
            self.plan, self.state, self.frontier, np.concatenate(uniform), self._forced()
        )
        infos = _Notes(self, moved)
        particles = moved.particles
        weights = {r: Weights(particles.log_weights[self.of(r)]) for r in self._going()}
        for r, w in weights.items():
            self.runs[r].history.append(infos.of(r, w))
        before = self.state
        self._bury(before, particles)
        ancestors = await self._resample(particles, weights, rngs)
        log_weights = particles.log_weights.copy()
        index = np.arange(len(log_weights))
        for r, mine in ancestors.items():
            index[self.of(r)] = mine + r * self.size
            log_weights[self.of(r)] = weights[r].log_mean
        particles = particles.gather(index, log_weights)
        if not self.plan.share_beams:
            particles = self._salted(particles, rngs, step + 1)
        lanes, symbols = self.frontier.lane_of[index], moved.read.symbols[index]
        self.frontier = await self.frontier.step(particles, lanes, symbols)
        self.state = before._replace(particles=particles, step=step + 1)
        self._finish(before, ancestors, clock)

    def _going(self) -> list[int]:
        return [r for r, run in enumerate(self.runs) if run.going]

    def _forced(self) -> IntArray | None:
        if self.pins is None:
            return None
        forced = np.full((len(self.runs), self.size), -1, dtype=np.int64)
        forced[:, 0] = self.pins.symbols(self.state.step)
        return forced.ravel()

    def _salted(
        self, particles: Particles, rngs: Sequence[np.random.Generator | None], step: int
    ) -> Particles:
        n = self.size
        salt = np.zeros((len(self.runs), n), dtype=np.uint64)
        for r, rng in enumerate(rngs):
            if rng is not None:
                salt[r] = rng.integers(0, 2**64, size=(n, 1), dtype=np.uint64)[:, 0]
        if self.pins is not None:
            salt[:, 0] = self.pins.salts(step)
        column = salt.reshape(-1, 1)
        had = particles.salt
        return particles._replace(salt=column if had is None else np.hstack([had, column]))

    def _bury(self, before: SMCState, particles: Particles) -> None:
        """End the runs all of whose particles are dead."""
        for r in self._going():
            run = self.runs[r]
            if run.history[-1].dead == self.size:
                info = run.history.pop()
                was = run.state(_some(before.particles, self.of(r)), before.step, before.start)
                run.result = all_dead(run.plan, was, _some(particles, self.of(r)), info).result
                run.going = False

    async def _resample(
        self,
        particles: Particles,
        weights: dict[int, Weights],
        rngs: Sequence[np.random.Generator | None],
    ) -> dict[int, IntArray]:
        """Ancestors int64[N] in each run that is to be resampled."""
        plan = self.plan
        if not plan.rollout.ends(self.state.step, 1):
            return {}
        due = [
            r
            for r in self._going()
            if self.runs[r].history[-1].active and resampling_due(plan, weights[r])
        ]
        out = {}
        for r in due:
            rng = rngs[r]
            assert rng is not None
            out[r] = plan.resample(weights[r].normalised, rng)
            if self.pins is not None:  # ascending; independent of the place from here on
                out[r] = rng.permutation(out[r])
        if self.pins is not None and due:
            for r, first in zip(due, await self.pins.ancestors(self, particles, due), strict=True):
                out[r][0] = first
        return out

    def _finish(self, before: SMCState, ancestors: dict[int, IntArray], clock: Clock) -> None:
        """Complete what was noted, and end the runs no particle of which reads on."""
        cost = clock.read()
        active = self.state.particles.active.reshape(-1, self.size).sum(axis=1)
        for r in self._going():
            run = self.runs[r]
            info = run.history[-1]._replace(ancestors=ancestors.get(r), **cost)
            run.history[-1] = info
            if active[r]:
                continue
            start, mine = before.start, self.of(r)
            last = run.state(_some(self.state.particles, mine), self.state.step, start)
            was = run.state(_some(before.particles, mine), before.step, start)
            was = was._replace(history=last.history[:-1])
            run.result = SMCResult(last, resumable=was if info.forced else last)
            run.going = False


class _Notes:
    """One step of all runs, for the record of each."""

    def __init__(self, batch: Batch, moved: Advance) -> None:
        self.batch, self.moved = batch, moved
        state, plan, lanes = batch.state, batch.plan, batch.frontier.lane_of
        particles = moved.particles
        self.forced = state.step == plan.max_bytes
        self.died: BoolArray = particles.dead & ~state.particles.dead
        self.active = self._count(particles.active)
        self.ended = self._count(particles.ended & ~particles.dead)
        self.dead = self._count(particles.dead)
        size = max(batch.frontier.size, 1)
        run = np.repeat(np.arange(len(batch.runs)), batch.size)
        codes = np.unique((run * size + lanes)[lanes >= 0])
        self.lanes = np.bincount(codes // size, minlength=len(batch.runs))
        self.uncovered = self._uncovered(moved.rows, codes // size, codes % size)
        self.lethal = kills(moved.rows, self.forced) if self.died.any() else None

    def _count(self, which: BoolArray) -> IntArray:
        out: IntArray = which.reshape(-1, self.batch.size).sum(axis=1)
        return out

    def _uncovered(self, rows: Rows, run: IntArray, lane: IntArray) -> list[float]:
        out = np.zeros(len(self.batch.runs))
        share = uncovered(rows)
        if share is not None:
            np.maximum.at(out, run, share[lane])
        worst: list[float] = out.tolist()
        return worst

    def of(self, r: int, weights: Weights) -> StepInfo:
        """What is noted of run r; cost and ancestors come later."""
        batch, moved, plan = self.batch, self.moved, self.batch.plan
        died = np.zeros_like(self.died)
        died[batch.of(r)] = self.died[batch.of(r)]
        deaths: tuple[tuple[str, int], ...] = ()
        if self.lethal is not None and died.any():
            deaths = causes(plan, self.lethal, batch.frontier.lane_of, died, moved.read)
        mine = batch.of(r)
        return StepInfo(
            step=batch.state.step,
            ess=weights.ess,
            log_ml=weights.log_mean,
            active=int(self.active[r]),
            ended=int(self.ended[r]),
            dead=int(self.dead[r]),
            lanes=int(self.lanes[r]),
            forced=self.forced,
            deaths=deaths,
            uncovered=self.uncovered[r],
            symbols=moved.read.symbols[mine].astype(np.int16) if plan.record else None,
            log_weights=moved.particles.log_weights[mine].copy() if plan.record else None,
        )


def _some(particles: Particles, mine: slice) -> Particles:
    """The particles of one run, copied."""
    index = np.arange(mine.start, mine.stop)
    return particles.gather(index, particles.log_weights[index])
