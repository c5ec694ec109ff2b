"""The byte n-gram: rows, contexts, smoothing, and fits to a model's own texts."""

import math

import numpy as np
import pytest

from genlm_bytes_smc import BeamParams, byte_model
from genlm_bytes_smc.lookahead import ByteNgram
from genlm_bytes_smc.lookahead.ngram import soft_counts
from genlm_bytes_smc.potential import ByteLLM
from tests.smc.worlds import exact_weights, toy
from tests.toys import ToyLM

TEXTS = ["abab", "abc", "", "é"]


@pytest.mark.parametrize("order", range(5))
def test_rows_are_positive_and_sum_to_one(order):
    model = ByteNgram(TEXTS, order)
    assert model.rows.shape == (len(model), 257)
    assert (model.rows > 0).all()
    assert model.rows.sum(axis=1) == pytest.approx(np.ones(len(model)))
    assert order > 1 or len(model) == 1


@pytest.mark.parametrize("order", range(1, 5))
def test_the_context_is_the_longest_one_seen(order):
    model = ByteNgram(TEXTS, order)
    known = set(model.contexts)
    for text in (b"", b"a", b"ab", b"abz", b"zzab", b"ababc", "é".encode()):
        symbols = (256, *text)
        wanted = next(
            c
            for k in range(order - 1, -1, -1)
            if (c := symbols[max(0, len(symbols) - k) :]) in known
        )
        assert model.contexts[model.context_of(text)] == wanted


def test_witten_and_bell_by_hand():
    model = ByteNgram([b"aa", b"ab"], order=1)
    # 6 symbols, 3 kinds: a three times, b once, the end twice
    assert model.rows[0, ord("a")] == pytest.approx((3 + 3 / 257) / 9)
    assert model.rows[0, ord("z")] == pytest.approx((3 / 257) / 9)
    assert model.rows[0, 256] == pytest.approx((2 + 3 / 257) / 9)
    two = ByteNgram([b"aa", b"ab"], order=2)
    after_a = two.rows[two.context_of(b"a")]
    assert after_a[ord("b")] == pytest.approx((1 + 3 * model.rows[0, ord("b")]) / (3 + 3))


def test_logp_is_the_sum_of_rows():
    model = ByteNgram(TEXTS, 3)
    by_hand = model.logp_next(b"")[ord("a")] + model.logp_next(b"a")[ord("b")]
    assert model.logp(b"ab") == pytest.approx(by_hand + model.logp_next(b"ab")[256])


def test_few_contexts_are_still_closed():
    model = ByteNgram(TEXTS, 4, max_contexts=3)
    assert all(c[1:] in model.number for c in model.contexts if c)
    assert 3 <= len(model) < len(ByteNgram(TEXTS, 4))


async def test_a_fit_to_a_model_nears_its_distribution():
    """The first row is the model's own, as it is counted whole at each of the texts."""
    llm = toy(seed=3)
    model = await ByteNgram.from_model(llm, order=3, n_texts=40, max_bytes=6, smoothing=0.01)
    own = np.exp(np.asarray((await llm.logw_next([])).weights))
    assert np.exp(model.logp_next(b"")) == pytest.approx(own, abs=2e-3)
    weights = exact_weights(llm)
    cross = sum(w * model.logp(t) for t, w in weights.items()) / sum(weights.values())
    uniform = sum(w * ByteNgram.uniform().logp(t) for t, w in weights.items())
    assert cross > uniform / sum(weights.values()) + 5


async def test_equal_seeds_give_equal_fits():
    one = await ByteNgram.from_model(toy(seed=3), n_texts=5, max_bytes=4, seed=2)
    other = await ByteNgram.from_model(toy(seed=3), n_texts=5, max_bytes=4, seed=2)
    assert np.array_equal(one.rows, other.rows) and one.contexts == other.contexts
    third = await ByteNgram.from_model(toy(seed=3), n_texts=5, max_bytes=4, seed=3)
    assert not np.array_equal(one.rows[0], third.rows[0])


async def test_a_model_that_never_ends_a_text_can_be_fitted():
    llm = ByteLLM(toy(seed=3).llm, BeamParams(K=None), model_eos=False)
    model = await ByteNgram.from_model(llm, n_texts=5, max_bytes=4)
    assert math.exp(model.logp_next(b"a")[256]) < 0.01


async def test_soft_counts_ask_for_few_rows_twice_though_few_are_held():
    """Texts that begin alike are asked for together: level by level all rows were lost between."""
    rng = np.random.default_rng(0)
    texts = [bytes(rng.choice([97, 98, 99], size=8).tolist()) for _ in range(120)]
    pairs = [a + b for a in (b"a", b"b", b"c") for b in (b"a", b"b", b"c")]
    tokens = [b"a", b"b", b"c", *pairs, b"abc", b"cab", b"bca", b"acb", b"a", b"b", b"<e>"]
    rows, counts = [], []
    for slots in (100_000, 300):
        lm = ToyLM(tokens, seed=1)
        model = byte_model(lm, row_bytes=slots * (8 * len(lm.tokens) + 2048))
        llm = ByteLLM(lm, BeamParams(K=20), 64, model_eos=False)
        assert model.store.table.limit == slots
        counts.append([row for _, _, row in await soft_counts(llm, texts, 9)])
        rows.append(model.engine.counts.rows)
    np.testing.assert_allclose(counts[1], counts[0], atol=1e-12)
    assert rows[1] <= 1.1 * rows[0]


@pytest.mark.parametrize("alone", ["abc", b"abc"])
def test_a_text_alone_is_not_taken_for_its_letters(alone):
    """A string is a sequence of strings too, which nobody means."""
    with pytest.raises(TypeError, match="several texts in a list, got b?'abc' alone"):
        ByteNgram(alone)
