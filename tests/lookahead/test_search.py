"""The search: exact weights of whole texts, sure bounds, and runs after it that stay unbiased."""

import dataclasses
import math

import numpy as np
import pytest

from genlm_bytes_smc.constraints import ByteGrammar, BytePredicate
from genlm_bytes_smc.lookahead import auto
from genlm_bytes_smc.lookahead.search import Search
from genlm_bytes_smc.smc import AllParticlesDeadError, posterior, smc
from genlm_bytes_smc.smc.plan import make_plan
from tests.smc.worlds import (
    EXACT,
    LONGEST,
    TEXTS,
    exact_weights,
    finite,
    total_variation,
    toy,
)
from tests.toys import EOS_TOKEN, Enumeration

SEEDS = 60
STOPS = [b"ba", b"cab", b"bb", b"abab"]
AUTO = {"lookahead": "auto", "progress": False}


def cold(llm):
    """Forget the rows, so that they cost again."""
    llm.clear_cache()
    llm.model.store.clear()


def predicate(llm):
    """The usual texts, by functions: no automaton."""
    begins = {t[:k] for t in TEXTS for k in range(len(t) + 1)}
    return llm * BytePredicate(lambda t: t in TEXTS, lambda t: t in begins)


def grammar(llm):
    """The usual texts, by a grammar, which an automaton approximates."""
    return llm * ByteGrammar("start: " + " | ".join(f'"{t.decode()}"' for t in TEXTS) + "\n")


@pytest.mark.parametrize("make", [finite, predicate, grammar])
async def test_what_it_knows_is_exact(make):
    """Weights are those of enumeration, bounds hold the truth and close, no text is lost."""
    llm = toy(seed=4)
    exact, widths = exact_weights(llm), []
    search = Search(make_plan(make(llm), 4, 0.5, LONGEST))
    for _ in range(30):
        await search.spend(2)
        known = search.rows().whole()
        for text, logw in known.items():
            assert math.exp(logw) == pytest.approx(exact[text], rel=1e-6)
        found = search.found(0, 0.0)
        assert found.low - 1e-6 <= math.log(sum(exact.values())) <= found.high + 1e-6
        widths.append(found.high - found.low)
        assert 0 <= found.share <= 1 + 1e-9
    assert set(known) == set(exact)
    assert widths[-1] < 1e-6 < widths[3]
    assert found.share == pytest.approx(1.0)


async def test_a_limit_and_a_function_that_ends_texts():
    """Texts that are too long weigh nothing; those that a function ends pay for no end."""
    llm = toy(seed=4)
    exact = exact_weights(llm)
    search = Search(make_plan(finite(llm), 4, 0.5, 3))
    await search.spend(1000)
    assert set(search.rows().whole()) == {t for t in exact if len(t) <= 3}
    stops = lambda t: t in STOPS  # noqa: E731
    search = Search(make_plan(finite(llm, STOPS), 4, 0.5, LONGEST, terminate_when=stops))
    await search.spend(1000)
    enumeration = Enumeration(llm.model.engine.llm, frozenset([EOS_TOKEN]))
    known = search.rows().whole()
    assert set(known) == set(STOPS)
    for text, logw in known.items():
        assert math.exp(logw) == pytest.approx(enumeration.prefix(text), rel=1e-6)


@pytest.mark.parametrize("case", ["topk", "deferred", "predicate", "ends", "broad"])
async def test_a_budget_leaves_the_estimate_unbiased(case, monkeypatch):
    """Of few rows the search knows some texts, and the mean of exp(log_ml) is the whole weight."""
    llm, options, slack, budget = toy(seed=12), {}, 0.0, 8
    truth = sum(exact_weights(llm).values())
    if case == "deferred":
        llm, slack, budget = (
            toy(seed=12, params=dataclasses.replace(EXACT, prune="deferred")),
            0.01,
            5,
        )
    target = predicate(llm) if case == "predicate" else finite(llm)
    if case == "ends":
        options["terminate_when"] = lambda t: t in STOPS
        enumeration = Enumeration(llm.model.engine.llm, frozenset([EOS_TOKEN]))
        truth, target = sum(enumeration.prefix(t) for t in STOPS), finite(llm, STOPS)
    # What it found is always worth going on, or never: then stages follow.
    monkeypatch.setattr(auto, "WORTH", 2.0 if case == "broad" else 0.0)
    values, known = [], []
    for seed in range(SEEDS):
        cold(llm)
        result = await smc(target, 8, 1.0, LONGEST, seed=seed, budget=budget, **AUTO, **options)
        values.append(math.exp(result.log_ml))
        known.append(len(result.stages[-1].known))
        assert result.search is not None
        assert result.log_ml >= result.search.low - 1e-9
        assert len(result.stages) == 1 or case == "broad"
    error = np.std(values) / math.sqrt(SEEDS)
    assert abs(np.mean(values) - truth) < 4 * error + slack * truth, (np.mean(values), error, truth)
    assert error > 0
    assert max(known) > 0


@pytest.mark.parametrize("prune", ["topk", "deferred"])
async def test_enough_rows_make_it_exact(prune):
    """Known texts weigh what a run that holds all texts says, also where rows are forecasts."""
    llm = toy(seed=4, params=dataclasses.replace(EXACT, prune=prune))
    every = await smc(finite(llm), 200, 0.5, LONGEST, distinct=True)
    result = await smc(finite(llm), 8, 0.5, LONGEST, seed=1, budget=500, **AUTO)
    assert result.log_ml == pytest.approx(every.log_ml, abs=1e-9)
    weights = dict(every.byte_posterior.items())
    assert total_variation(result.byte_posterior, weights) < 1e-9
    assert "of the mass as it guesses" in result.summary()["stages"]
    found = await posterior(finite(llm), 500, LONGEST)
    assert total_variation(found.byte_posterior, weights) < 1e-9


async def test_options_that_a_run_of_distinct_texts_does_not_take():
    """The run after the search then draws its particles."""
    llm = toy(seed=12)
    for options in ({"record": True}, {"tempering": 2}, {"resampling_method": "residual"}):
        cold(llm)
        result = await smc(finite(llm), 8, 1.0, LONGEST, seed=1, budget=8, **AUTO, **options)
        assert result.search is not None


async def test_a_critic_is_not_searched_for():
    """What a critic makes of texts is not in the rows: stages begin with a plain run."""
    target = finite(toy(seed=12))
    result = await smc(target, 8, 1.0, LONGEST, budget=8, critic=lambda t: len(t) < 4, **AUTO)
    assert result.search is None
    assert not result.stages[0].lookahead


async def test_a_target_without_texts():
    """Nothing is found, and it is said."""
    with pytest.raises(AllParticlesDeadError):
        await smc(finite(toy(), [b"abab"]), 8, 0.5, 2, budget=50, **AUTO)
