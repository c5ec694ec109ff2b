"""Trees of regular expressions, from what the `regex` module's own parser makes of a pattern.

The pattern is parsed by the code that `regex.compile` itself parses with, and the letters of a
class are found by running the class over every code point once. So syntax, flags, Unicode tables
and case folding are those of the installed `regex`, not a second reading of its manual. The
parser is not part of the module's documented interface; no file but this one imports it, and the
tests compare the result with `regex.fullmatch`. A node of its tree is told by the name of its
class.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import regex
from regex import _regex, _regex_core

from genlm_bytes_smc.constraints.automata import N_CODEPOINTS
from genlm_bytes_smc.constraints.base import ConstraintError, NotRegularError, show
from genlm_bytes_smc.constraints.expressions import (
    ANY,
    Alternation,
    Chars,
    Concat,
    Look,
    Node,
    Repeat,
    letter,
)

_ENCODINGS = regex.ASCII | regex.LOCALE | regex.UNICODE

WORDS = {"Boundary", "EndOfWord", "StartOfWord"}
CLASSES = {
    "Any", "AnyAll", "AnyU", "Character", "Property", "Range",
    "SetDiff", "SetInter", "SetSymDiff", "SetUnion",
}  # fmt: skip
MOST_CALLS = 1000  # of groups by name or number in one pattern

NEWLINE = letter(0x0A)
_NO_NEWLINE = Chars(np.array([[0, 0x0A], [0x0B, N_CODEPOINTS]]))
_START, _END = Look(True, False, ANY), Look(False, False, ANY)  # of the text
# The end but for a last newline: no other letter comes, and nothing after a newline.
_LAST_LINE_END = Look(False, False, Alternation((Concat((NEWLINE, ANY)), _NO_NEWLINE)))
_PLACES: dict[str, Node] = {
    "StartOfString": _START,
    "EndOfString": _END,
    "EndOfStringLine": _LAST_LINE_END,
    "StartOfLine": Alternation((_START, Look(True, True, NEWLINE))),
    "EndOfLine": Alternation((_END, Look(False, True, NEWLINE))),
}
_REPEATS = {"GreedyRepeat", "LazyRepeat"}
_REFUSED = {
    "Atomic": "an atomic group (or \\R)",
    "CallGroup": "a recursive pattern",
    "Conditional": "a conditional",
    "EndOfLineU": "$ under MULTILINE and WORD",
    "EndOfStringLineU": "$ under WORD",
    "Fuzzy": "fuzzy matching",
    "Grapheme": "a grapheme cluster (\\X)",
    "Keep": "\\K",
    "PossessiveRepeat": "a possessive quantifier",
    "RefGroup": "a backreference",
    "SearchAnchor": "\\G",
    "StartOfLineU": "^ under MULTILINE and WORD",
    "StringSet": "a named list",
    **dict.fromkeys((f"Default{kind}" for kind in WORDS), "a word boundary"),
    **dict.fromkeys(("Failure", "Prune", "Skip"), "a control verb"),
}


def parse(pattern: str, flags: int = 0) -> Node:
    """Return the tree of `pattern` as `regex.fullmatch(pattern, text, flags)` reads it.

    It is not compiled: `regex` writes every repeat out, which takes gigabytes for `a{1000000000}`.

    Raises:
        TypeError: `flags` are no int.
        ConstraintError: it is no pattern (with the parser's reason and position).
        NotRegularError: it uses a construct that no automaton expresses (named).
    """
    if not isinstance(pattern, str):
        raise ConstraintError(f"a pattern is a str, got {type(pattern).__name__}: {pattern!r}")
    if isinstance(flags, bool) or not isinstance(flags, int):
        raise TypeError(f"flags must be flags of the regex module, got {flags!r}")
    try:
        tree, info = parsed(pattern, int(flags))
        if info.flags & (regex.LOCALE | regex.REVERSE):
            raise ConstraintError(
                f"the LOCALE or REVERSE flag cannot be used over bytes (pattern {show(pattern)})"
            )
        return _Reading(pattern, tree, info).whole()
    except regex.error as e:
        at = "" if e.pos is None else f" at position {e.pos}"
        raise ConstraintError(f"the pattern {show(pattern)} does not parse: {e.msg}{at}") from None


def parsed(pattern: str, flags: int) -> tuple[Any, Any]:
    """Return the parser's tree and notes; parse again where a global flag turns up inside."""
    while True:
        source = _regex_core.Source(pattern)
        if flags & regex.VERSION0 and flags & regex.VERSION1:
            raise ConstraintError("the flags VERSION0 and VERSION1 exclude one another")
        info = _regex_core.Info(flags, source.char_type, {})
        info.guess_encoding = _regex_core.UNICODE
        source.ignore_space = bool(info.flags & regex.VERBOSE)
        try:
            tree = _regex_core._parse_pattern(source, info)
        except _regex_core._UnscopedFlagSet:
            flags = info.global_flags
            continue
        if not source.at_end():
            raise regex.error("unbalanced parenthesis", pattern, source.pos)
        given = [f for f in ("ASCII", "LOCALE", "UNICODE") if info.flags & getattr(regex, f)]
        if len(given) > 1:
            raise ConstraintError(f"the flags {' and '.join(given)} exclude one another")
        if not info.flags & _ENCODINGS:
            info.flags |= regex.UNICODE
        # As `regex` does: under IGNORECASE a class may match otherwise as part of a larger one.
        tree.fix_groups(pattern, False, False)
        return tree.optimise(info, False), info


def parts_of(node: Any) -> list[Any]:
    """Return the parts that a node of the parser consists of."""
    lists = (getattr(node, name, ()) for name in ("items", "branches"))
    alone = (getattr(node, name, None) for name in ("subpattern", "yes_item", "no_item"))
    return [*(part for parts in lists for part in parts), *filter(None, alone)]


def all_parts(node: Any) -> Iterator[Any]:
    """Yield a node and all that it consists of."""
    yield node
    for part in parts_of(node):
        yield from all_parts(part)


def word_letters(node: Any, info: Any) -> Chars:
    """Return the letters of words, for a word boundary."""
    return class_of(_regex_core.lookup_property(None, "WORD", True, encoding=node.encoding), info)


def class_of(node: Any, info: Any) -> Chars:
    """Return the characters of a class."""
    if type(node).__name__ == "Character" and node.positive and not node.case_flags:
        return letter(node.value)
    # The engine's instructions for one or more of them.
    code = _regex_core._flatten_code(_regex_core.GreedyRepeat(node, 1, None).compile())
    return characters((*code, int(_regex_core.OP.SUCCESS)), info.flags & _ENCODINGS)


@lru_cache(maxsize=4096)
def characters(program: tuple[int, ...], encoding: int) -> Chars:
    """Find the characters that a class, in the engine's instructions, matches, by running it.

    `encoding`, `regex.ASCII` or `regex.UNICODE`, is a property of the whole pattern: the engine
    asks it what a letter is and which letters differ in case only.
    """
    flags = encoding | regex.VERSION0
    no_groups_no_lists: tuple[Any, ...] = ({}, {}, {}, [])
    nothing_required = (0, (), 0)
    engine = _regex.compile("", flags, list(program), *no_groups_no_lists, *nothing_required, 0)
    runs = [match.span() for match in engine.finditer(_every_character())]
    return Chars(np.array(runs, dtype=np.int64).reshape(-1, 2))


@lru_cache(maxsize=1)
def _every_character() -> str:
    return "".join(map(chr, range(N_CODEPOINTS)))


class _Reading:
    """The parser's tree of one pattern, turned into ours."""

    def __init__(self, pattern: str, tree: Any, info: Any) -> None:
        self.pattern, self.tree, self.info = pattern, tree, info
        self._open: list[Any] = []
        self._n_calls = 0
        conditionals = [n for n in all_parts(tree) if type(n).__name__ == "Conditional"]
        self.asked = {n.group for n in conditionals if n.group > 0}  # groups

    def whole(self) -> Node:
        """Return the tree of the pattern."""
        if not self.asked or self.info.group_calls:
            return self._convert(self.tree)
        return Alternation(tuple(self._by_groups(self.tree, frozenset()).values()))

    def _unsupported(self, what: str) -> NotRegularError:
        pattern = show(self.pattern)
        return NotRegularError(f"{what} cannot be part of a byte automaton (pattern {pattern})")

    def _convert(self, node: Any) -> Node:
        kind = type(node).__name__
        if kind in CLASSES or (kind == "String" and node.case_flags):
            full = regex.FULLCASE | regex.IGNORECASE
            if getattr(node, "case_flags", 0) & full == full:
                what = "full case folding (FULLCASE with IGNORECASE, which version 1 turns on)"
                raise self._unsupported(what)
            return class_of(node, self.info)
        if kind == "String":  # only \R makes one so early
            return Concat(tuple(map(letter, node.characters)))
        if kind == "Sequence":
            return Concat(tuple(map(self._convert, node.items)))
        if kind == "Branch":
            return Alternation(tuple(map(self._convert, node.branches)))
        if kind == "Group":
            return self._group(node)
        if kind in _REPEATS:
            return _repeated(self._convert(node.subpattern), int(node.min_count), node.max_count)
        if kind in _PLACES:
            return _PLACES[kind]
        if kind in WORDS:
            return self._word_boundary(node, kind)
        if kind == "LookAround":
            return Look(node.behind, node.positive, self._looked_for(node))
        if kind == "LookAroundConditional":
            body, signs = self._looked_for(node), (node.positive, not node.positive)
            holds, fails = (Look(node.behind, sign, body) for sign in signs)
            yes, no = self._convert(node.yes_item), self._convert(node.no_item)
            return Alternation((Concat((holds, yes)), Concat((fails, no))))
        if kind == "CallGroup" and node.group not in {0, *self._open}:
            self._n_calls += 1
            if self._n_calls <= MOST_CALLS:
                called = self.info.defined_groups[node.group][0]
                return self._group(called.optimise(self.info, False))
        if kind == "Conditional" and node.group == 0:  # (?(DEFINE)...), which is never taken
            return self._convert(node.no_item)
        settled = self._settled(node) if kind in ("Atomic", "PossessiveRepeat") else None
        if settled is None:
            raise self._unsupported(_REFUSED.get(kind, f"the construct {kind}"))
        return settled

    def _group(self, node: Any) -> Node:
        """Return the tree of a group; it must not call itself."""
        self._open.append(node.group)
        found = self._convert(node.subpattern)
        self._open.pop()
        return found

    def _looked_for(self, node: Any) -> Node:
        body = self._convert(node.subpattern)
        if node.behind and _looks_ahead(body):
            raise self._unsupported("lookahead or an end inside lookbehind")
        return body

    def _word_boundary(self, node: Any, kind: str) -> Node:
        word = word_letters(node, self.info)

        def between(before: bool, after: bool) -> Node:
            return Concat((Look(True, before, word), Look(False, after, word)))

        if kind != "Boundary":
            return between(False, True) if kind == "StartOfWord" else between(True, False)
        if node.positive:
            return Alternation((between(False, True), between(True, False)))
        return Alternation((between(True, True), between(False, False)))

    def _by_groups(self, node: Any, passed: frozenset[int]) -> dict[frozenset[int], Node]:
        """Return the tree of a node for each set of groups that may have taken part after it.

        Of the groups that a conditional asks for, `passed` have taken part before the node.
        """
        kind = type(node).__name__
        if not any(map(self._is_asked, all_parts(node))):
            return {passed: self._convert(node)}
        if kind == "Conditional" and node.group > 0:
            return self._by_groups(node.yes_item if node.group in passed else node.no_item, passed)
        if kind == "Group":
            inside = self._by_groups(node.subpattern, passed)
            own = {node.group} & self.asked
            return _joined([(after | own, tree) for after, tree in inside.items()])
        if kind == "Branch":
            return _joined([f for b in node.branches for f in self._by_groups(b, passed).items()])
        if kind in _REPEATS and node.max_count == 1:
            body = self._by_groups(node.subpattern, passed)
            # `regex` leaves out what repeats nothing, and what failed at a place for other groups.
            if all(map(_reads, body.values())):
                without = [(passed, Concat(()))] if node.min_count == 0 else []
                return _joined([*without, *body.items()])
        if kind != "Sequence":
            raise self._unsupported("a conditional")
        found: dict[frozenset[int], Node] = {passed: Concat(())}
        for item in node.items:
            longer = [
                (after, Concat((tree, more)))
                for before, tree in found.items()
                for after, more in self._by_groups(item, before).items()
            ]
            found = _joined(longer)
        return found

    def _is_asked(self, node: Any) -> bool:
        """Return whether a node is a conditional on a group, or a group that one asks for."""
        kind = type(node).__name__
        return (kind == "Conditional" and node.group > 0) or (
            kind == "Group" and node.group in self.asked
        )

    def _settled(self, node: Any) -> Node | None:
        """Return a tree for an atomic group around `node`, or None where none is known.

        What the group takes first has to be said by lookahead: a later branch where no earlier one
        is found, a repeat where the body is not found once more. That is so if the body, or what
        comes before, ends in one place only.
        """
        kind = type(node).__name__
        if kind in ("Group", "Atomic"):
            return self._settled(node.subpattern)
        if kind == "Branch":
            found = _all([self._settled(branch) for branch in node.branches])
            missing = [Look(False, False, branch) for branch in found or ()]
            either = [Concat((*missing[:i], branch)) for i, branch in enumerate(found or ())]
            return None if found is None else Alternation(tuple(either))
        if kind in (*_REPEATS, "PossessiveRepeat"):
            body = self._in_one_place(node.subpattern)
            if body is None or not _reads(body):
                return None
            low, high = int(node.min_count), node.max_count
            if kind == "LazyRepeat" or high == low:
                return _repeated(body, low, low)
            stops = Look(False, False, body)
            if high is None:
                return Concat((_repeated(body, low, None), stops))
            fewer = Concat((_repeated(body, low, high - 1), stops))
            return Alternation((fewer, _repeated(body, high, high)))
        if kind == "Sequence" and node.items:
            *first, last = node.items
            found = _all([*map(self._in_one_place, first), self._settled(last)])
            return None if found is None else Concat(found)
        return self._in_one_place(node)

    def _in_one_place(self, node: Any) -> Node | None:
        """Return the tree of a node that ends in at most one place, wherever it begins, or None."""
        kind = type(node).__name__
        if kind in ("Atomic", "PossessiveRepeat"):
            return self._settled(node)
        if kind == "Group":
            return self._in_one_place(node.subpattern)
        if kind == "Sequence":
            found = _all(list(map(self._in_one_place, node.items)))
            return None if found is None else Concat(found)
        if kind in _REPEATS:
            body = self._in_one_place(node.subpattern)
            fixed = node.min_count == node.max_count
            return _repeated(body, int(node.min_count), node.max_count) if fixed and body else None
        simple = {"String", "LookAround", *CLASSES, *_PLACES, *WORDS}
        return self._convert(node) if kind in simple else None


def _all(found: Sequence[Node | None]) -> tuple[Node, ...] | None:
    """Return the trees, or None if one is missing."""
    trees = tuple(tree for tree in found if tree is not None)
    return trees if len(trees) == len(found) else None


def _joined(found: Sequence[tuple[frozenset[int], Node]]) -> dict[frozenset[int], Node]:
    """Return one tree for each set of groups."""
    out: dict[frozenset[int], list[Node]] = {}
    for after, tree in found:
        out.setdefault(after, []).append(tree)
    return {
        after: trees[0] if len(trees) == 1 else Alternation(tuple(trees))
        for after, trees in out.items()
    }


def _reads(node: Node) -> bool:
    """Return whether every text of a tree has at least one letter."""
    if isinstance(node, Concat):
        return any(map(_reads, node.parts))
    if isinstance(node, Alternation):
        return all(map(_reads, node.branches))
    return isinstance(node, Chars) or (
        isinstance(node, Repeat) and node.low > 0 and _reads(node.body)
    )


def _looks_ahead(node: Node) -> bool:
    """Return whether a tree holds a condition on what follows it."""
    if isinstance(node, Look):
        return not node.behind
    if isinstance(node, Repeat):
        return _looks_ahead(node.body)
    parts = node.parts if isinstance(node, Concat) else ()
    return any(map(_looks_ahead, node.branches if isinstance(node, Alternation) else parts))


def _repeated(body: Node, low: int, high: int | None) -> Node:
    """Return `body{low,high}`; repeats of repeats become one where their counts have no gaps."""
    if isinstance(body, Concat) and len(body.parts) == 1:
        body = body.parts[0]
    if body == Concat(()) or high == 0 or (isinstance(body, Repeat) and body.high == 0):
        return Concat(())
    if isinstance(body, Repeat) and body.low <= 1:
        top = None if high is None or body.high is None else high * body.high
        return Repeat(body.body, body.low * low, top)
    return Repeat(body, low, high)
