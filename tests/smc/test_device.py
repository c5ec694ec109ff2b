"""How often a particle step waits for the device, and that nothing mixes devices."""

import warnings

import numpy as np
import pytest
import torch

from genlm_bytes_smc import BeamParams
from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.lm.engine import RowEngine
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import smc_steps
from tests.devices import FAR, Far, FarDevice
from tests.smc.worlds import FREE
from tests.toys import EOS_TOKEN, TOY_TOKENS, ToyLM


class FarToy(RowEngine):
    """The toy model as an engine whose rows are on a given device."""

    def __init__(self, device):
        toy = ToyLM(seed=2, sharpness=1.0)
        super().__init__(
            toy.tokenizer, device=torch.device(device), width=len(TOY_TOKENS), window=None,
            start=(toy.tokenizer.bos_token_id,), byte_vocab=toy.byte_vocab,
        )  # fmt: skip
        self.toy = toy

    def evaluate(self, nodes):
        rows = torch.stack([self.toy.row(self.tree.tokens(n)) for n in nodes.tolist()])
        self.counts.rows += len(rows)
        self.counts.forwards += 1
        return Far(rows) if self.device == FAR else rows.to(self.device)


async def run(device, params, waits=None):
    llm = ByteLLM(FarToy(device), params)
    target = llm * ByteRegex(FREE, device=device)
    counted, states = [], []
    async for state in smc_steps(target, 16, 0.9, 12, seed=1):
        states.append(state)
        if waits is not None:
            counted.append(dict(waits.waits))
            waits.waits.clear()
    return states[-1], counted


PARAMS = {
    "topk": {"K": 3, "prune_threshold": 0.05},
    "unbiased": {"K": 3, "prune_threshold": 0.05, "prune": "unbiased"},
}


# Ends of tokens and what was kept (and, where healing may be called for, who died); besides,
# whether new rows are distributions, and what was drawn.
FETCHES = {"topk": 2, "unbiased": 2}


@pytest.mark.parametrize("prune", PARAMS)
async def test_a_particle_step_waits_as_often_as_the_algorithm_needs(prune):
    params = BeamParams(eos_byte_strings=[EOS_TOKEN], **PARAMS[prune])
    with FarDevice() as device:
        far, counted = await run(FAR, params, device)
    near, _ = await run("cpu", params)
    assert far.particles.texts() == near.particles.texts()
    np.testing.assert_array_equal(far.particles.ended, near.particles.ended)
    np.testing.assert_allclose(far.particles.log_weights, near.particles.log_weights, atol=1e-9)
    resampled = [[i.ancestors is not None for i in s.history] for s in (far, near)]
    assert resampled[0] == resampled[1]
    assert any(resampled[0])
    step = {"kernels_torch._fetch": FETCHES[prune], "rows._write": 1, "reading.draw": 1}
    assert len(counted) > 8
    for waits in counted[2:-1]:  # the first step also reads the first rows of the root
        assert waits == step
    assert sum(counted[-1].values()) <= 3  # all end at the length limit: no draw


async def compare_deferred(device):
    """Run deferred beams with rows from `device` and from a CPU; they must agree."""
    params = BeamParams(None, prune="deferred", prune_threshold=0.05, eos_byte_strings=[EOS_TOKEN])
    near, _ = await run("cpu", params)
    far, _ = await run(device, params)
    assert far.particles.texts() == near.particles.texts()
    np.testing.assert_allclose(far.particles.log_weights, near.particles.log_weights, atol=1e-9)


async def test_deferred_beams_judge_rows_of_a_device_on_the_host():
    """Rows that are computed elsewhere come to the host; proposals and weights are the same."""
    with FarDevice():
        await compare_deferred(FAR)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
async def test_deferred_beams_judge_rows_of_a_real_device():
    """As above, on a GPU."""
    await compare_deferred("cuda")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
async def test_a_real_device_says_the_same_of_its_waits():
    params = BeamParams(eos_byte_strings=[EOS_TOKEN], **PARAMS["topk"])
    await run("cuda", params)  # what is set up once may wait
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            await run("cuda", params)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in said if "synchroniz" in str(w.message)]
    assert len(waits) <= 13 * 6 + 40  # thirteen steps; the start may wait too
