"""What look-ahead does for the variance of log_ml: `python -m benchmarks.lookahead [--docs]`.

Every run starts with empty caches, so `rows` are the language-model rows that the run itself
computes; rows that fitting took are counted beside it, once a method. A standard deviation of
log_ml is over seeds. `log of mean` is the log of the mean
estimate, which all methods share in expectation and reach only if their runs find the texts
that matter.

`--model smollm2` measures the main methods on a real model: two cases unless `--only` says
otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report
from genlm_bytes_smc import BeamParams, load_model
from genlm_bytes_smc.constraints import ByteGrammar, ByteJsonSchema, ByteRegex
from genlm_bytes_smc.lookahead import Lookahead
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import AllParticlesDeadError, smc

OUT = Path(__file__).parent / "out"
PAGE = report.DOCS / "lookahead.md"
PARAMS = BeamParams(K=5, prune_threshold=0.05)
SENTENCE = (
    r"(The|A) (function|method|class) (returns|raises|takes) (a|an|the) "
    r"[a-z]{3,9}( [a-z]{2,9}){0,3}\."
)
POINT = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Longitude and Latitude Values",
    "type": "object",
    "required": ["latitude", "longitude"],
    "properties": {
        "latitude": {"type": "number", "minimum": -90, "maximum": 90},
        "longitude": {"type": "number", "minimum": -180, "maximum": 180},
    },
    "additionalProperties": False,
}
POINT_REGEX = (
    r'\{"latitude": -?[0-9]{1,2}(\.[0-9]{1,12})?, "longitude": -?[0-9]{1,3}(\.[0-9]{1,12})?\}'
)
PERSON = {  # json-schema.org's "a typical minimum" example, with its bounds
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Person",
    "type": "object",
    "required": ["firstName", "lastName", "age"],
    "properties": {
        "firstName": {"type": "string"},
        "lastName": {"type": "string"},
        "age": {"type": "integer", "minimum": 0},
    },
    "additionalProperties": False,
}
SETTING = {
    "type": "object",
    "required": ["kind", "names", "size"],
    "properties": {
        "kind": {"enum": ["file", "directory", "symbolic link"]},
        "names": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,8}$"}},
        "size": {"type": "object", "properties": {"bytes": {"type": "integer"}},
                 "required": ["bytes"], "additionalProperties": False},
    },
    "additionalProperties": False,
}  # fmt: skip
LONG = {
    "type": "object",
    "required": ["first", "last", "born"],
    "properties": {
        "first": {"type": "string", "minLength": 2, "maxLength": 40},
        "last": {"type": "string", "minLength": 2, "maxLength": 40},
        "born": {"type": "string", "format": "date"},
    },
    "additionalProperties": False,
}
CALLS = r"""
start: "return " call
call: NAME "(" (value (", " value)*)? ")"
value: call | NAME | NUMBER | "[" (value (", " value)*)? "]"
NAME: /[a-z_]{1,12}/
NUMBER: /[0-9]{1,3}/
"""
REMARK = r"""
start: clause "."
clause: "The " noun " " verb " " object | "If " condition ", " clause
condition: clause_inner | condition " and " clause_inner
clause_inner: "the " noun " is " WORD
object: "a " noun | "the " noun " (" remark ")" | remark
remark: "see " NAME | "a " noun " that " verb " " object
noun: "function" | "method" | "class" | "object" | "argument" | "value"
verb: "returns" | "raises" | "takes" | "is"
WORD: /[a-z]{2,9}/
NAME: /[a-z_]{2,12}\(\)/
"""


@dataclass
class Case:
    """A target: what follows a prompt, under a constraint."""

    constraint: Any
    prompt: bytes = b""
    max_bytes: int = 100
    approximation: Any = None  # an automaton to look ahead along, for what is none itself

    def ahead(self) -> dict[str, Any]:
        """Return settings of a look-ahead along this case's automaton."""
        return {} if self.approximation is None else {"constraint": self.approximation}


CASES = {
    "a sentence by regex": Case(ByteRegex(SENTENCE)),
    # In each the likelier beginning commits to bytes that the model finds unlikely later.
    "rare ending": Case(ByteRegex(r"(The [a-z]{2,8} qzxv qjkw|In [a-z]{2,8} the same way)\.")),
    "late digits": Case(ByteRegex(r"(The [a-z]{3,8} of 7351902846|On [a-z]{3,8} the side)\.")),
    "date": Case(
        ByteRegex(r"(19|20)[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"), b"Date: ", 12
    ),
    "wrong symbol": Case(ByteRegex(r"(def [a-z]{2,8}\(\) %%%% #|class [a-z]{2,8}\(self\)):")),
    "schema": Case(
        ByteJsonSchema(POINT, "python"), b"A point: ", 80, approximation=ByteRegex(POINT_REGEX)
    ),
    # Looked ahead along automata that are found for them.
    "schema by itself": Case(ByteJsonSchema(POINT, "python"), b"A point: ", 80),
    "person": Case(ByteJsonSchema(PERSON, "python"), b"A person: ", 100),
    "setting": Case(ByteJsonSchema(SETTING, "python"), b"The file: ", 100),
    "long strings": Case(ByteJsonSchema(LONG, "python"), b"A person: ", 100),
    "calls": Case(ByteGrammar(CALLS), b"    ", 60),
    "remark": Case(ByteGrammar(REMARK), b"", 120),
}


@dataclass
class Outcome:
    """Runs of one method on one case.

    Attributes:
        rows: language-model rows of a run, on average.
        fit_rows: rows that the look-ahead took to fit, once.
        log_mls: of each run; -inf for a dead one.
    """

    case: str
    method: str
    n: int
    rows: float
    fit_rows: int
    log_mls: list[float]
    seconds: float

    @property
    def alive(self) -> np.ndarray:
        """Estimates that are not zero."""
        values = np.array(self.log_mls)
        return values[values > -np.inf]

    @property
    def log_mean(self) -> float:
        """Log of the mean estimate."""
        v = np.array(self.log_mls)
        if v.max() == -np.inf:
            return -np.inf
        return float(v.max() + np.log(np.exp(v - v.max()).mean()))

    @property
    def mean(self) -> float:
        """Mean of log_ml over the runs that did not die."""
        return float(self.alive.mean()) if len(self.alive) else float("nan")

    @property
    def std(self) -> float:
        """Standard deviation of log_ml over the runs that did not die."""
        return float(self.alive.std(ddof=1)) if len(self.alive) > 1 else float("nan")


Make = Callable[[Any, Case], Awaitable[dict[str, Any]]]


class Bench:
    """One model; caches are emptied before each run."""

    def __init__(self, model: str = "tiny") -> None:
        self.bundled = model == "tiny"
        self.llm = ByteLLM(load_model(model), PARAMS)
        self.targets: dict[tuple[int, int], tuple[Any, Any]] = {}
        self.made: dict[tuple[str, str], dict[str, Any]] = {}

    def target(self, case: Case, llm: Any) -> tuple[Any, Any]:
        """Return the language model after the case's prompt, and the target; made once."""
        key = id(case), id(llm)
        if key not in self.targets:
            prompted = llm.with_prompt(case.prompt)
            self.targets[key] = prompted, prompted * case.constraint
        return self.targets[key]

    def empty(self, llm: Any) -> None:
        """Forget every row and beam."""
        llm.clear_cache()
        llm.model.store.clear()
        llm.model.engine.clear_cache()

    def rows(self) -> int:
        """Rows computed so far."""
        return int(self.llm.model.engine.counts.rows)

    async def runs(
        self,
        name: str,
        case: Case,
        method: str,
        make: Make,
        n: int,
        repeats: int,
        *,
        llm: Any = None,
        first: int = 0,
        **options: Any,
    ) -> Outcome:
        """`repeats` runs of n particles."""
        llm, target = self.target(case, llm or self.llm)
        self.empty(llm)
        before = self.rows()
        made = self.made.get((name, method))
        if made is None:  # fitted once, for every number of particles
            made = await make(target, case)
            self.made[name, method] = made
        options = {**made, **options}
        fit = self.rows() - before
        log_mls, used, started = [], [], time.process_time()
        ess = options.pop("ess_threshold", 0.5)
        for seed in range(first, first + repeats):
            self.empty(llm)
            before = self.rows()
            beam_seed = seed if llm.params.unbiased else None
            try:
                result = await smc(
                    target, n, ess, case.max_bytes, seed=seed, beam_seed=beam_seed,
                    progress=False, **options,
                )  # fmt: skip
                log_mls.append(result.log_ml)
            except AllParticlesDeadError:
                log_mls.append(-np.inf)
            used.append(self.rows() - before)
        seconds = (time.process_time() - started) / repeats
        return Outcome(name, method, n, float(np.mean(used)), fit, log_mls, seconds)


async def plain(target: Any, case: Case) -> dict[str, Any]:
    """No look-ahead: draws from the target's own rows."""
    return {}


def ngram(order: int, role: str = "both", **settings: Any) -> Make:
    """Return a look-ahead with an n-gram of the model's own texts, fitted before the runs."""

    async def make(target: Any, case: Case) -> dict[str, Any]:
        ahead = Lookahead(order, **case.ahead(), **settings)
        await ahead.fit(target, case.max_bytes)
        roles = ("proposal", "twist") if role == "both" else (role,)
        return dict.fromkeys(roles, ahead)

    return make


def pilot(rounds: int, particles: int = 32, order: int = 4, role: str = "both") -> Make:
    """Return a look-ahead learned from pilot runs."""

    async def make(target: Any, case: Case) -> dict[str, Any]:
        ahead = await Lookahead.from_pilot(
            target, particles, case.max_bytes, rounds=rounds, order=order, seed=10_000,
            **case.ahead(),
        )  # fmt: skip
        await ahead.fit(target, case.max_bytes)
        roles = ("proposal", "twist") if role == "both" else (role,)
        return dict.fromkeys(roles, ahead)

    return make


METHODS: dict[str, Make] = {
    "plain": plain,
    "uniform, both": ngram(0),
    "bigram, twist only": ngram(2, "twist"),
    "bigram, proposal only": ngram(2, "proposal"),
    "bigram, both": ngram(2),
    "4-gram, both": ngram(4),
    "pilot 1 x 32, both": pilot(1),
    "pilot 4 x 32, both": pilot(4),
    "pilot 4 x 32, proposal only": pilot(4, role="proposal"),
}
BRIEF = ("plain", "bigram, both", "4-gram, both", "pilot 4 x 32, both")


async def table(bench: Bench, repeats: int, cases: Sequence[str]) -> AsyncIterator[Outcome]:
    """Measure every method on a sentence by regex, the main ones on the others and on a real
    model."""
    for name in cases:
        case = CASES[name]
        whole = bench.bundled and case is CASES["a sentence by regex"]
        for method in METHODS if whole else BRIEF:
            sizes = (8, 32)
            if method == "plain" and bench.bundled:
                sizes = (8, 32, 128, 512) if whole else (8, 32, 128)
            for n in sizes:
                yield await bench.runs(name, case, method, METHODS[method], n, repeats)


async def anatomy(bench: Bench, repeats: int) -> AsyncIterator[Outcome]:
    """Where the variance of plain SMC on a sentence comes from: one thing changed a row."""
    regex = CASES["a sentence by regex"]
    accept = regex.constraint.spawn()

    def done(text: bytes) -> bool:
        return bool(accept.log_complete(accept.states([text]))[0] == 0.0)

    fixed = Case(ByteRegex(SENTENCE[len("(The|A) (function|method|class) ") :]), b"The function ")
    tail = Case(ByteRegex(r"[a-z]{3,9}( [a-z]{2,9}){0,3}\."), b"The function returns a ")
    head = Case(ByteRegex(r"(The|A) (function|method|class) (returns|raises|takes) (a|an|the) "))
    llm = bench.llm.llm
    changes: list[tuple[str, Case, dict[str, Any]]] = [
        ("as it is", regex, {}),
        ("no end: stop at the full stop", regex, {"terminate_when": done}),
        ("first two words fixed by the prompt", fixed, {}),
        ("all literals fixed by the prompt", tail, {}),
        ("... and no end", tail, {"terminate_when": done_tail}),
        ("only the literals (stop after them)", head, {"terminate_when": literal_done}),
        ("importance sampling (ess 0)", regex, {"ess_threshold": 0.0}),
        ("resampling always (ess 1)", regex, {"ess_threshold": 1.0}),
        ("multinomial resampling", regex, {"resampling_method": "multinomial"}),
        ("K = 20, no threshold", regex, {"llm": ByteLLM(llm, BeamParams(K=20))}),
        (
            "unbiased beam, K = 5",
            regex,
            {"llm": ByteLLM(llm, BeamParams(K=5, prune_threshold=0.05, prune="unbiased"))},
        ),
    ]
    for what, case, options in changes:
        yield await bench.runs("anatomy", case, what, plain, 16, repeats, **options)
    for what, make in (("pilot, as it is", pilot(4)), ("pilot, ess 0", pilot(4))):
        ess = {"ess_threshold": 0.0} if "0" in what.split()[-1] else {}
        yield await bench.runs("anatomy", regex, what, make, 16, repeats, **ess)


def done_tail(text: bytes) -> bool:
    """Whether the tail of the regex is complete."""
    return text.endswith(b".")


def literal_done(text: bytes) -> bool:
    """Whether the literals of the regex have been read."""
    return text.count(b" ") == 4


def line(o: Outcome) -> str:
    """One outcome, for the terminal."""
    dead = len(o.log_mls) - len(o.alive)
    return (
        f"{o.case:18} {o.method:36} N={o.n:4d} rows {o.rows:7.0f} (+{o.fit_rows}) "
        f"log mean {o.log_mean:8.3f} mean {o.mean:8.3f} std {o.std:6.3f} dead {dead} "
        f"{o.seconds:.2f} s"
    )


def markdown(outcomes: list[Outcome]) -> Iterator[str]:
    """Return the tables of the page."""
    for case in dict.fromkeys(o.case for o in outcomes):
        mine = [o for o in outcomes if o.case == case]
        title = "anatomy of plain SMC on a sentence by regex" if case == "anatomy" else case
        yield f"### {title}\n"
        yield "| method | particles | rows a run | rows to fit | log of mean | mean | std | dead |"
        yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
        for o in mine:
            dead = len(o.log_mls) - len(o.alive)
            yield (
                f"| {o.method} | {o.n} | {o.rows:.0f} | {o.fit_rows or ''} | {o.log_mean:.2f} | "
                f"{o.mean:.2f} | {o.std:.2f} | {dead or ''} |"
            )
        yield ""


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lookahead", description=__doc__)
    parser.add_argument("--repeats", type=int, default=10, help="runs a row (%(default)s)")
    parser.add_argument("--model", default="tiny", help="by name (%(default)s)")
    parser.add_argument(
        "--only", default="", help=f"parts, by commas, of {', '.join(['anatomy', *CASES])}"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="where files go (%(default)s)")
    parser.add_argument("--docs", action="store_true", help="update docs/lookahead.md too")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)

    usual = ["anatomy", *CASES] if args.model == "tiny" else ["a sentence by regex", "date"]
    parts = args.only.split(",") if args.only else usual
    if unknown := set(parts) - {"anatomy", *CASES}:
        parser.error(f"--only names no such part: {', '.join(sorted(unknown))}")

    async def everything() -> None:
        bench, out = Bench(args.model), []
        cases = [p for p in parts if p != "anatomy"]
        for part in ([anatomy(bench, args.repeats)] if "anatomy" in parts else []) + [
            table(bench, args.repeats, cases)
        ]:
            async for outcome in part:
                print(line(outcome), flush=True)
                out.append(outcome)
                save(out, args)

    asyncio.run(everything())


def save(outcomes: list[Outcome], args: argparse.Namespace) -> None:
    """Write what has been measured so far, as JSON lines and into the page."""
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    head = json.dumps({"about": report.machine(args.model), "repeats": args.repeats})
    rows = [json.dumps(asdict(o) | {"log_mls": list(map(str, o.log_mls))}) for o in outcomes]
    (out / "lookahead.jsonl").write_text("\n".join([head, *rows]) + "\n")
    if args.docs:
        table = "\n".join(markdown(outcomes)).rstrip("\n")
        report.put(PAGE, table, "" if args.model == "tiny" else args.model)


if __name__ == "__main__":
    main()
