"""The stages of `smc(..., lookahead="auto")`: rows that they have seen, and their pooled result.

A run computes the rows of every text that a particle comes to. `Recorder` is a weigher that
changes no weight and notes them in `Seen`, so that a later run can look ahead along them.

Runs of one target are pooled by shares that sum to one. Let run k have N_k particles, the
estimate Z_k and the share a_k, and N = N_1 + N_2 + ... . With its
weights times a_k N / N_k, the mean weight of all N particles is a_1 Z_1 + a_2 Z_2 + ... . It has
the mean Z if E[Z_k | the runs before k] = Z and the shares sum to one, where a_k may depend on
the runs before k but not on run k itself: each a_k (Z_k - Z) then has the mean zero.
What is pooled is a run like another, of N particles of which each group is resampled by itself.

Where a text's weight is the sum of the rows along it, the texts S_k that are known before run k
need no draws. In place of Z_k stands

    (total weight of S_k) + (mean weight of the particles of run k whose text is not in S_k),

which has the same mean and varies less: only what was not known is estimated. The known texts
come in as further particles, one each, and particles of run k with such a text weigh nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from genlm_bytes_smc.alphabet import EOS_COLUMN, N_SYMBOLS
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc.factors import has_language_model
from genlm_bytes_smc.smc.particles import NO_SYMBOL, Particles, SMCState, StepInfo
from genlm_bytes_smc.smc.plan import Plan
from genlm_bytes_smc.smc.resampling import FloatArray, IntArray
from genlm_bytes_smc.smc.result import SMCResult
from genlm_bytes_smc.smc.weighers import Reads, Weigher

GAPE_NATS, GAPE_ERRORS = 2.0, 4.0  # between log evidences, from which on the summary warns


def weights_are_sums(leaves: Sequence[Any]) -> bool:
    """Return whether a whole text weighs what the rows along it sum up to, without a critic."""
    models = [leaf for leaf in leaves if has_language_model(leaf)]
    return all(isinstance(m, ByteLLM) and m.params.prune == "topk" for m in models)


class SeenRows(NamedTuple):
    """What is known of V texts; each comes after all that are shorter, its beginnings included.

    Attributes:
        texts: V distinct texts, by length.
        parent: int64[V], the text that is one byte shorter; -1 of the empty text.
        target: float64[V, 257], the target's log weight of each symbol after it, nats.
        visits: float64[V, 2], how many particles with even and with odd numbers came to it.
        final: texts that ended without a symbol for it (`terminate_when`).
    """

    texts: list[bytes]
    parent: IntArray
    target: FloatArray
    visits: FloatArray
    final: frozenset[bytes]

    def levels(self) -> list[IntArray]:
        """Return the places of the texts of 0, 1, 2, ... bytes."""
        length = np.array([len(text) for text in self.texts], dtype=np.int64)
        return [np.flatnonzero(length == k) for k in range(int(length.max(initial=-1)) + 1)]

    def whole(self) -> dict[bytes, float]:
        """Return the log weight of every whole text whose rows are all known, nats.

        It is the sum of the target's entries along the text and at its end.
        """
        logw = np.zeros(len(self.texts))
        byte = np.array([text[-1] if text else 0 for text in self.texts], dtype=np.int64)
        for nodes in self.levels()[1:]:
            above = self.parent[nodes]
            logw[nodes] = logw[above] + self.target[above, byte[nodes]]
        number = {text: i for i, text in enumerate(self.texts)}
        found = {
            text: float(logw[number[text[:-1]]] + self.target[number[text[:-1]], text[-1]])
            for text in self.final
        }
        ends = logw + self.target[:, EOS_COLUMN]
        for i in np.flatnonzero(np.isfinite(ends)):
            found.setdefault(self.texts[i], float(ends[i]))
        return found


class Seen:
    """A growing store of rows, by text."""

    def __init__(self) -> None:
        self._rows: dict[bytes, tuple[FloatArray, FloatArray]] = {}  # and visits, see `SeenRows`
        self._final: set[bytes] = set()

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self._rows)

    def add(self, texts: Sequence[bytes], target: FloatArray, visits: FloatArray) -> None:
        """Store the rows of texts, and count the visits of those that are known already.

        Args:
            texts: n of them.
            target, visits: see `SeenRows`.
        """
        for text, row, count in zip(texts, target, visits, strict=True):
            known, before = self._rows.get(text, (row, 0.0))
            self._rows[text] = known, before + count

    def end(self, texts: Iterable[bytes]) -> None:
        """Note texts that ended without a symbol for it."""
        self._final.update(texts)

    def rows(self) -> SeenRows:
        """Return what is stored."""
        texts = sorted(self._rows, key=lambda text: (len(text), text))
        number = {text: i for i, text in enumerate(texts)}
        parent = [number.get(text[:-1], -1) if text else -1 for text in texts]
        return SeenRows(
            texts,
            np.array(parent, dtype=np.int64),
            np.array([self._rows[text][0] for text in texts]).reshape(-1, N_SYMBOLS),
            np.array([self._rows[text][1] for text in texts]).reshape(-1, 2),
            frozenset(self._final),
        )


class Recorder(Weigher):
    """A weigher that stores the rows that particles were drawn from, and weighs nothing.

    Args:
        seen: the store.
        plan: of the run.
    """

    def __init__(self, seen: Seen, plan: Plan) -> None:
        self._seen, self._max_bytes = seen, plan.max_bytes

    async def weigh(self, particles: Particles, reads: Reads) -> Particles:
        """See `Weigher`; the particles come back as they are."""
        at = np.flatnonzero(reads.lane_of >= 0)
        lanes, first = np.unique(reads.lane_of[at], return_index=True)
        if not len(lanes):
            return particles
        before = reads.count - 1
        texts = [row[:before].tobytes() for row in particles.text[at[first]]]
        target = reads.rows.target.double().cpu().numpy()[lanes]
        if before >= self._max_bytes:
            target[:, :EOS_COLUMN] = -np.inf
        visits = np.zeros((reads.rows.target.shape[0], 2))
        np.add.at(visits, (reads.lane_of[at], at % 2), 1.0)
        self._seen.add(texts, target, visits[lanes])
        stopped = np.flatnonzero(particles.ended[at] & (reads.symbols[at] != EOS_COLUMN))
        self._seen.end(particles.distinct(at[stopped])[0])
        return particles


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

    Attributes:
        stages, search: the same.
        gap: by how much the log evidences of the first run and of the last one differ, nats.
    """

    def __init__(self, stages: Sequence[Stage], search: Found | None = None) -> None:
        self.search = search
        rests, shares = [s.rest() for s in stages], [s.share for s in stages]
        self._variance = _log_variance(rests, shares)
        known = _known(stages)
        if known is not None:
            rests, shares = [*rests, known], [*shares, 1.0]
        super().__init__(pooled(rests, shares))
        self.stages = tuple(stages)

    @property
    def ml_relative_variance(self) -> float:
        """The same of `log_ml`, from the genealogy of each run; what was known has none."""
        return float(np.exp(self._variance - 2 * self.log_ml)) if self.log_ml > -np.inf else np.nan

    @property
    def rows(self) -> int:
        """Rows that the language models computed."""
        searched = 0 if self.search is None else self.search.rows
        return searched + sum(stage.rows for stage in self.stages)

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
    block = np.zeros((n, int(length.max(initial=0))), dtype=np.uint8)
    for row, text in zip(block, texts, strict=True):
        row[: len(text)] = np.frombuffer(text, dtype=np.uint8)
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
    """Return runs as one.

    Args:
        states: of the runs, all over.
        shares: of each, summing to one.
    """
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
