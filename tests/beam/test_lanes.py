"""Many lanes at once: batched = looped, forks and gathers, dead lanes, counts of LM work."""

import asyncio

import numpy as np
import pytest
import torch

from genlm_bytes_smc import BeamParams, ByteBeamState, ByteLanes, load_model, trie
from genlm_bytes_smc.beam import candidates_numba, pruning_numba, steps_numba
from genlm_bytes_smc.beam.known_text import read_text
from genlm_bytes_smc.beam.model import byte_model
from tests.toys import EOS_TOKEN, ToyLM

SETTINGS = [
    BeamParams(3, 0.0, eos_byte_strings=[EOS_TOKEN]),
    BeamParams(2, 0.2, eos_byte_strings=[EOS_TOKEN]),
    BeamParams(2, 0.2, eos_byte_strings=[EOS_TOKEN], prune="unbiased", seed=4),
    BeamParams(None, 0.0, eos_byte_strings=[EOS_TOKEN]),
]
WORDS = [b"abca", b"abcb", b"bbab", b"caba", b"abca"]


async def looped(model, params, word):
    lanes = await ByteLanes.start(model, params)
    for byte in word:
        lanes = await lanes.step([byte])
    return lanes


@pytest.mark.parametrize("params", SETTINGS)
async def test_a_batch_of_lanes_is_its_lanes_one_by_one(params):
    model = byte_model(ToyLM(seed=1))
    batch = await ByteLanes.start(model, params, len(WORDS))
    for column in zip(*WORDS, strict=True):
        batch = await batch.step(list(column))
    rows = await batch.logp_next()
    for n, word in enumerate(WORDS):
        single = await looped(byte_model(ToyLM(seed=1)), params, word)
        assert batch.log_z[n] == pytest.approx(single.log_z[0], abs=1e-12)
        assert batch.log_dropped[n] == pytest.approx(single.log_dropped[0], abs=1e-9)
        np.testing.assert_allclose(rows[n], (await single.logp_next())[0], atol=1e-12)


@pytest.mark.parametrize("params", SETTINGS)
async def test_gather_forks_without_changing_anything(params):
    model = byte_model(ToyLM(seed=2))
    lanes = await ByteLanes.start(model, params, 3)
    lanes = await lanes.step(list(b"abc"))
    before = await lanes.logp_next()
    forward = model.engine.counts.forwards
    forked = lanes.gather([2, 0, 0, 1])
    assert torch.equal(await forked.logp_next(), before[[2, 0, 0, 1]])
    assert model.engine.counts.forwards == forward
    both = ByteLanes.cat([lanes, forked])
    assert torch.equal(await both.logp_next(), torch.cat([before, before[[2, 0, 0, 1]]]))
    stepped = await forked.step(list(b"abba"))
    alone = await lanes.gather([0]).step([ord("b")])
    assert stepped.log_z[1] == pytest.approx(alone.log_z[0], abs=1e-12)


async def test_dead_lanes_stay_dead_and_cost_nothing():
    model = byte_model(ToyLM(seed=3))
    params = BeamParams(3, heal=False)
    lanes = await ByteLanes.start(model, params, 4)
    lanes = await lanes.step([ord("a"), ord("z"), ord("b"), ord("z")])
    assert (lanes.log_z[[1, 3]] == -np.inf).all()
    assert (lanes.log_z[[0, 2]] > -np.inf).all()
    rows = await lanes.logp_next()
    assert (rows[[1, 3]] == -torch.inf).all()
    alone = byte_model(ToyLM(seed=3))
    other = await (await ByteLanes.start(alone, params, 2)).step(list(b"ab"))
    np.testing.assert_allclose(rows[[0, 2]], await other.logp_next(), atol=1e-12)
    assert model.engine.counts.rows == alone.engine.counts.rows
    lanes = await lanes.step([ord("b"), -1, ord("a"), -1])
    assert (lanes.log_z[[1, 3]] == -np.inf).all()


async def test_ended_lanes_keep_their_weight():
    model = byte_model(ToyLM(seed=3))
    lanes = await ByteLanes.start(model, SETTINGS[0], 2)
    lanes = await lanes.step(list(b"ab"))
    weight = lanes.log_z + (await lanes.logp_next())[:, 256].numpy()
    lanes = await lanes.step([256, ord("a")])
    assert lanes.ended.tolist() == [True, False]
    assert lanes.log_z[0] == pytest.approx(weight[0], abs=1e-9)
    assert lanes.alive.tolist() == [False, True]
    again = await lanes.step([-1, ord("b")])
    assert again.log_z[0] == lanes.log_z[0]
    assert ((await again.logp_next())[0] == -torch.inf).all()


@pytest.mark.parametrize("n", [1, 8, 64])
@pytest.mark.parametrize("K", [1, 5])
async def test_one_forward_a_byte_step_whatever_n_and_k(n, K):
    engine = load_model("tiny")
    engine.counts.reset()
    lanes = await ByteLanes.start(byte_model(engine), BeamParams(K), n)
    rng = np.random.default_rng(0)
    assert engine.counts.forwards == 1
    for step in range(12):
        rows = (await lanes.logp_next()).numpy()
        assert engine.counts.forwards <= 1 + step + 1
        p = np.exp(rows[:, :256])
        symbols = [rng.choice(256, p=q / q.sum()) for q in p]
        lanes = await lanes.step(symbols)
    texts = {tuple(x) for x in lanes.state.ctx.tolist()}
    assert n == 1 or len(texts) > 1


async def test_equal_contexts_are_asked_once():
    lm = ToyLM(seed=5)
    lanes = await ByteLanes.start(byte_model(lm), BeamParams(4), 50)
    for byte in b"abcabc":
        lanes = await lanes.step([byte] * 50)
    assert len(lm.calls) == len(set(lm.calls))


async def test_prefill_is_the_same_as_byte_by_byte(tiny):
    text = "An apple a day; naïve café 東京, and {'k': [1, 2]} zzqx".encode()
    for params in (
        BeamParams(5, 0.0),
        BeamParams(5, 0.05),
        BeamParams(1, 0.3),
        BeamParams(8, prune="unbiased", seed=9),
    ):
        slow = await ByteBeamState.initial(tiny, params)
        fast = await slow.prefill(text)
        for byte in text:
            slow = await (slow.prune() << byte)
        assert fast.logZ == pytest.approx(slow.logZ, abs=1e-9)
        assert [c.tokens for c in fast] == [c.tokens for c in slow]
        assert fast.dropped == pytest.approx(slow.dropped, abs=1e-6)
        np.testing.assert_allclose(
            (await fast.logp_next()).ps, (await slow.logp_next()).ps, atol=1e-9
        )


async def test_a_long_prompt_takes_a_few_forwards():
    engine = load_model("tiny")
    text = b"The quick brown fox jumps over the lazy dog. " * 20
    engine.counts.reset()
    beam = await ByteBeamState.initial(engine, BeamParams(5, 0.05))
    await beam.prefill(text)
    assert engine.counts.forwards <= 12
    assert engine.counts.rows <= len(text)


async def test_small_limits_only_cost_recomputation(tiny):
    text = b"An apple a day keeps the doctor away, they say."
    params = BeamParams(5)
    free = await (await ByteBeamState.initial(tiny, params)).prefill(text)
    tight = load_model("tiny", limit_bytes=1 << 20)
    model = byte_model(tight, None, 20 * 8 * 8192)
    lanes = await ByteLanes.start(model, params)
    lanes = await read_text(await lanes.as_prompt(), text)
    lanes = await lanes.as_text()
    assert lanes.log_z[0] == pytest.approx(free.logZ, abs=1e-4)
    for byte in b" And so":
        free, lanes = await (free.prune() << byte), await lanes.prune().read(byte)
    assert lanes.log_z[0] == pytest.approx(free.logZ, abs=1e-4)
    assert model.store.memory()["evicted"] > 0
    assert model.store.memory()["bytes"] <= 64 * 8 * 8192


async def test_thirty_two_users_share_one_trie_and_one_forward_a_step():
    lm = ToyLM([b"a", b"b", b"ab", b"only here", EOS_TOKEN], seed=1)
    before = trie.builds

    async def user(i):
        beam = await ByteBeamState.initial(lm, BeamParams(3))
        for byte in b"abab":
            beam = await (beam << byte)
        return beam.logZ

    results = await asyncio.gather(*(user(i) for i in range(32)))
    assert trie.builds == before + 1
    assert len(set(results)) == 1
    assert len(lm.calls) == len(set(lm.calls))


async def test_memory_of_a_lane():
    """A candidate is five numbers; a lane holds no row and no model state."""
    lanes = await ByteLanes.start(byte_model(ToyLM()), BeamParams(5), 1000)
    for byte in b"abc":
        lanes = await lanes.step([byte] * 1000)
    arrays = lanes.state
    assert sum(a.nbytes for a in arrays) <= 1000 * (5 * 4 * 8 + 8)


@pytest.mark.parametrize(
    ("symbols", "words"),
    [
        ([1], "one integer symbol for each of 2 lanes"),
        ([1, 300], "-1 to 256"),
        ([0.5, 1], "integer"),
    ],
)
async def test_bad_symbols(symbols, words):
    lanes = await ByteLanes.start(byte_model(ToyLM()), BeamParams(2), 2)
    with pytest.raises(ValueError, match=words):
        await lanes.step(symbols)


@pytest.mark.parametrize("prune", ["topk", "unbiased"])
async def test_a_byte_step_is_two_compiled_calls(prune, tiny, monkeypatch):
    """One looks and gives the rows, one reads, prunes and extends; with either pruning."""
    lanes = await ByteLanes.start(byte_model(tiny), BeamParams(5, 0.01, prune=prune), 8)

    async def read(lanes, text):
        for byte in text:
            row = await lanes.logp_next()
            lanes = await lanes.gather(np.arange(8)[::-1]).step([byte] * 8)
        return row, lanes

    await read(lanes, b"An apple a day")  # compile, and learn what healing may take
    called = []

    def counted(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: (called.append(name), function(*args))[1])

    for name in ("step", "look", "read", "prune"):
        counted(steps_numba, name)
    for module, names in (
        (candidates_numba, ("advance", "extensions")),
        (pruning_numba, ("logsumexp_rows", "select_topk", "take")),
    ):
        for name in names:
            counted(module, name)
    row, lanes = await read(lanes, b"An app")
    assert called == [*["step", "look"] * 5, "step"]
    if prune == "topk":
        np.testing.assert_allclose(np.exp(row.numpy()).sum(axis=1), 1.0, rtol=1e-12)
