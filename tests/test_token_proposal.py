"""`ByteTokenSampler`: bytes of one model propose tokens of another, with exact weights."""

import asyncio
import math

import numpy as np
import pytest
from genlm.control import EOS, SMC, PromptedLLM
from genlm.control.potential.base import Potential

from genlm_bytes_smc import BeamParams, ByteTokenSampler
from genlm_bytes_smc.constraints import ByteRegex, FiniteSet
from genlm_bytes_smc.potential import ByteLLM
from tests.toys import EOS_TOKEN, Enumeration, ToyLM

WORDS = [b"ab", b"abc", b"ba", b"cab", b"bb", b"bbab"]
OTHER = [b"a", b"b", b"c", b"ca", b"bb", EOS_TOKEN]  # another tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:Common vocabulary")


def large(sharpness=2.0):
    """A token-level target, and the model behind it."""
    lm = ToyLM(seed=6, sharpness=sharpness)
    lm.tokenizer.eos_token_id = len(lm.tokens) - 1
    return PromptedLLM(lm, prompt_ids=[lm.tokenizer.bos_token_id]), lm


def small(K=2, threshold=0.1):
    """A byte beam of another model."""
    params = BeamParams(K, threshold, eos_byte_strings=[EOS_TOKEN])
    return ByteLLM(ToyLM(OTHER, seed=3, sharpness=0.5), params)


class Row(Potential):
    """The same row after every context."""

    def __init__(self, tokens, row):
        super().__init__(tokens)
        self.row = np.array(row, dtype=np.float64)

    async def prefix(self, context):
        return 0.0

    complete = prefix

    async def logw_next(self, context):
        return self.make_lazy_weights(self.row)


async def drawn(sampler, context, n):
    """What n draws came to: {column: (share, log weight, log probability)}."""
    eos, found = len(sampler.target.vocab), {}
    draws = await asyncio.gather(*(sampler.sample(context) for _ in range(n)))
    for token, logw, logq in draws:
        column = eos if token is EOS else sampler.target.lookup[token]
        k = found[column][0] if column in found else 0
        found[column] = (k + 1, logw, logq)
    return {c: (k / n, w, q) for c, (k, w, q) in found.items()}


@pytest.mark.parametrize("defensive", [0.05, 0.5])
@pytest.mark.parametrize("text", [b"", b"ab"])
async def test_the_walk_is_a_distribution_over_tokens_and_weights_are_exact(defensive, text):
    target, _ = large(sharpness=0.7)
    context = [next(v for v in target.vocab if bytes(v) == bytes([b])) for b in text]
    sampler = ByteTokenSampler(target, small(), defensive=defensive, rng=np.random.default_rng(0))
    found = await drawn(sampler, context, 1500)
    row = (await target.logw_next(context)).weights.double().numpy()
    assert set(found) == set(np.flatnonzero(row > -np.inf))  # both tokens spelled b"a", too
    assert sum(math.exp(q) for _, _, q in found.values()) == pytest.approx(1, abs=1e-9)
    for column, (share, logw, logq) in found.items():
        assert logw == pytest.approx(row[column] - logq, abs=1e-6)
        q = math.exp(logq)
        assert abs(share - q) < 4 * math.sqrt(q * (1 - q) / 1500) + 1e-3


async def test_a_proposal_that_agrees_with_the_target_adds_no_variance():
    tokens = [b"a", b"b", b"ab", b"ba", b"bab"]
    row = np.log([0.2, 0.1, 0.25, 0.15, 0.05, 0.25])

    class Bytes(Row):
        """The chances of bytes that the row implies, inside a token."""

        def __init__(self):
            super().__init__([bytes([b]) for b in range(256)], np.full(257, -np.inf))

        async def logw_next(self, context):
            out, text = self.row.copy(), b"".join(context)
            for token, w in zip(tokens, row, strict=False):
                if token.startswith(text) and token != text:
                    out[token[len(text)]] = np.logaddexp(out[token[len(text)]], w)
            out[256] = row[-1]
            return self.make_lazy_weights(out)

    sampler = ByteTokenSampler(Row(tokens, row + 3.0), Bytes(), rng=np.random.default_rng(1))
    for _ in range(50):
        _, logw, _ = await sampler.sample([])
        assert logw == pytest.approx(3.0, abs=1e-9)  # the row's total, every time


@pytest.mark.parametrize("defensive", [0.0, 0.1])
async def test_smc_over_tokens_estimates_the_exact_model(defensive):
    """A cheap byte beam and the constraint propose; the critic is the constraint."""
    np.random.seed(0)
    target, lm = large(sharpness=1.0)
    constraint = FiniteSet(WORDS)
    proposal = (small(None, 0.0) if defensive == 0 else small()) * constraint  # no holes, or any
    sampler = ByteTokenSampler(target, proposal, defensive=defensive)
    smc = SMC(sampler, critic=constraint.coerce(target, f=b"".join, prune=False))
    estimates = []
    for _ in range(150):
        sequences = await smc(6, 0.5, 8, resampling_method="systematic")
        estimates.append(math.exp(sequences.log_ml))
        for context, w in sequences:
            assert w == -math.inf or b"".join(context[:-1]) in WORDS
    exact = Enumeration(lm, frozenset([EOS_TOKEN]))
    want = sum(exact.ended(w) for w in WORDS)
    error = np.std(estimates) / math.sqrt(len(estimates))
    assert abs(np.mean(estimates) - want) < 4 * error, (np.mean(estimates), error, want)
    assert error < want / 4


async def test_tokens_that_spell_nothing_and_integer_tokens():
    quiet = Row([b"", b"a"], np.log([0.5, 0.25, 0.25]))
    sampler = ByteTokenSampler(quiet, small(), defensive=0.5, rng=np.random.default_rng(0))
    found = await drawn(sampler, [], 600)
    assert set(found) == {0, 1, 2}
    assert sum(math.exp(q) for _, _, q in found.values()) == pytest.approx(1)
    assert found[0][1] == pytest.approx(0.0)  # ending is the target's own choice
    numbers = Row([97, 98], np.log([0.5, 0.25, 0.25]))
    token, _, _ = await ByteTokenSampler(numbers, small(), defensive=0.5).sample([97])
    assert token in (97, 98, EOS)


async def test_where_nothing_can_be_drawn_the_weight_is_zero():
    dead = Row([b"a"], [-np.inf, -np.inf])
    assert (await ByteTokenSampler(dead, small()).sample([]))[1] == -math.inf
    only_c = ByteRegex("c") * ByteRegex("c|d")
    sampler = ByteTokenSampler(Row([b"a", b"b"], [0.0, 0.0, -np.inf]), only_c, defensive=0)
    assert (await sampler.sample([]))[:2] == (EOS, -math.inf)
    mixed = ByteTokenSampler(Row([b"a", b"b"], [0.0, 0.0, -np.inf]), only_c, defensive=0.1)
    assert (await mixed.sample([]))[1] == pytest.approx(math.log(2))


async def test_bad_arguments():
    target, _ = large()
    with pytest.raises(TypeError, match="target must be a Potential"):
        ByteTokenSampler("target", small())
    with pytest.raises(ValueError, match="one-byte"):
        ByteTokenSampler(target, target)
    with pytest.raises(ValueError, match="defensive"):
        ByteTokenSampler(target, small(), defensive=1)
    with pytest.raises(TypeError, match="spell bytes"):
        ByteTokenSampler(Row(["a"], [0.0, 0.0]), small())
    with pytest.raises(TypeError, match="no draw"):
        await ByteTokenSampler(target, small()).sample([], draw=max)
