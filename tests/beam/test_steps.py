"""What compiled steps are given and give back: arrays by address, states in one array."""

import numba
import numpy as np
import pytest
import torch

from genlm_bytes_smc import TokenTrie, Vocabulary, as_engine
from genlm_bytes_smc.beam import masses_numba as nm
from genlm_bytes_smc.beam.handles import Handles, opened
from genlm_bytes_smc.beam.model import byte_model
from genlm_bytes_smc.beam.state import BeamState
from genlm_bytes_smc.beam.steps import packed_of, unpack
from genlm_bytes_smc.lm.host_rows import FAN, HostRows
from tests.toys import ToyLM


def called(function):
    """A function for Python to call that only compiled code calls otherwise."""
    return numba.njit(lambda *args: function(*args))


sum_root, sum_roots = called(nm.sum_root), called(nm.sum_roots)
child_mass, add_children = called(nm.child_mass), called(nm.add_children)


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


def test_states_go_in_as_they_came_out():
    packed = np.arange(24, dtype=np.int64).reshape(4, 2, 3)
    state = unpack(packed, np.zeros(2, dtype=np.uint64))
    assert packed_of(state) is packed
    changed = state._replace(node=state.node + 1)
    np.testing.assert_array_equal(packed_of(changed)[1], packed[1] + 1)
    plain = BeamState(*(a.copy() for a in state))
    np.testing.assert_array_equal(packed_of(plain), packed)


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
