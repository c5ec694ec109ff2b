"""Complete a text byte by byte, and look at the distribution of the next byte.

The prompt ends in a space. Tokenizers attach spaces to the word that follows, so a model asked
for its next token after such a prompt is in a place it never saw in training. A byte beam is
not: it keeps every likely way of cutting the prompt into tokens, those in flight included.
"""

import asyncio

from genlm_bytes_smc import BeamParams, ByteBeamState, load_model

PROMPT = b"An apple a day keeps the "


async def main():
    llm = load_model("tiny")
    empty = await ByteBeamState.initial(llm, BeamParams(K=5, prune_threshold=0.001))
    beam = await empty.prefill(PROMPT)

    print(f"log probability of {PROMPT.decode()!r}: {beam.logZ:.3f} nats\n")
    print("ways of cutting it into tokens, the last one in flight:")
    print(beam, "\n")

    print("the next byte:")
    for byte, logp in (await beam.logp_next()).top(3).items():
        print(f"  {byte!r}: {logp:.4f}")

    completed = await empty.greedy(PROMPT, steps=12)
    print("\nlikeliest bytes:", completed.decode())
    for seed in range(2):
        sampled = await empty.sample(PROMPT, steps=25, seed=seed)
        print(f"drawn, seed {seed}:", repr(sampled.decode("utf-8", "replace")))


asyncio.run(main())
