"""Several runs: at once, repeated, without an event loop, and bounds on log_ml from both sides.

Bounds. The estimate of a run of `smc` has the mean Z; that of a conditional run which is held to an
exact sample of the target has an inverse with the mean 1/Z, so one is too low and the other too
high in the mean of logarithms (bidirectional Monte Carlo: Grosse, Ghahramani & Adams 2015,
arXiv:1511.02543; for language models Zhao et al. 2024, arXiv:2404.17546).

How far off they are is not read off their spread: runs that all miss the same text agree. For
ratios r_i = estimate / Z with mean one, prod (1 + s (r_i - 1)) has the mean one for each share s in
[0, 1], and so does a mean of it over some shares. A Z under which that is as large as 1/a has a
probability of at most a, by Markov's inequality, whatever the law of the estimates and however few
there are (betting on a mean: Waudby-Smith & Ramdas 2024, arXiv:2010.09686). With s = 1 the bound is
the mean of logarithms less log(1/a) / n; with s < 1 an estimate of nearly zero does not ruin it.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, Unpack

import numpy as np

from genlm_bytes_smc.calls import blocking, together
from genlm_bytes_smc.checks import check_count
from genlm_bytes_smc.smc.conditional import conditional_runs
from genlm_bytes_smc.smc.exact import exact_sample
from genlm_bytes_smc.smc.factors import prunings
from genlm_bytes_smc.smc.loop import alive, run, smc
from genlm_bytes_smc.smc.particles import SMCState, Weights
from genlm_bytes_smc.smc.plan import Plan, SMCOptions, make_plan
from genlm_bytes_smc.smc.resampling import FloatArray
from genlm_bytes_smc.smc.result import SMCResult
from genlm_bytes_smc.smc.runs import AllParticlesDeadError, Outcome, RunFailedError
from genlm_bytes_smc.smc.samples import LogMLBounds, TextSamples

GAPE = 1.0  # nats between the bounds from which on a warning says so
_ROUNDING = 1e-6  # nats
_SHARES = ((1.0, 0.9), (0.5, 0.1))  # s of the module's docstring, and how much each counts


async def smc_many(
    targets: Sequence[Any],
    n_particles: int,
    ess_threshold: float = 0.5,
    max_bytes: int = 100,
    *,
    dead: str = "raise",
    **options: Unpack[SMCOptions],
) -> list[SMCResult]:
    """One run of `smc` a target, side by side: runs over one model share its forwards.

    Runs of one and the same target are averaged by `smc_repeat`; who averages their posteriors by
    hand weighs each by `exp(log_ml)`, as equal shares converge to another law.

    Args:
        targets: as for `smc`; run i has the seed `seed + i`.
        n_particles, ess_threshold, max_bytes: as for `smc`, of each run.
        dead: what becomes of a run all of whose particles died: "raise" cancels the others
            and raises, "return" returns what it had (its `log_ml` is -inf).
        **options: as for `smc`, of each run; not `progress`, `on_step` or `lookahead="auto"`.

    Returns:
        The results in the order of `targets`.

    Raises:
        RunFailedError: as in `smc`; its `states` are those of all runs.
    """
    if dead not in ("raise", "return"):
        raise ValueError(f'dead must be "raise" or "return", got {dead!r}')
    if options.get("resume") is not None:
        raise ValueError("smc_many begins its runs; resume one of them with smc")
    seed = options.get("seed") or 0
    check_count("seed", seed, 0)
    plans = []
    for i, target in enumerate(targets):
        mine: SMCOptions = {**options, "seed": seed + i}
        plans.append(make_plan(target, n_particles, ess_threshold, max_bytes, **mine))

    outcomes = await _apart(plans, len(plans), alive if dead == "raise" else None)
    return [outcome.result for outcome in outcomes]


class Repeats(TextSamples):
    """Independent runs of one target, their particles pooled.

    A run's particles count as much as its estimate of the marginal likelihood is large, so
    `posterior` and the like converge as runs are added. The mean of the runs' own posteriors, in
    equal shares, does not: it keeps the bias of a run of N particles however many there are.

    Args:
        results: the runs, all of one size.

    Attributes:
        log_ml: log of the mean of the runs' estimates, nats; unbiased on the linear scale.
    """

    def __init__(self, results: Sequence[SMCResult]) -> None:
        super().__init__(
            [text for r in results for text in r.texts],
            np.concatenate([r.ended for r in results]),
            np.concatenate([r.log_weights for r in results]),
        )
        self.results = list(results)

    @cached_property
    def log_mls(self) -> FloatArray:
        """Each run's estimate of the log marginal likelihood, nats: float64[runs]."""
        return np.array([r.log_ml for r in self.results])

    @cached_property
    def log_ml_error(self) -> float:
        """Standard error of `log_ml` from the spread of the runs, nats; NaN for one run.

        The standard error of the mean of exp(log_mls) over that mean: first order in it.
        """
        p = Weights(self.log_mls).normalised * len(self.results)  # estimates over their mean
        if len(p) < 2 or not p.any():
            return float("nan")
        return float(np.std(p, ddof=1) / np.sqrt(len(p)))

    def summary(self) -> dict[str, str]:
        """Return what is shown above the texts, name by name."""
        return {
            "runs": str(len(self.results)),
            "log marginal likelihood": f"{self.log_ml:.4f} ± {self.log_ml_error:.4f}",
            "effective sample size": f"{self.ess:.1f} of {self.size}",
        }


async def smc_repeat(
    target: Any,
    n_particles: int,
    ess_threshold: float = 0.5,
    max_bytes: int = 100,
    *,
    seeds: int | Iterable[int] = 10,
    at_once: int = 8,
    **options: Unpack[SMCOptions],
) -> Repeats:
    """Independent runs of one target, for an estimate with an honest error.

    A run all of whose particles died counts as an estimate of zero. With `prune="unbiased"`
    each run's seed also seeds its beams (unless `beam_seed` is given), so that the spread of
    the runs holds the beams' own; the prompt's beam is shared (see `ByteLLM`).

    Args:
        target, n_particles, ess_threshold, max_bytes, **options: as for `smc`, but for
            `progress` and `on_step`.
        seeds: one a run, all different; or how many runs to make, seeded from `seed` on.
        at_once: runs side by side, sharing forwards. Their particles are one set of arrays,
            and runs with equal beams share the work on equal texts, so many at once cost
            little more than one; each comes out as `smc` would give it.

    Raises:
        ValueError: no seeds, or one twice.
    """
    check_count("at_once", at_once, 1)
    first, beam_seed = options.get("seed") or 0, options.get("beam_seed")
    if not isinstance(seeds, Iterable):
        check_count("seeds", seeds, 1)
        seeds = range(first, first + seeds)
    given = list(seeds)
    if not given or len(set(given)) < len(given):
        raise ValueError(f"seeds must be one or more different integers, got {given}")
    size = n_particles, ess_threshold, max_bytes
    of_run: list[SMCOptions] = [
        {**options, "seed": seed, "beam_seed": seed if beam_seed is None else beam_seed}
        for seed in given
    ]
    if options.get("lookahead") == "auto":  # one after the other: they share the rows kept
        return Repeats([await _staged(target, size, mine) for mine in of_run])
    plans = [make_plan(target, *size, **mine) for mine in of_run]
    if not can_batch(plans[0]):
        outcomes = await _apart(plans, at_once)
    else:
        parts = [plans[i : i + at_once] for i in range(0, len(plans), at_once)]
        outcomes = [outcome for part in parts for outcome in await run(part)]
    return Repeats([outcome.result for outcome in outcomes])


async def _staged(target: Any, size: tuple[int, float, int], options: Any) -> SMCResult:
    """Run `smc` in stages, to its end or its death."""
    try:
        return await smc(target, *size, progress=False, **options)
    except AllParticlesDeadError as error:
        return error.result


def can_batch(plan: Plan) -> bool:
    """Return whether runs that differ in their seeds alone can be one set of arrays."""
    alone = plan.rejuvenate is not None or bool(plan.resample_at) or plan.resume is not None
    return plan.rollout.candidates == 1 and not alone


async def _apart(
    plans: Sequence[Plan], at_once: int, check: Callable[[Outcome], object] | None = None
) -> list[Outcome]:
    """Run plans side by side, at most so many at once, each in arrays of its own.

    `check` is called with each outcome; what it raises cancels the others.

    Raises:
        RunFailedError: one broke down; it carries the states of all.
    """
    turn = asyncio.Semaphore(max(at_once, 1))
    last: list[SMCState | None] = [None] * len(plans)

    async def alone(i: int) -> Outcome:
        async with turn:
            (outcome,) = await run([plans[i]], on_step=lambda state: last.__setitem__(i, state))
        if check is not None:
            check(outcome)
        return outcome

    try:
        return await together([alone(i) for i in range(len(plans))])
    except RunFailedError as error:
        error.states = last
        raise


async def log_ml_bounds(
    target: Any,
    n_particles: int,
    ess_threshold: float = 0.5,
    max_bytes: int = 100,
    *,
    result: TextSamples | None = None,
    exact: Sequence[bytes] | None = None,
    runs: int = 8,
    confidence: float = 0.95,
    max_rows: int | None = None,
    seed: int = 0,
) -> LogMLBounds:
    """Bound the log marginal likelihood by runs of `smc` and by runs held to exact samples.

    The interval covers the truth with the probability asked for, whatever the target and however
    few particles: both kinds of estimate only have to be independent and right on average. Its
    width is at least 2 log(2 / (1 - confidence)) / runs, for 8 runs and 95% about a nat, as so few
    exact samples say nothing of texts with a lesser share. If `exact` is None and all beams have
    `prune="topk"`, the interval is also cut at the certain bounds of the draws, which are narrower
    where the constraint leaves few texts.

    Args:
        target, n_particles, ess_threshold, max_bytes: as for `smc`.
        result: a run to which the bounds are attached, as `result.log_ml_bounds`.
        exact: whole texts drawn from the target itself, at least four; None: drawn by
            `exact_sample`.
        runs: how many of each kind, at least four; as many as there are exact texts.
        confidence: of the interval, in (0, 1): each side has half of the rest.
        max_rows: of `exact_sample`.
        seed: of all runs.

    Raises:
        ValueError: a number out of range, or fewer than four exact samples.

    Warns:
        UserWarning: the bounds are more than a nat apart: more runs or particles are due.
    """
    check_count("runs", runs, 4)
    if not isinstance(confidence, int | float) or not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence!r}")
    certain = LogMLBounds(-np.inf, np.inf, 1.0)
    if exact is None:
        drawn = await exact_sample(target, runs, max_rows, max_bytes, seed=seed)
        exact = drawn.texts
        if drawn.log_ml_bounds is not None and prunings([target]) == {"topk"}:
            certain = drawn.log_ml_bounds
    if len(exact) < 4:
        raise ValueError(f"at least four exact samples are due, got {len(exact)}")
    size = n_particles, ess_threshold, max_bytes
    below = (await smc_repeat(target, *size, seeds=range(seed, seed + runs))).log_mls
    seeds = range(seed, seed + len(exact))
    held = await conditional_runs(target, exact, *size, seeds)
    above = np.array([found.log_ml for found in held])
    bounds = interval(below, above, confidence)
    # What is certain is so up to the rounding of rows.
    low, high = max(bounds.low, certain.low - _ROUNDING), min(bounds.high, certain.high + _ROUNDING)
    bounds = LogMLBounds(low, high, confidence)
    if result is not None:
        result.log_ml_bounds = bounds
    if bounds.high - bounds.low > GAPE:
        warnings.warn(
            f"the log marginal likelihood is between {bounds.low:.2f} and {bounds.high:.2f}: "
            "more runs (runs=), more particles, or a look-ahead, are due",
            stacklevel=2,
        )
    return bounds


def interval(below: FloatArray, above: FloatArray, confidence: float) -> LogMLBounds:
    """Return bounds from log estimates (nats) of runs, and of runs held to exact samples."""
    return LogMLBounds(lower_bound(below, confidence), -lower_bound(-above, confidence), confidence)


def lower_bound(logs: FloatArray, confidence: float) -> float:
    """Return a bound that the log of the mean of a positive variable seldom falls below.

    Args:
        logs: float64[n], logs of independent draws of the variable, nats; -inf is zero.
        confidence: the bound is too high with probability (1 - confidence) / 2 at most.
    """
    least = np.log(2 / (1 - confidence))
    top = float(logs.max())
    if top == -np.inf:
        return top

    def capital(level: float) -> float:
        """Return the log of the mean over shares of prod (1 + s (exp(log - level) - 1))."""
        with np.errstate(divide="ignore"):
            terms = [
                np.log(count) + np.logaddexp(np.log1p(-share), np.log(share) + logs - level).sum()
                for share, count in _SHARES
            ]
        return float(np.logaddexp.reduce(terms))

    # At `low` the largest draw alone is enough, at `high` none is above one.
    share, count = _SHARES[-1]
    low = top + np.log(count * share) + (len(logs) - 1) * np.log1p(-share) - least
    high = top
    while high - low > 1e-9 * max(1.0, abs(high)):
        middle = (low + high) / 2
        low, high = (middle, high) if capital(middle) >= least else (low, middle)
    return float(low)


smc_sync = blocking(smc)
smc_many_sync = blocking(smc_many)
smc_repeat_sync = blocking(smc_repeat)
log_ml_bounds_sync = blocking(log_ml_bounds)
