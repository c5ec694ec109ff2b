"""Sequential Monte Carlo over bytes, all particles of R runs at once; `smc` is R = 1.

`step` is the algorithm: it reads one byte in every particle, weighs, and resamples when the
effective sample size is low. Its cost is that of the distinct texts (`Frontier`); nothing in
it loops over particles in Python.
"""

from __future__ import annotations

import warnings
from collections.abc import AsyncGenerator, Callable, Sequence
from importlib import import_module
from typing import Any, Unpack

import numpy as np

from genlm_bytes_smc.smc.diagnostics import Progress, observe, open_progress, spent
from genlm_bytes_smc.smc.factors import name_of
from genlm_bytes_smc.smc.frontier import Frontier
from genlm_bytes_smc.smc.particles import Particles, SMCState, Weights, generator
from genlm_bytes_smc.smc.plan import Plan, SMCOptions, make_plan
from genlm_bytes_smc.smc.reading import advance, moved, rejuvenate, settled
from genlm_bytes_smc.smc.resampling import Rollout, Suffix
from genlm_bytes_smc.smc.result import SMCResult
from genlm_bytes_smc.smc.runs import (
    AllParticlesDeadError,
    Outcome,
    Pins,
    Runs,
    breakdowns,
    noted,
)
from genlm_bytes_smc.smc.selection import Chosen, advance_distinct, resampled

SALT_STREAM, MOVE_STREAM = 1, 2  # random numbers of a step besides those of its draws

_STAGES = "genlm_bytes_smc.lookahead.auto"  # loaded where it is asked for: it runs `run` below
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
    draft: Any = None,
    block: int = 16,
    resample_at: str | bytes | Sequence[str | bytes] | None = None,
    progress: Progress = None,
    on_step: Callable[[SMCState], object] | None = None,
    record: bool = False,
    resume: SMCResult | SMCState | None = None,
    distinct: bool = False,
    lookahead: Any = None,
    budget: int | None = None,
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
            text where a roll-out ends, not row by row, so it suits what has no cheap next-byte
            weights.
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
        draft: a small potential over bytes (such as another `ByteLLM`) that proposes blocks of
            bytes in place of the target's language models, together with the target's other
            factors. The language models read whole blocks, in a forward or two where
            `prune="deferred"`. It must give weight to every text that the target gives weight to.
        block: bytes of a block; with a `rollout`, that says so instead.
        resample_at: weigh and resample only where texts end in this string, or in one of these:
            a particle whose text does waits until those of all particles do, or have ended (at
            `max_bytes` at the latest). A step of the run is then no byte of every text.
        progress: a bar on stderr (None: if it is a terminal), or a function of `StepInfo`.
        on_step: called with the `SMCState` before the first step and after each.
        record: note every symbol and weight, for `SMCResult.to_json`.
        resume: a result or state to go on with. With a larger `max_bytes` the run is the one
            that would have been without the stop; target and options must be the same. (Not
            so with a `Lookahead` that looks to the run's own `max_bytes`, as it does unless
            told otherwise: as a twist it has given up what cannot end in time, so a larger
            limit is refused then; as a proposal it draws other texts. Give it a `max_bytes`.)
        distinct: keep at most `n_particles` distinct texts after each byte, chosen among all
            that one byte more can make: the heavy ones for sure, others at random in proportion to
            their weight (`smc.selection`). Particles then never share a text, and a run is exact
            where there are no more texts. `ess_threshold` has no effect. Not with `rollout`,
            `rejuvenate`, `draft`, `resample_at`, `tempering`, `record`, other resampling methods
            or `share_beams=False`.
        lookahead: a `Lookahead` as proposal and as twist; or "auto": a plain run of a quarter of
            the particles teaches a look-ahead to further runs, and all are pooled, with the mean
            weight of the target. `log_ml` is at least the plain run's less log 4. The result is a
            `StagedResult`. Not with `proposal`, `twist`, `resume`, `draft` or `resample_at`.
        budget: with "auto", rows of the language models to spend. A search finds likely texts,
            which count with their exact weight, and a run of at most `n_particles` estimates
            the rest. `log_ml` is at least what was found. Where a search cannot find enough, a
            plain run has all `n_particles`, and further ones follow until the rows are spent (the
            last one may go over); `log_ml` is then at least the plain run's less log 16. Rows kept
            from earlier calls cost nothing, so the same call made again may go further.

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
    given = locals()
    options: Any = {name: given[name] for name in SMCOptions.__annotations__}
    size = n_particles, ess_threshold, max_bytes
    if isinstance(lookahead, str) and lookahead == "auto":
        del options["lookahead"]
        watched = {"budget": budget, "progress": progress, "on_step": on_step}
        staged: SMCResult = await import_module(_STAGES).auto(target, *size, **options, **watched)
        return staged
    if budget is not None:
        raise ValueError('a budget needs lookahead="auto"')
    (outcome,) = await run([make_plan(target, *size, **options)], progress, on_step)
    return alive(outcome)


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
    runs = await begin([make_plan(target, n_particles, ess_threshold, max_bytes, **options)])
    yield runs.state(0)
    while not runs.over:
        runs = await step(runs)
        if runs.outcomes[0] is not None:
            alive(runs.outcomes[0])
        yield runs.state(0)


def alive(outcome: Outcome) -> SMCResult:
    """Return a result, or raise the error of a run all of whose particles died."""
    if isinstance(outcome, AllParticlesDeadError):
        raise outcome
    return outcome


async def run(
    plans: Sequence[Plan],
    progress: Progress = False,
    on_step: Callable[[SMCState], object] | None = None,
    pins: Pins | None = None,
) -> list[Outcome]:
    """Run plans that differ in their seeds alone, side by side, to their ends.

    Args:
        plans: of the R runs.
        progress, on_step: see `smc`; they see the first run.
        pins: what is prescribed to the first particle of each run, if anything is.

    Returns:
        The result of each, or its error if all of its particles died.
    """
    with open_progress(progress, plans[0].max_bytes) as show:
        runs = await begin(plans, pins)
        if on_step is not None:
            on_step(runs.state(0))
        while not runs.over:
            runs = await step(runs)
            if isinstance(runs.outcomes[0], AllParticlesDeadError):
                continue
            if on_step is not None:
                on_step(runs.state(0))
            show(runs.histories[0][-1])
    outcomes = [outcome for outcome in runs.outcomes if outcome is not None]
    results = [outcome for outcome in outcomes if isinstance(outcome, SMCResult)]
    uncovered = max([result.uncovered for result in results], default=0.0)
    if uncovered > _UNCOVERED:
        warnings.warn(
            f"the proposal gives weight zero to symbols that hold up to {uncovered:.2%} of a row "
            "of the target: such texts were never drawn, and log_ml is low by their weight",
            RuntimeWarning,
            stacklevel=2,
        )
    return outcomes


async def begin(plans: Sequence[Plan], pins: Pins | None = None) -> Runs:
    """Return runs before their first step, or where the run that is resumed stopped.

    Raises:
        ValueError: the target gives the empty text no finite weight.
    """
    plan, state = plans[0], plans[0].resume
    with breakdowns(lambda: [p.resume for p in plans]):
        if state is None:
            start = await start_weight(plan)
            particles = Particles.first(len(plans) * plan.n_particles, start)
            eve = np.tile(np.arange(plan.n_particles), len(plans))
            state = SMCState(particles._replace(eve=eve), 0, plan.seed, plan.beam_seed, start)
        nobody: list[Outcome | None] = [None] * len(plans)
        histories = [state.history] * len(plans)
        frontier = Frontier(plan, (), np.zeros(0, dtype=np.int64), 0)
        runs = Runs(
            plans, state.particles, frontier, state.step, state.start, histories, nobody, pins
        )
        if plan.resume is None:
            rngs = [generator(p.seed, 0, SALT_STREAM) for p in plans]
            runs = runs._replace(particles=runs.salted(runs.particles, rngs, 0))
        seeds = [p.beam_seed for p in plans]
        frontier = await Frontier.start(plan, runs.particles, seeds)
        runs = runs._replace(frontier=settled(frontier, runs.particles)[0])
    if runs.particles.active.any():
        return runs
    return runs._replace(outcomes=[SMCResult(runs.state(0))])


async def start_weight(plan: Plan) -> float:
    """Return the log weight of the empty text, nats.

    Raises:
        ValueError: it is not finite.
    """
    start = float(await plan.potential.prefix([]))
    if np.isfinite(start):
        return start
    leaves = zip(plan.names[: plan.n_target], plan.leaves, strict=False)
    weights = {name: float(await leaf.prefix([])) for name, leaf in leaves}
    blamed = ", ".join(f"{name} gave {w}" for name, w in weights.items() if not np.isfinite(w))
    raise ValueError(
        f"the empty text must have a finite log weight, got {start} from "
        f"{name_of(plan.potential)} ({blamed or 'no factor alone'})"
    )


async def step(runs: Runs) -> Runs:
    """Read one byte in every particle of every run, weigh it, and resample.

    This is sequential importance sampling with resampling (Doucet & Johansen 2009, section
    3.5), resampling where the effective sample size is low (Del Moral, Doucet & Jasra 2012).
    In their symbols, with n bytes read, a text x_1:n, the target gamma_n and the proposal q_n:

    - `advance` draws X_n^i ~ q_n(. | X_1:n-1^i) and multiplies the weight w_n^i by alpha_n =
      gamma_n(x_1:n) / (gamma_n-1(x_1:n-1) q_n(x_n | x_1:n-1)). Rows are q_n, the factors'
      steps give gamma_n / gamma_n-1, and twists make gamma_n what resampling shall see;
    - `weights` are W_n^i, with the estimate of Z_n (their mean) and ESS = 1 / sum (W_n^i)^2;
    - `resampled` draws ancestors A_n^i by W_n, after which every weight is the mean (with
      `distinct`, `advance_distinct` chooses texts before they are read instead);
    - `rejuvenate` moves particles by a kernel K_n that leaves gamma_n as it is.
    """
    plan, rngs = runs.plans[0], runs.generators()
    with breakdowns(lambda: [runs.state(r) for r in range(len(runs.plans))]):
        before, wide = spent(plan.engines), runs.widened()
        if plan.distinct:
            wide, read = await advance_distinct(wide, rngs)
        else:
            n = wide.size
            draws = [np.zeros(n) if rng is None else rng.random(n) for rng in rngs]
            uniform = np.concatenate(draws)
            read = await advance(wide.particles, wide.frontier, runs.step, uniform, wide.forced())
        weights = [Weights(w) for w in read.particles.log_weights.reshape(len(rngs), -1)]
        infos = observe(wide.particles, runs.step, read, weights)
        ready, on_the_way = settled(read.after, read.particles)
        chosen: Chosen = read.particles, None, {}
        if not (on_the_way or plan.distinct):
            chosen = await resampled(wide, read.particles, weights, infos, rngs)
        particles, places, ancestors = chosen
        particles = runs.salted(particles, rngs, runs.step + 1)
        frontier = moved(ready, particles, places)
        after = runs._replace(particles=particles, frontier=frontier, step=runs.step + 1)
        changed = None
        if plan.rejuvenate is not None and ancestors:
            rng = generator(plan.seed, after.step, MOVE_STREAM)
            particles, frontier, changed = await rejuvenate(particles, frontier, after.step, rng)
            after = after._replace(particles=particles, frontier=frontier)
        rows, forwards, seconds = spent(plan.engines)
        notes: dict[str, Any] = {
            "moved": changed,
            "rows": rows - before[0],
            "forwards": forwards - before[1],
            "seconds": seconds - before[2],
        }
        infos = [info._replace(**notes) for info in infos]
        return noted(runs, wide, read.particles, after, infos, ancestors)
