"""The candidates of N byte beams, their keys, parts of steps on them, and what lanes share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.beam import candidates_numba as cn
from genlm_bytes_smc.beam import masses_numba as nm
from genlm_bytes_smc.beam import pruning_numba as pn
from genlm_bytes_smc.beam import steps_numba as sn
from genlm_bytes_smc.beam.pruning_numba import GOLDEN, Array, Candidates, Extensions, KeyArray, mix
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.engine import Shared
from genlm_bytes_smc.lm.rows import RowStore

N_BYTES = 256
NOTHING: IntArray = np.empty(0, dtype=np.int64)
EOS_COLUMN = N_BYTES  # of a [N, 257] block; as a symbol to `step`, the end of the text

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]


def start_keys(seeds: KeyArray) -> KeyArray:
    """Keys uint64[N] of lanes that have read nothing, from their seeds."""
    return mix(seeds + GOLDEN)


def lane_keys(seed: int, n: int, lane_seeds: Sequence[int] | None) -> KeyArray:
    """Return the keys uint64[n] of lanes that have read nothing.

    Args:
        seed: of all lanes.
        n: their number.
        lane_seeds: one further seed a lane, for independent beams; or None.

    Raises:
        ValueError: not n `lane_seeds`.
    """
    seeds = np.full(n, seed, dtype=np.uint64)
    if lane_seeds is not None:
        if len(lane_seeds) != n:
            raise ValueError(f"lane_seeds must hold {n} numbers, got {len(lane_seeds)}")
        seeds = start_keys(seeds) ^ np.asarray(lane_seeds, dtype=np.uint64)
    return start_keys(seeds)


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
    def ctx(self) -> IntArray:
        """Return the id of each token context in the engine's `ContextTree`, int64[N, C]."""
        ctx: IntArray = self.packed[0]
        return ctx

    @property
    def node(self) -> IntArray:
        """Return the trie node of each token in flight, int64[N, C]."""
        node: IntArray = self.packed[1]
        return node

    @property
    def nodes(self) -> IntArray:
        """Return `node`, -1 in empty places."""
        return np.where(self.logw > -np.inf, self.node, -1)

    @property
    def logu(self) -> FloatArray:
        """Return the log weight of each context, float64[N, C], nats.

        Without random pruning it is log p(context).
        """
        logu: FloatArray = self.packed[2].view(np.float64)
        return logu

    @property
    def logw(self) -> FloatArray:
        """Return the log weight of each candidate, float64[N, C], nats.

        It is logu + log(mass of `node` in the context's row).
        """
        logw: FloatArray = self.packed[3].view(np.float64)
        return logw

    @property
    def log_z(self) -> FloatArray:
        """Return the log of each lane's total weight, float64[N], nats."""
        log_z: FloatArray = pn.logsumexp_rows(self.logw)
        return log_z

    @property
    def candidates(self) -> Candidates:
        """Return the four arrays, as parts of steps take them."""
        return Candidates(self.ctx, self.node, self.logu, self.logw)

    def extend(self, ext: Extensions) -> BeamState:
        """Append extensions, with the contexts after them as `token`, as further candidates."""
        if len(ext.lane) == 0:
            return self
        ctx, node, logu, logw = cn.append_extensions(self.candidates, ext)
        return BeamState.of(ctx, node, logu, logw, self.key)

    def ranked(self) -> BeamState:
        """Return the same candidates, best first."""
        dropped = np.full(len(self.key), -np.inf)
        packed, _ = sn.prune(self.packed, self.key, dropped, -1, -np.inf, False)
        return BeamState(packed, self.key)


class NumbaKernels:
    """Parts of steps over the rows of one `RowStore`, on the host wherever the model runs.

    The work of beams is little and irregular, and on a GPU, whose kernels take longer to start than
    to run here, it was measured to take several times as long. Every candidate must have its row.
    `cut` is a sorted int64 array of trie positions that are no text (end-of-sequence tokens).
    """

    def __init__(self, store: RowStore) -> None:
        self.store = store
        trie = store.trie
        self._trie = nm.TrieArrays(trie.lo, trie.hi, trie.ends, trie.first_child, trie.byte)
        self._handles = nm.Handles(self._trie)

    def arrays(self) -> tuple[IntArray, Array]:
        """Return what every compiled step takes first: `Handles` and the rows."""
        rows = self.store.host
        return self._handles.of(rows, self.store.engine.tree.arrays), rows.probs

    def next_rows(self, state: BeamState, cut: IntArray) -> FloatArray:
        """Return log probabilities of the next symbol, float64[N, 257], without extensions."""
        block = nm.next_block(self._trie, self.store.host, *state.candidates, cut)
        total = pn.logsumexp_rows(block)[:, None]
        with np.errstate(invalid="ignore"):
            return np.where(total > -np.inf, block - total, -np.inf)

    def extensions(self, state: BeamState, cut: IntArray) -> Extensions:
        """Return every token-ending extension, none left out."""
        ext: Extensions = cn.extensions(self._trie, self.store.host, state.candidates, cut)
        return ext

    def advance(self, state: BeamState, byte: IntArray, cut: IntArray) -> BeamState:
        """Read one byte int64[N] a lane; -1 empties the lane. Keys stay as they are."""
        moved = cn.advance(self._trie, self.store.host, state.candidates, byte, cut)
        return BeamState.of(state.ctx, moved.node, state.logu, moved.logw, state.key)

    def reweigh(self, state: BeamState, cut: IntArray) -> BeamState:
        """Return the same candidates with their weights under another `cut`."""
        weight = cn.node_logw(self._trie, self.store.host, state.candidates, cut)
        return BeamState.of(state.ctx, state.node, state.logu, weight, state.key)


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


# -- symbols: of texts, and checked where a user gives them --------------------------------


def padded(texts: Sequence[bytes], behind: int, width: int | None = None) -> IntArray:
    """Return texts as symbols int64[N, width], with `behind` after the end of a shorter one.

    The width is that of the longest text, if none is given.
    """
    longest = max(map(len, texts), default=0)
    out = np.full((len(texts), longest if width is None else width), behind, dtype=np.int64)
    for line, text in zip(out, texts, strict=True):
        line[: len(text)] = np.frombuffer(text, dtype=np.uint8)
    return out


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
