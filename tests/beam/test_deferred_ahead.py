"""Rows that are fetched early: fewer forwards, and nothing else changes."""

import numpy as np
import pytest

from genlm_bytes_smc import BeamParams, ByteLLM
from genlm_bytes_smc.beam.deferred import DeferredLanes
from genlm_bytes_smc.beam.model import byte_model
from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.lm.adapter import as_engine
from genlm_bytes_smc.lm.engine import ContextTooLongError
from genlm_bytes_smc.smc import smc_steps
from studies.bigram_lm import BigramEngine
from tests.toys import ToyLM

PATTERN = r"[A-Za-z0-9 ,.;:'\"()=_*/<>\[\]\n-]+"
STEPS = 24


async def run(cheap, n):
    """Return the particles after some steps of a fresh model, and forwards and rows a step."""
    engine = BigramEngine(20_000)
    assert not engine.rows_are_cheap  # on a CPU
    engine.rows_are_cheap = cheap
    llm = ByteLLM(engine, prompt=b"The statement is ")
    await llm.prompt_weight()
    engine.counts.reset()
    async for state in smc_steps(llm * ByteRegex(PATTERN), n, 0.5, 4 * STEPS, seed=1):
        if state.step == STEPS:
            break
    return state.particles, engine.counts.forwards / STEPS, engine.counts.rows / STEPS


@pytest.mark.parametrize(("n", "most"), [(64, 1.2), (256, 1.8)])
async def test_a_particle_step_takes_fewer_forwards_where_rows_are_cheap(n, most):
    plain, forwards, rows = await run(cheap=False, n=n)
    ahead, fewer, more = await run(cheap=True, n=n)
    print(f"N={n}: forwards a step {forwards:.2f} -> {fewer:.2f}, rows {rows:.1f} -> {more:.1f}")
    assert fewer <= most < 2 < forwards
    assert more <= 1.4 * rows
    np.testing.assert_array_equal(ahead.text, plain.text)
    np.testing.assert_array_equal(ahead.log_weights, plain.log_weights)


@pytest.mark.parametrize("threshold", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(3))
async def test_lanes_are_the_same_whatever_is_fetched_early(seed, threshold):
    texts = np.random.default_rng(seed).choice(np.frombuffer(b"aaabbc", np.uint8), (20, 12))
    found = []
    for cheap in (False, True):
        engine = as_engine(ToyLM(seed=seed))
        engine.rows_are_cheap = cheap
        params = BeamParams(None, threshold, prune="deferred")
        lanes = await DeferredLanes.start(byte_model(engine), params, len(texts))
        out = []
        for symbols in texts.T.astype(np.int64):
            out += [(await lanes.logp_next()).numpy(), (await lanes.step([256] * 20)).log_z]
            lanes = await lanes.step(symbols)
            out += [lanes.log_z, lanes.log_dropped]
        found.append((out, engine.counts.forwards))
    (plain, forwards), (ahead, fewer) = found
    for a, b in zip(ahead, plain, strict=True):
        np.testing.assert_array_equal(a, b)
    assert fewer < forwards


async def bytes_read(lanes, text):
    """Return how many bytes of a text one lane reads before the model's window is full."""
    for n, byte in enumerate(text):
        try:
            await lanes.logp_next()
            lanes = await lanes.step([byte])
        except ContextTooLongError:
            return n
    return len(text)


async def test_nothing_is_fetched_that_does_not_fit_the_models_window():
    reached = []
    for cheap in (False, True):
        engine = as_engine(ToyLM(seed=4))
        engine.rows_are_cheap, engine.window = cheap, 6
        params = BeamParams(None, 0.1, prune="deferred")
        lanes = await DeferredLanes.start(byte_model(engine), params)
        reached.append(await bytes_read(lanes, b"abc" * 7))
    assert 0 < reached[0] < 21
    assert reached[0] == reached[1]
