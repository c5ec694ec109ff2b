"""What an exact sample costs, and what other samplers cost: `python -m benchmarks.exact`.

For each constraint of `benchmarks.auto`, from empty caches and with one draw after the other (or
`--at-once` side by side), a line tells

- `exact_sample`: draws, rows and forwards of the model for a text, and the p-value of the
  chi-squared test of 2,000 further texts against the enumerated law;
- plain rejection, which remembers nothing: one over the marginal likelihood draws a text, times the
  rows of a draw (the mean of 30, which stop at the first byte that the constraint excludes);
- ASAp: total variation between the enumerated law and that of as many draws, on average, and the
  forwards of each; draws until that of a single draw is below 0.05, and rows and forwards for a
  text if those are thrown away;
- Metropolis-Hastings on prefixes: steps until total variation is below 0.05, and rows and forwards
  for a text if each is the end of such a chain.

`baselines` says how the last three are done. All use the rows of one beam, and all remember rows
but plain rejection. `--docs` writes the table to docs/exact.md.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

from benchmarks import report
from benchmarks.auto import CONSTRAINTS, MAX_BYTES, World
from benchmarks.baselines import ASAp, Chain, Rows, Texts, drive, enumerated, rejected
from benchmarks.kept_rows import KeptRows
from genlm_bytes_smc import load_model
from genlm_bytes_smc.smc import exact_sample

NEAR, TESTED, PLAIN_DRAWS = 0.05, 2000, 30
MOST_DRAWS, MOST_STEPS = 1000, 20_000  # of ASAp until it is near; of all chains together
FIRST = "ASAp's first draws, whatever their law,"
HEADS = (
    "constraint",
    "exact: draws, rows, forwards",
    "χ² p",
    "plain: draws, rows",
    "ASAp: TV, forwards; draws to 0.05, rows, forwards",
    "MH: steps to 0.05, rows, forwards",
)
Cost = Callable[[], tuple[int, int]]


async def _fresh(world: World) -> tuple[Any, Cost]:
    """Return the target from empty caches, its prompt read, and what tells rows and forwards."""
    target, counts = world.target(), world.llm.counts
    await target.prefix([])
    rows, forwards = counts.rows, counts.forwards
    return target, lambda: (counts.rows - rows, counts.forwards - forwards)


def chi_squared(texts: Sequence[bytes], known: Texts) -> float:
    """Return the p-value of texts against the law; those expected less than 5 times are pooled."""
    counts = Counter(texts)
    if not set(counts) <= set(known.texts):
        return 0.0
    expected = len(texts) * known.law
    found = np.array([counts[t] for t in known.texts], dtype=float)
    rare = expected < 5
    rest = np.array([[found[rare].sum(), expected[rare].sum()]])
    pairs = np.stack([found[~rare], expected[~rare]], axis=1)
    if rest[0, 1] >= 1:
        pairs = np.concatenate([pairs, rest])
    if len(pairs) < 2:  # one text has nearly all: whether the others come too often
        return float(stats.binomtest(int(rest[0, 0]), len(texts), rest[0, 1] / len(texts)).pvalue)
    pairs[:, 1] *= pairs[:, 0].sum() / pairs[:, 1].sum()
    return float(stats.chisquare(pairs[:, 0], pairs[:, 1]).pvalue)


async def exact(world: World, known: Texts, n: int, at_once: int) -> tuple[float, ...]:
    """Return draws, rows and forwards a text of `exact_sample`, and a p-value."""
    target, cost = await _fresh(world)
    found = await exact_sample(target, n, max_bytes=MAX_BYTES, seed=0, at_once=at_once)
    spent = cost()
    more = await exact_sample(target, TESTED, max_bytes=MAX_BYTES, seed=1)
    return found.draws / n, spent[0] / n, spent[1] / n, chi_squared(more.texts, known)


async def plain(world: World, known: Texts) -> tuple[float, float]:
    """Return draws and rows a text of rejection without memory."""
    draws, spent = float(np.exp(-np.logaddexp.reduce(known.logw))), 0
    for seed in range(PLAIN_DRAWS):
        target, cost = await _fresh(world)
        await drive(Rows(target), lambda s=seed: rejected(np.random.default_rng(s)), 1)  # type: ignore[misc]
        spent += cost()[0]
    return draws, draws * spent / PLAIN_DRAWS


async def asap(world: World, known: Texts, n: int, at_once: int) -> tuple[float, ...]:
    """Return TV and forwards of n draws, draws until one is near, rows and forwards a text."""
    target, cost = await _fresh(world)
    rows, sampler, rng = Rows(target), ASAp(), np.random.default_rng(0)
    laws, near, first = [known.asap(sampler)], None, np.inf
    while len(laws) <= MOST_DRAWS and (near is None or len(laws) <= n):
        if near is None and known.away(laws[-1]) < NEAR:
            near = len(laws) - 1
            if len(laws) > n:
                break
        await drive(rows, lambda: sampler.draw(rng), at_once, at_once)
        laws += [known.asap(sampler)] * at_once
        first = cost()[1] / n if len(laws) <= n + 1 else first
    mean = known.away(np.mean(laws[:n], axis=0))
    await drive(rows, lambda: sampler.draw(rng), n, at_once)
    return mean, first, np.inf if near is None else near, cost()[0] / n, cost()[1] / n


async def chains(world: World, known: Texts, n: int, at_once: int) -> tuple[float, ...]:
    """Return steps until a chain is near, and rows and forwards for the end of such a chain."""
    steps = known.steps(NEAR)
    if steps is None:
        return np.inf, np.inf, np.inf
    target, cost = await _fresh(world)
    rng, ran = np.random.default_rng(0), min(n, max(MOST_STEPS // max(steps, 1), 1))
    await drive(Rows(target), lambda: Chain(min(steps, MOST_STEPS)).draw(rng), ran, at_once)
    return steps, cost()[0] / n, cost()[1] / n


async def measure(world: World, n: int, at_once: int) -> tuple[list[str], dict[str, float]]:
    """Return a line without its first cell, and the forwards a text of each sampler."""
    target, _ = await _fresh(world)
    known = await enumerated(Rows(target), [t.encode() for t in world.texts])
    ours, other = await exact(world, known, n, at_once), await plain(world, known)
    third, last = await asap(world, known, n, at_once), await chains(world, known, n, at_once)
    cells = [
        f"{ours[0]:.1f}, {ours[1]:.1f}, {ours[2]:.1f}",
        f"{ours[3]:.2f}",
        f"{other[0]:.2g}, {other[1]:.2g}",
        f"{third[0]:.2f}, {third[1]:.1f}; {_count(third[2])}, {third[3]:.1f}, {third[4]:.1f}",
        f"{_count(last[0])}, {last[1]:.1f}, {last[2]:.1f}",
    ]
    forwards = {"exact": ours[2], "plain": other[1], "ASAp": third[4], "MH": last[2]}
    forwards |= {FIRST: third[1]}
    return cells, forwards | {"p": ours[3]}


def _count(x: float) -> str:
    return f"{x:,.0f}" if np.isfinite(x) else f"over {MOST_DRAWS:,}"


def verdict(found: Sequence[dict[str, float]], n: int) -> str:
    """Say on how many constraints `exact_sample` took the fewest forwards."""
    won = {k: sum(f["exact"] < f[k] for f in found) for k in ("plain", "ASAp", "MH", FIRST)}
    told = ", ".join(f"{k} on {v}" for k, v in won.items())
    passed = sum(f["p"] > 0.001 for f in found)
    return (
        f"{n} texts each. exact_sample takes fewer forwards a text than {told} of {len(found)} "
        f"constraints, and passes the chi-squared test (p > 0.001) on {passed}."
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(CONSTRAINTS), help="constraints")
    parser.add_argument("--kept", type=Path, help="keep rows of the model in this file")
    parser.add_argument("--docs", action="store_true", help="update docs/exact.md")
    arguments = parser.parse_args()
    llm = load_model(arguments.model)
    KeptRows(llm, arguments.kept)
    console, lines, found = Console(width=180), [], []
    for name in arguments.only:
        world = World(llm, *CONSTRAINTS[name])
        cells, forwards = asyncio.run(measure(world, arguments.texts, arguments.at_once))
        lines.append([name, *cells])
        found.append(forwards)
        console.print(*lines[-1], sep=" | ")
    table = Table(*HEADS)
    for line in lines:
        table.add_row(*line)
    told = f"{arguments.model}, {verdict(found, arguments.texts)}"
    console.print(table, told, sep="\n")
    if arguments.docs:
        rows = itertools.chain([HEADS, ["---"] * len(HEADS)], lines)
        text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        report.put(report.DOCS / "exact.md", f"{text}\n\n{told}", "exact")


if __name__ == "__main__":
    main()
