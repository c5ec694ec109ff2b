"""The alphabet of this package (256 one-byte tokens and EOS), and what potentials over it share.

Every byte-level potential of the package is built on the same list object, so that a
genlm-control product of two of them needs no coercion: it recognises the list by identity
and adds the two rows. Column `b` of a row of weights is byte `b`; column `EOS_COLUMN` is the
end of the text.

`imported_late` keeps short the import of genlm-control, which takes slow packages along for
functions that nobody here calls.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import singledispatch
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


@contextmanager
def imported_late(name: str, *functions: str) -> Iterator[None]:
    """Let modules that are imported in the block take functions of a package without loading it.

    The package is imported when one of them is first called. Any other name of the package
    imports it at once. Nothing happens where it is loaded already, or not installed.

    Args:
        name: the package.
        functions: names of functions in it.
    """
    if name in sys.modules or (spec := find_spec(name)) is None:
        yield
        return
    stand_in = _StandIn(name)
    stand_in.__spec__ = spec  # torch's compiler, which vLLM imports, looks for packages by it
    for function in functions:
        setattr(stand_in, function, _late(name, function))
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]


class _StandIn(ModuleType):
    """A module that becomes the real one as soon as another name is asked for."""

    def __getattr__(self, attribute: str) -> Any:
        name = self.__name__
        if attribute.startswith("__"):  # of the import machinery
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}")
        if sys.modules.get(name) is self:
            del sys.modules[name]
        return getattr(import_module(name), attribute)


def _late(name: str, function: str) -> Callable[..., Any]:
    return lambda *args, **options: getattr(import_module(name), function)(*args, **options)


# The first is what jsonschema takes to check the formats "iri" and "iri-reference" (it builds a
# parser while it is imported, for one to two seconds); the others what arsenal's stop watch does.
with (
    imported_late("rfc3987_syntax", "is_valid_syntax"),
    imported_late("matplotlib.pyplot"),
    imported_late("pandas"),
):
    from genlm.control.potential.base import Potential as Potential
    from genlm.control.potential.base import VocabTables
    from genlm.control.potential.product import Product
    from genlm.control.typing import Atomic

N_BYTES = 256
EOS_COLUMN = N_BYTES
N_SYMBOLS = N_BYTES + 1

BYTES: list[bytes] = [bytes([i]) for i in range(N_BYTES)]
TABLES: VocabTables = Potential.build_tables(BYTES)

Context = Sequence[bytes] | bytes
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

_CPU = torch.device("cpu")


def as_bytes(context: Context) -> bytes:
    """Return the bytes of a context, checked.

    Raises:
        TypeError: a token is not `bytes`.
        ValueError: a token is not exactly one byte.
    """
    if isinstance(context, bytes):
        return context
    try:
        text = b"".join(context)
    except TypeError:
        odd = next(t for t in context if not isinstance(t, bytes))
        raise TypeError(
            f"a context is bytes or a sequence of one-byte `bytes` tokens, got the token {odd!r} "
            f"of type {type(odd).__name__}"
        ) from None
    if len(text) != len(context):
        odd = next(t for t in context if len(t) != 1)
        raise ValueError(f"a token of a context is exactly one byte, got {odd!r}")
    return text


def contexts_of(texts: Iterable[bytes]) -> list[list[bytes]]:
    """Return texts as genlm-control has them: lists of one-byte tokens."""
    return [[BYTES[b] for b in text] for text in texts]


# -- potentials over bytes, and their products -------------------------------------------------


class BytePotential(Potential):  # type: ignore[misc]
    """A potential over `BYTES` that is asked about many texts at once.

    Subclasses implement `weights_of` and `rows_of`, on texts whose bytes have been checked; the
    `Potential` methods follow from them. A batch of none is a ValueError.

    Attributes:
        device: where rows are returned. Weights are on the host in numpy, as genlm-control's own
            are: its products add them to those of any other potential.
    """

    def __init__(self, device: torch.device = _CPU) -> None:
        super().__init__(BYTES, tables=TABLES)
        self.device = device

    @abstractmethod
    async def weights_of(self, texts: Sequence[bytes], *, complete: bool = False) -> FloatArray:
        """Return log weights of N texts as prefixes, or as whole ones: float64[N], nats."""

    @abstractmethod
    async def rows_of(self, texts: Sequence[bytes]) -> tuple[torch.Tensor, BoolArray]:
        """Return log weights of the next byte and of EOS after N texts, float64[N, 257], nats.

        The second item is which texts are possible, bool[N]; rows of the others are -inf.
        """

    async def prefix(self, context: Context) -> float:
        """Log weight of `context` as a prefix, nats; -inf if it is impossible."""
        return float((await self.weights_of([as_bytes(context)]))[0])

    async def complete(self, context: Context) -> float:
        """Log weight of `context` as a whole text, nats; -inf if it is impossible."""
        return float((await self.weights_of([as_bytes(context)], complete=True))[0])

    async def logw_next(self, context: Context) -> Any:
        """Log weights of the next byte and of EOS: `LazyWeights` over float64[257], nats.

        Raises:
            ValueError: the context is impossible (as every potential of genlm-control does).
        """
        rows, possible = await self.rows_of([as_bytes(context)])
        if not possible[0]:
            raise ValueError(f"Context {context!r} has weight zero under `prefix`.")
        return self.make_lazy_weights(rows[0])

    async def batch_prefix(self, contexts: Sequence[Context]) -> FloatArray:
        """`prefix` of each context, float64[N]."""
        return await self.weights_of(_texts(contexts))

    async def batch_complete(self, contexts: Sequence[Context]) -> FloatArray:
        """`complete` of each context, float64[N]."""
        return await self.weights_of(_texts(contexts), complete=True)

    async def batch_logw_next(self, contexts: Sequence[Context]) -> Any:
        """`logw_next` of each context: `LazyWeights` over float64[N, 257] on `device`.

        Unlike in `logw_next`, an impossible context has a row of -inf: one particle whose text is
        impossible is no reason to fail the others.
        """
        return self.make_lazy_weights((await self.rows_of(_texts(contexts)))[0])

    def alloc_rows(self, n: int, default: float = float("-inf")) -> torch.Tensor:
        """Return a block of `n` rows filled with `default`, float64[n, 257] on `device`."""
        return torch.full((n, N_SYMBOLS), default, dtype=torch.float64, device=self.device)

    def __mul__(self, other: Potential) -> ByteProduct:
        """Return the product; automata and grammars of genlm-control over bytes, on the right,
        are made to fit (see `times`)."""
        return times(self, other)


def _texts(contexts: Sequence[Context]) -> list[bytes]:
    if not contexts:
        raise ValueError("Contexts must be non-empty: expected at least one context, got none")
    return [as_bytes(context) for context in contexts]


class ByteProduct(Product):  # type: ignore[misc]
    """A product of genlm-control that can be multiplied by the same potentials as its factors."""

    def __mul__(self, other: Potential) -> ByteProduct:
        """Return the product with one more factor; see `times`."""
        return times(self, other)


def times(own: Potential, other: Potential) -> ByteProduct:
    """Return the product of a potential over bytes and another.

    An automaton of genlm-control (`BoolFSA`, `WFSA`) is compiled to tables on the device of
    `own` first (`from_genlm`); another potential over integer bytes (its grammars) is taken over
    `bytes` tokens. They stand on the right: on the left, genlm-control's own `*` refuses them.
    """
    return ByteProduct(own, over_bytes(other, own))


@singledispatch
def over_bytes(other: Any, own: Potential) -> Any:
    """Return `other` over the alphabet of `own`, a potential over bytes, where that is possible.

    `wfsa.py` registers a better form of some classes here.
    """
    if not isinstance(other, Potential) or other.token_type != Atomic(int):
        return other
    if all(not isinstance(t, bool) and 0 <= t < N_BYTES for t in other.vocab):
        return OverBytes(other)
    return other.coerce(own, f=b"".join, prune=False, tables=TABLES)


def device_of_factor(potential: Any) -> Any:
    """Return the device of a potential's tables, or of the first factor that has one; else None."""
    if isinstance(potential, Product):
        first = device_of_factor(potential.p1)
        return device_of_factor(potential.p2) if first is None else first
    return getattr(potential, "device", None)


class OverBytes(BytePotential):
    """The weights of a potential over integers 0..255, asked for with one-byte `bytes` tokens.

    genlm-control's own coercion asks for the prefix weight of each of the 256 extensions. That
    is slow (for a grammar a hundred times as slow as its own row), and a grammar answers wrongly
    for bytes that are not of its alphabet: genlm-grammar takes some for its nonterminals, which
    it numbers. Here the potential's own row is put in its columns, and it is never asked about
    other bytes, which weigh -inf.
    """

    def __init__(self, potential: Potential) -> None:
        super().__init__()
        self.potential = potential
        self._known = frozenset(potential.vocab)
        self._columns = np.array([*potential.vocab, EOS_COLUMN], dtype=np.int64)

    async def weights_of(self, texts: Sequence[bytes], *, complete: bool = False) -> FloatArray:
        """See `BytePotential`."""
        out = np.full(len(texts), -np.inf)
        known = [n for n, text in enumerate(texts) if self._known.issuperset(text)]
        if known:
            weigh = self.potential.batch_complete if complete else self.potential.batch_prefix
            out[known] = await weigh([list(texts[n]) for n in known])
        return out

    async def rows_of(self, texts: Sequence[bytes]) -> tuple[torch.Tensor, BoolArray]:
        """See `BytePotential`."""
        possible = await self.weights_of(texts) > -np.inf
        rows, at = self.alloc_rows(len(texts)), np.flatnonzero(possible)
        if len(at):
            lazy = await self.potential.batch_logw_next([list(texts[n]) for n in at.tolist()])
            own = torch.as_tensor(lazy.weights).double().cpu()
            rows[np.ix_(at, self._columns)] = own
        return rows, possible

    def spawn(self) -> OverBytes:
        """Return the same over an independent copy of the potential."""
        return OverBytes(self.potential.spawn())

    def __repr__(self) -> str:
        return f"{self.potential!r} over bytes"
