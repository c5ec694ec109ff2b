"""Nondeterministic automata, and the subset construction (Rabin and Scott 1959)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from genlm_bytes_smc.constraints.automaton import MAX_STATES, Table, too_large
from genlm_bytes_smc.constraints.base import DEAD


@dataclass
class Nfa:
    """A nondeterministic automaton over K symbols, grown state by state.

    A label is a sequence of symbols; an arc carries the number of a label, so that many arcs
    share one. State 0 is the start.
    """

    n_symbols: int
    labels: list[Sequence[int]] = field(default_factory=list)
    silent: list[list[int]] = field(default_factory=list)
    arcs: list[list[tuple[int, int]]] = field(default_factory=list)
    accept: set[int] = field(default_factory=set)
    limit: int = MAX_STATES

    def state(self) -> int:
        """A new state."""
        if len(self.arcs) >= 4 * self.limit:
            raise too_large(self.limit)
        self.silent.append([])
        self.arcs.append([])
        return len(self.arcs) - 1


def determinize(nfa: Nfa) -> Table:
    """The subset construction; sets of states are the bits of Python integers."""
    closures: dict[int, int] = {}

    def closure(start: int) -> int:
        bits = closures.get(start)
        if bits is None:
            seen, stack, bits = {start}, [start], 0
            while stack:
                q = stack.pop()
                if nfa.arcs[q] or q in nfa.accept:
                    bits |= 1 << q
                for r in nfa.silent[q]:
                    if r not in seen:
                        seen.add(r)
                        stack.append(r)
            closures[start] = bits
        return bits

    accepting = sum(1 << q for q in nfa.accept)
    number = {closure(0): 0}
    queue = list(number)
    rows: list[dict[int, int]] = []
    for bits in queue:
        by_label: dict[int, int] = {}
        for q in _ones(bits):
            for label, target in nfa.arcs[q]:
                by_label[label] = by_label.get(label, 0) | closure(target)
        by_symbol: dict[int, int] = {}
        for label, targets in by_label.items():
            for symbol in nfa.labels[label]:
                by_symbol[symbol] = by_symbol.get(symbol, 0) | targets
        row = {}
        for symbol, targets in by_symbol.items():
            if targets:
                if targets not in number:
                    if len(number) >= nfa.limit:
                        raise too_large(nfa.limit)
                    number[targets] = len(number)
                    queue.append(targets)
                row[symbol] = number[targets]
        rows.append(row)
    table = np.full((len(rows), nfa.n_symbols), DEAD, dtype=np.int32)
    for q, row in enumerate(rows):
        table[q, list(row)] = list(row.values())
    return Table(table, np.array([bool(bits & accepting) for bits in queue]))


def _ones(bits: int) -> list[int]:
    """Positions of the bits that are set."""
    out = []
    while bits:
        low = bits & -bits
        out.append(low.bit_length() - 1)
        bits ^= low
    return out
