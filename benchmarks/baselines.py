"""Other samplers of a constrained law, by the same rows as `exact_sample`.

Each is a generator that yields the prefix whose row it needs and is sent that row, float64[257]:
the target's weights of each byte and of the end after it, zero where the constraint excludes it.
`drive` runs some of them side by side on rows that are computed once (`Rows`).

- `rejected`: a draw of the language model, given up at the first byte that the constraint excludes.
- `constrained`: locally constrained decoding: rows normalised over what the constraint admits.
- `ASAp` (Park et al. 2024, "Grammar-aligned decoding", arXiv:2405.21047): the same, with rows
  times the mass that is expected below each byte: 1 where nothing was seen, else the sum over the
  rows that were.
- `Chain` (Gonzalez et al. 2025, "Constrained sampling for language models should be easy",
  arXiv:2506.05754): Metropolis-Hastings whose proposal keeps the beginning of the text up to a
  place chosen uniformly, and draws the rest by `constrained`.

For a finite set of texts (`Texts`) the law of a draw by ASAp, and that of a chain after any number
of steps, are computed instead of estimated.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.alphabet import EOS_COLUMN

FloatArray = npt.NDArray[np.float64]
Drawing = Generator[bytes, FloatArray, bytes | None]  # yields prefixes; None: no text


class Rows:
    """Rows of a target, each computed once.

    Args:
        target: a potential over bytes.
    """

    def __init__(self, target: Any) -> None:
        self._target, self._known = target, dict[bytes, FloatArray]()

    async def of(self, texts: Iterable[bytes]) -> list[FloatArray]:
        """Return the rows of some prefixes, float64[257] each."""
        asked = list(texts)
        new = [t for t in dict.fromkeys(asked) if t not in self._known]
        if new:
            lazy = await self._target.batch_logw_next([[bytes([b]) for b in t] for t in new])
            rows = np.exp(np.asarray(lazy.weights, dtype=np.float64))
            self._known |= dict(zip(new, rows, strict=True))
        return [self._known[t] for t in asked]


async def drive(
    rows: Rows, begin: Callable[[], Drawing], n: int, at_once: int = 1
) -> list[bytes | None]:
    """Run n drawings, so many side by side; return their results in the order of their ends."""
    out: list[bytes | None] = []
    going: list[tuple[Drawing, bytes]] = []
    begun = 0
    while begun < n or going:
        while begun < n and len(going) < at_once:
            drawing = begin()
            going.append((drawing, next(drawing)))
            begun += 1
        still = []
        for (drawing, _), row in zip(going, await rows.of(t for _, t in going), strict=True):
            try:
                still.append((drawing, drawing.send(row)))
            except StopIteration as end:
                out.append(end.value)
        going = still
    return out


def _pick(weights: FloatArray, rng: np.random.Generator) -> int:
    """Draw an index by weights that need not be normalised."""
    sums = np.cumsum(weights)
    return int(np.searchsorted(sums, rng.random() * sums[-1], side="right"))


def rejected(rng: np.random.Generator) -> Drawing:
    """Draw from the language model; None once the constraint excludes what was drawn."""
    text = b""
    while True:
        row = yield text
        symbol = _pick(np.append(row, max(1 - row.sum(), 0.0)), rng)
        if symbol == EOS_COLUMN:
            return text
        if symbol > EOS_COLUMN:
            return None
        text += bytes([symbol])


def constrained(rng: np.random.Generator, text: bytes = b"") -> Drawing:
    """Go on from a prefix by rows over their sums."""
    while True:
        row = yield text
        symbol = _pick(row, rng)
        if symbol == EOS_COLUMN:
            return text
        text += bytes([symbol])


class ASAp:
    """Adaptive sampling with approximate expected futures.

    Attributes:
        mass: for each prefix whose row was seen, an upper bound on what is below it.
    """

    def __init__(self) -> None:
        self.mass: dict[bytes, float] = {}

    def weigh(self, text: bytes, row: FloatArray) -> FloatArray:
        """Return a row times what is expected below each byte, float64[257]."""
        out = row.copy()
        for byte in np.flatnonzero(row[:EOS_COLUMN]).tolist():
            out[byte] *= self.mass.get(text + bytes([byte]), 1.0)
        return out

    def draw(self, rng: np.random.Generator) -> Drawing:
        """Draw a text, then tell the masses along it what was seen."""
        text, seen = b"", list[tuple[bytes, FloatArray]]()
        while True:
            row = yield text
            seen.append((text, row))
            symbol = _pick(self.weigh(text, row), rng)
            if symbol == EOS_COLUMN:
                break
            text += bytes([symbol])
        for prefix, row in reversed(seen):
            self.mass[prefix] = float(self.weigh(prefix, row).sum())
        return text


class Chain:
    """Metropolis-Hastings over whole texts.

    With g(y, i) the probability that `constrained` goes on from the first i bytes of y to y, a text
    x of n symbols (its end is one) proposes y with q(y | x) = sum over i <= c of g(y, i) / n, where
    c is the length of what x and y have in common, and y is taken with probability
    min(1, pi(y) q(x | y) / (pi(x) q(y | x))).

    Args:
        steps: of the chain after its first text, which `constrained` draws.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.accepted = 0

    def draw(self, rng: np.random.Generator) -> Drawing:
        """Run the chain and return its last text."""
        text, logs = yield from _scored(rng, b"", [])
        for _ in range(self.steps):
            place = int(rng.integers(len(text) + 1))
            other, new = yield from _scored(rng, text[:place], logs[:place])
            common = _common(text, other)
            forth, back = _proposal(new, common, len(text)), _proposal(logs, common, len(other))
            ratio = sum(r for r, _ in new) + back - sum(r for r, _ in logs) - forth
            if np.log(rng.random()) < ratio:
                text, logs = other, new
                self.accepted += 1
        return text


Logs = list[
    tuple[float, float]
]  # of each symbol: log of its entry in the row, and of the row's sum


def _scored(
    rng: np.random.Generator, text: bytes, logs: Logs
) -> Generator[bytes, FloatArray, tuple[bytes, Logs]]:
    """Go on from a prefix as `constrained` does, and note the weights."""
    logs = list(logs)
    while True:
        row = yield text
        symbol = _pick(row, rng)
        logs.append((float(np.log(row[symbol])), float(np.log(row.sum()))))
        if symbol == EOS_COLUMN:
            return text, logs
        text += bytes([symbol])


def _common(one: bytes, other: bytes) -> int:
    """Return how many bytes two texts have in common at their beginnings."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _proposal(logs: Logs, common: int, length: int) -> float:
    """Return log q of going to the text of `logs` from one of so many bytes, nats."""
    ratios = np.array([entry - total for entry, total in logs])
    tails = np.cumsum(ratios[::-1])[::-1]
    return float(np.logaddexp.reduce(tails[: common + 1]) - np.log(length + 1))


class Texts:
    """A finite set of texts whose rows are all known.

    Args:
        texts: the set.
        logs: for each text, as `Logs`; made by `enumerated`.

    Attributes:
        logw: float64[n], log weight of each, nats.
        law: float64[n], the target's law.
        local: float64[n], the law of `constrained`.
    """

    def __init__(self, texts: list[bytes], logs: list[Logs], rows: dict[bytes, FloatArray]) -> None:
        self.texts, self._logs, self._rows = texts, logs, rows
        self.logw = np.array([sum(entry for entry, _ in own) for own in logs])
        self.law = np.exp(self.logw - np.logaddexp.reduce(self.logw))
        self.local = np.exp([sum(entry - total for entry, total in own) for own in logs])

    def asap(self, sampler: ASAp) -> FloatArray:
        """Return the law of the next draw of ASAp, float64[n]."""
        shares = {}
        for prefix, row in self._rows.items():
            weights = sampler.weigh(prefix, row)
            shares[prefix] = weights / weights.sum()
        out = [shares[t][EOS_COLUMN] for t in self.texts]
        for i, text in enumerate(self.texts):
            out[i] *= np.prod([shares[text[:k]][text[k]] for k in range(len(text))])
        return np.array(out, dtype=np.float64)

    def kernel(self) -> FloatArray:
        """Return the transition matrix of `Chain`, float64[n, n]."""
        n = len(self.texts)
        logq = np.empty((n, n))
        for j, own in enumerate(self._logs):
            tails = np.cumsum(np.array([entry - total for entry, total in own])[::-1])[::-1]
            sums = np.logaddexp.accumulate(tails)
            for i, text in enumerate(self.texts):
                logq[i, j] = sums[_common(text, self.texts[j])] - np.log(len(text) + 1)
        ratio = self.logw[None] - self.logw[:, None] + logq.T - logq
        out: FloatArray = np.exp(logq + np.minimum(ratio, 0.0))
        np.fill_diagonal(out, 0.0)
        np.fill_diagonal(out, 1 - out.sum(axis=1))
        return out

    def away(self, law: FloatArray) -> float:
        """Return the total variation of a law from the target's."""
        return float(0.5 * np.abs(law - self.law).sum())

    def steps(self, tolerance: float, most: int = 1 << 20) -> int | None:
        """Return after how many steps of `Chain` its law is so near the target's; None: more."""
        powers, law = [self.kernel()], self.local
        if self.away(law) < tolerance:
            return 0
        while 2 ** len(powers) <= most:
            powers.append(powers[-1] @ powers[-1])
        if self.away(law @ powers[-1]) >= tolerance:
            return None
        done = 0
        for k, power in reversed(list(enumerate(powers))):  # a chain only comes nearer
            if self.away(law @ power) >= tolerance:
                law, done = law @ power, done + 2**k
        return done + 1


async def enumerated(rows: Rows, texts: list[bytes]) -> Texts:
    """Ask for the rows of all prefixes of some texts; texts of weight zero are left out."""
    prefixes = list(dict.fromkeys(t[:k] for t in texts for k in range(len(t) + 1)))
    known = dict(zip(prefixes, await rows.of(prefixes), strict=True))
    kept, logs = [], []
    for text in texts:
        symbols = [*text, EOS_COLUMN]
        steps = [(known[text[:k]][s], known[text[:k]].sum()) for k, s in enumerate(symbols)]
        if min(steps)[0] > 0:
            kept.append(text)
            logs.append([(float(np.log(entry)), float(np.log(total))) for entry, total in steps])
    within = {p: known[p] for p in prefixes if any(t.startswith(p) for t in kept)}
    return Texts(kept, logs, within)
