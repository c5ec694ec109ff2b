"""Reading tokens instead of bytes: what a chat template or a caller has cut already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from genlm_bytes_smc.beam.kernels import N_BYTES
from genlm_bytes_smc.beam.rng import read_keys
from genlm_bytes_smc.beam.state import Extensions

if TYPE_CHECKING:
    from genlm_bytes_smc.beam.lanes import ByteLanes


async def feed(lanes: ByteLanes, tokens: Sequence[int]) -> ByteLanes:
    """The lanes after exactly these tokens; see `ByteLanes.feed`.

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
    kernels, store = model.kernels, model.store
    state = await lanes.extended()
    nodes, contexts = kernels.nodes(state), kernels.contexts(state)
    weights = np.asarray(state.logw.tolist(), dtype=np.float64)
    lane, cand = np.nonzero(nodes == 0)
    above = contexts[lane, cand]
    with np.errstate(divide="ignore"):
        p = np.log(np.array([store.prob(int(c), token) for c in above], dtype=np.float64))
    new = model.engine.tree.children(above, np.full(len(above), token, dtype=np.int64))
    ext = Extensions(lane, cand, above, weights[lane, cand] + p, np.full(n, -np.inf))
    await store.ensure(np.concatenate([contexts.ravel(), new]))
    empty = kernels.advance(state, np.full(n, -1, dtype=np.int64), lanes.cut)
    fed = kernels.extend(empty, ext, new)
    fed = fed._replace(key=read_keys(lanes.state.key, np.full(n, token + N_BYTES)))
    fed, _ = kernels.select(fed, None, -np.inf)
    return lanes.replace(fed)
