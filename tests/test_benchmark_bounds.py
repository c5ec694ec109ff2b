"""The benchmarks of bounds and of drafts, on the bundled model and on minuscule sizes."""

import numpy as np
import pytest

from benchmarks import bounds, draft
from benchmarks.auto import PARAMS
from genlm_bytes_smc import ByteLLM, load_model


@pytest.fixture(scope="module")
def engine():
    return load_model("tiny")


async def test_a_text_with_an_unlikely_beginning(engine):
    """One of the texts found has 4 to 12% of the posterior and the rarer first byte."""
    prompt, none = bounds.WORLDS["tiny"]["unlikely beginning"]
    assert not none
    llm = ByteLLM(engine, PARAMS, prompt=prompt.encode())
    texts = await bounds.unlikely_beginning(llm)
    logs = await llm.batch_complete([bounds._symbols(t) for t in texts])
    assert 0.04 < np.exp(logs[0] - np.logaddexp.reduce(logs)) < 0.12
    first = (await llm.logw_next([b" "])).weights
    assert first[ord(texts[0][1])] < first[ord(texts[1][1])] - 2


async def test_a_line_of_coverage(engine):
    """Three intervals of a constraint, by both ways."""
    llm = ByteLLM(engine, PARAMS, prompt=bounds.TALE.encode())
    size, ours, theirs = await bounds.measure(llm, ["big dog", "fox", "cat"], 4, 3)
    assert size == "4"
    assert ours.startswith("100.0%, ")
    assert "%, " in theirs


def test_what_covering_is():
    low, high = np.array([0.0, 2.0, 0.5]), np.array([1.5, 3.0, 1.0])
    assert bounds.covers(low, high, 1.0) == (2 / 3, pytest.approx(1.0))
    values = np.array([[1.0, 2.0, 3.0]])
    assert bounds.students(values, 1)[0] == pytest.approx(2 + 4.3027 / 3**0.5, abs=1e-3)


async def test_a_draft_of_blocks_saves_forwards_of_the_target(engine):
    """And what they disagree by is nothing where both are the same model."""
    small = load_model("tiny")
    plain = await draft.measure(engine, small, draft.PROMPTS[0], 4, None, 0)
    drafted = await draft.measure(engine, small, draft.PROMPTS[0], 4, 16, 0)
    assert len(plain) == len(drafted) == len(draft.HEADS)
    assert float(drafted[3]) < float(plain[3])
    assert float(drafted[-1]) < 0.1
