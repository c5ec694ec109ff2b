"""Automata as flat arrays on the host, without weights, and the minimal ones of their languages.

A deterministic automaton is a `Table` over any alphabet of K symbols (bytes, or classes of
characters); state 0 is the start::

    next    int32[S, K]   the state after a symbol, -1 where there is none (dead)
    accept  bool[S]       whether the text may end here

`minimal` and `determinize` return the smallest automaton of a language, with states numbered in
the order a breadth-first walk meets them. Two tables over one alphabet therefore spell the same
language exactly when their minimal forms are equal arrays, and in a minimal table every state can
be reached and can reach acceptance: every prefix it admits can be completed.

Minimisation is Valmari's (2012) refinement of states and arcs in turns, O(A log A) for A arcs.

To read bytes instead of characters, an automaton is composed with a UTF-8 decoder. A block of 64
consecutive code points shares all bytes of its encoding but the last, 64 blocks share all but the
last two, and so on; the decoder is therefore the array of the characters' classes folded by 64s,
equal blocks once (what is written there as ranges is the construction of Thompson's UTF-8
matchers in Cox, "Regular Expression Matching in the Wild", 2010).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.alphabet import N_BYTES
from genlm_bytes_smc.constraints import automata_numba as compiled
from genlm_bytes_smc.constraints.base import (
    DEAD,
    BoolArray,
    EmptyLanguageError,
    IntArray,
    OutgrownError,
    too_large,
)

Int32 = npt.NDArray[np.int32]

MAX_STATES = 50_000
MAX_SECONDS = 20.0
MOST = 1 << 26  # entries of an array that a construction needs on its way, of 4 to 12 bytes each
N_CODEPOINTS = 0x110000
SURROGATES = slice(0xD800, 0xE000)  # they have no UTF-8
_SLICE = 20_000_000  # members between two looks at the clock
_BYTES = [[byte] for byte in range(N_BYTES)]


@dataclass(frozen=True)
class Table:
    """A deterministic automaton; see the module for the layout."""

    next: Int32
    accept: BoolArray

    def __len__(self) -> int:
        return len(self.next)


@dataclass
class Nfa:
    """A nondeterministic automaton, grown state by state. State 0 is the start.

    A label is a sequence of symbols; an arc carries the number of a label, so that many arcs
    share one.

    Attributes:
        labels: the symbols of each label; unless given, label b is byte b.
        n_states: how many states there are.
        silent: (state, state) of each silent step.
        arcs: (state, label, state) of each arc.
        accept: the states that accept.
        conditions: (state, number, state) of silent steps that hold where a lookaround does; an
            automaton that has some is not for `determinize`.
        limit: most states of the minimal automaton; four times as many are allowed here.
    """

    labels: Sequence[Sequence[int]] = field(default_factory=lambda: _BYTES)
    n_states: int = 0
    silent: list[tuple[int, int]] = field(default_factory=list)
    arcs: list[tuple[int, int, int]] = field(default_factory=list)
    accept: set[int] = field(default_factory=set)
    conditions: list[tuple[int, int, int]] = field(default_factory=list)
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


class Deadline:
    """The seconds that the construction of an automaton may take from now on (None: no end)."""

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = seconds
        self._end = math.inf if seconds is None else time.monotonic() + seconds

    def check(self) -> None:
        """Raise OutgrownError if the time is over."""
        if time.monotonic() > self._end:
            raise OutgrownError(
                f"the automaton takes longer to construct than max_seconds={self.seconds:g}; "
                "raise max_seconds (None: no limit) or write a smaller constraint"
            )


FOREVER = Deadline()


def minimal(table: Table) -> Table:
    """Return the minimal automaton of the same language, in canonical numbering.

    Raises:
        ConstraintError: the language is empty.
    """
    reached = in_walking_order(table)
    first, column_of = distinct_rows(reached.next.T)
    columns = reached.next[:, first]
    source, symbol = np.nonzero(columns >= 0)
    arcs = np.stack([source, symbol, columns[source, symbol]])
    small = _quotient(arcs, reached.accept, columns.shape[1], len(table))
    return in_walking_order(Table(small.next[:, column_of], small.accept))


def _quotient(arcs: IntArray, accept: BoolArray, n_symbols: int, limit: int) -> Table:
    """Return the minimal automaton of arcs.

    Args:
        arcs: int64[3, A], the source, symbol and target of each in any order. The start, which
            is 0, leads to every state.
        accept: bool[S].
        n_symbols, limit: how many symbols there are, and most states of the minimal automaton.

    Raises:
        ConstraintError: the language is empty, or more states or memory are needed.
    """
    source, symbol, target = arcs
    useful = compiled.reach(*grouped(target, source, len(accept)), np.flatnonzero(accept))
    if not useful[0]:
        raise EmptyLanguageError
    name = np.cumsum(useful) - 1
    kept = useful[source] & useful[target]
    source, symbol, target = name[source[kept]], symbol[kept], name[target[kept]]
    accept = accept[useful]
    by_symbol = np.argsort(symbol, kind="stable")
    into = grouped(target, np.arange(len(target)), len(accept))
    classes = compiled.coarsest(source, symbol, by_symbol, *into, accept)
    _, first, classes = np.unique(classes, return_index=True, return_inverse=True)
    if len(first) > limit:
        raise too_large(limit)
    if len(first) * n_symbols > MOST:
        raise OutgrownError(
            f"the automaton has {len(first)} states over {n_symbols} classes of characters, "
            f"a table of more than {MOST} entries; write a smaller constraint"
        )
    table = np.full((len(first), n_symbols), DEAD, dtype=np.int32)
    table[classes[source], symbol] = classes[target]
    return in_walking_order(Table(table, accept[first]), int(classes[0]))


def in_walking_order(table: Table, start: int = 0) -> Table:
    """Return the states that the start leads to, numbered as a breadth-first walk meets them."""
    order = compiled.walk(np.ascontiguousarray(table.next), start)
    name = np.full(len(table) + 1, DEAD, dtype=np.int32)
    name[order] = np.arange(len(order), dtype=np.int32)
    return Table(name[table.next[order]], table.accept[order])  # -1 reads the last, which is -1


def determinize(
    nfa: Nfa,
    deadline: Deadline = FOREVER,
    accepting: Callable[[IntArray, IntArray], BoolArray] | None = None,
) -> Table:
    """Return the minimal automaton of the same language (Rabin and Scott 1959).

    The states that no text finishes are left out first, so every subset that is numbered can
    finish. There may be four times as many subsets as states in the end (a prefix tree has
    many more than the automaton of its words).

    `accepting` says which subsets accept, from the members of the subsets and the subset of each,
    both int64[M] (None: those with a member that does).

    Raises:
        ConstraintError: the language is empty, more than `nfa.limit` states are needed, or the
            construction takes too much time or memory.
    """
    arrays = _arrays(nfa)
    n_symbols = int(arrays.symbols.max(initial=-1)) + 1
    found, code = compiled.room(len(arrays.accept)), compiled.SLICE
    while code != compiled.DONE:
        code = compiled.subsets(arrays, found, n_symbols, _SLICE)
        deadline.check()
        if found.counts[0] > 4 * nfa.limit:
            raise too_large(nfa.limit)
        if code not in (compiled.DONE, compiled.SLICE):
            if found.counts[3] > MOST:
                raise OutgrownError(
                    f"the construction of the automaton goes over more than {MOST} members of "
                    "subsets or arcs, which takes too much memory; write a smaller constraint"
                )
            found = compiled.enlarged(found, code)
    states, n_arcs = found.counts[:2].tolist()
    accept = found.accept[:states]
    if accepting is not None:
        offset = found.offset[: states + 1]
        subset = np.repeat(np.arange(states), np.diff(offset))
        accept = accepting(found.members[: offset[-1]].astype(np.int64), subset)
    arcs = np.stack([a[:n_arcs] for a in (found.source, found.symbol, found.arc_target)])
    return _quotient(arcs.astype(np.int64), accept, n_symbols, nfa.limit)


def combine(
    a: Table, b: Table, accept: Callable[[BoolArray, BoolArray], BoolArray], limit: int
) -> Table:
    """Return the minimal automaton that runs two trimmed ones side by side.

    A text is accepted where `accept(a accepts, b accepts)`. The two are one nondeterministic
    automaton, behind a common start; a subset of its states has one state of each at most.
    """
    rows = np.append(a.next + (a.next >= 0), b.next + (b.next >= 0) * (len(a) + 1), axis=0)
    first, column_of = distinct_rows(rows.T)
    columns = rows[:, first]
    source, label = np.nonzero(columns >= 0)
    accepts = np.concatenate([[False], a.accept, b.accept])
    both = Nfa(
        labels=[[symbol] for symbol in range(columns.shape[1])],
        n_states=1 + len(columns),
        silent=[(0, 1), (0, 1 + len(a))],
        arcs=np.stack([source + 1, label, columns[source, label]], axis=1),  # type: ignore[arg-type]
        accept=set(np.flatnonzero(accepts).tolist()),
        limit=limit,
    )

    def accepting(members: IntArray, subset: IntArray) -> BoolArray:
        ends, own = accepts[members], members <= len(a)
        n = int(subset[-1]) + 1
        return accept(*(np.bincount(subset[x], minlength=n) > 0 for x in (ends & own, ends & ~own)))

    found = determinize(both, FOREVER, accepting)
    return in_walking_order(Table(found.next[:, column_of], found.accept))


def _arrays(nfa: Nfa) -> compiled.NfaArrays:
    """Return the states that can finish, as flat arrays."""
    n = nfa.n_states
    silent_source, silent = np.array(nfa.silent, dtype=np.int64).reshape(-1, 2).T
    source, label, target = np.array(nfa.arcs, dtype=np.int64).reshape(-1, 3).T
    accept = np.zeros(n, dtype=np.bool_)
    accept[list(nfa.accept)] = True
    symbols_of = np.array([len(symbols) for symbols in nfa.labels], dtype=np.int64)
    reads = symbols_of[label] > 0
    source, label, target = source[reads], label[reads], target[reads]

    backwards = np.concatenate([silent, target]), np.concatenate([silent_source, source])
    useful = compiled.reach(*grouped(*backwards, n), np.flatnonzero(accept))
    if not useful[0]:
        raise EmptyLanguageError
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
        np.fromiter(chain.from_iterable(nfa.labels), dtype=np.int64),
        before[arc_offset[1:]] - before[arc_offset[:-1]],
        accept[useful],
        np.random.default_rng(0).integers(2**64, size=useful.sum(), dtype=np.uint64),
    )


def with_dead(rows: Int32) -> Int32:
    """Return a table with a last column of -1, which the symbol -1 reads."""
    return np.append(rows, np.full((len(rows), 1), DEAD, np.int32), axis=1)


def distinct_rows(rows: npt.NDArray[np.generic]) -> tuple[IntArray, IntArray]:
    """Return where distinct rows come first, and for each row the number of its distinct row."""
    rows = np.ascontiguousarray(rows)
    whole = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).ravel()
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    return first, inverse.reshape(-1)


def ragged(start: IntArray, stop: IntArray) -> IntArray:
    """Return the ranges start[i]..stop[i] one after another, int64[sum of lengths]."""
    count = stop - start
    ends = np.cumsum(count)
    total = int(ends[-1]) if len(ends) else 0
    out: IntArray = np.arange(total) + np.repeat(start - ends + count, count)
    return out


def grouped(key: IntArray, values: IntArray, n: int) -> tuple[IntArray, IntArray]:
    """Group values by keys 0..n-1 as compressed rows: (offset int64[n + 1], values)."""
    offset = np.append(0, np.cumsum(np.bincount(key, minlength=n)))
    return offset, values[np.argsort(key, kind="stable")]


def bytes_of_characters(
    table: Table, class_of: IntArray, limit: int, deadline: Deadline = FOREVER
) -> Table:
    """Return the minimal automaton over bytes of a minimal one over character classes.

    States between characters stay distinct, and a state inside a character is known by what each
    continuation byte leads to.

    `class_of` is the class of each code point, int[0x110000], or -1; `limit` the most states.

    Raises:
        ConstraintError: more than `limit` states would be needed, or more time.
    """
    if len(table) > limit:
        raise too_large(limit)
    class_of = class_of.astype(np.int64)
    class_of[SURROGATES] = DEAD
    out = np.full((len(table), N_BYTES), DEAD, dtype=np.int32)
    out[:, :0x80] = with_dead(table.next)[:, class_of[:0x80]]
    # Below: the characters that are left to write with 2 to 4 bytes. What a longer form than
    # necessary would lead to is not made: the first blocks have no class there.
    class_of[:0x80] = DEAD
    inside = _Inside(len(table), limit, deadline)
    ends, block = _fold(class_of)  # the last 6 bits are left to read
    after_one = inside.states(table.next, ends)
    middles, group = _fold(_from(block, 32, len(ends)))
    after_two = inside.states(after_one, middles)
    # F4 stops at the last code point.
    starts = np.append(_from(group, 16, len(middles)), np.full(48, len(middles)))
    out[:, 0xC2:0xE0] = after_one[:, block[2:32]]
    out[:, 0xE0:0xF0] = after_two[:, group[:16]]
    out[:, 0xF0:0xF5] = inside.states(after_two, starts.reshape(5, 64))

    more = np.full((len(inside.rows), N_BYTES), DEAD, dtype=np.int32)
    more[:, 0x80:0xC0] = np.frombuffer(b"".join(inside.rows), dtype=np.int32).reshape(-1, 64)
    accept = np.append(table.accept, np.zeros(len(more), bool))
    return in_walking_order(Table(np.append(out, more, axis=0), accept))


def _fold(values: IntArray) -> tuple[IntArray, IntArray]:
    """Return the distinct rows of 64 of `values`, and the number of the row at each place."""
    rows = values.reshape(-1, 64)
    first, inverse = distinct_rows(rows)
    return rows[first], inverse


def _from(numbers: IntArray, first: int, none: int) -> IntArray:
    """Return `numbers` with `none` in the places before `first`."""
    return np.append(np.full(first, none), numbers[first:])


class _Inside:
    """The byte states inside characters, numbered from `offset`, each made once."""

    def __init__(self, offset: int, limit: int, deadline: Deadline) -> None:
        self.rows: dict[bytes, int] = {}  # targets of the 64 continuation bytes -> state
        self._offset, self._limit, self._deadline = offset, limit, deadline

    def states(self, children: Int32, nodes: IntArray) -> Int32:
        """Compose: children int32[Q, C] and nodes int[M, 64] over C -> states int32[Q, M].

        Entry (q, m) is the state whose continuation byte i leads to children[q, nodes[m, i]]
        (-1 for the node C or -1), or -1 where all of these are -1.
        """
        children = with_dead(children)
        out = np.empty((len(children), len(nodes)), dtype=np.int32)
        for m, node in enumerate(nodes):
            self._deadline.check()
            used, at = np.unique(node, return_inverse=True)
            choices = np.ascontiguousarray(children[:, used])
            first, which = distinct_rows(choices)
            rows = choices[first][:, at]
            numbers = np.full(len(rows), DEAD, dtype=np.int32)
            for i in np.flatnonzero((rows >= 0).any(axis=1)).tolist():
                fresh = self._offset + len(self.rows)
                numbers[i] = number = self.rows.setdefault(rows[i].tobytes(), fresh)
                if number >= self._limit:
                    raise too_large(self._limit)
            out[:, m] = numbers[which]
        return out
