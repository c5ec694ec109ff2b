"""How lanes read where no compiled step does it whole: a byte, or exactly one token.

First the tokens that end (`commit`), then a known byte (`read_topk`, `read_unbiased`), then
tokens that a chat template or a caller has cut already (`feed`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.beam.kernels import N_BYTES, keep_above
from genlm_bytes_smc.beam.model import NO_CUT, ByteModel
from genlm_bytes_smc.beam.rng import KeyArray, read_keys
from genlm_bytes_smc.beam.state import BeamState, Extensions
from genlm_bytes_smc.lm.contexts import IntArray

if TYPE_CHECKING:
    from genlm_bytes_smc.beam.lanes import ByteLanes

FloatArray = npt.NDArray[np.float64]


class Reading(NamedTuple):
    """Candidates after one byte a lane.

    Attributes:
        state: the candidates, best first.
        log_z: float64[N], their weights, nats; -inf where none could read the byte.
        log_dropped: float64[N], log of all the mass dropped so far, nats.
    """

    state: BeamState
    log_z: FloatArray
    log_dropped: FloatArray


async def contexts_after(model: ByteModel, state: BeamState, ext: Extensions) -> IntArray:
    """Contexts of the extensions of `state`, int64[E]; their rows are there, and the state's."""
    if len(ext.lane) == 0:
        return NO_CUT
    contexts = model.kernels.contexts(state)
    new = model.engine.tree.children(contexts[ext.lane, ext.cand], ext.token)
    await model.store.ensure(np.concatenate([contexts.ravel(), new]))
    return new


async def commit(model: ByteModel, state: BeamState, ext: Extensions) -> BeamState:
    """`state` with the extensions as candidates, their rows fetched."""
    if len(ext.lane) == 0:
        return state
    return model.kernels.extend(state, ext, await contexts_after(model, state, ext))


async def read_topk(
    model: ByteModel,
    state: BeamState,
    log_dropped: FloatArray,
    bytes_: IntArray,
    cut: IntArray,
    log_threshold: float,
) -> Reading:
    """Read one byte a lane, extending only what can read it.

    Args:
        model: the byte model.
        state: the candidates, whose rows are there.
        log_dropped: float64[N], log mass dropped before, nats.
        bytes_: int64[N]; -1 empties a lane.
        cut: trie positions that are no text.
        log_threshold: log share of the candidates that can read the byte, below which
            extensions are dropped.
    """
    kernels = model.kernels
    state, _, ext = kernels.open_read(state, bytes_, cut, log_threshold, prune=None)
    contexts = await contexts_after(model, state, ext)
    state, log_z = kernels.close_read(state, ext, contexts, bytes_, cut)
    return Reading(state, log_z, np.logaddexp(log_dropped, ext.dropped))


def read_unbiased(
    model: ByteModel,
    extended: BeamState,
    key: KeyArray,
    log_dropped: FloatArray,
    bytes_: IntArray,
    cut: IntArray,
) -> Reading:
    """Read one byte a lane in candidates that were extended at random: nothing is dropped.

    Args:
        model: the byte model.
        extended: the candidates with their extensions.
        key: uint64[N], generator keys before the byte.
        log_dropped: float64[N], as it stays.
        bytes_: int64[N]; -1 empties a lane.
        cut: trie positions that are no text.
    """
    kernels = model.kernels
    state, _ = kernels.select(kernels.advance(extended, bytes_, cut), None, -np.inf)
    log_z = kernels.log_z(state)
    return Reading(state._replace(key=read_keys(key, bytes_)), log_z, log_dropped)


async def feed(lanes: ByteLanes, tokens: Sequence[int]) -> ByteLanes:
    """Read exactly these tokens; see `ByteLanes.feed`.

    Raises:
        ValueError: no token of the vocabulary.
    """
    size = len(lanes.model.vocab)
    for token in tokens:
        if not 0 <= token < size:
            raise ValueError(f"token ids run from 0 to {size - 1}, got {token}")
    await _foresee(lanes, tokens)
    for token in tokens:
        lanes = await _feed_one(lanes, token)
    return lanes


async def _foresee(lanes: ByteLanes, tokens: Sequence[int]) -> None:
    """Rows all along a known continuation of a lone candidate, in one forward."""
    contexts = lanes.model.kernels.contexts(lanes.state)
    if contexts.size == 1 and len(tokens) > 1:
        at = int(contexts.ravel()[0])
        ahead = lanes.model.engine.tree.along(at, tokens)
        await lanes.model.store.ensure(np.concatenate([[at], ahead]))


async def _feed_one(lanes: ByteLanes, token: int) -> ByteLanes:
    model, n = lanes.model, len(lanes)
    kernels = model.kernels
    state, dropped = await _extended(lanes, token)
    ext = _followed(model, state, token)
    contexts = kernels.contexts(state)
    new = model.engine.tree.children(ext.token, np.full(len(ext.token), token, dtype=np.int64))
    await model.store.ensure(np.concatenate([contexts.ravel(), new]))
    empty = kernels.advance(state, np.full(n, -1, dtype=np.int64), lanes.cut)
    fed = kernels.extend(empty, ext, new)
    fed = fed._replace(key=read_keys(lanes.state.key, np.full(n, token + N_BYTES)))
    fed, _ = kernels.select(fed, None, -np.inf)
    return lanes.replace(fed, log_dropped=np.logaddexp(lanes.log_dropped, dropped))


async def _extended(lanes: ByteLanes, token: int) -> tuple[BeamState, FloatArray]:
    """Return the candidates with their extensions, and the log mass dropped, float64[N].

    With top-K pruning the threshold is taken against the candidates that can take the token,
    as `ByteLanes.read` takes it against those that can read its byte: the others are lost.
    """
    params, model = lanes.params, lanes.model
    if params.unbiased:
        return await lanes.extended(), np.full(len(lanes), -np.inf)
    await model.store.ensure(model.kernels.contexts(lanes.state))
    stand = _followed(model, lanes.state, token)
    able = np.full(len(lanes), -np.inf)
    np.logaddexp.at(able, stand.lane, stand.logw)
    ext = model.kernels.extensions(lanes.state, lanes.cut)
    ext = keep_above(ext, able, params.log_prune_threshold)
    return await commit(model, lanes.state, ext), ext.dropped


def _followed(model: ByteModel, state: BeamState, token: int) -> Extensions:
    """Return the candidates at the root followed by `token`; or, without one, their contexts."""
    nodes, contexts = model.kernels.nodes(state), model.kernels.contexts(state)
    weights = np.asarray(state.logw.tolist(), dtype=np.float64).reshape(nodes.shape)
    lane, cand = np.nonzero(nodes == 0)
    above = contexts[lane, cand]
    with np.errstate(divide="ignore"):
        p = np.log(np.array([model.store.prob(int(c), token) for c in above], dtype=np.float64))
    nothing = np.full(len(nodes), -np.inf)
    return Extensions(lane, cand, above, weights[lane, cand] + p, nothing)
