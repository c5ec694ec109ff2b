"""What compiled code does for beams, against plain Python; and whole steps against their parts.

The oracles below know tokens, probabilities and byte strings only: no trie ranges, no rows
in trie order, no kernels.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch

from genlm_bytes_smc.beam import masses_numba as nm
from genlm_bytes_smc.beam import pruning_numba as pn
from genlm_bytes_smc.beam import steps_numba as sn
from genlm_bytes_smc.beam.lanes import ByteLanes
from genlm_bytes_smc.beam.model import ByteModel, Rescues
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.beam.pruning_numba import Extensions
from genlm_bytes_smc.beam.state import BeamState, NumbaKernels, start_keys
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.engine import RowEngine
from genlm_bytes_smc.lm.rows import RowStore, RowTransform
from genlm_bytes_smc.trie import TokenTrie, Vocabulary
from tests.beam.test_steps import read_keys
from tests.inner import called

thinned = called(pn.thinned)

SEEDS = range(4)
NO_CUT = np.empty(0, dtype=np.int64)


# -- a small world: a vocabulary, an engine of random rows, contexts, states ----------------


class RandomEngine(RowEngine):
    """Random rows over given tokens, a function of the context's tokens; some tokens never."""

    def __init__(self, tokens: list[bytes]) -> None:
        super().__init__(
            None,
            device=torch.device("cpu"),
            width=len(tokens),
            window=None,
            start=(0,),
            byte_vocab=tokens,
        )

    def evaluate(self, nodes: np.ndarray) -> torch.Tensor:
        rows = [self.row(self.tree.tokens(int(n))) for n in nodes]
        return torch.from_numpy(np.stack(rows))

    def row(self, context: list[int]) -> np.ndarray:
        rng = np.random.default_rng([7, *context])
        logits = rng.normal(size=self.width) * rng.choice([0.5, 3.0, 12.0])
        never = rng.random(self.width) < 0.1
        never[rng.integers(self.width)] = False
        if self.byte_vocab[0]:
            never[0] = False  # so that no row is empty
        logits[never] = -np.inf
        return logits - np.logaddexp.reduce(logits)


def random_vocabulary(rng: np.random.Generator) -> list[bytes]:
    """Tokens that share prefixes, some of them twice, some very long, one that is empty."""
    letters = [*rng.permutation(256)[: rng.integers(2, 6)].tolist(), 0, 255]
    tokens = [bytes([b]) for b in letters[: rng.integers(1, len(letters) + 1)]]
    for _ in range(rng.integers(5, 30)):
        tokens.append(bytes(rng.choice(letters, size=rng.integers(1, 6)).tolist()))
    for _ in range(4):  # longer ones that begin like others
        stem = tokens[rng.integers(len(tokens))]
        tokens.append(stem + bytes(rng.choice(letters, size=rng.integers(1, 4)).tolist()))
    tokens.append(bytes(rng.choice(letters, size=60).tolist()))
    tokens.extend(tokens[rng.integers(len(tokens))] for _ in range(4))
    order = rng.permutation(len(tokens))
    return [tokens[i] for i in order] + [b""]


@dataclass
class World:
    engine: RandomEngine
    trie: TokenTrie
    store: RowStore
    contexts: np.ndarray
    cut: np.ndarray
    _p: dict[int, dict[int, float]] = field(default_factory=dict)

    @property
    def tokens(self) -> list[bytes]:
        return self.engine.byte_vocab

    @cached_property
    def cut_tokens(self) -> set[int]:
        return {int(self.trie.order[i]) for i in self.cut}

    def p(self, context: int) -> dict[int, float]:
        """Probability of each token that spells something."""
        if context not in self._p:
            row = self.engine.row(self.engine.tree.tokens(context))
            some = {t: math.exp(row[t]) for t, spelled in enumerate(self.tokens) if spelled}
            total = math.fsum(some.values())
            self._p[context] = {t: p / total for t, p in some.items()}
        return self._p[context]

    def mass(self, context: int, prefix: bytes) -> float:
        """Mass of the tokens that begin with `prefix` and are text."""
        p, cut = self.p(context), self.cut_tokens
        return math.fsum(p[t] for t in p if self.tokens[t].startswith(prefix) and t not in cut)


def ensure_now(store: RowStore, contexts: IntArray) -> None:
    """Do what `RowStore.ensure` does, where an event loop is running."""
    missing = store.missing(contexts)
    if len(missing):
        with store._needing(contexts):
            store._insert(missing, store.engine.rows_sync(missing))
    store.table.touch(contexts)


def make_world(seed: int, cut: bool) -> World:
    rng = np.random.default_rng(seed)
    engine = RandomEngine(random_vocabulary(rng))
    trie = TokenTrie.build(Vocabulary.from_tokens(engine.byte_vocab))
    store = RowStore(engine, trie)
    size = len(engine.byte_vocab)
    contexts = np.array(
        [engine.tree.insert(rng.integers(size, size=rng.integers(1, 4)).tolist()) for _ in range(7)]
    )
    for some in np.array_split(rng.permutation(contexts), 3):  # slots in no special order
        ensure_now(store, some)
    share = rng.random(trie.n_tokens) < 0.2
    share[rng.integers(trie.n_tokens)] = True
    return World(engine, trie, store, contexts, np.flatnonzero(share) if cut else NO_CUT)


def random_state(world: World, seed: int, n: int = 9, c: int = 7) -> BeamState:
    """Candidates anywhere, empty places among them, dead lanes, weights far apart."""
    rng = np.random.default_rng([seed, 1])
    ctx = rng.choice(world.contexts, size=(n, c))
    node = rng.integers(len(world.trie), size=(n, c))
    node[rng.random((n, c)) < 0.35] = 0
    logu = rng.normal(size=(n, c)) * rng.choice([1.0, 20.0], size=(n, 1)) - 30.0
    logw = np.full((n, c), -np.inf)
    for i in np.ndindex(n, c):
        mass = world.mass(int(ctx[i]), world.trie.spell(int(node[i]))) if node[i] else 1.0
        if mass > 0:
            logw[i] = logu[i] + math.log(mass)
    logw[rng.random((n, c)) < 0.25] = -np.inf
    logw[rng.random(n) < 0.2] = -np.inf
    logw[0] = -np.inf
    empty = (logw == -np.inf) & (rng.random((n, c)) < 0.5)  # the others: lost to a byte
    ctx[empty], logu[empty] = -1, -np.inf
    node[logw == -np.inf] = 0
    keys = start_keys(np.arange(n, dtype=np.uint64) + np.uint64(seed))
    return BeamState.of(ctx, node, logu, logw, keys)


def bytes_for(world: World, state: BeamState, seed: int) -> np.ndarray:
    """A byte a lane: mostly one that a candidate can read; now and then none, or -1."""
    rng = np.random.default_rng([seed, 2])
    letters = [*sorted({b for t in world.tokens for b in t}), 7, -1]
    return rng.choice(letters, size=len(state.key))


def close(got: Any, want: Any) -> None:
    """Equal to 1e-12: as logs, relative to the larger of one and the value."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == np.float64
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def same_state(got: BeamState, want: BeamState) -> None:
    np.testing.assert_array_equal(got.key, want.key)
    assert got.key.dtype == np.uint64
    alive = want.logw > -np.inf
    for name in ("ctx", "node"):
        a, b = getattr(got, name), getattr(want, name)
        assert a.shape == b.shape
        np.testing.assert_array_equal(a[alive], b[alive], err_msg=name)
    close(got.logu[alive], want.logu[alive])
    close(got.logw, want.logw)


def next_block(kernels: NumbaKernels, state: BeamState, cut: IntArray) -> np.ndarray:
    """Log mass of each next byte, float64[N, 257], not normalised."""
    return nm.next_block(kernels._trie, kernels.store.host, *state.candidates, cut)


def pruned(
    state: BeamState, k: int, log_threshold: float = -np.inf, *, random: bool = False
) -> tuple[BeamState, np.ndarray]:
    """At most k candidates a lane (-1: all), best first, and the log mass dropped."""
    nothing = np.full(len(state.key), -np.inf)
    packed, numbers = sn.prune(state.packed, state.key, nothing, k, log_threshold, random)
    return BeamState(packed, state.key), numbers[1]


# -- against plain Python ------------------------------------------------------------------


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_masses_are_sums_over_tokens_that_begin_so(seed, cut):
    world = make_world(seed, cut)
    state = random_state(world, seed)
    kernels = NumbaKernels(world.store)
    want = np.full_like(state.logw, -np.inf)
    for i in zip(*np.nonzero(state.logw > -np.inf), strict=True):
        prefix = world.trie.spell(int(state.node[i]))
        mass = world.mass(int(state.ctx[i]), prefix) if prefix else 1.0
        want[i] = state.logu[i] + math.log(mass) if mass > 0 else -np.inf
    close(kernels.reweigh(state, world.cut).logw, want)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_next_block_sums_what_each_byte_leaves(seed, cut):
    world = make_world(seed, cut)
    state = random_state(world, seed)
    kernels = NumbaKernels(world.store)
    want = np.full((len(state.key), 257), -np.inf)
    for n, c in zip(*np.nonzero(state.logw > -np.inf), strict=True):
        context, logu = int(state.ctx[n, c]), state.logu[n, c]
        prefix = world.trie.spell(int(state.node[n, c]))
        for byte in range(256):
            mass = world.mass(context, prefix + bytes([byte]))
            if mass > 0:
                want[n, byte] = np.logaddexp(want[n, byte], logu + math.log(mass))
        if not prefix:
            p = world.p(context)
            ending = math.fsum(p[t] for t in world.cut_tokens)
            if ending > 0:
                want[n, 256] = np.logaddexp(want[n, 256], logu + math.log(ending))
    close(next_block(kernels, state, world.cut), want)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_advance_reads_one_byte(seed, cut):
    world = make_world(seed, cut)
    state = random_state(world, seed)
    kernels = NumbaKernels(world.store)
    byte = bytes_for(world, state, seed)
    got = kernels.advance(state, byte, world.cut)
    want = np.full_like(state.logw, -np.inf)
    for n, c in zip(*np.nonzero(state.logw > -np.inf), strict=True):
        if byte[n] < 0:
            continue
        prefix = world.trie.spell(int(state.node[n, c])) + bytes([byte[n]])
        mass = world.mass(int(state.ctx[n, c]), prefix)
        if mass > 0:
            want[n, c] = state.logu[n, c] + math.log(mass)
            assert world.trie.spell(int(got.node[n, c])) == prefix
    close(got.logw, want)
    np.testing.assert_array_equal(got.logu, state.logu)
    np.testing.assert_array_equal(got.ctx, state.ctx)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_extensions_are_the_tokens_spelled_to_their_end(seed, cut):
    world = make_world(seed, cut)
    state = random_state(world, seed)
    kernels = NumbaKernels(world.store)
    got = kernels.extensions(state, world.cut)
    want = {}
    for n, c in zip(*np.nonzero(state.logw > -np.inf), strict=True):
        prefix = world.trie.spell(int(state.node[n, c]))
        p = world.p(int(state.ctx[n, c]))
        for t in p:
            if world.tokens[t] == prefix and t not in world.cut_tokens and p[t] > 0:
                want[n, c, t] = state.logu[n, c] + math.log(p[t])
    found = list(zip(got.lane.tolist(), got.cand.tolist(), got.token.tolist(), strict=True))
    assert sorted(found) == sorted(want)
    assert got.lane.tolist() == sorted(got.lane.tolist())
    close(got.logw, np.array([want[key] for key in found]))


@pytest.mark.parametrize("k", [-1, 1, 3, 1000])
@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.95])
@pytest.mark.parametrize("seed", SEEDS)
def test_pruning_keeps_the_heaviest_and_counts_the_others(seed, threshold, k):
    state = random_state(make_world(seed, cut=False), seed)
    with np.errstate(divide="ignore"):
        kept, dropped = pruned(state, k, float(np.log(threshold)))
    for n, logw in enumerate(state.logw):
        order = sorted(np.flatnonzero(logw > -np.inf).tolist(), key=lambda c: -logw[c])  # stable
        total = np.logaddexp.reduce(logw, initial=-np.inf)
        share = np.exp(logw - total) if order else logw
        want = [c for i, c in enumerate(order) if i == 0 or share[c] > threshold]
        want = want if k < 0 else want[:k]
        m = len(want)
        for name in ("ctx", "node", "logu", "logw"):
            np.testing.assert_array_equal(getattr(kept, name)[n, :m], getattr(state, name)[n, want])
        assert (kept.logw[n, m:] == -np.inf).all()
        lost = [logw[c] for c in order if c not in want]
        close(dropped[n], np.logaddexp.reduce(lost, initial=-np.inf))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0), (3, 2)])
def test_states_with_nothing_in_them(shape):
    world = make_world(0, cut=True)
    kernels = NumbaKernels(world.store)
    none = np.full(shape, -np.inf)
    keys = np.arange(shape[0], dtype=np.uint64)
    state = BeamState.of(np.full(shape, -1), np.zeros(shape), none, none, keys)
    for after in (
        kernels.advance(state, np.full(shape[0], 65), world.cut),
        kernels.reweigh(state, world.cut),
        state.ranked(),
        pruned(state, 1, random=True)[0],
        BeamState.cat([state, state]),
    ):
        assert (after.logw == -np.inf).all()
        assert (after.nodes == -1).all()
        assert (after.log_z == -np.inf).all()
    assert len(kernels.extensions(state, world.cut).lane) == 0
    assert np.isneginf(next_block(kernels, state, world.cut)).all()


def test_lanes_are_gathered_joined_and_replaced():
    world = make_world(2, cut=False)
    state, other = random_state(world, 2), random_state(world, 3, n=4, c=9)
    both = BeamState.cat([state, other])
    assert both.packed.shape == (4, 13, 9)
    same_state(both.gather(np.arange(9, 13)), other)
    assert (both.logw[:9, 7:] == -np.inf).all()
    lanes = np.array([3, 0, 3])
    np.testing.assert_array_equal(state.gather(lanes).ctx, state.ctx[lanes])
    np.testing.assert_array_equal(state.gather(lanes).key, state.key[lanes])
    put = state.put(np.array([5, 1]), other.gather(np.array([0, 2])))
    np.testing.assert_array_equal(put.key, state.key)
    np.testing.assert_array_equal(put.logw[[5, 1]], other.logw[[0, 2]])
    np.testing.assert_array_equal(put.logw[[0, 2], :7], state.logw[[0, 2]])


# -- what is random ------------------------------------------------------------------------


def survivors(weights: np.ndarray, k: int, runs: int) -> BeamState:
    """Many lanes of the same candidates (their node is their number), resampled."""
    shape = (runs, len(weights))
    state = BeamState.of(
        ctx=np.full(shape, 1),
        node=np.broadcast_to(np.arange(shape[1]), shape),
        logu=np.full(shape, 2.0) + np.log(weights),
        logw=np.full(shape, 1.0) + np.log(weights),
        key=start_keys(np.arange(runs, dtype=np.uint64)),
    )
    return pruned(state, k, random=True)[0]


def floor_of(weights: np.ndarray, k: int) -> float:
    """The c at which the survival chances min(w / c, 1) sum to k, by bisection."""
    low, high = 1e-12, 1e3
    for _ in range(200):
        c = math.sqrt(low * high)
        low, high = (c, high) if np.minimum(weights / c, 1).sum() > k else (low, c)
    return c


WEIGHTS = [
    np.array([0.5, 0.2, 0.1, 0.08, 0.07, 0.05]),
    np.array([0.01, 0.03, 0.9, 0.02, 0.04]),
    np.array([0.25, 0.25, 0.25, 0.25]),
    np.array([1.0, 1e-9, 1e-9, 2e-9]),
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=["skewed", "unsorted", "equal", "one"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_resample_is_unbiased_and_keeps_the_total(weights, k):
    runs = 4000
    kept = survivors(weights, k, runs)
    assert kept.logw.shape == (runs, k)
    assert (kept.logw > -np.inf).all()
    assert (np.diff(kept.logw, axis=1) <= 0).all()  # best first
    after = np.zeros((runs, len(weights)))
    np.add.at(after, (np.arange(runs)[:, None], kept.node), np.exp(kept.logw - 1.0))
    assert (np.count_nonzero(after, axis=1) == k).all()  # no candidate twice
    np.testing.assert_allclose(after.sum(axis=1), weights.sum(), rtol=1e-12)
    c = floor_of(weights, k)
    chance = np.minimum(weights / c, 1)
    error = c * np.sqrt(chance * (1 - chance) / runs)
    assert (np.abs(after.mean(axis=0) - weights) <= 4 * error + 1e-12).all()
    safe = weights > c * 1.0001
    np.testing.assert_allclose(after[:, safe], np.tile(weights[safe], (runs, 1)), rtol=1e-12)
    # A context's weight changes by the same factor as its candidate's.
    np.testing.assert_allclose(kept.logu - kept.logw, 1.0, rtol=1e-12)


def test_resample_draws_among_weights_far_below_the_best():
    logw = np.array([0.0, -800.0, -801.0, -5000.0])
    weights = np.exp(logw[1:] + 800.0)
    state = BeamState.of(
        ctx=np.ones((4000, 4)),
        node=np.broadcast_to(np.arange(4), (4000, 4)),
        logu=np.broadcast_to(logw, (4000, 4)),
        logw=np.broadcast_to(logw, (4000, 4)),
        key=start_keys(np.arange(4000, dtype=np.uint64)),
    )
    kept, _ = pruned(state, 2, random=True)
    assert (kept.node[:, 0] == 0).all()
    assert (kept.logw[:, 0] == 0).all()
    np.testing.assert_allclose(kept.logw[:, 1], -800.0 + math.log(weights.sum()), rtol=1e-12)
    chance = weights / weights.sum()
    seen = np.bincount(kept.node[:, 1], minlength=4)[1:] / 4000
    assert (np.abs(seen - chance) <= 4 * np.sqrt(chance * (1 - chance) / 4000)).all()


def test_resample_keeps_few_candidates_as_they_are():
    state = random_state(make_world(2, cut=False), 2)
    same_state(pruned(state, 50, random=True)[0], pruned(state, -1)[0])


def thin(ext: Extensions, log_z: np.ndarray, log_threshold: float, keys: Any) -> Extensions:
    """Extensions thinned at random below the threshold's share of `log_z`."""
    none = np.zeros(len(ext.lane), dtype=bool)
    return Extensions._make(thinned(none, ext, log_z, keys, log_threshold))


@pytest.mark.parametrize("threshold", [0.5, 0.15, 0.02])
def test_thin_is_unbiased(threshold):
    runs, weights = 4000, np.array([0.3, 0.01, 0.08, 0.2, 0.03, 0.002, 0.05])
    lane = np.repeat(np.arange(runs), len(weights))
    which = np.tile(np.arange(len(weights)), runs)
    log_z = np.full(runs, -7.0)
    ext = Extensions(lane, which, which, np.tile(np.log(weights), runs) - 7.0)
    keys = start_keys(np.arange(runs, dtype=np.uint64))
    got = thin(ext, log_z, math.log(threshold), keys)
    after = np.zeros((runs, len(weights)))
    after[got.lane, got.cand] = np.exp(got.logw + 7.0)
    error = after.std(axis=0) / math.sqrt(runs)
    assert (np.abs(after.mean(axis=0) - weights) <= 4 * error + 1e-12).all()
    heavy = weights >= threshold
    np.testing.assert_allclose(after[:, heavy], np.tile(weights[heavy], (runs, 1)), rtol=1e-12)
    drawn = after[:, ~heavy]
    assert np.isclose(drawn[drawn > 0], threshold, rtol=1e-12).all()
    # One systematic pass: within one of the expected number in every lane.
    assert (np.abs((drawn > 0).sum(axis=1) - weights[~heavy].sum() / threshold) < 1).all()
    assert len(thin(ext, log_z, -np.inf, keys).lane) == len(lane)


def test_small_extensions_are_left_out_and_counted():
    weights = np.array([0.3, 0.01, 0.2, 0.04, 0.5])
    lane = np.array([0, 0, 1, 1, 1])
    base = np.log([0.2, 0.1, 0.4])
    keep, dropped = pn.keep_extensions(lane, np.log(weights), base, math.log(0.1), False)
    totals = np.array([0.51, 0.84])
    np.testing.assert_array_equal(keep, weights / totals[lane] > 0.1)
    np.testing.assert_allclose(np.exp(dropped), [0.01, 0.04, 0.0], rtol=1e-12)


@pytest.mark.parametrize("within", [False, True])
def test_the_heaviest_extension_is_kept_unless_more_is_left_without_it(within):
    weights = np.array([0.3, 0.4, 0.3, 0.4, 0.2, 0.2, 0.25])
    lane = np.array([0, 0, 1, 1, 2, 2, 2])
    left = np.array([0.35, 0.45, 0.0, 1.0])  # beside the extensions
    every = np.bincount(lane, weights, minlength=4)
    with np.errstate(divide="ignore"):
        base = np.log(left + within * every)
    keep, dropped = pn.keep_extensions(lane, np.log(weights), base, math.log(0.6), within)
    assert np.flatnonzero(keep).tolist() == [1, 6]
    np.testing.assert_allclose(np.exp(dropped), [0.3, 0.7, 0.4, 0.0], rtol=1e-12)


# -- whole steps ---------------------------------------------------------------------------


def rescued(rescues: Rescues, nodes: np.ndarray) -> np.ndarray:
    """Return the bytes that healing could read in each lane, bool[N, 256]."""
    rescues.learn(nodes)
    out = np.zeros((len(nodes), 256), dtype=bool)
    for n, c in zip(*np.nonzero(nodes > 0), strict=True):
        out[n] |= rescues.lines[rescues.line_of[nodes[n, c]]]
    return out


class Parts:
    """Whole steps, one part after the other."""

    def __init__(self, lanes: ByteLanes) -> None:
        self.kernels, self.lanes, self.rules = lanes.model.kernels, lanes, lanes.rules

    def extended(self, state: BeamState, base: np.ndarray, within: bool) -> tuple[BeamState, Any]:
        """The candidates with their extensions above the threshold, and the log mass dropped."""
        ext, threshold = self.kernels.extensions(state, self.rules.cut), self.rules.log_threshold
        if self.rules.random:
            ext, dropped = thin(ext, base, threshold, state.key), np.full(len(base), -np.inf)
        else:
            keep, dropped = pn.keep_extensions(ext.lane, ext.logw, base, threshold, within)
            ext = ext.take(keep)
        store = self.kernels.store
        new = store.engine.tree.children(state.ctx[ext.lane, ext.cand], ext.token)
        ensure_now(store, np.concatenate([state.ctx.ravel(), new]))
        return state.extend(ext._replace(token=new)), dropped

    def pruned(self, state: BeamState) -> tuple[BeamState, np.ndarray]:
        random = self.rules.random
        return pruned(state, self.rules.k, self.rules.log_threshold, random=random)

    def read_on(self, state: BeamState, symbols: np.ndarray) -> BeamState:
        after = self.kernels.advance(state, symbols, self.rules.cut)
        return after._replace(key=read_keys(state.key, symbols)) if self.rules.random else after

    def row(self, extended: BeamState, dropped: np.ndarray) -> np.ndarray:
        lanes, rules = self.lanes, self.rules
        block = next_block(self.kernels, extended, rules.cut)
        total = lanes.log_z if rules.random else np.logaddexp.reduce(block, axis=1)
        row = np.full_like(block, -np.inf)
        row[total > -np.inf] = (block - np.where(total > -np.inf, total, 0.0)[:, None])[
            total > -np.inf
        ]
        first = lanes.state.logw[:, :1]
        logw = np.where(first > -np.inf, 0.0, -np.inf)
        best = BeamState.of(lanes.state.ctx[:, :1], np.zeros_like(logw), logw, logw)
        likely = np.exp(next_block(self.kernels, best, rules.cut))
        gaps = np.append(
            rescued(rules.rescues, lanes.state.nodes), np.zeros((len(row), 1), bool), axis=1
        )
        for n in np.flatnonzero(np.maximum(lanes.log_dropped, dropped) > -np.inf):
            gap = gaps[n] & (row[n] == -np.inf)
            if rules.heals and gap.any():
                share = likely[n, gap] + 1e-9
                row[n] += np.log1p(-rules.share)
                row[n, gap] = np.log(rules.share * share / share.sum())
        return row

    def all(self, symbols: np.ndarray, byte: np.ndarray) -> list[Any]:
        """What `rows`, `step`, `read` and `prune` find."""
        lanes, cut, lost = self.lanes, self.rules.cut, np.logaddexp
        extended, left_out = self.extended(lanes.state, lanes.log_z, True)
        ends = symbols == 256
        moved, gone = self.pruned(self.read_on(extended, np.where(ends, -1, symbols)))
        if self.rules.random:
            moved = moved._replace(key=read_keys(lanes.state.key, symbols))
        ending = next_block(self.kernels, extended, cut)[:, 256]
        stepped = np.where(ends, ending, moved.log_z)
        dropped = lost(lost(lanes.log_dropped, left_out), gone)
        out = [extended, left_out, self.row(extended, left_out), moved]
        out += [np.where(symbols < 0, lanes.log_z, stepped)]
        out += [np.where(symbols < 0, lanes.log_dropped, dropped)]
        fewer, out_of_it = self.pruned(lanes.state)
        for state, dropped in (
            (lanes.state, lanes.log_dropped),
            (fewer, lost(lanes.log_dropped, out_of_it)),
        ):
            able = self.kernels.advance(state, byte, cut).log_z
            grown, out_here = self.extended(
                state, lanes.log_z if self.rules.random else able, False
            )
            after = self.read_on(grown, byte).ranked()
            out += [after, after.log_z, lost(dropped, out_here)]
        return [*out, fewer, fewer.log_z, lost(lanes.log_dropped, out_of_it)]


@pytest.mark.parametrize("prune", ["topk", "unbiased"])
@pytest.mark.parametrize("seed", SEEDS)
async def test_whole_steps_are_made_of_the_parts(prune, seed):
    """Every whole step in one compiled call, and one part after the other: equal to 1e-12."""
    world = make_world(seed, cut=False)
    model = ByteModel(world.engine, RowTransform(), 1 << 20)
    ends = next(t for t in world.tokens if t)
    params = BeamParams(3, 0.05, prune=prune, eos_byte_strings=[ends])
    ensure_now(model.store, world.contexts)
    state, _ = pruned(random_state(world, seed), -1)
    log_z, none = state.log_z, np.zeros(len(state.key), dtype=np.int64)
    dropped = np.where(np.arange(len(log_z)) % 2, -40.0, -np.inf)
    rules = model.rules(params)
    lanes = ByteLanes(model, params, rules, state, log_z, dropped, none > 0, none)
    byte = bytes_for(world, state, seed)
    symbols = np.where(np.arange(len(byte)) % 3 == 0, 256, byte)
    row = (await lanes.rows()).numpy()
    assert lanes.look is not None
    found: list[Any] = [lanes.look.extended, lanes.look.dropped, row]
    lanes.rules = dataclasses.replace(rules, heals=False)
    for after in (await lanes.step(symbols), await lanes.read(byte)):
        found += [after.state, after.log_z, after.log_dropped]
    await lanes._with_rows(lambda: lanes._read(byte, prune=True))
    packed, key, numbers, _ = lanes._read(byte, prune=True)
    found += [BeamState(packed, key), *numbers]
    fewer = lanes.prune()
    found += [fewer.state, fewer.log_z, fewer.log_dropped]
    lanes.rules = rules
    for got, want in zip(found, Parts(lanes).all(symbols, byte), strict=True):
        if isinstance(got, BeamState):
            same_state(got, want)
        else:
            close(got, want)
