"""Reading a known text: a few forwards, and the same beam as byte by byte.

1. Tokenise the text as the tokenizer would and ask for the rows all along it: one forward.
2. Run the beam over the text. Where it wants a row that is not there (another way to cut
   the text into tokens), note the context, go on without that candidate, and at the end ask
   for everything noted in one forward.
3. Run again from the first byte at which something was missing, until nothing is.

Each pass settles at least the first byte that was open, and what is read in the end is read
with every row there, so the result does not depend on what was asked for early.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from genlm_bytes_smc.beam.kernels import thin
from genlm_bytes_smc.beam.lanes import ByteLanes
from genlm_bytes_smc.beam.rng import read_keys
from genlm_bytes_smc.beam.state import BeamState, Extensions
from genlm_bytes_smc.lm.contexts import IntArray

NOTHING: IntArray = np.empty(0, dtype=np.int64)


async def read_text(lanes: ByteLanes, text: bytes) -> ByteLanes:
    """The lanes after `text`, pruned before each byte and not after the last.

    Args:
        lanes: N lanes, each of which reads the whole text.
        text: what they read.
    """
    if len(lanes) != 1:
        parts = [await read_text(lanes.gather([n]), text) for n in range(len(lanes))]
        return ByteLanes.cat(parts)
    tree, store = lanes.model.engine.tree, lanes.model.store
    ahead = _canonical(lanes, text)
    at = 0
    with tree.pinned(ahead):
        await store.ensure(ahead)
        while at < len(text) and lanes.log_z[0] > -np.inf:
            await store.ensure(lanes.model.kernels.contexts(lanes.state))
            lanes, read, wanted = _run(lanes, text[at:])
            at += read
            if len(wanted):
                with tree.pinned(wanted):
                    await store.ensure(wanted)
            elif at < len(text):  # a byte that only healing can read, if anything can
                lanes = await lanes.prune().read(text[at])
                at += 1
    return lanes


class _Pass(NamedTuple):
    lanes: ByteLanes
    read: int
    wanted: IntArray


def _run(lanes: ByteLanes, text: bytes) -> _Pass:
    """Read as far as the rows at hand go, and note what is missing further on.

    Returns:
        The lane after the last byte for which nothing was missing, how many bytes that is,
        and the distinct contexts whose rows were missed on the way to the end of the text.
    """
    kernels, params = lanes.model.kernels, lanes.params
    state, log_z, log_dropped = lanes.state, lanes.log_z, lanes.log_dropped
    kept, read = (state, log_dropped), 0
    missed: list[IntArray] = []
    for byte in text:
        symbols = np.array([byte], dtype=np.int64)
        if params.unbiased:
            state = kernels.resample(state, params.K)
            ext = kernels.extensions(state, lanes.cut)
            ext = thin(ext, log_z, params.log_prune_threshold, state.key)
        else:
            state, lost, ext = kernels.open_read(
                state,
                symbols,
                lanes.cut,
                params.log_prune_threshold,
                prune=(params.K, params.log_prune_threshold),
            )
            log_dropped = np.logaddexp(log_dropped, lost)
        log_dropped = np.logaddexp(log_dropped, ext.dropped)
        ext, contexts, missing = _at_hand(lanes, state, ext)
        if len(missing):
            missed.append(missing)
        key = read_keys(state.key, symbols)
        state, log_z = kernels.close_read(state, ext, contexts, symbols, lanes.cut)
        state = state._replace(key=key)
        if log_z[0] == -np.inf:
            break
        if not missed:
            kept, read = (state, log_dropped), read + 1
    if read:
        lanes = lanes.replace(kept[0], log_dropped=kept[1])
    return _Pass(lanes, read, np.unique(np.concatenate(missed)) if missed else NOTHING)


def _at_hand(
    lanes: ByteLanes, state: BeamState, ext: Extensions
) -> tuple[Extensions, IntArray, IntArray]:
    """Extensions whose rows are there, their contexts, and the contexts that are missing."""
    if len(ext.lane) == 0:
        return ext, NOTHING, NOTHING
    model = lanes.model
    above = model.kernels.contexts(state)[ext.lane, ext.cand]
    contexts = model.engine.tree.children(above, ext.token)
    missing = model.store.missing(contexts)
    if len(missing) == 0:
        return ext, contexts, NOTHING
    here = model.store.slot_of[contexts] >= 0
    return ext.take(here), contexts[here], missing


def _canonical(lanes: ByteLanes, text: bytes) -> IntArray:
    """Contexts along the tokenizer's own tokens of `text`; none if it cannot say.

    Only a guess at which rows will be wanted: nothing but cost depends on it.
    """
    contexts = lanes.model.kernels.contexts(lanes.state)
    nodes = lanes.model.kernels.nodes(lanes.state)
    at_root = contexts[nodes == 0]
    tokens = lanes.model.canonical(text)
    if len(at_root) == 0 or not tokens:
        return NOTHING
    tree, depth = lanes.model.engine.tree, int(lanes.model.engine.tree.depth[at_root[0]])
    window = lanes.model.engine.window
    path = [int(at_root[0])]
    for token in tokens if window is None else tokens[: max(0, window - depth)]:
        path.append(tree.child(path[-1], token))
    return np.array(path, dtype=np.int64)
