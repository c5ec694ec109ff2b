"""Lookarounds in nondeterministic automata, resolved.

Lookarounds are silent steps that hold in some places only. A place is described by what has been
read (the states of automata that recognise the texts that end in each lookbehind) and by what has
been promised of the rest (the states of automata over the rest, one for each lookahead on the
way). Places are states of a larger automaton, in which no condition is left.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np

from genlm_bytes_smc.constraints.automata import (
    Deadline,
    EmptyLanguageError,
    Nfa,
    Table,
    determinize,
)
from genlm_bytes_smc.constraints.base import DEAD


@dataclass
class Conditional(Nfa):
    """An automaton with silent steps (state, assertion, state) that hold where assertions do."""

    conditions: list[tuple[int, Assertion, int]] = field(default_factory=list)


@dataclass(eq=False)
class Assertion:
    """A lookaround.

    Attributes:
        behind: whether it looks at what has been read.
        positive: whether it holds where `nfa` accepts, or where not.
        nfa: of the rests (behind: of the texts read) in which the body is found.
    """

    behind: bool
    positive: bool
    nfa: Conditional


class _Promise(NamedTuple):
    """An automaton over the rest (`_Places.tables[table]` in `state`), and if it is to accept."""

    table: int
    state: int
    positive: bool


_Promises = frozenset[_Promise]


class _Place(NamedTuple):
    """A state of an automaton, with the states of lookbehinds and the promises there."""

    q: int
    behind: tuple[int, ...]
    promises: _Promises


def without_conditions(
    nfa: Conditional, assertions: Sequence[Assertion], deadline: Deadline
) -> Nfa:
    """Return an automaton without conditions of the same language.

    Args:
        nfa: the automaton, with labels (those of its assertions, too).
        assertions: all that are in it, those inside another one before it.
        deadline: see `determinize`.

    Raises:
        ConstraintError: an automaton on the way takes more states or time than it may.
    """
    places = _Places(nfa, deadline)
    for assertion in assertions:
        if assertion.behind:
            places.behind[assertion] = places.table(assertion, (0,) * len(places.behind))
    return places.resolved(nfa, (0,) * len(places.behind))


class _Places:
    """What is known of the places of an automaton.

    Attributes:
        labels: the symbols of each label, those of the automaton first.
        tables: automata of lookbehinds and, for the states of lookbehinds in which they are met,
            of lookaheads; the last row of each is the dead state's, which -1 reads.
        behind: the table of each lookbehind, which is also its place in `_Place.behind`.
    """

    def __init__(self, nfa: Conditional, deadline: Deadline) -> None:
        self.labels = [tuple(symbols) for symbols in nfa.labels]
        self._label = {symbols: i for i, symbols in enumerate(self.labels)}
        self._n_symbols = 1 + max(chain.from_iterable(self.labels), default=-1)
        self._limit, self._deadline = nfa.limit, deadline
        self.tables: list[Table] = []
        self.behind: dict[Assertion, int] = {}
        self._ahead: dict[tuple[Assertion, tuple[int, ...]], int] = {}
        self._after: dict[tuple[_Place, int], list[tuple[int, _Place]]] = {}

    def resolved(self, nfa: Conditional, behind: tuple[int, ...]) -> Nfa:
        """Return an automaton without conditions; it begins with lookbehinds in these states."""
        out = Nfa(self.labels, limit=self._limit)
        queue = [_Place(0, behind, frozenset())]
        number = {queue[0]: out.state()}

        def at(place: _Place) -> int:
            if place not in number:
                number[place] = out.state()
                queue.append(place)
            return number[place]

        steps, conditions, arcs = defaultdict(list), defaultdict(list), defaultdict(list)
        for source, target in nfa.silent:
            steps[source].append(target)
        for source, assertion, target in nfa.conditions:
            conditions[source].append((assertion, target))
        for source, label, target in nfa.arcs:
            arcs[source].append((label, target))
        for place in queue:
            self._deadline.check()
            here = number[place]
            for target in steps[place.q]:
                out.silent.append((here, at(place._replace(q=target))))
            for assertion, target in conditions[place.q]:
                passed = self._passed(assertion, place)
                if passed is not None:
                    out.silent.append((here, at(place._replace(q=target, promises=passed))))
            for label, target in arcs[place.q]:
                for read, after in self._read(place, label):
                    out.arcs.append((here, read, at(after._replace(q=target))))
            if place.q in nfa.accept and all(
                self.tables[p.table].accept[p.state] == p.positive for p in place.promises
            ):
                out.accept.add(here)
        return out

    def table(self, assertion: Assertion, behind: tuple[int, ...]) -> int:
        """Make the automaton of an assertion, and return its number."""
        try:
            found = determinize(self.resolved(assertion.nfa, behind), self._deadline)
        except EmptyLanguageError:
            found = Table(np.zeros((0, 0), np.int32), np.zeros(0, np.bool_))
        next_ = np.full((len(found) + 1, self._n_symbols), DEAD, dtype=np.int32)
        next_[:-1, : found.next.shape[1]] = found.next
        self.tables.append(Table(next_, np.append(found.accept, False)))
        return len(self.tables) - 1

    def _passed(self, assertion: Assertion, place: _Place) -> _Promises | None:
        """Return the promises after an assertion was passed (None: it does not hold)."""
        if assertion.behind:
            table = self.behind[assertion]
            accepts = self.tables[table].accept[place.behind[table]]
            return place.promises if accepts == assertion.positive else None
        key = assertion, place.behind
        if key not in self._ahead:
            self._ahead[key] = self.table(assertion, place.behind)
        return self._kept([*place.promises, _Promise(self._ahead[key], 0, assertion.positive)])

    def _read(self, place: _Place, label: int) -> list[tuple[int, _Place]]:
        """Return what reading a label leads to, by its symbols: (label, place) with q left at 0."""
        key = place._replace(q=0), label
        if key not in self._after:
            groups = defaultdict(list)
            for symbol in self.labels[label]:
                promises = self._kept(
                    [p._replace(state=self._next(p.table, p.state, symbol)) for p in place.promises]
                )
                if promises is not None:
                    behind = tuple(self._next(i, s, symbol) for i, s in enumerate(place.behind))
                    groups[_Place(0, behind, promises)].append(symbol)
            self._after[key] = [(self._number(tuple(s)), after) for after, s in groups.items()]
        return self._after[key]

    def _number(self, symbols: tuple[int, ...]) -> int:
        """Return the label of some symbols."""
        number = self._label.setdefault(symbols, len(self.labels))
        if number == len(self.labels):
            self.labels.append(symbols)
        return number

    def _next(self, table: int, state: int, symbol: int) -> int:
        return int(self.tables[table].next[state, symbol])

    def _kept(self, promises: Sequence[_Promise]) -> _Promises | None:
        """Return the promises that are still open, or None if one is broken."""
        still = set()
        for promise in promises:
            table, state = self.tables[promise.table], promise.state
            # The dead state accepts no rest; in a minimal automaton one at most accepts each.
            if state != DEAD and not (table.accept[state] and (table.next[state] == state).all()):
                still.add(promise)
            elif table.accept[state] != promise.positive:
                return None
        return frozenset(still)
