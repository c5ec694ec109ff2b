"""The base class of constraints: a genlm-control potential over bytes with a vectorised side.

A constraint answers in two ways that always agree:

- as a `Potential`, about contexts (lists of one-byte tokens, or `bytes`);
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
from itertools import zip_longest
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from genlm.control.potential.base import Potential

from genlm_bytes_smc.alphabet import BYTES, EOS_COLUMN, N_SYMBOLS, TABLES, Context, as_bytes
from genlm_bytes_smc.constraints.product import ByteProduct, times
from genlm_bytes_smc.html import render
from genlm_bytes_smc.lm.devices import device_of

DEAD = -1
_CONTEXTS_KEPT = 16_384

# What is the same in every potential over bytes, and so is not pickled.
_SHARED = {"vocab", "vocab_eos", "lookup", "eos", "token_type"}

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


class ConstraintError(ValueError):
    """A constraint that cannot be built: it does not parse, is not supported or is empty."""


class ByteConstraint(Potential):  # type: ignore[misc]
    """A potential over `BYTES` that can also advance many lanes at once.

    Subclasses implement `block`, `step` and, where prefixes have weights, `log_prefix` over
    states, in which 0 is the state of the empty text; the `Potential` methods follow from them.

    Args:
        device: where weights and states live (None: the CPU).
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        super().__init__(BYTES, tables=TABLES)
        self.device = device_of("cpu" if device is None else device)
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

        Constraints that remember something per state drop the rest; the states given stay
        valid and the same. The promise binds every user of this object (`spawn` makes an
        independent one). Automata remember nothing: for them this does nothing.
        """

    def release(self) -> None:
        """Forget every state but that of the empty text."""
        self._known.clear()
        self.keep([])

    def __mul__(self, other: Potential) -> ByteProduct:
        """Return the product; `product.times` says what may stand on the right."""
        return times(self, other)

    # -- contexts: the Potential side --------------------------------------------------

    def states(self, contexts: Sequence[Context]) -> torch.Tensor:
        """Return the states of whole contexts, int64[n].

        A context seen before costs one dictionary lookup, one that is a byte longer one step.
        """
        texts = [as_bytes(c) for c in contexts]
        found = {text: self._known.get(text) for text in dict.fromkeys(texts)}
        missing = [text for text, handle in found.items() if handle is None]
        if missing:
            starts = [self._longest_known(text) for text in missing]
            state = torch.tensor([handle for handle, _ in starts], device=self.device)
            state = self._read(state, [t[k:] for t, (_, k) in zip(missing, starts, strict=True)])
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
            else:
                here = [i for i, byte in enumerate(column) if byte is not None]
                lanes = torch.tensor(here, device=self.device)
                symbols = torch.tensor([column[i] for i in here], device=self.device)
                state = state.index_copy(0, lanes, self.step(state[lanes], symbols))
        return state

    async def prefix(self, context: Context) -> float:
        """Log weight of `context` as a prefix; -inf where it is impossible."""
        return float(self.log_prefix(self.states([context]))[0])

    async def complete(self, context: Context) -> float:
        """Log weight of `context` as a whole text; -inf where it is impossible."""
        return float(self.log_complete(self.states([context]))[0])

    async def logw_next(self, context: Context) -> Any:
        """Log weights of the next byte and EOS (`LazyWeights` over float64[257])."""
        return self.make_lazy_weights(self.block(self.states([context]))[0])

    async def logw_eos(self, context: Context) -> float:
        """Log weight of ending after `context`."""
        return float(self.block(self.states([context]))[0, EOS_COLUMN])

    # These two are numpy on the host, as genlm-control's own are: its products add them to
    # those of any other potential, and an array and a tensor do not add.

    async def batch_prefix(self, contexts: Sequence[Context]) -> FloatArray:
        """`prefix` of each context, float64[n] in numpy (`log_prefix` stays on the device)."""
        return _host(self.log_prefix(self.states(_some(contexts))))

    async def batch_complete(self, contexts: Sequence[Context]) -> FloatArray:
        """`complete` of each context, float64[n] in numpy (`log_complete` is on the device)."""
        return _host(self.log_complete(self.states(_some(contexts))))

    async def batch_logw_next(self, contexts: Sequence[Context]) -> Any:
        """`logw_next` of each context as one block (`LazyWeights` over float64[n, 257]).

        An impossible context has a row of -inf.
        """
        return self.make_lazy_weights(self.block(self.states(_some(contexts))))

    def alloc_rows(self, n: int, default: float = float("-inf")) -> torch.Tensor:
        """Return `n` rows filled with `default`, float64[n, 257] on the device."""
        return torch.full((n, N_SYMBOLS), default, dtype=torch.float64, device=self.device)

    # -- copies ------------------------------------------------------------------------

    def to(self, device: torch.device | str) -> Self:
        """Return a copy of this constraint on another device, with no memory of states."""
        return self._copy(device_of(device))

    def spawn(self) -> Self:
        """Return an independent copy that shares the compiled tables and none of the memory."""
        return self._copy(self.device)

    def _copy(self, device: torch.device) -> Self:
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.__dict__.pop("_autobatched", None)  # genlm-control's wrapper of this one
        new.device = device
        new._known = OrderedDict()
        return new

    def __getstate__(self) -> dict[str, Any]:
        state = self.spawn().__dict__
        return {k: v for k, v in state.items() if k not in _SHARED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Potential.__init__(self, BYTES, tables=TABLES)
        self.__dict__.update(state)

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


def _some(contexts: Sequence[Context]) -> Sequence[Context]:
    if not contexts:
        raise ValueError("expected at least one context, got none")
    return contexts


def _host(weights: torch.Tensor) -> FloatArray:
    return np.asarray(weights.cpu().numpy(), dtype=np.float64)


def log_of(mask: torch.Tensor) -> torch.Tensor:
    """Return 0 where a mask is true and -inf where it is false, float64."""
    out = torch.full(mask.shape, float("-inf"), dtype=torch.float64, device=mask.device)
    return out.masked_fill_(mask, 0.0)


def show(value: object, limit: int = 60) -> str:
    """Return a short `repr` of `value`, for summaries."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
