"""A narrow beam proposes, a wide one weighs.

Bytes may be drawn from any potential over bytes: a beam of one, a smaller model, a model with
another prompt. The weights make up for the difference, so what is estimated is the wide beam's
distribution. `byte_sampler` mixes in a little of the target's own row, which keeps the weights
bounded where the proposal finds a byte all but impossible.
"""

import asyncio

import numpy as np
import torch

from genlm_bytes_smc import BeamParams, load_model
from genlm_bytes_smc.constraints import FiniteSet
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.proposal import byte_sampler

COLORS = [b"red", b"green", b"blue", b"grey", b"black", b"brown", b"white", b"yellow"]


async def main():
    np.random.seed(0)
    torch.manual_seed(0)
    llm, prompt, one_of = load_model("tiny"), b"He had a ", FiniteSet(COLORS)
    wide = ByteLLM(llm, BeamParams(K=10), prompt=prompt)
    narrow = ByteLLM(llm, BeamParams(K=1, prune_threshold=0.1), prompt=prompt)

    weights = await wide.batch_complete(COLORS)
    exact = np.exp(weights).sum()
    print(f"exact probability that the text is a color: {exact:.3e}")

    sampler = byte_sampler(wide * one_of, narrow * one_of, defensive=0.1)
    for name, used in (("itself", byte_sampler(wide * one_of)), ("the narrow beam", sampler)):
        runs = [await used.smc(10, 0.5, 8) for _ in range(10)]
        ratios = np.exp([float(run.log_ml) for run in runs]) / exact
        error = ratios.std() / np.sqrt(len(ratios))
        print(f"estimate over exact, proposed by {name}: {ratios.mean():.3f} ± {error:.3f}")


asyncio.run(main())
