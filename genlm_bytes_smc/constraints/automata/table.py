"""Deterministic automata on the host, as flat arrays: trimming, minimisation, products.

A deterministic automaton is a `Table` over any alphabet of K symbols (bytes, or classes of
characters); state 0 is the start::

    next    int32[S, K]   the state after a symbol, -1 where there is none (dead)
    accept  bool[S]       whether the text may end here

`minimal` returns the smallest automaton of the language, with states numbered in the order a
breadth-first walk meets them. Two tables over one alphabet therefore spell the same language
exactly when their minimal forms are equal arrays, and in a minimal table every state can be
reached and can reach acceptance: every prefix it admits can be completed.

Minimisation is Valmari's (2012) refinement of the states and of the arcs in turns, in
O(A log A) for A arcs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.constraints.automata import loops_numba as compiled
from genlm_bytes_smc.constraints.base import DEAD, BoolArray, ConstraintError, IntArray

Int32 = npt.NDArray[np.int32]

MAX_STATES = 50_000
MAX_SECONDS = 20.0
MOST = 1 << 26  # entries of an array that a construction needs on its way, of 4 to 12 bytes each


@dataclass(frozen=True)
class Table:
    """A deterministic automaton; see the module for the layout."""

    next: Int32
    accept: BoolArray

    def __len__(self) -> int:
        return len(self.next)


@dataclass(frozen=True)
class SparseTable:
    """A deterministic automaton by its arcs, in any order: int64[A] each, accept bool[S]."""

    source: IntArray
    symbol: IntArray
    target: IntArray
    accept: BoolArray
    n_symbols: int


class OutgrownError(ConstraintError):
    """The construction of an automaton outgrows a limit: of states, time or memory."""


class Deadline:
    """The time that the construction of an automaton may take, from now on.

    Args:
        seconds: how long (None: without end).
    """

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


def too_large(limit: int) -> OutgrownError:
    """Return the error for an automaton that outgrows its limit."""
    return OutgrownError(
        f"the automaton needs more than max_states={limit} states; raise max_states "
        "(a state takes 1 KiB on the device) or write a smaller constraint"
    )


class EmptyLanguageError(ConstraintError):
    """An automaton accepts nothing."""


def empty_language() -> EmptyLanguageError:
    """Return the error for an automaton that accepts nothing."""
    return EmptyLanguageError("the constraint admits no text at all: its language is empty")


def minimal(table: Table) -> Table:
    """Return the minimal automaton of the same language, in canonical numbering.

    Raises:
        ConstraintError: the language is empty.
    """
    columns, column_of = _distinct_columns(table.next)
    source, symbol = np.nonzero(columns >= 0)
    target = columns[source, symbol].astype(np.int64)
    small = _quotient(SparseTable(source, symbol, target, table.accept, columns.shape[1]))
    return in_walking_order(Table(small.next[:, column_of], small.accept))


def minimal_of_arcs(arcs: SparseTable, limit: int) -> Table:
    """Return the minimal automaton of one that is given by its arcs.

    Raises:
        ConstraintError: the language is empty, or more than `limit` states are needed.
    """
    return in_walking_order(_quotient(arcs, limit))


def _quotient(arcs: SparseTable, limit: int | None = None) -> Table:
    """Return the minimal automaton, its states but for the start in any order."""
    n = len(arcs.accept)
    into = grouped(arcs.target, arcs.source, n)
    useful = compiled.reach(*into, np.flatnonzero(arcs.accept))
    useful &= compiled.reach(*grouped(arcs.source, arcs.target, n), np.zeros(1, dtype=np.int64))
    if not useful[0]:
        raise empty_language()
    name = np.cumsum(useful) - 1
    kept = useful[arcs.source] & useful[arcs.target]
    source, symbol, target = name[arcs.source[kept]], arcs.symbol[kept], name[arcs.target[kept]]
    accept = arcs.accept[useful]
    by_symbol = np.argsort(symbol, kind="stable")
    into = grouped(target, np.arange(len(target)), len(accept))
    classes = compiled.coarsest(source, symbol, by_symbol, *into, accept)
    _, first, classes = np.unique(classes, return_index=True, return_inverse=True)
    if limit is not None and len(first) > limit:
        raise too_large(limit)
    if len(first) * arcs.n_symbols > MOST:
        raise OutgrownError(
            f"the automaton has {len(first)} states over {arcs.n_symbols} classes of characters, "
            f"a table of more than {MOST} entries; write a smaller constraint"
        )
    swap = classes[0]  # the start becomes 0
    classes = np.where(classes == 0, swap, np.where(classes == swap, 0, classes))
    first[[0, swap]] = first[[swap, 0]]
    table = np.full((len(first), arcs.n_symbols), DEAD, dtype=np.int32)
    table[classes[source], symbol] = classes[target]
    return Table(table, accept[first])


def in_walking_order(table: Table) -> Table:
    """Return the states that the start leads to, numbered as a breadth-first walk meets them."""
    order = compiled.walk(np.ascontiguousarray(table.next))
    name = np.full(len(table) + 1, DEAD, dtype=np.int32)
    name[order] = np.arange(len(order), dtype=np.int32)
    return Table(name[table.next[order]], table.accept[order])  # -1 reads the last, which is -1


def combine(
    a: Table, b: Table, accept: Callable[[BoolArray, BoolArray], BoolArray], limit: int
) -> Table:
    """Return the minimal automaton that runs `a` and `b` side by side.

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
    """Return where distinct rows come first, and for each row the number of its distinct row."""
    rows = np.ascontiguousarray(rows)
    whole = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).ravel()
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    return first, inverse.reshape(-1)


def _distinct_columns(table: Int32) -> tuple[Int32, IntArray]:
    first, inverse = distinct_rows(table.T)
    return table[:, first], inverse


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
