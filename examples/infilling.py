"""Infilling: what goes between a given beginning and a given ending?

A left-to-right model knows nothing of an ending to come. Here a regular expression requires
it (`Ending` does for any text), but that is decided only when the text is over, and most
particles would end up far from it. A critic that lends weight to texts which have begun to
write the ending keeps the promising ones alive, and takes all of the loan back in the end.
"""

import asyncio

from genlm_bytes_smc import BeamParams, load_model
from genlm_bytes_smc.constraints import BytePredicate, ByteRegex
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import smc

BEGINNING = b"An apple a day"
ENDING = b" away."


def written(text):
    """How many bytes of the ending the text ends in."""
    return max(k for k in range(len(ENDING) + 1) if text.endswith(ENDING[:k]))


# Whole texts: no effect. Prefixes: one nat for each byte of the ending that is there.
guide = BytePredicate(lambda text: True, lambda text: float(written(text)))


async def main():
    llm = ByteLLM(load_model("tiny"), BeamParams(K=3, prune_threshold=0.01), prompt=BEGINNING)
    middle_and_end = ByteRegex(r"[a-z ]{1,24} away\.")
    result = await smc(
        llm * middle_and_end,
        n_particles=16,
        max_bytes=31,
        critic=guide,
        terminate_when=lambda text: text.endswith(ENDING),
        progress=False,
    )
    print(f"between {BEGINNING.decode()!r} and {ENDING.decode()!r}:")
    for text, p in list(result.decoded_posterior.items())[:5]:
        print(f"  {p:.3f}  {text.removesuffix(ENDING.decode())!r}")
    best = next(iter(result.decoded_posterior))
    print("likeliest:", BEGINNING.decode() + best)


asyncio.run(main())
