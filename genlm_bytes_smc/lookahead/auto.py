"""`smc(..., lookahead="auto")`: a search and a run for the rest, or runs that teach each other.

With a budget of rows, likely texts are searched for first (`lookahead.search`). Whole texts whose
rows are known count with their exact weight, and one run of distinct texts (`smc.selection`),
drawn to what is not known alone, estimates the rest. log_ml is at least what was found.

Without a budget, or where there are too many texts to find, the first run is plain: no look-ahead,
the settings that were asked for, a share of at least a quarter. Each further one has a
`SeenLookahead` that the ones before taught, as proposal and as twist. All are pooled by shares
that are chosen before a run is drawn (`smc.pooled`). In both cases

- E[exp(log_ml)] is the target's total weight, over all draws;
- a step of a run that looks ahead draws from (1 - d) look-ahead + d target and weighs by that
  mixture, so its weight is at most 1 / d times that of a plain step.

In the second one, log_ml is at least that of the first run less `LOSS` (with a budget: less
`LOSS_OF_BUDGET`), however bad a look-ahead is. What is known already costs no row again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from genlm_bytes_smc.alphabet import EOS_COLUMN
from genlm_bytes_smc.beam.state import padded
from genlm_bytes_smc.checks import check_count
from genlm_bytes_smc.lookahead.search import Search
from genlm_bytes_smc.lookahead.seen import SeenLookahead, settings_of
from genlm_bytes_smc.smc.diagnostics import Progress
from genlm_bytes_smc.smc.factors import engines_of, name_of, random_beams, weights_are_sums
from genlm_bytes_smc.smc.loop import run, start_weight
from genlm_bytes_smc.smc.particles import Particles, SMCState, derived_seed
from genlm_bytes_smc.smc.plan import Plan, make_plan
from genlm_bytes_smc.smc.pooled import Found, Stage, StagedResult
from genlm_bytes_smc.smc.reading import replay
from genlm_bytes_smc.smc.runs import AllParticlesDeadError
from genlm_bytes_smc.smc.weighers import Recorder, Seen

FIRST = 0.25  # share of the first, plain run
LOSS = -math.log(FIRST)  # nats: most that log_ml may be below the plain run's
# The same where a budget pays for many more particles than the first run's:
FIRST_OF_BUDGET = 1 / 16
LOSS_OF_BUDGET = -math.log(FIRST_OF_BUDGET)
MOST_STAGES = 8
LEAST = 4  # particles of a run that a budget pays for
PART = 1 / 3  # of what is left of a budget, for the next run
LEAST_PART = 0.1  # of a budget, below which what is left is for the last run
MOST_PARTICLES = 4096  # of a run that a budget pays for
TRIED, WORTH = 0.6, 0.05  # of a budget, after which a search has to have found this of the mass
SEARCHED = 0.95  # of a budget, for a search that is worth it
FEWEST = 2  # particles of the run that follows it
SEED_STREAM = 3  # of the seeds of further runs
_TWO = 8  # particles below which there is one further run, and not two

_USUAL: dict[str, Any] = {  # what options are where a run can be one of distinct texts
    "rollout": None,
    "rejuvenate": None,
    "tempering": None,
    "record": False,
    "share_beams": True,
    "resampling_method": "systematic",
}


async def auto(
    target: Any,
    n_particles: int,
    ess_threshold: float,
    max_bytes: int,
    *,
    budget: int | None = None,
    progress: Progress = None,
    on_step: Callable[[SMCState], object] | None = None,
    **options: Any,
) -> StagedResult:
    """Run `smc` in stages and pool them; the arguments are those of `smc`.

    Raises:
        TypeError, ValueError: as `smc`, before any work; an option that cannot be had.
        AllParticlesDeadError: the particles of every stage died; it carries all of them.
    """
    for name in ("proposal", "twist", "resume"):
        if options.pop(name, None) is not None:
            raise ValueError(f'{name} cannot be given with lookahead="auto", which sets its own')
    for name in ("draft", "resample_at"):
        if options.get(name) is not None:
            raise ValueError(f'{name} and lookahead="auto" cannot be combined; give one of them')
    plan = make_plan(target, n_particles, ess_threshold, max_bytes, **options)
    if budget is not None:
        check_count("budget", budget, 1)
        if not engines_of(plan.leaves):
            raise ValueError(
                f"a budget counts rows that a ByteLLM computes, and {name_of(target)} holds none"
            )
    return await _Stages(plan, options, progress, on_step).run(budget)


class _Stages:
    """The stages of a run, and what they have seen.

    Args:
        plan: of a plain run of all particles.
        options: of `make_plan`.
        progress, on_step: see `smc`; they see one stage after the other.
    """

    def __init__(
        self,
        plan: Plan,
        options: dict[str, Any],
        progress: Progress,
        on_step: Callable[[SMCState], object] | None,
    ) -> None:
        self._plan, self._options = plan, options
        self._progress, self._on_step = progress, on_step
        self._engines = engines_of(plan.leaves)
        self._start = self._rows()
        self._seen, self._start_weight = Seen(), 0.0
        # Whether a text weighs the same in every run, and rows forecast it.
        self._exact = not random_beams(plan.leaves) and options.get("critic") is None
        self._sums = weights_are_sums(plan.leaves)
        self._weights: dict[bytes, float] = {}  # of whole texts, where these are not sums
        self._stages: list[Stage] = []
        self._error: AllParticlesDeadError | None = None
        self._settings: list[dict[str, Any] | None] = []  # of the tables, once known
        self._found: Found | None = None

    def _rows(self) -> int:
        return sum(engine.counts.rows for engine in self._engines)

    async def run(self, budget: int | None) -> StagedResult:
        """Run the stages that N particles, or a budget, pay for."""
        n, self._start_weight = self._plan.n_particles, await start_weight(self._plan)
        first = math.ceil(FIRST * n)
        if budget is None:
            sizes = [first, n - first] if n < _TWO else [first, first, n - 2 * first]
            for size in sizes[: n if n < 2 else None]:
                await self._stage(size, size / n, exact=False)
        elif self._exact and await self._search(budget):
            # The rows that are left pay for few distinct texts, at the price of one that was found.
            price = max(self._spent(), 1) / max(len(self._seen.rows().whole()), 1)
            left = budget - self._spent()
            await self._stage(min(max(int(left / price), FEWEST), n), 1.0, rest=True)
        else:
            await self._grow(n, budget)
        result = StagedResult(self._stages, self._found)
        if result.log_ml == -np.inf:
            assert self._error is not None
            error = self._error
            raise AllParticlesDeadError(str(error), error.byte, error.causes, result.state)
        return result

    async def _search(self, budget: int) -> bool:
        """Search for likely texts, and return whether it found enough of the mass to go on with.

        Where it did, it has all but the last rows, else `TRIED` of them.
        """
        search = Search(self._plan)
        await search.spend(int(TRIED * budget))
        worth = search.share >= WORTH
        if worth:
            await search.spend(int(SEARCHED * budget) - self._spent())
        self._found = search.found(self._spent(), self._start_weight)
        self._settings.append(search.settings)
        seen = search.rows()
        self._seen.add(seen.texts, seen.target, seen.visits)
        self._seen.end(list(seen.final))
        return worth

    def _spent(self) -> int:
        return self._rows() - self._start

    async def _grow(self, size: int, budget: int) -> None:
        """Run stages, the first one plain, until the rows are spent.

        Each may cost a third of what is left, reckoned by the rows a particle of the one before.
        The price falls as more is known, so stages grow. The last one takes what is left. Shares
        are those of stages that double, up to the most there may be. `size` particles begin.
        """
        left, most = 1.0 - FIRST_OF_BUDGET, max(MOST_PARTICLES, size)
        await self._stage(size, FIRST_OF_BUDGET)
        for k in range(1, MOST_STAGES):
            rows = self._stages[-1].rows
            price = max(rows, 1) / size
            rest = max(budget - self._spent(), 0)
            last = rest < LEAST_PART * budget or k == MOST_STAGES - 1
            size = min(max(int((1.0 if last else PART) * rest / price), LEAST), most)
            share = left if last else left / (2 ** (MOST_STAGES - k) - 1)
            await self._stage(size, share)
            left -= share
            if last:
                return

    async def _stage(
        self, size: int, share: float, *, exact: bool = True, rest: bool = False
    ) -> None:
        """Run one stage of `size` particles.

        Args:
            share: see `Stage`.
            exact: whether texts that are known count with their weights, if these are exact.
            rest: whether it is drawn to what is not known alone; else the first one is plain.
        """
        before, k = self._rows(), len(self._stages)
        looks = k > 0 or rest
        exact = exact and self._exact and (looks or self._found is not None)
        known = await self._known() if exact else {}
        seed = self._plan.seed  # that of the run for the first, independent ones after it
        seed = derived_seed(seed, SEED_STREAM, k, kind=np.uint32) if k else seed
        options = {**self._options, "seed": seed}
        if rest and not any(options.get(name) != value for name, value in _USUAL.items()):
            options["distinct"] = True
        ahead = self._ahead(rest) if looks else None
        if ahead is not None:
            options |= {"proposal": ahead, "twist": ahead}
        p = self._plan
        plan = make_plan(p.potential, size, p.ess_threshold, p.max_bytes, **options)
        recorder = Recorder(self._seen, p.max_bytes)
        plan = dataclasses.replace(plan, weighers=(*plan.weighers, recorder))
        (outcome,) = await run([plan], self._progress, self._on_step)
        if isinstance(outcome, AllParticlesDeadError):
            self._error = self._error or outcome
        trust = 0.0 if ahead is None else ahead.line.slope
        rows = self._rows() - before
        stage = Stage(outcome.result, share, ahead is not None, trust, rows, known)
        self._stages.append(stage)

    async def _known(self) -> dict[bytes, float]:
        """Return the log weight of every whole text whose rows are known, as a run has it, nats.

        Where rows are forecasts (`prune="deferred"`), texts are read and weighed as in a run.
        """
        sums = self._seen.rows().whole()
        if self._sums:
            return {text: logw + self._start_weight for text, logw in sums.items()}
        texts = [text for text in sums if text not in self._weights]
        if texts:
            symbols = padded(texts, EOS_COLUMN, 1 + max(map(len, texts)))
            first = Particles.first(len(texts), self._start_weight)
            read = await replay(
                self._plan, first, [self._plan.beam_seed], range(symbols.shape[1]),
                lambda step: symbols[:, step], score=True,
            )  # fmt: skip
            self._weights |= dict(zip(texts, read.particles.log_weights.tolist(), strict=True))
        return {text: self._weights[text] for text in sums}

    def _ahead(self, rest: bool) -> SeenLookahead | None:
        """Return the look-ahead that was learned so far, to what is not known alone if `rest`."""
        if not len(self._seen):
            return None
        seen = self._seen.rows()
        if not self._settings:
            terminated = self._plan.terminate_when is not None
            self._settings.append(settings_of(self._plan.potential, seen, terminated=terminated))
        return SeenLookahead(seen, self._settings[0], rest=rest)
