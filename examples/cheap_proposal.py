"""A narrow beam proposes, a wide one weighs.

Bytes may be drawn from any potential over bytes: a beam of one, a smaller model, a model with
another prompt. The weights make up for the difference, so what is estimated is the wide beam's
distribution, as long as the proposal gives weight to whatever the target does.
"""

import asyncio

import numpy as np

from genlm_bytes_smc import BeamParams, load_model
from genlm_bytes_smc.constraints import FiniteSet
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import smc_repeat

COLORS = [b"red ", b"green ", b"blue ", b"grey ", b"black ", b"brown ", b"white ", b"yellow "]


async def main():
    llm, prompt, one_of = load_model("tiny"), b"He had a ", FiniteSet(COLORS)
    wide = ByteLLM(llm, BeamParams(K=10), prompt=prompt)
    narrow = ByteLLM(llm, BeamParams(K=1), prompt=prompt)

    exact = np.log(np.exp(await wide.batch_prefix(COLORS)).sum())
    print(f"exact log probability that a color is next: {exact:.3f} nats")

    for name, proposal in (("itself", None), ("the narrow beam", narrow * one_of)):
        runs = await smc_repeat(
            wide * one_of,
            n_particles=20,
            max_bytes=8,
            proposal=proposal,
            terminate_when=lambda text: text.endswith(b" "),
            seeds=20,
        )
        print(f"estimate, proposed by {name}: {runs.log_ml:.3f} ± {runs.log_ml_error:.3f} nats")


asyncio.run(main())
