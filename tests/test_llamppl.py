"""`ByteContext` in llamppl programs."""

import asyncio
import copy
import math
import subprocess
import sys

import llamppl
import numpy as np
import pytest
from genlm.control.constant import EOS
from llamppl.distributions.lmcontext import NullMask

from genlm_bytes_smc import BeamParams, load_model
from genlm_bytes_smc.llamppl import ByteContext
from genlm_bytes_smc.potential import ByteLLM
from tests.toys import EOS_TOKEN, Enumeration, ToyLM

WORDS = [b"ab", b"abc", b"ba", b"cab", b"bb", b"bbab"]


def toy(K=None, threshold=0.0, prune="topk", lm=None, **options):
    params = BeamParams(K, threshold, prune=prune, eos_byte_strings=[EOS_TOKEN], **options)
    return ByteLLM(ToyLM(seed=6) if lm is None else lm, params)


class Word(llamppl.Model):
    """One of WORDS, byte by byte."""

    def __init__(self, context):
        super().__init__()
        self.context = context

    async def step(self):
        read = bytes(self.context)
        going = [w for w in WORDS if w.startswith(read)]
        allowed = {w[len(read)] if len(w) > len(read) else EOS for w in going}
        self.score(await self.context.log_mass())
        await self.observe(self.context.mask_dist(allowed), True)
        if await self.sample(self.context.next_byte()) is EOS:
            self.finish()


class Plain(llamppl.Model):
    """Up to n bytes, freely."""

    def __init__(self, context, n):
        super().__init__()
        self.context, self.n = context, n

    async def step(self):
        symbol = await self.sample(self.context.next_byte())
        if symbol is EOS or len(self.context) == self.n:
            self.finish()


N = 3


async def smc(model):
    return await llamppl.smc_standard(model, N, 0.5)


async def steer(model):
    return await llamppl.smc_steer(model, N, 2)


def resample_optimal(weights, n):
    """Fearnhead and Clifford 2003: (kept, drawn, c) with sum(min(c weights, 1)) = n."""
    order = np.argsort(-weights, kind="stable")[: np.count_nonzero(weights)]
    if len(order) <= n:
        return order, order[:0], 1.0
    kept = 0
    while weights[order[kept]] * (n - kept) >= weights[order[kept:]].sum():
        kept += 1
    c = (n - kept) / weights[order[kept:]].sum()
    ends = np.cumsum(c * weights[order[kept:]])
    points = np.random.random() + np.arange(n - kept)
    return order[:kept], order[kept + np.searchsorted(ends, points)], c


@pytest.fixture
def exact_steer(monkeypatch):
    # llamppl's find_c counts the threshold's own weight among those to be drawn: its c is too
    # small, and the weights of what is drawn too large (by 3 to 100 percent on six weights).
    module = sys.modules["llamppl.inference.smc_steer"]
    monkeypatch.setattr(module, "resample_optimal", resample_optimal)


# -- inference -------------------------------------------------------------------------


@pytest.mark.parametrize("infer", [smc, steer])
@pytest.mark.parametrize(
    ("K", "threshold", "prune"), [(1, 0.0, "topk"), (2, 0.2, "topk"), (2, 0.0, "unbiased")]
)
async def test_inference_estimates_the_constraints_probability(
    infer, K, threshold, prune, exact_steer
):
    np.random.seed(0)
    lm = ToyLM(seed=6)
    served = toy(K, threshold, prune, lm=lm)
    estimates = []
    for seed in range(200):
        llm = served if prune == "topk" else served.with_seed(seed)
        particles = await infer(Word(await ByteContext.create(llm)))
        assert all(bytes(p.context) in WORDS for p in particles if p.weight > -math.inf)
        estimates.append(np.exp([p.weight for p in particles]).sum() / N)
    if prune == "topk":
        want = np.exp(await served.batch_complete(WORDS)).sum()
    else:
        exact = Enumeration(lm, frozenset([EOS_TOKEN]))
        want = sum(exact.ended(w) for w in WORDS)
    error = np.std(estimates) / math.sqrt(len(estimates))
    assert abs(np.mean(estimates) - want) < 4 * error
    assert error < want / 4


async def test_steering_as_it_comes():
    np.random.seed(0)
    particles = await steer(Word(await ByteContext.create(toy(3))))
    assert len(particles) == N
    assert all(bytes(p.context) in WORDS and p.context.ended for p in particles)


async def test_samples_follow_the_model():
    llm = toy(3, 0.05)
    model = Plain(await ByteContext.create(llm, rng=np.random.default_rng(0)), 1)
    particles = await llamppl.smc_standard(model, 3000)
    assert all(p.weight == 0 for p in particles)
    p = np.exp((await llm.logw_next([])).weights.numpy())
    for byte in b"abc":
        share = np.mean([bytes(x.context) == bytes([byte]) for x in particles])
        assert abs(share - p[byte]) < 0.04
    assert abs(np.mean([x.context.ended for x in particles]) - p[256]) < 0.04


async def test_particles_share_forwards():
    llm = ByteLLM(load_model("tiny"), BeamParams(3, heal=False))
    context = await ByteContext.create(llm, prompt=b"The ", rng=np.random.default_rng(0))
    assert context.llm.model is llm.model
    counts = llm.model.engine.counts
    counts.reset()
    particles = await llamppl.smc_standard(Plain(context, 6), 24)
    assert counts.forwards <= 5  # none for the first byte, and none after the last
    assert len({bytes(p.context) for p in particles}) > 5


async def test_a_finished_particle_asks_for_no_row():
    llm = toy(3)
    context = await ByteContext.create(llm)
    calls = len(llm.llm.calls)
    await context.next_byte().log_prob(b"a")
    assert len(llm.llm.calls) == calls


# -- the context -----------------------------------------------------------------------


async def test_log_probabilities_add_up_to_the_models():
    llm = toy(3, 0.05)
    context = await ByteContext.create(llm)
    total = 0.0
    for symbol in (b"a", ord("b"), EOS):
        total += await context.next_byte().log_prob(symbol)
    assert total == pytest.approx(await llm.complete(b"ab"), abs=1e-12)
    assert (context.text, str(context), len(context), context.ended) == (b"ab", "ab", 2, True)
    assert repr(context) == "ByteContext(b'ab', ended)"
    for use in (context.next_byte().sample(), context.row(), context.log_mass()):
        with pytest.raises(ValueError, match="ended"):
            await use


async def test_masks_condition_the_next_symbol():
    llm = toy(3, 0.05)
    p = np.exp((await llm.logw_next([])).weights.numpy())
    context = await ByteContext.create(llm)
    assert await context.mask_dist(b"ab", EOS).log_prob(True) == pytest.approx(
        math.log(p[97] + p[98] + p[256])
    )
    assert await context.mask_dist([b"b", EOS]).log_prob(False) == pytest.approx(
        math.log(p[97] / (p[97] + p[98] + p[256]))
    )
    assert await context.next_byte().argmax(0) == b"a"
    assert await context.next_byte().sample() == (b"a", pytest.approx(0.0, abs=1e-12))
    assert np.isfinite((await context.row())[98])  # masks hold for one symbol


async def test_mask_samples_have_their_probability():
    llm = toy(3, 0.05)
    p = np.exp((await llm.logw_next([])).weights.numpy())
    context = await ByteContext.create(llm, rng=np.random.default_rng(0))
    drawn = []
    for _ in range(1000):
        value, logp = await copy.deepcopy(context).mask_dist({97, EOS}).sample()
        inside = p[97] + p[256]
        assert logp == pytest.approx(math.log(inside if value else 1 - inside))
        drawn.append(value)
    assert abs(np.mean(drawn) - inside) < 0.06


async def test_a_copy_shares_the_row_and_goes_its_own_way():
    llm = toy(3)
    context = await ByteContext.create(llm)
    await context.mask_dist(b"ab").log_prob(True)
    other = copy.deepcopy(context)
    assert other._row is context._row
    assert other.llm is llm
    await other.next_byte().log_prob(b"a")
    assert (bytes(context), bytes(other)) == (b"", b"a")
    assert (await context.row())[99] == -math.inf
    row = await context.row()
    row[:] = 0  # the caller's own
    assert (await context.row())[99] == -math.inf


async def test_seeds_decide_samples():
    async def text(rng):
        context = await ByteContext.create(toy(3), rng=rng)
        await llamppl.smc_standard(Plain(context, 6), 1)
        symbols = [(await context.next_byte().sample())[0] for _ in range(2)]
        return symbols

    assert await text(np.random.default_rng(3)) == await text(np.random.default_rng(3))
    np.random.seed(1)
    first = await text(None)
    np.random.seed(1)
    assert await text(None) == first


async def test_a_text_that_nothing_can_follow_weighs_zero():
    context = await ByteContext.create(toy(3))
    assert await context.next_byte().log_prob(b"x") == -math.inf
    assert await context.log_mass() == -math.inf
    assert await context.next_byte().sample() == (EOS, 0.0)
    masked = await ByteContext.create(toy(3))
    assert await masked.mask_dist(b"xyz").log_prob(True) == -math.inf
    assert await masked.mask_dist(b"a").sample() == (False, 0.0)
    assert (await masked.next_byte().sample())[0] is EOS


async def test_a_program_that_would_be_biased_is_told():
    context = await ByteContext.create(toy(2, prune="unbiased"))
    with pytest.raises(RuntimeError, match="log_mass"):
        await context.next_byte().sample()
    assert math.isfinite(await context.log_mass())
    await context.next_byte().sample()
    # `c` and `ab` would spell the last byte, but the model never says `ab`: healing fails.
    lm = ToyLM([b"ca", b"c", b"ac", b"ab", EOS_TOKEN])
    with np.errstate(divide="ignore"):
        logp = np.log([0.5, 0.1, 0.3, 0.0, 0.1])
    lm.row = lambda c: logp
    dead = await ByteContext.create(toy(1, lm=lm, heal=True))
    for byte in (b"c", b"a", b"b"):
        await dead.next_byte().log_prob(byte)
    with pytest.raises(RuntimeError, match="nothing can follow"):
        await dead.next_byte().sample()


async def test_input_is_checked():
    llm = toy(3)
    with pytest.raises(TypeError, match="ByteLLM"):
        await ByteContext.create(llm.llm)
    context = await ByteContext.create(llm, prompt=b"ab")
    for symbol, error in ((b"ab", ValueError), (300, ValueError), ("a", TypeError)):
        with pytest.raises(error):
            await context.next_byte().log_prob(symbol)
        with pytest.raises(error):
            context.mask_dist([symbol])
    with pytest.raises(TypeError, match="mask"):
        context.mask_dist("ab")
    with pytest.raises(NullMask):
        await context.mask_dist(b"").log_prob(True)
    assert bytes(context) == b""


async def test_concurrent_contexts_are_one_batch():
    llm = toy(3)
    contexts = [await ByteContext.create(llm) for _ in range(12)]
    for i, context in enumerate(contexts):
        await context.next_byte().log_prob(b"abc"[i % 3 : i % 3 + 1])
    batches = llm.cache_info()["batches"]
    await asyncio.gather(*[c.next_byte().sample() for c in contexts])
    assert llm.cache_info()["batches"] == batches + 1


def test_without_llamppl_the_error_names_the_extra():
    code = "import sys; sys.modules['llamppl'] = None; from genlm_bytes_smc import ByteContext"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'pip install "genlm-bytes-smc[llamppl]"' in done.stderr.splitlines()[-1]
