"""A draft proposes blocks of bytes and the target's models weigh them whole."""

import dataclasses
import math

import numpy as np
import pytest
from genlm.control.potential.base import Potential

from genlm_bytes_smc import BeamParams, load_model
from genlm_bytes_smc.alphabet import BYTES
from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import Rollout, smc, smc_repeat
from genlm_bytes_smc.smc.critics import Judge
from tests.smc.test_ensembles import DEFERRED, agrees, other, stepped
from tests.smc.worlds import (
    FREE,
    LONGEST,
    RANDOM,
    TEXTS,
    TOPK,
    exact_weights,
    finite,
    same,
    total_variation,
    toy,
)
from tests.toys import EOS_TOKEN, Enumeration

RUNS = 1000
NARROW = dataclasses.replace(TOPK, K=4, prune="deferred")


async def repeated(target, draft, runs=RUNS, n=4, **options):
    return await smc_repeat(
        target, n, 0.7, LONGEST, seeds=runs, at_once=runs, draft=draft, **options
    )


@pytest.mark.parametrize("block", [1, 2, 3, 16])
async def test_blocks_are_unbiased(block):
    """The mean of exp(log_ml) is the exact sum, for blocks that end within, at and after texts."""
    llm = toy(1)
    truth = sum(exact_weights(llm).values())
    runs = await repeated(finite(llm), other(), block=block)
    assert agrees(runs, truth)
    assert runs.log_ml_error > 0.002  # an estimate that never varies proves nothing


async def test_two_models_a_power_and_a_soft_factor():
    """All factors with language models are weighed at the ends, the others byte by byte."""
    a, b = toy(1), toy(7)
    soft = ByteRegex("a.*") ** 0.5
    x, y = exact_weights(a), exact_weights(b)
    texts = [t for t in TEXTS if t[:1] == b"a"]
    truth = sum(x[t] ** 0.7 * y[t] for t in texts)
    runs = await repeated(a**0.7 * finite(b) * soft, other(), block=2)
    assert agrees(runs, truth)


class Lending(Potential):
    """Lends 0.4 nats a byte to texts under way, and takes 0.7 a byte in the end."""

    def __init__(self):
        super().__init__(BYTES)

    async def prefix(self, context):
        return 0.4 * len(context)

    async def complete(self, context):
        return -0.7 * len(context)


@pytest.mark.parametrize("block", [1, 2])
async def test_a_critic_of_prefixes_beside_a_draft(block):
    """What the critic and the judge of the draft lend to a text is all taken back."""
    llm = toy(1)
    truth = sum(p * math.exp(-0.7 * len(t)) for t, p in exact_weights(llm).items())
    runs = await repeated(finite(llm), other(), block=block, critic=Lending())
    assert agrees(runs, truth)


async def test_texts_that_are_terminated_keep_their_weight_as_prefixes():
    """A text ended by terminate_when has the model's prefix weight, one that ended the whole."""
    llm = toy(1)
    exact = Enumeration(llm.llm.llm, frozenset([EOS_TOKEN]))
    constraint = ByteRegex("(a|c|ba)*b?")
    words = ["a", "c", "ba"]
    opened = {w: len(w) for w in words} | {"": 0}
    for _ in range(3):
        opened |= {w + v: len(w + v) for w in words for v in opened if len(w + v) <= 3}
    stop = lambda text: text.endswith(b"cc")  # noqa: E731
    texts = {t.encode() for t in opened} | {(t + "b").encode() for t in opened}
    truth = 0.0
    for t in (t for t in texts if len(t) <= 3):
        if any(stop(t[:k]) for k in range(1, len(t))):
            continue
        truth += exact.prefix(t) if stop(t) else exact.ended(t)
    for block in (1, 2, 16):
        runs = await smc_repeat(
            llm * constraint,
            4,
            0.7,
            3,
            seeds=RUNS,
            at_once=RUNS,
            draft=other(),
            block=block,
            terminate_when=stop,
        )
        assert agrees(runs, truth), block


async def test_roll_outs_of_several_candidates():
    """Of three continuations by the draft the target keeps one by weight."""
    llm, values = toy(1), []
    for seed in range(150):
        result = await smc(
            finite(llm), 3, 1.0, LONGEST, seed=seed, draft=other(), rollout=Rollout(2, 3)
        )
        values.append(math.exp(result.log_ml))
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert abs(np.mean(values) - sum(exact_weights(llm).values())) < 4 * error


async def test_deferred_models_are_weighed_by_what_they_read():
    """Target and draft with deferred beams: the target's own weights of whole texts count."""
    llm = toy(1, DEFERRED)
    weights = await llm.batch_complete([[bytes([b]) for b in t] for t in TEXTS])
    runs = await repeated(finite(llm), other(7, DEFERRED), block=3)
    proposable = [w > 0 for w in (await stepped(other(7, DEFERRED)))[0].values()]
    assert agrees(runs, float(np.exp(weights)[proposable].sum()))


async def test_the_posterior_is_that_of_the_target():
    """Many particles find the exact posterior, not the draft's."""
    llm = toy(1)
    flat = toy(1, sharpness=0.4)
    one = await smc(finite(llm), 4000, 0.5, LONGEST, seed=1, draft=flat, block=2)
    assert total_variation(one.byte_posterior, exact_weights(llm)) < 0.04
    assert total_variation(one.byte_posterior, exact_weights(flat)) > 0.1


async def test_a_wrong_weight_is_noticed(monkeypatch):
    """A tenth of a nat too much for a whole text makes the estimate wrong."""
    llm = toy(1)
    truth = sum(exact_weights(llm).values())
    right = Judge._scores

    async def wrong(self, texts, whole):
        return await right(self, texts, whole) + 0.1 * whole

    monkeypatch.setattr(Judge, "_scores", wrong)
    assert not agrees(await repeated(finite(llm), toy(1), block=2), truth)


async def test_the_target_reads_blocks_in_few_forwards(tiny):
    """The bundled model reads a block of all particles in two or three forwards; byte by byte it
    takes half a forward a byte and more."""
    prompt = b"Once upon a time there was a "
    draft = ByteLLM(load_model("tiny"), BeamParams(K=2), prompt=prompt)
    counts, made = tiny.counts, {}
    for name, options in {"plain": {}, "draft": {"draft": draft, "block": 16}}.items():
        llm = ByteLLM(tiny, prompt=prompt)
        await llm.logw_next(b"")
        forwards, rows = counts.forwards, counts.rows
        await smc(llm * ByteRegex("[a-z ]{48}"), 8, 0.5, 48, seed=0, **options)
        made[name] = counts.forwards - forwards, counts.rows - rows
    assert made["plain"][0] >= 24
    assert made["draft"][0] <= 9
    assert made["draft"][1] < 2 * made["plain"][1]


async def test_its_cost_counts_the_target_and_the_draft():
    """`result.forwards` and `rows` are those of both engines."""
    llm, draft = toy(1, NARROW), toy(2)
    for model in (llm, draft):
        await model.logw_next(b"")
    engines = [m.model.engine for m in (llm, draft)]
    before = [(e.counts.forwards, e.counts.rows) for e in engines]
    result = await smc(llm * ByteRegex("[abc]{12}"), 4, 0.5, 12, seed=0, draft=draft, block=4)
    after = [(e.counts.forwards, e.counts.rows) for e in engines]
    made = np.subtract(after, before).sum(axis=0)
    assert [result.forwards, result.rows] == made.tolist()


async def test_runs_side_by_side_and_resumed():
    """In a batch and after a stop inside a block, a run is the one it would have been."""
    target = toy(1) * ByteRegex(FREE)
    options = {"draft": other(), "block": 3}
    many = await smc_repeat(target, 6, 0.8, 8, seeds=4, at_once=4, **options)
    for seed, run in enumerate(many.results):
        assert same(run, await smc(target, 6, 0.8, 8, seed=seed, **options))
    whole = await smc(target, 6, 0.8, 8, seed=1, **options)
    for stop in (2, 3, 4):
        part = await smc(target, 6, 0.8, stop, seed=1, **options)
        assert same(await smc(target, 6, 0.8, 8, resume=part, **options), whole)


async def test_a_critic_is_asked_where_roll_outs_end():
    """Between two resamplings nobody looks at weights, so no prefix is scored there."""
    critic, asked = toy(7), []
    right = critic.batch_prefix

    async def counted(texts):
        asked.extend(len(t) for t in texts)
        return await right(texts)

    critic.batch_prefix = counted
    await smc(toy(1) * ByteRegex("[abc]{9}"), 6, 1.0, 9, seed=0, critic=critic, rollout=3)
    assert set(asked) == {3, 6, 9}
    assert max(asked.count(k) for k in (3, 6, 9)) <= 6


async def test_refusals():
    """What does not go with a draft is named before any work."""
    target = finite(toy(1))
    with pytest.raises(TypeError, match="a genlm-control Potential over bytes is due, got str"):
        await smc(target, 2, draft="tiny")
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        await smc(target, 2, draft=other(), block=0)
    with pytest.raises(ValueError, match="so proposal= has no place"):
        await smc(target, 2, draft=other(), proposal=other())
    with pytest.raises(ValueError, match=r'with draft= none may be random \(prune="unbiased"\)'):
        await smc(finite(toy(1, RANDOM)), 2, draft=other())
