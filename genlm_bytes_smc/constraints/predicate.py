"""Python functions of the text as constraints; patterns that no automaton expresses among them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
import regex
import torch

from genlm_bytes_smc.alphabet import EOS_COLUMN, N_BYTES, N_SYMBOLS
from genlm_bytes_smc.constraints.automata.expressions import letter, partition
from genlm_bytes_smc.constraints.automata.regex_tree import told_apart, written_out
from genlm_bytes_smc.constraints.automata.table import N_CODEPOINTS
from genlm_bytes_smc.constraints.base import (
    BoolArray,
    ConstraintError,
    FloatArray,
    IntArray,
    show,
)
from genlm_bytes_smc.constraints.tree import MAX_SNAPSHOTS, TreeConstraint

Weight = bool | float
SECONDS = 5.0  # that one match may take
MOST_PARTS = 200_000  # `regex` writes every repeat out
MOST_FOUND = 1024  # texts of which it is known what may follow
_CONDITION = regex.compile(r"\\[bBmM]|\(\?\(?\??<?[!=]")  # word boundary or lookaround
_LAST = (b"\x80", b"\xa0", b"\xbf")  # characters from all over a range
_LIKELY = "aA0 \n-_.é日"


class BytePredicate(TreeConstraint):
    """A whole text is weighed by a function; a prefix by another, or not at all.

    A function returns a bool (True is log weight 0, False is -inf) or a log weight in nats.
    Each is called once for a text it is asked about, for as long as the text is remembered.

    Args:
        fn: weighs whole texts.
        prefix_fn: weighs prefixes, the empty one included. A prefix of weight zero ends
            everything that begins with it. Without it every prefix has log weight 0; with it
            a row of next-byte weights takes 256 calls.
        device: where weights are returned (None: the CPU).
        max_states: where only contexts are asked about, a quarter of the texts remembered.

    Raises:
        ConstraintError: fn or prefix_fn is not callable, or the empty text, a prefix of every
            other, has weight zero as one.
        ValueError, TypeError: later, when a function returns NaN, +inf or no weight at all.
    """

    _transient = TreeConstraint._transient | {"_complete", "_prefix"}

    def __init__(
        self,
        fn: Callable[[bytes], Weight],
        prefix_fn: Callable[[bytes], Weight] | None = None,
        *,
        device: torch.device | str | None = None,
        max_states: int = MAX_SNAPSHOTS,
    ) -> None:
        for name, value in (("fn", fn), ("prefix_fn", prefix_fn)):
            if not callable(value) and (name == "fn" or value is not None):
                raise ConstraintError(f"{name} must be a function of bytes, got {value!r}")
        super().__init__(device, max_states)
        self.fn, self.prefix_fn = fn, prefix_fn
        if prefix_fn is not None and _weigh(prefix_fn, b"", "prefix_fn") == -math.inf:
            raise ConstraintError("prefix_fn gives the empty text weight zero: no text is left")

    def is_terminal_only(self) -> bool:
        """Return whether only whole texts are weighed."""
        return self.prefix_fn is None

    def log_prefix(self, state: torch.Tensor) -> torch.Tensor:
        """Log weight of each state as a prefix: int64[n] -> float64[n]."""
        if self.prefix_fn is None:
            return super().log_prefix(state)
        return self._by_node(state, lambda n: torch.from_numpy(self._prefixes(n)).to(self.device))

    def _forget(self) -> None:
        super()._forget()
        self._complete: dict[int, float] = {}  # node -> log weight
        self._prefix: dict[int, float] = {}

    def _admitted(self, nodes: IntArray, symbols: IntArray) -> BoolArray:
        if self.prefix_fn is None:
            return np.ones(len(nodes), dtype=np.bool_)
        children = self.tree.children(nodes, symbols)
        admitted: BoolArray = self._prefixes(children) > -math.inf
        return admitted

    def _rows(self, nodes: IntArray) -> torch.Tensor:
        rows = np.zeros((len(nodes), N_SYMBOLS))
        for row, node in zip(rows, nodes.tolist(), strict=True):
            text = self.text(node)
            if node not in self._complete:
                self._complete[node] = _weigh(self.fn, text, "fn")
            row[EOS_COLUMN] = self._complete[node]
            if self.prefix_fn is not None:
                longer = [text + bytes([b]) for b in range(N_BYTES)]
                row[:N_BYTES] = [_weigh(self.prefix_fn, t, "prefix_fn") for t in longer]
        return torch.from_numpy(rows - self._prefixes(nodes)[:, None]).to(self.device)

    def _prefixes(self, nodes: IntArray) -> FloatArray:
        """Return the prefix weight of each live node."""
        if self.prefix_fn is None:
            return np.zeros(len(nodes))
        for node in nodes.tolist():
            if node not in self._prefix:
                self._prefix[node] = _weigh(self.prefix_fn, self.text(node), "prefix_fn")
        return np.array([self._prefix[n] for n in nodes.tolist()])

    def _freed(self, nodes: IntArray) -> None:
        for node in nodes.tolist():
            self._complete.pop(node, None)
            self._prefix.pop(node, None)

    def _facts(self) -> dict[str, str]:
        named = {"fn": self.fn, "prefix_fn": self.prefix_fn}
        shown = {k: getattr(f, "__qualname__", repr(f)) for k, f in named.items() if f}
        return {**shown, "texts": str(self.n_texts)}


def _weigh(fn: Callable[[bytes], Weight], text: bytes, name: str) -> float:
    """Return the log weight that `fn` gives `text`, checked."""
    value = fn(text)
    if isinstance(value, bool | np.bool_):
        return 0.0 if value else -math.inf
    if not isinstance(value, numbers.Real):
        raise TypeError(
            f"{name}({text!r}) must return a bool or a log weight (float), got {value!r} "
            f"of type {type(value).__name__}"
        )
    weight = float(value)
    if math.isnan(weight) or weight == math.inf:
        raise ValueError(
            f"{name}({text!r}) returned {weight}; a log weight is a number of nats below +inf"
        )
    return weight


class PartialRegex(BytePredicate):
    """The texts that a pattern matches from end to end, matched once for each distinct prefix.

    `ByteRegex` gives one for a pattern that no automaton expresses. Weights of whole texts are
    exact. A prefix is let on where `regex.fullmatch(..., partial=True)` says that it may become
    a match; that may be wrong for some prefixes (after a lookahead, say), whose particles then
    die later than they need. The end of a prefix counts as the end of the text for word boundaries
    and negative lookahead in `regex`; of a pattern with such, a prefix is also let on where it may
    become a match with one more character, out of a few and those of the pattern. After a match
    that is whole, up to 192 characters are tried that begin like the last bytes.

    A row takes a match for each kind of character that the pattern tells apart, and for each that
    occurs in the text; of a pattern with a fuzzy part, `\\X` or a backreference that ignores case,
    one for each character, which may be thousands.

    Args:
        pattern, flags: as for `ByteRegex`.
        device: where weights are returned (None: the CPU).
        max_states: as for `BytePredicate`.

    Raises:
        ConstraintError: no pattern, or it matches no text.
    """

    _transient = BytePredicate._transient | {"fn", "prefix_fn", "_found", "_kind"}
    # What is known of some texts: of each with one more character (or one of its kind), whether it
    # may become a match; and under None the text itself as the beginning of a match.
    _found: dict[str, dict[Any, Any]]

    def __init__(
        self,
        pattern: str,
        flags: int = 0,
        *,
        device: torch.device | str | None = None,
        max_states: int = MAX_SNAPSHOTS,
    ) -> None:
        size = written_out(pattern, flags)
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
        self._found = {}
        looks = _CONDITION.search(pattern) is not None
        letters = (_LIKELY + pattern).encode("utf-8", "ignore").decode()  # no surrogates
        self._longer = "".join(dict.fromkeys(letters)) if looks else ""
        if not self._may_become(b""):
            raise ConstraintError(f"the pattern {show(pattern)} matches no text")
        super().__init__(self._is, self._may_become, device=device, max_states=max_states)

    def _forget(self) -> None:
        super()._forget()
        self.fn, self.prefix_fn = self._is, self._may_become
        self._found = {}

    @cached_property
    def _kind(self) -> Callable[[str], Any]:
        """The function that says what a character that does not occur in a text counts as."""
        classes = told_apart(self.pattern, self.flags)
        if classes is None:
            return str
        alone = [letter(ord(c)) for c in self._longer]
        kinds = partition(list(dict.fromkeys([*classes, *alone])), N_CODEPOINTS, slice(0, 0))[0]
        kinds = kinds.astype(np.int32)  # 4 MiB
        return lambda character: int(kinds[ord(character)])

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
            before = text[: error.start].decode("utf-8")
            known = self._memory_of(before)
            if None not in known:
                known[None] = self._match(before, partial=True)
            found = known[None]
            if found is None:
                return bool(self._longer) and self._may_go_on(before)
            return bool(found.partial or self._goes_on(text, error.start))

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
        tails = dict.fromkeys(last * (length - len(begun) - 1) for last in _LAST)
        likely = [begun + bytes([b]) + tail for b in range(0x80, 0xC0) for tail in tails]
        named = [letter for c in self._longer if (letter := c.encode("utf-8")).startswith(begun)]
        for rest in named + likely:
            with suppress(UnicodeDecodeError):
                if self._may_go_on(before + rest.decode()):
                    return True
        return False

    def _facts(self) -> dict[str, str]:
        shown = {"pattern": show(self.pattern), "texts": str(self.n_texts)}
        return shown | ({"flags": str(self.flags)} if self.flags else {})
