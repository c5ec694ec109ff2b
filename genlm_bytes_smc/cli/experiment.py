"""What `experiment` does: a study, its rows and its report."""

from __future__ import annotations

import gc
from typing import Any

from genlm_bytes_smc.cli.options import ModelOptions
from genlm_bytes_smc.cli.output import CliError, UsageError, say, write_json
from genlm_bytes_smc.experiments import EXPERIMENTS, Done, ExperimentError, run_experiment


def show_experiment(
    options: ModelOptions,
    name: str,
    out: str,
    *,
    quick: bool,
    workers: int | None,
    ray: str | None,
) -> None:
    """The command `experiment`."""
    if name not in EXPERIMENTS:
        raise UsageError(f"unknown experiment {name!r}; known: {', '.join(EXPERIMENTS)}")
    if not options.json:
        say((EXPERIMENTS[name].title, "bold"))
    done = finished(
        lambda: run_experiment(
            name, out, quick=quick, model=model_of(options), workers=workers, ray=ray
        ),
        out,
    )
    if options.json:
        write_json({"experiment": name, **told(done)})
        return
    for finding in EXPERIMENTS[name].report(done.rows).findings:
        say(f"• {finding.replace('`', '')}")
    say_files(done)


def model_of(options: ModelOptions) -> dict[str, Any]:
    """The model that the options name, as experiments describe it."""
    named: dict[str, Any] = {"name": options.model, "device": options.device}
    named["backend"] = options.backend and options.backend.value
    if options.trust_remote_code:
        named["engine_opts"] = {"trust_remote_code": True}
    return {k: v for k, v in named.items() if v is not None}


def finished(run: Any, out: str) -> Any:
    """What a study returns, its errors in one line.

    Raises:
        CliError: it failed; what was done is kept.
    """
    gc.enable()
    try:
        return run()
    except ExperimentError as error:
        raise CliError(f"{str(error).splitlines()[0]} (rows so far are in {out})") from None
    except OSError as error:
        raise CliError(f"cannot write to {out}: {error.strerror or error}") from None


def told(done: Done) -> dict[str, Any]:
    """How a study went, as JSON values."""
    return {"jobs": len(done.rows), "ran": done.ran, "files": [str(f) for f in done.files]}


def say_files(done: Done) -> None:
    """Print what was written."""
    earlier = len(done.rows) - done.ran
    before = f", {earlier} of them done before" if earlier else ""
    say((f"{len(done.rows)} jobs{before}; see ", "dim"), str(done.files[0]))
