"""The benchmarks of accuracy against cost, on the bundled model."""

from __future__ import annotations

import pytest

from benchmarks import choices, frontier, posterior
from benchmarks.frontier import TOP, UNBIASED, WAYS
from genlm_bytes_smc import load_model


def test_the_frontier_loses_less_with_lower_limits(tmp_path):
    """Errors are distances from the best that any setting finds; rows grow as limits fall."""
    llm = load_model("tiny")
    texts = [b"The cat", "Zoë".encode()]
    some = WAYS[::3]
    found = frontier.read_all(llm, some, texts, "test")
    lost = frontier.errors(found)
    assert all(len(x) == len(texts) and (x >= 0).all() for x in lost.values())
    kept = [w for w in some if w.family != UNBIASED]
    assert min(max(lost[w]) for w in kept) < 0.05
    rows = [sum(r.rows for r in found[w]) for w in some if w.family == TOP]
    assert rows == sorted(rows)
    times = frontier.seconds(llm, some[:2], texts[:1])
    lines = frontier.lines(found, times, sum(map(len, texts)))
    assert len(lines) == len(some)
    assert all(len(line) == len(frontier.HEADS) for line in lines)
    frontier.draw(found, times, 30, "tiny").savefig(tmp_path / "frontier.svg")
    prose = frontier.prose_lines(found, 9)
    assert all(len(line) == len(frontier.PROSE_HEADS) for line in prose)


def test_prose_is_twenty_kilobytes():
    """Forty pieces of 512 bytes, a quarter of them code."""
    pieces = frontier.pieces()
    assert sum(map(len, pieces)) == 40 * 512
    assert b"def " in b"".join(pieces[30:])


def test_answers_are_compared_with_a_wider_beam(monkeypatch):
    """A beam of 32 is nearer to a wider one than K=5, at more rows."""
    monkeypatch.setattr(choices, "CASES", (("The cat", (" sat", " ran", " is 5")),))
    llm = load_model("tiny")
    exact = choices.wide(llm)
    found = [choices.measure(llm, params, exact) for params in choices.WAYS.values()]
    assert found[1][0] > found[-1][0]
    assert found[1][1].max() <= found[-1][1].max()


async def test_posteriors_are_measured_from_empty_caches(monkeypatch, tmp_path):
    """Each run counts its own rows; its estimate is near the enumerated one."""
    texts = ["a cat", "a dog"]
    monkeypatch.setattr(posterior, "SENTENCES", texts)
    llm = load_model("tiny")
    exact = await posterior.enumerate_texts(llm, posterior.PROMPT, texts)
    few, many = [
        await posterior.measure(llm, "deferred (default)", n, exact, seeds=1) for n in (2, 16)
    ]
    assert min(few.rows, many.rows) > 20
    assert many.error == pytest.approx(0, abs=1.0)
    posterior.draw([few, many], "tiny").savefig(tmp_path / "posterior.svg")
