"""Patterns that are matched text by text: each row against `regex` itself, and what a row costs."""

import random

import pytest
import regex
import torch

from genlm_bytes_smc.constraints import PartialRegex
from tests.constraints.oracles import alphabet_of

PATTERNS = [
    r"(a|é)\1x?",
    r"(\w+) \1,(\w+)\2",
    r"<([a-zé]+)>[^<\n]*</\1>",
    r"(['\"])(?:(?!\1).)*\1",
    r"\((?:[^()]|(?R))*\)",
    r"(?<y>\d{2})[-–](?&y)\b.*$",
    r"(?i)([k-s])\1+é?",
    r"(?i)(?:straße|[а-я])+(\d)\1",
    r"(\p{Lu})\p{Ll}+\K \1[[:punct:]]",
    r"(?m)^(.)$\n^\1$",
    r"(?:hello){e<=1}(x)\1",
    r"\X{2,3}",
    r"(?(DEFINE)(?<n>[0-9日]))(?&n)(a)?\1(?&n)",
    r"(?V1)(?i)(ﬀ)\1",
]


class Plain(PartialRegex):
    """The same, which takes every character for one of its own."""

    @property
    def _kind(self):
        return str


@pytest.mark.parametrize("pattern", PATTERNS)
def test_alike_characters_are_matched_once_and_rows_stay_the_same(pattern):
    rng = random.Random(pattern)
    fast, plain = PartialRegex(pattern), Plain(pattern)
    letters = alphabet_of(pattern)
    texts = ["", *("".join(rng.choices(letters, k=rng.randrange(1, 4))) for _ in range(6))]
    texts = [text.encode("utf-8", "ignore") for text in texts] + [
        b"\xc3",
        b"a\xe6\x97",
        b"\xf0\x9f",
    ]
    states = fast.states(texts)
    assert torch.equal(fast.block(states), plain.block(plain.states(texts)))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ascii_rows_are_those_of_regex(pattern):
    rng = random.Random(pattern)
    compiled, constraint = regex.compile(pattern), PartialRegex(pattern)
    for _ in range(6):
        text = "".join(rng.choices(alphabet_of(pattern), k=rng.randrange(4)))
        if compiled.fullmatch(text, partial=True) is None:
            continue
        row = constraint.block(constraint.states([text.encode()]))[0, :128] > float("-inf")
        for byte in range(128):
            if compiled.fullmatch(text + chr(byte), partial=True) is not None:
                assert row[byte], (text, byte)
            elif not constraint._longer:
                assert not row[byte], (text, byte)


def test_a_row_takes_one_match_for_each_kind_of_character():
    constraint, calls = PartialRegex(r"(\w+) \1 ([^\W\d]+)"), []
    match = constraint._match
    constraint._match = lambda text, **how: calls.append(text) or match(text, **how)
    constraint.block(constraint.states([b"ab"]))
    # Of no class, a space, a digit, a letter, and the letters of the text.
    assert [c for c in calls if len(c) > 2] == [f"ab{c}" for c in "\0 0Aab"]
    assert len(calls) <= 10


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"((?:\0ß*)?+ﬁ|(ſς|ςb))+?", "ﬁﬁ"),
        (r"(x)?(?(1)y|[\U0001F5FF]?)[\uFB01]?\p{Deseret}?", "\U0001f5ffﬁ\U00010400"),
        (r"(a?)\1(?:\u212A|[ﬀ-ﬆ])*", "a" * 2 + "\u212aﬀﬁ\u212a"),
        (r"(?i)(b?)\1[A-Z]+", "A\u212a"),
    ],
)
def test_a_whole_match_goes_on_with_any_character(pattern, text):
    constraint = PartialRegex(pattern)
    assert regex.fullmatch(pattern, text)
    utf8 = text.encode()
    for i in range(len(utf8) + 1):
        assert constraint.prefix_fn(utf8[:i]), utf8[:i]
    assert not constraint.prefix_fn(utf8 + "\U0001f602".encode())


@pytest.mark.parametrize(
    ("pattern", "text", "leads"),
    [
        (r"([ab])x\1", b"", b""),
        (r"([ab])x\1", b"ax", b""),
        (r"(é|日)x\1", b"", "é日".encode()),
        (r"(é|日)x\1", "éx".encode(), "é".encode()),
        (r"(a)\1[α-ω]", b"aa", "αω".encode()),
    ],
)
def test_no_character_begins_that_no_match_goes_on_with(pattern, text, leads):
    constraint = PartialRegex(pattern)
    row = constraint.block(constraint.states([text]))[0, :256] > float("-inf")
    expected = {b for b in leads if b >= 0xC0}
    assert {b for b in range(128, 256) if row[b]} == expected
