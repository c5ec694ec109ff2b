"""A potential over bytes as integers, taken over `bytes` tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from genlm.control.potential.base import Potential

from genlm_bytes_smc.alphabet import (
    BYTES,
    EOS_COLUMN,
    N_BYTES,
    N_SYMBOLS,
    TABLES,
    Context,
    as_bytes,
)


class OverBytes(Potential):  # type: ignore[misc]
    """The same weights, asked for with one-byte `bytes` tokens.

    genlm-control's own coercion asks for the prefix weight of each of the 256 extensions. That
    is slow (for a grammar a hundred times as slow as its own row), and a grammar answers wrongly
    for bytes that are not of its alphabet: genlm-grammar takes some for its nonterminals, which
    it numbers. Here the potential's own row is put in its columns, and it is never asked about
    other bytes, which weigh -inf.

    Args:
        potential: over integers 0..255.
    """

    def __init__(self, potential: Potential) -> None:
        super().__init__(BYTES, tables=TABLES)
        self.potential = potential
        self._known = frozenset(potential.vocab)
        self._columns = np.array([*potential.vocab, EOS_COLUMN], dtype=np.int64)

    async def prefix(self, context: Context) -> float:
        """Log weight of `context` as a prefix, nats."""
        numbers = self._numbers(context)
        return -np.inf if numbers is None else float(await self.potential.prefix(numbers))

    async def complete(self, context: Context) -> float:
        """Log weight of `context` as a whole text, nats."""
        numbers = self._numbers(context)
        return -np.inf if numbers is None else float(await self.potential.complete(numbers))

    async def logw_next(self, context: Context) -> Any:
        """Log weights of the next byte and of EOS: `LazyWeights` over float64[257], nats.

        Raises:
            ValueError: the context is impossible (as every potential of genlm-control does).
        """
        return self.make_lazy_weights((await self.batch_logw_next([context])).weights[0])

    async def batch_logw_next(self, contexts: Sequence[Context]) -> Any:
        """`logw_next` of each context: `LazyWeights` over float64[N, 257], nats.

        Raises:
            ValueError: one of them is impossible.
        """
        numbers = [self._numbers(context) for context in contexts]
        known = [n for n in numbers if n is not None]
        weights = iter(np.asarray(await self.potential.batch_prefix(known)) if known else [])
        for context, n in zip(contexts, numbers, strict=True):
            if n is None or next(weights) == -np.inf:
                raise ValueError(f"Context {context!r} has weight zero under `prefix`.")
        own = torch.as_tensor((await self.potential.batch_logw_next(known)).weights)
        rows = np.full((len(known), N_SYMBOLS), -np.inf)
        rows[:, self._columns] = own.double().cpu().numpy()
        return self.make_lazy_weights(rows)

    def spawn(self) -> OverBytes:
        """The same over a potential of its own."""
        return OverBytes(self.potential.spawn())

    def _numbers(self, context: Context) -> list[int] | None:
        """The context as the potential takes it; None if a byte is not of its alphabet."""
        text = as_bytes(context)
        return list(text) if self._known.issuperset(text) else None

    def __repr__(self) -> str:
        return f"{self.potential!r} over bytes"


def speaks_bytes(potential: Potential) -> bool:
    """Whether every token is an integer 0..255."""
    return all(
        isinstance(t, int | np.integer) and not isinstance(t, bool) and 0 <= t < N_BYTES
        for t in potential.vocab
    )
