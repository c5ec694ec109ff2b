"""Regular expressions that `ByteRegex` takes: `python -m benchmarks.coverage [FILE]`.

A pattern of the file becomes an automaton, is matched text by text, or is refused. The file has one
pattern a line, and lines that begin with "# " and name the feature of those that follow; or it is
a CSV file with a column "regex" or "pattern".

Each pattern that is taken is then compared with `regex.fullmatch`: on texts drawn at random from
characters that matter to it, on texts that `regex` lets grow character by character, on texts drawn
from the constraint itself, on these with a character changed, and on every prefix of a match,
inside characters too, which has to be alive. The command fails if one of them differs.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import random
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import regex
from rich.console import Console
from rich.table import Table

from genlm_bytes_smc import FastPathWarning
from genlm_bytes_smc.constraints import ByteConstraint, ByteRegex, ConstraintError, PartialRegex

PATTERNS = Path(__file__).parent / "data" / "patterns.txt"
WAYS = ("automaton", "text by text", "refused")
EXTRA = "aAbcxz019é _.-\n"
_CAUSE = regex.compile(r" cannot be part| needs more|; ")


@dataclass
class Outcome:
    """One pattern: how it is taken (one of `WAYS`), why, and the texts that differ from `regex`.

    Attributes:
        matched: how many of the texts compared are matches.
        compared: how many texts were compared.
        seconds: that it took to build.
    """

    feature: str
    pattern: str
    way: str
    reason: str = ""
    matched: int = 0
    compared: int = 0
    seconds: float = 0.0
    wrong: list[bytes] = field(default_factory=list)


def read(path: Path) -> list[tuple[str, str]]:
    """Return (feature, pattern) of each pattern of a file; see the module."""
    with path.open(encoding="utf-8", newline="") as lines:
        if path.suffix == ".csv":
            return _of_table(csv.DictReader(lines))
        feature, out = "", []
        for line in (line.rstrip("\r\n") for line in lines):
            if line.startswith("# "):
                feature = line[2:]
            elif line:
                out.append((feature, line))
    return out


def _of_table(rows: csv.DictReader[str]) -> list[tuple[str, str]]:
    names = [name for name in ("regex", "pattern") if name in (rows.fieldnames or ())]
    if not names:
        raise ValueError(f"expected a column named regex or pattern, got {rows.fieldnames}")
    return [("", row[names[0]]) for row in rows]


def examine(
    feature: str, pattern: str, n_texts: int, rng: random.Random, seconds: float = 60.0
) -> Outcome:
    """Build the constraint of a pattern, and compare it with `regex`.

    Args:
        feature, pattern: what is examined.
        n_texts: about how many texts to compare.
        rng: draws them.
        seconds: stop comparing after this time.
    """
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", FastPathWarning)
        try:
            constraint = ByteRegex(pattern)
        except ConstraintError as error:
            return Outcome(feature, pattern, "refused", str(error))
    slow = isinstance(constraint, PartialRegex)
    reason = _CAUSE.split(str(said[0].message))[0] if slow else ""
    out = Outcome(feature, pattern, WAYS[slow], reason, seconds=time.monotonic() - start)
    compiled = regex.compile(pattern)
    for text in _texts(constraint, pattern, n_texts, rng):
        if time.monotonic() > start + seconds:
            break
        matches = compiled.fullmatch(text) is not None
        out.compared += 1
        out.matched += matches
        data = text.encode()
        if _accepts(constraint, data) != matches or (matches and not _lives(constraint, data)):
            out.wrong.append(data)
    return out


def _accepts(constraint: ByteConstraint, data: bytes) -> bool:
    return bool(constraint.log_complete(constraint.states([data]))[0] > float("-inf"))


def _lives(constraint: ByteConstraint, data: bytes) -> bool:
    """Return whether every prefix of a text is alive."""
    states = constraint.states([data[:n] for n in range(len(data) + 1)])
    return bool((constraint.log_prefix(states) > float("-inf")).all())


def _texts(constraint: ByteConstraint, pattern: str, n: int, rng: random.Random) -> Iterator[str]:
    """Yield distinct texts to compare on."""
    letters = sorted({*pattern, *EXTRA} - set("\\()|*?{}"))
    compiled = regex.compile(pattern)
    seen = set()
    for text in _drawn(constraint, compiled, letters, n, rng):
        if text not in seen:
            seen.add(text)
            yield text


def _drawn(
    constraint: ByteConstraint,
    compiled: regex.Pattern[str],
    letters: Sequence[str],
    n: int,
    rng: random.Random,
) -> Iterator[str]:
    """Draw texts: a third at random, a sixth grown by `regex`, the rest from the constraint."""
    yield ""
    for _ in range(n // 3):
        yield "".join(rng.choices(letters, k=rng.randrange(1, 7)))
    for i in range(n // 3):
        text = _walk(constraint, rng) if i % 2 else _grown(compiled, letters, rng)
        if text is not None:
            yield text
            at = rng.randrange(len(text) + 1)
            new = rng.choice([rng.choice(letters), "", text[at : at + 1] * 2])
            yield text[:at] + new + text[at + 1 :]


def _grown(
    compiled: regex.Pattern[str], letters: Sequence[str], rng: random.Random, longest: int = 80
) -> str | None:
    """Return a match that grew by letters after which `regex` sees a match ahead, or None."""
    text, more = "", [*letters]
    stop = rng.choice([0.1, 0.3, 1.0])
    while len(text) < longest:
        if compiled.fullmatch(text) and rng.random() < stop:
            return text
        rng.shuffle(more)
        for new in (*more, *map("".join, itertools.permutations(more[:12], 2))):
            if compiled.fullmatch(text + new, partial=True):
                text += new
                break
        else:
            return text if compiled.fullmatch(text) else None
    return None


def _walk(constraint: ByteConstraint, rng: random.Random, longest: int = 24) -> str | None:
    """Return a random text of weight above zero, or None where the walk came to no end."""
    state, text = constraint.initial(1), bytearray()
    for _ in range(longest):
        row = constraint.block(state)[0] > float("-inf")
        admitted = row[:256].nonzero().flatten().tolist()
        if row[256] and (not admitted or rng.random() < 0.3):
            return text.decode()
        if not admitted:
            return None
        plain = [b for b in admitted if b < 0x80]
        byte = rng.choice(plain if plain and rng.random() < 0.7 else admitted)
        text.append(byte)
        state = constraint.step(state, state.new_tensor([byte]))
    return None


def show(outcomes: Sequence[Outcome], console: Console) -> None:
    """Print a table by feature, the reasons, and every pattern that is refused or wrong."""
    table = Table("feature", "patterns", *WAYS, "wrong", title="Coverage of regular expressions")
    features = dict.fromkeys(o.feature for o in outcomes)
    names = [name for name in features if name]
    for name in (*names, "all"):
        mine = [o for o in outcomes if name in ("all", o.feature)]
        ways = Counter(o.way for o in mine)
        wrong = sum(bool(o.wrong) for o in mine)
        cells = [len(mine), *(ways[way] for way in WAYS), wrong]
        table.add_row(name, *map(str, cells), end_section=[name] == names[-1:])
    console.print(table)
    for reason, n in Counter(o.reason for o in outcomes if o.way == WAYS[1]).most_common():
        console.print(f"{n:4} text by text: {reason}", markup=False)
    for o in outcomes:
        if o.way == "refused":
            console.print(f"refused: {o.pattern}: {o.reason}", markup=False)
        if o.wrong:
            console.print(f"WRONG: {o.pattern} on {o.wrong[:3]}", markup=False)
    taken = [o for o in outcomes if o.way != "refused"]
    bare = [o.pattern for o in taken if not o.matched]
    if bare:
        console.print(f"{len(bare)} without a match among the texts drawn:", *bare, markup=False)
    slowest = max(outcomes, key=lambda o: o.seconds)
    console.print(f"slowest to build: {slowest.seconds:.1f} s, {slowest.pattern}", markup=False)
    texts, matched = sum(o.compared for o in outcomes), sum(o.matched for o in outcomes)
    console.print(
        f"{texts} texts compared with regex {regex.__version__}, {matched} of them matches"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if a pattern differs from `regex`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=PATTERNS, help="patterns")
    parser.add_argument("--texts", type=int, default=60, help="texts to compare for a pattern")
    parser.add_argument("--seconds", type=float, default=60.0, help="at most for a pattern")
    options = parser.parse_args(arguments)
    try:
        patterns = read(options.file)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not patterns:
        parser.error(f"{options.file} holds no pattern")
    rng = random.Random(0)
    outcomes = [examine(*pattern, options.texts, rng, options.seconds) for pattern in patterns]
    show(outcomes, Console())
    return int(any(o.wrong for o in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
