"""Products of byte potentials with genlm-control's potentials over bytes as integers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import numpy as np
import torch
from genlm.control.potential.base import Potential
from genlm.control.potential.product import Product
from genlm.control.typing import Atomic

from genlm_bytes_smc.alphabet import (
    BYTES,
    EOS_COLUMN,
    N_BYTES,
    N_SYMBOLS,
    TABLES,
    Context,
    as_bytes,
)


class ByteProduct(Product):  # type: ignore[misc]
    """A product of genlm-control that can be multiplied by the same potentials as its factors."""

    def __mul__(self, other: Potential) -> ByteProduct:
        """Return the product with one more factor; see `times`."""
        return times(self, other)


def times(own: Potential, other: Potential) -> ByteProduct:
    """Return the product of a potential over bytes and another.

    An automaton of genlm-control (`BoolFSA`, `WFSA`) is compiled to tables on the device of
    `own` first (`constraints.from_genlm`); another potential over integer bytes (its grammars)
    is taken over `bytes` tokens. They stand on the right: genlm-control's own `*` is asked
    where they stand on the left, and it refuses.
    """
    return ByteProduct(own, over_bytes(other, own))


@singledispatch
def over_bytes(other: Any, own: Potential) -> Any:
    """Return `other` over the alphabet of `own`, a potential over bytes, where that is possible.

    Modules that know a better form of some class register it here (`genlm_fsa.py`), so this one
    depends on no kind of constraint.
    """
    if isinstance(other, Potential) and other.token_type == Atomic(int):
        if _speaks_bytes(other):
            return OverBytes(other)
        return other.coerce(own, f=b"".join, prune=False, tables=TABLES)
    return other


def device_of_factor(potential: Any) -> Any:
    """Return the device of a potential's tables, or of the first factor that has one; else None."""
    if isinstance(potential, Product):
        first = device_of_factor(potential.p1)
        return device_of_factor(potential.p2) if first is None else first
    return getattr(potential, "device", None)


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
        """Return the same over an independent copy of the potential."""
        return OverBytes(self.potential.spawn())

    def _numbers(self, context: Context) -> list[int] | None:
        """Return the context as integers; None if a byte is not of the potential's alphabet."""
        text = as_bytes(context)
        return list(text) if self._known.issuperset(text) else None

    def __repr__(self) -> str:
        return f"{self.potential!r} over bytes"


def _speaks_bytes(potential: Potential) -> bool:
    """Return whether every token is an integer 0..255."""
    return all(
        isinstance(t, int | np.integer) and not isinstance(t, bool) and 0 <= t < N_BYTES
        for t in potential.vocab
    )
