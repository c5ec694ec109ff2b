"""The coverage of regular expressions is counted, and a difference from `regex` is found."""

import random

import pytest

from benchmarks import coverage


def test_the_patterns_shipped_cover_the_features_asked_for():
    """At least 100 distinct patterns, of every feature."""
    patterns = coverage.read(coverage.PATTERNS)
    assert len({p for _, p in patterns}) == len(patterns) >= 100
    names = "backreference conditional atomic look recursion boundary Unicode quantifier flags"
    for name in names.split():
        assert any(name in feature for feature, _ in patterns), name


def test_each_way_is_counted(tmp_path, capsys):
    """An automaton, a pattern matched text by text, and one refused, from a file."""
    file = tmp_path / "patterns.txt"
    file.write_text("# sorts\na{2,3}é\n(a|b)\\1\na(b\n", encoding="utf-8")
    assert coverage.main([str(file), "--texts", "24"]) == 0
    said = capsys.readouterr().out
    assert [c.strip() for c in said[said.index("│ all") :].split("│")[2:7]] == list("31110")
    assert "1 text by text: a backreference" in said
    assert "refused: a(b: the pattern 'a(b' does not parse" in said


def test_a_table_is_read(tmp_path, capsys):
    """Patterns stand in the column regex of a CSV file; a file without one is refused."""
    file = tmp_path / "patterns.csv"
    file.write_text('n,regex\n1,"a{2,3}"\n2,(b)\n', encoding="utf-8")
    assert coverage.read(file) == [("", "a{2,3}"), ("", "(b)")]
    file.write_text("n,text\n1,a\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        coverage.main([str(file)])
    assert "expected a column named regex or pattern, got ['n', 'text']" in capsys.readouterr().err


def test_texts_that_regex_grows_are_compared():
    """A pattern that random texts do not match has matches among the texts compared."""
    found = coverage.examine("", r"^(\d{3})(-| )\d{4}\2\1$", 30, random.Random(0))
    assert found.matched > 2
    assert not found.wrong


def test_a_difference_is_reported(monkeypatch):
    """A constraint that lets nothing end differs on every text that matches."""
    monkeypatch.setattr(coverage, "_accepts", lambda constraint, data: False)
    found = coverage.examine("", "[ab]+", 24, random.Random(0))
    assert found.matched == len(found.wrong) > 0
