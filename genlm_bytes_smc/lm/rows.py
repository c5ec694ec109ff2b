"""Next-token rows as probabilities, kept on the host under a limit in bytes.

The beam sums probabilities over ranges of sorted tokens, so a row is stored as linear
probabilities: sums are direct, keep full relative precision (a token at -120 nats stays
alive), and need no exponential. A row is stored in the order it comes (`HostRows`): sorting
50,000 numbers costs more than the few sums that are made of most rows. Tokens that spell nothing
and padding columns of the LM head are left out: a row is conditioned on a token that spells
something.

Wherever a row was computed it crosses to the host once, when it is made: what beams do with rows
is little and irregular, and was measured to be faster on the host than on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.lm.contexts import ContextTree, IntArray
from genlm_bytes_smc.lm.contexts_numba import lacking
from genlm_bytes_smc.lm.devices import fetched, send
from genlm_bytes_smc.lm.engine import BadRowError, RowEngine, gathered
from genlm_bytes_smc.lm.host_rows import EXACT_WIDTH, HostRows
from genlm_bytes_smc.lm.rows_numba import FloatArray, RowArrays
from genlm_bytes_smc.trie import TokenTrie

DEFAULT_ROW_BYTES = 1 << 30
_FIRST_BYTES = 1 << 25  # of rows, before unreachable ones are given up


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

    @property
    def plain(self) -> bool:
        """Return whether it leaves rows as they are."""
        return self.temperature == 1.0 and self.top_k is None and self.top_p is None

    def __call__(self, logp: torch.Tensor) -> torch.Tensor:
        """Probabilities float64[B, T] from log-probabilities float[B, T]."""
        x = logp.double()
        if self.plain:
            return x.exp()
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


class SlotTable:
    """Which context's row is in which slot: slots `0 .. open`, each free or holding one.

    A full table first gives up contexts that nobody can reach any more, as memory that has
    been written to is cheaper than fresh memory; then opens more slots, up to `limit`; then
    gives up the least recently used. What a call needs at once is held beyond the limit.

    Args:
        first: slots to open first.
        limit: slots to open at most, but for what one call needs.

    Attributes:
        slot_of: int64[contexts + 1], slot of each context id or -1; the last entry is 0, so
            that the id -1 (no context) never reads as missing.
        evicted: contexts given up so far that something might still have asked for.
    """

    def __init__(self, first: int, limit: int) -> None:
        self.limit = max(1, limit)
        self.evicted = 0
        self._clock = 0
        self.slot_of: IntArray = np.zeros(1, dtype=np.int64)
        self._context: IntArray = np.empty(0, dtype=np.int64)
        self._used: IntArray = np.empty(0, dtype=np.int64)
        self._free: list[int] = []
        self._grow(min(first, self.limit))

    @property
    def open(self) -> int:
        """Number of slots opened."""
        return len(self._context)

    def __len__(self) -> int:
        """Return the number of contexts held."""
        return self.open - len(self._free)

    def cover(self, contexts: int) -> None:
        """Make ids below `contexts`, which some are not, known."""
        more = np.full(contexts + 1 - len(self.slot_of), -1, dtype=np.int64)
        self.slot_of = np.concatenate([self.slot_of[:-1], more, [0]])

    def missing(self, contexts: IntArray) -> IntArray:
        """Distinct ids >= 0 among `contexts` (any shape) without a slot, int64[m]."""
        out: IntArray = lacking(self.slot_of, contexts.ravel())
        return np.unique(out) if len(out) > 1 else out

    def touch(self, contexts: IntArray) -> None:
        """Count `contexts` (any shape, all held) as just used."""
        self._clock += 1
        self._used[self.slot_of[contexts]] = self._clock

    def place(self, contexts: IntArray, slots: IntArray) -> None:
        """Hold `contexts` in slots that `room` gave."""
        self._context[slots], self._used[slots] = contexts, self._clock
        self.slot_of[contexts] = slots

    def room(self, n: int, needed: IntArray, tree: ContextTree) -> IntArray:
        """Take the `n` lowest free slots, ascending int64[n]; `needed` contexts are not given up.

        Rows are copied to neighbouring slots together.
        """
        if len(self._free) < n:
            self._make_room(n, needed, tree.live())
        taken = self._free[-n:][::-1]
        del self._free[-n:]
        return np.array(taken, dtype=np.int64)

    def release(self, slots: IntArray) -> None:
        """Give slots back (taken, or holding a context)."""
        held = self._context[slots]
        self.slot_of[held[held >= 0]] = -1
        self._context[slots] = -1
        self._free.extend(slots.tolist())
        self._free.sort(reverse=True)

    def forget(self, contexts: IntArray) -> None:
        """Give up the slots of contexts whose ids were freed."""
        slots = self.slot_of[contexts[contexts < len(self.slot_of) - 1]]
        self.release(slots[slots >= 0])

    def clear(self, needed: Sequence[IntArray]) -> None:
        """Give up everything but the contexts `needed`."""
        spared = np.concatenate([self._context[:0], *needed])
        self.release(np.flatnonzero((self._context >= 0) & ~np.isin(self._context, spared)))

    def _make_room(self, n: int, needed: IntArray, live: npt.NDArray[np.bool_]) -> None:
        held = np.flatnonzero(self._context >= 0)
        must = np.zeros(self.open, dtype=bool)
        slots = self.slot_of[needed]
        must[slots[slots >= 0]] = True
        held = held[~must[held]]
        reachable = live[self._context[held]]
        dead = held[~reachable]
        share = max(n, self.open // 4)
        if len(dead) + len(self._free) >= share:
            self.release(self._oldest(dead, share))
            return
        if self.open < self.limit:
            self._grow(min(self.limit, max(2 * self.open, len(self) + n)))
        if len(self._free) < n:
            order = np.concatenate([self._oldest(dead), self._oldest(held[reachable])])
            drop = order[: max(n - len(self._free), self.open // 4)]
            self.evicted += int(reachable.sum()) - max(0, len(order) - len(drop))
            self.release(drop)
        if len(self._free) < n:
            self._grow(self.open + n - len(self._free))

    def _oldest(self, slots: IntArray, n: int | None = None) -> IntArray:
        return slots[np.argsort(self._used[slots], kind="stable")][:n]

    def _grow(self, size: int) -> None:
        more = size - self.open
        self._free = [*range(size - 1, self.open - 1, -1), *self._free]
        self._context = np.concatenate([self._context, np.full(more, -1, dtype=np.int64)])
        self._used = np.concatenate([self._used, np.zeros(more, dtype=np.int64)])


class RowStore:
    """Rows of one engine under one transform, by context id.

    Args:
        engine: where rows come from.
        trie: gives the order of columns.
        transform: temperature, top-k, top-p.
        limit_bytes: rows beyond it are dropped, oldest and unreachable first, and computed
            again when asked for. What one call needs at once is always held.

    Attributes:
        table: which context is in which slot.
    """

    def __init__(
        self,
        engine: RowEngine,
        trie: TokenTrie,
        transform: RowTransform | None = None,
        limit_bytes: int = DEFAULT_ROW_BYTES,
    ) -> None:
        self.engine, self.trie = engine, trie
        self.transform = transform or RowTransform()
        self.limit_bytes = limit_bytes
        exact = not self.transform.plain or len(trie.vocab) <= EXACT_WIDTH
        row_bytes = (8 if exact else 4) * len(trie.vocab) + 2048
        self.table = SlotTable(max(8, _FIRST_BYTES // row_bytes), limit_bytes // row_bytes)
        # Memory costs nothing until it is written to: reserve the whole limit.
        self._host = HostRows(trie, self.table.limit, exact, engine.device)
        self._needed: dict[object, IntArray] = {}  # by each call of `ensure` under way
        engine.tree.on_free(self.table.forget)

    def __len__(self) -> int:
        """Return the number of rows held."""
        return len(self.table)

    @property
    def slot_of(self) -> IntArray:
        """Slot of each context id on the host, or -1: int64[contexts + 1]."""
        return self.table.slot_of

    @property
    def nbytes(self) -> int:
        """Memory of the slots opened so far, in bytes."""
        return self.row_bytes * self.table.open

    @property
    def row_bytes(self) -> int:
        """Memory of one row, in bytes."""
        return self._host.row_bytes()

    @property
    def exact(self) -> bool:
        """Return whether rows are kept in float64; see `HostRows`."""
        return self._host.exact

    @property
    def host(self) -> RowArrays:
        """Rows as the compiled kernels take them."""
        return self._host.arrays(self.table.slot_of)

    # -- asking ------------------------------------------------------------------------

    def missing(self, contexts: IntArray) -> IntArray:
        """Distinct ids >= 0 among `contexts` (any shape) that have no row, int64[m]."""
        self.cover()
        return self.table.missing(contexts)

    def cover(self) -> None:
        """Make a place in `slot_of` for every context that the tree has room for."""
        capacity = self.engine.tree.capacity
        if len(self.table.slot_of) <= capacity:
            self.table.cover(capacity)

    async def ensure(self, contexts: IntArray) -> None:
        """Fetch the rows of `contexts` (any shape; negative ids ignored) that are missing.

        Nothing is evicted between the return and the caller's next await, and tasks that
        wait here at the same time do not evict each other's rows.
        """
        with self.engine.tree.one_thread:
            missing = self.missing(contexts)
            if len(missing):
                with self._needing(contexts):
                    while len(missing):
                        chunk = self._first_chunk(missing)
                        found = await self.engine.found(chunk)
                        held = self.slot_of[chunk].tolist()
                        if max(held) >= 0:  # other tasks have brought some
                            found = [row for row, at in zip(found, held, strict=True) if at < 0]
                            chunk = self.missing(chunk)
                        if found:
                            self._insert(chunk, gathered(found))
                        whole = len(chunk) == len(missing)
                        missing = missing[:0] if whole else self.missing(contexts)
            self.table.touch(contexts)

    @contextmanager
    def _needing(self, contexts: IntArray) -> Iterator[None]:
        """Keep contexts alive, and the rows of them that are there, inside the block."""
        ticket = object()
        self._needed[ticket] = contexts
        try:
            with self.engine.tree.pinned(contexts):
                if self.engine.tree.due():
                    self.engine.tree.collect()
                yield
        finally:
            del self._needed[ticket]

    def prob(self, context: int, token: int) -> float:
        """Probability of one token after a context whose row is held.

        A token that spells nothing has probability one: rows are conditioned on the others.
        """
        if self.trie.position[token] < 0:
            return 1.0
        rows, slot = self.host, self.slot_of[context]
        return float(rows.probs[slot, token] * rows.scale[slot])

    def _first_chunk(self, missing: IntArray) -> IntArray:
        """Shallow contexts first, as many as one forward's logits may hold."""
        most = max(1, self.engine.request_bytes // (8 * self.trie.n_tokens))
        if len(missing) <= most:
            return missing
        by_depth = np.argsort(self.engine.tree.depth[missing], kind="stable")
        return np.sort(missing[by_depth[:most]])

    # -- keeping -----------------------------------------------------------------------

    def _insert(self, contexts: IntArray, rows: torch.Tensor) -> None:
        """Keep the rows float[B, width] of contexts that have none, int64[B]."""
        if rows.shape[1] < (widest := len(self.trie.vocab)):
            raise BadRowError(
                f"the model returned rows of width {rows.shape[1]}, but its tokenizer has "
                f"{widest} tokens; rows may be wider (padding), not narrower"
            )
        needed = np.concatenate([c.ravel() for c in self._needed.values()])
        slots = self.table.room(len(contexts), needed, self.engine.tree)
        self._host.enlarge(self.table.open)
        total = self._write(slots, rows)
        if not all(0.0 < t < np.inf for t in total.tolist()):
            bad = ~(np.isfinite(total) & (total > 0))
            self.table.release(slots)
            self.engine.refuse_bad(contexts, rows)
            raise BadRowError(
                f"the model returned {int(bad.sum())} of {len(rows)} rows with NaN, +inf or "
                "no finite entry; rows must be log-probabilities in nats"
            )
        self.table.place(contexts, slots)

    def _write(self, slots: IntArray, rows: torch.Tensor) -> FloatArray:
        """Store rows and return what each summed to before it was normalised, float64[B]."""
        if self.transform.plain:
            return self._host.take(slots, rows)
        if rows.device.type == "mps":  # which has no float64
            rows = rows.cpu()
        order = send(self.trie.order.astype(np.int64), rows.device)
        return self._host.put(slots, fetched(self.transform(rows.index_select(1, order))))

    def clear(self) -> None:
        """Drop every row but those that calls under way are waiting for.

        Raises:
            RuntimeError: another thread is being answered.
        """
        with self.engine.tree.one_thread:
            self.table.clear([c.ravel() for c in self._needed.values()])

    def memory(self) -> dict[str, int]:
        """Return rows held, bytes of the slots opened, rows evicted so far."""
        return {"rows": len(self), "bytes": self.nbytes, "evicted": self.table.evicted}
