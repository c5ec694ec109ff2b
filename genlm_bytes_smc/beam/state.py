"""The candidates of N byte beams as a struct of arrays, what lanes have in common, and symbols."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, Self

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.beam.rng import KeyArray
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.engine import not_pickled

N_BYTES = 256
EOS_COLUMN = N_BYTES  # of a [N, 257] block; as a symbol to `step`, the end of the text

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]
Array = npt.NDArray[Any]


class BeamState(NamedTuple):
    """Candidates of N lanes, C places a lane, as compiled steps take and return them.

    Candidate (n, c) stands for every token string that begins with the tokens of context
    `ctx`, and whose next token begins with the bytes that trie node `node` spells. Empty
    places have `logw = -inf` and `ctx = -1`.

    Attributes:
        packed: int64[4, N, C]: ctx, node, and the bits of logu and logw.
        key: uint64[N], state of the counter-based generator: a hash of the seed and of the
            bytes read, so equal bytes draw equal numbers.
    """

    packed: npt.NDArray[np.int64]
    key: npt.NDArray[np.uint64]

    @classmethod
    def of(
        cls, ctx: Array, node: Array, logu: Array, logw: Array, key: Array | None = None
    ) -> BeamState:
        """Return a state with copies of these arrays [N, C]; without keys they are 0."""
        packed = np.empty((4, *ctx.shape), dtype=np.int64)
        packed[0], packed[1] = ctx, node
        weights = packed.view(np.float64)
        weights[2], weights[3] = logu, logw
        return cls(packed, np.zeros(len(packed[0]), dtype=np.uint64) if key is None else key)

    @classmethod
    def single(cls, context: int, logw: float, key: KeyArray) -> BeamState:
        """Return one candidate a lane: `context`, at the root, of weight `logw`."""
        weight = np.full((len(key), 1), logw)
        return cls.of(np.full_like(weight, context), np.zeros_like(weight), weight, weight, key)

    @classmethod
    def cat(cls, states: Sequence[BeamState]) -> BeamState:
        """Return all lanes of several states."""
        if len(states) == 1:
            return states[0]
        width = max(s.packed.shape[2] for s in states)
        key = np.concatenate([s.key for s in states])
        none = np.full((len(key), width), -np.inf)
        out = cls.of(np.full(none.shape, -1), np.zeros(none.shape), none, none, key)
        at = 0
        for s in states:
            n, c = s.packed.shape[1:]
            out.packed[:, at : at + n, :c] = s.packed
            at += n
        return out

    def gather(self, lanes: IntArray) -> BeamState:
        """Return the lanes `lanes` int64[M], in that order, repeats allowed."""
        return BeamState(self.packed.take(lanes, axis=1), self.key[lanes])

    def put(self, lanes: IntArray, new: BeamState) -> BeamState:
        """Return the state with lanes `lanes` int64[M] replaced by those of `new`, keys kept."""
        index = np.arange(len(self.key))
        index[lanes] = len(self.key) + np.arange(len(lanes))
        return BeamState.cat([self, new]).gather(index)._replace(key=self.key)

    @property
    def ctx(self) -> npt.NDArray[np.int64]:
        """Return the id of each token context in the engine's `ContextTree`, int64[N, C]."""
        ctx: npt.NDArray[np.int64] = self.packed[0]
        return ctx

    @property
    def node(self) -> npt.NDArray[np.int64]:
        """Return the trie node of each token in flight, int64[N, C]."""
        node: npt.NDArray[np.int64] = self.packed[1]
        return node

    @property
    def nodes(self) -> npt.NDArray[np.int64]:
        """Return `node`, -1 in empty places."""
        return np.where(self.logw > -np.inf, self.node, -1)

    @property
    def logu(self) -> npt.NDArray[np.float64]:
        """Return the log weight of each context, float64[N, C], nats.

        Without random pruning it is log p(context).
        """
        logu: npt.NDArray[np.float64] = self.packed[2].view(np.float64)
        return logu

    @property
    def logw(self) -> npt.NDArray[np.float64]:
        """Return the log weight of each candidate, float64[N, C], nats.

        It is logu + log(mass of `node` in the context's row).
        """
        logw: npt.NDArray[np.float64] = self.packed[3].view(np.float64)
        return logw


class Extensions(NamedTuple):
    """Token-ending extensions of a state, one entry each, in lane order.

    Attributes:
        lane, cand: int64[E], which candidate is extended.
        token: int64[E], the token that ends there.
        logw: float64[E], weight of the extended candidate, nats.
    """

    lane: Array
    cand: Array
    token: Array
    logw: Array

    def take(self, keep: Array) -> Extensions:
        """Return the extensions that `keep` bool[E] marks."""
        return Extensions(*(a[keep] for a in self))


class Shared:
    """An object that a copy of what holds it holds, too; it cannot be pickled."""

    def __deepcopy__(self, memo: object) -> Self:
        """Return the object itself."""
        return self

    def __copy__(self) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise not_pickled()


class SharedLanes(Shared):
    """N beams, a value.

    Attributes:
        log_z: float64[N], see `ByteLanes`.
        ended: bool[N].
        model, in_prompt: shared by all lanes.
    """

    model: Any
    in_prompt: Any
    log_z: npt.NDArray[np.float64]
    ended: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        """Return the number of lanes, N."""
        return len(self.log_z)

    async def as_prompt(self, *, literal: bool = False) -> Self:
        """Return lanes that read a prompt: end-of-sequence tokens are ordinary tokens.

        Args:
            literal: leave special tokens out instead, all of them.
        """
        return await self._in_mode(in_prompt=True, literal=literal)

    async def as_text(self) -> Self:
        """Return lanes whose prompt is over: end-of-sequence tokens end the text from here on.

        A token in flight can no longer become an end-of-sequence token, so candidates lose
        that share of their weight; one that the prompt spelled to its end is committed.
        """
        return await self._in_mode(in_prompt=False, literal=False)

    @abstractmethod
    async def _in_mode(self, *, in_prompt: bool, literal: bool) -> Self:
        """Return the same lanes in a mode."""

    def check_like(self, lanes: Sequence[Any]) -> None:
        """Raise unless all of these lanes can stand beside these.

        Raises:
            ValueError: lanes of another model, or in another mode.
        """
        if any(x.model is not self.model or x.in_prompt != self.in_prompt for x in lanes):
            raise ValueError("only lanes of one model, in one mode, can be put side by side")

    @property
    def alive(self) -> npt.NDArray[np.bool_]:
        """Lanes that can read on, bool[N]."""
        return (self.log_z > -np.inf) & ~self.ended


# -- symbols, checked where a user gives them ----------------------------------------------


def check_byte(byte: object) -> int:
    """`byte` as an int in 0..255.

    Raises:
        TypeError: not an integer. ValueError: out of range.
    """
    if isinstance(byte, bool) or not hasattr(byte, "__index__"):
        raise TypeError(f"a byte must be an integer in 0..255, got {byte!r}")
    value: int = byte.__index__()
    if not 0 <= value < N_BYTES:
        raise ValueError(f"a byte must be an integer in 0..255, got {value}")
    return value


def check_symbols(symbols: Sequence[int] | IntArray, n: int) -> IntArray:
    """One symbol for each of `n` lanes, int64[n]: a byte, 256 for the end, -1 for nothing.

    Raises:
        ValueError: a symbol out of range, or not one a lane.
    """
    out = np.asarray(symbols)
    if out.shape != (n,) or out.dtype.kind not in "iu":
        raise ValueError(
            f"step needs one integer symbol for each of {n} lanes, got shape {out.shape} of "
            f"dtype {out.dtype}"
        )
    if n and (out.min() < -1 or out.max() > EOS_COLUMN):
        raise ValueError(f"symbols run from -1 to {EOS_COLUMN}, got {out.min()} to {out.max()}")
    return out.astype(np.int64)
