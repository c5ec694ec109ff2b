"""Weighted automata against path enumeration, exact series and genlm-control's own."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from genlm.control import BoolFSA
from genlm.control.potential.built_in.wfsa import WFSA
from genlm.grammar import Float, Log, wfsa

from genlm_bytes_smc.constraints import ByteDFA, ByteWFSA, ConstraintError, from_genlm

NEG_INF = float("-inf")


def brute(initial, arcs, final, text):
    """Weight of a whole text: a sum over all paths, in plain floats."""
    forward = np.exp(initial)
    for byte in text:
        after = np.zeros_like(forward)
        for q, b, r, w in arcs:
            if b == byte:
                after[r] += forward[q] * math.exp(w)
        forward = after
    return float(forward @ np.exp(final))


def random_automaton(rng, n=4):
    arcs = [
        (int(rng.integers(n)), int(rng.integers(97, 100)), int(rng.integers(n)),
         math.log(rng.uniform(0.005, 0.08)))
        for _ in range(3 * n)
    ]  # fmt: skip
    initial = np.where(rng.random(n) < 0.5, np.log(rng.random(n)), NEG_INF)
    initial[0] = -0.3
    final = np.where(rng.random(n) < 0.5, np.log(rng.random(n)), NEG_INF)
    final[-1] = -0.1
    return initial, arcs, final


@pytest.mark.parametrize("seed", range(8))
def test_whole_texts_and_prefixes_are_sums_over_paths(seed):
    initial, arcs, final = random_automaton(np.random.default_rng(seed))
    constraint = ByteWFSA(initial, arcs, final)
    texts = [bytes(t) for k in range(5) for t in product(b"abc", repeat=k)]
    state = constraint.states(texts)
    weights = constraint.log_complete(state).exp()
    expected = [brute(initial, arcs, final, t) for t in texts]
    np.testing.assert_allclose(weights, expected, rtol=1e-10, atol=1e-300)
    # The prefix weight is the series of what can follow, summed until it no longer changes.
    step = np.zeros((len(initial),) * 2)
    for q, _, r, w in arcs:
        step[q, r] += math.exp(w)
    total, term = np.zeros(len(final)), np.exp(final)
    for _ in range(20_000):
        total, term = total + term, step @ term
    for text, weight in zip(texts, constraint.log_prefix(state).exp().tolist(), strict=True):
        forward = np.exp(initial)
        for byte in text:
            after = np.zeros_like(forward)
            for q, b, r, w in arcs:
                if b == byte:
                    after[r] += forward[q] * math.exp(w)
            forward = after
        assert weight == pytest.approx(float(forward @ total), rel=1e-9, abs=1e-300)


PATTERNS = [r"ab*c|a[bc]{2}", r"(a|b)+", r"(à|é|b){1,3}c*", r"[^a]b?"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("to_bytes", [True, False])
async def test_the_weights_are_those_of_genlm_control(pattern, to_bytes):
    theirs = WFSA.from_regex(pattern, to_bytes=to_bytes)
    ours = from_genlm(theirs)
    assert isinstance(ours, ByteWFSA)
    words = ["", *("".join(t) for k in (1, 2, 3) for t in product("abcé", repeat=k))]
    for word in words:
        context = list(word.encode()) if to_bytes else list(word)
        prefix = await theirs.prefix(context)
        assert await ours.prefix(word.encode()) == pytest.approx(prefix, abs=1e-9)
        complete = await theirs.complete(context)
        assert await ours.complete(word.encode()) == pytest.approx(complete, abs=1e-9)
        if prefix > NEG_INF and to_bytes:
            row, mine = await theirs.logw_next(context), await ours.logw_next(word.encode())
            for byte in theirs.vocab:
                assert mine[bytes([byte])] == pytest.approx(row[byte], abs=1e-9)
            assert mine[ours.eos] == pytest.approx(row[theirs.eos], abs=1e-9)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("to_bytes", [True, False])
async def test_a_boolean_automaton_becomes_a_table(pattern, to_bytes):
    theirs = BoolFSA.from_regex(pattern, to_bytes=to_bytes)
    ours = from_genlm(theirs)
    assert isinstance(ours, ByteDFA)
    for word in ["".join(t) for k in range(4) for t in product("abcé", repeat=k)]:
        context = list(word.encode()) if to_bytes else list(word)
        assert await ours.prefix(word.encode()) == await theirs.prefix(context)
        assert await ours.complete(word.encode()) == await theirs.complete(context)


async def test_silent_arcs_longer_symbols_and_both_semirings():
    for semiring, weigh in ((Float, float), (Log, lambda w: Log(math.log(w)))):
        fsa = wfsa.WFSA(semiring)
        fsa.add_I(0, weigh(1.0))
        fsa.add_arc(0, "", 1, weigh(0.5))
        fsa.add_arc(0, "xyz", 1, weigh(0.25))
        fsa.add_arc(0, "xy", 0, weigh(0.125))
        fsa.add_arc(1, "x", 1, weigh(0.5))
        fsa.add_F(1, weigh(0.5))
        ours = from_genlm(WFSA(fsa))
        assert await ours.complete(b"") == pytest.approx(math.log(0.25))
        assert await ours.complete(b"xyz") == pytest.approx(math.log(0.125))
        assert await ours.complete(b"xyx") == pytest.approx(math.log(0.125 * 0.5 * 0.5 * 0.5))
        total = (0.5 + 0.25) / (1 - 0.125) * 0.5 / (1 - 0.5)
        assert await ours.prefix(b"") == pytest.approx(math.log(total))


async def test_nothing_underflows():
    """Weights of e-2000 a byte, and a way that is e-900 of its rival until the rival ends."""
    steep = ByteWFSA([0.0], [(0, 97, 0, -2000.0)], [-5.0])
    assert await steep.prefix(b"a" * 300) == pytest.approx(-2000.0 * 300 - 5.0)
    assert await steep.complete(b"a" * 300) == pytest.approx(-2000.0 * 300 - 5.0)
    rival = ByteWFSA(
        [0.0, -900.0], [(0, 97, 0, -1.0), (1, 97, 1, -1.0), (1, 98, 1, -1.0)], [0.0, 0.0]
    )
    row = (await rival.logw_next(b"aa")).weights
    assert row[98] == pytest.approx(await rival.prefix(b"aab") - await rival.prefix(b"aa"))
    assert -910 < row[98] < -890
    assert await rival.complete(b"aab") == pytest.approx(-903.0)


def test_parallel_arcs_add_and_useless_states_go():
    arcs = [(0, 97, 1, math.log(0.2)), (0, 97, 1, math.log(0.3)), (0, 98, 2, 5.0), (2, 98, 2, 1.0)]
    constraint = ByteWFSA([0.0, NEG_INF, NEG_INF], arcs, [NEG_INF, 0.0, NEG_INF])
    assert constraint.n_states == 2
    assert constraint.log_total == pytest.approx(math.log(0.5))
    block = constraint.block(constraint.initial(1))[0]
    assert block[97] == pytest.approx(0.0)
    assert (block > NEG_INF).sum() == 1


def test_rows_of_what_may_follow_sum_to_one():
    constraint = from_genlm(WFSA.from_regex(r"(à|é|b){1,3}c*"))
    state = constraint.states([b"", "à".encode(), b"b", b"bc", b"\xc3"])
    torch.testing.assert_close(constraint.block(state).logsumexp(1), torch.zeros(5).double())


def test_an_automaton_of_many_states_is_pushed_once():
    n = 600
    arcs = [(q, 97 + q % 3, q + 1, -0.1) for q in range(n - 1)] + [(n - 1, 97, 0, -1.0)]
    constraint = ByteWFSA([0.0] + [NEG_INF] * (n - 1), arcs, [-3.0] * n)
    assert constraint.n_states == n
    cycle = math.exp(-0.1 * (n - 1) - 1.0)
    way = sum(math.exp(-0.1 * q - 3.0) for q in range(n))
    assert constraint.log_total == pytest.approx(math.log(way / (1 - cycle)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.0], [(0, 97, 0, 0.0)], [0.0]), "add up to infinity"),
        (([0.0], [(0, 97, 0, -0.1), (0, 98, 0, -0.1)], [0.0]), "add up to infinity"),
        (([0.0], [(0, 97, 0, -1.0)], [NEG_INF]), "no text has a weight above zero"),
        (([NEG_INF], [], [0.0]), "no text has a weight above zero"),
        (([0.0], [(0, 97, 1, 0.0)], [0.0]), "states 0..0 on bytes 0..255, got .0, 97, 1, 0.0"),
        (([0.0], [(0, 256, 0, 0.0)], [0.0]), "on bytes 0..255, got .0, 256"),
        (([0.0], [(0, 97, 0)], [0.0]), r"an arc is \(state, byte, state, log weight\), got"),
        (([0.0], [(0, 97, 0, math.nan)], [0.0]), "NaN or .inf in it"),
        (([math.inf], [], [0.0]), "initial must be log weights below .inf"),
        (([0.0, 0.0], [], [0.0]), r"got shapes \[2\] and \[1\]"),
    ],
)
def test_what_is_no_weighted_automaton_is_refused(arguments, message):
    with pytest.raises(ConstraintError, match=message):
        ByteWFSA(*arguments)


def test_from_genlm_takes_automata_over_bytes_only():
    with pytest.raises(ConstraintError, match=r"expected a WFSA or BoolFSA .* got str"):
        from_genlm("a*")
    fsa = wfsa.WFSA(Float)
    fsa.add_I(0, 1.0)
    fsa.add_arc(0, 300, 1, 1.0)
    fsa.add_F(1, 1.0)
    with pytest.raises(ConstraintError, match="got 300"):
        from_genlm(WFSA(fsa))
