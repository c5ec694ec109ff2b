"""Adaptive token healing: when no candidate can read a byte, end its token earlier.

A candidate with the partial token `abcd` that cannot read `x` is taken back to a token that
ends inside it (`abc`, `ab`, `a`, longest first), the rest is spelled anew from there, ending
further tokens where the trie allows no other way, until `x` is read. The first candidate,
best first, and the longest token that succeed give the healed lane its one candidate. Its
weight is the probability of that one path, a lower bound of the sum over all of them
(genlm-bytes 0.2's rule, kept so that beams agree).

To end tokens only where one must can lead into a dead end: `tt` that begins `tter` cannot be
ended before a space, though `t` and `t` can. Where every attempt of that kind fails, all ways
to spell the rest are searched, those of fewest tokens first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from genlm_bytes_smc.beam.kernels import Kernels
from genlm_bytes_smc.beam.respell import NEVER, first_ends, splits_after
from genlm_bytes_smc.beam.state import BeamState
from genlm_bytes_smc.lm.contexts import IntArray

if TYPE_CHECKING:
    from genlm_bytes_smc.beam.lanes import ByteLanes

MOST_TOKENS = 64
"""Tokens that the search of one candidate may try to end, each of which costs a row."""


async def heal_lanes(
    lanes: ByteLanes, state: BeamState, dead: IntArray, bytes_: IntArray
) -> tuple[BeamState, IntArray]:
    """Heal dead lanes where that goes; return the candidates and each lane's heals so far.

    Args:
        lanes: N lanes before they read.
        state: what they came to.
        dead: int64[D], those that could not read their byte.
        bytes_: int64[N], what each was to read.
    """
    model, heals = lanes.model, lanes.heals.copy()
    kernels = model.kernels
    for n in dead.tolist():
        with model.engine.tree.pinned(kernels.contexts(state)):
            # Healing another lane may have evicted some.
            await model.store.ensure(kernels.contexts(lanes.state))
            healed = await heal(lanes, n, int(bytes_[n]))
        if healed is not None:
            state = put_lanes(kernels, state, np.array([n]), healed)
            heals[n] += 1
    return state, heals


def put_lanes(kernels: Kernels, state: BeamState, lanes: IntArray, new: BeamState) -> BeamState:
    """`state` with its lanes `lanes` int64[M] replaced by the M lanes of `new`, keys kept."""
    both = kernels.cat([state, new])
    index = np.arange(len(state.key))
    index[lanes] = len(state.key) + np.arange(len(lanes))
    return kernels.gather(both, index)._replace(key=state.key)


async def heal(lanes: ByteLanes, n: int, byte: int) -> BeamState | None:
    """Return a lane of one candidate that has read `byte`, or None if healing finds none.

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
    for c in np.flatnonzero(nodes >= 0).tolist():
        search = _Search(lanes, lane, trie.spell(int(nodes[c])), byte)
        found = await search.from_start(int(contexts[c]), float(weights[c]))
        if found is not None:
            return found
    return None


class _Search:
    """All ways to spell one candidate's partial token anew and then read a byte.

    The trie says beforehand which ways lead to the end and with how many tokens, so a row of
    the model is spent on a token only where the model's zeros are what may still stand against
    it; `MOST_TOKENS` of them at most.
    """

    def __init__(self, lanes: ByteLanes, lane: BeamState, partial: bytes, byte: int) -> None:
        model, params = lanes.model, lanes.params
        cut = tuple(lanes.cut.tolist())
        self.lanes, self.lane = lanes, lane
        self.text = (*partial, byte)
        self.spans = model.spans(partial, cut)
        self.firsts = first_ends(self.spans, len(partial), params.heal_max_backoff)
        self.splits = splits_after(self.spans, lambda node: model.reads(node, byte, cut))
        self.most = NEVER - 1 if params.heal_max_splits is None else params.heal_max_splits
        self.tokens_left = MOST_TOKENS

    async def from_start(self, context: int, logu: float) -> BeamState | None:
        """One candidate that has read all, or None; it begins after `context`."""
        return await self._end_one(context, logu, 0, self.firsts, self.most)

    async def _end_one(
        self, context: int, logu: float, start: int, ends: list[int], splits: int
    ) -> BeamState | None:
        """End a token that begins at `start` at one of `ends`, with `splits` more to follow."""
        for end, token, p in self._choices(context, start, ends, splits):
            if self.tokens_left == 0:
                return None
            self.tokens_left -= 1
            logw = logu + float(np.log(p))
            state = await _end_token(self.lanes, self.lane, context, token, logw)
            child = int(self.lanes.model.kernels.contexts(state)[0, 0])
            with self.lanes.model.engine.tree.pinned(np.array([context, child])):
                found = self._read(state, end) if self.splits[end] == 0 else None
                if found is None and splits > 0:
                    later = self.spans[end].ends
                    found = await self._end_one(child, logw, end, later, splits - 1)
            if found is not None:
                return found
        return None

    def _choices(
        self, context: int, start: int, ends: list[int], splits: int
    ) -> list[tuple[int, int, float]]:
        """(end, token, probability) of what may end next: fewest splits, then longest, first."""
        model = self.lanes.model
        out = []
        for end in sorted(ends, key=lambda q: (self.splits[q], -q)):
            if self.splits[end] > splits:
                break
            for token in model.trie.tokens_at(model.trie.find(bytes(self.text[start:end]))):
                if not np.isin(model.trie.position[token], self.lanes.cut):
                    p = model.store.prob(context, token)  # now: the row may be evicted later
                    if p > 0.0:
                        out.append((end, token, p))
        return out

    def _read(self, state: BeamState, start: int) -> BeamState | None:
        """`state`, at the root, after the rest of the text in one token; None if it weighs 0."""
        kernels = self.lanes.model.kernels
        for byte in self.text[start:]:
            state = kernels.advance(state, np.array([byte], dtype=np.int64), self.lanes.cut)
        return state if kernels.log_z(state)[0] > -np.inf else None


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
