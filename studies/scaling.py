"""The cost of a byte as particles, candidates, context and vocabulary grow."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import numpy as np

from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.experiments.experiment import (
    Config,
    Experiment,
    Outcome,
    Report,
    Row,
    Section,
    Table,
    figure,
    label,
    legend,
    style,
)
from genlm_bytes_smc.experiments.models import fresh_engine, is_bundled
from genlm_bytes_smc.lm.engine import RowEngine
from genlm_bytes_smc.lm.rows import RowTransform
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import AllParticlesDeadError, SMCState, smc
from genlm_bytes_smc.smc.many import run_blocking

from .bigram_lm import BigramEngine
from .texts import held_out

PARTICLES, K, THRESHOLD, CONTEXT = 16, 5, 0.001, 32
AXES = {
    "particles": "particles",
    "K": "K",
    "context": "bytes of context",
    "vocabulary": "tokens of the vocabulary",
}
TEMPERATURE = 1.5  # so that particles soon write texts of their own
_PROMPT_KINDS = ("docstring-stdlib", "pydoc", "sentences")


REAL_CONTEXTS = (32, 128, 512, 1024, 2048)


def jobs(quick: bool, model: Config) -> list[Config]:
    """List a job for each value of an axis and seed; the others keep their usual values."""
    values: dict[str, tuple[int, ...]] = {
        "particles": (1, 8, 64) if quick else (1, 2, 4, 8, 16, 32, 64, 128, 256),
        "K": (1, 4, 16) if quick else (1, 2, 4, 8, 16, 32, 64),
        "context": (32, 512) if quick else (32, 128, 512, 1024, 2048, 4096),
        "vocabulary": (512, 50_257) if quick else (512, 1024, 4096, 8192, 16_384, 32_768, 50_257),
    }
    if not is_bundled(model):  # rows of other models are dear, and the vocabulary is theirs
        values = {"particles": values["particles"], "K": values["K"], "context": REAL_CONTEXTS}
    steps, seeds = (12, 1) if quick else (32, 3 if is_bundled(model) else 1)
    usual = {"particles": PARTICLES, "K": K, "context": CONTEXT, "steps": steps}
    return [
        {"axis": axis, **usual, axis: value, "seed": seed}
        | ({} if axis == "vocabulary" else {"model": model})
        for axis, its in values.items()
        for value in its
        for seed in range(seeds)
    ]


def run(config: Config) -> Outcome:
    """Write free text in each particle, and measure what each byte step took."""
    engine: RowEngine
    if "vocabulary" in config:
        engine = BigramEngine(config["vocabulary"])
    else:
        engine = fresh_engine(config["model"])
    params = BeamParams(K=config["K"], prune_threshold=THRESHOLD)
    transform = RowTransform(temperature=TEMPERATURE)
    llm = ByteLLM(engine, params, prompt=_prompt(config), transform=transform)
    # Printable text that does not end: every step has all particles, and every particle a text.
    target = llm * ByteRegex(rf"[\n -~]{{{config['steps']}}}")
    wall = time.perf_counter()
    run_blocking(llm.lanes(1))
    prompt_seconds = time.perf_counter() - wall
    ticks: list[float] = []

    def tick(state: SMCState) -> None:
        ticks.append(time.process_time())

    cpu = time.process_time()
    options: dict[str, Any] = {"seed": config["seed"], "progress": False, "on_step": tick}
    try:
        done = run_blocking(smc(target, config["particles"], 0.0, config["steps"], **options))
    except AllParticlesDeadError as error:  # at the limit, in the middle of a token
        done = error.result
    history = done.history[: config["steps"]]
    result = {
        "rows_a_step": float(np.mean([i.rows for i in history])),
        "forwards_a_step": float(np.mean([i.forwards for i in history])),
        "texts_a_step": float(np.mean([i.lanes for i in history])),
    }
    times = {
        "step_ms": 1e3 * float(np.median([i.seconds for i in history])),
        "step_cpu_ms": 1e3 * float(np.median(np.diff(ticks))),
        "prompt_seconds": prompt_seconds,
        "cpu": time.process_time() - cpu,
    }
    return Outcome(result, times)


def _prompt(config: Config) -> bytes:
    text = "\n".join(t.decode() for kind in _PROMPT_KINDS for t in held_out()[kind])
    return text[: config["context"]].encode("ascii", "replace")


# -- report ------------------------------------------------------------------------------------


def summarise(rows: list[Row]) -> list[dict[str, Any]]:
    """Return one entry a value of an axis: medians over seeds."""
    found: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        found[row["config"]["axis"], row["config"][row["config"]["axis"]]].append(row)
    out = []
    for (axis, value), mine in found.items():
        times = {
            name: float(np.median([r["run"]["times"][name] for r in mine]))
            for name in ("step_ms", "step_cpu_ms", "prompt_seconds")
        }
        counts = {
            name: float(np.mean([r["result"][name] for r in mine]))
            for name in ("rows_a_step", "forwards_a_step", "texts_a_step")
        }
        particles = mine[0]["config"]["particles"]
        out.append({"axis": axis, "value": value, "particles": particles, **times, **counts})
    return out


def report(rows: list[Row]) -> Report:
    """Return figures and words."""
    entries = summarise(rows)
    findings = []
    for axis, name in AXES.items():
        mine = [e for e in entries if e["axis"] == axis]
        if not mine:  # a real model has one vocabulary
            continue
        first, last = mine[0], mine[-1]
        findings.append(
            f"From {first['value']:,} to {last['value']:,} {name} a byte step goes from "
            f"{first['step_ms']:.1f} to {last['step_ms']:.1f} ms "
            f"({last['value'] / first['value']:,.0f} times as many, "
            f"{last['step_ms'] / first['step_ms']:.1f} times the time; LM rows a step "
            f"{first['rows_a_step']:.1f} to {last['rows_a_step']:.1f})."
        )
    return Report(
        "What a byte costs",
        "How does the time of a byte step grow with the number of particles, the width of the "
        "beam, the length of the context and the size of the vocabulary?",
        findings,
        [_figure(entries), _table(entries)],
        [
            f"Particles write printable text after a prompt: {PARTICLES} of them, K={K}, threshold "
            f"{THRESHOLD:g}, {CONTEXT} bytes of prompt, but for what the axis "
            f"changes. Rows are at temperature {TEMPERATURE:g}, so that texts differ. The "
            "vocabulary is that of GPT-2, cut after so many merges, with a bigram model whose rows "
            "cost next to nothing: what is left is the beam's own work.",
            "Each number is the median over the byte steps of a run and over seeds, one job at a "
            "time. Times depend on the machine and on what else it does; counts do not.",
        ],
    )


def _figure(entries: list[dict[str, Any]]) -> Section:
    drawn, axes = figure(2, 2)
    for axis, (key, name) in zip(axes, AXES.items(), strict=True):
        mine = [e for e in entries if e["axis"] == key]
        axis.set_visible(bool(mine))
        if not mine:
            continue
        x = [e["value"] for e in mine]
        axis.plot(x, [e["step_ms"] for e in mine], label="ms a byte step", **style(0))
        rows = [max(e["rows_a_step"], 0.1) for e in mine]
        axis.plot(x, rows, label="LM rows a step", **style(5, linestyle="--"))
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(x, [f"{v:,}" for v in x], rotation=35 if max(x) > 3000 else 0)
        axis.minorticks_off()
        label(axis, name, "", "ms, or rows")
    legend(axes[0])
    return Section(
        "A byte step",
        [
            "Each panel changes one thing. A line less steep than the diagonal means that the "
            "cost of one more is less than that of the first: particles with equal bytes share a "
            "beam, all contexts of a step go through the model in one forward, and a context "
            "that is there already (the prompt) is not computed again.",
        ],
        drawn,
        name="scaling",
    )


def _table(entries: list[dict[str, Any]]) -> Section:
    heads = ["", "ms a byte step", "CPU ms", "µs a particle and byte", "distinct texts a step"]
    heads += ["LM rows a step", "forwards a step", "prompt, s"]
    lines = [
        [
            f"{e['value']:,} {AXES[e['axis']]}",
            f"{e['step_ms']:.2f}",
            f"{e['step_cpu_ms']:.2f}",
            f"{1e3 * e['step_ms'] / e['particles']:,.0f}",
            f"{e['texts_a_step']:.1f}",
            f"{e['rows_a_step']:.1f}",
            f"{e['forwards_a_step']:.2f}",
            f"{e['prompt_seconds']:.3f}",
        ]
        for e in entries
    ]
    return Section("In numbers", [], table=Table(heads, lines))


EXPERIMENT = Experiment(
    "scaling",
    "Time per byte",
    "against particles, K, context length and vocabulary size",
    jobs,
    run,
    report,
    timed=True,
)
