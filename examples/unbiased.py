"""A beam without bias: the mean of exp(logZ) over seeds is the exact prefix probability.

A beam that keeps its best candidates leaves out what the others weigh, so its estimate is
too low, always. With `prune="unbiased"` the candidates to keep are drawn such that the
estimate is right on average, however narrow the beam. Here a beam of two, thinned hard, is
run with many seeds at once and compared with a beam so wide that it drops nothing.
"""

import asyncio

import numpy as np

from genlm_bytes_smc import BeamParams, ByteBeamState, ByteLanes, load_model
from genlm_bytes_smc.beam.model import byte_model

TEXT = b"xylophon"
SEEDS = 1000


async def main():
    llm = load_model("tiny")
    wide = await ByteBeamState.initial(llm, BeamParams(K=None))
    exact = (await wide.prefill(TEXT)).logZ

    best = await ByteBeamState.initial(llm, BeamParams(K=2, prune_threshold=0.1))
    kept = np.exp((await best.prefill(TEXT)).logZ - exact)

    params = BeamParams(K=2, prune_threshold=0.1, prune="unbiased")
    lanes = await ByteLanes.start(byte_model(llm), params, n=SEEDS, lane_seeds=range(SEEDS))
    for byte in TEXT:
        lanes = await lanes.step(np.where(lanes.alive, byte, -1))
    ratios = np.exp(lanes.log_z - exact)
    error = ratios.std() / np.sqrt(SEEDS)

    print(f"exact log probability of {TEXT.decode()!r}: {exact:.4f} nats")
    print("estimates as a share of the exact probability:")
    print(f"  the best two candidates: {kept:.4f}")
    print(f"  two drawn candidates, mean of {SEEDS} seeds: {ratios.mean():.4f} ± {error:.4f}")
    within = abs(ratios.mean() - 1) < 4 * error
    print("unbiased within four standard errors:", within)


asyncio.run(main())
