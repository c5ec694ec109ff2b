"""How often a particle step waits for the device, and that nothing mixes devices."""

import numpy as np
import pytest
import torch

from genlm_bytes_smc import BeamParams
from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.lm.engine import RowEngine
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import smc_steps
from tests.devices import FAR, Far, FarDevice
from tests.smc.worlds import FREE, same
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


@pytest.mark.parametrize("prune", PARAMS)
async def test_a_particle_step_waits_as_often_as_the_algorithm_needs(prune):
    params = BeamParams(eos_byte_strings=[EOS_TOKEN], **PARAMS[prune])
    with FarDevice() as device:
        far, counted = await run(FAR, params, device)
    near, _ = await run("cpu", params)
    assert same(_Result(far), _Result(near))
    print(counted)


class _Result:
    """A state as `same` reads it."""

    def __init__(self, state):
        self.texts = state.particles.texts()
        for name in ("log_weights", "ended", "eve"):
            setattr(self, name, np.round(getattr(state.particles, name), 12))
        self.history = [
            i._replace(ess=round(i.ess, 9), log_ml=round(i.log_ml, 9)) for i in state.history
        ]
