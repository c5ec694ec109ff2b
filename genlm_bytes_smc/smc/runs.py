"""R runs on their way, and the errors that carry how far they came."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from genlm_bytes_smc.smc.frontier import Frontier
from genlm_bytes_smc.smc.particles import (
    NO_SYMBOL,
    Particles,
    SaltArray,
    SMCState,
    StepInfo,
    generator,
)
from genlm_bytes_smc.smc.plan import Plan
from genlm_bytes_smc.smc.resampling import IntArray
from genlm_bytes_smc.smc.result import SMCResult

_BREAKDOWNS = (RuntimeError, MemoryError, OSError)  # not: bad values, types or arguments


class AllParticlesDeadError(RuntimeError):
    """Every particle has weight zero: nothing is left to go on with.

    As an estimate of the marginal likelihood such a run counts as zero (`smc_repeat` counts
    it so).

    Attributes:
        byte: which byte of the text the last particles died at, counted from 0.
        causes: for each factor, how many particles it killed there.
        state: the particles as they died; `on_step` and `smc_steps` saw those before.
        result: the same as a result: texts, weights (all -inf) and history. Where the length
            limit killed the last ones, it can be resumed with a larger `max_bytes`.
    """

    def __init__(
        self,
        message: str,
        byte: int,
        causes: Mapping[str, int],
        state: SMCState,
        resumable: SMCState | None = None,
    ):
        super().__init__(message)
        self.resumable = resumable
        self.byte = byte
        self.causes = dict(causes)
        self.state = state

    @property
    def result(self) -> SMCResult:
        """The run up to its death."""
        return SMCResult(self.state, self.resumable)


class RunFailedError(RuntimeError):
    """A run broke off because something under it failed: an engine that died, memory that ran out.

    The failure itself is the cause (`__cause__`).

    Attributes:
        state: the particles after the last whole step; with a model that works again,
            `smc(..., resume=error.state)` goes on as if nothing had happened. None if not
            even the first step was reached.
        states: of `smc_many` and `smc_repeat`: the same of every run, in their order.
    """

    def __init__(self, message: str, *states: SMCState | None):
        super().__init__(message)
        self.state = states[0]
        self.states = list(states)

    @property
    def result(self) -> SMCResult | None:
        """The run so far."""
        return None if self.state is None else SMCResult(self.state)


Outcome = SMCResult | AllParticlesDeadError


@dataclass(frozen=True)
class Pins:
    """Prescriptions for the first particle of each run (conditional SMC).

    Attributes:
        symbols: int64[R, t], what it reads; its end from the end of its text on.
        salts: uint64[R, t + 1], what its beams are drawn by, see `Particles.salt`.
        ancestors: gives its ancestor's place in each of the runs `due`, int64[len(due)].
    """

    symbols: IntArray
    salts: SaltArray
    ancestors: Callable[[Runs, Particles, Sequence[int]], Awaitable[IntArray]]

    def read(self, step: int) -> IntArray:
        """Return what it reads after `step` symbols, int64[R]."""
        return self.symbols[:, min(step, self.symbols.shape[1] - 1)]

    def salt(self, step: int) -> SaltArray:
        """Return what its beams are drawn by after `step` symbols, uint64[R]."""
        return self.salts[:, min(step, self.salts.shape[1] - 1)]


class Runs(NamedTuple):
    """R runs on their way, whose plans differ in their seeds alone; a value.

    Attributes:
        plans: of the runs.
        particles: of all runs; run r has those from r N on (r N M inside a roll-out with M
            candidates).
        frontier: at their texts.
        step: how many bytes active particles have read.
        start: log weight of the empty text, nats.
        histories: the steps of each run so far.
        outcomes: of each run that is over; None for the others.
        pins: what is prescribed to the first particle of each run, if anything is.
    """

    plans: Sequence[Plan]
    particles: Particles
    frontier: Frontier
    step: int
    start: float
    histories: Sequence[tuple[StepInfo, ...]]
    outcomes: Sequence[Outcome | None]
    pins: Pins | None = None

    @property
    def plan(self) -> Plan:
        """The settings that all runs share."""
        return self.plans[0]

    @property
    def size(self) -> int:
        """Number of particles of a run."""
        return len(self.particles.length) // len(self.plans)

    @property
    def over(self) -> bool:
        """True once no particle of any run reads on."""
        return None not in self.outcomes

    def of(self, r: int) -> slice:
        """Return the places of the particles of run r."""
        return slice(r * self.size, (r + 1) * self.size)

    def state(self, r: int) -> SMCState:
        """Return the state of run r: the last one, if it is over."""
        outcome, plan = self.outcomes[r], self.plans[r]
        if outcome is not None:
            return outcome.state
        mine, history = self.some(self.particles, r), self.histories[r]
        return SMCState(
            mine, self.step, plan.seed, plan.beam_seed, self.start, history, plan.max_bytes
        )

    def some(self, particles: Particles, r: int) -> Particles:
        """Return those of the particles that belong to run r."""
        if len(self.plans) == 1:
            return particles
        index = np.arange(self.of(r).start, self.of(r).stop)
        return particles.gather(index, particles.log_weights[index])

    def widened(self) -> Runs:
        """Return each particle as often as a roll-out that begins here has candidates."""
        plan, candidates = self.plan, self.plan.rollout.candidates
        if candidates == 1 or self.size > plan.n_particles:
            return self
        copies = np.repeat(np.arange(plan.n_particles), candidates)
        return self._replace(
            particles=self.particles.gather(copies, self.particles.log_weights[copies]),
            frontier=self.frontier.on(self.frontier.lane_of[copies]),
        )

    def generators(self) -> list[np.random.Generator | None]:
        """Return the random numbers of the next step of each run; None if it is over."""
        runs = zip(self.plans, self.outcomes, strict=True)
        return [generator(p.seed, self.step) if out is None else None for p, out in runs]

    def salted(
        self, particles: Particles, rngs: Sequence[np.random.Generator | None], step: int
    ) -> Particles:
        """Give particles that have beams of their own keys of the draws after `step` symbols."""
        if self.plan.share_beams:
            return particles
        salt = np.zeros((len(rngs), len(particles.length) // len(rngs)), dtype=np.uint64)
        for r, rng in enumerate(rngs):
            if rng is not None:
                salt[r] = rng.integers(0, 2**64, size=salt.shape[1], dtype=np.uint64)
        if self.pins is not None:
            salt[:, 0] = self.pins.salt(step)
        return particles.salted(salt.ravel())

    def forced(self) -> IntArray | None:
        """Return the symbols that are prescribed, int64[R N], -1 where none is."""
        if self.pins is None:
            return None
        forced = np.full((len(self.plans), self.size), NO_SYMBOL, dtype=np.int64)
        forced[:, 0] = self.pins.read(self.step)
        return forced.ravel()


def noted(
    runs: Runs,
    wide: Runs,
    read: Particles,
    after: Runs,
    infos: Sequence[StepInfo],
    ancestors: Mapping[int, IntArray],
) -> Runs:
    """Return the runs after a step with what was noted, and outcomes of those that are over.

    Args:
        runs, wide: before the step, without and with the candidates of a roll-out.
        read: the particles after reading and before resampling.
        after: after the step.
        infos: of the step, one a run.
        ancestors: int64[N], of each run that was resampled.
    """
    going = np.asarray(after.particles.active.reshape(len(infos), -1).any(axis=1))
    histories, outcomes, plan = list(runs.histories), list(runs.outcomes), runs.plans[0]
    for r, info in enumerate(infos):
        if outcomes[r] is None:
            histories[r] = (*histories[r], info._replace(ancestors=ancestors.get(r)))
    after = after._replace(histories=histories)
    for r, info in enumerate(infos):
        if outcomes[r] is not None or going[r]:
            continue
        # With `distinct` the limit may have left nothing but texts that had ended before.
        cut = info.forced or (plan.distinct and runs.step >= plan.max_bytes)
        before = runs.state(r) if cut else None
        if info.dead == wide.size:
            outcomes[r] = all_dead(wide.state(r), wide.some(read, r), info, before)
        else:
            outcomes[r] = SMCResult(after.state(r), before)
    return after._replace(outcomes=outcomes)


def all_dead(
    before: SMCState, particles: Particles, info: StepInfo, resumable: SMCState | None
) -> AllParticlesDeadError:
    """Return the error for a step that killed every particle that was left."""
    died = int((~before.particles.dead).sum())
    state = before._replace(particles=particles, history=(*before.history, info))
    text = max(particles.texts(), key=len)
    where = "to ending at the length limit" if info.forced else f"at byte {before.step}"
    blame = ", ".join(f"{name} ({k} of them)" for name, k in info.deaths)
    return AllParticlesDeadError(
        f"all {len(particles.length)} particles are dead; the last {died} were given weight zero "
        f"{where} by {blame}; one of them had read {text!r}",
        byte=before.step,
        causes=dict(info.deaths),
        state=state,
        resumable=resumable,
    )


@contextmanager
def breakdowns(before: Callable[[], Sequence[SMCState | None]]) -> Iterator[None]:
    """Let a breakdown inside carry the states that the runs had before it.

    Raises:
        RunFailedError: something under the runs failed.
    """
    try:
        yield
    except (AllParticlesDeadError, RunFailedError):
        raise
    except _BREAKDOWNS as error:
        states = before()
        where = "before the first byte" if states[0] is None else f"at byte {states[0].step}"
        cause = f"{type(error).__name__}: {error}"
        raise RunFailedError(f"the run failed {where}: {cause}", *states) from error
