"""Adaptive token healing: when no candidate can read a byte, end its token earlier.

A candidate with the partial token `abcd` that cannot read `x` is taken back to a token that
ends inside it (`abc`, `ab`, `a`, longest first), the rest is spelled anew from there, ending
further tokens where the trie allows no other way, until `x` is read. The first candidate,
best first, and the longest token that succeed give the healed lane its one candidate. Its
weight is the probability of that one path, a lower bound of the sum over all of them
(genlm-bytes 0.2's rule, kept so that beams agree). That rule reads as far as it can before it
ends a further token, and may end up where neither is possible. Then, where genlm-bytes gives
up, the spelling with the fewest tokens that does read `x` is taken (`respell.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from genlm_bytes_smc.beam.state import BeamState

if TYPE_CHECKING:
    from genlm_bytes_smc.beam.lanes import ByteLanes


async def heal(lanes: ByteLanes, n: int, byte: int) -> BeamState | None:
    """A lane of one candidate that has read `byte`, or None if healing finds none.

    Args:
        lanes: the lanes before `byte`.
        n: which of them.
        byte: what none of its candidates can read.
    """
    kernels, trie, params = lanes.model.kernels, lanes.model.trie, lanes.params
    lane = kernels.gather(lanes.state, np.array([n]))
    nodes, contexts = kernels.nodes(lane)[0], kernels.contexts(lane)[0]
    weights = np.asarray(lane.logu[0].tolist())
    for c in range(len(nodes)):
        if nodes[c] < 0:
            continue
        partial = trie.spell(int(nodes[c]))
        backoff = len(partial) if params.heal_max_backoff is None else params.heal_max_backoff
        for k in range(len(partial), max(1, len(partial) - backoff) - 1, -1):
            for token in trie.tokens_at(trie.find(partial[:k])):
                found = await _respell(
                    lanes, lane, int(contexts[c]), weights[c], token, (*partial[k:], byte)
                )
                if found is not None:
                    return found
    for c in range(len(nodes)):
        if nodes[c] > 0:
            found = await _shortest(lanes, lane, int(contexts[c]), weights[c], int(nodes[c]), byte)
            if found is not None:
                return found
    return None


async def _shortest(
    lanes: ByteLanes, lane: BeamState, context: int, logu: float, node: int, byte: int
) -> BeamState | None:
    """Spell what is in flight at `node` with as few tokens as can be, then read `byte`."""
    model, cut, params = lanes.model, lanes.cut, lanes.params
    limits = (tuple(cut.tolist()), params.heal_max_backoff, params.heal_max_splits)
    tokens = model.respelled(node, byte, *limits)
    if tokens is None:
        return None
    state = None
    for spelled in tokens:
        found = model.trie.tokens_at(model.trie.find(spelled))
        allowed = [t for t in found if not np.isin(model.trie.position[t], cut)]
        p, token = max((model.store.prob(context, t), t) for t in allowed)
        if p == 0.0:
            return None
        logu += float(np.log(p))
        state = await _end_token(lanes, lane, context, token, logu)
        context = int(model.kernels.contexts(state)[0, 0])
    rest = model.trie.spell(node)[sum(map(len, tokens)) :]
    for b in (*rest, byte):
        assert state is not None
        state = model.kernels.advance(state, np.array([b], dtype=np.int64), cut)
    assert state is not None
    return state if model.kernels.log_z(state)[0] > -np.inf else None


async def _respell(
    lanes: ByteLanes, lane: BeamState, context: int, logu: float, token: int, rest: tuple[int, ...]
) -> BeamState | None:
    """End `token` after `context`, then read `rest`, ending tokens only where one must."""
    model, cut = lanes.model, lanes.cut
    if np.isin(model.trie.position[token], cut):
        return None
    p = model.store.prob(context, token)
    if p == 0.0:
        return None
    state = await _end_token(lanes, lane, context, token, logu + float(np.log(p)))
    splits = 0
    for byte in rest:
        step = np.array([byte], dtype=np.int64)
        after = model.kernels.advance(state, step, cut)
        if model.kernels.log_z(after)[0] == -np.inf:
            if splits == lanes.params.heal_max_splits:
                return None
            splits += 1
            ended = model.kernels.extensions(state, cut)
            at = int(model.kernels.contexts(state)[0, 0])
            for other, logw in zip(ended.token.tolist(), ended.logw.tolist(), strict=True):
                split = await _end_token(lanes, lane, at, other, logw)
                after = model.kernels.advance(split, step, cut)
                if model.kernels.log_z(after)[0] > -np.inf:
                    break
            else:
                return None
        state = after
    return state


async def _end_token(
    lanes: ByteLanes, lane: BeamState, context: int, token: int, logw: float
) -> BeamState:
    """One candidate at the root after `token`, its row fetched."""
    child = lanes.model.engine.tree.child(context, token)
    await lanes.model.store.ensure(
        np.append(lanes.model.kernels.contexts(lane).ravel(), child).astype(np.int64)
    )
    return lanes.model.kernels.single(child, logw, lane.key)
