"""Distances, estimates and readings against sums written out."""

import math

import numpy as np
import pytest

from genlm_bytes_smc import BeamParams, as_engine, byte_model
from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.experiments import models
from genlm_bytes_smc.experiments.models import enumerate_texts, estimate_quality, read_texts
from genlm_bytes_smc.experiments.study import texts_of
from genlm_bytes_smc.smc.many import run_blocking
from studies.bias import TARGETS
from studies.boundary import token_rows
from studies.measures import jensen_shannon, total_variation
from tests.smc.worlds import TEXTS
from tests.toys import EOS_TOKEN, Enumeration, ToyLM


def test_jensen_shannon_of_known_pairs():
    a = np.log([[0.5, 0.5, 1e-300], [1.0, 1e-300, 1e-300], [0.2, 0.3, 0.5]])
    b = np.log([[0.5, 0.5, 1e-300], [1e-300, 1.0, 1e-300], [0.5, 0.3, 0.2]])
    p, q = np.array([0.2, 0.3, 0.5]), np.array([0.5, 0.3, 0.2])
    m = (p + q) / 2
    third = 0.5 * sum(x * math.log2(x / y) for x, y in zip([*p, *q], [*m, *m], strict=True))
    assert jensen_shannon(a, b) == pytest.approx([0.0, 1.0, third], abs=1e-12)
    assert jensen_shannon(a + 3.0, b - 2.0) == pytest.approx([0.0, 1.0, third], abs=1e-12)
    assert jensen_shannon(np.full((1, 3), -np.inf), b[:1]) == pytest.approx([1.0])


def test_total_variation():
    assert total_variation({"a": 0.5, "b": 0.5}, {"b": 0.25, "c": 0.75}) == 0.75


def test_quality_of_estimates():
    q = estimate_quality([math.log(2), math.log(4), -math.inf, math.log(6)], math.log(3))
    values = np.array([2, 4, 0, 6]) / 3
    assert q["mean"] == pytest.approx(values.mean())
    assert q["mean_error"] == pytest.approx(values.std(ddof=1) / 2)
    assert q["relative_variance"] == pytest.approx(values.var(ddof=1) / values.mean() ** 2)
    assert q["dead"] == 0.25
    logs = np.log(values[values > 0])
    assert q["log_bias"] == pytest.approx(logs.mean())
    assert q["log_rmse"] == pytest.approx(math.sqrt((logs**2).mean()))


async def test_readings_are_the_enumerated_conditionals():
    lm = ToyLM(seed=3)
    truth = Enumeration(lm, frozenset([EOS_TOKEN]))
    texts = [b"abca", b"ba"]
    params = BeamParams(K=None, eos_byte_strings=[EOS_TOKEN])
    found = await read_texts(byte_model(as_engine(lm)), params, texts, keep_rows=True)
    for text, logp, rows in zip(texts, found.logp, found.rows, strict=True):
        for i, byte in enumerate(text):
            expected = truth.logp_next(text[:i])
            assert rows[i] == pytest.approx(expected, abs=1e-6)
            assert logp[i] == pytest.approx(expected[byte], abs=1e-6)
    assert found.lm_rows == len({c for c in lm.calls if len(c) > 0})


async def test_enumerated_texts_sum_to_the_exact_value(monkeypatch):
    lm = ToyLM(seed=5)
    truth = Enumeration(lm, frozenset([EOS_TOKEN]))
    model = byte_model(as_engine(lm))
    total = sum(truth.ended(t) for t in TEXTS)
    params = {"heal": False, "eos_byte_strings": [EOS_TOKEN]}  # a toy's tokenizer names no end
    monkeypatch.setattr(models, "ending", lambda model, given: BeamParams(K=given.K, **params))
    exact, nothing = await enumerate_texts(model, TEXTS, 4096)
    narrow, unsure = await enumerate_texts(model, TEXTS, 2)
    assert math.exp(exact) == pytest.approx(total, rel=1e-6) and nothing == -math.inf
    assert math.exp(narrow) <= total <= math.exp(narrow) + math.exp(unsure)
    assert math.exp(narrow) < 0.999 * total


def test_texts_of_an_automaton():
    dfa = ByteRegex("(a|b)(c|dd)?|x{3}")
    expected = {b"a", b"b", b"ac", b"bc", b"add", b"bdd", b"xxx"}
    assert set(texts_of(dfa, 10, 20)) == expected
    assert texts_of(dfa, 6, 20) is None
    assert set(texts_of(dfa, 10, 2)) == {t for t in expected if len(t) <= 2}
    assert texts_of(ByteRegex("[a-z]{1,30}"), 400, 40) is None
    assert texts_of(ByteRegex("a*"), 400, 40) == [b"a" * n for n in range(41)]


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_targets_are_their_texts(name):
    target = TARGETS[name]
    found = texts_of(ByteRegex(target.regex), 1000, 100)
    assert sorted(found) == sorted(target.texts)


def test_canonical_and_healed_rows_by_brute_force(tiny):
    """Over the whole vocabulary, token by token."""
    text = b"An apple a day"
    model = byte_model(tiny)
    plain, healed = run_blocking(token_rows(model, text))
    end = model.vocab.ids_of(b"<|endoftext|>")[0]
    for cut in (1, 4, 5, 8, 11, 13):
        tokens = tiny.tokenizer.encode(text[:cut].decode(), add_special_tokens=False)
        after = tiny.next_token_logprobs_sync([*tiny.start, *tokens]).double().exp().numpy()
        before = tiny.next_token_logprobs_sync([*tiny.start, *tokens[:-1]]).double().exp().numpy()
        first, grown, last = np.zeros(257), np.zeros(257), model.vocab[tokens[-1]]
        same = sum(before[i] for i in model.vocab.ids_of(last))
        for i, p in enumerate(after):
            first[256 if i == end else model.vocab[i][0]] += p
        for i, p in enumerate(before):
            spelled = model.vocab[i]
            if i != end and spelled.startswith(last) and len(spelled) > len(last):
                grown[spelled[len(last)]] += p
        grown += same * first
        assert np.exp(plain[cut]) == pytest.approx(first / first.sum(), abs=1e-6)
        assert np.exp(healed[cut]) == pytest.approx(grown / grown.sum(), abs=1e-6)
