"""Reading known tokens, as a prompt of token ids or chat messages gives them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from genlm_bytes_smc.beam.kernels import N_BYTES
from genlm_bytes_smc.beam.lanes import ByteLanes
from genlm_bytes_smc.beam.rng import read_keys
from genlm_bytes_smc.beam.state import Extensions


async def feed(lanes: ByteLanes, tokens: Sequence[int]) -> ByteLanes:
    """Lanes after exactly these tokens, which begin where a token ends.

    Candidates in the middle of a token are lost; weights gain log p(token | context).

    Args:
        lanes: N lanes, each of which reads all tokens.
        tokens: their ids.

    Raises:
        ValueError: an id that the vocabulary lacks.
    """
    size = len(lanes.model.vocab)
    for token in tokens:
        if not 0 <= token < size:
            raise ValueError(f"token ids run from 0 to {size - 1}, got {token}")
    await _foresee(lanes, tokens)
    for token in tokens:
        lanes = await _feed(lanes, token)
    return lanes


async def _foresee(lanes: ByteLanes, tokens: Sequence[int]) -> None:
    """Rows all along a known continuation of a lone candidate, in one forward."""
    model = lanes.model
    contexts = model.kernels.contexts(lanes.state)
    if contexts.size == 1 and len(tokens) > 1:
        at = int(contexts.ravel()[0])
        ahead = model.engine.tree.along(at, tokens)
        await model.store.ensure(np.concatenate([[at], ahead]))


async def _feed(lanes: ByteLanes, token: int) -> ByteLanes:
    kernels, store, tree = lanes.model.kernels, lanes.model.store, lanes.model.engine.tree
    state = await lanes.extended()
    nodes, contexts = kernels.nodes(state), kernels.contexts(state)
    weights = np.asarray(state.logw.tolist(), dtype=np.float64)
    lane, cand = np.nonzero(nodes == 0)
    above = contexts[lane, cand]
    with np.errstate(divide="ignore"):
        p = np.log(np.array([store.prob(int(c), token) for c in above], dtype=np.float64))
    new = tree.children(above, np.full(len(above), token, dtype=np.int64))
    ext = Extensions(lane, cand, above, weights[lane, cand] + p, np.full(len(lanes), -np.inf))
    await store.ensure(np.concatenate([contexts.ravel(), new]))
    empty = kernels.advance(state, np.full(len(lanes), -1, dtype=np.int64), lanes.cut)
    fed = kernels.extend(empty, ext, new)
    fed = fed._replace(key=read_keys(lanes.state.key, np.full(len(lanes), token + N_BYTES)))
    fed, _ = kernels.select(fed, None, -np.inf)
    return lanes.replace(fed)
