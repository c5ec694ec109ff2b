"""Slow reading of one text that judges contexts after the byte: a reference, not a fast path.

A beam drops a token-ending context before the next byte is known. If the byte is a surprise,
the mass that it needs is gone. Here a context without a row of the model is *deferred*: its
weight is kept. After every byte it is compared with the mass that remains, and its row is
fetched if it may matter. A deferred context whose position has a row in another context *rides*
on that row: the two histories spell the same bytes and predict nearly the same, so its weight
is added instead of dropped.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.trie import TokenTrie

FloatArray = npt.NDArray[np.float64]
Context = tuple[int, ...]


class Rows:
    """Rows of a model as probabilities in trie order, kept for all texts and counted for each.

    Args:
        llm: a model of `load_model`.
        trie: of its vocabulary.
    """

    def __init__(self, llm: Any, trie: TokenTrie) -> None:
        self.llm, self.trie = llm, trie
        self._kept: dict[Context, FloatArray] = {}
        self._asked: set[Context] = set()
        self.rows = self.forwards = 0

    def __getitem__(self, context: Context) -> FloatArray:
        return self._kept[context]

    def begin(self) -> None:
        """Count from zero, as if no row were kept."""
        self._asked.clear()
        self.rows = self.forwards = 0

    def ask(self, contexts: Sequence[Context]) -> None:
        """Fetch the rows of `contexts` in one request."""
        new = [c for c in dict.fromkeys(contexts) if c not in self._asked]
        self._asked.update(new)
        self.rows += len(new)
        self.forwards += bool(new)
        lacking = [list(c) for c in new if c not in self._kept]
        if lacking:
            found = self.llm.batch_next_token_logprobs_sync(lacking).double().exp().numpy()
            for context, row in zip(lacking, found[:, self.trie.order], strict=True):
                self._kept[tuple(context)] = row / row.sum()


@dataclass(eq=False)
class Node:
    """A context of the text, by where it ends.

    Attributes:
        context: token ids.
        position: how many bytes of the text they spell.
        parent: the node that it extends by one token; None once that is forgotten.
        p: probability of that token.
        own: weight of its history, over the lane's scale.
        weight: `own`, and the weight of those that ride on it; 0 without a row.
        live: whether its row has been fetched.
        flight: probability that the next token begins with the bytes read since `position`.
    """

    context: Context
    position: int
    parent: Node | None = None
    p: float = 1.0
    own: float = 0.0
    weight: float = 0.0
    live: bool = False
    flight: float = 1.0


class Lattice:
    """One text read byte by byte, its deferred contexts judged after each byte.

    Args:
        rows: of the model.
        start: token ids that the text begins after.
        excluded: trie positions of tokens that are no text.
        share: fetch the first row of a position if the estimated share of its contexts is above.
        merge: fetch a further row of a position if the context's share is above; contexts
            below ride on the rows that are there.
        guess: probability of each byte that a context without a row is taken to predict.
        window: bytes after which a deferred context is forgotten.
        at_once: rows a request; a request is followed by another while shares are above.

    Attributes:
        log_z: log probability of the bytes read, nats; with `share` and `merge` 0 it is exact.
    """

    def __init__(
        self,
        rows: Rows,
        start: Context,
        *,
        share: float = 0.02,
        merge: float = 0.003,
        guess: float = 0.03,
        window: int = 32,
        at_once: int = 3,
        excluded: frozenset[int] = frozenset(),
    ) -> None:
        self.rows, self.trie, self.excluded = rows, rows.trie, excluded
        self.share, self.merge, self.guess = share, merge, guess
        self.window, self.at_once = window, at_once
        self.text = b""
        self._log_scale = 0.0
        root = Node(start, 0, own=1.0, live=True)
        self._root = root
        self._at: dict[int, dict[Context, Node]] = defaultdict(dict)
        self._at[0][start] = root
        rows.ask([start])
        self.log_z = 0.0

    def read(self, byte: int) -> None:
        """Read one byte; fetch the rows that may matter now."""
        self.text += bytes([byte])
        for nodes in list(self._at.values()):
            for node in list(nodes.values()):
                if node.live:
                    self._end_tokens(node, len(self.text))
        mass = self._flow()
        while True:
            wanted = self._wanted(mass)
            if not wanted:
                break
            self.rows.ask([n.context for n in wanted])
            for node in wanted:
                node.live = True
                for end in range(node.position + 1, len(self.text) + 1):
                    self._end_tokens(node, end)
            mass = self._flow()
        self.log_z = self._log_scale + math.log(mass) if mass > 0 else -math.inf
        self._forget(mass)

    def _range(self, first: int, end: int) -> tuple[int, int, int]:
        """Trie positions lo, ends and hi of the tokens that begin with a part of the text."""
        node = self.trie.find(self.text[first:end])
        if node < 0:
            return 0, 0, 0
        lo = int(self.trie.lo[node])
        return lo, lo + int(self.trie.ends[node]), int(self.trie.hi[node])

    def _end_tokens(self, node: Node, end: int) -> None:
        """Defer the contexts that `node` and one token up to byte `end` make."""
        if end <= node.position:
            return
        lo, last, _ = self._range(node.position, end)
        for at in range(lo, last):
            p = float(self.rows[node.context][at])
            if p > 0 and at not in self.excluded:
                context = (*node.context, int(self.trie.order[at]))
                self._at[end].setdefault(context, Node(context, end, node, p))

    def _flow(self) -> float:
        """Compute all weights, by position; return the mass of all tokens in flight."""
        mass, now = 0.0, len(self.text)
        for position in sorted(self._at):
            nodes = self._at[position].values()
            for n in nodes:
                n.own = n.own if n.parent is None else n.parent.weight * n.p
            live = sum(n.own for n in nodes if n.live)
            riding = sum(n.own for n in nodes if not n.live)
            for n in nodes:
                n.weight = n.own * (1 + riding / live) if n.live and live > 0 else 0.0
                if n.live and position < now:
                    lo, _, hi = self._range(position, now)
                    n.flight = float(self.rows[n.context][lo:hi].sum())
                    mass += n.weight * n.flight
        return mass

    def _wanted(self, mass: float) -> list[Node]:
        """Deferred contexts whose rows to fetch next, the most important first."""
        now = len(self.text)
        ahead = dict[int, float]()  # probability of the bytes from a position on
        first, further = list[tuple[float, Node]](), list[tuple[float, Node]]()
        children = defaultdict[int, list[tuple[float, int]]](list)
        for position, nodes in self._at.items():
            for n in nodes.values():
                if position < now:  # tokens that end now are in flight
                    children[id(n.parent)].append((n.p, position))
        for position in sorted((p for p in self._at if p < now), reverse=True):
            nodes = list(self._at[position].values())
            live = [n for n in nodes if n.live]
            deferred = [n for n in nodes if not n.live and n.own > 0]
            total = sum(n.own for n in live)
            if total > 0:
                after = [n.flight + sum(p * ahead[q] for p, q in children[id(n)]) for n in live]
                ahead[position] = sum(n.own / total * x for n, x in zip(live, after, strict=True))
                further += [(n.own * ahead[position], n) for n in deferred]
            else:
                ahead[position] = self.guess ** (now - position)
                if deferred:
                    weight = sum(n.own for n in deferred) * ahead[position]
                    first.append((weight, max(deferred, key=lambda n: n.own)))
        estimate = mass + sum(x for x, _ in first)
        found = [(x, n) for x, n in first if x > self.share * estimate]
        found += [(x, n) for x, n in further if x > self.merge * estimate]
        return [n for _, n in sorted(found, key=lambda f: -f[0])[: self.at_once]]

    def _forget(self, mass: float) -> None:
        """Leave out positions before the window, and scale weights to the present mass."""
        oldest = len(self.text) - self.window
        for position in [p for p in self._at if p < oldest]:
            del self._at[position]
        for nodes in self._at.values():
            for n in nodes.values():
                if n.parent is not None and n.parent.position < oldest:
                    n.parent = None  # its weight stays what it is
                if n.parent is None and mass > 0:
                    n.own /= mass
        if mass > 0:
            self._log_scale += math.log(mass)
