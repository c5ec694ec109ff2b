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

from dataclasses import dataclass

import numpy as np
import torch

from genlm_bytes_smc.alphabet import EOS_COLUMN
from genlm_bytes_smc.constraints import ByteDFA, ByteWFSA, ConstraintError
from genlm_bytes_smc.constraints.automata.table import Table, ragged
from genlm_bytes_smc.constraints.base import IntArray
from genlm_bytes_smc.constraints.wfsa import total_weights
from genlm_bytes_smc.lookahead.edges import EdgeMeans
from genlm_bytes_smc.lookahead.ngram import ByteNgram, Float
from genlm_bytes_smc.lookahead.pilot import LocalRows

MOST_ARCS = 1 << 24
MOST_BYTES = 1 << 29  # of a table with one row a number of bytes left
_DENSE = 2048  # pairs up to which the unlimited sums are solved directly
_SETTLED = 1e-11  # nats that a sweep may still change


@dataclass(frozen=True)
class Arcs:
    """A byte automaton as arcs, grouped by where they begin.

    Attributes:
        offset: int64[S + 1]; the arcs of state q are offset[q]..offset[q + 1].
        byte, target: int64[E].
        weight: float64[E], nats.
        end: float64[S], log weight of ending, -inf for none.
        starts: int64[s], the states that a text begins in.
        certain_end: whether a text ends for certain where it may, without a symbol for it.
    """

    offset: IntArray
    byte: IntArray
    target: IntArray
    weight: Float
    end: Float
    starts: IntArray
    certain_end: bool = False

    @classmethod
    def of(cls, automaton: ByteDFA | ByteWFSA) -> Arcs:
        """Return the arcs of a deterministic or a (pushed) weighted automaton."""
        if isinstance(automaton, ByteDFA):
            table = automaton.host_table()
            source, byte = np.nonzero(table.next >= 0)
            target = table.next[source, byte].astype(np.int64)
            end = np.where(table.accept, 0.0, -np.inf)
            starts = np.zeros(1, dtype=np.int64)
            return cls(_offset(source, len(end)), byte, target, np.zeros(len(byte)), end, starts)
        source, byte, target, weight, end, start = automaton.pushed()
        order = np.argsort(source, kind="stable")
        offset = _offset(source[order], len(end))
        starts = np.flatnonzero(np.isfinite(start))
        return cls(offset, byte[order], target[order], weight[order], end, starts)

    def stopping(self) -> Arcs:
        """Return the automaton that stops (weight 1) as soon as it may end."""
        stops = np.isfinite(self.end)
        source = np.repeat(np.arange(len(self.end)), np.diff(self.offset))
        kept = ~stops[source]
        return Arcs(
            _offset(source[kept], len(self.end)),
            self.byte[kept],
            self.target[kept],
            self.weight[kept],
            self.end,
            self.starts,
            certain_end=True,
        )

    def meet(self, dfa: Table) -> Arcs:
        """Run both automata side by side; state q of this and r of `dfa` is q * len(dfa) + r.

        Raises:
            ConstraintError: more than 2**24 arcs.
        """
        n = len(dfa)
        if len(self.byte) * n > MOST_ARCS:
            raise ConstraintError(
                f"a weighted automaton of {len(self.byte)} arcs and an automaton of {n} states "
                f"have more than {MOST_ARCS} arcs together, too many to look ahead along"
            )
        source = np.repeat(np.arange(len(self.end)), np.diff(self.offset))
        to = dfa.next[:, self.byte].T.astype(np.int64)  # [E, n]
        arc, r = np.nonzero(to >= 0)
        code = source[arc] * n + r
        order = np.argsort(code, kind="stable")
        arc, to = arc[order], to[arc, r][order]
        end = self.end[:, None] + np.where(dfa.accept, 0.0, -np.inf)
        offset = _offset(code[order], end.size)
        target = self.target[arc] * n + to
        starts = self.starts * n
        return Arcs(offset, self.byte[arc], target, self.weight[arc], end.ravel(), starts)


def _offset(source: IntArray, n: int) -> IntArray:
    """Return where the arcs of each of n states begin, from their sources in ascending order."""
    out: IntArray = np.searchsorted(source, np.arange(n + 1)).astype(np.int64)
    return out


class FutureTable:
    """log psi of every reachable pair of an automaton state and an n-gram context.

    Args:
        arcs: the automaton.
        model: the byte model.
        max_bytes: most bytes of a text, respected exactly; None: no limit.
        device: where the sums are taken and the table lives.
        local: probabilities that depend on the pair, in place of the model's.

    Attributes:
        codes: int64[J], ascending: state * len(model) + context of each pair.
        log_psi: float64[M, J] on the device. Row m is psi_m, the last one stands for all
            larger m. Without a limit there is one row.

    Raises:
        ConstraintError: more than 2**24 arcs between pairs, or (without a limit) infinite sums.
    """

    def __init__(
        self,
        arcs: Arcs,
        model: ByteNgram,
        max_bytes: int | None,
        device: torch.device,
        local: LocalRows | EdgeMeans | None = None,
    ) -> None:
        self.model = model
        self.device = device
        self.codes, source, target, byte, weight = _product(arcs, model)
        state, context = np.divmod(self.codes, len(model))
        logp = _logp(model, local, state[source], context[source], byte)
        end = arcs.end[state]
        if not arcs.certain_end:
            end = end + _logp(model, local, state, context, EOS_COLUMN)
        source, target, weight = _merged(source, target, weight + logp, len(self.codes))
        fits = max_bytes is not None and (max_bytes + 1) * len(end) * 8 <= MOST_BYTES
        self.limited = fits
        if max_bytes is not None and fits:
            self.log_psi = _limited(source, target, weight, end, max_bytes, device)
        else:
            self.log_psi = _unlimited(source, target, weight, end, device)[None]
        self._codes = torch.from_numpy(self.codes).to(device)

    def __len__(self) -> int:
        """Return the number of pairs, J."""
        return len(self.codes)

    def look(self, codes: torch.Tensor, left: int) -> torch.Tensor:
        """log psi of pairs when `left` more bytes may be read; -inf for what is no pair.

        Args:
            codes: int64 of any shape; negative for a state that is dead.
            left: at least 0.
        """
        row = self.log_psi[min(left, len(self.log_psi) - 1)]
        at = torch.searchsorted(self._codes, codes).clamp_(max=len(self) - 1)
        return torch.where(self._codes[at] == codes, row[at], -torch.inf)


def _product(arcs: Arcs, model: ByteNgram) -> tuple[IntArray, IntArray, IntArray, IntArray, Float]:
    """Find the reachable pairs, and the arcs between them.

    Returns:
        codes int64[J], ascending; source, target int64[E] as positions in codes, grouped by
        source; byte int64[E]; weight float64[E] of the automaton's arcs.
    """
    width = len(model)
    frontier = np.unique(arcs.starts * width + model.start)
    seen = frontier
    parts = []
    total = 0
    while len(frontier):
        state, context = np.divmod(frontier, width)
        first, stop = arcs.offset[state], arcs.offset[state + 1]
        total += int((stop - first).sum())
        if total > MOST_ARCS:
            raise ConstraintError(
                f"the look-ahead needs more than {MOST_ARCS} arcs between automaton states and "
                f"contexts of an n-gram of order {model.order}; take a lower order, or fewer "
                "max_states for an automaton that approximates"
            )
        arc = ragged(first, stop)
        source = np.repeat(frontier, stop - first)
        byte = arcs.byte[arc]
        target = arcs.target[arc] * width + model.after[np.repeat(context, stop - first), byte]
        parts.append((source, target, byte, arcs.weight[arc]))
        frontier = np.setdiff1d(target, seen)
        seen = np.union1d(seen, frontier)
    source, target, byte, weight = (np.concatenate(x) for x in zip(*parts, strict=True))
    order = np.argsort(source, kind="stable")
    place = np.searchsorted(seen, source[order]), np.searchsorted(seen, target[order])
    return seen, *place, byte[order], weight[order]


def _logp(
    model: ByteNgram,
    local: LocalRows | EdgeMeans | None,
    state: IntArray,
    context: IntArray,
    symbol: IntArray | int,
) -> Float:
    """Return log probabilities of symbols in pairs of states and contexts, float64[m]."""
    if local is not None:
        return local.log(state, context, symbol)
    out: Float = np.log(model.rows[context, symbol])
    return out


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
        self.lengths = torch.from_numpy(lengths).to(device)
        self.source = torch.from_numpy(source).to(device)
        self.target = torch.from_numpy(target).to(device)
        self.weight = torch.from_numpy(weight).to(device)
        self.end = torch.from_numpy(end).to(device)

    def __call__(self, psi: torch.Tensor) -> torch.Tensor:
        if not len(self.target):
            return self.end
        terms = self.weight + psi[self.target]
        top = torch.segment_reduce(terms, "max", lengths=self.lengths, initial=-torch.inf)
        top = torch.maximum(top, self.end)
        shift = torch.where(torch.isneginf(top), 0.0, top)
        terms = (terms - shift[self.source]).exp_()
        total = torch.segment_reduce(terms, "sum", lengths=self.lengths, initial=0.0)
        return shift + torch.log(total + (self.end - shift).exp())


def _limited(
    source: IntArray,
    target: IntArray,
    weight: Float,
    end: Float,
    max_bytes: int,
    device: torch.device,
) -> torch.Tensor:
    sweep = _Sweep(source, target, weight, end, device)
    rows = [sweep.end]
    for _ in range(max_bytes):
        rows.append(sweep(rows[-1]))
        if _change(rows[-1], rows[-2]) == 0.0:
            break
    return torch.stack(rows)


def _unlimited(
    source: IntArray, target: IntArray, weight: Float, end: Float, device: torch.device
) -> torch.Tensor:
    if len(end) <= _DENSE:
        return torch.from_numpy(total_weights(source, target, weight, end)).to(device)
    sweep = _Sweep(source, target, weight, end, device)
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
