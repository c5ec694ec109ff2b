"""psi against enumeration: of all texts, by code that shares nothing with the table."""

import itertools
import math

import numpy as np
import pytest
import torch

from genlm_bytes_smc.constraints import ByteDFA, ByteRegex, ByteWFSA, ConstraintError, FiniteSet
from genlm_bytes_smc.lookahead import ByteNgram, Lookahead
from genlm_bytes_smc.lookahead import future_mass as tables
from genlm_bytes_smc.lookahead.future_mass import FutureTable, TableFactor
from genlm_bytes_smc.lookahead.lookahead import meet

SAMPLES = [b"ab", b"abba", b"cab", b"abc", b"", b"bca", b"aab"]
MODELS = {n: ByteNgram(SAMPLES, order=n) if n else ByteNgram.uniform() for n in range(5)}
CPU = torch.device("cpu")


def build(automata, model, limit, ends="eos", outside=None):
    stops = ends == "accept"
    table = FutureTable(*meet(automata), model, limit, CPU, stops=stops, outside=outside)
    return TableFactor.first(table)


async def value_after(factor, text):
    """log psi by reading, checked against the block at every byte."""
    for byte in text:
        row = (await factor.rows())[0]
        said = float(factor.value[0] + row[byte])
        factor, _ = await factor.step(np.array([byte]))
        assert said == pytest.approx(float(factor.value[0]), abs=1e-9)
    return float(factor.value[0])


def brute(weight, model, text, left, alphabet=b"abc"):
    """Sum over completions of at most `left` bytes of model probability times weight."""
    total = 0.0
    for k in range(left + 1):
        for more in itertools.product(alphabet, repeat=k):
            w = weight(text + bytes(more))
            if w > 0:
                p = model.logp(text + bytes(more))
                total += w * math.exp(p - begun(model, text))
    return total


def begun(model, text):
    return sum(float(model.logp_next(text[:k])[b]) for k, b in enumerate(text))


@pytest.mark.parametrize("order", sorted(MODELS))
@pytest.mark.parametrize("pattern", ["(a|bc)*b?", "a[bc]{0,3}|cab", "c*ab"])
async def test_psi_is_the_sum_over_completions(order, pattern):
    model, limit = MODELS[order], 5
    dfa = ByteRegex(pattern)
    factor = build([dfa], model, limit)
    for text in (b"", b"a", b"ab", b"bc", b"ca", b"abc"):
        admitted = lambda t: float(dfa.log_complete(dfa.states([t]))[0] == 0)  # noqa: E731
        truth = brute(admitted, model, text, limit - len(text))
        found = await value_after(factor, text)
        assert math.exp(found) == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
async def test_without_a_limit_it_is_the_limit(order):
    model = MODELS[order]
    dfa = ByteRegex("(a|bc)*b?")
    long = await value_after(build([dfa], model, 400), b"ab")
    assert await value_after(build([dfa], model, None), b"ab") == pytest.approx(long, abs=1e-9)


def test_the_fixed_point_by_sweeps_is_the_solution(monkeypatch):
    dfa = ByteRegex("[a-c]*")
    solved = FutureTable(dfa, None, MODELS[2], None, CPU).log_psi
    monkeypatch.setattr(tables, "_DENSE", 0)
    swept = FutureTable(dfa, None, MODELS[2], None, CPU).log_psi
    assert torch.allclose(solved, swept, atol=1e-9, rtol=0)
    assert solved.shape == (1, len(FutureTable(dfa, None, MODELS[2], None, CPU)))


def wfsa():
    """Two paths for most texts, and a loop: weights of texts are sums."""
    log = math.log
    arcs = [
        (0, ord("a"), 0, log(0.5)),
        (0, ord("a"), 1, log(0.25)),
        (0, ord("b"), 1, log(0.3)),
        (1, ord("b"), 1, log(0.4)),
        (1, ord("c"), 0, log(0.2)),
    ]
    return ByteWFSA([log(0.7), log(0.2)], arcs, [log(0.1), log(0.6)])


@pytest.mark.parametrize("with_dfa", [False, True])
async def test_weighted_automata_against_their_own_weights(with_dfa):
    weighted, model, limit = wfsa(), MODELS[3], 6
    dfa = ByteRegex("(a|b|c){0,4}c?b*")
    factor = build([weighted, dfa] if with_dfa else [weighted], model, limit)

    def weight(text):
        w = math.exp(float(weighted.log_complete(weighted.states([text]))[0]))
        return w * float(dfa.log_complete(dfa.states([text]))[0] == 0) if with_dfa else w

    for text in (b"", b"a", b"ab", b"aab"):
        # relative to the prefix weight, which the target's own row holds already
        prefix = math.exp(float(weighted.log_prefix(weighted.states([text]))[0]))
        truth = brute(weight, model, text, limit - len(text)) / prefix
        assert math.exp(await value_after(factor, text)) == pytest.approx(truth, rel=1e-9)


async def test_several_automata_are_one():
    one, other = ByteRegex("[abc]{2,4}"), ByteRegex("a.*|b")
    both = build([one, other], MODELS[2], 6)
    alone = build([one & other], MODELS[2], 6)
    for text in (b"", b"a", b"ab"):
        assert await value_after(both, text) == await value_after(alone, text)


async def test_what_cannot_end_in_time_has_no_future():
    factor = build([FiniteSet([b"abcabc", b"c"])], MODELS[2], 4)
    assert await value_after(factor, b"a") == -math.inf
    row = (await factor.rows())[0]
    assert row[ord("a")] == -math.inf and row[ord("c")] > -math.inf
    assert row[256] == pytest.approx(-float(factor.value[0]))  # ended texts have psi 1


async def test_ending_by_acceptance():
    model = MODELS[2]
    factor = build([ByteRegex("a*b")], model, 3, ends="accept")
    p = lambda text: math.exp(begun(model, text))  # noqa: E731
    truth = sum(p(t) for t in (b"b", b"ab", b"aab"))
    assert math.exp(float(factor.value[0])) == pytest.approx(truth, rel=1e-9)
    assert await value_after(factor, b"ab") == 0.0


async def test_long_literals_do_not_underflow():
    factor = build([FiniteSet([b"x" * 400])], MODELS[0], 500)
    assert float(factor.value[0]) == pytest.approx(-401 * math.log(257))


async def test_outside_an_approximation_psi_is_a_constant():
    factor = build([FiniteSet([b"ab"])], MODELS[1], 5, outside=-3.0)
    base = float(factor.value[0])
    assert await value_after(factor, b"c") == pytest.approx(base - 3.0)
    assert await value_after(factor, b"caba") == pytest.approx(base - 3.0)


def test_too_large_a_table_is_refused(monkeypatch):
    monkeypatch.setattr(tables, "MOST_ARCS", 20)
    with pytest.raises(ConstraintError, match="take a lower order"):
        FutureTable(ByteRegex("[a-z]{5}"), None, MODELS[2], 9, CPU)


def test_a_table_too_large_for_every_length_has_no_limit(monkeypatch):
    dfa = ByteRegex("[abc]*")
    monkeypatch.setattr(tables, "MOST_BYTES", 100)
    few = FutureTable(dfa, None, MODELS[2], 50, CPU)
    assert not few.limited
    assert torch.equal(few.log_psi, FutureTable(dfa, None, MODELS[2], None, CPU).log_psi)


async def test_lanes_are_independent():
    dfa = ByteDFA(ByteRegex("(ab|c)*").table.numpy(), ByteRegex("(ab|c)*").accept.numpy())
    factor = build([dfa], MODELS[3], 8)
    many, _ = await factor.gather(np.array([0, 0, 0])).step(np.array(list(b"aca")))
    many, _ = await many.gather(np.array([1, 2])).step(np.array(list(b"cb")))
    assert many.value.tolist() == [
        pytest.approx(await value_after(factor, b"cc")),
        pytest.approx(await value_after(factor, b"ab")),
    ]


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Lookahead(-1), "at least 0"),
        (lambda: Lookahead(strength=-1), "strength"),
        (lambda: Lookahead(defensive=0), "defensive"),
        (lambda: Lookahead(ends="never"), "ends"),
        (lambda: Lookahead(outside=float("nan")), "outside must be a log weight"),
        (lambda: Lookahead(max_bytes=0), "max_bytes"),
        (lambda: Lookahead(constraint="a*"), "constraint"),
        (lambda: ByteNgram(order=2), "needs texts"),
        (lambda: ByteNgram([b"a"], smoothing=0), "smoothing"),
    ],
)
def test_bad_arguments_are_refused(make, error):
    with pytest.raises((TypeError, ValueError), match=error):
        make()
