"""The verbs of the beam, over one array kind: `Kernels`, and its compiled CPU form.

A kernel set holds the trie's arrays and looks rows up in a `RowStore`; states go in and come
out as `BeamState`s of its own array kind. Host decisions (which contexts to make, which rows
to fetch) are taken elsewhere, from the small host arrays that `extensions` returns.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.beam import kernels_numba as nk
from genlm_bytes_smc.beam import masses_numba as nm
from genlm_bytes_smc.beam.rng import PRUNE, THIN, uniforms
from genlm_bytes_smc.beam.state import Array, BeamState, Extensions
from genlm_bytes_smc.beam.steps import WholeSteps
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.rows import RowStore

N_BYTES = 256

FloatArray = npt.NDArray[np.float64]


class Kernels(Protocol):
    """What a beam needs done to its arrays. `cut` is a sorted int64 array of trie positions
    that are no text (end-of-sequence tokens); every context of a state has its row in the
    store when a kernel is called.

    Attributes:
        steps: whole steps of top-K beams in one call each, where rows are on the host.
    """

    steps: WholeSteps | None

    def initial(self, context: int, keys: npt.NDArray[np.uint64]) -> BeamState:
        """One candidate a lane: `context`, at the root, weight 0."""
        ...

    def contexts(self, state: BeamState) -> IntArray:
        """Context ids on the host, any shape, -1 for empty places."""
        ...

    def nodes(self, state: BeamState) -> IntArray:
        """Trie nodes on the host, int64[N, C], -1 for empty places."""
        ...

    def roots(self, state: BeamState) -> BeamState:
        """Return the first candidate's context of each lane, at the root, weight 0: [N, 1]."""
        ...

    def reserve(
        self, row: torch.Tensor, proxy: torch.Tensor, rescue: npt.NDArray[np.bool_], share: float
    ) -> torch.Tensor:
        """Rows [N, 257] in which impossible bytes that `rescue` bool[N, 256] marks share
        `share` of the mass in proportion to exp(proxy) [N, 257]."""
        ...

    def log_z(self, state: BeamState) -> FloatArray:
        """Log of each lane's total weight, float64[N], on the host."""
        ...

    def extensions(self, state: BeamState, cut: IntArray) -> Extensions:
        """Every token-ending extension, none left out."""
        ...

    def extend(self, state: BeamState, ext: Extensions, contexts: IntArray) -> BeamState:
        """Append extensions, whose new contexts are given, as further candidates."""
        ...

    def advance(self, state: BeamState, byte: IntArray, cut: IntArray) -> BeamState:
        """Read one byte int64[N] a lane; -1 empties the lane. Keys stay as they are."""
        ...

    def next_block(self, state: BeamState, cut: IntArray) -> torch.Tensor:
        """Log mass per next byte, and of ending last: float64[N, 257], unnormalised."""
        ...

    def normalise(self, block: torch.Tensor, log_z: FloatArray | None) -> torch.Tensor:
        """Return a block less the log of each row's sum, or less `log_z` float64[N] if given."""
        ...

    def reweigh(self, state: BeamState, cut: IntArray) -> BeamState:
        """Return the same candidates with their weights under another `cut`."""
        ...

    def select(
        self, state: BeamState, k: int | None, log_threshold: float
    ) -> tuple[BeamState, FloatArray]:
        """Top-K and threshold pruning, which never drops a lane's best candidate, best first;
        and the log mass dropped, float64[N]."""
        ...

    def resample(self, state: BeamState, k: int | None) -> BeamState:
        """Unbiased pruning to K candidates, best first."""
        ...

    def open_read(
        self,
        state: BeamState,
        byte: IntArray,
        cut: IntArray,
        log_threshold: float,
        *,
        prune: tuple[int | None, float] | None,
    ) -> tuple[BeamState, FloatArray, Extensions]:
        """`select` with the arguments `prune`, then the extensions that `keep_above` admits
        beside candidates that can read `byte`: the pruned state, the log mass pruned
        float64[N], the extensions."""
        ...

    def close_read(
        self, state: BeamState, ext: Extensions, contexts: IntArray, byte: IntArray, cut: IntArray
    ) -> tuple[BeamState, FloatArray]:
        """`extend`, `advance`, and best first; with the new log_z, float64[N]."""
        ...

    def gather(self, state: BeamState, lanes: IntArray) -> BeamState:
        """Return the lanes `lanes` int64[M], in that order, repeats allowed."""
        ...

    def single(self, context: int, logw: float, key: Array) -> BeamState:
        """One lane with one candidate, at the root, of weight `logw`."""
        ...

    def cat(self, states: list[BeamState]) -> BeamState:
        """All lanes of several states."""
        ...


def keep_above(
    ext: Extensions, base: FloatArray, log_threshold: float, *, within: bool = False
) -> Extensions:
    """Extensions above the threshold of base + all extensions of their lane.

    A threshold never drops the heaviest part of a lane: where no extension is above it, the
    heaviest one is kept if it weighs more than what is left without extensions.

    Args:
        ext: all extensions.
        base: float64[N] log weight that counts beside the extensions, nats.
        log_threshold: nats.
        within: whether `base` holds the weight of the extensions, too.
    """
    keep, dropped = nk.keep_extensions(ext.lane, ext.logw, base, log_threshold, within)
    ext = ext if keep.all() else ext.take(keep)
    return ext._replace(dropped=np.logaddexp(ext.dropped, dropped))


def thin(
    ext: Extensions, log_z: FloatArray, log_threshold: float, keys: npt.NDArray[np.uint64]
) -> Extensions:
    """Extensions thinned at random below the threshold's share of `log_z`, unbiased."""
    if log_threshold == -np.inf or len(ext.lane) == 0:
        return ext
    u = uniforms(keys, THIN)
    keep, logw = nk.thin_extensions(ext.lane, ext.logw, log_z, log_threshold, u)
    return ext._replace(logw=logw).take(keep)


GUESS = 0.03  # probability of a byte that an extension is taken to give, at least


def thin_after(
    kernels: Kernels,
    state: BeamState,
    ext: Extensions,
    bytes_: IntArray,
    cut: IntArray,
    log_threshold: float,
    sure: npt.NDArray[np.bool_] | None = None,
) -> Extensions:
    """Thin extensions at random by their estimated share after a byte: unbiased for each byte.

    An extension is taken to give the byte the probability that the tokens in flight gave it, and
    at least `GUESS`. After a likely byte it is thinned as by `thin`. A byte that nothing in
    flight led to expect leaves the extensions most of the weight, and the heavy ones are kept.

    Args:
        kernels: the beam's arithmetic.
        state: candidates before the byte.
        ext: their extensions.
        bytes_: int64[N], what each lane reads.
        cut: trie positions that are no text.
        log_threshold: share from which on an extension is kept for sure, nats.
        sure: bool[E], extensions that are kept whatever their share; None: no others. They must
            not depend on what was drawn.
    """
    if log_threshold == -np.inf or len(ext.lane) == 0:
        return ext
    ends = np.full(len(bytes_), -np.inf)
    np.logaddexp.at(ends, ext.lane, ext.logw)
    flight = kernels.log_z(kernels.advance(state, bytes_, cut))
    with np.errstate(divide="ignore", invalid="ignore"):
        before = np.log(np.maximum(np.exp(kernels.log_z(state)) - np.exp(ends), 0.0))
        seen = np.where(flight > -np.inf, flight - before, -np.inf)
    mass = np.logaddexp(flight - np.maximum(seen, np.log(GUESS)), ends)
    if sure is None or not sure.any():
        return thin(ext, mass, log_threshold, state.key)
    rest, kept = thin(ext.take(~sure), mass, log_threshold, state.key), ext.take(sure)
    lane, cand, token, logw = (
        np.concatenate(pair) for pair in zip(kept[:4], rest[:4], strict=True)
    )
    order = np.lexsort((cand, lane))
    return Extensions(lane[order], cand[order], token[order], logw[order], rest.dropped)


class ComposedReads:
    """`open_read` and `close_read` from the other verbs, for kernel sets without fused ones."""

    def open_read(
        self: Kernels,
        state: BeamState,
        byte: IntArray,
        cut: IntArray,
        log_threshold: float,
        *,
        prune: tuple[int | None, float] | None,
    ) -> tuple[BeamState, FloatArray, Extensions]:
        """See `Kernels`."""
        state, pruned = self.select(state, *(prune or (None, -np.inf)))
        able = self.log_z(self.advance(state, byte, cut))
        return state, pruned, keep_above(self.extensions(state, cut), able, log_threshold)

    def close_read(
        self: Kernels,
        state: BeamState,
        ext: Extensions,
        contexts: IntArray,
        byte: IntArray,
        cut: IntArray,
    ) -> tuple[BeamState, FloatArray]:
        """See `Kernels`."""
        state = self.advance(self.extend(state, ext, contexts), byte, cut)
        state, _ = self.select(state, None, -np.inf)
        return state, self.log_z(state)


class NumbaKernels:
    """`Kernels` on numpy arrays; rows must live on the CPU."""

    def __init__(self, store: RowStore) -> None:
        self.store = store
        trie = store.trie
        self._trie = nm.TrieArrays(trie.lo, trie.hi, trie.ends, trie.first_child, trie.byte)
        self.steps: WholeSteps | None = WholeSteps(store, self._trie)

    def initial(self, context: int, keys: npt.NDArray[np.uint64]) -> BeamState:
        """See `Kernels`."""
        shape = (len(keys), 1)
        return BeamState(
            ctx=np.full(shape, context, dtype=np.int64),
            node=np.zeros(shape, dtype=np.int64),
            logu=np.zeros(shape),
            logw=np.zeros(shape),
            key=keys,
        )

    def contexts(self, state: BeamState) -> IntArray:
        """See `Kernels`."""
        ctx: IntArray = state.ctx
        return ctx

    def nodes(self, state: BeamState) -> IntArray:
        """See `Kernels`."""
        return np.where(state.logw > -np.inf, state.node, -1)

    def roots(self, state: BeamState) -> BeamState:
        """See `Kernels`."""
        logw = np.where(state.logw[:, :1] > -np.inf, 0.0, -np.inf)
        return BeamState(state.ctx[:, :1], np.zeros_like(state.node[:, :1]), logw, logw, state.key)

    def reserve(
        self, row: torch.Tensor, proxy: torch.Tensor, rescue: npt.NDArray[np.bool_], share: float
    ) -> torch.Tensor:
        """See `Kernels`."""
        return torch.from_numpy(nk.reserve(row.numpy(), proxy.numpy(), rescue, share))

    def log_z(self, state: BeamState) -> FloatArray:
        """See `Kernels`."""
        out: FloatArray = nk.logsumexp_rows(state.logw)
        return out

    def extensions(self, state: BeamState, cut: IntArray) -> Extensions:
        """See `Kernels`."""
        ctx, node, logu, logw, key = state
        found = nk.extensions(self._trie, self.store.host, ctx, node, logu, logw, cut)
        return Extensions._make((*found, np.full(len(key), -np.inf)))

    def extend(self, state: BeamState, ext: Extensions, contexts: IntArray) -> BeamState:
        """See `Kernels`."""
        if len(ext.lane) == 0:
            return state
        ctx, node, logu, logw, key = state
        grown = nk.append_extensions(ctx, node, logu, logw, ext.lane, contexts, ext.logw)
        return BeamState._make((*grown, key))

    def advance(self, state: BeamState, byte: IntArray, cut: IntArray) -> BeamState:
        """See `Kernels`."""
        ctx, node, logu, logw, key = state
        moved, weight = nk.advance(self._trie, self.store.host, ctx, node, logu, logw, byte, cut)
        return BeamState(ctx, moved, logu, weight, key)

    def next_block(self, state: BeamState, cut: IntArray) -> torch.Tensor:
        """See `Kernels`."""
        ctx, node, logu, logw, _ = state
        block = nm.next_block(self._trie, self.store.host, ctx, node, logu, logw, cut)
        return torch.from_numpy(block)

    def normalise(self, block: torch.Tensor, log_z: FloatArray | None) -> torch.Tensor:
        """See `Kernels`."""
        values = block.numpy()
        total = nk.logsumexp_rows(values) if log_z is None else log_z
        return torch.from_numpy(nk.normalise(values, total))

    def reweigh(self, state: BeamState, cut: IntArray) -> BeamState:
        """See `Kernels`."""
        ctx, node, logu, logw, key = state
        weight = nk.node_logw(self._trie, self.store.host, ctx, node, logu, logw, cut)
        return BeamState(ctx, node, logu, weight, key)

    def select(
        self, state: BeamState, k: int | None, log_threshold: float
    ) -> tuple[BeamState, FloatArray]:
        """See `Kernels`."""
        ctx, node, logu, logw, key = state
        pick, weight, dropped = nk.select_topk(logw, -1 if k is None else k, log_threshold)
        pruned = BeamState._make((*nk.take(ctx, node, logu, logw, pick, weight), key))
        return pruned, dropped

    def resample(self, state: BeamState, k: int | None) -> BeamState:
        """See `Kernels`."""
        ctx, node, logu, logw, key = state
        u = uniforms(key, PRUNE)
        pick, weight = nk.select_unbiased(logw, -1 if k is None else k, u)
        return BeamState._make((*nk.take(ctx, node, logu, logw, pick, weight), key))

    def open_read(
        self,
        state: BeamState,
        byte: IntArray,
        cut: IntArray,
        log_threshold: float,
        *,
        prune: tuple[int | None, float] | None,
    ) -> tuple[BeamState, FloatArray, Extensions]:
        """See `Kernels`; one compiled call."""
        ctx, node, logu, logw, key = state
        k, log_prune = prune or (None, -np.inf)
        out = nk.open_read(
            self._trie, self.store.host, ctx, node, logu, logw, byte, cut,
            -1 if k is None else k, log_prune, log_threshold,
        )  # fmt: skip
        return BeamState(out[0], out[1], out[2], out[3], key), out[4], Extensions(*out[5:])

    def close_read(
        self, state: BeamState, ext: Extensions, contexts: IntArray, byte: IntArray, cut: IntArray
    ) -> tuple[BeamState, FloatArray]:
        """See `Kernels`; one compiled call."""
        ctx, node, logu, logw, key = state
        out = nk.close_read(
            self._trie, self.store.host, ctx, node, logu, logw, ext.lane, contexts, ext.logw,
            byte, cut,
        )  # fmt: skip
        return BeamState(out[0], out[1], out[2], out[3], key), out[4]

    def gather(self, state: BeamState, lanes: IntArray) -> BeamState:
        """See `Kernels`."""
        return BeamState(*(a[lanes] for a in state))

    def single(self, context: int, logw: float, key: Array) -> BeamState:
        """See `Kernels`."""
        state = self.initial(context, key)
        return state._replace(logu=state.logu + logw, logw=state.logw + logw)

    def cat(self, states: list[BeamState]) -> BeamState:
        """See `Kernels`."""
        if len(states) == 1:
            return states[0]
        width = max(s.logw.shape[1] for s in states)
        empty = BeamState(ctx=-1, node=0, logu=-np.inf, logw=-np.inf, key=None)

        def stack(name: str) -> Array:
            parts = [getattr(s, name) for s in states]
            if name == "key":
                return np.concatenate(parts)
            fill = getattr(empty, name)
            pad = [((0, 0), (0, width - p.shape[1])) for p in parts]
            return np.concatenate(
                [np.pad(p, w, constant_values=fill) for p, w in zip(parts, pad, strict=True)]
            )

        return BeamState(*(stack(name) for name in BeamState._fields))
