"""Regular expressions: as minimal byte automata, and text by text where there is none.

Which engine reads regular expressions (tried on one core): outlines-core 0.2.14 compiles as
fast, but its index over the 256 bytes refuses "bcé" for `[^a]+é?` and for `\\w{1,50}`;
llguidance derives lazily and names no states, so there is no table to gather from; the classes
of interegular and greenery are ASCII, and `re._parser` knows no `\\p{..}`. So: `regex` parses
and says what a class matches, and `automata/` does the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property, reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import regex

from genlm_bytes_smc.checks import check_count
from genlm_bytes_smc.constraints.automata import (
    MAX_SECONDS,
    MAX_STATES,
    N_CODEPOINTS,
    Deadline,
    Table,
)
from genlm_bytes_smc.constraints.base import (
    ConstraintError,
    NotRegularError,
    OutgrownError,
    show,
)
from genlm_bytes_smc.constraints.dfa import ByteDFA, Device
from genlm_bytes_smc.constraints.expressions import (
    Chars,
    letter,
    partition,
    table_of_characters,
)
from genlm_bytes_smc.constraints.regex_tree import (
    CLASSES,
    NEWLINE,
    WORDS,
    all_parts,
    class_of,
    parse,
    parsed,
    parts_of,
    word_letters,
)
from genlm_bytes_smc.constraints.tree import MAX_SNAPSHOTS, BytePredicate
from genlm_bytes_smc.fast_path import warn_lost

SECONDS = 5.0  # that one match may take
MOST_PARTS = 200_000  # `regex` writes every repeat out
MOST_FOUND = 1024  # texts of which it is known what may follow
_CONDITION = regex.compile(r"\\[bBmM]|\(\?\(?\??<?[!=]")  # word boundary or lookaround
_SHORTEST = (0, 0, 0x80, 0x800, 0x10000)  # the first code point of so many bytes
_LIKELY = "aA0 \n-_.é日"
# Parts that ask nothing of a character, and those that ask whether it is a newline.
_BLIND = {
    "Atomic", "Branch", "CallGroup", "Conditional", "EndOfString", "Failure", "GreedyRepeat",
    "Group", "Keep", "LazyRepeat", "LookAround", "LookAroundConditional", "PossessiveRepeat",
    "Prune", "RefGroup", "SearchAnchor", "Sequence", "Skip", "StartOfString",
}  # fmt: skip
_LINES = {"EndOfLine", "EndOfStringLine", "StartOfLine"}


class ByteRegex(ByteDFA):
    """The texts that a regular expression matches from end to end, as UTF-8.

    A text has weight 1 where `regex.fullmatch(pattern, text, flags)` matches and 0 elsewhere;
    bytes that are no UTF-8 have weight 0. Every admitted prefix can be completed.

    Lookahead, lookbehind, word boundaries and anchors in the middle are part of the automaton, and
    so are atomic groups and possessive repeats whose parts end in one place (`a++`, `(?>a|ab)`).
    What no automaton here expresses (backreferences, other atomic groups, recursion, conditionals
    on a group, full case folding and the like), and what outgrows the default limits, is matched
    text by text: `ByteRegex(pattern)` is then a `PartialRegex`, which is slower and may see late
    that a prefix cannot be completed. A `FastPathWarning` says so.

    Args:
        pattern: a pattern of the `regex` module. Anchors are fine anywhere. Classes are those
            of Unicode: `\\d` is hundreds of digits, `(?a)\\d` the ten of ASCII.
        flags: flags of the `regex` module.
        device: where the table lives and weights are returned (None: the CPU).
        max_states: refuse a pattern that needs more byte states than this (by default such a
            pattern is matched text by text).
        max_seconds: refuse a pattern that takes longer to compile (None: no limit; by default
            such a pattern is matched text by text).

    Raises:
        TypeError: `flags` or a limit of the wrong type.
        ConstraintError: the pattern does not parse, has the flag LOCALE or REVERSE, matches no
            text, outgrows a limit that was given, or outgrows all ways of matching it.

    Warns:
        FastPathWarning: the pattern is matched text by text; the message names the cause.
    """

    _built: Table | None = None  # from `__new__` to `__init__`

    def __new__(
        cls, pattern: str | None = None, flags: int = 0, *, device: Device = None, **limits: Any
    ) -> Any:
        """Make an automaton, or a `PartialRegex` where there is none (not of a subclass)."""
        new = super().__new__(cls)
        if pattern is None or cls is not ByteRegex:
            return new  # unpickled, or of a subclass, whose `__init__` may take anything
        try:
            new._built = _table_of_pattern(pattern, flags, **limits)
        except (NotRegularError, OutgrownError) as cause:
            outgrown = isinstance(cause, OutgrownError)
            if outgrown and limits:
                raise
            try:
                found = PartialRegex(pattern, flags, device=device)
            except ConstraintError:
                if outgrown:
                    raise cause from None
                raise
            warn_lost(f"{cause}; each distinct prefix is matched on its own, which is slower", 3)
            return found
        return new

    def __init__(
        self,
        pattern: str,
        flags: int = 0,
        *,
        device: Device = None,
        max_states: int = MAX_STATES,
        max_seconds: float | None = MAX_SECONDS,
    ) -> None:
        table = self.__dict__.pop("_built", None)
        if table is None:
            table = _table_of_pattern(pattern, flags, max_states, max_seconds)
        self._adopt(table, device)
        self.pattern = pattern
        self.flags = int(flags)

    def _facts(self) -> dict[str, str]:
        shown = {"pattern": show(self.pattern)}
        if self.flags:
            shown["flags"] = str(self.flags)
        return {**shown, **super()._facts()}


def _table_of_pattern(
    pattern: str,
    flags: int,
    max_states: int = MAX_STATES,
    max_seconds: float | None = MAX_SECONDS,
) -> Table:
    """Return the minimal byte automaton of a pattern; see `ByteRegex`."""
    check_count("max_states", max_states, 1)
    _compile_loops()
    deadline = Deadline(max_seconds)
    try:
        tree = parse(pattern, flags)
        deadline.check()
        return table_of_characters(tree, max_states, deadline)
    except RecursionError:
        raise ConstraintError(
            f"the pattern {show(pattern)} nests its groups more deeply than Python's recursion "
            "limit lets it be parsed; write fewer groups inside one another"
        ) from None


@cache
def _compile_loops() -> None:
    """Compile the loops beforehand: no pattern takes this time."""
    table_of_characters(letter(0), 2)


class PartialRegex(BytePredicate):
    """The texts that a pattern matches from end to end, matched once for each distinct prefix.

    `ByteRegex` gives one for a pattern that no automaton expresses. Weights of whole texts are
    exact. A prefix is let on where `regex.fullmatch(..., partial=True)` says that it may become
    a match; that may be wrong for some prefixes (after a lookahead, say), whose particles then
    die later than they need. The end of a prefix counts as the end of the text for word boundaries
    and negative lookahead in `regex`; of a pattern with such, a prefix is also let on where it may
    become a match with one more character, out of a few and those of the pattern. Inside a
    character, one of each kind is tried that begins like the last bytes.

    A row takes a match for each kind of character that the pattern tells apart, and for each that
    occurs in the text; of a pattern with a fuzzy part, `\\X` or a backreference that ignores case,
    one for each character, which may be thousands (so a character is let on until its last byte,
    and to its end unless the match is whole).

    Args:
        pattern, flags: as for `ByteRegex`.
        device: where weights are returned (None: the CPU).
        max_states: as for `BytePredicate`.

    Raises:
        ConstraintError: no pattern, or it matches no text.
    """

    _transient = BytePredicate._transient | {
        "fn",
        "prefix_fn",
        "_found",
        "_begun",
        "_kind",
        "_kinds",
    }
    # What is known of some texts: of each with one more character (or one of its kind), whether it
    # may become a match; and under None the text itself as the beginning of a match.
    _found: dict[str, dict[Any, Any]]
    _begun: dict[bytes, list[str]]  # see `_others`

    def __init__(
        self,
        pattern: str,
        flags: int = 0,
        *,
        device: Device = None,
        max_states: int = MAX_SNAPSHOTS,
    ) -> None:
        size = written_out(pattern, int(flags))
        if size > MOST_PARTS:
            raise ConstraintError(
                f"the pattern {show(pattern)} has {size} parts with its repeats written out; at "
                f"most {MOST_PARTS} can be matched text by text"
            )
        try:
            self._pattern = regex.compile(pattern, flags)
        except regex.error as error:
            raise ConstraintError(f"the pattern {show(pattern)} does not parse: {error}") from None
        self.pattern, self.flags = pattern, int(flags)
        self._found, self._begun = {}, {}
        looks = _CONDITION.search(pattern) is not None
        letters = (_LIKELY + pattern).encode("utf-8", "ignore").decode()  # no surrogates
        self._longer = "".join(dict.fromkeys(letters)) if looks else ""
        if not self._may_become(b""):
            raise ConstraintError(f"the pattern {show(pattern)} matches no text")
        super().__init__(self._is, self._may_become, device=device, max_states=max_states)

    def _forget(self) -> None:
        super()._forget()
        self.fn, self.prefix_fn = self._is, self._may_become
        self._found, self._begun = {}, {}

    @cached_property
    def _kinds(self) -> npt.NDArray[np.int32] | None:
        """Return what each code point counts as where a text does not have it (None: itself)."""
        classes = told_apart(self.pattern, self.flags)
        if classes is None:
            return None
        alone = [letter(ord(c)) for c in self._longer]
        kinds = partition(list(dict.fromkeys([*classes, *alone])), N_CODEPOINTS)[0]
        return kinds.astype(np.int32)  # 4 MiB

    @cached_property
    def _kind(self) -> Callable[[str], Any]:
        """The function that says what a character that does not occur in a text counts as."""
        kinds = self._kinds
        return str if kinds is None else lambda character: int(kinds[ord(character)])

    def _memory_of(self, text: str) -> dict[Any, Any]:
        if text not in self._found:
            if len(self._found) == MOST_FOUND:
                self._found.clear()
            self._found[text] = {}
        return self._found[text]

    def _match(self, text: str, *, partial: bool) -> Any:
        try:
            return self._pattern.fullmatch(text, partial=partial, timeout=SECONDS)
        except TimeoutError:
            raise ConstraintError(
                f"the pattern {show(self.pattern)} took more than {SECONDS:g} s on {show(text)}"
            ) from None

    def _is(self, text: bytes) -> bool:
        try:
            return self._match(text.decode("utf-8"), partial=False) is not None
        except UnicodeDecodeError:
            return False

    def _may_become(self, text: bytes) -> bool:
        """Return whether a text may become a match; inside a character, whether it may go on."""
        try:
            return self._may_go_on(text.decode("utf-8"))
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                return False
            if self._kinds is None:  # thousands may follow: tried after a whole match alone
                known = self._memory_of(before := text[: error.start].decode("utf-8"))
                if None not in known:
                    known[None] = self._match(before, partial=True)
                if known[None] is None:
                    return bool(self._longer) and self._may_go_on(before)
                if known[None].partial:
                    return True
            return self._goes_on(text, error.start)

    def _may_go_on(self, text: str) -> bool:
        """Return whether a text may become a match, as it stands or with one more character."""
        before, last = text[:-1], text[-1:]
        known = self._memory_of(before)
        key = last if last in before else self._kind(last)
        if key not in known:
            longer = (text, *(text + c for c in self._longer))
            known[key] = any(self._match(t, partial=True) is not None for t in longer)
        return bool(known[key])

    def _goes_on(self, text: bytes, whole: int) -> bool:
        """Return whether some character that begins like the last bytes may follow."""
        before, begun = text[:whole].decode(), text[whole:]
        length = 2 if begun[0] < 0xE0 else 3 if begun[0] < 0xF0 else 4
        rest = length - len(begun)
        if self._kinds is None and rest > 1:
            return True  # thousands may follow: the next byte says more
        first = begun[0] & (0x7F >> length)
        low = reduce(lambda n, byte: n << 6 | byte & 0x3F, begun[1:], first) << 6 * rest
        low, high = max(low, _SHORTEST[length]), min(low + (1 << 6 * rest), N_CODEPOINTS)
        named = [c for c in dict.fromkeys(before) if low <= ord(c) < high]
        letters = named + self._others(begun, low, high, named)
        return any(self._may_go_on(before + c) for c in letters)

    def _others(self, begun: bytes, low: int, high: int, taken: list[str]) -> list[str]:
        """Return a character of each kind in [low, high), of those that are not taken."""
        if self._kinds is None:
            return [chr(c) for c in range(low, high)]
        if begun not in self._begun or taken:
            kinds = self._kinds[low:high].copy()
            kinds[[ord(c) - low for c in taken]] = -1
            kinds[max(0xD800 - low, 0) : max(0xE000 - low, 0)] = -1  # surrogates
            found = [chr(low + i) for i in np.unique(kinds, return_index=True)[1] if kinds[i] >= 0]
            if taken:
                return found
            self._begun[begun] = found
        return self._begun[begun]

    def _facts(self) -> dict[str, str]:
        shown = {"pattern": show(self.pattern), "texts": str(self.n_texts)}
        return shown | ({"flags": str(self.flags)} if self.flags else {})


def written_out(pattern: str, flags: int) -> int:
    """Return how many parts a pattern has once each repeat is written out, which `regex` does.

    Raises:
        ConstraintError: it is no pattern.
    """
    try:
        return _written_out(parsed(pattern, flags)[0])
    except regex.error as e:
        raise ConstraintError(f"the pattern {show(pattern)} does not parse: {e.msg}") from None


def _written_out(node: Any) -> int:
    most = getattr(node, "max_count", 1)
    times = max(getattr(node, "min_count", 1), 1 if most is None else most)
    return int(times) * (1 + sum(map(_written_out, parts_of(node))))


def told_apart(pattern: str, flags: int) -> list[Chars] | None:
    """Return the classes by which a pattern tells characters apart (None: unknown).

    Two characters that are in the same classes, and do not occur in a text, may stand for one
    another at its end: it is a match, or the beginning of one, with both or with neither.
    """
    tree, info = parsed(pattern, flags)
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
