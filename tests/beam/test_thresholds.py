"""Thresholds that would drop everything: rows stay distributions, and prefixes agree with them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genlm_bytes_smc import BeamParams, ByteBeamState, ByteLLM
from tests.toys import ToyLM

THRESHOLDS = [0.0, 0.1, 0.25, 0.4, 0.5, 0.7, 0.9, 0.999]


class Vocabulary(ToyLM):
    """Random rows over given tokens, some of whose probabilities are zero."""

    def __init__(self, tokens, seed, zeros):
        super().__init__([*tokens, b"<e>"], seed=seed, sharpness=3.0)
        self.zeros = zeros

    def __repr__(self):
        return f"Vocabulary({self.tokens[:-1]}, {self.seed}, {self.zeros})"

    def row(self, context):
        logp = super().row(context)
        rng = np.random.default_rng([self.seed, 1, *map(int, context)])
        never = torch.from_numpy(rng.random(len(logp)) < self.zeros)
        never[int(rng.integers(len(logp) - 1))] = False
        spelled = torch.tensor([len(t) > 0 for t in self.tokens])
        if not (spelled & ~never).any():
            never[:] = False
        return torch.log_softmax(logp.masked_fill(never, -torch.inf), dim=0)


tokens = st.lists(st.text("abc", max_size=4).map(str.encode), min_size=1, max_size=12)


@st.composite
def worlds(draw):
    """A model whose vocabulary may have duplicates and empty tokens, and beam parameters."""
    some = draw(tokens)
    some += draw(st.lists(st.sampled_from(some), max_size=6))
    some += draw(st.sampled_from([[], [b"a", b"b", b"c"]]))
    heal = draw(st.booleans())
    # The share for healing goes by spellings: where the model has zeros it may go to none.
    zeros = 0.0 if heal else draw(st.sampled_from([0.0, 0.3]))
    llm = Vocabulary(some, draw(st.integers(0, 99)), zeros)
    ends = draw(st.sampled_from([[], [b"<e>"], *[[t] for t in some if t]]))
    params = BeamParams(
        K=draw(st.sampled_from([1, 2, 3, None])),
        prune_threshold=draw(st.sampled_from(THRESHOLDS)),
        eos_byte_strings=ends,
        heal=heal,
    )
    return llm, params


@pytest.mark.parametrize("heal", [True, False])
@pytest.mark.parametrize("threshold", [0.5, 0.9])
async def test_a_token_that_ends_is_kept_where_little_else_is_left(tiny, threshold, heal):
    """At the end of `keeps` nothing is in flight; at that of `day` hardly anything is."""
    weights = []
    for at in (0.001, threshold):
        params = BeamParams(K=3, prune_threshold=at, heal=heal)
        lm = ByteLLM(tiny, params, prompt=b"An apple a ")
        weights.append(await lm.prefix(b"day keeps the doctor away"))
        for text in (b"day", b"day keeps", b"day keeps the"):
            row = (await lm.logw_next(text)).weights.numpy()
            assert np.exp(row).sum() == pytest.approx(1, abs=1e-12)
            assert row[ord(" ")] > math.log(0.5)
    assert weights[1] == pytest.approx(weights[0], abs=0.1)


@pytest.mark.parametrize("threshold", [0.25, 0.5, 0.9])
async def test_two_tokens_of_one_spelling(threshold):
    """Each has half of the mass, and neither is above the threshold."""

    class Twins(ToyLM):
        def row(self, context):
            return torch.log(torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64))

    params = BeamParams(K=3, prune_threshold=threshold, heal=False)
    lm = ByteLLM(Twins([b"ab", b"ab", b"<e>"]), params, model_eos=False)
    assert await lm.prefix(b"ababab") == pytest.approx(0, abs=1e-12)
    beam = await ByteBeamState.initial(lm.llm, params)
    for byte in b"ababab":
        beam = await (beam.prune() << byte)
    # The last token is in flight as both of its ids; of the others one id was kept.
    assert beam.logZ == pytest.approx(math.log(0.25), abs=1e-12)
    assert (await ByteBeamState.initial(lm.llm, params)).prune().logZ == 0


async def test_pruning_keeps_the_best_candidate():
    class Even(ToyLM):
        def row(self, context):
            return torch.full((len(self.tokens),), -math.log(len(self.tokens)))

    lm = Even([b"a", b"aa", b"aaa", b"aaaa"])
    beam = await (await ByteBeamState.initial(lm, BeamParams(None))).prefill(b"aaa")
    shares = np.exp([c.logw - beam.logZ for c in beam])
    assert len(shares) > 3
    assert shares.max() < 0.6
    strict = await (await ByteBeamState.initial(lm, BeamParams(9, 0.6))).prefill(b"aaa")
    kept = strict.prune()
    (only,) = kept
    assert only.kept
    assert kept.logZ == pytest.approx(max(c.logw for c in strict), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(worlds(), st.integers(0, 2**32 - 1))
async def test_rows_sum_to_one_and_prefixes_agree_with_them(world, seed):
    llm, params = world
    lm = ByteLLM(llm, params, model_eos=False)
    rng = np.random.default_rng(seed)
    text = b""
    for _ in range(6):
        row = (await lm.logw_next(text)).weights.numpy()
        p = np.exp(row)
        assert p.sum() == pytest.approx(1, abs=1e-9), text
        prefix = await lm.prefix(text)
        after = [text + bytes([b]) for b in np.flatnonzero(p[:256])]
        for longer, weight in zip(
            after, await lm.batch_prefix(after) if after else [], strict=True
        ):
            assert weight - prefix == pytest.approx(row[longer[-1]], abs=1e-9)
        assert await lm.complete(text) == pytest.approx(prefix + row[256], abs=1e-9)
        if not after:
            return
        text = after[rng.integers(len(after))]
