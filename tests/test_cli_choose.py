"""The commands `choose` and `score --per`: their numbers, JSON and errors."""

import json
import math

import pytest

from genlm_bytes_smc import BeamParams, choose_sync, surprisal_sync
from tests.test_cli import _tiny, ask, ask_json, stdin, tiny  # noqa: F401 - fixtures

APPLE = "An apple a day keeps the "


def test_choose(ask, ask_json, tiny, tmp_path):  # noqa: F811
    """The command says what the function says; answers come from arguments and a file."""
    params = BeamParams(K=32, prune_threshold=1e-4)
    wanted = choose_sync(tiny, APPLE, ["doctor", "cat", "dog"], beam_params=params)
    (tmp_path / "more.txt").write_text("cat\ndog\n")
    got = ask_json("choose", APPLE, "doctor", "--options-file", tmp_path / "more.txt")
    assert got["best"] == "doctor"
    assert [o["option"] for o in got["options"]] == ["doctor", "cat", "dog"]
    assert [o["probability"] for o in got["options"]] == pytest.approx(wanted.probabilities)
    assert got["bound"] == pytest.approx(wanted.bound)
    code, out, _ = ask("choose", APPLE, "doctor", "cat", "--normalise", "end")
    assert code == 0
    assert b"doctor" in out.splitlines()[1]


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["x"], 2, "give one answer or more"),
        (["x", "a", "a"], 1, "more than once among them"),
        (["x", "a", "--normalise", "end", "--no-eos"], 2, "--no-eos rules out"),
        (["x", "--options-file", "/no/such"], 1, "cannot read /no/such"),
        (["-", "--options-file", "-"], 2, "the prompt or the options, not both"),
    ],
)
def test_choose_errors(ask, arguments, code, told):  # noqa: F811
    """Errors come in one line, with the exit code of their kind."""
    got, _, err = ask("choose", *arguments)
    assert got == code
    assert told in err and err.count("\n") == 1


def test_surprisal_of_a_data_set(ask, ask_json, tiny, tmp_path):  # noqa: F811
    """Texts of a JSONL file, their parts, and the page."""
    texts = ["An apple a day.", "Two <pears>."]
    data, page = tmp_path / "d.jsonl", tmp_path / "page.html"
    data.write_text("".join(json.dumps({"s": t}) + "\n" for t in texts))
    got = ask_json("score", data, "--per", "word", "--jsonl", "s", "--html", page)["texts"]
    wanted = surprisal_sync(tiny, texts, "word")
    assert [t["nats"] for t in got] == pytest.approx([r.total for r in wanted])
    assert [p["text"] for p in got[0]["parts"]] == ["An", " apple", " a", " day."]
    assert "&lt;pears&gt;" in page.read_text()
    (tmp_path / "lines.txt").write_text("\n".join(texts))
    whole = ask_json("score", tmp_path / "lines.txt", "--lines")["texts"]
    assert [t["bits"] * math.log(2) for t in whole] == pytest.approx([r.total for r in wanted])
    assert ask("score", tmp_path / "lines.txt", "--per", "character")[0] == 0


def test_surprisal_errors(ask, tmp_path):  # noqa: F811
    """A missing field, two kinds of data, a page without parts."""
    data = tmp_path / "d.jsonl"
    data.write_text('{"a": "x"}\n{"a": 3}\n')
    for arguments, code, told in [
        (["--jsonl", "b"], 1, "line 1: not a JSON object with the field 'b'"),
        (["--jsonl", "a"], 1, "line 2: 'a' is no text but 3"),
        (["--jsonl", "a", "--lines"], 2, "not both"),
        (["--lines", "--html", "x"], 2, "say which by --per"),
        (["--html", "x"], 2, "say which by --per"),
    ]:
        got, _, err = ask("score", data, *arguments)
        assert got == code
        assert told in err
