"""Minimisation, products and subset construction against slow answers."""

from itertools import product

import numpy as np
import pytest
import torch

from genlm_bytes_smc.constraints import ByteDFA, ByteRegex, ConstraintError, FiniteSet
from genlm_bytes_smc.constraints.automata import Nfa, Table, determinize, minimal
from tests.constraints.cases import CASES
from tests.constraints.oracles import accepted

WORDS = [w for k in range(7) for w in product(range(2), repeat=k)]


def runs(table, word):
    state = 0
    for symbol in word:
        state = int(table.next[state, symbol])
        if state < 0:
            return False
    return bool(table.accept[state])


def draw(rng, n, k=2):
    next_ = rng.integers(-1, n, size=(n, k)).astype(np.int32)
    return Table(next_, rng.random(n) < 0.3)


def distinguishable_states(table):
    """Number of states that can be reached and finish, by the words each accepts (slow)."""
    reached, stack = {0}, [0]
    while stack:
        for r in table.next[stack.pop()].tolist():
            if r >= 0 and r not in reached:
                reached.add(r)
                stack.append(r)
    words = [w for k in range(len(table) + 1) for w in product(range(2), repeat=k)]
    seen = set()
    for q in reached:
        swapped = table.next.copy()
        order = np.arange(len(table))
        order[[0, q]] = q, 0
        swapped = np.where(swapped < 0, -1, order[swapped])[order]
        language = tuple(runs(Table(swapped, table.accept[order]), w) for w in words)
        if any(language):
            seen.add(language)
    return len(seen)


@pytest.mark.parametrize("seed", range(40))
def test_minimal_keeps_the_language_and_leaves_no_state_too_many(seed):
    table = draw(np.random.default_rng(seed), n=6)
    if not any(runs(table, w) for w in WORDS):
        return
    small = minimal(table)
    assert [runs(small, w) for w in WORDS] == [runs(table, w) for w in WORDS]
    assert len(small) == distinguishable_states(table)
    permuted = np.r_[0, 1 + np.random.default_rng(seed).permutation(5)]
    back = np.argsort(permuted)
    shuffled = np.where(table.next < 0, -1, back[table.next])[permuted].astype(np.int32)
    again = minimal(Table(shuffled, table.accept[permuted]))
    np.testing.assert_array_equal(again.next, small.next)
    np.testing.assert_array_equal(again.accept, small.accept)


def test_a_long_chain_keeps_its_states_and_two_become_one():
    n = 2000
    chain = np.append(np.arange(1, n), -1).astype(np.int32)[:, None]
    ends = np.arange(n) == n - 1
    assert len(minimal(Table(chain, ends))) == n
    start = np.array([[1, n + 1]])  # into the first chain, or into the second
    both = [np.where(chain < 0, -1, chain + offset) for offset in (1, n + 1)]
    table = np.concatenate([start, *(np.repeat(c, 2, axis=1) for c in both)]).astype(np.int32)
    assert len(minimal(Table(table, np.concatenate([[False], ends, ends])))) == n + 1


@pytest.mark.parametrize("seed", range(15))
def test_products_and_differences(seed):
    rng = np.random.default_rng(seed)

    def over_bytes(table):
        wide = np.full((len(table), 256), -1)
        wide[:, [ord("a"), ord("b")]] = table.next
        return ByteDFA(wide, table.accept)

    tables = [draw(rng, 4), draw(rng, 5)]
    if not all(any(runs(t, w) for w in WORDS) for t in tables):
        return
    a, b = map(over_bytes, tables)
    texts = [bytes(97 + s for s in w) for w in WORDS]
    in_a, in_b = ([runs(t, w) for w in WORDS] for t in tables)
    assert [accepted(a | b, t) for t in texts] == list(np.logical_or(in_a, in_b))
    for made, expected in (
        (lambda: a & b, np.logical_and(in_a, in_b)),
        (lambda: a - b, np.logical_and(in_a, np.logical_not(in_b))),
    ):
        try:
            both = made()
        except ConstraintError:
            assert not expected.any()
            continue
        assert [accepted(both, t) for t in texts] == list(expected)
        host = both.host_table()
        assert len(minimal(host)) == both.n_states


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_public_automaton_is_minimal_so_every_prefix_can_be_completed(case):
    constraint = case.make()
    if isinstance(constraint, ByteDFA):
        table = constraint.host_table()
        again = minimal(table)
        np.testing.assert_array_equal(again.next, table.next)
        np.testing.assert_array_equal(again.accept, table.accept)


def test_equal_languages_have_equal_tables():
    left = ByteRegex("(ab|ac)*") & ByteRegex(".{0,6}")
    right = ByteRegex("(a[bc]){0,3}")
    assert torch.equal(left.table, right.table)
    assert torch.equal(left.accept, right.accept)


def test_operators_take_automata_only():
    with pytest.raises(TypeError):
        ByteRegex("a") & "a"
    with pytest.raises(ConstraintError, match="empty"):
        ByteRegex("a") & ByteRegex("b")


@pytest.mark.parametrize("seed", range(20))
def test_the_subset_construction_against_trying_every_path(seed):
    rng = np.random.default_rng(seed)
    nfa = Nfa(labels=[[0], [1], [0, 1]], n_states=5)
    for _ in range(7):
        q, r = rng.integers(5, size=2).tolist()
        nfa.arcs.append((q, int(rng.integers(3)), r))
    for _ in range(3):
        nfa.silent.append(tuple(rng.integers(5, size=2).tolist()))
    nfa.accept = {int(rng.integers(5))}

    def closed(states):
        states = set(states)
        while True:
            more = {r for q, r in nfa.silent if q in states} - states
            if not more:
                return states
            states |= more

    def accepts(word):
        states = closed({0})
        for symbol in word:
            reads = {r for q, n, r in nfa.arcs if q in states and symbol in nfa.labels[n]}
            states = closed(reads)
        return bool(states & nfa.accept)

    if not any(map(accepts, WORDS)):
        with pytest.raises(ConstraintError, match="language is empty"):
            determinize(nfa)
        return
    table = determinize(nfa)
    assert [runs(table, w) for w in WORDS] == [accepts(w) for w in WORDS]
    assert len(table) == distinguishable_states(table)


GOOD = np.full((2, 256), -1)


@pytest.mark.parametrize(
    ("table", "accept", "message"),
    [
        (np.zeros((2, 255), int), [True, True], r"shape \[states, 256\], got int64 of shape"),
        (np.zeros((2, 256)), [True, True], "must be integers of shape .* got float64"),
        (GOOD, [1, 0], r"accept must be bool of shape \[2\].* got int64"),
        (GOOD, [True], r"accept must be bool of shape \[2\].* got bool of shape \[1\]"),
        (GOOD + 3, [True, False], "states 0..1, got values from 2 to 2"),
        (GOOD - 1, [True, False], "must be -1 .* got values from -2 to -2"),
        (np.zeros((0, 256), int), np.zeros(0, bool), "at least one state"),
        (GOOD, [False, False], "language is empty"),
    ],
)
def test_a_table_that_is_none_is_refused(table, accept, message):
    with pytest.raises(ConstraintError, match=message):
        ByteDFA(table, np.array(accept))


def test_the_table_on_the_device_is_what_the_docs_draw():
    constraint = FiniteSet(["ab", "b"])
    assert constraint.table.dtype == torch.int32
    assert constraint.table.shape == (constraint.n_states, 256) == (3, 256)
    assert constraint.accept.tolist() == [False, False, True]
    assert constraint.table[0, 97] == 1
    assert constraint.table[0, 98] == constraint.table[1, 98] == 2
    assert (constraint.table >= 0).sum() == 3
