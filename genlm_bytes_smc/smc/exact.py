"""Exact samples of a constrained model, by rejection that remembers what it has seen.

Plain rejection draws whole texts of the model until one satisfies the constraint. Here a draw
stops at the first byte after which too little is left, and every row that was computed is kept
in a tree of prefixes with a bound on the mass below it. Later draws avoid what is known to be
dead. This is constrained adaptive rejection sampling (CARS, 2025) over bytes, for targets whose
rows sum to at most one; ASAp (Park et al. 2024, arXiv:2405.21047) remembers the same masses.

Why it is exact. Let r(x)[b] be the target's row after a prefix x, and gamma(y) the product of
the entries along a whole text y. u(x) <= 1 bounds the mass below x: 1 where nothing is known,
else the sum over b of r(x)[b] u(xb). A draw goes from x to b with probability r(x)[b] u(xb) / u(x).
If u has become smaller since it was drawn by (another draw has come by, or the row of x is new),
it goes on with probability u now / u then. The factors u cancel along the way, so a draw that
begins with bound u at the root ends with y with probability gamma(y) / u. What is accepted has
the law gamma / Z whatever is known.

`posterior` goes on in place of rejecting, and multiplies a weight by u now / u then: importance
sampling whose proposal learns from every row. The weight that a draw ends with is gamma(y) over
the probability of having drawn y, so it has the mean Z, and varies the less the more is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from genlm_bytes_smc.alphabet import EOS_COLUMN, N_SYMBOLS, contexts_of
from genlm_bytes_smc.calls import blocking
from genlm_bytes_smc.checks import check_count
from genlm_bytes_smc.smc.diagnostics import spent
from genlm_bytes_smc.smc.factors import check_alphabet, compile_rows, engines_of, random_beams
from genlm_bytes_smc.smc.loop import smc
from genlm_bytes_smc.smc.pooled import StagedResult, expected_error, particles_of
from genlm_bytes_smc.smc.resampling import FloatArray
from genlm_bytes_smc.smc.runs import AllParticlesDeadError
from genlm_bytes_smc.smc.samples import ExactSamples, LogMLBounds, Posterior, Weighted

# share of the most mass there can be from which on a posterior is read off what was seen
READ_OFF = 0.9
TREE, FEW_AT_ONCE = 0.25, 4  # share of a budget that draws have before `smc` takes over
MOST_DRAWS, PARTICLES = 1000, 32  # of draws, and of the first run of `smc`
_OVER = 1 + 1e-6  # most that a row may sum to, with rounding


async def exact_sample(
    target: Any,
    n: int,
    max_rows: int | None = None,
    max_bytes: int = 100,
    *,
    seed: int | None = None,
    at_once: int = 16,
) -> ExactSamples:
    """Draw independent texts from exactly the law that the target's rows define.

    The rows of `prune="topk"` and of any wide beam are the weights. With `prune="deferred"`
    rows are forecasts of them: `target.complete` says what a text weighs after all, and the
    ratio is an importance weight.

    Args:
        target: a potential over bytes whose rows sum to at most one: a `ByteLLM`, its product
            with constraints, powers of at least one, products of language models.
        n: how many texts.
        max_rows: no further draws begin once the language models have computed so many rows;
            then there may be fewer texts than n. None: until there are n.
        max_bytes: texts that are longer have weight zero.
        seed: of the draws; None: a new one.
        at_once: draws side by side, which share forwards.

    Returns:
        The texts, and bounds on the log marginal likelihood.

    Raises:
        TypeError: no potential.
        ValueError: a number out of range, a row that sums to more than one, or no text of
            weight.
    """
    check_alphabet(target)
    for name, value in (("n", n), ("max_bytes", max_bytes), ("at_once", at_once)):
        check_count(name, value, 1)
    if max_rows is not None:
        check_count("max_rows", max_rows, 1)
    sampler = _Sampler(target, max_bytes, seed)
    await sampler.draw(n, max_rows, at_once)
    return sampler.samples(n)


async def posterior(
    target: Any,
    budget: int = 1000,
    max_bytes: int = 100,
    *,
    draws: int | None = None,
    seed: int | None = None,
    at_once: int = 16,
) -> Posterior:
    """Estimate the law of a target from a given number of rows of the language models.

    Where beams are not random, all rows go to
    `smc(..., lookahead="auto")`, which searches for likely texts and counts those that it knows
    exactly; if these hold nine tenths of the most mass there can be, they are the result.

    Else a quarter of the rows goes to draws whose proposal learns from every row, and so do the
    others if what was seen then holds nine tenths of the most mass there can be: the law is read
    off it. Else they go to `smc(..., lookahead="auto")`, and of both, the result is what has the
    smaller expected error; `Posterior.source` says which.

    Args:
        target: as for `exact_sample`.
        budget: no further draws begin once the language models have computed so many rows; those
            under way are finished.
        max_bytes: texts that are longer have weight zero.
        draws: make at most so many draws and nothing else. None: see above.
        seed: of the draws; None: a new one.
        at_once: draws side by side, which share forwards.

    Raises:
        TypeError, ValueError: as for `exact_sample`.
    """
    check_alphabet(target)
    numbers = {"budget": budget, "max_bytes": max_bytes, "at_once": at_once}
    for name, value in numbers.items():
        check_count(name, value, 1)
    if draws is not None:
        check_count("draws", draws, 1)
    sampler = _Sampler(target, max_bytes, seed, reject=False)
    if draws is not None:
        await sampler.draw(draws, budget, at_once)
        return sampler.posterior()
    if not random_beams(sampler.leaves):
        run = await _staged(target, max_bytes, budget, sampler.new_seed())
        if run is not None and run.search is not None:
            bounds = _bounds(*np.exp([run.search.low, run.search.high]).tolist())
            return _posterior([], dict(run.stages[-1].known), sampler.spent, bounds, run)
    few = min(at_once, FEW_AT_ONCE)  # or those under way would take the others' rows
    await sampler.draw(MOST_DRAWS, max(1, int(TREE * budget)), few)
    left = budget - sampler.spent
    if left <= 0:
        return sampler.posterior()
    low, high = sampler.mass
    if low >= READ_OFF * high:
        await sampler.draw(MOST_DRAWS, left, at_once)
        return sampler.posterior()
    return sampler.posterior(await _staged(target, max_bytes, left, sampler.new_seed()))


async def _staged(target: Any, max_bytes: int, budget: int, seed: int) -> StagedResult | None:
    """Run `smc` in stages; None where all die, or a target that it does not take."""
    size = min(PARTICLES, max(budget // 8, 1))
    try:
        found = await smc(
            target, size, max_bytes=max_bytes, lookahead="auto", budget=budget, seed=seed,
            progress=False,
        )  # fmt: skip
    except (AllParticlesDeadError, ValueError):
        return None
    assert isinstance(found, StagedResult)
    return found


@dataclass(eq=False)
class Prefix:
    """A text whose row is known.

    Attributes:
        text: its bytes.
        row: float64[257], what the target gives to each symbol after it.
        upper, lower: float64[257], bounds on the mass below each symbol, over the row's entry.
        above: the prefix one byte shorter; None at the root.
        after: the prefixes one byte longer that are known, by byte.
    """

    text: bytes
    row: FloatArray
    above: Prefix | None
    after: dict[int, Prefix] = field(default_factory=dict)
    upper: FloatArray = field(init=False)
    lower: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        self.upper = np.ones(N_SYMBOLS)
        self.lower = np.zeros(N_SYMBOLS)
        self.lower[EOS_COLUMN] = 1.0

    @property
    def bound(self) -> float:
        """Most mass that is below, over the mass that led here."""
        return float(self.row @ self.upper)

    def tell(self) -> None:
        """Tell the prefixes above what is known here."""
        here = self
        while here.above is not None:
            byte = here.text[-1]
            here.above.upper[byte] = here.row @ here.upper
            here.above.lower[byte] = here.row @ here.lower
            here = here.above


@dataclass
class Draw:
    """A draw under way.

    Attributes:
        at: the prefix it has come to; None before its row is known.
        text: its bytes.
        above: the last prefix with a known row that it came through.
        promised: the bound on the mass below that it was drawn by.
        begun: the bound at the root when it began.
        weight: gamma of the text over the probability of having drawn it, where none is rejected.
    """

    at: Prefix | None
    text: bytes
    above: Prefix
    promised: float
    begun: float
    weight: float


class _Sampler:
    """The tree of known prefixes, and the draws that were made.

    Args:
        target, max_bytes, seed: see `exact_sample`.
        reject: give up draws at random where bounds have shrunk; else weigh them.
    """

    def __init__(
        self, target: Any, max_bytes: int, seed: int | None, *, reject: bool = True
    ) -> None:
        self._target, self._max_bytes, self._reject = target, max_bytes, reject
        self._rng = np.random.default_rng(seed)
        self._finished: list[Draw] = []  # of weight 0 if nothing came of it
        self._accepted = 0
        self.leaves: list[Any] = []
        compile_rows(target, self.leaves)
        self._engines = engines_of(self.leaves)
        self._start = spent(self._engines)[0]
        self._root: Prefix | None = None

    @property
    def spent(self) -> int:
        """Rows that were computed since this was made."""
        return spent(self._engines)[0] - self._start

    @property
    def mass(self) -> tuple[float, float]:
        """Bounds on the mass of all texts."""
        assert self._root is not None
        return float(self._root.row @ self._root.lower), self._root.bound

    def new_seed(self) -> int:
        """Return a seed for other draws."""
        return int(self._rng.integers(2**32))

    async def draw(self, wanted: int, budget: int | None, at_once: int) -> None:
        """Draw until there are so many texts, or rows are used up.

        Where none are rejected, until so many draws have been made; one is made in any case.
        """
        before, begun, going = self.spent, 0, list[Draw]()
        if self._root is None:
            await self._know({b"": None})
        assert self._root is not None
        while self._root.bound > 0 and not (self._reject and self._accepted >= wanted):
            over = budget is not None and self.spent - before >= budget
            if not over or not (self._reject or begun):
                due = wanted - (self._accepted + len(going) if self._reject else begun)
                new = max(min(at_once - len(going), due), 0)
                root, bound = self._root, self._root.bound
                going += [Draw(root, b"", root, bound, bound, bound) for _ in range(new)]
                begun += new
            if not going:
                break
            going = await self._advance(going)

    def samples(self, n: int) -> ExactSamples:
        """Return the first n texts that were accepted, and what they tell.

        Raises:
            ValueError: there is no text of weight.
        """
        low, high = self.mass
        if high <= 0:
            raise ValueError("the target has no text of weight of at most max_bytes bytes")
        texts = [d.text for d in self._finished if d.weight > 0][:n]
        begun = [d.begun if d.weight > 0 else 0.0 for d in self._finished]
        return ExactSamples(texts, begun, self.spent, _bounds(low, high))

    def posterior(self, run: StagedResult | None = None) -> Posterior:
        """Return what the draws, or another run that was made after them, found."""
        if run is None and not any(d.weight > 0 for d in self._finished):
            raise ValueError("no text of weight was found: a larger budget may help")
        return _posterior(self._finished, self._seen(), self.spent, _bounds(*self.mass), run)

    def _seen(self) -> dict[bytes, float]:
        """Return the log weights of all texts whose weight is known, nats."""
        assert self._root is not None
        found, stack = dict[bytes, float](), [(self._root, 0.0)]
        while stack:
            prefix, logw = stack.pop()
            if prefix.row[EOS_COLUMN] > 0:
                found[prefix.text] = logw + float(np.log(prefix.row[EOS_COLUMN]))
            stack += [
                (below, logw + float(np.log(prefix.row[byte])))
                for byte, below in prefix.after.items()
            ]
        return found

    async def _advance(self, draws: list[Draw]) -> list[Draw]:
        """Go on with each draw to the next prefix whose row is not known, or to its end."""
        waiting = {d.text: d.above for d in draws if d.at is None}
        await self._know({t: above for t, above in waiting.items() if t[-1] not in above.after})
        for draw in draws:
            if draw.at is None:
                draw.at = draw.above.after[draw.text[-1]]
        return [draw for draw in draws if self._walk(draw)]

    def _walk(self, draw: Draw) -> bool:
        """Walk through known prefixes; return whether the draw now waits for a row."""
        while draw.at is not None:
            here, bound = draw.at, draw.at.bound
            gone = self._reject and self._rng.random() * draw.promised >= bound
            draw.weight *= bound / draw.promised
            if bound <= 0 or gone:
                draw.weight = 0.0
                self._finished.append(draw)
                return False
            mass = here.row * here.upper
            symbol = int(self._rng.choice(N_SYMBOLS, p=mass / mass.sum()))
            if symbol == EOS_COLUMN:
                self._accepted += 1
                self._finished.append(draw)
                return False
            draw.promised = float(here.upper[symbol])
            draw.text, draw.above = here.text + bytes([symbol]), here
            draw.at = here.after.get(symbol)
        return True

    async def _know(self, asked: Mapping[bytes, Prefix | None]) -> None:
        """Compute the rows of texts, and note them in the tree below the prefixes above them."""
        if not asked:
            return
        lazy = await self._target.batch_logw_next(contexts_of(asked))
        weights = lazy.weights.cpu().numpy() if hasattr(lazy.weights, "cpu") else lazy.weights
        rows = np.exp(np.array(weights, dtype=np.float64))
        for (text, above), row in zip(asked.items(), rows, strict=True):
            if len(text) >= self._max_bytes:
                row[:EOS_COLUMN] = 0.0
            if not row.sum() <= _OVER:
                raise ValueError(
                    f"exact_sample needs rows that sum to at most one, got {row.sum():.6g} "
                    f"after {text!r}"
                )
            prefix = Prefix(text, row, above)
            if above is None:
                self._root = prefix
            else:
                above.after[text[-1]] = prefix
            prefix.tell()


def _bounds(low: float, high: float) -> LogMLBounds:
    """Return bounds on a mass that hold for sure as those of its log."""
    with np.errstate(divide="ignore"):
        logs = np.log([low, high])
    return LogMLBounds(float(logs[0]), float(logs[1]), 1.0)


def _posterior(
    finished: Sequence[Draw],
    seen: dict[bytes, float],
    rows: int,
    bounds: LogMLBounds,
    run: StagedResult | None,
) -> Posterior:
    """Return what is best among texts that were seen, draws, and particles of a run."""
    texts = [d.text for d in finished]
    with np.errstate(divide="ignore"):
        draws = np.log(np.array([d.weight for d in finished]))
    found = dict[str, Weighted]()
    if bounds.low >= bounds.high + np.log(READ_OFF):
        error = float(-np.expm1(bounds.low - bounds.high))
        found["seen"] = list(seen), np.array(list(seen.values())), error
    elif finished:
        found["draws"] = texts, draws, expected_error(texts, draws)
    if run is not None:
        found["particles"] = particles_of(run)
    return Posterior(found, draws, seen, rows, bounds)


exact_sample_sync = blocking(exact_sample)
posterior_sync = blocking(posterior)
