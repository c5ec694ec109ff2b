"""The benchmarks run on minuscule sizes, count what they should, and agree with genlm-bytes."""

import json
import warnings

import pytest
import torch

from benchmarks import beam, forward, measure, parts, report
from benchmarks.measure import Record, Sizes, check
from benchmarks.ngram import NgramLM

SIZES = Sizes(
    peer_seconds=0.05,
    ngram_tokens=1200,
    ngram_bytes=24,
    trie_tokens=1200,
    prompt=24,
    decoded=6,
    lanes=4,
    steps=3,
    long=200,
    repeats=1,
)
ABOUT = {"date": "today", "cpu": "a cpu", "cores": "2", "system": "any", "default threads": "2"}
ABOUT["model"] = "bundled model"
ABOUT |= dict.fromkeys(("python", *report.PACKAGES), "1")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


async def test_engine_alone_agrees_with_genlm_bytes():
    lm = NgramLM(n_bytes=20_000, n_tokens=SIZES.ngram_tokens)
    assert len(lm.tokens) == SIZES.ngram_tokens
    records = await measure.engine_alone(lm, SIZES)
    assert [r.case.split(",")[0] for r in records] == 2 * ["prefill", "loop", "greedy"]
    for r in records:
        assert r.part == "a"
        assert r.ours > 0
        assert r.peer > 0
        assert 1 <= r.work["peer_bytes"] <= 24
        if r.case.startswith("greedy"):
            assert r.work["same_bytes"] >= 1
        else:
            assert r.apart < 1e-3
        assert r.work["ours_rows"] > 0
        assert r.work["ours_forwards"] <= r.work["ours_rows"]
    # Asked for the same bytes, both want about the same rows; ours in far fewer forwards.
    prefill = records[3].work
    assert prefill["ours_forwards"] < 0.75 * max(prefill["ours_rows"], 1)


async def test_parts_of_a_byte_add_up():
    rows, steps = NgramLM.rows, parts.steps_numba.read
    found = await parts.measure(NgramLM(n_bytes=20_000, n_tokens=SIZES.ngram_tokens), 24)
    assert [case.split(",")[0] for case, _ in found] == 2 * ["prefill", "loop", "greedy"]
    for _, spent in found:
        assert sum(spent[p] for p in parts.PARTS) == pytest.approx(spent["in all"])
        assert all(spent[p] > 0 for p in parts.PARTS)
    assert (NgramLM.rows, parts.steps_numba.read) == (rows, steps)  # timed no longer


def test_trie_records():
    ours, peer = (measure.trie_of(side, SIZES.trie_tokens) for side in ("ours", "peer"))
    assert ours["array_bytes"] > 0
    assert ours["wall"] > 0
    assert peer["wall"] > 0
    ours["bytes"], peer["bytes"] = 1.0, 50.0 * ours["array_bytes"]  # growth is not repeatable
    time_, memory = measure.trie_records(ours, peer)
    assert memory.ratio == pytest.approx(50)
    assert memory.met
    assert time_.goal == 20


async def test_bundled_model_agrees_with_genlm_bytes():
    records = await measure.one_model(SIZES)
    prefill, unlike, decode = records[:3]
    for record in (prefill, unlike):
        assert record.apart < 1e-2
        assert record.log_z < 0
    assert decode.work["same_bytes"] >= min(3, decode.work["peer_bytes"])
    assert prefill.work["ours_forwards"] < prefill.work["peer_forwards"]
    assert [r.part for r in records[3:]] == 4 * ["e"]


async def test_lanes_and_length_counts():
    records = await measure.lanes_and_length(SIZES)
    many, late = records[:2]
    assert many.at_most
    assert many.goal == 10
    assert late.goal == 3
    assert many.work["forwards"] <= 1  # all lanes in one
    assert 0 < many.work["rows"] <= SIZES.lanes * measure.K
    assert records[4].ours > 0
    assert records[5].ours > 0


def test_disagreement_is_an_error():
    check(Record("a", "x", "", 1.0, apart=0.009, log_z=-1.0))
    check(Record("a", "x", "", 1.0, apart=0.5, log_z=-1000.0))
    for apart in (0.02, float("nan")):
        with pytest.raises(AssertionError, match="log Z differs"):
            check(Record("a", "x", "", 1.0, apart=apart, log_z=-1.0))


def _records():
    common = {"unit": "bytes/s", "ours": 1e4, "peer": 10.0, "ratio": 1e3, "cpu_ratio": 900.0}
    return [
        Record("a", "loop", goal=100.0, apart=1e-3, log_z=-9.0, threads="1", **common),
        Record("d", "lanes", "ms", 3.0, 1.0, 3.0, 10.0, at_most=True, threads="default"),
        Record("d", "late", "ms", 9.0, 1.0, 9.0, 3.0, at_most=True, threads="1"),
        Record("e", "rows", "per byte", 0.3, 0.3, 1.0),
    ]


def test_report_writes_table_figure_and_lines(tmp_path, monkeypatch, capsys):
    records = _records()
    assert [r.met for r in records] == [True, True, False, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report.write(records, ABOUT, tmp_path, quick=True)
    lines = [json.loads(line) for line in (tmp_path / "beam.jsonl").read_text().splitlines()]
    assert lines[0]["about"]["cpu"] == "a cpu"
    assert lines[0]["quick"]
    assert [x["met"] for x in lines[1:]] == [True, True, False, None]
    for suffix in ("png", "svg"):
        assert (tmp_path / f"beam.{suffix}").stat().st_size > 1000
    report.show(records, ABOUT)
    assert "1,000x" in capsys.readouterr().out

    monkeypatch.setattr(report, "DOCS", tmp_path)
    page = tmp_path / "performance.md"
    page.write_text(f"before {report.BEGIN} old {report.END} after")
    report.update_docs(records, ABOUT)
    text = page.read_text()
    assert text.startswith("before ")
    assert text.endswith(" after")
    assert " old " not in text
    assert "| 1,000x |" in text
    assert (tmp_path / "images" / "performance.svg").exists()


def test_command_line_chooses_parts(tmp_path, monkeypatch, capsys):
    asked = []

    def child(part, threads, args):
        asked.append((part, threads, args.quick))
        return [Record(p, "x", "s", 1.0, threads=threads) for p in beam.RUNS[part]]

    monkeypatch.setattr(beam, "_child", child)
    beam.main(["--only", "b,e", "--quick", "--out", str(tmp_path)])
    assert asked == [(part, "1", True) for part in "bcd"]
    lines = (tmp_path / "beam.jsonl").read_text().splitlines()
    assert [json.loads(line)["part"] for line in lines[1:]] == ["b", "e", "e"]
    with pytest.raises(SystemExit, match="unknown parts"):
        beam.main(["--only", "z"])


def test_a_forward_is_taken_apart(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    forward.main(["--quick"])
    out = capsys.readouterr().out
    assert "products alone" in out
    assert "as chosen" in out
    assert "row_key" in out


def test_the_layouts_of_the_table_are_those_that_ran():
    bench = forward.Bench("cpu", forward.QUICK)
    assert bench.chosen(4, 20, 2) == "range"
    assert bench.chosen(16, 0, 40) == "rows"
