"""Regular expressions that `ByteRegex` takes: `python -m benchmarks.coverage [FILE]`.

A pattern of the file (one a line; a line that begins with "# " names the feature of those that
follow) becomes an automaton, is matched text by text, or is refused. Each that is taken is then
compared with `regex.fullmatch`: on texts drawn at random from characters that matter to it, on
texts drawn from the constraint itself, on these with a character changed, and on every prefix of
a match, inside characters too, which has to be alive. The command fails if one of them differs.
"""

from __future__ import annotations

import argparse
import random
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
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


@dataclass
class Outcome:
    """One pattern: how it is taken (one of `WAYS`), why, and the texts that differ from `regex`.

    Attributes:
        matched: how many of the texts compared are matches.
        compared: how many texts were compared.
    """

    feature: str
    pattern: str
    way: str
    reason: str = ""
    matched: int = 0
    compared: int = 0
    wrong: list[bytes] = field(default_factory=list)


def read(lines: Iterable[str]) -> list[tuple[str, str]]:
    """Return (feature, pattern) of each line that holds a pattern."""
    feature, out = "", []
    for line in (line.rstrip("\n") for line in lines):
        if line.startswith("# "):
            feature = line[2:]
        elif line:
            out.append((feature, line))
    return out


def examine(feature: str, pattern: str, n_texts: int, rng: random.Random) -> Outcome:
    """Build the constraint of a pattern, and compare it with `regex` on about `n_texts` texts."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", FastPathWarning)
        try:
            constraint = ByteRegex(pattern)
        except ConstraintError as error:
            return Outcome(feature, pattern, "refused", str(error))
    slow = isinstance(constraint, PartialRegex)
    reason = str(said[0].message).partition(" cannot be part")[0] if slow else ""
    out = Outcome(feature, pattern, WAYS[slow], reason)
    compiled = regex.compile(pattern)
    for text in _texts(constraint, pattern, n_texts, rng):
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


def _texts(constraint: ByteConstraint, pattern: str, n: int, rng: random.Random) -> dict[str, None]:
    """Draw texts to compare on: a third of them at random, a sixth from the constraint."""
    letters = sorted({*pattern, *EXTRA} - set("\\()|*?{}"))
    out = {"": None}
    out |= dict.fromkeys(
        "".join(rng.choices(letters, k=rng.randrange(1, 7))) for _ in range(n // 3)
    )
    for _ in range(n // 6):
        text = _walk(constraint, rng)
        if text is not None:
            out[text] = None
            for _ in range(3):
                i = rng.randrange(len(text) + 1)
                new = rng.choice([rng.choice(letters), "", text[i : i + 1] * 2])
                out[text[:i] + new + text[i + 1 :]] = None
    return out


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
    for name in (*features, "all"):
        mine = [o for o in outcomes if name in ("all", o.feature)]
        ways = Counter(o.way for o in mine)
        wrong = sum(bool(o.wrong) for o in mine)
        cells = [len(mine), *(ways[way] for way in WAYS), wrong]
        table.add_row(name, *map(str, cells), end_section=name == list(features)[-1])
    console.print(table)
    for reason, n in Counter(o.reason for o in outcomes if o.way == WAYS[1]).most_common():
        console.print(f"{n:4} text by text: {reason}", markup=False)
    for o in outcomes:
        if o.way == "refused":
            console.print(f"refused: {o.pattern}: {o.reason}", markup=False)
        if o.wrong:
            console.print(f"WRONG: {o.pattern} on {o.wrong[:3]}", markup=False)
    texts, matched = sum(o.compared for o in outcomes), sum(o.matched for o in outcomes)
    console.print(
        f"{texts} texts compared with regex {regex.__version__}, {matched} of them matches"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if a pattern differs from `regex`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=PATTERNS, help="one pattern a line")
    parser.add_argument("--texts", type=int, default=60, help="texts to compare for a pattern")
    options = parser.parse_args(arguments)
    with options.file.open(encoding="utf-8") as lines:
        patterns = read(lines)
    if not patterns:
        parser.error(f"{options.file} holds no pattern")
    rng = random.Random(0)
    outcomes = [examine(feature, pattern, options.texts, rng) for feature, pattern in patterns]
    show(outcomes, Console())
    return int(any(o.wrong for o in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
