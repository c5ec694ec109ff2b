"""Reading a known text: a few forwards, and the same beam as byte by byte.

1. Tokenise the beginning of the text as the tokenizer would and ask for the rows all along it:
   one forward.
2. Run the beam over the text. Where it wants a row that is not there (another way to cut
   the text into tokens), note the context, go on without that candidate, and at the end ask
   for everything noted in one forward.
3. Run again from the first byte at which something was missing, until nothing is.

Where a missed candidate holds much of the weight, the rows asked for have ended or the text has
left the tokenizer's path: the rows along the text after that candidate are asked for with it.
How far the tokenizer is followed then, and how far the beam looks beyond a miss, is twice as far
as the last guess held. So a text that keeps to its tokenizer is read in stretches that double,
and one that does not costs few rows for nothing.

Each pass settles at least the first byte that was open (or the next one is read the slow
way), and what is read in the end is read with every row there, so the result does not depend
on what was asked for early.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from genlm_bytes_smc.beam.kernels import thin
from genlm_bytes_smc.beam.lanes import ByteLanes
from genlm_bytes_smc.beam.rng import read_keys
from genlm_bytes_smc.beam.state import BeamState, Extensions
from genlm_bytes_smc.beam.steps import WholeSteps
from genlm_bytes_smc.lm.contexts import IntArray

NOTHING: IntArray = np.empty(0, dtype=np.int64)

_HEAVY = 0.5  # share of the beam from which a missed candidate is followed further,
_FIRST = 256  # bytes along which the tokenizer is followed at first, and most to look beyond a miss
_REACH = 8  # fewest bytes to look ahead, and most below the next threshold, at which a beam is
_NARROW = 0.02  # full of candidates that will not last: what it wants further on is mostly not used


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
    ahead = _canonical(lanes, text[:_FIRST])
    at = 0
    with tree.pinned(ahead):
        await store.ensure(ahead[: store.table.limit // 2])
        most = _FIRST if lanes.params.prune_threshold >= _NARROW else _REACH
        wanted, reach, horizon = NOTHING, _REACH, most
        while at < len(text) and lanes.log_z[0] > -np.inf:
            # Together, so that a tight limit on rows cannot evict the one for the other.
            now = np.concatenate([lanes.model.kernels.contexts(lanes.state).ravel(), wanted])
            with tree.pinned(now):
                await store.ensure(now)
            again = len(wanted) > 0
            lanes, read, wanted = _run(lanes, text[at:], reach, horizon)
            at += read
            reach = max(_REACH, 2 * read)
            horizon = min(reach, most)
            if at < len(text) and (len(wanted) == 0 or (again and read == 0)):
                # A byte that only healing can read, or rows that do not fit together.
                lanes = await lanes.prune().read(text[at])
                at, wanted = at + 1, NOTHING
    return lanes


class _Pass(NamedTuple):
    lanes: ByteLanes
    read: int
    wanted: IntArray


def _run(lanes: ByteLanes, text: bytes, reach: int, horizon: int) -> _Pass:
    """Read as far as the rows at hand go, and note what is missing up to `horizon` bytes on.

    Returns:
        The lane after the last byte for which nothing was missing, how many bytes that is,
        and the distinct contexts whose rows were missed on the way to the end of the text.
    """
    kernels, params = lanes.model.kernels, lanes.params
    if kernels.steps is not None and not params.unbiased:
        return _run_compiled(kernels.steps, lanes, text, reach, horizon)
    state, log_z, log_dropped = lanes.state, lanes.log_z, lanes.log_dropped
    kept, read = (state, log_dropped), 0
    missed: list[IntArray] = []
    for at, byte in enumerate(text):
        if missed and at > read + horizon:
            break
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
        ext, contexts, missing, heavy = _at_hand(lanes, state, ext)
        if heavy:  # without it the beam is another: what it would want further on is no guide
            further = text[at : at + max(reach, 2 * read)]
            missed.append(np.concatenate([missing, *(_along(lanes, c, further) for c in heavy)]))
            break
        if len(missing):
            missed.append(missing)
        key = read_keys(state.key, symbols) if params.unbiased else state.key
        state, log_z = kernels.close_read(state, ext, contexts, symbols, lanes.cut)
        state = state._replace(key=key)
        if log_z[0] == -np.inf:
            break
        if not missed:
            kept, read = (state, log_dropped), read + 1
    if read:
        lanes = lanes.replace(kept[0], log_dropped=kept[1])
    return _Pass(lanes, read, _first(missed, lanes.model.store.table.limit // 2))


def _run_compiled(
    steps: WholeSteps, lanes: ByteLanes, text: bytes, reach: int, horizon: int
) -> _Pass:
    """`_run` in one compiled call."""
    params = lanes.params
    run = steps.run_text(
        lanes.state,
        float(lanes.log_dropped[0]),
        text,
        lanes.cut,
        params.K,
        params.log_prune_threshold,
        horizon,
        _HEAVY,
    )
    if run.read:
        lanes = lanes.replace(run.state, log_dropped=run.dropped)
    missed = np.split(run.missed, 1 + np.flatnonzero(np.diff(run.at))) if len(run.missed) else []
    if len(run.heavy):
        at = int(run.at[-1])
        further = text[at : at + max(reach, 2 * run.read)]
        along = [_along(lanes, c, further) for c in run.heavy.tolist()]
        missed[-1] = np.concatenate([missed[-1], *along])
    return _Pass(lanes, run.read, _first(missed, lanes.model.store.table.limit // 2))


def _first(missed: list[IntArray], most: int) -> IntArray:
    """Distinct missed contexts: those of the first byte, and of later ones up to `most`."""
    if not missed:
        return NOTHING
    count = 1
    while count < len(missed) and sum(map(len, missed[: count + 1])) <= most:
        count += 1
    return np.unique(np.concatenate(missed[:count]))


def _at_hand(
    lanes: ByteLanes, state: BeamState, ext: Extensions
) -> tuple[Extensions, IntArray, IntArray, list[int]]:
    """Extensions whose rows are there, their contexts; the contexts that are missing, and
    which of those hold much of the weight."""
    if len(ext.lane) == 0:
        return ext, NOTHING, NOTHING, []
    model = lanes.model
    above = model.kernels.contexts(state)[ext.lane, ext.cand]
    contexts = model.engine.tree.children(above, ext.token)
    missing = model.store.missing(contexts)
    if len(missing) == 0:
        return ext, contexts, NOTHING, []
    here = model.store.slot_of[contexts] >= 0
    share = np.exp(ext.logw - model.kernels.log_z(state)[0])
    return ext.take(here), contexts[here], missing, contexts[~here & (share > _HEAVY)].tolist()


def _canonical(lanes: ByteLanes, text: bytes) -> IntArray:
    """Contexts along the tokenizer's own tokens of `text`; none if it cannot say.

    Only a guess at which rows will be wanted: nothing but cost depends on it.
    """
    contexts = lanes.model.kernels.contexts(lanes.state)
    at_root = contexts[lanes.model.kernels.nodes(lanes.state) == 0]
    return _along(lanes, int(at_root[0]), text) if len(at_root) else NOTHING


def _along(lanes: ByteLanes, context: int, text: bytes) -> IntArray:
    """`context` and those along the tokenizer's own tokens of `text` after it."""
    tree, window = lanes.model.engine.tree, lanes.model.engine.window
    room = None if window is None else max(0, window - int(tree.depth[context]))
    return np.concatenate([[context], tree.along(context, lanes.model.canonical(text)[:room])])
