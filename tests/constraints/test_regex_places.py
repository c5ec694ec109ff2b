"""Lookaround, word boundaries and ends of lines in automata, against the `regex` module."""

import itertools
import random
import warnings

import pytest
import regex

from genlm_bytes_smc import BeamParams, ByteLLM, FastPathWarning, smc
from genlm_bytes_smc.constraints import ByteDFA, ByteRegex, Ending
from genlm_bytes_smc.constraints.base import EmptyLanguageError
from tests.constraints.oracles import accepted, walk

# Pattern, texts that it matches, and texts that it does not.
COMPILED = [
    (r"(?=.*\d)[a-z\d]{3}", ["a1b", "123"], ["abc", "a1"]),
    (r"(?!foo)[a-z]+", ["bar", "fo"], ["foo", "foobar", ""]),
    (r"[a-z]+(?<!ing)", ["walk"], ["walking"]),
    (r"(?:a(?=b)|b(?=a|$))+", ["ab", "abab"], ["aa", "abb"]),
    (r"\bword\b", ["word"], ["words"]),
    (r"\w+\b.\B.*", ["a  b", "é--"], ["a b", "aé"]),
    (r"a\B\w", ["ab", "aé"], ["a-"]),
    (r"a(?!$).*", ["ab"], ["a"]),
    (r"\m\w+\M", ["été"], ["a b"]),
    (r"(?a)a\b.", ["aé", "a "], ["ab"]),
    (r"(?m)^a$(\n^b$)?", ["a", "a\nb"], ["b", "a\n"]),
    (r"(?=é|ß)\w", ["é", "ß"], ["e", "è"]),
    (r"(?(?=\d)\d{3}|[a-z]{2})", ["123", "ab"], ["12", "abc"]),
    (r"(?!.*\bno\b).*", ["nor", "on no1"], ["no", "a no b"]),
    (r"(?=\w+(?<=é)!)\w+.", ["té!"], ["te!", "té?"]),
    (r"(?:.(?<=(?<!b)a|c))+", ["aa", "cac"], ["b", "ab"]),
    (r"(?=^a).|b(?=(?!$)c)c", ["a", "bc"], ["b"]),
    (r"(?:ab?(?=$\n?))\n?", ["a", "ab", "a\n"], ["ab\n\n"]),
]


@pytest.mark.parametrize(("pattern", "inside", "outside"), COMPILED)
def test_conditions_on_places_become_an_automaton(pattern, inside, outside):
    """No warning; texts inside and outside, their prefixes, and walks agree with `regex`."""
    constraint = ByteRegex(pattern)
    assert isinstance(constraint, ByteDFA)
    compiled = regex.compile(pattern)
    for text in [*inside, *outside]:
        assert accepted(constraint, text.encode()) == (text in inside), text
        assert bool(compiled.fullmatch(text)) == (text in inside), text
    for text in inside:
        data = text.encode()
        states = constraint.states([data[:n] for n in range(len(data) + 1)])
        assert (constraint.log_prefix(states) == 0).all()
    for seed in range(30):
        data = walk(constraint, random.Random(seed))
        assert data is None or compiled.fullmatch(data.decode()), data


def test_random_patterns_with_lookaround_agree_with_regex():
    """Of 300 patterns, whole texts; a language is empty only if `regex` matches nothing drawn."""
    rng = random.Random(7)

    def draw(depth, behind=False):
        if not depth or rng.random() < 0.2:
            return rng.choice(
                ["a", "b", "é", "[ab]", "[^a]", ".", r"\w", " ", r"\b", r"\B"][
                    : 8 if behind else 10
                ]
            )
        one, two = draw(depth - 1, behind), draw(depth - 1, behind)
        kind = rng.randrange(7 if behind else 11)
        if kind < 3:
            return one + two
        if kind == 3:
            return f"(?:{one}|{two})"
        if kind == 4:
            return f"(?:{one}){rng.choice(['*', '+', '?', '{1,2}'])}"
        if kind == 5:
            return f"(?:^{one}|{two})"
        look = rng.choice(["?<=", "?<!"] if kind == 6 else ["?=", "?!", "?<=", "?<!"])
        if kind == 10:
            return f"(?m:^{one}$|{two})"
        return f"({look}{draw(depth - 1, behind or '<' in look)}){two}"

    texts = ["", *"abé \n"] + [
        "".join(rng.choices("abé \n", k=rng.randrange(2, 6))) for _ in range(80)
    ]
    looked = 0
    for _ in range(300):
        pattern = draw(4)
        compiled = regex.compile(pattern)
        with warnings.catch_warnings():
            warnings.simplefilter("error", FastPathWarning)
            try:
                constraint = ByteRegex(pattern)
            except EmptyLanguageError:
                constraint = None
        for text in texts:
            ours = constraint is not None and accepted(constraint, text.encode())
            assert ours == bool(compiled.fullmatch(text)), (pattern, text)
        looked += "(?<" in pattern or "(?=" in pattern or "(?!" in pattern
    assert looked > 100


ATOMIC = [
    r"(?>a|ab)c", r"(?>ab|a)c", r"(?>a*)b", r"a++b", r"a++a", r"a?+ab", r"(?:ab)++a?",
    r"[ab]{1,2}+b",
    r"(?>a|b|ab)+c", r"(?>ab*)b", r"(?>a*?)b", r"x?(?>é|éa)b", r"(?>(?:ab)+)ab", r"(?:a(?>b+|c)?)*",
    r"\R", r"\R?\n", r"(?>a|)ab", r"(?>|a)b", r"(?>a{1,3}+|b)a", r"(?>a\b|ab)[ b]*",
    r"(?>ab?+b|a)b",
    r"(?>(a|b))c?", r"(?=(?>a|ab)c)a.*",
]  # fmt: skip


@pytest.mark.parametrize("pattern", ATOMIC)
def test_atomic_groups_and_possessive_repeats_become_lookahead(pattern):
    """Every text of up to five letters of a small alphabet agrees with `regex`."""
    compiled = regex.compile(pattern)
    try:
        constraint = ByteRegex(pattern)
    except EmptyLanguageError:
        constraint = None
    assert constraint is None or isinstance(constraint, ByteDFA)
    letters = "abcé\n\r" if "R" in pattern else "abcé "
    texts = ["".join(t) for n in range(6) for t in itertools.product(letters, repeat=n)]
    expected = [compiled.fullmatch(t) is not None for t in texts]
    if constraint is None:
        assert not any(expected)
    else:
        states = constraint.states([t.encode() for t in texts])
        assert (constraint.log_complete(states) == 0).tolist() == expected


async def test_lookaround_constrains_a_run_and_products(tiny):
    """In a product of two automata, and of one with a model."""
    both = ByteRegex(r"(?!.*(.)?ee)[a-z]+\b") & Ending(["e"])
    for text in ("the", "thee", "eve", "to"):
        assert accepted(both, text.encode()) == (text in ("the", "eve")), text
    llm = ByteLLM(tiny, BeamParams(K=5, prune_threshold=0.01))
    constraint = ByteRegex(r"(?=.*e)\b[a-z]{2,5}\b(?<!e)")
    found = await smc(llm * constraint, 8, max_bytes=10, seed=1, progress=False)
    ended = [t for t, e in zip(found.texts, found.ended, strict=True) if e]
    assert ended
    for text in ended:
        assert regex.fullmatch(r"[a-z]{2,5}", text.decode())
        assert b"e" in text
        assert not text.endswith(b"e")
