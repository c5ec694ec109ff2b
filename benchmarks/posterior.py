"""A posterior at equal rows: `python -m benchmarks.posterior [--model smollm2] [--docs]`.

A constraint of 300 sentences is enumerated: each sentence is weighed by a deferred beam with low
limits. Then `smc` is run with each way of pruning and with more and more particles, every run from
empty caches. Printed and drawn are, against the rows of the model that a run takes (the mean over
seeds), the mean total variation distance from the enumerated posterior, and by how much the
median `log_ml` differs from the enumerated one, nats.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks import report
from benchmarks.accuracy import forget, markdown
from benchmarks.constrained import TIGHT, enumerate_texts
from benchmarks.kept_rows import KeptRows
from genlm_bytes_smc import BeamParams, ByteLLM, load_model, smc
from genlm_bytes_smc.beam.params import default_params
from genlm_bytes_smc.constraints import FiniteSet

PROMPT = "Who lives where:\nMarie lives in Paris.\n"
PEOPLE = (
    "Zoë", "André", "Noël", "Łukasz", "Bob", "Anna", "Jürgen", "Siân", "Omar", "Yuki",
    "Ms Ng", "Dr. Li", "X Æ A-12", "O'Neil", "Mary Ann",
)  # fmt: skip
CITIES = (
    "Rome", "Köln", "Malmö", "São Paulo", "Oslo", "New York", "Łódź", "Xi'an", "St. Louis",
    "Aix-en-Provence", "Tokyo", "Ulm", "Kraków", "The Hague", "Timbuktu", "Reykjavík", "Bern",
    "Zürich", "Nîmes", "Ho Chi Minh City",
)  # fmt: skip
SENTENCES = [f"{who} lives in {where}." for who, where in itertools.product(PEOPLE, CITIES)]
WAYS = {
    "K=5, threshold 0.05": (BeamParams(5, 0.05), report.ORANGE),
    "K=10, threshold 0.001": (BeamParams(10, 0.001), "#953800"),
    "unbiased, K=5, threshold 0.05": (BeamParams(5, 0.05, prune="unbiased"), report.FAINT),
    "deferred (default)": (default_params(), report.PURPLE),
    "deferred, low limits": (TIGHT, report.GREEN),
}
PARTICLES = (8, 32, 128, 512)
HEADS = ("pruning", "particles", "rows", "total variation", "log_ml off, median")


class Point(NamedTuple):
    """What came of the runs with one pruning and one number of particles."""

    way: str
    particles: int
    rows: float
    distance: float
    error: float

    def cells(self) -> list[str]:
        """Return a line of the table, see `HEADS`."""
        numbers = (f"{self.rows:.0f}", f"{self.distance:.3f}", f"{self.error:+.2f}")
        return [self.way, str(self.particles), *numbers]


async def measure(
    llm: Any, way: str, particles: int, exact: npt.NDArray[np.float64], seeds: int
) -> Point:
    """Run `smc` once a seed, from empty caches.

    Args:
        exact: float64[300], log weight of each sentence, nats.
    """
    params = dataclasses.replace(WAYS[way][0], eos_byte_strings=[b"\n"])
    truth = np.exp(exact - np.logaddexp.reduce(exact))
    rows, distances, errors = [], [], []
    for seed in range(seeds):
        forget(llm)
        lm = ByteLLM(llm, params, prompt=PROMPT.encode())
        run = await smc(
            lm * FiniteSet(SENTENCES), particles, seed=seed, beam_seed=seed, progress=False
        )
        found = run.decoded_posterior
        share = np.array([found.get(t, 0.0) for t in SENTENCES])
        rows.append(llm.counts.rows)
        distances.append(0.5 * np.abs(share - truth).sum())
        errors.append(run.log_ml - np.logaddexp.reduce(exact))
    means = (float(np.mean(x)) for x in (rows, distances))
    return Point(way, particles, *means, float(np.median(errors)))


async def compare(model: str, seeds: int, most: int, console: Console) -> list[Point]:
    """Return what came of every pruning and number of particles."""
    llm = load_model(model)
    KeptRows(llm)
    exact = await enumerate_texts(llm, PROMPT, SENTENCES)
    points = []
    for way, particles in itertools.product(WAYS, [n for n in PARTICLES if n <= most]):
        points.append(await measure(llm, way, particles, exact, seeds))
        console.print(*points[-1].cells(), sep=" | ")
    return points


def draw(points: list[Point], model: str) -> Figure:
    """Return the figure: total variation and error against rows."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for way, (_, color) in WAYS.items():
        mine = [p for p in points if p.way == way]
        rows = [p.rows for p in mine]
        left.plot(rows, [p.distance for p in mine], "o-", color=color, label=way, lw=1.2)
        right.plot(rows, [abs(p.error) for p in mine], "o-", color=color, lw=1.2)
    left.set_ylabel("total variation, mean")
    right.set_ylabel("|log_ml - truth|, median, nats")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("rows of the model a run")
        axes.grid(alpha=0.25)
    left.legend(frameon=False, fontsize=8)
    figure.suptitle(f"300 sentences, {' to '.join(map(str, PARTICLES[::3]))} particles, {model}")
    return figure


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--most", type=int, default=PARTICLES[-1], help="particles of a run")
    parser.add_argument("--docs", action="store_true", help="update docs/performance.md")
    arguments = parser.parse_args()
    console = Console()
    points = asyncio.run(compare(arguments.model, arguments.seeds, arguments.most, console))
    text = markdown(
        HEADS, [p.cells() for p in points], f"{arguments.model}, {arguments.seeds} seeds."
    )
    console.print(text)
    if arguments.docs:
        report.put(report.DOCS / "performance.md", text, "posterior")
    style = {"svg.hashsalt": "genlm-bytes-smc", "font.size": 9, "text.color": report.INK}
    with mpl.rc_context(style):
        out = report.DOCS / "images" if arguments.docs else Path("benchmarks/out")
        out.mkdir(parents=True, exist_ok=True)
        figure = draw(points, arguments.model)
        figure.savefig(out / "posterior_rows.svg", metadata={"Date": None})
        figure.savefig(out / "posterior_rows.png", dpi=110)


if __name__ == "__main__":
    main()
