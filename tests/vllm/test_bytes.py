"""Beams, potentials and particles over vLLM against the other engines."""

import numpy as np
import pytest

from genlm_bytes_smc import BeamParams, ByteBeamState, as_engine, load_model
from genlm_bytes_smc.beam.model import ByteModel
from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.lm.rows import RowTransform
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import smc, smc_many
from tests.lm.families import use_forward

TEXT = b"An apple a day keeps the doctor away, said the"
PARAMS = {
    "topk": BeamParams(K=5, prune_threshold=0.02),
    "unbiased": BeamParams(K=4, prune_threshold=0.02, prune="unbiased", seed=3),
}


@pytest.fixture(scope="module")
def whole(tiny):
    """The same weights by whole forwards, without any cache of keys and values."""
    engine = load_model("tiny", device="cpu")
    use_forward(engine, "whole")
    return engine


@pytest.fixture
def engines(engine, tiny, whole):
    return {"vllm": engine, "tree": tiny, "whole": whole}


@pytest.mark.parametrize("prune", ["topk", "unbiased"])
async def test_beams_agree(engines, prune):
    seen = {}
    for name, engine in engines.items():
        beam = await (await ByteBeamState.initial(engine, PARAMS[prune])).prefill(TEXT)
        row = (await beam.lanes.logp_next()).numpy()[0]
        seen[name] = beam.lanes.log_z[0], beam.lanes.log_dropped[0], row
    want = seen.pop("tree")
    for name, (log_z, dropped, row) in seen.items():
        assert log_z == pytest.approx(want[0], abs=1e-3), name
        assert dropped == pytest.approx(want[1], abs=1e-3), name
        likely = want[2] > -12
        np.testing.assert_allclose(row[likely], want[2][likely], atol=2e-3)


async def test_the_potential_agrees_and_keeps_its_contract(engines):
    texts = [b"The cat", b"The cat sat on", b"12 + 7 = "]
    weights = {}
    for name, engine in engines.items():
        llm = ByteLLM(engine, PARAMS["topk"])
        weights[name] = np.concatenate(
            [await llm.batch_prefix(texts), await llm.batch_complete(texts)]
        )
        row = (await llm.logw_next(texts[0])).weights
        step = await llm.prefix(texts[0] + b" ") - await llm.prefix(texts[0])
        assert step == pytest.approx(float(row[ord(" ")]), abs=1e-9)
    np.testing.assert_allclose(weights["vllm"], weights["tree"], atol=1e-3)
    np.testing.assert_allclose(weights["whole"], weights["tree"], atol=1e-3)


@pytest.mark.parametrize("prune", ["topk", "unbiased"])
async def test_seeded_runs_are_the_same_on_every_engine(engines, prune):
    results = {}
    for name, engine in engines.items():
        llm = ByteLLM(engine, PARAMS[prune], prompt=b"My favourite ")
        target = llm * ByteRegex(r"[a-z]{3,9} is [a-z ]{3,20}[.]")
        results[name] = await smc(target, 12, 0.5, 32, seed=5, progress=False)
    want = results.pop("tree")
    assert any(want.ended)
    for name, result in results.items():
        assert result.texts == want.texts, name
        assert result.log_ml == pytest.approx(want.log_ml, abs=1e-2)
        np.testing.assert_allclose(result.log_weights, want.log_weights, atol=1e-2)


async def test_forked_lanes_are_what_separate_lanes_are(engine):
    llm = ByteLLM(engine, PARAMS["topk"], prompt=TEXT)
    one = await llm.lanes(1)
    forked = await one.gather([0, 0, 0]).step([ord(c) for c in " .a"])
    engine.counts.reset()
    rows = await forked.logp_next()
    assert engine.counts.forwards <= 1
    for lane, byte in enumerate(b" .a"):
        alone = await one.step([byte])
        assert forked.log_z[lane] == pytest.approx(alone.log_z[0], abs=1e-9)
        np.testing.assert_allclose(rows[lane], (await alone.logp_next())[0], atol=1e-9)


async def test_rows_that_are_evicted_come_back_the_same(engine):
    pattern = ByteRegex(r"[a-z]{3,9} is [a-z ]{3,20}[.]")
    free = ByteLLM(engine, PARAMS["topk"], prompt=b"My favourite ")
    want = await smc(free * pattern, 8, 0.5, 32, seed=2, progress=False)
    cramped = ByteLLM(engine, PARAMS["topk"], prompt=b"My favourite ")
    cramped.model = ByteModel(engine, RowTransform(), 6 * 8 * (8192 + 256))
    cramped._beams = cramped._new_beams(cramped.prompt)
    got = await smc(cramped * pattern, 8, 0.5, 32, seed=2, progress=False)
    assert cramped.model.store.memory()["evicted"] > 0
    assert got.texts == want.texts
    np.testing.assert_allclose(got.log_weights, want.log_weights, atol=1e-2)


async def test_many_runs_share_calls_of_vllm(engine):
    llm = ByteLLM(engine, PARAMS["topk"], prompt=b"Dear ")
    targets = [llm * ByteRegex(p) for p in (r"[a-z]{4,12},", r"[A-Z][a-z]{3,9}", r"Mr [A-Z].*")]
    alone = [await smc(t, 6, max_bytes=12, seed=i, progress=False) for i, t in enumerate(targets)]
    llm.model.store.clear()
    engine.counts.reset()
    together = await smc_many(targets, 6, max_bytes=12, seed=0)
    assert engine.counts.forwards <= 13 + 3  # one a byte for all three, and the prompt
    assert [r.texts for r in together] == [r.texts for r in alone]


def test_an_engine_is_taken_as_it_is(engine):
    assert as_engine(engine) is engine
    assert load_model(engine) is engine
