"""exp(log_ml) averages to the sum over all texts, and the posterior is the normalised one."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.smc import RESAMPLING, Particles, reading, smc, smc_repeat
from tests.smc.worlds import (
    LONGEST,
    PATTERN,
    RANDOM,
    TEXTS,
    TOPK,
    estimates,
    exact_weights,
    finite,
    total_variation,
    toy,
    weights_of,
)


def critical(text):
    """A critic's log weight: prefers long texts, forbids b"bb"."""
    return -math.inf if text == b"bb" else 0.7 * len(text)


async def test_weights_of_texts_are_those_of_the_enumeration():
    llm = toy()
    assert await weights_of(llm) == pytest.approx(exact_weights(llm), rel=1e-9)


@pytest.mark.parametrize("method", sorted(RESAMPLING))
@pytest.mark.parametrize("ess", [0.5, 1.0])
async def test_every_scheme_estimates_the_sum(method, ess):
    llm = toy()
    truth = sum(exact_weights(llm).values())
    found = await estimates(finite(llm), 160, n=5, ess=ess, resampling_method=method)
    assert found.agree(truth), (found, truth)


@pytest.mark.parametrize("n", [1, 2, 16])
async def test_no_resampling_and_any_number_of_particles(n):
    llm = toy(seed=2)
    truth = sum(exact_weights(llm).values())
    found = await estimates(finite(llm), 160, n=n, ess=0)
    assert found.agree(truth), (found, truth)


@pytest.mark.parametrize("ess", [0, 0.5, 1.0])
async def test_top_k_estimates_the_distribution_it_serves(ess):
    llm = toy(seed=3, params=TOPK)
    served, exact = await weights_of(llm), exact_weights(llm)
    assert abs(sum(served.values()) / sum(exact.values()) - 1) > 0.02  # pruning bites
    found = await estimates(finite(llm), 160, ess=ess)
    assert found.agree(sum(served.values())), (found, served)


@pytest.mark.parametrize("ess", [0.5, 1.0])
@pytest.mark.parametrize("with_critic", [False, True])
async def test_a_proposal_changes_nothing_but_the_variance(ess, with_critic):
    llm, other = toy(seed=4), toy(seed=5)
    weights = exact_weights(llm)
    critic = critical if with_critic else None
    truth = sum(w * math.exp(critical(t) if with_critic else 0) for t, w in weights.items())
    found = await estimates(finite(llm), 160, n=6, ess=ess, proposal=finite(other), critic=critic)
    assert found.agree(truth), (found, truth)


@pytest.mark.parametrize("twist", [True, False])
@pytest.mark.parametrize("ess", [0, 0.5, 1.0])
async def test_a_critic_multiplies_the_target(twist, ess):
    llm, critic = toy(seed=6), toy(seed=7) ** 0.5
    weights, judged = exact_weights(llm), exact_weights(toy(seed=7))
    truth = sum(w * judged[t] ** 0.5 for t, w in weights.items())
    found = await estimates(finite(llm), 120, n=6, ess=ess, critic=critic, twist_with_critic=twist)
    assert found.agree(truth), (found, truth)


async def test_the_length_limit_ends_texts_with_their_weight():
    llm = toy(seed=8)
    short = [bytes(t) for k in range(4) for t in itertools.product(b"abc", repeat=k)]
    truth = sum(exact_weights(llm, short).values())
    found = await estimates(llm, 200, n=6, ess=0.5, max_bytes=3)
    assert found.agree(truth), (found, truth)


@pytest.mark.parametrize("k", [1, 2])
async def test_unbiased_pruning_estimates_the_exact_model(k):
    llm = toy(seed=9, params=dataclasses.replace(RANDOM, K=k))
    truth = sum(exact_weights(llm).values())
    runs = await smc_repeat(finite(llm), 4, 0.5, LONGEST, seeds=400)
    values = np.exp(runs.log_mls)
    error = values.std(ddof=1) / math.sqrt(len(values))
    assert abs(values.mean() - truth) < 4 * error, (values.mean(), error, truth)
    assert math.exp(runs.log_ml) == pytest.approx(values.mean())
    assert runs.log_ml_error == pytest.approx(error / values.mean())


async def test_unbiased_pruning_by_the_parameters_own_seed():
    values = []
    first = toy(seed=9, params=RANDOM)
    truth = sum(exact_weights(first).values())
    for seed in range(200):
        llm = type(first)(first.llm, dataclasses.replace(RANDOM, seed=seed))
        values.append((await estimates(finite(llm), 1, n=4, first=seed)).mean)
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert abs(np.mean(values) - truth) < 4 * error


async def test_one_seed_of_unbiased_beams_is_one_random_target():
    """Without `beam_seed` runs share their beams: they agree on that target, not on the LM."""
    llm = toy(seed=9, params=RANDOM)
    served = sum((await weights_of(llm)).values())
    assert abs(served / sum(exact_weights(llm).values()) - 1) > 0.05
    found = await estimates(finite(llm), 160)
    assert found.agree(served), (found, served)


async def test_the_posterior_is_the_normalised_one():
    llm = toy()
    exact = exact_weights(llm)
    result = await smc(finite(llm), 4000, 0.5, LONGEST, seed=1)
    assert total_variation(result.byte_posterior, exact) < 0.03
    few = await smc_repeat(finite(llm), 8, 0.5, LONGEST, seeds=200)
    assert total_variation(few.byte_posterior, exact) < 0.07


async def test_the_posterior_with_critic_and_proposal():
    llm, other = toy(seed=4), toy(seed=5)
    weights = {t: w * math.exp(critical(t)) for t, w in exact_weights(llm).items()}
    result = await smc(
        finite(llm), 4000, 0.5, LONGEST, proposal=finite(other), critic=critical, seed=1
    )
    assert total_variation(result.byte_posterior, weights) < 0.04
    assert b"bb" not in result.byte_posterior


async def test_powers_and_normalised_products():
    llm = toy(seed=10)
    tempered = {t: w**0.5 for t, w in exact_weights(llm).items()}
    found = await estimates((llm**0.5) * ByteRegex(PATTERN), 200, n=6)
    assert found.agree(sum(tempered.values()))
    local = (llm * ByteRegex(PATTERN)).normalize()
    result = await smc(local, 50, 0.5, LONGEST)
    assert result.log_ml == pytest.approx(0.0, abs=1e-9)  # rows sum to one, so weights are one
    assert result.ess == pytest.approx(50)


async def test_two_language_models_in_one_target():
    one, other = toy(seed=1), toy(seed=2)
    a, b = exact_weights(one), exact_weights(other)
    found = await estimates((one**0.5) * (other**0.5) * ByteRegex(PATTERN), 200, n=6)
    truth = sum(math.sqrt(a[t] * b[t]) for t in TEXTS)
    assert found.agree(truth), (found, truth)


async def test_stopping_by_a_condition():
    llm = toy(seed=11)
    found = await estimates(
        llm, 200, n=6, max_bytes=12, terminate_when=lambda text: text.endswith(b"b")
    )
    # texts end at their first b (weight: of the prefix) or by themselves before it
    stems, alive = [b""], [b""]
    for _ in range(12):
        alive = [t + x for t in alive for x in (b"a", b"c")]
        stems += alive
        if len(stems) > 200:
            break
    prefixes = await llm.batch_prefix([[bytes([x]) for x in t + b"b"] for t in stems])
    wholes = await llm.batch_complete([[bytes([x]) for x in t] for t in stems])
    truth = float(np.exp(prefixes).sum() + np.exp(wholes).sum())
    assert abs(found.mean - truth) < 4 * found.error + 0.01, (found, truth)


@pytest.mark.parametrize("mistake", ["weight", "twist", "resampling"])
async def test_a_wrong_weight_is_noticed(monkeypatch, mistake):
    llm = toy()
    truth, options = sum(exact_weights(llm).values()), {}
    if mistake == "weight":

        def wrong(*args):
            symbols, log_weights = draw(*args)
            return symbols, log_weights + 0.1

        draw = reading.draw
        monkeypatch.setattr(reading, "draw", wrong)
    elif mistake == "twist":
        critic = toy(seed=7) ** 0.5
        judged = exact_weights(toy(seed=7))
        truth = sum(w * judged[t] ** 0.5 for t, w in exact_weights(llm).items())
        monkeypatch.setattr(Particles, "untwisted", lambda self, which: self)
        options = {"critic": critic}
    else:

        def careless(weights, rng):  # anyone, whatever the weight
            return rng.integers(len(weights), size=len(weights))

        monkeypatch.setitem(RESAMPLING, "systematic", careless)
        options = {"ess": 1.0}
    found = await estimates(finite(llm), 250, n=5, **options)
    assert not found.agree(truth), (found, truth)
