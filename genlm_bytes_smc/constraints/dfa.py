"""Deterministic byte automata on the device: a lane is one integer, a step is one gather.

`ByteDFA`, and the languages other than regular expressions that texts are often held to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.alphabet import N_BYTES
from genlm_bytes_smc.checks import check_count
from genlm_bytes_smc.constraints.automata import MAX_STATES, Table, combine, minimal
from genlm_bytes_smc.constraints.base import (
    DEAD,
    BoolArray,
    ByteConstraint,
    ConstraintError,
    log_of,
    show,
    too_large,
)
from genlm_bytes_smc.constraints.expressions import (
    ANY,
    Alternation,
    Chars,
    Concat,
    Node,
    Repeat,
    letter,
    table_of_bytes,
    table_of_characters,
)

_ANY_BYTES = Repeat(Chars(np.array([[0, N_BYTES]])), 0, None)
_ANY_CHARACTERS = Repeat(ANY, 0, None)
Device = torch.device | str | None


class ByteDFA(ByteConstraint):
    """The texts that a deterministic automaton accepts have weight 1 (log 0), others 0.

    The automaton is trimmed and minimised when it is made, so a prefix has log weight 0
    exactly when some accepted text begins with it. The states a lane can be in are
    0..`n_states`-1, and -1 once it has left the language.

    Args:
        table: int[S, 256], the state after each byte, or -1 for none. State 0 is the start.
        accept: bool[S], where a text may end.
        device: where the table lives and weights are returned (None: the CPU).
        max_states: refuse an automaton with more minimal states than this.

    Attributes:
        table: int32[n_states, 256] on the device, minimal.
        accept: bool[n_states] on the device.

    Raises:
        ConstraintError: wrong shapes, targets that are no states, or an empty language.
    """

    def __init__(
        self,
        table: npt.ArrayLike,
        accept: npt.ArrayLike,
        *,
        device: Device = None,
        max_states: int = MAX_STATES,
    ) -> None:
        check_count("max_states", max_states, 1)
        automaton = minimal(_checked(np.asarray(table), np.asarray(accept)))
        if len(automaton) > max_states:
            raise too_large(max_states)
        self._adopt(automaton, device)

    def _adopt(self, automaton: Table, device: Device) -> None:
        """Become this automaton, which is minimal and over bytes."""
        ByteConstraint.__init__(self, device)
        # The last row is the dead state's: indexing with -1 reads it.
        table = np.append(automaton.next, np.full((1, N_BYTES), DEAD, np.int32), axis=0)
        self._table = torch.from_numpy(table).to(self.device)
        self._accept = torch.from_numpy(np.append(automaton.accept, False)).to(self.device)

    @classmethod
    def _of(cls, automaton: Table, device: Device) -> ByteDFA:
        new = ByteDFA.__new__(ByteDFA)
        new._adopt(automaton, device)
        return new

    @property
    def table(self) -> torch.Tensor:
        """The state after each byte, int32[n_states, 256], -1 where there is none."""
        return self._table[:-1]

    @property
    def accept(self) -> torch.Tensor:
        """Mask of the states in which a text may end, bool[n_states]."""
        return self._accept[:-1]

    @property
    def n_states(self) -> int:
        """Number of states of the minimal automaton, the dead one not counted."""
        return len(self._table) - 1

    def block(self, state: torch.Tensor) -> torch.Tensor:
        """Log weights of next byte and EOS, 0 or -inf: int64[n] -> float64[n, 257]."""
        out = self.alloc_rows(len(state))
        out[:, :N_BYTES].masked_fill_(self._table[state] >= 0, 0.0)
        out[:, N_BYTES].masked_fill_(self._accept[state], 0.0)
        return out

    def step(self, state: torch.Tensor, symbols: torch.Tensor) -> torch.Tensor:
        """Read one byte a lane: int64[n], int64[n] -> int64[n]."""
        return self._table[state, symbols].long()

    def log_complete(self, state: torch.Tensor) -> torch.Tensor:
        """0 where the text may end and -inf elsewhere: int64[n] -> float64[n]."""
        return log_of(self._accept[state])

    def host_table(self) -> Table:
        """Return the automaton as numpy arrays on the host."""
        return Table(self.table.cpu().numpy(), self.accept.cpu().numpy())

    def __and__(self, other: ByteDFA) -> ByteDFA:
        """Return the texts that both accept, as one minimal automaton on this one's device."""
        return self._combine(other, np.logical_and)

    def __or__(self, other: ByteDFA) -> ByteDFA:
        """Return the texts that either accepts, as one minimal automaton on this one's device."""
        return self._combine(other, np.logical_or)

    def __sub__(self, other: ByteDFA) -> ByteDFA:
        """Return the texts that this one accepts and the other does not."""
        return self._combine(other, lambda a, b: a & ~b)

    def _combine(
        self, other: ByteDFA, accept: Callable[[BoolArray, BoolArray], BoolArray]
    ) -> ByteDFA:
        if not isinstance(other, ByteDFA):
            return NotImplemented
        table = combine(self.host_table(), other.host_table(), accept, MAX_STATES)
        return ByteDFA._of(table, self.device)

    def _facts(self) -> dict[str, str]:
        return {"states": str(self.n_states)}


def _checked(table: npt.NDArray[np.generic], accept: npt.NDArray[np.generic]) -> Table:
    if table.ndim != 2 or table.shape[1] != N_BYTES or table.dtype.kind not in "iu":
        raise ConstraintError(
            f"table must be integers of shape [states, {N_BYTES}], "
            f"got {table.dtype} of shape {list(table.shape)}"
        )
    if accept.shape != (len(table),) or accept.dtype != np.bool_:
        raise ConstraintError(
            f"accept must be bool of shape [{len(table)}], one entry for each row of table, "
            f"got {accept.dtype} of shape {list(accept.shape)}"
        )
    if not len(table):
        raise ConstraintError("table must have at least one state, got none")
    low, high = int(table.min()), int(table.max())
    if low < DEAD or high >= len(table):
        raise ConstraintError(
            f"the targets in table must be -1 (none) or states 0..{len(table) - 1}, "
            f"got values from {low} to {high}"
        )
    return Table(table.astype(np.int32), accept.astype(np.bool_))


class Utf8(ByteDFA):
    """Valid UTF-8: no overlong form, no surrogate, nothing above U+10FFFF, no cut character."""

    def __init__(self, *, device: Device = None) -> None:
        self._adopt(table_of_characters(_ANY_CHARACTERS, MAX_STATES), device)


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
        if unit == "bytes":
            table = table_of_bytes(replace(_ANY_BYTES, low=minimum, high=maximum), max_states)
        else:
            any_text = replace(_ANY_CHARACTERS, low=minimum, high=maximum)
            table = table_of_characters(any_text, max_states)
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
