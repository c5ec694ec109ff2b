"""The command `score`: the log probability of a whole file."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from genlm_bytes_smc.cli.inputs import as_prompt, new_beam, open_model, read_file, seed_of
from genlm_bytes_smc.cli.options import BeamOptions
from genlm_bytes_smc.cli.output import CliError, say, table, write_json
from genlm_bytes_smc.scoring import ScoreError, score


async def show_score(options: BeamOptions, file: str) -> None:
    """Run the command `score`."""
    text = read_file(file)
    if not text:
        raise CliError(f"nothing to score: {file} is empty")
    llm = open_model(options)
    begin = await new_beam(options, llm, seed_of(options))
    prompt = as_prompt(options, text, begin.lanes.model)
    forwards, start = llm.counts.forwards, time.perf_counter()
    with _progress() as progress:
        task = progress.add_task("reading", total=len(text))
        try:
            found = await score(begin, prompt, lambda n: progress.advance(task, n))
        except ScoreError as error:
            raise CliError(str(error).replace("lower threshold", "lower --threshold")) from None
    seconds = time.perf_counter() - start
    facts = {
        "file": file,
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


def _progress() -> Progress:
    err = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("bytes"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
