"""N byte beams side by side: extend, read the next-byte block, step, resample.

The loop of one byte step is

    extended = extensions of the candidates   one LM forward for all lanes, equal contexts once
    row      = next-byte block of `extended`  [N, 257]
    state    = advance(extended, bytes)       one byte a lane
    state    = prune(state)                   K candidates a lane

A `ByteLanes` is a value: every verb returns another one, and lanes are gathered (forked,
resampled) by indexing arrays that hold no model state.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.beam.heal import heal_lanes, put_lanes
from genlm_bytes_smc.beam.kernels import keep_above, thin
from genlm_bytes_smc.beam.model import NO_CUT, ByteModel
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.beam.reading import Reading, commit, feed, read_topk, read_unbiased
from genlm_bytes_smc.beam.reserve import Reserve, RootBlock, root_block
from genlm_bytes_smc.beam.rng import KeyArray, read_keys, start_keys
from genlm_bytes_smc.beam.state import BeamState
from genlm_bytes_smc.beam.steps import WholeSteps, packed_of, unpack
from genlm_bytes_smc.beam.symbols import EOS_COLUMN, check_byte, check_symbols
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.engine import not_pickled
from genlm_bytes_smc.lm.transfer import send

FloatArray = npt.NDArray[np.float64]

P = ParamSpec("P")
T = TypeVar("T")


def _one_thread(
    verb: Callable[Concatenate[ByteLanes, P], Awaitable[T]],
) -> Callable[Concatenate[ByteLanes, P], Coroutine[Any, Any, T]]:
    """Make a verb of `ByteLanes` refuse to run beside another thread: it changes what all
    lanes of a model share, from its first row to its last context."""

    @functools.wraps(verb)
    async def alone(self: ByteLanes, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.model.engine.tree.one_thread:
            return await verb(self, *args, **kwargs)

    return alone


class ByteLanes:
    """N byte beams over one `ByteModel`.

    Attributes:
        model, params: shared by all lanes.
        state: the candidates, `BeamState` [N, C].
        log_z: float64[N] on the host, log of each lane's total weight, nats: the estimated
            prefix probability of what it has read. -inf for a dead lane; for one that read
            the end of its text, the weight of the complete text.
        ended: bool[N], lanes that read the end-of-sequence symbol.
        log_dropped: float64[N], log of all the mass that pruning dropped so far, nats:
            exp(log_z) <= Z(s) <= exp(log_z) + exp(log_dropped) unless a lane was healed.
        heals: int64[N], how often each lane was healed.
        in_prompt: whether end-of-sequence tokens are ordinary tokens (prompt) or ends.
        literal: in a prompt, whether special tokens are left out, so that text which looks
            like one is spelled from ordinary tokens.
    """

    def __init__(
        self,
        model: ByteModel,
        params: BeamParams,
        state: BeamState,
        *,
        log_z: FloatArray | None = None,
        ended: npt.NDArray[np.bool_] | None = None,
        log_dropped: FloatArray | None = None,
        heals: IntArray | None = None,
        in_prompt: bool = False,
        literal: bool = False,
        cut: IntArray | None = None,
    ) -> None:
        n = len(state.key)
        self._state: BeamState | None
        self._packed: IntArray | None
        self.model = model
        self.params = params
        self.state = state
        self.ended = np.zeros(n, dtype=bool) if ended is None else ended
        self.log_z = model.kernels.log_z(state) if log_z is None else log_z
        self.log_dropped = np.full(n, -np.inf) if log_dropped is None else log_dropped
        self.heals = np.zeros(n, dtype=np.int64) if heals is None else heals
        self.in_prompt = in_prompt
        self.literal = literal
        self.cut = self._cut() if cut is None else cut
        self._extended: BeamState | None = None
        self._ext_dropped: FloatArray | None = None
        self._row: torch.Tensor | None = None
        self._root_block: RootBlock | None = None
        self._steps = None if params.unbiased else model.kernels.steps
        self._log_threshold = params.log_prune_threshold
        self._reserve = Reserve(model, params, self.cut)
        model.engine.tree.track(self)

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
            params: how to prune; its `seed` seeds every lane alike, so lanes that read equal
                bytes have equal beams.
            n: number of lanes.
            context: token ids the text begins after (default: the engine's start tokens).
            lane_seeds: one further seed a lane, for independent beams; n of them.
        """
        tree = model.engine.tree
        seeds = np.full(n, params.seed, dtype=np.uint64)
        if lane_seeds is not None:
            if len(lane_seeds) != n:
                raise ValueError(f"lane_seeds must hold {n} numbers, got {len(lane_seeds)}")
            seeds = start_keys(seeds) ^ np.asarray(lane_seeds, dtype=np.uint64)
        with tree.one_thread:
            node = tree.insert(model.engine.start if context is None else context)
            lanes = cls(model, params, model.kernels.initial(node, start_keys(seeds)))
            await model.store.ensure(np.array([node], dtype=np.int64))
            return lanes

    def __len__(self) -> int:
        """Return the number of lanes, N."""
        return len(self.log_z)

    def __deepcopy__(self, memo: object) -> ByteLanes:
        """Return the lanes themselves: they are a value, which nothing changes."""
        return self

    def __copy__(self) -> ByteLanes:
        return self

    def __reduce__(self) -> NoReturn:
        raise not_pickled()

    @property
    def state(self) -> BeamState:
        """The candidates; made of what a compiled step returned when first asked for."""
        if self._state is None:
            assert self._packed is not None
            self._state = unpack(self._packed, self._key)
        return self._state

    @state.setter
    def state(self, state: BeamState) -> None:
        self._state, self._packed, self._key = state, None, state.key

    @property
    def _given(self) -> IntArray:
        """The candidates as compiled steps take them."""
        if self._packed is None:
            self._packed = packed_of(self.state)
        return self._packed

    @property
    def alive(self) -> npt.NDArray[np.bool_]:
        """Lanes that can read on, bool[N]."""
        return (self.log_z > -np.inf) & ~self.ended

    @property
    def nbytes(self) -> int:
        """Memory of the arrays that belong to these lanes, in bytes."""
        arrays = [*self.state, *(self._extended or ()), self.log_z, self.log_dropped, self.heals]
        row = 0 if self._row is None else self._row.nbytes
        return row + self.ended.nbytes + sum(int(a.nbytes) for a in arrays)

    def context_ids(self) -> IntArray:
        """Contexts that must stay valid while this object lives."""
        kernels = self.model.kernels
        packed = self._packed
        held = [kernels.contexts(self.state).ravel() if packed is None else packed[0].ravel()]
        if self._extended is not None:
            held.append(kernels.contexts(self._extended).ravel())
        if self._root_block is not None:
            held.append(self._root_block.contexts.ravel())
        return np.concatenate(held)

    def replace(self, state: BeamState, **changes: object) -> ByteLanes:
        """Return the same lanes with another state; what is not named is kept, log_z recomputed."""
        lanes = object.__new__(ByteLanes)
        lanes.__dict__.update(self.__dict__)
        lanes._extended = lanes._ext_dropped = lanes._row = None
        lanes.state = state
        lanes.__dict__.update(changes)
        if "log_z" not in changes:
            lanes.log_z = self.model.kernels.log_z(state)
        self.model.engine.tree.track(lanes)
        return lanes

    def _come_to(self, packed: IntArray, log_z: FloatArray, log_dropped: FloatArray) -> ByteLanes:
        """`replace` by what a compiled step returned."""
        lanes = object.__new__(ByteLanes)
        lanes.__dict__.update(self.__dict__)
        lanes._extended = lanes._ext_dropped = lanes._row = lanes._state = None
        lanes._packed, lanes.log_z, lanes.log_dropped = packed, log_z, log_dropped
        self.model.engine.tree.track(lanes)
        return lanes

    def with_params(self, params: BeamParams) -> ByteLanes:
        """Return the same lanes, pruned by other parameters from here on (of the same kind)."""
        return self.replace(
            self.state,
            log_z=self.log_z,
            params=params,
            _log_threshold=params.log_prune_threshold,
            _reserve=Reserve(self.model, params, self.cut),
        )

    # -- one byte step -----------------------------------------------------------------

    @_one_thread
    async def extended(self) -> BeamState:
        """Return the candidates and their admitted token-ending extensions, computed once."""
        steps = self._steps
        if self._extended is None and steps is not None:
            found = steps.extend(self.state, self.log_z, self.cut, self._log_threshold)
            wanted = NO_CUT
            while len(found.missing):
                wanted = await self._have_rows_too(wanted, found.missing)
                found = steps.extend(self.state, self.log_z, self.cut, self._log_threshold)
            self._extended = unpack(found.packed, self.state.key)
            self._ext_dropped = found.dropped
        elif self._extended is None:
            await self._have_rows()
            kernels, params = self.model.kernels, self.params
            ext = kernels.extensions(self.state, self.cut)
            if params.unbiased:
                ext = thin(ext, self.log_z, self._log_threshold, self.state.key)
            else:
                ext = keep_above(ext, self.log_z, params.log_prune_threshold, within=True)
            self._extended = await commit(self.model, self.state, ext)
            self._ext_dropped = ext.dropped
        else:  # rows may have been evicted since
            await self.model.store.ensure(self.model.kernels.contexts(self._extended))
        return self._extended

    @_one_thread
    async def logp_next(self) -> torch.Tensor:
        """Log probabilities of the next byte, and of ending last: float64[N, 257].

        With `prune="topk"` each row sums to one. Bytes that no candidate can read but that
        healing would rescue share `reserve.HEAL_RESERVE` of the row, in proportion to how
        likely the best candidate's row holds a token to begin with them: what they weigh
        exactly would cost LM rows for bytes that are mostly never read. What healing would
        rescue is judged by spellings; where the model itself has zeros (top-k, top-p), such a
        byte may turn out impossible when it is read. With
        `prune="unbiased"` rows are masses over the lane's weight, which sum to one in
        expectation. Rows of lanes that are dead or have ended are -inf.
        """
        if self._row is None and self._steps is not None and self._extended is None:
            self._row = await self._first_row(self._steps)
        elif self._row is None and self._steps is not None:
            extended, lossy = await self.extended(), self._lossy()
            if lossy.any():
                self._reserve.rescues.learn(self.state.node[lossy])
            rows = self._steps.next_rows(
                self.state, extended, self.cut, lossy,
                self._reserve.rescues, self._reserve.share,
            )  # fmt: skip
            self._row = torch.from_numpy(rows)
        elif self._row is None:
            kernels = self.model.kernels
            block = kernels.next_block(await self.extended(), self.cut)
            row = kernels.normalise(block, self.log_z if self.params.unbiased else None)
            lossy = self._lossy()
            if lossy.any():
                found = root_block(kernels, self.state, self.cut, self._root_block)
                self._root_block = found
                row = self._reserve.give(row, self.state, found.block, lossy)
            self._row = row
        return self._row

    rows = logp_next

    async def _first_row(self, steps: WholeSteps) -> torch.Tensor:
        """Extend lanes that are not extended yet, and return their rows."""
        wanted = NO_CUT
        while True:
            found, rows = steps.extend_rows(
                self.state, self.log_z, self.log_dropped, self.cut, self._log_threshold,
                self._reserve.rescues, self._reserve.share,
            )  # fmt: skip
            if rows is not None:
                self._extended = unpack(found.packed, self.state.key)
                self._ext_dropped = found.dropped
                return torch.from_numpy(rows)
            wanted = await self._have_rows_too(wanted, found.missing)

    @_one_thread
    async def step(self, symbols: Sequence[int] | IntArray) -> ByteLanes:
        """Read one symbol a lane and prune.

        Args:
            symbols: int64[N], a byte 0..255, 256 to end the text, or -1 to leave a lane
                that is dead or has ended as it is.

        Raises:
            ValueError: a symbol out of range, or not one a lane.
        """
        symbols = check_symbols(symbols, len(self))
        if self._steps is not None:
            lanes = await self._step_compiled(self._steps, symbols)
            if lanes is not None:
                return lanes
        extended = await self.extended()
        kernels, params = self.model.kernels, self.params
        ends = symbols == EOS_COLUMN
        ending = kernels.next_block(extended, self.cut)[:, EOS_COLUMN] if ends.any() else None
        state = kernels.advance(extended, np.where(ends, -1, symbols), self.cut)
        state = state._replace(key=self._keys_after(symbols))
        assert self._ext_dropped is not None
        dropped = np.logaddexp(self.log_dropped, self._ext_dropped)
        heals = self.heals
        if params.heal:
            dead = self.alive & (symbols >= 0) & ~ends & (kernels.log_z(state) == -np.inf)
            if dead.any():
                state, heals = await self._read_again(state, np.flatnonzero(dead), symbols)
        if params.unbiased:
            state = kernels.resample(state, params.K)
        else:
            state, pruned = kernels.select(state, params.K, params.log_prune_threshold)
            dropped = np.logaddexp(dropped, pruned)
        log_z = kernels.log_z(state)
        if ending is not None:
            log_z = np.where(ends, ending.cpu().numpy(), log_z)
        stays = self.ended | (symbols < 0)
        log_z = np.where(stays, self.log_z, log_z)
        return self.replace(
            state,
            log_z=log_z,
            ended=self.ended | (ends & (log_z > -np.inf)),
            log_dropped=np.where(stays, self.log_dropped, dropped),
            heals=heals,
        )

    async def _step_compiled(self, steps: WholeSteps, symbols: IntArray) -> ByteLanes | None:
        """`step` in one compiled call, which extends the new candidates too.

        None where a lane died that healing may rescue.
        """
        params, ended = self.params, self.ended
        if self._extended is None:
            await self.extended()
        while True:
            assert self._extended is not None
            found = steps.step(self._extended, symbols, self.cut, params.K, self._log_threshold)
            if len(found.missing) == 0:
                break
            await self.extended()  # some were evicted
        reads = (symbols >= 0) & ~ended
        died = found.log_z == -np.inf
        if params.heal and (died & reads & (symbols < EOS_COLUMN) & self.alive).any():
            return None
        assert self._ext_dropped is not None
        dropped = np.logaddexp(np.logaddexp(self.log_dropped, self._ext_dropped), found.pruned)
        log_z = np.where(reads, found.log_z, self.log_z)
        lanes = self._come_to(found.packed, log_z, np.where(reads, dropped, self.log_dropped))
        lanes.ended = ended | ((symbols == EOS_COLUMN) & (log_z > -np.inf))
        lanes._extended = unpack(found.extended, self._key)
        lanes._ext_dropped = found.left_out
        return lanes

    async def _read_again(
        self, state: BeamState, lanes: IntArray, symbols: IntArray
    ) -> tuple[BeamState, IntArray]:
        """`state`, what `step` made of these lanes, with those that died of their byte as
        `read` has them: it admits extensions that only this byte needs, and heals."""
        kernels = self.model.kernels
        with self.model.engine.tree.pinned(kernels.contexts(state)):
            lost, healed = await self.gather(lanes)._read(symbols[lanes])
        heals = self.heals.copy()
        heals[lanes] = healed
        return put_lanes(kernels, state, lanes, lost.state), heals

    @_one_thread
    async def read(self, byte: int | Sequence[int] | IntArray) -> ByteLanes:
        """Read a known byte in every lane (or one a lane), without pruning the result.

        As genlm-bytes 0.2 does it: with top-K pruning the threshold on extensions is taken
        against the candidates that can read the byte, so that a byte that only they can read
        does not cost the text its life.
        """
        if isinstance(byte, int) or hasattr(byte, "__index__"):
            bytes_ = np.array([check_byte(byte)] * len(self), dtype=np.int64)
        else:
            bytes_ = check_symbols(byte, len(self))
        (state, log_z, dropped), heals = await self._read(bytes_)
        return self.replace(state, log_z=log_z, log_dropped=dropped, heals=heals)

    async def _read(self, bytes_: IntArray) -> tuple[Reading, IntArray]:
        """Read one byte a lane (-1 empties it) and heal dead lanes; return that and the heals."""
        if self.params.unbiased:
            extended, key = await self.extended(), self.state.key
            got = read_unbiased(self.model, extended, key, self.log_dropped, bytes_, self.cut)
        elif self._steps is not None:
            got = await self._read_compiled(self._steps, bytes_)
        else:
            await self._have_rows()
            threshold = self.params.log_prune_threshold
            got = await read_topk(
                self.model, self.state, self.log_dropped, bytes_, self.cut, threshold
            )
        if self.params.heal and -np.inf in got.log_z.tolist():
            dead = self.alive & (bytes_ >= 0) & (got.log_z == -np.inf)
            if dead.any():
                state, heals = await heal_lanes(self, got.state, np.flatnonzero(dead), bytes_)
                log_z = self.model.kernels.log_z(state)
                return Reading(state, log_z, got.log_dropped), heals
        return got, self.heals

    async def _read_compiled(self, steps: WholeSteps, bytes_: IntArray) -> Reading:
        """`read_topk` in one compiled call, and one more each time that rows are missing."""
        arguments = self._given, self.log_dropped, bytes_, self.cut, self._log_threshold
        packed, log_z, dropped, missing = steps.read(*arguments)
        wanted = NO_CUT
        while len(missing):
            wanted = await self._have_rows_too(wanted, missing)
            packed, log_z, dropped, missing = steps.read(*arguments)
        return Reading(unpack(packed, self.state.key), log_z, dropped)

    @_one_thread
    async def prune_and_read(self, byte: int) -> ByteLanes:
        """`prune` and `read`, in one compiled call where no row is missing for it."""
        if self._steps is not None:
            k = self.params.K
            bytes_ = np.full(len(self.log_z), byte, dtype=np.int64)
            packed, log_z, dropped, missing = self._steps.read(
                self._given, self.log_dropped, bytes_, self.cut, self._log_threshold,
                (-1 if k is None else k, self._log_threshold),
            )  # fmt: skip
            if len(missing) == 0 and -np.inf not in log_z.tolist():
                return self._come_to(packed, log_z, dropped)
        return await self.prune().read(byte)

    def prune(self) -> ByteLanes:
        """At most K candidates a lane, best first, as the parameters say."""
        kernels, params = self.model.kernels, self.params
        if params.unbiased:
            return self.replace(kernels.resample(self.state, params.K), log_z=self.log_z)
        if self._steps is not None:
            packed, log_z, dropped = self._steps.prune(
                self._given, self.log_dropped, params.K, self._log_threshold
            )
            if True in self.ended.tolist():
                log_z = np.where(self.ended, self.log_z, log_z)
            return self._come_to(packed, log_z, dropped)
        state, dropped = kernels.select(self.state, params.K, params.log_prune_threshold)
        log_z = np.where(self.ended, self.log_z, kernels.log_z(state))
        return self.replace(state, log_z=log_z, log_dropped=np.logaddexp(self.log_dropped, dropped))

    @_one_thread
    async def follow_likeliest(self, steps: int) -> tuple[ByteLanes, list[int], bool] | None:
        """Prune, take the likeliest symbol and read it, `steps` times: one lane.

        Returns:
            The lane after the last byte, not pruned; the bytes; whether the likeliest symbol
            is then the end of the text. The bytes are fewer than `steps` where that is so, and
            before a byte that only healing can read. None if these lanes must be stepped by
            the other verbs.
        """
        compiled = self._steps
        if compiled is None or len(self) != 1:
            return None
        lanes, out, params = self, list[int](), self.params
        wanted = NO_CUT
        while True:
            found = compiled.follow_likeliest(
                lanes._given, float(lanes.log_dropped[0]), self.cut, params.K,
                self._log_threshold, steps - len(out),
            )  # fmt: skip
            if found.symbols:
                lanes = lanes._come_to(found.packed, found.log_z, found.dropped)
                out += found.symbols
                wanted = NO_CUT
            if len(found.missing) == 0:
                return lanes, out, found.ends
            wanted = await lanes._have_rows_too(wanted, found.missing)

    # -- forking, joining, and the change from prompt to text --------------------------

    def gather(self, lanes: Sequence[int] | IntArray) -> ByteLanes:
        """Return the lanes `lanes` int64[M], in that order, repeats allowed."""
        index = np.asarray(lanes, dtype=np.int64)
        out = self.replace(
            self._gathered(self.state, index),
            log_z=self.log_z[index],
            ended=self.ended[index],
            log_dropped=self.log_dropped[index],
            heals=self.heals[index],
        )
        if self._extended is not None:
            out._extended = self._gathered(self._extended, index)
            assert self._ext_dropped is not None
            out._ext_dropped = self._ext_dropped[index]
        if self._row is not None:
            out._row = self._row[send(index, self._row.device)]
        return out

    @classmethod
    def cat(cls, lanes: Sequence[ByteLanes]) -> ByteLanes:
        """All lanes of several objects over one model with equal parameters."""
        first = lanes[0]
        if any(x.model is not first.model or x.in_prompt != first.in_prompt for x in lanes):
            raise ValueError("only lanes of one model, in one mode, can be put side by side")
        return cls(
            first.model,
            first.params,
            first.model.kernels.cat([x.state for x in lanes]),
            log_z=np.concatenate([x.log_z for x in lanes]),
            ended=np.concatenate([x.ended for x in lanes]),
            log_dropped=np.concatenate([x.log_dropped for x in lanes]),
            heals=np.concatenate([x.heals for x in lanes]),
            in_prompt=first.in_prompt,
            literal=first.literal,
        )

    async def as_prompt(self, *, literal: bool = False) -> ByteLanes:
        """Lanes that read a prompt: end-of-sequence tokens are ordinary tokens.

        Args:
            literal: leave special tokens out instead, all of them.
        """
        return await self._in_mode(in_prompt=True, literal=literal)

    async def as_text(self) -> ByteLanes:
        """Lanes whose prompt is over: end-of-sequence tokens end the text from here on.

        A token in flight can no longer become an end-of-sequence token, so candidates lose
        that share of their weight; one that the prompt spelled to its end is committed.
        """
        return await self._in_mode(in_prompt=False, literal=False)

    @_one_thread
    async def _in_mode(self, *, in_prompt: bool, literal: bool) -> ByteLanes:
        other = ByteLanes(
            self.model,
            self.params,
            self.state,
            log_z=self.log_z,
            ended=self.ended,
            log_dropped=self.log_dropped,
            heals=self.heals,
            in_prompt=in_prompt,
            literal=literal,
        )
        if np.array_equal(other.cut, self.cut):
            return other
        await self._have_rows()
        kernels = self.model.kernels
        ext = kernels.extensions(self.state, self.cut)
        gone = np.isin(self.model.trie.position[ext.token], other.cut)
        reweighed = kernels.reweigh(self.state, other.cut)
        state = await commit(self.model, reweighed, ext.take(gone))
        state, _ = kernels.select(state, None, -np.inf)  # best first
        return other.replace(state)

    @_one_thread
    async def feed(self, tokens: Sequence[int]) -> ByteLanes:
        """Lanes after exactly these tokens, which begin where a token ends.

        Candidates in the middle of a token are lost; weights gain log p(token | context).
        """
        return await feed(self, tokens)

    # -- parts -------------------------------------------------------------------------

    def _gathered(self, state: BeamState, index: IntArray) -> BeamState:
        """Return some lanes of a state; on the host all its arrays are taken at once."""
        if self._steps is None:
            return self.model.kernels.gather(state, index)
        return unpack(packed_of(state).take(index, axis=1), state.key[index])

    def _cut(self) -> IntArray:
        """Trie positions of the tokens that are no text here."""
        if self.in_prompt:
            return self.model.special_cut if self.literal else NO_CUT
        return self.model.cut(self.params.eos) if self.params.eos else NO_CUT

    async def _have_rows(self, more: IntArray = NO_CUT) -> None:
        """Rows of the candidates themselves (all there, unless some were evicted), and of
        further contexts.

        Under a tight limit what is fetched may evict what a step found before. So a step that
        stops at missing rows asks the next time for all that it ever missed, together; else
        two sets of rows that do not fit side by side would evict each other for ever.
        """
        packed = self._packed
        contexts = self.model.kernels.contexts(self.state) if packed is None else packed[0]
        await self.model.store.ensure(
            np.concatenate([contexts.ravel(), more]) if len(more) else contexts
        )

    async def _have_rows_too(self, wanted: IntArray, missing: IntArray) -> IntArray:
        """`_have_rows` of both; both together."""
        wanted = np.union1d(wanted, missing) if len(wanted) else missing
        await self._have_rows(wanted)
        return wanted

    def _keys_after(self, symbols: IntArray) -> KeyArray:
        """Return generator keys after one more symbol a lane; only random pruning needs them."""
        keys: KeyArray = self.state.key
        return read_keys(keys, symbols) if self.params.unbiased else keys

    def _lossy(self) -> npt.NDArray[np.bool_]:
        """Lanes, once extended, that set a share aside for healing."""
        assert self._ext_dropped is not None
        return self._reserve.lossy(self.log_dropped, self._ext_dropped)
