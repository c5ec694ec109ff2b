"""Sequential Monte Carlo over bytes, all particles at once.

`_step` is the algorithm: it reads one byte in every particle, weighs, and resamples when the
effective sample size is low (Doucet & Johansen 2009, section 3.5; adaptive resampling as in
Del Moral, Doucet & Jasra 2012). Its cost is that of the distinct texts (`Frontier`); nothing
in it loops over particles in Python.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, NamedTuple, Unpack

import numpy as np

from genlm_bytes_smc.alphabet import EOS_COLUMN
from genlm_bytes_smc.smc.critic import DistinctReads
from genlm_bytes_smc.smc.errors import AllParticlesDeadError, BadWeightError
from genlm_bytes_smc.smc.frontier import Frontier, Rows, draw, uncovered
from genlm_bytes_smc.smc.particles import BoolArray, Particles, Weights
from genlm_bytes_smc.smc.plan import Plan, SMCOptions, make_plan, start_error
from genlm_bytes_smc.smc.progress import Progress, open_progress
from genlm_bytes_smc.smc.resampling import FloatArray, IntArray
from genlm_bytes_smc.smc.result import SMCResult
from genlm_bytes_smc.smc.state import NO_SYMBOL, SMCState, StepInfo

_ROUNDING = 1e-9  # relative, of an effective sample size
_UNCOVERED = 1e-6  # share of a row from which on a proposal's gaps are worth a warning


class _Read(NamedTuple):
    """What the particles read in one step: symbols int64[N] and log weights float64[N]."""

    symbols: IntArray
    log_weights: FloatArray


async def smc(
    target: Any,
    n_particles: int,
    ess_threshold: float = 0.5,
    max_bytes: int = 100,
    *,
    proposal: Any = None,
    twist: Any = None,
    tempering: Any = None,
    critic: Any = None,
    twist_with_critic: bool = True,
    terminate_when: Callable[[bytes], bool] | None = None,
    resampling_method: str = "systematic",
    seed: int | None = None,
    beam_seed: int | None = None,
    progress: Progress = None,
    on_step: Callable[[SMCState], object] | None = None,
    record: bool = False,
    resume: SMCResult | SMCState | None = None,
) -> SMCResult:
    """Draw weighted texts from a target by sequential Monte Carlo.

    The texts are properly weighted for the target over texts of at most `max_bytes` bytes
    (times the critic): the expectation of `exp(result.log_ml)` is the target's total weight
    of those texts, whatever the number of particles, threshold, scheme, proposal or twist.

    Args:
        target: a `ByteLLM`, or a genlm-control product (`*`) of one or more of them and any
            potentials over bytes; powers and `.normalize()` are taken apart too.
        n_particles: number of particles, N.
        ess_threshold: resample when the effective sample size falls below this share of N,
            in [0, 1]; 0 is importance sampling, 1 resamples (almost) always.
        max_bytes: most bytes of a text. A particle that has read as many is ended, with the
            weight of ending there (genlm-control's `max_tokens` is this plus one).
        proposal: a potential over bytes to draw from instead of the target's own row. It must
            give weight to every symbol that the target gives weight to; see
            `SMCResult.uncovered`. Or a `Lookahead`, which never leaves one out.
        twist: a `Lookahead` that steers resampling by what may follow each text; the same
            object can be the proposal too. Never with `ess_threshold=0`.
        tempering: grade the weights of the target's factors that are neither language models
            nor of 0 and 1 only, of the critic and of the twist: with t bytes read, resampling
            sees their power beta_t. A number of bytes T (beta_t = min(1, t / T)), a sequence
            of exponents in (0, 1], one a byte, or a function of t. Ended texts have their
            whole weight, so the target stays what it is.
        critic: a potential over bytes that multiplies the target, its `prefix` weights
            steering resampling on the way; or a Python function of complete texts that says
            whether to admit them (or, as a float, their log weight). Scored once a distinct
            text, not row by row, so it suits what has no cheap next-byte weights.
        twist_with_critic: whether prefixes are scored; never with `ess_threshold=0`.
        terminate_when: ends a text (without a weight) once it holds of it.
        resampling_method: "systematic", "stratified", "residual" or "multinomial".
        seed: of all draws (None: 0); equal seeds give equal results.
        beam_seed: with `prune="unbiased"`, seeds the beams after the prompt afresh; None
            leaves them with their parameters' seed, the same in every run.
        progress: a bar on stderr (None: if it is a terminal), or a function of `StepInfo`.
        on_step: called with the `SMCState` before the first step and after each.
        record: note every symbol and weight, for `SMCResult.to_json`.
        resume: a result or state to go on with. With a larger `max_bytes` the run is the one
            that would have been without the stop; target and options must be the same.

    Returns:
        Texts, weights, and what the run tells about itself.

    Raises:
        TypeError, ValueError: bad arguments, before any work; a target that gives the empty
            text no weight.
        AllParticlesDeadError: every particle has weight zero; it carries the result so far.
        BadWeightError: a factor, proposal or critic gave NaN or +inf.
        asyncio.CancelledError: cancelled; nothing is left running, and the last state that
            `on_step` saw can be resumed.
    """
    plan = make_plan(
        target,
        n_particles,
        ess_threshold,
        max_bytes,
        proposal=proposal,
        twist=twist,
        tempering=tempering,
        critic=critic,
        twist_with_critic=twist_with_critic,
        terminate_when=terminate_when,
        resampling_method=resampling_method,
        seed=seed,
        beam_seed=beam_seed,
        record=record,
        resume=resume,
    )
    return await run_plan(plan, progress, on_step)


async def smc_steps(
    target: Any,
    n_particles: int,
    ess_threshold: float = 0.5,
    max_bytes: int = 100,
    **options: Unpack[SMCOptions],
) -> AsyncGenerator[SMCState, None]:
    """As `smc`, yielding the state before the first step and after each.

    Stop iterating whenever you like; any state can be given to `resume` or `SMCResult`.
    """
    plan = make_plan(target, n_particles, ess_threshold, max_bytes, **options)
    async with aclosing(_states(plan)) as states:
        async for state in states:
            yield state


async def run_plan(
    plan: Plan, progress: Progress = None, on_step: Callable[[SMCState], object] | None = None
) -> SMCResult:
    """Run a plan to its end; see `smc`."""
    before: SMCState | None = None
    after: SMCState | None = None
    with open_progress(progress, plan.max_bytes) as show:
        async with aclosing(_states(plan)) as states:
            async for state in states:
                before, after = after, state
                if on_step is not None:
                    on_step(state)
                if before is not None:
                    show(state.history[-1])
    assert after is not None
    forced = before is not None and after.history[-1].forced
    result = SMCResult(after, resumable=before if forced else after)
    if result.uncovered > _UNCOVERED:
        warnings.warn(
            "the proposal gives weight zero to symbols that hold up to "
            f"{result.uncovered:.2%} of a row of the target: such texts were never drawn, and "
            "log_ml is low by their weight",
            RuntimeWarning,
            stacklevel=2,
        )
    return result


async def _states(plan: Plan) -> AsyncGenerator[SMCState, None]:
    state = plan.resume or await _start(plan)
    yield state
    if not state.particles.active.any():
        return
    frontier = await Frontier.start(
        plan.leaves, plan.target, plan.proposal, state.particles, plan.beam_seed
    )
    while state.particles.active.any():
        state, frontier = await _step(plan, state, frontier)
        yield state


async def _start(plan: Plan) -> SMCState:
    start = float(await plan.potential.prefix([]))
    if not np.isfinite(start):
        leaves = zip(plan.names[: plan.n_target], plan.leaves, strict=False)
        weights = {name: float(await leaf.prefix([])) for name, leaf in leaves}
        raise start_error(plan, start, {k: w for k, w in weights.items() if not np.isfinite(w)})
    particles = Particles.first(plan.n_particles, start)
    return SMCState(particles, 0, plan.seed, plan.beam_seed, start)


async def _step(plan: Plan, state: SMCState, frontier: Frontier) -> tuple[SMCState, Frontier]:
    """One byte: rows, draw, weigh, twist, resample, read."""
    clock = _Clock(frontier)
    rng = state.generator()
    rows = await frontier.rows()
    particles = state.particles.untwisted()
    read = _propose(plan, state, frontier, rows, rng.random(plan.n_particles))
    particles = particles.read(read.symbols, read.log_weights)
    particles = await _judge(plan, particles, frontier, rows, read.symbols, state.step)
    weights = Weights(particles.log_weights)
    info = _note(plan, state, frontier, rows, particles, read, weights)
    if info.dead == plan.n_particles:
        raise _all_dead(plan, state, particles, info)
    lanes, symbols = frontier.lane_of, read.symbols
    if info.active and weights.ess < plan.ess_threshold * plan.n_particles * (1 - _ROUNDING):
        ancestors = plan.resample(weights.normalised, rng)
        particles = particles.gather(ancestors, weights.log_mean)
        lanes, symbols = lanes[ancestors], symbols[ancestors]
        info = info._replace(ancestors=ancestors)
    frontier = await frontier.step(particles, lanes, symbols)
    history = (*state.history, info._replace(**clock.read()))
    return state._replace(particles=particles, step=state.step + 1, history=history), frontier


def _propose(
    plan: Plan, state: SMCState, frontier: Frontier, rows: Rows, uniform: FloatArray
) -> _Read:
    """The next symbol of each active particle and its weight; the end at the length limit."""
    at = np.flatnonzero(frontier.lane_of >= 0)
    lanes = frontier.lane_of[at]
    symbols = np.full(plan.n_particles, NO_SYMBOL, dtype=np.int64)
    log_weights = np.zeros(plan.n_particles)
    if state.step == plan.max_bytes:
        symbols[at] = EOS_COLUMN
        log_weights[at] = rows.target[:, EOS_COLUMN].cpu().numpy()[lanes]
    else:
        symbols[at], log_weights[at] = draw(rows, lanes, uniform[at])
    if np.isnan(log_weights).any() or log_weights.max() == np.inf:
        raise _bad_rows(plan, state, frontier, rows)
    return _Read(symbols, log_weights)


async def _judge(
    plan: Plan,
    particles: Particles,
    frontier: Frontier,
    rows: Rows,
    symbols: IntArray,
    step: int,
) -> Particles:
    """Texts that `terminate_when` ends, and what critic and twist say of what was read."""
    if plan.critic is None and plan.terminate_when is None:
        return await plan.loan.lend(particles, frontier, rows, symbols, step + 1)
    reads = DistinctReads(particles, frontier.lane_of, symbols)
    if plan.terminate_when is not None:
        particles = reads.stop(particles, plan.terminate_when)
    if plan.critic is not None:
        particles = await plan.critic.weigh(particles, reads)
    return await plan.loan.lend(particles, frontier, rows, symbols, step + 1)


# -- what is noted and said ------------------------------------------------------------


class _Clock:
    """Time and language-model work since it was made."""

    def __init__(self, frontier: Frontier) -> None:
        self.engines = frontier.engines()
        self.started = time.perf_counter()
        self.counts = self._counts()

    def _counts(self) -> tuple[int, int]:
        counts = [engine.counts for engine in self.engines]
        return sum(c.rows for c in counts), sum(c.forwards for c in counts)

    def read(self) -> dict[str, Any]:
        rows, forwards = self._counts()
        return {
            "rows": rows - self.counts[0],
            "forwards": forwards - self.counts[1],
            "seconds": time.perf_counter() - self.started,
        }


def _note(
    plan: Plan,
    state: SMCState,
    frontier: Frontier,
    rows: Rows,
    particles: Particles,
    read: _Read,
    weights: Weights,
) -> StepInfo:
    died = particles.dead & ~state.particles.dead
    return StepInfo(
        step=state.step,
        ess=weights.ess,
        log_ml=weights.log_mean,
        active=int(particles.active.sum()),
        ended=int((particles.ended & ~particles.dead).sum()),
        dead=int(particles.dead.sum()),
        lanes=frontier.size,
        forced=state.step == plan.max_bytes,
        deaths=_causes(plan, frontier, rows, died, read, state.step == plan.max_bytes)
        if died.any()
        else (),
        uncovered=uncovered(rows),
        symbols=read.symbols.astype(np.int16) if plan.record else None,
        log_weights=particles.log_weights if plan.record else None,
    )


def _causes(
    plan: Plan, frontier: Frontier, rows: Rows, died: BoolArray, read: _Read, forced: bool
) -> tuple[tuple[str, int], ...]:
    """For each factor that gave weight zero, how many particles it killed."""
    count: dict[str, int] = {}
    by_rows = died & (read.log_weights == -np.inf)
    if plan.critic is not None and (died & ~by_rows).any():
        count[plan.critic.name] = int((died & ~by_rows).sum())
    lanes = frontier.lane_of[by_rows]
    where = EOS_COLUMN if forced else slice(None)
    kills = np.stack(
        [
            block[:, where].isneginf().reshape(len(block), -1).all(1).cpu().numpy()[lanes]
            for block in rows.blocks
        ]
    )
    alone = kills.any(axis=0)
    for name, mine in zip(plan.names, kills, strict=True):
        if mine.any():
            count[name] = int(mine.sum())
    if not alone.all():
        several = "the proposal's draw" if plan.proposal else " and ".join(plan.names)
        count[several] = int((~alone).sum())
    return tuple(count.items())


def _all_dead(
    plan: Plan, before: SMCState, particles: Particles, info: StepInfo
) -> AllParticlesDeadError:
    """The error for a step that killed every particle that was left."""
    died = int((~before.particles.dead).sum())
    state = before._replace(particles=particles, history=(*before.history, info))
    text = max(particles.texts(), key=len)
    where = "to ending at the length limit" if info.forced else f"at byte {state.step}"
    blame = ", ".join(f"{name} ({k} of them)" for name, k in info.deaths)
    return AllParticlesDeadError(
        f"all {plan.n_particles} particles are dead; the last {died} were given weight zero "
        f"{where} by {blame}; one of them had read {text!r}",
        byte=state.step,
        causes=dict(info.deaths),
        state=state,
    )


def _bad_rows(plan: Plan, state: SMCState, frontier: Frontier, rows: Rows) -> BadWeightError:
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
