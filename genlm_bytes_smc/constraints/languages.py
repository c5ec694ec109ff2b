"""Regular languages that texts are often held to, each a minimal byte automaton.

Which engine reads regular expressions (tried on one core): outlines-core 0.2.14 compiles as
fast, but its index over the 256 bytes refuses "bcé" for `[^a]+é?` and for `\\w{1,50}`;
llguidance derives lazily and names no states, so there is no table to gather from; the classes
of interegular and greenery are ASCII, and `re._parser` knows no `\\p{..}`. So: `regex` parses
and says what a class matches, and `automata/` does the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import torch

from genlm_bytes_smc.alphabet import N_BYTES
from genlm_bytes_smc.checks import check_count
from genlm_bytes_smc.constraints.automata.expressions import (
    Alternation,
    Chars,
    Concat,
    Node,
    Repeat,
    letter,
    table_of_bytes,
    table_of_characters,
)
from genlm_bytes_smc.constraints.automata.regex_parser import NotRegularError, parse
from genlm_bytes_smc.constraints.automata.table import (
    MAX_SECONDS,
    MAX_STATES,
    N_CODEPOINTS,
    Deadline,
    OutgrownError,
    Table,
    bytes_of_characters,
    in_walking_order,
    minimal,
    too_large,
)
from genlm_bytes_smc.constraints.base import ConstraintError, show
from genlm_bytes_smc.constraints.dfa import ByteDFA
from genlm_bytes_smc.constraints.predicate import PartialRegex
from genlm_bytes_smc.fast_path import warn_lost

_ANY_BYTES = Repeat(Chars(np.array([[0, N_BYTES]])), 0, None)
Device = torch.device | str | None


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
        device: torch.device | str | None = None,
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


class Utf8(ByteDFA):
    """Valid UTF-8: no overlong form, no surrogate, nothing above U+10FFFF, no cut character."""

    def __init__(self, *, device: Device = None) -> None:
        anything = Table(np.zeros((1, 1), dtype=np.int32), np.ones(1, dtype=np.bool_))
        self._adopt(_of_characters(anything), device)


class Length(ByteDFA):
    """Texts of a certain length.

    Args:
        minimum, maximum: the least and the most (None: no limit).
        unit: "bytes", or "characters" of valid UTF-8.
        device, max_states: as for `ByteDFA`.

    Raises:
        ConstraintError: a negative or inverted range, or another unit.
    """

    def __init__(
        self,
        minimum: int = 0,
        maximum: int | None = None,
        unit: str = "bytes",
        *,
        device: Device = None,
        max_states: int = MAX_STATES,
    ) -> None:
        check_count("max_states", max_states, 1)
        if minimum < 0 or (maximum is not None and maximum < minimum):
            raise ConstraintError(f"expected 0 <= minimum <= maximum, got {minimum}, {maximum}")
        if unit not in ("bytes", "characters"):
            raise ConstraintError(f"unit must be 'bytes' or 'characters', got {unit!r}")
        last = minimum if maximum is None else maximum
        if last >= max_states:
            raise too_large(max_states)
        chain = np.arange(1, last + 2, dtype=np.int32)[:, None]
        chain[last] = last if maximum is None else -1
        table = Table(chain, np.arange(last + 1) >= minimum)
        if unit == "bytes":
            table = Table(np.repeat(table.next, N_BYTES, axis=1), table.accept)
        else:
            table = _of_characters(table, max_states)
        # A chain is minimal as it stands: its states differ in how far the end is.
        self._adopt(table, device)
        self.minimum, self.maximum, self.unit = minimum, maximum, unit

    def _facts(self) -> dict[str, str]:
        most = "any" if self.maximum is None else self.maximum
        return {self.unit: f"{self.minimum}..{most}", **super()._facts()}


class MaxBytes(Length):
    """Texts of at most `n` bytes."""

    def __init__(self, n: int, *, device: Device = None, max_states: int = MAX_STATES) -> None:
        super().__init__(0, n, device=device, max_states=max_states)


class _OfStrings(ByteDFA):
    """A language given by a list of strings.

    Args:
        strings: the strings, `str` as UTF-8.
        device, max_states: as for `ByteDFA`.

    Attributes:
        strings: the distinct ones, as bytes.

    Raises:
        ConstraintError: no list of strings, an empty one, or too many states.
    """

    _before: tuple[Node, ...] = ()  # what may stand before a string, and after it
    _after: tuple[Node, ...] = ()

    def __init__(
        self,
        strings: Iterable[str | bytes],
        *,
        device: Device = None,
        max_states: int = MAX_STATES,
    ) -> None:
        self.strings = _byte_strings(strings, empty=not self._before)
        check_count("max_states", max_states, 1)
        words = tuple(Concat(tuple(map(letter, s))) for s in self.strings)
        table = table_of_bytes(self._language(words), max_states)
        self._adopt(table, device)

    def _language(self, words: tuple[Node, ...]) -> Node:
        """Return the language as an expression over bytes, given those of the strings."""
        return Concat((*self._before, Alternation(words), *self._after))

    def _facts(self) -> dict[str, str]:
        return {"strings": show(list(self.strings)), **super()._facts()}


class FiniteSet(_OfStrings):
    """Exactly the strings given (`str` as UTF-8); the empty one may be among them."""


class Ending(_OfStrings):
    """Texts that end in one of the strings given; they may also occur earlier."""

    _before = (_ANY_BYTES,)


class Containing(_OfStrings):
    """Texts in which one of the strings given occurs."""

    _before = _after = (_ANY_BYTES,)


class StopStrings(_OfStrings):
    """Texts that end right after the first stop string in them.

    Until one has been produced EOS has weight zero; once one has, only EOS is left. The stop
    string is part of the text (`before` gives the text without it).
    """

    _before = (_ANY_BYTES,)

    def _adopt(self, automaton: Table, device: Device) -> None:
        # Determinising gave the search automaton of Aho and Corasick 1975. Cutting what leaves
        # an accepting state makes the first stop the last thing.
        cut = np.where(automaton.accept[:, None], np.int32(-1), automaton.next)
        super()._adopt(minimal(Table(cut, automaton.accept)), device)

    def before(self, text: bytes) -> bytes:
        """Return `text` without the first stop string in it and what follows."""
        found = [(text.find(s) + len(s), text.find(s)) for s in self.strings if s in text]
        return text[: min(found)[1]] if found else text


class AtomicUnits(_OfStrings):
    """Texts made of whole units: a unit once begun is completed.

    A text is any number of units and ordinary bytes in any order. Ordinary bytes are, unless
    given, those that begin no unit; so a byte that begins one commits to it.

    Args:
        units: the strings of bytes that stay whole.
        ordinary: the bytes that may stand alone (None: those that begin no unit; b"": only
            units are left).
        device, max_states: as for `ByteDFA`.
    """

    def __init__(
        self,
        units: Iterable[str | bytes],
        ordinary: bytes | None = None,
        *,
        device: Device = None,
        max_states: int = MAX_STATES,
    ) -> None:
        units = _byte_strings(units, empty=False)
        if ordinary is None:
            ordinary = bytes(set(range(N_BYTES)) - {u[0] for u in units})
        if not isinstance(ordinary, bytes):
            raise ConstraintError(f"ordinary must be bytes or None, got {ordinary!r}")
        self.ordinary = ordinary
        super().__init__(units, device=device, max_states=max_states)

    def _language(self, words: tuple[Node, ...]) -> Node:
        alone = np.array(sorted(set(self.ordinary)), dtype=np.int64)
        ordinary = Chars(np.stack([alone, alone + 1], axis=1))
        return Repeat(Alternation((*words, ordinary)), 0, None)


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
    table_of_characters(letter(0), 2, Deadline())


def _of_characters(table: Table, limit: int = MAX_STATES) -> Table:
    """Return the byte automaton of one over a single class: every character."""
    every = np.zeros(N_CODEPOINTS, dtype=np.int64)
    return in_walking_order(bytes_of_characters(table, every, limit, Deadline()))


def _byte_strings(strings: Iterable[str | bytes], empty: bool) -> tuple[bytes, ...]:
    """Return the strings as distinct byte strings, checked."""
    if isinstance(strings, str | bytes):
        raise ConstraintError(f"expected several strings in a list, got {strings!r} alone")
    out: dict[bytes, None] = {}
    for s in strings:
        if not isinstance(s, str | bytes):
            raise ConstraintError(f"expected str or bytes, got {s!r} of type {type(s).__name__}")
        if not s and not empty:
            raise ConstraintError("an empty string is not allowed here")
        try:
            out[s.encode() if isinstance(s, str) else bytes(s)] = None
        except UnicodeEncodeError:
            raise ConstraintError(f"{s!r} has no UTF-8: it holds a lone surrogate") from None
    if not out:
        raise ConstraintError("expected at least one string, got none")
    return tuple(out)
