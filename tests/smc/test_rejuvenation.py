"""Rejuvenation keeps the target of a step, a wrong acceptance does not."""

import itertools
import math

import numpy as np
import pytest

from genlm_bytes_smc.constraints import ByteRegex, FiniteSet
from genlm_bytes_smc.smc import Particles, Suffix, reading, smc
from genlm_bytes_smc.smc.frontier import Frontier
from genlm_bytes_smc.smc.plan import make_plan
from tests.smc.invariance import LEAST, exact_draws, p_value
from tests.smc.worlds import (
    EXACT,
    LONGEST,
    RANDOM,
    TOPK,
    estimates,
    exact_weights,
    finite,
    same,
    toy,
)

STEP = 3  # the step whose target is looked at: texts of 3 bytes, and whole ones of at most 2
SHORT = [bytes(t) for k in range(STEP) for t in itertools.product(b"abc", repeat=k)]
LONG = [bytes(t) for t in itertools.product(b"abc", repeat=STEP)]


def liked(text):
    return 0.8 * text.count(b"a")


async def target_of_step(llm, critic):
    """Weights of what a particle can be after STEP bytes: (text, whether it has ended)."""
    spelled = [[bytes([b]) for b in t] for t in SHORT], [[bytes([b]) for b in t] for t in LONG]
    whole, going = await llm.batch_complete(spelled[0]), await llm.batch_prefix(spelled[1])
    judge = (lambda t: math.exp(liked(t))) if critic else (lambda t: 1.0)
    out = {(t, True): math.exp(w) * judge(t) for t, w in zip(SHORT, whole, strict=True)}
    out |= {(t, False): math.exp(w) for t, w in zip(LONG, going, strict=True)}
    return {k: w for k, w in out.items() if w > 0}


def particles_at(states):
    """Particles of equal weight with these texts; the rows of `text` are STEP bytes wide."""
    first = Particles.first(len(states), 0.0)
    text = np.zeros((len(states), STEP), dtype=np.uint8)
    for i, (t, _) in enumerate(states):
        text[i, : len(t)] = list(t)
    return first._replace(
        text=text,
        length=np.array([len(t) for t, _ in states]),
        ended=np.array([ended for _, ended in states]),
    )


async def moved(target, states, suffix, **options):
    """The states after `suffix` has moved them, and how many moved."""
    plan = make_plan(target, len(states), 0.5, LONGEST, rejuvenate=suffix, **options)
    particles = particles_at(states)
    frontier = await Frontier.start(plan, particles, [plan.beam_seed])
    rng = np.random.default_rng(7)
    particles, frontier, n = await reading.rejuvenate(particles, frontier, STEP, rng)
    texts = particles.texts()
    lanes = frontier.lane_of.tolist()
    going = {(lane, text) for lane, text in zip(lanes, texts, strict=True) if lane >= 0}
    assert [lane >= 0 for lane in lanes] == particles.active.tolist()
    assert len(going) == frontier.size  # equal texts, and only they, share a lane
    return list(zip(texts, particles.ended.tolist(), strict=True)), n


KINDS = {
    "own row": {},
    "another model proposes": {"proposal": toy(seed=5, sharpness=0.5)},
    "a critic": {"critic": lambda text: liked(text)},
}


@pytest.mark.parametrize("suffix", [Suffix(1), Suffix(2), Suffix(None, sweeps=2)], ids=str)
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("params", [EXACT, TOPK, RANDOM], ids=["exact", "topk", "unbiased"])
async def test_moves_leave_the_target_of_a_step_as_it_is(suffix, kind, params):
    llm = toy(seed=2, params=params, sharpness=0.5)
    weights = await target_of_step(llm, kind == "a critic")
    before = exact_draws(weights, 4000, seed=3)
    after, n = await moved(llm, before, suffix, **KINDS[kind])
    assert n > 400  # of 4000: enough for a wrong ratio to show
    assert p_value(after, weights) > LEAST


async def test_texts_that_a_condition_ends_are_moved_too():
    """With `terminate_when` a text's end is no symbol of its own."""
    llm = toy(seed=2, sharpness=0.5)

    def stop(text):
        return text.endswith(b"b")

    stems = [bytes(t) for k in range(STEP) for t in itertools.product(b"ac", repeat=k)]
    whole = await llm.batch_complete(stems)
    stopped = await llm.batch_prefix([t + b"b" for t in stems])
    longest = [bytes(t) for t in itertools.product(b"ac", repeat=STEP)]
    going = await llm.batch_prefix(longest)
    weights = {(t, True): math.exp(w) for t, w in zip(stems, whole, strict=True)}
    weights |= {(t + b"b", True): math.exp(w) for t, w in zip(stems, stopped, strict=True)}
    weights |= {(t, False): math.exp(w) for t, w in zip(longest, going, strict=True)}
    before = exact_draws(weights, 4000, seed=3)
    for suffix in (Suffix(2), Suffix(None, sweeps=2)):
        after, n = await moved(llm, before, suffix, terminate_when=stop)
        assert n > 400
        assert p_value(after, weights) > LEAST


@pytest.mark.parametrize("mistake", ["always", "no window", "upside down"])
async def test_a_wrong_acceptance_is_noticed(monkeypatch, mistake):
    llm, other = toy(seed=2, sharpness=0.5), toy(seed=5, sharpness=0.5)
    weights = await target_of_step(llm, False)
    right = reading._log_ratio

    def wrong(suffix, walk, cut):
        if mistake == "always":
            return np.zeros(len(cut))
        if mistake == "no window":
            n = len(cut)
            return walk.particles.log_weights[n:] - walk.particles.log_weights[:n]
        return -right(suffix, walk, cut)

    monkeypatch.setattr(reading, "_log_ratio", wrong)
    before = exact_draws(weights, 4000, seed=3)
    after, _ = await moved(llm, before, Suffix(None, sweeps=3), proposal=other)
    assert p_value(after, weights) < LEAST


@pytest.mark.parametrize("share", [True, False])
async def test_the_estimate_stays_unbiased(share):
    llm = toy(seed=9, params=RANDOM)
    truth = sum(exact_weights(llm).values())
    values = []
    for seed in range(100):
        options = {"rejuvenate": Suffix(4), "share_beams": share, "beam_seed": seed}
        values.append((await estimates(finite(llm), 1, n=4, ess=1.0, first=seed, **options)).mean)
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert abs(np.mean(values) - truth) < 4 * error, (np.mean(values), error, truth)


async def test_a_collapsed_population_has_many_texts_again():
    target = toy(seed=3, sharpness=0.3) * ByteRegex("[abc]{7}")
    plain = await smc(target, 40, 1.0, 7, seed=2, resampling_method="multinomial")
    moves = {"rejuvenate": Suffix(7, sweeps=3)}
    lively = await smc(target, 40, 1.0, 7, seed=2, resampling_method="multinomial", **moves)
    assert len(set(lively.texts)) > len(set(plain.texts))
    assert any(i.moved for i in lively.history)
    assert all((i.moved is None) == (i.ancestors is None) for i in lively.history)


async def test_runs_with_moves_can_be_resumed_and_repeated():
    target = toy(params=RANDOM) * ByteRegex("(a[bc]|b[ca])*[ab]?")
    for share in (True, False):
        options = {"rejuvenate": Suffix(3), "share_beams": share}
        whole = await smc(target, 12, 0.9, 8, seed=3, **options)
        part = await smc(target, 12, 0.9, 4, seed=3, **options)
        assert any(i.moved for i in whole.history)
        assert same(await smc(target, 12, 0.9, 8, resume=part, **options), whole)
        assert same(await smc(target, 12, 0.9, 8, seed=3, **options), whole)


async def test_refusals():
    target = finite(toy())
    with pytest.raises(TypeError, match="rejuvenate must be a Suffix, got 3"):
        await smc(target, 2, rejuvenate=3)
    with pytest.raises(ValueError, match="longest of a Suffix must be at least 1, got 0"):
        Suffix(0)
    with pytest.raises(TypeError, match=r"sweeps of a Suffix must be an integer, got 1\.5"):
        Suffix(3, sweeps=1.5)
    with pytest.raises(ValueError, match="record=True notes"):
        await smc(target, 2, rejuvenate=Suffix(), record=True)


async def test_moves_where_every_text_is_over_before_the_step():
    """Resampled particles may all have ended, and their proposals end early too."""
    target = toy() * FiniteSet([b"a", b"bcccccc"])
    options = {"rejuvenate": Suffix(1), "resampling_method": "multinomial", "progress": False}
    for seed in range(20):
        result = await smc(target, 4, 1.0, 8, seed=seed, **options)
        if set(result.texts) == {b"a"} and len(result.history) > 3:
            return
    raise AssertionError("no run came to that")
