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

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.alphabet import EOS_COLUMN, N_SYMBOLS
from genlm_bytes_smc.calls import blocking
from genlm_bytes_smc.checks import check_count
from genlm_bytes_smc.smc.factors import check_alphabet, compile_rows, engines_of, random_beams
from genlm_bytes_smc.smc.loop import smc
from genlm_bytes_smc.smc.pooled import StagedResult
from genlm_bytes_smc.smc.prefixes import READ_OFF, Draw, ExactSamples, Posterior, Prefix
from genlm_bytes_smc.smc.runs import AllParticlesDeadError

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
    return await _Sampler(target, max_bytes, np.random.default_rng(seed)).run(n, max_rows, at_once)


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
    sampler = _Sampler(target, max_bytes, np.random.default_rng(seed), reject=False)
    if draws is not None:
        await sampler.weighted(draws, budget, at_once)
        return sampler.posterior(None)
    if not random_beams(sampler.leaves):
        run = await _staged(target, max_bytes, budget, sampler.new_seed())
        if run is not None and run.search is not None:
            low, high = np.exp([run.search.low, run.search.high]).tolist()
            return Posterior([], dict(run.stages[-1].known), sampler.spent, low, high, run)
    few = min(at_once, FEW_AT_ONCE)  # or those under way would take the others' rows
    await sampler.weighted(MOST_DRAWS, max(1, int(TREE * budget)), few)
    left = budget - sampler.spent
    if left <= 0:
        return sampler.posterior(None)
    if sampler.nearly_known:
        await sampler.weighted(MOST_DRAWS, left, at_once)
        return sampler.posterior(None)
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


class _Sampler:
    """The tree of known prefixes, and the draws that are under way.

    Args:
        target, max_bytes, rng: see `exact_sample`.
        reject: give up draws at random where bounds have shrunk; else weigh them.
    """

    def __init__(
        self, target: Any, max_bytes: int, rng: np.random.Generator, *, reject: bool = True
    ) -> None:
        self._target, self._max_bytes, self._rng = target, max_bytes, rng
        self._reject = reject
        self._finished: list[Draw] = []
        self.leaves: list[Any] = []
        compile_rows(target, self.leaves)
        self._engines = engines_of(self.leaves)
        self._start = self._rows()
        self._root: Prefix | None = None
        self._accepted: list[float] = []  # bound at the start of each finished draw, or 0
        self._texts: list[bytes] = []

    def _rows(self) -> int:
        return sum(e.counts.rows for e in self._engines)

    async def run(self, n: int, max_rows: int | None, at_once: int) -> ExactSamples:
        """Draw until there are n texts, or rows are used up."""
        before = self._rows()
        (self._root,) = await self._know([(b"", None)])
        going: list[Draw] = []
        while len(self._texts) < n:
            spent = max_rows is not None and self._rows() - before >= max_rows
            if self._root.bound <= 0:
                break
            while not spent and len(going) < min(at_once, n - len(self._texts)):
                going.append(self._begin())
            if not going:
                break
            going = await self._advance(going)
        low = float(self._root.row @ self._root.lower)
        if self._root.bound <= 0:
            raise ValueError("the target has no text of weight of at most max_bytes bytes")
        estimate = float(np.mean(self._accepted)) if self._accepted else np.nan
        draws, rows = len(self._accepted), self._rows() - before
        return ExactSamples(self._texts[:n], estimate, draws, rows, low, self._root.bound)

    @property
    def spent(self) -> int:
        """Rows that were computed since this was made."""
        return self._rows() - self._start

    @property
    def nearly_known(self) -> bool:
        """Whether what was seen holds nine tenths of the most mass there can be."""
        assert self._root is not None
        return bool(self._root.row @ self._root.lower >= READ_OFF * self._root.bound)

    def new_seed(self) -> int:
        """Return a seed for other draws."""
        return int(self._rng.integers(2**32))

    async def weighted(self, draws: int, budget: int, at_once: int) -> None:
        """Draw until there are so many more draws, or rows are used up."""
        before = self._rows()
        if self._root is None:
            (self._root,) = await self._know([(b"", None)])
        going: list[Draw] = []
        begun = 0
        while self._root.bound > 0:
            spent = begun > 0 and self._rows() - before >= budget
            while not spent and begun < draws and len(going) < at_once:
                going.append(self._begin())
                begun += 1
            if not going:
                break
            going = await self._advance(going)

    def posterior(self, run: StagedResult | None) -> Posterior:
        """Return what the draws, or another run that was made after them, found."""
        if run is None and not any(d.weight > 0 for d in self._finished):
            raise ValueError("no text of weight was found: a larger budget may help")
        assert self._root is not None
        low, high = float(self._root.row @ self._root.lower), self._root.bound
        return Posterior(self._finished, self._seen(), self.spent, low, high, run)

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

    def _begin(self) -> Draw:
        assert self._root is not None
        bound = self._root.bound
        return Draw(self._root, b"", None, bound, bound, bound)

    async def _advance(self, draws: list[Draw]) -> list[Draw]:
        """Go on with each draw to the next prefix whose row is not known, or to its end."""
        fresh = {d.text: (d.text, d.above) for d in draws if d.at is None and self._lacks(d)}
        await self._know(list(fresh.values()))
        waiting = []
        for draw in draws:
            if draw.at is None:
                assert draw.above is not None
                draw.at = draw.above.after[draw.text[-1]]
            if self._walk(draw):
                waiting.append(draw)
        return waiting

    def _lacks(self, draw: Draw) -> bool:
        return draw.above is not None and draw.text[-1] not in draw.above.after

    def _walk(self, draw: Draw) -> bool:
        """Walk through known prefixes; return whether the draw now waits for a row."""
        while draw.at is not None:
            here, bound = draw.at, draw.at.bound
            gone = self._reject and self._rng.random() * draw.promised >= bound
            draw.weight *= bound / draw.promised
            if bound <= 0 or gone:
                return self._finish(draw, 0.0)
            mass = here.row * here.upper
            symbol = int(self._rng.choice(N_SYMBOLS, p=mass / mass.sum()))
            if symbol == EOS_COLUMN:
                self._texts.append(here.text)
                return self._finish(draw, draw.weight)
            draw.promised = float(here.upper[symbol])
            draw.text, draw.above = here.text + bytes([symbol]), here
            draw.at = here.after.get(symbol)
        return True

    def _finish(self, draw: Draw, weight: float) -> bool:
        """Note how a draw ended: its weight, and whether it was accepted. Return False."""
        self._accepted.append(draw.begun if weight > 0 else 0.0)
        draw.weight = weight
        self._finished.append(draw)
        return False

    async def _know(self, asked: Sequence[tuple[bytes, Prefix | None]]) -> list[Prefix]:
        """Compute the rows of prefixes, and note them in the tree."""
        if not asked:
            return []
        lazy = await self._target.batch_logw_next([[bytes([b]) for b in t] for t, _ in asked])
        rows = np.exp(_as_array(lazy.weights))
        known = []
        for (text, above), row in zip(asked, rows, strict=True):
            if len(text) >= self._max_bytes:
                row[:EOS_COLUMN] = 0.0
            if not row.sum() <= _OVER:
                raise ValueError(
                    f"exact_sample needs rows that sum to at most one, got {row.sum():.6g} "
                    f"after {text!r}"
                )
            prefix = Prefix(text, row, above)
            if above is not None:
                above.after[text[-1]] = prefix
            prefix.tell()
            known.append(prefix)
        return known


def _as_array(weights: Any) -> npt.NDArray[np.float64]:
    values = weights.cpu().numpy() if hasattr(weights, "cpu") else np.asarray(weights)
    return np.array(values, dtype=np.float64)


exact_sample_sync = blocking(exact_sample)
posterior_sync = blocking(posterior)
