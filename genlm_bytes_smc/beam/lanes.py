"""N byte beams side by side: look, read a symbol, prune, resample.

The loop of one byte step is

    row   = await lanes.logp_next()      [N, 257]; one forward for all lanes, equal contexts once
    lanes = await lanes.step(symbols)    one symbol a lane, K candidates kept

A `ByteLanes` is a value: every verb returns another one, and lanes are gathered (forked,
resampled) by indexing arrays that hold no model state. What is done between two forwards of the
model is one compiled call a verb (`steps_numba`); here is what waits for the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.beam import steps_numba as sn
from genlm_bytes_smc.beam.model import ByteModel, Rules
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.beam.state import (
    EOS_COLUMN,
    NOTHING,
    BeamState,
    FloatArray,
    SharedLanes,
    check_byte,
    check_symbols,
    lane_keys,
)
from genlm_bytes_smc.beam.token_steps import feed_token, foresee, heal_lanes, look_before, under
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.contexts_numba import NO_ROOM
from genlm_bytes_smc.lm.devices import send

_NO_STATE: IntArray = np.empty((4, 0, 0), dtype=np.int64)


class Look(NamedTuple):
    """What is known of lanes before they read a symbol.

    Attributes:
        extended: the candidates and their admitted token-ending extensions.
        dropped: float64[N], log mass of the extensions left out, nats.
        row: float64[N, 257] on the host, log probabilities of the next symbol, if asked for.
    """

    extended: BeamState
    dropped: FloatArray
    row: torch.Tensor | None = None


@dataclass(eq=False)
class ByteLanes(SharedLanes):
    """N byte beams over one `ByteModel`; `start` makes them.

    Attributes:
        model, params, rules: shared by all lanes; `rules` is how steps take the parameters.
        state: the candidates [N, C].
        log_z: float64[N] on the host, log of each lane's total weight, nats: the estimated
            prefix probability of what it has read. -inf for a dead lane; for one that read
            the end of its text, the weight of the complete text.
        log_dropped: float64[N], log of all the mass that pruning dropped so far, nats:
            exp(log_z) <= Z(s) <= exp(log_z) + exp(log_dropped) unless a lane was healed.
        ended: bool[N], lanes that read the end-of-sequence symbol.
        heals: int64[N], how often each lane was healed.
        look: what is known of the next byte; kept here when it is first asked for, which is
            all that ever changes.
    """

    model: ByteModel
    params: BeamParams
    rules: Rules
    state: BeamState
    log_z: FloatArray
    log_dropped: FloatArray
    ended: npt.NDArray[np.bool_]
    heals: IntArray
    look: Look | None = field(default=None, repr=False)

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
    ) -> ByteLanes:
        """N lanes that have read nothing.

        Args:
            model: the byte model.
            params: its `seed` seeds every lane alike, so equal bytes give equal beams.
            n: number of lanes.
            context: token ids the text begins after (default: the engine's start tokens).
            lane_seeds: one further seed a lane, for independent beams; n of them.
        """
        tree = model.engine.tree
        keys = lane_keys(params.seed, n, lane_seeds)
        with tree.one_thread:
            node = tree.insert(model.engine.start if context is None else context)
            lanes = cls(
                model, params, model.rules(params),
                BeamState.single(node, 0.0, keys), np.zeros(n),
                np.full(n, -np.inf), np.zeros(n, dtype=bool), np.zeros(n, dtype=np.int64),
            )  # fmt: skip
            await model.store.ensure(np.array([node], dtype=np.int64))
            return lanes

    @property
    def in_prompt(self) -> bool:
        """See `Rules`."""
        return self.rules.in_prompt

    @property
    def nbytes(self) -> int:
        """Memory of the arrays that belong to these lanes, in bytes."""
        arrays: list[Any] = [*self.state, self.log_z, self.log_dropped, self.heals, self.ended]
        if self.look is not None:
            arrays += [*self.look.extended, self.look.dropped]
            arrays += [] if self.look.row is None else [self.look.row]
        return sum(int(a.nbytes) for a in arrays)

    def context_ids(self) -> IntArray:
        """Return the contexts that must stay valid while this object lives."""
        contexts = self.state.ctx.ravel()
        if self.look is None:
            return contexts
        return np.concatenate([contexts, self.look.extended.ctx.ravel()])

    def replace(
        self,
        state: BeamState,
        log_z: FloatArray,
        log_dropped: FloatArray | None = None,
        *,
        ended: npt.NDArray[np.bool_] | None = None,
        heals: IntArray | None = None,
        look: Look | None = None,
    ) -> ByteLanes:
        """Return the same lanes, come to another state; what is not given is kept."""
        return ByteLanes(
            self.model, self.params, self.rules, state, log_z,
            self.log_dropped if log_dropped is None else log_dropped,
            self.ended if ended is None else ended, self.heals if heals is None else heals, look,
        )  # fmt: skip

    def with_params(self, params: BeamParams) -> ByteLanes:
        """Return the same lanes, pruned by other parameters from here on (of the same kind)."""
        rules = self.model.rules(params, in_prompt=self.in_prompt, literal=self.rules.literal)
        return dataclasses.replace(self, params=params, rules=rules, look=None)

    # -- one byte step -----------------------------------------------------------------

    async def logp_next(self) -> torch.Tensor:
        """Log probabilities of the next byte, and of ending last: float64[N, 257].

        With `prune="topk"` each row sums to one. Bytes that no candidate can read but that
        healing would rescue share `model.HEAL_RESERVE` of the row. That is judged by spellings;
        where the model itself has zeros (top-k, top-p), such a byte may turn out impossible when
        it is read. With `prune="unbiased"` rows are masses over the lane's weight, which sum to
        one in expectation. Rows of lanes that are dead or have ended are -inf. They are on the
        engine's device.
        """
        return send(await self.rows(), self.model.device)

    async def rows(self) -> torch.Tensor:
        """Return `logp_next` on the host, where it is computed."""
        with self.model.engine.tree.one_thread:
            look = self.look
            if look is None or look.row is None:
                look = await self._look(row=True)
        assert look.row is not None
        return look.row

    async def extended(self) -> BeamState:
        """Return the candidates and their admitted token-ending extensions, with their rows."""
        with self.model.engine.tree.one_thread:
            return (await self._look(row=False)).extended

    async def step(self, symbols: Sequence[int] | IntArray) -> ByteLanes:
        """Read one symbol a lane and prune.

        Args:
            symbols: int64[N], a byte 0..255, 256 to end the text, or -1 to leave a lane
                that is dead or has ended as it is.

        Raises:
            ValueError: a symbol out of range, or not one a lane.
        """
        symbols = check_symbols(symbols, len(self))
        kernels, rules = self.model.kernels, self.rules
        with self.model.engine.tree.one_thread:
            look = self.look
            if look is None:
                look = await self._look(row=False)
            extended, key = look.extended.packed, self.state.key
            packed, grown, key, numbers, _ = await self._with_rows(
                lambda: sn.step(
                    *kernels.arrays(), extended, key, symbols, rules.cut, rules.k,
                    rules.log_threshold, rules.random,
                )
            )  # fmt: skip
            reads = (symbols >= 0) & ~self.ended
            log_z = np.where(reads, numbers[0], self.log_z)
            dropped = np.logaddexp(np.logaddexp(self.log_dropped, look.dropped), numbers[1])
            after = self.replace(
                BeamState(packed, key), log_z, np.where(reads, dropped, self.log_dropped),
                ended=self.ended | ((symbols == EOS_COLUMN) & (log_z > -np.inf)),
                look=Look(BeamState(grown, key), numbers[2]),
            )  # fmt: skip
            if rules.heals and -np.inf in log_z.tolist():
                died = self.alive & reads & (log_z == -np.inf)
                dead = np.flatnonzero(died & (symbols < EOS_COLUMN))
                if len(dead):
                    return await self._read_again(after, dead, symbols[dead])
            return after

    async def read(self, byte: int | Sequence[int] | IntArray) -> ByteLanes:
        """Read a known byte in every lane (or one a lane), without pruning the result.

        As genlm-bytes 0.2 does it: with top-K pruning the threshold on extensions is taken
        against the candidates that can read the byte.
        """
        if np.ndim(byte) == 0:
            bytes_ = np.full(len(self), check_byte(byte), dtype=np.int64)
        else:
            bytes_ = check_symbols(np.asarray(byte), len(self))
        with self.model.engine.tree.one_thread:
            packed, key, numbers, _ = await self._with_rows(lambda: self._read(bytes_))
            after = self.replace(BeamState(packed, key), *numbers)
            if self.rules.heals and -np.inf in after.log_z.tolist():
                dead = np.flatnonzero(self.alive & (bytes_ >= 0) & (after.log_z == -np.inf))
                states = self.state, after.state
                state, healed = await heal_lanes(self.model, self.rules, *states, dead, bytes_)
                return after.replace(state, state.log_z, heals=self.heals + healed)
            return after

    async def prune_and_read(self, byte: int) -> ByteLanes:
        """`prune` and `read`, in one go where nothing is missing for it and no lane dies."""
        bytes_ = np.full(len(self), byte, dtype=np.int64)
        with self.model.engine.tree.one_thread:
            packed, key, numbers, missing = self._read(bytes_, prune=True)
            if len(missing) == 0 and -np.inf not in numbers[0].tolist():
                return self.replace(BeamState(packed, key), *numbers)
            return await self.prune().read(byte)

    def _read(self, byte: IntArray, *, prune: bool = False) -> tuple[Any, ...]:
        """Return `steps_numba.read` of a byte int64[N] a lane; prune the result no more."""
        rules = self.rules
        found: tuple[Any, ...] = sn.read(
            *self.model.kernels.arrays(), self.state.packed, self.state.key, self.log_z,
            self.log_dropped, byte, prune, rules.cut, rules.k, rules.log_threshold, rules.random,
        )  # fmt: skip
        return found

    def prune(self) -> ByteLanes:
        """At most K candidates a lane, best first, as the parameters say."""
        state, rules = self.state, self.rules
        packed, (log_z, log_dropped) = sn.prune(
            state.packed, state.key, self.log_dropped, rules.k, rules.log_threshold, rules.random
        )
        keeps = self.ended | rules.random  # which keeps the total
        log_z = np.where(keeps, self.log_z, log_z)
        return self.replace(BeamState(packed, state.key), log_z, log_dropped)

    # -- forking, joining, and the change from prompt to text --------------------------

    def gather(self, lanes: Sequence[int] | IntArray) -> ByteLanes:
        """Return the lanes `lanes` int64[M], in that order, repeats allowed."""
        index = np.asarray(lanes, dtype=np.int64)
        look = self.look
        if look is not None:
            row = None if look.row is None else look.row[send(index, look.row.device)]
            look = Look(look.extended.gather(index), look.dropped[index], row)
        return self.replace(
            self.state.gather(index), self.log_z[index], self.log_dropped[index],
            ended=self.ended[index], heals=self.heals[index], look=look,
        )  # fmt: skip

    @classmethod
    def cat(cls, lanes: Sequence[ByteLanes]) -> ByteLanes:
        """All lanes of several objects over one model with equal parameters."""
        first = lanes[0]
        first.check_like(lanes)
        return first.replace(
            BeamState.cat([x.state for x in lanes]),
            np.concatenate([x.log_z for x in lanes]),
            np.concatenate([x.log_dropped for x in lanes]),
            ended=np.concatenate([x.ended for x in lanes]),
            heals=np.concatenate([x.heals for x in lanes]),
        )

    async def _in_mode(self, *, in_prompt: bool, literal: bool) -> ByteLanes:
        rules = self.model.rules(self.params, in_prompt=in_prompt, literal=literal)
        lanes = dataclasses.replace(self, rules=rules, look=None)
        if np.array_equal(rules.cut, self.rules.cut):
            return lanes
        with self.model.engine.tree.one_thread:
            state = await under(self.model, self.state, self.rules.cut, rules.cut)
            return lanes.replace(state, state.log_z)

    async def feed(self, tokens: Sequence[int]) -> ByteLanes:
        """Lanes after exactly these tokens, which begin where a token ends.

        Candidates in the middle of a token are lost; weights gain log p(token | context).

        Raises:
            ValueError: no token of the vocabulary.
        """
        lanes, model = self, self.model
        with model.engine.tree.one_thread:
            await foresee(model, self.state, tokens)
            for token in tokens:
                if self.rules.random:
                    extended, left_out, _ = await lanes._look(row=False)
                else:
                    extended, left_out = await look_before(model, lanes.state, self.rules, token)
                state = await feed_token(model, lanes.state.key, extended, self.rules.cut, token)
                dropped = np.logaddexp(lanes.log_dropped, left_out)
                lanes = lanes.replace(state, state.log_z, dropped)
        return lanes

    # -- parts -------------------------------------------------------------------------

    async def _look(self, *, row: bool) -> Look:
        """Return what is to be known before the next symbol, and keep it."""
        rules, rescues, known, state = self.rules, self.rules.rescues, self.look, self.state
        packed, dropped = _NO_STATE, self.log_z
        if known is not None:
            packed, dropped = known.extended.packed, known.dropped
        packed, dropped, rows, _ = await self._with_rows(
            lambda: sn.look(
                *self.model.kernels.arrays(), state.packed, state.key, self.log_z,
                self.log_dropped, known is not None, packed, dropped, rules.cut, rules.k,
                rules.log_threshold, rules.random, rescues.line_of, rescues.lines, rules.share, row,
            )
        )  # fmt: skip
        kept = torch.from_numpy(rows) if row else None if known is None else known.row
        self.look = Look(BeamState(packed, state.key), dropped, kept)
        return self.look

    async def _with_rows(self, attempt: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """Call a compiled step until nothing is missing; what is, it returns last."""
        wanted = NOTHING
        while True:
            found = attempt()
            if len(found[-1]) == 0:
                return found
            wanted = await self.provide(wanted, found[-1])

    async def provide(self, wanted: IntArray, missing: IntArray) -> IntArray:
        """Provide what a step lacks; return the contexts that it has `wanted` so far.

        Under a tight limit what is fetched may evict what a step found before. So a step that
        stops at missing rows asks the next time for all that it ever missed, together; else
        two sets of rows that do not fit side by side would evict each other for ever.
        """
        if missing[0] == NO_ROOM:
            self.model.engine.tree.grow()
            return wanted
        if missing[0] == sn.UNKNOWN:
            self.rules.rescues.learn(self.state.node)
            return wanted
        wanted = np.union1d(wanted, missing) if len(wanted) else missing
        await self.model.store.ensure(np.concatenate([self.state.ctx.ravel(), wanted]))
        return wanted

    async def _read_again(self, after: ByteLanes, dead: IntArray, bytes_: IntArray) -> ByteLanes:
        """Return `after`, which `step` has made, with the lanes that died of their byte as `read`
        and `prune` have them: `read` admits extensions that only this byte needs, and heals."""
        read = await self.gather(dead).read(bytes_)
        kept = read.replace(read.state, read.state.log_z, after.log_dropped[dead]).prune()
        log_z, log_dropped, heals = after.log_z.copy(), after.log_dropped.copy(), self.heals.copy()
        log_z[dead], log_dropped[dead], heals[dead] = kept.log_z, kept.log_dropped, kept.heals
        state = after.state.put(dead, kept.state)
        return after.replace(state, log_z, log_dropped, heals=heals)
