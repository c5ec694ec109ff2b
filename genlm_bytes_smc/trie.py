"""Token bytes as two flat arrays, and their trie, as ranges of the sorted tokens.

Sort the tokens by their bytes. Every trie node is then a contiguous range of them, the
tokens that end at the node come first in its range, and the children of the node split the
rest of it. A node's probability mass is one sum over its range of the (permuted) row; there
is no tokens-by-nodes matrix, and nothing is summed that is not visited.

Nodes are numbered breadth first, so the children of node n are the consecutive ids
`first_child[n] .. first_child[n + 1]`, in order of their byte. Node 0 is the root::

    tokens sorted      a   ab   ab'  abc  b        (ab, ab': two ids, same bytes)
    position           0   1    2    3    4
    node 0 ""        [ 0 ........................ 5 )   ends 0
    node 1 "a"       [ 0 ............... 4 )            ends 1  (position 0)
    node 2 "b"                             [ 4 .. 5 )   ends 1  (position 4)
    node 3 "ab"          [ 1 .......... 4 )             ends 2  (positions 1, 2)
    node 4 "abc"                   [ 3 . 4 )            ends 1  (position 3)
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The byte strings of a tokenizer's tokens, whatever tokenizer they came from.

    Layout: token `i` spells `buffer[offsets[i]:offsets[i + 1]]`. Several ids may spell the
    same bytes; an id may spell nothing (such a token is never part of a text).

    Attributes:
        buffer: uint8[total bytes].
        offsets: int64[V + 1].
    """

    buffer: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of token ids, V."""
        return len(self.offsets) - 1

    def __getitem__(self, token: int) -> bytes:
        """Return the bytes that `token` spells."""
        if not 0 <= token < len(self):
            raise IndexError(f"token ids run from 0 to {len(self) - 1}, got {token}")
        return self.buffer[self.offsets[token] : self.offsets[token + 1]].tobytes()

    def check(self, tokens: Iterable[int]) -> None:
        """Raise a ValueError if one of some ids is out of range."""
        for token in tokens:
            if not 0 <= token < len(self):
                raise ValueError(f"token ids run from 0 to {len(self) - 1}, got {token}")

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Length of each token in bytes, int64[V]."""
        return np.diff(self.offsets)

    @cached_property
    def fingerprint(self) -> str:
        """Equal for equal vocabularies, in this process and any other."""
        digest = hashlib.blake2b(self.buffer.tobytes(), digest_size=16)
        digest.update(self.offsets.tobytes())
        return digest.hexdigest()

    def ids_of(self, token_bytes: bytes) -> list[int]:
        """All ids that spell exactly these bytes (none: an empty list)."""
        right_length = np.flatnonzero(self.lengths == len(token_bytes))
        return [int(i) for i in right_length if self[int(i)] == token_bytes]

    @classmethod
    def from_tokens(cls, tokens: Sequence[Any]) -> Vocabulary:
        """From one entry a token id, in order.

        Args:
            tokens: `bytes`, or genlm-backend `Token` objects (bytes with a `token_id`, which
                must then be the entry's index).

        Raises:
            ValueError: no tokens, or a `Token` out of its place.
            TypeError: an entry that is not bytes.
        """
        if len(tokens) == 0:
            raise ValueError("a vocabulary needs at least one token, got none")
        for i, token in enumerate(tokens):
            if not isinstance(token, bytes):
                raise TypeError(f"token {i} should be bytes, got {type(token).__name__}")
            named = getattr(token, "token_id", i)
            if named != i:
                raise ValueError(f"entry {i} of the vocabulary has token_id {named}")
        lengths = np.fromiter((len(t) for t in tokens), dtype=np.int64, count=len(tokens))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return cls(np.frombuffer(b"".join(tokens), dtype=np.uint8), offsets)


@dataclass(frozen=True, eq=False)
class TokenTrie:
    """Range trie of a vocabulary with T non-empty tokens and M nodes (see the module text).

    Attributes:
        vocab: the vocabulary it was built from.
        order: int32[T], token id at each sorted position.
        lo, hi: int32[M], a node's range of positions.
        ends: int32[M], how many tokens end at the node: positions lo .. lo + ends.
        first_child: int32[M + 1], children of n are the nodes first_child[n] to
            first_child[n + 1] - 1.
        parent: int32[M], -1 for the root.
        byte: uint8[M], the byte on the edge into the node (root: 0).
        depth: int32[M], length of the node's byte string.
    """

    vocab: Vocabulary
    order: Int32Array
    lo: Int32Array
    hi: Int32Array
    ends: Int32Array
    first_child: Int32Array
    parent: Int32Array
    byte: npt.NDArray[np.uint8]
    depth: Int32Array

    def __len__(self) -> int:
        """Return the number of nodes, M."""
        return len(self.lo)

    @property
    def n_tokens(self) -> int:
        """Number of tokens that spell something, T."""
        return len(self.order)

    @property
    def nbytes(self) -> int:
        """Memory of the arrays, in bytes."""
        return sum(getattr(self, f.name).nbytes for f in fields(self) if f.name != "vocab")

    @cached_property
    def position(self) -> Int32Array:
        """Sorted position of each token id, int32[V]; -1 for tokens that spell nothing."""
        out = np.full(len(self.vocab), -1, dtype=np.int32)
        out[self.order] = np.arange(self.n_tokens, dtype=np.int32)
        return out

    def child(self, node: int, byte: int) -> int:
        """Return the child of `node` along `byte`, or -1."""
        a, b = int(self.first_child[node]), int(self.first_child[node + 1])
        at = a + int(np.searchsorted(self.byte[a:b], byte))
        return at if at < b and self.byte[at] == byte else -1

    def find(self, prefix: bytes) -> int:
        """Return the node that spells `prefix`, or -1 if no token begins so."""
        node = 0
        for byte in prefix:
            node = self.child(node, byte)
            if node < 0:
                return -1
        return node

    def tokens_at(self, node: int) -> list[int]:
        """Ids of the tokens that end at `node`."""
        a = int(self.lo[node])
        return [int(t) for t in self.order[a : a + int(self.ends[node])]]

    def spell(self, node: int) -> bytes:
        """Return the bytes from the root to `node`."""
        out = bytearray()
        while node > 0:
            out.append(int(self.byte[node]))
            node = int(self.parent[node])
        return bytes(reversed(out))

    def validate(self) -> None:
        """Check every law of the layout.

        Raises:
            ValueError: naming the law that does not hold.
        """
        m, t = len(self), self.n_tokens
        no_siblings = self.parent[2:] != self.parent[1:-1]
        counts = np.diff(self.first_child)
        has = np.flatnonzero(counts)
        first, last = self.first_child[has], self.first_child[has + 1] - 1
        laws = {
            "positions are a permutation of the non-empty tokens": np.array_equal(
                np.sort(self.order), np.flatnonzero(self.vocab.lengths)
            ),
            "the root spans every token": self.lo[0] == 0 and self.hi[0] == t,
            "ranges are not empty": bool((self.lo < self.hi).all()),
            "breadth-first numbers": self.first_child[0] == 1 and self.first_child[-1] == m,
            "a child's parent is its parent": np.array_equal(
                self.parent[1:], np.repeat(np.arange(m), counts)
            ),
            "siblings are in order of their byte": bool(
                (no_siblings | (self.byte[2:] > self.byte[1:-1])).all()
            ),
            "siblings split what does not end at their parent": bool(
                (self.lo[first] == self.lo[has] + self.ends[has]).all()
                and (self.hi[last] == self.hi[has]).all()
                and (no_siblings | (self.lo[2:] == self.hi[1:-1])).all()
            ),
            "leaves hold only tokens that end there": bool(
                (self.ends == self.hi - self.lo)[counts == 0].all()
            ),
            "every token ends once": int(self.ends.sum()) == t,
        }
        for law, holds in laws.items():
            if not holds:
                raise ValueError(f"token trie: this law does not hold: {law}")

    @classmethod
    def build(cls, vocab: Vocabulary) -> TokenTrie:
        """Build in one pass a level over all tokens; O(total bytes) after the sort.

        Raises:
            ValueError: every token of the vocabulary is empty.
        """
        order = _sorted_ids(vocab)
        if len(order) == 0:
            raise ValueError(f"all {len(vocab)} tokens of the vocabulary spell nothing")
        trie = cls(vocab=vocab, order=order, **_nodes(vocab, order))
        trie.validate()
        return trie


_CHUNK = 7  # bytes of a token that are compared at a time, as one integer


def _sorted_ids(vocab: Vocabulary) -> Int32Array:
    """Ids of the tokens that spell something, sorted by their bytes; equal ones by id.

    A Python object a token would outlive the build as holes in the heap; here each round
    sorts what still ties by the next bytes as one integer.
    """
    order = np.flatnonzero(np.diff(vocab.offsets)).astype(np.int32)
    tied = np.arange(len(order), dtype=np.int32)  # positions whose order is open
    group = np.zeros(len(order), dtype=np.int32)  # those that are equal so far, ascending
    at = 0
    while len(tied):
        ids = order[tied]
        key = _keys(vocab, ids, at)
        by_key = np.lexsort((key, group))
        order[tied], key, group = ids[by_key], key[by_key], group[by_key]
        same = np.zeros(len(tied), dtype=bool)
        same[1:] = (key[1:] == key[:-1]) & (group[1:] == group[:-1])
        group = np.cumsum(~same, dtype=np.int32)
        again = same | np.append(same[1:], False)
        again &= (key & np.uint64(255)) > _CHUNK
        tied, group = tied[again], group[again]
        at += _CHUNK
    return order


def _keys(vocab: Vocabulary, ids: Int32Array, at: int) -> npt.NDArray[np.uint64]:
    """Return the bytes of each token from `at` on, then how many these are (8: more than 7)."""
    start = vocab.offsets[ids] + at
    left = np.minimum(vocab.offsets[ids + 1] - start, _CHUNK + 1)
    key = np.zeros(len(ids), dtype=np.uint64)
    last = len(vocab.buffer) - 1
    for i in range(_CHUNK):
        byte = vocab.buffer[np.minimum(start + i, last)]
        byte[left <= i] = 0
        key |= byte.astype(np.uint64) << np.uint64(8 * (_CHUNK - i))
    key |= left.astype(np.uint64)
    return key


def _nodes(vocab: Vocabulary, order: Int32Array) -> dict[str, Any]:
    """Compute the arrays of a `TokenTrie`, one pass a level over the tokens that reach it."""
    start = vocab.offsets[order]
    length = (vocab.offsets[order + 1] - start).astype(np.int32)
    levels: list[dict[str, npt.NDArray[Any]]] = [
        {
            "lo": np.zeros(1, np.int32),
            "hi": np.full(1, len(order), np.int32),
            "ends": np.zeros(1, np.int32),
            "parent": np.full(1, -1, np.int32),
            "byte": np.zeros(1, np.uint8),
            "depth": np.zeros(1, np.int32),
        }
    ]
    node_of = np.zeros(len(order), dtype=np.int32)  # deepest node so far of each position
    active = np.arange(len(order), dtype=np.int32)
    base = 1
    while len(active):
        d = len(levels)
        byte = vocab.buffer[start[active] + (d - 1)]
        above = node_of[active]
        new = np.ones(len(active), dtype=bool)
        new[1:] = (above[1:] != above[:-1]) | (byte[1:] != byte[:-1])
        heads = np.flatnonzero(new).astype(np.int32)
        node_of[active] = np.cumsum(new, dtype=np.int32) + np.int32(base - 1)
        levels.append(
            {
                "lo": active[heads],
                "hi": active[np.append(heads[1:], len(active)) - 1] + np.int32(1),
                "ends": np.add.reduceat(length[active] == d, heads, dtype=np.int32),
                "parent": above[heads],
                "byte": byte[heads],
                "depth": np.full(len(heads), d, np.int32),
            }
        )
        base += len(heads)
        active = active[length[active] > d]
    flat: dict[str, Any] = {}
    for name in list(levels[0]):  # one at a time, so that the parts are given back
        flat[name] = np.concatenate([level.pop(name) for level in levels])
    first_child = np.ones(base + 1, dtype=np.int32)
    first_child[1:] += np.cumsum(np.bincount(flat["parent"][1:], minlength=base), dtype=np.int32)
    return {**flat, "first_child": first_child}


_tries: weakref.WeakValueDictionary[str, TokenTrie] = weakref.WeakValueDictionary()
_lock = threading.Lock()
builds = 0  # tries built in this process, for tests that count


def shared_trie(vocab: Vocabulary) -> TokenTrie:
    """Return the one trie of this process for a vocabulary (equal bytes, equal trie)."""
    global builds
    with _lock:
        trie = _tries.get(vocab.fingerprint)
        if trie is None:
            trie = _tries[vocab.fingerprint] = TokenTrie.build(vocab)
            builds += 1
        return trie
