"""Deterministic automata on the host, as flat arrays: trimming, minimisation, products.

A deterministic automaton is a `Table` over any alphabet of K symbols (bytes, or classes of
characters); state 0 is the start::

    next    int32[S, K]   the state after a symbol, -1 where there is none (dead)
    accept  bool[S]       whether the text may end here

`minimal` returns the smallest automaton of the language, with states numbered in the order a
breadth-first walk meets them. Two tables over one alphabet therefore spell the same language
exactly when their minimal forms are equal arrays, and in a minimal table every state can be
reached and can reach acceptance: every prefix it admits can be completed.

Minimisation refines a partition by signatures, and looks again only at the predecessors of
states that changed class, after Hopcroft 1971 and Blom and Orzan 2003.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.constraints.base import DEAD, ConstraintError

Int32 = npt.NDArray[np.int32]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

MAX_STATES = 50_000


@dataclass(frozen=True)
class Table:
    """A deterministic automaton; see the module for the layout."""

    next: Int32
    accept: BoolArray

    def __len__(self) -> int:
        return len(self.next)


def too_large(limit: int) -> ConstraintError:
    """The error for an automaton that outgrows its limit."""
    return ConstraintError(
        f"the automaton needs more than max_states={limit} states; raise max_states "
        "(a state takes 1 KiB on the device) or write a smaller constraint"
    )


def minimal(table: Table) -> Table:
    """The minimal automaton of the same language, in canonical numbering.

    Raises:
        ConstraintError: the language is empty.
    """
    columns, column_of = _distinct_columns(table.next)
    small = trim(Table(columns, table.accept))
    classes = _refine(small)
    _, representative, classes = np.unique(classes, return_index=True, return_inverse=True)
    merged = np.append(classes, DEAD)[small.next[representative]].astype(np.int32)
    whole = Table(merged[:, column_of], small.accept[representative])
    return in_walking_order(whole, int(classes[0]))


def in_walking_order(table: Table, start: int = 0) -> Table:
    """The states reachable from `start`, numbered as a breadth-first walk meets them."""
    order = _walk(table.next, start)
    return Table(_renumber(table.next[order], order, len(table)), table.accept[order])


def trim(table: Table) -> Table:
    """Only the states that can be reached and can reach acceptance.

    Raises:
        ConstraintError: the language is empty.
    """
    reached = np.zeros(len(table), dtype=bool)
    reached[_walk(table.next, 0)] = True
    source, symbol = np.nonzero(table.next >= 0)
    into = _Arcs(table.next[source, symbol].astype(np.int64), source, len(table))
    alive = table.accept & reached
    frontier = np.flatnonzero(alive)
    while len(frontier):
        frontier = np.unique(into.of(frontier))
        frontier = frontier[~alive[frontier] & reached[frontier]]
        alive[frontier] = True
    if not alive[0]:
        raise ConstraintError("the constraint admits no text at all: its language is empty")
    kept = np.flatnonzero(alive)
    return Table(_renumber(table.next[kept], kept, len(table)), table.accept[kept])


def combine(
    a: Table, b: Table, accept: Callable[[BoolArray, BoolArray], BoolArray], limit: int
) -> Table:
    """The automaton that runs `a` and `b` side by side, minimal.

    A pair of states accepts where `accept(a accepts, b accepts)`; a pair from which neither
    or, for an intersection, not both can go on is dead by trimming.
    """
    columns, column_of = _distinct_columns(np.concatenate([a.next, b.next]))
    next_a = np.concatenate([columns[: len(a)], np.full_like(columns[:1], DEAD)]).astype(np.int64)
    next_b = np.concatenate([columns[len(a) :], np.full_like(columns[:1], DEAD)]).astype(np.int64)
    accept_a, accept_b = np.append(a.accept, False), np.append(b.accept, False)
    width = len(next_b)
    both_needed = not accept(np.array([True]), np.array([False]))[0]

    pairs = np.zeros(1, dtype=np.int64)  # a pair is p * width + q; its place is its number
    place = {0: 0}
    rows = []
    while len(pairs):
        p, q = next_a[pairs // width], next_b[pairs % width]
        dead = (p < 0) | (q < 0) if both_needed else (p < 0) & (q < 0)
        code = np.where(p < 0, len(a), p) * width + np.where(q < 0, len(b), q)
        code[dead] = DEAD
        values, inverse = np.unique(code, return_inverse=True)
        fresh = []
        numbers = np.empty(len(values), dtype=np.int32)
        for i, value in enumerate(values.tolist()):
            if value >= 0 and value not in place:
                if len(place) >= limit * 4:
                    raise too_large(limit)
                place[value] = len(place)
                fresh.append(value)
            numbers[i] = place.get(value, DEAD)
        rows.append(numbers[inverse].reshape(code.shape))
        pairs = np.array(fresh, dtype=np.int64)
    codes = np.fromiter(place, dtype=np.int64, count=len(place))
    accepting = accept(accept_a[codes // width], accept_b[codes % width])
    return minimal(Table(np.concatenate(rows)[:, column_of], accepting))


def distinct_rows(rows: npt.NDArray[np.generic]) -> tuple[IntArray, IntArray]:
    """(first place of each distinct row, for each row the number of its distinct row)."""
    rows = np.ascontiguousarray(rows)
    whole = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).ravel()
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    return first, inverse.reshape(-1)


def _distinct_columns(table: Int32) -> tuple[Int32, IntArray]:
    first, inverse = distinct_rows(table.T)
    return table[:, first], inverse


def _renumber(table: Int32, kept: IntArray, n: int) -> Int32:
    """`table` with state `kept[i]` called i and every other state dead."""
    name = np.full(n + 1, DEAD, dtype=np.int32)
    name[kept] = np.arange(len(kept), dtype=np.int32)
    return name[table]  # -1 reads the last entry, which is -1


def _walk(table: Int32, start: int) -> IntArray:
    """The states reachable from `start` in breadth-first order, int64[m]."""
    seen = np.zeros(len(table), dtype=bool)
    seen[start] = True
    frontier = np.array([start], dtype=np.int64)
    levels = []
    while len(frontier):
        levels.append(frontier)
        targets = table[frontier].ravel()
        values, first = np.unique(targets, return_index=True)
        new = (values >= 0) & ~seen[values]
        frontier = values[new][np.argsort(first[new])].astype(np.int64)
        seen[frontier] = True
    walked: IntArray = np.concatenate(levels)
    return walked


class _Arcs:
    """Sources of arcs grouped by target (compressed rows)."""

    def __init__(self, target: IntArray, source: IntArray, n: int) -> None:
        order = np.argsort(target, kind="stable")
        self._source = source[order]
        self._offset = np.searchsorted(target[order], np.arange(n + 1))

    def of(self, targets: IntArray) -> IntArray:
        """Every source of every target given, int64[m]."""
        sources: IntArray = self._source[ragged(self._offset[targets], self._offset[targets + 1])]
        return sources


def ragged(start: IntArray, stop: IntArray) -> IntArray:
    """The ranges start[i]..stop[i] one after another, int64[sum of lengths]."""
    count = stop - start
    ends = np.cumsum(count)
    total = int(ends[-1]) if len(ends) else 0
    out: IntArray = np.arange(total) + np.repeat(start - ends + count, count)
    return out


def _refine(table: Table) -> IntArray:
    """The class of each state of a trimmed table in its coarsest congruence, int64[S]."""
    n = len(table)
    source, symbol = np.nonzero(table.next >= 0)
    into = _Arcs(table.next[source, symbol].astype(np.int64), source, n)
    successor = np.where(table.next < 0, n, table.next)
    classes = np.append(table.accept.astype(np.int64), 2)  # the dead state is a class of its own
    n_classes = 3
    affected = np.arange(n, dtype=np.int64)
    while len(affected):
        own = classes[affected]
        signature = np.concatenate([own[:, None], classes[successor[affected]]], axis=1)
        first, group = distinct_rows(signature)
        size = np.bincount(group, minlength=len(first))
        owner = own[first]  # the class each group comes out of
        members = np.bincount(classes, minlength=n_classes)
        untouched = members[owner] - np.bincount(own, minlength=n_classes)[owner]
        # One part of a class keeps its number: those not looked at, else its largest group.
        order = np.lexsort((-size, owner))
        leads = np.ones(len(order), dtype=bool)
        leads[1:] = owner[order][1:] != owner[order][:-1]
        keeps = np.zeros(len(first), dtype=bool)
        keeps[order[leads]] = True
        keeps &= untouched == 0
        fresh = np.flatnonzero(~keeps)
        name = owner.copy()
        name[fresh] = n_classes + np.arange(len(fresh))
        n_classes += len(fresh)
        classes[affected] = name[group]
        changed = affected[~keeps[group]]
        affected = np.unique(into.of(changed))
    return np.asarray(classes[:n], dtype=np.int64)
