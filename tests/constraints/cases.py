"""One instance or more of every public constraint, with texts it knows about."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from genlm.control import BoolFSA
from genlm.control.potential.built_in.wfsa import WFSA

from genlm_bytes_smc.constraints import (
    AtomicUnits,
    ByteConstraint,
    ByteDFA,
    ByteGrammar,
    ByteJsonSchema,
    BytePredicate,
    ByteRegex,
    ByteWFSA,
    Containing,
    Ending,
    FiniteSet,
    Length,
    MaxBytes,
    PartialRegex,
    StopStrings,
    Utf8,
    from_genlm,
)


@dataclass(frozen=True)
class Case:
    """`make` builds it; `texts` are whole texts above zero; nothing begins with `impossible`."""

    make: Callable[..., ByteConstraint]
    texts: tuple[bytes, ...]
    impossible: bytes | None


def short(text: bytes) -> bool:
    return len(text) < 4


def brief(text: bytes) -> float:
    return -0.5 * len(text) if len(text) < 6 else -np.inf


def half_each(**options):
    log = np.log
    arcs = [(0, 97, 0, log(0.3)), (0, 98, 1, log(0.2)), (0, 97, 1, log(0.1)), (1, 99, 0, log(0.5))]
    return ByteWFSA([0.0, -np.inf], arcs, [log(0.4), log(0.5)], **options)


def odd_number_of_a(**options):
    table = np.full((2, 256), -1)
    table[:, ord("b")] = [0, 1]
    table[:, ord("a")] = [1, 0]
    return ByteDFA(table, np.array([False, True]), **options)


SUMS = 'start: sum\nsum: NUM ("+" NUM)*\nNUM: /[1-9][0-9]*/\n'
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "name": {"type": "string", "maxLength": 3}},
    "required": ["x"],
    "additionalProperties": False,
}

CASES = {
    "ByteRegex": Case(
        lambda **o: ByteRegex(r"\d{2}|[é-ü]+x?", **o), (b"42", "éx".encode()), b"4x"
    ),
    "ByteDFA": Case(odd_number_of_a, (b"a", b"babba" b"a"), b"c"),
    "intersection": Case(
        lambda **o: ByteRegex(r"\w*", **o) & Ending(["ing"], **o), (b"sing", b"inging"), b" "
    ),
    "union": Case(
        lambda **o: FiniteSet(["no"], **o) | ByteRegex("y(es)?", **o), (b"no", b"y"), b"x"
    ),
    "difference": Case(
        lambda **o: ByteRegex("[ab]*", **o) - Containing(["aa"], **o), (b"", b"abab"), b"aa"
    ),
    "Utf8": Case(Utf8, (b"", "aé日😀".encode()), b"\xc0"),
    "Length": Case(lambda **o: Length(1, 2, "characters", **o), (b"a", "é日".encode()), b"abc"),
    "MaxBytes": Case(lambda **o: MaxBytes(3, **o), (b"", b"\xff\x00a"), b"abcd"),
    "StopStrings": Case(
        lambda **o: StopStrings(["\n\n", "END"], **o), (b"a\n\n", b"ENEND"), b"END."
    ),
    "Ending": Case(lambda **o: Ending(["?", "!!"], **o), (b"a?", b"?!!"), None),
    "Containing": Case(lambda **o: Containing(["aba"], **o), (b"ababa", b"xabay"), None),
    "AtomicUnits": Case(lambda **o: AtomicUnits(["<eos>", "é"], **o), (b"<eos>x", b""), b"<a"),
    "FiniteSet": Case(
        lambda **o: FiniteSet(["Ann", "Anna", b"\xff"], **o), (b"Ann", b"\xff"), b"B"
    ),
    "ByteWFSA": Case(half_each, (b"", b"aab", b"bcbc"), b"c"),
    "from_genlm WFSA": Case(
        lambda **o: from_genlm(WFSA.from_regex(r"ab*c|a[bc]{2}"), **o), (b"ac", b"abc"), b"b"
    ),
    "from_genlm BoolFSA": Case(
        lambda **o: from_genlm(BoolFSA.from_regex(r"à+|b", to_bytes=False), **o),
        ("àà".encode(), b"b"),
        b"a",
    ),
    "ByteGrammar": Case(lambda **o: ByteGrammar(SUMS, **o), (b"1", b"12+3"), b"+"),
    "ByteJsonSchema": Case(
        lambda **o: ByteJsonSchema(POINT, **o), (b'{"x": -1}', b'{"x":0, "name":"\xc3\xa9"}'), b"[",
    ),
    "PartialRegex": Case(
        lambda **o: PartialRegex(r"(a|é)\1x?", **o), (b"aa", "ééx".encode()), b"ax"
    ),
    "BytePredicate": Case(lambda **o: BytePredicate(short, **o), (b"", b"\xffab"), None),
    "BytePredicate of prefixes": Case(
        lambda **o: BytePredicate(brief, brief, **o), (b"", b"ab"), b"abcdef"
    ),
}  # fmt: skip
WITH_SNAPSHOTS = ["ByteWFSA", "ByteGrammar", "ByteJsonSchema"]
REMEMBERING = [*WITH_SNAPSHOTS, "BytePredicate", "PartialRegex"]
