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
from genlm_bytes_smc.constraints.automaton import (
    Int32,
    IntArray,
    Table,
    distinct_rows,
    too_large,
)
from genlm_bytes_smc.constraints.base import DEAD

N_CODEPOINTS = 0x110000
SURROGATES = slice(0xD800, 0xE000)


def bytes_of_characters(table: Table, class_of: IntArray, limit: int) -> Table:
    """The automaton over bytes of an automaton over character classes.

    Args:
        table: a trimmed automaton over K classes.
        class_of: int[0x110000], the class of each code point, or -1.
        limit: the most states to make.

    Returns:
        A trimmed automaton over bytes whose first `len(table)` states are those of `table`;
        minimal if `table` is.

    Raises:
        ConstraintError: more than `limit` states would be needed.
    """
    class_of = class_of.astype(np.int64)
    class_of[SURROGATES] = DEAD
    # The classes of a state's row, with -1 (the last column) for no class.
    targets = np.append(table.next, np.full((len(table), 1), DEAD, np.int32), axis=1)
    inside = _Inside(len(table), limit)

    ends, block = _fold(class_of)  # two-byte characters: the last 6 bits are left to read
    ids1 = inside.states(targets, ends)
    middles, group = _fold(_with_none(block, ends))
    # The first 32 blocks of E0's group and the first 16 groups of F0's quarter would be
    # overlong encodings of shorter characters; F4 stops at the last code point.
    none1, none2 = len(ends), len(middles) + 1
    first = middles[group[0]].copy()
    first[:32] = none1
    ids2 = inside.states(_with_dead(ids1), np.append(middles, first[None], axis=0))
    overlong, beyond = np.full(16, none2), np.full(48, none2)
    quarters = np.concatenate([overlong, group[16:], beyond]).reshape(5, 64)
    ids3 = inside.states(_with_dead(ids2), quarters)

    out = np.full((len(table) + len(inside.rows), N_BYTES), DEAD, dtype=np.int32)
    chars = out[: len(table)]
    chars[:, :0x80] = targets[:, class_of[:0x80]]
    chars[:, 0xC2:0xE0] = _with_dead(ids1)[:, block[2:32]]
    chars[:, 0xE0] = ids2[:, -1]
    chars[:, 0xE1:0xF0] = ids2[:, group[1:16]]
    chars[:, 0xF0:0xF5] = ids3
    if inside.rows:
        rows = np.frombuffer(b"".join(inside.rows), dtype=np.int32)
        out[len(table) :, 0x80:0xC0] = rows.reshape(-1, 64)
    accept = np.append(table.accept, np.zeros(len(inside.rows), dtype=bool))
    return Table(out, accept)


def _fold(values: IntArray) -> tuple[IntArray, IntArray]:
    """(the distinct rows of 64 of `values`, the number of the row at each place)."""
    rows = values.reshape(-1, 64)
    first, inverse = distinct_rows(rows)
    return rows[first], inverse


def _with_none(block: IntArray, ends: IntArray) -> IntArray:
    """Block numbers in which blocks without any class are `len(ends)`."""
    empty = np.append((ends < 0).all(axis=1), True)
    return np.where(empty[block], len(ends), block)


def _with_dead(ids: Int32) -> Int32:
    """`ids` with a last column of -1, to be read for "none"."""
    return np.append(ids, np.full((len(ids), 1), DEAD, np.int32), axis=1)


class _Inside:
    """The byte states inside characters, each made once."""

    def __init__(self, offset: int, limit: int) -> None:
        self.rows: dict[bytes, int] = {}  # targets of the 64 continuation bytes -> state
        self._offset = offset
        self._limit = limit

    def states(self, children: Int32, nodes: IntArray) -> Int32:
        """Compose: children int32[Q, C] and nodes int[M, 64] over C -> states int32[Q, M].

        Entry (q, m) is the state whose continuation byte i leads to
        children[q, nodes[m, i]], or -1 where all of these are -1.
        """
        out = np.empty((len(children), len(nodes)), dtype=np.int32)
        for m, node in enumerate(nodes):
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
