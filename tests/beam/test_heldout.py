"""No held-out text is impossible, whatever is pruned."""

import json
import math
from importlib.resources import files

import pytest

from genlm_bytes_smc import BeamParams, ByteBeamState


@pytest.mark.parametrize("threshold", [0.05, 0.3])
async def test_texts_of_every_kind_can_be_read(tiny, threshold):
    lines = files("genlm_bytes_smc.lm").joinpath("tiny/heldout.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"].encode() for line in lines]
    texts = [t for t in texts if b"Bartlett" in t] + texts[::12]
    beam = await ByteBeamState.initial(tiny, BeamParams(2, threshold))
    for text in texts:
        assert (await beam.prefill(text[:200])).logZ > -math.inf, text
