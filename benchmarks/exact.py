"""What an exact sample costs: `python -m benchmarks.exact [--model smollm2] [--texts 20]`.

For each constraint of `benchmarks.constrained`, draws exact samples from empty caches. Prints draws
and rows of the model a sample, the certain bounds on the log marginal likelihood, and how many
draws rejection without memory would need for a sample: one over the marginal likelihood.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.constrained import CONSTRAINTS
from genlm_bytes_smc import ByteLLM, load_model
from genlm_bytes_smc.beam.params import default_params
from genlm_bytes_smc.constraints import FiniteSet
from genlm_bytes_smc.smc import exact_sample

HEADS = ("constraint", "draws a sample", "rows a sample", "log_ml between", "plain draws a sample")


async def measure(llm: Any, prompt: str, texts: list[str], n: int) -> list[str]:
    """Return what n exact samples took, as `HEADS` without the first."""
    params = dataclasses.replace(default_params(), eos_byte_strings=[b"\n"])
    potential = ByteLLM(llm, params, prompt=prompt.encode())
    potential.model.store.clear()
    llm.clear_cache()
    await potential.prefix(b"")
    found = await exact_sample(potential * FiniteSet(texts), n, max_bytes=80, seed=0)
    low, high, _ = found.log_ml_bounds
    return [
        f"{found.draws / n:.1f}",
        f"{found.rows / n:.1f}",
        f"{low:.2f} and {high:.2f}",
        f"{np.exp(-high):.0f}",
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--texts", type=int, default=20)
    arguments = parser.parse_args()
    llm = load_model(arguments.model)
    table = Table(*HEADS)
    for name, (prompt, texts) in CONSTRAINTS.items():
        table.add_row(name, *asyncio.run(measure(llm, prompt, texts, arguments.texts)))
    Console().print(table)


if __name__ == "__main__":
    main()
