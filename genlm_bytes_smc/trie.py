"""The byte trie of a vocabulary, as ranges of the sorted tokens.

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

import threading
import weakref
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.vocab import Vocabulary

Int32Array = npt.NDArray[np.int32]


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
        """Number of nodes, M."""
        return len(self.lo)

    @property
    def n_tokens(self) -> int:
        """Number of tokens that spell something, T."""
        return len(self.order)

    @property
    def nbytes(self) -> int:
        """Memory of the arrays, in bytes."""
        arrays = (self.order, self.lo, self.hi, self.ends, self.first_child, self.parent)
        return sum(a.nbytes for a in (*arrays, self.byte, self.depth))

    @cached_property
    def position(self) -> Int32Array:
        """Sorted position of each token id, int32[V]; -1 for tokens that spell nothing."""
        out = np.full(len(self.vocab), -1, dtype=np.int32)
        out[self.order] = np.arange(self.n_tokens, dtype=np.int32)
        return out

    def child(self, node: int, byte: int) -> int:
        """The child of `node` along `byte`, or -1."""
        a, b = int(self.first_child[node]), int(self.first_child[node + 1])
        at = a + int(np.searchsorted(self.byte[a:b], byte))
        return at if at < b and self.byte[at] == byte else -1

    def find(self, prefix: bytes) -> int:
        """The node that spells `prefix`, or -1 if no token begins so."""
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
        """The bytes from the root to `node`."""
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
        inner = np.arange(1, m)
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
                (
                    (self.parent[inner[1:]] != self.parent[inner[:-1]])
                    | (self.byte[inner[1:]] > self.byte[inner[:-1]])
                ).all()
            ),
            "siblings split what does not end at their parent": bool(
                (self.lo[first] == self.lo[has] + self.ends[has]).all()
                and (self.hi[last] == self.hi[has]).all()
                and (
                    (self.parent[inner[1:]] != self.parent[inner[:-1]])
                    | (self.lo[inner[1:]] == self.hi[inner[:-1]])
                ).all()
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
        tokens = [vocab[i] for i in range(len(vocab))]
        ids = [i for i, spelled in enumerate(tokens) if spelled]
        if not ids:
            raise ValueError(f"all {len(vocab)} tokens of the vocabulary spell nothing")
        ids.sort(key=tokens.__getitem__)
        order = np.array(ids, dtype=np.int32)
        start = vocab.offsets[order]
        length = vocab.lengths[order]

        columns: dict[str, list[npt.NDArray[np.int64]]] = {
            name: [] for name in ("lo", "hi", "ends", "parent", "byte", "depth")
        }
        node_of = np.zeros(len(order), dtype=np.int64)  # deepest node so far of each position
        active = np.arange(len(order))
        base, d = 1, 0
        while len(active):
            byte = vocab.buffer[start[active] + d].astype(np.int64)
            above = node_of[active]
            new = np.ones(len(active), dtype=bool)
            new[1:] = (above[1:] != above[:-1]) | (byte[1:] != byte[:-1])
            heads = np.flatnonzero(new)
            tails = np.append(heads[1:], len(active)) - 1
            node_of[active] = base + np.cumsum(new) - 1
            level = {
                "lo": active[heads],
                "hi": active[tails] + 1,
                "ends": np.add.reduceat((length[active] == d + 1).astype(np.int64), heads),
                "parent": above[heads],
                "byte": byte[heads],
                "depth": np.full(len(heads), d + 1),
            }
            for name, values in level.items():
                columns[name].append(values)
            base, d = base + len(heads), d + 1
            active = active[length[active] > d]

        root = {"lo": 0, "hi": len(order), "ends": 0, "parent": -1, "byte": 0, "depth": 0}
        flat = {n: np.concatenate([[root[n]], *parts]) for n, parts in columns.items()}
        counts = np.bincount(flat["parent"][1:], minlength=base)
        first_child = np.concatenate([[1], 1 + np.cumsum(counts)])
        trie = cls(
            vocab=vocab,
            order=order,
            first_child=first_child.astype(np.int32),
            byte=flat.pop("byte").astype(np.uint8),
            **{n: v.astype(np.int32) for n, v in flat.items()},
        )
        trie.validate()
        return trie


_tries: weakref.WeakValueDictionary[str, TokenTrie] = weakref.WeakValueDictionary()
_lock = threading.Lock()
builds = 0  # tries built in this process, for tests that count


def shared_trie(vocab: Vocabulary) -> TokenTrie:
    """The one trie of this process for a vocabulary (equal bytes, equal trie)."""
    global builds
    with _lock:
        trie = _tries.get(vocab.fingerprint)
        if trie is None:
            trie = _tries[vocab.fingerprint] = TokenTrie.build(vocab)
            builds += 1
        return trie
