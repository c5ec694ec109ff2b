"""Tokens that a chat template or a caller has cut already, and tokens that are no text any more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.beam.admission import keep_above
from genlm_bytes_smc.beam.kernels import Look, commit
from genlm_bytes_smc.beam.model import ByteModel
from genlm_bytes_smc.beam.rng import read_keys
from genlm_bytes_smc.beam.rules import Rules
from genlm_bytes_smc.beam.state import Extensions, State
from genlm_bytes_smc.beam.symbols import N_BYTES

FloatArray = npt.NDArray[np.float64]


async def foresee(model: ByteModel, state: State, tokens: Sequence[int]) -> None:
    """Check tokens, and fetch the rows all along a lone candidate's, in one forward.

    Raises:
        ValueError: no token of the vocabulary.
    """
    size = len(model.vocab)
    for token in tokens:
        if not 0 <= token < size:
            raise ValueError(f"token ids run from 0 to {size - 1}, got {token}")
    contexts = model.kernels.contexts(state)
    if contexts.size == 1 and len(tokens) > 1:
        at = int(contexts.ravel()[0])
        ahead = model.engine.tree.along(at, tokens)
        await model.store.ensure(np.concatenate([[at], ahead]))


async def feed_token(
    model: ByteModel, state: State, look: Look, cut: npt.NDArray[np.int64], token: int
) -> State:
    """Return the lanes after a token, best first.

    Args:
        model: the byte model.
        state: the candidates before it; those in the middle of a token are lost.
        look: `extended` is the same with their extensions.
        cut: trie positions that are no text.
        token: its id.
    """
    kernels, n = model.kernels, len(state.key)
    ext = _followed(model, look.extended, token)
    contexts = kernels.contexts(look.extended)
    new = model.engine.tree.children(ext.token, np.full(len(ext.token), token, dtype=np.int64))
    await model.store.ensure(np.concatenate([contexts.ravel(), new]))
    empty = kernels.advance(look.extended, np.full(n, -1, dtype=np.int64), cut)
    fed = kernels.extend(empty, ext, new)
    fed = fed._replace(key=read_keys(state.key, np.full(n, token + N_BYTES)))
    return kernels.select(fed, None, -np.inf)[0]


async def under(
    model: ByteModel,
    state: State,
    cut: npt.NDArray[np.int64],
    new_cut: npt.NDArray[np.int64],
) -> State:
    """Return the candidates under another `cut`, best first.

    Those in flight lose the share of the tokens that are no text any more; one whose token was
    spelled to its end is committed.
    """
    kernels = model.kernels
    await model.store.ensure(kernels.contexts(state))
    ext = kernels.extensions(state, cut)
    gone = np.isin(model.trie.position[ext.token], new_cut)
    state = await commit(kernels, kernels.reweigh(state, new_cut), ext.take(gone))
    return kernels.select(state, None, -np.inf)[0]


async def look_before(model: ByteModel, state: State, rules: Rules, token: int) -> Look:
    """Return the candidates with their extensions, admitted by what can take a token.

    The threshold is taken against the candidates that can take it, as `ByteLanes.read` takes it
    against those that can read its byte: the others are lost.
    """
    await model.store.ensure(model.kernels.contexts(state))
    stand = _followed(model, state, token)
    able = np.full(len(state.key), -np.inf)
    np.logaddexp.at(able, stand.lane, stand.logw)
    ext = model.kernels.extensions(state, rules.cut)
    ext = keep_above(ext, able, rules.log_threshold)
    return Look(await commit(model.kernels, state, ext), ext.dropped)


def _followed(model: ByteModel, state: State, token: int) -> Extensions:
    """Return the candidates at the root followed by `token`; or, without one, their contexts."""
    nodes, contexts = model.kernels.nodes(state), model.kernels.contexts(state)
    weights = np.asarray(state.logw.tolist(), dtype=np.float64).reshape(nodes.shape)
    lane, cand = np.nonzero(nodes == 0)
    above = contexts[lane, cand]
    with np.errstate(divide="ignore"):
        p = np.log(np.array([model.store.prob(int(c), token) for c in above], dtype=np.float64))
    nothing = np.full(len(nodes), -np.inf)
    return Extensions(lane, cand, above, weights[lane, cand] + p, nothing)
