"""Deferred pruning: exact without thresholds, the slow reading's equal, and near the truth."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from benchmarks.lattice import Lattice, Rows
from genlm_bytes_smc import BeamParams, ByteBeamState, ByteLLM, Prompt, smc
from genlm_bytes_smc.beam import deferred_nodes
from genlm_bytes_smc.beam.deferred import DeferredLanes
from genlm_bytes_smc.beam.deferred_reading_numba import AT_ONCE
from genlm_bytes_smc.beam.deferred_text import read_texts, to_candidates
from genlm_bytes_smc.beam.model import byte_model
from genlm_bytes_smc.constraints import FiniteSet
from genlm_bytes_smc.smc.ensembles import lanes_of
from tests.toys import EOS_TOKEN, TOY_TOKENS, Enumeration, ToyLM

EXACT = 1e-9
WIDE = {"deferred_rows": 10**6, "deferred_limit": 10**6}
ALL = {"deferred_share": 0.0, "deferred_merge": 0.0, **WIDE}
TEXTS = (
    b"An apple a day keeps the doctor away.",
    "Le conseil était là.".encode(),
    b"xylophonists & 123, quite unlike",
    b"\xff\xfe no text",
)


def params(**options):
    return BeamParams(None, prune="deferred", **options)


async def read(lanes, text):
    for byte in text:
        lanes = await lanes.step([byte] * len(lanes))
    return lanes


@pytest.mark.parametrize("eos", [frozenset(), frozenset([EOS_TOKEN])])
@pytest.mark.parametrize("seed", [0, 1])
async def test_without_thresholds_it_is_exact(seed, eos):
    lm = ToyLM(seed=seed)
    truth = Enumeration(lm, eos)
    root = await ByteBeamState.initial(lm, params(**ALL, eos_byte_strings=list(eos)))
    for s in map(bytes, itertools.product(b"abc", repeat=5)):
        beam = root
        for n, byte in enumerate(s):
            row = (await beam.logp_next()).ps
            exact = truth.logp_next(s[:n])
            np.testing.assert_allclose(np.append(row[:256], row[257]), exact, atol=EXACT)
            beam = await (beam << byte)
        assert beam.logZ == pytest.approx(math.log(truth.prefix(s)), abs=EXACT)
        assert beam.dropped == -np.inf
        ended = truth.ended(s)
        assert (await (beam << 257)).logZ == pytest.approx(
            math.log(ended) if ended else -np.inf, abs=EXACT
        )


@pytest.mark.parametrize(
    "lm",
    [
        ToyLM([*TOY_TOKENS[:-1], b"", EOS_TOKEN], seed=7),
        ToyLM(seed=8, pad=5),
        ToyLM([*TOY_TOKENS, EOS_TOKEN, b"<x>"], seed=10),
        ToyLM([*TOY_TOKENS[:-1], b"ab" * 700, EOS_TOKEN], seed=11),
    ],
    ids=["zero-length token", "padded head", "two ends", "long token"],
)
async def test_odd_vocabularies(lm):
    eos = frozenset([EOS_TOKEN])
    truth = Enumeration(lm, eos)
    root = await ByteBeamState.initial(lm, params(**ALL, eos_byte_strings=list(eos)))
    exact = await ByteBeamState.initial(lm, BeamParams(None, eos_byte_strings=list(eos)))
    for s in (b"a", b"abab", b"cabb"):
        beam = await root.prefill(s)
        assert beam.logZ == pytest.approx((await exact.prefill(s)).logZ, abs=EXACT)
        beam = root
        for byte in s:
            beam = await (beam << byte)
        assert beam.logZ == pytest.approx(math.log(truth.prefix(s)), abs=EXACT)


async def test_a_token_longer_than_the_window_stays_in_flight():
    lm = ToyLM([*TOY_TOKENS[:-1], b"ab" * 60, EOS_TOKEN], seed=11)
    exact = await ByteBeamState.initial(lm, BeamParams(K=64))
    beam = await ByteBeamState.initial(lm, params(deferred_share=1e-6, deferred_merge=1e-6))
    for byte in b"ab" * 60:
        exact, beam = await (exact.prune() << byte), await (beam << byte)
    assert beam.logZ == pytest.approx(exact.logZ, abs=0.05)


@pytest.mark.parametrize("text", TEXTS)
async def test_it_does_what_the_slow_reading_does(tiny, text):
    model = byte_model(tiny)
    slow = Rows(tiny, model.trie)
    lattice = Lattice(slow, tuple(tiny.start), at_once=AT_ONCE)
    wide = params(**WIDE)
    lanes = await DeferredLanes.start(model, wide)
    for byte in text:
        lattice.read(byte)
        lanes = await lanes.step([byte])
        assert lanes.log_z[0] == pytest.approx(lattice.log_z, abs=1e-4)
    model.store.clear()
    before = tiny.counts.rows
    again = await read(await DeferredLanes.start(model, wide), text)
    assert tiny.counts.rows - before == slow.rows
    assert again.log_z == pytest.approx(lanes.log_z, abs=1e-5)  # rows come in other forwards


async def test_a_text_that_wants_many_rows_is_read_in_several_calls(tiny, monkeypatch):
    """What is noted in one call, and the room for nodes, change nothing."""
    model, calls = byte_model(tiny), [0]

    def judge(*args):
        calls[0] += 1
        return compiled(*args)

    compiled = deferred_nodes.rd.judge
    monkeypatch.setattr(deferred_nodes.rd, "judge", judge)
    start = await DeferredLanes.start(model, params(deferred_merge=1e-6, deferred_readings=2), 2)
    found, counts = [], []
    for room in (10_000, 0):
        calls[0] = 0
        monkeypatch.setattr(deferred_nodes, "NOTED", room)
        lanes, weights = await read_texts(start, [TEXTS[0], PROSE])
        found.append((lanes.log_z, lanes.log_dropped, *weights, lanes.nodes.ints[:, :, :5]))
        counts.append(calls[0])
    assert counts[0] + 5 < counts[1]  # two readings, and wherever there is no room for a node
    for once, often in zip(*found, strict=True):
        np.testing.assert_array_equal(once, often)


async def test_lanes_side_by_side_are_what_they_are_alone(tiny):
    model = byte_model(tiny)
    start = await DeferredLanes.start(model, params(prune_threshold=0.05), len(TEXTS))
    together, alone = start, [start.gather([n]) for n in range(len(TEXTS))]
    for i in range(max(map(len, TEXTS))):
        symbols = [t[i] if i < len(t) else -1 for t in TEXTS]
        rows = await together.logp_next()
        assert torch.logsumexp(rows, 1).abs().max() < EXACT
        together = await together.step(symbols)
        alone = [await x.step([s]) for x, s in zip(alone, symbols, strict=True)]
        if i % 5 == 0:  # forked, joined and shuffled, they go on the same
            order = np.roll(np.arange(len(TEXTS)), i)
            mixed = together.gather(order)
            back = DeferredLanes.cat([mixed.gather([k]) for k in np.argsort(order)])
            together = back
        for n, x in enumerate(alone):
            assert together.log_z[n] == pytest.approx(x.log_z[0], abs=EXACT)
            assert together.log_dropped[n] == pytest.approx(x.log_dropped[0], abs=1e-6)


async def test_rows_promise_what_likely_bytes_weigh_and_leave_no_byte_out(tiny):
    lanes = await DeferredLanes.start(byte_model(tiny), params(prune_threshold=0.05))
    for byte in TEXTS[0]:
        row = await lanes.logp_next()
        assert row.isfinite()[0, :256].all() or lanes.log_dropped[0] == -np.inf
        after = await lanes.step([byte])
        assert float(after.log_z[0] - lanes.log_z[0]) == pytest.approx(
            float(row[0, byte]), abs=2e-3
        )
        lanes = after


async def test_a_surprise_is_not_lost(tiny):
    """A threshold that drops before the byte loses nats; the deferred beam loses hardly any."""
    text = TEXTS[2]
    wide = (await (await ByteBeamState.initial(tiny, BeamParams(K=64))).prefill(text)).logZ
    narrow = BeamParams(K=5, prune_threshold=0.05)
    lost = wide - (await (await ByteBeamState.initial(tiny, narrow)).prefill(text)).logZ
    beam = await (await ByteBeamState.initial(tiny, params(prune_threshold=0.05))).prefill(text)
    assert abs(wide - beam.logZ) < 0.5
    assert abs(wide - beam.logZ) < 0.5 * lost


async def test_prompts_of_tokens_and_prompts_that_end_inside_a_token(tiny):
    ids = tiny.tokenizer.encode("An apple a day")
    wide = await ByteBeamState.initial(tiny, BeamParams(K=64))
    beam = await ByteBeamState.initial(tiny, params())
    for prompt in (Prompt.tokens(ids), Prompt.text("An appl"), b"An apple a day keeps the "):
        exact, near = await wide.prefill(prompt), await beam.prefill(prompt)
        assert near.logZ == pytest.approx(exact.logZ, abs=2e-3)
        best, row = (await exact.logp_next()).top(3), (await near.logp_next()).ps
        for byte, logp in best.items():
            assert row[byte[0]] == pytest.approx(logp, abs=0.1)
    assert (
        await beam.greedy(b"An apple a day keeps the ", 10)
        == b"An apple a day keeps the doctor awa"
    )


async def test_what_is_forgotten_does_not_change_a_weight(tiny):
    llm = ByteLLM(tiny, params(prune_threshold=0.05), prompt=b"An apple ")
    texts = [b"a day keeps", b"a day", b"xyl", b"xylo", b"\xff"]
    weights = await llm.batch_prefix(texts)
    complete = await llm.batch_complete(texts)
    llm.clear_cache()
    llm.model.store.clear()
    again = [await llm.prefix(t) for t in texts]
    np.testing.assert_allclose(again, weights, atol=1e-4)
    np.testing.assert_allclose([await llm.complete(t) for t in texts], complete, atol=1e-4)
    wide = ByteLLM(tiny, BeamParams(K=64), prompt=b"An apple ")
    np.testing.assert_allclose(weights, await wide.batch_prefix(texts), atol=0.05)


PROSE = (
    b"An apple a day keeps the doctor away. The man went down to the sea, and there he saw a "
    b"ship with white sails, which had come from the north in the night. He asked the captain "
    b"where they were going, and the captain said that they were going home."
)


async def test_a_known_text_takes_few_forwards_and_weighs_what_its_steps_weigh(tiny):
    """Prose by `prefix`: at most four forwards and two rows a token, near its byte by byte."""
    llm = ByteLLM(tiny)
    llm.model.store.clear()
    tiny.clear_cache()
    before = tiny.counts.forwards, tiny.counts.rows
    whole = await llm.prefix(PROSE)
    assert tiny.counts.forwards - before[0] <= 4
    assert tiny.counts.rows - before[1] <= 2 * len(llm.model.canonical(PROSE))
    patient = params(deferred_readings=100)
    settled, _ = await read_texts(await DeferredLanes.start(llm.model, patient), [PROSE])
    stepped = await read(await DeferredLanes.start(llm.model, patient), PROSE)
    assert settled.log_z[0] == pytest.approx(stepped.log_z[0], abs=1)
    assert abs(whole - settled.log_z[0]) < 0.1 * len(PROSE)


async def test_known_texts_side_by_side_weigh_what_they_weigh_alone(tiny):
    """Texts of several lengths, one that is no text among them, in one reading."""
    texts = [*TEXTS, PROSE[:100], b"", b"a"]
    start = await DeferredLanes.start(byte_model(tiny), params(), len(texts))
    together, _ = await read_texts(start, texts)
    for n, text in enumerate(texts):
        alone, _ = await read_texts(start.gather([n]), [text])
        assert together.log_z[n] == pytest.approx(alone.log_z[0], abs=0.5)


async def test_readings_go_on_from_where_others_stopped(tiny):
    """A text in two parts, cut inside a word, weighs nearly what it weighs as one."""
    start = await DeferredLanes.start(byte_model(tiny), params())
    text = PROSE[:37]
    whole, _ = await read_texts(start, [text])
    for cut in (3, 10, 22):
        first, _ = await read_texts(start, [text[:cut]])
        parts, _ = await read_texts(first, [text[cut:]])
        assert parts.log_z[0] == pytest.approx(whole.log_z[0], abs=0.05)


@pytest.mark.parametrize("seed", [0, 1])
async def test_known_texts_are_exact_without_thresholds(seed):
    """Against enumeration, all texts of five letters in one reading."""
    lm = ToyLM(seed=seed)
    truth = Enumeration(lm, frozenset())
    texts = [bytes(t) for t in itertools.product(b"abc", repeat=5)]
    start = await DeferredLanes.start(byte_model(lm), params(**ALL), len(texts))
    after, _ = await read_texts(start, texts)
    exact = [math.log(truth.prefix(t)) for t in texts]
    np.testing.assert_allclose(after.log_z, exact, atol=EXACT)


async def test_no_row_is_computed_that_nobody_asks_for(tiny):
    """`prefix` needs no row after the text, `logw_next` one for it, and no other lane's."""
    llm = ByteLLM(tiny, prompt=b"An apple ")
    await llm.batch_prefix([b"a day", b"xylo"])
    before = tiny.counts.rows
    await llm.batch_prefix([b"a day", b"xylo"])
    assert tiny.counts.rows == before
    row = (await llm.logw_next(b"a day")).weights
    rows = (await llm.batch_logw_next([b"a day", b"xylo"])).weights
    np.testing.assert_allclose(rows[0], row, atol=EXACT)


async def test_the_default_of_bytellm_is_deferred(tiny):
    """Without parameters, weights are near those of a wide beam where a narrow one loses nats."""
    llm = ByteLLM(tiny)
    assert llm.params.prune == "deferred"
    wide = ByteLLM(tiny, BeamParams(K=64))
    for text in TEXTS[:2]:
        assert await llm.prefix(text) == pytest.approx(await wide.prefix(text), abs=0.2)
        assert await llm.complete(text) == pytest.approx(await wide.complete(text), abs=0.3)


async def test_particles_are_weighed_after_the_byte(tiny):
    """Of a finite constraint of surprising texts, smc finds the posterior of a wide beam."""
    texts = [b"xylo", b"xenon", b"quartz", b"the", b"zebra"]
    wide = ByteLLM(tiny, BeamParams(K=64))
    exact = await wide.batch_complete(texts)
    truth = np.exp(exact - np.logaddexp.reduce(exact))
    llm = ByteLLM(tiny, params(prune_threshold=0.05))
    own = await llm.batch_complete(texts)
    for text, weight, mine in zip(texts, exact, own, strict=True):
        one = await smc(llm * FiniteSet([text]), 1, max_bytes=10, progress=False)
        assert one.log_ml == pytest.approx(weight, abs=0.3)
        assert one.log_ml == pytest.approx(mine, abs=1e-6)
    # Without resampling, which would give up the likeliest text for its unlikely end.
    result = await smc(llm * FiniteSet(texts), 2000, 0.0, seed=3, max_bytes=10, progress=False)
    assert result.log_ml == pytest.approx(np.logaddexp.reduce(own), abs=0.1)
    assert result.log_ml == pytest.approx(np.logaddexp.reduce(exact), abs=0.3)
    found = [result.decoded_posterior.get(t.decode(), 0.0) for t in texts]
    assert 0.5 * np.abs(np.array(found) - truth).sum() < 0.1


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"deferred_share": 1.5}, ValueError),
        ({"deferred_merge": "a"}, TypeError),
        ({"deferred_guess": 0}, ValueError),
        ({"deferred_rows": 0}, ValueError),
        ({"deferred_limit": 2.5}, TypeError),
    ],
)
def test_options_out_of_range_are_refused(options, error):
    with pytest.raises(error, match=next(iter(options))):
        params(**options)


@pytest.mark.parametrize("seed", [48, 49, 50, 55, 59])
async def test_contexts_with_rows_leave_room_for_those_without(seed):
    """Nearly all that begins with "ab" is "abd" here, so that "a" gets its row only after "c"."""
    lm = ToyLM([b"a", b"b", b"c", b"abd", b"<e>"], seed=seed, sharpness=6.0)
    beam = await ByteBeamState.initial(lm, params(deferred_limit=1))
    for byte in b"abc":
        beam = await (beam << byte)
    assert beam.logZ == pytest.approx(math.log(Enumeration(lm).prefix(b"abc")), abs=EXACT)


async def test_a_text_that_ends_is_judged_among_what_ends_with_it():
    """Where nearly all mass is in a longer token, its end is found by contexts without a row."""
    llm = ToyLM([b"b", b"c", b"a", b"ca", b"bab", b"ac", b"<e>"], seed=3, sharpness=1.0)
    exact = Enumeration(llm, frozenset([b"<e>"]))
    deferred = ByteLLM(llm, BeamParams(None, prune="deferred", eos_byte_strings=[b"<e>"]))
    for text in (b"", b"b", b"ba", b"bab", b"ca", b"ac", b"bac"):
        truth = exact.ended(text)
        assert await deferred.complete(text) == pytest.approx(np.log(truth), abs=0.1), text


async def test_candidates_of_deferred_lanes_read_on_alike(tiny):
    """Top-K lanes made of deferred ones weigh the next bytes as those do."""
    deferred = await ByteLLM(tiny, prompt=b"An apple a day ").lanes(1)
    other = to_candidates(deferred, dataclasses.replace(deferred.params, K=64, prune="topk"))
    for byte in b"keeps":
        deferred, other = await deferred.step([byte]), await other.step([byte])
        assert other.log_z == pytest.approx(deferred.log_z, abs=0.05)


async def test_a_drawn_text_weighs_what_it_is_worth(tiny):
    """In a free run, too: an end that its row forecasts wrongly weighs what `complete` says."""
    options = params(prune_threshold=0.1, eos_byte_strings=[b"\n"])
    llm = ByteLLM(tiny, options, prompt=b"Who lives where:\nMarie lives in Paris.\n")
    row = (await llm.logw_next(b"no")).weights[-1]
    true = await llm.complete(b"no") - await llm.prefix(b"no")
    assert row > true + 1
    (lanes,) = [await lanes_of(llm)]
    for byte in b"no":
        lanes, _ = await lanes.step(np.array([byte]))
    assert (await lanes.ended())[0] == pytest.approx(true, abs=1e-6)


class ZerosLM(ToyLM):
    """A toy in whose rows most tokens are impossible, as after top-k or top-p."""

    def row(self, context):
        logits = super().row(context).clone()
        logits[logits < logits.topk(3).values[-1]] = -math.inf
        return torch.log_softmax(logits, dim=0)


@pytest.mark.parametrize("limits", [(0.02, 0.003, 0.1), (0.5, 0.3, 0.9), (1.0, 1.0, 0.0)])
async def test_no_text_is_lost_that_some_tokens_spell(limits):
    """Where every row of a position gives zero, another context may still spell the text or end it;
    and proposals leave out no symbol that such a context may give."""
    share, merge, threshold = limits
    setting = params(
        prune_threshold=threshold, deferred_share=share, deferred_merge=merge,
        eos_byte_strings=[EOS_TOKEN],
    )  # fmt: skip
    counts = np.zeros(2, dtype=int)
    for seed in range(6):
        lm = ZerosLM(seed=seed)
        truth = Enumeration(lm, frozenset([EOS_TOKEN]))
        for s in map(bytes, itertools.product(b"abc", repeat=4)):
            byte_by_byte, whole = ByteLLM(lm, setting), ByteLLM(lm, setting)
            for n in range(4):
                await byte_by_byte.prefix(s[:n])
            possible, ends = truth.prefix(s) > 0, truth.ended(s) > 0
            counts += possible, ends
            for llm in (byte_by_byte, whole):
                assert (await llm.prefix(s) > -np.inf) == possible
                assert (await llm.complete(s) > -np.inf) == ends
            if possible:
                row = (await whole.logw_next(s)).weights
                assert (row[truth.logp_next(s) > -np.inf] > -np.inf).all()
    assert (counts > 10).all()


async def test_what_a_whole_text_weighs_is_judged_by_the_limits_of_weights():
    """Not by `prune_threshold`, which is that of proposals."""
    lm = ToyLM(seed=3, sharpness=5.0)
    truth = Enumeration(lm, frozenset([EOS_TOKEN]))
    llm = ByteLLM(lm, params(prune_threshold=0.9, eos_byte_strings=[EOS_TOKEN], **ALL))
    for s in map(bytes, itertools.product(b"abc", repeat=3)):
        assert await llm.complete(s) == pytest.approx(math.log(truth.ended(s)), abs=EXACT)
