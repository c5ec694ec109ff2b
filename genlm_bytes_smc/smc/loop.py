"""Sequential Monte Carlo over bytes, all particles at once.

`_step` is the algorithm: it reads one byte in every particle, weighs, and resamples when the
effective sample size is low (Doucet & Johansen 2009, section 3.5; adaptive resampling as in
Del Moral, Doucet & Jasra 2012). Its cost is that of the distinct texts (`Frontier`); nothing
in it loops over particles in Python.
"""

from __future__ import annotations

import warnings
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, Unpack

import numpy as np

from genlm_bytes_smc.alphabet import EOS_COLUMN
from genlm_bytes_smc.smc.critic import DistinctReads
from genlm_bytes_smc.smc.errors import AllParticlesDeadError, RunFailedError
from genlm_bytes_smc.smc.frontier import Advance, Frontier, Read, Rows, draw
from genlm_bytes_smc.smc.notes import Clock, all_dead, bad_rows, note
from genlm_bytes_smc.smc.particles import Particles, Weights
from genlm_bytes_smc.smc.plan import Plan, SMCOptions, make_plan, start_error
from genlm_bytes_smc.smc.progress import Progress, open_progress
from genlm_bytes_smc.smc.rejuvenation import Suffix
from genlm_bytes_smc.smc.resampling import FloatArray, IntArray
from genlm_bytes_smc.smc.result import SMCResult
from genlm_bytes_smc.smc.rollout import Rollout
from genlm_bytes_smc.smc.state import NO_SYMBOL, SMCState

SALT_STREAM, MOVE_STREAM = 1, 2  # random numbers of a step besides those of its draws

_ROUNDING = 1e-9  # relative, of an effective sample size
_BREAKDOWNS = (RuntimeError, MemoryError, OSError)  # not: bad values, types or arguments
_UNCOVERED = 1e-6  # share of a row from which on a proposal's gaps are worth a warning


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
    share_beams: bool = True,
    rollout: int | Rollout | None = None,
    rejuvenate: Suffix | None = None,
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
        seed: of all draws (None: 0). Equal seeds give equal results, up to the rounding of the
            model's rows: see "Randomness comes from counters" in docs/design.md.
        beam_seed: with `prune="unbiased"`, seeds the beams after the prompt afresh; None
            leaves them with their parameters' seed, the same in every run.
        share_beams: with `prune="unbiased"`, whether particles with equal texts share one
            random beam. False gives each particle draws of its own (from `seed` too), and
            copies made in resampling draw afresh from their next byte on; it costs a beam a
            particle, and `SMCResult.log_ml_error` then sees the beams' variance.
        rollout: weigh and resample only every so many bytes; or a `Rollout`, whose candidates
            are continuations drawn for each particle, of which it keeps one by weight.
        rejuvenate: a `Suffix`: after each resampling particles re-propose the end of their
            text, by Metropolis-Hastings moves that leave the target as it is.
        progress: a bar on stderr (None: if it is a terminal), or a function of `StepInfo`.
        on_step: called with the `SMCState` before the first step and after each.
        record: note every symbol and weight, for `SMCResult.to_json`.
        resume: a result or state to go on with. With a larger `max_bytes` the run is the one
            that would have been without the stop; target and options must be the same. (Not
            so with a `Lookahead` that looks to the run's own `max_bytes`, as it does unless
            told otherwise: as a twist it has given up what cannot end in time, so a larger
            limit is refused then; as a proposal it draws other texts. Give it a `max_bytes`.)

    Returns:
        Texts, weights, and what the run tells about itself.

    Raises:
        TypeError, ValueError: bad arguments, before any work; a target that gives the empty
            text no weight.
        AllParticlesDeadError: every particle has weight zero; it carries the result so far.
        BadWeightError: a factor, proposal or critic gave NaN or +inf.
        RunFailedError: the engine died or memory ran out; it carries the state so far, and
            the failure is its cause.
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
        share_beams=share_beams,
        rollout=rollout,
        rejuvenate=rejuvenate,
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
    warn_uncovered(result.uncovered)
    return result


def warn_uncovered(share: float) -> None:
    """Warn of a proposal that leaves out this share of a row, if it is worth it."""
    if share > _UNCOVERED:
        warnings.warn(
            "the proposal gives weight zero to symbols that hold up to "
            f"{share:.2%} of a row of the target: such texts were never drawn, and "
            "log_ml is low by their weight",
            RuntimeWarning,
            stacklevel=3,
        )


async def _states(plan: Plan) -> AsyncGenerator[SMCState, None]:
    with kept(plan.resume):
        state = plan.resume or await start_state(plan)
    state = state._replace(max_bytes=plan.max_bytes)
    yield state
    if not state.particles.active.any():
        return
    with kept(state):
        frontier = await Frontier.start(
            plan.leaves, plan.target, plan.proposal, state.particles, plan.beam_seed
        )
    while state.particles.active.any():
        with kept(state):
            state, frontier = await _step(plan, state, frontier)
        yield state


@contextmanager
def kept(state: SMCState | None) -> Iterator[None]:
    """Let a breakdown inside carry the state so far."""
    try:
        yield
    except (AllParticlesDeadError, RunFailedError):
        raise
    except _BREAKDOWNS as error:
        where = "before the first byte" if state is None else f"at byte {state.step}"
        cause = f"{type(error).__name__}: {error}"
        raise RunFailedError(f"the run failed {where}: {cause}", state) from error


async def start_state(plan: Plan) -> SMCState:
    """The particles that have read nothing.

    Raises:
        ValueError: the target gives the empty text no finite weight.
    """
    start = float(await plan.potential.prefix([]))
    if not np.isfinite(start):
        leaves = zip(plan.names[: plan.n_target], plan.leaves, strict=False)
        weights = {name: float(await leaf.prefix([])) for name, leaf in leaves}
        raise start_error(plan, start, {k: w for k, w in weights.items() if not np.isfinite(w)})
    particles = Particles.first(plan.n_particles, start)
    state = SMCState(particles, 0, plan.seed, plan.beam_seed, start, max_bytes=plan.max_bytes)
    if plan.share_beams:
        return state
    return state._replace(particles=particles.salted(state.generator(SALT_STREAM)))


async def _step(plan: Plan, state: SMCState, frontier: Frontier) -> tuple[SMCState, Frontier]:
    """One byte: rows, draw, weigh, twist, resample, read, rejuvenate."""
    clock = Clock(frontier)
    rng = state.generator()
    if plan.rollout.begins(state.step, len(state.particles.length), plan.n_particles):
        state, frontier = _widen(plan, state, frontier)
    rows, read, particles = await advance(
        plan, state, frontier, rng.random(len(state.particles.length))
    )
    weights = Weights(particles.log_weights)
    info = note(plan, state, frontier, rows, particles, read, weights)
    if info.dead == len(weights):
        raise all_dead(plan, state, particles, info)
    lanes, symbols = frontier.lane_of, read.symbols
    if plan.rollout.ends(state.step, info.active):
        if plan.rollout.candidates > 1:
            picked, mean = plan.rollout.pick(particles.log_weights, rng)
            particles = particles.gather(picked, mean)
            lanes, symbols, weights = lanes[picked], symbols[picked], Weights(mean)
        if info.active and resampling_due(plan, weights):
            ancestors = plan.resample(weights.normalised, rng)
            particles = particles.gather(ancestors, weights.log_mean)
            lanes, symbols = lanes[ancestors], symbols[ancestors]
            info = info._replace(ancestors=ancestors)
    if not plan.share_beams:
        particles = particles.salted(rng)
    frontier = await frontier.step(particles, lanes, symbols)
    state = state._replace(particles=particles, step=state.step + 1)
    if plan.rejuvenate is not None and info.ancestors is not None:
        state, frontier, moved = await plan.rejuvenate.move(
            plan, state, frontier, state.generator(MOVE_STREAM), advance
        )
        info = info._replace(moved=moved)
    return state._replace(history=(*state.history, info._replace(**clock.read()))), frontier


def resampling_due(plan: Plan, weights: Weights) -> bool:
    """Whether the effective sample size is below its threshold."""
    return weights.ess < plan.ess_threshold * len(weights) * (1 - _ROUNDING)


def _widen(plan: Plan, state: SMCState, frontier: Frontier) -> tuple[SMCState, Frontier]:
    """Each particle as often as a roll-out has candidates, one after the other."""
    copies = np.repeat(np.arange(plan.n_particles), plan.rollout.candidates)
    particles = state.particles.gather(copies, state.particles.log_weights[copies])
    return state._replace(particles=particles), frontier.on(frontier.lane_of[copies])


async def advance(
    plan: Plan,
    state: SMCState,
    frontier: Frontier,
    uniform: FloatArray,
    forced: IntArray | None = None,
    *,
    score: bool = False,
) -> Advance:
    """Read and weigh one symbol in every active particle.

    Args:
        plan: of the run.
        state: its particles and step count.
        frontier: at the texts of the particles.
        uniform: float64[N], in [0, 1), one a particle.
        forced: int64[N], what to read instead of drawing it, -1 where to draw.
        score: weigh what is forced by the target's rows alone, not by target / proposal.
    """
    rows = await frontier.rows()
    particles = state.particles.untwisted()
    read = _propose(plan, state, frontier, rows, uniform, forced, score)
    particles = particles.read(read.symbols, read.log_weights)
    particles = await _judge(plan, particles, frontier, rows, read.symbols, state.step)
    return Advance(rows, read, particles)


def _propose(
    plan: Plan,
    state: SMCState,
    frontier: Frontier,
    rows: Rows,
    uniform: FloatArray,
    forced: IntArray | None,
    score: bool,
) -> Read:
    """The next symbol of each active particle and its weight; the end at the length limit."""
    at = np.flatnonzero(frontier.lane_of >= 0)
    lanes = frontier.lane_of[at]
    symbols = np.full(len(frontier.lane_of), NO_SYMBOL, dtype=np.int64)
    log_weights = np.zeros(len(frontier.lane_of))
    if state.step == plan.max_bytes:
        symbols[at] = EOS_COLUMN
        log_weights[at] = rows.target[:, EOS_COLUMN].cpu().numpy()[lanes]
    elif score and forced is not None:
        symbols[at] = forced[at]
        log_weights[at] = rows.target.cpu().numpy()[lanes, forced[at]]
    else:
        given = () if forced is None else (forced[at],)
        symbols[at], log_weights[at] = draw(rows, lanes, uniform[at], *given)
    if np.isnan(log_weights).any() or log_weights.max(initial=0.0) == np.inf:
        raise bad_rows(plan, state, frontier, rows)
    return Read(symbols, log_weights)


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
