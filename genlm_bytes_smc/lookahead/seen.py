"""A look-ahead along the texts that earlier runs have seen.

For a text x whose row r(x) of the target is known, psi is summed up from the rows below it,

    psi(x) = r(x)[end] + sum over bytes b of  r(x)[b] psi(x b),

and for a text that no run has come to it is a guess: the table of a `Lookahead` that was learned
from the same rows, or without an automaton the mean by length. Where everything below x is known,
psi(x) is exactly the target's mass below x. This is the tree of `smc.exact` with guesses in the
place of its bound of 1.

The guesses are held back as far as the runs disagree with them. Each half of the particles
teaches a table, which says psi for the texts that only the other half has come to; there the
other half's sums are the better knowledge. A line is fitted to both in log space,

    log psi(x) = c_t + beta log guess(x),   0 <= beta <= 1,   t the length of x.

beta is near 1 if the guesses tell good texts from bad ones and 0 if they do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch

from genlm_bytes_smc.alphabet import EOS_COLUMN, N_BYTES, N_SYMBOLS
from genlm_bytes_smc.constraints import ConstraintError
from genlm_bytes_smc.constraints.learning import MAX_STATES
from genlm_bytes_smc.lookahead.future_mass import TableFactor, finite
from genlm_bytes_smc.lookahead.lookahead import Lookahead, automata_of, longest
from genlm_bytes_smc.lookahead.ngram import ByteNgram, edge_means, places, soft_counts_of
from genlm_bytes_smc.smc.particles import BoolArray
from genlm_bytes_smc.smc.resampling import FloatArray, IntArray
from genlm_bytes_smc.smc.weighers import Ahead, AheadLanes, SeenRows

DEFENSIVE = 0.02  # share of the target's own row in the proposals of runs that look ahead
_ORDER = 3  # of the contexts of averages: two bytes
_PRIOR = 8.0  # texts that a line's slope 1, and the mean intercept of all lengths, count as


class Line(NamedTuple):
    """How guesses are turned into log psi.

    Attributes:
        slope: beta.
        intercept: float64[T + 1], c_t; the last one stands for all longer texts.
    """

    slope: float
    intercept: FloatArray

    def __call__(self, guess: torch.Tensor, age: int) -> torch.Tensor:
        """Return log psi of texts of `age` bytes; impossible ones stay so."""
        at = float(self.intercept[min(age, len(self.intercept) - 1)])
        return torch.where(torch.isneginf(guess), guess, at + self.slope * guess)


AS_IT_IS = Line(1.0, np.zeros(1))


class Solved(NamedTuple):
    """Sums over the texts that were seen.

    Attributes:
        value: float64[V], log psi of each text.
        after: float64[V, 257], log psi after each symbol; 0 after the end.
        guess: float64[V], what was guessed for the text itself.
        codes, child: int64[C], the texts that follow others: 256 * parent + byte, ascending,
            and which text that is.
        lanes, place: the guesses at the texts of each length, and the place of each text among
            those of its length, int64[V].
    """

    value: FloatArray
    after: FloatArray
    guess: FloatArray
    codes: IntArray
    child: IntArray
    lanes: list[AheadLanes]
    place: IntArray


async def solve(
    seen: SeenRows,
    root: AheadLanes,
    line: Line = AS_IT_IS,
    known: BoolArray | None = None,
    *,
    rest: bool = False,
) -> Solved:
    """Sum psi up from the longest texts to the empty one.

    Args:
        seen: the rows.
        root, line: the guesses at the empty text (D = 1), and what is made of them.
        known: bool[V], the texts whose rows are used; the others are guessed (None: all are).
        rest: leave out whole texts whose weight is known.
    """
    levels = seen.levels()
    byte = np.array([text[-1] if text else 0 for text in seen.texts], dtype=np.int64)
    after, guess = np.empty((len(seen.texts), N_SYMBOLS)), np.empty(len(seen.texts))
    lanes, place = root, np.zeros(len(seen.texts), dtype=np.int64)
    all_lanes = list[AheadLanes]()
    for t, nodes in enumerate(levels):
        if t > 0:
            moved, _ = await lanes.gather(place[seen.parent[nodes]]).step(byte[nodes])
            assert isinstance(moved, AheadLanes)
            lanes = moved
        all_lanes.append(lanes)
        place[nodes] = np.arange(len(nodes))
        guess[nodes] = lanes.value.cpu().numpy()
        after[nodes] = (await guesses_after(lanes, line, t)).numpy()
    number = {text: i for i, text in enumerate(seen.texts)}
    for text in seen.final:
        if text[:-1] in number:
            after[number[text[:-1]], text[-1]] = 0.0 if not rest else -np.inf
    if rest:
        after[:, EOS_COLUMN] = -np.inf
    value = np.full(len(seen.texts), -np.inf)
    for nodes in reversed(levels):
        value[nodes] = np.logaddexp.reduce(seen.target[nodes] + after[nodes], axis=1)
        used = nodes if known is None else nodes[known[nodes]]
        used = used[seen.parent[used] >= 0]
        after[seen.parent[used], byte[used]] = value[used]
    below = np.flatnonzero(seen.parent >= 0)
    codes = seen.parent[below] * N_BYTES + byte[below]
    order = np.argsort(codes)
    return Solved(value, after, guess, codes[order], below[order], all_lanes, place)


async def guesses_after(lanes: AheadLanes, line: Line, age: int) -> torch.Tensor:
    """Return guessed log psi after each symbol of texts of `age` bytes: float64[D, 257]."""
    out = line((await lanes.rows()).cpu() + finite(lanes.value.cpu())[:, None], age + 1)
    out[:, EOS_COLUMN] = 0.0
    return out


class MeanLanes(AheadLanes):
    """Guesses that depend on the length of a text alone.

    Args:
        log_mean: float64[T], log psi by length; the last one stands for all longer texts.
        size: number of texts, D.
        age: their length.
    """

    def __init__(self, log_mean: FloatArray, size: int, age: int = 0) -> None:
        self._log_mean, self._age = log_mean, age
        self.value = torch.full((size,), self._at(age), dtype=torch.float64)

    def _at(self, age: int) -> float:
        return float(self._log_mean[min(age, len(self._log_mean) - 1)])

    async def rows(self) -> torch.Tensor:
        """See `Lanes`."""
        rows = self.value.new_full((len(self.value), N_SYMBOLS), self._at(self._age + 1))
        rows[:, EOS_COLUMN] = 0.0
        return rows - self.value[:, None]

    async def step(self, symbols: IntArray) -> tuple[MeanLanes, None]:
        """See `Lanes`."""
        return MeanLanes(self._log_mean, len(symbols), self._age + 1), None

    def gather(self, lanes: IntArray) -> MeanLanes:
        """See `Lanes`."""
        return MeanLanes(self._log_mean, len(lanes), self._age)


def mean_guesses(seen: SeenRows) -> FloatArray:
    """Return log psi by length, from the rows averaged over the particles of each length.

    With the mean mass e_t of the end and g_t of all bytes, psi_t = e_t + g_t psi_(t+1).
    """
    rows, levels = np.exp(seen.target), seen.levels()
    psi, out = 1.0, np.zeros(len(levels))
    for t in reversed(range(len(levels))):
        count = seen.visits[levels[t]].sum(axis=1)
        mean = count @ rows[levels[t]] / max(count.sum(), 1.0)
        psi = mean[EOS_COLUMN] + mean[:EOS_COLUMN].sum() * psi
        out[t] = np.log(max(psi, np.finfo(float).tiny))
    return out


class SeenLanes(AheadLanes):
    """`SeenLookahead` at D texts.

    Args:
        solved: the sums.
        line: what is made of guesses.
        node: int64[D], the place of each text among those seen, -1 of others.
        guesses: at the same texts.
        age: their length.
    """

    def __init__(
        self, solved: Solved, line: Line, node: IntArray, guesses: AheadLanes, age: int
    ) -> None:
        self._solved, self._line, self._node = solved, line, node
        self._guesses, self._age = guesses, age
        self._known = torch.from_numpy(node >= 0)
        seen = torch.from_numpy(solved.value[node])
        self.value = torch.where(self._known, seen, line(guesses.value.cpu(), age))

    async def rows(self) -> torch.Tensor:
        """See `Lanes`."""
        after = torch.from_numpy(self._solved.after[self._node])
        if not self._known.all():
            guessed = await guesses_after(self._guesses, self._line, self._age)
            after = torch.where(self._known[:, None], after, guessed)
        return after - finite(self.value)[:, None]

    async def step(self, symbols: IntArray) -> tuple[SeenLanes, None]:
        """See `Lanes`."""
        guesses, _ = await self._guesses.step(symbols)
        assert isinstance(guesses, AheadLanes)
        codes = np.where(self._node >= 0, self._node * N_BYTES + symbols, -1)
        node = np.append(self._solved.child, -1)[places(self._solved.codes, codes)]
        return SeenLanes(self._solved, self._line, node, guesses, self._age + 1), None

    def gather(self, lanes: IntArray) -> SeenLanes:
        """See `Lanes`."""
        guesses = self._guesses.gather(lanes)
        assert isinstance(guesses, AheadLanes)
        return SeenLanes(self._solved, self._line, self._node[lanes], guesses, self._age)


class SeenLookahead(Ahead):
    """A look-ahead that knows what earlier runs saw, and guesses the rest.

    Args:
        seen: rows of earlier runs of the same target.
        settings: of the tables (`settings_of`); None: there is no automaton to look along.
        rest: look ahead to what is not known alone, not to whole texts whose weight is known.

    Attributes:
        line: how far the guesses are trusted; set by `start`.
    """

    strength, defensive = 1.0, DEFENSIVE

    def __init__(
        self, seen: SeenRows, settings: dict[str, Any] | None, *, rest: bool = False
    ) -> None:
        self.seen, self._settings, self._rest = seen, settings, rest
        self.line = AS_IT_IS
        self._first: SeenLanes | None = None

    async def start(
        self, target: Any, leaves: Sequence[Any], max_bytes: int, *, terminated: bool = False
    ) -> AheadLanes:
        """See `Ahead`; `settings_of` knows of `terminated`."""
        if self._first is None:
            seen, about = self.seen, (target, leaves, max_bytes, self._settings)
            every = np.ones(len(seen.texts), dtype=bool)
            root = await guesses_of(seen, every, *about)
            if isinstance(root, TableFactor) and not self._rest:
                halves = [seen.visits[:, h] > 0 for h in (0, 1)]
                fits = [half if half.any() else every for half in halves]
                roots = [await guesses_of(seen, fit, *about) for fit in fits]
                self.line = await fitted_line(seen, roots)
            solved = await solve(seen, root, self.line, rest=self._rest)
            self._first = SeenLanes(solved, self.line, np.zeros(1, dtype=np.int64), root, 0)
        return self._first


def settings_of(target: Any, seen: SeenRows, *, terminated: bool) -> dict[str, Any] | None:
    """Return the settings of tables for a target; None where there is nothing to look along.

    An automaton that approximates a grammar or a schema is explored first where the texts seen
    pass, and takes seconds: it is made once. Beside a weighted automaton the deterministic one is
    followed, as an approximation. `terminated` says whether `terminate_when` ends texts.
    """
    texts = longest(seen.texts)
    try:
        dfa, wfsa, approximate = automata_of(target, None, MAX_STATES, texts)
    except (ConstraintError, ValueError):
        return None
    if dfa is None:
        return None
    if terminated:  # it need not be where the automaton may end, so nothing is impossible
        return {"constraint": dfa, "ends": "accept"}
    return {"constraint": dfa} if approximate or wfsa is not None else {}


async def fitted_line(seen: SeenRows, roots: Sequence[AheadLanes]) -> Line:
    """Fit the line between the guesses of each half, the even one first, and the other's sums."""
    halves = [await solve(seen, root, known=seen.visits[:, h] > 0) for h, root in enumerate(roots)]
    length = np.array([len(text) for text in seen.texts])
    found = []
    for h, mine in enumerate(halves):
        value = halves[1 - h].value
        apart = (seen.visits[:, h] == 0) & (seen.visits[:, 1 - h] > 0)
        at = np.flatnonzero(apart & np.isfinite(mine.guess) & np.isfinite(value))
        found.append((mine.guess[at], value[at], length[at]))
    return line_of(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))


def line_of(guess: FloatArray, value: FloatArray, length: IntArray) -> Line:
    """Return the line of least squares within each length, drawn towards the slope 1.

    Args:
        guess, value: float64[n], log psi as guessed and as summed up.
        length: int64[n], of the texts.
    """
    if not len(guess):
        return AS_IT_IS
    count = np.maximum(np.bincount(length), 1.0)
    x = guess - (np.bincount(length, guess) / count)[length]
    y = value - (np.bincount(length, value) / count)[length]
    spread = float(x @ x) / len(x) * _PRIOR
    slope = 1.0 if spread == 0 else float((x @ y + spread) / (x @ x + spread))
    slope = min(max(slope, 0.0), 1.0)
    rest = value - slope * guess
    number = np.bincount(length)
    means = np.bincount(length, rest) + _PRIOR * rest.mean()
    return Line(slope, np.append(means / (number + _PRIOR), rest.mean()))


async def guesses_of(
    seen: SeenRows,
    which: BoolArray,
    target: Any,
    leaves: Sequence[Any],
    max_bytes: int,
    settings: dict[str, Any] | None,
) -> AheadLanes:
    """Return the guesses at the empty text (D = 1) that the rows of some texts, bool[V], teach.

    They are those of a table with these settings (`settings_of`); where there are none, or it
    would be too large, means by length. The other arguments are those of `Ahead.start`.
    """
    if settings is not None:
        at = np.flatnonzero(which)
        texts, mass = [seen.texts[i] for i in at], np.exp(seen.target[at])
        model = ByteNgram.from_rows(soft_counts_of(texts, np.ones(len(texts)), mass), _ORDER)
        with suppress(ConstraintError):
            ahead = Lookahead(model, **settings)
            dfa = automata_of(target, ahead.constraint, ahead.max_states).dfa
            assert dfa is not None
            ahead.local = edge_means(dfa, model, dfa.states(texts).cpu().numpy(), texts, mass)
            return await ahead.start(target, leaves, max_bytes)
    return MeanLanes(mean_guesses(seen), 1)
