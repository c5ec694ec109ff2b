"""The commands `score` and `choose`: the weights of given texts."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from genlm_bytes_smc.cli.common import (
    as_prompt,
    as_text,
    bar,
    both_ways,
    new_beam,
    open_llm,
    open_model,
    read_argument,
    read_file,
    say,
    table,
    write_file,
    write_json,
)
from genlm_bytes_smc.cli.options import ChooseOptions, CliError, ScoreOptions, UsageError
from genlm_bytes_smc.html import printable
from genlm_bytes_smc.scoring import score

if TYPE_CHECKING:  # `score` alone needs neither
    from genlm_bytes_smc.choosing import Choice
    from genlm_bytes_smc.surprisals import Surprisal


async def _show_surprisal(options: ScoreOptions) -> None:
    """Run the command `score` with --per, --lines or --jsonl."""
    from genlm_bytes_smc.surprisals import page, surprisal

    if options.special_tokens:
        raise UsageError("--special-tokens goes with the score of a whole file only")
    file, texts = options.file, _texts(options)
    llm = open_llm(options)
    per = "byte" if options.per is None else options.per
    with _reading(sum(map(len, texts))) as advance:
        found = await surprisal(llm, texts, per, advance=advance)
    if options.html is not None:
        write_file(options.html, page(found, f"Surprisal of {file}"))
    if options.json:
        write_json({"file": file, "texts": [_facts(r, options.per) for r in found]})
        return
    for n, result in enumerate(found):
        told = f"text {n + 1}: " if len(found) > 1 else ""
        bits = result.total / math.log(2)
        say((f"{told}{bits:.3f} bits, {result.bits_per_byte:.4f} a byte", "bold"))
        if options.per is not None:
            for part in result.to_records():
                say(f"{part['bits']:10.3f}  ", (printable(part["text"]), "green"))


def _texts(options: ScoreOptions) -> list[bytes]:
    """Return the texts of the file.

    Raises:
        UsageError: --lines and --jsonl. CliError: no texts, or a line without the field.
    """
    if options.lines and options.jsonl is not None:
        raise UsageError("give --lines or --jsonl, not both")
    file, data = options.file, read_file(options.file)
    if options.jsonl is not None:
        lines = enumerate(data.split(b"\n"), 1)
        texts = [_field(line, options.jsonl, file, n) for n, line in lines if line.strip()]
    else:
        texts = [t for t in (data.splitlines() if options.lines else [data]) if t]
    if not texts:
        raise CliError(f"nothing to score: {file} is empty")
    return texts


def _field(line: bytes, field: str, file: str, n: int) -> bytes:
    try:
        value = json.loads(line)[field]
    except (ValueError, KeyError, TypeError, IndexError):
        raise CliError(f"{file}, line {n}: not a JSON object with the field {field!r}") from None
    if not isinstance(value, str):
        raise CliError(f"{file}, line {n}: {field!r} is no text but {value!r}")
    return value.encode("utf-8", errors="surrogatepass")


def _facts(result: Surprisal, per: str | None) -> dict[str, Any]:
    facts = {
        "bytes": len(result.text),
        "nats": result.total,
        "bits": result.total / math.log(2),
        "bits_per_byte": result.bits_per_byte,
    }
    return facts if per is None else facts | {"per": per, "parts": result.to_records()}


async def show_score(options: ScoreOptions) -> None:
    """Run the command `score`."""
    if options.html is not None and options.per is None:
        raise UsageError("--html shows parts of a text: say which by --per")
    if options.per is not None or options.lines or options.jsonl is not None:
        await _show_surprisal(options)
        return
    text = read_file(options.file)
    if not text:
        raise CliError(f"nothing to score: {options.file} is empty")
    llm = open_model(options)
    begin = await new_beam(options, llm)
    prompt = as_prompt(options, text, begin.lanes.model)
    forwards, start = llm.counts.forwards, time.perf_counter()
    with _reading(len(text)) as advance:
        found = await score(begin, prompt, advance)
    seconds = time.perf_counter() - start
    facts = {
        "file": options.file,
        "bytes": found.n_bytes,
        "bits_per_byte": found.bits_per_byte,
        "log_p": found.log_p,
        "log_dropped": found.log_dropped,
        "heals": found.heals,
        "stretches": found.stretches,
        "bytes_reread": found.reread,
        "seconds": seconds,
        "bytes_per_second": found.n_bytes / seconds,
        "lm_forwards": llm.counts.forwards - forwards,
    }
    if options.json:
        write_json(facts)
        return
    say((f"{found.bits_per_byte:.4f} bits per byte", "bold"))
    table(
        [
            ("bytes", f"{found.n_bytes:,}"),
            ("log probability", f"{found.log_p:.3f} nats"),
            ("log dropped mass", f"{found.log_dropped:.3f} nats"),
            ("heals", f"{found.heals}"),
            ("stretches", f"{found.stretches} ({found.reread:,} bytes read again as context)"),
            ("time", f"{seconds:.2f} s, {found.n_bytes / seconds:,.0f} bytes/s"),
            ("forwards", f"{facts['lm_forwards']:,}"),
        ]
    )


@contextmanager
def _reading(total: int) -> Iterator[Callable[[int], object]]:
    """Show a bar on a terminal's stderr; yield what moves it on by some bytes."""
    err = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("bytes"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("reading", total=total)
        yield lambda n: progress.advance(task, n)


# -- choose --------------------------------------------------------------------------------


async def show_choice(options: ChooseOptions) -> None:
    """Run the command `choose`."""
    from genlm_bytes_smc.choosing import THRESHOLD, WIDTH, choose

    if options.normalise == "end" and options.no_eos:
        raise UsageError("--normalise end weighs the end of the text, which --no-eos rules out")
    if options.prompt == options.options_file == "-":
        raise UsageError("stdin holds the prompt or the options, not both: - stands twice")
    texts = [os.fsencode(answer) for answer in options.answers or ()]
    if options.options_file is not None:
        texts += read_file(options.options_file).splitlines()
    if not texts:
        raise UsageError("give one answer or more, as arguments or by --options-file")
    if options.prune is None and options.width is None:
        least = THRESHOLD if options.threshold is None else options.threshold
        options = dataclasses.replace(options, width=WIDTH, threshold=least)
    text, llm = read_argument(options.prompt), open_llm(options)
    start = time.perf_counter()
    found = await choose(llm, as_prompt(options, text, llm.model), texts, options.normalise)
    seconds = time.perf_counter() - start
    if options.json:
        entries = [
            record | both_ways("option", text)
            for text, record in zip(texts, found.to_records(), strict=True)
        ]
        write_json(
            {
                "prompt": as_text(text),
                "normalise": options.normalise,
                "best": as_text(found.top(1)[0][0]),
                "options": entries,
                "bound": found.bound,
                "seconds": seconds,
                "lm_forwards": llm.model.engine.counts.forwards,
            }
        )
    else:
        _print_choice(found, llm.params.prune)


def _print_choice(found: Choice, prune: str) -> None:
    say(("probability  log weight  option", "dim"))
    weights = dict(zip(found.options, found.log_weights.tolist(), strict=True))
    for option, p in found.top():
        shown = printable(as_text(bytes(option)))
        say(f"{p:11.5f}  {weights[option]:10.4f}  ", (shown, "green"), "  ", (bar(p), "green"))
    if prune == "topk":
        told = "what the beam dropped after the prompt can change a probability by"
        say((f"{told} {found.bound:.2g}", "dim"))
