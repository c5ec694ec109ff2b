"""Patterns that nobody chose, under every flag, against the `regex` module."""

import random
import warnings

import regex
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from genlm_bytes_smc import FastPathWarning
from genlm_bytes_smc.constraints import ByteRegex, ConstraintError
from tests.constraints.oracles import accepted, walk

LETTERS = "aAbkKsS\u017f\u212aßéÉΣςσıiİǅ1٣_ \n-\xa0\u2028日#"
ATOMS = [
    *"abksSéÉßΣ1_- \n",
    r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", r"\h", r"\n", r"\-", r"\ ", ".",
    "[[:alpha:]]", "[[:^upper:]]", "[^[:lower:]]", "[[:punct:]x]", r"[^[:upper:]\d]",
    r"\p{Lu}", r"\P{L}", r"\p{Ll}", r"\p{Greek}", r"[\p{Lu}\d]", r"[^\p{Lt}a]",
    "[a-z]", "[^a-z]", "[à-ü]", "[^k]", "[sé]", "[^sé]", r"[^\W\d]", "[k-s1]", "[^\u212a]",
]  # fmt: skip
COUNTS = ["*", "+", "?", "{0}", "{2}", "{0,2}", "{1,3}", "{2,}", "{,2}", "*?", "+?", "??", "{0}?"]
SCOPES = ["i", "-i", "s", "-s", "a", "u", "x", "i-s", "si"]
EMPTY = ["(?:)", "a{0}", "(?:a{0})", "(?:|b)", "(?:a?)", "(?:(?:b{0}){2})"]
PATTERNS = st.recursive(
    st.sampled_from([*ATOMS, *EMPTY]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("(?:{0[0]}|{0[1]})".format),
        st.tuples(inner, inner, inner).map("({0[0]}{0[1]}|{0[0]}{0[2]}|{0[0]})".format),
        st.tuples(inner, st.sampled_from(COUNTS)).map("(?:{0[0]}){0[1]}".format),
        st.tuples(inner, st.sampled_from(SCOPES)).map("(?{0[1]}:{0[0]})".format),
        st.tuples(inner, st.sampled_from(["^{}", "{}$", r"{}\Z", r"\A{}"])).map(
            lambda t: "(?:" + t[1].replace("{}", t[0]) + ")"
        ),
    ),
    max_leaves=8,
)
FLAGS = st.sets(
    st.sampled_from([regex.A, regex.I, regex.S, regex.M, regex.X, regex.W, regex.V1, regex.POSIX])
).map(lambda flags: sum(map(int, flags)))
TEXTS = st.lists(st.text(LETTERS, max_size=6), min_size=1, max_size=12)
CASED = ("[[:^upper:]]", "[^[:lower:]]", r"\p{Lu}", r"\p{Ll}", r"[^\p{Lt}a]")
REFUSED = "WORD|full case folding|exclude one another|does not parse"


@settings(max_examples=400, deadline=None)
@given(PATTERNS, FLAGS, TEXTS, st.integers(0, 2**32))
def test_a_pattern_under_any_flags_matches_what_regex_matches(pattern, flags, texts, seed):
    # Of these, `regex` under ASCII and IGNORECASE says one thing alone and another under a star.
    cased = any(atom in pattern for atom in CASED)
    assume(not flags & regex.A or not cased)
    # And `(?:[[:^upper:]]|(?i:a))` matches no b there, though the class alone does.
    assume(not cased or not regex.search(r"\(\?s?i", pattern))
    constraint, refusal = None, ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FastPathWarning)  # some are matched text by text
            constraint = ByteRegex(pattern, flags)
    except ConstraintError as e:
        refusal = str(e)
    if refusal and "language is empty" not in refusal:
        assert regex.search(REFUSED, refusal), (pattern, flags, refusal)
        return
    compiled = regex.compile(pattern, flags)
    for text in texts:
        ours = constraint is not None and accepted(constraint, text.encode())
        assert ours == bool(compiled.fullmatch(text, timeout=20)), (pattern, flags, text)
    if isinstance(constraint, ByteRegex):
        text = walk(constraint, random.Random(seed), 5)
        assert text is None or compiled.fullmatch(text.decode(), timeout=20), (pattern, flags, text)


def test_classes_under_every_flag_match_what_regex_matches():
    """`(?ai)é` once admitted É: classes were read as Unicode whatever the flags said."""
    characters = [
        *map(chr, range(0x250)),
        *"\u0345\u0391\u03a3\u03c2\u03c3\u1e9e\u2028\u212a\u212b٣日",
    ]
    contradictory = 0
    for flags in (0, regex.A, regex.I, regex.A | regex.I, regex.W, regex.S, regex.A | regex.V1):
        for atom in [a for a in ATOMS if a.strip()]:
            for pattern in (atom, f"(?a:{atom})", f"(?i:…|{atom})"):
                if flags & regex.V1 and "i:" in pattern:
                    continue  # full case folding
                compiled, starred = (regex.compile(p, flags) for p in (pattern, f"(?:{pattern})*"))
                theirs = [bool(compiled.fullmatch(c)) for c in characters]
                if theirs != [bool(starred.fullmatch(c)) for c in characters]:
                    contradictory += 1
                    continue
                try:
                    constraint = ByteRegex(pattern, flags)
                except ConstraintError:
                    assert not any(theirs), (pattern, flags)
                    continue
                state = constraint.states([c.encode() for c in characters])
                ours = (constraint.log_complete(state) == 0).tolist()
                assert ours == theirs, (pattern, flags)
    assert contradictory < 40  # `regex` about a case of letters, under ASCII and IGNORECASE


def test_an_empty_body_repeated_is_empty():
    assert not accepted(ByteRegex("x(?:a{0})*y"), b"xaay")
    assert accepted(ByteRegex("x(?:a{0})*y"), b"xy")
    for pattern in ("(?:a{0}){2,}", "(?:(?:a{0})*){3}", "(?:(?:){1000000000}){1000000000}"):
        assert ByteRegex(pattern).n_states == 1
