"""What a draft saves on two models with two tokenizers: `python -m benchmarks.draft --target FILE`.

The target is a large model, such as Gemma 3 270M as a GGUF file (262,144 tokens, slow), the draft
a small one with other tokens. After each prompt particles write whole sentences of at most 48
bytes, once without a draft and once with each length of block, from empty caches. Printed are, for
each prompt and way,

- rows and forwards of the target a byte of the step (all particles together);
- `log_ml`, and the effective sample size at the end: the estimates are of one number;
- sigma, the standard deviation of the log ratio of target and draft over the texts that are left,
  over the root of their length. A block of b bytes multiplies weights whose logs vary by about
  sigma sqrt(b), so that a share of about exp(-sigma^2 b) of the particles survives it.

`--docs` writes the table to docs/howto/ensemble.md.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import report
from genlm_bytes_smc import ByteLLM, load_model
from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.smc import smc

PROMPTS = (
    "The weather in London is",
    "To make a good soup you need",
    "The first computers were",
)
LONGEST, SENTENCE = 48, "[a-zA-Z ,']{12,46}[.]"
HEADS = ("prompt", "draft", "rows a byte", "forwards a byte", "log_ml", "ESS", "σ, nats/√byte")


async def measure(
    target: Any, draft: Any, prompt: str, particles: int, block: int | None, seed: int
) -> list[str]:
    """Return a line: what a run took and found."""
    llm = _after(target, prompt)
    small = None if block is None else _after(draft, prompt)
    for model in (llm, small):
        if model is not None:
            model.model.store.clear()
            model.clear_cache()
            await model.logw_next([])
    rows, forwards = target.counts.rows, target.counts.forwards
    options: dict[str, Any] = {} if small is None else {"draft": small, "block": block}
    run = await smc(llm * ByteRegex(SENTENCE), particles, 0.5, LONGEST, seed=seed,
                    progress=False, **options)  # fmt: skip
    steps = len(run.history)
    spent = target.counts.rows - rows, target.counts.forwards - forwards
    apart = "" if small is None else f"{await _apart(llm, small, run.texts):.2f}"
    name = "none" if block is None else f"blocks of {block}"
    found = [f"{run.log_ml:.1f}", f"{run.ess:.1f}", apart]
    return [prompt, name, *(f"{x / steps:.2f}" for x in spent), *found]


def _after(engine: Any, prompt: str) -> ByteLLM:
    """Return a model that has read a prompt; a text ends by the tokens that end one."""
    return ByteLLM(engine, prompt=prompt.encode())


async def _apart(target: ByteLLM, draft: ByteLLM, texts: list[bytes]) -> float:
    """Return the deviation of log target - log draft, nats over the root of a byte."""
    symbols = [[bytes([b]) for b in t] for t in dict.fromkeys(texts)]
    ratio = await target.batch_prefix(symbols) - await draft.batch_prefix(symbols)
    lengths = np.array([len(s) for s in symbols])
    return float(np.std(ratio) / np.sqrt(lengths.mean()))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True, help="as for load_model")
    parser.add_argument("--draft", default="smollm2")
    parser.add_argument("--name", default="Gemma 3 270M", help="of the target, in the table")
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--blocks", type=int, nargs="*", default=[4, 16])
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--docs", action="store_true", help="update docs/howto/ensemble.md")
    arguments = parser.parse_args()
    target, draft = load_model(arguments.target), load_model(arguments.draft)
    console, lines = Console(width=140), []
    for prompt in PROMPTS[: arguments.prompts]:
        for block in (None, *arguments.blocks):
            line = asyncio.run(measure(target, draft, prompt, arguments.particles, block, 0))
            lines.append(line)
            console.print(*line, sep=" | ")
    table = Table(*HEADS)
    for line in lines:
        table.add_row(*line)
    console.print(table)
    if arguments.docs:
        rows = itertools.chain([HEADS, ["---"] * len(HEADS)], lines)
        text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        told = f"{arguments.name} with {arguments.draft} as draft, {arguments.particles} particles."
        report.put(report.DOCS / "howto" / "ensemble.md", f"{text}\n\n{told}", "draft")


if __name__ == "__main__":
    main()
