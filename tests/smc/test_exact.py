"""Exact samples have the target's law, and bounds hold the truth."""

import itertools
import math
import warnings
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from benchmarks.bounds import compare, estimates
from genlm_bytes_smc import BeamParams
from genlm_bytes_smc.constraints import ByteRegex, FiniteSet
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import exact_sample, log_ml_bounds, posterior, smc
from genlm_bytes_smc.smc.exact import Prefix
from genlm_bytes_smc.smc.many import lower_bound
from genlm_bytes_smc.smc.pooled import expected_error, particles_of
from tests.toys import EOS_TOKEN, Enumeration, ToyLM

SELDOM = (3, b"cba", b"aba")  # a seed, a text that begins unlikely, and another
TEXTS = [b"a", b"ab", b"abc", b"acb", b"bca", b"cab", b"ccc", b""]


def toy(seed=2, **kwargs):
    params = BeamParams(None, eos_byte_strings=[EOS_TOKEN])
    return ByteLLM(ToyLM(seed=seed, **kwargs), params)


def truth(llm, texts, power=1.0):
    enumeration = Enumeration(llm.llm, frozenset([EOS_TOKEN]))
    return np.array([enumeration.ended(t) for t in texts]) ** power


@pytest.mark.parametrize("at_once", [1, 16])
async def test_the_law_is_the_targets(at_once):
    """Chi-squared against enumeration, with draws one by one and side by side."""
    llm = toy()
    exact = truth(llm, TEXTS)
    found = await exact_sample(llm * FiniteSet(TEXTS), 3000, seed=1, at_once=at_once)
    counts = Counter(found.texts)
    assert found.ended.all() and set(counts) <= set(TEXTS)
    expected = 3000 * exact / exact.sum()
    assert stats.chisquare([counts[t] for t in TEXTS], expected).pvalue > 1e-4
    assert math.exp(found.log_ml) == pytest.approx(exact.sum(), rel=0.1)


async def test_a_wrong_bound_is_noticed(monkeypatch):
    """Were a new row's mass not held against what was promised, the law would be another."""
    llm = toy()
    exact = truth(llm, TEXTS)
    monkeypatch.setattr(Prefix, "tell", lambda self: None)
    monkeypatch.setattr(Prefix, "bound", property(lambda self: 1.0))
    found = await exact_sample(llm * FiniteSet(TEXTS), 3000, seed=1)
    counts = Counter(found.texts)
    expected = 3000 * exact / exact.sum()
    assert stats.chisquare([counts[t] for t in TEXTS], expected).pvalue < 1e-4


async def test_bounds_close_and_draws_stop_being_rejected():
    """Of a finite set everything is soon known: bounds meet, and no draw is lost any more."""
    llm = toy()
    exact = math.log(truth(llm, TEXTS).sum())
    found = await exact_sample(llm * FiniteSet(TEXTS), 400, seed=3)
    low, high, _ = found.log_ml_bounds
    assert low - 1e-9 <= exact <= high + 1e-9
    assert high - low < 1e-2
    assert found.draws < 500


async def test_bounds_hold_whenever_rows_run_out():
    """With few rows there are fewer texts, and the truth lies between the bounds still."""
    for seed in range(20):
        llm = toy(seed=4)
        exact = math.log(truth(llm, TEXTS).sum())
        found = await exact_sample(llm * FiniteSet(TEXTS), 1000, max_rows=3, seed=seed)
        low, high, _ = found.log_ml_bounds
        assert low - 1e-9 <= exact <= high + 1e-9
        assert len(found.texts) < 1000


async def test_its_estimate_is_near_the_truth():
    """On average over runs, but for what stopping with the last accepted draw changes."""
    llm = toy(seed=5)
    exact = truth(llm, TEXTS).sum()
    target = llm * FiniteSet(TEXTS)
    runs = [await exact_sample(target, 3, seed=s) for s in range(400)]
    found = np.exp([r.log_ml_of_draws for r in runs])
    for run in runs:
        assert run.log_ml_bounds[0] <= run.log_ml <= run.log_ml_bounds[1]
    assert abs(found.mean() - exact) < 4 * found.std() / 20 + 0.05 * exact


async def test_powers_and_products_of_models():
    """A power of a model is a target like another: its rows sum to less than one."""
    llm = toy()
    texts = TEXTS[:5]
    exact = truth(llm, texts, 2.0)
    found = await exact_sample(llm**2 * FiniteSet(texts), 2000, seed=1)
    counts = Counter(found.texts)
    expected = 2000 * exact / exact.sum()
    assert stats.chisquare([counts[t] for t in texts], expected).pvalue > 1e-4
    assert math.exp(found.log_ml) == pytest.approx(exact.sum(), rel=0.1)
    llm.clear_cache()
    llm.model.store.clear()
    few = await posterior(llm**2 * FiniteSet(texts), 2, draws=10**6, at_once=1, seed=0)
    assert 0 < few.rows < 20
    assert few.draws < 100
    for text, weight in zip(texts, exact, strict=True):
        one = await smc(llm**2 * FiniteSet([text]), 1, max_bytes=10, progress=False)
        assert math.exp(one.log_ml) == pytest.approx(weight, rel=1e-6)


async def test_infinite_languages_and_the_length_limit():
    """Texts of a regex that are too long have weight zero, as in `smc`."""
    llm = toy()
    found = await exact_sample(llm * ByteRegex("(ab|c)*"), 200, max_bytes=6, seed=1)
    assert all(len(t) <= 6 for t in found.texts)
    low, high, _ = found.log_ml_bounds
    run = await smc(llm * ByteRegex("(ab|c)*"), 4000, max_bytes=6, seed=1, progress=False)
    assert low - 0.1 <= run.log_ml <= high + 0.1


async def test_refusals():
    llm = toy()
    with pytest.raises(ValueError, match="no text of weight"):
        await exact_sample(llm * FiniteSet([b"zz"]), 1)
    with pytest.raises(ValueError, match="rows that sum to at most one, got"):
        await exact_sample(llm**0.5, 1)
    with pytest.raises((TypeError, ValueError), match="n "):
        await exact_sample(llm, 0)
    with pytest.raises(TypeError, match="Potential"):
        await exact_sample("a", 1)


async def test_bounds_from_both_sides_hold_the_truth():
    """At least 95% of 200 intervals cover the enumerated truth, and are attached to a run."""
    llm = toy(seed=6)
    exact = math.log(truth(llm, TEXTS).sum())
    target = llm * FiniteSet(TEXTS)
    texts = (await exact_sample(target, 1600, seed=0)).texts
    covered = 0
    for i in range(200):
        held = texts[8 * i : 8 * i + 8]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # some of 200 gape
            found = await log_ml_bounds(target, 16, 0.5, 10, exact=held, seed=1000 * i)
        covered += found.low <= exact <= found.high
    assert covered >= 190
    run = await smc(target, 400, 0.5, 10, seed=0, progress=False)
    bounds = await log_ml_bounds(target, 400, 0.5, 10, result=run)
    assert run.log_ml_bounds == bounds
    assert bounds.confidence == 0.95


async def test_bounds_that_gape_are_said_to():
    llm = ByteLLM(ToyLM(seed=1, sharpness=6.0), BeamParams(None, eos_byte_strings=[EOS_TOKEN]))
    target = llm * FiniteSet([b"acbacb", b"cabcab", b"bbbbbb", b"aaaaac"])
    texts = (await exact_sample(target, 4, seed=0)).texts
    for confidence in (None, 0, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\), got"):
            await log_ml_bounds(target, 2, 0.5, 10, confidence=confidence)
    with pytest.warns(UserWarning, match="log marginal likelihood is between"):
        await log_ml_bounds(target, 2, 0.5, 10, exact=texts, runs=4)
    with pytest.raises(ValueError, match="at least four exact samples"):
        await log_ml_bounds(target, 2, 0.5, 10, exact=texts[:2])


async def test_bounds_hold_where_the_spread_of_runs_proves_nothing():
    """A text of a tenth of the posterior begins with a byte that 4 particles seldom draw.

    At least 95% of 200 intervals hold the truth. Intervals by Student's t do not: eight runs that
    all miss the text agree.
    """
    llm = toy(seed=SELDOM[0], sharpness=3.0)
    exact = math.log(truth(llm, SELDOM[1:]).sum())
    found = await estimates(llm * FiniteSet(SELDOM[1:]), 4, 200, 10)
    ours, students = compare(*found, exact)
    assert ours.holds >= 0.95
    assert students.holds < 0.8
    assert ours.width < 6


def test_a_lower_bound_holds_whatever_the_law_is():
    """Of a mean of one: 1,000 bounds from 8 draws each are too high in at most 2.5% of cases.

    The error allowed is four standard errors of a share of 2.5%.
    """
    rng = np.random.default_rng(1)
    laws = {
        "mostly zero": np.where(rng.random((1000, 8)) < 0.1, 10.0, 0.0),
        "heavy": np.exp(3 * rng.normal(size=(1000, 8)) - 4.5),
        "seldom much": np.where(rng.random((1000, 8)) < 0.02, 46.0, 0.1 / 0.98 * 0.8),
        "even": rng.exponential(size=(1000, 8)),
    }
    for name, draws in laws.items():
        with np.errstate(divide="ignore"):
            bounds = [lower_bound(logs, 0.95) for logs in np.log(draws)]
        assert np.mean(np.array(bounds) > 0) < 0.025 + 4 * (0.025 * 0.975 / 1000) ** 0.5, name
    equal = lower_bound(np.full(8, -3.0), 0.95)
    assert equal == pytest.approx(-3 - math.log(40 / 0.9) / 8, abs=0.01)
    assert lower_bound(np.full(8, -np.inf), 0.95) == -np.inf


async def test_bounds_are_cut_at_what_is_certain():
    """Of few texts the draws know everything, so the interval is narrow; if rows are forecasts, or
    the texts are given, nothing is certain."""
    llm = toy(seed=6)
    exact = math.log(truth(llm, TEXTS).sum())
    bounds = await log_ml_bounds(llm * FiniteSet(TEXTS), 8, 0.5, 10, runs=64)
    assert bounds.low <= exact <= bounds.high < bounds.low + 0.05
    llm = ByteLLM(ToyLM(seed=6), BeamParams(None, prune="deferred", eos_byte_strings=[EOS_TOKEN]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        bounds = await log_ml_bounds(llm * FiniteSet(TEXTS), 8, 0.5, 10)
    assert bounds.high - bounds.low > 0.9


@pytest.mark.parametrize("at_once", [1, 4])
async def test_the_mean_weight_of_draws_is_the_marginal_likelihood(at_once):
    """For a fixed number of draws: within four standard errors over 300 runs."""
    llm = toy(seed=5)
    exact = truth(llm, TEXTS).sum()
    target = llm * FiniteSet(TEXTS)
    found = []
    for seed in range(300):
        llm.clear_cache()
        llm.model.store.clear()
        run = await posterior(target, 1000, draws=8, at_once=at_once, seed=seed)
        found.append(math.exp(run.log_ml_of_draws))
    assert abs(np.mean(found) - exact) < 4 * np.std(found) / 300**0.5 + 1e-3 * exact


async def test_a_posterior_is_exact_once_everything_is_seen():
    """Of a finite set it is read off; of few rows it is weighted draws. Bounds hold in both."""
    llm = toy()
    exact = truth(llm, TEXTS)
    found = await posterior(llm * FiniteSet(TEXTS), 200, seed=1)
    assert found.read_off
    shares = found.byte_posterior
    for text, p in zip(TEXTS, exact / exact.sum(), strict=True):
        assert shares[text] == pytest.approx(p, abs=0.02)
    regex = llm * ByteRegex("[abc]*")
    found = await posterior(regex, 12, 8, seed=1)
    assert not found.read_off
    low, high, _ = found.log_ml_bounds
    run = await smc(regex, 3000, max_bytes=8, seed=1, progress=False)
    assert low - 0.05 <= run.log_ml <= high + 0.05


async def test_an_unlikely_end_does_not_starve_a_likely_text():
    """The likeliest of five texts has an unlikely end, before which particles are resampled."""
    llm = toy()
    texts = TEXTS[:5]
    exact = math.log(truth(llm, texts, 2.0).sum())
    target = llm**2 * FiniteSet(texts)
    found = await posterior(target, 100, seed=0)
    assert found.log_ml == pytest.approx(exact, abs=0.3)
    plain = await smc(target, 500, 0.5, max_bytes=10, seed=1, progress=False)
    assert plain.log_ml < exact - 1


async def rarely_known(budget, seed, **options):
    """A posterior of many texts from few rows, and the enumerated law."""
    llm = toy(seed=3)
    every = itertools.product(b"abc", repeat=6)
    texts = [bytes(t) for t in every if sum(t) % 4 == 0 and t[0] != t[-1]]
    exact = truth(llm, texts)
    target = llm * FiniteSet(texts)
    found = await posterior(target, budget, 6, seed=seed, **options)
    law = dict(zip(texts, exact / exact.sum(), strict=True))
    apart = 0.5 * sum(abs(found.byte_posterior.get(t, 0.0) - p) for t, p in law.items())
    return found, exact.sum(), apart


async def test_a_posterior_says_where_it_comes_from():
    """Particles where little is known, and the expected error is near the real one."""
    real, expected, alone = [], [], []
    for seed in range(5):
        found, total, apart = await rarely_known(400, seed)
        assert found.source == "particles"
        assert "particles of smc" in found.summary()["from"]
        assert found.log_ml == pytest.approx(math.log(total), abs=0.5)
        low, high, _ = found.log_ml_bounds
        assert low - 1e-9 <= math.log(total) <= high + 1e-9
        real.append(apart)
        expected.append(found.error)
        alone.append((await rarely_known(400, seed, draws=1000))[2])
    assert np.mean(real) < np.mean(alone)
    assert 0.4 < np.mean(expected) / np.mean(real) < 2.5


async def test_particles_and_known_texts_estimate_the_marginal_likelihood():
    """The total of what a posterior takes from runs of `smc` is unbiased, over their draws."""
    llm = toy(seed=5)
    exact = truth(llm, TEXTS).sum()
    found = []
    for seed in range(80):
        llm.clear_cache()
        llm.model.store.clear()
        run = await smc(llm * FiniteSet(TEXTS), 4, 1.0, 10, seed=seed, progress=False,
                        lookahead="auto", budget=6)  # fmt: skip
        texts, logs, error = particles_of(run)
        assert len(texts) == len(logs)
        assert 0 <= error <= 1
        found.append(math.exp(np.logaddexp.reduce(logs)))
    assert abs(np.mean(found) - exact) < 4 * np.std(found) / 80**0.5


def test_the_expected_error_of_draws():
    """It is the mean total variation of independent draws, within a third."""
    rng = np.random.default_rng(1)
    p = np.array([0.5, 0.2, 0.2, 0.05, 0.05])
    real, told = [], []
    for _ in range(300):
        texts = [b"abcde"[i : i + 1] for i in rng.choice(5, 60, p=p)]
        share = np.array([texts.count(b"abcde"[i : i + 1]) for i in range(5)]) / 60
        real.append(0.5 * np.abs(share - p).sum())
        told.append(expected_error(texts, np.zeros(60)))
    assert np.mean(told) == pytest.approx(np.mean(real), rel=0.35)
    assert expected_error([], np.empty(0)) == 1.0
    assert expected_error([b"a"], np.array([-np.inf])) == 1.0
