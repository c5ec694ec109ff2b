"""ByteRegex against the `regex` module: what it matches, and what it may still match."""

import pickle
import random

import numpy as np
import pytest
import regex
import torch

from genlm_bytes_smc import BeamParams, ByteLLM, FastPathWarning, smc
from genlm_bytes_smc.constraints import ByteRegex, ConstraintError, PartialRegex
from genlm_bytes_smc.constraints.automata import minimal
from genlm_bytes_smc.constraints.regex_tree import parse
from tests.constraints.oracles import accepted, alphabet_of, mutated, partially, walk

PATTERNS = [
    r"abc",
    r"",
    r"a*",
    r"(a|b)*abb",
    r".",
    r".*",
    r"(?s).*",
    r"[^a]+é?",
    r"[à-ü]{2,3}",
    r"\w+",
    r"\w{1,5}",
    r"\W+",
    r"\d{1,3}(\.\d+)?",
    r"\D*",
    r"\s+\S+",
    r"(?a)\w+\d*\s?",
    r"[\w.+-]+@[\w-]+\.[a-z]{2,4}",
    r"(?i)straße|kelvin",
    r"(?i)[a-cé]+",
    r"(?i)[^k]x",
    r"(?:foo(?i:bar)baz)+",
    r"\p{L}\p{M}*",
    r"\P{L}+",
    r"\p{Lu}\p{Ll}+( \p{Lu}\p{Ll}+)*",
    r"\p{Greek}+|\p{Cyrillic}+",
    r"\p{Script=Han}{1,3}",
    r"(?V1)[\w--\d]+",
    r"(?V1)[\p{L}&&\p{ASCII}]+",
    r"(?V1)[[a-z]~~[x-zé]]+",
    r"(?V1)[[a-f][à-ü]]+",
    r"[[:alpha:]]+[[:^digit:]]",
    r"[]a-]+[^]]",
    r"\x41\u00e9\U0001F600\N{SNOWMAN}?",
    r"[\x00-\x1f\x7f]{1,2}",
    r"\101\n\t\\\.",
    r"(?x) a b  # a comment",
    r"(?P<year>\d{4})-(?<month>\d\d)",
    r"^ab$",
    r"^$|^a\Z",
    r"a$\n?",
    r"(^a|b)+$",
    r"(a|^)b(\Z|$)\n*",
    r"a{0}b{2,}c{,2}d{3}",
    r"a+?b*?c??",
    r"(a?){3}(b*){2}(c+){0,2}",
    r"((a|bc){2}|d){1,3}",
    r"x{}|{|}",
    r"[\U0001F600-\U0001F64Fé-\uD7FF]+",
    r"\h*\S",
    r"a|",
    r"(|a)(b|)",
    r"[\uD7C0-\uE010]",
    r"[\s\S]{3}",
    r"(?:[01]\d|2[0-3]):[0-5]\d",
    r"0|[1-9][0-9]*",
    r"\"(?:[^\"\\\x00-\x1f]|\\[\"\\/bfnrt]|\\u[0-9a-fA-F]{4})*\"",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_agrees_with_regex_on_whole_texts_and_on_prefixes(pattern):
    rng = random.Random(pattern)
    constraint = ByteRegex(pattern)
    compiled = regex.compile(pattern)
    letters = alphabet_of(pattern)
    texts = {"".join(rng.choices(letters, k=rng.randrange(7))) for _ in range(120)}
    for _ in range(60):
        text = walk(constraint, rng)
        if text is not None:
            assert compiled.fullmatch(text.decode()), text
            texts |= {text.decode(), mutated(text.decode(), letters, rng)}
    for text in texts:
        data = text.encode()
        assert accepted(constraint, data) == bool(compiled.fullmatch(text)), text
        live = bool(partially(compiled, text))
        assert (constraint.states([data])[0] >= 0).item() == live, text


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_prefix_inside_a_character_lives_iff_some_completion_does(pattern):
    constraint, compiled = ByteRegex(pattern), regex.compile(pattern)
    before = [b""] + [t for t in (walk(constraint, random.Random(i), 3) for i in range(2)) if t]
    for start in before:
        text = start.decode()
        for partial in [b"\xc3", b"\xe2\x98", b"\xed\x9f", b"\xf0\x9f\x98", b"\xf4\x8f\xbf"]:
            last = 64
            characters = [
                (partial + bytes([0x80 + i])).decode()
                for i in range(last)
                if partial[:1] != b"\xed" or partial[1] < 0xA0
            ]
            live = any(partially(compiled, text + c) for c in characters)
            assert (constraint.states([start + partial])[0] >= 0).item() == live, (start, partial)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_automaton_is_minimal_and_every_state_can_finish(pattern):
    table = ByteRegex(pattern).host_table()
    again = minimal(table)
    np.testing.assert_array_equal(again.next, table.next)
    np.testing.assert_array_equal(again.accept, table.accept)


@pytest.mark.parametrize("text", ["\xe9", "日", "\U0001f600"])
@pytest.mark.parametrize("pattern", [r".", r"[^a]", r"\S", r".*"])
def test_classes_are_not_ascii_only(pattern, text):
    """genlm-control's BoolFSA.from_regex rejects every one of these."""
    assert accepted(ByteRegex(pattern), text.encode())


@pytest.mark.parametrize(
    ("pattern", "states"),
    [
        (r"abc", 4),
        (r"[0-9]{4}-[0-9]{2}-[0-9]{2}", 11),
        (r".", 9),
        (r"(?s).*", 8),
        (r"[^a]+é?", 9),
        (r"(a|b)*a(a|b){9}", 1024),
        (r"[a-z]{1,300}", 301),
        (r"(?:a?){40}", 41),
        (r"(?a)\d{1,300}", 301),
        (r"((a{1,3}|b){2,5}c?){1,4}", 72),
    ],
)
def test_number_of_states(pattern, states):
    assert ByteRegex(pattern).n_states == states


def test_only_utf8_is_admitted():
    anything = ByteRegex(r"(?s).*")
    rng = np.random.default_rng(0)
    for _ in range(300):
        data = rng.integers(0x70, 256, size=rng.integers(1, 5)).astype(np.uint8).tobytes()
        try:
            data.decode()
            valid = True
        except UnicodeDecodeError:
            valid = False
        assert accepted(anything, data) == valid, data


def test_every_code_point_is_where_it_belongs():
    constraint = ByteRegex(r"\w")
    table, accept = constraint.host_table().next, constraint.host_table().accept
    word = regex.compile(r"\w")
    for code in [*range(0x3000), *range(0xD000, 0xD800), *range(0xE000, 0x110000, 97)]:
        state = 0
        for byte in chr(code).encode():
            state = table[state, byte] if state >= 0 else -1
        assert (state >= 0 and bool(accept[state])) == bool(word.fullmatch(chr(code))), hex(code)


# Pattern, the part that no automaton expresses, texts that it matches, and texts that it does not.
BY_TEXT = [
    (r"(a|b)\1", "backreference", ["aa", "bb"], ["ab", "a", "aaa"]),
    (r"(?P<x>[a-z]+)-(?P=x)", "backreference", ["ab-ab"], ["ab-a", "ab-"]),
    (r"([ab])\B\w\1\b", "backreference", ["aba", "béb"], ["a-a", "abb"]),
    (r"(a)(?!$).*\1", "backreference", ["aa", "aba"], ["a", "ab"]),
    (r"(?:\b(\w)\1 ?)+", "backreference", ["aa", "aa bb"], ["ab", "aabb"]),
    (r"(a)?\1?\p{Han}+(?(1)b|c)?", "backreference", ["日", "\uf95a\uf95a"], ["b"]),
    (r"(?w)\w+\b", "word boundary", ["ab", "\uf95a\uf95am"], ["a-"]),
    (r"(é)\Bé\1", "backreference", ["ééé"], ["éé"]),
    (r"(?:a|ab)++c", "possessive", ["ac", "aac"], ["a", "abc"]),
    (r"(?>a*b?)bc", "atomic", ["aabbc"], ["abc"]),
    (r"\((?R)*\)", "recursive", ["()", "(()())"], ["(", "())"]),
    (r"(?:(a)?(?(1)b|c))+", "conditional", ["ab", "cc"], ["ac", "b"]),
    (r"(?:abc){e<=1}", "fuzzy", ["abc", "abd", "ab"], ["xyz"]),
    (r"\X", "grapheme", ["e\u0301", "a"], ["ab"]),
    (r"a\Kb", r"\\K", ["ab"], ["a"]),
    (r"(?V1)(?i)strasse", "full case folding", ["STRASSE", "straße"], ["strase"]),
]


@pytest.mark.parametrize(("pattern", "names", "inside", "outside"), BY_TEXT)
def test_what_no_automaton_expresses_is_matched_text_by_text(pattern, names, inside, outside):
    """It says so by name, agrees with `regex`, and lets every prefix of a match on."""
    with pytest.warns(FastPathWarning, match=names):
        constraint = ByteRegex(pattern)
    assert isinstance(constraint, PartialRegex)
    for text in [*inside, *outside]:
        assert accepted(constraint, text.encode()) == bool(regex.fullmatch(pattern, text)), text
        assert accepted(constraint, text.encode()) == (text in inside)
    for text in inside:
        spelled = text.encode()
        for n in range(len(spelled) + 1):
            state = constraint.states([spelled[:n]])
            assert float(constraint.log_prefix(state)[0]) == 0.0, spelled[:n]
    assert not accepted(constraint, b"\xff")


async def test_a_pattern_matched_text_by_text_constrains_a_run(tiny):
    """In a product with a model, from copies and after pickling."""
    with pytest.warns(FastPathWarning):
        constraint = ByteRegex(r"(the|and) \1")
    again = pickle.loads(pickle.dumps(constraint))
    assert accepted(again, b"and and")
    assert not accepted(again, b"and the")
    llm = ByteLLM(tiny, BeamParams(K=5, prune_threshold=0.01))
    found = await smc(llm * constraint, 8, max_bytes=10, seed=1, progress=False)
    assert {t for t, e in zip(found.texts, found.ended, strict=True) if e} <= {
        b"the the",
        b"and and",
    }
    assert found.ended.any()


@pytest.mark.parametrize("pattern", [r"(?r)abc", r"(?L)abc"])
def test_flags_that_mean_nothing_over_bytes_are_refused(pattern):
    with pytest.raises(ConstraintError, match=r"LOCALE or REVERSE|does not parse|exclude"):
        ByteRegex(pattern)


def test_a_pattern_matched_text_by_text_has_limits():
    """`regex` writes repeats out, of repeats too."""
    for pattern in (r"(a)\1{1000000000}", r"(?:(?:(a){100}b){100}c){100}\1"):
        with pytest.raises(ConstraintError, match="parts with its repeats written out"):
            ByteRegex(pattern)


def test_a_pattern_that_does_not_parse_says_why_and_where():
    with pytest.raises(ConstraintError, match=r"missing \) at position 4"):
        ByteRegex(r"a(bc")
    with pytest.raises(ConstraintError, match="a pattern is a str, got bytes"):
        ByteRegex(b"abc")


@pytest.mark.parametrize("pattern", [r"[^\x00-\U0010ffff]", r"a$b", r"a^b", r"[\ud800-\udfff]"])
def test_a_pattern_that_matches_no_text_is_refused(pattern):
    with pytest.raises(ConstraintError, match="language is empty"):
        ByteRegex(pattern)


def test_oddities_of_regex_are_shared():
    """`[^\\s\\S]` matches everything in `regex` (the negation is lost); so it does here."""
    assert accepted(ByteRegex(r"[^\s\S]"), b"a") == bool(regex.fullmatch(r"[^\s\S]", "a"))


def test_a_pattern_that_outgrows_its_limit_is_refused():
    for pattern in [r"(a|b)*a(a|b){20}", r"[a-z]{5000}", r"\w{500}"]:
        with pytest.raises(ConstraintError, match="max_states=1000"):
            ByteRegex(pattern, max_states=1000)


def test_a_pattern_that_outgrows_the_defaults_is_matched_text_by_text():
    """A warning names the limit; the limit given refuses; texts agree with `regex`."""
    pattern = r"[ab]*a[ab]{20}\w{3}"
    with pytest.warns(FastPathWarning, match="more than max_states=50000 states.*own"):
        constraint = ByteRegex(pattern)
    assert isinstance(constraint, PartialRegex)
    rng = random.Random(0)
    for _ in range(50):
        text = "".join(rng.choices("ab", k=rng.randrange(22, 28))) + rng.choice(["", "éé", "_"])
        assert accepted(constraint, text.encode()) == bool(regex.fullmatch(pattern, text)), text
    with pytest.raises(ConstraintError, match="max_states=50000"):
        ByteRegex(pattern, max_states=50_000)
    with pytest.raises(ConstraintError, match="max_states=50000"):
        ByteRegex("(a|é){300000}")  # too large for both ways
    with pytest.raises(ConstraintError, match="max_seconds=0;"):
        ByteRegex("a+b", max_seconds=0)


def test_a_pattern_given_by_a_subclass():
    """A subclass that names the pattern itself, from a copy by pickling as well."""

    class Line(ByteRegex):
        def __init__(self, pattern):
            super().__init__(f"{pattern}\n")

    assert accepted(Line("a+"), b"aa\n")
    assert not accepted(Line("a+"), b"aa")
    with pytest.raises(ConstraintError, match="a backreference"):
        Line(r"(a)\1")
    again = pickle.loads(pickle.dumps(ByteRegex("a+b")))
    assert isinstance(again, ByteRegex)
    assert accepted(again, b"aab")


def test_flags_may_be_passed_apart():
    constraint = ByteRegex(r"a.b", regex.I | regex.S)
    assert accepted(constraint, b"A\nb")
    assert not accepted(ByteRegex(r"a.b"), b"A\nb")


def test_a_random_pattern_agrees_with_regex():
    """Patterns drawn from a little grammar of their own, over a two-letter world."""
    rng = random.Random(5)

    def draw(depth):
        kind = rng.randrange(8 if depth else 3)
        if kind < 3:
            return rng.choice(["a", "b", "é", "[ab]", "[^a]", ".", "\\w", "[^\\w]", "(?i:É)"])
        if kind == 3:
            return draw(depth - 1) + draw(depth - 1)
        if kind == 4:
            return f"(?:{draw(depth - 1)}|{draw(depth - 1)})"
        if kind == 5:
            return f"(?:^{draw(depth - 1)}|{draw(depth - 1)}$)"
        count = rng.choice(["*", "+", "?", "{2}", "{1,2}", "{0,2}", "*?", "{2,}"])
        return f"({draw(depth - 1)}){count}"

    texts = ["".join(rng.choices("abéÉ\n", k=rng.randrange(6))) for _ in range(60)]
    texts += ["", *"abé\n"]
    for _ in range(150):
        pattern = draw(4)
        compiled = regex.compile(pattern)
        try:
            constraint = ByteRegex(pattern)
        except ConstraintError:
            assert not any(compiled.fullmatch(t) for t in texts), pattern
            continue
        complete = constraint.log_complete(constraint.states([t.encode() for t in texts]))
        expected = torch.tensor([bool(compiled.fullmatch(t)) for t in texts])
        torch.testing.assert_close(complete == 0, expected, msg=lambda m: f"{pattern}\n{m}")  # noqa: B023


def test_the_parser_reads_a_pattern_once_into_shared_classes():
    tree = parse(r"[ab][ab]")
    first, second = (part for part in tree.parts)
    assert first is second
