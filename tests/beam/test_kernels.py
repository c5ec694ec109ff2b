"""The beam's verbs: both kernel sets against plain Python, and against each other.

The oracles below know tokens, probabilities and byte strings only: no trie ranges, no rows
in trie order, no kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from genlm_bytes_smc.beam import pruning_numba as pn
from genlm_bytes_smc.beam.composed import keep_above, thin
from genlm_bytes_smc.beam.kernels import Kernels, Texts
from genlm_bytes_smc.beam.kernels_host import NumbaKernels
from genlm_bytes_smc.beam.kernels_torch import TorchKernels
from genlm_bytes_smc.beam.known_text import read_text
from genlm_bytes_smc.beam.lanes import ByteLanes
from genlm_bytes_smc.beam.model import ByteModel
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.beam.rng import start_keys
from genlm_bytes_smc.beam.state import BeamState, Extensions, HostState
from genlm_bytes_smc.beam.torch_parts import chunks
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.engine import RowEngine
from genlm_bytes_smc.lm.rows import RowStore, RowTransform
from genlm_bytes_smc.trie import TokenTrie, Vocabulary
from tests.beam.host_parts import HostParts, back, packed

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]
SEEDS = range(4)
NO_CUT = np.empty(0, dtype=np.int64)


# -- a small world: a vocabulary, an engine of random rows, contexts, states ----------------


class RandomEngine(RowEngine):
    """Random rows over given tokens, a function of the context's tokens; some tokens never."""

    def __init__(self, tokens: list[bytes], device: str = "cpu") -> None:
        super().__init__(
            None,
            device=torch.device(device),
            width=len(tokens),
            window=None,
            start=(0,),
            byte_vocab=tokens,
        )

    def evaluate(self, nodes: np.ndarray) -> torch.Tensor:
        rows = [self.row(self.tree.tokens(int(n))) for n in nodes]
        return torch.from_numpy(np.stack(rows)).to(self.device)

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


def make_world(seed: int, cut: bool, device: str = "cpu") -> World:
    rng = np.random.default_rng(seed)
    engine = RandomEngine(random_vocabulary(rng), device)
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
    return BeamState(ctx, node, logu, logw, keys)


def bytes_for(world: World, state: BeamState, seed: int) -> np.ndarray:
    """A byte a lane: mostly one that a candidate can read; now and then none, or -1."""
    rng = np.random.default_rng([seed, 2])
    letters = [*sorted({b for t in world.tokens for b in t}), 7, -1]
    return rng.choice(letters, size=len(state.key))


def kernel_sets(world: World, device: str) -> tuple[HostParts, TorchKernels]:
    """The compiled parts, and torch kernels over the same rows on `device`."""
    if device == "cpu":
        return HostParts(world.store), TorchKernels(world.store, flat_limit=300)
    engine = RandomEngine(world.tokens, device)
    engine.tree = world.engine.tree
    store = RowStore(engine, world.trie)
    ensure_now(store, world.contexts)
    return HostParts(world.store), TorchKernels(store, flat_limit=300)


def on(device: torch.device | str, state: BeamState) -> BeamState:
    ctx, node, logu, logw = (torch.from_numpy(a.copy()).to(device) for a in state[:4])
    return BeamState(ctx, node, logu, logw, state.key)


def host(state: BeamState) -> BeamState:
    arrays = (a.cpu().numpy() if isinstance(a, torch.Tensor) else a for a in state)
    return BeamState(*arrays)


def close(got: Any, want: Any) -> None:
    """Equal to 1e-12: as logs, relative to the larger of one and the value."""
    got, want = (
        x.cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x) for x in (got, want)
    )
    assert got.dtype == np.float64
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def same_state(got: BeamState, want: BeamState) -> None:
    got, want = host(got), host(want)
    np.testing.assert_array_equal(got.key, want.key)
    assert got.key.dtype == np.uint64
    alive = want.logw > -np.inf
    for name in ("ctx", "node"):
        a, b = getattr(got, name), getattr(want, name)
        assert a.dtype == np.int64
        assert a.shape == b.shape
        np.testing.assert_array_equal(a[alive], b[alive], err_msg=name)
    np.testing.assert_array_equal(got.node, want.node)
    np.testing.assert_array_equal(got.ctx < 0, want.ctx < 0)
    close(got.logu, want.logu)
    close(got.logw, want.logw)


def same_extensions(got: Extensions, want: Extensions) -> None:
    for name in ("lane", "cand", "token"):
        assert getattr(got, name).dtype == np.int64
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    close(got.logw, want.logw)
    close(got.dropped, want.dropped)


def knows_what_is_there(kernels: TorchKernels, state: BeamState) -> None:
    """The host's side of a state is what its tensors hold."""
    there = host(state)
    np.testing.assert_array_equal(kernels.contexts(state), there.ctx)
    np.testing.assert_array_equal(
        kernels.nodes(state), np.where(there.logw > -np.inf, there.node, -1)
    )
    close(kernels.log_z(state), np.logaddexp.reduce(there.logw, axis=1, initial=-np.inf))


@contextmanager
def counted(kernels: TorchKernels, syncs: int) -> Iterator[None]:
    """The verbs inside wait for the device exactly so often, and only to fetch."""
    before = kernels.syncs
    with OnlyFetches():
        yield
    assert kernels.syncs - before == syncs


class OnlyFetches(TorchDispatchMode):
    """Fail at operations whose result's size or value the host would have to wait for."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal"), name
        assert "unique" not in name
        if name == "repeat_interleave":
            assert kwargs.get("output_size") is not None
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype == torch.int64 for i in args[1])
        if name == "segment_reduce":
            assert kwargs["unsafe"]
        return func(*args, **kwargs)


# -- against plain Python ------------------------------------------------------------------


@pytest.fixture(params=["numba", "torch"])
def make_kernels(request: pytest.FixtureRequest) -> Callable[[World, BeamState], Any]:
    """Kernels of one kind, and the state in its kind of arrays."""

    def make(world: World, state: BeamState) -> tuple[Kernels, BeamState]:
        numba, torch_ = kernel_sets(world, "cpu")
        if request.param == "numba":
            return numba, state
        return torch_, on(torch_.device, state)

    return make


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_masses_are_sums_over_tokens_that_begin_so(make_kernels, seed, cut):
    world = make_world(seed, cut)
    state = random_state(world, seed)
    kernels, mine = make_kernels(world, state)
    want = np.full_like(state.logw, -np.inf)
    for i in zip(*np.nonzero(state.logw > -np.inf), strict=True):
        prefix = world.trie.spell(int(state.node[i]))
        mass = world.mass(int(state.ctx[i]), prefix) if prefix else 1.0
        want[i] = state.logu[i] + math.log(mass) if mass > 0 else -np.inf
    close(kernels.reweigh(mine, world.cut).logw, want)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_next_block_sums_what_each_byte_leaves(make_kernels, seed, cut):
    world = make_world(seed, cut)
    state = random_state(world, seed)
    kernels, mine = make_kernels(world, state)
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
    close(kernels.next_block(mine, world.cut), want)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_advance_reads_one_byte(make_kernels, seed, cut):
    world = make_world(seed, cut)
    state = random_state(world, seed)
    kernels, mine = make_kernels(world, state)
    byte = bytes_for(world, state, seed)
    got = host(kernels.advance(mine, byte, world.cut))
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
def test_extensions_are_the_tokens_spelled_to_their_end(make_kernels, seed, cut):
    world = make_world(seed, cut)
    state = random_state(world, seed)
    kernels, mine = make_kernels(world, state)
    got = kernels.extensions(mine, world.cut)
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
    assert (got.dropped == -np.inf).all()


# -- the two against each other ------------------------------------------------------------


@dataclass
class Both:
    """A world, both kernel sets, and states that are the same for each."""

    world: World
    numba: HostParts
    torch: TorchKernels
    pairs: list[tuple[BeamState, BeamState]]


@pytest.fixture(params=DEVICES)
def both(request: pytest.FixtureRequest, seed: int, cut: bool) -> Both:
    """A random state, and states made from it by every verb that cannot prune."""
    world = make_world(seed, cut)
    numba, torch_ = kernel_sets(world, request.param)
    state = random_state(world, seed)
    mine = on(torch_.device, state)
    knows_what_is_there(torch_, mine)
    byte = bytes_for(world, state, seed)
    ext, other = torch_.extensions(mine, world.cut), numba.extensions(state, world.cut)
    same_extensions(ext, other)
    rng = np.random.default_rng(seed)
    new = rng.choice(world.contexts, size=len(ext.lane))
    lanes = rng.integers(len(state.key), size=14)
    context = int(world.contexts[0])
    pairs = [
        (mine, state),
        (torch_.extend(mine, ext, new), numba.extend(state, other, new)),
        (torch_.roots(mine), numba.roots(state)),
        (torch_.advance(mine, byte, world.cut), numba.advance(state, byte, world.cut)),
        (torch_.reweigh(mine, world.cut), numba.reweigh(state, world.cut)),
        (torch_.gather(mine, lanes), numba.gather(state, lanes)),
        (torch_.single(context, 0.0, state.key), numba.single(context, 0.0, state.key)),
    ]
    for logw in (-3.5, -np.inf):
        key = state.key[:1]
        pairs.append((torch_.single(context, logw, key), numba.single(context, logw, key)))
    pairs.append((torch_.cat([a for a, _ in pairs]), numba.cat([b for _, b in pairs])))
    return Both(world, numba, torch_, pairs)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_states_are_the_same_on_torch(both):
    for a, b in both.pairs:
        same_state(a, b)
        knows_what_is_there(both.torch, a)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_and_steps_are_the_same_on_torch(both, seed):
    world, numba, torch_ = both.world, both.numba, both.torch
    for a, b in both.pairs:
        block, want = torch_.next_block(a, world.cut), numba.next_block(b, world.cut)
        close(block, want)
        log_z = numba.log_z(b)
        close(torch_.normalise(block, None), numba.normalise(want, None))
        close(torch_.normalise(block, log_z), numba.normalise(want, log_z))
        rescue = np.random.default_rng(seed).random((len(block), 256)) < 0.5
        row, proxy = numba.normalise(want, None), numba.next_block(numba.roots(b), world.cut)
        close(
            torch_.reserve(row.to(torch_.device), proxy.to(torch_.device), rescue, 1e-3),
            numba.reserve(row, proxy, rescue, 1e-3),
        )
        symbols = bytes_for(world, b, seed + 100)
        for cut in (world.cut, NO_CUT, world.cut[::2].copy()):  # the first is summed already
            moved, want_moved = torch_.advance(a, symbols, cut), numba.advance(b, symbols, cut)
            same_state(moved, want_moved)
            same_extensions(torch_.extensions(moved, cut), numba.extensions(want_moved, cut))


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_pruning_is_the_same_on_torch(both):
    for a, b in both.pairs:
        for k in (None, 1, 3, 1000):
            for log_threshold in (-np.inf, math.log(0.05), math.log(0.95)):
                kept, dropped = both.torch.select(a, k, log_threshold)
                want, want_dropped = both.numba.select(b, k, log_threshold)
                same_state(kept, want)
                close(dropped, want_dropped)
                knows_what_is_there(both.torch, kept)
            kept = both.torch.resample(a, k)
            same_state(kept, both.numba.resample(b, k))
            knows_what_is_there(both.torch, kept)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_extensions_beside_a_byte_are_the_same_on_torch(both, seed):
    world, numba, torch_ = both.world, both.numba, both.torch
    for a, b in both.pairs:
        byte = bytes_for(world, b, seed)
        same_extensions(
            torch_.open_read(a, byte, world.cut, -3.0), numba.open_read(b, byte, world.cut, -3.0)
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0), (3, 2)])
def test_states_with_nothing_in_them(shape, device):
    world = make_world(0, cut=True)
    numba, torch_ = kernel_sets(world, device)
    state = BeamState(
        ctx=np.full(shape, -1),
        node=np.zeros(shape, dtype=np.int64),
        logu=np.full(shape, -np.inf),
        logw=np.full(shape, -np.inf),
        key=np.arange(shape[0], dtype=np.uint64),
    )
    mine = on(torch_.device, state)
    byte = np.full(shape[0], 65)
    same_state(torch_.advance(mine, byte, world.cut), numba.advance(state, byte, world.cut))
    same_state(torch_.reweigh(mine, world.cut), numba.reweigh(state, world.cut))
    same_state(torch_.resample(mine, 1), numba.resample(state, 1))
    same_state(torch_.select(mine, 1, -np.inf)[0], numba.select(state, 1, -np.inf)[0])
    same_state(torch_.cat([mine, mine]), numba.cat([state, state]))
    same_state(torch_.roots(mine), numba.roots(state))
    assert len(torch_.extensions(mine, world.cut).lane) == 0
    assert torch.isneginf(torch_.next_block(mine, world.cut)).all()
    assert (torch_.log_z(mine) == -np.inf).all()
    knows_what_is_there(torch_, torch_.advance(mine, byte, world.cut))


def test_equal_weights_keep_their_order():
    world = make_world(0, cut=False)
    numba, torch_ = kernel_sets(world, "cpu")
    n, c = 5, 40
    weights = np.random.default_rng(0).choice([-1.0, -2.0, -np.inf], size=(n, c))
    node = np.arange(n * c).reshape(n, c) % len(world.trie)
    node[weights == -np.inf] = 0
    ctx = np.full((n, c), world.contexts[0])
    state = BeamState(ctx, node, weights, weights, start_keys(np.arange(n, dtype=np.uint64)))
    mine = on(torch_.device, state)
    for k in (None, 3, 25):
        same_state(torch_.select(mine, k, -np.inf)[0], numba.select(state, k, -np.inf)[0])
        same_state(torch_.resample(mine, k), numba.resample(state, k))


@pytest.mark.parametrize("limit", [1, 7, 1 << 22])
def test_results_do_not_depend_on_the_chunks(limit):
    world = make_world(3, cut=True)
    kernels = TorchKernels(world.store, flat_limit=limit)
    other = TorchKernels(world.store)
    state = on(kernels.device, random_state(world, 3))
    byte = bytes_for(world, state, 3)
    same_state(kernels.advance(state, byte, world.cut), other.advance(state, byte, world.cut))
    assert torch.equal(kernels.next_block(state, world.cut), other.next_block(state, world.cut))
    # Now `advance` finds the masses summed.
    same_state(kernels.advance(state, byte, world.cut), other.advance(state, byte, world.cut))


def test_chunks_cover_all_and_stay_below_the_limit():
    sizes = np.array([3, 9, 0, 1, 1, 12, 2, 0])
    slices = list(chunks(sizes, 5))
    assert np.concatenate([np.arange(8)[i] for i in slices]).tolist() == list(range(8))
    assert all(sizes[i].sum() <= 5 or i.stop - i.start == 1 for i in slices)
    assert list(chunks(sizes[:0], 5)) == []


# -- what the host waits for ---------------------------------------------------------------


def test_syncs_of_each_verb():
    world = make_world(1, cut=True)
    kernels = TorchKernels(world.store)
    cut = world.cut
    start = kernels.select(on(kernels.device, random_state(world, 1)), 4, -np.inf)[0]
    byte = bytes_for(world, start, 1)
    lanes = np.array([3, 3, 1])
    with counted(kernels, 0):
        begun = kernels.single(int(world.contexts[0]), 0.0, start.key)
        kernels.single(int(world.contexts[0]), -1.0, start.key[:1])
        both = kernels.gather(kernels.cat([begun, start]), lanes)
        for state in (begun, start, both):
            kernels.contexts(state), kernels.nodes(state), kernels.log_z(state)
        block = kernels.next_block(kernels.roots(start), cut)
        rescue = np.ones((len(byte), 256), dtype=bool)
        kernels.reserve(kernels.normalise(block, None), block, rescue, 0.1)
        kernels.normalise(block, kernels.log_z(start))
        kernels.reweigh(start, cut)
    with counted(kernels, 1):
        ext = kernels.extensions(start, cut)
    assert len(ext.lane)
    with counted(kernels, 0):
        extended = kernels.extend(start, ext, np.full(len(ext.lane), world.contexts[0]))
        kernels.contexts(extended), kernels.nodes(extended)
        kernels.next_block(extended, cut)
        state = kernels.advance(extended, byte, cut)
        kernels.contexts(state)
    with counted(kernels, 1):
        kept, _ = kernels.select(state, 3, -5.0)
        kernels.contexts(kept), kernels.nodes(kept), kernels.log_z(kept)
    with counted(kernels, 1):
        kept = kernels.resample(state, 2)
        kernels.contexts(kept), kernels.nodes(kept), kernels.log_z(kept)
    with counted(kernels, 1):
        assert len(kernels.open_read(start, byte, cut, -np.inf).lane)
    with counted(kernels, 1):
        kernels.log_z(state), kernels.log_z(state)
    with counted(kernels, 1):
        kernels.nodes(state), kernels.nodes(state), kernels.advance(state, byte, cut)


ELSEWHERE = torch.device("cuda")


class Elsewhere(torch.Tensor):
    """A CPU tensor that stands for one on another device: it does not mix with CPU tensors."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Elsewhere:
        shape, strides, at = held.size(), held.stride(), held.storage_offset()
        out = torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, storage_offset=at, dtype=held.dtype, device="cpu"
        )
        out.held = held
        return out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(x: Any) -> Any:
            here = isinstance(x, torch.Tensor) and not isinstance(x, cls)
            assert not (here and x.dim()), f"{func} mixes devices"
            return x.held if isinstance(x, cls) else x

        out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        return tree_map(lambda x: cls(x) if isinstance(x, torch.Tensor) else x, out)


class PretendElsewhere(TorchFunctionMode):
    """Tensors made on or sent to `ELSEWHERE` are `Elsewhere` ones; pinning does nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.to and ELSEWHERE in args[1:]:
            return args[0] if isinstance(args[0], Elsewhere) else Elsewhere(args[0])
        if kwargs.get("device") == ELSEWHERE:
            return Elsewhere(func(*args, **kwargs | {"device": "cpu"}))
        return func(*args, **kwargs)


def every_verb(kernels: TorchKernels, state: BeamState, world: World) -> list[Any]:
    """States and blocks from one verb after another."""
    byte = bytes_for(world, state, 1)
    out: list[Any] = [kernels.select(state, 5, -9.0)[0]]
    for cut in (world.cut, NO_CUT):
        state = out[0]
        ext = kernels.extensions(state, cut)
        state = kernels.extend(state, ext, np.resize(world.contexts, len(ext.lane)))
        moved = kernels.advance(state, byte, cut)
        block = kernels.next_block(state, cut)
        kept = kernels.resample(kernels.advance(state, byte, cut), 2)
        out += [state, moved, block, kept, kernels.normalise(block, kernels.log_z(kept))]
        rescue = np.ones((len(byte), 256), dtype=bool)
        out.append(kernels.reserve(kernels.normalise(block, None), block, rescue, 0.1))
        out.append(kernels.reweigh(moved, cut))
        lanes = kernels.gather(kept, np.array([1, 2, 5, 6]))
        single = kernels.single(int(world.contexts[0]), -1.0, kept.key[:1])
        out.append(kernels.cat([kernels.roots(kept), lanes, single]))
        out.append(kernels._send(kernels.open_read(kept, byte, cut, -3.0).logw))
    return out


@pytest.mark.parametrize("seed", SEEDS)
def test_host_and_device_do_not_mix(seed):
    world = make_world(seed, cut=True)
    state = random_state(world, seed)
    want = every_verb(TorchKernels(world.store, flat_limit=100), on("cpu", state), world)
    with PretendElsewhere():
        store = SimpleNamespace(
            engine=SimpleNamespace(device=ELSEWHERE),
            trie=world.trie,
            probs=Elsewhere(world.store.probs),
            slot_of=world.store.slot_of,
        )
        kernels = TorchKernels(store, flat_limit=100)
        kernels._fetch = lambda tensor: tensor.held.numpy()
        got = every_verb(kernels, on(ELSEWHERE, state), world)
    for a, b in zip(got, want, strict=True):
        pairs = zip(a[:4], b[:4], strict=True) if isinstance(a, BeamState) else [(a, b)]
        assert all(torch.equal(x.held, y) for x, y in pairs)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_nothing_but_a_fetch_waits_for_the_gpu(monkeypatch):
    world = make_world(1, cut=True)
    _, kernels = kernel_sets(world, "cuda")
    state = on(kernels.device, random_state(world, 1))
    fetch = kernels._fetch

    def fetch_aloud(tensor: torch.Tensor) -> np.ndarray:
        torch.cuda.set_sync_debug_mode("default")
        try:
            return fetch(tensor)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(kernels, "_fetch", fetch_aloud)
    kernels.next_block(state, world.cut)  # what is set up once may wait
    try:
        torch.cuda.set_sync_debug_mode("error")
        every_verb(kernels, state, world)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- what is random ------------------------------------------------------------------------


def survivors(kernels: Kernels, weights: np.ndarray, k: int, runs: int) -> BeamState:
    """Many lanes of the same candidates (their node is their number), resampled."""
    shape = (runs, len(weights))
    state = BeamState(
        ctx=np.full(shape, 1),
        node=np.broadcast_to(np.arange(shape[1]), shape).copy(),
        logu=np.full(shape, 2.0) + np.log(weights),
        logw=np.full(shape, 1.0) + np.log(weights),
        key=start_keys(np.arange(runs, dtype=np.uint64)),
    )
    if isinstance(kernels, TorchKernels):
        state = on(kernels.device, state)
    return host(kernels.resample(state, k))


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


@pytest.mark.parametrize("kind", ["numba", "torch"])
@pytest.mark.parametrize("weights", WEIGHTS, ids=["skewed", "unsorted", "equal", "one"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_resample_is_unbiased_and_keeps_the_total(kind, weights, k):
    world = make_world(0, cut=False)
    kernels = HostParts(world.store) if kind == "numba" else TorchKernels(world.store)
    runs = 4000
    kept = survivors(kernels, weights, k, runs)
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
    world = make_world(0, cut=False)
    logw = np.array([0.0, -800.0, -801.0, -5000.0])
    weights = np.exp(logw[1:] + 800.0)
    state = BeamState(
        ctx=np.ones((4000, 4), dtype=np.int64),
        node=np.broadcast_to(np.arange(4), (4000, 4)),
        logu=np.broadcast_to(logw, (4000, 4)),
        logw=np.broadcast_to(logw, (4000, 4)),
        key=start_keys(np.arange(4000, dtype=np.uint64)),
    )
    kernels = TorchKernels(world.store)
    kept = host(kernels.resample(on("cpu", state), 2))
    assert (kept.node[:, 0] == 0).all()
    assert (kept.logw[:, 0] == 0).all()
    np.testing.assert_allclose(kept.logw[:, 1], -800.0 + math.log(weights.sum()), rtol=1e-12)
    chance = weights / weights.sum()
    seen = np.bincount(kept.node[:, 1], minlength=4)[1:] / 4000
    assert (np.abs(seen - chance) <= 4 * np.sqrt(chance * (1 - chance) / 4000)).all()


def test_resample_keeps_few_candidates_as_they_are(make_kernels):
    world = make_world(2, cut=False)
    state = random_state(world, 2)
    kernels, mine = make_kernels(world, state)
    same_state(kernels.resample(mine, 50), kernels.select(mine, None, -np.inf)[0])


@pytest.mark.parametrize("threshold", [0.5, 0.15, 0.02])
def test_thin_is_unbiased(threshold):
    runs, weights = 4000, np.array([0.3, 0.01, 0.08, 0.2, 0.03, 0.002, 0.05])
    lane = np.repeat(np.arange(runs), len(weights))
    which = np.tile(np.arange(len(weights)), runs)
    log_z = np.full(runs, -7.0)
    ext = Extensions(
        lane, which, which, np.tile(np.log(weights), runs) - 7.0, np.full(runs, -np.inf)
    )
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
    assert thin(ext, log_z, -np.inf, keys) is ext


def test_keep_above_leaves_out_and_counts_small_extensions():
    weights = np.array([0.3, 0.01, 0.2, 0.04, 0.5])
    lane = np.array([0, 0, 1, 1, 1])
    ext = Extensions(lane, lane, np.arange(5), np.log(weights), np.full(3, -np.inf))
    got = keep_above(ext, np.log([0.2, 0.1, 0.4]), math.log(0.1))
    totals = np.array([0.51, 0.84])
    want = weights / totals[lane] > 0.1
    np.testing.assert_array_equal(got.token, np.flatnonzero(want))
    np.testing.assert_allclose(np.exp(got.dropped), [0.01, 0.04, 0.0], rtol=1e-12)


@pytest.mark.parametrize("within", [False, True])
def test_keep_above_keeps_the_heaviest_unless_more_is_left_without_it(within):
    weights = np.array([0.3, 0.4, 0.3, 0.4, 0.2, 0.2, 0.25])
    lane = np.array([0, 0, 1, 1, 2, 2, 2])
    ext = Extensions(lane, lane, np.arange(7), np.log(weights), np.full(4, -np.inf))
    left = np.array([0.35, 0.45, 0.0, 1.0])  # beside the extensions
    every = np.bincount(lane, weights, minlength=4)
    with np.errstate(divide="ignore"):
        got = keep_above(ext, np.log(left + within * every), math.log(0.6), within=within)
    assert got.token.tolist() == [1, 6]
    np.testing.assert_allclose(np.exp(got.dropped), [0.3, 0.7, 0.4, 0.0], rtol=1e-12)


# -- whole beams ---------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("prune", ["topk", "unbiased"])
@pytest.mark.parametrize(("seed", "threshold"), [(4, 0.02), (8, 0.02), (4, 0.6)])
async def test_beams_are_the_same_on_torch(seed, threshold, prune, device):
    world = make_world(seed, cut=False)
    ends = next(t for t in world.tokens if t)
    params = BeamParams(K=3, prune_threshold=threshold, prune=prune, eos_byte_strings=[ends])
    models = [
        ByteModel(RandomEngine(world.tokens, at), RowTransform(), 1 << 20) for at in ("cpu", device)
    ]
    models[1].kernels = TorchKernels(models[1].store)
    beams = [await ByteLanes.start(m, params, 4, lane_seeds=[5, 6, 7, 8]) for m in models]
    rng = np.random.default_rng(seed)
    for _ in range(8):
        rows = [(await b.logp_next()).cpu().numpy() for b in beams]
        close(rows[1], rows[0])
        close(beams[1].log_z, beams[0].log_z)
        close(beams[1].log_dropped, beams[0].log_dropped)
        np.testing.assert_array_equal(beams[1].heals, beams[0].heals)
        p = np.where(beams[0].alive[:, None], np.exp(rows[0]), 0.0)
        symbols = np.full(4, -1)
        for n in np.flatnonzero(p.sum(axis=1) > 0):
            unlikely = rng.random() < 0.3  # often a byte that only healing can read
            symbols[n] = (
                np.where(p[n] > 0, p[n], 2).argmin()
                if unlikely
                else rng.choice(257, p=p[n] / p[n].sum())
            )
        beams = [await b.step(symbols) for b in beams]
    if threshold < 0.5:
        assert beams[0].heals.any() == (prune == "topk")  # these seeds heal


@pytest.mark.parametrize(("prune", "heal"), [("unbiased", False), ("topk", False), ("topk", True)])
async def test_a_byte_step_takes_two_syncs(prune, heal):
    """One for what ends a token, one for what pruning keeps."""
    syncs = 2
    world = make_world(0, cut=False)
    params = BeamParams(K=4, prune=prune, heal=heal)
    model = ByteModel(RandomEngine(world.tokens), RowTransform(), 1 << 20)
    model.kernels = kernels = TorchKernels(model.store)
    lanes = await ByteLanes.start(model, params, 3, lane_seeds=[1, 2, 3])
    for _ in range(3):
        row = await lanes.logp_next()
        before = kernels.syncs
        lanes = await lanes.step(row[:, :256].argmax(dim=1).numpy())
        assert kernels.syncs - before <= syncs - 1  # less the extensions, for the row
        before = kernels.syncs
        await lanes.extended()
        assert kernels.syncs - before <= 1
    assert lanes.alive.any()


@dataclass
class Some:
    """Lanes as kernels take them."""

    state: Any
    log_z: np.ndarray
    log_dropped: np.ndarray
    rules: Any


def settled(call: Callable[[], Any], *stores: RowStore) -> Any:
    """What a step gives once its rows are there."""
    while True:
        found = call()
        if len(found.missing) == 0:
            return found
        for store in stores:
            ensure_now(store, found.missing)


@pytest.mark.parametrize("prune", ["topk", "unbiased"])
@pytest.mark.parametrize("seed", SEEDS)
def test_whole_steps_are_the_composed_ones(prune, seed):
    """Every whole step in one compiled call, and composed of torch's parts: equal to 1e-12."""
    world = make_world(seed, cut=False)
    model = ByteModel(world.engine, RowTransform(), 1 << 20)
    ends = next(t for t in world.tokens if t)
    params = BeamParams(3, 0.05, prune=prune, eos_byte_strings=[ends])
    ensure_now(model.store, world.contexts)
    host_, torch_ = NumbaKernels(model.store), TorchKernels(model.store)
    state = random_state(world, seed)
    state = BeamState(*pn.take(*state[:4], *pn.select_topk(state.logw, -1, -np.inf)[:2]), state.key)
    log_z = pn.logsumexp_rows(state.logw)
    dropped = np.where(np.arange(len(log_z)) % 2, -40.0, -np.inf)
    mine = Some(packed(state), log_z, dropped, model.rules(params))
    other = Some(on("cpu", state), log_z, dropped, model.rules(params))
    byte = bytes_for(world, state, seed)
    symbols = np.where(np.arange(len(byte)) % 3 == 0, 256, byte)
    rng = np.random.default_rng(seed)
    texts = [bytes(rng.choice(byte[byte >= 0], 4).tolist()) for _ in byte]

    def steps(kernels: Any, lanes: Some) -> list[Any]:
        look = settled(lambda: kernels.look(lanes, None, row=True), model.store)
        stepped = settled(lambda: kernels.step(lanes, look, symbols), model.store)
        read = settled(lambda: kernels.read(lanes, byte), model.store)
        both = settled(lambda: kernels.read(lanes, byte, prune=True), model.store)
        pruned = kernels.prune(lanes)
        out = [
            look.extended,
            look.dropped,
            look.row,
            *stepped[:3],
            *read[:3],
            *both[:3],
            *pruned[:3],
        ]
        for by_steps in (False, True):
            known = Texts.of(texts)
            while True:  # until nothing is missing or every lane is dead
                run = kernels.run_texts(lanes, known, 0, (9, 9), by_steps=by_steps, sure=None)
                if len(run.missed) == 0:
                    break
                ensure_now(model.store, run.missed)
            out += [run.state, run.log_z, run.log_dropped, np.array([float(run.read)])]
        return out

    for got, want in zip(steps(host_, mine), steps(torch_, other), strict=True):
        if isinstance(got, HostState):
            same_state(back(got), want)
        else:
            close(got, want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("prune", ["topk", "unbiased"])
async def test_texts_read_are_the_same_on_torch(prune, device):
    world = make_world(1, cut=False)
    params = BeamParams(K=3, prune_threshold=0.02, prune=prune)
    text = b"".join(world.tokens[i] for i in (3, 9, 4, 12))
    logs = []
    for kernels, at in ((NumbaKernels, "cpu"), (TorchKernels, device)):
        model = ByteModel(RandomEngine(world.tokens, at), RowTransform(), 1 << 20)
        model.kernels = kernels(model.store)
        lanes = await ByteLanes.start(model, params, 2, lane_seeds=[1, 2])
        lanes = await read_text(lanes, text)
        logs.append((lanes.log_z, lanes.log_dropped, (await lanes.logp_next()).cpu()))
    assert (logs[0][0] > -np.inf).any()
    for got, want in zip(logs[1], logs[0], strict=True):
        close(got, want)
