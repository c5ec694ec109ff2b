"""Rows that torch makes linear, as on a GPU, are what the compiled loops make of them."""

import gc
import math
import mmap
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from genlm_bytes_smc import BeamParams, ByteLanes, TokenTrie, Vocabulary, as_engine
from genlm_bytes_smc.beam import masses_numba as nm
from genlm_bytes_smc.beam.model import byte_model
from genlm_bytes_smc.fast_path import FastPathWarning
from genlm_bytes_smc.lm import devices, host_rows
from genlm_bytes_smc.lm.contexts import ContextTree
from genlm_bytes_smc.lm.devices import Columns, linear_rows
from genlm_bytes_smc.lm.host_rows import HostRows, runs
from genlm_bytes_smc.lm.rows import SlotTable
from genlm_bytes_smc.lm.rows_numba import DOUBLINGS
from tests.beam.test_steps import nested_tokens
from tests.inner import called
from tests.lm.test_host_rows import TOKENS
from tests.toys import ToyLM

sum_root = called(nm.sum_root)
CPU = torch.device("cpu")
HERE = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]
SPELLED = [t for t in nested_tokens() if t]
VOCABULARIES = {"some tokens spell nothing": nested_tokens(), "all spell something": SPELLED}


def rows_of(n, width, seed=0, spread=5.0):
    """float32[n, width] of log-probabilities, some of them impossible."""
    logits = np.random.default_rng(seed).normal(0, spread, size=(n, width))
    logits[:, 5:40:7] = -np.inf
    return torch.log_softmax(torch.from_numpy(logits), dim=1).float()


@pytest.mark.parametrize("device", HERE)
@pytest.mark.parametrize("pad", [0, 5])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_linear_rows_are_what_the_compiled_loops_make(vocabulary, pad, device, monkeypatch):
    monkeypatch.setattr(devices, "_AT_ONCE", 3000)  # two rows at once
    trie = TokenTrie.build(Vocabulary.from_tokens(VOCABULARIES[vocabulary]))
    rows = rows_of(5, len(trie.vocab) + pad)
    slots = np.array([4, 5, 6, 1, 3])
    loops = HostRows(trie, 8, exact=False)
    torchs = HostRows(trie, 8, exact=False, device=torch.device(device))
    total = loops.take(slots, rows)
    np.testing.assert_allclose(torchs.take_linear(slots, rows.to(device)), total, rtol=1e-6)
    want, got = (held.arrays(np.arange(8)) for held in (loops, torchs))
    for slot, row in zip(slots.tolist(), rows, strict=True):
        p = got.probs[slot].astype(np.float64) * 2.0**-DOUBLINGS
        np.testing.assert_allclose(p, row[: len(p)].double().exp(), rtol=1e-7)
        np.testing.assert_allclose(got.probs[slot], want.probs[slot], rtol=2e-7)
        assert got.scale[slot] == pytest.approx(want.scale[slot], rel=1e-6)
        assert got.summed[slot]
        there = got.roots[slot].copy()
        got.summed[slot] = False
        sum_root(got, slot)  # as the loops find them when they are wanted
        np.testing.assert_allclose(there, got.roots[slot], rtol=1e-12)
    assert torchs.used == loops.used


@pytest.mark.parametrize("value", [-170.0, math.nan, math.inf])
def test_rows_that_float32_cannot_hold_are_left_to_the_loops(value):
    trie = TokenTrie.build(Vocabulary.from_tokens(SPELLED))
    rows = rows_of(2, len(trie.vocab))
    held = HostRows(trie, 2, exact=False)
    assert held.take_linear(np.array([0, 1]), rows) is not None
    rows[1, 3] = value
    assert held.take_linear(np.array([0, 1]), rows) is None


def test_labels_are_summed_below_every_heavy_node_above_them():
    labels = np.array([257 * 2, 257 * 2, 257 + 7, 257 * 3, 65], dtype=np.uint16)
    nest = np.array([[-1, 0, 3], [0, 65, 3], [1, 9, 3]])
    columns = Columns.of(labels, nest, CPU)
    logp = torch.tensor([[0.1, 0.2, 0.3, 0.05, 0.4]]).log()
    _, sums = linear_rows(logp, columns)
    p = sums[0, 2:] * 2.0**-DOUBLINGS
    assert p[257 * 2] == pytest.approx(0.3, rel=1e-6)
    assert p[257 + 9] == pytest.approx(0.3, rel=1e-6)
    assert p[257 + 7] == pytest.approx(0.3, rel=1e-6)
    assert p[65] == pytest.approx(1.0, rel=1e-6)
    assert int((p > 0).sum()) == 4
    assert sums[0, 0] * 2.0**-DOUBLINGS == pytest.approx(1.0, rel=1e-6)  # one spells nothing


@pytest.mark.parametrize("piece", [4, 7, 100])
def test_runs_bring_every_row_into_its_slot_within_pieces(piece):
    slots, width = np.array([3, 4, 5, 0, 8, 9]), 5
    rows, memory = np.arange(30), np.full(50, -1)
    copies = list(runs(slots, width, piece))
    for at, start, count in copies:
        assert start // piece == (start + count - 1) // piece
        memory[start : start + count] = rows[at : at + count]
    assert (memory.reshape(10, 5)[slots] == rows.reshape(6, 5)).all()
    assert (memory >= 0).sum() == 30
    assert piece < 100 or len(copies) == 3


def test_slots_are_handed_out_from_the_lowest_on():
    """So that rows of one forward lie side by side, and are copied together."""
    tree, table, none = ContextTree(), SlotTable(4, 8), np.empty(0, dtype=np.int64)
    ids = np.array([tree.insert([i]) for i in range(8)])
    table.cover(tree.capacity)
    with tree.pinned(ids):
        for n, want in ((3, [0, 1, 2]), (2, [3, 4])):
            slots = table.room(n, none, tree)
            assert slots.tolist() == want
            table.place(ids[slots], slots)
        table.release(np.array([3, 1]))
        assert table.room(3, none, tree).tolist() == [1, 3, 5]


class Runtime:
    """What CUDA's runtime is asked to lock and to unlock, in place of one.

    Args:
        most: how often it does.
    """

    def __init__(self, most):
        self.most, self.locked, self.unlocked = most, [], []

    def cudaHostRegister(self, begin, size, flags):  # noqa: N802
        if len(self.locked) == self.most:
            return 2
        self.locked.append((begin, size))
        return 0

    def cudaHostUnregister(self, begin):  # noqa: N802
        self.unlocked.append(begin)


@pytest.mark.parametrize("most", [0, 3, 100])
def test_pages_are_locked_once_in_neighbouring_pieces_and_unlocked(most, monkeypatch):
    runtime, piece, page = Runtime(most), 1 << 16, mmap.PAGESIZE
    monkeypatch.setattr(host_rows, "_PIECE", piece)
    monkeypatch.setattr(host_rows, "_runtime", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch, "zeros", lambda *args, **options: None)
    memory = host_rows.SlotMemory((100, 5001), np.float32, torch.device("cuda"))
    rows, slots = torch.rand(7, 5001), np.array([0, 1, 2, 9, 10, 98, 99])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        memory.land(slots[:5], rows[:5])
        few = len(runtime.locked)
        memory.land(slots[5:], rows[5:])
        memory.land(slots[:5], rows[:5])
    np.testing.assert_array_equal(memory.array[slots], rows)
    assert [w.category for w in said] == ([FastPathWarning] if most < 100 else [])
    assert few == min(most, -(-11 * 4 * 5001 // piece))  # up to the tenth slot
    begins, sizes = zip(*runtime.locked, strict=True) if most else ((), ())
    assert all(begin % page == 0 for begin in begins)
    assert all(size % page == 0 for size in sizes)
    assert list(begins[1:]) == [b + s for b, s in zip(begins, sizes, strict=True)][:-1]
    if most == 100:
        assert begins[0] <= memory.array.ctypes.data
        assert begins[-1] + sizes[-1] >= memory.array.ctypes.data + memory.array.nbytes
    del memory
    gc.collect()
    assert runtime.unlocked == list(begins)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_pages_are_locked_as_slots_are_written_to(monkeypatch):
    monkeypatch.setattr(host_rows, "_PIECE", 1 << 16)
    memory = host_rows.SlotMemory((100, 5000), np.float32, torch.device("cuda"))
    rows = torch.rand(7, 5000, device="cuda")
    slots = np.array([0, 1, 2, 9, 10, 98, 99])
    memory.land(slots[:5], rows[:5])
    few = len(memory._pieces)
    memory.land(slots[5:], rows[5:])
    torch.cuda.synchronize()
    np.testing.assert_array_equal(memory.array[slots], rows.cpu())
    assert few < 6 < len(memory._pieces)
    assert torch.from_numpy(memory.array).is_pinned()


async def test_beams_over_rows_made_linear_by_torch_are_those_of_the_loops(monkeypatch):
    """Rows of a large vocabulary, taken in by the loops and as if they came from a device."""
    ends = []
    for linear in (False, True):
        if linear:
            monkeypatch.setattr(HostRows, "take", HostRows.take_linear)
        lm = as_engine(ToyLM(TOKENS, seed=5, dtype=torch.float32, pad=3))
        lanes = await ByteLanes.start(byte_model(lm), BeamParams(5, 0.01, heal=False), 2)
        for symbols in ([108, 97], [97, 98], [114, 99]):
            lanes = await lanes.step(symbols)
        ends.append((lanes.log_z, (await lanes.logp_next()).numpy()))
    np.testing.assert_allclose(ends[1][0], ends[0][0], rtol=1e-6)
    np.testing.assert_allclose(ends[1][1], ends[0][1], rtol=1e-6)
