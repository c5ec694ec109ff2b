"""Constraints that llguidance decides; context-free grammars.

llguidance runs here in byte mode: its vocabulary is the 256 one-byte tokens and EOS, so a
mask has 257 bits. A text's snapshot is an `LLMatcher` that has read it. Copying one takes
time and memory in proportion to what it has read, so a text that is extended hands its
matcher on, and only a fork copies: there is one matcher for each text that lanes stand at,
not for each they passed. A text asked about again after it handed its matcher on gets a copy
of the one that now has it, rolled back. Masks (33 bytes) stay for as long as the text does.

Not exact in one corner: llguidance does not look for rules of a grammar that derive nothing.
Where one is all that is left, it goes on for ever, or gives up (`MatcherError`); where it is
all there is from the beginning, the grammar is refused. Lexemes (regular expressions, JSON strings
and numbers) are exact. The byte 0xFF marks special tokens there and is never admitted; no UTF-8
text contains it.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import gbnf_to_lark

from genlm_bytes_smc.alphabet import BYTES, EOS_COLUMN, N_SYMBOLS
from genlm_bytes_smc.checks import check_count
from genlm_bytes_smc.constraints.base import BoolArray, ConstraintError, IntArray, show
from genlm_bytes_smc.constraints.tree import MAX_SNAPSHOTS, TreeConstraint

T = TypeVar("T")
MAX_SIZE = 2**18
# llguidance calls itself once for each rule or reference that leads to another. A chain of rules
# with the shortest names, in 1.9.1, takes between 256 and 512 bytes of stack a character.
_STACK_A_CHARACTER = 2048
_LEAST_STACK = 2**24
_stack_size = threading.Lock()

_MASK_BYTES = -(-N_SYMBOLS // 8)
END_BIT = 1 << EOS_COLUMN  # of a mask as an int
_RULE_OF_GBNF = re.compile(r"^[ \t]*([A-Za-z][\w-]*)[ \t]*::=", re.MULTILINE)
LONGEST_FORCED = 4096  # a rule that derives nothing may force bytes for ever


class MatcherError(RuntimeError):
    """llguidance gave up on a text (a limit of its parser, not a text it rejects)."""


class _ByteTokens:
    """The vocabulary llguidance sees: every byte is a token, and EOS is one more."""

    eos_token_id = EOS_COLUMN
    bos_token_id = None
    tokens = [*BYTES, b"<eos>"]  # noqa: RUF012
    special_token_ids = [EOS_COLUMN]  # noqa: RUF012

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


@cache
def byte_tokenizer() -> Any:
    """Return llguidance's view of the byte alphabet, made once a process."""
    return LLTokenizer(TokenizerWrapper(_ByteTokens()), n_vocab=N_SYMBOLS, slices=[])


class ByteMatcher(TreeConstraint):
    """The texts that llguidance admits have weight 1 (log 0), others 0.

    Args:
        grammar: a grammar in llguidance's own form.
        device: where weights are returned (None: the CPU).
        max_states: matchers held between calls (1 KiB and some 100 bytes a byte read, each).

    Attributes:
        warnings: llguidance's warnings about the grammar.

    Raises:
        ConstraintError: llguidance refuses the grammar; its reason is in the message.
    """

    # The grammar is compiled again where it arrives.
    _transient = TreeConstraint._transient | {"_matcher", "_heirs"}

    def __init__(self, grammar: str, device: torch.device | str | None, max_states: int) -> None:
        super().__init__(device, max_states)
        self._grammar = grammar
        self.__dict__.pop("_matcher", None)  # of a grammar that was tried before
        self.warnings: list[str] = list(self._matcher.get_grammar_warnings())
        forced, mask = read_forced(self.matcher())
        if not mask and len(forced) < LONGEST_FORCED:
            what = f"follow {show(forced)}" if forced else "stand first"
            raise ConstraintError(f"the grammar admits no text at all: nothing may {what}")

    def _forget(self) -> None:
        super()._forget()
        self._heirs: dict[int, int] = {}  # of a node that handed its matcher on: who has it

    @cached_property
    def _matcher(self) -> Any:
        return on_large_stack(len(self._grammar), _compiled, self._grammar)

    def matcher(self) -> Any:
        """Return a matcher of llguidance that has read nothing, for its caller alone."""
        return self._matcher.deep_copy()

    def _at(self, nodes: IntArray) -> list[Any]:
        """Return the matchers of distinct live nodes, which are then held."""
        held, wanted = self._snapshots, nodes.tolist()
        held.setdefault(0, self._matcher)
        missing = sorted((n for n in wanted if n not in held), key=self.tree.depth.__getitem__)
        sources = [self._source(node) for node in missing]
        uses = Counter(source for source, _ in sources)
        uses.update([0, *wanted])  # these keep theirs
        for node, (source, unread) in zip(missing, sources, strict=True):
            uses[source] -= 1
            matcher = self._taken(source, uses[source] == 0, node)
            self.reads += len(unread)
            if matcher.try_consume_tokens(unread) != len(unread) or matcher.is_error():
                raise MatcherError(f"llguidance gave up at {unread}: {_reason(matcher)}")
            held[node] = matcher
        for node in wanted:
            held.move_to_end(node)
        return [held[node] for node in wanted]

    def _source(self, node: int) -> tuple[int, list[int]]:
        """Return the nearest ancestor with a matcher or an heir, and the bytes from there on."""
        unread = []
        while node not in self._snapshots and self._heir(node) is None:
            unread.append(int(self.tree.token[node]))
            node = int(self.tree.parent[node])
        return node, unread[::-1]

    def _heir(self, node: int) -> int | None:
        """Return the node that now holds the matcher of `node`, if it is still held."""
        passed = []
        while node in self._heirs:
            passed.append(node)
            node = self._heirs[node]
        alive = bool(passed) and node in self._snapshots
        for n in passed:  # remember the end of the chain, or that it broke
            if alive:
                self._heirs[n] = node
            else:
                del self._heirs[n]
        return node if alive else None

    def _taken(self, source: int, hand_on: bool, node: int) -> Any:
        """Return a matcher that has read the text of `source`, to be used for `node`."""
        matcher = self._snapshots.get(source)
        if matcher is None:
            heir = self._heir(source)
            assert heir is not None, "a source has a matcher or an heir"
            matcher = self._snapshots[heir].deep_copy()
            matcher.rollback(int(self.tree.depth[heir] - self.tree.depth[source]))
            return matcher
        if not hand_on:
            return matcher.deep_copy()
        self._heirs[source] = node
        return self._snapshots.pop(source)

    def _may_end(self, node: int) -> bool:
        """Return whether a text may end at a node where llguidance would let it."""
        return True

    def _masks_of(self, nodes: IntArray) -> BoolArray:
        """Return what may follow each node, bool[m, 257]."""
        masks = self._noted["mask"]
        unknown = nodes[[n not in masks for n in nodes.tolist()]]
        if len(unknown):
            for node, matcher in zip(unknown.tolist(), self._at(unknown), strict=True):
                mask = mask_of(matcher)
                if matcher.is_error():
                    raise MatcherError(f"llguidance gave up: {_reason(matcher)}")
                if mask & END_BIT and not self._may_end(node):
                    mask ^= END_BIT
                masks[node] = mask.to_bytes(_MASK_BYTES, "little")
        packed = np.frombuffer(b"".join([masks[n] for n in nodes.tolist()]), dtype=np.uint8)
        bits = np.unpackbits(packed.reshape(len(nodes), -1), axis=1, bitorder="little")
        return bits[:, :N_SYMBOLS].astype(np.bool_)

    def _admitted(self, nodes: IntArray, symbols: IntArray) -> BoolArray:
        return self._masks_of(nodes)[np.arange(len(nodes)), symbols]

    def _rows(self, nodes: IntArray) -> torch.Tensor:
        mask = torch.from_numpy(self._masks_of(nodes)).to(self.device)
        return self.alloc_rows(len(nodes)).masked_fill_(mask, 0.0)

    def _freed(self, nodes: IntArray) -> None:
        gone = set(nodes.tolist())
        # An heir may be gone while the node before it stays, and its number come again.
        ends = {n: self._heir(n) for n in list(self._heirs)}
        self._heirs = {n: h for n, h in ends.items() if n not in gone and h is not None}

    def _facts(self) -> dict[str, str]:
        held = f"{self.n_texts} ({self.n_snapshots} matchers, at most {self.max_states})"
        return {"texts": held}


def mask_of(matcher: Any) -> int:
    """Return what may follow, a bit for each byte and bit 256 for the end.

    The mask is 0 where llguidance gives up.
    """
    found = matcher.compute_bitmask()
    return 0 if matcher.is_error() else int.from_bytes(found, "little") & (2 * END_BIT - 1)


def read_forced(matcher: Any) -> tuple[bytes, int]:
    """Read on while there is but one way to go.

    Args:
        matcher: a matcher, which will have read the bytes that are returned.

    Returns:
        The bytes read, and the mask of what may follow: 0 where llguidance gives up or no end
        is in sight.
    """
    forced = bytearray()
    mask = mask_of(matcher)
    while mask and not mask & END_BIT and not mask & (mask - 1):
        if len(forced) == LONGEST_FORCED:
            return bytes(forced), 0
        forced.append(mask.bit_length() - 1)
        matcher.try_consume_tokens([forced[-1]])
        mask = mask_of(matcher)
    return bytes(forced), mask


def check_size(source: str, max_size: int) -> None:
    """Raise ConstraintError if a source is longer than allowed."""
    check_count("max_size", max_size, 1)
    if len(source) > max_size:
        raise ConstraintError(
            f"the grammar or schema has {len(source):,} characters, more than "
            f"max_size={max_size:,}; raise max_size (reading it may take "
            f"{_STACK_A_CHARACTER // 1024} KiB of stack a character) or write a smaller one"
        )


def on_large_stack(size: int, function: Callable[..., T], *args: Any) -> T:
    """Call a function where reading a source of `size` characters cannot overrun the stack.

    That is a thread that ends before this returns: the stack of the caller may be small, and
    a recursion that is too deep for it ends the process.

    Raises:
        ConstraintError: no such thread can be started.
    """
    stack = -(-max(_LEAST_STACK, size * _STACK_A_CHARACTER) // 2**20) * 2**20
    with ThreadPoolExecutor(1) as pool:
        with _stack_size:
            before = threading.stack_size(stack)
            try:
                done = pool.submit(function, *args)  # starts the thread
            except RuntimeError:
                raise ConstraintError(
                    f"a source of {size:,} characters takes a stack of {stack // 2**20} MiB, and "
                    "no thread with one can be started; write a smaller grammar or schema"
                ) from None
            finally:
                threading.stack_size(before)
        return done.result()


def _compiled(grammar: str) -> Any:
    limits = LLParserLimits(verbose_errors=False)
    matcher = LLMatcher(byte_tokenizer(), grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise ConstraintError(f"llguidance refuses this: {_reason(matcher)}")
    return matcher


def _reason(matcher: Any) -> str:
    return str(matcher.get_error()).replace("<non-verbose/>", "").strip()


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
    except Exception as error:  # of a rule that is missing, it is no GbnfToLarkError
        raise ConstraintError(f"the grammar does not parse as GBNF: {error}") from None
