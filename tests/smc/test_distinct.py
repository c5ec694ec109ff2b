"""`distinct=True`: SMC without replacement is unbiased, and exact where N holds all texts."""

import dataclasses
import math

import numpy as np
import pytest

from genlm_bytes_smc import load_model
from genlm_bytes_smc.lookahead import Lookahead
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import AllParticlesDeadError, Suffix, selection, smc, smc_many, smc_repeat
from genlm_bytes_smc.smc.selection import without_replacement
from tests.smc.worlds import (
    EXACT,
    LONGEST,
    RANDOM,
    TEXTS,
    TOPK,
    Estimates,
    exact_weights,
    finite,
    same,
    total_variation,
    toy,
    weights_of,
)
from tests.toys import EOS_TOKEN, Enumeration

RUNS = 1000
DISTINCT = {"distinct": True}


async def repeated(target, runs, n, max_bytes=LONGEST, **options):
    """exp(log_ml) of runs side by side."""
    found = await smc_repeat(
        target, n, 0.5, max_bytes, seeds=runs, at_once=100, distinct=True, **options
    )
    return Estimates(np.exp(found.log_mls))


def test_inclusion_probabilities():
    """At most n items, heavy ones for sure; on average as often as the threshold says."""
    rng = np.random.default_rng(0)
    logs = rng.normal(size=12) * 2
    n, runs = 5, 4000
    weights, times, chosen = np.exp(logs), np.zeros(12), np.zeros(12)
    for _ in range(runs):
        kept, log_share = without_replacement(logs, n, rng.random())
        assert len(set(kept.tolist())) == len(kept) == n
        times[kept] += 1
        chosen[kept] = np.exp(log_share)
    c = min(w / p for w, p in zip(weights, chosen, strict=True) if 0 < p < 1)
    assert np.minimum(weights / c, 1).sum() == pytest.approx(n)
    assert times / runs == pytest.approx(np.minimum(weights / c, 1), abs=0.04)
    assert (times[weights > c] == runs).all()


@pytest.mark.parametrize("n", [1, 3, 7])
def test_edges_of_the_choice(n):
    """Equal weights, weights beyond the range of floats, and fewer items than places."""
    for u in (0.0, 0.5, np.nextafter(1.0, 0.0)):
        kept, log_share = without_replacement(np.zeros(7), n, u)
        assert len(kept) == n
        assert np.exp(log_share) == pytest.approx(np.full(n, n / 7))
        kept, log_share = without_replacement(np.array([-9000.0, 0.0, -800.0, -9000.0]), n, u)
        assert 1 in kept
        assert len(kept) == min(n, 4)
        assert log_share[list(kept).index(1)] == pytest.approx(0.0)


@pytest.mark.parametrize("look", ["none", "twist", "proposal", "both"])
async def test_its_estimate_is_unbiased(look):
    """The mean of exp(log_ml) is the enumerated weight, within four standard errors."""
    llm, ahead = toy(seed=12), Lookahead(n_texts=8, defensive=0.05)
    options = {k: ahead for k in ("twist", "proposal") if look in (k, "both")}
    found = await repeated(finite(llm), RUNS, 2, **options)
    assert found.agree(sum(exact_weights(llm).values())), found
    assert found.error > 0


async def test_it_is_unbiased_on_a_real_model():
    """The bundled model, against the weights of all texts."""
    llm = ByteLLM(load_model("tiny"), dataclasses.replace(TOPK, K=5, eos_byte_strings=[b"\n"]))
    texts = [b" the cat", b" a cat", b" a dog", b" the end", b" an end"]
    truth = sum((await weights_of(llm, texts)).values())
    found = await repeated(finite(llm, texts), 200, 2, 9)
    assert found.agree(truth), (found, truth)


async def test_a_wrong_weight_is_noticed(monkeypatch):
    """Weights that are not divided by the probability of being kept."""
    llm, real = toy(seed=12), selection.without_replacement

    def wrong(*args):
        kept, log_share = real(*args)
        return kept, log_share * 0

    monkeypatch.setattr(selection, "without_replacement", wrong)
    found = await repeated(finite(llm), 100, 2)
    assert not found.agree(sum(exact_weights(llm).values())), found


async def test_its_posterior_is_that_of_enumeration():
    """Averaged over runs by weight, the law of the texts is the target's."""
    llm = toy(seed=12)
    runs = await smc_repeat(finite(llm), 3, 0.5, LONGEST, seeds=RUNS, at_once=100, **DISTINCT)
    assert total_variation(runs.byte_posterior, exact_weights(llm)) < 0.05


@pytest.mark.parametrize("params", [EXACT, TOPK])
@pytest.mark.parametrize("n", [40, 200])
async def test_it_is_exact_where_there_are_no_more_texts(params, n):
    """Every text is there, once counted; nothing depends on the seed."""
    llm = toy(params=params)
    truth = await weights_of(llm)
    for seed in (0, 1):
        result = await smc(finite(llm), n, 0.5, LONGEST, seed=seed, **DISTINCT)
        assert set(result.texts) == set(TEXTS)
        assert math.exp(result.log_ml) == pytest.approx(sum(truth.values()), rel=1e-9)
        assert total_variation(result.byte_posterior, truth) < 1e-9


async def test_particles_do_not_share_texts():
    """Where there are more texts than places, each place has one of its own."""
    states = []
    await smc(toy(), 5, 0.5, 6, seed=1, on_step=states.append, **DISTINCT)
    for state in states[2:-1]:
        texts = list(zip(state.particles.texts(), state.particles.ended.tolist(), strict=True))
        assert len(set(texts)) == len(texts)


async def test_rows_are_spent_on_distinct_texts():
    """A step has a lane a particle, where plain SMC has fewer."""
    plain = await smc(toy(), 16, 0.5, 6, seed=1)
    result = await smc(toy(), 16, 0.5, 6, seed=1, **DISTINCT)
    assert sum(i.lanes for i in result.history) > sum(i.lanes for i in plain.history)


@pytest.mark.parametrize("case", ["critic", "ends", "length", "deferred", "random"])
async def test_it_is_unbiased_with(case):
    """A critic, a function that ends texts, a length limit, weights that a byte revises."""
    llm, options, longest, slack = toy(seed=12), {}, LONGEST, 0.0
    texts = exact_weights(llm)
    target = finite(llm)
    if case == "critic":
        options["critic"] = lambda t: 0.0 if len(t) == 4 else -1.0
        truth = sum(w * math.exp(options["critic"](t)) for t, w in texts.items())
    elif case == "ends":
        stops = [b"ba", b"cab", b"bb", b"abab"]
        options["terminate_when"] = lambda t: t in stops
        enumeration = Enumeration(llm.model.engine.llm, frozenset([EOS_TOKEN]))
        truth, target = sum(enumeration.prefix(t) for t in stops), finite(llm, stops)
    elif case == "length":
        longest, truth = 3, sum(w for t, w in texts.items() if len(t) <= 3)
    elif case == "deferred":
        llm = toy(seed=12, params=dataclasses.replace(EXACT, prune="deferred"))
        target, truth, slack = finite(llm), sum(texts.values()), 0.01
    else:
        llm = toy(seed=12, params=dataclasses.replace(RANDOM, K=2))
        target, truth = finite(llm), sum(texts.values())
    found = await repeated(target, 300, 2, longest, **options)
    assert abs(found.mean - truth) < 4 * found.error + slack * truth, (found, truth)


async def test_runs_side_by_side_are_those_alone():
    """Runs in one set of arrays, or together with others, are the same digit by digit."""
    target = finite(toy())
    runs = await smc_repeat(target, 3, 0.5, LONGEST, seeds=5, seed=3, **DISTINCT)
    many = await smc_many([target] * 5, 3, 0.5, LONGEST, seed=3, **DISTINCT)
    for k in range(5):
        one = await smc(target, 3, 0.5, LONGEST, seed=3 + k, **DISTINCT)
        assert same(one, runs.results[k])
        assert same(one, many[k])


async def test_it_goes_on_where_it_stopped():
    """A run that is resumed is the one without a stop."""
    target, states = finite(toy()), []
    whole = await smc(target, 3, 0.5, LONGEST, seed=7, on_step=states.append, **DISTINCT)
    for state in states[:-1]:
        rest = await smc(target, 3, 0.5, LONGEST, resume=state, **DISTINCT)
        assert same(whole, rest)
    assert "error unknown" in str(whole)


async def test_a_run_that_dies():
    """Nothing is left after a limit that no text keeps."""
    with pytest.raises(AllParticlesDeadError):
        await smc(finite(toy(), [b"abab"]), 3, 0.5, 3, **DISTINCT)


@pytest.mark.parametrize(
    "options",
    [
        {"rollout": 2},
        {"rejuvenate": Suffix(4)},
        {"draft": toy()},
        {"resample_at": "a"},
        {"tempering": 3},
        {"record": True},
        {"resampling_method": "multinomial"},
        {"share_beams": False},
    ],
)
async def test_what_does_not_go_with_it_is_refused(options):
    """Before any row is computed."""
    name = next(iter(options))
    target = finite(toy())
    with pytest.raises(ValueError, match=f"does not go with .*{name}|one of {name}"):
        await smc(target, 3, 0.5, LONGEST, **options, **DISTINCT)
