"""Scores and completions as library functions."""

import math

import pytest

from genlm_bytes_smc import BeamParams, ByteBeamState, Prompt, as_engine
from genlm_bytes_smc.scoring import ScoreError, score
from genlm_bytes_smc.streaming import Completion, NoCandidateError
from tests.toys import EOS_TOKEN, Enumeration, ToyLM


async def test_a_score_is_the_enumerated_prefix_probability():
    toy = ToyLM()
    beam = await ByteBeamState.initial(toy, BeamParams(K=None))
    seen = []
    found = await score(beam, b"abcab", seen.append)
    assert found.log_p == pytest.approx(math.log(Enumeration(toy).prefix(b"abcab")))
    assert found.n_bytes == sum(seen) == 5
    tokens = Prompt.tokens([0, 1])  # exactly these
    start = as_engine(toy).start
    rows = [toy.row(start)[0], toy.row([*start, 0])[1]]
    assert (await score(beam, tokens)).log_p == pytest.approx(float(sum(rows)))


async def test_a_score_says_where_no_candidate_could_read_on():
    beam = await ByteBeamState.initial(ToyLM(), BeamParams(K=4))
    with pytest.raises(ScoreError, match="past some byte between 0 and 2"):
        await score(beam, b"a\xff")


async def test_a_window_without_room_is_refused():
    engine = as_engine(ToyLM())
    engine.window = len(engine.start)
    with pytest.raises(ScoreError, match="has no room for a text"):
        await score(await ByteBeamState.initial(engine, BeamParams(K=4)), b"a")


async def test_a_completion_weighs_what_it_has_read():
    toy = ToyLM(sharpness=1.0)
    params = BeamParams(K=None, eos_byte_strings=[EOS_TOKEN])
    beam = await (await ByteBeamState.initial(toy, params)).prefill(b"ab")
    oracle = Enumeration(toy, frozenset({EOS_TOKEN}))
    for seed in range(4):
        completion = Completion(beam, 4, seed)
        text = b"ab" + bytes([byte async for byte in completion])
        weight = oracle.ended(text) if completion.ended else oracle.prefix(text)
        assert completion.log_z == pytest.approx(math.log(weight))
        assert completion.ended or len(text) == 6
    greedy = bytes([byte async for byte in Completion(beam, 3)])
    assert b"ab" + greedy == await (await ByteBeamState.initial(toy, params)).greedy(b"ab", 3)


async def test_a_dead_beam_has_no_completion():
    beam = await (await ByteBeamState.initial(ToyLM(), BeamParams(K=4))).prefill(b"a")
    dead = ByteBeamState(await beam.lanes.step([0xFF]))
    with pytest.raises(NoCandidateError, match="wider beam"):
        [byte async for byte in Completion(dead, 3)]
