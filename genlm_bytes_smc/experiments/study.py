"""The same study on the user's model, prompt and constraint, and what to set.

Three things are measured: how wide a beam must be for the texts that the target admits
(`calibrate`); the target's log marginal likelihood, by enumeration if its texts are few, else
by many pooled runs of many particles; and how far repeated small runs of each method are from
it. `recommend` picks the cheapest setting that meets an error in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from genlm_bytes_smc.beam.model import byte_model
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.beam.prompt import Prompt
from genlm_bytes_smc.calls import run_sync
from genlm_bytes_smc.constraints import (
    ByteConstraint,
    ByteDFA,
    ByteGrammar,
    ByteJsonSchema,
    ByteRegex,
)
from genlm_bytes_smc.experiments.advice import Advice, recommend, report
from genlm_bytes_smc.experiments.calibration import CalibrationError, Point, calibrate
from genlm_bytes_smc.experiments.experiment import Config, Experiment, Outcome
from genlm_bytes_smc.experiments.models import (
    TINY,
    WIDE,
    beam,
    enumerate_texts,
    fresh_engine,
    one_run,
)
from genlm_bytes_smc.experiments.runner import Done, run_experiment
from genlm_bytes_smc.lookahead import Lookahead
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import AllParticlesDeadError, smc

FEW_TEXTS = 400  # as many can be enumerated
KINDS: dict[str, Callable[[str], ByteConstraint]] = {
    "regex": ByteRegex,
    "grammar": ByteGrammar,
    "json-schema": ByteJsonSchema,
}
_WIDE = {"K": 16, "threshold": 0.0005, "prune": "topk"}  # of pilot and pooled runs
_GRIDS: Config = {"widths": (1, 2, 3, 5, 8, 16), "thresholds": (0.01, 0.001, 0.0)}


def run_study(
    prompt: str,
    constraint: tuple[str, str],
    out: str | Path,
    *,
    model: Config | None = None,
    max_bytes: int = 100,
    error: float = 0.5,
    tolerance: float = 0.01,
    quick: bool = False,
    seed: int = 0,
    **options: Any,
) -> tuple[Done, Advice]:
    """Measure the methods on one target and recommend settings.

    Args:
        prompt: what texts come after.
        constraint: ("regex" | "grammar" | "json-schema", its text).
        out: the folder; see `run_experiment`.
        model: as for `run_experiment`.
        max_bytes: of a text.
        error: wanted standard deviation of the log marginal likelihood of a run, nats.
        tolerance: most difference of a text's log-probability for the beam, nats a byte.
        quick: fewer and smaller runs.
        seed: of everything.
        **options: as for `run_experiment`: workers, ray, progress, command.

    Raises:
        ValueError: bad arguments. Otherwise as `run_experiment`.
    """
    for name, value in (("error", error), ("tolerance", tolerance)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{name} must be a number of nats above 0, got {value!r}")
    kind, source = constraint
    target = {"prompt": prompt, "kind": kind, "source": source, "max_bytes": max_bytes}
    _compiled(target)  # raises before any work
    spec = {"target": target, "tolerance": tolerance, "seed": seed}
    experiment = Experiment(
        "study",
        "Your model, prompt and constraint",
        "which settings this target needs",
        partial(_jobs, spec),
        run,
        partial(report, error),
    )
    done = run_experiment(experiment, out, quick=quick, model=model or TINY, **options)
    return done, recommend(done.rows, error)


def _jobs(spec: Config, quick: bool, model: Config) -> list[Config]:
    target, seed = spec["target"], spec["seed"]
    common = {"model": model, "target": target}
    out: list[Config] = [
        {**common, "part": "beam", "tolerance": spec["tolerance"], "particles": 24, "seed": seed}
    ]
    methods = ["is", "smc"] + ["lookahead"] * (target["kind"] == "regex")
    if _few(target) is not None:
        out.append({**common, "part": "enumerate"})
    else:
        chunks, runs, n = (1, 4, 64) if quick else (3, 4, 192)
        many = {"part": "pool", "particles": n, "runs": runs, **_WIDE}
        seeds = [seed + 10_000 + runs * i for i in range(chunks)]
        out += [{**common, **many, "method": m, "seed": s} for m in methods for s in seeds]
    for prune in ("topk", "unbiased"):
        for method in methods:
            for n in (8, 32) if quick else (8, 32, 96):
                runs = 10 if quick else 24
                how = {"method": method, "K": 5, "threshold": 0.001, "prune": prune}
                more = {"particles": n, "runs": runs, "seed": seed}
                out.append({**common, "part": "runs", **how, **more})
    return out


def run(config: Config) -> Outcome:
    """Do one part of the study."""
    parts = {"beam": _beam_part, "enumerate": _enumerate_part}
    return run_sync(parts.get(config["part"], _runs_part)(config))


def _compiled(target: Config) -> ByteConstraint:
    kind = target["kind"]
    if kind not in KINDS:
        raise ValueError(f"unknown kind of constraint {kind!r}; known: {', '.join(KINDS)}")
    return KINDS[kind](target["source"])


def _prompt(target: Config) -> Prompt:
    return Prompt.from_bytes(target["prompt"].encode("utf-8", "surrogateescape"), literal=True)


def _few(target: Config) -> list[bytes] | None:
    """Return every text of the constraint if they are few, else None."""
    if target["kind"] != "regex":
        return None
    dfa = _compiled(target)
    return texts_of(dfa, FEW_TEXTS, target["max_bytes"]) if isinstance(dfa, ByteDFA) else None


def texts_of(dfa: ByteDFA, most: int, max_bytes: int) -> list[bytes] | None:
    """Return the texts of at most `max_bytes` bytes of an automaton; None if more than `most`.

    Every state can reach acceptance, so there are at least as many texts as there are
    beginnings of one length, and the walk stops as soon as there are too many.
    """
    table = dfa.host_table()
    out, frontier = list[bytes](), [(b"", 0)]
    for length in range(max_bytes + 1):
        out += [text for text, state in frontier if table.accept[state]]
        if len(out) + len(frontier) > 2 * most or not frontier:
            break
        following = list[tuple[bytes, int]]()
        for text, state in frontier:
            symbols = np.flatnonzero(table.next[state] >= 0)
            if len(following) + len(symbols) > most:
                return None
            following += [(text + bytes([b]), int(table.next[state][b])) for b in symbols.tolist()]
        frontier = following if length < max_bytes else []
    return out if 0 < len(out) <= most else None


def _target(config: Config, params: BeamParams) -> tuple[ByteLLM, Any]:
    target = config["target"]
    llm = ByteLLM(fresh_engine(config["model"]), params, prompt=_prompt(target))
    return llm, llm * _compiled(target)


async def _beam_part(config: Config) -> Outcome:
    """Draw texts that the target admits, and measure the beam that they need."""
    llm, target = _target(config, beam(_WIDE))
    seen = dict[bytes, None]()
    for seed in range(config["seed"], config["seed"] + 4):
        try:
            pilot = await smc(
                target,
                config["particles"],
                max_bytes=config["target"]["max_bytes"],
                seed=seed,
                progress=False,
            )
        except AllParticlesDeadError:
            continue
        order = np.argsort(-pilot.log_weights, kind="stable")
        ended = pilot.state.particles.ended
        seen |= dict.fromkeys(pilot.texts[i] for i in order.tolist()[:8] if ended[i])
    prompt = llm.prompt_bytes
    texts = [prompt + t for t in seen if prompt + t][:16]
    shown = [t[len(prompt) :].decode("utf-8", "replace") for t in texts]
    if len(texts) < 3:
        return Outcome({"texts": shown, "curve": []})
    try:
        found = await calibrate(llm.llm, texts, config["tolerance"], max_bytes=4096, **_GRIDS)
        curve = found.curve
    except CalibrationError as error:
        curve = error.curve
    return Outcome({"texts": shown, "curve": [_packed(p) for p in curve]})


def _packed(point: Point) -> dict[str, Any]:
    p = point.params
    named = {"K": p.K, "threshold": p.prune_threshold, "prune": p.prune}
    return named | {"excess": point.excess, "bound": point.bound, "rows": point.rows}


async def _enumerate_part(config: Config) -> Outcome:
    texts = _few(config["target"])
    assert texts is not None
    model = byte_model(fresh_engine(config["model"]))
    prompt = _prompt(config["target"])
    log_z, unsure = await enumerate_texts(model, texts, WIDE, prompt)
    return Outcome({"log_truth": log_z, "log_unsure": unsure, "texts": len(texts)})


async def _runs_part(config: Config) -> Outcome:
    llm, target = _target(config, beam(config))
    options: dict[str, Any] = {"ess_threshold": 0.0 if config.get("method") == "is" else 0.5}
    if config.get("method") == "lookahead":
        options["proposal"] = options["twist"] = Lookahead()
        await options["proposal"].fit(target, config["target"]["max_bytes"])
    seeds = range(config["seed"], config["seed"] + config["runs"])
    most = config["target"]["max_bytes"]
    found = [await one_run(llm, target, config["particles"], most, s, options) for s in seeds]
    return Outcome({k: [f[k] for f in found] for k in found[0]})
