"""Hundreds of texts at once: `ByteLanes` draws them side by side and forks them at will.

The beams of all texts are arrays. One step of all of them is one forward of the model, in
which equal contexts are computed once; a fork or a resampling is an indexing of the lanes.
"""

import asyncio

import numpy as np
import torch

from genlm_bytes_smc import BeamParams, load_model
from genlm_bytes_smc.potential import ByteLLM

N = 200
STEPS = 12
PROMPT = b"Once upon a time, there was a "


async def draw(lanes, texts, generator, steps):
    """Read `steps` drawn bytes in every lane."""
    for _ in range(steps):
        rows = (await lanes.logp_next()).exp()[:, :256]  # no text ends here
        symbols = torch.multinomial(rows, 1, generator=generator)[:, 0].numpy()
        lanes = await lanes.step(symbols)
        texts = [text + bytes([b]) for text, b in zip(texts, symbols.tolist(), strict=True)]
    return lanes, texts


async def main():
    generator = torch.Generator().manual_seed(0)
    llm = ByteLLM(load_model("tiny"), BeamParams(K=2, prune_threshold=0.05), prompt=PROMPT)
    counts = llm.model.engine.counts
    lanes = await llm.lanes(N)  # all begin with the beam of the prompt
    counts.reset()

    lanes, texts = await draw(lanes, [b""] * N, generator, STEPS)
    print(f"{N} texts of {STEPS} bytes: {len(set(texts))} different ones")
    print(f"{N * STEPS} bytes drawn, {counts.rows} rows in {counts.forwards} forwards")

    best = np.argsort(-lanes.log_z)[:3]
    print("\nthe likeliest three:")
    for i in best:
        print(f"  {lanes.log_z[i]:8.3f} nats  {texts[i]!r}")

    forks = np.repeat(best, 3)  # each of them three times; no model state moves
    lanes, texts = await draw(lanes.gather(forks), [texts[i] for i in forks], generator, 8)
    print("\nforked, and each fork drawn on its own:")
    for log_z, text in zip(lanes.log_z, texts, strict=True):
        print(f"  {log_z:8.3f} nats  {text!r}")


asyncio.run(main())
