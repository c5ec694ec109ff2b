"""Many runs at once, repeated runs, and genlm-control's own loop on the same target."""

import asyncio
import math

import numpy as np
import pytest
import torch
from genlm.control.potential.base import Potential
from genlm.control.potential.built_in import BoolFSA
from genlm.control.sampler.token import DirectTokenSampler

from genlm_bytes_smc import BeamParams, as_engine, load_model
from genlm_bytes_smc.alphabet import BYTES, TABLES
from genlm_bytes_smc.beam.model import byte_model
from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import AllParticlesDeadError, smc, smc_many, smc_repeat
from tests.constraints.cases import CASES
from tests.smc.worlds import (
    FREE,
    LONGEST,
    PATTERN,
    RANDOM,
    TOPK,
    Estimates,
    exact_weights,
    finite,
    same,
    total_variation,
    toy,
)
from tests.toys import EOS_TOKEN, TOY_TOKENS, ToyLM


async def test_many_targets_are_the_single_runs():
    llm = toy(params=TOPK)
    targets = [llm.with_prompt(p) * ByteRegex(FREE) for p in (b"", b"a", b"ba", b"cab")]
    many = await smc_many(targets, 8, 0.7, 6, seed=5)
    for i, (target, result) in enumerate(zip(targets, many, strict=True)):
        assert same(result, await smc(target, 8, 0.7, 6, seed=5 + i))
    assert await smc_many([], 8) == []


async def test_many_targets_share_forwards():
    def fresh():
        llm = toy(params=TOPK)
        return llm, [
            llm.with_prompt(p) * ByteRegex("[abc]{5}") for p in (b"a", b"ba", b"cab", b"c")
        ]

    llm, targets = fresh()
    await smc_many(targets, 6, 0.7, 6)
    together = llm.model.engine.counts.forwards
    llm, targets = fresh()
    for i, target in enumerate(targets):
        await smc(target, 6, 0.7, 6, seed=i)
    assert together < 0.6 * llm.model.engine.counts.forwards


async def test_one_dead_run_among_many():
    llm = toy()
    targets = [finite(llm), llm * ByteRegex("abx"), finite(llm)]
    before = asyncio.all_tasks()
    with pytest.raises(AllParticlesDeadError):
        await smc_many(targets, 5)
    assert asyncio.all_tasks() == before
    results = await smc_many(targets, 5, dead="return")
    assert [r.log_ml == -math.inf for r in results] == [False, True, False]
    with pytest.raises(ValueError, match="dead must be"):
        await smc_many(targets, 5, dead="forget")
    with pytest.raises(ValueError, match="resume one of them with smc"):
        await smc_many(targets, 5, resume=results[0])
    with pytest.raises(ValueError, match="needs a byte language model"):
        await smc_many([finite(llm), ByteRegex("a")], 5)


async def test_repeats_pool_runs_by_their_evidence():
    llm = toy()
    exact = exact_weights(llm)
    runs = await smc_repeat(finite(llm), 4, 0.5, LONGEST, seeds=[3, 1, 4])
    singles = [await smc(finite(llm), 4, 0.5, LONGEST, seed=s) for s in (3, 1, 4)]
    assert all(same(a, b) for a, b in zip(runs.results, singles, strict=True))
    z = np.exp([r.log_ml for r in singles])
    assert math.exp(runs.log_ml) == pytest.approx(z.mean())
    assert runs.log_ml_error == pytest.approx(z.std(ddof=1) / math.sqrt(3) / z.mean())
    text = singles[0].texts[0]
    pooled = sum(w * r.byte_posterior[text] for w, r in zip(z / z.sum(), singles, strict=True))
    assert runs.byte_posterior[text] == pytest.approx(pooled)
    assert "runs: 3" in str(runs)
    many = await smc_repeat(finite(llm), 4, 0.5, LONGEST, seeds=100)
    assert abs(many.log_ml - math.log(sum(exact.values()))) < 4 * many.log_ml_error


async def test_a_dead_run_counts_as_zero():
    target = toy(seed=2) * ByteRegex("cabc")
    runs = await smc_repeat(target, 1, 0, 4, seeds=40, critic=lambda t: len(t) == 4)
    alive = np.exp(runs.log_mls)
    assert math.exp(runs.log_ml) == pytest.approx(alive.mean())
    unlikely = toy(seed=2) * ByteRegex("[abc]{2}")
    runs = await smc_repeat(unlikely, 1, 0, 4, seeds=60, critic=lambda t: t == b"ab")
    z = np.exp(runs.log_mls)
    assert 0 < (z == 0).sum() < 60
    truth = exact_weights(toy(seed=2), [b"ab"])[b"ab"]
    assert abs(z.mean() - truth) < 4 * z.std(ddof=1) / math.sqrt(60)


async def test_repeats_seed_the_beams_too():
    llm = toy(seed=9, params=RANDOM)
    target = llm * ByteRegex("abab")  # one text: nothing is random but the beams
    runs = await smc_repeat(target, 3, seeds=20)
    assert len(set(runs.log_mls.tolist())) > 5
    fixed = await smc_repeat(target, 3, seeds=20, beam_seed=1)
    assert len(set(fixed.log_mls.tolist())) == 1


@pytest.mark.parametrize("seeds", [0, [], [1, 1]])
async def test_bad_seeds(seeds):
    with pytest.raises(ValueError, match="seeds must be"):
        await smc_repeat(finite(toy()), 3, seeds=seeds)


# -- genlm-control on the same target --------------------------------------------------


async def theirs(target, runs, n, critic=None, max_tokens=LONGEST + 1):
    torch.manual_seed(0)
    np.random.seed(0)  # its resampling draws from the global generator
    values, results = [], []
    for _ in range(runs):
        sampler = DirectTokenSampler(target)
        r = await sampler.smc(
            n_particles=n, ess_threshold=0.5, max_tokens=max_tokens, critic=critic
        )
        results.append(r)
        values.append(math.exp(r.log_ml))
    return Estimates(values), results


@pytest.mark.parametrize("with_critic", [False, True])
async def test_genlm_control_finds_the_same(with_critic):
    llm = toy(params=TOPK)
    critic = toy(seed=7) ** 0.5 if with_critic else None
    target = finite(llm)
    other, results = await theirs(target, 50, 10, critic)
    mine = await smc_repeat(target, 10, 0.5, LONGEST, seeds=150, critic=critic)
    z = np.exp(mine.log_mls)
    error = math.hypot(other.error, z.std(ddof=1) / math.sqrt(len(z)))
    assert abs(z.mean() - other.mean) < 4 * error
    pooled: dict[bytes, float] = {}
    for r in results:
        for context, w in zip(r.contexts, np.exp(r.log_weights), strict=True):
            text = b"".join(context[:-1])
            pooled[text] = pooled.get(text, 0.0) + float(w)
    assert total_variation(mine.byte_posterior, pooled) < 0.15


async def test_genlm_control_ends_texts_at_the_same_limit():
    llm = toy(seed=8, params=TOPK)
    other, results = await theirs(llm, 40, 20, max_tokens=3)
    mine = await smc_repeat(llm, 20, 0.5, 2, seeds=80)
    assert max(len(c) for r in results for c in r.contexts) == 3
    assert max(map(len, mine.texts)) == 2
    z = np.exp(mine.log_mls)
    assert abs(z.mean() - other.mean) < 4 * math.hypot(other.error, z.std() / math.sqrt(len(z)))


async def test_a_context_potential_gives_the_same_run_as_a_vectorised_one():
    """genlm-control's automaton, coerced, and ByteRegex: equal seeds, equal particles."""
    llm = toy(params=TOPK)
    slow = llm * BoolFSA.from_regex(PATTERN).coerce(llm, f=b"".join, prune=False)
    a = await smc(slow, 12, 0.7, LONGEST, seed=4)
    b = await smc(finite(llm), 12, 0.7, LONGEST, seed=4)
    assert a.texts == b.texts
    assert a.log_weights == pytest.approx(b.log_weights)


class Hidden(Potential):
    """A potential of which only its answers about contexts are seen."""

    def __init__(self, inner):
        super().__init__(BYTES, tables=TABLES)
        self.inner = inner

    async def prefix(self, context):
        return await self.inner.prefix(context)

    async def complete(self, context):
        return await self.inner.complete(context)

    async def batch_logw_next(self, contexts):
        return await self.inner.batch_logw_next(contexts)


async def outcome(target, **options):
    """A run's result, dead or alive."""
    try:
        return await smc(target, 8, 0.6, 12, seed=4, **options)
    except AllParticlesDeadError as error:
        return error.result


@pytest.mark.parametrize("name", sorted(CASES))
async def test_every_constraint_as_states_contexts_and_critic(name):
    tokens = [bytes([b]) for b in range(256)] + [b"ab", b"12", EOS_TOKEN]
    params = BeamParams(K=None, eos_byte_strings=[EOS_TOKEN])
    llm = ByteLLM(as_engine(ToyLM(tokens, seed=5, sharpness=0.3)), params)
    constraint = CASES[name].make()
    a, b = await outcome(llm * constraint), await outcome(llm * Hidden(constraint))
    assert max(map(len, a.texts)) > 0
    assert a.texts == b.texts
    assert a.log_weights == pytest.approx(b.log_weights)
    judged = await outcome(llm * constraint**0.5, critic=constraint)
    alive = [t for t, w in zip(judged.texts, judged.log_weights, strict=True) if w > -math.inf]
    for text in set(alive):
        assert await constraint.complete(text) > -math.inf


async def test_the_byte_llm_as_contexts_gives_the_same_run_as_lanes():
    llm = toy(params=TOPK)
    a = await smc(Hidden(llm) * ByteRegex(FREE), 12, 0.7, 5, seed=4)
    b = await smc(llm * ByteRegex(FREE), 12, 0.7, 5, seed=4)
    assert a.texts == b.texts
    assert a.log_weights == pytest.approx(b.log_weights)


async def test_runs_side_by_side_in_little_memory_are_the_same():
    """Rows that one run evicts while another waits are made again, and nobody starves."""

    def targets(row_bytes):
        engine = as_engine(ToyLM(seed=1, sharpness=1.0))
        byte_model(engine, None, row_bytes)  # the first call sets the limit
        llm = ByteLLM(engine, TOPK, cache_size=1)
        return llm, [llm.with_prompt(p) * ByteRegex(FREE) for p in (b"", b"a", b"ba", b"cab")]

    roomy, wide = targets(1 << 24)
    tight, narrow = targets(8 * len(TOY_TOKENS) * 6)
    a = await smc_many(wide, 8, 0.7, 7, seed=5, critic=roomy**0.2)
    async with asyncio.timeout(60):
        b = await smc_many(narrow, 8, 0.7, 7, seed=5, critic=tight**0.2)
    for x, y in zip(a, b, strict=True):
        # Which sums are at hand depends on the memory, so the last digits may differ.
        assert x.texts == y.texts and np.array_equal(x.eve, y.eve)
        np.testing.assert_allclose(x.log_weights, y.log_weights, atol=1e-12)
        np.testing.assert_allclose(x.ess_path, y.ess_path, rtol=1e-12)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
async def test_a_gpu_makes_the_same_particles():
    runs = []
    for device in ("cpu", "cuda"):
        llm = ByteLLM(
            load_model("tiny", device=device, dtype="float64"),
            BeamParams(K=5, prune_threshold=0.05),
            prompt=b"Write to us at ",
        )
        target = llm * ByteRegex("[a-z]{2,6}@[a-z]{2,6}[.]com", device=device)
        runs.append(await smc(target, 16, 0.5, 20, seed=4))
    assert runs[0].texts == runs[1].texts
    assert runs[0].log_weights == pytest.approx(runs[1].log_weights, rel=1e-4)


async def test_runs_averaged_by_evidence_beat_equal_shares():
    """300 runs of 16 particles: equal shares are eight times as far from the enumerated law."""
    llm = toy(1, sharpness=2.0)
    truth = exact_weights(llm)
    runs = await smc_repeat(finite(llm), 16, 0.5, LONGEST, seeds=300, at_once=300)
    equal = dict.fromkeys(truth, 0.0)
    alive = [r for r in runs.results if r.log_ml > -np.inf]
    for run in alive:
        for text, p in run.byte_posterior.items():
            equal[text] += p / len(alive)
    assert total_variation(equal, truth) > 0.12
    assert total_variation(runs.byte_posterior, truth) < 0.03


@pytest.mark.parametrize("option", [{"progress": False}, {"resampling": "residual"}])
async def test_an_option_that_is_not_known_is_named(option):
    """The error names what there is, in place of a function inside."""
    (name,) = option
    for runs in (
        smc_repeat(finite(toy()), 2, 0.5, 3, seeds=2, **option),
        smc_many([finite(toy())], 2, 0.5, 3, **option),
    ):
        with pytest.raises(TypeError, match=f"one of proposal, .*resampling_method.*; got {name}"):
            await runs
