"""Regular expressions as trees, and the minimal byte automata that they become.

The letters of a tree are bytes or code points. Letters that every class treats alike become one
symbol, so Thompson's construction (1968) and the subset construction work on a handful of
symbols; symbols become bytes, or the UTF-8 of characters, once, at the end.

To read bytes instead of characters, an automaton is composed with a UTF-8 decoder. A block of 64
consecutive code points shares all bytes of its encoding but the last, 64 blocks share all but the
last two, and so on; the decoder is therefore the array of the characters' classes folded by 64s,
equal blocks once (what is written there as ranges is the construction of Thompson's UTF-8
matchers in Cox, "Regular Expression Matching in the Wild", 2010).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from genlm_bytes_smc.alphabet import N_BYTES
from genlm_bytes_smc.constraints.automata import (
    FOREVER,
    Deadline,
    Int32,
    Table,
    determinize,
    distinct_rows,
    in_walking_order,
    ragged,
    too_large,
    with_dead,
)
from genlm_bytes_smc.constraints.base import DEAD, IntArray
from genlm_bytes_smc.constraints.lookarounds import Assertion, Conditional, without_conditions

N_CODEPOINTS = 0x110000
SURROGATES = slice(0xD800, 0xE000)  # they have no UTF-8


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


NEWLINE = letter(0x0A)
ANY = Chars(np.array([[0, N_CODEPOINTS]]))
_NO_NEWLINE = Chars(np.array([[0, 0x0A], [0x0B, N_CODEPOINTS]]))
START, END = Look(True, False, ANY), Look(False, False, ANY)  # of the text
# The end but for a last newline: no other letter comes, and nothing after a newline.
LAST_LINE_END = Look(False, False, Alternation((Concat((NEWLINE, ANY)), _NO_NEWLINE)))


def reads(node: Node) -> bool:
    """Return whether every text of a tree has at least one letter."""
    if isinstance(node, Concat):
        return any(map(reads, node.parts))
    if isinstance(node, Alternation):
        return all(map(reads, node.branches))
    return isinstance(node, Chars) or (
        isinstance(node, Repeat) and node.low > 0 and reads(node.body)
    )


def looks_ahead(node: Node) -> bool:
    """Return whether a tree holds a condition on what follows it."""
    if isinstance(node, Look):
        return not node.behind
    if isinstance(node, Repeat):
        return looks_ahead(node.body)
    parts = node.parts if isinstance(node, Concat) else ()
    return any(map(looks_ahead, node.branches if isinstance(node, Alternation) else parts))


def repeated(body: Node, low: int, high: int | None) -> Node:
    """Return `body{low,high}`; repeats of repeats become one where their counts have no gaps."""
    if isinstance(body, Concat) and len(body.parts) == 1:
        body = body.parts[0]
    if body == Concat(()) or high == 0 or (isinstance(body, Repeat) and body.high == 0):
        return Concat(())
    if isinstance(body, Repeat) and body.low <= 1:
        top = None if high is None or body.high is None else high * body.high
        return Repeat(body.body, body.low * low, top)
    return Repeat(body, low, high)


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
    plain = without_conditions(nfa, list(draw.looks.values()), deadline) if nfa.conditions else nfa
    return determinize(plain, deadline), symbol_of


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

    Lookarounds are drawn as automata of their own, inner ones first, which share `label_of` and
    `looks`.
    """

    def __init__(
        self, limit: int, label_of: dict[Chars, int], looks: dict[Look, Assertion]
    ) -> None:
        self.nfa = Conditional(limit=limit)
        self.label_of, self.looks = label_of, looks

    def whole(self, tree: Node) -> Conditional:
        """Draw a tree from the first state to the one that accepts."""
        self.nfa.accept.add(self.add(tree, self.nfa.state()))
        return self.nfa

    def _look(self, node: Look) -> Assertion:
        if node not in self.looks:
            everything = Repeat(ANY, 0, None)
            parts = (everything, node.body) if node.behind else (node.body, everything)
            inner = _Thompson(self.nfa.limit, self.label_of, self.looks).whole(Concat(parts))
            self.looks[node] = Assertion(node.behind, node.positive, inner)
        return self.looks[node]

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


def bytes_of_characters(
    table: Table, class_of: IntArray, limit: int, deadline: Deadline = FOREVER
) -> Table:
    """Return the minimal automaton over bytes of a minimal one over character classes.

    States between characters stay distinct, and a state inside a character is known by what each
    continuation byte leads to.

    Args:
        table: an automaton over K classes.
        class_of: int[0x110000], the class of each code point, or -1.
        limit, deadline: the most states to make, and until when.

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
