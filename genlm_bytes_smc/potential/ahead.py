"""Rows for a known text, in a few forwards instead of one a byte.

Stepping through a text asks for rows byte by byte. When the text is known, most of what it
will ask for can be foreseen:

1. the rows along the tokenizer's own tokens of the text: one forward;
2. a dry run over the text with the rows at hand, which leaves out every candidate whose row
   is missing and notes its context, until some bytes after the first; everything noted is
   one forward. The next dry run begins at the first byte where something was missing.

Only rows are fetched and no result is kept: stepping afterwards finds its rows in the store
and computes what it would have computed anyway.
"""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from genlm_bytes_smc.beam.kernels import keep_above, thin
from genlm_bytes_smc.beam.lanes import ByteLanes
from genlm_bytes_smc.beam.rng import read_keys
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.engine import RowEngine

HORIZON = 16
"""Bytes that a dry run goes on after the first missing row. What is missed further on is
guessed from a beam that has lost candidates; measured with the bundled model at K=5 and
threshold 0, no limit takes a third of the forwards away and adds a quarter to the rows."""

NOTHING: IntArray = np.empty(0, dtype=np.int64)


async def fetch_ahead(lanes: ByteLanes, texts: list[bytes]) -> IntArray:
    """Have the rows that stepping lane n through `texts[n]` asks for.

    What comes after a byte that only healing can read is not foreseen.

    Args:
        lanes: N lanes.
        texts: N texts, whose lengths may differ.

    Returns:
        Ids of the contexts fetched, int64[m], for the caller to pin until it has stepped.
    """
    tree, store = lanes.model.engine.tree, lanes.model.store
    fetched = [_canonical(lanes, texts)]
    with ExitStack() as pins:
        at, wanted = 0, fetched[0]
        while len(wanted):
            pins.enter_context(tree.pinned(wanted))
            await store.ensure(wanted)
            await store.ensure(lanes.model.kernels.contexts(lanes.state))
            lanes, at, wanted = _dry_run(lanes, texts, at)
            fetched.append(wanted)
    return np.concatenate(fetched)


def _dry_run(lanes: ByteLanes, texts: list[bytes], at: int) -> tuple[ByteLanes, int, IntArray]:
    """Step through `texts` from byte `at` with the rows at hand.

    Returns:
        The lanes before the first byte for which a row was missing, the place of that byte,
        and the distinct contexts whose rows were missed from there on.
    """
    model, params, cut = lanes.model, lanes.params, lanes.cut
    kernels, store = model.kernels, model.store
    state, log_z = lanes.state, lanes.log_z
    kept, missed = (state, log_z, at), list[IntArray]()
    for i in range(at, max(map(len, texts))):
        symbols = np.array([t[i] if i < len(t) else -1 for t in texts], dtype=np.int64)
        ext = kernels.extensions(state, cut)
        if params.unbiased:
            ext = thin(ext, log_z, params.log_prune_threshold, state.key)
        else:
            ext = keep_above(ext, log_z, params.log_prune_threshold)
        if len(ext.lane):
            contexts = kernels.contexts(state)
            new = model.engine.tree.children(contexts[ext.lane, ext.cand], ext.token)
            missing = store.missing(new)
            if len(missing):
                missed.append(_inside(model.engine, missing))
                here = store.slot_of[new] >= 0
                ext, new = ext.take(here), new[here]
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
        if not missed:
            kept = (state, log_z, i + 1)
        elif i - kept[2] >= HORIZON:
            break
    wanted = np.unique(np.concatenate(missed)) if missed else NOTHING
    return lanes.replace(kept[0], log_z=kept[1]), kept[2], wanted


def _inside(engine: RowEngine, contexts: IntArray) -> IntArray:
    """The contexts that fit the model's window; stepping may never want the others."""
    if engine.window is None:
        return contexts
    return contexts[engine.tree.depth[contexts] <= engine.window]


def _canonical(lanes: ByteLanes, texts: list[bytes]) -> IntArray:
    """Contexts along the tokenizer's own tokens of each text; none where it cannot say."""
    model = lanes.model
    tree, window = model.engine.tree, model.engine.window
    nodes, contexts = model.kernels.nodes(lanes.state), model.kernels.contexts(lanes.state)
    found: list[int] = []
    for n, text in enumerate(texts):
        places = np.flatnonzero(nodes[n] >= 0)
        if len(places) == 0:
            continue
        best = places[0]  # candidates stand best first
        at = int(contexts[n, best])
        tokens = model.canonical(model.trie.spell(int(nodes[n, best])) + text)
        room = len(tokens) if window is None else max(0, window - int(tree.depth[at]))
        for token in tokens[:room]:
            at = tree.child(at, token)
            found.append(at)
    return np.unique(np.array(found, dtype=np.int64))
