"""Anchors and lookaround in nondeterministic automata: silent steps that hold in some places only.

A place is described by what has been read (whether anything has, and the states of automata that
recognise the texts that end in each lookbehind) and by what has been promised of the rest (that
it is empty, or at most a newline, and the states of automata over the rest, one for each lookahead
on the way). Places are states of a larger automaton, in which no condition is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from genlm_bytes_smc.constraints.automata.nfa import Nfa, determinize
from genlm_bytes_smc.constraints.automata.table import Deadline, EmptyLanguageError, Table
from genlm_bytes_smc.constraints.base import DEAD


@dataclass
class Drawing:
    """An automaton with conditions: (state, condition, state) of each conditional silent step.

    A condition is "start" or "end" of the text, "line end" (the end but for a last newline), or
    an assertion.
    """

    nfa: Nfa
    conditions: list[tuple[int, str | Assertion, int]] = field(default_factory=list)


@dataclass(eq=False)
class Assertion:
    """A lookaround.

    Attributes:
        behind: whether it looks at what has been read.
        positive: whether it holds where `drawing` accepts, or where not.
        drawing: of the rests (behind: of the texts read) in which the body is found.
    """

    behind: bool
    positive: bool
    drawing: Drawing


class _Promise(NamedTuple):
    """An automaton over the rest (`Places.tables[table]` in `state`), and if it is to accept."""

    table: int
    state: int
    positive: bool


class _Place(NamedTuple):
    q: int
    read: bool
    rest: str
    behind: tuple[int, ...]
    promises: frozenset[_Promise]


class Places:
    """Automata without conditions of automata with them.

    Args:
        labels: the symbols of each label.
        newline: the label of a newline.
        limit: most states of an automaton, as for `Nfa`.
        behind: every lookbehind, those inside another one before it.
        deadline: until when.
    """

    def __init__(
        self,
        labels: Sequence[Sequence[int]],
        newline: int,
        limit: int,
        behind: Sequence[Assertion],
        deadline: Deadline,
    ) -> None:
        self.labels = [tuple(symbols) for symbols in labels]
        self._label = {symbols: i for i, symbols in enumerate(self.labels)}
        self._newline, self._limit, self.deadline = newline, limit, deadline
        self.tables: list[Table] = []
        self._ahead: dict[tuple[Assertion, bool, tuple[int, ...]], int] = {}
        self._behind: dict[Assertion, int] = {}
        for assertion in behind:
            self._behind[assertion] = self._table(assertion.drawing, False, self.start())

    def start(self) -> tuple[int, ...]:
        """Return the states of lookbehinds before anything is read."""
        return (0,) * len(self._behind)

    def resolve(self, drawing: Drawing, read: bool, behind: tuple[int, ...]) -> Nfa:
        """Return the automaton of `drawing` where lookbehinds are in states `behind`."""
        return _Resolution(self, drawing, _Place(0, read, "", behind, frozenset())).out

    def new(self) -> Nfa:
        """Return an automaton without states, over the labels that there are and will be."""
        return Nfa(self.labels, limit=self._limit)

    def label(self, symbols: tuple[int, ...]) -> int:
        """Return the label of some symbols."""
        number = self._label.setdefault(symbols, len(self.labels))
        if number == len(self.labels):
            self.labels.append(symbols)
        return number

    def newline(self) -> tuple[int, ...]:
        """Return the symbols that a newline is."""
        return self.labels[self._newline]

    def holds(self, assertion: Assertion, place: _Place) -> frozenset[_Promise] | None:
        """Return the promises after an assertion was passed (None: it does not hold)."""
        if assertion.behind:
            table = self._behind[assertion]
            accepts = self._accepts(table, place.behind[table])
            return place.promises if accepts == assertion.positive else None
        key = assertion, place.read, place.behind
        if key not in self._ahead:
            self._ahead[key] = self._table(assertion.drawing, place.read, place.behind)
        return self._kept([*place.promises, _Promise(self._ahead[key], 0, assertion.positive)])

    def after(
        self, place: _Place, symbol: int
    ) -> tuple[tuple[int, ...], frozenset[_Promise]] | None:
        """Return the lookbehinds' states and the promises after a symbol (None: one is broken)."""
        promises = self._kept(
            [p._replace(state=self._next(p.table, p.state, symbol)) for p in place.promises]
        )
        if promises is None:
            return None
        return tuple(self._next(i, s, symbol) for i, s in enumerate(place.behind)), promises

    def kept_at_end(self, promises: frozenset[_Promise]) -> bool:
        """Return whether all promises hold for a rest that is empty."""
        return all(self._accepts(p.table, p.state) == p.positive for p in promises)

    def _kept(self, promises: Sequence[_Promise]) -> frozenset[_Promise] | None:
        """Return the promises that are still open, or None if one is broken."""
        still = set()
        for promise in promises:
            settled = self._settled(promise.table, promise.state)
            if settled is None:
                still.add(promise)
            elif settled != promise.positive:
                return None
        return frozenset(still)

    def _settled(self, table: int, state: int) -> bool | None:
        """Return whether every rest is accepted from a state, or none (None: some are)."""
        if state == DEAD:
            return False
        found = self.tables[table]
        # In a minimal automaton one state at most accepts every rest.
        return True if found.accept[state] and (found.next[state] == state).all() else None

    def _accepts(self, table: int, state: int) -> bool:
        return state != DEAD and bool(self.tables[table].accept[state])

    def _next(self, table: int, state: int, symbol: int) -> int:
        return DEAD if state == DEAD else int(self.tables[table].next[state, symbol])

    def _table(self, drawing: Drawing, read: bool, behind: tuple[int, ...]) -> int:
        n_symbols = 1 + max((max(s, default=-1) for s in self.labels), default=-1)
        try:
            found = determinize(self.resolve(drawing, read, behind), self.deadline)
            next_ = np.full((len(found), n_symbols), DEAD, dtype=np.int32)
            next_[:, : found.next.shape[1]] = found.next
            table = Table(next_, found.accept)
        except EmptyLanguageError:
            table = Table(np.full((1, n_symbols), DEAD, np.int32), np.zeros(1, np.bool_))
        self.tables.append(table)
        return len(self.tables) - 1


class _Resolution:
    """The walk over the places of one drawing; `out` is the automaton that it finds."""

    def __init__(self, places: Places, drawing: Drawing, first: _Place) -> None:
        self.places, self.out = places, places.new()
        self.number = {first: self.out.state()}
        self.queue = [first]
        steps: dict[int, list[int]] = {}
        arcs: dict[int, list[tuple[int, int]]] = {}
        conditions: dict[int, list[tuple[str | Assertion, int]]] = {}
        for source, target in drawing.nfa.silent:
            steps.setdefault(source, []).append(target)
        for source, label, target in drawing.nfa.arcs:
            arcs.setdefault(source, []).append((label, target))
        for source, condition, target in drawing.conditions:
            conditions.setdefault(source, []).append((condition, target))
        for place in self.queue:
            places.deadline.check()
            here = self.number[place]
            for target in steps.get(place.q, ()):
                self.out.silent.append((here, self._at(place._replace(q=target))))
            for condition, target in conditions.get(place.q, ()):
                passed = self._passed(place, condition)
                if passed is not None:
                    self.out.silent.append((here, self._at(passed._replace(q=target))))
            for label, target in arcs.get(place.q, ()):
                self._read(place, label, target)
            if place.q in drawing.nfa.accept and places.kept_at_end(place.promises):
                self.out.accept.add(here)

    def _at(self, place: _Place) -> int:
        if place not in self.number:
            self.number[place] = self.out.state()
            self.queue.append(place)
        return self.number[place]

    def _passed(self, place: _Place, condition: str | Assertion) -> _Place | None:
        if isinstance(condition, Assertion):
            promises = self.places.holds(condition, place)
            return None if promises is None else place._replace(promises=promises)
        if condition == "start":
            return None if place.read else place
        stricter = "end" if "end" in (condition, place.rest) else "line end"
        return place._replace(rest=stricter)

    def _read(self, place: _Place, label: int, target: int) -> None:
        """Draw the arcs that read a label, one for each place that its symbols lead to."""
        symbols = self.places.labels[label]
        if place.rest:
            newline = set(self.places.newline()) if place.rest == "line end" else set()
            symbols = tuple(s for s in symbols if s in newline)
        rest = "end" if place.rest else ""
        if not place.behind and not place.promises:
            groups = {(place.behind, place.promises): list(symbols)} if symbols else {}
        else:
            groups = {}
            for symbol in symbols:
                after = self.places.after(place, symbol)
                if after is not None:
                    groups.setdefault(after, []).append(symbol)
        for (behind, promises), read in groups.items():
            there = self._at(_Place(target, True, rest, behind, promises))
            self.out.arcs.append((self.number[place], self.places.label(tuple(read)), there))
