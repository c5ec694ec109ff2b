"""`ByteLLM` with genlm-control: products, samplers, SMC, critics, ensembles, proposals."""

import asyncio
import math

import numpy as np
import pytest
import torch
from genlm.control import SMC, WCFG, WFSA, BoolCFG, BoolFSA, Ensemble, direct_token_sampler
from genlm.control.constant import EOS
from genlm.control.potential.base import Potential
from genlm.control.potential.product import Product
from genlm.control.sampler.token import AWRS

from genlm_bytes_smc import BeamParams, load_model
from genlm_bytes_smc.alphabet import BYTES, TABLES
from genlm_bytes_smc.constraints import ByteDFA, ByteRegex, ByteWFSA
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.proposal import ByteAWRS, ByteProposalSampler, byte_sampler
from genlm_bytes_smc.smc import smc
from tests.toys import EOS_TOKEN, Enumeration, ToyLM

WORDS = [b"ab", b"abc", b"ba", b"cab", b"bb", b"bbab"]
PATTERN = "|".join(w.decode() for w in WORDS)
PARAMETERS = [(1, 0.0, "topk"), (2, 0.2, "topk"), (1, 0.1, "unbiased"), (2, 0.0, "unbiased")]


class OneOf(Potential):
    """The texts of a finite set, each with weight one."""

    def __init__(self, words=WORDS):
        super().__init__(BYTES, tables=TABLES)
        self.words = words

    async def prefix(self, context):
        return 0.0 if any(w.startswith(b"".join(context)) for w in self.words) else -math.inf

    async def complete(self, context):
        return 0.0 if b"".join(context) in self.words else -math.inf

    async def logw_next(self, context):
        row, read = self.alloc_logws(), b"".join(context)
        for word in self.words:
            if word.startswith(read):
                row[word[len(read)] if len(word) > len(read) else 256] = 0.0
        return self.make_lazy_weights(row)


class Favour(Potential):
    """A critic: e to the number of b's."""

    def __init__(self):
        super().__init__(BYTES, tables=TABLES)

    async def prefix(self, context):
        return float(b"".join(context).count(b"b"))

    complete = prefix


def toy(K=None, threshold=0.0, prune="topk", lm=None, **options):
    params = BeamParams(K, threshold, prune=prune, eos_byte_strings=[EOS_TOKEN], **options)
    return ByteLLM(ToyLM(seed=6) if lm is None else lm, params)


def split(text):
    return [bytes([b]) for b in text]


@pytest.fixture
def seeded():
    np.random.seed(0)
    torch.manual_seed(0)


async def average(run, n):
    """Mean and standard error of exp(log_ml) over n runs."""
    estimates = np.exp([float((await run(i)).log_ml) for i in range(n)])
    return estimates.mean(), estimates.std() / math.sqrt(n)


async def truth(llm, critic=None):
    """The constraint's normalising constant under the model as it is served."""
    logw = await llm.batch_complete(WORDS)
    bonus = [0.0 if critic is None else await critic.complete(split(w)) for w in WORDS]
    return float(np.exp(logw + np.array(bonus)).sum())


def posterior(sequences):
    out = {}
    for context, p in zip(sequences.contexts, sequences.normalized_weights, strict=True):
        if p > 0:
            assert context[-1] is EOS
            text = b"".join(context[:-1])
            out[text] = out.get(text, 0.0) + float(p)
    return out


# -- products --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Common vocabulary")
@pytest.mark.parametrize("prune", [True, False])
async def test_product_with_a_coerced_automaton(prune):
    llm = toy(3, 0.05)
    both = llm * BoolFSA.from_regex(PATTERN).coerce(llm, f=b"".join, prune=prune)
    assert await both.complete(split(b"abc")) == await llm.complete(b"abc")
    assert await both.complete(split(b"abca")) == -math.inf
    await both.assert_contract([[], split(b"ab"), split(b"bb")], rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Common vocabulary")
async def test_a_product_with_an_integer_automaton_had_to_be_coerced_by_hand():
    llm, automaton = toy(3, 0.05), BoolFSA.from_regex(PATTERN)
    both = llm * automaton
    assert both.vocab is BYTES
    by_hand = llm * automaton.coerce(llm, f=b"".join)
    row, other = await both.logw_next(split(b"ab")), await by_hand.logw_next(split(b"ab"))
    assert row[b"c"] == other[b"c"] > -math.inf
    assert row[EOS] == other[EOS] > -math.inf
    assert row[b"x"] == -math.inf
    await both.assert_contract([[], split(b"ab"), split(b"bb")], rtol=1e-9, atol=1e-9)


async def test_genlm_automata_fit_to_the_right_of_any_byte_potential():
    """`lm * regex * fsa` reads from the left, so a product and a constraint must do it too."""
    llm, automaton, pattern = toy(3, 0.05), BoolFSA.from_regex(PATTERN), ByteRegex("[abc]+")
    want = await (llm * automaton).complete(b"ab")
    for both in (
        llm * pattern * automaton,
        pattern * automaton * llm,
        pattern * llm * automaton,
        llm * (pattern * automaton),
        llm * pattern * (automaton * automaton),
    ):
        assert isinstance(both, Product)
        assert await both.complete([b"a", b"b"]) == pytest.approx(want, abs=1e-12)
        await smc(both, 3, max_bytes=5)
    with pytest.raises(ValueError, match="coerce"):  # genlm-control's own, which is asked first
        automaton * llm


@pytest.mark.parametrize("to_bytes", [True, False])
async def test_an_automaton_of_genlm_control_becomes_tables_in_a_product(to_bytes):
    llm = toy(3, 0.05)
    both = llm * BoolFSA.from_regex("ab|é", to_bytes=to_bytes)
    assert isinstance(both.p2, ByteDFA)
    assert isinstance((await both.batch_logw_next([[], split(b"a")])).weights, torch.Tensor)
    assert await both.complete(split(b"ab")) == await llm.complete(b"ab")
    assert await both.p2.complete(split("é".encode())) == 0
    weighted = llm * WFSA.from_regex("a(b|c)", to_bytes=to_bytes)
    assert isinstance(weighted.p2, ByteWFSA)


@pytest.mark.parametrize("kind", ["weighted", "boolean"])
async def test_a_grammar_admits_no_byte_that_is_not_of_its_alphabet(kind):
    """genlm-grammar numbers nonterminals from the last terminal on, and takes a byte of such a
    number for one: coerced to all bytes, a grammar over `a` and `b` admitted `d` and `e`."""
    if kind == "weighted":
        grammar = WCFG.from_string("0.3: S -> S S\n0.4: S -> a\n0.3: S -> b")
        weight = {b"a": 0.4, b"ab": 0.3 * 0.4 * 0.3, b"aab": 2 * 0.3**2 * 0.4**2 * 0.3, b"": 0}
    else:
        grammar = BoolCFG.from_lark('start: "a" start "b" | "ab" | "b"')
        weight = {b"a": 0, b"ab": 1, b"aab": 0, b"": 0}
    llm = toy(3, 0.05)
    both = llm * grammar
    alone = both.p2
    others = [b for b in range(256) if b not in b"ab"]
    for text, w in weight.items():
        context = split(text)
        row = np.asarray((await alone.logw_next(context)).weights)
        assert (row[others] == -np.inf).all()
        before = await grammar.prefix(list(text))
        for b in b"ab":
            assert row[b] == pytest.approx(await grammar.prefix([*text, b]) - before, abs=1e-9)
            assert await alone.prefix(split(text + bytes([b]))) == pytest.approx(row[b] + before)
        assert math.exp(await alone.complete(context)) == pytest.approx(w)
        assert math.exp(row[256] + before) == pytest.approx(w)
        for b in others:
            assert await alone.prefix([*context, BYTES[b]]) == -math.inf
            assert await alone.complete([*context, BYTES[b]]) == -math.inf
    with pytest.raises(ValueError, match="weight zero"):
        await alone.logw_next(split(b"ad"))
    await both.assert_contract([[], split(b"ab")], rtol=1e-9, atol=1e-9)
    assert (await smc(both, 3, max_bytes=5, seed=0)).log_ml < 0


async def test_product_with_a_constraint_of_this_package():
    llm, constraint = toy(3, 0.05), ByteRegex(PATTERN)
    both = llm * constraint
    assert both.vocab is BYTES
    assert both.v1_idxs is ...
    contexts = [split(t) for t in (b"", b"ab", b"bb", b"bba")]
    block = (await both.batch_logw_next(contexts)).weights
    assert isinstance(block, torch.Tensor)
    assert block.dtype == torch.float64
    apart = [(await p.batch_logw_next(contexts)).weights for p in (llm, constraint)]
    assert torch.equal(block, apart[0] + apart[1])
    for context in contexts:
        await both.assert_logw_next_consistency(context, rtol=1e-9, atol=1e-9)


async def test_impossible_contexts_in_a_batch_do_not_fail_the_others():
    llm = toy(3)
    rows = (await llm.batch_logw_next([b"ab", b"ax", b"b"])).weights
    assert torch.isfinite(torch.logsumexp(rows, 1)).tolist() == [True, False, True]
    scored = await llm.batch_score([split(b"ab"), [*split(b"ax"), EOS], split(b"x")])
    assert scored.tolist() == [await llm.prefix(b"ab"), -math.inf, -math.inf]


# -- sequential Monte Carlo ------------------------------------------------------------


@pytest.mark.parametrize(("K", "threshold", "prune"), PARAMETERS)
async def test_smc_estimates_the_constraints_probability(K, threshold, prune, seeded):
    lm = ToyLM(seed=6)
    served = toy(K, threshold, prune, lm=lm)

    async def run(seed):
        # Random beams must be drawn afresh in each run for their errors to average out.
        llm = served if prune == "topk" else served.with_seed(seed)
        return await direct_token_sampler(llm * OneOf()).smc(4, 0.5, 8)

    mean, error = await average(run, 250)
    if prune == "topk":
        want = await truth(served)
    else:
        exact = Enumeration(lm, frozenset([EOS_TOKEN]))
        want = sum(exact.ended(w) for w in WORDS)
    assert abs(mean - want) < 4 * error
    assert error < want / 4


async def test_smc_with_a_critic(seeded):
    llm, critic = toy(2, 0.1), Favour()
    smc = SMC(direct_token_sampler(llm * OneOf()), critic=critic)
    mean, error = await average(lambda _: smc(5, 0.7, 8, resampling_method="systematic"), 250)
    assert abs(mean - await truth(llm, critic)) < 4 * error


async def test_the_model_as_a_critic_of_another(seeded):
    llm, other = toy(2, 0.1), toy(3, lm=ToyLM([b"a", b"b", b"c", b"bb", EOS_TOKEN], seed=2))
    smc = SMC(direct_token_sampler(llm * OneOf()), critic=other)
    mean, error = await average(lambda _: smc(5, 0.5, 8), 250)
    assert abs(mean - await truth(llm, other)) < 4 * error


async def test_the_posterior_is_the_constrained_distribution(seeded):
    llm = toy(2, 0.1)
    sampler = byte_sampler(llm * OneOf())
    sequences = await sampler.smc(3000, 0.5, 8)
    weights = np.exp(await llm.batch_complete(WORDS))
    found = posterior(sequences)
    assert set(found) <= set(WORDS)
    for word, p in zip(WORDS, weights / weights.sum(), strict=True):
        assert abs(found.get(word, 0.0) - p) < 0.06


async def test_particles_share_forwards(seeded):
    llm = ByteLLM(load_model("tiny"), BeamParams(3, 0.05, heal=False), prompt=b"It is")
    await llm.logw_next([])
    counts = llm.model.engine.counts
    counts.reset()
    await direct_token_sampler(llm).smc(24, 0.5, 9)
    assert counts.forwards <= 8
    assert llm.cache_info()["batches"] <= 9


async def test_texts_cut_at_the_limit_end_with_the_right_weight(seeded):
    llm = toy(2)
    sequences = await direct_token_sampler(llm).smc(6, 0.0, 3)
    for context, logw in sequences:
        text = b"".join(context[:-1])
        if len(text) == 2:
            assert logw == pytest.approx((await llm.logw_next(text))[EOS], abs=1e-9)


async def test_cleaning_up_smc_left_a_task_running(seeded):
    llm = toy(3)
    smc = SMC(direct_token_sampler(llm * OneOf()), critic=toy(2))
    await smc(4, 0.5, 6)
    await smc.cleanup()
    assert asyncio.all_tasks() == {asyncio.current_task()}


# -- rejection sampling ----------------------------------------------------------------


async def test_awrs(seeded):
    llm = toy(2, 0.1)
    for kind in (AWRS, ByteAWRS):
        sampler = kind(llm, OneOf(), seed=1)
        mean, error = await average(lambda _, s=sampler: s.smc(4, 0.5, 8), 150)
        assert abs(mean - await truth(llm)) < 4 * error


async def test_awrs_crashed_on_a_row_that_nothing_can_follow(seeded):
    # `c` and `ab` would spell "cab", but the model never says `ab`: its share of the row is for
    # healing, which fails, and nothing can follow.
    lm = ToyLM([b"ca", b"c", b"ac", b"ab", EOS_TOKEN])
    lm.row = lambda context: torch.tensor([0.5, 0.1, 0.3, 0.0, 0.1]).double().log()
    llm = ByteLLM(lm, BeamParams(1, eos_byte_strings=[EOS_TOKEN]))
    words = OneOf([b"cabca"])
    assert await llm.prefix(b"cab") > -math.inf
    assert torch.isneginf((await llm.batch_logw_next([b"cab"])).weights).all()
    with pytest.raises(AssertionError):
        await AWRS(llm, words, seed=1).sample(split(b"cab"))
    _, logw, _ = await ByteAWRS(llm, words, seed=1).sample(split(b"cab"))
    assert logw == -math.inf
    sequences = await ByteAWRS(llm, words, seed=1).smc(4, 0.5, 8)
    assert sequences.log_ml == -math.inf


# -- several models --------------------------------------------------------------------


def two_models():
    return toy(3, 0.05), toy(2, lm=ToyLM([b"a", b"b", b"c", b"ca", b"bb", EOS_TOKEN], seed=3))


@pytest.mark.parametrize("op", ["sum", "prod", "harmonic", "min", "max", 2.5])
async def test_ensemble_of_models_with_different_tokenizers(op):
    one, two = two_models()
    both = Ensemble(one, two, op, a=0.3)
    await both.assert_contract([split(t) for t in (b"", b"a", b"ca", b"abb")], rtol=1e-9, atol=1e-9)


async def test_an_ensembles_weights_depended_on_its_cache():
    texts = [b"a", b"ab", b"abb", b"cab", b"ba"]
    fresh = []
    for text in texts:  # nothing cached: from `prefix`
        fresh.append(await Ensemble(*two_models(), "sum").prefix(split(text)))
    warm = Ensemble(*two_models(), "sum")
    for text, want in zip(texts, fresh, strict=True):  # from rows along the way
        for i in range(len(text)):
            await warm.logw_next(split(text[:i]))
        assert await warm.prefix(split(text)) == pytest.approx(want, abs=1e-12)


async def test_an_ensemble_with_a_model_that_cannot_read_a_text(seeded):
    one, two = toy(2, lm=ToyLM([b"a", b"b", EOS_TOKEN])), toy(3)
    both, lost = Ensemble(one, two, "sum"), b"cab"
    assert await one.prefix(lost) == -math.inf
    want = math.log(0.5) + await two.prefix(lost)
    assert await both.prefix(split(lost)) == pytest.approx(want)
    both = Ensemble(one, two, "sum")
    assert math.isfinite(float((await both.logw_next(split(lost[:-1])))[lost[-1:]]))
    await both.logw_next(split(lost))  # a row of -inf on one side is no error
    sequences = await direct_token_sampler(both * OneOf()).smc(20, 0.5, 8)
    assert math.isfinite(sequences.log_ml)


async def test_smc_on_an_ensemble(seeded):
    both = Ensemble(*two_models(), "sum")
    want = np.exp(await both.batch_complete([split(w) for w in WORDS])).sum()
    sampler = direct_token_sampler(both * OneOf())
    mean, error = await average(lambda _: sampler.smc(4, 0.5, 8), 150)
    assert abs(mean - want) < 4 * error


# -- proposals -------------------------------------------------------------------------


@pytest.mark.parametrize("narrow", ["a beam of one", "another tokenizer"])
async def test_one_model_proposes_for_another(narrow, seeded):
    lm = ToyLM(seed=6)
    target = toy(6, lm=lm)
    proposal = toy(1, 0.2, lm=lm, heal=False) if narrow == "a beam of one" else two_models()[1]
    sampler = byte_sampler(target * OneOf(), proposal * OneOf(), defensive=0.2)
    assert isinstance(sampler, ByteProposalSampler)
    mean, error = await average(lambda _: sampler.smc(4, 0.5, 6), 120)
    assert abs(mean - await truth(target)) < 4 * error
    free = byte_sampler(target * OneOf(), proposal)  # it knows nothing of the constraint
    mean, error = await average(lambda _: free.smc(6, 0.5, 6), 120)
    assert abs(mean - await truth(target)) < 4 * error


async def test_a_proposal_without_mass_loses_texts_unless_it_is_mixed(seeded):
    lm = ToyLM([b"a", b"b", EOS_TOKEN], seed=1)
    target, proposal = toy(None, lm=lm) * OneOf([b"a", b"b"]), toy(None, lm=lm) * OneOf([b"a"])
    texts = {}
    for defensive in (0.0, 0.1):
        sampler = byte_sampler(target, proposal, defensive=defensive)
        texts[defensive] = set(posterior(await sampler.smc(200, 0.0, 4)))
    assert texts == {0.0: {b"a"}, 0.1: {b"a", b"b"}}


async def test_weights_of_proposed_bytes():
    target, proposal = toy(None), two_models()[1]
    sampler = byte_sampler(target, proposal, defensive=0.25)
    p = (await target.logw_next([])).weights
    q = (await proposal.logw_next([])).weights
    mixed = torch.log(0.75 * torch.softmax(q, 0) + 0.25 * torch.softmax(p, 0))
    for _ in range(10):
        symbol, logw, logp = await sampler.sample([])
        column = 256 if symbol is EOS else symbol[0]
        assert logp == pytest.approx(float(mixed[column]), abs=1e-12)
        assert logw == pytest.approx(float(p[column] - mixed[column]), abs=1e-12)


async def test_samplers_check_their_alphabets():
    llm, automaton = toy(2), BoolFSA.from_regex("ab")
    with pytest.raises(ValueError, match="coerce"):
        byte_sampler(automaton)
    with pytest.raises(ValueError, match="same tokens"):
        byte_sampler(llm, automaton.coerce(llm, f=b"".join))
    with pytest.raises(TypeError, match="Potential"):
        byte_sampler(llm, "proposal")
    with pytest.raises(ValueError, match="defensive"):
        byte_sampler(llm, toy(1), defensive=1.0)
    assert (await byte_sampler(llm).smc(2, 0.5, 3)).size == 2
