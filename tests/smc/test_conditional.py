"""Conditional SMC and particle Gibbs keep the target, with fixed beams and with their own."""

import math

import numpy as np
import pytest

from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.smc import Held, Particles, Rollout, conditional_smc, particle_gibbs
from genlm_bytes_smc.smc import conditional as module
from genlm_bytes_smc.smc.plan import make_plan
from genlm_bytes_smc.smc.reading import replay
from tests.smc.invariance import LEAST, exact_draws, p_value
from tests.smc.worlds import (
    LONGEST,
    RANDOM,
    TEXTS,
    TOPK,
    exact_weights,
    finite,
    total_variation,
    toy,
    weights_of,
)

CHAINS = 1000


def critical(text):
    return 0.7 * len(text)


async def after(target, starts, n, ess=1.0, iterations=1, **options):
    """The texts of chains after some iterations of particle Gibbs."""
    chains = await particle_gibbs(
        target, n, iterations, ess, LONGEST, start=starts, chains=len(starts), seed=5, **options
    )
    return [chain[-1] for chain in chains.chains], chains


SETTINGS = {
    "two particles": (2, 1.0, {}),
    "four, adaptive": (4, 0.6, {}),
    "another model proposes": (4, 1.0, {"proposal": finite(toy(seed=5, sharpness=0.5))}),
    "a critic": (4, 1.0, {"critic": critical}),
    "resampling every two bytes": (4, 1.0, {"rollout": 2}),
}


@pytest.mark.parametrize("sampling", [False, True], ids=["plain", "ancestor sampling"])
@pytest.mark.parametrize("name", list(SETTINGS))
async def test_the_target_is_invariant(name, sampling):
    n, ess, options = SETTINGS[name]
    llm = toy(seed=1)
    weights = exact_weights(llm)
    if "critic" in options:
        weights = {t: w * math.exp(critical(t)) for t, w in weights.items()}
    starts = exact_draws(weights, CHAINS, seed=1)
    options = {"ancestor_sampling": sampling, "iterations": 2, **options}
    texts, chains = await after(finite(llm), starts, n, ess, **options)
    assert chains.changed.mean() > 0.05
    assert p_value(texts, weights) > LEAST


@pytest.mark.parametrize("sampling", [False, True], ids=["plain", "ancestor sampling"])
async def test_with_shared_beams_the_model_of_one_seed_is_invariant(sampling):
    llm = toy(seed=9, params=RANDOM)
    served = {t: w for t, w in (await weights_of(llm)).items() if w > 0}
    exact = exact_weights(llm)
    starts = exact_draws(served, CHAINS, seed=1)
    texts, _ = await after(finite(llm), starts, 3, ancestor_sampling=sampling)
    assert p_value(texts, served) > LEAST
    kept = {t: exact[t] for t in served}
    assert p_value(texts, kept) < LEAST  # which is not the exact model


@pytest.mark.parametrize("sampling", [False, True], ids=["plain", "ancestor sampling"])
async def test_with_beams_of_ones_own_the_exact_model_is_invariant(sampling):
    """From texts with beams at random, weighed by their estimates: E[w 1(x' = a)] = p(a)."""
    llm = toy(seed=9, params=RANDOM)
    exact = exact_weights(llm)
    rng = np.random.default_rng(2)
    n = 2000
    drawn = rng.integers(len(TEXTS), size=n)
    starts = [
        Held(TEXTS[i], rng.integers(0, 2**64, size=LONGEST + 2, dtype=np.uint64)) for i in drawn
    ]
    weights = np.exp(await estimated(llm, starts))
    alive = [i for i in range(n) if weights[i] > 0]
    texts, chains = await after(
        finite(llm),
        [starts[i] for i in alive],
        3,
        share_beams=False,
        ancestor_sampling=sampling,
    )
    assert chains.changed.mean() > 0.05
    for text in TEXTS:
        hit = np.zeros(n)
        hit[alive] = [t == text for t in texts]
        value = weights * hit * len(TEXTS)
        error = value.std(ddof=1) / math.sqrt(n)
        assert abs(value.mean() - exact[text]) < 4 * error, (text, value.mean(), exact[text])


async def estimated(llm, held):
    """Log weight of each text under its own beams, by reading it with them."""
    plan = make_plan(llm, len(held), 0.0, LONGEST, share_beams=False)
    salts = np.stack([h.salt for h in held])
    first = Particles.first(len(held), float(await llm.prefix([])))
    read = await replay(
        plan,
        first.salted(salts[:, 0]),
        [None],
        range(LONGEST + 1),
        lambda step: np.array([h.text[step] if step < len(h.text) else 256 for h in held]),
        salt=lambda step: salts[:, step],
        score=True,
    )
    return read.particles.log_weights


@pytest.mark.parametrize("mistake", ["choice", "ancestors", "joined"])
async def test_a_wrong_kernel_is_noticed(monkeypatch, mistake):
    llm = toy(seed=1, sharpness=1.5)
    weights = exact_weights(llm)
    if mistake == "choice":  # anyone, whatever the weight
        right = module._choose

        def wrong(plan, result, text):
            k = plan.seed % result.size
            choice = right(plan, result, text)
            return module.ConditionalResult(result.texts[k], Held(result.texts[k]), choice.result)

        monkeypatch.setattr(module, "_choose", wrong)
    elif mistake == "ancestors":  # the weights of the particles forgotten

        async def joined(runs, particles, index, due):
            w = await right_joined(runs, particles, index, due)
            return w - np.where(w > -np.inf, (particles.log_weights - particles.twist)[index], 0)

        right_joined = module._joined
        monkeypatch.setattr(module, "_joined", joined)
    else:  # whether the rest fits forgotten

        async def nothing(runs, particles, index, due):
            w = await right_joined(runs, particles, index, due)
            return np.where(w > -np.inf, 0.0, -np.inf)

        right_joined = module._joined
        monkeypatch.setattr(module, "_joined", nothing)
    starts = exact_draws(weights, CHAINS, seed=1)
    texts, _ = await after(finite(llm), starts, 4, iterations=3, proposal=finite(toy(seed=5)))
    assert p_value(texts, weights) < LEAST


async def test_long_chains_from_one_run_visit_the_posterior():
    llm = toy(seed=1)
    exact = exact_weights(llm)
    chains = await particle_gibbs(finite(llm), 8, 12, 1.0, LONGEST, chains=80, seed=3)
    assert total_variation(chains.posterior(burn_in=4), exact) < 0.08
    assert len(chains.texts) == 80 * 12
    own = toy(seed=9, params=RANDOM)
    options = {"chains": 80, "seed": 3, "share_beams": False}
    chains = await particle_gibbs(finite(own), 12, 12, 1.0, LONGEST, **options)
    assert total_variation(chains.posterior(burn_in=4), exact_weights(own)) < 0.1
    again = await particle_gibbs(finite(own), 12, 12, 1.0, LONGEST, **options)
    assert again.chains == chains.chains


async def test_ancestor_sampling_lets_a_text_change_its_beginning():
    target = toy(seed=3, params=TOPK, sharpness=0.3) * ByteRegex("[abc]{8}")
    start = b"abcabcab"

    async def firsts(sampling):
        chains = await particle_gibbs(
            target, 4, 5, 1.0, 8, start=start, chains=10, ancestor_sampling=sampling, seed=1
        )
        return np.mean([[t[:2] != start[:2] for t in chain] for chain in chains.chains])

    assert await firsts(True) > await firsts(False) + 0.05


async def test_one_conditional_run():
    llm = toy(seed=1)
    one = await conditional_smc(finite(llm), b"abab", 5, 1.0, LONGEST, seed=2)
    assert one.text in one.result.texts
    assert one.result.texts[0] == b"abab"  # without ancestor sampling it stays as it is
    assert one.result.size == 5
    alone = await conditional_smc(finite(llm), b"abab", 1, 1.0, LONGEST)
    assert alone.text == b"abab"


async def test_refusals():
    target = finite(toy(seed=1))
    with pytest.raises(ValueError, match="'bbb' has weight zero under the target"):
        await conditional_smc(target, b"bbb", 4, 1.0, LONGEST)
    with pytest.raises(ValueError, match="at most max_bytes = 2 bytes, got 4"):
        await conditional_smc(target, b"abab", 4, 1.0, 2)
    with pytest.raises(TypeError, match="a text is due as bytes, got str"):
        await conditional_smc(target, "abab", 4, 1.0, LONGEST)
    stop = {"terminate_when": lambda text: text.endswith(b"b")}
    with pytest.raises(ValueError, match="terminate_when ends b'abab' after 2 bytes"):
        await conditional_smc(target, b"abab", 4, 1.0, LONGEST, **stop)
    with pytest.raises(ValueError, match="one text for each of 3 chains, got 1"):
        await particle_gibbs(target, 2, 1, start=[b"ab"], chains=3)
    with pytest.raises(ValueError, match="conditional SMC is made for plain particles"):
        await conditional_smc(target, b"ab", 2, rollout=Rollout(2, 2))
    with pytest.raises(ValueError, match="iterations must be at least 0, got -1"):
        await particle_gibbs(target, 2, -1)
