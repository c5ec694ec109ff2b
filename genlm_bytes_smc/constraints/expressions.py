"""Regular expressions as trees, and the minimal byte automata that they become.

The letters of a tree are bytes or code points. Letters that every class treats alike become one
symbol, so Thompson's construction (1968) and the subset construction work on a handful of
symbols; symbols become bytes, or the UTF-8 of characters, once, at the end.

Lookarounds are silent steps that hold in some places only. A place is described by what has been
read (the states of automata that recognise the texts that end in each lookbehind) and by what has
been promised of the rest (the states of automata over the rest, one for each lookahead on the
way). Places are states of a larger automaton, in which no condition is left.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import numpy as np

from genlm_bytes_smc.alphabet import N_BYTES
from genlm_bytes_smc.constraints.automata import (
    FOREVER,
    N_CODEPOINTS,
    SURROGATES,
    Deadline,
    Nfa,
    Table,
    bytes_of_characters,
    determinize,
    in_walking_order,
    ragged,
    with_dead,
)
from genlm_bytes_smc.constraints.base import DEAD, EmptyLanguageError, IntArray


@dataclass(frozen=True, eq=False)
class Chars:
    """One letter of a class: `runs` int64[R, 2] of half-open ranges of letters."""

    runs: IntArray


@dataclass(frozen=True)
class Concat:
    """One part after the other."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Alternation:
    """Any of the branches."""

    branches: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    """`body` at least `low` and at most `high` times (None: any number)."""

    body: Node
    low: int
    high: int | None


@dataclass(frozen=True)
class Look:
    """The empty text where `body` is found ahead of it or behind it, or (not positive) is not."""

    behind: bool
    positive: bool
    body: Node


Node = Chars | Concat | Alternation | Repeat | Look


@lru_cache(maxsize=4096)
def letter(code: int) -> Chars:
    """Return the class of one letter, the same object each time."""
    return Chars(np.array([[code, code + 1]]))


ANY = Chars(np.array([[0, N_CODEPOINTS]]))  # character


def table_of_bytes(tree: Node, limit: int) -> Table:
    """Return the minimal automaton of an expression over bytes.

    Raises:
        ConstraintError: the language is empty, or more than `limit` states are needed.
    """
    table, symbol_of = _table_of(tree, N_BYTES, limit, FOREVER)
    return in_walking_order(Table(with_dead(table.next)[:, symbol_of], table.accept))


def table_of_characters(tree: Node, limit: int, deadline: Deadline = FOREVER) -> Table:
    """Return the minimal automaton over UTF-8 of an expression over code points.

    Raises:
        ConstraintError: the language is empty, or more than `limit` states or more time than
            until `deadline` is needed.
    """
    return bytes_of_characters(*_table_of(tree, N_CODEPOINTS, limit, deadline), limit, deadline)


def _table_of(tree: Node, n_letters: int, limit: int, deadline: Deadline) -> tuple[Table, IntArray]:
    """Return the minimal automaton over symbols, and the symbol of each letter (-1: none)."""
    draw = _Thompson(limit, {}, {})
    nfa = draw.whole(tree)
    symbol_of, nfa.labels = partition(list(draw.label_of), n_letters)
    if nfa.conditions:
        looks = [(look, inner) for look, (_, inner) in draw.looks.items()]
        nfa = _Places(nfa, looks, deadline).without_conditions()
    return determinize(nfa, deadline), symbol_of


def partition(classes: Sequence[Chars], n_letters: int) -> tuple[IntArray, list[Sequence[int]]]:
    """Make one symbol of letters that are in the same classes.

    Args:
        classes: the classes.
        n_letters: how many letters there are. Surrogates count as being in no class.

    Returns:
        int64[n_letters], the symbol of each letter or -1 for those in no class; and for each
        class the symbols it consists of.
    """
    excluded = (SURROGATES.start, SURROGATES.stop) if n_letters == N_CODEPOINTS else (0, 0)
    cuts = np.unique(
        np.concatenate([[0, *excluded, n_letters], *(c.runs.ravel() for c in classes)])
    )
    outside = (cuts[:-1] >= excluded[0]) & (cuts[:-1] < excluded[1])
    inside = []  # the pieces between two cuts that each class consists of
    symbol = np.full(len(cuts) - 1, -1, dtype=np.int64)
    n_symbols = 0
    for c in classes:
        pieces = ragged(*np.searchsorted(cuts, c.runs).T)
        inside.append(pieces := pieces[~outside[pieces]])
        # The class's share of each symbol becomes a new one; what is left of it keeps its number.
        old, new = np.unique(symbol[pieces], return_inverse=True)
        symbol[pieces] = n_symbols + new
        n_symbols += len(old)
    some = symbol >= 0
    symbol[some] = np.unique(symbol[some], return_inverse=True)[1]
    labels: list[Sequence[int]] = [np.unique(symbol[pieces]).tolist() for pieces in inside]
    return np.repeat(symbol, np.diff(cuts)), labels


class _Thompson:
    """Thompson's construction: `add` draws a tree from a state and returns where it ends.

    Lookarounds are drawn as automata of their own, of the rests (behind: of the texts read) in
    which the body is found, inner ones first. All share the numbers of letters, `label_of`, and
    the lookarounds, `looks`, numbered.
    """

    def __init__(
        self, limit: int, label_of: dict[Chars, int], looks: dict[Look, tuple[int, Nfa]]
    ) -> None:
        self.nfa = Nfa(limit=limit)
        self.label_of, self.looks = label_of, looks

    def whole(self, tree: Node) -> Nfa:
        """Draw a tree from the first state to the one that accepts."""
        self.nfa.accept.add(self.add(tree, self.nfa.state()))
        return self.nfa

    def _look(self, node: Look) -> int:
        """Return the number of a lookaround, which is drawn if it is new."""
        if node not in self.looks:
            everything = Repeat(ANY, 0, None)
            parts = (everything, node.body) if node.behind else (node.body, everything)
            inner = _Thompson(self.nfa.limit, self.label_of, self.looks).whole(Concat(parts))
            self.looks[node] = len(self.looks), inner
        return self.looks[node][0]

    def add(self, node: Node, start: int) -> int:
        if isinstance(node, Concat):
            for part in node.parts:
                start = self.add(part, start)
            return start
        if isinstance(node, Alternation):
            return self._alternation(node, start)
        if isinstance(node, Repeat):
            return self._repeat(node, start)
        end = self.nfa.state()
        if isinstance(node, Look):
            self.nfa.conditions.append((start, self._look(node), end))
        else:
            label = self.label_of.setdefault(node, len(self.label_of))
            self.nfa.arcs.append((start, label, end))
        return end

    def _alternation(self, node: Alternation, start: int) -> int:
        """Draw the branches, common beginnings once (a prefix tree of words)."""
        end = self.nfa.state()
        child: dict[tuple[int, Chars], int] = {}
        for branch in node.branches:
            q, parts = start, branch.parts if isinstance(branch, Concat) else (branch,)
            n = 0
            while n < len(parts) and isinstance(part := parts[n], Chars):
                key = q, part
                if key not in child:
                    child[key] = self.add(part, q)
                q = child[key]
                n += 1
            self.nfa.silent.append((self.add(Concat(parts[n:]), q), end))
        return end

    def _repeat(self, node: Repeat, start: int) -> int:
        nfa = self.nfa
        for _ in range(node.low):
            start = self.add(node.body, start)
        end = nfa.state()
        if node.high is None:
            nfa.silent.append((start, end))
            nfa.silent.append((self.add(node.body, end), end))
            return end
        # Optional copies are nested, a(a(a)?)?, so that leaving takes one silent step.
        for _ in range(node.high - node.low):
            first = nfa.state()
            nfa.silent += [(start, first), (start, end)]
            start = self.add(node.body, first)
        nfa.silent.append((start, end))
        return end


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


class _Places:
    """The places of an automaton with conditions.

    Args:
        nfa: the automaton, with labels (those of its lookarounds, too).
        looks: its lookarounds by number, with an automaton each; inner ones come first.
        deadline: see `determinize`.

    Attributes:
        labels: the symbols of each label, those of the automaton first.
        tables: automata of lookbehinds and, for the states of lookbehinds in which they are met,
            of lookaheads; the last row of each is the dead state's, which -1 reads.
        behind: the table of each lookbehind, which is also its place in `_Place.behind`.
    """

    def __init__(self, nfa: Nfa, looks: Sequence[tuple[Look, Nfa]], deadline: Deadline) -> None:
        self._nfa, self._looks = nfa, looks
        self.labels = [tuple(symbols) for symbols in nfa.labels]
        self._label = {symbols: i for i, symbols in enumerate(self.labels)}
        self._n_symbols = 1 + max(chain.from_iterable(self.labels), default=-1)
        self._limit, self._deadline = nfa.limit, deadline
        self.tables: list[Table] = []
        self.behind: dict[int, int] = {}
        self._ahead: dict[tuple[int, tuple[int, ...]], int] = {}
        self._after: dict[tuple[_Place, int], list[tuple[int, _Place]]] = {}

    def without_conditions(self) -> Nfa:
        """Return an automaton without conditions of the same language.

        Raises:
            ConstraintError: an automaton on the way takes more states or time than it may.
        """
        for number, (look, _) in enumerate(self._looks):
            if look.behind:
                self.behind[number] = self._table(number, (0,) * len(self.behind))
        return self._resolved(self._nfa, (0,) * len(self.behind))

    def _resolved(self, nfa: Nfa, behind: tuple[int, ...]) -> Nfa:
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
        for source, look, target in nfa.conditions:
            conditions[source].append((look, target))
        for source, label, target in nfa.arcs:
            arcs[source].append((label, target))
        for place in queue:
            self._deadline.check()
            here = number[place]
            for target in steps[place.q]:
                out.silent.append((here, at(place._replace(q=target))))
            for look, target in conditions[place.q]:
                passed = self._passed(look, place)
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

    def _table(self, number: int, behind: tuple[int, ...]) -> int:
        """Make the automaton of a lookaround, and return its place in `tables`."""
        try:
            found = determinize(self._resolved(self._looks[number][1], behind), self._deadline)
        except EmptyLanguageError:
            found = Table(np.zeros((0, 0), np.int32), np.zeros(0, np.bool_))
        next_ = np.full((len(found) + 1, self._n_symbols), DEAD, dtype=np.int32)
        next_[:-1, : found.next.shape[1]] = found.next
        self.tables.append(Table(next_, np.append(found.accept, False)))
        return len(self.tables) - 1

    def _passed(self, number: int, place: _Place) -> _Promises | None:
        """Return the promises after a lookaround was passed (None: it does not hold)."""
        look = self._looks[number][0]
        if look.behind:
            table = self.behind[number]
            accepts = self.tables[table].accept[place.behind[table]]
            return place.promises if accepts == look.positive else None
        key = number, place.behind
        if key not in self._ahead:
            self._ahead[key] = self._table(*key)
        return self._kept([*place.promises, _Promise(self._ahead[key], 0, look.positive)])

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
