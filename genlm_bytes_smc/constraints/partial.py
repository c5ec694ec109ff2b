"""Patterns that no automaton expresses, matched text by text.

The `regex` module says whether a text is a match, and whether it may become one. That holds for
backreferences, recursion, conditionals, lookaround and all else that it knows.
"""

from __future__ import annotations

from typing import Any

import regex
import torch

from genlm_bytes_smc.constraints.automata.regex_parser import written_out
from genlm_bytes_smc.constraints.base import ConstraintError, show
from genlm_bytes_smc.constraints.predicate import BytePredicate
from genlm_bytes_smc.constraints.tree import MAX_SNAPSHOTS

SECONDS = 5.0  # that one match may take
MOST_PARTS = 200_000  # `regex` writes every repeat out
_CONDITION = regex.compile(r"\\[bBmM]|\(\?\(?\??<?[!=]")  # word boundary or lookaround
_LAST = (b"\x80", b"\xa0", b"\xbf")  # characters from all over a range
_LIKELY = "aA0 \n-_.é日"


class PartialRegex(BytePredicate):
    """The texts that a pattern matches from end to end, matched once for each distinct prefix.

    `ByteRegex` gives one for a pattern that no automaton expresses. Weights of whole texts are
    exact. A prefix is let on where `regex.fullmatch(..., partial=True)` says that it may become
    a match; that may be wrong for some prefixes (after a lookahead, say), whose particles then
    die later than they need. The end of a prefix counts as the end of the text for word boundaries
    and negative lookahead in `regex`; of a pattern with such, a prefix is also let on where it may
    become a match with one more character, out of a few and those of the pattern. After a match
    that is whole, up to 192 characters are tried that begin like the last bytes. A row takes some
    256 matches, or thousands where most are tried in vain.

    Args:
        pattern, flags: as for `ByteRegex`.
        device: where weights are returned (None: the CPU).
        max_states: texts held between calls.

    Raises:
        ConstraintError: no pattern, or it matches no text.
    """

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
        looks = _CONDITION.search(pattern) is not None
        letters = (_LIKELY + pattern).encode("utf-8", "ignore").decode()  # no surrogates
        self._longer = "".join(dict.fromkeys(letters)) if looks else ""
        if not self._may_become(b""):
            raise ConstraintError(f"the pattern {show(pattern)} matches no text")
        super().__init__(self._is, self._may_become, device=device, max_states=max_states)

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
            found = self._match(before, partial=True)
            if found is None:
                return bool(self._longer) and self._may_go_on(before)
            return bool(found.partial or self._goes_on(text, error.start))

    def _may_go_on(self, text: str) -> bool:
        """Return whether a text may become a match, as it stands or with one more character."""
        longer = (text, *(text + c for c in self._longer))
        return any(self._match(t, partial=True) is not None for t in longer)

    def _goes_on(self, text: bytes, whole: int) -> bool:
        """Return whether some character that begins like the last bytes may follow."""
        begun = text[whole:]
        missing = _length(begun[0]) - len(begun)
        tails = [b""] if missing == 1 else [last * (missing - 1) for last in _LAST]
        likely = [begun + bytes([b]) + tail for b in range(0x80, 0xC0) for tail in tails]
        named = [letter for c in self._longer if (letter := c.encode("utf-8")).startswith(begun)]
        for rest in named + likely:
            try:
                longer = text[:whole].decode() + rest.decode()
            except UnicodeDecodeError:
                continue
            if self._may_go_on(longer):
                return True
        return False

    def __getstate__(self) -> dict[str, Any]:
        hidden = ("_pattern", "fn", "prefix_fn")
        return {k: v for k, v in super().__getstate__().items() if k not in hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pattern = regex.compile(self.pattern, self.flags)
        self.fn, self.prefix_fn = self._is, self._may_become

    def _facts(self) -> dict[str, str]:
        shown = {"pattern": show(self.pattern), "texts": str(self.n_texts)}
        return shown | ({"flags": str(self.flags)} if self.flags else {})


def _length(first: int) -> int:
    """Return the bytes of a character by its first one."""
    return 2 if first < 0xE0 else 3 if first < 0xF0 else 4
