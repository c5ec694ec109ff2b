"""What reading a known text asks of the model."""

import itertools

import pytest

from benchmarks.ngram import NgramLM
from genlm_bytes_smc import BeamParams, ByteBeamState
from genlm_bytes_smc.beam import prefill


@pytest.fixture(scope="module")
def bigrams():
    """An LM whose beam often leaves the tokenizer's own way to cut a text."""
    return NgramLM(n_bytes=20_000, n_tokens=4000)


async def test_a_text_off_the_tokenizers_path_costs_few_rows_for_nothing(bigrams, monkeypatch):
    beam = await ByteBeamState.initial(bigrams, BeamParams(5, 0.05))
    text = bigrams.held_out[:500]
    counts, store = beam.counts, beam.lanes.model.store
    slow = beam
    counts.reset()
    for byte in text:
        slow = await (slow.prune() << byte)
    one_by_one = counts.rows
    seen = []

    def run(lanes, rest, reach, horizon, run=prefill._run):
        found = run(lanes, rest, reach, horizon)
        seen.append((horizon, found.read))
        return found

    monkeypatch.setattr(prefill, "_run", run)
    store.clear()
    counts.reset()
    fast = await beam.prefill(text)
    assert fast.logZ == pytest.approx(slow.logZ, abs=1e-9)
    assert counts.rows < 2.5 * one_by_one
    assert counts.forwards < 0.3 * one_by_one
    assert seen[0][0] == 256
    for (_, read), (horizon, _) in itertools.pairwise(seen):
        assert 8 <= horizon <= max(8, 2 * read), "as far as the last guess held"
