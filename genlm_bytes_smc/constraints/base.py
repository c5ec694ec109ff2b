"""The base class of constraints, and products with potentials of genlm-control.

A constraint answers in two ways that always agree:

- as a `Potential` of genlm-control, about contexts (lists of one-byte tokens, or `bytes`);
- to a particle loop, about **states**: an int64 tensor with one opaque number a lane, which
  is forked and resampled by plain indexing (`state[idx]`).

The law that ties both, for every state s that is not dead and every byte b:

    block(s)[b]   = log_prefix(step(s, b)) - log_prefix(s)
    block(s)[EOS] = log_complete(s) - log_prefix(s)

Weights are natural logarithms (nats). A state that no text can follow is -1 (dead): its
`log_prefix` is -inf and its row of `block` is -inf throughout.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import singledispatch
from itertools import zip_longest
from typing import Any, Self

import numpy as np
import numpy.typing as npt
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
from genlm_bytes_smc.html import render
from genlm_bytes_smc.lm.devices import device_of

DEAD = -1
_CONTEXTS_KEPT = 16_384

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


class ConstraintError(ValueError):
    """A constraint that cannot be built: it does not parse, is not supported or is empty."""


class OutgrownError(ConstraintError):
    """The construction of an automaton outgrows a limit: of states, time or memory."""


class EmptyLanguageError(ConstraintError):
    """An automaton accepts nothing."""

    def __str__(self) -> str:
        return "the constraint admits no text at all: its language is empty"


class NotRegularError(ConstraintError):
    """A pattern has a part that no automaton expresses."""


def too_large(limit: int) -> OutgrownError:
    """Return the error for an automaton that outgrows its limit."""
    return OutgrownError(
        f"the automaton needs more than max_states={limit} states; raise max_states "
        "(a state takes 1 KiB on the device) or write a smaller constraint"
    )


class BytePotential(Potential):  # type: ignore[misc]
    """A potential over `BYTES` that is asked about many texts at once.

    Subclasses implement `weights_of` and `rows_of`, on texts whose bytes have been checked; the
    `Potential` methods follow from them. A batch of none is a ValueError.

    Attributes:
        device: where rows are returned. Weights are on the host in numpy, as genlm-control's own
            are: its products add them to those of any other potential.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(BYTES, tables=TABLES)
        self.device = device_of(device)

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


class ByteConstraint(BytePotential):
    """A potential over `BYTES` that can also advance many lanes at once.

    Subclasses implement `block`, `step` and, where prefixes have weights, `log_prefix` over
    states, in which 0 is the state of the empty text; the `Potential` methods follow from them.

    Args:
        device: where weights and states live (None: the CPU).
    """

    # Attributes that are not pickled: what all potentials over bytes share, and the memory.
    _transient = frozenset(
        {"vocab", "vocab_eos", "lookup", "eos", "token_type", "_known", "_autobatched"}
    )

    def __init__(self, device: torch.device | str | None = None) -> None:
        super().__init__("cpu" if device is None else device)
        self._forget()

    def _forget(self) -> None:
        """Begin with an empty memory; also called for copies, and for what was pickled."""
        self._known: OrderedDict[bytes, int] = OrderedDict()

    # -- states: the vectorised side ---------------------------------------------------

    def initial(self, n: int) -> torch.Tensor:
        """Return the state of the empty text for `n` lanes, int64[n]."""
        return torch.zeros(n, dtype=torch.int64, device=self.device)

    @abstractmethod
    def block(self, state: torch.Tensor) -> torch.Tensor:
        """Log weights of the next byte and of EOS: int64[n] -> float64[n, 257]."""

    @abstractmethod
    def step(self, state: torch.Tensor, symbols: torch.Tensor) -> torch.Tensor:
        """Read one byte a lane: int64[n] states, int64[n] bytes in 0..255 -> int64[n] states.

        A byte of weight -inf leads to the dead state -1. EOS is never stepped.
        """

    def log_prefix(self, state: torch.Tensor) -> torch.Tensor:
        """Log weight of what has been read, as a prefix: int64[n] -> float64[n].

        It is 0 for a live state, unless a subclass weighs prefixes.
        """
        return log_of(state >= 0)

    def log_complete(self, state: torch.Tensor) -> torch.Tensor:
        """Log weight of what has been read, as a whole text: int64[n] -> float64[n]."""
        return self.log_prefix(state) + self.block(state)[:, EOS_COLUMN]

    def keep(self, states: Iterable[torch.Tensor]) -> None:
        """Promise that only the states in these tensors will be used from now on.

        Constraints that remember something per state drop the rest (automata do not); the states
        given stay valid. The promise binds every user of this object (`spawn` makes another).
        """

    def release(self) -> None:
        """Forget every state but that of the empty text."""
        self._known.clear()
        self.keep([])

    # -- contexts: the Potential side --------------------------------------------------

    def states(self, contexts: Sequence[Context]) -> torch.Tensor:
        """Return the states of whole contexts, int64[n]; one that is a byte longer takes a step."""
        texts = [as_bytes(c) for c in contexts]
        found = {text: self._known.get(text) for text in dict.fromkeys(texts)}
        missing = [text for text, handle in found.items() if handle is None]
        if missing:
            handles, lengths = zip(*map(self._longest_known, missing), strict=True)
            rests = [text[k:] for text, k in zip(missing, lengths, strict=True)]
            state = self._read(torch.tensor(handles, device=self.device), rests)
            found.update(zip(missing, state.tolist(), strict=True))
        for text, handle in found.items():
            self._known[text] = handle  # type: ignore[assignment]
            self._known.move_to_end(text)
        while len(self._known) > _CONTEXTS_KEPT:
            self._known.popitem(last=False)
        return torch.tensor([found[t] for t in texts], dtype=torch.int64, device=self.device)

    def _longest_known(self, text: bytes) -> tuple[int, int]:
        """Return (state, length) of the longest prefix of `text` whose state is remembered."""
        for k in range(len(text) - 1, 0, -1):
            handle = self._known.get(text[:k])
            if handle is not None:
                return handle, k
        return 0, 0

    def _read(self, state: torch.Tensor, texts: list[bytes]) -> torch.Tensor:
        """Step each lane through a text of its own."""
        for column in zip_longest(*texts):
            if None not in column:
                state = self.step(state, torch.tensor(column, device=self.device))
                continue
            here = [i for i, byte in enumerate(column) if byte is not None]
            lanes = torch.tensor(here, device=self.device)
            symbols = torch.tensor([column[i] for i in here], device=self.device)
            state = state.index_copy(0, lanes, self.step(state[lanes], symbols))
        return state

    async def weights_of(self, texts: Sequence[bytes], *, complete: bool = False) -> FloatArray:
        """See `BytePotential`; `log_prefix` and `log_complete` stay on the device."""
        weigh = self.log_complete if complete else self.log_prefix
        return np.asarray(weigh(self.states(texts)).cpu())

    async def rows_of(self, texts: Sequence[bytes]) -> tuple[torch.Tensor, BoolArray]:
        """See `BytePotential`; here an impossible text is no error in `logw_next` either."""
        return self.block(self.states(texts)), np.ones(len(texts), dtype=np.bool_)

    async def logw_eos(self, context: Context) -> float:
        """Log weight of ending after `context`."""
        return float(self.block(self.states([context]))[0, EOS_COLUMN])

    # -- copies ------------------------------------------------------------------------

    def to(self, device: torch.device | str) -> Self:
        """Return a copy of this constraint on another device, with no memory of states."""
        new, device = object.__new__(type(self)), device_of(device)
        for name, value in self.__dict__.items():
            new.__dict__[name] = value.to(device) if isinstance(value, torch.Tensor) else value
        new.__dict__.pop("_autobatched", None)  # genlm-control's wrapper of this one
        new.device = device
        new._forget()
        return new

    def spawn(self) -> Self:
        """Return an independent copy that shares the compiled tables and none of the memory."""
        return self.to(self.device)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in self._transient}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Potential.__init__(self, BYTES, tables=TABLES)
        self.__dict__.update(state)
        self._forget()

    def summary(self) -> dict[str, str]:
        """Return what `repr` and the notebook view show, name by name."""
        return {**self._facts(), "device": str(self.device)}

    def _facts(self) -> dict[str, str]:
        """Return what a class adds to `summary`."""
        return {}

    def __repr__(self) -> str:
        inside = ", ".join(f"{k}={v}" for k, v in self.summary().items())
        return f"{type(self).__name__}({inside})"

    def _repr_html_(self) -> str:
        return render("summary", name=type(self).__name__, rows=self.summary())


def log_of(mask: torch.Tensor) -> torch.Tensor:
    """Return 0 where a mask is true and -inf where it is false, float64."""
    return torch.where(mask, 0.0, -torch.inf).double()


def show(value: object, limit: int = 60) -> str:
    """Return a short `repr` of `value`, for summaries."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


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
