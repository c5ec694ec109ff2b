"""`resample_at`: particles wait at the ends of units until all have come to one."""

import itertools
import math

import numpy as np
import pytest

from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.lookahead import Lookahead
from genlm_bytes_smc.potential.power_mean import mixture
from genlm_bytes_smc.smc import (
    Particles,
    Suffix,
    particle_gibbs,
    reading,
    smc,
    smc_repeat,
    smc_steps,
)
from tests.smc.test_ensembles import DEFERRED, agrees, other, stepped
from tests.smc.worlds import (
    EXACT,
    FREE,
    LONGEST,
    RANDOM,
    TEXTS,
    TOPK,
    exact_weights,
    finite,
    same,
    toy,
)

RUNS = 1000


async def repeated(target, runs=RUNS, ess=1.0, **options):
    options = {"resample_at": b"b"} | options
    return await smc_repeat(target, 4, ess, LONGEST, seeds=runs, at_once=8, **options)


def test_which_texts_end_in_a_string():
    """Suffixes of several lengths, in texts shorter and longer than they."""
    texts = [b"", b"b", b"ab", b"bab", b"ba", b"xxab"]
    width = max(map(len, texts))
    text = np.array([list(t.ljust(width, b"\0")) for t in texts], dtype=np.uint8)
    length = np.array([len(t) for t in texts])
    particles = Particles.first(len(texts), 0.0)._replace(text=text, length=length)
    assert particles.end_in([b"ab"]).tolist() == [t.endswith(b"ab") for t in texts]
    assert particles.end_in([b"bab", b"a"]).tolist() == [t.endswith((b"bab", b"a")) for t in texts]


@pytest.mark.parametrize(("strings", "ess"), [(b"b", 1.0), ("ba", 0.7), ([b"ab", "c"], 1.0)])
async def test_it_is_unbiased(strings, ess):
    """The mean of exp(log_ml) over a thousand runs is the exact sum, whatever the units are."""
    llm = toy(1)
    runs = await repeated(finite(llm), RUNS, ess, resample_at=strings)
    assert agrees(runs, sum(exact_weights(llm).values()))


@pytest.mark.parametrize("kind", ["random beams", "critic", "ensemble", "free", "deferred"])
async def test_all_kinds_of_factors_wait(kind):
    """Beams, automata, critics and ensembles go on from where their texts waited."""
    options, llm = {}, toy(1, RANDOM if kind == "random beams" else EXACT)
    target, truth = finite(llm), exact_weights(llm)
    if kind == "critic":
        options["critic"] = toy(7)
        truth = {t: w * exact_weights(toy(7))[t] for t, w in truth.items()}
    elif kind == "ensemble":
        target = mixture([llm * ByteRegex("a[a-z]*"), other()]) * ByteRegex("|".join(_words()))
        y = exact_weights(other())
        truth = {t: 0.5 * (w * (t[:1] == b"a") + y[t]) for t, w in truth.items()}
    elif kind == "free":
        options["terminate_when"] = lambda text: text.endswith(b"bb")
        llm, target = toy(1), toy(1) * ByteRegex("(ab|b)+")
        words = {b"bb", b"b", b"ab", b"abab", b"abb", b"babb", b"bab"}  # of at most four bytes
        exact = toy(1)
        truth = {}
        for t in words:
            ended = t.endswith(b"bb")
            weigh = exact.prefix if ended else exact.complete
            truth[t] = math.exp(await weigh(t))
    elif kind == "deferred":
        llm = toy(1, DEFERRED)
        target, truth = finite(llm), (await stepped(llm))[0]
    runs = await repeated(target, 400, **options)
    assert agrees(runs, sum(truth.values()), 0.01 * (kind == "deferred"))


def _words():
    return [t.decode() for t in TEXTS]


async def test_particles_wait_and_are_resampled_together():
    """Between two resamplings each particle reads exactly one unit, then all stand at an end."""
    target = toy(1, TOPK) * ByteRegex("[abc]*")
    states = [s async for s in smc_steps(target, 12, 1.0, 12, seed=3, resample_at=[b"b", b"c"])]
    resampled = 0
    for before, state in itertools.pairwise(states):
        particles = state.particles
        arrived = before.particles.end_in([b"b", b"c"]) & before.particles.active
        everyone = arrived[before.particles.active].all()
        if not everyone and state.history[-1].ancestors is None:  # who had arrived waits
            assert (particles.length[arrived] == before.particles.length[arrived]).all()
        if state.history[-1].ancestors is not None:
            resampled += 1
            there = particles.end_in([b"b", b"c"])
            assert there[particles.active].all()
            assert len(set(particles.length[particles.active].tolist())) > 1 or resampled > 1
    assert resampled >= 2
    final = states[-1].particles
    assert final.ended.all()
    assert final.length.max() <= 12


async def test_it_resumes_from_any_step():
    """A run that is stopped while some wait goes on as if it had not been."""
    target = toy(1, TOPK) * ByteRegex(FREE)
    options = {"resample_at": b"b"}
    states = [s async for s in smc_steps(target, 8, 1.0, 9, seed=5, **options)]
    whole = await smc(target, 8, 1.0, 9, seed=5, **options)
    apart = [len(set(s.particles.length[s.particles.active].tolist())) > 1 for s in states]
    assert any(apart)
    for state in states[1:-1]:
        again = await smc(target, 8, 1.0, 9, resume=state, **options)
        assert again.texts == whole.texts
        assert np.allclose(again.log_weights, whole.log_weights, atol=1e-9)
    with pytest.raises(ValueError, match="max_bytes must be 9, as in what is resumed"):
        await smc(target, 8, 1.0, 12, resume=states[2], **options)


async def test_without_such_an_end_it_is_importance_sampling():
    """A string that never comes leaves a run that never resamples, the same draw by draw."""
    target = toy(1, TOPK) * ByteRegex(FREE)
    never = await smc(target, 8, 1.0, 8, seed=1, resample_at=b"zz")
    assert same(never, await smc(target, 8, 0.0, 8, seed=1))


async def test_a_wrong_weight_is_noticed(monkeypatch):
    """Waiting that loses half a nat makes the estimate wrong."""
    right = reading.settled
    llm = toy(1)

    def wrong(frontier, particles):
        waits = particles.end_in([b"b"]) & particles.active
        particles.log_weights[waits] -= 0.5
        return right(frontier, particles)

    monkeypatch.setattr("genlm_bytes_smc.smc.loop.settled", wrong)
    assert not agrees(await repeated(finite(llm), 300), sum(exact_weights(llm).values()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resample_at": b""}, "needs strings of at least a byte"),
        ({"resample_at": []}, "needs strings of at least a byte"),
        ({"resample_at": b"b", "rollout": 3}, "does not go with rollout=3"),
        ({"resample_at": b"b", "rejuvenate": Suffix()}, "does not go with rejuvenate="),
        ({"resample_at": b"b", "draft": other()}, "does not go with draft="),
        ({"resample_at": b"b", "tempering": 3}, "does not go with tempering=3"),
        ({"resample_at": b"b", "twist": Lookahead()}, "does not go with a Lookahead"),
    ],
)
async def test_refusals(options, message):
    """What does not go together, and strings that are none, are named before any work."""
    with pytest.raises(ValueError, match=message):
        await smc(finite(toy(1)), 4, **options)
    with pytest.raises(ValueError, match="conditional SMC takes no resample_at="):
        await particle_gibbs(finite(toy(1)), 4, 1, resample_at=b"b")
    with pytest.raises(TypeError, match="resample_at must be bytes, str or several of them, got 3"):
        await smc(finite(toy(1)), 4, resample_at=3)
