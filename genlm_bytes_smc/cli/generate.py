"""The command `generate`: particles over a language model and a constraint."""

from __future__ import annotations

import base64
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from genlm_bytes_smc.cli.inputs import (
    as_prompt,
    constraint_of,
    eos_spellings,
    open_model,
    parameters,
    read_argument,
    seed_of,
)
from genlm_bytes_smc.cli.options import PROGRAM, GenerateOptions
from genlm_bytes_smc.cli.output import (
    CliError,
    UsageError,
    as_text,
    busy,
    console,
    say,
    table,
    visible,
    write_json,
)
from genlm_bytes_smc.cli.readings import read_again
from genlm_bytes_smc.constraints import ByteConstraint, ConstraintError, Utf8
from genlm_bytes_smc.lookahead import Lookahead
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import AllParticlesDeadError, SMCResult, StagedResult, files, smc

SHOWN = 10  # texts that are printed
_PILOT_SEED = 1_000_003


async def show_generated(options: GenerateOptions, prompt: str) -> None:
    """Run the command `generate`."""
    if options.no_eos:
        raise UsageError("--no-eos leaves no text that ends: every particle would weigh zero")
    if options.budget is not None and options.lookahead != "auto":
        raise UsageError(f"--budget needs --lookahead auto, got --lookahead {options.lookahead}")
    about, constraint = _constraint(options)
    save = options.save
    if save is not None:
        _check_place(save)
    text, seed = read_argument(prompt), seed_of(options)
    engine = open_model(options)
    params, transform = parameters(options, eos_spellings(engine), seed)
    llm = ByteLLM(engine, params, transform=transform)
    llm = llm.with_prompt(as_prompt(options, text, llm.model))
    target = llm * constraint
    about = {"prompt": as_text(text), "model": options.model, **about}
    before = engine.counts.rows
    ahead = await _lookahead(options.lookahead, target, options.max_bytes, seed)
    rows, forwards = engine.counts.rows, engine.counts.forwards
    start = time.perf_counter()
    try:
        result = await smc(
            target,
            options.particles,
            options.ess,
            options.max_bytes,
            resampling_method=options.resampling,
            seed=seed,
            record=save is not None,
            lookahead=ahead,
            budget=options.budget,
        )
    except AllParticlesDeadError as error:
        if save is not None:
            _save(error.result, save, about)
        raise CliError(str(error)) from None
    seconds = time.perf_counter() - start
    lm_rows, lm_forwards = engine.counts.rows - rows, engine.counts.forwards - forwards
    if save is not None:
        _save(result, save, about, await read_again(llm, result))
    facts = about | _facts(result, seconds) | {"saved": save}
    facts |= {
        "lookahead_rows": rows - before,
        "lm_rows": lm_rows,
        "lm_forwards": lm_forwards,
    }
    if options.json:
        write_json(facts)
    else:
        _print(facts)


def _constraint(options: GenerateOptions) -> tuple[dict[str, Any], ByteConstraint]:
    """Return what a run is told to do, and the constraint."""
    given = options.sources()
    if len(given) > 1:
        told = " and ".join(name for name, _ in given)
        raise UsageError(f"only one constraint can be given, got {told}")
    told, constraint = "UTF-8", Utf8()
    for option, source in given:
        told, constraint = f"{option[2:]} {source}", constraint_of(option, source)
    about = {"constraint": told, "ess_threshold": options.ess}
    about |= {name: getattr(options, name) for name in ("resampling", "lookahead", "max_bytes")}
    return about, constraint


async def _lookahead(kind: str, target: Any, max_bytes: int, seed: int) -> Lookahead | str | None:
    """Return the look-ahead asked for, fitted before the run so that its rows are counted apart.

    That of "auto" is fitted in the run, and its rows are the run's.
    """
    if kind in ("none", "auto"):
        return None if kind == "none" else kind
    try:
        with busy("learning to look ahead"):
            if kind == "pilot":
                other = seed + _PILOT_SEED  # the run's own draws are no part of what is learned
                ahead = await Lookahead.from_pilot(target, max_bytes=max_bytes, seed=other)
            else:
                ahead = Lookahead(seed=seed + _PILOT_SEED)
            await ahead.fit(target, max_bytes)
    except ConstraintError as error:
        raise CliError(f"--lookahead {kind}: {error}") from None
    return ahead


def _check_place(path: str) -> None:
    """Refuse a place that cannot be written, before the run and not after it."""
    folder = Path(os.path.realpath(path)).parent  # of the file itself, where it is a link
    if Path(path).is_dir():
        raise CliError(f"cannot write {path}: it is a folder")
    if not folder.is_dir():
        raise CliError(f"cannot write {path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise CliError(f"cannot write {path}: no permission to write in {folder}")


def _save(
    result: SMCResult, path: str, about: dict[str, Any], readings: Sequence[dict[str, Any]] = ()
) -> None:
    """Write the run as `SMCResult.save` does; beside it what it was asked for, and `readings`."""
    beside = {"about": about, "readings": list(readings)}
    data = files.pack(result.state, result.resumable) | beside
    try:
        files.write(path, json.dumps(data))
    except OSError as error:
        raise CliError(f"cannot write {path}: {error.strerror or error}") from None


def _facts(result: SMCResult, seconds: float) -> dict[str, Any]:
    read = sum(info.active for info in result.history)
    return {
        "posterior": [
            {
                "text": as_text(text),
                "text_base64": base64.b64encode(text).decode(),
                "probability": p,
                "particles": n,
            }
            for text, p, n, _ in result.grouped()
        ],
        "log_ml": result.log_ml,
        "log_ml_error": result.log_ml_error,
        "ess": result.ess,
        "particles": result.size,
        "dead": int(result.state.particles.dead.sum()),
        "steps": len(result.history),
        "resamplings": len(result.ancestry),
        "seed": result.seed,
        "bytes": read,
        "seconds": seconds,
        "bytes_per_second": read / seconds,
        "stages": _stages(result),
        "warning": result.summary().get("warning"),
    }


def _stages(result: SMCResult) -> list[dict[str, Any]]:
    """Return the runs of a result of stages; none of another one."""
    if not isinstance(result, StagedResult):
        return []
    return [
        {
            "particles": stage.result.size,
            "share": stage.share,
            "lookahead": stage.lookahead,
            "trust": stage.trust,
            "lm_rows": stage.rows,
            "log_ml": stage.result.log_ml if stage.result.log_ml > -math.inf else None,
        }
        for stage in result.stages
    ]


def _told_ahead(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a line about the look-ahead, if there was one."""
    if facts["lookahead"] == "none":
        return []
    if facts["lookahead"] == "auto":
        plain, *others = facts["stages"]
        told = [f"{plain['particles']} particles without"]
        if plain["lookahead"]:  # there was a search
            told, others = ["a search"], facts["stages"]
        told += [f"{s['particles']} trusting it {s['trust']:.0%}" for s in others]
        lines = [("look-ahead", f"auto: {', '.join(told)}")]
        return lines + [("warning", facts["warning"])] * (facts["warning"] is not None)
    return [("look-ahead", f"{facts['lookahead']}, {facts['lookahead_rows']:,} LM rows to fit")]


def _print(facts: dict[str, Any]) -> None:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("probability", justify="right", no_wrap=True)
    shown.add_column("particles", justify="right", no_wrap=True)
    shown.add_column("text", overflow="fold")
    for entry in facts["posterior"][:SHOWN]:
        text = Text(visible(entry["text"]).replace("\n", "\\n").replace("\t", "\\t"), "green")
        shown.add_row(f"{entry['probability']:.4f}", str(entry["particles"]), text)
    left = len(facts["posterior"]) - SHOWN
    if left > 0:
        shown.add_row("", "", Text(f"and {left} more", "dim"))
    out = console()
    out.soft_wrap = False
    out.print(shown)
    error = facts["log_ml_error"]
    told = "" if error != error else f" ± {error:.4f}"
    n, dead = facts["particles"], facts["dead"]
    rows = [
        ("constraint", facts["constraint"]),
        ("log marginal likelihood", f"{facts['log_ml']:.4f}{told} nats"),
        ("effective sample size", f"{facts['ess']:.1f} of {n}" + f", {dead} dead" * (dead > 0)),
        ("resamplings", f"{facts['resamplings']} in {facts['steps']} steps"),
        ("time", f"{facts['seconds']:.2f} s, {facts['bytes_per_second']:,.0f} bytes/s"),
        ("LM rows", f"{facts['lm_rows']:,} in {facts['lm_forwards']:,} forwards"),
        *_told_ahead(facts),
        ("seed", str(facts["seed"])),
    ]
    table([*rows, *([("saved", facts["saved"])] if facts["saved"] else [])])
    if facts["saved"]:
        say(("see it with: ", "dim"), f"{PROGRAM} show {facts['saved']} --open")
