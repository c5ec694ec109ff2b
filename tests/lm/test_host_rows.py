"""Rows of large vocabularies on a CPU: kept as float32, read as if they were float64."""

import itertools
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from genlm_bytes_smc import BadRowError, BeamParams, ByteBeamState, as_engine
from genlm_bytes_smc.beam.model import byte_model
from genlm_bytes_smc.fast_path import FastPathWarning
from genlm_bytes_smc.lm.rows_numba import LOWEST
from tests.toys import ToyLM

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOKENS = ["".join(t).encode() for n in (1, 2, 3) for t in itertools.product(LETTERS, repeat=n)] + [
    b"<e>"
]
TEXT = b"largevocabularies"


class Forced(ToyLM):
    """A toy whose row can be changed on its way out."""

    def __init__(self, change, **options):
        super().__init__(TOKENS, **options)
        self.change = change

    def row(self, context):
        return self.change(super().row(context))


async def read(lm, text=TEXT, **options):
    beam = await ByteBeamState.initial(lm, BeamParams(5, heal=False, **options))
    beam = (await beam.prefill(text)).prune()
    return beam, await beam.logp_next()


def test_the_vocabulary_is_one_that_is_kept_as_float32():
    store = byte_model(as_engine(ToyLM(TOKENS, dtype=torch.float32))).store
    assert len(TOKENS) > 16_384
    assert store.nbytes / store.table.open < 8 * len(TOKENS)


@pytest.mark.parametrize("pad", [0, 7])
@pytest.mark.parametrize("threshold", [0.0, 0.05])
async def test_float32_rows_give_what_float64_rows_give(threshold, pad):
    single, row = await read(
        ToyLM(TOKENS, seed=1, dtype=torch.float32, pad=pad), prune_threshold=threshold
    )
    double, exact = await read(
        ToyLM(TOKENS, seed=1, dtype=torch.float64, pad=pad), prune_threshold=threshold
    )
    assert single.logZ == pytest.approx(double.logZ, abs=1e-4)
    finite = [b for b in range(256) if exact[b] > -math.inf]
    assert finite
    np.testing.assert_allclose([row[b] for b in finite], [exact[b] for b in finite], atol=1e-4)


@pytest.mark.parametrize("nats", [-120.0, -170.0, -600.0])
async def test_a_token_that_float32_cannot_hold_stays_possible(nats):
    rare = TOKENS.index(b"q")

    def change(row):
        row = row.clone()
        row[[i for i, t in enumerate(TOKENS) if t.startswith(b"q")]] = -math.inf
        row[rare] = nats
        return row

    lm = Forced(change, seed=2, dtype=torch.float32)
    held = nats > LOWEST
    told = pytest.warns(FastPathWarning, match="kept in float64 from here on")
    with nullcontext() if held else told as warned:
        beam, _ = await read(lm, b"q")
    assert held or len(warned) == 1  # once, though every row has such a token
    assert byte_model(as_engine(lm)).store.exact != held
    assert beam.logZ == pytest.approx(nats, abs=0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
async def test_a_row_that_is_no_distribution_is_refused(bad):
    def change(row):
        row = row.clone()
        row[77] = bad
        return row

    with pytest.raises(BadRowError, match="NaN"):
        await read(Forced(change, seed=3, dtype=torch.float32), b"ab")
