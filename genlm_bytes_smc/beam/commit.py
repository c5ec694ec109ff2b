"""Tokens that end: the contexts after them, and the candidates there, with their rows."""

from __future__ import annotations

import numpy as np

from genlm_bytes_smc.beam.model import ByteModel
from genlm_bytes_smc.beam.state import BeamState, Extensions
from genlm_bytes_smc.lm.contexts import IntArray

NO_CONTEXTS: IntArray = np.empty(0, dtype=np.int64)


async def contexts_after(model: ByteModel, state: BeamState, ext: Extensions) -> IntArray:
    """Contexts of the extensions of `state`, int64[E]; their rows are there, and the state's."""
    if len(ext.lane) == 0:
        return NO_CONTEXTS
    contexts = model.kernels.contexts(state)
    new = model.engine.tree.children(contexts[ext.lane, ext.cand], ext.token)
    await model.store.ensure(np.concatenate([contexts.ravel(), new]))
    return new


async def commit(model: ByteModel, state: BeamState, ext: Extensions) -> BeamState:
    """`state` with the extensions as candidates, their rows fetched."""
    if len(ext.lane) == 0:
        return state
    return model.kernels.extend(state, ext, await contexts_after(model, state, ext))
