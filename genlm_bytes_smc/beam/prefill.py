"""Reading a known text: a few forwards, and the same beam as byte by byte.

1. Ask for the rows along the tokenizer's own tokens of the text: one forward.
2. Run the beam over the text. Where it wants a row that is not there (another way to cut
   the text into tokens), note the context and go on with the row of another context that
   spells the same bytes (`substitutes`); at the end ask for everything noted in one forward.
3. Run again from the first byte at which something was missing, until nothing is. The further a
   pass got, the longer the next one trusts a guess.

Each pass settles at least the first byte that was open (or the next one is read the slow
way), and what is read in the end is read with every row there, so the result does not depend
on what was asked for early.

`fetch_ahead` does the same for many lanes that will be stepped through texts of their own: it
keeps no result and only fetches the rows, so stepping afterwards finds them in the store and
computes what it would have computed anyway.
"""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from genlm_bytes_smc.beam.deferred_text import rows_that_matter
from genlm_bytes_smc.beam.foresight import HORIZON, Guide, first_of, limits_after
from genlm_bytes_smc.beam.kernels import NOTHING, Run, Texts
from genlm_bytes_smc.beam.kernels_host import NumbaKernels
from genlm_bytes_smc.beam.lanes import ByteLanes
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
    model, tree, store = lanes.model, lanes.model.engine.tree, lanes.model.store
    texts, at, read, wanted = Texts.of([text]), 0, 0, NOTHING
    guide = Guide(model, lanes.state, text, texts.known[0])
    with ExitStack() as pins:
        pins.enter_context(tree.one_thread)
        sure = None
        if _guided(lanes, text):
            sure = await rows_that_matter(lanes, text)
            pins.enter_context(tree.pinned(sure.ids))
        while at < len(text) and lanes.log_z[0] > -np.inf:
            # Only while it is a guide: what is asked for along it is not asked for elsewhere.
            if guide.falls_short(at) and (at == 0 or read >= HORIZON // 2):
                ahead = guide.further(lanes.state, at)[: store.table.limit // 2]
                pins.enter_context(tree.pinned(ahead))
                await store.ensure(ahead)
            # Together, so that a tight limit on rows cannot evict the one for the other.
            now = np.concatenate([model.kernels.contexts(lanes.state).ravel(), wanted])
            with tree.pinned(now):
                await store.ensure(now)
            again = len(wanted) > 0
            limits = limits_after(read, model.engine)
            run = model.kernels.run_texts(lanes, texts, at, limits, by_steps=False, sure=sure)
            read, at = run.read - at, run.read
            if read:
                lanes = _after(lanes, run)
            wanted = first_of(run.missed, run.at, store)
            if at < len(text) and (len(wanted) == 0 or (again and read == 0)):
                # A byte that only healing can read, or rows that do not fit together.
                lanes = await lanes.prune().read(text[at])
                at, wanted = at + 1, NOTHING
    return lanes


def _after(lanes: ByteLanes, run: Run) -> ByteLanes:
    return lanes.replace(run.state, log_z=run.log_z, log_dropped=run.log_dropped)


def _guided(lanes: ByteLanes, text: bytes) -> bool:
    """Return whether extensions that matter for what comes later are to be found first.

    What is thinned at random need not be judged by the next byte alone where all are known.
    """
    alive = len(text) > 0 and lanes.log_z[0] > -np.inf
    on_host = isinstance(lanes.model.kernels, NumbaKernels)  # what judges contexts
    return alive and lanes.params.unbiased and lanes.params.prune_threshold > 0 and on_host


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
    model, tree, store = lanes.model, lanes.model.engine.tree, lanes.model.store
    known = Texts.of(texts)
    guides = [Guide(model, lanes.state, t, known.known[n], n) for n, t in enumerate(texts)]
    fetched = [NOTHING]
    with ExitStack() as pins:
        pins.enter_context(tree.one_thread)
        at, read, wanted = 0, 0, NOTHING
        while True:
            if at == 0 or read >= HORIZON // 2:
                further = [g.further(lanes.state, at) for g in guides if g.falls_short(at)]
                wanted = np.unique(np.concatenate([wanted, *further]))
            now = model.kernels.contexts(lanes.state).ravel()
            room = store.table.limit // 2 - sum(map(len, fetched)) - len(now)
            wanted = wanted[: max(0, room)]  # more would evict what is stepped on first
            if len(wanted) == 0:
                break
            pins.enter_context(tree.pinned(wanted))
            await store.ensure(np.concatenate([now, wanted]))
            fetched.append(wanted)
            limits = limits_after(read, model.engine)
            run = model.kernels.run_texts(lanes, known, at, limits, by_steps=True, sure=None)
            lanes, read, at = _after(lanes, run), run.read - at, run.read
            wanted = first_of(run.missed, run.at, store)
    return np.concatenate(fetched)
