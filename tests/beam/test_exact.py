"""With every candidate kept, the beam is exact: logZ, rows and endings, by enumeration."""

import itertools
import math

import numpy as np
import pytest
import torch

from genlm_bytes_smc import BeamParams, ByteBeamState
from tests.toys import EOS_TOKEN, TOY_TOKENS, Enumeration, ToyLM

LETTERS = [b"a", b"b", b"c"]
STRINGS = [b"".join(x) for n in range(1, 7) for x in itertools.product(LETTERS, repeat=n)]
EXACT = 1e-9


@pytest.mark.parametrize("eos", [frozenset(), frozenset([EOS_TOKEN])])
@pytest.mark.parametrize("seed", [0, 1, 2])
async def test_all_strings_up_to_length_six(seed, eos):
    lm = ToyLM(seed=seed)
    truth = Enumeration(lm, eos)
    prefix = {s: truth.prefix(s) for s in [b"", *STRINGS]}
    root = await ByteBeamState.initial(lm, BeamParams(None, eos_byte_strings=list(eos)))
    beams = {b"": root}
    for s in STRINGS:
        beam = beams[s] = await (beams[s[:-1]] << s[-1])
        assert beam.logZ == pytest.approx(math.log(prefix[s]), abs=EXACT)
    for s, beam in beams.items():
        row = (await beam.logp_next()).ps
        ended = truth.ended(s) / prefix[s]
        assert row[257] == pytest.approx(math.log(ended) if ended else -np.inf, abs=EXACT)
        assert np.exp(row).sum() == pytest.approx(1, abs=EXACT)
        assert row[256] == -np.inf
        if len(s) < 6:
            exact = [math.log(prefix[s + x] / prefix[s]) for x in LETTERS]
            np.testing.assert_allclose([row[x[0]] for x in LETTERS], exact, atol=EXACT, rtol=0)
        if len(s) < 2:  # the other bytes, too
            exact = truth.logp_next(s)
            np.testing.assert_allclose(np.append(row[:256], row[257]), exact, atol=EXACT, rtol=0)
    assert root.dropped == -np.inf


async def test_the_end_of_a_text_has_the_probability_of_the_whole_text():
    lm = ToyLM(seed=4)
    truth = Enumeration(lm, frozenset([EOS_TOKEN]))
    beam = await ByteBeamState.initial(lm, BeamParams(None, eos_byte_strings=[EOS_TOKEN]))
    for byte in b"abca":
        beam = await (beam << byte)
    ended = await (beam << 257)
    assert ended.ended
    assert ended.logZ == pytest.approx(math.log(truth.ended(b"abca")), abs=EXACT)


@pytest.mark.parametrize(
    ("name", "lm"),
    [
        ("zero-length token", ToyLM([*TOY_TOKENS[:-1], b"", EOS_TOKEN], seed=7)),
        ("padded head", ToyLM(seed=8, pad=5)),
        ("float32 rows", ToyLM(seed=9, dtype=torch.float32)),
        ("two spellings of the end", ToyLM([*TOY_TOKENS, EOS_TOKEN, b"<x>"], seed=10)),
        ("long token", ToyLM([*TOY_TOKENS[:-1], b"ab" * 700, EOS_TOKEN], seed=11)),
    ],
)
async def test_odd_vocabularies(name, lm):
    eos = frozenset([EOS_TOKEN, b"<x>"]) if "two" in name else frozenset([EOS_TOKEN])
    truth = Enumeration(lm, eos)
    root = await ByteBeamState.initial(lm, BeamParams(None, eos_byte_strings=list(eos)))
    # Rows are renormalised where columns are left out; float32 rows sum to one roughly.
    tolerance = 1e-6 if "float32" in name else EXACT
    for s in (b"a", b"ab", b"abab", b"cabb"):
        beam = root
        for byte in s:
            beam = await (beam << byte)
        assert beam.logZ == pytest.approx(math.log(truth.prefix(s)), abs=tolerance), name
        row = (await beam.logp_next()).ps
        np.testing.assert_allclose(
            np.append(row[:256], row[257]), truth.logp_next(s), atol=tolerance, err_msg=name
        )
        assert np.exp(row).sum() == pytest.approx(1, abs=1e-12)


async def test_float32_rows_are_summed_without_further_rounding():
    """What the model says is what is summed: exp of its float32 entries, in float64."""
    lm = ToyLM(seed=3, dtype=torch.float32)
    beam = await ByteBeamState.initial(lm, BeamParams(None))
    beam = await (beam << ord("a"))
    row = lm.row(Enumeration(lm).start).double().numpy()
    raw = sum(math.exp(p) for p, t in zip(row, lm.tokens, strict=True) if t.startswith(b"a"))
    assert beam.logZ == pytest.approx(math.log(raw), abs=EXACT)


async def test_a_token_at_minus_120_nats_stays_alive():
    class Rare(ToyLM):
        def row(self, context):
            logits = torch.zeros(len(self.tokens), dtype=torch.float32)
            logits[self.tokens.index(b"c")] = -120.0
            logits[self.tokens.index(b"cab")] = -torch.inf
            return torch.log_softmax(logits, 0)

    beam = await ByteBeamState.initial(Rare(), BeamParams(3))
    beam = await (beam << ord("c"))
    assert beam.logZ == pytest.approx(-120 - math.log(8), abs=1e-4)


async def test_long_texts_do_not_underflow():
    beam = await ByteBeamState.initial(ToyLM(seed=1), BeamParams(4))
    beam = await beam.prefill(b"abc" * 400)
    assert -20_000 < beam.logZ < -700
