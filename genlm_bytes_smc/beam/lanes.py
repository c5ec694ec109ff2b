"""N byte beams side by side: look, read a symbol, prune, resample.

The loop of one byte step is

    row   = await lanes.logp_next()      [N, 257]; one forward for all lanes, equal contexts once
    lanes = await lanes.step(symbols)    one symbol a lane, K candidates kept

A `ByteLanes` is a value: every verb returns another one, and lanes are gathered (forked,
resampled) by indexing arrays that hold no model state. The arithmetic is in `Kernels`; here is what
waits for the language model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.beam.kernels import Ahead, Lanes, Look, Read
from genlm_bytes_smc.beam.model import NO_CUT, ByteModel
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.beam.rng import lane_keys
from genlm_bytes_smc.beam.rules import Rules
from genlm_bytes_smc.beam.state import EOS_COLUMN, BeamState, FloatArray, check_byte, check_symbols
from genlm_bytes_smc.beam.token_steps import feed_token, foresee, heal_lanes, look_before, under
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.devices import send

T = TypeVar("T", Look, Read)


@dataclass(frozen=True, eq=False)
class ByteLanes(Lanes):
    """N byte beams over one `ByteModel`; `start` makes them.

    Attributes:
        model, params, rules: shared by all lanes; `rules` is how kernels take the parameters.
        state: the candidates [N, C].
        log_z: float64[N] on the host, log of each lane's total weight, nats: the estimated
            prefix probability of what it has read. -inf for a dead lane; for one that read
            the end of its text, the weight of the complete text.
        log_dropped: float64[N], log of all the mass that pruning dropped so far, nats:
            exp(log_z) <= Z(s) <= exp(log_z) + exp(log_dropped) unless a lane was healed.
        ended: bool[N], lanes that read the end-of-sequence symbol.
        heals: int64[N], how often each lane was healed.
        ahead: what is known of the next byte.
    """

    model: ByteModel
    params: BeamParams
    rules: Rules
    state: BeamState
    log_z: FloatArray
    log_dropped: FloatArray
    ended: npt.NDArray[np.bool_]
    heals: IntArray
    ahead: Ahead = field(default_factory=Ahead, repr=False)

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
    def literal(self) -> bool:
        """See `Rules`."""
        return self.rules.literal

    @property
    def cut(self) -> IntArray:
        """Trie positions of the tokens that are no text here."""
        return self.rules.cut

    @property
    def nbytes(self) -> int:
        """Memory of the arrays that belong to these lanes, in bytes."""
        look = self.ahead.look or Look(None, self.log_dropped)
        row = () if look.row is None else (look.row,)
        arrays = [self.log_z, look.dropped, self.heals, self.ended, *row]
        return sum(int(a.nbytes) for a in (*arrays, *self.state, *(look.extended or ())))

    def context_ids(self) -> IntArray:
        """Return the contexts that must stay valid while this object lives."""
        look = self.ahead.look or Look(None, self.log_dropped)
        states = [self.state] if look.extended is None else [self.state, look.extended]
        return np.concatenate([s.ctx.ravel() for s in states])

    def replace(self, state: BeamState, **changes: Any) -> ByteLanes:
        """Return the same lanes with another state; what is not named is kept, log_z recomputed."""
        if "log_z" not in changes:
            changes["log_z"] = self.model.kernels.log_z(state)
        return dataclasses.replace(
            self, state=state, ahead=changes.pop("ahead", Ahead()), **changes
        )

    def with_params(self, params: BeamParams) -> ByteLanes:
        """Return the same lanes, pruned by other parameters from here on (of the same kind)."""
        rules = self.model.rules(params, in_prompt=self.in_prompt, literal=self.literal)
        return self.replace(self.state, log_z=self.log_z, params=params, rules=rules)

    # -- one byte step -----------------------------------------------------------------

    async def logp_next(self) -> torch.Tensor:
        """Log probabilities of the next byte, and of ending last: float64[N, 257].

        With `prune="topk"` each row sums to one. Bytes that no candidate can read but that
        healing would rescue share `rules.HEAL_RESERVE` of the row. That is judged by spellings;
        where the model itself has zeros (top-k, top-p), such a byte may turn out impossible when
        it is read. With `prune="unbiased"` rows are masses over the lane's weight, which sum to
        one in expectation. Rows of lanes that are dead or have ended are -inf. They are on the
        engine's device.
        """
        return send(await self.rows(), self.model.device)

    async def rows(self) -> torch.Tensor:
        """Return `logp_next` on the host, where it is computed."""
        with self.model.engine.tree.one_thread:
            look = self.ahead.look
            if look is None or look.row is None:
                look = await self._look(row=True)
        assert look.row is not None
        return look.row

    async def extended(self) -> BeamState:
        """Return the candidates and their admitted token-ending extensions, with their rows."""
        with self.model.engine.tree.one_thread:
            look = await self._look(row=False)
            assert look.extended is not None
            return look.extended

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
            look = self.ahead.look
            if look is None or look.extended is None:
                look = await self._look(row=False)
            before = look
            found = await self._with_rows(lambda: kernels.step(self, before, symbols))
            reads = (symbols >= 0) & ~self.ended
            log_z = np.where(reads, found.log_z, self.log_z)
            after = ByteLanes(
                self.model, self.params, rules, found.state, log_z,
                np.where(reads, found.log_dropped, self.log_dropped),
                self.ended | ((symbols == EOS_COLUMN) & (log_z > -np.inf)), self.heals,
                Ahead(found.look),
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
        kernels, rules = self.model.kernels, self.rules
        with self.model.engine.tree.one_thread:
            found = await self._with_rows(lambda: kernels.read(self, bytes_))
            after = self._at(found.state, found.log_z, found.log_dropped)
            if rules.heals and -np.inf in after.log_z.tolist():
                dead = np.flatnonzero(self.alive & (bytes_ >= 0) & (after.log_z == -np.inf))
                states = self.state, after.state
                state, healed = await heal_lanes(self.model, rules, *states, dead, bytes_)
                return after.replace(state, heals=self.heals + healed)
            return after

    async def prune_and_read(self, byte: int) -> ByteLanes:
        """`prune` and `read`, in one go where no row is missing for it and no lane dies."""
        bytes_ = np.full(len(self), byte, dtype=np.int64)
        with self.model.engine.tree.one_thread:
            found = self.model.kernels.read(self, bytes_, prune=True)
            if len(found.missing) == 0 and -np.inf not in found.log_z.tolist():
                return self._at(found.state, found.log_z, found.log_dropped)
            return await self.prune().read(byte)

    def prune(self) -> ByteLanes:
        """At most K candidates a lane, best first, as the parameters say."""
        found = self.model.kernels.prune(self)
        keeps = self.ended | self.rules.random  # which keeps the total
        log_z = np.where(keeps, self.log_z, found.log_z)
        return self._at(found.state, log_z, found.log_dropped)

    async def follow_likeliest(self, steps: int) -> tuple[ByteLanes, list[int], bool] | None:
        """Prune, take the likeliest symbol and read it, `steps` times: one lane.

        Returns:
            The lane after the last byte, not pruned; the bytes; whether the text ends then. They
            are fewer than `steps` where it does, and before a byte that only healing can read.
            None if these lanes must be stepped by the other verbs.
        """
        if len(self) != 1:
            return None
        lanes, out, wanted = self, list[int](), NO_CUT
        with self.model.engine.tree.one_thread:
            while True:
                run, read = self.model.kernels.follow_likeliest(lanes, steps - len(out))
                if read:
                    lanes = lanes._at(run.state, run.log_z, run.log_dropped)
                    out += read
                    wanted = NO_CUT
                if len(run.missed) == 0:
                    return lanes, out, run.ends
                wanted = await lanes._fetch(wanted, run.missed)

    # -- forking, joining, and the change from prompt to text --------------------------

    def gather(self, lanes: Sequence[int] | IntArray) -> ByteLanes:
        """Return the lanes `lanes` int64[M], in that order, repeats allowed."""
        index = np.asarray(lanes, dtype=np.int64)
        look = self.ahead.look
        if look is not None:
            row, extended = look.row, look.extended
            look = look._replace(
                extended=None if extended is None else extended.gather(index),
                dropped=look.dropped[index],
                row=None if row is None else row[send(index, row.device)],
            )
        return ByteLanes(
            self.model, self.params, self.rules, self.state.gather(index), self.log_z[index],
            self.log_dropped[index], self.ended[index], self.heals[index], Ahead(look),
        )  # fmt: skip

    @classmethod
    def cat(cls, lanes: Sequence[ByteLanes]) -> ByteLanes:
        """All lanes of several objects over one model with equal parameters."""
        first = lanes[0]
        first.check_like(lanes)
        return first.replace(
            BeamState.cat([x.state for x in lanes]),
            log_z=np.concatenate([x.log_z for x in lanes]),
            log_dropped=np.concatenate([x.log_dropped for x in lanes]),
            ended=np.concatenate([x.ended for x in lanes]),
            heals=np.concatenate([x.heals for x in lanes]),
        )

    async def _in_mode(self, *, in_prompt: bool, literal: bool) -> ByteLanes:
        rules = self.model.rules(self.params, in_prompt=in_prompt, literal=literal)
        if np.array_equal(rules.cut, self.cut):
            return self.replace(self.state, log_z=self.log_z, rules=rules)
        with self.model.engine.tree.one_thread:
            state = await under(self.model, self.state, self.cut, rules.cut)
            return self.replace(state, rules=rules)

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
                    look = await lanes._look(row=False)
                else:
                    look = await look_before(model, lanes.state, self.rules, token)
                state = await feed_token(model, lanes.state, look, self.cut, token)
                dropped = np.logaddexp(lanes.log_dropped, look.dropped)
                lanes = lanes.replace(state, log_dropped=dropped)
        return lanes

    # -- parts -------------------------------------------------------------------------

    async def _look(self, *, row: bool) -> Look:
        """Return what is to be known before the next symbol, and keep it."""
        kernels, ahead = self.model.kernels, self.ahead

        def look() -> Look:
            known = ahead.look
            found = kernels.look(self, known, row=row)
            if found.row is None and known is not None:
                found = found._replace(row=known.row)
            ahead.look = found
            return found

        return await self._with_rows(look)

    async def _with_rows(self, attempt: Callable[[], T]) -> T:
        """Call until no row is missing."""
        wanted = NO_CUT
        while True:
            found = attempt()
            if len(found.missing) == 0:
                return found
            wanted = await self._fetch(wanted, found.missing)

    async def _fetch(self, wanted: IntArray, missing: IntArray) -> IntArray:
        """Fetch the rows of the candidates and of further contexts; return these.

        Under a tight limit what is fetched may evict what a step found before. So a step that
        stops at missing rows asks the next time for all that it ever missed, together; else
        two sets of rows that do not fit side by side would evict each other for ever.
        """
        wanted = np.union1d(wanted, missing) if len(wanted) else missing
        contexts = self.state.ctx.ravel()
        await self.model.store.ensure(np.concatenate([contexts, wanted]))
        return wanted

    def _at(self, state: BeamState, log_z: FloatArray, log_dropped: FloatArray) -> ByteLanes:
        """Return the same lanes, come to another state."""
        return ByteLanes(
            self.model, self.params, self.rules, state, log_z, log_dropped, self.ended, self.heals
        )

    async def _read_again(self, after: ByteLanes, dead: IntArray, bytes_: IntArray) -> ByteLanes:
        """Return `after`, which `step` has made, with the lanes that died of their byte as `read`
        and `prune` have them: `read` admits extensions that only this byte needs, and heals."""
        read = await self.gather(dead).read(bytes_)
        kept = read.replace(read.state, log_dropped=after.log_dropped[dead]).prune()
        log_z, log_dropped, heals = (x.copy() for x in (after.log_z, after.log_dropped, self.heals))
        log_z[dead], log_dropped[dead], heals[dead] = kept.log_z, kept.log_dropped, kept.heals
        state = after.state.put(dead, kept.state)
        return after.replace(state, log_z=log_z, log_dropped=log_dropped, heals=heals)
