"""Regular expressions as byte automata.

Which engine (tried on one core): outlines-core 0.2.14 compiles as fast, but its index over
the 256 bytes refuses "bcé" for `[^a]+é?` and for `\\w{1,50}`; llguidance derives lazily and
names no states, so there is no table to gather from; the classes of interegular and greenery
are ASCII, and `re._parser` knows no `\\p{..}`. So: `regex` parses and says what a class
matches, Thompson 1968 and the subset construction work on classes of characters (a handful of
symbols), and the result is folded into UTF-8 once, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.constraints.automaton import (
    MAX_SECONDS,
    MAX_STATES,
    Deadline,
    Table,
    in_walking_order,
    ragged,
)
from genlm_bytes_smc.constraints.base import ConstraintError, check_limit, show
from genlm_bytes_smc.constraints.dfa import ByteDFA
from genlm_bytes_smc.constraints.nfa import Nfa, determinize
from genlm_bytes_smc.constraints.regex_ast import (
    Alternation,
    Anchor,
    Chars,
    Concat,
    Node,
    Repeat,
    classes_in,
    parse,
)
from genlm_bytes_smc.constraints.utf8 import N_CODEPOINTS, SURROGATES, bytes_of_characters

_NEWLINE = Chars(np.array([[0x0A, 0x0B]]))


class ByteRegex(ByteDFA):
    """The texts that a regular expression matches from end to end, as UTF-8.

    A text has weight 1 where `regex.fullmatch(pattern, text, flags)` matches and 0 elsewhere;
    bytes that are no UTF-8 have weight 0. Every admitted prefix can be completed.

    Args:
        pattern: a pattern of the `regex` module. Anchors are fine anywhere; what no automaton
            expresses (backreferences, lookaround, possessive and atomic groups, word
            boundaries, full case folding and the like) is refused by name. Classes are those
            of Unicode: `\\d` is hundreds of digits, `(?a)\\d` the ten of ASCII.
        flags: flags of the `regex` module.
        device: where the table lives and weights are returned (None: the CPU).
        max_states: refuse a pattern that needs more byte states than this.
        max_seconds: refuse a pattern that takes longer to compile (None: no limit).

    Raises:
        TypeError: `flags` or a limit of the wrong type.
        ConstraintError: the pattern does not parse, is not supported, matches no text, or
            outgrows `max_states` or `max_seconds`.
    """

    def __init__(
        self,
        pattern: str,
        flags: int = 0,
        *,
        device: torch.device | str | None = None,
        max_states: int = MAX_STATES,
        max_seconds: float | None = MAX_SECONDS,
    ) -> None:
        check_limit("max_states", max_states)
        table = compile_pattern(pattern, flags, max_states, Deadline(max_seconds))
        self._adopt(table, device, max_states)
        self.pattern = pattern
        self.flags = int(flags)

    def summary(self) -> dict[str, str]:
        """What `repr` and the notebook view show, name by name."""
        shown = {"pattern": show(self.pattern)}
        if self.flags:
            shown["flags"] = str(self.flags)
        return {**shown, **super().summary()}


def compile_pattern(pattern: str, flags: int, max_states: int, deadline: Deadline) -> Table:
    """The minimal byte automaton of a pattern; see `ByteRegex`."""
    try:
        nfa, atoms = _nfa_of_characters(pattern, flags, max_states, deadline)
    except RecursionError:
        raise ConstraintError(
            f"the pattern {show(pattern)} nests its groups more deeply than Python's recursion "
            "limit lets it be parsed; write fewer groups inside one another"
        ) from None
    characters = determinize(nfa, deadline)
    return in_walking_order(bytes_of_characters(characters, atoms, max_states, deadline))


def _nfa_of_characters(
    pattern: str, flags: int, max_states: int, deadline: Deadline
) -> tuple[Nfa, npt.NDArray[np.int64]]:
    """An automaton over classes of characters, and the class of each code point."""
    tree = parse(pattern, flags)
    classes = list(classes_in(tree))
    anchored = has_anchor(tree)
    if anchored:
        classes.append(_NEWLINE)
    deadline.check()
    atoms, labels = partition(classes)
    nfa = Nfa(n_symbols=int(atoms.max()) + 1, labels=labels, limit=max_states)
    build = _Thompson(nfa, {id(c): i for i, c in enumerate(classes)})
    end = build.add(tree, nfa.state())
    nfa.accept.add(end)
    if anchored:
        nfa = _place_anchors(nfa, build.anchors, newline=len(classes) - 1)
    return nfa, atoms


def partition(classes: Sequence[Chars]) -> tuple[npt.NDArray[np.int64], list[Sequence[int]]]:
    """Characters that every class treats alike become one symbol.

    Returns:
        int64[0x110000], the symbol of each code point or -1 for those in no class (and for
        surrogates); and for each class the symbols it consists of.
    """
    limits = np.array([0, SURROGATES.start, SURROGATES.stop, N_CODEPOINTS])
    cuts = np.unique(np.concatenate([limits, *(c.runs.ravel() for c in classes)]))
    surrogates = (cuts[:-1] >= SURROGATES.start) & (cuts[:-1] < SURROGATES.stop)
    inside = []  # the pieces between two cuts that each class consists of
    for c in classes:
        pieces = ragged(*np.searchsorted(cuts, c.runs).T)
        inside.append(pieces[~surrogates[pieces]])
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


def has_anchor(node: Node) -> bool:
    """Whether an anchor stands anywhere in the tree."""
    if isinstance(node, Concat):
        return any(map(has_anchor, node.parts))
    if isinstance(node, Alternation):
        return any(map(has_anchor, node.branches))
    return isinstance(node, Anchor) or (isinstance(node, Repeat) and has_anchor(node.body))


class _Thompson:
    """Thompson's construction: `add` draws a tree from a state and returns where it ends."""

    def __init__(self, nfa: Nfa, label_of: dict[int, int]) -> None:
        self.nfa = nfa
        self.label_of = label_of
        self.anchors: list[tuple[int, str, int]] = []  # (from, kind, to)

    def add(self, node: Node, start: int) -> int:
        nfa = self.nfa
        if isinstance(node, Chars):
            end = nfa.state()
            nfa.arcs[start].append((self.label_of[id(node)], end))
            return end
        if isinstance(node, Concat):
            for part in node.parts:
                start = self.add(part, start)
            return start
        if isinstance(node, Anchor):
            end = nfa.state()
            self.anchors.append((start, node.kind, end))
            return end
        if isinstance(node, Alternation):
            return self._alternation(node, start)
        return self._repeat(node, start)

    def _alternation(self, node: Alternation, start: int) -> int:
        """The branches, with what they begin with in common drawn once (a tree of words)."""
        nfa = self.nfa
        end = nfa.state()
        child: dict[tuple[int, int], int] = {}
        for branch in node.branches:
            q, parts = start, branch.parts if isinstance(branch, Concat) else (branch,)
            n = 0
            while n < len(parts) and isinstance(parts[n], Chars):
                key = q, id(parts[n])
                if key not in child:
                    child[key] = self.add(parts[n], q)
                q = child[key]
                n += 1
            nfa.silent[self.add(Concat(parts[n:]), q)].append(end)
        return end

    def _repeat(self, node: Repeat, start: int) -> int:
        nfa = self.nfa
        for _ in range(node.low):
            start = self.add(node.body, start)
        end = nfa.state()
        if node.high is None:
            loop = nfa.state()
            nfa.silent[start].append(loop)
            nfa.silent[self.add(node.body, loop)].append(loop)
            nfa.silent[loop].append(end)
            return end
        # Optional copies are nested, a(a(a)?)?, so that leaving takes one silent step.
        for _ in range(node.high - node.low):
            first = nfa.state()
            nfa.silent[start] += [first, end]
            start = self.add(node.body, first)
        nfa.silent[start].append(end)
        return end


def _place_anchors(nfa: Nfa, anchors: list[tuple[int, str, int]], newline: int) -> Nfa:
    """The automaton in which anchors are silent steps that hold only where they should.

    A state is a state of `nfa`, whether anything has been read, and what an anchor passed has
    promised of the rest: "" nothing, "end" that it is empty, "line end" that it is at most
    one newline.
    """
    out = Nfa(nfa.n_symbols, nfa.labels, limit=nfa.limit * 4)
    after: dict[int, list[tuple[str, int]]] = {}
    for source, kind, target in anchors:
        after.setdefault(source, []).append((kind, target))
    number = {(0, False, ""): out.state()}
    queue = list(number)

    def place(q: int, read: bool, rest: str) -> int:
        key = (q, read, rest)
        if key not in number:
            number[key] = out.state()
            queue.append(key)
        return number[key]

    for q, read, rest in queue:
        here = number[q, read, rest]
        out.silent[here] += [place(r, read, rest) for r in nfa.silent[q]]
        for kind, target in after.get(q, []):
            if kind != "start":
                stricter = "end" if "end" in (kind, rest) else "line end"
                out.silent[here].append(place(target, read, stricter))
            elif not read:
                out.silent[here].append(place(target, read, rest))
        for label, target in nfa.arcs[q]:
            if rest == "":
                out.arcs[here].append((label, place(target, True, "")))
            elif rest == "line end" and set(nfa.labels[newline]) & set(nfa.labels[label]):
                out.arcs[here].append((newline, place(target, True, "end")))
        if q in nfa.accept:
            out.accept.add(here)
    return out
