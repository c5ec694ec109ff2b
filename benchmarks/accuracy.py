"""What pruning loses: `python -m benchmarks.accuracy [--model smollm2] [--docs]`.

Reads 206 short texts of ten kinds and prints, for each way of pruning, how much of the log
probability of a text it loses (nats), how many rows of the model it asks for, and in how many
forwards, from empty caches. A text is read byte by byte, or as a whole (`ByteLLM.prefix`). The
reference is the widest setting of `benchmarks.lattice`, which judges contexts after each byte;
where another way found more, that is the reference.

Then reads pieces of prose as a whole, and prints rows and forwards, the time over that of one
forward over the text's tokens, and what is lost against a reading with low thresholds.

Last, the spread of unbiased estimates: the standard deviation of the estimated probability over
the true one, for texts read byte by byte and as a whole.

`--docs` writes the tables to docs/performance.md.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from benchmarks import report
from benchmarks.kept_rows import KeptRows
from benchmarks.lattice import Lattice, Rows
from genlm_bytes_smc import BeamParams, ByteBeamState, ByteLLM, load_model
from genlm_bytes_smc.beam.model import byte_model
from genlm_bytes_smc.beam.params import default_params

DATA = Path(__file__).parent / "data"
TEXTS = tuple((DATA / "strings.txt").read_text(encoding="utf-8").splitlines())
PROSE = tuple((DATA / "prose.txt").read_text(encoding="utf-8").strip().split("\n\n----\n\n"))
BEAMS = {
    "K=5, threshold 0.05": BeamParams(K=5, prune_threshold=0.05),
    "K=10, threshold 0.01": BeamParams(K=10, prune_threshold=0.01),
    "K=10, threshold 0.001": BeamParams(K=10, prune_threshold=0.001),
    "deferred, merge 0.01": BeamParams(K=None, prune="deferred", deferred_merge=0.01),
    "deferred": BeamParams(K=None, prune="deferred"),
    "deferred, merge 0.001": BeamParams(K=None, prune="deferred", deferred_merge=0.001),
}
WHOLE = {
    "deferred, whole text (default)": default_params(),
    "deferred, whole text, merge 0.0003": dataclasses.replace(
        default_params(), deferred_merge=0.0003, deferred_readings=30
    ),
}
PATIENT = BeamParams(
    None,
    prune="deferred",
    deferred_share=0.01,
    deferred_merge=0.001,
    deferred_guess=0.1,
    deferred_readings=30,
    deferred_rows=200,
    deferred_limit=4096,
)
WIDEST: dict[str, Any] = {"share": 0.002, "merge": 0.0005, "guess": 0.1, "at_once": 16}
HEADS = ("pruning", "median lost", "90%", "worst", "below 0.1", "rows a byte", "forwards a text")
PROSE_HEADS = ("bytes", "tokens", "rows a token", "forwards", "time / one forward", "lost")
SPREAD_HEADS = ("text", "byte by byte", "whole text")


class Reading(NamedTuple):
    """What came of one text: its log probability (nats), and the rows and forwards asked for."""

    log_z: float
    rows: int
    forwards: int


class Line(NamedTuple):
    """A way of pruning, and over all texts what it lost (float64[n], nats) and rows a byte."""

    name: str
    lost: npt.NDArray[np.float64]
    rows: float
    forwards: float

    def cells(self) -> list[str]:
        """A line of the table, as `HEADS`."""
        lost = self.lost
        numbers = (np.median(lost), np.quantile(lost, 0.9, method="nearest"), lost.max())
        share = f"{(lost < 0.1).mean():.0%}"
        work = (f"{self.rows:.2f}", f"{self.forwards:.1f}")
        return [self.name, *(f"{max(x, 0.0):.2f}" for x in numbers), share, *work]


def by_lattice(rows: Rows, start: tuple[int, ...], text: bytes, **settings: Any) -> Reading:
    """Read a text by `Lattice`."""
    rows.begin()
    lane = Lattice(rows, start, **settings)
    for byte in text:
        lane.read(byte)
    return Reading(lane.log_z, rows.rows, 0)


def by_beam(llm: Any, text: bytes, params: BeamParams) -> Reading:
    """Read a text by a byte beam, one byte after another."""

    async def read() -> Reading:
        forget(llm)
        beam = await ByteBeamState.initial(llm, params)
        for byte in text:
            beam = await (beam.prune() << byte)
        return Reading(beam.logZ, llm.counts.rows, llm.counts.forwards)

    return asyncio.run(read())


def as_whole(llm: Any, text: bytes, params: BeamParams) -> Reading:
    """Read a text that is known in advance."""
    forget(llm)
    log_z = asyncio.run(ByteLLM(llm, params).prefix(text))
    return Reading(log_z, llm.counts.rows, llm.counts.forwards)


def forget(llm: Any) -> None:
    """Empty all caches, and set counts to zero."""
    byte_model(llm).store.clear()
    llm.clear_cache()
    llm.counts.reset()


def measure(llm: Any, texts: tuple[str, ...], say: Callable[[str], None]) -> list[Line]:
    """Read `texts` in every way; `say` is told of each that is done."""
    rows = Rows(llm, byte_model(llm).trie)
    start = tuple(llm.start)
    coded = [t.encode() for t in texts]
    ways: dict[str, Callable[[bytes], Reading]] = {
        "reference": lambda t: by_lattice(rows, start, t, **WIDEST)
    }
    for label, params in BEAMS.items():
        ways[label] = functools.partial(by_beam, llm, params=params)
    for label, params in WHOLE.items():
        ways[label] = functools.partial(as_whole, llm, params=params)
    found = dict[str, list[Reading]]()
    for label, read in ways.items():
        begun = time.perf_counter()
        found[label] = [read(t) for t in coded]
        say(f"{label}: {time.perf_counter() - begun:.0f} s")
    size = sum(map(len, coded))
    exact = np.max([[r.log_z for r in readings] for readings in found.values()], axis=0)
    return [
        Line(
            label,
            exact - [r.log_z for r in readings],
            sum(r.rows for r in readings) / size,
            float(np.mean([r.forwards for r in readings])),
        )
        for label, readings in found.items()
    ]


def prose(llm: Any, texts: tuple[str, ...]) -> list[list[str]]:
    """Read pieces of prose as wholes, and time them: the lines of a table, as `PROSE_HEADS`."""
    lines = []
    for text in texts:
        spelled = text.encode()
        tokens = byte_model(llm).canonical(spelled)
        best = as_whole(llm, spelled, PATIENT).log_z
        begun = time.perf_counter()
        found = as_whole(llm, spelled, default_params())
        seconds = time.perf_counter() - begun
        forget(llm)
        contexts = llm.tree.along(llm.tree.insert(llm.start), tokens)
        begun = time.perf_counter()
        llm.rows_sync(contexts)
        forward = time.perf_counter() - begun
        lines.append(
            [
                str(len(spelled)),
                str(len(tokens)),
                f"{found.rows / len(tokens):.2f}",
                str(found.forwards),
                f"{seconds / forward:.1f}",
                f"{best - found.log_z:.2f}",
            ]
        )
    return lines


def spread(llm: Any, texts: tuple[str, ...], seeds: int) -> list[list[str]]:
    """Return how unbiased estimates vary, as `SPREAD_HEADS`; dead beams count as zero."""

    async def estimate(text: bytes, seed: int, *, whole: bool) -> float:
        params = BeamParams(5, 0.05, prune="unbiased", seed=seed)
        beam = await ByteBeamState.initial(llm, params)
        if whole:
            return (await beam.prefill(text)).logZ
        for byte in text:
            beam = beam if beam.logZ == -np.inf else await (beam.prune() << byte)
        return beam.logZ

    lines = []
    for text in texts:
        exact = as_whole(llm, text.encode(), WHOLE["deferred, whole text, merge 0.0003"]).log_z
        cells = []
        for whole in (False, True):
            found = [
                asyncio.run(estimate(text.encode(), seed, whole=whole)) for seed in range(seeds)
            ]
            cells.append(f"{np.exp(np.minimum(np.array(found) - exact, 20)).std():.3f}")
        lines.append([text, *cells])
    return lines


def markdown(heads: tuple[str, ...], lines: list[list[str]], about: str) -> str:
    """Return a table as Markdown."""
    rows = ["| " + " | ".join(heads) + " |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join([*rows, *("| " + " | ".join(x) + " |" for x in escaped), "", about])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--texts", type=int, default=len(TEXTS), help="so many texts, spread out")
    parser.add_argument("--seeds", type=int, default=30, help="of the unbiased estimates")
    parser.add_argument("--docs", action="store_true", help="update docs/performance.md")
    arguments = parser.parse_args()
    console = Console()
    llm = load_model(arguments.model)
    pieces = prose(llm, PROSE)
    KeptRows(llm)
    chosen = TEXTS[:: max(1, len(TEXTS) // arguments.texts)]
    lines = [x.cells() for x in measure(llm, chosen, console.print)]
    varied = spread(llm, TEXTS[:: max(1, len(TEXTS) // 20)], arguments.seeds)
    tables = (
        ("accuracy", HEADS, lines, f"{len(chosen)} texts, {arguments.model}; nats."),
        ("prose", PROSE_HEADS, pieces, f"{arguments.model}; nats lost against low thresholds."),
        ("spread", SPREAD_HEADS, varied, f"{arguments.model}, {arguments.seeds} seeds, K=5, 0.05."),
    )
    for name, heads, cells, about in tables:
        table = Table(*heads, title=about)
        for line in cells:
            table.add_row(*line)
        console.print(table)
        if arguments.docs:
            report.put(report.DOCS / "performance.md", markdown(heads, cells, about), name)


if __name__ == "__main__":
    main()
