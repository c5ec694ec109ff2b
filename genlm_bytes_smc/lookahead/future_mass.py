"""Expected future mass, tabulated over pairs of an automaton state and an n-gram context.

For an automaton with arcs q -b-> r of log weight w and endings f(q), and a byte model with
probabilities p(. | h) in context h, the future of (q, h) when m more bytes may be read is

    psi_0(q, h) = p(end | h) f(q)
    psi_m(q, h) = p(end | h) f(q) + sum over arcs of  p(b | h) w psi_(m-1)(r, h b)

the sum, over all completions of at most m bytes, of the byte model's probability times the
automaton's weight; without a limit it is the least solution of psi = A psi + psi_0. Only pairs
that can be reached are numbered. Sums are taken in log space, as a long literal under a
uniform model underflows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from genlm_bytes_smc.alphabet import EOS_COLUMN, N_BYTES, N_SYMBOLS
from genlm_bytes_smc.constraints import ByteDFA, ByteWFSA, ConstraintError
from genlm_bytes_smc.constraints.automata import Table, ragged
from genlm_bytes_smc.constraints.base import DEAD, BoolArray, IntArray
from genlm_bytes_smc.constraints.wfsa import total_weights
from genlm_bytes_smc.lookahead.ngram import ByteNgram, Float, RowMeans
from genlm_bytes_smc.smc.weighers import AheadLanes

MOST_ARCS = 1 << 24
MOST_BYTES = 1 << 29  # of a table with one row a number of bytes left
_DENSE = 2048  # pairs up to which the unlimited sums are solved directly
_SETTLED = 1e-11  # nats that a sweep may still change


class _Arcs(NamedTuple):
    """A byte automaton as arcs, grouped by where they begin.

    Attributes:
        source, byte, target: int64[E].
        weight: float64[E], nats.
        end: float64[S], log weight of ending, -inf for none.
        starts: int64[s], the states that a text begins in.
    """

    source: IntArray
    byte: IntArray
    target: IntArray
    weight: Float
    end: Float
    starts: IntArray

    @classmethod
    def of(cls, automaton: Table | ByteWFSA) -> _Arcs:
        """Return the arcs of a deterministic or a (pushed) weighted automaton."""
        if isinstance(automaton, Table):
            source, byte = np.nonzero(automaton.next >= 0)
            target = automaton.next[source, byte].astype(np.int64)
            starts = np.zeros(1, dtype=np.int64)
            return cls(source, byte, target, np.zeros(len(byte)), _log(automaton.accept), starts)
        source, byte, target, weight, end, start = automaton.pushed()
        order = np.argsort(source, kind="stable")
        source, byte, target, weight = source[order], byte[order], target[order], weight[order]
        return cls(source, byte, target, weight, end, np.flatnonzero(np.isfinite(start)))


# In the place of a deterministic automaton beside another one: every text passes.
_ANYTHING = Table(np.zeros((1, N_BYTES), dtype=np.int32), np.ones(1, dtype=np.bool_))


class FutureTable:
    """log psi of every reachable pair of an automaton state and an n-gram context.

    It also reads bytes into states and contexts, of many texts at once. A text is int64[3]: its
    states in both automata, and its context.

    Args:
        dfa: the deterministic automaton, or None.
        wfsa: the weighted one that it meets, or None; a text is a distribution over its states.
        model: the byte model.
        max_bytes: most bytes of a text, respected exactly; None: no limit.
        device: where the sums are taken and the table lives.
        local: probabilities that depend on the pair, in place of the model's.
        stops: whether texts end (weight 1) as soon as the automata may, without a symbol for it.
        outside: log psi, against the empty text's, of texts that left the automata; None:
            they are impossible.

    Attributes:
        codes: int64[J], ascending: state * len(model) + context of each pair. State q of the
            weighted automaton beside r of the deterministic one is q * (states of that) + r.
        log_psi: float64[M, J] on the device. Row m is psi_m, the last one stands for all
            larger m. Without a limit there is one row.

    Raises:
        ConstraintError: more than 2**24 arcs between pairs, or (without a limit) infinite sums.
    """

    def __init__(
        self,
        dfa: ByteDFA | None,
        wfsa: ByteWFSA | None,
        model: ByteNgram,
        max_bytes: int | None,
        device: torch.device,
        local: RowMeans | None = None,
        *,
        stops: bool = False,
        outside: float | None = None,
    ) -> None:
        self.model, self.max_bytes, self.device, self.outside = model, max_bytes, device, outside
        self.dfa = None if dfa is None else dfa.to(device)
        self.wfsa = None if wfsa is None else wfsa.to(device)
        table = _ANYTHING if dfa is None else dfa.host_table()
        arcs, beside = (_Arcs.of(table), _ANYTHING) if wfsa is None else (_Arcs.of(wfsa), table)
        self.codes, source, target, byte, weight = _product(arcs, beside, model, stops)
        state, context = np.divmod(self.codes, len(model))
        local = local or RowMeans(lambda state, context, symbol: model.rows[context, symbol])
        logp = local.log(state[source], context[source], byte)
        end = (arcs.end[:, None] + _log(beside.accept)).ravel()[state]
        if not stops:
            end = end + local.log(state, context, EOS_COLUMN)
        merged = _merged(source, target, weight + logp, len(self.codes))
        self.limited = max_bytes is not None and (max_bytes + 1) * len(end) * 8 <= MOST_BYTES
        if max_bytes is not None and self.limited:
            self.log_psi = _limited(_Sweep(*merged, end, device), max_bytes)
        elif len(end) <= _DENSE:
            self.log_psi = torch.from_numpy(total_weights(*merged, end)).to(device)[None]
        else:
            self.log_psi = _unlimited(_Sweep(*merged, end, device))[None]
        self._codes = torch.from_numpy(self.codes).to(device)
        self._n_dfa = len(table)
        self._after = torch.from_numpy(model.after.astype(np.int64)).to(device)
        if wfsa is not None:
            self._arcs = [torch.from_numpy(x).to(device) for x in wfsa.pushed()[:4]]

    def __len__(self) -> int:
        """Return the number of pairs, J."""
        return len(self.codes)

    def spawn(self) -> FutureTable:
        """Return a copy with a memory of its own."""
        new = copy.copy(self)
        new.wfsa = None if self.wfsa is None else self.wfsa.spawn()
        return new

    def first(self) -> torch.Tensor:
        """Return where the empty text stands, int64[1, 3]."""
        return torch.tensor([[0, 0, self.model.start]], device=self.device)

    def step(self, at: torch.Tensor, symbols: torch.Tensor) -> torch.Tensor:
        """Read a byte a lane: int64[n, 3], int64[n] -> int64[n, 3]."""
        dfa, wfsa = at[:, 0], at[:, 1]
        if self.dfa is not None:
            dfa = self.dfa.step(dfa, symbols)
        if self.wfsa is not None:
            wfsa = self.wfsa.step(wfsa, symbols)
        return torch.stack([dfa, wfsa, self._after[at[:, 2], symbols]], dim=1)

    def now(self, at: torch.Tensor, left: int) -> torch.Tensor:
        """Return log psi of each text when `left` more bytes may be read, float64[n]."""
        if self.wfsa is None:
            return self._look(0, at[:, 0], at[:, 2], left)
        share = self.wfsa.forward(at[:, 1])
        state = torch.arange(share.shape[1], device=self.device)
        return torch.logsumexp(share + self._look(state, at[:, :1], at[:, 2:], left), 1)

    def next(self, at: torch.Tensor, left: int) -> torch.Tensor:
        """Return log psi after each byte, with `left` bytes left after it: float64[n, 256]."""
        byte = torch.arange(N_BYTES, device=self.device).expand(len(at), N_BYTES)
        dfa, context = at[:, :1].expand_as(byte), self._after[at[:, 2]]
        if self.dfa is not None:
            dfa = self.dfa.step(dfa, byte)
        if self.wfsa is None:
            return self._look(0, dfa, context, left)
        mass = self.wfsa.block(at[:, 1])[:, :N_BYTES]
        source, b, target, weight = self._arcs
        share = self.wfsa.forward(at[:, 1])[:, source]
        terms = share + weight + self._look(target, dfa[:, b], context[:, b], left)
        shift = finite(terms.amax(1, keepdim=True))
        total = torch.zeros_like(mass).index_add_(1, b, (terms - shift).exp())
        future = total.log() + shift
        return torch.where(torch.isneginf(mass), -torch.inf, future - mass)

    def _look(
        self, wfsa: torch.Tensor | int, dfa: torch.Tensor, context: torch.Tensor, left: int
    ) -> torch.Tensor:
        """log psi of states and contexts, int64 of any shape; -inf for what is no pair."""
        codes = (wfsa * self._n_dfa + dfa) * len(self.model) + context
        codes = torch.where(dfa == DEAD, -1, codes)
        row = self.log_psi[min(left, len(self.log_psi) - 1)]
        at = torch.searchsorted(self._codes, codes).clamp_(max=len(self) - 1)
        return torch.where(self._codes[at] == codes, row[at], -torch.inf)


def finite(log_psi: torch.Tensor) -> torch.Tensor:
    """Return log psi with 0 in place of -inf, which may then be subtracted."""
    return torch.where(torch.isneginf(log_psi), 0.0, log_psi)


def _product(
    arcs: _Arcs, dfa: Table, model: ByteNgram, stops: bool
) -> tuple[IntArray, IntArray, IntArray, IntArray, Float]:
    """Run an automaton, a deterministic one and the contexts side by side.

    Returns:
        The reachable codes (see `FutureTable`) int64[J], ascending; of the arcs between them
        source, target int64[E] as positions in codes, grouped by source, byte int64[E], and
        weight float64[E]. Where `stops`, none goes on from where a text may end.
    """
    width, n = len(model), len(dfa)
    offset = np.searchsorted(arcs.source, np.arange(len(arcs.end) + 1))
    frontier = np.unique(arcs.starts * n * width + model.start)
    seen, parts, total = frontier, [], 0
    while len(frontier):
        state, context = np.divmod(frontier, width)
        state, other = np.divmod(state, n)
        first, stop = offset[state], offset[state + 1]
        if stops:
            stop = np.where(np.isfinite(arcs.end[state]) & dfa.accept[other], first, stop)
        total += int((stop - first).sum())
        if total > MOST_ARCS:
            raise ConstraintError(
                f"the look-ahead needs more than {MOST_ARCS} arcs between automaton states and "
                f"contexts of an n-gram of order {model.order}; take a lower order, or fewer "
                "max_states for an automaton that approximates"
            )
        arc, at = ragged(first, stop), np.repeat(np.arange(len(frontier)), stop - first)
        to = dfa.next[other[at], arcs.byte[arc]]
        arc, at, to = arc[to >= 0], at[to >= 0], to[to >= 0]
        byte = arcs.byte[arc]
        target = (arcs.target[arc] * n + to) * width + model.after[context[at], byte]
        parts.append((frontier[at], target, byte, arcs.weight[arc]))
        frontier = np.setdiff1d(target, seen)
        seen = np.union1d(seen, frontier)
    source, target, byte, weight = (np.concatenate(x) for x in zip(*parts, strict=True))
    order = np.argsort(source, kind="stable")
    place = np.searchsorted(seen, source[order]), np.searchsorted(seen, target[order])
    return seen, *place, byte[order], weight[order]


def _log(mask: BoolArray) -> Float:
    return np.where(mask, 0.0, -np.inf)


def _merged(
    source: IntArray, target: IntArray, weight: Float, n: int
) -> tuple[IntArray, IntArray, Float]:
    """Add up arcs with the same ends; they come out grouped by source."""
    code, inverse = np.unique(source * n + target, return_inverse=True)
    if len(code) == len(source):
        return source, target, weight
    total = np.full(len(code), -np.inf)
    np.logaddexp.at(total, inverse, weight)
    return code // n, code % n, total


class _Sweep:
    """The map psi -> psi_0 + A psi in log space, on a device."""

    def __init__(
        self, source: IntArray, target: IntArray, weight: Float, end: Float, device: torch.device
    ) -> None:
        lengths = np.bincount(source, minlength=len(end))
        self.lengths, self.source, self.target, self.weight, self.end = (
            torch.from_numpy(x).to(device) for x in (lengths, source, target, weight, end)
        )

    def __call__(self, psi: torch.Tensor) -> torch.Tensor:
        if not len(self.target):
            return self.end
        terms = self.weight + psi[self.target]
        top = torch.segment_reduce(terms, "max", lengths=self.lengths, initial=-torch.inf)
        shift = finite(torch.maximum(top, self.end))
        terms = (terms - shift[self.source]).exp_()
        total = torch.segment_reduce(terms, "sum", lengths=self.lengths, initial=0.0)
        return shift + torch.log(total + (self.end - shift).exp())


def _limited(sweep: _Sweep, max_bytes: int) -> torch.Tensor:
    rows = [sweep.end]
    for _ in range(max_bytes):
        rows.append(sweep(rows[-1]))
        if _change(rows[-1], rows[-2]) == 0.0:
            break
    return torch.stack(rows)


def _unlimited(sweep: _Sweep) -> torch.Tensor:
    psi, before = sweep(sweep.end), sweep.end
    for _ in range(200_000):
        moved = _change(psi, before)
        if moved < _SETTLED:
            return psi
        psi, before = sweep(psi), psi
        # Changes shrink by a constant factor in the end; what is left is a geometric series.
        ratio = _change(psi, before) / moved
        if ratio < 1 and moved * ratio / (1 - ratio) < _SETTLED * 10:
            return psi
    raise ConstraintError("the look-ahead without a limit did not settle; give max_bytes")


def _change(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.where(a == b, 0.0, a - b).abs().max())


@dataclass(eq=False)
class TableFactor(AheadLanes):
    """Expected future mass as a factor: what a `FutureTable` says of D texts.

    Attributes:
        table: it.
        at: int64[D, 3], where the texts stand.
        age: how many bytes they have read.
        value: float64[D], log psi of each.
        base: log psi of the empty text; 0 if that is -inf.
    """

    table: FutureTable
    at: torch.Tensor
    age: int
    value: torch.Tensor
    base: float
    _block: torch.Tensor | None = field(default=None, init=False)

    @classmethod
    def first(cls, table: FutureTable) -> TableFactor:
        """Return the factor at the empty text."""
        at = table.first()
        value = table.now(at, table.max_bytes or 0)
        return cls(table, at, 0, value, float(finite(value)[0]))

    def _left(self) -> int:
        """Return how many bytes are left after one more; 0 without a limit (one row for all)."""
        return max(0, (self.table.max_bytes or 0) - self.age - 1)

    async def rows(self) -> torch.Tensor:
        """log psi(x b) - log psi(x), and 0 - log psi(x) for the end: float64[D, 257]."""
        if self._block is None:
            following = self.table.next(self.at, self._left())
            ended = following.new_zeros((len(following), N_SYMBOLS - N_BYTES))
            block = torch.cat([self._floored(following), ended], dim=1)
            self._block = block - finite(self.value)[:, None]
        return self._block

    async def step(self, symbols: IntArray) -> tuple[TableFactor, None]:
        """See `Lanes`."""
        at = self.table.step(self.at, torch.from_numpy(symbols).to(self.at.device))
        value = self._floored(self.table.now(at, self._left()))
        after = replace(self, at=at, age=self.age + 1, value=value)
        if self.table.wfsa is not None and after.age % 64 == 0:
            self.table.wfsa.keep([at[:, 1]])
        return after, None

    def gather(self, lanes: IntArray) -> TableFactor:
        """See `Lanes`."""
        where = torch.from_numpy(lanes).to(self.at.device)
        return replace(self, at=self.at[where], value=self.value[where])

    def _floored(self, psi: torch.Tensor) -> torch.Tensor:
        if self.table.outside is None:
            return psi
        return torch.where(torch.isneginf(psi), self.base + self.table.outside, psi)
