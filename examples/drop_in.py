"""A program written for genlm.bytes, with only its import changed.

Every call below is genlm.bytes' own: `initial` takes the
trie's options, `prefill` gives a beam, `prune() << byte` reads on, `logp_next` gives log
probabilities in which 257 is the end of the sequence, and `cleanup` is there to be awaited.
"""

import asyncio

import numpy as np

# from genlm.bytes import BeamParams, ByteBeamState
from genlm_bytes_smc import BeamParams, ByteBeamState, load_model

END = 257


async def main():
    llm = load_model("tiny")  # or genlm.backend.load_model_by_name("openai-community/gpt2")
    params = BeamParams(K=5, prune_threshold=0.001, eos_byte_strings=[b"<|endoftext|>"])
    beam = await ByteBeamState.initial(llm, params, trie_opts={"max_batch_size": 100})
    try:
        beam = await beam.prefill(b"Actions speak")
        written = bytearray()
        while len(written) < 40:
            row = await beam.logp_next()
            byte = int(np.argmax(row.ps))
            if byte == END:
                break
            written.append(byte)
            beam = await (beam.prune() << byte)
            if byte == ord("."):
                break
        print("Actions speak" + written.decode())
        print(f"candidates in the beam: {len(beam)}")
        print(f"log probability of all of it: {beam.logZ:.3f} nats")
    finally:
        await beam.cleanup()


asyncio.run(main())
