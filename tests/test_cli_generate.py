"""The commands `generate` and `show`."""

import base64
import json
import re
import socket
from typing import get_args

import pytest
import torch
from typer.testing import CliRunner

from genlm_bytes_smc import load_model, surprisal_sync
from genlm_bytes_smc.cli import app, common, main
from genlm_bytes_smc.cli.options import Resampling
from genlm_bytes_smc.smc import RESAMPLING, SMCResult

PROMPT = "An apple a day keeps the "
FAST = ["--particles", "6", "--max-bytes", "8", "--seed", "3"]


@pytest.fixture(autouse=True)
def _tiny(tiny, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(common, "load_model", lambda *a, **k: tiny)
    yield
    torch.set_num_threads(threads)


def ask(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None, result.exception
    assert result.exit_code == 0
    return result.stdout


def fails(capsys, *arguments):
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return code, err


def test_resampling_offers_what_the_library_knows():
    assert set(get_args(Resampling)) == set(RESAMPLING)


def test_regex_and_page(tmp_path):
    run, page = tmp_path / "run.json", tmp_path / "page.html"
    found = json.loads(ask("generate", PROMPT, "--regex", "[a-d]{2,6}", *FAST, "--json",
                           "--save", run))  # fmt: skip
    assert all(re.fullmatch("[a-d]{2,6}", e["text"]) for e in found["posterior"])
    assert sum(e["probability"] for e in found["posterior"]) == pytest.approx(1)
    assert sum(e["particles"] for e in found["posterior"]) == 6 - found["dead"]
    assert found["lm_rows"] > 0
    loaded = SMCResult.load(run)
    assert loaded.log_ml == found["log_ml"]
    assert "wrote" in ask("show", run, "--out", page)
    text = page.read_text(encoding="utf-8")
    assert "Ancestry" in text
    assert "Particles by step" in text
    assert "http" not in text
    assert ask("show", run, "--out", "-") == text
    ask("show", run)
    assert run.with_suffix(".html").exists()


def test_the_page_shows_how_the_model_reads_the_likeliest_texts(tmp_path):
    """Their surprisals, noted in the file, are the model's own; the run's facts do not change."""
    run = tmp_path / "run.json"
    given = ["generate", PROMPT, "--regex", "[a-d]{2,6}", *FAST, "--json"]
    plain, saved = json.loads(ask(*given)), json.loads(ask(*given, "--save", run))
    same = ("posterior", "log_ml", "seed", "steps", "resamplings")
    assert {k: plain[k] for k in same if k in plain} == {k: saved[k] for k in same if k in saved}
    noted = json.loads(run.read_text())["readings"]
    texts = [base64.b64decode(r["text"]) for r in noted]
    assert texts == [t for t, *_ in SMCResult.load(run).grouped()[:4]]
    wanted = surprisal_sync(load_model("tiny"), texts, prompt=PROMPT)
    for reading, other in zip(noted, wanted, strict=True):
        assert sum(reading["nats"]) == pytest.approx(other.total, abs=0.2)
        assert 0 < sum(share for share, _ in reading["cuts"]) < 1.0001
    page = ask("show", run, "--out", "-")
    assert page.count("data-heat") >= len(texts)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("text", "?", "run.readings[0].text must be base64"),
        ("nats", [1], "run.readings[0].nats must be an array of"),
        ("cuts", [[2, []]], "must be a finite number in [0, 1]"),
        ("cuts", [[0.5, [99]]], "must be an integer of 0 to"),
        ("cuts", [[0.5]], "must be an array of 2 values"),
    ],
)
def test_readings_that_are_none_are_refused(tmp_path, capsys, key, value, told):
    """A file whose readings are damaged is refused with the name of the field."""
    run = tmp_path / "run.json"
    ask("generate", PROMPT, "--regex", "[ab]{2}", *FAST, "--save", run)
    data = json.loads(run.read_text())
    data["readings"][0][key] = value
    run.write_text(json.dumps(data))
    assert told in fails(capsys, "show", run, "--out", "-")[1]


def test_showing_a_run_served_any_file_to_the_network(tmp_path, monkeypatch):
    """genlm-control's viewer listens on all addresses; a page needs no server at all."""

    def refuse(*_):
        raise AssertionError("a socket was bound")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    monkeypatch.setattr(socket.socket, "listen", refuse)
    run = tmp_path / "run.json"
    ask("generate", PROMPT, "--regex", "[ab]", *FAST, "--save", run)
    page = ask("show", run, "--out", "-")
    assert not re.search(r"(?:src|href)\s*=|url\(|fetch\(|import\s|XMLHttp", page)


def test_default_is_utf8_and_a_table():
    out = ask("generate", PROMPT, "--particles", 6, "--seed", 3)
    for name in ("probability", "log marginal likelihood", "bytes/s", "LM rows", "UTF-8"):
        assert name in out


def test_grammar_and_schema(tmp_path):
    grammar, schema = tmp_path / "g.lark", tmp_path / "s.json"
    grammar.write_text('start: "yes" | "no"\n')
    schema.write_text('{"enum": [1, 22]}')
    found = json.loads(ask("generate", PROMPT, "--grammar", grammar, *FAST, "--json"))
    assert {e["text"] for e in found["posterior"]} <= {"yes", "no"}
    found = json.loads(ask("generate", PROMPT, "--json-schema", schema, *FAST, "--json"))
    assert {json.loads(e["text"]) for e in found["posterior"]} <= {1, 22}


@pytest.mark.parametrize("kind", ["ngram", "pilot"])
@pytest.mark.parametrize("option", ["--regex", "--grammar", "--json-schema"])
def test_look_ahead(tmp_path, kind, option):
    source = {"--regex": "(yes|no)", "--grammar": 'start: "yes" | "no"\n',
              "--json-schema": '{"enum": ["yes", "no"]}'}[option]  # fmt: skip
    if option != "--regex":
        file = tmp_path / "source"
        file.write_text(source)
        source = file
    found = json.loads(ask("generate", PROMPT, option, source, *FAST, "--json",
                           "--lookahead", kind))  # fmt: skip
    assert {e["text"].strip('"') for e in found["posterior"]} <= {"yes", "no"}
    assert found["lookahead"] == kind
    assert found["lookahead_rows"] >= 0  # none where the tests before have left rows
    plain = json.loads(ask("generate", PROMPT, option, source, *FAST, "--json",
                           "--lookahead", "none"))  # fmt: skip
    assert plain["lookahead"] == "none"
    assert plain["lookahead_rows"] == 0
    assert found["log_ml"] == pytest.approx(plain["log_ml"], abs=5)


def test_look_ahead_is_told(tmp_path):
    out = ask("generate", PROMPT, "--regex", "(yes|no)", *FAST, "--lookahead", "ngram")
    assert re.search(r"look-ahead +ngram, [\d,]+ LM rows to fit", out)
    plain = ["--regex", "(yes|no)", *FAST, "--lookahead", "none"]
    assert "look-ahead" not in ask("generate", PROMPT, *plain)


def test_a_look_ahead_in_stages_is_the_default():
    """The stages are told, and rows and weights are those of all of them."""
    found = json.loads(ask("generate", PROMPT, "--regex", "[a-d]{2,6}", *FAST, "--json"))
    assert found["lookahead"] == "auto"
    first, *others = found["stages"]
    assert not first["lookahead"]
    assert all(stage["lookahead"] for stage in others)
    assert sum(stage["particles"] for stage in found["stages"]) == found["particles"] == 6
    assert sum(stage["lm_rows"] for stage in found["stages"]) <= found["lm_rows"] + 1
    out = ask("generate", PROMPT, "--regex", "[a-d]{2,6}", *FAST)
    assert re.search(r"look-ahead +auto: 2 particles without, 4 trusting it \d+%", out)


def test_a_budget_of_rows():
    """A search finds texts, and a run the rest; another look-ahead takes no budget."""
    given = ["--regex", "[a-d]{2,6}", *FAST]
    found = json.loads(ask("generate", PROMPT, *given, "--budget", 60, "--json"))
    assert found["particles"] > 6
    assert [stage["lookahead"] for stage in found["stages"]] == [True]


def test_a_draft_proposes_blocks():
    """The model weighs whole blocks, in few forwards; look-ahead is off, and the draft is told."""
    given = ["generate", PROMPT, "--regex", "[a-z ]{24}", "-N", 4, "--max-bytes", 24, "--seed", 3]
    found = json.loads(ask(*given, "--draft", "tiny", "--block", 8, "--json"))
    assert found["lookahead"] == "none"
    assert (found["draft"], found["block"], found["resample_at"]) == ("tiny", 8, None)
    assert all(re.fullmatch("[a-z ]{24}", e["text"]) for e in found["posterior"])
    out = ask(*given, "--draft", "tiny")
    assert re.search(r"draft +tiny, blocks of 16 bytes, [\d,]+ rows of its own", out)
    assert "look-ahead" not in out


def test_particles_wait_at_the_strings_given():
    """A run with two lines a text resamples at most where they end."""
    given = ["generate", PROMPT, "--regex", "([a-c]{1,4}\n){2}", "-N", 6, "--max-bytes", 10,
             "--ess", 1, "--seed", 3]  # fmt: skip
    found = json.loads(ask(*given, "--resample-at", "\n", "--resample-at", "zz", "--json"))
    assert found["resample_at"] == ["\n", "zz"]
    assert found["lookahead"] == "none"
    assert 1 <= found["resamplings"] <= 2
    assert "resampled after" in ask(*given, "--resample-at", "\n")


def test_markup_in_a_text_stays_text(tmp_path):
    run = tmp_path / "run.json"
    ask("generate", "</script><b>", "--regex", "<b>&", *FAST, "--save", run)
    page = ask("show", run, "--out", "-")
    assert page.count("</script>") == 1
    assert "<b>&<" not in page


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--regex", "a", "--grammar", "x"], 2, "only one constraint"),
        (["--regex", "(a"], 2, "--regex"),
        (["--particles", 0], 2, "particles"),
        (["--ess", 1.5], 2, "ess"),
        (["--lookahead", "far"], 2, "lookahead"),
        (["--no-eos"], 2, "--no-eos"),
        (["--budget", 0], 2, "budget"),
        (["--budget", 9, "--lookahead", "none"], 2, "--budget needs --lookahead auto"),
        (["--budget", 9, "--draft", "tiny"], 2, "--budget needs --lookahead auto, got --draft"),
        (["--draft", "tiny", "--lookahead", "auto"], 2, "--draft does not go with --lookahead"),
        (["--resample-at", ".", "--lookahead", "pilot"], 2, "--resample-at does not go with"),
        (["--draft", "tiny", "--resample-at", "."], 2, "--draft does not go with --resample-at"),
        (["--draft", "tiny", "--prune", "unbiased"], 2, "--draft does not go with --prune"),
        (["--draft", "tiny", "--block", 0], 2, "block"),
        (["--block", 8], 2, "--block is the length of what a draft proposes"),
        (["--resample-at", ""], 2, "--resample-at needs a string of at least a byte"),
        (["--json-schema", "missing.json"], 1, "cannot read missing.json"),
        (["--regex", "a{20}", "--max-bytes", 5, "-N", 3], 1, "length limit"),
    ],
)
def test_errors(capsys, arguments, code, told):
    found, err = fails(capsys, "generate", PROMPT, *arguments)
    assert found == code
    assert told in err


def test_bad_files(capsys, tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text("{no json")
    assert "JSON" in fails(capsys, "generate", PROMPT, "--json-schema", bad)[1]
    assert "no saved" in fails(capsys, "show", bad)[1]
    bad.write_text('{"format": "genlm_bytes_smc.SMCResult/1"}')
    assert "no 'history'" in fails(capsys, "show", bad)[1]
    assert "cannot read" in fails(capsys, "show", tmp_path / "none.json")[1]


def test_a_dead_run_can_be_shown(capsys, tmp_path):
    run = tmp_path / "dead.json"
    limits = ["--max-bytes", 5, "-N", 3, "--save", run]
    assert fails(capsys, "generate", PROMPT, "--regex", "a{20}", *limits)[0] == 1
    assert "All particles are dead" in ask("show", run, "--out", "-")


def test_a_place_that_cannot_be_written_is_refused_before_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("genlm_bytes_smc.cli.generate.open_model", None)  # not even asked for
    for bad, why in ((tmp_path, "it is a folder"), (tmp_path / "no" / "run.json", "no folder")):
        code, err = fails(capsys, "generate", "A", "--regex", "a", "--save", bad)
        assert code == 1 and "cannot write" in err and why in err
