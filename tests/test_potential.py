"""`ByteLLM`: the contract of a potential, exact numbers, and what others got wrong."""

import asyncio
import copy
import gc
import math
import weakref
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from genlm.bytes import BeamParams as GenlmBeamParams
from genlm.control.constant import EOS

import genlm_bytes_smc.trie
from genlm_bytes_smc import (
    BeamParams,
    ByteBeamState,
    ByteLanes,
    ContextTooLongError,
    Prompt,
    RowTransform,
    as_engine,
    load_model,
)
from genlm_bytes_smc.alphabet import BYTES, TABLES
from genlm_bytes_smc.beam.model import byte_model
from genlm_bytes_smc.potential import ByteLLM
from tests.toys import EOS_TOKEN, TOY_TOKENS, Enumeration, ToyLM

ENDS = [EOS_TOKEN]
TEXTS = [b"", b"a", b"b", b"ab", b"ba", b"abc", b"cab", b"abab", b"bbabc"]


def toy(K=None, threshold=0.0, prune="topk", lm=None, **options):
    params = BeamParams(K, threshold, prune=prune, eos_byte_strings=ENDS)
    return ByteLLM(ToyLM() if lm is None else lm, params, **options)


def split(text):
    return [bytes([b]) for b in text]


def random_texts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [bytes(rng.choice(list(b"abc"), size=n).tolist()) for n in lengths]


async def possible(llm, texts):
    return [split(t) for t in texts if await llm.prefix(t) > -math.inf]


def forwards(llm):
    return llm.model.engine.counts.forwards


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


# -- the contract ----------------------------------------------------------------------


@pytest.mark.parametrize("prune", ["topk", "unbiased"])
@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("K", [1, 2, 5, None])
async def test_contract_on_toys(K, threshold, prune):
    llm = toy(K, threshold, prune)
    contexts = await possible(llm, TEXTS)
    assert len(contexts) > 3
    await llm.assert_contract(contexts, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prune", ["topk", "unbiased"])
@pytest.mark.parametrize(("K", "threshold"), [(1, 0.0), (2, 0.05), (5, 0.2)])
async def test_contract_on_the_bundled_model(tiny, K, threshold, prune):
    llm = ByteLLM(tiny, BeamParams(K, threshold, prune=prune), prompt=b"An apple a day ")
    contexts = await possible(llm, [b"", b"ke", b"keeps the doctor", "né".encode()])
    await llm.assert_contract(contexts, rtol=1e-6, atol=1e-5)
    if prune == "topk":
        rows = (await llm.batch_logw_next(contexts)).weights
        torch.testing.assert_close(
            torch.logsumexp(rows, 1), torch.zeros(len(contexts)).double(), atol=1e-12, rtol=0
        )


async def test_prefix_and_logw_next_disagreed_when_the_beam_pruned():
    for K in (1, 2, 3, 5):
        llm = toy(K)
        for text in (b"abcab", b"bbab"):
            total = 0.0
            for i in range(len(text)):
                total += (await llm.logw_next(split(text[:i])))[text[i : i + 1]]
                assert await llm.prefix(split(text[: i + 1])) == pytest.approx(total, abs=1e-12)


async def test_a_threshold_alone_made_prefix_and_logw_next_disagree():
    for threshold in (0.01, 0.05, 0.2):
        llm = toy(100, threshold)
        for context in await possible(llm, TEXTS):
            await llm.assert_logw_next_consistency(context, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prune", ["topk", "unbiased"])
async def test_every_candidate_kept_gives_the_exact_distribution(prune):
    lm = ToyLM(seed=4)
    llm, exact = toy(None, prune=prune, lm=lm), Enumeration(lm, frozenset(ENDS))
    for text in TEXTS:
        assert math.exp(await llm.prefix(text)) == pytest.approx(exact.prefix(text), rel=1e-12)
        assert math.exp(await llm.complete(text)) == pytest.approx(exact.ended(text), rel=1e-12)
        row = (await llm.logw_next(text)).weights
        np.testing.assert_allclose(row.numpy(), exact.logp_next(text), rtol=1e-10, atol=1e-10)


async def test_served_rows_are_a_distribution_over_texts():
    llm = toy(2, 0.05)
    texts = [bytes(t) for n in range(4) for t in product(b"abc", repeat=n)]
    ended = np.exp(await llm.batch_complete(texts)).sum()
    longer = np.exp(await llm.batch_prefix([t for t in texts if len(t) == 3])).sum()
    ended_last = np.exp(await llm.batch_complete([t for t in texts if len(t) == 3])).sum()
    reserve = 1 - (ended - ended_last + longer)  # texts with `<`, `e` or `>`
    other = np.exp(
        await llm.batch_prefix([t + c for t in texts if len(t) < 3 for c in split(b"<e>")])
    )
    assert reserve == pytest.approx(other.sum(), abs=1e-12)


@pytest.mark.parametrize(("K", "threshold"), [(1, 0.0), (3, 0.1)])
async def test_unbiased_pruning_averages_to_the_exact_probability(K, threshold):
    lm = ToyLM(seed=1)
    exact = Enumeration(lm, frozenset(ENDS))
    texts = [b"abc", b"bab", b"ab"]
    truth = np.array([*(exact.prefix(t) for t in texts), *(exact.ended(t) for t in texts)])
    runs = []
    for seed in range(300):
        llm = toy(K, threshold, "unbiased", lm=lm).with_seed(seed)
        logw = [await llm.batch_prefix(texts), await llm.batch_complete(texts)]
        runs.append(np.exp(np.concatenate(logw)))
    mean, error = np.mean(runs, 0), np.std(runs, 0) / math.sqrt(len(runs))
    assert (np.abs(mean - truth) < 4 * error + 1e-12).all()


async def test_vocabulary_is_the_shared_one():
    llm = toy(3)
    assert llm.vocab is BYTES
    assert llm.vocab_eos is TABLES.vocab_eos
    assert llm.eos is EOS
    rows = (await llm.batch_logw_next([[], [b"a"]])).weights
    assert rows.dtype == torch.float64
    assert rows.shape == (2, 257)
    assert rows.device == llm.device
    assert llm.alloc_rows(3).shape == (3, 257)
    assert llm.alloc_rows(3).dtype == torch.float64


async def test_the_row_after_a_prompt_is_the_beams_own(tiny):
    params = BeamParams(K=5, prune_threshold=0.01, eos_byte_strings=[b"<|endoftext|>"])
    prompt = b"An apple a day keeps the "
    llm = ByteLLM(tiny, params, prompt=prompt)
    beam = await (await ByteBeamState.initial(tiny, params)).prefill(prompt)
    ps = (await beam.logp_next()).ps
    row = (await llm.logw_next([])).weights.numpy()
    np.testing.assert_allclose(row, np.append(ps[:256], ps[257]), rtol=1e-12)
    assert (await llm.prompt_weight()) == pytest.approx(beam.logZ, abs=1e-12)
    assert (await llm.beam(b"")).logZ == beam.logZ


async def test_transform_is_applied_to_the_token_rows():
    class Tempered(ToyLM):
        def row(self, context):
            return torch.log_softmax(super().row(context) / 2.5, 0)

    llm = toy(None, transform=RowTransform(temperature=2.5))
    exact = Enumeration(Tempered(), frozenset(ENDS))
    assert math.exp(await llm.prefix(b"abca")) == pytest.approx(exact.prefix(b"abca"), rel=1e-12)
    assert toy(None).model is not llm.model


# -- equal ways to the same numbers ----------------------------------------------------


@pytest.mark.parametrize("prune", ["topk", "unbiased"])
@pytest.mark.parametrize(("K", "threshold"), [(1, 0.0), (3, 0.1)])
async def test_batched_looped_evicted_and_fresh_agree(K, threshold, prune):
    texts = random_texts([4, 8, 3, 6, 0, 7, 8, 1, 5, 2] * 4)
    lm = ToyLM()
    whole = toy(K, threshold, prune, lm=lm)
    prefix, complete = await whole.batch_prefix(texts), await whole.batch_complete(texts)
    rows = (await whole.batch_logw_next(texts)).weights.numpy()
    assert whole.cache_info()["evicted"] == 0
    for options in ({}, {"cache_size": 1}, {"cache_bytes": 1}, {"cache_size": 3}):
        one = toy(K, threshold, prune, lm=lm, **options)
        for i, text in enumerate(texts):
            assert await one.prefix(text) == prefix[i]
            assert await one.complete(split(text)) == complete[i]
            row = (await one.batch_logw_next([text])).weights.numpy()[0]
            np.testing.assert_array_equal(row, rows[i])
        held = one.cache_info()
        assert held["entries"] <= (one.cache_size if "cache_bytes" not in options else 1)
        assert (held["evicted"] > 0) == bool(options)
    fresh = toy(K, threshold, prune, lm=ToyLM())
    np.testing.assert_array_equal(await fresh.batch_prefix(texts[::-1]), prefix[::-1])
    whole.clear_cache()
    np.testing.assert_array_equal(await whole.batch_complete(texts), complete)


@pytest.mark.parametrize("prune", ["topk", "unbiased"])
async def test_a_long_text_at_once_equals_stepping(prune):
    (text,) = random_texts([120])
    at_once, stepped = toy(4, 0.01, prune), toy(4, 0.01, prune)
    by_steps = [await stepped.prefix(text[:i]) for i in range(len(text) + 1)]
    assert await at_once.prefix(text) == by_steps[-1]
    assert await at_once.prefix(text[:77]) == by_steps[77]
    assert forwards(at_once) <= forwards(stepped)  # a toy has no tokenizer to foresee with
    assert len(at_once.llm.calls) == len(set(at_once.llm.calls))
    assert at_once.cache_info()["entries"] < 80  # not every prefix of a long text is kept


async def test_scoring_a_text_takes_few_forwards(tiny):
    params = BeamParams(K=5, prune_threshold=0.05)
    text = b"The quick brown fox jumps over the lazy dog. " * 3
    llm = ByteLLM(tiny, params)
    before = forwards(llm)
    scored = await llm.prefix(text)
    assert forwards(llm) <= before + 6
    other = ByteLLM(load_model("tiny"), params)
    for i in range(3, len(text) + 1, 4):  # too short a way to look ahead
        await other.prefix(text[:i])
    assert forwards(other) > 25
    assert scored == pytest.approx(await other.prefix(text), abs=1e-4)  # float32 rows


async def test_rows_evicted_between_row_and_step_were_read_as_garbage():
    texts = random_texts([6] * 12)
    lm = ToyLM()
    byte_model(lm, row_bytes=8 * len(TOY_TOKENS) * 6)
    tight, roomy = toy(3, lm=lm), toy(3)
    for text in texts:
        for i in range(len(text) + 1):
            assert await tight.complete(text[:i]) == await roomy.complete(text[:i])
    assert tight.model.store.memory()["evicted"] > 0


# -- calls that arrive together --------------------------------------------------------


async def test_every_particle_built_a_trie_and_a_prefill_of_its_own():
    tokens = [*TOY_TOKENS, b"zz"]  # a vocabulary that no other test has
    before = genlm_bytes_smc.trie.builds
    lm = ToyLM(tokens)
    lm.tokenizer = SimpleNamespace(bos_token_id=9, eos_token_id=None)
    llm = toy(5, lm=lm, prompt=b"abcab")
    rows = await asyncio.gather(*[llm.logw_next([]) for _ in range(32)])
    assert genlm_bytes_smc.trie.builds == before + 1
    calls = len(lm.calls)
    assert calls == len(set(lm.calls))
    alone = ToyLM(tokens)
    alone.tokenizer = lm.tokenizer
    await toy(5, lm=alone, prompt=b"abcab").logw_next([])
    assert calls == len(alone.calls)
    assert all(torch.equal(r.weights, rows[0].weights) for r in rows)
    for i in range(5):
        llm.set_prompt_from_str("ab" * i)
        await llm.logw_next([])
    assert genlm_bytes_smc.trie.builds == before + 1


async def test_concurrent_calls_on_one_context_asked_the_model_again_and_again():
    one, ten = toy(3), toy(3)
    await one.logw_next(split(b"abc"))
    await asyncio.gather(*[ten.logw_next(split(b"abc")) for _ in range(10)])
    assert len(ten.llm.calls) == len(one.llm.calls)
    assert ten.cache_info()["batches"] == 1


async def test_no_row_is_computed_for_what_was_about_to_be_pruned():
    text = b"abcabbabcaba"
    counts = {}
    for K in (1, 3, None):
        llm = toy(K)
        await llm.prefix(text)
        llm.clear_cache()
        for i in range(len(text)):
            await llm.prefix(text[:i])
        counts[K] = len(llm.llm.calls)
    assert counts[1] < counts[3] < counts[None] / 2


async def test_n_particles_cost_one_forward_a_byte_step(tiny):
    llm = ByteLLM(tiny, BeamParams(K=3, heal=False), prompt=b"Once upon a time")
    await llm.logw_next([])
    texts = [b" there", b" a cat", b", in a", b" the k", b" when "]
    for i in range(1, 6):
        before = forwards(llm)
        await asyncio.gather(*[llm.logw_next(split(t[:i])) for t in texts for _ in range(6)])
        assert forwards(llm) <= before + 1
    assert llm.cache_info()["batches"] == 6


async def test_a_task_that_arrived_during_prefill_saw_the_beam_before_the_prompt():
    truth = (await toy(3, prompt=b"abcab").logw_next(split(b"ab"))).weights
    for passes in range(12):
        llm = toy(3, prompt=b"abcab")
        first = asyncio.ensure_future(llm.logw_next(split(b"ab")))
        for _ in range(passes):
            await asyncio.sleep(0)
        second = await llm.logw_next(split(b"ab"))
        assert torch.equal(second.weights, truth)
        assert torch.equal((await first).weights, truth)


async def test_a_cancelled_caller_hands_its_batch_on():
    truth = (await toy(3).batch_logw_next([b"ab", b"ba", b"abc"])).weights
    for passes in range(14):
        llm = toy(3)
        tasks = [asyncio.ensure_future(llm.logw_next(split(t))) for t in (b"ab", b"ba", b"abc")]
        for _ in range(passes):
            await asyncio.sleep(0)
        done = tasks[0].done()
        tasks[0].cancel()
        rows = await asyncio.gather(*tasks[1:])
        assert torch.equal(torch.stack([r.weights for r in rows]), truth[1:])
        assert done or tasks[0].cancelled()
        assert (await llm.prefix(b"ab")) == await toy(3).prefix(b"ab")
    assert asyncio.all_tasks() == {asyncio.current_task()}


class Waiting(ToyLM):
    """Gives rows after some turns of the event loop."""

    async def next_token_logprobs(self, token_ids, lora_name=None):
        for _ in range(3):
            await asyncio.sleep(0)
        return self.next_token_logprobs_sync(token_ids)


@pytest.mark.parametrize("passes", range(1, 12))
def test_a_loop_that_stands_still_keeps_nobody_waiting(passes):
    llm, texts = toy(3, lm=Waiting()), [b"ab", b"ba"]
    truth = asyncio.run(toy(3).batch_prefix(texts))
    still = asyncio.new_event_loop()
    calls = [still.create_task(llm.batch_prefix([t])) for t in texts]
    for _ in range(passes):
        still.call_soon(still.stop)
        still.run_forever()

    async def elsewhere():
        async with asyncio.timeout(20):
            return await llm.batch_prefix(texts)

    assert np.array_equal(asyncio.run(elsewhere()), truth)
    then = still.run_until_complete(asyncio.gather(*calls))  # the first loop goes on
    still.close()
    assert np.array_equal(np.concatenate(then), truth)


async def test_cancelling_everyone_leaves_a_working_object():
    llm = toy(3)
    tasks = [asyncio.ensure_future(llm.logw_next(split(t))) for t in (b"abca", b"ba")]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert await llm.prefix(b"abca") == await toy(3).prefix(b"abca")


async def test_an_error_reaches_only_who_caused_it():
    class Short(ToyLM):
        async def next_token_logprobs(self, token_ids, lora_name=None):
            if len(token_ids) > 4:
                raise RuntimeError("too deep")
            return self.row(token_ids)

    llm = toy(2, lm=Short())
    deep = b"cabcabcabcabbabb"
    fine, failed = await asyncio.gather(llm.prefix(b"ab"), llm.prefix(deep), return_exceptions=True)
    assert fine == await toy(2).prefix(b"ab")
    assert isinstance(failed, RuntimeError)


def test_one_object_serves_several_event_loops():
    llm = toy(3)

    async def ask(text):
        return await asyncio.gather(*[llm.prefix(text) for _ in range(3)])

    first = asyncio.run(ask(b"abc"))
    assert asyncio.run(ask(b"abcab"))[0] < first[0]
    assert asyncio.run(ask(b"abc")) == first


# -- prompts ---------------------------------------------------------------------------


async def test_prompts_live_side_by_side():
    base = toy(None)
    exact = Enumeration(base.llm, frozenset(ENDS))
    prompts = [b"", b"a", b"bab", b"ca"]
    llms = [base.with_prompt(p) for p in prompts]
    assert len({id(x.model) for x in llms}) == 1
    got = await asyncio.gather(*[x.prefix(b"ab") for x in llms])
    want = [math.log(exact.prefix(p + b"ab") / exact.prefix(p)) for p in prompts]
    np.testing.assert_allclose(got, want, rtol=1e-10)
    assert await base.prefix(b"ab") == pytest.approx(want[0])
    assert llms[2].prompt_bytes == b"bab"
    assert await llms[2].prompt_weight() == pytest.approx(math.log(exact.prefix(b"bab")))
    calls = len(base.llm.calls)
    await base.with_prompt(b"bab").prefix(b"ab")
    assert len(base.llm.calls) == calls  # rows are shared


async def test_changing_the_prompt_does_not_disturb_calls_under_way():
    llm = toy(3, prompt=b"ab")
    call = asyncio.ensure_future(llm.logw_next(split(b"ab")))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    llm.set_prompt_from_str("ca")
    after = (await llm.logw_next(split(b"ab"))).weights
    truth = [(await toy(3, prompt=p).logw_next(split(b"ab"))).weights for p in (b"ab", b"ca")]
    assert torch.equal((await call).weights, truth[0])
    assert torch.equal(after, truth[1])


async def test_setting_the_same_prompt_keeps_the_beams():
    llm = toy(3)
    llm.set_prompt_from_str("abc")
    await llm.logw_next(split(b"ab"))
    llm.set_prompt_from_str("abc")
    assert llm.cache_info()["entries"] == 2
    assert llm.prompt == Prompt.from_bytes(b"abc")
    with pytest.raises(TypeError, match="str"):
        llm.set_prompt_from_str(b"abc")
    with pytest.raises(ValueError, match="surrogate"):
        llm.set_prompt_from_str("\ud800")


async def test_abandoned_beams_lived_until_the_cyclic_collector_ran():
    llm = toy(3)
    gc.collect()
    gc.disable()
    try:
        refs = []
        for i in range(5):
            llm.set_prompt_from_str("ab" * i)
            await asyncio.gather(*[llm.logw_next(split(t)) for t in (b"", b"ab", b"ba")])
            refs.append(weakref.ref(llm._beams))
        assert [r() is not None for r in refs] == [False, False, False, False, True]
        assert asyncio.all_tasks() == {asyncio.current_task()}
    finally:
        gc.enable()


async def test_the_eos_tokens_mass_leaked_into_text_after_a_prompt():
    lm = ToyLM([*TOY_TOKENS, b"<", b"e"])
    lm.tokenizer = SimpleNamespace(bos_token_id=9, eos_token_id=None)
    after_prompt = await toy(None, lm=lm, prompt=b"a<").logw_next([])
    as_context = await toy(None, lm=lm).logw_next(split(b"a<"))
    torch.testing.assert_close(after_prompt.weights, as_context.weights, atol=1e-12, rtol=0)
    exact = Enumeration(lm, frozenset(ENDS)).logp_next(b"a<")
    np.testing.assert_allclose(after_prompt.weights.numpy(), exact, atol=1e-10)


async def test_a_prompt_could_not_begin_with_the_eos_string():
    llm = toy(None, prompt=b"<e>a")
    assert math.exp(await llm.prompt_weight()) == pytest.approx(
        Enumeration(llm.llm).prefix(b"<e>a"), rel=1e-12
    )
    assert await llm.prefix(b"b") > -math.inf


async def test_an_impossible_prompt_says_so():
    with pytest.raises(ValueError, match="prompt probability zero"):
        await toy(3, prompt=b"xyz").prefix(b"a")


async def test_token_prompts():
    ids = [3, 1]  # ab b
    llm = toy(None, prompt=Prompt.tokens(ids))
    assert llm.prompt_bytes == b"abb"
    row = llm.llm.row((9, *ids)).exp()
    assert math.exp(await llm.prefix(b"c")) == pytest.approx(float(row[[2, 7]].sum()), rel=1e-12)


# -- the end of a text -----------------------------------------------------------------


async def test_without_eos_strings_no_text_could_ever_end(tiny):
    params = BeamParams(K=3)
    llm = ByteLLM(tiny, params, prompt=b"It is done.")
    assert llm.params.eos == {b"<|endoftext|>"}
    assert params.eos == frozenset()  # the caller's are left as they were
    assert llm.beam_params is params
    assert await llm.complete([]) > -20
    assert await llm.logw_eos([]) == await llm.complete([])
    off = ByteLLM(tiny, params, model_eos=False)
    assert await off.complete([]) == -math.inf


def test_eos_tokens_of_the_generation_config_count():
    lm = ToyLM()
    lm.tokenizer.eos_token_id = [9]
    lm.model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[2, 8, 400]))
    assert ByteLLM(lm, BeamParams(K=1)).params.eos == {b"<e>", b"c", b"bb"}


def test_a_model_without_any_end_is_warned_about():
    with pytest.warns(UserWarning, match="no text can end"):
        ByteLLM(ToyLM(), BeamParams(K=1))
    ByteLLM(ToyLM(), BeamParams(K=1), model_eos=False)


async def test_drawing_eos_crashed(tiny):
    lm = ToyLM(seed=3, sharpness=0.1)
    lm.tokenizer.eos_token_id = 9
    params = BeamParams(K=3, eos_byte_strings=ENDS)
    beam = await ByteBeamState.initial(lm, params)
    drawn = [await beam.sample(b"", 40, seed=i) for i in range(5)]
    assert min(map(len, drawn)) < 40
    ended = await (await beam.lanes.step([ord("a")])).step([256])
    assert ended.ended.all()
    assert torch.isneginf(await ended.logp_next()).all()
    llm = ByteLLM(lm, params)
    assert await llm.score([b"a", EOS]) == pytest.approx(ended.log_z[0], abs=1e-12)


async def test_genlm_bytes_own_parameters_are_taken():
    params = GenlmBeamParams(K=2, prune_threshold=0.1, eos_byte_strings=ENDS, heal_max_splits=1)
    llm = ByteLLM(ToyLM(), params)
    assert llm.params == BeamParams(2, 0.1, eos_byte_strings=ENDS, heal_max_splits=1)
    assert await llm.prefix(b"ab") == await toy(2, 0.1).prefix(b"ab")


# -- what cannot be read ---------------------------------------------------------------


async def test_an_impossible_context_raised_instead_of_weighing_zero():
    llm = toy(3)
    for text in (b"x", b"ax", b"axab"):
        assert await llm.prefix(text) == -math.inf
        assert await llm.complete(text) == -math.inf
        with pytest.raises(ValueError, match="weight zero"):
            await llm.logw_next(split(text))
        with pytest.raises(ValueError, match="weight zero"):
            await llm.beam(text)
    rows = (await llm.batch_logw_next([b"ax", b"a", b"axx"])).weights
    assert torch.isneginf(rows[[0, 2]]).all()
    assert torch.equal(rows[1], (await llm.logw_next(b"a")).weights)
    assert (await llm.batch_prefix([b"ax", b""])).tolist() == [-math.inf, 0.0]
    calls = len(llm.llm.calls)
    await llm.batch_prefix([b"ax" * 30, b"axxxxx"])
    assert len(llm.llm.calls) == calls  # nothing is asked about what is impossible


HEALED = [b"a", b"b", b"c", b"x", b"abcd", b"<e>"]


def healing_toy(K):
    lm = ToyLM(HEALED, sharpness=0.5)
    lm.row = lambda context: torch.log_softmax(
        torch.tensor([0.0, 0.0, 0.0, 0.0, 8.0, -1.0], dtype=torch.float64), 0
    )
    return lm, ByteLLM(lm, BeamParams(K, eos_byte_strings=ENDS))


async def test_healing_was_invisible_to_logw_next():
    _, llm = healing_toy(1)
    row = await llm.logw_next(split(b"abc"))
    assert row[b"x"] > -math.inf
    assert await llm.prefix(b"abcx") > -math.inf
    await llm.assert_contract([[], split(b"abc"), split(b"abcx"), split(b"abcxa")], rtol=1e-9)
    assert float(torch.logsumexp(row.weights, 0)) == pytest.approx(0, abs=1e-12)
    assert (await llm.beam(b"abcx")).heals == 1
    off = ByteLLM(llm.llm, BeamParams(1, eos_byte_strings=ENDS, heal=False))
    assert await off.prefix(b"abcx") == -math.inf


async def test_healing_kept_one_of_the_ways_to_go_on():
    """Its weight bounds the sum over all ways from below; random beams have the sum as mean."""
    lm = ToyLM([b"a", b"b", b"c", b"ab", b"bc", b"abcd", b"x", b"<e>"], seed=4, sharpness=0.5)
    exact = Enumeration(lm, frozenset([b"<e>"])).prefix(b"abcx")
    healed = await ByteLLM(lm, BeamParams(1, eos_byte_strings=ENDS)).beam(b"abcx")
    assert healed.logZ < np.log(exact) - 0.1
    drawn = ByteLLM(lm, BeamParams(2, prune="unbiased", eos_byte_strings=ENDS))
    found = np.exp([await drawn.with_seed(i).prefix(b"abcx") for i in range(300)])
    assert abs(found.mean() - exact) < 4 * found.std() / np.sqrt(len(found))
    assert found.std() / np.sqrt(len(found)) < exact / 6


async def test_an_impossible_byte_cost_a_model_call_for_every_way_to_heal():
    tokens = [*split(b"abcdefghijklmnop"), b"abcdefghijklmnop", b"<e>"]
    lm = ToyLM(tokens)
    lm.row = lambda context: torch.log_softmax(torch.eye(18).double()[16] * 20, 0)
    llm = ByteLLM(lm, BeamParams(1, eos_byte_strings=ENDS))
    await llm.logw_next(split(b"abcdefghijklmno"))
    before = forwards(llm)
    assert await llm.prefix(b"abcdefghijklmnoz") == -math.inf
    assert forwards(llm) == before


# -- numbers and vocabularies ----------------------------------------------------------


async def test_a_tokenizer_without_bos_crashed():
    lm = ToyLM()
    lm.tokenizer = SimpleNamespace(bos_token_id=None, eos_token_id=9)
    llm = ByteLLM(lm, BeamParams(K=None))
    assert llm.model.engine.start == (9,)
    exact = Enumeration(ToyLM(), frozenset(ENDS))  # begins with the same token
    assert math.exp(await llm.prefix(b"abc")) == pytest.approx(exact.prefix(b"abc"))


async def test_a_token_at_minus_120_nats_was_lost():
    lm = ToyLM([b"a", b"b", b"<e>"])
    lm.row = lambda context: torch.log_softmax(torch.tensor([0.0, -120.0, 0.0]).double(), 0)
    llm = ByteLLM(lm, BeamParams(K=None, eos_byte_strings=ENDS))
    assert await llm.prefix(b"bbb") == pytest.approx(-3 * (120 + math.log(2)), abs=1e-9)


async def test_a_token_that_spells_nothing_cost_the_row_its_mass():
    lm = ToyLM([*TOY_TOKENS, b""])
    lm.tokenizer = SimpleNamespace(bos_token_id=9, eos_token_id=None)
    for llm in (toy(None, lm=lm), toy(2, 0.05, lm=lm)):
        rows = (await llm.batch_logw_next([b"", b"a", b"ab"])).weights
        torch.testing.assert_close(torch.logsumexp(rows, 1), torch.zeros(3).double())
    exact = Enumeration(lm, frozenset(ENDS))
    assert math.exp(await toy(None, lm=lm).prefix(b"abca")) == pytest.approx(exact.prefix(b"abca"))


async def test_padded_heads_and_float32_rows():
    lm = ToyLM(dtype=torch.float32, pad=7)
    exact = Enumeration(lm, frozenset(ENDS))
    assert math.exp(await toy(None, lm=lm).prefix(b"abc")) == pytest.approx(exact.prefix(b"abc"))


async def test_a_text_beyond_the_window_is_refused():
    lm = ToyLM(split(b"abc") + ENDS)
    as_engine(lm).window = 7
    llm = toy(2, lm=lm)
    assert await llm.complete(b"abcabc") > -math.inf
    assert await toy(2, lm=lm).prefix(b"abcabca") > -math.inf
    with pytest.raises(ContextTooLongError):
        await llm.prefix(b"abcabcab")


# -- lanes for a particle loop ---------------------------------------------------------


async def test_lanes_begin_after_the_prompt_which_is_read_once():
    llm = toy(3, prompt=b"abcab")
    row = (await llm.logw_next([])).weights
    calls = len(llm.llm.calls)
    lanes = await llm.lanes(6)
    assert isinstance(lanes, ByteLanes)
    assert torch.equal(await lanes.logp_next(), row.expand(6, 257))
    assert len(llm.llm.calls) == calls
    stepped = await lanes.step(np.array(list(b"abbaca")))
    rows = (await llm.batch_logw_next(split(b"abbaca"))).weights
    torch.testing.assert_close(await stepped.logp_next(), rows, rtol=0, atol=0)


async def test_lanes_with_prompts_of_their_own_estimate_the_prompt_without_bias():
    lm = ToyLM(seed=2)
    llm = toy(1, prune="unbiased", lm=lm, prompt=b"abcab")
    z = np.exp((await llm.lanes(400, independent_prompts=True)).log_z)
    truth = Enumeration(lm).prefix(b"abcab")
    assert z.std() > 0
    assert abs(z.mean() - truth) < 4 * z.std() / 20
    with pytest.raises(ValueError, match="unbiased"):
        await toy(1).lanes(3, independent_prompts=True)
    with pytest.raises(ValueError, match="at least 1"):
        await toy(1).lanes(0)


# -- the object ------------------------------------------------------------------------


async def test_context_manager_leaves_nothing_behind():
    async with toy(3) as llm:
        await llm.batch_logw_next([b"ab", b"ba"])
        assert llm.cache_info()["entries"] == 4
        assert llm.cache_info()["bytes"] > 4 * 257 * 8
    assert llm.cache_info() == {"entries": 0, "bytes": 0, "evicted": 0, "batches": 1}
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert await llm.prefix(b"ab") > -math.inf  # and it can be used on


async def test_memory_stays_under_its_limit():
    llm = toy(3, cache_bytes=100_000)
    for seed in range(20):
        await llm.batch_logw_next(random_texts([8] * 4, seed))
        assert llm.cache_info()["bytes"] <= 100_000
    assert llm.cache_info()["evicted"] > 0


async def test_copies():
    llm = toy(3, prompt=b"ab")
    other = llm.spawn()
    assert other is not llm
    assert other.model is llm.model
    assert other.prompt == llm.prompt
    assert await other.prefix(b"c") == await llm.prefix(b"c")
    assert copy.deepcopy(llm) is llm
    assert "K=3" in repr(llm)
    assert "b'ab'" in repr(llm)


async def test_from_name():
    params = BeamParams(K=2, prune_threshold=0.1)
    llm = ByteLLM.from_name("tiny", params, prompt=b"Hello", device="cpu", cache_size=7)
    assert llm.cache_size == 7
    assert llm.prompt_bytes == b"Hello"
    assert await llm.prefix(b" world") < 0


async def test_input_is_checked():
    lm = ToyLM()
    with pytest.raises(TypeError, match="BeamParams"):
        ByteLLM(lm, {"K": 3})
    with pytest.raises(TypeError, match="Prompt"):
        toy(1, prompt="text")
    with pytest.raises(ValueError, match="spelled b'<nope>'"):
        ByteLLM(lm, BeamParams(K=1, eos_byte_strings=[b"<nope>"]))
    for option in ({"cache_size": 0}, {"cache_bytes": -1}, {"cache_size": 2.5}):
        with pytest.raises(ValueError, match="at least 1"):
            toy(1, **option)
    llm = toy(1)
    with pytest.raises(TypeError, match="97"):
        await llm.prefix([97])
    with pytest.raises(ValueError, match="exactly one byte"):
        await llm.prefix([b"ab"])
    for batch in (llm.batch_prefix, llm.batch_complete, llm.batch_logw_next):
        with pytest.raises(ValueError, match="non-empty"):
            await batch([])
