"""The commands `generate`, particles over a model and a constraint, and `show`, their page.

Beside a run's particles, its file holds what it was asked for, and the surprisal of its likeliest
texts and how they may be cut, so that the page can be made without the model.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import os
import sys
import time
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from genlm_bytes_smc.cli.common import (
    as_prompt,
    as_text,
    both_ways,
    busy,
    console,
    constraint_of,
    open_model,
    parameters,
    read_argument,
    say,
    table,
    write_file,
    write_json,
)
from genlm_bytes_smc.cli.options import PROGRAM, CliError, GenerateOptions, ShowOptions, UsageError
from genlm_bytes_smc.constraints import ByteConstraint, ConstraintError, Utf8
from genlm_bytes_smc.html import printable
from genlm_bytes_smc.lookahead import Lookahead
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.scoring import Cut, ScoreError
from genlm_bytes_smc.smc import AllParticlesDeadError, SMCResult, StagedResult, files, smc
from genlm_bytes_smc.surprisals import Surprisal, spans_of, surprisal
from genlm_bytes_smc.viz import run_page

SHOWN = 10  # texts that are printed
TEXTS = 4  # the likeliest are read again
LONGEST = 2000  # bytes: longer texts are left out
BLOCK = 16  # bytes that a draft proposes at once, as in `smc`
_PILOT_SEED = 1_000_003


async def show_generated(options: GenerateOptions) -> None:
    """Run the command `generate`."""
    if options.no_eos:
        raise UsageError("--no-eos leaves no text that ends: every particle would weigh zero")
    options = _combined(options)
    about, constraint = _constraint(options)
    save = options.save
    if save is not None:
        _check_place(save)
    text, engine = read_argument(options.prompt), open_model(options)
    llm = _after(text, engine, options)
    draft = None
    if options.draft is not None:  # deferred: no text is left out that the target may weigh
        small = dataclasses.replace(options, model=options.draft, prune="deferred")
        draft = _after(text, open_model(small), small)
    target = llm * constraint
    about = {"prompt": as_text(text), "model": options.model, **about}
    before = engine.counts.rows
    ahead = await _lookahead(options, target)
    rows, forwards = engine.counts.rows, engine.counts.forwards
    drafted = 0 if draft is None else draft.model.engine.counts.rows
    start = time.perf_counter()
    try:
        result = await smc(
            target,
            options.particles,
            options.ess,
            options.max_bytes,
            resampling_method=options.resampling,
            seed=options.seed,
            record=save is not None,
            lookahead=ahead,
            budget=options.budget,
            draft=draft,
            block=options.block or BLOCK,
            resample_at=[os.fsencode(string) for string in options.resample_at or ()] or None,
        )
    except AllParticlesDeadError as error:
        if save is not None:
            _save(error.result, save, about)
        raise CliError(str(error)) from None
    facts = about | _facts(result, time.perf_counter() - start)
    facts |= {
        "saved": save,
        "lookahead_rows": rows - before,
        "lm_rows": engine.counts.rows - rows,
        "lm_forwards": engine.counts.forwards - forwards,
        "draft_rows": 0 if draft is None else draft.model.engine.counts.rows - drafted,
    }
    if save is not None:
        _save(result, save, about, await _read_again(llm, result))
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
    names = ("resampling", "lookahead", "max_bytes", "draft", "block", "resample_at")
    about = {name: getattr(options, name) for name in names}
    return {"constraint": told, "ess_threshold": options.ess, **about}, constraint


def _combined(options: GenerateOptions) -> GenerateOptions:
    """Return the options with the look-ahead and the block that follow from the others.

    Raises:
        UsageError: two of them do not go together.
    """
    units = ["--draft"] * (options.draft is not None) + ["--resample-at"] * bool(
        options.resample_at
    )
    ahead = options.lookahead or ("none" if units else "auto")
    if len(units) == 2:
        raise UsageError("--draft does not go with --resample-at: each says where to resample")
    if units and ahead != "none":
        raise UsageError(f"{units[0]} does not go with --lookahead {ahead}, only with none")
    if options.budget is not None and ahead != "auto":
        got = f"got {units[0]}" if units else f"got --lookahead {ahead}"
        raise UsageError(f"--budget needs --lookahead auto, {got}")
    if options.draft is not None and options.pruning == "unbiased":
        raise UsageError("--draft does not go with --prune unbiased: the model reads whole blocks")
    if options.draft is None and options.block is not None:
        raise UsageError("--block is the length of what a draft proposes: it needs --draft")
    if "" in (options.resample_at or ()):
        raise UsageError("--resample-at needs a string of at least a byte, got ''")
    block = None if options.draft is None else options.block or BLOCK
    return dataclasses.replace(options, lookahead=ahead, block=block)


def _after(text: bytes, engine: Any, options: GenerateOptions) -> ByteLLM:
    """Return a model that has read the prompt."""
    params, transform = parameters(options, engine)
    llm = ByteLLM(engine, params, transform=transform)
    return llm.with_prompt(as_prompt(options, text, llm.model))


async def _lookahead(options: GenerateOptions, target: Any) -> Lookahead | str | None:
    """Return the look-ahead asked for, fitted before the run so that its rows are counted apart.

    That of "auto" is fitted in the run, and its rows are the run's.
    """
    kind, most = options.lookahead, options.max_bytes
    if kind in ("none", "auto"):
        return None if kind == "none" else kind
    seed = options.seed + _PILOT_SEED  # the run's own draws are no part of what is learned
    try:
        with busy("learning to look ahead"):
            if kind == "pilot":
                ahead = await Lookahead.from_pilot(target, max_bytes=most, seed=seed)
            else:
                ahead = Lookahead(seed=seed)
            await ahead.fit(target, most)
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
    write_file(path, json.dumps(files.pack(result.state, result.resumable) | beside))


async def _read_again(llm: ByteLLM, result: SMCResult) -> list[dict[str, Any]]:
    """Return the surprisal of the likeliest texts under the model, as JSON values.

    The model has computed the rows already, so as long as its cache holds them this takes none.
    """
    likely = [text for text, *_ in result.grouped()[:TEXTS]]
    texts = list(dict.fromkeys(text for text in likely if 0 < len(text) <= LONGEST))
    try:
        found = await surprisal(llm, texts) if texts else []
    except ScoreError:  # a beam too small for a text longer than the window
        return []
    return [
        {
            "text": base64.b64encode(r.text).decode("ascii"),
            "nats": [round(x, 4) if np.isfinite(x) else None for x in r.bytewise.tolist()],
            "cuts": [[float(f"{cut.share:.4g}"), list(cut.ends)] for cut in r.cuts],
        }
        for r in found
    ]


def _facts(result: SMCResult, seconds: float) -> dict[str, Any]:
    posterior = [
        {**both_ways("text", text), "probability": p, "particles": n}
        for text, p, n, _ in result.grouped()
    ]
    found = result.metrics()
    stages = [
        {
            "particles": stage.result.size,
            "share": stage.share,
            "lookahead": stage.lookahead,
            "trust": stage.trust,
            "lm_rows": stage.rows,
            "log_ml": stage.result.log_ml,
        }
        for stage in (result.stages if isinstance(result, StagedResult) else ())
    ]
    return {
        "posterior": posterior,
        **found,
        "seed": result.seed,
        "seconds": seconds,
        "bytes_per_second": found["bytes"] / seconds,
        "stages": stages,
        "warning": result.summary().get("warning"),
    }


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


def _told_draft(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a line about the draft, or about the strings at which particles wait."""
    if facts["draft"] is not None:
        rows = f"{facts['draft_rows']:,} rows of its own"
        return [("draft", f"{facts['draft']}, blocks of {facts['block']} bytes, {rows}")]
    strings = " ".join(map(repr, facts["resample_at"] or ()))
    return [("resampled after", strings)] if strings else []


def _print(facts: dict[str, Any]) -> None:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("probability", justify="right", no_wrap=True)
    shown.add_column("particles", justify="right", no_wrap=True)
    shown.add_column("text", overflow="fold")
    for entry in facts["posterior"][:SHOWN]:
        text = Text(printable(entry["text"]), "green")
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
        *_told_draft(facts),
        *_told_ahead(facts),
        ("seed", str(facts["seed"])),
    ]
    table([*rows, *([("saved", facts["saved"])] if facts["saved"] else [])])
    if facts["saved"]:
        say(("see it with: ", "dim"), f"{PROGRAM} show {facts['saved']} --open")


# -- show ----------------------------------------------------------------------------------


def show_run(options: ShowOptions) -> None:
    """Run the command `show`."""
    run, out = options.run, options.out
    result, about, surprisals = _load(run)
    try:
        page = run_page(result, about, title=Path(run).name, surprisals=surprisals)
    except ValueError as error:
        raise CliError(f"cannot show {run}: {error}") from None
    if out == "-":
        if options.browse:
            raise UsageError("--open needs a file, not --out -")
        sys.stdout.write(page)
        return
    target = Path(run).with_suffix(".html") if out is None else Path(out)
    if target.exists() and target.samefile(run):
        raise UsageError(f"--out {target} is the run itself")
    write_file(target, page)
    say(f"wrote {target}")
    if options.browse:
        webbrowser.open(target.resolve().as_uri())


def _load(path: str) -> tuple[SMCResult, dict[str, Any], list[Surprisal]]:
    try:
        data = files.read(path)
        result, field = SMCResult(*files.unpack(data)), files.Field("run", data)
        noted = field.members().get("readings")
        found = [] if noted is None else [_reading(item) for item in noted.items()]
        return result, _about(field), found
    except OSError as error:
        raise CliError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise CliError(f"{path} is no saved run: {error}") from None


def _about(run: files.Field) -> dict[str, Any]:
    """Return what the page shows of what the run was asked for."""
    about = run.members().get("about")
    given = {} if about is None else about.members()
    named = ("prompt", "constraint", "model", "resampling")
    found: dict[str, Any] = {name: given[name].text() for name in named if name in given}
    if "ess_threshold" in given:
        found["ess_threshold"] = given["ess_threshold"].number(0, 1)
    return found


def _reading(item: files.Field) -> Surprisal:
    try:
        text = base64.b64decode(item["text"].text(), validate=True)
    except (ValueError, binascii.Error):
        raise item["text"].refuse("base64") from None
    nats = [np.inf if x.value is None else x.number() for x in item["nats"].items(len(text))]
    cuts = list[Cut]()
    for cut in item["cuts"].items():
        share, ends = cut.items(2)
        found = tuple(end.count(len(text)) for end in ends.items())
        cuts.append(Cut(share.number(0, 1), found))
    return Surprisal(
        text, np.array(nats, dtype=np.float64), spans_of(text, "byte"), "", tuple(cuts)
    )
