"""The ways to spell the token in flight anew, as far as the trie alone decides them.

Healing ends a token after the first k bytes of the partial one, and has to spell the rest from
tokens, the last of which stays in flight and reads the next byte. Position p below means that
a token ends after p bytes of the partial one; a *split* is a token that ends after the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from genlm_bytes_smc.trie import TokenTrie

NEVER = 1 << 60  # more splits than there can be


class Span(NamedTuple):
    """What the trie knows from one position of the partial token on.

    Attributes:
        ends: positions at which a token that begins here may end, ascending.
        node: where the rest of the partial token leads, -1 if no token begins like it.
    """

    ends: list[int]
    node: int


def spans(
    trie: TokenTrie, partial: bytes, ends: Callable[[int], bool], count: int | None = None
) -> list[Span]:
    """Return the span of each position 0..len(partial), or of the first `count`; `ends` says
    whether a token ends at a node."""
    out = []
    for start in range(len(partial) + 1 if count is None else count):
        node, found = 0, []
        for at in range(start, len(partial)):
            node = trie.child(node, partial[at])
            if node < 0:
                break
            if ends(node):
                found.append(at + 1)
        out.append(Span(found, node))
    return out


def first_ends(found: list[Span], length: int, max_backoff: int | None) -> list[int]:
    """Where the first token of a partial one of `length` bytes may end, the longest first."""
    least = 1 if max_backoff is None else max(1, length - max_backoff)
    return [k for k in reversed(found[0].ends) if k >= least]


def splits_before(found: list[Span], firsts: list[int]) -> list[int]:
    """Return the fewest splits with which a token ends at each position; `NEVER` where none can."""
    fewest = [0 if p in set(firsts) else NEVER for p in range(len(found))]
    for p, span in enumerate(found):
        for q in span.ends if fewest[p] < NEVER else ():
            fewest[q] = min(fewest[q], fewest[p] + 1)
    return fewest


def splits_after(found: list[Span], reads: Callable[[int], bool]) -> list[int]:
    """Count the fewest splits with which the rest from each position, and the next byte, are read;
    `reads` says whether the next byte can at a node."""
    fewest = [NEVER] * len(found)
    for p in range(len(found) - 1, -1, -1):
        if found[p].node >= 0 and reads(found[p].node):
            fewest[p] = 0
        else:
            fewest[p] = min([NEVER, *(fewest[q] + 1 for q in found[p].ends)])
    return fewest
