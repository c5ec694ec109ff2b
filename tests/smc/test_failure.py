"""A run that breaks off keeps what it had done."""

import asyncio

import numpy as np
import pytest

from genlm_bytes_smc import BeamParams, EngineError, as_engine
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import RunFailedError, smc, smc_many, smc_repeat, smc_steps, smc_sync
from tests.smc.worlds import EXACT, finite, same
from tests.toys import ToyLM

OPTIONS = {"ess_threshold": 0.5, "max_bytes": 6}


class Mortal(ToyLM):
    """The toy, until it has been asked for as many rows as it has lives."""

    def __init__(self, lives, error):
        super().__init__(seed=1, sharpness=1.0)
        self.lives, self.error = lives, error

    def next_token_logprobs_sync(self, token_ids, lora_name=None):
        self.lives -= 1
        if self.lives < 0:
            raise self.error
        return super().next_token_logprobs_sync(token_ids)


def target(lives=10**9, error=None, params=EXACT):
    return finite(ByteLLM(as_engine(Mortal(lives, error)), params))


ERRORS = [
    RuntimeError("CUDA error"),
    MemoryError("no more"),
    ConnectionError("gone"),
    EngineError("x"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
async def test_the_cause_and_the_state_so_far(error):
    want = await smc(target(), 12, seed=3, progress=False, **OPTIONS)
    with pytest.raises(RunFailedError) as failed:
        await smc(target(9, error), 12, seed=3, progress=False, **OPTIONS)
    lost = failed.value
    assert lost.__cause__ is error
    assert f"at byte {lost.state.step}: {type(error).__name__}: {error}" in str(lost)
    assert 0 < lost.state.step < len(want.history)
    assert [len(t) for t in lost.result.texts] == lost.state.particles.length.tolist()
    resumed = await smc(target(), 12, resume=lost.state, progress=False, **OPTIONS)
    assert same(resumed, want)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_before_the_first_byte_there_is_nothing_to_keep():
    with pytest.raises(RunFailedError, match=r"at byte 0|before the first byte") as failed:
        await smc(target(0, RuntimeError("dead on arrival")), 4, progress=False, **OPTIONS)
    assert failed.value.state is None or failed.value.state.step == 0


async def test_steps_fail_alike_and_what_was_yielded_stands():
    seen = []

    async def run():
        async for state in smc_steps(target(9, RuntimeError("x")), 12, seed=3, **OPTIONS):
            seen.append(state)

    with pytest.raises(RunFailedError) as failed:
        await run()
    assert failed.value.state.particles is seen[-1].particles
    assert failed.value.state.history is seen[-1].history
    with pytest.raises(RunFailedError):
        await asyncio.to_thread(smc_sync, target(9, RuntimeError("x")), 12, seed=3, **OPTIONS)


@pytest.mark.parametrize("many", [True, False])
async def test_every_run_of_many_is_kept(many):
    llm = ByteLLM(
        as_engine(Mortal(12, RuntimeError("gone"))), BeamParams(K=2, eos_byte_strings=[b"<e>"])
    )
    targets = [finite(llm), finite(llm)]
    run = smc_many(targets, 6, max_bytes=6) if many else smc_repeat(targets[0], 6, seeds=2)
    with pytest.raises(RunFailedError) as failed:
        await run
    states = failed.value.states
    assert len(states) == 2
    assert all(s is None or isinstance(s.particles.log_weights, np.ndarray) for s in states)
    assert any(s is not None and s.step > 0 for s in states)
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("error", [ValueError("bad"), TypeError("odd"), KeyError("k")])
async def test_what_is_no_breakdown_comes_through_as_it_is(error):
    with pytest.raises(type(error)) as failed:
        await smc(target(9, error), 12, seed=3, progress=False, **OPTIONS)
    assert failed.value is error
