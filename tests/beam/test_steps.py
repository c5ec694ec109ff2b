"""What compiled steps are given and give back: arrays by address, states in one array."""

import numpy as np
import pytest
import torch

from genlm_bytes_smc import TokenTrie, Vocabulary, as_engine
from genlm_bytes_smc.beam import masses_numba as nm
from genlm_bytes_smc.beam import pruning_numba as pn
from genlm_bytes_smc.beam.masses_numba import Handles, opened
from genlm_bytes_smc.beam.model import byte_model
from genlm_bytes_smc.beam.pruning_numba import GOLDEN, mix
from genlm_bytes_smc.beam.state import BeamState, start_keys
from genlm_bytes_smc.lm.host_rows import FAN, HostRows
from tests.inner import called
from tests.toys import ToyLM

sum_root, sum_roots = called(nm.sum_root), called(nm.sum_roots)
child_mass, add_children = called(nm.child_mass), called(nm.add_children)


def uniforms(keys, draw):
    """One number in [0, 1) a key, float64[N]; `draw` numbers the draws at one string."""
    salt = mix(np.full(1, draw + 1, dtype=np.uint64) * GOLDEN)
    return (mix(keys ^ salt) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def read_keys(keys, symbols):
    """Keys after one more symbol (0..256) a lane."""
    return mix(keys + GOLDEN * (symbols + 2).astype(np.uint64))


def nested_tokens():
    """Much of the vocabulary begins with a space, and much of that with " a"."""
    words = [f"{a}{b}{c}".encode() for a in "abcdefghij" for b in "abcdefgh" for c in "abcdefgh"]
    many = [b" a" + w for w in words] + [b" " + w for w in words]
    return [b"", b" ", b" a", b"z", *words, *many, b"z", b" zz"]


@pytest.fixture
def rows():
    trie = TokenTrie.build(Vocabulary.from_tokens(nested_tokens()))
    held = HostRows(trie, 3, exact=False)
    logits = np.random.default_rng(0).normal(0, 3, size=(3, len(trie.vocab))).astype(np.float32)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    held.take(np.array([2, 0, 1]), torch.from_numpy(logits))
    return trie, held.arrays(np.array([0, 1, 2, 0]))


def test_heavy_nodes_stand_before_those_below_them(rows):
    trie, arrays = rows
    spelled = [trie.spell(int(node)) for node in arrays.heavy]
    assert spelled[:3] == [b"", b" ", b" a"]
    for h, (above, byte, end) in enumerate(arrays.nest.tolist()):
        below = [i for i, s in enumerate(spelled) if s.startswith(spelled[h])]
        assert below == list(range(h, end))
        assert h == 0 or spelled[h] == spelled[above] + bytes([byte])
    assert int(arrays.labels[0]) == FAN * len(spelled)
    assert int(arrays.labels[1]) == FAN * 1 + 256


@pytest.mark.parametrize("cut", [[], [b"z"], [b" a", b" zz"]])
def test_masses_after_heavy_nodes_are_sums_over_their_tokens(rows, cut):
    trie, arrays = rows
    tokens = nested_tokens()
    at = [int(trie.position[i]) for i, t in enumerate(tokens) if t in cut]
    slots, scales = np.array([2, 1]), np.array([1.0, 0.25])
    mass = sum_roots(arrays, slots, scales, np.sort(np.array(at, dtype=np.int64)))
    p = arrays.probs[slots].astype(float) * (arrays.scale[slots] * scales)[:, None]
    for h, node in enumerate(arrays.heavy.tolist()):
        prefix = trie.spell(node)
        for b in range(256):
            under = prefix + bytes([b])
            ids = [i for i, t in enumerate(tokens) if t.startswith(under) and t not in cut]
            want = p[:, ids].sum()
            assert mass[FAN * h + b] == pytest.approx(want, rel=1e-6, abs=1e-30)


def test_masses_below_an_edge_do_not_depend_on_what_was_summed(rows):
    trie, arrays = rows
    walked = nm.TrieArrays(trie.lo, trie.hi, trie.ends, trie.first_child, trie.byte)
    none = np.empty(0, dtype=np.int64)

    def masses(slot):
        return [
            child_mass(walked, arrays, slot, node, child, none)
            for node in arrays.heavy.tolist()
            for child in range(trie.first_child[node], trie.first_child[node + 1])
        ]

    before = masses(0)
    sum_root(arrays, 0)
    assert arrays.summed.tolist() == [True, False, False]
    np.testing.assert_allclose(masses(0), before, rtol=1e-7)


def test_arrays_by_address_are_the_arrays():
    model = byte_model(as_engine(ToyLM(seed=3)))
    trie = model.kernels._trie
    handles, tree = Handles(trie), model.engine.tree
    model.store.table.cover(tree.capacity)
    given = handles.of(model.store.host, tree.arrays)
    assert handles.of(model.store.host, tree.arrays) is given
    found = called(opened)(given, model.store.host.probs)
    for mine, theirs in zip((trie, model.store.host, tree.arrays), found, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert (a.dtype, a.shape, a.ctypes.data) == (b.dtype, b.shape, b.ctypes.data)
    tree.grow()
    assert handles.of(model.store.host, tree.arrays) is not given


def test_a_state_is_one_array_and_its_views():
    """What `of` packs comes back as it was given."""
    rng = np.random.default_rng(0)
    ctx, node = rng.integers(9, size=(2, 4, 3))
    logu, logw = rng.normal(size=(2, 4, 3))
    state = BeamState.of(ctx, node, logu, logw, np.arange(4, dtype=np.uint64))
    assert state.packed.shape == (4, 4, 3)
    for got, want in zip(
        (state.ctx, state.node, state.logu, state.logw), (ctx, node, logu, logw), strict=True
    ):
        np.testing.assert_array_equal(got, want)
        assert got.base is not None


@pytest.mark.parametrize(("draw", "salt"), [(0, pn._PRUNE), (1, pn._THIN)])
def test_compiled_random_numbers_are_those_of_keys(draw, salt):
    """Keys and uniforms, bit for bit."""
    keys = start_keys(np.arange(50, dtype=np.uint64))
    symbols = np.arange(-1, 49)
    np.testing.assert_array_equal(pn.keys_after(keys, symbols), read_keys(keys, symbols))
    np.testing.assert_array_equal(called(pn._uniforms)(keys, salt), uniforms(keys, draw))


@pytest.mark.parametrize("cut", [[], [b"z"], [b" a", b" zz"]])
def test_masses_of_all_children_are_those_of_each(rows, cut):
    trie, arrays = rows
    tokens = nested_tokens()
    at = [int(trie.position[i]) for i, t in enumerate(tokens) if t in cut]
    walked = nm.TrieArrays(trie.lo, trie.hi, trie.ends, trie.first_child, trie.byte)
    positions = np.sort(np.array(at, dtype=np.int64))
    nodes = [*arrays.heavy.tolist(), trie.child(0, ord("a")), trie.child(0, ord("z"))]
    for slot in (0, 2):
        sum_root(arrays, slot)
        for node in nodes:
            out, want = np.full(257, 0.5), np.full(257, 0.5)
            add_children(walked, arrays, slot, node, 0.25, positions, out)
            for child in range(trie.first_child[node], trie.first_child[node + 1]):
                mass = child_mass(walked, arrays, slot, node, child, positions)
                want[trie.byte[child]] += 0.25 * mass
            np.testing.assert_allclose(out, want, rtol=1e-12)
