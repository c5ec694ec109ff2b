"""Rows for a known text, in a few forwards instead of one a byte.

Stepping through a text asks for rows byte by byte. When the text is known, most of what it
will ask for can be foreseen:

1. the rows along the tokenizer's own tokens of the text: one forward;
2. a dry run over the text with the rows at hand, in which others stand in for missing ones
   (`foresight`): everything noted is one forward. The next dry run begins at the first byte
   where something was missing.

Only rows are fetched and no result is kept: stepping afterwards finds its rows in the store
and computes what it would have computed anyway.
"""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from genlm_bytes_smc.beam.foresight import HORIZON, NOTHING, Guide, StandIns, limits_after
from genlm_bytes_smc.beam.kernels import keep_above, thin
from genlm_bytes_smc.beam.lanes import ByteLanes
from genlm_bytes_smc.beam.rng import read_keys
from genlm_bytes_smc.lm.contexts import IntArray


async def fetch_ahead(lanes: ByteLanes, texts: list[bytes]) -> IntArray:
    """Have the rows that stepping lane n through `texts[n]` asks for.

    What comes after a byte that only healing can read is not foreseen, nor more rows than half
    the store holds.

    Args:
        lanes: N lanes.
        texts: N texts, whose lengths may differ.

    Returns:
        Ids of the contexts fetched, int64[m], for the caller to pin until it has stepped.
    """
    tree, store = lanes.model.engine.tree, lanes.model.store
    guides = [Guide(lanes, text, n) for n, text in enumerate(texts)]
    fetched = [NOTHING]
    with ExitStack() as pins:
        pins.enter_context(tree.one_thread)
        at, read, wanted = 0, 0, NOTHING
        while True:
            if at == 0 or read >= HORIZON // 2:
                further = [g.further(lanes, at) for g in guides if g.falls_short(at)]
                wanted = np.unique(np.concatenate([wanted, *further]))
            now = lanes.model.kernels.contexts(lanes.state).ravel()
            room = store.table.limit // 2 - sum(map(len, fetched)) - len(now)
            wanted = wanted[: max(0, room)]  # more would evict what is stepped on first
            if len(wanted) == 0:
                break
            pins.enter_context(tree.pinned(wanted))
            await store.ensure(np.concatenate([now, wanted]))
            fetched.append(wanted)
            before = at
            lanes, at, wanted = _dry_run(lanes, texts, at, guides, read)
            read = at - before
    return np.concatenate(fetched)


def _dry_run(
    lanes: ByteLanes, texts: list[bytes], start: int, guides: list[Guide], before: int
) -> tuple[ByteLanes, int, IntArray]:
    """Step through `texts` from byte `start` with the rows at hand; the last time it read `before`.

    Returns:
        The lanes before the first byte for which a row was missing, the place of that byte,
        and the distinct contexts whose rows were missed from there on.
    """
    model, params, cut = lanes.model, lanes.params, lanes.cut
    kernels = model.kernels
    state, log_z = lanes.state, lanes.log_z
    kept = (state, log_z, start)
    limits = limits_after(before, model.engine)
    with StandIns(model, guides, *limits) as stand_ins:
        for i in range(start, max(map(len, texts))):
            if stand_ins.done(i):
                break
            symbols = np.array([t[i] if i < len(t) else -1 for t in texts], dtype=np.int64)
            ext = kernels.extensions(state, cut)
            if params.unbiased:
                ext = thin(ext, log_z, params.log_prune_threshold, state.key)
            else:
                ext = keep_above(ext, log_z, params.log_prune_threshold, within=True)
            ext, new = stand_ins.lend(i, state, ext, log_z)
            if len(ext.lane):
                state = kernels.extend(state, ext, new)
            key = read_keys(state.key, symbols)
            state = kernels.advance(state, symbols, cut)._replace(key=key)
            if params.unbiased:
                state = kernels.resample(state, params.K)
            else:
                state, _ = kernels.select(state, params.K, params.log_prune_threshold)
            log_z = kernels.log_z(state)
            if not (log_z > -np.inf).any():
                break
            if not stand_ins.missed:
                kept = (state, log_z, i + 1)
    return lanes.replace(kept[0], log_z=kept[1]), kept[2], stand_ins.wanted()
