"""Constraints of your own, in plain Python.

Two ways: a function of whole texts (here: the number has a digit sum of 10), and a genlm-control
`Potential`, which weighs texts as they grow and so steers resampling (here: a taste for the
digit 7). Both serve as the critic, which is asked once a distinct text and not for a row
of next-byte weights; what has such rows at little cost multiplies the target instead.
"""

import asyncio

from genlm.control import Potential

from genlm_bytes_smc import BeamParams, load_model
from genlm_bytes_smc.alphabet import BYTES
from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import smc


def digits_sum_to_ten(text):
    return sum(map(int, text.decode().strip())) == 10


class LikesSevens(Potential):
    """Each 7 makes a text e squared times as likely."""

    def __init__(self):
        super().__init__(BYTES)

    async def prefix(self, context):
        return 2.0 * context.count(b"7")

    complete = prefix


async def main():
    llm = ByteLLM(load_model("tiny"), BeamParams(K=2, prune_threshold=0.02), prompt=b"Phone: +")
    numbers = ByteRegex("[1-9][0-9]{3}")
    for critic in (digits_sum_to_ten, LikesSevens()):
        result = await smc(
            llm * numbers,
            n_particles=100,
            max_bytes=4,
            critic=critic,
            terminate_when=lambda text: len(text) == 4,
            progress=False,
        )
        best = [f"{text} {p:.2f}" for text, p in list(result.decoded_posterior.items())[:5]]
        name = getattr(critic, "__name__", type(critic).__name__)
        print(f"{name}: {', '.join(best)}")


asyncio.run(main())
