"""N byte beams that defer what they do not extend, and judge it after each byte.

A beam with a threshold drops a token-ending context before the next byte is known. If that byte
is a surprise, the mass that it needs is gone. `DeferredLanes` keeps the weight of such a context.
After each byte it estimates which share of the remaining mass the context may hold, and fetches
its row of the model if the share is large enough. Contexts of one position spell the same bytes
and predict nearly the same, so those without a row *ride* on the rows of their position: their
weight is added, not dropped.

Rows are proposals here and `log_z` is the weight: after a surprising byte, `log_z` may rise above
what the row had promised for that byte, because rows were fetched after it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.beam.deferred_nodes import Judge, Nodes
from genlm_bytes_smc.beam.deferred_numba import CTX, FLIGHT, WEIGHT
from genlm_bytes_smc.beam.deferred_reading_numba import forecast
from genlm_bytes_smc.beam.model import ByteModel
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.beam.state import (
    EOS_COLUMN,
    BeamState,
    FloatArray,
    SharedLanes,
    check_byte,
    check_symbols,
)
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.devices import send

RESERVE = 1e-5  # least share of a row that all symbols have together, for what has no row
FEW = 0.1  # share of a row below which the bytes that are admitted are few
LEAST_ADMITTED = 1e-4  # least share of the admitted bytes that thresholds are taken from

_HOST = torch.device("cpu")
_WEIGHTS = ("log_scale", "log_z", "forgotten", "pending")  # as `deferred_reading_numba.SCALE`
_PER_LANE = (*_WEIGHTS, "ended")


@dataclass(frozen=True, eq=False)
class DeferredLanes(SharedLanes):
    """N byte beams with `BeamParams(prune="deferred")` over one `ByteModel`; a value.

    Attributes:
        model, params: shared by all lanes.
        nodes: the contexts of each lane.
        log_scale: float64[N], log of what the weights of a lane are in units of, nats.
        log_z, ended: see `ByteLanes`.
        forgotten: float64[N], log of the weight of contexts that were forgotten, nats.
        pending: float64[N], log of the weight of contexts that no row stands for, nats.
        in_prompt, literal: see `Rules`.
    """

    model: ByteModel
    params: BeamParams
    nodes: Nodes
    log_scale: FloatArray
    log_z: FloatArray
    ended: npt.NDArray[np.bool_]
    forgotten: FloatArray
    pending: FloatArray
    in_prompt: bool = False
    literal: bool = False
    _memo: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model.engine.tree.track(self)

    @classmethod
    async def start(
        cls,
        model: ByteModel,
        params: BeamParams,
        n: int = 1,
        *,
        context: Sequence[int] | None = None,
        lane_seeds: Sequence[int] | None = None,
    ) -> DeferredLanes:
        """Return N lanes that have read nothing; arguments as for `ByteLanes.start`."""
        tree = model.engine.tree
        with tree.one_thread:
            node = tree.insert(model.engine.start if context is None else context)
            zero = np.zeros(n)
            model.engine.check(np.array([node], dtype=np.int64))
            return cls(
                model, params, Nodes.first(n, node), zero, zero, np.zeros(n, dtype=bool),
                np.full(n, -np.inf), np.full(n, -np.inf),
            )  # fmt: skip

    @property
    def heals(self) -> IntArray:
        """Return how often each lane was healed, int64[N]: never; no spelled text dies."""
        return np.zeros(len(self), dtype=np.int64)

    @property
    def log_dropped(self) -> FloatArray:
        """Log of a bound on the mass that no row stands for, float64[N], nats.

        It counts the whole weight of such contexts, whatever the bytes read since: a bound that
        is far above what they hold after bytes that they hardly give.
        """
        return np.logaddexp(self.forgotten, self.pending)

    @property
    def nbytes(self) -> int:
        """Memory of the arrays that belong to these lanes, in bytes."""
        nodes = self.nodes
        arrays = (nodes.ints, nodes.floats, nodes.text, self.log_scale, self.log_z, self.forgotten)
        return sum(int(a.nbytes) for a in arrays)

    @cached_property
    def judge(self) -> Judge:
        """Return what judges the contexts."""
        cut = self.model.not_text(self.params, in_prompt=self.in_prompt, literal=self.literal)
        return Judge(self.model, self.params, cut)

    def context_ids(self) -> IntArray:
        """Return the contexts that must stay valid while this object lives."""
        nodes: Nodes = self._memo.get("looked", self.nodes)
        return nodes.contexts()

    def with_params(self, params: BeamParams) -> DeferredLanes:
        """Return the same lanes, pruned by other parameters from here on."""
        return dataclasses.replace(self, params=params, _memo={})

    def gather(self, lanes: Sequence[int] | IntArray) -> DeferredLanes:
        """See `ByteLanes`."""
        index = np.asarray(lanes, dtype=np.int64)
        memo: dict[str, Any] = {}
        if "row" in self._memo:
            memo["row"] = self._memo["row"][send(index, _HOST)]
            memo["looked"] = self._memo["looked"].take(index)
        each: dict[str, Any] = {name: getattr(self, name)[index] for name in _PER_LANE}
        return dataclasses.replace(self, nodes=self.nodes.take(index), **each, _memo=memo)

    @classmethod
    def cat(cls, lanes: Sequence[DeferredLanes]) -> DeferredLanes:
        """See `ByteLanes`."""
        lanes[0].check_like(lanes)
        each: dict[str, Any] = {
            n: np.concatenate([getattr(x, n) for x in lanes]) for n in _PER_LANE
        }
        nodes = Nodes.cat([x.nodes for x in lanes])
        return dataclasses.replace(lanes[0], nodes=nodes, **each, _memo={})

    # -- one byte step -----------------------------------------------------------------

    async def logp_next(self) -> torch.Tensor:
        """Return log probabilities of the next byte, and of ending last: float64[N, 257].

        Contexts that end with the text and hold a share above `prune_threshold` have their own
        rows; others ride on those, or on the row before their last token. Each row sums to one;
        rows of lanes that are dead or have ended are -inf. They are on the engine's device.
        """
        return send(await self.rows(), self.model.device)

    async def rows_within(self, admitted: FloatArray) -> torch.Tensor:
        """Return `rows` for draws among some bytes only, as a constraint admits them.

        Contexts get their own rows from a share of the admitted mass on, not of all: those that
        hold little in all may hold most of what is admitted.

        Args:
            admitted: float64[N], share of each lane's row that the admitted bytes have.
        """
        rows = (await self.rows()).clone()
        few = np.flatnonzero((admitted < FEW) & self.alive)
        if len(few):
            least = self.params.prune_threshold * np.maximum(admitted[few], LEAST_ADMITTED)
            rows[torch.from_numpy(few)] = (await self._judged_at_end(few, least))[1]
        return rows

    async def rows(self) -> torch.Tensor:
        """Return `logp_next` on the host, where it is computed."""
        if "row" not in self._memo:
            every, least = np.arange(len(self)), self.params.prune_threshold
            self._memo["looked"], self._memo["row"] = await self._judged_at_end(every, least)
        row: torch.Tensor = self._memo["row"]
        return row

    async def _judged_at_end(
        self, lanes: IntArray, least: float | FloatArray
    ) -> tuple[Nodes, torch.Tensor]:
        """Return nodes of some lanes with the rows that proposals need from a share on, and those.

        See `forecast` for the proposals.
        """
        judge = self.judge
        with self.model.engine.tree.one_thread:
            nodes = self.nodes.take(lanes)
            await judge.ensure(nodes)
            masses, rest = await judge.judge(nodes, least, least, at_end=True)
            end = len(judge.cut) / len(self.model.trie.order)
            row = forecast(
                *judge.kernels.arrays(), judge.cut, nodes.ints, nodes.floats, nodes.count,
                nodes.length, self.alive[lanes], masses, rest[:, 1],
                self.log_dropped[lanes] > -np.inf, RESERVE,
                np.append(self.model.first_bytes * (1.0 - end), end),
            )  # fmt: skip
        return nodes, torch.from_numpy(row)

    async def step(self, symbols: Sequence[int] | IntArray) -> DeferredLanes:
        """Read one symbol a lane; arguments and errors as for `ByteLanes.step`."""
        symbols = check_symbols(symbols, len(self))
        ends = symbols == EOS_COLUMN
        gone = np.flatnonzero(ends & self.alive)
        ending = await self._whole(gone)
        reads = np.flatnonzero((symbols >= 0) & ~ends & self.alive)
        # Not from what `logp_next` fetched: weights must not depend on who asked for rows.
        nodes, z = self.nodes.take(reads), self.weights(reads)
        with self.model.engine.tree.one_thread:
            await self.judge.step(nodes, symbols[reads], z)
        after = self.after(reads, nodes, z)
        after.log_z[gone] = ending
        after.log_z[(symbols >= 0) & ~self.alive] = -np.inf
        after.ended[gone] = ending > -np.inf
        return after

    def weights(self, lanes: IntArray) -> FloatArray:
        """Return the log weights of some lanes, see `deferred_reading_numba.SCALE`."""
        return np.stack([getattr(self, name)[lanes] for name in _WEIGHTS], axis=1)

    def after(self, lanes: IntArray, nodes: Nodes, weights: FloatArray) -> DeferredLanes:
        """Return all lanes, some of them with other nodes and log weights."""
        each: dict[str, Any] = {name: getattr(self, name).copy() for name in _PER_LANE}
        for i, name in enumerate(_WEIGHTS):
            each[name][lanes] = weights[:, i]
        return dataclasses.replace(self, nodes=self.nodes.put(lanes, nodes), **each, _memo={})

    async def _whole(self, lanes: IntArray) -> FloatArray:
        """Return the log weights of the texts of some lanes as whole ones, float64[n], nats.

        A token in flight is lost when the text ends. So contexts are judged against the mass of
        those that end with the text, not against all: what hardly mattered may be all there is.
        """
        if not len(lanes):
            return np.empty(0)
        params, judge = self.params, self.judge
        limits = np.empty((2, len(lanes)))
        limits[0], limits[1] = params.deferred_share, params.deferred_merge
        known = -1
        with self.model.engine.tree.one_thread:
            nodes = self.nodes.take(lanes)
            await judge.ensure(nodes)
            while True:
                with_rows = -1
                while with_rows < nodes.live.sum():
                    with_rows = int(nodes.live.sum())
                    nodes.floats[:, :, FLIGHT][nodes.live & ~nodes.at_end] = 0.0
                    await judge.judge(nodes, *limits)
                await judge.judge(nodes, *limits, at_end=True)
                ending = self._endings(nodes)
                lost = ending == -np.inf
                if not lost.any() or known == nodes.live.sum():
                    return ending + self.log_scale[lanes]
                known = int(nodes.live.sum())
                limits[:, lost] = 0.0  # what hardly weighs may be all that can end here

    def _endings(self, nodes: Nodes) -> FloatArray:
        """Return the log weights of texts that end now, over their lanes' scale, nats."""
        weight = np.where(nodes.live & nodes.at_end, nodes.floats[:, :, WEIGHT], 0.0)
        with np.errstate(divide="ignore"):
            log_weight, total = np.log(weight), np.log(weight.sum(axis=1))
        state = BeamState.of(nodes.ints[:, :, CTX], np.zeros_like(weight), log_weight, log_weight)
        row = self.judge.kernels.next_rows(state, self.judge.cut)
        ending: FloatArray = row[:, EOS_COLUMN] + total
        return ending

    async def read(self, byte: int | Sequence[int] | IntArray) -> DeferredLanes:
        """Read a known byte in every lane, or one a lane."""
        if isinstance(byte, int) or hasattr(byte, "__index__"):
            return await self.step([check_byte(byte)] * len(self))
        return await self.step(byte)

    def prune(self) -> DeferredLanes:
        """Return these lanes: `step` has pruned them."""
        return self

    # -- what is shown -------------------------------------------------------------------

    @property
    def state(self) -> BeamState:
        """The tokens in flight and the contexts that end with the text, as candidates."""
        return self.nodes.candidates(self.model.engine.tree, self.log_scale)

    async def extended(self) -> BeamState:
        """Return `state` once `rows` has fetched its rows."""
        await self.rows()
        looked: Nodes = self._memo["looked"]
        return looked.candidates(self.model.engine.tree, self.log_scale)

    prune_and_read = read

    # -- from prompt to text, and exact tokens -------------------------------------------

    async def _in_mode(self, *, in_prompt: bool, literal: bool) -> DeferredLanes:
        other = dataclasses.replace(self, in_prompt=in_prompt, literal=literal, _memo={})
        if np.array_equal(other.judge.cut, self.judge.cut):
            return other
        with self.model.engine.tree.one_thread:
            nodes = self.nodes.copy()
            await other.judge.weigh_flights(nodes)
            masses, _ = await other.judge.judge(nodes, np.inf, np.inf)
        with np.errstate(divide="ignore"):
            log_z = np.where(self.ended, self.log_z, self.log_scale + np.log(masses))
        return dataclasses.replace(other, nodes=nodes, log_z=log_z, _memo={})

    async def feed(self, tokens: Sequence[int]) -> DeferredLanes:
        """Return lanes after exactly these tokens, see `ByteLanes.feed`."""
        self.model.vocab.check(tokens)
        lanes = self
        for token in tokens:
            lanes = await lanes._fed(int(token))
        return lanes

    async def _fed(self, token: int) -> DeferredLanes:
        tree, store = self.model.engine.tree, self.model.store
        with tree.one_thread:
            nodes = self.nodes.copy()
            await self.judge.ensure(nodes)
            await self.judge.judge(nodes, 0.0, self.params.deferred_merge, at_end=True)
            lanes, places = np.nonzero(nodes.at_end & nodes.live)
            contexts = nodes.ints[lanes, places, CTX]
            p = np.array([store.prob(int(c), token) for c in contexts])
            own = nodes.floats[lanes, places, WEIGHT] * p
            after = Nodes.of_ends(len(self), lanes, contexts, token, own)
            mass = np.bincount(lanes, own, minlength=len(self))
        with np.errstate(divide="ignore"):
            log_z = self.log_scale + np.log(mass)
        return dataclasses.replace(self, nodes=after, log_z=log_z, _memo={})
