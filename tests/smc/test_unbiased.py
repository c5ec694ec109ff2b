"""exp(log_ml) averages to the exact value over a thousand runs, however the run is made.

The settings below are an orthogonal selection, not the full product: every pair of beam width,
threshold, scheme, proposal and sharing of beams that can matter together stands in some row.
"""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from genlm_bytes_smc import BeamParams, ByteLanes
from genlm_bytes_smc.beam import steps_numba
from genlm_bytes_smc.beam.model import byte_model
from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import RESAMPLING, Rollout, reading, smc, smc_repeat
from tests.smc.worlds import (
    EXACT,
    FREE,
    LONGEST,
    RANDOM,
    TOPK,
    estimates,
    exact_weights,
    finite,
    same,
    toy,
)
from tests.toys import EOS_TOKEN, Enumeration, ToyLM

RUNS = 1000
SCHEMES = ["systematic", "stratified", "residual", "multinomial"]


def settings():
    """(K, threshold, scheme, proposal, shared): K and threshold fully crossed."""
    pairs = itertools.product((1, 2, 5), (0.0, 0.3, 0.7))
    for i, (k, threshold) in enumerate(pairs):
        for j, shared in enumerate((True, False)):
            yield k, threshold, SCHEMES[(i + j) % 4], (j + i // 4) % 2 == 1, shared


def mean_and_error(runs):
    values = np.exp(runs.log_mls)
    return values.mean(), values.std(ddof=1) / math.sqrt(len(values))


async def check(target, truth, n=4, ess=0.7, max_bytes=LONGEST, runs=RUNS, **options):
    """Assert that the runs' mean is the truth within four errors; return their spread."""
    found = await smc_repeat(target, n, ess, max_bytes, seeds=runs, at_once=runs, **options)
    mean, error = mean_and_error(found)
    assert abs(mean - truth) <= 4 * error + 1e-12 * truth, (mean, error, truth)
    return error * math.sqrt(runs) / truth


def test_the_settings_hold_every_pair_that_matters():
    rows = list(settings())
    for places, values in [
        ((0, 2), (1, 2, 5)),
        ((2, 4), SCHEMES),
        ((2, 3), SCHEMES),
        ((0, 3), (1, 2, 5)),
    ]:
        found = {tuple(row[p] for p in places) for row in rows}
        others = {row[places[1]] for row in rows}
        assert found == set(itertools.product(values, others)), places
    assert set(SCHEMES) == set(RESAMPLING)


@pytest.mark.parametrize(("k", "threshold", "scheme", "proposes", "shared"), list(settings()))
async def test_every_way_to_run_is_unbiased_for_the_exact_model(
    k, threshold, scheme, proposes, shared
):
    params = dataclasses.replace(RANDOM, K=k, prune_threshold=threshold)
    llm = toy(seed=9, params=params, sharpness=0.7)
    truth = sum(exact_weights(llm).values())
    options = {"proposal": finite(toy(seed=5, sharpness=0.7))} if proposes else {}
    spread = await check(
        finite(llm), truth, resampling_method=scheme, share_beams=shared, **options
    )
    assert spread > 0.05 or k == 5  # an estimate that never varies proves nothing


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_exact_beams_with_every_scheme(scheme):
    llm = toy()
    await check(
        finite(llm), sum(exact_weights(llm).values()), n=3, ess=1.0, resampling_method=scheme
    )


@pytest.mark.parametrize("k", [1, 2])
async def test_one_particle_is_enough(k):
    llm = toy(seed=9, params=dataclasses.replace(RANDOM, K=k))
    await check(finite(llm), sum(exact_weights(llm).values()), n=1)


TINY_TEXTS = [b"the", b"and", b"def", b"for", b"not", b"The"]


async def tiny_truth(tiny, known={}):  # noqa: B006 - kept from test to test
    """The bundled model's weight of the texts, by beams that keep every candidate."""
    if known:
        return known["truth"]
    exact = ByteLLM(tiny, BeamParams(K=None, prune_threshold=0.0))
    weights = await exact.batch_complete([[bytes([b]) for b in t] for t in TINY_TEXTS])
    known["truth"] = float(np.exp(weights).sum())
    return known["truth"]


@pytest.mark.parametrize(
    ("k", "threshold", "shared"), [(1, 0.2, True), (2, 0.5, False), (5, 0.5, True), (1, 0.0, False)]
)
async def test_the_bundled_model_with_a_finite_constraint(tiny, k, threshold, shared):
    params = BeamParams(K=k, prune_threshold=threshold, prune="unbiased")
    target = finite(ByteLLM(tiny, params), TINY_TEXTS)
    await check(target, await tiny_truth(tiny), n=6, max_bytes=3, share_beams=shared)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("mistake", ["weight", "beam", "resampling"])
async def test_a_wrong_weight_is_noticed(monkeypatch, mistake, shared):
    """A tenth of a nat too much a step; a beam that forgets the weight c; the ancestors' law."""
    threshold = 0.0 if mistake == "beam" else 0.3
    params = dataclasses.replace(RANDOM, K=1, prune_threshold=threshold)
    llm = toy(seed=9, params=params, sharpness=0.7)
    truth = sum(exact_weights(llm).values())
    if mistake == "weight":

        def wrong(*args):
            symbols, log_weights = draw(*args)
            return symbols, log_weights + 0.1

        draw = reading.draw
        monkeypatch.setattr(reading, "draw", wrong)
    elif mistake == "beam":
        # Top-K's step, with the keys that the random one would have.
        monkeypatch.setattr(
            steps_numba, "step", lambda *args, step=steps_numba.step: step(*args[:-1], False)
        )
    else:

        def careless(weights, rng):
            return rng.choice(np.flatnonzero(weights), size=len(weights))

        monkeypatch.setitem(RESAMPLING, "systematic", careless)
    options = {"seeds": RUNS, "at_once": RUNS, "share_beams": shared}
    mean, error = mean_and_error(await smc_repeat(finite(llm), 4, 1.0, LONGEST, **options))
    assert abs(mean - truth) > 4 * error, (mean, error, truth)


async def test_the_joint_with_the_prompt_is_unbiased_and_the_ratio_is_not():
    lm = ToyLM(seed=0, sharpness=1.0)
    params = dataclasses.replace(RANDOM, K=1, prune_threshold=0.0)
    exact = Enumeration(lm, frozenset([EOS_TOKEN]))
    prompt, text, n = b"abcab", b"ba", 20_000
    lanes = await ByteLanes.start(byte_model(lm), params, n, lane_seeds=range(n))
    lanes = await lanes.as_prompt()
    for byte in prompt:
        lanes = await lanes.step(np.full(n, byte))
    lanes = await lanes.as_text()
    given = np.exp(lanes.log_z)
    for byte in text:
        lanes = await lanes.step(np.full(n, byte))
    joint = np.exp(lanes.log_z)

    def error(values, truth):
        return abs(values.mean() - truth) / (values.std(ddof=1) / math.sqrt(n))

    assert error(given, exact.prefix(prompt)) < 4
    assert error(joint, exact.prefix(prompt + text)) < 4
    ratio = (joint / given)[given > 0]
    assert error(ratio, exact.prefix(prompt + text) / exact.prefix(prompt)) > 4


# -- runs side by side -----------------------------------------------------------------

ALONE = {
    "plain": {},
    "critic": {"critic": lambda text: -0.3 * text.count(b"a"), "record": True},
    "proposal": {"proposal": toy(seed=5) * ByteRegex(FREE)},
    "multinomial": {"resampling_method": "multinomial", "rollout": 2},
    "own beams": {"share_beams": False},
}


@pytest.mark.filterwarnings("ignore:the proposal gives weight zero")
@pytest.mark.parametrize("params", [TOPK, RANDOM], ids=["topk", "unbiased"])
@pytest.mark.parametrize("name", list(ALONE))
async def test_runs_side_by_side_are_those_of_smc(name, params, monkeypatch):
    if name == "own beams" and not params.unbiased:
        return
    target = toy(params=params, sharpness=2.0) * ByteRegex(FREE)
    options = ALONE[name]
    many = await smc_repeat(target, 6, 0.8, 6, seeds=12, at_once=5, **options)
    monkeypatch.setattr("genlm_bytes_smc.smc.many.can_batch", lambda plan: False)
    alone = await smc_repeat(target, 6, 0.8, 6, seeds=12, **options)
    assert any(len(r.ancestry) for r in alone.results)
    for a, b in zip(many.results, alone.results, strict=True):
        assert same(a, b)
        assert (a.seed, a.state.step, a.resumable.step) == (b.seed, b.state.step, b.resumable.step)
        if a.log_ml > -np.inf:
            one = await smc(target, 6, 0.8, 9, resume=a, **options)
            assert same(one, await smc(target, 6, 0.8, 9, resume=b, **options))


async def test_runs_side_by_side_share_forwards_and_equal_texts():
    llm = toy(params=TOPK)
    await llm.prefix([])
    runs = await smc_repeat(llm * ByteRegex(FREE), 8, 0.5, 6, seeds=50, at_once=50)
    steps = max(len(r.history) for r in runs.results)
    assert llm.model.engine.counts.forwards <= 2 * steps  # and not as many a run


# -- beams of one's own ----------------------------------------------------------------


async def test_with_beams_of_their_own_equal_texts_differ_and_copies_draw_afresh():
    target = toy(seed=9, params=RANDOM, sharpness=0.3) * ByteRegex("abcab")
    apart = await smc(target, 40, 0.0, 6, share_beams=False, seed=1)
    together = await smc(target, 40, 0.0, 6, seed=1)
    assert len(set(together.log_weights)) == 1
    assert len(set(apart.log_weights)) > 5
    again = await smc(target, 40, 1.0, 6, share_beams=False, seed=1)
    assert min(len(set(ancestors)) for _, ancestors in again.ancestry) < 40
    salt = again.state.particles.salt
    assert len(np.unique(salt[:, -1])) == 40


async def test_the_error_of_one_run_sees_beams_of_their_own():
    """Shared beams vary between runs unseen; with their own, error and spread agree."""
    target = finite(toy(seed=9, params=RANDOM, sharpness=0.3))
    spread, seen = {}, {}
    for shared in (True, False):
        options = {"share_beams": shared, "resampling_method": "multinomial"}
        runs = await smc_repeat(target, 300, 0.5, LONGEST, seeds=100, at_once=25, **options)
        values = np.exp(runs.log_mls)
        spread[shared] = values.var(ddof=1) / values.mean() ** 2
        variances = [np.exp(2 * r.log_ml) * r.ml_relative_variance for r in runs.results]
        seen[shared] = np.mean(variances) / values.mean() ** 2
    assert seen[True] < 0.6 * spread[True]
    assert seen[False] == pytest.approx(spread[False], rel=0.45)


async def test_own_beams_need_random_ones():
    with pytest.raises(ValueError, match=r'share_beams=False needs .*prune="unbiased"'):
        await smc(finite(toy(params=EXACT)), 4, share_beams=False)


# -- roll-outs -------------------------------------------------------------------------

ROLLOUTS = [Rollout(2, 3), Rollout(10, 2)]


@pytest.mark.parametrize("rollout", ROLLOUTS, ids=str)
@pytest.mark.parametrize("params", [EXACT, RANDOM], ids=["exact", "unbiased"])
async def test_roll_outs_are_unbiased(rollout, params):
    llm = toy(seed=4, params=params)
    truth = sum(exact_weights(llm).values())
    critic = {"critic": lambda text: 0.7 * len(text)} if params is EXACT else {}
    if critic:
        truth = sum(w * math.exp(0.7 * len(t)) for t, w in exact_weights(llm).items())
    values = []
    for seed in range(80):
        options = {"rollout": rollout, "beam_seed": seed, **critic}
        values.append((await estimates(finite(llm), 1, n=3, ess=1.0, first=seed, **options)).mean)
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert abs(np.mean(values) - truth) < 4 * error, (np.mean(values), error, truth)


@pytest.mark.parametrize("n_bytes", [2, 3])
async def test_weighing_every_few_bytes_is_unbiased(n_bytes):
    llm = toy(seed=4, params=RANDOM)
    await check(finite(llm), sum(exact_weights(llm).values()), ess=1.0, rollout=n_bytes)


def test_a_candidate_is_picked_by_weight_and_weighs_the_mean():
    with np.errstate(divide="ignore"):
        log_weights = np.log(np.array([0.5, 0.0, 1.5, 0.0, 0.0, 0.0] * 4000))
    picked, mean = Rollout(1, 3).pick(log_weights, np.random.default_rng(0))
    assert np.allclose(np.exp(mean), [2 / 3, 0.0] * 4000)
    which = picked[::2] % 3
    assert set(which) == {0, 2}
    assert abs((which == 2).mean() - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 4000)


async def test_a_wrong_pick_is_noticed(monkeypatch):
    llm = toy(seed=4)
    truth = sum(exact_weights(llm).values())

    right = Rollout.pick

    def total(self, log_weights, rng):  # of the candidates' weights, not their mean
        picked, mean = right(self, log_weights, rng)
        return picked, mean + math.log(self.candidates)

    monkeypatch.setattr(Rollout, "pick", total)
    found = await estimates(finite(llm), 60, n=3, ess=1.0, rollout=Rollout(2, 3))
    assert not found.agree(truth)


async def test_roll_outs_resample_at_their_ends_only_and_resume():
    target = toy(params=RANDOM) * ByteRegex(FREE)
    for rollout in (3, Rollout(3, 4)):
        options = {"rollout": rollout, "share_beams": False}
        whole = await smc(target, 8, 1.0, 8, seed=2, **options)
        assert whole.size == 8
        assert whole.ancestry
        assert all(step % 3 == 2 for step, _ in whole.ancestry)
        for stop in (2, 3, 4):
            part = await smc(target, 8, 1.0, stop, seed=2, **options)
            assert same(await smc(target, 8, 1.0, 8, resume=part, **options), whole)


async def test_refusals():
    target = finite(toy())
    with pytest.raises(ValueError, match="n_bytes of a roll-out must be at least 1, got 0"):
        await smc(target, 2, rollout=0)
    with pytest.raises(TypeError, match="n_bytes of a roll-out must be an integer, got 'x'"):
        await smc(target, 2, rollout="x")
    with pytest.raises(ValueError, match="candidates of a roll-out must be at least 1, got 0"):
        Rollout(3, 0)
