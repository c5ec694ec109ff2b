"""Which way finds a posterior from a number of rows: `python -m benchmarks.auto [--seeds 20]`.

Ten finite constraints on a real model, whose posterior is enumerated under the beams that all
ways use: seven as in the study of constraints, and three that need planning (keyphrases in any
order, an exact number of words, an ending that rhymes). A text ends with a line. Each way begins
with empty caches and spends the same rows of the model, pilots and fitting included, before no
further run (or draw) begins:

- `auto`: `smc(target, 32, lookahead="auto", budget=rows)`;
- `smc`: plain `smc` with 32 particles, run after run, pooled by evidence;
- `local`: locally constrained decoding: the same draws without resampling and without weights;
- `ngram`: as `smc`, with `Lookahead(n_texts=8)` as proposal and twist;
- `posterior`: `posterior(target, rows)`;
- `exact`: `exact_sample(target, 1000, rows)`.

Printed is the mean total variation from the truth over the seeds, and the rows that were spent.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from benchmarks import report
from benchmarks.kept_rows import KeptRows
from genlm_bytes_smc import BeamParams, ByteLLM, load_model
from genlm_bytes_smc.constraints import FiniteSet
from genlm_bytes_smc.lookahead import Lookahead
from genlm_bytes_smc.smc import AllParticlesDeadError, exact_sample, posterior, smc

PARTICLES, MAX_BYTES, MOST_RUNS = 32, 100, 100
PARAMS = BeamParams(K=10, prune_threshold=0.001, eos_byte_strings=[b"\n"])
Weights = dict[str, float]


def _combine(pattern: str, *choices: Sequence[object]) -> list[str]:
    return [pattern.format(*c) for c in itertools.product(*choices)]


_PHRASES = ("fresh bread", "a red apple", "some green tea", "cold milk")
_WORDS = ("the", "old", "man", "sea", "and", "saw")
_LINES = ("{} sat upon a {}", "{} looked into the {}", "{} was dreaming of a {}")

CONSTRAINTS: dict[str, tuple[str, list[str]]] = {
    "date": (
        "The meeting was held on",
        _combine(
            " {}-{:02}-{:02}", (1959, 1984, 2001, 2019, 2026), range(1, 13), (1, 5, 14, 22, 30)
        ),
    ),
    "e-mail": (
        "Write to:",
        _combine(
            " {}@{}.{}",
            ("info", "help", "anna", "john.smith", "m.zuber", "sales"),
            ("gmail", "example", "acme", "zebra-tools", "mail"),
            ("com", "org", "net"),
        ),
    ),
    "sentence": (
        "She sews and he writes code. The",
        _combine(
            " {} {} {} {}.",
            ("function", "quilt"),
            ("returns", "juggles", "covers"),
            ("a", "the"),
            ("value", "bed", "string", "pattern", "list", "blanket", "number", "table"),
        ),
    ),
    "sum": (
        "5 + 5 = 10\n",
        _combine("{} {} {} = {}", (2, 7, 13), "+-", (3, 4, 11), (1, 5, 6, 9, 10, 11, 17, 24)),
    ),
    "select": (
        "-- the query for the report\n",
        _combine(
            "SELECT {} FROM {} WHERE {} {} 7;",
            ("id", "name", "*", "salary"),
            ("orders", "staff", "users"),
            ("dept", "id", "year"),
            ("=", ">=", "<>"),
        ),
    ),
    "person": (
        '{"name": "Anna", "age": 31}\n',
        _combine(
            '{{"name": "{}", "age": {}}}',
            ("Bob", "Anna", "Łukasz", "Zoë", "John", "Maria", "Xu"),
            (7, 19, 25, 30, 31, 42, 58, 64, 77, 99),
        ),
    ),
    "state": (
        '{"ok": true, "kind": "user"}\n',
        _combine(
            '{{"ok": {}, "kind": "{}"{}}}',
            ("true", "false"),
            ("user", "order", "zebra", "admin", "quartz"),
            ("", ', "id": 7', ', "note": null', ', "at": "noon"'),
        ),
    ),
    "keyphrases": (
        "For breakfast we bought",
        [" " + ", ".join(p[:-1]) + " and " + p[-1] + "." for p in itertools.permutations(_PHRASES)],
    ),
    "word count": (
        "A sentence of exactly four words:",
        [" " + " ".join(w) + "." for w in itertools.product(_WORDS, repeat=4) if len({*w}) == 4],
    ),
    "rhyme": (
        "There was a young lady called Kate,\nwho",
        [
            " " + line.format(*parts)
            for line in _LINES
            for parts in itertools.product(
                ("often", "never", "always", "one day"), ("gate", "plate", "crate", "slate", "date")
            )
        ],
    ),
}

_DAYS = ("Monday", "Tuesday", "Thursday", "Friday", "Sunday")
_MOVES = (("e5", "c5", "e6", "c6"), ("Nf3", "Nc3", "d4", "f4"), ("Nc6", "d6", "Nf6", "exd4"))

# Written when the search was finished, and measured once: nothing was chosen on them.
FRESH: dict[str, tuple[str, list[str]]] = {
    "hours": (
        "The library is open",
        _combine(" {} to {} until {}.", _DAYS, _DAYS, ("5 pm", "18:30", "noon", "midnight")),
    ),
    "chess": (
        "A game of chess:\n1. e4",
        [f" {a} 2. {b} {c}" for a, b, c in itertools.product(*_MOVES) if a == "e5" or c != "exd4"],
    ),
    "path": (
        "$ ls",
        _combine(
            " /{}/{}/{}",
            ("usr", "home", "var", "opt"),
            ("local", "anna", "log", "lib", "share"),
            ("bin", "photos", "syslog", "python3.11", "notes.txt"),
        ),
    ),
    "colours": (
        "The flag has three colours:",
        [
            " {}, {} and {}.".format(*c)
            for c in itertools.permutations(("red", "white", "blue", "green", "black", "gold"), 3)
        ],
    ),
    "countdown": (
        "Sorted from the largest to the smallest:",
        [" " + ", ".join(c) for c in itertools.permutations(("4", "17", "2", "88", "35"))],
    ),
    "français": (
        "The same in French:",
        _combine(
            " {} {} {} {}.",
            ("Le chat", "Le chien", "L'oiseau", "Un garçon"),
            ("noir", "blessé", "français"),
            ("dort", "mange", "s'arrête"),
            ("déjà", "bien", "à la maison", "ici"),
        ),
    ),
}


class World:
    """A constraint on a model, from empty caches."""

    def __init__(self, llm: Any, prompt: str, texts: list[str]) -> None:
        self.llm, self.prompt, self.texts = llm, prompt, texts

    def target(self) -> Any:
        """Return the target; nothing is in the caches any more, and no row is counted."""
        byte_llm = ByteLLM(self.llm, PARAMS, prompt=self.prompt.encode())
        byte_llm.model.store.clear()
        self.llm.clear_cache()
        self.llm.counts.reset()
        return byte_llm * FiniteSet(self.texts)

    async def truth(self) -> npt.NDArray[np.float64]:
        """Return the enumerated posterior, float64[n]."""
        weights = await self.target().p1.batch_complete([t.encode() for t in self.texts])
        out: npt.NDArray[np.float64] = np.exp(weights - np.logaddexp.reduce(weights))
        return out


async def _repeated(
    world: World, rows: int, seed: int, *, weighed: bool, **options: Any
) -> Weights:
    """Return weights of texts from runs that go on until the rows are spent."""
    target, logs = world.target(), defaultdict[str, list[float]](list)
    for run in range(MOST_RUNS):
        if world.llm.counts.rows >= rows:
            break
        try:
            done = await smc(target, PARTICLES, max_bytes=MAX_BYTES, progress=False,
                             seed=1000 * seed + run, **options)  # fmt: skip
        except AllParticlesDeadError:
            continue
        for text, logw in zip(done.texts, done.log_weights.tolist(), strict=True):
            if logw > -np.inf:
                logs[text.decode()].append(logw if weighed else 0.0)
    top = max([max(w) for w in logs.values()], default=0.0)
    return {text: float(np.exp(np.array(w) - top).sum()) for text, w in logs.items()}


async def _plain(world: World, rows: int, seed: int) -> Weights:
    return await _repeated(world, rows, seed, weighed=True)


async def _local(world: World, rows: int, seed: int) -> Weights:
    return await _repeated(world, rows, seed, weighed=False, ess_threshold=0.0)


async def _ngram(world: World, rows: int, seed: int) -> Weights:
    return await _repeated(
        world, rows, seed, weighed=True, lookahead=Lookahead(n_texts=8, seed=seed)
    )


async def _auto(world: World, rows: int, seed: int) -> Weights:
    found = await smc(world.target(), PARTICLES, max_bytes=MAX_BYTES, progress=False, seed=seed,
                      lookahead="auto", budget=rows)  # fmt: skip
    return dict(found.decoded_posterior)


async def _posterior(world: World, rows: int, seed: int) -> Weights:
    found = await posterior(world.target(), rows, MAX_BYTES, seed=seed)
    return dict(found.decoded_posterior)


async def _exact(world: World, rows: int, seed: int) -> Weights:
    found = await exact_sample(world.target(), 1000, rows, MAX_BYTES, seed=seed)
    return dict(found.decoded_posterior) if found.texts else {}


Way = Callable[[World, int, int], Awaitable[Weights]]
WAYS: dict[str, Way] = {
    "auto": _auto,
    "posterior": _posterior,
    "smc": _plain,
    "local": _local,
    "ngram": _ngram,
    "exact": _exact,
}


async def measure(
    world: World, rows: int, seeds: Sequence[int], ways: Sequence[str]
) -> dict[str, Any]:
    """Return for each way the total variation (mean, standard error) and the mean rows spent."""
    truth, out = await world.truth(), {}
    for way in ways:
        errors, spent = [], []
        for seed in seeds:
            found = await WAYS[way](world, rows, seed)
            share = np.array([found.get(t, 0.0) for t in world.texts])
            total = share.sum()
            errors.append(0.5 * np.abs(share / total - truth).sum() if total > 0 else 1.0)
            spent.append(world.llm.counts.rows)
        error = float(np.std(errors) / np.sqrt(len(seeds)))
        out[way] = (float(np.mean(errors)), error, float(np.mean(spent)))
    return out


def cells(name: str, found: dict[str, Any]) -> list[str]:
    """Return a line of the table."""
    return [
        name,
        *(f"{mean:.3f} ± {error:.3f} / {rows:.0f}" for mean, error, rows in found.values()),
    ]


def means(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Return the last line of the table: over the constraints, and how often a way is near best."""
    best = [min(found[0] for found in line.values()) for line in lines]
    out = []
    for way in lines[0]:
        errors = [line[way][0] for line in lines]
        near = sum(e <= b + 0.02 for e, b in zip(errors, best, strict=True))
        out.append(f"{np.mean(errors):.3f}, near best {near} of {len(lines)}")
    return ["mean", *out]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--only", nargs="*", help="constraints")
    parser.add_argument("--fresh", action="store_true", help="the constraints of `FRESH`")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--kept", type=Path, help="keep rows of the model in this file")
    parser.add_argument("--json", type=Path, help="add each line to this file")
    parser.add_argument("--docs", action="store_true", help="update docs/inference.md")
    arguments = parser.parse_args()
    console, lines, table = Console(width=180), [], Table("constraint", *arguments.ways)
    llm = load_model(arguments.model)
    KeptRows(llm, arguments.kept)
    shown = []
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    chosen = FRESH if arguments.fresh else CONSTRAINTS
    for name in arguments.only or chosen:
        world = World(llm, *chosen[name])
        found = asyncio.run(measure(world, arguments.rows, seeds, arguments.ways))
        lines.append(found)
        shown.append(cells(name, found))
        console.print(*shown[-1], sep=" | ")
        if arguments.json:
            with arguments.json.open("a") as file:
                file.write(json.dumps({name: found}) + "\n")
    shown.append(means(lines))
    for line in shown:
        table.add_row(*line)
    console.print(table)
    if arguments.docs:
        heads = ["constraint", *arguments.ways]
        rows = ["| " + " | ".join(x) + " |" for x in (heads, ["---"] * len(heads), *shown)]
        said = f"{arguments.model}, {arguments.rows} rows, seeds {seeds.start} to {seeds.stop - 1}."
        mark = "auto fresh" if arguments.fresh else "auto"
        report.put(report.DOCS / "inference.md", "\n".join([*rows, "", said]), mark)


if __name__ == "__main__":
    main()
