"""What the `regex` module's own parser makes of a pattern.

The pattern is parsed by the code that `regex.compile` itself parses with, and the letters of a
class are found by running the class over every code point once. So syntax, flags, Unicode tables
and case folding are those of the installed `regex`, not a second reading of its manual. The
parser is not part of the module's documented interface; this file is the only one that touches
it, and the tests compare the result with `regex.fullmatch`. A node of its tree is told by the name
of its class.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import regex
from regex import _regex, _regex_core

from genlm_bytes_smc.constraints.automata.expressions import NEWLINE, Chars, letter
from genlm_bytes_smc.constraints.automata.table import N_CODEPOINTS
from genlm_bytes_smc.constraints.base import ConstraintError, show

_ENCODINGS = regex.ASCII | regex.LOCALE | regex.UNICODE

WORDS = {"Boundary", "EndOfWord", "StartOfWord"}
CLASSES = {
    "Any", "AnyAll", "AnyU", "Character", "Property", "Range",
    "SetDiff", "SetInter", "SetSymDiff", "SetUnion",
}  # fmt: skip
# Parts that ask nothing of a character, and those that ask whether it is a newline.
_BLIND = {
    "Atomic", "Branch", "CallGroup", "Conditional", "EndOfString", "Failure", "GreedyRepeat",
    "Group", "Keep", "LazyRepeat", "LookAround", "LookAroundConditional", "PossessiveRepeat",
    "Prune", "RefGroup", "SearchAnchor", "Sequence", "Skip", "StartOfString",
}  # fmt: skip
_LINES = {"EndOfLine", "EndOfStringLine", "StartOfLine"}


def parsed(pattern: str, flags: int) -> tuple[Any, Any]:
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


def _parts(node: Any) -> list[Any]:
    """Return the parts that a node of the parser consists of."""
    lists = (getattr(node, name, ()) for name in ("items", "branches"))
    alone = (getattr(node, name, None) for name in ("subpattern", "yes_item", "no_item"))
    return [*(part for parts in lists for part in parts), *filter(None, alone)]


def all_parts(node: Any) -> Iterator[Any]:
    """Yield a node and all that it consists of."""
    yield node
    for part in _parts(node):
        yield from all_parts(part)


def written_out(pattern: str, flags: int = 0) -> int:
    """Return how many parts a pattern has once each repeat is written out, which `regex` does.

    Raises:
        ConstraintError: it is no pattern.
    """
    try:
        return _written_out(parsed(pattern, int(flags))[0])
    except regex.error as e:
        raise ConstraintError(f"the pattern {show(pattern)} does not parse: {e.msg}") from None


def _written_out(node: Any) -> int:
    most = getattr(node, "max_count", 1)
    times = max(getattr(node, "min_count", 1), 1 if most is None else most)
    return int(times) * (1 + sum(map(_written_out, _parts(node))))


def told_apart(pattern: str, flags: int = 0) -> list[Chars] | None:
    """Return the classes by which a pattern tells characters apart (None: unknown).

    Two characters that are in the same classes, and do not occur in a text, may stand for one
    another at its end: it is a match, or the beginning of one, with both or with neither.
    """
    tree, info = parsed(pattern, int(flags))
    found = []
    for node in all_parts(tree):
        kind, case_flags = type(node).__name__, getattr(node, "case_flags", 0)
        if case_flags & regex.FULLCASE or (case_flags and kind in ("RefGroup", "String")):
            return None  # one character stands for several, or for others in other case
        if kind in CLASSES:
            found.append(class_of(node, info))
        elif kind == "String":
            found += map(letter, node.characters)
        elif kind in WORDS:
            found.append(word_letters(node, info))
        elif kind in _LINES:
            found.append(NEWLINE)
        elif kind not in _BLIND:
            return None
    return found


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
    """Find the characters that a class matches by running it over all of them.

    Args:
        program: the engine's instructions.
        encoding: `regex.ASCII` or `regex.UNICODE`, a property of the whole pattern: the engine asks
            it what a letter is and which letters differ in case only.
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
