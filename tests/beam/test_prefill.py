"""What reading a known text asks of the model, and that rows which stand in leave no trace."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.ngram import NgramLM
from genlm_bytes_smc import BeamParams, ByteBeamState, ByteLLM, load_model
from genlm_bytes_smc.beam import known_text

LICENCE = Path(__file__).parents[2].joinpath("LICENSE").read_bytes()[:400]


@pytest.fixture(scope="module")
def bigrams():
    """An LM whose beam often leaves the tokenizer's own way to cut a text."""
    return NgramLM(n_bytes=20_000, n_tokens=4000)


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


def forget(beam):
    beam.lanes.model.store.clear()
    beam.counts.reset()


async def both_ways(llm, params, text):
    """The beam byte by byte and at once; rows and forwards of each."""
    beam = await ByteBeamState.initial(llm, params)
    forget(beam)
    slow = beam
    for byte in text:
        slow = await (slow.prune() << byte)
    one_by_one = beam.counts.rows, beam.counts.forwards
    forget(beam)
    fast = await beam.prefill(text)
    return slow, fast, one_by_one, (beam.counts.rows, beam.counts.forwards)


async def test_a_text_off_the_tokenizers_path_costs_few_rows_for_nothing(bigrams):
    params = BeamParams(5, 0.05)
    slow, fast, looped, at_once = await both_ways(bigrams, params, bigrams.held_out[:500])
    assert fast.logZ == pytest.approx(slow.logZ, abs=1e-9)
    assert at_once[0] < 1.9 * looped[0]
    assert at_once[1] < 0.25 * looped[1]


@pytest.mark.parametrize("threshold", [0.05, 0.001])
@pytest.mark.parametrize("prune", ["topk", "unbiased"])
async def test_a_text_unlike_what_the_model_knows_takes_few_forwards(tiny, threshold, prune):
    params = BeamParams(5, threshold, prune=prune)
    slow, fast, looped, at_once = await both_ways(tiny, params, LICENCE)
    assert at_once[1] < (0.12 if prune == "topk" else 0.2) * looped[1]
    if prune == "topk":  # a known text is thinned by what comes later, too: other draws
        assert fast.logZ == pytest.approx(slow.logZ, abs=1e-3)
    assert at_once[0] < (2.2 if prune == "topk" else 4) * looped[0]


@pytest.mark.parametrize("limit", [None, 40])
async def test_what_stood_in_for_a_row_is_none_afterwards(tiny, limit, monkeypatch):
    beam = await ByteBeamState.initial(tiny, BeamParams(5, 0.01))
    forget(beam)
    table = beam.lanes.model.store.table
    if limit:
        monkeypatch.setattr(table, "limit", limit)
    await beam.prefill(LICENCE[:200])
    held = np.flatnonzero(table.slot_of[:-1] >= 0)
    assert len(held) > 20
    np.testing.assert_array_equal(table._context[table.slot_of[held]], held)
    assert len(np.unique(table.slot_of[held])) == len(held)


async def test_the_prefix_of_a_potential_is_foreseen_too(tiny):
    llm = ByteLLM(tiny, BeamParams(5, 0.01))
    counts = llm.model.engine.counts
    texts = [LICENCE[:200], LICENCE[100:300], LICENCE[:200] + b" and so on"]
    llm.model.store.clear()
    counts.reset()
    weights = await llm.batch_prefix([[bytes([b]) for b in t] for t in texts])
    assert counts.forwards < 60
    llm.clear_cache()
    for text, weight in zip(texts, weights, strict=True):
        found = 0.0
        for i in range(len(text)):
            row = await llm.logw_next([bytes([b]) for b in text[:i]])
            found += float(row.weights[text[i]])
        assert found == pytest.approx(weight, abs=1e-3)


@pytest.mark.parametrize(
    ("begun", "stretch"),
    [
        (b"", 256),
        (b"", 8),
        (b"An app", 256),
        (b"An app", 2),
        (b"An apple a d", 2),
        (b"x\xff\xfe", 8),
    ],
)
async def test_a_guide_begun_inside_a_token_knows_what_it_says(tiny, begun, stretch, monkeypatch):
    monkeypatch.setattr(known_text, "STRETCH", (stretch, 256))
    lanes = (await ByteBeamState.initial(tiny, BeamParams(5))).lanes
    model, text = lanes.model, b"le a day keeps the doctor away. " * 12
    known = np.full(len(text) + 1, -1)
    guide = known_text.Guide(model, lanes.state, text, known)
    guide._partial, guide._at = begun, -len(begun)  # as if a long token had begun so
    while len(guide.further(lanes.state, -len(begun))):
        pass  # to the end, or to what the tokenizer cannot say
    places = np.flatnonzero(known >= 0).tolist()
    assert (len(places) > 40) == begun.isascii()
    for at in places:
        ids = model.engine.tree.tokens(int(known[at]))[len(model.engine.start) :]
        spelled = b"".join(bytes(model.vocab[t]) for t in ids)
        assert spelled == begun + text[:at]
