"""The base class of constraints.

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
from itertools import zip_longest
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from genlm.control.potential.base import Potential

from genlm_bytes_smc.alphabet import BYTES, EOS_COLUMN, TABLES, BytePotential, Context, as_bytes
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
        super().__init__(device_of("cpu" if device is None else device))
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
    """Return a short `repr` of `value`, for summaries and messages."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
