"""Reading a known text: a few forwards, and the same beam as byte by byte.

1. Ask for the rows along the tokenizer's own tokens of the text: one forward.
2. Run the beam over the text. Where it wants a row that is not there (another way to cut
   the text into tokens), note the context and go on with the row of another context that
   spells the same bytes (`foresight`); at the end ask for everything noted in one forward.
3. Run again from the first byte at which something was missing, until nothing is.

Where nothing spells the same bytes and has its row, a candidate that holds little is left out,
and for another one the row before its last token stands in, a guess that is trusted for some
bytes, more the further the last pass got.

Each pass settles at least the first byte that was open (or the next one is read the slow
way), and what is read in the end is read with every row there, so the result does not depend
on what was asked for early.

`fetch_ahead` does the same for many lanes that will be stepped through texts of their own: it
keeps no result and only fetches the rows, so stepping afterwards finds them in the store and
computes what it would have computed anyway.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import NamedTuple

import numpy as np

from genlm_bytes_smc.beam.deferred_rows import Held
from genlm_bytes_smc.beam.deferred_text import rows_that_matter
from genlm_bytes_smc.beam.foresight import (
    HEAVY,
    HORIZON,
    NOTHING,
    Guide,
    StandIns,
    first_of,
    limits_after,
)
from genlm_bytes_smc.beam.kernels import keep_above, thin, thin_after
from genlm_bytes_smc.beam.lanes import ByteLanes
from genlm_bytes_smc.beam.rng import read_keys
from genlm_bytes_smc.beam.steps import WholeSteps
from genlm_bytes_smc.lm.contexts import IntArray


async def read_text(lanes: ByteLanes, text: bytes) -> ByteLanes:
    """Read `text`, pruning before each byte and not after the last.

    Args:
        lanes: N lanes, each of which reads the whole text.
        text: what they read.
    """
    if len(lanes) != 1:
        parts = [await read_text(lanes.gather([n]), text) for n in range(len(lanes))]
        return ByteLanes.cat(parts)
    tree, store = lanes.model.engine.tree, lanes.model.store
    guide, at, read = Guide(lanes, text), 0, 0
    wanted = NOTHING
    with ExitStack() as pins:
        pins.enter_context(tree.one_thread)
        sure = None
        if _guided(lanes, text):
            sure = await rows_that_matter(lanes, text)
            pins.enter_context(tree.pinned(sure.ids))
        while at < len(text) and lanes.log_z[0] > -np.inf:
            # Only while it is a guide: what is asked for along it is not asked for elsewhere.
            if guide.falls_short(at) and (at == 0 or read >= HORIZON // 2):
                ahead = guide.further(lanes, at)[: store.table.limit // 2]
                pins.enter_context(tree.pinned(ahead))
                await store.ensure(ahead)
            # Together, so that a tight limit on rows cannot evict the one for the other.
            now = np.concatenate([lanes.model.kernels.contexts(lanes.state).ravel(), wanted])
            with tree.pinned(now):
                await store.ensure(now)
            again = len(wanted) > 0
            lanes, read, wanted = _run(lanes, text, at, guide, read, sure)
            at += read
            if at < len(text) and (len(wanted) == 0 or (again and read == 0)):
                # A byte that only healing can read, or rows that do not fit together.
                lanes = await lanes.prune().read(text[at])
                at, wanted = at + 1, NOTHING
    return lanes


class _Pass(NamedTuple):
    lanes: ByteLanes
    read: int
    wanted: IntArray


def _guided(lanes: ByteLanes, text: bytes) -> bool:
    """Return whether extensions that matter for what comes later are to be found first.

    What is thinned at random need not be judged by the next byte alone where all are known.
    """
    params, model = lanes.params, lanes.model
    alive = len(text) > 0 and lanes.log_z[0] > -np.inf
    compiled = model.kernels.steps is not None  # what judges contexts, on a CPU
    return alive and params.unbiased and params.prune_threshold > 0 and compiled


def _run(
    lanes: ByteLanes, text: bytes, start: int, guide: Guide, before: int, sure: Held | None
) -> _Pass:
    """Read from byte `start` as far as the rows at hand go, and note what is missing further on.

    Args:
        lanes: one lane, which has read `start` bytes.
        text: what it reads.
        start: where.
        guide: of the text.
        before: bytes that the pass before read.
        sure: contexts that are not thinned, if any.

    Returns:
        The lane after the last byte for which nothing was missing, how many bytes that is,
        and the distinct contexts whose rows were missed from there on.
    """
    kernels, params = lanes.model.kernels, lanes.params
    if kernels.steps is not None and not params.unbiased:
        return _run_compiled(kernels.steps, lanes, text, start, guide, before)
    state, log_z, log_dropped = lanes.state, lanes.log_z, lanes.log_dropped
    kept, read = (state, log_dropped), 0
    limits = limits_after(before, lanes.model.engine)
    with StandIns(lanes.model, [guide], *limits) as stand_ins:
        for at in range(start, len(text)):
            if stand_ins.done(at):
                break
            symbols = np.array([text[at]], dtype=np.int64)
            if params.unbiased:
                state = kernels.resample(state, params.K)
                ext = kernels.extensions(state, lanes.cut)
                above = kernels.contexts(state)[ext.lane, ext.cand]
                certain = None if sure is None else sure.has(above, ext.token)
                ext = thin_after(
                    kernels, state, ext, symbols, lanes.cut, params.log_prune_threshold, certain
                )
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
            ext, contexts = stand_ins.lend(at, state, ext, kernels.log_z(state))
            key = read_keys(state.key, symbols) if params.unbiased else state.key
            state, log_z = kernels.close_read(state, ext, contexts, symbols, lanes.cut)
            state = state._replace(key=key)
            if log_z[0] == -np.inf:
                break
            if not stand_ins.missed:
                kept, read = (state, log_dropped), read + 1
    if read:
        lanes = lanes.replace(kept[0], log_dropped=kept[1])
    return _Pass(lanes, read, stand_ins.wanted())


def _run_compiled(
    steps: WholeSteps, lanes: ByteLanes, text: bytes, start: int, guide: Guide, before: int
) -> _Pass:
    """`_run` in one compiled call."""
    params = lanes.params
    run = steps.run_text(
        lanes.state,
        float(lanes.log_dropped[0]),
        text[start:],
        guide.known[start:],
        lanes.cut,
        params.K,
        params.log_prune_threshold,
        *limits_after(before, lanes.model.engine),
        HEAVY,
    )
    if run.read:
        lanes = lanes.replace(run.state, log_dropped=run.dropped)
    return _Pass(lanes, run.read, first_of(run.missed, run.at, lanes.model.store))


async def fetch_ahead(lanes: ByteLanes, texts: list[bytes]) -> IntArray:
    """Fetch the rows that stepping lane n through `texts[n]` asks for.

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
