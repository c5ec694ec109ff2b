"""Deterministic automata on the host, as flat arrays: minimal ones, and those over UTF-8.

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

To read bytes instead of characters, an automaton is composed with a UTF-8 decoder. A block of 64
consecutive code points shares all bytes of its encoding but the last, 64 blocks share all but the
last two, and so on; the decoder is therefore the array of the characters' classes folded by 64s,
equal blocks once (what is written there as ranges is the construction of Thompson's UTF-8
matchers in Cox, "Regular Expression Matching in the Wild", 2010).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.alphabet import N_BYTES
from genlm_bytes_smc.constraints.automata import loops_numba as compiled
from genlm_bytes_smc.constraints.base import DEAD, BoolArray, ConstraintError, IntArray

Int32 = npt.NDArray[np.int32]

N_CODEPOINTS = 0x110000
SURROGATES = slice(0xD800, 0xE000)  # they have no UTF-8
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


class OutgrownError(ConstraintError):
    """The construction of an automaton outgrows a limit: of states, time or memory."""


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
    reached = in_walking_order(table)
    columns, column_of = distinct_columns(reached.next)
    source, symbol = np.nonzero(columns >= 0)
    arcs = np.stack([source, symbol, columns[source, symbol]])
    small = quotient(arcs, reached.accept, columns.shape[1], len(table))
    return in_walking_order(Table(small.next[:, column_of], small.accept))


def quotient(arcs: IntArray, accept: BoolArray, n_symbols: int, limit: int) -> Table:
    """Return the minimal automaton of arcs, its states but for the start in any order.

    Args:
        arcs: int64[3, A], the source, symbol and target of each in any order. The start, which
            is 0, leads to every state.
        accept: bool[S].
        n_symbols: how many symbols there are.
        limit: most states of the minimal automaton.

    Raises:
        ConstraintError: the language is empty, or more states or memory are needed.
    """
    source, symbol, target = arcs
    useful = compiled.reach(*grouped(target, source, len(accept)), np.flatnonzero(accept))
    if not useful[0]:
        raise empty_language()
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
    swap = classes[0]  # the start becomes 0
    classes = np.where(classes == 0, swap, np.where(classes == swap, 0, classes))
    first[[0, swap]] = first[[swap, 0]]
    table = np.full((len(first), n_symbols), DEAD, dtype=np.int32)
    table[classes[source], symbol] = classes[target]
    return Table(table, accept[first])


def in_walking_order(table: Table) -> Table:
    """Return the states that the start leads to, numbered as a breadth-first walk meets them."""
    order = compiled.walk(np.ascontiguousarray(table.next))
    name = np.full(len(table) + 1, DEAD, dtype=np.int32)
    name[order] = np.arange(len(order), dtype=np.int32)
    return Table(name[table.next[order]], table.accept[order])  # -1 reads the last, which is -1


def with_dead(rows: Int32) -> Int32:
    """Return a table with a last column of -1, which the symbol -1 reads."""
    return np.append(rows, np.full((len(rows), 1), DEAD, np.int32), axis=1)


def distinct_rows(rows: npt.NDArray[np.generic]) -> tuple[IntArray, IntArray]:
    """Return where distinct rows come first, and for each row the number of its distinct row."""
    rows = np.ascontiguousarray(rows)
    whole = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).ravel()
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    return first, inverse.reshape(-1)


def distinct_columns(table: Int32) -> tuple[Int32, IntArray]:
    """Return the distinct columns, and for each column the number of its distinct one."""
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


def bytes_of_characters(table: Table, class_of: IntArray, limit: int, deadline: Deadline) -> Table:
    """Return the automaton over bytes of an automaton over character classes.

    If the automaton over characters is minimal and trimmed then so is the one over bytes: states
    between characters stay distinct, and a state inside a character is known by what each
    continuation byte leads to.

    Args:
        table: a trimmed automaton over K classes.
        class_of: int[0x110000], the class of each code point, or -1.
        limit: the most states to make.
        deadline: until when.

    Returns:
        A trimmed automaton whose first `len(table)` states are those of `table`.

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
    return Table(np.append(out, more, axis=0), np.append(table.accept, np.zeros(len(more), bool)))


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
