"""Posteriors under constraints that force surprising bytes: `python -m benchmarks.constrained`.

For each of five finite constraints, the exact posterior is enumerated: every text is weighed by
a deferred beam with low thresholds. A text ends with a line: the newline token is its end. Then
`smc` is run with each way of pruning, from one seed after another. Printed are, for each way and
constraint,

- by how much the median `log_ml` differs from the enumerated log marginal likelihood, nats
  (with few particles it is low on most runs even if the model's weights are exact);
- the mean total variation distance of the posterior from the enumerated one;
- rows of the model that the first run asked for, from empty caches.

`--docs` writes the table to docs/performance.md.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from benchmarks import report
from genlm_bytes_smc import BeamParams, ByteLLM, load_model, smc
from genlm_bytes_smc.beam.params import default_params
from genlm_bytes_smc.constraints import FiniteSet

NAMES = [
    "Amélie",
    "Anaïs",
    "André",
    "Aurélie",
    "Benoît",
    "Céline",
    "Chloé",
    "Clément",
    "Élodie",
    "Émile",
    "Étienne",
    "Françoise",
    "Frédéric",
    "Gaëlle",
    "Geneviève",
    "Gérard",
    "Guillaume",
    "Hélène",
    "Hugues",
    "Inès",
    "Jérôme",
    "Joël",
    "Léa",
    "Loïc",
    "Maëlle",
    "Mélanie",
    "Noël",
    "Océane",
    "Philippe",
    "Raphaël",
    "Rémi",
    "René",
    "Sébastien",
    "Solène",
    "Stéphane",
    "Thérèse",
    "Théo",
    "Valérie",
    "Véronique",
    "Zoé",
]
FORMULAS = [
    "H2O",
    "CO2",
    "C6H12O6",
    "NaCl",
    "H2SO4",
    "HNO3",
    "NH3",
    "CH4",
    "C2H5OH",
    "CaCO3",
    "NaOH",
    "KMnO4",
    "H2O2",
    "Fe2O3",
    "Al2O3",
    "SiO2",
    "MgO",
    "C8H10N4O2",
    "C9H8O4",
    "NaHCO3",
    "K2Cr2O7",
    "CuSO4",
    "AgNO3",
    "BaSO4",
    "ZnCl2",
    "TiO2",
    "C10H15N",
    "C17H21NO4",
    "Na2CO3",
    "HCl",
]


def _combine(pattern: str, *choices: Sequence[object]) -> list[str]:
    return [pattern.format(*c) for c in itertools.product(*choices)]


CONSTRAINTS: dict[str, tuple[str, list[str]]] = {
    "French first names": ("Prénoms, un par ligne :\nMarie\n", NAMES),
    "SQL": (
        "-- the query for the report\n",
        _combine(
            "SELECT {} FROM {} WHERE {} {} 7;",
            ("id", "name", "salary"),
            ("orders", "staff"),
            ("dept", "id", "year"),
            ("=", ">="),
        ),
    ),
    "formulas": ("Chemical formulas, one a line:\nO2\n", FORMULAS),
    "dates": (
        "Times of all changes:\n",
        _combine("20{}-{:02}-{:02}T{:02}:30:00Z", (19, 26), (2, 7, 11), (1, 29), (0, 9, 23)),
    ),
    "JSON": (
        "User records, one a line:\n",
        _combine(
            '{{"name": "{}", "age": {}, "admin": {}}}',
            ("Zoë", "Bob", "Łukasz"),
            (7, 42, 101),
            ("true", "false"),
        ),
    ),
}
TIGHT = BeamParams(
    None,
    prune="deferred",
    deferred_share=0.005,
    deferred_merge=0.001,
    deferred_guess=0.1,
    deferred_rows=200,
    deferred_limit=1000,
    eos_byte_strings=[b"\n"],
)
WAYS = {
    "K=5, threshold 0.05": BeamParams(K=5, prune_threshold=0.05),
    "unbiased, K=5, threshold 0.05": BeamParams(K=5, prune_threshold=0.05, prune="unbiased"),
    "K=10, threshold 0.001": BeamParams(K=10, prune_threshold=0.001),
    "deferred (default)": default_params(),
    "deferred, low thresholds": TIGHT,
}
HEADS = ("pruning", *CONSTRAINTS, "mean")


class Outcome(NamedTuple):
    """What came of all runs with one pruning under one constraint."""

    error: float
    distance: float
    rows: int


async def enumerate_texts(llm: Any, prompt: str, texts: list[str]) -> npt.NDArray[np.float64]:
    """Return the log weight of each text as a whole one, float64[n], nats."""
    wide = ByteLLM(llm, TIGHT, prompt=prompt.encode())
    weights: npt.NDArray[np.float64] = await wide.batch_complete([t.encode() for t in texts])
    return weights


async def measure(
    llm: Any,
    params: BeamParams,
    prompt: str,
    texts: list[str],
    exact: npt.NDArray[np.float64],
    seeds: int,
    particles: int,
) -> Outcome:
    """Run `smc` once a seed and compare with the enumerated weights `exact` float64[n], nats."""
    truth = np.exp(exact - np.logaddexp.reduce(exact))
    errors, distances, rows = [], [], 0
    for seed in range(seeds):
        ends = dataclasses.replace(params, eos_byte_strings=[b"\n"])
        potential = ByteLLM(llm, ends, prompt=prompt.encode())
        if seed == 0:
            potential.model.store.clear()
            llm.clear_cache()
            llm.counts.reset()
        run = await smc(
            potential * FiniteSet(texts), particles, seed=seed, beam_seed=seed, max_bytes=80,
            progress=False,
        )  # fmt: skip
        rows = llm.counts.rows if seed == 0 else rows
        found = run.decoded_posterior
        share = np.array([found.get(t, 0.0) for t in texts])
        errors.append(run.log_ml - np.logaddexp.reduce(exact))
        distances.append(0.5 * np.abs(share - truth).sum())
    return Outcome(float(np.median(errors)), float(np.mean(distances)), rows)


def cells(name: str, outcomes: list[Outcome]) -> list[str]:
    """Return a line of the table."""
    shown = [f"{o.error:+.2f} / {o.distance:.2f} / {o.rows}" for o in outcomes]
    means = np.mean([(abs(o.error), o.distance, o.rows) for o in outcomes], axis=0)
    return [name, *shown, f"{means[0]:.2f} / {means[1]:.2f} / {means[2]:.0f}"]


async def compare(model: str, seeds: int, particles: int, console: Console) -> list[list[str]]:
    """Return the lines of the table."""
    llm = load_model(model)
    exact = {n: await enumerate_texts(llm, *c) for n, c in CONSTRAINTS.items()}
    lines = []
    for way, params in WAYS.items():
        outcomes = [
            await measure(llm, params, *c, exact[n], seeds, particles)
            for n, c in CONSTRAINTS.items()
        ]
        lines.append(cells(way, outcomes))
        console.print(*lines[-1], sep=" | ")
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--particles", type=int, default=32)
    parser.add_argument("--docs", action="store_true", help="update docs/performance.md")
    arguments = parser.parse_args()
    console = Console()
    lines = asyncio.run(compare(arguments.model, arguments.seeds, arguments.particles, console))
    table = Table(*HEADS, title="log_ml off, nats (median) / total variation (mean) / rows")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    if arguments.docs:
        rows = ["| " + " | ".join(x) + " |" for x in (HEADS, ["---"] * len(HEADS), *lines)]
        said = f"{arguments.model}, {arguments.seeds} seeds, {arguments.particles} particles."
        text = "\n".join([*rows, "", said])
        report.put(report.DOCS / "performance.md", text, "constrained")


if __name__ == "__main__":
    main()
