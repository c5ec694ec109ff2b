"""Two models with different tokenizers, combined at the byte level.

One is the bundled model with 8,192 tokens; the other, defined here, has a token for each
character of a small alphabet and knows only which character tends to follow which. Bytes are
what both have in common: genlm-control's `Ensemble` takes a mean of their probabilities, and
sequential Monte Carlo draws from it.
"""

import asyncio
from itertools import pairwise
from types import SimpleNamespace

import torch
from genlm.backend.llm import AsyncLM
from genlm.backend.tokenization.token import Token
from genlm.control import Ensemble

from genlm_bytes_smc import BeamParams, load_model
from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import smc

SAMPLE = "the cat sat on the mat and the rat ran at that hat. "


class Bigram(AsyncLM):
    """Characters, each with a probability that depends on the one before."""

    def __init__(self, text):
        self.str_vocab = [*sorted(set(text)), "<end>"]
        self.byte_vocab = [Token(i, s.encode()) for i, s in enumerate(self.str_vocab)]
        end = len(self.str_vocab) - 1
        self.tokenizer = SimpleNamespace(bos_token_id=end, eos_token_id=end)
        counts = torch.full((end + 1, end + 1), 0.1)
        ids = [end, *map(self.str_vocab.index, text), end]
        for before, after in pairwise(ids):
            counts[before, after] += 1
        self.logp = (counts / counts.sum(1, keepdim=True)).log()

    def next_token_logprobs_sync(self, token_ids, lora_name=None):
        return self.logp[token_ids[-1]]

    async def next_token_logprobs(self, token_ids, lora_name=None):
        return self.next_token_logprobs_sync(token_ids)


async def main():
    prompt = b"the "
    large = ByteLLM(load_model("tiny"), BeamParams(K=2, prune_threshold=0.02), prompt=prompt)
    small = ByteLLM(Bigram(SAMPLE), BeamParams(K=2), prompt=prompt)
    words = ByteRegex("[a-z]{2,8}[.]")
    print(f"tokens: {len(large.model.vocab)} and {len(small.model.vocab)}")
    both = Ensemble(large, small, "prod", a=0.5)  # the geometric mean
    for name, model in (("the bundled model", large), ("bigrams", small), ("both", both)):
        result = await smc(
            model * words,
            n_particles=16,
            max_bytes=9,
            terminate_when=lambda text: text.endswith(b"."),
            progress=False,
        )
        best = [f"{text} {p:.2f}" for text, p in list(result.decoded_posterior.items())[:4]]
        print(f"{name}: {', '.join(best)}")


asyncio.run(main())
