"""Next-token rows in trie order, kept on the device under a limit in bytes.

The beam sums probabilities over ranges of sorted tokens, so a row is stored as linear
float64 probabilities in sorted order: sums are direct, keep full relative precision down to
1e-308 (a token at -120 nats stays alive), and need no exponential. Tokens that spell
nothing and padding columns of the LM head are left out and the row is normalised over the
rest: it is conditioned on a token that spells something.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.engine import RowEngine
from genlm_bytes_smc.trie import TokenTrie

DEFAULT_ROW_BYTES = 1 << 30
_FORWARD_BYTES = 1 << 28  # logits of one request to the engine


class BadRowError(ValueError):
    """A model returned a row that is no distribution over its vocabulary."""


@dataclass(frozen=True)
class RowTransform:
    """What is done to a token-level row before it is summed into bytes.

    Args:
        temperature: logits are divided by it; positive.
        top_k: keep the k likeliest tokens, or None for all.
        top_p: keep the likeliest tokens whose mass reaches p, or None for all.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature!r}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 or None, got {self.top_k!r}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1] or None, got {self.top_p!r}")

    def __call__(self, logp: torch.Tensor) -> torch.Tensor:
        """Probabilities float64[B, T] from log-probabilities float[B, T]."""
        x = logp.double()
        if self.temperature != 1.0:
            x /= self.temperature
        if self.top_k is not None and self.top_k < x.shape[1]:
            kth = torch.topk(x, self.top_k, dim=1).values[:, -1:]
            x = x.masked_fill(x < kth, -torch.inf)
        p = torch.softmax(x, dim=1)
        if self.top_p is not None and self.top_p < 1:
            sorted_p, index = torch.sort(p, dim=1, descending=True)
            beyond = sorted_p.cumsum(1) - sorted_p >= self.top_p
            p = p.masked_fill(torch.zeros_like(beyond).scatter(1, index, beyond), 0.0)
            p /= p.sum(1, keepdim=True)
        return p


class RowStore:
    """Rows of one engine under one transform, by context id.

    Args:
        engine: where rows come from.
        trie: gives the order of columns.
        transform: temperature, top-k, top-p.
        limit_bytes: rows beyond it are dropped, oldest and unreachable first, and computed
            again when asked for. What one call needs at once is always held.

    Attributes:
        probs: float64[slots, T] on `engine.device`.
        slot_of: int64[tree.capacity] on the host, a context's slot or -1.
    """

    def __init__(
        self,
        engine: RowEngine,
        trie: TokenTrie,
        transform: RowTransform | None = None,
        limit_bytes: int = DEFAULT_ROW_BYTES,
    ) -> None:
        self.engine = engine
        self.trie = trie
        self.transform = transform or RowTransform()
        self.limit_bytes = limit_bytes
        self.evicted = 0
        self._order = torch.as_tensor(trie.order.astype(np.int64), device=engine.device)
        self._plain = bool((trie.order == np.arange(trie.n_tokens)).all())
        self.slot_of: IntArray = np.full(engine.tree.capacity, -1, dtype=np.int64)
        self._allocate(8)
        engine.tree.on_free(self._forget)

    def __len__(self) -> int:
        """Number of rows held."""
        return int((self._context >= 0).sum())

    @property
    def nbytes(self) -> int:
        """Memory allotted to rows, in bytes."""
        return self.probs.numel() * self.probs.element_size()

    @property
    def limit_rows(self) -> int:
        """Rows that fit the limit (at least one)."""
        return max(1, self.limit_bytes // (8 * self.trie.n_tokens))

    # -- asking ------------------------------------------------------------------------

    def missing(self, contexts: IntArray) -> IntArray:
        """Distinct ids >= 0 among `contexts` (any shape) that have no row, int64[m]."""
        if len(self.slot_of) < self.engine.tree.capacity:
            more = self.engine.tree.capacity - len(self.slot_of)
            self.slot_of = np.concatenate([self.slot_of, np.full(more, -1, dtype=np.int64)])
        flat = contexts.ravel()
        absent = flat[(self.slot_of[flat] < 0) & (flat >= 0)]
        return np.unique(absent) if len(absent) > 1 else absent

    async def ensure(self, contexts: IntArray) -> None:
        """Have the rows of `contexts` (any shape; negative ids ignored) when this returns.

        Nothing is evicted between the return and the caller's next await.
        """
        missing = self.missing(contexts)
        if len(missing):
            with self.engine.tree.pinned(contexts):
                self._collect()
                while len(missing):
                    chunk = self._first_chunk(missing)
                    self._insert(chunk, await self.engine.rows(chunk), contexts)
                    missing = self.missing(contexts)
        self._touch(contexts)

    def ensure_sync(self, contexts: IntArray) -> None:
        """As `ensure`, without an event loop."""
        missing = self.missing(contexts)
        if len(missing):
            with self.engine.tree.pinned(contexts):
                self._collect()
                while len(missing):
                    chunk = self._first_chunk(missing)
                    self._insert(chunk, self.engine.rows_sync(chunk), contexts)
                    missing = self.missing(contexts)
        self._touch(contexts)

    def prob(self, context: int, token: int) -> float:
        """Probability of one token after a context whose row is held.

        A token that spells nothing has probability one: rows are conditioned on the others.
        """
        if self.trie.position[token] < 0:
            return 1.0
        return float(self.probs[int(self.slot_of[context]), int(self.trie.position[token])])

    def _first_chunk(self, missing: IntArray) -> IntArray:
        """Shallow contexts first, as many as one forward's logits may hold."""
        most = max(1, _FORWARD_BYTES // (8 * self.trie.n_tokens))
        if len(missing) <= most:
            return missing
        by_depth = np.argsort(self.engine.tree.depth[missing], kind="stable")
        return np.sort(missing[by_depth[:most]])

    def _collect(self) -> None:
        if self.engine.tree.due():
            self.engine.tree.collect()

    def _touch(self, contexts: IntArray) -> None:
        self._clock += 1
        flat = contexts.ravel()
        self._used[self.slot_of[flat[flat >= 0]]] = self._clock

    # -- keeping -----------------------------------------------------------------------

    def _insert(self, contexts: IntArray, rows: torch.Tensor, needed: IntArray) -> None:
        fresh = self.slot_of[contexts] < 0  # another task may have brought some
        if not fresh.all():
            contexts, rows = contexts[fresh], rows[torch.as_tensor(fresh, device=rows.device)]
            if len(contexts) == 0:
                return
        probs = self._distribution(rows)
        slots = self._room(len(contexts), needed)
        self.probs[torch.as_tensor(slots, device=self.probs.device)] = probs
        self._context[slots] = contexts
        self._used[slots] = self._clock
        self.slot_of[contexts] = slots

    def _distribution(self, rows: torch.Tensor) -> torch.Tensor:
        """Probabilities in trie order, checked: float64[B, T]."""
        widest = len(self.trie.vocab)
        if rows.shape[1] < widest:
            raise BadRowError(
                f"the model returned rows of width {rows.shape[1]}, but its tokenizer has "
                f"{widest} tokens; rows may be wider (padding), not narrower"
            )
        x = rows[:, : len(self._order)] if self._plain else rows.index_select(1, self._order)
        probs = self.transform(x)
        bad = torch.isnan(probs[:, 0])  # one bad entry makes the whole softmax NaN
        if bool(bad.any()):
            raise BadRowError(
                f"the model returned {int(bad.sum())} of {len(rows)} rows with NaN, +inf or "
                "no finite entry; rows must be log-probabilities in nats"
            )
        return probs

    def _allocate(self, slots: int) -> None:
        self.probs = torch.empty(
            (slots, self.trie.n_tokens), dtype=torch.float64, device=self.engine.device
        )
        self._context: IntArray = np.full(slots, -1, dtype=np.int64)
        self._used: IntArray = np.zeros(slots, dtype=np.int64)
        self._clock = 0

    def _resize(self, slots: int, keep: IntArray) -> None:
        """New storage with the rows in slots `keep` first."""
        probs, context, used, clock = self.probs, self._context, self._used, self._clock
        self._allocate(slots)
        n = len(keep)
        self.probs[:n] = probs[torch.as_tensor(keep, device=probs.device)]
        self._context[:n], self._used[:n], self._clock = context[keep], used[keep], clock
        self.slot_of[context[context >= 0]] = -1
        self.slot_of[self._context[:n]] = np.arange(n)

    def _room(self, n: int, needed: IntArray) -> IntArray:
        """`n` free slots, growing up to the limit and then evicting."""
        free = np.flatnonzero(self._context < 0)
        if len(free) >= n:
            return free[:n]
        held = np.flatnonzero(self._context >= 0)
        want = len(held) + n
        if want <= self.limit_rows:
            self._resize(min(self.limit_rows, max(want, 2 * len(self._context))), held)
            return np.flatnonzero(self._context < 0)[:n]
        return self._evict(n, needed, held)

    def _evict(self, n: int, needed: IntArray, held: IntArray) -> IntArray:
        must = np.zeros(len(self._context), dtype=bool)
        slots = self.slot_of[needed.ravel()[needed.ravel() >= 0]]
        must[slots[slots >= 0]] = True
        live = self.engine.tree.live()[self._context[held]]
        # Unreachable rows go first, then the least recently used; a quarter at a time.
        order = held[np.lexsort((self._used[held], live))]
        order = order[~must[order]]
        drop = order[: max(n, self.limit_rows // 4)]
        self.evicted += len(drop)
        self.engine.counts.evicted += len(drop)
        self.slot_of[self._context[drop]] = -1
        self._context[drop] = -1
        stay = np.flatnonzero(self._context >= 0)
        size = max(self.limit_rows, len(stay) + n)
        if size != len(self._context):
            self._resize(size, stay)
        return np.flatnonzero(self._context < 0)[:n]

    def _forget(self, freed: IntArray) -> None:
        known = freed[freed < len(self.slot_of)]
        slots = self.slot_of[known]
        self._context[slots[slots >= 0]] = -1
        self.slot_of[known] = -1

    def clear(self) -> None:
        """Drop every row."""
        self.slot_of[:] = -1
        self._allocate(8)

    def memory(self) -> dict[str, int]:
        """Rows held, bytes allotted and rows evicted so far."""
        return {"rows": len(self), "bytes": self.nbytes, "evicted": self.evicted}


FloatArray = npt.NDArray[np.float64]
