"""Steps that end given tokens: exact tokens, tokens that are no text any more, and healing.

Adaptive token healing: when no candidate can read a byte, end its token earlier. A candidate with
the partial token `abcd` that cannot read `x` is taken back to a token that ends inside it (`abc`,
`ab`, `a`, longest first), the rest is spelled anew from there, ending further tokens where the trie
allows no other way, until `x` is read. The first candidate, best first, and the longest token that
succeed give the healed lane its one candidate. Its weight is the probability of that one path, a
lower bound of the sum over all of them (genlm-bytes 0.2's rule, kept so that beams agree).

To end tokens only where one must can lead into a dead end: `tt` that begins `tter` cannot be
ended before a space, though `t` and `t` can. Where every attempt of that kind fails, all ways
to spell the rest are searched, those of fewest tokens first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from genlm_bytes_smc.beam import pruning_numba as pn
from genlm_bytes_smc.beam.model import NEVER, ByteModel, Rules
from genlm_bytes_smc.beam.pruning_numba import Extensions, KeyArray
from genlm_bytes_smc.beam.state import N_BYTES, BeamState, FloatArray
from genlm_bytes_smc.lm.contexts import IntArray

MOST_TOKENS = 64
"""Tokens that the search of one candidate may try to end, each of which costs a row."""


async def foresee(model: ByteModel, state: BeamState, tokens: Sequence[int]) -> None:
    """Check tokens, and fetch the rows all along a lone candidate's, in one forward.

    Raises:
        ValueError: no token of the vocabulary.
    """
    model.vocab.check(tokens)
    contexts = state.ctx
    if contexts.size == 1 and len(tokens) > 1:
        at = int(contexts.ravel()[0])
        ahead = model.engine.tree.along(at, tokens)
        await model.store.ensure(np.concatenate([[at], ahead]))


async def feed_token(
    model: ByteModel, key: KeyArray, extended: BeamState, cut: IntArray, token: int
) -> BeamState:
    """Return the lanes with keys `key` uint64[N] after a token, best first.

    `extended` are their candidates with extensions; those in the middle of a token are lost.
    """
    ext = _followed(model, extended, token)
    empty = model.kernels.advance(extended, np.full(len(key), -1, dtype=np.int64), cut)
    fed = await _commit(model, empty, ext)
    return fed._replace(key=pn.keys_after(key, np.full(len(key), token + N_BYTES))).ranked()


async def under(model: ByteModel, state: BeamState, cut: IntArray, new_cut: IntArray) -> BeamState:
    """Return the candidates under another `cut`, best first.

    Those in flight lose the share of the tokens that are no text any more; one whose token was
    spelled to its end is committed.
    """
    await model.store.ensure(state.ctx)
    ext = model.kernels.extensions(state, cut)
    gone = np.isin(model.trie.position[ext.token], new_cut)
    return (await _commit(model, model.kernels.reweigh(state, new_cut), ext.take(gone))).ranked()


async def look_before(
    model: ByteModel, state: BeamState, rules: Rules, token: int
) -> tuple[BeamState, FloatArray]:
    """Return the candidates with their extensions, admitted by what can take a token.

    The second item is the log mass of the extensions left out, float64[N], nats.
    The threshold is taken against the candidates that can take it, as `ByteLanes.read` takes it
    against those that can read its byte: the others are lost.
    """
    await model.store.ensure(state.ctx)
    stand = _followed(model, state, token)
    able = np.full(len(state.key), -np.inf)
    np.logaddexp.at(able, stand.lane, stand.logw)
    ext = model.kernels.extensions(state, rules.cut)
    keep, dropped = pn.keep_extensions(ext.lane, ext.logw, able, rules.log_threshold, False)
    return await _commit(model, state, ext.take(keep)), dropped


async def _commit(model: ByteModel, state: BeamState, ext: Extensions) -> BeamState:
    """Return `state` with the extensions as candidates, their rows fetched."""
    if len(ext.lane) == 0:
        return state
    new = model.engine.tree.children(state.ctx[ext.lane, ext.cand], ext.token)
    await model.store.ensure(np.concatenate([state.ctx.ravel(), new]))
    return state.extend(ext._replace(token=new))


def _followed(model: ByteModel, state: BeamState, token: int) -> Extensions:
    """Return the extensions of the candidates at the root by `token`."""
    lane, cand = np.nonzero(state.nodes == 0)
    contexts = state.ctx[lane, cand].tolist()
    with np.errstate(divide="ignore"):
        p = np.log(np.array([model.store.prob(c, token) for c in contexts], dtype=np.float64))
    return Extensions(lane, cand, np.full(len(lane), token), state.logw[lane, cand] + p)


# -- healing -------------------------------------------------------------------------------


async def heal_lanes(
    model: ByteModel,
    rules: Rules,
    before: BeamState,
    after: BeamState,
    dead: IntArray,
    bytes_: IntArray,
) -> tuple[BeamState, IntArray]:
    """Heal dead lanes where that goes; return the candidates, and int64[N], 1 for a healed lane.

    The lanes `dead` int64[D] of N could not read their byte of `bytes_` int64[N].
    """
    healed = np.zeros(len(before.key), dtype=np.int64)
    for n in dead.tolist():
        with model.engine.tree.pinned(after.ctx):
            # Healing another lane may have evicted some.
            await model.store.ensure(before.ctx)
            lane = before.gather(np.array([n]))
            found = await _Healer(model, rules, lane, int(bytes_[n])).heal()
        if found is not None:
            after = after.put(np.array([n]), found)
            healed[n] = 1
    return after, healed


class _Healer:
    """One lane, before a byte that none of its candidates can read."""

    def __init__(self, model: ByteModel, rules: Rules, lane: BeamState, byte: int) -> None:
        self.model, self.rules, self.lane, self.byte = model, rules, lane, byte
        self.kernels = model.kernels

    async def heal(self) -> BeamState | None:
        """Return a lane of one candidate that has read the byte, or None if there is none."""
        trie, rescues = self.model.trie, self.rules.rescues
        nodes, contexts = self.lane.nodes[0], self.lane.ctx[0]
        weights = self.lane.logu[0].tolist()
        flying = [
            (trie.spell(int(nodes[c])), int(contexts[c]), weights[c])
            for c in np.flatnonzero(nodes >= 0).tolist()
        ]
        for partial, context, logu in flying:
            for k in rescues.first_ends(rescues.spans(partial, 1), len(partial)):
                for token in trie.tokens_at(trie.find(partial[:k])):
                    rest = (*partial[k:], self.byte)
                    found = await self._respell(context, logu, token, rest)
                    if found is not None:
                        return found
        for partial, context, logu in flying:
            search = _Search(self, partial)
            found = await search.end_one(context, logu, 0, search.firsts, search.most)
            if found is not None:
                return found
        return None

    async def _respell(
        self, context: int, logu: float, token: int, rest: tuple[int, ...]
    ) -> BeamState | None:
        """End `token` after `context`, then read `rest`, ending tokens only where one must."""
        if np.isin(self.model.trie.position[token], self.rules.cut):
            return None
        p = self.model.store.prob(context, token)
        if p == 0.0:
            return None
        state = await self.end_token(context, token, logu + float(np.log(p)))
        splits = 0
        for byte in rest:
            after = self.read(state, byte)
            if after is None:
                if splits == self.rules.rescues.max_splits:
                    return None
                splits += 1
                ended = self.kernels.extensions(state, self.rules.cut)
                at = int(state.ctx[0, 0])
                for other, logw in zip(ended.token.tolist(), ended.logw.tolist(), strict=True):
                    after = self.read(await self.end_token(at, other, logw), byte)
                    if after is not None:
                        break
                else:
                    return None
            state = after
        return state

    async def end_token(self, context: int, token: int, logw: float) -> BeamState:
        """Return one candidate at the root after `token`, its row fetched."""
        child = self.model.engine.tree.child(context, token)
        await self.model.store.ensure(np.append(self.lane.ctx.ravel(), child).astype(np.int64))
        return BeamState.single(child, logw, self.lane.key)

    def read(self, state: BeamState, byte: int) -> BeamState | None:
        """Return the candidate after a byte; None if it weighs 0."""
        after = self.kernels.advance(state, np.array([byte], dtype=np.int64), self.rules.cut)
        return after if after.log_z[0] > -np.inf else None


class _Search:
    """All ways to spell one candidate's partial token anew and then read a byte.

    The trie says beforehand which ways lead to the end and with how many tokens, so a row of
    the model is spent on a token only where the model's zeros are what may still stand against
    it; `MOST_TOKENS` of them at most.
    """

    def __init__(self, healer: _Healer, partial: bytes) -> None:
        rescues = healer.rules.rescues
        self.healer, self.model = healer, healer.model
        self.text = (*partial, healer.byte)
        self.spans = rescues.spans(partial)
        self.splits = rescues.splits_after(self.spans, healer.byte)
        self.firsts = rescues.first_ends(self.spans, len(partial))
        self.most = NEVER - 1 if rescues.max_splits is None else rescues.max_splits
        self.tokens_left = MOST_TOKENS

    async def end_one(
        self, context: int, logu: float, start: int, ends: list[int], splits: int
    ) -> BeamState | None:
        """End a token that begins at `start` at one of `ends`, with `splits` more to follow.

        Returns one candidate that has read all, or None; `context` is before the token.
        """
        for end, token, p in self._choices(context, start, ends, splits):
            if self.tokens_left == 0:
                return None
            self.tokens_left -= 1
            logw = logu + float(np.log(p))
            state = await self.healer.end_token(context, token, logw)
            child = int(state.ctx[0, 0])
            with self.model.engine.tree.pinned(np.array([context, child])):
                found = self._read(state, end) if self.splits[end] == 0 else None
                if found is None and splits > 0:
                    later = self.spans[end].ends
                    found = await self.end_one(child, logw, end, later, splits - 1)
            if found is not None:
                return found
        return None

    def _choices(
        self, context: int, start: int, ends: list[int], splits: int
    ) -> list[tuple[int, int, float]]:
        """(end, token, probability) of what may end next: fewest splits, then longest, first."""
        model = self.model
        out = []
        for end in sorted(ends, key=lambda q: (self.splits[q], -q)):
            if self.splits[end] > splits:
                break
            for token in model.trie.tokens_at(model.trie.find(bytes(self.text[start:end]))):
                if not np.isin(model.trie.position[token], self.healer.rules.cut):
                    p = model.store.prob(context, token)  # now: the row may be evicted later
                    if p > 0.0:
                        out.append((end, token, p))
        return out

    def _read(self, state: BeamState, start: int) -> BeamState | None:
        """`state`, at the root, after the rest of the text in one token; None if it weighs 0."""
        now: BeamState | None = state
        for byte in self.text[start:]:
            now = None if now is None else self.healer.read(now, byte)
        return now
