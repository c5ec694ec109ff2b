"""Runs of one target pooled to one result: the stages of `smc(..., lookahead="auto")`.

They are weighted by shares that sum to one. Let run k have N_k particles, the estimate Z_k and
the share a_k, and N = N_1 + N_2 + ... . With its weights times a_k N / N_k, the mean weight of all
N particles is a_1 Z_1 + a_2 Z_2 + ... . It has the mean Z if E[Z_k | the runs before k] = Z and the
shares sum to one, where a_k may depend on the runs before k but not on run k itself: each
a_k (Z_k - Z) then has the mean zero.
What is pooled is a run like another, of N particles of which each group is resampled by itself.

Where a text's weight is the sum of the rows along it, the texts S_k that are known before run k
need no draws. In place of Z_k stands

    (total weight of S_k) + (mean weight of the particles of run k whose text is not in S_k),

which has the same mean and varies less: only what was not known is estimated. The known texts
come in as further particles, one each, and particles of run k with such a text weigh nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from genlm_bytes_smc.beam.state import padded
from genlm_bytes_smc.smc.particles import NO_SYMBOL, Particles, SMCState, StepInfo, Weights
from genlm_bytes_smc.smc.resampling import FloatArray, IntArray
from genlm_bytes_smc.smc.result import SMCResult
from genlm_bytes_smc.smc.samples import Weighted

GAPE_NATS, GAPE_ERRORS = 2.0, 4.0  # between log evidences, from which on the summary warns


class Stage(NamedTuple):
    """One of the runs that were pooled.

    Attributes:
        result: what it found (all weights are -inf if every particle died).
        share: its share in the estimate of the marginal likelihood.
        lookahead: whether it looked ahead.
        trust: beta, how far guesses about texts that were not seen were trusted; see
            `lookahead.seen`.
        rows: rows that the language models computed for it, those of fitting included.
        known: log weights of the texts S_k that were known before it, nats.
    """

    result: SMCResult
    share: float
    lookahead: bool
    trust: float
    rows: int
    known: Mapping[bytes, float] = MappingProxyType({})

    def rest(self) -> SMCState:
        """Return the run, with no weight on the texts that were known."""
        state = self.result.state
        if not self.known:
            return state
        weights, ended = state.particles.log_weights.copy(), state.particles.ended
        drawn = zip(self.result.texts, ended.tolist(), strict=True)
        weights[[done and text in self.known for text, done in drawn]] = -np.inf
        return state._replace(particles=state.particles._replace(log_weights=weights))


class Found(NamedTuple):
    """What a search before the runs found.

    Attributes:
        rows: that it cost.
        share: of the mass, in whole texts that are known, by its own guess of the rest.
        low, high: bounds on the total weight for sure, nats: what whole texts weigh, and what all
            would weigh if everything below an unknown text had mass 1. `high` is only one if no
            row of the target sums to more than 1.
    """

    rows: int
    share: float
    low: float
    high: float


class StagedResult(SMCResult):
    """What `smc(..., lookahead="auto")` returns: its runs, pooled.

    Args:
        stages: the runs in their order; the first one is plain if there was no search.
        search: what a search before them found; None if there was none.
    """

    def __init__(self, stages: Sequence[Stage], search: Found | None = None) -> None:
        self.search = search
        rests, shares = [s.rest() for s in stages], [s.share for s in stages]
        self._variance = _log_variance(rests, shares)
        known = _known(stages)
        if known is not None:
            rests, shares = [*rests, known], [*shares, 1.0]
        state = pooled(rests, shares)
        rows = sum(s.rows for s in stages) + (0 if search is None else search.rows)
        first, *others = state.history  # its rows are those of the search and of fitting too
        first = first._replace(rows=rows - sum(info.rows for info in others))
        super().__init__(state._replace(history=(first, *others)))
        self.stages = tuple(stages)

    @property
    def ml_relative_variance(self) -> float:
        """The same of `log_ml`, from the genealogy of each run; what was known has none."""
        return float(np.exp(self._variance - 2 * self.log_ml)) if self.log_ml > -np.inf else np.nan

    @property
    def gap(self) -> float:
        """The last run's `log_ml` less the first one's, nats; 0 for one run, NaN if both died."""
        first, last = self.stages[0].result, self.stages[-1].result
        with np.errstate(invalid="ignore"):
            return float(np.float64(last.log_ml) - first.log_ml) if first is not last else 0.0

    @property
    def gapes(self) -> bool:
        """Whether that is far more than the spread of the two runs explains."""
        first, last = self.stages[0].result, self.stages[-1].result
        errors = np.nan_to_num([first.log_ml_error, last.log_ml_error])
        spread = float(np.hypot(*errors))
        return abs(self.gap) > max(GAPE_NATS, GAPE_ERRORS * spread)

    def summary(self) -> dict[str, str]:
        """Return what is shown above the texts, name by name."""
        out = super().summary()
        told = [_told(stage) for stage in self.stages]
        if self.search is not None:
            found = f"found {self.search.share:.1%} of the mass as it guesses"
            told.insert(0, f"search ({self.search.rows} rows, {found})")
        out["stages"] = "; ".join(told)
        if self.gapes:
            first, last = self.stages[0].result, self.stages[-1].result
            out["warning"] = (
                f"log evidence of the plain run is {first.log_ml:.2f}, of the last one "
                f"{last.log_ml:.2f}: more particles, or a larger budget, are due"
            )
        return out


def _log_variance(states: Sequence[SMCState], shares: Sequence[float]) -> float:
    """Return the log of the estimated variance of the pooled estimate, nats.

    Of each run it is the estimator of Lee & Whiteley 2018 for the sum of the weights that are
    left; see `SMCResult.ml_relative_variance`. One particle has none, and counts as its square.
    """
    terms = [-np.inf]
    for state, share in zip(states, shares, strict=True):
        n = len(state.particles.length)
        top = float(state.particles.log_weights.max())
        if top == -np.inf:
            continue
        w = np.exp(state.particles.log_weights - top)
        families = np.bincount(state.particles.eve, weights=w, minlength=n) / n
        times = sum(info.ancestors is not None for info in state.history) + 1
        apart = families.sum() ** 2 - np.square(families).sum()
        v = families.sum() ** 2 - (n / max(n - 1, 1)) ** times * apart
        if v > 0:
            terms.append(float(np.log(v)) + 2 * (top + float(np.log(share))))
    return float(np.logaddexp.reduce(terms))


def _known(stages: Sequence[Stage]) -> SMCState | None:
    """Return the texts that were known before some stage as particles of their weights.

    A text counts with the shares of the stages that knew it.
    """
    top = max((w for stage in stages for w in stage.known.values()), default=0.0)
    weights: dict[bytes, float] = {}
    for stage in stages:
        for text, logw in stage.known.items():
            weights[text] = weights.get(text, 0.0) + stage.share * float(np.exp(logw - top))
    if not weights:
        return None
    texts, n = list(weights), len(weights)
    length = np.array([len(text) for text in texts])
    block = padded(texts, 0).astype(np.uint8)
    log_weights = np.log(np.array(list(weights.values()))) + top + np.log(n)
    particles = Particles(
        block, length, np.ones(n, dtype=bool), log_weights, np.zeros(n), np.arange(n)
    )
    first = stages[0].result.state
    info = StepInfo(0, 0.0, -np.inf, active=0, ended=n, dead=0, lanes=0)
    return first._replace(particles=particles, step=0, history=(info,))


def _told(stage: Stage) -> str:
    kind = f"look-ahead, trusted {stage.trust:.0%}" if stage.lookahead else "plain"
    return f"{stage.result.size} {kind} ({stage.rows} rows, log_ml {stage.result.log_ml:.2f})"


def pooled(states: Sequence[SMCState], shares: Sequence[float]) -> SMCState:
    """Return runs that are over, with shares that sum to one, as one run."""
    sizes, first = [len(state.particles.length) for state in states], states[0]
    gains = [float(np.log(share * sum(sizes) / n)) for share, n in zip(shares, sizes, strict=True)]
    steps = max(len(state.history) for state in states)
    histories = [_lengthened(state, steps) for state in states]
    return first._replace(
        particles=_joined([state.particles for state in states], gains),
        step=max(state.step for state in states),
        history=tuple(_step(infos, sizes, gains) for infos in zip(*histories, strict=True)),
    )


def _joined(parts: Sequence[Particles], gains: Sequence[float]) -> Particles:
    """Return particles side by side, their log weights raised by `gains` (nats)."""
    width = max(part.text.shape[1] for part in parts)
    sizes = [len(part.length) for part in parts]
    offset = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
    texts = [np.pad(p.text, ((0, 0), (0, width - p.text.shape[1]))) for p in parts]
    return Particles(
        np.concatenate(texts),
        np.concatenate([p.length for p in parts]),
        np.concatenate([p.ended for p in parts]),
        np.concatenate([p.log_weights + g for p, g in zip(parts, gains, strict=True)]),
        np.concatenate([p.twist for p in parts]),
        np.concatenate([p.eve for p in parts]) + offset,
    )


def _lengthened(state: SMCState, steps: int) -> list[StepInfo]:
    """Return the history of a run with steps in which nothing happens any more.

    The counts of its last step are those before resampling, which may have kept ended particles
    alone.
    """
    last, n, done = state.history[-1], len(state.particles.length), len(state.history)
    dead = last.dead if last.ancestors is None else 0
    over = StepInfo(0, last.ess, last.log_ml, active=0, ended=n - dead, dead=dead, lanes=0)
    if last.symbols is not None:
        nothing = np.full(n, NO_SYMBOL, dtype=np.int16)
        over = over._replace(symbols=nothing, log_weights=last.log_weights)
    return [*state.history, *[over._replace(step=t) for t in range(done, steps)]]


def _step(infos: Sequence[StepInfo], sizes: Sequence[int], gains: Sequence[float]) -> StepInfo:
    """Return a step of all runs as one."""
    deaths: dict[str, int] = {}
    for name, k in (death for info in infos for death in info.deaths):
        deaths[name] = deaths.get(name, 0) + k
    moved = [info.moved for info in infos if info.moved is not None]
    mass, squares = _moments(infos, sizes, gains)
    return StepInfo(
        step=max(info.step for info in infos),
        ess=float(np.exp(2 * mass - squares)) if mass > -np.inf else 0.0,
        log_ml=float(mass - np.log(sum(sizes))),
        active=sum(info.active for info in infos),
        ended=sum(info.ended for info in infos),
        dead=sum(info.dead for info in infos),
        lanes=sum(info.lanes for info in infos),
        forced=any(info.forced for info in infos),
        deaths=tuple(deaths.items()),
        ancestors=_ancestors([info.ancestors for info in infos], sizes),
        moved=sum(moved) if moved else None,
        uncovered=max(info.uncovered for info in infos),
        rows=sum(info.rows for info in infos),
        forwards=sum(info.forwards for info in infos),
        seconds=sum(info.seconds for info in infos),
        **_record(infos, gains),
    )


def _moments(
    infos: Sequence[StepInfo], sizes: Sequence[int], gains: Sequence[float]
) -> tuple[float, float]:
    """Return the logs of the sums of all weights and of their squares after a step, nats."""
    mass = np.array([i.log_ml + g + np.log(n) for i, g, n in zip(infos, gains, sizes, strict=True)])
    with np.errstate(divide="ignore"):
        ess = np.log([info.ess for info in infos])
    squares = np.where(np.isneginf(mass), -np.inf, 2 * mass - np.where(np.isneginf(ess), 0, ess))
    return float(np.logaddexp.reduce(mass)), float(np.logaddexp.reduce(squares))


def _ancestors(chosen: Sequence[IntArray | None], sizes: Sequence[int]) -> IntArray | None:
    """Return the ancestors of all, int64[N], where a group was resampled; else None."""
    if all(c is None for c in chosen):
        return None
    groups = zip(chosen, np.cumsum([0, *sizes[:-1]]).tolist(), sizes, strict=True)
    return np.concatenate([a + (np.arange(n) if c is None else c) for c, a, n in groups])


def _record(infos: Sequence[StepInfo], gains: Sequence[float]) -> dict[str, Any]:
    """Return what a step has with `record`: the symbols and weights of all."""
    symbols = [info.symbols for info in infos if info.symbols is not None]
    weights = [info.log_weights for info in infos if info.log_weights is not None]
    if len(symbols) < len(infos) or len(weights) < len(infos):
        return {}
    raised = [w + gain for w, gain in zip(weights, gains, strict=True)]
    return {"symbols": np.concatenate(symbols), "log_weights": np.concatenate(raised)}


def particles_of(run: StagedResult) -> Weighted:
    """Return texts with log weights (nats) that sum to the marginal likelihood, and their error.

    They are the texts that were known before the last run, and its particles with other texts.
    """
    last = run.stages[-1]
    logs = last.rest().particles.log_weights - np.log(last.result.size)
    kept = np.flatnonzero(logs > -np.inf)
    texts = [last.result.texts[i] for i in kept]
    known = np.array(list(last.known.values()))
    total = np.logaddexp.reduce(np.concatenate([known, logs[kept]]))
    rest = float(np.exp(np.logaddexp.reduce(logs[kept]) - total)) if len(kept) else 0.0
    if run.search is not None and last.known:
        # What is not known is on few texts, if it is not missed.
        error = max(rest, 1 - run.search.share)
    else:
        # A run of N particles that found nothing else may have missed a share of 1 / N.
        error = rest * expected_error(texts, logs[kept]) + (1 - rest) / (last.result.size + 1)
    if total == -np.inf:
        error = 1.0
    return [*last.known, *texts], np.concatenate([known, logs[kept]]), min(error, 1.0)


def expected_error(texts: Sequence[bytes], logs: FloatArray) -> float:
    """Estimate the expected total variation of weighted texts from their law.

    As of independent draws as many as the effective sample size n: the mean of |p' - p| is
    sqrt(2 p (1 - p) / (pi n)) for a share p. To it comes 1 / (n + 1) for what was missed.

    Args:
        texts: of the draws.
        logs: float64[N], their log weights, nats.
    """
    weights = Weights(logs)
    if weights.ess == 0:
        return 1.0
    share: dict[bytes, float] = {}
    for text, w in zip(texts, weights.normalised.tolist(), strict=True):
        share[text] = share.get(text, 0.0) + w
    p = np.array(list(share.values())).clip(0, 1)
    spread = float(np.sqrt(p * (1 - p) / (2 * np.pi * weights.ess)).sum())
    return min(spread + 1 / (weights.ess + 1), 1.0)
