"""Next-token rows as probabilities, kept on the device under a limit in bytes.

The beam sums probabilities over ranges of sorted tokens, so a row is stored as linear
probabilities: sums are direct, keep full relative precision (a token at -120 nats stays
alive), and need no exponential. On a CPU a row is stored in the order it comes (`HostRows`):
sorting 50,000 numbers costs more than the few sums that are made of most rows. On another
device it is float64 in sorted order. Tokens that spell nothing and padding columns of the LM
head are left out and the row is normalised over the rest: it is conditioned on a token that
spells something.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.engine import BadRowError, RowEngine, gathered
from genlm_bytes_smc.lm.host_rows import ROUNDING, HostRows, RowArrays, starts_exact
from genlm_bytes_smc.lm.slots import SlotTable
from genlm_bytes_smc.lm.transfer import send
from genlm_bytes_smc.trie import TokenTrie

FloatArray = npt.NDArray[np.float64]

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


class RowStore:
    """Rows of one engine under one transform, by context id.

    Args:
        engine: where rows come from.
        trie: gives the order of columns.
        transform: temperature, top-k, top-p.
        limit_bytes: rows beyond it are dropped, oldest and unreachable first, and computed
            again when asked for. What one call needs at once is always held.
        on_host: keep the rows in the memory of the host, wherever they are computed.

    Attributes:
        device: where rows are kept.
        table: which context is in which slot.
    """

    def __init__(
        self,
        engine: RowEngine,
        trie: TokenTrie,
        transform: RowTransform | None = None,
        limit_bytes: int = DEFAULT_ROW_BYTES,
        *,
        on_host: bool = False,
    ) -> None:
        self.engine = engine
        self.device = torch.device("cpu") if on_host else engine.device
        self.trie = trie
        self.transform = transform or RowTransform()
        self.limit_bytes = limit_bytes
        self._order = torch.as_tensor(trie.order.astype(np.int64), device=self.device)
        exact = self.device.type != "cpu" or not self.transform.plain or starts_exact(trie)
        row_bytes = (8 if exact else 4) * len(trie.vocab) + 2048
        self.table = SlotTable(max(8, _FIRST_BYTES // row_bytes), limit_bytes // row_bytes)
        self._host: HostRows | None = None
        if self.device.type == "cpu":
            # Memory costs nothing until it is written to: reserve the whole limit.
            self._host = HostRows(trie, self.table.limit, exact)
        else:
            self._probs = self._allocate(self.table.open)
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
        return 8 * self.trie.n_tokens if self._host is None else self._host.row_bytes()

    @property
    def exact(self) -> bool:
        """Return whether rows are kept in float64; see `HostRows` for when they need not be."""
        return self._host is None or self._host.exact

    @property
    def probs(self) -> torch.Tensor:
        """Probabilities float64[slots, T] in trie order on `device`, by slot.

        On a CPU they are made when asked for: a copy, of the slots written to so far.
        """
        return self._probs if self._host is None else self._host.linear(self._host.used + 1)

    @property
    def host(self) -> RowArrays:
        """Rows on the host, for kernels there (`device` is a CPU)."""
        assert self._host is not None
        return self._host.arrays(self.table.slot_of)

    # -- asking ------------------------------------------------------------------------

    def missing(self, contexts: IntArray) -> IntArray:
        """Distinct ids >= 0 among `contexts` (any shape) that have no row, int64[m]."""
        self.cover()
        return self.table.missing(contexts)

    def cover(self) -> None:
        """Make a place in `slot_of` for every context that the tree has room for."""
        table, capacity = self.table, self.engine.tree.capacity
        if len(table.slot_of) <= capacity:
            table.cover(capacity)

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
                        missing = self._still(missing, chunk, contexts)
            self.table.touch(contexts)

    def ensure_sync(self, contexts: IntArray) -> None:
        """As `ensure`, without an event loop."""
        with self.engine.tree.one_thread:
            missing = self.missing(contexts)
            if len(missing):
                with self._needing(contexts):
                    while len(missing):
                        chunk = self._first_chunk(missing)
                        self._insert(chunk, self.engine.rows_sync(chunk))
                        missing = self._still(missing, chunk, contexts)
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

    def _still(self, missing: IntArray, came: IntArray, contexts: IntArray) -> IntArray:
        """Return what of `contexts` is missing once some of `missing` have come."""
        return missing[:0] if len(came) == len(missing) else self.missing(contexts)

    def prob(self, context: int, token: int) -> float:
        """Probability of one token after a context whose row is held.

        A token that spells nothing has probability one: rows are conditioned on the others.
        """
        if self.trie.position[token] < 0:
            return 1.0
        slot = int(self.slot_of[context])
        if self._host is not None:
            return self._host.prob(slot, token)
        return float(self._probs[slot, int(self.trie.position[token])])

    def _first_chunk(self, missing: IntArray) -> IntArray:
        """Shallow contexts first, as many as one forward's logits may hold."""
        if len(missing) == 1:
            return missing
        most = max(1, self.engine.request_bytes // (8 * self.trie.n_tokens))
        if len(missing) <= most:
            return missing
        by_depth = np.argsort(self.engine.tree.depth[missing], kind="stable")
        return np.sort(missing[by_depth[:most]])

    # -- keeping -----------------------------------------------------------------------

    def _insert(self, contexts: IntArray, rows: torch.Tensor) -> None:
        """Keep the rows float[B, width] of contexts that have none, int64[B]."""
        widest = len(self.trie.vocab)
        if rows.shape[1] < widest:
            raise BadRowError(
                f"the model returned rows of width {rows.shape[1]}, but its tokenizer has "
                f"{widest} tokens; rows may be wider (padding), not narrower"
            )
        if self._host is not None:
            rows = rows.cpu()
        needed = np.concatenate([c.ravel() for c in self._needed.values()])
        slots = self.table.room(len(contexts), needed, self.engine.tree.live)
        self._enlarge()
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
        host = self._host
        if host is not None and self.transform.plain:
            return host.take(slots, rows)
        fresh = self.transform(rows.index_select(1, self._order))
        if host is not None:
            return host.put(slots, fresh)
        sums = fresh.sum(dim=1)
        # A row over just the tokens that spell something is a distribution as it comes.
        whole = rows.shape[1] == self.trie.n_tokens
        far = (sums - 1).abs() > (ROUNDING if whole else 0.0)
        scale = torch.where(far, sums, torch.ones_like(sums))
        self._probs[send(slots, self._probs.device)] = fresh / scale[:, None]
        out: FloatArray = sums.cpu().numpy()
        return out

    def _allocate(self, slots: int) -> torch.Tensor:
        shape = (slots, self.trie.n_tokens)
        return torch.empty(shape, dtype=torch.float64, device=self.device)

    def _enlarge(self) -> None:
        """Storage for every open slot, the rows where they were."""
        if self._host is not None:
            if self.table.open > len(self._host):
                self._host.enlarge(self.table.open)
        elif self.table.open > len(self._probs):
            old, self._probs = self._probs, self._allocate(self.table.open)
            self._probs[: len(old)] = old

    def clear(self) -> None:
        """Drop every row but those that calls under way are waiting for.

        Raises:
            RuntimeError: another thread is being answered.
        """
        with self.engine.tree.one_thread:
            self.table.clear([c.ravel() for c in self._needed.values()])

    def memory(self) -> dict[str, int]:
        """Rows held, bytes of the slots opened, rows evicted so far."""
        return {"rows": len(self), "bytes": self.nbytes, "evicted": self.table.evicted}
