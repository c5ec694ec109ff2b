"""Many runs at once, runs repeated, and runs without an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, Unpack

import numpy as np

from genlm_bytes_smc.calls import blocking, run_sync
from genlm_bytes_smc.checks import check_count
from genlm_bytes_smc.smc.lanes import together
from genlm_bytes_smc.smc.loop import alive, run, smc
from genlm_bytes_smc.smc.particles import SMCState, Weights
from genlm_bytes_smc.smc.plan import Plan, SMCOptions, make_plan
from genlm_bytes_smc.smc.resampling import FloatArray
from genlm_bytes_smc.smc.result import SMCResult
from genlm_bytes_smc.smc.runs import AllParticlesDeadError, Outcome, RunFailedError
from genlm_bytes_smc.smc.samples import TextSamples


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
        **options: as for `smc`, of each run.

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
        target, n_particles, ess_threshold, max_bytes, **options: as for `smc`.
        seeds: one a run, all different; or how many runs to make, seeded from `seed` on.
        at_once: runs side by side, sharing forwards. Their particles are one set of arrays,
            and runs with equal beams share the work on equal texts, so many at once cost
            little more than one; each comes out as `smc` would give it.

    Raises:
        ValueError: no seeds, or one twice.
    """
    check_count("at_once", at_once, 1)
    given = list(_seeds(seeds, options.get("seed") or 0))
    if not given or len(set(given)) < len(given):
        raise ValueError(f"seeds must be one or more different integers, got {given}")
    beam_seed = options.get("beam_seed")
    if options.get("lookahead") == "auto":
        return Repeats(
            await _staged(target, given, (n_particles, ess_threshold, max_bytes), options)
        )
    plans = []
    for seed in given:
        beams = seed if beam_seed is None else beam_seed
        mine: SMCOptions = {**options, "seed": seed, "beam_seed": beams}
        plans.append(make_plan(target, n_particles, ess_threshold, max_bytes, **mine))
    if not can_batch(plans[0]):
        outcomes = await _apart(plans, at_once)
    else:
        parts = [plans[i : i + at_once] for i in range(0, len(plans), at_once)]
        outcomes = [outcome for part in parts for outcome in await run(part)]
    return Repeats([outcome.result for outcome in outcomes])


async def _staged(
    target: Any, seeds: Sequence[int], size: tuple[int, float, int], options: SMCOptions
) -> list[SMCResult]:
    """Run `smc` in stages once a seed, one run after the other: they share the rows kept."""
    results = []
    for seed in seeds:
        beam_seed = options.get("beam_seed")
        beams = seed if beam_seed is None else beam_seed
        mine: Any = {**options, "seed": seed, "beam_seed": beams}
        try:
            results.append(await smc(target, *size, progress=False, **mine))
        except AllParticlesDeadError as error:
            results.append(error.result)
    return results


def can_batch(plan: Plan) -> bool:
    """Return whether runs that differ in their seeds alone can be one set of arrays."""
    alone = plan.rejuvenate is not None or bool(plan.resample_at) or plan.resume is not None
    return plan.rollout.candidates == 1 and not alone


async def _apart(
    plans: Sequence[Plan], at_once: int, check: Callable[[Outcome], object] | None = None
) -> list[Outcome]:
    """Run plans side by side, each in arrays of its own.

    Args:
        plans: what to run.
        at_once: how many at most at a time.
        check: called with each outcome; what it raises cancels the others.

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


def _seeds(seeds: int | Iterable[int], first: int) -> Iterable[int]:
    if isinstance(seeds, Iterable):
        return seeds
    check_count("seeds", seeds, 1)
    return range(first, first + seeds)


smc_sync = blocking(smc)
smc_many_sync = blocking(smc_many)
smc_repeat_sync = blocking(smc_repeat)
run_blocking = run_sync
