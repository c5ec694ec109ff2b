"""What pruning loses: `python -m benchmarks.accuracy [--model smollm2] [--docs]`.

Reads short texts of ten kinds and prints, for each way of pruning, how much of the log probability
of a text it loses (nats), and how many rows of the model it asks for, from empty caches. The
reference is the widest setting of `benchmarks.lattice`, which judges contexts after each byte;
where another way found more, that is the reference.

`--docs` writes the table to docs/performance.md.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from benchmarks import report
from benchmarks.lattice import Lattice, Rows
from genlm_bytes_smc import BeamParams, ByteBeamState, load_model
from genlm_bytes_smc.beam.model import byte_model

TEXTS = (
    "Le conseil",
    "La bibliothèque est fermée le lundi",
    "Madame Bovary habitait à Yonville",
    "résumé",
    "Der Donaudampfschiffkapitän",
    "Schadenfreude und Weltschmerz",
    "Die Straßenbahn fährt nach Köln",
    "¡Hola! ¿Qué tal?",
    "¿Dónde está la biblioteca?",
    "O gato subiu no telhado.",
    "Ναι, βέβαια.",
    "Привет, как дела?",
    "今天的天气很好",
    "東京は日本の首都です。",
    "CC(=O)Oc1ccccc1C(=O)O",
    "CN1C=NC2=C1C(=O)N(C(=O)N2C)C",
    "C8H10N4O2",
    "H2SO4 + 2 NaOH",
    "ATGGCCATTGTAATGGGCCGC",
    "MKTAYIAKQRQISFVKSHFSRQ",
    "SELECT name, salary FROM employees WHERE dept = 'R&D';",
    "INSERT INTO orders VALUES (17, 'Łódź');",
    "UPDATE users SET active = FALSE WHERE id = 9;",
    '{"name": "Zoë Müller", "age": 42, "e-mail": "zoe@example.org"}',
    '{"id": 7, "tags": ["red", "blue"], "ok": true}',
    '<div class="box"><p>Hello</p></div>',
    "x = [i**2 for i in range(10) if i % 2]",
    "def fibonacci(n: int) -> int:",
    "for (int i = 0; i < n; ++i) {",
    "2026-11-27T09:30:00Z",
    "2024-02-29 23:59:59",
    "+44 20 7946 0958",
    "1234567890",
    "$3,499.99",
    "E = mc^2 and F = ma",
    "https://example.org/a/b?c=1",
    "192.168.0.1:8080",
    "user_name@mail-server.co.uk",
    "Tchaikovsky",
    "McDonald's",
    "Wolfgang Amadeus Mozart",
    "Jean-Baptiste Poquelin",
    "Dr. Nguyen's appointment is at 3:45pm",
    "antidisestablishmentarianism",
    "pneumonoultramicroscopic",
    "rhododendron",
    "The xylophonist's neighbourhood",
    "Call me Ishmael. Some years ago",
    "The quick brown fox jumps over the lazy dog",
    "The mitochondria is the powerhouse of the cell.",
)
BEAMS = {
    "K=5, threshold 0.05": BeamParams(K=5, prune_threshold=0.05),
    "K=10, threshold 0.01": BeamParams(K=10, prune_threshold=0.01),
    "K=10, threshold 0.001": BeamParams(K=10, prune_threshold=0.001),
    "deferred, merge 0.01": BeamParams(K=None, prune="deferred", deferred_merge=0.01),
    "deferred": BeamParams(K=None, prune="deferred"),
    "deferred, merge 0.001": BeamParams(K=None, prune="deferred", deferred_merge=0.001),
}
WIDEST: dict[str, Any] = {"share": 0.002, "merge": 0.0005, "guess": 0.1, "at_once": 16}
HEADS = ("pruning", "median lost", "90%", "worst", "below 0.1", "rows a byte")


class Reading(NamedTuple):
    """What came of one text: its log probability (nats), and the rows asked for."""

    log_z: float
    rows: int


class Line(NamedTuple):
    """A way of pruning, and over all texts what it lost (float64[n], nats) and rows a byte."""

    name: str
    lost: npt.NDArray[np.float64]
    rows: float

    def cells(self) -> list[str]:
        """A line of the table, as `HEADS`."""
        lost = self.lost
        numbers = (np.median(lost), np.quantile(lost, 0.9, method="nearest"), lost.max())
        share = f"{(lost < 0.1).mean():.0%}"
        return [self.name, *(f"{max(x, 0.0):.2f}" for x in numbers), share, f"{self.rows:.2f}"]


def by_lattice(rows: Rows, start: tuple[int, ...], text: bytes, **settings: Any) -> Reading:
    """Read a text by `Lattice`."""
    rows.begin()
    lane = Lattice(rows, start, **settings)
    for byte in text:
        lane.read(byte)
    return Reading(lane.log_z, rows.rows)


def by_beam(llm: Any, text: bytes, params: BeamParams) -> Reading:
    """Read a text by a byte beam, one byte after another."""

    async def read() -> Reading:
        byte_model(llm).store.clear()
        llm.clear_cache()
        llm.counts.reset()
        beam = await ByteBeamState.initial(llm, params)
        for byte in text:
            beam = await (beam.prune() << byte)
        return Reading(beam.logZ, llm.counts.rows)

    return asyncio.run(read())


def measure(name: str, texts: tuple[str, ...], say: Callable[[str], None]) -> list[Line]:
    """Read `texts` in every way; `say` is told of each that is done."""
    llm = load_model(name)
    rows = Rows(llm, byte_model(llm).trie)
    start = tuple(llm.start)
    coded = [t.encode() for t in texts]
    ways: dict[str, Callable[[bytes], Reading]] = {
        "reference": lambda t: by_lattice(rows, start, t, **WIDEST)
    }
    for label, params in BEAMS.items():
        ways[label] = functools.partial(by_beam, llm, params=params)
    found = dict[str, list[Reading]]()
    for label, read in ways.items():
        begun = time.perf_counter()
        found[label] = [read(t) for t in coded]
        say(f"{label}: {time.perf_counter() - begun:.0f} s")
    size = sum(map(len, coded))
    exact = np.max([[r.log_z for r in readings] for readings in found.values()], axis=0)
    return [
        Line(label, exact - [r.log_z for r in readings], sum(r.rows for r in readings) / size)
        for label, readings in found.items()
    ]


def markdown(lines: list[Line], about: str) -> str:
    """The table as Markdown."""
    rows = ["| " + " | ".join(HEADS) + " |", "|---" + "|--:" * (len(HEADS) - 1) + "|"]
    return "\n".join([*rows, *("| " + " | ".join(x.cells()) + " |" for x in lines), "", about])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--texts", type=int, default=len(TEXTS), help="the first so many texts")
    parser.add_argument("--docs", action="store_true", help="update docs/performance.md")
    arguments = parser.parse_args()
    console = Console()
    lines = measure(arguments.model, TEXTS[: arguments.texts], console.print)
    table = Table(*HEADS)
    for line in lines:
        table.add_row(*line.cells())
    console.print(table)
    if arguments.docs:
        said = f"{len(lines[0].lost)} texts, {arguments.model}; nats."
        report.put(report.DOCS / "performance.md", markdown(lines, said), "accuracy")


if __name__ == "__main__":
    main()
