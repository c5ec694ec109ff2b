"""Results as records, frames and metrics; genlm-control's samples in and out."""

import json
import sys

import numpy as np
import pytest
from genlm.control.constant import EOS
from genlm.control.sampler.sequence import Sequences

from genlm_bytes_smc import BeamParams, ByteLLM, ByteRegex
from genlm_bytes_smc.smc import TextSamples, smc
from tests.toys import EOS_TOKEN, ToyLM


async def drawn(n=6):
    llm = ByteLLM(ToyLM(seed=1), BeamParams(K=None, eos_byte_strings=[EOS_TOKEN]))
    return await smc(llm * ByteRegex("ab|ba|cab"), n, 0.5, 6, seed=3)


async def test_records_are_plain_and_complete():
    """A record a particle, whose probabilities sum to one; JSON takes them."""
    result = await drawn()
    rows = json.loads(json.dumps(result.to_records()))
    assert [r["text"].encode() for r in rows] == result.texts
    assert sum(r["probability"] for r in rows) == pytest.approx(1)
    assert [r["log_weight"] for r in rows] == pytest.approx(result.log_weights.tolist())
    odd = TextSamples([b"\xff", b"a"], np.array([True, False]), np.zeros(2))
    assert [r["text"] for r in odd.to_records()] == [b"\xff", "a"]


async def test_a_frame_needs_pandas_only_when_asked_for(monkeypatch):
    """With pandas a frame comes back; without it the error says what still works."""
    result = await drawn()
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pandas", None)
        with pytest.raises(ImportError, match="needs pandas"):
            result.to_frame()
    pandas = pytest.importorskip("pandas")
    frame = result.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns) == ["text", "bytes", "ended", "log_weight", "probability"]
    assert frame.groupby("text").probability.sum().to_dict() == pytest.approx(
        dict(result.decoded_posterior.items())
    )


async def test_metrics_are_numbers():
    """Each metric is a number, and says what the result says."""
    result = await drawn()
    found = result.metrics()
    assert all(isinstance(v, int | float) for v in found.values())
    assert found["log_ml"] == result.log_ml and found["particles"] == 6
    json.dumps(found)


async def test_sequences_in_and_out():
    """Samples go to genlm-control's class and come back the same, over bytes or tokens."""
    result = await drawn()
    plain = result.to_sequences()
    assert type(plain) is Sequences
    assert plain.log_ml == pytest.approx(result.log_ml)
    back = TextSamples.from_sequences(plain)
    assert back.texts == result.texts
    assert back.ended.tolist() == result.ended.tolist()
    assert back.ess == pytest.approx(result.ess)
    tokens = Sequences([[b"ab", b"c", EOS], [97], []], [0.0, -1.0, -2.0])
    assert TextSamples.from_sequences(tokens).texts == [b"abc", b"a", b""]
    assert TextSamples.from_sequences(tokens).ended.tolist() == [True, False, False]
    with pytest.raises(TypeError, match="contexts and log_weights"):
        TextSamples.from_sequences([b"a"])
    with pytest.raises(TypeError, match="a token is bytes"):
        TextSamples.from_sequences(Sequences([["a"]], [0.0]))
