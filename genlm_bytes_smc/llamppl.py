"""Byte-level language models in llamppl programs.

    class Word(llamppl.Model):
        def __init__(self, context):
            super().__init__()
            self.context = context

        async def step(self):
            self.score(await self.context.log_mass())  # zero unless prune="unbiased"
            await self.observe(self.context.mask_dist(b"abc", EOS), True)
            if await self.sample(self.context.next_byte()) is EOS:
                self.finish()

    context = await ByteContext.create(byte_llm, prompt=b"...")
    particles = await llamppl.smc_standard(Word(context), 32)

Particles that wait for their next row at the same time share one forward of the model; a
particle that has died or finished asks for none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
from genlm.control.constant import EOS, EndOfSequence

from genlm_bytes_smc.alphabet import BYTES, EOS_COLUMN, N_SYMBOLS
from genlm_bytes_smc.beam.prompt import Prompt
from genlm_bytes_smc.potential import ByteLLM

try:
    from llamppl.distributions.distribution import Distribution
    from llamppl.distributions.lmcontext import NullMask
except ImportError as error:
    raise ImportError(
        f'ByteContext needs llamppl ({error}): pip install "genlm-bytes-smc[llamppl]"'
    ) from error

Symbol: TypeAlias = "bytes | EndOfSequence"
Row = npt.NDArray[np.float64]

_SYMBOLS: list[Any] = [*BYTES, EOS]


class ByteContext:
    """A text that a llamppl program is writing.

    It knows the bytes read so far and what has been ruled out for the next one. Both change
    by sampling, observing or intervening on `next_byte()` and `mask_dist(...)`. A symbol is a
    `bytes` of length one, or genlm-control's `EOS`; where symbols are given, an integer
    0..255 stands for its byte too.

    A deep copy (which llamppl makes of every particle) shares everything with the original.

    Make one with `create`.
    """

    def __init__(self, llm: ByteLLM, rng: np.random.Generator | None = None) -> None:
        self.llm = llm
        self.rng = rng
        self.text = b""
        self.ended = False
        self._row: Row | None = None  # log probabilities of the next symbol, nats; or all -inf
        self._log_mass = 0.0  # of the row as served, and what the one before it had not said
        self._served: Row | None = None  # the row as served, without masks
        self._promised = 0.0  # log weight of the text by the rows, nats
        self._weighed = False  # whether `log_mass` has been asked for this row
        self._impossible = False  # whether the program has been told a log probability of -inf

    @classmethod
    async def create(
        cls,
        llm: ByteLLM,
        prompt: Prompt | bytes | None = None,
        *,
        rng: np.random.Generator | None = None,
    ) -> Self:
        """Make a context that has read nothing after the prompt; the prompt is read now.

        Args:
            llm: the byte-level model.
            prompt: what the text comes after; None leaves the model's own.
            rng: where samples are drawn from, shared by all copies. None: numpy's global
                generator, which is what llamppl itself draws from.

        Raises:
            TypeError: `llm` is no ByteLLM.
        """
        if not isinstance(llm, ByteLLM):
            raise TypeError(f"a ByteLLM is due, got {type(llm).__name__}; make one of the model")
        context = cls(llm if prompt is None else llm.with_prompt(prompt), rng)
        await context._next_row()
        return context

    # -- distributions -----------------------------------------------------------------

    def next_byte(self) -> NextByte:
        """Return the distribution of the next symbol; any use of it appends one to the text."""
        return NextByte(self)

    def mask_dist(self, *masks: bytes | Symbol | int | Iterable[Symbol | int]) -> Mask:
        """Return the distribution of whether the next symbol is in a set.

        Any use of it rules the other symbols out (or, if the value is False, these).

        Args:
            masks: symbols, or collections of symbols: `mask_dist(b"0123456789", EOS)`.

        Raises:
            TypeError, ValueError: something that is no symbol.
        """
        return Mask(self, _mask(masks))

    async def log_mass(self) -> float:
        """Return the log of the total mass of the next row, nats, which sampling leaves out.

        A program scores it once for each symbol. With `prune="topk"` it is 0 where the text
        can go on, so that programs may leave it out; with `prune="unbiased"` rows sum to one
        only in expectation, and this factor is what makes weights unbiased. With "deferred"
        it is by how much the last symbol weighs more than its row had said: nearly 0 where the
        symbol was likely. -inf where nothing can follow the text; the next symbol then is EOS.
        """
        await self._next_row()
        self._weighed = True
        return self._log_mass

    async def row(self) -> Row:
        """Return log probabilities of the next symbol under the masks, float64[257], nats."""
        return (await self._next_row()).copy()

    # -- the text so far -----------------------------------------------------------------

    def __bytes__(self) -> bytes:
        return self.text

    def __len__(self) -> int:
        """Return the number of bytes read after the prompt."""
        return len(self.text)

    def __str__(self) -> str:
        return self.text.decode("utf-8", "replace")

    def __repr__(self) -> str:
        return f"ByteContext({self.text!r}{', ended' if self.ended else ''})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the context; the copy shares the model and the current row."""
        other = type(self)(self.llm, self.rng)
        other.__dict__.update(self.__dict__)  # nothing in it is ever changed in place
        return other

    # -- parts -------------------------------------------------------------------------

    async def _next_row(self) -> Row:
        if self.ended:
            raise ValueError(f"the text has ended: {self.text!r}")
        if self._row is None:
            served = await self.llm.batch_logw_next([self.text])
            row = served.weights[0].cpu().numpy()
            mass = self._log_mass = _logsumexp(row)
            if self.llm.params.prune == "deferred" and mass > -np.inf:
                (weight,) = await self.llm.batch_prefix([self.text])
                self._log_mass += float(weight) - self._promised
                self._promised = float(weight)
            self._served = row
            self._row = row - mass if mass > -np.inf else row
        return self._row

    async def _row_to_read(self) -> Row:
        row = await self._next_row()
        told = self._weighed or self._impossible
        if not told and (self.llm.params.unbiased or self._log_mass == -np.inf):
            why = 'rows of prune="unbiased" do not sum to one'
            if self._log_mass == -np.inf:
                why = f"nothing can follow {self.text!r}"
            raise RuntimeError(
                f"{why}: a program must do self.score(await context.log_mass()) before it reads "
                "a symbol, or its weights are wrong"
            )
        return row

    def _append(self, column: int) -> None:
        if self._served is not None:
            self._promised += float(self._served[column])
        if column == EOS_COLUMN:
            self.ended = True
        else:
            self.text += BYTES[column]
        self._row, self._weighed = None, False

    def _uniform(self) -> float:
        return float((np.random if self.rng is None else self.rng).random())


class NextByte(Distribution):  # type: ignore[misc]
    """The next symbol of a `ByteContext`, given its masks."""

    def __init__(self, context: ByteContext) -> None:
        self.context = context

    async def sample(self) -> tuple[Any, float]:
        """Draw a symbol and append it; return it and its log probability in nats.

        Raises:
            ValueError: the text has ended.
            RuntimeError: `log_mass` should have been scored and was not.
        """
        row = await self.context._row_to_read()
        dead = row.max() == -np.inf
        column = EOS_COLUMN
        if not dead:
            cumulative = np.exp(row).cumsum()
            u = self.context._uniform() * cumulative[-1]
            column = int(np.searchsorted(cumulative, u, side="right"))
        self.context._append(column)
        return _SYMBOLS[column], 0.0 if dead else float(row[column])

    async def log_prob(self, x: Symbol | int) -> float:
        """Append a symbol; return its log probability in nats.

        Raises:
            ValueError, TypeError: no symbol, or the text has ended.
            RuntimeError: `log_mass` should have been scored and was not.
        """
        column = _column(x)
        row = await self.context._row_to_read()
        self.context._append(column)
        self.context._impossible |= bool(row[column] == -np.inf)
        return float(row[column])

    async def argmax(self, n: int) -> Any:
        """Return the nth likeliest symbol, counted from 0; the context stays as it is."""
        row = await self.context._next_row()
        return _SYMBOLS[int(np.argsort(-row, kind="stable")[n])]


class Mask(Distribution):  # type: ignore[misc]
    """The event that the next symbol of a `ByteContext` is in a set."""

    def __init__(self, context: ByteContext, mask: npt.NDArray[np.bool_]) -> None:
        self.context = context
        self.mask = mask

    async def sample(self) -> tuple[bool, float]:
        """Draw True or False and restrict the context to it; return it and its log probability."""
        row = await self.context._next_row()
        inside = math.exp(min(_logsumexp(row[self.mask]), 0.0))
        value = self.context._uniform() < inside
        if row.max() == -np.inf:
            return value, 0.0
        return value, self._restrict(row, value)

    async def log_prob(self, v: bool) -> float:
        """Restrict the context to a value; return its log probability in nats.

        -inf leaves a context that nothing can follow: its next symbol is EOS.

        Raises:
            NullMask: `v` rules out every symbol, whatever the model says.
        """
        if not (self.mask == bool(v)).any():
            raise NullMask(f"no symbol has {v} for this mask")
        return self._restrict(await self.context._next_row(), bool(v))

    def _restrict(self, row: Row, value: bool) -> float:
        kept = np.where(self.mask == value, row, -np.inf)
        logp = _logsumexp(kept)
        self.context._row = kept - logp if logp > -np.inf else kept
        self.context._impossible |= logp == -np.inf
        return logp


def _logsumexp(row: Row) -> float:
    top = row.max(initial=-np.inf)
    return float(top + np.log(np.exp(row - top).sum())) if top > -np.inf else -math.inf


def _column(x: object) -> int:
    """Return the column of a symbol."""
    if isinstance(x, EndOfSequence):
        return EOS_COLUMN
    if isinstance(x, bytes) and len(x) == 1:
        return x[0]
    if isinstance(x, bytes):
        raise ValueError(f"a symbol is one byte or EOS, got {x!r}")
    if isinstance(x, bool) or not hasattr(x, "__index__"):
        raise TypeError(f"a symbol is a `bytes` of length one, an integer or EOS, got {x!r}")
    column: int = x.__index__()
    if not 0 <= column < EOS_COLUMN:
        raise ValueError(f"a byte is in 0..255, got {column}")
    return column


def _mask(parts: Iterable[Any]) -> npt.NDArray[np.bool_]:
    out = np.zeros(N_SYMBOLS, dtype=bool)
    for part in parts:
        single = isinstance(part, EndOfSequence) or hasattr(part, "__index__")
        if isinstance(part, str) or not (single or isinstance(part, Iterable)):
            raise TypeError(f"a mask is made of symbols or collections of them, got {part!r}")
        for x in [part] if single else part:
            out[_column(x)] = True
    return out
