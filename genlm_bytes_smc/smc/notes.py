"""What is noted of a step, and what is said of one that failed."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from genlm_bytes_smc.alphabet import EOS_COLUMN
from genlm_bytes_smc.smc.errors import AllParticlesDeadError, BadWeightError
from genlm_bytes_smc.smc.frontier import Frontier, Read, Rows, uncovered
from genlm_bytes_smc.smc.particles import BoolArray, Particles, Weights
from genlm_bytes_smc.smc.plan import Plan
from genlm_bytes_smc.smc.resampling import IntArray
from genlm_bytes_smc.smc.state import SMCState, StepInfo


class Clock:
    """Time and language-model work since it was made."""

    def __init__(self, frontier: Frontier) -> None:
        self.engines = frontier.engines()
        self.started = time.perf_counter()
        self.counts = self._counts()

    def _counts(self) -> tuple[int, int]:
        counts = [engine.counts for engine in self.engines]
        return sum(c.rows for c in counts), sum(c.forwards for c in counts)

    def read(self) -> dict[str, Any]:
        """What of a `StepInfo` it measures."""
        rows, forwards = self._counts()
        return {
            "rows": rows - self.counts[0],
            "forwards": forwards - self.counts[1],
            "seconds": time.perf_counter() - self.started,
        }


def note(
    plan: Plan,
    state: SMCState,
    frontier: Frontier,
    rows: Rows,
    particles: Particles,
    read: Read,
    weights: Weights,
) -> StepInfo:
    """The record of a step, before its cost and ancestors are known."""
    died = particles.dead & ~state.particles.dead
    forced = state.step == plan.max_bytes
    return StepInfo(
        step=state.step,
        ess=weights.ess,
        log_ml=weights.log_mean,
        active=int(particles.active.sum()),
        ended=int((particles.ended & ~particles.dead).sum()),
        dead=int(particles.dead.sum()),
        lanes=frontier.size,
        forced=forced,
        deaths=causes(plan, kills(rows, forced), frontier.lane_of, died, read)
        if died.any()
        else (),
        uncovered=0.0 if (share := uncovered(rows)) is None else float(share.max(initial=0.0)),
        symbols=read.symbols.astype(np.int16) if plan.record else None,
        log_weights=particles.log_weights if plan.record else None,
    )


def kills(rows: Rows, forced: bool) -> BoolArray:
    """Which factors leave which lanes nothing to read (or no end, if forced): bool[F, D]."""
    where = EOS_COLUMN if forced else slice(None)
    none = [b[:, where].isneginf().reshape(len(b), -1).all(1) for b in rows.blocks]
    return np.stack([x.cpu().numpy() for x in none])


def causes(
    plan: Plan, lethal: BoolArray, lane_of: IntArray, died: BoolArray, read: Read
) -> tuple[tuple[str, int], ...]:
    """For each factor that gave weight zero, how many particles it killed.

    Args:
        plan: of the run.
        lethal: see `kills`.
        lane_of: int64[N], the lanes they were on.
        died: bool[N], who died of what was read.
        read: what was read.
    """
    count: dict[str, int] = {}
    by_rows = died & (read.log_weights == -np.inf)
    if (died & ~by_rows).any():
        judges = [] if plan.critic is None else [plan.critic.name]
        if plan.loan.ahead is not None:  # it sees no way from there to a whole text
            judges.append(f"the twist {plan.names[plan.loan.ahead]}")
        count[" and ".join(judges or ["tempering"])] = int((died & ~by_rows).sum())
    mine_of = lethal[:, lane_of[by_rows]]
    alone = mine_of.any(axis=0)
    for name, mine in zip(plan.names, mine_of, strict=True):
        if mine.any():
            count[name] = int(mine.sum())
    if not alone.all():
        several = "the proposal's draw" if plan.proposal else " and ".join(plan.names)
        count[several] = int((~alone).sum())
    return tuple(count.items())


def all_dead(
    plan: Plan, before: SMCState, particles: Particles, info: StepInfo
) -> AllParticlesDeadError:
    """The error for a step that killed every particle that was left."""
    died = int((~before.particles.dead).sum())
    state = before._replace(particles=particles, history=(*before.history, info))
    text = max(particles.texts(), key=len)
    where = "to ending at the length limit" if info.forced else f"at byte {state.step}"
    blame = ", ".join(f"{name} ({k} of them)" for name, k in info.deaths)
    return AllParticlesDeadError(
        f"all {len(particles.length)} particles are dead; the last {died} were given weight zero "
        f"{where} by {blame}; one of them had read {text!r}",
        byte=state.step,
        causes=dict(info.deaths),
        state=state,
    )


def bad_rows(plan: Plan, state: SMCState, frontier: Frontier, rows: Rows) -> BadWeightError:
    """The error for rows with NaN or +inf; it names the first factor that has one."""
    named = [*zip(plan.names, rows.blocks, strict=True), ("the target as a whole", rows.target)]
    for name, block in named:
        bad = (block.isnan() | block.isposinf()).cpu().numpy()
        if bad.any():
            lane, symbol = np.argwhere(bad)[0].tolist()
            text = state.particles.texts()[np.flatnonzero(frontier.lane_of == lane)[0]]
            what = "the end" if symbol == EOS_COLUMN else f"the byte {bytes([symbol])!r}"
            return BadWeightError(f"{name} gave {block[lane, symbol]} to {what} after {text!r}")
    return BadWeightError("the proposal gave NaN or +inf")
