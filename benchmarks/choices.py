"""What `choose` should prune by: `python -m benchmarks.choices [--model smollm2] [--docs]`.

Asks for the distribution over some answers after nine prompts, from empty caches, with the
default of `choose` (the prompt with deferred pruning, the answers with a top-K beam of 32 and
threshold 0.0001), with such a beam for all, with deferred pruning for all (the default of
`ByteLLM`), the same at low limits, and with the usual beam of 5. Printed are, for
each, rows of the model, how far log weights (nats) and probabilities are from those of a beam of
64 with threshold 0.00001, and the bound that `choose` reports.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks import report
from benchmarks.accuracy import forget, markdown
from genlm_bytes_smc import BeamParams, Choice, choose, load_model
from genlm_bytes_smc.beam.params import default_params
from genlm_bytes_smc.choosing import THRESHOLD, WIDTH

FEW_SHOTS = """Name the topic of each headline: technology, politics, sports or art.
Headline: New phone has three cameras. Topic: technology
Headline: Parliament passes the budget after a long night. Topic: politics
Headline: Museum shows forgotten sketches of a master. Topic: art
Headline: Tennis champion wins the final in straight sets. Topic:"""
CASES = (
    ("The capital of France is", (" Paris", " London", " Berlin", " Rome", " a city")),
    ("Review: The food was cold.\nSentiment:", (" positive", " negative", " neutral")),
    ("Q: Which planet is largest?\nA:", (" Jupiter", " Saturn", " Earth", " Mars", " the Sun")),
    ("Le mot français pour « house » est", (" maison", " voiture", " arbre", " église")),
    ("SELECT name FROM", (" users", " employees", " customers;", " orders WHERE id = 3")),
    ("2 + 2 = ", ("4", "5", "22", "four")),
    ("def add(a, b):\n    return", (" a + b", " a+b", " b + a", " sum([a, b])")),
    (FEW_SHOTS, (" technology", " politics", " sports", " art")),
    ("The element with symbol Fe is", (" iron", " ferrum", " fluorine", " iron.", " iron, ")),
)
WIDE = BeamParams(2 * WIDTH, THRESHOLD / 10)
WAYS = {
    "deferred prompt, then K=32, threshold 0.0001 (default)": None,
    f"K={WIDTH}, threshold {THRESHOLD:.4f}": BeamParams(WIDTH, THRESHOLD),
    "deferred": default_params(),
    "deferred, share 0.003, merge 0.0001": dataclasses.replace(
        default_params(), deferred_share=0.003, deferred_merge=1e-4, deferred_readings=30
    ),
    "K=5, threshold 0.05": BeamParams(5, 0.05),
}
HEADS = ("pruning", "rows", "nats, worst", "nats, median", "probability, worst", "bound, median")


def wide(llm: Any) -> list[Choice]:
    """Return what a wide beam says of each case."""
    return [
        asyncio.run(choose(llm, prompt, options, beam_params=WIDE)) for prompt, options in CASES
    ]


def measure(
    llm: Any, params: BeamParams | None, exact: list[Choice]
) -> tuple[int, np.ndarray, np.ndarray, list[float]]:
    """Return the rows of all cases, distances of log weights and of probabilities, and bounds."""
    rows, nats, shares, bounds = 0, [], [], []
    for (prompt, options), truth in zip(CASES, exact, strict=True):
        forget(llm)
        found = asyncio.run(choose(llm, prompt, options, beam_params=params))
        rows += llm.counts.rows
        nats.append(np.abs(found.log_weights - truth.log_weights))
        shares.append(np.abs(found.probabilities - truth.probabilities))
        bounds.append(found.bound)
    return rows, np.concatenate(nats), np.concatenate(shares), bounds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--docs", action="store_true", help="update docs/choose.md")
    arguments = parser.parse_args()
    llm, lines = load_model(arguments.model), []
    exact = wide(llm)
    for name, params in WAYS.items():
        rows, nats, shares, bounds = measure(llm, params, exact)
        numbers = (nats.max(), np.median(nats), shares.max(), np.median(bounds))
        lines.append([name, str(rows), *(f"{x:.4f}" for x in numbers)])
    text = markdown(HEADS, lines, f"{len(CASES)} prompts, {arguments.model}.")
    Console().print(text)
    if arguments.docs:
        report.put(report.DOCS / "choose.md", text, "choices")


if __name__ == "__main__":
    main()
