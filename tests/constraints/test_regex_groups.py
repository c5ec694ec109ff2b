"""Calls of groups and conditionals on groups in automata, against the `regex` module."""

import itertools
import random

import pytest
import regex

from genlm_bytes_smc.constraints import ByteDFA, ByteRegex, ConstraintError
from genlm_bytes_smc.constraints.base import NotRegularError
from genlm_bytes_smc.constraints.regex_tree import parse
from tests.constraints.oracles import accepted

# Pattern, texts that it matches, and texts that it does not.
COMPILED = [
    (r"(?<n>\d+)-(?&n)", ["1-23"], ["1-", "-1"]),
    (r"(?(DEFINE)(?<hex>[0-9A-F]))0x(?&hex){2}", ["0xA0"], ["0xG0", "0xA"]),
    (r"((?&b)|c)(?<b>a+)", ["aaa", "ca"], ["a", "c"]),
    (r"(?i:(ab))(?1)", ["ABaB", "abab"], ["ab", "abcd"]),
    (r"(a)?(?(1)b|c)", ["ab", "c"], ["ac", "b"]),
    (r"(?:(a)|b)(?(1)c|d)", ["ac", "bd"], ["ad", "bc"]),
    (r"(a)?(?(1)(b)?(?(2)c|d)|e)", ["abc", "ad", "e"], ["ac", "abd"]),
    (r"(?<x>a)?(?<y>b)?(?(x)c|d)(?(y)e|f)", ["abce", "acf", "bde", "df"], ["acd", "abcf"]),
    (r"((?=a)|(?=b))(?(1)a|b)c", ["ac"], ["bc"]),
    (r"(?|(a)|b(c))?(?(1)x|y)", ["ax", "bcx", "y"], ["ay", "x"]),
]


@pytest.mark.parametrize(("pattern", "inside", "outside"), COMPILED)
def test_calls_and_conditionals_become_an_automaton(pattern, inside, outside):
    """No warning, and texts inside and outside agree with `regex`."""
    constraint, compiled = ByteRegex(pattern), regex.compile(pattern)
    assert isinstance(constraint, ByteDFA)
    for text in [*inside, *outside]:
        assert accepted(constraint, text.encode()) == (text in inside), text
        assert bool(compiled.fullmatch(text)) == (text in inside), text


@pytest.mark.parametrize(
    ("pattern", "part"),
    [
        (r"(a(?1)?b)", "recursive"),
        (r"(?<x>a|(?&y))(?<y>b|\((?&x)\))", "recursive"),
        (r"(?:(a)?(?(1)b|c))*", "conditional"),
        (r"(a)?(?1)(?(1)b|c)", "conditional"),
        ("".join(f"(?<g{i}>(?&g{i + 1})(?&g{i + 1}))" for i in range(20)) + "(?<g20>a)", "recurs"),
    ],
)
def test_what_stays_without_an_automaton(pattern, part):
    """Recursion, conditionals in repeats or with calls, and calls that double at each level."""
    with pytest.raises(NotRegularError, match=part):
        parse(pattern)


def test_random_patterns_with_groups_agree_with_regex():
    """Of 60 patterns with an automaton, all texts up to five letters of three."""
    rng = random.Random(3)
    texts = ["".join(t) for n in range(6) for t in itertools.product("abc", repeat=n)]

    def draw(depth):
        kind = rng.random()
        if depth == 0 or kind < 0.25:
            return rng.choice(["a", "b", "[ab]", "c", "", "a?"])
        one, two = draw(depth - 1), draw(depth - 1)
        if kind < 0.45:
            return one + two
        if kind < 0.55:
            return f"(?:{one}|{two})"
        if kind < 0.75:
            return f"({one})" + rng.choice(["", "?", "?", "??", "*", "{0,2}", "{2}"])
        if kind < 0.9:
            return f"(?({rng.randrange(1, 4)}){one}|{two})"
        return rng.choice([f"(?={one})", f"(?!{one})", "(?&x)"])

    compared = 0
    while compared < 60:
        pattern = rng.choice(["", f"(?<x>{draw(2)})"]) + draw(4)
        try:
            compiled = regex.compile(pattern)
            parse(pattern)
        except (regex.error, NotRegularError):
            continue
        if "(?(" not in pattern and "(?&" not in pattern:
            continue
        compared += 1
        expected = [bool(compiled.fullmatch(text)) for text in texts]
        try:
            constraint = ByteRegex(pattern)
        except ConstraintError:  # it matches no text
            assert not any(expected), pattern
            continue
        ends = constraint.log_complete(constraint.states([text.encode() for text in texts]))
        assert (ends == 0).tolist() == expected, pattern
