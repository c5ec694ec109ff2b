"""The hidden Markov model of `benchmarks.hmm` against enumeration, and as a look-ahead."""

import itertools
import math

import numpy as np
import pytest

from benchmarks.hmm import ByteHMM, HmmLookahead
from genlm_bytes_smc.alphabet import EOS_COLUMN
from genlm_bytes_smc.constraints import FiniteSet
from tests.smc.worlds import LONGEST, TEXTS, estimates, exact_weights, finite, toy


def enumerated(model, symbols):
    """The probability of a sequence, summed over all sequences of hidden states."""
    total = 0.0
    for hidden in itertools.product(range(len(model.start)), repeat=len(symbols)):
        p = model.start[hidden[0]]
        p *= math.prod(model.step[g, h] for g, h in itertools.pairwise(hidden))
        total += p * math.prod(model.emit[h, s] for h, s in zip(hidden, symbols, strict=True))
    return total


def test_forward_is_the_sum_over_hidden_sequences():
    model = ByteHMM.random(3, seed=1)
    for text in (b"a", b"abca", b"zz"):
        symbols = [*text, EOS_COLUMN]
        assert math.exp(model.logp(symbols)) == pytest.approx(enumerated(model, symbols))


def test_the_future_is_the_sum_over_completions():
    """Of a finite set, from the beginning: the probability of all its texts."""
    model = ByteHMM.random(4, seed=2)
    texts = [b"ab", b"abc", b"b", b"cab"]
    table = FiniteSet(texts).host_table()
    for most in (2, 5):
        future = model.future(table.next.astype(np.int64), table.accept, most)
        wanted = sum(math.exp(model.logp([*t, EOS_COLUMN])) for t in texts if len(t) <= most)
        assert model.start @ future[0] == pytest.approx(wanted)


def test_expectation_maximisation():
    """The likelihood is the forward algorithm's, never falls, and a cut text has no end."""
    texts = [[*b"abab", EOS_COLUMN], [*b"ba", EOS_COLUMN], [*b"ababab"]] * 4
    x = np.full((len(texts), 6), -1)
    for row, text in zip(x, texts, strict=True):
        row[: len(text)] = text
    model, before = ByteHMM.random(3, seed=0), -np.inf
    for _ in range(60):
        wanted = sum(model.logp(t) for t in texts)
        new, found = model.improved(x, prior=1e-9)
        assert found == pytest.approx(wanted)
        assert found >= before - 1e-6
        model, before = new, found
    assert math.exp(model.logp(list(b"ab"))) > 0.4
    assert model.emit.sum(1) == pytest.approx(1)
    assert model.step.sum(1) == pytest.approx(1)


async def test_a_run_with_it_is_unbiased():
    """As proposal and twist, whatever the model of bytes is."""
    llm = toy(seed=4)
    truth = sum(exact_weights(llm).values())
    ahead = HmmLookahead(0, 3, 8, seed=0, model=ByteHMM.random(3, seed=5))
    found = await estimates(finite(llm), 300, n=3, ess=1.0, proposal=ahead, twist=ahead)
    assert found.agree(truth), (found, truth)


async def test_trained_on_texts_of_the_model_it_spends_rows_once():
    """Training draws texts until the rows are spent, and is done once."""
    llm = toy(seed=4)
    engine = llm.model.engine
    ahead = HmmLookahead(12, 4, LONGEST, seed=1)
    before = engine.counts.rows
    await ahead.start(finite(llm), (), LONGEST)
    spent = engine.counts.rows - before
    assert spent >= 12
    model = ahead.model
    await ahead.start(finite(llm), (), LONGEST)
    assert engine.counts.rows - before == spent
    assert ahead.model is model
    assert sum(math.exp(model.logp([*t, EOS_COLUMN])) for t in TEXTS) > 1e-3
