"""What accuracy costs: `python -m benchmarks.frontier [--model smollm2] [--docs]`.

Reads the 206 strings of `benchmarks.accuracy` and 20 kB of prose with many settings of each
pruning, and prints for each how much of a text's log probability it loses (nats), how many rows
of the model it asks for, and how much processor time a byte takes. A way of pruning is better
than another if it loses less at as many rows.

Every setting reads from empty caches: byte by byte (`ByteBeamState`), or as a whole
(`ByteLLM.prefix`, for unbiased beams `ByteBeamState.prefill`). The weights are those of the beams:
`ByteLLM.prefix` with top-K beams adds up normalised rows instead, which may be above the truth.
The reference of a text is the largest weight that any setting finds; the last setting, with very
low limits, is there for that. Times are taken on every `--timed`th string, without any kept rows,
in one thread, the settings in turn.

`--docs` writes the tables to docs/performance.md and the figure to docs/images.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from benchmarks import report
from benchmarks.accuracy import TEXTS, Reading, as_whole, by_beam, forget, markdown
from benchmarks.kept_rows import KeptRows
from genlm_bytes_smc import BeamParams, ByteBeamState, load_model
from genlm_bytes_smc.beam.model import byte_model

HEADS = (
    "pruning", "median", "90%", "worst", "below 0.1", "over 1", "rows a byte", "ms a byte",
)  # fmt: skip
PROSE_HEADS = ("pruning", "mean", "90%", "worst", "over 1", "rows a token", "forwards")
PIECE, PIECES = 512, 40
TOP, DEFERRED, WHOLE, UNBIASED = (
    "top-K, byte by byte", "deferred, byte by byte", "deferred, whole text", "unbiased, whole text",
)  # fmt: skip
COLORS = {TOP: report.ORANGE, DEFERRED: report.GREEN, WHOLE: report.PURPLE, UNBIASED: report.FAINT}


@dataclass(frozen=True, eq=False)
class Way:
    """A setting of a pruning.

    Attributes:
        family: the pruning and how it reads, a line of the figure.
        label: its setting.
        params: the same.
        prose: whether it reads prose, too.
    """

    family: str
    label: str
    params: BeamParams
    prose: bool = False

    def read(self, llm: Any, text: bytes) -> Reading:
        """Read a text from empty caches."""
        if self.family == UNBIASED:
            return unbiased(llm, text, self.params)
        if self.family in (TOP, DEFERRED):
            return by_beam(llm, text, self.params)
        return as_whole(llm, text, self.params)


def _deferred(share: float, merge: float, readings: int = 4) -> BeamParams:
    return BeamParams(
        None,
        prune="deferred",
        deferred_share=share,
        deferred_merge=merge,
        deferred_readings=readings,
        deferred_rows=24 if readings == 4 else 200,
        deferred_limit=256 if readings == 4 else 4096,
    )


WAYS = (
    Way(TOP, "K=5, threshold 0.05", BeamParams(5, 0.05), True),
    Way(TOP, "K=10, threshold 0.01", BeamParams(10, 0.01)),
    Way(TOP, "K=10, threshold 0.001", BeamParams(10, 0.001)),
    Way(TOP, "K=32, threshold 0.0001", BeamParams(32, 1e-4)),
    Way(UNBIASED, "K=5, threshold 0.05", BeamParams(5, 0.05, prune="unbiased")),
    Way(UNBIASED, "K=10, threshold 0.01", BeamParams(10, 0.01, prune="unbiased")),
    Way(DEFERRED, "share 0.05, merge 0.03", _deferred(0.05, 0.03)),
    Way(DEFERRED, "share 0.02, merge 0.01", _deferred(0.02, 0.01)),
    Way(DEFERRED, "share 0.02, merge 0.003", _deferred(0.02, 0.003)),
    Way(DEFERRED, "share 0.01, merge 0.001", _deferred(0.01, 0.001)),
    Way(WHOLE, "share 0.05, merge 0.03", _deferred(0.05, 0.03), True),
    Way(WHOLE, "share 0.02, merge 0.01", _deferred(0.02, 0.01)),
    Way(WHOLE, "share 0.02, merge 0.003 (default)", _deferred(0.02, 0.003), True),
    Way(WHOLE, "merge 0.001, 30 readings", _deferred(0.02, 0.001, 30), True),
    Way(WHOLE, "merge 0.0003, 30 readings", _deferred(0.02, 0.0003, 30), True),
    Way(WHOLE, "share 0.01, merge 0.0001, 30 readings", _deferred(0.01, 0.0001, 30)),
    Way(WHOLE, "share 0.005, merge 0.00003, 30 readings", _deferred(0.005, 0.00003, 30)),
)


def unbiased(llm: Any, text: bytes, params: BeamParams) -> Reading:
    """Read a text as a whole with one seed."""

    async def read() -> Reading:
        forget(llm)
        beam = await ByteBeamState.initial(llm, params)
        log_z = (await beam.prefill(text)).logZ
        return Reading(log_z, llm.counts.rows, llm.counts.forwards)

    return asyncio.run(read())


def pieces() -> list[bytes]:
    """Return 20 kB of this project's documents (three quarters) and code in pieces."""
    text = (Path(__file__).parent / "data" / "pages.txt").read_bytes()
    return [text[i : i + PIECE] for i in range(0, len(text), PIECE)]


def read_all(
    llm: Any, ways: Sequence[Way], texts: Sequence[bytes], about: str
) -> dict[Way, list[Reading]]:
    """Read every text in every way; rows are kept for one text (Gemma's take 1 MB each)."""
    kept = KeptRows(llm)
    found: dict[Way, list[Reading]] = {way: [] for way in ways}
    for text in track(texts, about):
        kept.clear()
        for way in ways:
            found[way].append(way.read(llm, text))
    kept.close()
    return found


def seconds(llm: Any, ways: Sequence[Way], texts: Sequence[bytes]) -> dict[Way, float]:
    """Return the processor time of each way, seconds a byte."""
    spent = dict.fromkeys(ways, 0.0)
    for way in ways:
        way.read(llm, b"warm")
    for text in track(texts, "times"):
        for way in ways:
            begun = time.process_time()
            way.read(llm, text)
            spent[way] += time.process_time() - begun
    size = sum(map(len, texts))
    return {way: s / size for way, s in spent.items()}


def errors(found: dict[Way, list[Reading]]) -> dict[Way, npt.NDArray[np.float64]]:
    """Return what each way loses, float64[texts], nats; of unbiased ones the distance."""
    exact = np.max(
        [[r.log_z for r in rs] for way, rs in found.items() if way.family != UNBIASED], axis=0
    )
    return {way: np.abs(exact - [r.log_z for r in rs]) for way, rs in found.items()}


def lines(found: dict[Way, list[Reading]], times: dict[Way, float], size: int) -> list[list[str]]:
    """Return the lines of the table of strings, see `HEADS`."""
    out = []
    for way, lost in errors(found).items():
        numbers = (np.median(lost), np.quantile(lost, 0.9, method="nearest"), lost.max())
        rows = sum(r.rows for r in found[way]) / size
        out.append([
            f"{way.family}: {way.label}", *(f"{x:.2f}" for x in numbers),
            f"{(lost < 0.1).mean():.0%}", f"{(lost > 1).mean():.0%}", f"{rows:.2f}",
            f"{1e3 * times[way]:.0f}" if way in times else "",
        ])  # fmt: skip
    return out


def prose_lines(found: dict[Way, list[Reading]], tokens: int) -> list[list[str]]:
    """Return the lines of the table of prose, see `PROSE_HEADS`."""
    out = []
    for way, lost in errors(found).items():
        readings = found[way]
        numbers = (lost.mean(), np.quantile(lost, 0.9, method="nearest"), lost.max())
        out.append([
            f"{way.family}: {way.label}", *(f"{x:.2f}" for x in numbers),
            f"{(lost > 1).mean():.0%}", f"{sum(r.rows for r in readings) / tokens:.2f}",
            f"{np.mean([r.forwards for r in readings]):.1f}",
        ])  # fmt: skip
    return out


def save(figure: Figure, name: str, docs: bool) -> None:
    """Write the figure to docs/images or to benchmarks/out."""
    out = report.DOCS / "images" if docs else Path("benchmarks/out")
    out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "genlm-bytes-smc"}):
        figure.savefig(out / f"frontier_{name}.svg", metadata={"Date": None})
        figure.savefig(out / f"frontier_{name}.png", dpi=110)


def draw(found: dict[Way, list[Reading]], times: dict[Way, float], size: int, model: str) -> Figure:
    """Return the figure: what is lost against rows a byte, and against time a byte."""
    mpl.rcParams.update({"font.size": 9, "text.color": report.INK})
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    grid = figure.subplots(2, 2, sharex="col")
    lost = errors(found)
    for column, unit in enumerate(("rows of the model a byte", "processor time a byte, ms")):
        for family, color in COLORS.items():
            mine = [w for w in found if w.family == family and (column == 0 or w in times)]
            if not mine:
                continue
            rows = [sum(r.rows for r in found[w]) / size for w in mine]
            x = rows if column == 0 else [1e3 * times[w] for w in mine]
            order = np.argsort(x)
            for row, measure in enumerate((_wrong, _tail)):
                y = [measure(lost[w]) for w in mine]
                grid[row, column].plot(
                    np.array(x)[order], np.array(y)[order], "o-", color=color, label=family, lw=1.2
                )
        grid[1, column].set_xlabel(unit)
        grid[0, column].set_xscale("log")
    grid[0, 0].set_ylabel("share of strings that lose\n0.1 nats or more")
    grid[1, 0].set_ylabel("nats lost by one string in ten or more")
    for axes in grid[1]:
        axes.set_yscale("symlog", linthresh=0.1)
    for axes in grid.flat:
        axes.grid(alpha=0.25)
        axes.set_ylim(bottom=0)
    grid[0, 0].legend(frameon=False)
    figure.suptitle(
        f"What pruning costs and loses, {len(next(iter(lost.values())))} strings, {model}"
    )
    return figure


def _wrong(lost: npt.NDArray[np.float64]) -> float:
    return float((lost >= 0.1).mean())


def _tail(lost: npt.NDArray[np.float64]) -> float:
    return float(np.quantile(lost, 0.9, method="nearest"))


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--texts", type=int, default=len(TEXTS), help="so many, spread out; or 0")
    parser.add_argument("--pieces", type=int, default=PIECES, help="of prose, 512 bytes each")
    parser.add_argument("--timed", type=int, default=16, help="every so many-th string is timed")
    parser.add_argument("--docs", action="store_true", help="update docs/performance.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console, llm = Console(), load_model(arguments.model)
    name = "gemma" if "gemma" in arguments.model else arguments.model
    tables: list[tuple[str, Sequence[str], list[list[str]], str]] = []
    if arguments.texts:
        strings = [t.encode() for t in TEXTS[:: max(1, len(TEXTS) // arguments.texts)]]
        times = seconds(llm, WAYS[:-2], strings[:: arguments.timed])
        found, size = read_all(llm, WAYS, strings, "strings"), sum(map(len, strings))
        tables = [(f"frontier {name}", HEADS, lines(found, times, size), f"{len(strings)} strings")]
        save(draw(found, times, size, name), name, arguments.docs)
    if arguments.pieces:
        chosen = pieces()[:: max(1, PIECES // arguments.pieces)]
        prose = read_all(llm, [w for w in WAYS if w.prose], chosen, "prose")
        tokens = sum(len(byte_model(llm).canonical(t)) for t in chosen)
        about = f"{sum(map(len, chosen))} bytes, {tokens} tokens"
        tables.append((f"frontier prose {name}", PROSE_HEADS, prose_lines(prose, tokens), about))
    for mark, heads, cells, about in tables:
        text = markdown(heads, cells, f"{about}, {arguments.model}; nats.")
        console.print(text)
        if arguments.docs:
            report.put(report.DOCS / "performance.md", text, mark)


if __name__ == "__main__":
    main()
