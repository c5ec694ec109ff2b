"""From automata over classes of characters to automata over the bytes of their UTF-8.

The characters are partitioned into K classes by an int array over all code points (-1: in no
class, and so are the surrogates, which have no UTF-8). A block of 64 consecutive code points
shares all bytes of its encoding but the last, 64 blocks share all but the last two, and so
on; a UTF-8 decoder is therefore this array folded by 64s, equal blocks once (what is written
there as ranges is the construction of Thompson's UTF-8 matchers in Cox, "Regular Expression
Matching in the Wild", 2010). Composing that decoder with a state's row gives the byte states
inside a character; equal ones are made once.

If the automaton over characters is minimal and trimmed then so is the one over bytes: states
between characters stay distinct, and a state inside a character is known by what each
continuation byte leads to, which is what equality here compares.
"""

from __future__ import annotations

import numpy as np

from genlm_bytes_smc.alphabet import N_BYTES
from genlm_bytes_smc.constraints.automata.table import (
    Deadline,
    Int32,
    Table,
    distinct_rows,
    too_large,
)
from genlm_bytes_smc.constraints.base import DEAD, IntArray

N_CODEPOINTS = 0x110000
SURROGATES = slice(0xD800, 0xE000)


def bytes_of_characters(table: Table, class_of: IntArray, limit: int, deadline: Deadline) -> Table:
    """Return the automaton over bytes of an automaton over character classes.

    Args:
        table: a trimmed automaton over K classes.
        class_of: int[0x110000], the class of each code point, or -1.
        limit: the most states to make.
        deadline: until when.

    Returns:
        A trimmed automaton over bytes whose first `len(table)` states are those of `table`;
        minimal if `table` is.

    Raises:
        ConstraintError: more than `limit` states would be needed, or more time.
    """
    if len(table) > limit:
        raise too_large(limit)
    # The classes of a state's row, with -1 (the last column) for no class.
    targets = np.append(table.next, np.full((len(table), 1), DEAD, np.int32), axis=1)
    class_of = class_of.astype(np.int64)
    class_of[SURROGATES] = DEAD
    ascii_ = targets[:, class_of[:0x80]]
    # Below: the characters that are left to write with 2 to 4 bytes. What a longer form than
    # necessary would lead to is not made: the first blocks have no class there.
    class_of[:0x80] = DEAD
    inside = _Inside(len(table), limit, deadline)
    ends, block = _fold(class_of)  # the last 6 bits are left to read
    ids1 = inside.states(targets, ends)
    middles, group = _fold(_from(block, 32, len(ends)))
    ids2 = inside.states(_with_dead(ids1), middles)
    # F4 stops at the last code point.
    starts = np.append(_from(group, 16, len(middles)), np.full(48, len(middles)))
    ids3 = inside.states(_with_dead(ids2), starts.reshape(5, 64))

    out = np.full((len(table) + len(inside.rows), N_BYTES), DEAD, dtype=np.int32)
    chars = out[: len(table)]
    chars[:, :0x80] = ascii_
    chars[:, 0xC2:0xE0] = ids1[:, block[2:32]]
    chars[:, 0xE0:0xF0] = ids2[:, group[:16]]
    chars[:, 0xF0:0xF5] = ids3
    if inside.rows:
        rows = np.frombuffer(b"".join(inside.rows), dtype=np.int32)
        out[len(table) :, 0x80:0xC0] = rows.reshape(-1, 64)
    accept = np.append(table.accept, np.zeros(len(inside.rows), dtype=bool))
    return Table(out, accept)


def _fold(values: IntArray) -> tuple[IntArray, IntArray]:
    """Return the distinct rows of 64 of `values`, and the number of the row at each place."""
    rows = values.reshape(-1, 64)
    first, inverse = distinct_rows(rows)
    return rows[first], inverse


def _from(numbers: IntArray, first: int, none: int) -> IntArray:
    """Return `numbers` with `none` in the places before `first`."""
    return np.append(np.full(first, none), numbers[first:])


def _with_dead(ids: Int32) -> Int32:
    """Return `ids` with a last column of -1, to be read for "none"."""
    return np.append(ids, np.full((len(ids), 1), DEAD, np.int32), axis=1)


class _Inside:
    """The byte states inside characters, each made once."""

    def __init__(self, offset: int, limit: int, deadline: Deadline) -> None:
        self.rows: dict[bytes, int] = {}  # targets of the 64 continuation bytes -> state
        self._offset = offset
        self._limit = limit
        self._deadline = deadline

    def states(self, children: Int32, nodes: IntArray) -> Int32:
        """Compose: children int32[Q, C] and nodes int[M, 64] over C -> states int32[Q, M].

        Entry (q, m) is the state whose continuation byte i leads to
        children[q, nodes[m, i]], or -1 where all of these are -1.
        """
        out = np.empty((len(children), len(nodes)), dtype=np.int32)
        for m, node in enumerate(nodes):
            self._deadline.check()
            used, at = np.unique(node, return_inverse=True)
            choices = np.ascontiguousarray(children[:, used])
            first, which = distinct_rows(choices)
            out[:, m] = self._number(choices[first][:, at])[which]
        return out

    def _number(self, rows: Int32) -> Int32:
        numbers = np.full(len(rows), DEAD, dtype=np.int32)
        for i in np.flatnonzero((rows >= 0).any(axis=1)).tolist():
            key = rows[i].tobytes()
            number = self.rows.get(key)
            if number is None:
                number = self._offset + len(self.rows)
                if number >= self._limit:
                    raise too_large(self._limit)
                self.rows[key] = number
            numbers[i] = number
        return numbers
