"""Look-ahead and tempering leave exp(log_ml) unbiased and the posterior what it is."""

import dataclasses
import math

import numpy as np
import pytest

from genlm_bytes_smc.constraints import ByteDFA, ByteRegex, ByteWFSA, FiniteSet
from genlm_bytes_smc.lookahead import ByteNgram, Lookahead
from genlm_bytes_smc.smc import RESAMPLING, Particles, SMCResult, reading, smc, smc_repeat
from tests.smc.worlds import (
    LONGEST,
    PATTERN,
    RANDOM,
    TEXTS,
    estimates,
    exact_weights,
    finite,
    total_variation,
    toy,
    weights_of,
)
from tests.toys import EOS_TOKEN, Enumeration

RUNS = 1000  # of each scheme and each option
FEW = 150


def soft():
    """A weighted automaton that prefers c and long texts, with weights well below one."""
    arcs = [(0, b, 0, math.log(w)) for b, w in zip(b"abc", (0.1, 0.2, 0.5), strict=True)]
    return ByteWFSA([0.0], arcs, [math.log(0.3)])


def soft_weight(text):
    return 0.3 * math.prod({"a": 0.1, "b": 0.2, "c": 0.5}[c] for c in text.decode())


async def fitted(target):
    """An n-gram look-ahead as proposal and twist."""
    return {"proposal": (ahead := Lookahead()), "twist": ahead}


async def learned(target):
    """A look-ahead from a small pilot, whose draws are no part of the estimate."""
    ahead = await Lookahead.from_pilot(target, 4, LONGEST, rounds=2, order=2, seed=5000)
    return {"proposal": ahead, "twist": ahead}


async def graded(target):
    """Tempering of a soft factor, a critic and a twist at once."""
    critic = toy(seed=7) ** 0.5
    return {"tempering": 3.5, "critic": critic, **(await fitted(target))}


async def lent(target):
    """A twist without a proposal, to a power."""
    return {"twist": Lookahead(3, strength=0.7)}


@pytest.mark.parametrize(
    ("method", "options_for"),
    list(zip(sorted(RESAMPLING), (fitted, learned, graded, lent), strict=True)),
)
async def test_every_scheme_and_every_option(method, options_for):
    llm = toy(seed=12)
    weights, judged = exact_weights(llm), exact_weights(toy(seed=7))
    target = finite(llm)
    if options_for is graded:
        target = target * soft()
        weights = {t: w * soft_weight(t) * judged[t] ** 0.5 for t, w in weights.items()}
    options = {**(await options_for(target)), "resampling_method": method}
    found = await estimates(target, RUNS, n=3, ess=1.0, **options)
    assert found.agree(sum(weights.values())), (found, weights)


@pytest.mark.parametrize("ess", [0, 0.5])
@pytest.mark.parametrize("role", ["proposal", "twist"])
async def test_either_role_alone(role, ess):
    llm = toy(seed=2)
    truth = sum(exact_weights(llm).values())
    ahead = Lookahead(3, strength=0.7, defensive=0.01)
    found = await estimates(finite(llm), FEW, n=3, ess=ess, **{role: ahead})
    assert found.agree(truth), (found, truth)


async def test_a_pilot_with_every_text_in_it_is_nearly_exact():
    """Where each pair of state and context is one text, psi is the model's own future."""
    llm = toy(seed=4)
    target = finite(llm)
    truth = sum(exact_weights(llm).values())
    ahead = await Lookahead.from_pilot(
        target, 200, LONGEST, rounds=2, order=6, smoothing=1e-6, explore=0.3, defensive=1e-6
    )
    table = await ahead.fit(target, LONGEST)
    assert math.exp(float(table.now(table.first(), LONGEST)[0])) == pytest.approx(truth, rel=1e-3)
    result = await smc(target, 5, 0.5, LONGEST, proposal=ahead, twist=ahead, seed=1)
    assert math.exp(result.log_ml) == pytest.approx(truth, rel=1e-2)


async def test_a_misleading_model_costs_variance_and_no_bias():
    llm, wrong = toy(seed=4), ByteNgram([b"zzz", b"cab" * 5], order=2)
    truth = sum(exact_weights(llm).values())
    ahead = Lookahead(wrong, defensive=0.3)
    found = await estimates(finite(llm), FEW, n=3, ess=1.0, proposal=ahead, twist=ahead)
    assert found.agree(truth), (found, truth)


async def test_an_approximating_automaton_that_is_wrong():
    """It misses half of the texts, and admits others; with unbiased beams besides."""
    llm = toy(seed=9, params=dataclasses.replace(RANDOM, K=2))
    truth = sum(exact_weights(llm).values())
    ahead = Lookahead(constraint=FiniteSet([*TEXTS[::2], b"ccc"]), outside=-2.0)
    runs = await smc_repeat(
        finite(llm), 4, 0.5, LONGEST, seeds=2 * FEW, at_once=16, proposal=ahead, twist=ahead
    )
    values = np.exp(runs.log_mls)
    error = values.std(ddof=1) / math.sqrt(len(values))
    assert abs(values.mean() - truth) < 4 * error, (values.mean(), error, truth)


async def test_nothing_is_uncovered_even_by_a_bad_proposal():
    llm = toy(seed=4)
    ahead = Lookahead(ByteNgram([b"a" * 50], order=1), constraint=FiniteSet([b"c"]))
    result = await smc(finite(llm), 50, 0.5, LONGEST, proposal=ahead, seed=1)
    assert result.uncovered == 0.0


async def test_the_posterior_with_look_ahead():
    llm, ahead = toy(), Lookahead()
    result = await smc(finite(llm), 4000, 0.5, LONGEST, seed=1, proposal=ahead, twist=ahead)
    assert total_variation(result.byte_posterior, exact_weights(llm)) < 0.03


async def test_a_resumed_run_is_the_run_without_the_stop():
    llm, ahead = toy(), Lookahead(max_bytes=None)
    options = {"proposal": ahead, "twist": ahead, "seed": 3, "progress": False}
    whole = await smc(finite(llm), 20, 0.5, LONGEST, **options)
    half = await smc(finite(llm), 20, 0.5, 2, **options)
    del options["seed"]
    again = await smc(finite(llm), 20, 0.5, LONGEST, resume=half, **options)
    assert again.texts == whole.texts
    assert again.log_weights == pytest.approx(whole.log_weights, abs=1e-12)


async def test_a_twist_that_gave_texts_up_refuses_a_larger_limit(tmp_path):
    """It would miss them: only "c" can end within 2 bytes, and the others are dead."""
    llm, ahead = toy(), Lookahead()
    half = await smc(finite(llm), 20, 0.5, 2, twist=ahead, seed=3, progress=False)
    half.save(tmp_path / "half.json")
    for part in (half, SMCResult.load(tmp_path / "half.json")):
        with pytest.raises(ValueError, match="max_bytes must be at most 2, as in what is resumed"):
            await smc(finite(llm), 20, 0.5, LONGEST, twist=ahead, resume=part)
        same = await smc(finite(llm), 20, 0.5, 2, twist=ahead, resume=part, progress=False)
        assert same.texts == half.texts


@pytest.mark.parametrize("tempering", [[0.2, 0.9], lambda t: 0.5 if t < 3 else 1.0])
async def test_tempering_grades_the_way_and_not_the_target(tempering):
    llm = toy(seed=12)
    truth = sum(w * soft_weight(t) for t, w in exact_weights(llm).items())
    found = await estimates(finite(llm) * soft(), FEW, n=4, ess=1.0, tempering=tempering)
    assert found.agree(truth), (found, truth)


async def test_tempering_changes_what_resampling_sees():
    llm = toy(seed=12)
    target = llm * soft()
    plain = await smc(target, 8, 0.0, 4, seed=1, record=True)
    graded = await smc(target, 8, 1e-12, 4, seed=1, record=True, tempering=lambda t: 0.25)
    one, other = plain.history[0], graded.history[0]
    assert one.symbols.tolist() == other.symbols.tolist()
    log_soft = {b: math.log(w) for b, w in zip(b"abc", (0.1, 0.2, 0.5), strict=True)}
    prefix = float((await soft().prefix([b"a"])) - math.log(0.1))  # of the empty text
    for symbol, before, after in zip(one.symbols, one.log_weights, other.log_weights, strict=True):
        loan = 0.0 if symbol == 256 else -0.75 * (prefix + log_soft[int(symbol)])
        assert after - before == pytest.approx(loan, abs=1e-9)


async def test_the_twist_is_lent_and_taken_back():
    """Weights before resampling hold psi of what was read; those of ended texts do not."""
    llm, ahead = toy(), Lookahead(ByteNgram(TEXTS, 2), strength=0.5)
    target = finite(llm)
    plain = await smc(target, 8, 0.0, LONGEST, seed=1, record=True)
    lent = await smc(target, 8, 1e-12, LONGEST, seed=1, record=True, twist=ahead)
    assert lent.log_weights == pytest.approx(plain.log_weights, abs=1e-12)
    table = await ahead.fit(target, LONGEST)
    first = plain.history[0].symbols
    dfa = ByteRegex(PATTERN)
    assert isinstance(dfa, ByteDFA)
    for i, symbol in enumerate(first.tolist()):
        state, context = int(dfa.table[0, symbol]), ahead.model.context_of(bytes([symbol]))
        code = np.searchsorted(table.codes, state * len(ahead.model) + context)
        loan = 0.5 * float(table.log_psi[LONGEST - 1, code])
        gained = lent.history[0].log_weights[i] - plain.history[0].log_weights[i]
        assert gained == pytest.approx(loan, abs=1e-9)


@pytest.mark.parametrize("mistake", ["kept", "proposal", "tempering"])
async def test_a_wrong_weight_is_noticed(monkeypatch, mistake):
    llm, ahead = toy(seed=12), Lookahead()
    truth = sum(w * soft_weight(t) for t, w in exact_weights(llm).items())
    options = {"proposal": ahead, "twist": ahead, "tempering": 3}
    if mistake == "kept":  # the loan is not taken back
        monkeypatch.setattr(Particles, "untwisted", lambda self, which: self)
    elif mistake == "proposal":  # weighted as if drawn from the target's row
        real = reading.draw

        def wrong(rows, lanes, uniform):
            symbols, _ = real(rows, lanes, uniform)
            _, weights = real(rows._replace(proposal=None), lanes, uniform)
            return symbols, weights

        monkeypatch.setattr(reading, "draw", wrong)
    else:  # taken back to another power than lent
        monkeypatch.setattr(
            Particles,
            "untwisted",
            lambda self, which: self._replace(
                log_weights=self.log_weights - 1.2 * self.twist, twist=0 * self.twist
            ),
        )
    found = await estimates(finite(llm) * soft(), 120, n=5, ess=1.0, **options)
    assert not found.agree(truth), (found, truth)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"twist": toy}, "twist must be"),
        ({"tempering": 0}, "positive number"),
        ({"tempering": [0.5, 0.0]}, r"\(0, 1\]"),
        ({"tempering": "fast"}, "tempering must be"),
    ],
)
async def test_bad_options_are_refused(options, error):
    with pytest.raises((TypeError, ValueError), match=error):
        await smc(finite(toy()), 4, **options)


async def test_a_bad_schedule_and_no_automaton_are_said():
    with pytest.raises(ValueError, match=r"\(0, 1\], got 2"):
        await smc(finite(toy()) * soft(), 4, tempering=lambda t: 2.0)
    with pytest.raises(ValueError, match="no byte automaton, grammar or schema"):
        await smc(toy(), 4, proposal=Lookahead())


async def test_what_was_fitted_is_used_again():
    llm, ahead = toy(), Lookahead(n_texts=8)
    target = finite(llm)
    await smc(target, 4, 0.5, LONGEST, proposal=ahead, progress=False)
    (made,) = ahead._solved._held
    await smc_repeat(target, 4, 0.5, LONGEST, seeds=6, proposal=ahead, twist=ahead)
    assert [m is made for m in ahead._solved._held] == [True]
    assert len(await weights_of(llm)) == len(TEXTS)


@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("ends", ["eos", "accept"])
async def test_texts_that_are_ended_elsewhere_are_not_given_up(ends, distinct):
    """No automaton can end within the limit, but `terminate_when` ends two of their beginnings."""
    llm, stops = toy(seed=2), [b"ab", b"c"]
    enumeration = Enumeration(llm.model.engine.llm, frozenset([EOS_TOKEN]))
    truth = sum(enumeration.prefix(stop) for stop in stops)
    target, ahead = finite(llm, [b"abcca", b"abbab", b"ccaba"]), Lookahead(2, ends=ends)
    options = {"twist": ahead, "distinct": distinct, "terminate_when": lambda t: t in stops}
    found = await estimates(target, FEW, 20, 1.0, 4, **options)
    assert found.mean == pytest.approx(truth) or found.agree(truth), (found, truth)


async def test_a_look_ahead_to_a_smaller_limit_gives_no_longer_text_up():
    llm = toy(seed=2)
    truth = sum(exact_weights(llm).values())
    ahead = Lookahead(2, max_bytes=2)
    found = await estimates(finite(llm), FEW, n=8, ess=1.0, proposal=ahead, twist=ahead)
    assert found.agree(truth), (found, truth)
