"""On the bundled model: three ways to sample against sums over every admitted text."""

import dataclasses
import math
import re

import llamppl
import numpy as np
import pytest
from genlm.control import EOS, SMC, direct_token_sampler

from genlm_bytes_smc import BeamParams, ByteContext, ByteLLM, ByteRegex
from genlm_bytes_smc.smc import smc_repeat
from tests.smc.worlds import total_variation

# What may stand at the end of a JSON record: texts that are cut into tokens in many ways.
VALUES = ["true", "false", "null", "1", "0", "12"]
TEXTS = [f"{value}{end}".encode() for value in VALUES for end in ("}", " }", "}\n", "},")]
PATTERN = "|".join(re.escape(t.decode()) for t in TEXTS)
PROMPT = b'{"id": 17, "ok": '
LONGEST = max(map(len, TEXTS))
BEAM = BeamParams(K=2, prune_threshold=0.02)
RANDOM = BeamParams(K=2, prune_threshold=0.02, prune="unbiased")


@pytest.fixture(scope="module")
def llm(tiny):
    """The beam model: what it serves is summed over all texts."""
    return ByteLLM(tiny, BEAM, prompt=PROMPT)


async def sums(llm):
    weights = np.exp(await llm.batch_complete(TEXTS))
    return dict(zip(TEXTS, weights.tolist(), strict=True))


def agrees(log_mls, truth):
    """Whether estimates average to the truth within four standard errors."""
    z = np.exp(np.array(log_mls)) / truth
    error = z.std(ddof=1) / math.sqrt(len(z))
    assert error < 0.25, "the check would see nothing"
    return abs(z.mean() - 1) < 4 * error


async def test_smc_on_the_beam_model(llm):
    served = await sums(llm)
    runs = await smc_repeat(llm * ByteRegex(PATTERN), 32, 0.5, LONGEST, seeds=200)
    assert agrees(runs.log_mls, sum(served.values()))
    assert total_variation(runs.byte_posterior, served) < 0.1


async def test_smc_with_random_beams_finds_the_exact_model(tiny, llm):
    everything = ByteLLM(tiny, BeamParams(K=20), prompt=PROMPT)  # as good as exact: see below
    wider = ByteLLM(tiny, BeamParams(K=40), prompt=PROMPT)
    exact = await sums(everything)
    assert sum((await sums(wider)).values()) == pytest.approx(sum(exact.values()), rel=1e-4)
    served = sum((await sums(llm)).values())
    assert abs(served / sum(exact.values()) - 1) > 0.005  # the pruned beam is not the model
    # Given the prompt an estimate is a ratio; here the prompt's own is close to the truth.
    random = ByteLLM(tiny, RANDOM, prompt=PROMPT)
    assert await random.prompt_weight() == pytest.approx(await wider.prompt_weight(), abs=0.01)
    runs = await smc_repeat(random * ByteRegex(PATTERN), 32, 0.5, LONGEST, seeds=200)
    assert agrees(runs.log_mls, sum(exact.values()))
    assert total_variation(runs.byte_posterior, exact) < 0.1


async def test_genlm_controls_smc(llm):
    np.random.seed(0)
    served = await sums(llm)
    smc = SMC(direct_token_sampler(llm * ByteRegex(PATTERN)))
    found = [await smc(16, 0.5, LONGEST + 1, resampling_method="systematic") for _ in range(100)]
    assert agrees([float(s.log_ml) for s in found], sum(served.values()))
    pooled: dict[bytes, float] = {}
    for sequences in found:
        for context, w in zip(sequences.contexts, sequences.log_weights, strict=True):
            text = b"".join(context[:-1])
            pooled[text] = pooled.get(text, 0.0) + math.exp(w)
    total = sum(pooled.values())
    assert total_variation({t: w / total for t, w in pooled.items()}, served) < 0.15


class Admitted(llamppl.Model):
    """Texts of the set, byte by byte."""

    def __init__(self, context):
        super().__init__()
        self.context = context

    async def step(self):
        read = bytes(self.context)
        longer = [t[len(read)] for t in TEXTS if t.startswith(read) and t != read]
        ends = [EOS] if read in TEXTS else []
        await self.observe(self.context.mask_dist(longer, ends), True)
        if await self.sample(self.context.next_byte()) is EOS:
            self.finish()


async def test_llamppl(llm):
    served = await sums(llm)
    log_mls, pooled = [], dict.fromkeys(TEXTS, 0.0)
    for seed in range(100):
        np.random.seed(seed)  # what llamppl resamples with
        context = await ByteContext.create(llm, rng=np.random.default_rng(seed))
        particles = await llamppl.smc_standard(Admitted(context), 16, 0.5)
        weights = np.exp([p.weight for p in particles])
        log_mls.append(math.log(weights.mean()))
        for p, w in zip(particles, weights, strict=True):
            pooled[bytes(p.context)] += w
    assert agrees(log_mls, sum(served.values()))
    total = sum(pooled.values())
    assert total_variation({t: w / total for t, w in pooled.items()}, served) < 0.15


def test_the_two_beams_differ_in_nothing_but_how_they_prune():
    assert dataclasses.replace(BEAM, prune="unbiased") == RANDOM
