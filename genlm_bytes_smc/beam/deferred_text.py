"""Read texts that are known in advance with deferred pruning: few forwards, all lanes at once.

1. Fetch the rows along the tokenizer's own tokens of each text: one forward.
2. Read the texts with the rows at hand. A context whose row is wanted and missing is noted, and
   rides on the rows of its position as any deferred context does.
3. Fetch everything noted in one forward, and read again from the beginning, until nothing is
   noted that may matter.

Every context whose row is at hand is used. The text after a context thus speaks for or against
it, so what is noted is judged against better and better estimates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from genlm_bytes_smc.beam.deferred import DeferredLanes
from genlm_bytes_smc.beam.deferred_nodes import Held, Nodes
from genlm_bytes_smc.beam.deferred_numba import (
    ABOVE,
    CTX,
    FLIGHT,
    NODE,
    NOT_NOW,
    OWN,
    POS,
    TEXT,
    TOKEN,
    WEIGHT,
)
from genlm_bytes_smc.beam.lanes import ByteLanes
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.beam.state import FloatArray, padded
from genlm_bytes_smc.lm.contexts import IntArray

SHORT = 128  # bytes up to which a text is read again while a missing row is heavy
HEAVY = 0.01  # estimated share of its lane's mass from which on a missing row is heavy
MOST_READINGS = 30  # of a short text
STRETCH = 4096  # bytes of a text that are read together, at most


async def read_texts(
    lanes: DeferredLanes, texts: Sequence[bytes], used: list[IntArray] | None = None
) -> tuple[DeferredLanes, list[FloatArray]]:
    """Read N texts, whose lengths may differ, one in each of N lanes.

    Args:
        lanes, texts: N each.
        used: a list to which the contexts are appended whose rows were used. Short texts are
            then read until no row is missing.

    Returns:
        The lanes after their texts, and `log_z` after each byte of each text, nats: float64[bytes],
        and -inf from the first byte on that nothing could read.

    Raises:
        ContextTooLongError: a text does not fit the model's window.
    """
    limit, n = lanes.model.store.table.limit, len(lanes)
    if n > 1 and sum(map(len, texts)) > limit // 2:  # their rows may not be held together
        halves = (slice(n // 2), slice(n // 2, n))
        parts = [await read_texts(lanes.gather(np.arange(n)[h]), texts[h], used) for h in halves]
        return DeferredLanes.cat([p for p, _ in parts]), [w for _, ws in parts for w in ws]
    stretch = min(max(limit // 4, 16), STRETCH)
    weights = np.full((max(map(len, texts)), n), -np.inf)
    for at in range(0, len(weights), stretch):
        part = [text[at : at + stretch] for text in texts]
        lanes = await _read_stretch(lanes, part, used, weights[at : at + stretch])
    return lanes, [weights[: len(text), i] for i, text in enumerate(texts)]


async def rows_that_matter(lanes: ByteLanes, text: bytes) -> Held:
    """Return the contexts whose rows matter when one lane of another pruning reads a text.

    They are found by reading it with deferred pruning, and depend on the lane's candidates and on
    the text alone.
    """
    used: list[IntArray] = []
    await read_texts(from_candidates(lanes), [text], used)
    return Held(lanes.model, np.concatenate(used))


def from_candidates(lanes: ByteLanes) -> DeferredLanes:
    """Return one deferred lane with the candidates of a lane on a CPU."""
    model = lanes.model
    state = lanes.state
    ctx, node, logu, logw = state.ctx[0], state.node[0], state.logu[0], state.logw[0]
    places = np.flatnonzero(node >= 0)
    partials = [model.trie.spell(int(n)) for n in node[places]]
    longest = max(partials, key=len, default=b"")
    tail = np.frombuffer(longest[-TEXT:], dtype=np.uint8)
    nodes = Nodes.first(1, 0)
    nodes.make_room(len(places))
    nodes.count[:], nodes.length[:] = len(places), len(longest)
    nodes.text[0, np.arange(len(longest) - len(tail), len(longest)) % TEXT] = tail
    for c, (place, partial) in enumerate(zip(places, partials, strict=True)):
        begin = len(longest) - len(partial)
        nodes.ints[0, c] = [ctx[place], -1, -1, begin, -1, node[place]]
        flight = np.exp(logw[place] - logu[place])
        weight = np.exp(logu[place] - lanes.log_z[0])
        nodes.floats[0, c] = [1.0, weight, weight, flight]
    zero = np.zeros(1)
    params = dataclasses.replace(lanes.params, K=None, prune="deferred")
    return DeferredLanes(
        model, params, nodes, zero, zero, np.zeros(1, dtype=bool), zero - np.inf, zero - np.inf,
        in_prompt=lanes.in_prompt, literal=lanes.rules.literal,
    )  # fmt: skip


def to_candidates(lanes: DeferredLanes, params: BeamParams) -> ByteLanes:
    """Return lanes pruned by `params`, not deferred, with the candidates of deferred lanes."""
    model, n = lanes.model, len(lanes)
    rules = model.rules(params, in_prompt=lanes.in_prompt, literal=lanes.literal)
    state = lanes.nodes.candidates(model.engine.tree, lanes.log_scale, merged=True)
    dropped, heals = np.full(n, -np.inf), np.zeros(n, dtype=np.int64)
    return ByteLanes(model, params, rules, state, lanes.log_z, dropped, lanes.ended, heals)


async def _read_stretch(
    lanes: DeferredLanes, texts: list[bytes], used: list[IntArray] | None, weights: FloatArray
) -> DeferredLanes:
    """Return the lanes after texts that are read together; `weights` [L, N] is filled in."""
    tree, store = lanes.model.engine.tree, lanes.model.store
    live = lanes.nodes.ints[:, :, CTX][lanes.nodes.live]
    with ExitStack() as pins:
        pins.enter_context(tree.one_thread)
        guides = [_guide(lanes, n, t) for n, t in enumerate(texts) if t and lanes.alive[n]]
        held = np.unique(np.concatenate([live, *guides]))
        reading = 0
        while True:
            reading += 1
            pins.enter_context(tree.pinned(held))
            await store.ensure(held)
            rows = Held(lanes.model, held)
            after, wanted, shares = _run(lanes, texts, rows, weights)
            died = bool((lanes.alive & ~after.alive).any())
            least = 0.0 if died else _least_share(lanes, texts, reading)
            if used is not None and least < np.inf:
                least = 0.0
            missing = wanted[shares > least]
            if not len(missing):
                if used is not None:
                    used.append(held)
                return after
            held = np.unique(np.concatenate([held, missing]))


def _least_share(lanes: DeferredLanes, texts: list[bytes], reading: int) -> float:
    """Return the share from which on a row that was missing is fetched; inf: read no more."""
    if reading < lanes.params.deferred_readings or lanes.params.deferred_merge == 0:
        return 0.0
    return HEAVY if max(map(len, texts)) <= SHORT and reading < MOST_READINGS else np.inf


def _run(
    lanes: DeferredLanes, texts: list[bytes], rows: Held, weights: FloatArray
) -> tuple[DeferredLanes, IntArray, FloatArray]:
    """Read the texts with the rows at hand; return the lanes, and what was wanted and missing."""
    reads = np.array([n for n, t in enumerate(texts) if t and lanes.alive[n]], dtype=np.int64)
    symbols = padded([texts[n] for n in reads], -1, len(weights))
    nodes, z = lanes.nodes.take(reads), lanes.weights(reads)
    weights[:, reads], wanted, shares = lanes.judge.read(nodes, symbols, rows, z)
    node = nodes.ints[:, :, NODE]
    node[node == NOT_NOW] = -1  # nobody else has seen these nodes
    return lanes.after(reads, nodes, z), wanted, shares


def _guide(lanes: DeferredLanes, n: int, text: bytes) -> IntArray:
    """Return the contexts along the tokenizer's tokens of the text that lane n will read.

    They begin at its heaviest context, and leave out the one that ends with the text.
    """
    nodes, tree, engine = lanes.nodes, lanes.model.engine.tree, lanes.model.engine
    ints, floats = nodes.ints[n, : nodes.count[n]], nodes.floats[n, : nodes.count[n]]
    length = int(nodes.length[n])
    flying = (ints[:, NODE] >= 0) & (ints[:, POS] >= length - TEXT)
    weight = np.where(flying, floats[:, WEIGHT] * floats[:, FLIGHT], 0.0)
    best = int(np.argmax(np.where(ints[:, POS] == length, floats[:, OWN], weight)))
    context = int(ints[best, CTX])
    if context < 0:
        context = int(tree.children(ints[[best], ABOVE], ints[[best], TOKEN])[0])
    since = np.arange(max(ints[best, POS], length - TEXT), length) % TEXT
    tokens = lanes.model.canonical(nodes.text[n, since].tobytes() + text)
    room = len(tokens) if engine.window is None else engine.window - int(tree.depth[context])
    along = tree.along(context, tokens[: max(room, 0)])
    return np.append(along[: len(tokens) - 1], context)
