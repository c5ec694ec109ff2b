"""Regular expressions as trees, and the minimal byte automata that they become.

The letters of a tree are bytes or code points. Letters that every class treats alike become one
symbol, so Thompson's construction (1968) and the subset construction work on a handful of
symbols; symbols become bytes, or the UTF-8 of characters, once, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from genlm_bytes_smc.alphabet import N_BYTES
from genlm_bytes_smc.constraints.automata.nfa import Nfa, determinize
from genlm_bytes_smc.constraints.automata.places import Assertion, Drawing, Places
from genlm_bytes_smc.constraints.automata.table import (
    Deadline,
    Table,
    in_walking_order,
    ragged,
)
from genlm_bytes_smc.constraints.automata.utf8 import (
    N_CODEPOINTS,
    SURROGATES,
    bytes_of_characters,
)
from genlm_bytes_smc.constraints.base import DEAD, IntArray


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
class Anchor:
    """The empty text at a certain place.

    Attributes:
        kind: "start" or "end" of the text, or "line end" (the end but for a last newline).
    """

    kind: str


@dataclass(frozen=True)
class Look:
    """The empty text where `body` is found ahead of it or behind it, or (not positive) is not."""

    behind: bool
    positive: bool
    body: Node


Node = Chars | Concat | Alternation | Repeat | Anchor | Look


@lru_cache(maxsize=4096)
def letter(code: int) -> Chars:
    """Return the class of one letter, the same object each time."""
    return Chars(np.array([[code, code + 1]]))


_NEWLINE = letter(0x0A)
_EVERYTHING = Repeat(Chars(np.array([[0, N_CODEPOINTS]])), 0, None)


def table_of_bytes(tree: Node, limit: int) -> Table:
    """Return the minimal automaton of an expression over bytes.

    Raises:
        ConstraintError: the language is empty, or more than `limit` states are needed.
    """
    nfa, symbol_of = _nfa_of(tree, N_BYTES, slice(0, 0), limit, Deadline())
    table = determinize(nfa)
    dead = np.full((len(table), 1), DEAD, np.int32)  # symbol -1 reads it
    wide = np.append(table.next, dead, axis=1)[:, symbol_of]
    return in_walking_order(Table(wide, table.accept))


def table_of_characters(tree: Node, limit: int, deadline: Deadline) -> Table:
    """Return the minimal automaton over UTF-8 of an expression over code points.

    Raises:
        ConstraintError: the language is empty, or more than `limit` states or more time than
            until `deadline` is needed.
    """
    nfa, symbol_of = _nfa_of(tree, N_CODEPOINTS, SURROGATES, limit, deadline)
    deadline.check()
    characters = determinize(nfa, deadline)
    return in_walking_order(bytes_of_characters(characters, symbol_of, limit, deadline))


def _nfa_of(
    tree: Node, n_letters: int, excluded: slice, limit: int, deadline: Deadline
) -> tuple[Nfa, IntArray]:
    """Return an automaton over symbols, and the symbol of each letter (-1: none)."""
    draw = _Thompson(limit, {}, {})
    drawing = draw.whole(tree)
    newline = draw.label(_NEWLINE) if drawing.conditions else -1
    symbol_of, labels = partition(list(draw.label_of), n_letters, excluded)
    drawing.nfa.labels = labels
    if not drawing.conditions:
        return drawing.nfa, symbol_of
    behind = [look for look in draw.looks.values() if look.behind]
    places = Places(labels, newline, limit, behind, deadline)
    return places.resolve(drawing, False, places.start()), symbol_of


def partition(
    classes: Sequence[Chars], n_letters: int, excluded: slice
) -> tuple[IntArray, list[Sequence[int]]]:
    """Make one symbol of letters that are in the same classes.

    Args:
        classes: the classes.
        n_letters: how many letters there are.
        excluded: letters that count as being in no class.

    Returns:
        int64[n_letters], the symbol of each letter or -1 for those in no class; and for each
        class the symbols it consists of.
    """
    limits = np.array([0, excluded.start, excluded.stop, n_letters])
    cuts = np.unique(np.concatenate([limits, *(c.runs.ravel() for c in classes)]))
    outside = (cuts[:-1] >= excluded.start) & (cuts[:-1] < excluded.stop)
    inside = []  # the pieces between two cuts that each class consists of
    for c in classes:
        pieces = ragged(*np.searchsorted(cuts, c.runs).T)
        inside.append(pieces[~outside[pieces]])
    # Each class splits the symbols of which it has some pieces and not all.
    symbol = np.zeros(len(cuts) - 1, dtype=np.int64)
    size = [len(symbol)]
    for pieces in inside:
        old, which, count = np.unique(symbol[pieces], return_inverse=True, return_counts=True)
        new = old.copy()
        for i in np.flatnonzero(count < np.array([size[q] for q in old.tolist()])).tolist():
            size[old[i]] -= count[i]
            new[i] = len(size)
            size.append(int(count[i]))
        symbol[pieces] = new[which]
    some = np.zeros(len(symbol), dtype=bool)
    for pieces in inside:
        some[pieces] = True
    symbol[some] = np.unique(symbol[some], return_inverse=True)[1]
    symbol[~some] = -1
    labels: list[Sequence[int]] = [np.unique(symbol[pieces]).tolist() for pieces in inside]
    return np.repeat(symbol, np.diff(cuts)), labels


class _Thompson:
    """Thompson's construction: `add` draws a tree from a state and returns where it ends."""

    def __init__(
        self, limit: int, label_of: dict[Chars, int], looks: dict[Look, Assertion]
    ) -> None:
        self.nfa = Nfa(limit=limit)
        self.drawing = Drawing(self.nfa)
        self.label_of, self.looks = label_of, looks  # shared with the drawings of lookarounds

    def whole(self, tree: Node) -> Drawing:
        """Draw a tree from the first state to the one that accepts."""
        self.nfa.accept.add(self.add(tree, self.nfa.state()))
        return self.drawing

    def look(self, node: Look) -> Assertion:
        if node not in self.looks:
            parts = (_EVERYTHING, node.body) if node.behind else (node.body, _EVERYTHING)
            inner = _Thompson(self.nfa.limit, self.label_of, self.looks).whole(Concat(parts))
            self.looks[node] = Assertion(node.behind, node.positive, inner)
        return self.looks[node]

    def label(self, node: Chars) -> int:
        return self.label_of.setdefault(node, len(self.label_of))

    def add(self, node: Node, start: int) -> int:
        if isinstance(node, Chars):
            end = self.nfa.state()
            self.nfa.arcs.append((start, self.label(node), end))
            return end
        if isinstance(node, Concat):
            for part in node.parts:
                start = self.add(part, start)
            return start
        if isinstance(node, Anchor):
            end = self.nfa.state()
            self.drawing.conditions.append((start, node.kind, end))
            return end
        if isinstance(node, Look):
            end = self.nfa.state()
            self.drawing.conditions.append((start, self.look(node), end))
            return end
        if isinstance(node, Alternation):
            return self._alternation(node, start)
        return self._repeat(node, start)

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
            if n < len(parts):
                q = self.add(Concat(parts[n:]), q)
            self.nfa.silent.append((q, end))
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
