"""Byte models whose completions can be summed over an automaton: n-grams, averages of known rows.

A context is what was read last: at most n - 1 symbols, the first of which may be the beginning
of the text (written as symbol 256, which is otherwise its end). An n-gram is an automaton over
the contexts that were seen, each with a row of 257 probabilities:

    after    int32[C, 256]     the longest seen context that ends what a byte makes of one
    rows     float64[C, 257]   probabilities of each byte and of the end; positive, sum to one

A row is its context's counts mixed with the row of the context that is one symbol shorter,
down to the uniform row, so that nothing has probability zero (interpolated smoothing: Witten &
Bell 1991 for counts, a fixed weight for the soft counts of `from_model`).

`RowMeans` know where in an automaton a text stands, too: known rows are averaged by state q,
context h or both, from coarse to fine, and an average of rows r is mixed with the coarser one,

    p(b | at) = (sum of r[b] at this place + smoothing * coarser) / (count + smoothing).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.alphabet import EOS_COLUMN, N_BYTES, N_SYMBOLS, contexts_of
from genlm_bytes_smc.checks import check_count
from genlm_bytes_smc.constraints import ByteDFA
from genlm_bytes_smc.constraints.base import IntArray
from genlm_bytes_smc.smc.loop import smc
from genlm_bytes_smc.smc.runs import AllParticlesDeadError

Float = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
Context = tuple[int, ...]
Counted = tuple[Sequence[int], int, Float]

_BEGIN = EOS_COLUMN
MOST_CONTEXTS = 50_000
_BATCH = 256  # texts whose rows are asked for at once
_EDGE_SMOOTHING = 0.5
_PRIOR = np.array([0.8, 0.15])  # mass admitted where one symbol is, and where several are
_TIMES = 2.0  # texts that the prior counts as


class ByteNgram:
    """A byte-level n-gram that knows the beginning and the end of texts.

    Args:
        texts: whole texts, `str` as UTF-8 (None: only with order 0).
        order: n; a byte is predicted from the n - 1 symbols before it. 0 is the uniform
            distribution over 257 symbols, 1 a unigram, 2 a bigram.
        smoothing: how many observations the row of the shorter context counts as. None: as
            many as there are distinct symbols after the context (Witten & Bell).
        max_contexts: contexts kept, the most frequent ones.

    Attributes:
        order: n.
        contexts: the C contexts, as tuples of symbols.
        rows: float64[C, 257] probabilities.
        after: int32[C, 256], the context after a byte.
        start: the context at the beginning of a text.

    Raises:
        TypeError, ValueError: no texts where they are needed, or bad numbers.
    """

    def __init__(
        self,
        texts: Iterable[str | bytes] | None = None,
        order: int = 2,
        *,
        smoothing: float | None = None,
        max_contexts: int = MOST_CONTEXTS,
    ) -> None:
        check_count("order", order, 0)
        if isinstance(texts, str | bytes):
            raise TypeError(f"texts must be several texts in a list, got {texts!r:.60} alone")
        whole = [t.encode() if isinstance(t, str) else bytes(t) for t in texts or []]
        if order and not whole:
            raise ValueError("an n-gram of order 1 or more needs texts to count in, got none")
        self._build(_hard_counts(whole), order, smoothing, max_contexts)

    @classmethod
    def uniform(cls) -> ByteNgram:
        """Return the model that gives every byte and the end the same probability."""
        return cls(order=0)

    @classmethod
    async def from_model(
        cls,
        llm: Any,
        *,
        order: int = 2,
        n_texts: int = 64,
        max_bytes: int = 64,
        seed: int = 0,
        smoothing: float = 1.0,
        max_contexts: int = MOST_CONTEXTS,
    ) -> ByteNgram:
        """Fit an n-gram to what a language model writes after its prompt.

        Texts are drawn from the model. At each of their positions the model's whole row is
        counted, not the one symbol that was drawn: soft counts, of less variance.

        Args:
            llm: a `ByteLLM`, or a product of potentials that one is part of.
            order, max_contexts: see the class.
            n_texts, max_bytes, seed: of the draws; the most bytes of each.
            smoothing: how many rows the shorter context counts as.
        """
        check_count("order", order, 0)
        texts = await draw_texts(llm, n_texts, max_bytes, seed)
        counted = await soft_counts(llm, texts, max_bytes)
        return cls.from_rows(counted, order, smoothing, max_contexts)

    @classmethod
    def from_rows(
        cls,
        counted: Iterable[Counted],
        order: int,
        smoothing: float = 1.0,
        max_contexts: int = MOST_CONTEXTS,
    ) -> ByteNgram:
        """Fit an n-gram to soft counts: (text, position, float64[257] what follows it)."""
        new = cls.__new__(cls)
        new._build(counted, order, smoothing, max_contexts)
        return new

    def _build(
        self, counted: Iterable[Counted], order: int, smoothing: float | None, most: int
    ) -> None:
        if smoothing is not None and not smoothing > 0:
            raise ValueError(f"smoothing must be above zero, got {smoothing}")
        self.order = int(order)
        counts = defaultdict[Context, Float](lambda: np.zeros(N_SYMBOLS), {(): np.zeros(N_SYMBOLS)})
        if order:
            for text, at, row in counted:
                for context in _contexts(text, at, order):
                    counts[context] += row
        by_use = sorted(counts, key=lambda c: (-counts[c].sum(), len(c), c))[:most]
        closed = {c[k:] for c in by_use for k in range(len(c) + 1)}
        self.contexts = sorted({(), *closed}, key=lambda c: (len(c), c))
        self.number = {c: i for i, c in enumerate(self.contexts)}
        self.rows = _smoothed(self.contexts, self.number, counts, smoothing)
        self.after = _after(self.contexts, self.number)
        self.start = self.number.get((_BEGIN,), 0)

    def __len__(self) -> int:
        """Return the number of contexts, C."""
        return len(self.contexts)

    def context_of(self, text: bytes) -> int:
        """Return the number of the context after `text`; only the last n - 1 bytes matter."""
        here = self.start
        for byte in text[1 - self.order :] if 1 < self.order <= len(text) else text:
            here = int(self.after[here, byte])
        return here

    def logp_next(self, text: bytes) -> Float:
        """Log probabilities of the next byte and of the end after `text`: float64[257], nats."""
        out: Float = np.log(self.rows[self.context_of(text)])
        return out

    def logp(self, text: bytes) -> float:
        """Log probability of a whole text, nats."""
        here, total = self.start, 0.0
        for byte in text:
            total += float(np.log(self.rows[here, byte]))
            here = int(self.after[here, byte])
        return total + float(np.log(self.rows[here, EOS_COLUMN]))

    def __repr__(self) -> str:
        return f"ByteNgram(order={self.order}, contexts={len(self)})"


async def draw_texts(llm: Any, n: int, max_bytes: int, seed: int) -> list[bytes]:
    """Draw texts of a potential without resampling, cut at `max_bytes` bytes.

    A model none of whose tokens ends a text is fine: only its beginnings are wanted.
    """
    options: Any = {"seed": seed, "progress": False, "terminate_when": lambda _: False}
    try:
        return (await smc(llm, n, 0.0, max_bytes, **options)).texts
    except AllParticlesDeadError as error:
        return error.result.texts


async def soft_counts(llm: Any, texts: Sequence[bytes], max_bytes: int) -> list[Counted]:
    """Return the potential's normalised rows after every prefix of the texts, with repetition.

    A prefix of `max_bytes` bytes has no row: there the length limit ended the text.
    """
    # In this order texts that begin alike are asked for together, while their rows are held.
    stems = sorted({t[:k] for t in texts for k in range(min(len(t), max_bytes - 1) + 1)})
    rows = torch.softmax(await rows_after(llm, stems), dim=1).nan_to_num(0.0).numpy()
    row_of = dict(zip(stems, rows, strict=True))
    return [(t, k, row_of[t[:k]]) for t in texts for k in range(min(len(t), max_bytes - 1) + 1)]


async def rows_after(llm: Any, texts: Sequence[bytes]) -> torch.Tensor:
    """Ask for a potential's rows after V texts, some at a time: float64[V, 257] on the host."""
    rows = []
    for some in range(0, len(texts), _BATCH):
        contexts = contexts_of(texts[some : some + _BATCH])
        weights = (await llm.batch_logw_next(contexts)).weights
        rows.append(torch.as_tensor(weights).double().cpu())
    return torch.cat(rows)


def _hard_counts(texts: Iterable[bytes]) -> Iterator[Counted]:
    one = np.eye(N_SYMBOLS)
    for text in texts:
        for at, symbol in enumerate([*text, EOS_COLUMN]):
            yield text, at, one[symbol]


def _contexts(text: Sequence[int], at: int, order: int) -> Iterator[Context]:
    """Iterate over the contexts of the position `at`, shortest first."""
    for k in range(order):
        if k > at + 1:
            return
        yield (_BEGIN, *text[:at]) if k == at + 1 else tuple(text[at - k : at])


def _smoothed(
    contexts: list[Context],
    number: dict[Context, int],
    counts: dict[Context, Float],
    smoothing: float | None,
) -> Float:
    rows = np.stack([counts[c] for c in contexts])
    shorter = np.array([number[c[1:]] for c in contexts])
    length = np.array([len(c) for c in contexts])
    total = rows.sum(axis=1)
    prior = np.full(len(rows), smoothing) if smoothing else (rows > 0).sum(axis=1).clip(1)
    for k in range(int(length.max()) + 1):
        at = np.flatnonzero(length == k)
        below = rows[shorter[at]] if k else np.full((1, N_SYMBOLS), 1 / N_SYMBOLS)
        mixed = rows[at] + prior[at, None] * below
        rows[at] = mixed / (total[at] + prior[at])[:, None]
    out: Float = rows / rows.sum(axis=1, keepdims=True)
    return out


def _after(contexts: list[Context], number: dict[Context, int]) -> Int32:
    after = np.zeros((len(contexts), N_BYTES), dtype=np.int32)
    longer: dict[Context, list[Context]] = {}
    for c in contexts:
        if c and c[-1] != _BEGIN:
            longer.setdefault(c[:-1], []).append(c)
    for i, c in enumerate(contexts):  # shorter ones come first
        if c:
            after[i] = after[number[c[1:]]]
        for one in longer.get(c, []):
            after[i, one[-1]] = number[one]
    return after


def soft_counts_of(texts: Sequence[bytes], count: Float, rows: Float) -> Iterator[Counted]:
    """Return V texts and their rows as soft counts: float64[V] visits, float64[V, 257] rows."""
    for text, n, row in zip(texts, count.tolist(), rows, strict=True):
        yield text, len(text), n * row


class PilotSamples(NamedTuple):
    """Texts that pilot particles visited, and rows of what follows.

    Attributes:
        texts: the V distinct texts.
        counts: float64[V], how many particles were at each.
        rows: float64[V, 257], mass of the next byte and of the end under the language models.
    """

    texts: list[bytes]
    counts: Float
    rows: Float

    def __add__(self, other: PilotSamples) -> PilotSamples:  # type: ignore[override]
        arrays = map(np.concatenate, zip(self[1:], other[1:], strict=True))
        return PilotSamples(self.texts + other.texts, *arrays)


class RowMeans:
    """Averages of known rows by where texts stand, each mixed with the next coarser one.

    Args:
        coarsest: probabilities of symbols in pairs of states and contexts, float64[m].
        smoothing: how many rows the coarser average counts as.
    """

    def __init__(
        self, coarsest: Callable[[IntArray, IntArray, IntArray | int], Float], smoothing: float = 1
    ) -> None:
        self._coarsest, self._smoothing = coarsest, smoothing
        self._levels: list[tuple[Callable[[IntArray, IntArray], IntArray], Float, Float]] = []

    def refine(
        self,
        place: Callable[[IntArray, IntArray], IntArray],
        size: int,
        at: IntArray,
        rows: Float,
        counts: Float,
    ) -> None:
        """Add a finer average.

        Args:
            place: finds the places of pairs of states and contexts, int64[m] each.
            size: how many places there are.
            at: int64[V], the places of known texts.
            rows, counts: float64[V, 257], what is added up there, and what it counts as.
        """
        total, count = np.zeros((size, N_SYMBOLS)), np.zeros((size, N_SYMBOLS))
        np.add.at(total, at, rows)
        np.add.at(count, at, counts)
        self._levels.append((place, total, count))

    def log(self, state: IntArray, context: IntArray, symbol: IntArray | int) -> Float:
        """Return log probabilities in pairs: int64[m] each (or one symbol) -> float64[m], nats."""
        p, k = self._coarsest(state, context, symbol), self._smoothing
        for place, total, count in self._levels:
            at = place(state, context)
            p = (total[at, symbol] + k * p) / (count[at, symbol] + k)
        with np.errstate(divide="ignore"):
            out: Float = np.log(p)
        return out


def places(codes: IntArray, wanted: IntArray) -> IntArray:
    """Return where numbers stand among ascending ones, int64[m]; -1 for those that do not."""
    at = np.searchsorted(codes, wanted)
    at[at == len(codes)] = -1
    return np.where(codes[at] == wanted, at, -1) if len(codes) else at


def pilot_means(
    dfa: ByteDFA, model: ByteNgram, state: IntArray, seen: PilotSamples, smoothing: float
) -> RowMeans:
    """Average the rows of a pilot by state, then by state and context; coarsest is the n-gram.

    Args:
        dfa, model: the automaton and the n-gram.
        state: int64[V], of the texts seen; negative for one that left the automaton.
        seen: the texts and rows.
        smoothing: visits that a coarser row counts as.
    """
    at = np.flatnonzero(state >= 0)
    context = np.array([model.context_of(seen.texts[i]) for i in at.tolist()], dtype=np.int64)
    visits = np.broadcast_to(seen.counts[at, None], (len(at), N_SYMBOLS))
    weighed = seen.rows[at] * visits
    width, codes = len(model), np.unique(state[at] * len(model) + context)

    def pair(state: IntArray, context: IntArray) -> IntArray:
        return places(codes, state * width + context)  # -1, the last, for one never seen

    means = RowMeans(lambda state, context, symbol: model.rows[context, symbol], smoothing)
    means.refine(lambda state, context: state, dfa.n_states, state[at], weighed, visits)
    means.refine(pair, len(codes) + 1, pair(state[at], context), weighed, visits)
    return means


def edge_means(
    dfa: ByteDFA, model: ByteNgram, state: IntArray, texts: Sequence[bytes], rows: Float
) -> RowMeans:
    """Average entries of the target's rows: what symbols weigh after texts that nobody has seen.

    Coarsest is the mean mass that is admitted, over texts where as many symbols are (one, or
    several), spread evenly over those that the state admits; then entries by context, then by
    state. A byte that the language model did not expect where it was not admitted counts for
    nothing. So a beginning that nobody has come to is not ruled out, as it is by an n-gram of
    whole rows, which gives bytes that it never saw next to nothing.

    Args:
        dfa, model: the automaton, and an n-gram for its contexts.
        state: int64[V], of the texts; negative for one that left the automaton.
        texts, rows: V of them, and float64[V, 257], mass of each symbol after them.
    """
    at = np.flatnonzero(state >= 0)
    context = np.array([model.context_of(texts[i]) for i in at.tolist()], dtype=np.int64)
    state, rows, table = state[at], rows[at], dfa.host_table()
    admitted = (table.next >= 0).sum(axis=1) + table.accept
    kind = np.minimum(np.maximum(admitted, 1), 2) - 1
    count = np.bincount(kind[state], minlength=2) + _TIMES
    mass = np.bincount(kind[state], rows.sum(axis=1), minlength=2) + _TIMES * _PRIOR
    even = (mass / count)[kind] / np.maximum(admitted, 1)
    some = (rows > 0).astype(np.float64)
    means = RowMeans(lambda state, context, symbol: even[state], _EDGE_SMOOTHING)
    means.refine(lambda state, context: context, len(model), context, rows, some)
    means.refine(lambda state, context: state, dfa.n_states, state, rows, some)
    return means
