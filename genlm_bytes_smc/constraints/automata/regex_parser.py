"""Reading a regular expression with the `regex` module's own parser.

The pattern is parsed by the code that `regex.compile` itself parses with, and the letters of a
class are found by running the class over every code point once. So syntax, flags, Unicode tables
and case folding are those of the installed `regex`, not a second reading of its manual. The
parser is not part of the module's documented interface; this file and `regex_classes.py` are the
only ones that touch it, and the tests compare the result with `regex.fullmatch`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import regex
from regex import _regex_core

from genlm_bytes_smc.constraints.automata.expressions import (
    Alternation,
    Anchor,
    Chars,
    Concat,
    Look,
    Node,
    Repeat,
    letter,
)
from genlm_bytes_smc.constraints.automata.regex_classes import characters, program
from genlm_bytes_smc.constraints.base import ConstraintError, show

MOST_CALLS = 1000  # of groups by name or number in one pattern

_ENCODINGS = regex.ASCII | regex.LOCALE | regex.UNICODE

_ANCHORS = {"StartOfString": "start", "EndOfString": "end", "EndOfStringLine": "line end"}
_CLASSES = {
    "Any", "AnyAll", "AnyU", "Character", "Property", "Range",
    "SetDiff", "SetInter", "SetSymDiff", "SetUnion",
}  # fmt: skip
_ZERO_WIDTH = {"Boundary", "EndOfLine", "EndOfWord", "LookAround", "StartOfLine", "StartOfWord"}
_REFUSED = {
    "Atomic": "an atomic group (or \\R)",
    "CallGroup": "a recursive pattern",
    "Conditional": "a conditional",
    "DefaultBoundary": "a word boundary",
    "DefaultEndOfWord": "a word boundary",
    "DefaultStartOfWord": "a word boundary",
    "EndOfLineU": "$ under MULTILINE and WORD",
    "EndOfStringLineU": "$ under WORD",
    "Failure": "a control verb",
    "Fuzzy": "fuzzy matching",
    "Grapheme": "a grapheme cluster (\\X)",
    "Keep": "\\K",
    "PossessiveRepeat": "a possessive quantifier",
    "Prune": "a control verb",
    "RefGroup": "a backreference",
    "SearchAnchor": "\\G",
    "Skip": "a control verb",
    "StartOfLineU": "^ under MULTILINE and WORD",
    "StringSet": "a named list",
}


def parse(pattern: str, flags: int = 0) -> Node:
    """Return the tree of `pattern` as `regex.fullmatch(pattern, text, flags)` reads it.

    The pattern is not compiled: `regex` writes every repeat out, which takes gigabytes for
    `a{1000000000}`.

    Raises:
        TypeError: `flags` are no int.
        ConstraintError: it is no pattern (with the parser's reason and position), it uses a
            construct that no automaton expresses (named).
    """
    if not isinstance(pattern, str):
        raise ConstraintError(f"a pattern is a str, got {type(pattern).__name__}: {pattern!r}")
    if isinstance(flags, bool) or not isinstance(flags, int):
        raise TypeError(f"flags must be flags of the regex module, got {flags!r}")
    try:
        tree, info = _parse(pattern, int(flags))
        if info.flags & (regex.LOCALE | regex.REVERSE):
            raise ConstraintError(
                f"the LOCALE or REVERSE flag cannot be used over bytes (pattern {show(pattern)})"
            )
        info.open_groups, info.n_calls = [], 0
        conditions = [n for n in _all_parts(tree) if type(n).__name__ == "Conditional"]
        info.asked = {n.group for n in conditions if n.group > 0}
        if not info.asked or info.group_calls:
            return _convert(tree, info, pattern)
        return Alternation(tuple(_by_groups(tree, frozenset(), info, pattern).values()))
    except regex.error as e:
        at = "" if e.pos is None else f" at position {e.pos}"
        raise ConstraintError(f"the pattern {show(pattern)} does not parse: {e.msg}{at}") from None


def written_out(pattern: str, flags: int = 0) -> int:
    """Return how many parts a pattern has once each repeat is written out, which `regex` does.

    Raises:
        ConstraintError: it is no pattern.
    """
    try:
        return _written_out(_parse(pattern, int(flags))[0])
    except regex.error as e:
        raise ConstraintError(f"the pattern {show(pattern)} does not parse: {e.msg}") from None


def _written_out(node: Any) -> int:
    most = getattr(node, "max_count", 1)
    times = max(getattr(node, "min_count", 1), 1 if most is None else most)
    return int(times) * (1 + sum(map(_written_out, _parts(node))))


def _parts(node: Any) -> list[Any]:
    """Return the parts that a node of the parser consists of."""
    lists = (getattr(node, name, ()) for name in ("items", "branches"))
    alone = (getattr(node, name, None) for name in ("subpattern", "yes_item", "no_item"))
    return [*(part for parts in lists for part in parts), *filter(None, alone)]


class NotRegularError(ConstraintError):
    """A pattern has a part that no automaton expresses."""


def _unsupported(what: str, pattern: str) -> NotRegularError:
    return NotRegularError(f"{what} cannot be part of a byte automaton (pattern {show(pattern)})")


def _parse(pattern: str, flags: int) -> tuple[Any, Any]:
    """Return the parser's tree and notes; parse again where a global flag turns up inside."""
    while True:
        source = _regex_core.Source(pattern)
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
        for names in (("VERSION0", "VERSION1"), ("ASCII", "LOCALE", "UNICODE")):
            given = [name for name in names if info.flags & getattr(regex, name)]
            if len(given) > 1:
                raise ConstraintError(f"the flags {' and '.join(given)} exclude one another")
        if not info.flags & _ENCODINGS:
            info.flags |= regex.UNICODE
        # As `regex` does before it compiles: what a class under IGNORECASE matches may change
        # where it becomes part of a larger one.
        tree.fix_groups(pattern, False, False)
        return tree.optimise(info, False), info


def _convert(node: Any, info: Any, pattern: str) -> Node:
    kind = type(node).__name__
    if kind in _CLASSES or (kind == "String" and node.case_flags):
        full = regex.FULLCASE | regex.IGNORECASE
        if getattr(node, "case_flags", 0) & full == full:
            what = "full case folding (FULLCASE with IGNORECASE, which version 1 turns on)"
            raise _unsupported(what, pattern)
        if kind == "Character" and node.positive and not node.case_flags:
            return letter(node.value)
        return characters(program(node), info.flags & _ENCODINGS)
    if kind == "String":  # only \R makes one so early
        return Concat(tuple(map(letter, node.characters)))
    if kind == "Sequence":
        return Concat(tuple(_convert(item, info, pattern) for item in node.items))
    if kind == "Branch":
        return Alternation(tuple(_convert(branch, info, pattern) for branch in node.branches))
    if kind == "Group":
        return _convert_group(node, info, pattern)
    if kind in ("GreedyRepeat", "LazyRepeat"):
        body = _convert(node.subpattern, info, pattern)
        return _repeat(body, int(node.min_count), node.max_count)
    if kind in _ANCHORS:
        return Anchor(_ANCHORS[kind])
    if kind == "CallGroup" and node.group not in {0, *info.open_groups}:
        info.n_calls += 1
        if info.n_calls <= MOST_CALLS:
            called = info.defined_groups[node.group][0].optimise(info, False)
            return _convert_group(called, info, pattern)
    if kind == "Conditional" and node.group == 0:  # (?(DEFINE)...), which is never taken
        return _convert(node.no_item, info, pattern)
    found = _convert_place(node, kind, info, pattern)
    if found is None:
        raise _unsupported(_REFUSED.get(kind, f"the construct {kind}"), pattern)
    return found


def _convert_group(node: Any, info: Any, pattern: str) -> Node:
    """Return the tree of a group; it must not call itself."""
    info.open_groups.append(node.group)
    found = _convert(node.subpattern, info, pattern)
    info.open_groups.pop()
    return found


def _by_groups(node: Any, passed: frozenset[int], info: Any, pattern: str) -> dict[Any, Node]:
    """Return the tree of a node for each set of groups that may have taken part after it.

    Args:
        node: it may hold conditionals on groups, and those groups.
        passed: the groups (of those that a conditional asks for) that have taken part before it.
        info, pattern: as for `_convert`.
    """
    kind = type(node).__name__
    if not any(_asked(part, info) for part in _all_parts(node)):
        return {passed: _convert(node, info, pattern)}
    if kind == "Conditional" and node.group > 0:
        taken = node.yes_item if node.group in passed else node.no_item
        return _by_groups(taken, passed, info, pattern)
    if kind == "Group":
        inside = _by_groups(node.subpattern, passed, info, pattern)
        own = {node.group} & info.asked
        return _joined([(after | own, tree) for after, tree in inside.items()])
    if kind == "Branch":
        return _joined(
            [f for b in node.branches for f in _by_groups(b, passed, info, pattern).items()]
        )
    if kind in ("GreedyRepeat", "LazyRepeat") and node.max_count == 1:
        body = _by_groups(node.subpattern, passed, info, pattern)
        # `regex` leaves out what repeats nothing, and what failed at a place for other groups.
        if all(map(_reads, body.values())):
            without = [(passed, Concat(()))] if node.min_count == 0 else []
            return _joined([*without, *body.items()])
    if kind != "Sequence":
        raise _unsupported("a conditional", pattern)
    found: dict[Any, Node] = {passed: Concat(())}
    for item in node.items:
        found = _joined(
            [
                (after, Concat((tree, more)))
                for before, tree in found.items()
                for after, more in _by_groups(item, before, info, pattern).items()
            ]
        )
    return found


def _joined(found: Sequence[tuple[Any, Node]]) -> dict[Any, Node]:
    """Return one tree for each set of groups."""
    out: dict[Any, list[Node]] = {}
    for after, tree in found:
        out.setdefault(after, []).append(tree)
    return {
        after: trees[0] if len(trees) == 1 else Alternation(tuple(trees))
        for after, trees in out.items()
    }


def _all_parts(node: Any) -> Iterator[Any]:
    yield node
    for part in _parts(node):
        yield from _all_parts(part)


def _asked(node: Any, info: Any) -> bool:
    """Return whether a node is a conditional on a group, or a group that one asks for."""
    kind = type(node).__name__
    return (kind == "Conditional" and node.group > 0) or (
        kind == "Group" and node.group in info.asked
    )


def _convert_place(node: Any, kind: str, info: Any, pattern: str) -> Node | None:
    """Return a tree for lookaround, word boundaries, ends of lines and atomic groups, or None."""
    if kind == "LookAround":
        body = _convert(node.subpattern, info, pattern)
        if node.behind and _looks_ahead(body):
            raise _unsupported("lookahead or an end inside lookbehind", pattern)
        return Look(node.behind, node.positive, body)
    if kind == "LookAroundConditional":
        body = _convert(node.subpattern, info, pattern)
        if node.behind and _looks_ahead(body):
            raise _unsupported("lookahead or an end inside lookbehind", pattern)
        yes, no = (_convert(part, info, pattern) for part in (node.yes_item, node.no_item))
        holds, fails = (
            Look(node.behind, sign, body) for sign in (node.positive, not node.positive)
        )
        return Alternation((Concat((holds, yes)), Concat((fails, no))))
    if kind in ("Boundary", "StartOfWord", "EndOfWord"):
        letters = _regex_core.lookup_property(None, "WORD", True, encoding=node.encoding)
        word = characters(program(letters), info.flags & _ENCODINGS)
        begins = Concat((Look(True, False, word), Look(False, True, word)))
        ends = Concat((Look(True, True, word), Look(False, False, word)))
        if kind != "Boundary":
            return begins if kind == "StartOfWord" else ends
        if node.positive:
            return Alternation((begins, ends))
        inside = Concat((Look(True, True, word), Look(False, True, word)))
        return Alternation((inside, Concat((Look(True, False, word), Look(False, False, word)))))
    if kind in ("Atomic", "PossessiveRepeat"):
        return _settled(node, info, pattern)
    if kind == "StartOfLine":
        return Alternation((Anchor("start"), Look(True, True, letter(0x0A))))
    if kind == "EndOfLine":
        return Alternation((Anchor("end"), Look(False, True, letter(0x0A))))
    return None


def _settled(node: Any, info: Any, pattern: str) -> Node | None:
    """Return a tree for an atomic group around `node`, or None where none is known.

    What the group takes first has to be said by lookahead: a later branch where no earlier one is
    found, a repeat where the body is not found once more. That is so if the body, or what comes
    before, ends in one place only.
    """
    kind = type(node).__name__
    if kind in ("Group", "Atomic"):
        return _settled(node.subpattern, info, pattern)
    if kind == "Branch":
        branches = [_settled(branch, info, pattern) for branch in node.branches]
        found = [branch for branch in branches if branch is not None]
        if len(found) < len(branches):
            return None
        missing = [Look(False, False, branch) for branch in found]
        return Alternation(tuple(Concat((*missing[:i], b)) for i, b in enumerate(found)))
    if kind in ("GreedyRepeat", "LazyRepeat", "PossessiveRepeat"):
        body = _in_one_place(node.subpattern, info, pattern)
        if body is None or not _reads(body):
            return None
        low, high = int(node.min_count), node.max_count
        if kind == "LazyRepeat" or high == low:
            return _repeat(body, low, low)
        stops = Look(False, False, body)
        if high is None:
            return Concat((_repeat(body, low, None), stops))
        fewer = Concat((_repeat(body, low, high - 1), stops))
        return Alternation((fewer, _repeat(body, high, high)))
    if kind == "Sequence" and node.items:
        first = [_in_one_place(item, info, pattern) for item in node.items[:-1]]
        last = _settled(node.items[-1], info, pattern)
        parts = [part for part in (*first, last) if part is not None]
        return Concat(tuple(parts)) if len(parts) == len(node.items) else None
    return _in_one_place(node, info, pattern)


def _in_one_place(node: Any, info: Any, pattern: str) -> Node | None:
    """Return the tree of a node that ends in at most one place, wherever it begins, or None."""
    kind = type(node).__name__
    if kind in ("Atomic", "PossessiveRepeat"):
        return _settled(node, info, pattern)
    if kind == "Group":
        return _in_one_place(node.subpattern, info, pattern)
    if kind == "Sequence":
        items = [_in_one_place(item, info, pattern) for item in node.items]
        parts = [part for part in items if part is not None]
        return Concat(tuple(parts)) if len(parts) == len(items) else None
    if kind in ("GreedyRepeat", "LazyRepeat"):
        body = _in_one_place(node.subpattern, info, pattern)
        fixed = node.min_count == node.max_count
        return _repeat(body, int(node.min_count), node.max_count) if fixed and body else None
    simple = kind == "String" or kind in _CLASSES or kind in _ANCHORS or kind in _ZERO_WIDTH
    return _convert(node, info, pattern) if simple else None


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
    if isinstance(node, Anchor):
        return node.kind != "start"
    if isinstance(node, Repeat):
        return _looks_ahead(node.body)
    parts = node.parts if isinstance(node, Concat) else ()
    return any(map(_looks_ahead, node.branches if isinstance(node, Alternation) else parts))


def _repeat(body: Node, low: int, high: int | None) -> Node:
    """Return `body{low,high}`; repeats of repeats become one where their counts have no gaps."""
    if isinstance(body, Concat) and len(body.parts) == 1:
        body = body.parts[0]
    if body == Concat(()) or high == 0 or (isinstance(body, Repeat) and body.high == 0):
        return Concat(())
    if isinstance(body, Repeat) and body.low <= 1:
        top = None if high is None or body.high is None else high * body.high
        return Repeat(body.body, body.low * low, top)
    return Repeat(body, low, high)
