"""The candidates of N byte beams as a struct of arrays."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = Any  # numpy array (CPU kernels) or torch tensor (any device); one kind per state


class BeamState(NamedTuple):
    """Candidates of N lanes, C places a lane.

    Candidate (n, c) stands for every token string that begins with the tokens of context
    `ctx`, and whose next token begins with the bytes that trie node `node` spells. Empty
    places have `logw = -inf` and `ctx = -1`.

    Attributes:
        ctx: int64[N, C], id of the token context in the engine's `ContextTree`.
        node: int64[N, C], trie node of the token in flight.
        logu: float64[N, C], log weight of the context, nats. Without random pruning it is
            log p(context).
        logw: float64[N, C], log weight of the candidate, nats:
            logu + log(mass of `node` in the context's row).
        key: uint64[N], state of the counter-based generator: a hash of the seed and of the
            bytes read, so equal bytes draw equal numbers.
    """

    ctx: Array
    node: Array
    logu: Array
    logw: Array
    key: Array


class HostState(NamedTuple):
    """A `BeamState` on the host, in one array, as compiled steps take and return it.

    Attributes:
        packed: int64[4, N, C]: ctx, node, and the bits of logu and logw.
        key: uint64[N].
    """

    packed: npt.NDArray[np.int64]
    key: npt.NDArray[np.uint64]

    @classmethod
    def of(
        cls, ctx: Array, node: Array, logu: Array, logw: Array, key: Array | None = None
    ) -> HostState:
        """Return a copy of the arrays of a `BeamState` on the host; without keys they are 0."""
        packed = np.empty((4, *ctx.shape), dtype=np.int64)
        packed[0], packed[1] = ctx, node
        weights = packed.view(np.float64)
        weights[2], weights[3] = logu, logw
        return cls(packed, np.zeros(len(packed[0]), dtype=np.uint64) if key is None else key)

    @property
    def ctx(self) -> npt.NDArray[np.int64]:
        """See `BeamState`."""
        ctx: npt.NDArray[np.int64] = self.packed[0]
        return ctx

    @property
    def node(self) -> npt.NDArray[np.int64]:
        """See `BeamState`."""
        node: npt.NDArray[np.int64] = self.packed[1]
        return node

    @property
    def logu(self) -> npt.NDArray[np.float64]:
        """See `BeamState`."""
        logu: npt.NDArray[np.float64] = self.packed[2].view(np.float64)
        return logu

    @property
    def logw(self) -> npt.NDArray[np.float64]:
        """See `BeamState`."""
        logw: npt.NDArray[np.float64] = self.packed[3].view(np.float64)
        return logw


State = Any  # a HostState, or a BeamState of tensors


class Extensions(NamedTuple):
    """Token-ending extensions of a state, one entry each, in lane order.

    Attributes:
        lane, cand: int64[E], which candidate is extended.
        token: int64[E], the token that ends there.
        logw: float64[E], weight of the extended candidate, nats.
        dropped: float64[N], log mass per lane of the extensions left out, nats.
    """

    lane: Array
    cand: Array
    token: Array
    logw: Array
    dropped: Array

    def take(self, keep: Array) -> Extensions:
        """Return the extensions that `keep` bool[E] marks."""
        lane, cand, token, logw = (a[keep] for a in self[:4])
        return Extensions(lane, cand, token, logw, self.dropped)
