"""The coverage of regular expressions is counted, and a difference from `regex` is found."""

import random

from benchmarks import coverage


def test_the_patterns_shipped_cover_the_features_asked_for():
    """At least 100 distinct patterns, of every feature."""
    patterns = coverage.read(coverage.PATTERNS.read_text(encoding="utf-8").splitlines())
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


def test_a_difference_is_reported(monkeypatch):
    """A constraint that lets nothing end differs on every text that matches."""
    monkeypatch.setattr(coverage, "_accepts", lambda constraint, data: False)
    found = coverage.examine("", "[ab]+", 24, random.Random(0))
    assert found.matched == len(found.wrong) > 0
