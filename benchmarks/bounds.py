"""Whether `log_ml_bounds` holds the truth: `python -m benchmarks.bounds [--intervals 200]`.

Finite constraints are enumerated on the bundled model and on SmolLM2. For each and for some
particle numbers, intervals of 8 runs of `smc` and of 8 runs held to exact samples are made as
`log_ml_bounds` makes them when it is given the exact samples (those that it draws itself also bring
certain bounds, which only narrow the interval). Printed are

- which share of the intervals holds the enumerated log marginal likelihood, and their mean width;
- the same of intervals by Student's t, mean ± t s / sqrt(8), which trust the spread of the runs.

Under "unlikely beginning" the constraint has a text of 4 to 12% of the posterior whose first byte
particles seldom draw: runs that all miss it agree. `--docs` writes the table to docs/exact.md.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from scipy import stats

from benchmarks import report
from benchmarks.auto import CONSTRAINTS, MAX_BYTES, PARAMS
from benchmarks.kept_rows import KeptRows
from genlm_bytes_smc import ByteLLM, load_model
from genlm_bytes_smc.constraints import FiniteSet
from genlm_bytes_smc.smc import exact_sample, smc_repeat
from genlm_bytes_smc.smc.conditional import conditional_runs
from genlm_bytes_smc.smc.many import interval

FloatArray = npt.NDArray[np.float64]
RUNS, CONFIDENCE, AT_ONCE = 8, 0.95, 64
SIZES = (4, 16)
HEADS = ("model, constraint", "particles", "bounds: holds, width", "Student's t: holds, width")
TALE = "Once upon a time there was a "
WORLDS: dict[str, dict[str, tuple[str, list[str]]]] = {
    "tiny": {
        "animals": (TALE, ["big dog", "old man", "cat", "fox", "king", "bad"]),
        "saying": ("An apple a day keeps the ", ["doctor away.", "dentist away.", "wolf away."]),
        "unlikely beginning": ("Once upon a time there was a", []),
    },
    "smollm2": {
        **{name: CONSTRAINTS[name] for name in ("sum", "e-mail")},
        "unlikely beginning": ("My favourite animal is the", []),
    },
}
COMMON = ("dog", "cat", "horse", "bird", "fish", "lion", "bear", "mouse", "duck", "cow")
RARE = ("jaguar", "quail", "yak", "newt", "ibex", "zebra", "vole", "emu", "okapi", "urchin")


class Cover(NamedTuple):
    """What intervals are like: the share that holds the truth, and their mean width, nats."""

    holds: float
    width: float


async def unlikely_beginning(llm: ByteLLM) -> list[str]:
    """Return two texts: one with an unlikely first byte and 4 to 12% of the posterior.

    The other begins likely and goes on unlikely: a common word with another one after it.
    """
    first = (await llm.logw_next(_symbols(" "))).weights.numpy()
    pairs = [f" {a} {b}" for a, b in itertools.product(COMMON, COMMON)]
    every = [*(f" {w}" for w in RARE), *pairs]
    logs = dict(zip(every, await llm.batch_complete([_symbols(t) for t in every]), strict=True))
    found: list[tuple[float, list[str]]] = []
    for rare, pair in itertools.product(
        (w for w in every[: len(RARE)] if logs[w] > -np.inf), pairs
    ):
        share = np.exp(logs[rare] - np.logaddexp(logs[rare], logs[pair]))
        if 0.04 < share < 0.12:
            found.append((first[ord(rare[1])] - first[ord(pair[1])], [rare, pair]))
    return min(found)[1]


def _symbols(text: str) -> list[bytes]:
    return [bytes([b]) for b in text.encode()]


def covers(low: FloatArray, high: FloatArray, truth: float) -> Cover:
    """Return the share of intervals that hold a value, and their mean width."""
    return Cover(float(np.mean((low <= truth) & (truth <= high))), float(np.mean(high - low)))


def students(logs: FloatArray, sign: int) -> FloatArray:
    """Return mean ± t s / sqrt(n) over the last axis."""
    n = logs.shape[-1]
    t = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)
    bound: FloatArray = logs.mean(-1) + sign * t * logs.std(-1, ddof=1) / n**0.5
    return bound


async def estimates(
    target: Any, size: int, intervals: int, longest: int = MAX_BYTES
) -> tuple[FloatArray, FloatArray]:
    """Return log estimates of runs and of held runs, float64[intervals, 8] each, nats."""
    n = intervals * RUNS
    below = await smc_repeat(target, size, 0.5, longest, seeds=n, at_once=AT_ONCE)
    texts = (await exact_sample(target, n, max_bytes=longest, seed=1)).texts
    above: list[float] = []
    for i in range(0, n, AT_ONCE):
        some = texts[i : i + AT_ONCE]
        found = await conditional_runs(target, some, size, 0.5, longest, range(i, i + len(some)))
        above += [run.log_ml for run in found]
    return below.log_mls.reshape(-1, RUNS), np.array(above).reshape(-1, RUNS)


def compare(below: FloatArray, above: FloatArray, truth: float) -> tuple[Cover, Cover]:
    """Return what the bounds and what intervals by Student's t are like."""
    pairs = zip(below, above, strict=True)
    ours = np.array([interval(*pair, CONFIDENCE)[:2] for pair in pairs])
    theirs = students(below, -1), students(above, 1)
    return covers(ours[:, 0], ours[:, 1], truth), covers(*theirs, truth)


async def measure(llm: ByteLLM, texts: list[str], size: int, intervals: int) -> list[str]:
    """Return a line without its first cell."""
    if not texts:
        texts = await unlikely_beginning(llm)
    logs = await llm.batch_complete([_symbols(t) for t in texts])
    found = await estimates(llm * FiniteSet(texts), size, intervals)
    both = compare(*found, float(np.logaddexp.reduce(logs)))
    return [str(size), *(f"{100 * c.holds:.1f}%, {c.width:.2f}" for c in both)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(WORLDS), choices=list(WORLDS))
    parser.add_argument("--only", nargs="*", help="constraints")
    parser.add_argument("--intervals", type=int, default=200)
    parser.add_argument("--kept", type=Path, help="keep rows of smollm2 in this file")
    parser.add_argument("--docs", action="store_true", help="update docs/exact.md")
    arguments = parser.parse_args()
    console, table, lines = Console(width=120), Table(*HEADS), []
    for name in arguments.models:
        engine = load_model(name)
        KeptRows(engine, arguments.kept if name == "smollm2" else None)
        worlds = [
            w for w in WORLDS[name].items() if arguments.only is None or w[0] in arguments.only
        ]
        for (constraint, (prompt, texts)), size in itertools.product(worlds, SIZES):
            llm = ByteLLM(engine, PARAMS, prompt=prompt.encode())
            cells = asyncio.run(measure(llm, texts, size, arguments.intervals))
            lines.append([f"{name}, {constraint}", *cells])
            console.print(*lines[-1], sep=" | ")
            table.add_row(*lines[-1])
    console.print(table)
    if arguments.docs:
        rows = itertools.chain([HEADS, ["---"] * len(HEADS)], lines)
        text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        told = f"{arguments.intervals} intervals a line, confidence 95%, widths in nats."
        report.put(report.DOCS / "exact.md", f"{text}\n\n{told}", "bounds")


if __name__ == "__main__":
    main()
