"""SMC over bytes against genlm-control 0.4: `python -m benchmarks.smc [--quick] [--docs]`.

Both sides run over one model object (the bundled one, or that of `--model`), with the same beam
parameters, resampling and threshold, in one process, one right after the other. genlm-control
is given some seconds a case; after that its particles are stopped at the end of the byte they
read, and this package is measured over as many bytes. Every run starts with empty caches; time
counts from when the prompt has been read.

Part e is what a program waits for that makes a potential, sets its prompt and samples once, to
the end: time counts from the constructor, with no trie made yet on either side.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from genlm.bytes import BeamParams as PeerParams
from genlm.control import EOS, SMC, BoolFSA, JsonSchema
from genlm.control import ByteLLM as PeerLLM
from genlm.control.sampler.token import DirectTokenSampler
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks import measure, report
from benchmarks.measure import Cost, Record
from genlm_bytes_smc.constraints import ByteJsonSchema, ByteRegex
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import smc_steps

OUT = Path(__file__).parent / "out"
PAGE = report.DOCS / "performance_smc.md"
ESS, METHOD, MAX_BYTES = 0.5, "systematic", 40
REGEXES = {
    "date": ("Date: ", r"(19|20)[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"),
    "e-mail": ("E-mail: ", r"[a-z]+(\.[a-z]+)?@[a-z]+\.(com|org|net)"),
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
GOALS = {8: 20.0, 32: 40.0, 128: 50.0}
HEADS = ("", "this package", "genlm-control", "ratio", "(CPU time)", "goal")
HEADS += ("rows a particle-byte", "forwards a step", "steps", "log ml")
TITLES = {
    "a": "particle-bytes a second, constrained by a regular expression",
    "b": "a byte step of this package against the number of particles (date)",
    "c": "particle-bytes a second, constrained by a JSON schema",
    "d": "memory after a run of this package (date)",
    "e": "particle-bytes a second of one whole run (date), from the constructor on",
}


@dataclass(frozen=True)
class Sizes:
    """How much to measure."""

    peer_seconds: float = 5.0  # of genlm-control, a case
    particles: tuple[int, ...] = (8, 32, 128)
    growing: tuple[int, ...] = (1, 8, 32, 128, 512, 1024)
    schema_particles: int = 8
    whole: tuple[int, ...] = (8, 32, 128)  # particles of part e
    repeats: int = 3  # of this package; the median counts


FULL = Sizes()
QUICK = Sizes(0.5, (8, 32), (8, 128, 1024), 2, (8,), 1)
REAL = Sizes(30.0, (8, 32), (1, 8, 32, 128), 8, (8,), 1)  # forwards take all the time


@dataclass
class Run:
    """One run of one side.

    Attributes:
        cost: of a particle-byte; forwards are those of a step.
        wall, cpu: seconds of a byte step.
        steps: byte steps made.
        lanes: distinct texts a step, on average (ours only).
        log_ml: log of the mean weight, nats; NaN for a run that was cut short.
    """

    cost: Cost
    wall: float
    cpu: float
    steps: int
    lanes: float
    log_ml: float

    @classmethod
    def of(
        cls, clock: Any, read: int, steps: int, rows: int, forwards: int, lanes: float, ml: float
    ) -> Run:
        """From the totals of a run that read `read` particle-bytes."""
        n, s = max(read, 1), max(steps, 1)
        cost = Cost(clock.wall / n, clock.cpu / n, rows / n, forwards / s)
        return cls(cost, clock.wall / s, clock.cpu / s, steps, lanes, ml)


class _Timed(DirectTokenSampler):  # type: ignore[misc]
    """genlm-control's own sampler, which ends every particle once its time is up."""

    def __init__(self, target: Any, seconds: float) -> None:
        super().__init__(target)
        self.deadline = time.perf_counter() + seconds
        self.read, self.steps, self.cut = 0, 0, False

    async def sample(self, context: Any, *args: Any, **kwargs: Any) -> Any:
        """As the base class; (EOS, -inf) when it is too late."""
        between = 0 < self.steps <= len(context)  # not in the middle of a step
        if between and (self.cut or time.perf_counter() > self.deadline):
            self.cut = True
            return EOS, float("-inf"), 0.0
        out = await super().sample(context, *args, **kwargs)
        self.read += 1
        self.steps = max(self.steps, len(context) + 1)
        return out


class Bench:
    """The two sides over one model."""

    def __init__(self, model: str = "tiny") -> None:
        self.llm, _ = measure._peer_model(model)
        self.goals = GOALS if model == "tiny" else {}
        self.counts = {"forwards": 0, "rows": 0}
        del self.llm.model.forward  # the counter there, which takes other callers badly
        self.params = PeerParams(
            K=measure.K,
            prune_threshold=measure.TINY_THRESHOLD,
            eos_byte_strings=[self.llm.tokenizer.eos_token.encode()],
        )

    def _count(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        self.counts["forwards"] += 1
        self.counts["rows"] += int(ids.shape[0])

    async def ours(
        self,
        prompt: str,
        constraint: Any,
        n: int,
        steps: int | None,
        seed: int = 0,
        whole: bool = False,
    ) -> Run:
        """Run this package over at most `steps` bytes (None: to the end); `whole`: see part e."""
        llm = ByteLLM(self.llm, self.params, prompt=prompt.encode())
        engine = llm.model.engine
        llm.model.store.clear()
        engine.clear_cache()
        if whole:
            engine.__dict__.pop("_byte_models")  # with its trie, rows and beams
            llm = None  # type: ignore[assignment]
        else:
            await llm.lanes(1)  # reads the prompt
        read, made, active, state = 0, 0, 0, None
        with measure._Clock() as clock:
            if whole:
                llm = ByteLLM(self.llm, self.params, prompt=prompt.encode())
            run = smc_steps(
                llm * constraint.spawn(), n, ESS, MAX_BYTES, resampling_method=METHOD, seed=seed
            )
            async for state in run:
                if state.history:
                    made += 1
                    read += active
                active = int(state.particles.active.sum())
                if made == steps:
                    break
            await run.aclose()
        assert state is not None
        rows, forwards = (sum(getattr(i, x) for i in state.history) for x in ("rows", "forwards"))
        lanes = float(np.mean([i.lanes for i in state.history]))
        ml = state.history[-1].log_ml if not active else float("nan")
        return Run.of(clock, read, made, rows, forwards, lanes, ml)

    async def peer(
        self, prompt: str, constraint: Any, n: int, seconds: float, whole: bool = False
    ) -> Run:
        """genlm-control for about `seconds`; `whole`: see part e."""
        self.llm.clear_cache()
        llm = PeerLLM(self.llm, self.params)
        llm.set_prompt_from_str(prompt)
        if not whole:  # else each particle makes a trie of its own, all at once
            await llm._get_or_create_beam_for_context([])
        before = dict(self.counts)
        # Only while it runs: this package leaves a model that is watched to its own modules.
        counter = self.llm.model.register_forward_pre_hook(self._count, with_kwargs=True)
        sampler = _Timed(llm * constraint.coerce(llm, f=b"".join), seconds)
        smc = SMC(sampler)
        np.random.seed(0)  # what genlm-control draws with
        torch.manual_seed(0)
        with measure._Clock() as clock:  # collecting garbage, before, takes its time
            sampler.deadline = time.perf_counter() + seconds
            got = await smc(n, ESS, MAX_BYTES + 1, resampling_method=METHOD)
        await llm.cleanup()
        counter.remove()
        rows, forwards = (self.counts[x] - before[x] for x in ("rows", "forwards"))
        ml = float("nan") if sampler.cut else float(got.log_ml)
        return Run.of(clock, sampler.read, sampler.steps, rows, forwards, float("nan"), ml)

    async def median(
        self,
        prompt: str,
        constraint: Any,
        n: int,
        steps: int | None,
        repeats: int,
        whole: bool = False,
    ) -> Run:
        """Ours with median wall time, over seeds."""
        seeds = range(repeats)
        runs = [await self.ours(prompt, constraint, n, steps, s, whole) for s in seeds]
        return sorted(runs, key=lambda r: r.cost.wall)[len(runs) // 2]

    async def versus(
        self,
        case: tuple[str, str],
        prompt: str,
        pair: tuple[Any, Any],
        n: int,
        sizes: Sizes,
        whole: bool = False,
    ) -> Record:
        """Both sides over the same number of bytes; `whole`: to the end, see part e."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # genlm-bytes' sparse tensors are "in beta"
            seconds = 600.0 if whole else sizes.peer_seconds
            theirs = await self.peer(prompt, pair[1], n, seconds, whole)
        mine = await self.median(prompt, pair[0], n, theirs.steps, sizes.repeats, whole)
        record = Record(*case, **measure._versus(mine.cost, theirs.cost), threads=_threads())
        record.unit = "particle-bytes/s"
        record.work |= {"particles": n, "ours_steps": mine.steps, "peer_steps": theirs.steps}
        record.work |= {"ours_log_ml": mine.log_ml, "peer_log_ml": theirs.log_ml}
        record.work |= {
            "ours_cpu_bytes_s": 1 / mine.cost.cpu,
            "peer_cpu_bytes_s": 1 / theirs.cost.cpu,
        }
        return record


def _threads() -> str:
    return str(torch.get_num_threads())


async def regexes(bench: Bench, sizes: Sizes) -> list[Record]:
    """Part a."""
    out = []
    for name, (prompt, pattern) in REGEXES.items():
        pair = ByteRegex(pattern), BoolFSA.from_regex(pattern)
        await bench.ours(prompt, pair[0], 2, 4)  # compile
        for n in sizes.particles:
            record = await bench.versus(("a", f"{name}, N={n}"), prompt, pair, n, sizes)
            record.goal = bench.goals.get(n)
            out.append(record)
    return out


async def growth(bench: Bench, sizes: Sizes) -> list[Record]:
    """Parts b and d."""
    prompt, pattern = REGEXES["date"]
    constraint, steps, memory = ByteRegex(pattern), [], []
    engine = ByteLLM(bench.llm, bench.params).model.engine
    await bench.ours(prompt, constraint, 2, 4)
    for n in sizes.growing:
        gc.collect()
        before = measure._resident()
        run = await bench.median(prompt, constraint, n, None, sizes.repeats)
        work = {"cpu_ms": 1e3 * run.cpu, "lanes": run.lanes, "ours_rows": run.cost.rows or 0.0}
        work |= {"ours_forwards": run.cost.forwards or 0.0, "particles": n}
        work |= {"ours_steps": run.steps, "ours_log_ml": run.log_ml}
        steps.append(Record("b", f"N={n}", "ms", 1e3 * run.wall, threads=_threads(), work=work))
        held = engine.memory()["bytes"] if hasattr(engine, "memory") else 0
        grown = max(0, measure._resident() - before)
        memory.append(
            Record(
                "d", f"keys and values, N={n}", "kB", held / 1e3, threads=_threads(),
                work={"particles": n, "process_grew_kb": grown / 1e3},
            )
        )  # fmt: skip
    first = steps[0]
    for record in steps[1:]:
        record.ratio = record.ours / first.ours
        record.cpu_ratio = record.work["cpu_ms"] / first.work["cpu_ms"]
    return steps + memory


async def schema(bench: Bench, sizes: Sizes) -> list[Record]:
    """Part c."""
    pair = ByteJsonSchema(SCHEMA, "python"), JsonSchema(SCHEMA)
    await bench.ours("JSON: ", pair[0], 2, 4)
    n = sizes.schema_particles
    return [await bench.versus(("c", f"name and age, N={n}"), "JSON: ", pair, n, sizes)]


async def whole_runs(bench: Bench, sizes: Sizes) -> list[Record]:
    """Part e."""
    prompt, pattern = REGEXES["date"]
    pair, out = (ByteRegex(pattern), BoolFSA.from_regex(pattern)), []
    await bench.ours(prompt, pair[0], 2, 4)  # compile
    for n in sizes.whole:
        record = await bench.versus(
            ("e", f"whole run, date, N={n}"), prompt, pair, n, sizes, whole=True
        )
        record.goal = bench.goals.get(n)
        out.append(record)
    return out


async def everything(sizes: Sizes, only: str, model: str = "tiny") -> list[Record]:
    """All parts that are asked for."""
    bench, out = Bench(model), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        await bench.peer("", BoolFSA.from_regex("[a-z]+"), 1, 0.0)  # first uses of libraries
    for parts, measured in (("a", regexes), ("bd", growth), ("c", schema), ("e", whole_runs)):
        if set(parts) & set(only):
            out += await measured(bench, sizes)
    return sorted((r for r in out if r.part in only), key=lambda r: r.part)


# -- what is shown -----------------------------------------------------------------------------


def cells(r: Record) -> list[str]:
    """Return a record's line of the table."""

    def two(key: str) -> str:
        both = [r.work[f"{side}_{key}"] for side in ("ours", "peer") if f"{side}_{key}" in r.work]
        return " / ".join("cut" if x != x else f"{x:.3g}" for x in both)

    cpu = f" ({report._number(r.work['cpu_ms'])} CPU)" if "cpu_ms" in r.work else ""
    texts = f", {r.work['lanes']:.1f} texts" if "lanes" in r.work else ""
    return [
        r.case + texts,
        f"{report._number(r.ours)} {r.unit}{cpu}",
        "" if r.peer is None else f"{report._number(r.peer)} {r.unit}",
        "" if r.ratio is None else f"{report._number(r.ratio)}x",
        "" if r.cpu_ratio is None else f"{report._number(r.cpu_ratio)}x",
        "" if r.goal is None else f">= {r.goal:g}x",
        *(two(key) for key in ("rows", "forwards", "steps", "log_ml")),
    ]


def describe(about: dict[str, str]) -> str:
    """Where and with what."""
    return f"{report.describe(about)}, genlm-control {about['genlm-control']}"


def show(records: Sequence[Record], about: dict[str, str]) -> None:
    """Print everything."""
    table = Table(title="genlm-bytes-smc against genlm-control", title_justify="left")
    for i, head in enumerate(HEADS):
        table.add_column(head, justify="left" if i == 0 else "right")
    part = ""
    for record in records:
        if record.part != part:
            part = record.part
            table.add_section()
            table.add_row(f"[bold]{part}  {TITLES[part]}[/]")
        line = cells(record)
        if record.met is not None:
            line[3] = f"[{'green' if record.met else 'red'}]{line[3]}[/]"
        table.add_row(*line)
    console = Console(width=max(Console().width, 190))
    console.print(table)
    console.print(describe(about))


def markdown(records: Sequence[Record], about: dict[str, str]) -> str:
    """Return the table as Markdown."""
    lines = []
    for part, title in TITLES.items():
        rows = [cells(r) for r in records if r.part == part]
        if not rows:
            continue
        used = [i for i in range(len(HEADS)) if i == 0 or any(row[i] for row in rows)]
        lines += [f"**{part}. {title[0].upper()}{title[1:]}**", ""]
        lines.append("| " + " | ".join(HEADS[i] for i in used) + " |")
        lines.append("|" + "|".join("---" if i == 0 else "--:" for i in used) + "|")
        lines += ["| " + " | ".join(row[i] for i in used) + " |" for row in rows]
        lines.append("")
    return "\n".join([*lines, describe(about) + "."])


def figure(records: Sequence[Record]) -> Figure:
    """Ratios with their goals, and the time of a step against N."""
    bars = [r for r in records if r.peer is not None]
    line = [r for r in records if r.part == "b"]
    fig = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = fig.subplots(1, 2)
    for i, r in enumerate(bars):
        color = report.ORANGE if r.met is False else report.GREEN
        left.barh(i, r.ratio, color=color, alpha=0.75, height=0.7)
        left.text((r.ratio or 1) * 1.06, i, f"{report._number(r.ratio or 0)}x", va="center")
        if r.goal is not None:
            left.plot([r.goal, r.goal], [i - 0.42, i + 0.42], color=report.INK, lw=1.6)
    if bars:
        left.set_yticks(range(len(bars)), [r.case for r in bars])
        left.invert_yaxis()
        left.set_xscale("log")
        left.set_xlim(1, 4 * max(max(r.ratio or 1, r.goal or 1) for r in bars))
    left.set_xlabel("times faster than genlm-control, wall time (black: goal)")
    if line:
        n = [r.work["particles"] for r in line]
        right.plot(n, [r.ours for r in line], "o-", color=report.PURPLE, label="wall")
        right.plot(n, [r.work["cpu_ms"] for r in line], "o--", color=report.FAINT, label="CPU")
        right.set_xscale("log", base=2)
        right.set_ylim(0)
        right.legend(frameon=False)
    right.set(xlabel="particles", ylabel="ms a byte step (date)")
    for ax in (left, right):
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    return fig


def save(records: Sequence[Record], stem: Path) -> None:
    """Draw the figure as PNG and SVG."""
    style = {"svg.hashsalt": "genlm-bytes-smc", "font.size": 9, "text.color": report.INK}
    with mpl.rc_context(style):
        fig = figure(records)
        stem.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(stem.with_suffix(".png"), dpi=150)
        fig.savefig(stem.with_suffix(".svg"), metadata={"Date": None})


def _line(record: Record) -> str:
    plain = json.loads(record.to_json())
    plain["work"] = {k: None if v != v else v for k, v in plain["work"].items()}  # NaN
    return json.dumps(plain)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smc", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: under a minute")
    parser.add_argument("--model", default="tiny", help="by name (%(default)s)")
    parser.add_argument("--only", default="abcde", help="parts, as in ac (default: all)")
    parser.add_argument("--out", type=Path, default=OUT, help="where files go (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (%(default)s)")
    parser.add_argument("--docs", action="store_true", help="update docs/performance_smc.md too")
    args = parser.parse_args(argv)
    only = args.only.replace(",", "")
    sizes = QUICK if args.quick else FULL if args.model == "tiny" else REAL
    if not only or set(only) - set(TITLES):
        parser.error(f"--only takes letters of {''.join(TITLES)}")
    torch.set_num_threads(args.threads)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # genlm-bytes leaves tasks behind
    records = asyncio.run(everything(sizes, only, args.model))
    about = report.machine(args.model) | {"genlm-control": version("genlm-control")}
    show(records, about)
    head = json.dumps({"about": about, "threads": args.threads, "quick": args.quick})
    save(records, args.out / "smc")
    (args.out / "smc.jsonl").write_text("\n".join([head, *map(_line, records)]) + "\n")
    if args.docs:
        report.put(PAGE, markdown(records, about), "" if args.model == "tiny" else args.model)
        if args.model == "tiny":
            save(records, report.DOCS / "images" / "performance_smc")


if __name__ == "__main__":
    main()
