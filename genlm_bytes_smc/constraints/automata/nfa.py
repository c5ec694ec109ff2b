"""Nondeterministic automata, and the deterministic ones that they become.

Lookarounds are silent steps that hold in some places only. A place is described by what has been
read (the states of automata that recognise the texts that end in each lookbehind) and by what has
been promised of the rest (the states of automata over the rest, one for each lookahead on the
way). Places are states of a larger automaton, in which no condition is left.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np

from genlm_bytes_smc.constraints.automata import loops_numba as compiled
from genlm_bytes_smc.constraints.automata.table import (
    MAX_STATES,
    MOST,
    Deadline,
    EmptyLanguageError,
    OutgrownError,
    Table,
    distinct_columns,
    empty_language,
    grouped,
    in_walking_order,
    quotient,
    too_large,
)
from genlm_bytes_smc.constraints.base import DEAD, BoolArray, IntArray

_SLICE = 20_000_000  # members between two looks at the clock


@dataclass
class Nfa:
    """A nondeterministic automaton, grown state by state. State 0 is the start.

    A label is a sequence of symbols; an arc carries the number of a label, so that many arcs
    share one.

    Attributes:
        labels: the symbols of each label.
        n_states: how many states there are.
        silent: (state, state) of each silent step.
        arcs: (state, label, state) of each arc.
        accept: the states that accept.
        conditions: (state, assertion, state) of silent steps that hold where the assertion does.
        limit: most states of the minimal automaton; four times as many are allowed here.
    """

    labels: Sequence[Sequence[int]] = ()
    n_states: int = 0
    silent: list[tuple[int, int]] = field(default_factory=list)
    arcs: list[tuple[int, int, int]] = field(default_factory=list)
    accept: set[int] = field(default_factory=set)
    conditions: list[tuple[int, Assertion, int]] = field(default_factory=list)
    limit: int = MAX_STATES

    def state(self) -> int:
        """Add a state, and return its number.

        Raises:
            ConstraintError: there are four times `limit` states already.
        """
        if self.n_states >= 4 * self.limit:
            raise too_large(self.limit)
        self.n_states += 1
        return self.n_states - 1


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
    nfa: Nfa


def determinize(nfa: Nfa, deadline: Deadline | None = None) -> Table:
    """Return the minimal automaton of the same language; there are no conditions in it.

    The states that no text finishes are left out first, so every subset that is numbered can
    finish. There may be four times as many subsets as states in the end (a prefix tree has
    many more than the automaton of its words).

    Raises:
        ConstraintError: the language is empty, more than `nfa.limit` states are needed, or the
            construction takes too much time or memory.
    """
    return _determinized(_arrays(nfa), nfa.limit, deadline or Deadline())


def _determinized(
    arrays: compiled.NfaArrays,
    limit: int,
    deadline: Deadline,
    accepting: Callable[[IntArray, IntArray], BoolArray] | None = None,
) -> Table:
    """Return the minimal automaton of flat arrays.

    Args:
        arrays: the automaton.
        limit, deadline: as in `determinize`.
        accepting: from the members of the subsets and the subset of each, both int64[M], which
            subsets accept (None: those with a member that does).
    """
    n_symbols = int(arrays.symbols.max(initial=-1)) + 1
    found = _room(len(arrays.accept))
    while (code := compiled.subsets(arrays, found, n_symbols, _SLICE)) != compiled.DONE:
        deadline.check()
        if found.counts[0] > 4 * limit:
            raise too_large(limit)
        if code != compiled.SLICE:
            found = _enlarged(found, code)
    states, n_arcs = found.counts[:2].tolist()
    if states > 4 * limit:
        raise too_large(limit)
    accept = found.accept[:states]
    if accepting is not None:
        offset = found.offset[: states + 1]
        subset = np.repeat(np.arange(states), np.diff(offset))
        accept = accepting(found.members[: offset[-1]].astype(np.int64), subset)
    arcs = np.stack([a[:n_arcs] for a in (found.source, found.symbol, found.arc_target)])
    return in_walking_order(quotient(arcs.astype(np.int64), accept, n_symbols, limit))


def combine(
    a: Table, b: Table, accept: Callable[[BoolArray, BoolArray], BoolArray], limit: int
) -> Table:
    """Return the minimal automaton that runs two trimmed ones side by side.

    A text is accepted where `accept(a accepts, b accepts)`. The two are one nondeterministic
    automaton, behind a common start; a subset of its states has one state of each at most.
    """
    columns, column_of = distinct_columns(
        np.append(a.next + (a.next >= 0), b.next + (b.next >= 0) * (len(a) + 1), axis=0)
    )
    source, label = np.nonzero(columns >= 0)
    both = Nfa([[symbol] for symbol in range(columns.shape[1])], 1 + len(columns), limit=limit)
    both.silent = [(0, 1), (0, 1 + len(a))]
    accepts = np.concatenate([[False], a.accept, b.accept])
    both.accept = set(np.flatnonzero(accepts).tolist())

    def accepting(members: IntArray, subset: IntArray) -> BoolArray:
        ends, own = accepts[members], members <= len(a)
        n = int(subset[-1]) + 1
        return accept(*(np.bincount(subset[x], minlength=n) > 0 for x in (ends & own, ends & ~own)))

    arcs = np.stack([source + 1, label, columns[source, label]], axis=1)
    found = _determinized(_arrays(both, arcs), limit, Deadline(), accepting)
    return in_walking_order(Table(found.next[:, column_of], found.accept))


def _arrays(nfa: Nfa, arcs: IntArray | None = None) -> compiled.NfaArrays:
    """Return the states that can finish, as flat arrays; `arcs` int64[A, 3] are those of `nfa`."""
    n = nfa.n_states
    silent_source, silent = _flat(nfa.silent).reshape(-1, 2).T
    source, label, target = (_flat(nfa.arcs).reshape(-1, 3) if arcs is None else arcs).T
    accept = np.zeros(n, dtype=np.bool_)
    accept[list(nfa.accept)] = True
    symbols_of = np.array([len(symbols) for symbols in nfa.labels], dtype=np.int64)
    reads = symbols_of[label] > 0
    source, label, target = source[reads], label[reads], target[reads]

    backwards = np.concatenate([silent, target]), np.concatenate([silent_source, source])
    useful = compiled.reach(*grouped(*backwards, n), np.flatnonzero(accept))
    if not useful[0]:
        raise empty_language()
    step, arc = useful[silent], useful[target]  # what leads to a useful state comes from one
    name = np.cumsum(useful) - 1
    silent_offset, silent = grouped(name[silent_source[step]], name[silent[step]], useful.sum())
    source, label, target = name[source[arc]], label[arc], name[target[arc]]
    arc_offset, order = grouped(source, np.arange(len(source)), useful.sum())
    label, target = label[order], target[order]
    before = np.append(0, np.cumsum(symbols_of[label]))
    return compiled.NfaArrays(
        silent_offset,
        silent,
        arc_offset,
        label,
        target,
        np.append(0, np.cumsum(symbols_of)),
        _flat(nfa.labels),
        before[arc_offset[1:]] - before[arc_offset[:-1]],
        accept[useful],
        np.random.default_rng(0).integers(2**64, size=useful.sum(), dtype=np.uint64),
    )


def _flat(lists: Iterable[Sequence[int]]) -> IntArray:
    return np.fromiter(chain.from_iterable(lists), dtype=np.int64)


def _room(n: int) -> compiled.Subsets:
    """Make room for the first subsets of an automaton of `n` states."""
    return compiled.Subsets(
        members=np.empty(2 * n, dtype=np.int32),
        offset=np.zeros(1025, dtype=np.int64),
        hashes=np.empty(1024, dtype=np.uint64),
        accept=np.empty(1024, dtype=np.bool_),
        source=np.empty(1024, dtype=np.int32),
        symbol=np.empty(1024, dtype=np.int32),
        arc_target=np.empty(1024, dtype=np.int32),
        slots=np.empty(4096, dtype=np.int32),
        cells=np.empty((2, 1024), dtype=np.int64),
        counts=np.zeros(4, dtype=np.int64),
    )


def _enlarged(found: compiled.Subsets, what: int) -> compiled.Subsets:
    """Return a copy with at least twice as much room in the arrays that lack it."""
    wanted = int(found.counts[3])
    if wanted > MOST:
        raise OutgrownError(
            f"the construction of the automaton goes over more than {MOST} members of subsets or "
            "arcs, which takes too much memory; write a smaller constraint"
        )
    fields = {
        compiled.MEMBERS: ("members",),
        compiled.STATES: ("offset", "hashes", "accept", "slots"),
        compiled.ARCS: ("source", "symbol", "arc_target"),
        compiled.CELLS: ("cells",),
    }[what]
    larger = {}
    for name in fields:
        old = getattr(found, name)
        more = list(old.shape)
        more[-1] = max(len(old) if name == "slots" else wanted, old.shape[-1])
        larger[name] = np.concatenate([old, np.zeros(more, dtype=old.dtype)], axis=-1)
    return found._replace(**larger)


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


def without_conditions(nfa: Nfa, assertions: Sequence[Assertion], deadline: Deadline) -> Nfa:
    """Return an automaton without conditions of the same language.

    Args:
        nfa: the automaton, with labels (those of its assertions, too).
        assertions: all that are in it, those inside another one before it.
        deadline: until when.

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

    def __init__(self, nfa: Nfa, deadline: Deadline) -> None:
        self.labels = [tuple(symbols) for symbols in nfa.labels]
        self._label = {symbols: i for i, symbols in enumerate(self.labels)}
        self._n_symbols = 1 + max(chain.from_iterable(self.labels), default=-1)
        self._limit, self._deadline = nfa.limit, deadline
        self.tables: list[Table] = []
        self.behind: dict[Assertion, int] = {}
        self._ahead: dict[tuple[Assertion, tuple[int, ...]], int] = {}
        self._after: dict[tuple[_Place, int], list[tuple[int, _Place]]] = {}

    def resolved(self, nfa: Nfa, behind: tuple[int, ...]) -> Nfa:
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
