"""The small languages against their definitions, over every short text of a few bytes."""

from itertools import product

import pytest

from genlm_bytes_smc.constraints import (
    AtomicUnits,
    ConstraintError,
    Containing,
    Ending,
    FiniteSet,
    Length,
    MaxBytes,
    StopStrings,
    Utf8,
)
from tests.constraints.oracles import accepted


def texts(letters, longest):
    return [bytes(t) for k in range(longest + 1) for t in product(letters, repeat=k)]


def ends_at_first(stops):
    """The definition of StopStrings: a stop ends here, and none ended before."""

    def holds(text):
        ends = [k for k in range(len(text) + 1) for s in stops if text[:k].endswith(s)]
        return bool(ends) and min(ends) == len(text)

    return holds


def whole(units, ordinary):
    """The definition of AtomicUnits: some way to cut the text into units and single bytes."""

    def holds(text):
        pieces = [*units, *(bytes([b]) for b in ordinary)]
        return not text or any(text.startswith(p) and holds(text[len(p) :]) for p in pieces)

    return holds


AB = b"abc"
ORACLES = [
    (FiniteSet([b"", b"ab", b"abc", b"ca"]), {b"", b"ab", b"abc", b"ca"}.__contains__, AB, 4),
    (Ending([b"ab", b"bab", b"c"]), lambda t: t.endswith((b"ab", b"c")), AB, 6),
    (Containing([b"aba", b"cc"]), lambda t: b"aba" in t or b"cc" in t, AB, 6),
    (StopStrings([b"aab", b"ba", b"c"]), ends_at_first([b"aab", b"ba", b"c"]), AB, 6),
    (StopStrings([b"ab", b"abab"]), ends_at_first([b"ab"]), AB, 5),
    (MaxBytes(3), lambda t: len(t) <= 3, AB, 5),
    (MaxBytes(0), lambda t: not t, AB, 2),
    (Length(2), lambda t: len(t) >= 2, AB, 4),
    (Length(2, 3), lambda t: 2 <= len(t) <= 3, AB, 5),
    (AtomicUnits([b"ab", b"abc"]), whole([b"ab", b"abc"], b"bc"), AB, 6),
    (AtomicUnits([b"ab", b"ba"], b""), whole([b"ab", b"ba"], b""), AB, 6),
    (AtomicUnits([b"abb"], b"a"), whole([b"abb"], b"a"), AB, 6),
]


@pytest.mark.parametrize(("constraint", "holds", "letters", "longest"), ORACLES)
def test_definitions(constraint, holds, letters, longest):
    every = texts(letters, longest)
    complete = constraint.log_complete(constraint.states(every))
    assert (complete == 0).tolist() == [bool(holds(t)) for t in every]


def valid(data):
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


EDGES = [0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xED]
EDGES += [0xEF, 0xF0, 0xF4, 0xF5, 0xFF]


def test_utf8_is_pythons():
    every = texts(EDGES, 3) + [bytes([a, b, c, d]) for a in (0xF0, 0xF3, 0xF4, 0xF5)
                               for b in EDGES for c in EDGES[2:9] for d in EDGES[:9]]  # fmt: skip
    constraint = Utf8()
    complete = constraint.log_complete(constraint.states(every))
    assert (complete == 0).tolist() == [valid(t) for t in every]


def test_a_length_in_characters():
    constraint = Length(1, 2, "characters")
    for text in ["", "a", "é", "日é", "😀😀", "abc", "日本語"]:
        assert accepted(constraint, text.encode()) == (1 <= len(text) <= 2)
    assert not accepted(constraint, b"\xff")


def test_a_stop_string_forces_the_end_and_nothing_else_ends():
    constraint = StopStrings(["\n\n"])
    state = constraint.states([b"a\n", b"a\n\n"])
    block = constraint.block(state)
    assert block[0, 256] == float("-inf")
    assert (block[0, :256] == 0).all()
    assert block[1, 256] == 0
    assert (block[1, :256] == float("-inf")).all()
    assert constraint.before(b"a\n\n") == b"a"
    assert constraint.before(b"a") == b"a"
    assert StopStrings(["b", "ab"]).before(b"xab") == b"x"


@pytest.mark.parametrize(
    ("constraint", "states"),
    [
        (Utf8(), 8),
        (MaxBytes(100), 101),
        (Length(5), 6),
        (Length(0, 10, "characters"), 11 + 10 * 7),
        (StopStrings(["\n\n"]), 3),
        (StopStrings(["abc", "bcd", "cab"]), 8),
        (Ending(["abc"]), 4),
        (Containing(["abc"]), 4),
        (FiniteSet(["tap", "taps", "top", "tops"]), 5),
        (AtomicUnits(["<eos>"]), 5),
    ],
)
def test_number_of_states(constraint, states):
    assert constraint.n_states == states


def test_a_large_set_shares_what_it_can():
    words = [f"{a}{b}{c}ness" for a in "abcdefgh" for b in "aeiou" for c in "klmnpqrst"]
    assert FiniteSet(words).n_states == 8


@pytest.mark.parametrize("kind", [FiniteSet, StopStrings, Ending, Containing, AtomicUnits])
def test_bad_lists_of_strings(kind):
    with pytest.raises(ConstraintError, match="several strings in a list, got 'abc' alone"):
        kind("abc")
    with pytest.raises(ConstraintError, match="at least one string, got none"):
        kind([])
    with pytest.raises(ConstraintError, match="expected str or bytes, got 5 of type int"):
        kind(["a", 5])
    with pytest.raises(ConstraintError, match="lone surrogate"):
        kind(["\ud800"])
    if kind is not FiniteSet:
        with pytest.raises(ConstraintError, match="empty string"):
            kind(["a", ""])


def test_bad_lengths():
    with pytest.raises(ConstraintError, match="0 <= minimum <= maximum, got 3, 2"):
        Length(3, 2)
    with pytest.raises(ConstraintError, match="got 0, -1"):
        MaxBytes(-1)
    with pytest.raises(ConstraintError, match="'bytes' or 'characters', got 'words'"):
        Length(1, 2, "words")
    with pytest.raises(ConstraintError, match="max_states=10"):
        MaxBytes(100, max_states=10)


def test_bad_ordinary_bytes():
    with pytest.raises(ConstraintError, match="ordinary must be bytes or None, got 'ab'"):
        AtomicUnits(["<eos>"], "ab")


def test_of_many_strings_it_does_not_matter_which_was_found():
    """A state for each set of strings found so far were more than 50,000 states."""
    words = [f"{a}{b}{c}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx"]
    assert Containing(words).n_states == 4
