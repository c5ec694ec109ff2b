"""Texts that match a regular expression: a date, and an e-mail address.

The product of the language model and `ByteRegex` is a target; sequential Monte Carlo draws
weighted texts from it. Masking alone would be too greedy: it never takes back a byte that
was likely when written and led nowhere likely. The weights know, and so do the estimates of
how probable it is that the model writes such a text at all.
"""

import asyncio

from genlm_bytes_smc import BeamParams, load_model
from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import smc

DATE = ByteRegex(r"(19|20)[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])\n")
EMAIL = ByteRegex(r"[a-z]{2,12}@[a-z]{2,12}\.(com|org|net)\n")


async def main():
    llm = ByteLLM(load_model("tiny"), BeamParams(K=2, prune_threshold=0.02))
    tasks = [
        ("dates", b"Date: ", DATE),
        ("e-mail addresses", b"Contact: ", EMAIL),
    ]
    for name, prompt, constraint in tasks:
        # The newline ends the text; without `terminate_when` the model would have to.
        result = await smc(
            llm.with_prompt(prompt) * constraint,
            n_particles=12,
            max_bytes=32,
            terminate_when=lambda text: text.endswith(b"\n"),
            progress=False,
        )
        print(f"{name} after {prompt.decode()!r}:")
        for text, p in list(result.decoded_posterior.items())[:4]:
            print(f"  {p:.3f}  {text.strip()}")
        print(f"  log probability of any: {result.log_ml:.2f} ± {result.log_ml_error:.2f} nats\n")


asyncio.run(main())
