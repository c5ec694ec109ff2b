"""A llamppl program over bytes: three words, none with the letter "e".

A program says, byte by byte, what is sampled, observed and scored; llamppl runs many copies
of it as particles. `ByteContext` gives it the next byte and masks over it. What is a word is
decided by bytes, so no token boundary gets in the way.
"""

import asyncio
import string

import llamppl
import numpy as np

from genlm_bytes_smc import BeamParams, load_model
from genlm_bytes_smc.llamppl import ByteContext
from genlm_bytes_smc.potential import ByteLLM

LETTERS = (set(string.ascii_letters) - {"e", "E"}) | {" "}
ALLOWED = "".join(sorted(LETTERS)).encode()
WORDS = 3


class NoE(llamppl.Model):
    def __init__(self, context):
        super().__init__()
        self.context = context

    async def step(self):
        self.score(await self.context.log_mass())
        # No two spaces in a row: a space is allowed only after a letter.
        spaced = not bytes(self.context) or bytes(self.context).endswith(b" ")
        allowed = ALLOWED.replace(b" ", b"") if spaced else ALLOWED
        await self.observe(self.context.mask_dist(allowed), True)
        await self.sample(self.context.next_byte())
        if bytes(self.context).count(b" ") == WORDS or len(self.context) == 40:
            self.finish()


async def main():
    np.random.seed(0)  # llamppl resamples with numpy's global generator
    llm = ByteLLM(load_model("tiny"), BeamParams(K=2, prune_threshold=0.02))
    context = await ByteContext.create(llm, b"The boy said that ", rng=np.random.default_rng(0))
    particles = await llamppl.smc_standard(NoE(context), 10, 0.5)
    for particle in sorted(particles, key=lambda p: -p.weight)[:5]:
        print(f"{particle.weight:8.3f}  {str(particle.context)!r}")
    without = all(b"e" not in bytes(p.context).lower() for p in particles)
    print("no text has an e:", without)


asyncio.run(main())
