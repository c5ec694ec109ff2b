"""Context-free grammars in Lark's notation, or in that of llama.cpp and xgrammar (GBNF)."""

from __future__ import annotations

import re

import torch
from llguidance import LLMatcher
from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

from genlm_bytes_smc.constraints.base import ConstraintError, show
from genlm_bytes_smc.constraints.matcher import MAX_SIZE, ByteMatcher, check_size, on_large_stack
from genlm_bytes_smc.constraints.tree import MAX_SNAPSHOTS

_RULE_OF_GBNF = re.compile(r"^[ \t]*([A-Za-z][\w-]*)[ \t]*::=", re.MULTILINE)


class ByteGrammar(ByteMatcher):
    """The texts that a context-free grammar derives, as UTF-8.

    The notation is llguidance's variant of Lark's: rules in lower case, terminals in upper
    case, `%ignore`, `%import common.X`, `%json {...}` for a schema inside a grammar. A grammar with
    rules like `root ::= "a" | b` is taken as GBNF, the notation of llama.cpp and xgrammar, and is
    converted by llguidance.

    Args:
        lark_source: the grammar.
        start: the rule that derives whole texts; of GBNF "start" stands for its `root`.
        device: where weights are returned (None: the CPU).
        max_states: matchers held between calls (1 KiB and some 100 bytes a byte read, each).
        max_size: refuse a grammar of more characters than this.

    Raises:
        TypeError: a limit that is no int.
        ConstraintError: the grammar is too long, does not parse, uses what llguidance does not
            support, or admits no text.
    """

    def __init__(
        self,
        lark_source: str,
        start: str = "start",
        *,
        device: torch.device | str | None = None,
        max_states: int = MAX_SNAPSHOTS,
        max_size: int = MAX_SIZE,
    ) -> None:
        if not isinstance(lark_source, str):
            raise ConstraintError(
                f"a grammar is a str in Lark's notation, got {type(lark_source).__name__}"
            )
        check_size(lark_source, max_size)
        try:
            lark_source.encode()
        except UnicodeEncodeError as e:
            raise ConstraintError(
                f"a grammar is Unicode text, got a lone surrogate at position {e.start}"
            ) from None
        self.lark_source = lark_source
        self.start = start
        if _RULE_OF_GBNF.search(lark_source):
            lark_source, start = _from_gbnf(lark_source, start), "start"
        if not re.fullmatch(r"[a-z_][a-z0-9_]*", start):
            raise ConstraintError(f"start must be the name of a rule (lower case), got {start!r}")
        if start != "start":
            # llguidance always begins at `start`.
            if re.search(r"^\s*start\b[^:\n]*:", lark_source, re.MULTILINE):
                raise ConstraintError(
                    f"the grammar has a rule named start, so it cannot begin at {start!r}; "
                    "rename that rule"
                )
            lark_source = f"start: {start}\n{lark_source}"
        grammar = on_large_stack(len(lark_source), LLMatcher.grammar_from_lark, lark_source)
        super().__init__(grammar, device, max_states)

    def _facts(self) -> dict[str, str]:
        return {"grammar": show(self.lark_source), "start": self.start, **super()._facts()}


def _from_gbnf(source: str, start: str) -> str:
    """Return a grammar in GBNF in Lark's notation.

    Raises:
        ConstraintError: it does not parse (with the line), or has no rule to begin with.
    """
    rules = set(_RULE_OF_GBNF.findall(source))
    first = "root" if start == "start" else start
    if first not in rules:
        raise ConstraintError(
            f"a grammar in GBNF begins with its rule {first!r}, got {', '.join(sorted(rules))}"
        )
    if first != "root":
        # The converter always begins at `root`; what other rules call by that name stays.
        if "root" in rules:
            source = re.sub(r"(?<![\w-])root(?![\w-])", "other-root", source)
        source = f"root ::= {first}\n{source}"
    try:
        return str(gbnf_to_lark(source))
    except GbnfToLarkError as error:
        raise ConstraintError(f"the grammar does not parse as GBNF: {error}") from None
